"""projects/promptkd/table.py on files as eval.py and runs write them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from projects.promptkd import table
from vlmkd.errors import UserError
from vlmkd.export.classifier import WEIGHTS

METRICS = ("base_top1", "novel_top1", "harmonic_mean")


def write_run(folder: Path, lines: list[dict], weight: float | None = None) -> None:
    folder.mkdir()
    text = "".join(json.dumps({"time": 0.0} | line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    if weight is not None:
        (folder / "export").mkdir()
        save_file({"projector": torch.tensor([1.0, weight])}, folder / "export" / WEIGHTS)


@pytest.fixture
def nano(tmp_path: Path) -> Path:
    for name, seeds in (("zero_shot_student", 1), ("zero_shot_teacher", 1), ("prompted_teacher", 1)):
        runs = [{"metrics": dict.fromkeys(METRICS, 0.25)} for _ in range(seeds)]
        (tmp_path / f"{name}.json").write_text(json.dumps({"runs": runs}), encoding="utf-8")
    runs = [{"metrics": dict(zip(METRICS, row, strict=True))} for row in ((0.4, 0.2, 0.26), (0.5, 0.3, 0.38))]
    (tmp_path / "distilled_student.json").write_text(json.dumps({"runs": runs}), encoding="utf-8")
    for seed, shift in ((1, 0.0), (2, 0.02)):
        lines = [
            {"kind": "eval", "model": "student", "step": step}
            | {f"emoji/{name}": value + shift for name in METRICS}
            for step, value in ((10, 0.1), (20, 0.3))
        ]
        write_run(tmp_path / f"student_s{seed}", lines)
    for name, seconds, weight in (("text_every_step", 0.6, 2.0), ("stored_class_vectors", 0.2, 2.5)):
        # The first line is slow: it holds the warm-up.
        steps = [
            {"kind": "train", "step": step, "step_s": seconds * (9 if step == 1 else 1)} for step in (1, 2, 3)
        ]
        write_run(tmp_path / name, steps, weight)
    return tmp_path


def test_three_tables(nano: Path, tmp_path: Path) -> None:
    out = tmp_path / "table.md"
    assert table.main([str(nano), "--markdown", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    assert "| prompted teacher | 1 | 25.00 | 25.00 | 25.00 |" in text
    assert "| distilled student | 2 | 45.00 ± 7.07 | 25.00 ± 7.07 | 32.00 ± 8.49 |" in text
    assert "| 1 | 11.00 ± 1.41 |" in text and "| 2 | 31.00 ± 1.41 |" in text
    assert "| text tower at every step | 0.600 |" in text
    assert "Ratio 3.00; largest difference of a weight at the end: 0.5." in text


def test_a_missing_evaluation_is_named(nano: Path) -> None:
    (nano / "zero_shot_teacher.json").unlink()
    with pytest.raises(
        UserError, match="zero_shot_teacher.json is missing; run projects/promptkd/scripts/nano.sh"
    ):
        table.main([str(nano)])
