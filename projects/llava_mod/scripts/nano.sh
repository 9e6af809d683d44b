#!/usr/bin/env bash
# The nano tables of the README: plain fine-tuning against mimicking a teacher, dense against sparse, before and
# after preferences, on composed scenes with exact answers; small decoders of their own; two CPU cores.
#
#   bash projects/llava_mod/scripts/nano.sh
#
# RUNS (default runs/llava_mod_nano), SEEDS, STEPS (of a student), TEACHER_STEPS and PREFER_STEPS may be set;
# further field=value arguments go to every student. Finished runs are kept. DRY_RUN=1 prints the commands.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
runs="${RUNS:-runs/llava_mod_nano}" steps="${STEPS:-300}" teacher_steps="${TEACHER_STEPS:-900}"
prefer_steps="${PREFER_STEPS:-60}"
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
launch() { bash scripts/launch.sh "$@"; }

# Pictures and chats, and two decoders of one tokenizer.
launch data_tools/build_scenes.py "$runs/scenes" --concepts 30 --scenes 8000 --test-scenes 400
launch data_tools/build_small_decoder.py "$runs/large" --chats "$runs/scenes/train.json" --layers 6 --width 256
launch data_tools/build_small_decoder.py "$runs/small" --chats "$runs/scenes/train.json" --layers 4 --width 128

questions="{data: $runs/scenes/test.json}, {data: $runs/scenes/captions.json, vocabulary: $runs/scenes/concepts.json}"
for kind in random popular adversarial; do questions+=", {data: $runs/scenes/pope_$kind.json}"; done
export runs questions

train() { # "NAME STAGE STEPS" [field=value ...]
    local name stage steps
    read -r name stage steps <<< "$1"
    bash scripts/launch.sh projects/llava_mod/train_stage.py projects/llava_mod/configs/nano/base.yaml \
        run_dir="$runs/$name" stage="$stage" steps="$steps" "data.chats=[$runs/scenes/train.json]" "${@:2}" \
        2>&1 | sed -u "s/^/[$name] /"
}
model() { # DECODER: a model that is put together here
    echo student.tower=efficientnet-lite0 "student.tower_layers=[-3,-2,-1]" student.grid=4 student.tower_norm=true student.image_size=96 \
        "student.decoder=hf:$runs/$1"
}
from() { echo "student.init_from=$runs/$1/export"; }
asked="evaluation.questions=[$questions]"
teacher="teacher.init_from=$runs/teacher/export"

read -ra large <<< "$(model large)"
train "teacher_words words 800" "${large[@]}" "data.chats=[$runs/scenes/names.json]" optim.lr=1e-3 batch_size=32
train "teacher sft $teacher_steps" "$(from teacher_words)" "$asked"

# A student: its projector, then as many steps each way: all of them dense, or half dense and half sparse.
student() { # SEED [field=value ...]
    local s="$1" half=$((steps / 2)) small
    shift
    read -ra small <<< "$(model small)"
    train "words_s$s words 800" seed="$s" "${small[@]}" "data.chats=[$runs/scenes/names.json]" optim.lr=1e-3 batch_size=32
    train "sft_s$s sft $steps" seed="$s" "$(from "words_s$s")" "$asked" "$@"
    train "d2d_s$s d2d $steps" seed="$s" "$(from "words_s$s")" "$teacher" "$asked" "$@"
    train "half_s$s d2d $half" seed="$s" "$(from "words_s$s")" "$teacher" "$@"
    train "d2s_s$s d2s $half" seed="$s" "$(from "half_s$s")" "$teacher" "$asked" moe.mode=sparse loss.ce=1 "$@"
    train "d2d_more_s$s d2d $half" seed="$s" "$(from "half_s$s")" "$teacher" "$asked" loss.ce=1 "$@"
    train "prefer_s$s prefer $prefer_steps" seed="$s" "$(from "d2s_s$s")" "$teacher" "$asked" \
        "data.chats=[$runs/scenes/preferences.json]" optim.lr=1e-4 "$@"
}
export -f train model from student
export asked teacher steps prefer_steps
printf '%s\n' ${SEEDS:-0 1 2} | xargs -P 2 -I SEED bash -euo pipefail -c 'student "$@"' student SEED "$@"

launch scripts/table.py "$runs" --spec projects/llava_mod/table.yaml --markdown "$runs/table.md"
[ -n "${DRY_RUN:-}" ] || cat "$runs/table.md"
