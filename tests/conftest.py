"""Random models of several architectures, a byte tokenizer and a world of one process."""

import importlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tiny")]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import make  # noqa: E402
import warm  # noqa: E402
from real_model import real_model  # noqa: E402

import common  # noqa: E402
from core import records  # noqa: E402

torch.set_num_threads(1)

LONGEST = "real_model methods pages trust resume scripts faults bench damage gpu ready".split()


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    """A file's tests stay on one worker of xdist, so that what they share is made once.

    Only `pytest -m gpu` sees the card: the others compare with the CPU's numbers.
    """
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if getattr(config.option, "numprocesses", None):
        config.option.dist, config.option.loadscopereorder = "loadscope", False


def pytest_collection_modifyitems(items):
    """On a worker of xdist the longest files first, so that the workers end together."""
    names = [f"test_{name}" for name in LONGEST] if "PYTEST_XDIST_WORKER" in os.environ else []
    items.sort(key=lambda item: names.index(item.path.stem) if item.path.stem in names else len(names))


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.3,  # far from uniform, so that a wrong position or mask shows
}


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A token per byte, and EOS, which is 0 and pads too."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def random_model(architecture: str, seed: int = 0, dtype: torch.dtype = torch.float32, attention: str = "packed"):
    """Qwen2 (tied), Llama (untied), Qwen3 or Gemma with random weights."""
    torch.manual_seed(seed)
    special = {"eos_token_id": 0, "pad_token_id": 0, "bos_token_id": None, "vocab_size": 257}
    config = {
        "qwen2": lambda: transformers.Qwen2Config(**SIZES, **special, tie_word_embeddings=True),
        "llama": lambda: transformers.LlamaConfig(**SIZES, **special, tie_word_embeddings=False),
        "qwen3": lambda: transformers.Qwen3Config(**SIZES, **special, head_dim=16, tie_word_embeddings=False),
        "gemma": lambda: transformers.GemmaConfig(**SIZES, **special, head_dim=16),
    }[architecture]()
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)


@pytest.fixture(scope="session")
def world():
    """The world of this process, which lives as long as the session."""
    yield common.init(0)
    common.shutdown()


@pytest.fixture(scope="session")
def tokenizer():
    """The byte tokenizer."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A Hugging Face folder with random weights, per architecture."""

    def make(architecture: str) -> str:
        folder = tmp_path_factory.getbasetemp() / f"random-{architecture}"
        if not folder.exists():
            random_model(architecture).save_pretrained(folder)
            byte_tokenizer().save_pretrained(folder)
        return str(folder)

    return make


@pytest.fixture(scope="session")
def real_model_folder():
    """A real model, made at the first call. Without one tests are skipped, but never in CI."""
    try:
        return real_model()
    except RuntimeError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(f"NO REAL MODEL: {error}")


def problem(prompt: str, answer: str = "1", expert: str | None = None, id: str | None = None) -> common.Problem:
    """A problem with the ids of the byte tokenizer."""
    tok = byte_tokenizer()
    expert_ids = None if expert is None else [*tok(expert).input_ids, tok.eos_token_id]
    return common.Problem(id or prompt, prompt, tok(prompt).input_ids, answer, expert_ids)


def easy_problems(path: Path) -> None:
    """Problems that the bundled model solves sometimes, so that groups are mixed: few products."""
    rng, rows = random.Random(0), {}
    while len(rows) < 24:
        problem, solution, answer = make.write_out(*make.chain(rng, len(rows) % 3, 1))
        rows[problem] = {"id": problem, "problem": problem, "answer": answer, "solution": solution}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))


def run_script(
    *args: str, nproc: int = 1, check: bool = True, timeout: int = 300, cwd: Path = ROOT, fresh: bool = False
) -> subprocess.CompletedProcess:
    """Run a script to its end on so many ranks, forked; or, fresh, as a user does: by python, or by
    torchrun for more than one process.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(nproc)]
    command = [sys.executable, *(torchrun if fresh and nproc > 1 else []), *args]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONFAULTHANDLER": "1"}
    places: list[dict[str, str]] = [{}]
    if nproc > 1 and not fresh:
        with socket.create_server(("localhost", 0)) as server:
            world = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(server.getsockname()[1]), "WORLD_SIZE": str(nproc)}
        places = [world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(nproc)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        popen, options = subprocess.Popen if fresh else warm.Popen, {"cwd": cwd, "stdout": out, "stderr": err}
        ranks, until = [popen(command, env=environment | place, **options) for place in places], time.time() + timeout
        while any(rank.poll() is None for rank in ranks):
            late = time.time() > until
            for rank in ranks if late or any(rank.returncode for rank in ranks) else []:
                rank.kill() if late else rank.terminate()  # where one failed the others end, as under torchrun
            time.sleep(0.02)
        out.seek(0)
        err.seek(0)
        code = next((rank.returncode for rank in ranks if rank.returncode), 0)
        done = subprocess.CompletedProcess(command, code, out.read(), err.read())
    if check and code != 0:
        raise AssertionError(f"{' '.join(args)}: exitcode : {code} \n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done


def train(script: str, *flags: object) -> None:
    """Run a trainer's main in this process and world; one of its own costs ten times as long."""
    module = importlib.import_module(script)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [f"{script}.py", *map(str, flags)])
            patch.setattr(records, "shutdown", lambda: None)  # finish would end the world of the session
            module.main(common.parse(module.Config))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def read_metrics(folder: Path, exact: bool = True, clocks: bool = False) -> list[dict]:
    """The lines of metrics.jsonl without clocks, rates and memory.

    Not exact: to be compared with equality up to rounding.
    """
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if clocks:
        return rows
    unstable = ("seconds", "tokens_per_second", "peak_memory")
    rows = [{k: v for k, v in row.items() if not k.startswith(unstable)} for row in rows]
    if exact:
        return rows
    return [{k: pytest.approx(v, rel=2e-3, abs=2e-4) for k, v in row.items()} for row in rows]
