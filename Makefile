# One environment, named by the files that decide what is in it; every target that needs it makes it.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(shell cat pyproject.toml constraints.txt 2>/dev/null | sha256sum | cut -c1-16)
WORKSPACE ?= runs
# Floor of the share of lines of drorae/ and pipelines/ that the tests run, percent.
COVERAGE ?= 85
# Minutes of `make fuzz` for each reader.
MINUTES ?= 1
# Scenarios of `make chaos`, such as "worker node"; empty: all.
CHAOS_ONLY ?=
# What draws their moments and victims.
CHAOS_SEED ?= 0

export DO_NOT_TRACK := 1
export RAY_USAGE_STATS_ENABLED := 0
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export MLFLOW_DISABLE_TELEMETRY := true

.DEFAULT_GOAL := help
.PHONY: help setup assets demo lint format types test test-slow chaos fuzz rehearsal up down status docs check clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(firstword $(MAKEFILE_LIST)) | awk -F'\t' '{printf "  %-10s %s\n", $$1, $$2}'

setup: $(STAMP) ## Make the environment (about 6.6 GB)

$(STAMP):
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; set PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]' --constraint constraints.txt
	rm -f $(VENV)/.installed-*
	touch $@

assets: $(STAMP) ## Fetch and check data and pretrained networks of the smoke recipe
	$(BIN)/drorae assets fetch smoke

demo: assets ## Run the whole graph on this machine: raw photos to a measured generator
	$(BIN)/drorae run --recipe smoke --workspace $(WORKSPACE)

lint: $(STAMP) ## Style, formatting, types, import contracts, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/codespell drorae pipelines infra docker tests *.md Makefile

format: $(STAMP) ## Rewrite the sources in the house format
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

types: $(STAMP) ## Type check alone
	$(BIN)/pyright --pythonpath $(BIN)/python

test: assets ## All tests with coverage
	rm -f .coverage .coverage.*
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --cov --cov-report=term --cov-fail-under=$(COVERAGE)

test-slow: $(STAMP) ## Only the tests that start real servers
	$(BIN)/python -m pytest -m slow

chaos: $(STAMP) ## Kill and stop processes of a running stage; a table of what came of it
	$(BIN)/python -m tests.chaos $(CHAOS_FLAGS) --seed $(CHAOS_SEED) $(foreach name,$(CHAOS_ONLY),--only $(name))

fuzz: $(STAMP) ## Good and damaged sources to every reader; ends with 1 if a picture or label is lost
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES)

rehearsal: $(STAMP) ## The data plane at ImageNet's shape, over a capped network; a table of what it took
	$(BIN)/python -m tests.rehearsal

up: $(STAMP) ## Start Prefect, MLflow and Ray on this machine, and register the deployments
	$(BIN)/python infra/local/services.py up

down: ## Stop them all
	$(BIN)/python infra/local/services.py down

status: ## Show which of them run
	$(BIN)/python infra/local/services.py status

docs: $(STAMP) ## Print every field of the smoke recipe with meaning and source
	$(BIN)/drorae recipes show smoke

check: lint test ## What CI runs

clean: ## Remove caches and builds; outputs in runs/ stay
	rm -rf .pytest_cache .ruff_cache .import_linter_cache .coverage .coverage.* build dist *.egg-info
	find drorae pipelines tests infra -name __pycache__ -type d -prune -exec rm -rf {} +
