"""The projector before the decoder runs: features become what it reads as words (docs/papers/llava_mod.md, eq. 11).

Ours, not the paper's. R rows, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmkd.chat_ids import IGNORED

SCALE = 20.0
"""Of the cosines, before the softmax."""


def said(targets: Tensor, size: int) -> Tensor:
    """bool [R, `size`]: the tokens of each row's answers [R, T], but those that more than half of the rows have."""
    found = torch.zeros(len(targets), size, dtype=torch.bool, device=targets.device)
    rows, columns = (targets != IGNORED).nonzero(as_tuple=True)
    found[rows, targets[rows, columns]] = True
    return found & (2 * found.sum(0) <= len(targets))


def words_loss(embeds: Tensor, places: Tensor, words: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """(how far the features are from the words of their row, how far their length is from a word's), means over rows.

    embeds [R, T, D], of which features are at `places`, bool [R, T]; words bool [R, V]; table [V, D]. The softmax is over
    all words of the batch, each with the similarity of the features that are nearest to it. Rows without words or without
    features count as zero.
    """
    counts = words.any(1) & places.any(1)
    rows = len(words)
    embeds, places, words = embeds[counts].float(), places[counts], words[counts]
    listed = words.any(0)
    wanted = words[:, listed].float()
    near = SCALE * F.normalize(embeds, dim=-1) @ F.normalize(table[listed].float(), dim=-1).T
    scores = near.masked_fill(~places.unsqueeze(-1), -torch.inf).logsumexp(1).log_softmax(1)
    named = -(wanted * scores).sum(1) / wanted.sum(1)
    length = embeds.norm(dim=-1) / table.float().norm(dim=1).mean()
    off = ((length - 1) ** 2 * places).sum(1) / places.sum(1)
    return named.sum() / rows, off.sum() / rows
