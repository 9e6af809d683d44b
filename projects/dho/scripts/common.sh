#!/usr/bin/env bash
# Sourced by the recipes of this folder, not run: where the data are, and how one run is started.
#
# ROOT      folder of the data sets (docs/datasets.md says how each lies in it)
# NPROC     GPUs of this machine
# RUNS      where the run folders go; default: runs
# SHOTS     labelled images a class; default: "1 2 4 8 16"
# METHODS   of: dho ce kd ce_kd pcgrad kd_feature ce_kd_feature; ce asks no teacher, kd and kd_feature see no label
# DRY_RUN=1 prints the commands. A second call goes on where the first stopped.
set -euo pipefail
recipe="$(basename "$0")"
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."

fail() { echo "$recipe: $1" >&2; exit 2; }
[ "$recipe" != common.sh ] || fail "is sourced by the recipes beside it; run one of those"
[ -n "${ROOT:-}" ] || fail "set ROOT to the folder of the data sets, e.g. ROOT=/data"
[ -n "${NPROC:-}${HOSTFILE:-}" ] || fail "set NPROC to the number of GPUs of this machine, e.g. NPROC=1"
runs="${RUNS:-runs}"
shots="${SHOTS:-1 2 4 8 16}"
configs=projects/dho/configs

student() { # NAME "CONFIG ..." [field=value ...]; configs without folder and ending
    local name="$1" files=() file
    for file in $2; do files+=("$configs/$file.yaml"); done
    bash scripts/launch.sh projects/dho/train_student.py "${files[@]}" run_dir="$runs/$name" data.root="$ROOT" "${@:3}"
}

# What a method takes back of the recipe: its labels, or its teacher and the unlabelled half of each batch.
own=()
fields_of() { # METHOD IMAGES; sets `own`. IMAGES: labelled ones of a batch
    own=(loss.method="$1")
    case "$1" in
        ce) own+=(teacher.model= teacher.pretrained= batch_size="$2") ;;
        kd | kd_feature) own+=(split.shots=0 split.percent=0) ;;
        dho | ce_kd | pcgrad | ce_kd_feature) ;;
        *) fail "METHODS names $1; it is of: dho ce kd ce_kd pcgrad kd_feature ce_kd_feature" ;;
    esac
}

without_labels() { case "$1" in kd | kd_feature) ;; *) return 1 ;; esac; } # METHOD
asks_class_logits() { case "$1" in dho | ce_kd | pcgrad) ;; *) return 1 ;; esac; } # METHOD: labels and a teacher's logits

tip_adapter() { # SET SHOTS; one process whatever NPROC is
    NPROC=1 HOSTFILE="" bash scripts/launch.sh projects/dho/train_tip_adapter.py "$configs/tip_adapter/base.yaml" \
        "$configs/tip_adapter/$1.yaml" run_dir="$runs/tip_adapter_$1_$2shot" data.root="$ROOT" split.shots="$2"
}
