"""Questions with known answers, in their authors' files: GQA, TextVQA, VizWiz, ScienceQA, MMBench, MME, POPE and the scenes.

A reader gives one item a question: the prompt with its suffix, the image, and in the record what its scorer needs. A
scorer is a pure function of (item, answer) pairs. What was chosen where protocols differ is in `chat_benchmarks.BENCHMARKS`.
"""

from __future__ import annotations

import base64
import binascii
import csv
import io
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmkd.data.chats import IMAGE, ChatItem, read_chats
from vlmkd.errors import UserError
from vlmkd.evaluation.answers import Question, plain, pope, scores
from vlmkd.files import read_json, read_object, read_text
from vlmkd.results import json_lines

Said = Sequence[tuple[ChatItem, str]]
"""Questions with what was answered."""
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
_LETTERS = "ABCDE"
_CN_LETTER = "\n请直接回答选项字母。"


@dataclass(frozen=True)
class InlineItem(ChatItem):
    """A question whose image stands in the file itself."""

    data: str = ""
    """base64."""

    def members(self) -> dict[str, bytes]:
        """See `ChatItem`."""
        try:
            return {"json": json.dumps(self.record).encode(), "0.png": base64.b64decode(self.data)}
        except binascii.Error as error:
            raise UserError(f"image of question {self.key} is no base64 ({error}); correct --data") from None


def item_of(
    key: str, image: str, text: str, truth: str, folder: str, *, data: str = "", **more: Any
) -> ChatItem:
    """A question about one image: a file, or `data` in base64; `more` is what its scorer needs."""
    talk = [{"from": "human", "value": f"{IMAGE}\n{text}"}, {"from": "gpt", "value": truth}]
    record = {"image": image, "conversations": talk, **more}
    return InlineItem(key, record, folder, data) if data else ChatItem(key, record, folder)


def truth_of(item: ChatItem) -> str:
    """The true answer."""
    return str(item.record["conversations"][-1]["value"])


def _options(options: Sequence[str]) -> str:
    return "".join(f"\n{letter}. {option}" for letter, option in zip(_LETTERS, options, strict=False))


def mean(values: Iterable[float]) -> float:
    """0 of nothing."""
    found = list(values)
    return sum(found) / max(1, len(found))


def records(path: Path) -> list[Any]:
    """The entries of a JSON list or of a file with one JSON object a line."""
    if read_text(path, "--data").lstrip().startswith("["):
        return list(read_json(path, "--data"))
    return [content for _, content in json_lines(path, "--data")]


def named(files: Sequence[Path], part: str) -> list[Path]:
    """Those of the files whose name matches `part`; a UserError where there is none."""
    found = [path for path in files if re.search(part, path.name)]
    if not found:
        raise UserError(f"--data has no file like {part.replace('|', ' or ')}; name it too")
    return found


def read_scenes(files: Sequence[Path], images: str) -> list[ChatItem]:
    """One of the files with known answers that data_tools/build_scenes.py writes; its concepts.json lies beside."""
    (path, *more) = files
    if more:
        raise UserError(
            f"--data names {len(files)} files of scenes; give one a call, each has its own numbers"
        )
    items = read_chats(str(path), images)
    captions = [item for item in items if item.record["kind"] == "caption"]
    vocabulary = read_json(path.parent / "concepts.json", "vocabulary") if captions else []
    for item in captions:
        item.record["vocabulary"] = vocabulary
    return items


def score_scenes(pairs: Said) -> dict[str, float]:
    """By kind, as while a run trains: equal words, POPE's figures, CHAIR."""
    asked = [(Question.of(item), text) for item, text in pairs]
    vocabularies = (item.record["vocabulary"] for item, _ in pairs if "vocabulary" in item.record)
    metrics, _ = scores(asked, next(vocabularies, []))
    return metrics


def read_gqa(files: Sequence[Path], images: str) -> list[ChatItem]:
    """`testdev_balanced_questions.json`."""
    return [
        item_of(key, f"{one['imageId']}.jpg", one["question"] + SHORT, one["answer"], images)
        for path in files
        for key, one in read_object(path, "--data").items()
    ]


def same_words(pairs: Said) -> dict[str, float]:
    """Share of answers that are the truth but for case and a full stop."""
    return {"accuracy": mean(plain(said) == plain(truth_of(item)) for item, said in pairs)}


def read_textvqa(files: Sequence[Path], images: str) -> list[ChatItem]:
    """`TextVQA_0.5.1_val.json`, and LLaVA's `llava_textvqa_val_v051_ocr.jsonl`, whose prompts carry OCR tokens."""
    prompts = {
        (str(one["question_id"]), one["text"].split("\n")[0].lower()): one["text"]
        for path in files
        if path.suffix == ".jsonl"
        for one in records(path)
    }
    items = []
    for path in named(files, r"\.json$"):
        for one in read_object(path, "--data")["data"]:
            image, question = str(one["image_id"]), one["question"]
            text = prompts.get((image, question.lower()), question + SHORT)
            more = {"answers": one.get("answers", [])}
            items.append(item_of(str(one["question_id"]), f"{image}.jpg", text, "", images, **more))
    return items


def read_vizwiz(files: Sequence[Path], images: str) -> list[ChatItem]:
    """`val.json`, or `test.json`, which has no answers."""
    unknown = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    return [
        item_of(
            one["image"], one["image"], one["question"] + unknown + SHORT, "", images,
            answers=[answer["answer"] for answer in one.get("answers", [])],
        )
        for path in files
        for one in records(path)
    ]  # fmt: skip


def soft_accuracy(pairs: Said) -> dict[str, float]:
    """VQA's accuracy: over the sets that leave one of the humans out, min(1, how many of a set say the same / 3)."""
    if not all(item.record["answers"] for item, _ in pairs):
        return {}  # a test split, which its server scores
    return {"accuracy": mean(_agreed(vqa_words(said), item.record["answers"]) for item, said in pairs)}


def _agreed(said: str, answers: Sequence[str]) -> float:
    same = [vqa_words(answer) == said for answer in answers]
    return mean(min(1.0, (sum(same) - one) / 3) for one in same)


_CONTRACTED = {form.replace("'", ""): form for form in """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd
how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't shan't
she'd've should've shouldn't shouldn't've somebody'd somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're
they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll
who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()}  # fmt: skip
_NUMBERS = {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
_NUMBERS["none"] = "0"


def vqa_words(text: str) -> str:
    """EvalAI's form of an answer: lower case, digits for small numbers, no punctuation and no articles."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = bare = " ".join(text.split())
    for mark in ';/[]"{}()=+\\_-><@`!':
        bare = bare.replace(mark, "" if f"{mark} " in text or f" {mark}" in text else " ")
    words = [_NUMBERS.get(word, word) for word in re.sub(r"\.(?!\d)", "", bare).split()]
    kept = (word for word in words if word not in ("a", "an", "the"))
    return " ".join(_CONTRACTED.get(word.replace("'", ""), word) for word in kept)


def vizwiz_submission(pairs: Said) -> list[dict[str, str]]:
    """What VizWiz's server takes."""
    return [{"image": item.key, "answer": vqa_words(said)} for item, said in pairs]


def read_scienceqa(files: Sequence[Path], images: str) -> list[ChatItem]:
    """`problems.json`: its test questions with an image; prompts from LLaVA's `llava_test_CQM-A.json` where it is given."""
    given = {
        str(one["id"]): one["conversations"][0]["value"].replace(IMAGE, "").strip()
        for path in files
        if "llava" in path.name
        for one in records(path)
    }
    inner = "test/" if Path(images, "test").is_dir() else ""
    items = []
    for key, one in read_object(named(files, "problems")[0], "--data").items():
        if not one.get("image") or one.get("split", "test") != "test":
            continue
        context = f"Context: {one['hint']}\n" if one.get("hint") else ""
        text = given.get(key, f"{context}{one['question']}{_options(one['choices'])}") + LETTER
        truth, count = _LETTERS[one["answer"]], len(one["choices"])
        items.append(item_of(key, f"{inner}{key}/{one['image']}", text, truth, images, options=count))
    return items


def letter(text: str, count: int) -> str:
    """The option that an answer names: `B`, `B. ...`, or one `The answer is B.`; empty when it names none of `count`."""
    text = text.strip()
    found = [text] if len(text) == 1 or not text else re.findall(r"The answer is ([A-Z])\.", text)
    if text[1:3] == ". ":
        found = [text[0]]
    return found[0] if len(found) == 1 and found[0] in _LETTERS[:count] else ""


def right_letters(pairs: Said) -> dict[str, float]:
    """Share of answers that name the right option."""
    return {"accuracy": mean(letter(said, item.record["options"]) == truth_of(item) for item, said in pairs)}


def read_mmbench(files: Sequence[Path], images: str) -> list[ChatItem]:
    """`mmbench_dev_*.tsv`, English or Chinese (`cn` in the name); an image field may be the index of the row that has it."""
    csv.field_size_limit(sys.maxsize)
    items = []
    for path in files:
        suffix = _CN_LETTER if "cn" in path.name.lower() else LETTER
        rows = list(csv.DictReader(io.StringIO(read_text(path, "--data"), newline=""), delimiter="\t"))
        pictures = {row["index"]: row["image"] for row in rows}
        for row in rows:
            filled = [row[letter] for letter in "ABCD" if not _is_none(row.get(letter))]
            hint = "" if _is_none(row.get("hint")) else f"{row['hint']}\n"
            data = pictures.get(row["image"], row["image"])
            if not row.get("answer"):
                raise UserError(f"--data {path} has no answers: a test split; name the dev file")
            items.append(item_of(
                row["index"], "inline", f"{hint}{row['question']}{_options(filled)}{suffix}", row["answer"], images,
                data=data, options=len(filled),
            ))  # fmt: skip
    return items


def _is_none(value: str | None) -> bool:
    return value is None or value.lower() in ("", "nan", "none")


def circular(pairs: Said) -> dict[str, float]:
    """`accuracy`: questions of which every rotation (index + k x 1,000,000) is right; `single`: rows that are."""
    rows = [
        (int(item.key) % 1_000_000, letter(said, item.record["options"]) == truth_of(item))
        for item, said in pairs
    ]
    questions: dict[int, bool] = {}
    for number, right in rows:
        questions[number] = questions.get(number, True) and right
    return {"accuracy": mean(questions.values()), "single": mean(right for _, right in rows)}


PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def read_mme(files: Sequence[Path], images: str) -> list[ChatItem]:
    """The folder of the release: TASK/*.txt beside the images, or in `questions_answers_YN` beside `images`."""
    (root,) = files
    items = []
    for task in PERCEPTION + COGNITION:
        apart = root / task / "questions_answers_YN"
        for path in sorted((apart if apart.is_dir() else root / task).glob("*.txt")):
            pictures = path.parent.with_name("images") if apart.is_dir() else path.parent
            names = [one for one in pictures.glob(f"{path.stem}.*") if one.suffix != ".txt"]
            if not names:
                raise UserError(
                    f"--data {path} has no image {path.stem}.* in {pictures}; complete the folder"
                )
            for number, line in enumerate(read_text(path, "--data").strip().splitlines()):
                text, truth = line.strip().split("\t")
                text = text.replace("Please answer yes or no.", "").strip() + SHORT
                key = f"{task}/{path.stem}/{number}"
                items.append(
                    item_of(
                        key, str(names[0].relative_to(root)), text, truth, str(root), task=task, of=path.stem
                    )
                )
    return items


def mme(pairs: Said) -> dict[str, float]:
    """Points of each task: accuracy + accuracy+ (images with both questions right), in per cent; and their sums."""
    rights: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for item, said in pairs:
        rights[item.record["task"]][item.record["of"]].append(_yes_or_no(said) == plain(truth_of(item)))
    points = {
        task: 100 * mean(right for of in found.values() for right in of)
        + 100 * mean(map(all, found.values()))
        for task, found in rights.items()
    }
    sums = {
        name: sum(points[task] for task in tasks)
        for name, tasks in (("perception", PERCEPTION), ("cognition", COGNITION))
        if all(task in points for task in tasks)
    }
    return sums | points


def _yes_or_no(said: str) -> str:
    start = said.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def read_pope(files: Sequence[Path], images: str) -> list[ChatItem]:
    """`coco_pope_random.json`, `..._popular.json`, `..._adversarial.json`, any of them."""
    return [
        item_of(
            f"{split}/{one['question_id']}", one["image"], one["text"] + SHORT, one["label"], images, split=split
        )
        for path in files
        for split in [path.stem.rpartition("_")[2]]
        for one in records(path)
    ]  # fmt: skip


def pope_splits(pairs: Said) -> dict[str, float]:
    """POPE's figures of each split, and the means over the splits."""
    splits: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for item, said in pairs:
        splits[item.record["split"]].append((truth_of(item), said))
    found = {split: pope(own) for split, own in splits.items()}
    names = next(iter(found.values()))
    means = {name: mean(own[name] for own in found.values()) for name in names}
    return means | {f"{name}_{split}": own[name] for split, own in found.items() for name in names}
