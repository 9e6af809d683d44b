"""The eleven sets of the few-shot and base-to-novel benchmarks, in the layout of CoOp's data folder.

One table says where each set's images, split and class names are. Reading changes nothing on disk: a set whose split
file is missing is refused, because a split drawn anew gives numbers that compare with nobody's
(`data_tools/make_split.py` draws one on request).
"""

from __future__ import annotations

import logging
import os
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from vlmkd.data.images import ImageRef
from vlmkd.data.labelled import Item, LabelledSet
from vlmkd.datasets import imagenet_sets
from vlmkd.datasets.folders import data_set_folder
from vlmkd.datasets.splits import base_and_novel
from vlmkd.errors import UserError
from vlmkd.files import read_object, read_text

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
HUB = "https://huggingface.co/zhengli97/prompt_learning_dataset"
"""A model-type repository with one archive a set, images and split file together; the sets' own terms apply."""

# ------------------------------------------------------------------------------------------------------ class names

CALTECH_DROPPED = ("BACKGROUND_Google", "Faces_easy")
_CALTECH_RENAMED = {
    "airplanes": "airplane",
    "Faces": "face",
    "Leopards": "leopard",
    "Motorbikes": "motorbike",
}
_EUROSAT_RENAMED = {
    "AnnualCrop": "Annual Crop Land",
    "Forest": "Forest",
    "HerbaceousVegetation": "Herbaceous Vegetation Land",
    "Highway": "Highway or Road",
    "Industrial": "Industrial Buildings",
    "Pasture": "Pasture Land",
    "PermanentCrop": "Permanent Crop Land",
    "Residential": "Residential Buildings",
    "River": "River",
    "SeaLake": "Sea or Lake",
}


def _folder(path: str) -> str:
    return PurePosixPath(path).parent.name


def caltech_class(path: str) -> str:
    """Class of `airplanes/image_0001.jpg`."""
    return _CALTECH_RENAMED.get(_folder(path), _folder(path))


def eurosat_class(path: str) -> str:
    """Class of `AnnualCrop/AnnualCrop_1.jpg`."""
    return _EUROSAT_RENAMED.get(_folder(path), _folder(path))


def pets_class(path: str) -> str:
    """Class of `Abyssinian_100.jpg`: its stem without the number, in lower case."""
    return PurePosixPath(path).stem.rpartition("_")[0].lower()


def sun_class(path: str) -> str:
    """Class of `c/church/outdoor/sun_a.jpg`: the folders after the letter, last first."""
    return " ".join(reversed(PurePosixPath(path.lstrip("/")).parts[1:-1]))


def ucf_class(path: str) -> str:
    """Class of `Apply_Eye_Makeup/v_ApplyEyeMakeup_g08_c01.jpg`: its folder, CamelCase split by underscores."""
    return _folder(path)


def ucf_folder(action: str) -> str:
    """`ApplyEyeMakeup` -> `Apply_Eye_Makeup`."""
    return "_".join(re.findall(r"[A-Z][^A-Z]*", action))


def cars_class(name: str) -> str:
    """`Audi TT Coupe 2012` -> `2012 Audi TT Coupe`: the year comes first."""
    model, _, year = name.rpartition(" ")
    return f"{year} {model}"


# ------------------------------------------------------------------------------------------------------------ table


@dataclass(frozen=True)
class FewShotSet:
    """Where a set lies below the data root, and what is known of it."""

    title: str
    folder: str
    images: str
    """Image folder inside `folder`; paths of the split file start there."""
    layout: Literal["split", "variants", "wnids"]
    """`split` reads a JSON split file, `variants` FGVC's text lists, `wnids` ImageNet's folders."""
    classes: int
    counts: tuple[int, int, int]
    """Images of train, val and test of the published split; ImageNet's val is its test."""
    halves: tuple[int, int]
    """Test images of the base and of the novel classes."""
    template: str
    """The one prompt of the zero-shot baselines."""
    licence: str
    source: str
    """Where images and split come from."""
    split_file: str = ""
    split_drive: str = ""
    """Google Drive id of the split file."""
    mark: str = ""
    """What shows that a folder is the set's own folder; empty: the image folder."""
    class_of: Callable[[str], str] | None = None
    """Class name from a path of the split file, where the path says it."""


_PLAIN = "a photo of a {}."
SETS: dict[str, FewShotSet] = {
    "imagenet": FewShotSet(
        title="ImageNet-1K",
        folder="imagenet",
        images="images",
        layout="wnids",
        classes=1000,
        counts=(1_281_167, 0, 50_000),
        halves=(25_000, 25_000),
        template=_PLAIN,
        licence="non-commercial research and education",
        source="https://image-net.org/download",
    ),
    "caltech101": FewShotSet(
        title="Caltech101",
        folder="caltech-101",
        images="101_ObjectCategories",
        layout="split",
        classes=100,
        counts=(4_128, 1_649, 2_465),
        halves=(1_549, 916),
        template=_PLAIN,
        licence="CC BY 4.0",
        source=f"{HUB} caltech-101.zip",
        split_file="split_zhou_Caltech101.json",
        split_drive="1hyarUivQE36mY6jSomru6Fjd-JzwcCzN",
        class_of=caltech_class,
    ),
    "oxford_pets": FewShotSet(
        title="OxfordPets",
        folder="oxford_pets",
        images="images",
        layout="split",
        classes=37,
        counts=(2_944, 736, 3_669),
        halves=(1_881, 1_788),
        template="a photo of a {}, a type of pet.",
        licence="CC BY-SA 4.0",
        source=f"{HUB} oxford_pets.zip",
        split_file="split_zhou_OxfordPets.json",
        split_drive="1501r8Ber4nNKvmlFVQZ8SeUHTcdTTEqs",
        class_of=pets_class,
    ),
    "stanford_cars": FewShotSet(
        title="StanfordCars",
        folder="stanford_cars",
        images="",
        layout="split",
        classes=196,
        counts=(6_509, 1_635, 8_041),
        halves=(4_002, 4_039),
        template=_PLAIN,
        licence="none stated",
        source=f"{HUB} stanford_cars.zip",
        split_file="split_zhou_StanfordCars.json",
        split_drive="1ObCFbaAgVu0I-k_Au-gIUcefirdAuizT",
        mark="cars_train",
    ),
    "oxford_flowers": FewShotSet(
        title="OxfordFlowers (Flowers102)",
        folder="oxford_flowers",
        images="jpg",
        layout="split",
        classes=102,
        counts=(4_093, 1_633, 2_463),
        halves=(1_053, 1_410),
        template="a photo of a {}, a type of flower.",
        licence="none stated",
        source=f"{HUB} oxford_flowers.zip",
        split_file="split_zhou_OxfordFlowers.json",
        split_drive="1Pp0sRXzZFZq15zVOzKjKBu4A9i01nozT",
    ),
    "food101": FewShotSet(
        title="Food101",
        folder="food-101",
        images="images",
        layout="split",
        classes=101,
        counts=(50_500, 20_200, 30_300),
        halves=(15_300, 15_000),
        template="a photo of {}, a type of food.",
        licence="none stated",
        source=f"{HUB} food101.zip",
        split_file="split_zhou_Food101.json",
        split_drive="1QK0tGi096I0Ba6kggatX1ee6dJFIcEJl",
        class_of=_folder,
    ),
    "fgvc_aircraft": FewShotSet(
        title="FGVCAircraft",
        folder="fgvc_aircraft",
        images="images",
        layout="variants",
        classes=100,
        counts=(3_334, 3_333, 3_333),
        halves=(1_666, 1_667),
        template="a photo of a {}, a type of aircraft.",
        licence="non-commercial research",
        source=f"{HUB} fgvc_aircraft.zip",
        mark="variants.txt",
    ),
    "sun397": FewShotSet(
        title="SUN397",
        folder="sun397",
        images="SUN397",
        layout="split",
        classes=397,
        counts=(15_880, 3_970, 19_850),
        halves=(9_950, 9_900),
        template=_PLAIN,
        licence="none stated",
        source=f"{HUB} sun397.zip",
        split_file="split_zhou_SUN397.json",
        split_drive="1y2RD81BYuiyvebdN-JymPfyWYcd8_MUq",
        class_of=sun_class,
    ),
    "dtd": FewShotSet(
        title="DescribableTextures",
        folder="dtd",
        images="images",
        layout="split",
        classes=47,
        counts=(2_820, 1_128, 1_692),
        halves=(864, 828),
        template="{} texture.",
        licence="research",
        source=f"{HUB} dtd.zip",
        split_file="split_zhou_DescribableTextures.json",
        split_drive="1u3_QfB467jqHgNXC00UIzbLZRQCg2S7x",
        class_of=_folder,
    ),
    "eurosat": FewShotSet(
        title="EuroSAT",
        folder="eurosat",
        images="2750",
        layout="split",
        classes=10,
        counts=(13_500, 5_400, 8_100),
        halves=(4_200, 3_900),
        template="a centered satellite photo of {}.",
        licence="MIT",
        source=f"{HUB} eurosat.zip",
        split_file="split_zhou_EuroSAT.json",
        split_drive="1Ip7yaCWFi0eaOFUGga0lUdVi_DDQth1o",
        class_of=eurosat_class,
    ),
    "ucf101": FewShotSet(
        title="UCF101, middle frames",
        folder="ucf101",
        images="UCF-101-midframes",
        layout="split",
        classes=101,
        counts=(7_639, 1_898, 3_783),
        halves=(1_934, 1_849),
        template="a photo of a person doing {}.",
        licence="none stated",
        source=f"{HUB} ucf101.zip",
        split_file="split_zhou_UCF101.json",
        split_drive="1I0S0q91hJfsV9Gf4xDIjgDq4AqBNJb1y",
        class_of=ucf_class,
    ),
}
"""Counts: PromptKD's table e.1. Licences as their pages or copies of the data state them; check before you publish."""


# ---------------------------------------------------------------------------------------------------------- reading


def load(key: str, root: str) -> LabelledSet:
    """One of `SETS` with its splits `train`, `val` and `test`; numbers that differ from the published ones are logged.

    `root` is the folder that holds the sets' folders, or the set's own. Item keys are paths inside the set's folder.

    Raises:
        UserError: files are missing, belong to another set, or leave a class without training images.
    """
    described = SETS[key]
    if described.layout == "wnids":
        found = imagenet_sets.load_imagenet(root, name=key)
    else:
        folder = set_folder(key, root)
        read = _read_variants if described.layout == "variants" else _read_split
        names, splits = read(key, folder)
        _check_images(key, folder, splits)
        _check_classes(key, folder, names, splits["train"])
        found = LabelledSet(key, names, [described.template], splits)
    _compare_counts(described, found)
    return found


def set_folder(key: str, root: str) -> Path:
    """The folder of a set below the data root.

    Raises:
        UserError: it is not there.
    """
    described = SETS[key]
    marks = [mark for mark in (described.mark or described.images, described.split_file) if mark]
    return data_set_folder(root, [described.folder], marks, key, _mend(described))


def _mend(described: FewShotSet) -> str:
    return f"get it from {described.source} (CoOp's data folder layout)"


def _split_mend(key: str) -> str:
    described = SETS[key]
    return (
        f"get it from https://drive.google.com/uc?id={described.split_drive} or inside {described.source}; "
        f"`python data_tools/make_split.py --set {key} --root ROOT --seed 1` draws one whose numbers compare with nobody's"
    )


def _read_split(key: str, folder: Path) -> tuple[list[str], dict[str, list[Item]]]:
    """Class names and items from the split file."""
    described = SETS[key]
    path = folder / described.split_file
    if not path.is_file():
        raise UserError(f"data set {key}: split file {path} does not exist; {_split_mend(key)}")
    content = _read_json(path)
    if content.get("note"):
        log.warning("%s: %s", path, content["note"])
    names: dict[int, str] = {}
    splits: dict[str, list[Item]] = {}
    for split in SPLITS:
        entries = content.get(split)
        if not isinstance(entries, list):
            raise UserError(f"split file {path} has no list {split!r}; {_split_mend(key)}")
        splits[split] = [_split_item(path, described, folder, entry, names) for entry in entries]
    if sorted(names) != list(range(len(names))):
        gap = next(label for label in range(len(names) + 1) if label not in names)
        raise UserError(
            f"split file {path} has labels up to {max(names)} but no class {gap}; {_split_mend(key)}"
        )
    return [names[label].replace("_", " ") for label in range(len(names))], splits


def _read_json(path: Path) -> dict[str, Any]:
    return read_object(path, "split file", "fetch it again")


def _split_item(path: Path, described: FewShotSet, folder: Path, entry: Any, names: dict[int, str]) -> Item:
    """One `[relative path, label, class name]`; fills `names`."""
    whole = isinstance(entry, list) and [type(part) for part in entry] == [str, int, str]
    if not whole or entry[1] < 0:
        raise UserError(
            f"split file {path}: {str(entry)[:80]} is not [path, label, class name]; fetch it again"
        )
    relative, label, name = entry
    relative = relative.lstrip("/")
    if ".." in PurePosixPath(relative).parts:
        raise UserError(f"split file {path}: {relative} leaves the image folder; fetch the file again")
    if names.setdefault(label, name) != name:
        raise UserError(
            f"split file {path} calls class {label} both {names[label]!r} and {name!r}; fetch it again"
        )
    key = f"{described.images}/{relative}" if described.images else relative
    return Item(key, ImageRef(str(folder / key)), label)


def _read_variants(key: str, folder: Path) -> tuple[list[str], dict[str, list[Item]]]:
    """FGVC's lists: `variants.txt` names the classes, `images_variant_<split>.txt` has `id variant` a line."""
    variants = _lines(key, folder / "variants.txt")
    labels = {variant: label for label, variant in enumerate(variants)}
    splits: dict[str, list[Item]] = {}
    for split in SPLITS:
        path = folder / f"images_variant_{split}.txt"
        splits[split] = []
        for line in _lines(key, path):
            number, _, variant = line.partition(" ")
            if variant not in labels:
                raise UserError(
                    f"{path}: variant {variant!r} is not in {folder / 'variants.txt'}; {_mend(SETS[key])}"
                )
            name = f"{SETS[key].images}/{number}.jpg"
            splits[split].append(Item(name, ImageRef(str(folder / name)), labels[variant]))
    return [variant.replace("_", " ") for variant in variants], splits


def _lines(key: str, path: Path) -> list[str]:
    if not path.is_file():
        raise UserError(f"data set {key}: {path} does not exist; {_mend(SETS[key])}")
    return [line.strip() for line in read_text(path, f"data set {key}:").splitlines() if line.strip()]


# ----------------------------------------------------------------------------------------------------------- checks


def _check_images(key: str, folder: Path, splits: dict[str, list[Item]]) -> None:
    """Every listed image exists; more than half of them missing means another set's list or no images at all."""
    described = SETS[key]
    images = folder / described.images
    if not images.is_dir():
        raise UserError(f"data set {key}: image folder {images} does not exist; {_mend(described)}")
    items = [item for split in splits.values() for item in split]
    missing = missing_files(folder, [item.key for item in items])
    if not missing:
        return
    lists = described.split_file or "images_variant_*.txt"
    if 2 * len(missing) > len(items):
        raise UserError(
            f"{folder / lists} seems to be of another data set: {len(missing)} of its {len(items)} images are not below "
            f"{images}, first {missing[0]}; put the list of {described.title} there, or unpack the images"
        )
    raise UserError(
        f"data set {key}: {len(missing)} of {len(items)} images are missing, first {folder / missing[0]}; "
        f"unpack the images again ({_mend(described)})"
    )


def missing_files(folder: Path, keys: Sequence[str]) -> list[str]:
    """Those of the paths that do not exist; every folder is listed once, which is much faster than asking per file."""
    present: dict[str, set[str]] = defaultdict(set)
    for parent in {key.rpartition("/")[0] for key in keys}:
        if (folder / parent).is_dir():
            present[parent] = {entry.name for entry in os.scandir(folder / parent) if entry.is_file()}
    return [key for key in keys if key.rpartition("/")[2] not in present[key.rpartition("/")[0]]]


def _check_classes(key: str, folder: Path, names: list[str], train: list[Item]) -> None:
    """Class names are those of this set, and every class has training images."""
    described = SETS[key]
    path = folder / (described.split_file or "variants.txt")
    seen = {item.label for item in train}
    if absent := [name for label, name in enumerate(names) if label not in seen]:
        more = f" and {len(absent) - 1} more classes" if len(absent) > 1 else ""
        raise UserError(
            f"data set {key}: {path} gives no training image to class {absent[0]!r}{more}; fetch it again"
        )
    if described.class_of is not None:
        strip = f"{described.images}/"
        expected = {
            item.label: described.class_of(item.key.removeprefix(strip)).replace("_", " ") for item in train
        }
        wrong = [label for label, name in expected.items() if name.lower() != names[label].lower()]
    else:
        # The paths of Cars and Flowers say nothing of the class; Cars' names all begin with a year.
        wrong = [
            n for n, name in enumerate(names) if key == "stanford_cars" and not re.match(r"\d{4} ", name)
        ]
        expected = {label: "a name that begins with the year" for label in wrong}
    if 2 * len(wrong) > len(names):
        raise UserError(
            f"{path} has the class names of another data set: {len(wrong)} of {len(names)} do not fit, such as "
            f"{names[wrong[0]]!r} where {described.title} has {expected[wrong[0]]!r}; {_split_mend(key)}"
        )


def _compare_counts(described: FewShotSet, found: LabelledSet) -> None:
    """Log where a set has other numbers than the published split."""
    counts = [len(found.splits.get(split, [])) for split in SPLITS]
    if (len(found.class_names), *counts) != (described.classes, *described.counts):
        log.warning(
            "%s has %d classes and %s images (train/val/test); the published split has %d and %s: numbers do not compare",
            described.title,
            len(found.class_names),
            "/".join(map(str, counts)),
            described.classes,
            "/".join(map(str, described.counts)),
        )
        return
    base, novel = (set(half) for half in base_and_novel(found.splits["train"]))
    test = found.splits["test"]
    halves = tuple(sum(item.label in half for item in test) for half in (base, novel))
    if halves != described.halves:
        log.warning(
            "%s has %s test images of base and novel classes; the published split has %s",
            described.title,
            halves,
            described.halves,
        )
