"""The choice of an inference engine: core/sampler.py or core/vllm_sampler.py."""

import importlib.util
from collections.abc import Callable, Iterable
from functools import cached_property, partial

import torch
from torch import Tensor

from core.config import RunConfig
from core.model import Policy, Tokenizer, judge, packed_logprobs, window
from core.processes import World, fail
from core.sampler import TransformersEngine


def longest_row(run: RunConfig, max_completion_tokens: int) -> int:
    """Tokens of the longest prompt and completion; more than the model's window end the run."""
    longest, positions = run.max_prompt_tokens + max_completion_tokens, window(run)
    if longest > positions:
        said = f"prompt and completion have up to {longest} tokens, the window of {run.model} is {positions}"
        said += "; lower --max_completion_tokens or --max_prompt_tokens"
        fail(f"{said}, or stretch it with --rope_theta and --max_positions")
    return longest


def load_engine(run: RunConfig, tokenizer: Tokenizer, world: World, max_completion_tokens: int) -> object:
    """The inference engine of a run: vLLM, or transformers where `auto` finds no GPU or no vLLM."""
    longest, installed = longest_row(run, max_completion_tokens), importlib.util.find_spec("vllm") is not None
    if run.sampler == "vllm" and not installed:
        fail("--sampler vllm: vLLM is not installed (requirements-gpu.txt has it); --sampler hf needs nothing more")
    if run.sampler == "hf" or not installed or (run.sampler == "auto" and world.device.type == "cpu"):
        return LateEngine(lambda: TransformersEngine(run, tokenizer, world))
    load = partial(importlib.import_module, "core.vllm_sampler")  # at its first use: it costs seconds and gigabytes
    return LateEngine(lambda: load().VLLMEngine(run, tokenizer, world, longest))


class LateEngine:
    """An engine that is made at its first use: by then trainer and checkpoint have what they need.
    After its first policy it is asked for what the trainer would say too.
    """

    def __init__(self, make: Callable[[], object]):
        self.make, self.checked = make, False

    @cached_property
    def made(self) -> object:
        """The engine itself (collective)."""
        return self.make()

    def __getattr__(self, name: str) -> object:
        return getattr(self.made, name)

    def sleep(self) -> None:
        """Free the device, if the engine has taken any of it (collective)."""
        if "made" in vars(self):
            self.made.sleep()

    @torch.no_grad()
    def sync(self, weights: Policy | Iterable[tuple[str, Tensor]]) -> None:
        """Take a policy's weights or (name, whole tensor) pairs; compare the first (collective)."""
        self.made.sync(weights)
        if isinstance(weights, Policy) and not self.checked:
            self.checked = True
            (((ids, sampled),),) = self.decode([[1, 2, 3, 4]], [[]], 1, 4, 1.0, [0], 1.0)
            found = packed_logprobs(weights, [[1, 2, 3, 4, *ids]], next(weights.parameters()).device)[3:]
            judge(found, found.new_tensor(sampled), "sampler and trainer")
