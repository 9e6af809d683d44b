#!/usr/bin/env bash
# The nano tables of the README: plain fine-tuning against mimicking a teacher, dense against sparse, before and
# after preferences, on composed scenes with exact answers; small decoders of their own; two CPU cores.
#
#   bash projects/llava_mod/scripts/nano.sh
#
# RUNS (default runs/llava_mod_nano), SEEDS, STEPS (of a student), TEACHER_STEPS, CAPTION_STEPS, MORE_STEPS and PREFER_STEPS
# may be set; further field=value arguments go to every student. Finished runs are kept. DRY_RUN=1 prints the commands.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
export runs="${RUNS:-runs/llava_mod_nano}" steps="${STEPS:-360}" teacher_steps="${TEACHER_STEPS:-800}"
export caption_steps="${CAPTION_STEPS:-600}" more_steps="${MORE_STEPS:-180}" prefer_steps="${PREFER_STEPS:-60}"
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
launch() { bash scripts/launch.sh "$@"; }

# Pictures and chats, and two decoders of one tokenizer.
launch data_tools/build_scenes.py "$runs/scenes" --concepts 20 --scenes 8000 --test-scenes 400
launch data_tools/build_small_decoder.py "$runs/large" --chats "$runs/scenes/train.json" --layers 4 --width 160
launch data_tools/build_small_decoder.py "$runs/small" --chats "$runs/scenes/train.json" --layers 3 --width 128

# One frozen tower: what it gives for the pictures is stored once, and all runs read that.
export tower="tower=efficientnet-lite0 tower_layers=[-3,-2,-1] tower_norm=true grid=4 image_size=80"
NPROC=2 launch data_tools/embed_pictures.py $tower "decoder=hf:$runs/large" --chats "$runs"/scenes/{train,test}.json \
    --out "$runs/features" --part-size 1000

asked="evaluation.questions=[{data: $runs/scenes/test.json}, \
{data: $runs/scenes/captions.json, vocabulary: $runs/scenes/concepts.json}"
for kind in random popular adversarial; do asked+=", {data: $runs/scenes/pope_$kind.json}"; done
export asked+="]" captions="data.chats=[$runs/scenes/names.json,$runs/scenes/places.json]"
# Beside the conversations once more what is where and what is there: a small decoder learns to look from them.
export chats="data.chats=[$runs/scenes/train.json,$runs/scenes/places.json,$runs/scenes/exists.json]"

train() { # "NAME STAGE STEPS" [field=value ...]
    local name stage count
    read -r name stage count <<< "$1"
    bash scripts/launch.sh projects/llava_mod/train_stage.py projects/llava_mod/configs/nano/base.yaml \
        run_dir="$runs/$name" stage="$stage" steps="$count" data.features="$runs/features" "$chats" "${@:2}" \
        2>&1 | sed -u "s/^/[$name] /"
}
from() { echo "student.init_from=$runs/$1/export"; }
taught() { train "$1" seed="$2" teacher.init_from="$runs/teacher/export" "${@:3}"; }

# One line of work.
work() { # KIND SEED-OR-DECODER [field=value ...]
    local s="$2"
    case "$1" in
        # A model that sees: its projector's features become words to the decoder, then captions and what is where alone.
        # With all questions from the start a small decoder does not look at the picture.
        words)
            train "$2_words words 300" student.${tower// / student.} "student.decoder=hf:$runs/$2" \
                "data.chats=[$runs/scenes/names.json]" data.pack=false optim.lr=1e-3 batch_size=32
            ;;
        captions) train "$2_captions sft $caption_steps" "$captions" batch_size=32 "$(from "$2_words")" ;;
        teacher)
            work captions large
            train "teacher sft $teacher_steps" "$(from large_captions)" "$asked"
            ;;
        small)  # and what needs no teacher
            work captions small
            for s in ${SEEDS:-0 1 2}; do work sft "$s" "${@:3}"; done
            ;;
        sft) train "sft_s$s sft $steps" seed="$s" "$(from small_captions)" "$asked" "${@:3}" ;;
        dense) taught "d2d_s$s d2d $steps" "$s" "$(from small_captions)" "$asked" "${@:3}" ;;
        # As many further steps, on the same other chats: dense as before, or with experts.
        longer) taught "longer_s$s d2d $more_steps" $((s + 100)) "$(from "d2d_s$s")" "$asked" "${@:3}" ;;
        sparse)
            taught "d2s_s$s d2s $more_steps" $((s + 100)) "$(from "d2d_s$s")" "$asked" moe.mode=sparse "${@:3}"
            taught "prefer_s$s prefer $prefer_steps" "$s" "$(from "d2s_s$s")" "$asked" \
                "data.chats=[$runs/scenes/preferences.json]" optim.lr=2e-5 "${@:3}"
            ;;
    esac
}
export -f train from taught work
parallel() { xargs -P 2 -I WORK bash -euo pipefail -c 'read -ra work <<< "$1"; work "${work[@]}" "${@:2}"' work WORK "$@"; }
each() { printf "$1 %s\n" ${SEEDS:-0 1 2}; }
printf 'words %s\n' large small | parallel
printf '%s 0\n' teacher small | parallel "$@"
each dense | parallel "$@"
{ each sparse && each longer; } | parallel "$@"

launch scripts/table.py "$runs" --spec projects/llava_mod/table.yaml --markdown "$runs/table.md"
[ -n "${DRY_RUN:-}" ] || cat "$runs/table.md"
