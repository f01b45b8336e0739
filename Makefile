# The commands of the README. `make` alone lists them. Needs a POSIX shell and Python 3.12 or 3.13.

VENV ?= .venv
PROFILE ?= auto
OVERRIDES ?=
WORKDIR ?=
ONLY ?=
FRESH ?=
ARGS ?=

# Values reach the shell through the environment, unexpanded: spaces, quotes and braces in them stay as they are.
export FIQA_VENV := $(value VENV)
export FIQA_PROFILE := $(value PROFILE)
export FIQA_OVERRIDES := $(value OVERRIDES)
export FIQA_WORKDIR := $(value WORKDIR)
export FIQA_ONLY := $(value ONLY)
python = "$$FIQA_VENV/bin/python"
# $(call extra,NAME,MODULES): what only one command needs comes into the environment when that is first called
extra = $(python) -c "from importlib.util import find_spec; import sys; sys.exit(None in map(find_spec, sys.argv[1:]))" \
	$(2) || $(python) -m pip install --quiet --disable-pip-version-check --no-build-isolation \
	-c constraints.txt -e ".[$(1)]"
# make hands variables of its command line to every program below it. A `make` that a test starts elsewhere
# would take them for its own wishes, and build its environment over this one.
unexport VENV PROFILE OVERRIDES WORKDIR ONLY FRESH ARGS
MAKEOVERRIDES =

.DEFAULT_GOAL := help
.PHONY: help run test test-slow lab book executed slides bench env check preflight bundle lint format exercises clean-notebooks clean lock

help:  ## list these commands
	@echo "make COMMAND [NAME=value ...]"
	@sed -n 's/^\([a-z-]*\):[^#]*## /  \1|/p' Makefile | awk -F'|' '{ printf "%-16s %s\n", $$1, $$2 }'
	@echo
	@echo "For run:  PROFILE=auto|laptop|gpu24|gpu80  OVERRIDES='{max_steps: 20}'  WORKDIR=folder  ONLY=01,02  FRESH=1"
	@echo "For all:  VENV=folder (default .venv)  PYTHON=python3.13  ARGS='more arguments for the program called'"

run: env  ## run the whole tutorial without a browser, with progress; ends with a table of results
	@$(python) -m fiqa_helpers run --profile "$$FIQA_PROFILE" --overrides "$$FIQA_OVERRIDES" \
		--workdir "$$FIQA_WORKDIR" --only "$$FIQA_ONLY" $(if $(filter-out 0 no false,$(FRESH)),-p on_existing=fresh) $(ARGS)

# Several files of tests at a time; in their order, which has what may take longest first (conftest.py).
# ARGS="-n 0" runs one after the other, for a debugger.
by_file = --dist loadfile --no-loadscope-reorder
test: env  ## lint, unit tests, and every notebook executed once, shortened
	@$(python) -m ruff check .
	@$(python) -m ruff format --check .
	@$(call extra,book,myst_nb furo)
	@$(python) -m pytest -m "not slow" -n 2 $(by_file) $(ARGS)

test-slow: env  ## the second tier of tests: longer runs, kills, resumes
	@$(python) -m pytest -m slow tests/test_notebooks.py $(ARGS)  # alone, as it has a limit of minutes
	@$(python) -m pytest -m slow --ignore tests/test_notebooks.py -n 3 $(by_file) $(ARGS)  # they wait a lot

# Settings (scripts/lab/overrides.json) and layout (kept in outputs/) of the project: nothing of your own JupyterLab's
# is changed, and what you have set for yourself there still counts. A kernel that has run nothing for IDLE seconds (0: ever
# so long) is ended, as each may hold a model's memory; what you typed and what was shown stays on the page.
IDLE ?= 1800
lab: env  ## open the workshop in JupyterLab
	@ls outputs/jupyterlab/workshop-* >/dev/null 2>&1 || $(python) -m jupyterlab workspaces import \
		--LabWorkspaceImportApp.workspaces_dir=outputs/jupyterlab --LabWorkspaceImportApp.log_level=WARN \
		scripts/lab/workspace.json
	@$(python) -m jupyterlab --ServerApp.root_dir=. --LabApp.default_url=/lab/workspaces/workshop \
		--LabApp.app_settings_dir=scripts/lab --LabApp.workspaces_dir=outputs/jupyterlab \
		--MappingKernelManager.cull_idle_timeout=$(IDLE) --MappingKernelManager.cull_connected=True \
		$(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS)

book: env  ## render the executed notebooks and the docs as a static site in outputs/book
	@$(call extra,book,myst_nb furo)
	@$(python) scripts/make_book.py "$$FIQA_WORKDIR" $(ARGS)

executed: env  ## write notebooks/executed from a run: the notebooks with their results, to read without running
	@$(python) scripts/executed.py "$$FIQA_WORKDIR"

slides: env  ## write outputs/slides.html: the notebooks' figures, plots and predictions, for a projector
	@$(python) scripts/slides.py

bench: env  ## speed beside TRL, NeMo and others: on a GPU the 8B model (8 minutes), else the laptop profile
	@$(call extra,bench,trl)
	@$(python) benchmarks/bench.py $(ARGS)

env:  ## make or update the environment only
	@scripts/make_env.sh "$$FIQA_VENV"

check: env  ## check this machine: one line for each requirement, for bug reports too
	@$(python) -m fiqa_helpers check --profile "$$FIQA_PROFILE" --overrides "$$FIQA_OVERRIDES" \
		--workdir "$$FIQA_WORKDIR" $(ARGS)

preflight: env  ## the night before a lesson: the same, with model and data on this disk
	@$(python) -m fiqa_helpers check --offline --profile "$$FIQA_PROFILE" --overrides "$$FIQA_OVERRIDES" \
		--workdir "$$FIQA_WORKDIR" $(ARGS)

bundle: env  ## pack the project with model and data into one archive for a stick, outputs/fiqa-workshop.tar
	@scripts/bundle.sh $(ARGS)

lint: env  ## ruff over code and notebooks
	@$(python) -m ruff check .
	@$(python) -m ruff format --check .

format: env  ## let ruff format code and notebooks
	@$(python) -m ruff check --fix .
	@$(python) -m ruff format .

exercises: env  ## write the exercises into the notebooks, from notebooks/solutions
	@$(python) scripts/exercises.py

clean-notebooks: env  ## write outputs/clean: headings and code only; ARGS=--short leaves out what is extra
	@$(python) scripts/clean_notebooks.py $(ARGS)

clean:  ## delete what runs wrote here (data, checkpoints, outputs) and tool caches; keeps the environment
	rm -rf data checkpoints outputs build .pytest_cache .ruff_cache .hypothesis *.egg-info
	find notebooks fiqa_helpers tests -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

lock: env  ## pin all dependencies again in constraints.txt (needs an index; UPGRADE=1 takes the newest versions)
	@$(python) -m uv --version >/dev/null 2>&1 || $(python) -m pip install --quiet uv
	@$(python) -m uv pip compile pyproject.toml --all-extras --universal --python-version 3.12 --no-config \
		--no-emit-index-url --no-emit-find-links --annotation-style line $(if $(UPGRADE),--upgrade) \
		--custom-compile-command "make lock" --quiet --output-file constraints.txt
