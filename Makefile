# Everything runs in .venv inside the project; nothing is installed globally.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet
UV     := $(BIN)/uv

.DEFAULT_GOAL := help
.PHONY: help demo test lint format generate wrong-manifests cluster-binaries lock clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

# One stamp per lock file: an environment is rebuilt exactly when its lock changes.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Pointsman needs Python 3.11 or newer; set PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python locks/demo.txt pyproject.toml
	$(PIP) install --require-hashes -r locks/demo.txt
	$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.demo locks/dev.txt
	$(PIP) install --require-hashes -r locks/dev.txt
	@touch $@

demo: $(VENV)/.demo  ## Compare six deciders on six simulated experts through a real Envoy
	$(BIN)/pointsman demo $(ARGS)

test: $(VENV)/.dev lint  ## Lint, type check and all tests, with coverage
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest $(ARGS)
	@$(BIN)/python -m coverage combine --quiet
	@$(BIN)/python -m coverage report

lint: $(VENV)/.dev  ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev  ## Format and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

generate: $(VENV)/.dev  ## Regenerate crds/, docs/crds.md and the gRPC stubs
	$(BIN)/pointsman generate-crds crds
	$(BIN)/pointsman generate-docs docs/crds.md
	$(BIN)/python -m grpc_tools.protoc -Iproto --python_out=proto --pyi_out=proto --grpc_python_out=proto proto/pointsman_proto/v1/pointsman.proto

wrong-manifests: $(VENV)/.dev  ## Rewrite docs/wrong-manifests.md from the API server's answers
	POINTSMAN_REWRITE_DOCS=1 $(BIN)/python -m pytest -q tests/integration/operator/test_wrong_manifests.py -k the_api_server_says

cluster-binaries: $(BIN)/python  ## Build etcd, kube-apiserver and kubectl for the tests, outside the repository
	$(BIN)/python tests/cluster/control_plane/binaries.py $(ARGS)

lock: $(BIN)/python  ## Resolve the lock files anew
	$(PIP) install uv
	$(UV) pip compile --quiet --universal --generate-hashes --no-header --no-emit-index-url --python-version 3.11 --extra dev pyproject.toml locks/build.in -o locks/dev.txt
	$(UV) pip compile --quiet --universal --generate-hashes --no-header --no-emit-index-url --python-version 3.11 --extra demo -c locks/dev.txt pyproject.toml locks/build.in -o locks/demo.txt

clean:  ## Remove the environment and all caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .coverage* htmlcov demo-output
