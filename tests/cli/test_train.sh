# Training: bit-exact resume, Ctrl-C, and what it refuses.
. "$SRC/tests/cli/lib.sh"
DATA=(--data "$SRC/LICENSE")
train() { # FOLDER ARGS...: in the background
  local folder=$1
  shift
  "$EMX" train -o "$folder" "${DATA[@]}" $SHAPE "$@" >out 2>err </dev/null &
  pid=$!
}
run 0 train -o whole "${DATA[@]}" $SHAPE --steps 160
run 0 train -o parts "${DATA[@]}" $SHAPE --steps 160 --save-every 70 -t 1
# interrupted after a save, then continued
train half --steps 160 --save-every 20
wait_for 60 test -s half/trainer.safetensors || die "no save after 60 s"
interrupt $pid
grep -q 'resume' err || die "Ctrl-C: the message does not say how to go on"
run 0 info -m half
cp half/log.jsonl out
all_hold '(map(.step) | max) < 160'
run 0 train -o half "${DATA[@]}" $SHAPE --steps 160 --save-every 20 --resume
for f in config.json model.safetensors trainer.safetensors; do
  cmp -s whole/$f half/$f || die "$f of a resumed training differs"
  cmp -s whole/$f parts/$f || die "$f depends on threads or saves"
done
cp half/log.jsonl out
all_hold 'map(select(.loss).step) == [range(1; 161)]'
# what lies past the save, and half a line, are dropped
printf '{"step":161,"loss":1}\n{"step":162,"lo' >>half/log.jsonl
run 0 train -o half "${DATA[@]}" $SHAPE --steps 160 --resume
cp half/log.jsonl out
all_hold '(map(.step) | max) == 160'

# a full disk leaves the log as it was and nothing beside it
cp half/log.jsonl kept
(
  trap '' XFSZ
  ulimit -f 0
  "$EMX" train -o half "${DATA[@]}" $SHAPE --steps 160 --save-every 20 --resume </dev/null 2>&1
  echo "ended with $?"
) | cat >err
grep -q 'ended with 1' err && grep -q 'cannot write' err || die "a full disk goes unnoticed"
cmp -s kept half/log.jsonl && [ ! -e half/log.jsonl.tmp ] || die "a full disk leaves another log"

# --json: the lines of the log
run 0 train -o short "${DATA[@]}" ${SHAPE% --warmup*} --steps 3 # a training shorter than the usual warm-up is all warm-up
jq -es '.[-1].step == 3 and .[0].lr < .[2].lr' short/log.jsonl >/dev/null || die "warm-up of a short training"
fails 1 'warmup is 4' train -o other "${DATA[@]}" $SHAPE --warmup 4 --steps 3
run 0 train -o told "${DATA[@]}" $SHAPE --steps 4 --save-every 2 --valid "$SRC/LICENSE" --json
cmp -s out told/log.jsonl || die "--json differs from the log"

# Ctrl-C before the first save keeps the step it ended; meanwhile the folder is closed to a second run
train early --steps 1000000 --save-every 1000000
wait_for 60 test -s early/log.jsonl || die "no step after 60 s"
"$EMX" train -o early "${DATA[@]}" $SHAPE --steps 2 2>second </dev/null && die "two runs in one folder"
[ $? = 1 ] && grep -q 'another.*early' second || die "the second run is not told about the first"
"$EMX" train -o early "${DATA[@]}" $SHAPE --steps 2 --resume 2>second </dev/null && die "two runs in one folder"
grep -q 'another.*early' second || die "the second run is not told about the first"
interrupt $pid
run 0 info -m early

fails 1 'resume' train -o whole "${DATA[@]}" $SHAPE --steps 160
fails 1 'layers' train -o whole "${DATA[@]}" $SHAPE --steps 160 --resume --layers 3
fails 1 'lr' train -o whole "${DATA[@]}" $SHAPE --steps 160 --resume --lr 0.1
fails 1 'empty' train -o empty "${DATA[@]}" $SHAPE --steps 9 --resume
: >nothing.txt
fails 1 'empty' train -o new --data nothing.txt $SHAPE
fails 1 'nowhere' train -o new --data nowhere.txt $SHAPE
echo short >short.txt
fails 1 'window' train -o new --data short.txt $SHAPE
fails 1 'short.txt' train -o new "${DATA[@]}" --valid short.txt $SHAPE
mkdir bare
fails 1 'window' train -o bare --data short.txt $SHAPE
[ -z "$(ls bare)" ] || die "a training that did not start left $(ls bare)"
: >file
fails 1 'file' train -o file/inside "${DATA[@]}" $SHAPE --steps 2
fails 1 'file' train -o file "${DATA[@]}" $SHAPE --steps 2
if [ "$(id -u)" != 0 ]; then # root may write anywhere
  mkdir closed && chmod 555 closed
  fails 1 'closed' train -o closed "${DATA[@]}" $SHAPE --steps 2
fi
fails 2 'multiple' train -o new "${DATA[@]}" $SHAPE --steps 2 --kv-heads 2 --heads 3
fails 1 'bytes' train -o new "${DATA[@]}" $SHAPE --steps 2 --hidden 65536 --ffn 65536 --layers 1000
[ ! -e new ] && [ ! -e empty ] || die "a training that did not start made its folder"
exit 0
