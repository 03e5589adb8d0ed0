#!/usr/bin/env bash
# Write the locks anew from pyproject.toml and the .in files: `make lock`, or `make lock UPGRADE=1` for newer versions.
# What a lock pins already is kept as long as it fits. Every lock holds for Linux and all Pythons of pyproject.toml.
set -euo pipefail
cd "$(dirname "$0")/.."
UV=${1:-uv}
PYTHON=$(dirname "$(command -v "$UV")")/python
export UV_CUSTOM_COMPILE_COMMAND="make lock"

lock() { # NAME ARGUMENTS…: requirements/NAME.txt
  echo "requirements/$1.txt"
  "$UV" pip compile --quiet --universal --python-version 3.11 --generate-hashes --annotation-style line \
    --no-config --default-index https://pypi.org/simple ${UPGRADE:+--upgrade} --output-file "requirements/$1.txt" "${@:2}"
}

here=(--excludes requirements/without.in)
plain=(--excludes requirements/without-textworld.in)
cpu=(--excludes requirements/without-torch.in)
lock cpu pyproject.toml requirements/cpu.in --extra train "${here[@]}" "${plain[@]}" "${cpu[@]}"
# The index's build of torch is for CUDA: the lock has its libraries, with hashes, and fits them. torch is in torch.txt.
lock gpu pyproject.toml requirements/gpu.in requirements/torch.txt --extra gpu --no-emit-package torch \
  "${here[@]}" "${plain[@]}"
# The others have the versions of the first.
same=(--constraints requirements/cpu.txt "${here[@]}" "${cpu[@]}")
lock base pyproject.toml requirements/base.in "${same[@]}" "${plain[@]}"
lock env requirements/env.in "${same[@]}" "${plain[@]}"
lock dev pyproject.toml --extra dev "${same[@]}"
lock textworld requirements/textworld.in "${same[@]}"
lock bench-trl requirements/bench-trl.in "${same[@]}"
# The two OpenEnv releases exclude each other and much of ours: each in a virtual environment of its own, as listed.
lock openenv-0.10 requirements/openenv-0.10.in --no-deps
lock openenv-0.3 requirements/openenv-0.3.in --no-deps
# What each release requires, for the test that nothing is missing.
"$PYTHON" -m requirements.metadata
