"""The gradients that a method's real main clips, without data sets, sampler and run folder."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
from conftest import byte_tokenizer, problem

import common
import core.config
import core.records

Groups = list[list[common.Rollout]]


def expert_problems() -> list[common.Problem]:
    """Four problems with ragged prompts and traces."""
    texts = ["abc", "a", "hello there", "xyzzy"]
    return [problem("q" * (i + 1), expert=text, id=str(i)) for i, text in enumerate(texts)]


def fixed_groups() -> Groups:
    """Two groups of four ragged rows with mixed rewards."""
    torch.manual_seed(5)
    groups = [
        [common.Rollout(problem("q" * n), torch.randint(1, 257, (2 + i + n,)).tolist()) for i in range(4)]
        for n in (2, 5)
    ]
    for i, rollout in enumerate(row for group in groups for row in group):
        rollout.reward, rollout.sampler_logprobs = float(i % 3 == 0), [0.0] * len(rollout.completion_ids)
    return groups


def reward_experts(groups: Groups) -> dict[str, int]:
    """In place of the verifier: the expert's rows are right, the others come with a reward."""
    for row in (row for group in groups for row in group if row.num_expert_tokens == len(row.completion_ids)):
        row.reward = 1.0
    sampled = sum(len(row.completion_ids) - row.num_expert_tokens for group in groups for row in group)
    return {"verifier_errors": 0, "sampled_tokens": sampled}


def one_step(
    method: ModuleType,
    models: list,
    groups: Groups | Callable[..., Groups] | None = None,
    problems: list[common.Problem] | None = None,
    sync: Callable | None = None,
    **flags: object,
) -> tuple[list[list[torch.Tensor]], list[dict]]:
    """The gradients at every clip, in order, and the lines of metrics.jsonl.

    models: what main loads, in its order. groups: what is sampled, or a function of generate's
    arguments. sync: called with what the sampler is given. One step, unless a flag says more.
    """
    found, lines, queue, clip = [], [], iter(models), common.clip_gradients
    cfg = core.config.with_flags(method.Config(), {"model": "none", "test_data": "", "steps": 1} | flags)
    generate = groups if callable(groups) else mock.Mock(return_value=groups)
    sampler = mock.Mock(generate=generate, tokenizer=byte_tokenizer(), sync=sync or mock.Mock())

    def spy(parameters, max_norm):
        parameters = list(parameters)
        found.append([common.full_tensor(p.grad).clone() for p in parameters if p.grad is not None])
        return clip(parameters, max_norm)

    def append(log, file, rows):
        lines.extend(rows if file == "metrics.jsonl" else [])

    def load_policy(run, world):
        return common.shard(next(queue), world, run.checkpoint_activations)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "StopSignal", lambda: mock.Mock(asked=lambda world: False))
        patch.setattr(common, "load_tokenizer", lambda name: byte_tokenizer())
        patch.setattr(common, "load_data", lambda *args, **kwargs: (problems or expert_problems(), []))
        patch.setattr(common, "load_model", lambda run, **_: next(queue))
        patch.setattr(common, "load_policy", load_policy)
        patch.setattr(
            common, "load_reference", lambda run, policy, world: load_policy(run, world).requires_grad_(False)
        )
        patch.setattr(common, "load_sampler", lambda *args: sampler)
        patch.setattr(common, "score", reward_experts)
        patch.setattr(core.records, "open_folder", lambda *args: Path("none"))
        patch.setattr(common.RunLog, "append", append)
        patch.setattr(common, "resume", lambda log, state: (0, {}))
        patch.setattr(common, "save", mock.Mock())
        patch.setattr(common, "finish", mock.Mock())
        patch.setattr(common, "clip_gradients", spy)
        method.main(cfg)
    return found, lines
