# `make demo` and `make test` need python3 and make; they set up .venv on the first call.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Files in the order of tests/conftest.py, the slowest first: else one process ends with them alone.
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder

# A smaller job on the newest transformers: the parts that a new release has broken before.
NEWEST := .venv-newest
NEWEST_INSTALLED := $(NEWEST)/.installed
NEWEST_TESTS := tests/test_compat.py tests/test_documents.py tests/model/test_backbones.py \
	tests/model/language_model/test_alternating.py tests/model/test_llava_arch.py tests/model/test_generation.py \
	tests/model/test_loading.py tests/train/test_training.py tests/train/test_checkpoint.py

# Tests start hundreds of processes, and both jobs have files of tests in common: what one has compiled, all read.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install install-newest install-web demo picture demo-grounding test test-newest fuzz lint types docs clean

help: ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

install: $(INSTALLED) ## create .venv with everything that demo and test need

# torch comes first and alone: by its pin it is a CPU build where one is offered locally, and packages
# that want "any torch" must find it there rather than fetch another.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[deepspeed,lora,kbit,dev]'
	touch $@

demo: $(INSTALLED) ## train a tiny model that describes videos in Italian
	$(BIN)/python -m llava.demo

picture: demo ## make the picture of the README, docs/demo.png
	cp demo_output/captions.png docs/demo.png

demo-grounding: $(INSTALLED) ## train a tiny model that says where in a picture and when in a video
	$(BIN)/python -m llava.demo.grounding

test: $(INSTALLED) lint types ## lint, type checks and tests
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest $(PARALLEL)

# Made anew when a pin changes: constraints.txt with the lines of constraints-newest.txt in place of its own.
$(NEWEST_INSTALLED): pyproject.toml constraints.txt constraints-newest.txt
	test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	grep -v -E "^($$(sed -n 's/==.*//p' constraints-newest.txt | paste -sd '|' -))==" constraints.txt > $(NEWEST)/constraints.txt
	cat constraints-newest.txt >> $(NEWEST)/constraints.txt
	$(NEWEST)/bin/pip install --quiet --disable-pip-version-check --constraint $(NEWEST)/constraints.txt torch
	$(NEWEST)/bin/pip install --quiet --disable-pip-version-check --constraint $(NEWEST)/constraints.txt \
		--editable '.[lora]' pytest pytest-xdist
	touch $@

install-newest: $(NEWEST_INSTALLED) ## create .venv-newest, for test-newest

# The page of `llava serve`: Gradio, and what its tests are driven with. It takes an older Pillow than constraints.txt.
install-web: $(INSTALLED) ## add to .venv what the page of llava serve and its tests need
	grep -v -E "^($$(sed -n 's/==.*//p' constraints-web.txt | paste -sd '|' -))==" constraints.txt > $(VENV)/constraints-web.txt
	cat constraints-web.txt >> $(VENV)/constraints-web.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint $(VENV)/constraints-web.txt \
		--editable '.[web]' openai playwright

test-newest: $(NEWEST_INSTALLED) ## some of the tests on the newest transformers (constraints-newest.txt)
	PATH="$(abspath $(NEWEST)/bin):$$PATH" $(NEWEST)/bin/python -m pytest $(PARALLEL) $(NEWEST_TESTS)

# Of tests/fuzz, all cases: CI runs a slice of them. Failures are kept in .hypothesis and tried first the next time.
fuzz: $(INSTALLED) ## 23,000 cases of hostile input, in some minutes
	$(BIN)/python -m pytest -p tests.fuzz.fuzzing --hypothesis-profile offline $(PARALLEL) tests/fuzz

lint: $(INSTALLED) ## ruff and shellcheck
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck train_italian_video.sh llava/train/slurm/train.sbatch .ci/run

types: $(INSTALLED) ## mypy
	$(BIN)/mypy

docs: $(INSTALLED) ## write docs/models.md, docs/flags.md and docs/commands.md from the code
	$(BIN)/python -m llava.inspect.models > docs/models.md
	$(BIN)/python -m llava.inspect.flags > docs/flags.md
	$(BIN)/python -m llava.inspect.commands > docs/commands.md

clean: ## remove .venv and what demo and tests left
	rm -rf $(VENV) $(NEWEST) demo_output demo_grounding_output .pytest_cache .hypothesis .mypy_cache .ruff_cache
