# make demo       install, train a small language model for a minute, generate, measure
# make test       install, run every test under each instruction set of this machine
# make bench      install, run the benchmarks        (BENCH="--op selective_scan" chooses)
# make dev        compile into the source tree, for working on it (see CONTRIBUTING.md)
# make sanitize   run the tests under AddressSanitizer and UndefinedBehaviorSanitizer
# make lint       check formatting and common mistakes
# make wheel      build dist/statescan-*.whl
#
# Works in the virtual environment that is active, or else makes one in .venv.
# TORCH="torch==2.13.0" says which torch to install where there is none.

SHELL  := /bin/bash
PYTHON ?= python3
TORCH  ?=
BENCH  ?=
DEMO   ?=
PYTEST ?= -q -n auto --maxprocesses 8

VENV := $(or $(VIRTUAL_ENV),$(CURDIR)/.venv)
PY   := $(VENV)/bin/python
PIP  := $(PY) -m pip --disable-pip-version-check install --quiet

SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc python tools -type f \
             -name '*.py' -o -name '*.h' -o -name '*.cpp' -o -name '*.cu')

.PHONY: demo test bench dev sanitize lint wheel clean
.DELETE_ON_ERROR:

demo: $(VENV)/.statescan
	$(PY) examples/train_mamba_lm.py $(DEMO)
	@echo
	$(PY) -m statescan.bench --quick

# -P and a directory of its own keep the source tree out: what was installed is what is tested.
test: $(VENV)/.statescan-test
	@set -e; for isa in $$($(PY) -m statescan isas); do \
	  echo "== the tests, with the kernels for $$isa"; \
	  STATESCAN_ISA=$$isa $(PY) -m pytest $(PYTEST) tests; \
	done

bench: $(VENV)/.statescan
	$(PY) -m statescan.bench $(BENCH)

wheel: $(VENV)/.torch
	$(PY) -m pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir dist .
	@ls -l dist/*.whl

# ---- environments

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: $(VENV)/bin/python
	@$(PY) tools/install_torch.py $(TORCH)
	@touch $@

# Installed from another tree: install again.
ifneq ($(shell cat $(VENV)/.statescan 2>/dev/null),$(CURDIR))
.PHONY: $(VENV)/.statescan
endif
$(VENV)/.statescan: $(VENV)/.torch $(SOURCES)
	@echo "compiling and installing statescan, a minute or two"
	@$(PIP) --force-reinstall --no-deps .
	@$(PIP) .
	@echo $(CURDIR) > $@

$(VENV)/.statescan-test: $(VENV)/.statescan
	@$(PIP) '.[test]'
	@touch $@
