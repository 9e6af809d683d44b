#!/usr/bin/env bash
# Cross-dataset: one ImageNet teacher, and a student on the target set's training images without labels.
#
#   DATA=/data bash projects/promptkd/scripts/cross_dataset.sh eurosat 1 [field=value ... of the student run]
#
# The words are the target set and the seed of the student. TEACHER names a published teacher (ImageNet-xd); else it is
# trained on ImageNet once. The variables are in common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# -ge 2 ] || fail "name a target set and a seed, e.g. eurosat 1"
set_name="$1" seed="$2"
shift 2
place="$runs/cross"

teacher="${TEACHER:-$place/teacher/export}"
[ -n "${TEACHER:-}" ] || train_teacher teacher_cross "$place/teacher" imagenet
bank "$place/$set_name/class_vectors.safetensors" "$teacher" "$set_name" cross_dataset
train_student cross_dataset "$place/$set_name/student_s$seed" "$set_name" "$seed" "$teacher" \
    "$place/$set_name/class_vectors.safetensors" "$@"
single projects/promptkd/eval.py --setting cross --ckpt "$place/{data}/student_s{seed}" --seeds "$seed" --data "$set_name" \
    --root "$data" --json "$place/$set_name/student_s$seed.json"
