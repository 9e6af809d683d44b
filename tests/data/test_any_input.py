"""Every reader of text, JSON, CSV and tar files, with contents that hypothesis invents: a result, or one line."""

from __future__ import annotations

import importlib.util
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from projects.dho import lists
from vlmkd import class_names
from vlmkd.data import shards, teacher_outputs
from vlmkd.datasets import evaluation_sets as datasets
from vlmkd.datasets import folders, published_sets
from vlmkd.datasets.tar_index import index_tar
from vlmkd.errors import UserError
from vlmkd.models.class_vectors import ClassVectors
from vlmkd.page.report import read_run

ROOT = Path(__file__).parents[2]


def tool(name: str) -> ModuleType:
    """A data tool as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "data_tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pack = tool("images_to_shards")

CAPTIONS_KEYS = ["images", "annotations", "sentences", "filename", "split", "raw", "image_id", "caption", "id",
                 "file_name", "filepath", "title"]  # fmt: skip
SPLIT_KEYS = ["train", "val", "test"]
CACHE_KEYS = ["info", "shards", "version", "image_spec", "views", "source", "digest", "size", "crop_scale"]


def trees(keys: list[str]) -> st.SearchStrategy[bytes]:
    """JSON files with these keys at all depths."""
    leaf = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-2, 5),
        st.floats(),
        st.text(max_size=5),
        st.sampled_from(["test", "a.jpg"]),
    )
    names = st.one_of(st.sampled_from(keys), st.text(max_size=3))
    tree = st.recursive(
        leaf,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4),
        max_leaves=12,
    )
    return tree.map(lambda value: json.dumps(value).encode())


LINES = st.lists(
    st.one_of(
        st.text(max_size=12),
        st.sampled_from(["filepath,title", "filepath\ttitle", "a.jpg,b", 'a.jpg,"b', "n01440764 tench", "# sha256 00",
                         "# labelled images, kind cascade, percent x", "a.jpg#0\tword", "{}", "x\ty\tz"]),
    ),
    max_size=5,
).map(lambda lines: "\n".join(lines).encode())  # fmt: skip
BYTES = st.binary(max_size=60)


def named(suffix: str, read: Callable[[Path], Any], contents: st.SearchStrategy[bytes]) -> Any:
    return pytest.param(
        suffix, read, st.one_of(contents, BYTES), id=getattr(read, "__name__", suffix) + suffix
    )


def _folder_of_cache(path: Path) -> Any:
    return teacher_outputs.read_info(path.parent, teacher_outputs.OutputsInfo)


def _metrics(path: Path) -> Any:
    return read_run(path.parent)


def _captions(path: Path) -> Any:
    return pack.read_captions(path, "filepath", "title")


def _coco(path: Path) -> Any:
    return datasets._read_json_captions(path)


def _listed(path: Path) -> Any:
    return folders._names_of_wnids(str(path))


def _image_list(path: Path) -> Any:
    return lists.read_list(path, "cascade"), lists.read_list(path, "simclr")


def _sizes(path: Path) -> Any:
    return shards.known_samples([str(path.parent / "a.tar")])


def _splits(path: Path) -> Any:
    return published_sets._read_split(published_sets.SETS["dtd"], path.parent)


@pytest.mark.parametrize(
    ("name", "read", "contents"),
    [
        named("c.json", _captions, trees(CAPTIONS_KEYS)),
        named("c.csv", _captions, LINES),
        named("c.json", _coco, trees(CAPTIONS_KEYS)),
        named("c.txt", datasets._read_caption_lines, LINES),
        named("c.txt", lambda path: class_names.read_class_names(str(path)), LINES),
        named("c.txt", lambda path: class_names.read_folder_names(str(path)), LINES),
        named("c.txt", lambda path: class_names.read_templates(str(path)), LINES),
        named("classnames.txt", _listed, LINES),
        named("list.txt", _image_list, LINES),
        named("sizes.json", _sizes, trees(["a.tar"])),
        named("cache.json", _folder_of_cache, trees(CACHE_KEYS)),
        named(published_sets.SETS["dtd"].split_file, _splits, trees(SPLIT_KEYS)),
        named("metrics.jsonl", _metrics, LINES),
        named("v.safetensors", ClassVectors.load, BYTES),
    ],
)
def test_any_content_is_read_or_one_line(
    name: str, read: Callable[[Path], Any], contents: st.SearchStrategy[bytes], tmp_path: Path
) -> None:
    path = tmp_path / name

    @given(contents)
    @settings(derandomize=True, max_examples=40, deadline=None, database=None)
    def check(content: bytes) -> None:
        path.write_bytes(content)
        try:
            read(path)
        except UserError as error:
            assert "\n" not in str(error) and str(error)

    check()


def tar_of(members: list[tuple[str, bytes]]) -> bytes:
    """A tar with these members."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


@given(
    st.lists(
        st.tuples(st.sampled_from(["a.jpg", "a.txt", "a.cls", "b.txt", "b", "__x", "x/y.json"]), BYTES),
        max_size=4,
    ),
    st.integers(0, 10_240),
    st.binary(max_size=3),
    st.booleans(),
)
@settings(derandomize=True, max_examples=80, deadline=None, database=None)
def test_any_tar_is_read_counted_as_broken_or_one_line(
    tmp_path_factory: pytest.TempPathFactory,
    members: list[tuple[str, bytes]],
    place: int,
    noise: bytes,
    cut: bool,
) -> None:
    data = tar_of(members)
    place = min(place, len(data))
    path = tmp_path_factory.getbasetemp() / "any.tar"
    path.write_bytes(data[:place] if cut else data[:place] + noise + data[place + len(noise) :])
    for raw in shards.read_shard(str(path)):
        assert raw.reason in ("", "broken_tar", "duplicate_key")
    try:
        for sample in index_tar(str(path)):
            for extension in sample.members:
                sample.text(extension)
    except UserError as error:
        assert "\n" not in str(error)


@given(st.text(max_size=25) | st.from_regex(r"[{}.,0-9a]{1,12}", fullmatch=True))
@settings(derandomize=True, max_examples=80, deadline=None, database=None)
def test_any_shard_name_is_one_line(name: str) -> None:
    with pytest.raises(UserError) as caught:
        shards.expand([f"/nowhere/{name}"], "--shards")
    assert "\n" not in str(caught.value)
