"""The command line: the flags that all training scripts share, and where defaults come from."""

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from core.processes import ROOT, fail, first_line, print0

BOX_REQUEST = "\nPlease reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class RunConfig:
    """Settings of every method: the field `run` of its Config; no prefix on the command line."""

    # data
    model: str = "Qwen2.5-1.5B-Instruct"  # hub name, folder, or map or tiny (bundled)
    data: str = "Elliott/Openr1-Math-46k-8192"  # hub names, .jsonl, .jsonl.gz or .parquet, separated by commas
    test_data: str = "HuggingFaceH4/MATH-500"  # the same; empty: no evaluation
    template: str = "auto"  # chat, think, plain, qwen_math; auto: the tokenizer's own, else plain
    template_args: str = "date=2024-07-26"  # of the tokenizer's own: "enable_thinking=false", the day it prints
    system: str | None = None  # in place of every system turn, empty: no such turn; None: the data's own
    request: str = BOX_REQUEST  # behind a question that asks for no box, or around its {problem}; empty: never
    columns: str = ""  # "problem=... answer=... expert=..." where the data set's names are not recognised
    check_traces: bool = True  # keep traces that are right; off: all, as they are, and sft.py needs no answers
    traces: Literal["required", "optional"] = "required"  # optional: where there is none, as grpo.py; SFT needs them
    max_prompt_tokens: int = 1024  # longer prompts are dropped at load
    seed: int = 0  # of the order of problems and of everything sampled
    # reward
    reward: str = ""  # FILE.py:FUNCTION of your own, or words_reward and the like; empty: the method file's
    solved: float = 1.0  # a reward from here on is a solved problem
    reward_seconds: float = 5.0  # time limit of one completion
    # sampler
    sampler: Literal["auto", "vllm", "hf"] = "auto"  # inference engine; auto: vLLM if installed and on a GPU
    sampler_memory: float = 0.4  # share of the GPU for vLLM
    tensor_parallel: int = 1  # ranks that share a vLLM engine
    deterministic: bool = False  # a seed for each request, so that vLLM on a GPU samples the same again; a CPU always
    # model and memory
    rope_theta: float = 0.0  # rotary base for a longer context, with max_positions; 0: the model's own
    max_positions: int = 0  # window of the model; 0: its own
    tokens_per_microbatch: int = 0  # in one forward; never changes the gradient; 0: 16384, and 2048 on a CPU
    lora_rank: int = 0  # train adapters of this rank on frozen weights, at ten times the lr; 0: all weights
    checkpoint_activations: bool = True  # recompute layers in the backward: a quarter of the memory, a third more time
    # optimizer
    weight_decay: float = 0.01  # AdamW
    grad_clip: float = 1.0  # largest norm of the gradient summed over ranks; 0: off
    skip_nonfinite: int = 0  # updates with a loss or gradient that is not finite to leave out before the run ends
    # bookkeeping
    out: str = ""  # the run's folder; empty: runs/<method>-<model>-<time>
    resume: str = ""  # a run's folder to continue, with its own flags; or the same as --out: begin it, or continue it
    eval_every: int = 10  # steps
    eval_samples: int = 1  # per test problem
    save_every: int = 50  # steps
    keep: int = 2  # checkpoints
    wandb_project: str = ""  # of wandb, to log there too (requirements-wandb.txt); empty: no
    data_hash: tyro.conf.Suppress[str] = ""  # no flag: of the problems, as they were when the run began


def asked(cfg) -> dict[str, object]:
    """How a training script has questions asked and traces checked, as load_problems takes it."""
    names = "template template_args system request columns max_prompt_tokens check_traces max_completion_tokens".split()
    flags, online, optional = vars(cfg.run) | vars(cfg), hasattr(cfg, "group_size"), cfg.run.traces == "optional"
    return {name: flags[name] for name in names} | {"need_answers": online, "optional": online and optional}


def resolve_model(name: str) -> str:
    """tiny, map: bundled folders. A folder: itself. Qwen...: Qwen/Qwen... The rest: a hub name."""
    if name in ("tiny", "map"):
        return str(ROOT / name)
    if Path(name).is_dir():
        return name
    if name.startswith((".", "/", "~", "runs/")) or name.count("/") > 1:
        fail(f"--model {name}: there is no such folder")
    return f"Qwen/{name}" if name.startswith("Qwen") and "/" not in name else name


def flat(cfg: object) -> dict[str, object]:
    """All flags of a Config under their names on the command line."""
    flags = dataclasses.asdict(cfg)
    return flags | flags.pop("run", {})


def parse(config: type) -> object:
    """The command line as a Config. Defaults are the Config's, then those of the model folder's
    settings.json (its paths are relative to it), or of the run to resume. Explicit flags win.
    """
    options = {"description": sys.modules[config.__module__].__doc__, "config": (tyro.conf.OmitArgPrefixes,)}
    flags = flat(tyro.cli(config, **options))
    if flags.get("resume") and flags["resume"] == flags["out"] and not (Path(flags["out"]) / "config.json").exists():
        flags["resume"] = ""  # one command begins the run and goes on with it, as torchrun and Slurm start it again
    if flags.get("resume"):
        path = Path(flags["resume"]) / "config.json"
        if not path.is_file():
            fail(f"--resume {flags['resume']}: there is no run to resume, {path} is missing")
        saved = read_json(path.read_bytes(), path, "flags")
        taken = saved["flags"] | {"out": flags["resume"], "resume": flags["resume"]}
        if (script := Path(saved.get("argv", sys.argv)[0]).stem) != Path(sys.argv[0]).stem:
            fail(f"--resume {flags['resume']} is a run of {script}.py, not of {Path(sys.argv[0]).stem}.py")
    else:
        path = Path(resolve_model(flags["model"])) / "settings.json"
        taken = read_settings(path)
        taken |= taken.pop(Path(sys.argv[0]).stem, {})
    taken = {k: tuple(v) if isinstance(v, list) else v for k, v in taken.items() if k in flags}
    cfg = tyro.cli(config, default=with_flags(config(), taken), **options)
    cfg = with_flags(cfg, {"resume": flags["resume"]}) if "resume" in flags else cfg
    changed = {k: f"--{k} {v!r} instead of {taken[k]!r}" for k, v in flat(cfg).items() if v != taken.get(k, v)}
    for name, same in {"model": resolve_model, "lora_rank": int}.items() if flags.get("resume") else ():
        if name in changed and same(flat(cfg)[name]) != same(taken[name]):
            fail(f"--resume {flags['resume']}: {changed[name]}; another {name} needs a run of its own")
    if flags.get("resume") and changed:
        print0(f"from now on {', '.join(changed.values())}")
    used = {k: v for k, v in taken.items() if flat(cfg)[k] == v and k not in ("data", "test_data")}
    if used and not flags.get("resume"):
        print0(f"defaults of {path.parent.name}/settings.json: " + " ".join(f"--{k} {v!r}" for k, v in used.items()))
    return cfg


def with_flags(cfg: object, flags: dict[str, object]) -> object:
    """A copy of a Config with some flags changed, wherever they live."""
    own = {k: v for k, v in flags.items() if hasattr(cfg, k)}
    if len(own) < len(flags):
        own["run"] = dataclasses.replace(cfg.run, **{k: v for k, v in flags.items() if k not in own})
    return dataclasses.replace(cfg, **own)


def read_settings(path: Path) -> dict[str, object]:
    """A model folder's settings.json, with whole paths for those relative to it; or nothing."""
    settings = read_json(path.read_bytes(), path) if path.is_file() else {}
    for section in (settings, *(value for value in settings.values() if isinstance(value, dict))):
        for name in section.keys() & {"data", "test_data", "reward"}:
            section[name] = ",".join(str((path.parent / file).resolve()) for file in section[name].split(",") if file)
    return settings


def read_json(text: bytes, place: object, *names: str) -> dict:
    """A JSON object that has these names; anything else ends the run."""
    try:
        found = json.loads(text)
        return found | {name: found[name] for name in names}
    except (ValueError, TypeError, KeyError) as error:
        fail(f"{place} is damaged ({first_line(error)}): take it out, or put a whole copy in its place")
