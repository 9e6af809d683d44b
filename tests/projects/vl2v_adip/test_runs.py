"""Whole runs on a tiny domain tree: every method, both exports, kill and resume, table."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_tools.embed_labelled import embed_items
from projects.vl2v_adip.config import FROZEN_BACKBONE, WITHOUT_TEACHER, DistillConfig
from projects.vl2v_adip.folds import FACTS
from projects.vl2v_adip.task import BEST, BEST_EXPORT, SWAD
from scripts.table import Pivot, read_spec, scores_of, sources_in
from tests.projects.vl2v_adip.tiny import config, domain_tree, export_teacher
from tests.projects.zygote import Zygote
from vlmkd.data.teacher_outputs import CLEAN
from vlmkd.datasets.labelled_sets import load_set
from vlmkd.errors import UserError
from vlmkd.models.class_vectors import encode_classes
from vlmkd.models.clip import load_clip
from vlmkd.models.towers import ClipPredictor
from vlmkd.results import FILE, last_of, read_results

SPEC = Path(__file__).parents[3] / "projects/vl2v_adip/table.yaml"
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images and configs that all tests of this file share, and the runs that build on each other."""
    path = tmp_path_factory.mktemp("vl2v")
    domain_tree(path / "tree")
    export_teacher(path)
    return path


@pytest.fixture(scope="module")
def run(folder: Path, zygote: Zygote) -> Callable[..., Path]:
    """`run(METHOD, FIELD=VALUE ...)` is a whole run of the method's script; it returns the run's folder.

    `verified`: the exports are reloaded in a fresh process, which takes seconds.
    """

    def start(method: str, *overrides: str, name: str = "", verified: bool = False, ranks: int = 1) -> Path:
        name = name or method
        run_dir = folder / "runs" / name
        arguments = [str(config(folder)), f"run_dir={run_dir}", f"method={method}"]
        if method in WITHOUT_TEACHER:
            arguments.append("teacher.model=")
        code, output = zygote.run(
            f"projects.vl2v_adip.train_{'align' if method in FROZEN_BACKBONE else 'distill'}",
            [*arguments, *overrides],
            folder / f"{name}.txt",
            without=() if verified else ("projects.vl2v_adip.task:verify_classifiers",),
            ranks=ranks,
        )
        assert code == 0 and (run_dir / "done.json").is_file(), output
        return run_dir

    return start


def weights(run_dir: Path, export: str = "export") -> dict[str, torch.Tensor]:
    return load_file(run_dir / export / "model.safetensors")


def changed(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> set[str]:
    """Parts of the student of which any tensor differs."""
    return {name.partition(".")[0] for name in first if not torch.equal(first[name], second[name])}


def test_align_then_distill_then_the_table(run, folder: Path) -> None:
    align = run("align", "steps=5")
    assert not (align / BEST_EXPORT).exists()
    distill = run("distill", verified=True)
    for export in ("export", BEST_EXPORT):
        assert (
            json.loads((distill / export / "provenance.json").read_text())["vl2v_adip"]["method"] == "distill"
        )
    assert f"started from {align / 'export'}" in (distill / "log.txt").read_text()
    # Distill moves the backbone behind Align's projector; BatchNorm's statistics never move.
    assert changed(weights(align), weights(distill)) == {"backbone"}
    assert changed(weights(align), weights(distill, BEST_EXPORT)) == {"backbone"}
    assert changed(weights(distill), weights(distill, BEST_EXPORT)) == {"backbone"}
    statistics = [name for name in weights(align) if "running" in name]
    assert statistics and all(
        torch.equal(weights(align)[name], weights(distill)[name]) for name in statistics
    )

    results = last_of(read_results(distill / FILE))
    names = {model: {dataset for dataset, _ in found if dataset} for model, found in results.items()}
    assert {"student", BEST, SWAD} < set(names)
    assert names.pop("student") == {"ink_out", "photo_out"}  # the held-out domain judges what was selected
    assert all(found == {"ink_out", "photo_out", "oil_in", "oil_out"} for found in names.values())
    models = json.loads((distill / "eval" / "models.json").read_text())
    assert (models["exported"], models["selections"]) == (SWAD, [BEST, SWAD])
    target = json.loads((distill / "eval" / "details.json").read_text())[SWAD]["oil_in"]
    count = results[SWAD]["oil_in", "top1"].count
    assert sum(number for *_, number in target["confusion"]) == count == 17  # 80 % of 21
    shown = json.loads((distill / "eval" / "mistakes.json").read_text())["oil_in"]
    assert [mistake["key"] for mistake in shown] == [mistake["key"] for mistake in target["mistakes"]]
    lines = [json.loads(line) for line in (distill / "metrics.jsonl").read_text().splitlines()]
    during = [line for line in lines if line["kind"] == "eval" and line["model"] == "student"]
    assert [line["step"] for line in during[:4]] == [1, 3, 5, 7]
    assert not any("oil_in/top1" in line for line in during)

    (pivot,) = [
        Pivot(table, scores_of(table, sources_in(folder / "runs"))) for table in read_spec(SPEC).tables
    ]
    by_row = {row: cell["0"] for (row, _), cell in pivot.cells.items()}
    top1 = {dataset: one.value for (dataset, metric), one in results[SWAD].items() if metric == "top1"}
    assert by_row["distill", "SWAD"] == pytest.approx(top1["oil_in"])
    assert by_row["distill", "SWAD (inD)"] == pytest.approx((top1["ink_out"] + top1["photo_out"]) / 2)
    assert "| distill | SWAD | " in pivot.markdown()
    facts = json.loads((distill / "export" / FACTS).read_text())
    assert (facts["method"], facts["test_domain"], facts["trial_seed"]) == ("distill", "oil", 0)


def test_a_killed_run_goes_on_to_the_same_weights(run, folder: Path, zygote: Zygote) -> None:
    if not (folder / "runs" / "align" / "done.json").exists():
        run("align", "steps=5")
    overrides = ["checkpoint.every_steps=2", "swad.n_tolerance=3", "steps=25"]
    whole = run("distill", *overrides, name="whole")
    broken = folder / "runs" / "broken"
    arguments = [str(config(folder)), f"run_dir={broken}", "method=distill", *overrides]
    saved = (broken / "state" / "step_000006").exists
    zygote.kill("projects.vl2v_adip.train_distill", arguments, folder / "killed.txt", saved)
    run("distill", *overrides, name="broken")
    assert "resumed from" in (broken / "log.txt").read_text()
    for export in ("export", BEST_EXPORT):
        assert not changed(weights(whole, export), weights(broken, export)), export


def test_a_run_that_its_valley_ended_ends_there_again(run) -> None:
    # Converged at once, and dead at the first evaluation with a higher loss.
    overrides = ["steps=40", "optim.lr=1.0", "checkpoint.every_steps=1", "swad.n_converge=1", "swad.n_tolerance=1",
                 "swad.tolerance_ratio=0"]  # fmt: skip
    run_dir = run("kd_image", *overrides, name="dead")
    end = json.loads((run_dir / "done.json").read_text())["step"]
    assert 1 < end < 40 and end % 2
    before = [weights(run_dir, export) for export in ("export", BEST_EXPORT)]
    for lost in ("the results", "the last checkpoint too"):
        (run_dir / "done.json").unlink()
        for folder in ("export", BEST_EXPORT, "eval"):
            shutil.rmtree(run_dir / folder)
        if lost != "the results":
            shutil.rmtree(run_dir / "state" / f"step_{end:06d}")
        run("kd_image", *overrides, name="dead")
        assert json.loads((run_dir / "done.json").read_text())["step"] == end, lost
        for old, export in zip(before, ("export", BEST_EXPORT), strict=True):
            assert not changed(old, weights(run_dir, export)), lost


def test_half_precision_keeps_and_averages_the_master_weights(run) -> None:
    half = ["deepspeed.precision=bf16", "student.backbone=timm:test_vit"]
    run_dir = run("one_stage", "steps=4", *half, name="half")
    for export in ("export", BEST_EXPORT):
        trained = {
            name: w
            for name, w in weights(run_dir, export).items()
            if name.startswith(("backbone", "projector"))
        }
        rounded = [name for name, weight in trained.items() if torch.equal(weight, weight.bfloat16().float())]
        assert not rounded, (export, rounded)


@pytest.mark.parametrize(
    ("method", "trained"),
    [
        ("one_stage", {"backbone", "projector"}),
        ("kd_image", {"backbone", "projector"}),
        ("kd_text", {"backbone", "projector"}),
        ("simkd", {"backbone", "projector"}),
        ("kd_kl", {"backbone", "head"}),
        ("kd_cos", {"backbone", "head"}),
        ("erm", {"backbone", "head"}),
        ("miro", {"backbone", "head"}),
    ],
)
def test_every_baseline_trains_its_own_parts(run, method: str, trained: set[str]) -> None:
    # The best of a run that is only evaluated at step 0 against the last step of one that goes on.
    first = run(method, "steps=1", "select_from_step=0", "swad.enabled=false", name=f"{method}_1")
    later = run(method, "steps=3", "select_from_step=2", "swad.enabled=false", name=f"{method}_3")
    assert changed(weights(first), weights(later)) == trained


def test_lp_ft_starts_from_the_linear_probe(run, folder: Path) -> None:
    probe = run("lp", "steps=3")
    tuned = run("lp_ft", "steps=3", "swad.enabled=false")
    assert f"started from {probe / 'export'}" in (tuned / "log.txt").read_text()
    assert changed(weights(probe), weights(tuned)) == {"backbone", "head"}


def test_the_teachers_own_tower_is_tuned_without_a_projector(run, folder: Path) -> None:
    teacher = f"local-dir:{folder / 'teacher'}"
    run_dir = run(
        "vl2v_sd",
        f"student.backbone=clip:{teacher}",
        "student.image_size=0",
        "student.pretrained=true",
        "steps=3",
        "swad.semantics=clean",
    )
    assert {name.partition(".")[0] for name in weights(run_dir)} == {"backbone", "head"}


def test_open_set_reports_seen_unseen_and_their_harmonic_mean(run) -> None:
    run_dir = run("one_stage", "steps=3", "fold.seen_classes=2", "swad.enabled=false", name="open")
    found = {
        one.metric: one
        for one in last_of(read_results(run_dir / FILE))[BEST].values()
        if one.dataset == "oil_in"
    }
    assert {"base_top1", "novel_top1", "harmonic_mean"} <= found.keys()
    # The argmax is over all classes, so that seen and unseen together are the top-1.
    groups = json.loads((run_dir / "eval" / "details.json").read_text())[BEST]["oil_in"]["per_group"]
    assert sum(right for right, _ in groups.values()) / found["top1"].count == found["top1"].value


@pytest.fixture(scope="module")
def stored(folder: Path) -> list[str]:
    """Fields of a run whose teacher's image embeddings are stored; beside them lie class vectors of the same teacher."""
    clip = load_clip(f"local-dir:{folder / 'teacher'}")
    encoder, dataset = ClipPredictor.of(clip), load_set(f"domains:{folder / 'tree'}")
    embed_items(
        encoder, dataset.splits["all"], folder / "clean", name="tree", source=clip.source, digest=clip.digest,
        views=CLEAN, view_count=1,
    )  # fmt: skip
    vectors = encode_classes(encoder, dataset.class_names, dataset.templates, teacher_digest=clip.digest)
    vectors.save(folder / "classes.safetensors")
    return [f"data.teacher_outputs={folder / 'clean'}", "data.teacher_view=clean"]


def teacher_results(run_dir: Path) -> dict[str, object]:
    found = last_of(read_results(run_dir / FILE)).items()
    values = {
        model: {key: one.value for key, one in numbers.items() if one.dataset} for model, numbers in found
    }
    return {model: numbers for model, numbers in values.items() if model.startswith("teacher") and numbers}


def test_a_teacher_without_weights_needs_stored_outputs_and_class_vectors(
    run, folder: Path, stored: list[str]
) -> None:
    without_weights = ["teacher.model=", f"teacher.class_vectors={folder / 'classes.safetensors'}"]
    run_dir = run(
        "one_stage", "steps=3", "swad.enabled=false", *stored, *without_weights, name="stored_alone"
    )
    assert teacher_results(run_dir) == {}


def test_a_teacher_that_is_named_is_tested_however_it_teaches(run, stored: list[str]) -> None:
    loaded = run("one_stage", "steps=3", "swad.enabled=false", name="teacher_loaded")
    replayed = run("one_stage", "steps=3", "swad.enabled=false", *stored, name="teacher_stored")
    assert teacher_results(loaded) and teacher_results(replayed) == teacher_results(loaded)
    untested = run(
        "one_stage", "steps=3", "swad.enabled=false", "evaluation.teacher=false", *stored, name="untested"
    )
    assert teacher_results(untested) == {}


def test_two_ranks_train_and_select_like_one(run) -> None:
    overrides = ["steps=5", "swad.n_tolerance=3", "batch_size=8"]
    one, two = (run("one_stage", *overrides, name=f"ranks_{ranks}", ranks=ranks) for ranks in (1, 2))
    for export in ("export", BEST_EXPORT):
        first, second = weights(one, export), weights(two, export)
        for name, value in first.items():
            torch.testing.assert_close(second[name], value, rtol=0, atol=2e-5, msg=f"{export} {name}")


def test_half_precision_with_batch_norm_is_refused(folder: Path) -> None:
    from projects.vl2v_adip.build import job
    from vlmkd import config as configs

    cfg = configs.load(DistillConfig, [str(config(folder)), "run_dir=x", "deepspeed.precision=bf16"])
    with pytest.raises(UserError, match="deepspeed.precision is bf16, but timm:test_resnet has BatchNorm"):
        job(cfg)


def test_legacy_norm_feeds_imagenets_statistics_to_both(folder: Path) -> None:
    from projects.vl2v_adip.build import IMAGENET, load_teacher, student_backbone
    from vlmkd import config as configs

    cfg = configs.load(DistillConfig, [str(config(folder)), "run_dir=x", "legacy_norm=true"])
    _, clip = load_teacher(cfg, load_set(cfg.data.set))
    assert clip is not None
    assert clip.image_spec.mean == student_backbone(cfg).image_spec.mean == IMAGENET["mean"]
