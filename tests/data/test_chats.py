"""Chats: what is learned, which records are dropped and why, padding against packing, pairs."""

from __future__ import annotations

import base64
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests.chat_parts import byte_tokenizer
from vlmkd.chat_ids import IGNORED, IMAGE_ID
from vlmkd.data.chats import TEMPLATES, ChatItem, ChatPipeline, ChatTokens, read_chats
from vlmkd.data.samples import BadSample, RawSample
from vlmkd.errors import UserError


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def raw(turns, images=(), **more) -> RawSample:
    names = ("human", "gpt")
    talk = [{"from": names[number % 2], "value": text} for number, text in enumerate(turns)]
    record = {"conversations": talk, **more}
    members = {"json": json.dumps(record).encode(), **{f"{n}.png": data for n, data in enumerate(images)}}
    return RawSample("", "one", members)


def learned(tokenizer, ids, targets) -> str:
    """What is learned, as text."""
    for position, target in enumerate(targets[:-1]):
        assert target in (IGNORED, ids[position + 1])
    assert targets[-1] == IGNORED
    return tokenizer.decode([target for target in targets if target != IGNORED])


@pytest.mark.parametrize(
    ("template", "text", "answers"),
    [
        (
            "llava",
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the user's questions. USER: Where? ASSISTANT: On the couch.<|endoftext|>"
            "USER: And now? ASSISTANT: Sleeping.<|endoftext|>",
            " On the couch.<|endoftext|> Sleeping.<|endoftext|>",
        ),
        (
            "chatml",
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nWhere?<|im_end|>\n"
            "<|im_start|>assistant\nOn the couch.<|im_end|>\n<|im_start|>user\nAnd now?<|im_end|>\n"
            "<|im_start|>assistant\nSleeping.<|im_end|>\n",
            "On the couch.<|im_end|>Sleeping.<|im_end|>",
        ),
    ],
)
def test_answers_and_their_ends_are_learned(tokenizer, spec, template, text, answers):
    pipeline = ChatPipeline(ChatTokens(tokenizer, template, 4), spec)
    chat = pipeline.process(raw(["Where?", "On the couch.", "And now?", "Sleeping."]))
    ((ids, targets),) = chat.rows
    assert tokenizer.decode(ids) == text and ids == tokenizer(text)["input_ids"]
    assert learned(tokenizer, ids, targets) == answers
    prompt = pipeline.tokens.prompt([("Where?", "On the couch.")], "And now?")
    assert ids[: len(prompt)] == prompt and targets[len(prompt) - 1] != IGNORED


def qwen2_tokenizer() -> Qwen2Tokenizer:
    """Qwen2's tokens, of the ranks that Alibaba's client package holds (`pip install --no-deps dashscope`)."""
    package = importlib.util.find_spec("dashscope")
    if package is None or package.origin is None:
        pytest.skip("dashscope, which has Qwen's tokens, is not installed")
    lines = (Path(package.origin).parent / "resources" / "qwen.tiktoken").read_text().splitlines()
    character = bytes_to_unicode()
    ranks = {
        "".join(character[byte] for byte in base64.b64decode(token)): int(rank)
        for token, rank in (line.split() for line in lines)
    }
    merges = [
        (ranks[token], ranks[token[:cut]], ranks[token[cut:]], token[:cut], token[cut:])
        for token in ranks
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    ends = {"<|endoftext|>": len(ranks), "<|im_start|>": len(ranks) + 1, "<|im_end|>": len(ranks) + 2}
    return Qwen2Tokenizer(vocab=ranks | ends, merges=[merge[3:] for merge in sorted(merges)])


def test_qwen2_learns_the_tokens_that_the_released_code_does(spec, encoded_image):
    """The released code's own results; of the questions it shows one alone."""
    pipeline = ChatPipeline(ChatTokens(qwen2_tokenizer(), "llava", 1), spec)

    def answers(*turns: str) -> list[str]:
        chat = pipeline.process(raw(["<image>\n" + turns[0], *turns[1:]], [encoded_image(1)]))
        ((ids, targets),) = chat.rows
        assert ids.count(IMAGE_ID) == 1
        return [pipeline.tokens.tokenizer.decode([target]) for target in targets if target != IGNORED]

    end = "<|endoftext|>"
    assert answers("How many?", "3") == [" ", "3", end]
    said = answers("Where?", "On the couch.", "And now?", "Sleeping.")
    assert said == [" On", " the", " couch", ".", end, " Sleeping", ".", end]


def test_an_answer_that_looks_like_the_template_is_learned_whole(tokenizer, spec):
    pipeline = ChatPipeline(ChatTokens(tokenizer, "llava", 4), spec)
    ((ids, targets),) = pipeline.process(raw(["Say it", "USER: no ASSISTANT: yes"])).rows
    assert learned(tokenizer, ids, targets) == " USER: no ASSISTANT: yes<|endoftext|>"


def test_images_stand_where_they_were_named(tokenizer, spec, encoded_image):
    pipeline = ChatPipeline(ChatTokens(tokenizer, "plain", 3), spec)
    pictures = [encoded_image(1), encoded_image(2)]
    chat = pipeline.process(raw(["<image>a<image>", "b"], pictures))
    ((ids, _),) = chat.rows
    assert ids[:7] == [IMAGE_ID] * 3 + tokenizer("a")["input_ids"] + [IMAGE_ID] * 3
    other = pipeline.process(raw(["c", "d"]))
    batch = pipeline.collate([other, chat, chat])
    pipeline.check(batch, 3)
    assert batch["images"].shape == (4, 3, 16, 16) and batch["image_rows"].tolist() == [0, 1, 2, 3]
    assert torch.equal(batch["images"][0], batch["images"][2]) and batch["segments"][0].sum() == len(
        other.rows[0][0]
    )
    text_only = pipeline.collate([other])
    assert text_only["images"].shape == (0, 3, 16, 16) and text_only["image_rows"].tolist() == []


@pytest.mark.parametrize("pack", [False, True])
def test_pairs_share_their_image(tokenizer, spec, encoded_image, pack):
    pipeline = ChatPipeline(ChatTokens(tokenizer, "plain", 2), spec, max_length=40, pack=pack)

    def pair(number: int):
        talk = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "yes" * number}]
        other = [talk[0], {"from": "gpt", "value": "no" * number}]
        return pipeline.process(raw([], [encoded_image(number)], chosen=talk, rejected=other))

    batch = pipeline.collate([pair(1), pair(2)])
    assert batch["images"].shape[0] == 2 and batch["image_rows"].tolist() == [0, 1, 0, 1]
    said = [tokenizer.decode(row[row != IGNORED].tolist()) for row in batch["targets"]]
    end = "\n<|endoftext|>"
    assert "".join(said) == f"yes{end}yesyes{end}no{end}nono{end}" and len(said) == 4
    with pytest.raises(UserError, match="preference records and plain ones"):
        pipeline.collate([pair(1), pipeline.process(raw(["a", "b"]))])


def test_packed_rows_hold_whole_chats_and_no_more_than_fits(tokenizer, spec):
    tokens = ChatTokens(tokenizer, "plain", 2)
    texts = ["a" * length for length in (9, 3, 14, 5, 2)]
    apart = [ChatPipeline(tokens, spec).process(raw(["?", text])) for text in texts]
    batch = ChatPipeline(tokens, spec, max_length=20, pack=True).collate(apart)
    assert batch["input_ids"].shape[1] <= 20 and len(batch["input_ids"]) < 5
    found = []
    for ids, targets, segments in zip(batch["input_ids"], batch["targets"], batch["segments"], strict=True):
        for number in range(1, int(segments.max()) + 1):
            inside = segments == number
            found.append((ids[inside].tolist(), targets[inside].tolist()))
        assert (targets[segments == 0] == IGNORED).all()
    assert sorted(found) == sorted(chat.rows[0] for chat in apart)


def refusal(pipeline: ChatPipeline, given: RawSample) -> tuple[str, str]:
    """Reason and detail for which a chat is dropped."""
    with pytest.raises(BadSample) as caught:
        pipeline.process(given)
    return caught.value.reason, caught.value.detail


@pytest.mark.parametrize(
    ("turns", "pictures", "reason"),
    [
        (["a", "b", "c"], 0, "nothing_to_learn"),
        ([], 0, "nothing_to_learn"),
        (["a", ""], 0, None),  # the end alone is learned
        (["<image>a", "b"], 0, "image_count"),
        (["a", "b"], 1, "image_count"),
        (["<image>" * 17, "b"], 17, "image_count"),
        (["long " * 100, "b"], 0, "too_long"),
    ],
)
def test_each_defect_has_its_reason(tokenizer, spec, encoded_image, turns, pictures, reason):
    pipeline = ChatPipeline(ChatTokens(tokenizer, "plain", 2), spec, max_length=60)
    given = raw(turns, [encoded_image(number) for number in range(pictures)])
    assert (refusal(pipeline, given)[0] if reason else pipeline.process(given) and None) == reason


def test_turns_must_alternate_and_a_first_answer_is_dropped(tokenizer, spec, encoded_image):
    pipeline = ChatPipeline(ChatTokens(tokenizer, "plain", 2), spec)
    members = {"json": json.dumps({"conversations": [{"from": "human", "value": "a"}] * 2}).encode()}
    told = ("bad_record", "turn 1 is from 'human' where gpt must speak")
    assert refusal(pipeline, RawSample("", "x", members)) == told
    talk = [{"from": who, "value": text} for who, text in (("gpt", "hello"), ("human", "a"), ("gpt", "b"))]
    chat = pipeline.process(RawSample("", "x", {"json": json.dumps({"conversations": talk}).encode()}))
    assert tokenizer.decode(chat.rows[0][0]) == "ab\n<|endoftext|>"
    for content in (b"", b"[1]", b'{"conversations": 3}', b'{"conversations": [{"from": "human"}]}'):
        assert refusal(pipeline, RawSample("", "x", {"json": content}))[0] == "bad_record"
    torn = raw(["<image>", "b"], [encoded_image(1)[:150]])
    assert refusal(pipeline, torn)[0] == "undecodable_image"


def test_a_long_answer_is_cut_and_counted(tokenizer, spec):
    pipeline = ChatPipeline(ChatTokens(tokenizer, "plain", 2), spec, max_length=10)
    batch = pipeline.collate([pipeline.process(raw(["?", "a" * 30])), pipeline.process(raw(["?", "a"]))])
    assert batch["cut"] == 1 and batch["input_ids"].shape == (2, 10)
    assert int((batch["targets"][0] != IGNORED).sum()) == 9


def test_the_first_row_is_shown_with_what_is_learned(tokenizer, spec, encoded_image, caplog):
    pipeline = ChatPipeline(ChatTokens(tokenizer, "llava", 2), spec)
    batch = pipeline.collate([pipeline.process(raw(["<image>Where?", "Here."], [encoded_image(1)]))])
    with caplog.at_level("INFO"):
        pipeline.check(batch, 1)
    assert "USER: [image]Where? ASSISTANT:<< Here.<|endoftext|>>>" in caplog.text


def test_records_of_a_file(tmp_path, encoded_image):
    (tmp_path / "a.png").write_bytes(encoded_image(1))
    record = {"id": "x/1", "image": "a.png", "conversations": []}
    (tmp_path / "chats.json").write_text(json.dumps([record, {"image": ["a.png", "gone.png"]}, {}]))
    items = read_chats(str(tmp_path / "chats.json"), str(tmp_path))
    assert [item.key for item in items] == ["x/1", "1", "2"]
    assert items[0].members() == {"json": json.dumps(record).encode(), "0.png": encoded_image(1)}
    with pytest.raises(UserError, match="gone.png of chat 1 cannot be read .*mend the record or data.images"):
        items[1].members()
    assert items[2].members().keys() == {"json"} and isinstance(items[2], ChatItem)
    (tmp_path / "chats.jsonl").write_text(f"{json.dumps(record)}\n\n{{}}\n")
    assert [item.key for item in read_chats(str(tmp_path / "chats.jsonl"), "")] == ["x/1", "1"]
    (tmp_path / "chats.jsonl").write_text(
        '{"id": "a\u2028b"}\r\n{"id": "c\x85"}', encoding="utf-8", newline=""
    )
    assert [item.key for item in read_chats(str(tmp_path / "chats.jsonl"), "")] == ["a\u2028b", "c\x85"]
    (tmp_path / "chats.jsonl").write_text("{}\n{,")
    with pytest.raises(UserError, match="chats.jsonl: line 2 is no JSON"):
        read_chats(str(tmp_path / "chats.jsonl"), "")
    (tmp_path / "chats.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match="must be a list of records"):
        read_chats(str(tmp_path / "chats.json"), "")
    with pytest.raises(UserError, match="data.template is 'vicuna'; choose one of llava"):
        ChatTokens(None, "vicuna", 1)


def test_the_prompt_has_the_tokens_of_the_whole_text():
    """` USER` is one token, as in Qwen's vocabulary, also behind the system's text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        special_tokens=["<|endoftext|>"], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )  # fmt: skip
    core.train_from_iterator([" USER: ASSISTANT: questions."] * 3, trainer)
    assert core.token_to_id("ĠUSER") is not None
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>")
    tokens = ChatTokens(tokenizer, "llava", 2)
    turns = [("<image>\nWhere?", "On it."), ("And now?", "3")]
    ids, _ = tokens.encode(turns)
    before, behind = (
        f"{TEMPLATES['llava'].system}USER: ",
        "\nWhere? ASSISTANT: On it.<|endoftext|>USER: And now? ASSISTANT: 3<|endoftext|>",
    )
    assert ids == tokenizer(before)["input_ids"] + [IMAGE_ID] * 2 + tokenizer(behind)["input_ids"]
    # A chat goes on with what it has: each prompt begins as the conversation did.
    for said in (0, 1):
        prompt = tokens.prompt(turns[:said], turns[said][0])
        assert ids[: len(prompt)] == prompt
        assert tokens.encode(turns[: said + 1])[0] == ids[: len(tokens.encode(turns[: said + 1])[0])]


def test_an_image_in_an_answer_is_not_learned(tokenizer, spec, encoded_image):
    pipeline = ChatPipeline(ChatTokens(tokenizer, "plain", 2), spec)
    ((ids, targets),) = pipeline.process(raw(["?", "a<image>b"], [encoded_image(1)])).rows
    assert ids[1:5] == [*tokenizer("a")["input_ids"], IMAGE_ID, IMAGE_ID, *tokenizer("b")["input_ids"]]
    assert learned(tokenizer, ids, targets) == "ab\n<|endoftext|>"
    short = ChatPipeline(ChatTokens(tokenizer, "plain", 2), spec, max_length=3)
    alone = raw(["?", "<image>and more"], [encoded_image(1)])
    assert refusal(short, alone) == ("too_long", "has nothing to learn within the first 3 tokens")


@pytest.mark.parametrize("length", [6, 7])  # before the second image, and inside
def test_a_chat_that_would_lose_an_image_is_dropped(tokenizer, spec, encoded_image, length):
    """Cut, its image would stand in the places of its neighbour's."""
    pictures = [encoded_image(1), encoded_image(2)]
    pipeline = ChatPipeline(ChatTokens(tokenizer, "plain", 2), spec, max_length=length)
    told = ("too_long", f"has an image beyond the first {length} tokens")
    assert refusal(pipeline, raw(["<image>a", "b", "<image>c", "d"], pictures)) == told
    whole = pipeline.process(raw(["<image><image>?", "and a long answer"], pictures))
    batch = pipeline.collate([whole, whole])
    assert batch["cut"] == 2
    pipeline.check(batch, 2)


def test_an_end_that_the_tokenizer_does_not_have_is_refused():
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"?": 0}, merges=[])))
    with pytest.raises(UserError, match="template: chatml ends answers with <.im_end.>, which the tokenizer"):
        ChatTokens(plain, "chatml", 1)
    with pytest.raises(UserError, match="template: llava needs a tokenizer with an end; choose another"):
        ChatTokens(plain, "llava", 1)
