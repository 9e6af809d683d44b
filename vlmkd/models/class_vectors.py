"""What a text tower says about the classes, computed once and stored.

PromptKD's class bank, VL2V-ADiP's text classifier, DHO's teacher logits and text initialisation.

Letters: C classes, P prompts per class, D embedding width, B batch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmkd import distributed
from vlmkd.class_names import check_templates, fill, prompt_name, require_same_classes
from vlmkd.errors import UserError
from vlmkd.files import new_file
from vlmkd.predictors import TextEncoder
from vlmkd.tensor_files import read_safetensors

Normalise = Literal["each_and_mean", "each", "mean", "none"]
"""Which are made unit vectors: those of each prompt, their mean, both, or none.

`each_and_mean`: OpenAI's and open_clip's classifiers, PromptKD, VL2V-ADiP. `each`: DHO's open_clip teachers, by its code.
`mean`: PromptSRC's frozen text features. `none`: DHO's text initialisation.
"""


@dataclass(frozen=True, kw_only=True)
class ClassVectors:
    """One vector per class, and where they come from."""

    vectors: Tensor
    """[C, D] fp32 on the CPU."""
    class_names: list[str]
    templates: list[str]
    """With `{}` or `{c}` for the class name."""
    teacher: str
    teacher_digest: str
    """Of the weights (and trained prompts) behind the vectors."""
    logit_scale: float
    """The teacher's factor of the cosines."""
    normalise: Normalise = "each_and_mean"

    def __post_init__(self) -> None:
        shape, count = tuple(self.vectors.shape), len(self.class_names)
        if len(shape) != 2 or shape[0] != count or self.vectors.dtype != torch.float32:
            raise ValueError(f"{shape} {self.vectors.dtype} vectors for {count} classes; need fp32 [C, D]")
        if not self.vectors.isfinite().all():
            raise UserError(f"class vectors of {self.teacher} are not finite; check its weights")

    @property
    def digest(self) -> str:
        """sha256 over all that makes the vectors."""
        facts = [self.class_names, self.templates, self.teacher_digest, self.normalise]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def logits(self, image_embeds: Tensor) -> Tensor:
        """The teacher's logits [B, C] of unit vectors [B, D], fp32."""
        return self.logit_scale * image_embeds.float() @ self.vectors.to(image_embeds.device).T

    def save(self, path: Path) -> None:
        """Into a safetensors file whose metadata are the other fields."""
        from safetensors.torch import save_file

        facts = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "vectors"}
        facts["digest"] = self.digest
        with new_file(path, "class vectors") as partial:
            save_file({"vectors": self.vectors.contiguous()}, partial, {"class_vectors": json.dumps(facts)})

    @classmethod
    def load(cls, path: Path, *, expect_class_names: Sequence[str] | None = None) -> ClassVectors:
        """From a file of `save`; one that was edited, or of other classes than expected, is refused."""
        from safetensors import safe_open

        tensors = read_safetensors(path, what="class vectors")
        with safe_open(path, "pt") as stream:
            written = (stream.metadata() or {}).get("class_vectors")
        if written is None or "vectors" not in tensors:
            raise UserError(f"{path} holds no class vectors")
        facts = json.loads(written)
        digest = facts.pop("digest")
        found = cls(vectors=tensors["vectors"], **facts)
        if digest != found.digest:
            raise UserError(f"class vectors {path} were edited: their digest does not fit; make them again")
        if expect_class_names is not None:
            require_same_classes(found.class_names, expect_class_names, f"class vectors {path}")
        return found


def class_prompts(class_names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """C x P texts, those of a class side by side."""
    return [fill(template, prompt_name(name)) for name in class_names for template in templates]


def encode_classes(
    encoder: TextEncoder,
    class_names: Sequence[str],
    templates: Sequence[str],
    normalise: Normalise = "each_and_mean",
    *,
    teacher_digest: str,
    batch_size: int = 256,
    shared: bool = False,
    watch: Callable[[range], Iterable[int]] = iter,
) -> ClassVectors:
    """Mean prompt vector of every class; underscores in class names become spaces.

    The modes `mean` and `none` need an encoder with `text_features` (ClipPredictor). With `shared` each rank encodes some
    of the classes; `watch` may show the batches' progress.
    """
    check_templates(templates)
    raw = normalise in ("mean", "none")
    encode = getattr(encoder, "text_features", None) if raw else encoder.encode_text
    if encode is None:
        told = f"needs a CLIP, which {encoder.name} is not; use normalise=each_and_mean"
        raise UserError(f"normalise={normalise} {told}")
    share = distributed.rank_share(len(class_names)) if shared else range(len(class_names))
    texts = class_prompts([class_names[index] for index in share], templates)
    starts = range(0, len(texts), batch_size)
    with torch.no_grad():
        parts = [encode(texts[start : start + batch_size]).float().cpu() for start in watch(starts)]
    vectors = torch.cat([torch.empty(0), *parts])
    if parts:
        vectors = vectors.reshape(len(share), len(templates), -1).mean(dim=1)
    if normalise in ("each_and_mean", "mean"):
        vectors = F.normalize(vectors, dim=-1)
    if shared:
        _, vectors = distributed.gather_rows(torch.tensor(share, dtype=torch.long), vectors)
    return ClassVectors(
        vectors=vectors, class_names=list(class_names), templates=list(templates), teacher=encoder.name,
        teacher_digest=teacher_digest, logit_scale=float(encoder.logit_scale), normalise=normalise,
    )  # fmt: skip
