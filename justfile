# Targets that CONTRIBUTING names and .ci/run calls. `just` alone lists them.
# The programs are those of the active environment.

_default:
    @just --list --unsorted

# Tests on the CPU; arguments go to pytest
test *arguments:
    python -m pytest {{arguments}}

# The kernels' tests without a GPU: needs Python 3.12 and jax >= 0.11
kernels *arguments:
    python -m pytest tests/kernels {{arguments}}

# Tests on a Hopper GPU
gpu *arguments:
    python -m pytest -m gpu {{arguments}}

# Lint, format and types
lint:
    ruff check .
    ruff format --check .
    pyright --pythonpath "$(python -c 'import sys; print(sys.executable)')"

# The documentation as a site, in `site/`
docs:
    mkdocs build --strict

# Every benchmark suite once, tiny, on the CPU; for real ones see docs/guides/benchmarks.md
bench:
    python -m benchmarks quick
