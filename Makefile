PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# What an installation depends on. The rest of the tree is installed in place, so edits need no new one.
INSTALL_INPUTS := pyproject.toml setup.py constraints.txt $(wildcard csrc/*)

# Two processes of one thread each are faster than one of two threads.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: sample check docs test test-all bench clean

sample: $(VENV)/.installed
	$(BIN)/python -m ddim_fast.sample --compile --steps 20

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check ddim_fast kernels benchmarks tests examples setup.py
	$(BIN)/mypy

docs: $(VENV)/.installed-dev
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs

test: $(VENV)/.installed-dev
	$(PYTEST) -m "not slow"

test-all: $(VENV)/.installed-dev
	$(PYTEST)

bench: $(VENV)/.installed-dev
	$(BIN)/python -m pytest benchmarks/ --benchmark-only

$(VENV)/.installed: $(INSTALL_INPUTS) | $(BIN)/pip
	$(BIN)/python -m pip install -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(INSTALL_INPUTS) | $(BIN)/pip
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.installed

# pip is the last thing that venv puts there, so its presence says that the environment is whole.
$(BIN)/pip:
	@command -v $(PYTHON) > /dev/null || { echo "No $(PYTHON) on PATH: make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$$($(PYTHON) --version) is too old, ddim_fast needs 3.10 or newer: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ echo "Cannot create $(VENV). On Debian and Ubuntu: apt install python3-venv"; exit 1; }

# Without their stamps, the next target installs again what is removed here.
clean:
	rm -rf build dist *.egg-info ddim_fast/_native*.so $(VENV)/.installed $(VENV)/.installed-dev
	rm -rf .benchmarks .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -exec rm -rf {} +
