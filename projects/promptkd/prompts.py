"""Deep prompts in both towers of an open_clip CLIP (spec b.1), run through open_clip's own blocks.

Letters: B images, C classes, T token positions, J prompted blocks (the depth), n prompts a block, w width of a tower,
D embedding width. The image tower, and what all prompts have in common, is in vlmkd/models/prompted.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlmkd.errors import UserError
from vlmkd.evaluation.prompts import fill
from vlmkd.image_spec import ImageSpec
from vlmkd.models.clip import ClipModel
from vlmkd.models.prompted import INIT_STD, PromptedImageTower, check_depth
from vlmkd.task import frozen


@dataclass(frozen=True, kw_only=True)
class PromptShape:
    """Depth and number of the prompts of both towers; a depth of 0 leaves the image tower unprompted."""

    image_depth: int
    image_length: int
    text_depth: int
    text_length: int


class PromptedTextTower(nn.Module):
    """The text transformer of an open_clip CLIP with prompts in place of the first words.

    Positions `start` to `start + n - 1` hold prompts; everything before and behind is the frozen embedding of the given
    tokens. The mask stays, and the feature is read where the model itself reads it.
    """

    attn_mask: Tensor | None

    def __init__(self, clip: ClipModel, depth: int, length: int) -> None:
        """New prompts are zeros; see `start_from`.

        Raises:
            UserError: a text tower of another kind, prompts that do not fit its context or depth.
        """
        super().__init__()
        text: Any = getattr(clip.module, "text", clip.module)
        _check_text_tower(text, clip.source)
        self.transformer: Any = frozen(text.transformer)
        self.token_embedding: Any = frozen(text.token_embedding)
        self.ln_final = frozen(text.ln_final)
        self.positional_embedding: Any = text.positional_embedding.requires_grad_(False)
        self.text_projection = text.text_projection.requires_grad_(False)
        self.register_buffer("attn_mask", text.attn_mask, persistent=False)
        self._pool_type = getattr(text, "text_pool_type", None) or text.pool_type
        self._eos_id = text.text_eos_id if hasattr(text, "text_eos_id") else text.eos_id
        self.start = _first_word_position(clip.tokenizer)
        check_depth("text", depth, length, len(text.transformer.resblocks), lowest=1)
        context = len(text.positional_embedding)
        if self.start + length + 1 >= context:
            raise UserError(
                f"prompts.text_length is {length}, but {clip.source} reads {context} tokens; use fewer prompts"
            )
        self.depth, self.length = depth, length
        self.classes_per_chunk = 0
        self.prompts = nn.Parameter(torch.zeros(depth, length, text.token_embedding.weight.shape[1]))

    def train(self, mode: bool = True) -> PromptedTextTower:
        """Stay in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def start_from(self, tokens: Tensor, generator: torch.Generator) -> None:
        """Prompts of block 0 from the embeddings of a text's first words, tokens int64 [T]; deeper ones N(0, 0.02^2).

        A text of fewer words than prompts gives random ones at block 0 too, as in the reference.
        """
        shape = self.prompts.shape
        self.prompts.copy_(torch.randn(shape, generator=generator) * INIT_STD)
        if self._read_at(tokens[None]).item() >= self.start + self.length:
            words = self.token_embedding.weight[tokens[self.start : self.start + self.length]]
            self.prompts[0] = words.to(self.prompts.dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens int64 [C,T] of whole prompts -> [C,D], not normalised.

        In chunks of `classes_per_chunk` classes (0: all at once); under autograd a chunk keeps nothing and is computed
        again in the backward pass, so memory does not grow with C.
        """
        ends = self._read_at(tokens)
        if bool((ends < self.start + self.length).any()):
            raise UserError(
                f"a class prompt ends before its {self.length} prompts; use a longer prompt or fewer of them"
            )
        if self.attn_mask is not None:  # causal: nothing behind the position that is read can reach it
            tokens = tokens[:, : int(ends.max()) + 1]
        size = self.classes_per_chunk or len(tokens)
        if size >= len(tokens) or not (torch.is_grad_enabled() and self.prompts.requires_grad):
            return torch.cat(
                [self._encode(*part) for part in zip(tokens.split(size), ends.split(size), strict=True)]
            )
        parts = zip(tokens.split(size), ends.split(size), strict=True)
        return torch.cat([checkpoint(self._encode, *part, use_reentrant=False) for part in parts])

    def _encode(self, tokens: Tensor, ends: Tensor) -> Tensor:
        x = self.token_embedding(tokens)
        first, last = self.start, self.start + self.length

        def prompted(x: Tensor, block: int) -> Tensor:
            own = self.prompts[block].to(x.dtype).expand(len(x), -1, -1)
            return torch.cat([x[:, :first], own, x[:, last:]], dim=1)

        length = tokens.shape[1]
        x = prompted(x, 0) + self.positional_embedding[:length].to(x.dtype)
        mask = None if self.attn_mask is None else self.attn_mask[:length, :length]
        for number, block in enumerate(self.transformer.resblocks):
            x = block(prompted(x, number) if 0 < number < self.depth else x, attn_mask=mask)
        x = self.ln_final(x[torch.arange(len(x), device=x.device), ends])
        return x @ self.text_projection.to(x.dtype)

    def _read_at(self, tokens: Tensor) -> Tensor:
        """Position [C] whose output is the text's feature."""
        if self._pool_type == "eos":
            return (tokens == self._eos_id).int().argmax(dim=-1)
        return tokens.argmax(dim=-1)


class PromptedCLIP(nn.Module):
    """A frozen CLIP with prompts in both towers: PromptSRC's teacher."""

    logit_scale: Tensor

    def __init__(self, clip: ClipModel, shape: PromptShape, *, init: str = "", seed: int = 0) -> None:
        """New prompts: those of the text start from the words of `init`, all others are drawn from `seed`.

        Raises:
            UserError: a CLIP that these prompts do not fit.
        """
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.image = PromptedImageTower(
            clip.module.visual,  # type: ignore[arg-type]
            shape.image_depth,
            shape.image_length,
            generator=generator,
        )
        self.text = PromptedTextTower(clip, shape.text_depth, shape.text_length)
        self.text.start_from(clip.tokenizer([init])[0], generator)
        scale: Any = clip.module.logit_scale
        self.register_buffer(
            "logit_scale", scale.detach().float().reshape(1).clone()
        )  # the logarithm, frozen
        self.shape = shape

    @property
    def scale(self) -> Tensor:
        """Factor [1] of the cosines, fp32."""
        return self.logit_scale.float().exp()

    def prompts(self) -> dict[str, nn.Parameter]:
        """The trained parameters: `image` [J,n,w] (absent at depth 0) and `text` [J,n,w]."""
        image = {} if self.image.prompts is None else {"image": self.image.prompts}
        return image | {"text": self.text.prompts}

    @torch.no_grad()
    def set_prompts(self, prompts: dict[str, Tensor], origin: str) -> None:
        """Take stored prompts; `origin` names their file in errors.

        Raises:
            UserError: missing, left over, or of other shapes.
        """
        own = self.prompts()
        given = {name: list(value.shape) for name, value in prompts.items()}
        wanted = {name: list(value.shape) for name, value in own.items()}
        if given != wanted:
            raise UserError(
                f"prompts {origin}: they are {given}, but this CLIP with this depth and length needs {wanted}"
            )
        for name, value in prompts.items():
            own[name].copy_(value)


class PromptedEncoder:
    """A PromptedCLIP as the DualEncoder that class vectors, stored embeddings and evaluators ask for."""

    def __init__(self, prompted: PromptedCLIP, clip: ClipModel, name: str) -> None:
        self.name = name
        self.image_spec: ImageSpec = clip.image_spec
        self._prompted, self._tokenizer = prompted, clip.tokenizer

    @property
    def logit_scale(self) -> float:
        """The frozen factor of the cosines."""
        return float(self._prompted.logit_scale.double().exp())

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """[B,3,H,W] -> unit vectors [B,D], fp32."""
        return F.normalize(self._prompted.image(images.to(self._prompted.logit_scale.device)).float(), dim=-1)

    @torch.no_grad()
    def encode_text(self, texts: list[str]) -> Tensor:
        """N prompts, whose first words the learned vectors replace -> unit vectors [N,D], fp32."""
        tokens = self._tokenizer(texts).to(self._prompted.logit_scale.device)
        return F.normalize(self._prompted.text(tokens).float(), dim=-1)


def class_tokens(
    tokenizer: Callable[[list[str]], Tensor], class_names: Sequence[str], template: str
) -> Tensor:
    """Token ids [C,T] of the template with each class name, underscores read as spaces."""
    return tokenizer([fill(template, name.replace("_", " ")) for name in class_names])


def _check_text_tower(text: Any, source: str) -> None:
    pool = getattr(text, "text_pool_type", None) or getattr(text, "pool_type", None)
    if pool not in ("argmax", "eos") or getattr(text, "cls_emb", None) is not None:
        raise UserError(
            f"prompts need a text transformer that reads its end token; {source} has pool_type {pool}"
        )
    if not isinstance(text.text_projection, Tensor) or getattr(text, "use_pad_mask", False):
        raise UserError(
            f"prompts need CLIP's own text transformer: {source} has another projection or a padding mask"
        )


def _first_word_position(tokenizer: Callable[[list[str]], Tensor]) -> int:
    """How many tokens precede the first word: 1 with a start token, else 0."""
    one, other = tokenizer(["a"])[0], tokenizer(["the"])[0]
    return int((one != other).int().argmax())
