"""Labelled sets read from small trees in the true layouts, and the errors that name what is wrong."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from projects.dho import lists
from vlmkd.data.labelled import UNLABELLED, LabelledSet
from vlmkd.datasets.labelled_sets import items_of, known_sets, load_set
from vlmkd.datasets.published_sets import SETS
from vlmkd.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
FEW_SHOT = {key: described for key, described in SETS.items() if described.halves}
WITH_DOMAINS = {key: described for key, described in SETS.items() if described.domains}


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def keys(found: LabelledSet, split: str) -> list[str]:
    return [item.key for item in found.splits[split]]


def labels(found: LabelledSet, split: str) -> list[int]:
    return [item.label for item in found.splits[split]]


# --------------------------------------------------------------------------------------------------- few-shot sets

EXAMPLES = {
    "caltech101": [("airplanes/image_1.jpg", "airplane"), ("wild_cat/image_1.jpg", "wild_cat")],
    "oxford_pets": [("Abyssinian_1.jpg", "abyssinian"), ("Great_Dane_7.jpg", "great_dane")],
    "stanford_cars": [("cars_train/1.jpg", "2012 Audi TT Coupe"), ("cars_test/2.jpg", "1998 Eagle Talon")],
    "oxford_flowers": [("image_00001.jpg", "pink primrose"), ("image_00002.jpg", "canna lily")],
    "food101": [("apple_pie/1.jpg", "apple_pie"), ("tacos/2.jpg", "tacos")],
    "sun397": [("a/abbey/sun_a.jpg", "abbey"), ("c/church/outdoor/sun_b.jpg", "outdoor church")],
    "dtd": [("banded/banded_1.jpg", "banded"), ("dotted/dotted_1.jpg", "dotted")],
    "eurosat": [("AnnualCrop/AnnualCrop_1.jpg", "Annual Crop Land"), ("River/River_1.jpg", "River")],
    "ucf101": [("Apply_Eye_Makeup/v_1.jpg", "Apply_Eye_Makeup"), ("Yo_Yo/v_2.jpg", "Yo_Yo")],
}


def write_split_set(root: Path, key: str, split: dict | None = None, images_of: str = "") -> Path:
    """A set of two classes with the same two images in train, val and test."""
    described = SETS[key]
    folder = root / described.folders[0]
    touch(folder / described.images, *(path for path, _ in EXAMPLES[images_of or key]))
    entries = [[path, label, name] for label, (path, name) in enumerate(EXAMPLES[key])]
    split = split or {"train": entries, "val": entries[:1], "test": entries[::-1]}
    (folder / described.split_file).write_text(json.dumps(split))
    return folder


@pytest.mark.parametrize("key", EXAMPLES)
def test_split_files_are_read_and_names_become_words(key: str, tmp_path: Path) -> None:
    folder = write_split_set(tmp_path, key)
    found = load_set(key, str(tmp_path))
    assert found.class_names == [name.replace("_", " ") for _, name in EXAMPLES[key]]
    assert found.templates == [SETS[key].template]
    assert (
        labels(found, "train") == [0, 1] and labels(found, "val") == [0] and labels(found, "test") == [1, 0]
    )
    prefix = f"{SETS[key].images}/" if SETS[key].images else ""
    assert keys(found, "train") == [prefix + path for path, _ in EXAMPLES[key]]
    assert found.splits["train"][0].image.read() == b"x"
    assert load_set(key, str(folder)) == found  # the set's own folder is as good a root


def test_fgvc_reads_the_official_lists(tmp_path: Path) -> None:
    folder = tmp_path / "fgvc_aircraft"
    touch(folder, *(f"images/{number}.jpg" for number in ("0001", "0002", "0003")))
    (folder / "variants.txt").write_text("707-320\nBoeing 717\n")
    (folder / "images_variant_train.txt").write_text("0001 707-320\n0002 Boeing 717\n")
    (folder / "images_variant_val.txt").write_text("0003 Boeing 717\n")
    (folder / "images_variant_test.txt").write_text("0003 Boeing 717\n")
    found = load_set("fgvc_aircraft", str(tmp_path))
    assert found.class_names == ["707-320", "Boeing 717"] and labels(found, "train") == [0, 1]
    assert keys(found, "val") == ["images/0003.jpg"]
    (folder / "images_variant_val.txt").write_text("0003 Concorde\n")
    with pytest.raises(UserError, match="variant 'Concorde' is not in"):
        load_set("fgvc_aircraft", str(tmp_path))


def test_counts_are_compared_and_the_published_numbers_add_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for described in FEW_SHOT.values():
        assert sum(described.halves) == described.builds["published"][2]
    write_split_set(tmp_path, "eurosat")
    load_set("eurosat", str(tmp_path))
    assert "numbers do not compare" in caplog.text
    caplog.clear()
    small = dataclasses.replace(
        SETS["eurosat"], num_classes=2, builds={"published": [2, 1, 2]}, halves=[1, 1]
    )
    monkeypatch.setitem(SETS, "eurosat", small)
    load_set("eurosat", str(tmp_path))
    assert not caplog.records
    monkeypatch.setitem(SETS, "eurosat", dataclasses.replace(small, halves=[2, 0]))
    load_set("eurosat", str(tmp_path))
    assert "[1, 1] test images of base and novel" in caplog.text


def test_missing_split_file_says_where_it_is(tmp_path: Path) -> None:
    (write_split_set(tmp_path, "dtd") / SETS["dtd"].split_file).unlink()
    with pytest.raises(
        UserError, match="DescribableTextures.json does not exist.*drive.google.com.*make_split.py"
    ):
        load_set("dtd", str(tmp_path))
    with pytest.raises(UserError, match="food-101 does not exist.*food101.zip"):
        load_set("food101", str(tmp_path))
    with pytest.raises(UserError, match="data set dtd is read from disk: give its root"):
        load_set("dtd")
    with pytest.raises(UserError, match="root /nowhere does not exist"):
        load_set("dtd", "/nowhere")


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    folder = write_split_set(tmp_path, "dtd")
    entries = [[path, label, name] for label, (path, name) in enumerate(EXAMPLES["dtd"])]
    lost = ["banded/lost.jpg", 0, "banded"]
    (folder / SETS["dtd"].split_file).write_text(
        json.dumps({"train": [*entries, lost], "val": entries, "test": entries})
    )
    with pytest.raises(UserError, match="1 of 7 images are missing, first .*dtd/images/banded/lost.jpg"):
        load_set("dtd", str(tmp_path))


def test_the_split_file_of_another_set_is_recognised(tmp_path: Path) -> None:
    write_split_set(tmp_path, "food101", images_of="dtd")  # names Food's paths, but the images are DTD's
    with pytest.raises(UserError, match="seems to be of another data set: 5 of its 5 images"):
        load_set("food101", str(tmp_path))
    entries = [["banded/banded_1.jpg", 0, "tacos"], ["dotted/dotted_1.jpg", 1, "waffles"]]
    write_split_set(tmp_path, "dtd", {"train": entries, "val": [], "test": entries})
    with pytest.raises(UserError, match="2 class names of another data set.*'tacos' where .* has 'banded'"):
        load_set("dtd", str(tmp_path))


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([["banded/banded_1.jpg", 0, "banded"]], "no training image to class 'dotted'"),
        ([["banded/banded_1.jpg", 0, "a"], ["banded/banded_1.jpg", 0, "b"]], "class 0 both 'a' and 'b'"),
        ([["banded/banded_1.jpg", 3, "a"]], "no image of class 0"),
        ([["../x.jpg", 0, "a"]], "leaves the image folder"),
        ([["x.jpg", "0", "a"]], r"is not \[path, label, name\]"),
        ("nothing", "has no list 'train'"),
    ],
)
def test_damaged_split_files(tmp_path: Path, train: object, message: str) -> None:
    test = [["dotted/dotted_1.jpg", 1, "dotted"]]
    write_split_set(tmp_path, "dtd", {"train": train, "val": [], "test": test if "dotted" in message else []})
    with pytest.raises(UserError, match=message):
        load_set("dtd", str(tmp_path))
    (tmp_path / "dtd" / SETS["dtd"].split_file).write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_set("dtd", str(tmp_path))


# -------------------------------------------------------------------------------------------------------- make_split


def make_split():
    spec = importlib.util.spec_from_file_location("make_split", ROOT / "data_tools" / "make_split.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_make_split_by_class_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys) -> None:
    images = [f"{name}/{n:02d}.jpg" for name in ("airplanes", "Faces", "Faces_easy") for n in range(10)]
    touch(tmp_path / "caltech-101/101_ObjectCategories", *images)
    command = ["--set", "caltech101", "--root", str(tmp_path), "--seed", "4"]
    assert make_split().main(command) == 0
    assert "train 10, val 4, test 6" in capsys.readouterr().out
    found = load_set("caltech101", str(tmp_path))
    assert "compare with no published ones" in caplog.text
    assert found.class_names == ["face", "airplane"]
    every = [key for split in found.splits for key in keys(found, split)]
    assert len(every) == len(set(every)) == 20
    path = tmp_path / "caltech-101" / SETS["caltech101"].split_file
    first = path.read_bytes()
    with pytest.raises(UserError, match="exists; it is not overwritten"):
        make_split().main(command)
    path.unlink()
    make_split().main(command)
    assert path.read_bytes() == first
    with pytest.raises(UserError, match="'imagenet' has no split file to draw"):
        make_split().main(["--set", "imagenet", "--root", str(tmp_path), "--seed", "1"])


def test_make_split_lists_a_share_that_a_run_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    touch(tmp_path / "images", *(f"{name}/{n:02d}.jpg" for name in ("ant", "bee") for n in range(40)))
    out = tmp_path / "ten.txt"
    command = ["--set", f"folder:{tmp_path / 'images'}", "--percent", "10", "--out", str(out)]
    assert make_split().main(command) == 0 == make_split().main(command)  # the same list again is no mistake
    train = load_set(f"folder:{tmp_path / 'images'}").splits["train"]
    listed = lists.pick_listed(train, lists.read_list(out, "cascade"), "cascade")
    wanted = lists.percent_list(train, 10)
    assert [item.key for item in listed] == wanted
    assert lists.digest_of(wanted) in capsys.readouterr().out
    with pytest.raises(UserError, match="exists and lists other images"):
        make_split().main([*command, "--percent", "20"])
    with pytest.raises(UserError, match="--out goes with --percent"):
        make_split().main(command[:4])


def check_official(tmp_path: Path, key: str, names: list[str]) -> None:
    """Five training images a class become four and one; the test images stay the official ones."""
    make_split().make(key, str(tmp_path), 1)
    found = load_set(key, str(tmp_path))
    assert found.class_names == names
    assert [len(found.splits[split]) for split in ("train", "val", "test")] == [8, 2, 2]
    assert sorted(labels(found, "val")) == [0, 1] and labels(found, "test") == [0, 1]


def test_make_split_of_pets(tmp_path: Path) -> None:
    folder = tmp_path / "oxford_pets"
    stems = [f"{breed}_{n}" for breed in ("Abyssinian", "Great_Dane") for n in range(6)]
    touch(folder / "images", *(f"{stem}.jpg" for stem in stems))
    lines = [f"{stem} {1 + stem.startswith('G')} 1 1" for stem in stems]
    touch(folder, "annotations/x")
    (folder / "annotations/trainval.txt").write_text("\n".join(line for line in lines if "_5 " not in line))
    (folder / "annotations/test.txt").write_text(
        "# header\n" + "\n".join(line for line in lines if "_5 " in line)
    )
    check_official(tmp_path, "oxford_pets", ["abyssinian", "great dane"])


def test_make_split_of_sun(tmp_path: Path) -> None:
    folder = tmp_path / "sun397"
    paths = [f"/{name}/sun_{n}.jpg" for name in ("a/abbey", "c/church/outdoor") for n in range(6)]
    touch(folder / "SUN397", *(path[1:] for path in paths))
    (folder / "ClassName.txt").write_text("/a/abbey\n/c/church/outdoor\n")
    (folder / "Training_01.txt").write_text("\n".join(path for path in paths if "_5" not in path))
    (folder / "Testing_01.txt").write_text("\n".join(path for path in paths if "_5" in path))
    check_official(tmp_path, "sun397", ["abbey", "outdoor church"])


def test_make_split_of_ucf(tmp_path: Path) -> None:
    folder = tmp_path / "ucf101"
    videos = [f"{action}/v_{action}_g{n:02d}_c01" for action in ("ApplyEyeMakeup", "YoYo") for n in range(6)]
    frames = [
        video.replace("ApplyEyeMakeup/", "Apply_Eye_Makeup/").replace("YoYo/", "Yo_Yo/") for video in videos
    ]
    touch(folder / "UCF-101-midframes", *(f"{frame}.jpg" for frame in frames))
    touch(folder, "ucfTrainTestlist/x")
    (folder / "ucfTrainTestlist/classInd.txt").write_text("1 ApplyEyeMakeup\n2 YoYo\n")
    train = [f"{video}.avi {1 + video.startswith('Y')}" for video in videos if "_g05" not in video]
    (folder / "ucfTrainTestlist/trainlist01.txt").write_text("\n".join(train))
    (folder / "ucfTrainTestlist/testlist01.txt").write_text(
        "\n".join(f"{v}.avi" for v in videos if "_g05" in v)
    )
    check_official(tmp_path, "ucf101", ["Apply Eye Makeup", "Yo Yo"])


def test_make_split_of_cars_and_flowers(tmp_path: Path) -> None:
    scipy_io = pytest.importorskip("scipy.io")
    folder = tmp_path / "stanford_cars"
    touch(
        folder, *(f"cars_train/{n}.jpg" for n in range(10)), "cars_test/0.jpg", "cars_test/1.jpg", "devkit/x"
    )
    names = np.array(["Audi TT Coupe 2012", "Eagle Talon Hatchback 1998"], dtype=object).reshape(1, 2)

    def annotations(count: int, first_class: int) -> np.ndarray:
        rows = np.zeros((1, count), dtype=[("class", object), ("fname", object)])
        for n in range(count):
            rows[0, n] = (1 if n < first_class else 2, f"{n}.jpg")
        return rows

    scipy_io.savemat(folder / "devkit/cars_meta.mat", {"class_names": names})
    scipy_io.savemat(folder / "devkit/cars_train_annos.mat", {"annotations": annotations(10, 5)})
    scipy_io.savemat(folder / "cars_test_annos_withlabels.mat", {"annotations": annotations(2, 1)})
    check_official(tmp_path, "stanford_cars", ["2012 Audi TT Coupe", "1998 Eagle Talon Hatchback"])

    folder = tmp_path / "oxford_flowers"
    touch(folder / "jpg", *(f"image_{n:05d}.jpg" for n in range(1, 21)))
    scipy_io.savemat(folder / "imagelabels.mat", {"labels": np.array([[1, 2] * 10], dtype=np.uint8)})
    (folder / "cat_to_name.json").write_text(json.dumps({"1": "pink primrose", "2": "canna lily"}))
    make_split().make("oxford_flowers", str(tmp_path), 1)
    found = load_set("oxford_flowers", str(tmp_path))
    assert found.class_names == ["pink primrose", "canna lily"]
    assert [len(found.splits[split]) for split in ("train", "val", "test")] == [10, 4, 6]
    assert all(int(item.key[-9:-4]) % 2 == 1 - item.label for item in found.splits["train"])


# ---------------------------------------------------------------------------------------------------------- ImageNet

TENCH, GOLDFISH, SHARK = "n01440764", "n01443537", "n01484850"


@pytest.mark.parametrize("base", ["imagenet/images", "imagenet"])
def test_imagenet_in_both_layouts(base: str, tmp_path: Path) -> None:
    touch(tmp_path / base, *(f"{s}/{w}/{w}_1.JPEG" for s in ("train", "val") for w in (GOLDFISH, TENCH)))
    found = load_set("imagenet", str(tmp_path))
    assert found.class_names == ["tench", "goldfish"] and found.templates == ["a photo of a {}."]
    assert keys(found, "train") == [f"train/{w}/{w}_1.JPEG" for w in (TENCH, GOLDFISH)]
    assert keys(found, "test")[1] == f"val/{GOLDFISH}/{GOLDFISH}_1.JPEG" and labels(found, "test") == [0, 1]
    (tmp_path / "imagenet/classnames.txt").write_text(f"{TENCH} my fish\n{GOLDFISH} gold fish\n")
    assert load_set("imagenet", str(tmp_path)).class_names == ["my fish", "gold fish"]
    touch(tmp_path / base, f"val/{SHARK}/x.JPEG")
    with pytest.raises(UserError, match=f"different classes, such as {SHARK}"):
        load_set("imagenet", str(tmp_path))
    touch(tmp_path / base, "val/cats/x.JPEG")
    with pytest.raises(UserError, match="cats is not a wnid"):
        load_set("imagenet", str(tmp_path))


def test_imagenet_for_evaluation_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, f"imagenet/val/{TENCH}/1.JPEG")
    found = load_set("imagenet", str(tmp_path))
    assert list(found.splits) == ["test"] and "no train split" in caplog.text
    with pytest.raises(UserError, match="no split 'train'; it has test"):
        items_of(found, "train")
    assert items_of(found, "test") == found.splits["test"]


def test_variants_number_their_own_wnids(tmp_path: Path) -> None:
    folder = tmp_path / "imagenet-adversarial/imagenet-a"
    touch(folder, "README.txt", f"{SHARK}/a.jpg", f"{GOLDFISH}/b.jpg")
    found = load_set("imagenet-a", str(tmp_path))
    assert found.class_names == ["goldfish", "great white shark"] and labels(found, "test") == [0, 1]
    assert load_set("imagenet-a", str(folder)) == found
    touch(tmp_path / "imagenet-rendition/imagenet-r", f"{TENCH}/a.jpg")
    assert load_set("imagenet-r", str(tmp_path)).class_names == ["tench"]
    touch(tmp_path / "imagenet-sketch/images", f"{GOLDFISH}/a.JPEG")
    assert keys(load_set("imagenet-sketch", str(tmp_path)), "test") == [f"{GOLDFISH}/a.JPEG"]


def test_v2_folders_are_class_numbers(tmp_path: Path) -> None:
    folder = tmp_path / "imagenetv2/imagenetv2-matched-frequency-format-val"
    touch(folder, "0/a.jpeg", "2/b.jpeg", "10/c.jpeg")
    found = load_set("imagenetv2", str(tmp_path))
    assert labels(found, "test") == [0, 2, 10] and len(found.class_names) == 1000
    assert found.class_names[2] == "great white shark"
    (tmp_path / "imagenetv2/classnames.txt").write_text(f"{TENCH} tench\n{GOLDFISH} goldfish\n")
    with pytest.raises(UserError, match="10 has no class name: .*classnames.txt has 2"):
        load_set("imagenetv2", str(tmp_path))


# ----------------------------------------------------------------------------------------------------------- domains


def write_domains(root: Path, key: str, count: int = 1) -> Path:
    described = SETS[key]
    names = described.classes or ("a", "b")
    folder = root / described.folders[0]
    touch(folder, *(f"{d}/{c}/{n}.jpg" for d in described.domains for c in names for n in range(count)))
    return folder


@pytest.mark.parametrize("key", WITH_DOMAINS)
def test_domain_sets(key: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_domains(tmp_path, key)
    found = load_set(key, str(tmp_path))
    described = SETS[key]
    assert found.domains == list(described.domains) and list(found.splits) == ["all"]
    assert [item.domain for item in found.splits["all"]] == sorted(
        item.domain for item in found.splits["all"]
    )
    assert found.templates == ["a photo of a {}"] and "splits and numbers do not compare" in caplog.text
    if described.classes:
        assert len(found.class_names) == described.num_classes
        assert not any("_" in name for name in found.class_names)


def test_office_home_order_is_ascii() -> None:
    classes = SETS["office_home"].classes
    assert len(classes) == 65 and list(classes) == sorted(classes)
    assert classes.index("TV") < classes.index("Table") < classes.index("ToothBrush")


def test_published_counts() -> None:
    totals = {key: [sum(build) for build in s.builds.values()] for key, s in WITH_DOMAINS.items()}
    assert totals == {
        "pacs": [9_991],
        "vlcs": [10_729],
        "office_home": [15_588],
        "terra_incognita": [24_788, 24_330],
        "domain_net": [586_575],
    }


def test_terra_builds_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    write_domains(tmp_path, "terra_incognita", count=2)
    small = dataclasses.replace(SETS["terra_incognita"], builds={"old": [9] * 4, "new": [20] * 4})
    monkeypatch.setitem(SETS, "terra_incognita", small)
    caplog.set_level(logging.INFO)
    load_set("terra_incognita", str(tmp_path))
    assert "the build of new" in caplog.text


def test_files_are_sorted_as_text_and_only_torchvisions_suffixes_count(tmp_path: Path) -> None:
    touch(tmp_path / "set", *(f"{d}/{c}/x.png" for d in "AB" for c in ("TV", "Table")))
    touch(tmp_path / "set/A/TV", "10.jpg", "2.JPG", "1.gif", ".hidden.jpg", "a.ppm")
    found = load_set(f"domains:{tmp_path / 'set'}")
    assert keys(found, "all")[:4] == ["A/TV/10.jpg", "A/TV/2.JPG", "A/TV/a.ppm", "A/TV/x.png"]
    assert found.class_names == ["TV", "Table"] and found.name == "set"


def test_domain_errors(tmp_path: Path) -> None:
    folder = write_domains(tmp_path, "pacs")
    touch(folder, "zoo/dog/1.jpg")
    with pytest.raises(
        UserError, match="cartoon|art_painting and zoo of .* different classes, such as 'elephant'"
    ):
        load_set("pacs", str(tmp_path))
    touch(folder, *(f"zoo/{name}/1.jpg" for name in SETS["pacs"].classes))
    with pytest.raises(UserError, match="PACS has art_painting, cartoon, photo, sketch; .*domains:"):
        load_set("pacs", str(tmp_path))
    touch(
        tmp_path / "VLCS",
        *(f"{d}/{c}/1.jpg" for d in SETS["vlcs"].domains for c in ("cat", "dog")),
    )
    with pytest.raises(UserError, match="not the classes of VLCS, see bird, car, cat"):
        load_set("vlcs", str(tmp_path))
    touch(tmp_path / "one", "A/x/1.jpg")
    with pytest.raises(UserError, match="1 domain folders"):
        load_set(f"domains:{tmp_path / 'one'}")
    touch(tmp_path / "two", "A/x/1.jpg", "A/y/1.jpg", "B/x/1.jpg", "B/y/note.txt")
    with pytest.raises(UserError, match="B/y .*holds no image"):
        load_set(f"domains:{tmp_path / 'two'}")


# ------------------------------------------------------------------------------------------------- names and folders


def test_unknown_names_suggest_the_nearest() -> None:
    for given, meant in [
        ("fgvc", "fgvc_aircraft"),
        ("OfficeHome", "office_home"),
        ("caltech-101", "caltech101"),
    ]:
        with pytest.raises(UserError, match=re.escape(f"did you mean {meant}?")):
            load_set(given)
    with pytest.raises(UserError, match="unknown data set 'qqq'; it is one of imagenet, caltech101"):
        load_set("qqq")
    with pytest.raises(UserError, match="emoji takes no root"):
        load_set("emoji", "/data")


def test_a_users_folder_is_split_by_hash(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    touch(folder, *(f"{name}/{n}.jpg" for name in ("red_fox", "owl") for n in range(200)))
    found = load_set(f"folder:{folder}")
    assert found.class_names == ["owl", "red fox"]
    sizes = {split: len(found.splits[split]) for split in ("train", "val", "test")}
    assert sum(sizes.values()) == 400 and 50 < sizes["test"] < 110 and 20 < sizes["val"] < 60
    before = {key: split for split in found.splits for key in keys(found, split)}
    touch(folder, *(f"owl/new_{n}.jpg" for n in range(50)))
    after = load_set(f"folder:{folder}")
    assert {key: split for split in after.splits for key in keys(after, split) if key in before} == before
    (folder / "classnames.txt").write_text("barn owl\nfox\n")
    assert load_set(f"folder:{folder}").class_names == ["barn owl", "fox"]
    (folder / "classnames.txt").write_text("owl\n")
    with pytest.raises(UserError, match="1 names for 2 class folders"):
        load_set(f"folder:{folder}")


def test_a_users_folder_with_splits_of_its_own(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.jpg", "train/b/2.jpg", "test/b/3.jpg")
    found = load_set(f"folder:{tmp_path}")
    assert keys(found, "train") == ["train/a/1.jpg", "train/b/2.jpg"] and labels(found, "test") == [1]
    touch(tmp_path, "test/c/1.jpg")
    with pytest.raises(UserError, match="class c of .*test is not in .*train"):
        load_set(f"folder:{tmp_path}")


def test_small_classes_have_an_image_of_every_split(tmp_path: Path) -> None:
    for count in range(1, 8):
        touch(tmp_path, *(f"{count}/{n}.jpg" for n in range(count)))
    touch(tmp_path, "b/0.jpg")  # whose hash is below 0.2, as that of the only image of a class
    found = load_set(f"folder:{tmp_path}")
    sizes = {
        split: Counter(found.class_names[item.label] for item in found.splits[split])
        for split in found.splits
    }
    everything = sum(sizes.values(), Counter())
    assert everything == {**{str(count): count for count in range(1, 8)}, "b": 1}
    for name, count in everything.items():
        assert sizes["train"][name] >= 1
        assert (sizes["test"][name] >= 1) == (count >= 2)
        assert sizes["val"][name] >= (count >= 5)
    with pytest.raises(UserError, match="holds 0 class folders"):
        load_set(f"folder:{tmp_path / 'b'}")


def test_missing_splits_are_held_out_of_train(tmp_path: Path) -> None:
    touch(tmp_path, *(f"train/{name}/{n}.jpg" for name in "ab" for n in range(60)), "test/a/1.jpg")
    found = load_set(f"folder:{tmp_path}")
    assert keys(found, "test") == ["test/a/1.jpg"]
    assert (
        len(found.splits["train"]) + len(found.splits["val"]) == 120 and 2 <= len(found.splits["val"]) <= 24
    )
    only = tmp_path / "only"
    touch(only, "test/a/1.jpg", "test/b/2.jpg")  # a set to be tested on
    assert list(load_set(f"folder:{only}").splits) == ["test"]


def test_class_names_of_a_file(tmp_path: Path) -> None:
    folder, names = tmp_path / "mine", tmp_path / "names.txt"
    touch(folder, *(f"{name}/{n}.jpg" for name in ("ant", "red_fox", "owl") for n in range(9)), "loose.jpg")
    names.write_text("Red Fox\n\nowl\ta barn owl\nANT\n", encoding="utf-8-sig")
    found, plain = (load_set(f"folder:{folder}", class_names=file) for file in (str(names), ""))
    assert found.class_names == ["Red Fox", "a barn owl", "ANT"]
    for split in ("train", "val", "test"):
        assert keys(found, split) == keys(plain, split)
        folders = {0: "red_fox", 1: "owl", 2: "ant"}
        assert all(item.key.startswith(f"{folders[item.label]}/") for item in found.splits[split])

    for text, message in [
        ("owl\nant\n", "class folder 'red fox' has no line"),
        ("owl\nant\nred fix\n", "no class folder 'red fix'; did you mean red fox"),
        (
            "owl\nant\nred fox\nzebra crossing\n",
            "no class folder 'zebra crossing'; write NAME or FOLDER<tab>NAME",
        ),
        ("owl\nant\nred fox\nOwl\n", "'Owl' comes twice"),
        ("owl\tfox\nant\nred fox\tFox\n", r"classes 0 \('fox'\) and 2 \('Fox'\) have the same prompt"),
        ("owl\ta\tb\n", "is not NAME or FOLDER<tab>NAME"),
        ("\n", "the file is empty"),
    ]:
        names.write_text(text)
        with pytest.raises(UserError, match=message):
            load_set(f"folder:{folder}", class_names=str(names))
    names.write_bytes(b"\xff\xfeowl")
    with pytest.raises(UserError, match="is not UTF-8"):
        load_set(f"folder:{folder}", class_names=str(names))
    with pytest.raises(UserError, match="nowhere.txt does not exist; name a text file"):
        load_set(f"folder:{folder}", class_names="nowhere.txt")
    with pytest.raises(UserError, match="emoji has its own class names"):
        load_set("emoji", class_names="names.txt")
    touch(folder, "Red fox/1.jpg")
    with pytest.raises(UserError, match="'Red fox'.*and.*'red fox'.*have the same prompt"):
        load_set(f"folder:{folder}")


def test_images_without_a_class(tmp_path: Path) -> None:
    folder, names = tmp_path / "mine", tmp_path / "names.txt"
    touch(folder, *(f"unlabelled/{n}.jpg" for n in range(100)))
    with pytest.raises(UserError, match="holds 0 class folders"):
        load_set(f"folder:{folder}")
    names.write_text("owl\nred_fox\n")
    found = load_set(f"folder:{folder}", class_names=str(names))
    assert found.class_names == ["owl", "red fox"] and list(found.splits) == ["unlabelled", "test"]
    assert len(found.splits["unlabelled"]) + len(found.splits["test"]) == 100
    assert 10 < len(found.splits["test"]) < 30
    assert {item.label for split in found.splits.values() for item in split} == {UNLABELLED}

    touch(folder, *(f"{name}/{n}.jpg" for name in ("owl", "red_fox") for n in range(6)))
    some = load_set(f"folder:{folder}", class_names=str(names))
    assert some.class_names == found.class_names and len(some.splits["unlabelled"]) == 100
    assert {item.label for split in ("train", "val", "test") for item in some.splits[split]} == {0, 1}


def test_domains_take_class_names_without_moving_their_splits(tmp_path: Path) -> None:
    folder, names = tmp_path / "mine", tmp_path / "names.txt"
    touch(
        folder,
        *(f"{domain}/{name}/{n}.jpg" for domain in "xy" for name in ("owl", "red_fox") for n in range(5)),
    )
    names.write_text("red_fox\tfox\nowl\n")
    found, plain = (load_set(f"domains:{folder}", class_names=file) for file in (str(names), ""))
    assert found.class_names == ["fox", "owl"] and keys(found, "all") == keys(plain, "all")
    assert [1 - item.label for item in plain.splits["all"]] == labels(found, "all")


def test_every_set_stands_in_the_documentation() -> None:
    text = (ROOT / "docs/datasets.md").read_text(encoding="utf-8")
    rows = {cell for cell in re.findall(r"^\| `([^`]+)` \|", text, flags=re.M)}
    assert rows == set(known_sets())
    for described in FEW_SHOT.values():
        assert described.split_file in text and f"{described.num_classes:,}" in text
        assert all(f"{count:,}" in text for count in described.builds["published"] if count)
        assert described.licence in text
    for described in WITH_DOMAINS.values():
        assert described.licence in text and f"`{described.folders[0]}/`" in text
