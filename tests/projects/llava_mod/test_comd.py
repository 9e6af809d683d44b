"""CoMD's rounds: scores by hand, who is asked what and how often, and two rounds against a server in a thread."""

from __future__ import annotations

import base64
import http.server
import json
import random
import threading
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from projects import surgery_of
from projects.llava_mod import comd
from projects.llava_mod.comd import (
    dedup,
    difference,
    mix,
    parse_scores,
    read_pool,
    rouge_l,
    split_difficult,
)
from projects.llava_mod.speakers import Endpoint, Local, Replayed, Request, collect
from tests.chat_parts import byte_tokenizer, picture
from vlmkd.chat_config import MllmConfig
from vlmkd.chat_runs import open_chat
from vlmkd.data.chats import ChatItem
from vlmkd.errors import UserError
from vlmkd.export.mllm import build_mllm, export_mllm
from vlmkd.service import Service


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ("8 7\nThe first is better.", (8.0, 7.0)),
        (" 9.5, 10\n", (9.5, 10.0)),
        ("8 7 6", None),
        ("8", None),
        ("Assistant 1: 8, Assistant 2: 7", None),
        ("0 5", None),
        ("11 5", None),
        ("", None),
        ("I cannot say.\n8 7", None),
    ],
)
def test_a_verdict_is_read_or_dropped(text: str, scores: tuple[float, float] | None) -> None:
    assert parse_scores(text) == scores


def test_the_difference_is_the_mean_over_both_orders() -> None:
    # The teacher has 8 as the first and 6 as the second, the student 5 and 7.
    assert difference((8, 7), (5, 6)) == pytest.approx(1.0)
    assert difference((9, 4), (9, 4)) == 0  # an assessor who likes whatever comes first


def test_the_threshold_itself_is_difficult() -> None:
    difficult, easy = split_difficult({"a": 1.0, "b": 0.99, "c": -3.0, "d": 4.0}, 1.0)
    assert (difficult, easy) == ({"a", "d"}, {"b", "c"})


def test_rouge_by_hand_and_against_the_whole_table() -> None:
    assert rouge_l("What is in the picture?", "what is in this picture") == pytest.approx(0.8)
    assert rouge_l("the cat", "the cat") == 1 and rouge_l("", "a") == rouge_l("", "") == 0
    draw = random.Random(0)
    for _ in range(200):
        one, other = (draw.choices("abcd", k=draw.randrange(1, 90)) for _ in range(2))
        table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
        for i, left in enumerate(one):
            for j, right in enumerate(other):
                table[i + 1][j + 1] = (
                    table[i][j] + 1 if left == right else max(table[i][j + 1], table[i + 1][j])
                )
        expected = 2 * table[-1][-1] / (len(one) + len(other))
        assert rouge_l(" ".join(one), " ".join(other)) == pytest.approx(expected)


def test_near_copies_of_the_pool_and_of_each_other_are_left_out() -> None:
    new = {
        "copy": "What is in this picture?", "other": "How many birds sit on the roof?",
        "twin": "How many birds are on the roof?", "last": "Name the city.",
    }  # fmt: skip
    assert dedup(new, ["what is in the picture"], 0.7) == ["other", "last"]
    assert dedup(new, ["what is in the picture"], 1.0) == list(new)
    assert dedup({"a": "x y"}, ["x y z"], 0.8) == ["a"] and not dedup({"a": "x y"}, ["x y z"], 0.79)


def test_a_pool_grows_by_the_new_and_keeps_a_share() -> None:
    new, old = [{"id": "n1"}, {"id": "n2"}], [{"id": str(number)} for number in range(9)]
    mixed = mix(new, old, 1.5, random.Random(1))
    assert mixed[:2] == new and len(mixed) == 5 and len({one["id"] for one in mixed}) == 5
    assert mixed == mix(new, old, 1.5, random.Random(1)) != mix(new, old, 1.5, random.Random(2))
    assert len(mix(new, old, 100.0, random.Random(1))) == 11


class Server(http.server.ThreadingHTTPServer):
    """OpenAI's chat form; who is asked is the model's name. The augmentor has one idea about what is hard."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[dict[str, Any]] = []
        self.told: list[str | None] = []
        self.fails: Counter[str] = Counter()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1/chat/completions"

    def said(self, asked: dict[str, Any]) -> tuple[int, Any]:
        content = asked["messages"][-1]["content"]
        words = content if isinstance(content, str) else content[-1]["text"]
        for sign, status in (("refused", 400), ("unclear", 200), ("lost", 502)):
            if sign in words and not self.fails[sign]:
                self.fails[sign] += 1
                return status, {"odd": True}
        if asked["model"] == "teacher":
            return 200, f"sure: {words}"
        if asked["model"] == "augmentor":
            seed = words.partition("\n\n")[2]
            return 200, "same again" if "hard" in seed else f"<image> number {zlib.crc32(seed.encode())}"
        first = words.partition("[Answer of assistant 1]\n")[2]
        lead = 9 if "hard" in words else 6
        return 200, (
            f"{lead} 6\nbecause" if first.startswith("sure") else f"6 {lead}"
        ) if "odd one" not in words else "no"


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:  # noqa: N802
        owner: Any = self.server
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        owner.asked.append(asked)
        owner.told.append(self.headers.get("Authorization"))
        status, said = owner.said(asked)
        body = json.dumps(
            said if isinstance(said, dict) else {"choices": [{"message": {"content": said}}]}
        ).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Keep the test output clean."""


@pytest.fixture
def server() -> Iterator[Server]:
    started = Server()
    threading.Thread(target=started.serve_forever, daemon=True).start()
    yield started
    started.shutdown()
    started.server_close()


def test_an_endpoint_gets_turns_and_pictures_and_keeps_what_came(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHAT_TOKEN", "secret")
    (tmp_path / "a.png").write_bytes(picture(1))
    item = ChatItem("a", {"image": "a.png"}, str(tmp_path))
    endpoint = Endpoint(Service(url=server.url, token_env="CHAT_TOKEN", retries=0), "teacher", 7)
    said = dict(endpoint([Request("a", "<image>\nand this?", [("<image>what?", "a cat")], item)]))
    assert said == {"a": "sure: and this?"} and server.told == ["Bearer secret"]
    (asked,) = server.asked
    assert (asked["model"], asked["max_tokens"], asked["temperature"]) == ("teacher", 7, 0)
    assert asked["messages"][:2] == [
        {"role": "user", "content": "what?"},
        {"role": "assistant", "content": "a cat"},
    ]
    url = asked["messages"][2]["content"][0]["image_url"]["url"]
    assert url == f"data:image/png;base64,{base64.b64encode(picture(1)).decode()}"
    assert dict(endpoint([Request("r", "refused")])) == {"r": ""}
    out = tmp_path / "answers.jsonl"
    requests = [Request(str(number), text) for number, text in enumerate(["one", "unclear", "two", "lost"])]
    for told in ("1: the reply is not of OpenAI's chat form|3: .*502", "not of OpenAI's chat form|502", ""):
        if told:
            with pytest.raises(UserError, match=told):
                collect(lambda: endpoint, requests, out, 2)
        else:
            assert collect(lambda: endpoint, requests, out, 2)["3"] == "sure: lost"
        assert "sure: one" in dict(Replayed(out)([Request("0", "")])).values()
    words = Counter(json.dumps(asked["messages"]) for asked in server.asked[2:])
    assert sorted(words.values()) == [1, 1, 2, 2]  # the two that failed once, no other


def test_a_killed_command_goes_on_and_a_changed_question_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "answers.jsonl"
    asked: list[str] = []

    def speaker(requests: Any) -> Iterator[tuple[str, str]]:
        for request in requests:
            asked.append(request.key)
            yield request.key, f"to {request.text}\u2028\n"

    requests = [Request(str(number), f"q{number}") for number in range(5)]
    collect(lambda: speaker, requests[:3], out, 2)
    out.write_bytes(out.read_bytes()[:-9])  # in the middle of the last line
    said = collect(lambda: speaker, requests, out, 2)
    assert asked == ["0", "1", "2", "2", "3", "4"] and said["2"] == "to q2\u2028\n"
    assert dict(Replayed(out)(requests)) == said
    collect(lambda: pytest.fail("nobody is needed"), requests, out, 2)
    with pytest.raises(UserError, match="2 was another question"):
        collect(lambda: speaker, [Request("2", "else")], out, 2)
    with pytest.raises(UserError, match="has no answer to 9"):
        list(Replayed(out)([Request("9", "")]))
    (tmp_path / "bad.jsonl").write_text('{"id": "1", "said": "x"}\n{"id": "2"}\n')
    with pytest.raises(UserError, match="bad.jsonl: line 2 is no"):
        Replayed(tmp_path / "bad.jsonl")


def test_two_rounds_against_a_service_ask_nothing_twice(server: Server, tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    words = ["a hard one", "an easy one", "an odd one", "another hard thing"]
    cache = [
        {
            "id": f"c{n}",
            "image": f"{n}.png",
            "conversations": [{"from": "human", "value": f"<image>\n{text}"}],
        }
        for n, text in enumerate(words)
    ]
    train = [{**one, "id": one["id"].replace("c", "t")} for one in cache]
    train[0]["conversations"] = [*train[0]["conversations"], {"from": "gpt", "value": "of the data"}]
    pools = {"train": tmp_path / "train.json", "cache": tmp_path / "cache.json"}
    for name, content in (("train", train), ("cache", cache)):
        pools[name].write_text(json.dumps(content))
    teacher, images = tmp_path / "teacher.jsonl", f"images={tmp_path}"

    def step(name: str, who: str, *given: str) -> None:
        assert (
            comd.main([name, *given, images, f"url={server.url}", f"model={who}", "retries=0", "seed=3"]) == 0
        )

    for number in (1, 2):
        folder, following = tmp_path / f"round_{number}", tmp_path / f"round_{number + 1}"
        for _ in range(2):  # a round that is begun again asks nobody
            step(
                "answer",
                "teacher",
                f"pool={pools['train']}",
                f"out={teacher}",
                f"chats={folder / 'tune.jsonl'}",
            )
            step("answer", "teacher", f"pool={pools['cache']}", f"out={teacher}")
            keys = [one.item.key for one in read_pool(str(pools["cache"]), str(tmp_path))]
            said = "".join(json.dumps({"id": key, "said": "a student's"}) + "\n" for key in keys)
            (folder / "student.jsonl").write_text(said)
            files = (f"pool={pools['cache']}", f"folder={folder}")
            step("assess", "assessor", *files, f"teacher={teacher}", f"student={folder / 'student.jsonl'}")
            step("augment", "augmentor", *files, f"train={pools['train']}", f"next={following}", "new=4")
        if number == 1:
            lines = [json.loads(line) for line in (folder / "tune.jsonl").read_text().splitlines()]
            assert lines[0]["conversations"][-1] == {"from": "gpt", "value": "sure: a hard one"}
            assert lines[0]["image"] == "0.png" and len(lines) == 4
            scores = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
            assert {one["id"]: one["difference"] for one in scores} == {"c0": 3.0, "c1": 0.0, "c3": 3.0}
            parts = [
                [one.item.key for one in read_pool(str(folder / f"{name}.jsonl"), "")]
                for name in ("difficult", "easy")
            ]
            assert parts == [["c0", "c3"], ["c1"]]  # the odd one has no scores, so it is neither
            new = read_pool(str(folder / "new.jsonl"), "")
            assert len(new) == 2 and new[0].words == "same again"
            assert new[1].text.count("<image>") == 1 and new[1].item.record["image"] in (
                "0.png",
                "1.png",
                "3.png",
            )
            assert new[0].item.key.startswith("round_1-c")
        pools = {name: following / f"{name}.jsonl" for name in pools}
    assert (
        max(Counter(json.dumps(asked) for asked in server.asked if asked["model"] == "teacher").values()) == 2
    )  # train and cache have the same words
    grown = [one.item.key for one in read_pool(str(pools["cache"]), "")]
    assert grown[:4] == ["c0", "c1", "c2", "c3"] and len(grown) > 6


@pytest.mark.parametrize(
    ("difficult", "easy", "asked"),
    [(3, 9, (3, 3)), (9, 1, (1, 1)), (9, 8, (5, 5)), (0, 9, (0, 5)), (2, 0, (2, 0))],
)
def test_as_many_are_written_from_difficult_ones_as_from_easy_ones(
    difficult: int, easy: int, asked: tuple[int, int], server: Server, tmp_path: Path
) -> None:
    for name, count in (("difficult", difficult), ("easy", easy), ("train", 1), ("cache", 1)):
        lines = [
            {"id": f"{name}{n}", "conversations": [{"from": "human", "value": f"a {name} one, {n}"}]}
            for n in range(count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = [f"train={tmp_path / 'train.jsonl'}", f"pool={tmp_path / 'cache.jsonl'}", f"folder={tmp_path}"]
    said = [f"next={tmp_path / 'next'}", f"url={server.url}", "model=augmentor", "retries=0", "new=10"]
    assert comd.main(["augment", *files, *said]) == 0
    wishes = [one["messages"][-1]["content"] for one in server.asked]
    assert tuple(sum(f"a {kind} one" in wish for wish in wishes) for kind in ("difficult", "easy")) == asked


def test_mistakes_are_named(tmp_path: Path) -> None:
    pool = tmp_path / "pool.json"
    pool.write_text(json.dumps([{"id": "a", "conversations": []}]))
    for arguments, told in (
        (["answer", "pool=x", "out=y"], "config field by and url: give one of them"),
        (["answer", "pool=x", "by=z"], "config field out is missing; answer needs it"),
        (["answer", f"pool={pool}", "out=y", "by=z.jsonl"], "record a has no|record a ends without"),
        (["answer", f"pool={tmp_path / 'no.json'}", "out=y", "by=z.jsonl"], "no.json does not exist"),
    ):
        with pytest.raises(UserError, match=told):
            if "pool=x" in arguments:
                pool_x = tmp_path / "x.json"
                pool_x.write_text(
                    json.dumps([{"id": "a", "conversations": [{"from": "human", "value": "?"}]}])
                )
                arguments = [
                    word.replace("pool=x", f"pool={pool_x}").replace("out=y", f"out={tmp_path / 'y'}")
                    for word in arguments
                ]
            comd.main(arguments)
    pool.write_text(json.dumps([{"id": "a", "conversations": [{"from": "human", "value": "?"}]}] * 2))
    with pytest.raises(UserError, match="two records have the id a"):
        read_pool(str(pool), "")


def test_an_export_answers_with_a_picture_and_without(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = LlamaConfig(
        vocab_size=260, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(sizes).save_pretrained(tmp_path / "decoder")
    byte_tokenizer().save_pretrained(tmp_path / "decoder")
    decoder = f"hf:{tmp_path / 'decoder'}"
    cfg = MllmConfig(tower="efficientnet-lite0", tower_layers=[-1], grid=2, image_size=64, decoder=decoder)
    parts = build_mllm(cfg)
    parts.project = "llava_mod"
    parts.trained = {name for name in parts.module.state_dict() if name.startswith("projector.")}
    export_mllm(tmp_path / "export", parts, parts.module.state_dict())
    speaker = Local(tmp_path / "export", most_tokens=4, device="cpu", precision="fp32")
    (tmp_path / "0.png").write_bytes(picture(0))
    record = {"id": "b", "image": "0.png", "conversations": []}
    shown = Request("b", "<image>there?", item=ChatItem("b", record, str(tmp_path)))
    said = dict(speaker([Request("a", "there?"), shown]))
    expected = open_chat(str(tmp_path / "export"), surgery_of, device="cpu").answer(
        [([], [], "there?"), ([picture(0)], [], "<image>there?")], most_tokens=4
    )
    assert list(said.values()) == expected and list(said) == ["a", "b"]
