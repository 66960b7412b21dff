# Two commands: `make demo` and `make test`. Each installs its environment first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt
NOT_INSTALLED := { echo "pip failed; behind a proxy, set HTTPS_PROXY=http://host:port"; exit 1; }
DEMO := demo
RESULTS := benchmarks/results
# Duration of make prove PART=soak
MINUTES := 30
PROOFS := mutations dashboards dask files fleet frameworks images oldest ray slurm soak tune verify view
OLDEST := $(VENV)/oldest
DASHBOARDS := $(VENV)/dashboards
SITE := import sysconfig; print(sysconfig.get_path("purelib"))
SLEAP := $(VENV)/parity/sleap-nn

# The tests import ONNX Runtime directly; chunkq also sets this variable.
export ORT_DISABLE_TELEMETRY := 1
# Install into the virtual environment, whatever the user's pip.conf says.
export PIP_USER := 0
# No proxy for the servers that run on this machine.
comma := ,
export no_proxy := $(addsuffix $(comma),$(or $(no_proxy),$(NO_PROXY)))localhost,127.0.0.1,::1
export NO_PROXY := $(no_proxy)

.PHONY: help demo digits check test prove fuzz parity lint dist docs containers bench picture clean

help:
	@echo "make demo    install, run the brain demo, show the result (first time: minutes)"
	@echo "make digits  install, classify a folder of handwritten digits, show the accuracy"
	@echo "make check   lint, types and the tests without a server (2 minutes)"
	@echo "make test    install all requirements of the tests, check and test all (12 minutes)"
	@echo "make prove PART=NAME  a longer proof: $(PROOFS)"
	@echo "make fuzz    mutated job files and damaged jobs (10 minutes)"
	@echo "make parity  write the inputs of other tools for the tests again, read outputs (10 minutes)"
	@echo "make bench   run all benchmarks and write benchmarks/RESULTS.md (an hour)"
	@echo "make containers  run a job in containers, if an engine has the images of deploy/compose"
	@echo "make dist    build the wheel and the sdist, check them, run the demo with the wheel alone"
	@echo "make docs    build the documentation into site/, check its links (first time: a minute)"
	@echo "make clean   remove the environment, the demo's files, the packages and the documentation"

$(VENV)/made:
	@command -v $(PYTHON) >/dev/null || \
	  { echo "$(PYTHON) is missing; install Python 3.11 or newer, or run make PYTHON=…"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is too old; install Python 3.11 or newer and run make PYTHON=python3.11"; \
	    exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) has no venv; on Debian and Ubuntu run apt-get install python3-venv"; exit 1; }
	@echo "creating a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/demo-installed: $(VENV)/made pyproject.toml constraints.txt
	@echo "installing chunkq, ONNX Runtime and matplotlib (downloads 107 MB, 420 MB on disk)"
	@$(INSTALL) --editable '.[demo]' || $(NOT_INSTALLED)
	@touch $@

# In a separate folder: only nilearn's data files are needed, without its dependencies.
$(VENV)/template/made: $(VENV)/made constraints.txt
	@echo "downloading the brain template (nilearn's data files, 12 MB)"
	@$(INSTALL) --no-deps --upgrade --target $(VENV)/template nilearn || $(NOT_INSTALLED)
	@touch $@

# In a separate folder: only scikit-learn's file of digits is needed, without its dependencies.
$(VENV)/digits/made: $(VENV)/made constraints.txt
	@echo "downloading handwritten digits (scikit-learn's data files, 9 MB)"
	@$(INSTALL) --no-deps --upgrade --target $(VENV)/digits scikit-learn || $(NOT_INSTALLED)
	@touch $@

$(VENV)/digits-installed: $(VENV)/made pyproject.toml constraints.txt
	@echo "installing chunkq, ONNX Runtime, Pillow and pyarrow (downloads 150 MB, 400 MB on disk)"
	@$(INSTALL) --editable '.[onnx,images]' || $(NOT_INSTALLED)
	@touch $@

$(VENV)/dist-installed: $(VENV)/made constraints.txt
	@echo "installing build, hatchling and twine (downloads 8 MB, 36 MB on disk)"
	@$(INSTALL) build hatchling twine || $(NOT_INSTALLED)
	@touch $@

$(VENV)/docs-installed: $(VENV)/made pyproject.toml constraints.txt
	@echo "installing chunkq and what builds the documentation (downloads 113 MB, 480 MB on disk)"
	@$(INSTALL) --editable '.[docs]' || $(NOT_INSTALLED)
	@touch $@

$(VENV)/test-installed: $(VENV)/made pyproject.toml constraints.txt
	@echo "installing chunkq and all requirements of the tests (downloads 3.3 GB, 7.2 GB on disk)"
	@$(INSTALL) --editable '.[test]'
	@touch $@

# The queue is in the temporary folder: a checkout may be on NFS, where SQLite cannot lock.
demo: $(VENV)/demo-installed $(VENV)/template/made
	@echo "1. the volume: the MNI152 head template as OME-Zarr"
	@PYTHONPATH=$(VENV)/template $(BIN)/python examples/brain/prepare.py $(DEMO)/brain.zarr
	@echo "2. the cost of the job"
	@$(BIN)/chunkq plan examples/brain/job.yaml -i $(DEMO)/brain.zarr -o $(DEMO)/tissues.zarr
	@echo "3. the job: 8 chunks, 2 workers, the embedded queue"
	@queue=$$(mktemp -d) && trap 'rm -rf "$$queue"' EXIT && \
	  $(BIN)/chunkq run examples/brain/job.yaml -i $(DEMO)/brain.zarr -o $(DEMO)/tissues.zarr \
	  -w 2 --queue "sqlite://$$queue/queue.db"
	@echo "4. the score"
	@$(BIN)/python examples/brain/score.py $(DEMO)/tissues.zarr $(DEMO)/brain.zarr \
	  $(DEMO)/brain_truth.zarr $(DEMO)/tissues.png
	@echo "picture: $(DEMO)/tissues.png"

digits: $(VENV)/digits-installed $(VENV)/digits/made
	@echo "1. the images: handwritten digits as PNG files, one of them broken"
	@PYTHONPATH=$(VENV)/digits $(BIN)/python examples/digits/prepare.py $(DEMO)/digits
	@echo "2. the job: 13 chunks of 64 images, 2 workers, the embedded queue"
	@queue=$$(mktemp -d) && trap 'rm -rf "$$queue"' EXIT && \
	  $(BIN)/chunkq run examples/digits/job.yaml -i $(DEMO)/digits -o $(DEMO)/digits.csv \
	  -w 2 --queue "sqlite://$$queue/queue.db"
	@echo "table: $(DEMO)/digits.csv"

lint: $(VENV)/test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Groups of tests, longest first: see tests/harness/groups.py.
PYTEST := $(BIN)/python -m pytest -n 2

# What is tested of the queues without a server.
EXECUTOR_PARTS := contract attempts failures blocks messages model sqlite

check: lint
	$(PYTEST) -m "not server" tests/unit benchmarks/tests \
	  $(addprefix tests/contract/test_executor_,$(addsuffix .py,$(EXECUTOR_PARTS)))

# Tests wait for leases and servers a third of their time, so there is one process more than cores.
test: lint $(VENV)/digits/made
	$(PYTEST) -n 3 --durations-file=$(VENV)/durations.json

# The lowest versions that pyproject.toml allows, in a separate environment.
$(OLDEST)/installed: $(VENV)/made pyproject.toml constraints-oldest.txt
	@echo "installing the lowest versions (downloads 3.3 GB, 7 GB on disk)"
	@$(PYTHON) -m venv $(OLDEST)
	@$(OLDEST)/bin/python -m pip --disable-pip-version-check install --quiet \
	  --constraint constraints-oldest.txt --editable '.[torch,onnx,redis,dask]' tensorflow-cpu keras h5py \
	  onnx hypothesis pytest pytest-timeout pytest-xdist || $(NOT_INSTALLED)
	@touch $@

# The pages of Dask and Ray with plots, beside the environment of the tests.
$(DASHBOARDS)/installed: $(VENV)/test-installed
	@echo "installing bokeh and ray[default] (94 MB on disk)"
	@$(PYTHON) -m venv $(DASHBOARDS)
	@echo "import site; site.addsitedir('$$($(BIN)/python -c '$(SITE)')')" \
	  > "$$($(DASHBOARDS)/bin/python -c '$(SITE)')/tests.pth"
	@$(DASHBOARDS)/bin/python -m pip --disable-pip-version-check install --quiet \
	  --constraint constraints.txt bokeh 'ray[default]' || $(NOT_INSTALLED)
	@touch $@

prove: $(VENV)/test-installed $(if $(filter dashboards,$(PART)),$(DASHBOARDS)/installed) $(if $(filter oldest,$(PART)),$(OLDEST)/installed)
	@test -n "$(filter $(PART),$(PROOFS))" || { echo "make prove PART=NAME: $(PROOFS)"; exit 1; }
	@if [ "$(PART)" = mutations ]; then \
	  $(BIN)/python -m tests.prove.mutations --json $(RESULTS)/mutations.json; \
	elif [ "$(PART)" = soak ]; then \
	  $(BIN)/python -m tests.fuzz.soak --minutes $(MINUTES) --json $(RESULTS)/soak.json; \
	elif [ "$(PART)" = oldest ]; then \
	  $(OLDEST)/bin/python -m pytest tests/integration/test_model_files.py \
	    --durations-file=$(RESULTS)/proof_oldest.json; \
	elif [ "$(PART)" = dashboards ]; then \
	  $(DASHBOARDS)/bin/python -m pytest --proof=dashboards \
	    --durations-file=$(RESULTS)/proof_dashboards.json; \
	else \
	  $(PYTEST) --proof=$(PART) --durations-file=$(RESULTS)/proof_$(PART).json; \
	fi

fuzz: $(VENV)/test-installed
	$(BIN)/python -m tests.fuzz --json $(RESULTS)/fuzz.json

# Each tool in an environment of its own.
parity: $(VENV)/test-installed
	@for tool in $$(cat tests/fixtures/requirements.txt); do \
	  name=$${tool%%[=[]*}; \
	  $(PYTHON) -m venv $(VENV)/parity/$$name && \
	  $(VENV)/parity/$$name/bin/python -m pip --disable-pip-version-check install --quiet "$$tool" && \
	  $(VENV)/parity/$$name/bin/python tests/fixtures/write_inputs.py $$name || exit 1; \
	done
	$(BIN)/python tests/fixtures/read_outputs.py $(VENV)/parity
	@$(PYTHON) -m venv $(VENV)/parity/duckdb && \
	  $(VENV)/parity/duckdb/bin/python -m pip --disable-pip-version-check install --quiet duckdb==2.0.0
	$(BIN)/python -m tests.parity.read_tables $(VENV)/parity/duckdb/bin/python
	@echo "installing sleap-nn, which needs Python below 3.14 (7 GB on disk), and training tiny models"
	@$(PYTHON) -m venv $(SLEAP) && \
	  $(SLEAP)/bin/python -m pip --disable-pip-version-check install --quiet 'sleap-nn[export]==0.3.5' \
	  --editable '.[images,video]' || $(NOT_INSTALLED)
	@for part in models fixture jobs; do \
	  OMP_NUM_THREADS=1 $(SLEAP)/bin/python tests/parity/sleap_$$part.py $(VENV)/parity/sleap-models || exit 1; \
	done

containers: $(VENV)/test-installed
	$(BIN)/python -m pytest tests/containers/test_compose_up.py

# One part: make bench PARTS=network
PARTS := network startup hotpath borders workers images predictions planning queues queue_scale gpu

bench: $(VENV)/test-installed
	@mkdir -p $(RESULTS)
	@for part in $(PARTS); do \
	  echo "$$part"; \
	  $(BIN)/python -W ignore benchmarks/$$part.py --json $(RESULTS)/$$part.json || exit 1; \
	done
	@$(BIN)/python benchmarks/scale.py --measured $(RESULTS) --json $(RESULTS)/scale.json \
	  --plot $(RESULTS)/scale.png
	@$(BIN)/python benchmarks/results.py $(RESULTS)

dist: $(VENV)/dist-installed
	@rm -rf dist
	@$(BIN)/python -m build --no-isolation
	@$(BIN)/python -m twine check --strict dist/*
	@missing=$$(git ls-files 2>/dev/null | grep -vxF "$$(tar tzf dist/*.tar.gz | sed 's,^[^/]*/,,')"); \
	  test -z "$$missing" || \
	  { echo "missing in the sdist: $$missing; add them to include in pyproject.toml"; exit 1; }
	@echo "the demo with the wheel alone, in a new environment"
	@.ci/try-wheel $(BIN)/python dist/*.whl

# Warnings, such as a link to a page or heading that does not exist, are errors.
docs: $(VENV)/docs-installed
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "documentation: site/index.html; with search: $(BIN)/python -m http.server --directory site"

picture: demo
	cp $(DEMO)/tissues.png docs/images/brain.png

clean:
	rm -rf $(VENV) $(DEMO) dist site
