"""Configs: names, types, overrides, round trip, help."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from vlmkd import config
from vlmkd.config import DataConfig, RunConfig
from vlmkd.errors import UserError
from vlmkd.train import engine, run

ROOT = Path(__file__).parents[2]
BASE = ["run_dir=r"]


@dataclass(frozen=True, kw_only=True)
class StreamRunConfig(RunConfig):
    """A run on shards."""

    data: DataConfig = field(default_factory=DataConfig)
    """The training stream."""


def test_files_stack_and_overrides_win_from_left_to_right(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("run_dir: r\nsteps: 5\noptim: {lr: 0.1, schedule: wsd}\n")
    (tmp_path / "b.yaml").write_text("steps: 7\noptim: {lr: 0.2}\n")
    cfg = config.load(
        StreamRunConfig,
        [str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml"), "optim.lr=3e-4", "--local_rank=1"],
    )
    assert (cfg.steps, cfg.optim.lr, cfg.optim.schedule) == (7, 3e-4, "wsd")


def test_list_elements_are_set_by_index() -> None:
    cfg = config.load(
        StreamRunConfig, [*BASE, "data.sources=[{shards: [a]}, {shards: [b]}]", "data.sources.1.weight=3"]
    )
    assert [(source.shards, source.weight) for source in cfg.data.sources] == [(["a"], 1.0), (["b"], 3.0)]


def test_free_entries_keep_their_type() -> None:
    cfg = config.load(StreamRunConfig, [*BASE, "deepspeed.extra.prescale=3", "deepspeed.extra.inner.name=x"])
    assert cfg.deepspeed.extra == {"prescale": 3, "inner": {"name": "x"}}


def test_the_resolved_config_loads_back_to_an_equal_object(tmp_path: Path) -> None:
    cfg = config.load(
        StreamRunConfig,
        [*BASE, "data.sources=[{shards: [a], weight: 2}]", "data.crop_scale=[0.5, 1]", "optim.lr=1e-5"],
    )
    (tmp_path / "c.yaml").write_text(config.to_yaml(cfg))
    assert config.load(StreamRunConfig, [str(tmp_path / "c.yaml")]) == cfg


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["optim.lrr=3"], ["optim.lrr", "did you mean optim.lr?"]),
        (["data.sources=[{shard: [a]}]"], ["data.sources.0.shard", "data.sources.0.shards"]),
        (["optim.lr=abc"], ["optim.lr", "abc"]),
        (["optim.schedule=foo"], ["optim.schedule", "foo", "cosine"]),
        (["steps=1.5"], ["steps", "1.5"]),
        (["steps=0"], ["steps is 0", "at least 1"]),
        (["data.sources.1.weight=3"], ["data.sources[1]", "out of range"]),
        (["data=3"], ["data", "3"]),
        (["zzz.bar=3"], ["zzz", "fields here"]),
        (["missing.yaml"], ["missing.yaml", "does not exist"]),
        (["deepspeed.zero_stage=4"], ["deepspeed.zero_stage", "4"]),
        (["deepspeed.offload=nvme"], ["deepspeed.nvme_path"]),
        (["optim.decay_steps=5"], ["optim.decay_steps", "wsd"]),
        (["optim.momentum=0.9"], ["optim.momentum", "sgd"]),
        (["optim.name=sgd", "optim.momentum=1"], ["optim.momentum is 1", "[0, 1)"]),
        (["optim.name=sgd", "deepspeed.offload=cpu"], ["deepspeed.offload", "sgd"]),
        (["optim.name=lamb"], ["optim.name", "lamb", "adamw"]),
        (["evaluation.phase=1"], ["evaluation.phase", "every_steps = 0"]),
        (["checkpoint.keep=1"], ["checkpoint.keep is 1", "at least 2"]),
        (["optim.lr=nan"], ["optim.lr is nan", "at least 0", "Peak learning rate"]),
        (["optim.lr=.inf"], ["optim.lr is inf", "at most"]),
        (["optim.betas=[0.9]"], ["optim.betas is [0.9]", "2 numbers"]),
        (["optim.betas=[2,2]"], ["optim.betas", "[0, 1)"]),
        (["log.every_steps=0"], ["log.every_steps is 0", "at least 1"]),
        (["seed=1180591620717411303424"], ["seed is", "at most 9223372036854775807"]),
        (["data.workers=-1"], ["data.workers is -1", "[0, 1024]"]),
        (["data.max_bad_share=2"], ["data.max_bad_share is 2.0", "[0, 1]"]),
        (["data.crop_scale=[0.5]"], ["data.crop_scale is [0.5]", "2 numbers"]),
        (["data.crop_scale=[1, 0.5]"], ["data.crop_scale", "first number must not be above"]),
        (["data.sources=[{shards: [a], weight: 0}]"], ["data.sources.0.weight is 0.0", "above 0"]),
        (["run_dir=${x}"], ["run_dir holds ${", "write the value itself"]),
        (["data.text_key=???"], ["data.text_key is ???"]),
        (["data.text_key=\0"], ["not valid YAML"]),
        (["data.text_key=&a [*a]"], ["alias *a: write it out"]),
        (["run_dir="], ["run_dir"]),
        ([f"run_dir=runs/{'x' * 300}"], ["run_dir has a name of 300 bytes"]),
    ],
)
def test_mistakes_name_the_field_in_one_line(arguments: list[str], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        config.load(StreamRunConfig, [*BASE, *arguments])
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


def test_a_broken_yaml_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("a: [1\n")
    with pytest.raises(UserError, match="x.yaml is not valid YAML"):
        config.load(StreamRunConfig, [str(tmp_path / "x.yaml")])


def test_help_shows_every_field_with_its_docstring() -> None:
    text = config.help_text(StreamRunConfig)
    assert "optim.weight_decay = 0.2" in text
    assert "data.sources.N.weight = 1.0" in text
    lines = text.splitlines()
    assert len(lines) > 50 and not undocumented(StreamRunConfig)


def undocumented(cls: type[RunConfig]) -> list[str]:
    lines = config.help_text(cls).splitlines()
    below = zip(lines, lines[1:], strict=False)
    return [line for line, text in below if " = " in line and "`" not in line and not text.strip()]


@pytest.mark.parametrize("path", sorted(ROOT.glob("projects/*/config.py")), ids=lambda path: path.parent.name)
def test_each_projects_fields_have_docstrings(path: Path) -> None:
    module = importlib.import_module(f"projects.{path.parent.name}.config")
    found = [one for one in vars(module).values() if isinstance(one, type) and issubclass(one, RunConfig)]
    found = [one for one in found if one.__module__ == module.__name__]
    assert found
    assert not [line for cls in found for line in undocumented(cls)]


@dataclass(frozen=True, kw_only=True)
class Listed(RunConfig):
    """A list whose numbers have a range."""

    sizes: list[config.Positive] = field(default_factory=list)
    """Sides of the squares."""
    bare: int = 1


def test_a_number_of_a_list_is_refused_with_its_fields_meaning() -> None:
    with pytest.raises(
        UserError, match=r"config field sizes\.1 is 0; it must be at least 1.*: Sides of the squares"
    ):
        config.load(Listed, [*BASE, "sizes=[3, 0]"])
    assert undocumented(Listed) == ["bare = 1"]


def test_a_run_goes_on_after_a_field_with_a_default_was_added(tmp_path: Path) -> None:
    cfg = config.load(StreamRunConfig, [f"run_dir={tmp_path}", "deepspeed.extra.prescale=3"])
    (tmp_path / "config.yaml").write_text(config.to_yaml(cfg).replace("  text_key: txt\n", ""))
    assert "text_key" not in (tmp_path / "config.yaml").read_text()
    run._check_same_run(tmp_path / "config.yaml", cfg)
    other = config.load(
        StreamRunConfig, [f"run_dir={tmp_path}", "data.text_key=caption", "deepspeed.extra.prescale=3"]
    )
    with pytest.raises(UserError, match="a run with data.text_key='txt', now 'caption'; choose"):
        run._check_same_run(tmp_path / "config.yaml", other)


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "triple"),
    [(32, 0, 2, (16, 1)), (32, 4, 2, (4, 4)), (6, 0, 1, (6, 1)), (6, 6, 1, (6, 1))],
)
def test_micro_batch_and_accumulation(batch: int, micro: int, ranks: int, triple: tuple[int, int]) -> None:
    cfg = config.load(StreamRunConfig, [*BASE, f"batch_size={batch}", f"micro_batch_size={micro}"])
    assert engine.batch_triple(cfg, ranks) == triple


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "told"),
    [
        (31, 0, 2, "no multiple of the ranks = 2; nearest valid: batch_size=30 or 32"),
        (1, 0, 2, "no multiple of the ranks = 2; nearest valid: batch_size=2"),
        (33, 4, 2, "micro_batch_size x ranks = 4 x 2 = 8; nearest valid: batch_size=32 or 40"),
    ],
)
def test_batches_that_the_ranks_cannot_share(batch: int, micro: int, ranks: int, told: str) -> None:
    cfg = config.load(StreamRunConfig, [*BASE, f"batch_size={batch}", f"micro_batch_size={micro}"])
    with pytest.raises(UserError, match=told):
        engine.batch_triple(cfg, ranks)


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "triple"),
    [(32, 0, 1, (32, 1)), (32, 0, 2, (16, 1)), (32, 4, 2, (4, 4)), (3, 3, 1, (3, 1))],
)
def test_micro_batch_ranks_and_accumulation_make_up_the_batch(
    batch: int, micro: int, ranks: int, triple: tuple[int, int]
) -> None:
    cfg = config.load(StreamRunConfig, [*BASE, f"batch_size={batch}", f"micro_batch_size={micro}"])
    assert engine.batch_triple(cfg, ranks) == triple


def test_entries_that_deepspeed_refuses_are_one_line() -> None:
    whole = {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1}
    engine._check_json(whole | {"zero_optimization": {"stage": 1}})
    for wrong in ({"bf16": 5}, {"zero_optimization": {"nosuch": 1}}, {"zero_optimization": {"stage": "x"}}):
        with pytest.raises(
            UserError, match=r"deepspeed.extra \(or deepspeed.file\) holds what DeepSpeed refuses"
        ):
            engine._check_json(whole | wrong)
    cfg = config.load(StreamRunConfig, [*BASE, "deepspeed.extra.optimizer=5"])
    with pytest.raises(
        UserError, match="deepspeed brings its own optimizer, which would be ignored; set optim"
    ):
        engine.deepspeed_json(cfg, 1)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 100_000, b"{", b"3"])
def test_a_deepspeed_file_of_anything_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "ds.json"
    path.write_bytes(content)
    for given in (path, tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="config field deepspeed.file: .*/") as caught:
            engine.deepspeed_json(config.load(StreamRunConfig, [*BASE, f"deepspeed.file={given}"]), 1)
        assert "\n" not in str(caught.value)
