#!/usr/bin/env bash
# The tables of AMG (Chen, Liu, Xu, CVPR 2024), in kind, on the shipped models:
#   1. text-conditional: AMG beside random perturbations of the prompt and a model whose memorized prompts were ablated
#   2. its three guidances alone and together, other gates and none; contact sheet, and a picture of one prompt's way
#   3. unconditional and class-conditional models in pixel space
#
#   bash run_amg.sh                                  testbed-eps and the pixel models (about an hour on two cores)
#   MEMORIZED=4 ORDINARY=2 COUNT=64 ABLATED=no RESULTS=results/local/quick bash run_amg.sh testbed-v    a quick look
# A killed run goes on where it stopped.
set -euo pipefail
source "$(dirname "$0")/setup_env.sh"

MEMORIZED=${MEMORIZED:-20}               # prompts that the model has memorized
ORDINARY=${ORDINARY:-8}                  # prompts that it has not
COUNT=${COUNT:-256}                      # pictures of a pixel-space model
ABLATED=${ABLATED:-yes}                  # testbed-eps: fine-tune the ablated model first, if it is not there
RESULTS=${RESULTS:-results/local/amg}

models=()
for argument in "$@"; do models+=("$(placed "$argument")"); done
[ ${#models[@]} -gt 0 ] || models=(testbed-eps)
for model in "${models[@]}"; do
    ablated=()
    if [ "$model" = testbed-eps ] && [ "$ABLATED" = yes ]; then
        [ -f testbed/work/ablated/model/model_index.json ] || "$PYTHON" -m testbed.finetune ablated
        ablated=(--ablated testbed/work/ablated/model)
    fi
    "$PYTHON" -m memorization.studies.amg --model "$model" --memorized "$MEMORIZED" --ordinary "$ORDINARY" \
        "${ablated[@]}" --out "$RESULTS/$(basename "$model")"
done
for model in pixel-uncond pixel-class; do
    "$PYTHON" -m memorization.studies.amg_pixel --model "testbed/models/$model" --count "$COUNT" --out "$RESULTS/$model"
done
