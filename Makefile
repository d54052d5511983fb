.PHONY: check lint test smoke diffs plots clean

check: lint test

lint:
	ruff check .
	ruff format --check .

test:
	python -m pytest -q

smoke:  ## the README's first command
	python bread.py --model tiny

diffs:  ## every method against its parent: the diff is the documentation
	@for child in bread sft; do echo "=== diff grpo.py $$child.py"; diff grpo.py $$child.py; done; true

plots:
	python plot.py runs/*

clean:
	rm -rf runs .pytest_cache .ruff_cache __pycache__ tests/__pycache__
