#!/usr/bin/env bash
# ImageNet with 1 to 16 labelled images a class: ResNet-18 from scratch and ResNet-50 from DINO, DHO and baselines.
#
#   ROOT=/data NPROC=4 bash projects/dho/scripts/imagenet_few_shot.sh
#
# ROOT, NPROC, RUNS, SHOTS and DRY_RUN: see common.sh. METHODS (default: "dho ce_kd ce_kd_feature") may be set, and
# FEW_SHOT_TEACHER=1 adds DHO with a Tip-Adapter-F. DINO=FILE takes a local dino_resnet50_pretrain.pth. Further field=value arguments go to every run.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

for shot in $shots; do
    epoch=$(((1281167 - 1000 * shot + 255) / 256)) # unlabelled batches; 20 epochs
    length=(split.shots="$shot" steps=$((20 * epoch)) evaluation.every_steps="$epoch")
    [ -z "${FEW_SHOT_TEACHER:-}" ] || tip_adapter imagenet "$shot"
    for model in resnet18_scratch resnet50_dino; do
        own=()
        [ "$model" = resnet18_scratch ] || [ -z "${DINO:-}" ] || own=(student.weights="$DINO")
        stack="imagenet_few_shot teachers/clip_rn50 students/$model"
        for method in ${METHODS:-dho ce_kd ce_kd_feature}; do
            student "dho_imagenet_$model/${method}_${shot}shot_s1" "$stack" "${length[@]}" "${own[@]}" loss.method="$method" "$@"
        done
        [ -z "${FEW_SHOT_TEACHER:-}" ] || student "dho_imagenet_$model/dho_tip_${shot}shot_s1" "$stack" "${length[@]}" \
            "${own[@]}" teacher.adapter="$runs/tip_adapter_imagenet_${shot}shot/tip_adapter.pt" "$@"
    done
done
