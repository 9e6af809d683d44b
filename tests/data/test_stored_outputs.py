"""Stored outputs of a labelled set: what is written, that the loader replays it, what is refused, and resuming."""

from __future__ import annotations

import itertools
import json
import pickle
import random

import pytest
import torch
import torch.nn.functional as F

from data_tools.embed_labelled import embed_items
from vlmkd.config import LabelledDataConfig
from vlmkd.data.decode import decode
from vlmkd.data.images import ImageRef
from vlmkd.data.labelled import Item
from vlmkd.data.loader import build_labelled_loader
from vlmkd.data.samples import sample_digest
from vlmkd.data.sources import Stream
from vlmkd.data.teacher_outputs import CLEAN, TeacherOutputs
from vlmkd.data.transforms import ViewConfig, normalise, render
from vlmkd.errors import UserError
from vlmkd.image_spec import ImageSpec

TEACHER_SPEC = ImageSpec(size=(12, 20), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
VIEWS = ViewConfig((0.3, 0.6), (0.75, 4 / 3), 0.5, 0.3, 0.2, 0.4)


class StubTeacher:
    """A linear map of the pixels; counts the images, and can fail at one."""

    def __init__(self, fail_at: int = 0) -> None:
        self.image_spec, self.logit_scale, self.images, self.fail_at = TEACHER_SPEC, 42.0, 0, fail_at
        self._map = torch.randn(3 * 12 * 20, 8, generator=torch.Generator().manual_seed(0))

    def encode_image(self, images):
        self.images += len(images)
        if self.fail_at and self.images > self.fail_at:
            raise KeyboardInterrupt
        return F.normalize(images.flatten(1) @ self._map, dim=-1)


@pytest.fixture
def items(tmp_path, encoded_image):
    result = []
    for index in range(7):
        path = tmp_path / f"{index}.jpg"
        path.write_bytes(encoded_image(index))
        result.append(Item(f"class/{index}", ImageRef(str(path)), index % 2))
    return result


def embed(items, folder, teacher=None, **options):
    settings = {
        "name": "set", "source": "stub", "digest": "d" * 64, "views": VIEWS, "view_count": 3, "seed": 5,
        "part_size": 3, "batch_size": 4, **options,
    }  # fmt: skip
    return embed_items(teacher or StubTeacher(), items, folder, **settings)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_is_stored_is_the_teachers_answer_to_the_seeded_views(items, tmp_path, dtype):
    lines = []
    assert not embed(items, tmp_path / "out", dtype=dtype, progress=lines.append)
    stored = TeacherOutputs(tmp_path / "out")
    assert len(stored) == 7 and "class/3" in stored and stored.get("class/9") is None
    teacher = StubTeacher()
    for item in items:
        image = item.image.read()
        entry = stored.get(item.key, digest=sample_digest(image, ""))
        views = [VIEWS.draw(40, 30, random.Random(f"5/{item.key}/{k}")) for k in range(3)]
        assert entry.views == views
        pixels = normalise([render(decode(image), view, TEACHER_SPEC) for view in views], TEACHER_SPEC)
        expected = teacher.encode_image(pixels)
        torch.testing.assert_close(
            entry.columns["image_embeds"],
            expected.to(dtype),
            rtol=0,
            atol=1e-3 if dtype == torch.float16 else 1e-6,
        )
    assert any(view.grey for item in items for view in stored.get(item.key).views)
    assert any(view.hue for item in items for view in stored.get(item.key).views)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "cache.json", "set-00000.safetensors", "set-00001.safetensors", "set-00002.safetensors"
    ]  # fmt: skip
    assert len(lines) == 3 and lines[0].startswith("set: 3/7 images") and "ETA" in lines[0]


def test_loader_processes_and_batches_do_not_change_the_files(items, tmp_path):
    embed(items, tmp_path / "a", dtype=torch.float32)
    embed(items, tmp_path / "b", dtype=torch.float32, workers=2)
    for path in (tmp_path / "a").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def loader(stored, items, spec, **fields):
    """The loader of a run whose views are VIEWS."""
    cfg = LabelledDataConfig(
        crop_scale=list(VIEWS.crop_scale), flip=VIEWS.flip, color_jitter=VIEWS.color_jitter, hue=VIEWS.hue,
        grayscale=VIEWS.grayscale, teacher_outputs=str(stored.folder), teacher_view=stored.teacher_view,
        **{"workers": 0, **fields},
    )  # fmt: skip
    return build_labelled_loader(cfg, {"a": Stream(items, 7)}, seed=1, rank=0, world_size=1, image_spec=spec)


def batches(stored, items, spec, number, **fields):
    return list(itertools.islice(iter(loader(stored, items, spec, **fields)), number))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_shows_the_stored_view_beside_its_embedding(items, tmp_path, spec, workers):
    embed(items, tmp_path / "out")
    stored = TeacherOutputs(tmp_path / "out")
    by_key = {item.key: item for item in items}
    for number, batch in enumerate(batches(stored, items, spec, 4, workers=workers)):
        assert batch["teacher_valid"][0].all()
        for row, key in enumerate(batch["keys"]):
            entry = stored.get(key)
            pixels = render(decode(by_key[key].image.read()), entry.views[number % 3], spec)
            assert torch.equal(batch["images"][row], normalise([pixels], spec)[0])
            expected = F.normalize(entry.columns["image_embeds"][number % 3].float(), dim=-1)
            torch.testing.assert_close(batch["teacher_image_embeds"][0][row], expected)
    two = batches(stored, items, spec, 3, view_count=2)
    shown = [dict(zip(batch["keys"], batch["images"], strict=True)) for batch in two]
    assert all(torch.equal(shown[0][item.key], shown[2][item.key]) for item in items)
    with pytest.raises(UserError, match="data.view_count is 4, but .* holds 3 views"):
        batches(stored, items, spec, 1, view_count=4)


def test_clean_outputs_are_targets_of_fresh_views(items, tmp_path, spec):
    embed(items, tmp_path / "out", views=CLEAN, view_count=1)
    stored = TeacherOutputs(tmp_path / "out", "clean")
    first, second = batches(stored, items, spec, 2)
    one, two = ({key: row for row, key in enumerate(batch["keys"])} for batch in (first, second))
    for item in items:
        a, b = one[item.key], two[item.key]
        assert torch.equal(first["teacher_image_embeds"][0][a], second["teacher_image_embeds"][0][b])
        assert not torch.equal(first["images"][a], second["images"][b])
        view = VIEWS.draw(40, 30, random.Random(f"1/{item.key}/1"))
        pixels = render(decode(item.image.read()), view, spec)
        assert torch.equal(second["images"][b], normalise([pixels], spec)[0])
    embed(items, tmp_path / "drawn")
    with pytest.raises(UserError, match="data.teacher_view=clean, but .* holds 3 drawn view"):
        TeacherOutputs(tmp_path / "drawn", "clean")


def test_an_interrupted_call_goes_on_and_a_longer_list_adds(items, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        embed(items[:6], tmp_path / "out", StubTeacher(fail_at=1 + 4 * 3))
    assert len(TeacherOutputs(tmp_path / "out")) == 3
    teacher = StubTeacher()
    embed(items[:6], tmp_path / "out", teacher)
    assert teacher.images == 1 + 3 * 3  # one probe for the width
    teacher = StubTeacher()
    embed(items, tmp_path / "out", teacher)
    assert teacher.images == 1 + 3
    embed(items, tmp_path / "whole")
    resumed, whole = TeacherOutputs(tmp_path / "out"), TeacherOutputs(tmp_path / "whole")
    for item in items:
        assert torch.equal(
            resumed.get(item.key).columns["image_embeds"], whole.get(item.key).columns["image_embeds"]
        )
    assert not list((tmp_path / "out").glob("*.partial"))


def test_a_folder_of_other_settings_is_not_mixed_up(items, tmp_path):
    embed(items, tmp_path / "out")
    for change, told in (
        ({"digest": "e" * 64}, "digest d+ .now e+"),
        ({"view_count": 2}, "crops 3 .now 2"),
        ({"seed": 6}, "seed 5 .now 6"),
        ({"name": "other"}, "set_name set .now other"),
        ({"dtype": torch.float32}, "dtype float16 .now float32"),
        ({"views": ViewConfig()}, "views"),
    ):
        with pytest.raises(UserError, match=told):
            embed(items, tmp_path / "out", **change)
    with pytest.raises(UserError, match="1 keys name two images .first: class/0"):
        embed([*items, items[0]], tmp_path / "new")


def test_runs_that_the_outputs_do_not_fit_are_refused(items, tmp_path, spec):
    embed(items[:6], tmp_path / "out")
    stored = TeacherOutputs(tmp_path / "out")
    stored.check(VIEWS, spec.fill, items=items[:6], digest="d" * 64)
    with pytest.raises(UserError, match=r"1 of 7 images are not in it .first: class/6"):
        stored.check(VIEWS, spec.fill, items=items)
    stored.check(VIEWS, spec.fill, items=items, max_missing_share=0.2)
    with pytest.raises(UserError, match="teacher has digest eeee"):
        stored.check(VIEWS, spec.fill, items=items[:6], digest="e" * 64)
    with pytest.raises(UserError, match=r"data.flip is 0.0 but the views were drawn with 0.5"):
        stored.check(ViewConfig((0.3, 0.6), (0.75, 4 / 3), 0.0, 0.3, 0.2, 0.4), spec.fill, items=items[:6])
    with pytest.raises(UserError, match="lays transparent images on"):
        stored.check(VIEWS, (1, 2, 3), items=items[:6])
    with pytest.raises(UserError, match="have no cache.json; write one with data_tools/embed_teacher.py"):
        TeacherOutputs(tmp_path / "nowhere")
    source = loader(stored, items, spec, max_bad_share=0.5)
    next(iter(source))
    assert source.skipped == {"missing_teacher_embedding": 1}


@pytest.mark.parametrize("workers", [0, 1])
def test_another_image_under_a_key_is_noticed_when_it_is_read(items, tmp_path, spec, encoded_image, workers):
    embed(items, tmp_path / "out")
    (tmp_path / "2.jpg").write_bytes(encoded_image(99))
    with pytest.raises(UserError, match="written for another image or caption than class/2 has now"):
        batches(TeacherOutputs(tmp_path / "out"), items, spec, 1, workers=workers)


def test_bad_images_are_left_out_and_a_missing_file_stops(items, tmp_path):
    (tmp_path / "2.jpg").write_bytes(b"no image")
    assert embed(items, tmp_path / "out") == {"undecodable_image": 1}
    assert len(TeacherOutputs(tmp_path / "out")) == 6
    (tmp_path / "4.jpg").unlink()
    for workers in (0, 1):
        with pytest.raises(UserError, match="4.jpg of class/4 cannot be read"):
            embed(items, tmp_path / f"new{workers}", workers=workers)


def test_outputs_reach_another_process_by_their_folder(items, tmp_path):
    embed(items, tmp_path / "out")
    data = pickle.dumps(TeacherOutputs(tmp_path / "out"))
    assert len(data) < 500
    assert len(pickle.loads(data)) == 7


def test_a_cache_without_the_newer_fields_is_read(items, tmp_path):
    embed(items, tmp_path / "out", views=ViewConfig((0.3, 0.6), (0.75, 4 / 3), 0.5, 0.3))
    path = tmp_path / "out" / "cache.json"
    data = json.loads(path.read_text())
    del data["info"]["views"]["hue"], data["info"]["views"]["grayscale"], data["info"]["dtype"]
    path.write_text(json.dumps(data))
    info = TeacherOutputs(tmp_path / "out").info
    assert info.views == ViewConfig((0.3, 0.6), (0.75, 4 / 3), 0.5, 0.3) and info.dtype == "float16"
