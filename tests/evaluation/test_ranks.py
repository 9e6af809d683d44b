"""Two and three processes give the results of one, also with fewer items than ranks."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.projects.zygote import free_port
from vlmkd.data.images import ImageRef
from vlmkd.data.labelled import Item
from vlmkd.datasets.evaluation_sets import CaptionedImages
from vlmkd.evaluation.base import Context, Result
from vlmkd.evaluation.classify import Classification
from vlmkd.evaluation.retrieval import Retrieval

from .conftest import FixedEncoder, numbered_png


def _encoder() -> FixedEncoder:
    generator = torch.Generator().manual_seed(0)
    return FixedEncoder(torch.randn(30, 6, generator=generator), torch.randn(60, 6, generator=generator))


def _evaluate(folder: str, count: int) -> list[Result]:
    """Zero-shot and retrieval over `count` numbered images, of which image 1 is torn."""
    images = [ImageRef(f"{folder}/{number}.png") for number in range(count)]
    classes = [f"class {number}" for number in range(min(count, 7))]
    items = [Item(str(image), image, number % len(classes)) for number, image in enumerate(images)]
    zero_shot = Classification(items, classes, dataset="z", templates=["{}"])
    captions = [[2 * number, 2 * number + 1] for number in range(count)]
    retrieval = Retrieval(CaptionedImages("r", images, [f"text {n}" for n in range(2 * count)], captions))
    context = Context(batch_size=4, progress=False, max_unreadable_share=0.5)
    return [*zero_shot.run(_encoder(), context), *retrieval.run(_encoder(), context)]


def _rank(rank: int, world_size: int, port: int, folder: str, count: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    results = _evaluate(folder, count)
    Path(folder, f"rank{rank}.pickle").write_bytes(pickle.dumps(results))
    dist.destroy_process_group()


@pytest.mark.parametrize(("world_size", "count"), [(2, 29), (3, 2)])
def test_ranks_equal_one_process(tmp_path: Path, world_size: int, count: int) -> None:
    for number in range(count):
        (tmp_path / f"{number}.png").write_bytes(b"torn" if number == 1 else numbered_png(number))
    expected = _evaluate(str(tmp_path), count)
    assert expected[0].metrics["unreadable"] == 1
    mp.start_processes(
        _rank, (world_size, free_port(), str(tmp_path), count), nprocs=world_size, start_method="fork"
    )
    for rank in range(world_size):
        assert pickle.loads((tmp_path / f"rank{rank}.pickle").read_bytes()) == expected


def test_shares_cover_everything_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from vlmkd.distributed import rank_share

    monkeypatch.setattr("vlmkd.distributed.world_size", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr("vlmkd.distributed.rank", lambda rank=rank: rank)
        shares += list(rank_share(10))
    assert sorted(shares) == list(range(10))
