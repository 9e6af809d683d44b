"""The embedded `emoji` data as labelled sets: 100 classes with fixed splits, and four drawn styles as domains.

`emoji`: classes are the Unicode subcategories by name, long-tailed (15 to hundreds of training images). Two classes,
`family or couple` and `keycap`, have no training image: all their drawings are of one kin and lie in held-out splits.
`splits.base_and_novel` therefore halves the 98 others, at the same place as the order of all 100 names.

`emoji-domains`: every concept in every style, so that a held-out style shows known concepts in an unseen drawing.
`pixel` is made from `twemoji`: hold out one, and the other says much about it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from vlmkd.data.images import ImageRef
from vlmkd.data.labelled import Item, LabelledSet
from vlmkd.datasets.domain_sets import ALL, read_domains
from vlmkd.datasets.emoji import cache
from vlmkd.datasets.emoji.catalog import STYLES, TEST_TEMPLATES, Concept, class_names, concepts
from vlmkd.datasets.emoji.draw import concept_picture, drawing
from vlmkd.datasets.tar_index import index_tar
from vlmkd.errors import UserError
from vlmkd.files import read_object, write_text

log = logging.getLogger(__name__)

EMOJI_SPLITS = {
    "train": "train",
    "val": "dev",
    "test": "unseen_drawing",
    "test_unseen_concept": "unseen_concept",
}
"""Split of the labelled set -> split of the embedded shards."""
TRAINING_TEMPLATE = "an emoji of {c}"
DOMAINS_VERSION = 1
_INDEX_VERSION = 1

# ------------------------------------------------------------------------------------------------------- 100 classes


def load_emoji() -> LabelledSet:
    """`emoji` with `train` (drawings, skin variants, one-emoji scenes), `val`, `test` and `test_unseen_concept`.

    Images lie in the cached shards, which are built when absent; keys are `<shard split>/<key in the tar>`.

    Raises:
        UserError: a package that carries the drawings is missing, or a cached shard has gone.
    """
    folder = cache.emoji_folder()
    entries = _index(folder)
    splits = {}
    for split, stored in EMOJI_SPLITS.items():
        shards = cache.resolve(f"emoji:{stored}")
        splits[split] = [
            Item(f"{stored}/{name.partition('.')[0]}", ImageRef(shards[shard], offset, size, name), label)
            for shard, name, offset, size, label in entries[stored]
        ]
    # The first template is the training prompt; the order of the others matters to nobody.
    templates = [TRAINING_TEMPLATE, *(line for line in TEST_TEMPLATES if line != TRAINING_TEMPLATE)]
    return LabelledSet("emoji", class_names(), templates, splits)


def _index(folder: Path) -> dict[str, list[list[Any]]]:
    """[shard number, member, offset, size, class] of every picture with one class, by shard split.

    Kept beside the data set's folder: reading the headers of 30,000 samples takes seconds.
    """
    manifest = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    path = folder.parent / f"{folder.name}-classes-v{_INDEX_VERSION}.json"
    if path.is_file():
        stored = read_object(path, "index of the emoji classes", "delete it")
        if stored.get("manifest") == manifest and "splits" in stored:
            return stored["splits"]
    log.info("indexing the classes of %s (once)", folder)
    splits = {
        split: [
            entry
            for number, shard in enumerate(cache.resolve(f"emoji:{split}"))
            for entry in _labelled_members(shard, number)
        ]
        for split in EMOJI_SPLITS.values()
    }
    write_text(path, json.dumps({"manifest": manifest, "splits": splits}), "index of the emoji classes")
    return splits


def _labelled_members(shard: str, number: int) -> list[list[Any]]:
    entries: list[list[Any]] = []
    for sample in index_tar(shard):
        label = json.loads(sample.text("json"))["class"]
        if label >= 0:  # scenes of several emoji have no one class
            image = sample.image()
            entries.append([number, image.key, image.offset, image.size, label])
    return entries


# -------------------------------------------------------------------------------------------------------- four styles


def load_emoji_domains() -> LabelledSet:
    """`emoji-domains`: domains noto, openmoji, pixel and twemoji, each with all 1,889 concepts in 100 classes.

    Class indices follow the folders' names (the class names), not the order of `emoji`.

    Raises:
        UserError: a package that carries the drawings is missing.
    """
    folder = cache.build_once(cache.cache_root() / f"emoji-domains-v{DOMAINS_VERSION}", _draw_domains)
    found = read_domains(folder, name="emoji-domains")
    expected = len(concepts()) * len(STYLES)
    if len(found.splits[ALL]) != expected:
        raise UserError(
            f"{folder} has {len(found.splits[ALL])} of {expected} pictures; delete the folder and run again"
        )
    return LabelledSet(found.name, found.class_names, [TRAINING_TEMPLATE], found.splits, found.domains)


def _draw_domains(folder: Path) -> None:
    """Write the tree `<style>/<class>/<code>.png`."""
    log.info("drawing the %d pictures of emoji-domains into the cache (once)", len(concepts()) * len(STYLES))
    for style in STYLES:
        for concept in concepts():
            path = folder / style / class_folder(concept) / f"{concept.code}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            concept_picture(concept, style).save(path, "PNG")
    drawing.cache_clear()  # about 150 MB that nobody needs any more
    facts = {
        "name": "emoji-domains",
        "version": DOMAINS_VERSION,
        "styles": STYLES,
        "concepts": len(concepts()),
    }
    (folder / "manifest.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def class_folder(concept: Concept) -> str:
    """The class name as a folder name."""
    return concept.class_name.replace(" ", "_")
