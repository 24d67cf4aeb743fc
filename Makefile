# `make journey` runs the main job and `make test` the tests; both set everything up on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install journey test lint clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt deploy/install.sh
	PYTHON=$(PYTHON) deploy/install.sh $(VENV) --editable '.[dev]'
	touch $@

# Generated homes, a frozen encoder, a side-tuned PPO agent, an evaluation on unseen homes, a report.
journey: $(INSTALLED)
	$(BIN)/navagent train

test: lint
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
