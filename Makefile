# Two commands: `make serve` and `make test`. Each works alone; both share .venv.
# Needs Python 3.11 or 3.12, make and a C compiler.

PYTHON ?= $(firstword $(foreach name,python3 python3.12 python3.11,$(shell $(name) -c \
  'import sys; sys.version_info[:2] in ((3, 11), (3, 12)) and print(sys.executable)' 2>/dev/null)))
TORCH ?= torch==2.13.0
ARGS ?=

# Two OpenMP threads on two virtual cores spin against each other and make steps ten times slower.
export OMP_NUM_THREADS ?= 1
export MKL_NUM_THREADS ?= 1

.PHONY: serve test lint clean

serve: .venv/installed  ## launch the embedded model on http://127.0.0.1:8000; options: make serve ARGS="--port 9000"
	.venv/bin/dsv4serve launch $(ARGS)

# Without ARGS two of these at a time, because each keeps one core busy for minutes: the long ones first, and of the two
# that are left each when a core is free. How long the compilations take depends on Triton's cache.
define PARTS
tests --ignore=tests/kernels --ignore=tests/runner
tests/kernels/test_compile_gate.py
tests/kernels --ignore=tests/kernels/test_compile_gate.py
tests/runner
endef
export PARTS

test: .venv/installed-dev lint  ## lint, types and all tests; options: make test ARGS="tests/house -x"
ifeq ($(strip $(ARGS)),)
	@printf '%s\n' "$$PARTS" | xargs -P 2 -I PART sh -c 'echo "== pytest PART"; log=$$(mktemp); \
	.venv/bin/pytest --durations=10 PART >$$log 2>&1; status=$$?; echo "== pytest PART ended with $$status"; \
	cat $$log; rm $$log; exit $$status'
else
	.venv/bin/pytest $(ARGS)
endif

lint: .venv/installed-dev
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or 3.12 found; give one: make PYTHON=/path/to/python3.12" >&2; exit 2; }
	$(PYTHON) -m venv .venv

# torch first and alone: pip then keeps the build it chose for this machine when it resolves the rest.
.venv/torch: | .venv/bin/python
	.venv/bin/python -m pip install -qq --disable-pip-version-check "$(TORCH)"
	touch $@

# Installed anew only when pyproject.toml or a C source changes: the Python code is used in place.
KERNELS := $(wildcard csrc/cpu/*)

.venv/installed: pyproject.toml $(KERNELS) .venv/torch
	.venv/bin/python -m pip install -qq --disable-pip-version-check -e .
	touch $@

.venv/installed-dev: pyproject.toml $(KERNELS) .venv/torch
	.venv/bin/python -m pip install -qq --disable-pip-version-check -e ".[dev]"
	touch $@ .venv/installed
