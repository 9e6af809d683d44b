"""Readers of evaluation sets, on small trees and tars in their real layouts; and what bad ones say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

from vlmkd.data.labelled import LabelledSet
from vlmkd.datasets.evaluation_sets import default_name, retrieval_set, zero_shot_set
from vlmkd.errors import UserError

from .conftest import encoded, write_tar


def labels(data: LabelledSet) -> list[int]:
    return [item.label for item in data.splits["test"]]


def _images(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"image")


# ------------------------------------------------------------------------------------------------- classification


def test_wnid_folders_get_their_own_names_in_a_subset_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _images(tmp_path, "val/n02123394/a.JPEG", "val/n01440764/b.JPEG")  # Persian cat and tench
    data = zero_shot_set(str(tmp_path))
    assert data.class_names == ["tench", "Persian cat"] and labels(data) == [0, 1]
    assert "2 of ImageNet's 1000 classes" in caplog.text
    assert len(data.templates) == 80
    _images(tmp_path, "val/n99999999/a.JPEG")
    with pytest.raises(UserError, match="n99999999 is not a wnid"):
        zero_shot_set(str(tmp_path))


def test_numbered_folders_are_class_indices(tmp_path: Path) -> None:
    _images(tmp_path, "0/a.jpg", "2/b.jpg", "10/c.jpg")  # ImageNet-V2's layout
    data = zero_shot_set(str(tmp_path), class_names="imagenet")
    assert labels(data) == [0, 2, 10] and data.class_names == list(IMAGENET_CLASSNAMES)
    with pytest.raises(UserError, match="numbered class folders; name class_names"):
        zero_shot_set(str(tmp_path))
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    with pytest.raises(UserError, match="/10 has no class name: .* has 3"):
        zero_shot_set(str(tmp_path), class_names=str(tmp_path / "names.txt"))


def test_named_folders(tmp_path: Path) -> None:
    _images(tmp_path, "golden_retriever/a.jpg", "cat/b.jpg")
    assert zero_shot_set(str(tmp_path)).class_names == ["cat", "golden retriever"]
    (tmp_path / "classnames.txt").write_text("a cat\n\na dog\n")
    assert zero_shot_set(str(tmp_path)).class_names == ["a cat", "a dog"]
    (tmp_path / "classnames.txt").write_text("a cat\n")
    with pytest.raises(UserError, match="has 1 class names for the 2 class folders"):
        zero_shot_set(str(tmp_path))


def test_folders_are_listed_as_imagenet_s(tmp_path: Path) -> None:
    names = ("b/b.JPEG", "a/z.JPEG", "a/below/a.JPEG", "a/notes.txt", "a/.hidden.JPEG", ".cache/x.jpg")
    _images(tmp_path / "val", *names)
    data = zero_shot_set(str(tmp_path))
    assert [item.key for item in data.splits["test"]] == ["a/below/a.JPEG", "a/z.JPEG", "b/b.JPEG"]
    assert data.class_names == ["a", "b"] and labels(data) == [0, 0, 1]
    assert zero_shot_set(str(tmp_path / "val")).splits == data.splits


def test_a_file_of_wnids_and_names(tmp_path: Path) -> None:
    _images(tmp_path, "val/n02123394/a.JPEG", "val/n01440764/b.JPEG")
    (tmp_path / "classnames.txt").write_text("n01440764 my fish\nn02123394 my cat\n")
    assert zero_shot_set(str(tmp_path)).class_names == ["my fish", "my cat"]
    (tmp_path / "classnames.txt").write_text("n01440764 my fish\n")
    with pytest.raises(UserError, match="n02123394 is not a wnid of .*classnames.txt"):
        zero_shot_set(str(tmp_path))
    (tmp_path / "classnames.txt").write_text("n01440764 my fish\ncat\n")
    with pytest.raises(UserError, match="is not `wnid name`"):
        zero_shot_set(str(tmp_path))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "holds no class folders.*image-net.org"),
        (["val/a.JPEG", "val/b.JPEG"], "val holds 2 images but no class folders"),
        (["train/n01/a.JPEG"], "no val folder: .*/val is missing.*image-net.org"),
        (["val/n01/a.JPEG", "val/n02/readme.txt"], "class folder .*/val/n02 .*holds no image"),
        ([f"{letter}/x.txt" for letter in "abcde"], r"/a \(5 of 5\) holds no image"),
    ],
)
def test_errors_name_the_place(tmp_path: Path, files: list[str], message: str) -> None:
    _images(tmp_path, *files)
    with pytest.raises(UserError, match=message):
        zero_shot_set(str(tmp_path))


def _class_tar(path: Path, **changes: bytes) -> Path:
    members = {f"s{number}.{kind}": data for number in range(3) for kind, data in _sample(number).items()}
    return write_tar(path, members | {name.replace("__", "."): data for name, data in changes.items()})


def _sample(number: int) -> dict[str, bytes]:
    return {
        "jpg": encoded(number),
        "txt": b"one\n two \n\n",
        "json": b"{}",
        "cls": f"{number % 2}\n".encode(),
    }


def test_shards_in_clip_benchmark_layout(tmp_path: Path) -> None:
    for number in range(2):
        _class_tar(tmp_path / "test" / f"{number}.tar")
    (tmp_path / "classnames.txt").write_text("odd\neven\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a {c}.\n{c}\n")
    for name in (str(tmp_path), str(tmp_path / "test"), str(tmp_path / "test" / "{0..1}.tar")):
        data = zero_shot_set(name)
        assert labels(data) == [0, 1, 0] * 2 and data.class_names == ["odd", "even"]
        assert data.templates == ["a {c}.", "{c}"]
        assert [item.image.read() for item in data.splits["test"]] == [
            encoded(number) for number in range(3)
        ] * 2
    assert zero_shot_set(str(tmp_path), templates="simple").templates[0] == "itap of a {}."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"s1__cls": b"two"}, "s1.cls is 'two', not a class index"),
        ({"s1__cls": b"7"}, "class 7, but there are only 2 class names"),
        ({"s3__cls": b"0"}, "s3 has no image"),
        ({"s3__jpg": b"x"}, "s3 has no cls member"),
    ],
)
def test_bad_samples_of_shards(tmp_path: Path, changes: dict[str, bytes], message: str) -> None:
    (tmp_path / "classnames.txt").write_text("odd\neven\n")
    members = {f"s{number}.{kind}": data for number in range(3) for kind, data in _sample(number).items()}
    write_tar(tmp_path / "0.tar", members | {name.replace("__", "."): data for name, data in changes.items()})
    with pytest.raises(UserError, match=message):
        zero_shot_set(str(tmp_path))


@pytest.mark.parametrize("keep", [100, 700, 5000, -1025])
def test_a_torn_shard_is_refused(tmp_path: Path, keep: int) -> None:
    """Also where Python's tarfile would take the tear for the end of a shorter archive."""
    path = _class_tar(tmp_path / "0.tar")
    (tmp_path / "classnames.txt").write_text("odd\neven\n")
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\0")) + 512  # inside the padding of the last member, before the end mark
    path.write_bytes(whole[:keep] if keep > 0 else whole[: end // 512 * 512])
    with pytest.raises(UserError, match="0.tar is not a whole, uncompressed tar"):
        zero_shot_set(str(tmp_path))


def test_missing_things_are_named(tmp_path: Path) -> None:
    _class_tar(tmp_path / "0.tar")
    with pytest.raises(UserError, match="no classnames.txt beside its shards"):
        zero_shot_set(str(tmp_path))
    with pytest.raises(UserError, match="no file matches .*missing.tar"):
        zero_shot_set(str(tmp_path / "missing.tar"))
    with pytest.raises(UserError, match="nowhere does not exist"):
        zero_shot_set("nowhere")
    with pytest.raises(UserError, match="not pipes"):
        zero_shot_set("pipe:cat a.tar")
    with pytest.raises(UserError, match="is empty"):
        zero_shot_set("")
    with pytest.raises(UserError, match="unknown embedded data set 'emoji:nothing'"):
        zero_shot_set("emoji:nothing")


def test_names_of_sets() -> None:
    names = {
        "/data/imagenet/val": "imagenet",
        "emoji:unseen_concept": "unseen_concept",
        "wds/{0..3}.tar": "wds",
    }
    assert {data: default_name(data) for data in names} == names


# ------------------------------------------------------------------------------------------------------- retrieval


COCO = {
    "images": [{"id": 9, "file_name": "b.jpg"}, {"id": 3, "file_name": "a.jpg"}],
    "annotations": [
        {"image_id": 3, "caption": "a one"},
        {"image_id": 9, "caption": "b one"},
        {"image_id": 3, "caption": "a two"},
    ],
}
KARPATHY = {
    "images": [
        {"filename": "b.jpg", "split": "test", "sentences": [{"raw": "b one"}]},
        {"filename": "x.jpg", "split": "train", "sentences": [{"raw": "x one"}]},
        {
            "filename": "a.jpg",
            "filepath": "val2014",
            "split": "test",
            "sentences": [{"raw": "a one"}, {"raw": "a two"}],
        },
    ]
}
TOKEN = "b.jpg#0\tb one\na.jpg#0\ta one\na.jpg#1\ta two\n"
CSV = 'image,caption\nb.jpg,b one\na.jpg,a one\n"a.jpg","a two"\n'
KAGGLE = "image_name| comment_number| comment\nb.jpg| 0| b one\na.jpg| 0| a one\na.jpg| 1| a two\n"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("c.json", json.dumps(COCO)),
        ("k.json", json.dumps(KARPATHY)),
        ("c.token", TOKEN),
        ("c.csv", CSV),
        ("c.txt", KAGGLE),
    ],
)
def test_caption_layouts(tmp_path: Path, file: str, content: str) -> None:
    _images(tmp_path, "images/b.jpg", "images/val2014/a.jpg" if file == "k.json" else "images/a.jpg")
    (tmp_path / file).write_text(content)
    data = retrieval_set(str(tmp_path / "images"), captions=str(tmp_path / file))
    assert [Path(image.path).name for image in data.images] == ["b.jpg", "a.jpg"]
    assert data.texts == ["b one", "a one", "a two"] and data.texts_of_image == [[0], [1, 2]]


def test_equal_captions_count_by_themselves_outside_the_emoji_sets(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "0.tar",
        {f"{number}.{kind}": data for number in (0, 1) for kind, data in _sample(0).items()},
    )
    data = retrieval_set(str(tmp_path))
    assert data.texts == ["one", "two", "one", "two"] and data.texts_of_image == [[0, 1], [2, 3]]


def test_emoji_captions_name_concepts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three drawings of two concepts: a concept's name is one text with all its drawings."""
    path = write_tar(
        tmp_path / "0.tar",
        {
            f"{n}.{kind}": data
            for n, text in enumerate((b"fox", b"cup", b"fox"))
            for kind, data in [("png", b""), ("txt", text)]
        },
    )
    monkeypatch.setattr("vlmkd.datasets.emoji.resolve", lambda name: [str(path)])
    data = retrieval_set("emoji:unseen_concept")
    assert (
        data.name == "unseen_concept"
        and data.texts == ["fox", "cup"]
        and data.texts_of_image == [[0], [1], [0]]
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ('{"images": [], "annotations": []}', "neither COCO captions"),
        (json.dumps(COCO | {"annotations": [{"image_id": 3, "bbox": []}]}), "neither COCO captions"),
        (json.dumps(COCO | {"annotations": COCO["annotations"][:1]}), "b.jpg has no caption"),
        (json.dumps({"images": KARPATHY["images"][1:2]}), "no image of split `test`"),
        (
            json.dumps(COCO | {"images": [*COCO["images"], {"id": 1, "file_name": "c.jpg"}]}),
            "1 of 3 .* missing, first .*c.jpg",
        ),
    ],
)
def test_bad_captions(tmp_path: Path, content: str, message: str) -> None:
    _images(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(UserError, match=message):
        retrieval_set(str(tmp_path), captions=str(tmp_path / "c.json"))


def test_bad_caption_lines_and_paths(tmp_path: Path) -> None:
    _images(tmp_path, "a.jpg")
    (tmp_path / "c.token").write_text("a.jpg#0\tone\na caption alone\n")
    with pytest.raises(UserError, match="entry 2 is not"):
        retrieval_set(str(tmp_path), captions=str(tmp_path / "c.token"))
    with pytest.raises(UserError, match="name its captions file"):
        retrieval_set(str(tmp_path))
    with pytest.raises(UserError, match="c.json does not exist"):
        retrieval_set(str(tmp_path), captions="c.json")
    with pytest.raises(UserError, match="image folder .* does not exist"):
        retrieval_set(str(tmp_path / "no"), captions=str(tmp_path / "c.token"))
    with pytest.raises(UserError, match="has no effect on shards"):
        retrieval_set(str(_class_tar(tmp_path / "0.tar")), captions="c.json")
