# The newcomer's door. It needs a Linux machine with Python >= 3.10 and a C++20 compiler; the rest comes from pip. (Debian and
# Ubuntu split Python: apt install python3-venv python3-dev g++ make.)
#
#   make demo       .venv with the package, then `rnp demo`        make test       C++ tests (ctest), then pytest
#   make bench      .venv with the rivals too, then `rnp bench`: build/bench/index.html (well over half an hour)
#   make lint       ruff and clang-format, changing nothing        make sanitize   the C++ tests under ASan and UBSan
#   make proof      no clock involved: multiply-adds counted, and instructions under valgrind against the committed budget
#   make wheel      build/wheel/*.whl, built in isolation          make clean      removes .venv and everything built
#
# Variables: PYTHON (which Python makes .venv), VENV, MAX_JOBS, RNP_CUDA, RNP_CUDA_ARCHS, ARGS (for rnp demo, rnp bench or pytest).
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BUILD := build
STAMPS := $(VENV)/.stamps

# One small torch for the environment and for pip's isolated builds (older pips read the first variable in both places).
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Python compiles a module when it is first imported: half a minute less for every torch that pip installs, one of which is
# only there for its headers.
export PIP_COMPILE := 0
# And keeps what it compiled, or the dozens of processes that tests start compile torch again, 10 s of each.
export PYTHONDONTWRITEBYTECODE :=
PIP := $(VENV)/bin/python -m pip -qq --no-input

# Whatever ends up in the wheel: when one of these changes, it is built again.
SOURCES := $(shell find csrc cmake rnp_kernels python -type f ! -name '*.so' ! -name '*.pyc' ! -path '*.egg-info/*') \
           pyproject.toml setup.py CMakeLists.txt MANIFEST.in README.md LICENSE constraints.txt
CPP_SOURCES := $(shell find csrc bench -name '*.h' -o -name '*.cpp' -o -name '*.cu')

.PHONY: help demo test bench cpp-build ctest pytest lint sanitize proof count-tests instructions record-instructions wheel clean
help:
	@sed -n '4,12s/^#//p' Makefile

demo: $(STAMPS)/demo
	@echo "== rnp demo $(ARGS)"
	$(VENV)/bin/rnp demo $(ARGS)

test: ctest pytest

bench: $(STAMPS)/bench
	@echo "== rnp bench $(ARGS)"
	$(VENV)/bin/rnp bench --out $(BUILD)/bench $(ARGS)

# ---- .venv --------------------

$(STAMPS)/venv:
	@echo "== creating $(VENV)"
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed; set PYTHON=")'
	$(PYTHON) -c 'import os, sys, sysconfig as s; h = s.get_paths()["include"] + "/Python.h"; \
	  sys.exit(not os.path.isfile(h) and h + " is missing; Debian and Ubuntu: python3-dev, Fedora: python3-devel")'
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

# The wheel is built in an isolated environment, once, and then installed with one extra or the other. Stale modules in
# build/lib* would end up in it, hence the rm; objects of unchanged sources stay.
$(STAMPS)/wheel: $(STAMPS)/venv $(SOURCES)
	@echo "== building the package in isolation (some minutes; compiler output only if it fails)"
	rm -rf $(BUILD)/lib* $(BUILD)/bdist* $(BUILD)/wheel
	$(PIP) wheel --no-deps --wheel-dir $(BUILD)/wheel .
	@touch $@

# The dependencies first, in one resolution; then the package itself, which pip would keep where the version is unchanged.
$(STAMPS)/demo: $(STAMPS)/wheel
	@echo "== installing rnp-kernels[demo] into $(VENV)"
	$(PIP) install "$$(ls $(BUILD)/wheel/*.whl)[demo]"
	$(PIP) install --force-reinstall --no-deps $(BUILD)/wheel/*.whl
	@touch $@

$(STAMPS)/test: $(STAMPS)/wheel
	@echo "== installing rnp-kernels[test] into $(VENV)"
	$(PIP) install "$$(ls $(BUILD)/wheel/*.whl)[test]"
	$(PIP) install --force-reinstall --no-deps $(BUILD)/wheel/*.whl
	@touch $@ $(STAMPS)/demo

$(STAMPS)/bench: $(STAMPS)/wheel
	@echo "== installing rnp-kernels[bench] into $(VENV)"
	$(PIP) install "$$(ls $(BUILD)/wheel/*.whl)[bench]"
	$(PIP) install --force-reinstall --no-deps $(BUILD)/wheel/*.whl
	@touch $@

# All that the C++ tests need; the packaging tests configure with it too.
$(STAMPS)/cmake: $(STAMPS)/venv
	@echo "== installing cmake and ninja into $(VENV)"
	$(PIP) install "cmake>=3.24" ninja
	@touch $@

$(STAMPS)/lint: $(STAMPS)/venv pyproject.toml
	@echo "== installing ruff and clang-format into $(VENV)"
	$(PIP) install $$(sed -nE 's/.*"(ruff==[^"]+)".*"(clang-format==[^"]+)".*/\1 \2/p' pyproject.toml)
	@touch $@

# ---- tests --------------------

CMAKE_CONFIGURE = $(VENV)/bin/cmake -S . -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(VENV)/bin/ninja -DRNP_BUILD_EXTENSION=OFF
CMAKE_BUILD = $(VENV)/bin/cmake --build $(1) --parallel $${MAX_JOBS:-$$(nproc)}

cpp-build: $(STAMPS)/cmake
	@echo "== building the C++ tests"
	$(CMAKE_CONFIGURE) -B $(BUILD)/cpp-tests > /dev/null
	$(call CMAKE_BUILD,$(BUILD)/cpp-tests)

ctest: cpp-build
	@echo "== C++ tests"
	$(VENV)/bin/ctest --test-dir $(BUILD)/cpp-tests --parallel 2 --output-on-failure --no-tests=error

# Two processes: most tests keep one core busy. A file's tests stay together, for what they compile once. Both have OpenMP
# threads: where those wait by spinning, they take the other's cores (a grouped conv2d of 4 ms took 2 s).
pytest: $(STAMPS)/test $(STAMPS)/cmake
	@echo "== pytest $(ARGS)"
	OMP_WAIT_POLICY=passive $(VENV)/bin/pytest -n 2 --dist loadfile $(ARGS)

sanitize: $(STAMPS)/cmake
	@echo "== C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	$(CMAKE_CONFIGURE) -B $(BUILD)/sanitize -DRNP_SANITIZE=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo > /dev/null
	$(call CMAKE_BUILD,$(BUILD)/sanitize)
	UBSAN_OPTIONS=print_stacktrace=1 $(VENV)/bin/ctest --test-dir $(BUILD)/sanitize --parallel 2 --output-on-failure --no-tests=error

# What can be proved of speed without a clock. The third proof, that no kernel loop spills, is a test of pytest's.
proof: count-tests instructions

count-tests: $(STAMPS)/cmake
	@echo "== multiply-adds, counted by an instrumented build"
	$(CMAKE_CONFIGURE) -B $(BUILD)/count -DRNP_COUNT_FMAS=ON -DCMAKE_CXX_FLAGS_RELEASE=-O1 > /dev/null
	$(call CMAKE_BUILD,$(BUILD)/count) --target rnp_count_tests
	$(BUILD)/count/rnp_count_tests

# Skipped, with the reason, where valgrind is not installed; RNP_REQUIRE_PROOF=1 makes that a failure.
instructions record-instructions: cpp-build
	@echo "== instructions of every kernel, under callgrind"
	$(VENV)/bin/python tests/proof/instructions.py $(BUILD)/cpp-tests/rnp_instructions $(if $(findstring record,$@),--record)

# ---- the rest --------------------

wheel: $(STAMPS)/wheel
	@ls -l $(BUILD)/wheel/*.whl

lint: $(STAMPS)/lint
	@echo "== ruff, clang-format"
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP_SOURCES)

clean:
	rm -rf $(VENV) $(BUILD) dist *.egg-info python/*.egg-info
