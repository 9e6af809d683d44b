#!/usr/bin/env bash
# The leave-one-domain-out table on the emoji styles, two CPU cores: zero-shot teacher, ERM and VL2V-ADiP.
#
#   bash projects/vl2v_adip/scripts/nano.sh [key=value ...]               (a first look: one seed, some ten minutes)
#   LENGTH=full bash projects/vl2v_adip/scripts/nano.sh                   (the table: three seeds, more steps, kd_cos too)
#
# The teacher (zoo:tinyclip-emoji-teacher) looks at two views of each picture once; no run asks it again. RUNS
# (default: runs/vl2v_nano, with LENGTH=full runs/vl2v_full), SEEDS (of the trials), STEPS and STAGES may be
# set; stages may add "miro lp lp_ft one_stage kd_image kd_text kd_kl kd_cos simkd". Finished runs are kept.
# DRY_RUN=1 prints.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
case "${LENGTH:-first}" in
    first) runs=runs/vl2v_nano seeds=0 stages="erm align distill" steps=60 every=20% ;;
    full) runs=runs/vl2v_full seeds="0 1 2" stages="erm kd_cos align distill" steps=200 every=10% ;;
    *) echo "nano.sh: LENGTH=$LENGTH; it is first or full" >&2; exit 2 ;;
esac
export RUNS="${RUNS:-$runs}" steps="${STEPS:-$steps}" every

# The teacher's embeddings of two augmented views of each picture, which all runs replay.
OMP_NUM_THREADS=2 bash scripts/launch.sh data_tools/embed_labelled.py --set emoji-domains \
    --model zoo:tinyclip-emoji-teacher --views 2 --crop-scale 0.7 1.0 --flip 0.5 --color-jitter 0.3 --hue 0.3 \
    --grayscale 0.1 --threads 2 --out "$RUNS/teacher_outputs"

# One run: EfficientNet-Lite0 at 48 pixels, trained on three drawing styles and tested on the fourth. Its
# lines begin with stage, held-out domain and seed.
export OMP_NUM_THREADS=1 stage
fold() { # "DOMAIN SEED" [key=value ...]
    local domain seed given=(steps="$steps")
    read -r domain seed <<< "$1"
    case "$stage" in align | lp) ;; *) given+=(evaluation.every_steps="$every") ;; esac
    case "$stage" in erm | miro | lp | lp_ft) ;; *) given+=(data.teacher_outputs="$RUNS/teacher_outputs") ;; esac
    bash projects/vl2v_adip/scripts/run.sh "$stage" emoji_lite0 emoji "$domain" fold.trial_seed="$seed" \
        "${given[@]}" "${@:2}" 2>&1 | sed -u "s/^/[$stage $domain $seed] /"
}
export -f fold

# Stage by stage, since Distill starts from Align: every held-out domain and seed, two runs of one thread each
# at a time.
for stage in ${STAGES:-$stages}; do
    for seed in ${SEEDS:-$seeds}; do
        printf "%s $seed\n" noto openmoji pixel twemoji
    done | xargs -P 2 -I FOLD bash -euo pipefail -c 'fold "$@"' fold FOLD "$@"
done

bash scripts/launch.sh scripts/table.py "$RUNS" --spec projects/vl2v_adip/table.yaml --markdown "$RUNS/table.md" --json "$RUNS/table.json"
[ -n "${DRY_RUN:-}" ] || cat "$RUNS/table.md"
