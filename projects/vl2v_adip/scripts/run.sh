#!/usr/bin/env bash
# One stage of VL2V-ADiP or a baseline, for one held-out domain or for all of them.
#
#   bash projects/vl2v_adip/scripts/run.sh STAGE STUDENT DATASET [TEST_DOMAIN|all] [key=value ...]
#
# STAGE    a file of configs/stages: align distill one_stage vl2v_sd kd_image kd_text kd_kl kd_cos simkd erm miro lp lp_ft
# STUDENT  a file of configs/students: vit_b16 vit_s16 deit_s resnet50 clip_vitb16 emoji_lite0
# DATASET  a file of configs/datasets, or emoji
#
#   NPROC=1 bash projects/vl2v_adip/scripts/run.sh align resnet50 office_home all data.root=/data
#   NPROC=1 bash projects/vl2v_adip/scripts/run.sh distill resnet50 office_home all data.root=/data
#
# RUNS (default: runs/vl2v_adip) holds the run folders; Distill finds the Align export of the same data set,
# student, teacher, held-out domain and trial seed below it. Finished runs are skipped, interrupted ones go
# on. DRY_RUN=1 prints.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
configs=projects/vl2v_adip/configs

fail() { echo "run.sh: $1" >&2; exit 2; }
[ $# -ge 3 ] || fail "usage: run.sh STAGE STUDENT DATASET [TEST_DOMAIN|all] [key=value ...]"
stage="$1" student="$2" dataset="$3"
shift 3
domain=all
case "${1:-}" in
    '' | *=*) ;;
    *) domain="$1"; shift ;;
esac
names() { (cd "$configs/$1" && echo *.yaml) | sed 's/\.yaml//g'; } # FOLDER
known() { # FILE [MORE]
    [ -f "$configs/$1.yaml" ] || fail "no file $configs/$1.yaml; there are:${2:-} $(names "${1%/*}")"
}
known "stages/$stage"
known "students/$student"

# A run is a stack: what all published runs share, the data set, the student, and last the stage.
if [ "$dataset" = emoji ]; then
    set_name=emoji-domains
    stack=("$configs/base.yaml" "$configs/emoji/base.yaml" "$configs/students/$student.yaml")
    [ ! -f "$configs/emoji/$stage.yaml" ] || stack+=("$configs/emoji/$stage.yaml")
else
    known "datasets/$dataset" " emoji"
    set_name="$dataset"
    stack=("$configs/base.yaml" "$configs/datasets/$dataset.yaml" "$configs/students/$student.yaml")
    # The released scripts let SWAD's segments overlap, except for ViT-B/16's Distill.
    if [ "$student/$stage" != vit_b16/distill ]; then stack+=(swad.segment_reset=vl2v_default); fi
    # And they take these best weights from step 1000 on.
    case "$student/$stage" in vit_b16/align | resnet50/distill) stack+=(select_from_step=1000) ;; esac
fi

# Align and linear probing train the projector or head alone, all other stages the backbone.
script=train_distill
case "$stage" in align | lp) script=train_align ;; esac

# What the folder's name needs to know of the overrides.
root="" trial=0
for override in "$@"; do
    case "$override" in
        data.root=*) root="${override#*=}" ;;
        fold.trial_seed=*) trial="${override#*=}" ;;
    esac
done
runs="${RUNS:-runs/vl2v_adip}"

# One run a held-out domain.
domains=("$domain")
if [ "$domain" = all ]; then
    python="$(bash scripts/setup.sh --python)"
    print='from vlmkd.datasets.labelled_sets import load_set
from vlmkd.errors import run_tool
run_tool(lambda names: print(*load_set(*names).domains, sep="\n"))'
    list="$("$python" -c "$print" "$set_name" ${root:+"$root"})"
    mapfile -t domains <<<"$list"
fi
for name in "${domains[@]}"; do
    bash scripts/launch.sh "projects/vl2v_adip/$script.py" "${stack[@]}" "$configs/stages/$stage.yaml" \
        fold.test_domain="$name" runs="$runs" run_dir="$runs/$dataset/$student/${name// /_}_t$trial/$stage" "$@"
done
