"""Evaluation sets: class folders, captioned image folders, and uncompressed shards (remote ones go to the cache)."""

from __future__ import annotations

import logging
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from vlmkd.class_names import imagenet_names, read_class_names, read_lines, read_templates
from vlmkd.data import shards as shard_lists
from vlmkd.data.images import ImageRef
from vlmkd.data.labelled import Item, LabelledSet
from vlmkd.datasets.folders import (
    WNID,
    class_folder_names,
    class_items,
    first_file,
    is_image,
    named_classes,
)
from vlmkd.datasets.published_sets import SETS
from vlmkd.datasets.tar_index import index_tar
from vlmkd.errors import UserError
from vlmkd.files import cache_root, read_json

log = logging.getLogger(__name__)

_TEMPLATE_FILES = ("templates.txt", "zeroshot_classification_templates.txt")  # the second is CLIP-benchmark's
# `a.jpg#0<tab>text` (Flickr30k's token file), `a.jpg,text` and `a.jpg| 0| text` (its CSV forms)
_CAPTION_LINE = re.compile(
    r"^\"?(.+?\.(?:jpe?g|png|webp))\"?(?:#\d+)?\s*[\t,|]\s*(?:\d+\s*\|\s*)?(.+)$", re.I
)
Captions = list[tuple[list[str], list[str]]]
"""(possible file names, captions) of each image."""


@dataclass(frozen=True)
class CaptionedImages:
    """A retrieval set; every image and every text has at least one partner."""

    name: str
    images: list[ImageRef]
    texts: list[str]
    texts_of_image: list[list[int]]
    """Indices into `texts` of each image's captions."""


def zero_shot_set(data: str, *, class_names: str = "", templates: str = "", name: str = "") -> LabelledSet:
    """A labelled set with the split `test`, from an ImageNet-layout folder, webdataset shards, or an `emoji:` name.

    Empty `class_names` and `templates` mean classnames.txt and templates.txt beside the shards or class folders, else
    the folders' names, or OpenAI's ImageNet names for wnids, and the 80 OpenAI prompts.
    """
    tars = _find_shards(data, "zero-shot data")
    folder = Path(tars[0]).parent if tars else _val_folder(data)
    beside = [folder, folder.parent] if folder.name in ("val", "test", "train") else [folder]
    source = class_names or first_file(beside, "classnames.txt")
    if tars:
        if not source:
            raise UserError(
                f"{folder} has no classnames.txt beside its shards; write one, or name class_names"
            )
        names, items = read_class_names(source), _labelled_shards(tars)
        worst = max(item.label for item in items)
        if worst >= len(names):
            raise UserError(
                f"{data}: a sample has class {worst}, but there are only {len(names)} class names; correct them"
            )
    else:
        labels, names = named_classes(folder, source)
        items = class_items(folder, labels)
        if all(map(WNID.fullmatch, labels)) and len(labels) < len(imagenet_names()):
            log.warning(
                "%s has %d of ImageNet's 1000 classes; accuracy is over these only", folder, len(labels)
            )
    chosen = read_templates(templates or first_file(beside, *_TEMPLATE_FILES) or "openai")
    return LabelledSet(name or default_name(data), names, chosen, {"test": items})


def retrieval_set(data: str, *, captions: str = "", name: str = "") -> CaptionedImages:
    """A retrieval set from an image folder with a captions file, webdataset shards, or an `emoji:` name.

    `captions`: COCO annotations JSON, Karpathy split JSON (its `test` images), or Flickr30k's token or CSV file.
    In shards every non-empty line of `txt` is a caption. Equal captions of an `emoji:` set are one text with several
    right images (its test captions are concept names); elsewhere each caption counts by itself, as published.
    """
    if tars := _find_shards(data, "retrieval data"):
        if captions:
            raise UserError(
                f"captions={captions} has no effect on shards, whose txt members are the captions; leave it out"
            )
        pairs = [
            (sample.image(), [line.strip() for line in sample.text("txt").splitlines() if line.strip()])
            for sample in chain.from_iterable(map(index_tar, tars))
        ]
    elif captions:
        pairs = _captioned_folder(Path(data).expanduser(), Path(captions).expanduser())
    else:
        raise UserError(
            f"{data} holds no .tar shards; for an image folder name its captions file (COCO or Karpathy JSON)"
        )
    texts: list[str] = []
    texts_of_image: list[list[int]] = []
    place: dict[str, int] = {}
    for image, image_texts in pairs:
        if not image_texts:
            raise UserError(
                f"{image} has no caption in {captions or data}; remove the image or add a caption"
            )
        indices = []
        for text in image_texts:
            if text not in place or not data.startswith("emoji:"):
                place[text] = len(texts)
                texts.append(text)
            indices.append(place[text])
        texts_of_image.append(list(dict.fromkeys(indices)))
    return CaptionedImages(name or default_name(data), [image for image, _ in pairs], texts, texts_of_image)


def default_name(data: str) -> str:
    """Last part of a data path that says something: `imagenet` for /data/imagenet/val."""
    parts = [part for part in re.split(r"[/\\:]", data) if part]
    telling = [part for part in parts if part not in ("val", "test", ".", "..") and not part.endswith(".tar")]
    return (telling or parts or [data])[-1]


def _val_folder(data: str) -> Path:
    """The folder that holds the class folders: `data`, or its `val`."""
    base = Path(data).expanduser()
    hint = f"for ImageNet, {SETS['imagenet'].hint}"
    if not base.is_dir():
        raise UserError(f"image folder {data} does not exist (looked from {os.getcwd()}); {hint}")
    if (base / "val").is_dir():
        base = base / "val"
    elif (base / "train").is_dir():
        raise UserError(f"{base} has a train folder but no val folder: {base / 'val'} is missing; {hint}")
    if not class_folder_names(base):
        loose = sum(map(is_image, os.listdir(base)))
        found = f"holds {loose} images but no class folders" if loose else "holds no class folders"
        raise UserError(f"{base} {found}; sort its images into one folder per class; {hint}")
    return base


def _captioned_folder(root: Path, captions: Path) -> list[tuple[ImageRef, list[str]]]:
    if not root.is_dir():
        raise UserError(f"image folder {root} does not exist (looked from {os.getcwd()}); correct the path")
    pairs = _read_json_captions(captions) if captions.suffix == ".json" else _read_caption_lines(captions)
    if not pairs:
        raise UserError(
            f"captions file {captions} names no image to evaluate (Karpathy files: no image of split `test`)"
        )
    paths = [next((root / name for name in names if (root / name).is_file()), None) for names, _ in pairs]
    if missing := [root / names[0] for path, (names, _) in zip(paths, pairs, strict=True) if path is None]:
        raise UserError(
            f"{len(missing)} of {len(pairs)} images of {captions} are missing, first {missing[0]}; add them"
        )
    return [(ImageRef(str(path)), texts) for path, (_, texts) in zip(paths, pairs, strict=True)]


def _read_json_captions(path: Path) -> Captions:
    """The images of COCO's annotations, or the `test` images of a Karpathy split."""
    content = read_json(path, "captions file")
    try:
        images = content["images"]
        if images and all("sentences" in image and "filename" in image for image in images):
            pairs = [
                (
                    [os.path.join(image.get("filepath", ""), image["filename"]), image["filename"]],
                    [sentence["raw"] for sentence in image["sentences"]],
                )
                for image in images
                if image.get("split") == "test"
            ]
        else:
            texts = defaultdict(list)
            for item in content["annotations"]:
                texts[item["image_id"]].append(item["caption"])
            pairs = [([image["file_name"]], texts[image["id"]]) for image in images]
        usable = bool(images) and all(
            isinstance(text, str) for part in pairs for strings in part for text in strings
        )
    except (KeyError, TypeError, AttributeError):  # another layout
        usable = False
    if not usable:
        raise UserError(
            f"captions file {path} is neither COCO captions (images + annotations with `caption`) nor a Karpathy split "
            "(images with `sentences`); name one of these"
        )
    return pairs


def _read_caption_lines(path: Path) -> Captions:
    """The images of Flickr30k's token or CSV file; a header line is skipped."""
    by_image: dict[str, list[str]] = {}
    for number, line in enumerate(read_lines(str(path), "captions file"), start=1):
        match = _CAPTION_LINE.match(line)
        if match:
            by_image.setdefault(match[1], []).append(match[2].strip().strip('"'))
        elif number > 1:
            raise UserError(
                f"captions file {path}: entry {number} is not `image.jpg#0<tab>caption` or CSV: {line[:60]!r}"
            )
    return [([name], texts) for name, texts in by_image.items()]


def _find_shards(data: str, where: str) -> list[str]:
    """Local tars that `data` names: an `emoji:` set, tars, a folder of tars (or its test/); [] for another folder."""
    if not data:
        raise UserError(f"{where} is empty; name a folder, shards or an emoji: set")
    if data.startswith("pipe:"):
        raise UserError(
            f"{where} {data}: evaluation reads files, not pipes; save the shard and name its path"
        )
    folder = Path(data).expanduser()
    if folder.is_dir():
        return list(map(str, sorted(folder.glob("*.tar")) or sorted(folder.glob("test/*.tar"))))
    if not (data.startswith("emoji:") or ".tar" in data):
        return []
    cache = cache_root() / "evaluation_shards"
    try:
        return [
            str(shard_lists.download(url, cache)) if shard_lists.is_remote(url) else url
            for url in shard_lists.expand([data], where)
        ]
    except shard_lists.Unreachable as error:
        raise UserError(
            f"{where} {data} cannot be fetched ({error}); check the address and the network"
        ) from None


def _labelled_shards(tars: Sequence[str]) -> list[Item]:
    items = []
    for sample in chain.from_iterable(map(index_tar, tars)):
        content = sample.text("cls").strip()
        if not content.isdecimal():
            raise UserError(
                f"{sample.shard}: {sample.key}.cls is {content[:20]!r}, not a class index; write the shard again"
            )
        items.append(Item(f"{Path(sample.shard).stem}/{sample.key}", sample.image(), int(content)))
    return items
