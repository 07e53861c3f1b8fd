# make demo    decode a prompt with the shipped models in all three modes
# make test    run the test suite (needs no torch)
# make lint    ruff and pyright
# make docs    the guides and the reference as pages, in docs/_build
# make clean   remove the environment and every cache
#
# Each target installs what it needs into .venv once. Variables:
#   PYTHON=python3.12   the interpreter that .venv is made from (3.11 or newer)
#   EXTRAS=all          install everything, as continuous integration does
#   JOBS=4              test files run side by side; each takes a core and up to 8 GB
#   ARGS='-k tree'      further arguments of pytest, or of decode.py in `make demo`

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2

extras.base :=
extras.test := [test]
extras.dev := [dev]
extras.docs := [docs]
extras.all := [dev,docs,peers,aot,train,hub]

.PHONY: demo test lint docs clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed-$(or $(EXTRAS),base)
	@$(BIN)/python scripts/demo.py $(ARGS)

test: $(VENV)/.installed-$(or $(EXTRAS),test)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(VENV)/.installed-$(or $(EXTRAS),dev)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(VENV)/.installed-$(or $(EXTRAS),docs)
	JAX_PLATFORMS=cpu $(BIN)/python -m sphinx -W --keep-going -q docs docs/_build

clean:
	rm -rf $(VENV) build dist docs/_build docs/api *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are written last, so an interrupted installation is simply done again.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(VENV)/.created
	@echo "Installing ssd-jax$(extras.$*) and what it needs into $(VENV); once, a few minutes ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  -c constraints.txt -e '.$(extras.$*)'
	@touch $@

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: ssd-jax needs Python 3.11 or newer; name one: make PYTHON=python3.12" >&2; \
	  exit 2; }
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@
