"""The command line, scripts in one and two processes as a user starts them, the learning bar."""

import dataclasses
import importlib
import json
import sys

import pytest
from conftest import ROOT, read_metrics, run_script

import common
import grpo
import trapo
import uft
from core.config import flat, resolve_model, with_flags
from results.methods import METHODS

SMALL = ["--steps", "2", "--problems_per_step", "3"]


# Flags --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "resolved"),
    [
        ("tiny", str(ROOT / "tiny")),
        ("map", str(ROOT / "map")),
        ("Qwen2.5-1.5B", "Qwen/Qwen2.5-1.5B"),
        ("Qwen3-8B", "Qwen/Qwen3-8B"),
        ("gpt2", "gpt2"),
        ("my-Qwen2.5", "my-Qwen2.5"),
        ("Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-1.5B"),
        ("Elliott/Qwen2.5-Math-7B-16k-think", "Elliott/Qwen2.5-Math-7B-16k-think"),
        ("Qwen-of-mine", "Qwen-of-mine"),
        ("runs/a/final", "runs/a/final"),
    ],
)
def test_what_a_model_is_called(name, resolved, tmp_path, monkeypatch):
    """A bare name is of the Qwen organisation only where it begins so; a folder is itself."""
    for folder in ("Qwen-of-mine", "runs/a/final"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model(name) == resolved


@pytest.mark.parametrize("name", ["./missing", "/missing", "~/missing", "runs/missing", "a/b/c"])
def test_a_folder_that_is_not_there_is_no_hub_name(name):
    """What looks like a path is never asked of the hub."""
    with pytest.raises(SystemExit, match=f"--model {name}: there is no such folder"):
        resolve_model(name)


@pytest.mark.parametrize("method", [method.name for method in METHODS])
def test_flags_are_flat(method):
    """Every flag, a method's own or all methods', has one name and can be set by it."""
    cfg = importlib.import_module(method).Config()
    own, shared = ({field.name for field in dataclasses.fields(part)} for part in (cfg, cfg.run))
    assert own & shared == set() and flat(cfg).keys() == (own - {"run"}) | shared
    assert with_flags(cfg, flat(cfg)) == cfg
    changed = with_flags(cfg, {"steps": 7, "seed": 8, "lr": 9.0, "out": "x"})
    assert (changed.steps, changed.run.seed, changed.lr, changed.run.out) == (7, 8, 9.0, "x")
    assert (cfg.steps, cfg.run.seed) != (7, 8)
    with pytest.raises(TypeError, match="stepz"):
        with_flags(cfg, {"stepz": 7})


def parsed(config: type, *flags: str) -> object:
    """A Config from the command line, where the script has the module's name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{config.__module__}.py", *flags])
        return common.parse(config)


def test_the_command_line_reaches_both_parts():
    """Flags without a prefix, with - or _, of the method and of the run."""
    given = ["--kl_coef", "0.5", "--group-size", "3", "--grad_clip", "0.25", "--weight-decay", "0.75"]
    cfg = parsed(grpo.Config, *given, "--no-scale_by_std")
    assert (cfg.kl_coef, cfg.group_size, cfg.scale_by_std) == (0.5, 3, False)
    assert (cfg.run.grad_clip, cfg.run.weight_decay) == (0.25, 0.75)
    changed = {"kl_coef", "group_size", "scale_by_std", "grad_clip", "weight_decay"}
    before, after = flat(grpo.Config()), flat(cfg)
    assert {flag for flag in before if before[flag] != after[flag]} == changed


def test_settings_of_the_model_reach_both_parts(tmp_path):
    """A section of the script's name wins over the rest, and an explicit flag over both.

    Paths are relative to the folder.
    """
    settings = {"steps": 11, "lr": 0.5, "seed": 12, "data": "rows.jsonl", "max_prompt_tokens": 13, "hint_steps": 14}
    settings |= {"grpo": {"lr": 0.25, "weight_decay": 0.125}, "uft": {"max_prompt_tokens": 15}}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    cfg = parsed(grpo.Config, "--model", str(tmp_path), "--seed", "16")
    assert (cfg.steps, cfg.lr, cfg.run.weight_decay) == (11, 0.25, 0.125)
    assert (cfg.run.seed, cfg.run.max_prompt_tokens, cfg.run.data) == (16, 13, str(tmp_path / "rows.jsonl"))
    cfg = parsed(uft.Config, "--model", str(tmp_path))
    assert (cfg.hint_steps, cfg.lr, cfg.run.weight_decay) == (14, 0.5, uft.Config().run.weight_decay)
    assert (cfg.run.seed, cfg.run.max_prompt_tokens) == (12, 15)


def test_resume_takes_the_flags_of_the_run(tmp_path):
    """Of both parts, tuples too; an explicit flag wins, and the folder is the one named."""
    changed = {"shares": (0.0, 0.5, 1.0, 1.0), "lr": 0.5, "seed": 12, "tokens_per_microbatch": 99, "out": "elsewhere"}
    cfg = with_flags(trapo.Config(), changed)
    (tmp_path / "config.json").write_text(json.dumps({"flags": flat(cfg)}))
    again = parsed(trapo.Config, "--resume", str(tmp_path), "--steps", "5")
    assert again == with_flags(cfg, {"steps": 5, "out": str(tmp_path), "resume": str(tmp_path)})


def test_out_is_runs_of_the_current_folder(tmp_path):
    """Wherever the script is: without --out a run is where it was started."""
    small = ["--model", "tiny", "--test_data", "", "--steps", "1", "--problems_per_step", "1"]
    run_script(str(ROOT / "sft.py"), *small, cwd=tmp_path, fresh=True)
    (out,) = (tmp_path / "runs").iterdir()
    assert out.name.startswith("sft-tiny-") and (out / "final/model.safetensors").is_file()
    assert not (ROOT / "runs" / out.name).exists()


# Runs ---------------------------------------------------------------------------------------------
def test_two_processes_with_fewer_problems_than_ranks(tmp_path):
    """One rank of torchrun's two has no problem at all: neither a hang nor another result."""
    small = ["--model", "tiny", "--steps", "1", "--problems_per_step", "1", "--group_size", "4", "--test_data", ""]
    for nproc in (1, 2):
        out = str(tmp_path / str(nproc))
        run_script("bread.py", *small, "--out", out, nproc=nproc, timeout=120, fresh=nproc > 1)
    one, two = (read_metrics(tmp_path / nproc)[0] for nproc in ("1", "2"))
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3, abs=1e-5)
    assert two["reward"] == one["reward"]


def test_updates_and_zero_variance_flags(tmp_path):
    """Two updates, KL, entropy, checkpointed activations and dropped groups run together."""
    flags = "--updates_per_step 2 --zero_variance drop --kl_coef 0.1 --kl_estimator k2 --entropy_coef 0.01"
    flags += " --loss_norm constant --checkpoint_activations --warmup_steps 2 --group_size 4"
    flags += " --trigger always --stop_on_first --prefix_site user"
    run_script("bread.py", "--model", "tiny", *SMALL, *flags.split(), "--out", str(tmp_path))
    assert all("kl" in row or row["grad_norm"] == 0 for row in read_metrics(tmp_path)[:-1])


def test_sft_then_grpo(tmp_path):
    """The second stage starts from the first one's final folder, with its settings."""
    limit = [*SMALL, "--max_prompt_tokens", "300"]
    sft, second = tmp_path / "sft", tmp_path / "grpo"
    run_script("sft.py", "--model", "tiny", *limit, "--template", "qwen_math", "--out", str(sft))
    assert json.loads((sft / "final/settings.json").read_text())["template"] == "qwen_math"
    flags = ["--model", str(sft / "final"), *limit, "--group_size", "2"]
    done = run_script("grpo.py", *flags, "--out", str(second))
    assert "defaults of final/settings.json" in done.stdout and (second / "final/model.safetensors").exists()
    assert json.loads((second / "config.json").read_text())["flags"]["template"] == "qwen_math"


def test_bread_learns(tmp_path):
    """The bar of the README's first command, at part of its length."""
    run_script("bread.py", "--model", "map", "--out", str(tmp_path), "--steps", "20", timeout=280)
    accuracy = [row["test_accuracy"] for row in read_metrics(tmp_path) if "test_accuracy" in row]
    assert accuracy[0] < 0.2 and accuracy[-1] > 0.4, accuracy
