"""scripts/eval_tokens.py against dense float64 formulas, one chat and one window at a time."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from scripts import eval_tokens
from tests.evaluation.test_chat_scripts import made
from vlmkd.chat_runs import check_alike
from vlmkd.data.chats import ChatTokens
from vlmkd.data.transforms import eval_transform
from vlmkd.errors import UserError
from vlmkd.export.mllm import ChatParts, export_mllm
from vlmkd.results import read_results

TALK = [("<image>\nwhat?", "a ring"), ("more?", "yes, two of them")]
ALONE = [("who?", "nobody at all")]
TEXT = "Now is the winter of our discontent made glorious summer by this sun of York. " * 3


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[ChatParts]]:
    """Exports `student` and `teacher`, which differ in their projectors, beside chats and a text."""
    folder = tmp_path_factory.mktemp("pair")
    models = []
    for number, name in enumerate(("student", "teacher")):
        parts = made(folder)
        torch.manual_seed(number)
        for parameter in parts.module.get_submodule("projector").parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        export_mllm(folder / name / "export", parts, parts.module.state_dict())
        parts.module.double().eval()
        models.append(parts)
    record = {"id": "0", "image": "a.png", "conversations": turns(TALK)}
    alone = {"id": "1", "conversations": turns(ALONE)}
    (folder / "talks.json").write_text(json.dumps([record, alone]))
    (folder / "text.txt").write_text(TEXT)
    return folder, models


def turns(talk: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [
        {"from": who, "value": text}
        for turn in talk
        for who, text in zip(("human", "gpt"), turn, strict=True)
    ]


def log_probs(parts: ChatParts, ids: list[int], image: Tensor | None) -> Tensor:
    """float64 [T, V] of one row."""
    module: Any = parts.module
    images = torch.zeros(0, 3, *parts.image_spec.size) if image is None else image.unsqueeze(0)
    row = torch.tensor([ids])
    embeds = module.embed(row, images.double(), torch.arange(len(images)))
    return module.decoder(inputs_embeds=embeds).logits[0].log_softmax(-1)


@torch.no_grad()
def expected(
    models: list[ChatParts], rows: list[tuple[list[int], list[bool], Tensor | None]]
) -> dict[str, float]:
    kl, agree, ce = [], [], []
    for ids, learned, image in rows:
        q, p = (log_probs(one, ids, image) for one in models)
        for place in range(len(ids) - 1):
            if learned[place + 1]:
                kl.append(float((p[place].exp() * (p[place] - q[place])).sum()))
                agree.append(float(p[place].argmax() == q[place].argmax()))
                ce.append(-float(q[place, ids[place + 1]]))
    count = len(kl)
    return {"kl": sum(kl) / count, "agreement": sum(agree) / count, "perplexity": math.exp(sum(ce) / count)}


def test_chats_and_texts_are_scored_as_by_dense_formulas(pair, tmp_path: Path) -> None:
    folder, models = pair
    student: Any = models[0].module
    tokens, length = ChatTokens(models[0].tokenizer, "plain", student.tower.tokens), 64
    found = tmp_path / "results.jsonl"
    arguments = [
        "--model", str(folder / "student"), "--teacher", str(folder / "teacher"), "--length", str(length),
        "--chats", str(folder / "talks.json"), "--text", str(folder / "text.txt"), "--batch-size", "3", "--quiet",
    ]  # fmt: skip
    assert eval_tokens.main([*arguments, "--results", str(found)]) == 0
    scores: dict[str, dict[str, float]] = {"talks": {}, "text": {}}
    for number in read_results(found):
        if number.dataset:
            scores[number.dataset][number.metric] = number.value
            assert number.tags == {"teacher": str(folder / "teacher")}
    picture = eval_transform(models[0].image_spec)(Image.open(folder / "a.png"))
    chats = [(*tokens.encode(TALK), picture), (*tokens.encode(ALONE), None)]
    assert all(len(ids) <= length for ids, _, _ in chats)
    ids = models[0].tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    rows = [
        (ids[start : start + length], [True] * length, None)
        for start in range(0, len(ids) - length + 1, length)
    ]
    assert len(rows) == 3
    assert scores["talks"] == pytest.approx(expected(models, chats), rel=1e-4)
    assert scores["text"] == pytest.approx(expected(models, rows), rel=1e-4)
    assert scores["talks"]["kl"] > 0.01 and scores["text"]["kl"] == pytest.approx(0, abs=1e-6)


def test_without_a_teacher_there_is_perplexity_alone(pair, tmp_path: Path) -> None:
    folder, _ = pair
    found = tmp_path / "results.jsonl"
    arguments = [
        "--model",
        str(folder / "student"),
        "--text",
        str(folder / "text.txt"),
        "--length",
        "16",
        "--most",
        "2",
    ]
    assert eval_tokens.main([*arguments, "--quiet", "--results", str(found)]) == 0
    numbers = [number for number in read_results(found) if number.dataset]
    assert [(number.metric, number.count) for number in numbers] == [("perplexity", 2 * 15)]


def test_what_cannot_be_scored_is_refused_in_one_line(pair, capsys) -> None:
    folder, _ = pair
    model = ["--model", str(folder / "student")]
    with pytest.raises(UserError, match="give --chats or --text"):
        eval_tokens.main(model)
    assert eval_tokens.main([*model, "--text", str(folder / "text.txt")]) == 2
    assert re.search(r"has \d+ tokens, fewer than --length 512", capsys.readouterr().err)
    assert eval_tokens.main([*model, "--chats", str(folder / "talks.json"), "--length", "4"]) == 2
    assert re.search("chat 0 .*nothing to learn", capsys.readouterr().err)
    (folder / "none.json").write_text("[]")
    assert eval_tokens.main([*model, "--chats", str(folder / "none.json")]) == 2
    assert "none.json has no chat; name another file" in capsys.readouterr().err


def test_models_that_read_otherwise_are_not_compared(pair) -> None:
    _, (student, teacher) = pair
    ours = ("ours", student.tokenizer, student.module, student.image_spec)
    check_alike(ours, ("theirs", teacher.tokenizer, teacher.module, teacher.image_spec))
    smaller = dataclasses.replace(teacher.image_spec, size=(8, 8))
    with pytest.raises(UserError, match=r"features an image of .* the teacher \d+ of \(8, 8\)"):
        check_alike(ours, ("theirs", teacher.tokenizer, teacher.module, smaller))
    other = SimpleNamespace(get_vocab=lambda: {"a": 0})
    with pytest.raises(UserError, match="vocabularies of ours and theirs differ"):
        check_alike(ours, ("theirs", other, teacher.module, teacher.image_spec))
