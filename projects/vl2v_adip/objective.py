"""VL2V-ADiP's loss and the baselines', as terms and weights; tensors in, tensors out.

Letters: B images, C classes, D width of the teacher's space. Terms are means over the rows that count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmkd.losses.logits import kl_divergence

Method = Literal[
    "align", "distill", "one_stage", "vl2v_sd", "kd_image", "kd_text", "kd_kl", "kd_cos", "simkd", "erm", "lp", "lp_ft",
    "miro",
]  # fmt: skip
Terms = tuple[dict[str, Tensor], dict[str, float]]


@dataclass
class Targets:
    """What the teacher and the labels say about a batch."""

    labels: Tensor
    """int64 [B]."""
    vectors: Tensor | None = None
    """Class vectors [C, D]."""
    image_embeds: Tensor | None = None
    """The teacher's image embeddings [B, D]."""
    valid: Tensor | None = None
    """bool [B]: rows of `image_embeds` that the teacher answered; None: all."""
    logit_scale: float = 1.0
    """Factor of the teacher's cosines in its logits."""

    def logits(self) -> Tensor:
        """The teacher's logits [B, C]."""
        assert self.image_embeds is not None and self.vectors is not None
        return self.logit_scale * F.normalize(self.image_embeds.float(), dim=-1) @ self.vectors.T


def image_share(method: Method, image_weight: float) -> float:
    """lambda of a method: the config's, but 1 for `kd_image` and 0 for `kd_text`."""
    return {"kd_image": 1.0, "kd_text": 0.0}.get(method, image_weight)


def needs_images(method: Method, image_weight: float) -> bool:
    """Whether the method asks the teacher for image embeddings."""
    if method in ("erm", "lp", "lp_ft", "miro"):
        return False
    return method in ("kd_kl", "kd_cos", "simkd") or image_share(method, image_weight) > 0


def objective(
    method: Method,
    embeds: Tensor,
    logits: Tensor,
    targets: Targets,
    *,
    image_weight: float = 0.5,
    kd_weight: float = 0.5,
    temperature: float = 0.1,
    legacy_kl: bool = False,
    miro: Tensor | None = None,
    miro_weight: float = 0.1,
) -> Terms:
    """Terms and weights of a method; a term whose weight is 0 is left out.

    Args:
        embeds: what the student's head sees [B, D], of any length.
        logits: the student's logits [B, C].
        miro: the regulariser of `miro`, a scalar.
    """
    if method in ("erm", "lp", "lp_ft"):
        return {"ce": F.cross_entropy(logits.float(), targets.labels)}, {"ce": 1.0}
    if method == "miro":
        assert miro is not None
        ce = F.cross_entropy(logits.float(), targets.labels)
        return {"ce": ce, "miro": miro}, {"ce": 1.0, "miro": miro_weight}
    if method == "kd_kl":
        return _kd_kl(logits, targets, kd_weight, temperature, legacy_kl)
    if method == "kd_cos":
        return _kd_cos(logits, targets, kd_weight, temperature)
    if method == "simkd":
        assert targets.image_embeds is not None
        rows = _rows(targets)
        squared = (embeds[rows].float() - targets.image_embeds[rows].float()).square()
        return {"mse": squared.sum() / max(squared.numel(), 1)}, {"mse": 1.0}
    return cosine_terms(embeds, targets, image_share(method, image_weight))


def cosine_terms(embeds: Tensor, targets: Targets, image_weight: float) -> Terms:
    """-lambda mean cos(z, I(x)) - (1 - lambda) mean cos(z, t_y) (docs/papers/vl2v_adip.md, eq. 3).

    Rows without an answer of the teacher keep the text term.
    """
    terms: dict[str, Tensor] = {}
    if image_weight > 0:
        assert targets.image_embeds is not None
        rows = _rows(targets)
        terms["image"] = negative_cosine(embeds[rows], targets.image_embeds[rows])
    if image_weight < 1:
        assert targets.vectors is not None
        terms["text"] = negative_cosine(embeds, targets.vectors[targets.labels])
    weights = {"image": image_weight, "text": 1.0 - image_weight}
    return terms, {name: weights[name] for name in terms}


def negative_cosine(embeds: Tensor, wanted: Tensor) -> Tensor:
    """-cos, mean over the rows, between -1 and 1; 0 without rows. Both [B, D]."""
    cosines = F.cosine_similarity(embeds.float(), wanted.float().detach(), dim=-1)
    return -cosines.sum() / max(len(cosines), 1)


def _kd_kl(logits: Tensor, targets: Targets, weight: float, temperature: float, legacy: bool) -> Terms:
    """CE(s / tau) + weight KL(teacher || student), without a factor tau^2."""
    student = logits.float() / temperature
    terms = {"ce": F.cross_entropy(student, targets.labels)}
    if weight:
        rows = _rows(targets)
        teacher = targets.logits()[rows] / temperature
        if legacy:
            # Mean over B and C of p (log p - q), q where log q belongs: not 0 for equal distributions.
            total = F.kl_div(student[rows].softmax(-1), teacher.softmax(-1), reduction="sum")
            terms["kl"] = total / max(teacher.numel(), 1)
        else:
            terms["kl"] = kl_divergence(student[rows], teacher)
    return terms, {name: {"ce": 1.0, "kl": weight}[name] for name in terms}


def _kd_cos(logits: Tensor, targets: Targets, weight: float, temperature: float) -> Terms:
    """CE(s / tau) - weight mean cos(softmax(s / tau), softmax(t / tau))."""
    student = logits.float() / temperature
    terms = {"ce": F.cross_entropy(student, targets.labels)}
    if weight:
        rows = _rows(targets)
        wanted = (targets.logits()[rows] / temperature).softmax(-1)
        terms["cos"] = negative_cosine(student[rows].softmax(-1), wanted)
    return terms, {name: {"ce": 1.0, "cos": weight}[name] for name in terms}


def _rows(targets: Targets) -> Tensor | slice:
    """The rows that the teacher answered."""
    if targets.valid is None or bool(torch.all(targets.valid)):
        return slice(None)
    return targets.valid
