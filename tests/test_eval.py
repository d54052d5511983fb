"""eval.py: pass@k against enumeration, a table by hand, and on real folders."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import warm
from conftest import ROOT, run_script

import common
import eval as evaluation
from core import data
from core.rewards import Grade


def test_pass_at_k_by_hand():
    """1 - C(3, 2) / C(5, 2) = 0.7, the ends, and a k above n."""
    assert evaluation.pass_at_k(5, 2, 2) == pytest.approx(0.7)
    assert evaluation.pass_at_k(8, 0, 4) == 0
    assert evaluation.pass_at_k(8, 6, 4) == 1
    with pytest.raises(ValueError, match="pass@9"):
        evaluation.pass_at_k(8, 1, 9)


@pytest.mark.parametrize("n", [1, 4, 7])
def test_pass_at_k_against_enumeration(n):
    """The share of all subsets of k samples with a right one, for every n, c and k."""
    for c in range(n + 1):
        right = [i < c for i in range(n)]
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(right, k))
            assert evaluation.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_interval():
    """Half of a hundred problems right: 0.5 plus and minus two standard errors of 0.05."""
    low, high = evaluation.bootstrap_interval([0.0, 1.0] * 50)
    assert 0.38 < low < 0.42 and 0.58 < high < 0.62
    assert evaluation.bootstrap_interval([0.0, 1.0] * 50) == (low, high)
    assert evaluation.bootstrap_interval([0.5] * 9) == (0.5, 0.5)


def test_table_by_hand():
    """Three problems of two samples: 1 + 0, 0 + 0 and 1 + 1 right."""

    def sample(reward, finished=True, tokens=10, boxes=1):
        return {
            "reward": float(reward),
            "solved": reward == 1,
            "finished": finished,
            "tokens": tokens,
            "boxes": boxes,
            "verifier_error": False,
        }

    groups = [[sample(1), sample(0, False, 30)], [sample(0), sample(0, boxes=2)], [sample(1), sample(1)]]
    table = evaluation.summarize(groups, (1, 2, 4), 0)
    assert table["problems"] == 3 and table["avg@2"] == pytest.approx(0.5) and table["pass@1"] == pytest.approx(0.5)
    assert table["pass@2"] == pytest.approx(2 / 3) and "pass@4" not in table
    assert table["truncated"] == pytest.approx(1 / 6) and table["several_boxes"] == pytest.approx(1 / 6)
    assert table["mean_tokens"] == pytest.approx(80 / 6)


def run_eval(out: Path, *flags: str, nproc: int = 1, check: bool = True) -> subprocess.CompletedProcess:
    """Two samples of each test problem of the tiny model."""
    two = ["--model", "tiny", "--samples", "2", "--temperature", "1.0", *flags, "--out", str(out)]
    return run_script("eval.py", *two, nproc=nproc, check=check)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run, to compare others with."""
    out = tmp_path_factory.mktemp("whole")
    return out, run_eval(out).stdout


def test_report(whole):
    """Report, samples and protocol on disk and on the terminal say the same."""
    out, printed = whole
    entry = json.loads((out / "report.json").read_text())["test"]
    samples = [json.loads(line) for line in (out / "test.samples.jsonl").read_text().splitlines()]
    assert len(samples) == 2 * entry["result"]["problems"] == 128 and "avg@2" in printed
    assert entry["result"]["avg@2"] == pytest.approx(sum(s["reward"] for s in samples) / 128)
    protocol = entry["protocol"]
    assert protocol == json.loads((out / "test.protocol.json").read_text())
    wanted = "benchmark data_sha256 model weights_sha256 samples temperature top_p template first_prompt stop_ids"
    assert {*wanted.split(), "max_tokens", "versions"} <= set(protocol)
    assert f"data_sha256='{protocol['data_sha256']}'" in printed
    assert (protocol["samples"], protocol["temperature"], protocol["template"]) == (2, 1.0, "plain")


def test_two_processes_give_the_same_samples(whole, tmp_path):
    """Two ranks write the bytes that one does."""
    run_eval(tmp_path, nproc=2)
    assert (tmp_path / "test.samples.jsonl").read_text() == (whole[0] / "test.samples.jsonl").read_text()
    assert (tmp_path / "report.json").read_text() == (whole[0] / "report.json").read_text()


def test_killed_and_started_again(whole, tmp_path):
    """A torn line, a problem without its second sample, and problems that were never reached.

    The second start leaves the same samples and report.
    """
    shutil.copytree(whole[0], tmp_path / "torn")
    torn = tmp_path / "torn"
    (torn / "report.json").unlink()
    lines = (torn / "test.samples.jsonl").read_text().splitlines(keepends=True)
    (torn / "test.samples.jsonl").write_text("".join(lines[:41]) + lines[41][:30])
    printed = run_eval(torn).stdout
    assert "a torn line is left out" in printed and "20 of 64 problems are done already" in printed
    assert (torn / "test.samples.jsonl").read_text() == (whole[0] / "test.samples.jsonl").read_text()
    assert (torn / "report.json").read_text() == (whole[0] / "report.json").read_text()


def test_a_real_kill(tmp_path):
    """kill -9 after the first chunk of 128 problems is on disk."""
    rows = [json.dumps({"id": str(i), "problem": "1+2*3", "answer": "39"}) + "\n" for i in range(192)]
    (tmp_path / "many.jsonl").write_text("".join(rows))
    flags = ["eval.py", "--model", "tiny", "--data", str(tmp_path / "many.jsonl"), "--samples", "2"]
    flags += ["--max_tokens", "40", "--out"]
    command, environment = [sys.executable, *flags, str(tmp_path / "out")], {**os.environ, "OMP_NUM_THREADS": "1"}
    process = warm.Popen(command, cwd=ROOT, env=environment)
    samples, limit = tmp_path / "out/many.samples.jsonl", time.time() + 100
    while not (samples.exists() and samples.stat().st_size) and time.time() < limit:
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = len(samples.read_text().splitlines())
    printed = run_script(*flags, str(tmp_path / "out")).stdout
    run_script(*flags, str(tmp_path / "other"))
    assert before and (before >= 384 or "problems are done already" in printed)
    assert (tmp_path / "out/many.samples.jsonl").read_text() == (tmp_path / "other/many.samples.jsonl").read_text()


def test_another_protocol_is_refused(whole, tmp_path):
    """A folder takes no samples of another protocol; the sentence names what differs."""
    shutil.copytree(whole[0], tmp_path / "again")
    done = run_eval(tmp_path / "again", "--top_p", "0.9", check=False)
    assert done.returncode != 0 and "is of another protocol (top_p differ); choose another --out" in done.stderr


def test_named_benchmarks_in_a_folder_and_greedy(tmp_path):
    """Several names in one report; their own files; a bad name ends before a model is loaded."""
    for name in ("aime24.jsonl", "gsm8k_test.jsonl"):
        shutil.copy(ROOT / "tiny/test.jsonl", tmp_path / name)
    flags = ["--model", "tiny", "--data_dir", str(tmp_path), "--out", str(tmp_path / "out")]
    printed = run_script("eval.py", *flags, "--data", "aime24,gsm8k", "--greedy").stdout
    report = json.loads((tmp_path / "out/report.json").read_text())
    protocols = [report[name]["protocol"] for name in ("aime24", "gsm8k")]
    assert len(report) == 2 and all((p["samples"], p["temperature"]) == (1, 0) for p in protocols)
    assert report["aime24"]["result"] == report["gsm8k"]["result"] and "aime24" in printed
    for extra, sentence in (
        (["--data", "aime25"], "--data aime25: none of aime25.jsonl, aime25.jsonl.gz, aime25.parquet, aime25_test"),
        (["--data", "aime26", "--data_dir", ""], "--data aime26 is neither a file nor one of aime24, aime25"),
        (["--data", "nothing.jsonl"], "there is no data file nothing.jsonl"),
    ):
        done = run_script("eval.py", *flags, *extra, check=False)
        assert done.returncode != 0 and f"error: {sentence}" in done.stderr and "Traceback" not in done.stderr


def test_two_files_of_one_name_stay_apart():
    """By their folders; a dot in a name is no end of it."""
    names = "a/test.jsonl,b/test.jsonl.gz,set.v1.jsonl,set.v2.parquet,openai/gsm8k:main".split(",")
    assert [evaluation.label(name, names) for name in names] == ["a-test", "b-test", "set.v1", "set.v2", "gsm8k:main"]
    assert evaluation.label("a/test.jsonl", ["a/test.jsonl"]) == "test"


@pytest.mark.parametrize("name", evaluation.BENCHMARKS)
def test_hub_names(name, monkeypatch, tokenizer, capsys):
    """What is asked of the hub, the test split where there is one, and these sets' columns."""
    rows = {
        "gsm8k": {"question": "1+1?", "answer": "so\n#### 2"},
        "olympiad": {"question": "1+1?", "final_answer": ["2"]},
    }.get(name, {"problem": "1+1?", "answer": 2})
    asked = []

    def load_dataset(path, configuration=None):
        asked.append((path, configuration))
        return {"train": [rows], "test": [rows, rows]} if name != "aime24" else {"train": [rows]}

    monkeypatch.setattr(data.datasets, "load_dataset", load_dataset)
    problems = common.load_problems(evaluation.locate(name, ""), tokenizer, split="test")
    assert ("there is no split test; train is taken" in capsys.readouterr().out) == (name == "aime24")
    assert asked == [("openai/gsm8k", "main") if name == "gsm8k" else (evaluation.BENCHMARKS[name][0], None)]
    assert len(problems) == (1 if name == "aime24" else 2) and problems[0].answer == "2"


def fake_report(folder: Path, rewards: dict[str, list[int]], **protocol) -> Path:
    """The folder that a finished run with these rewards by problem leaves."""
    folder.mkdir(parents=True)
    groups = [
        [
            {
                "id": key,
                "reward": r,
                "solved": r == 1,
                "finished": True,
                "tokens": 5,
                "boxes": 1,
                "verifier_error": False,
            }
            for r in row
        ]
        for key, row in rewards.items()
    ]
    entry = {"result": evaluation.summarize(groups, (1,), 0), "protocol": {"data_sha256": "x", "seed": 0} | protocol}
    (folder / "report.json").write_text(json.dumps({"math500": entry}))
    (folder / "math500.samples.jsonl").write_text("".join(json.dumps(s) + "\n" for group in groups for s in group))
    return folder


def test_compare_and_table(tmp_path):
    """By hand: three problems, 1/6 -> 4/6; p1 and p3 rose above one half, p2 fell below.

    The paired interval is over problems.
    """
    one = fake_report(tmp_path / "runs/one/final/eval", {"p1": [0, 0], "p2": [1, 0], "p3": [0, 0]})
    two = fake_report(tmp_path / "two", {"p1": [1, 1], "p2": [0, 0], "p3": [1, 1]}, seed=1)
    printed = run_script("eval.py", "--compare", str(one), str(two)).stdout
    assert "math500: 0.1667 -> 0.6667, difference +0.5000 (-0.5000 to +1.0000, 95 % over 3 problems)" in printed
    assert "gained 2: p1 p3" in printed and "lost 1: p2" in printed and "protocols differ in: seed" in printed
    printed = run_script("eval.py", "--table", str(one), str(two)).stdout
    assert "| run | math500 | mean |" in printed
    assert "| one | 16.7 ± 25.0 | 16.7 |" in printed and "| two | 66.7 ± 50.0 | 66.7 |" in printed
    other = fake_report(tmp_path / "other", {"p1": [1]}, data_sha256="y")
    done = run_script("eval.py", "--compare", str(one), str(other), check=False)
    assert done.returncode != 0 and "were made on different problems" in done.stderr
    done = run_script("eval.py", "--table", str(tmp_path / "nothing"), check=False)
    assert done.returncode != 0 and "there is no" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "text", ["", "[1]", "{}x", '{"a": 1}', '{"a": {"result": {}}}', '{"a": {"result": {"avg@1": 1}}}']
)
def test_a_broken_report_is_named_before_a_model_is_loaded(tmp_path, text):
    """Cut off, of another program, or of another kind."""
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(SystemExit, match="report.json is no report of eval.py"):
        evaluation.read_report(tmp_path)
    if not text:
        done = run_script("eval.py", "--model", "map", "--out", str(tmp_path), check=False)
        assert done.returncode != 0 and "is no report of eval.py" in done.stderr and "Traceback" not in done.stderr


def test_what_another_evaluation_wrote_meanwhile_stays(monkeypatch, tmp_path):
    """Two of one model at once: both benchmarks are in the report."""
    theirs = fake_report(tmp_path / "theirs", {"p1": [1]}) / "report.json"
    mine = {**json.loads(theirs.read_text())["math500"]}
    mine["protocol"] = mine["protocol"] | {"benchmark": "test"}

    def run(*_):
        (tmp_path / "report.json").write_text(theirs.read_text())
        return mine

    monkeypatch.setattr(evaluation, "run", run)
    monkeypatch.setattr(common, "load_sampler", lambda *_: None)
    evaluation.main(evaluation.Config(model="map", data=str(ROOT / "map/test.jsonl"), out=str(tmp_path)))
    assert list(json.loads((tmp_path / "report.json").read_text())) == ["math500", "test"]


def test_the_sampler_gets_the_flags_of_the_evaluation(monkeypatch, tmp_path, world):
    """Model, engine and prompt limit as a RunConfig; the completion limit beside it."""
    asked = []

    def load_sampler(run, tokenizer, world, max_completion_tokens):
        asked.extend([run, max_completion_tokens])
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "load_sampler", load_sampler)
    flags = {"model": "tiny", "sampler": "hf", "sampler_memory": 0.7, "tensor_parallel": 2, "max_prompt_tokens": 33}
    with pytest.raises(KeyboardInterrupt):
        evaluation.main(evaluation.Config(**flags, max_tokens=44, data="x.jsonl", out=str(tmp_path)))
    assert asked == [common.RunConfig(**flags), 44]


def test_verifier_errors_are_per_sample(monkeypatch):
    """A batch with an error is looked at sample by sample."""

    def graded(problems, texts, progress, boxes):
        return [Grade(0.0)] * len(texts), sum("bad" in text for text in texts)

    monkeypatch.setattr(common, "grade", graded)
    question = common.Problem("a", "", [], "2", None)
    lines = evaluation.grade([[common.Rollout(question, [1], text=t) for t in ("bad", "good")]], "zero")
    assert [s["verifier_error"] for s in lines[0]] == [True, False]


def test_the_second_score_is_math_verify_alone():
    """A number without a box counts for it, a word's anagram too; Countdown has no such score."""
    asked = [
        ("2", "so it is 2."),
        ("2", r"\boxed{2}"),
        ("Paris", r"\boxed{sirap}"),
        ({"target": 3, "nums": [1, 2]}, "3"),
    ]
    groups = [
        [common.Rollout(common.Problem(str(i), "", [], gold, None), [1], text=text)]
        for i, (gold, text) in enumerate(asked)
    ]
    lines = evaluation.grade(groups, "zero")
    assert [sample["math_verify"] for (sample,) in lines] == [1.0, 1.0, 1.0, None]
    result = evaluation.summarize(lines, (1,), 0)
    assert (result["avg@1"], result["math_verify"], result["differ"]) == (0.25, 1.0, 2)
