#!/usr/bin/env bash
# TinyCLIP with automatic inheritance, ViT-B/32 -> 75 % -> 50 % -> 25 %, as published. Each stage is a mask run, which
# learns what to keep and exports the fused student, and a distil run, which trains that student for the rest of the stage.
#
#   DATA='/data/laion400m/{00000..41407}.tar' IMAGENET=/data/imagenet NPROC=8 \
#       bash projects/tinyclip/scripts/vit_b32_auto.sh [field=value ...]
#
# DATA      training shards; a quoted brace range or glob
# YFCC      YFCC15M shards to mix in, as for the published LAIONYFCC400M models; unset: DATA alone
# IMAGENET  folder that holds val/<wnid>/*.JPEG
# NPROC     GPUs of this machine (several machines: multi_node.sh, slurm.sbatch; one GPU: one_gpu.sh)
# RUNS      where the run folders go; default: runs
# DRY_RUN=1 prints the commands. A second call goes on where the first stopped: finished runs are skipped, and a run
# folder whose settings differ is refused. Further `field=value` overrides hold for every run, `masks.` ones for mask runs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."

# What the caller must say.
fail() { echo "vit_b32_auto.sh: $1" >&2; exit 2; }
[ -n "${DATA:-}" ] || fail "set DATA to the training shards, e.g. DATA='/data/laion400m/{00000..41407}.tar'"
[ -n "${IMAGENET:-}" ] || fail "set IMAGENET to the folder that holds val/<wnid>/*.JPEG, e.g. IMAGENET=/data/imagenet"
[ -n "${NPROC:-}${HOSTFILE:-}${LAUNCH:-}" ] || fail "set NPROC to the number of GPUs of this machine, e.g. NPROC=8"
runs="${RUNS:-runs}"

# The training set: LAION-400M, or its mixture with YFCC15M.
data=(projects/tinyclip/configs/base/laion400m.yaml data.sources.0.shards="['$DATA']")
if [ -n "${YFCC:-}" ]; then
    data=(projects/tinyclip/configs/base/laion_yfcc.yaml data.sources.0.shards="['$DATA']" data.sources.1.shards="['$YFCC']")
fi

# `masks.` overrides exist in mask runs only.
both=()
masks=()
for override in "$@"; do
    case "$override" in
        masks.*) masks+=("$override") ;;
        *) both+=("$override") ;;
    esac
done

# One run: the shared recipe, the data, the run's file, and where things lie. LAUNCH is slurm.sbatch's.
run() { # SCRIPT NAME [field=value ...]
    ${LAUNCH:-bash scripts/launch.sh} "projects/tinyclip/$1.py" projects/tinyclip/configs/base/recipe.yaml "${data[@]}" \
        "projects/tinyclip/configs/$2.yaml" run_dir="$runs/$2" evaluation.zero_shot.0.data="$IMAGENET" \
        "${@:3}" ${both[@]+"${both[@]}"}
}

# 100 -> 75 %: masks over the whole ViT-B/32, then the fused student.
run train_mask vit_b32_auto_75_mask ${masks[@]+"${masks[@]}"}
run train_distill vit_b32_auto_75_distill student.model="local-dir:$runs/vit_b32_auto_75_mask/export"

# 75 -> 50 %: masks over the 75 % student; the teacher stays ViT-B/32.
run train_mask vit_b32_auto_50_mask student.model="local-dir:$runs/vit_b32_auto_75_distill/export" \
    ${masks[@]+"${masks[@]}"}
run train_distill vit_b32_auto_50_distill student.model="local-dir:$runs/vit_b32_auto_50_mask/export"

# 50 -> 25 %: likewise.
run train_mask vit_b32_auto_25_mask student.model="local-dir:$runs/vit_b32_auto_50_distill/export" \
    ${masks[@]+"${masks[@]}"}
run train_distill vit_b32_auto_25_distill student.model="local-dir:$runs/vit_b32_auto_25_mask/export"
