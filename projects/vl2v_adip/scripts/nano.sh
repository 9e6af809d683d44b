#!/usr/bin/env bash
# The whole leave-one-domain-out table on the emoji styles, on two CPU cores: zero-shot teacher, ERM and VL2V-ADiP.
#
#   bash projects/vl2v_adip/scripts/nano.sh [key=value ...]                (one seed)
#   SEEDS="0 1 2" STAGES="erm kd_cos align distill" bash projects/vl2v_adip/scripts/nano.sh       (the table of the README)
#
# RUNS (default: runs/vl2v_nano). The teacher (zoo:tinyclip-emoji-teacher) looks at two views of each picture once; no run
# asks it again. SEEDS (default: 0) are the trial seeds, STAGES (default: "erm align distill") may add
# "lp lp_ft one_stage kd_image kd_text kd_kl kd_cos simkd". Finished runs are kept. DRY_RUN=1 prints.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
export RUNS="${RUNS:-runs/vl2v_nano}"

OMP_NUM_THREADS=2 bash scripts/launch.sh data_tools/embed_labelled.py --set emoji-domains --model zoo:tinyclip-emoji-teacher --views 2 \
    --crop-scale 0.7 1.0 --flip 0.5 --color-jitter 0.3 --hue 0.3 --grayscale 0.1 --threads 2 --out "$RUNS/teacher_outputs"

# Two runs of one thread each at a time: every line of theirs begins with its stage and held-out domain.
export OMP_NUM_THREADS=1 seed stage
fold() { # DOMAIN [key=value ...]
    local stored=("data.teacher_outputs=$RUNS/teacher_outputs")
    case "$stage" in erm | lp | lp_ft) stored=() ;; esac
    bash projects/vl2v_adip/scripts/run.sh "$stage" emoji_lite0 emoji "$1" fold.trial_seed="$seed" \
        ${stored[@]+"${stored[@]}"} "${@:2}" 2>&1 | sed -u "s/^/[$stage $1 $seed] /"
}
export -f fold
for seed in ${SEEDS:-0}; do
    for stage in ${STAGES:-erm align distill}; do
        printf '%s\n' noto openmoji pixel twemoji |
            xargs -P 2 -I DOMAIN bash -euo pipefail -c 'fold "$@"' fold DOMAIN "$@"
    done
done

bash scripts/launch.sh projects/vl2v_adip/table.py "$RUNS" --markdown "$RUNS/table.md" --json "$RUNS/table.json"
[ -n "${DRY_RUN:-}" ] || cat "$RUNS/table.md"
