#!/usr/bin/env bash
# Domain generalization: one ImageNet teacher, and a student on a variant of ImageNet without labels.
#
#   DATA=/data bash projects/promptkd/scripts/domain_generalization.sh imagenet-sketch 1 [field=value ... of the student run]
#
# The words are the variant (imagenetv2, imagenet-sketch, imagenet-a, imagenet-r) and the seed. These sets have one split:
# with HOLD_OUT=0 the student is trained (without labels) on the very images that it is tested on, which is how the published
# numbers were made. HOLD_OUT (default 0.5) is the share that is tested on and not trained on.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# -ge 2 ] || fail "name a variant of ImageNet and a seed, e.g. imagenet-sketch 1"
set_name="$1" seed="$2" hold_out="${HOLD_OUT:-0.5}"
shift 2
place="$runs/cross"

teacher="${TEACHER:-$place/teacher/export}"
[ -n "${TEACHER:-}" ] || train_teacher teacher_cross "$place/teacher" imagenet
bank "$place/$set_name/class_vectors.safetensors" "$teacher" "$set_name" domain_generalization
run="$place/$set_name/student_h${hold_out}"
train_student domain_generalization "${run}_s$seed" "$set_name" "$seed" "$teacher" \
    "$place/$set_name/class_vectors.safetensors" hold_out="$hold_out" "$@"
single projects/promptkd/eval.py --setting dg --hold-out "$hold_out" --ckpt "${run}_s{seed}" --seeds "$seed" \
    --data "$set_name" --root "$data" --json "${run}_s$seed.json"
