"""The two published gradient-accumulation bugs beside the correct sum. sft.py has neither.

correct        sum of all token losses / tokens of all micro-batches
first_last     only the first and the last micro-batch arrive, the denominator stays: DeepSpeed
               ZeRO-2 with a CPU-offloaded optimizer, v0.15.2 to v0.18.9 (introduced by
               deepspeedai/DeepSpeed#6550, fixed by #7967)
first_only     only the first arrives: the wording of some summaries of the same bug
mean_of_means  the mean of each micro-batch's own token mean: OpenRLHF up to v0.10.3 (fixed by its
               #1249), and many others

Limozin et al. 2026 (arXiv 2604.23747) show that these two lowered the published SFT baselines.

    python results/accumulation_bugs.py
"""

import torch
import transformers
from torch import Tensor

MODES = ("correct", "first_last", "first_only", "mean_of_means")
ROWS, VOCABULARY = 16, 64


def weights(token_counts: list[int], mode: str) -> list[float]:
    """The factor of each micro-batch's *sum* of token losses, before the backward passes add up."""
    last, total = len(token_counts) - 1, sum(token_counts)
    if mode == "mean_of_means":
        return [1 / (len(token_counts) * count) for count in token_counts]
    arrives = {"correct": range(last + 1), "first_last": (0, last), "first_only": (0,)}[mode]
    return [(i in arrives) / total for i in range(last + 1)]


def small_model() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return transformers.Qwen2ForCausalLM(config).double()


def ragged_rows(seed: int) -> list[Tensor]:
    """Rows of 4 to 63 tokens; each token is a noisy function of the one before it."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in torch.randint(4, 64, (ROWS,), generator=generator).tolist():
        row = torch.randint(0, VOCABULARY, (length,), generator=generator)
        for t in range(1, length):
            if torch.rand((), generator=generator) < 0.8:
                row[t] = (5 * row[t - 1] + 3) % VOCABULARY
        rows.append(row)
    return rows


def loss_sum(model: transformers.PreTrainedModel, rows: list[Tensor]) -> Tensor:
    """Sum of the token losses of some rows, each alone, so that padding plays no part."""
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        logits = model(input_ids=row[None], use_cache=False).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum")
    return total


def backward(model: transformers.PreTrainedModel, rows: list[Tensor], num_microbatches: int, mode: str) -> float:
    """Accumulate one step's gradient as `mode` does. Returns the loss that a framework reports."""
    size = len(rows) // num_microbatches
    microbatches = [rows[i * size : (i + 1) * size] for i in range(num_microbatches)]
    counts = [sum(len(row) - 1 for row in batch) for batch in microbatches]
    model.zero_grad()
    reported = 0.0
    shown = weights(counts, "mean_of_means" if mode == "mean_of_means" else "correct")
    for batch, weight, display in zip(microbatches, weights(counts, mode), shown, strict=True):
        loss = loss_sum(model, batch)
        (weight * loss).backward()
        reported += display * loss.item()
    return reported


def gradient_norm(model: transformers.PreTrainedModel) -> float:
    return torch.sqrt(sum(p.grad.square().sum() for p in model.parameters())).item()


def main() -> None:
    print("one step from the same weights: gradient norm (reported loss)")
    print(f"{'micro-batches':>13}  " + "  ".join(f"{mode:>18}" for mode in MODES))
    for k in (1, 2, 4, 8):
        cells = []
        for mode in MODES:
            model = small_model()
            reported = backward(model, ragged_rows(1), k, mode)
            cells.append(f"{gradient_norm(model):8.4f} ({reported:.4f})")
        print(f"{k:>13}  " + "  ".join(f"{cell:>18}" for cell in cells))
    print("\n60 AdamW steps with 8 micro-batches, then the true loss per token on 16 unseen rows")
    unseen = ragged_rows(10_000)
    for mode in MODES:
        model = small_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for step in range(60):
            backward(model, ragged_rows(2 + step), 8, mode)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        with torch.no_grad():
            print(f"{mode:>13}  {loss_sum(model, unseen).item() / sum(len(row) - 1 for row in unseen):.4f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
