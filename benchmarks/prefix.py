"""What frozen-prefix reuse saves: one training step from cached hidden states against the same step of the full model.

Same base, adapters, rows and dtype; logits at answer positions in both. FLOPs are counted, wall times come from
interleaved pairs.

    python benchmarks/prefix.py --pairs 30
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from lori_nb.analysis.statistics import t_interval
from lori_nb.lab.evaluation import logits_at, task_loss
from lori_nb.lab.methods import initial_live
from lori_nb.lab.models import load_base
from lori_nb.lab.prefix import cached_states, split_at, suffix_body
from lori_nb.lab.specs import RunSpec
from lori_nb.lab.tasks import get_task
from lori_nb.lab.text import collate, encode_decoder_rows
from lori_nb.method.adapters import attach, target_linears

RESULTS = Path(__file__).parent / "results" / "prefix.json"


def steps(spec: RunSpec) -> tuple[Callable[[], None], Callable[[], None], Callable[[], None]]:
    """(step from cached states, step of the full model, filling the cache for those rows)."""
    base = load_base(spec.base, spec.dtype)
    first = split_at(base, spec.last_layers)
    linears = target_linears(base.body, spec.modules, spec.last_layers)
    live = initial_live(spec, {name: tuple(m.weight.shape) for name, m in linears.items()}, lambda parent: None)
    attach(base.body, live)
    parameters = [p for low in live.values() for p in low.parameters() if p.requires_grad]
    rows = encode_decoder_rows(base.tokenizer, get_task(spec.tasks[0]).rows("train", 32))[: spec.batch_size]
    states = cached_states(base, rows, first)
    pad = base.tokenizer.pad_token_id

    def step(body: torch.nn.Module, hidden: list | None) -> None:
        batch = collate(rows, pad, hidden=hidden)
        torch.autograd.grad(task_loss(base, logits_at(base, body, batch), batch), parameters)

    suffix = suffix_body(base, first)
    cached = [states[i] for i in range(len(rows))]

    def fill() -> None:
        with torch.no_grad():
            hidden = base.body.embed_tokens(collate(rows, pad).ids)
            positions = torch.arange(hidden.shape[1]).unsqueeze(0)
            rotary = base.body.rotary_emb(hidden, positions)
            for layer in base.body.layers[:first]:
                hidden = layer(hidden, position_embeddings=rotary)

    return lambda: step(suffix, cached), lambda: step(base.body, None), fill


def flops(run: Callable[[], None]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def seconds(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--task", default="family_relationships")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    spec = RunSpec("lora", (arguments.task,), batch_size=8)
    ours, peer, fill = steps(spec)
    about = {
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "command": f"python benchmarks/prefix.py --pairs {arguments.pairs}",
    }
    ours(), peer()  # the first pass allocates
    counted = flops(ours) / flops(peer)
    times = np.array([(seconds(ours), seconds(peer)) for _ in range(arguments.pairs)])
    ratio = t_interval(np.log(times[:, 0] / times[:, 1]))
    filled = np.median([seconds(fill) for _ in range(3)]) / np.median(times[:, 0])
    rows = [
        {"name": "step, FLOPs", "ratio": counted, "unit": "ours / full model", **about},
        {
            "name": "step, wall time",
            "ratio": float(np.exp(ratio.mean)),
            "low": float(np.exp(ratio.low)),
            "high": float(np.exp(ratio.high)),
            "n": ratio.n,
            "unit": "ours / full model",
            **about,
        },
        {"name": "filling the cache for the rows of one step", "ratio": float(filled), "unit": "steps", **about},
    ]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        print(f"{row['name']:<45} {row['ratio']:.3f} {row['unit']}")


if __name__ == "__main__":
    main()
