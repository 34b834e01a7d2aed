# make test | lint | bench | report | parity | resources | fuzz: each makes .venv once, of the versions in constraints.txt,
# and works on a fresh machine, GPU or not. make report writes the reports and the measured tables of README and docs
# anew from the committed runs.
# make lock: constraints.txt anew, with the newest release of everything that constraints.in does not pin; UPGRADE= keeps
# the versions that are there and adds what is missing. make compat: the tests with other versions of python, torch and
# triton, each in an environment of its own under build/compat; writes docs/compat.md.
# make proof: compiled kernels executed on the CPU, with the oldest triton and the locked one; writes docs/proof.md, within
# an hour on two cores. Rows that were run with these sources are not run again.
# make gpu: installs nothing, uses the python3 on the path, which has to hold torch and triton; SWEEP=1: every
# configuration of the attention kernels instead of the matrix.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
OUT    ?= build/gpu
SECONDS ?= 60
STAMP  := $(VENV)/.installed
# Executes compiled kernels in `make test`. It asks for Python 3.12 and runs on older ones, so that no requirement can
# name it; tests/machines/ttgir/repairs.py says which version its repairs are for.
TTSEM  := ttsem==0.1.0

INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --only-binary :all: -c constraints.txt
UPGRADE ?= --upgrade

.PHONY: test lint bench report parity resources fuzz lock compat proof gpu clean

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist worksteal
	FASTATTN_MACHINE=ttgir $(BIN)/python -m pytest -n auto --dist worksteal -m machine tests/kernels tests/machines
	FASTATTN_MACHINE=ptx $(BIN)/python -m pytest -n 0 tests/machines/test_soft_gpu.py

bench: $(STAMP)
	$(BIN)/python -m benchmarks --quick --out build/bench

report: $(STAMP)
	$(BIN)/python -m benchmarks report --committed

parity: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist worksteal -m parity --error-table

resources: $(STAMP)
	$(BIN)/python -m benchmarks static --write
	$(BIN)/python -m pytest -n auto --dist worksteal -m "resources or not resources" tests/kernels

fuzz: $(STAMP)
	$(BIN)/python -m tests.ops.fuzz --seconds $(SECONDS)
	$(BIN)/python -m pytest -n auto --dist worksteal tests/ops -k "random_combinations" --seed "$$(date +%s)"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --min-severity warn --python-interpreter-path $(BIN)/python

lock: $(BIN)/python
	$(INSTALL) uv
	UV_CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/uv pip compile --quiet --universal --python-version 3.10 \
		--no-emit-index-url $(UPGRADE) --extra dev --output-file constraints.txt pyproject.toml constraints.in

compat: $(STAMP)
	$(BIN)/python -m tests.compat

proof: $(STAMP)
	$(BIN)/python -m tests.proof

gpu:
	PYTHONPATH=.:kernels python3 -m benchmarks.gpu --out "$(OUT)" $(if $(SWEEP),--sweep)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# pip and setuptools come first: pip does not apply constraints to the environment in which it builds a package.
$(STAMP): pyproject.toml setup.py constraints.txt | $(BIN)/python
	$(INSTALL) pip setuptools
	$(INSTALL) --no-build-isolation -e '.[dev]'
	$(INSTALL) --no-deps --ignore-requires-python $(TTSEM)
	touch $@

clean:
	rm -rf $(VENV) build dist ./*.egg-info
