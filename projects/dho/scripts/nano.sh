#!/usr/bin/env bash
# The nano table of the README: DHO against CE, KD and CE+KD on the emoji set, by number of labels; two CPU cores.
#
#   bash projects/dho/scripts/nano.sh                         (one seed: about ten minutes)
#   SEEDS="0 1 2" bash projects/dho/scripts/nano.sh
#
# RUNS (default: runs/dho_nano), SEEDS (default: 0), SHOTS (default: "1 2 4 8 16"), PERCENT (default: "1 10") and STEPS
# (default: 48) may be set; further field=value arguments go to every run. The teacher looks at each picture once, without
# augmentation, for all runs together; two runs of one thread each are under way at a time. Finished runs are kept.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
runs="${RUNS:-runs/dho_nano}"
steps="${STEPS:-48}"
base=projects/dho/configs/emoji/base.yaml
python="$(bash scripts/setup.sh --python)"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" OMP_WAIT_POLICY=passive
mkdir -p "$runs"

"$python" -m projects.dho.pool_keys "$base" > "$runs/keys.txt"
OMP_NUM_THREADS=2 "$python" data_tools/embed_labelled.py --set emoji --model zoo:tinyclip-emoji-teacher --clean \
    --keys "$runs/keys.txt" --out "$runs/teacher" --threads 2
stored=(data.teacher_outputs="$runs/teacher" data.teacher_view=clean)

# At most two at a time. A run that fails ends the script when it is waited for.
export OMP_NUM_THREADS=1
pids=()
train() { # NAME [field=value ...]
    local name="$1"
    shift
    if [ ${#pids[@]} -ge 2 ]; then
        wait "${pids[0]}"
        pids=("${pids[@]:1}")
    fi
    bash scripts/launch.sh projects/dho/train_student.py "$base" run_dir="$runs/$name" steps="$steps" "$@" \
        > "$runs/$name.out" 2>&1 || { cat "$runs/$name.out" >&2; exit 1; } &
    pids+=($!)
}

for seed in ${SEEDS:-0}; do
    train "kd_none_s$seed" seed="$seed" loss.method=kd "${stored[@]}" "$@"
    for labels in ${SHOTS:-1 2 4 8 16} $(printf '%s%% ' ${PERCENT:-1 10}); do
        case "$labels" in
            %) continue ;;
            *%) given=(split.shots=0 split.percent="${labels%\%}") name="${labels%\%}pct" ;;
            *) given=(split.shots="$labels") name="${labels}shot" ;;
        esac
        train "ce_${name}_s$seed" seed="$seed" loss.method=ce teacher.model= batch_size=24 "${given[@]}" "$@"
        train "ce_kd_${name}_s$seed" seed="$seed" loss.method=ce_kd grad_cosine_every=8 "${stored[@]}" "${given[@]}" "$@"
        train "dho_${name}_s$seed" seed="$seed" loss.method=dho grad_cosine_every=8 "${stored[@]}" "${given[@]}" "$@"
    done
done
for pid in "${pids[@]}"; do
    wait "$pid"
done

"$python" -m projects.dho.table "$runs" --markdown "$runs/table.md"
cat "$runs/table.md"
