# Every target sets up what it needs: a Python 3.11 or newer is enough to begin with.
#   make PYTHON=/path/to/python3.12 …   another Python        make EXTRA=cpu|cuda12|cuda13|none …   another MLX build
#   make JOBS=1 test                    test processes (as many as processors, at most 4, if not given)
#   make CONSTRAINTS=.ci/lowest.txt …   versions to install, where others than the newest are wanted
VENV := .venv
PY := $(VENV)/bin/python
EXTRA ?=
JOBS ?= logical
export PYTHON CONSTRAINTS

.PHONY: help demo lab test nightly lowest newest tested canary lint format types audit bench manual setup clean

help: ## what can be made
	@awk -F ":.*## " '/^[a-z]+:.*## / {printf "%-10s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: setup ## run the quickstart notebook on real weights, here in the terminal
	@$(PY) notebooks/run.py notebooks/quickstart.ipynb build/quickstart.ipynb

lab: setup ## open the quickstart notebook in JupyterLab
	@$(PY) -m jupyterlab notebooks/quickstart.ipynb

# Dozens of kernels start in the tests: what is compiled once is read by the others, also where images forbid that.
test: lint types ## all checks: lint, types and every test
	@bash .ci/browser
	@PYTHONDONTWRITEBYTECODE= $(PY) -m pytest -n $(JOBS) --maxprocesses 4 --dist loadfile --no-loadscope-reorder

nightly: setup ## the long form of the checks that have one: random histories, faults, load, numerics (hours)
	@VM_MAGIC_NIGHTLY=1 $(PY) -m pytest -n 0 -m nightly --timeout 7200

lowest: ## all tests with the lowest versions that pyproject.toml admits, in an environment of their own (Python 3.11)
	@$(MAKE) --no-print-directory VENV=.venv-lowest CONSTRAINTS=.ci/lowest.txt setup tested

newest: ## all tests with the newest versions that they passed with, in an environment of their own
	@$(MAKE) --no-print-directory VENV=.venv-newest CONSTRAINTS=.ci/newest.txt setup tested

tested: canary
	@PYTHONDONTWRITEBYTECODE= $(PY) -m pytest -n $(JOBS) --maxprocesses 4 --dist loadfile --no-loadscope-reorder

canary: setup ## what other packages changed of that which we rely on without its being promised
	@$(PY) -m tests.canary

lint: setup ## ruff: rules and format
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

format: setup ## let ruff format and mend what it can
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

types: setup ## mypy, strict
	@$(PY) -m mypy

audit: setup ## known vulnerabilities of the installed dependencies, by pip-audit (needs the internet)
	@bash .ci/audit $(PY)

bench: setup ## speed side by side with mlx-lm: a table, and JSON in bench-results/
	@$(PY) -m tests.benchmarks

manual: setup ## the manual as web pages in build/manual: lessons, reference, the figures of make bench
	@$(PY) -m pip install --quiet --disable-pip-version-check -e ".[manual]"
	@$(PY) notebooks/build_manual.py

setup: ## the virtual environment, made once
	@bash .ci/setup $(VENV) $(EXTRA)

clean: ## remove what these targets made (not the model cache)
	rm -rf $(VENV) .venv-lowest .venv-newest build dist bench-results test-artefacts .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
