#!/bin/sh
# Print the path of a Python 3.12 or 3.13 that really runs; else one line saying how to get one, and exit 1.
#
# A name on PATH proves nothing: pyenv puts shims there that fail for versions that are not selected, and a
# distribution's Python may lack what `python -m venv` needs. So every candidate is run and asked.
# PYTHON=3.13 (or python3.13) asks for that version, PYTHON=/path/to/python for that one alone.

versions="3.12 3.13"
case ${PYTHON:-} in
    3.12 | 3.13 | python3.12 | python3.13) versions=${PYTHON#python} ;;
esac

check='
import sys
if "%d.%d" % sys.version_info[:2] not in sys.argv[1].split() or sys.implementation.name != "cpython":
    sys.exit(1)
import sysconfig
if sysconfig.get_config_var("Py_GIL_DISABLED"):
    sys.exit(1)
import bz2, ctypes, ensurepip, lzma, sqlite3, ssl, venv
print(getattr(sys, "_base_executable", None) or sys.executable)
'

# Run one candidate; print its real path (the base interpreter, when it belongs to a virtual environment).
try() {
    found=$("$@" -I -c "$check" "$versions" 2>/dev/null </dev/null) && [ -x "$found" ] && printf '%s\n' "$found"
}

# Try every executable of the name $1 on PATH, as a shim that fails may hide a Python that works.
try_name() {
    (
        IFS=:
        for folder in $PATH; do
            [ -x "${folder:-.}/$1" ] && try "${folder:-.}/$1" && exit 0
        done
        exit 1
    )
}

case ${PYTHON:-} in
    */*)
        try "$PYTHON" && exit 0
        echo "PYTHON=$PYTHON is not a working Python 3.12 or 3.13 (with venv, ssl, sqlite3, lzma, ctypes):" \
            "leave PYTHON out to search for one." >&2
        exit 1
        ;;
esac

for version in $versions; do
    try_name "python$version" && exit 0
done
for name in python3 python; do
    try_name "$name" && exit 0
done
for version in $versions; do
    command -v py >/dev/null 2>&1 && try py "-$version" && exit 0
done
data=${XDG_DATA_HOME:-${HOME:-/nonexistent}/.local/share}
for version in $versions; do
    for candidate in \
        "${PYENV_ROOT:-${HOME:-/nonexistent}/.pyenv}/versions/$version".*/bin/python \
        "${UV_PYTHON_INSTALL_DIR:-$data/uv/python}/cpython-$version".*/bin/python3 \
        "${ASDF_DATA_DIR:-${HOME:-/nonexistent}/.asdf}/installs/python/$version".*/bin/python \
        "${MISE_DATA_DIR:-$data/mise}/installs/python/$version".*/bin/python \
        "${CONDA_PREFIX:-/nonexistent}/bin/python" \
        "${HOME:-/nonexistent}"/mini*3/bin/python "${HOME:-/nonexistent}"/mini*3/envs/*/bin/python \
        "${HOME:-/nonexistent}"/anaconda3/bin/python "${HOME:-/nonexistent}"/anaconda3/envs/*/bin/python \
        /opt/conda/bin/python /opt/conda/envs/*/bin/python \
        /usr/local/bin/python"$version" /opt/homebrew/bin/python"$version"; do
        [ -x "$candidate" ] && try "$candidate" && exit 0
    done
done
version=${versions%% *}
echo "No working Python $(echo "$versions" | sed 's/ / or /') found: get one with" \
    "'uv python install $version' (https://docs.astral.sh/uv), 'pyenv install $version'," \
    "'conda create -n py python=$version' or your system's packages" \
    "(Debian, Ubuntu: python$version python$version-venv), then run make again." >&2
exit 1
