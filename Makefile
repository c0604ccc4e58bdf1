# `make simulate` and `make test` need only Python 3.11 or newer with venv; everything is installed into .venv.
PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check  # print only errors
INSTALLED := .venv/.installed
INSTALLED_DEV := .venv/.installed-dev
WORKERS := -n logical --maxprocesses 8 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help simulate audit gate gateway faults soak locks smoke-aarch64 test test-fast test-stress coverage format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo '  make simulate ARGS="rounds=3 seed=1"       any key of conf/simulate.yaml'
	@echo '  make simulate PYTHON=python3.12            another interpreter (on a fresh .venv)'
	@echo '  make simulate TORCH="torch --index-url …"  PyTorch from elsewhere, e.g. its CPU wheels'

simulate: $(INSTALLED)  ## run a whole federation on this machine, with a report (ARGS="key=value …")
	@$(BIN)/python -m anther simulate $(ARGS)

audit: $(INSTALLED)  ## attack the promises of privacy, with a report (ARGS="'runs=[DIR,DIR]'" attacks finished runs)
	@$(BIN)/python -m anther audit $(ARGS)

gate: $(INSTALLED)  ## measure the cost and acceptance of 20,000 malicious messages
	@$(BIN)/python -m anther bench gate $(ARGS)

gateway: $(INSTALLED)  ## attack a server with 20,000 hostile calls while three honest devices train
	@$(BIN)/python -m anther bench gateway $(ARGS)

faults: $(INSTALLED)  ## inject real faults into a federation of processes (root, Linux; hours; ARGS="--jobs 8" on many cores)
	@$(BIN)/python -m anther bench faults $(ARGS)

soak: $(INSTALLED)  ## run 500 rounds in which devices join, leave and die
	@$(BIN)/python -m anther bench soak $(ARGS)

test-fast: $(INSTALLED_DEV)  ## run the unit tests
	$(BIN)/python -m pytest -m unit $(WORKERS)

test: $(INSTALLED_DEV)  ## check lint, format and types, and run the unit and integration tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers auto
	$(BIN)/python -m pytest -m "not stress" $(WORKERS)

coverage: $(INSTALLED_DEV)  ## measure the coverage of those tests, in half as much time again
	$(BIN)/python -m pytest -m "not stress" $(WORKERS) --cov

test-stress: $(INSTALLED_DEV)  ## run the stress tests, and the property tests with ten times as many examples
	$(BIN)/python -m pytest -m "stress or hypothesis" --hypothesis-profile stress $(WORKERS)

locks: $(INSTALLED_DEV)  ## lock the versions that servers and devices install, as in .venv
	@deploy/locks/lock.sh

ROOT ?= outputs/arm64
smoke-aarch64: $(INSTALLED)  ## compare two private steps on an emulated Pi 4 with this machine (as root; ROOT=FOLDER for its Debian)
	@deploy/smoke/root.sh $(ROOT)
	@$(BIN)/python -m anther bench aarch64 --root $(ROOT)

format: $(INSTALLED_DEV)  ## format, and apply ruff's fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv and files of tools and builds; your outputs stay
	rm -rf .venv build dist .coverage .mypy_cache .ruff_cache .pytest_cache .hypothesis

# PyTorch is installed first and then pinned: resolved with the other packages, it may become a CUDA build of several
# gigabytes.
$(INSTALLED): pyproject.toml
	@echo "Installing into .venv (once, about two minutes; more where PyTorch has to be downloaded) …"
	@$(PYTHON) -c 'import sys; sys.exit("Anther needs Python 3.11 to 3.13" if not (3, 11) <= sys.version_info < (3, 14) else 0)'
	@$(PYTHON) -m venv .venv
	@$(PIP) $(TORCH)
	@$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > .venv/held.txt
	@$(PIP) --constraint .venv/held.txt --editable .
	@touch $@

$(INSTALLED_DEV): $(INSTALLED)
	@echo "Installing test dependencies (once, under a minute) …"
	@$(PIP) --constraint .venv/held.txt --editable '.[dev]'
	@touch $@
