"""The check of an export is a process that knows nothing of the run, and sees what is wrong, when both are forked."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.projects.zygote import Zygote
from vlmkd.export.folder import Probe, check_main, verify


def command(folder: Path, difference: float) -> None:
    """Write a number and let it be checked."""
    sys.seen = True  # type: ignore[attr-defined]
    torch.save(torch.ones(1), folder / "number.pt")
    verify("tests.projects.test_zygote", {folder: Probe({}, {"number": torch.ones(1) + difference})})


def outputs(folder: Path, probe: Probe) -> dict[str, torch.Tensor]:
    """The checking process's."""
    assert not hasattr(sys, "seen")
    return {"number": torch.load(folder / "number.pt", weights_only=True)}


def test_an_export_is_checked_in_a_process_that_was_forked_before_it(zygote: Zygote, tmp_path: Path) -> None:
    module, output = "tests.projects.test_zygote", tmp_path / "output"
    code, said = zygote.run(module, ["command", str(tmp_path), "0"], output)
    assert code == 0, said
    code, said = zygote.run(module, ["command", str(tmp_path), "0.5"], output)
    assert code == 1 and "does not reproduce the model: number differs by 5.00e-01" in said, said


if __name__ == "__main__":
    if sys.argv[1] == "command":
        command(Path(sys.argv[2]), float(sys.argv[3]))
    else:
        sys.exit(check_main(outputs, sys.argv[1:]))
