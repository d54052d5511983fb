"""results/accumulation_bugs.py: the correct sum is one big batch, and each bug is the bug."""

import pytest
import torch

from results import accumulation_bugs as bugs


def gradient(k: int, mode: str) -> torch.Tensor:
    model = bugs.small_model()
    bugs.backward(model, bugs.ragged_rows(1), k, mode)
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_worked_example():
    """10 tokens at loss 1 and 90 tokens at loss 3: 2.8 per token, not 2.0."""
    sums, counts = [10 * 1.0, 90 * 3.0], [10, 90]
    assert sum(w * s for w, s in zip(bugs.weights(counts, "correct"), sums, strict=True)) == pytest.approx(2.8)
    assert sum(w * s for w, s in zip(bugs.weights(counts, "mean_of_means"), sums, strict=True)) == pytest.approx(2.0)


@pytest.mark.parametrize("k", [2, 4, 8])
def test_the_correct_sum_is_one_big_batch(k):
    """k micro-batches have the gradient of one, but the mean of their means has not."""
    assert torch.allclose(gradient(k, "correct"), gradient(1, "correct"), rtol=1e-9, atol=1e-12)
    assert (gradient(k, "mean_of_means") - gradient(1, "correct")).abs().max() > 1e-4


def test_first_and_last():
    """Nothing is lost with one or two micro-batches; with four, the middle ones are."""
    for k in (1, 2):
        assert torch.equal(gradient(k, "first_last"), gradient(k, "correct"))
    rows = bugs.ragged_rows(1)
    tokens = sum(len(row) - 1 for row in rows)
    model = bugs.small_model()
    (bugs.loss_sum(model, rows[:4] + rows[-4:]) / tokens).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert torch.allclose(gradient(4, "first_last"), expected, rtol=1e-9, atol=1e-12)


def test_linear_probe():
    """Micro-batch k has gradient e_k: all ones must arrive; the bug shows which do not."""
    counts = [7] * 5
    assert [w * sum(counts) for w in bugs.weights(counts, "correct")] == [1] * 5
    assert [w * sum(counts) for w in bugs.weights(counts, "first_last")] == [1, 0, 0, 0, 1]
    assert [w * sum(counts) for w in bugs.weights(counts, "first_only")] == [1, 0, 0, 0, 0]
