#!/usr/bin/env bash
# PromptSRC few-shot on CLIP ViT-B/16, all classes.
#
#   DATA=/data bash projects/promptkd/scripts/few_shot.sh dtd 1 16 [field=value ...]
#
# The words are the data set, the seed and the number of labelled images a class (1, 2, 4, 8 or 16).
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# -ge 3 ] || fail "name a data set, a seed and the shots, e.g. dtd 1 16"
set_name="$1" seed="$2" shots="$3"
shift 3
late=()
case "$set_name" in
    stanford_cars | oxford_flowers | fgvc_aircraft | dtd | eurosat) late=("$configs/sets/few_shot_late.yaml") ;;
esac
train_teacher promptsrc_few_shot_b16 "$runs/few_shot/$set_name/shots${shots}_s$seed" "$set_name" \
    ${late[@]+"${late[@]}"} seed="$seed" shots="$shots" "$@"
