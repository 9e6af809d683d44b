"""Ranks, and the few collectives that tasks and loops use; one process needs no process group."""

from __future__ import annotations

import contextlib
import os
import re
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.nn.functional import all_gather

from vlmkd.errors import UserError

_MISTAKE, _HEARD, _ARRIVED, _LEFT = "vlmkd/mistake", "vlmkd/heard", "vlmkd/arrived", "vlmkd/left"
_PATIENCE_S, _LONGEST_S = 5.0, 1800.0


def rank() -> int:
    """0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def local_rank() -> int:
    """On its machine."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))


def device() -> torch.device:
    """This rank's GPU when there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank() % torch.cuda.device_count())
    return torch.device("cpu")


def device_named(name: str) -> torch.device:
    """The device of a `--device` option; empty: this rank's."""
    if not re.fullmatch(r"((cpu|mps|cuda)(:\d{1,2})?)?", name):
        raise UserError(f"--device {name} is no device; write cpu, cuda or cuda:N")
    found = torch.device(name) if name else device()
    if found.type == "cuda" and (found.index or 0) >= (gpus := torch.cuda.device_count()):
        raise UserError(f"--device {name}: torch sees {gpus} GPUs; write cpu or another index")
    return found


def environment() -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT of torchrun, DeepSpeed, SLURM or one process."""
    env, found = os.environ, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    if "RANK" in env and "WORLD_SIZE" in env:
        found |= {name: env[name] for name in found if name in env}
    elif int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in env:
        slurm = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
        found = {name: env[theirs] for name, theirs in zip(found, slurm, strict=True)}
    port = "0" if found["WORLD_SIZE"] == "1" else "29500"
    master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return found | {name: env.get(name, default) for name, default in master.items()}


def gather(x: Tensor) -> Tensor:
    """Rows of all ranks in their order, [B/W, ...] -> [B, ...]; every rank brings the same shape.

    The backward pass sums what all ranks ask of this one's rows, so that the mean over ranks of a loss of local rows has
    exactly the gradient of the global loss.
    """
    return x if world_size() == 1 else torch.cat(all_gather(x, None))


def mean(values: dict[str, float]) -> dict[str, float]:
    """Mean over ranks, which bring the same keys."""
    parts = gather_objects(values)
    return {name: sum(part[name] for part in parts) / len(parts) for name in values}


def gather_objects(value: Any) -> list[Any]:
    """Of every rank, in their order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def rank_share(count: int) -> range:
    """The indices below `count` that this rank works on."""
    return range(rank(), count, world_size())


def gather_rows(ids: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(ids [n], rows [n,D]) of all ranks on the CPU, sorted by id; n may differ between ranks, and be 0."""
    parts = gather_objects((ids.cpu(), rows.cpu()))
    all_ids, all_rows = (torch.cat(column) for column in zip(*parts, strict=True))
    order = all_ids.argsort()
    return all_ids[order], all_rows[order]


def broadcast_object(value: Any) -> Any:
    return gather_objects(value)[0]


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def leave(*, together: bool = True) -> None:
    """Leave the process group; `together`: once all ranks have come here, and rank 0, which may hold the store, last.

    The store counts them, for who leaves a collective of gloo's may close what another still reads. RuntimeError: another
    rank left over a mistake, or did not come.
    """
    if not dist.is_initialized():
        return
    store, own, ranks = distributed_c10d._get_default_store(), rank(), world_size()
    if together and ranks > 1:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        store.add(_ARRIVED, 1)
        if not _counted(store, _ARRIVED, ranks, _LONGEST_S):
            raise RuntimeError(f"rank {own} waited for the others in vain")
    dist.destroy_process_group()
    if together and ranks > 1:
        with contextlib.suppress(RuntimeError):  # the store has gone with rank 0
            store.add(_LEFT, 1)
            if own == 0:
                _counted(store, _LEFT, ranks, _PATIENCE_S)


def tell_mistake() -> None:
    """This rank leaves over a mistake that it has told: spare the others a traceback."""
    if world_size() == 1:
        return
    store, own, others = distributed_c10d._get_default_store(), rank(), world_size() - 1
    with contextlib.suppress(RuntimeError):  # the store has gone with rank 0
        store.set(_MISTAKE, "")
        dist.destroy_process_group()  # the others' collectives fail now, not when they time out
        if own == 0:
            _counted(store, _HEARD, others, _PATIENCE_S)  # this process keeps the store


def mistake_told() -> bool:
    """Whether another rank has told a mistake, and the error at hand is only that it left."""
    if world_size() == 1:
        return False
    store = distributed_c10d._get_default_store()
    try:
        told = store.check([_MISTAKE])
        store.add(_HEARD, 1)
    except RuntimeError:  # the store has gone with rank 0
        return False
    return bool(told)


def _counted(store: dist.Store, key: str, ranks: int, seconds: float) -> bool:
    """Wait for so many ranks to count themselves in; False: too long, or a mistake was told first."""
    end = time.monotonic() + seconds
    while True:
        time.sleep(0.05)  # at least once: threads that still drop a finished collective get the processor
        if store.add(key, 0) >= ranks:
            return True
        if time.monotonic() > end or (key == _ARRIVED and store.check([_MISTAKE])):
            return False


def total(value: Tensor) -> Tensor:
    """Sum over the ranks; it stays on the tensor's device."""
    if world_size() == 1:
        return value
    summed = value.to(device() if dist.get_backend() == "nccl" else "cpu", copy=True)
    dist.all_reduce(summed)
    return summed.to(value.device)


def any_rank(flag: bool | Tensor) -> bool:
    return bool(total(torch.as_tensor(flag, dtype=torch.float32)))
