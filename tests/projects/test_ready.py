"""The core carries what comes: see ready.py, against plain torch."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.projects.ready import CHATS, Student, chat, loss_of
from tests.projects.zygote import Zygote

pytestmark = pytest.mark.slow

BATCH, STEPS, LR, PROJECTOR_LR = 4, 6, 0.5, 0.05
FIELDS = [
    f"batch_size={BATCH}", "steps=1ep", "threads=1", "optim.name=sgd", f"optim.lr={LR}", "optim.weight_decay=0",
    "optim.schedule=constant", "optim.warmup_steps=0", "optim.clip_grad_norm=0", "log.every_steps=1",
    f"optim.groups=[{{match: ^projector, lr: {PROJECTOR_LR}}}]", "evaluation.every_steps=50%", "checkpoint.every_steps=0",
]  # fmt: skip


def chats_of(step: int) -> list[dict[str, Any]]:
    """The chats of a step of the first epoch."""
    order = list(range(CHATS))
    random.Random("0/chats/order/0").shuffle(order)
    return [chat(number) for number in order[step * BATCH : (step + 1) * BATCH]]


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    """The weights after an epoch in plain torch: each step on the mean over all next tokens of its four chats."""
    torch.manual_seed(0)
    student = Student()
    for step in range(STEPS):
        student.zero_grad()
        loss_of(student, chats_of(step)).backward()
        with torch.no_grad():
            for name, parameter in student.named_parameters():
                if parameter.grad is not None:
                    parameter -= (PROJECTOR_LR if name.startswith("projector") else LR) * parameter.grad
    return student.state_dict()


def train(zygote: Zygote, run_dir: Path, *more: str, ranks: int = 1) -> tuple[int, str]:
    """A run of the project: exit code and what it said."""
    arguments = [*FIELDS, f"run_dir={run_dir}", *more]
    return zygote.run("tests.projects.ready", arguments, run_dir.with_suffix(".out"), ranks=ranks)


@pytest.mark.parametrize(
    ("ranks", "micro", "more"),
    [(1, 4, []), (1, 1, []), (2, 2, []), (2, 1, []), (2, 2, ["deepspeed.zero_stage=3"])],
    ids=["1x4", "4x1", "2 ranks x 2", "2 ranks x 2 x 1", "zero 3"],
)
def test_a_step_is_the_mean_over_its_tokens_however_it_is_shared(
    zygote: Zygote, tmp_path: Path, expected: dict[str, torch.Tensor], ranks: int, micro: int, more: list[str]
) -> None:
    run_dir = tmp_path / "run"
    code, said = train(zygote, run_dir, f"micro_batch_size={micro}", *more, ranks=ranks)
    assert code == 0, said
    found = torch.load(run_dir / "export" / "weights.pt", weights_only=True)
    tolerance = 5e-4 if more else 1e-6  # ZeRO 3 rounds a bf16 product before it adds the bias
    for name, value in expected.items():
        torch.testing.assert_close(found[name].float(), value.float(), rtol=0, atol=tolerance)
    lines: list[dict[str, Any]] = [
        json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()
    ]
    steps = [line for line in lines if line["kind"] == "train"]
    assert len(steps) == STEPS == CHATS // BATCH
    torch.manual_seed(0)
    first = loss_of(Student(), chats_of(0)).item()
    assert steps[0]["loss"] == pytest.approx(first, rel=1e-4 if more else 1e-5)
    tokens = sum(len(one["tokens"]) - 1 for one in chats_of(0))
    assert steps[0]["tokens_per_s"] / steps[0]["samples_per_s"] == pytest.approx(tokens / BATCH, rel=0.2)
    looks = [line["held-out chats/perplexity"] for line in lines if line["kind"] == "eval"]
    assert len(looks) == 2 and looks[0] != looks[1]


def test_a_state_goes_on_with_its_own_number_of_ranks_and_says_so(zygote: Zygote, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    code, said = train(zygote, run_dir, "ema_decay=0.5", ranks=2)
    assert code == 0, said
    (run_dir / "done.json").unlink()
    code, said = train(zygote, run_dir, "ema_decay=0.5")
    assert code == 2 and "Traceback" not in said
    assert "was written with ranks=2 and this run has 1; start it with 2" in said.strip().splitlines()[-1]
    code, said = train(zygote, run_dir, "ema_decay=0.5", ranks=2)
    assert code == 0 and "resumed from" in said and (run_dir / "done.json").is_file()
