# Every target does its own set-up: `make help` lists them.
SHELL      := /bin/bash
PYTHON     ?= python3
PROFILE    ?= phantom
FETCH      ?= 0
RUN        ?= 0
VENV       := .venv
BIN        := $(VENV)/bin
INSTALLED  := $(VENV)/.installed
OUT        := runs/$(PROFILE)
WHEEL      := $(abspath build)/wheel
QUICK      := tests/test_cohort_properties.py tests/test_evaluation_reference.py tests/test_layout.py tests/test_tools.py
# the defaults of the notebook are the phantom profile; any other profile is passed with -f
PARAMETERS := $(if $(filter phantom,$(PROFILE)),,-f profiles/$(PROFILE).yaml)

.DEFAULT_GOAL := help
.PHONY: help reproduce test quick lint wheel lab site bench clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 20

$(INSTALLED): settings.ini setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "her2_mil needs Python 3.10 or newer; set PYTHON=python3.11, say.")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

reproduce: $(INSTALLED)  ## run the study (PROFILE=phantom, paper or tcga), print its table, write its report
	@mkdir -p $(OUT) && touch $(OUT)/log.txt
	$(if $(filter tcga,$(PROFILE)),@FETCH=$(FETCH) $(BIN)/python tools/tcga.py)
	@echo "papermill nbs/reproduce.ipynb -> $(OUT), stage by stage:"
	@tail -n 0 -f $(OUT)/log.txt & watch=$$!; \
	$(BIN)/papermill nbs/reproduce.ipynb $(OUT)/reproduce.failed.ipynb -k python3 --no-progress-bar $(PARAMETERS) </dev/null; \
	status=$$?; kill $$watch; \
	test $$status = 0 || { echo "The run failed; $(OUT)/reproduce.failed.ipynb shows where, $(OUT)/failures.csv which slides."; exit $$status; }
	@mv $(OUT)/reproduce.failed.ipynb $(OUT)/reproduce.ipynb
	@$(BIN)/python tools/report.py $(OUT)/reproduce.ipynb $(OUT)/report.html

test: export OMP_NUM_THREADS = 1
test: export MPLBACKEND = agg
test: $(INSTALLED) lint  ## run every notebook, pytest, and check that export, clean and README are up to date
	$(BIN)/python tools/check.py
	$(BIN)/nbdev_test --n_workers 2 --timing
	$(BIN)/python -m pytest -n 2 --dist loadfile tests

lint: $(INSTALLED)  ## check the style that ruff can see
	$(BIN)/ruff check .
	$(BIN)/ruff format --check tests tools benchmarks

quick: export OMP_NUM_THREADS = 1
quick: export MPLBACKEND = agg
quick: $(INSTALLED) lint  ## what needs no slide, in less than a minute: tables, folds, metrics, layout
	$(BIN)/python -m pytest -q -m 'not slow' $(QUICK)

wheel: $(INSTALLED)  ## build the wheel, and run a tiny study with it away from the repository
	rm -rf dist $(WHEEL)
	$(BIN)/python -m pip wheel --quiet --no-deps -w dist .
	$(BIN)/python -m pip install --quiet --no-deps --target $(WHEEL)/lib dist/*.whl
	cp tools/smoke.py $(WHEEL)
	cd $(WHEEL) && PYTHONPATH=$(WHEEL)/lib $(abspath $(BIN))/python lib/bin/her2_mil_score --help >help.txt
	cd $(WHEEL) && PYTHONPATH=$(WHEEL)/lib $(abspath $(BIN))/python smoke.py $(WHEEL)/study

lab: $(INSTALLED)  ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab --notebook-dir nbs

site: $(INSTALLED)  ## render the Quarto site into _site from what is committed (RUN=1 runs the study first)
	@PATH="$(abspath $(BIN)):$$PATH" bash -c 'command -v quarto' >/dev/null || $(BIN)/pip install --quiet quarto-cli || { \
	  echo "make site needs Quarto, and PyPI's quarto-cli, which downloads it, could not be installed: install Quarto 1.7 or newer"; \
	  echo "from https://quarto.org/docs/get-started, put it on the PATH, and call make site again."; exit 1; }
ifeq ($(RUN),1)
	$(MAKE) reproduce
	cp $(OUT)/reproduce.ipynb nbs/reproduce.ipynb
	$(BIN)/nbdev_clean --fname nbs/reproduce.ipynb
endif
	rm -rf _proc _site
	touch README.md
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/nbdev_docs

bench: $(INSTALLED)  ## measure speed against the usual way (ONLY=name for one line)
	$(BIN)/python benchmarks/run.py $(ONLY)

clean:  ## remove the environment, runs, caches and rendered pages
	rm -rf $(VENV) _proc _site runs cache build dist *.egg-info nbs/nbdev.yml
