# make demo: the main job on real data. make test: the tests. Both set themselves up in .venv.
PYTHON ?= python3
VENV   ?= .venv
OUT    ?= demo-out
JOBS   ?= 2
KILLS  ?= 240
MINUTES ?= 60
SEED   ?= 0
ROWS   := .pytest_cache/architectures
BIN    := $(VENV)/bin

.PHONY: demo test kill fuzz architectures experiments-tiny lint audit format clean

demo: $(VENV)/.ready
	$(BIN)/merganser demo -o $(OUT) $(DEMO)

test: $(VENV)/.ready
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(JOBS) $(TESTS)

# Kills every command that writes, between any two things that it does to files, and counts what is lost.
kill: $(VENV)/.ready
	PYTHONPATH=tests OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m kill --kills $(KILLS) --seed $(SEED)

# Changed inputs of eighteen kinds (KIND= for one), for MINUTES; what goes wrong is kept in .pytest_cache/fuzz.
fuzz: $(VENV)/.ready
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH=tests $(BIN)/python -m fuzz --minutes $(MINUTES) --seed $(SEED) \
	  $(if $(KIND),--kind $(KIND))

# Merging and collecting on tiny models of every architecture; writes docs/architectures.md.
architectures: $(VENV)/.ready
	rm -rf $(ROWS)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 ARCHITECTURE_ROWS=$(ROWS) $(BIN)/python -m pytest -n $(JOBS) \
	  -m "architectures or not architectures" tests/architectures || failed=$$?; \
	PYTHONPATH=tests $(BIN)/python -m architectures.table $(ROWS) docs/architectures.md; exit $${failed:-0}

# Every named configuration of experiments/ from end to end, with tiny models of the true architectures.
experiments-tiny: $(VENV)/.ready
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(JOBS) -m experiments tests/lab/test_named_configurations.py

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pip check

# Known faults of the versions in constraints.txt. This asks a service on the network, so that CI does not run it.
audit: $(VENV)/.ready
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit
	$(VENV)/audit/bin/pip-audit --no-deps --disable-pip -r constraints.txt $(AUDIT)

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# PyTorch first and by itself, so that nothing else chooses its build.
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "merganser needs Python 3.11 or newer: make PYTHON=python3.12 …" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
