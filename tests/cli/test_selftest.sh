# selftest: every table that the CPU has is checked, the chosen one is timed.
. "$SRC/tests/cli/lib.sh"
run 0 selftest --json
all_hold '.[0] | .version and .isa and (.isa as $isa | .available | index($isa)) and (.available | index("scalar")) and (.features | type == "array")'
all_hold '.[0].available as $all | [.[] | select(.check) | .isa] | unique == ($all | sort)'
all_hold '[.[] | select(.check)] | length > 30 and all(.ok and .error <= .limit)'
all_hold '[.[] | select(.speed)] | length == 7 and all(.ms > 0)'
all_hold '[.[] | select(.speed and .method == "softmax")] | all(.vs_softmax == 1)'
all_hold '.[-1] | .ok and .failed == 0 and .checks > 30'
run 0 selftest --checks
grep -q 'all right' out || die "no verdict"
grep -q 'GB/s' out && die "--checks printed speeds"
for isa in $("$EMX" selftest --checks --json | jq -r '.available[]?'); do
  EMX_ISA=$isa run 0 selftest --checks
  grep -q "^kernels .*$isa\*" out || die "EMX_ISA=$isa is not the chosen one"
done
EMX_ISA=mmx fails 1 EMX_ISA selftest
fails 2 'unexpected' selftest now
exit 0
