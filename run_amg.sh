#!/usr/bin/env bash
# The tables of AMG (Chen, Liu, Xu, CVPR 2024), in kind, on the shipped models:
#   1. text-conditional: AMG beside random perturbations of the prompt (and every other method that was run before)
#   2. its three guidances alone and together, with and without the gate; a picture of one prompt's way
#   3. unconditional and class-conditional models in pixel space
#
#   bash run_amg.sh                                  testbed-eps and the pixel models (about an hour on two cores)
#   MEMORIZED=4 ORDINARY=2 COUNT=64 RESULTS=results/local/quick bash run_amg.sh testbed-v    a quick look
# A killed run goes on where it stopped.
set -euo pipefail

MEMORIZED=${MEMORIZED:-16}               # prompts that the model has memorized
ORDINARY=${ORDINARY:-8}                  # prompts that it has not
COUNT=${COUNT:-256}                      # pictures of a pixel-space model
RESULTS=${RESULTS:-results/local/amg}

source "$(dirname "$0")/setup_env.sh"

prompts=(--memorized "$MEMORIZED" --ordinary "$ORDINARY")
models=("$@")
[ ${#models[@]} -gt 0 ] || models=(testbed-eps)
for model in "${models[@]}"; do
    out=$RESULTS/$(basename "$model")
    "$PYTHON" -m memorization.studies.mitigation_tradeoff --model "$model" "${prompts[@]}" --methods gni,rt,cwr,rna,amg --out "$out"
    "$PYTHON" -m memorization.studies.amg --model "$model" "${prompts[@]}" --out "$out-guidances"
done
for model in pixel-uncond pixel-class; do
    "$PYTHON" -m memorization.studies.amg_pixel --model "testbed/models/$model" --count "$COUNT" --out "$RESULTS/$model"
done
