# Sourced by run_*.sh: the active environment if it has the pinned packages, else a virtual environment in .venv,
# made and filled when it is missing or requirements.txt has changed. Afterwards $PYTHON runs the project, the working
# folder is the project's, RESULTS is what the caller meant, and `placed NAME` is a file of the caller's as it is called
# from here. A script that was given --help prints its head, which explains it, and ends.

if [ "$(basename "$0")" != run_tests.sh ] && [[ " $* " == *" --help "* || " $* " == *" -h "* ]]; then
    sed -n '2,${/^#/!q; s/^# \{0,1\}//p;}' "$0"
    exit 0
fi

CALLER=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"

# A name that is a file or folder where the caller stands; a model's name stays one.
placed() {
    if [ "$CALLER" != "$PWD" ] && [ -e "$CALLER/$1" ] && [ "${1:0:1}" != / ] && [ ! -e "memorization/configs/$1.yaml" ]
    then echo "$CALLER/$1"; else echo "$1"; fi
}

case ${RESULTS:-} in '' | /*) ;; *) [ "$CALLER" = "$PWD" ] || RESULTS=$CALLER/$RESULTS ;; esac
case ${PYTHON:-} in /*) ;; */*) PYTHON=$CALLER/$PYTHON ;; esac

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
