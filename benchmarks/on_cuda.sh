#!/usr/bin/env bash
# Tests, scores and speed on one CUDA card, into one JSON file, in under 8 minutes and without network.
#
#   bash benchmarks/on_cuda.sh                  results/speed/cuda-<card>.json, and its tables on standard output
#   bash benchmarks/on_cuda.sh --out FILE       another file; the same command goes on with one that lacks rows
#   bash benchmarks/on_cuda.sh --smoke          the same way on the CPU with tiny networks, in under a minute
#
# The active environment is taken if it sees a card and has the packages, in whatever versions (a lent machine has what
# it has; the file names them); else that of setup_env.sh.
set -euo pipefail

SCRIPT=$(cd "$(dirname "$0")" && pwd)/on_cuda.py
PYTHON=${PYTHON:-python3}
if ! "$PYTHON" - 2> /dev/null <<'PY'
import sys
from importlib.util import find_spec
needed = "accelerate diffusers filelock pandas pytest safetensors scipy sklearn tqdm transformers yaml".split()
if not all(map(find_spec, needed)):
    sys.exit(1)
import torch
sys.exit(not torch.cuda.is_available())
PY
then
    source "$(dirname "$SCRIPT")/../setup_env.sh"
    cd "$CALLER"
fi
exec "$PYTHON" "$SCRIPT" "$@"
