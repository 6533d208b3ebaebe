# anomaly_nb: `make demo` and `make test` do everything on a machine with Python 3.11+ and make.
PYTHON ?= python3
BIN    := .venv/bin
# this environment's JupyterLab: long lines of code are wrapped, not cut; no question about news
define LAB_SETTINGS
{"@jupyterlab/notebook-extension:tracker": {"codeCellConfig": {"lineWrap": true}},
 "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": false}}
endef
export LAB_SETTINGS
# one thread a process: two notebooks side by side must not fight for the cores
export OMP_NUM_THREADS = 1
export MKL_NUM_THREADS = 1
export OPENBLAS_NUM_THREADS = 1
export NUMBA_NUM_THREADS = 1
export PYTHONDONTWRITEBYTECODE =
WORKERS ?= 2
SIZE ?= demo

.PHONY: help demo test test-system bench lab docs outputs checkpoints export gpu-check clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "anomaly_nb needs Python 3.11 or later, this is " + sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[lab,test]"
	touch $@

demo: .venv/ready  ## environment, embedded cohort, the comparison, report
	$(BIN)/anomaly-nb demo --size $(SIZE)

test: .venv/ready  ## export check, every notebook, pytest
	$(BIN)/python -m pytest tests/test_house.py
	$(BIN)/anomaly-nb data make brain --size tiny --contrast FLAIR
	$(BIN)/nbdev-test --n-workers $(WORKERS) --timing --skip-folder-re '^[_.]|^tutorials'     # pytest executes those, with their exercises
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --durations=10 --ignore=tests/test_house.py -m "not long"

test-system: .venv/docs-ready  ## kills, faults and a real browser; what trains for long
	$(BIN)/python -m pytest tests --numprocesses $(WORKERS) -m long --durations=10
	$(BIN)/python -m pytest tests/system/test_checkpoints.py --numprocesses $(WORKERS)
	$(BIN)/python -m pytest tests/system --ignore=tests/system/test_checkpoints.py -rs --durations=10

bench: .venv/ready  ## speed as ratios, side by side
	@for file in tests/benchmarks/bench_*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

lab: .venv/ready  ## JupyterLab on the map of the course (also as root, in a container)
	@mkdir -p .venv/share/jupyter/lab/settings
	@printf '%s\n' "$$LAB_SETTINGS" > .venv/share/jupyter/lab/settings/overrides.json
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) --ServerApp.root_dir="$(CURDIR)" --LabApp.default_url=/lab/tree/nbs/index.ipynb

export: .venv/ready  ## notebooks -> library, and README from the index
	$(BIN)/nbdev-export
	$(BIN)/python tests/outputs.py readme

outputs: export  ## execute the chapters and store their outputs
	$(BIN)/python tests/outputs.py store

checkpoints: export  ## train again the small networks that notebooks load (nbs/checkpoints)
	$(BIN)/python tests/outputs.py checkpoints

.venv/docs-ready: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $@

docs: .venv/docs-ready  ## the course as a web site, in _docs/, from the stored outputs
	$(BIN)/python nbs/site/build.py

gpu-check:  ## every model of the catalog on a GPU against the CPU (needs a CUDA device)
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) tests/gpu_check.py

clean:  ## forget the environment and everything made
	rm -rf .venv runs data/cohorts data/cache _docs _docs.*.tmp
