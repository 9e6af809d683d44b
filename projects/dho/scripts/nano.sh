#!/usr/bin/env bash
# The nano tables of the README: DHO against CE, KD and CE+KD on the emoji set, by number of labels; two CPU
# cores.
#
#   bash projects/dho/scripts/nano.sh                         (a first look: ten minutes, one seed)
#   LENGTH=full bash projects/dho/scripts/nano.sh             (the table: three seeds, long enough to level off)
#
# RUNS (default: runs/dho_nano, or runs/dho_full), SEEDS, SHOTS, PERCENT, STEPS, METHODS (pcgrad, kd_feature
# and ce_kd_feature may be added) and TEACHER may be set; further field=value arguments go to every run.
# TEACHER is `nano`, the zoo's small CLIP, or `strong`, the pretrained EfficientNet-Lite0 and MiniLM that it
# was made from. It looks at each picture once, without augmentation, for all runs together. Finished runs are
# kept. DRY_RUN=1 prints the commands.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
fail() { echo "nano.sh: $1" >&2; exit 2; }
case "${LENGTH:-first}" in
    first) runs=runs/dho_nano seeds=0 shots="1 2 4 8 16" percent="1 10" steps=96 teacher=nano ;;
    full) runs=runs/dho_full seeds="0 1 2" shots="1 4 16" percent="" steps=800 teacher=strong ;;
    *) fail "LENGTH=$LENGTH; it is first or full" ;;
esac
runs="${RUNS:-$runs}" steps="${STEPS:-$steps}" teacher="${TEACHER:-$teacher}"
base=projects/dho/configs/emoji/base.yaml
export OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive

# The teacher: the zoo's small CLIP as it is, or the strong pair, whose heads are trained first.
case "$teacher" in
    nano) model=zoo:tinyclip-emoji-teacher ;;
    strong)
        model="emoji-oracle:$runs/oracle/heads.safetensors"
        bash scripts/launch.sh data_tools/train_emoji_oracle.py --out "$runs/oracle" --crops 0 --threads 2
        ;;
    *) fail "TEACHER=$teacher; it is nano or strong" ;;
esac

# What it says of every training picture that some run may see, of the test pictures, and of the classes.
bash scripts/launch.sh projects/dho/pool_keys.py "$base" --out "$runs/keys.txt"
embed() { # OUT [option ...]
    bash scripts/launch.sh data_tools/embed_labelled.py --set emoji --model "$model" --clean --threads 2 \
        --out "$runs/$1" "${@:2}"
}
embed teacher --keys "$runs/keys.txt"
embed teacher_test --splits test
bash scripts/launch.sh data_tools/embed_classes.py --set emoji --model "$model" --out "$runs/classes.safetensors"

# One run: EfficientNet-Lite0 with a few labels, 48 images a step, half of them labelled. No run loads the
# teacher; CE asks none and takes the labelled half alone, and KD sees no label.
export OMP_NUM_THREADS=1 base runs steps
train() { # "METHOD LABELS SEED" [field=value ...]; LABELS: 4shot, 10pct or none
    local method labels seed name given=()
    read -r method labels seed <<< "$1"
    case "$labels" in
        *shot) given+=(split.shots="${labels%shot}") ;;
        *pct) given+=(split.shots=0 split.percent="${labels%pct}") ;;
        none) given+=(split.shots=0) ;;
    esac
    case "$method" in
        ce) given+=(teacher.model= batch_size=24) ;;
        *)
            given+=(teacher.model= teacher.class_vectors="$runs/classes.safetensors"
                data.teacher_outputs="$runs/teacher" data.teacher_view=clean)
            ;;
    esac
    case "$method" in ce_kd | dho) given+=(grad_cosine_every=8) ;; esac
    name="${method}_${labels}_s$seed"
    bash scripts/launch.sh projects/dho/train_student.py "$base" run_dir="$runs/$name" seed="$seed" steps="$steps" \
        loss.method="$method" "${given[@]}" "${@:2}" 2>&1 | sed -u "s/^/[$name] /"
}
export -f train

# Every method with every number of labels and seed, two runs of one thread each at a time; every line of
# theirs begins with the run's name.
given_labels=()
for shots in ${SHOTS-$shots}; do given_labels+=("${shots}shot"); done
for part in ${PERCENT-$percent}; do given_labels+=("${part}pct"); done
for seed in ${SEEDS:-$seeds}; do
    for method in ${METHODS:-ce kd ce_kd dho}; do
        case "$method" in
            kd | kd_feature) echo "$method none $seed" ;;
            *) for labels in ${given_labels[@]+"${given_labels[@]}"}; do echo "$method $labels $seed"; done ;;
        esac
    done
done | xargs -P 2 -I RUN bash -euo pipefail -c 'train "$@"' train RUN "$@"

bash scripts/launch.sh data_tools/eval_stored_teacher.py "$runs/teacher_test" "$runs/classes.safetensors" --results "$runs/teacher_zero_shot.jsonl"
bash scripts/launch.sh scripts/table.py "$runs" --spec projects/dho/table.yaml --markdown "$runs/table.md"
[ -n "${DRY_RUN:-}" ] || cat "$runs/table.md"
