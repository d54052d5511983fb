"""Damaged checkpoints and files, full disks, missing packages and memory: one sentence each."""

import io
import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, byte_tokenizer, random_model, read_metrics, run_script, train
from test_trust import QUICK, ends_with

import common
import plot
from core import records

WORKER = "tests/damage_worker.py"
FLAGS = [*QUICK, "--steps", "4", "--save_every", "1", "--keep", "3"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of four steps with checkpoints of the last three, on two ranks."""
    out = tmp_path_factory.mktemp("damage") / "run"
    run_script("sft.py", *FLAGS, "--out", str(out), nproc=2)
    return out


def copy(whole: Path, tmp_path: Path, damage: Callable[[Path], object]) -> Path:
    """The run, damaged, as before its last line and model."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "final")
    damage(out)
    return out


def flip(path: Path) -> None:
    """Turn one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def names(out: Path) -> list[str]:
    """Of what is in the folder of checkpoints."""
    return sorted(re.sub(r"-\d+", "", path.name) for path in (out / "checkpoints").iterdir())


# Checkpoints --------------------------------------------------------------------------------------
NEWEST = {  # what happens to the newest checkpoint: the file that is named
    "empty": (lambda c: (c / "__1_0.distcp").write_bytes(b""), "__1_0.distcp is missing or not as it was"),
    "short": (lambda c: os.truncate(c / "__0_0.distcp", 2000), "__0_0.distcp is missing or not as it was"),
    "flipped": (lambda c: flip(c / "__1_0.distcp"), "__1_0.distcp is missing or not as it was written"),
    "gone": (lambda c: (c / "__1_0.distcp").unlink(), "__1_0.distcp is missing or not as it was written"),
    "no list": (lambda c: (c / ".metadata").unlink(), ".metadata is missing or not as it was written"),
    "short list": (lambda c: os.truncate(c / ".metadata", 100), ".metadata is missing or not as it was written"),
    "no state": (lambda c: (c / "state.json").unlink(), "state.json is missing or not as it was written"),
    "empty state": (lambda c: (c / "state.json").write_text(""), "state.json is missing or not as it was written"),
    "broken state": (lambda c: (c / "state.json").write_text('{"step": 4'), "state.json is missing or not as"),
    "no manifest": (lambda c: (c / "manifest.json").unlink(), "manifest.json is damaged (FileNotFoundError: "),
    "broken manifest": (lambda c: os.truncate(c / "manifest.json", 50), "manifest.json is damaged (JSONDecodeError: "),
    "other manifest": (lambda c: (c / "manifest.json").write_text("[]"), "manifest.json is damaged ("),
}


@pytest.mark.parametrize("what", NEWEST)
def test_a_damaged_checkpoint_is_found(what, whole, tmp_path, world):
    """By the file, and set aside; the next older one is taken."""
    damage, said = NEWEST[what]
    out = copy(whole, tmp_path, lambda out: damage(out / "checkpoints/00000004"))
    log = records.RunLog.__new__(records.RunLog)
    log.out, log.world, log.cfg = out, world, type("Config", (), {"run": common.RunConfig(resume=str(out))})
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr(records, "print0", printed.append)
        assert records.newest_whole(log) == out / "checkpoints/00000003"
    assert len(printed) == 1 and printed[0].startswith(f"{out}/checkpoints/00000004/{said}"), printed
    assert names(out) == ["00000002", "00000003", "00000004.damaged"]


@pytest.mark.parametrize("nproc", [1, 2])
def test_an_older_checkpoint_is_taken(nproc, whole, tmp_path):
    """The two newest are damaged: the run goes on from the one before, to the same numbers."""

    def damage(out: Path) -> None:
        (out / "checkpoints/00000004/__0_0.distcp").write_bytes(b"")
        (out / "checkpoints/00000003/state.json").unlink()

    out = copy(whole, tmp_path, damage)
    done = run_script("sft.py", "--resume", str(out), nproc=nproc)
    said = [line for line in done.stdout.splitlines() if "set aside" in line]
    assert len(said) == 2, done.stdout
    for line, step, name in zip(said, (4, 3), ("__0_0.distcp", "state.json"), strict=True):
        folder = re.escape(f"{out}/checkpoints/{step:08d}")
        wanted = rf"{folder}/{name} is missing or not as it was written; the checkpoint is set aside as {folder}"
        assert re.fullmatch(wanted + r"\.damaged-\d+, the next older one is tried", line), line
    assert f"resuming {out} at step 2" in done.stdout
    assert names(out) == ["00000002", "00000003", "00000003.damaged", "00000004", "00000004.damaged"]
    assert read_metrics(out) == read_metrics(whole, exact=False)
    assert (out / "final/model.safetensors").exists()


def test_without_a_whole_checkpoint_the_run_ends(whole, tmp_path):
    """Again and again: what was set aside is not forgotten, and the log is not rewound."""
    out = copy(whole, tmp_path, lambda out: [p.unlink() for p in out.glob("checkpoints/*/state.json")])
    before = (out / "metrics.jsonl").read_bytes()
    for _ in range(2):
        done = run_script("sft.py", "--resume", str(out), check=False)
        ends_with(done, f"--resume {out}: none of its checkpoints is whole; begin again with another --out")
    assert names(out) == [f"0000000{step}.damaged" for step in (2, 3, 4)]
    assert (out / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_checkpoint_is_verified_before_an_older_one_goes(nproc, tmp_path):
    """A file that is short just after it was written: nothing is renamed and nothing deleted."""
    out = tmp_path / "run"
    done = run_script(WORKER, "cut", "sft", *FLAGS[:-1], "2", "--out", str(out), check=False, nproc=nproc)
    short = out / f"checkpoints/00000003.partial/__{nproc - 1}_0.distcp"
    ends_with(done, f"step 3: {short} is missing or not as it was written, though just written; the older checkpoints")
    assert names(out) == ["00000001", "00000002", "00000003.partial"]
    assert f"resuming {out} at step 2" in run_script("sft.py", "--resume", str(out)).stdout


def test_the_settings_in_a_checkpoint_run_no_code(whole, tmp_path, world):
    """lr, betas and the like of an optimizer are pickles; the list .metadata is one by torch."""

    class Command:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    folder = copy(whole, tmp_path, lambda out: None) / "checkpoints/00000004"
    listed = pickle.loads((folder / ".metadata").read_bytes())
    place = next(place for key, place in listed.storage_data.items() if key.fqn.endswith(".lr"))
    torch.save(Command(), stored := io.BytesIO())
    with open(folder / place.relative_path, "ab") as file:
        place.offset, place.length = file.tell(), len(stored.getvalue())
        file.write(stored.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(listed))
    (folder / "manifest.json").write_text(json.dumps(records.fingerprints(folder, world)))
    done = run_script("sft.py", "--resume", str(folder.parents[1]), check=False)
    assert "Weights only load failed" in done.stderr and not (tmp_path / "ran").exists()


# Files --------------------------------------------------------------------------------------------
def edit(name: str, number: int, line: str) -> Callable[[Path], None]:
    """Put another line in place of one of a file."""

    def damage(out: Path) -> None:
        lines = (out / name).read_text().splitlines(keepends=True)
        lines[number - 1] = line
        (out / name).write_text("".join(lines))

    return damage


FILES = {  # a damaged file of a run: the sentence
    "metrics": (edit("metrics.jsonl", 2, '{"step": 1, "lo\n'), "metrics.jsonl:2 is damaged (JSONDecodeError: "),
    "no step": (edit("metrics.jsonl", 2, '{"loss": 1}\n'), "metrics.jsonl:2 is damaged (KeyError: 'step'): take it"),
    "a number": (edit("metrics.jsonl", 1, "5\n"), "metrics.jsonl:1 is damaged (TypeError: "),
    "bytes": (lambda out: (out / "samples.jsonl").write_bytes(b'{"step": 1, "\xff": 1}\n'), "samples.jsonl:1 is dam"),
    "config": (lambda out: os.truncate(out / "config.json", 100), "config.json is damaged (JSONDecodeError: "),
    "empty config": (lambda out: (out / "config.json").write_text(""), "config.json is damaged (JSONDecodeError: "),
    "other config": (lambda out: (out / "config.json").write_text("[]"), "config.json is damaged (TypeError: "),
    "bare config": (lambda out: (out / "config.json").write_text("{}"), "config.json is damaged (KeyError: 'flags'"),
}


@pytest.mark.parametrize("what", FILES)
def test_a_damaged_file_of_a_run(what, whole, tmp_path, world):
    """One sentence names it, and it is not written over."""
    damage, said = FILES[what]
    out = copy(whole, tmp_path, damage)
    path = out / re.match(r"[\w.]+", said)[0]
    before = path.read_bytes()
    with pytest.raises(SystemExit) as ended:
        train("sft", "--resume", out, "--steps", "5")
    assert str(ended.value).startswith(f"error: {out}/{said}") and "put a whole copy in" in str(ended.value)
    assert path.read_bytes() == before


def test_a_last_line_cut_short_is_dropped(whole, tmp_path):
    """With a sentence, and the step is made again."""
    out = copy(whole, tmp_path, edit("metrics.jsonl", 5, '{"step": 4, "lo'))
    done = run_script("sft.py", "--resume", str(out))
    assert f"{out}/metrics.jsonl: the last line, which a kill cut short, is dropped" in done.stdout
    assert read_metrics(out) == read_metrics(whole)


def test_damaged_settings_of_a_model(tmp_path):
    """settings.json, the weights and the config of a model folder."""
    for name, said in {
        "settings.json": "settings.json is damaged (JSONDecodeError: ",
        "model.safetensors": "no model could be loaded from ",
        "config.json": "could be loaded from ",
    }.items():
        folder = tmp_path / Path(name).stem
        shutil.copytree(ROOT / "tiny", folder)
        os.truncate(folder / name, 50)
        done = run_script("sft.py", "--model", str(folder), *QUICK[2:], "--out", str(tmp_path / "run"), check=False)
        ends_with(done, str(folder), said)


def test_plot_leaves_damaged_lines_out(whole, tmp_path, capsys):
    """With a notice each; a damaged config.json costs the caption alone."""
    out = copy(whole, tmp_path, edit("metrics.jsonl", 2, '{"step": 1, "lo\n'))
    with open(out / "metrics.jsonl", "ab") as file:
        file.write(b'5\n{"step": "\xff')
    (out / "config.json").write_text("{")
    assert [row["step"] for row in plot.read_metrics(out)] == [0, 2, 3, 4]
    said = capsys.readouterr().out.splitlines()
    assert said == [f"{out}/metrics.jsonl:{n} is damaged and left out" for n in (2, 6, 7)]
    assert plot.caption(out) == f"{out.name} (its config.json is damaged)"


# Weights ------------------------------------------------------------------------------------------
def test_weights_are_read_from_safetensors_alone(tmp_path):
    """A pickle of weights and a model that brings code are refused, by trainer and sampler."""
    random_model("qwen2").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    run = common.RunConfig(model=str(tmp_path))
    weights = common.load_model(run).state_dict()
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(SystemExit, match=r"error: --model \S+: no model could be loaded from .*model.safetensors"):
        common.load_model(run)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(SystemExit, match=r"error: --model \S+: no model could be loaded from .*custom code"):
        common.load_model(run)
    common.load_tokenizer(run.model)
    assert not (tmp_path / "ran").exists()
    source = "".join(path.read_text() for path in [*ROOT.glob("*.py"), *ROOT.glob("core/*.py")])
    assert set(re.findall(r"trust_remote_code\W*(\w+)", source)) == {"False"}


# Disk, packages, memory ---------------------------------------------------------------------------
def limited(kilobytes: int, *args: str) -> subprocess.CompletedProcess:
    """A run whose files may not grow beyond a size: as a full disk, by the kernel."""
    size = kilobytes * 1024
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 300}
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))}
    return subprocess.run([sys.executable, *args], check=False, **options, **limit)


FULL = (
    "error: in {}: the disk takes no more (full, or a quota); make room, and --resume goes on from the last checkpoint"
)


def test_a_full_disk_while_saving(tmp_path):
    """No checkpoint is renamed; with room the run goes on from where it was."""
    out = tmp_path / "run"
    ends_with(limited(2000, "sft.py", *FLAGS, "--out", str(out)), FULL.format("saving"))
    assert names(out) == ["00000001.partial"] and not (out / "final").exists()
    assert f"resuming {out} at step 0" in run_script("sft.py", "--resume", str(out)).stdout


def test_a_full_disk_while_exporting(whole, tmp_path):
    """The checkpoints stay as they are."""
    out = copy(whole, tmp_path, lambda out: None)
    before = {p: p.read_bytes() for p in out.rglob("checkpoints/*/*")}
    ends_with(limited(500, "sft.py", "--resume", str(out)), FULL.format("exporting"))
    assert {p: p.read_bytes() for p in out.rglob("checkpoints/*/*")} == before
    run_script("sft.py", "--resume", str(out))
    assert read_metrics(out) == read_metrics(whole)


def test_a_full_disk_while_the_log_is_written(whole, tmp_path):
    """A line that is cut short, and the next resume drops it."""
    out = copy(whole, tmp_path, lambda out: None)
    room = (out / "samples.jsonl").stat().st_size // 1024 + 3  # it is the larger one of the log's two files
    full = limited(room, "sft.py", "--resume", str(out), "--steps", "40", "--save_every", "100")
    ends_with(full, FULL.format("the step's end"))
    done = run_script("sft.py", "--resume", str(out), "--steps", "5")
    assert "samples.jsonl: the last line, which a kill cut short, is dropped" in done.stdout
    assert [row["step"] for row in read_metrics(out)] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(("name", "nproc"), [("file", 2), ("file/run", 1), ("/proc/run", 1)])
def test_a_folder_that_cannot_be_written(name, nproc, tmp_path):
    """A file where the folder should be, and a place where nobody may write."""
    (tmp_path / "file").write_text("")
    said = {"file": "FileExistsError: ", "file/run": "NotADirectoryError: ", "/proc/run": "FileNotFoundError: "}[name]
    out = str(tmp_path / name)
    done = run_script("sft.py", *FLAGS, "--out", out, check=False, nproc=nproc)
    ends_with(done, f"error: in opening --out {out}: {said}", f"'{out}'")


def test_wandb_that_is_not_installed(tmp_path):
    """The package is named, and the folder is free for the next try."""
    (tmp_path / "wandb").mkdir()
    out = ["--out", str(tmp_path / "run")]
    done = run_script("sft.py", *FLAGS, *out, "--wandb_project", "mine", check=False)
    ends_with(done, "No module named 'wandb'; pip install wandb")
    run_script("sft.py", *FLAGS, *out)


@pytest.mark.parametrize(
    ("phase", "flags"),
    [
        ("rollouts", "lower --sampler_memory or use more GPUs"),
        ("update", "lower --tokens_per_microbatch, take --checkpoint_activations or --lora_rank, or use more GPUs"),
        ("loading", "lower --sampler_memory or use more GPUs"),
    ],
)
def test_out_of_memory(phase, flags, tmp_path):
    """The phase and the flags that help, which exist."""
    small = ["--group_size", "2", "--updates_per_step", "1"]
    done = run_script(WORKER, phase, "grpo", *FLAGS, *small, "--out", str(tmp_path / "run"), check=False)
    ends_with(done, f"error: in {phase}: OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. ", flags)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert all(hasattr(common.RunConfig(), flag) for flag in re.findall(r"--(\w+)", flags))


def test_a_bug_keeps_its_traceback(tmp_path):
    """What is no fault of the machine is not explained away."""
    done = run_script(WORKER, "bug", "sft", *FLAGS, "--out", str(tmp_path / "run"), check=False)
    assert "IndexError" in done.stderr and "Traceback" in done.stderr
