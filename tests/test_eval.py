"""pass@k against enumeration, the interval, a table computed by hand, and both scripts on real folders."""

import itertools
import json

import pytest
from conftest import ROOT, run_script

import eval as evaluation


def test_pass_at_k_by_hand():
    assert evaluation.pass_at_k(5, 2, 2) == pytest.approx(0.7)
    assert evaluation.pass_at_k(8, 0, 4) == 0
    assert evaluation.pass_at_k(8, 6, 4) == 1
    with pytest.raises(ValueError, match="pass@9"):
        evaluation.pass_at_k(8, 1, 9)


@pytest.mark.parametrize("n", [1, 4, 7])
def test_pass_at_k_against_enumeration(n):
    for c in range(n + 1):
        right = [i < c for i in range(n)]
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(right, k))
            assert evaluation.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_interval():
    low, high = evaluation.bootstrap_interval([0.0, 1.0] * 50)
    assert 0.38 < low < 0.42 and 0.58 < high < 0.62
    assert evaluation.bootstrap_interval([0.0, 1.0] * 50) == (low, high)
    assert evaluation.bootstrap_interval([0.5] * 9) == (0.5, 0.5)


def test_table_by_hand():
    def sample(reward, finished=True, tokens=10, boxes=1):
        return {"reward": float(reward), "finished": finished, "tokens": tokens, "boxes": boxes}

    groups = [[sample(1), sample(0, False, 30)], [sample(0), sample(0, boxes=2)], [sample(1), sample(1)]]
    table = evaluation.summarize(groups, (1, 2, 4), 0)
    assert table["problems"] == 3 and table["avg@2"] == pytest.approx(0.5) and table["pass@1"] == pytest.approx(0.5)
    assert table["pass@2"] == pytest.approx(2 / 3) and "pass@4" not in table
    assert table["truncated"] == pytest.approx(1 / 6) and table["several_boxes"] == pytest.approx(1 / 6)
    assert table["mean_tokens"] == pytest.approx(80 / 6)


@pytest.mark.parametrize("nproc", [1, 2])
def test_eval_script(nproc, tmp_path):
    """The same samples and so the same report on one and two processes."""
    out = tmp_path / "report.json"
    done = run_script("eval.py", "--model", "tiny", "--samples", "2", "--temperature", "1.0", "--out", str(out), nproc=nproc)
    report = json.loads(out.read_text())
    samples = [json.loads(line) for line in (tmp_path / "report.samples.jsonl").read_text().splitlines()]
    assert len(samples) == 2 * report["result"]["problems"] == 128 and "avg@2" in done.stdout
    assert report["result"]["avg@2"] == pytest.approx(sum(s["reward"] for s in samples) / 128)
    assert report["protocol"]["temperature"] == 1.0 and len(report["protocol"]["data_sha256"]) == 64
    texts = json.dumps([s["text"] for s in samples])
    previous = getattr(test_eval_script, "texts", texts)
    test_eval_script.texts = texts
    assert texts == previous


def test_greedy(tmp_path):
    out = tmp_path / "greedy.json"
    run_script("eval.py", "--model", "tiny", "--greedy", "--data", str(ROOT / "tiny/test.jsonl"), "--out", str(out))
    assert json.loads(out.read_text())["protocol"]["samples"] == 1


def test_plot(tmp_path):
    for name, keys in (("a", {}), ("b", {"search_rate": 0.5, "test_accuracy": 0.1})):
        (tmp_path / name).mkdir()
        rows = [{"step": s, "reward": 0.1 * s, "entropy": 1.0, "completion_tokens": 9.0, **keys} for s in range(4)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "rew')
    done = run_script("plot.py", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "x.png"))
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG" and "metrics.jsonl:5 is torn and left out" in done.stdout


@pytest.mark.parametrize(("content", "sentence"), [(None, "there is no"), ("", "holds no step yet")])
def test_plot_without_metrics(content, sentence, tmp_path):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    done = run_script("plot.py", str(tmp_path), check=False)
    assert done.returncode != 0 and sentence in done.stderr and "Traceback" not in done.stderr
