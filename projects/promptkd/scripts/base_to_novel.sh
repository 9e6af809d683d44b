#!/usr/bin/env bash
# Base-to-novel on one data set: teacher (once a data set), class vectors, student, evaluation.
#
#   DATA=/data bash projects/promptkd/scripts/base_to_novel.sh dtd 1 [field=value ... of the student run]
#
# The words are the data set (imagenet, caltech101, oxford_pets, stanford_cars, oxford_flowers, food101,
# fgvc_aircraft, sun397, dtd, eurosat, ucf101) and the seed of the student; the paper's numbers are means over
# the seeds 1, 2, 3. The teacher has seed 1 whatever the student's is. The variables are in common.sh. A
# repeated call goes on where it stopped.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# -ge 2 ] || fail "name a data set and a seed, e.g. dtd 1"
set_name="$1" seed="$2"
shift 2
place="$runs/base2novel/$set_name"
teacher="${TEACHER:-$place/teacher/export}"

# The teacher: PromptSRC learns nine times four prompts in both towers of CLIP ViT-L/14 from 16 labels of each
# base class, 20 epochs of SGD at 0.005 in batches of 8; the prompts are averaged around epoch 15.
if [ -z "${TEACHER:-}" ]; then
    bash scripts/launch.sh projects/promptkd/train_teacher.py "$configs/base/teacher.yaml" \
        "$configs/teacher_base2novel.yaml" run_dir="$place/teacher" data.set="$set_name" data.root="$data"
fi

# Its class vectors, of base and novel classes alike: the teacher's text tower runs this once.
NPROC=1 bash scripts/launch.sh projects/promptkd/build_bank.py out="$place/class_vectors.safetensors" \
    teacher.prompts="$teacher" data.set="$set_name" data.root="$data" protocol=base_to_novel \
    ${published[@]+"${published[@]}"}

# The student: prompts and projector of CLIP ViT-B/16 from all training images without labels, 20 epochs of
# SGD at 0.005 in batches of 8. The KL's weight is 1000, for three sets 200.
weight=()
case "$set_name" in fgvc_aircraft | oxford_flowers | dtd) weight=("$configs/sets/weight_200.yaml") ;; esac
bash scripts/launch.sh projects/promptkd/train_student.py "$configs/base/student.yaml" "$configs/base2novel.yaml" \
    ${weight[@]+"${weight[@]}"} run_dir="$place/student_s$seed" data.set="$set_name" data.root="$data" seed="$seed" \
    teacher.prompts="$teacher" class_vectors="$place/class_vectors.safetensors" "$@"

# Its accuracy on base and on novel classes, each among their own, and the harmonic mean.
NPROC=1 bash scripts/launch.sh projects/promptkd/eval.py --setting base2novel --ckpt "$place/student_s{seed}" \
    --seeds "$seed" --data "$set_name" --root "$data" --results "$place/student_s$seed.jsonl"
