"""Benchmarks of multimodal models by name: files to questions, saved answers to numbers, each with its protocol.

Readers and scorers are in `questions` and `hallucination`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.chat_benchmarks import hallucination, questions
from scripts.chat_benchmarks.hallucination import Judged, apart
from scripts.chat_benchmarks.questions import Said, records
from vlmkd.data.chats import ChatItem
from vlmkd.errors import UserError
from vlmkd.evaluation.base import Result
from vlmkd.files import one_line, write_text
from vlmkd.results import Meaning, json_lines, share


@dataclass(frozen=True)
class Benchmark:
    """How one is read, scored, and named beside its numbers."""

    read: Callable[[Sequence[Path], str], list[ChatItem]]
    score: Callable[..., dict[str, float]]
    """Of pairs, and of a judge's outputs where `judged`."""
    main: str
    protocol: str
    """One line: prompt and rule."""
    most_tokens: int = 16
    judged: bool = False
    submission: Callable[[Said], list[dict[str, str]]] | None = None
    """What its server takes."""
    groups: bool = False
    """A question counts by several rows together."""


BENCHMARKS = {
    "gqa": Benchmark(questions.read_gqa, questions.same_words, "accuracy", "short answer; exact match without case and full stop"),
    "scienceqa": Benchmark(
        questions.read_scienceqa, questions.right_letters, "accuracy",
        "test questions with image; letter, `X. ...` or one `The answer is X.`, else wrong",
    ),
    "textvqa": Benchmark(
        questions.read_textvqa, questions.soft_accuracy, "accuracy", "0.5.1 val; VQA accuracy over 9 of 10 humans, EvalAI's normalisation",
    ),
    "vizwiz": Benchmark(
        questions.read_vizwiz, questions.soft_accuracy, "accuracy", "Unanswerable asked for; VQA accuracy, EvalAI's normalisation",
        submission=questions.vizwiz_submission,
    ),
    "mme": Benchmark(
        questions.read_mme, questions.mme, "perception", "short answer; yes or no in the first four letters; accuracy + accuracy+",
        groups=True,
    ),
    "mmbench": Benchmark(
        questions.read_mmbench, questions.circular, "accuracy", "letters by rule, no judge; right in every rotation of the file",
        groups=True,
    ),
    "pope": Benchmark(
        questions.read_pope, questions.pope_splits, "f1", "short answer; no if No, no or not before the first full stop; F1 of yes",
    ),
    "scenes": Benchmark(
        questions.read_scenes, questions.score_scenes, "accuracy",
        "equal words; exists: no if No, no or not before the first full stop; captions: CHAIR by the names of concepts.json", 64,
    ),
    "object_halbench": Benchmark(
        hallucination.read_object_halbench, hallucination.object_halbench, "response",
        "objects by the judge; true ones from COCO's segments and captions", 512, judged=True,
    ),
    "mmhal": Benchmark(hallucination.read_mmhal, hallucination.mmhal, "score", "rating 0 to 6 by the judge; below 3 hallucinates", 512, judged=True),
    "amber": Benchmark(
        hallucination.read_amber, hallucination.amber, "amber", "nouns are words of relation.json, no similar words; F1 of no, answers exactly yes or no",
        512,
    ),
}  # fmt: skip
_LOWER = ("response", "mention", "hallucination", "chair", "chair_i", "chair_s", "hal", "cog", "unparsable")
_BARE = ("perception", "cognition", *questions.PERCEPTION, *questions.COGNITION)


def read_benchmark(name: str, files: Sequence[Path], images: str) -> list[ChatItem]:
    """The questions in a benchmark's own files.

    Raises:
        UserError: files that are not there, or of another layout.
    """
    try:
        items = BENCHMARKS[name].read(files, images)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        told = f"lacks {error}" if isinstance(error, KeyError) else one_line(error)
        raise UserError(f"--data is not in the layout of {name} ({told}); name its published files") from None
    if not items:
        raise UserError(f"--data has no question of {name}; name its published files")
    twice = [key for key, times in Counter(item.key for item in items).items() if times > 1]
    if twice:
        raise UserError(f"--data has question {twice[0]} of {name} twice; name each file once")
    return items


def scored(
    name: str, dataset: str, items: Sequence[ChatItem], said: Mapping[str, str], judged: Judged
) -> Result:
    """The result of saved answers."""
    benchmark = BENCHMARKS[name]
    pairs = [(item, said[item.key]) for item in items]
    metrics = benchmark.score(pairs, judged) if benchmark.judged else benchmark.score(pairs)
    return Result(name, dataset, metrics, len(pairs), meanings={one: _meaning(one, name) for one in metrics})


def _meaning(metric: str, name: str) -> Meaning:
    main = metric == BENCHMARKS[name].main
    if name == "mme" and metric in _BARE or metric.startswith("score"):
        return Meaning(higher_is_better=True, main=main)
    if metric.startswith("yes_ratio"):
        return Meaning(unit="share")
    if metric in _LOWER:
        return Meaning(unit="count" if metric == "unparsable" else "share", higher_is_better=False, main=main)
    return share(main=main)


def write_answers(
    path: Path, name: str, model: str, items: Sequence[ChatItem], said: Mapping[str, str]
) -> None:
    """One line a question: benchmark, model, key, question, answer."""
    lines = [
        {"benchmark": name, "model": model, "key": item.key, "question": _question(item),
         "said": said[item.key]}
        for item in items
    ]  # fmt: skip
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "--out")


def read_answers(
    path: Path, name: str, items: Sequence[ChatItem], *, whole: bool = True
) -> tuple[str, dict[str, str]]:
    """Model and answers to `items` of a file that `write_answers` wrote; `whole`: it must have one for each.

    A line counts where it has the question in the words of `items`.
    """
    said, model = {}, ""
    asked = {item.key: _question(item) for item in items}
    if not path.is_file():
        raise UserError(
            f"--out {path} does not exist; give --model, which is asked, or name the file of answers"
        )
    for number, line in json_lines(path, "--out"):
        if line.get("benchmark") != name or not isinstance(line.get("said"), str):
            raise UserError(f"--out {path} line {number} is no answer to {name}; name another file")
        key, model = str(line.get("key")), str(line.get("model"))
        if key in asked and line.get("question") == asked[key]:
            said[key] = line["said"]
    lacking = [item.key for item in items if item.key not in said]
    if lacking and whole:
        raise UserError(
            f"--out {path} has no answer to {len(lacking)} questions in --data's words (first: {lacking[0]}); ask again"
        )
    return model, said


def _question(item: ChatItem) -> str:
    return str(item.record["conversations"][0]["value"])


def read_judge(path: Path, items: Sequence[ChatItem]) -> dict[str, Any]:
    """Key -> what the judge said. Entries of a list or lines: texts, lists, responses of OpenAI's, or objects with
    `extract_objs` or `content`; those without `key` or `image_id` are in the order of the questions."""
    entries = records(path)
    names = apart(
        str(one.get("key", one.get("image_id", items[number].key if number < len(items) else "")))
        if isinstance(one, dict)
        else items[number].key if number < len(items) else ""
        for number, one in enumerate(entries)
    )  # fmt: skip
    found = {key: _content(one) for key, one in zip(names, entries, strict=True)}
    lacking = [item.key for item in items if item.key not in found]
    if lacking:
        raise UserError(
            f"--judge-file {path} has nothing on {len(lacking)} questions (first: {lacking[0]}); complete it"
        )
    return found


def _content(entry: Any) -> Any:
    if not isinstance(entry, dict):
        return entry
    if "choices" in entry:
        return entry["choices"][0]["message"]["content"]
    return entry.get("extract_objs", entry.get("content", ""))
