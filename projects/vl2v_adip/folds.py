"""Leave-one-domain-out: which images train, select and test; and the export of the earlier stage of the same fold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from projects.vl2v_adip.config import CONTINUES, FoldConfig, Vl2vConfig
from projects.vl2v_adip.domain_split import DomainSplit, split_domains
from vlmkd.config import require
from vlmkd.data.labelled import LabelledSet
from vlmkd.datasets.folders import ALL
from vlmkd.datasets.labelled_sets import items_of
from vlmkd.errors import UserError
from vlmkd.files import read_object

FACTS = "fold.json"
"""File of an export: its fold, student and teacher."""


@dataclass(frozen=True)
class Fold:
    """The images of one held-out domain's run."""

    dataset: LabelledSet
    test_domain: int
    splits: dict[int, DomainSplit]
    """By domain index; of the source domains only seen classes."""

    @property
    def sources(self) -> list[int]:
        return [domain for domain in self.splits if domain != self.test_domain]

    def name(self, domain: int) -> str:
        return self.dataset.domains[domain]


def choose(dataset: LabelledSet, cfg: FoldConfig) -> Fold:
    """The fold that `cfg` describes."""
    if len(dataset.domains) < 2:
        raise UserError(f"data set {dataset.name} has no domains; leave-one-domain-out needs at least two")
    known, seen, classes = dataset.domains, cfg.seen_classes, len(dataset.class_names)
    told = f"is {cfg.test_domain!r}; {dataset.name} has {', '.join(known)}"
    require(cfg.test_domain in known, "fold.test_domain", told)
    require(seen < classes, "fold.seen_classes", f"is {seen} of {classes} classes")
    fold = Fold(dataset, known.index(cfg.test_domain), split_domains(items_of(dataset, ALL), cfg.trial_seed))
    for domain in fold.sources if seen else ():
        split = fold.splits[domain]
        parts = ([one for one in part if one.label < seen] for part in (split.inside, split.out))
        fold.splits[domain] = DomainSplit(*parts)
    return fold


def facts_of(cfg: Vl2vConfig, teacher_digest: str = "", templates: Sequence[str] = ()) -> dict[str, Any]:
    """What an export is of; `templates` are the class vectors'. Stages of one run differ in `method` alone."""
    student = cfg.student
    return {
        "method": cfg.method,
        "set": cfg.data.set,
        **asdict(cfg.fold),
        "student": f"{student.backbone}@{student.weights}" if student.weights else student.backbone,
        "image_size": student.image_size,
        "teacher": teacher_digest,
        "templates": list(templates),
        "legacy_norm": cfg.legacy_norm,
    }


def earlier_stage(cfg: Vl2vConfig, facts: Mapping[str, Any]) -> Path:
    """Export folder of the stage that this run starts from: `init_from`, or the only match below `runs`."""
    wanted = {**facts, "method": CONTINUES[cfg.method]}
    below = Path(cfg.runs).glob(f"**/export/{FACTS}")
    paths = [Path(cfg.init_from) / FACTS] if cfg.init_from else sorted(below)
    if cfg.init_from and not paths[0].is_file():
        raise UserError(f"config field init_from: {paths[0]} is no file; name an export of this project")
    found = {path.parent: read_object(path, "facts of an earlier stage") for path in paths}
    matching = [folder for folder, own in found.items() if own | wanted == own]
    if len(matching) == 1:
        return matching[0]
    if cfg.init_from:
        ((folder, own),) = found.items()
        name = next(name for name in wanted if own.get(name) != wanted[name])
        raise UserError(
            f"config field init_from: {folder} has {name} {own.get(name)!r}, this run {wanted[name]!r}; name the "
            f"{wanted['method']} export of the same fold, student, teacher and prompts"
        )
    what = ", ".join(f"{name} {value}" for name, value in wanted.items() if value not in ("", []))
    told = f"no export below {cfg.runs} is of {what}; run that stage first, or name it in init_from"
    if matching:
        listed = ", ".join(map(str, matching))
        told = f"{len(matching)} exports below {cfg.runs} are of {what}: {listed}; name one in init_from"
    raise UserError(told)
