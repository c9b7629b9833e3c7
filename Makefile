# setup: the whole .venv | quickstart: SFT and GRPO on a laptop | view: its trajectories in a browser | demo: ask a
# policy in a browser | test | test-fast | bench | sidecar | lint | site: the docs | proto | requirements | clean
#   make quickstart SEED=1           another seed
#   make setup PYTHON=/path/python   another interpreter (default: python3.11, else python3)
#   make setup TPU=1 (or CUDA=1)     with the TPU (or CUDA) build of jax
#   make test ARGS="tests/agent -x"  arguments for pytest
#   make sidecar CHECKPOINT=sam2.1_hiera_large.pt DEVICE=cuda ADDRESS=127.0.0.1:50051   (no CHECKPOINT: GrabCut)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules
export PYTHONUNBUFFERED = 1

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
PY := $(VENV)/bin/python
SEED ?= 0
RUN := runs/quickstart
ARGS ?=
CHECKPOINT ?=
DEVICE ?= cpu
ADDRESS ?= 127.0.0.1:50051

# pyproject.toml lists every pin. One stamp per content of it: a changed pin installs again.
comma := ,
DEVICE_EXTRA := $(if $(TPU),$(comma)tpu)$(if $(CUDA),$(comma)cuda)
stamp = $(VENV)/.$(1)$(subst $(comma),-,$(DEVICE_EXTRA))-$(shell cksum < pyproject.toml | cut -d' ' -f1)
RUNTIME := $(call stamp,runtime)
FULL := $(call stamp,full)
WEB := $(call stamp,web)
pin = "$$(sed -n 's/.*"\($(1)==[^"]*\)".*/\1/p' pyproject.toml)"

.PHONY: help setup setup-runtime quickstart view demo test test-fast bench sidecar lint site proto requirements clean

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

setup: $(FULL)
setup-runtime: $(RUNTIME)

$(PY):
	@test -n "$(PYTHON)" && "$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { \
	  echo "error: Python 3.11, 3.12 or 3.13 is needed (found: $(or $(PYTHON),none))." >&2; \
	  echo "Install python3.11, or name one: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@echo "== creating $(VENV) with $(PYTHON)"
	@"$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "error: $(PYTHON) cannot make a virtual environment; on Debian and Ubuntu, install python3.11-venv" >&2; exit 1; }

$(RUNTIME): | $(PY)
	@echo "== installing rsagent-jax and what it needs (jax, flax, ...; no torch): about a minute"
	$(PY) -m pip install -e ".[demo$(DEVICE_EXTRA)]"
	@touch $@

$(WEB): | $(PY)
	@echo "== installing rsagent-jax, what it needs (jax, flax, ...; no torch) and Gradio: about a minute"
	$(PY) -m pip install --no-compile -e ".[demo,web$(DEVICE_EXTRA)]"  # Python compiles what is used, which is little
	@touch $@ $(RUNTIME)

# torch goes first and alone: everything after it then takes the build that is there. torchvision needs nothing else.
# sam2 compiles no CUDA kernel here and must see this torch while it builds, hence its flags.
$(FULL): | $(RUNTIME)
	@echo "== installing what the side-car and the tests need (torch, sam2, pytest, ...): a few minutes"
	$(PY) -m pip install $(call pin,torch) $(call pin,setuptools) $(call pin,wheel)
	$(PY) -m pip install --no-deps $(call pin,torchvision)
	SAM2_BUILD_CUDA=0 $(PY) -m pip install --no-build-isolation -e ".[demo,web,gcs,sidecar,docs,dev$(DEVICE_EXTRA)]"
	$(PY) -m pip check
	@touch $@ $(WEB)

# For speed on a CPU. glibc hands a large buffer back to the kernel after each use and page-faults it in again at the next,
# which halved the training rate measured on two cores; these keep the memory, in huge pages. One arena for all threads: what
# others free goes back to the kernel whatever is set, and memory grows for hundreds of steps. No effect outside glibc.
quickstart: export MALLOC_ARENA_MAX = 1
quickstart: export MALLOC_MMAP_MAX_ = 0
quickstart: export MALLOC_TRIM_THRESHOLD_ = 68719476736
quickstart: export MALLOC_TOP_PAD_ = 268435456
quickstart: export GLIBC_TUNABLES = glibc.malloc.hugetlb=1

quickstart: setup-runtime
	@if [ -e $(RUN) ]; then echo "== starting over: removing $(RUN)"; rm -rf $(RUN); fi
	$(PY) -m rsagent_jax.reproduce --config=configs/reproduce_quickstart.py --workdir=$(RUN) --config.seed=$(SEED)

view: setup-runtime
	$(PY) -m rsagent_jax.view $(RUN) $(ARGS)

# The policy of the quickstart, where there is one; else the one that comes with the package.
demo: $(WEB)
	@test -e $(RUN)/train/checkpoints/grpo || echo "== no $(RUN): the tiny policy of assets/ answers; make quickstart trains one"
	$(PY) -m rsagent_jax.demo $(addprefix --weights=,$(wildcard $(RUN)/train/checkpoints/grpo)) $(ARGS)

# All tests: two files at a time. ARGS: one process, as pytest's own options want it. test-fast: without the slow ones.
test: setup
	JAX_PLATFORMS=cpu $(PY) -m pytest $(or $(ARGS),-n 2 --dist loadfile)

test-fast: setup
	JAX_PLATFORMS=cpu $(PY) -m pytest -n 2 --dist loadfile -m "not slow" $(ARGS)

# Without soak.py and kill.py, which take an hour each and what the quickstart has trained.
bench: setup
	@for script in $(filter-out benchmarks/soak.py benchmarks/kill.py benchmarks/device.py,$(wildcard benchmarks/[a-z]*.py)); do \
	  echo "== $$script"; $(PY) "$$script" $(ARGS); done

# SAM 2 needs torch, GrabCut does not. ARGS are more of `python -m sam_bridge --help`.
sidecar: $(if $(CHECKPOINT),setup,setup-runtime)
ifeq ($(CHECKPOINT),)
	@echo "== no CHECKPOINT=FILE.pt given: the GrabCut back end, which needs no weights (docs/sidecar.md)"
	$(PY) -m sam_bridge --backend=grabcut --address=$(ADDRESS) $(ARGS)
else
	$(PY) -m sam_bridge --backend=sam2 --checkpoint=$(CHECKPOINT) --device=$(DEVICE) --address=$(ADDRESS) $(ARGS)
endif

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# Pages in site/, which open from disk; no network. make site ARGS=--site-dir=DIR: somewhere else.
site: export NO_MKDOCS_2_WARNING = 1
site: setup
	$(PY) -m mkdocs build --strict $(ARGS)

proto: setup
	$(PY) -m grpc_tools.protoc -I. --python_out=. sam_bridge/bridge.proto

requirements:
	python3 .ci/requirements.py

clean:  # caches only: .venv and runs/ stay
	rm -rf .pytest_cache .ruff_cache .hypothesis build dist site *.egg-info
	find . -path ./$(VENV) -prune -o -path ./runs -prune -o -name __pycache__ -type d -exec rm -rf {} +
