#!/usr/bin/env bash
# The ten fine-grained sets: DHO with the zero-shot and the few-shot teacher, and the CE+KD and PCGrad baselines.
#
#   ROOT=/data NPROC=1 bash projects/dho/scripts/fine_grained.sh [field=value ...]
#
# ROOT, NPROC, RUNS, SHOTS and DRY_RUN: see common.sh. SETS and METHODS (default: "dho ce_kd pcgrad") may be set; so may
# STUDENT (default: resnet18; or mobilenet_v2) and FEW_SHOT_TEACHER=1. Gradient cosines are measured every 20 steps.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

classes() { # of SET
    case "$1" in
        caltech101 | fgvc) echo 100 ;;
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

for set in ${SETS:-caltech101 dtd eurosat fgvc food101 oxford_flowers oxford_pets stanford_cars sun397 ucf101}; do
    count="$(classes "$set")"
    for shot in $shots; do
        epoch=$(((shot * count + 63) / 64)) # labelled batches; 200 epochs, a tenth of them warm-up
        length=(split.shots="$shot" steps=$((200 * epoch)) optim.warmup_steps=$((20 * epoch))
            evaluation.every_steps="$epoch")
        [ -z "${FEW_SHOT_TEACHER:-}" ] || tip_adapter "$set" "$shot"
        for method in ${METHODS:-dho ce_kd pcgrad}; do
            stack="fine_grained teachers/clip_rn50 students/${STUDENT:-resnet18} sets/$set"
            student "dho_$set/${method}_${shot}shot_s1" "$stack" "${length[@]}" loss.method="$method" grad_cosine_every=20 "$@"
            [ -z "${FEW_SHOT_TEACHER:-}" ] || student "dho_$set/${method}_tip_${shot}shot_s1" "$stack" "${length[@]}" \
                loss.method="$method" teacher.adapter="$runs/tip_adapter_${set}_${shot}shot/tip_adapter.pt" "$@"
        done
    done
done
