# The commands of CONTRIBUTING.md and of .github/workflows, in one place. Tools are those of the environment that is active.
.PHONY: install lint check test long slow sandbox gpu docs site

FAST = tests/house tests/methods tests/losses tests/options

install:  ## the package, editable, with all that the tests need
	pip install -c constraints.txt -e ".[dev]"

lint:  ## style, types, direction of imports
	ruff check .
	ruff format --check .
	mypy
	lint-imports

check: lint  ## before every commit: the above and the fast tests, in under a minute
	pytest -n auto $(FAST)

test:  ## the README's test command
	pytest -n auto

docs:  ## do commands, options, modules, files and links that the documents name exist?
	pytest tests/house/test_docs_commands.py

site:  ## the documentation site, in site/index.html
	python docs/build.py

long:  ## what takes over 5 s: some minutes
	pytest -n auto -m long

sandbox:  ## needs bubblewrap
	pytest -m sandbox

gpu:  ## needs a CUDA device
	pytest -m gpu

slow:  ## an hour: real models, studies killed, provocations
	pytest -m slow
