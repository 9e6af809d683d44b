#!/usr/bin/env bash
# ImageNet with 1 to 16 labelled images a class: ResNet-18 from scratch and ResNet-50 from DINO, DHO and
# baselines.
#
#   ROOT=/data NPROC=4 bash projects/dho/scripts/imagenet_few_shot.sh [field=value ...]
#
# ROOT, NPROC, RUNS, SHOTS, METHODS (default: "dho ce kd ce_kd ce_kd_feature") and DRY_RUN: see common.sh.
# FEW_SHOT_TEACHER=1 adds the methods with a Tip-Adapter-F. FIXED=1 takes the paper's alpha and beta and the
# last step, so that nothing is chosen and no image held out. DINO=FILE takes a local
# dino_resnet50_pretrain.pth. Methods without labels are one run a student.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# One student: taught by CLIP RN50, 20 epochs of the unlabelled images in batches of 256 labelled and 256
# unlabelled ones, AdamW at 1e-3 with a cosine to zero; alpha and beta are searched once an epoch on held-out
# training images.
run() { # SHOTS NAME [field=value ...]
    bash scripts/launch.sh projects/dho/train_student.py "$configs/imagenet_few_shot.yaml" \
        "$configs/teachers/clip_rn50.yaml" "$configs/students/$model.yaml" ${FIXED:+"$configs/add/fixed_mixture.yaml"} \
        run_dir="$runs/dho_imagenet_$model${FIXED:+_fixed}/$2_s1" data.root="$ROOT" split.shots="$1" \
        ${weights[@]+"${weights[@]}"} loss.method="$method" "${@:3}"
}

for model in resnet18_scratch resnet50_dino; do
    weights=()
    if [ "$model" = resnet50_dino ] && [ -n "${DINO:-}" ]; then weights=(student.weights="$DINO"); fi
    for method in ${METHODS:-dho ce kd ce_kd ce_kd_feature}; do
        # Without labels: the whole batch is unlabelled, and there is one run whatever SHOTS is.
        case "$method" in
            kd | kd_feature)
                run 0 "${method}_none" split.percent=0 "$@"
                continue
                ;;
        esac
        for shot in $shots; do
            # Without a teacher: the labelled half of the batch.
            case "$method" in
                ce) run "$shot" "ce_${shot}shot" teacher.model= teacher.pretrained= batch_size=256 "$@" ;;
                *) run "$shot" "${method}_${shot}shot" "$@" ;;
            esac

            # The few-shot teacher, fine-tuned on the same labels, and the methods that ask it for class
            # probabilities; the paper gives their label head less weight.
            case "${FEW_SHOT_TEACHER:+$method}" in
                dho | ce_kd | pcgrad)
                    adapter="$runs/tip_adapter_imagenet_${shot}shot"
                    NPROC=1 HOSTFILE="" bash scripts/launch.sh projects/dho/train_tip_adapter.py \
                        "$configs/tip_adapter/base.yaml" "$configs/tip_adapter/imagenet.yaml" run_dir="$adapter" \
                        data.root="$ROOT" split.shots="$shot"
                    run "$shot" "${method}_tip_${shot}shot" ${FIXED:+mixing.alpha=0.2} \
                        teacher.adapter="$adapter/tip_adapter.pt" "$@"
                    ;;
            esac
        done
    done
done
