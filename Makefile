# Everything that a newcomer types. `make` alone lists the targets.
PYTHON ?= python3
LATEST ?=
TORCH ?= $(if $(LATEST),torch,torch==2.13.0)
CONFIG ?= demo
OUT ?=
STATS ?=
PHANTOMS ?=
ARGS ?=
JOBS ?= 2
CT_RATE ?=
TABLE ?=
SUPERVISION ?=
BENCH ?= default

VENV := .venv
# Relative: the checkout's own path may hold spaces, quotes or dollars.
BIN := $(VENV)/bin
# The versions that were tested, or with LATEST=1 the newest: each has its stamp, so a change installs again.
LOCK := launch/constraints.txt
STAMP := $(VENV)/.installed$(if $(LATEST),-latest)
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check $(if $(LATEST),--upgrade --upgrade-strategy eager,-c $(VENV)/constraints.txt)
# Files of tests that run side by side with threads for every core each wait for one another: three to five times as long.
ONE_THREAD := OMP_NUM_THREADS=1
# Tools of the environment come first.
export PATH := $(value CURDIR)/$(BIN):$(value PATH)

.DEFAULT_GOAL := help
.PHONY: help setup preprocess verify demo learn test test-slow bench docs clean

help: ## list the targets
	@echo "make TARGET [NAME=value …]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "Variables: PYTHON=$(PYTHON) (3.11 or newer), TORCH=$(TORCH) (installed first), LATEST=1 (the newest packages, not those that were tested), ARGS (for the command behind), JOBS=$(JOBS) (of the tests)"

setup: $(STAMP) ## make .venv and install the project into it (the other targets do this by themselves)
	@:

$(STAMP): pyproject.toml $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11 or missing: name a newer one with PYTHON=…" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing $(TORCH), then the project$(if $(LATEST), with the newest packages), into $(VENV) (some minutes the first time)"
	@grep -v '^torch==' $(LOCK) > $(VENV)/constraints.txt
	@$(PIP_INSTALL) "$(TORCH)"
	@$(PIP_INSTALL) -e ".[dev]" "$(TORCH)"
	@rm -f $(VENV)/.installed $(VENV)/.installed-latest
	@touch $@

preprocess: $(STAMP) ## shards of your own cases [TABLE=cases.csv], of a CT-RATE download [CT_RATE=folder], or of two real CTs and phantoms [PHANTOMS=320]
	@$(BIN)/python -m data_pipeline.preprocess --config "$(CONFIG)" $(if $(CT_RATE),--ct-rate "$(CT_RATE)") \
		$(if $(TABLE),--table "$(TABLE)") \
		$(if $(OUT),--out "$(OUT)") $(if $(PHANTOMS),--phantoms $(PHANTOMS)) $(ARGS)

verify: $(STAMP) ## read shards back and check every byte of them; OUT=folder or URL; STATS=folder for tables and pictures
	@$(BIN)/python -m data_pipeline.verify $(if $(OUT),"$(OUT)") --config "$(CONFIG)" $(if $(STATS),--stats "$(STATS)") $(ARGS)

demo: $(STAMP) ## all of it in ten minutes: shards, three phases on two processes, evaluation, two real CTs; targets and figures in runs/demo
	@$(BIN)/python -m launch.demo --config "$(CONFIG)" $(ARGS)

learn: $(STAMP) ## the demo with more cases and steps, a proof of learning: twenty minutes, targets and figures in runs/learn [SUPERVISION=ct-rate for labels and outlines like CT-RATE's]
	@$(BIN)/python -m launch.demo --config learn --strict $(if $(SUPERVISION),--supervision "$(SUPERVISION)") $(ARGS)

test: $(STAMP) ## lint, types and the quick tests, JOBS=2 files of them at a time
	@$(BIN)/python -m ruff check
	@$(BIN)/python -m ruff format --check --quiet || { echo "Some files are not formatted: run $(BIN)/python -m ruff format." >&2; exit 1; }
	@$(BIN)/python -m mypy
	@$(ONE_THREAD) $(BIN)/python -m pytest -m "not slow and not gpu" -n $(JOBS) --dist loadfile $(ARGS)

test-slow: $(STAMP) ## the tests that take minutes, JOBS=2 files of them at a time
	@$(ONE_THREAD) $(BIN)/python -m pytest -m "slow and not gpu" -n $(JOBS) --dist loadfile $(ARGS)

bench: $(STAMP) ## speed and memory in at most 10 minutes, to benchmarks/results [BENCH=full for all, BENCH=smallest to try it; ARGS="--sections loader"]
	@$(BIN)/python -m benchmarks.run --scale "$(BENCH)" $(ARGS)

docs: $(STAMP) ## the documentation as a site in build/docs/html; it runs the notebooks [ARGS=--without-outputs: it does not]
	@$(BIN)/python docs/build_site.py $(ARGS)

clean: ## remove runs, shards and caches (not .venv, not what was downloaded)
	@rm -rf runs data/shards build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
