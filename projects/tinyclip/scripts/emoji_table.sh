#!/usr/bin/env bash
# The table of the README: six ways to the same small CLIP on the emoji set, equal steps, several seeds.
#
#   bash projects/tinyclip/scripts/emoji_table.sh [field=value ...]        (a first look: one seed, 96 steps, some ten minutes)
#   LENGTH=full bash projects/tinyclip/scripts/emoji_table.sh              (the table of the README: an hour and a half)
#
# Two CPU cores. RUNS (default: runs/emoji_table, with LENGTH=full runs/emoji_table_full), SEEDS (default: 0,
# of the full table "0 1 2", side by side with a thread each) and STEPS (default: 96 and 600, divisible by 12)
# may be set; arguments go to every run. Finished runs are kept and interrupted ones go on, so the command can
# be repeated. DRY_RUN=1 prints commands.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
case "${LENGTH:-first}" in
    first) runs="${RUNS:-runs/emoji_table}" seeds="${SEEDS:-0}" steps="${STEPS:-96}" looks=4 ;;
    full) runs="${RUNS:-runs/emoji_table_full}" seeds="${SEEDS:-0 1 2}" steps="${STEPS:-600}" looks=12 ;;
    *) echo "emoji_table.sh: LENGTH is $LENGTH; use full, or leave it out" >&2; exit 2 ;;
esac
extra=("optim.warmup_steps=$((steps / 15))" "$@")
configs=projects/tinyclip/configs/emoji

# The teacher looks at four crops of every training image once; no run below has to ask it again.
bash scripts/launch.sh data_tools/embed_teacher.py --model zoo:tinyclip-emoji-teacher --shards emoji:train --crops 4 \
    --crop-scale 0.6 1.0 --out "$runs/teacher_cache" --threads 2
cached=("data.sources.0.teacher_caches=[$runs/teacher_cache]")

# One student, of 29 % of the teacher's parameters.
distill() { # NAME CONFIG [field=value ...]
    local name="$1" config="$2"
    shift 2
    bash scripts/launch.sh projects/tinyclip/train_distill.py "$configs/base.yaml" "$configs/$config.yaml" \
        run_dir="$runs/$name" seed="$seed" steps="$steps" evaluation.every_steps=$((steps / looks)) \
        evaluation.retrieval=[] "${extra[@]}" "$@"
}

# One stage: a third of its steps learns the masks, the rest distils the fused model. The masks have the same
# way to go in a short stage as in a long one, so that their rates are the higher the fewer the steps.
stage() { # NAME INIT START TARGET STEPS FREEZE
    local rate
    rate="$(awk "BEGIN { print 20 / int($5 / 3) }")"
    bash scripts/launch.sh projects/tinyclip/train_mask.py "$configs/base.yaml" "$configs/mask.yaml" \
        run_dir="$runs/$1_mask" seed="$seed" steps=$(($5 / 3)) student.model="$2" masks.start_sparsity="$3" \
        masks.target_sparsity="$4" masks.lr="$rate" masks.multiplier_lr="$rate" \
        masks.freeze_pruned="$6" "${cached[@]}" evaluation.retrieval=[] "${extra[@]}"
    distill "$1" distill_pruned "${cached[@]}" student.model="local-dir:$runs/$1_mask/export" \
        steps=$(($5 - $5 / 3))
}

# The rows of the table: from scratch and inherited, with hard labels and with affinities; learned masks in
# one stage and in three.
seed_runs() {
    distill "scratch_contrastive_s$seed" scratch
    distill "scratch_affinity_s$seed" distill "${cached[@]}" inherit.image_from.model= inherit.text_from.model=
    distill "inherited_contrastive_s$seed" distill "teachers=[]" loss.affinity=0 loss.contrastive=1 \
        logit_scale.mode=learned
    distill "inherited_affinity_s$seed" distill "${cached[@]}"
    stage "automatic_s$seed" zoo:tinyclip-emoji-teacher 0 0.75 "$steps" false
    stage "multi75_s$seed" zoo:tinyclip-emoji-teacher 0 0.25 $((steps / 3)) false
    stage "multi50_s$seed" "local-dir:$runs/multi75_s$seed/export" 0.25 0.5 $((steps / 3)) true
    stage "multi25_s$seed" "local-dir:$runs/multi50_s$seed/export" 0.5 0.75 $((steps / 3)) true
}

# Several seeds side by side, one thread each: faster than two threads a run one after the other.
read -ra all <<< "$seeds"
started=()
[ ${#all[@]} = 1 ] || extra=(threads=1 "${extra[@]}")
for seed in "${all[@]}"; do
    if [ ${#all[@]} = 1 ] || [ -n "${DRY_RUN:-}" ]; then
        seed_runs
    else
        { seed_runs 2>&1 | sed -u "s/^/[seed $seed] /"; } &
        started+=($!)
    fi
done
for one in ${started[@]+"${started[@]}"}; do wait "$one"; done

bash scripts/launch.sh scripts/table.py "$runs" --spec projects/tinyclip/table.yaml --markdown "$runs/table.md"
[ -n "${DRY_RUN:-}" ] || cat "$runs/table.md"
