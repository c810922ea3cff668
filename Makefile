# make demo, make test: nothing but Python >= 3.10 is needed before.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal  # near the end, idle workers take from busy ones

# The working loop: what a change breaks first, in under a minute.
QUICK  := tests/test_validation.py tests/test_properties.py tests/test_real_data.py tests/test_docs.py

.PHONY: demo test check lint docs kernels emulate bench gpu clean

demo: $(STAMP)
	$(BIN)/gradnorm-fast demo

test: lint
	$(PYTEST)

check: lint
	$(PYTEST) -q $(QUICK)

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy gradnorm_fast
	$(BIN)/mypy --explicit-package-bases kernels
	$(BIN)/mypy --explicit-package-bases benchmarks

# One specialisation of each configuration and constant, for seven architectures: about five minutes.
kernels: $(STAMP)
	$(BIN)/python benchmarks/compile_matrix.py --quick

# The kernels compiled for two GPUs, executed on the CPU: tests/emulator/README.md. About an hour.
emulate: $(STAMP)
	$(BIN)/python tests/emulator/run.py
	$(BIN)/python tests/emulator/run.py --controls

bench: $(STAMP)
	$(BIN)/python benchmarks/compare.py

# With the Python, torch and Triton that are there: a machine with a GPU often has no network.
gpu:
	$(PYTHON) -m pip install --quiet --no-deps --no-build-isolation --editable . || true  # benchmarks/ do without
	$(PYTHON) benchmarks/gpu.py

# PIP_ARGS picks other versions: make test VENV=.venv-2.11 PIP_ARGS="torch==2.11.* 'numpy<2.4'"
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]" $(PIP_ARGS)
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
