# Everything works on a fresh clone with python3 (3.11 or later) and make: each target sets up .venv first if it must.
#
# PYTHON=python3.12    another interpreter
# TORCH_INDEX=URL      take torch from this package index, for example one that carries builds without CUDA
# ARGS="..."           further arguments: make test ARGS="-k runs"
# WORKERS=4            processes that run the tests
# RESULTS=dir          where make gpu writes what it measured (default: docs/benchmarks)

PYTHON ?= python3
TORCH_INDEX ?=
ARGS ?=
WORKERS ?= 2
RESULTS ?= docs/benchmarks

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
READY := $(VENV)/.ready
NEIGHBOURS := $(VENV)/.neighbours
SITE := $(VENV)/.docs
# mypy finds a package by the name of its folder, and a clone may be called anything
SOURCES := $(VENV)/sources

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-diffusion test slow check format bench study lengths images ecosystem docs gpu clean distclean

help:  ## say what there is
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 18

setup: $(READY)  ## install everything into .venv

demo: $(READY)  ## convert SmolLM2-135M-Instruct and show what was gained and lost (runs/demo)
	$(BIN)/attnconvert run smollm2-135m-mixed --out runs/demo $(ARGS)

demo-diffusion: $(READY)  ## convert a tiny trained FLUX and show what was gained and lost (runs/demo-diffusion)
	$(BIN)/attnconvert run flux-mnist-local --out runs/demo-diffusion $(ARGS)

test: $(READY)  ## run the tests
	@OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n $(WORKERS) -m "not slow" $(ARGS)

slow: $(READY)  ## run the tests that take minutes or download a model
	@$(BIN)/python -m pytest -q -m slow $(ARGS)

check: $(READY)  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=$(SOURCES) $(BIN)/mypy --strict -p attnconvert

format: $(READY)  ## let ruff correct what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## measure what docs/benchmarks shows
	$(BIN)/python docs/benchmarks/run.py $(ARGS)

study: $(READY)  ## measure every way of choosing what to replace (docs/selection.md); over an hour
	$(BIN)/python docs/benchmarks/selection.py $(ARGS)

lengths: $(READY)  ## measure what a plan loses with each operator at longer texts; a quarter of an hour
	$(BIN)/python docs/benchmarks/lengths.py $(ARGS)

images: $(READY)  ## measure what image models keep and gain (docs/images.md); over an hour
	$(BIN)/python docs/benchmarks/images.py $(ARGS)

ecosystem: $(NEIGHBOURS)  ## run other people's libraries on converted checkpoints (docs/ecosystem.md); ten minutes
	@$(BIN)/python docs/benchmarks/ecosystem.py $(ARGS)

docs: $(SITE)  ## build the site of the documentation into build/site
	$(BIN)/python docs/benchmarks/gallery.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict -f docs/site/mkdocs.yml
	@echo 'open build/site/index.html'

# Where PYTHON is named it needs no more than torch with Triton: nothing is set up, the package comes from here.
gpu:  ## check and measure the kernels on the GPU, in under 10 minutes
ifneq ($(origin PYTHON),file)
	$(PYTHON) docs/benchmarks/gpu.py --results $(RESULTS) $(ARGS)
else
	@$(MAKE) --no-print-directory $(READY)
	$(BIN)/python docs/benchmarks/gpu.py --results $(RESULTS) $(ARGS)
endif

clean:  ## remove what building and testing left; runs and .venv stay
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean  ## remove .venv as well
	rm -rf $(VENV)

# torch comes first and alone, so that TORCH_INDEX concerns nothing else and the second step finds it in place.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo 'attnconvert needs Python 3.11 or later: make PYTHON=python3.12' >&2; exit 1; }
	@echo 'setting up $(VENV), which takes a few minutes the first time'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@mkdir -p $(SOURCES) && ln -sfn ../.. $(SOURCES)/attnconvert
	@touch $@

$(NEIGHBOURS): $(READY)
	@$(PIP) install -c constraints.txt -e '.[dev,ecosystem]'
	@touch $@

# What builds the site is no part of the setup: few need it.
$(SITE): $(READY)
	@$(PIP) install -c constraints.txt -e '.[docs]'
	@touch $@
