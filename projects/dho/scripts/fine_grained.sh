#!/usr/bin/env bash
# The ten fine-grained sets: DHO with the zero-shot and the few-shot teacher, and the baselines.
#
#   ROOT=/data NPROC=1 bash projects/dho/scripts/fine_grained.sh [field=value ...]
#
# ROOT, NPROC, RUNS, SHOTS, METHODS (default: "dho ce_kd pcgrad") and DRY_RUN: see common.sh. SETS may be set; so may
# STUDENT (default: resnet18; or mobilenet_v2) and FEW_SHOT_TEACHER=1. Methods without labels are one run a set, as long as 16
# shots'. Gradient cosines are measured every 20 steps where there are two losses.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

classes() { # of SET
    case "$1" in
        caltech101 | fgvc_aircraft) echo 100 ;;
        food101 | ucf101) echo 101 ;;
        dtd) echo 47 ;;
        eurosat) echo 10 ;;
        oxford_flowers) echo 102 ;;
        oxford_pets) echo 37 ;;
        stanford_cars) echo 196 ;;
        sun397) echo 397 ;;
        *) fail "SETS names $1, which is none of the ten sets" ;;
    esac
}

for set in ${SETS:-caltech101 dtd eurosat fgvc_aircraft food101 oxford_flowers oxford_pets stanford_cars sun397 ucf101}; do
    count="$(classes "$set")"
    stack="fine_grained teachers/clip_rn50 students/${STUDENT:-resnet18} sets/$set"
    run() { # METHOD SHOTS NAME [field=value ...]
        local epoch=$((($2 * count + 63) / 64)) # labelled batches; 200 epochs, a tenth of them warm-up
        student "dho_$set/$3_s1" "$stack" split.shots="$2" steps=$((200 * epoch)) optim.warmup_steps=$((20 * epoch)) \
            evaluation.every_steps="$epoch" "${own[@]}" "${@:4}"
    }
    for method in ${METHODS:-dho ce_kd pcgrad}; do
        fields_of "$method" 64
        if without_labels "$method"; then
            run "$method" 16 "${method}_none" "$@"
            continue
        fi
        if [ "$method" != ce ]; then own+=(grad_cosine_every=20); fi
        for shot in $shots; do
            run "$method" "$shot" "${method}_${shot}shot" "$@"
            if [ -n "${FEW_SHOT_TEACHER:-}" ] && asks_class_logits "$method"; then
                tip_adapter "$set" "$shot"
                run "$method" "$shot" "${method}_tip_${shot}shot" grad_cosine_every=0 \
                    teacher.adapter="$runs/tip_adapter_${set}_${shot}shot/tip_adapter.pt" "$@"
            fi
        done
    done
done
