#!/usr/bin/env bash
# TinyCLIP with manual inheritance, ViT-B/32 -> 75 % -> 50 %, as published: 6 epochs of LAION-400M for each stage.
#
#   DATA='/data/laion400m/{00000..41407}.tar' IMAGENET=/data/imagenet NPROC=8 \
#       bash projects/tinyclip/scripts/vit_b32_manual.sh [field=value ...]
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
fail() { echo "vit_b32_manual.sh: $1" >&2; exit 2; }
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

# 100 -> 75 %: ViT-61M/32 + Text-29M, cut out of ViT-B/32.
stage vit_b32_manual_75 "$@"

# 75 -> 50 %: ViT-40M/32 + Text-19M, cut out of the first stage's export; the teacher stays ViT-B/32.
first="local-dir:$runs/vit_b32_manual_75/export"
stage vit_b32_manual_50 inherit.image_from.model="$first" inherit.text_from.model="$first" "$@"
