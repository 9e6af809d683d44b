"""RLAIF-V's rows as preference records: what stands in them, and that stage prefer reads them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from projects.llava_mod.rlaif_v import main
from tests.chat_parts import byte_tokenizer, picture
from vlmkd.chat_ids import IMAGE_ID
from vlmkd.data.chats import Chat, ChatPipeline, ChatTokens, read_chats
from vlmkd.data.samples import RawSample
from vlmkd.errors import UserError
from vlmkd.image_spec import ImageSpec


def row(number: int, **changed: Any) -> dict[str, Any]:
    """A row with all columns of the data set."""
    return {
        "ds_name": "RLAIF-V", "image": {"bytes": picture(number % 2), "path": "x.jpg"}, "question": f"What is {number}?",
        "chosen": f"A cat, {number}.", "rejected": "A dog.", "origin_dataset": "coco", "origin_split": "{}", "idx": number,
        "image_path": "x.jpg",
    } | changed  # fmt: skip


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def test_rows_become_records_that_stage_prefer_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [write(tmp_path / "a.parquet", [row(0), row(1)]), write(tmp_path / "b.parquet", [row(2)])]
    out, images = tmp_path / "data" / "rlaif_v.json", tmp_path / "data" / "images"
    assert main([*files, "--out", str(out), "--images", str(images)]) == 0
    assert "3 pairs about 2 pictures" in capsys.readouterr().out
    records = json.loads(out.read_text())
    asked = {"from": "human", "value": "<image>\nWhat is 2?"}
    assert [one["id"] for one in records] == ["rlaif_v_000000", "rlaif_v_000001", "rlaif_v_000002"]
    assert records[2]["chosen"] == [asked, {"from": "gpt", "value": "A cat, 2."}]
    assert records[2]["rejected"] == [asked, {"from": "gpt", "value": "A dog."}]
    assert records[0]["image"] == records[2]["image"] != records[1]["image"]
    assert sorted(path.read_bytes() for path in images.rglob("*.png")) == sorted(map(picture, (0, 1)))
    spec = ImageSpec(size=(8, 8), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    pipeline = ChatPipeline(ChatTokens(byte_tokenizer(), "plain", 4), spec)
    chats = [
        pipeline.process(RawSample("", one.key, one.members())) for one in read_chats(str(out), str(images))
    ]
    assert all(isinstance(chat, Chat) and len(chat.rows) == 2 for chat in chats)
    batch = pipeline.collate(chats)  # type: ignore[arg-type]
    assert batch["input_ids"].shape[0] == 6 and batch["image_rows"].tolist() == [0, 1, 2] * 2
    assert (batch["input_ids"] == IMAGE_ID).sum(1).tolist() == [4] * 6


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"rejected": ""}, "a.parquet: row 1 lacks a text in question, chosen or rejected"),
        ({"image": None}, "a.parquet: row 1 has no picture in image.bytes"),
        ({"image": {"bytes": b"no picture", "path": ""}}, "a.parquet: row 1 has no picture in image.bytes"),
    ],
)
def test_a_bad_row_is_named(changed: dict[str, Any], told: str, tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", [row(0), row(1, **changed)])
    with pytest.raises(UserError, match=told):
        main([file, "--out", str(tmp_path / "x.json"), "--images", str(tmp_path)])
    assert not (tmp_path / "x.json").exists()


def test_a_file_that_is_not_rlaif_v_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--out", str(tmp_path / "x.json"), "--images", str(tmp_path)]
    with pytest.raises(
        UserError, match="other.parquet has no column chosen, rejected; name a file of RLAIF-V"
    ):
        main([write(tmp_path / "other.parquet", [{"image": {"bytes": b""}, "question": ""}]), *options])
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    for name in ("torn", "no"):
        with pytest.raises(UserError, match=f"{name}.parquet cannot be read"):
            main([str(tmp_path / f"{name}.parquet"), *options])
    monkeypatch.setattr(importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    with pytest.raises(UserError, match="torn.parquet needs pyarrow; install it by pip install pyarrow"):
        main([str(tmp_path / "torn.parquet"), *options])
