PYTHON ?= python3.11
BIN := .venv/bin
STAMP := .venv/installed
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 8 ? n : 8)))
export OMP_NUM_THREADS ?= 1

.PHONY: install cluster reproduce evening students test test-numbers test-poorer-cpu lab export check clean

install: $(STAMP)

$(STAMP): requirements.txt constraints.txt settings.ini setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt -c constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	$(BIN)/python -m pip check
	touch $@

cluster: .venv-cluster/installed

.venv-cluster/installed: requirements-cluster.txt
	test -x .venv-cluster/bin/python || $(PYTHON) -m venv .venv-cluster
	.venv-cluster/bin/python -m pip install --quiet -r requirements-cluster.txt
	.venv-cluster/bin/python -m pip check
	touch $@

reproduce: $(STAMP)
	$(BIN)/dsbs reproduce

# the paper's student on one GPU: about nine hours on one of 24 GB; stopped, it goes on from there
evening: $(STAMP)
	$(BIN)/dsbs reproduce --preset evening

# the students of reports/students, and what they take to answer
students: $(STAMP)
	$(BIN)/python -c "from dsbs.tools.serving import make_students; print(*make_students(), sep='\n')"

# on the CPUs, whatever else there is; on a machine with a GPU, tests/runs/test_gpu.py uses it
test: $(STAMP)
	CUDA_VISIBLE_DEVICES= $(BIN)/nbdev_test --n_workers $(JOBS) --pause 0.5
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal $(PYTEST)

# what computes, as on a CPU with AVX2 at most, and with nothing of its own
test-poorer-cpu: $(STAMP)
	$(POORER) ATEN_CPU_CAPABILITY=avx2 $(MAKE) test-numbers
	$(POORER) ATEN_CPU_CAPABILITY=default $(MAKE) test-numbers

POORER := MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2

test-numbers: $(STAMP)
	CUDA_VISIBLE_DEVICES= $(BIN)/nbdev_test --n_workers $(JOBS) --pause 0.5 --file_re '(student|stack|multitask|training|answering|run|bench)\.ipynb'
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -m numeric $(PYTEST)

lab: $(STAMP)
	$(BIN)/jupyter lab nbs

# notebooks laid out and cleaned, the modules and the front page made from them
export: $(STAMP)
	$(BIN)/ruff format --quiet nbs tests setup.py
	$(BIN)/nbdev_clean --fname nbs
	$(BIN)/nbdev_export
	$(BIN)/python -c "from dsbs.evidence.reporting import write_readme; write_readme()"

check: $(STAMP)
	$(BIN)/ruff format --check nbs tests setup.py
	$(BIN)/ruff check nbs dsbs tests setup.py
	$(BIN)/python -m pytest -q tests/test_in_step.py tests/test_measures.py

clean:
	rm -rf .venv .venv-cluster .snakemake dsbs.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
