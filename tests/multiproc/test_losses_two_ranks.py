"""Two gloo ranks with gathered columns equal one process: loss, and gradient of every feature row and scale."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from projects.tinyclip.objective import interactive_contrastive_loss
from tests.projects.zygote import Zygote
from vlmkd.distributed import gather, rank
from vlmkd.losses.affinity import PairEmbeds, affinity_loss
from vlmkd.losses.contrastive import clip_loss, sigmoid_loss

RANKS, ROWS, WIDTH, TEACHER_WIDTH = 2, 5, 4, 6
Leaves = dict[str, Tensor]


def leaves_of_all() -> Leaves:
    """Student rows (before normalisation) of the global batch, log scale and bias."""
    generator = torch.Generator().manual_seed(3)
    rows = {
        name: torch.randn(RANKS * ROWS, WIDTH, generator=generator, dtype=torch.float64)
        for name in ("image", "text")
    }
    scalars = {"log_scale": torch.tensor(2.0), "bias": torch.tensor(-1.5)}
    return rows | {name: value.double() for name, value in scalars.items()}


def teachers_of_all(width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(4, RANKS * ROWS, width, generator=generator, dtype=torch.float64)
    return list(F.normalize(rows, dim=-1))


def student(leaves: Leaves) -> tuple[Tensor, Tensor, Tensor]:
    return (
        F.normalize(leaves["image"], dim=-1),
        F.normalize(leaves["text"], dim=-1),
        leaves["log_scale"].exp(),
    )


def columns(image: Tensor, text: Tensor) -> dict[str, Tensor]:
    """Gathered columns, or none in a single process."""
    if not dist.is_initialized():
        return {}
    return {"all_image_embeds": gather(image), "all_text_embeds": gather(text)}


def affinity(leaves: Leaves, part: slice, chunk: int, which: str) -> Tensor:
    image, text, scale = student(leaves)
    teachers = []
    for first, teacher_scale in ((0, 8.0), (2, 12.0)):
        local = [x[part] for x in teachers_of_all(TEACHER_WIDTH)[first : first + 2]]
        teachers.append(PairEmbeds(*local, teacher_scale, **columns(*local)))
    return getattr(affinity_loss(image, text, scale, teachers, chunk=chunk, **columns(image, text)), which)


def affinity_dense(leaves: Leaves, part: slice) -> Tensor:
    return affinity(leaves, part, 0, "ce")


def affinity_dense_kl(leaves: Leaves, part: slice) -> Tensor:
    return affinity(leaves, part, 0, "kl")


def affinity_chunked(leaves: Leaves, part: slice) -> Tensor:
    return affinity(leaves, part, 4, "ce")


def affinity_chunked_kl(leaves: Leaves, part: slice) -> Tensor:
    return affinity(leaves, part, 4, "kl")


def clip(leaves: Leaves, part: slice) -> Tensor:
    image, text, scale = student(leaves)
    return clip_loss(image, text, scale, offset=offset(), **columns(image, text))


def sigmoid(leaves: Leaves, part: slice) -> Tensor:
    image, text, scale = student(leaves)
    texts = columns(image, text).get("all_text_embeds")
    return sigmoid_loss(image, text, scale, leaves["bias"], all_text_embeds=texts, offset=offset())


def interactive(leaves: Leaves, part: slice) -> Tensor:
    image, text, scale = student(leaves)
    local = [x[part] for x in teachers_of_all(WIDTH)[:2]]
    teacher = PairEmbeds(*local, 1.0, **columns(*local))
    return interactive_contrastive_loss(image, text, teacher, scale, offset())


def offset() -> int:
    return rank() * ROWS


LOSSES: dict[str, Callable[[Leaves, slice], Tensor]] = {
    function.__name__: function
    for function in (
        affinity_dense,
        affinity_dense_kl,
        affinity_chunked,
        affinity_chunked_kl,
        clip,
        sigmoid,
        interactive,
    )
}


def loss_and_gradients(name: str, part: slice) -> dict[str, Tensor]:
    leaves = {key: value[part] if value.ndim else value for key, value in leaves_of_all().items()}
    leaves = {key: value.clone().requires_grad_() for key, value in leaves.items()}
    loss = LOSSES[name](leaves, part)
    loss.backward()
    return {"loss": loss.detach()} | {k: v.grad for k, v in leaves.items() if v.grad is not None}


def one_rank(folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    try:
        part = slice(rank * ROWS, (rank + 1) * ROWS)
        torch.save({name: loss_and_gradients(name, part) for name in LOSSES}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> list[dict[str, dict[str, Tensor]]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    code, said = zygote.run(__file__, [str(folder)], folder / "output", ranks=RANKS)
    assert code == 0, said
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("name", LOSSES)
def test_two_ranks_equal_one_process(name: str, ranks: list[dict[str, dict[str, Tensor]]]) -> None:
    expected = loss_and_gradients(name, slice(0, RANKS * ROWS))
    found = [rank[name] for rank in ranks]
    assert found[0].keys() == expected.keys()
    for key, value in expected.items():
        # Scalars are averaged over ranks; a rank's rows live on that rank alone, so the mean divides them by W.
        mean = torch.stack([x[key] for x in found]).mean(0) if value.ndim == 0 else None
        mean = torch.cat([x[key] for x in found]) / RANKS if mean is None else mean
        torch.testing.assert_close(mean, value, rtol=0, atol=1e-13)
        assert value.abs().max() > 1e-4


if (
    __name__ == "__main__"
):  # a rank, started by the fixture; pytest's import mode hides this module from `spawn`
    one_rank(sys.argv[1])
