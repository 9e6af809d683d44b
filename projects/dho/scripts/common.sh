#!/usr/bin/env bash
# Sourced by the recipes of this folder, not run: what the caller must say. The runs are written out in each.
#
# ROOT      folder of the data sets (docs/datasets.md says how each lies in it)
# NPROC     GPUs of this machine
# RUNS      where the run folders go; default: runs
# SHOTS     labelled images a class; default: "1 2 4 8 16"
# METHODS   of: dho ce kd ce_kd pcgrad kd_feature ce_kd_feature; ce asks no teacher, kd and kd_feature see no label
# DRY_RUN=1 prints the commands. A second call goes on where the first stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."

fail() { echo "$(basename "$0"): $1" >&2; exit 2; }
[ "$(basename "$0")" != common.sh ] || fail "is sourced by the recipes beside it; run one of those"
[ -n "${ROOT:-}" ] || fail "set ROOT to the folder of the data sets, e.g. ROOT=/data"
[ -n "${NPROC:-}${HOSTFILE:-}" ] || fail "set NPROC to the number of GPUs of this machine, e.g. NPROC=1"
for method in ${METHODS:-}; do
    case "$method" in
        dho | ce | kd | ce_kd | pcgrad | kd_feature | ce_kd_feature) ;;
        *) fail "METHODS names $method; it is of: dho ce kd ce_kd pcgrad kd_feature ce_kd_feature" ;;
    esac
done
runs="${RUNS:-runs}"
shots="${SHOTS:-1 2 4 8 16}"
configs=projects/dho/configs
