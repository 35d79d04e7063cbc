"""Merges and overlaps from factors against their dense forms and against peft: wall time, peak memory, growth.

Adapters are random, of rank 32. The dense forms are the definitions, by singular value decompositions of ΔW; peft's is
``add_weighted_adapter(combination_type="svd")`` as it stands. A dense decomposition takes a minute, so those rows have
few pairs; their interval is as wide as that makes it.

    python benchmarks/analysis.py
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from functools import partial

import torch
from measure import counted_ratio, judged, peak_bytes, publish, seconds, wall_ratio
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lori_nb.analysis.merging import MERGE_METHODS
from lori_nb.analysis.overlap import overlap_table
from lori_nb.method.adapters import Factors

RANK, ADAPTERS = 32, 4
# Linear modules of one of Llama-3-8B's 32 layers: (d_out, d_in)
LLAMA = {"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096)}
LLAMA |= {"gate": (14336, 4096), "up": (14336, 4096), "down": (4096, 14336)}
LAYERS = 32
SAMPLE = ("k", "q")  # whose dense forms take seconds and minutes; the widest would take half an hour
WHOLE = 10  # interleaved pairs of a whole run: a call of a dense form takes many seconds


def random_factors(d_out: int, d_in: int, draw: torch.Generator, rank: int = RANK) -> Factors:
    """A random update of unit scale, in float32."""
    return Factors(torch.randn(rank, d_in, generator=draw), torch.randn(d_out, rank, generator=draw), 1.0)


def several(d_out: int, d_in: int, count: int = ADAPTERS) -> list[Factors]:
    """Some random updates of one module."""
    draw = torch.Generator().manual_seed(0)
    return [random_factors(d_out, d_in, draw) for _ in range(count)]


def peft_svd(factors: Sequence[Factors], weights: Sequence[float]) -> Callable[[], None]:
    """peft's own SVD merge of the same factors on one linear module."""
    (d_out, _), (_, d_in) = factors[0].B.shape, factors[0].A.shape
    names = [f"a{place}" for place in range(len(factors))]
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["linear"], lora_dropout=0.0)
    model = get_peft_model(nn.ModuleDict({"linear": nn.Linear(d_in, d_out, bias=False)}), config, names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    layer = model.base_model.model["linear"]
    with torch.no_grad():
        for name, f in zip(names, factors, strict=True):
            layer.lora_A[name].weight.copy_(f.A)
            layer.lora_B[name].weight.copy_(f.B)

    def merge() -> None:
        model.add_weighted_adapter(names, list(weights), "merged", combination_type="svd", svd_rank=RANK)
        model.delete_adapter("merged")

    return merge


def svd_rows(pairs: int) -> list[dict]:
    """The SVD merge of one 4096 × 4096 module against peft's."""
    factors, weights = several(4096, 4096), [0.4] * ADAPTERS
    peer = peft_svd(factors, weights)

    def mine() -> None:
        MERGE_METHODS["svd"](factors, weights)

    name = f"SVD merge, {ADAPTERS} adapters r = {RANK}, one 4096 × 4096 module, ours / peft"
    return [
        judged(name, 1 / 200, wall_ratio(mine, peer, pairs), pairs),
        judged(f"{name}, peak memory", 0.05, counted_ratio(peak_bytes(mine), peak_bytes(peer), "bytes")),
    ]


def dense_overlap(factors: Sequence[Factors]) -> None:
    """Cosines and principal angles of all pairs by their definitions on dense matrices."""
    dense = [f.delta() for f in factors]
    parts = [torch.linalg.svd(each, full_matrices=False) for each in dense]
    for i, j in itertools.combinations(range(len(factors)), 2):
        (dense[i] * dense[j]).sum() / dense[i].norm() / dense[j].norm()
        torch.linalg.svdvals(parts[i][0][:, :RANK].T @ parts[j][0][:, :RANK]).clamp(max=1).arccos()
        torch.linalg.svdvals(parts[i][2][:RANK] @ parts[j][2][:RANK].T).clamp(max=1).arccos()


def overlap_work(modules: dict[str, tuple[int, int]], count: int = ADAPTERS) -> Callable[[], None]:
    """Our cosines and principal angles of all pairs on some modules."""
    draw = torch.Generator().manual_seed(0)
    adapters = {f"a{n}": {m: random_factors(*shape, draw) for m, shape in modules.items()} for n in range(count)}

    def work() -> None:
        overlap_table(adapters)

    work.bytes = sum(f.A.nbytes + f.B.nbytes for own in adapters.values() for f in own.values())
    return work


def overlap_rows(pairs: int) -> list[dict]:
    """Pairwise cosines and angles: against the dense definition, in memory, and as they grow."""
    rows = []
    for kind in SAMPLE:
        factors, mine = several(*LLAMA[kind]), overlap_work({kind: LLAMA[kind]})
        name = f"cosines and angles, {ADAPTERS} adapters, one {' × '.join(map(str, LLAMA[kind]))} module, ours / dense"
        dense = partial(dense_overlap, factors)
        rows.append(judged(name, 1 / 100, wall_ratio(mine, dense, pairs), pairs))
    whole = overlap_work({f"layers.{n}.{m}": shape for n in range(LAYERS) for m, shape in LLAMA.items()})
    peak = peak_bytes(whole) + whole.bytes
    name = f"cosines and angles, {ADAPTERS} adapters of Llama-3-8B, peak memory / the adapters' own bytes"
    rows.append(judged(name, 1.3, counted_ratio(peak, whole.bytes, "bytes")))
    many = {count: least(overlap_work({"m": (2048, 2048)}, count)) for count in (2, 4, 8)}
    wide = {d: least(overlap_work({"m": (d, d)})) for d in (1024, 2048, 4096)}
    for label, times, growth in (("adapters, time / n²", many, 2), ("d, time / d", wide, 1)):
        sizes = list(times)
        for low, high in ((sizes[0], sizes[-1]), *itertools.pairwise(sizes)):
            measured = counted_ratio(times[high], (high / low) ** growth * times[low], "s")
            whole = (low, high) == (sizes[0], sizes[-1])  # a doubling alone is told, not judged: its noise is as large
            rows.append(judged(f"growth, {label}, {low} → {high}", 1.0 if whole else None, measured))
    return rows


def least(work: Callable[[], None], repeats: int = 7) -> float:
    """The least wall time of some calls: what the machine can do when nothing else does."""
    work()
    return min(seconds(work) for _ in range(repeats))


def dense_polar(X: Tensor) -> Tensor:
    """The matrix with orthonormal columns nearest to X."""
    P, _, Qh = torch.linalg.svd(X, full_matrices=False)
    return P @ Qh


def dense_knots(factors: Sequence[Factors], weights: Sequence[float]) -> Tensor:
    """KnOTS' decomposition of all updates side by side; its merge of the right factors is left out on this side."""
    U, singular, Vh = torch.linalg.svd(torch.cat([f.delta() for f in factors], dim=1), full_matrices=False)
    parts = (singular[:, None] * Vh).chunk(len(factors), dim=1)
    return U @ sum(weight * part for weight, part in zip(weights, parts, strict=True))


def dense_tsv(factors: Sequence[Factors], weights: Sequence[float]) -> Tensor:
    """TSV-M with RANK directions of every update."""
    parts = [torch.linalg.svd(f.delta(), full_matrices=False) for f in factors]
    U = dense_polar(torch.cat([u[:, :RANK] for u, _, _ in parts], dim=1))
    V = dense_polar(torch.cat([vh[:RANK].T for _, _, vh in parts], dim=1))
    return U * torch.cat([weight * s[:RANK] for weight, (_, s, _) in zip(weights, parts, strict=True)]) @ V.T


def dense_iso(factors: Sequence[Factors], weights: Sequence[float]) -> Tensor:
    """Iso-C over the numerical rank of the sum."""
    total = sum(weight * f.delta() for weight, f in zip(weights, factors, strict=True))
    U, singular, Vh = torch.linalg.svd(total, full_matrices=False)
    rank = RANK * len(factors)
    return singular[:rank].mean() * U[:, :rank] @ Vh[:rank]


def merge_rows(pairs: int) -> list[dict]:
    """Merges on singular vectors against their dense forms, one module; at 4096 × 4096 the first two take minutes."""
    weights, rows = [0.4] * ADAPTERS, []
    cases = [("knots-ties", dense_knots, 2048), ("tsv-m", dense_tsv, 2048)]
    cases += [("iso-c", dense_iso, 2048), ("iso-c", dense_iso, 4096)]
    for method, dense, d in cases:
        factors = several(d, d)
        measured = wall_ratio(
            lambda method=method, factors=factors: MERGE_METHODS[method](factors, weights),
            lambda dense=dense, factors=factors: dense(factors, weights),
            pairs,
        )
        rows.append(judged(f"{method}, one {d} × {d} module, ours / dense", 1 / 50, measured, pairs))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pairs", type=int, default=WHOLE, help="interleaved pairs of every timing against a dense form"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = overlap_rows(arguments.pairs) + merge_rows(arguments.pairs) + svd_rows(arguments.pairs)
    command, whole = f"python benchmarks/analysis.py --pairs {arguments.pairs}", arguments.pairs >= WHOLE
    publish(rows, "analysis.json", command, ("torch", "peft"), whole)


if __name__ == "__main__":
    main()
