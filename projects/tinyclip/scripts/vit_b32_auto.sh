#!/usr/bin/env bash
# TinyCLIP with automatic inheritance, ViT-B/32 -> 75 % -> 50 % -> 25 %, as published. Each stage is a mask run, which
# learns what to keep and exports the fused student, and a distil run, which trains that student for the rest of the stage.
#
#   DATA='/data/laion400m/{00000..41407}.tar' IMAGENET=/data/imagenet NPROC=8 \
#       bash projects/tinyclip/scripts/vit_b32_auto.sh [field=value ...]
#
# DATA, IMAGENET, NPROC, RUNS and DRY_RUN: see common.sh.
# YFCC      YFCC15M shards to mix in, as for the published LAIONYFCC400M models; unset: DATA alone
# Further `field=value` overrides hold for every run, `masks.` ones for mask runs.
set -euo pipefail
example_data="/data/laion400m/{00000..41407}.tar"
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

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

# Every run takes the overrides that are not about masks.
stage() { run "$@" ${both[@]+"${both[@]}"}; } # SCRIPT NAME [field=value ...]

# 100 -> 75 %: masks over the whole ViT-B/32, then the fused student.
stage train_mask vit_b32_auto_75_mask ${masks[@]+"${masks[@]}"}
stage train_distill vit_b32_auto_75_distill student.model="local-dir:$runs/vit_b32_auto_75_mask/export"

# 75 -> 50 %: masks over the 75 % student; the teacher stays ViT-B/32.
stage train_mask vit_b32_auto_50_mask student.model="local-dir:$runs/vit_b32_auto_75_distill/export" \
    ${masks[@]+"${masks[@]}"}
stage train_distill vit_b32_auto_50_distill student.model="local-dir:$runs/vit_b32_auto_50_mask/export"

# 50 -> 25 %: likewise.
stage train_mask vit_b32_auto_25_mask student.model="local-dir:$runs/vit_b32_auto_50_distill/export" \
    ${masks[@]+"${masks[@]}"}
stage train_distill vit_b32_auto_25_distill student.model="local-dir:$runs/vit_b32_auto_25_mask/export"
