# Everything a newcomer needs: make demo, make test, make test-fast. All set up .venv once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

.PHONY: setup demo test test-fast fuzz lint docs bench clean

setup: $(STAMP)

# uv installs into the project's own environment; nothing outside it is touched. Compiling once
# spares every start of Python seconds, also where PYTHONDONTWRITEBYTECODE is set.
$(STAMP): pyproject.toml .ci/requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dupr needs Python 3.11 or newer; give one as make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode --requirement .ci/requirements.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	touch $@

demo: setup
	$(BIN)/dupr demo --out dupr-demo

test: lint
	$(BIN)/pytest

# The inner loop: what takes more than a few seconds is left out.
test-fast: setup
	$(BIN)/pytest -m "not slow"

# New damaged files for every reader; make fuzz SECONDS=3600 takes an hour for each of them.
SECONDS ?= 30
fuzz: setup
	DUPR_FUZZ_SECONDS=$(SECONDS) $(BIN)/pytest tests/fuzz

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The pages are plain Markdown; this checks that every link between them leads somewhere.
docs: setup
	$(BIN)/pytest tests/test_docs.py

bench: setup
	$(BIN)/pytest tests/benchmarks -s --override-ini addopts= --override-ini norecursedirs=.git

clean:
	rm -rf $(VENV) dupr-demo dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
