# The two commands: `make tour` trains a model, `make test` runs every test. Both build what they need in .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check --quiet
ARGS ?=
# A finished environment holds a stamp named after what it was made from. By content and not by time, because nbdev-export
# writes pyproject.toml anew each time.
READY := $(VENV)/ready-$(shell cat pyproject.toml setup.py constraints.txt | cksum | tr ' ' '-')

.DEFAULT_GOAL := help
.PHONY: help tour test browser bench bounds reproduce notebooks export lint readme clean

help: ## Show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-10s %s\n", $$1, $$2}'

tour: $(READY) ## Train a language model on real text, about five minutes; ARGS="--minutes 10 --data python-docs"
	@$(BIN)/lmtrain tour $(ARGS)

test: $(READY) ## Run all tests; ARGS="-k batch" for some of them
	@echo "Running the tests ..."
	@$(BIN)/python -m pytest $(ARGS)

browser: $(READY)-browser ## Run the labs in Chromium, JupyterLab and Voila; Debian: apt install chromium
	@$(BIN)/python -m pytest -m browser $(ARGS)

bench: $(READY) ## Measure speed beside transformers' Trainer, about an hour on a quiet machine
	@$(BIN)/python -m benchmarks.speed --compile
	@$(BIN)/python -m benchmarks.time_to_loss
	@$(BIN)/python -m benchmarks.masking
	@$(BIN)/python -m benchmarks.memory

bounds: $(READY) ## Run the tests with the lowest versions allowed and with the newest, about an hour; ARGS="--only lowest"
	@$(BIN)/python -m benchmarks.bounds $(ARGS)

reproduce: $(READY) ## Measure the claims of papers again, about half an hour; ARGS="--seeds 5"
	@$(BIN)/lmtrain reproduce --all --out data/results --page docs/results $(ARGS)

notebooks: $(READY) export ## Run the notebooks and keep their outputs
	@$(BIN)/nbdev-test --n-workers 0 --save --do-print
	@$(BIN)/nbdev-clean
	@$(BIN)/python docs/readme.py

export: $(READY) ## Write the notebooks' code to lmtrain/
	@$(BIN)/nbdev-export

lint: $(READY) ## Check style and types
	@$(BIN)/ruff check lmtrain tests docs benchmarks setup.py
	@$(BIN)/mypy

readme: $(READY) ## Write README.md from nbs/index.ipynb
	@$(BIN)/python docs/readme.py

clean: ## Remove the environment and what was built or trained
	rm -rf $(VENV) build dist *.egg-info tour .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The stamp is written last, so an interrupted set-up starts again.
$(READY):
	@$(PYTHON) -c 'import sys; sys.exit("lmtrain needs Python 3.11 or later: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	@echo "Setting up $(VENV), once: PyTorch and about a hundred packages, a few minutes and 2 GB ..."
	@$(PYTHON) -m venv --clear $(VENV) || { echo "python's venv module is missing: on Debian, apt install python3-venv"; exit 1; }
	@$(PIP) install -c constraints.txt torch setuptools wheel
	@echo "  PyTorch is in; now the rest ..."
	@$(PIP) install -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@
	@echo "  done."

$(READY)-browser: $(READY)
	@$(PIP) install -c constraints.txt --no-build-isolation -e '.[dev,lab,browser]'
	@touch $@
