# The only entry points. Each target makes the virtual environment it needs, once, from python3 and pip alone.

PYTHON ?= python3
VENV ?= .venv
VENV_20 ?= .venv-2.0
ARGS ?=

# node comes with pyright's package; one that happens to be installed may be too old for it
export PYRIGHT_PYTHON_GLOBAL_NODE = 0
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# the theme announces another product at every build
export NO_MKDOCS_2_WARNING = 1

# $(1) a name, $(2) the SQLAlchemy to install beside the wheel
define smoke
$(PYTHON) -m venv .smoke/$(1)
.smoke/$(1)/bin/python -m pip install --quiet .smoke/*.whl '$(2)'
mkdir .smoke/$(1)/empty
cd .smoke/$(1)/empty && ../bin/python -I $(CURDIR)/tests/smoke.py
endef
comma := ,

.NOTPARALLEL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo test test-kms test-sqlalchemy test-2.0 oracle check format bench bench-kms bench-jobs walk plots docs \
	smoke clean

help: ## show this list
	@grep -hE '^[a-z][a-z0-9.-]*:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | awk -F '\t' '{printf "make %-15s %s\n", $$1, $$2}'
	@echo 'ARGS="…" is passed on: make test ARGS="-k search"'
	@echo 'another Python: make test PYTHON=python3.13 VENV=.venv-3.13'

demo: $(VENV)/test.stamp ## see it work, start to end
	$(VENV)/bin/python examples/demo.py $(ARGS)

test: $(VENV)/test.stamp .alembic/stamp ## run the tests on the newest SQLAlchemy
	$(VENV)/bin/python -m pytest $(ARGS)

# The oracle and the machine bring keys of their own.
test-kms: $(VENV)/test.stamp ## run the ORM's tests with tenants whose keys are in AWS KMS and Azure Key Vault
	$(VENV)/bin/python -m pytest --kms=clouds tests/orm tests/test_tenancy.py tests/test_tenancy_async.py \
		tests/test_isolation.py tests/test_threads.py $(foreach name,oracle oracle_processes machine, \
		--ignore tests/orm/test_$(name).py) $(ARGS)

test-sqlalchemy: $(VENV)/test.stamp ## run SQLAlchemy's own tests on attached engines; takes half an hour
	$(VENV)/bin/python tests/upstream_suite.py $(ARGS)

test-2.0: $(VENV_20)/test.stamp .alembic/stamp ## run the tests on SQLAlchemy 2.0
	$(VENV_20)/bin/python -m pytest $(ARGS)

oracle: $(VENV)/test.stamp ## 20,000 random queries beside plaintext on each database, while keys rotate (half an hour)
	$(VENV)/bin/python -m pytest tests/orm/test_oracle_processes.py --require-all --comparisons 20000 $(ARGS)

check: $(VENV)/test.stamp $(VENV)/check.stamp ## format, lint, types, import rules
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy --strict tests/typing/model.py
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python tests/typing/model.py
	$(VENV)/bin/lint-imports

format: $(VENV)/check.stamp ## put the code in the house's format
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

bench: $(VENV)/test.stamp ## measure, side by side with plain SQLAlchemy
	$(VENV)/bin/python benchmarks/run.py $(ARGS)

bench-kms: $(VENV)/test.stamp ## count KMS calls and their time, envelope beside direct mode
	$(VENV)/bin/python benchmarks/kms.py $(ARGS)

bench-jobs: $(VENV)/test.stamp ## measure jobs beside a bare UPDATE of the same bytes, on PostgreSQL
	$(VENV)/bin/python benchmarks/jobs.py $(ARGS)

walk: $(VENV)/test.stamp $(VENV)/check.stamp ## count how a statement walks through the code, and the code's size
	$(VENV)/bin/python benchmarks/walk.py $(ARGS)

plots: $(VENV)/docs.stamp ## draw the plots of the documentation again
	$(VENV)/bin/python benchmarks/plot.py

docs: $(VENV)/docs.stamp ## build the documentation into site/
	$(VENV)/bin/mkdocs build --strict $(ARGS)

smoke: $(VENV)/check.stamp ## build the wheel and try it, installed, on each SQLAlchemy line
	rm -rf .smoke
	$(VENV)/bin/python -m build --wheel --outdir .smoke .
	$(call smoke,2.0,sqlalchemy>=2.0.40$(comma)<2.1)
	$(call smoke,2.1,sqlalchemy>=2.1; python_version >= "3.11")

clean: ## remove all that these targets made
	rm -rf $(VENV) $(VENV_20) .alembic dist site .smoke .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find sqla_byok tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python $(VENV_20)/bin/python:
	$(PYTHON) -m venv $(patsubst %/bin/python,%,$@)
	$@ -m pip install --quiet --upgrade "pip>=25.1"

# Versions of Alembic whose plugins differ, beside the newest: tests/test_alembic.py.
.alembic/stamp: tests/test_alembic.py | $(VENV)/bin/python
	rm -rf .alembic
	for version in $$(sed -n 's/^OLDER = (\(.*\))/\1/p' $< | tr -d '",'); do \
		$(VENV)/bin/python -m pip install --quiet --no-deps --target .alembic/$$version alembic==$$version || exit; \
	done
	@touch $@

$(VENV)/%.stamp: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --editable . --group $*
	@touch $@

$(VENV_20)/%.stamp: pyproject.toml | $(VENV_20)/bin/python
	$(VENV_20)/bin/python -m pip install --quiet --editable . --group $* "sqlalchemy>=2.0.40,<2.1"
	@touch $@
