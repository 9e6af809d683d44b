"""Sets of several domains with the same classes, `<domain>/<class>/*`: DomainBed's five and a user's own.

Splits follow from the order of the images, so that the order is part of the format: domains sorted, classes sorted by
ASCII, paths sorted inside the class (VL2V-ADiP e). Every set has the one split `all`; `splits.split_domains` cuts it.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from vlmkd.data.images import ImageRef
from vlmkd.data.labelled import Item, LabelledSet
from vlmkd.datasets.folders import class_folder_names, data_set_folder, images_of_classes
from vlmkd.errors import UserError

log = logging.getLogger(__name__)

ALL = "all"
"""The split that holds every image."""
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Lower-case endings of files that count, torchvision's list: another one would move the splits."""
TEMPLATES = ["a photo of a {}"]
"""VL2V-ADiP's prompt, without a full stop."""

_OFFICE_HOME = (
    "Alarm_Clock Backpack Batteries Bed Bike Bottle Bucket Calculator Calendar Candles Chair Clipboards Computer Couch "
    "Curtains Desk_Lamp Drill Eraser Exit_Sign Fan File_Cabinet Flipflops Flowers Folder Fork Glasses Hammer Helmet "
    "Kettle Keyboard Knives Lamp_Shade Laptop Marker Monitor Mop Mouse Mug Notebook Oven Pan Paper_Clip Pen Pencil "
    "Postit_Notes Printer Push_Pin Radio Refrigerator Ruler Scissors Screwdriver Shelf Sink Sneakers Soda Speaker Spoon "
    "TV Table Telephone ToothBrush Toys Trash_Can Webcam"
)


@dataclass(frozen=True)
class DomainSet:
    """Where a set lies below the data root, and what is known of it."""

    title: str
    folder: str
    domains: tuple[str, ...]
    """In index order."""
    builds: dict[str, tuple[int, ...]]
    """Images of each domain, by the name of the build; published numbers belong to one of them."""
    num_classes: int
    licence: str
    source: str
    classes: tuple[str, ...] = field(default=())
    """Class folders in index order; empty where the list is too long to state."""


_DOMAINBED = "DomainBed's download script (https://github.com/facebookresearch/DomainBed, `domainbed.scripts.download`)"
SETS: dict[str, DomainSet] = {
    "pacs": DomainSet(
        title="PACS",
        folder="PACS",
        domains=("art_painting", "cartoon", "photo", "sketch"),
        builds={"9,991 images": (2048, 2344, 1670, 3929)},
        num_classes=7,
        classes=("dog", "elephant", "giraffe", "guitar", "horse", "house", "person"),
        licence="none stated",
        source=_DOMAINBED,
    ),
    "vlcs": DomainSet(
        title="VLCS",
        folder="VLCS",
        domains=("Caltech101", "LabelMe", "SUN09", "VOC2007"),
        builds={"10,729 images": (1415, 2656, 3282, 3376)},
        num_classes=5,
        classes=("bird", "car", "chair", "dog", "person"),
        licence="none stated",
        source=f"{_DOMAINBED}; rebuilt from the original sources its files get random names and other splits",
    ),
    "office_home": DomainSet(
        title="OfficeHome",
        folder="office_home",
        domains=("Art", "Clipart", "Product", "Real World"),
        builds={"15,588 images": (2427, 4365, 4439, 4357)},
        num_classes=65,
        classes=tuple(_OFFICE_HOME.split()),
        licence="non-commercial research",
        source=_DOMAINBED,
    ),
    "terra_incognita": DomainSet(
        title="TerraIncognita",
        folder="terra_incognita",
        domains=("location_100", "location_38", "location_43", "location_46"),
        builds={
            "24,788 images (DomainBed, SWAD, MIRO)": (4879, 9767, 4020, 6122),
            "24,330 images (later download)": (4741, 9736, 3970, 5883),
        },
        num_classes=10,
        classes=(
            "bird",
            "bobcat",
            "cat",
            "coyote",
            "dog",
            "empty",
            "opossum",
            "rabbit",
            "raccoon",
            "squirrel",
        ),
        licence="CDLA-Permissive (Caltech Camera Traps)",
        source=_DOMAINBED,
    ),
    "domain_net": DomainSet(
        title="DomainNet",
        folder="domain_net",
        domains=("clipart", "infograph", "painting", "quickdraw", "real", "sketch"),
        builds={"586,575 images": (48_129, 51_605, 72_266, 172_500, 172_947, 69_128)},
        num_classes=345,
        licence="non-commercial research",
        source=f"{_DOMAINBED}, which also removes the 9,431 listed duplicates",
    ),
}


def load(key: str, root: str) -> LabelledSet:
    """One of `SETS`; other image counts than the published ones are logged.

    `root` is the folder that holds the sets' folders, or the set's own.

    Raises:
        UserError: the set is not there, or it has other domains or classes than the published one.
    """
    described = SETS[key]
    source = f"get it with {described.source}"
    folder = data_set_folder(root, [described.folder], described.domains, key, source)
    found = read_domains(folder, name=key)
    own = f"load it as domains:{folder} if it is your own set"
    if found.domains != list(described.domains):
        raise UserError(
            f"{folder} has the domains {', '.join(found.domains)}, but {described.title} has "
            f"{', '.join(described.domains)}: complete it, or move other folders away; {own}"
        )
    classes = [name.replace("_", " ") for name in described.classes]
    if classes and found.class_names != classes:
        other = sorted(set(found.class_names) ^ set(classes))
        raise UserError(
            f"{folder} has not the classes of {described.title}, see {', '.join(other[:3])}; {own}"
        )
    if len(found.class_names) != described.num_classes:
        log.warning(
            "%s has %d classes; %s has %d: numbers do not compare",
            folder,
            len(found.class_names),
            described.title,
            described.num_classes,
        )
    build = build_of(key, found)
    if build:
        log.info("%s: the build of %s", described.title, build)
    else:
        log.warning(
            "%s has %s images a domain; the published builds are %s: splits and numbers do not compare",
            folder,
            "/".join(map(str, _counts(found))),
            "; ".join(f"{name} {counts}" for name, counts in described.builds.items()),
        )
    return found


def build_of(key: str, labelled: LabelledSet) -> str:
    """Name of the published build that has these image counts (TerraIncognita has two), or an empty string."""
    counts = _counts(labelled)
    return next((name for name, build in SETS[key].builds.items() if build == counts), "")


def _counts(labelled: LabelledSet) -> tuple[int, ...]:
    images = Counter(item.domain for item in labelled.splits[ALL])
    return tuple(images[domain] for domain in range(len(labelled.domains)))


def read_domains(folder: Path, *, name: str) -> LabelledSet:
    """Any tree `<domain>/<class>/*`; class names are the folders' with spaces for underscores.

    Raises:
        UserError: fewer than two domains, domains with different classes, or an empty class.
    """
    domains = class_folder_names(folder)
    if len(domains) < 2:
        raise UserError(
            f"{folder} has {len(domains)} domain folders; it needs two or more, each with one folder per class"
        )
    classes = class_folder_names(folder / domains[0])
    if len(classes) < 2:
        raise UserError(
            f"{folder / domains[0]} holds {len(classes)} class folders; a domain needs at least two"
        )
    items = []
    for index, domain in enumerate(domains):
        place = folder / domain
        if differing := sorted(set(classes) ^ set(class_folder_names(place))):
            raise UserError(
                f"domains {domains[0]} and {domain} of {folder} have different classes, such as {differing[0]!r}; "
                "every domain needs the same class folders"
            )
        for label, images in enumerate(images_of_classes(place, classes, SUFFIXES)):
            items += [Item(f"{domain}/{path}", ImageRef(str(place / path)), label, index) for path in images]
    names = [label.replace("_", " ") for label in classes]
    return LabelledSet(name, names, list(TEMPLATES), {ALL: items}, domains)
