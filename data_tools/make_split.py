"""Draw a split file for one of the few-shot sets when the published one cannot be had, or list the labelled share of a set.

    python data_tools/make_split.py --set dtd --root data --seed 1
    python data_tools/make_split.py --set imagenet --root data --percent 1 --out imagenet_1percent.txt

The first draws a split: proportions are those of the published splits (half/fifth/rest of each class, or the official test
images and a fifth of the official training images for validation), but which images go where is drawn from the seed: numbers on
such a split compare with each other and with no published ones, and the file says so. The second writes the images that DHO's
rule labels, which has no seed of its own (1 and 10 are its published lists), for `split.list_file`. A file that is there is
never overwritten.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from projects.dho.lists import LIST_MARK, digest_of, percent_list, read_list
from vlmkd.datasets.folders import class_folder_names, images_of_classes
from vlmkd.datasets.labelled_sets import items_of, load_set
from vlmkd.datasets.published_sets import SETS, missing_files, set_folder
from vlmkd.errors import UserError, at_least, run_tool
from vlmkd.files import read_object, read_text, write_text

Entry = tuple[str, int, str]
"""Path below the image folder, label, class name."""
TRAIN_SHARE, VAL_SHARE = 0.5, 0.2
"""Of each class, where the set has no official test images."""
VAL_OF_TRAIN = 0.2
"""Of each class's official training images."""


# ----------------------------------------------------------------------------------------------- what a set consists of


def class_folders(key: str, folder: Path) -> list[Entry]:
    """All images of Caltech101, DTD, EuroSAT or Food101, a class for each folder."""
    images = folder / SETS[key].images
    classes = [name for name in class_folder_names(images) if name not in SETS[key].dropped]
    return [
        (path, label, SETS[key].class_of(path))
        for label, paths in enumerate(images_of_classes(images, classes).values())
        for path in paths
    ]


def flowers(key: str, folder: Path) -> list[Entry]:
    """All images of Flowers102 from `imagelabels.mat` (labels from 1) and `cat_to_name.json`."""
    labels = _mat(key, folder / "imagelabels.mat")["labels"].ravel()
    names = read_object(
        folder / "cat_to_name.json", f"data set {key}:", f"it comes with the images ({SETS[key].source})"
    )
    return [
        (f"image_{number:05d}.jpg", int(label) - 1, names[str(label)])
        for number, label in enumerate(labels, start=1)
    ]


def pets(key: str, folder: Path) -> tuple[list[Entry], list[Entry]]:
    """Official training and test images from `annotations/{trainval,test}.txt`: `name label species breed` a line."""

    def read(name: str) -> list[Entry]:
        lines = [line.split() for line in _lines(key, folder / "annotations" / name)]
        return [
            (f"{stem}.jpg", int(label) - 1, SETS[key].class_of(f"{stem}.jpg")) for stem, label, *_ in lines
        ]

    return read("trainval.txt"), read("test.txt")


def cars(key: str, folder: Path) -> tuple[list[Entry], list[Entry]]:
    """Official training and test images from the devkit's annotations (labels from 1)."""
    devkit = folder / "devkit"
    names = [str(name.item()) for name in _mat(key, devkit / "cars_meta.mat")["class_names"].ravel()]

    def read(path: Path, images: str) -> list[Entry]:
        annotations = _mat(key, path)["annotations"].ravel()
        found = [(str(one["fname"].item()), int(one["class"].item()) - 1) for one in annotations]
        return [(f"{images}/{file}", label, cars_class(names[label])) for file, label in found]

    # The devkit has no labels of the test images; they came later, as a file of their own.
    labelled = [folder / "cars_test_annos_withlabels.mat", devkit / "cars_test_annos_withlabels.mat"]
    test = next((path for path in labelled if path.is_file()), labelled[0])
    return read(devkit / "cars_train_annos.mat", "cars_train"), read(test, "cars_test")


def cars_class(name: str) -> str:
    """`Audi TT Coupe 2012` -> `2012 Audi TT Coupe`: the year comes first."""
    model, _, year = name.rpartition(" ")
    return f"{year} {model}"


def sun(key: str, folder: Path) -> tuple[list[Entry], list[Entry]]:
    """Official first partition: `ClassName.txt` orders the classes, the lists have `/a/abbey/sun_x.jpg` a line."""
    label_of = {name.lstrip("/"): label for label, name in enumerate(_lines(key, folder / "ClassName.txt"))}

    def read(name: str) -> list[Entry]:
        paths = [line.lstrip("/") for line in _lines(key, folder / name)]
        return [(path, label_of[path.rpartition("/")[0]], SETS[key].class_of(path)) for path in paths]

    return read("Training_01.txt"), read("Testing_01.txt")


def ucf(key: str, folder: Path) -> tuple[list[Entry], list[Entry]]:
    """Official first partition of the videos, a frame for each: `Action/v_Action_g01_c01.avi` a line."""
    lists = folder / "ucfTrainTestlist"
    actions = [line.split() for line in _lines(key, lists / "classInd.txt")]
    label_of = {action: int(number) - 1 for number, action in actions}

    def read(name: str) -> list[Entry]:
        videos = [line.split()[0].split("/") for line in _lines(key, lists / name)]
        return [
            (f"{ucf_folder(action)}/{video.removesuffix('.avi')}.jpg", label_of[action], ucf_folder(action))
            for action, video in videos
        ]

    return read("trainlist01.txt"), read("testlist01.txt")


def ucf_folder(action: str) -> str:
    """`ApplyEyeMakeup` -> `Apply_Eye_Makeup`."""
    return "_".join(re.findall(r"[A-Z][^A-Z]*", action))


WHOLE: dict[str, Callable[[str, Path], list[Entry]]] = {
    "caltech101": class_folders,
    "dtd": class_folders,
    "eurosat": class_folders,
    "food101": class_folders,
    "oxford_flowers": flowers,
}
OFFICIAL: dict[str, Callable[[str, Path], tuple[list[Entry], list[Entry]]]] = {
    "oxford_pets": pets,
    "stanford_cars": cars,
    "sun397": sun,
    "ucf101": ucf,
}


def _text(key: str, path: Path) -> str:
    return read_text(path, f"data set {key}:", f"it comes with the images ({SETS[key].source})")


def _lines(key: str, path: Path) -> list[str]:
    return [line.strip() for line in _text(key, path).splitlines() if line.strip() and line[0] != "#"]


def _mat(key: str, path: Path):
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    if not path.is_file():
        raise UserError(
            f"data set {key}: {path} does not exist; it comes with the images ({SETS[key].source})"
        )
    try:
        return loadmat(str(path))
    except (MatReadError, ValueError) as error:
        raise UserError(f"{path} is not a MATLAB file ({error}); fetch it again") from None


# ------------------------------------------------------------------------------------------------------------ drawing


def _groups(entries: list[Entry]) -> list[list[Entry]]:
    """Images of each label, labels in ascending order, paths sorted."""
    groups: dict[int, list[Entry]] = {}
    for entry in sorted(entries):
        groups.setdefault(entry[1], []).append(entry)
    return [groups[label] for label in sorted(groups)]


def draw(entries: list[Entry], rng: random.Random) -> dict[str, list[Entry]]:
    """Half, a fifth and the rest of each class."""
    splits: dict[str, list[Entry]] = {"train": [], "val": [], "test": []}
    for group in _groups(entries):
        rng.shuffle(group)
        train, val = round(len(group) * TRAIN_SHARE), round(len(group) * VAL_SHARE)
        if train < 1 or val < 1 or train + val >= len(group):
            raise UserError(
                f"class {group[0][2]!r} has {len(group)} images, too few for three splits; add images"
            )
        splits["train"] += group[:train]
        splits["val"] += group[train : train + val]
        splits["test"] += group[train + val :]
    return splits


def hold_out(train: list[Entry], test: list[Entry], rng: random.Random) -> dict[str, list[Entry]]:
    """The official test images, and a fifth of each class's training images for validation."""
    splits: dict[str, list[Entry]] = {"train": [], "val": [], "test": test}
    for group in _groups(train):
        rng.shuffle(group)
        val = round(len(group) * VAL_OF_TRAIN)
        if val < 1 or val == len(group):
            raise UserError(
                f"class {group[0][2]!r} has {len(group)} training images, too few to hold some out; add images"
            )
        splits["val"] += group[:val]
        splits["train"] += group[val:]
    return splits


def make(key: str, root: str, seed: int) -> Path:
    """Write the split file of a set and return its path.

    Raises:
        UserError: a set without a split file, one that exists already, or lists or images that are missing.
    """
    if key not in WHOLE and key not in OFFICIAL:
        known = ", ".join(sorted({**WHOLE, **OFFICIAL}))
        raise UserError(f"set {key!r} has no split file to draw; sets that have one: {known}")
    folder = set_folder(key, root)
    path = folder / SETS[key].split_file
    if path.exists():
        raise UserError(f"{path} exists; it is not overwritten")
    rng = random.Random(seed)
    splits = (
        draw(WHOLE[key](key, folder), rng) if key in WHOLE else hold_out(*OFFICIAL[key](key, folder), rng)
    )
    prefix = f"{SETS[key].images}/" if SETS[key].images else ""
    every = [f"{prefix}{entry[0]}" for entries in splits.values() for entry in entries]
    if missing := missing_files(folder, every):
        raise UserError(
            f"data set {key}: {len(missing)} of {len(every)} images are missing, first {folder / missing[0]}"
        )
    note = f"drawn by vlmkd's make_split with seed {seed}, not the published split: numbers compare with no published ones"
    write_text(path, json.dumps({"note": note, **splits}), "split file")
    return path


def write_list(path: Path, names: list[str], percent: float) -> None:
    """Write the list of a share as text under its digest; an existing file with the same list is left as it is.

    Raises:
        UserError: the file exists with other images.
    """
    if path.exists():
        if read_list(path, "cascade") == names:
            return
        raise UserError(f"{path} exists and lists other images; delete it or name another file")
    head = [
        f"{LIST_MARK}, percent {percent:g}, {len(names)} images",
        f"# sha256 {digest_of(names)}",
    ]
    write_text(path, "\n".join([*head, *names]) + "\n", "image list")


def main(argv: list[str]) -> int:
    """Run the tool; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", required=True, help="name of the set, such as dtd")
    parser.add_argument("--root", default="", help="folder that holds the sets, or the set's own folder")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--seed", type=at_least(0), help="draw a split file; what the draw depends on")
    what.add_argument("--percent", type=float, help="list this share of the training images, in per cent")
    parser.add_argument("--out", type=Path, help="file of the list (with --percent)")
    options = parser.parse_args(argv)
    if (options.percent is None) != (options.out is None):
        raise UserError("--out goes with --percent, and --percent with --out: the file of the list")
    if options.percent is not None:
        if not 0 < options.percent <= 100:
            raise UserError(f"--percent is {options.percent:g}; it is above 0 and at most 100")
        listed = percent_list(items_of(load_set(options.set, options.root), "train"), options.percent)
        write_list(options.out, listed, options.percent)
        print(f"{options.out}: {len(listed)} images, sha256 {digest_of(listed)}")
        return 0
    path = make(options.set, options.root, options.seed)
    content = read_object(path, "split file")
    counts = ", ".join(f"{split} {len(content[split])}" for split in ("train", "val", "test"))
    print(f"{path}: {counts}; {content['note']}")
    return 0


if __name__ == "__main__":
    run_tool(main)
