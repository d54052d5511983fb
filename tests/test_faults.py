"""Ten trials of tests/faults.py, a run that torchrun starts again, workers that outlive a signal."""

import os
import re
import signal
import subprocess
import sys
import time
from datetime import date

import pytest
from conftest import ROOT

POOL = """
import os, sys, threading
from core import verifier
threading.Timer(1.0, os.kill, (os.getpid(), 0)).start()
print(verifier.verify(["\\\\boxed{%s}"] * 4, ["2*x"] * 4, time_limit=20), flush=True)
"""


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
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    assert process.stdout.readline() == "([1], 0)\n"
    time.sleep(1)
    os.killpg(process.pid, number)
    printed, _ = process.communicate(timeout=60)
    assert "([None, None, None, None, None, None, None, None], 0) True" in printed and "reward error" not in printed
