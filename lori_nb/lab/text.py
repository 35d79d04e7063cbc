"""From rows to token batches: prompts, answers, and the positions whose logits are needed.

The prompt of a row is the same in training, teacher forcing, likelihood scoring and generation: it depends on the row's
question, the examples before it and the system message, never on the answer. Instruct models get their own chat
template.

A row is at most :func:`row_limit` tokens long, of which :data:`ANSWER_ROOM` are kept for an answer. A prompt that takes
more than the rest loses tokens in its middle, so that its beginning and the answer marker at its end stay. An answer
may take all that the prompt leaves. A longer one loses its end, the end-of-text token with it, so that training on it
does not teach to stop there, and it never counts as right. Choices, which are compared with each other, are never cut.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jinja2 import TemplateError
from torch import Tensor

from lori_nb.lab.tasks.base import Example

RECIPE = 1  # raise when the same row gives other tokens
CUT_RECIPE = 2  # raise when only rows that may be too long give others; counts for runs that have such rows
SYSTEM = "Give only the answer."  # short: every token of it is computed for every row
ANSWER_ROOM = 64  # tokens; beside them all but a handful of the published sets' prompts fit whole
LEAST_PROMPT = 32  # tokens of a cut prompt; the answer marker of a template takes about five
# Tokens that chat templates put around a question and its answer (Llama 3.1's, with its dates, about 40), and around an
# example's: room enough, so that a row is known to be short from its bytes.
_AROUND, _AROUND_EXAMPLE = 48, 16


@dataclass(frozen=True)
class Encoded:
    """One row as token ids. ``ids`` are prompt and answer; ``answer`` is the slice of ids to be predicted; ``decisive``
    is how many tokens of the whole answer, from the first, decide the score: more than there are where it lost its end.
    Encoder rows have an empty answer, and ``segments`` tells their two texts apart.
    """

    ids: tuple[int, ...]
    answer_start: int
    decisive: int
    target: float | int | None
    segments: tuple[int, ...] | None = None

    @property
    def answer(self) -> tuple[int, ...]:
        return self.ids[self.answer_start :]

    @property
    def whole(self) -> bool:
        """Whether all tokens that decide the score are there."""
        return self.decisive <= len(self.answer)


@functools.lru_cache(maxsize=32)  # by the rows themselves: a task registered again may give others
def encode_rows(
    tokenizer, kind: str, rows: tuple[Example, ...], shots: tuple[Example, ...] = (), system: str | None = None
) -> list[Encoded]:
    """Rows for a base of that kind ("decoder" or "encoder"), at the lengths that training and evaluation share."""
    if kind == "encoder":
        return encode_encoder_rows(tokenizer, rows)
    return encode_decoder_rows(tokenizer, rows, shots, row_limit(len(shots)), system)


def row_limit(shots: int) -> int:
    """The longest row in tokens, prompt and answer: 512, and 2048 where solved examples stand before the question."""
    return 2048 if shots else 512


def text_bytes(row: Example) -> int:
    """Bytes of a row's question and of the longest answer that may stand after it."""
    answers = [len(text.encode()) for text in (row.answer, *row.choices)]
    return len(_question(row).encode()) + max(answers)


def may_be_cut(longest: int, shots: int = 0, system: str | None = None) -> bool:
    """Whether rows of up to ``longest`` bytes (:func:`text_bytes`), ``shots`` of them before each, may lose tokens.

    A tokenizer makes no more tokens of a text than it has bytes, so rows of which this is False are whole under any.
    """
    message = SYSTEM if system is None else system
    most = longest + _AROUND + len(message.encode()) + shots * (longest + _AROUND_EXAMPLE)
    return most > row_limit(shots) - ANSWER_ROOM


def encode_decoder_rows(
    tokenizer,
    rows: Sequence[Example],
    shots: Sequence[Example] = (),
    max_length: int = 512,
    system: str | None = None,
) -> list[Encoded]:
    """Prompt and answer of every row, at most ``max_length`` tokens; the answer ends with the end-of-text token.

    ``shots`` are solved examples shown before the row's own prompt, ``system`` the system message as in
    :func:`prompt_ids`. The prompt is that of :func:`encode_prompts`. What a row loses that is too long is said at the
    top of this module.

    Raises:
        ValueError: ``max_length`` leaves no room for a prompt, or an opening is not the start of its answer.
    """
    return [_encode_decoder_row(tokenizer, row, shots, max_length, system) for row in rows]


def _encode_decoder_row(
    tokenizer, row: Example, shots: Sequence[Example], max_length: int, system: str | None
) -> Encoded:
    prompt = _within(prompt_ids(tokenizer, row, shots, system), max_length)
    answer = [*_answer_ids(tokenizer, row.answer), tokenizer.eos_token_id]
    decisive = len(answer)
    if row.opening is not None:
        if not row.answer.startswith(row.opening):
            raise ValueError(f"opening must be the start of the answer; found {row.opening!r} for {row.answer!r}")
        decisive = len(_answer_ids(tokenizer, row.opening))
    return Encoded(tuple(prompt + answer)[:max_length], len(prompt), decisive, row.target)


def encode_prompts(
    tokenizer,
    rows: Sequence[Example],
    shots: Sequence[Example] = (),
    max_length: int = 512,
    system: str | None = None,
) -> list[tuple[int, ...]]:
    """The prompt of every row alone, for generation: the very tokens that stand before its answer in training.

    ``max_length`` is that of a row with its answer, so a prompt has at most ``max_length`` − :data:`ANSWER_ROOM`.
    Raises ValueError where that leaves no room for a prompt.
    """
    return [tuple(_within(prompt_ids(tokenizer, row, shots, system), max_length)) for row in rows]


def encode_choices(
    tokenizer,
    rows: Sequence[Example],
    shots: Sequence[Example] = (),
    max_length: int = 512,
    system: str | None = None,
) -> list[list[Encoded]]:
    """Every row with each of its choices as the answer, all after the prompt of :func:`encode_prompts` and without the
    end-of-text token.

    Choices are whole: one longer than the room for answers may make its row longer than ``max_length``.

    Raises:
        ValueError: a row of fewer than two choices, or whose target is not the index of one; no room for a prompt.
    """
    encoded = []
    for row, prompt in zip(rows, encode_prompts(tokenizer, rows, shots, max_length, system), strict=True):
        if len(row.choices) < 2 or row.target not in range(len(row.choices)):
            raise ValueError(
                f"a row scored by choice must have two or more choices and the right one's index as target; "
                f"found {len(row.choices)} choices, target {row.target!r}"
            )
        answers = [_answer_ids(tokenizer, choice) for choice in row.choices]
        encoded.append([Encoded((*prompt, *ids), len(prompt), len(ids), row.target) for ids in answers])
    return encoded


def _within(prompt: list[int], max_length: int) -> list[int]:
    """The prompt, without its middle where it would leave less than the room for an answer."""
    room = max_length - ANSWER_ROOM
    if room < LEAST_PROMPT:
        raise ValueError(
            f"max_length must leave {LEAST_PROMPT} tokens for the prompt beside {ANSWER_ROOM} for the answer; "
            f"found {max_length}"
        )
    if len(prompt) <= room:
        return prompt
    return prompt[: room // 2] + prompt[len(prompt) - (room - room // 2) :]


def prompt_ids(tokenizer, row: Example, shots: Sequence[Example] = (), system: str | None = None) -> list[int]:
    """Token ids of everything before the answer, nothing cut: through the chat template where the tokenizer has one.

    ``system`` is the system message of a chat: None for the kit's own short one, empty for the template's default.
    Where a template refuses a system turn, the message opens the first user turn, an empty line before the question.
    """
    texts = [(_question(shot), shot.answer) for shot in shots]
    if getattr(tokenizer, "chat_template", None):
        turns = []
        for question, answer in texts:
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        turns.append({"role": "user", "content": _question(row)})
        return _chat_ids(tokenizer, SYSTEM if system is None else system, turns)
    shown = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in texts)
    return tokenizer(f"{shown}Question: {_question(row)}\nAnswer:")["input_ids"]


def _chat_ids(tokenizer, message: str, turns: list[dict[str, str]]) -> list[int]:
    def ids(turns: list[dict[str, str]]) -> list[int]:
        return tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)

    if not message:
        return ids(turns)
    try:
        return ids([{"role": "system", "content": message}, *turns])
    except TemplateError:  # Gemma's refuses the role, Mistral-Instruct's a turn before the user's
        first, *rest = turns
        return ids([first | {"content": f"{message}\n\n{first['content']}"}, *rest])


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
