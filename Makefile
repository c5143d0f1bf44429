# Everything runs from a fresh clone: each environment is built when it is first needed, and again
# only when the file that describes it changes.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# The first of the commands $(2) that starts, has a version of $(1) and can make environments. A
# name on PATH alone says little: pyenv's python3.11 exists wherever any Python does.
find_python = $(shell for path in $$(type -aP $(2)); do "$$path" -c 'import ensurepip, sys, venv; \
	sys.exit("{}.{}".format(*sys.version_info) not in "$(1)".split() or print(sys.executable))' \
	2>/dev/null && break; done)

PYTHON ?= $(call find_python,3.12 3.13 3.14,python3.12 python3.13 python3.14 python3 python)
ORACLE_PYTHON ?= $(call find_python,3.11,python3.11 python3 python)

pip_install := -m pip install -qq --disable-pip-version-check

# One process a core, some gigabytes each; files stay together while there is enough to do.
spread = --numprocesses auto --maxprocesses 8 --dist worksteal

.PHONY: help demo test test-slow fuzz oracle lint clean

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

demo: .venv/.installed  ## write a paragraph with the embedded model
	@.venv/bin/qllama generate -p "It is a truth" --max-tokens 120

test: .venv/.installed-dev  ## run the tests (ARGS="tests/test_house.py -x" narrows them)
	@if [ -z "$(ORACLE_PYTHON)" ]; then \
		echo "No Python 3.11: tests that compare with torch and transformers will be skipped."; \
	elif ! $(MAKE) --no-print-directory oracle; then \
		echo "Tests that compare with torch and transformers will be skipped."; \
	fi
	@if [ -e .venv-oracle/.installed ]; then \
		export QLLAMA_ORACLE_PYTHON="$(CURDIR)/.venv-oracle/bin/python"; \
	fi; .venv/bin/python -m pytest -q -rs $(spread) $(ARGS)

test-slow: ARGS = -m "slow and not gpu"
test-slow: test  ## run the tests that take minutes

fuzz: export QLLAMA_FUZZ_EXAMPLES = $(or $(EXAMPLES),400)
fuzz: .venv/.installed-dev  ## spoil checkpoints at random (EXAMPLES=5000 of every format)
	.venv/bin/python -m pytest -q -s tests/test_fuzz.py $(ARGS)

lint: .venv/.installed-dev  ## ruff and mypy
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

oracle: .venv-oracle/.installed  ## build the environment with torch that some tests compare with
	@:

clean:  ## remove environments, caches and build outputs
	rm -rf .venv .venv-oracle .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache \
		build dist *.egg-info

.venv/.installed: pyproject.toml
	@if [ -z "$(PYTHON)" ]; then \
		echo "qllama needs Python 3.12 or newer with the venv module, and none is on PATH." >&2; \
		echo "Install it, or name one: make PYTHON=/path/to/python3.12" >&2; exit 1; \
	fi
	@[ -x .venv/bin/pip ] || { echo "Making .venv with $(PYTHON)"; "$(PYTHON)" -m venv .venv; }
	@echo "Installing qllama into .venv (minutes, the first time)"
	@.venv/bin/python $(pip_install) -e .
	@touch $@

.venv/.installed-dev: .venv/.installed
	@echo "Installing what developing needs into .venv"
	@.venv/bin/python $(pip_install) -e '.[dev]'
	@touch $@

.venv-oracle/.installed: tests/oracle-requirements.txt
	@if [ -z "$(ORACLE_PYTHON)" ]; then \
		echo "The oracle needs Python 3.11 with the venv module, and none is on PATH." >&2; \
		echo "Install it, or name one: make oracle ORACLE_PYTHON=/path/to/python3.11" >&2; exit 1; \
	fi
	@[ -x .venv-oracle/bin/pip ] || { echo "Making .venv-oracle with $(ORACLE_PYTHON)"; \
		"$(ORACLE_PYTHON)" -m venv .venv-oracle; }
	@echo "Installing torch and transformers into .venv-oracle (minutes, the first time)"
	@.venv-oracle/bin/python $(pip_install) -r tests/oracle-requirements.txt
	@touch $@
