"""Answers: scores by hand, and a batch of questions of unequal lengths against one at a time without a cache."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.chat_parts import byte_tokenizer, picture
from vlmkd.chat_config import QuestionsConfig
from vlmkd.chat_runs import questions
from vlmkd.data.chats import ChatItem, ChatTokens
from vlmkd.errors import UserError
from vlmkd.evaluation.answers import Answers, ChatModel, Question, chair, mentions, pope, scores
from vlmkd.evaluation.base import Context, spread
from vlmkd.models.backbones import load_backbone
from vlmkd.models.mllm import Mllm, Projector, VisionTower


@pytest.fixture(scope="module")
def model() -> ChatModel:
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    decoder = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=260, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.4,
        )
    ).eval()  # fmt: skip
    tower = VisionTower(load_backbone("timm:vit_tiny_patch16_224", False, image_size=32, seed=0)).eval()
    mllm = Mllm(tower, Projector(tower.dim, 16), decoder)
    return ChatModel("tiny", mllm, ChatTokens(tokenizer, "plain", tower.tokens), tower.image_spec)


def test_a_batch_answers_as_one_at_a_time_without_a_cache(
    model: ChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [
        ([picture(1)], [], "<image>what?"),
        ([], [], "a longer question without any image"),
        ([picture(2)], [("<image>b", "c")], "and now?"),
    ]
    together = model.answer(asked, most_tokens=6)
    for one, said in zip(asked, together, strict=True):
        assert model.answer([one], most_tokens=6) == [said]
        assert model.answer([one], most_tokens=6, use_cache=False) == [said]
    assert len(set(together)) == 3
    own = model.model.decoder.generation_config
    monkeypatch.setattr(own, "repetition_penalty", 9.0)  # as chat decoders bring some
    assert model.answer(asked, most_tokens=6) == together
    torch.manual_seed(0)
    sampled = model.answer(asked[:1] * 8, most_tokens=6, temperature=5.0)
    assert len(set(sampled)) > 1


def test_pope_by_hand() -> None:
    pairs = [("Yes.", "Yes."), ("Yes.", "No, there is not."), ("No.", "It is. No."), ("No.", "no")]
    assert pope(pairs) == {
        "accuracy": 0.5, "precision": 0.5, "recall": 0.5, "f1": pytest.approx(0.5), "yes_ratio": 0.5,
    }  # fmt: skip
    assert pope([("No.", "not at all")]) == {
        "accuracy": 1,
        "precision": 0,
        "recall": 0,
        "f1": 0,
        "yes_ratio": 0,
    }


def test_chair_by_hand() -> None:
    vocabulary = ["cat", "cat face", "ring", "bus"]
    pairs = [
        (["cat face", "ring"], "A cat face and a bus."),  # not a cat; the bus is not there
        (["cat"], "Two cats."),
        (["bus"], "Nothing at all, or a ringing bell"),
    ]
    assert chair(pairs, vocabulary) == {"chair_i": 1 / 3, "chair_s": 1 / 3, "cover": 0.5}


def test_mentions_are_found_where_they_stand() -> None:
    text = "İ: two CATS, a cat face."
    found = mentions(text, ["cat", "Cat face", "ring"])
    assert [(text[begin:end], name) for begin, end, name in found] == [
        ("CATS", "cat"),
        ("cat face", "Cat face"),
    ]


def test_scores_by_kind() -> None:
    def question(kind: str, truth: str, **more) -> Question:
        record = {
            "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": truth}],
            "kind": kind, **more,
        }  # fmt: skip
        return Question.of(ChatItem(kind + truth, record, ""))

    pairs = [
        (question("count", "Two."), "two"),
        (question("count", "Three."), "Two."),
        (question("where", "At the top left."), "At the top  left."),
        (question("exists", "Yes."), "Yes"),
        (question("caption", "A cat.", things=["cat"]), "A bus."),
    ]
    metrics, meanings = scores(pairs, ["cat", "bus"])
    assert (metrics["count"], metrics["where"], metrics["f1"]) == (0.5, 1.0, pytest.approx(1))
    assert (metrics["chair_i"], metrics["chair_s"], metrics["cover"]) == (1, 1, 0)
    assert meanings.keys() == metrics.keys()
    assert metrics["exists"] == 1.0  # whose accuracy has another name beside that of the kinds
    assert metrics["accuracy"] == 0.75 and meanings["chair_s"].higher_is_better is False


def test_every_question_is_asked_and_kept(model: ChatModel, tmp_path) -> None:
    (tmp_path / "a.png").write_bytes(picture(1))
    items = []
    for number in range(5):
        talk = [{"from": "human", "value": "<image>" + "x" * number}, {"from": "gpt", "value": "Yes."}]
        items.append(
            ChatItem(str(number), {"image": "a.png", "conversations": talk, "kind": "exists"}, str(tmp_path))
        )
    (result,) = Answers(items, "things").run(model, Context(batch_size=2, progress=False))
    assert result.count == 5 and {one["key"] for one in result.details["answers"]} == set("01234")
    assert result.metrics["recall"] == result.metrics["yes_ratio"]
    json.dumps(result.details)


def test_a_part_of_the_questions_has_all_kinds() -> None:
    questions = [(number, number % 16) for number in range(800)]  # kinds that take turns
    part = spread(questions, 200)
    assert len(part) == 200 and list(part) == sorted(part) == list(spread(questions, 200))
    assert {kind for _, kind in part} == set(range(16))
    assert spread(questions, 0) == spread(questions, 800) == questions


def test_a_placeholder_that_is_said_is_left_out(model: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = model.tokens.tokenizer("an <image> of it")["input_ids"]
    monkeypatch.setattr(model, "complete", lambda *_, **__: [ids])
    assert model.answer([([], [], "what?")], most_tokens=1) == ["an  of it"]


def test_a_question_names_its_images(model: ChatModel) -> None:
    one, two = picture(1), picture(2)
    for asked, told in (
        ([([], [], "<image>what?")], r"'<image>what\?' and what was said before have 1 <image> for 0 images"),
        ([([one], [], "what?")], "have 0 <image> for 1 images; write one for each"),
        ([([], [("<image>", "a")], "?"), ([one, two], [], "<image>?")], r"'\?' and .* have 1 <image> for 0"),
    ):
        with pytest.raises(UserError, match=told):
            model.answer(asked, most_tokens=1)  # type: ignore[arg-type]


def test_a_file_that_cannot_be_asked_is_refused(tmp_path) -> None:
    path, names = tmp_path / "asked.json", tmp_path / "names.json"
    talk = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "A cat."}]
    caption = {"conversations": talk, "kind": "caption", "things": ["cat"]}
    names.write_text('["cat", "dog"]')
    for records, vocabulary, told in (
        ([], "", "asked.json has no question; name another file"),
        ([{"id": "a"}], "", "asked.json: question a has no list of turns .*; correct the record"),
        ([{"conversations": talk[:1]}], "", "question 0 ends without an answer"),
        ([{"id": 1, "conversations": talk}] * 2, "", "asked.json has two questions 1; give each its own id"),
        ([caption], "", "has captions; give their `vocabulary`, a list of names"),
        ([caption], path, "has captions; give their `vocabulary`, a list of names"),
        (
            [caption | {"things": None}],
            names,
            "question 0 is of kind caption and has no list `things`; add it",
        ),
    ):
        path.write_text(json.dumps(records))
        with pytest.raises(UserError, match=f"config field evaluation.questions: .*{told}"):
            questions(QuestionsConfig(data=str(path), vocabulary=str(vocabulary)))
    path.write_text(json.dumps([caption]))
    assert len(questions(QuestionsConfig(data=str(path), vocabulary=str(names))).questions) == 1
