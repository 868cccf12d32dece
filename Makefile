# Straightway needs Python 3.11 or newer, make and the package index; everything else is installed into .venv.
#
#   PYTHON=python3.12        another Python to make .venv from
#   PIP_ARGS="..."           more arguments for pip, for example PyTorch's CPU build where the default one is CUDA:
#                            PIP_ARGS="--extra-index-url URL", with the URL that PyTorch's "Get started" page
#                            gives for pip and CPU
#   ARGS="..."               more arguments for pytest (make test) or for the benchmarks (make bench)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test bench check format clean

help: ## list what make can do
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 14

demo: $(VENV)/.all ## train on real data, measure the run, write runs/demo/report.html (a few minutes)
	rm -rf $(DEMO)/run.zarr
	$(BIN)/capture train --config pipelines/demo/demo.toml --out $(DEMO)/run.zarr
	$(BIN)/analyze compute $(DEMO)/run.zarr --out $(DEMO)/table.parquet
	$(BIN)/analyze report $(DEMO)/run.zarr --out $(DEMO)/report.html
	@echo "The report is $(CURDIR)/$(DEMO)/report.html"

test: $(VENV)/.dev ## run every test
	$(BIN)/python -m pytest $(ARGS)

bench: $(VENV)/.dev ## run the benchmarks; one JSON object per line on stdout
	@$(BIN)/python tests/benchmarks/run.py $(ARGS)

check: $(VENV)/.dev ## lint, formatting, strict types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict capture analyze
	$(BIN)/lint-imports

format: $(VENV)/.dev ## format the code and sort its imports
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

clean: ## remove .venv and caches; runs/ and data/ stay
	rm -rf $(VENV) build dist *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp per set of packages: installed once, and again when the project's requirements change. The demo does
# without the tools of development; where those are installed already, it uses what is there.

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 14) else "Straightway needs \
	Python 3.11 to 3.13, and this is " + sys.version.split()[0] + "; name another with make PYTHON=...")'
	@echo "making $(VENV) with $(PYTHON)" >&2
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.all: pyproject.toml constraints.txt | $(VENV)/.created
	@echo "installing straightway[all] into $(VENV)" >&2
	@$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e '.[all]' >&2
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/.created
	@echo "installing straightway[dev] into $(VENV)" >&2
	@$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e '.[dev]' >&2
	@touch $(VENV)/.all $@
