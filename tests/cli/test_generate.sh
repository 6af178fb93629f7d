# Generation: every selector, seeds, Ctrl-C, and what it refuses.
. "$SRC/tests/cli/lib.sh"
run 0 generate -m "$MODEL" -p "The licence" -n 20
[ "$(wc -c <out)" = 21 ] || die "20 bytes and a newline"
grep -q 'tokens/s' err || die "statistics"
cp out greedy
run 0 generate -m "$MODEL" -p "The licence" -n 20 --select topk --budget 4096
cmp -s out greedy || die "topk with the full budget says something else"
run 0 generate -m "$MODEL" -p "The licence" -n 20 --select certified --kv-file slow
cmp -s out greedy || die "from a file it says something else"
[ ! -e slow ] || die "the file of the keys is still there"
run 0 generate -m "$MODEL" -p "The licence" -n 20 --select certified --json # 19 steps, 2 layers, 2 heads; too short for the ladder
holds '.rows == 76 and .certified == 76 and .paths == {"all": 76, "pages": 0, "ladder": 0} and .bytes_meta == 0'
holds '.bytes_share * 100 > 40 and .bytes_k > 0 and .bytes_v > 0'
run 0 generate -m "$MODEL" -p "The licence" -n 20 --select topk --budget 16 --json
holds '.paths.pages > 0 and .paths.all + .paths.pages == .rows and .certified < .rows and .bytes_meta > 0'
printf 'The licence' >prompt
run 0 generate -m "$MODEL" -f prompt -n 20
cmp -s out greedy || die "a prompt from a file says something else"
for select in all topk gaussian; do
  run 0 generate -m "$MODEL" -p "The licence" -n 10 --select $select $([ $select = topk ] && echo --budget 16) --json
  holds '.tokens == 10 and .tok_per_s > 0 and .attn_ms_per_tok > 0 and .select == "'$select'" and .bytes_share > 0 and .support_mean >= 1'
  holds '.delta_bound_max >= 0 and .delta_bound_max <= 1 and .certified_share >= 0 and .certified_share <= 1 and (.text | type) == "string"'
done
run 0 generate -m "$MODEL" -p "The licence" -n 40 --temp 1 --top-k 50 --top-p 0.95 --seed 7 --json
cp out a
run 0 generate -m "$MODEL" -p "The licence" -n 40 --temp 1 --top-k 50 --top-p 0.95 --seed 7 --json -t 1
[ "$(jq .text a)" = "$(jq .text out)" ] || die "one seed, two texts"
run 0 generate -m "$MODEL" -p "The licence" -n 40 --temp 1 --seed 8 --json
[ "$(jq .text a)" != "$(jq .text out)" ] || die "two seeds, one text"
run 0 generate -m "$MODEL" -p "The licence" -n 1
[ "$(wc -c <out)" = 2 ] && grep -q '^1 tokens, - tokens/s$' err || die "one token: no step was decoded"
run 0 generate -m "$MODEL" -p "The licence" -n 1 --json
holds '.tokens == 1 and .tok_per_s == null and .support_mean == null'
for dtype in f32 f16; do run 0 generate -m "$MODEL" -p x -n 5 --kv-dtype $dtype --page 32; done

fails 1 'empty' generate -m "$MODEL" -p ""
: >nothing
fails 1 'empty' generate -m "$MODEL" -f nothing
fails 1 'nowhere' generate -m "$MODEL" -f nowhere
fails 1 'nowhere' generate -m nowhere -p x
fails 1 '[0-9] bytes' generate -m "$MODEL" -p x -c 1000000000
fails 1 'nowhere/slow' generate -m "$MODEL" -p x --kv-file nowhere/slow
fails 1 'context' generate -m "$MODEL" -p x -n 10 -c 5
cp -r "$MODEL" broken
head -c 2000 "$MODEL/model.safetensors" >broken/model.safetensors
fails 1 'model.safetensors' generate -m broken -p x
cp -r "$MODEL" noalpha
jq 'del(.entmax_alpha)' "$MODEL/config.json" >noalpha/config.json
fails 1 'entmax_alpha' generate -m noalpha -p x
cp -r "$MODEL" other
jq '.hidden_size = 128' "$MODEL/config.json" >other/config.json
fails 1 'other' generate -m other -p x

# Queries, keys and values of every step: decode replays them with the same counts, whatever alpha the model has
jq '.entmax_alpha = 1.25' "$MODEL/config.json" >config
cp -r "$MODEL" quarter
mv config quarter/config.json
for model in "$MODEL" quarter; do
  run 0 generate -m "$model" -p "The licence" -n 20 --dump-qkv dump --kv-dtype bf16 --json
  cp out told
  for layer in 0 1; do
    run 0 decode -f dump/layer-$layer.safetensors --json
    all_hold 'length == 38 and (map(.certified) | all)' # 19 steps of 2 heads
    cat out >>replayed
  done
  jq -es '(.[0].support_mean * .[0].rows | round) as $support | .[0].bytes_k as $k | .[0].bytes_v as $v | .[1:] |
    (map(.support) | add) == $support and (map(.bytes_k) | add) == $k and (map(.bytes_v) | add) == $v' told replayed >/dev/null ||
    die "the replay counts otherwise"
  rm replayed
done
run 0 decode -f dump/layer-0.safetensors --out a.safetensors
run 0 decode -f dump/layer-0.safetensors --out b.safetensors -a 1.25
cmp -s a.safetensors b.safetensors || die "the file's alpha is not taken"
sed 's/"1.25"/"0.25"/' dump/layer-0.safetensors >low.safetensors
fails 1 "entmax_alpha is '0.25'" decode -f low.safetensors
fails 1 "entmax_alpha is '0.25'" bench decode --data low.safetensors
run 0 decode -f dump/layer-0.safetensors --out b.safetensors --select certified
cmp -s a.safetensors b.safetensors || die "a replay with another selector"
run 0 bench decode --data dump/layer-1.safetensors --head 1 --rounds 2 --json
holds '.head == 1 and .hq == 1 and .hkv == 1 and .n == 30 and .rel_err < 1e-5'
all_hold 'map(.alpha) == [1, 1.25]'
run 0 bench decode --data dump/layer-0.safetensors --data dump/layer-1.safetensors --head each --rounds 2 --svg heads.svg --json
all_hold 'map([.data, .head]) == [["0", 0], ["0", 0], ["0", 1], ["0", 1], ["1", 0], ["1", 0], ["1", 1], ["1", 1]
  | ["dump/layer-\(.[0]).safetensors", .[1]]]'
grep -q '>layer-1<' heads.svg && grep -q '>all: bytes<' heads.svg || die "the picture"
fails 2 'head each' bench decode --data dump/layer-0.safetensors --head 1 --svg heads.svg
fails 2 'head' bench decode --head 1
fails 1 'last is 1' bench decode --data dump/layer-1.safetensors --head 2
run 0 generate -m "$MODEL" -p "The licence" -n 2 --dump-qkv one --layer 1
[ "$(ls one)" = layer-1.safetensors ] || die "--layer: $(ls one)"
fails 2 'dump-qkv' generate -m "$MODEL" -p x -n 1 --dump-qkv dump
fails 2 'dump-qkv' generate -m "$MODEL" -p x --layer 1
fails 2 'kv-file' generate -m "$MODEL" -p x --dump-qkv dump --kv-file slow
fails 1 'last is 1' generate -m "$MODEL" -p x --dump-qkv dump --layer 2
fails 1 'nowhere/dump' generate -m "$MODEL" -p x --dump-qkv nowhere/dump

# Ctrl-C: what there is stays, exit status 130
"$EMX" generate -m "$MODEL" -p "The licence" -n 1000000 --select topk --budget 64 >out 2>err </dev/null &
pid=$!
twenty() { [ "$(wc -c <out)" -ge 20 ]; }
wait_for 60 twenty || die "nothing was generated"
interrupt $pid
[ "$(head -c 5 out)" = "$(head -c 5 greedy)" ] || die "Ctrl-C: the text is not there"
grep -q 'tokens/s' err || die "Ctrl-C: no statistics"
exit 0
