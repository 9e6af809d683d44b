#!/usr/bin/env bash
# From nothing to a distilled CLIP and a page about it: bash scripts/quickstart.sh
#
# Installs into .venv, builds the embedded emoji data set, trains a student from scratch and a TinyCLIP
# student with inherited weights and the teacher's affinities, evaluates both and the teacher, and writes
# report.html. Two CPU cores and 4 GB of memory are enough. What is there already is re-used; an interrupted
# call goes on where it stopped.
#
# RUNS (default: runs/quickstart) is the folder for everything but the data; arguments (field=value) go to
# both runs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
runs="${RUNS:-runs/quickstart}"
started=$SECONDS

say() { printf '\n== %s (%dm%02ds)\n' "$1" $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60)); }

say "1/5 installing"
bash scripts/setup.sh
python="$(bash scripts/setup.sh --python)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" OMP_WAIT_POLICY=passive HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

say "2/5 emoji data set"
"$python" data_tools/build_emoji.py

configs=projects/tinyclip/configs/emoji
say "3/5 baseline: the student from scratch, contrastive loss"
bash scripts/launch.sh projects/tinyclip/train_distill.py "$configs/base.yaml" "$configs/scratch.yaml" \
    "$configs/quickstart.yaml" run_dir="$runs/scratch" "$@"

say "4/5 TinyCLIP: weights inherited from the teacher, affinity mimicking"
bash scripts/launch.sh projects/tinyclip/train_distill.py "$configs/base.yaml" "$configs/distill.yaml" \
    "$configs/quickstart.yaml" run_dir="$runs/distilled" "$@"

say "5/5 report"
"$python" scripts/report.py "$runs/scratch" "$runs/distilled" --out "$runs/report.html" \
    --markdown "$runs/results.md" --title "vlmkd quick start: a small CLIP from a larger one"
echo
cat "$runs/results.md"
say "done; open $(cd "$runs" && pwd)/report.html"
