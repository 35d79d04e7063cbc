"""Adapters on disk: what is written is read again bit for bit, what a seed gives is not written, damage is an error."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import gaussian

from lori_nb.method.adapter_file import adapter_hash, fingerprint, load_adapter, save_adapter
from lori_nb.method.adapters import Adapter, Factors
from lori_nb.method.masks import magnitude_masks
from lori_nb.method.subspaces import down_projection, random_down_projection

SHAPES = {"layers.0.mlp.up_proj": (96, 64), "layers.0.mlp.down_proj": (64, 96), "layers.1.self_attn.q_proj": (64, 64)}
RANK = 8


def lora(**changes) -> Adapter:
    """An adapter whose A was trained."""
    factors = {
        name: Factors(gaussian(RANK, d_in, seed=d_in), gaussian(d_out, RANK, seed=d_out), 2.0)
        for name, (d_out, d_in) in SHAPES.items()
    }
    about = {"base": "tiny", "base_digest": "ab" * 32, "rank": RANK, "alpha": 16.0, "seed": 3, "subspace": "a+b"}
    return replace(Adapter(factors=factors, frozen_A=False, **about), **changes)


def lori_d() -> Adapter:
    """An adapter whose A is its seed's draw."""
    factors = {
        name: replace(f, A=random_down_projection(3, "a+b", name, RANK, f.A.shape[1]))
        for name, f in lora().factors.items()
    }
    return lora(factors=factors, frozen_A=True)


def lori_s(sparsity: float = 0.9) -> Adapter:
    """An adapter with a tenth of B under a mask."""
    masks = magnitude_masks({name: gaussian(d_out, RANK, seed=1) for name, (d_out, _) in SHAPES.items()}, sparsity)
    factors = {name: replace(f, B=f.B.masked_fill(~masks[name], 0.0)) for name, f in lori_d().factors.items()}
    return replace(lori_d(), factors=factors, masks=masks)


def with_head() -> Adapter:
    return replace(lori_s(), extras={"head.rte.weight": gaussian(2, 64, seed=4), "head.rte.bias": torch.zeros(2)})


KINDS = {"lora": lora, "lori-d": lori_d, "lori-s": lori_s, "with a head": with_head}


def same(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind, tmp_path):
    adapter, path = KINDS[kind](), tmp_path / "adapter.safetensors"
    save_adapter(adapter, path)
    found = load_adapter(path)
    assert list(found.factors) == sorted(adapter.factors)
    for name, f in adapter.factors.items():
        assert torch.equal(found.factors[name].A, f.A)
        assert torch.equal(found.factors[name].B, f.B)
        assert found.factors[name].scale == f.scale
    assert same(found.masks or {}, adapter.masks or {})
    assert same(found.extras, adapter.extras)
    assert replace(found, factors={}, masks=None, extras={}) == replace(adapter, factors={}, masks=None, extras={})
    assert adapter_hash(found) == adapter_hash(adapter)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter.safetensors"]


def test_a_frozen_A_is_not_written_and_a_trained_one_is(tmp_path):
    for kind, written in ((lora, True), (lori_d, False), (lori_s, False)):
        save_adapter(kind(), tmp_path / "a.safetensors")
        with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
            assert any(key.endswith(".A") for key in file.keys()) == written  # noqa: SIM118 (no mapping)


def test_an_A_that_no_seed_promises_is_written(tmp_path):
    blocks = {
        name: replace(f, A=down_projection(3, "orthogonal:1", name, RANK, f.A.shape[1]))
        for name, f in lori_s().factors.items()
    }
    adapter = replace(lori_s(), factors=blocks, subspace="orthogonal:1")
    save_adapter(adapter, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert {f"{name}.A" for name in blocks} <= set(file.keys())
    found = load_adapter(tmp_path / "a.safetensors")
    assert found.frozen_A
    assert adapter_hash(found) == adapter_hash(adapter)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrower_values(tmp_path, dtype):
    path, sizes = tmp_path / "a.safetensors", []
    for each in (torch.float32, dtype):
        save_adapter(lori_s(), path, each)
        sizes.append(sum(t.nbytes for t in load_file(path).values()))
    found = load_adapter(path)
    for name, f in lori_s().factors.items():
        assert torch.equal(found.factors[name].B, f.B.to(dtype).float())
        assert torch.equal(found.factors[name].A, f.A)  # drawn again, not stored
    kept = sum(int(mask.sum()) for mask in lori_s().masks.values())
    assert sizes[0] - sizes[1] == 2 * kept


def test_values_that_do_not_fit(tmp_path):
    large = {name: replace(f, B=f.B * 1e6) for name, f in lori_d().factors.items()}
    with pytest.raises(ValueError, match=r"\.B must fit torch.float16; found values up to"):
        save_adapter(replace(lori_d(), factors=large), tmp_path / "a.safetensors", torch.float16)
    with pytest.raises(ValueError, match="dtype must be one of torch.float32, torch.bfloat16, torch.float16; found"):
        save_adapter(lori_d(), tmp_path / "a.safetensors", torch.float64)
    assert not list(tmp_path.iterdir())


def test_values_off_the_mask_are_not_lost_in_silence(tmp_path):
    name, adapter = next(iter(SHAPES)), lori_s()
    B = adapter.factors[name].B.clone()
    row, column = (~adapter.masks[name]).nonzero()[0]
    B[row, column] = 0.5
    spilt = {**adapter.factors, name: replace(adapter.factors[name], B=B)}
    with pytest.raises(ValueError, match=rf"{name}\.B must be zero off its mask; found 1 other entries there"):
        save_adapter(replace(adapter, factors=spilt), tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_size_on_disk(tmp_path):
    """LoRI-S stores k = 0.1·n values and n bits: 4·0.1·n + n/8 bytes against LoRA's 4·n for B and as much for A."""
    sizes = {}
    for kind in KINDS:
        save_adapter(KINDS[kind](), tmp_path / "a.safetensors")
        with (tmp_path / "a.safetensors").open("rb") as file:
            header = 8 + int.from_bytes(file.read(8), "little")
        sizes[kind] = (tmp_path / "a.safetensors").stat().st_size - header
    entries_A, entries_B = RANK * (64 + 96 + 64), RANK * (96 + 64 + 64)
    kept = round(0.1 * entries_B)
    assert sizes["lora"] == 4 * (entries_A + entries_B)
    assert sizes["lori-d"] == 4 * entries_B
    assert 0 <= sizes["lori-s"] - (4 * kept + entries_B // 8) < 8  # the header is padded to eight bytes


def test_a_fingerprint_that_does_not_match(tmp_path):
    path = tmp_path / "a.safetensors"
    save_adapter(lori_d(), path)
    rewrite(path, seed=4)
    with pytest.raises(ValueError, match="A redrawn from seed 4 must match the stored fingerprint; it does not"):
        load_adapter(path)
    with pytest.raises(ValueError, match="must have format 1; found 2"):
        rewrite(path, format=2)
        load_adapter(path)


def rewrite(path, **changes) -> None:
    """Change entries of a stored header."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["lori_nb"])
    save_file(load_file(path), path, metadata={"lori_nb": json.dumps(header | changes)})


def test_fingerprint_and_hash_follow_every_bit():
    adapter = lori_s()
    assert fingerprint(adapter.factors) == fingerprint(lori_d().factors)  # B plays no part
    assert adapter_hash(adapter) == adapter_hash(lori_s())
    assert adapter_hash(adapter) != adapter_hash(lori_d())
    name = "layers.0.mlp.up_proj"
    for part in "AB":
        tensor = getattr(adapter.factors[name], part).clone()
        tensor.view(-1)[0] = torch.nextafter(tensor.view(-1)[0], torch.tensor(9.0))
        changed = adapter.factors | {name: replace(adapter.factors[name], **{part: tensor})}
        assert adapter_hash(replace(adapter, factors=changed)) != adapter_hash(adapter)
        assert (fingerprint(changed) != fingerprint(adapter.factors)) == (part == "A")
    assert adapter_hash(with_head()) != adapter_hash(adapter)


@pytest.mark.parametrize("keep", [0, 5, 500, -1])
def test_a_file_cut_short_is_an_error(keep, tmp_path):
    path = tmp_path / "a.safetensors"
    save_adapter(lora(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="a.safetensors must be a whole safetensors file; found: "):
        load_adapter(path)


def test_a_stranger_s_file_is_an_error_and_pickle_is_never_read(tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="must be an adapter written by this kit; found no lori_nb header"):
        load_adapter(tmp_path / "other.safetensors")
    torch.save({"x": torch.zeros(2)}, tmp_path / "pickle.safetensors")
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        load_adapter(tmp_path / "pickle.safetensors")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.safetensors"
    save_adapter(lora(), path)
    before = path.read_bytes()
    (tmp_path / "a.partial").mkdir()  # the file that is written first cannot be made
    with pytest.raises(OSError):
        save_adapter(lori_d(), path)
    assert path.read_bytes() == before
