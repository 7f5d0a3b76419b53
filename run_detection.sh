#!/usr/bin/env bash
# Detect memorized prompts and print the metrics table.
#
#   bash run_detection.sh                      the shipped testbed models; on a CUDA machine Stable Diffusion 1.4 and 2 too
#   bash run_detection.sh sd14 rv51            models of your choice: names from memorization/configs/, folders or hub ids
#   NUM_IMAGES=1 SEEDS="51 53 42" bash run_detection.sh sd14
#   bash run_detection.sh --all-detectors      every detector, with what each costs: into results/local/detection/<model>/all
#   DETECT_FLAGS="--variant eps" RESULTS=results/local/eps bash run_detection.sh testbed-v
set -euo pipefail
source "$(dirname "$0")/setup_env.sh"

NUM_IMAGES=${NUM_IMAGES:-4}        # noises per prompt; the table shows n = 1 and n = NUM_IMAGES
SEEDS=${SEEDS:-51}                 # the paper's: 51 53 42
RESULTS=${RESULTS:-results/local/detection}  # gets <model>/<run>
DETECT_FLAGS=${DETECT_FLAGS:-}     # further flags of detect_mem.py

name=main
models=()
for argument in "$@"; do
    if [ "$argument" = --all-detectors ]; then
        name=all
        DETECT_FLAGS="--detectors all --measure-costs --dtype float32 $DETECT_FLAGS"
    else
        models+=("$(placed "$argument")")
    fi
done
if [ ${#models[@]} -eq 0 ]; then
    models=(testbed-eps testbed-v)
    if "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        models+=(sd14 sd2)
    fi
fi

flags=()
for word in $DETECT_FLAGS; do
    case $word in *[./]*) word=$(placed "$word") ;; esac
    flags+=("$word")
done

runs=()
failed=()
for model in "${models[@]}"; do
    case $model in
        sd14 | sd2 | rv51) "$PYTHON" -m memorization.prompts fetch > /dev/null || { failed+=("$model"); continue; } ;;
    esac
    for seed in $SEEDS; do
        run="$RESULTS/$(basename "$model")/$name"
        [ "$seed" = 51 ] || run="$run-seed$seed"
        if "$PYTHON" detect_mem.py --model "$model" --noises "$NUM_IMAGES" --seed "$seed" --out "$run" "${flags[@]}"
        then runs+=("$run"); else failed+=("$model, seed $seed"); fi
    done
done

[ ${#runs[@]} -eq 0 ] || "$PYTHON" detect_eval.py "${runs[@]}"
if [ ${#failed[@]} -gt 0 ]; then
    printf 'not done: %s\n' "${failed[@]}" >&2
    exit 1
fi
