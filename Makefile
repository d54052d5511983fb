.PHONY: check lint test smoke diffs plots clean

check: lint test

lint:
	ruff check .
	ruff format --check .

test:
	python -m pytest -q -n 2

smoke:  ## the README's first command
	python bread.py --model tiny

diffs:  ## every method against its parent: the diff is the documentation
	@for child in bread luffy relift prefix_rft uft bridge chord hpt trapo sft; do echo "=== diff grpo.py $$child.py"; diff grpo.py $$child.py; done; true
	@echo "=== diff luffy.py srft.py"; diff luffy.py srft.py; echo "=== diff sft.py iw_sft.py"; diff sft.py iw_sft.py; true

plots:
	python plot.py runs/*

clean:
	rm -rf runs .pytest_cache .ruff_cache __pycache__ tests/__pycache__
