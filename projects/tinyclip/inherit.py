"""Manual weight inheritance: a smaller CLIP's weights cut out of a larger one's state dict.

Pure functions on open_clip.CLIP state dicts; ViT and ResNet image towers and the text transformer. A student unit is one
teacher unit, the same in all tensors that share its group (axes.py), so the cut stays a network. The logit scale is not
inherited.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from projects.tinyclip.axes import Axis, cut_units, magnitude_scores, tensor_axes
from vlmkd.errors import UserError

State = dict[str, Tensor]
LayerSelect = Literal["interval_front", "uniform"] | list[int]
WidthSelect = Literal["front", "magnitude"] | dict[str, list[int]]

_STACKS = re.compile(
    r"(?P<stack>(?:visual\.)?transformer\.resblocks|visual\.layer[1-4])\.(?P<index>\d+)\.(?P<rest>.+)"
)


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
    interpolated: bool


@dataclass
class Inheritance:
    """Inherited tensors of one or both towers, complete but for the logit scale, and what they are."""

    state: State = field(default_factory=dict)
    towers: list[TowerReport] = field(default_factory=list)

    def describe(self) -> str:
        """Lines for the log: layers, cut groups and counts of each tower."""
        lines = []
        for report in self.towers:
            note = ", positions interpolated" if report.interpolated else ""
            lines.append(f"{report.tower} tower: {report.elements:,} numbers inherited{note}")
            lines += [f"  {stack}: layers {_span(layers)}" for stack, layers in report.layers.items()]
            lines += [f"  {group}: units {_span(units)}" for group, units in report.units.items()]
        return "\n".join(lines)

    def merge(self, other: Inheritance) -> Inheritance:
        """Both together; for towers that come from different sources."""
        return Inheritance(self.state | other.state, self.towers + other.towers)


def inherit(
    teacher_state: Mapping[str, Tensor],
    teacher_config: Mapping[str, Any],
    student_config: Mapping[str, Any],
    *,
    layer_select: LayerSelect = "interval_front",
    width_select: WidthSelect = "front",
    tower: Literal["image", "text", "both"] = "both",
    positions: Literal["interpolate", "refuse"] = "interpolate",
    allow_activation_change: bool = False,
) -> Inheritance:
    """Weights for `student_config`, cut out of `teacher_state`, whose precision is kept.

    Args:
        layer_select: `interval_front` (reference): layer i <- i * floor(D / K) for K of D layers, which is plain
            truncation when D / K < 2. `uniform`: i <- round(i (D - 1) / (K - 1)). Or a transformer's layers as a list.
        width_select: `front` (reference): the leading units. `magnitude`: those of the largest score (see
            `magnitude_scores`) in the selected layers. A dict: group name -> units (names as `describe` prints them;
            `heads` and `mlp` stand for the group of every layer); what it does not name is cut in front.
        tower: which tower, or both. Call once a tower and `merge` for two sources.
        positions: what happens to the image positional table when the grids differ; a text table is cut in front.
    """
    result = Inheritance()
    for name in ("image", "text") if tower == "both" else (tower,):
        cut = _Cut(name, teacher_state, teacher_config, student_config, allow_activation_change)
        result = result.merge(cut.run(layer_select, width_select, positions))
    return result


def select_layers(depth: int, count: int, select: LayerSelect, where: str) -> list[int]:
    """Teacher layers of the `count` student layers, out of `depth`; `where` names the stack in errors."""
    if count > depth:
        raise UserError(
            f"{where}: the student has {count} layers, its source {depth}; give the student at most {depth}"
        )
    if select == "interval_front":
        return [layer * (depth // count) for layer in range(count)]
    if select == "uniform":
        return [round(layer * (depth - 1) / max(1, count - 1)) for layer in range(count)]
    if len(select) != count or sorted(set(select)) != select or not set(select) <= set(range(depth)):
        raise UserError(
            f"{where}: layer_select {select} must name {count} layers of 0..{depth - 1} in rising order"
        )
    return select


class _Facts(NamedTuple):
    """What a model config says of one tower; a text tower has neither patches nor grid."""

    kind: str
    activation: str
    head_width: int
    patch: int = 0
    grid: tuple[int, int] = (0, 0)
    """Patches down and across; of a ResNet the cells that its attention pool sees."""

    @classmethod
    def of(cls, config: Mapping[str, Any], tower: str) -> _Facts:
        activation = "QuickGELU" if config.get("quick_gelu") else "GELU"
        if tower == "text":
            text = config["text_cfg"]
            return cls("a transformer", activation, text.get("width", 512) // text.get("heads", 8))
        vision = config["vision_cfg"]
        resnet = isinstance(vision.get("layers"), (list, tuple))
        patch = 32 if resnet else vision.get("patch_size", 16)
        size = vision.get("image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        return cls(
            "a ResNet" if resnet else "a transformer",
            "ReLU" if resnet else activation,
            vision.get("head_width", 64),
            patch,
            (height // patch, width // patch),
        )


class _Cut:
    """The inheritance of one tower."""

    def __init__(
        self,
        tower: str,
        teacher_state: Mapping[str, Tensor],
        teacher_config: Mapping[str, Any],
        student_config: Mapping[str, Any],
        allow_activation_change: bool,
    ) -> None:
        self.tower = tower
        self._refuse(
            bool(teacher_config.get("pruned")),
            "the source is a pruned model; enter it into a mask run instead",
        )
        self.source = {name: value for name, value in teacher_state.items() if _tower_of(name) == tower}
        self.shapes = _student_shapes(student_config, tower)
        teacher, student = (_Facts.of(config, tower) for config in (teacher_config, student_config))
        self.teacher, self.student = teacher, student
        self._refuse(
            teacher.kind != student.kind,
            f"the source is {teacher.kind}, the student {student.kind}; use two of one kind",
        )
        self._refuse(
            teacher.patch != student.patch,
            f"the source has patches of {teacher.patch} pixels, the student of {student.patch}; patch weights are not "
            f"resized, so set vision_cfg.patch_size: {teacher.patch} in the student, or take another source",
        )
        self._refuse(
            teacher.head_width != student.head_width,
            f"heads are {teacher.head_width} wide in the source and {student.head_width} in the student; set the "
            f"student's head width to {teacher.head_width}",
        )
        self._refuse(
            teacher.activation != student.activation and not allow_activation_change,
            f"the source uses {teacher.activation}, the student {student.activation}; set quick_gelu: "
            f"{str(teacher.activation == 'QuickGELU').lower()} in the student, or allow_activation_change",
        )

    def run(self, layer_select: LayerSelect, width_select: WidthSelect, positions: str) -> Inheritance:
        """Choose layers, then units, then cut."""
        layers = self._choose_layers(layer_select)
        origins = {name: _source_name(name, layers) for name in self.shapes}
        axes = {name: self._axes(name, origin) for name, origin in origins.items()}
        source = {origin: self.source[origin] for origin in origins.values()}
        interpolated = self.teacher.grid != self.student.grid
        if interpolated:
            self._resize_positions(source, positions)
        sizes = self._sizes(origins, axes, source)
        scores = {}
        if width_select == "magnitude":
            scores = magnitude_scores(source, {origin: axes[name] for name, origin in origins.items()})
        units = self._choose_units(sizes, scores, width_select)
        state = {name: cut_units(source[origin], axes[name], units) for name, origin in origins.items()}
        assert {name: tensor.shape for name, tensor in state.items()} == self.shapes
        cut = {group: units[group].tolist() for group, (small, big) in sizes.items() if small != big}
        elements = sum(tensor.numel() for tensor in state.values())
        return Inheritance(state, [TowerReport(self.tower, layers, cut, elements, interpolated)])

    def _choose_layers(self, select: LayerSelect) -> dict[str, list[int]]:
        """Teacher layers of each stack: one of a transformer, four of a ResNet."""
        depths, stacks = _depths(self.source), _depths(self.shapes)
        self._refuse(
            len(stacks) > 1 and not isinstance(select, str),
            "a list of layers is for transformers; a ResNet's stages take interval_front or uniform",
        )
        return {
            stack: select_layers(depths.get(stack, 0), count, select, f"{self.tower} tower, {stack}")
            for stack, count in stacks.items()
        }

    def _axes(self, name: str, origin: str) -> tuple[Axis, ...]:
        """Axes of the student's tensor `name`, whose source is `origin`."""
        self._refuse(
            origin not in self.source, f"the source has no {origin}, which the student's {name} needs"
        )
        axes = tensor_axes(origin, self.student.head_width, resnet=self.student.kind == "a ResNet")
        if axes is None or not len(axes) == len(self.shapes[name]) == self.source[origin].ndim:
            raise UserError(
                f"{self.tower} tower: there is no inheritance rule for {name}; use a plain CLIP tower"
            )
        return axes

    def _resize_positions(self, source: State, positions: str) -> None:
        """Bring the image positional table onto the student's grid, in place of `source`'s."""
        from timm.layers import resample_abs_pos_embed_nhwc

        teacher, student = self.teacher.grid, self.student.grid
        told = ["x".join(map(str, grid)) for grid in (teacher, student)]
        self._refuse(
            positions == "refuse",
            f"the source has a {told[0]} grid of positions, the student {told[1]}; use one image size, or "
            "positions=interpolate",
        )
        (name,) = (name for name in source if name.endswith("positional_embedding"))
        first, rest = source[name][:1], source[name][1:].unflatten(0, teacher)
        resized = resample_abs_pos_embed_nhwc(rest[None], list(student))[0]
        source[name] = torch.cat([first, resized.flatten(0, 1)])

    def _sizes(
        self, origins: Mapping[str, str], axes: Mapping[str, tuple[Axis, ...]], source: State
    ) -> dict[str, tuple[int, int]]:
        """Units of every group in the student and in the teacher."""
        sizes: dict[str, tuple[int, int]] = {}
        for name, origin in origins.items():
            for axis, *entries in zip(axes[name], self.shapes[name], source[origin].shape, strict=True):
                small, big = (number // axis.parts // axis.unit for number in entries)
                self._refuse(
                    small > big,
                    f"the student has {small} units of {axis.group} ({name}), its source {big}; give the student at "
                    f"most {big}",
                )
                self._refuse(
                    axis.group in ("fixed", "vocabulary") and small != big,
                    f"{name} has {small} entries in the student and {big} in the source along an axis that is never cut "
                    "(kernel or vocabulary); make them equal",
                )
                if axis.group != "fixed":
                    sizes[axis.group] = small, big
        return sizes

    def _choose_units(
        self,
        sizes: Mapping[str, tuple[int, int]],
        scores: Mapping[str, Tensor],
        select: WidthSelect,
    ) -> dict[str, Tensor]:
        """Teacher units of every group."""
        units = {group: torch.arange(small) for group, (small, _) in sizes.items()}
        for group in scores.keys() & sizes.keys():
            small, big = sizes[group]
            if small < big:
                units[group] = scores[group].argsort(descending=True, stable=True)[:small].sort().values
        for key, given in select.items() if isinstance(select, dict) else ():
            every = key in ("heads", "mlp")  # of all layers
            groups = [group for group in sizes if group == key or (every and group.endswith(f".{key}"))]
            cuttable = ", ".join(group for group in sizes if group not in ("vocabulary", "positions"))
            self._refuse(not groups, f"width_select: there is no group {key}; groups here: {cuttable}")
            for group in groups:
                small, big = sizes[group]
                self._refuse(
                    not len(given) == len(set(given)) == small or not set(given) <= set(range(big)),
                    f"width_select for {group} must name {small} different units of 0..{big - 1}, and names {len(given)}",
                )
                units[group] = torch.tensor(given)
        return units

    def _refuse(self, refused: bool, told: str) -> None:
        if refused:
            raise UserError(f"{self.tower} tower: {told}")


def _source_name(name: str, layers: Mapping[str, list[int]]) -> str:
    """The teacher's name of student tensor `name`."""
    match = _STACKS.fullmatch(name)
    if not match:
        return name
    return f"{match['stack']}.{layers[match['stack']][int(match['index'])]}.{match['rest']}"


def _depths(names: Mapping[str, Any]) -> dict[str, int]:
    """Number of layers of each stack, in order."""
    depths: dict[str, int] = {}
    for match in filter(None, map(_STACKS.fullmatch, names)):
        depths[match["stack"]] = max(depths.get(match["stack"], 0), int(match["index"]) + 1)
    return depths


def _tower_of(name: str) -> str | None:
    if name in ("logit_scale", "logit_bias", "attn_mask"):
        return None
    return "image" if name.startswith("visual.") else "text"


def _student_shapes(config: Mapping[str, Any], tower: str) -> dict[str, torch.Size]:
    """Names and shapes of all tensors of one tower of a plain CLIP built from `config`, without memory for them."""
    foreign = "timm_model_name" in config["vision_cfg"] or "hf_model_name" in config["text_cfg"]
    if foreign or config.get("custom_text"):
        raise UserError(
            "student: a CLIP with a timm, Hugging Face or custom text tower cannot inherit; use a plain CLIP"
        )
    import open_clip

    known = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu")
    with torch.device("meta"):
        model = open_clip.CLIP(**{key: config[key] for key in known if key in config})
    return {name: tensor.shape for name, tensor in model.state_dict().items() if _tower_of(name) == tower}


def _span(numbers: list[int]) -> str:
    """`0..11` for a run, else the numbers, the middle ones left out when there are many."""
    if len(numbers) > 1 and numbers == list(range(numbers[0], numbers[0] + len(numbers))):
        return f"{numbers[0]}..{numbers[-1]}"
    shown = numbers if len(numbers) <= 16 else [*numbers[:8], "...", *numbers[-4:]]
    return f"{', '.join(map(str, shown))} ({len(numbers)})"
