#!/bin/sh
# Make the virtual environment VENV (first argument, default .venv) with everything the workshop needs, or
# leave it alone when it is complete and up to date.
#
# pip installs, not a faster tool, because pip is what company mirrors and classroom indexes are set up for.
# A stamp with the hash of all that defines the environment is written last: without it the environment
# counts as unfinished. One that this script made is then deleted and made again; one that somebody else
# made is completed in place. `make_env.sh --key` prints that hash and makes nothing.
set -eu

venv=${1:-.venv}
extras=${EXTRAS:-test,lint,browser,serve}
here=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd -P)
cd "$here"
case $venv in /*) ;; *) venv=$here/$venv ;; esac
ours=$venv/.fiqa-workshop  # "this script made it"
stamp=$venv/.fiqa-workshop-stamp
linked=$venv/.fiqa-workshop-project

say() { printf '%s\n' "$*" >&2; }

# Hash of what decides the environment: dependencies (pyproject.toml up to the settings of the tools), pins,
# extras, and the number of this recipe, to be raised when the steps below change what they install.
key() {
    { sed '/^\[tool\.pytest/,$d' pyproject.toml && cat constraints.txt && echo "$extras recipe 1"; } \
        | { sha256sum 2>/dev/null || shasum -a 256; } | cut -d' ' -f1
}

# The Python that was asked for with PYTHON=..., as "3.12"; nothing when any will do.
wanted=
minor='import sys; print("%d.%d" % sys.version_info[:2])'
case ${PYTHON:-} in
    3.1[23] | python3.1[23]) wanted=${PYTHON#python} ;;
    */*) python=$(scripts/find_python.sh) && wanted=$("$python" -c "$minor") ;;
esac

complete() {
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$key" ] || return 1
    has=$("$venv/bin/python" -c "import pip; $minor" 2>/dev/null) || return 1
    [ -z "$wanted" ] || [ "$has" = "$wanted" ]
}

# The project itself is installed editable. The environment may be shared by several checkouts, one at a time.
link_project() {
    [ -f "$linked" ] && [ "$(cat "$linked")" = "$here" ] && return 0
    if [ ! -w "$venv" ]; then
        say "$venv is another user's, and linked to $(cat "$linked"): open JupyterLab there."
        return 0
    fi
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
    printf '%s\n' "$here" >"$linked"
}

unfinished() {
    say "The environment $venv is unfinished (the reason stands above): the next make starts it again."
    exit 1
}

build() {
    if [ -e "$ours" ]; then
        python=$(scripts/find_python.sh)  # before anything is deleted
        say "Making $venv again: it is unfinished, or made for another state of the project."
        find "$venv" -mindepth 1 ! -path "$ours" -delete  # interrupted, it is still ours to delete
    elif [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv")" ]; then
        say "$venv is not a virtual environment: move it away, or choose another folder with make VENV=..."
        exit 1
    fi
    if [ ! -x "$venv/bin/python" ]; then
        python=$(scripts/find_python.sh)
        mkdir -p "$venv"
        : >"$ours"
        say "Making the environment $venv with $("$python" --version) ($python)."
        "$python" -m venv "$venv"
    fi
    if ! "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 12), (3, 13)))'; then
        say "$venv does not hold Python 3.12 or 3.13: delete it, or choose another folder with make VENV=..."
        exit 1
    fi
    say "Installing about 240 packages: 7.7 GB on the disk, 3 to 10 minutes on two cores with a fast connection."
    rm -f "$stamp" "$linked"
    started=$(date +%s)
    # setuptools is a dependency already, so building the project needs no second download of it.
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools \
        || unfinished
    "$venv/bin/python" -m pip install --disable-pip-version-check -c constraints.txt \
        --no-build-isolation -e ".[$extras]" || unfinished
    "$venv/bin/python" -m pip check >&2 || unfinished
    imports='import torch, transformers, datasets, peft, papermill, jupyterlab, fiqa_helpers'
    said=$("$venv/bin/python" -c "$imports" 2>&1) || { say "$said" && unfinished; }
    printf '%s\n' "$here" >"$linked"
    printf '%s\n' "$key" >"$stamp"
    say "The environment is ready after $(($(date +%s) - started)) s: $venv"
}

key=$(key)
[ "${1:-}" = --key ] && echo "$key" && exit 0
# A second user who may read but not write needs no lock where nothing has to be made.
if ! complete; then
    if [ -e "$venv" ] && [ ! -w "$venv" ]; then
        say "$venv is of another state of the project, and not yours to write: make your own with VENV=folder."
        exit 1
    fi
    mkdir -p "$(dirname "$venv")"
    # Two builds wait for each other; the second finds it complete.
    command -v flock >/dev/null 2>&1 && exec 9>"$venv.lock" && flock 9
    complete || build
fi
link_project
