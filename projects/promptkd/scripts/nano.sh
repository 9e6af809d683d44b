#!/usr/bin/env bash
# PromptKD from end to end on the embedded emoji set, base and novel classes, on two CPU cores.
#
#   bash projects/promptkd/scripts/nano.sh
#
# Zero-shot student and teacher, the teacher with prompts from 16 shots of the base classes, the student distilled without
# labels; and one epoch with the text tower at every step beside one with stored class vectors, for their seconds a step.
# RUNS (default: runs/promptkd_emoji) is the folder of everything; finished runs are kept.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
runs="${RUNS:-runs/promptkd_emoji}"
configs=projects/promptkd/configs/emoji
python="$(bash scripts/setup.sh --python)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" OMP_WAIT_POLICY=passive

measure() { # NAME CHECKPOINT
    bash scripts/launch.sh projects/promptkd/eval.py --setting base2novel --data emoji --quiet --ckpt "$2" --json "$runs/$1.json"
}
student() { # NAME [field=value ...]
    bash scripts/launch.sh projects/promptkd/train_student.py "$configs/base.yaml" "$configs/student.yaml" \
        run_dir="$runs/$1" teacher.prompts="$runs/teacher/export" "${@:2}"
}

bash scripts/launch.sh projects/promptkd/train_teacher.py "$configs/base.yaml" "$configs/teacher.yaml" run_dir="$runs/teacher"
bash scripts/launch.sh projects/promptkd/build_bank.py data.set=emoji out="$runs/class_vectors.safetensors" \
    teacher.prompts="$runs/teacher/export"
student student class_vectors="$runs/class_vectors.safetensors"
student stored_class_vectors class_vectors="$runs/class_vectors.safetensors" epochs=1 batch_size=8 shots=8 optim.lr=0.005
student text_every_step text_every_step=true epochs=1 batch_size=8 shots=8 optim.lr=0.005

measure zero_shot_student clip:zoo:tinyclip-emoji-student
measure zero_shot_teacher clip:zoo:tinyclip-emoji-teacher
measure prompted_teacher "$runs/teacher"
measure distilled_student "$runs/student"
"$python" - "$runs" <<'PYTHON'
import json
import pathlib
import sys

runs = pathlib.Path(sys.argv[1])
for name in ("zero_shot_student", "zero_shot_teacher", "prompted_teacher", "distilled_student"):
    row = json.loads((runs / f"{name}.json").read_text())["summary"]["average"]
    print(f"{name:20} " + "  ".join(f"{key} {100 * row[key]:.2f}" for key in ("base_top1", "novel_top1", "harmonic_mean")))
for name in ("stored_class_vectors", "text_every_step"):
    lines = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
    spent = [line["step_s"] for line in lines if line["kind"] == "train"][1:]
    print(f"{name:20} {sum(spent) / len(spent):.3f} s a step")
PYTHON
