#!/usr/bin/env bash
# TinyCLIP ResNets, RN50 -> 75 % -> 50 %, on LAION-400M. The first stage is the maintainer's, the second by analogy.
#
#   DATA='/data/laion400m/{00000..41407}.tar' IMAGENET=/data/imagenet NPROC=8 \
#       bash projects/tinyclip/scripts/rn50_manual.sh [field=value ...]
#
# DATA, IMAGENET, NPROC, RUNS and DRY_RUN: see common.sh.
# Further `field=value` overrides hold for every stage.
set -euo pipefail
example_data="/data/laion400m/{00000..41407}.tar"
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

data=(projects/tinyclip/configs/base/laion400m.yaml data.sources.0.shards="['$DATA']")

# 100 -> 75 %: ResNet-30M + Text-29M, cut out of RN50@openai; the teacher is ViT-B/32.
run train_distill rn50_manual_75 "$@"

# 75 -> 50 %: ResNet-19M + Text-19M, cut out of the first stage's export; the same teacher.
first="local-dir:$runs/rn50_manual_75/export"
run train_distill rn50_manual_50 inherit.image_from.model="$first" inherit.text_from.model="$first" "$@"
