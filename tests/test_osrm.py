"""OSRM as an extension: the example notebook, on a tiny model, and the hook that it needs."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace

import pytest
import torch
from tiny import tiny_spec

from lori_nb.lab.methods import METHODS, get_method, initial_live, method
from lori_nb.lab.models import load_base
from lori_nb.lab.paths import PROJECT
from lori_nb.lab.prefix import model_inputs
from lori_nb.lab.resolving import resolve
from lori_nb.lab.runs import Store
from lori_nb.lab.tasks import get_task
from lori_nb.lab.text import collate, encode_rows
from lori_nb.method.adapters import Factors, target_linears
from lori_nb.method.subspaces import down_projection

EXAMPLE = PROJECT / "notebooks" / "examples" / "osrm.ipynb"
SMALL = {"last_layers": 2, "steps": 3, "train_rows": 16, "test_rows": 8, "rank": 4, "dtype": '"float32"'}


def module_of(base, folder):
    """The notebook's code cells as a module, with its parameters replaced by small ones: hooks need a source file."""
    cells = json.loads(EXAMPLE.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert "parameters" in cells[1]["metadata"]["tags"] and sources[0].startswith("base = ")
    small = "\n".join(f"{name} = {value}" for name, value in (SMALL | {"base": repr(str(base))}).items())
    path = folder / "osrm_example.py"
    path.write_text("\n\n".join([sources[0], small, *sources[1:]]), encoding="utf-8")
    found = importlib.util.spec_from_file_location("osrm_example", path)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_the_example_runs_and_A_starts_where_other_tasks_are_not(tiny_decoder, home, tmp_path, registries):
    module = module_of(tiny_decoder, tmp_path)
    assert set(module.interference) == {"lora", "osrm"} and len(module.rows) == 2 * len(module.tasks)
    base = load_base(str(tiny_decoder), "float32")
    spec = tiny_spec(tiny_decoder, "osrm", ["chain_sum"])
    shapes = {name: tuple(m.weight.shape) for name, m in target_linears(base.body, last_layers=2).items()}
    live = initial_live(spec, shapes, None, base)
    for name, low in live.items():
        drawn = down_projection(0, "chain_sum", name, 4, shapes[name][1])
        x = inputs_of(base, name, "spell_backward")
        assert (x @ low.A.T).norm() < 0.5 * (x @ drawn.T).norm(), "the draw reads the other task, this start hardly"
        torch.testing.assert_close(low.A @ low.A.T, torch.eye(4) / 3, rtol=0, atol=1e-5)
        assert low.A.requires_grad and not low.B.any()
    adapter = module.adapters["osrm"]["chain_sum"]
    with pytest.raises(ValueError, match="tasks must be among chain_sum, spell_backward, .*; found chain_sum, gcd"):
        module.orthogonal_to_other_tasks(tiny_spec(tiny_decoder, "osrm", ["chain_sum", "gcd"]), {}, base)
    assert not adapter.frozen_A and module.adapters["lora"]["chain_sum"].rank == adapter.rank


def inputs_of(base, module: str, name: str) -> torch.Tensor:
    """A module's inputs (tokens × d_in) over 32 training rows of a task, by a hook of our own."""
    task, found = get_task(name), []
    encoded = encode_rows(base.tokenizer, base.kind, tuple(task.rows("train", 32)), (), task.system)
    batch = collate(encoded, base.tokenizer.pad_token_id)
    handle = base.body.get_submodule(module).register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    with torch.no_grad():
        base.body(**model_inputs(base, batch))
    handle.remove()
    return found[0][batch.mask.bool()]


def halved(spec, factors, base):
    assert base is not None
    return {name: replace(f, A=f.A / 2) for name, f in factors.items()}


def narrow(spec, factors, base):
    return {name: Factors(f.A[:1], f.B[:, :1], f.scale) for name, f in factors.items()}


def test_a_start_of_one_s_own_is_stored_even_where_A_is_frozen(tiny_decoder, home, registries):
    method("lori-d-halved", like="lori-d", hook="initialise")(halved)
    spec = tiny_spec(tiny_decoder, "lori-d-halved", steps=2)
    run = Store().get(spec)
    for name, f in run.adapter.factors.items():
        assert torch.equal(f.A, down_projection(0, "chain_sum", name, 4, f.A.shape[1]) / 2)
    assert not run.adapter.frozen_A and not run.adapter.redrawable, "no seed gives this A"
    plain = Store().get(tiny_spec(tiny_decoder, "lori-d", steps=2))
    assert plain.adapter.frozen_A and plain.hash != run.hash


def test_a_start_of_other_shapes_is_refused_by_name(registries):
    method("narrow", like="lora", hook="initialise")(narrow)
    with pytest.raises(ValueError, match=r"initialise of method 'narrow' must give A and B of q the shapes \(\(4, 8\)"):
        initial_live(tiny_spec("tiny", "narrow"), {"q": (6, 8)}, None)


def test_methods_without_the_hook_keep_their_digest_and_its_source_counts(tiny_decoder, home, registries):
    """Runs of methods registered before there was this hook stay valid: it is not in what their digest is made of."""
    assert all("initialise" not in repr(each) for each in METHODS.values())
    method("started", like="lora", hook="initialise")(halved)
    first, one = get_method("started").source_digest, resolve(tiny_spec(tiny_decoder, "started")).hash
    method("started", like="lora", hook="initialise")(narrow)
    assert get_method("started").source_digest != first
    assert resolve(tiny_spec(tiny_decoder, "started")).hash != one
