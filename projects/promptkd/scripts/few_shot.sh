#!/usr/bin/env bash
# PromptSRC few-shot on CLIP ViT-B/16, all classes.
#
#   DATA=/data bash projects/promptkd/scripts/few_shot.sh dtd 1 16 [field=value ...]
#
# The words are the data set, the seed and the number of labelled images a class (1, 2, 4, 8 or 16). The
# variables are in common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# -ge 3 ] || fail "name a data set, a seed and the shots, e.g. dtd 1 16"
set_name="$1" seed="$2" shots="$3"
shift 3

# 50 epochs of SGD at 0.005 in batches of 8; the prompts are averaged around epoch 30, of five sets around
# epoch 45.
late=()
case "$set_name" in
    stanford_cars | oxford_flowers | fgvc_aircraft | dtd | eurosat) late=("$configs/sets/few_shot_late.yaml") ;;
esac
bash scripts/launch.sh projects/promptkd/train_teacher.py "$configs/base/teacher.yaml" \
    "$configs/promptsrc_few_shot_b16.yaml" ${late[@]+"${late[@]}"} \
    run_dir="$runs/few_shot/$set_name/shots${shots}_s$seed" data.set="$set_name" data.root="$data" \
    seed="$seed" shots="$shots" "$@"
