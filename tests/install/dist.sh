#!/usr/bin/env bash
# The source archive, as a packager meets it: the same bytes twice; unpacked under a name with a space, without git and without network
# it builds outside its source, passes the quick tests and installs under DESTDIR; built again elsewhere it gives the same bytes; and
# nothing in the source has changed.
# Usage: dist.sh WORK (made anew). Takes minutes: .ci/run calls it, ctest does not.
set -eu
src=$(cd "$(dirname "$0")/../.." && pwd)
rm -rf "$1"
mkdir -p "$1"
work=$(cd "$1" && pwd)
fail() {
  echo "FAILED: $*" >&2
  exit 1
}

archive=$("$src/scripts/dist.sh" "$work")
cmp "$archive" "$("$src/scripts/dist.sh" "$work/again" 2>/dev/null)" || fail "two archives of one commit differ"
mkdir "$work/un packed" "$work/bin"
tar -xzf "$archive" -C "$work/un packed"
tree="$work/un packed/$(basename "$archive" .tar.gz)"
chmod -R a-w "$tree"
content() { (cd "$tree" && find . -type f -print0 | sort -z | xargs -0 sha256sum); }
before=$(content)

# git fails if anything calls it; the network is another, empty one where the kernel lets us, else proxies that do not exist.
printf '#!/bin/sh\necho "git $*" >>"%s/git-was-called"\nexit 1\n' "$work" >"$work/bin/git"
chmod +x "$work/bin/git"
offline=(env "PATH=$work/bin:$PATH" http_proxy=http://127.0.0.1:1 https_proxy=http://127.0.0.1:1)
if unshare -rn true 2>/dev/null; then offline+=(unshare -rn); elif unshare -n true 2>/dev/null; then offline+=(unshare -n); fi

cd "$work"
"${offline[@]}" cmake -S "$tree" -B "a build" -G Ninja -DEMX_CUDA=OFF -DCMAKE_INSTALL_PREFIX=/usr -DEMX_WERROR=ON >log || { cat log; fail "configure"; }
"${offline[@]}" cmake --build "a build" >log || { tail -n 40 log; fail "build"; }
"${offline[@]}" ctest --test-dir "a build" -L quick -j "$(nproc)" --output-on-failure >log || { tail -n 60 log; fail "quick tests"; }
grep 'tests passed' log
DESTDIR="$work/dest dir" "${offline[@]}" cmake --install "a build" >log || { cat log; fail "install"; }
[ -x "dest dir/usr/bin/emx" ] && [ -f "dest dir/usr/include/emx.h" ] && [ -f "dest dir/usr/share/man/man1/emx.1" ] || fail "install: files are missing"
if find "dest dir" -type f -print0 | xargs -0 grep -lF "$work"; then fail "these installed files name the build's folder"; fi
# A build in another folder gives the same bytes.
"${offline[@]}" cmake -S "$tree" -B other -G Ninja -DEMX_CUDA=OFF -DCMAKE_INSTALL_PREFIX=/usr -DEMX_TESTS=OFF >log || { cat log; fail "configure"; }
"${offline[@]}" cmake --build other >log || { tail -n 40 log; fail "build"; }
DESTDIR="$work/other dest" cmake --install other >log || { cat log; fail "install"; }
diff -r "dest dir" "other dest" || fail "two builds differ"
DESTDIR="$work/dest dir" "${offline[@]}" cmake --build "a build" --target uninstall >log || { cat log; fail "uninstall"; }
[ -z "$(find "dest dir" ! -type d)" ] || fail "files are left after uninstall"
[ "$before" = "$(content)" ] || fail "the source tree changed"
[ ! -e git-was-called ] || fail "git was called: $(cat git-was-called)"
chmod -R u+w "$tree"
