# SPDX-License-Identifier: Apache-2.0
# make demo   generate text with 16-bit, 4-bit and 2-bit caches      make test   all tests that this machine can run
# make bench  time kernels on a GPU: KERNELS=<row> BENCH='<arguments of benchmarks/decode.py>'
# make wheel  sdist and wheel into dist/     make lint     make install-test (isolated builds)     make clean
#
#   PYTHON=python3.12          the Python of .venv                 JOBS=2    parallel jobs
#   TORCH="torch==2.13.0 --index-url https://..."  or  TORCH=/path/to/torch.whl    instead of the pinned torch
#   BITDECODING_CUDA=auto|system|pypi|off    which CUDA compiler   KERNELS='pack_k4v4_*'    build only these kernels
#   DEMO=--quick               arguments of the demo               PRESET=dev    of CMakePresets.json
VENV := .venv
PYTHON ?= $(or $(shell cat $(VENV)/python.txt 2>/dev/null),python3)
TORCH ?= $(or $(shell cat $(VENV)/torch.txt 2>/dev/null),$(shell grep '^torch==' constraints.txt))
PRESET ?= dev
KERNELS ?= *
JOBS ?= $(shell nproc)
BUILD := build/$(PRESET)$(addprefix -,$(BITDECODING_CUDA))
BIN := $(abspath $(VENV))/bin
export PATH := $(BIN):$(PATH)
export BITDECODING_TOOLCHAIN_DIR ?= $(CURDIR)/build/toolchain
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: all demo test bench wheel install-test lint format clean build
all: build

demo: build
	$(BIN)/bitdecoding demo $(DEMO)

test: build
	ctest --test-dir $(BUILD) --output-on-failure --parallel $(JOBS) --label-exclude install
	$(BIN)/python -m pytest $(PYTEST)

# The one build tree that ctest, pytest and the module share; an unchanged tree compiles nothing.
build: $(VENV)/registered
	cmake --preset $(PRESET) -B $(BUILD) --log-level=WARNING -D Python_EXECUTABLE=$(BIN)/python \
	  -D BITDECODING_KERNELS='$(KERNELS)' $(addprefix -D BITDECODING_CUDA=,$(BITDECODING_CUDA))
	cmake --build $(BUILD) --parallel $(JOBS)
	@cmake --install $(BUILD) --component extension --prefix python >/dev/null

# In a tree without tests, so that one kernel is timed soon.
bench: $(VENV)/registered
	cmake -S . -B build/bench -G Ninja --log-level=WARNING -D BITDECODING_PYTHON=ON \
	  -D Python_EXECUTABLE=$(BIN)/python -D BITDECODING_KERNELS='$(KERNELS)'
	cmake --build build/bench --parallel $(JOBS)
	@cmake --install build/bench --component extension --prefix python >/dev/null
	$(BIN)/python benchmarks/decode.py --quick $(BENCH)

wheel: $(VENV)/installed
	$(BIN)/python -m build --outdir dist

install-test: build
	ctest --test-dir $(BUILD) --output-on-failure --label-regex install

sources = git ls-files -z -- $(1) ':!third_party'
lint: $(VENV)/installed
	$(call sources,'*.hpp' '*.cpp' '*.cuh' '*.cu') | xargs -0 $(BIN)/clang-format --dry-run --Werror
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/installed
	$(call sources,'*.hpp' '*.cpp' '*.cuh' '*.cu') | xargs -0 $(BIN)/clang-format -i
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Keeps .venv and the downloaded toolchain.
clean:
	find build -mindepth 1 -maxdepth 1 ! -name toolchain -exec rm -rf {} + 2>/dev/null || true
	rm -rf dist python/bitdecoding/_ext*

# .venv again when its Python, its torch or a pinned version is another. A torch that was asked for
# (torch.txt) is asked for again; otherwise the pin of constraints.txt counts.
ifneq ($(PYTHON) $(TORCH),$(shell cat $(VENV)/holds.txt 2>/dev/null))
.PHONY: $(VENV)/installed
endif
$(VENV)/installed: constraints.txt
	tools/prerequisites.sh $(PYTHON)
	rm -rf $(VENV) build/*/CMakeCache.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install $(TORCH)
	grep -v '^torch==' constraints.txt >$(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet --requirement $(VENV)/constraints.txt
	echo '$(PYTHON)' >$(VENV)/python.txt
	$(if $(filter file,$(origin TORCH)),,echo '$(TORCH)' >$(VENV)/torch.txt)
	echo '$(PYTHON) $(TORCH)' >$(VENV)/holds.txt
	touch $@

# Metadata, console script and a path to python/; CMake builds the module (see build).
$(VENV)/registered: $(VENV)/installed pyproject.toml include/bitdecoding/version.hpp
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable . \
	  -C wheel.cmake=false -C wheel.platlib=true -C editable.mode=inplace
	touch $@
