# make test | lint | docs | bench | report | parity | resources | fuzz: each makes .venv once, of the versions in constraints.txt,
# and works on a fresh machine, GPU or not. make report writes the reports and the measured tables of README and docs
# anew from the committed runs. make docs builds the documentation into build/site, and fails where a link leads nowhere.
# make dist: the sdist, and the wheel that it makes, into dist/. make wheel: the same, and both are looked into, the wheel
# installed into an environment of its own, README's code and a few calls run there, within a minute.
# make lock: constraints.txt anew, with the newest release of everything that constraints.in does not pin, and those of
# make clients and make ray; UPGRADE= keeps the versions that are there and adds what is missing.
# make compat: the tests with other versions of python, torch and triton, each in an environment of its own under
# build/compat; writes docs/compat.md. make resources-pairs: what kernels take, as make resources writes it, and beside it
# as the tritons of two of those environments compile them.
# make clients: models of timm, torchvision, open_clip and diffusers on fastattn, in an environment of their own under
# build/clients; writes docs/clients.md. TIMES=1 times them instead, within three minutes.
# make ray: a parallel model under Ray Train, with Ray in an environment of its own under build/ray, within two minutes.
# make families: families of transformers beside eager attention; writes the tables of docs/transformers.md.
# make proof: compiled kernels executed on the CPU, with the oldest triton and the locked one; writes docs/proof.md, within
# an hour on two cores. Rows that were run with these sources are not run again.
# make gpu CALL=1, then CALL=2 AFTER=the folder of call 1: right and fast on a GPU that is there for a quarter of an hour?
# Installs nothing, uses the python3 on the path, which has to hold torch and triton; CALL=sweep: every configuration of
# the attention kernels. make gpu-cache: before that, on a machine without a GPU, the kernels compiled for it, as one
# file; DEVICE= the Python, torch and triton there.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
CALL   ?= 1
OUT    ?= build/gpu/call$(CALL)
DEVICE ?= 3.12-2.11.0-3.6.0
PARITY ?= 1800
SECONDS ?= 60
STAMP  := $(VENV)/.installed
CLIENTS := build/clients
RAY    := build/ray
# Executes compiled kernels in `make test`. It asks for Python 3.12 and runs on older ones, so that no requirement can
# name it; tests/machines/ttgir/repairs.py says which version its repairs are for.
TTSEM  := ttsem==0.1.0

PIP     := -m pip install --quiet --disable-pip-version-check --only-binary :all:
INSTALL := $(BIN)/python $(PIP) -c constraints.txt
UPGRADE ?= --upgrade

.PHONY: test ranks lint docs bench report parity resources resources-pairs fuzz dist wheel lock compat clients ray families proof gpu gpu-cache clean

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist worksteal
	FASTATTN_MACHINE=ttgir $(BIN)/python -m pytest -n auto --dist worksteal -m machine tests/kernels tests/machines
	FASTATTN_MACHINE=ptx $(BIN)/python -m pytest -n 0 -k "soft_gpu or decode_whole" tests/machines

# Context parallelism on eight processes, within three minutes.
ranks: $(STAMP)
	$(BIN)/python -m pytest -n 0 -m ranks tests/distributed

bench: $(STAMP)
	$(BIN)/python -m benchmarks --quick --out build/bench

report: $(STAMP)
	$(BIN)/python -m benchmarks report --committed

parity: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist worksteal -m parity --error-table

resources: $(STAMP)
	$(BIN)/python -m benchmarks laboratory --write
	$(BIN)/python -m pytest -n auto --dist worksteal -m "resources or not resources" tests/kernels

resources-pairs: $(STAMP)
	$(BIN)/python -m benchmarks laboratory --write --with $$($(BIN)/python -m tests.compat set-up 3.10 3.12)

fuzz: $(STAMP)
	$(BIN)/python -m tests.ops.fuzz --seconds $(SECONDS)
	$(BIN)/python -m pytest -n auto --dist worksteal tests/ops -k "random_combinations" --seed "$$(date +%s)"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --min-severity warn --python-interpreter-path $(BIN)/python

# The variable silences a banner about another project, which material prints.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# With the setuptools of constraints.txt: an environment of its own would get the newest.
dist: $(STAMP)
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist .

wheel: dist
	$(BIN)/python -m tests.wheel

lock: $(BIN)/python
	$(INSTALL) uv
	UV_CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/uv pip compile --quiet --universal --python-version 3.10 \
		--no-emit-index-url $(UPGRADE) --extra dev --output-file constraints.txt pyproject.toml constraints.in
	UV_CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/uv pip compile --quiet --universal --python-version 3.11 \
		--no-emit-index-url $(UPGRADE) --extra clients -c constraints.txt --output-file constraints-clients.txt \
		pyproject.toml constraints.in
	UV_CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/uv pip compile --quiet --universal --python-version 3.10 \
		--no-emit-index-url $(UPGRADE) --extra ray -c constraints.txt --output-file constraints-ray.txt \
		pyproject.toml constraints.in

compat: $(STAMP)
	$(BIN)/python -m tests.compat

clients: $(CLIENTS)/.installed
	$(CLIENTS)/bin/python -m pytest -q tests/integrations/test_diffusers.py tests/integrations/test_patch_sdpa.py
	PYTHONPATH=.:kernels OMP_NUM_THREADS=1 $(CLIENTS)/bin/python -m tests.clients $(if $(TIMES),--times)

ray: $(RAY)/.installed
	OMP_NUM_THREADS=1 $(RAY)/bin/python -m pytest -q tests/distributed/test_ray.py

families: $(STAMP)
	PYTHONPATH=.:kernels $(BIN)/python -m tests.integrations.transformers.table

proof: $(STAMP)
	$(BIN)/python -m tests.proof

gpu:
	PYTHONPATH=.:kernels python3 -m benchmarks.gpu --call $(CALL) --out "$(OUT)" $(if $(AFTER),--after "$(AFTER)")

gpu-cache: $(STAMP)
	python="$$($(BIN)/python -m tests.compat set-up $(DEVICE))" && PYTHONPATH=.:kernels OMP_NUM_THREADS=1 "$$python" \
		-m benchmarks.gpu.prefill --out build/gpu-cache.tar.xz --cache build/gpu-cache --parity $(PARITY)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# pip and setuptools come first: pip does not apply constraints to the environment in which it builds a package.
$(STAMP): pyproject.toml setup.py constraints.txt | $(BIN)/python
	$(INSTALL) pip setuptools
	$(INSTALL) --no-build-isolation -e '.[dev]'
	$(INSTALL) --no-deps --ignore-requires-python $(TTSEM)
	touch $@

$(CLIENTS)/.installed: pyproject.toml setup.py constraints-clients.txt
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python $(PIP) -c constraints-clients.txt pip setuptools
	$(CLIENTS)/bin/python $(PIP) -c constraints-clients.txt --no-build-isolation -e '.[clients]'
	touch $@

$(RAY)/.installed: pyproject.toml setup.py constraints-ray.txt
	$(PYTHON) -m venv $(RAY)
	$(RAY)/bin/python $(PIP) -c constraints-ray.txt pip setuptools
	$(RAY)/bin/python $(PIP) -c constraints-ray.txt --no-build-isolation -e '.[ray]'
	touch $@

clean:
	rm -rf $(VENV) build dist ./*.egg-info
