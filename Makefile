# Everything a developer runs. `make run` and `make test` need only Python 3.11, make and this tree.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(shell command -v uv 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help run test test-fast check format bench bench-peers drill lock clean

help: ## what there is
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 14

run: $(VENV)/run.stamp ## start the sidecar on config.yaml, with the embedded provider behind it
	@exec $(BIN)/sidecar run --config config.yaml

test: $(VENV)/dev.stamp ## all tests
	$(BIN)/python -m pytest -n 2 -q

test-fast: $(VENV)/dev.stamp ## the tests that start no process
	$(BIN)/python -m pytest -n 2 -q --ignore tests/test_process.py --ignore tests/test_server.py \
	  --ignore tests/test_reload.py --ignore tests/test_cli.py --ignore tests/test_drill.py

check: $(VENV)/dev.stamp ## format, lint, types
	$(BIN)/ruff format --check -q sidecar filters bench drill tests
	$(BIN)/ruff check -q sidecar filters bench drill tests
	$(BIN)/mypy

format: $(VENV)/dev.stamp ## mend what can be mended
	$(BIN)/ruff format -q sidecar filters bench drill tests
	$(BIN)/ruff check -q --fix sidecar filters bench drill tests

bench: $(VENV)/dev.stamp ## measure against nginx and Envoy; writes bench/RESULTS.md (7 minutes)
	$(BIN)/python -m bench

bench-peers: $(VENV)/dev.stamp ## LiteLLM and Portkey, to measure beside it: 750 MB in bench/.tools
	$(BIN)/python -m bench.peers

drill: $(VENV)/dev.stamp ## faults for a minute: a provider that fails and falls, a store that restarts
	$(BIN)/python -m drill

lock: ## pin all dependencies again, with hashes and without addresses (needs uv)
	printf 'hatchling==1.33.0\neditables==0.6\n' > requirements/build.in
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	  --no-header --extra redis --extra tokens --extra bloom pyproject.toml requirements/build.in -o requirements/run.txt
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	  --no-header --extra redis --extra tokens --extra bloom --extra semantic --extra dev pyproject.toml requirements/build.in -o requirements/dev.txt
	rm requirements/build.in

clean: ## remove what was made here
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis bench/.tools

# The environment. `run` holds what the sidecar needs, `dev` also what its tests need.
$(VENV)/made.stamp:
ifneq ($(UV),)
	uv venv -q --allow-existing --python $(PYTHON) $(VENV)
else
	$(PYTHON) -m venv $(VENV)
endif
	@touch $@

$(VENV)/run.stamp: requirements/run.txt pyproject.toml | $(VENV)/made.stamp
	$(call install,requirements/run.txt)
	@touch $@

$(VENV)/dev.stamp: requirements/dev.txt pyproject.toml | $(VENV)/made.stamp
	$(call install,requirements/dev.txt)
	@touch $@ $(VENV)/run.stamp

define install
	@echo "installing $(1)"
	@$(if $(UV),VIRTUAL_ENV=$(VENV) uv pip install -q,$(BIN)/python -m pip install -q --disable-pip-version-check) --require-hashes -r $(1)
	@$(if $(UV),VIRTUAL_ENV=$(VENV) uv pip install -q,$(BIN)/python -m pip install -q --disable-pip-version-check) --no-deps --no-build-isolation -e .
endef
