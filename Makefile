# `make demo` and `make test` are all there is; both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin
SETUP := .venv/installed

.PHONY: demo test fast lint clean

demo: $(SETUP)
	$(BIN)/python benchmarks/demo.py

test: $(SETUP) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile  # two processes of one thread each

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Installed again when what is installed changes.
$(SETUP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info bundles
