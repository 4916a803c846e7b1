# Needs python3 (3.10 or newer), a C++ compiler and make; everything else is installed into .venv.
#
#   PYTHON   the Python to start from. If it has torch >= 2.10, such as a build for your GPU, that torch is used
#            (unless it lives in a virtual environment, which cannot be extended by another).
#   TORCH    what pip installs otherwise. For another build, such as one for CUDA 13.0:
#            make test TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cu130"
#   PYTEST   arguments for pytest, as in: make test PYTEST="tests/ops -x"
#
# The CUDA library is built where nvcc is found; ASGA_CUDA, TORCH_CUDA_ARCH_LIST and MAX_JOBS work as setup.py says.

PYTHON ?= python3
TORCH ?= torch==2.13.0
PYTEST ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
HAS_TORCH := import torch; raise SystemExit(torch.__version__ < "2.10")

SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
PYTHON_SOURCES := $(shell find asga bench kernels -name '*.py')
CXX_SOURCES := $(filter csrc/%,$(SOURCES))
# .venv/NAME.stamp says that the package is installed and its libraries are as new as their sources.
INSTALLED := $(addprefix $(VENV)/,build.stamp demo.stamp test.stamp)

SANITIZED := build/sanitized
# With the C++ library, whose exceptions it watches: Python itself has not loaded that one.
SANITIZER_RUNTIME = $(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libstdc++.so)

# Two goals at once would build in the same folders.
.NOTPARALLEL:
.PHONY: help demo test sanitize sanitize-cuda compute-sanitizer build lint format clean

help:  ## Show these lines.
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 15

demo: $(VENV)/demo.stamp  ## Search a policy on digits, carry it to other digits, print the table (about 6 minutes).
	$(BIN)/asga demo --out runs/demo-$$(date +%Y%m%d-%H%M%S)

# In two processes: most tests keep one core busy, and torch's threads would only wait for each other.
test: $(VENV)/test.stamp  ## Run the tests.
	$(BIN)/python -m pytest --numprocesses 2 $(PYTEST)

# From that folder Python finds the package built for it; the processes that tests start inherit all of this. Without
# its sanitizers' runtime the library would not load, which ASGA_BACKEND=cpu makes an error. ASGA_CPU_ISA=baseline
# (or avx2, avx512) chooses other loops than those for the widest vectors here.
sanitize: $(VENV)/sanitize.stamp  ## Run the tests of the operators under AddressSanitizer and UBSan.
	cd $(SANITIZED) && ASGA_BACKEND=cpu LD_PRELOAD="$(SANITIZER_RUNTIME)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	$(abspath $(BIN))/python -m pytest --capture=sys -c $(CURDIR)/pyproject.toml --rootdir $(CURDIR) \
	$(CURDIR)/tests/ops -k "not triton" $(PYTEST)

# Without torch's cache of memory, so that memcheck knows the end of every tensor: graphs cannot be captured then, and
# tensors of gigabytes would take hours.
sanitize-cuda: compute-sanitizer $(VENV)/test.stamp  ## Run the tests of the CUDA operators under compute-sanitizer (needs a GPU).
	for tool in memcheck racecheck; do \
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
	$(BIN)/python -m pytest tests/csrc/test_cuda_ops.py tests/csrc/test_cuda_sam.py \
	-k "not captured and not 2_to_31 and not triton" $(PYTEST) || exit 1; done

compute-sanitizer:
	@command -v compute-sanitizer > /dev/null || \
	{ echo "compute-sanitizer is not on PATH; it comes with the CUDA toolkit" >&2; exit 1; }
	@nvidia-smi --list-gpus 2> /dev/null | grep -q GPU || \
	{ echo "nvidia-smi finds no GPU; compute-sanitizer needs one" >&2; exit 1; }

build: $(VENV)/build.stamp  ## Install the package into .venv in editable mode, compiled libraries included.

lint: $(VENV)/lint.stamp  ## Check style and formatting.
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

format: $(VENV)/lint.stamp  ## Format the sources in place.
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_SOURCES)

clean:  ## Remove the environment and everything built. Runs are kept.
	rm -rf $(VENV) build dist *.egg-info asga/*.so .pytest_cache .ruff_cache .hypothesis .benchmarks
	find asga kernels tests bench -name __pycache__ -prune -exec rm -rf {} +

# A copy of the package, so that the library in use is not replaced.
$(VENV)/sanitize.stamp: $(VENV)/test.stamp $(PYTHON_SOURCES)
	@echo "Compiling with AddressSanitizer and UBSan into $(SANITIZED)"
	@rm -rf $(SANITIZED)
	@CXX="$(CXX)" ASGA_SANITIZE=1 ASGA_CPU=force ASGA_CUDA=skip \
	$(PIP) install --no-build-isolation --no-deps --target $(SANITIZED) .
	@touch $@

$(VENV)/demo.stamp: EXTRAS := [search,report]
$(VENV)/test.stamp: EXTRAS := [test]
$(INSTALLED): $(VENV)/python.stamp $(SOURCES)
	@echo "Compiling and installing asga$(EXTRAS)"
	@$(PIP) install --no-build-isolation -e ".$(EXTRAS)"
	@touch $@

# Formatters change their minds from version to version, so these are pinned.
$(VENV)/lint.stamp: $(VENV)/python.stamp
	@echo "Installing ruff and clang-format"
	@$(PIP) install ruff==0.17.6 clang-format==23.1.5
	@touch $@

$(VENV)/python.stamp:
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@if $(PYTHON) -c '$(HAS_TORCH)' 2>/dev/null; then site=--system-site-packages; fi; \
	$(PYTHON) -m venv --clear $$site $(VENV)
	@if $(BIN)/python -c '$(HAS_TORCH)' 2>/dev/null; then echo "Using the torch of $(PYTHON)"; \
	else echo "Installing $(TORCH)"; $(PIP) install $(TORCH); fi
	@echo "Installing what the build needs"
	@$(PIP) install "setuptools>=77" wheel ninja numpy
	@touch $@
