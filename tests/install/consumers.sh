# Installs into a folder with a space in its name, moves it, and builds programs against what is there: C and C++, shared and static,
# by pkg-config and by CMake; then the lines of the README. Each program is run and checks a result.
# Usage: consumers.sh SOURCE BUILD WORK, with CC, CXX, CMAKE and GENERATOR. The work folder is made anew.
set -eu
src=$1 build=$2 work=$3
rm -rf "$work"
mkdir -p "$work"
cd "$work"
fail() {
  echo "FAILED: $*" >&2
  exit 1
}
quiet() { # output only if it fails
  "$@" >log 2>&1 || { cat log >&2; fail "$*"; }
}

# In a larger build CMAKE_SOURCE_DIR is somebody else's folder.
if grep -n 'CMAKE_SOURCE_DIR\|CMAKE_BINARY_DIR' "$src/CMakeLists.txt" "$src"/cmake/* "$src/tests/CMakeLists.txt"; then
  fail "use PROJECT_SOURCE_DIR and PROJECT_BINARY_DIR"
fi

# A component has a manifest of its own: that of a real installation from this build stays as it is.
quiet "$CMAKE" --install "$build" --component Unspecified --prefix "$work/first prefix"
prefix="$work/the prefix"
mv "first prefix" "$prefix"
pc=$(dirname "$(find "$prefix" -name libentmax.pc)")
lib=$(dirname "$pc")
for file in include/emx.h include/emx_model.h bin/emx share/man/man1/emx.1 share/man/man1/emx-decode.1 share/doc/libentmax/LICENSE share/doc/libentmax/examples/decode.c; do
  [ -s "$prefix/$file" ] || fail "$file was not installed"
done
# Every relative link of the installed documentation leads to an installed file.
doc="$prefix/share/doc/libentmax"
grep -oE '\]\([^):# ]+' "$doc"/*.md "$doc"/docs/*.md | while IFS= read -r link; do
  [ -e "$(dirname "${link%%:*}")/${link#*](}" ] || fail "a dead link: $link"
done
for name in libentmax libentmax_model; do
  [ -f "$lib/$name.a" ] || fail "no $name.a"
  [ "$(readlink "$lib/$name.so")" = "$(cd "$lib" && echo $name.so.[0-9])" ] || fail "$name.so does not link to the soname"
  [ -f "$lib/$name.so" ] || fail "$name.so points nowhere"
done
if grep -rlF -e "$build" -e "$src" -e "first prefix" "$lib/cmake" "$pc"; then fail "these files name the build, the source or the old prefix"; fi
for file in "$lib"/*.so "$prefix/bin/emx"; do
  if readelf -d "$file" | grep -E 'R(UN)?PATH' | grep -vF '[$ORIGIN]'; then fail "$file has a path of this machine"; fi
done
version=$(sed -nE 's/^#define EMX_VERSION_(MAJOR|MINOR|PATCH) //p' "$src/include/emx.h" | paste -sd.)
"$prefix/bin/emx" --version | grep -qF "emx $version " || fail "emx --version"

export PKG_CONFIG_PATH="$pc"
for module in libentmax libentmax_model; do
  [ "$(pkg-config --modversion $module)" = "$version" ] || fail "$module.pc has another version"
done
case $(pkg-config --libs libentmax_model) in *jansson* | *blas*) fail "a shared link names what only the library needs" ;; esac

# flags MODULE [--static]: into the array `flags`, spaces in paths kept
flags() { eval "flags=($(pkg-config --cflags --libs "${@:2}" "$1"))"; }
strict=(-O1 -Wall -Wextra -Werror)
runs() { # PROGRAM SHARED(yes or no): the program is right, and uses the libraries that it should
  "$1" >out || fail "$1"
  local linked
  linked=$(ldd "$1" 2>/dev/null | grep -c 'libentmax' || true)
  if [ "$2" = yes ]; then [ "$linked" -ge 1 ]; else [ "$linked" = 0 ]; fi || fail "$1: $linked of the shared libraries, shared: $2"
}

flags libentmax
quiet "$CC" -std=c11 "${strict[@]}" "$src/tests/install/core.c" "${flags[@]}" -Wl,-rpath,"$lib" -o core-pc
runs ./core-pc yes
flags libentmax_model
quiet "$CXX" -std=c++17 "${strict[@]}" "$src/tests/install/model.cpp" "${flags[@]}" -Wl,-rpath,"$lib" -o model-pc
runs ./model-pc yes

# Without the shared libraries the archives are linked, with what --static adds.
cp -a "$prefix" "$work/archives only"
find "$work/archives only" -name '*.so*' -delete
PKG_CONFIG_PATH="$work/archives only/${pc#"$prefix"/}"
flags libentmax --static
quiet "$CC" -std=c11 "${strict[@]}" "$src/tests/install/core.c" "${flags[@]}" -o core-pc-static
runs ./core-pc-static no
quiet "$CC" -std=c11 "${strict[@]}" -static "$src/tests/install/core.c" "${flags[@]}" -o core-pc-alone
runs ./core-pc-alone no
flags libentmax_model --static
quiet "$CXX" -std=c++17 "${strict[@]}" "$src/tests/install/model.cpp" "${flags[@]}" -o model-pc-static
runs ./model-pc-static no
PKG_CONFIG_PATH=$pc

quiet "$CMAKE" -G "$GENERATOR" -S "$src/tests/install" -B cmake-build -DCMAKE_C_COMPILER="$CC" -DCMAKE_CXX_COMPILER="$CXX" \
  -DCMAKE_PREFIX_PATH="$prefix" -DCMAKE_BUILD_TYPE=Release -DWANTED="$version"
quiet "$CMAKE" --build cmake-build
for program in core model; do
  runs cmake-build/${program}_shared yes
  runs cmake-build/${program}_static no
done

# The README: its CMakeLists.txt, and its commands for pkg-config, on the example that it shows.
mkdir readme
cp "$src/examples/decode.c" readme
awk '/^```cmake$/ { on = 1; next } /^```$/ { on = 0 } on' "$src/README.md" >readme/CMakeLists.txt
[ -s readme/CMakeLists.txt ] || fail "README.md has no CMakeLists.txt"
quiet "$CMAKE" -G "$GENERATOR" -S readme -B readme/build -DCMAKE_C_COMPILER="$CC" -DCMAKE_PREFIX_PATH="$prefix"
quiet "$CMAKE" --build readme/build
runs readme/build/decode yes
grep -q '^o\[0\] = 617 ' out || fail "decode by CMake"
commands=$(sed -n 's/^    \(.*pkg-config.*\)$/\1/p' "$src/README.md")
[ -n "$commands" ] || fail "README.md has no line for pkg-config"
ln -s "$prefix" plain # the shell would split the README's $(pkg-config ...) at a space
PKG_CONFIG_PATH="$work/plain/${pc#"$prefix"/}"
cc() { "$CC" "$@"; }
(cd readme && export LD_LIBRARY_PATH="$lib" && eval "$commands") >log 2>&1 || { cat log >&2; fail "$commands"; }
LD_LIBRARY_PATH=$lib readme/decode | grep -q '^o\[0\] = 617 ' || fail "decode by pkg-config"

# What was installed can be removed: every file of the manifest, under DESTDIR.
sed "s,^.*/first prefix/,/the prefix/," "$build/install_manifest_Unspecified.txt" >manifest
DESTDIR=$work quiet "$CMAKE" -DMANIFEST="$work/manifest" -P "$src/cmake/uninstall.cmake"
left=$(find "$prefix" ! -type d)
[ -z "$left" ] || fail "left after uninstall: $left"
