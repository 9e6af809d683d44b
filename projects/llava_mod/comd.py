"""The steps of CoMD's competitive rounds around their training; `scripts/comd.sh` calls them in order.

    python -m projects.llava_mod.comd answer pool=POOL out=ANSWERS [chats=CHATS] by=EXPORT
    python -m projects.llava_mod.comd assess pool=POOL teacher=ANSWERS student=ANSWERS folder=ROUND by=EXPORT
    python -m projects.llava_mod.comd augment train=POOL pool=POOL folder=ROUND next=ROUND by=EXPORT

`answer` asks the last question of every record of a pool, and writes the pool with these answers as chats to train
on. `assess` has the teacher's and the student's answers scored, twice, each once as the first, and parts the pool
into `difficult.jsonl` and `easy.jsonl`. `augment` has new instructions written from both, and makes the next round's
`train.jsonl` and `cache.jsonl`. Pools are LLaVA's JSON or JSONL; answers that a pool has already are not looked at.

Who answers: `by`, an export of a run or a file of saved answers, or a service of OpenAI's chat form, `url=... model=...
token_env=...`. Every answer is kept as it comes: a command that was stopped goes on, and nothing is asked twice.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from projects.llava_mod.speakers import Answerer, Endpoint, Local, Replayed, Request, collect, plain
from vlmkd import config
from vlmkd.config import Amount, Positive, Seed, Share, require
from vlmkd.data.chats import IMAGE, ChatItem, read_chats, turns_of
from vlmkd.errors import UserError, run_tool
from vlmkd.files import new_folder, write_text
from vlmkd.service import Service

Scores = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class ComdConfig(Service):
    """One step of a round."""

    by: str = ""
    """Who answers: a run's `export` folder, or a file of saved answers (.jsonl); empty: the service at `url`."""
    model: str = ""
    """Name of the service's model."""
    most_tokens: Positive = 512
    """Longest answer."""
    batch_size: Positive = 16
    """Questions at a time."""
    device: str = ""
    """Of an export: cpu, cuda, cuda:1; empty: a GPU when there is one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of its weights."""
    images: str = ""
    """Folder of the pools' images; empty: the pool's."""
    pool: str = ""
    """The pool that is answered, or the cache pool."""
    out: str = ""
    """File of the answers."""
    chats: str = ""
    """File of the pool with the answers; empty: none is written."""
    train: str = ""
    """The train pool of the round."""
    teacher: str = ""
    """The teacher's answers to the cache pool."""
    student: str = ""
    """The student's."""
    folder: str = ""
    """The round's folder."""
    next: str = ""
    """Folder of the round after it."""
    show_images: bool = False
    """Assessor and augmentor see the picture, which published ones, language models, do not."""
    threshold: Amount = 1.0
    """tau: an instruction is difficult where the teacher leads by so much."""
    new: Positive = 6000
    """Most instructions to write: as many from difficult ones as from easy ones, unless there are none of one kind."""
    most_alike: Share = 0.7
    """A new instruction with more than this ROUGE-L F to one that there is already is left out."""
    kept: Amount = 1.0
    """Instructions of the train pool that stay, in shares of the new ones."""
    seed: Seed = 0
    """Of what is drawn."""


def speaker_of(cfg: ComdConfig) -> Answerer:
    """Who the config says answers."""
    require(bool(cfg.by) != bool(cfg.url), "by", "and url: give one of them")
    if cfg.url:
        require(bool(cfg.model), "model", "is empty; name the model that the service is to use")
        return Endpoint(cfg, cfg.model, cfg.most_tokens)
    if cfg.by.endswith(".jsonl"):
        return Replayed(Path(cfg.by))
    return Local(Path(cfg.by), most_tokens=cfg.most_tokens, device=cfg.device, precision=cfg.precision)


def _asked(cfg: ComdConfig, requests: Sequence[Request], out: Path) -> dict[str, str]:
    return collect(lambda: speaker_of(cfg), requests, out, cfg.batch_size)


@dataclass(frozen=True)
class Instruction:
    """A record's last question."""

    item: ChatItem
    before: list[tuple[str, str]]
    text: str

    @property
    def words(self) -> str:
        """The question without its picture."""
        return plain(self.text)

    @property
    def pictures(self) -> str:
        """`<image>` as often as it stands in all turns."""
        return f"{IMAGE}\n" * sum(said.count(IMAGE) for turn in [*self.before, (self.text,)] for said in turn)

    def answered(self, said: str) -> dict[str, Any]:
        """The record with this answer."""
        turns = [zip(("human", "gpt"), turn, strict=True) for turn in [*self.before, (self.text, said)]]
        talk = [{"from": who, "value": text} for turn in turns for who, text in turn]
        return {**self.item.record, "conversations": talk}


def read_pool(path: str, images: str) -> list[Instruction]:
    """The instructions of a LLaVA file, with answers or without."""
    found: dict[str, Instruction] = {}
    for item in read_chats(path, images or str(Path(path).parent)):
        talk = list(item.record.get("conversations") or [])
        if talk and isinstance(talk[-1], dict) and talk[-1].get("from") == "human":
            talk.append({"from": "gpt", "value": ""})
        try:
            *before, (text, _) = turns_of(talk)
        except ValueError as error:
            raise UserError(f"pool {path}: record {item.key} {error}; correct it") from None
        if item.key in found:
            raise UserError(f"pool {path}: two records have the id {item.key}; give each its own")
        found[item.key] = Instruction(item, before, text)
    return list(found.values())


def answer(cfg: ComdConfig) -> str:
    """Tune and assess begin with this (docs/papers/llava_mod.md, eq. 8)."""
    pool = read_pool(cfg.pool, cfg.images)
    requests = [Request(one.item.key, one.text, one.before, one.item) for one in pool]
    said = _asked(cfg, requests, Path(cfg.out))
    mute = sum(not text for text in said.values())
    if cfg.chats and mute == len(pool):
        raise UserError(f"{cfg.out} has no answer that says anything; look at who answers (by, url)")
    if cfg.chats:
        _write(Path(cfg.chats), (one.answered(said[one.item.key]) for one in pool if said[one.item.key]))
    return f"{cfg.out}: {len(pool)} instructions, {mute} without an answer, which are left out"


def assess(cfg: ComdConfig) -> str:
    """Score both models' answers and part the pool (docs/papers/llava_mod.md, eq. 9 and 10)."""
    pool, folder = read_pool(cfg.pool, cfg.images), new_folder(cfg.folder, "folder")
    keys = [Request(one.item.key, "") for one in pool]
    teacher, student = (dict(Replayed(Path(path))(keys)) for path in (cfg.teacher, cfg.student))
    pool = [one for one in pool if teacher[one.item.key]]
    requests = []
    for one in pool:
        key = one.item.key
        for order, said in (("12", (teacher[key], student[key])), ("21", (student[key], teacher[key]))):
            requests.append(_shown(cfg, f"{key}/{order}", one, _assessment(one.words, *said)))
    verdicts = _asked(cfg, requests, folder / "verdicts.jsonl")
    leads: dict[str, float] = {}
    for one in pool:
        first, second = (parse_scores(verdicts[f"{one.item.key}/{order}"]) for order in ("12", "21"))
        if first is not None and second is not None:
            leads[one.item.key] = difference(first, second)
    _write(folder / "scores.jsonl", ({"id": key, "difference": lead} for key, lead in leads.items()))
    difficult, easy = split_difficult(leads, cfg.threshold)
    for name, part in (("difficult", difficult), ("easy", easy)):
        _write(folder / f"{name}.jsonl", (one.item.record for one in pool if one.item.key in part))
    mean = sum(leads.values()) / max(1, len(leads))
    return (
        f"{folder}: {len(difficult)} difficult, {len(easy)} easy, {len(pool) - len(leads)} without usable scores, "
        f"which are left out; the teacher leads by {mean:.2f} on average"
    )


def augment(cfg: ComdConfig) -> str:
    """Write new instructions and the next round's pools (docs/papers/llava_mod.md#competitive-distillation)."""
    folder = Path(cfg.folder)
    train, cache = read_pool(cfg.train, cfg.images), read_pool(cfg.pool, cfg.images)
    draw = random.Random(f"{cfg.seed} comd {folder.name}")
    requests, seeds, images = [], {}, cfg.images or str(Path(cfg.pool).parent)
    parts = {kind: read_pool(str(folder / f"{kind}.jsonl"), images) for kind in _WISHES}
    count = min(cfg.new // 2, *(len(part) or cfg.new for part in parts.values()))
    for kind, wish in _WISHES.items():
        for one in draw.sample(parts[kind], min(count, len(parts[kind]))):
            key = f"{folder.name}-{one.item.key}"
            seeds[key] = one
            requests.append(_shown(cfg, key, one, f"{wish}\n\n{one.words}"))
    said = _asked(cfg, requests, folder / "proposals.jsonl")
    texts = {key: plain(text) for key, text in said.items()}
    there = {one.item.key: one.words for one in [*train, *cache]}.values()
    kept = dedup({key: text for key, text in texts.items() if text}, there, cfg.most_alike)
    if not kept:
        raise UserError(f"{folder / 'proposals.jsonl'} has no new instruction; ask for more (new=), or end")
    new = [_record(key, seeds[key], texts[key]) for key in kept]
    _write(folder / "new.jsonl", new)
    following = new_folder(cfg.next, "next")
    _write(following / "train.jsonl", mix(new, [one.item.record for one in train], cfg.kept, draw))
    _write(following / "cache.jsonl", [one.item.record for one in cache] + new)
    return f"{following}: {len(new)} new instructions, {len(said) - len(new)} empty or too much like another"


def parse_scores(text: str) -> Scores | None:
    """The two scores from 1 to 10 that a verdict's first line holds and nothing else; None: it does not."""
    line = text.strip().partition("\n")[0].strip()
    found = re.fullmatch(r"(\d+(?:\.\d+)?)[\s,]+(\d+(?:\.\d+)?)", line)
    scores = (float(found[1]), float(found[2])) if found else (0.0, 0.0)
    return scores if all(1 <= score <= 10 for score in scores) else None


def difference(teacher_first: Scores, student_first: Scores) -> float:
    """Delta, by how much the teacher leads in the mean of both orders (docs/papers/llava_mod.md, eq. 9)."""
    teacher = (teacher_first[0] + student_first[1]) / 2
    student = (teacher_first[1] + student_first[0]) / 2
    return teacher - student


def split_difficult(leads: dict[str, float], threshold: float) -> tuple[set[str], set[str]]:
    """Keys of the difficult instructions, Delta >= threshold, and of the others (docs/papers/llava_mod.md, eq. 10)."""
    difficult = {key for key, lead in leads.items() if lead >= threshold}
    return difficult, leads.keys() - difficult


def dedup(new: dict[str, str], pool: Iterable[str], most: float) -> list[str]:
    """Keys of `new` whose texts have at most ROUGE-L F `most` to every text of the pool and to those before them."""
    there = [_words(text) for text in pool]
    kept = []
    for key, text in new.items():
        words = _words(text)
        if all(_rouge(words, other, most) <= most for other in there):
            kept.append(key)
            there.append(words)
    return kept


def rouge_l(one: str, other: str) -> float:
    """ROUGE-L F1 of two texts by their words in lower case (Lin 2004)."""
    return _rouge(_words(one), _words(other), 0.0)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _rouge(one: list[str], other: list[str], least: float) -> float:
    """Of longest common subsequence and lengths; 0 where it cannot be above `least`."""
    both = len(one) + len(other)
    if not both or 2 * min(len(one), len(other)) <= least * both:
        return 0.0
    # Bit by bit for a whole row of the table: Hyyro 2004.
    places: dict[str, int] = {}
    for place, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << place
    full = row = (1 << len(one)) - 1
    for word in other:
        here = row & places.get(word, 0)
        row = (row + here | row - here) & full
    return 2 * (len(one) - row.bit_count()) / both


def mix(
    new: Sequence[dict[str, Any]], before: Sequence[dict[str, Any]], share: float, draw: random.Random
) -> list[dict[str, Any]]:
    """All new records, and of those before `share` times as many, or all that there are."""
    return [*new, *draw.sample(before, min(len(before), round(share * len(new))))]


def _shown(cfg: ComdConfig, key: str, one: Instruction, text: str) -> Request:
    """A question to assessor or augmentor, with the instruction's pictures where they are to be shown."""
    return Request(key, one.pictures + text, item=one.item) if cfg.show_images else Request(key, text)


def _assessment(question: str, first: str, second: str) -> str:
    return (
        f"[Question]\n{question}\n\n[Answer of assistant 1]\n{first}\n\n[Answer of assistant 2]\n{second}\n\n"
        "Two assistants were asked this question about a picture. Rate the helpfulness, relevance, accuracy and level of "
        "detail of their answers. Each assistant gets one score from 1 to 10, where more is better. Write a first line "
        "with nothing but the score of assistant 1, a space, and the score of assistant 2; then explain. The order of the "
        "answers must not sway you."
    )


_WISHES = {
    "difficult": "Write one new question about a picture. It belongs to the same kind of task as the question below and is "
    "about as difficult, but asks for something else. Reply with the new question alone.",
    "easy": "Write one new question about a picture. It belongs to the same field as the question below, but is rarer: of "
    "the kind that is seldom asked. Reply with the new question alone.",
}


def _record(key: str, seed: Instruction, text: str) -> dict[str, Any]:
    """A new instruction about the picture of the one that it was written from."""
    shown = {"image": seed.item.record["image"]} if seed.pictures else {}
    return {"id": key, **shown, "conversations": [{"from": "human", "value": seed.pictures + text}]}


def _write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


_NEEDS: dict[str, tuple[Callable[[ComdConfig], str], tuple[str, ...]]] = {
    "answer": (answer, ("pool", "out")),
    "assess": (assess, ("pool", "teacher", "student", "folder")),
    "augment": (augment, ("train", "pool", "folder", "next")),
}


def main(argv: list[str]) -> int:
    """Run the step; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\n\nfields:\n{config.help_text(ComdConfig)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("step", choices=list(_NEEDS))
    parser.add_argument("arguments", nargs="+", help="CONFIG.yaml and field=value")
    args = parser.parse_args(argv)
    cfg = config.load(ComdConfig, args.arguments)
    run, needs = _NEEDS[args.step]
    for name in needs:
        require(bool(getattr(cfg, name)), name, f"is missing; {args.step} needs it")
    print(run(cfg))
    return 0


if __name__ == "__main__":
    run_tool(main)
