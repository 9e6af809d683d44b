"""Writes the `emoji` data set: which samples there are, their shards, and the manifest.

`python -m vlmkd.datasets.emoji.build FOLDER PART PARTS` writes every PARTS-th shard; `build` starts one such process
per core and then writes the manifest. Shards hold the same bytes on every build with the same packages.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL
from PIL import Image
from tqdm import tqdm

from vlmkd.datasets.emoji.catalog import (
    DRAWN_STYLES,
    TABLES,
    TEST_TEMPLATES,
    Concept,
    caption,
    class_names,
    concepts,
    require_packages,
    training_styles,
    unit_hash,
)
from vlmkd.datasets.emoji.draw import (
    NOTO_WEIGHTS,
    TEST_NOTO_WEIGHT,
    compose,
    concept_picture,
    drawing,
    on_white,
)

VERSION = 2
SPLITS = ("train", "dev", "unseen_drawing", "unseen_concept")
SCENES = {1: 16_000, 2: 5_000, 3: 1_500}
"""Composed scenes by their number of emoji."""
SHARD_SAMPLES = 2000


@dataclass(frozen=True)
class Plan:
    """One sample before it is drawn."""

    kind: str
    """`drawing`, `skin` or `scene`."""
    concept: Concept | None = None
    style: str = ""
    tone: str = ""
    code: str = ""
    weight: int = TEST_NOTO_WEIGHT
    scene: int = 0
    """Number of the scene."""
    objects: int = 0
    """How many emoji the scene shows."""

    @property
    def key(self) -> str:
        """What the hashes of this sample's choices are taken of."""
        return f"{self.kind}/{self.code}/{self.style}/{self.weight}/{self.scene}/{self.objects}"


def _train_plans() -> list[Plan]:
    plans = []
    for concept in concepts():
        if concept.split != "train":
            continue
        for style in training_styles(concept):
            weights = NOTO_WEIGHTS if style == "noto" else (TEST_NOTO_WEIGHT,)
            plans += [Plan("drawing", concept, style, code=concept.code, weight=weight) for weight in weights]
            # The line-art font draws all skin tones alike.
            if style != "noto":
                plans += [Plan("skin", concept, style, tone=tone, code=code) for tone, code in concept.skins]
    for objects, count in SCENES.items():
        plans += [Plan("scene", scene=number, objects=objects) for number in range(count)]
    return sorted(plans, key=lambda plan: unit_hash("order", plan.key))


def plans(split: str) -> list[Plan]:
    """All samples of a split in their stored order."""
    if split == "train":
        return _train_plans()
    found = []
    for concept in concepts():
        if split == "unseen_drawing" and concept.split == "train":
            styles: tuple[str, ...] = (concept.held_out_style,)
        elif split == concept.split:
            styles = DRAWN_STYLES
        else:
            continue
        found += [Plan("drawing", concept, style, code=concept.code) for style in styles]
    return found


def _training_drawings() -> list[tuple[Concept, str]]:
    """What scenes may show: training concepts in drawn training styles."""
    train = [concept for concept in concepts() if concept.split == "train"]
    return [(concept, style) for concept in train for style in training_styles(concept) if style != "pixel"]


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _scene(plan: Plan, pool: list[tuple[Concept, str]]) -> tuple[Image.Image, str, dict[str, Any]]:
    rng = random.Random(f"emoji-v1/{plan.key}")
    first = pool[(plan.scene * 7919 + plan.objects) % len(pool)]
    items, seen = [first], {first[0].kin}
    while len(items) < plan.objects:
        item = pool[rng.randrange(len(pool))]
        if item[0].kin not in seen:
            items.append(item)
            seen.add(item[0].kin)
    picture, placed = compose(items, rng)
    if len(placed) == 1:
        text = caption(placed[0].concept, placed[0].style, plan.key)
    else:
        order = sorted(placed, key=lambda item: item.box[0])
        words = [_article(item.concept.name) for item in order]
        text = " and ".join(words) if len(words) == 2 else f"{', '.join(words[:-1])} and {words[-1]}"
    facts = _facts(plan, [(item.concept, item.style) for item in placed])
    facts["objects"] = [
        [item.concept.code, item.style, item.concept.class_index, *item.box] for item in placed
    ]
    return picture, text, facts


def _single(plan: Plan, split: str) -> tuple[Image.Image, str, dict[str, Any]]:
    concept = plan.concept
    assert concept is not None
    if plan.tone:
        picture = on_white(drawing(plan.code, concept.text, plan.style))
    else:
        picture = concept_picture(concept, plan.style, plan.weight)
    text = caption(concept, plan.style, plan.key, plan.tone) if split == "train" else concept.name
    return picture, text, _facts(plan, [(concept, plan.style)])


def _facts(plan: Plan, shown: list[tuple[Concept, str]]) -> dict[str, Any]:
    """What a sample's JSON says; group and class only where one emoji is shown."""
    one = shown[0][0] if len(shown) == 1 else None
    return {
        "kind": plan.kind,
        "code": "+".join(concept.code for concept, _ in shown),
        "style": "+".join(style for _, style in shown),
        "name": "+".join(concept.name for concept, _ in shown),
        "group": one.group if one else "",
        "subgroup": one.subgroup if one else "",
        "class": one.class_index if one else -1,
        "skin": plan.tone,
    }


def _members(plan: Plan, split: str, pool: list[tuple[Concept, str]]) -> dict[str, bytes]:
    """The files of a sample by their extension."""
    scene = plan.kind == "scene"
    picture, text, facts = _scene(plan, pool) if scene else _single(plan, split)
    buffer = io.BytesIO()
    if scene:
        picture.save(buffer, "JPEG", quality=82)
    else:
        picture.save(buffer, "PNG", optimize=True)
    members = {
        "jpg" if scene else "png": buffer.getvalue(),
        "txt": text.encode(),
        "json": json.dumps(facts, separators=(",", ":")).encode(),
    }
    if split != "train":
        members["cls"] = str(facts["class"]).encode()
    return members


def shard_list() -> list[tuple[str, int, int]]:
    """(split, first sample, one past the last sample) of every shard."""
    shards = []
    for split in SPLITS:
        total, size = len(plans(split)), SHARD_SAMPLES
        shards += [(split, start, min(start + size, total)) for start in range(0, total, size)]
    return shards


def shard_path(split: str, start: int) -> str:
    """Path of a shard inside the data set's folder."""
    return f"{split}/emoji-{split.replace('_', '-')}-{start // SHARD_SAMPLES:05d}.tar"


def write_part(folder: Path, part: int, parts: int) -> Iterator[int]:
    """Write every `parts`-th shard from `part` on; yields the number of samples written since it last did."""
    pool = _training_drawings()
    every = {split: plans(split) for split in SPLITS}
    done = 0
    for split, start, stop in shard_list()[part::parts]:
        path = folder / shard_path(split, start)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for index in range(start, stop):
                for extension, data in _members(every[split][index], split, pool).items():
                    info = tarfile.TarInfo(f"{index:06d}.{extension}")
                    info.size, info.mode, info.mtime = len(data), 0o644, 0
                    tar.addfile(info, io.BytesIO(data))
                done += 1
                if done == 200:
                    yield done
                    done = 0
    yield done


def _manifest(folder: Path) -> dict[str, Any]:
    shards = []
    for split, start, stop in shard_list():
        path = shard_path(split, start)
        digest = hashlib.sha256((folder / path).read_bytes()).hexdigest()
        shards.append({"path": path, "split": split, "samples": stop - start, "sha256": digest})
    kinds = Counter(f"{plan.kind}-{plan.objects}" if plan.objects else plan.kind for plan in plans("train"))
    return {
        "name": "emoji",
        "version": VERSION,
        "concepts": {**Counter(concept.split for concept in concepts()), "all": len(concepts())},
        "samples": {split: len(plans(split)) for split in SPLITS},
        "train_kinds": dict(sorted(kinds.items())),
        "classes": len(class_names()),
        "shards": shards,
        "packages": {**require_packages(), "pillow": PIL.__version__},
        "licences": TABLES["licences"],
    }


def build(folder: Path, processes: int = 0) -> None:
    """Write the whole data set into an empty folder with `processes` processes (0: one per core, four at most)."""
    require_packages()
    processes = processes or min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)
    paths = [str(Path(__file__).resolve().parents[3]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    reading, writing = os.pipe()  # the workers' counts; a line is written at once
    workers = []
    try:
        for part in range(processes):
            command = [sys.executable, "-m", __name__, str(folder), str(part), str(processes)]
            workers.append(subprocess.Popen(command, stdout=writing, env=environment))
        os.close(writing)
        total = sum(stop - start for _, start, stop in shard_list())
        interval = 1.0 if sys.stderr.isatty() else 10.0  # seconds; log files get fewer lines
        bar = tqdm(total=total, desc="building the emoji data set", unit=" samples", mininterval=interval)
        with os.fdopen(reading) as counts, bar:
            for count in counts:
                bar.update(int(count))
        for worker in workers:
            worker.wait()
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
                worker.wait()
    failed = [worker.returncode for worker in workers if worker.returncode != 0]
    if failed:
        raise RuntimeError(f"building the emoji data set failed (exit codes {failed}); the message is above")
    for split in SPLITS[1:]:
        (folder / split / "classnames.txt").write_text("\n".join(class_names()) + "\n", encoding="utf-8")
        (folder / split / "templates.txt").write_text("\n".join(TEST_TEMPLATES) + "\n", encoding="utf-8")
    text = json.dumps(_manifest(folder), indent=1) + "\n"
    (folder / "manifest.json").write_text(text, encoding="utf-8")


def _main() -> None:
    folder, part, parts = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    for done in write_part(folder, part, parts):
        print(done, flush=True)


if __name__ == "__main__":
    _main()
