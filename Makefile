# `make` lists the commands. Each environment is made once and made again when its requirements change.
PYTHON ?= python3
PYTEST = -m pytest -q
# The root modules import each other relatively, so the type checker must see them as a package.
ROOT_MODULES = $(wildcard *.py)
ENVIRONMENTS = .venv .venv-readers .venv-app
# The interpreter that `make test-contract` uses, of any environment with the packages of tools/matrix.py.
CONTRACT_PYTHON ?= .venv/bin/python
# The folder that `make app` searches, and the folder or Hub id of its model, by default tiny/. An index belongs to one
# model, so each model has its own.
PICTURES ?= examples/pictures
MODEL ?=
SEARCH_MODEL = $(if $(MODEL),--model "$(MODEL)" --index ".cache/search-$(subst /,-,$(MODEL))")

.PHONY: help demo app venv test test-heavy test-slow test-contract matrix lint bench tiny clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' Makefile

demo: .venv-readers/ready ## show tiny/ on example images: zero-shot, retrieval, captions; writes demo.png
	.venv-readers/bin/python examples/demo.py

app: .venv-app/ready ## index a folder of images and open a page that searches it: PICTURES=FOLDER MODEL=PATH_OR_ID make app
	.venv-app/bin/python examples/search.py index $(SEARCH_MODEL) "$(PICTURES)"
	.venv-app/bin/python examples/search.py page $(SEARCH_MODEL)

venv: .venv-readers/ready ## make the environment of the pages' snippets: .venv-readers/bin/python

test: lint ## style, types and tests, in two processes: up to 5 minutes
	.venv/bin/python $(PYTEST) -n 2 --dist worksteal -m "not heavy and not slow" --ignore tests/contract tests

test-heavy: .venv/ready ## Ray, Chromium, kill -9, training in two processes, simulated 14B plans: 5 minutes
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || echo "Without Chromium the tests of the search page are skipped." \
		"On Debian: apt-get install chromium chromium-driver fonts-noto-cjk (0.5 GB)"
	.venv/bin/python $(PYTEST) -m "heavy and not slow" --ignore tests/contract tests

test-slow: .venv/ready ## what test and test-heavy leave out, such as one layer of each tower at the published widths
	.venv/bin/python $(PYTEST) -m slow --ignore tests/contract tests

test-contract: $(if $(filter .venv/%,$(CONTRACT_PYTHON)),.venv/ready) ## what must work on every transformers: 2 minutes; CONTRACT_PYTHON=PATH for another environment
	OMP_NUM_THREADS=1 $(CONTRACT_PYTHON) $(PYTEST) tests/contract

matrix: .venv/ready ## the contract on every supported transformers, in an environment of 1.6 GB each; writes docs/versions.md
	.venv/bin/python -m tools.matrix

lint: .venv/ready ## style, types and the weight index alone
	.venv/bin/ruff check --config tests/ruff.toml .
	.venv/bin/ruff format --check --config tests/ruff.toml .
	mkdir -p .cache/types && ln -sfn ../.. .cache/types/internvl
	cd .cache/types && ../../.venv/bin/mypy --config-file ../../tests/mypy.ini $(ROOT_MODULES:%.py=-m internvl.%)
	.venv/bin/python -m tools.hub.write_index --check

bench: .venv/ready ## compare the speed with the original's way: a quarter of an hour; needs a C++ compiler
	.venv/bin/python -m benchmarks.speed

tiny: .venv/ready ## train tiny/ again from scratch and evaluate it: hours; needs npm (emoji: 250 MB) and a C++ compiler
	.venv/bin/python -m tools.tiny.emoji_data
	.venv/bin/python -m tools.tiny.train_tokenizer
	.venv/bin/python -m tools.tiny.train_tiny --compile
	.venv/bin/python -m tools.tiny.evaluate_tiny
	.venv/bin/python -m tools.tiny.tiny_figure

clean: ## remove the environments and everything cached
	rm -rf .venv .venv-* .cache

.venv-readers/ready: examples/requirements.txt
.venv-app/ready: examples/search-requirements.txt
.venv/ready: tests/requirements.txt

.venv-readers/ready: WHAT = torch, transformers and what the pages' snippets import: 2 GB
.venv-app/ready: WHAT = torch, transformers, accelerate, lancedb and gradio: 1.7 GB
.venv/ready: WHAT = the test environment, with Ray, gradio, torchao and bitsandbytes: 3 GB

$(ENVIRONMENTS:%=%/ready):
	@echo "Installing once into $(@D): $(WHAT)."
	@echo "This takes about 2 minutes with a fast network, else 5 to 10. pip lists each package; the last step, writing"
	@echo "all files to the disk, is a minute without a line."
	@echo "On Linux pip's torch brings several GB of CUDA. Without an NVIDIA GPU, stop this (Ctrl-C) and run first:"
	@echo "  export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu"
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --disable-pip-version-check --requirement $<
	@touch $@
	@echo "$(@D) is ready."
