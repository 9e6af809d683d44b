"""Manual weight inheritance: a smaller CLIP's weights cut out of a larger one's state dict.

Pure functions on open_clip.CLIP state dicts; ViT and ResNet image towers and the text transformer. Every axis of every
tensor belongs to a group of units (hidden channels, heads of a layer, FFN channels of a layer, ...). A student unit is
one teacher unit, the same in all tensors that share the group, so the cut stays a network. The logit scale is not
inherited.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from projects.tinyclip.axes import STACKS, Axis, cut_units, magnitude_scores, tensor_axes
from vlmkd.errors import UserError

State = dict[str, Tensor]
LayerSelect = Literal["interval_front", "uniform"] | list[int] | list[list[int]]
WidthSelect = Literal["front", "magnitude"] | list[int] | dict[str, list[int]]
Tower = Literal["image", "text", "both"]

_SCALES = ("logit_scale", "logit_bias")


@dataclass
class TowerReport:
    """What one tower took over."""

    tower: str
    layers: dict[str, list[int]]
    """Teacher layer of every student layer, by stack of layers."""
    units: dict[str, list[int]]
    """Teacher units of every group that was cut, by group."""
    elements: int
    """Inherited numbers: parameters, and buffers of ResNets."""
    interpolated: bool = False
    """Whether the positional table was resized to another grid."""


@dataclass
class Inheritance:
    """Inherited tensors of one or both towers, complete but for the logit scale, and what they are."""

    state: State
    towers: list[TowerReport] = field(default_factory=list)

    def describe(self) -> str:
        """Lines for the log: layers, cut groups and counts of each tower."""
        lines = []
        for report in self.towers:
            note = ", positions interpolated" if report.interpolated else ""
            lines.append(f"{report.tower} tower: {report.elements:,} numbers inherited{note}")
            for stack, layers in report.layers.items():
                lines.append(f"  {stack}: layers {_span(layers)}")
            lines += [f"  {group}: units {_span(units)}" for group, units in report.units.items()]
        return "\n".join(lines)

    def merge(self, other: Inheritance) -> Inheritance:
        """Both together; for towers that come from different sources."""
        shared = self.state.keys() & other.state.keys()
        assert not shared, f"both hold {sorted(shared)[0]}"
        return Inheritance({**self.state, **other.state}, self.towers + other.towers)


def inherit(
    teacher_state: Mapping[str, Tensor],
    teacher_config: Mapping[str, Any],
    student_config: Mapping[str, Any],
    *,
    layer_select: LayerSelect = "interval_front",
    width_select: WidthSelect = "front",
    tower: Tower = "both",
    positions: Literal["interpolate", "refuse"] = "interpolate",
    allow_activation_change: bool = False,
) -> Inheritance:
    """Weights for `student_config`, cut out of `teacher_state`.

    Args:
        teacher_state: open_clip.CLIP state dict (of any precision, which is kept).
        teacher_config, student_config: open_clip model configs (embed_dim, vision_cfg, text_cfg, quick_gelu).
        layer_select: which teacher layers. `interval_front` (reference): layer i <- i * floor(D / K) for K of D layers,
            which is plain truncation when D / K < 2. `uniform`: i <- round(i (D - 1) / (K - 1)). Or the layers as a list
            (for a ResNet a list for each stage, each starting with 0, whose block holds the downsampling).
        width_select: which units. `front` (reference): the leading ones. `magnitude`: those of the largest score,
            score(u) = sum over all weight matrices W of the selected layers that touch the group of
            |W_u|^2 / mean_v |W_v|^2, so every matrix counts alike whatever its scale. A list: the hidden channels. A
            dict: group name -> units (names as `describe` prints them; `hidden`, `heads` and `mlp` stand for the group
            of every layer); what it does not name is cut in front.
        tower: which tower, or both. Call once a tower and `merge` for two sources.
        positions: what to do with the image positional table when the grids differ: bicubic interpolation or refusal.
            A text table is cut in front.
        allow_activation_change: accept a student whose activation is not the teacher's (published recipes: students
            with GELU from QuickGELU teachers).

    Raises:
        UserError: the student does not fit into the teacher; names both sides and the mend.
    """
    result = Inheritance({})
    for name in ("image", "text") if tower == "both" else (tower,):
        job = _Job(name, teacher_state, teacher_config, student_config, positions)
        job.check(allow_activation_change)
        result = result.merge(job.run(layer_select, width_select))
    return result


def select_layers(
    depth: int, count: int, select: Literal["interval_front", "uniform"] | Sequence[int], where: str
) -> list[int]:
    """Teacher layers of the `count` student layers, out of `depth`; `where` names the stack in errors."""
    if count > depth:
        raise UserError(
            f"{where}: the student has {count} layers, its source {depth}; give the student at most {depth}"
        )
    if select == "interval_front":
        return [layer * (depth // count) for layer in range(count)]
    if select == "uniform":
        return [round(layer * (depth - 1) / max(1, count - 1)) for layer in range(count)]
    if isinstance(select, str):
        raise UserError(f"layer_select is {select!r}; choose interval_front, uniform or a list of layers")
    layers = list(select)
    if (
        len(layers) != count
        or sorted(set(layers)) != layers
        or not all(0 <= layer < depth for layer in layers)
    ):
        raise UserError(
            f"{where}: layer_select {layers} must name {count} layers of 0..{depth - 1} in rising order"
        )
    return layers


class _Job:
    """The inheritance of one tower."""

    def __init__(
        self,
        tower: str,
        teacher_state: Mapping[str, Tensor],
        teacher_config: Mapping[str, Any],
        student_config: Mapping[str, Any],
        positions: str,
    ) -> None:
        self.tower, self.positions = tower, positions
        self.key = "vision_cfg" if tower == "image" else "text_cfg"
        self.configs = {"teacher": teacher_config, "student": student_config}
        self.source = {name: value for name, value in teacher_state.items() if _tower_of(name) == tower}
        self.shapes = _student_shapes(student_config, tower)
        self.head_width = _head_width(student_config, self.key)
        self.resnet = tower == "image" and _is_resnet(student_config)
        self.sizes: dict[str, int] = {}
        """Units of every group in the teacher."""

    def check(self, allow_activation_change: bool) -> None:
        """Refuse pairs whose towers are not of one kind."""
        teacher, student = self.configs["teacher"], self.configs["student"]
        if not self.source:
            raise UserError(
                f"{self.tower} tower: the source has no tensors of open_clip's CLIP layout; convert it first"
            )
        if teacher.get("pruned"):
            raise UserError(
                f"{self.tower} tower: the source is a pruned model; enter it into a mask run instead"
            )
        kinds = [_is_resnet(config) and self.tower == "image" for config in (teacher, student)]
        if kinds[0] != kinds[1]:
            names = ["a ResNet" if kind else "a transformer" for kind in kinds]
            raise UserError(
                f"{self.tower} tower: the source is {names[0]}, the student {names[1]}; use two of one kind"
            )
        patches = [config["vision_cfg"].get("patch_size", 16) for config in (teacher, student)]
        if self.tower == "image" and not kinds[0] and patches[0] != patches[1]:
            raise UserError(
                f"image tower: the source has patches of {patches[0]} pixels, the student of {patches[1]}; patch weights "
                f"are not resized, so set vision_cfg.patch_size: {patches[0]} in the student, or take another source"
            )
        widths = [_head_width(config, self.key) for config in (teacher, student)]
        if widths[0] != widths[1]:
            raise UserError(
                f"{self.tower} tower: heads are {widths[0]} wide in the source and {widths[1]} in the student; "
                f"set the student's head width to {widths[0]}"
            )
        activations = ["QuickGELU" if config.get("quick_gelu") else "GELU" for config in (teacher, student)]
        if activations[0] != activations[1] and not kinds[0] and not allow_activation_change:
            raise UserError(
                f"{self.tower} tower: the source uses {activations[0]}, the student {activations[1]}; set quick_gelu: "
                f"{str(activations[0] == 'QuickGELU').lower()} in the student, or allow_activation_change"
            )

    def run(self, layer_select: LayerSelect, width_select: WidthSelect) -> Inheritance:
        """Choose layers, then units, then cut."""
        layers = self._choose_layers(layer_select)
        origins = {name: _source_name(name, layers) for name in self.shapes}
        axes = {name: self._axes(name, origin) for name, origin in origins.items()}
        source = {origin: self.source[origin] for origin in origins.values()}
        interpolated = self._resize_positions(source)
        units = self._choose_units(origins, axes, source, width_select)
        state = {name: cut_units(source[origin], axes[name], units) for name, origin in origins.items()}
        elements = sum(tensor.numel() for tensor in state.values())
        assert {name: tensor.shape for name, tensor in state.items()} == self.shapes
        assert elements == sum(shape.numel() for shape in self.shapes.values())
        cut = {group: chosen.tolist() for group, chosen in units.items() if self.sizes[group] != len(chosen)}
        report = TowerReport(self.tower, layers, cut, elements, interpolated)
        return Inheritance(state, [report])

    def _axes(self, name: str, origin: str) -> tuple[Axis, ...]:
        """Axes of the student's tensor `name`, whose source is `origin`."""
        if origin not in self.source:
            raise UserError(
                f"{self.tower} tower: the source has no {origin}, which the student's {name} needs"
            )
        axes = tensor_axes(origin, self.head_width, resnet=self.resnet)
        if axes is None or not len(axes) == len(self.shapes[name]) == self.source[origin].ndim:
            raise UserError(
                f"{self.tower} tower: there is no inheritance rule for {name}; use a plain CLIP tower"
            )
        return axes

    def _choose_layers(self, select: LayerSelect) -> dict[str, list[int]]:
        """Teacher layers of each stack: one of a transformer, four of a ResNet."""
        depths = {"teacher": _depths(self.source), "student": _depths(self.shapes)}
        layers = {}
        for stage, (stack, count) in enumerate(depths["student"].items()):
            if stack not in depths["teacher"]:
                raise UserError(f"{self.tower} tower: the source has no {stack}; use two towers of one kind")
            chosen: Any = select
            if not isinstance(select, str) and len(depths["student"]) > 1:
                if len(select) != len(depths["student"]) or not all(
                    isinstance(part, list) for part in select
                ):
                    raise UserError(
                        "layer_select: a ResNet needs one list of blocks for each of its 4 stages"
                    )
                chosen = select[stage]
            layers[stack] = select_layers(
                depths["teacher"][stack], count, chosen, f"{self.tower} tower, {stack}"
            )
            if ".layer" in stack and layers[stack][0] != 0:
                raise UserError(
                    f"layer_select: {stack} must start with block 0, which holds the downsampling"
                )
        return layers

    def _resize_positions(self, source: State) -> bool:
        """Bring the image positional table onto the student's grid, in place of `source`'s; True if it changed."""
        if self.tower == "text":
            return False
        name = f"visual.{'attnpool.' if self.resnet else ''}positional_embedding"
        grids = {side: _grid(config) for side, config in self.configs.items()}
        if grids["teacher"] == grids["student"]:
            return False
        if self.positions == "refuse":
            raise UserError(
                f"image tower: the source has a {_by(grids['teacher'])} grid of positions, the student {_by(grids['student'])}; "
                "use one image size, or positions=interpolate"
            )
        table = source[name]
        if len(table) != 1 + grids["teacher"][0] * grids["teacher"][1]:
            raise UserError(
                f"image tower: {name} has {len(table)} rows, but the source's config a {_by(grids['teacher'])} grid"
            )
        source[name] = interpolate_positions(table, grids["teacher"], grids["student"])
        return True

    def _choose_units(
        self,
        origins: Mapping[str, str],
        axes: Mapping[str, tuple[Axis, ...]],
        source: State,
        select: WidthSelect,
    ) -> dict[str, Tensor]:
        """Teacher units of every group, checked to exist."""
        wanted: dict[str, int] = {}
        for name, origin in origins.items():
            for axis, small, big in zip(axes[name], self.shapes[name], source[origin].shape, strict=True):
                per_unit = axis.parts * axis.unit
                self._check_size(axis.group, small // per_unit, big // per_unit, name)
                if axis.group == "fixed":
                    continue
                sizes = (
                    wanted.setdefault(axis.group, small // per_unit),
                    self.sizes.setdefault(axis.group, big // per_unit),
                )
                if sizes != (small // per_unit, big // per_unit):
                    raise UserError(
                        f"{self.tower} tower: {origin} of the source contradicts its other tensors; the file is damaged"
                    )
        given = _given_units(select, wanted)
        scores = (
            magnitude_scores(source, {origins[name]: axes[name] for name in origins})
            if select == "magnitude"
            else {}
        )
        units = {}
        for group, count in wanted.items():
            if group in given:
                units[group] = self._explicit(group, given[group], count)
            elif group in scores and count < self.sizes[group]:
                units[group] = scores[group].argsort(descending=True, stable=True)[:count].sort().values
            else:
                units[group] = torch.arange(count)
        return units

    def _check_size(self, group: str, small: int, big: int, name: str) -> None:
        if small > big:
            raise UserError(
                f"{self.tower} tower: the student has {small} units of {group} ({name}), its source {big}; "
                f"give the student at most {big}"
            )
        if group in ("fixed", "vocabulary") and small != big:
            raise UserError(
                f"{self.tower} tower: {name} has {small} entries in the student and {big} in the source along an axis that "
                "is never cut (kernel or vocabulary); make them equal"
            )

    def _explicit(self, group: str, units: list[int], count: int) -> Tensor:
        size = self.sizes[group]
        if len(units) != count or len(set(units)) != count or not all(0 <= unit < size for unit in units):
            raise UserError(
                f"{self.tower} tower: width_select for {group} must name {count} different units of 0..{size - 1}, "
                f"and names {len(units)}"
            )
        return torch.tensor(units)


def interpolate_positions(table: Tensor, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Positional table [1 + h w, D] with its class row kept and its grid resized bicubically (antialiased)."""
    grid = table[1:].float().T.reshape(1, -1, *source)
    resized = F.interpolate(grid, size=target, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([table[:1], resized.flatten(2)[0].T.to(table.dtype)])


def _given_units(select: WidthSelect, groups: Mapping[str, int]) -> dict[str, list[int]]:
    """Explicit units by full group name."""
    if isinstance(select, str):
        if select not in ("front", "magnitude"):
            raise UserError(f"width_select is {select!r}; choose front, magnitude, a list or a dict of lists")
        return {}
    named = {"hidden": select} if isinstance(select, list) else dict(select)
    given = {}
    for key, units in named.items():
        matches = [
            group
            for group in groups
            if group == key or (key in ("heads", "mlp") and group.endswith(f".{key}"))
        ]
        if not matches:
            cuttable = [group for group in groups if group not in ("vocabulary", "positions")]
            raise UserError(f"width_select: there is no group {key}; groups here: {', '.join(cuttable)}")
        given.update({group: units for group in matches})
    return given


def _source_name(name: str, layers: Mapping[str, list[int]]) -> str:
    """The teacher's name of student tensor `name`."""
    match = STACKS.fullmatch(name)
    if not match:
        return name
    return f"{match['stack']}.{layers[match['stack']][int(match['index'])]}.{match['rest']}"


def _tower_of(name: str) -> str | None:
    if name in _SCALES or name == "attn_mask":
        return None
    return "image" if name.startswith("visual.") else "text"


def _student_shapes(config: Mapping[str, Any], tower: str) -> dict[str, torch.Size]:
    """Names and shapes of all tensors of one tower of a plain CLIP built from `config`, without memory for them."""
    known = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu")
    if (
        "timm_model_name" in config["vision_cfg"]
        or "hf_model_name" in config["text_cfg"]
        or config.get("custom_text")
    ):
        raise UserError(
            f"student: {tower} tower cannot inherit in a CLIP with a timm, Hugging Face or custom text tower; use a plain CLIP"
        )
    import open_clip

    with torch.device("meta"):
        model = open_clip.CLIP(**{key: config[key] for key in known if key in config})
    return {name: tensor.shape for name, tensor in model.state_dict().items() if _tower_of(name) == tower}


def _is_resnet(config: Mapping[str, Any]) -> bool:
    return isinstance(config["vision_cfg"].get("layers"), (list, tuple))


def _head_width(config: Mapping[str, Any], key: str) -> int:
    if key == "vision_cfg":
        return config[key].get("head_width", 64)
    return config[key].get("width", 512) // config[key].get("heads", 8)


def _grid(config: Mapping[str, Any]) -> tuple[int, int]:
    """Patches down and across; of a ResNet the cells that its attention pool sees."""
    vision = config["vision_cfg"]
    size = vision.get("image_size", 224)
    patch = 32 if _is_resnet(config) else vision.get("patch_size", 16)
    height, width = (size, size) if isinstance(size, int) else size
    return height // patch, width // patch


def _by(grid: tuple[int, int]) -> str:
    return f"{grid[0]}x{grid[1]}"


def _depths(names: Mapping[str, Any]) -> dict[str, int]:
    """Number of layers of each stack, in order."""
    depths: dict[str, int] = {}
    for match in filter(None, map(STACKS.fullmatch, names)):
        depths[match["stack"]] = max(depths.get(match["stack"], 0), int(match["index"]) + 1)
    return depths


def _span(numbers: list[int]) -> str:
    """`0..11` for a run, else the numbers, the middle ones left out when there are many."""
    if numbers == list(range(numbers[0], numbers[0] + len(numbers))) and len(numbers) > 1:
        return f"{numbers[0]}..{numbers[-1]}"
    shown = [str(number) for number in numbers]
    return ", ".join(shown if len(shown) <= 16 else [*shown[:8], "...", *shown[-4:]]) + f" ({len(numbers)})"
