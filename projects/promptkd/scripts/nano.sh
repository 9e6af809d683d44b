#!/usr/bin/env bash
# PromptKD from end to end on the embedded emoji set, base and novel classes, on two CPU cores.
#
#   bash projects/promptkd/scripts/nano.sh [field=value ...]              (a first look: one seed, some ten minutes)
#   LENGTH=full bash projects/promptkd/scripts/nano.sh                    (the table of the README: some 25 minutes)
#
# Zero-shot student and teacher, the teacher with prompts from 16 shots of the base classes, the student
# distilled without labels; and one short run with the text tower at every step beside the same one with
# stored class vectors. The first look takes at most 64 images a class, LENGTH=full all of them and three
# seeds. RUNS (default: runs/promptkd_emoji, with LENGTH=full runs/promptkd_emoji_full) is the folder of
# everything, SEEDS are the students'; arguments go to every student. Finished runs are kept. DRY_RUN=1 prints
# the commands.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
case "${LENGTH:-first}" in
    first) runs="${RUNS:-runs/promptkd_emoji}" seeds="${SEEDS:-1}" length=() ;;
    full) runs="${RUNS:-runs/promptkd_emoji_full}" seeds="${SEEDS:-1 2 3}" length=(shots=0 steps=4ep) ;;
    *) echo "nano.sh: LENGTH is $LENGTH; use full, or leave it out" >&2; exit 2 ;;
esac
extra=("$@")
configs=projects/promptkd/configs/emoji
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" OMP_WAIT_POLICY=passive

measure() { # NAME CHECKPOINT [SEED ...]
    bash scripts/launch.sh projects/promptkd/eval.py --setting base2novel --data emoji --quiet --ckpt "$2" \
        --results "$runs/$1.jsonl" ${3:+--seeds "${@:3}"}
}
student() { # NAME [field=value ...]
    bash scripts/launch.sh projects/promptkd/train_student.py "$configs/base.yaml" "$configs/student.yaml" \
        run_dir="$runs/$1" teacher.prompts="$runs/teacher/export" "${@:2}" ${extra[@]+"${extra[@]}"}
}

# The teacher's prompts, from 16 labels of each base class, and its vectors of all classes.
bash scripts/launch.sh projects/promptkd/train_teacher.py "$configs/base.yaml" "$configs/teacher.yaml" \
    run_dir="$runs/teacher"
bash scripts/launch.sh projects/promptkd/build_bank.py data.set=emoji out="$runs/class_vectors.safetensors" \
    teacher.prompts="$runs/teacher/export"

# The students, without labels.
stored=(class_vectors="$runs/class_vectors.safetensors")
for seed in $seeds; do
    student "student_s$seed" seed="$seed" evaluation.every_steps=1ep "${stored[@]}" ${length[@]+"${length[@]}"}
done

# What storing the class vectors saves: the same short run with them, and with the text tower at every step.
short=(steps=1ep shots=8 log.every_steps=2)
student stored_class_vectors "${stored[@]}" "${short[@]}"
student text_every_step text_every_step=true "${short[@]}"

# Base, novel and harmonic mean of all four.
measure zero_shot_student clip:zoo:tinyclip-emoji-student
measure zero_shot_teacher clip:zoo:tinyclip-emoji-teacher
measure prompted_teacher "$runs/teacher"
# shellcheck disable=SC2086
measure distilled_student "$runs/student_s{seed}" $seeds
bash scripts/launch.sh scripts/table.py "$runs" --spec projects/promptkd/table.yaml --markdown "$runs/table.md"
[ -z "${DRY_RUN:-}" ] || exit 0
if cmp -s "$runs"/{text_every_step,stored_class_vectors}/export/model.safetensors; then end="the same"; else end=different; fi
printf '\nBoth kinds of class vectors end in %s weights (to the bit).\n' "$end" >> "$runs/table.md"
cat "$runs/table.md"
