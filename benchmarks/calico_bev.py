"""CALICO's way to the bird's-eye map: pillar maxima, camera pooling, and a training step by part, as Markdown tables.

    python benchmarks/calico_bev.py [--threads 1] [--rounds 3] [--parts pillars pooling maps step] [--largest]

`pillars` sets the maximum of each pillar against torch's `scatter_reduce` with autograd's own backward pass, and against one
over the pillars that there are, whose numbers are found by sorting (mmdetection3d's dynamic scatter). `pooling` sets the sum
of depth times context without their products against `index_add` of all products, and against the original code's sort and
cumulative sum (Philion and Fidler 2020). `maps` sets how the map head reads its cells against `grid_sample`, and a backbone's
convolutions over rows of channels against planes. All forms must agree; each is a forward and a backward pass. `step` is what a step
of each stage in the toy world takes by part, from scenes that it writes to a temporary folder. Seconds of CPU time on a CPU,
medians, the forms in turns. `--largest` adds six cameras of 256 x 704 pixels with 118 depth bins.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.timing import clock  # noqa: E402
from projects.calico import synthdrive  # noqa: E402
from projects.calico.build import job  # noqa: E402
from projects.calico.config import CalicoConfig  # noqa: E402
from projects.calico.geometry import Grid, bev_sample  # noqa: E402
from projects.calico.networks.heads import SegHead  # noqa: E402
from projects.calico.networks.lidar import scatter_max  # noqa: E402
from projects.calico.networks.lss import bev_pool  # noqa: E402
from projects.calico.networks.parts import SecondWithFpn  # noqa: E402
from vlmkd import config  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIGS = Path(__file__).resolve().parents[1] / "projects" / "calico" / "configs" / "toy"
Form = Callable[..., Tensor]


def by_autograd(rows: Tensor, cell: Tensor, cells: int) -> Tensor:
    """The same, straight into the map."""
    index = cell[:, None].expand_as(rows)
    return rows.new_zeros(cells, rows.shape[1]).scatter_reduce(0, index, rows, "amax", include_self=False)


def by_sorting(rows: Tensor, cell: Tensor, cells: int) -> Tensor:
    """Maxima over the occupied cells alone, then written into the map."""
    occupied, place = cell.unique(return_inverse=True)
    index = place[:, None].expand_as(rows)
    found = rows.new_zeros(len(occupied), rows.shape[1]).scatter_reduce(
        0, index, rows, "amax", include_self=False
    )
    return rows.new_zeros(cells, rows.shape[1]).index_copy(0, occupied, found)


def all_products(depth: Tensor, context: Tensor, cell: Tensor, cells: int) -> Tensor:
    """Every product, then one sum by cell."""
    kept = cell >= 0
    rows = (depth[..., None] * context[:, None])[kept]
    return context.new_zeros(cells, context.shape[1]).index_add(0, cell[kept], rows)


class _Runs(torch.autograd.Function):
    """Sums of runs of equal cells as differences of a cumulative sum, whose backward pass is a gather."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, cell: Tensor) -> Tensor:
        last = torch.ones_like(cell, dtype=torch.bool)
        last[:-1] = cell[1:] != cell[:-1]
        ctx.save_for_backward(last)
        sums = rows.cumsum(0)[last]
        return torch.cat([sums[:1], sums[1:] - sums[:-1]])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (last,) = ctx.saved_tensors
        run = last.cumsum(0)
        run[last] -= 1
        return grad[run], None


def sort_and_sum(depth: Tensor, context: Tensor, cell: Tensor, cells: int) -> Tensor:
    """The original: products sorted by cell, a cumulative sum, differences at the borders."""
    kept = cell >= 0
    rows, own = (depth[..., None] * context[:, None])[kept], cell[kept]
    order = own.argsort()
    rows, own = rows[order], own[order]
    return context.new_zeros(cells, context.shape[1]).index_copy(0, own.unique(), _Runs.apply(rows, own))


def in_turns(forms: Mapping[str, Form], inputs: tuple[Any, ...], rounds: int) -> dict[str, float]:
    """Median seconds of each form; they must agree, gradients too."""
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    leaves = [one for one in inputs if isinstance(one, Tensor) and one.requires_grad]
    for turn in range(rounds + 1):
        expected: list[Tensor] = []
        for name, form in forms.items():
            for leaf in leaves:
                leaf.grad = None
            began = clock(DEVICE)
            out = form(*inputs)
            out.square().sum().backward()
            took = clock(DEVICE) - began
            if turn:  # the first warms up, and is compared
                seconds[name].append(took)
                continue
            found = [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]
            expected = expected or found
            for ours, theirs in zip(expected, found, strict=True):
                scale = float(ours.abs().max())
                torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3 * scale)
    return {name: statistics.median(own) for name, own in seconds.items()}


def pillars(rounds: int) -> None:
    print("| points | cells | channels | form | s | ratio to ours |\n|---:|---:|---:|---|---:|---:|")
    for points, side, channels in (
        (5_500, 96, 24),
        (35_000, 512, 64),
        (300_000, 512, 64),
        (300_000, 1024, 64),
    ):
        torch.manual_seed(0)
        rows = torch.randn(points, channels, device=DEVICE, requires_grad=True)
        cell = torch.randn(points, 2, device=DEVICE).mul(side / 8).add(side / 2).clamp(0, side - 1).long()
        inputs = (rows, cell[:, 0] * side + cell[:, 1], side * side)
        forms = {"ours": scatter_max, "scatter_reduce": by_autograd, "by sorting": by_sorting}
        found = in_turns(forms, inputs, rounds)
        show([f"{points:,}", f"{side}²", str(channels)], found)


def pooling(rounds: int, largest: bool) -> None:
    print(
        "| cameras | pixels | bins | channels | cells | form | s | ratio to ours |\n"
        + "|---:" * 5
        + "|---|---:|---:|"
    )
    sizes = [(4, (5, 10), 19, 32, 48), (6, (16, 44), 32, 64, 128), (6, (32, 88), 59, 80, 180)]
    for cameras, (high, wide), bins, channels, side in sizes + [(6, (32, 88), 118, 80, 360)] * largest:
        torch.manual_seed(0)
        pixels = cameras * high * wide
        depth = torch.randn(pixels, bins, device=DEVICE).softmax(1).requires_grad_()
        context = torch.randn(pixels, channels, device=DEVICE, requires_grad=True)
        # A ray's bins go outward from the middle, some of them beyond the map.
        angle = torch.rand(pixels, 1, device=DEVICE) * 2 * torch.pi
        reach = torch.linspace(0.02, 0.55, bins, device=DEVICE) * side
        x, y = ((side / 2 + reach * turn(angle)).long() for turn in (torch.cos, torch.sin))
        inside = (x >= 0) & (x < side) & (y >= 0) & (y < side)
        inputs = (depth, context, (x * side + y).where(inside, -1), side * side)
        forms = {
            "ours": bev_pool,
            "all products, index_add": all_products,
            "sorted, cumulative sum": sort_and_sum,
        }
        show(
            [str(cameras), f"{high}x{wide}", str(bins), str(channels), f"{side}²"],
            in_turns(forms, inputs, rounds),
        )


def maps(rounds: int) -> None:
    print("| part | map | channels | form | s | ratio to ours |\n|---|---:|---:|---|---:|---:|")
    for frames, channels, (side, cell), (labels, label_cell) in (
        (4, 64, (48, 0.8), (96, 0.4)),
        (1, 256, (180, 0.6), (200, 0.5)),
    ):
        torch.manual_seed(0)
        given, wanted = square(side, cell), square(labels, label_cell)
        head = SegHead(channels, given, 1, wanted).to(DEVICE)
        bev = torch.randn(frames, side, side, channels, device=DEVICE).permute(0, 3, 1, 2).requires_grad_()
        forms: dict[str, Form] = {
            "ours": head.sampled,
            "grid_sample": partial(by_grid_sample, given=given, wanted=wanted),
        }
        show(["reading", f"{side}² to {labels}²", str(channels)], in_turns(forms, (bev,), rounds))
    cfg = config.load(CalicoConfig, [str(CONFIGS / name) for name in ("base.yaml", "prc.yaml")]).model.lidar
    width = cfg.channels[-1]
    backbone = SecondWithFpn(width, cfg).to(DEVICE)
    bev = torch.randn(4, 96, 96, width, device=DEVICE).permute(0, 3, 1, 2).requires_grad_()
    forms = {"ours": backbone, "planes": lambda bev: backbone(bev.contiguous())}
    show(["convolutions", "96²", str(width)], in_turns(forms, (bev,), rounds))


def by_grid_sample(bev: Tensor, given: Grid, wanted: Grid) -> Tensor:
    x, y, _ = wanted.shape
    index = torch.cartesian_prod(torch.arange(x, device=DEVICE), torch.arange(y, device=DEVICE))
    return bev_sample(bev, wanted.centre(index).expand(len(bev), -1, -1), given).mT.unflatten(2, (x, y))


def square(side: int, cell: float) -> Grid:
    reach = side * cell / 2
    return Grid((-reach, -reach, -5.0), (reach, reach, 3.0), (cell, cell, 8.0))


def show(cells: list[str], found: dict[str, float]) -> None:
    for name, seconds in found.items():
        told = [*cells, name, f"{seconds:.4f}", f"{seconds / found['ours']:.2f}"]
        print(f"| {' | '.join(told)} |", flush=True)


def steps(rounds: int) -> None:
    """Of four scenes: reading and augmenting them, each module's forward pass, the losses, the backward pass."""
    print("| stage | part | s | share of the step |\n|---|---|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        synthdrive.write(Path(folder) / "scenes", 8)
        for stage in ("prc", "rad", "finetune"):
            parts = measured(stage, folder, rounds)
            whole = sum(parts.values())
            for part, seconds in parts.items():
                print(f"| {stage} | {part} | {seconds:.4f} | {100 * seconds / whole:.0f} % |", flush=True)
            print(f"| {stage} | **whole** | {whole:.4f} | |", flush=True)


def measured(stage: str, folder: str, rounds: int) -> dict[str, float]:
    """Median seconds by part."""
    given = [f"run_dir={folder}/{stage}", f"data.info={folder}/scenes", "steps=100", "evaluation.info="]
    given += ["data.fraction=100"] * (stage == "finetune") + ["rad.teacher_ckpt=untrained"] * (stage == "rad")
    cfg = config.load(CalicoConfig, [str(CONFIGS / "base.yaml"), str(CONFIGS / f"{stage}.yaml"), *given])
    run = job(cfg)
    task, seconds, running = run.task, defaultdict[str, list[float]](list), defaultdict[str, float](float)
    for model in (task.student, *task.teachers):
        model.to(DEVICE).train(model is task.student)
    modules = {f"teacher.{name}": part for one in task.teachers for name, part in named(one)}
    for name, part in {**modules, **dict(named(task.student))}.items():
        timed(part, name, running)
    batches = iter(run.loader)
    for turn in range(rounds + 1):
        running.clear()
        began = clock(DEVICE)
        batch = moved(next(batches))
        running["data"] = clock(DEVICE) - began
        began = clock(DEVICE)
        output = task.step(batch, turn)
        running["losses and the rest"] = (
            clock(DEVICE) - began - sum(s for name, s in running.items() if name != "data")
        )
        began = clock(DEVICE)
        output.loss.backward()
        running["backward"] = clock(DEVICE) - began
        if turn:
            for name, value in running.items():
                seconds[name].append(value)
    return {name: statistics.median(own) for name, own in seconds.items()}


def named(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Encoder, backbone, ... of each branch, and fuser, decoder and heads."""
    inner: Any = getattr(model, "model", model)
    found = []
    for name, part in inner.named_children():
        whole = name not in ("lidar", "camera")
        found += [(name, part)] if whole else [(f"{name}.{own}", one) for own, one in part.named_children()]
    return found


def timed(part: nn.Module, name: str, running: dict[str, float]) -> None:
    """Add the part's forward time to `running` under its name."""
    began: list[float] = []
    part.register_forward_pre_hook(lambda *_: began.append(clock(DEVICE)))

    def stop(*_: Any) -> None:
        running[name] += clock(DEVICE) - began.pop()

    part.register_forward_hook(stop)


def moved(value: Any) -> Any:
    """Tensors, in tuples, lists and dictionaries, on the device."""
    if isinstance(value, Tensor):
        return value.to(DEVICE)
    if isinstance(value, dict):
        return {key: moved(one) for key, one in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(moved, value))
    return [moved(one) for one in value] if isinstance(value, list) else value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = ["pillars", "pooling", "maps", "step"]
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--largest", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{DEVICE}, {args.threads} thread(s), torch {torch.__version__}")
    for kind in args.parts:
        print(f"\n{kind}\n")
        if kind == "pillars":
            pillars(args.rounds)
        elif kind == "pooling":
            pooling(args.rounds, args.largest)
        elif kind == "maps":
            maps(args.rounds)
        else:
            steps(args.rounds)


if __name__ == "__main__":
    main()
