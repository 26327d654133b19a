# `make demo` and `make test` need Python 3.10 or newer (with the venv module) and make, nothing else; they create the environment themselves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
THOROUGH := --hypothesis-profile=thorough
# As many processes as there are cores, four at most: each holds a model or two.
SPREAD := -n auto --maxprocesses=4 --dist worksteal
TRITON := triton==3.9.0

VLLM := vllm==0.33.0
# What vLLM's linear layers import; the rest of it is for a GPU.
VLLM_NEEDS := apache-tvm-ffi cachetools cbor2 py-cpuinfo einops fastapi llguidance msgspec openai-harmony opentelemetry-api partial-json-parser pybase64 uvloop xgrammar

.PHONY: demo test test-slow test-slow-only test-triton test-vllm lint site clean

demo: $(VENV)/.installed
	$(BIN)/spikellm demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(SPREAD) -m "not slow"

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(SPREAD) $(THOROUGH)

test-slow-only: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(SPREAD) $(THOROUGH) -m "(slow or hypothesis) and not long"

# Kernels for GPUs, interpreted on the CPU; Triton lies apart, so that nothing else sees it.
test-triton: $(VENV)/.installed-dev $(VENV)/triton
	PYTHONPATH=$(VENV)/triton TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/gpu

$(VENV)/triton: | $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ $(TRITON)

# vLLM's layers and loader on the CPU (its wheel has 340 MB); it lies apart as well.
test-vllm: $(VENV)/.installed-dev $(VENV)/vllm
	PYTHONPATH=$(VENV)/vllm $(BIN)/python -m pytest tests/serving/test_vllm.py

$(VENV)/vllm: | $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ $(VLLM) $(VLLM_NEEDS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

site: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "spikellm needs Python 3.10 or newer; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "the venv module does not work here; on Debian: apt-get install python3-venv" >&2; exit 1; }

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing spikellm and what it needs (torch is large)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[report]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing spikellm, what it needs (torch is large) and the test tools"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis dist site
