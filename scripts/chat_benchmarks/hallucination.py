"""Benchmarks of what a model says that is not there: Object HalBench, MMHal-Bench and AMBER, in their authors' files.

Judges are services: their outputs come saved, and what is scored here is a pure function of answers and those.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.chat_benchmarks.questions import SHORT, Said, item_of, mean, named, records, truth_of
from vlmkd.data.chats import ChatItem
from vlmkd.evaluation.answers import plain
from vlmkd.files import read_object, read_text

Judged = Mapping[str, Any]
"""What a judge said of the answer to each key: text, or a list of objects."""

_IRREGULAR = {
    "men": "man",
    "women": "woman",
    "knives": "knife",
    "mice": "mouse",
    "people": "person",
    "children": "child",
}
_ANIMALS = "bird cat dog horse sheep cow elephant bear zebra giraffe animal cub".split()


def read_object_halbench(files: Sequence[Path], images: str) -> list[ChatItem]:
    """`obj_halbench_300_with_image.jsonl`, `synonyms*.txt`, and COCO's `instances_*2014.json` and `captions_*2014.json`."""
    (asked,), (synonyms, *_) = named(files, r"\.jsonl$"), named(files, r"\.txt$")
    classes = coco_names(read_text(synonyms, "--data"))
    prompts = records(asked)
    wanted: dict[Any, set[str]] = {int(one["image_id"]): set() for one in prompts}
    for path in named(files, r"instances.*\.json$"):
        content = read_object(path, "--data")
        names = {one["id"]: classes[one["name"]] for one in content["categories"]}
        for one in content["annotations"]:
            if one["image_id"] in wanted:
                wanted[one["image_id"]].add(names[one["category_id"]])
    for path in named(files, r"captions.*\.json$"):
        for one in read_object(path, "--data")["annotations"]:
            if one["image_id"] in wanted:
                wanted[one["image_id"]].update(coco_mentions(one["caption"], classes))
    items = []
    for key, one in zip(apart(str(one["image_id"]) for one in prompts), prompts, strict=True):
        things = sorted(wanted[int(one["image_id"])])
        more = {"things": things, "names": classes}
        file = f"COCO_val2014_{int(one['image_id']):012d}.jpg"
        items.append(item_of(key, file, one["question"], "", images, data=one.get("image", ""), **more))
    return items


def apart(keys: Iterable[str]) -> Iterator[str]:
    """Keys, the second of equal ones with `#2` behind it."""
    seen: Counter[str] = Counter()
    for key in keys:
        seen[key] += 1
        yield key if seen[key] == 1 else f"{key}#{seen[key]}"


def coco_names(text: str) -> dict[str, str]:
    """Name -> COCO class, of lines `class, synonym, ...`; an empty class: words that name nothing of COCO's."""
    lines = [[name.strip() for name in line.split(",")] for line in text.splitlines() if line.strip()]
    found = {name: line[0] for line in lines for name in line}
    for young in ("baby", "adult"):
        found |= {f"{young} {animal}": found.get(animal, "") for animal in _ANIMALS}
    pairs = {"passenger jet": "jet", "passenger train": "train", "bow tie": "tie", "toilet seat": "toilet"}
    return (
        found
        | {name: found.get(of, "") for name, of in pairs.items()}
        | {"home plate": "", "train track": ""}
    )


def coco_mentions(text: str, names: Mapping[str, str]) -> list[str]:
    """The COCO classes that a text names, one a mention: the longest name at its place, plurals too."""
    words = [_IRREGULAR.get(word, word) for word in re.findall(r"[a-z]+", text.lower())]
    found, place = [], 0
    while place < len(words):
        for length in (3, 2, 1):
            name = " ".join(words[place : place + length])
            forms = (
                form for form in (name, name.removesuffix("s"), name.removesuffix("es")) if form in names
            )
            form = next(forms, None)
            if form is not None:
                found.append(names[form])
                place += length - 1
                break
        place += 1
    return [name for name in found if name]


def object_halbench(pairs: Said, judged: Judged) -> dict[str, float]:
    """`response`: responses with an object that is not there, of those with any; `mention`: such mentions of all.

    The judge lists an answer's objects; an answer of three words or fewer has none.
    """
    responses = bad = named_things = wrong = lost = 0
    for item, said in pairs:
        listed = [] if len(said.split()) <= 3 else _listed(judged[item.key])
        lost += listed is None
        found = [name for thing in listed or () for name in coco_mentions(thing, item.record["names"])]
        false = [name for name in found if name not in item.record["things"]]
        responses, bad = responses + bool(found), bad + bool(false)
        named_things, wrong = named_things + len(found), wrong + len(false)
    rates = {"response": bad / max(1, responses), "mention": wrong / max(1, named_things)}
    return rates | {"unparsable": float(lost)}


def _listed(judged: Any) -> list[str] | None:
    """The strings of a judge's list; None where there is no list."""
    if isinstance(judged, str):
        found = re.findall(r"\[.*?\]", judged, flags=re.S)
        try:
            judged = json.loads(found[-1]) if found else None
        except ValueError:
            return None
    return list(map(str, judged)) if isinstance(judged, list) else None


def read_mmhal(files: Sequence[Path], images: str) -> list[ChatItem]:
    """`response_template.json`; images by id, or by the name that they have where they come from."""
    items = []
    for number, one in enumerate(one for path in files for one in records(path)):
        own, source = f"{one['image_id']}.jpg", Path(str(one.get("image_src", ""))).name
        image = source if source and not Path(images, own).is_file() else own
        items.append(item_of(
            str(number), image, one["question"], str(one["gt_answer"]), images, data=one.get("image", ""),
            type=one["question_type"],
        ))  # fmt: skip
    return items


def mmhal(pairs: Said, judged: Judged) -> dict[str, float]:
    """Mean rating 0 to 6, also by type of question, and the share below 3; a judgement with no or two ratings is 0."""
    ratings = [(item.record["type"], _rating(str(judged[item.key]))) for item, _ in pairs]
    of_types = {kind: mean(one for name, one in ratings if name == kind) for kind, _ in ratings}
    return {
        "score": mean(one for _, one in ratings),
        "hallucination": mean(one < 3 for _, one in ratings),
    } | {f"score_{kind}": value for kind, value in of_types.items()}


def _rating(text: str) -> int:
    found = [number for number in range(7) if f"rating: {number}" in text.lower()]
    return found[0] if len(found) == 1 else 0


def read_amber(files: Sequence[Path], images: str) -> list[ChatItem]:
    """`query_*.json`, `annotations.json`, and for its generative part `relation.json` and `safe_words.txt`."""
    truths = {one["id"]: one for path in named(files, "annotations") for one in records(path)}
    queries = [one for path in named(files, "query") for one in records(path)]
    relation: dict[str, list[str]] = {}
    safe: list[str] = []
    if any(truths[one["id"]]["type"] == "generative" for one in queries):
        relation = read_object(named(files, "relation")[0], "--data")
        safe = read_text(named(files, "safe_words")[0], "--data").split("\n")
    known = sorted({*relation, *(word for words in relation.values() for word in words)})
    items = []
    for one in queries:
        truth = truths[one["id"]]
        more: dict[str, Any] = {}
        generative = truth["type"] == "generative"
        if generative:
            there, cog = (
                {word: [word, *relation.get(word, [])] for word in truth[kind]} for kind in ("truth", "hallu")
            )
            more = {"there": there, "cog": cog, "nouns": known, "safe": safe}
        text = one["query"] + ("" if generative else SHORT)
        answer = "" if generative else truth["truth"]
        items.append(item_of(str(one["id"]), one["image"], text, answer, images, type=truth["type"], **more))
    return items


def amber(pairs: Said) -> dict[str, float]:
    """CHAIR, cover, share of responses that hallucinate, cog; accuracy and F1 of "no" (precision and recall too).

    `amber`: mean of 1 - CHAIR and F1, where both parts were asked.
    """
    told = [(item.record, said) for item, said in pairs if item.record["type"] == "generative"]
    asked = [
        (item.record["type"].partition("-")[2].partition("-")[0], truth_of(item), plain(said))
        for item, said in pairs
        if item.record["type"] != "generative"
    ]
    found = (_amber_told(told) if told else {}) | (_amber_asked(asked) if asked else {})
    if told and asked:
        found["amber"] = (1 - found["chair"] + found["f1"]) / 2
    return found


def _amber_told(told: Sequence[tuple[Mapping[str, Any], str]]) -> dict[str, float]:
    nouns = wrong = bad = there = covered = cog = expected = 0
    for record, said in told:
        known, safe = {*record["nouns"]}, {*record["safe"]}
        words = (_noun(word, known) for word in re.findall(r"[a-z]+(?:-[a-z]+)*", said.lower()))
        own = [word for word in words if word in known]
        true = {word for words in record["there"].values() for word in words} | safe
        false = [word for word in own if word not in true]
        nouns, wrong, bad = nouns + len(own), wrong + len(false), bad + bool(false)
        there, expected = there + len(record["there"]), expected + len(record["cog"])
        covered += sum(not ({*own} - safe).isdisjoint(words) for words in record["there"].values())
        cog += sum(not {*false}.isdisjoint(words) for words in record["cog"].values())
    return {
        "chair": wrong / max(1, nouns),
        "cover": covered / max(1, there),
        "hal": bad / len(told),
        "cog": cog / max(1, expected),
    }


def _noun(word: str, known: set[str]) -> str:
    forms = (word, _IRREGULAR.get(word, word), word.removesuffix("s"), word.removesuffix("es"))
    return next((form for form in forms if form in known), word)


def _amber_asked(asked: Sequence[tuple[str, str, str]]) -> dict[str, float]:
    def f1(rows: Sequence[tuple[str, str, str]]) -> tuple[float, float, float]:
        both = sum(truth == said == "no" for _, truth, said in rows)
        precision = both / max(1, sum(said == "no" for _, _, said in rows))
        recall = both / max(1, sum(truth == "no" for _, truth, _ in rows))
        return precision, recall, 2 * precision * recall / max(1e-9, precision + recall)

    precision, recall, overall = f1(asked)
    kinds = {f"f1_{kind}": f1([one for one in asked if one[0] == kind])[2] for kind, _, _ in asked}
    accuracy = mean(truth == said for _, truth, said in asked)
    return {"accuracy": accuracy, "precision": precision, "recall": recall, "f1": overall} | kinds
