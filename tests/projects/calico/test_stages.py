"""A step of every stage and arm, in this process: what is trained, what is not, and what the losses are."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from projects.calico import export as exports
from projects.calico.build import job
from projects.calico.config import CalicoConfig
from projects.calico.losses import prc_loss, rad_loss
from projects.calico.networks import parts
from projects.calico.networks.parts import rank_share, share_norms
from projects.calico.pretraining import pretrain_losses, samples
from tests.projects.calico.toy import TOY, load, scenes
from vlmkd import config
from vlmkd.errors import UserError
from vlmkd.train.trainer import Job


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes(tmp_path_factory.mktemp("scenes") / "data")


@pytest.fixture(scope="module")
def teacher(data: Path) -> Path:
    """The export of an untrained PRC student."""
    run = job(load(data, "prc", seed=7))
    folder = data.parent / "prc"
    run.task.export(folder, run.task.student.state_dict(), "student")
    return folder


def step(run: Job, batches: int = 1) -> Any:
    """Train so many steps and return the last output."""
    optimiser = torch.optim.AdamW(run.task.student.parameters(), lr=1e-3)
    stream = iter(run.loader)
    for number in range(batches):
        output = run.task.step(next(stream), number)
        optimiser.zero_grad()
        output.loss.backward()
        optimiser.step()
    return output


ARMS: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "prc": ("prc", {}, {"prc"}),
    "plrc": ("prc", {"prc__arm": "plrc"}, {"plrc"}),
    "rapc": ("prc", {"prc__arm": "rapc"}, {"rapc"}),
    "alpha 1": ("prc", {"prc__alpha": 1.0}, {"prc"}),
    "pointcontrast": ("prc", {"prc__arm": "pointcontrast"}, {"pointcontrast"}),
    "box_clip": ("prc", {"prc__arm": "box_clip"}, {"box_clip"}),
    "batch": ("prc", {"prc__negatives": "batch"}, {"prc"}),
    "rad": ("rad", {}, {"rad"}),
    "uniform": ("rad", {"rad__weight": "uniform", "rad__direction": "symmetric"}, {"rad"}),
    "centre": ("rad", {"rad__weight": "centre"}, {"rad"}),
    "mse": ("rad", {"rad__arm": "mse"}, {"mse"}),
    "frozen": ("rad", {"rad__teacher_projector": "frozen_rapc"}, {"rad"}),
    "rad batch": ("rad", {"prc__negatives": "batch"}, {"rad"}),
    "joint": ("prc", {"stage": "joint"}, {"prc", "rad"}),
}


@pytest.mark.parametrize("arm", ARMS)
def test_every_parameter_of_an_arm_learns(data: Path, teacher: Path, arm: str) -> None:
    stage, fields, terms = ARMS[arm]
    if stage == "rad":
        fields = {"rad__teacher_ckpt": teacher, **fields}
    run = job(load(data, stage, **fields))
    output = run.task.step(next(iter(run.loader)), 0)
    assert set(output.terms) == terms and output.loss.isfinite()
    output.loss.backward()
    names = dict(run.task.student.named_parameters())
    assert all(p.grad is not None for p in names.values())
    silent = {name for name, p in names.items() if not p.grad.any()}
    # A bias in front of a norm has no gradient but rounding, and dead units may have none.
    assert not {
        name for name in silent if name.endswith("last.weight") or "backbone" in name and "weight" in name
    }
    assert all(value.isfinite() for value in output.metrics.values())


def test_a_step_of_prc_is_the_loss_of_its_samples(data: Path) -> None:
    """Against the loss of each frame by itself, on features sampled here."""
    run = job(load(data, "prc"))
    batch = next(iter(run.loader))
    student: Any = run.task.student
    output = run.task.step(batch, 0)
    rows = [
        samples(student.model.lidar(view), places, student.model.lidar.grid)
        for view, places in zip(batch["lidar"], batch["places"], strict=True)
    ]
    pairs = {name: [student.projectors[name](view) for view in rows] for name in ("plrc", "rapc")}
    start, losses = 0, []
    for region in batch["region"]:
        own = slice(start, start + len(region))
        cut = {name: (one[own], two[own]) for name, (one, two) in pairs.items()}
        losses.append(prc_loss(cut["plrc"], cut["rapc"], region, alpha=0.5)[0])
        start += len(region)
    assert float(output.loss.detach()) == pytest.approx(float(torch.stack(losses).mean().detach()), rel=1e-5)
    assert float(output.metrics["plrc_chance"]) == pytest.approx(torch.tensor(96.0).log().item(), rel=1e-4)


def test_a_step_of_rad_is_the_loss_of_its_samples(data: Path, teacher: Path) -> None:
    run = job(load(data, "rad", rad__teacher_ckpt=teacher))
    batch, student, taught = next(iter(run.loader)), run.task.student, run.task.teachers[0]
    output = run.task.step(batch, 0)
    assert isinstance(student.model, nn.Module) and isinstance(taught.model, nn.Module)
    camera = samples(student.model.camera(batch["cameras"]), batch["places"][0], student.model.camera.grid)
    lidar = samples(taught.model.lidar(batch["lidar"][0]), batch["places"][0], taught.model.lidar.grid)
    c, l2 = student.projectors["camera"](camera), student.projectors["lidar"](lidar)
    sizes = [len(region) for region in batch["region"]]
    losses = [rad_loss(*row)[0] for row in zip(c.split(sizes), l2.split(sizes), batch["region"], strict=True)]
    assert float(output.loss.detach()) == pytest.approx(float(torch.stack(losses).mean().detach()), rel=1e-5)


@pytest.mark.parametrize("negatives", ["frame", "batch"])
@pytest.mark.parametrize("arm", ["rad", "mse"])
def test_joint_training_distils_where_the_cameras_look(data: Path, arm: str, negatives: str) -> None:
    cfg = load(data, "prc", stage="joint", rad__arm=arm, prc__negatives=negatives)
    run = job(cfg)
    batch = next(iter(run.loader))
    found, seen = run.task.student(batch, None), torch.cat(batch["seen"])
    assert not seen.all()

    def loss(moved: torch.Tensor) -> float:
        other = found | {
            "rad": [torch.where(moved[:, None], found["rad"][0].flip(1), found["rad"][0]), found["rad"][1]]
        }
        return float(pretrain_losses(cfg, other, batch)[0][arm].detach())

    plain = loss(torch.zeros_like(seen))
    assert loss(~seen) == plain != loss(seen)


def test_the_teacher_is_the_same_to_the_last_bit_after_ten_steps(data: Path, teacher: Path) -> None:
    run = job(load(data, "rad", rad__teacher_ckpt=teacher))
    (module,) = run.task.teachers
    before = {name: value.clone() for name, value in module.state_dict().items()}
    step(run, 10)
    after = module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before) and not module.training
    assert any("running_mean" in name for name in before)
    assert not any(p.requires_grad for p in module.parameters())


def test_a_shared_norm_of_a_teacher_stays_frozen(data: Path, teacher: Path) -> None:
    (module,) = job(load(data, "rad", rad__teacher_ckpt=teacher)).task.teachers
    assert not any(p.requires_grad for p in share_norms(module).parameters())
    assert all(p.requires_grad for p in share_norms(nn.BatchNorm2d(3)).parameters())


def test_a_teacher_without_the_projector_is_refused(data: Path, tmp_path: Path) -> None:
    run = job(load(data, "prc", prc__arm="plrc"))
    run.task.export(tmp_path / "plrc", run.task.student.state_dict(), "student")
    fields = {"rad__teacher_ckpt": tmp_path / "plrc", "rad__teacher_projector": "frozen_rapc"}
    with pytest.raises(
        UserError, match="rad.teacher_projector is frozen_rapc, but .* no projector of RAPC; use own"
    ):
        job(load(data, "rad", **fields))


def test_a_frame_without_regions_counts_nothing(data: Path) -> None:
    run = job(load(data, "prc"))
    batch = next(iter(run.loader))
    batch["region"][0] = torch.full_like(batch["region"][0], -1)
    whole = run.task.step(batch, 0)
    assert float(whole.metrics["plrc_skipped"]) == 0.5
    batch["region"][1] = torch.zeros_like(batch["region"][1])  # one region is none to tell from
    nothing = run.task.step(batch, 0)
    assert float(nothing.loss) == 0 and float(whole.loss) > 1
    nothing.loss.backward()
    assert all(not p.grad.any() for p in run.task.student.parameters())


@pytest.mark.parametrize("modality", ["lidar", "camera", ""])
def test_fine_tuning_starts_from_the_stages_before(data: Path, teacher: Path, modality: str) -> None:
    rad = job(load(data, "rad", rad__teacher_ckpt=teacher))
    step(rad, 1)
    rad.task.export(data.parent / "rad", rad.task.student.state_dict(), "student")
    given = {} if modality == "camera" else {"init__lidar": teacher}
    given |= {} if modality == "lidar" else {"init__camera": data.parent / "rad"}
    parts = ["finetune", *([modality] if modality else [])]
    run, random = job(load(data, *parts, **given)), job(load(data, *parts))
    state, other = run.task.student.state_dict(), random.task.student.state_dict()
    before = {"lidar": teacher, "camera": data.parent / "rad"}
    for branch in ("lidar", "camera"):
        names = [name for name in state if name.startswith(f"{branch}.")]
        assert bool(names) == (modality in ("", branch))
        if names:
            held = exports.load(before[branch]).state_dict()
            assert all(torch.equal(state[name], held[name]) for name in names)
            assert not all(torch.equal(state[name], other[name]) for name in names)
    heads = [name for name in state if name.startswith(("detection.", "map.", "fuser."))]
    assert all(torch.equal(state[name], other[name]) for name in heads)  # the rest begins alike
    assert run.task.tags()["start"] == ("+".join(name for name in before if modality in ("", name)))
    output = step(run)
    assert set(output.terms) == {"heat", "box", "map"}


def test_an_export_gives_the_model_back(data: Path, tmp_path: Path) -> None:
    run = job(load(data, "finetune"))
    step(run)
    given = run.task.student.state_dict()
    model = run.task.export(tmp_path / "out", given, "student")
    assert all(torch.equal(value, given[name]) for name, value in model.state_dict().items())
    found = exports.probe_of(model).outputs
    assert set(found) == {"lidar", "camera", "map", "heat"} and found["lidar"].std() > 0
    with pytest.raises(UserError, match="is no export of CALICO"):
        exports.load(tmp_path)


def test_the_rate_of_one_cycle(data: Path) -> None:
    cfg = load(data, "finetune", steps=100, cycle=0.4)
    task = job(cfg).task
    factors = [task.lr_factor(step, cfg) for step in range(101)]
    assert factors[0] == pytest.approx(0.1) and factors[40] == 1.0 == max(factors)
    assert factors[100] == pytest.approx(1e-4) and factors[20] == pytest.approx(0.55)
    assert factors[:41] == sorted(factors[:41]) and factors[40:] == sorted(factors[40:], reverse=True)


@pytest.mark.parametrize(
    ("parts", "steps", "peak", "cycle"),
    [
        ("prc", "20ep", 1e-4, 0),
        ("rad", "20ep", 1e-4, 0),
        ("detection", "max(2000, 6ep)", 2e-4, 0.4),
        ("detection lidar", "max(2000, 20ep)", 1e-3, 0.4),
        ("detection camera", "max(2000, 20ep)", 1e-3, 0.4),
        ("detection map", "max(2000, 20ep)", 1e-3, 0.4),
        ("detection lidar map", "max(2000, 20ep)", 1e-3, 0.4),
        ("detection camera map", "max(2000, 20ep)", 1e-3, 0.4),
    ],
)
def test_the_published_runs(parts: str, steps: str, peak: float, cycle: float) -> None:
    """The stacks of scripts/recipe.sh: sweeps, schedule and warm start, and the rate at both ends of the cycle."""
    folder = TOY.parent / "nuscenes"
    files = [str(folder / f"{part}.yaml") for part in ("base", *parts.split())]
    cfg = config.load(CalicoConfig, [*files, "data.paste="])
    optim, data = cfg.optim, cfg.data
    assert (data.sweeps, cfg.batch_size, cfg.steps) == (9, 32, steps)
    assert (optim.lr, cfg.cycle, optim.weight_decay, optim.clip_grad_norm) == (peak, cycle, 0.01, 35.0)
    if cfg.stage == "finetune":
        seen = {name: getattr(cfg.model, name).encoder != "none" for name in ("lidar", "camera")}
        assert {name: bool(getattr(cfg.init, name)) for name in seen} == seen
        assert data.balance and (data.rotation, data.scale, data.shift) == (45.0, [0.9, 1.1], 0.5)
        if (
            peak == 1e-3
        ):  # BEVFusion's own lr is where its cycle begins: a tenth, or of the cameras' boxes a fifth
            assert 0.1 * optim.lr == pytest.approx(1e-4)
        groups = {group.match: group.lr for group in optim.groups}
        assert groups == ({"camera.backbone": pytest.approx(peak / 10)} if "camera" in parts.split() else {})
    else:
        assert (optim.schedule, optim.warmup_steps) == ("cosine", 500)
        assert (cfg.prc.n_rich, cfg.prc.n_less, cfg.prc.tau, cfg.prc.alpha) == (1024, 1024, 0.1, 0.5)


@pytest.mark.parametrize(
    ("parts", "fields", "message"),
    [
        (["prc", "camera"], {}, "model.lidar.encoder is none, but stage=prc reads points"),
        (["rad"], {"model__camera__view": "depth_lss", "rad__teacher_ckpt": "x"}, "which sees the LiDAR"),
        (["rad"], {"rad__teacher_ckpt": ""}, "rad.teacher_ckpt is empty; name the export of a PRC run"),
        (["prc"], {"rad__teacher_ckpt": "x"}, "rad.teacher_ckpt has no effect with stage=prc"),
        (
            ["rad"],
            {"rad__teacher_ckpt": "untrained", "rad__teacher_projector": "frozen_rapc"},
            "trained teacher",
        ),
        (["prc"], {"evaluation__info": "x"}, "trains no head to evaluate"),
        (
            ["finetune"],
            {"model__head__detection": "none", "model__head__map": "false"},
            "nothing is predicted",
        ),
        (["finetune"], {"evaluation__distances": "[0.5,1]"}, "evaluation.distances lacks 2.0"),
        (["finetune"], {"prc__temperature": 1}, "unknown config field prc.temperature"),
    ],
)
def test_what_does_not_fit_is_refused(
    data: Path, parts: list[str], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load(data, *parts, **fields)


def test_a_config_is_written_and_read_again(data: Path, tmp_path: Path) -> None:
    cfg = load(data, "rad", rad__teacher_ckpt="untrained")
    (tmp_path / "c.yaml").write_text(config.to_yaml(cfg))
    assert config.load(CalicoConfig, [str(tmp_path / "c.yaml")]) == cfg


@pytest.mark.parametrize("shape", [(7, 4), (3, 4, 5, 6)])
def test_a_shared_norm_is_the_norm_of_all_rows(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks with unequal halves, played one after the other: what the collectives sum is known beforehand."""
    make = torch.Generator().manual_seed(0)
    rows = torch.randn(shape, generator=make) * 3 + 5
    norm: Any = nn.BatchNorm1d(4, momentum=0.3) if len(shape) == 2 else nn.BatchNorm2d(4, momentum=0.3)
    nn.init.normal_(norm.weight, generator=make)
    shared: Any = share_norms(copy.deepcopy(norm))
    wanted = norm(rows)
    axes = [0, *range(2, len(shape))]
    half, mean = rows[:2], rows.mean(axes)
    count = rows.numel() / 4
    totals = iter([rows.sum(axes), (rows - mean.reshape(1, 4, *[1] * (len(shape) - 2))).square().sum(axes)])
    monkeypatch.setattr(parts.distributed, "total", lambda value: torch.tensor(count))
    monkeypatch.setattr(parts, "_summed", lambda value: next(totals))
    torch.testing.assert_close(shared(half), wanted[:2], rtol=1e-5, atol=1e-5)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(shared, name), getattr(norm, name))


def test_one_process_shares_with_nobody() -> None:
    torch.manual_seed(0)
    assert float(rank_share(torch.tensor(3))) == 3 and float(rank_share(0, 1)) == 1
    for training in (True, False):
        block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=0.2)).train(training)
        rows, weights, twin = torch.randn(5, 4), torch.randn(5, 4), copy.deepcopy(block)
        torch.testing.assert_close(share_norms(twin)(rows), block(rows))
        torch.testing.assert_close(twin.state_dict(), block.state_dict())
        for one in (block, twin):
            (one(rows) * weights).sum().backward()  # a sum of squares would nearly cancel
        for mine, theirs in zip(twin.parameters(), block.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)
        half = copy.deepcopy(twin).bfloat16()
        assert half(rows.bfloat16()).dtype == torch.bfloat16
