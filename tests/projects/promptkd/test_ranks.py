"""The student on two ranks is the student on one: the projector normalises over the batch of all of them."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from projects.promptkd.student import PromptedStudent
from tests.projects.promptkd import tiny
from tests.projects.zygote import Zygote

IMAGES, RANKS = 6, 2


def step(images: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients and running statistics after one training step on these images."""
    student = PromptedStudent(tiny.clip(), 8, depth=2, length=2, seed=1)
    student.train()
    (student(images) - targets).square().mean().backward()
    found = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    return found | {name: value for name, value in student.named_buffers() if "running" in name}


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """The global batch."""
    generator = torch.Generator().manual_seed(4)
    return torch.randn(IMAGES, 3, 16, 16, generator=generator), torch.randn(IMAGES, 8, generator=generator)


def worker(folder: Path) -> None:
    """One rank's share, written to a file."""
    dist.init_process_group("gloo")
    rank, (images, targets) = dist.get_rank(), batch()
    share = slice(rank * IMAGES // RANKS, (rank + 1) * IMAGES // RANKS)
    torch.save(step(images[share], targets[share]), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_give_the_gradients_and_statistics_of_one(tmp_path: Path, zygote: Zygote) -> None:
    code, output = zygote.run(__file__, [str(tmp_path)], tmp_path / "output.txt", ranks=RANKS)
    assert code == 0, output
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]
    whole = step(*batch())
    assert {"image.prompts", "projector.layers.0.weight", "projector.layers.1.running_var"} <= whole.keys()
    for name, value in whole.items():
        mean = torch.stack([part[name] for part in parts]).mean(dim=0)
        torch.testing.assert_close(
            mean, value, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
        if "running" in name:
            assert torch.equal(parts[0][name], parts[1][name]), name


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
