# Cache files: a restored run goes on as the run that saved would have done, killed or not; what is refused.
. "$SRC/tests/cli/lib.sh"
SAMPLED="--temp 1 --top-k 50 --seed 7"
for options in "" "$SAMPLED" "$SAMPLED --select certified" "$SAMPLED --select certified --kv-file slow" "$SAMPLED --select topk --budget 32 --kv-dtype f16 --page 32"; do
  run 0 generate -m "$MODEL" -p "The licence" -n 60 $options --json
  cp out whole
  run 0 generate -m "$MODEL" -p "The licence" -n 25 $options --cache-save cache --json
  cp out first
  # page size and dtype are the file's
  run 0 generate -m "$MODEL" -n 35 ${options% --kv-dtype*} --cache-load cache --json
  cp out second
  [ "$(jq -r .text whole)" = "$(jq -r .text first)$(jq -r .text second)" ] || die "$options: the restored run says something else"
done
run 0 generate -m "$MODEL" -p "The licence" -n 60 $SAMPLED
head -c 60 out >whole

# killed while it generates: the cache after the prompt is there
rm cache
"$EMX" generate -m "$MODEL" -p "The licence" -n 1000000 --cache-save cache $SAMPLED >out 2>err </dev/null &
pid=$!
ten() { [ -s cache ] && [ "$(wc -c <out)" -ge 10 ]; }
wait_for 60 ten || die "no cache after the prompt"
kill -9 $pid
wait $pid 2>/dev/null
run 0 generate -m "$MODEL" -n 60 --cache-load cache $SAMPLED
[ "$(head -c 60 out)" = "$(cat whole)" ] || die "killed: the restored run says something else"

# killed with its keys in a file: nothing of that is left
rm cache
"$EMX" generate -m "$MODEL" -p "The licence" -n 1000000 --cache-save cache --kv-file slow >out 2>err </dev/null &
pid=$!
wait_for 60 ten || die "no cache after the prompt"
kill -9 $pid
wait $pid 2>/dev/null
[ ! -e slow ] || die "killed: its file is still there"

# Ctrl-C saves what was printed
"$EMX" generate -m "$MODEL" -p "The licence" -n 1000000 --cache-save cache $SAMPLED >text 2>err </dev/null &
pid=$!
ten() { [ "$(wc -c <text)" -ge 10 ]; }
wait_for 60 ten || die "nothing was generated"
interrupt $pid
made=$(($(wc -c <text) - 1))
run 0 generate -m "$MODEL" -n 20 --cache-load cache $SAMPLED
head -c 20 out >tail
run 0 generate -m "$MODEL" -p "The licence" -n $((made + 20)) $SAMPLED
[ "$(head -c $((made + 20)) out)" = "$(head -c $made text; cat tail)" ] || die "Ctrl-C: the restored run says something else"

# a prompt in two parts is the prompt; only reading it prints nothing
run 0 generate -m "$MODEL" -p "The lic" -n 0 --cache-save cache
[ ! -s out ] || die "-n 0 prints"
run 0 generate -m "$MODEL" -p "ence" -n 60 --cache-load cache $SAMPLED
[ "$(head -c 60 out)" = "$(cat whole)" ] || die "an appended prompt says something else"
b2=$(command -v b2sum) && {
  [ "$(head -c -32 cache | "$b2" -l 256 | cut -d' ' -f1)" = "$(tail -c 32 cache | od -An -v -tx1 | tr -d ' \n')" ] || die "checksum"
}

fails 2 'cache-load' generate -m "$MODEL"
fails 2 'cache-save' generate -m "$MODEL" -p x -n 0
fails 1 'nowhere' generate -m "$MODEL" --cache-load nowhere
fails 1 'nowhere' generate -m "$MODEL" -p x --cache-save nowhere/cache
fails 1 'page' generate -m "$MODEL" --cache-load cache --page 32
fails 1 'f32' generate -m "$MODEL" --cache-load cache --kv-dtype f32
fails 1 'context' generate -m "$MODEL" --cache-load cache -n 100 -c 100
fails 1 'not a cache' generate -m "$MODEL" --cache-load "$MODEL/model.safetensors"
cp -r "$MODEL" other
jq '.entmax_alpha = 1.25' "$MODEL/config.json" >other/config.json
fails 1 'another model' generate -m other --cache-load cache
head -c 3000 cache >short
fails 1 'short' generate -m "$MODEL" --cache-load short
size=$(wc -c <cache)
{ head -c $((size - 500)) cache; printf '\252\125'; tail -c 498 cache; } >bad
fails 1 'damaged' generate -m "$MODEL" --cache-load bad

# a full disk leaves the cache that there was
cp cache kept
(
  trap '' XFSZ
  ulimit -f 2
  "$EMX" generate -m "$MODEL" -p "The licence, and more" -n 5 --cache-save cache </dev/null 2>&1
  echo "ended with $?"
) | cat >err
grep -q 'ended with 1' err && grep -q 'nothing was changed' err || die "a full disk goes unnoticed"
cmp -s cache kept && [ "$(echo cache*)" = cache ] || die "a full disk leaves another cache"
exit 0
