#!/usr/bin/env bash
# Cross-dataset: one ImageNet teacher, and a student on the target set's training images without labels.
#
#   DATA=/data bash projects/promptkd/scripts/cross_dataset.sh eurosat 1 [field=value ... of the student run]
#
# The words are the target set and the seed of the student. TEACHER names a published teacher (ImageNet-xd);
# else it is trained on ImageNet once. The variables are in common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# -ge 2 ] || fail "name a target set and a seed, e.g. eurosat 1"
set_name="$1" seed="$2"
shift 2
place="$runs/cross"
teacher="${TEACHER:-$place/teacher/export}"

# The teacher: PromptSRC on CLIP ViT-L/14, 16 labels of each of ImageNet's classes. Its recipe was never
# published.
if [ -z "${TEACHER:-}" ]; then
    bash scripts/launch.sh projects/promptkd/train_teacher.py "$configs/base/teacher.yaml" \
        "$configs/teacher_cross.yaml" run_dir="$place/teacher" data.set=imagenet data.root="$data"
fi

# Its class vectors, of the target set's classes.
NPROC=1 bash scripts/launch.sh projects/promptkd/build_bank.py out="$place/$set_name/class_vectors.safetensors" \
    teacher.prompts="$teacher" data.set="$set_name" data.root="$data" protocol=cross_dataset \
    ${published[@]+"${published[@]}"}

# The student: CLIP ViT-B/16 on the target's training images, 20 epochs of SGD at 0.005 in batches of 8,
# weight 1000.
bash scripts/launch.sh projects/promptkd/train_student.py "$configs/base/student.yaml" "$configs/cross_dataset.yaml" \
    run_dir="$place/$set_name/student_s$seed" data.set="$set_name" data.root="$data" seed="$seed" \
    teacher.prompts="$teacher" class_vectors="$place/$set_name/class_vectors.safetensors" "$@"

# Its accuracy on the target's test images.
NPROC=1 bash scripts/launch.sh projects/promptkd/eval.py --setting cross --ckpt "$place/{data}/student_s{seed}" \
    --seeds "$seed" --data "$set_name" --root "$data" --results "$place/$set_name/student_s$seed.jsonl"
