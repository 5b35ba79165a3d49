# Two commands do everything on a fresh machine: `make demo` and `make test`. Both build .venv themselves.
PYTHON ?= python3
BIN := .venv/bin
ACTIVATE := PATH="$(CURDIR)/$(BIN):$$PATH"
STAMP := .venv/.installed
# Bytecode is cached even where the shell says not to: else each of the many processes compiles torch, Ray and Prefect again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all check fix bench docs chaos clean

demo: $(STAMP)
	rm -rf demo
	$(ACTIVATE) tlpipeline init demo
	$(ACTIVATE) tlpipeline run --workspace demo

# Two processes, a file each at a time: most tests wait for processes that they start.
test: $(STAMP)
	$(ACTIVATE) python -m pytest -n 2 --dist loadfile -m "not slow and not chaos"

# The rest: what takes long, or needs the wheel, servers or a browser.
test-all: $(STAMP)
	$(ACTIVATE) python -m pytest -n 2 --dist loadfile -m "slow and not chaos"

check: $(STAMP)
	$(ACTIVATE) ruff format --check .
	$(ACTIVATE) ruff check .
	$(ACTIVATE) mypy
	$(ACTIVATE) lint-imports

fix: $(STAMP)
	$(ACTIVATE) ruff check --fix .
	$(ACTIVATE) ruff format .

bench: $(STAMP)
	$(ACTIVATE) python -m benchmarks.architectures run --again
	$(ACTIVATE) python -m benchmarks.architectures table
	$(ACTIVATE) python -m benchmarks.packages run --again
	$(ACTIVATE) python -m benchmarks.packages table
	$(ACTIVATE) python -m benchmarks.cases
	$(ACTIVATE) python -m research.regret report
	$(ACTIVATE) python -m benchmarks.peers tutorial --again
	$(ACTIVATE) python -m benchmarks.peers methods --again --seeds 0 1 2 3 4 --methods ours torchvision/8 $(if $(FASTAI),fastai --fastai $(FASTAI))
	$(ACTIVATE) python -m benchmarks.speed cache --size 128
	$(ACTIVATE) python -m benchmarks.speed memory
	$(ACTIVATE) python -m benchmarks.speed solvers
	$(ACTIVATE) python -m benchmarks.speed loop
	$(ACTIVATE) python -m benchmarks.speed workers
	$(ACTIVATE) python -m benchmarks.speed ray

docs: $(STAMP)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[docs]'
	$(ACTIVATE) NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet

# Mounts of their own for the test that fills a disk: no root is needed where the system lets users have namespaces.
chaos: OWN_MOUNTS = unshare --mount $(if $(filter-out 0,$(shell id -u)),--user --map-root-user)
chaos: $(STAMP)
	$(ACTIVATE) $(OWN_MOUNTS) python -m pytest -m chaos -s $(ARGS)

# pip brings uv, uv brings the rest: half a minute instead of several.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else f"tlpipeline needs Python 3.11 to 3.13, found {sys.version.split()[0]}: call make with PYTHON=python3.12, say")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf .venv demo
