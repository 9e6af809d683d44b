"""Load any CLIP by name, folder or file.

Letters: N texts, T tokens.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import http.client
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmkd import zoo
from vlmkd.errors import UserError, did_you_mean
from vlmkd.files import one_line, read_object
from vlmkd.image_spec import ImageSpec
from vlmkd.models.checkpoints import identify, is_torchscript, load_weights, read_state_dict
from vlmkd.models.convert import (
    CLIP_VOCABULARY,
    OPENAI_MEAN,
    OPENAI_STD,
    Config,
    from_hf_config,
    from_hf_processor,
)
from vlmkd.models.pruned_clip import PrunedCLIP
from vlmkd.tensor_files import reading

OPEN_CLIP_CONFIG = "open_clip_config.json"
_FOLDERS = {"local-dir": OPEN_CLIP_CONFIG, "hf": "config.json"}
_FOLDER_WEIGHTS = (  # first match wins (open_clip's own order)
    *("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors"),
    *("open_clip_pytorch_model.bin", "pytorch_model.bin"),
)
_CONFIG_FIELDS = (
    *("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale", "init_logit_bias"),
    *("nonscalar_logit_scale", "custom_text", "multimodal_cfg"),
)


@dataclass
class ClipModel:
    module: nn.Module
    """open_clip model or PrunedCLIP: encode_image, encode_text, logit_scale (log), logit_bias or None."""
    config: Config
    """open_clip's model config, or the pruned one."""
    image_spec: ImageSpec
    tokenizer: Callable[[list[str]], Tensor]
    """N texts -> int64 [N, T]."""
    source: str
    digest: str
    """sha256 over the weights; empty for a random initialisation."""
    tokenizer_folder: Path | None = None
    """Where tokenizer.json is; None: open_clip's own tokenizer."""

    def with_weights(self, weights: Mapping[str, Tensor]) -> ClipModel:
        """The same architecture in a module of its own with `weights` of any layout."""
        module = build_clip(self.config)
        load_weights(module, weights, self.source)
        return dataclasses.replace(self, module=module.eval(), digest=weights_digest(module.state_dict()))


def load_clip(model: str, pretrained: str = "", *, seed: int | None = None) -> ClipModel:
    """The CLIP that a user names.

    `model` is an open_clip architecture, a JSON model config, `local-dir:PATH` (open_clip's or our export), `hf:PATH`
    (transformers' CLIPModel) or `zoo:NAME`. `pretrained`, for the first two, is an open_clip tag, a weights file of any
    layout, or empty: random, drawn from `seed` where it is given. Activation and pixel statistics are those of the tag, or
    of the config beside the file.
    """
    scheme, _, rest = model.partition(":")
    if scheme in ("zoo", *_FOLDERS) and rest:
        if pretrained:
            raise UserError(f"model {model} brings its own weights; leave pretrained ({pretrained}) empty")
        return _load_zoo(rest) if scheme == "zoo" else _load_folder(_folder(scheme, rest), model)
    import open_clip

    architecture, folder = model.replace("/", "-"), None
    if model.endswith(".json"):
        config, folder = read_object(Path(model), "model config"), Path(model).parent
        config = config.get("model_cfg", config)
    elif (config := open_clip.get_model_config(architecture)) is None:
        forms = "give a name, a .json file, local-dir:, hf: or zoo:"
        hint = did_you_mean(model, open_clip.list_models(), forms)
        raise UserError(f"model {model} is no open_clip architecture; {hint}")
    if not pretrained:
        return _loaded(build_clip(config, seed=seed), config, {}, model, folder, trained=False)
    source = f"{model}@{pretrained}"
    if tag := open_clip.get_pretrained_cfg(architecture, pretrained):
        hub, url = tag.get("hf_hub", "").strip("/"), tag.get("url", "")
        hint = ", or give a weights file as pretrained; models of the zoo come by scripts/download.py"
        with downloading(f"weights {source}: {f'hub repository {hub}' if hub else url}", hint):
            weights, preprocess = Path(open_clip.download_pretrained(tag)), tag
    elif Path(pretrained).is_file():
        weights, preprocess = Path(pretrained), _beside(Path(pretrained))
    else:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "it has none"
        raise UserError(f"pretrained {pretrained}: neither a file nor one of {model}'s tags: {tags}")
    if is_torchscript(weights):  # such archives are OpenAI's, trained with QuickGELU
        config["quick_gelu"] = True
    elif tag:  # a tag may lack what its architecture's config has (roberta-ViT-B-32)
        config["quick_gelu"] = bool(config.get("quick_gelu") or tag.get("quick_gelu"))
    elif "quick_gelu" in preprocess:
        config["quick_gelu"] = preprocess["quick_gelu"]
    module = build_clip(config)
    if tag or weights.suffix in (".npz", ".npy"):  # open_clip's own files, and big_vision's, which it knows
        with reading(weights):
            open_clip.load_checkpoint(module, str(weights))
    else:
        load_weights(module, read_state_dict(weights), source)
    return _loaded(module, config, preprocess, source, folder)


def build_clip(config: Mapping[str, Any], *, seed: int | None = None) -> nn.Module:
    """An open_clip model, or PrunedCLIP when `config["pruned"]`, with random weights; none are downloaded."""
    with drawn_from(seed):
        return PrunedCLIP(dict(config)) if config.get("pruned") else _build_open_clip(config)


@contextlib.contextmanager
def drawn_from(seed: int | None) -> Iterator[None]:
    """Draw from `seed` and leave the global state as it was; without a seed, draw from that state."""
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def downloading(what: str, hint: str = "") -> Iterator[None]:
    """Turn a failed download of `what` into a UserError that ends with `hint`."""
    trouble = ""
    try:
        with zoo.hub_or_cache() as trouble:
            yield
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        told = f"is neither in the local cache nor downloadable ({trouble or one_line(error)})"
        mend = f"go online (unset HF_HUB_OFFLINE), set HF_ENDPOINT to a mirror{hint}"
        raise UserError(f"{what} {told}; {mend}") from None


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """sha256 over names, types, shapes and bytes, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _build_open_clip(given: Mapping[str, Any]) -> nn.Module:
    from open_clip import CLIP, CLIPTextCfg, CLIPVisionCfg, CoCa, CustomTextCLIP

    config = copy.deepcopy(dict(given))
    if missing := {"embed_dim", "vision_cfg", "text_cfg"} - config.keys():
        raise UserError(f"model config: field {min(missing)} is missing")
    towers = {"vision_cfg": CLIPVisionCfg.__dataclass_fields__, "text_cfg": CLIPTextCfg.__dataclass_fields__}
    for section, known in {"": dict.fromkeys(_CONFIG_FIELDS), **towers}.items():
        for field in config[section] if section else config:
            if field not in known:
                hint = did_you_mean(field, known, "remove it")
                raise UserError(f"model config: unknown field {f'{section}.{field}'.lstrip('.')}; {hint}")
    foreign = config["text_cfg"].get("hf_model_name")
    custom = config.pop("custom_text", False) or foreign
    kind = CLIP if not custom else CoCa if "multimodal_cfg" in config else CustomTextCLIP
    config["vision_cfg"]["timm_model_pretrained"] = False
    if not foreign:
        return kind(**config)
    config["text_cfg"]["hf_model_pretrained"] = False
    with downloading(f"text tower {foreign}: its config"):
        return kind(**config)


def _folder(scheme: str, path: str) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"model {scheme}:{path}: no such folder")
    if not (folder / _FOLDERS[scheme]).is_file():
        others = [f"; name it {other}:PATH" for other, file in _FOLDERS.items() if (folder / file).is_file()]
        raise UserError(f"model {scheme}:{path} has no {_FOLDERS[scheme]}{''.join(others)}")
    return folder


def _described(folder: Path) -> tuple[Config, Config]:
    """The model config and preprocess config of a folder, as open_clip's."""
    if (folder / OPEN_CLIP_CONFIG).is_file():
        content = read_object(folder / OPEN_CLIP_CONFIG, "model config")
        return content.get("model_cfg", content), content.get("preprocess_cfg", {})
    config = from_hf_config(read_object(folder / "config.json", "model config"), str(folder / "config.json"))
    if config["text_cfg"]["vocab_size"] != CLIP_VOCABULARY:  # else open_clip's tokenizer reads it
        config["text_cfg"]["hf_tokenizer_name"] = "."
    processor: Config = {}
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            processor = read_object(folder / name, "processor config")
            processor = processor.get("image_processor", processor)
    return config, from_hf_processor(processor)


def _beside(weights: Path) -> Config:
    """Pixel statistics and activation from the config beside a weights file, if there is one."""
    folder, hf = weights.parent, weights.parent / "config.json"
    is_clip = hf.is_file() and read_object(hf, "model config").get("model_type") == "clip"
    if not (folder / OPEN_CLIP_CONFIG).is_file() and not is_clip:
        return {}
    config, preprocess = _described(folder)
    return {**preprocess, "quick_gelu": config.get("quick_gelu", False)}


def _load_folder(folder: Path, source: str) -> ClipModel:
    config, preprocess = _described(folder)
    module = build_clip(config)
    weights = next((folder / name for name in _FOLDER_WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise UserError(f"model folder {folder} has no weights; looked for {', '.join(_FOLDER_WEIGHTS)}")
    load_weights(module, read_state_dict(weights), str(weights))
    return _loaded(module, config, preprocess, source, folder)


def _load_zoo(name: str) -> ClipModel:
    item = zoo.entry(name)
    source = f"zoo:{item.name}"
    if item.format != "clip":
        raise UserError(f"{source} is no CLIP; MODEL_ZOO.md says where it is used")
    path = zoo.fetch(name)
    if path.is_dir():
        return _load_folder(path, source)
    state = read_state_dict(path)
    config = copy.deepcopy(item.architecture) or identify(state)
    module = build_clip(config)
    load_weights(module, state, source)
    return _loaded(module, config, item.preprocess, source, None)


def _loaded(
    module: nn.Module,
    config: Config,
    preprocess: Mapping[str, Any],
    source: str,
    folder: Path | None,
    trained: bool = True,
) -> ClipModel:
    size = getattr(module.visual, "image_size", None) or config["vision_cfg"].get("image_size", 224)
    fill = preprocess.get("fill_color") or preprocess.get("fill") or 0
    kept = {name: preprocess[name] for name in ("interpolation", "resize_mode") if preprocess.get(name)}
    spec: Any = kept | {
        "size": (size, size) if isinstance(size, int) else tuple(size),
        "mean": tuple(preprocess.get("mean") or OPENAI_MEAN),
        "std": tuple(preprocess.get("std") or OPENAI_STD),
        "fill": (fill, fill, fill) if isinstance(fill, int) else tuple(fill),
    }
    tokenizer, tokenizer_folder = _tokenizer(config, source, folder)
    digest = weights_digest(module.state_dict()) if trained else ""
    return ClipModel(module.eval(), config, ImageSpec(**spec), tokenizer, source, digest, tokenizer_folder)


@dataclass
class Tokenizer:
    """N texts -> ids int64 [N, T] below `vocab_size`."""

    encode: Callable[[list[str]], Tensor]
    vocab_size: int
    source: str

    def __call__(self, texts: list[str]) -> Tensor:
        ids = self.encode(texts)
        if ids.numel() and int(ids.max()) >= self.vocab_size:
            told = f"its tokenizer gives id {int(ids.max())} for a table of {self.vocab_size} rows"
            mend = "put its tokenizer.json beside the config and set text_cfg.hf_tokenizer_name"
            raise UserError(f"model {self.source}: {told}; {mend}")
        return ids


def _tokenizer(config: Mapping[str, Any], source: str, folder: Path | None) -> tuple[Tokenizer, Path | None]:
    """With the folder of its files; `hf_tokenizer_name` is one beside the config, the config's own, or a hub repository."""
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    text = config["text_cfg"]
    # Of a foreign tower the token table is its own.
    vocabulary = 1 << 62 if text.get("hf_model_name") else text.get("vocab_size", CLIP_VOCABULARY)
    name, length = text.get("hf_tokenizer_name"), text.get("context_length", 77)
    options = {"context_length": length} | dict(text.get("tokenizer_kwargs") or {})
    if not name:
        return Tokenizer(SimpleTokenizer(**options), vocabulary, source), None
    places = [folder / name, folder] if folder else []
    local = next((place for place in places if (place / "tokenizer.json").is_file()), None)
    options["tokenizer_mode"] = text.get("tokenizer_mode")
    with contextlib.nullcontext() if local else downloading(f"model {source}: its tokenizer {name}"):
        return Tokenizer(HFTokenizer(str(local or name), **options), vocabulary, source), local
