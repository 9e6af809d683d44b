# Sourced by the other scripts of this folder: where things are. The runs themselves are written out in each.
#
#   DATA      folder that holds the data sets (default: data)
#   RUNS      folder of the runs (default: runs/promptkd)
#   TEACHER   a published teacher: checkpoint file, or the folder that holds the data sets' folders (and ImageNet-xd, the
#             teacher of the last two settings); not trained then
#   NPROC     processes, one a GPU;  DRY_RUN=1 prints the commands only
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
data="${DATA:-data}"
runs="${RUNS:-runs/promptkd}"
configs=projects/promptkd/configs
fail() { echo "$(basename "$0"): $1" >&2; exit 2; }

published=() # a published file does not say which CLIP its prompts are for; an export does
[ -z "${TEACHER:-}" ] || published=(teacher.clip.model=ViT-L-14-quickgelu teacher.clip.pretrained=openai)
