# Both targets make .venv and install everything first; they work in a fresh clone with Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
CONFIG ?= configs/embedded.yaml
BIN := $(VENV)/bin
# Every accelerator there is; without one, as many processes as there are cores, at most two.
RANKS ?= $(shell $(BIN)/python -c 'import os, torch; print(torch.accelerator.device_count() or min(2, os.cpu_count()))')

.PHONY: pretrain finetune test test-slow test-long faults check setup

pretrain: setup
	$(BIN)/python launcher/prepare.py --config $(CONFIG)
	$(BIN)/deepspeed --quiet --num_accelerators $(RANKS) launcher/pretrain.py --config $(CONFIG)

# Takes the result of `make pretrain`, or makes it first.
finetune: pretrain
	$(BIN)/python launcher/make_examples.py
	$(BIN)/deepspeed --quiet --num_accelerators $(RANKS) launcher/finetune.py --config configs/finetune/classify.yaml
	$(BIN)/python launcher/evaluate.py runs/embedded-classify
	if test -e exports/embedded-classify; then echo 'exports/embedded-classify is there; remove it to have it made again'; else $(BIN)/python launcher/export.py runs/embedded-classify --output exports/embedded-classify; fi

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow' -rs

test-slow: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'slow and not long' -rs

# What .ci/run leaves out, as it has an hour.
test-long: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long -rs

# What a run must survive, each injected for real; ends with a table of the results.
faults: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m fault

check: setup
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy

setup: $(VENV)/ready

# torch first: what depends on it must find it there, or pip may bring another build of it.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@
