"""The labelled loader: what is drawn is a function of the batch number, whoever loads it; bad images; exact resume."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch

from vlmkd.config import LabelledDataConfig
from vlmkd.data.decode import decode
from vlmkd.data.images import ImageRef
from vlmkd.data.labelled import Item
from vlmkd.data.loader import Loader, build_labelled_loader
from vlmkd.data.pipelines import ImagePipeline
from vlmkd.data.samples import view_config
from vlmkd.data.sources import ItemSource, Stream
from vlmkd.data.transforms import ViewConfig, normalise, render
from vlmkd.errors import UserError
from vlmkd.image_spec import ImageSpec

VIEWS = ViewConfig((0.3, 0.8), (0.75, 4 / 3), 0.5, 0.2, 0.1, 0.3)


@pytest.fixture
def make_items(tmp_path, encoded_image):
    def make(number, domain=0, bad=()):
        items = []
        for index in range(number):
            path = tmp_path / f"{domain}_{index:03d}.jpg"
            path.write_bytes(b"no image" if index in bad else encoded_image(100 * domain + index))
            items.append(Item(f"{domain}/{index:03d}", ImageRef(str(path)), index % 3, domain))
        return items

    return make


def loader(
    streams,
    spec,
    *,
    views=VIEWS,
    workers=0,
    max_bad_share=0.05,
    max_pixels=10**6,
    teacher_specs=(),
    **options,
):
    source = ItemSource(streams, **{"seed": 7, "rank": 0, "world_size": 1, **options})
    pipeline = ImagePipeline(spec, views, teacher_specs=teacher_specs, max_pixels=max_pixels)
    return Loader(source, pipeline, workers=workers, max_bad_share=max_bad_share)


def take(source, number):
    return list(itertools.islice(iter(source), number))


def test_each_item_once_a_pass_in_another_order_with_its_seeded_view(make_items, spec):
    items = make_items(10)
    batches = take(loader({"train": Stream(items, 4)}, spec), 5)  # two passes, across their border
    keys = [key for batch in batches for key in batch["keys"]]
    assert Counter(keys[:10]) == Counter(keys[10:]) == Counter(item.key for item in items)
    assert keys[:10] != keys[10:] and keys[:10] != sorted(keys[:10])
    by_key = {item.key: item for item in items}
    for position, key in enumerate(keys):
        batch, row = batches[position // 4], position % 4
        view = VIEWS.draw(40, 30, random.Random(f"7/{key}/{position // 10}"))
        expected = normalise([render(decode(by_key[key].image.read()), view, spec)], spec)[0]
        torch.testing.assert_close(batch["images"][row], expected, rtol=0, atol=0)
        assert batch["labels"][row] == by_key[key].label and batch["stream_ids"][row] == 0
    pipeline = ImagePipeline(spec, VIEWS)
    for batch in batches:
        pipeline.check(batch, 4)


def test_a_fixed_number_of_views_is_replayed(make_items, spec):
    items = make_items(4)
    batches = take(loader({"train": Stream(items, 4)}, spec, view_count=2), 4)
    images = [
        {key: image for key, image in zip(batch["keys"], batch["images"], strict=True)} for batch in batches
    ]
    for item in items:
        assert torch.equal(images[0][item.key], images[2][item.key])
        assert torch.equal(images[1][item.key], images[3][item.key])
        assert not torch.equal(images[0][item.key], images[1][item.key])


def global_rows(streams, spec, world, accumulation, steps, workers=0):
    """(stream, key, image) of each global batch, sorted: which rank has a row is not compared."""
    parts = [
        take(
            loader(
                streams,
                spec,
                rank=rank,
                world_size=world,
                accumulation=accumulation,
                workers=workers,
                max_bad_share=0.5,
            ),  # fmt: skip
            steps * accumulation,
        )
        for rank in range(world)
    ]
    result = []
    for step in range(steps):
        rows = []
        for part in parts:
            for batch in part[step * accumulation : (step + 1) * accumulation]:
                rows += [
                    (int(stream), key, round(float(image.double().sum()), 6))
                    for stream, key, image in zip(
                        batch["stream_ids"], batch["keys"], batch["images"], strict=True
                    )
                ]
        result.append(sorted(rows))
    return result


@pytest.mark.parametrize("bad", [(), (2,)])
def test_global_batches_do_not_depend_on_ranks_accumulation_or_workers(make_items, spec, bad):
    streams = {
        "labelled": Stream(make_items(7, 0, bad), 4),
        "domain": Stream(make_items(5, 1), 8, replacement=True),
    }
    expected = global_rows(streams, spec, 1, 1, 3)
    assert all(len(rows) == 12 for rows in expected)
    assert global_rows(streams, spec, 2, 1, 3) == expected
    assert global_rows(streams, spec, 1, 4, 3) == expected
    assert global_rows(streams, spec, 2, 2, 3) == expected
    assert global_rows(streams, spec, 1, 1, 3, workers=2) == expected


def test_rows_of_a_rank_are_its_equal_share_of_each_stream_in_order(make_items, spec):
    streams = {"b": Stream(make_items(6, 0), 4), "a": Stream(make_items(6, 1), 2)}
    whole = take(loader(streams, spec), 1)[0]
    halves = [take(loader(streams, spec, rank=rank, world_size=2), 1)[0] for rank in (0, 1)]
    assert whole["stream_ids"].tolist() == [0, 0, 0, 0, 1, 1]
    assert halves[0]["keys"] == [whole["keys"][row] for row in (0, 1, 4)]
    assert halves[1]["keys"] == [whole["keys"][row] for row in (2, 3, 5)]


def test_sampling_with_replacement_is_uniform(make_items, spec):
    source = loader({"d": Stream(make_items(5), 50, replacement=True)}, spec)
    batches = take(source, 20)
    counts = Counter(key for batch in batches for key in batch["keys"])
    assert len(counts) == 5
    # 1,000 draws of 5: the standard deviation of a count is 12.6
    assert all(abs(count - 200) < 60 for count in counts.values())
    assert len({tuple(batch["keys"]) for batch in batches}) == 20
    repeated = [
        image for key, image in zip(batches[0]["keys"], batches[0]["images"], strict=True) if key == "0/000"
    ]
    assert len(repeated) > 1 and not torch.equal(repeated[0], repeated[1])  # a view of its own for each draw


def test_streams_and_seeds_draw_differently(make_items, spec):
    items = make_items(12)
    one = take(loader({"a": Stream(items, 12), "b": Stream(items, 12)}, spec), 1)[0]["keys"]
    other = take(loader({"a": Stream(items, 12)}, spec, seed=8), 1)[0]["keys"]
    assert one[:12] != one[12:] and one[:12] != other


@pytest.mark.parametrize(("workers", "resumed_workers", "ranks"), [(0, 0, 1), (2, 1, 1), (0, 2, 2)])
def test_resume_is_exact(make_items, spec, workers, resumed_workers, ranks):
    streams = {"a": Stream(make_items(7, 0, bad=(3,)), 2), "b": Stream(make_items(5, 1), 4, replacement=True)}
    options = {"max_bad_share": 0.5}
    whole = loader(streams, spec, **options)
    straight = take(whole, 6)
    first = loader(streams, spec, workers=workers, **options)
    take(first, 3)
    state = first.state_dict()
    parts = []
    for rank in range(ranks):
        again = loader(streams, spec, workers=resumed_workers, rank=rank, world_size=ranks, **options)
        again.load_state_dict(state)
        parts.append(take(again, 3))
    for step in range(3):
        keys = [key for part in parts for key in part[step]["keys"]]
        images = torch.cat([part[step]["images"] for part in parts])
        order = [straight[3 + step]["keys"].index(key) for key in keys]
        assert sorted(keys) == sorted(straight[3 + step]["keys"])
        if ranks == 1:
            assert keys == straight[3 + step]["keys"]
            assert torch.equal(images, straight[3 + step]["images"]), order
    if ranks == 1:
        assert again.skipped == whole.skipped


def test_a_resumed_run_is_told_that_its_items_changed(make_items, spec, caplog):
    items = make_items(6)
    first = loader({"a": Stream(items, 2)}, spec)
    take(first, 1)
    again = loader({"a": Stream(items[:5], 2)}, spec)
    again.load_state_dict(first.state_dict())
    assert "items of the stream a changed" in caplog.text


def test_bad_images_are_counted_and_replaced_by_the_next_item(make_items, spec):
    good = take(loader({"a": Stream(make_items(8), 4)}, spec), 2)
    order = [key for batch in good for key in batch["keys"]]
    bad = int(order[2][-3:])
    source = loader({"a": Stream(make_items(8, bad=(bad,)), 4)}, spec, max_bad_share=0.5)
    batches = take(source, 2)
    expected = [order[0], order[1], order[3], order[3], *order[4:]]
    assert [key for batch in batches for key in batch["keys"]] == expected
    assert source.skipped == {"undecodable_image": 1}
    assert source.describe()["first_bad"] == [f"{order[2]} (undecodable_image)"]


def test_oversized_images_are_counted(make_items, spec):
    items = make_items(3)
    with pytest.raises(
        UserError, match="stream a: 3 samples in a row were bad .oversized_image 3.; last: 0/"
    ):
        take(loader({"a": Stream(items, 1)}, spec, max_pixels=40 * 30 - 1, max_bad_share=1.0), 1)
    assert take(loader({"a": Stream(items, 1)}, spec, max_pixels=40 * 30), 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_images_end_the_run(make_items, spec, workers):
    items = make_items(10, bad=(1, 4))
    with pytest.raises(UserError, match="data.max_bad_share=0.05: .* samples were bad .undecodable_image"):
        take(loader({"a": Stream(items, 2)}, spec, workers=workers), 10)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_missing_file_ends_the_run_at_once_and_is_named(make_items, spec, workers):
    items = [*make_items(3), Item("gone", ImageRef("/nowhere/gone.jpg"), 0)]
    with pytest.raises(UserError, match="/nowhere/gone.jpg of gone cannot be read .No such file"):
        take(loader({"a": Stream(items, 4)}, spec, workers=workers), 1)


def test_images_inside_a_tar(tmp_path, write_tar, encoded_image, spec):
    import tarfile

    path = write_tar(tmp_path / "set.tar", [(f"{n}.jpg", encoded_image(n)) for n in range(4)])
    with tarfile.open(path) as tar:
        items = [
            Item(member.name, ImageRef(str(path), member.offset_data, member.size, member.name), n)
            for n, member in enumerate(tar.getmembers())
        ]
    batches = iter(loader({"a": Stream(items, 4)}, spec))
    assert sorted(next(batches)["labels"].tolist()) == [0, 1, 2, 3]
    path.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        next(batches)


def test_teachers_get_the_same_view_at_their_own_size(make_items, spec):
    same = ImageSpec(size=spec.size, mean=(0.1, 0.1, 0.1), std=(1.0, 1.0, 1.0))
    own = ImageSpec(size=(12, 20), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    items = make_items(3)
    batch = take(loader({"a": Stream(items, 3)}, spec, teacher_specs=[same, own, own]), 1)[0]
    assert batch["teacher_images"][0] is None
    assert torch.equal(batch["teacher_images"][1], batch["teacher_images"][2])
    key = batch["keys"][1]
    view = VIEWS.draw(40, 30, random.Random(f"7/{key}/0"))
    image = decode(next(item for item in items if item.key == key).image.read())
    assert torch.equal(batch["teacher_images"][1][1], normalise([render(image, view, own)], own)[0])


def test_interpolation_of_the_views_is_the_teachers_too(make_items, spec):
    """Student and teacher look at one picture: nothing is rendered twice for another filter."""
    assert spec.interpolation == "bicubic"
    teacher = ImageSpec(size=spec.size, mean=(0.1, 0.1, 0.1), std=(1.0, 1.0, 1.0), interpolation="bicubic")
    smaller = ImageSpec(size=(12, 20), mean=(0.1, 0.1, 0.1), std=(1.0, 1.0, 1.0))
    cfg = LabelledDataConfig(interpolation="bilinear", workers=0)
    items = make_items(2)
    built = build_labelled_loader(
        cfg, {"a": Stream(items, 2)}, seed=7, rank=0, world_size=1, image_spec=spec, teacher_specs=[teacher, smaller]
    )  # fmt: skip
    batch = take(built, 1)[0]
    assert batch["teacher_images"][0] is None
    item = next(item for item in items if item.key == batch["keys"][0])
    view = view_config(cfg).draw(40, 30, random.Random(f"7/{item.key}/0"))
    seen = render(decode(item.image.read()), view, replace(smaller, interpolation="bilinear"))
    assert torch.equal(batch["teacher_images"][1][0], normalise([seen], smaller)[0])


def test_impossible_streams_are_refused(make_items, spec):
    items = make_items(3)
    with pytest.raises(UserError, match="stream a has no images"):
        loader({"a": Stream([], 2)}, spec)
    with pytest.raises(UserError, match=r"stream a has 3 images .* 2 rank.s. x 1 .* give a multiple of 2"):
        loader({"a": Stream(items, 3)}, spec, world_size=2)
    with pytest.raises(UserError, match="at least one stream"):
        loader({}, spec)


def test_a_config_builds_the_loader(make_items, spec):
    cfg = LabelledDataConfig(
        crop_scale=[0.7, 1.0], color_jitter=0.3, hue=0.3, grayscale=0.1, interpolation="bilinear", workers=0
    )
    assert view_config(cfg) == ViewConfig((0.7, 1.0), (0.75, 4 / 3), 0.5, 0.3, 0.3, 0.1)
    streams = {"a": Stream(make_items(4), 4)}
    batch = take(build_labelled_loader(cfg, streams, seed=1, rank=0, world_size=1, image_spec=spec), 1)[0]
    bilinear = ImageSpec(size=spec.size, mean=spec.mean, std=spec.std, interpolation="bilinear")
    expected = take(
        loader(streams, bilinear, views=view_config(cfg), seed=1),
        1,
    )[0]
    assert torch.equal(batch["images"], expected["images"])
    with pytest.raises(UserError, match="data.teacher_view =clean needs data.teacher_outputs"):
        LabelledDataConfig(teacher_view="clean")
