# `make demo` and `make test` do all the set-up themselves; a second call is quick.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: install demo test test-browser lint bench clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(INSTALLED)

demo: install
	$(BIN)/python examples/demo.py --out demo

test: install
	$(BIN)/python -m pytest -n 2

# The playground and reports in a real browser: Playwright drives the system's Chromium.
test-browser: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,browser]"
	command -v chromium chromium-browser google-chrome > /dev/null || { \
		SUDO=$$(test "$$(id -u)" = 0 || echo sudo); \
		$$SUDO apt-get -qq update && $$SUDO apt-get -qq install -y --no-install-recommends chromium > /dev/null; }
	$(BIN)/python -m pytest tests/browser

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install
	$(BIN)/python benchmarks/step.py --precisions float32 --json benchmarks/results/step.json

clean:
	rm -rf .venv demo build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
