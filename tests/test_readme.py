"""The commands of README.md as they are printed, in a copy whose bundled runs have two steps."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
PRINTED = [line for kind, text in BLOCKS if not kind for line in text.splitlines()]
HUB = [line for line in PRINTED if "Qwen" in line]  # needs a card and a download: test_skeleton.py parses it
HERE = [line for line in PRINTED if "Qwen" not in line and "pytest" not in line]


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The repository as a user has it, without runs; what a reader is told to write is there."""
    folder = tmp_path_factory.mktemp("user") / "repository"
    ignored = shutil.ignore_patterns(".git", "runs", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, folder, ignore=ignored)
    for name in ("map", "tiny"):
        path = folder / name / "settings.json"
        short = {"steps": 2, "problems_per_step": 3, "eval_every": 2}
        path.write_text(json.dumps(json.loads(path.read_text()) | short))
        for file in (folder / name).glob("[!t]*.jsonl"):  # of test.jsonl and train.jsonl all is left
            file.write_text("".join(file.read_text().splitlines(keepends=True)[:8]))
        (folder / name / "test.jsonl").write_text(
            "".join((ROOT / name / "test.jsonl").read_text().splitlines(keepends=True)[:8])
        )
    (rewards,) = [text for kind, text in BLOCKS if kind == "python" and text.startswith("# my_rewards.py")]
    (folder / "my_rewards.py").write_text(rewards)
    return folder


@pytest.mark.timeout(600)
def test_every_command_runs_as_printed(copy):
    """In their order, by a shell; a run that is named NAME is the first one's."""
    assert len(HERE) == 7 and len(HUB) == 2, (HERE, HUB)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for line in HERE:
        command = re.sub(r"^pip install \S+ \S+ && ", "", line).replace("runs/NAME", "runs/bread-map-*")
        done = subprocess.run(command, shell=True, cwd=copy, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
    (first,) = (copy / "runs").glob("bread-map-*")
    assert (first / "final/eval/report.json").exists() and (first / "curves.png").exists()
    assert (first / "view.html").stat().st_size > 10**6
    (rewarded,) = (copy / "runs").glob("grpo-tiny-*")
    assert "reward_steps" in (rewarded / "metrics.jsonl").read_text()
