"""Tip-Adapter-F: a zero-shot CLIP with a fine-tuned cache of few-shot images, DHO's few-shot teacher.

q = scale f W^T + alpha exp(-beta (1 - f K^T)) V (Zhang et al., ECCV 2022; docs/papers/dho.md, eq. 11) on stored image
embeddings f: neither tower of the CLIP is trained.

Letters: N cached images, C classes, D embedding width, B rows, V views.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from projects.dho.legacy import number_of, read_plain_pickle
from vlmkd.errors import UserError
from vlmkd.files import new_file

SCALE = 100.0
"""Factor of the cosines, for which the file has no place."""
_ELEMENTS = 1 << 25  # logits held at once by the search
_MATRICES = ("adapter_weight", "cache_keys", "cache_values", "clip_weights")
_FIELDS = (*_MATRICES, "best_alpha", "best_beta")


class TipAdapter(nn.Module):
    """Class logits of unit image embeddings from class vectors and a cache; only the keys are trained."""

    values: Tensor
    class_vectors: Tensor

    def __init__(
        self, keys: Tensor, values: Tensor, class_vectors: Tensor, *, alpha: float, beta: float = 1.0
    ) -> None:
        """keys [N, D], values [N, C] (one-hot labels), class_vectors [C, D]; copied as fp32."""
        super().__init__()
        own = [tensor.detach().float().clone().contiguous() for tensor in (keys, values, class_vectors)]
        self.keys = nn.Parameter(own[0])
        self.register_buffer("values", own[1])
        self.register_buffer("class_vectors", own[2])
        self.alpha, self.beta, self.scale = alpha, beta, SCALE

    def forward(self, embeds: Tensor) -> Tensor:
        """Unit vectors [B, D] -> logits [B, C]."""
        return self.zero_shot(embeds) + self.alpha * self.cache_logits(embeds, self.beta)

    def zero_shot(self, embeds: Tensor) -> Tensor:
        return self.scale * embeds @ self.class_vectors.T

    def cache_logits(self, embeds: Tensor, beta: float) -> Tensor:
        """The part of the cache, without alpha: exp(-beta (1 - f K^T)) V, [B, C]."""
        return (-beta * (1 - embeds @ self.keys.T)).exp() @ self.values


def cache_keys(features: Tensor) -> Tensor:
    """Unit keys [N, D]: the mean of features [V, N, D] over the views, then normalised."""
    return F.normalize(features.float().mean(0), dim=-1)


def fit(
    adapter: TipAdapter,
    views: Tensor,
    labels: Tensor,
    validation: tuple[Tensor, Tensor],
    *,
    epochs: int,
    lr: float = 1e-3,
    batch_size: int = 256,
    seed: int = 1,
    progress: Callable[[str], None] = lambda line: None,
) -> tuple[int, float]:
    """Train the keys by cross entropy and leave those of the best validation epoch, the first of equals: (epoch, accuracy).

    AdamW, cosine to zero over all steps. Epoch e sees view e modulo V of the unit embeddings [V, N, D] with labels [N], in
    an order drawn from `seed`. `validation` are unit embeddings [M, D] of clean images and their labels [M].
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([adapter.keys], lr=lr, eps=1e-4, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, epochs * math.ceil(len(labels) / batch_size)
    )
    best = (0, -1.0)
    kept = adapter.keys.detach().clone()
    for epoch in range(epochs):
        embeds = views[epoch % len(views)].float()
        for rows in torch.randperm(len(labels), generator=generator).split(batch_size):
            loss = F.cross_entropy(adapter(embeds[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        score = accuracy(adapter, *validation)
        progress(f"epoch {epoch + 1}/{epochs}  loss {loss.item():.4f}  validation {score:.4f}")
        if score > best[1]:
            best, kept = (epoch + 1, score), adapter.keys.detach().clone()
    adapter.keys.data = kept
    return best


@torch.no_grad()
def accuracy(adapter: TipAdapter, embeds: Tensor, labels: Tensor) -> float:
    """Share of right answers on unit embeddings [M, D]."""
    answers = torch.cat([adapter(part).argmax(1) for part in embeds.float().split(1024)])
    return int((answers == labels).sum()) / len(labels)


def search_grid(beta_end: float, alpha_end: float) -> tuple[list[float], list[float]]:
    """The values of beta and alpha that are tried: from 0.1 in 200 and 20 equal steps, without the end."""
    ends = ((beta_end, 200), (alpha_end, 20))
    betas, alphas = (np.linspace(0.1, end, steps, endpoint=False).tolist() for end, steps in ends)
    return betas, alphas


@torch.no_grad()
def search(
    adapter: TipAdapter, embeds: Tensor, labels: Tensor, betas: Sequence[float], alphas: Sequence[float]
) -> tuple[float, float, float]:
    """(beta, alpha, accuracy) with the most right answers: betas outside, alphas inside, the first of equals stays."""
    right = torch.zeros(len(betas), len(alphas), dtype=torch.int64)
    rows = max(1, _ELEMENTS // (len(alphas) * adapter.values.shape[1]))
    weights = torch.tensor(list(alphas), device=embeds.device).view(-1, 1, 1)
    for part, target in zip(embeds.float().split(rows), labels.split(rows), strict=True):
        zero_shot = adapter.zero_shot(part)
        for index, beta in enumerate(betas):
            logits = zero_shot + weights * adapter.cache_logits(part, beta)
            right[index] += (logits.argmax(-1) == target).sum(1).cpu()
    beta, alpha = divmod(int((right.flatten() == right.max()).nonzero()[0]), len(alphas))
    return betas[beta], alphas[alpha], int(right.max()) / len(labels)


def save(adapter: TipAdapter, path: Path) -> None:
    """Write the file that the released code reads."""
    keys = adapter.keys.detach().cpu()
    content = {
        "adapter_weight": keys,
        "cache_keys": keys.T.contiguous(),
        "cache_values": adapter.values.cpu(),
        "clip_weights": adapter.class_vectors.cpu().T.contiguous(),
        "best_alpha": float(adapter.alpha),
        "best_beta": float(adapter.beta),
    }
    with new_file(path, "Tip-Adapter") as partial:
        torch.save(content, partial)


def load(path: Path) -> TipAdapter:
    """The teacher in a file of the released layout, with the fine-tuned keys (`adapter_weight`)."""
    content = read_plain_pickle(path)
    if missing := [name for name in _FIELDS if name not in content]:
        raise UserError(f"Tip-Adapter file {path} has no {', '.join(missing)}; it needs {', '.join(_FIELDS)}")
    for name in _MATRICES:
        value = content[name]
        if not isinstance(value, Tensor) or value.ndim != 2 or not value.is_floating_point():
            raise UserError(f"Tip-Adapter file {path}: {name} is no matrix of numbers")
    keys, values, vectors = content["adapter_weight"], content["cache_values"], content["clip_weights"].T
    if len(keys) != len(values) or keys.shape[1] != vectors.shape[1] or values.shape[1] != len(vectors):
        shapes = ", ".join(f"{name} {list(content[name].shape)}" for name in _MATRICES)
        raise UserError(f"Tip-Adapter file {path}: shapes do not fit: {shapes}")
    alpha, beta = (number_of(content, name, path) for name in ("best_alpha", "best_beta"))
    return TipAdapter(keys, values, vectors, alpha=alpha, beta=beta)
