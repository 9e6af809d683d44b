#!/usr/bin/env bash
# ImageNet with 1 % and 10 % of the labels: CLIP ViT students, and their accuracy under distribution shift.
#
#   ROOT=/data NPROC=8 bash projects/dho/scripts/imagenet_low_shot.sh [field=value ...]
#
# ROOT, NPROC, RUNS, METHODS (default: "dho ce_kd") and DRY_RUN: see common.sh. PERCENT (default: "1 10") may
# be set. SHIFT=1 also tests every DHO student on ImageNet-V2, -Sketch, -R and -A with alpha 0.5 and beta 1,
# the paper's mixture there. Methods without labels are one run a student and teacher.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

percentages="${PERCENT:-1 10}"
for percent in $percentages; do
    case "$percent" in
        1 | 10) ;;
        *) fail "PERCENT has $percent; the published lists are 1 and 10" ;;
    esac
    for pair in "clip_b16 dfn_h14" "clip_b16 clip_l14_336" "clip_l14_336 dfn_h14"; do
        read -r model teacher <<< "$pair"
        for method in ${METHODS:-dho ce_kd}; do
            # What a baseline takes back: its second head, whose form is the teacher's; labels or teacher.
            given=() labels="${percent}pct"
            if [ "$method" != dho ]; then given+=(student.kd_head=linear); fi
            case "$method" in
                ce) given+=(teacher.model= teacher.pretrained= batch_size=256) ;;
                kd) given+=(split.shots=0 split.percent=0) labels=none ;;
                kd_feature) given+=(split.shots=0 split.percent=0 student.head_init=default) labels=none ;;
            esac
            if [ "$labels" = none ] && [ "$percent" != "${percentages%% *}" ]; then continue; fi

            # One student, taught by DFN5B ViT-H/14 or CLIP ViT-L/14: batches of 256 labelled and 256
            # unlabelled images, AdamW at 5e-5, 5,000 steps of warm-up and a cosine; alpha and beta 0.5, the
            # last step.
            name="dho_imagenet_${model}_from_$teacher/${method}_${labels}_s1"
            bash scripts/launch.sh projects/dho/train_student.py "$configs/imagenet_low_shot.yaml" \
                "$configs/teachers/$teacher.yaml" "$configs/students/$model.yaml" run_dir="$runs/$name" \
                data.root="$ROOT" split.percent="$percent" loss.method="$method" \
                ${given[@]+"${given[@]}"} "$@"

            # The same student on shifted test sets.
            if [ -n "${SHIFT:-}" ] && [ "$method" = dho ]; then
                NPROC=1 HOSTFILE="" bash scripts/launch.sh projects/dho/eval.py --model "$runs/$name/export" \
                    --root "$ROOT" --set imagenetv2 imagenet-sketch imagenet-r imagenet-a --alpha 0.5 --beta 1 \
                    --results "$runs/$name/shift.jsonl"
            fi
        done
    done
done
