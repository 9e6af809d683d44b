"""Whole runs: both heads and the baselines, every kind of teacher, an exact resume, and exports that answer alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_tools.embed_labelled import embed_items
from projects.dho import eval as evaluation
from projects.dho.config import DhoConfig, SplitConfig, TeacherConfig, TipAdapterConfig
from projects.dho.teacher import load_teacher
from projects.dho.train_tip_adapter import train
from tests.projects.dho.tiny_runs import CLASSES, Runs
from tests.projects.zygote import Zygote
from vlmkd.config import LabelledDataConfig
from vlmkd.config import load as load_config
from vlmkd.data.samples import view_config
from vlmkd.datasets.labelled_sets import load_set
from vlmkd.errors import UserError
from vlmkd.export.classifier import load_classifier
from vlmkd.models.class_vectors import encode_classes
from vlmkd.models.clip import load_clip
from vlmkd.models.towers import ClipPredictor
from vlmkd.page.report import columns_of, read_run, rows_of
from vlmkd.results import FILE, latest, read_results

pytestmark = pytest.mark.slow
SHORT = {"selection": "last", "steps": 2, "evaluation": {"every_steps": 0, "batch_size": 16}}
"""Fields of a run that is only to get through."""


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
    found: dict[str, dict] = {}
    for one in latest(read_results(run_dir / FILE)):
        if one.dataset and not one.fitted:
            found.setdefault(f"{one.model} {one.evaluator}", {})[one.metric] = one.value
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> Runs:
    """Images and CLIPs that all tests of this file share."""
    return Runs(tmp_path_factory.mktemp("dho"), zygote)


@pytest.fixture(scope="module")
def dual(runs: Runs) -> Path:
    """Config of the run that several tests look at."""
    student = {"backbone": f"clip:{runs.student}", "kd_head": "cosine", "batch_norm_statistics": "separate"}
    return runs.config("dho", steps=12, grad_cosine_every=3, student=student)


@pytest.fixture(scope="module")
def whole(runs: Runs, dual: Path) -> Path:
    """Folder of that run, whose export was reloaded in a fresh process."""
    code, output = runs.train(dual, f"run_dir={runs.folder / 'whole'}", verified=True)
    assert code == 0 and "reloaded in a fresh process with equal outputs" in output, output
    assert f"teacher {runs.teacher}: " in output and "images right before the run" in output
    return runs.folder / "whole"


def test_a_dual_head_run_reports_both_heads_and_exports_their_mixture(whole: Path) -> None:
    first = lines(whole)[0]
    assert first["loss"] == pytest.approx(first["loss/ce"] + first["loss/kd"], rel=1e-5)
    assert -1 <= first["gradient_cosine/backbone"] <= 1
    assert first["gradient_cosine/heads"] == 0.0  # no parameter of a head is shared
    found = results(whole)
    heads = found["student heads"]
    assert set(heads) == {"ce_top1", "kd_top1", "top1"}
    assert heads["top1"] >= max(heads["ce_top1"], heads["kd_top1"])
    run = read_run(whole)
    assert not {"alpha", "beta"} & {one.metric for one in columns_of(rows_of([run]))}
    (chosen,) = run.fitted.values()
    alpha, beta = (one.value for one in chosen)
    assert (alpha, beta) == load_classifier(whole / "export").mix
    assert f"alpha {alpha:g}, beta {beta:g}." in (whole / "report.html").read_text()
    assert 0 <= found["best classification"]["top1"] <= 1
    assert "teacher " in " ".join(found)
    classifier = load_classifier(whole / "export")
    assert classifier.class_names == sorted(CLASSES)
    assert classifier.mix is not None
    assert classifier.classify(torch.zeros(2, 3, 32, 32)).exp().sum(1).tolist() == pytest.approx([1, 1])


def test_a_killed_run_goes_on_to_the_same_weights(runs: Runs, dual: Path, whole: Path) -> None:
    broken = runs.folder / "broken"
    runs.kill((broken / "state" / "step_000004").exists, dual, f"run_dir={broken}")
    code, output = runs.train(dual, f"run_dir={broken}")
    assert code == 0 and "resumed from" in output and "before the run" not in output, output
    assert lines(whole) == lines(broken)
    one, other = (load_file(folder / "export" / "model.safetensors") for folder in (whole, broken))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_micro_batches_make_the_same_steps(runs: Runs) -> None:
    """Both streams are shared out, so that the mean of the parts' losses is the whole batch's; a ViT has no BatchNorm."""
    student = {"backbone": f"clip:{runs.student}", "kd_head": "cosine"}
    config = runs.config("parts", **{**SHORT, "steps": 4}, student=student)
    found = []
    for micro in (0, 4, 2):
        run_dir = runs.folder / f"parts_{micro}"
        code, output = runs.train(config, f"run_dir={run_dir}", f"micro_batch_size={micro}")
        assert code == 0, output
        found.append([line["loss"] for line in lines(run_dir) if "loss" in line])
    assert len(found[0]) == 4
    assert found[1] == pytest.approx(found[0], rel=1e-4) and found[2] == pytest.approx(found[0], rel=1e-4)


def test_the_evaluation_command_agrees_with_the_run(
    runs: Runs, whole: Path, zygote: Zygote, capsys: pytest.CaptureFixture[str]
) -> None:
    out, arguments = runs.folder / "eval.jsonl", ["--model", str(whole / "export"), "--set", runs.data]
    code, said = zygote.run(
        "projects.dho.eval", [*arguments, "--results", str(out)], runs.folder / "eval.txt"
    )
    assert code == 0, said
    answers = {one.tags["answer"]: one for one in read_results(out) if one.metric == "top1"}
    assert answers.keys() == {"mixed", "ce", "kd"}
    tested = results(whole)["best classification"]
    assert answers["mixed"].value == pytest.approx(tested["top1"])
    assert (answers["mixed"].tags["alpha"], answers["mixed"].tags["beta"]) == load_classifier(
        whole / "export"
    ).mix

    # The search on the run's own validation images finds what the run found for the weights that it kept.
    assert evaluation.main([*arguments, "--search", "val"]) == 0
    kept = json.loads((whole / "export" / "provenance.json").read_text())["dho"]["validation_top1"]
    assert f"images val {kept:.4f}" in capsys.readouterr().out
    with pytest.raises(UserError, match="is the split that is reported"):
        evaluation.main([*arguments, "--search", "test"])


@pytest.mark.parametrize("method", ["ce", "kd", "pcgrad", "kd_feature", "ce_kd_feature"])
def test_baselines_train_and_export(runs: Runs, method: str) -> None:
    fields: dict = {"loss": {"method": method}, **SHORT}
    if method == "ce":
        fields["teacher"] = {}
    if method in ("kd", "kd_feature"):
        fields["split"] = {"validation": "val"}
    run_dir = runs.folder / method
    code, output = runs.train(runs.config(method, **fields), f"run_dir={run_dir}")
    assert code == 0, output
    terms = {name for name in lines(run_dir)[0] if name.startswith("loss/")}
    expected = {
        "ce": {"loss/ce"},
        "kd": {"loss/kd"},
        "pcgrad": {"loss/ce", "loss/kd"},
        "kd_feature": {"loss/feature"},
    }
    assert terms == expected.get(method, {"loss/ce", "loss/feature"})
    stored = load_file(run_dir / "export" / "model.safetensors")
    assert any(name.startswith("projector.") for name in stored) == (method == "kd_feature")


def test_labels_are_refused_where_a_method_uses_none_and_asked_for_where_it_does(runs: Runs) -> None:
    config = str(runs.config("labels"))
    for words, message in (
        (["loss.method=kd"], "config field split names labelled images, but loss.method=kd uses no labels"),
        (["split.shots=0"], "config field split needs exactly one of shots, percent and list_file"),
        (["loss.method=kd", "split.shots=0", "labelled_batch=2"], "kd and kd_feature: none is"),
    ):
        with pytest.raises(UserError, match=message):
            load_config(DhoConfig, [config, "run_dir=r", *words])


@pytest.mark.parametrize("kd_head", ["cosine", "scaled_linear"])
def test_text_heads_start_as_the_class_vectors_of_the_students_own_text_tower(
    runs: Runs, kd_head: str
) -> None:
    student = {"backbone": f"clip:{runs.student}", "kd_head": kd_head, "head_init": "text"}
    config = runs.config(f"text_{kd_head}", student=student, **SHORT)
    run_dir = runs.folder / f"text_{kd_head}"
    code, output = runs.train(config, f"run_dir={run_dir}", "optim.lr=1e-12")
    assert code == 0, output
    encoder = ClipPredictor.of(load_clip(runs.student))
    expected = encoder.encode_text([f"a photo of a {name}." for name in sorted(CLASSES)])
    stored = load_file(run_dir / "export" / "model.safetensors")
    for head in ("ce_head", "kd_head"):
        torch.testing.assert_close(stored[f"head.{head}.weight"], expected, rtol=0, atol=1e-6)
        assert float(stored.get(f"head.{head}.bias", torch.zeros(1)).abs().max()) < 1e-6


def test_stored_outputs_train_like_the_teacher_beside_the_student(runs: Runs) -> None:
    """Two views of each image, stored as fp32; the run that replays them loads no teacher."""
    clip = load_clip(runs.teacher)
    encoder, dataset = ClipPredictor.of(clip), load_set(runs.data)
    data = LabelledDataConfig(**runs.values()["data"])
    embed_items(
        encoder, dataset.splits["train"], runs.folder / "outputs", name="images", source=clip.source,
        digest=clip.digest, views=view_config(data), view_count=2, dtype=torch.float32,
    )  # fmt: skip
    vectors = encode_classes(encoder, dataset.class_names, dataset.templates, teacher_digest=clip.digest)
    vectors.save(runs.folder / "classes.safetensors")
    config = runs.config("views", selection="last", evaluation={"every_steps": 0, "batch_size": 16})
    live, stored = runs.folder / "live", runs.folder / "stored"
    code, output = runs.train(config, f"run_dir={live}", "data.view_count=2")
    assert code == 0 and "1 teacher(s) loaded" in output, output
    without = [
        "teacher.model=", f"teacher.class_vectors={runs.folder / 'classes.safetensors'}",
        f"data.teacher_outputs={runs.folder / 'outputs'}",
    ]  # fmt: skip
    code, output = runs.train(config, f"run_dir={stored}", *without)
    assert code == 0 and "0 teacher(s) loaded" in output, output
    losses = [[line["loss"] for line in lines(run_dir) if "loss" in line] for run_dir in (live, stored)]
    assert len(losses[0]) == 6 and losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert not any(name.startswith("teacher") for name in results(stored))


def test_a_few_shot_teacher_is_trained_and_teaches_a_student(runs: Runs) -> None:
    """A Tip-Adapter in this process, and a student's run that names its file."""
    values = runs.values()
    cfg = TipAdapterConfig(
        run_dir=str(runs.folder / "tip"),
        data=LabelledDataConfig(**values["data"]),
        split=SplitConfig(**values["split"]),
        teacher=TeacherConfig(**values["teacher"]),
        cache_passes=2,
        epochs=3,
        batch_size=4,
    )
    file = train(cfg)
    facts = json.loads(file.with_suffix(".json").read_text())
    assert facts["class_names"] == sorted(CLASSES) and facts["shots"] == 2
    assert facts["validation_top1_searched"] >= 0.25
    content = torch.load(file, weights_only=True)
    assert content["cache_values"].tolist() == torch.eye(3).repeat_interleave(2, 0).tolist()
    assert train(cfg) == file  # a finished one is left as it is

    adapted = {**values["teacher"], "adapter": str(file)}
    run_dir = runs.folder / "taught"
    code, output = runs.train(runs.config("taught", teacher=adapted, **SHORT), f"run_dir={run_dir}")
    assert code == 0, output
    assert {"loss/ce", "loss/kd"} <= lines(run_dir)[0].keys()
    # The run's teacher is the adapter, not the CLIP without it.
    teacher = results(run_dir)[f"teacher {runs.teacher} classification"]
    assert teacher["top1"] == pytest.approx(facts["test_top1"])
    with pytest.raises(UserError, match="class 0"):
        load_teacher(TeacherConfig(**adapted), ["a", "b", "c"], ["{}"], outputs="")
