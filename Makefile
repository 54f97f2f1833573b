PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MMPOSE := .venv-mmpose

.PHONY: help setup format check test test-slow test-mmpose mmpose mutants faults fuzz bench docs demo clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

setup: $(VENV)/installed  ## virtual environment with everything

$(VENV)/installed: pyproject.toml
	@echo "Installing torch and what tasks/ and the tests need into $(VENV): some gigabytes, some minutes, once."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[tasks,dev,loops]'
	@touch $@

format: setup  ## format and sort imports
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: setup  ## lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

test: setup  ## the test suite
	$(BIN)/python -m pytest -n 2

test-slow: setup  ## what takes minutes: 69 timm models through the fake-quant core
	$(BIN)/python -m pytest -m slow

mmpose: $(MMPOSE)/installed  ## mmpose 1.3.2 beside today's torch, in a virtual environment of its own

$(MMPOSE)/installed: pyproject.toml
	$(PYTHON) -m venv $(MMPOSE)
	$(MMPOSE)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[mmpose,tasks]' 'pytest>=8.2' pytest-xdist
	$(MMPOSE)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps mmpose==1.3.2
	$(MMPOSE)/bin/python -m arsam.integrations.mmpose_standins
	@touch $@

test-mmpose: mmpose  ## ARSAM inside OpenMMLab's loop, and agreement with mmpose
	$(MMPOSE)/bin/python -m pytest -m mmpose tests/arsam/integrations/test_mm*.py tests/tasks/pose

mutants: setup  ## break the optimizer in known ways; each must be killed by its test
	$(BIN)/python tests/mutants.py

faults: setup  ## kill training runs at random moments and fail their writes; each must end as if nothing had happened
	$(BIN)/python tests/faults.py

fuzz: setup  ## mutilated annotations, overrides, checkpoints and pictures, for SECONDS (60)
	$(BIN)/python tests/fuzz.py $(or $(SECONDS),60)

bench: setup  ## cost of a step
	$(BIN)/python tools/bench.py overhead

docs: setup  ## the API, from the docstrings: build/api/index.html
	$(BIN)/python -W error -m pdoc --docformat google --output-directory build/api arsam arsam.functional

PHOTOS := $(or $(ARSAM_DATA),data)/lspet

demo: setup  ## train a pose network on photographs, or on drawn people where data/lspet is missing, and evaluate it
	@if [ -d "$(PHOTOS)/train2017" ]; then data="task.root=$(PHOTOS) epochs=4 eval_every=4"; else data=--sample; fi; \
	echo "Training EfficientNet-Lite0 with ARSAM into runs/demo ($$data): some ten minutes on photographs, fewer on drawn people."; \
	$(BIN)/python tools/train.py configs/pose/lite0_arsam.py $$data --out runs/demo --overwrite && \
	echo "Evaluating its best checkpoint." && \
	$(BIN)/python tools/eval.py configs/pose/lite0_arsam.py $$data --checkpoint runs/demo/best.pt --out runs/demo-eval --overwrite && \
	echo "Poses, typical, best and worst: runs/demo-eval/predictions.png"

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) $(MMPOSE) build *.egg-info .pytest_cache .ruff_cache .hypothesis
