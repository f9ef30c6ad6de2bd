# `make train` and `make test` set up .venv on first use; afterwards they need no network.
# CPU-only users: make train TORCH_INDEX=https://download.pytorch.org/whl/cpu (skips the CUDA libraries).

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
ARGS ?=

RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
TORCH := $(shell sed -n 's/^    "\(torch==[^"]*\)",$$/\1/p' pyproject.toml)

.PHONY: train test test-all lint format ui clean

train: $(STAMP)
	$(RUN) train.py $(ARGS)

test: $(STAMP)
	$(RUN) -m pytest -m "not slow" $(ARGS)

test-all: $(STAMP)
	$(RUN) -m pytest $(ARGS)

lint: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(STAMP)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

ui: $(STAMP)
	$(RUN) -m mlflow ui --backend-store-uri sqlite:///$(CURDIR)/mlflow.db $(ARGS)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' \
		|| { echo "error: $(PYTHON) is not Python 3.11 or 3.12; type: make train PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(RUN) -m pip install --quiet --index-url $(TORCH_INDEX) $(TORCH))
	$(RUN) -m pip install --quiet --editable '.[test]'
# A CUDA build of torch brings the Triton it was built with; a CPU build brings none, and the tests interpret kernels with it.
	$(RUN) -c 'import triton' 2>/dev/null || $(RUN) -m pip install --quiet --editable '.[triton]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
