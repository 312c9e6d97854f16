PY ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-oldest lint bench
setup: .venv/ready  ## .venv with the rlvr command

.venv/ready: pyproject.toml constraints.txt .ci/setup
	bash .ci/setup $(PY)
	touch $@

demo: setup  ## two monitored runs, uniform and ict, and the live dashboard
	$(BIN)/rlvr demo

test: setup  ## all tests, a real headless browser among them, on at most four cores with one thread each
	RLVR_CHROMIUM="$$(bash .ci/browser | tail -n 1)" OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

test-oldest:  ## the core's tests on the oldest versions that pyproject.toml allows, without torch
	$(PY) tests/oldest.py

lint: setup  ## formatting, lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup  ## rewrites the rows of benchmarks/results
	for script in benchmarks/bench_*.py; do PYTHONPATH=. $(BIN)/python $$script || exit 1; done
