# The page of `emx inspect` at 32,768 tokens in a headless Chromium: what it has decoded against the lists themselves, how long a frame
# takes, keys and wheel, a damaged page; screenshots are left in WORK. Ends with 77 where there is no Chromium.
set -u
for name in chromium chromium-browser google-chrome; do
  if command -v "$name" >/dev/null; then browser=$name && break; fi
done
[ -n "${browser:-}" ] || { echo "skipped: no chromium here"; exit 77; }
. "$SRC/tests/cli/lib.sh"
chrome() { # no network, and no sandbox for root, who has none
  timeout 60 "$browser" --headless=new --disable-gpu --no-first-run --disable-background-networking \
    --disable-component-update --disable-extensions --disable-sync --user-data-dir="$WORK/profile" \
    --hide-scrollbars --enable-logging=stderr $([ "$(id -u)" = 0 ] && echo --no-sandbox) --window-size=1440,900 "$@" 2>log
}
# check PAGE: the page's own report on standard output
check() {
  chrome --dump-dom "file://$WORK/$1#selfcheck=1" >dom || die "$browser ended with $?: $(tail -n 3 log)"
  ! grep -q 'CONSOLE.*\(rror\|refused\)' log || die "the console of $1: $(grep CONSOLE log)"
  sed -n 's/.*<pre id="selfcheck" hidden="">\(.*\)<\/pre>.*/\1/p' dom >out
  holds '.clean and .wrong == 0 and (.inputs | length == 14 and all(.))'
  # the median frame: 10 a second without any help of a GPU on a busy machine, where a browser is sluggish, not frozen
  holds '.ready_ms < 10000 and .panels_ms < 500 and (.frames | length == 8 and all(.marks > 0 and .texts > 10 and .ms < 100))'
}
# shot NAME PAGE HASH: in a frame, whose size stays what it is when the browser makes its window as large as the picture
shot() {
  printf '<body style="margin:0"><iframe style="border:0;display:block;width:1440px;height:900px" src="%s#%s"></iframe>' "$2" "$3" >frame.html
  chrome --screenshot="$WORK/$1.png" "file://$WORK/frame.html" >/dev/null || die "$browser ended with $?"
  [ "$(head -c 4 "$1.png" | tail -c 3)" = PNG ] || die "the screenshot $1.png is none"
}
# marks NAME: the map, in the middle of the screenshot, is not blank
marks() {
  python3 - "$1.png" <<'PYTHON' || die "the map of $1.png is blank"
import struct, sys, zlib
data, at, packed = open(sys.argv[1], "rb").read(), 8, b""
while at < len(data):
    size, kind = struct.unpack_from(">I4s", data, at)
    if kind == b"IHDR":
        width, height, depth, colour = struct.unpack_from(">IIBB", data, at + 8)
    packed += data[at + 8:at + 8 + size] if kind == b"IDAT" else b""
    at += size + 12
assert depth == 8 and colour in (2, 6)
raw, n = zlib.decompress(packed), 3 if colour == 2 else 4
line, found = bytearray(width * n), set()
for y in range(height // 2):
    start = y * (width * n + 1)
    rule, row = raw[start], bytearray(raw[start + 1:start + 1 + width * n])
    for i in range(width * n):
        a, b, c = row[i - n] if i >= n else 0, line[i], line[i - n] if i >= n else 0
        p = a + b - c
        nearest = min((abs(p - a), 0, a), (abs(p - b), 1, b), (abs(p - c), 2, c))[2] if rule == 4 else 0
        row[i] = (row[i] + (0, a, b, (a + b) // 2, nearest)[rule]) & 255
    line = row
    if y > height // 4:
        found |= {(y, x) for x in range(width // 8, width * 3 // 4) if row[x * n + 2] > row[x * n] + 15}  # blue on white
sys.exit(len(found) < 300)
PYTHON
}

cat "$SRC"/docs/*.md "$SRC/README.md" | head -c 32768 >text
run 0 inspect -m "$SRC/models/text-entmax" -f text -n 16 -o text.html --json
lists=$(jq -s '[.[:-1][].support | if . > 1024 then 1024 else . end] | add' out)
cuts=$(jq -s '[.[:-1][] | select(.support > 1024)] | length' out)
check text.html
cat out
holds ".tokens == 32784 and .steps == 16 and .lists == 384 and .entries == $lists and .cut == $cuts and .chips == 17 and .text > 500"
shot text text.html theme=light
marks text
shot text-dark text.html theme=dark
shot text-zoom text.html 'theme=light&zoom=1'
shot text-steps text.html 'theme=light&mode=steps'
cmp -s text.png text-dark.png && die "dark is as light"
cmp -s text.png text-zoom.png && die "close is as far"

run 0 inspect -m "$SRC/models/text-entmax" -f text -n 2 --queries 400 -o many.html # 400 rows of a head, a pixel each
check many.html
cat out
holds '.steps == 401 and .chips == 150'
shot many many.html 'theme=light&mode=steps'

"$EMX" eval --task retrieval --len 16384 --samples 1 --show >task
run 0 inspect -m "$SRC/models/retrieval-entmax" -f task -n 2 -o task.html
check task.html
cat out
shot task task.html theme=light
marks task

# a page that was cut says so, and a hostile text stays text
sed 's/\(id="rows">.\{4000\}\)[^<]*/\1/' text.html >cut.html
chrome --dump-dom "file://$WORK/cut.html" | grep -q 'this page is damaged' || die "half a page does not say that it is damaged"
run 0 inspect -m "$SRC/models/text-entmax" -p '</script><script>document.title="taken"</script><b onclick=x>&amp;' -n 3 -o hostile.html
check hostile.html
chrome --dump-dom "file://$WORK/hostile.html" | grep -q '<title>taken' && die "the prompt became a script"
rm -rf "$WORK/profile" frame.html dom log
exit 0
