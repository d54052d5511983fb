"""Every script by its README command, in one and two processes, on the tiny world and on real rows; and the learning bar."""

import json
from pathlib import Path

import pytest
from conftest import ROOT, run_script

DATA = ROOT / "tests/data"
SMALL = ["--steps", "2", "--problems_per_step", "3"]


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("script", ["bread", "grpo", "sft"])
def test_two_processes_equal_one(script, tmp_path):
    """torchrun on two ranks draws the same problems, samples the same completions and makes the same update."""
    extra = [] if script == "sft" else ["--group_size", "4"]
    for nproc in (1, 2):
        run_script(f"{script}.py", "--model", "tiny", *SMALL, *extra, "--out", str(tmp_path / str(nproc)), nproc=nproc)
    one, two = rows(tmp_path / "1"), rows(tmp_path / "2")
    assert len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            if not key.startswith(("seconds", "tokens_per_second", "peak_memory", "search_rounds")):
                assert b[key] == pytest.approx(a[key], rel=2e-3, abs=2e-4), key
    assert json.loads((tmp_path / "2/final/config.json").read_text())["model_type"] == "qwen2"


@pytest.mark.parametrize("script", ["bread", "grpo", "sft"])
@pytest.mark.parametrize("data", ["gsm8k", "countdown"])
def test_real_rows(script, data, tmp_path):
    """GSM8K and Countdown with the byte-level model: it learns nothing, everything else must be right."""
    extra = [] if script == "sft" else ["--group_size", "2"]
    file = str(DATA / f"{data}_sample.jsonl")
    limits = ["--max_prompt_tokens", "600", "--max_completion_tokens", "700"]
    out = tmp_path / "run"
    done = run_script(
        f"{script}.py", "--model", "tiny", "--data", file, "--test_data", "", *SMALL, *extra, *limits, "--out", str(out)
    )
    assert "of 24 rows kept" in done.stdout and "first prompt: " in done.stdout
    assert ("first expert trace" in done.stdout) == (script != "grpo")
    if script == "bread":
        assert rows(out)[0]["search_rate"] == 1 and rows(out)[0]["search_rounds"] >= 1


def test_two_processes_with_fewer_problems_than_ranks(tmp_path):
    """One rank has no problem at all: neither a hang nor another result."""
    small = ["--steps", "1", "--problems_per_step", "1", "--group_size", "4", "--test_data", ""]
    for nproc in (1, 2):
        run_script("bread.py", "--model", "tiny", *small, "--out", str(tmp_path / str(nproc)), nproc=nproc, timeout=120)
    one, two = rows(tmp_path / "1")[0], rows(tmp_path / "2")[0]
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3, abs=1e-5) and two["reward"] == one["reward"]


def test_updates_and_zero_variance_flags(tmp_path):
    """Old log-probabilities of the first of two updates, KL, entropy, checkpointed activations and dropped groups run together."""
    flags = "--updates_per_step 2 --zero_variance drop --kl_coef 0.1 --kl_estimator k2 --entropy_coef 0.01 --loss_norm constant"
    flags += " --checkpoint_activations --warmup_steps 2 --trigger always --no-stop_on_first --leak_check"
    run_script("bread.py", "--model", "tiny", *SMALL, "--group_size", "4", *flags.split(), "--out", str(tmp_path / "run"))
    assert all("kl" in row or row["grad_norm"] == 0 for row in rows(tmp_path / "run")[:-1])


def test_sft_then_grpo(tmp_path):
    """The second stage starts from the first one's final folder, with its settings."""
    run_script("sft.py", "--model", "tiny", *SMALL, "--out", str(tmp_path / "sft"))
    done = run_script(
        "grpo.py", "--model", str(tmp_path / "sft/final"), *SMALL, "--group_size", "2", "--out", str(tmp_path / "grpo")
    )
    assert "defaults of final/settings.json" in done.stdout and (tmp_path / "grpo/final/model.safetensors").exists()


def test_bread_learns(tmp_path):
    """The bar of the README's first command, at part of its length."""
    out = tmp_path / "run"
    run_script("bread.py", "--model", "tiny", "--out", str(out), "--steps", "100", timeout=280)
    accuracy = [row["test_accuracy"] for row in rows(out) if "test_accuracy" in row]
    assert accuracy[0] < 0.05 and max(accuracy) > 0.3, accuracy
