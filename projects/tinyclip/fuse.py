"""From masks to a dense ragged CLIP, and back into full size for the next stage.

Fusing is exact: the dense model computes what the masked model computed under its deterministic masks, soft factors
and biases included. Factors go into the embeddings and the output projections; LayerNorms and the projection to the
shared embedding are only sliced.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from projects.tinyclip.axes import Axis, cut_units, tensor_axes
from projects.tinyclip.masked import MaskedCLIP
from projects.tinyclip.masks import FAMILIES, INITIAL_LOG_ALPHA, Mask, Sides, TowerMasks
from vlmkd.errors import UserError
from vlmkd.evaluation.efficiency import count_macs
from vlmkd.models.pruned_clip import Config, PrunedCLIP, State

Multiple = Literal[1, 8, 16, 64]

_ENTER_THE_STREAM = (
    *("conv1.weight", "class_embedding", "positional_embedding", "token_embedding.weight"),
    *("out_proj.weight", "out_proj.bias", "c_proj.weight", "c_proj.bias"),
)
_PROJECTIONS = ("visual.proj", "text_projection")


@dataclass
class Fused:
    """A dense model: its pruned config, its weights under PrunedCLIP's names, and the full-size config it came from."""

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
        rows = zip(
            ("image", "text"),
            ("vision_cfg", "text_cfg"),
            costs(self.config),
            costs(self.full_config),
            strict=True,
        )
        for name, field, (count, macs), (full_count, _) in rows:
            tower, full = self.config[field], self.full_config[field]
            lines.append(
                f"| {name} | {tower['width']}/{full['width']} | {sum(tower['heads'])}/{sum(full['heads'])} "
                f"| {sum(tower['mlp'])}/{sum(full['mlp'])} | {count:,} | {count / full_count:.1%} | {macs:,} |"
            )
            layers = zip(tower["heads"], full["heads"], tower["mlp"], full["mlp"], strict=True)
            for layer, (heads, all_heads, channels, all_channels) in enumerate(layers):
                lines.append(
                    f"| {name} layer {layer} | | {heads}/{all_heads} | {channels}/{all_channels} | | | |"
                )
        return "\n".join(lines)


def costs(config: Config) -> list[tuple[int, int]]:
    """Parameters and multiply-adds of the image tower, and of the text tower with its token table at full length."""
    with torch.device("meta"):
        model = PrunedCLIP({**config, "pruned": True})
        size = config["vision_cfg"]["image_size"]
        images = torch.empty(1, 3, *([size, size] if isinstance(size, int) else size))
        tokens = torch.zeros(1, config["text_cfg"]["context_length"], dtype=torch.long)
        macs = count_macs(model, images, tokens)
    counts = [
        sum(parameter.numel() for parameter in tower.parameters()) for tower in (model.visual, model.text)
    ]
    return list(zip(counts, macs, strict=True))


def fuse(
    weights: State, config: Config, *, round_to: Multiple = 1, legacy_projection_scale: bool = False
) -> Fused:
    """The dense model of a MaskedCLIP's complete `weights` (masks included) and full-size `config`.

    Args:
        weights: state dict of a MaskedCLIP.
        config: its config.
        round_to: hidden width and FFN channels become multiples of this, each the top k with k rounded to the nearest;
            heads are whole. Exact with respect to the masks rounded in the same way (TowerMasks.deterministic).
        legacy_projection_scale: fuse as the released code does, whose dense model is not the masked one: the rows of
            the output projections are scaled by the hidden mask too, and an attention without heads goes with its
            output bias. Only for replaying it.

    Raises:
        UserError: no hidden channel of a tower is left.
    """
    if round_to not in (1, 8, 16, 64):
        raise UserError(f"round_to is {round_to}; choose 1 (off), 8, 16 or 64")
    masked = MaskedCLIP(config)
    masked.load_state_dict(weights)
    with torch.no_grad():
        image = masked.image_masks.deterministic(round_to, round_to)
        text = masked.text_masks.deterministic(round_to, round_to)
        return fuse_masks(weights, config, image, text, legacy_projection_scale=legacy_projection_scale)


def fuse_masks(
    weights: State, config: Config, image: Mask, text: Mask, *, legacy_projection_scale: bool = False
) -> Fused:
    """Fuse `weights` under the given masks; see `fuse`."""
    pruned: Config = {
        **config,
        "pruned": True,
        "unpruned": {key: config[key] for key in ("vision_cfg", "text_cfg")},
    }
    state = {
        name: weights[name].reshape(()).clone() for name in ("logit_scale", "logit_bias") if name in weights
    }
    for prefix, field, mask in (("visual.", "vision_cfg", image), ("text.", "text_cfg", text)):
        if not mask.hidden.any():
            name = field.replace("_cfg", "").replace("vision", "image")
            raise UserError(
                f"masks: no hidden channel of the {name} tower is left; lower the target sparsity"
            )
        tower = config[field]
        own = {name: value for name, value in weights.items() if name.startswith(prefix)}
        state |= _fuse_tower(own, tower["head_width"], mask, legacy_projection_scale)
        pruned[field] = {
            **tower,
            "width": int(mask.hidden.count_nonzero()),
            "heads": mask.heads.count_nonzero(dim=-1).tolist(),
            "mlp": mask.intermediate.count_nonzero(dim=-1).tolist(),
        }
    return Fused(pruned, state, config)


def _fuse_tower(weights: State, head_width: int, mask: Mask, legacy: bool) -> State:
    """One tower's weights at the units that its mask keeps, scaled where their outputs enter the stream."""
    values = {"hidden": mask.hidden}
    for layer in range(len(mask.heads)):
        values[f"{layer}.heads"], values[f"{layer}.mlp"] = mask.heads[layer], mask.intermediate[layer]
    units = {group: factors.nonzero().flatten() for group, factors in values.items()}
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
                    factors = values[axis.group][units[axis.group]].repeat_interleave(axis.unit)
                    value = value * factors.view(-1, *[1] * (value.ndim - 1 - dim))
        part = re.fullmatch(r".*resblocks\.(\d+)\.(?:(ln_1|attn)|ln_2|mlp)\..+", name)
        empty = part is not None and not len(units[f"{part[1]}.{'heads' if part[2] else 'mlp'}"])
        if value.numel() and not (empty and ".ln_" in name):  # of an empty part the output bias stays
            state[name] = torch.zeros_like(value) if empty and legacy and ".attn." in name else value
    return state


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

    Args:
        full_config: sizes to restore; by default those that fusing noted in the pruned config.

    Raises:
        UserError: no full-size config is known, or it is smaller than the pruned model.
    """
    config = _full_config(pruned.config, full_config)
    masked = MaskedCLIP(config, joint=joint, sides=sides)
    state = masked.state_dict()
    source = pruned.state_dict()
    for name in [name for name in state if not name.startswith(("image_masks.", "text_masks."))]:
        state[name] = (
            _pad(source[name], state[name], name) if name in source else torch.zeros_like(state[name])
        )
    masked.load_state_dict(state)
    for masks, tower in ((masked.image_masks, "vision_cfg"), (masked.text_masks, "text_cfg")):
        _mark_present(masks, pruned.config[tower], freeze_pruned)
    return masked


def _full_config(pruned: Config, full: Config | None) -> Config:
    origin: Any = full or pruned.get("unpruned")
    if origin is None:
        raise UserError(
            "pruned model: its config does not say what it was pruned from; give the full-size model's config"
        )
    config = {key: value for key, value in pruned.items() if key not in ("pruned", "unpruned")}
    config.update(vision_cfg=origin["vision_cfg"], text_cfg=origin["text_cfg"])
    for field in ("vision_cfg", "text_cfg"):
        small, big = pruned[field], config[field]
        fixed = ("head_width", "patch_size", "image_size", "context_length", "vocab_size")
        differing = [key for key in fixed if small.get(key) != big.get(key)]
        if len(small["heads"]) != len(big["heads"]):
            differing.append("number of layers")
        if differing:
            raise UserError(
                f"full-size config: {field} differs from the pruned model's in {differing[0]}; use the model it was pruned from"
            )
        fits = small["width"] <= big["width"] and all(
            s <= b for key in ("heads", "mlp") for s, b in zip(small[key], big[key], strict=True)
        )
        if not fits:
            raise UserError(
                f"full-size config: {field} is smaller than the pruned model; use the model it was pruned from"
            )
    return config


def _pad(value: Tensor, like: Tensor, name: str) -> Tensor:
    """`value` in the front of zeros shaped as `like`; q, k and v are padded apart."""
    if "attn.in_proj_" in name:
        value = value.unflatten(0, (3, -1))
        return _pad_front(value, like.unflatten(0, (3, -1))).flatten(0, 1)
    return _pad_front(value, like)


def _pad_front(value: Tensor, like: Tensor) -> Tensor:
    result = torch.zeros_like(like)
    result[tuple(slice(size) for size in value.shape)] = value.to(like.dtype)
    return result


@torch.no_grad()
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
