"""Intersection over union of map layers, each over the whole set. Letters: M layers, T thresholds, X, Y cells."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vlmkd.results import Meaning, share

THRESHOLDS = (0.35, 0.40, 0.45, 0.50, 0.55, 0.60, 0.65)


class MapIoU:
    """Counts over frames; ranks add theirs (`counts`) before `scores`."""

    def __init__(self, layers: Sequence[str]) -> None:
        self.layers = tuple(layers)
        self.counts = np.zeros((3, len(self.layers), len(THRESHOLDS)), np.int64)
        """True positives, false positives and false negatives of every layer and threshold."""

    def add(self, probabilities: NDArray[np.floating], truth: NDArray[np.bool_]) -> None:
        """Frames [..., M, X, Y]: what is predicted, and what is there."""
        shape = (-1, len(self.layers), probabilities.shape[-2] * probabilities.shape[-1])
        values, there = probabilities.reshape(shape), np.asarray(truth, bool).reshape(shape)
        for column, threshold in enumerate(THRESHOLDS):
            said = values >= threshold
            cases = (said & there, said & ~there, ~said & there)
            self.counts[:, :, column] += [case.sum((0, 2)) for case in cases]

    def scores(self) -> dict[str, float]:
        """`miou`, the mean over layers of each one's best threshold, `miou_at_50`, and `iou_LAYER`."""
        iou = self.counts[0] / (self.counts.sum(0) + 1e-7)
        best = iou.max(1)
        means = {"miou": best.mean(), "miou_at_50": iou[:, THRESHOLDS.index(0.50)].mean()}
        each = {f"iou_{layer}": value for layer, value in zip(self.layers, best, strict=True)}
        return {name: float(value) for name, value in (means | each).items()}

    def meanings(self) -> dict[str, Meaning]:
        """Of `scores`. The best threshold is chosen on the evaluated set itself, so `miou` is optimistic."""
        found = {"miou": share("mIoU, best thresholds", main=True), "miou_at_50": share("mIoU at 0.5")}
        return found | {f"iou_{layer}": share(f"IoU {layer.replace('_', ' ')}") for layer in self.layers}
