#!/usr/bin/env bash
# Sourced by the recipes of this folder, not run: what the caller must say, and how one run of a recipe is started.
#
# DATA      training shards; a quoted brace range or glob
# IMAGENET  folder that holds val/<wnid>/*.JPEG
# NPROC     GPUs of this machine (several machines: multi_node.sh, slurm.sbatch; one GPU: one_gpu.sh)
# RUNS      where the run folders go; default: runs
# DRY_RUN=1 prints the commands. A second call goes on where the first stopped: finished runs are skipped, and a run
# folder whose settings differ is refused.
set -euo pipefail
recipe="$(basename "$0")"
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."

fail() { echo "$recipe: $1" >&2; exit 2; }
[ "$recipe" != common.sh ] || fail "is sourced by the recipes beside it; run one of those"
[ -n "${DATA:-}" ] || fail "set DATA to the training shards, e.g. DATA='$example_data'"
[ -n "${IMAGENET:-}" ] || fail "set IMAGENET to the folder that holds val/<wnid>/*.JPEG, e.g. IMAGENET=/data/imagenet"
[ -n "${NPROC:-}${HOSTFILE:-}${LAUNCH:-}" ] || fail "set NPROC to the number of GPUs of this machine, e.g. NPROC=8"
runs="${RUNS:-runs}"

# One run: the shared recipe, the training set (`data`), the run's file, and where things lie. LAUNCH is slurm.sbatch's.
run() { # SCRIPT NAME [field=value ...]
    ${LAUNCH:-bash scripts/launch.sh} "projects/tinyclip/$1.py" projects/tinyclip/configs/base/recipe.yaml "${data[@]}" \
        "projects/tinyclip/configs/$2.yaml" run_dir="$runs/$2" evaluation.zero_shot.0.data="$IMAGENET" "${@:3}"
}
