# Rows of numbers; the values are those of the literature's examples and of exact arithmetic.
. "$SRC/tests/cli/lib.sh"
map() { # CODE INPUT ARGS...
  local want=$1 input=$2 got
  shift 2
  printf %b "$input" | "$EMX" map "$@" >out 2>err
  got=$?
  [ "$got" = "$want" ] || die "map $* ended with $got, expected $want"
}
map 0 '-2 0 .5\n' --json
holds '(.tau + .57097055 | fabs) < 1e-8 and .support == 2 and .p[0] == 0'
holds '(.p[1] - .32600736 | fabs) < 1e-8 and (.p[2] - .67399264 | fabs) < 1e-8'
map 0 '1,2,3\n1\t1\n' --json --alpha 2
all_hold 'length == 2 and .[0].p == [0,0,1] and .[0].tau == 2 and .[1].p == [0.5,0.5] and .[1].support == 2'
map 0 '0 0\n' --json --alpha 1
holds '.tau == null and .p == [0.5,0.5] and .support == 2'
for alpha in 1 1.001 1.25 1.5 2 3 4; do
  map 0 '0.3 -1 2 2 -inf\n7e8 6.99999999e8\n1 1 1 1\n-5 3\n' --json --alpha $alpha
  holds '(.p | add | . - 1 | fabs) < 1e-6 and (.p | map(select(. > 0)) | length) <= .support'
done
map 0 '-inf -inf\n' --json
holds '.p == [0,0] and .support == 0 and .tau == null'
for number in nan -nan inf +inf 1e999 -1e999; do
  map 1 "1 2\n$number 1\n"
  grep -q "line 2.*$number" err || die "$number is not named"
done
map 0 '1e-400 1\n' --alpha 2
map 1 '1 2\n3\0 4\n'
grep -q "line 2.*NUL" err || die "a NUL byte is not named"
map 0 '5\n' --json
holds '.p == [1] and .support == 1'
map 0 '3 1\n\n\n1 3\n'
[ "$(cat out)" = "$(printf '1 0\n0 1')" ] || die "plain output"
map 1 '1 2\n3 x4\n'
grep -q "line 2.*x4" err || die "the bad number is not named"
map 1 '1 2;3\n'
map 2 '1\n' --alpha 0.5
map 2 '1\n' --alpha 5
map 2 '1\n' --alpha nan
map 2 '1\n' 3
map 1 ''
grep -q empty err || die "empty input goes unnoticed"
seq 1 5000 | tr '\n' ' ' | "$EMX" map --json >out || die "a long row"
holds '(.p | length) == 5000 and (.p | add | . - 1 | fabs) < 1e-6'
exit 0
