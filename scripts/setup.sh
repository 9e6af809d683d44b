#!/usr/bin/env bash
# Make or re-use a Python environment and install vlmkd into it, in place (pip install -e).
#
#   bash scripts/setup.sh [EXTRA ...]    e.g. `bash scripts/setup.sh dev`; extras are named in pyproject.toml
#   bash scripts/setup.sh --python       install nothing; print the interpreter that the scripts use
#
# The environment is $VLMKD_VENV, else .venv in the repository; VLMKD_NO_VENV=1 takes the active one instead.
# PYTHON=python3.12 chooses the interpreter of a new environment. Nothing is installed when requirements.txt
# and pyproject.toml are those of the last call.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "setup.sh: $1" >&2
    exit 2
}

base_python() {
    local name
    for name in ${PYTHON:-python3 python}; do
        command -v "$name" && return
    done
    fail "no ${PYTHON:-python3} on PATH; install Python 3.10 to 3.13, or set PYTHON=/path/to/python"
}

venv="${VLMKD_VENV:-$PWD/.venv}"
if [ -n "${VLMKD_NO_VENV:-}" ]; then
    python="$(base_python)"
elif [ -e "$venv/bin/python" ]; then
    python="$venv/bin/python"
else
    python=""
fi

if [ "${1:-}" = "--python" ]; then
    echo "${python:-$(base_python)}"
    exit
fi

if [ -z "$python" ]; then
    base="$(base_python)"
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "$base is $("$base" --version 2>&1); vlmkd needs Python 3.10 or newer: set PYTHON=/path/to/python3.12"
    echo "setup: making the environment $venv with $("$base" --version)" >&2
    "$base" -m venv "$venv" || fail "$base cannot make environments; on Debian: apt-get install python3-venv"
    python="$venv/bin/python"
fi

extras="$(IFS=,; echo "$*")"
prefix="$("$python" -c 'import sys; print(sys.prefix)')"
stamp="$prefix/.vlmkd-setup"
# With the path: a copy of the repository in another place installs itself again.
wanted="$({ pwd; cat requirements.txt pyproject.toml; } | "$python" -c \
    'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())') [$extras]"
if grep -qxF "$wanted" "$stamp" 2>/dev/null; then
    echo "setup: $prefix is up to date" >&2
    exit
fi

# An interrupted first call, and environments of other tools, may lack pip.
"$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null ||
    fail "$prefix has no pip; delete it, or name another environment with VLMKD_VENV"
echo "setup: installing vlmkd${extras:+[$extras]} into $prefix (the first time: about 3 GB, some minutes)" >&2
"$python" -m pip install -qq --disable-pip-version-check --editable ".${extras:+[$extras]}" ||
    fail "pip failed (see above); a CPU-only machine can install torch first, see requirements.txt"
if [ -w "$prefix" ]; then
    # Older lines of the same files stay: each names extras that are installed as well.
    { grep -F "${wanted%% *}" "$stamp" 2>/dev/null || true; echo "$wanted"; } >"$stamp.part"
    mv "$stamp.part" "$stamp"
fi
activate="; for its python: . $prefix/bin/activate"
[ -z "${VLMKD_NO_VENV:-}" ] || activate=""
echo "setup: done$activate" >&2
