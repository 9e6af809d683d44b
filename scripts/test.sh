#!/usr/bin/env bash
# Install what the tests need and run them. CI calls exactly this.
#
#   bash scripts/test.sh                     style, types, all tests on two to four cores
#   bash scripts/test.sh tests/losses -k kl  arguments go to pytest, and only pytest runs, in one process
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh dev
python="$(bash scripts/setup.sh --python)"

# One thread per process: tests start several, and idle OpenMP threads that spin slow the others down.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY=passive
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

check() {
    echo "test: $*" >&2
    "$python" -m "$@" || {
        echo "test.sh: $1 failed (see above); the tests were not run" >&2
        exit 1
    }
}

if [ $# -eq 0 ]; then
    check ruff check --quiet .
    check ruff format --check --quiet .
    check mypy vlmkd
    # What the tests of a file share is made once: a file's tests stay together.
    set -- --numprocesses=logical --maxprocesses=4 --dist=loadfile --durations=20
fi
exec "$python" -m pytest "$@"
