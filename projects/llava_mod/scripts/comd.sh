#!/usr/bin/env bash
# CoMD's competitive rounds: a student learns a teacher's answers, an assessor compares both on further questions, and
# an augmentor writes new ones from those where the student falls behind.
#
#   IMAGES=data/llava_mod/images STUDENT=runs/llava_mod/qwen2_1.5b/adapt/export TEACHER="by=runs/llava_mod/qwen2_7b/sft/export" \
#     ASSESSOR="url=http://localhost:8000/v1/chat/completions model=NAME" NPROC=8 \
#     bash projects/llava_mod/scripts/comd.sh TRAIN.json CACHE.json [field=value ...]
#
# TRAIN CACHE  pools of instructions, LLaVA's JSON; whatever answers they have are not looked at
# IMAGES       folder that the records' image paths are below
# STUDENT      export that the first round starts from
# TEACHER ASSESSOR AUGMENTOR   who answers, compares, and writes: by=EXPORT, by=SAVED_ANSWERS.jsonl, or the whole address
#              of a service of OpenAI's chat form, url=... model=... token_env=VARIABLE. AUGMENTOR: default ASSESSOR
# ROUNDS       default: 4, the paper's
# NEW          new instructions a round; default: 6000, Lion's
# CONFIGS      configs of the training; default: configs/base.yaml and comd.yaml; field=value go to it too
# RUNS         where everything goes; default: runs/llava_mod/comd. teacher.jsonl has the teacher's answers of all
#              rounds, round_N/ the pools, answers, verdicts and the run
# DRY_RUN=1 prints. What was asked is not asked again: the same command goes on where it was stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
fail() { echo "comd.sh: $1" >&2; exit 2; }
[ $# -ge 2 ] || fail "usage: comd.sh TRAIN.json CACHE.json [field=value ...]"
train="$1" cache="$2"
shift 2
for name in IMAGES STUDENT TEACHER ASSESSOR; do [ -n "${!name:-}" ] || fail "set $name"; done
student="$STUDENT" runs="${RUNS:-runs/llava_mod/comd}" rounds="${ROUNDS:-4}"
read -ra teacher <<<"$TEACHER"
read -ra assessor <<<"$ASSESSOR"
read -ra augmentor <<<"${AUGMENTOR:-$ASSESSOR}"
read -ra configs <<<"${CONFIGS:-projects/llava_mod/configs/base.yaml projects/llava_mod/configs/comd.yaml}"
comd() { NPROC=1 HOSTFILE="" bash scripts/launch.sh projects/llava_mod/comd.py "$1" images="$IMAGES" "${@:2}"; }

for ((round = 1; round <= rounds; round++)); do
    folder="$runs/round_$round" next="$runs/round_$((round + 1))"

    # Tune: the student learns the teacher's answers to the train pool.
    comd answer pool="$train" out="$runs/teacher.jsonl" chats="$folder/tune.jsonl" "${teacher[@]}"
    bash scripts/launch.sh projects/llava_mod/train_stage.py "${configs[@]}" stage=sft student.init_from="$student" \
        data.chats="['$folder/tune.jsonl']" data.images="$IMAGES" run_dir="$folder/tune" "$@"
    student="$folder/tune/export"
    [ "$round" -lt "$rounds" ] || break

    # Assess: both answer the cache pool, and are compared in both orders.
    comd answer pool="$cache" out="$runs/teacher.jsonl" "${teacher[@]}"
    comd answer pool="$cache" out="$folder/student.jsonl" by="$student"
    comd assess pool="$cache" teacher="$runs/teacher.jsonl" student="$folder/student.jsonl" folder="$folder" "${assessor[@]}"

    # Augment: half of the new instructions from difficult ones, half from easy ones; both pools grow.
    comd augment train="$train" pool="$cache" folder="$folder" next="$next" new="${NEW:-6000}" "${augmentor[@]}"
    train="$next/train.jsonl" cache="$next/cache.jsonl"
done
