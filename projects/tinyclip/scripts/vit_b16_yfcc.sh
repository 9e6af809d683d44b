#!/usr/bin/env bash
# TinyCLIP ViT-39M/16 or ViT-8M/16 on YFCC15M. The recipe was never published: a target, not a guarantee.
#
#   DATA='/data/yfcc15m/{00000..01499}.tar' IMAGENET=/data/imagenet NPROC=8 \
#       bash projects/tinyclip/scripts/vit_b16_yfcc.sh [field=value ...]
#
# DATA, IMAGENET, NPROC, RUNS and DRY_RUN: see common.sh.
# SIZES     which students; default: "39m 8m", one after the other
# CACHE     folder of the teacher's stored embeddings, used in place of the teacher; on one machine it is written first
#           where it is missing, for several machines write it beforehand (DRY_RUN=1 prints the command)
# Further `field=value` overrides hold for every run.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# With CACHE, the teacher embeds four crops of every image once, on one GPU; an interrupted call goes on.
cache=()
if [ -n "${CACHE:-}" ]; then
    if [ -n "${DRY_RUN:-}" ] || { [ "${NNODES:-1}" = 1 ] && [ -z "${HOSTFILE:-}${LAUNCH:-}" ]; }; then
        NPROC=1 NNODES=1 HOSTFILE="" bash scripts/launch.sh data_tools/embed_teacher.py --model ViT-B-32 \
            --pretrained laion2b_e16 --shards "$DATA" --crops 4 --crop-scale 0.9 1.0 --batch-size 512 --out "$CACHE"
    fi
    cache=(data.sources.0.teacher_caches="['$CACHE']")
fi

# Each student is one run: the affinities of OpenCLIP's ViT-B/32 at temperature 0.02, AdamW at 1e-4
# (base/recipe.yaml), 25 epochs of YFCC15M in batches of 4,096 (base/yfcc15m.yaml). Both are cut out of
# ViT-B/16@openai: 39m takes every image layer and every other text layer, 8m ten image layers and every
# fourth text layer at width 256.
for size in ${SIZES:-39m 8m}; do
    $launch projects/tinyclip/train_distill.py "$configs/base/recipe.yaml" "$configs/base/yfcc15m.yaml" \
        data.sources.0.shards="['$DATA']" "$configs/vit_b16_yfcc_$size.yaml" run_dir="$runs/vit_b16_yfcc_$size" \
        evaluation.zero_shot.0.data="$IMAGENET" ${cache[@]+"${cache[@]}"} "$@"
done
