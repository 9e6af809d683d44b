"""Do two losses pull the same parameters the same way? Gradient cosines, the paper's diagnostic for the second head."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from projects.dho.student import Student


class Agreement(NamedTuple):
    """Two gradients on one group of parameters; scalars, float32 (float64 stays)."""

    dot: Tensor
    first_square: Tensor
    """Squared length of the first loss's gradient."""
    second_square: Tensor

    @property
    def cosine(self) -> Tensor:
        """Cosine of the two gradients; 0 where one of them vanishes, as on a head that only one loss reaches."""
        length = (self.first_square * self.second_square).sqrt()
        return torch.where(length > 0, self.dot / length.clamp_min(torch.finfo(length.dtype).tiny), 0.0)

    def __add__(self, other: Agreement) -> Agreement:  # type: ignore[override]
        """Of two groups together."""
        return Agreement(*(one + more for one, more in zip(self, other, strict=True)))


def agreements(
    first: Tensor, second: Tensor, groups: Mapping[str, Sequence[nn.Parameter]]
) -> dict[str, Agreement]:
    """How this rank's gradients of two scalar losses relate on each named group of parameters.

    A loss gives 0 where it does not reach. The graph is kept, no `.grad` is written.
    """
    parameters = [parameter for group in groups.values() for parameter in group]
    gradients = [
        torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        for loss in (first, second)
    ]
    pairs = zip(*gradients, strict=True)
    found = {}
    for name, group in groups.items():
        sums = [first.new_zeros(3)]
        for _ in group:
            one, other = (gradient.to(first.dtype) for gradient in next(pairs))
            sums.append(torch.stack([(one * other).sum(), one.square().sum(), other.square().sum()]))
        found[name] = Agreement(*torch.stack(sums).sum(0))
    return found


class Probe:
    """Compares gradients on a copy of the student: DeepSpeed takes each backward pass through its modules for the step's."""

    def __init__(self, student: Student) -> None:
        self._copy = copy.deepcopy(student).float()

    def __call__(
        self, student: Student, losses: Callable[[Student], Sequence[Tensor]]
    ) -> dict[str, Agreement]:
        """Of the two losses that `losses` gives for a student with the weights of `student`."""
        self._copy.to(next(student.parameters()).device).load_state_dict(student.state_dict())
        self._copy.train(student.training)
        first, second = (loss.float() for loss in losses(self._copy))
        return agreements(first, second, self._copy.parameter_groups())
