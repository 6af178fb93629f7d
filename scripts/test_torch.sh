#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Usage: scripts/test_torch.sh [BUILD]
# Runs the tests of the Python package with the package index's current torch, entmax, NumPy and ml_dtypes and the library in BUILD
# (default: build, see `make test-torch`). They are installed into BUILD/torch-env, unless PYTHON names an interpreter that has them.
# Then those of libentmax.transformers, once with the oldest transformers that it supports and once with the current one, each in a
# folder of its own, BUILD/transformers-VERSION, that stays.
set -euo pipefail
cd "$(dirname "$0")/.."
build=$(realpath "${1:-build}")
if [ -z "${PYTHON:-}" ]; then
  PYTHON=$build/torch-env/bin/python
  if [ ! -x "$PYTHON" ]; then
    echo "test_torch: making $build/torch-env" >&2
    python3 -m venv "$build/torch-env"
  fi
  "$PYTHON" -m pip install -q numpy torch entmax ml_dtypes
fi
package=$PWD/python/src
export PYTHONPATH=$package LIBENTMAX_LIBRARY=$build EMX=$build/emx PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1
date -u "+%F"
"$PYTHON" - <<'PYTHON'
import importlib.metadata, platform, sys
import libentmax
ctx = libentmax.Context()
print(f"Python {platform.python_version()}, libentmax {libentmax.__version__} ({ctx.isa}, {ctx.threads} threads)", end="")
for name in ("numpy", "torch", "entmax", "ml_dtypes"):
    try:
        print(f", {name} {importlib.metadata.version(name)}", end="")
    except importlib.metadata.PackageNotFoundError:
        sys.exit(f"\ntest_torch: {sys.executable} has no {name}")
print()
PYTHON
status=0
run() {
  echo "== $1${2:+ with $2}"
  "$PYTHON" -W ignore::UserWarning "$1" -v 2>&1 | grep -v 'No CUDA runtime is found' || status=1
}
for script in tests/python/test_*.py; do
  [ "$script" = tests/python/test_transformers.py ] || run "$script"
done
for version in 4.56.2 current; do
  folder=$build/transformers-$version
  if [ ! -d "$folder/transformers" ]; then
    "$PYTHON" -m pip install -q --target "$folder" "transformers$([ $version = current ] || echo "==$version")"
  fi
  export PYTHONPATH=$package:$folder
  run tests/python/test_transformers.py "transformers $("$PYTHON" -c 'import transformers; print(transformers.__version__)')"
done
exit $status
