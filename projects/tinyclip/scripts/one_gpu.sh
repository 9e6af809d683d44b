#!/usr/bin/env bash
# Any recipe of this folder on one GPU: the same optimiser batch, by gradient accumulation.
#
#   DATA=... IMAGENET=... bash projects/tinyclip/scripts/one_gpu.sh vit_b16_yfcc [field=value ...]
#
# The first word names the recipe (vit_b32_manual, vit_b32_auto, rn50_manual, vit_b16_yfcc); its own header
# says what DATA, IMAGENET and RUNS are. MICRO (default 1024) is the number of pairs in memory at once.
#
# Not quite the same recipe: affinities are between the pairs of one micro-batch, so each pair meets MICRO - 1
# others in place of the whole batch's. Make MICRO as large as memory allows; loss.affinity_chunk=512 and a
# stored teacher (CACHE of vit_b16_yfcc.sh, projects/tinyclip/configs/add/teacher_cache.yaml) leave more room
# for it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."

# Which recipe.
fail() { echo "one_gpu.sh: $1" >&2; exit 2; }
case "${1:-}" in
    vit_b32_manual | vit_b32_auto | rn50_manual | vit_b16_yfcc) ;;
    *) fail "name a recipe first: vit_b32_manual, vit_b32_auto, rn50_manual or vit_b16_yfcc" ;;
esac

# One process; the engine accumulates batch_size / MICRO micro-batches for each update.
NPROC=1 exec bash "projects/tinyclip/scripts/$1.sh" micro_batch_size="${MICRO:-1024}" "${@:2}"
