#!/usr/bin/env bash
# The tables and pages of the README in the toy world: LiDAR, cameras and both, from random weights and from
# pre-training, against the share of labelled scenes; two CPU cores.
#
#   bash projects/calico/scripts/nano.sh [field=value ...]
#
# RUNS (default runs/calico_nano), SEEDS, FRACTIONS (per cent of the scenes : steps of fine-tuning), SCENES, TEST_SCENES, PRC_STEPS,
# RAD_STEPS and ARMS ("prc pointcontrast untrained", more to compare with) may be set; further field=value go to every run.
# Finished runs are kept, and a call with other seeds or arms adds to the tables. DRY_RUN=1 prints the commands.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
export runs="${RUNS:-runs/calico_nano}" fractions="${FRACTIONS:-5:300 20:600}" arms="${ARMS:-}"
export prc_steps="${PRC_STEPS:-400}" rad_steps="${RAD_STEPS:-300}"
scenes="${SCENES:-320}"
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive

# 320 scenes without labels, 16 of which (5 %) or 64 (20 %) get them, 100 to test on, and the regions of all.
bash scripts/launch.sh projects/calico/synthdrive.py "$runs/scenes" --scenes "$scenes" --workers 2
bash scripts/launch.sh projects/calico/synthdrive.py "$runs/test" --scenes "${TEST_SCENES:-100}" --first 100000 --workers 2
bash scripts/launch.sh projects/calico/region_cache.py "$runs/scenes" "$runs/regions" --workers 2

train() { # NAME STAGE [file or field=value ...]
    local name="$1" stage="$2"
    bash scripts/launch.sh projects/calico/train_stage.py projects/calico/configs/toy/base.yaml \
        "projects/calico/configs/toy/$stage.yaml" "${@:3}" run_dir="$runs/$name" data.info="$runs/scenes" \
        regions.cache="$runs/regions" 2>&1 | sed -u "s/^/[$name] /"
}

finetune() { # NAME MODALITY LIDAR CAMERA SEED [field=value ...]: with every share of labels
    local part parts=() given=()
    [ "$2" = fusion ] || parts+=("projects/calico/configs/toy/$2.yaml")
    [ "$3" = - ] || given+=(init.lidar="$runs/$3_s$5/export")
    [ "$4" = - ] || given+=(init.camera="$runs/$4_s$5/export")
    for part in $fractions; do
        train "$2_$1_${part%:*}_s$5" finetune "${parts[@]}" steps="${part#*:}" data.fraction="${part%:*}" seed="$5" \
            evaluation.info="$runs/test" "${given[@]}" "${@:6}"
    done
}

# One line of work of a seed.
work() { # KIND SEED [field=value ...]
    local kind="$1" s="$2"
    shift 2
    case "$kind" in
        random)
            finetune random lidar - - "$s" "$@"
            finetune random camera - - "$s" "$@"
            finetune random fusion - - "$s" "$@"
            ;;
        calico) # regions are contrasted in two views of each sweep; then the camera branch learns from the LiDAR's map
            train "prc_s$s" prc steps="$prc_steps" seed="$s" "$@"
            train "rad_s$s" rad steps="$rad_steps" seed="$s" rad.teacher_ckpt="$runs/prc_s$s/export" "$@"
            finetune calico lidar prc - "$s" "$@"
            finetune calico camera - rad "$s" "$@"
            finetune calico fusion prc rad "$s" "$@"
            ;;
        prc) # to compare with: both sensors without RAD;
            finetune prc fusion prc - "$s" "$@"
            ;;
        untrained) # at the first share alone, a teacher that knows nothing,
            train "rad_untrained_s$s" rad steps="$rad_steps" seed="$s" rad.teacher_ckpt=untrained "$@"
            fractions="${fractions%% *}" finetune untrained camera - rad_untrained "$s" "$@"
            ;;
        *) # and other views of what is to be contrasted, such as points in the place of regions
            train "${kind}_s$s" prc steps="$prc_steps" seed="$s" prc.arm="$kind" "$@"
            fractions="${fractions%% *}" finetune "$kind" lidar "$kind" - "$s" "$@"
            ;;
    esac
}
export -f train finetune work
each() { for kind in $1; do printf "$kind %s\n" ${SEEDS:-0 1 2}; done; }
parallel() { xargs -P 2 -I WORK bash -euo pipefail -c 'read -ra work <<< "$1"; work "${work[@]}" "${@:2}"' work WORK "$@"; }
each "calico random" | parallel "$@"
each "$arms" | parallel "$@"

bash scripts/launch.sh scripts/table.py "$runs" --spec projects/calico/table.yaml --markdown "$runs/table.md" --json "$runs/table.json"
# The first seed's runs on a page, and what its model of both sensors finds in a frame.
seed="${SEEDS:-0}" seed="${seed%% *}" part="${fractions%%:*}"
bash scripts/launch.sh scripts/report.py "$runs/prc_s$seed" "$runs/rad_s$seed" "$runs/fusion_random_${part}_s$seed" \
    "$runs/fusion_calico_${part}_s$seed" --out "$runs/report.html"
bash scripts/launch.sh projects/calico/show_run.py "$runs/fusion_calico_${part}_s$seed" --out "$runs/found.html"
[ -n "${DRY_RUN:-}" ] || cat "$runs/table.md"
