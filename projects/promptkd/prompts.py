"""Deep prompts in both towers of an open_clip CLIP, through its own blocks (docs/papers/promptkd.md, eq. 1 and 2).

The image tower is in vlmkd/models/prompted.py. Letters: B images, C classes, T token positions, J prompted blocks (the
depth), n prompts a block, w width of a tower, D embedding width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlmkd.class_names import fill, prompt_name
from vlmkd.errors import UserError
from vlmkd.image_spec import ImageSpec
from vlmkd.models.checkpoints import differences
from vlmkd.models.clip import ClipModel
from vlmkd.models.prompted import INIT_STD, PromptedImageTower, check_depth
from vlmkd.models.text_tower import encode_causal, pool_type, read_at, up_to
from vlmkd.train.task import frozen


@dataclass(frozen=True, kw_only=True)
class PromptShape:
    """Depth and number of the prompts; depth 0 leaves the image tower as it is."""

    image_depth: int
    image_length: int
    text_depth: int
    text_length: int


class PromptedTextTower(nn.Module):
    """The text transformer of an open_clip CLIP with prompts in place of the first words.

    Positions `start` to `start + n - 1` hold prompts, all others the frozen embeddings of the given tokens. The mask
    stays, and the feature is read where the model itself reads it.
    """

    attn_mask: Tensor | None

    def __init__(
        self, clip: ClipModel, depth: int, length: int, init: str, generator: torch.Generator
    ) -> None:
        """Prompts of block 0 are the embeddings of the first words of `init`, deeper ones N(0, 0.02^2).

        A text of fewer words than prompts gives random ones at block 0 too, as in the reference.
        """
        super().__init__()
        text: Any = getattr(clip.module, "text", clip.module)
        if pool_type(text) not in ("argmax", "eos") or getattr(text, "cls_emb", None) is not None:
            raise UserError(
                f"prompts need a text transformer that reads its end token; {clip.source} has pool_type {pool_type(text)}"
            )
        if not isinstance(text.text_projection, Tensor) or getattr(text, "use_pad_mask", False):
            raise UserError(
                f"prompts need CLIP's own text transformer: {clip.source} has another projection or a padding mask"
            )
        self.transformer: Any = frozen(text.transformer)
        self.token_embedding: Any = frozen(text.token_embedding)
        self.ln_final = frozen(text.ln_final)
        self.positional_embedding: Any = text.positional_embedding.requires_grad_(False)
        self.text_projection = text.text_projection.requires_grad_(False)
        self.register_buffer("attn_mask", text.attn_mask, persistent=False)
        self.pool_type = pool_type(text)
        self.eos_id = text.text_eos_id if hasattr(text, "text_eos_id") else text.eos_id
        self.start = _differ_at(clip.tokenizer, ["a", "the"])  # behind a start token, where there is one
        check_depth("text", depth, length, len(text.transformer.resblocks), lowest=1)
        context = len(text.positional_embedding)
        if self.start + length + 1 >= context:
            raise UserError(
                f"prompts.text_length is {length}, but {clip.source} reads {context} tokens; use fewer prompts"
            )
        self.depth, self.length = depth, length
        self.classes_per_chunk = 0
        table = text.token_embedding.weight.detach()
        drawn = torch.randn(depth, length, table.shape[1], generator=generator) * INIT_STD
        tokens = clip.tokenizer([init])
        if read_at(self, tokens).item() >= self.start + length:
            drawn[0] = table[tokens[0, self.start : self.start + length]]
        self.prompts = nn.Parameter(drawn)

    def train(self, mode: bool = True) -> PromptedTextTower:
        return super().train(False)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens int64 [C,T] of whole prompts -> [C,D], not normalised.

        In chunks of `classes_per_chunk` classes (0: all at once), which are computed again in the backward pass, so that
        memory does not grow with C.
        """
        ends = read_at(self, tokens)
        if bool((ends < self.start + self.length).any()):
            raise UserError(
                f"a class prompt ends before its {self.length} prompts; use a longer one or fewer prompts"
            )
        if self.attn_mask is not None:
            tokens = up_to(tokens, ends)
        size = self.classes_per_chunk or len(tokens)
        again = size < len(tokens) and torch.is_grad_enabled() and self.prompts.requires_grad
        parts = zip(tokens.split(size), ends.split(size), strict=True)
        # The prompts are an argument, so that the backward pass computes with what this call saw.
        encode = partial(checkpoint, self._encode, use_reentrant=False) if again else self._encode
        return torch.cat([encode(self.prompts, *part) for part in parts])

    def _encode(self, prompts: Tensor, tokens: Tensor, ends: Tensor) -> Tensor:
        first, last = self.start, self.start + self.length

        def blocks(x: Tensor, mask: Tensor | None) -> Tensor:
            for number, block in enumerate(self.transformer.resblocks):
                if number < self.depth:
                    own = prompts[number].to(x.dtype)
                    if number == 0:
                        own = own + self.positional_embedding[first:last].to(x.dtype)
                    x = torch.cat([x[:, :first], own.expand(len(x), -1, -1), x[:, last:]], dim=1)
                x = block(x, attn_mask=mask)
            return x

        return encode_causal(self, tokens, ends, blocks)


class PromptedCLIP(nn.Module):
    """A frozen CLIP with prompts in both towers: PromptSRC's teacher."""

    logit_scale: Tensor

    def __init__(self, clip: ClipModel, shape: PromptShape, *, init: str = "", seed: int = 0) -> None:
        """New prompts: those of the text start from the words of `init`, all others are drawn from `seed`."""
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        model: Any = clip.module
        self.image = PromptedImageTower(
            model.visual, shape.image_depth, shape.image_length, generator=generator
        )
        self.text = PromptedTextTower(clip, shape.text_depth, shape.text_length, init, generator)
        # The logarithm, frozen.
        self.register_buffer("logit_scale", model.logit_scale.detach().float().reshape(1).clone())
        self.shape = shape

    @property
    def scale(self) -> Tensor:
        return self.logit_scale.float().exp()

    def prompts(self) -> dict[str, nn.Parameter]:
        """The trained parameters: `image` [J,n,w] (absent at depth 0) and `text` [J,n,w]."""
        both = {"image": self.image.prompts, "text": self.text.prompts}
        return {name: value for name, value in both.items() if value is not None}

    @torch.no_grad()
    def set_prompts(self, prompts: dict[str, Tensor], origin: str) -> None:
        """Take stored prompts; raises UserError when they are others than `prompts()`, in a line that names `origin`."""
        own = self.prompts()
        if problems := differences(own, prompts):
            raise UserError(f"prompts {origin} do not fit this CLIP with this depth and length: {problems}")
        for name, value in prompts.items():
            own[name].copy_(value)


class PromptedEncoder:
    """A PromptedCLIP as the DualEncoder that class vectors, stored embeddings and evaluators ask for."""

    def __init__(self, prompted: PromptedCLIP, clip: ClipModel, name: str) -> None:
        self.name = name
        self.image_spec: ImageSpec = clip.image_spec
        self.logit_scale = float(prompted.logit_scale.double().exp())
        self._prompted, self._tokenizer = prompted, clip.tokenizer

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        return self._units(self._prompted.image, images)

    @torch.no_grad()
    def encode_text(self, texts: list[str]) -> Tensor:
        """N prompts, whose first words the learned vectors replace -> unit vectors [N,D], fp32."""
        return self._units(self._prompted.text, self._tokenizer(texts))

    def _units(self, tower: nn.Module, inputs: Tensor) -> Tensor:
        return F.normalize(tower(inputs.to(self._prompted.logit_scale.device)).float(), dim=-1)


def with_room(tokenizer: Callable[[list[str]], Tensor], template: str, length: int) -> str:
    """`template` if at least `length` tokens stand before its class name, else that many `X` before the name.

    Without that room, learned vectors would replace the class name.
    """
    before_name = _differ_at(tokenizer, [fill(template, "a"), fill(template, "the")])
    if before_name - _differ_at(tokenizer, ["a", "the"]) >= length:
        return template
    name = re.search(r"\{c?\}", template)
    assert name is not None
    return "X " * length + template[name.start() :]


def class_tokens(
    tokenizer: Callable[[list[str]], Tensor], class_names: Sequence[str], template: str
) -> Tensor:
    """Token ids [C,T] of the template with each class name."""
    return tokenizer([fill(template, prompt_name(name)) for name in class_names])


def _differ_at(tokenizer: Callable[[list[str]], Tensor], texts: list[str]) -> int:
    one, other = tokenizer(texts)
    return int((one != other).int().argmax())
