"""Load any CLIP by name, folder or file; the trainable encoder around it; the predictor that evaluators call.

Letters: B batch, N texts, T tokens, D embedding width.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import hashlib
import http.client
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmkd import zoo
from vlmkd.errors import UserError
from vlmkd.files import one_line, read_object
from vlmkd.image_spec import ImageSpec
from vlmkd.models.checkpoints import identify, is_torchscript, load_weights, read_state_dict
from vlmkd.models.convert import OPENAI_MEAN, OPENAI_STD, from_hf_config, from_hf_processor
from vlmkd.tensor_files import reading

Config = dict[str, Any]

OPEN_CLIP_CONFIG = "open_clip_config.json"
MAX_LOGIT_SCALE = 100.0
"""Learned scales are clamped to [1, 100], as OpenAI's CLIP did."""
_FOLDER_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "model.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
)
"""Weights of a model folder, first match wins (open_clip's own order)."""
_CONFIG_FIELDS = [
    *("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale", "init_logit_bias"),
    *("nonscalar_logit_scale", "custom_text", "multimodal_cfg"),
]


@dataclass
class ClipModel:
    """A loaded CLIP of any kind."""

    module: nn.Module
    """open_clip model or PrunedCLIP: encode_image, encode_text, logit_scale (log), logit_bias or None."""
    config: Config
    """open_clip model config, or the pruned config."""
    image_spec: ImageSpec
    tokenizer: Callable[[list[str]], Tensor]
    """N texts -> int64 [N, T]."""
    source: str
    """What the user named."""
    digest: str
    """sha256 over the weights, for caches; empty for a random initialisation."""
    tokenizer_folder: Path | None = None
    """Folder with tokenizer.json; None: open_clip's own tokenizer."""

    def with_weights(self, weights: Mapping[str, Tensor]) -> ClipModel:
        """The same architecture with `weights` (any layout of load_weights) in a module of its own.

        Raises:
            UserError: the weights are of another architecture.
        """
        module = build_clip(self.config)
        load_weights(module, weights, self.source)
        return dataclasses.replace(self, module=module.eval(), digest=weights_digest(module.state_dict()))


def load_clip(
    model: str, pretrained: str = "", *, seed: int | None = None, tokenizer_folder: Path | None = None
) -> ClipModel:
    """Load the CLIP that a user names.

    `model` is an open_clip architecture, a JSON model config, `local-dir:PATH` (open_clip folder or our export),
    `hf:PATH` (transformers CLIPModel folder) or `zoo:NAME`. `pretrained`, for the first two, is an open_clip tag, a
    weights file of any layout, or empty for a random initialisation, drawn from `seed` where it is given.
    `tokenizer_folder` is for an architecture whose tokenizer.json does not lie beside its JSON config.

    Activation and pixel statistics are those of the weights: of the tag, or of the config beside the weights file.

    Raises:
        UserError: nothing there, weights that cannot be downloaded or belong to another architecture.
    """
    scheme, _, rest = model.partition(":")
    if scheme in ("zoo", "local-dir", "hf") and rest:
        if pretrained:
            raise UserError(f"model {model} brings its own weights; leave pretrained ({pretrained}) empty")
        if scheme == "zoo":
            return _load_zoo(rest)
        return _load_folder(_folder(rest, scheme), model)
    config, folder = _named_config(model)
    folder = tokenizer_folder or folder
    if not pretrained:
        module = build_clip(config, seed=seed)
        return _clip_model(module, config, {}, model, folder, digest=False)
    source = f"{model}@{pretrained}"
    tag = _tag(model, pretrained)
    if tag:
        weights, preprocess = _download(tag, source), tag
    elif Path(pretrained).is_file():
        weights, preprocess = Path(pretrained), _beside(Path(pretrained))
    else:
        raise UserError(f"pretrained {pretrained}: neither a file nor one of {model}'s tags: {_tags(model)}")
    if is_torchscript(weights):  # such archives are OpenAI's, trained with QuickGELU
        config["quick_gelu"] = True
    elif tag:  # a tag may lack what its architecture's config has (roberta-ViT-B-32)
        config["quick_gelu"] = bool(config.get("quick_gelu") or tag.get("quick_gelu"))
    elif "quick_gelu" in preprocess:
        config["quick_gelu"] = preprocess["quick_gelu"]
    module = build_clip(config)
    if tag or weights.suffix in (".npz", ".npy"):  # open_clip's own files, and big_vision's, which it knows
        import open_clip

        with reading(weights):
            open_clip.load_checkpoint(module, str(weights))
    else:
        load_weights(module, read_state_dict(weights), source)
    return _clip_model(module, config, preprocess, source, folder)


def build_clip(config: Mapping[str, Any], *, seed: int | None = None) -> nn.Module:
    """A randomly initialised open_clip model, or PrunedCLIP when `config["pruned"]`; nothing is downloaded.

    With `seed` the draw does not depend on, nor change, the global random state.

    Raises:
        UserError: the config lacks a field, or has one that nobody reads.
    """
    with contextlib.ExitStack() as stack:
        if seed is not None:
            stack.enter_context(torch.random.fork_rng(devices=[]))
            torch.manual_seed(seed)
        if config.get("pruned"):
            from vlmkd.models.pruned_clip import PrunedCLIP

            return PrunedCLIP(dict(config))
        return _build_open_clip(config)


def _build_open_clip(given: Mapping[str, Any]) -> nn.Module:
    from open_clip import CLIP, CoCa, CustomTextCLIP

    _check_config(given)
    config = copy.deepcopy(dict(given))
    foreign_text = bool(config["text_cfg"].get("hf_model_name"))
    custom = config.pop("custom_text", False) or foreign_text
    config["vision_cfg"]["timm_model_pretrained"] = False
    if foreign_text:
        config["text_cfg"]["hf_model_pretrained"] = False
    if custom and "multimodal_cfg" in config:
        return CoCa(**config)
    if not foreign_text:
        return (CustomTextCLIP if custom else CLIP)(**config)
    try:
        with zoo.hub_or_cache() as trouble:
            return CustomTextCLIP(**config)
    except OSError as error:  # the text tower's config is not in the local cache
        name, reason = config["text_cfg"]["hf_model_name"], trouble or one_line(error)
    raise UserError(
        f"text tower {name}: its config is not in the Hugging Face cache and cannot be downloaded "
        f"({reason}); go online once, or set HF_ENDPOINT to a mirror"
    )


def _check_config(config: Mapping[str, Any]) -> None:
    """Refuse a config without its three required fields, or with a field that open_clip would not read."""
    from open_clip import CLIPTextCfg, CLIPVisionCfg

    for field in ("embed_dim", "vision_cfg", "text_cfg"):
        if field not in config:
            raise UserError(f"model config: field {field} is missing")
    known = {
        "": _CONFIG_FIELDS,
        "vision_cfg": [item.name for item in dataclasses.fields(CLIPVisionCfg)],
        "text_cfg": [item.name for item in dataclasses.fields(CLIPTextCfg)],
    }
    for section, fields in known.items():
        for field in config[section] if section else config:
            if field not in fields:
                near = difflib.get_close_matches(field, fields, n=1)
                mend = f"did you mean {near[0]}?" if near else "remove it"
                raise UserError(f"model config: unknown field {f'{section}.{field}'.lstrip('.')}; {mend}")


# ---------------------------------------------------------------------------------------------- names and folders


def _named_config(model: str) -> tuple[Config, Path | None]:
    """Config of an architecture name or JSON file, and the folder in which its relative paths lie."""
    import open_clip

    if model.endswith(".json"):
        config = read_object(Path(model), "model config")
        return config.get("model_cfg", config), Path(model).parent
    config = open_clip.get_model_config(model.replace("/", "-"))
    if config is None:
        near = difflib.get_close_matches(model, open_clip.list_models(), n=2)
        mend = (
            f"did you mean {' or '.join(near)}?"
            if near
            else "give a name, a .json file, local-dir:, hf: or zoo:"
        )
        raise UserError(f"model {model} is no open_clip architecture; {mend}")
    return config, None


def _tag(model: str, pretrained: str) -> Config:
    """open_clip's entry of a pretrained tag, empty when it has none."""
    from open_clip.pretrained import get_pretrained_cfg

    entry: Config = get_pretrained_cfg(model.replace("/", "-"), pretrained)
    return entry


def _tags(model: str) -> str:
    from open_clip.pretrained import list_pretrained_tags_by_model

    return ", ".join(list_pretrained_tags_by_model(model.replace("/", "-"))) or "it has none"


def _download(tag: Config, source: str) -> Path:
    """The weights file of a pretrained tag, from the local cache or the net."""
    import open_clip

    place = f"hub repository {tag['hf_hub'].strip('/')}" if tag.get("hf_hub") else tag.get("url", "")
    try:
        with zoo.hub_or_cache() as trouble:
            return Path(open_clip.download_pretrained(tag))
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        reason = (tag.get("hf_hub") and trouble) or one_line(error)
    raise UserError(
        f"cannot get the weights {source}: not in the local cache, nor from {place} ({reason}); "
        "go online (unset HF_HUB_OFFLINE), set HF_ENDPOINT to a mirror, or give a weights file as pretrained; "
        "models of the zoo come by scripts/download.py"
    )


def _described(folder: Path) -> tuple[Config, Config]:
    """open_clip's model config and preprocess config of a model folder, open_clip's or transformers'."""
    if (folder / OPEN_CLIP_CONFIG).is_file():
        content = read_object(folder / OPEN_CLIP_CONFIG, "model config")
        return content.get("model_cfg", content), content.get("preprocess_cfg", {})
    config = from_hf_config(read_object(folder / "config.json", "model config"), str(folder / "config.json"))
    if config["text_cfg"]["vocab_size"] != open_clip_vocabulary():  # else open_clip's tokenizer reads it
        config["text_cfg"]["hf_tokenizer_name"] = "."
    processor: Config = {}
    if (folder / "preprocessor_config.json").is_file():
        processor = read_object(folder / "preprocessor_config.json", "processor config")
    elif (folder / "processor_config.json").is_file():
        processor = read_object(folder / "processor_config.json", "processor config")
        processor = processor.get("image_processor", {})
    return config, from_hf_processor(processor)


def _beside(weights: Path) -> Config:
    """Pixel statistics and activation from the config that lies beside a weights file; empty without one."""
    folder, hf = weights.parent, weights.parent / "config.json"
    is_clip = hf.is_file() and read_object(hf, "model config").get("model_type") == "clip"
    if not (folder / OPEN_CLIP_CONFIG).is_file() and not is_clip:
        return {}
    config, preprocess = _described(folder)
    return {**preprocess, "quick_gelu": config.get("quick_gelu", False)}


def _folder(path: str, scheme: str) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"model {scheme}:{path}: no such folder")
    other = {"local-dir": "config.json", "hf": OPEN_CLIP_CONFIG}[scheme]
    own = {"local-dir": OPEN_CLIP_CONFIG, "hf": "config.json"}[scheme]
    if not (folder / own).is_file():
        mend = "; name it hf:PATH" if scheme == "local-dir" else "; name it local-dir:PATH"
        raise UserError(
            f"model {scheme}:{path}: the folder has no {own}{mend if (folder / other).is_file() else ''}"
        )
    return folder


def folder_weights(folder: Path) -> Path:
    """The weights file of a model folder.

    Raises:
        UserError: the folder has none.
    """
    for name in _FOLDER_WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"model folder {folder} has no weights; looked for {', '.join(_FOLDER_WEIGHTS)}")


def _load_folder(folder: Path, source: str) -> ClipModel:
    config, preprocess = _described(folder)
    module, weights = build_clip(config), folder_weights(folder)
    load_weights(module, read_state_dict(weights), str(weights))
    return _clip_model(module, config, preprocess, source, folder)


def _load_zoo(name: str) -> ClipModel:
    item = zoo.entry(name)
    source = f"zoo:{item.name}"
    if item.format != "clip":
        raise UserError(f"{source} is no CLIP; MODEL_ZOO.md says at its table where it is used")
    path = zoo.fetch(name)
    if path.is_dir():
        return _load_folder(path, source)
    state = read_state_dict(path)
    config = copy.deepcopy(item.architecture) or identify(state)
    module = build_clip(config)
    load_weights(module, state, source)
    return _clip_model(module, config, item.preprocess, source, None)


def _clip_model(
    module: nn.Module,
    config: Config,
    preprocess: Mapping[str, Any],
    source: str,
    folder: Path | None,
    digest: bool = True,
) -> ClipModel:
    tokenizer, tokenizer_folder = _tokenizer(config, source, folder)
    return ClipModel(
        module=module.eval(),
        config=config,
        image_spec=image_spec(module, config, preprocess),
        tokenizer=tokenizer,
        source=source,
        digest=weights_digest(module.state_dict()) if digest else "",
        tokenizer_folder=tokenizer_folder,
    )


def image_spec(module: nn.Module, config: Mapping[str, Any], preprocess: Mapping[str, Any]) -> ImageSpec:
    """ImageSpec of a model: the size its tower is built for, the rest from an open_clip preprocess config.

    Absent fields have open_clip's defaults (OpenAI's statistics, bicubic, shortest side).
    """
    size = getattr(module.visual, "image_size", None) or config["vision_cfg"].get("image_size", 224)
    fill = preprocess.get("fill_color") or preprocess.get("fill") or 0
    fields: Any = {
        "size": (size, size) if isinstance(size, int) else tuple(size),
        "mean": tuple(preprocess.get("mean") or OPENAI_MEAN),
        "std": tuple(preprocess.get("std") or OPENAI_STD),
        "fill": (fill, fill, fill) if isinstance(fill, int) else tuple(fill),
    }
    kept = {name: preprocess[name] for name in ("interpolation", "resize_mode") if preprocess.get(name)}
    return ImageSpec(**fields, **kept)


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """sha256 over names, types, shapes and bytes of `state`, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------- tokenizers


@dataclass
class Tokenizer:
    """A text encoder whose ids are checked against the model's token table."""

    encode: Callable[[list[str]], Tensor]
    vocab_size: int
    source: str

    def __call__(self, texts: list[str]) -> Tensor:
        """N texts -> int64 [N, T].

        Raises:
            UserError: an id beyond the token table.
        """
        ids = self.encode(texts)
        if ids.numel() and int(ids.max()) >= self.vocab_size:
            raise UserError(
                f"model {self.source}: its tokenizer gives id {int(ids.max())}, but the token table has "
                f"{self.vocab_size} rows; put its tokenizer.json beside the config and set text_cfg.hf_tokenizer_name"
            )
        return ids


def open_clip_vocabulary() -> int:
    """Vocabulary size of open_clip's own tokenizer (CLIP's)."""
    from open_clip.tokenizer import _tokenizer as clip_tokenizer  # built once, at open_clip's import

    return int(clip_tokenizer.vocab_size)


def _tokenizer(config: Mapping[str, Any], source: str, folder: Path | None) -> tuple[Tokenizer, Path | None]:
    """The tokenizer of a model, and the folder of its files when it is not open_clip's own.

    A `hf_tokenizer_name` is looked up beside the config first: there as a sub-folder of that name, or in the config's
    own folder when that has a tokenizer.json; else it is a hub repository.
    """
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    text = config["text_cfg"]
    length, vocabulary = text.get("context_length", 77), text.get("vocab_size", open_clip_vocabulary())
    if text.get("hf_model_name"):
        vocabulary = 1 << 62  # the token table is the foreign tower's own
    name, options = text.get("hf_tokenizer_name"), dict(text.get("tokenizer_kwargs") or {})
    if not name:
        return Tokenizer(SimpleTokenizer(context_length=length, **options), vocabulary, source), None
    places = [folder / name, folder] if folder else []
    local = next((place for place in places if (place / "tokenizer.json").is_file()), None)
    try:
        with contextlib.nullcontext("") if local else zoo.hub_or_cache() as trouble:
            options["tokenizer_mode"] = text.get("tokenizer_mode")
            encode = HFTokenizer(str(local or name), context_length=length, **options)
            return Tokenizer(encode, vocabulary, source), local
    except OSError as error:
        reason = trouble or one_line(error)
    raise UserError(
        f"model {source}: its tokenizer {name} is neither in the Hugging Face cache nor downloadable "
        f"({reason}); go online once, or set HF_ENDPOINT to a mirror"
    )
