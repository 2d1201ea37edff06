# Everything runs in .venv, made on first use from pyproject.toml and constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-slow test-quantised lint types check bench families schemas clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed"'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(READY)

demo: $(READY)   ## run the main job on embedded input
	$(BIN)/actpipe run workflows/quickstart.yaml

test: $(READY)   ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 -m 'not slow and not gpu'

test-slow: $(READY)   ## run the tests that take longer
	$(BIN)/pytest -q -m 'slow and not gpu'

test-quantised: $(READY)   ## run the tests of quantised models, with libraries of their own beside the rest
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .quantised torchao==0.18.0 bitsandbytes==0.50.2
	PYTHONPATH=.quantised $(BIN)/pytest -q -k Quantised tests/unit/test_model_variants.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)   ## check the types of what is shipped: the wheel, not the checkout
	rm -rf .typecheck build
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .typecheck .
	rm -rf build *.egg-info
	cd .typecheck && ../$(BIN)/mypy --config-file ../pyproject.toml -p actpipe

check: lint types test

bench: $(READY)   ## extraction, hooks, the store, the feed and the analyses beside others; takes over an hour
	$(BIN)/python benchmarks/extract.py
	$(BIN)/python benchmarks/hooks.py
	$(BIN)/python benchmarks/store.py
	$(BIN)/python benchmarks/feed.py
	$(BIN)/python benchmarks/analysis.py

families: $(READY)   ## try every architecture and write docs/families.md; takes some minutes
	$(BIN)/python docs/survey.py

schemas: $(READY)   ## write schemas/v1 from the models
	$(BIN)/python -m actpipe.schemas.generate

clean:
	rm -rf .venv .typecheck .quantised benchmarks/.envs build dist *.egg-info
