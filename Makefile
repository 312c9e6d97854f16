PY ?= python3
BIN := .venv/bin

.PHONY: setup demo test lint bench
setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	bash .ci/setup $(PY)
	touch $@
