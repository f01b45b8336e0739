#!/bin/sh
# The workshop's Python, for git hooks: the one of .venv (or VENV), or else `python`, as after `conda activate`.
python=${VENV:-.venv}/bin/python
[ -x "$python" ] || python=python
exec "$python" "$@"
