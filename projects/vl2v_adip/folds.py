"""Leave-one-domain-out: which images train, select and test; and the export of the earlier stage of the same fold.

`python -m projects.vl2v_adip.folds SET [ROOT]` prints the domains of a set, one a line, for scripts/run.sh.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from projects.vl2v_adip.config import CONTINUES, FoldConfig, Vl2vConfig
from vlmkd.config import require
from vlmkd.data.labelled import LabelledSet
from vlmkd.datasets.folders import ALL
from vlmkd.datasets.labelled_sets import items_of, load_set
from vlmkd.datasets.splits import DomainSplit, split_domains
from vlmkd.errors import UserError, run_tool
from vlmkd.files import read_object

FACTS = "fold.json"
"""File in an export that says which fold, student and teacher it is of."""


def tags_of(facts: Mapping[str, Any]) -> dict[str, str | int | float]:
    """What tables pivot a fold's results by."""
    return {name: facts[name] for name in ("set", "student", "method", "test_domain", "trial_seed")}


@dataclass(frozen=True)
class Fold:
    """The images of one held-out domain's run."""

    dataset: LabelledSet
    test_domain: int
    splits: dict[int, DomainSplit]
    """By domain index; of the source domains only seen classes."""

    @property
    def sources(self) -> list[int]:
        """The training domains."""
        return [domain for domain in self.splits if domain != self.test_domain]

    def name(self, domain: int) -> str:
        """The domain's name."""
        return self.dataset.domains[domain]


def choose(dataset: LabelledSet, cfg: FoldConfig) -> Fold:
    """The fold that `cfg` describes."""
    if len(dataset.domains) < 2:
        raise UserError(f"data set {dataset.name} has no domains; leave-one-domain-out needs at least two")
    require(
        cfg.test_domain in dataset.domains,
        "fold.test_domain",
        f"is {cfg.test_domain!r}; {dataset.name} has {', '.join(dataset.domains)}",
    )
    classes = len(dataset.class_names)
    require(
        0 <= cfg.seen_classes < classes, "fold.seen_classes", f"is {cfg.seen_classes} of {classes} classes"
    )
    held_out = dataset.domains.index(cfg.test_domain)
    splits = split_domains(items_of(dataset, ALL), cfg.trial_seed)
    for domain, split in splits.items() if cfg.seen_classes else ():
        if domain != held_out:
            parts = (split.inside, split.out)
            splits[domain] = DomainSplit(
                *([one for one in part if one.label < cfg.seen_classes] for part in parts)
            )
    return Fold(dataset, held_out, splits)


def facts_of(cfg: Vl2vConfig, teacher_digest: str, templates: Sequence[str]) -> dict[str, Any]:
    """What an export is of; two stages belong together when all but `method` agree.

    `templates` are the prompts of the class vectors; a method without a teacher has neither.
    """
    return {
        "method": cfg.method,
        "set": cfg.data.set,
        "test_domain": cfg.fold.test_domain,
        "trial_seed": cfg.fold.trial_seed,
        "seen_classes": cfg.fold.seen_classes,
        "student": f"{cfg.student.backbone}@{cfg.student.weights}"
        if cfg.student.weights
        else cfg.student.backbone,
        "image_size": cfg.student.image_size,
        "teacher": teacher_digest,
        "templates": list(templates),
        "legacy_norm": cfg.legacy_norm,
    }


def earlier_stage(cfg: Vl2vConfig, facts: Mapping[str, Any]) -> Path:
    """Export folder of the stage that this run starts from: `init_from`, or the matching one below `runs`.

    Raises:
        UserError: none or several match, or the named one is of another fold, student, teacher, prompt or statistics.
    """
    wanted = {**facts, "method": CONTINUES[cfg.method]}
    if cfg.init_from:
        folder = Path(cfg.init_from)
        if not (folder / FACTS).is_file():
            raise UserError(
                f"config field init_from: {folder} has no {FACTS}; name an export of this project"
            )
        found = read_object(folder / FACTS, "facts of an earlier stage")
        for name, value in wanted.items():
            if found.get(name) != value:
                raise UserError(
                    f"config field init_from: {folder} has {name} {found.get(name)!r}, this run {value!r}; name the "
                    f"{wanted['method']} export of the same fold, student, teacher and prompts"
                )
        return folder
    paths = sorted(Path(cfg.runs).glob(f"**/export/{FACTS}"))
    matching = [path.parent for path in paths if read_object(path, "facts of an earlier stage") == wanted]
    what = ", ".join(f"{name} {value}" for name, value in wanted.items() if value not in ("", []))
    if not matching:
        raise UserError(
            f"no export below {cfg.runs} is of {what}; run that stage first, or name it in init_from"
        )
    if len(matching) > 1:
        listed = ", ".join(map(str, matching))
        raise UserError(
            f"{len(matching)} exports below {cfg.runs} are of {what}: {listed}; name one in init_from"
        )
    return matching[0]


def main(argv: list[str]) -> int:
    """Print the domains of `SET [ROOT]`, for the scripts that go through them; returns the exit code."""
    if not 1 <= len(argv) <= 2:
        raise UserError("usage: python -m projects.vl2v_adip.folds SET [ROOT]")
    print("\n".join(load_set(*argv).domains))
    return 0


if __name__ == "__main__":
    run_tool(main)
