#!/usr/bin/env bash
# Start a training script: one process, several, several machines, or inside SLURM.
#
#   bash scripts/launch.sh projects/tinyclip/train_distill.py CONFIG.yaml [key=value ...]
#
#   NPROC=2 ...                                    two processes on this machine (one per GPU, or gloo on CPU)
#   NPROC=8 NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 [MASTER_PORT=29500] ...    once per machine, by hand
#   HOSTFILE=hosts.txt ...                         DeepSpeed's launcher: lines `host slots=8`, over pdsh and ssh
#   srun bash scripts/launch.sh ...                one process per SLURM task
#   DRY_RUN=1 ...                                  print the commands only
#
# The exit code is that of the run (2: a mistake in the config or the data, told in one line). SIGTERM and
# SIGINT reach every process of this machine, and the launcher waits until they have saved.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

fail() {
    echo "launch.sh: $1" >&2
    exit 2
}

[ $# -ge 1 ] || fail "usage: bash scripts/launch.sh projects/PAPER/train_STAGE.py CONFIG.yaml [key=value ...]"
script="$1"
shift
[ -f "$script" ] || [ ! -f "$root/$script" ] || script="$root/$script"
[ -f "$script" ] || fail "no file $script; the training scripts: $(cd "$root" && echo projects/*/train_*.py)"
script="$(cd "$(dirname "$script")" && pwd)/$(basename "$script")"
case "$script" in
    "$root"/*.py) ;;
    *) fail "$script is not a Python file below $root" ;;
esac
# As a module, so that `projects` and `vlmkd` import from any working directory.
module="${script#"$root"/}"
module="${module%.py}"
module="${module//\//.}"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
python="$(bash "$root/scripts/setup.sh" --python)"

number() { # NAME VALUE LOWEST
    case "$2" in
        '' | *[!0-9]*) fail "$1=$2 is not a number" ;;
    esac
    [ "$2" -ge "$3" ] || fail "$1=$2 is too small; the least is $3"
}

procs="${NPROC:-1}"
nodes="${NNODES:-1}"
node="${NODE_RANK:-0}"
number NPROC "$procs" 1
number NNODES "$nodes" 1
number NODE_RANK "$node" 0
[ "$node" -lt "$nodes" ] || fail "NODE_RANK=$node, but NNODES=$nodes numbers the machines from 0 to $((nodes - 1))"
[ "$nodes" -eq 1 ] || [ -n "${MASTER_ADDR:-}" ] || fail "NNODES=$nodes needs MASTER_ADDR, the address of machine 0"

in_slurm_step() { # an sbatch script outside srun has SLURM_PROCID too, but no step
    [ -n "${SLURM_PROCID:-}" ] && [ -n "${SLURM_STEP_ID:-${SLURM_STEPID:-}}" ] && [ "${SLURM_NTASKS:-1}" -gt 1 ] &&
        [ -z "${NPROC:-}${NNODES:-}${HOSTFILE:-}" ]
}

local_procs="$procs"
if in_slurm_step; then
    local_procs="${SLURM_NTASKS_PER_NODE:-${SLURM_TASKS_PER_NODE:-1}}"
    local_procs="${local_procs%%[!0-9]*}" # "4(x2)" means four on each of two machines
fi

cores="$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)"
threads=$((cores / local_procs))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
if [ ! -e /dev/nvidiactl ] && [ ! -e /dev/kfd ]; then
    # Processes share the cores with loader workers: idle threads sleep instead of spinning.
    export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
fi

show() {
    printf '%q ' "$@"
    echo
}

start() { # replaces this shell, so that signals and the exit code are the run's own
    if [ -n "${DRY_RUN:-}" ]; then
        show "$@"
        exit
    fi
    exec "$@"
}

if [ -n "${HOSTFILE:-}" ]; then
    [ -f "$HOSTFILE" ] || fail "no hostfile $HOSTFILE; write lines such as: host1 slots=8"
    start "$python" -m deepspeed.launcher.runner --hostfile "$HOSTFILE" \
        ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"} ${MASTER_PORT:+--master_port "$MASTER_PORT"} \
        --no_local_rank --module "$module" "$@"
fi

if in_slurm_step; then
    first="$(scontrol show hostnames "${SLURM_JOB_NODELIST:-}" 2>/dev/null | head -n 1 || true)"
    export MASTER_ADDR="${MASTER_ADDR:-${first:-127.0.0.1}}"
    # From the job's number: two jobs on one machine differ.
    export MASTER_PORT="${MASTER_PORT:-$((20000 + ${SLURM_JOB_ID:-0} % 20000))}"
    start "$python" -m "$module" "$@"
fi

world=$((procs * nodes))
if [ "$world" -eq 1 ]; then
    # One process whatever the surroundings say, e.g. in an sbatch script without srun.
    start env RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 "$python" -m "$module" "$@"
fi

free_port() {
    "$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

export MASTER_ADDR="${MASTER_ADDR:-127.0.0.1}"
if [ -z "${MASTER_PORT:-}" ]; then
    MASTER_PORT=29500
    [ "$nodes" -gt 1 ] || MASTER_PORT="$(free_port)"
fi
export MASTER_PORT WORLD_SIZE="$world"

pids=()
for ((index = 0; index < procs; index++)); do
    process=(env RANK=$((node * procs + index)) LOCAL_RANK="$index" "$python" -m "$module" "$@")
    if [ -n "${DRY_RUN:-}" ]; then
        show MASTER_ADDR="$MASTER_ADDR" MASTER_PORT="$MASTER_PORT" WORLD_SIZE="$world" "${process[@]}"
        continue
    fi
    "${process[@]}" &
    pids+=($!)
done
[ -z "${DRY_RUN:-}" ] || exit 0

# INT as well: bash starts background processes with SIGINT ignored, so Ctrl-C is passed on as SIGTERM.
asked_to_stop=""
trap 'asked_to_stop=1; kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT

# The first process that fails decides the exit code, but for a mistake that one has told (2). The others
# would wait for it in a collective for ever, so they are asked to stop, and ten seconds later killed. After a
# SIGTERM from outside nobody is killed: they are saving.
code=0
deadline=""
while [ ${#pids[@]} -gt 0 ]; do
    sleep 0.5 &
    wait $! || true # in the background, so that a trap runs at once
    running=()
    for pid in "${pids[@]}"; do
        if kill -0 "$pid" 2>/dev/null; then
            running+=("$pid")
            continue
        fi
        status=0
        wait "$pid" || status=$?
        if [ "$code" -eq 0 ] || [ "$status" -eq 2 ]; then code=$status; fi
    done
    pids=(${running[@]+"${running[@]}"})
    if [ "$code" -ne 0 ] && [ ${#pids[@]} -gt 0 ] && [ -z "$asked_to_stop" ]; then
        if [ -z "$deadline" ]; then
            echo "launch.sh: a process ended with exit code $code; stopping the other ${#pids[@]}" >&2
            deadline=$((SECONDS + 10))
            kill -TERM "${pids[@]}" 2>/dev/null || true
        elif [ "$SECONDS" -ge "$deadline" ]; then
            kill -KILL "${pids[@]}" 2>/dev/null || true
        fi
    fi
done
exit "$code"
