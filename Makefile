# Everything a newcomer needs: make demo, make test, make test-fast. All set up .venv once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

.PHONY: setup demo test test-fast fuzz lint docs bench reliability dist lowest audit clean

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

# The site, in .site/; a broken link or any other warning of MkDocs fails. Its pages are plain Markdown,
# and those about commands, recipe keys and Python are made from the program.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --config-file .mkdocs.yml
	$(BIN)/pytest tests/test_docs.py tests/test_site.py

bench: setup
	$(BIN)/pytest tests/benchmarks -s --override-ini addopts= --override-ini norecursedirs=.git

# Every stage ended in every way and continued, and long runs watched; ROUNDS=3 tries each 3 times.
reliability: setup
	$(BIN)/pytest tests/reliability -s -ra --rounds $(or $(ROUNDS),1) --override-ini addopts= --override-ini norecursedirs=.git

# What a release consists of: wheel, sdist, the versions it was tested with, and what is in them.
dist: setup
	rm -rf dist
	$(BIN)/uv build --quiet --out-dir dist
	$(BIN)/uv venv --quiet dist/environment
	$(BIN)/uv pip install --quiet --python dist/environment/bin/python --constraint .ci/requirements.txt dist/*.whl
	$(BIN)/uv pip freeze --quiet --python dist/environment/bin/python | grep -v '^dupr-cli' > dist/constraints.txt
	$(BIN)/uv tool run --quiet --from cyclonedx-bom==7.5.0 cyclonedx-py environment --output-file dist/sbom.json dist/environment/bin/python
	rm -rf dist/environment

# The fast tests on the lowest versions that pyproject.toml allows, which it would otherwise only claim.
LOWEST := dist/lowest
lowest: setup
	rm -rf $(LOWEST)
	$(BIN)/uv venv --quiet --seed $(LOWEST)
	$(BIN)/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct '.[timm,hf,tiff,probes,onnx,transformers]'
	$(BIN)/uv pip freeze --quiet --python $(LOWEST)/bin/python | grep -v '^dupr-cli' > $(LOWEST)/constraints.txt
	$(BIN)/uv pip install --quiet --python $(LOWEST)/bin/python --constraint $(LOWEST)/constraints.txt pytest pytest-xdist hypothesis imagehash jsonschema hatchling
	$(LOWEST)/bin/python -m pytest -m "not slow"

# Known holes in these versions, by the advisories of PyPI; needs a network.
audit: dist
	$(BIN)/uv tool run --from pip-audit==2.10.1 pip-audit --no-deps --disable-pip --requirement dist/constraints.txt

clean:
	rm -rf $(VENV) dupr-demo dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
