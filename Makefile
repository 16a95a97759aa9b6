# make demo    convert, train, export and verify a real network on real images; under two minutes after the install
# make test    the test suite
# make coverage   the test suite, and which lines it runs; takes longer
# make lint    ruff, mypy
# make docs    the documentation as a site, in site/; fails where a page shows what commands no longer print
# make outputs   runs the commands in the pages, and the notebook, and pastes what they print
# make browser   Debian's Chromium, in which the tests look at reports
# make bench   the slow tests and the benchmarks
# make bindings   fetch TensorRT's Python bindings (5 MB, no libraries), which one slow test looks at
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
COG := OMP_NUM_THREADS=1 $(BIN)/cog --verbosity=0 -I docs -p "import outputs"
PAGES = $(shell grep --recursive --files-with-matches --fixed-strings --include=*.md "[[[cog" README.md docs)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
DEMO_INSTALLED := $(VENV)/.installed-demo
INSTALLED := $(VENV)/.installed

.PHONY: demo test coverage lint docs outputs browser bench bindings
.DELETE_ON_ERROR:

demo: $(DEMO_INSTALLED)
	$(BIN)/python examples/demo_digits.py --out demo-output

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

coverage: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow" --cov=nmgraph --cov-report=term

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The warning is about the future of mkdocs itself.
docs: $(INSTALLED)
	$(COG) --check --diff --check-fail-msg="A page shows what commands no longer print: make outputs" $(PAGES)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir site

outputs: $(INSTALLED)
	$(COG) -r $(PAGES)
	OMP_NUM_THREADS=1 $(BIN)/python docs/notebook.py

browser:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || { \
	  if [ "$$(id -u)" = 0 ]; then sudo=; else sudo="sudo -n"; fi; \
	  $$sudo apt-get update -qq && $$sudo apt-get install -qq -y --no-install-recommends chromium chromium-driver; \
	} || { echo "Install chromium and chromium-driver: the tests look at reports in them." >&2; exit 1; }

bench: $(INSTALLED)
	$(BIN)/python -m pytest -m slow
	$(BIN)/python benchmarks/masks.py
	$(BIN)/python benchmarks/faults.py
	$(BIN)/python benchmarks/seeing.py
	$(BIN)/python benchmarks/sensitivity.py
	$(BIN)/python benchmarks/transposable.py
	$(BIN)/python benchmarks/row_permutation.py
	$(BIN)/python benchmarks/step_time.py
	$(BIN)/python benchmarks/step_time.py --model deit_small --rounds 5
	$(BIN)/python benchmarks/conversion.py
	$(BIN)/python benchmarks/packing.py
	$(BIN)/python benchmarks/permutation.py

bindings: $(INSTALLED)
	$(BIN)/python tests/export/bindings_wheels.py fetch

# torch comes first and pinned, so that nothing after it pulls another build; what needs torch itself (tests only) comes without
# its dependencies, for the same reason. Triton, which torch for CUDA brings, is there for its interpreter, in which the tests run a
# kernel. The demo needs less than the rest.
$(DEMO_INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch --constraint constraints.txt
	$(PIP) --editable ".[demo]" --constraint constraints.txt
	@touch $@

$(INSTALLED): $(DEMO_INSTALLED)
	$(PIP) --editable ".[demo,test,lint,docs]" --constraint constraints.txt
	$(PIP) --no-deps torchvision timm transformers tokenizers accelerate lightning lightning-utilities torchmetrics "triton; platform_system == 'Linux'" --constraint constraints.txt
	@touch $@
