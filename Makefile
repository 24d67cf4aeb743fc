# `make journey` runs the main job and `make test` the tests; both set everything up on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
INSTALLED := $(VENV)/.installed

.PHONY: install journey test lint clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt deploy/install.sh
	PYTHON=$(PYTHON) deploy/install.sh $(VENV) --editable '.[dev]'
	touch $@

# Generated homes, a frozen encoder, a side-tuned PPO agent, an evaluation on unseen homes, a report.
journey: $(INSTALLED)
	$(BIN)/navagent train

# Files are shared out between WORKERS processes; what a file's tests share is made once.
test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
