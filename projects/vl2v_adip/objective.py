"""VL2V-ADiP's loss and the baselines', as terms and weights; terms are means over the rows that count.

Letters: B images, C classes, D width of the teacher's space.
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
    """Factor of the teacher's cosines."""

    def logits(self) -> Tensor:
        """The teacher's [B, C]."""
        assert self.image_embeds is not None and self.vectors is not None
        return self.logit_scale * F.normalize(self.image_embeds.float(), dim=-1) @ self.vectors.T


def image_share(method: Method, loss: LossConfig) -> float:
    """lambda of a method: the config's, but 1 for `kd_image` and 0 for `kd_text`."""
    return {"kd_image": 1.0, "kd_text": 0.0}.get(method, loss.image_weight)


def needs_images(method: Method, loss: LossConfig) -> bool:
    """Whether the method asks the teacher for image embeddings."""
    by_images = method in ("kd_kl", "kd_cos", "simkd") or image_share(method, loss) > 0
    return by_images and method not in WITHOUT_TEACHER


def objective(
    method: Method,
    embeds: Tensor,
    logits: Tensor,
    targets: Targets,
    loss: LossConfig,
    miro: Tensor | None = None,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Terms and weights of a method, from the student's embeddings [B, D] of any length and logits [B, C].

    VL2V-ADiP's own is -lambda mean cos(z, I(x)) - (1 - lambda) mean cos(z, t_y) (docs/papers/vl2v_adip.md, eq. 3); rows
    that the teacher has not answered keep the text term. `miro` is that method's regulariser.
    """
    if method in WITHOUT_TEACHER:
        terms = {"ce": F.cross_entropy(logits.float(), targets.labels)}
        terms |= {} if miro is None else {"miro": miro}
        return terms, {name: {"ce": 1.0, "miro": loss.miro_weight}[name] for name in terms}
    images, share = targets.image_embeds, image_share(method, loss)
    rows = slice(None) if targets.valid is None else targets.valid
    weights = {"ce": 1.0, "mse": 1.0, "miro": loss.miro_weight, "kl": loss.kd_weight, "cos": loss.kd_weight}
    weights |= {"image": share, "text": 1.0 - share}
    terms = {}
    if method in WITHOUT_TEACHER:
        terms["ce"] = F.cross_entropy(logits.float(), targets.labels)
        if miro is not None:
            terms["miro"] = miro
    elif method in ("kd_kl", "kd_cos"):
        student = logits.float() / loss.temperature
        terms["ce"] = F.cross_entropy(student, targets.labels)
        if loss.kd_weight:
            teacher = targets.logits()[rows] / loss.temperature
            terms[method.removeprefix("kd_")] = _softened(method, student[rows], teacher, loss)
    elif method == "simkd":
        assert images is not None
        squared = (embeds[rows].float() - images[rows].float()).square()
        terms["mse"] = squared.sum() / max(squared.numel(), 1)
    else:
        if share > 0:
            assert images is not None
            terms["image"] = negative_cosine(embeds[rows], images[rows])
        if share < 1:
            assert targets.vectors is not None
            terms["text"] = negative_cosine(embeds, targets.vectors[targets.labels])
    return terms, {name: weights[name] for name in terms}


def negative_cosine(embeds: Tensor, wanted: Tensor) -> Tensor:
    """-cos, mean over the rows, between -1 and 1; 0 without rows. Both [B, D]."""
    cosines = F.cosine_similarity(embeds.float(), wanted.float().detach(), dim=-1)
    return -cosines.sum() / max(len(cosines), 1)


def _softened(method: Method, student: Tensor, teacher: Tensor, loss: LossConfig) -> Tensor:
    """KL(teacher || student) of softened logits, without a factor tau^2, or -mean cos of both softmaxes."""
    if method == "kd_cos":
        return negative_cosine(student.softmax(-1), teacher.softmax(-1))
    if loss.legacy_kl:
        # Mean over B and C of p (log p - q), q where log q belongs: not 0 for equal distributions.
        total = F.kl_div(student.softmax(-1), teacher.softmax(-1), reduction="sum")
        return total / max(teacher.numel(), 1)
    return kl_divergence(student, teacher)
