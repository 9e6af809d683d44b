#!/usr/bin/env bash
# TinyCLIP ResNets, RN50 -> 75 % -> 50 %, on LAION-400M. The first stage is the maintainer's, the second by analogy.
#
#   DATA='/data/laion400m/{00000..41407}.tar' IMAGENET=/data/imagenet NPROC=8 \
#       bash projects/tinyclip/scripts/rn50_manual.sh [field=value ...]
#
# DATA      training shards; a quoted brace range or glob
# IMAGENET  folder that holds val/<wnid>/*.JPEG
# NPROC     GPUs of this machine (several machines: multi_node.sh, slurm.sbatch; one GPU: one_gpu.sh)
# RUNS      where the run folders go; default: runs
# DRY_RUN=1 prints the commands. A second call goes on where the first stopped: finished stages are skipped, and a run
# folder whose settings differ is refused. Further `field=value` overrides hold for every stage.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."

# What the caller must say.
fail() { echo "rn50_manual.sh: $1" >&2; exit 2; }
[ -n "${DATA:-}" ] || fail "set DATA to the training shards, e.g. DATA='/data/laion400m/{00000..41407}.tar'"
[ -n "${IMAGENET:-}" ] || fail "set IMAGENET to the folder that holds val/<wnid>/*.JPEG, e.g. IMAGENET=/data/imagenet"
[ -n "${NPROC:-}${HOSTFILE:-}${LAUNCH:-}" ] || fail "set NPROC to the number of GPUs of this machine, e.g. NPROC=8"
runs="${RUNS:-runs}"

# One stage is one run: the shared recipe, the data, the stage's file, and where things lie. LAUNCH is slurm.sbatch's.
stage() { # NAME [field=value ...]
    ${LAUNCH:-bash scripts/launch.sh} projects/tinyclip/train_distill.py \
        projects/tinyclip/configs/base/recipe.yaml projects/tinyclip/configs/base/laion400m.yaml \
        "projects/tinyclip/configs/$1.yaml" run_dir="$runs/$1" \
        data.sources.0.shards="['$DATA']" evaluation.zero_shot.0.data="$IMAGENET" "${@:2}"
}

# 100 -> 75 %: ResNet-30M + Text-29M, cut out of RN50@openai; the teacher is ViT-B/32.
stage rn50_manual_75 "$@"

# 75 -> 50 %: ResNet-19M + Text-19M, cut out of the first stage's export; the same teacher.
first="local-dir:$runs/rn50_manual_75/export"
stage rn50_manual_50 inherit.image_from.model="$first" inherit.text_from.model="$first" "$@"
