# `make simulate` and `make test` need nothing but Python 3.11 or newer with venv; everything goes into .venv.
PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check  # errors alone are worth a line
INSTALLED := .venv/.installed
INSTALLED_DEV := .venv/.installed-dev
MOST := -m "not slow" -n logical --maxprocesses 8 --dist worksteal  # of the tests: `slow` marks the others

.DEFAULT_GOAL := help
.PHONY: help simulate audit gate gateway faults soak locks smoke-aarch64 test coverage test-slow format clean

help:  ## list what there is to make
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo '  make simulate ARGS="rounds=3 seed=1"       any key of conf/simulate.yaml'
	@echo '  make simulate PYTHON=python3.12            another interpreter (on a fresh .venv)'
	@echo '  make simulate TORCH="torch --index-url …"  PyTorch from elsewhere, e.g. its CPU wheels'

simulate: $(INSTALLED)  ## a whole federation on this machine, with a report (ARGS="key=value …")
	@$(BIN)/python -m simulations.run $(ARGS)

audit: $(INSTALLED)  ## attack what privacy promises, and leave a page (ARGS="'runs=[DIR,DIR]'": those runs)
	@$(BIN)/python -m simulations.audit.run $(ARGS)

gate: $(INSTALLED)  ## 20,000 malicious messages: what they cost, and whether one comes in
	@$(BIN)/python -m bench.robustness.gate $(ARGS)

gateway: $(INSTALLED)  ## 20,000 hostile calls at a server with three honest devices: what becomes of their rounds
	@$(BIN)/python -m bench.robustness.gateway $(ARGS)

faults: $(INSTALLED)  ## what happens to real devices, done to a federation of processes (root, Linux; hours; ARGS="--jobs 8" on many cores)
	@$(BIN)/python -m bench.reliability.faults $(ARGS)

soak: $(INSTALLED)  ## 500 rounds in which devices join, leave and die
	@$(BIN)/python -m bench.reliability.soak $(ARGS)

test: $(INSTALLED_DEV)  ## lint, format, types, and all tests but the slow ones
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(MOST)

coverage: $(INSTALLED_DEV)  ## what those tests reach, in half as much time again
	$(BIN)/python -m pytest $(MOST) --cov

test-slow: $(INSTALLED_DEV)  ## the slow tests
	$(BIN)/python -m pytest -m slow

locks: $(INSTALLED_DEV)  ## lock what a server and a device install, as .venv holds it
	@deploy/locks/lock.sh

ROOT ?= outputs/arm64
smoke-aarch64: $(INSTALLED)  ## two private steps on an emulated Pi 4, beside this machine's (as root; ROOT=FOLDER for its Debian)
	@deploy/smoke/root.sh $(ROOT)
	@$(BIN)/python -m bench.reliability.aarch64 --root $(ROOT)

format: $(INSTALLED_DEV)  ## mend format and what ruff can mend by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv and what tools and builds left; your outputs stay
	rm -rf .venv build dist .coverage .mypy_cache .ruff_cache .pytest_cache .hypothesis

# PyTorch comes first and is then held where it is: resolved along with the rest, it may turn into a CUDA build of
# several gigabytes.
$(INSTALLED): pyproject.toml
	@echo "Installing into .venv (once, about two minutes; more where PyTorch has to be downloaded) …"
	@$(PYTHON) -c 'import sys; sys.exit("Anther needs Python 3.11 to 3.13" if not (3, 11) <= sys.version_info < (3, 14) else 0)'
	@$(PYTHON) -m venv .venv
	@$(PIP) $(TORCH)
	@$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > .venv/held.txt
	@$(PIP) --constraint .venv/held.txt --editable .
	@touch $@

$(INSTALLED_DEV): $(INSTALLED)
	@echo "Installing what the tests need (once, under a minute) …"
	@$(PIP) --constraint .venv/held.txt --editable '.[dev]'
	@touch $@
