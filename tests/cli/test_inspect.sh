# The page of what heads attend to, its lists as JSON, Ctrl-C, and what it refuses. The page in a browser: tests/browser.
. "$SRC/tests/cli/lib.sh"
head -c 400 "$SRC/LICENSE" >prompt
run 0 inspect -m "$MODEL" -f prompt -n 5 -o page.html
[ ! -s out ] || die "data on standard output"
grep -q '^page.html: [0-9.]* KB, 405 tokens, 5 steps, 20 lists of' err || die "the summary"
grep -q '@HEAD@\|@ROWS@' page.html && die "words of the template are left"
grep -q 'https\?://' page.html && die "the page refers to something outside"
cp page.html before
run 0 inspect -m "$MODEL" -f prompt -n 5 -o page.html --json
[ "$(wc -l <out)" = 21 ] || die "20 lists and a summary"
cmp -s page.html before || die "two runs, two pages"
all_hold '.[-1] == {page: "page.html", bytes: '"$(wc -c <page.html)"', tokens: 405, steps: 5, lists: 20, support_mean: (([.[:-1][].support] | add) / 20)}'
# the lists: ascending, visible, as many as their size says, weights sum to one, and the tokens made are those that generate makes
all_hold '.[:-1] | all(.support == (.index | length) and .support == (.weight | length) and .index == (.index | sort | unique) and .index[-1] <= .position)'
all_hold '.[:-1] | all((.weight | add) as $sum | $sum > 0.9999 and $sum < 1.0001 and .certified and (.tau | type) == "number")'
all_hold '[.[:-1][] | .position] | unique == [399, 400, 401, 402, 403]'
said=$(jq -rs '[.[:-1][] | select(.layer == 0 and .head == 0 and .position >= 400) | .token] | implode' out)
run 0 generate -m "$MODEL" -f prompt -n 4
[ "$(cat out)" = "$said" ] || die "inspect reads other tokens than generate makes"
# more of the prompt, fewer tokens, every selector; the page alone
run 0 inspect -m "$MODEL" -p "The licence" -n 0 --queries 1000 --json
[ "$(wc -l <out)" = $((11 * 4 + 1)) ] || die "11 steps of the prompt"
all_hold '.[-1] | .page == null and .bytes == 0 and .steps == 11'
for select in topk gaussian certified; do
  run 0 inspect -m "$MODEL" -f prompt -n 3 --select $select $([ $select = topk ] && echo --budget 32) --json
  all_hold '.[:-1] | all(.support == (.index | length))'
done
run 0 inspect -m "$MODEL" -f prompt -n 3 --kv-file slow --keep 2 -o small.html

fails 2 'one of -p TEXT and -f FILE' inspect -m "$MODEL" -o page.html
fails 2 '-o FILE is required' inspect -m "$MODEL" -p x
fails 2 '-m DIR is required' inspect -p x -o page.html
fails 2 'nothing to show' inspect -m "$MODEL" -p x -n 1 --queries 0 -o page.html
fails 2 "--keep is '0'" inspect -m "$MODEL" -p x --keep 0 -o page.html
fails 1 'empty' inspect -m "$MODEL" -p '' -o page.html
fails 1 'nowhere' inspect -m "$MODEL" -f nowhere -o page.html
fails 1 'nowhere/page.html' inspect -m "$MODEL" -p x -o nowhere/page.html
fails 1 'directory' inspect -m "$MODEL" -p x -o .
fails 1 'context (-c) has 20' inspect -m "$MODEL" -f prompt -c 20 -o page.html
cmp -s page.html before || die "a failure touched the page"
# a full disk: a limit of the shell stands for it
(ulimit -f 8; trap '' XFSZ; run 1 inspect -m "$MODEL" -f prompt -n 5 -o page.html) || die "no limit"
grep -q 'page.html' err || die "what could not be written"
cmp -s page.html before || die "a full disk touched the page"
# Ctrl-C: nothing new, nothing half-written
"$EMX" inspect -m "$MODEL" -f prompt -n 100000 -c 200000 -o page.html >out 2>err </dev/null &
sleep 0.5
interrupt $!
cmp -s page.html before || die "Ctrl-C touched the page"
ls -a | grep -q '^\.page\|page.html\.' && die "something half-written is left"
exit 0
