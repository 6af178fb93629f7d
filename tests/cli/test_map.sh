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
map 2 '1\n' --alpha 1.0000001
map 2 '1\n' 3
# other maps: clamp(x - tau, 0, 1) with sum 2; normmax of alpha 2 is (.6, .8) / 1.4 for scores .2 apart
map 0 '3 2.5 2.25 0\n' --json --kind budget --alpha 2 --budget 2
holds '.p[0] == 1 and (.p[1] - 0.625 | fabs) < 1e-15 and (.p[2] - 0.375 | fabs) < 1e-15 and .p[3] == 0'
holds '(.tau - 1.875 | fabs) < 1e-15 and .support == 3'
map 0 '1 1.2 -1\n' --json --kind normmax --alpha 2
holds '(.p[0] - 0.6/1.4 | fabs) < 1e-12 and .p[2] == 0 and (.tau - 0.4 | fabs) < 1e-12 and .support == 2'
map 0 '1 1.2 -1\n' --json --kind normmax --alpha 1000 # w = y^(1/999): nearly equal
holds '(.p[0] - .p[1] | fabs) < 2e-3 and .p[2] == 0 and .support == 2'
map 2 '1\n' --kind normmax --alpha 1001
map 2 '1\n' --kind budget --alpha 5
map 1 '1 2 3 4\n1 2 3\n' --kind budget --budget 3.5
grep -q "line 2.*3 scores.*3.5" err || die "a row too short for the budget is not named"
map 0 '1 -inf -inf 2\n' --kind budget --budget 3
[ "$(cat out)" = "1 0 0 1" ] || die "fewer scores than the budget"
map 2 '1 2\n' --kind budget --alpha 1
map 2 '1 2\n' --kind normmax --alpha 1
map 2 '1 2\n' --kind top
map 2 '1 2\n' --budget 2
grep -q -- "--kind budget" err || die "--budget alone is not explained"
map 2 '1 2\n' --kind budget --budget 0
map 2 '1 2\n' --kind budget --loss
# losses: that of the literature's example, cross-entropy of two equal scores, a mask as the class
map 0 '2 -2 0 .5\n' --json --loss
holds '(.loss - 0.18437138 | fabs) < 1e-8 and (.dx[2] + 0.32600736 | fabs) < 1e-8 and .dx[0] == 0 and .support == 2'
map 0 '0, 0, 0\n1 0 -inf\n' --json --loss --alpha 1
all_hold '(.[0].loss - 0.6931471805599453 | fabs) < 1e-15 and .[0].dx == [-0.5,0.5] and .[1].loss == null'
map 0 '0 5 1\n1 5 1\n' --loss --alpha 2
[ "$(cat out)" = "$(printf '0\n4')" ] || die "plain losses"
for bad in 2 -1 0.5 -inf; do
  map 1 "0 1 2\n$bad 1 2\n" --loss
  grep -q "line 2.*class" err || die "class $bad is not refused"
done
map 1 '0\n' --loss
grep -q "line 1.*no scores" err || die "a class without scores"
map 1 ''
grep -q empty err || die "empty input goes unnoticed"
seq 1 5000 | tr '\n' ' ' | "$EMX" map --json >out || die "a long row"
holds '(.p | length) == 5000 and (.p | add | . - 1 | fabs) < 1e-6'
exit 0
