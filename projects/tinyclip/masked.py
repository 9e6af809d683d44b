"""The student of the `mask` runs: a full-size CLIP whose two towers run under hard-concrete masks.

The forward pass changes no state and never waits for the device; mask arithmetic and LayerNorm statistics are fp32
whatever the precision of the encoders.

Letters: B batch, T tokens, D width of the tower, L layers, H heads a layer, F FFN channels a layer, E embedding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from projects.tinyclip.masks import (
    LOG_ALPHA_LIMIT,
    Mask,
    Multipliers,
    Sides,
    TowerMasks,
    expected_sparsity,
    lagrangian,
)
from vlmkd.errors import UserError
from vlmkd.models.pruned_clip import (
    Config,
    PrunedAttention,
    PrunedCLIP,
    PrunedImageTower,
    PrunedMLP,
    PrunedTextTower,
    config_from_state_dict,
    embed_patches,
    own_names,
)


class MaskedOutput(NamedTuple):
    """What one forward pass gives: ClipOutput's fields and scalars; parts that were not asked for are None."""

    image_embeds: Tensor | None
    text_embeds: Tensor | None
    logit_scale: Tensor
    logit_bias: Tensor | None
    image_sparsity: Tensor
    text_sparsity: Tensor
    joint_sparsity: Tensor
    """Expected sparsity of both towers together."""
    penalty: Tensor | None
    """Sparsity penalty at the target that was given."""


class MaskedLayerNorm(nn.LayerNorm):
    """LayerNorm over the kept coordinates only; the output is zero elsewhere."""

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:  # type: ignore[override]
        """x [..., D], kept [D] (bool) -> [..., D]; by masked sums, so that the number of kept ones stays on the device."""
        wide = torch.promote_types(x.dtype, torch.float32)
        mask = kept.to(wide)
        count = mask.sum().clamp(min=1)
        values = x.to(wide) * mask
        centred = (values - values.sum(dim=-1, keepdim=True) / count) * mask
        variance = centred.square().sum(dim=-1, keepdim=True) / count
        normal = centred * torch.rsqrt(variance + self.eps)
        return ((normal * self.weight.to(wide) + self.bias.to(wide)) * mask).to(x.dtype)


class MaskedAttention(PrunedAttention):
    """Self-attention whose heads are scaled before the output projection."""

    def forward(self, x: Tensor, causal: bool, heads: Tensor) -> Tensor:  # type: ignore[override]
        """x [B, T, D], heads [H] -> [B, T, D]."""
        scaled = self.attend(x, causal) * heads.to(x.dtype).view(-1, 1, 1)
        return self.out_proj(rearrange(scaled, "b h t d -> b t (h d)"))


class MaskedMLP(PrunedMLP):
    """Feed-forward layer whose channels are scaled after the activation."""

    def forward(self, x: Tensor, channels: Tensor) -> Tensor:  # type: ignore[override]
        """x [B, T, D], channels [F] -> [B, T, D]."""
        return self.c_proj(self.activate(x) * channels.to(x.dtype))


class MaskedBlock(nn.Module):
    """Pre-norm transformer block under a mask; what it adds to the stream is scaled by the hidden mask."""

    def __init__(self, width: int, heads: int, channels: int, head_width: int, quick_gelu: bool) -> None:
        super().__init__()
        self.ln_1 = MaskedLayerNorm(width)
        self.attn = MaskedAttention(width, heads, head_width)
        self.ln_2 = MaskedLayerNorm(width)
        self.mlp = MaskedMLP(width, channels, quick_gelu)

    def forward(self, x: Tensor, causal: bool, hidden: Tensor, heads: Tensor, channels: Tensor) -> Tensor:
        """x [B, T, D], hidden [D], heads [H], channels [F] -> [B, T, D]."""
        kept, scale = hidden != 0, hidden.to(x.dtype)
        x = x + self.attn(self.ln_1(x, kept), causal, heads) * scale
        return x + self.mlp(self.ln_2(x, kept), channels) * scale


class MaskedTransformer(nn.Module):
    """A stack of MaskedBlocks."""

    def __init__(self, tower: Config, quick_gelu: bool) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.resblocks = nn.ModuleList(
            MaskedBlock(tower["width"], heads, channels, tower["head_width"], quick_gelu)
            for heads, channels in zip(tower["heads"], tower["mlp"], strict=True)
        )

    def forward(self, x: Tensor, causal: bool, mask: Mask) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        for layer, block in enumerate(self.resblocks):
            inputs = (x, causal, mask.hidden, mask.heads[layer], mask.intermediate[layer])
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x = block(*inputs)
        return x


class MaskedImageTower(PrunedImageTower):
    """Vision transformer under a mask."""

    def __init__(self, tower: Config, embed_dim: int, quick_gelu: bool) -> None:
        super().__init__({**tower, "heads": [], "mlp": []}, embed_dim, quick_gelu)
        self.ln_pre = MaskedLayerNorm(tower["width"])
        self.transformer = MaskedTransformer(tower, quick_gelu)
        self.ln_post = MaskedLayerNorm(tower["width"])

    def forward(self, images: Tensor, mask: Mask) -> Tensor:  # type: ignore[override]
        """images [B, 3, h, w] -> [B, E], not normalised."""
        kept = mask.hidden != 0
        x = embed_patches(self, images)
        x = self.ln_pre(x * mask.hidden.to(x.dtype), kept)
        return self.ln_post(self.transformer(x, False, mask)[:, 0], kept) @ self.proj


class MaskedTextTower(PrunedTextTower):
    """Causal text transformer under a mask."""

    def __init__(self, tower: Config, embed_dim: int, quick_gelu: bool) -> None:
        super().__init__({**tower, "heads": [], "mlp": []}, embed_dim, quick_gelu)
        self.transformer = MaskedTransformer(tower, quick_gelu)
        self.ln_final = MaskedLayerNorm(tower["width"])

    def forward(self, tokens: Tensor, mask: Mask) -> Tensor:  # type: ignore[override]
        """tokens [B, T] -> [B, E], not normalised."""
        x = self.embed(tokens)
        x = self.transformer(x * mask.hidden.to(x.dtype), True, mask)
        return self.ln_final(self.pool(x, tokens), mask.hidden != 0) @ self.text_projection


class MaskedCLIP(nn.Module):
    """A full-size CLIP with masks on both towers.

    `config` is a pruned one (vlmkd.models.pruned_clip) whose layers are all alike. `joint` drives one sparsity over
    both towers with their mean multipliers (published scripts), so that the split between image and text is learned;
    otherwise each tower is driven to the target by itself.
    """

    def __init__(self, config: Config, *, joint: bool = True, sides: Sides = "one") -> None:
        super().__init__()
        self.config, self.joint, self.sides = config, joint, sides
        image, text = config["vision_cfg"], config["text_cfg"]
        quick_gelu = config["activation"] == "quick_gelu"
        self.visual = MaskedImageTower(image, config["embed_dim"], quick_gelu)
        self.text = MaskedTextTower(text, config["embed_dim"], quick_gelu)
        self.image_masks = _tower_masks(image, "image", sides)
        self.text_masks = _tower_masks(text, "text", sides)
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.logit_bias = nn.Parameter(torch.zeros(())) if config.get("logit_bias") else None

    @classmethod
    def from_clip(cls, model: nn.Module, *, joint: bool = True, sides: Sides = "one") -> MaskedCLIP:
        """A masked copy of a CLIP that `config_from_clip` takes."""
        masked = cls(config_from_clip(model), joint=joint, sides=sides)
        own_masks = {name: value for name, value in masked.state_dict().items() if "_masks." in name}
        state = {name: value for name, value in own_names(model.state_dict()).items() if name != "attn_mask"}
        masked.load_state_dict(own_masks | state)
        return masked

    def forward(
        self,
        images: Tensor | None = None,
        tokens: Tensor | None = None,
        seed: int | None = None,
        target: float | None = None,
    ) -> MaskedOutput:
        """images [B, 3, h, w], tokens [B, T] -> embeddings, sparsities and, with a `target` sparsity, the penalty.

        In training the masks are a pure function of `seed`, so a caller that derives it from (run seed, rank,
        micro-step) resumes exactly. Evaluation uses the deterministic masks.
        """
        assert (seed is not None) == self.training, "a training forward pass needs a seed, an evaluation none"
        # Two streams from one seed, so that a tower's masks do not depend on whether the other one runs.
        seeds = (None, None) if seed is None else (2 * seed % 2**63, (2 * seed + 1) % 2**63)
        image_mask, image_size, image_multipliers = self.image_masks(seeds[0])
        text_mask, text_size, text_multipliers = self.text_masks(seeds[1])
        sizes = ((image_size, self.image_masks.full_size()), (text_size, self.text_masks.full_size()))
        image, text = (expected_sparsity(part) for part in sizes)
        joint = expected_sparsity(*sizes)
        penalty = None
        if target is not None and self.joint:
            pairs = zip(image_multipliers, text_multipliers, strict=True)
            penalty = lagrangian(joint, target, Multipliers(*((a + b) / 2 for a, b in pairs)), self.sides)
        elif target is not None:
            penalty = lagrangian(image, target, image_multipliers, self.sides)
            penalty = penalty + lagrangian(text, target, text_multipliers, self.sides)
        return MaskedOutput(
            None if images is None else F.normalize(self.visual(images, image_mask).float(), dim=-1),
            None if tokens is None else F.normalize(self.text(tokens, text_mask).float(), dim=-1),
            self.logit_scale.float().exp().reshape(()),
            None if self.logit_bias is None else self.logit_bias.float().reshape(()),
            image,
            text,
            joint,
            penalty,
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks of both towers in the backward pass, under the same masks."""
        self.visual.transformer.grad_checkpointing = enable
        self.text.transformer.grad_checkpointing = enable

    def param_groups(
        self, groups: list[dict[str, Any]], mask_lr: float = 0.02, multiplier_lr: float = 0.02
    ) -> list[dict[str, Any]]:
        """`groups` without masks and multipliers, then these with constant rates, no decay and AdamW's own betas.

        Multipliers ascend although their rate is positive: their gradient is reversed in the forward pass.
        """
        towers = (self.image_masks, self.text_masks)
        masks = [parameter for tower in towers for parameter in tower.log_alphas()]
        multipliers = [parameter for tower in towers for parameter in (tower.linear, tower.quadratic)]
        apart = {id(parameter) for parameter in masks + multipliers}
        others = [{**group, "params": [p for p in group["params"] if id(p) not in apart]} for group in groups]
        constant = {"weight_decay": 0.0, "betas": (0.9, 0.999), "eps": 1e-8, "schedule": False}
        return [
            *(group for group in others if group["params"]),
            {"name": "masks", "params": masks, "lr": mask_lr, **constant},
            {"name": "multipliers", "params": multipliers, "lr": multiplier_lr, **constant},
        ]

    def bounds(self) -> list[tuple[nn.Parameter, float, float]]:
        """The log alphas' part of `Task.bounds`."""
        alphas = [*self.image_masks.log_alphas(), *self.text_masks.log_alphas()]
        return [(alpha, -LOG_ALPHA_LIMIT, LOG_ALPHA_LIMIT) for alpha in alphas]


def _tower_masks(tower: Config, name: str, sides: Sides) -> TowerMasks:
    if any(len({*sizes}) != 1 or not sizes[0] for sizes in (tower["heads"], tower["mlp"])):
        raise UserError(
            f"model: the layers of the {name} tower differ in heads or FFN channels, so it was pruned before; "
            "enter it through fuse.reenter with the full-size config"
        )
    return TowerMasks(tower["width"], len(tower["heads"]), tower["heads"][0], tower["mlp"][0], sides)


def config_from_clip(model: nn.Module) -> Config:
    """The pruned config of an unpruned open_clip.CLIP (ViT and causal text transformer), or of a PrunedCLIP."""
    if isinstance(model, PrunedCLIP):
        return model.config
    visual: Any = getattr(model, "visual", None)
    stacks: list[Any] = [
        getattr(getattr(part, "transformer", None), "resblocks", ()) for part in (visual, model)
    ]
    if not all(stacks) or not hasattr(visual, "class_embedding"):
        raise UserError(
            "model: pruning needs an open_clip CLIP with a ViT image tower and its own text transformer"
        )
    first, blocks = stacks[0][0], [block for stack in stacks for block in stack]
    quick_gelu = type(first.mlp.gelu).__name__ == "QuickGELU"
    refusals = {
        "attentional pooling": visual.attn_pool is not None,
        "pooling other than the class token": visual.pool_type != "tok" or visual.final_ln_after_pool,
        "no ln_pre": not isinstance(visual.ln_pre, nn.LayerNorm),
        "text pooling other than argmax": model.text_pool_type != "argmax",
        "a text tower without causal mask": model.attn_mask is None,
        "a text projection that is no plain matrix": not isinstance(model.text_projection, Tensor),
        "LayerScale or custom blocks": any(
            type(block).__name__ != "ResidualAttentionBlock" or not isinstance(block.ls_1, nn.Identity)
            for block in blocks
        ),
        "an activation other than GELU and QuickGELU": not quick_gelu
        and getattr(first.mlp.gelu, "approximate", "") != "none",
        "LayerNorms with an epsilon other than 1e-5": any(
            isinstance(part, nn.LayerNorm) and part.eps != 1e-5 for part in model.modules()
        ),
    }
    found = [what for what, present in refusals.items() if present]
    if found:
        raise UserError(f"model: pruning does not support {found[0]}; choose a plain ViT CLIP")
    return config_from_state_dict(
        model.state_dict(),
        head_width=first.attn.head_dim,
        text_head_width=stacks[1][0].attn.head_dim,
        activation="quick_gelu" if quick_gelu else "gelu",
    )
