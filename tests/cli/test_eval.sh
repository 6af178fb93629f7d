# Bits per byte, the curve, and selectors against ALL; the demo's command on a small scale.
. "$SRC/tests/cli/lib.sh"
head -c 4000 "$SRC/LICENSE" >text
run 0 eval -m "$MODEL" -f text --json
holds '.bits_per_byte > 1 and .bits_per_byte < 9 and .bytes == 4000 - 63 and .ctx == 64' # 63 windows, whose first bytes are not scored
bits=$(jq .bits_per_byte out)
run 0 eval -m "$MODEL" -f text
grep -q "^$(printf %.4f "$bits") bits per byte over 3937 bytes" out || die "plain output"
run 0 eval -m "$MODEL" -f text -c 1000 --curve 100 --svg c.svg --json
holds '(.curve | length) == 10 and .bytes == 3996 and (.curve | map(.bytes) | add) == .bytes'
holds '(.bits_per_byte * .bytes) as $all | ((.curve | map(.bits_per_byte * .bytes) | add) - $all | fabs) < 0.001'
grep -q '</svg>' c.svg || die "no picture"
run 0 eval -m "$MODEL" -f text -c 1000 -n 40 --select all --json
holds '.kl == 0 and .top1 == 1 and .delta_bound_max == 0'
run 0 eval -m "$MODEL" -f text -c 1000 -n 40 --select topk --budget 1024 --json
holds '.kl == 0 and .top1 == 1 and .select == "topk"'
run 0 eval -m "$MODEL" -f text -c 1000 -n 40 --select topk,gaussian --budget 64 --json
all_hold 'map(.select) == ["topk","gaussian"]'
holds '.kl >= 0 and .top1 >= 0 and .top1 <= 1 and .bytes_share > 0 and .bits_per_byte > 1 and .bytes > 0 and .tokens == 40'
# every selector, one line a budget, against a computation of its own
run 0 eval -m "$MODEL" -f text -c 1000 -n 40 --select all,topk,gaussian,topk --budget 32,64,128 --json
all_hold 'map(.select) == ["all","topk","topk","topk","gaussian","topk","topk","topk"]'
all_hold 'map(.budget) == [null,32,64,128,null,32,64,128]'
all_hold '.[1].kl > .[3].kl and .[1].kl_max >= .[1].kl and .[1].bytes_share < .[3].bytes_share and .[2].kl == .[6].kl'
for budget in 32 64; do
  "$TOOL" kl "$MODEL" text 1000 40 $budget >want || die "kl"
  read -r kl top1 <want
  # the tool sums over exponentials as they are, the command over differences of logarithms, both in double: JSON's nine digits decide
  holds "if .budget == $budget then ((.kl / $kl - 1) | fabs) < 1e-6 and .top1 == $top1 else true end"
done
fails 2 'budget' eval -m "$MODEL" -f text --select topk --budget 64,0
fails 2 'more than' eval -m "$MODEL" -f text --select topk --budget 1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17
fails 2 'more than' eval -m "$MODEL" -f text --select topk,topk --budget 1,2,3,4,5,6,7,8,9
fails 2 'at least 2' eval -m "$MODEL" -f text -c 1
fails 1 'bytes' eval -m "$MODEL" -f text -c 100 -n 100 --select topk --json
: >nothing
fails 1 'at least 2' eval -m "$MODEL" -f nothing
fails 1 'nowhere' eval -m "$MODEL" -f nowhere
fails 2 'curve' eval -m "$MODEL" -f text --svg c.svg
fails 2 'n needs --select' eval -m "$MODEL" -f text -n 40
# what cannot be done is said before the work: nothing on standard output
fails 1 'bytes' eval -m "$MODEL" -f text -c 100 -n 100 --select topk
for command in 'eval --curve 10' 'eval --ruler niah' 'bench budgets' demo; do
  fails 1 'cannot write nowhere' $command -m "$MODEL" -f text --svg nowhere/c.svg
done
# a picture is replaced whole or not at all
cp c.svg kept.svg
(ulimit -f 0 && trap '' XFSZ && exec "$EMX" eval -m "$MODEL" -f text -c 1000 --curve 100 --svg kept.svg 2>&1) | cat >err
grep -q 'kept.svg' err || die "no message where a picture does not fit"
cmp -s c.svg kept.svg || die "a picture that could not be written is gone"

run 0 train -o soft --data "$SRC/LICENSE" $SHAPE --steps 5 --alpha 1
run 0 eval -m "$MODEL" -m soft -f text -c 1000 --curve 100 --svg two.svg --json
all_hold 'length == 2 and .[0].model != .[1].model and all(.curve | length == 10)'
grep -q 'soft' two.svg || die "no second curve"
run 0 demo -m "$MODEL" --softmax soft -f "$SRC/LICENSE" -c 2048 -n 10 --positions 4 --budget 256 --svg d.svg
for select in all topk gaussian; do grep -q "^$select " out || die "no row for $select"; done
grep -q 'softmax' d.svg && grep -q 'entmax' d.svg || die "the picture lacks a curve"
run 0 demo -m "$MODEL" -f "$SRC/LICENSE" -c 2048 -n 10 --positions 4 --select all,topk --budget 4096 --svg d.svg --json
all_hold 'map(select(.tokens == 10)) | length == 2 and all(.same_text)'
run 1 demo -m "$MODEL" --softmax "$MODEL" -f "$SRC/LICENSE" -c 256 -n 2 --positions 2
grep -q 'softmax' err || die "a twin that is no softmax model"
fails 1 'needed' demo -m "$MODEL" -f text -c 65536
fails 2 'all' demo -m "$MODEL" -f text --select topk

# activations: the file is what decode and bench read; layers are counted from 0
run 0 eval -m "$MODEL" -f text -c 300 --dump d.safetensors
run 0 info -f d.safetensors --json
all_hold 'map({(.name): .shape}) | add == {"q":[300,2,32],"k":[300,1,32],"v":[300,1,32],"alibi_slopes":[2]}'
cp d.safetensors last.safetensors
run 0 eval -m "$MODEL" -f text -c 300 --dump d.safetensors --layer 1
cmp -s d.safetensors last.safetensors || die "the last of two layers is layer 1"
run 0 eval -m "$MODEL" -f text -c 300 --dump d.safetensors --layer 0
cmp -s d.safetensors last.safetensors && die "layers do not differ"
run 0 decode -f d.safetensors --out o.safetensors --json
all_hold 'length == 600 and all(.certified)'
run 0 bench decode --data d.safetensors --dtype f32 --rounds 3 --json
holds '.n == 300 and .hq == 2 and .hkv == 1 and .d == 32 and .rel_err < 1e-5'
fails 1 'last is 1' eval -m "$MODEL" -f text --dump d.safetensors --layer 2
fails 2 'needs --dump' eval -m "$MODEL" -f text --layer 0
fails 2 'one model' eval -m "$MODEL" -m soft -f text --dump d.safetensors
fails 1 'nowhere' eval -m "$MODEL" -f text --dump nowhere/d.safetensors
exit 0
