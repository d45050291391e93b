# make check    formatting, lint, types, fast tests
# make test-all everything, as CI does it
.PHONY: check test-all

check:
	ruff format --check .
	ruff check .
	ty check fgtrain scripts tests
	pytest

test-all: check
	pytest -m slow
