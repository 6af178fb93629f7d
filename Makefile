# Thin on purpose: CMake is the build system (CMakeLists.txt, CMakePresets.json). Each command sets the machine up first.
BUILD ?= build
CMAKE_FLAGS ?=
PREFIX ?= /usr/local
JOBS ?= $(shell nproc)

all:
	scripts/setup.sh build
	cmake -S . -B "$(BUILD)" -G Ninja -DEMX_TESTS=OFF -DCMAKE_INSTALL_PREFIX="$(PREFIX)" $(CMAKE_FLAGS)
	cmake --build "$(BUILD)"

# DESTDIR, if set, goes in front of PREFIX.
install: all
	cmake --install "$(BUILD)"

uninstall:
	cmake --build "$(BUILD)" --target uninstall

# Every label. `ctest --test-dir build -L quick` is the part that takes under a minute.
test:
	scripts/setup.sh build test
	cmake -S . -B "$(BUILD)" -G Ninja -DEMX_TESTS=ON $(CMAKE_FLAGS)
	cmake --build "$(BUILD)"
	ctest --test-dir "$(BUILD)" --output-on-failure -j $(JOBS)

# The tests of the Python package with the current torch, the entmax package and two versions of transformers from the package index
# (gigabytes, into $(BUILD)/torch-env and $(BUILD)/transformers-*); PYTHON=... names an interpreter that has the first two.
test-torch: all
	scripts/test_torch.sh "$(BUILD)"

# The page of `emx inspect` in a headless Chromium; its screenshots are in $(BUILD)/tests/browser.
test-browser:
	scripts/setup.sh build test browser
	cmake -S . -B "$(BUILD)" -G Ninja -DEMX_TESTS=ON $(CMAKE_FLAGS)
	cmake --build "$(BUILD)" --target emx
	ctest --test-dir "$(BUILD)" -C browser -L browser --output-on-failure

# Reads a real book from one sparse cache with every selector; writes build/demo.svg.
demo:
	scripts/setup.sh build demo
	cmake -S . -B "$(BUILD)" -G Ninja $(CMAKE_FLAGS) -DEMX_TESTS=OFF
	cmake --build "$(BUILD)"
	scripts/demo.sh "$(BUILD)"

# The source archive of the last commit, in $(BUILD).
dist:
	scripts/dist.sh "$(BUILD)"

clean:
	rm -rf "$(BUILD)"

.PHONY: all install uninstall test test-torch test-browser demo dist clean
