# Two commands for everyone:  make demo   make test
# The rest is for developers; `make check` is what CI runs.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --disable-pip-version-check --quiet --no-compile -c constraints.txt
PYTEST := OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n auto --maxprocesses=4 --dist loadfile --no-loadscope-reorder -q
# Their coverage is what `tests/trusted_base.py` judges; counting lines makes Python a third slower.
COVERING := $(addprefix tests/unit/,kernel crypto databases accounts jobs parties transparency server \
  cli/test_party.py workflows/test_login.py) $(wildcard tests/unit/test_*.py) tests/vectors tests/properties
# Tests are skipped without them: a software token, a compiler for the disk that fails, a clock that jumps.
TEST_TOOLS := softhsm2 gcc libc6-dev faketime

# Where it is set (many containers set it) each command would compile PyTorch and all else anew: 5 to 15 s.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-postgres check lint fmt types layers unit bench nightly clean help

help:            ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

demo: $(VENV)/installed-demo     ## the whole story on a real model
	$(BIN)/llmos demo

test: $(VENV)/installed-dev      ## all tests
	$(PYTEST) --cov --cov-report=term:skip-covered --cov-report=json:.coverage.json $(COVERING)
	$(BIN)/python tests/trusted_base.py .coverage.json
	$(PYTEST) $(addprefix --ignore=,$(COVERING))

test-postgres: $(VENV)/installed-dev  ## all tests with every home on a PostgreSQL 15 that the tests start
	LLMOS_TEST_DATABASE=postgresql $(PYTEST)

check: lint types layers test    ## what CI runs

lint: $(VENV)/installed-dev      ## style and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

fmt: $(VENV)/installed-dev       ## format and fix what can be fixed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(VENV)/installed-dev     ## mypy --strict
	$(BIN)/mypy

layers: $(VENV)/installed-dev    ## imports point down only
	$(BIN)/lint-imports

unit: $(VENV)/installed-dev      ## the quick tests only
	$(BIN)/python -m pytest -q tests/unit tests/vectors -m "not model and not slow"

bench: $(VENV)/installed-dev     ## ratios against peers, side by side in one run
	$(PIP) -e '.[bench]'
	@missed=; for name in dp_step audit_log vault policy; do \
	  $(BIN)/python benchmarks/$$name.py --json benchmarks/results/$$name.json || missed="$$missed $$name"; \
	done; [ -z "$$missed" ] || { echo "llmos: error: goals missed or not measured:$$missed"; exit 1; }

nightly: $(VENV)/installed-dev   ## long experiments: the demo, leak table over three seeds, 20 kills, contention, a fault at every call
	$(BIN)/llmos demo --json
	$(BIN)/llmos demo federated --json
	$(BIN)/python -m pytest -q --nightly tests/e2e/test_federation_faults.py tests/unit/reports/test_federated_rounds.py
	$(BIN)/python benchmarks/federated_scale.py --json benchmarks/results/federated_scale.json
	$(BIN)/python benchmarks/federated.py --json benchmarks/results/federated.json
	$(BIN)/python benchmarks/compression.py --json benchmarks/results/compression.json
	$(BIN)/python benchmarks/leak_table.py --json benchmarks/results/leak_table.json
	$(BIN)/python benchmarks/kill_training.py --json benchmarks/results/kill_training.json
	$(BIN)/python benchmarks/budget.py --json benchmarks/results/budget.json
	$(BIN)/python -m pytest -q tests/faults/test_bit_flips.py tests/properties tests/fuzz --long 60
	EVERY_CALL=1 $(BIN)/python -m pytest -q --timeout=7200 tests/faults

clean:           ## remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage .coverage.json

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "llmos: error: Python 3.11 or newer is needed"; echo "llmos: hint: make PYTHON=python3.11 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "llmos: hint: on Debian: apt-get install python3-venv"; exit 1; }

$(VENV)/installed-demo: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[dev]'
	@{ command -v softhsm2-util && command -v cc && command -v faketime; } >/dev/null || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get install -qy $(TEST_TOOLS) >/dev/null 2>&1; } || \
	  echo "llmos: hint: tests of tokens, failing disks or clocks are skipped; on Debian: apt-get install $(TEST_TOOLS)"
	@test -x /usr/lib/postgresql/15/bin/initdb || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get install -qy --no-install-recommends postgresql-15 >/dev/null 2>&1; } || \
	  echo "llmos: hint: the PostgreSQL tests are skipped; on Debian: apt-get install postgresql-15"
	@touch $@
