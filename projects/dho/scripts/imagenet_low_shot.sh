#!/usr/bin/env bash
# ImageNet with 1 % and 10 % of the labels: CLIP ViT students, and their accuracy under distribution shift.
#
#   ROOT=/data NPROC=8 bash projects/dho/scripts/imagenet_low_shot.sh [field=value ...]
#
# ROOT, NPROC, RUNS, METHODS (default: "dho ce_kd") and DRY_RUN: see common.sh. PERCENT (default: "1 10") may be set. SHIFT=1 also
# tests every DHO student on ImageNet-V2, -Sketch, -R and -A with alpha 0.5 and beta 1, the paper's mixture there.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

percentages="${PERCENT:-1 10}"
for percent in $percentages; do
    case "$percent" in # 32 passes over the unlabelled images in batches of 256
        1) steps=158528 ;;
        10) steps=144128 ;;
        *) fail "PERCENT has $percent; the published lists are 1 and 10" ;;
    esac
    for pair in "clip_b16 dfn_h14" "clip_b16 clip_l14_336" "clip_l14_336 dfn_h14"; do
        read -r model teacher <<< "$pair"
        for method in ${METHODS:-dho ce_kd}; do
            fields_of "$method" 256
            labels="${percent}pct"
            if [ "$method" != dho ]; then own+=(student.kd_head=linear); fi # one head, for labels and teacher
            if [ "$method" = kd_feature ]; then own+=(student.head_init=default); fi # the teacher's class vectors
            if without_labels "$method"; then # one run for all percentages
                [ "$percent" = "${percentages%% *}" ] || continue
                labels=none
            fi
            name="dho_imagenet_${model}_from_$teacher/${method}_${labels}_s1"
            student "$name" "imagenet_low_shot teachers/$teacher students/$model" split.percent="$percent" steps="$steps" \
                "${own[@]}" "$@"
            if [ -n "${SHIFT:-}" ] && [ "$method" = dho ]; then
                NPROC=1 HOSTFILE="" bash scripts/launch.sh projects/dho/eval.py --model "$runs/$name/export" --root "$ROOT" \
                    --set imagenetv2 imagenet-sketch imagenet-r imagenet-a --alpha 0.5 --beta 1 --json "$runs/$name/shift.json"
            fi
        done
    done
done
