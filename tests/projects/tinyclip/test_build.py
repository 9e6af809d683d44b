"""Mistakes that are seen before anything is trained: one line that names the thing and the mend."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch

from data_tools.embed_teacher import embed_shards
from projects.tinyclip.build import distill_job, mask_job
from projects.tinyclip.config import DistillConfig, MaskConfig
from tests.evaluation.conftest import numbered_png
from tests.projects.tinyclip.tiny_runs import Runs, model_config
from vlmkd import config
from vlmkd.config import DataConfig
from vlmkd.errors import UserError
from vlmkd.models.clip import load_clip
from vlmkd.models.towers import ClipPredictor
from vlmkd.train import engine
from vlmkd.train.run import main


def _distill(runs: Runs, *overrides: str) -> DistillConfig:
    return config.load(DistillConfig, [str(runs.config("c")), f"run_dir={runs.folder / 'run'}", *overrides])


def _sources(runs: Runs, name: str = "teacher") -> list[str]:
    path = runs.folder / f"{name}.json"
    return [f"inherit.image_from.model={path}", f"inherit.text_from.model={path}"]


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["loss.affinity=0", "teachers=[]"], ["loss", "all weights 0"]),
        (["teachers=[]"], ["teachers", "is empty"]),
        (["loss.affinity=0", "loss.contrastive=1"], ["teachers", "is given"]),
        (["inherit.image_layers=[0]"], ["inherit.image_layers", "inherit.layers=list"]),
        (["inherit.text_units.hidden=[0]"], ["inherit.text_units", "inherit.width=list"]),
        (["inherit.width=list"], ["inherit.text_units", "inherit.width=list"]),
        (["ema_decay=0.9", "deepspeed.zero_stage=3"], ["ema_decay", "zero_stage"]),
        (["logit_scale.value=0"], ["logit_scale.value"]),
        (["student.model="], ["student.model", "is empty"]),
    ],
)
def test_config_mistakes(runs: Runs, overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        _distill(runs, *overrides)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_an_impossible_batch_triple_names_the_nearest(runs: Runs) -> None:
    cfg = _distill(runs, "batch_size=10", "micro_batch_size=4")
    with pytest.raises(
        UserError, match="multiple of micro_batch_size x ranks = 4 x 1 = 4; nearest valid: batch_size=8 or 12"
    ):
        engine.deepspeed_json(cfg, 1)
    with pytest.raises(UserError, match="nearest valid: batch_size=16"):
        engine.deepspeed_json(_distill(runs, "batch_size=10"), 16)


def test_the_users_deepspeed_file_is_filled_in(runs: Runs) -> None:
    path = runs.folder / "ds.json"
    path.write_text(
        json.dumps({"train_batch_size": "auto", "zero_optimization": {"stage": "auto", "overlap_comm": True}})
    )
    filled = engine.deepspeed_json(_distill(runs, f"deepspeed.file={path}", "deepspeed.zero_stage=2"), 2)
    assert filled == {"train_batch_size": 8, "zero_optimization": {"stage": 2, "overlap_comm": True}}
    path.write_text(json.dumps({"flops_profiler": "auto"}))
    with pytest.raises(UserError, match="flops_profiler"):
        engine.deepspeed_json(_distill(runs, f"deepspeed.file={path}"), 1)


@pytest.mark.parametrize(
    ("width", "layers", "part"),
    [(64, 2, "64 units of hidden"), (32, 6, "layers"), (32, 2, "head")],
    ids=["wider", "deeper", "heads"],
)
def test_a_student_that_does_not_fit_into_its_source(runs: Runs, width: int, layers: int, part: str) -> None:
    head_width = 8 if part == "head" else 16
    (runs.folder / "student.json").write_text(json.dumps(model_config(width, layers, head_width)))
    with pytest.raises(UserError, match=part) as caught:
        distill_job(_distill(runs, *_sources(runs)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["data.kind=webdataset"], ["data.sources", "is empty"]),
        (["data.kind=webdataset", "data.sources=[{shards: [nowhere/x.tar]}]"], ["nowhere/x.tar"]),
        (["teachers=[{model: ViT-B-32, pretrained: laion2b_e16}]"], ["laion2b_e16", "mirror"]),
        (["teachers=[{model: ViT-B-33}]"], ["ViT-B-33", "did you mean"]),
        (["teachers=[{model: 'zoo:tinyclip-emoji'}]"], ["tinyclip-emoji"]),
        (["student.model=local-dir:nowhere"], ["nowhere", "no such folder"]),
    ],
)
def test_missing_things_are_named(runs: Runs, overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        distill_job(_distill(runs, *overrides))
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts), message


def test_too_few_shards_are_refused_with_numbers(runs: Runs) -> None:
    (runs.folder / "a.tar").write_bytes(b"")
    overrides = [
        "data.kind=webdataset",
        f"data.sources=[{{shards: [{runs.folder}/a.tar]}}]",
        "data.workers=3",
    ]
    with pytest.raises(UserError, match="1 .*3"):
        distill_job(_distill(runs, *overrides))


class _Evil:
    """Pickles to a call that leaves a file behind."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return Path.touch, (self.target,)


def test_weights_that_are_code_or_of_another_architecture_are_refused(runs: Runs) -> None:
    evil, mark = runs.folder / "evil.pt", runs.folder / "mark"
    torch.save({"state_dict": _Evil(mark)}, evil)
    with pytest.raises(UserError, match="evil.pt"):
        distill_job(_distill(runs, f"student.pretrained={evil}"))
    assert not mark.exists()
    other = runs.folder / "other.pt"
    from vlmkd.models.clip import load_clip

    torch.save(load_clip(str(runs.folder / "teacher.json"), seed=0).module.state_dict(), other)
    with pytest.raises(UserError) as caught:
        distill_job(_distill(runs, f"student.pretrained={other}"))
    assert "other.pt" in str(caught.value) and "visual" in str(caught.value)


def test_freezing_what_was_never_pruned_is_refused(runs: Runs) -> None:
    cfg = config.load(
        MaskConfig,
        [
            str(runs.config("m", masks={"freeze_pruned": True})),
            f"run_dir={runs.folder / 'r'}",
            f"student.model={runs.folder}/teacher.json",
        ],
    )
    with pytest.raises(UserError, match="masks.freeze_pruned"):
        mask_job(cfg)


def test_widths_are_rounded_to_what_gpus_like_only(runs: Runs) -> None:
    path = runs.config("m", masks={"round_to": 12})
    with pytest.raises(UserError, match="masks.round_to is 12; choose 1, 8, 16 or 64"):
        config.load(MaskConfig, [str(path), f"run_dir={runs.folder / 'r'}"])


def test_main_prints_one_line_and_leaves_nothing(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = runs.folder / "run"
    with pytest.raises(SystemExit) as caught:
        main(DistillConfig, distill_job, [str(runs.config("c")), f"run_dir={run_dir}", "optim.lrr=1"])
    assert caught.value.code == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert errors == ["error: override optim.lrr=1: unknown config field optim.lrr; did you mean optim.lr?"]
    assert not run_dir.exists()


def test_dry_run_prints_the_resolved_config(
    runs: Runs, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    main(DistillConfig, distill_job, [str(runs.config("c")), "run_dir=somewhere", "--dry-run"])
    printed = capsys.readouterr().out
    again = tmp_path / "again.yaml"
    again.write_text(printed)
    assert config.load(DistillConfig, [str(again)]) == config.load(
        DistillConfig, [str(runs.config("c")), "run_dir=somewhere"]
    )
    assert not Path("somewhere").exists()


def _store(runs: Runs, name: str, seed: int, shard: Path) -> tuple[Path, Path]:
    """A teacher's weights file, and a cache of its embeddings of the shard."""
    architecture = str(runs.folder / "teacher.json")
    weights = runs.folder / f"{name}.pt"
    torch.save(load_clip(architecture, seed=seed).module.state_dict(), weights)
    clip = load_clip(architecture, str(weights))
    embed_shards(
        ClipPredictor.of(clip), [str(shard)], runs.folder / name, source="teacher", digest=clip.digest,
        data=DataConfig(), crops=1,
    )  # fmt: skip
    return weights, runs.folder / name


def test_stored_embeddings_are_compared_with_the_teacher_by_its_weights(runs: Runs) -> None:
    shard = runs.folder / "0.tar"
    with tarfile.open(shard, "w") as tar:
        for member, content in (("a.png", numbered_png(1)), ("a.txt", b"a dot")):
            info = tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    (good, cache), (other, other_cache) = (_store(runs, f"t{seed}", seed, shard) for seed in (1, 2))
    data = ["data.kind=webdataset", f"data.sources=[{{shards: [{shard}], teacher_caches: [{cache}]}}]"]
    teacher = f"teachers.0.pretrained={good}"
    job = distill_job(_distill(runs, *data, teacher))
    assert job.task.teachers == [] and job.loader.describe()
    with pytest.raises(UserError, match=f"{cache} do not fit this run: the run's teacher has digest"):
        distill_job(_distill(runs, *data, f"teachers.0.pretrained={other}"))
    two = [data[0], data[1][:-1] + f", {{shards: [{shard}], teacher_caches: [{other_cache}]}}]"]
    with pytest.raises(UserError, match=f"{other_cache} do not fit this run"):
        distill_job(_distill(runs, *two, teacher))
    assert distill_job(_distill(runs, *data, "teachers=[]")).task.teachers == []
