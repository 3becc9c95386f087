# Each environment is made once and made again when its requirements change.
PYTHON ?= python3
PYTEST = -m pytest -q
# The root modules import each other relatively, so the type checker must see them as a package.
ROOT_MODULES = $(wildcard *.py)
ENVIRONMENTS = .venv .venv-oldest .venv-demo .venv-app
# The interpreter that `make test-contract` uses, of any environment with the packages of tools/matrix.py.
CONTRACT_PYTHON ?= .venv/bin/python
# The folder that `make app` searches.
PICTURES ?= examples/pictures

.PHONY: app bench demo test test-slow test-oldest test-contract matrix lint tiny clean

demo: .venv-demo/ready
	.venv-demo/bin/python examples/demo.py

app: .venv-app/ready
	.venv-app/bin/python examples/search.py index "$(PICTURES)"
	.venv-app/bin/python examples/search.py page

test: lint
	.venv/bin/python $(PYTEST) tests

test-slow: .venv/ready
	.venv/bin/python $(PYTEST) -m slow tests

test-oldest: .venv-oldest/ready
	.venv-oldest/bin/python $(PYTEST) tests

test-contract: $(if $(filter .venv/%,$(CONTRACT_PYTHON)),.venv/ready)
	OMP_NUM_THREADS=1 $(CONTRACT_PYTHON) $(PYTEST) tests/contract

matrix: .venv/ready
	.venv/bin/python tools/matrix.py

lint: .venv/ready
	.venv/bin/ruff check --config tests/ruff.toml .
	.venv/bin/ruff format --check --config tests/ruff.toml .
	mkdir -p .cache/types && ln -sfn ../.. .cache/types/internvl
	cd .cache/types && ../../.venv/bin/mypy --config-file ../../tests/mypy.ini $(ROOT_MODULES:%.py=-m internvl.%)
	.venv/bin/python tools/write_index.py --check

bench: .venv/ready
	.venv/bin/python benchmarks/speed.py

tiny: .venv/ready
	.venv/bin/python tools/emoji_data.py
	.venv/bin/python tools/train_tokenizer.py
	.venv/bin/python tools/train_tiny.py --compile
	.venv/bin/python tools/evaluate_tiny.py
	.venv/bin/python tools/tiny_figure.py

clean:
	rm -rf .venv .venv-demo .venv-oldest .venv-app .cache

.venv-demo/ready: examples/requirements.txt
.venv-app/ready: examples/search-requirements.txt
.venv/ready: tests/requirements.txt
.venv-oldest/ready: tests/requirements-oldest.txt

$(ENVIRONMENTS:%=%/ready):
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check --requirement $<
	touch $@
