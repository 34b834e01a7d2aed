# make test | bench | report | parity | resources | fuzz | lint: each makes .venv once and works on a fresh machine, GPU
# or not. make report writes the reports and the measured tables of README and docs anew from the committed runs.
# make gpu: installs nothing, uses the python3 on the path, which has to hold torch and triton; SWEEP=1: every
# configuration of the attention kernels instead of the matrix.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
OUT    ?= build/gpu
SECONDS ?= 60
STAMP  := $(VENV)/.installed

.PHONY: test bench report parity resources fuzz lint gpu clean

test: lint
	$(BIN)/python -m pytest -n auto --dist worksteal

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
	$(BIN)/pyrefly check

gpu:
	PYTHONPATH=.:kernels python3 -m benchmarks.gpu --out "$(OUT)" $(if $(SWEEP),--sweep)

$(STAMP): pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist ./*.egg-info
