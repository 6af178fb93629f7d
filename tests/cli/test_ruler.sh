# Long-context questions: cells, selectors, pictures, and scores against a computation of their own.
. "$SRC/tests/cli/lib.sh"
tasks=niah,multikey,multivalue,multiquery,tracking,frequent,passkey
run 0 eval --ruler all --len 800,801 --samples 3 --show --json
all_hold 'length == 42 and (map(.ruler) | unique) == ("'$tasks'" | split(",") | sort)'
holds '(.prompt | length) == .length and (.answers | length) == (.choices | length) and .question < .length'
holds '. as $s | [range(.answers | length)] | all(. as $i | $s.prompt[$s.at[$i]:$s.at[$i] + 6] == $s.answers[$i] and ($s.choices[$i] | index($s.answers[$i])) != null)'
sort out >all
run 0 eval --ruler frequent,niah --len 801 --samples 2 --show --json # the same samples in other company
while read -r line; do grep -qxF "$line" all || die "a sample depends on others"; done <out
run 0 eval --ruler niah --len 801 --samples 1 --seed 2 --show --json
grep -qxFf out all && die "the seed has no effect"
run 0 eval --ruler niah --len 700 --samples 1 --depth 0 --show -f "$SRC/LICENSE"
grep -q '^The secret word of the' out || die "depth 0 of a text given"

# a model that knows one prompt by heart
run 0 eval --ruler passkey --len 320 --samples 1 --show --json
jq -j '.prompt + .answers[0]' out >text
run 0 train -o heart --data text --layers 1 --hidden 64 --heads 2 --kv-heads 1 --head-dim 32 --ffn 96 --alibi-heads 1 --length 325 \
  --batch 1 --warmup 5 --steps 400 --lr 1e-2
run 0 eval -m heart --ruler passkey --len 320 --samples 1 --json
holds '.exact == 1 and .found == 1 and .choice == 1 and .chance == 0.125'
run 0 eval -m heart --ruler passkey --len 320 --samples 1 --seed 2 --json
holds '.exact == 0 and .found == 0'

# what the command says of one sample, from whole texts without forks or decoding
for task in niah multivalue tracking frequent; do
  run 0 eval -m heart --ruler $task --len 640 --samples 1 --kv-dtype f32 --json
  "$TOOL" ruler heart $task 640 0 >want || die "$task"
  read -r choice gain margin chance <want
  holds ".choice == $choice and .gain == $gain and ((.chance / $chance - 1) | fabs) < 1e-6 and .samples == 1 and .depth == null"
  # margins of a few nats out of float logits, which differ by 1e-5 between one pass over a text and a token at a time
  holds "((.margin - $margin) | fabs) < 1e-3 and ((.margin) | fabs) > 0.01"
done
run 0 eval -m "$MODEL" -m heart --ruler passkey,tracking --len 620,700 --samples 1 --depth 0,100 --select all,topk,gaussian --budget 64,256 \
  --json --svg grid.svg
all_hold 'length == 2 * 3 * 2 * 4 and (map(select(.ruler == "passkey").depth) | unique) == [0, 1]'
holds '.exact >= 0 and .gain <= 1 and (if .select == "topk" then .budget else 64 end | IN(64, 256))'
all_hold 'map(select(.select == "topk" and .length == 700)) | group_by([.model, .ruler, .depth]) | all(.[0].bytes_share < .[1].bytes_share)'
for word in heart passkey 620 'topk 64' '</svg>'; do grep -q "$word" grid.svg || die "the picture lacks $word"; done
run 0 eval -m heart --ruler passkey --len 400 --samples 1
grep -q '^heart  *passkey  *400 ' out || die "table"
fails 2 'unknown task' eval -m "$MODEL" --ruler niah,haystack
fails 2 'no task' eval -m "$MODEL" --ruler ,
fails 2 'len' eval -m "$MODEL" --ruler niah --len 0
fails 2 'samples' eval -m "$MODEL" --ruler niah --samples 0
fails 2 'seed' eval -m "$MODEL" --ruler niah --seed x
fails 2 'depth' eval -m "$MODEL" --ruler niah --depth 101
fails 2 'needs --ruler' eval -m "$MODEL" -f text --depth 50
fails 2 'needs --ruler' eval -m "$MODEL" -f text --show
fails 2 'needs --ruler' eval -m "$MODEL" -f text --len 50
fails 2 'not about --ruler' eval -m "$MODEL" --ruler niah --curve 50
fails 2 '-m DIR' eval --ruler niah
fails 1 'at least' eval -m "$MODEL" --ruler niah --len 1000,100 # before any row
run 0 train -o task --task parity $SHAPE --length 8..16 --steps 3
fails 1 'task parity' eval -m task --ruler niah
fails 1 'task parity' eval -m "$MODEL" -m task --ruler niah
fails 1 'nowhere' eval -m "$MODEL" --ruler niah -f nowhere
"$EMX" eval -m "$MODEL" --ruler niah --len 4000 --samples 100000 --json >out 2>err &
sleep 0.5
interrupt $!
exit 0
