# make demo    from nothing to a scored model on the bundled text, on a CPU
# make test    every test that needs no GPU
# make check   ruff and mypy
# make test-browser   the pages of records/report.py in headless Chromium
# make soak    faults injected for a long time: kills, damaged files, mutated settings
PYTHON ?= python3
BIN := .venv/bin
DEMO_DATA := data/datasets/shakespeare_sp1024

.PHONY: demo test check test-browser soak clean

demo: .venv/installed $(DEMO_DATA)
	$(BIN)/python train_gpt.py PRESET=demo

# Byte code is kept, or every process that a test starts would compile train_gpt.py anew.
test: .venv/installed
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist worksteal

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/mypy

test-browser: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check playwright
	@$(BIN)/python -c 'import shutil, sys; sys.exit(not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))' || $(BIN)/python -m playwright install chromium
	$(BIN)/python -m pytest -m browser tests/browser

soak: .venv/installed
	$(BIN)/python tests/faults/soak.py

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; name it with: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(DEMO_DATA): | .venv/installed
	$(BIN)/python data/tokenize_docs.py --input data/sample/shakespeare.jsonl.xz --output $@ --vocab-size 1024 --val-docs 4

clean:
	rm -rf .venv $(DEMO_DATA)
