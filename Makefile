# `make` lists the targets. Everything is installed into .venv; nothing outside is touched.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
JOBS   ?= 2
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint bench readme clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.run ## compile the embedded model, verify it, compare bitwidths (under 3 minutes)
	$(BIN)/mpqc demo $(ARGS)

test: lint ## lint, types and the default tests, in two processes (slow: make test ARGS='-m slow')
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

lint: $(VENV)/.dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.run ## latency of ResNet-18 against ONNX Runtime on this machine
	mkdir -p build
	$(BIN)/python benchmarks/models.py resnet18 -o build/resnet18.onnx --data build/resnet18.npz
	$(BIN)/mpqc compile build/resnet18.onnx --bits w2a2 --data build/resnet18.npz \
	    -o build/resnet18 --overwrite
	$(BIN)/mpqc bench build/resnet18 --against ort-fp32,ort-int8

readme: $(VENV)/.run ## write the generated parts of README.md: support table, demo output
	$(BIN)/python docs/update_readme.py --demo

clean: ## remove .venv, caches and build outputs
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# A stamp is written when its step has ended: an interrupted one is done again.
$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null || { echo >&2 "mpqc needs Python 3.11 or newer, and there\
	 is no '$(PYTHON)': install it, or name one: make PYTHON=/path/to/python3"; exit 3; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo >&2 "mpqc needs\
	 Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) -V 2>&1): name a newer one:\
	 make PYTHON=python3.12"; exit 3; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo >&2 "'$(PYTHON)' lacks the venv\
	 module: on Debian and Ubuntu, apt install python3-venv"; exit 3; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.run: $(VENV)/.created pyproject.toml constraints.txt
	$(PIP) -e '.[report]'
	@touch $@

$(VENV)/.dev: $(VENV)/.created pyproject.toml constraints.txt
	$(PIP) -e '.[dev]'
	@touch $(VENV)/.run $@
