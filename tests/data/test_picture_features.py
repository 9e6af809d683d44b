"""Pictures whose features are stored: the same numbers without the tower, and what is refused."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_tools import embed_pictures
from tests.chat_parts import picture
from tests.projects.matvlm.models import decoder_folder, tower_files
from vlmkd import config
from vlmkd.chat_config import ChatRunConfig, MllmConfig
from vlmkd.chat_runs import chat_loader, chat_tokens, use_features
from vlmkd.data.chat_outputs import ChatOutputs, Features, picture_key
from vlmkd.errors import UserError
from vlmkd.evaluation.answers import ChatModel
from vlmkd.export.mllm import ChatParts, build_mllm, export_mllm


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """An export, and nine chats, two of them without a picture, two with two; the same picture comes often."""
    folder = tmp_path_factory.mktemp("seen")
    cfg = MllmConfig(tower=tower_files(folder), decoder=f"hf:{decoder_folder(folder / 'llama')}")
    parts = replace(build_mllm(cfg), template="plain")
    parts.trained = {name for name in parts.module.state_dict() if name.startswith("projector.")}
    export_mllm(folder / "export", parts, parts.module.state_dict())
    chats = []
    for number in range(9):
        name = f"{number % 7}.png"
        (folder / name).write_bytes(picture(0 if number == 6 else number % 7))
        images = [name, "0.png"][: (1, 1, 2, 0)[number % 4]]
        talk = [
            {"from": "human", "value": "<image>" * len(images) + "What?"},
            {"from": "gpt", "value": "red"},
        ]
        chats.append({"id": str(number), "image": images, "conversations": talk})
    (folder / "chats.json").write_text(json.dumps(chats))
    return folder


def embed(place: Path, out: Path, *arguments: str, chats: Path | None = None) -> None:
    given = [
        f"init_from={place / 'export'}",
        "--chats",
        str(chats or place / "chats.json"),
        "--out",
        str(out),
    ]
    assert embed_pictures.main([*given, "--batch-size", "2", "--part-size", "3", *arguments]) == 0


@pytest.fixture(scope="module")
def stored(place) -> Path:
    """All of them, in float32."""
    embed(place, place / "stored", "--fp32", "--workers", "1")
    return place / "stored"


def model_of(place: Path, *options: str, teacher: ChatParts | None = None) -> tuple[ChatRunConfig, ChatParts]:
    given = [
        f"data.chats=[{place / 'chats.json'}]", "data.template=plain", "data.max_length=90", "data.workers=0", "batch_size=3",
        "run_dir=r", f"student.init_from={place / 'export'}", *options,
    ]  # fmt: skip
    cfg = config.load(ChatRunConfig, given)
    parts = build_mllm(cfg.student)
    parts.module.eval()
    use_features(cfg, parts, teacher)
    return cfg, parts


def batches(cfg: ChatRunConfig, parts: ChatParts, number: int = 3) -> list[dict[str, Any]]:
    return list(itertools.islice(iter(chat_loader(cfg, parts, chat_tokens(cfg, parts))), number))


def blind(parts: ChatParts) -> None:
    """A tower that must not be asked."""

    def refuse(*args: Any) -> None:
        raise AssertionError("the tower was asked")

    parts.module.tower.forward = refuse  # type: ignore[method-assign]


@torch.no_grad()
def logits(parts: ChatParts, batch: dict[str, Any]) -> torch.Tensor:
    return parts.module.head(parts.module(batch))


@pytest.mark.parametrize(("pack", "workers"), [("true", 0), ("false", 1)])
def test_stored_features_give_the_logits_of_the_tower(place, stored, pack, workers) -> None:
    assert len(Features(stored)) == 5  # of seven chats; equal pictures once
    shared = [f"data.pack={pack}", f"data.workers={workers}"]
    live, seen = (model_of(place, *shared, *more) for more in ([], [f"data.features={stored}"]))
    blind(seen[1])
    for one, other in zip(batches(*live), batches(*seen), strict=True):
        assert one["images"].shape[1:] == (3, 16, 16) and other["images"].shape[1:] == (4, 16)
        assert len(one["images"]) == len(other["images"]) > 0
        torch.testing.assert_close(logits(seen[1], other), logits(live[1], one), rtol=1e-5, atol=1e-5)


def test_chats_without_pictures_ask_neither_tower_nor_folder(place, stored, tmp_path) -> None:
    record = {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "red"}]}
    (tmp_path / "text.json").write_text(json.dumps([record] * 3))
    options = [f"data.chats=[{tmp_path / 'text.json'}]"]
    cfg, parts = model_of(place, *options)
    expected = [logits(parts, batch) for batch in batches(cfg, parts, 1)]
    cfg, parts = model_of(place, *options, f"data.features={stored}")
    blind(parts)
    (batch,) = batches(cfg, parts, 1)
    assert batch["images"].shape == (0, 4, 16)
    torch.testing.assert_close(logits(parts, batch), expected[0])


def test_what_is_stored_by_default_is_rounded_to_float16(place, stored) -> None:
    embed(place, place / "half")
    data = (place / "4.png").read_bytes()
    half, whole = (Features(folder).of(data) for folder in (place / "half", stored))
    assert half is not None and whole is not None and half.dtype == whole.dtype == torch.float32
    assert torch.equal(half, whole.half().float()) and not torch.equal(half, whole)


def test_questions_take_stored_pictures_and_see_others(place, stored) -> None:
    cfg, parts = model_of(place, f"data.features={stored}")
    tokens = chat_tokens(cfg, parts)
    known, other = (place / "2.png").read_bytes(), picture(77)
    plain = ChatModel("plain", parts.module, tokens, parts.image_spec)
    quick = ChatModel("quick", parts.module, tokens, parts.image_spec, parts.features)
    ask = [([data], [], "<image>What?") for data in (known, other)]
    expected = [plain.answer([one], most_tokens=8) for one in ask]
    assert plain.answer(ask, most_tokens=8) == quick.answer(ask, most_tokens=8)
    assert quick.answer([ask[1]], most_tokens=8) == expected[1]
    blind(parts)
    assert quick.answer([ask[0]], most_tokens=8) == expected[0]
    with pytest.raises(AssertionError, match="the tower was asked"):
        quick.answer(ask, most_tokens=8)


def test_more_chats_add_to_the_folder_and_what_is_there_stays(place, tmp_path) -> None:
    embed(place, tmp_path / "out", "--fp32")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.safetensors")}
    (tmp_path / "new.png").write_bytes(picture(50))
    (tmp_path / "0.png").write_bytes(picture(0))
    records = json.loads((place / "chats.json").read_text())[:1]
    records += [records[0] | {"id": "new", "image": "new.png"}]
    (tmp_path / "more.json").write_text(json.dumps(records))
    embed(place, tmp_path / "out", "--fp32", chats=tmp_path / "more.json")
    found = Features(tmp_path / "out")
    assert len(found) == 6 and picture_key(picture(50)) in found and len(before) == 2
    assert all((tmp_path / "out" / name).read_bytes() == data for name, data in before.items())


def test_a_picture_that_is_not_stored_is_counted(place, stored, tmp_path) -> None:
    for number in range(7):
        (tmp_path / f"{number}.png").write_bytes((place / f"{number}.png").read_bytes())
    (tmp_path / "2.png").write_bytes(picture(90))
    (tmp_path / "chats.json").write_bytes((place / "chats.json").read_bytes())
    options = [f"data.chats=[{tmp_path / 'chats.json'}]", f"data.features={stored}"]
    with pytest.raises(UserError, match="missing_features"):
        batches(*model_of(place, *options))
    cfg, parts = model_of(place, *options, "data.max_bad_share=0.5")
    loader = chat_loader(cfg, parts, chat_tokens(cfg, parts))
    list(itertools.islice(iter(loader), 3))
    assert set(loader.skipped) == {"missing_features"}


def test_another_tower_or_kind_of_folder_is_refused(place, stored, tmp_path) -> None:
    option = f"data.features={stored}"
    tower = build_mllm(MllmConfig(init_from=str(place / "export"))).config
    for field, value in (("tower_layers", "[-1]"), ("grid", 1), ("resize", "squash"), ("tower_norm", "true")):
        made = [
            f"student.tower={tower.tower}",
            f"student.decoder={tower.decoder}",
            f"student.{field}={value}",
        ]
        with pytest.raises(
            UserError, match="data.features: .* which is not the student's; run data_tools/embed_"
        ):
            model_of(place, option, "student.init_from=", *made)
    other = build_mllm(MllmConfig(init_from=str(place / "export")))
    next(other.module.tower.parameters()).data.add_(1)
    with pytest.raises(UserError, match="data.features: .* serves one tower, and the teacher's is another"):
        model_of(place, option, teacher=other)
    same = build_mllm(MllmConfig(init_from=str(place / "export")))
    _, parts = model_of(place, option, teacher=same)
    assert same.features is parts.features is not None
    with pytest.raises(UserError, match="are of another kind of data"):
        ChatOutputs(stored)
    with pytest.raises(UserError, match="have no cache.json; write one with data_tools/embed_pictures.py"):
        model_of(place, f"data.features={tmp_path}")


@pytest.mark.parametrize(
    ("record", "fields", "told"),
    [
        ({"image": "absent.png"}, [], "absent.png does not exist"),
        ({}, [], "names no pictures"),
        ({"image": "0.png"}, ["tower=x"], "tower and decoder go together"),
        ({"image": "0.png"}, ["grid=2"], "init_from or tower and decoder must be given"),
        ({"image": "0.png"}, ["towre=x"], "towre"),
    ],
)
def test_what_cannot_be_embedded_is_told_in_a_line(place, tmp_path, record, fields, told, capsys) -> None:
    (tmp_path / "0.png").write_bytes(picture(0))
    (tmp_path / "chats.json").write_text(json.dumps([record]))
    given = fields or [f"init_from={place / 'export'}"]
    rest = ["--chats", str(tmp_path / "chats.json"), "--out", str(tmp_path / "out")]
    assert embed_pictures.main([*given, *rest]) == 2
    said = capsys.readouterr().err.strip()
    assert told in said.splitlines()[-1] and "Traceback" not in said
    with pytest.raises(UserError, match="is a shard; features are stored of the pictures of JSON files"):
        embed_pictures.main([*given, "--chats", "a.tar", "--out", str(tmp_path / "out")])


def test_a_tower_can_be_told_before_any_run(place, stored, tmp_path) -> None:
    """And is the export's, if it is told as that one was."""
    parts = build_mllm(MllmConfig(init_from=str(place / "export")))
    given = [f"tower={parts.config.tower}", f"decoder={parts.config.decoder}", "--fp32"]
    rest = ["--chats", str(place / "chats.json"), "--out", str(tmp_path / "out")]
    assert embed_pictures.main([*given, *rest]) == 0
    one, other = (Features(folder) for folder in (tmp_path / "out", stored))
    assert one.info.digest == other.info.digest and len(one) == len(other)


def test_a_damaged_picture_is_left_out_and_told(place, tmp_path, capsys) -> None:
    (tmp_path / "0.png").write_bytes(picture(0))
    (tmp_path / "1.png").write_bytes(picture(1)[:60])
    (tmp_path / "chats.json").write_text(json.dumps([{"image": ["0.png", "1.png"]}]))
    embed(place, tmp_path / "out", chats=tmp_path / "chats.json")
    assert "left out: undecodable_image 1" in capsys.readouterr().out
    assert len(Features(tmp_path / "out")) == 1
