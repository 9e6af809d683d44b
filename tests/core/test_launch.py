"""scripts/launch.sh: what it starts, with which ranks, and how exit codes and signals pass through it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.projects.zygote import free_port

ROOT = Path(__file__).parents[2]

# Prints its rank facts and the sum over ranks of (rank + 1), which only a complete group of processes can know.
REDUCE = """
import json, os, sys
import torch
import torch.distributed as dist
from vlmkd import distributed

facts = distributed.environment()
os.environ.update(facts)
if int(facts["WORLD_SIZE"]) > 1:
    dist.init_process_group("gloo")
value = torch.tensor([distributed.rank() + 1.0])
if distributed.world_size() > 1:
    dist.all_reduce(value)
line = {"rank": distributed.rank(), "world": distributed.world_size(), "local": distributed.local_rank()}
print(json.dumps(line | {"sum": value.item(), "args": sys.argv[1:]}) + "\\n", end="", flush=True)
if dist.is_initialized():
    dist.destroy_process_group()
"""

# One rank fails while the others would wait for ever.
FAIL = """
import os, sys, time
if os.environ["RANK"] == "1" or os.environ["WORLD_SIZE"] == "1":
    sys.exit(7)
time.sleep(600)
"""

# A mistake in one rank's data, told with exit code 2; the other rank fails over it at the same moment.
MISTAKE = """
import os, sys
sys.exit(2 if os.environ["RANK"] == "1" else 1)
"""

# Says that it is up, and on SIGTERM takes a moment to "save".
SAVE = """
import os, pathlib, signal, sys, time
here = pathlib.Path(sys.argv[1])

def save(signum, frame):
    time.sleep(0.3)
    (here / ("saved" + os.environ["RANK"])).touch()
    sys.exit(0)

signal.signal(signal.SIGTERM, save)
(here / ("up" + os.environ["RANK"])).touch()
time.sleep(600)
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A small repository with the scripts and four probe modules."""
    root = tmp_path / "check out"
    (root / "scripts").mkdir(parents=True)
    for name in ("launch.sh", "setup.sh"):
        shutil.copy(ROOT / "scripts" / name, root / "scripts" / name)
    (root / "probe").mkdir()
    for name, text in (("reduce", REDUCE), ("fail", FAIL), ("save", SAVE), ("mistake", MISTAKE)):
        (root / "probe" / f"{name}_ranks.py").write_text(text)
    return root


def environment(**extra: str) -> dict[str, str]:
    """A clean environment in which the scripts find this interpreter and vlmkd."""
    dropped = ("SLURM_", "NPROC", "NNODES", "NODE_RANK", "MASTER_", "HOSTFILE", "DRY_RUN", "OMP_", "VLMKD_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    return env | {"VLMKD_NO_VENV": "1", "PYTHONPATH": str(ROOT), "PYTHON": Path(sys.executable).name} | extra


def launch(checkout: Path, *args: str, **extra: str) -> subprocess.Popen[str]:
    """Start `scripts/launch.sh args` from outside the repository."""
    return subprocess.Popen(
        ["bash", str(checkout / "scripts/launch.sh"), *args],
        env=environment(**extra),
        cwd=checkout.parent,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen[str], seconds: float = 120) -> str:
    """Standard output of `process`, which must succeed."""
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == 0, err
    return out


def ranks(out: str) -> list[dict[str, object]]:
    """The probes' JSON lines by rank."""
    lines = [json.loads(line[line.index("{") :]) for line in out.splitlines() if '"rank"' in line]
    return sorted(lines, key=lambda line: line["rank"])


def wait_for(paths: list[Path]) -> None:
    """Wait until all of `paths` exist."""
    end = time.monotonic() + 300
    while not all(path.exists() for path in paths):
        assert time.monotonic() < end, f"missing {[path.name for path in paths if not path.exists()]}"
        time.sleep(0.05)


def test_one_process_is_the_default(checkout: Path) -> None:
    out = finish(launch(checkout, "probe/reduce_ranks.py", "a config.yaml", "data.x=[1, 2]"))
    assert ranks(out) == [
        {"rank": 0, "world": 1, "local": 0, "sum": 1.0, "args": ["a config.yaml", "data.x=[1, 2]"]}
    ]


def test_several_processes_form_one_group(checkout: Path) -> None:
    out = finish(launch(checkout, "probe/reduce_ranks.py", "x=1", NPROC="2"))
    assert [(line["rank"], line["world"], line["local"], line["sum"]) for line in ranks(out)] == [
        (0, 2, 0, 3.0),
        (1, 2, 1, 3.0),
    ]


def test_two_machines_rehearsed_on_loopback(checkout: Path) -> None:
    shared = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    nodes = [launch(checkout, "probe/reduce_ranks.py", NODE_RANK=str(node), **shared) for node in (0, 1)]
    lines = [ranks(finish(node)) for node in nodes]
    assert [(line["rank"], line["world"], line["local"], line["sum"]) for node in lines for line in node] == [
        (0, 2, 0, 3.0),
        (1, 2, 0, 3.0),
    ]


def test_ranks_count_on_from_machine_to_machine(checkout: Path) -> None:
    settings = {"NPROC": "2", "NNODES": "3", "NODE_RANK": "2", "MASTER_ADDR": "10.0.0.1", "DRY_RUN": "1"}
    lines = finish(launch(checkout, "probe/reduce_ranks.py", "a=b c", **settings)).splitlines()
    assert len(lines) == 2
    for index, line in enumerate(lines):
        assert line.startswith("MASTER_ADDR=10.0.0.1 MASTER_PORT=29500 WORLD_SIZE=6 env ")
        assert f" RANK={4 + index} LOCAL_RANK={index} " in line
        assert line.rstrip().endswith(r"-m probe.reduce_ranks a=b\ c")


def test_slurm_tasks_start_directly(checkout: Path) -> None:
    shared = {"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7", "MASTER_PORT": str(free_port())}
    tasks = [
        launch(checkout, "probe/reduce_ranks.py", SLURM_PROCID=str(task), SLURM_LOCALID=str(task), **shared)
        for task in (0, 1)
    ]
    lines = [ranks(finish(task)) for task in tasks]
    assert [(line["rank"], line["local"], line["sum"]) for task in lines for line in task] == [
        (0, 0, 3.0),
        (1, 1, 3.0),
    ]


def test_slurm_finds_its_first_machine(checkout: Path) -> None:
    tools = checkout / "tools"
    tools.mkdir()
    (tools / "scontrol").write_text('#!/bin/sh\n[ "$*" = "show hostnames n[1-2]" ] && printf "n1\\nn2\\n"\n')
    (tools / "scontrol").chmod(0o755)
    (checkout / "probe/show_address.py").write_text(
        "import os; print(os.environ['MASTER_ADDR'], os.environ['MASTER_PORT'], os.environ['OMP_NUM_THREADS'])"
    )
    env = environment(SLURM_PROCID="3", SLURM_NTASKS="4", SLURM_STEP_ID="0", SLURM_JOB_ID="20011")
    env |= {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_TASKS_PER_NODE": "2(x2)"}
    env["PATH"] = f"{tools}{os.pathsep}{env['PATH']}"
    command = ["bash", str(checkout / "scripts/launch.sh"), "probe/show_address.py"]
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    address, port, threads = result.stdout.split()
    assert (address, port) == ("n1", "20011")
    assert int(threads) == max(1, len(os.sched_getaffinity(0)) // 2)


def test_a_batch_script_without_srun_is_one_process(checkout: Path) -> None:
    settings = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0", "DRY_RUN": "1"}
    assert " RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 " in finish(
        launch(checkout, "probe/reduce_ranks.py", **settings)
    )


@pytest.mark.parametrize("procs", ["1", "2"])
def test_the_exit_code_is_the_runs_own(checkout: Path, procs: str) -> None:
    process = launch(checkout, "probe/fail_ranks.py", NPROC=procs)
    process.communicate(timeout=300)
    assert process.returncode == 7


def test_a_mistake_that_was_told_decides_the_exit_code(checkout: Path) -> None:
    process = launch(checkout, "probe/mistake_ranks.py", NPROC="2")
    process.communicate(timeout=300)
    assert process.returncode == 2


@pytest.mark.parametrize("procs", [1, 2])
def test_sigterm_reaches_every_process_and_waits(checkout: Path, procs: int) -> None:
    process = launch(checkout, "probe/save_ranks.py", str(checkout), NPROC=str(procs))
    wait_for([checkout / f"up{rank}" for rank in range(procs)])
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    assert process.returncode == 0
    assert all((checkout / f"saved{rank}").exists() for rank in range(procs))


@pytest.mark.parametrize(
    ("args", "settings", "named"),
    [
        ((), {}, "usage"),
        (("projects/tinyclip/train_nothing.py",), {}, "projects/tinyclip/train_nothing.py"),
        (("scripts/setup.sh",), {}, "not a Python file"),
        (("probe/fail_ranks.py",), {"NPROC": "many"}, "NPROC=many"),
        (("probe/fail_ranks.py",), {"NPROC": "0"}, "NPROC=0"),
        (("probe/fail_ranks.py",), {"NNODES": "2"}, "MASTER_ADDR"),
        (
            ("probe/fail_ranks.py",),
            {"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "127.0.0.1"},
            "NODE_RANK=2",
        ),
        (("probe/fail_ranks.py",), {"HOSTFILE": "nowhere.txt"}, "nowhere.txt"),
    ],
)
def test_mistakes_get_one_line_and_code_two(
    checkout: Path, args: tuple[str, ...], settings: dict[str, str], named: str
) -> None:
    process = launch(checkout, *args, **settings)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert out == ""
    assert named in err
    assert len(err.splitlines()) == 1


@pytest.mark.slow
def test_torchrun_ends_at_the_same_ranks(checkout: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*command, "--module", "probe.reduce_ranks"],
        cwd=checkout,
        env=environment(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )
    assert [(line["rank"], line["local"], line["sum"]) for line in ranks(result.stdout)] == [
        (0, 0, 3.0),
        (1, 1, 3.0),
    ]


@pytest.mark.slow
def test_a_hostfile_starts_both_machines(checkout: Path) -> None:
    """DeepSpeed's launcher with stand-ins for ssh and pdsh that run each machine's command here."""
    tools = checkout / "tools"
    tools.mkdir()
    (tools / "ssh").write_text("#!/bin/sh\nexit 0\n")
    (tools / "pdsh").write_text(
        f"#!{sys.executable}\n"
        "import subprocess, sys\n"
        "hosts = sys.argv[sys.argv.index('-w') + 1].split(',')\n"
        "command = ' '.join(sys.argv[sys.argv.index('-w') + 2:])\n"
        "runs = [subprocess.Popen(['bash', '-c', command.replace('%n', str(n))]) for n in range(len(hosts))]\n"
        "sys.exit(max(run.wait() for run in runs))\n"
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    hostfile = checkout / "hosts.txt"
    hostfile.write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    env = environment(HOSTFILE=str(hostfile), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    env["PATH"] = f"{tools}{os.pathsep}{env['PATH']}"
    result = subprocess.run(
        ["bash", str(checkout / "scripts/launch.sh"), "probe/reduce_ranks.py", "x=1"],
        cwd=checkout,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert [(line["rank"], line["local"], line["sum"], line["args"]) for line in ranks(result.stdout)] == [
        (0, 0, 3.0, ["x=1"]),
        (1, 0, 3.0, ["x=1"]),
    ]
