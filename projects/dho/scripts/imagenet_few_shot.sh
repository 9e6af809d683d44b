#!/usr/bin/env bash
# ImageNet with 1 to 16 labelled images a class: ResNet-18 from scratch and ResNet-50 from DINO, DHO and baselines.
#
#   ROOT=/data NPROC=4 bash projects/dho/scripts/imagenet_few_shot.sh [field=value ...]
#
# ROOT, NPROC, RUNS, SHOTS, METHODS (default: "dho ce kd ce_kd ce_kd_feature") and DRY_RUN: see common.sh. FEW_SHOT_TEACHER=1
# adds the methods with a Tip-Adapter-F. FIXED=1 takes the paper's alpha and beta and the last step, so that nothing is chosen and
# no image held out. DINO=FILE takes a local dino_resnet50_pretrain.pth. Methods without labels are one run a student.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

for model in resnet18_scratch resnet50_dino; do
    given=()
    if [ "$model" = resnet50_dino ] && [ -n "${DINO:-}" ]; then given=(student.weights="$DINO"); fi
    stack="imagenet_few_shot teachers/clip_rn50 students/$model${FIXED:+ add/fixed_mixture}"
    run() { # SHOTS NAME [field=value ...]
        local epoch=$(((1281167 - 1000 * $1 + 255) / 256)) # unlabelled batches; 20 epochs
        student "dho_imagenet_$model${FIXED:+_fixed}/$2_s1" "$stack" split.shots="$1" steps=$((20 * epoch)) \
            evaluation.every_steps="$epoch" ${given[@]+"${given[@]}"} "${own[@]}" "${@:3}"
    }
    for method in ${METHODS:-dho ce kd ce_kd ce_kd_feature}; do
        fields_of "$method" 256
        if without_labels "$method"; then
            run 0 "${method}_none" "$@"
            continue
        fi
        for shot in $shots; do
            run "$shot" "${method}_${shot}shot" "$@"
            if [ -n "${FEW_SHOT_TEACHER:-}" ] && asks_class_logits "$method"; then
                tip_adapter imagenet "$shot"
                run "$shot" "${method}_tip_${shot}shot" ${FIXED:+mixing.alpha=0.2} \
                    teacher.adapter="$runs/tip_adapter_imagenet_${shot}shot/tip_adapter.pt" "$@"
            fi
        done
    done
done
