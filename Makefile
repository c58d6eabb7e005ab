# make train · make test · make bench · make paper: each makes its own .venv first, so each works in a fresh clone.
# make gpu-report needs no network and no .venv: it uses PYTHON's own torch.
#
# Variables: PYTHON (the interpreter that makes .venv), TORCH (what pip installs), PYTEST_ARGS, TRAIN_ARGS, BENCH_ARGS,
# PAPER_ARGS, GPU_REPORT_ARGS, CMAKE_ARGS (for example -DADAMW_KERNELS_CUDA=OFF).
PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton>=3.6,<3.10
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*) CMakeLists.txt setup.py pyproject.toml

.PHONY: train test bench gpu-report paper develop lint format sanitize sanitized wheel clean

train: develop
	$(BIN)/python examples/train_gpt.py $(TRAIN_ARGS)

test: develop
	$(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

bench: develop
	$(BIN)/python -m bench $(BENCH_ARGS)

# Build, tests, bits, sanitizer, rows and figures of the GPU in this machine, in less than nine minutes.
gpu-report:
	$(PYTHON) -m bench.gpu_report $(GPU_REPORT_ARGS)

# Trains only what examples/paper/results has no rows of.
paper: develop
	$(BIN)/python -m examples.paper $(PAPER_ARGS)

# The checkout itself, importable from $(VENV), with the extension built beside its Python files.
develop: $(VENV)/.built

$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
	$(BIN)/python -m adamw_kernels
	touch $@

# What building takes. The rest is fetched while the compiler is at work, if make may do two things at a time.
$(VENV)/.tools: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade "pip>=25.1"
	$(BIN)/python -m pip install -q "$(TORCH)" "$(TRITON)" "setuptools>=77" wheel "pybind11>=2.13" ninja
	command -v cmake >/dev/null || $(BIN)/python -m pip install -q "cmake>=3.25"
	touch $@

$(VENV)/.installed: $(VENV)/.tools
	$(BIN)/python -m pip install -q --group test --group lint --group examples --group bench --group paper
	touch $@

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*.cpp csrc/*.h csrc/*.cu tests/cuda_on_host/*)

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(wildcard csrc/*.cpp csrc/*.h csrc/*.cu tests/cuda_on_host/*)

# The native path under AddressSanitizer and UndefinedBehaviorSanitizer: a copy of the package with a build of its own.
# First a deliberate overrun, which must be caught; then the tests of the native path. -O1: every access is checked alike,
# and loops that -O3 would vectorise take twice as long to compile and no less to run.
SANITIZED := build/sanitized
SANITIZED_TESTS := tests/test_bits.py tests/test_layouts.py tests/test_whole_step.py tests/test_formats.py tests/test_sgdw.py
SANITIZERS := $(foreach library,asan ubsan stdc++,$(shell gcc -print-file-name=lib$(library).so))
SANITIZED_PYTHON := PYTHONPATH=. LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0:malloc_context_size=2 \
  UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 $(abspath $(BIN))/python
# The watch reads Python's own objects. Where each of them is watched, too, the interpreter takes half as long again.
WATCHED_TESTS := tests/test_citizen.py tests/test_many_tensors.py

sanitize: sanitized $(VENV)/.installed
	rm -rf $(SANITIZED)/tests && cp -r tests pyproject.toml $(SANITIZED)/
	cp adamw_kernels/*.py $(SANITIZED)/adamw_kernels/
	cd $(SANITIZED) && ! $(SANITIZED_PYTHON) tests/sanitizer_canary.py 2>canary.log && grep -q heap-buffer-overflow canary.log
	cd $(SANITIZED) && $(SANITIZED_PYTHON) -m pytest -q -n 2 -k "cpu and not hypothesis" $(SANITIZED_TESTS)
	cd $(SANITIZED) && PYTHONMALLOC=malloc $(SANITIZED_PYTHON) -m pytest -q -n 2 \
	  -k "cpu or many_tensors" $(WATCHED_TESTS)

sanitized: $(VENV)/.tools
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B $(SANITIZED)/objects -G Ninja -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	  -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG="-O1 -g1" \
	  -DADAMW_KERNELS_CUDA=OFF -DADAMW_KERNELS_WERROR=ON -DADAMW_KERNELS_SANITIZE=address,undefined \
	  -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(abspath $(SANITIZED))/adamw_kernels
	PATH="$(abspath $(BIN)):$$PATH" cmake --build $(SANITIZED)/objects

wheel: $(VENV)/.tools
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip wheel -q --no-build-isolation --no-deps -w build/wheels .

clean:
	rm -rf build *.egg-info adamw_kernels/*.so $(VENV)/.built
