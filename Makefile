# `make help` lists what can be made. Needed beforehand: Python 3.11 or newer, make, and a C compiler.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.NOTPARALLEL:

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STEPS := sync lint lessons wheel pytest

# Stamps: a second `make` does not install again, unless the requirements have changed.
MADE := $(VENV)/.made
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
METADATA := settings.ini setup.py
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# ── training ─────────────────────────────────────────────────────────────────────────────

.PHONY: butterflies
butterflies: $(INSTALLED)  ## train the quick butterflies on the embedded set, into outputs/butterflies
	$(BIN)/train-butterflies --preset quick --dataset_name meadow --output_dir outputs/butterflies

# Twice the same training, with and without the class, then one sheet: same prompts, same noise, three models.
PROMPTS := "a photo of a sks butterfly on snow" "a photo of a sks butterfly on night" \
           "a photo of a sks butterfly on sea" "a photo of a butterfly"
.PHONY: dreambooth
dreambooth: $(INSTALLED)  ## teach the embedded model one odd butterfly; the sheet is outputs/dreambooth/comparison.png
	$(BIN)/train-dreambooth --preset quick --output_dir outputs/dreambooth
	$(BIN)/train-dreambooth --preset quick --with_prior_preservation False --fidelity_model none --validation_steps 300 \
	  --output_dir outputs/dreambooth-without-prior
	$(BIN)/generate-images --model_path miniature --compare_to outputs/dreambooth outputs/dreambooth-without-prior \
	  --instance_data_dir meadow --prompt $(PROMPTS) --num_images 4 --num_inference_steps 25 --guidance_scale 5 \
	  --batch_size 16 --output_dir outputs/dreambooth

# Every stage goes on where it was stopped. A finished one ends at once, but for the UNet's, which first encodes the
# pictures again (two minutes on one core); what is measured is measured anew.
.PHONY: miniature
miniature: $(INSTALLED)  ## train the embedded Stable Diffusion from nothing, part by part: hours on two cores
	@for stage in clip autoencoder unet decoder judge eye; do \
	  echo "── $$stage ──"; \
	  $(BIN)/python -m diffusion_lessons.miniature $$stage --resume_from_checkpoint latest || exit; \
	done
	$(BIN)/python -m diffusion_lessons.miniature assemble
	$(BIN)/python -m diffusion_lessons.miniature measure

# ── tests ────────────────────────────────────────────────────────────────────────────────

# Every step runs, also after one that failed, and the summary of pytest comes last.
.PHONY: test
test: $(INSTALLED_DEV)  ## everything that has to hold: the steps below, one after the other
	@failed=; \
	for step in $(STEPS); do \
	  echo "── $$step ──"; SECONDS=0; \
	  $(MAKE) --no-print-directory $$step || failed="$$failed $$step"; \
	  echo "── $$step took $$SECONDS s"; \
	done; \
	if [ -n "$$failed" ]; then echo "make test: failed in$$failed"; exit 1; fi; \
	echo "make test: all of $(STEPS) passed"

.PHONY: sync
sync: $(INSTALLED_DEV)  ## step: modules, links and README are what the notebooks say, and the notebooks are clean
	$(BIN)/python .ci/sync.py

.PHONY: lint
lint: $(INSTALLED_DEV)  ## step: ruff
	$(BIN)/ruff check .

# `nbdev_test` would run the cells in one process without a kernel; this runs each lesson as a reader does.
.PHONY: lessons
lessons: $(INSTALLED_DEV)  ## step: execute copies of all lessons, each in a fresh kernel
	$(BIN)/python tests/execute_notebooks.py --check --jobs 2

.PHONY: wheel
wheel: $(INSTALLED_DEV)  ## step: build the wheel and train five steps with it, outside the checkout
	$(BIN)/python .ci/wheel.py

.PHONY: pytest
pytest: $(INSTALLED_DEV)  ## step: pytest, two files at a time; choose with PYTEST_ARGS="-k name"
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(PYTEST_ARGS)

.PHONY: test-slow
test-slow: $(INSTALLED_DEV)  ## the tests that take minutes each
	$(BIN)/python -m pytest --slow -m slow $(PYTEST_ARGS)

# ── measuring ────────────────────────────────────────────────────────────────────────────

.PHONY: rehearsal
rehearsal: $(INSTALLED)  ## every command at the size of Stable Diffusion 1.4 and 2.1, on a CPU: half an hour, 24 GB of memory
	$(BIN)/python benchmarks/rehearsal.py $(REHEARSAL_ARGS)

.PHONY: gpu
gpu: $(INSTALLED)  ## what is worth knowing from a GPU, in eight minutes; some of it: GPU_ARGS="--only ab"
	$(BIN)/python benchmarks/gpu.py $(GPU_ARGS)

# Hours; goes on where it was stopped. Some of it: ABLATIONS_ARGS="--only b --subjects 121 --workers 2"
.PHONY: ablations
ablations: $(INSTALLED)  ## the tables of the DreamBooth paper, in miniature: three and a half hours of one core, resumable
	$(BIN)/python benchmarks/ablations.py $(ABLATIONS_ARGS)

# ── lessons and site ─────────────────────────────────────────────────────────────────────

.PHONY: lab
lab: $(INSTALLED_DEV)  ## open the lessons in JupyterLab
	$(BIN)/jupyter lab nbs

.PHONY: notebooks
notebooks: $(INSTALLED_DEV) links  ## execute all lessons and store their outputs; some of them: NOTEBOOKS="nbs/butterflies/11_noise.ipynb"
	$(BIN)/python tests/execute_notebooks.py $(NOTEBOOKS)
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export

.PHONY: links
links: $(INSTALLED_DEV)  ## write badges, install cells and addresses from settings.ini
	$(BIN)/python .ci/links.py

.PHONY: readme
readme: $(INSTALLED_DEV) links  ## make README.md from nbs/index.ipynb
	$(BIN)/python .ci/readme.py

# The page stands in _web/try as it does in the site, so that its links to the lessons are the same.
.PHONY: web
web: $(INSTALLED_DEV)  ## lay out the page on which the miniature draws, into _web/try, and check it; needs Node.js
	$(BIN)/python web/build.py _web/try --check

.PHONY: docs
docs: $(INSTALLED_DEV)  ## render the site into _docs, with the page that draws; needs Quarto and Node.js
	@command -v quarto >/dev/null || { \
	  echo "make docs renders the site with Quarto, and there is no quarto here."; \
	  echo "Install it from https://quarto.org/docs/get-started/ and try again."; exit 1; }
	@$(MAKE) --no-print-directory web
	@touch README.md  # as old as the index, nbdev would have Quarto write another one
	@rm -rf _proc  # nbdev does not see whether .ci/pages.py has changed since
	PATH="$(abspath $(BIN)):$$PATH" PYTHONPATH="$(abspath .ci)" nbdev_docs  # with .ci/pages.py
	$(BIN)/python .ci/llms.py _docs/llms.txt
	cp -r _web/try _docs/try

# ── installing ───────────────────────────────────────────────────────────────────────────

.PHONY: install
install: $(INSTALLED)  ## create .venv and install the package

.PHONY: install-dev
install-dev: $(INSTALLED_DEV)  ## the same, with what is needed to work on it

$(MADE):
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON). Install Python 3.11 or newer."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, and $(PYTHON) is $$($(PYTHON) -V 2>&1)."; \
	  echo "Name a newer one: make PYTHON=python3.12"; exit 1; }
	@[ -x $(BIN)/python ] && $(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || { \
	  rm -rf $(VENV); echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@touch $@

$(INSTALLED): $(METADATA) | $(MADE)
	@echo "installing into $(VENV) (some minutes the first time)"
	$(PIP) -e .
	@touch $@

$(INSTALLED_DEV): $(METADATA) | $(MADE)
	@echo "installing into $(VENV), with the tools for development (some minutes the first time)"
	$(PIP) -e '.[dev,jax]'
	@touch $(INSTALLED) $@

.PHONY: help
help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## *' '{printf "%-12s %s\n", $$1, $$2}'
