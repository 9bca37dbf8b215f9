PYTHON ?= python3.11
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow check format bench schema lock clean

help: ## list these targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# Installed once; again when the dependencies change.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' \
		|| { echo 'bahe needs Python 3.11 or 3.12; set PYTHON=/path/to/python3.11'; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable '.[dev]'
	@touch $@

install: .venv/installed ## create .venv with pinned dependencies

demo: install ## MovieLens-100k with SmolLM2-135M: from raw log to scores, with a results table
	@$(BIN)/bahe demo $(ARGS)

test: install ## the tests, in two processes (several minutes on two cores)
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations=15

# Warnings are errors in the default suite; here Ray, moto and Dagster say too many of their own.
test-slow: install ## the tests that take long or download the real language model
	$(BIN)/python -m pytest -m slow -W default -n 2 --dist loadfile --durations=15

check: install ## lint, format, strict types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install ## put the code into the house's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install ## every figure of the README, briefly; a whole one: python -m benchmarks.NAME
	$(BIN)/python -m benchmarks.accuracy --quick
	$(BIN)/python -m benchmarks.training_cost --quick
	$(BIN)/python -m benchmarks.materialize --quick
	$(BIN)/python -m benchmarks.reads --quick
	$(BIN)/python -m benchmarks.frames --quick
	$(BIN)/python -m benchmarks.correctness --quick
	$(BIN)/python -m benchmarks.encode --quick # its peer: pip install 'bahe[bench]'
	$(BIN)/python -m benchmarks.scale --quick
	$(BIN)/python -m benchmarks.crash --quick
	$(BIN)/python -m benchmarks.freshness --quick
	$(BIN)/python -m benchmarks.consistency --quick
	$(BIN)/python -m benchmarks.neighbour --quick
	$(BIN)/python -m benchmarks.serving --quick # of the demo's home

schema: install ## write the JSON schema of dataset.yaml, for editors
	$(BIN)/python -c 'import json; from materialize.config.dataset import json_schema; print(json.dumps(json_schema(), indent=2))' > dataset.schema.json.new
	mv dataset.schema.json.new materialize/config/dataset.schema.json

lock: install ## write constraints.txt from what is installed now
	{ echo "# The versions that were tested together; written by 'make lock'. Used by 'make install'."; \
	  $(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu//' | sort -f; } > constraints.txt.new
	mv constraints.txt.new constraints.txt

clean: ## remove .venv and the demo's home (.bahe); downloads stay cached
	rm -rf .venv .bahe .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info
