"""The choice of an inference engine: core/sampler.py or core/vllm_sampler.py."""

import importlib.util

from core.config import RunConfig
from core.model import Tokenizer, window
from core.processes import World, fail
from core.sampler import TransformersEngine


def longest_row(run: RunConfig, max_completion_tokens: int) -> int:
    """Tokens of the longest prompt and completion; more than the model's window end the run."""
    longest, positions = run.max_prompt_tokens + max_completion_tokens, window(run)
    if longest > positions:
        fail(
            f"prompt and completion have up to {longest} tokens, the window of {run.model} is {positions}; lower "
            "--max_completion_tokens or --max_prompt_tokens, or stretch it with --rope_theta and --max_positions"
        )
    return longest


def load_engine(run: RunConfig, tokenizer: Tokenizer, world: World, max_completion_tokens: int) -> object:
    """The inference engine of a run: vLLM, or transformers where `auto` finds no GPU or no vLLM."""
    longest, installed = longest_row(run, max_completion_tokens), importlib.util.find_spec("vllm") is not None
    if run.sampler == "vllm" and not installed:
        fail("--sampler vllm: vLLM is not installed (requirements-gpu.txt has it); --sampler hf needs nothing more")
    if run.sampler == "hf" or not installed or (run.sampler == "auto" and world.device.type == "cpu"):
        return TransformersEngine(run, tokenizer, world)
    vllm_sampler = importlib.import_module("core.vllm_sampler")  # here, since it costs seconds and gigabytes
    return vllm_sampler.VLLMEngine(run, tokenizer, world, longest)
