"""Every method as a whole: identities between methods, its own state through a kill, two ranks."""

import importlib
import inspect
import json
import re
import shutil
import sys

import pytest
from conftest import ROOT, easy_problems, read_metrics, run_script, train
from safetensors.torch import load_file

import common
from core.config import flat
from results.methods import METHODS

ONLINE = ["--group_size", "4"]
FLAGS = {  # with which four steps on a few problems meet everything that the method does
    "grpo": ONLINE,
    "dapo": [*ONLINE, "--resample_rounds", "3", "--overlong_cache", "0.8", "--warmup_steps", "0"],
    "sft": [],
    "bread": [*ONLINE, "--trigger", "always"],
    "luffy": ONLINE,
    "srft": ONLINE,
    "relift": [*ONLINE, "--buffer_size", "5", "--sft_lr", "1e-3"],
    "prefix_rft": [*ONLINE, "--prefix_steps", "4", "--advantages", "split"],
    "uft": [*ONLINE, "--hint_steps", "3"],
    "bridge": [*ONLINE, *"--sft_problems_per_step 4 --adapter_rank 4 --adapter_lr 1e-3 --kl_coef 0.1".split()],
    "chord": [*ONLINE, "--sft_problems_per_step", "4", "--mu_decay", "4", "--phi"],
    "hpt": ONLINE,
    "trapo": [],
    "iw_sft": ["--q", "ema", "--normalize"],
}
OFFLINE = [m.name for m in METHODS if "sft" in (m.name, m.parent)]


def test_every_method_is_here():
    """A method that the table of all methods gains must get its flags above."""
    assert list(FLAGS) == [method.name for method in METHODS]


@pytest.fixture(scope="module")
def easy(tmp_path_factory):
    """Problems that the bundled model solves sometimes, so that groups are mixed."""
    path = tmp_path_factory.mktemp("easy") / "easy.jsonl"
    easy_problems(path)
    return path


def small(data, out, *flags):
    """Four steps of six problems of the tiny model."""
    base = "--model tiny --test_data= --steps 4 --problems_per_step 6 --lr 1e-3 --save_every 2".split()
    return [*base, "--data", data, "--out", out, *flags]


@pytest.fixture(scope="module")
def run(easy, world, tmp_path_factory):
    """A function that trains and returns the folder; the same run is made once."""
    done = {}

    def trained(method, *flags):
        """Train, or find the folder."""
        key = (method, *map(str, flags))
        if key not in done:
            out = tmp_path_factory.mktemp(method) / "run"
            train(method, *small(easy, out, *flags))
            done[key] = out
        return done[key]

    return trained


def assert_equal_weights(one, two, tolerance: float = 0.0) -> None:
    """Both have learned something, and the same."""
    a, b = (load_file(folder / "final/model.safetensors") for folder in (one, two))
    start = load_file(ROOT / "tiny/model.safetensors")
    assert max((a[k] - start[k]).abs().max() for k in a) > 1e-3
    assert max((a[k] - b[k]).abs().max() for k in a) <= tolerance


# Identities ---------------------------------------------------------------------------------------
DOCUMENTED = "dapo luffy srft relift prefix_rft uft bridge chord hpt".split()
SIZES = "--problems_per_step 6 --group_size 4 --lr 1e-3 --max_completion_tokens 80".split()
HARD = "--updates_per_step 2 --entropy_coef 0.01".split()  # ratios that are not 1, and a gradient on every token
ALIKE = [*SIZES, *HARD, *"--loss_norm token --clip_low 0.2 --clip_high 0.2 --scale_by_std".split()]
SFT = "--warmup 0 --final_lr 1 --weight_decay 0 --max_completion_tokens 80".split()
IDENTITIES = {
    "bread, one episode": ("bread", ["--num_episodes", 1, *ALIKE], "grpo", ALIKE),
    "srft without expert rows": (
        "srft",
        ["--expert_rows", 0, "--positive_coef", 1, "--positive_entropy_sign", 0, *ALIKE],
        "grpo",
        ALIKE,
    ),
    "relift, infinite buffer": ("relift", ["--buffer_size", 10**9, *ALIKE], "grpo", ALIKE),
    "uft at p = 0": (
        "uft",
        ["--hint_high", 0, "--hint_low", 0, "--format_reward", 0, "--hint_coef", 7, "--kl_coef", 0, *ALIKE],
        "grpo",
        ALIKE,
    ),
    "bridge at lambda 1, frozen w": ("bridge", ["--lam", 1, "--adapter_lr", 1e-30, *ALIKE], "grpo", ALIKE),
    "bridge at lambda 0": (
        "bridge",
        ["--lam", 0, "--adapter_rank", 0, "--sft_problems_per_step", 6, "--group_size", 2, "--weight_decay", 0],
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
def test_identity(name, run):
    """Whole training runs with the same seed: equal parameters, bit for bit."""
    child, child_flags, parent, parent_flags = IDENTITIES[name]
    assert_equal_weights(run(child, *child_flags), run(parent, *parent_flags))
    if parent != "sft":
        assert max(row.get("groups_mixed", 0) for row in read_metrics(run(parent, *parent_flags))) > 0


def documented(name: str) -> tuple[str, list[str]]:
    """The parent and the flags of "It is grpo.py with --a 1 --b 2;" in a method's docstring.

    Where that sentence ends with a colon, the flags are the indented lines below it.
    """
    text = inspect.cleandoc(importlib.import_module(name).__doc__)
    paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
    (place,) = [i for i, paragraph in enumerate(paragraphs) if "It is " in paragraph]
    sentence = paragraphs[place].split("It is ")[1]
    flags = paragraphs[place + 1] if sentence.endswith(":") else re.search(r"--.*?(?=[;.](?: |$))", sentence)[0]
    return sentence.split(".py")[0], flags.split()


@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_flags_of_the_docstring_are_the_defaults_of_the_parent(name, monkeypatch):
    """With them, every flag that the method shares with its parent has the parent's value."""
    parent, flags = documented(name)
    assert parent == next(method.parent for method in METHODS if method.name == name)
    settings = []
    for script, given in ((name, flags), (parent, [])):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *given])
        settings.append(flat(common.parse(importlib.import_module(script).Config)))
    mine, theirs = settings
    assert {k: v for k, v in mine.items() if k in theirs} == {k: v for k, v in theirs.items() if k in mine}


@pytest.mark.parametrize("extra", [[], HARD], ids=["its own defaults", "two updates"])
@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_flags_of_the_docstring_make_it_the_parent(name, extra, run):
    """Whole training runs of both at the same small sizes: equal parameters, bit for bit."""
    parent, flags = documented(name)
    same = [*SIZES, *extra, "--weight_decay", 0.01]  # the bundled model's settings have none
    child, parent = run(name, *flags, *same), run(parent, *same)
    assert_equal_weights(child, parent)
    assert max(row.get("groups_mixed", 0) for row in read_metrics(parent)) > 0


def test_chord_at_mu_1_is_sft(run):
    """The policy's rows lie between the expert's in a micro-batch, so only up to rounding."""
    flags = ["--mu_peak", 1, "--mu_valley", 1, "--sft_problems_per_step", 6, "--weight_decay", 0, "--group_size", 2]
    assert_equal_weights(run("chord", *flags), run("sft", *SFT, "--seed", 1), 1e-4)


def test_relift_sft_step_is_sft(tmp_path, world):
    """On problems that are never solved, with a buffer of one step's size, ReLIFT is SFT."""
    flags = ["--buffer_size", 6, "--sft_lr", 1e-3, "--sft_entropy_coef", 0, "--entropy_coef", 0, "--group_size", 2]
    data = ROOT / "tiny/train.jsonl"
    train("relift", *small(data, tmp_path / "child", *flags, "--weight_decay", 0))
    train("sft", *small(data, tmp_path / "parent", *SFT))
    rows = read_metrics(tmp_path / "child")[:-1]
    assert all(row["reward"] == 0 and row["sft_rows"] == 6 and row["buffer"] == 0 for row in rows)
    assert_equal_weights(tmp_path / "child", tmp_path / "parent")


# Kills, ranks, real rows --------------------------------------------------------------------------
@pytest.mark.parametrize("method", FLAGS)
def test_saving_and_resuming_change_nothing(method, easy, tmp_path, run):
    """Saving at every step is as never saving, resuming from any as going on: bit for bit."""
    straight, saved = run(method, *FLAGS[method], "--save_every", 1000), tmp_path / "saved"
    train(method, *small(easy, saved, *FLAGS[method], "--save_every", 1, "--keep", 9))
    assert read_metrics(saved) == read_metrics(straight)
    assert_equal_weights(saved, straight)
    if method == "relift":
        assert [row["sft_rows"] > 0 for row in read_metrics(straight)[:-1]][:2] == [False, True]
    for step in range(1, 4):
        resumed = tmp_path / str(step)
        shutil.copytree(saved, resumed, ignore=shutil.ignore_patterns("final"))
        for checkpoint in (resumed / "checkpoints").iterdir():
            if int(checkpoint.name) > step:
                shutil.rmtree(checkpoint)
        train(method, "--resume", resumed)
        assert read_metrics(resumed) == read_metrics(straight)
        assert (resumed / "samples.jsonl").read_text() == (straight / "samples.jsonl").read_text()
        assert_equal_weights(resumed, straight)


def test_two_ranks(easy, tmp_path, world):
    """Two ranks draw the same problems, sample the same completions and make the same updates."""
    gentle = ["--steps", 2, "--lr", 1e-5]  # Adam's first steps turn a rounding of a zero gradient into one of size lr
    runs = {method: small(easy, tmp_path / method, *flags, *gentle) for method, flags in FLAGS.items()}
    runs["relift"] += ["--sft_lr", 1e-5]
    runs["bridge"] += ["--adapter_lr", 1e-5, "--shadow", "persist"]
    for method, flags in runs.items():
        train(method, *flags, "--out", tmp_path / f"one-{method}")
    (tmp_path / "runs.json").write_text(json.dumps({m: [str(flag) for flag in flags] for m, flags in runs.items()}))
    run_script(str(ROOT / "tests/methods_worker.py"), str(tmp_path / "runs.json"), nproc=2, timeout=280)
    for method in FLAGS:
        one, two = read_metrics(tmp_path / f"one-{method}"), read_metrics(tmp_path / method, exact=False)
        assert one == two, method


@pytest.mark.parametrize("method", FLAGS)
@pytest.mark.parametrize("data", ["gsm8k", "countdown"])
def test_real_rows(method, data, tmp_path, world, capsys):
    """GSM8K and Countdown, byte by byte: nothing is learned, everything else must be right."""
    flags = "--model tiny --test_data= --steps 1 --problems_per_step 3 --max_prompt_tokens 600".split()
    flags += ["--max_completion_tokens", 700, "--data", ROOT / f"tests/data/{data}_sample.jsonl"]
    extra = [] if method in (*OFFLINE, "trapo") else ["--group_size", 2]
    train(method, *flags, *extra, "--out", tmp_path / "run")
    printed = capsys.readouterr().out
    assert "of 24 rows kept" in printed and "first prompt: " in printed
    assert ("first expert trace" in printed) == (method not in ("grpo", "dapo"))
    assert (tmp_path / "run/final/model.safetensors").exists()
