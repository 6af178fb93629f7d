# Synthetic tasks: training, resume, exact match and its picture, and what is refused.
. "$SRC/tests/cli/lib.sh"
SHAPE="--layers 2 --hidden 32 --heads 4 --kv-heads 2 --head-dim 16 --ffn 32 --alibi-heads 2 --batch 16 --warmup 5 --lr 5e-3"
TASK="--task flipflop --length 8..16"
run 0 train -o whole $TASK $SHAPE --steps 60 --save-every 30
cp whole/log.jsonl out
all_hold 'map(select(.loss)) | length == 60 and all(.tokens <= 16 * 17) and .[59].loss < .[0].loss'
all_hold 'map(select(.valid_loss)) | length == 2 and all(.valid_exact >= 0 and .valid_exact <= 1)'
jq -e '.tokenizer == "task" and .task == "flipflop" and .vocab_size == 10' whole/config.json >/dev/null || die "config.json"
grep -q 'bits per label' whole/loss.svg || die "no loss curve"
# interrupted and continued, another number of threads: the same bits
"$EMX" train -o half $TASK $SHAPE --steps 60 --save-every 20 -t 1 >out 2>err </dev/null &
pid=$!
wait_for 60 test -s half/trainer.safetensors || die "no save after 60 s"
kill -INT $pid
wait $pid
run 0 train -o half $TASK $SHAPE --steps 60 --save-every 20 --resume
for f in config.json model.safetensors trainer.safetensors; do cmp -s whole/$f half/$f || die "$f of a resumed training differs"; done
fails 1 'longest' train -o whole --task flipflop --length 8..17 $SHAPE --steps 60 --save-every 30 --resume
fails 1 'p_write' train -o whole $TASK --p-write 0.1 $SHAPE --steps 60 --save-every 30 --resume

run 0 eval -m whole --task flipflop --len 8,16,64 --samples 50 --seed 3 --svg ladder.svg --json
all_hold 'map(.length) == [8,16,64]'
holds '.task == "flipflop" and .samples == 50 and .exact >= 0 and .exact <= 1 and .right >= .exact and .nats > 0'
grep -q 'whole' ladder.svg || die "no picture"
cp out first
run 0 eval -m whole --task flipflop --len 8,16,64 --samples 50 --seed 3 --json -t 1
cmp -s first out || die "exact match depends on threads"
run 0 eval -m whole -m half --task flipflop --len 8 --samples 10
[ "$(grep -c 'samples exact' out)" = 2 ] || die "two models"
run 0 info -m whole
grep -q 'flipflop' out || die "info does not name the task"

# Samples as prompts: numbers in, numbers out; the prompt ends where the first label is asked for
run 0 eval --task retrieval --len 31,40 --samples 2 --seed 3 --show --json
holds '(.tokens | length) == (.labels | length) and .tokens[0] == 5502 and (.labels | map(values) | length) == 2'
cp out samples
run 0 eval --task retrieval --len 31,40 --samples 2 --seed 3 --show
[ "$(jq -r '.tokens[:(.labels | map(. != null) | index(true)) + 1] | join(" ")' samples)" = "$(cat out)" ] || die "the prompts differ"
run 0 eval --task flipflop --len 16 --samples 1 --show
cp out prompt
run 0 generate -m whole -f prompt -n 5
grep -qxE '[0-9]+( [0-9]+){4}' out || die "five numbers"
cp out five
run 0 generate -m whole -f prompt -n 5 --select certified --json
holds '.tokens == 5 and .text == "'"$(cat five)"'"'
run 0 generate -m whole -f prompt -n 2 --cache-save cache
run 0 generate -m whole --cache-load cache -n 3
[ "$(cut -d' ' -f3- five)" = "$(cat out)" ] || die "a saved cache goes on otherwise"

# Ctrl-C
"$EMX" eval -m whole --task flipflop --len 4096 --samples 1000000 >out 2>err </dev/null &
pid=$!
sleep 0.5
interrupt $pid

fails 1 'flipflop, not copy' eval -m whole --task copy --len 8
fails 1 'lengths 3' eval -m whole --task flipflop --len 3
fails 1 'of text, not of task copy' eval -m "$MODEL" --task copy --len 8
fails 1 'nowhere' eval -m nowhere --task copy --len 8
fails 1 "'x' is no token of task flipflop" generate -m whole -p "1 x"
fails 1 "'99' is no token of task flipflop" generate -m whole -p 99
fails 1 "'0x1' is no token of task flipflop" generate -m whole -p 0x1
fails 1 "no tokens" generate -m whole -p "  "
fails 1 'task flipflop, not bytes' eval -m whole -f "$SRC/LICENSE"
fails 2 'no task' eval -m whole --task sums --len 8
fails 2 'needs --len' eval -m whole --task flipflop
fails 2 'needs --task' eval -m whole --p-write 0.1 -f x
fails 2 'len' eval -m whole --task flipflop --len 8,x
fails 2 'own samples' eval -m whole --task flipflop --len 8 -f x
fails 2 'two different' eval -m whole --task flipflop --len 8 --ruler niah
fails 2 'no task' train -o new --task sums
fails 2 'length' train -o new --task copy --length 9..8
fails 2 'length' train -o new --task copy --length 8..
fails 1 'lengths 0' train -o new --task copy --length 0..8
fails 2 'no text' train -o new --task copy --data "$SRC/LICENSE"
fails 2 'long-length' train -o new --task copy --long-length 9 --long-every 2
fails 2 'flipflop' train -o new --task copy --p-write 0.5
fails 2 'retrieval' train -o new --task copy --answers 3
fails 2 'length' train -o new --data "$SRC/LICENSE" --length 8..9
exit 0
