#!/usr/bin/env bash
# Sourced by the recipes of this folder, not run: what the caller must say. The runs themselves are written
# out in each.
#
# DATA      training shards; a quoted brace range or glob
# IMAGENET  folder that holds val/<wnid>/*.JPEG
# NPROC     GPUs of this machine (several machines: multi_node.sh, slurm.sbatch; one GPU: one_gpu.sh)
# RUNS      where the run folders go; default: runs
# DRY_RUN=1 prints the commands. A second call goes on where the first stopped: finished runs are skipped, and
# a run folder whose settings differ is refused.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."

fail() { echo "$(basename "$0"): $1" >&2; exit 2; }
[ "$(basename "$0")" != common.sh ] || fail "is sourced by the recipes beside it; run one of those"
[ -n "${DATA:-}" ] || fail "set DATA to the training shards, e.g. DATA='/data/laion400m/{00000..41407}.tar'"
[ -n "${IMAGENET:-}" ] || fail "set IMAGENET to the folder that holds val/<wnid>/*.JPEG, e.g. IMAGENET=/data/imagenet"
[ -n "${NPROC:-}${HOSTFILE:-}${LAUNCH:-}" ] || fail "set NPROC to the number of GPUs of this machine, e.g. NPROC=8"
runs="${RUNS:-runs}"
configs=projects/tinyclip/configs
launch="${LAUNCH:-bash scripts/launch.sh}" # slurm.sbatch puts srun before it
