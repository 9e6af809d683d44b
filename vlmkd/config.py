"""Run configuration: frozen dataclasses, filled from YAML files and `key=value` overrides; YAML names no Python class."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import re
import textwrap
import types
import typing
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from omegaconf import MissingMandatoryValue, OmegaConf

from vlmkd.errors import UserError, did_you_mean
from vlmkd.files import parse_yaml, read_yaml

C = TypeVar("C")

_MOST = 2**31 - 1
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class Range:
    """What a field's number, or each number of its list, may be, as part of its type (`steps: Positive`); always finite."""

    low: float = 0
    high: float = _MOST
    above: bool = False
    """`low` itself is too low."""
    below: bool = False
    """`high` itself is too high."""
    length: int = 0
    """Length of the list; 0: any."""
    ascending: bool = False

    def refusal(self, value: Any) -> str:
        """What `value` must be and is not, or nothing."""
        if isinstance(value, str):
            forms = "5000 (steps), 20ep, 1e6ex (examples), 10%, max(500, 12ep) or min(100, 20%)"
            return "" if DURATION.fullmatch(value) else f"it must be a length such as {forms}"
        numbers = value if isinstance(value, list) else [value]
        if self.length and len(numbers) != self.length:
            return f"it must be {self.length} numbers"
        for number in numbers:
            low = number > self.low if self.above else number >= self.low
            high = number < self.high if self.below else number <= self.high
            if not (low and high and math.isfinite(number)):
                if self.high < _MOST:
                    first, last = "(" if self.above else "[", ")" if self.below else "]"
                    return f"it must be in {first}{self.low}, {self.high}{last}"
                if low:
                    return f"it must be at most {self.high}"
                return f"it must be {'above' if self.above else 'at least'} {self.low}"
        falls = self.ascending and numbers != sorted(numbers)
        return "the first number must not be above the second" if falls else ""


_NUMBER = r"\d+(?:\.\d+)?(?:e\d+)?"
_PART = rf"\d+|{_NUMBER}(?:ep|ex|%)"
DURATION = re.compile(
    rf"(?P<bound>max|min)\((?P<a>{_PART}), *(?P<b>{_PART})\)|(?P<number>{_NUMBER})(?P<unit>ep|ex|%)"
)
"""A length that is not given in steps; see vlmkd.train.durations."""

if TYPE_CHECKING:  # after start-up every duration is a number of steps
    Duration = int
    Length = int
else:
    Duration = Annotated[int | str, Range()]
    """0 turns off what happens every so often."""
    Length = Annotated[int | str, Range(1)]

Count = Annotated[int, Range()]
Positive = Annotated[int, Range(1)]
Processes = Annotated[int, Range(0, 1024)]
Seed = Annotated[int, Range(0, 2**63 - 1)]
Amount = Annotated[float, Range()]
AboveZero = Annotated[float, Range(above=True)]
Share = Annotated[float, Range(0, 1)]
BelowOne = Annotated[float, Range(0, 1, below=True)]
AreaRange = Annotated[list[float], Range(0, 1, above=True, length=2, ascending=True)]
Betas = Annotated[list[float], Range(0, 1, below=True, length=2)]
LayerList = Annotated[list[int], Range()]
RatioRange = Annotated[list[float], Range(above=True, length=2, ascending=True)]


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Shards, their share of the stream, and stored teacher embeddings."""

    shards: list[str] = field(default_factory=list)
    """Local paths, brace ranges, globs, `https://...`, `emoji:train`, or `pipe:COMMAND`, which a shell runs."""
    weight: AboveZero = 1.0
    """Share of this source in the mixture, relative to the others' weights."""
    teacher_caches: list[str] = field(default_factory=list)
    """Folders written by data_tools/embed_teacher.py, one per teacher in the order of `teachers`; empty: none."""


@dataclass(frozen=True, kw_only=True)
class ImageDataConfig:
    """How training images are read and changed, wherever they come from."""

    workers: Processes = 2
    """Loader processes per rank; 0: the training process. Indexed items are drawn alike with any number."""
    crop_scale: AreaRange = field(default_factory=lambda: [0.08, 1.0])
    """Area range of RandomResizedCrop; [1, 1] with crop_ratio [1, 1] resizes and centre-crops."""
    crop_ratio: RatioRange = field(default_factory=lambda: [0.75, 1.3333333333333333])
    """Aspect-ratio range of RandomResizedCrop."""
    flip: Share = 0.5
    """Probability of a horizontal flip."""
    color_jitter: BelowOne = 0.0
    """Strength of brightness, contrast and saturation jitter; a teacher that sees the same view sees it too."""
    max_pixels: Positive = 89_478_485
    """Larger images are refused as `oversized_image` before they are decoded."""
    max_bad_share: Share = 0.05
    """The run stops when more than this share of 1,000 samples or more, of a pass, or of a whole short run was bad."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(ImageDataConfig):
    """The training stream."""

    kind: Literal["webdataset", "synthetic"] = "webdataset"
    """`webdataset` reads `sources`; `synthetic` draws coloured squares, for dry runs only."""
    sources: list[SourceConfig] = field(default_factory=list)
    """Where the samples come from."""
    shuffle_buffer: Count = 2000
    """Encoded samples held for shuffling, per worker."""
    crop_scale: AreaRange = field(default_factory=lambda: [0.9, 1.0])
    flip: Share = 0.0
    image_keys: list[str] = field(default_factory=lambda: ["jpg", "png", "jpeg", "webp"])
    """Sample members that may hold the image; the first match counts."""
    text_key: str = "txt"
    """Sample member with the caption."""
    samples_per_epoch: Count = 0
    """Samples of one pass over all sources, for lengths in epochs; 0: not known."""
    shard_cache: str = ""
    """Folder for downloaded shards; empty: streamed each epoch."""
    synthetic_samples: Positive = 4096
    """Samples of one `synthetic` epoch."""


@dataclass(frozen=True, kw_only=True)
class LabelledDataConfig(ImageDataConfig):
    """Training images of a labelled set; which of them a run trains on is its project's matter."""

    set: str = ""
    """Name of the set, e.g. `emoji`, `eurosat` or `folder:PATH`; docs/datasets.md lists them."""
    root: str = ""
    """Folder of the data sets on disk; embedded sets need none."""
    class_names: str = ""
    """For `folder:` and `domains:` sets: a text file of lines NAME or FOLDER<tab>NAME; empty: the folders' names."""
    templates: list[str] = field(default_factory=list)
    """Prompts of a `folder:` or `domains:` set, with `{}` for the class name; empty: `a photo of a {}`."""
    hue: Annotated[float, Range(0, 0.5)] = 0.0
    """Largest shift of the hue, as a share of the colour circle, 0 to 0.5."""
    grayscale: Share = 0.0
    """Probability of a view without colours."""
    interpolation: Literal["model", "bicubic", "bilinear"] = "model"
    """Resizing of training views: as each model was trained, or alike for student and teacher."""
    view_count: Count = 0
    """Views per image, one a pass, then again from the first; 0: all stored ones, or a new one each pass."""
    teacher_outputs: str = ""
    """Folder written by data_tools/embed_labelled.py, which takes the place of the teacher's image tower."""
    teacher_view: Literal["same", "clean"] = "same"
    """What the stored teacher saw: the student's very view, or the whole picture without augmentation."""

    def __post_init__(self) -> None:
        unstored = self.teacher_view == "clean" and not self.teacher_outputs
        require(not unstored, "data.teacher_view", "=clean needs data.teacher_outputs, written with --clean")


@dataclass(frozen=True, kw_only=True)
class ParamGroupConfig:
    """Trained parameters with a rate or decay of their own."""

    match: str = ""
    """Regular expression to find in the parameters' names; the first group that matches counts."""
    lr: Amount | None = None
    """Peak learning rate; null: optim.lr."""
    weight_decay: Amount | None = None
    """Decay where optim.weight_decay has an effect; null: optim.weight_decay."""

    def __post_init__(self) -> None:
        try:
            re.compile(self.match)
        except re.error as error:
            told = f"{self.match!r} is no pattern ({error})"
            raise UserError(f"config field optim.groups.N.match: {told}") from None


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimiser and its schedule."""

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    """AdamW, Adam (its decay is part of the gradient) or SGD."""
    lr: Amount = 1e-4
    """Peak learning rate."""
    weight_decay: Amount = 0.2
    """Decay of tensors of two or more dimensions whose name holds none of bn, ln, bias, logit_scale."""
    decay_all: bool = False
    """Decay every trained tensor, biases and norms too (PromptKD, DHO)."""
    betas: Betas = field(default_factory=lambda: [0.9, 0.98])
    """Betas of AdamW and Adam."""
    eps: Amount = 1e-6
    """Epsilon of AdamW and Adam."""
    momentum: BelowOne = 0.0
    """Momentum of SGD (not Nesterov's)."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After warm-up: `cosine` to 0, `wsd` (constant, then a linear decay to 0), or `constant`."""
    warmup_steps: Duration = 2000
    """Linear warm-up: lr * (step + 1) / warmup_steps."""
    decay_steps: Duration = 0
    """Length of the decay of `wsd`."""
    groups: list[ParamGroupConfig] = field(default_factory=list)
    """Rates and decays by parameters' names, e.g. [{match: "projector", lr: 1.0e-3}]."""
    clip_grad_norm: Amount = 5.0
    """Global gradient-norm clip; 0: off."""


@dataclass(frozen=True, kw_only=True)
class DeepSpeedConfig:
    """What goes into DeepSpeed's JSON, which the run folder keeps."""

    zero_stage: Annotated[int, Range(-1, 3)] = -1
    """ZeRO stage 0 to 3; -1: 1, or 0 for one rank in fp32 without offload, which has nothing to partition."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Compute precision of the student; fp16 needs a GPU."""
    offload: Literal["none", "cpu", "nvme"] = "none"
    """Where optimiser state (stage 3: parameters too) is kept between uses."""
    nvme_path: str = ""
    """Folder on a fast disk for offload=nvme."""
    shard_teacher: bool = False
    """Spread frozen teachers over the ranks by ZeRO stage 3, in place of a copy on each."""
    activation_checkpointing: bool = False
    """Recompute the student's activations in the backward pass."""
    file: str = ""
    """A DeepSpeed JSON of yours; its "auto" values are filled in from this config."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Entries merged into the JSON."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """When evaluations run, and how."""

    every_steps: Duration = 0
    """Evaluate every so many steps; 0: only at the end."""
    phase: Count = 0
    """Shift of `every_steps`: 1 evaluates after the steps 1, 1 + N, 1 + 2N, ... (DomainBed)."""
    batch_size: Positive = 64
    """Images per evaluation batch."""
    workers: Processes = 0
    """Processes per rank that decode images; 0: the training process. Does not change results."""
    teacher: bool = True
    """Also evaluate the loaded teachers, once, at the end."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Console, metrics.jsonl (always) and trackers."""

    every_steps: Length = 20
    """A line every so many optimiser steps; a short run has at least ten."""
    tensorboard: bool = False
    """Write TensorBoard events into the run folder."""
    wandb: str = ""
    """wandb project; empty: off."""
    trackio: str = ""
    """trackio project; empty: off."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the resumable state is written, and how much is kept."""

    every_steps: Duration = 1000
    """Save every so many optimiser steps; 0: only by hours, at SIGTERM and at the end."""
    every_hours: Amount = 0.0
    """Save so many hours after the last save; 0: off."""
    keep: Annotated[int, Range(2)] = 2
    """How many of the newest stay; at least 2, so that a torn one has a predecessor."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every run has; a project's config adds its data and its method's fields."""

    varied: ClassVar[bool] = False
    """Whether batches differ in shape; no setting."""
    run_dir: str = ""
    """Folder of this run, e.g. runs/tinyclip_nano."""
    seed: Seed = 0
    """Seed of initialisation, data order, views and masks."""
    steps: Length = 1000
    """Optimiser steps, or `20ep` (epochs), `1e6ex` (examples); parts of a run may also be shares of it: `10%`."""
    batch_size: Positive = 1024
    """Samples per optimiser step over all ranks."""
    micro_batch_size: Count = 0
    """Samples per rank and forward pass, which BatchNorm sees at a time; 0: batch_size / ranks, no accumulation."""
    threads: Processes = 0
    """CPU threads per rank; 0: torch's default."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser and schedule."""
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    """DeepSpeed engine."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Evaluations."""
    log: LogConfig = field(default_factory=LogConfig)
    """Logging."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""

    def __post_init__(self) -> None:
        longest = max(len(part.encode()) for part in self.run_dir.split("/"))
        require(bool(self.run_dir), "run_dir", "is empty; set it, e.g. run_dir=runs/my_run")
        require(longest <= 200, "run_dir", f"has a name of {longest} bytes; a folder's may have 200")
        optim, offload = self.optim, self.deepspeed.offload
        fits = (offload == "nvme") == bool(self.deepspeed.nvme_path)
        require(fits, "deepspeed.nvme_path", "goes with offload=nvme, and only with it")
        fits = not optim.decay_steps or optim.schedule == "wsd"
        require(fits, "optim.decay_steps", "has no effect unless optim.schedule=wsd")
        sgd = optim.name == "sgd"
        require(sgd or not optim.momentum, "optim.momentum", "has no effect unless optim.name=sgd")
        fits = offload == "none" or not sgd
        require(fits, "deepspeed.offload", "works with adamw and adam; use offload=none with optim.name=sgd")
        every, phase = self.evaluation.every_steps, self.evaluation.phase
        fits = phase == 0 or not in_steps_already(every) or phase < every
        require(fits, "evaluation.phase", f"is {phase}; it must be in [0, evaluation.every_steps = {every})")


def in_steps_already(*durations: int | str) -> bool:
    """Whether these can be compared."""
    return all(isinstance(duration, int) for duration in durations)


def require(condition: bool, path: str, message: str) -> None:
    """Raise a UserError about the config field `path` unless `condition` holds."""
    if not condition:
        raise UserError(f"config field {path} {message}")


def load(cls: type[C], argv: list[str]) -> C:
    """Build a `cls` from YAML files (arguments without `=`) and dotted `key=value` overrides, left to right."""
    values: Any = plain(cls)
    for arg in argv:
        if arg.startswith("--local_rank"):
            continue
        key, is_override, text = arg.partition("=")
        origin, depth = arg, math.inf
        if is_override:
            origin, path = f"override {arg}", key.split(".")
            layer: Any = parse_yaml(text, origin) if text else ""  # `field=` sets the empty string
            layer, depth = functools.reduce(lambda inner, part: {part: inner}, path[::-1], layer), len(path)
        else:
            layer = read_yaml(arg, "config file", "overrides are written key=value") or {}
            if not isinstance(layer, dict):
                raise UserError(f"config file {arg} must hold `field: value` lines at its top level")
        try:
            values = fitted(cls, merged(values, layer, depth), "")
        except UserError as error:
            raise UserError(f"{origin}: {error}") from None
    try:
        return typing.cast(C, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), values)))
    except MissingMandatoryValue as error:
        raise UserError(f"config field {error.full_key} is missing; give it") from None


def merged(old: Any, new: Any, depth: float = math.inf, path: str = "") -> Any:
    """`new` over `old`: sections are merged down to `depth`, and `{index: value}` changes an element of a list."""
    if depth == 0 or not isinstance(new, dict) or not isinstance(old, (dict, list)):
        return new
    result: Any = old.copy()
    for key, part in new.items():
        if isinstance(old, list):
            there = str(key).isdecimal() and int(key) < len(old)
            require(there, f"{path}[{key}]", f"is out of range; the list has {len(old)} elements")
            key = int(key)
        known = isinstance(old, list) or key in old
        result[key] = merged(old[key] if known else None, part, depth - 1, f"{path}.{key}".lstrip("."))
    return result


_WORDS: dict[Any, str] = {
    bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list", type(None): "null",
}  # fmt: skip


def fitted(hint: Any, value: Any, path: str, owner: Any = None) -> Any:
    """Plain data as a field of type `hint` has it, or a refusal; `owner`: the field's dataclass."""
    kind, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is Annotated:
        inner, limits = arguments
        value = fitted(inner, value, path)
        if told := limits.refusal(value):
            name = next(part for part in reversed(path.split(".")) if not part.isdigit())
            meaning = " ".join(_field_docs(owner)[name].split())
            raise UserError(f"config field {path} is {value}; {told}: {meaning}")
        return value
    if kind in (typing.Union, types.UnionType):
        refusals = []
        for one in arguments:
            try:
                return fitted(one, value, path, owner)
            except UserError as error:
                refusals.append(error)
        raise refusals[0]
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = typing.get_type_hints(kind, include_extras=True)
        prefix = f"{path}." if path else ""
        for key in value.keys() - hints.keys():
            hint = did_you_mean(str(key), hints, f"fields here: {', '.join(sorted(hints))}", prefix)
            raise UserError(f"unknown config field {prefix}{key}; {hint}")
        return {key: fitted(hints[key], part, prefix + key, kind) for key, part in value.items()}
    if isinstance(value, dict) and kind in (dict, Any):
        _, inner = arguments or (str, Any)
        return {fitted(str, key, path): fitted(inner, part, f"{path}.{key}") for key, part in value.items()}
    if isinstance(value, list) and kind in (list, Any):
        (inner,) = arguments or (Any,)
        return [fitted(inner, part, f"{path}.{index}", owner) for index, part in enumerate(value)]
    if isinstance(value, str) and kind in (str, Any, Literal):
        # OmegaConf takes the first and the last for something else.
        require("${" not in value, path, "holds ${, which fills nothing in; write the value itself")
        require(not _CONTROL.search(value), path, "holds a control character; leave it out")
        require(value != "???", path, "is ???; write a value")
    if isinstance(value, str) and kind in (int, float):  # as `nan`, which YAML takes for a word
        with suppress(ValueError):
            value = kind(value)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    same = kind in (bool, str, type(None)) and type(value) is kind
    if same or kind is Any or (kind is Literal and value in arguments):
        return value
    if kind is str and number:
        return str(value)
    if kind is float and number and (abs(value) < 1e300 or isinstance(value, float)):
        return float(value)
    if kind is int and number and value == value // 1:
        return int(value)
    wanted = f"one of {', '.join(map(str, arguments))}" if kind is Literal else _WORDS.get(kind, "a section")
    raise UserError(f"config field {path} is {str(value)[:80]!r}; it must be {wanted}")


def plain(cfg: Any) -> dict[str, Any]:
    """The fields of a config, or of its class before any file or override, as plain data."""
    return typing.cast("dict[str, Any]", OmegaConf.to_container(OmegaConf.structured(cfg)))


def to_yaml(cfg: Any) -> str:
    """The resolved config as YAML; loading it back gives an equal object."""
    return OmegaConf.to_yaml(OmegaConf.structured(cfg))


def help_text(cls: type[Any], prefix: str = "") -> str:
    """Every field of `cls` with its type, default and docstring, one block a field."""
    lines = []
    docs, hints, values = _field_docs(cls), typing.get_type_hints(cls), plain(cls)
    for item in dataclasses.fields(cls):
        path, doc, nested = f"{prefix}{item.name}", docs[item.name], _dataclass_of(hints[item.name])
        if nested is hints[item.name]:
            lines += [f"{path}: {doc}", help_text(nested, f"{path}.")]
            continue
        lines.append(f"{path} = {values[item.name]!r}\n    {doc}")
        if nested is not None:
            lines.append(textwrap.indent(help_text(nested, f"{path}.N."), "    "))
    return "\n".join(lines)


def print_help(cls: type[Any]) -> None:
    """What `--help` prints."""
    print(f"usage: CONFIG.yaml [MORE.yaml ...] [field=value ...]\n\n{help_text(cls)}")


def _dataclass_of(hint: Any) -> type[Any] | None:
    """The dataclass in `hint` (itself, or the element of a list), or None."""
    parts = (hint, *typing.get_args(hint))
    return next((part for part in parts if isinstance(part, type) and dataclasses.is_dataclass(part)), None)


def _field_docs(cls: type[Any]) -> dict[str, str]:
    """Docstrings written under the fields of `cls` and its bases."""
    docs = {item.name: "" for item in dataclasses.fields(cls)}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            source = inspect.getsource(base)
            docs |= re.findall(r'^    (\w+): [^\n]*\n    """(.*?)"""', source, flags=re.M | re.S)
    return docs
