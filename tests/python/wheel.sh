#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Usage: wheel.sh PYTHON SOURCE WORK
# Builds the wheel, installs it into an empty virtual environment and runs it there. Ends with 77 where no such environment, with
# setuptools and NumPy from the package index, can be made.
set -eu
python=$1 source=$2 work=$3
unset PYTHONPATH LIBENTMAX_LIBRARY
rm -rf "$work"
mkdir -p "$work"
fail() { echo "wheel: $*" >&2; exit 1; }
skip() { echo "wheel: skipped: $*"; tail -n 3 "$work/log" >&2 || true; exit 77; }

"$python" -m venv "$work/build" >"$work/log" 2>&1 || skip "$python makes no virtual environment (python3-venv)"
"$work/build/bin/pip" install -q 'setuptools>=61' wheel >"$work/log" 2>&1 || skip "no package index for setuptools and wheel"
# A copy without the build folders: what pip leaves in the tree stays there.
mkdir "$work/tree"
cp -r "$source"/{CMakeLists.txt,LICENSE,README.md,CHANGELOG.md,cmake,cli,include,scripts,src,python} "$work/tree"
rm -rf "$work/tree/python/build"
# Without the CUDA back end: its kernels take minutes, and the build itself has compiled them.
CMAKE_ARGS="${CMAKE_ARGS:-} -DEMX_CUDA=OFF" CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-2} "$work/build/bin/pip" wheel -q --no-deps --no-build-isolation \
  -w "$work/dist" "$work/tree/python" >"$work/log" 2>&1 || { tail -n 30 "$work/log" >&2; fail "the wheel does not build"; }
wheel=$(echo "$work"/dist/*.whl)
case $(basename "$wheel") in
  libentmax-*-py3-none-linux_*.whl) ;;
  *) fail "the wheel is called $wheel" ;;
esac

"$python" -m venv "$work/empty"
"$work/empty/bin/pip" install -q numpy >"$work/log" 2>&1 || skip "no package index for NumPy"
"$work/empty/bin/pip" install -q --no-index "$wheel"
libraries=$(echo "$work"/empty/lib/python3*/site-packages/libentmax/_lib)
for library in "$libraries"/*.so.*; do
  readelf -d "$library" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p' | while read -r needed; do
    case $needed in
      libc.so.6 | libm.so.6 | libpthread.so.0 | libdl.so.2 | ld-linux-*) ;;
      *) [ -e "$libraries/$needed" ] || fail "$(basename "$library") needs $needed, which the wheel does not bring" ;;
    esac
  done
done
cd "$work"
"$work/empty/bin/python" - <<'PYTHON'
import pathlib
import libentmax
import libentmax.torch, libentmax.transformers  # need no torch and transformers until a name of them is used
from libentmax import _c
import numpy as np

assert abs(libentmax.sparsemax(np.array([1.0, 0.8, -3.0])) - [0.6, 0.4, 0]).max() < 1e-12
_c.model_lib()
here = pathlib.Path(libentmax.__file__).parent
assert (here / "py.typed").exists()
row = np.empty((1, 1), object)
row[0, 0] = libentmax.Support(np.array([0]), np.ones(1, np.float32), 0.0)
step = libentmax.Step(0, row, np.zeros((1, 1), libentmax._cache.REPORT))
assert libentmax.plot.write("page.html", [step], "a") > 10000  # the template came along
loaded = {line.split()[-1] for line in open("/proc/self/maps") if ".so" in line and "numpy" not in line}
ours = {pathlib.Path(path).resolve() for path in loaded if any(name in path for name in ("libentmax", "jansson", "blas"))}
assert len(ours) == 3 and all(here.resolve() in path.parents for path in ours), ours
PYTHON
echo "wheel: $(basename "$wheel") $(stat -c %s "$wheel") bytes"
