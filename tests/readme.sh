# The C block of README.md is examples/decode.c, character for character.
cd "$1" || exit 1
diff <(awk '/^```c$/ { on = 1; next } /^```$/ { on = 0 } on' README.md) examples/decode.c
