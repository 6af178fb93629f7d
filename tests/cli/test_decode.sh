# Queries, keys and values from files, against float64 attention.
. "$SRC/tests/cli/lib.sh"
near() { awk -v x="$1" -v y="$2" 'BEGIN { exit !(x <= y) }'; }
for dtype in f32 f16 bf16; do
  "$TOOL" make f.safetensors $dtype 3 4 2 300 32 || die "tool"
  for alpha in 1 1.5 2 2.5; do
    run 0 decode -f f.safetensors --alpha $alpha --out o.safetensors --json
    [ "$(wc -l <out)" = 12 ] || die "one line a query and head"
    holds '.select == "all" and .path == "all" and .certified == true and .delta_bound == 0 and .stopped_by == "done" and .pages >= 1'
    holds '.tokens == 298 + .query and .support >= 1 and .support <= .tokens and .bytes_k >= .tokens * 32 and .bytes_v >= 0 and .bytes_meta >= 0'
    # scores are float sums of 32 products: 32 * 2^-24 relative, and the weights see them through a slope of at most 2. Above alpha = 2
    # the slope at the threshold is unbounded: 1e-7 in a score may be worth 1e-7^(1/1.5) in a weight.
    err=$("$TOOL" check f.safetensors o.safetensors $alpha) || die "tool"
    limit=1e-5
    [ $alpha = 2.5 ] && limit=1e-3
    near "$err" $limit || die "alpha $alpha $dtype: relative error $err"
  done
  run 0 decode -f f.safetensors --select topk --budget 100000 --out t.safetensors --json
  holds '.select == "topk"'
  run 0 decode -f f.safetensors --select all --out o.safetensors
  grep -q 'delta_bound' out || die "table"
  cmp -s o.safetensors t.safetensors || die "topk with the full budget differs from all"
done
run 0 decode -f f.safetensors --select topk --budget 64 --json
holds '.select == "topk" and .tokens <= 64 and .pages <= 4 and .delta_bound >= 0 and .delta_bound <= 1'
run 0 decode -f f.safetensors --select gaussian --json
holds '.select == "gaussian" and .delta_bound >= 0 and .delta_bound <= 1'
run 0 decode -f f.safetensors --select gaussian --tau-mode corrected --page 32 --kv-dtype f32 --json
run 0 decode -f f.safetensors --select certified --out c.safetensors --json
all_hold 'all(.select == "certified" and .certified and .delta_bound == 0)'
cmp -s o.safetensors c.safetensors || die "certified differs from all"
run 0 decode -f f.safetensors --select certified --kv-file slow --page 64 --out k.safetensors --json
all_hold 'all(.certified)'
cmp -s o.safetensors k.safetensors || die "certified from a file differs from all in memory"
[ ! -e slow ] || die "the file of the keys is still there"
echo mine >slow
fails 1 'slow' decode -f f.safetensors --kv-file slow
[ "$(cat slow)" = mine ] || die "a file that was there has been touched"
"$TOOL" make n.safetensors f32 1 2 2 40 16 nan
run 0 decode -f n.safetensors --json
all_hold 'map(select(.nonfinite)) | length == 1 and .[0].tau == null and .[0].certified == false'
# bad files
fails 1 'nowhere' decode -f nowhere.safetensors
head -c 100 f.safetensors >short.safetensors
fails 1 'short' decode -f short.safetensors
head -c 3000 f.safetensors >cut.safetensors
fails 1 'cut' decode -f cut.safetensors
: >empty.safetensors
fails 1 'empty' decode -f empty.safetensors
printf '\377\377\377\377\377\377\377\177{}' >lying.safetensors
fails 1 'lying' decode -f lying.safetensors
fails 1 'model.safetensors: no tensor named q' decode -f "$MODEL/model.safetensors"
LC_ALL=C sed 's/\("v":{"dtype":\)"BF16"/\1 "F16"/' f.safetensors >mixed.safetensors
fails 1 'k is bf16 and v is f16' decode -f mixed.safetensors
"$TOOL" make wide.safetensors f32 1 3 2 40 16 # 3 query heads over 2 KV heads
fails 1 'multiple' decode -f wide.safetensors
"$TOOL" make many.safetensors f32 41 2 2 40 16 # more queries than positions
fails 1 'T <= N' decode -f many.safetensors
fails 2 '16, 32 or 64' decode -f f.safetensors --page 17
fails 1 'nowhere' decode -f f.safetensors --out nowhere/o.safetensors # before any row
mkdir folder
fails 1 'folder' decode -f f.safetensors --out folder
exit 0
