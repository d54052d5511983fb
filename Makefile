.PHONY: check lint test smoke diffs table plots results gpu clean

check: lint test

lint:
	ruff check .
	ruff format --check .

test:
	python -m pytest -q -n 2

smoke:  ## the README's first command
	python bread.py --model tiny

diffs:  ## every method against its parent: the diff is the documentation
	@python results/methods.py diffs

table:  ## the tables of README.md
	python results/methods.py readme

results:  ## what the papers report and what it would cost: results/README.md
	python results/published.py write

gpu:  ## ten minutes on one card: results/gpu.md
	python results/gpu.py

plots:
	python plot.py runs/*

clean:
	rm -rf runs .pytest_cache .ruff_cache __pycache__ tests/__pycache__
