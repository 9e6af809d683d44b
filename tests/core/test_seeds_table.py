"""scripts/seeds_table.py: means, spreads and the steps that an arm needs, from run folders written by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]


def write_run(
    folder: Path, scores: dict[int, float], *, steps: int, model: str = "tiny.json", done: bool = True
) -> None:
    folder.mkdir(parents=True)
    config = {"steps": steps, "student": {"model": model}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    lines = [{"kind": "train", "step": steps, "loss": 1.0}]
    lines += [
        {"kind": "eval", "model": "student", "step": step, "birds/top1": score}
        for step, score in scores.items()
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    if done:
        (folder / "done.json").write_text(json.dumps({"step": steps}), encoding="utf-8")


def table(folder: Path, *options: str) -> tuple[int, list[list[str]], str]:
    """Exit code, cells of the table without its head, and what was written to stderr."""
    command = [sys.executable, str(ROOT / "scripts/seeds_table.py"), str(folder), *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in result.stdout.splitlines() if line.startswith("|")][2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return result.returncode, rows, result.stderr


def test_stages_before_count(tmp_path: Path) -> None:
    for seed, final in enumerate((0.30, 0.34)):
        write_run(tmp_path / f"scratch_s{seed}", {50: 0.1, 100: final}, steps=100)
        write_run(tmp_path / f"inherited_s{seed}", {10: 0.2, 25: 0.4, 100: 0.5}, steps=100)
        write_run(tmp_path / f"pruned_s{seed}_mask", {}, steps=30)
        export = f"local-dir:runs/elsewhere/pruned_s{seed}_mask/export"
        write_run(tmp_path / f"pruned_s{seed}", {20: 0.4, 70: 0.6}, steps=70, model=export)
        write_run(tmp_path / f"bad_s{seed}", {100: 0.32 if seed else 0.1}, steps=100)
    write_run(tmp_path / "scratch_s2", {100: 0.9}, steps=100, done=False)
    code, rows, _ = table(tmp_path, "--baseline", "scratch")
    assert code == 0
    by_name = {row[0]: row[2:] for row in rows}
    assert by_name["scratch"] == ["2", "100", "32.0 ± 2.8", "reached by 1 of 2"]
    assert by_name["inherited"] == ["2", "100", "50.0 ± 0.0", "25 (4.0 times fewer)"]
    assert by_name["pruned"] == ["2", "100", "60.0 ± 0.0", "50 (2.0 times fewer)"]
    assert by_name["bad"][-1] == "reached by 1 of 2"


def test_what_can_not_be_counted_is_told(tmp_path: Path) -> None:
    write_run(tmp_path / "pruned_s0", {70: 0.6}, steps=70, model="local-dir:runs/gone_s0/export")
    code, rows, error = table(tmp_path)
    assert (code, rows) == (2, []) and "gone_s0" in error and "Traceback" not in error
    code, rows, error = table(tmp_path / "nothing")
    assert (code, rows) == (2, []) and "no finished run" in error
