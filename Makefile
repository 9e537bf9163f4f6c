# Two commands on a bare machine (Python >= 3.11, a C++ compiler, make): `make train`, `make test`. CONTRIBUTING.md has the others.
# On a machine with an NVIDIA driver the same targets install the CUDA set.
PYTHON   ?= python3
PLATFORM ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
# the GPUs that are there; two processes on a CPU
RANKS    ?= $(if $(filter cuda,$(PLATFORM)),$(shell nvidia-smi -L | grep -c '^GPU'),2)
CONFIG   ?= gear_trainer/configs/mathapi_cpu.yaml
SEED     ?= fresh
# processes that the test files are shared out to: tests/side_by_side.py
WORKERS  ?= 2
FUZZ     := tests/test_stats.py tests/test_credit.py tests/test_methods.py -k "fuzz or slow_transcription"
BIN      := .venv/bin
PIP      := $(BIN)/python -m pip install --quiet --disable-pip-version-check
DEPS     := .venv/.deps-$(PLATFORM)
BUILT    := .venv/.built
# the CPU list is complete and installs without resolution (its own head says why); pip resolves the CUDA list
PIP_DEPS := $(if $(filter cpu,$(PLATFORM)),--no-deps,)

# a file's tests stay in one process: they share what its fixtures made
PYTEST   := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# PORT=29501: where the ranks meet; a second run on one machine needs one of its own
LAUNCH   := $(if $(filter cpu,$(PLATFORM)),DS_ACCELERATOR=cpu,) $(BIN)/deepspeed --log_level error --num_gpus $(RANKS) \
            $(if $(PORT),--master_port $(PORT))

# Importing vLLM takes 30 s where no bytecode is kept, 16 s with it; every rank does, and so do the processes of tests.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: train test test-fast test-verl fuzz drills bench evidence-fast compile-matrix venv lint types docs clean
train: venv
	$(LAUNCH) gear_trainer/run.py --config $(CONFIG) world_size=$(RANKS) $(ARGS)

test: venv
	$(PYTEST) $(ARGS)

# the inner loop: all but what is marked `slow`, which starts ranks and engines or compiles
test-fast: venv
	$(PYTEST) -m "not slow" $(ARGS)

# the drawn cases with a fresh seed, which the first lines print: `make fuzz SEED=<number>` repeats it
fuzz: venv
	GEAR_FUZZ=$(SEED) $(BIN)/python -m pytest $(FUZZ) $(ARGS)

# the fault drills with 40 kills inside a save instead of 6, 20 at any moment of a run, and their table; vLLM's server with adapters
drills: venv
	GEAR_KILLS=40 GEAR_MOMENTS=20 $(BIN)/python -m pytest tests/test_drills.py -s $(ARGS)
	GEAR_SERVERS=all $(BIN)/python -m pytest tests/test_vllm_server.py -k own_server

# all peers, those that compile too, on small shapes and Qwen3's heads: seven minutes on two cores; prints the table, keeps the
# figures in build/
bench: venv
	mkdir -p build
	$(BIN)/python -m pytest benchmarks --full --benchmark-json=build/benchmarks.json $(ARGS)

# the committed figures of credit methods against the measured truth of credit, made anew from the committed files; fails if one moved
evidence-fast: venv
	$(BIN)/python -m benchmarks.credit_truth.evidence $(ARGS)

# verl and OpenRLHF, whose pins clash with the other tests', in an environment of their own: requirements/verl.txt. Python 3.11 or 3.12
VERL := .venv-verl/bin/python
test-verl: .venv-verl/.built
	$(VERL) -m pytest --confcutdir=tests/in_verl tests/in_verl $(ARGS)

.venv-verl/.deps: requirements/verl.txt
	test -x $(VERL) || $(PYTHON) -m venv .venv-verl
	$(VERL) -m pip install --quiet --disable-pip-version-check --no-compile --no-deps -r $<
	touch $@

.venv-verl/.built: .venv-verl/.deps setup.py CMakeLists.txt pyproject.toml $(wildcard gear_kernels/csrc/*)
	$(VERL) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

# every kernel for every target: by the pinned Triton against the committed table, then by the oldest and the newest one, whose
# spills are named; and the interpreter's kernels with numpy 1. Ten minutes on two cores; the versions go to build/
TRITONS  := 3.6.0 3.9.0
NUMPY    := 1.26.4
compile-matrix: venv
	$(BIN)/python -m benchmarks.gates.compile_report --check
	for v in $(TRITONS); do \
		test -d build/triton-$$v || $(PIP) --target build/triton-$$v --no-deps triton==$$v || exit 1; \
		$(BIN)/python -m benchmarks.gates.compile_report --triton build/triton-$$v || exit 1; \
	done
	test -d build/numpy-$(NUMPY) || $(PIP) --target build/numpy-$(NUMPY) --no-deps numpy==$(NUMPY)
	PYTHONPATH=build/numpy-$(NUMPY) $(BIN)/python -m pytest tests/test_stats.py -k "triton and (rising or half or subsets)"

venv: $(BUILT)

$(DEPS): requirements/$(PLATFORM).txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) --no-compile $(PIP_DEPS) -r $<
	$(if $(filter cuda,$(PLATFORM)),$(PIP) --no-deps -r requirements/cuda-nodeps.txt)
	touch $@

$(BUILT): $(DEPS) setup.py CMakeLists.txt pyproject.toml $(wildcard gear_kernels/csrc/*)
	$(PIP) --no-deps --no-build-isolation --editable .
	touch $@

lint: venv
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

# the annotations of both packages, against each other and the libraries' own
types: venv
	$(BIN)/basedpyright --pythonpath $(BIN)/python $(ARGS)

# the site in build/site; a link or an anchor that leads nowhere fails it
DOCS_VENV := build/docs-venv
docs: $(DOCS_VENV)/.deps
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --quiet --strict

$(DOCS_VENV)/.deps: requirements/docs.txt
	test -x $(DOCS_VENV)/bin/python || $(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	touch $@

clean:
	rm -rf .venv .venv-verl build *.egg-info gear_kernels/*.so
