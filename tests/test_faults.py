"""Trials of tests/faults.py, a run begun and resumed by one command, signals to all processes."""

import os
import signal
import subprocess
import sys
import time
from datetime import date

import faults
import pytest
from conftest import ROOT, read_metrics, train
from test_methods import FLAGS

TRIALS = len(faults.FAULTS)  # one each: what two idle cores do in two minutes


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_workers_of_the_verifier_outlive_a_signal_to_the_group(number, tmp_path):
    """torchrun and a terminal send one to the whole group: the step's rewards are not lost."""
    code = """
import signal, sys, time
sys.path.insert(0, sys.argv[1])
from core.processes import StopSignal
from core.verifier import in_pool
stop = StopSignal()
print(in_pool(len, [("a",)], 20), flush=True)
print(in_pool(time.sleep, [(2,)] * 8, 20), stop.seen, flush=True)
"""
    (tmp_path / "pool.py").write_text(code)
    command = [sys.executable, str(tmp_path / "pool.py"), str(ROOT)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    process = subprocess.Popen(command, **options)
    assert process.stdout.readline() == "([1], 0)\n"
    time.sleep(1)
    os.killpg(process.pid, number)
    printed, _ = process.communicate(timeout=60)
    assert "([None, None, None, None, None, None, None, None], 0) True" in printed and "reward error" not in printed


def test_a_hung_worker_does_not_outlive_a_killed_run(tmp_path):
    """Nobody is left to end it, and it hears nothing; its CPU time is limited."""
    code = """
import sys
sys.path.insert(0, sys.argv[1])
from core.verifier import in_pool
print(in_pool(len, [("a",)], 20), flush=True)
in_pool(sum, [(range(10**13),)], 2)
"""
    (tmp_path / "pool.py").write_text(code)
    command = [sys.executable, str(tmp_path / "pool.py"), str(ROOT)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "([1], 0)\n"
    time.sleep(1)
    workers = faults.family(process.pid)[1:]
    process.kill()
    process.wait()
    until = time.monotonic() + 60
    while (left := faults.alive(workers)) and time.monotonic() < until:
        pass  # alive takes its time
    for pid in left:
        os.kill(pid, signal.SIGKILL)  # else a planted fault's worker would go on for ever
    assert not left


@pytest.mark.timeout(600)
def test_trials():
    """Of one method, by date; `python tests/faults.py` tries all."""
    day, online = date.today().toordinal(), [m for m in faults.METHODS if "--group_size" in FLAGS[m]]
    options = faults.Options(trials=TRIALS, seed=TRIALS * day, method=online[day % len(online)], most=2, jobs=2)
    assert faults.main(options) == 0


def test_one_command_begins_a_run_and_goes_on_with_it(tmp_path, world, capsys):
    """As torchrun after a restart and Slurm after a requeue give it again: --out X --resume X."""
    out = tmp_path / "run"
    command = ["--model", "tiny", "--test_data=", "--problems_per_step", 2, "--out", out, "--resume", out, "--steps"]
    train("sft", *command, 1)
    train("sft", *command, 2)
    assert f"resuming {out} at step 1" in capsys.readouterr().out
    assert [row["step"] for row in read_metrics(out)] == [0, 1, 2]
    with pytest.raises(SystemExit, match="there is no run to resume"):
        train("sft", "--model", "tiny", "--resume", tmp_path / "none", "--out", out)
