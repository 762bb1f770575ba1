# Short names for what CONTRIBUTING.md describes. Without just (https://just.systems), run the commands themselves.

# list the recipes
default:
    @just --list

# install the workspace with all development tools
setup:
    uv sync

# style, types and import contracts
lint:
    uv run ruff check .
    uv run ruff format --check .
    uv run lint-imports
    uv run pyright

# rewrite what the linters can fix
fix:
    uv run ruff check --fix .
    uv run ruff format .

# tests on a CPU; for example: just test tests/cp -k layout
test *arguments:
    uv run pytest {{arguments}}

# tests that need a GPU
test-gpu *arguments:
    uv run pytest -m gpu {{arguments}}

# tests with coverage; the report lists lines that no test runs
coverage *arguments:
    uv run pytest --cov --cov-report=term {{arguments}}

# build the documentation into site/
docs:
    uv run mkdocs build --strict

# serve the documentation on a local port and rebuild on changes
docs-serve:
    uv run mkdocs serve

# run every example on its small inputs
examples:
    uv run pytest tests/docs/test_examples.py

# everything that must hold before a change lands
ci:
    bash .ci/run

# the quickstart, on a CPU
quickstart:
    uv run eagle train quickstart --device cpu
