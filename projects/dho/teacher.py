"""The frozen teacher: class logits from its image embeddings, by class vectors or by a Tip-Adapter-F.

Letters: B images, C classes, D embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from projects.dho import tip_adapter
from projects.dho.config import TeacherConfig
from vlmkd.class_names import read_templates, require_same_classes
from vlmkd.data.teacher_outputs import TeacherOutputs
from vlmkd.errors import UserError
from vlmkd.files import read_object
from vlmkd.models.class_vectors import ClassVectors, encode_classes
from vlmkd.models.clip import ClipModel, load_clip
from vlmkd.models.heads import TextClassifier
from vlmkd.models.towers import ClipPredictor


@dataclass
class Teacher:
    """What a run needs of its teacher."""

    logits: nn.Module
    """Unit embeddings [B, D] -> logits [B, C], fp32."""
    vectors: ClassVectors | None
    """Class vectors; None with an adapter, which brings its own."""
    dim: int
    """D."""
    digest: str
    """Of the weights behind the embeddings."""
    clip: ClipModel | None
    """The loaded model; None when its outputs are stored."""
    source: str


def load_teacher(
    cfg: TeacherConfig, class_names: list[str], templates: list[str], *, outputs: str
) -> Teacher:
    """The teacher that `cfg` names for a set with these classes and prompts; `outputs`, a folder, replaces its towers."""
    stored = TeacherOutputs(outputs).info if outputs else None
    clip = load_clip(cfg.model, cfg.pretrained) if cfg.model else None
    if clip is not None and stored is not None and clip.digest != stored.digest:
        raise UserError(
            f"teacher {clip.source} has other weights than {stored.source}, of which {outputs} is; name that model"
        )
    origin = stored or clip
    assert origin is not None, "the config names a model or stored outputs"
    vectors = None
    if cfg.adapter:
        logits: nn.Module = load_adapter(cfg.adapter, class_names, origin.digest)
    else:
        vectors = class_vectors(cfg, clip, class_names, templates)
        if vectors.teacher_digest != origin.digest:
            raise UserError(
                f"class vectors {cfg.class_vectors} are of {vectors.teacher}, image embeddings of other weights, "
                f"{origin.source}; make both with one model"
            )
        logits = TextClassifier(vectors.vectors, vectors.logit_scale)
    dim = int((logits.keys if vectors is None else vectors.vectors).shape[1])  # type: ignore[union-attr]
    if stored is not None and stored.dim != dim:
        raise UserError(f"the teacher's classes have width {dim}, its stored image embeddings {stored.dim}")
    return Teacher(logits, vectors, dim, origin.digest, None if stored is not None else clip, origin.source)


def prompts_of(cfg: TeacherConfig, own: list[str]) -> list[str]:
    """The templates to ask with; `own` are the data set's."""
    return cfg.templates or (read_templates("simple") if cfg.prompts == "ensemble" else own)


def class_vectors(
    cfg: TeacherConfig, clip: ClipModel | None, class_names: list[str], templates: list[str]
) -> ClassVectors:
    """Class vectors of `cfg`, read or made, with the scale that the config asks for."""
    if cfg.class_vectors:
        vectors = ClassVectors.load(Path(cfg.class_vectors), expect_class_names=class_names)
    else:
        assert clip is not None
        prompts, encoder = prompts_of(cfg, templates), ClipPredictor.of(clip)
        vectors = encode_classes(encoder, class_names, prompts, cfg.normalise, teacher_digest=clip.digest)
    return replace(vectors, logit_scale=cfg.scale) if cfg.scale else vectors


def load_adapter(path: str, class_names: list[str], digest: str) -> tip_adapter.TipAdapter:
    """A Tip-Adapter-F for these classes, frozen."""
    adapter = tip_adapter.load(Path(path))
    classes = adapter.values.shape[1]
    if classes != len(class_names):
        raise UserError(f"Tip-Adapter {path} has {classes} classes, the data set {len(class_names)}")
    beside = Path(path).with_suffix(".json")
    if beside.is_file():  # a released one has none
        facts = read_object(beside, "Tip-Adapter facts")
        require_same_classes(facts["class_names"], class_names, f"Tip-Adapter {path}")
        if facts["teacher_digest"] != digest:
            raise UserError(
                f"Tip-Adapter {path} is of {facts['teacher']}, the teacher has other weights; name that one"
            )
    return adapter.eval().requires_grad_(False)
