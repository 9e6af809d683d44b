#!/usr/bin/env bash
# TinyCLIP with manual inheritance, ViT-B/32 -> 75 % -> 50 %, as published: 6 epochs of LAION-400M for each stage.
#
#   DATA='/data/laion400m/{00000..41407}.tar' IMAGENET=/data/imagenet NPROC=8 \
#       bash projects/tinyclip/scripts/vit_b32_manual.sh [field=value ...]
#
# DATA, IMAGENET, NPROC, RUNS and DRY_RUN: see common.sh.
# Further `field=value` overrides hold for every stage.
set -euo pipefail
example_data="/data/laion400m/{00000..41407}.tar"
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

data=(projects/tinyclip/configs/base/laion400m.yaml data.sources.0.shards="['$DATA']")

# 100 -> 75 %: ViT-61M/32 + Text-29M, cut out of ViT-B/32.
run train_distill vit_b32_manual_75 "$@"

# 75 -> 50 %: ViT-40M/32 + Text-19M, cut out of the first stage's export; the teacher stays ViT-B/32.
first="local-dir:$runs/vit_b32_manual_75/export"
run train_distill vit_b32_manual_50 inherit.image_from.model="$first" inherit.text_from.model="$first" "$@"
