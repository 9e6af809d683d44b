#!/usr/bin/env bash
# ImageNet with 1 % and 10 % of the labels: CLIP ViT students, and their accuracy under distribution shift.
#
#   ROOT=/data NPROC=8 bash projects/dho/scripts/imagenet_low_shot.sh [field=value ...]
#
# ROOT, NPROC, RUNS and DRY_RUN: see common.sh. PERCENT (default: "1 10") may be set. SHIFT=1 also tests every student on
# ImageNet-V2, -Sketch, -R and -A with alpha 0.5 and beta 1, the paper's mixture there.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

for percent in ${PERCENT:-1 10}; do
    case "$percent" in # 32 passes over the unlabelled images in batches of 256
        1) steps=158528 ;;
        10) steps=144128 ;;
        *) fail "PERCENT has $percent; the published lists are 1 and 10" ;;
    esac
    for pair in "clip_b16 dfn_h14" "clip_b16 clip_l14_336" "clip_l14_336 dfn_h14"; do
        read -r model teacher <<< "$pair"
        name="dho_imagenet_${percent}pct_${model}_from_$teacher"
        student "$name" "imagenet_low_shot teachers/$teacher students/$model" split.percent="$percent" steps="$steps" "$@"
        if [ -n "${SHIFT:-}" ] && [ -z "${DRY_RUN:-}" ]; then
            PYTHONPATH="$PWD" "$(bash scripts/setup.sh --python)" -m projects.dho.eval --model "$runs/$name/export" \
                --set imagenetv2 imagenet-sketch imagenet-r imagenet-a --root "$ROOT" --alpha 0.5 --beta 1 --json "$runs/$name/shift.json"
        fi
    done
done
