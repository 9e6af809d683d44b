"""From masks to a dense ragged CLIP, and back into full size for the next stage.

Fusing is exact: the dense model computes what the masked model computed under its deterministic masks, soft factors
and biases included. Factors go into the embeddings and the output projections; LayerNorms and the projection to the
shared embedding are only sliced.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from projects.tinyclip.masked import MaskedCLIP
from projects.tinyclip.masks import FAMILIES, INITIAL_LOG_ALPHA, Mask, Sides, TowerMasks
from vlmkd.errors import UserError
from vlmkd.evaluation.efficiency import count_macs
from vlmkd.models.pruned_clip import Config, PrunedCLIP, State

Multiple = Literal[1, 8, 16, 64]


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
    for prefix, field, name, mask in (
        ("visual.", "vision_cfg", "image", image),
        ("text.", "text_cfg", "text", text),
    ):
        tower = config[field]
        kept = mask.hidden.nonzero().flatten()
        if not len(kept):
            raise UserError(
                f"masks: no hidden channel of the {name} tower is left; lower the target sparsity"
            )
        state.update(_fuse_ends(weights, prefix, kept, mask.hidden[kept], legacy_projection_scale))
        for layer in range(len(tower["heads"])):
            block = f"{prefix}transformer.resblocks.{layer}."
            attention = _fuse_attention(
                weights, block, kept, mask.hidden[kept], mask.heads[layer], tower["head_width"]
            )
            if legacy_projection_scale and not mask.heads[layer].any():
                attention = {name: torch.zeros_like(value) for name, value in attention.items()}
            state.update(attention)
            state.update(_fuse_mlp(weights, block, kept, mask.hidden[kept], mask.intermediate[layer]))
        pruned[field] = {
            **tower,
            "width": len(kept),
            "heads": mask.heads.count_nonzero(dim=-1).tolist(),
            "mlp": mask.intermediate.count_nonzero(dim=-1).tolist(),
        }
    return Fused(pruned, state, config)


def _fuse_ends(weights: State, prefix: str, kept: Tensor, scale: Tensor, legacy: bool) -> State:
    """Embeddings (scaled), LayerNorms and projection (sliced) of one tower."""
    state: State = {}
    if prefix == "visual.":
        state["visual.conv1.weight"] = weights["visual.conv1.weight"][kept] * scale.view(-1, 1, 1, 1)
        state["visual.class_embedding"] = weights["visual.class_embedding"][kept] * scale
        norms, projection = ("visual.ln_pre", "visual.ln_post"), "visual.proj"
    else:
        state["text.token_embedding.weight"] = weights["text.token_embedding.weight"][:, kept] * scale
        norms, projection = ("text.ln_final",), "text.text_projection"
    state[f"{prefix}positional_embedding"] = weights[f"{prefix}positional_embedding"][:, kept] * scale
    for norm in norms:
        state.update(_slice_norm(weights, norm, kept))
    state[projection] = weights[projection][kept] * (scale.view(-1, 1) if legacy else 1)
    return state


def _slice_norm(weights: State, norm: str, kept: Tensor) -> State:
    return {f"{norm}.{leaf}": weights[f"{norm}.{leaf}"][kept] for leaf in ("weight", "bias")}


def _fuse_attention(
    weights: State, block: str, kept: Tensor, scale: Tensor, heads: Tensor, head_width: int
) -> State:
    """One attention; without heads only the output bias stays."""
    state = {f"{block}attn.out_proj.bias": weights[f"{block}attn.out_proj.bias"][kept] * scale}
    alive = heads.nonzero().flatten()
    if not len(alive):
        return state
    in_weight = weights[f"{block}attn.in_proj_weight"].unflatten(0, (3, len(heads), head_width))
    in_bias = weights[f"{block}attn.in_proj_bias"].unflatten(0, (3, len(heads), head_width))
    out_weight = weights[f"{block}attn.out_proj.weight"].unflatten(1, (len(heads), head_width))
    scaled = out_weight[kept][:, alive] * heads[alive].view(1, -1, 1) * scale.view(-1, 1, 1)
    state[f"{block}attn.in_proj_weight"] = in_weight[:, alive][..., kept].flatten(0, 2)
    state[f"{block}attn.in_proj_bias"] = in_bias[:, alive].flatten()
    state[f"{block}attn.out_proj.weight"] = scaled.flatten(1)
    return {**state, **_slice_norm(weights, f"{block}ln_1", kept)}


def _fuse_mlp(weights: State, block: str, kept: Tensor, scale: Tensor, channels: Tensor) -> State:
    """One feed-forward layer; without channels only the output bias stays."""
    state = {f"{block}mlp.c_proj.bias": weights[f"{block}mlp.c_proj.bias"][kept] * scale}
    alive = channels.nonzero().flatten()
    if not len(alive):
        return state
    state[f"{block}mlp.c_fc.weight"] = weights[f"{block}mlp.c_fc.weight"][alive][:, kept]
    state[f"{block}mlp.c_fc.bias"] = weights[f"{block}mlp.c_fc.bias"][alive]
    out_weight = weights[f"{block}mlp.c_proj.weight"][kept][:, alive]
    state[f"{block}mlp.c_proj.weight"] = out_weight * channels[alive] * scale.view(-1, 1)
    return {**state, **_slice_norm(weights, f"{block}ln_2", kept)}


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
