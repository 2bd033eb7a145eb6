#!/bin/sh
# Make a virtual environment with what a lock file pins, unless it is there: `make` begins with it.
#
#   venv.sh VENV LOCK    touches VENV/packages when it has installed something
#
# $PYTHON names the interpreter. Where it is empty, a VENV that is there keeps its own, and a new one gets the first that
# will do.
set -eu

venv=$1 lock=$2 PYTHON=${PYTHON:-}

fail() {
  echo "catfeeder-cron: $*" >&2
  exit 1
}

# One installation of one version, wherever the link to it lies.
identity() { "$1" -c 'import sys; print(sys.base_prefix, sys.version)' 2>/dev/null; }

base_of() { "$1" -c 'import sys; print(sys._base_executable)' 2>/dev/null; }

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

makes_venvs() { "$1" -c 'import venv, ensurepip' 2>/dev/null; }

find_python() {
  found=
  for candidate in "$@"; do
    if is_new_enough "$candidate"; then
      found=$candidate
      if makes_venvs "$found"; then break; fi
    fi
  done
  if [ -z "$found" ] && [ -n "$PYTHON" ]; then
    fail "PYTHON names $PYTHON, which is no Python 3.11 or newer ($("$PYTHON" --version 2>&1 | tail -n 1))"
  elif [ -z "$found" ]; then
    fail "it needs Python 3.11 or newer; found: $(python3 --version 2>&1 | tail -n 1)." \
      "Install one, or name it: make PYTHON=/path/to/python3"
  fi
  makes_venvs "$found" || fail "$found has no venv module. On Debian and Ubuntu: apt install python3-venv"
  echo "$found"
}

is_complete() { [ -e "$venv/packages" ] && [ ! "$lock" -nt "$venv/packages" ] && identity "$venv/bin/python" >/dev/null; }

is_as_named() { [ -z "$PYTHON" ] || [ "$(identity "$venv/bin/python")" = "$(identity "$PYTHON")" ]; }

if is_complete && is_as_named; then
  exit 0
fi
if [ -n "$PYTHON" ]; then
  python=$(find_python "$PYTHON")
else
  python=$(find_python "$(base_of "$venv/bin/python" || echo python3)" python3 python3.14 python3.13 python3.12 python3.11)
fi
"$python" -m venv --clear "$venv"
"$venv/bin/python" -m pip install --quiet --only-binary :all: --require-hashes -r "$lock"
touch "$venv/packages"
