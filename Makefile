# `make train` and `make test` set up .venv on first use; afterwards they need no network.
# CPU-only users: make train TORCH_INDEX=https://download.pytorch.org/whl/cpu (skips the CUDA libraries).

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
ARGS ?=

RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
LOG := $(VENV)/install.log
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
# Where an index does not answer, pip prints a page for every package that it tries: into the log, and one line here.
	@test -z "$(TORCH_INDEX)" || $(RUN) -m pip install --retries 1 --index-url $(TORCH_INDEX) $(TORCH) >$(LOG) 2>&1 \
		|| { echo "error: cannot install $(TORCH) from $(TORCH_INDEX) (see $(LOG)); check the address and the network, or leave TORCH_INDEX out"; exit 1; }
	@$(RUN) -m pip install --editable '.[test]' >$(LOG) 2>&1 \
		|| { echo "error: cannot install the packages of pyproject.toml (see $(LOG)); check the network"; exit 1; }
# A CUDA build of torch brings the Triton it was built with; a CPU build brings none, and the tests interpret kernels with it.
	$(RUN) -c 'import triton' 2>/dev/null || $(RUN) -m pip install --quiet --editable '.[triton]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
