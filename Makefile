# Every target that needs .venv sets it up first; a set-up that is still good costs nothing.
.DEFAULT_GOAL := help
.PHONY: help setup demo test e2e lint types bench gpu clean
ARGS ?=
# An interpreter to use as it is, instead of .venv (for machines that bring their own torch).
GPU_PYTHON ?=
RUN := .venv/bin/python
ifneq ($(filter-out 0,$(VARLEN_SFT_NO_EXTENSION)),)
export VARLEN_SFT_DISABLE_EXTENSION := 1
endif

help:
	@echo 'varlen_sft: padding-free supervised fine-tuning. Nothing needs to be installed first:'
	@echo 'each target makes .venv (about 2.5 GB) when it is missing or out of date.'
	@echo
	@echo '  make demo     see it work: a real small model, packed against padded'
	@echo '  make test     the tests                    make test ARGS="-k rope -n 2"'
	@echo '  make e2e      the tests that take minutes'
	@echo '  make bench    all benchmarks on this machine; JSON in benchmarks/results'
	@echo '  make gpu      GPU tests and benchmarks     make gpu GPU_PYTHON=python3  (not .venv)'
	@echo '  make lint     ruff: rules and format       make types   mypy'
	@echo '  make setup    only make .venv              make setup PYTHON=python3.12  (for a new one)'
	@echo '  make clean    remove build products and caches (.venv stays)'
	@echo
	@echo 'No C++ compiler? VARLEN_SFT_NO_EXTENSION=1 make demo    (slower on a CPU)'

setup:
	@bash scripts/bootstrap.sh

demo: setup
	@.venv/bin/varlen-sft demo $(ARGS)

test: setup
	$(RUN) -m pytest $(ARGS)

e2e: setup
	$(RUN) -m pytest -m e2e $(ARGS)

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: setup
	$(RUN) -m mypy

# Op benchmarks under pytest-benchmark, then the script tables; one that needs a GPU says so.
BENCHMARKS := $(sort $(wildcard benchmarks/bench_*.py)) $(wildcard benchmarks/traffic.py)

bench: setup
	mkdir -p benchmarks/results
	$(RUN) -m pytest benchmarks --benchmark-only \
	  --benchmark-json=benchmarks/results/ops.json $(ARGS)
	set -e; for script in $(BENCHMARKS); do $(RUN) "$$script"; done

# Only files with GPU tests are collected: such a machine may lack what the others import.
gpu: RUN := $(or $(GPU_PYTHON),$(RUN))
gpu: $(if $(GPU_PYTHON),,setup)
	@$(RUN) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make gpu: torch " \
	  + torch.__version__ + " finds no CUDA device here, so there is nothing to run.")'
	$(RUN) -m pytest -m gpu -p no:benchmark $$(grep -rl --include='test_*.py' 'mark\.gpu' tests) $(ARGS)
	PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(RUN) benchmarks/bench_gpu.py
	PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(RUN) benchmarks/bench_gpu_step.py

clean:
	rm -rf build dist *.egg-info varlen_sft/_C.so
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
