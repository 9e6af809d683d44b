#!/usr/bin/env bash
# The nano table of the README: DHO against CE, KD and CE+KD on the emoji set, by number of labels; two CPU cores.
#
#   bash projects/dho/scripts/nano.sh                         (one seed)
#   SEEDS="0 1 2" bash projects/dho/scripts/nano.sh
#
# RUNS (default: runs/dho_nano), SEEDS (default: 0), SHOTS (default: "1 2 4 8 16"), PERCENT (default: "1 10") and STEPS
# (default: 96) may be set; further field=value arguments go to every run. The teacher looks at each picture once, without
# augmentation, for all runs together. Finished runs are kept.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
runs="${RUNS:-runs/dho_nano}"
steps="${STEPS:-96}"
base=projects/dho/configs/emoji/base.yaml
python="$(bash scripts/setup.sh --python)"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" OMP_WAIT_POLICY=passive
mkdir -p "$runs"

"$python" -m projects.dho.pool_keys "$base" > "$runs/keys.txt"
OMP_NUM_THREADS=2 "$python" data_tools/embed_labelled.py --set emoji --model zoo:tinyclip-emoji-teacher --clean \
    --keys "$runs/keys.txt" --out "$runs/teacher" --threads 2

# Two runs of one thread each at a time: every line of theirs begins with the run's name.
export OMP_NUM_THREADS=1 base runs steps
train() { # "METHOD LABELS SEED" [field=value ...]; LABELS: 4shot, 10pct or none
    local method labels seed name given=()
    read -r method labels seed <<< "$1"
    case "$labels" in
        *shot) given+=(split.shots="${labels%shot}") ;;
        *pct) given+=(split.shots=0 split.percent="${labels%pct}") ;;
    esac
    case "$method" in
        ce) given+=(teacher.model= batch_size=24) ;;
        *) given+=(data.teacher_outputs="$runs/teacher" data.teacher_view=clean) ;;
    esac
    case "$method" in ce_kd | dho) given+=(grad_cosine_every=8) ;; esac
    name="${method}_${labels}_s$seed"
    bash scripts/launch.sh projects/dho/train_student.py "$base" run_dir="$runs/$name" seed="$seed" steps="$steps" \
        loss.method="$method" "${given[@]}" "${@:2}" 2>&1 | sed -u "s/^/[$name] /"
}
export -f train
given_labels=()
for shots in ${SHOTS-1 2 4 8 16}; do given_labels+=("${shots}shot"); done
for percent in ${PERCENT-1 10}; do given_labels+=("${percent}pct"); done
for seed in ${SEEDS:-0}; do
    echo "kd none $seed"
    for labels in ${given_labels[@]+"${given_labels[@]}"}; do
        printf '%s\n' "ce $labels $seed" "ce_kd $labels $seed" "dho $labels $seed"
    done
done | xargs -P 2 -I RUN bash -euo pipefail -c 'train "$@"' train RUN "$@"

"$python" -m projects.dho.table "$runs" --markdown "$runs/table.md"
cat "$runs/table.md"
