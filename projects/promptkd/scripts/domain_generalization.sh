#!/usr/bin/env bash
# Domain generalization: one ImageNet teacher, and a student on a variant of ImageNet without labels.
#
#   DATA=/data bash projects/promptkd/scripts/domain_generalization.sh imagenet-sketch 1 [field=value ... of the student run]
#
# The words are the variant (imagenetv2, imagenet-sketch, imagenet-a, imagenet-r) and the seed. These sets
# have one split: with HOLD_OUT=0 the student is trained (without labels) on the very images that it is tested
# on, which is how the published numbers were made. HOLD_OUT (default 0.5) is the share that is tested on and
# not trained on.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# -ge 2 ] || fail "name a variant of ImageNet and a seed, e.g. imagenet-sketch 1"
set_name="$1" seed="$2" hold_out="${HOLD_OUT:-0.5}"
shift 2
place="$runs/cross"
teacher="${TEACHER:-$place/teacher/export}"

# The teacher, which is cross_dataset.sh's too: PromptSRC on CLIP ViT-L/14, 16 labels of each of ImageNet's
# classes.
if [ -z "${TEACHER:-}" ]; then
    bash scripts/launch.sh projects/promptkd/train_teacher.py "$configs/base/teacher.yaml" \
        "$configs/teacher_cross.yaml" run_dir="$place/teacher" data.set=imagenet data.root="$data"
fi

# Its class vectors, of the variant's classes.
NPROC=1 bash scripts/launch.sh projects/promptkd/build_bank.py out="$place/$set_name/class_vectors.safetensors" \
    teacher.prompts="$teacher" data.set="$set_name" data.root="$data" protocol=domain_generalization \
    ${published[@]+"${published[@]}"}

# The student: CLIP ViT-B/16 on the share that is not held out, 20 epochs of SGD at 0.005 in batches of 8,
# weight 1000.
run="$place/$set_name/student_h${hold_out}"
bash scripts/launch.sh projects/promptkd/train_student.py "$configs/base/student.yaml" \
    "$configs/domain_generalization.yaml" run_dir="${run}_s$seed" data.set="$set_name" data.root="$data" \
    seed="$seed" hold_out="$hold_out" teacher.prompts="$teacher" \
    class_vectors="$place/$set_name/class_vectors.safetensors" "$@"

# Its accuracy on the held-out share, or on all images.
NPROC=1 bash scripts/launch.sh projects/promptkd/eval.py --setting dg --hold-out "$hold_out" --ckpt "${run}_s{seed}" \
    --seeds "$seed" --data "$set_name" --root "$data" --results "${run}_s$seed.jsonl"
