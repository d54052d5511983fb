"""The choice of an inference engine: core/sampler.py or core/vllm_sampler.py."""

import importlib.util

from core.config import RunConfig
from core.model import Tokenizer
from core.processes import World, fail
from core.sampler import TransformersEngine


def load_engine(run: RunConfig, tokenizer: Tokenizer, world: World, max_tokens: int) -> object:
    """The inference engine of a run: vLLM, or transformers where `auto` finds no GPU or no vLLM.

    max_tokens is of prompt and completion.
    """
    installed = importlib.util.find_spec("vllm") is not None
    if run.sampler == "vllm" and not installed:
        fail("--sampler vllm: vLLM is not installed (requirements-gpu.txt has it); --sampler hf needs nothing more")
    if run.sampler == "hf" or not installed or (run.sampler == "auto" and world.device.type == "cpu"):
        return TransformersEngine(run, tokenizer, world)
    vllm_sampler = importlib.import_module("core.vllm_sampler")  # here, since it costs seconds and gigabytes
    return vllm_sampler.VLLMEngine(run, tokenizer, world, max_tokens)
