"""Deep visual prompts in the image tower of an open_clip CLIP, run through open_clip's own blocks.

Before each of the blocks 0 to J - 1 the prompt positions get that block's own vectors; from block J on they flow.

Letters: B images, J prompted blocks (the depth), n prompts a block, w width of the tower, D embedding width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlmkd.config import require
from vlmkd.errors import UserError
from vlmkd.models.pruned_clip import embed_patches

INIT_STD = 0.02
"""CoOp's and MaPLe's, of new prompts."""


class PromptedImageTower(nn.Module):
    """A frozen VisionTransformer with prompts behind its patches."""

    def __init__(
        self, tower: Any, depth: int, length: int, *, generator: torch.Generator | None = None
    ) -> None:
        from open_clip.transformer import VisionTransformer

        super().__init__()
        if not isinstance(tower, VisionTransformer):
            raise UserError(f"prompts need open_clip's ViT, such as ViT-B-16, not {type(tower).__name__}")
        # A mean over patches would include the prompts.
        if tower.attn_pool is not None or tower.pool_type != "tok":
            raise UserError(
                f"prompts need a tower that reads its class token, not pool_type={tower.pool_type}"
            )
        self.tower: Any = tower.eval().requires_grad_(False)
        check_depth("image", depth, length, len(self.tower.transformer.resblocks), lowest=0)
        self.depth, self.length = depth, length
        self.activation_checkpointing = False
        self.prompts: nn.Parameter | None = None
        if depth:
            shape = depth, length, len(self.tower.class_embedding)
            self.prompts = nn.Parameter(torch.randn(shape, generator=generator) * INIT_STD)

    def train(self, mode: bool = True) -> PromptedImageTower:
        """Stay in eval mode: the frozen tower must not drop patches."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """images [B,3,H,W] in the tower's statistics -> [B,D], not normalised."""
        tower = self.tower
        x = embed_patches(tower, images)
        tokens = x.shape[1]

        def prompted(x: Tensor, block: int) -> Tensor:
            if self.prompts is None or block >= self.depth:
                return x
            own = self.prompts[block].to(x.dtype).expand(x.shape[0], -1, -1)
            return torch.cat([x[:, :tokens], own], dim=1)

        x = tower.ln_pre(prompted(x, 0))  # only the prompts of block 0 pass this norm
        for number, block in enumerate(tower.transformer.resblocks):
            x = prompted(x, number) if number else x
            if self.activation_checkpointing and torch.is_grad_enabled() and x.requires_grad:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return tower.ln_post(x[:, 0]) @ tower.proj.to(x.dtype)


def check_depth(tower: str, depth: int, length: int, blocks: int, lowest: int) -> None:
    """Refuse prompts of more blocks than the tower (`image` or `text`) has, or of none."""
    told = f"is {depth}; this tower has {blocks} blocks, so {lowest} to {blocks}"
    require(lowest <= depth <= blocks, f"prompts.{tower}_depth", told)
    told = f"is {length}; it must be at least 1 at depth {depth}"
    require(not depth or length > 0, f"prompts.{tower}_length", told)
