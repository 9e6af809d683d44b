"""Folds: who trains, selects and tests; and which earlier stage a run starts from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from projects.vl2v_adip.build import fill
from projects.vl2v_adip.config import AlignConfig, DistillConfig, FoldConfig
from projects.vl2v_adip.folds import FACTS, choose, earlier_stage, facts_of
from projects.vl2v_adip.student import Student
from tests.projects.vl2v_adip.tiny import CLASSES, DOMAINS, config, domain_tree
from vlmkd import config as configs
from vlmkd.datasets.labelled_sets import load_set
from vlmkd.errors import UserError
from vlmkd.models.heads import Projector, TextClassifier

PROMPTS = ["a photo of a {}"]


def test_the_held_out_domain_is_never_trained_on_and_splits_depend_on_the_trial_alone(tmp_path: Path) -> None:
    dataset = load_set(f"domains:{domain_tree(tmp_path / 'tree')}")
    assert dataset.domains == list(DOMAINS)
    fold = choose(dataset, FoldConfig(test_domain="oil"))
    assert [fold.name(domain) for domain in fold.sources] == ["ink", "photo"]
    for split in fold.splits.values():
        assert (len(split.inside), len(split.out)) == (17, 4)  # floor(0.2 * 21)
        assert not {item.key for item in split.inside} & {item.key for item in split.out}
    other = choose(dataset, FoldConfig(test_domain="ink"))
    assert other.splits == fold.splits
    again = choose(dataset, FoldConfig(test_domain="oil", trial_seed=1))
    assert again.splits[0].out != fold.splits[0].out


def test_open_set_trains_on_seen_classes_and_tests_on_all(tmp_path: Path) -> None:
    dataset = load_set(f"domains:{domain_tree(tmp_path / 'tree')}")
    fold = choose(dataset, FoldConfig(test_domain="oil", seen_classes=2))
    for domain in fold.sources:
        assert {item.label for item in fold.splits[domain].inside} == {0, 1}
    assert {item.label for item in fold.splits[1].inside} == set(range(len(CLASSES)))
    with pytest.raises(UserError, match="fold.seen_classes is 3 of 3"):
        choose(dataset, FoldConfig(test_domain="oil", seen_classes=3))
    with pytest.raises(UserError, match="fold.test_domain is 'oyl'; .* has ink, oil, photo"):
        choose(dataset, FoldConfig(test_domain="oyl"))


def test_distill_finds_the_align_export_of_its_own_fold(tmp_path: Path) -> None:
    path = str(config(tmp_path))
    align = configs.load(AlignConfig, [path, "run_dir=a", f"runs={tmp_path}"])
    distill = configs.load(DistillConfig, [path, "run_dir=b", f"runs={tmp_path}"])

    def write(name: str, **changes: object) -> Path:
        folder = tmp_path / name / "export"
        folder.mkdir(parents=True)
        (folder / FACTS).write_text(json.dumps({**facts_of(align, "digest", PROMPTS), **changes}))
        return folder

    facts = facts_of(distill, "digest", PROMPTS)
    write("other_domain", test_domain="ink")
    write("other_trial", trial_seed=1)
    write("other_teacher", teacher="else")
    write("other_stage", method="one_stage")
    write("other_prompt", templates=["an art of a {}"])
    write("other_statistics", legacy_norm=True)
    with pytest.raises(UserError, match="no export below .* is of method align, .*test_domain oil"):
        earlier_stage(distill, facts)
    right = write("right")
    assert earlier_stage(distill, facts) == right
    write("twice")
    with pytest.raises(UserError, match="2 exports below .*right.*twice.*name one in init_from"):
        earlier_stage(distill, facts)
    for name, difference in (
        ("other_domain", "has test_domain 'ink', this run 'oil'"),
        ("other_prompt", r"has templates \['an art of a \{\}'\], this run \['a photo of a \{\}'\]"),
        ("other_statistics", "has legacy_norm True, this run False"),
    ):
        named = configs.load(DistillConfig, [path, "run_dir=b", f"init_from={tmp_path / name / 'export'}"])
        with pytest.raises(UserError, match=difference):
            earlier_stage(named, facts)


def test_distill_classifies_and_exports_by_the_class_vectors_of_its_loss() -> None:
    def student(vectors: torch.Tensor, seed: int) -> Student:
        torch.manual_seed(seed)
        return Student(nn.Linear(4, 4), TextClassifier(vectors, 10.0), Projector(4, 3))

    vectors = nn.functional.normalize(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    rounded = vectors.bfloat16().float()
    align = student(rounded, 1)
    distill = student(vectors, 2)
    fill(distill, align.state_dict(), "align")
    assert torch.equal(distill.backbone.weight, align.backbone.weight)
    assert torch.equal(distill.head.vectors, vectors) and not torch.equal(vectors, rounded)
    other = vectors.clone()
    other[2] = vectors[3]
    with pytest.raises(UserError, match="align has other class vectors than this run"):
        fill(student(other, 2), align.state_dict(), "align")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["method=align"], ["method is align", "train_align.py"]),
        (["method=erm"], ["teacher", "no effect with method=erm"]),
        (["teacher.model="], ["teacher", "is empty"]),
        (["method=simkd", "loss.image_weight=0.1"], ["loss.image_weight", "simkd"]),
        (["loss.legacy_kl=true"], ["loss.legacy_kl", "kd_kl"]),
        (["method=vl2v_sd"], ["student.backbone", "image tower"]),
        (["method=kd_kl", "fold.seen_classes=2"], ["fold.seen_classes", "kd_kl"]),
        (["evaluation.every_steps=0", "evaluation.phase=0"], ["evaluation.every_steps", "SWAD"]),
        (["deepspeed.zero_stage=3"], ["deepspeed.zero_stage"]),
        (["student.freeze_bn=false"], ["student.freeze_bn", "clean"]),
        (["select_from_step=9"], ["select_from_step", "steps=9"]),
        (["method=one_stage", "init_from=x"], ["init_from", "no effect"]),
    ],
)
def test_settings_that_would_be_ignored_are_refused(
    tmp_path: Path, arguments: list[str], parts: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        configs.load(DistillConfig, [str(config(tmp_path)), "run_dir=r", *arguments])
    assert all(part in str(caught.value) for part in parts), caught.value
