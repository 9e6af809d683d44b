#!/usr/bin/env bash
# The nano tables of the README: a small model and its hybrids on composed scenes, mixers that start near attention and at
# random, with and without each term of the loss, accuracy against steps; two CPU cores.
#
#   bash projects/matvlm/scripts/nano.sh
#
# RUNS (default runs/matvlm_nano), SEEDS, STEPS, HYBRIDS, TEACHER_STEPS and CAPTION_STEPS may be set; further field=value
# arguments go to every hybrid. Finished runs are kept, and other steps or hybrids (HYBRIDS="50_published 50_with_ce": start
# as the paper's, cross entropy beside the other terms) are added to the table. DRY_RUN=1 prints the commands.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
export runs="${RUNS:-runs/matvlm_nano}" steps="${STEPS:-48}"
export OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1

# Pictures and chats, a decoder of eight layers, and the teacher made of it: its projector's features become words to
# the decoder, then captions and what is where alone, then all questions.
bash scripts/launch.sh data_tools/build_scenes.py "$runs/scenes" --concepts 20 --scenes 8000 --test-scenes 400
bash scripts/launch.sh data_tools/build_small_decoder.py "$runs/decoder" --chats "$runs/scenes/train.json" \
    --layers 8 --width 128
captions="data.chats=[$runs/scenes/names.json,$runs/scenes/places.json]"
export chats="data.chats=[$runs/scenes/train.json,$runs/scenes/places.json,$runs/scenes/exists.json]"
export asked="evaluation.questions=[{data: $runs/scenes/test.json}]"
teacher() { # NAME STAGE STEPS [field=value ...]; on two cores two processes are faster than two threads
    NPROC=2 bash scripts/launch.sh projects/llava_mod/train_stage.py projects/llava_mod/configs/nano/base.yaml \
        run_dir="$runs/$1" stage="$2" steps="$3" "${@:4}"
}
teacher words words 400 "data.chats=[$runs/scenes/names.json]" data.pack=false optim.lr=1e-3 batch_size=32 \
    student.tower=efficientnet-lite0 "student.tower_layers=[-3,-2,-1]" student.tower_norm=true student.grid=4 student.image_size=96 \
    student.decoder="hf:$runs/decoder"
teacher captions sft "${CAPTION_STEPS:-500}" "$captions" batch_size=32 student.init_from="$runs/words/export"
teacher teacher sft "${TEACHER_STEPS:-800}" "$chats" student.init_from="$runs/captions/export" "$asked"

# One hybrid: its name says the share of layers, what they start from or what is left out of the loss, and the steps.
hybrid() { # "PRESET_KIND SEED" [field=value ...]; KIND: attention, published, random, no_layer, no_logits or with_ce
    local preset kind seed name given=()
    read -r preset seed <<< "$1"
    kind="${preset#*_}" preset="${preset%%_*}"
    case "$kind" in
        random) given+=(hybrid.start=random hybrid.conv_start=random) ;;
        published) given+=(hybrid.conv_start=random hybrid.fold_scale=false hybrid.norm_start=1) ;;
        no_layer) given+=(loss.layer=0) ;;
        no_logits) given+=(loss.logits=0) ;;
        with_ce) given+=(loss.ce=1) ;;
    esac
    name="${preset}_${kind}_${steps}_s$seed"
    bash scripts/launch.sh projects/matvlm/train_distill.py projects/matvlm/configs/nano/base.yaml \
        run_dir="$runs/$name" seed="$seed" steps="$steps" "$chats" student.init_from="$runs/teacher/export" \
        hybrid.preset="$preset" evaluation.every_steps=$((steps / 2)) "$asked" \
        ${given[@]+"${given[@]}"} "${@:2}" 2>&1 | sed -u "s/^/[$name] /"
}
export -f hybrid
hybrids="${HYBRIDS:-12.5_attention 25_attention 50_attention 50_random 50_no_layer 50_no_logits}"
for seed in ${SEEDS:-0 1 2}; do printf "%s $seed\n" $hybrids; done |
    xargs -P 2 -I RUN bash -euo pipefail -c 'hybrid "$@"' hybrid RUN "$@"

bash scripts/launch.sh scripts/table.py "$runs" --spec projects/matvlm/table.yaml --markdown "$runs/table.md"
[ -n "${DRY_RUN:-}" ] || cat "$runs/table.md"
