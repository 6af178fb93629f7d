# Help, versions, unknown commands and flags, numbers out of range.
. "$SRC/tests/cli/lib.sh"
run 0 --help
for command in info selftest map decode train generate eval bench demo; do
  grep -q "^  $command " out || die "--help does not list $command"
done
run 0 --version
grep -q '^emx [0-9]*\.[0-9]*\.[0-9]* (ABI [0-9]*)$' out || die "--version"
run 2
run 2 frobnicate
grep -q "frobnicate" err || die "the unknown command is not named"
for command in info selftest map decode train generate eval "bench decode" "bench attn" "bench map" "bench budgets" "bench file" demo; do
  run 0 $command --help
  grep -q -- '--threads' out || die "$command --help has no options"
  grep -q "^Usage: emx $command" out || die "$command --help: usage line"
  fails 2 'no-such-flag' $command --no-such-flag
  fails 2 'threads' $command -t 0
  fails 2 'threads' $command -t 1000
  fails 2 'threads' $command -t two
done
run 2 bench
run 2 bench frobnicate
run 0 bench --help
fails 2 'select' generate -m x -p y --select best
fails 2 'budget' generate -m x -p y --budget 0
fails 2 'tau-mode' generate -m x -p y --tau-mode odd
fails 2 'one selector' generate -m x -p y --select all,topk
fails 2 'required' generate -m x
fails 2 'required' generate -p y
fails 2 'only one' generate -m x -p y -f z
fails 2 'twice' generate -m x -m z -p y
fails 2 'top-p' generate -m x -p y --top-p 0
for command in "generate -m x -p y" "eval -m x -f y" "decode -f x" "bench decode"; do
  fails 2 '16, 32 or 64' $command --page 17
  fails 2 'budget needs topk' $command --select gaussian --budget 64
  fails 2 'tau-mode needs gaussian' $command --select topk --tau-mode fixed
  fails 2 'max-bytes needs certified' $command --select topk --max-bytes 64
  fails 2 'max-delta needs certified' $command --max-delta 0.1
done
fails 2 'budget needs topk' eval -m x -f y --budget 64
fails 2 'required' decode
fails 2 'required' eval -m x
fails 2 'required' train -o x
fails 2 'required' train --data x
fails 2 'unexpected' train x
fails 2 'temp' generate -m x -p y --temp -1
fails 2 'seed' generate -m x -p y --seed -1
fails 2 'kv-dtype' generate -m x -p y --kv-dtype q8
fails 2 'alpha' train -o x --data y --alpha 2.5
fails 2 'expected one of bf16, f32' train -o x --data y --dtype f16 # a part of an allowed name is none
EMX_THREADS=none fails 1 EMX_THREADS info
EMX_ISA=mmx fails 1 EMX_ISA info
run 0 info
grep -q "^libentmax " out || die "info"
run 0 info --json
holds '.version and .abi >= 1 and .device == "cpu" and .threads >= 1 and .memory > 0 and (.isa | IN("scalar", "avx2", "avx512"))'
run 0 info --json -m "$MODEL"
holds '.entmax_alpha == 1.5 and .parameters > 1000 and .num_layers == 2 and .alibi_num_heads == 1 and .position_type == "nape"'
run 0 info -m "$MODEL"
run 0 info --json -f "$MODEL/model.safetensors"
holds '(.name | length) > 0 and .dtype == "bf16" and (.shape | length) > 0'
fails 1 'nowhere' info -m nowhere
fails 1 'nowhere' info -f nowhere
# a full disk is an error, not silence
"$EMX" map --help >/dev/full 2>err && die "help to a full device ended with 0"
grep -q 'standard output' err || die "no message for help on a full device"
"$EMX" info >/dev/full 2>err && die "info to a full device ended with 0"
grep -q 'standard output' err || die "no message for a full device"
exit 0
