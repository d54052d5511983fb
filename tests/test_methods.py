"""Every method as a whole: the identities between methods over training steps, its own state through a kill, one and two ranks."""

import json
import random
import sys

import pytest
import torch
from conftest import ROOT, read_metrics, run_script, train
from safetensors.torch import load_file

import common

sys.path.insert(0, str(ROOT / "tiny"))
import make  # noqa: E402

ONLINE = ["--group_size", "4"]
METHODS = {  # flags with which four steps on a few problems meet everything that the method does
    "grpo": ONLINE,
    "bread": [*ONLINE, "--trigger", "always"],
    "luffy": ONLINE,
    "srft": ONLINE,
    "relift": [*ONLINE, "--buffer_size", "3", "--sft_lr", "1e-3"],
    "prefix_rft": [*ONLINE, "--prefix_steps", "4", "--advantages", "split"],
    "uft": [*ONLINE, "--hint_steps", "3"],
    "bridge": [*ONLINE, "--sft_problems_per_step", "4", "--lora_rank", "4", "--lora_lr", "1e-3", "--kl_coef", "0.1"],
    "chord": [*ONLINE, "--sft_problems_per_step", "4", "--mu_decay", "4", "--phi"],
    "hpt": ONLINE,
    "trapo": [],
    "sft": [],
    "iw_sft": ["--q", "ema", "--normalize"],
}
OFFLINE = ("sft", "iw_sft")


@pytest.fixture(scope="module")
def easy(tmp_path_factory):
    """Problems that the bundled model solves sometimes, so that groups are mixed: none to two products."""
    rng, rows = random.Random(0), {}
    while len(rows) < 24:
        problem, solution, answer = make.write_out(*make.chain(rng, len(rows) % 3, 1))
        rows[problem] = {"id": problem, "problem": problem, "answer": answer, "solution": solution}
    path = tmp_path_factory.mktemp("easy") / "easy.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    return path


def small(easy, out, *flags):
    base = "--model tiny --test_data= --steps 4 --problems_per_step 6 --lr 1e-3 --save_every 2".split()
    return [*base, "--data", easy, "--out", out, *flags]


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "final/model.safetensors")


def assert_equal_weights(a, b, tolerance: float = 0.0) -> None:
    a, b, start = weights(a), weights(b), load_file(ROOT / "tiny/model.safetensors")
    assert max((a[k] - start[k]).abs().max() for k in a) > 1e-3  # it has learned something
    assert max((a[k] - b[k]).abs().max() for k in a) <= tolerance


ALIKE = "--group_size 4 --updates_per_step 2 --loss_norm token --clip_low 0.2 --clip_high 0.2 --entropy_coef 0.01".split()
ALIKE += ["--scale_by_std", "--max_completion_tokens", "80"]
LUFFY = "--entropy_coef 0.01 --group_size 4".split()
SFT = "--warmup 0 --final_lr 1 --weight_decay 0 --max_completion_tokens 80".split()
IDENTITIES = {
    "bread, one episode": ("bread", ["--num_episodes", 1, *ALIKE], "grpo", ALIKE),
    "luffy without expert rows": ("luffy", ["--expert_rows", 0, *ALIKE], "grpo", ALIKE),
    "srft without expert rows": (
        "srft",
        ["--expert_rows", 0, "--positive_coef", 1, "--positive_entropy_sign", 0, *ALIKE],
        "grpo",
        ALIKE,
    ),
    "srft without its weights": (
        "srft",
        ["--sft_coef", 0, "--positive_coef", 1, "--positive_entropy_sign", 0, *LUFFY],
        "luffy",
        LUFFY,
    ),
    "relift, infinite buffer": ("relift", ["--buffer_size", 10**9, *ALIKE], "grpo", ALIKE),
    "relift, no buffer": ("relift", ["--buffer_size", 0, *ALIKE], "grpo", ALIKE),
    "prefix_rft without prefixes": ("prefix_rft", ["--hybrid_rows", 0, "--dual_clip", 0, *ALIKE], "grpo", ALIKE),
    "uft at p = 0": (
        "uft",
        ["--hint_high", 0, "--hint_low", 0, "--format_reward", 0, "--hint_coef", 7, "--kl_coef", 0, *ALIKE],
        "grpo",
        ALIKE,
    ),
    "chord at mu = 0": ("chord", ["--mu_peak", 0, "--mu_valley", 0, *ALIKE], "grpo", ALIKE),
    "hpt without a gate": ("hpt", ["--gate", -1, *ALIKE], "grpo", ALIKE),
    "bridge at lambda 1": ("bridge", ["--lam", 1, "--lora_rank", 0, *ALIKE], "grpo", ALIKE),
    "bridge at lambda 1, frozen w": ("bridge", ["--lam", 1, "--lora_lr", 0, *ALIKE], "grpo", ALIKE),
    "bridge at lambda 0": (
        "bridge",
        ["--lam", 0, "--lora_rank", 0, "--sft_problems_per_step", 6, "--group_size", 2, "--weight_decay", 0],
        "sft",
        [*SFT, "--seed", 1],
    ),
    "iw_sft with q = reference": ("iw_sft", ["--q", "reference", "--beta2", 0.999, *SFT], "sft", SFT),
    "iw_sft, step weights clamped to 1": (
        "iw_sft",
        ["--weight", "iw_step", "--step_low", 1, "--step_high", 1, "--beta2", 0.999, *SFT],
        "sft",
        SFT,
    ),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_identity(name, easy, tmp_path, dist):
    """Whole training runs with the same seed: equal parameters, bit for bit."""
    child, child_flags, parent, parent_flags = IDENTITIES[name]
    train(child, *small(easy, tmp_path / "child", *child_flags))
    train(parent, *small(easy, tmp_path / "parent", *parent_flags))
    assert_equal_weights(tmp_path / "child", tmp_path / "parent")
    if parent != "sft":
        assert max(row.get("groups_mixed", 0) for row in read_metrics(tmp_path / "parent")) > 0


def test_chord_at_mu_1_is_sft(easy, tmp_path, dist):
    """The policy's rows lie between the expert's in a micro-batch, so only up to rounding."""
    flags = ["--mu_peak", 1, "--mu_valley", 1, "--sft_problems_per_step", 6, "--weight_decay", 0, "--group_size", 2]
    train("chord", *small(easy, tmp_path / "child", *flags))
    train("sft", *small(easy, tmp_path / "parent", *SFT, "--seed", 1))
    assert_equal_weights(tmp_path / "child", tmp_path / "parent", 1e-4)


def test_relift_sft_step_is_sft(tmp_path, dist):
    """On problems that are never solved, with a buffer of one step's size, ReLIFT is SFT."""
    flags = ["--buffer_size", 6, "--sft_lr", 1e-3, "--sft_entropy_coef", 0, "--entropy_coef", 0, "--group_size", 2]
    data = ROOT / "tiny/train.jsonl"
    train("relift", *small(data, tmp_path / "child", *flags, "--weight_decay", 0))
    train("sft", *small(data, tmp_path / "parent", *SFT))
    rows = read_metrics(tmp_path / "child")[:-1]
    assert all(row["reward"] == 0 and row["sft_rows"] == 6 and row["buffer"] == 0 for row in rows)
    assert_equal_weights(tmp_path / "child", tmp_path / "parent")


class Killed(Exception):
    pass


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("grpo", "bread", "sft")])
def test_resume_keeps_the_methods_own_state(method, easy, tmp_path, dist, monkeypatch):
    """Stopped after its third step and resumed from the checkpoint before it: the same lines and weights, bit for bit."""
    train(method, *small(easy, tmp_path / "straight", *METHODS[method]))
    with monkeypatch.context() as patch:
        write = common.RunLog.step

        def step(log, number, *args, **values):
            if number == 3:
                raise Killed
            write(log, number, *args, **values)

        patch.setattr(common.RunLog, "step", step)
        with pytest.raises(Killed):
            train(method, *small(easy, tmp_path / "killed", *METHODS[method]))
    train(method, "--resume", tmp_path / "killed")
    assert read_metrics(tmp_path / "killed") == read_metrics(tmp_path / "straight")
    assert_equal_weights(tmp_path / "killed", tmp_path / "straight")


def test_two_ranks(easy, tmp_path, dist):
    """torchrun on two ranks draws the same problems, samples the same completions and makes the same updates."""
    gentle = ["--steps", 2, "--lr", 1e-5]  # Adam's first steps turn a rounding of a zero gradient into one of size lr
    runs = {method: small(easy, tmp_path / method, *flags, *gentle) for method, flags in METHODS.items()}
    runs["relift"] += ["--sft_lr", 1e-5]
    runs["bridge"] += ["--lora_lr", 1e-5]
    for method, flags in runs.items():
        train(method, *flags, "--out", tmp_path / f"one-{method}")
    (tmp_path / "runs.json").write_text(json.dumps({m: [str(flag) for flag in flags] for m, flags in runs.items()}))
    run_script(str(ROOT / "tests/methods_worker.py"), str(tmp_path / "runs.json"), nproc=2, timeout=280)
    for method in METHODS:
        one, two = read_metrics(tmp_path / f"one-{method}"), read_metrics(tmp_path / method, exact=False)
        for a, b in zip(one, two, strict=True):
            assert a.keys() == b.keys(), method
            assert {k: v for k, v in a.items() if k != "search_rounds"} == {k: b[k] for k in a if k != "search_rounds"}, method


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("data", ["gsm8k", "countdown"])
def test_real_rows(method, data, tmp_path, dist, capsys):
    """GSM8K and Countdown with the byte-level model: it learns nothing, everything else must be right."""
    limits = "--model tiny --test_data= --steps 1 --problems_per_step 3 --max_prompt_tokens 600 --max_completion_tokens 700".split()
    extra = [] if method in (*OFFLINE, "trapo") else ["--group_size", 2]
    train(method, *limits, "--data", ROOT / f"tests/data/{data}_sample.jsonl", "--out", tmp_path / "run", *extra)
    printed = capsys.readouterr().out
    assert "of 24 rows kept" in printed and "first prompt: " in printed
    assert ("first expert trace" in printed) == (method != "grpo")
    assert (tmp_path / "run/final/model.safetensors").exists()
