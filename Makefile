# Each target sets up what it needs, inside this checkout. `make help` lists them.

PYTHON ?= python3
PYTEST_ARGS ?=
SEEDS ?= 100000
ARGS ?=

BIN := .venv/bin
READY := .venv/.ready
PIP := $(BIN)/python -m pip -q --disable-pip-version-check --no-input --no-cache-dir

.DEFAULT_GOAL := help
.PHONY: help venv integrations browser server demo test simulate bench peers check fmt clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY) ## train, kill, resume, on this machine (ARGS="...")
	@$(BIN)/dcpsvc demo $(ARGS)

# pytest exits with 5 when no test was selected.
test: $(READY) server ## every test, or only some (PYTEST_ARGS="tests/unit -k policy")
ifeq ($(strip $(PYTEST_ARGS)),)
	$(BIN)/python -m pytest -m "not s3" -n 2 --dist loadfile
	$(BIN)/python -m pytest -m s3 || test $$? -eq 5
else
	$(BIN)/python -m pytest $(PYTEST_ARGS)
endif

simulate: $(READY) ## run the protocol on simulated ranks, stores and clocks (SEEDS=100000)
	@$(BIN)/python -m tests.model.simulate --seeds $(SEEDS) --jobs $$(nproc)

bench: $(READY) ## side by side with what else there is, ten minutes (ARGS="--settings ddpx2 --out FILE")
	@$(BIN)/python -m benchmarks.bench $(ARGS)

peers: $(READY) ## environments for the systems to compare with that are not part of torch (ARGS="nvrx")
	@$(BIN)/python -m benchmarks.peers $(ARGS)

check: $(READY) ## format, lint, types, architecture
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright
	$(BIN)/lint-imports --no-logo

fmt: $(READY) ## format, and repair what ruff can
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean: ## back to a fresh clone: drop .venv, caches and build output
	rm -rf .venv .venv-peers build dist .hypothesis .*_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

venv: $(READY) ## the environment the other targets use: .venv

# Tests with libraries that are not there are skipped. Where the index lacks one, the others come all the same.
integrations: $(READY) ## the libraries that the tests of the integrations need, as far as they can be had
	@timeout 180 $(PIP) install -e '.[integrations]' -c constraints.txt 2>.venv/integrations.log || { \
	  [ $$? -ne 124 ] || { echo "the index is too slow: tests of integrations are skipped"; exit 0; }; \
	  for extra in lightning peft transformers; do \
	    timeout 90 $(PIP) install -e ".[$$extra]" -c constraints.txt 2>.venv/integrations.log || \
	      { echo "$$extra cannot be installed, its tests are skipped:"; tail -n 1 .venv/integrations.log; }; \
	  done; }

# The page of `dcpsvc report` is tested in a real browser. Where there is none, those tests are skipped.
browser: ## chromium for the tests of the report, as root on a machine with apt-get
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
	  [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null || \
	    { echo "no chromium here, and no right to install it: tests of the report in a browser are skipped"; exit 0; }; \
	  echo "==> installing chromium"; \
	  { timeout 60 apt-get update -qq; \
	    DEBIAN_FRONTEND=noninteractive timeout 240 apt-get install -y -qq --no-install-recommends chromium; } >/dev/null 2>&1 || \
	    echo "chromium cannot be installed: tests of the report in a browser are skipped"

# Before the tests, which take minutes: a mirror that answers now may not answer then.
server: $(READY) ## the S3 server for the tests, as far as it can be had
	@$(BIN)/python -m tests.s3.servers

# Costs nothing while pyproject.toml and constraints.txt stay the same.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  [ "$$(id -u) $(PYTHON)" = "0 python3" ] && command -v apt-get >/dev/null || \
	    { echo "$(PYTHON) cannot create environments. Install python3 and python3-venv, or: make PYTHON=<another>" >&2; exit 1; }; \
	  echo "==> installing python3-venv"; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3 python3-venv >/dev/null; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "dcpsvc needs Python 3.11 or newer: make PYTHON=<another>" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || \
	  { echo "==> creating .venv ($$($(PYTHON) --version))"; $(PYTHON) -m venv --clear .venv; }
	@echo "==> installing dcpsvc and its tools into .venv (the first time this takes minutes: torch is large)"
	@$(PIP) install -e '.[dev]' -c constraints.txt
	@touch $@
