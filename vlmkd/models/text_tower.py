"""Text towers without the padding behind a text's end: only positions that can reach the feature are computed.

A causal mask, or a Hugging Face tower's of its padding, hides the others. Features stay the same, to rounding.

Letters: N texts, T token positions, L of them needed, w width, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vlmkd.models.pruned_clip import PrunedTextTower


def encode_text(model: Any, tokens: Tensor) -> Tensor:
    """As `model.encode_text`: tokens int64 [N,T] -> [N,D], not normalised.

    Tokens on a CPU are cut by `needed`; on a GPU that would make the host wait.
    """
    if tokens.device.type == "cpu":
        tokens = needed(model, tokens)
    text: Any = getattr(model, "text", model)
    if not _is_causal_open_clip(model, text):
        return model.encode_text(tokens)
    return encode_causal(
        text, tokens, read_at(text, tokens), lambda x, mask: text.transformer(x, attn_mask=mask)
    )


def needed(model: nn.Module, tokens: Tensor) -> Tensor:
    """tokens [N,T] up to the last position that can reach a feature of `model`'s text tower: [N,L].

    They stay whole where padding may count (see `_is_causal_open_clip`), and in Hugging Face towers in training, for their
    dropout's random numbers.
    """
    from open_clip import CustomTextCLIP
    from open_clip.hf_model import HFTextEncoder

    text: Any = getattr(model, "text", model)
    if isinstance(text, PrunedTextTower):
        return up_to(tokens, tokens.argmax(dim=-1))
    if _is_causal_open_clip(model, text):
        return up_to(tokens, read_at(text, tokens))
    if type(model) is CustomTextCLIP and isinstance(text, HFTextEncoder) and not text.training:
        used = (tokens != text.config.pad_token_id).any(dim=0).nonzero()
        return up_to(tokens, used) if len(used) else tokens
    return tokens


def _is_causal_open_clip(model: nn.Module, text: Any) -> bool:
    """Whether `text`, a CLIP or its text transformer, sees backwards only and reads the end token, not one behind it."""
    from open_clip import CLIP, CustomTextCLIP
    from open_clip.transformer import TextTransformer

    return (
        type(model) in (CLIP, CustomTextCLIP)
        and isinstance(text, (CLIP, TextTransformer))
        and pool_type(text) in ("argmax", "eos")
        and text.attn_mask is not None
        and getattr(text, "cls_emb", None) is None
        and not getattr(text, "output_tokens", False)
    )


def pool_type(text: Any) -> str | None:
    """How open_clip names the position that is read."""
    return getattr(text, "text_pool_type", None) or getattr(text, "pool_type", None)


def read_at(text: Any, tokens: Tensor) -> Tensor:
    """Position [N] whose output is a text's feature, in towers that read the end token."""
    if pool_type(text) == "eos":
        eos = text.text_eos_id if hasattr(text, "text_eos_id") else text.eos_id
        return (tokens == eos).int().argmax(dim=-1)
    return tokens.argmax(dim=-1)


def up_to(tokens: Tensor, ends: Tensor) -> Tensor:
    return tokens[:, : int(ends.max()) + 1]


def encode_causal(
    text: Any, tokens: Tensor, ends: Tensor, blocks: Callable[[Tensor, Tensor | None], Tensor]
) -> Tensor:
    """The feature [N,D] at the positions `ends` [N] of tokens [N,T], by the parts of an open_clip text transformer.

    `blocks` takes the embedded tokens [N,T,w] and the attention mask [T,T].
    """
    length, dtype = tokens.shape[1], text.transformer.get_cast_dtype()
    x = text.token_embedding(tokens).to(dtype) + text.positional_embedding[:length].to(dtype)
    x = blocks(x, None if text.attn_mask is None else text.attn_mask[:length, :length])
    x = text.ln_final(x[torch.arange(len(x), device=x.device), ends])
    if isinstance(text.text_projection, nn.Linear):
        return text.text_projection(x)
    return x if text.text_projection is None else x @ text.text_projection
