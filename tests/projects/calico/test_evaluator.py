"""The evaluation of a run against a predictor that knows the answers, on the toy world and on nuScenes' form."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from projects.calico import nuscenes_infos
from projects.calico.config import CalicoConfig
from projects.calico.evaluation.detection import NUSCENES, read_submission
from projects.calico.evaluation.detection import evaluate as score
from projects.calico.evaluation.frames import SceneEvaluation, ranges_of, scene_evaluation
from projects.calico.evaluation.robust import corrupt
from projects.calico.networks.boxes import Detections
from projects.calico.pipeline import ContrastPipeline, SceneItem
from projects.calico.readers.mmdet3d import nuscenes_record, read_infos
from projects.calico.readers.nuscenes import NuScenesFrames, truth
from projects.calico.scenes import Frame, Labels
from tests.projects.calico import tiny_nuscenes
from tests.projects.calico.frames import FRAMES, needs_frames
from tests.projects.calico.toy import TOY as TOY_CONFIGS
from tests.projects.calico.toy import TOY_MODEL as TOY
from tests.projects.calico.toy import load, scenes
from vlmkd import config
from vlmkd.data.samples import RawSample
from vlmkd.errors import UserError
from vlmkd.evaluation.base import Context, Result


class Oracle:
    """Gives the labels of a batch as its predictions, moved aside by `offset` metres."""

    def __init__(self, offset: float = 0.0, keep: float = 1.0) -> None:
        self.offset, self.keep, self.sizes = offset, keep, []

    def predict(self, batch: dict[str, Any]) -> tuple[list[Detections], torch.Tensor | None]:
        self.sizes.append(len(batch["keys"]))
        frames = []
        for boxes, labels in zip(batch["boxes"], batch["labels"], strict=True):
            moved = boxes.clone()
            moved[:, 0] += self.offset
            kept = torch.arange(len(boxes)) < round(self.keep * len(boxes))
            frames.append(Detections(moved[kept], torch.full((int(kept.sum()),), 0.9), labels[kept]))
        masks = batch["masks"].float() if "masks" in batch else None
        return frames, masks


def run(evaluation: SceneEvaluation, predictor: Oracle, size: int = 3) -> dict[str, Result]:
    return {one.name: one for one in evaluation.run(predictor, Context(batch_size=size, progress=False))}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes(tmp_path_factory.mktemp("scenes") / "data", 8)


def test_who_knows_the_answers_has_full_marks(data: Path) -> None:
    cfg = load(data, "finetune", evaluation__info=data)
    oracle = Oracle()
    found = run(scene_evaluation(cfg), oracle)
    assert set(found) == {"detection", "map"} and oracle.sizes == [3, 3, 2]
    scores = found["detection"].metrics
    assert found["detection"].count == 8 and scores["map"] == pytest.approx(1.0)
    assert scores["ate"] == scores["ave"] == pytest.approx(0, abs=1e-6) and scores["aae"] == 1.0
    assert scores["nds"] == pytest.approx(0.9, abs=1e-5)  # no attributes there
    assert found["map"].metrics["miou"] == pytest.approx(1, abs=1e-6)
    assert found["detection"].meanings["ap_car"].unit == "share" and found["map"].meanings["miou"].main
    aside = run(scene_evaluation(cfg), Oracle(offset=0.7))["detection"].metrics
    assert aside["map"] == pytest.approx(0.75, abs=0.02) and aside["ate"] == pytest.approx(0.7, abs=1e-4)
    half = run(scene_evaluation(cfg), Oracle(keep=0.5))["detection"].metrics
    assert 0.2 < half["map"] < 0.7


def test_frames_and_classes_may_be_fewer(data: Path) -> None:
    cfg = load(data, "finetune", evaluation__info=data, evaluation__frames=3, evaluation__classes="[car]")
    found = run(scene_evaluation(cfg), Oracle())["detection"]
    assert found.count == 3 and [name for name in found.metrics if name.startswith("ap_")] == ["ap_car"]
    assert list(scene_evaluation(cfg).indices) == [3, 6, 7]  # the same draw always
    with pytest.raises(UserError, match="evaluation.classes has tram; the model knows car"):
        scene_evaluation(load(data, "finetune", evaluation__info=data, evaluation__classes="[tram]"))


def test_damage_is_done_before_the_model_sees_a_frame(data: Path) -> None:
    cfg = load(data, "finetune", evaluation__info=data, evaluation__frames=1)
    seen = []

    class Looks(Oracle):
        def predict(self, batch: dict[str, Any]) -> tuple[list[Detections], torch.Tensor | None]:
            seen.append(len(batch["lidar"][0].points))
            return super().predict(batch)

    for change in (None, lambda frame: corrupt(frame, "density", 5)):
        run(replace(scene_evaluation(cfg), change=change), Looks())
    assert seen[1] == pytest.approx(0.7 * seen[0], abs=1)


def test_true_boxes_beyond_the_map_do_not_count(data: Path) -> None:
    cfg = load(data, "finetune", evaluation__info=data)

    def with_one_more(frame: Frame) -> Frame:
        labels = frame.labels
        assert labels is not None
        far = np.array([[19.4, 3, 0, 4, 2, 1.5, 0, 0, 0]], np.float32)  # the map ends at 19.2
        names, counts = (*labels.names, "car"), np.append(labels.num_points, 50)
        more = Labels(np.concatenate([labels.boxes, far]), names, counts, masks=labels.masks)
        return replace(frame, labels=more)

    plain = scene_evaluation(cfg)
    found = [run(one, Oracle())["detection"] for one in (plain, replace(plain, change=with_one_more))]
    assert found[0].metrics == found[1].metrics and found[1].metrics["map"] == pytest.approx(1.0)


# ----------------------------------------------------------------------------------------------------------- nuScenes


@pytest.fixture(scope="module")
def nuscenes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Root and info file of a small data set of its form."""
    root = tiny_nuscenes.write(tmp_path_factory.mktemp("nuscenes"))
    info = tmp_path_factory.mktemp("infos") / "val.jsonl"
    for camera in tiny_nuscenes.CAMERAS:
        (root / "samples" / camera).mkdir()
        for scene in tiny_nuscenes.SCENES:
            for k in range(tiny_nuscenes.SAMPLES):
                Image.new("RGB", (1600, 900)).save(root / f"samples/{camera}/{scene}_{k}.jpg", quality=1)
    nuscenes_infos.build(root, info, "v1.0-mini", "mini_val")
    return root, info


def nuscenes_config(root: Path, info: Path, *fields: str) -> CalicoConfig:
    given = [
        f"data.info={info}", f"data.root={root}", f"evaluation.info={info}", f"evaluation.data_root={root}", "run_dir=r",
        "model.camera.pretrained=false", "model.camera.encoder=none", "data.info=" + str(info), "stage=finetune",
    ]  # fmt: skip
    return config.load(CalicoConfig, [*given, *fields])


def test_nuscenes_is_scored_in_the_world_by_its_own_rules(
    nuscenes: tuple[Path, Path], tmp_path: Path
) -> None:
    """Predictions are the boxes that training sees, in the LiDAR's frame; truth is read from the records."""
    cfg = nuscenes_config(*nuscenes)
    evaluation = scene_evaluation(cfg, submission=tmp_path / "boxes.json")
    assert evaluation.ranges == NUSCENES
    found = run(evaluation, Oracle())
    scores = found["detection"].metrics
    classes = [name for name, one in found["detection"].details["classes"].items() if one["num_truth"]]
    assert len(classes) > 4
    assert scores["map"] == pytest.approx(len(classes) / 10, abs=0.02)  # a class that is absent has AP 0
    per_class = [found["detection"].details["classes"][name]["errors"] for name in classes]
    for error in ("ate", "ase", "aoe"):
        assert all(one[error] is None or one[error] < 0.01 for one in per_class), error
    assert found["map"].metrics["miou"] > 0.1 and found["map"].count == len(evaluation.indices)
    tokens = [evaluation.pipeline.frames.tokens[index] for index in evaluation.indices]
    again = read_submission(tmp_path / "boxes.json", tokens)
    details = found["detection"].details["classes"]
    true, ego, racks = truth([evaluation.pipeline.frames.records[index] for index in evaluation.indices])
    assert score(again, true, ego=ego, racks=racks).details() == details
    own = evaluation.of_file(tmp_path / "boxes.json")
    assert own.metrics == found["detection"].metrics and own.count == found["detection"].count
    # What a user's file may have wrong is told by the command that reads it.
    content = json.loads((tmp_path / "boxes.json").read_text())
    first = next(token for token in tokens if content["results"][token])
    box = content["results"][first][0]
    for boxes, told in (
        ([box] * 501, "501 boxes, more than 500"),
        ([box | {"detection_name": "tram"}], "'tram'"),
    ):
        (tmp_path / "wrong.json").write_text(
            json.dumps(content | {"results": content["results"] | {first: boxes}})
        )
        with pytest.raises(UserError, match=told):
            evaluation.of_file(tmp_path / "wrong.json")
    del content["results"][first]
    (tmp_path / "wrong.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"lacks 1 samples, first {first}"):
        evaluation.of_file(tmp_path / "wrong.json")
    assert json.loads((tmp_path / "boxes.json").read_text())["meta"]["use_lidar"]


def test_ranges_of_other_data_sets_cover_the_whole_map(data: Path) -> None:
    ranges = ranges_of(TOY, load(data, "finetune").evaluation, "synthdrive")
    assert set(ranges) == set(TOY.classes) and min(ranges.values()) == pytest.approx(19.2 * 2**0.5)
    with pytest.raises(UserError, match="cyclist, which nuScenes does not score"):
        ranges_of(TOY, replace(load(data, "finetune").evaluation, classes=["cyclist"]), "nuscenes")
    assert set(ranges_of(TOY, replace(load(data, "finetune").evaluation, classes=["cyclist"]), "waymo")) == {
        "cyclist"
    }
    with pytest.raises(
        UserError, match="evaluation.classes has car, which Waymo does not score; it scores vehicle"
    ):
        ranges_of(TOY, load(data, "finetune").evaluation, "waymo")


@needs_frames
def test_the_real_frame_goes_through_the_stages_before_fine_tuning() -> None:
    """1024 points of regions and as many of none, in both views, and for distillation in a picture."""
    base = TOY_CONFIGS.parent / "nuscenes"
    frames = NuScenesFrames(
        [nuscenes_record(read_infos(FRAMES / "nuscenes/info.json"), folders=False)],
        FRAMES / "nuscenes",
        0,
    )
    item = SceneItem("f", 0)
    for stage in ("prc", "rad"):
        cfg = config.load(
            CalicoConfig,
            [str(base / "base.yaml"), str(base / f"{stage}.yaml"), "regions.cache=", "data.sweeps=0"],
        )
        sample = ContrastPipeline(cfg, frames).process(RawSample("", "f", item=item, seed="0"))
        assert sample.region is not None
        assert len(sample.region) == 2048 and int((sample.region >= 0).sum()) == 1024
        assert len(sample.region.unique()) > 40 and sample.boxes is None
        assert all(float(places.abs().max()) < 51.2 for places in sample.places)
        assert (sample.cameras is not None) == (stage == "rad")
    assert sample.cameras is not None and sample.cameras.images.shape == (6, 3, 256, 704)
    assert np.isfinite(sample.cameras.images.numpy()).all()
