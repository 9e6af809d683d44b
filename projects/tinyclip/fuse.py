"""From masks to a dense ragged CLIP, and back into full size for the next stage.

Fusing is exact: the dense model computes what the masked one did under its deterministic masks, soft factors and biases
included. Factors go into the embeddings and the output projections; LayerNorms and the final projection are only sliced.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from projects.tinyclip.axes import Axis, cut_units, tensor_axes
from projects.tinyclip.masked import MaskedCLIP
from projects.tinyclip.masks import FAMILIES, INITIAL_LOG_ALPHA, Mask, Sides, TowerMasks
from vlmkd.errors import UserError
from vlmkd.evaluation.efficiency import macs_of
from vlmkd.models.pruned_clip import Config, PrunedCLIP, State

_ENTER_THE_STREAM = (
    *("conv1.weight", "class_embedding", "positional_embedding", "token_embedding.weight"),
    *("out_proj.weight", "out_proj.bias", "c_proj.weight", "c_proj.bias"),
)
_PROJECTIONS = ("visual.proj", "text_projection")


@dataclass
class Fused:
    """A dense model: its pruned config, its weights, and the full-size config that it came from."""

    config: Config
    state: State
    full_config: Config

    def model(self) -> PrunedCLIP:
        """The dense model in evaluation mode."""
        model = PrunedCLIP(self.config)
        model.load_state_dict(self.state)
        return model.eval()

    def report(self) -> str:
        """Markdown table: units of each tower and layer, parameters, MACs, and the sparsity reached."""
        lines = ["| part | width | heads | FFN | params | of full | MACs |", "|---|---|---|---|---|---|---|"]
        parts = zip(("vision_cfg", "text_cfg"), costs(self.config), costs(self.full_config), strict=True)
        for field, (count, macs), (full_count, _) in parts:
            name = "image" if field == "vision_cfg" else "text"
            tower, full = self.config[field], self.full_config[field]
            lines.append(
                f"| {name} | {tower['width']}/{full['width']} | {sum(tower['heads'])}/{sum(full['heads'])} "
                f"| {sum(tower['mlp'])}/{sum(full['mlp'])} | {count:,} | {count / full_count:.1%} | {macs:,} |"
            )
            lines += [
                f"| {name} layer {layer} | | {heads}/{full['heads'][layer]} | {channels}/{full['mlp'][layer]} | | | |"
                for layer, (heads, channels) in enumerate(zip(tower["heads"], tower["mlp"], strict=True))
            ]
        return "\n".join(lines)


def costs(config: Config) -> list[tuple[int, int]]:
    """Parameters and multiply-adds of the image tower, and of the text tower with its token table at full length."""
    with torch.device("meta"):
        model = PrunedCLIP({**config, "pruned": True})
        size = config["vision_cfg"]["image_size"]
        images = torch.empty(1, 3, *([size, size] if isinstance(size, int) else size))
        tokens = torch.zeros(1, config["text_cfg"]["context_length"], dtype=torch.long)
        macs = [macs_of(model, model.encode_image, images), macs_of(model, model.encode_text, tokens)]
    counts = [sum(p.numel() for p in tower.parameters()) for tower in (model.visual, model.text)]
    return list(zip(counts, macs, strict=True))


@torch.no_grad()
def fuse(
    weights: State, config: Config, *, round_to: int = 1, legacy_projection_scale: bool = False
) -> Fused:
    """The dense model of a MaskedCLIP's complete `weights` (masks included) and full-size `config`.

    Args:
        round_to: hidden width and FFN channels become multiples of this, each the top k with k rounded to the nearest;
            heads are whole. Exact with respect to the masks rounded in the same way (TowerMasks.deterministic).
        legacy_projection_scale: fuse as the released code does, whose dense model is not the masked one: the rows of
            the output projections are scaled by the hidden mask too, and an attention without heads goes with its
            output bias. Only for replaying it.
    """
    masked = MaskedCLIP(config)
    masked.load_state_dict(weights)
    unpruned = {key: config[key] for key in ("vision_cfg", "text_cfg")}
    pruned: Config = config | {"pruned": True, "unpruned": unpruned}
    state = {
        name: weights[name].reshape(()).clone() for name in ("logit_scale", "logit_bias") if name in weights
    }
    for prefix, field, masks in (
        ("visual.", "vision_cfg", masked.image_masks),
        ("text.", "text_cfg", masked.text_masks),
    ):
        mask = masks.deterministic(round_to)
        if not mask.hidden.any():
            name = "image" if field == "vision_cfg" else "text"
            raise UserError(
                f"masks: no hidden channel of the {name} tower is left; lower the target sparsity"
            )
        own = {name: value for name, value in weights.items() if name.startswith(prefix)}
        state |= _fuse_tower(own, config[field]["head_width"], mask, legacy_projection_scale)
        pruned[field] = config[field] | {
            "width": int(mask.hidden.count_nonzero()),
            "heads": mask.heads.count_nonzero(dim=-1).tolist(),
            "mlp": mask.intermediate.count_nonzero(dim=-1).tolist(),
        }
    return Fused(pruned, state, config)


def _fuse_tower(weights: State, head_width: int, mask: Mask, legacy: bool) -> State:
    """One tower's weights at the units that its mask keeps, scaled where their outputs enter the stream."""
    factors = {"hidden": mask.hidden}
    for layer in range(len(mask.heads)):
        factors[f"{layer}.heads"], factors[f"{layer}.mlp"] = mask.heads[layer], mask.intermediate[layer]
    units = {group: values.nonzero().flatten() for group, values in factors.items()}
    state: State = {}
    for name, value in weights.items():
        axes = [
            axis._replace(group=re.sub(r".*resblocks\.", "", axis.group))
            for axis in tensor_axes(name.removeprefix("text."), head_width, resnet=False) or ()
        ]
        axes = [axis if axis.group in units else Axis("fixed") for axis in axes]
        value = cut_units(value, tuple(axes), units)
        if name.endswith((*_ENTER_THE_STREAM, *(_PROJECTIONS if legacy else ()))):
            for dim, axis in reversed([*enumerate(axes)]):
                if axis.group in units:
                    scale = factors[axis.group][units[axis.group]].repeat_interleave(axis.unit)
                    value = value * scale.view(-1, *[1] * (value.ndim - 1 - dim))
        part = re.fullmatch(r".*resblocks\.(\d+)\.(?:(ln_1|attn)|ln_2|mlp)\..+", name)
        empty = part is not None and not len(units[f"{part[1]}.{'heads' if part[2] else 'mlp'}"])
        if value.numel() and not (empty and ".ln_" in name):  # of an empty part the output bias stays
            state[name] = torch.zeros_like(value) if empty and legacy and ".attn." in name else value
    return state


@torch.no_grad()
def reenter(
    pruned: PrunedCLIP,
    full_config: Config | None = None,
    *,
    freeze_pruned: bool = False,
    joint: bool = True,
    sides: Sides = "one",
) -> MaskedCLIP:
    """A full-size MaskedCLIP that holds the pruned model in front (first heads, first channels) and zeros behind.

    Log alphas are +10 for present and -10 for absent units. The first clamp moves the latter to -4.6, where a unit is
    still sampled with 4.7 % and counts in the expected size. Zeros on both sides of an absent head or FFN channel make
    its gradients exactly zero, and an absent hidden channel acts through the LayerNorm statistics only: they cannot
    learn to be useful. `freeze_pruned` keeps them out for good instead.

    The sizes are those of `full_config`, by default those that fusing noted in the pruned config.
    """
    masked = MaskedCLIP(_full_config(pruned.config, full_config), joint=joint, sides=sides)
    source = pruned.state_dict()
    for name, own in masked.state_dict().items():
        if "_masks." in name:
            continue
        own.zero_()
        if name in source:
            value = source[name]
            if ".in_proj_" in name:  # q, k and v are padded apart
                own, value = own.unflatten(0, (3, -1)), value.unflatten(0, (3, -1))
            own[tuple(map(slice, value.shape))] = value
    for masks, tower in ((masked.image_masks, "vision_cfg"), (masked.text_masks, "text_cfg")):
        _mark_present(masks, pruned.config[tower], freeze_pruned)
    return masked


def _full_config(pruned: Config, full: Config | None) -> Config:
    origin: Any = full or pruned.get("unpruned")
    if origin is None:
        raise UserError(
            "pruned model: its config does not say what it was pruned from; name it in masks.full_model"
        )
    config = {key: value for key, value in pruned.items() if key not in ("pruned", "unpruned")}
    config.update(vision_cfg=origin["vision_cfg"], text_cfg=origin["text_cfg"])
    for field in ("vision_cfg", "text_cfg"):
        small, big = pruned[field], config[field]
        same = ("head_width", "patch_size", "image_size", "context_length", "vocab_size")
        wrong = [key for key in same if small.get(key) != big.get(key)]
        for key in ("width", "heads", "mlp"):
            sizes = torch.tensor(small[key]), torch.tensor(big[key])
            if sizes[0].shape != sizes[1].shape or bool((sizes[0] > sizes[1]).any()):
                wrong.append(key)
        if wrong:
            raise UserError(
                f"full-size config: {field}.{wrong[0]} is {big.get(wrong[0])}, the pruned model's {small.get(wrong[0])}; "
                "use the model it was pruned from"
            )
    return config


def _mark_present(masks: TowerMasks, pruned: Config, freeze: bool) -> None:
    """Set log alphas to +-10 by presence, and note absence for good where asked."""
    sizes = {"hidden": [pruned["width"]], "heads": pruned["heads"], "intermediate": pruned["mlp"]}
    for family in FAMILIES:
        log_alpha = getattr(masks, family)
        counts = torch.tensor(sizes[family]).view(-1, 1)
        present = (torch.arange(log_alpha.shape[-1]) < counts).view(log_alpha.shape)
        log_alpha.copy_(torch.where(present, INITIAL_LOG_ALPHA, -INITIAL_LOG_ALPHA))
        if freeze:
            getattr(masks, f"{family}_present").copy_(present)
