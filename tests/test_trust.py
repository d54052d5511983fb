"""What cannot be right ends with one sentence: numbers, data, folders, signals, collapse."""

import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import warm
from conftest import ROOT, byte_tokenizer, random_model, read_metrics, run_script, train

import common

WORKER = "tests/trust_worker.py"
QUICK = "--model tiny --test_data= --problems_per_step 4 --max_completion_tokens 40".split()
GROUPS = "--group_size 2 --updates_per_step 1".split()


def ends_with(done: subprocess.CompletedProcess, *parts: str) -> None:
    """One sentence on the last line of all that was printed, and no traceback of ours."""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert done.returncode != 0 and len(errors) == 1 and all(part in errors[0] for part in parts), done.stderr
    assert not re.search(r"rank\d\]: Traceback|^  File \S+/core/", done.stderr, re.MULTILINE), done.stderr


def spoiled(folder: Path, name: str = "model.layers.1.mlp.up_proj.weight") -> Path:
    """A model folder of which one weight holds one NaN."""
    model = random_model("qwen2")
    model.state_dict()[name][3, 5] = float("nan")
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


# Numbers that are not finite ----------------------------------------------------------------------
def test_a_model_with_a_nan_is_refused(tmp_path):
    """By the weight's name, before anything is made."""
    with pytest.raises(SystemExit, match=r"the weight model.layers.1.mlp.up_proj.weight in .* not finite"):
        common.load_model(common.RunConfig(model=str(spoiled(tmp_path))))


def blow_up(method: str, out: Path, *flags: object, logged: bool = True) -> None:
    """Train where the third micro-batch has an infinite gradient, and loss if it is to be seen."""
    module, calls = importlib.import_module(method), []
    whole = module.loss_fn

    def loss_fn(cfg, batch, *args):
        loss, metrics = whole(cfg, batch, *args)
        calls.append(batch)
        factor = float("inf") if len(calls) == 3 else 1.0
        return loss * factor, metrics | {"loss": metrics["loss"] * (factor if logged else 1.0)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "loss_fn", loss_fn)
        train(method, *QUICK, *flags, "--out", out, "--save_every", 1, "--keep", 2, "--steps", 4)


@pytest.mark.parametrize(("method", "flags"), [("sft", []), ("hpt", [*GROUPS, "--skip_above", "1e9"])])
def test_an_update_that_is_not_finite_ends_the_run(method, flags, tmp_path, world, capsys):
    """With step, rank, rows and term; the checkpoints before it stay and no model is exported."""
    said = r"step 2: grad_norm (nan|inf), largest term loss (nan|inf|-inf) on rank 0 of rows \S+, .*; the update was"
    with pytest.raises(SystemExit, match=said):
        blow_up(method, tmp_path, *flags)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["00000001", "00000002"]
    assert len(read_metrics(tmp_path)) == 2 and not (tmp_path / "final").exists()


def test_a_gradient_alone_that_is_not_finite_ends_the_run(tmp_path, world):
    """Where every term is finite, the largest is named."""
    with pytest.raises(SystemExit, match=r"step 2: grad_norm (nan|inf), largest term \w+ [\d.+-]+ on rank 0 of rows"):
        blow_up("sft", tmp_path, logged=False)


def test_an_update_that_is_not_finite_can_be_left_out(tmp_path, world, capsys):
    """It is counted, and the weights, the moments and their clock are as if it had not come."""
    blow_up("sft", tmp_path, "--skip_nonfinite", 1)
    printed = capsys.readouterr().out
    assert "the update was not made (1 of --skip_nonfinite 1)" in printed
    counts = [row.get("skipped_nonfinite", 0) for row in read_metrics(tmp_path)[:4]]
    assert counts == [0, 0, 1, 1]
    state = json.loads((tmp_path / "checkpoints/00000004/state.json").read_text())
    assert state["skipped"] == 1


def test_a_left_out_update_moves_nothing(world):
    """AdamW with zero gradients would still move by its momentum and by weight decay."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.1)
    log = common.RunLog.__new__(common.RunLog)
    log.terms, log.skip = [], False
    optimizer.register_step_pre_hook(log.before_update)
    weight.grad = torch.ones(3)
    optimizer.step()
    before = (weight.clone(), {k: v.clone() for k, v in optimizer.state[weight].items()})
    weight.grad, log.skip = torch.full((3,), float("nan")), True
    optimizer.step()
    assert torch.equal(weight, before[0])
    assert all(torch.equal(v, before[1][k]) for k, v in optimizer.state[weight].items())


def test_weights_that_are_not_finite_are_not_saved(tmp_path, world, monkeypatch):
    """Neither as a checkpoint nor as a model."""
    whole = torch.optim.AdamW.step

    def step(optimizer, *args):
        whole(optimizer, *args)
        optimizer.param_groups[0]["params"][-1].data.fill_(float("inf"))

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(SystemExit, match=r"step 1: the weight \S+ is not finite; no checkpoint was written"):
        train("sft", *QUICK, "--steps", 1, "--out", tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("checkpoints/*")) and not (tmp_path / "saved/final").exists()
    monkeypatch.setattr(common, "save", lambda *args: None)
    with pytest.raises(SystemExit, match=r"the weight \S+ is not finite as torch.float32; no model was exported"):
        train("sft", *QUICK, "--steps", 1, "--out", tmp_path / "exported")
    assert not (tmp_path / "exported/final").exists()


# The same data on every rank ----------------------------------------------------------------------
def test_ranks_train_on_the_same_problems():
    """A check that timed out on rank 1 alone, of a gold and of a trace, is as rank 0 made it."""
    done = run_script(WORKER, "timeout", nproc=2)
    found = dict(re.findall(r"rank (\d) has (\d+ problems \w+)", done.stdout))
    assert found["0"] == found["1"] and len(found) == 2


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("fewer", "error: the ranks do not read the same data; give all of them the same files and flags ([512, 511])"),
        ("other", "error: the ranks do not read the same data; give all of them the same files and flags (['"),
    ],
)
def test_ranks_with_other_problems_end(fault, said):
    """Where the files differ in number or content, nothing is trained."""
    ends_with(run_script(WORKER, fault, nproc=2, check=False), said)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run of sft.py, ended, on a copy of the data of its own."""
    folder = tmp_path_factory.mktemp("trust")
    rows = (ROOT / "tiny/train.jsonl").read_text().splitlines(keepends=True)[:24]
    (folder / "data.jsonl").write_text("".join(rows))
    run_script("sft.py", *QUICK, "--data", str(folder / "data.jsonl"), "--steps", "2", "--out", str(folder / "run"))
    return folder


def test_the_hash_of_the_data_is_kept(run):
    """In config.json and in the checkpoint; files that say the same elsewhere are the same data."""
    known = json.loads((run / "run/config.json").read_text())["flags"]["data_hash"]
    state = json.loads((run / "run/checkpoints/00000002/state.json").read_text())
    assert len(known) == 64 and state["data"] == known
    shutil.copytree(run / "run", run / "moved")
    shutil.copy(run / "data.jsonl", run / "copy.jsonl")
    flags = ["--resume", str(run / "moved"), "--data", str(run / "copy.jsonl"), "--steps", "3", "--lr", "1e-4"]
    done = run_script("sft.py", *flags)
    assert re.search(r"from now on .*--data '\S+copy.jsonl' instead of '\S+data.jsonl'", done.stdout)
    assert "--lr 0.0001 instead of " in done.stdout and "--steps 3 instead of 2" in done.stdout


@pytest.mark.parametrize("what", ["script", "model", "data", "checkpoint"])
def test_resume_refuses_another_run(what, run, tmp_path):
    """Another method, model or data: the difference is named and nothing is written."""
    out, script, flags, said = tmp_path / "run", "sft.py", [], ""
    shutil.copytree(run / "run", out)
    if what == "script":
        script, said = "iw_sft.py", "is a run of sft.py, not of iw_sft.py"
    elif what == "model":
        flags, said = ["--model", str(spoiled(tmp_path / "model"))], "instead of 'tiny'; another model needs a run"
    elif what == "data":
        rows = (run / "data.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "less.jsonl").write_text("".join(rows[1:]))
        flags, said = ["--data", str(tmp_path / "less.jsonl")], "began with other problems than --data"
    else:
        path, said = out / "checkpoints/00000002/state.json", "was trained on other problems than --data"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"data": "of another run"}))
        written = [path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()]
        manifest = path.with_name("manifest.json")
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"state.json": written}))
    before = {p: p.read_bytes() for p in out.rglob("*.json*")}
    ends_with(run_script(script, "--resume", str(out), "--steps", "3", *flags, check=False), said)
    assert {p: p.read_bytes() for p in out.rglob("*.json*")} == before


# One run in a folder ------------------------------------------------------------------------------
def start(*args: str, nproc: int = 1) -> subprocess.Popen:
    """A run in the background; what it prints is in its pipe."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(nproc)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = [sys.executable, *(torchrun if nproc > 1 else []), *args]
    return (subprocess.Popen if nproc > 1 else warm.Popen)(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, **options
    )


def read_until(process: subprocess.Popen, wanted: str) -> str:
    """What a run prints up to a line that has this in it."""
    found = ""
    while wanted not in found.rpartition("\n")[0].rpartition("\n")[2]:
        line = process.stdout.readline()
        assert line, f"{wanted!r} was never printed:\n{found}"
        found += line
    return found


def test_a_folder_has_one_run(run, tmp_path):
    """A second process is refused while the first lives; one that was killed leaves no lock."""
    out = tmp_path / "run"
    shutil.copytree(run / "run", out)
    first = start("sft.py", "--resume", str(out), "--steps", "10000", "--save_every", "10000")
    try:
        read_until(first, "step    3/")
        second = run_script("sft.py", "--resume", str(out), check=False)
        ends_with(second, f"is in use on {os.uname().nodename} by process {first.pid} since ", "end that one")
    finally:
        first.kill()
        first.communicate()
    assert str(first.pid) in (out / "lock").read_text()
    run_script("sft.py", "--resume", str(out), "--steps", "2")
    assert (out / "lock").read_text() == ""
    (out / "lock").write_text("elsewhere by process 7 since yesterday")
    other = run_script("sft.py", "--resume", str(out), check=False)
    ends_with(other, "in use on elsewhere by process 7 since yesterday; if that one is gone, remove ", "lock")


# Signals ------------------------------------------------------------------------------------------
LONG = [*"--model tiny --test_data= --problems_per_step 128 --group_size 64 --steps 50 --save_every 1".split()]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_the_second_signal_ends_at_once(name, tmp_path):
    """In the middle of rollouts: a sentence at the first, exit code 130 at the second."""
    process, number = start("grpo.py", *LONG, "--out", str(tmp_path / "run")), getattr(signal, name)
    read_until(process, "run ")
    read_until(process, "run ") if not (tmp_path / "run/config.json").exists() else None
    time.sleep(3)
    process.send_signal(number)
    said = read_until(process, name)
    assert re.search(rf"{name}: saves and ends after this step, now in rollouts since \d+ s; a second", said)
    time.sleep(1.5)
    process.send_signal(number)
    began = time.monotonic()
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and time.monotonic() - began < 5
    assert f"{name} again: ended at once" in rest and "Traceback" not in said + rest


def test_the_second_signal_to_torchrun_ends_all_ranks(tmp_path):
    """torchrun hands the signals on; the last checkpoint is whole and the run goes on from it."""
    out = tmp_path / "run"
    flags = [flag if flag != "128" else "32" for flag in LONG]
    process = start("grpo.py", *flags, "--out", str(out), nproc=2)
    read_until(process, "step    1/")
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    said = read_until(process, "SIGTERM: ")
    time.sleep(1.5)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    rest, _ = process.communicate(timeout=60)
    assert time.monotonic() - began < 15 and "SIGTERM again: ended at once" in rest, said + rest
    ours = [line for line in (said + rest).splitlines() if "grpo.py" in line and "File" in line]
    assert not ours, rest
    steps = [p.name for p in (out / "checkpoints").iterdir() if p.suffix != ".partial"]
    assert steps
    done = run_script("grpo.py", "--resume", str(out), "--steps", str(int(max(steps))), nproc=2)
    assert f"resuming {out} at step {int(max(steps))}" in done.stdout


def test_torchrun_saves_at_one_signal(tmp_path):
    """The step is ended and saved on both ranks within torchrun's grace."""
    out = tmp_path / "run"
    process = start("grpo.py", *QUICK, *GROUPS, "--steps", "10000", "--out", str(out), nproc=2)
    read_until(process, "step    1/")
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=60)
    (step,) = re.findall(r"stopped at step (\d+); continue with --resume", rest)
    assert (out / f"checkpoints/{int(step):08d}/state.json").exists()


# Collapse -----------------------------------------------------------------------------------------
def test_a_collapse_is_said_within_ten_steps(tmp_path, world, capsys):
    """A reward for sevens, at a high learning rate: the policy writes nothing else, without end."""
    (tmp_path / "sevens.py").write_text("def sevens(problem, completion):\n    return completion.count('7')\n")
    flags = "--problems_per_step 8 --group_size 4 --max_completion_tokens 40 --steps 10 --lr 0.003".split()
    reward = ["--reward", f"{tmp_path / 'sevens.py'}:sevens", "--solved", 1e9]
    train("grpo", "--model", "tiny", "--test_data=", *flags, *reward, "--out", tmp_path / "run")
    printed = capsys.readouterr().out
    said = re.findall(r"steps up to (\d): (.*) \((\w+) ([\d.]+)\)", printed)
    names = {name for _, _, name, _ in said}
    assert {"truncated", "entropy", "groups_mixed"} <= names, printed
