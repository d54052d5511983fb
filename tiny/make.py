"""Make the bundled world again, from one seed: tokenizer, problems, base model. See README.md.

python tiny/make.py                    all files, about two minutes on one core
python tiny/make.py --leap 2           only train_leap2.jsonl: traces with two steps in one line
"""

import argparse
import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

HERE = Path(__file__).resolve().parent
SEED = 0
ADD_STEPS = (1,)  # + and - steps in a problem, besides its multiplications
TRAIN_MULTIPLICATIONS, TRAIN_PROBLEMS = (4, 5, 6), 512
TEST_MULTIPLICATIONS, TEST_PROBLEMS = (5, 6), 64
KNOWN = 1 / 9  # of the products in the base model's own training; the others are random digits
BASE_UPDATES, BASE_ROWS, BASE_LR = 1000, 96, 2e-3
SHORT_UPDATES = 500  # the first updates see chains of one or two steps, mostly sums: the digit tables are learned here


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Byte level without merges: any text can be fed. `\\boxed{` is one token, one decision."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken("\\boxed{", normalized=False, special=False)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>", clean_up_tokenization_spaces=False
    )


def chain(rng: random.Random, multiplications: int, additions: int) -> tuple[int, list[tuple[str, int]]]:
    """A digit and shuffled steps: products by 3 or 7, reversible modulo 10; sums of 1 to 3."""
    operators = ["*"] * multiplications + [rng.choice("+-") for _ in range(additions)]
    rng.shuffle(operators)
    return rng.randrange(10), [(o, rng.choice((3, 7)) if o == "*" else rng.randrange(1, 4)) for o in operators]


def write_out(
    start: int, steps: list[tuple[str, int]], noise: random.Random | None = None, leap: int = 1
) -> tuple[str, str, str]:
    """(problem, solution, answer). noise: random products; leap: write every leap-th step."""
    value, totals, lines, shown = start, [], [], str(start)
    for i, (operator, operand) in enumerate(steps):
        if operator == "*" and noise:
            value = value * operand % 10 if noise.random() < KNOWN else noise.randrange(10)
        else:
            value = {"+": value + operand, "-": value - operand, "*": value * operand}[operator] % 10
        totals.append(str(value))
        shown += f"{operator}{operand}"
        if (i + 1) % leap == 0 or i + 1 == len(steps):
            lines.append(f"{shown}={value}")
            shown = str(value)
    answer = "".join(totals)
    problem = str(start) + "".join(f"{o}{n}" for o, n in steps)
    return problem, "\n".join([*lines, f"\\boxed{{{answer}}}"]), answer


def make_problems(leap: int) -> dict[str, list[dict]]:
    """Both splits, without a common problem and without the running totals 0 and 5."""
    rng, seen, splits = random.Random(SEED), set(), {}
    for split, count, kinds in (
        ("train", TRAIN_PROBLEMS, TRAIN_MULTIPLICATIONS),
        ("test", TEST_PROBLEMS, TEST_MULTIPLICATIONS),
    ):
        rows = splits[split] = []
        while len(rows) < count:
            multiplications = kinds[len(rows) % len(kinds)]
            problem, solution, answer = write_out(*chain(rng, multiplications, rng.choice(ADD_STEPS)), leap=leap)
            # 0 and 5 survive every product: "always 5" would be right
            if problem not in seen and not set(answer) & {"0", "5"}:
                seen.add(problem)
                row = {
                    "id": f"tiny/{split}/{len(rows):03d}",
                    "problem": problem,
                    "answer": answer,
                    "solution": solution,
                }
                rows.append({**row, "meta": {"multiplications": multiplications}})
    return splits


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_model(tokenizer: transformers.PreTrainedTokenizerFast) -> transformers.Qwen2ForCausalLM:
    """0.3 M parameters, untrained."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        initializer_range=0.08,  # the usual 0.02 learns what is known by heart several times slower at this size
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return transformers.Qwen2ForCausalLM(config)


def learn(
    model: transformers.Qwen2ForCausalLM,
    tokenizer: transformers.PreTrainedTokenizerFast,
    draw: Callable[[int], list[tuple[str, str]]],  # update -> (prompt, completion) of its rows
    updates: int,
    lr: float,  # the peak, after 50 updates
    floor: float,  # the share of it at the end of a cosine
) -> None:
    """Maximum likelihood of the completions."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.99))
    for update in range(updates):
        prompts, completions = (tokenizer(list(texts)).input_ids for texts in zip(*draw(update), strict=True))
        rows = [(p, [*c, tokenizer.eos_token_id]) for p, c in zip(prompts, completions, strict=True)]
        width = max(len(p) + len(c) for p, c in rows)
        ids = torch.tensor([p + c + [tokenizer.pad_token_id] * (width - len(p) - len(c)) for p, c in rows])
        labels = torch.tensor([[-100] * len(p) + c + [-100] * (width - len(p) - len(c)) for p, c in rows])
        cosine = 0.5 * (1 + floor) + 0.5 * (1 - floor) * math.cos(math.pi * update / updates)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (update + 1) / 50) * cosine
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if update % 100 == 0 or update + 1 == updates:
            print(f"update {update:>4} loss {loss.item():.4f}", flush=True)


def train_base(tokenizer: transformers.PreTrainedTokenizerFast) -> transformers.Qwen2ForCausalLM:
    """A model that writes well-formed chains, adds and subtracts right, guesses every product."""
    model, rng = make_model(tokenizer), random.Random(SEED + 1)

    def draw(update: int) -> list[tuple[str, str]]:
        rows = []
        for _ in range(BASE_ROWS):
            length = rng.randint(1, 2 if update < SHORT_UPDATES else 7)
            multiplications = rng.randint(0, length // 2 if update < SHORT_UPDATES else length)
            problem, solution, _ = write_out(*chain(rng, multiplications, length - multiplications), noise=rng)
            rows.append((problem + "\n", solution))
        return rows

    learn(model, tokenizer, draw, BASE_UPDATES, BASE_LR, floor=0.1)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--leap", type=int, default=1, help="fuse this many steps of an expert trace into one line")
    parser.add_argument("--problems", action="store_true", help="make the problems only, keep the model")
    parser.add_argument("--out", type=Path, default=HERE, help="the folder to write to")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.leap > 1:
        write_jsonl(options.out / f"train_leap{options.leap}.jsonl", make_problems(options.leap)["train"])
        return
    for split, rows in make_problems(1).items():
        write_jsonl(options.out / f"{split}.jsonl", rows)
    if options.problems:
        return
    tokenizer = make_tokenizer()
    train_base(tokenizer).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()
