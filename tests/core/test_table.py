"""scripts/table.py and the papers' specifications: means, spreads and steps, from run folders written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts.table import main, read_spec, sources_in, write_tables
from vlmkd.errors import UserError
from vlmkd.evaluation.base import Result
from vlmkd.results import FILE, Meaning, Number, numbers_of, parameters, share, write_results

ROOT = Path(__file__).resolve().parents[2]
MEANINGS = {"top1": share("top-1", main=True)}


def evaluation(
    model: str, step: int, dataset: str = "birds", *, tags: Any = None, **metrics: float
) -> list[Number]:
    meanings = {name: MEANINGS.get(name, share()) for name in metrics}
    result = Result("classification", dataset, metrics, 8, meanings=meanings)
    return numbers_of([result], run="run", model=model, tags=tags, step=step)


def write_run(
    folder: Path,
    numbers: list[Number],
    *,
    steps: int = 0,
    model: str = "tiny.json",
    done: bool = True,
    log: Any = (),
) -> None:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"steps": steps, "student": {"model": model}}))
    lines = [{"kind": "train", "step": step} | line for step, line in enumerate(log, start=1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_results(folder / FILE, numbers)
    if done:
        (folder / "done.json").write_text(json.dumps({"step": steps}))


def arm(folder: Path, scores: dict[int, float], *, steps: int, **options: Any) -> None:
    """A run of TinyCLIP's table."""
    numbers = [
        one
        for step, score in scores.items()
        for one in evaluation("student", step, top1=score, mean_per_class=0.5)
    ]
    numbers += evaluation("teacher strong", steps, top1=0.7) + [
        parameters(1_234_000, run="run", model="student")
    ]
    write_run(folder, numbers if scores else [], steps=steps, **options)


def tables(folder: Path, spec: str) -> str:
    return write_tables(read_spec(ROOT / spec), sources_in(folder))[0]


def cells(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_stages_before_count(tmp_path: Path) -> None:
    for seed, final in enumerate((0.30, 0.34)):
        arm(tmp_path / f"scratch_contrastive_s{seed}", {50: 0.1, 100: final}, steps=100)
        arm(tmp_path / f"inherited_s{seed}", {10: 0.2, 25: 0.4, 100: 0.5}, steps=100)
        arm(tmp_path / f"pruned_s{seed}_mask", {}, steps=30)
        export = f"local-dir:runs/elsewhere/pruned_s{seed}_mask/export"
        arm(tmp_path / f"pruned_s{seed}", {20: 0.4, 70: 0.6}, steps=70, model=export)
        arm(tmp_path / f"bad_s{seed}", {100: 0.32 if seed else 0.1}, steps=100)
    arm(tmp_path / "scratch_contrastive_s2", {100: 0.9}, steps=100, done=False)
    head, *rows = cells(tables(tmp_path, "projects/tinyclip/table.yaml"))
    title = "steps to scratch_contrastive's birds top-1"
    assert head == ["model", "params (M)", "seeds", "steps", "birds top-1", title]
    assert rows[0] == ["strong", "-", "", "", "70.0", ""]
    by_name = {row[0]: row[1:] for row in rows}
    assert by_name["scratch_contrastive"] == ["1.23", "2", "100", "32.0 ± 2.8", "reached by 1 of 2"]
    assert by_name["inherited"] == ["1.23", "2", "100", "50.0 ± 0.0", "25 (4.0 times fewer)"]
    assert by_name["pruned"] == ["1.23", "2", "100", "60.0 ± 0.0", "50 (2.0 times fewer)"]
    assert by_name["bad"][-1] == "reached by 1 of 2"


def test_what_can_not_be_counted_is_told(tmp_path: Path) -> None:
    arm(tmp_path / "scratch_contrastive_s0", {70: 0.6}, steps=70, model="local-dir:runs/gone_s0/export")
    with pytest.raises(UserError, match="gone_s0, which is gone"):
        tables(tmp_path, "projects/tinyclip/table.yaml")
    with pytest.raises(UserError, match="no finished run"):
        sources_in(tmp_path / "nothing")
    arm(tmp_path / "b/other_s0", {70: 0.6}, steps=70)
    with pytest.raises(UserError, match="baseline scratch_contrastive is none of the rows strong, other"):
        tables(tmp_path / "b", "projects/tinyclip/table.yaml")


def test_methods_by_labels(tmp_path: Path) -> None:
    for name, score, cosine in (
        ("dho_4shot_s0", 0.5, (0.1, 0.3)),
        ("dho_4shot_s1", 0.7, (0.4,)),
        ("ce_16shot_s0", 0.25, ()),
    ):
        log = [{"gradient_cosine/backbone": value} for value in cosine] + [{"loss": 1.0}]
        fitted = Result("heads", "emoji validation", {"top1": 0.9}, 5, chosen={"alpha": 0.5})
        numbers = numbers_of([fitted], run=name, model="student") + evaluation("student", 3, top1=score)
        write_run(tmp_path / name, numbers, log=log)
    (tmp_path / "unrelated.jsonl").write_text("")
    write_results(tmp_path / "teacher_zero_shot.jsonl", evaluation("teacher", 0, top1=0.192))
    text = tables(tmp_path, "projects/dho/table.yaml")
    assert "| test top-1 (%) | 4shot | 16shot |\n|---|---:|---:|\n" in text
    assert "| dho | 60.0 ± 14.1 | not run |" in text and "| ce | not run | 25.0 |" in text
    assert "| gradient cosine, backbone | 4shot |" in text and "| dho | 0.30 ± 0.14 |" in text
    assert "cosine, heads" not in text
    assert text.endswith("Teacher, zero-shot: 19.2 %.\n\nSeeds per cell: 1, 2.\n")
    (tmp_path / "other").mkdir()
    write_run(tmp_path / "other" / "a", evaluation("student", 3, top1=0.5))
    with pytest.raises(UserError, match="run projects/dho/scripts/nano.sh first"):
        tables(tmp_path / "other", "projects/dho/table.yaml")


METRICS = ("base_top1", "novel_top1", "harmonic_mean")


def test_files_of_evaluations_epochs_and_costs(tmp_path: Path) -> None:
    for name in ("zero_shot_student", "zero_shot_teacher", "prompted_teacher"):
        numbers = evaluation("clip:x", 0, tags={"seed": 1}, top1=0.1, **dict.fromkeys(METRICS, 0.25))
        write_results(tmp_path / f"{name}.jsonl", numbers, {})
    distilled = []
    for seed, values in ((1, (0.4, 0.2, 0.26)), (2, (0.5, 0.3, 0.38))):
        scores = dict(zip(METRICS, values, strict=True))
        distilled += evaluation(f"student_s{seed}", 0, tags={"seed": seed}, **scores)
    write_results(tmp_path / "distilled_student.jsonl", distilled)
    for seed, shift in ((1, 0.0), (2, 0.02)):
        by_step = ((10, 0.1), (20, 0.3))
        seen = [evaluation("student", step, **{m: value + shift for m in METRICS}) for step, value in by_step]
        write_run(tmp_path / f"student_s{seed}", [one for part in seen for one in part])
    for name, seconds in (("text_every_step", 0.6), ("stored_class_vectors", 0.2)):
        # The first line is slow: it holds the warm-up.
        log = [{"step_s": seconds * factor} for factor in (9, 1, 1)]
        write_run(tmp_path / name, evaluation("student", 3, base_top1=0.5), log=log)
    text = tables(tmp_path, "projects/promptkd/table.yaml")
    assert "| model | seeds | base | novel | harmonic mean |" in text
    assert "| prompted teacher | 1 | 25.00 | 25.00 | 25.00 |" in text
    assert "| distilled student | 2 | 45.00 ± 7.07 | 25.00 ± 7.07 | 32.00 ± 8.49 |" in text
    assert "| 1 | 11.00 ± 1.41 |" in text and "| 2 | 31.00 ± 1.41 |" in text
    assert "| text tower at every step | 0.600 | 3.00 |" in text
    (tmp_path / "zero_shot_teacher.jsonl").unlink()
    with pytest.raises(
        UserError, match="zero_shot_teacher is missing; run projects/promptkd/scripts/nano.sh"
    ):
        tables(tmp_path, "projects/promptkd/table.yaml")


def test_held_out_domains_and_their_average(tmp_path: Path) -> None:
    shares = {("art", 0): 0.5, ("art", 1): 0.7, ("photo", 0): 0.1, ("photo", 1): 0.2, ("art", 2): 0.9}
    for (domain, seed), score in shares.items():
        facts = {"set": "pacs", "student": "tiny", "method": "erm", "test_domain": domain, "trial_seed": seed}
        numbers: list[Number] = []
        for model in ("student", "best by source validation", "SWAD", "teacher big"):
            numbers += evaluation(model, 9, f"{domain}_in", tags=facts, top1=score)
            for number, other in enumerate(("art", "photo", "sketch")):
                source = 0.01 if other == domain else 0.1 * number
                numbers += evaluation(model, 9, f"{other}_out", tags=facts, top1=source)
        write_run(tmp_path / f"{domain}_t{seed}/erm", numbers)
    text = tables(tmp_path, "projects/vl2v_adip/table.yaml")
    assert text.startswith(
        "### pacs, tiny\n\n| method | selection | art | photo | average | seeds |\n|---|---|---:|"
    )
    assert "| zero-shot | teacher big | 70.0 ± 20.0 | 15.0 ± 7.1 | 37.5 ± 10.6 | 3 |" in text
    assert "| erm | iid | 70.0 ± 20.0 | 15.0 ± 7.1 | 37.5 ± 10.6 | 3 |" in text
    assert "| erm | SWAD (inD) | 15.0 ± 0.0 | 10.0 ± 0.0 | 12.5 ± 0.0 | 3 |" in text


def test_any_folder_has_a_table_and_a_metric_brings_its_unit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, speed in ((0, 20.0), (1, 30.0)):
        meanings = {"speed": Meaning("tokens per second", "1/s", higher_is_better=True)}
        result = Result("clock", "chat", {"speed": speed}, 7, chosen={"alpha": 1.0}, meanings=meanings)
        write_run(tmp_path / f"a_s{seed}", numbers_of([result], run="a", model="student", step=5))
    assert main([str(tmp_path), "--json", str(tmp_path / "out.json")]) == 0
    shown = capsys.readouterr().out
    assert (
        "| model | params (M) | seeds | chat tokens per second |" in shown
        and "| a | - | 2 | 25 ± 7.071 |" in shown
    )
    first = json.loads((tmp_path / "out.json").read_text())[0]
    assert (first["value"], first["unit"], first["run"]) == (20.0, "1/s", str(tmp_path / "a_s0"))


def test_mistakes_of_a_specification_and_old_runs_are_told(tmp_path: Path) -> None:
    spec = tmp_path / "table.yaml"
    for content, message in (
        (
            {"tables": [{"rows": {"a": "{run}"}, "columns": "x", "scores": [], "colums": 1}]},
            "unknown config field tables.0.colums; did you mean tables.0.columns",
        ),
        ({"tables": [{"rows": {"a": "{run}"}}]}, "columns"),
        (
            {"tables": [{"rows": {}, "columns": "x", "scores": [], "before": ["size"]}]},
            r"before\.0 is 'size'; it must be one of parameters",
        ),
        (  # YAML's yes without quotes
            {"tables": [{"rows": {}, "columns": "x", "scores": [{"tags": {"set": True}}]}]},
            r"tables\.0\.scores\.0\.tags\.set is 'True'; it must be text",
        ),
    ):
        spec.write_text(yaml.safe_dump(content))
        with pytest.raises(UserError, match=message):
            read_spec(spec)
    (tmp_path / "old/eval").mkdir(parents=True)
    (tmp_path / "old/done.json").write_text("{}")
    (tmp_path / "old/eval/results.json").write_text("{}")
    with pytest.raises(UserError, match="is of an earlier version"):
        sources_in(tmp_path)
    spec.write_text(
        yaml.safe_dump(
            {"tables": [{"rows": {"a": "{arm}"}, "columns": "x", "scores": [{"where": {"metric": "top1"}}]}]}
        )
    )
    write_run(tmp_path / "new/run", evaluation("student", 3, top1=0.5))
    with pytest.raises(
        UserError, match=r"names the tag \{arm\}; its numbers have dataset, evaluator, exported"
    ):
        write_tables(read_spec(spec), sources_in(tmp_path / "new"))
