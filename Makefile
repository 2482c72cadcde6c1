# `make help` lists the targets. All of them set the environment up first, which costs nothing when
# it is up to date.
.DEFAULT_GOAL := help
SHELL := /bin/bash

MODEL ?= models/tiny-recall
PORT ?= 8000
PRUNE ?= 0.5
QUANT ?= none
TESTS ?=
WORKERS ?= 2
NAME ?=
PART ?=
ARGS ?=

# Of `make contract`: a release without a CPU build, and what depends on a release.
VLLM ?= 0.33.0
CONTRACT := tests/plugin tests/engine tests/e2e/test_served_pruned.py $(patsubst %,tests/unit/%.py, \
	hooks/test_model_runner hooks/test_requests metrics/test_prometheus scheduler/test_manager \
	scheduler/test_pipeline scheduler/test_prefix scheduler/test_report worker/cpu/test_builder \
	worker/cpu/test_window worker/test_step)

BIN := .venv/bin
BUNDLED := models/tiny-recall
CHART := deploy/helm/think-vllm
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
PYTEST := $(OFFLINE) $(BIN)/python -m pytest
# Two cores, a file on one of them; long ones come first.
SPREAD = -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: help setup serve test test-quick test-all contract fmt lint type model bench bench-load quality-tables image-check gpu-kit gpu-check clean

help: ## Show this list
	@echo "usage: make TARGET [VARIABLE=value ...]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: ## Make .venv and install into it (DEVICE=cpu|cuda, PYTHON=, TORCH_INDEX=)
	@scripts/setup.sh

# The bundled model needs no hub, and no more memory than this; later ARGS win.
IS_BUNDLED = $(filter $(BUNDLED) $(BUNDLED)/ ./$(BUNDLED),$(MODEL))

serve: setup ## Serve MODEL, PRUNE of its key channels pruned, QUANT its format (PORT=, ARGS=)
	$(if $(IS_BUNDLED),HF_HUB_OFFLINE=1 )$(BIN)/think-vllm serve $(MODEL) \
		--kv-channel-prune $(PRUNE) --kv-quant $(QUANT) --port $(PORT) \
		$(if $(IS_BUNDLED),--kv-cache-memory-bytes 268435456) $(ARGS)

# What TESTS names runs whole, on one core.
test: setup ## Run the tests, 15 minutes on 2 cores (TESTS=path, ARGS="-k name", WORKERS=2)
	$(PYTEST) $(if $(TESTS),$(TESTS),$(SPREAD) --tier usual tests) $(ARGS)

test-quick: setup ## Run those without an engine, under 2 minutes (ARGS=, WORKERS=2)
	$(PYTEST) $(SPREAD) --tier quick tests $(ARGS)

test-all: setup ## Run all tests, half an hour (ARGS=, WORKERS=2)
	$(PYTEST) $(SPREAD) tests $(ARGS)

contract: setup ## Run the tests of what vLLM does for us on another vLLM's Python (VLLM=, TESTS=, ARGS=)
	$(BIN)/python -m scripts.other_vllm $(VLLM)
	PYTHONPATH=$(CURDIR)/.vllm/$(VLLM) $(BIN)/python -c \
		"import vllm; assert vllm.__version__ == '$(VLLM)', vllm.__version__"
	PYTHONPATH=$(CURDIR)/.vllm/$(VLLM) $(PYTEST) $(if $(TESTS),$(TESTS),$(SPREAD) $(CONTRACT)) $(ARGS)

fmt: setup ## Format the code and fix what ruff can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: setup ## Check format and style, and files of deployment against their schemas; change nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/hadolint Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec deploy/compose*.yaml
	$(BIN)/check-jsonschema --schemafile $(CHART)/values.schema.json $(CHART)/values.yaml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/kubernetes-validate --strict --no-warn deploy/kubernetes/*.yaml

type: setup ## Check types
	$(BIN)/mypy think_vllm

model: setup ## Train the bundled model again
	$(BIN)/python -m models.recipe.train --out $(BUNDLED) $(ARGS)

bench: setup ## Run a benchmark (NAME=decode, ARGS=); without NAME, list them
ifeq ($(NAME),)
	@echo "usage: make bench NAME=..., where NAME is one of:"
	@grep -l __main__ bench/*.py 2>/dev/null | sed -E 's|bench/(.*)\.py|  \1|' || true
else
	$(OFFLINE) $(BIN)/python -m bench.$(NAME) $(ARGS)
endif

# The default KV cache is small enough for the bundled model to run out of it.
bench-load: setup ## Compare plain vLLM with pruned servers under load (MODEL=, ARGS=)
	$(if $(IS_BUNDLED),$(OFFLINE) )$(BIN)/think-vllm bench $(MODEL) \
		$(if $(IS_BUNDLED),--kv-cache-memory-bytes 20MB) $(ARGS)

quality-tables: setup ## Quality of every configuration on the bundled model, for docs/quality.md (ARGS=)
	$(OFFLINE) $(BIN)/python -m bench.quality_tables $(ARGS)

image-check: setup ## Build the CPU image on a stand-in base, start it, ask it; as root, 5 to 12 minutes (ARGS=--keep)
	$(BIN)/python -m scripts.image_check $(ARGS)

gpu-kit: setup ## Pack vLLM's CUDA build into .kit/, for gpu-check on a machine without an index
	$(BIN)/python -m scripts.gpu_kit.build $(ARGS)

gpu-check: setup ## On a machine with a GPU: test and measure on it, 15 minutes (PART=1|2, ARGS=)
	$(OFFLINE) $(BIN)/python -m bench.gpu_check $(PART) $(ARGS)

clean: ## Remove caches and build output; .venv and the model stay
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
