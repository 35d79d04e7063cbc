"""Completions: batched, left-padded, cached generation through transformers, with draws that no other row can change.

Sampling is by inverse transform: one uniform number u picks the first token whose cumulative probability exceeds it.
u is a hash of (seed, row, sample, position), so a draw does not depend on which rows share the batch, nor on the batch
size, beyond the last digits of the probabilities themselves.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from lori_nb.lab import distributed
from lori_nb.lab.models import Base

RECIPE = 2  # raise when the same model writes other completions

Unit = tuple[int, int]  # (row, sample)


@dataclass(frozen=True)
class Settings:
    """How to generate: greedy at ``temperature`` 0; ``stop`` are texts that end a completion and are cut off."""

    max_new_tokens: int
    samples: int = 1
    temperature: float = 0.0
    seed: int = 0
    batch_size: int = 16
    stop: tuple[str, ...] = ()

    def __post_init__(self):
        for name in ("max_new_tokens", "samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; found {getattr(self, name)}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be at least 0 and finite; found {self.temperature}")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"samples must be 1 at temperature 0, which always gives the same; found {self.samples}")
        if "" in self.stop:
            raise ValueError("stop must hold texts that are not empty; found an empty one")


def generate(
    base: Base,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[str]]:
    """Completions of every prompt: ``samples`` texts each, without the prompt, special tokens and the stop text.

    A completion ends at the tokenizer's end-of-text token or one of the base's own ends (an instruct model's end of
    turn), before the first stop text, or at ``max_new_tokens``.
    Adapters that are attached to the base's body act. Several processes are dealt whole batches. ``progress`` is called
    with (completions done, all).

    Args:
        prompts: token ids, each at least one.

    Raises:
        ValueError: an encoder, or a prompt without tokens.
    """
    if base.kind != "decoder":
        raise ValueError(f"base must be a decoder to generate; found the {base.kind} {base.name}")
    empty = [place for place, prompt in enumerate(prompts) if not prompt]
    if empty:
        raise ValueError(f"prompts must have at least one token each; found none in prompt {empty[0]}")
    model = causal_lm(base)
    units = [(row, sample) for row in range(len(prompts)) for sample in range(settings.samples)]
    units.sort(key=lambda unit: -len(prompts[unit[0]]))  # similar lengths pad little; the largest batch comes first
    written: dict[Unit, str] = {}
    for start in distributed.dealt(range(0, len(units), settings.batch_size)):
        chosen = units[start : start + settings.batch_size]
        texts = _complete(model, base, [prompts[row] for row, _ in chosen], chosen, settings)
        written.update(zip(chosen, texts, strict=True))
        progress(len(written), len(units))
    written = distributed.gathered(written)
    return [[written[row, sample] for sample in range(settings.samples)] for row in range(len(prompts))]


def causal_lm(base: Base) -> PreTrainedModel:
    """Body and head as one causal language model again; its modules are the base's own, so attached adapters act."""
    config = base.body.config
    with torch.device("meta"):  # its own weights are never needed
        whole = AutoModelForCausalLM.from_config(config, attn_implementation=config._attn_implementation)
    setattr(whole, whole.base_model_prefix, base.body)
    whole.set_output_embeddings(base.head)
    return whole.eval()


def _complete(
    model: PreTrainedModel, base: Base, prompts: Sequence[Sequence[int]], units: Sequence[Unit], settings: Settings
) -> list[str]:
    ids, mask = left_padded(prompts, base.tokenizer.pad_token_id)  # (b × L)
    length, ends = ids.shape[1], [*dict.fromkeys((base.tokenizer.eos_token_id, *base.ends))]
    draws = [KeyedDraws(units, length, settings)] if settings.temperature > 0 else []
    stops = [StopsAt(base.tokenizer, length, settings.stop)] if settings.stop else []
    config = GenerationConfig(
        do_sample=False,  # the draws, where there are any, are made by the processor
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=ends,
        pad_token_id=base.tokenizer.pad_token_id,
    )
    with torch.no_grad():
        out = model.generate(
            ids.to(base.device),
            attention_mask=mask.to(base.device),
            generation_config=config,
            logits_processor=LogitsProcessorList(draws),
            stopping_criteria=StoppingCriteriaList(stops),
        )
    return [_text(base.tokenizer, row, ends, settings.stop) for row in out[:, length:].tolist()]


def left_padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """(ids, mask), each (b × L) with L the longest prompt: prompts end in the last column, where generation goes on."""
    length = max(map(len, prompts))
    ids = torch.full((len(prompts), length), pad, dtype=torch.long)
    mask = torch.zeros(len(prompts), length, dtype=torch.long)
    for place, prompt in enumerate(prompts):
        ids[place, length - len(prompt) :] = torch.tensor(prompt)
        mask[place, length - len(prompt) :] = 1
    return ids, mask


def _text(tokenizer, written: list[int], ends: Sequence[int], stop: Sequence[str]) -> str:
    ended = next((place for place, token in enumerate(written) if token in ends), len(written))
    text = tokenizer.decode(written[:ended], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text[: min((place for place in map(text.find, stop) if place >= 0), default=len(text))]


def uniform(seed: int, row: int, sample: int, position: int) -> float:
    """A number in [0, 1) from 48 bits of SHA-256, the same on every platform."""
    digest = hashlib.sha256(f"{seed}|{row}|{sample}|{position}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


class KeyedDraws(LogitsProcessor):
    """Puts all weight on a token drawn from softmax(logits / temperature), so that the greedy choice is the draw."""

    def __init__(self, units: Sequence[Unit], prompt_length: int, settings: Settings):
        self.units, self.prompt_length, self.settings = units, prompt_length, settings

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        position = input_ids.shape[1] - self.prompt_length
        numbers = [uniform(self.settings.seed, row, sample, position) for row, sample in self.units]
        u = torch.tensor(numbers, dtype=torch.float64, device=scores.device).unsqueeze(1)  # (b × 1)
        # in double: the sum over a vocabulary of 10⁵ tokens would lose the rare ones in single precision
        cumulative = (scores.double() / self.settings.temperature).softmax(-1).cumsum(-1)  # (b × vocabulary)
        token = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)
        return torch.zeros_like(scores).scatter_(1, token, 1.0)


class StopsAt(StoppingCriteria):
    """True for rows whose completion (the prompt is not looked at) has come to hold a stop text."""

    def __init__(self, tokenizer, prompt_length: int, stop: Sequence[str]):
        self.tokenizer, self.prompt_length, self.stop = tokenizer, prompt_length, stop
        # every token has a byte or more, so a stop text that ends in the newest token begins within this many
        self.window = max(len(text.encode()) for text in stop) + 1

    def __call__(self, input_ids: Tensor, scores: Tensor, **_) -> Tensor:
        tail = input_ids[:, max(self.prompt_length, input_ids.shape[1] - self.window) :]
        texts = self.tokenizer.batch_decode(tail, clean_up_tokenization_spaces=False)
        found = [any(stop in text for stop in self.stop) for text in texts]
        return torch.tensor(found, dtype=torch.bool, device=input_ids.device)
