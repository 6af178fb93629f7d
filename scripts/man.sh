#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Usage: scripts/man.sh EMX FOLDER
# Writes the man pages, emx.1 and one for each command that `emx --help` lists (and those list), from the help texts: what --help says is
# the one source. The date is SOURCE_DATE_EPOCH, else that of the header.
set -eu
emx=$1
folder=$2
header=$(dirname "$0")/../include/emx.h
if [ -n "${SOURCE_DATE_EPOCH:-}" ]; then date=$(date -u -d "@$SOURCE_DATE_EPOCH" +%F); else date=$(date -u -r "$header" +%F); fi
version=$("$emx" --version | awk '{ print $2 }')
LC_ALL=C ARGP_HELP_FMT=rmargin=9999 # a line of the help is a line of its author
export LC_ALL ARGP_HELP_FMT

# page SUMMARY EMX WORD...: the page of `emx WORD...`, and below it the pages of the commands that its help lists
page() {
  summary=$1
  shift
  name=$(echo "emx $*" | sed 's/ *$//; s/ /-/g')
  help=$("$emx" "$@" --help)
  echo "$help" | awk -v name="$name" -v summary="$summary" -v date="$date" -v version="$version" '
    function text(s) { # plain text in roff
      gsub(/\\/, "\\e", s)
      gsub(/-/, "\\-", s)
      gsub(/`/, "\\(ga", s)
      sub(/^[.\47]/, "\\\\\\&&", s)
      return s
    }
    function option(s,   n, i, parts, out, cut) { # "-a, --alpha=A": the name bold, the argument italic
      n = split(s, parts, /, */)
      for (i = 1; i <= n; i++) {
        cut = match(parts[i], /[=[]/)
        if (!cut) cut = match(parts[i], / /)
        if (!cut) cut = length(parts[i]) + 1
        out = out (i > 1 ? ", " : "") "\\fB" text(substr(parts[i], 1, cut - 1)) "\\fR"
        if (cut <= length(parts[i])) {
          if (substr(parts[i], cut, 1) ~ /[= ]/) out = out substr(parts[i], cut, 1) "\\fI" text(substr(parts[i], cut + 1)) "\\fR"
          else out = out text(substr(parts[i], cut))
        }
      }
      return out
    }
    function see(other) { related = related (related ? ",\n" : "") ".BR " text(other) " (1)" }
    function section(title) { print title; gap = 0; fresh = 1 }
    function paragraph() { if (gap && !fresh) print ".PP"; gap = fresh = 0 }
    BEGIN {
      title = toupper(name)
      printf ".TH %s 1 \"%s\" \"libentmax %s\" \"User Commands\"\n", text(title), date, version
      printf ".SH NAME\n%s \\- %s\n", text(name), text(summary)
      if (name != "emx") { parent = name; sub(/-[^-]*$/, "", parent); see(parent) }
    }
    NR == 1 || /^  or: / {
      words = $0
      sub(/^(Usage|  or): +/, "", words)
      n = index(words, " [")
      if (!n) n = length(words) + 1
      print (NR == 1 ? ".SH SYNOPSIS" : ".br") "\n\\fB" text(substr(words, 1, n - 1)) "\\fR" text(substr(words, n))
      next
    }
    !described { described = 1; section(".SH DESCRIPTION") }
    /^Mandatory or optional arguments/ { after_options = 1; next }
    /^Exit status: / { status = substr($0, 14); next }
    /^Environment: / { environment = substr($0, 14); next }
    /^$/ { gap = 1; next }
    !after_options && (/^ +-/ || /^ [^ ].*:$/) && !in_options { in_options = 1; section(".SH OPTIONS") }
    in_options && !after_options {
      line = $0
      sub(/^ +/, "", line)
      if ($0 ~ /^ [^ ].*:$/) { # a group
        sub(/:$/, "", line)
        section(".SS " text(line))
        group = 1
      } else if (line ~ /^-/) { # an option; its text starts after two spaces, or on the next line
        if (gap && group && !fresh) { section(".SS Common"); group = 0 }
        n = match(line, /   *[^ ]/)
        print ".TP\n" option(n ? substr(line, 1, n - 1) : line)
        if (n) { line = substr(line, n); sub(/^ +/, "", line); print text(line) }
      } else print text(line)
      gap = fresh = 0
      next
    }
    /^  [a-z0-9]+  +[^ ]/ { # a command
      line = $0
      sub(/^ +[a-z0-9]+ +/, "", line)
      print ".TP\n\\fB" $1 "\\fR\n" text(line)
      see(name "-" $1)
      fresh = 0
      next
    }
    after_options && !notes { notes = 1; section(".SH NOTES") }
    { paragraph(); line = $0; if (sub(/^ +/, "", line)) print ".br"; print text(line) }
    END {
      if (environment) printf ".SH ENVIRONMENT\n%s\n", text(environment)
      if (status) printf ".SH EXIT STATUS\n%s\n", text(status)
      print ".SH SEE ALSO\n" related
    }' >"$folder/$name.1"
  echo "$help" | sed -nE 's/^  ([a-z0-9]+)  +([^ ].*)$/\1 \2/p' | while read -r word rest; do
    (page "$rest" "$@" "$word" </dev/null)
  done
}
rm -rf "$folder"
mkdir -p "$folder"
page "attention with weights that are exactly zero (alpha-entmax), on a paged cache"
