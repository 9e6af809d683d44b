"""scripts/chat.py and scripts/eval_chat.py on a tiny export: what they print, save and refuse."""

from __future__ import annotations

import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from projects.llava_mod.experts import upcycle
from projects.matvlm.config import HybridConfig
from projects.matvlm.surgery import to_hybrid
from scripts import chat, eval_chat
from tests.chat_parts import byte_tokenizer, picture
from tests.core.test_launch import environment
from tests.projects.zygote import Zygote
from vlmkd.chat_config import MllmConfig
from vlmkd.data.chats import ChatTokens
from vlmkd.errors import UserError
from vlmkd.evaluation.answers import ChatModel
from vlmkd.export.mllm import ChatParts, build_mllm, export_mllm
from vlmkd.results import read_results

ROOT = Path(__file__).parents[2]


def made(folder: Path) -> ChatParts:
    """The zoo's nano CLIP before a random decoder."""
    byte_tokenizer().save_pretrained(folder / "lm")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.4,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "lm")
    cfg = MllmConfig(tower="clip:zoo:tinyclip-emoji-teacher", grid=2, decoder=f"hf:{folder / 'lm'}")
    parts = build_mllm(cfg)
    parts.trained = {name for name in parts.module.state_dict() if name.startswith("projector.")}
    parts.template = "plain"
    (folder / "a.png").write_bytes(picture(1))
    (folder / "b.png").write_bytes(picture(2))
    return parts


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    parts = made(folder)
    export_mllm(folder / "export", parts, parts.module.state_dict())
    return folder


@pytest.fixture(scope="module")
def model(run: Path) -> ChatModel:
    parts = made(run)
    tokens = ChatTokens(parts.tokenizer, "plain", parts.module.tower.tokens)  # type: ignore[arg-type]
    return ChatModel("tiny", parts.module.eval(), tokens, parts.image_spec)


def said(model: ChatModel, images: list[Path], turns: list[tuple[str, str]], text: str) -> str:
    (answer,) = model.answer([([one.read_bytes() for one in images], turns, text)], most_tokens=8)
    return answer


def test_one_question_is_answered(run: Path, model: ChatModel, capsys) -> None:
    arguments = ["--model", str(run), "--most-tokens", "8"]
    assert chat.main([*arguments, "--image", str(run / "a.png"), "--question", "what?"]) == 0
    assert capsys.readouterr().out.strip() == said(model, [run / "a.png"], [], "<image>\nwhat?")
    assert chat.main([*arguments, "--question", "what?"]) == 0
    assert capsys.readouterr().out.strip() == said(model, [], [], "what?")


def test_tokens_come_one_by_one_and_turns_are_kept(run: Path, model: ChatModel, capsys, monkeypatch) -> None:
    pieces: list[str] = []
    monkeypatch.setattr(
        "transformers.TextStreamer.on_finalized_text",
        lambda self, text, stream_end=False: pieces.append(text),
    )
    typed = ["what?", "and now?", f"/image {run / 'b.png'}", "what?", "/image none.png", "/new", "again?"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(typed)))
    arguments = ["--model", str(run), "--most-tokens", "8", "--image", str(run / "a.png")]
    asked = []
    whole = ChatModel.answer

    def answer(self: ChatModel, questions: list, **options: object) -> list[str]:
        found = whole(self, questions, **options)  # type: ignore[arg-type]
        asked.append((*questions[0], found[0]))
        return found

    monkeypatch.setattr(ChatModel, "answer", answer)
    assert chat.main(arguments) == 0
    assert len(pieces) > 4 * 4
    first = asked[0][3]
    assert [one[:3] for one in asked] == [
        ([picture(1)], [("<image>\nwhat?", first), ("and now?", asked[1][3])], "<image>\nwhat?"),
        ([picture(1)], [("<image>\nwhat?", first), ("and now?", asked[1][3])], "and now?"),
        ([picture(2)], [("<image>\nwhat?", asked[2][3])], "<image>\nwhat?"),
        ([picture(2)], [("<image>\nagain?", asked[3][3])], "<image>\nagain?"),
    ]  # the list of turns grew after each was asked
    monkeypatch.undo()
    assert asked[1][3] == said(model, [run / "a.png"], [("<image>\nwhat?", first)], "and now?")
    assert "image none.png does not exist" in capsys.readouterr().err


def test_mistakes_are_one_line(run: Path, tmp_path: Path) -> None:
    (tmp_path / "torn.png").write_bytes(b"torn")
    for options, message in (
        (
            ["--model", str(tmp_path)],
            "--model .*mllm.json does not exist; name a run, or its `export` folder",
        ),
        (["--image", "none.png"], "image none.png does not exist"),
        (["--image", str(tmp_path / "torn.png")], "torn.png is no picture that can be read; name another"),
        (["--temperature", "-1"], "--temperature -1.0 is not 0 or more"),
        (["--question", "<image>?"], "leave <image> out of the question"),
        (["--question", " "], "--question is empty; write a question"),
        (["--project", "llava_mid"], "llava_mid is no project with chat models; did you mean llava_mod"),
    ):
        with pytest.raises(UserError, match=message):
            chat.main(["--model", str(run), "--question", "?", *options])


def test_a_sparse_export_finds_its_project(run: Path, tmp_path: Path, capsys) -> None:
    parts = made(tmp_path)
    facts = {"layers": [0], "experts": 2, "top_k": 1}
    torch.manual_seed(1)
    upcycle(parts.module.decoder, **facts)
    parts.facts, parts.project, parts.trained = {"sparse": facts}, "llava_mod", set(parts.module.state_dict())
    export_mllm(tmp_path / "export", parts, parts.module.state_dict())
    arguments = ["--model", str(tmp_path), "--most-tokens", "8", "--question", "what?"]
    assert chat.main(arguments) == 0
    sparse = capsys.readouterr().out
    assert chat.main(["--model", str(run), *arguments[2:]]) == 0  # up-cycled, it says what the dense one says
    assert capsys.readouterr().out == sparse
    content = json.loads((tmp_path / "export" / "mllm.json").read_text())
    (tmp_path / "export" / "mllm.json").write_text(json.dumps(content | {"project": "os"}))
    with pytest.raises(UserError, match="os is no project with chat models"):
        chat.main(arguments)
    (tmp_path / "export" / "mllm.json").write_text(json.dumps(content | {"project": ""}))
    with pytest.raises(UserError, match="does not say whose model it is; give --project, one of llava_mod"):
        chat.main(arguments)
    assert chat.main([*arguments, "--project", "llava_mod"]) == 0


def test_a_hybrid_export_finds_its_project(tmp_path: Path, capsys) -> None:
    parts = made(tmp_path)
    decoder = to_hybrid(parts.module.decoder, HybridConfig(layers=[0]))  # type: ignore[arg-type]
    parts.facts = {"hybrid": {**decoder.config.matvlm, "backend": "auto"}}
    parts.project, parts.trained = "matvlm", set(parts.module.state_dict())
    export_mllm(tmp_path / "export", parts, parts.module.state_dict())
    tokens = ChatTokens(parts.tokenizer, "plain", parts.module.tower.tokens)  # type: ignore[arg-type]
    hybrid = ChatModel("hybrid", parts.module.eval(), tokens, parts.image_spec)
    arguments = ["--model", str(tmp_path), "--image", str(tmp_path / "a.png"), "--question", "what?"]
    assert chat.main([*arguments, "--most-tokens", "8"]) == 0
    assert capsys.readouterr().out.strip() == said(hybrid, [tmp_path / "a.png"], [], "<image>\nwhat?")
    options = [*pope_files(tmp_path), "--model", str(tmp_path), "--out", str(tmp_path / "answers.jsonl")]
    assert eval_chat.main(options) == 0


def test_an_answer_is_stopped_by_ctrl_c_and_forgotten(run: Path, capsys, monkeypatch) -> None:
    asked = []

    def answer(self: ChatModel, questions: list, **options: object) -> list[str]:
        asked.append((list(questions[0][1]), questions[0][2]))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return ["so"]

    monkeypatch.setattr(ChatModel, "answer", answer)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one?\ntwo?\n/image\n/imge a.png\nthree?\n"))
    assert chat.main(["--model", str(run)]) == 0
    assert asked == [([], "one?"), ([("one?", "so")], "two?"), ([("one?", "so")], "three?")]
    told = capsys.readouterr().err.splitlines()
    assert told[-2:] == [f"{typed} is no command; write /image FILE or /new" for typed in ("/image", "/imge")]
    monkeypatch.setattr(ChatModel, "answer", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert chat.main(["--model", str(run), "--question", "one?"]) == 0


def pope_files(folder: Path) -> list[str]:
    lines = [
        {
            "question_id": number,
            "image": "ab"[number % 2] + ".png",
            "text": "x" * number + "?",
            "label": "yes",
        }
        for number in range(5)
    ]
    path = folder / "coco_pope_random.json"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return ["--benchmark", "pope", "--data", str(path), "--images", str(folder), "--quiet"]


def test_answers_are_saved_and_scored_again(run: Path, tmp_path: Path, model: ChatModel, capsys) -> None:
    out, results = tmp_path / "answers.jsonl", tmp_path / "results.jsonl"
    options = [*pope_files(run), "--out", str(out), "--results", str(results)]
    assert eval_chat.main([*options, "--model", str(run), "--batch-size", "2"]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["key"] for line in lines] == [f"random/{number}" for number in range(5)]
    short = "\nAnswer the question using a single word or phrase."
    (expected,) = model.answer([([picture(2)], [], f"<image>\nxxx?{short}")], most_tokens=16)
    assert lines[3]["said"] == expected and lines[3]["question"] == f"<image>\nxxx?{short}"
    assert "pope: short answer; no if No, no or not before the first full stop" in capsys.readouterr().out
    numbers = {one.metric: one for one in read_results(results)}
    assert numbers["f1"].main and numbers["f1"].count == 5 and numbers["f1"].model == str(run)
    assert numbers["recall"].tags["protocol"].startswith("short answer; ")  # type: ignore[union-attr]
    assert numbers["parameters"].value == sum(one.numel() for one in model.model.parameters()) / 1e6

    for line, text in zip(lines, ["Yes", "No", "No", "Yes", "Yes"], strict=True):
        line["said"] = text
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert eval_chat.main(options) == 0  # without the model
    numbers = {one.metric: one for one in read_results(results)}
    assert numbers["recall"].value == 0.6 and numbers["recall"].model == str(run)
    assert eval_chat.main([*options, "--out", str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl does not exist; give --model" in capsys.readouterr().err


def test_a_stopped_run_goes_on(run: Path, tmp_path: Path, monkeypatch) -> None:
    options = [*pope_files(run), "--model", str(run), "--batch-size", "1", "--out"]
    assert eval_chat.main([*options, str(tmp_path / "whole.jsonl")]) == 0
    monkeypatch.setattr(eval_chat, "KEPT_EVERY", 2)
    whole, asked = ChatModel.answer, []

    def answer(self: ChatModel, questions: list, **named: object) -> list[str]:
        asked.append(questions[0][2])
        if len(asked) == 4:
            raise KeyboardInterrupt
        return whole(self, questions, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(ChatModel, "answer", answer)
    with pytest.raises(KeyboardInterrupt):
        eval_chat.main([*options, str(tmp_path / "cut.jsonl")])
    assert not (tmp_path / "cut.jsonl").exists()
    assert eval_chat.main([*options, str(tmp_path / "cut.jsonl")]) == 0
    assert len(asked) == 4 + 3 and not list(tmp_path.glob("*.partial*"))  # two of five were kept
    assert (tmp_path / "cut.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()


def test_answers_to_other_questions_are_asked_again(run: Path, tmp_path: Path) -> None:
    out, kept = tmp_path / "answers.jsonl", tmp_path / "answers.partial.jsonl"
    options = [*pope_files(run), "--model", str(run), "--out", str(out)]
    assert eval_chat.main(options) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    expected = [line["said"] for line in lines]
    for line in lines:
        line["said"] = "kept"
    lines[1]["question"] = "another?"
    kept.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert eval_chat.main(options) == 0
    said = [json.loads(line)["said"] for line in out.read_text().splitlines()]
    assert said == ["kept", expected[1], "kept", "kept", "kept"]


@pytest.mark.parametrize("name", ["mme", "mmbench"])
def test_no_part_is_drawn_of_rows_that_are_scored_together(tmp_path: Path, capsys, name: str) -> None:
    options = [
        "--benchmark",
        name,
        "--data",
        str(tmp_path),
        "--out",
        str(tmp_path / "a.jsonl"),
        "--most",
        "1",
    ]
    assert eval_chat.main(options) == 2
    assert f"--most leaves out part of what {name} scores together; ask all" in capsys.readouterr().err


def test_a_judge_is_waited_for(run: Path, tmp_path: Path, capsys) -> None:
    content = [
        {
            "question_type": "other",
            "image_id": "a",
            "image_src": "https://x/a.png",
            "question": "Q?",
            "gt_answer": "A",
        }
    ]
    (tmp_path / "response_template.json").write_text(json.dumps(content))
    options = [
        "--benchmark", "mmhal", "--data", str(tmp_path / "response_template.json"), "--images", str(run), "--quiet",
        "--out", str(tmp_path / "answers.jsonl"),
    ]  # fmt: skip
    assert eval_chat.main([*options, "--model", str(run)]) == 0
    assert "give the judge's outputs as --judge-file to score them" in capsys.readouterr().out
    (tmp_path / "judge.json").write_text('["Rating: 4"]')
    assert eval_chat.main([*options, "--judge-file", str(tmp_path / "judge.json")]) == 0
    assert re.search(r"4\.0000 +0\.00", capsys.readouterr().out)


def test_an_image_that_cannot_be_read_is_named(run: Path, tmp_path: Path, capsys) -> None:
    options = [
        *pope_files(tmp_path),
        "--out",
        str(tmp_path / "a.jsonl"),
        "--model",
        str(run),
        "--batch-size",
        "1",
    ]
    assert eval_chat.main(options) == 2
    assert re.search("image .*a.png of chat random/0 cannot be read", capsys.readouterr().err)
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(b"torn")
    assert eval_chat.main(options) == 2
    assert "question random/0: the image cannot be read (cannot identify" in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_answer_as_one(run: Path, tmp_path: Path, zygote: Zygote) -> None:
    options = [*pope_files(run), "--model", str(run), "--batch-size", "2", "--out"]
    assert eval_chat.main([*options, str(tmp_path / "one.jsonl")]) == 0
    arguments = [*options, str(tmp_path / "two.jsonl")]
    code, printed = zygote.run("scripts.eval_chat", arguments, tmp_path / "output.txt", ranks=2)
    assert code == 0, printed
    assert printed.count("pope: short answer") == 1
    assert (tmp_path / "two.jsonl").read_text() == (tmp_path / "one.jsonl").read_text()
    done = subprocess.run(
        ["bash", "scripts/eval_chat.sh", *arguments], cwd=ROOT, env=environment(NPROC="2", DRY_RUN="1"),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    started = [shlex.split(line.partition(" -m ")[2]) for line in done.stdout.splitlines()]
    assert started == [["scripts.eval_chat", *arguments]] * 2
