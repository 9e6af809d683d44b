"""Deep visual prompts in the image tower of an open_clip CLIP, run through open_clip's own blocks.

Letters: B images, J prompted blocks (the depth), n prompts a block, w width of the tower, D embedding width.

Prompts of block 0 enter with the input; before each of the blocks 1 to J - 1 the prompt positions are overwritten by
that block's own vectors; from block J on they flow. The tower itself is frozen and is not changed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlmkd.errors import UserError

INIT_STD = 0.02
"""Standard deviation of new prompts, CoOp's and MaPLe's."""


class PromptedImageTower(nn.Module):
    """An open_clip VisionTransformer with prompts behind its patches."""

    def __init__(
        self, tower: nn.Module, depth: int, length: int, *, generator: torch.Generator | None = None
    ) -> None:
        """`generator` draws the prompts, N(0, 0.02^2).

        Raises:
            UserError: a tower of another kind, or deeper prompts than it has blocks.
        """
        super().__init__()
        self.tower: Any = _plain_image_tower(tower)
        check_depth("image", depth, length, len(self.tower.transformer.resblocks), lowest=0)
        self.depth, self.length = depth, length
        self.activation_checkpointing = False
        self.prompts: nn.Parameter | None = None
        if depth:
            width = self.tower.class_embedding.shape[0]
            self.prompts = nn.Parameter(torch.randn(depth, length, width, generator=generator) * INIT_STD)

    def train(self, mode: bool = True) -> PromptedImageTower:
        """Stay in eval mode: what is trained here has none, and the frozen tower must not drop patches."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """images [B,3,H,W] in the tower's statistics -> [B,D], not normalised."""
        tower = self.tower
        patches = tower.conv1(images.to(tower.conv1.weight.dtype)).flatten(2).transpose(1, 2)
        first = tower.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
        x = torch.cat([first, patches], dim=1) + tower.positional_embedding.to(patches.dtype)
        tokens = x.shape[1]

        def prompted(x: Tensor, block: int) -> Tensor:
            if self.prompts is None or block >= self.depth:
                return x
            own = self.prompts[block].to(x.dtype).expand(x.shape[0], -1, -1)
            return torch.cat([x[:, :tokens], own], dim=1)

        x = tower.ln_pre(prompted(x, 0))  # only the prompts of block 0 pass this norm
        for number, block in enumerate(tower.transformer.resblocks):
            x = _run_block(block, prompted(x, number) if number else x, None, self.activation_checkpointing)
        return tower.ln_post(x[:, 0]) @ tower.proj.to(x.dtype)


def check_depth(tower: str, depth: int, length: int, blocks: int, lowest: int) -> None:
    """Refuse prompts of more blocks than the tower (`image` or `text`) has, or of none.

    Raises:
        UserError: names the config field.
    """
    if not lowest <= depth <= blocks:
        raise UserError(
            f"config field prompts.{tower}_depth is {depth}; this tower has {blocks} blocks, so {lowest} to {blocks}"
        )
    if depth and length < 1:
        raise UserError(
            f"config field prompts.{tower}_length is {length}; it must be at least 1 at depth {depth}"
        )


def _run_block(block: nn.Module, x: Tensor, mask: Tensor | None, again: bool) -> Tensor:
    """One transformer block; `again`: its activations are computed a second time in the backward pass."""
    if again and torch.is_grad_enabled() and x.requires_grad:
        result: Tensor = checkpoint(block, x, attn_mask=mask, use_reentrant=False)
        return result
    return block(x, attn_mask=mask)


def _plain_image_tower(tower: Any) -> Any:
    """`tower`, frozen, if it is a ViT that reads its class token; a mean over patches would include the prompts."""
    from open_clip.transformer import VisionTransformer

    if not isinstance(tower, VisionTransformer):
        raise UserError(
            f"prompts need open_clip's ViT image tower, not {type(tower).__name__}; choose a ViT CLIP such as ViT-B-16"
        )
    if tower.attn_pool is not None or tower.pool_type != "tok":
        raise UserError(
            f"prompts need an image tower that reads its class token, not pool_type {tower.pool_type}"
        )
    return tower.eval().requires_grad_(False)
