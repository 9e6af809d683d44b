#!/usr/bin/env bash
# TinyCLIP ResNets, RN50 -> 75 % -> 50 %. The first stage is the maintainer's, the second by analogy.
#
#   DATA='/data/laion400m/{00000..41407}.tar' IMAGENET=/data/imagenet NPROC=8 \
#       bash projects/tinyclip/scripts/rn50_manual.sh [field=value ...]
#
# DATA, IMAGENET, NPROC, RUNS and DRY_RUN: see common.sh. Further `field=value` overrides hold for both
# stages.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# Both stages: as vit_b32_manual.sh, teacher included, with the optimiser's settings for models without "vit"
# in their name.
shared=("$configs/base/recipe.yaml" "$configs/base/laion400m.yaml" data.sources.0.shards="['$DATA']"
    evaluation.zero_shot.0.data="$IMAGENET")

# 100 -> 75 %: ResNet-30M + Text-29M, cut out of RN50@openai.
$launch projects/tinyclip/train_distill.py "${shared[@]}" "$configs/rn50_manual_75.yaml" \
    run_dir="$runs/rn50_manual_75" "$@"

# 75 -> 50 %: ResNet-19M + Text-19M, cut out of the first stage's export.
$launch projects/tinyclip/train_distill.py "${shared[@]}" "$configs/rn50_manual_50.yaml" \
    run_dir="$runs/rn50_manual_50" inherit.image_from.model="local-dir:$runs/rn50_manual_75/export" \
    inherit.text_from.model="local-dir:$runs/rn50_manual_75/export" "$@"
