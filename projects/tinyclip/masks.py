"""Hard-concrete masks over hidden channels, heads and FFN channels, and the sparsity that they are driven to.

L0 regularisation as in CoFiPruning, with TinyCLIP's constants: every unit has a log alpha; in training its mask is a
random number in [0, 1] that is exactly 0 or 1 most of the time, in evaluation a soft number with the least kept units
at 0. A Lagrangian pulls the expected sparsity to a target; its multipliers ascend. docs/papers/tinyclip.md, eq. 15-21.

Letters: D width of the tower, L layers, H heads a layer, F FFN channels a layer.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from vlmkd.train.task import master_value

GAMMA, ZETA = -0.1, 1.1  # the concrete variable is stretched to this interval and then clipped to [0, 1]
EPSILON = 1e-6
TEMPERATURE = 2 / 3
INFERENCE_FACTOR = 0.8  # sharpness of the deterministic mask, in units of 1 / temperature
INITIAL_LOG_ALPHA = 10.0
LOG_ALPHA_LIMIT = math.log(100.0)  # log alphas are clamped to +- this after every optimiser step
INITIAL_MULTIPLIER = 10.0  # of the reference's one-sided penalty
FAMILIES = ("hidden", "heads", "intermediate")

Sides = Literal["one", "two"]


class Mask(NamedTuple):
    """Factors of one tower's units: hidden [D], heads [L, H], intermediate [L, F], in fp32 or wider."""

    hidden: Tensor
    heads: Tensor
    intermediate: Tensor


class Multipliers(NamedTuple):
    """Lagrange multipliers of the deviation (linear) and of its square (quadratic)."""

    linear: Tensor
    quadratic: Tensor


def keep_probability(log_alpha: Tensor) -> Tensor:
    """q: the probability that a unit's mask is not zero (docs/papers/tinyclip.md, eq. 16)."""
    edge = -GAMMA / (ZETA - GAMMA)
    shift = TEMPERATURE * math.log(edge / (1 - edge))
    return 1 - torch.sigmoid(shift - log_alpha).clamp(EPSILON, 1 - EPSILON)


def sample_mask(log_alpha: Tensor, generator: torch.Generator) -> Tensor:
    """A random mask in [0, 1] of the shape of `log_alpha`, differentiable in it; the draw is the generator's."""
    uniform = torch.rand(log_alpha.shape, generator=generator, device=log_alpha.device, dtype=log_alpha.dtype)
    uniform = uniform * (1 - 2 * EPSILON) + EPSILON
    concrete = torch.sigmoid((uniform.log() - (-uniform).log1p() + log_alpha) / TEMPERATURE)
    return (concrete * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def soft_mask(log_alpha: Tensor) -> Tensor:
    """m: the mask value of a kept unit at evaluation."""
    return torch.sigmoid(INFERENCE_FACTOR / TEMPERATURE * log_alpha)


class TowerMasks(nn.Module):
    """The log alphas, `hidden` [D], `heads` [L, H] and `intermediate` [L, F], and the multipliers of one tower.

    The `*_present` buffers are False at units that an earlier stage removed for good: their masks are always zero.
    """

    def __init__(self, width: int, layers: int, heads: int, channels: int, sides: Sides = "one") -> None:
        super().__init__()
        self.width, self.layers, self.num_heads, self.channels = width, layers, heads, channels
        for family, shape in zip(FAMILIES, ((width,), (layers, heads), (layers, channels)), strict=True):
            self.register_parameter(family, nn.Parameter(torch.full(shape, INITIAL_LOG_ALPHA)))
            self.register_buffer(f"{family}_present", torch.ones(shape, dtype=torch.bool))
        # A positive linear multiplier of the two-sided penalty would first push towards less sparsity.
        self.linear = nn.Parameter(torch.tensor(INITIAL_MULTIPLIER if sides == "one" else 0.0))
        self.quadratic = nn.Parameter(torch.tensor(INITIAL_MULTIPLIER))

    def forward(self, seed: int | None) -> tuple[Mask, Tensor, Multipliers]:
        """The mask, the expected size N (float64 scalar) and the multipliers, whose gradients are reversed.

        With a `seed` the mask is sampled, and a pure function of it and of the log alphas; None gives the
        deterministic mask.
        """
        if seed is None:
            mask = self.deterministic()
        else:
            generator = torch.Generator(self.hidden.device).manual_seed(seed)
            mask = Mask(*(sample_mask(alpha, generator) * present for alpha, present in self._families()))
        # Reshaped, because an engine may keep scalars as vectors of one element.
        multipliers = Multipliers(
            *(reverse_gradient(master_value(value)).reshape(()) for value in (self.linear, self.quadratic))
        )
        return mask, self.expected_size(), multipliers

    def deterministic(self, multiple: int = 1) -> Mask:
        """The evaluation mask: of n units the n - round(n - sum of q) with the largest values stay, of equal ones the first.

        A `multiple` above 1 rounds the numbers of kept hidden and FFN channels to it (up when half way, and at least one
        multiple unless none is kept). Units that are not present count as removed.
        """
        values = []
        for family, (log_alpha, present) in zip(FAMILIES, self._families(), strict=True):
            size = log_alpha.shape[-1]
            expected = (keep_probability(log_alpha) * present).sum(dim=-1, dtype=torch.float64)
            counts = size - torch.round(size - expected).long()
            if multiple > 1 and family != "heads":
                rounded = ((counts + multiple // 2) // multiple * multiple).clamp(min=multiple)
                counts = torch.where(counts > 0, torch.minimum(rounded, present.sum(dim=-1)), 0)
            soft = soft_mask(log_alpha) * present
            ranks = soft.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
            values.append(soft * (ranks < counts.unsqueeze(-1)))
        return Mask(*values)

    def expected_size(self) -> Tensor:
        """N, the expected number of block parameters (float64 scalar; docs/papers/tinyclip.md, eq. 18)."""
        hidden, heads, channels = (
            (keep_probability(alpha) * present).sum(dtype=torch.float64)
            for alpha, present in self._families()
        )
        return self._head_size / self.width * hidden * heads + 2 * hidden * channels

    def full_size(self) -> int:
        """P, the number of block parameters without masks (docs/papers/tinyclip.md, eq. 19)."""
        d, f = self.width, self.channels
        return self.layers * (self.num_heads * self._head_size + 2 * d * f + d + f)

    @property
    def _head_size(self) -> int:
        return (4 * self.width**2 + 4 * self.width) // self.num_heads

    def _families(self) -> list[tuple[Tensor, Tensor]]:
        """Log alphas, in fp32 or wider, and presence of the three families."""
        return [
            (master_value(getattr(self, family)), getattr(self, f"{family}_present")) for family in FAMILIES
        ]

    def log_alphas(self) -> list[nn.Parameter]:
        """The parameters that are clamped to +- LOG_ALPHA_LIMIT."""
        return [getattr(self, family) for family in FAMILIES]


def reverse_gradient(value: Tensor) -> Tensor:
    """`value`, exactly, with the sign of its gradient turned: a descending optimiser makes it ascend."""
    return 2 * value.detach() - value


def expected_sparsity(*towers: tuple[Tensor, int]) -> Tensor:
    """p = 1 - N / P over the (N, P) pairs of one or several towers together."""
    size = torch.stack([expected for expected, _ in towers]).sum()
    return 1 - size / sum(full for _, full in towers)


def sparsity_target(step: int, start: float, target: float, warmup_steps: int) -> float:
    """Target sparsity at optimiser step `step`: linear from `start` to `target` over `warmup_steps`, then constant."""
    progress = min(1.0, step / warmup_steps) if warmup_steps else 1.0
    return start + (target - start) * progress


def lagrangian(sparsity: Tensor, target: float, multipliers: Multipliers, sides: Sides = "one") -> Tensor:
    """linear * deviation + quadratic * deviation^2, in the multipliers' precision (docs/papers/tinyclip.md, eq. 20).

    `one` (reference code): deviation = max(target - sparsity, 0), so a model below its size is left alone.
    `two` (paper, CoFiPruning): deviation = sparsity - target, linear term signed.
    """
    deviation = (target - sparsity).clamp(min=0) if sides == "one" else sparsity - target
    penalty = multipliers.linear * deviation + multipliers.quadratic * deviation**2
    return penalty.to(multipliers.linear.dtype)
