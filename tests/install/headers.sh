# Each public header compiles alone, and twice, as C11, C17 and C++17 with every warning an error.
# Usage: headers.sh SOURCE, with CC and CXX
set -eu
cd "$1/include"
for header in *.h; do
  for std in c11 c17; do
    printf '#include <%s>\n#include <%s>\n' "$header" "$header" |
      "$CC" -std=$std -pedantic -Wall -Wextra -Wshadow -Wconversion -Wstrict-prototypes -Werror -I. -fsyntax-only -x c -
  done
  printf '#include <%s>\n#include <%s>\n' "$header" "$header" |
    "$CXX" -std=c++17 -pedantic -Wall -Wextra -Wshadow -Wconversion -Wold-style-cast -Werror -I. -fsyntax-only -x c++ -
done
