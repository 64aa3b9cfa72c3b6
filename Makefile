# Two commands do everything: `make demo` and `make test`. Each makes .venv and installs into it the first time.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# Two test processes; tests/conftest.py says which test goes with which.
TOGETHER := --numprocesses 2 --dist loadscope --no-loadscope-reorder

.PHONY: setup demo claims test test-all lint types contracts coverage bench clean help
.DEFAULT_GOAL := help

help:
	@echo "make demo      real photos in, a registered codebook out (about 3 minutes after installation)"
	@echo "make test      lint, types and every test that is not marked slow (about 10 minutes on two cores)"
	@echo "make test-all  the slow tests too"
	@echo "make bench     the benchmarks, paired ratios; prints, never asserts"
	@echo "make contracts what vqcore and its peers agree on, and where a peer is wrong"
	@echo "make coverage  branches of vqcore that its tests reach"
	@echo "make claims    RECIPE=x [HEADLINE=1] [SOURCE=folder]: a paper's table again, paper beside ours; says first how long it takes"
	@echo "make setup     only the installation; make clean removes it"

setup: $(STAMP)

# pip's own settings (index, proxy, cache, PIP_*) are the user's and stay untouched.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; \
	  sys.exit(0 if v == (3, 11) else "vqray was tested on Python 3.11 only; this is %d.%d. Try: make PYTHON=python3.11 $(MAKECMDGOALS)" % v)'
	@echo "First time here: installing about 205 packages into $(VENV) from your package index."
	@echo "Download: about 1 GB plus PyTorch (0.2 GB as a CPU build, about 3 GB with CUDA); 2.8 GB on disk as a CPU build."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)
	@$(BIN)/vqray demo rotation_trick

claims: $(STAMP)
	@test -n "$(RECIPE)" || { echo "make claims RECIPE=x [HEADLINE=1] [SOURCE=folder]; 'vqray claims --help' says more" >&2; exit 2; }
	@$(BIN)/vqray claims $(RECIPE) $(if $(HEADLINE),--headline) $(if $(SOURCE),--source $(SOURCE))

lint: $(STAMP)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(STAMP)
	@$(BIN)/mypy

test: lint types
	@$(BIN)/python -m pytest -m "not slow and not gpu" $(TOGETHER)

test-all: lint types
	@$(BIN)/python -m pytest $(TOGETHER)

contracts: $(STAMP)
	@$(BIN)/python -m tests.peers

coverage: $(STAMP)
	@$(BIN)/python -m pytest --quiet --cov=vqcore --cov-branch --cov-report=term-missing:skip-covered tests/vqcore tests/contracts

bench: $(STAMP)
	@$(BIN)/python -m tests.benchmarks

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
