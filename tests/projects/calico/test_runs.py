"""Whole runs in the toy world: stage after stage, two processes as one, kill and resume, results and commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from projects.calico import eval_robust, evaluate, show_run
from projects.calico.build import task_of
from projects.calico.config import CalicoConfig
from projects.calico.evaluation.detection import read_submission
from projects.calico.evaluation.frames import SceneEvaluation
from projects.calico.evaluation.robust import CORRUPTIONS
from projects.calico.pretraining import Teacher
from scripts.table import read_spec
from tests.projects.calico.toy import ROOT, arguments
from tests.projects.calico.toy import scenes as toy_scenes
from tests.projects.zygote import Zygote
from vlmkd import config
from vlmkd.errors import UserError
from vlmkd.results import FILE, last_of, read_results

pytestmark = pytest.mark.slow
UNCHECKED = ("projects.calico.export:check",)
"""A fresh process costs seconds; one run has it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calico")
    toy_scenes(path / "scenes", 8)
    return path


class Runs:
    """Runs of a folder, each made once."""

    def __init__(self, folder: Path, zygote: Zygote) -> None:
        self.folder, self.zygote = folder, zygote

    def words(self, name: str, *parts: str, **fields: Any) -> list[str]:
        fields = {"steps": 4, "log__every_steps": 1, "run_dir": self.folder / "runs" / name, **fields}
        return arguments(self.folder / "scenes", *parts, **fields)

    def __call__(self, name: str, *parts: str, ranks: int = 1, checked: bool = False, **fields: Any) -> Path:
        run_dir = self.folder / "runs" / name
        if not (run_dir / "done.json").is_file():
            code, said = self.zygote.run(
                "projects.calico.train_stage", self.words(name, *parts, **fields), self.folder / f"{name}.txt",
                without=() if checked else UNCHECKED, ranks=ranks,
            )  # fmt: skip
            assert code == 0 and (run_dir / "done.json").is_file(), said
        return run_dir

    def prc(self) -> Path:
        return self("prc", "prc", batch_size=4)

    def rad(self) -> Path:
        return self("rad", "rad", batch_size=4, rad__teacher_ckpt=self.prc() / "export")

    def finetune(self) -> Path:
        """On the drives 0, 2, 4, 6, evaluated on all eight scenes."""
        return self(
            "finetune", "finetune", checked=True, batch_size=4, init__lidar=self.prc() / "export",
            init__camera=self.rad() / "export", evaluation__info=self.folder / "scenes",
        )  # fmt: skip


@pytest.fixture(scope="module")
def runs(folder: Path, zygote: Zygote) -> Runs:
    return Runs(folder, zygote)


def lines(run_dir: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == "train"]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "export" / "model.safetensors")


def test_stage_after_stage(runs: Runs, folder: Path) -> None:
    run_dir = runs.finetune()
    assert "lidar branch from" in (run_dir / "log.txt").read_text()
    (found,) = last_of(read_results(run_dir / FILE)).values()
    own = {metric: number for (dataset, metric), number in found.items() if dataset == "scenes"}
    assert {"nds", "map", "ate", "ap_car", "miou", "miou_at_50", "iou_road"} <= set(own)
    assert (own["map"].unit, own["map"].count, own["ate"].unit) == ("share", 8, "m")
    assert own["ave"].higher_is_better is False and own["miou"].main and own["miou"].unit == "share"
    assert own["nds"].tags | {"seed": 0} == {
        "seed": 0, "stage": "finetune", "modality": "lidar+camera", "start": "lidar+camera", "fraction": 50, "labels": "read"
    }  # fmt: skip
    made = json.loads((run_dir / "export" / "provenance.json").read_text())["calico"]
    assert made["stage"] == "finetune" and made["labels"] == "read"
    first = lines(runs.prc())[0]
    assert {"loss/prc", "plrc_positive_rank", "rapc_chance", "frames_per_s", "dropped_points"} <= set(first)
    assert (folder / "runs" / "rad" / "export" / "projectors.safetensors").is_file()


@pytest.mark.parametrize("stage", ["prc", "rad", "finetune"])
def test_two_processes_train_as_one(runs: Runs, stage: str) -> None:
    """The statistics of every norm and the means of every loss are those of the whole batch."""
    whole = {"prc": runs.prc, "rad": runs.rad, "finetune": runs.finetune}[stage]()
    fields: dict[str, Any] = {"batch_size": 4}
    if stage == "rad":
        fields["rad__teacher_ckpt"] = runs.prc() / "export"
    if stage == "finetune":
        fields |= {"init__lidar": runs.prc() / "export", "init__camera": runs.rad() / "export"}
        fields["evaluation__info"] = runs.folder / "scenes"
    both = runs(f"{stage}_two", stage, ranks=2, **fields)
    first = [next(iter(lines(run))) for run in (whole, both)]
    assert first[1]["loss"] == pytest.approx(first[0]["loss"], rel=1e-5)
    assert first[1]["grad_norm"] == pytest.approx(first[0]["grad_norm"], rel=1e-3)
    for one, two in zip(lines(whole), lines(both), strict=True):
        # A number that rounding takes over a ReLU's edge changes a gradient, and Adam what follows; torch's own BatchNorm
        # of one rank sums rows of channels in float32, which the last step shows most.
        apart = 1e-2 if one["step"] == 4 else 2e-3
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=0.05)
        for name in one:
            if name == "loss" or name.startswith("loss/"):
                assert two[name] == pytest.approx(one[name], rel=apart), (one["step"], name)
    if stage == "finetune":
        scores = [next(iter(last_of(read_results(run / FILE)).values())) for run in (whole, both)]
        assert scores[0].keys() == scores[1].keys()
        assert all(number.count in (0, 8) for number in scores[1].values())


@pytest.mark.parametrize("stage", ["rad", "finetune"])
def test_a_killed_run_goes_on_to_the_same_weights(runs: Runs, folder: Path, stage: str) -> None:
    fields: dict[str, Any] = {"steps": 12, "checkpoint__every_steps": 2}
    if stage == "rad":
        fields["rad__teacher_ckpt"] = runs.prc() / "export"
    whole = runs(f"{stage}_whole", stage, **fields)
    name = f"{stage}_broken"
    broken = folder / "runs" / name
    saved = (broken / "state" / "step_000004").exists
    runs.zygote.kill(
        "projects.calico.train_stage", runs.words(name, stage, **fields), folder / "killed.txt", saved
    )
    runs(name, stage, **fields)
    assert "resumed from" in (broken / "log.txt").read_text()
    found, wanted = weights(broken), weights(whole)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_the_commands_evaluate_a_finished_run(
    runs: Runs, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, out = runs.finetune(), folder / "out.jsonl"
    assert (
        evaluate.main([str(run_dir), "--results", str(out), "--submission", str(folder / "boxes.json")]) == 0
    )
    (again,) = last_of(read_results(out)).values()
    (before,) = last_of(read_results(run_dir / FILE)).values()
    for key, number in again.items():
        assert number.value == pytest.approx(before[key].value, abs=1e-4), key
    assert json.loads((folder / "boxes.json").read_text())["meta"]["use_camera"]
    with pytest.raises(UserError, match="has unknown 7 samples"):
        read_submission(folder / "boxes.json", ["000000"])
    with pytest.raises(UserError, match="run of stage=rad, which has no heads"):
        evaluate.main([str(runs.rad())])
    told = evaluate.parser("").parse_args([str(run_dir), "--root", "elsewhere"])
    assert evaluate.finished(told).cfg.evaluation.data_root == "elsewhere"
    with pytest.raises(UserError, match="is no finished run"):
        evaluate.main([str(folder)])
    with pytest.raises(UserError, match="--boxes .*boxes.json is a results file of nuScenes"):
        evaluate.main([str(run_dir), "--boxes", str(folder / "boxes.json")])
    assert "miou" in capsys.readouterr().out


def test_robustness_is_one_command(runs: Runs, folder: Path) -> None:
    run_dir, out = str(runs.finetune()), folder / "robust.jsonl"
    given = [
        run_dir,
        "--corruptions",
        "density",
        "image_noise",
        "--severities",
        "2",
        "--frames",
        "3",
        "--attacks",
    ]
    assert eval_robust.main([*given, "--results", str(out)]) == 0
    (found,) = last_of(read_results(out)).values()
    assert {dataset for dataset, _ in found} == {"scenes", "scenes density 2", "scenes image_noise 2"}
    assert eval_robust.main([*given, "200", "--scratch", str(out), "--results", str(out)]) == 0
    (found,) = last_of(read_results(out)).values()
    assert found["scenes", "mce"].value == pytest.approx(1.0)  # of itself
    assert found["scenes", "mce"].higher_is_better is False
    assert found["scenes spoofed by 200 points", "attack_success"].unit == "share"
    assert "density" in CORRUPTIONS


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--corruptions densty", "--corruptions names 'densty'; did you mean density"),
        ("--severities 7", "--severities holds 7; severities are 1 to 5"),
        ("--scratch nothing.jsonl", "nothing.jsonl does not exist"),
        ("--corruptions glare --severities 1 --scratch empty.jsonl", "--scratch has no NDS under glare 1"),
        ("--attacks 9", "no labelled vehicle has 10 to 9 points"),
    ],
)
def test_mistakes_are_told_before_hours_of_evaluation(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, told: str
) -> None:
    monkeypatch.setattr(SceneEvaluation, "run", lambda *_: pytest.fail("it was evaluated"))
    (tmp_path / "empty.jsonl").write_text("")
    run_dir = runs.finetune()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=told):
        eval_robust.main([str(run_dir), *words.split()])


def test_an_untrained_teacher_is_drawn_as_the_run_had_it(
    runs: Runs, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = runs("rad_untrained", "rad", rad__teacher_ckpt="untrained", seed=5)
    drawn: list[Teacher] = []
    monkeypatch.setattr(show_run, "Teacher", lambda cfg: drawn.append(Teacher(cfg)) or drawn[0])
    show_run.main([str(run_dir), "--out", str(folder / "untrained.html")])
    (own,) = task_of(config.load(CalicoConfig, [str(run_dir / "config.yaml")])).teachers
    assert all(torch.equal(value, own.state_dict()[name]) for name, value in drawn[0].state_dict().items())


def test_a_run_is_drawn(runs: Runs, folder: Path) -> None:
    for name, run_dir in (("rad", runs.rad()), ("finetune", runs.finetune())):
        assert (
            show_run.main(
                [str(run_dir), "--frame", "1", "--score", "0", "--out", str(folder / f"{name}.html")]
            )
            == 0
        )
        text = (folder / f"{name}.html").read_text()
        assert text.count("data:image/png") == 1 + 2 + 4
        assert ("features of the teacher, LiDAR" in text) == (name == "rad")
    with pytest.raises(UserError, match="is a run of stage=prc"):
        show_run.main([str(runs.prc())])


def test_features_are_drawn_the_way_that_the_car_drives() -> None:
    """A bright cell ahead and to the left is above the middle, on the left: +x, +y here; -x, +y in nuScenes."""
    for kind, cell in (("synthdrive", (30, 30)), ("nuscenes", (10, 30))):
        bev = torch.zeros(4, 40, 40)
        bev[:, cell[0], cell[1]] = 1
        picture = np.array(show_run.feature_picture(bev, kind, side=40)).astype(float).sum(2)
        bright = np.unravel_index(np.abs(picture - np.median(picture)).argmax(), picture.shape)
        assert bright[0] < 20 and bright[1] < 20, kind


def test_the_table_is_a_specification() -> None:
    assert read_spec(ROOT / "projects/calico/table.yaml").tables
