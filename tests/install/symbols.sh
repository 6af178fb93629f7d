# Exported names: each shared library exports exactly what its header declares, under the ABI's version; what the two share internally
# is what is marked EMXI_SHARED, under the private version; and an archive defines no global name without our prefix.
# Usage: symbols.sh SOURCE BUILD
set -eu
src=$1
build=$2
bad=0
check() { # WHAT EXPECTED ACTUAL
  local difference
  if ! difference=$(diff <(sort -u <<<"$2") <(sort -u <<<"$3")); then
    printf "%s ('<' expected, '>' found):\n%s\n" "$1" "$difference"
    bad=1
  fi
}
# Functions that a header or our sources declare with this marker; a declaration may run over two lines.
declared() { # MARKER FILE...
  local marker=$1
  shift
  cat "$@" | grep -v '^#' | tr '\n' ' ' | grep -oE "$marker [^;({]*\(" | sed -E "s/.*[ *]([a-z0-9_]+)\($/\1/"
}
exported() { nm -D --defined-only "$build/$1" | awk '$2 != "A" { print $3 }'; }

abi=$(sed -n 's/^#define EMX_ABI_VERSION //p' "$src/include/emx.h")
version=$(sed -nE 's/^#define EMX_VERSION_(MAJOR|MINOR|PATCH) //p' "$src/include/emx.h" | paste -sd.)
public=$(declared EMX_API "$src/include/emx.h")
model=$(declared EMX_API "$src/include/emx_model.h")
shared=$(declared EMXI_SHARED "$src"/src/*/*.h)
for names in "$public" "$model" "$shared"; do # the extraction itself: every marker was understood
  [ "$(wc -l <<<"$names")" -ge 10 ] || { echo "found only: $names"; exit 1; }
done
count=$(cat "$src"/include/*.h | grep -c '^EMX_API ')
[ "$(printf '%s\n' "$public" "$model" | wc -l)" = "$count" ] || { echo "not every one of $count EMX_API lines was understood"; exit 1; }

check "libentmax.so" "$(sed "s/\$/@@EMX_$abi/" <<<"$public"; sed "s/\$/@@EMX_PRIVATE_$version/" <<<"$shared")" "$(exported libentmax.so)"
check "libentmax_model.so" "$(sed "s/\$/@@EMX_$abi/" <<<"$model")" "$(exported libentmax_model.so)"
for library in libentmax libentmax_model; do
  check "$library.a: global names without a prefix" "" \
    "$(nm -g --defined-only "$build/$library.a" | awk 'NF == 3 { print $3 }' | grep -vE '^emxi?_' || true)"
  check "$library: soname" "[$library.so.$abi]" "$(readelf -d "$build/$library.so" | awk '/SONAME/ { print $NF }')"
  # No executable stack, no text relocations.
  check "$library: stack" "RW" "$(readelf -lW "$build/$library.so" | awk '/GNU_STACK/ { print $(NF - 1) }')"
  check "$library: text relocations" "" "$(readelf -d "$build/$library.so" | grep TEXTREL || true)"
done
exit $bad
