#!/usr/bin/env bash
# TinyCLIP with automatic inheritance, ViT-B/32 -> 75 % -> 50 % -> 25 %, as published. Each stage is a mask
# run, which learns what to keep and exports the fused student, and a distil run, which trains that student
# for the rest of the stage.
#
#   DATA='/data/laion400m/{00000..41407}.tar' IMAGENET=/data/imagenet NPROC=8 \
#       bash projects/tinyclip/scripts/vit_b32_auto.sh [field=value ...]
#
# DATA, IMAGENET, NPROC, RUNS and DRY_RUN: see common.sh.
# YFCC      YFCC15M shards to mix in, as for the published LAIONYFCC400M models; unset: DATA alone
# Further `field=value` overrides hold for every run, `masks.` ones for mask runs.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# Every run: the affinities of OpenCLIP's ViT-B/32 at temperature 0.02, AdamW at 1e-4 in batches of 8,192
# (base/recipe.yaml), on LAION-400M or its mixture with YFCC15M. A stage is six epochs of 400 million pairs.
shared=("$configs/base/recipe.yaml" "$configs/base/laion400m.yaml" data.sources.0.shards="['$DATA']"
    evaluation.zero_shot.0.data="$IMAGENET")
if [ -n "${YFCC:-}" ]; then
    shared[1]="$configs/base/laion_yfcc.yaml"
    shared+=(data.sources.1.shards="['$YFCC']")
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
mask() { # NAME [field=value ...]
    $launch projects/tinyclip/train_mask.py "${shared[@]}" "$configs/$1.yaml" run_dir="$runs/$1" "${@:2}" \
        ${masks[@]+"${masks[@]}"} ${both[@]+"${both[@]}"}
}
distill() { # NAME [field=value ...]
    $launch projects/tinyclip/train_distill.py "${shared[@]}" "$configs/$1.yaml" run_dir="$runs/$1" "${@:2}" \
        ${both[@]+"${both[@]}"}
}

# 100 -> 75 %: 3,000 steps of gates over the whole ViT-B/32 while the rate rises, then the fused student, with
# a fresh optimiser and a cosine to zero.
mask vit_b32_auto_75_mask
distill vit_b32_auto_75_distill student.model="local-dir:$runs/vit_b32_auto_75_mask/export"

# 75 -> 50 %: 5,000 steps of gates over the 75 % student; the teacher stays ViT-B/32.
mask vit_b32_auto_50_mask student.model="local-dir:$runs/vit_b32_auto_75_distill/export"
distill vit_b32_auto_50_distill student.model="local-dir:$runs/vit_b32_auto_50_mask/export"

# 50 -> 25 %: 8,000 steps of gates over the 50 % student.
mask vit_b32_auto_25_mask student.model="local-dir:$runs/vit_b32_auto_50_distill/export"
distill vit_b32_auto_25_distill student.model="local-dir:$runs/vit_b32_auto_25_mask/export"
