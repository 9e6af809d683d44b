"""How ranks leave: nobody closes its connections before all have come, and a mistake told on the way is heard."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch.distributed as dist

from vlmkd import distributed

ROOT = Path(__file__).parents[2]


def one_rank(mistaken: bool) -> None:
    """Rank 1 comes half a second later, or tells a mistake instead; prints when it came, when it left, and what it heard."""
    dist.init_process_group("gloo")
    distributed.gather_objects(0)
    own = distributed.rank()
    time.sleep(0.5 * own)
    came, heard = time.monotonic(), False
    try:
        if mistaken and own == 1:
            distributed.tell_mistake()
        else:
            distributed.leave()
    except RuntimeError:
        heard = distributed.mistake_told()
    print(json.dumps({"came": came, "left": time.monotonic(), "heard": heard}))


def _both(mistaken: bool) -> list[dict[str, float]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONPATH": str(ROOT),
    }
    started = [
        subprocess.Popen(
            [sys.executable, __file__, *(["mistaken"] if mistaken else [])],
            env=os.environ | shared | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    return [json.loads(line) for line in said]


def test_the_first_to_come_waits_for_the_last() -> None:
    first, last = _both(mistaken=False)
    assert first["came"] < last["came"] < first["left"]


def test_who_waits_to_leave_hears_of_a_mistake() -> None:
    first, _ = _both(mistaken=True)
    assert first["heard"]


if __name__ == "__main__":
    one_rank("mistaken" in sys.argv)
