.PHONY: check lint test smoke diffs table results plots gpu speedrun clean

check: lint test

lint:
	ruff check .
	ruff format --check .

test:
	python -m pytest -q -n 2

smoke:  ## the README's first command
	python bread.py --model map

diffs:  ## every method against its parent: the diff is the documentation
	@python results/methods.py diffs

table:  ## the tables of README.md
	python results/methods.py readme

results:  ## tables, verdicts and figures from results/*.jsonl, and what the papers report
	python results/verdicts.py
	python results/real.py --page
	python results/published.py write

gpu:  ## ten minutes on one card: results/gpu.md
	python results/gpu.py

speedrun:  ## a real model learns to add, by four methods at once, on one card: results/real.jsonl
	python results/real.py --methods sft_then_grpo grpo bread luffy --jobs 5

plots:
	python plot.py runs/*

clean:
	rm -rf runs .pytest_cache .ruff_cache __pycache__ tests/__pycache__
