"""The cells of results/claims.py: their flags are the files' own, and one run leaves its record."""

import importlib
import json
import sys

import pytest
from conftest import ROOT, run_script

import common
import relift
import sft
from results import claims, compared
from results.accumulation_bugs import weights

GRID = [
    {"cell": f"rate/{arm}/{method}/{rate:g}", "seed": 100, "accuracy": {"0": 1.0, "10": score}}
    for arm in ("controlled", "paper")
    for method in claims.METHODS
    for rate, score in zip(claims.RATES, (0.1, 0.3, 0.2), strict=True)
]


def test_every_stage_parses(monkeypatch):
    """By the file's own parser; what is set is what the cell says."""
    cells, seen = claims.cells(GRID, 60), set()
    assert len({cell.name for cell in cells}) == len(cells)
    for script, flags in (stage for cell in cells for stage in cell.stages):
        words, module = claims.command_line(flags), importlib.import_module(script)
        if (key := (script, *words)) in seen:
            continue
        seen.add(key)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", "--model", "map", *words])
        cfg = common.parse(module.Config)
        for name, value in flags.items():
            assert getattr(cfg, name, getattr(cfg.run, name, None)) == value, (script, name)


def test_the_grid_comes_first_and_its_best_rate_goes_into_the_rest():
    """Without all rates of the grid nothing else is there; an unfinished method has none."""
    assert {cell.name.split("/")[0] for cell in claims.cells(GRID[:-1], 60)} == {"rate"}
    assert len(claims.cells([], 60)) == len(claims.METHODS) * 2 * len(claims.RATES)
    rest = [cell for cell in claims.cells(GRID, 60) if not cell.name.startswith("rate/")]
    assert {flags["lr"] for cell in rest for _, flags in cell.stages} == {3e-4}
    assert {len(cell.seeds) for cell in rest if cell.name.startswith(("controlled/", "paper/", "audit/"))} == {5}


def test_controlled_differs_only_by_what_is_the_methods_own():
    """The knobs of CONTROLLED have one value in all files; the upper clip is dapo's own."""
    for cell in claims.cells(GRID, 60):
        if cell.name.startswith("controlled/"):
            for script, flags in cell.stages:
                shared = {k: flags[k] for k in claims.has(script, claims.CONTROLLED)}
                assert shared == claims.has(script, claims.CONTROLLED) | (
                    {"clip_high": 0.28} if script == "dapo" else {}
                )


def test_paper_has_the_files_defaults():
    """But for the rate, 32 problems a step, and what is scaled to them and to the run."""
    given = {"lr", "sft_lr", "steps", "problems_per_step"}
    for cell in claims.cells(GRID, 60):
        for script, flags in cell.stages if cell.name.startswith("paper/") else ():
            config, scaled = importlib.import_module(script).Config(), {*claims.SCALED.get(script, {})}
            other = {k for k, v in flags.items() if v != getattr(config, k, getattr(config.run, k, None))}
            assert other <= given | scaled | {*claims.PAPER.get(script, {})}, script


@pytest.mark.parametrize("bug", claims.BUGS)
def test_the_bugs_of_sft_are_the_published_ones(bug, world, monkeypatch):
    """Their weights of each micro-batch are those of results/accumulation_bugs.py."""
    rows = [common.Rollout(common.Problem(str(i), "", [1], "", None), [2] * (i + 1), i + 1) for i in range(12)]
    counts, whole = common.count(rows, world), common.microbatches
    monkeypatch.setattr(sft, "loss_fn", sft.loss_fn)
    monkeypatch.setattr(common, "microbatches", whole)
    claims.break_sft(bug, sft)
    found = {}
    for batch in common.microbatches(rows, 0, world):
        logprobs = batch.completion_mask.float().requires_grad_()
        sft.loss_fn(sft.Config(), batch, logprobs, logprobs.detach(), None, counts)[0].backward()
        found[len(batch.rollouts[0].completion_ids) // 4] = -logprobs.grad.min().item()
    wanted = weights([10, 26, 42], bug)
    assert found == pytest.approx({i: w for i, w in enumerate(wanted) if w})


def test_random_questions_are_as_many_as_failed(monkeypatch):
    """And any of the training problems, the same for one seed."""
    seen = []
    monkeypatch.setattr(relift, "push_and_pop", lambda buffer, failed, *how: seen.append((buffer, failed, how)))
    ids = {json.loads(line)["id"] for line in (ROOT / "map/train.jsonl").read_text().splitlines()}
    whole = relift.push_and_pop
    for _ in range(2):
        monkeypatch.setattr(relift, "push_and_pop", whole)
        claims.ask_at_random(relift, 1)
        relift.push_and_pop(["a"], ["b", "c", "d"], 32, "newest")
    assert seen[0] == seen[1] and seen[0][0] == ["a"] and seen[0][2] == (32, "newest")
    assert len({*seen[0][1]}) == 3 and {*seen[0][1]} <= ids


def test_a_share_of_the_traces(tmp_path):
    """Of the same problems in the same order."""
    claims.make_data(tmp_path)
    files = [ROOT / "map/train.jsonl", tmp_path / f"some_{claims.SHARE}.jsonl"]
    rows = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    traced = [{row["id"] for row in part if row["solution"]} for part in rows]
    assert [len(part) for part in traced] == [512, 205]
    assert all([{**row, "solution": 0} for row in part] == [{**row, "solution": 0} for row in rows[0]] for part in rows)
    hard = {len((tmp_path / f"tail_{name}.jsonl").read_text().splitlines()) for name in claims.TAIL_TRACES}
    assert hard == {170}


def test_rates_are_those_of_the_records_where_other_cells_alone_are_asked_for(tmp_path):
    """And of OUT's own grid where there is one; a word of the grid asks for it."""

    def todo(*only: str) -> list[str]:
        return [cell.name for cell, _ in claims.left(claims.Config(only=only, out=tmp_path), set())]

    assert todo("uft, fixed") == ["ablation/uft, fixed hint"] * 3 and todo() == todo("rate/")
    assert not [name for name in todo("uft") if name.startswith("rate/")]
    cells, lines = claims.cells(claims.recorded(), 60), compared.load()
    assert all(json.loads(json.dumps(c.stages)) == lines[c.name]["stages"] for c in cells if c.name in lines)
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in GRID))
    (cell, _), *_ = claims.left(claims.Config(only=("uft, fixed",), out=tmp_path), set())
    assert cell.stages[0][1]["lr"] == 3e-4 and "rate/paper/uft/0.001" not in todo("rate/controlled")


def test_a_run_leaves_its_record(tmp_path):
    """Two steps of a method: what is missing is run, and nothing a second time."""
    flags = [
        "--out",
        str(tmp_path),
        "--steps",
        "2",
        "--only",
        "rate/controlled/sft/0.001",
        "--jobs",
        "1",
        "--samples",
        "1",
    ]
    done = run_script("results/claims.py", *flags)
    (record,) = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert (record["cell"], record["seed"]) == ("rate/controlled/sft/0.001", 100)
    assert set(record["accuracy"]) == {"0", "2"} and set(record["splits"]) == {"test", "hard", "long", "easy"}
    assert record["curves"]["trained_tokens"][0] > 1000 and len(record["commit"]) == 40
    assert "1 runs to go" in done.stdout and "runs to go" not in run_script("results/claims.py", *flags).stdout
