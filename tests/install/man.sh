# The man pages: one for emx and for each command, every option of its --help in bold with its argument, no complaint of mandoc.
# Usage: man.sh EMX FOLDER
set -eu
emx=$1 folder=$2
fail() {
  echo "FAILED: $*" >&2
  exit 1
}
pages=0
check() { # WORD...: the page of `emx WORD...`
  local name page plain help option count=0 word
  name=$(IFS=-; echo "emx${*:+-$*}")
  page=$folder/$name.1
  [ -s "$page" ] || fail "$page is missing"
  pages=$((pages + 1))
  plain=$(sed 's/\\-/-/g' "$page")
  for section in NAME SYNOPSIS DESCRIPTION "SEE ALSO"; do
    grep -q "^\.SH $section\$" <<<"$plain" || fail "$name: no section $section"
  done
  grep -q "^$name - ..*" <<<"$plain" || fail "$name: NAME has no summary"
  help=$("$emx" "$@" --help)
  for option in $(grep -E '^ +-' <<<"$help" | grep -oE -- '^ *(-[[:alnum:]?],? *)?--[a-z0-9-]+' | grep -oE -- '-.*' | tr -d ,); do
    grep -qF "\\fB$option\\fR" <<<"$plain" || fail "$name: $option is not in the page"
    count=$((count + 1))
  done
  if grep -qF -- --help <<<"$(grep -E '^ +-' <<<"$help")"; then
    [ $count -ge 5 ] || fail "$name: found only $count options"
  fi
  while read -r word; do
    [ -n "$word" ] || continue
    grep -qF "$name-$word (1)" <<<"$plain" || fail "$name: SEE ALSO does not name $word"
    check "$@" "$word"
  done <<<"$(sed -nE 's/^  ([a-z0-9]+)  +[^ ].*$/\1/p' <<<"$help")"
}
check
[ $pages = "$(ls "$folder"/*.1 | wc -l)" ] || fail "$pages pages expected: $(ls "$folder")"
[ $pages -ge 10 ] || fail "only $pages pages"
if command -v mandoc >/dev/null; then
  mandoc -Tlint -Wwarning "$folder"/*.1
else
  echo "mandoc is not installed: not linted"
fi
