# Needs Python 3.10 to 3.13, pip and make; everything else goes into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
INTEGRATIONS := .venv-integrations
PYTHONS := .venv-pythons

.PHONY: demo docs test test-all test-faults test-pythons test-interpret test-integrations parity test-gpu fuzz compile-check lint types bench bench-full bench-speed bench-gpu report clean

demo: $(READY)
	$(BIN)/hsa demo

# The documentation as a site, in site/index.html. Warnings, such as a broken link, are errors.
docs: $(READY)
	$(BIN)/python docs/cli_page.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# One process more than there are cores, for tests wait for disks, timers and processes that they start.
# Threads of torch that wait for work would otherwise spin, which on busy cores doubles the time; and hsa, which the tests
# start hundreds of times, would be compiled at every start where the environment forbids to keep bytecode.
PYTEST_PARALLEL := OMP_WAIT_POLICY=passive PYTHONDONTWRITEBYTECODE= \
    $(BIN)/python -m pytest -n $$(($$(nproc) + 1)) --dist loadfile --no-loadscope-reorder

test: lint types
	$(PYTEST_PARALLEL)

# Everything of which `make test` tries a sample, except the faults.
test-all: lint types
	HSA_TESTS=all $(PYTEST_PARALLEL)

# The fault suite in full, of which `make test` tries a sample; it ends with a table.
test-faults: $(READY)
	HSA_FAULTS=full $(BIN)/python -m pytest tests/faults

# Every CPU command on each of Python 3.10 to 3.13 that is found here, with the lowest versions that setup.py allows and
# without torch. Downloads small packages.
test-pythons: $(READY)
	$(BIN)/python tests/support/pythons.py

# With the real programs that hsa works with, in an environment of their own; nothing is downloaded while they run.
test-integrations: $(INTEGRATIONS)/ready
	HF_HUB_OFFLINE=1 $(INTEGRATIONS)/bin/python -m pytest tests/programs tests/integrations

# How far merges lie from mergekit's: measured, added to bench/results/parity.csv, and shown in docs/methods.md.
parity: $(INTEGRATIONS)/ready $(READY)
	HF_HUB_OFFLINE=1 HSA_PARITY=write $(INTEGRATIONS)/bin/python -m pytest tests/integrations/test_parity_linear.py \
	    tests/integrations/test_parity_masks.py tests/programs/test_mergekit_config_merges.py
	$(BIN)/python bench/report.py

test-interpret: $(READY)
	HSA_TESTS=all TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels/test_merge.py tests/kernels/test_refusals.py \
	    tests/kernels/test_interleaved.py

# On a machine whose Python has torch already: make test-gpu BIN=/path/to/its/bin READY=
# Where there is no GPU every module is skipped and says so, for which pytest exits with 5.
test-gpu: $(READY)
	$(BIN)/python -m pytest tests/backends/test_gpu.py tests/kernels/test_merge.py tests/kernels/test_refusals.py || test $$? = 5

# A coverage-guided fuzzer on each kind of file, one after the other: make fuzz SECONDS=600 TARGETS="header patch"
# Where atheris has no wheel (Python 3.10, other systems than Linux on x86-64) it says so and stops.
SECONDS := 60
fuzz: $(VENV)/fuzz-ready
	$(BIN)/python tests/fuzz/fuzz.py --seconds $(SECONDS) $(TARGETS)

compile-check: $(READY)
	$(BIN)/python -m hsa.kernels.compile_check

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy

# Under 30 minutes on 2 cores, with 24 GB of memory and 40 GB of free disk. bench-full takes hours: every size and element
# type, other methods beside mergekit, the word error rate of every method, and searches beside a loop.
bench: $(READY)
	$(BIN)/python bench/bench_merge.py
	$(BIN)/python bench/bench_sweep.py
	$(BIN)/python bench/bench_kernels.py --device cpu
	$(BIN)/python bench/bench_wer.py
	$(BIN)/python bench/report.py

bench-full: $(READY)
	$(BIN)/python bench/bench_merge.py --full
	$(BIN)/python bench/bench_sweep.py --dtype float16
	$(BIN)/python bench/bench_sweep.py --dtype float32
	$(BIN)/python bench/bench_kernels.py --device cpu --all
	$(BIN)/python bench/bench_methods.py
	$(BIN)/python bench/bench_wer.py
	$(BIN)/python bench/bench_wer_methods.py
	$(BIN)/python bench/bench_search.py --workers
	$(BIN)/python bench/report.py

# COMMIT names the commit in the rows where there is no git.
bench-gpu: $(READY)
	$(BIN)/python bench/bench_kernels.py --device cuda $(if $(COMMIT),--commit $(COMMIT))

# The kernel cases under pytest-benchmark, which keeps and compares runs of its own.
bench-speed: $(READY)
	$(BIN)/python -m pytest bench/test_kernels_speed.py --benchmark-only

report: $(READY)
	$(BIN)/python bench/report.py

clean:
	rm -rf $(VENV) $(INTEGRATIONS) $(PYTHONS) build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(READY): setup.py pyproject.toml constraints.txt hsa/_version.py
	@echo "Installing hsa and what it needs (torch, transformers and the test tools, a few GB) into $(VENV)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

$(VENV)/fuzz-ready: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,fuzz]"
	touch $@

$(INTEGRATIONS)/ready: setup.py pyproject.toml constraints.txt hsa/_version.py
	$(PYTHON) -m venv $(INTEGRATIONS)
	$(INTEGRATIONS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	    -e ".[mergekit,integrations,deploy,search,ray]" pytest soundfile accelerate psycopg2-binary
	touch $@
