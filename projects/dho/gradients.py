"""Do two losses pull the same parameters the same way? Gradient cosines, the paper's diagnostic for the second head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Agreement:
    """Two gradients on one group of parameters; scalars in float32."""

    dot: Tensor
    first_square: Tensor
    """Squared length of the first loss's gradient."""
    second_square: Tensor

    @property
    def cosine(self) -> Tensor:
        """Cosine of the two gradients; 0 where one of them vanishes, as on a head that only one loss reaches."""
        length = (self.first_square * self.second_square).sqrt()
        return torch.where(length > 0, self.dot / length.clamp_min(torch.finfo(length.dtype).tiny), 0.0)

    def __add__(self, other: Agreement) -> Agreement:
        """Of two groups together."""
        return Agreement(
            self.dot + other.dot,
            self.first_square + other.first_square,
            self.second_square + other.second_square,
        )


def agreements(
    first: Tensor, second: Tensor, groups: dict[str, Sequence[nn.Parameter]]
) -> dict[str, Agreement]:
    """How the gradients of two scalar losses relate on each named group of parameters.

    A parameter that a loss does not reach has gradient 0. The graph is kept, no `.grad` is written. With several ranks
    the gradients are this rank's own.
    """
    parameters = [parameter for group in groups.values() for parameter in group]
    gradients = [
        torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        for loss in (first, second)
    ]
    found, start = {}, 0
    for name, group in groups.items():
        own = slice(start, start + len(group))
        found[name] = _agreement(gradients[0][own], gradients[1][own], first)
        start = own.stop
    return found


def _agreement(first: Sequence[Tensor | None], second: Sequence[Tensor | None], like: Tensor) -> Agreement:
    zero = torch.zeros(
        (), dtype=torch.float64 if like.dtype == torch.float64 else torch.float32, device=like.device
    )
    dot, first_square, second_square = zero.clone(), zero.clone(), zero.clone()
    for one, other in zip(first, second, strict=True):
        if one is not None:
            first_square += one.to(zero.dtype).square().sum()
        if other is not None:
            second_square += other.to(zero.dtype).square().sum()
        if one is not None and other is not None:
            dot += (one.to(zero.dtype) * other.to(zero.dtype)).sum()
    return Agreement(dot, first_square, second_square)
