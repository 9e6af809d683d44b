#!/usr/bin/env bash
# TinyCLIP with manual inheritance, ViT-B/32 -> 75 % -> 50 %, as published.
#
#   DATA='/data/laion400m/{00000..41407}.tar' IMAGENET=/data/imagenet NPROC=8 \
#       bash projects/tinyclip/scripts/vit_b32_manual.sh [field=value ...]
#
# DATA, IMAGENET, NPROC, RUNS and DRY_RUN: see common.sh. Further `field=value` overrides hold for both
# stages.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# Both stages: the affinities of OpenCLIP's ViT-B/32 at temperature 0.02, AdamW at 1e-4 in batches of 8,192
# (base/recipe.yaml), six epochs of LAION-400M (base/laion400m.yaml), zero-shot ImageNet after each epoch.
shared=("$configs/base/recipe.yaml" "$configs/base/laion400m.yaml" data.sources.0.shards="['$DATA']"
    evaluation.zero_shot.0.data="$IMAGENET")

# 100 -> 75 %: ViT-61M/32 + Text-29M, whose towers are cut out of ViT-B/32: leading channels and heads, nine
# of twelve text layers.
$launch projects/tinyclip/train_distill.py "${shared[@]}" "$configs/vit_b32_manual_75.yaml" \
    run_dir="$runs/vit_b32_manual_75" "$@"

# 75 -> 50 %: ViT-40M/32 + Text-19M, cut out of the first stage's export in the same way. The teacher stays
# ViT-B/32.
$launch projects/tinyclip/train_distill.py "${shared[@]}" "$configs/vit_b32_manual_50.yaml" \
    run_dir="$runs/vit_b32_manual_50" inherit.image_from.model="local-dir:$runs/vit_b32_manual_75/export" \
    inherit.text_from.model="local-dir:$runs/vit_b32_manual_75/export" "$@"
