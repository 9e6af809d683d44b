"""What a run folder may hold and what may change when its run goes on; a page that fails costs nothing."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from projects.tinyclip.config import DistillConfig
from vlmkd import config
from vlmkd.errors import UserError
from vlmkd.train import lookup, run

FIELDS = [
    "student.model=ViT-B-32",
    "teachers=[{model: ViT-B-32, pretrained: openai}]",
    "data.kind=synthetic",
    "batch_size=8",
]


def _config(run_dir: Path, *more: str) -> DistillConfig:
    return config.load(DistillConfig, [*FIELDS, f"run_dir={run_dir}", *more])


@pytest.fixture
def started(tmp_path: Path) -> Path:
    """A run folder with its config."""
    (tmp_path / "config.yaml").write_text(config.to_yaml(_config(tmp_path)))
    return tmp_path


@pytest.mark.parametrize(
    "field",
    [
        "log.every_steps=3",
        "checkpoint.keep=5",
        "evaluation.batch_size=3",
        "evaluation.teacher=false",
        "threads=3",
        "data.workers=0",
        "data.shard_cache=x",
        "data.max_bad_share=0.5",
    ],
)
def test_what_changes_no_weight_may_change(started: Path, field: str) -> None:
    """The folder is taken, and nobody else may have it meanwhile."""
    with (
        run._run_folder(_config(started, field)),
        pytest.raises(UserError, match="is in use by another process"),
        run._run_folder(_config(started)),
    ):
        pass


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("logit_scale.value=5", "logit_scale.value=50.0, now 5.0"),
        ("evaluation.every_steps=7", "evaluation.every_steps=0, now 7"),
        ("evaluation.retrieval=[{data: 'emoji:unseen_drawing'}]", "evaluation.retrieval"),
        ("deepspeed.zero_stage=1", "deepspeed.zero_stage=-1, now 1"),
        ("data.shuffle_buffer=3", "data.shuffle_buffer=2000, now 3"),
    ],
)
def test_what_changes_weights_may_not(started: Path, field: str, said: str) -> None:
    with (
        pytest.raises(UserError, match="belongs to a run with") as error,
        run._run_folder(_config(started, field)),
    ):
        pass
    assert said in str(error.value)


def test_every_changeable_name_is_a_field() -> None:
    for name in run._CHANGEABLE - {"evaluation.workers"}:
        assert name in lookup.leaves(config.plain(DistillConfig)), name


@pytest.mark.parametrize(
    "text",
    [b"", b"\xff\xfe\x00", b"7", b"- a\n", b"run_dir: [", b"optim:\n\t- x", b"a: " + b"[" * 50_000],
    ids=["empty", "binary", "number", "list", "torn", "tab", "deep"],
)
def test_a_damaged_config_in_a_run_folder_is_one_line(started: Path, text: bytes) -> None:
    (started / "config.yaml").write_bytes(text)
    with pytest.raises(UserError, match=f"run folder {started}") as error:
        run._check_same_run(started / "config.yaml", _config(started))
    assert "config.yaml" in str(error.value) and "\n" not in str(error.value)


def test_a_truncated_config_is_told_as_such(started: Path) -> None:
    path = started / "config.yaml"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    with pytest.raises(UserError, match="is no whole config of a run; delete the folder"):
        run._check_same_run(path, _config(started))


def test_an_interrupted_start_does_not_hold_the_folder(tmp_path: Path) -> None:
    """A kill or a full disk between the first bytes of config.yaml and its rename."""
    for name in (".lock", "log.txt", "config.yaml.partial"):
        (tmp_path / name).touch()
    with run._run_folder(_config(tmp_path)):
        pass
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="holds files of something else"), run._run_folder(_config(tmp_path)):
        pass


@pytest.mark.parametrize(
    "failure", [ZeroDivisionError("division by zero"), KeyError("loss"), OSError(28, "full")]
)
def test_a_page_that_cannot_be_drawn_is_a_line_that_names_the_command(
    tmp_path: Path, failure: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*arguments: Any, **options: Any) -> None:
        raise failure

    monkeypatch.setattr(run, "build_report", broken)
    logging.getLogger("vlmkd").propagate = True
    with caplog.at_level(logging.WARNING):
        run._draw_page(tmp_path)
    assert f"python scripts/report.py {tmp_path}" in caplog.text and type(failure).__name__ in caplog.text
