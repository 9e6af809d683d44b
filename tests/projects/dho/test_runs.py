"""Whole runs in processes of their own: dual head and a baseline, an exact resume, and an export that answers alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from projects.dho import table
from projects.dho.config import SplitConfig, TeacherConfig, TipAdapterConfig
from projects.dho.teacher import load_teacher
from projects.dho.train_tip_adapter import train
from tests.projects.dho.tiny_runs import CLASSES, Runs
from vlmkd.classifier_export import load_classifier
from vlmkd.config import LabelledDataConfig
from vlmkd.errors import UserError

pytestmark = pytest.mark.slow


def lines(run_dir: Path) -> list[dict]:
    """Train lines of metrics.jsonl without what depends on the clock."""
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            k: v
            for k, v in line.items()
            if k.startswith(("loss/", "gradient_cosine/")) or k in ("loss", "step", "lr")
        }
        for line in found
    ]


def results(run_dir: Path) -> dict[str, dict]:
    """Metrics of the final evaluation by model and evaluator."""
    stored = json.loads((run_dir / "eval" / "results.json").read_text())
    return {f"{model} {item['name']}": item["metrics"] for model, items in stored.items() for item in items}


def test_dual_head_run_resumes_exactly_after_a_kill(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    student = {"backbone": f"clip:{tmp_path / 'student.json'}", "pretrained": False, "kd_head": "cosine"}
    config = runs.config(
        "dho", steps=12, grad_cosine_every=3, student={**student, "batch_norm_statistics": "separate"}
    )
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    code, output = runs.finish(config, f"run_dir={whole}")
    assert code == 0 and "reloaded in a fresh process with equal outputs" in output, output
    runs.kill((broken / "state" / "step_000004").exists, config, f"run_dir={broken}")
    code, output = runs.finish(config, f"run_dir={broken}")
    assert code == 0 and "resumed from" in output, output
    assert lines(whole) == lines(broken)
    one, other = (load_file(folder / "export" / "model.safetensors") for folder in (whole, broken))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

    first = lines(whole)[0]
    assert first["loss"] == pytest.approx(first["loss/ce"] + first["loss/kd"], rel=1e-5)
    assert -1 <= first["gradient_cosine/backbone"] <= 1
    assert first["gradient_cosine/heads"] == 0.0  # no parameter of a head is shared
    found = results(whole)
    heads = found["student heads"]
    assert set(heads) == {"ce_top1", "kd_top1", "top1", "alpha", "beta"}
    assert heads["top1"] >= max(heads["ce_top1"], heads["kd_top1"])
    assert 0 <= found["student classification"]["top1"] <= 1
    assert "teacher " in " ".join(found)
    classifier = load_classifier(whole / "export")
    assert classifier.class_names == sorted(CLASSES)
    assert classifier.mix is not None
    assert classifier.classify(torch.zeros(2, 3, 32, 32)).exp().sum(1).tolist() == pytest.approx([1, 1])


@pytest.mark.parametrize("method", ["ce", "pcgrad", "kd_feature", "ce_kd_feature"])
def test_baselines_train_and_export(tmp_path: Path, method: str) -> None:
    runs = Runs(tmp_path)
    fields: dict = {
        "loss": {"method": method},
        "selection": "last",
        "steps": 2,
        "evaluation": {"every_steps": 0},
    }
    if method == "ce":
        fields["teacher"] = {}
    code, output = runs.finish(runs.config(method, **fields), f"run_dir={tmp_path / 'run'}")
    assert code == 0, output
    terms = {name for name in lines(tmp_path / "run")[0] if name.startswith("loss/")}
    expected = {"ce": {"loss/ce"}, "pcgrad": {"loss/ce", "loss/kd"}, "kd_feature": {"loss/feature"}}
    assert terms == expected.get(method, {"loss/ce", "loss/feature"})
    stored = load_file(tmp_path / "run" / "export" / "model.safetensors")
    assert any(name.startswith("projector.") for name in stored) == (method == "kd_feature")


def test_a_few_shot_teacher_is_trained_and_teaches(tmp_path: Path) -> None:
    """The Tip-Adapter of a random CLIP, in this process; a student's config takes its file."""
    runs = Runs(tmp_path)
    values = runs.values()
    cfg = TipAdapterConfig(
        run_dir=str(tmp_path / "tip"),
        data=LabelledDataConfig(**values["data"]),
        split=SplitConfig(**values["split"]),
        teacher=TeacherConfig(**values["teacher"]),
        cache_passes=2,
        epochs=3,
        batch_size=4,
    )
    torch.manual_seed(0)  # the CLIP is drawn from torch's random state, as it has no weights
    file = train(cfg)
    facts = json.loads(file.with_suffix(".json").read_text())
    assert facts["class_names"] == sorted(CLASSES) and facts["shots"] == 2
    assert facts["validation_top1_searched"] >= 0.25
    content = torch.load(file, weights_only=True)
    assert content["cache_values"].tolist() == torch.eye(3).repeat_interleave(2, 0).tolist()
    torch.manual_seed(0)
    teacher = load_teacher(
        TeacherConfig(**values["teacher"], adapter=str(file)),
        sorted(CLASSES),
        ["{}"],
        outputs="",
        duplicates=False,
    )
    assert teacher.logits(torch.eye(16)[:4]).shape == (4, 3)
    assert train(cfg) == file  # a finished one is left as it is
    with pytest.raises(UserError, match="class 0"):
        load_teacher(
            TeacherConfig(**values["teacher"], adapter=str(file)),
            ["a", "b", "c"],
            ["{}"],
            outputs="",
            duplicates=False,
        )


def test_table_has_one_row_per_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, score, cosine in (
        ("dho_4shot_s0", 0.5, 0.2),
        ("dho_4shot_s1", 0.7, 0.4),
        ("ce_16shot_s0", 0.25, None),
    ):
        run = tmp_path / name
        (run / "eval").mkdir(parents=True)
        (run / "done.json").write_text("{}")
        test = {"name": "classification", "dataset": "emoji", "metrics": {"top1": score}}
        (run / "eval" / "results.json").write_text(json.dumps({"student": [test]}))
        line = {} if cosine is None else {"gradient_cosine/backbone": cosine}
        (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert table.main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "| dho | 60.0 ± 14.1 | not run |" in shown and "| ce | not run | 25.0 |" in shown
    assert "| dho | 0.30 ± 0.14 |" in shown
    assert table.main([str(tmp_path / "nothing")]) == 2
