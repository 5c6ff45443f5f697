PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PATHS := $(wildcard hf_lossless_lr tests examples studies)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-conformance test-portable test-timm test-oldest test-newest lint types format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## create .venv with the package and its development tools (PYTHON=... chooses the interpreter)

# The stamp is removed first and written last. An environment without one comes from a set-up that was interrupted,
# and is built anew; one with an older stamp is brought up to date in place.
$(STAMP): pyproject.toml constraints.txt
	@if [ -e $@ ]; then rm $@; else rm -rf $(VENV); fi
	@echo "setting up $(VENV) (a few minutes the first time)"
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup ## compress a small model, trained on the spot, and print the report
	@$(BIN)/hf-lossless-lr demo

# One worker for each core, with one thread each (tests/conftest.py sees to that). A file stays in one worker, which
# makes what its tests share once, in the order of tests/conftest.py. All tests run, those marked `slow` as well.
# Without -n, as in `pytest -k name`, there are no workers to wait for.
test: setup ## run the tests
	@$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

# The rows of one file go to all workers, each of which starts a process with stock Transformers.
test-conformance: setup ## run every architecture of the conformance suite (some minutes)
	@$(BIN)/python -m pytest tests/conformance --every-architecture -n auto --dist worksteal

test-portable: setup ## run the numerical tests as other processors would (a few minutes for each of some 15 settings)
	@$(BIN)/python tests/portable.py

# timm imports torchvision, which has to go with torch; both are pinned here, in an environment of their own.
TIMM := .venv-timm
$(TIMM)/.installed: pyproject.toml
	@rm -rf $(TIMM) && $(PYTHON) -m venv $(TIMM)
	@$(TIMM)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.14.1 torchvision==0.29.1
	@$(TIMM)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[timm,vision]' pytest
	@touch $@

test-timm: $(TIMM)/.installed ## test networks of timm in an environment of their own (several gigabytes the first time)
	@$(TIMM)/bin/python -m pytest tests/test_timm.py

# Both ends of the ranges in pyproject.toml. Of the tests, those of what other versions of the dependencies have broken:
# which layers there are, loading and saving, device maps, adapters, training; of the rest, one compression.
VERSIONED := tests/test_versions.py tests/checkpoint tests/layers tests/pipeline/test_compressor.py

# The oldest versions have no release for Python 3.12 and newer; torch 2.6 comes with CUDA libraries, and pyarrow 26
# wants a newer numpy. Left out is what needs newer extras, and what repeats or trains.
OLDEST := .venv-oldest
$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	@rm -rf $(OLDEST) && $(PYTHON) -m venv $(OLDEST)
	@$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	@$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt \
		-e '.[eval,peft,plots,vision]' 'pyarrow<26' 'pytest>=8' 'pytest-xdist>=3.7'
	@touch $@

test-oldest: $(OLDEST)/.installed ## test with the oldest versions of all dependencies (several gigabytes the first time)
	@$(OLDEST)/bin/python -m pytest -n auto --dist loadfile -m "not slow" $(VERSIONED)

# The torch of constraints.txt, and otherwise the newest of everything.
NEWEST := .venv-newest
$(NEWEST)/.installed: pyproject.toml constraints.txt
	@rm -rf $(NEWEST) && $(PYTHON) -m venv $(NEWEST)
	@$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep ^torch== constraints.txt)" -e '.[dev]'
	@touch $@

test-newest: $(NEWEST)/.installed ## test with the newest versions of all dependencies but torch
	@$(NEWEST)/bin/python -m pytest -n auto --dist loadfile -m "not slow" $(VERSIONED)

lint: setup ## check style and formatting
	@$(BIN)/ruff check $(PATHS)
	@$(BIN)/ruff format --check $(PATHS)

types: setup ## check the type annotations of the package
	@$(BIN)/mypy

format: setup ## rewrite the sources in the project's format
	@$(BIN)/ruff check --fix $(PATHS)
	@$(BIN)/ruff format $(PATHS)

clean: ## remove the environment, caches and build results
	rm -rf $(VENV) $(TIMM) $(OLDEST) $(NEWEST) build dist .mypy_cache .pytest_cache .ruff_cache
	find hf_lossless_lr tests examples studies -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
