"""One update of a method's main on given models and rows, without data sets, sampler and run folder: the gradients it clips."""

from collections.abc import Callable
from types import ModuleType
from unittest import mock

import pytest
import torch
from conftest import byte_tokenizer, problem

import common


def expert_problems() -> list[common.Problem]:
    texts = ["abc", "a", "hello there", "xyzzy"]
    return [problem("q" * (i + 1), expert=text, id=str(i)) for i, text in enumerate(texts)]


def fixed_groups() -> list[list[common.Rollout]]:
    """Two groups of four ragged rows with mixed rewards."""
    torch.manual_seed(5)
    groups = [[common.Rollout(problem("q" * n), torch.randint(1, 257, (2 + i + n,)).tolist()) for i in range(4)] for n in (2, 5)]
    for i, rollout in enumerate(row for group in groups for row in group):
        rollout.reward, rollout.sampler_logprobs = float(i % 3 == 0), [0.0] * len(rollout.completion_ids)
    return groups


def reward_experts(groups: list[list[common.Rollout]]) -> int:
    """Rows of the policy come with their reward; the expert's are right."""
    for row in (row for group in groups for row in group if row.num_expert_tokens == len(row.completion_ids)):
        row.reward = 1.0
    return 0


def one_step(
    method: ModuleType, models: list, groups: list | Callable | None = None, problems: list | None = None, **flags
) -> tuple[list[list[torch.Tensor]], mock.Mock]:
    """models: what common.load_model returns, in main's order; groups: what is sampled, or a function of generate's arguments.

    The gradients at every clip, in order; and the log.
    """
    log, found, clip, queue = mock.MagicMock(), [], common.clip_gradients, iter(models)
    log.should_stop.return_value = False

    def spy(parameters, max_norm):
        parameters = list(parameters)
        found.append([common.full_tensor(p.grad).clone() for p in parameters if p.grad is not None])
        return clip(parameters, max_norm)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "load_tokenizer", lambda name: byte_tokenizer())
        patch.setattr(common, "load_problems", lambda *args, **kwargs: problems or expert_problems())
        patch.setattr(common, "load_model", lambda *args: next(queue))
        patch.setattr(common, "Sampler", mock.Mock())
        common.Sampler.return_value.generate = groups if callable(groups) else mock.Mock(return_value=groups)
        patch.setattr(common, "score", reward_experts)
        patch.setattr(common, "RunLog", lambda *args: log)
        patch.setattr(common, "resume", lambda *args: (0, {}))
        patch.setattr(common, "save", mock.Mock())
        patch.setattr(common, "finish", mock.Mock())
        patch.setattr(common, "clip_gradients", spy)
        method.main(method.Config(model="none", test_data="", steps=1, **flags))
    return found, log
