# Every command of this repository. `make help` lists them; each one sets up what it needs and is quick when repeated.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := $(wildcard appo components pipelines tests benchmarks)
# Without bytecode every process compiles torch, transformers and vLLM again: 16 s each.
unexport PYTHONDONTWRITEBYTECODE
# Nothing here asks a model hub: the demo's model is made on the spot.
export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test quick soak lint format gpu-check gpu-check-bundle ui golden k8s-check images images-check clean

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /  make \1\t/' | expand -t 20

setup: $(READY) ## the virtual environment with the locked packages (once; about two minutes)

$(READY): requirements/cpu.lock requirements/cpu_shims.py requirements/install pyproject.toml
	@echo "Setting up $(VENV): 280 locked packages, about two minutes, once."
	@rm -f $@
	@requirements/install $(VENV) requirements/cpu.lock
	@$(BIN)/python -m pip install -qq --no-deps --no-build-isolation --disable-pip-version-check -e .
	@touch $@

demo: $(READY) ## the whole pipeline on this machine: videos, GRPO, DAPO, APPO, vLLM evaluation, comparison
	@$(BIN)/appo pipeline run --recipe demo

test: $(READY) ## import contracts and every test
	@$(BIN)/lint-imports --no-cache >/tmp/lint-imports.$$$$.log 2>&1 || { cat /tmp/lint-imports.$$$$.log; exit 1; }; rm -f /tmp/lint-imports.$$$$.log
	@$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

quick: $(READY) ## the tests that need neither training nor engines nor servers
	@$(BIN)/pytest -n 2 --dist loadfile -m "not slow" $(ARGS)

soak: $(READY) ## random recipes, kills, overrides and packings for APPO_SOAK_MINUTES (10), from APPO_SEED (0); never in CI
	@APPO_SOAK=1 $(BIN)/pytest -n 0 -s -q tests/soak $(ARGS)

lint: $(READY) ## ruff, mypy, import contracts, shell scripts, Dockerfiles
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/shellcheck requirements/install .ci/run docker/build
	$(BIN)/hadolint docker/Dockerfile

format: $(READY) ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

# No environment is made for them: any Python with torch, transformers, accelerate and peft will do.
gpu-check gpu-check-bundle: PYTHON ?= $(BIN)/python
gpu-check: ## on a machine with a GPU (ARGS=--cpu: without): kernels, matrix in bfloat16, memory, speed; PYTHON=...
	@command -v "$(PYTHON)" >/dev/null || { echo "error: $(PYTHON): there is no such Python; name one with PYTHON=..., or run make setup" >&2; exit 2; }
	@$(PYTHON) -m benchmarks.gpu_check $(ARGS)

gpu-check-bundle: ## what gpu-check carries to a machine without network: wheels in build/gpu-check (ARGS="--python 3.12")
	@$(PYTHON) -m benchmarks.gpu_check.bundle $(ARGS)

ui: $(READY) ## MLflow's pages over the demo's runs (http://127.0.0.1:5000)
	@$(BIN)/appo ui

golden: $(READY) ## rewrite the compiled pipelines that the tests compare with
	@$(BIN)/python -m pipelines.compile tests/pipelines/golden

k8s-check: $(READY) ## every overlay builds and validates strictly against the Kubernetes schemas
	@$(BIN)/pytest -q tests/k8s

images: ## the cpu and data images (buildah or docker)
	@docker/build cpu data

images-check: $(READY) ## the built images: compiled steps and a small demo in them (APPO_CONTAINER_RUN: docker run --rm)
	@APPO_CONTAINER_RUN="$${APPO_CONTAINER_RUN:-docker run --rm}" $(BIN)/pytest -q -s --durations=0 tests/docker

clean: ## remove runs, builds and caches (not the environment)
	rm -rf runs build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
