"""What a machine with a GPU shows in ten minutes: results/gpu.md, one card, nothing downloaded.

make gpu                             tests, the update alone, a step of four methods, with vLLM too
python results/gpu.py --device cpu   the same at toy size, as the tests do it

Every part has its own time limit; what fails or runs out of time is written down, and the rest
still runs. Weights are random, with the shapes of Qwen2.5-1.5B. Where packages are missing and
nothing can be fetched, carry them as wheels (3 MiB; torch and transformers must be there):

    pip download --no-deps --only-binary=:all: --python-version 3.12 -d wheels tyro typeguard \
        docstring-parser datasets math-verify latex2sympy2-extended antlr4-python3-runtime==4.13.2 \
        pebble dill multiprocess peft accelerate pytest-rerunfailures
    pip install --no-index --no-deps --find-links wheels wheels/*.whl && make gpu
"""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import transformers
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import byte_tokenizer  # noqa: E402

from results.memory import model_of  # noqa: E402

DATA = ROOT / "tests/data/gsm8k_sample.jsonl"
METHODS = {"grpo": 60, "bread": 90, "luffy": 60, "sft": 45}  # seconds at most
DESCRIBE = "/usr/bin/env git describe --always --dirty".split()  # nothing where there is no git
PACKAGES = "torch transformers vllm math-verify datasets".split()


@dataclass
class Config:
    device: Literal["cuda", "cpu"] = "cuda"  # cpu: toy size
    seconds: float = 570.0  # for everything; a part that would begin later is left out
    out: str = "results/gpu.md"


def run(command: list[str], seconds: float, enough: Callable[[], bool] = lambda: False) -> tuple[str, str]:
    """(what it printed, "" or what went wrong). At the limit, or when it is enough, it is ended
    with all that it started.
    """
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | os.environ
    start, wrong = time.perf_counter(), ""
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, start_new_session=True
        )
        while process.poll() is None and not enough():
            if time.perf_counter() - start > seconds:
                wrong = f"not done after {seconds:.0f} s"
                break
            time.sleep(0.1)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        elif process.returncode and not enough():
            wrong = f"exit code {process.returncode}"
        process.wait()
        out.seek(0)
        printed = out.read().strip()
    return printed, wrong and f"FAILED, {wrong}:\n\n```\n{printed[-1500:]}\n```"


def random_model(cfg: Config, folder: Path) -> None:
    """A model folder with the shapes of Qwen2.5-1.5B, or toy ones."""
    config = model_of("Qwen2.5-1.5B") if cfg.device == "cuda" else model_of("Qwen2.5-1.5B", 2, 128, 256, 2, 1, 1000)
    with torch.device(cfg.device):  # random numbers for 1.5 B weights take one core a minute
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    torch.cuda.empty_cache()
    byte_tokenizer().save_pretrained(folder)


def tests(seconds: float) -> str:
    """The tests that need a GPU, but for the step of 1.5 B weights, which is a part of its own."""
    command = "-m pytest -q -m gpu -k".split() + ["not 1_5b", "tests/test_gpu.py"]
    printed, wrong = run([sys.executable, *command], seconds)
    return wrong or printed.strip().splitlines()[-1]


def update(cfg: Config, seconds: float) -> str:
    """bench.py at the size of the steps."""
    large = "--layers 28 --hidden 1536 --vocab 151936 --rows 48 --longest 1024".split()
    sizes = large if cfg.device == "cuda" else "--layers 1 --vocab 300 --rows 4 --longest 32 --rounds 1".split()
    printed, wrong = run([sys.executable, "bench.py", "--way", "packed", *sizes], seconds)
    if wrong:
        return wrong
    found = json.loads(printed.splitlines()[-1])
    rate, share, mb = (found[name] for name in ("tokens_per_second", "roofline", "peak_mb_above_start"))
    return f"{rate:.0f} tokens a second, MFU {share:.2f} of a measured matrix product, {mb:.0f} MB above the weights"


def step(cfg: Config, folder: Path, method: str, seconds: float, sampler: str = "hf") -> str:
    """The last step of a short run of a method file, as a line of the table."""
    cuda = cfg.device == "cuda"
    sizes = {"max_completion_tokens": 384 if cuda else 300, "steps": 1 if method == "bread" or not cuda else 2}
    sizes |= {"problems_per_step": 16 if cuda else 2} | ({} if method == "sft" else {"group_size": 8 if cuda else 2})
    sizes |= {"num_episodes": 4} if method == "bread" else {}
    flags = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    out = folder / f"{method}-{sampler}"
    common = ["--model", str(folder / "model"), "--sampler", sampler, "--out", str(out)]
    command, lines = [sys.executable, f"{method}.py", *common, "--data", str(DATA), "--test_data=", *flags], []

    def enough() -> bool:
        """The step's line is there; what comes after it is a checkpoint of 18 GB."""
        lines[:] = (out / "metrics.jsonl").read_text().splitlines() if (out / "metrics.jsonl").exists() else []
        return len(lines) >= sizes["steps"]

    _, wrong = run(command, seconds, enough)
    shutil.rmtree(out, ignore_errors=True)
    if wrong:
        return f"| {method}, {sampler} | failed | | | | | |\n\n{wrong}\n"
    row = json.loads(lines[sizes["steps"] - 1])
    times = [f"{row.get(f'seconds_{phase}', 0):.1f}" for phase in ("rollouts", "update", "sync")]
    rate, ratio = row["tokens_per_second_update"], row.get("sampler_ratio", 1.0)
    return (
        f"| {method}, {sampler} | {' | '.join(times)} | {rate:.0f} | {row['peak_memory_mb'] / 1024:.2f} | {ratio:.3f} |"
    )


def predicted(cfg: Config, folder: Path, method: str, seconds: float) -> str:
    """What --what memory says of the same step."""
    flags = ["--model", str(folder / "model"), "--gpus", "1", "--sampler", "hf", "--max_completion_tokens", "384"]
    flags += ["--problems_per_step", "16", "--tokens_per_microbatch", "16384" if cfg.device == "cuda" else "2048"]
    printed, wrong = run([sys.executable, "bench.py", "--what", "memory", "--method", method, *flags], seconds)
    return wrong or f"{method}: {printed.splitlines()[-1]}"


def head(cfg: Config) -> str:
    """Hardware, versions and commit."""
    shown = subprocess.run(DESCRIBE, cwd=ROOT, capture_output=True, text=True, check=False)
    device = "a CPU, at toy size: no figure here is of a GPU"
    if cfg.device == "cuda":
        card = torch.cuda.get_device_properties(0)
        device = f"one {card.name}, {card.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    versions = [
        f"{p} {importlib.metadata.version(p)}" for p in PACKAGES if importlib.util.find_spec(p.replace("-", "_"))
    ]
    return f"# make gpu\n\n{device}; {', '.join(versions)}; commit {shown.stdout.strip() or 'unknown'}."


def main(cfg: Config) -> None:
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: there is no CUDA device here; --device cpu runs the same at toy size")
    start, page = time.perf_counter(), Path(cfg.out)
    page.write_text(head(cfg) + "\n")

    def part(seconds: float, make: Callable[..., str], *args: object, title: str = "") -> None:
        left = cfg.seconds - (time.perf_counter() - start)
        said = make(*args, min(seconds, left)) if left > 5 else f"{make.__name__}: left out, the time is up"
        with page.open("a") as out:  # at once, so that it is there whatever comes
            out.write(f"{title}{said}\n")
        print(f"{title}{said} [at {time.perf_counter() - start:.0f} s]", flush=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_model(cfg, folder / "model")
        part(150, tests, title="\n## Tests with the mark gpu\n\n")
        part(45, update, cfg, title="\n## The update alone\n\n")
        columns = "| method, sampler | rollouts s | update s | sync s | trained tokens/s | peak GiB | sampler ratio |"
        title = f"\n## One step\n\n{columns}\n|---|---|---|---|---|---|---|\n"
        for method, seconds in METHODS.items():
            part(seconds, step, cfg, folder, method, title=title)
            title = ""
        if importlib.util.find_spec("vllm"):
            part(150, lambda limit: step(cfg, folder, "grpo", limit, "vllm"))
        title = "\n## Memory that bench.py --what memory predicted\n\n"
        for method in METHODS:
            part(25 if cfg.device == "cuda" else 100, predicted, cfg, folder, method, title=title)
            title = ""
    print(f"{page}: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
