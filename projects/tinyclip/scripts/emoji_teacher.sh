#!/usr/bin/env bash
# Make the nano teacher of the zoo (zoo/tinyclip-emoji-teacher) from installed packages alone; two CPU cores.
#
#   bash projects/tinyclip/scripts/emoji_teacher.sh [field=value ...]
#
# RUNS (default: runs) is the folder for everything that is made. DRY_RUN=1 prints the commands.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
runs="${RUNS:-runs}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" OMP_WAIT_POLICY=passive

# The strong teacher: pretrained EfficientNet-Lite0 and MiniLM with trained heads; its embeddings of two crops
# an image.
bash scripts/launch.sh data_tools/train_emoji_oracle.py --out "$runs/emoji_oracle" --crops 3 --crop-scale 0.6 1.0 \
    --threads 2

# The ViT CLIP that is distilled from it, through the same code as every other run.
bash scripts/launch.sh projects/tinyclip/train_distill.py \
    projects/tinyclip/configs/emoji/base.yaml projects/tinyclip/configs/emoji/teacher.yaml \
    run_dir="$runs/emoji_teacher" data.sources.0.teacher_caches="[$runs/emoji_oracle/cache]" "$@"

# The zoo keeps it in half precision.
bash scripts/launch.sh scripts/export.py "local-dir:$runs/emoji_teacher/export" "$runs/tinyclip-emoji-teacher" --half
[ -n "${DRY_RUN:-}" ] || echo \
    "wrote $runs/tinyclip-emoji-teacher; copy it to zoo/ and put its sha256 into projects/tinyclip/zoo.yaml"
