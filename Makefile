# make demo    train a network on handwritten digits, with neocog's own kernels, and look into it
# make test    the whole test suite
# make lint    lint, format and types
# make check   what to run before every commit: make lint, and the fast tests
# make bench   how near the kernels come to the machine's peak; results go to benchmarks/
# make peers   the engines neocog is raced against, into an environment of their own
# make race    whole networks beside those engines, which takes an hour; results go to benchmarks/
# make training-race  whole steps of training beside PyTorch and Inductor; results go to benchmarks/
# make fuzz    random programs through neocog and beside PyTorch; FUZZ_ARGS="--cases 20000 --seed 7"
# make browser the Chromium that the browser tests drive, from Debian's packages
# make install only the set-up, which all of the above do by themselves
#
# PYTHON=/path/to/python3.12 picks the interpreter; it has to be 3.11 or newer.
# PYTEST_ARGS="-k pool" is handed to pytest.

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PEERS := .venv-peers

# The first interpreter on the path that is new enough; looked for only when .venv has to be made.
CANDIDATES := python3 python3.13 python3.12 python3.11 python3.14 python
IS_NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(firstword $(foreach p,$(CANDIDATES),$(shell $(p) -c '$(IS_NEW_ENOUGH)' 2>/dev/null && echo $(p))))

# Two test processes suit the smallest machines; WORKERS=0 runs the tests in one, for a debugger.
WORKERS ?= 2
PYTEST_ARGS ?=
FUZZ_ARGS ?=

.PHONY: install browser demo test lint check bench peers race training-race fuzz clean

install: $(INSTALLED)

$(BIN)/python:
	@test -n "$(PYTHON)" || { \
	  echo "neocog needs Python 3.11 or newer; found none of: $(CANDIDATES)." >&2; \
	  echo "Install one, or name it: make $(or $(MAKECMDGOALS),install) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c '$(IS_NEW_ENOUGH)' || { \
	  echo "neocog needs Python 3.11 or newer; $(PYTHON) is $$("$(PYTHON)" --version 2>&1)." >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: install
	$(BIN)/neocog train
	@run=$$(ls -td runs/*/ | head -n 1) && set -x && \
	  $(BIN)/neocog evaluate "$$run" && \
	  $(BIN)/neocog predict "$$run" "$$run"right-*.png "$$run"wrong-*.png && \
	  $(BIN)/neocog explain "$$run" "$$run"right-0.png --layer 2 --channel 5 --at 3,0

# The browser tests need Chromium; where it cannot be installed they are skipped, and say so.
browser:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || { \
	  apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
	  chromium; } >/dev/null 2>&1 || echo "Chromium is not there and cannot be installed" >&2

test: install browser
	$(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow" $(PYTEST_ARGS)

bench: install
	$(BIN)/neocog bench --blocks --force --json benchmarks/blocks.json
	$(BIN)/neocog bench --network --force --json benchmarks/network.json
	$(BIN)/python benchmarks/contract.py --json benchmarks/contract.json

peers: $(PEERS)/.installed

$(PEERS)/.installed: benchmarks/peers.txt pyproject.toml | $(BIN)/python
	$(BIN)/python -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --disable-pip-version-check -r benchmarks/peers.txt -e .
	@touch $@

race: install peers
	$(BIN)/neocog bench --networks --force --peers $(PEERS)/bin/python \
	  --json benchmarks/networks.json --plot benchmarks/networks.png

# Its engines are PyTorch's own: it needs no peers. Inductor needs a C++ compiler.
training-race: install
	$(BIN)/neocog bench --training --force --threads 1,2 \
	  --json benchmarks/training.json --plot benchmarks/training.png

# Bounded (400 programs, some minutes) and the same every time; a finding ends in the line that
# runs it again.
fuzz: install
	$(BIN)/python -m fuzz $(FUZZ_ARGS)

clean:
	rm -rf $(VENV) $(PEERS) build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
