# make demo   the whole method on a toy model, a few minutes on two cores
# make test   the offline tests          make lint   ruff, formatting, mypy
# make sanitize  the C++ kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer
# make ranks  the slow tests of several processes: 4 ranks, faults, two hosts made of network namespaces
# make bench  benchmarks of this machine, written to benchmarks/results/
# make gpu    on a machine with a GPU, its own Python, torch and build tools, without downloads: GPU tests, benchmarks
# make clean  what the other targets left, .venv included
#
# PYTHON=python3.12 chooses the interpreter; SAFECRIT_NATIVE and SAFECRIT_CUDA (AUTO, ON, OFF) what is compiled.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.safecrit-installed
PARTS := pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)

.PHONY: install demo test ranks lint sanitize bench gpu clean

# An editable installation: the Python files of this folder with the compiled modules from .venv. It is redone only
# where the packaging or the C++ changed.
install: $(STAMP)

$(STAMP): $(PARTS)
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/safecrit demo

# One process a core, one thread each: more threads than cores would wait for one another.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses=auto --maxprocesses=4 --dist=loadgroup

# Tests that start processes, one after another: 4 ranks, failing ranks, two network namespaces.
ranks: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/ranks -m slow --durations=12

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

sanitize: $(STAMP)
	.ci/sanitize $(BIN)/python

bench: $(STAMP)
	$(BIN)/python benchmarks/esi_accumulate.py --save
	$(BIN)/python benchmarks/matrix_std.py --save
	$(BIN)/python benchmarks/adamw.py --save
	$(BIN)/python benchmarks/select_top.py --save

gpu:
	$(PYTHON) -m pip install --quiet --no-build-isolation --no-deps --editable .
	$(PYTHON) -m pytest -m gpu
	$(PYTHON) benchmarks/esi_accumulate.py --device cuda --save
	$(PYTHON) benchmarks/matrix_std.py --device cuda --save
	$(PYTHON) benchmarks/adamw.py --device cuda --save
	$(PYTHON) benchmarks/select_top.py --device cuda --save
	$(PYTHON) benchmarks/whole_job.py --size 8b --device cuda --save
	$(PYTHON) benchmarks/whole_job.py --size 8b --device cuda --ranks 1 --save
	$(PYTHON) -m safecrit doctor

clean:
	rm -rf .venv build .mypy_cache .ruff_cache .pytest_cache .hypothesis safecrit-demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
