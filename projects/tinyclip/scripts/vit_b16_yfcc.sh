#!/usr/bin/env bash
# TinyCLIP ViT-39M/16 or ViT-8M/16 on YFCC15M. The recipe was never published: a reproduction target, not a guarantee.
#
#   DATA='/data/yfcc15m/{00000..01499}.tar' IMAGENET=/data/imagenet NPROC=8 \
#       bash projects/tinyclip/scripts/vit_b16_yfcc.sh [field=value ...]
#
# DATA      training shards; a quoted brace range or glob
# IMAGENET  folder that holds val/<wnid>/*.JPEG
# NPROC     GPUs of this machine (several machines: multi_node.sh, slurm.sbatch; one GPU: one_gpu.sh)
# SIZES     which students; default: "39m 8m", one after the other
# CACHE     folder of the teacher's stored embeddings, used in place of the teacher; on one machine it is written first
#           where it is missing, for several machines write it beforehand (DRY_RUN=1 prints the command)
# RUNS      where the run folders go; default: runs
# DRY_RUN=1 prints the commands. A second call goes on where the first stopped: finished runs are skipped, and a run
# folder whose settings differ is refused. Further `field=value` overrides hold for every run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."

# What the caller must say.
fail() { echo "vit_b16_yfcc.sh: $1" >&2; exit 2; }
[ -n "${DATA:-}" ] || fail "set DATA to the training shards, e.g. DATA='/data/yfcc15m/{00000..01499}.tar'"
[ -n "${IMAGENET:-}" ] || fail "set IMAGENET to the folder that holds val/<wnid>/*.JPEG, e.g. IMAGENET=/data/imagenet"
[ -n "${NPROC:-}${HOSTFILE:-}${LAUNCH:-}" ] || fail "set NPROC to the number of GPUs of this machine, e.g. NPROC=8"
runs="${RUNS:-runs}"

# With CACHE, the teacher embeds four crops of every image once, on one GPU; an interrupted call goes on.
cache=()
if [ -n "${CACHE:-}" ]; then
    embed=("$(bash scripts/setup.sh --python)" data_tools/embed_teacher.py --model ViT-B-32 --pretrained laion2b_e16
        --shards "$DATA" --crops 4 --crop-scale 0.9 1.0 --batch-size 512 --out "$CACHE")
    if [ -n "${DRY_RUN:-}" ]; then
        printf '%q ' "${embed[@]}"
        echo
    elif [ "${NNODES:-1}" = 1 ] && [ -z "${HOSTFILE:-}${LAUNCH:-}" ]; then
        "${embed[@]}"
    fi
    cache=(data.sources.0.teacher_caches="['$CACHE']")
fi

# Each student is one run of 25 epochs: the shared recipe, the data, its file, and where things lie.
for size in ${SIZES:-39m 8m}; do
    ${LAUNCH:-bash scripts/launch.sh} projects/tinyclip/train_distill.py \
        projects/tinyclip/configs/base/recipe.yaml projects/tinyclip/configs/base/yfcc15m.yaml \
        "projects/tinyclip/configs/vit_b16_yfcc_$size.yaml" run_dir="$runs/vit_b16_yfcc_$size" \
        data.sources.0.shards="['$DATA']" evaluation.zero_shot.0.data="$IMAGENET" \
        ${cache[@]+"${cache[@]}"} "$@"
done
