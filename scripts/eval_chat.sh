#!/usr/bin/env bash
# A benchmark on one process or several: the options are those of scripts/eval_chat.py.
#
#   bash scripts/eval_chat.sh --model runs/chat/prefer --benchmark pope --data coco_pope_*.json --images val2014 --out a.jsonl
#   NPROC=8 bash scripts/eval_chat.sh ...     eight processes share the questions; see scripts/launch.sh
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" scripts/eval_chat.py "$@"
