"""From frames to batches: no labels before fine-tuning, one augmentation for all, samples that both views hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from projects.calico.balance import PasteDatabase
from projects.calico.build import chosen, items_of, job
from projects.calico.config import CalicoConfig, SceneDataConfig
from projects.calico.frames import open_frames
from projects.calico.geometry import Grid, in_image, lidar_augmentation, points_in_boxes, project, transform
from projects.calico.model import BevModel
from projects.calico.networks.lss import depth_images
from projects.calico.pipeline import (
    ContrastPipeline,
    LabelledPipeline,
    SceneItem,
    SceneSample,
    camera_input,
    generator,
    moved_masks,
)
from projects.calico.readers.nuscenes import NuScenesFrames
from projects.calico.region_cache import RegionCache
from projects.calico.region_cache import build as build_regions
from projects.calico.regions import preset_of
from projects.calico.scenes import Camera, Frame, Labels
from projects.calico.synthdrive import generate
from tests.projects.calico.toy import TOY_MODEL as TOY
from tests.projects.calico.toy import load, scenes
from vlmkd.data.samples import RawSample
from vlmkd.errors import UserError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes(tmp_path_factory.mktemp("scenes") / "data")


def sample(cfg: CalicoConfig, index: int = 0, turn: int = 0, **given: Any) -> SceneSample:
    frames = open_frames(Path(cfg.data.info), sweeps=0)
    pipeline = (LabelledPipeline if cfg.stage == "finetune" else ContrastPipeline)(cfg, frames, **given)
    item = SceneItem(frames.tokens[index], index)
    return pipeline.process(RawSample("", item.key, item=item, seed=f"0/{item.key}/{turn}", turn=turn))


def within(value: Any) -> Iterator[Any]:
    """The value and all that it holds."""
    yield value
    if isinstance(value, dict):
        parts: Any = value.values()
    elif isinstance(value, list | tuple):
        parts = value
    else:
        parts = (
            vars(value).values() if hasattr(value, "__dict__") and not isinstance(value, torch.Tensor) else ()
        )
    for part in parts:
        yield from within(part)


@pytest.mark.parametrize("stage", ["prc", "rad"])
def test_pretraining_never_holds_a_label(data: Path, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames are read without labels, batches have none, and nothing that the run holds is or has any."""
    asked = []
    cls = type(open_frames(data))
    before = cls.read

    def read(self: Any, index: int, *, labels: bool = False, cameras: bool = True) -> Frame:
        asked.append(labels)
        return before(self, index, labels=labels, cameras=cameras)

    monkeypatch.setattr(cls, "read", read)
    monkeypatch.setattr(Labels, "__post_init__", lambda self: pytest.fail("labels were made"))
    run = job(load(data, stage, **({"rad__teacher_ckpt": "untrained"} if stage == "rad" else {})))
    batch = next(iter(run.loader))
    assert asked and not any(asked) and not run.evaluators
    assert set(batch) == {"keys", "lidar", "places", "region", "dropped_points", "positions"} | (
        {"cameras"} if stage == "rad" else set()
    )
    for held in (batch, run.loader.pipeline):
        assert not [one for one in within(held) if isinstance(one, Labels)]
    assert run.task.tags()["labels"] == "none"


def test_fields_that_would_read_labels_are_refused_or_told(data: Path) -> None:
    with pytest.raises(UserError, match="data.paste and data.balance need labels, which stage=prc does not"):
        load(data, "prc", data__balance="true")
    cfg = load(data, "rad", rad__teacher_ckpt="untrained", rad__weight="centre")
    assert cfg.reads_labels and sample(cfg).boxes is not None


def test_both_views_have_the_same_points_sampled(data: Path) -> None:
    cfg = load(data, "prc", prc__n_rich=60, prc__n_less=40)
    found = sample(cfg)
    frame = generate(0)
    assert found.region is not None
    rich = found.region >= 0
    assert rich[:60].all() and not rich[60:].any() and len(rich) == 100
    origins = []
    for view, places in zip(found.views, found.places, strict=True):
        assert 0.8 * len(frame.points) < len(view.points) < 0.95 * len(frame.points)  # a tenth is dropped
        apart = torch.cdist(places, view.points[:, :2], compute_mode="donot_use_mm_for_euclid_dist")
        assert (apart.amin(1) == 0).all()  # those that are sampled never are
        flat = torch.cat([places, torch.zeros(len(places), 1)], 1).double()
        origins.append(transform(flat, torch.linalg.inv(view.lidar_aug))[:, :2])
    torch.testing.assert_close(origins[0], origins[1], rtol=0, atol=1e-4)
    first, second = (view.lidar_aug for view in found.views)
    assert not torch.allclose(first, second)
    sizes = [float(view.lidar_aug[:3, :3].det().abs() ** (1 / 3)) for view in found.views]
    assert all(0.9 <= size <= 1.1 for size in sizes)
    # They are points of the sweep, each once but for those that stand on one another.
    apart = torch.cdist(origins[0], torch.from_numpy(frame.points[:, :2]).double())
    assert apart.amin(1).max() < 1e-4 and len(apart.argmin(1).unique()) > 96


def test_cached_regions_are_those_that_are_found(data: Path, tmp_path: Path) -> None:
    build_regions(data, RegionCache(tmp_path / "cache", preset_of("default")))
    plain, cached = (load(data, "prc", regions__cache=path) for path in ("", tmp_path / "cache"))
    for one, two in zip(vars(sample(plain)).values(), vars(sample(cached)).values(), strict=True):
        assert all(
            torch.equal(a, b)
            for a, b in zip(within(one), within(two), strict=True)
            if isinstance(a, torch.Tensor)
        )
    other = load(data, "prc", regions__cache=tmp_path / "cache", regions__preset="prototype")
    with pytest.raises(UserError, match="made with another preset: .*set regions.preset to that one"):
        sample(other)
    with pytest.raises(UserError, match="does not exist.*region_cache"):
        sample(load(data, "prc", regions__cache=tmp_path / "none"))


def test_samples_of_distillation_lie_in_a_picture(data: Path) -> None:
    cfg = load(data, "rad", rad__teacher_ckpt="untrained", data__image_rotation=5, data__image_flip="true")
    found = sample(cfg, index=1)
    assert found.cameras is not None and len(found.places) == 1 and len(found.places[0]) == 96
    cameras, view = found.cameras, found.views[0]
    row = torch.cdist(found.places[0], view.points[:, :2]).argmin(1)
    pixels, depth = project(
        view.points[row, :3].double()[None],
        torch.linalg.inv(cameras.cam2lidar)[None],
        cameras.intrinsics[None],
        cameras.img_aug[None],
        view.lidar_aug[None],
    )
    assert in_image(pixels, depth, (40, 80))[0].any(0).all()
    # Before the augmentations they are seen by the same cameras at the places that these were taken to.
    origin = transform(view.points[row, :3].double(), torch.linalg.inv(view.lidar_aug))
    plain, far = project(origin[None], torch.linalg.inv(cameras.cam2lidar)[None], cameras.intrinsics[None])
    moved = transform(torch.cat([plain, far[..., None]], -1)[0], cameras.img_aug)
    torch.testing.assert_close(moved[..., :2], pixels[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_a_picture_goes_where_its_matrix_says(seed: int) -> None:
    """A white square stays where the matrix takes its middle, through resizing, cropping, mirroring and turning."""
    draw = np.random.default_rng(seed)
    image = np.zeros((450, 800, 3), np.uint8)
    u, v = draw.integers(250, 550), draw.integers(250, 350)
    image[v - 8 : v + 8, u - 8 : u + 8] = 255
    camera = Camera(image, np.eye(3), np.eye(4))
    frame = Frame("f", "s", "nuscenes", np.zeros((1, 5), np.float32), np.ones(1, bool), {"a": camera})
    data = SceneDataConfig(image_resize=[0.7, 1.0], image_rotation=5.4, image_flip=True, eval_resize=0.8)
    for chance in (None, np.random.default_rng(seed)):
        found = camera_input(frame, (256, 520), data, chance)
        light = found.images[0].mean(0) - found.images[0].mean(0).amin()
        rows, columns = torch.meshgrid(torch.arange(256.0), torch.arange(520.0), indexing="ij")
        middle = [float((light * axis).sum() / light.sum()) for axis in (columns, rows)]
        wanted = transform(torch.tensor([[u - 0.5, v - 0.5, 1.0]]).double(), found.img_aug[0])[0, :2]
        assert torch.tensor(middle).sub(wanted).abs().max() < 1.0
    assert found.images.shape == (1, 3, 256, 520)


def test_the_nuscenes_crop_is_the_published_one() -> None:
    """900 x 1600 at 0.48, cropped 32 pixels from the left and 176 from the top."""
    camera = Camera(np.zeros((900, 1600, 3), np.uint8), np.eye(3), np.eye(4))
    frame = Frame("f", "s", "nuscenes", np.zeros((1, 5), np.float32), np.ones(1, bool), {"a": camera})
    matrix = camera_input(frame, (256, 704), SceneDataConfig(), None).img_aug[0]
    assert matrix[:2, 3].tolist() == [-32, -176] and matrix[0, 0] == matrix[1, 1] == 0.48


def test_boxes_and_maps_move_with_the_points(data: Path) -> None:
    """Under rotation, flips, scale and shift: as many points in each box, and under each point the same layer."""
    cfg = load(data, "finetune", data__fraction=100)
    found, frame = sample(cfg, index=2, turn=3), generate(2)
    assert found.boxes is not None and found.labels is not None and found.masks is not None
    aug = found.views[0].lidar_aug
    assert abs(float(aug[:3, :3].det()) ** 2 - 1) > 1e-3 and aug[:3, 3].abs().min() > 0
    labels = frame.labels
    assert labels is not None
    middles = transform(torch.from_numpy(labels.boxes[:, :3]), aug)
    own = [int(torch.cdist(box[None, :3], middles).argmin()) for box in found.boxes]
    before = points_in_boxes(frame.points, labels.boxes).sum(0)[own]
    after = points_in_boxes(found.views[0].points, found.boxes).sum(0)
    assert (before - after).abs().max() <= 1 and len(own) > 4  # one on a face may be rounded off it
    assert [TOY.classes[label] for label in found.labels] == [labels.names[row] for row in own]
    grid, low = Grid((-19.2, -19.2, -10), (19.2, 19.2, 10), (0.4, 0.4, 20.0)), -19.2
    cells, inside = grid.index(found.views[0].points[:, :2])
    back = transform(found.views[0].points[:, :3].double(), torch.linalg.inv(aug))[:, :2]
    there = torch.floor((back - low) / 0.4).long()
    inside &= ((there >= 0) & (there < 96)).all(1)
    for layer, name in enumerate(TOY.map_classes):
        drawn = torch.from_numpy(labels.masks[name])[there[inside, 0], there[inside, 1]]
        seen = found.masks[layer][cells[inside, 0], cells[inside, 1]]
        assert (drawn == seen).float().mean() > 0.93  # the rest lies at borders, in the cells of two grids


def test_a_map_that_is_turned_a_quarter_is_the_turned_picture() -> None:
    grid = Grid((-19.2, -19.2, -10), (19.2, 19.2, 10), (0.4, 0.4, 20.0))
    masks = np.random.default_rng(0).random((3, 96, 96)) < 0.5
    turned = moved_masks(masks, lidar_augmentation(yaw=torch.pi / 2), grid)
    assert np.array_equal(turned, np.rot90(masks, 1, (1, 2)))  # x goes to y
    assert np.array_equal(moved_masks(masks, lidar_augmentation(flip_x=True), grid), masks[:, ::-1])


def test_pasting_ends_with_its_epochs(data: Path) -> None:
    cfg = load(data, "finetune", data__paste_epochs=2)
    frames = open_frames(data)
    read = [frames.read(index, labels=True) for index in range(6)]
    paste = PasteDatabase.of(read, [frame.scene for frame in read])
    cfg = dataclasses.replace(
        cfg, data=dataclasses.replace(cfg.data, rotation=0.0, shift=0.0, scale=[1.0, 1.0])
    )
    sizes = []
    for turn in (0, 1, 2, 5):
        boxes, plain = sample(cfg, turn=turn, paste=paste).boxes, sample(cfg, turn=turn).boxes
        assert boxes is not None and plain is not None
        sizes.append(len(boxes) - len(plain))
    assert min(sizes[:2]) > 0 and sizes[2:] == [0, 0]


def test_frames_are_drawn_by_class_under_names_of_their_own(data: Path) -> None:
    cfg = load(data, "finetune", data__balance="true", data__fraction=100)
    items = items_of(cfg, open_frames(data), range(6))
    assert len({one.key for one in items}) == len(items) > 6
    assert {one.key.split("#")[0] for one in items} <= set(open_frames(data).tokens)


def test_label_fractions_take_whole_drives(data: Path, tmp_path: Path) -> None:
    frames = open_frames(data)
    found = {part: chosen(load(data, "finetune", data__fraction=part), frames)[0] for part in (20, 50, 100)}
    assert found == {20: [0, 5], 50: [0, 2, 4], 100: list(range(6))}
    (tmp_path / "list.txt").write_text("# mine\n000003\n")
    assert chosen(load(data, "finetune", data__split_file=tmp_path / "list.txt"), frames)[0] == [3]
    (tmp_path / "list.txt").write_text("scene-0001\n")
    with pytest.raises(UserError, match="data.split_file: .* lacks 1 of its 1 drives, first scene-0001"):
        chosen(load(data, "finetune", data__split_file=tmp_path / "list.txt"), frames)
    with pytest.raises(UserError, match="data.fraction is 30; it is one of"):
        chosen(load(data, "finetune", data__fraction=30), frames)


def test_a_fraction_needs_drives(data: Path, tmp_path: Path) -> None:
    """Frames whose drives are not told are no drives of their own, but in the toy world."""
    record = {"scene": "", "location": "", "names": []}
    frames = NuScenesFrames([record | {"token": str(number)} for number in range(6)], tmp_path)
    assert chosen(load(data, "finetune", data__fraction=100), frames)[0] == list(range(6))
    with pytest.raises(UserError, match="data.fraction is 50, but .* does not tell the drives of its frames"):
        chosen(load(data, "finetune"), frames)
    (tmp_path / "list.txt").write_text("3\n")
    assert chosen(load(data, "finetune", data__split_file=tmp_path / "list.txt"), frames)[0] == [3]


def test_a_run_on_no_object_of_its_classes_does_not_start(data: Path) -> None:
    fields = {"model__classes": "[tram, boat]", "evaluation__classes": "[tram]"}
    with pytest.raises(
        UserError, match="model.classes are tram, boat, of which .* has none in 3 frames; it has .*car"
    ):
        job(load(data, "finetune", **fields))
    job(load(data, "finetune", model__head__detection="none", **fields))  # maps alone


def test_tokens_are_listed_once_an_epoch(data: Path) -> None:
    """Some readers make the list anew for each call, and a data set has a hundred thousand."""
    frames, calls = open_frames(data), []

    class Counts:
        def __getattr__(self, name: str) -> Any:
            calls.append(name)
            return getattr(frames, name)

    for balance in ("false", "true"):
        items_of(load(data, "finetune", data__balance=balance), Counts(), range(6))  # type: ignore[arg-type]
    assert calls.count("tokens") == 2


def test_generators_are_functions_of_names() -> None:
    assert generator("a", 1).random() == generator("a", 1).random() != generator("a", 2).random()


def test_a_data_set_without_maps_says_so(data: Path) -> None:
    cfg = load(data, "finetune", model__map_classes="[drivable_area]")
    with pytest.raises(UserError, match="no map of the layers drivable_area; set model.head.map=false"):
        sample(cfg)


def test_a_frame_may_lack_cameras_that_others_have(data: Path) -> None:
    """Its map is what it would be by itself; nothing falls into a cell that its missing camera would see."""
    cfg = load(data, "finetune", "camera", data__fraction=100)
    frames = open_frames(data, sweeps=0)
    pipeline = LabelledPipeline(cfg, frames)
    whole, few = (frames.read(index, labels=True) for index in (0, 1))
    few = dataclasses.replace(few, cameras=dict(list(few.cameras.items())[:3]))
    samples = [pipeline.prepare(frame, index) for index, frame in enumerate((whole, few))]
    both, alone = pipeline.collate(samples), pipeline.collate(samples[1:])
    assert both["cameras"].images.shape[:2] == (2, 4) and alone["cameras"].images.shape[:2] == (1, 3)
    torch.manual_seed(0)
    camera = BevModel(cfg.model).eval().camera
    assert camera is not None
    torch.testing.assert_close(camera(both["cameras"])[1], camera(alone["cameras"])[0], rtol=1e-4, atol=1e-5)
    depths = depth_images(both["lidar"][0], both["cameras"])
    assert depths[1, :3].any() and not depths[1, 3].any()


def test_points_that_no_picture_has_are_told(data: Path) -> None:
    found = sample(load(data, "prc", stage="joint"))
    assert found.seen is not None and found.seen.any() and not found.seen.all()
    assert sample(load(data, "prc")).seen is None


def test_pictures_of_files_are_read(tmp_path: Path) -> None:
    Image.fromarray(np.full((40, 80, 3), 255, np.uint8)).save(tmp_path / "a.png")
    camera = Camera(tmp_path / "a.png", np.eye(3), np.eye(4))
    frame = Frame("f", "s", "nuscenes", np.zeros((1, 5), np.float32), np.ones(1, bool), {"a": camera})
    found = camera_input(frame, (40, 80), SceneDataConfig(eval_resize=1.0), None)
    torch.testing.assert_close(
        found.images[0, :, 0, 0],
        (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225]),
    )
