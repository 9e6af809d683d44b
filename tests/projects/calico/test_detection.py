"""NDS, mAP and errors equal nuscenes-devkit's; the official results format, written and refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from projects.calico.evaluation.detection import (
    ERRORS,
    NUSCENES,
    Boxes,
    Scores,
    attributes_of,
    evaluate,
    read_submission,
    write_submission,
)
from projects.calico.readers.nuscenes import CLASS_OF, Tables, info_record, truth
from tests.projects.calico import tiny_nuscenes
from vlmkd.errors import UserError

GOLDEN = json.loads((Path(__file__).parents[2] / "golden/nuscenes_devkit.json").read_text())
NAMES = {name: CLASS_OF[name] for name in tiny_nuscenes.CATEGORIES if name in CLASS_OF}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_nuscenes.write(tmp_path_factory.mktemp("nuscenes"))


@pytest.fixture(scope="module")
def val(root: Path) -> list[dict[str, Any]]:
    tables = Tables(root, tiny_nuscenes.VERSION)
    scenes = tables.scenes()
    return [info_record(tables, one) for name in ("scene-0103", "scene-0916") for one in scenes[name]]


@pytest.mark.parametrize("seed", range(len(GOLDEN["scores"])))
def test_scores_equal_the_devkits(root: Path, val: list[dict[str, Any]], tmp_path: Path, seed: int) -> None:
    """Ties, unknown velocities, missing attributes and classes, racks and ranges: from the tables to NDS."""
    file = tmp_path / "results.json"
    file.write_text(json.dumps(tiny_nuscenes.detections(root, seed, NAMES)))
    true, ego, racks = truth(val)
    found = evaluate(read_submission(file, [one["token"] for one in val]), true, ego=ego, racks=racks)
    expected = GOLDEN["scores"][seed]
    assert found.nds == pytest.approx(expected["nds"], abs=1e-6)
    assert found.mean_ap == pytest.approx(expected["map"], abs=1e-6)
    assert list(found.errors.values()) == pytest.approx(expected["errors"], abs=1e-6)
    for name, (ap, errors) in expected["classes"].items():
        assert list(found.classes[name].ap.values()) == pytest.approx(ap, abs=1e-6)
        nan = [math.nan if value is None else value for value in errors]
        assert list(found.classes[name].errors.values()) == pytest.approx(nan, abs=1e-6, nan_ok=True)


def boxes(rows: list[dict[str, Any]], *, truth: bool = False) -> Boxes:
    """Cars at (x, 0) of given scores, one sample each unless `sample` says."""
    samples: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        samples.setdefault(row.get("sample", 0), []).append(row)
    return Boxes.stack(
        [
            (
                [
                    [row["x"], row.get("y", 0), 0, 4, 2, 1.5, row.get("yaw", 0), *row.get("v", (0, 0))]
                    for row in own
                ],
                [row.get("name", "car") for row in own],
                None if truth else [row["score"] for row in own],
                [row.get("attribute", "") for row in own],
                [row.get("points", 1) for row in own] if truth else None,
            )
            for own in (samples.get(sample, []) for sample in range(max(samples, default=-1) + 1))
        ],
        truth=truth,
    )


def score(predicted: list[dict[str, Any]], true: list[dict[str, Any]], *classes: str) -> Scores:
    return evaluate(
        boxes(predicted), boxes(true, truth=True), {name: NUSCENES[name] for name in classes or ("car",)}
    )


CARS = [{"x": float(x), "attribute": "vehicle.parked"} for x in range(0, 40, 5)]


def test_perfect_and_all_zero_scores() -> None:
    perfect = score([{**car, "score": 0.1 + 0.01 * n} for n, car in enumerate(CARS)], CARS)
    assert perfect.metrics() == pytest.approx(
        {"nds": 1, "map": 1, "ate": 0, "ase": 0, "aoe": 0, "ave": 0, "aae": 0}
    )
    zero = score([{**car, "score": 0.0} for car in CARS], CARS)
    assert zero.errors == dict.fromkeys(ERRORS, 1.0)
    assert (zero.mean_ap, zero.nds) == pytest.approx((1.0, 0.5))


def test_ties_are_taken_in_reverse_order() -> None:
    """Of two equal scores the later one comes first: when it is wrong, precision rises from 0 to 1/2, else it falls from 1."""
    wrong, right = {"x": 30.0, "y": 20.0, "score": 0.5}, {"x": 0.0, "score": 0.5}
    found = [score(rows, [{"x": 0.0}]).classes["car"].ap[2.0] for rows in ([right, wrong], [wrong, right])]
    rising = np.clip(0.5 * np.linspace(0, 1, 101)[11:] - 0.1, 0, None).mean() / 0.9
    assert found == pytest.approx([rising, (89 * 0.9 + 0.4) / 90 / 0.9])


def test_the_nearest_free_box_is_taken_or_none() -> None:
    """The second prediction's nearest free box is 3 m off: false at 2 m, right at 4 m; the first took the near one."""
    found = score([{"x": 0.0, "score": 0.9}, {"x": 0.2, "score": 0.8}], [{"x": 0.1}, {"x": 3.2}])
    matched = found.classes["car"]
    assert matched.ap[4.0] == pytest.approx(1.0)
    assert matched.ap[2.0] == pytest.approx(
        np.clip(np.interp(np.linspace(0, 1, 101), [0.5, 0.5], [1, 0.5], right=0)[11:] - 0.1, 0, None).mean()
        / 0.9
    )


def test_unknown_velocity_and_attribute_do_not_count() -> None:
    cars = [dict(car) for car in CARS]
    cars[0]["v"], cars[1]["attribute"] = (math.nan, math.nan), ""
    predicted = [
        {**car, "score": 0.9 - 0.01 * n, "v": (3.0, 4.0), "attribute": "vehicle.moving"}
        for n, car in enumerate(CARS)
    ]
    found = score(predicted, cars)
    # Nothing is known of the first by score, which counts as an error of 0 until the second.
    recall = np.linspace(0, 1, 101)[11:]
    confidence = np.interp(recall, np.arange(1, 9) / 8, 0.9 - 0.01 * np.arange(8))
    assert found.errors["ave"] == pytest.approx(
        np.interp(0.9 - confidence, 0.01 * np.arange(8), [0] + [5] * 7).mean()
    )
    assert found.errors["aae"] == pytest.approx(1.0)
    nothing = score(predicted, [{**car, "v": (math.nan, math.nan), "attribute": ""} for car in CARS])
    assert (nothing.errors["ave"], nothing.errors["aae"]) == (1.0, 1.0)


def test_absent_classes_score_zero_unless_left_out() -> None:
    predicted = [{**car, "score": 0.9 - 0.01 * n} for n, car in enumerate(CARS)]
    whole = evaluate(boxes(predicted), boxes(CARS, truth=True))
    assert whole.mean_ap == pytest.approx(0.1)
    assert whole.errors["ate"] == pytest.approx(0.9)
    assert score(predicted, CARS).mean_ap == pytest.approx(1.0)


def test_barriers_have_no_front_and_cones_no_direction() -> None:
    row = [{"x": float(x), "name": name} for name in ("barrier", "traffic_cone") for x in range(0, 25, 3)]
    found = score(
        [{**one, "score": 0.5 + 0.01 * n, "yaw": math.pi + 0.1} for n, one in enumerate(row)],
        row,
        "barrier",
        "traffic_cone",
    )
    assert found.classes["barrier"].errors["aoe"] == pytest.approx(0.1)
    assert math.isnan(found.classes["traffic_cone"].errors["aoe"])
    assert found.errors["aoe"] == pytest.approx(0.1)
    assert found.details()["traffic_cone"]["errors"]["aoe"] is None
    json.dumps(found.details(), allow_nan=False)


def test_range_points_and_racks_filter() -> None:
    kept = score(
        [{"x": 49.9, "score": 0.9}, {"x": 50.0, "score": 0.8}],
        [{"x": 49.9}, {"x": 50.0}, {"x": 10.0, "points": 0}],
    ).classes["car"]
    assert (kept.num_truth, kept.num_predictions) == (1, 1)
    rack = Boxes.stack([([[10, 0, 0, 6, 2, 2, math.pi / 2]], ["rack"], None, None, None)], truth=True)
    rows = [
        {"x": 10.0, "y": 2.9, "name": "bicycle"},
        {"x": 12.0, "y": 0.0, "name": "bicycle"},
        {"x": 10.0, "name": "car"},
    ]
    found = evaluate(boxes([]), boxes(rows, truth=True), racks=rack).classes
    assert (found["bicycle"].num_truth, found["car"].num_truth) == (1, 1)
    moved = evaluate(boxes([]), boxes([{"x": 149.0}, {"x": 10.0}], truth=True), ego=np.array([[100.0, 0.0]]))
    assert moved.classes["car"].num_truth == 1


def test_nothing_predicted_and_nothing_true() -> None:
    empty = evaluate(boxes([]), boxes([], truth=True))
    assert (empty.nds, empty.mean_ap) == (0, 0)
    assert set(empty.errors.values()) == {1.0}


def test_attributes_by_class_and_speed() -> None:
    names = ["car", "bus", "bus", "pedestrian", "bicycle", "barrier", "trailer"]
    speed = np.array([[0, 0.1], [0.1, 0], [1, 0], [0, 0], [0.2, 0.2], [3, 3], [np.nan, 0]])
    assert attributes_of(names, speed) == [
        *(
            "vehicle.parked",
            "vehicle.stopped",
            "vehicle.moving",
            "pedestrian.standing",
            "cycle.with_rider",
            "",
            "vehicle.parked",
        )
    ]


def test_a_written_file_reads_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sizes = (3, 0, 600)
    made = Boxes.stack(
        (
            rng.uniform(0.5, 3, (size, 9)),
            rng.choice(list(NUSCENES), size).tolist(),
            rng.random(size),
            None,
            None,
        )
        for size in sizes
    )
    file = tmp_path / "results.json"
    write_submission(file, made, ["a", "b", "c"], camera=True, lidar=True)
    meta = json.loads(file.read_text())["meta"]
    assert meta == {
        "use_camera": True,
        "use_lidar": True,
        "use_radar": False,
        "use_map": False,
        "use_external": False,
    }
    found = read_submission(file, ["a", "b", "c"])
    assert np.bincount(found.sample).tolist() == [3, 0, 500]
    best = made.pick(np.argsort(-np.where(made.sample == 2, made.score, -1), kind="stable")[:500])
    assert np.allclose(found.box[3:], best.box, atol=1e-12) and (found.name[3:] == best.name).all()
    assert (found.score[3:] == best.score).all()


GOOD = {
    "sample_token": "a", "translation": [1.0, 2, 3], "size": [1.0, 2, 3], "rotation": [1.0, 0, 0, 0],
    "velocity": [math.nan, 0.0], "detection_name": "car", "detection_score": 0.5, "attribute_name": "",
}  # fmt: skip


def _change(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda results: results["a"][0].update(fields)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (_change(detection_name="cart"), "sample a has the unknown class 'cart'; did you mean car"),
        (_change(attribute_name="parked"), "unknown attribute 'parked'"),
        (
            _change(translation=[1.0, math.nan, 0]),
            "translation [1.0, nan, 0]; only velocities may be unknown",
        ),
        (_change(detection_score=math.nan), "detection_score nan"),
        (_change(size=[1.0, 0.0, 1.0]), "sizes are positive"),
        (_change(rotation=[0.0, 0, 0, 0]), "a quaternion is not 0"),
        (_change(velocity=[0.0]), "needs 2 numbers as velocity"),
        (_change(detection_score=True), "needs 1 number as detection_score"),
        (_change(sample_token="b"), "whose sample_token is its own"),
        (lambda results: results["a"].append(3), "a box of sample a is no object"),
        (lambda results: results["a"].extend([GOOD] * 500), "sample a has 501 boxes, more than 500"),
        (lambda results: results.pop("b"), "lacks 1 samples, first b; it must have each of the 2"),
        (lambda results: results.update(c=[]), "has unknown 1 samples, first c"),
        (lambda results: results.update(b=3), "sample b has no list of boxes"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, damage: Callable[[dict[str, Any]], Any], told: str) -> None:
    results: dict[str, Any] = {"a": [dict(GOOD)], "b": []}
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"meta": {}, "results": results}))
    assert len(read_submission(file, ["a", "b"])) == 1
    damage(results)
    file.write_text(json.dumps({"meta": {}, "results": results}))
    with pytest.raises(UserError) as caught:
        read_submission(file, ["a", "b"])
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_of_something_else_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(UserError, match="lacks 'meta' or 'results'"):
        read_submission(tmp_path / "x.json", [])
