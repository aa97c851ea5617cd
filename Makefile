# Each target does all of its own set-up in a virtual environment that it makes.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# pre-commit's hooks and accelerate's workers find the environment's own python.
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: demo test test-fast lint clean

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install --editable '.[test]'
	touch $@

# Threads that wait without spinning: as fast on a free machine, and 20 times faster on a busy one.
demo: $(READY)  ## RandLoRA, LoRA and full fine-tuning of a small CLIP, side by side
	GOMP_SPINCOUNT=3000 $(BIN)/python train_scripts/compare_clip.py --output-dir runs/demo

lint: $(READY)
	$(BIN)/pre-commit run --all-files

# One thread a worker: two workers with two threads each wait for one another on two cores.
test: lint  ## the whole suite, slow tests included
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

test-fast: $(READY)  ## the default tier, about a minute
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "not slow"

clean:
	rm -rf $(VENV) build dist *.egg-info runs
