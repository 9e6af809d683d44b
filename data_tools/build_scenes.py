"""Write composed scenes with questions and exact answers, in LLaVA's JSON format: the embedded data of the chat projects.

    python data_tools/build_scenes.py FOLDER --concepts 100 --scenes 20000

One to four emoji stand on a plain, gradient or photographic ground. `train.json` has one conversation a scene, some of: what
is there and what is not, how many, where, which is left or above, of which category, a caption or what is where;
`names.json`, `places.json` and `exists.json` have of every scene the caption, what is where, and what is there and what is
not; `preferences.json` pairs of answers, one of which names what is not there; `test.json` single questions about scenes in
drawings that no training scene shows (each concept's held-out style), `captions.json` captions of them, and
`pope_{random,popular,adversarial}.json` as many questions with "yes" as with "no" in every eight scenes. Every record also
says what its scene holds. A scene is a function of its number and of the concepts, so the same call goes on where it stopped.
"""

from __future__ import annotations

import argparse
import functools
import io
import random
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image
from tqdm import tqdm

from data_tools.emoji.catalog import Concept, concepts, training_styles, unit_hash
from data_tools.emoji.draw import background, drawing, free_boxes, paste
from vlmkd.data.chats import ATTRIBUTIONS
from vlmkd.datasets.emoji import LICENCES
from vlmkd.errors import UserError, at_least, run_tool
from vlmkd.files import new_file, new_folder, read_json, write_json

PIXELS = 160
SIZES = {1: (72, 120), 2: (52, 72), 3: (44, 60), 4: (40, 52)}
"""Smallest and largest side of a drawing, by how many there are."""
NUMBERS = ("no", "one", "two", "three", "four")
PLACES = {
    (0, 0): "at the top left",
    (1, 0): "at the top right",
    (0, 1): "at the bottom left",
    (1, 1): "at the bottom right",
}
KINDS = ("count", "where", "relation", "category")
POPE = ("random", "popular", "adversarial")
_PLAIN = ("Flags", "Symbols")
"""Groups whose members are hard to tell apart or to name."""
_TOGETHER = 0.5
"""Share of further objects that are drawn from the group of the first, so that some things go together."""


@dataclass(frozen=True)
class Thing:
    """A concept in a scene."""

    concept: Concept
    style: str
    box: tuple[int, int, int, int]

    @property
    def name(self) -> str:
        return self.concept.name

    @property
    def middle(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


class World:
    """Which concepts there are, how frequent each is, and what is asked about a scene."""

    def __init__(self, count: int) -> None:
        everything = [
            one for one in concepts() if one.split == "train" and not one.skins and len(one.name) < 25
        ]
        names = Counter(one.name for one in everything)
        alone = [one for one in everything if names[one.name] == 1]
        self.concepts = sorted(alone, key=lambda one: unit_hash("scenes", one.code))[:count]
        self._weights = [1 / (10 + rank) for rank in range(len(self.concepts))]
        self._of_group: dict[str, list[int]] = {}
        for index, one in enumerate(self.concepts):
            self._of_group.setdefault(one.group, []).append(index)

    def scene(self, number: int, split: str) -> tuple[Image.Image, list[Thing], random.Random]:
        """The picture of a scene, what it holds, and the generator of what is asked about it."""
        rng = random.Random(f"scenes-v1/{split}/{number}")
        chosen: list[int] = []
        while len(chosen) < 1 + number % 4:
            pool = range(len(self.concepts))
            if chosen and rng.random() < _TOGETHER:
                pool = self._of_group[self.concepts[chosen[0]].group]  # type: ignore[assignment]
            pick = rng.choices(pool, [self._weights[index] for index in pool])[0]
            if pick not in chosen:
                chosen.append(pick)
            elif all(index in chosen for index in pool):
                chosen.append(rng.choice([n for n in range(len(self.concepts)) if n not in chosen]))
        canvas = background(rng, PIXELS)
        low, high = SIZES[len(chosen)]
        boxes = free_boxes([rng.randint(low, high) for _ in chosen], rng, PIXELS)
        things = []
        for index, box in zip(chosen, boxes, strict=True):
            concept = self.concepts[index]
            styles = [one for one in training_styles(concept) if one != "pixel"]
            style = rng.choice(styles) if split == "train" else concept.held_out_style
            paste(canvas, drawing(concept.code, concept.text, style), style, box)
            things.append(Thing(concept, style, box))
        return canvas, things, rng

    @functools.cached_property
    def frequent(self) -> list[int]:
        """Concepts by how often they are drawn."""
        return sorted(range(len(self.concepts)), key=lambda index: -self._weights[index])

    def absent(self, things: list[Thing], kind: str, rng: random.Random) -> Concept:
        """One that the scene does not hold: any, one of the 14 most frequent, or one that goes with what is there."""
        here = {one.name for one in things}
        pool = list(range(len(self.concepts)))
        if kind == "popular":
            pool = self.frequent[:14]
        elif kind == "adversarial":
            pool = self._of_group[things[0].concept.group]
        left = [index for index in pool if self.concepts[index].name not in here]
        left = left or [index for index in self.frequent if self.concepts[index].name not in here]
        weights = [self._weights[index] for index in left] if kind == "adversarial" else None
        return self.concepts[rng.choices(left, weights)[0]]

    def existence(self, things: list[Thing], rng: random.Random) -> list[tuple[str, str]]:
        """Questions about up to two things that are there and up to as many that are not, mixed, with their answers."""
        there = [one.name for one in rng.sample(things, min(2, len(things)))]
        away = [self.absent(things, rng.choice(POPE), rng).name for _ in there]
        asked = {name: (is_there(name), "Yes." if name in there else "No.") for name in there + away}
        return rng.sample(list(asked.values()), len(asked))


def ask(kind: str, things: list[Thing], rng: random.Random) -> tuple[str, str]:
    """A question of one of `KINDS` about what is there, and its answer."""
    if kind == "count":
        return "How many things are in the picture?", f"{NUMBERS[len(things)].capitalize()}."
    if kind == "relation":
        one, other = rng.sample(things, 2)
        return relation(one, other, rng)
    one = rng.choice(things)
    if kind == "category":
        return f"Which category does the {one.name} belong to?", f"{one.concept.group}."
    return f"Where is the {one.name}?", f"{place(one).capitalize()}."


def place(one: Thing) -> str:
    """The quarter of the picture that it is in."""
    x, y = one.middle
    return PLACES[x > PIXELS / 2, y > PIXELS / 2]


def article(name: str) -> str:
    """A name with its indefinite article."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def is_there(name: str) -> str:
    """The question of POPE."""
    return f"Is there {article(name)} in the picture?"


def relation(one: Thing, other: Thing, rng: random.Random) -> tuple[str, str]:
    """A question about which of two is where, and its answer, along the axis on which they are further apart."""
    axis = int(abs(one.middle[1] - other.middle[1]) > abs(one.middle[0] - other.middle[0]))
    words = (("left of", "right of"), ("above", "below"))[axis]
    asked = rng.randrange(2)
    holds = (one.middle[axis] < other.middle[axis]) == (asked == 0)
    return f"Is the {one.name} {words[asked]} the {other.name}?", "Yes." if holds else "No."


def caption(things: list[Thing], placed: bool = False) -> str:
    """What is there, from left to right; `placed`: and where each is."""
    words = [
        article(one.name) + (f" {place(one)}" if placed else "")
        for one in sorted(things, key=lambda thing: thing.box)
    ]
    text = words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
    return f"{text[0].upper()}{text[1:]}."


DESCRIBE = "What is in the picture?"
LOCATE = "What is where in the picture?"


def record(
    number: int, split: str, things: list[Thing], turns: list[tuple[str, str]], **facts: Any
) -> dict[str, Any]:
    """One conversation in LLaVA's form."""
    talk: list[dict[str, str]] = []
    for question, answer in turns:
        first = "" if talk else "<image>\n"
        talk += [{"from": "human", "value": first + question}, {"from": "gpt", "value": answer}]
    return {
        "id": f"{split}/{number:06d}",
        "image": f"{split}/{number:06d}.jpg",
        "conversations": talk,
        "things": [one.name for one in things],
        **facts,
    }


def training(world: World, number: int, things: list[Thing], rng: random.Random) -> dict[str, dict[str, Any]]:
    """The conversation about a training scene, three kinds of questions alone, and a pair of answers, by file."""
    said, placed = (DESCRIBE, caption(things)), (LOCATE, caption(things, placed=True))
    kinds = KINDS if len(things) > 1 else [kind for kind in KINDS if kind != "relation"]
    groups = [world.existence(things, rng), *([ask(kind, things, rng)] for kind in kinds)]
    groups.append([rng.choice([said, placed])])
    # In this order no answer is given away by what was said before; as any may be left out, any may come first.
    turns = [turn for group in groups if rng.random() < 0.6 for turn in group] or [said]
    wrong = list(things)
    wrong[rng.randrange(len(wrong))] = Thing(world.absent(things, rng.choice(POPE), rng), "", things[0].box)
    names = record(number, "train", things, [said])
    shared = {key: value for key, value in names.items() if key != "conversations"}
    chosen = names["conversations"]
    rejected = [chosen[0], {"from": "gpt", "value": caption(wrong)}]
    return {
        "train": record(number, "train", things, turns),
        "names": names,
        "places": record(number, "train", things, [placed]),
        "exists": record(number, "train", things, world.existence(things, rng)),
        "preferences": shared | {"chosen": chosen, "rejected": rejected},
    }


def testing(world: World, number: int, things: list[Thing], rng: random.Random) -> dict[str, dict[str, Any]]:
    """What is asked about a test scene, by file."""
    kind = KINDS[number // 4 % 4]  # whose change is another than that of how many things there are
    kind = "where" if kind == "relation" and len(things) == 1 else kind
    question, answer = ask(kind, things, rng)
    found = {
        "test": record(number, "test", things, [(question, answer)], kind=kind),
        "captions": record(number, "test", things, [(DESCRIBE, caption(things))], kind="caption"),
    }
    there = number % 8 < 4  # 1 to 4 things each way
    for split in POPE:
        named = rng.choice(things).concept if there else world.absent(things, split, rng)
        turn = (is_there(named.name), "Yes." if there else "No.")
        found[f"pope_{split}"] = record(number, "test", things, [turn], kind="exists", category=split)
    return found


def main(argv: list[str]) -> int:
    """Write the folder; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="where pictures and records go")
    parser.add_argument(
        "--concepts", type=at_least(20), default=100, help="how many different things there are"
    )
    parser.add_argument("--scenes", type=at_least(1), default=20_000, help="scenes to train on")
    parser.add_argument("--test-scenes", type=at_least(8), default=800, help="scenes to test on")
    options = parser.parse_args(argv)
    folder, world = new_folder(options.folder, "FOLDER"), World(options.concepts)
    names = [one.name for one in world.concepts]
    if (folder / "concepts.json").is_file() and read_json(folder / "concepts.json", "FOLDER") != names:
        raise UserError(
            f"FOLDER {folder} has pictures of other concepts; give its own --concepts, or another folder"
        )
    write_json(folder / "concepts.json", names, "FOLDER")
    files: dict[str, list[dict[str, Any]]] = {}
    for split, count in (("train", options.scenes), ("test", options.test_scenes)):
        new_folder(folder / split, "FOLDER")
        for number in tqdm(range(count), desc=f"{split} scenes", unit="scene", mininterval=2):
            picture, things, rng = world.scene(number, split)
            path = folder / split / f"{number:06d}.jpg"
            if not path.is_file():
                encoded = io.BytesIO()
                picture.save(encoded, "JPEG", quality=88)
                with new_file(path, "FOLDER") as partial:
                    partial.write_bytes(encoded.getvalue())
            found = (training if split == "train" else testing)(world, number, things, rng)
            for name, one in found.items():
                files.setdefault(name, []).append(one)
    for name, records in files.items():
        write_json(folder / f"{name}.json", records, "FOLDER")
        print(f"{folder / f'{name}.json'}: {len(records)} records")
    write_json(folder / ATTRIBUTIONS, list(LICENCES.values()), "FOLDER")
    return 0


if __name__ == "__main__":
    run_tool(main)
