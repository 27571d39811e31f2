# make demo | test [ONLY=room] | lint      set up .venv by themselves; need Python >= 3.10
# make gpu | bench [ONLY=room]             use the machine's own python3, as it is
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TESTS := $(if $(ONLY),tests/test_$(ONLY).py,tests)
PARALLEL = $$($(PYTHON) -c 'import xdist; print("-n auto --dist loadfile")' 2>/dev/null)
HAS_TORCH := -c 'import torch, triton' 2>/dev/null

.PHONY: demo test gpu bench lint clean

demo: $(READY)   # float32, because a reference in bfloat16 rounds as much as the kernels do and draws otherwise where two tokens are near
	$(BIN)/python -m gkernels generate --verify --dtype float32 --temperature 0.8

test: $(READY)
	$(BIN)/python -m pytest -n auto --dist loadfile $(TESTS)

gpu:
	@results=$$(mktemp -d); passed=true; \
	GKERNELS_REQUIRE_GPU=1 $(PYTHON) -m pytest $(PARALLEL) $(TESTS) --junit-xml=$$results/tests.xml || passed=false; \
	$(if $(ONLY),,if [ -s $$results/tests.xml ]; then $(PYTHON) -m tests.counts $$results/tests.xml; fi;) $$passed
	$(if $(or $(if $(ONLY),,all),$(wildcard bench/$(ONLY).py)),$(PYTHON) -m bench $(ONLY))

bench:
	$(PYTHON) -m bench $(ONLY)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The machine's torch and triton serve where they are. Elsewhere: without a GPU the CPU build of torch where pip finds one, else torch 2.11.0,
# the release that asks for triton 3.6.0 as constraints.txt does.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "gkernels needs Python >= 3.10, got " + sys.version.split()[0])'
	$(PYTHON) -m venv $$($(PYTHON) $(HAS_TORCH) && echo --system-site-packages) $(VENV)
	$(BIN)/python $(HAS_TORCH) || { ! command -v nvidia-smi >/dev/null && $(BIN)/pip install torch==2.13.0+cpu; } || $(BIN)/pip install torch==2.11.0
	$(BIN)/pip install -c constraints.txt -e '.[dev]'
	touch $@
