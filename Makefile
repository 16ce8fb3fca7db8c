# make demo       install, train a small language model and a reader of digits, measure: 3 minutes
# make test       install, run every test under each instruction set of this machine
# make bench      install, run the benchmarks             (BENCH="..." for its options)
# make dev        compile into the source tree, for working on it (see CONTRIBUTING.md)
# make sanitize   run the tests under AddressSanitizer and UndefinedBehaviorSanitizer
# make lint       check formatting and common mistakes
# make ptxas      compile the CUDA kernels for sm_80 and sm_90a: registers, spills, occupancy
# make format     put Python and C++ into the one format
# make wheel      build dist/statescan-*.whl
#
# Works in the virtual environment that is active, or else makes one in .venv.
# TORCH="torch==2.13.0" chooses what to install where there is no torch yet.

SHELL  := /bin/bash
PYTHON ?= python3
TORCH  ?=
BENCH  ?=
DEMO   ?=
DIGITS ?=
PYTEST ?= -n auto --maxprocesses 8

VENV := $(or $(VIRTUAL_ENV),$(CURDIR)/.venv)
PY   := $(VENV)/bin/python
PIP  := $(PY) -m pip --disable-pip-version-check
ISAS  = $$($(PY) -c 'import statescan; print(*statescan._C.supported_isas())')

# Threads that wait for each other sleep instead of spinning: where anything else is running, a step
# of the demo is five to fifteen times as fast. Not for benchmarks.
demo test sanitize: export OMP_WAIT_POLICY ?= passive

SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc python tools -type f \
             \( -name '*.py' -o -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \
                -o -name '*.cmake' \))

.PHONY: demo test bench dev sanitize lint ptxas format wheel
.DELETE_ON_ERROR:

demo: $(VENV)/.statescan $(VENV)/.statescan-examples
	@$(PY) examples/train_mamba_lm.py $(DEMO)
	@echo
	@$(PY) examples/classify_digits.py $(DIGITS)
	@echo
	@env -u OMP_WAIT_POLICY $(PY) -m statescan.bench --quick

OLDER := $(VENV)/older-transformers

test: $(VENV)/.statescan $(VENV)/.statescan-tests $(OLDER)/.installed
	@set -e; for isa in $(ISAS); do \
	  echo "== all tests, with the kernels for $$isa"; \
	  STATESCAN_ISA=$$isa $(PY) -m pytest $(PYTEST) tests --ignore=tests/simt; \
	done
	@echo "== transformers before 5.15, which chooses kernels in another way"
	@PYTHONPATH=$(OLDER) $(PY) -c 'import transformers as t; assert "$(OLDER)" in t.__file__'
	@PYTHONPATH=$(OLDER) $(PY) -m pytest $(PYTEST) tests/compat/test_transformers.py
	@echo "== the CUDA kernels, on the emulator"
	@$(PY) -m pytest $(PYTEST) tests/simt

bench: $(VENV)/.statescan
	@$(PY) -m statescan.bench $(BENCH)

wheel: $(VENV)/.torch
	@$(PIP) wheel --quiet --no-deps --wheel-dir dist .
	@ls -l dist/*.whl

# ---- working on it

CMAKE = PATH="$(VENV)/bin:$$PATH" cmake -G Ninja -Wno-dev -S . -DPython_EXECUTABLE=$(PY)

dev: $(VENV)/.statescan-dev
	@$(CMAKE) -B build/dev -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(CURDIR)/python/statescan
	@PATH="$(VENV)/bin:$$PATH" ninja -C build/dev
	@echo "now: export PYTHONPATH=$(CURDIR)/python"

# The Python process is not instrumented, so the sanitizers' libraries are loaded first; what torch
# and Python leave allocated at exit is not looked at. Modules call the same operators: not run here.
SANITIZE = build/sanitize
sanitize: $(VENV)/.statescan-dev
	@$(CMAKE) -B $(SANITIZE) -DSTATESCAN_SANITIZE=ON -DSTATESCAN_CUDA=OFF \
	  -DCMAKE_BUILD_TYPE=Release
	@PATH="$(VENV)/bin:$$PATH" ninja -C $(SANITIZE)
	@rm -rf $(SANITIZE)/package && mkdir $(SANITIZE)/package
	@cp -r python/statescan $(SANITIZE)/package && rm -f $(SANITIZE)/package/statescan/*.so
	@cp $(SANITIZE)/_C*.so $(SANITIZE)/package/statescan
	@LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  PYTHONPATH=$(SANITIZE)/package $(PY) -m pytest $(PYTEST) tests/test_*.py

CXX_FILES = $$(find csrc tests/simt -name "*.h" -o -name "*.cpp" -o -name "*.cu" -o -name "*.cuh")

lint: $(VENV)/.statescan-dev
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/clang-format --dry-run --Werror $(CXX_FILES)
	@$(PY) tests/simt/rules.py

ptxas: $(PY)
	@$(PY) tools/check_ptxas.py

format: $(VENV)/.statescan-dev
	@$(VENV)/bin/ruff check --fix-only .
	@$(VENV)/bin/ruff format .
	@$(VENV)/bin/clang-format -i $(CXX_FILES)

# ---- environments

$(PY):
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: $(PY)
	@$(PY) tools/install_torch.py $(TORCH)
	@touch $@

# Last installed from another tree: install again.
ifneq ($(shell cat $(VENV)/.statescan 2>/dev/null),$(CURDIR))
.PHONY: $(VENV)/.statescan
endif
$(VENV)/.statescan: $(VENV)/.torch $(SOURCES)
	@echo "compiling and installing statescan: three minutes on two cores, with CUDA some eight"
	@$(PIP) install --quiet .
	@echo $(CURDIR) > $@

$(VENV)/.statescan-examples: $(VENV)/.torch examples/requirements.txt
	@$(PIP) install --quiet -r examples/requirements.txt
	@touch $@

$(VENV)/.statescan-tests: $(VENV)/.torch tests/requirements.txt examples/requirements.txt
	@$(PIP) install --quiet -r tests/requirements.txt
	@touch $@

# Beside the present release, in a folder that only its own tests see.
$(OLDER)/.installed: $(PY) tests/older-transformers.txt
	@rm -rf $(OLDER)
	@$(PIP) install --quiet --target $(OLDER) -r tests/older-transformers.txt
	@touch $@

$(VENV)/.statescan-dev: $(VENV)/.torch tests/requirements.txt requirements-dev.txt
	@$(PIP) install --quiet -r requirements-dev.txt
	@touch $@
