#!/usr/bin/env bash
# Base-to-novel on one data set: teacher (once a data set), class vectors, student, evaluation.
#
#   DATA=/data bash projects/promptkd/scripts/base_to_novel.sh dtd 1 [field=value ... of the student run]
#
# The words are the data set (imagenet, caltech101, oxford_pets, stanford_cars, oxford_flowers, food101, fgvc_aircraft,
# sun397, dtd, eurosat, ucf101) and the seed of the student; the paper's numbers are means over the seeds 1, 2, 3. The teacher has
# seed 1 whatever the student's is. The variables are in common.sh. A repeated call goes on where it stopped.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# -ge 2 ] || fail "name a data set and a seed, e.g. dtd 1"
set_name="$1" seed="$2"
shift 2
place="$runs/base2novel/$set_name"
weight=()
case "$set_name" in
    fgvc_aircraft | oxford_flowers | dtd) weight=("$configs/sets/weight_200.yaml") ;;
esac

teacher="${TEACHER:-$place/teacher/export}"
[ -n "${TEACHER:-}" ] || train_teacher teacher_base2novel "$place/teacher" "$set_name"
bank "$place/class_vectors.safetensors" "$teacher" "$set_name" base_to_novel
train_student base2novel "$place/student_s$seed" "$set_name" "$seed" "$teacher" "$place/class_vectors.safetensors" \
    ${weight[@]+"${weight[@]}"} "$@"
single projects/promptkd/eval.py --setting base2novel --ckpt "$place/student_s{seed}" --seeds "$seed" --data "$set_name" \
    --root "$data" --json "$place/student_s$seed.json"
