# Sourced by run_*.sh: the active environment if it has the pinned packages, else a virtual environment in .venv,
# made and filled when it is missing or requirements.txt has changed. Afterwards $PYTHON runs the project.

cd "$(dirname "${BASH_SOURCE[0]}")"

has_requirements() {
    "$1" - <<'PY' 2>/dev/null
import sys
from importlib.metadata import PackageNotFoundError, version
for line in open("requirements.txt", encoding="utf-8"):
    name, _, pinned = line.split("#")[0].strip().partition("==")
    try:
        if name and version(name).split("+")[0] != pinned:
            sys.exit(1)
    except PackageNotFoundError:
        sys.exit(1)
PY
}

PYTHON=${PYTHON:-python3}
if ! has_requirements "$PYTHON"; then
    if ! has_requirements .venv/bin/python; then
        if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            echo "error: $PYTHON is not Python 3.11 or newer; set PYTHON=/path/to/python3.11" >&2
            exit 2
        fi
        echo "Installing the pinned requirements into .venv (once) ..." >&2
        "$PYTHON" -m venv .venv
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    fi
    PYTHON=$PWD/.venv/bin/python
fi
