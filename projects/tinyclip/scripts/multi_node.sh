#!/usr/bin/env bash
# Any recipe of this folder on several machines; give the command once on each, with its own NODE_RANK.
#
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=10.0.0.1 NPROC=8 DATA=... IMAGENET=... RUNS=/shared/runs \
#       bash projects/tinyclip/scripts/multi_node.sh vit_b32_manual [field=value ...]
#
# The first word names the recipe (vit_b32_manual, vit_b32_auto, rn50_manual, vit_b16_yfcc); its own header
# says what DATA and IMAGENET are. RUNS must be a folder that all machines see, because a stage starts from
# the one before. The global batch stays 8,192 (256 a GPU on 4 x 8). The reference's docs use 1,024 a GPU on
# 32 GPUs:
#   batch_size=32768                                 (manual recipes; six epochs in either case)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."

# Which recipe, and which machine this is.
fail() { echo "multi_node.sh: $1" >&2; exit 2; }
case "${1:-}" in
    vit_b32_manual | vit_b32_auto | rn50_manual | vit_b16_yfcc) ;;
    *) fail "name a recipe first: vit_b32_manual, vit_b32_auto, rn50_manual or vit_b16_yfcc" ;;
esac
[ -n "${NNODES:-}" ] || fail "set NNODES to the number of machines, e.g. NNODES=4"
[ -n "${NODE_RANK:-}" ] || fail "set NODE_RANK to this machine's number, from 0 to $((NNODES - 1))"
[ -n "${MASTER_ADDR:-}" ] || fail "set MASTER_ADDR to the address of machine 0"
[ -n "${NPROC:-}" ] || fail "set NPROC to the number of GPUs of each machine, e.g. NPROC=8"
[ -n "${RUNS:-}" ] || fail "set RUNS to a folder that all machines see, e.g. RUNS=/shared/runs"

# scripts/launch.sh reads the four; every stage starts on all machines.
export NNODES NODE_RANK MASTER_ADDR NPROC RUNS
exec bash "projects/tinyclip/scripts/$1.sh" "${@:2}"
