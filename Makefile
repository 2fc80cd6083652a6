# The two commands: `make quickstart` tunes the built-in model, `make test` runs the tests. Each fills .venv first where it is missing or old.
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: quickstart test lint tiny

quickstart: $(STAMP)
	$(BIN)/nemotune run quickstart --overwrite

# One thread a worker: the tests are small, and two workers with two threads each would fight for two cores.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 4 --dist worksteal

# Makes the built-in model and the quickstart's rows anew: about forty minutes on one core.
tiny: $(STAMP)
	$(BIN)/python -m scripts.make_tiny

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

$(STAMP): pyproject.toml constraints.txt scripts/setup
	scripts/setup
	touch $@
