# Scale and position types: each learns, is described, evaluates and generates; resumes check them; what has no effect is refused.
. "$SRC/tests/cli/lib.sh"
SMALL="--layers 2 --hidden 64 --heads 4 --kv-heads 2 --head-dim 16 --ffn 96 --length 64 --batch 4 --warmup 4 --steps 40"
head -c 3000 "$SRC/LICENSE" >text
n=0
learns() { # OPTIONS...: a falling loss, and a model that the other commands take
  n=$((n + 1))
  run 0 train -o m$n --data text $SMALL "$@"
  cp m$n/log.jsonl out
  all_hold 'map(.loss) | .[0] > 5 and (.[35:] | add / length) < 0.75 * .[0]'
  run 0 eval -m m$n -f text --json
  all_hold '.[-1].bits_per_byte < 6 and .[-1].bits_per_byte > 1'
  run 0 generate -m m$n -p 'The License' -n 5 --select topk --budget 32
}
told() { # FILTER: of info --json on the last model
  run 0 info --json -m m$n
  holds "$1"
}
learns --alibi-heads 2 --scale asentmax
told '.attn_scale_type == "asentmax" and .alibi_num_heads == 2 and (has("rope_theta") | not)'
run 0 info -m m$n
grep -q 'scale asentmax' out || die "info does not name the scale"
learns --alibi-heads 2 --scale ssmax --slopes 0.5,0.1
told '.attn_scale_type == "ssmax" and .alibi_slope_type == "given" and .alibi_slopes == [0.5, 0.1]'
run 0 info -m m$n
grep -q 'given slopes 0.5 0.1' out || die "info does not show the slopes"
learns --position alibi --scale focal --slopes exp
told '.position_type == "alibi" and .alibi_num_heads == 4 and .alibi_slope_type == "exp" and .focal_temperature == 0.4 and .focal_learned == false'
learns --position nope --scale focal --temperature 0.6 --learn-temperature
told '.position_type == "nope" and .focal_temperature == 0.6 and .focal_learned'
learns --position rope --rope-theta 500
told '.position_type == "rope" and .rope_theta == 500 and .alibi_num_heads == 0'
learns --alibi-heads 2 --learn-alpha --alpha 1.4
told '.entmax_alpha == 1.4 and .entmax_alpha_learned'
run 0 eval -m m$n -f text --dump layer.safetensors
run 0 info --json -f layer.safetensors
all_hold 'map(select(.name == "alphas") | .dtype == "f64" and .shape == [4]) == [true]'
# decode takes each head's alpha from the file: as with --alpha and that number
run 0 decode -f layer.safetensors --json
cp out learned
head=0
header=$(od -An -t u8 -N 8 layer.safetensors)
at=$(tail -c +9 layer.safetensors | head -c "$header" | jq '.alphas.data_offsets[0]')
for alpha in $(od -An -v -t f8 -j $((8 + header + at)) -N 32 layer.safetensors); do
  run 0 decode -f layer.safetensors --json --alpha "$alpha"
  jq -c "select(.head == $head)" out >one
  jq -c "select(.head == $head)" learned | cmp -s - one || die "head $head is not decoded with alpha $alpha"
  head=$((head + 1))
done
[ $head = 4 ] || die "not four alphas"
# and so does the replay of what was generated: the supports of all layers add up to what generate saw
run 0 generate -m m$n -f text -n 6 --dump-qkv steps --json
want=$(jq '.support_mean * .rows | round' out)
for file in steps/layer-*.safetensors; do
  run 0 decode -f $file --json
  jq .support out
done >supports
[ "$(jq -s add supports)" = "$want" ] || die "a replay with learned alphas has another support"
jq -c "select(.head == 0)" out >one
jq -c "select(.head == 0)" learned | cmp -s - one && die "head 0 is decoded with the alpha of head 3"

# and so does the benchmark, whose float64 check has each head's alpha; sums of 32 products in float, of keys that are bf16 in both
run 0 bench decode --data layer.safetensors --rounds 2 --select all,certified --json
all_hold 'length == 3 and .[0].alpha == 1 and (.[0] | has("alphas") | not) and all(.rel_err < 1e-5)'
alphas=[$(od -An -v -t f8 -j $((8 + header + at)) -N 32 layer.safetensors | xargs | tr ' ' ,)]
all_hold ".[1:] | all(.alpha == null and ([.alphas, $alphas] | transpose | all((.[0] - .[1]) | fabs < 1e-8)))"
run 0 bench decode --data layer.safetensors --rounds 2 --select all --alpha 2 --json
all_hold '.[1].alpha == 2 and (.[1] | has("alphas") | not) and .[1].rel_err < 1e-5'

# a resumed training has the scale and the positions of the first
again() { # TEXT OPTIONS...
  local text=$1
  shift
  fails 1 "$text" train -o m1 --data text $SMALL --resume "$@"
}
again 'scale is none' --alibi-heads 2
again 'position is rope' --position rope --scale asentmax
again 'slopes is exp' --alibi-heads 2 --scale asentmax --slopes exp
again 'alibi-heads is 1' --alibi-heads 1 --scale asentmax
again 'learn-alpha is 1' --alibi-heads 2 --scale asentmax --learn-alpha
fails 1 'slopes has 0.2 for head 1' train -o m2 --data text $SMALL --resume --alibi-heads 2 --scale ssmax --slopes 0.5,0.2
fails 1 'rope-theta' train -o m5 --data text $SMALL --resume --position rope
fails 1 'temperature' train -o m4 --data text $SMALL --resume --position nope --scale focal --learn-temperature
run 0 train -o m1 --data text $SMALL --resume --alibi-heads 2 --scale asentmax

# what would have no effect, or no meaning
fails 2 'sqrt' train -o new --data text $SMALL --scale sqrt
fails 2 'sinus' train -o new --data text $SMALL --position sinus
fails 2 'alibi-heads has no effect' train -o new --data text $SMALL --position rope --alibi-heads 2
fails 2 'slopes has no effect' train -o new --data text $SMALL --position nope --slopes exp
fails 2 'slopes has 3 numbers' train -o new --data text $SMALL --alibi-heads 2 --slopes 1,2,3
fails 2 'slopes' train -o new --data text $SMALL --alibi-heads 2 --slopes 1,-2
fails 2 'slopes' train -o new --data text $SMALL --alibi-heads 2 --slopes 1,
fails 2 'rope-theta has no effect' train -o new --data text $SMALL --alibi-heads 2 --rope-theta 100
fails 2 'temperature has no effect' train -o new --data text $SMALL --alibi-heads 2 --scale ssmax --temperature 0.5
fails 2 'learn-temperature has no effect' train -o new --data text $SMALL --alibi-heads 2 --learn-temperature
fails 2 'alpha is 1:' train -o new --data text $SMALL --alibi-heads 2 --alpha 1 --learn-alpha
fails 1 'no head to scale' train -o new --data text $SMALL --alibi-heads 4 --scale asentmax
exit 0
