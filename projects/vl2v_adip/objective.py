"""VL2V-ADiP's loss and the baselines', as terms and weights; tensors in, tensors out.

Letters: B images, C classes, D width of the teacher's space. Terms are means over the rows that count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from projects.vl2v_adip.config import WITHOUT_TEACHER, LossConfig, Method
from vlmkd.losses.logits import kl_divergence


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


def image_share(method: Method, loss: LossConfig) -> float:
    """lambda of a method: the config's, but 1 for `kd_image` and 0 for `kd_text`."""
    return {"kd_image": 1.0, "kd_text": 0.0}.get(method, loss.image_weight)


def needs_images(method: Method, loss: LossConfig) -> bool:
    """Whether the method asks the teacher for image embeddings."""
    if method in WITHOUT_TEACHER:
        return False
    return method in ("kd_kl", "kd_cos", "simkd") or image_share(method, loss) > 0


def objective(
    method: Method,
    embeds: Tensor,
    logits: Tensor,
    targets: Targets,
    loss: LossConfig,
    miro: Tensor | None = None,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Terms and weights of a method; a term whose weight is 0 is left out.

    `embeds` are what the student's head sees [B, D], of any length; `miro` is the regulariser of that method. The
    method's own loss is -lambda mean cos(z, I(x)) - (1 - lambda) mean cos(z, t_y) (docs/papers/vl2v_adip.md, eq. 3); rows
    without an answer of the teacher keep the text term.
    """
    if method in WITHOUT_TEACHER:
        terms = {"ce": F.cross_entropy(logits.float(), targets.labels)}
        terms |= {} if miro is None else {"miro": miro}
        return terms, {name: {"ce": 1.0, "miro": loss.miro_weight}[name] for name in terms}
    rows = slice(None) if targets.valid is None or bool(targets.valid.all()) else targets.valid
    if method in ("kd_kl", "kd_cos"):
        return _softened(method, logits, targets, rows, loss)
    if method == "simkd":
        assert targets.image_embeds is not None
        squared = (embeds[rows].float() - targets.image_embeds[rows].float()).square()
        return {"mse": squared.sum() / max(squared.numel(), 1)}, {"mse": 1.0}
    share = image_share(method, loss)
    terms = {}
    if share > 0:
        assert targets.image_embeds is not None
        terms["image"] = negative_cosine(embeds[rows], targets.image_embeds[rows])
    if share < 1:
        assert targets.vectors is not None
        terms["text"] = negative_cosine(embeds, targets.vectors[targets.labels])
    return terms, {name: {"image": share, "text": 1.0 - share}[name] for name in terms}


def negative_cosine(embeds: Tensor, wanted: Tensor) -> Tensor:
    """-cos, mean over the rows, between -1 and 1; 0 without rows. Both [B, D]."""
    cosines = F.cosine_similarity(embeds.float(), wanted.float().detach(), dim=-1)
    return -cosines.sum() / max(len(cosines), 1)


def _softened(
    method: Method, logits: Tensor, targets: Targets, rows: Tensor | slice, loss: LossConfig
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """CE(s / tau) + weight KL(teacher || student), without a factor tau^2, or CE - weight mean cos of both softmaxes."""
    student = logits.float() / loss.temperature
    terms = {"ce": F.cross_entropy(student, targets.labels)}
    if loss.kd_weight:
        own, teacher = student[rows], targets.logits()[rows] / loss.temperature
        if method == "kd_cos":
            terms["cos"] = negative_cosine(own.softmax(-1), teacher.softmax(-1))
        elif loss.legacy_kl:
            # Mean over B and C of p (log p - q), q where log q belongs: not 0 for equal distributions.
            total = F.kl_div(own.softmax(-1), teacher.softmax(-1), reduction="sum")
            terms["kl"] = total / max(teacher.numel(), 1)
        else:
            terms["kl"] = kl_divergence(own, teacher)
    return terms, {name: 1.0 if name == "ce" else loss.kd_weight for name in terms}
