#!/usr/bin/env bash
# The ten fine-grained sets: DHO with the zero-shot and the few-shot teacher, and the baselines.
#
#   ROOT=/data NPROC=1 bash projects/dho/scripts/fine_grained.sh [field=value ...]
#
# ROOT, NPROC, RUNS, SHOTS, METHODS (default: "dho ce_kd pcgrad") and DRY_RUN: see common.sh. SETS may be set;
# so may STUDENT (default: resnet18; or mobilenet_v2) and FEW_SHOT_TEACHER=1, which adds the methods with a
# Tip-Adapter-F. Methods without labels are one run a set, as long as 16 shots'.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

steps_without_labels() { # of SET: 200 epochs of 16 shots a class in batches of 64
    case "$1" in
        caltech101 | fgvc_aircraft) echo 5000 ;;
        food101 | oxford_flowers | ucf101) echo 5200 ;;
        dtd) echo 2400 ;;
        eurosat) echo 600 ;;
        oxford_pets) echo 2000 ;;
        stanford_cars) echo 9800 ;;
        sun397) echo 20000 ;;
        *) fail "SETS names $1, which is none of the ten sets" ;;
    esac
}

# One student: ResNet-18 taught by CLIP RN50, 200 epochs of the labelled images in batches of 64 labelled and
# 64 unlabelled ones, AdamW at 1e-3, a tenth of the steps as warm-up and a linear fall; alpha and beta are
# searched once an epoch on the validation images.
run() { # SHOTS NAME [field=value ...]
    bash scripts/launch.sh projects/dho/train_student.py "$configs/fine_grained.yaml" \
        "$configs/teachers/clip_rn50.yaml" "$configs/students/${STUDENT:-resnet18}.yaml" "$configs/sets/$set.yaml" \
        run_dir="$runs/dho_$set/$2_s1" data.root="$ROOT" split.shots="$1" \
        loss.method="$method" "${@:3}"
}

for set in ${SETS:-caltech101 dtd eurosat fgvc_aircraft food101 oxford_flowers oxford_pets stanford_cars sun397 ucf101}; do
    steps="$(steps_without_labels "$set")"
    for method in ${METHODS:-dho ce_kd pcgrad}; do
        # Without labels: the whole batch is unlabelled, and there is one run whatever SHOTS is.
        case "$method" in
            kd | kd_feature)
                run 16 "${method}_none" split.shots=0 split.percent=0 steps="$steps" evaluation.every_steps=0.5% "$@"
                continue
                ;;
        esac
        for shot in $shots; do
            # Without a teacher: the labelled half of the batch. With both losses, how their gradients agree
            # is measured.
            case "$method" in
                ce) run "$shot" "ce_${shot}shot" teacher.model= teacher.pretrained= batch_size=64 "$@" ;;
                *) run "$shot" "${method}_${shot}shot" grad_cosine_every=20 "$@" ;;
            esac

            # The few-shot teacher, fine-tuned on the same labels, and the methods that ask it for class
            # probabilities.
            case "${FEW_SHOT_TEACHER:+$method}" in
                dho | ce_kd | pcgrad)
                    adapter="$runs/tip_adapter_${set}_${shot}shot"
                    NPROC=1 HOSTFILE="" bash scripts/launch.sh projects/dho/train_tip_adapter.py \
                        "$configs/tip_adapter/base.yaml" "$configs/tip_adapter/$set.yaml" run_dir="$adapter" \
                        data.root="$ROOT" split.shots="$shot"
                    run "$shot" "${method}_tip_${shot}shot" teacher.adapter="$adapter/tip_adapter.pt" "$@"
                    ;;
            esac
        done
    done
done
