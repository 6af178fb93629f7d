# No line of C has more than 130 columns: clang-format breaks code, not comments. (Not yet counted: the CUDA back end.)
cd "$1" || exit 1
long=$(find include src cli tests examples \( -path src/cuda -o -path tests/gpu \) -prune -o \
  \( -name '*.c' -o -name '*.h' -o -name '*.inc' -o -name '*.cpp' \) -exec \
  awk 'length($0) > 130 { print FILENAME ":" FNR ": " length($0) " columns" }' {} +)
[ -z "$long" ] || { echo "$long"; exit 1; }
