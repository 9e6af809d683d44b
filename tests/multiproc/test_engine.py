"""The engine at ZeRO 0 to 3 with one and two processes: equal weights, clamps, bit-exact restore."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.projects.zygote import Zygote

WORKER = Path(__file__).parent / "engine_worker.py"


def _run(
    zygote: Zygote, tmp_path: Path, stage: int, precision: str, ranks: int, optimiser: str = "adamw"
) -> dict:
    argv = [str(tmp_path / "state"), str(stage), precision, optimiser]
    code, said = zygote.run(str(WORKER), argv, tmp_path / "output", ranks=ranks)
    lines = [line for line in said.splitlines() if line.startswith("RESULT ")]
    assert code == 0 and lines, said[-4000:]
    return json.loads(lines[0].removeprefix("RESULT "))


def _reference(optimiser: str = "adamw") -> dict[str, torch.Tensor]:
    """Six steps in plain torch, with the same decay, clipping and clamp."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4))
    plain = [p for p in model.parameters() if p.ndim < 2]
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    groups = [{"params": decayed, "weight_decay": 0.2}, {"params": plain, "weight_decay": 0.0}]
    optimizer = {
        "adamw": lambda: torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.98), eps=1e-6),
        "adam": lambda: torch.optim.Adam(
            model.parameters(), lr=1e-2, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.05
        ),
        "sgd": lambda: torch.optim.SGD(model.parameters(), lr=5e-2, momentum=0.9, weight_decay=0.05),
    }[optimiser]()
    for step in range(6):
        rows = torch.randn(8, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(rows).pow(2).mean().backward()
        if optimiser != "adam":  # its config turns clipping off
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        with torch.no_grad():
            model[3].weight.clamp_(-0.1, 0.1)
    return model.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "precision", "ranks"),
    [
        (0, "fp32", 1),
        (1, "fp32", 1),
        (0, "fp32", 2),
        (1, "bf16", 2),
        (2, "fp32", 2),
        (3, "fp32", 2),
        (3, "bf16", 1),
    ],
)
def test_restore_is_exact_and_weights_equal_plain_torch(
    zygote: Zygote, tmp_path: Path, stage: int, precision: str, ranks: int
) -> None:
    result = _run(zygote, tmp_path, stage, precision, ranks)
    assert result["equal"]
    assert not result["ran"]
    assert len(result["hostile"]) == 4 - (stage == 0)
    for said in result["hostile"].values():
        assert "names posix.mkdir, which is code and no data; it is not read" in said
    assert result["dtypes"] == ["torch.float32"]
    assert result["largest_clamped"] == pytest.approx(0.1, abs=1e-7)
    assert result["weights"]["note"] == [0.0, 1.0, 2.0]
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    for name, value in _reference().items():
        torch.testing.assert_close(torch.tensor(result["weights"][name]), value, rtol=0, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimiser", "stage", "ranks"),
    [("adam", 0, 1), ("adam", 1, 1), ("sgd", 0, 1), ("sgd", 2, 2), ("sgd", 3, 1)],
)
def test_adam_and_sgd_equal_plain_torch_and_restore_exactly(
    zygote: Zygote, tmp_path: Path, optimiser: str, stage: int, ranks: int
) -> None:
    result = _run(zygote, tmp_path, stage, "fp32", ranks, optimiser)
    assert result["equal"]
    for name, value in _reference(optimiser).items():
        torch.testing.assert_close(torch.tensor(result["weights"][name]), value, rtol=0, atol=1e-5)
