"""Write a model folder that open_clip or transformers reads, and prove in a fresh process that it computes the same.

`python -m vlmkd.export.clip --check FOLDER PROBE` is that process; `verify_export` starts it. It takes `--check` several times.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import errno
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmkd import __version__
from vlmkd.errors import UserError
from vlmkd.files import read_object
from vlmkd.image_spec import ImageSpec
from vlmkd.models.checkpoints import normalise_names
from vlmkd.models.clip import OPEN_CLIP_CONFIG, ClipModel, Tokenizer, encode, load_clip
from vlmkd.models.convert import to_hf_config, to_hf_processor, to_hf_state
from vlmkd.tensor_files import read_safetensors
from vlmkd.zoo import sha256_of

Layout = Literal["open_clip", "hf"]

PROVENANCE = "provenance.json"
_WEIGHTS = {"open_clip": "open_clip_model.safetensors", "hf": "model.safetensors"}
_CONFIG = {"open_clip": OPEN_CLIP_CONFIG, "hf": "config.json"}
_SCALARS = ("logit_scale", "logit_bias")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
_PROBE_TEXTS = (
    "a photo of a cat",
    "two red circles, and a much longer line of words that some models have to cut",
    "",
)
_PROBE_SEED = 20231001
_TOLERANCE = 1e-4
"""Largest difference of an embedding's component; fp32 on another kernel differs by less than 1e-5."""


def export_clip(
    folder: Path,
    clip: ClipModel,
    *,
    layout: Layout = "open_clip",
    half: bool = False,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write `clip` into `folder`, which appears complete or not at all; an older export there is replaced.

    Layout `open_clip` is what open_clip's `local-dir:` reads (a PrunedCLIP in that layout is read by our load_clip
    only), `hf` what transformers' CLIPModel reads. `half` stores fp16. provenance.json gets the sha256 of the weights,
    versions, git commit, the command, and the fields of `provenance`.

    Raises:
        UserError: an architecture that the layout cannot hold, a foreign folder in the way, or no space.
    """
    with new_folder(folder, list(_CONFIG.values())) as partial:
        (_write_open_clip if layout == "open_clip" else _write_hf)(partial, clip, half)
        facts = provenance_of(partial / _WEIGHTS[layout], clip.source, clip.module.parameters())
        write_json(partial / PROVENANCE, facts | {"half": half} | dict(provenance or {}))


@contextlib.contextmanager
def new_folder(folder: Path, marks: Sequence[str]) -> Iterator[Path]:
    """A folder to write into, which takes the place of `folder` when the block ends without an error.

    An older folder there is replaced if it holds one of the files `marks`.

    Raises:
        UserError: a foreign folder in the way, or no space.
    """
    folder = folder.absolute()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; the export is a folder there: move the file away")
    if folder.exists() and any(folder.iterdir()) and not any((folder / name).is_file() for name in marks):
        raise UserError(f"{folder} exists and is no model export; choose another folder")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        _swap(partial, folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise UserError(
                f"cannot write the export {folder}: {error.strerror}; free space or choose another folder"
            ) from None
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _swap(partial: Path, folder: Path) -> None:
    """Put `partial` in the place of `folder`."""
    if not folder.exists():
        os.replace(partial, folder)
        return
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old)


def _write_open_clip(folder: Path, clip: ClipModel, half: bool) -> None:
    config = copy.deepcopy(clip.config)
    if _write_tokenizer(folder, clip):
        config["text_cfg"]["hf_tokenizer_name"] = (
            "."  # any name makes open_clip read the files of this folder
        )
    else:
        config["text_cfg"].pop("hf_tokenizer_name", None)
    state = clip.module.state_dict()
    if not config.get("nonscalar_logit_scale"):
        state |= {name: state[name].reshape(()) for name in _SCALARS if name in state}
    _write_weights(folder / _WEIGHTS["open_clip"], state, half)
    write_json(
        folder / _CONFIG["open_clip"], {"model_cfg": config, "preprocess_cfg": _preprocess(clip.image_spec)}
    )


def _preprocess(spec: ImageSpec) -> dict[str, Any]:
    """open_clip's preprocess_cfg."""
    return {
        "size": list(spec.size),
        "mean": list(spec.mean),
        "std": list(spec.std),
        "interpolation": spec.interpolation,
        "resize_mode": spec.resize_mode,
        "fill_color": spec.fill[0] if len(set(spec.fill)) == 1 else list(spec.fill),
    }


def _write_hf(folder: Path, clip: ClipModel, half: bool) -> None:
    if clip.config.get("pruned"):
        raise UserError("export: transformers' CLIPModel has no ragged layers; use the open_clip layout")
    config = to_hf_config(clip.config)
    state = normalise_names(clip.module.state_dict())
    state["logit_scale"] = state["logit_scale"].reshape(())
    _write_weights(folder / _WEIGHTS["hf"], to_hf_state(state), half)
    write_json(folder / "preprocessor_config.json", to_hf_processor(clip.image_spec))
    write_json(folder / _CONFIG["hf"], config | {"dtype": "float16" if half else "float32"})
    if not _write_tokenizer(folder, clip):
        _write_clip_tokenizer(folder, clip.config["text_cfg"].get("context_length", 77))


def _write_weights(path: Path, state: Mapping[str, Tensor], half: bool) -> None:
    write_tensors(path, {name: _stored(name, tensor, half) for name, tensor in state.items()})


def write_tensors(path: Path, tensors: dict[str, Tensor], facts: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file with `facts` as its metadata.

    Raises:
        UserError: the disk refuses.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, {"format": "pt", **(facts or {})})
    except SafetensorError as error:  # its form of every failure of the disk
        raise UserError(f"cannot write {path}: {error}; free space or choose another folder") from None


def _stored(name: str, tensor: Tensor, half: bool) -> Tensor:
    """A tensor as the file has it: fp32 or fp16, scale and bias always fp32, integers as they are."""
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        tensor = tensor.to(torch.float16 if half and name not in _SCALARS else torch.float32)
    return tensor.contiguous().clone()  # a copy, because safetensors refuses tensors that share memory


def _write_tokenizer(folder: Path, clip: ClipModel) -> bool:
    """Write the model's own tokenizer files; False when it has none (open_clip's own tokenizer)."""
    from open_clip.tokenizer import HFTokenizer

    if clip.tokenizer_folder is not None:
        for name in _TOKENIZER_FILES:
            if (clip.tokenizer_folder / name).is_file():
                shutil.copyfile(clip.tokenizer_folder / name, folder / name)
        return True
    inner = clip.tokenizer.encode if isinstance(clip.tokenizer, Tokenizer) else clip.tokenizer
    if isinstance(inner, HFTokenizer):
        inner.save_pretrained(folder)
        return True
    return False


def _write_clip_tokenizer(folder: Path, context_length: int) -> None:
    """CLIP's own vocabulary in the files of transformers' CLIPTokenizer."""
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): index for token, index in tokenizer.encoder.items()}
    write_json(folder / "vocab.json", vocabulary)
    merges = "\n".join(" ".join(pair) for pair in tokenizer.bpe_ranks)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    start, end = names.values()
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": context_length, "do_lower_case": True}
    write_json(folder / "tokenizer_config.json", settings | special)


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def provenance_of(weights: Path, source: str, parameters: Iterable[Tensor]) -> dict[str, Any]:
    """sha256 of the weights, source and size of the model, versions, git commit and the command."""
    return {
        "file": weights.name,
        "sha256": sha256_of(weights),
        "source": source,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "vlmkd": __version__,
        "torch": str(torch.__version__),
        "git_commit": _git_commit(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _git_commit() -> str:
    """Commit of the repository that this code is in; empty outside one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        answer = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:  # no git on this machine
        return ""
    return answer.stdout.strip()


# ----------------------------------------------------------------------------------------------------------- check


def verify_export(folder: Path, clip: ClipModel) -> None:
    """Reload `folder` in a fresh process and compare with `clip`: embeddings, logit scale, token ids, statistics.

    The process uses plain open_clip or transformers (load_clip for a PrunedCLIP) and no network.

    Raises:
        UserError: the reloaded model differs, or cannot be loaded.
    """
    folder = folder.absolute()
    if read_object(folder / PROVENANCE, "provenance")["half"]:
        state = clip.module.state_dict()
        clip = clip.with_weights(
            {name: _stored(name, tensor, True).float() for name, tensor in state.items()}
        )
    with tempfile.TemporaryDirectory() as scratch:
        probe = Path(scratch) / "probe.safetensors"
        _write_probe(probe, clip)
        run_check("vlmkd.export.clip", {folder: probe})


def run_check(module: str, probes: Mapping[Path, Path]) -> None:
    """Run `python -m MODULE --check FOLDER PROBE ...` in a fresh process on the CPU, without the network.

    One process for all the exports of a run, because most of its seconds are those of its imports.

    Raises:
        UserError: it exits with an error; quotes its last line.
    """
    root = str(Path(__file__).resolve().parents[2])
    env = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    env |= {
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [root, env.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", module]
    for folder, probe in probes.items():
        command += ["--check", str(folder), str(probe)]
    child = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if child.returncode:
        lines = (child.stderr.strip() or child.stdout.strip() or f"exit code {child.returncode}").splitlines()
        raise UserError(
            f"export {' or '.join(map(str, probes))} does not reproduce the model: {lines[-1]}; keep the run's checkpoint "
            "and report this"
        )


@torch.no_grad()
def _write_probe(path: Path, clip: ClipModel) -> None:
    """Pixels, token ids and what `clip` makes of them, in fp32 on the CPU."""
    from safetensors.torch import save_file

    module = copy.deepcopy(clip.module).cpu().float().eval()
    generator = torch.Generator().manual_seed(_PROBE_SEED)
    images = torch.randn(2, 3, *clip.image_spec.size, generator=generator)
    tokens = clip.tokenizer(list(_PROBE_TEXTS))
    output = encode(module, images, tokens, None)
    assert output.image_embeds is not None and output.text_embeds is not None
    tensors = {
        "images": images,
        "tokens": tokens,
        "image_embeds": output.image_embeds,
        "text_embeds": output.text_embeds,
        "logit_scale": output.logit_scale.reshape(1),
    }
    save_file(tensors, path, {"image_spec": json.dumps(dataclasses.asdict(clip.image_spec))})


def _check(folder: Path, probe_file: Path) -> str:
    """What differs between the model in `folder` and the probe; empty when nothing does."""
    from safetensors import safe_open

    probe = read_safetensors(probe_file)
    with safe_open(probe_file, "pt") as stream:
        spec = json.loads(stream.metadata()["image_spec"])
    if not (folder / OPEN_CLIP_CONFIG).is_file():
        found = _run_transformers(folder, probe)
    elif read_object(folder / OPEN_CLIP_CONFIG, "model config")["model_cfg"].get("pruned"):
        found = _run_pruned(folder, probe, spec)
    else:
        found = _run_open_clip(folder, probe, spec)
    return compare(found, probe)


def compare(found: Mapping[str, Tensor], probe: Mapping[str, Tensor]) -> str:
    """What differs between outputs and those of the probe; empty when nothing does."""
    for name, value in found.items():
        if value.shape != probe[name].shape:
            return f"{name} is {list(value.shape)} instead of {list(probe[name].shape)}"
        difference = (value.double() - probe[name].double()).abs().max().item()
        limit = _TOLERANCE * max(1.0, probe[name].double().abs().max().item())
        if not difference <= limit:  # also true for NaN
            return f"{name} differs by {difference:.2e}, more than {limit:.0e}"
    return ""


def _outputs(module: nn.Module, probe: Mapping[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
    towers: Any = module
    with torch.no_grad():
        return {
            "tokens": tokens,
            "image_embeds": towers.encode_image(probe["images"], normalize=True),
            "text_embeds": towers.encode_text(tokens, normalize=True),
            "logit_scale": towers.logit_scale.exp().reshape(1),
        }


def _run_open_clip(folder: Path, probe: Mapping[str, Tensor], spec: Mapping[str, Any]) -> dict[str, Tensor]:
    """Outputs of plain open_clip, which knows nothing of this package."""
    import open_clip

    name = f"local-dir:{folder}"
    model = open_clip.create_model_from_pretrained(name, return_transform=False).eval()
    used = model.visual.preprocess_cfg
    for field in ("mean", "std", "interpolation", "resize_mode"):
        if json.loads(json.dumps(used[field])) != spec[field]:
            raise UserError(f"open_clip reads {field} {used[field]} instead of {spec[field]}")
    return _outputs(model, probe, open_clip.get_tokenizer(name)(list(_PROBE_TEXTS)))


def _run_pruned(folder: Path, probe: Mapping[str, Tensor], spec: Mapping[str, Any]) -> dict[str, Tensor]:
    clip = load_clip(f"local-dir:{folder}")
    if json.loads(json.dumps(dataclasses.asdict(clip.image_spec))) != spec:
        raise UserError(f"load_clip reads {clip.image_spec} instead of {spec}")
    return _outputs(clip.module, probe, clip.tokenizer(list(_PROBE_TEXTS)))


def _run_transformers(folder: Path, probe: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Outputs of transformers' CLIPModel on the probe's pixels, and on its texts through the folder's tokenizer.

    Token ids are not compared: transformers pads with the end-of-text id, behind the pooled position.
    """
    from transformers import AutoTokenizer, CLIPModel

    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    length = probe["tokens"].shape[1]
    texts = [" ".join(text.split()) for text in _PROBE_TEXTS]
    tokens = tokenizer(
        texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        output = model(input_ids=tokens, pixel_values=probe["images"])
        same_ids = model(input_ids=probe["tokens"], pixel_values=probe["images"])
    difference = (F.normalize(same_ids.text_embeds) - probe["text_embeds"]).abs().max().item()
    if not difference <= _TOLERANCE:
        raise UserError(f"text_embeds of the same ids differ by {difference:.2e}")
    return {
        "image_embeds": output.image_embeds,
        "text_embeds": output.text_embeds,
        "logit_scale": model.logit_scale.exp().reshape(1),
    }


def main(argv: list[str]) -> int:
    """Entry of the checking process; prints what differs and returns 1 when something does."""
    return check_main("vlmkd.export.clip", _check, argv)


def check_main(module: str, check: Callable[[Path, Path], str], argv: list[str]) -> int:
    """The checking process of `module`: `check` says what differs between a folder and a probe; the first to differ ends it."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=main.__doc__)
    parser.add_argument(
        "--check", nargs=2, type=Path, required=True, action="append", metavar=("FOLDER", "PROBE")
    )
    checks = parser.parse_args(argv).check
    for folder, probe in checks:
        try:
            difference = check(folder, probe)
        except UserError as error:
            difference = str(error)
        if difference:
            print(f"{folder.name}: {difference}" if len(checks) > 1 else difference, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
