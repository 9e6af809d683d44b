#!/usr/bin/env bash
# One stage of the paper's recipe for one student, or all of them.
#
#   NPROC=8 bash projects/llava_mod/scripts/recipe.sh STAGE MODEL [field=value ...]
#
# STAGE   teacher adapt d2d d2s prefer, or all
# MODEL   qwen1.5_0.5b qwen2_0.5b qwen2_1.5b qwen1.5_1.8b; the teacher is the 7 B model of its family
#
# The files that the configs name lie in data/llava_mod, which may be a link, images below data/llava_mod/images; other
# places: data.chats=[...] data.images=... . RUNS (default: runs/llava_mod) holds the run folders; a stage starts from the
# export of the one before it. Finished runs are skipped, interrupted ones go on. DRY_RUN=1 prints.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
configs=projects/llava_mod/configs
runs="${RUNS:-runs/llava_mod}"
fail() { echo "recipe.sh: $1" >&2; exit 2; }
[ $# -ge 2 ] || fail "usage: recipe.sh STAGE MODEL [field=value ...]"
stage="$1" model="$2"
shift 2
case "$stage" in teacher | adapt | d2d | d2s | prefer | all) ;; *) fail "no stage $stage" ;; esac
case "$model" in
    qwen1.5_0.5b | qwen1.5_1.8b) teacher=qwen1.5_7b ;;
    qwen2_0.5b | qwen2_1.5b) teacher=qwen2_7b ;;
    *) fail "no student $model" ;;
esac
teaches=(teacher.init_from="$runs/$teacher/sft/export")
wanted() { [ "$stage" = all ] || [ "$stage" = "$1" ]; }
train() { bash scripts/launch.sh projects/llava_mod/train_stage.py "$configs/base.yaml" "$@"; }

# The teacher, LLaVA-1.5 on a Qwen of 7 B: its adaptor from 558 k captions in batches of 256 at 1e-3, then adaptor
# and language model from 665 k conversations in batches of 128 at 2e-5. All students of a family share it.
if wanted teacher; then
    train "$configs/adapt.yaml" "$configs/models/$teacher.yaml" run_dir="$runs/$teacher/adapt" batch_size=256 "$@"
    train "$configs/sft.yaml" run_dir="$runs/$teacher/sft" student.init_from="$runs/$teacher/adapt/export" "$@"
fi

# The student's adaptor from the same captions, in batches of 512 at 1e-3.
if wanted adapt; then
    train "$configs/adapt.yaml" "$configs/models/$model.yaml" run_dir="$runs/$model/adapt" "$@"
fi

# Dense to dense: the whole student mimics the teacher on 2.4 M captions and questions, at 2e-5.
if wanted d2d; then
    train "$configs/d2d.yaml" run_dir="$runs/$model/d2d" student.init_from="$runs/$model/adapt/export" "${teaches[@]}" "$@"
fi

# Dense to sparse: four experts in the even layers, two for a token; they and the other feed-forward layers learn from
# teacher and answers of 1.4 M harder questions and documents, at 2e-5.
if wanted d2s; then
    train "$configs/d2s.yaml" run_dir="$runs/$model/d2s" student.init_from="$runs/$model/d2d/export" "${teaches[@]}" "$@"
fi

# Preferences: 83 k pairs of answers, the teacher as reference, at 2e-6.
if wanted prefer; then
    train "$configs/prefer.yaml" run_dir="$runs/$model/prefer" student.init_from="$runs/$model/d2s/export" "${teaches[@]}" "$@"
fi
