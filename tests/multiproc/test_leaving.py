"""How ranks leave: nobody closes its connections before all have come, and a mistake told on the way is heard."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch.distributed as dist

from tests.projects.zygote import Zygote
from vlmkd import distributed


def one_rank(folder: Path, mistaken: bool) -> None:
    """Rank 1 comes half a second after rank 0, or tells a mistake instead; prints when it came and left, and what it heard."""
    dist.init_process_group("gloo")
    distributed.gather_objects(0)
    own = distributed.rank()
    while own and not (folder / "came").exists():
        time.sleep(0.01)
    time.sleep(0.5 * own)
    came, heard = time.monotonic(), False
    (folder / "came").touch()
    try:
        if mistaken and own == 1:
            distributed.tell_mistake()
        else:
            distributed.leave()
    except RuntimeError:
        heard = distributed.mistake_told()
    print(json.dumps({"came": came, "left": time.monotonic(), "heard": heard}))


def _both(zygote: Zygote, folder: Path, *mistaken: str) -> list[dict[str, float]]:
    code, said = zygote.run(__file__, [str(folder), *mistaken], folder / "output", ranks=2)
    assert code == 0, said
    return [json.loads(line) for line in said.splitlines() if line.startswith("{")]


def test_the_first_to_come_waits_for_the_last(zygote: Zygote, tmp_path: Path) -> None:
    first, last = _both(zygote, tmp_path)
    assert first["came"] < last["came"] < first["left"]


def test_who_waits_to_leave_hears_of_a_mistake(zygote: Zygote, tmp_path: Path) -> None:
    first, _ = _both(zygote, tmp_path, "mistaken")
    assert first["heard"]


if __name__ == "__main__":
    one_rank(Path(sys.argv[1]), "mistaken" in sys.argv)
