#!/usr/bin/env bash
# Set up if needed, lint, test. Arguments go to pytest: bash run_tests.sh -k anisotropy
set -euo pipefail
source "$(dirname "$0")/setup_env.sh"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -c 'from importlinter.cli import lint_imports_command; lint_imports_command()'  # which room may import which
"$PYTHON" -m ty check --quiet
# A process a core: threads of several processes that fight for one core are slower than one.
OMP_NUM_THREADS=1 "$PYTHON" -m pytest -n auto --maxprocesses 8 --dist worksteal "$@"
