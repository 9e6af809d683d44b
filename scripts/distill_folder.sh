#!/usr/bin/env bash
# From a folder of one's own images to a small model: train, test on held-out images, export, report.
#
#   bash scripts/distill_folder.sh IMAGES --method promptkd|dho|vl2v_adip [--classes names.txt] [options] [field=value ...]
#
# `--help` lists the options; README.md says how IMAGES has to look. NPROC, NNODES, HOSTFILE and DRY_RUN work
# as for launch.sh. The same command again goes on where it stopped, and re-uses what is done.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$(bash "$root/scripts/setup.sh" --python)"
exec "$python" "$root/scripts/distill_folder.py" "$@"
