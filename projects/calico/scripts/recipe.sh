#!/usr/bin/env bash
# The paper's recipe on nuScenes, stage by stage, or all of it.
#
#   NPROC=8 bash projects/calico/scripts/recipe.sh STAGE [field=value ...]
#
# STAGE       data prc rad detection map, or all
# ROOT        nuScenes, with samples/, sweeps/, maps/ and the tables (default: data/nuscenes); info files, regions and pasted
#             objects are written there too
# FRACTIONS   per cent of the drives that are labelled (default: "5 10 20 50")
# MODALITIES  lidar camera fusion (default: all)
# STARTS      random calico (default: both): where the branches of fine-tuning begin
# SEEDS       default: "0 1 2"; the paper has one
# RUNS        default: runs/calico. A stage starts from the export of the one before it.
# Finished runs are skipped, interrupted ones go on. DRY_RUN=1 prints.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
configs=projects/calico/configs/nuscenes
root="${ROOT:-data/nuscenes}" runs="${RUNS:-runs/calico}"
fail() { echo "recipe.sh: $1" >&2; exit 2; }
[ $# -ge 1 ] || fail "usage: recipe.sh STAGE [field=value ...]"
stage="$1"
shift
case "$stage" in data | prc | rad | detection | map | all) ;; *) fail "no stage $stage" ;; esac
wanted() { [ "$stage" = all ] || [ "$stage" = "$1" ]; }
data=(data.info="$root/train.jsonl" data.root="$root" regions.cache="$root/regions")
train() { bash scripts/launch.sh projects/calico/train_stage.py "$configs/base.yaml" "$@"; }
tool() { NPROC=1 HOSTFILE="" bash scripts/launch.sh "$@"; }

# Info files of our own from the official tables, and the regions of every key sweep.
if wanted data; then
    for split in train val; do
        tool projects/calico/nuscenes_infos.py "$root" "$root/$split.jsonl" --version v1.0-trainval --split "$split"
    done
    tool projects/calico/region_cache.py "$root/train.jsonl" "$root/regions" --root "$root" --workers "${WORKERS:-8}"
fi

for seed in ${SEEDS:-0 1 2}; do
    # Point-region contrast trains the LiDAR branch on all sweeps, without labels.
    if wanted prc; then
        train "$configs/prc.yaml" run_dir="$runs/prc_s$seed" seed="$seed" "${data[@]}" "$@"
    fi
    # Region-aware distillation teaches the camera branch from it.
    if wanted rad; then
        train "$configs/rad.yaml" run_dir="$runs/rad_s$seed" seed="$seed" rad.teacher_ckpt="$runs/prc_s$seed/export" \
            "${data[@]}" "$@"
    fi
    # Fine-tuning on a part of the drives.
    for task in detection map; do
        wanted "$task" || continue
        for fraction in ${FRACTIONS:-5 10 20 50}; do
            for modality in ${MODALITIES:-lidar camera fusion}; do
                for start in ${STARTS:-random calico}; do
                    name="${task}_${modality}_${start}_${fraction}_s$seed"
                    files=("$configs/detection.yaml") given=(data.fraction="$fraction")
                    [ "$modality" = fusion ] || files+=("$configs/$modality.yaml")
                    [ "$task" = detection ] || files+=("$configs/map.yaml")
                    lidar="$runs/prc_s$seed/export" camera="$runs/rad_s$seed/export"
                    [ "$start" = calico ] || lidar="" camera=""
                    [ "$modality" != lidar ] || camera=""
                    [ "$modality" != camera ] || lidar=""
                    given+=(init.lidar="$lidar" init.camera="$camera")
                    if [ "$modality" = lidar ]; then
                        paste=""
                        [ "$task" = map ] || paste="$root/paste_$fraction.npy"
                        given+=(data.paste="$paste")
                    fi
                    train "${files[@]}" run_dir="$runs/$name" seed="$seed" "${data[@]}" \
                        evaluation.info="$root/val.jsonl" evaluation.data_root="$root" "${given[@]}" "$@"
                done
            done
        done
    done
done

if wanted detection || wanted map; then
    tool scripts/table.py "$runs" --spec projects/calico/table.yaml --markdown "$runs/table.md"
fi
