"""The plug-in of lmms-eval: what it answers is what the model answers alone. Its base class stands in where it is not installed."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from tests.chat_parts import picture
from tests.evaluation.test_chat_scripts import made
from vlmkd.data.chats import IMAGE, ChatTokens, Template
from vlmkd.errors import UserError
from vlmkd.evaluation.answers import ChatModel
from vlmkd.export.mllm import export_mllm

ROOT = Path(__file__).parents[2]
QUESTIONS = ["what?", "and what else is there?", f"{IMAGE} here?", "text alone"]


class Base:
    """What the plug-in uses of `lmms_eval.api.model.lmms` 0.7.3."""

    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size, self.task_dict = 0, 1, {}
        self.cache_hook = None

    @property
    def rank(self) -> int:
        return self._rank


@pytest.fixture(scope="module")
def plugin() -> Iterator[Any]:
    """The module, beside the real lmms-eval or a stand-in for it."""
    standing_in = {}
    if find_spec("lmms_eval") is None:
        for name, members in {
            "lmms_eval": {}, "lmms_eval.api": {}, "lmms_eval.api.model": {"lmms": Base}, "lmms_eval.models": {},
            "lmms_eval.api.instance": {"GenerationResult": SimpleNamespace},
            "lmms_eval.models.registry_v2": {"ModelManifest": SimpleNamespace},
        }.items():  # fmt: skip
            standing_in[name] = ModuleType(name)
            vars(standing_in[name]).update(members)
    sys.modules.update(standing_in)
    yield import_module("projects.lmms_eval_plugin")
    for name in [*standing_in, "projects.lmms_eval_plugin"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def model(plugin: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ChatModel]:
    """The plug-in on an export, and the model that was exported."""
    folder = tmp_path_factory.mktemp("chat")
    parts = made(folder)
    export_mllm(folder / "export", parts, parts.module.state_dict())
    found = plugin.Exported(pretrained=str(folder), batch_size="3", device="cpu")
    documents = [{"image": picture(number), "answer": "yes"} for number in range(3)] + [
        {"image": None, "answer": "no"}
    ]
    found.task_dict = {"task": {"test": documents}}
    tokens = ChatTokens(parts.tokenizer, "plain", parts.module.tower.tokens)  # type: ignore[arg-type]
    return found, ChatModel("tiny", parts.module.eval(), tokens, parts.image_spec)


def request(number: int, middle: Any) -> SimpleNamespace:
    def visual(document: dict[str, Any]) -> list[Any]:
        return [Image.open(io.BytesIO(document["image"]))] if document["image"] else []

    return SimpleNamespace(args=(QUESTIONS[number], middle, visual, number, "task", "test"))


def alone(number: int) -> tuple[list[bytes], list[tuple[str, str]], str]:
    text = QUESTIONS[number] if number > 1 else f"{IMAGE}\n{QUESTIONS[number]}"
    return ([picture(number)] if number < 3 else [], [], text)


def test_the_entry_point_names_the_model(plugin: Any) -> None:
    text = (ROOT / "pyproject.toml").read_text()
    named = re.search(r'\[project.entry-points."lmms_eval.models"\]\nvlmkd = "([\w.]+):(\w+)"', text)
    assert named and named[1] == plugin.__name__
    found = getattr(plugin, named[2])()
    assert (found.model_id, found.simple_class_path) == ("vlmkd", "projects.lmms_eval_plugin.Exported")
    assert (
        issubclass(plugin.Exported, import_module("lmms_eval.api.model").lmms) and plugin.Exported.is_simple
    )


def test_answers_are_those_of_one_question_alone(model: tuple[Any, ChatModel]) -> None:
    plugged, chat = model
    kwargs = {"max_new_tokens": 6, "temperature": 0, "image_aspect_ratio": "original"}
    order = [2, 0, 3, 1, 0]
    said = plugged.generate_until([request(number, dict(kwargs)) for number in order])
    expected = [chat.answer([alone(number)], most_tokens=6)[0] for number in order]
    assert said == expected and len(set(said)) == 4
    longer, cut = (kwargs | more for more in ({"max_new_tokens": 9}, {"until": [expected[0][2:3], ""]}))
    mixed = plugged.generate_until([request(2, longer), request(2, cut), request(0, kwargs)])
    assert mixed[0] == chat.answer([alone(2)], most_tokens=9)[0] and mixed[2] == expected[1]
    assert mixed[1] == expected[0].partition(expected[0][2:3])[0].strip()
    torch.manual_seed(0)
    assert plugged.generate_until([request(0, kwargs | {"temperature": 9.0, "top_p": 0.9})])[0] != expected[1]


def test_losses_are_those_of_the_whole_text(model: tuple[Any, ChatModel]) -> None:
    plugged, chat = model
    targets: list[Any] = [" a long one", lambda document: document["answer"], "b", " no"]
    found = [one.text for one in plugged.loglikelihood([*map(request, range(4), targets)])]
    for number, (answer, (loss, greedy)) in enumerate(
        zip(["a long one", "yes", "b", "no"], found, strict=True)
    ):
        images, _, question = alone(number)
        ids, learned = chat.tokens.encode([(question, answer)])
        batch = {
            "input_ids": torch.tensor([ids]), "segments": torch.ones(1, len(ids), dtype=torch.long),
            "images": chat.pictures_of(images), "image_rows": torch.arange(len(images)),
        }  # fmt: skip
        with torch.no_grad():
            chances = chat.model.head(chat.model(batch))[0].log_softmax(dim=1)
        places = [place for place, counts in enumerate(learned) if counts]
        assert loss == pytest.approx(
            -sum(float(chances[at - 1, ids[at]]) for at in places) / len(places), rel=1e-4
        )
        assert not greedy
    assert plugged.loglikelihood([SimpleNamespace(args=("", "b"))])[0].text[0] > 0


def test_what_is_said_greedily_is_told(
    model: tuple[Any, ChatModel], plugin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, chat = model
    monkeypatch.setattr(chat.tokens, "template", Template("", "{}"))
    monkeypatch.setattr(chat.tokens, "end", -1)
    question = next(
        letter * 3
        for letter in "abcdefghijklmnop"
        if chat.answer([([], [], letter * 3)], most_tokens=1)[0].isalnum()
    )
    (said,) = chat.answer([([], [], question)], most_tokens=1)
    chances = chat.model.head(chat.model({
        "input_ids": torch.tensor([chat.tokens.prompt([], question + said)]), "segments": torch.ones(1, 4).long(),
        "images": chat.pictures_of([]), "image_rows": torch.zeros(0).long(),
    }))[0, -1]  # fmt: skip
    for end in (int(chances.argmax()), int(chances.argmin())):
        monkeypatch.setattr(chat.tokens, "end", end)
        assert plugin.losses(chat, [([], [], question, said)])[0][1] is (end == int(chances.argmax()))


def test_what_is_not_offered_is_told(model: tuple[Any, ChatModel], plugin: Any) -> None:
    plugged, _ = model
    video = SimpleNamespace(args=("?", {}, lambda document: ["film.mp4"], 0, "task", "test"))
    with pytest.raises(UserError, match="a task shows str, which is no image"):
        plugged.generate_until([video])
    with pytest.raises(UserError, match="--batch_size auto is not supported"):
        plugin.Exported(pretrained="x", batch_size="auto")
    with pytest.raises(UserError, match="does not exist; name a run, or its `export` folder"):
        plugin.Exported(pretrained="x")
    with pytest.raises(NotImplementedError, match="several"):
        plugged.generate_until_multi_round([])
