"""Scripts as a user starts them, in one and two processes, and the learning bar."""

import json
from pathlib import Path

import pytest
from conftest import run_script

SMALL = ["--steps", "2", "--problems_per_step", "3"]


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


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
    run_script(
        "sft.py", "--model", "tiny", *SMALL, "--template", "qwen_math", "--max_prompt_tokens", "300", "--out", str(tmp_path / "sft")
    )
    assert json.loads((tmp_path / "sft/final/settings.json").read_text())["template"] == "qwen_math"
    done = run_script(
        "grpo.py",
        "--model",
        str(tmp_path / "sft/final"),
        *SMALL,
        "--group_size",
        "2",
        "--max_prompt_tokens",
        "300",
        "--out",
        str(tmp_path / "grpo"),
    )
    assert "defaults of final/settings.json" in done.stdout and (tmp_path / "grpo/final/model.safetensors").exists()


def test_bread_learns(tmp_path):
    """The bar of the README's first command, at part of its length."""
    out = tmp_path / "run"
    run_script("bread.py", "--model", "tiny", "--out", str(out), "--steps", "40", timeout=280)
    accuracy = [row["test_accuracy"] for row in rows(out) if "test_accuracy" in row]
    assert accuracy[0] < 0.05 and max(accuracy) > 0.3, accuracy
