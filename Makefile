# SPDX-License-Identifier: Apache-2.0
# make demo   generate text with 16-bit, 4-bit and 2-bit caches      make test   all tests that this machine can run
# make wheel  sdist and wheel into dist/     make lint     make install-test (isolated builds)     make clean
# make bench-kernel KERNEL=decode_sm90_k4v4_c_d128_n8    builds this kernel alone and times it; needs no .venv
#
#   PYTHON=python3.12          the Python of .venv                 JOBS=2    parallel jobs
#   TORCH="torch==2.13.0 --index-url https://..."  or  TORCH=/path/to/torch.whl    instead of the pinned torch
#   BITDECODING_CUDA=auto|system|pypi|off    which CUDA compiler   KERNELS='pack_k4v4_*'    build only these kernels
#   CASE="8x8x4@131072 0/0"    what bench-kernel times (benchmarks/README.md)
#   DEMO=--quick               arguments of the demo               PRESET=dev    of CMakePresets.json
VENV := .venv
PYTHON ?= $(or $(shell cat $(VENV)/python.txt 2>/dev/null),python3)
TORCH ?= $(or $(shell cat $(VENV)/torch.txt 2>/dev/null),$(shell grep '^torch==' constraints.txt))
PRESET ?= dev
KERNELS ?= *
CASE ?= 8x8x4@131072
JOBS ?= $(shell nproc)
BUILD := build/$(PRESET)$(addprefix -,$(BITDECODING_CUDA))
BIN := $(abspath $(VENV))/bin
export PATH := $(BIN):$(PATH)
export BITDECODING_TOOLCHAIN_DIR ?= $(CURDIR)/build/toolchain
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: all demo test bench-kernel wheel install-test lint format clean build
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

bench-kernel:
	@[ -n '$(KERNEL)' ] || { echo "KERNEL = ''; allowed: a decode kernel, as in decode_sm90_k4v4_c_d128_n8"; exit 2; }
	cmake --preset bench --log-level=WARNING -D BITDECODING_KERNELS='$(KERNEL)' \
	  $(addprefix -D BITDECODING_CUDA=,$(BITDECODING_CUDA))
	cmake --build build/bench --parallel $(JOBS) --target decode_kernel
	build/bench/benchmarks/decode_kernel $(KERNEL) $(CASE)

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
