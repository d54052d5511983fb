"""The engine on transformers: token ids in, sampled ids out, by a loop that finished rows leave."""

from collections.abc import Iterable

import jinja2
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from core.config import RunConfig
from core.model import Policy, Tokenizer, load_model, named_weights
from core.processes import World, waiting

Sampled = tuple[list[int], list[float]]  # new token ids, and their log-probabilities at the sampling temperature


def stop_ids(tokenizer: Tokenizer, generation_config: transformers.GenerationConfig) -> list[int]:
    """Tokens that end a completion: the tokenizer's EOS, the model's, and the ends of a turn."""
    ids = generation_config.eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    return sorted({tokenizer.eos_token_id, *(i for i in ids if i is not None), *turn_ends(tokenizer)})


def turn_ends(tokenizer: Tokenizer) -> set[int]:
    """The special token that the chat template writes behind what an assistant says, and ChatML's,
    in which --template think and qwen_math ask; as far as they are tokens of this tokenizer.
    """
    talk = [{"role": "user", "content": "Question?"}, {"role": "assistant", "content": "Forty-two"}]
    try:
        text = tokenizer.apply_chat_template(talk, tokenize=False) if tokenizer.chat_template else ""
    except (jinja2.TemplateError, TypeError, ValueError):
        text = ""  # it takes no such talk, so that it says nothing of its end
    added, found = tokenizer.added_tokens_decoder, set()
    for tail in (text.partition("Forty-two")[2], "<|im_end|>"):
        ids = tokenizer(tail, add_special_tokens=False).input_ids
        found |= set([i for i in ids if i in added and added[i].content.strip()][:1])  # some are white space
    return found


class TransformersEngine:
    """An inference copy of the weights; the other engine is in core/vllm_sampler.py."""

    def __init__(self, run: RunConfig, tokenizer: Tokenizer, world: World):
        dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
        self.model = load_model(run, dtype, "sdpa").to(world.device).eval().requires_grad_(False)
        self.device, self.pad = world.device, tokenizer.eos_token_id
        self.stop_ids = stop_ids(tokenizer, self.model.generation_config)
        self.max_batch_tokens = 2**15 if world.device.type == "cpu" else 2**19  # tokens in the KV cache at a time

    def sleep(self) -> None:
        """Leave the device to the update. Here the weights stay; vLLM has more to do."""

    @torch.no_grad()
    def sync(self, weights: Policy | Iterable[tuple[str, Tensor]]) -> None:
        """Take the trained weights, a policy's or (name, whole tensor) pairs (collective).

        RuntimeError where a name is unknown or a parameter is left without new weights.
        """
        mine = dict(self.model.named_parameters())
        for name, tensor in named_weights(weights, self.model.dtype) if isinstance(weights, Policy) else weights:
            if name not in mine:
                raise RuntimeError(f"the sampler has no parameter {name}")
            mine.pop(name).copy_(tensor)
        if mine:
            raise RuntimeError(f"parameters of the sampler were not updated: {sorted(mine)[:4]}")

    @torch.no_grad()
    def decode(
        self,
        prompts: list[list[int]],
        prefixes: list[list[int]],  # how each completion begins
        n: int,  # completions of each prompt
        max_tokens: int,  # of a whole completion, prefix included
        temperature: float,  # 0: greedy
        seeds: list[int],  # of each prompt
        top_p: float,
    ) -> list[list[Sampled]]:
        """n continuations of every prompt and prefix, as many at a time as the cache holds."""
        size = [len(prompt) + len(prefix) for prompt, prefix in zip(prompts, prefixes, strict=True)]
        order = sorted(range(len(prompts)), key=lambda i: size[i])
        found: list[list[Sampled]] = [[] for _ in prompts]
        bar = waiting(total=len(prompts) * n, desc="rollouts")
        while order:
            longest = size[order[-1]] - len(prefixes[order[-1]]) + max_tokens
            take = max(1, self.max_batch_tokens // (n * longest))
            chunk, order = order[-take:], order[:-take]
            lines = [[*prompts[i], *prefixes[i]] for i in chunk]
            room = [max_tokens - len(prefixes[i]) for i in chunk]
            own = [torch.Generator().manual_seed(seeds[i]) for i in chunk]  # a number for each token to come
            uniform = torch.stack([torch.rand((n, max_tokens), generator=g, dtype=torch.float64) for g in own])
            rows = self._decode(lines, room, uniform, temperature, top_p, bar)
            for place, i in enumerate(chunk):
                found[i] = rows[place * n : (place + 1) * n]
        bar.close()
        return found

    def _decode(self, lines: list, room: list[int], uniform: Tensor, temperature: float, top_p: float, bar) -> list:
        """One left-padded batch: prefill each line once, repeat its cache, decode all rows."""
        device, n = self.device, uniform.shape[1]
        cache, logits, mask = self._prefill(lines, n)
        uniform, limit = uniform.flatten(0, 1).to(device), torch.tensor(room, device=device).repeat_interleave(n)
        rows, position = len(lines) * n, mask.sum(1)
        tokens = torch.zeros(rows, max(room), dtype=torch.long, device=device)
        logprobs = torch.zeros(rows, max(room), dtype=torch.float32, device=device)
        lengths = torch.zeros(rows, dtype=torch.long, device=device)
        alive, stop = torch.arange(rows, device=device), torch.tensor(self.stop_ids, device=device)
        for t in range(max(room)):
            logp = torch.log_softmax(logits.float() / (temperature or 1.0), -1)
            token = pick(logp, uniform[alive, t, None], temperature, top_p)
            tokens[alive, t], logprobs[alive, t] = token, logp.gather(1, token[:, None])[:, 0]
            lengths[alive] = t + 1
            going = ~torch.isin(token, stop) & (limit[alive] > t + 1)
            if not going.all():
                keep = going.nonzero()[:, 0]
                bar.update(len(alive) - len(keep))
                if len(keep) == 0:
                    break
                cache.batch_select_indices(keep)
                alive, mask, token, position = alive[keep], mask[keep], token[keep], position[keep]
            mask = F.pad(mask, (0, 1), value=1)
            logits = self._next(token[:, None], mask, position[:, None], cache)
            position = position + 1
        ends = lengths.tolist()
        return [(t[:end], lp[:end]) for t, lp, end in zip(tokens.tolist(), logprobs.tolist(), ends, strict=True)]

    def _prefill(self, lines: list[list[int]], n: int) -> tuple[transformers.DynamicCache, Tensor, Tensor]:
        """(cache, logits of the next token, attention mask), every line n times."""
        width, cache = max(map(len, lines)), transformers.DynamicCache(config=self.model.config)
        ids = torch.tensor([[self.pad] * (width - len(line)) + line for line in lines], device=self.device)
        mask = torch.tensor([[0] * (width - len(line)) + [1] * len(line) for line in lines], device=self.device)
        logits = self._next(ids, mask, (mask.cumsum(1) - 1).clamp(min=0), cache)
        cache.batch_repeat_interleave(n)
        return cache, logits.repeat_interleave(n, 0), mask.repeat_interleave(n, 0)

    def _next(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: transformers.DynamicCache) -> Tensor:
        """Logits (rows, V) of the token that follows ids (rows, tokens), which join the cache."""
        lines = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        return self.model(**lines, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]


def pick(logp: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    """(rows, V) -> (rows,): exact sampling, the distribution function inverted at `uniform`."""
    if temperature == 0:
        return logp.argmax(-1)
    if top_p < 1:
        logp = transformers.TopPLogitsWarper(top_p)(None, logp)
    cdf = logp.exp().double().cumsum(-1)
    token = torch.searchsorted(cdf, uniform * cdf[:, -1:], right=True)[:, 0]
    return token.clamp(max=logp.shape[1] - 1)
