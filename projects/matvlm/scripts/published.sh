#!/usr/bin/env bash
# The paper's hybrids of TinyLLaVA-Phi-2-SigLIP-3.1B with 12.5, 25 and 50 % Mamba-2. Not run by us.
#
#   TEACHER=/models/TinyLLaVA-Phi-2-SigLIP-3.1B DATA=/data/sharegpt4v NPROC=4 bash projects/matvlm/scripts/published.sh [field=value ...]
#
# TEACHER  the released teacher's folder, from huggingface.co/tinyllava/TinyLLaVA-Phi-2-SigLIP-3.1B
# DATA     folder with ShareGPT4V's JSON of 665 k chats and the images that it names
# NPROC    GPUs of this machine
# SHARES   default: "12.5 25 50", one after the other
# CHAIN=1  each share goes on from the hybrid before, instead of from the teacher
# RUNS     where the run folders go; default: runs/matvlm
# DRY_RUN=1 prints the commands. Finished runs are skipped, interrupted ones go on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."

fail() { echo "published.sh: $1" >&2; exit 2; }
[ -n "${TEACHER:-}" ] || fail "set TEACHER to the released teacher's folder"
[ -n "${DATA:-}" ] || fail "set DATA to the folder with ShareGPT4V's chats and images"
[ -n "${NPROC:-}${HOSTFILE:-}${LAUNCH:-}" ] || fail "set NPROC to the number of GPUs of this machine, e.g. NPROC=4"
runs="${RUNS:-runs/matvlm}"
teacher="$runs/teacher"

# The teacher as an export of this code: what differs from stock SigLIP and Phi-2, which are downloaded once.
[ -f "$teacher/mllm.json" ] || NPROC=1 HOSTFILE="" bash scripts/launch.sh projects/matvlm/convert.py "$TEACHER" "$teacher"

# Each share is one epoch of the same recipe (configs/published.yaml); the file of 50 % has shorter rows.
before="$teacher"
for share in ${SHARES:-12.5 25 50}; do
    length=1428
    [ "$share" != 50 ] || length=1228
    ${LAUNCH:-bash scripts/launch.sh} projects/matvlm/train_distill.py projects/matvlm/configs/published.yaml \
        student.init_from="$before" teacher.init_from="$teacher" hybrid.preset="$share" data.max_length="$length" \
        data.chats="['$DATA/sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.json']" data.images="$DATA" \
        run_dir="$runs/published_$share${CHAIN:+_chain}" "$@"
    [ -z "${CHAIN:-}" ] || before="$runs/published_${share}_chain/export"
done
