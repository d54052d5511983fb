"""A run that was killed and resumed writes the same metrics, bit for bit, as one that was not."""

import filecmp
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import warm
from conftest import ROOT, read_metrics, run_script, train
from safetensors.torch import load_file

from core.records import complete_checkpoints

SMALL = "--model tiny --steps 6 --problems_per_step 4 --save_every 2 --eval_every 3 --keep 2".split()
ONLINE = "--group_size 4 --updates_per_step 2 --zero_variance keep".split()
EXTRA = {"bread": ONLINE, "grpo": [*ONLINE, "--kl_coef", "0.1"], "sft": []}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Each script run once without interruption."""
    folder = tmp_path_factory.mktemp("straight")
    for script, extra in EXTRA.items():
        run_script(f"{script}.py", *SMALL, *extra, "--out", str(folder / script))
    return folder


def run_until(script: str, out: Path, lines: int, how: int) -> None:
    """Start a run and send it a signal as soon as metrics.jsonl has that many lines."""
    command = [sys.executable, f"{script}.py", *SMALL, *EXTRA[script], "--out", str(out)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = warm.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (out / "metrics.jsonl").exists() and len((out / "metrics.jsonl").read_text().splitlines()) >= lines:
            break
        time.sleep(0.002)
    process.send_signal(how)
    process.communicate(timeout=60)


@pytest.mark.parametrize(("script", "lines"), [("bread", 1), ("bread", 3), ("bread", 5), ("grpo", 4), ("sft", 3)])
def test_kill_and_resume(script, lines, straight, tmp_path):
    """Before the first checkpoint, between two and after the last: metrics, samples and weights."""
    out, whole = tmp_path / script, straight / script
    run_until(script, out, lines, signal.SIGKILL)
    run_script(f"{script}.py", "--resume", str(out))
    assert read_metrics(out) == read_metrics(whole)
    assert (out / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    weights = "final/model.safetensors"
    assert (out / weights).read_bytes() == (whole / weights).read_bytes()


def test_sigterm_saves_and_stops(straight, tmp_path):
    """SIGTERM leaves a checkpoint and no final model, and --resume ends the run."""
    out = tmp_path / "bread"
    run_until("bread", out, 1, signal.SIGTERM)
    saved = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert saved and not (out / "final").exists()
    run_script("bread.py", "--resume", str(out))
    assert read_metrics(out) == read_metrics(straight / "bread")


def test_a_flag_of_the_optimizer_may_change(straight, tmp_path):
    """--weight_decay at --resume: a decay of lr x 1000 = 1 leaves of each weight its last step."""
    whole, out = straight / "sft", tmp_path / "sft"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "final")
    run_script("sft.py", "--resume", str(out), *"--steps 7 --weight_decay 1000 --lr 0.001 --final_lr 1".split())
    before, after = (load_file(run / "final/model.safetensors") for run in (whole, out))
    name = "model.embed_tokens.weight"
    assert after[name].abs().max() < 0.01 < 0.1 < before[name].abs().max()


def test_resume_on_another_number_of_ranks(straight, tmp_path):
    """The same problems and samples; sums in another order, so equal to rounding."""
    out = tmp_path / "sft"
    run_until("sft", out, 3, signal.SIGKILL)
    run_script("sft.py", "--resume", str(out), nproc=2)
    assert read_metrics(out) == read_metrics(straight / "sft", exact=False)


def test_torn_and_partial_files_are_left_out(straight, tmp_path):
    """A line torn by a kill and a checkpoint that was never completed."""
    out = tmp_path / "sft"
    run_until("sft", out, 4, signal.SIGKILL)
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    (out / "checkpoints/00000005.partial").mkdir(parents=True)
    run_script("sft.py", "--resume", str(out))
    assert read_metrics(out) == read_metrics(straight / "sft")


def test_half_a_checkpoint_is_none(tmp_path):
    """What a kill left while it was written has no part in a resume; the others are in order."""
    for name in ("00000004", "00000002", "00000006.partial"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [folder.name for folder in complete_checkpoints(tmp_path)] == ["00000002", "00000004"]


def test_what_a_run_leaves(straight):
    """Flags, versions, checkpoints, a line a step, and the step of every evaluation."""
    out = straight / "bread"
    config = json.loads((out / "config.json").read_text())
    assert config["flags"]["group_size"] == 4 and config["data_sha256"] and config["versions"]["torch"]
    assert {p.name for p in out.iterdir()} >= {"metrics.jsonl", "samples.jsonl", "final", "config.json"}
    assert len(list((out / "checkpoints").iterdir())) == 2
    rows = read_metrics(out, clocks=True)
    wanted = "step reward loss grad_norm entropy completion_tokens seconds_rollouts tokens_per_second_update"
    assert all({*wanted.split(), "peak_memory_mb"} <= set(row) for row in rows[:-1])
    assert [row["step"] for row in rows] == list(range(7))
    assert [row["step"] for row in rows if "test_accuracy" in row] == [0, 3, 6]


def test_the_code_of_a_run_is_beside_it(tmp_path, world):
    """The script, common.py and every module of core/, as they are, and nothing else of core/."""
    train("sft", "--model", "tiny", "--test_data=", "--steps", 1, "--problems_per_step", 1, "--out", tmp_path)
    modules = sorted(path.name for path in (ROOT / "core").glob("*.py"))
    assert sorted(path.name for path in (tmp_path / "core").iterdir()) == modules and len(modules) > 5
    names = ["sft.py", "common.py", *(f"core/{name}" for name in modules)]
    assert filecmp.cmpfiles(ROOT, tmp_path, names, shallow=False) == (names, [], [])


def test_an_old_run_is_not_overwritten(straight):
    """A second run into the same folder ends with a sentence."""
    done = run_script("bread.py", *SMALL, "--out", str(straight / "bread"), check=False)
    assert done.returncode != 0 and "already holds a run" in done.stderr and "Traceback" not in done.stderr
