#!/usr/bin/env bash
# Compare every mitigation at five strengths on the memorized prompts of the testbeds: table, trade-off curve,
# contact sheet.
#
#   bash run_mitigation.sh                                  both testbeds (about 45 minutes each on two cores)
#   bash run_mitigation.sh testbed-eps                      one of them
#   MEMORIZED=4 ORDINARY=2 RESULTS=results/local/quick bash run_mitigation.sh    a quick look
#   METHODS=anisotropy,sail bash run_mitigation.sh
# Runs go to RESULTS/<model>; a killed run goes on where it stopped.
set -euo pipefail
source "$(dirname "$0")/setup_env.sh"

MEMORIZED=${MEMORIZED:-16}                       # prompts that the model has memorized
ORDINARY=${ORDINARY:-8}                          # prompts that it has not: what the method does to them
METHODS=${METHODS:-all}                          # names from docs/mitigations.md
RESULTS=${RESULTS:-results/local/mitigation}     # gets a folder a model

models=()
for argument in "$@"; do models+=("$(placed "$argument")"); done
[ ${#models[@]} -gt 0 ] || models=(testbed-eps testbed-v)
for model in "${models[@]}"; do
    "$PYTHON" -m memorization.studies.mitigation_tradeoff --model "$model" --memorized "$MEMORIZED" \
        --ordinary "$ORDINARY" --methods "$METHODS" --out "$RESULTS/$(basename "$model")"
done
