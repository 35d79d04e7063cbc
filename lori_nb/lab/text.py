"""From rows to token batches: prompts, answers, and the positions whose logits are needed.

The prompt of a row is the same in training and in evaluation. Instruct models get their own chat template.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lori_nb.lab.tasks.base import Example

RECIPE = 1  # raise when the same row gives other tokens
SYSTEM = "Give only the answer."  # short: every token of it is computed for every row


@dataclass(frozen=True)
class Encoded:
    """One row as token ids. ``ids`` are prompt and answer; ``answer`` is the slice of ids to be predicted; ``decisive``
    is how many of its
    tokens, from the first, decide the score. Encoder rows have an empty answer, and ``segments`` tells their two texts
    apart."""

    ids: tuple[int, ...]
    answer_start: int
    decisive: int
    target: float | int | None
    segments: tuple[int, ...] | None = None

    @property
    def answer(self) -> tuple[int, ...]:
        return self.ids[self.answer_start :]


@functools.lru_cache(maxsize=32)  # by the rows themselves: a task registered again may give others
def encode_rows(
    tokenizer, kind: str, rows: tuple[Example, ...], shots: tuple[Example, ...] = (), system: str | None = None
) -> list[Encoded]:
    """Rows for a base of that kind ("decoder" or "encoder"), at the lengths that training and evaluation share."""
    if kind == "encoder":
        return encode_encoder_rows(tokenizer, rows)
    return encode_decoder_rows(tokenizer, rows, shots, prompt_limit(shots), system)


def prompt_limit(shots: Sequence[Example]) -> int:
    """The longest row in tokens, prompt and answer: 512, and 2048 where solved examples stand before the question."""
    return 2048 if shots else 512


def encode_decoder_rows(
    tokenizer,
    rows: Sequence[Example],
    shots: Sequence[Example] = (),
    max_length: int = 512,
    system: str | None = None,
) -> list[Encoded]:
    """Prompt and answer of every row; the answer ends with the end-of-text token.

    ``shots`` are solved examples shown before the row's own prompt, ``system`` the system message as in
    :func:`prompt_ids`. A prompt that is too long loses tokens in the middle of the user's text, so that the
    instruction's start and the answer marker stay.
    """
    return [_encode_decoder_row(tokenizer, row, shots, max_length, system) for row in rows]


def _encode_decoder_row(
    tokenizer, row: Example, shots: Sequence[Example], max_length: int, system: str | None
) -> Encoded:
    prompt = prompt_ids(tokenizer, row, shots, system)
    answer = [*_answer_ids(tokenizer, row.answer), tokenizer.eos_token_id]
    prompt = _without_middle(prompt, max_length, len(answer))
    decisive = len(answer)
    if row.opening is not None:
        if not row.answer.startswith(row.opening):
            raise ValueError(f"opening must be the start of the answer; found {row.opening!r} for {row.answer!r}")
        decisive = len(_answer_ids(tokenizer, row.opening))
    return Encoded(tuple(prompt + answer), len(prompt), decisive, row.target)


def encode_prompts(
    tokenizer,
    rows: Sequence[Example],
    shots: Sequence[Example] = (),
    max_length: int = 512,
    system: str | None = None,
) -> list[tuple[int, ...]]:
    """The prompt of every row alone, for generation: the tokens that stand before the answer in training.

    A prompt longer than ``max_length`` loses its middle, as in training.
    """
    return [tuple(_without_middle(prompt_ids(tokenizer, row, shots, system), max_length, 0)) for row in rows]


def encode_choices(
    tokenizer,
    rows: Sequence[Example],
    shots: Sequence[Example] = (),
    max_length: int = 512,
    system: str | None = None,
) -> list[list[Encoded]]:
    """Every row with each of its choices as the answer, all after the same prompt and without the end-of-text token.

    Raises ValueError for a row of fewer than two choices, or whose target is not the index of one.
    """
    encoded = []
    for row in rows:
        if len(row.choices) < 2 or row.target not in range(len(row.choices)):
            raise ValueError(
                f"a row scored by choice must have two or more choices and the right one's index as target; "
                f"found {len(row.choices)} choices, target {row.target!r}"
            )
        answers = [_answer_ids(tokenizer, choice) for choice in row.choices]
        whole = prompt_ids(tokenizer, row, shots, system)
        prompt = _without_middle(whole, max_length, max(map(len, answers)))
        encoded.append([Encoded(tuple(prompt + ids), len(prompt), len(ids), row.target) for ids in answers])
    return encoded


def _without_middle(prompt: list[int], max_length: int, answer: int) -> list[int]:
    room = max_length - answer
    if room < 32:
        raise ValueError(
            f"max_length must leave 32 tokens for the prompt; found {max_length} with an answer of {answer}"
        )
    if len(prompt) <= room:
        return prompt
    return prompt[: room // 2] + prompt[len(prompt) - (room - room // 2) :]


def prompt_ids(tokenizer, row: Example, shots: Sequence[Example] = (), system: str | None = None) -> list[int]:
    """Token ids of everything before the answer: through the chat template where the tokenizer has one.

    ``system`` is the system message of a chat: None for the kit's own short one, empty for the template's default.
    """
    texts = [(_question(shot), shot.answer) for shot in shots]
    if getattr(tokenizer, "chat_template", None):
        message = SYSTEM if system is None else system
        turns = [{"role": "system", "content": message}] if message else []
        for question, answer in texts:
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        turns.append({"role": "user", "content": _question(row)})
        return tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
    shown = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in texts)
    return tokenizer(f"{shown}Question: {_question(row)}\nAnswer:")["input_ids"]


def _question(row: Example) -> str:
    return row.prompt if row.second is None else f"{row.prompt}\n{row.second}"


def _answer_ids(tokenizer, answer: str) -> list[int]:
    text = answer if getattr(tokenizer, "chat_template", None) else " " + answer
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode_encoder_rows(tokenizer, rows: Sequence[Example], max_length: int = 128) -> list[Encoded]:
    """One or two texts of every row, truncated at the longer one."""
    encoded = []
    for row in rows:
        pair = () if row.second is None else (row.second,)
        out = tokenizer(row.prompt, *pair, truncation=True, max_length=max_length, return_token_type_ids=True)
        ids = tuple(out["input_ids"])
        encoded.append(Encoded(ids, len(ids), 0, row.target, tuple(out["token_type_ids"])))
    return encoded


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right. Shapes: ``ids``, ``mask``, ``segments`` (b × L); ``hidden`` (b × L × d) where the
    frozen prefix is cached.

    Decoder: ``positions`` (n) are the flat indices into b·L whose logits predict ``targets`` (n); ``rows`` (n) says
    whose they are and ``decisive`` (n) which count for the score. The same positions row by row are ``asked`` (b × m),
    a row with fewer than m filled up with its first; ``slots`` (n) are their flat indices into b·m. Encoder:
    ``targets`` (b).
    """

    ids: Tensor
    mask: Tensor
    segments: Tensor
    targets: Tensor
    positions: Tensor | None = None
    rows: Tensor | None = None
    decisive: Tensor | None = None
    hidden: Tensor | None = None
    asked: Tensor | None = None
    slots: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device; a GPU fetches it from pinned memory, so that this process need not wait."""
        to_gpu = torch.device(device).type == "cuda"

        def moved(tensor: Tensor) -> Tensor:
            ready = tensor.pin_memory() if to_gpu and tensor.device.type == "cpu" else tensor
            return ready.to(device, non_blocking=to_gpu)

        return Batch(**{name: None if t is None else moved(t) for name, t in vars(self).items()})


def collate(
    rows: Sequence[Encoded], pad: int, length: int | None = None, hidden: Sequence[Tensor] | None = None
) -> Batch:
    """Pad rows to the longest (or to ``length``) and gather the positions that predict an answer token.

    ``hidden`` are the cached hidden states of the same rows, each (tokens × d); padding positions are zero.
    """
    length = length or max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), length), pad, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    segments = torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        mask[i, : len(row.ids)] = 1
        if row.segments is not None:
            segments[i, : len(row.ids)] = torch.tensor(row.segments)
    padded = None
    if hidden is not None:
        padded = hidden[0].new_zeros(len(rows), length, hidden[0].shape[1])
        for i, states in enumerate(hidden):
            padded[i, : len(states)] = states
    if rows[0].segments is not None:
        return Batch(ids, mask, segments, torch.tensor([row.target for row in rows]), hidden=padded)
    places = [(i, t, j) for i, row in enumerate(rows) for j, t in enumerate(range(row.answer_start, len(row.ids)))]
    owner = torch.tensor([i for i, _, _ in places])
    starts = torch.tensor([row.answer_start - 1 for row in rows])  # the logits at t − 1 predict token t
    answers = [len(row.ids) - row.answer_start for row in rows]
    steps = torch.arange(max(answers))
    return Batch(
        ids,
        mask,
        segments,
        targets=torch.tensor([rows[i].ids[t] for i, t, _ in places]),
        positions=torch.tensor([i * length + t - 1 for i, t, _ in places]),
        rows=owner,
        decisive=torch.tensor([j < rows[i].decisive for i, _, j in places]),
        hidden=padded,
        asked=starts[:, None] + torch.where(steps < torch.tensor(answers)[:, None], steps, 0),
        slots=torch.tensor([i * len(steps) + j for i, _, j in places]),
    )
