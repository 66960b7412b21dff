# Two commands do everything: `make demo` and `make test`. Each makes its own environment first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt
DEMO := demo
PROOFS := mutations leases crashes

.PHONY: help demo check test prove lint containers bench picture clean

help:
	@echo "make demo    install, run the brain demo, show what came out (first time: minutes)"
	@echo "make check   lint, types and the tests without a server (2 minutes)"
	@echo "make test    install all that the tests need, check and test everything (12 minutes)"
	@echo "make prove PART=NAME  a longer proof: $(PROOFS)"
	@echo "make bench   measure all that benchmarks/RESULTS.md says, and write that (an hour)"
	@echo "make containers  run a job in containers, where an engine has the images of deploy/compose"
	@echo "make clean   remove the environment and the demo's files"

$(VENV)/made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "chunkq needs Python 3.11 or newer; name one: make PYTHON=python3.12"; exit 1; }
	@echo "making a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { echo "on Debian: apt-get install python3-venv"; exit 1; }
	@touch $@

$(VENV)/demo-installed: $(VENV)/made pyproject.toml constraints.txt
	@echo "installing chunkq, torch and what the demo draws with (about 250 MB, some minutes)"
	@$(INSTALL) --editable '.[demo]'
	@touch $@

# Beside the environment, not in it: only nilearn's data files are wanted, and none of its needs.
$(VENV)/template/made: $(VENV)/made constraints.txt
	@echo "fetching the brain template (nilearn's data files, 12 MB)"
	@$(INSTALL) --no-deps --upgrade --target $(VENV)/template nilearn
	@touch $@

$(VENV)/test-installed: $(VENV)/made pyproject.toml constraints.txt
	@echo "installing chunkq, torch and what the tests need (about 600 MB, some minutes)"
	@$(INSTALL) --editable '.[test]'
	@touch $@

demo: $(VENV)/demo-installed $(VENV)/template/made
	@echo "1. the volume: the MNI152 head template as OME-Zarr"
	@PYTHONPATH=$(VENV)/template $(BIN)/python examples/brain/prepare.py $(DEMO)/brain.zarr
	@echo "2. what the job will cost"
	@$(BIN)/chunkq plan examples/brain/job.yaml -i $(DEMO)/brain.zarr -o $(DEMO)/tissues.zarr
	@echo "3. the job: 8 chunks, 2 workers, the embedded queue"
	@$(BIN)/chunkq run examples/brain/job.yaml -i $(DEMO)/brain.zarr -o $(DEMO)/tissues.zarr \
	  -w 2 --queue sqlite://$(CURDIR)/$(DEMO)/queue.db
	@echo "4. how good it is"
	@$(BIN)/python examples/brain/score.py $(DEMO)/tissues.zarr $(DEMO)/brain.zarr \
	  $(DEMO)/brain_truth.zarr $(DEMO)/tissues.png
	@echo "picture: $(DEMO)/tissues.png"

lint: $(VENV)/test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Groups of tests, the longest first: tests/harness/groups.py.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder

check: lint
	$(PYTEST) -m "not server" tests/unit benchmarks/tests tests/contract/test_executor_contract.py \
	  tests/contract/test_executor_model.py tests/contract/test_executor_sqlite.py

test: lint
	$(PYTEST) --durations-file $(VENV)/durations.json

prove: $(VENV)/test-installed
	@test -n "$(filter $(PART),$(PROOFS))" || { echo "make prove PART=NAME: $(PROOFS)"; exit 1; }
	$(BIN)/python -m tests.prove.$(PART) --json benchmarks/results/$(PART).json

containers: $(VENV)/test-installed
	$(BIN)/python -m pytest tests/containers/test_compose_up.py

# One part alone: make bench PARTS=network
RESULTS := benchmarks/results
PARTS := network hotpath borders workers predictions planning queues queue_scale gpu

bench: $(VENV)/test-installed
	@mkdir -p $(RESULTS)
	@for part in $(PARTS); do \
	  echo "$$part"; \
	  $(BIN)/python -W ignore benchmarks/$$part.py --json $(RESULTS)/$$part.json || exit 1; \
	done
	@$(BIN)/python benchmarks/scale.py --measured $(RESULTS) --json $(RESULTS)/scale.json \
	  --plot $(RESULTS)/scale.png
	@$(BIN)/python benchmarks/results.py $(RESULTS)

picture: demo
	cp $(DEMO)/tissues.png docs/images/brain.png

clean:
	rm -rf $(VENV) $(DEMO)
