"""Build the embedded data into the cache: the shards of `emoji`, or the pictures of `emoji-domains`.

    python data_tools/emoji/build.py emoji

vlmkd starts this when a set is not in its cache; `build_emoji.py` asks for that. Shards hold the same bytes on every build
with the same packages.
"""

from __future__ import annotations

import argparse
import fcntl
import functools
import hashlib
import io
import json
import os
import random
import shutil
import sys
import tarfile
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import PIL
from PIL import Image
from tqdm import tqdm

from data_tools.emoji.catalog import (
    DRAWN_STYLES,
    STYLES,
    TEST_TEMPLATES,
    Concept,
    caption,
    class_names,
    concepts,
    require_packages,
    training_styles,
    unit_hash,
)
from data_tools.emoji.draw import (
    NOTO_WEIGHTS,
    TEST_NOTO_WEIGHT,
    compose,
    concept_picture,
    drawing,
    on_white,
)
from vlmkd.datasets import emoji
from vlmkd.datasets.emoji import LICENCES, VERSIONS, cache_folder
from vlmkd.errors import run_tool
from vlmkd.files import new_folder

SPLITS = tuple(emoji.SPLITS.values())
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


@functools.cache
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


@functools.cache
def training_drawings() -> list[tuple[Concept, str]]:
    """What scenes may show: training concepts in drawn training styles."""
    train = [concept for concept in concepts() if concept.split == "train"]
    return [(concept, style) for concept in train for style in training_styles(concept) if style != "pixel"]


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _scene(plan: Plan) -> tuple[Image.Image, str, dict[str, Any]]:
    pool = training_drawings()
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


def _members(plan: Plan, split: str) -> dict[str, bytes]:
    """The files of a sample by their extension."""
    scene = plan.kind == "scene"
    picture, text, facts = _scene(plan) if scene else _single(plan, split)
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


def write_shard(folder: Path, split: str, start: int, stop: int) -> int:
    """Write one shard; returns its number of samples."""
    path = folder / shard_path(split, start)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for index, plan in enumerate(plans(split)[start:stop], start):
            for extension, data in _members(plan, split).items():
                info = tarfile.TarInfo(f"{index:06d}.{extension}")
                info.size, info.mode, info.mtime = len(data), 0o644, 0
                tar.addfile(info, io.BytesIO(data))
    return stop - start


def finish(folder: Path) -> None:
    """Write class names and prompts beside the test shards, and the manifest."""
    for split in SPLITS[1:]:
        (folder / split / "classnames.txt").write_text("\n".join(class_names()) + "\n", encoding="utf-8")
        (folder / split / "templates.txt").write_text("\n".join(TEST_TEMPLATES) + "\n", encoding="utf-8")
    shards = []
    for split, start, stop in shard_list():
        path = shard_path(split, start)
        digest = hashlib.sha256((folder / path).read_bytes()).hexdigest()
        shards.append({"path": path, "split": split, "samples": stop - start, "sha256": digest})
    kinds = Counter(f"{plan.kind}-{plan.objects}" if plan.objects else plan.kind for plan in plans("train"))
    manifest = {
        "name": "emoji",
        "version": VERSIONS["emoji"],
        "concepts": {**Counter(concept.split for concept in concepts()), "all": len(concepts())},
        "samples": {split: len(plans(split)) for split in SPLITS},
        "train_kinds": dict(sorted(kinds.items())),
        "classes": len(class_names()),
        "shards": shards,
        "packages": {**require_packages(), "pillow": PIL.__version__},
        "licences": LICENCES,
    }
    _write_manifest(folder, manifest)


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _progress(total: int, what: str, unit: str) -> tqdm:
    # Log files get fewer lines than a terminal.
    interval = 1.0 if sys.stderr.isatty() else 10.0
    return tqdm(total=total, desc=f"building the {what} data set", unit=f" {unit}", mininterval=interval)


def build(folder: Path) -> None:
    """Write all of `emoji` into an empty folder, with a process per core, four at most."""
    processes = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)
    total = sum(stop - start for _, start, stop in shard_list())
    with (
        ProcessPoolExecutor(processes, get_context("spawn")) as pool,
        _progress(total, "emoji", "samples") as bar,
    ):
        shards = [pool.submit(write_shard, folder, *shard) for shard in shard_list()]
        for shard in as_completed(shards):
            bar.update(shard.result())
    finish(folder)


def build_domains(folder: Path) -> None:
    """Write `emoji-domains` into an empty folder: `<style>/<class>/<code>.png`."""
    with _progress(len(STYLES) * len(concepts()), "emoji-domains", "pictures") as bar:
        for style in STYLES:
            for concept in concepts():
                path = folder / style / class_folder(concept) / f"{concept.code}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                concept_picture(concept, style).save(path, "PNG")
                bar.update()
    facts = {
        "name": "emoji-domains",
        "version": VERSIONS["emoji-domains"],
        "styles": STYLES,
        "concepts": len(concepts()),
    }
    _write_manifest(folder, facts)


def class_folder(concept: Concept) -> str:
    """The class name as a folder name."""
    return concept.class_name.replace(" ", "_")


BUILDERS = {"emoji": build, "emoji-domains": build_domains}


def build_once(name: str) -> None:
    """Build a set when it is absent, by one process while others wait; under its name it is whole."""
    folder = cache_folder(name)
    require_packages()
    new_folder(folder.parent, "the cache (set VLMKD_CACHE)")
    with (folder.parent / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / "manifest.json").is_file():
            return
        temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=folder.parent))
        try:
            BUILDERS[name](temporary)
            temporary.chmod(0o755)
            # A folder without a manifest was not made by this code's rename: someone deleted files in it.
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def main(argv: list[str]) -> int:
    """Run the tool; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("set", choices=BUILDERS)
    build_once(parser.parse_args(argv).set)
    return 0


if __name__ == "__main__":
    run_tool(main)
