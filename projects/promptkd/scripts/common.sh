# Sourced by the other scripts of this folder: where things are, and one function a step.
#
#   DATA      folder that holds the data sets (default: data)
#   RUNS      folder of the runs (default: runs/promptkd)
#   TEACHER   a published teacher: checkpoint file, or the folder that holds the data sets' folders (and ImageNet-xd, the
#             teacher of the last two settings); not trained then
#   NPROC     processes, one a GPU;  DRY_RUN=1 prints the commands only
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
data="${DATA:-data}"
runs="${RUNS:-runs/promptkd}"
configs=projects/promptkd/configs
fail() { echo "$(basename "$0"): $1" >&2; exit 2; }

launch() { bash scripts/launch.sh "$@"; }
single() { NPROC=1 bash scripts/launch.sh "$@"; }

train_teacher() { # CONFIG RUN_DIR DATASET [field=value ...]
    launch projects/promptkd/train_teacher.py "$configs/base/teacher.yaml" "$configs/$1.yaml" \
        run_dir="$2" data.set="$3" data.root="$data" "${@:4}"
}

bank() { # FILE TEACHER DATASET SETTING
    single projects/promptkd/build_bank.py out="$1" teacher.prompts="$2" data.set="$3" data.root="$data" protocol="$4" \
        ${TEACHER:+teacher.clip.model=ViT-L-14-quickgelu teacher.clip.pretrained=openai}
}

train_student() { # CONFIG RUN_DIR DATASET SEED TEACHER BANK [YAML or field=value ...]
    launch projects/promptkd/train_student.py "$configs/base/student.yaml" "$configs/$1.yaml" "${@:7}" \
        run_dir="$2" data.set="$3" data.root="$data" seed="$4" teacher.prompts="$5" class_vectors="$6"
}
