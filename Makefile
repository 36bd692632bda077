# `make demo` and `make test` need Python >= 3.11, gcc and git; they set up everything else in .venv.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# The repository's folders must not become top-level modules (`kernels` belongs to somebody else).
export PYTHONSAFEPATH := 1
# Where there is no torch to reuse and no NVIDIA GPU. It may hold options of pip as well.
export TORCH ?= torch==2.13.0

BIN := .venv/bin
# Test files that run side by side. Many of them start processes of their own: more than two gain little.
WORKERS ?= 2
SIDE_BY_SIDE = -n $(WORKERS) --dist loadfile
HOUSES := traces planner simulator kernels runtime
STAMP := .venv/.stamp
SITE_STAMP := .venv/.site-stamp

.PHONY: help setup demo test test-slow test-examples test-many-ranks test-gpu soak lint format docs site map measured package clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP)  ## .venv with everything (also done by the targets below)

$(STAMP): pyproject.toml .ci/setup
	@EXTRAS=$${EXTRAS:-gpu,dev,examples} .ci/setup

demo: $(STAMP)  ## the whole road on this machine, no GPU needed: see demo-out/report.html
	@$(BIN)/sparsering demo

test: $(STAMP)  ## all tests that need no GPU, but for the next ones
	$(BIN)/pytest -m "not slow and not gpu and not many_ranks and not examples and not soak" $(SIDE_BY_SIDE) --durations=15

test-slow: $(STAMP)  ## those that take more than ten seconds each: whole runs, interrupted ones, the demo, the documents
	$(BIN)/pytest -m "slow and not gpu and not many_ranks and not examples and not soak" --durations=15

test-examples: $(STAMP)  ## the README's script, examples/ and launchers, as users start them: two minutes
	$(BIN)/pytest -m examples

test-many-ranks: $(STAMP)  ## 32 processes on this machine: minutes, 12 GB
	$(BIN)/pytest -m many_ranks

test-gpu: $(STAMP)  ## the tests that need NVIDIA GPUs
	$(BIN)/pytest -m gpu --durations=15

soak: $(STAMP)  ## 2 hours of random configurations, 50,000 hostile files a format, 700 kills (SOAK_HOURS, SOAK_EXAMPLES, SOAK_KILLS, SOAK_PARTS)
	$(BIN)/python -m sparsering.benchmarks.soak --hours $${SOAK_HOURS:-2}
	$(BIN)/pytest -m soak --durations=0

lint: $(SITE_STAMP)  ## ruff, pyright, import direction
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/pytest -q tests/house/test_imports.py

format: $(STAMP)  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(STAMP) map measured  ## rewrite all that is generated in docs/
	@$(BIN)/python docs/write_registries.py
	@$(BIN)/python docs/write_figures.py
	@$(BIN)/python docs/write_settings.py
	@$(BIN)/python docs/write_support.py
	@$(BIN)/python docs/write_worked_mask.py
	@python3 docs/write_includes.py

site: $(SITE_STAMP)  ## the documentation as a web site in site/; a broken link or a page nobody finds fails
	@rm -rf build/api && mkdir -p build/api/sparsering
	@cp -R __init__.py $(HOUSES) build/api/sparsering/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(SITE_STAMP): $(STAMP)
	@$(BIN)/python -c 'import material, mkdocstrings_handlers.python' 2>/dev/null \
		|| $(BIN)/python -m pip install --quiet --editable '.[docs]'
	@touch $@

map:  ## rewrite the map of folders in docs/architecture.md
	@python3 docs/write_map.py

measured:  ## rewrite docs/measured/ from benchmarks/results/
	@python3 docs/write_measured.py
	@python3 docs/write_learning.py

package: $(STAMP)  ## wheel and source distribution into dist/
	$(BIN)/python -m pip install --quiet build
	$(BIN)/python -m build

clean:  ## remove everything that make made
	rm -rf .venv .typings build dist demo-out site *.egg-info
