"""Anyone's PEFT folders: read as peft means them, compared and merged without a base, written so that peft agrees."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import gaussian, random_factors
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from lori_nb import cli
from lori_nb.analysis.interference import similarity_curve
from lori_nb.analysis.merging import MERGE_METHODS, merge
from lori_nb.analysis.overlap import norm, total_cosine
from lori_nb.analysis.reduced import reduced
from lori_nb.lab.folders import not_shared, read_folders, shared_draws, short_names, unwrapped, write_merged
from lori_nb.lab.interop import export_peft, import_peft
from lori_nb.lab.models import empty_body, load_base
from lori_nb.lab.peft_writing import portability, write_peft
from lori_nb.lab.tasks import get_task
from lori_nb.lab.text import encode_rows
from lori_nb.method.adapter_file import load_adapter
from lori_nb.method.adapters import Factors, target_linears
from lori_nb.study import foreign

TOKENS = torch.arange(3, 27).view(2, 12) * 5


def invoke(*words):
    return CliRunner().invoke(cli.app, [str(word) for word in words])


def decoder(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def logits_of(folder, adapter=None) -> torch.Tensor:
    model = decoder(folder)
    with torch.no_grad():
        model = model if adapter is None else PeftModel.from_pretrained(model, adapter).eval()
        return model(input_ids=TOKENS).logits


def saved_by_peft(base, folder, seed: int, **settings):
    """A folder that peft wrote, its update about as large as the weights that it is added to."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings
    model = get_peft_model(decoder(base), LoraConfig(**settings))
    with torch.no_grad():
        for place, (key, p) in enumerate(model.named_parameters()):
            if "lora_" in key:
                p.copy_(gaussian(*p.shape, seed=100 * seed + place) * 0.08)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def pair(tiny_decoder, tmp_path):
    """Two adapters of different rank, scale and modules."""
    first = saved_by_peft(tiny_decoder, tmp_path / "one", 1)
    other = {"r": 3, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]}
    return first, saved_by_peft(tiny_decoder, tmp_path / "two", 2, **other)


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return float((found - expected).abs().max() / expected.abs().max()) <= 1e-5


# Read


def test_a_folder_is_read_without_its_base_as_with_it(pair, tiny_decoder, home):
    for name, folder in zip(pair, read_folders([str(path) for path in pair]).values(), strict=True):
        expected = import_peft(name, str(tiny_decoder)).factors
        assert folder.factors.keys() == expected.keys() and folder.base == str(tiny_decoder)
        for module, f in expected.items():
            assert torch.equal(folder.factors[module].A, f.A) and torch.equal(folder.factors[module].B, f.B)
            assert folder.factors[module].scale == f.scale


def test_embeddings_are_adapters_and_saved_modules_are_named(tiny_decoder, tmp_path, home):
    settings = {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}
    (folder,) = read_folders([str(saved_by_peft(tiny_decoder, tmp_path / "a", 3, **settings))]).values()
    vocabulary, width = decoder(tiny_decoder).model.embed_tokens.weight.shape
    f = folder.factors["embed_tokens"]
    assert f.A.shape == (4, vocabulary) and f.B.shape == (width, 4)
    assert set(folder.saved) == {"lm_head.weight", "model.embed_tokens.base_layer.weight"}


def test_modules_meet_whatever_wraps_the_body():
    same = {
        "layers.3.self_attn.q_proj": ["model.layers.3.self_attn.q_proj"],
        "encoder.layer.0.attention.self.query": ["bert.encoder.layer.0.attention.self.query"],
        "h.1.attn.c_attn": ["transformer.h.1.attn.c_attn"],
        "layer.2.attention.q_lin": ["distilbert.transformer.layer.2.attention.q_lin"],
        "embed_tokens": ["model.embed_tokens"],
    }
    for expected, names in same.items():
        assert {unwrapped(name) for name in (expected, *names)} == {expected}
    other = [
        "encoder.layers.0.q_proj",
        "decoder.layers.0.q_proj",
        "vision_tower.layers.0.q_proj",
        "down_blocks.0.attn.to_q",
    ]
    assert len({unwrapped(f"model.{name}") for name in (*other, "layers.0.q_proj", "down_blocks.1.attn.to_q")}) == 6


def test_short_names_tell_folders_apart():
    assert short_names(["runs/nlu", "runs/math/"]) == ["nlu", "math"]
    assert short_names(["a/adapter", "b/adapter"]) == ["a/adapter", "b/adapter"]
    assert short_names(["x"]) == ["x"]


def rewritten(folder, change) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.popitem(), r"must have two matrices, A \(r × d_in\) and B \(d_out × r\); found"),
        (
            lambda t: t.update({"base_model.model.lora_magnitude_vector.x": torch.ones(2)}),
            "factors of plain LoRA or whole",
        ),
        (
            lambda t: t.update({"base_model.model.../../x.lora_A.weight": torch.ones(2, 2)}),
            "factors of plain LoRA or whole",
        ),
        (lambda t: t.update({"x": torch.full((2,), math.nan)}), "tensors must be finite"),
        (lambda t: t.clear(), "at least one module"),
        (
            lambda t: t.update({k.replace("model.model.", "model.", 1): v.clone() for k, v in dict(t).items()}),
            "a module must stand once in",
        ),
    ],
)
def test_bad_folders_are_refused_by_name(pair, change, said):
    rewritten(pair[0], change)
    with pytest.raises(ValueError, match=said):
        read_folders([str(pair[0])])


def test_what_is_not_lora_is_refused_by_name(pair):
    path = pair[0] / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
    with pytest.raises(ValueError, match="use_dora of a plain LoRA folder must be unset"):
        read_folders([str(pair[0])])


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"rank_pattern": {"([a-z._0-9]+)+!": 4}}, "at most three repetitions and repeat no group; found"),
        ({"rank_pattern": {".*.*.*.*!": 4}}, "at most three repetitions and repeat no group; found"),
        ({"rank_pattern": {"(": 4}}, r"patterns must be regular expressions; found '\('"),
        ({"lora_alpha": 10**400}, "lora_alpha of a plain LoRA folder must be a finite number"),
        ("[" * 200_000, "must be a file of JSON"),
    ],
)
def test_a_configuration_can_neither_hang_nor_crash_the_reader(pair, config, said):
    path = pair[0] / "adapter_config.json"
    text = config if isinstance(config, str) else json.dumps(json.loads(path.read_text()) | config)
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        read_folders([str(pair[0])])


def test_a_configuration_that_is_a_folder_is_refused(pair):
    (pair[0] / "adapter_config.json").unlink()
    (pair[0] / "adapter_config.json").mkdir()
    with pytest.raises(ValueError, match="must be a file of JSON"):
        read_folders([str(pair[0])])


def test_names_that_lead_nowhere(pair, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="must be a PEFT folder or a hub id owner/name; found './none'"):
        read_folders(["./none"])
    with pytest.raises(FileNotFoundError, match="'somebody/lora' is no folder here, and the hub cannot be reached"):
        read_folders(["somebody/lora"])
    with pytest.raises(ValueError, match="adapters must be different folders"):
        read_folders([str(pair[0]), str(pair[0])])


def test_a_hub_s_adapter_that_is_a_pickle_alone_is_refused_by_name(tmp_path, monkeypatch, home):
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "adapter_config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(tmp_path / "copy"))
    for there, found in ((True, "adapter_model.bin, a pickle file, which can run code"), (False, "found none")):
        monkeypatch.setattr("huggingface_hub.file_exists", lambda name, file, there=there: there)
        with pytest.raises(ValueError, match=f"must hold adapter_model.safetensors; .*{found}"):
            read_folders(["somebody/lora"])


def test_a_hub_id_s_cached_copy_is_read_without_a_network(pair, tiny_decoder, monkeypatch, tmp_path, home):
    """A published LoRI-S adapter is a PEFT folder whose masks are the zeros of B; this folder stands in for one."""
    commit = "ab" * 20
    repository = tmp_path / "hub" / "models--somebody--LoRI-S_math"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    rewritten(pair[0], lambda t: [v.mul_(v.abs() > 0.1) for k, v in t.items() if "lora_B" in k])
    pair[0].rename(repository / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    found = read_folders(["somebody/LoRI-S_math", str(pair[1])])
    assert list(found) == ["LoRI-S_math", "two"]
    kept = torch.cat([f.B.flatten() != 0 for f in found["LoRI-S_math"].factors.values()]).float().mean()
    assert 0.1 < kept < 0.4
    file = tmp_path / "adapter.safetensors"
    said = invoke("import", "somebody/LoRI-S_math", file, "--base", tiny_decoder)
    assert said.exit_code == 0, said.output
    back = load_adapter(file)
    for name, f in found["LoRI-S_math"].factors.items():
        assert torch.equal(back.masks[name], f.B != 0) and torch.equal(back.factors[name].B, f.B)
    refused = invoke("import", "somebody/LoRI-S_code", tmp_path / "other", "--base", tiny_decoder)
    assert refused.exit_code == 2 and "is no folder here, and the hub cannot be reached" in refused.stderr


def test_what_is_not_shared_is_said(pair, tiny_decoder):
    lines = not_shared(read_folders([str(path) for path in pair]))
    assert any(line.startswith("one: 20 of 28 modules are not in all (") for line in lines)
    assert "ranks differ: one 4, two 3" in lines
    assert any(line.startswith("scales α/r differ: one 1.5, two 3.4641") for line in lines)
    assert not any("base models" in line for line in lines)


def test_a_shared_draw_is_said_and_what_to_do_about_it(pair, tiny_decoder, tmp_path, home):
    """Bit for bit, up to rounding or scale, or padded with zeros; not of A's drawn apart."""
    one = read_folders([str(pair[0])])["one"]
    assert shared_draws(read_folders([str(path) for path in pair])) == []
    forms = {
        "bits": {m: Factors(f.A, f.B.flip(0), f.scale) for m, f in one.factors.items()},
        "turned": {m: Factors(-3 * f.A.flip(0), f.B, f.scale) for m, f in one.factors.items()},
        "within": {m: Factors(f.A[:2], f.B[:, :2], f.scale) for m, f in one.factors.items()},
    }
    for name, factors in forms.items():
        dtype = torch.bfloat16 if name == "turned" else torch.float32
        keyed = {one.keys[m]: f for m, f in factors.items()}
        other = write_peft(tmp_path / name, keyed, str(tiny_decoder), dtype=dtype)
        said = shared_draws(read_folders([str(pair[0]), str(other), str(pair[1])]))
        assert said == [
            f"A's have one row space (one and {name} in 28 modules), as a shared draw gives: "
            "--null given puts that into the null"
        ]
    words = ("overlap", pair[0], tmp_path / "bits", "--draws", 2)
    assert "note: A's have one row space (one and bits" in invoke(*words, "--out", tmp_path / "a").stdout
    given = invoke(*words, "--out", tmp_path / "b", "--null", "given")
    assert given.exit_code == 0 and "row space" not in given.stdout
    (module, f), *_ = one.factors.items()
    d_out, d_in = f.delta().shape
    whole = Factors(gaussian(d_in, d_in, seed=3), gaussian(d_out, d_in, seed=4), 1.0)
    for name in ("x", "y"):
        write_peft(tmp_path / name, {one.keys[module]: whole}, str(tiny_decoder))
    assert shared_draws(read_folders([str(tmp_path / "x"), str(tmp_path / "y")])) == [], "all of the input"


# Merged and written


@pytest.mark.parametrize("portable", [False, True])
def test_peft_reads_a_merge_as_the_sum_that_it_is(pair, tiny_decoder, tmp_path, home, portable):
    """cat is exact: peft on the merged folder computes what the base with both updates folded in computes."""
    found = read_folders([str(path) for path in pair])
    weights = [0.7, -0.4]
    merged = merge([folder.factors for folder in found.values()], weights)
    out = write_merged(tmp_path / "merged", merged, found, portable)
    model = decoder(tiny_decoder)
    modules = dict(model.named_modules())
    with torch.no_grad():
        for weight, folder in zip(weights, found.values(), strict=True):
            for module, f in folder.factors.items():
                modules[f"model.{module}"].weight.add_(weight * f.delta())
        expected = model(input_ids=TOKENS).logits
    assert close(logits_of(tiny_decoder, out), expected)
    assert not close(logits_of(tiny_decoder), expected)
    assert all(portability(out).values()) == portable


@pytest.mark.parametrize("method", [name for name in MERGE_METHODS if name not in ("cat", "linear")])
def test_peft_reads_what_every_method_makes(pair, tiny_decoder, tmp_path, home, method):
    """Of any rank, module by module; linear refuses two ranks, cat is above."""
    found = read_folders([str(path) for path in pair])
    merged = merge([folder.factors for folder in found.values()], [0.7, -0.4], method)
    out = write_merged(tmp_path / "merged", merged, found)
    model = decoder(tiny_decoder)
    modules = dict(model.named_modules())
    with torch.no_grad():
        for module, f in merged.items():
            modules[f"model.{module}"].weight.add_(f.delta())
        expected = model(input_ids=TOKENS).logits
    assert close(logits_of(tiny_decoder, out), expected)
    assert not close(logits_of(tiny_decoder), expected)


def test_a_merge_in_a_narrower_dtype(pair, tmp_path):
    found = read_folders([str(path) for path in pair])
    merged = merge([folder.factors for folder in found.values()], [0.5, 0.5])
    out = write_merged(tmp_path / "merged", merged, found, dtype=torch.bfloat16)
    (again,) = read_folders([str(out)]).values()
    assert set(again.dtypes.values()) == {(torch.bfloat16, torch.bfloat16)}
    for module, f in merged.items():
        assert torch.equal(again.factors[module].A, f.A.bfloat16().float())
        assert torch.equal(again.factors[module].B, f.B.bfloat16().float())


@pytest.mark.parametrize("method", ["tsv-m", "iso-c", "iso-cts", "core-ties"])
def test_a_merge_of_folders_in_bfloat16_has_no_direction_that_rounding_made(tiny_decoder, tmp_path, home, method):
    """The A of one is 0.3 times that of the other: they read one space, whatever bfloat16 makes of it."""
    linears = target_linears(empty_body(str(tiny_decoder)), "q_proj", 1)
    one, two = random_factors(linears, 3, 0), random_factors(linears, 3, 1)
    two = {name: Factors(0.3 * one[name].A, f.B, f.scale) for name, f in two.items()}
    ranks = {}
    for dtype in (torch.bfloat16, torch.float32):
        pair = []
        for place, factors in enumerate((one, two)):
            # what is stored in float32 has the same entries: those that bfloat16 leaves
            factors = {n: Factors(f.A.bfloat16().float(), f.B.bfloat16().float(), f.scale) for n, f in factors.items()}
            keyed = {f"model.{name}.lora_{{}}.weight": f for name, f in factors.items()}
            pair.append(write_peft(tmp_path / f"{dtype}-{place}", keyed, str(tiny_decoder), dtype=dtype))
        said = invoke("merge", *pair, "--method", method, "--out", tmp_path / f"{dtype}-merged")
        assert said.exit_code == 0, said.output
        (merged,) = read_folders([str(tmp_path / f"{dtype}-merged")]).values()
        assert set(merged.dtypes.values()) == {(torch.float32, torch.float32)}
        ranks[dtype] = {int(torch.linalg.matrix_rank(f.A, rtol=1e-5)) for f in merged.factors.values()}
    assert max(ranks[torch.bfloat16]) <= 3 and min(ranks[torch.float32]) > 3


def test_each_factor_is_stored_in_its_own_dtype(pair):
    rewritten(pair[0], lambda t: t.update({key: X.bfloat16() for key, X in t.items() if "lora_B" in key}))
    (found,) = read_folders([str(pair[0])]).values()
    assert set(found.dtypes.values()) == {(torch.float32, torch.bfloat16)}
    for name, f in found.stored.items():
        assert torch.equal(f.A, found.factors[name].A) and f.A.dtype == torch.float32
        assert torch.equal(f.B.float(), found.factors[name].B) and f.B.dtype == torch.bfloat16


def test_an_embedding_survives_a_merge_and_no_portable_folder_holds_one(tiny_decoder, tmp_path, home):
    first = saved_by_peft(tiny_decoder, tmp_path / "a", 3, target_modules=["q_proj", "embed_tokens"])
    found = read_folders([str(first)])
    merged = merge([folder.factors for folder in found.values()], [1.0])
    out = write_merged(tmp_path / "same", merged, found)
    assert close(logits_of(tiny_decoder, out), logits_of(tiny_decoder, first))
    with pytest.raises(ValueError, match="must have no adapter on an embedding; found one on embed_tokens"):
        write_merged(tmp_path / "portable", merged, found, for_serving=True)


def test_modules_go_under_the_first_folder_s_names(pair, tiny_decoder, tmp_path, home):
    """The second was wrapped without its head: its keys lack "model."; the merged folder must fit one model."""
    rewritten(pair[1], lambda t: [t.update({k.replace("model.model.model", "model.model"): t.pop(k)}) for k in list(t)])
    found = read_folders([str(pair[1]), str(pair[0])])
    out = write_merged(tmp_path / "out", merge([f.factors for f in found.values()], [1.0, 1.0]), found)
    keys = load_file(out / "adapter_model.safetensors")
    assert len(keys) == 2 * 28 and all(key.startswith("base_model.model.layers.") for key in keys)


def test_an_encoder_s_and_a_decoder_s_layers_stay_apart(tmp_path):
    """Of two halves of one model, each adapter knows its own; the merge has both under the names that they have."""
    f = {"A": torch.ones(2, 8), "B": torch.ones(8, 2)}
    halves = {"enc": ("encoder",), "both": ("encoder", "decoder")}
    for name, parts in halves.items():
        (tmp_path / name).mkdir()
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
        tensors = {
            f"base_model.model.model.{part}.layers.0.q_proj.lora_{x}.weight": f[x].clone()
            for part in parts
            for x in "AB"
        }
        save_file(tensors, tmp_path / name / "adapter_model.safetensors")
    found = read_folders([str(tmp_path / name) for name in halves])
    out = write_merged(tmp_path / "out", merge([folder.factors for folder in found.values()], [1.0, 1.0]), found)
    assert (
        load_file(out / "adapter_model.safetensors").keys()
        == load_file(tmp_path / "both" / "adapter_model.safetensors").keys()
    )


# The portable form


def test_a_portable_export_gives_the_same_logits_at_an_allowed_rank(pair, tiny_decoder, tmp_path, home):
    adapter = import_peft(pair[0], str(tiny_decoder))
    out = export_peft(adapter, tmp_path / "portable", weight=0.5, for_serving=True)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 8  # 4 is not among the allowed ones
    assert all(portability(out).values())
    half = export_peft(adapter, tmp_path / "plain", weight=0.5)
    assert close(logits_of(tiny_decoder, out), logits_of(tiny_decoder, half))
    broken = {rule for rule, kept in portability(half).items() if not kept}
    assert len(broken) == 2 and any("rank is one of 1, 8" in rule for rule in broken)


@pytest.mark.parametrize(
    ("setting", "value", "rule"),
    [
        ("lora_alpha", 16, "α is that rank, so that an engine that ignores α is right"),
        ("r", 16, "all modules have one rank, the configuration's"),
        ("use_rslora", True, "no scale by √r"),
        ("rank_pattern", {"q_proj": 8}, "no module has a rank or an α of its own"),
        ("alpha_pattern", {"q_proj": 8}, "no module has a rank or an α of its own"),
        ("bias", "all", "no bias is trained"),
        ("modules_to_save", ["lm_head"], "no whole module is saved beside"),
        ("target_modules", ["q_proj"], "target_modules names the file's modules"),
        ("use_dora", True, "it is plain LoRA"),
        ("init_lora_weights", "pissa", "it is plain LoRA"),
        ("layer_replication", [[0, 2]], "it is plain LoRA"),
        ("lora_alpha", True, "it is plain LoRA"),
        ("peft_type", ["LORA"], "it is plain LoRA"),
        ("r", [8], "all modules have one rank, the configuration's"),
    ],
)
def test_every_rule_of_the_portable_form_is_looked_at(pair, tiny_decoder, tmp_path, home, setting, value, rule):
    out = export_peft(import_peft(pair[0], str(tiny_decoder)), tmp_path / "portable", for_serving=True)
    assert portability(out)[rule]
    path = out / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {setting: value}))
    assert not portability(out)[rule]


def test_tensors_of_a_portable_folder_are_looked_at(pair, tiny_decoder, tmp_path, home):
    adapter = import_peft(pair[0], str(tiny_decoder))
    broken = {
        "every tensor is a factor of a linear module": lambda t: t.update({"base_model.model.x": torch.ones(1)}),
        "every module has A and B": lambda t: t.pop(next(iter(t))),
        "all modules have one rank, the configuration's": lambda t: t.update({next(iter(t)): torch.ones(9, 64)}),
    }
    flat = [lambda t, size=size: t.update({next(iter(t)): torch.ones(size)}) for size in ((8,), (), (8, 64, 1))]
    every = [*broken.items(), *(("every tensor is a factor of a linear module", change) for change in flat)]
    for place, (rule, change) in enumerate(every):
        out = export_peft(adapter, tmp_path / str(place), for_serving=True)
        rewritten(out, change)
        assert not portability(out)[rule], rule


def test_a_rank_that_no_engine_takes_is_refused(pair, tiny_decoder, tmp_path, home):
    found = read_folders([str(pair[0])])
    merged = {name: Factors(torch.ones(600, 64), torch.ones(64, 600), 1.0) for name in list(found["one"].factors)[:1]}
    with pytest.raises(
        ValueError, match="rank of a portable folder must be at most 512; found 600: lori-nb merge --rank cuts it"
    ):
        write_merged(tmp_path / "out", merged, found, for_serving=True)


# From the command line


def test_overlap_from_the_command_line(pair, tmp_path, home):
    said = invoke("overlap", *pair, "--out", tmp_path / "report", "--draws", 3, "--elementwise")
    assert said.exit_code == 0, said.output
    found = read_folders([str(path) for path in pair])
    one, two = (folder.factors for folder in found.values())
    assert said.stdout.startswith(f"one · two: cosine {total_cosine(one, two):.4f} (null -0.")
    assert "note: ranks differ: one 4, two 3" in said.stdout
    pairs = pd.read_csv(tmp_path / "report" / "pairs.csv").set_index("measure")
    assert set(pairs.index) == {*foreign.ALL, "total_cosine"}
    assert pairs.loc["row_overlap", "modules"] == 8 and pairs.loc["total_cosine", "null_low"] < 0
    modules = pd.read_parquet(tmp_path / "report" / "modules.parquet")
    assert len(modules) == 8 * (len(foreign.ALL) + 1)
    known = modules[modules["measure"] != "mask_overlap"]  # undefined for B of different ranks
    assert known[["value", "null", "null_low", "null_high"]].notna().all(axis=None)
    about = json.loads((tmp_path / "report" / "about.json").read_text())
    assert about["adapters"] == {name: folder.digest for name, folder in found.items()} and about["draws"] == 3
    assert about["notes"] == not_shared(found) and "ranks differ: one 4, two 3" in about["notes"]
    assert pairs.loc["row_overlap", "excess"] == pytest.approx(
        pairs.loc["row_overlap", "value"] - pairs.loc["row_overlap", "null"]
    )
    written = {path.name for path in (tmp_path / "report").iterdir()}
    maps = [f"map_{measure}" for measure in foreign.MAPPED]
    drawn = {f"{s}.{e}" for s in (*maps, "spectra", "similarity", "depth") for e in ("pdf", "svg", "png")}
    stems = [stem for stem in foreign.TABLES if stem != "functional"]  # no activations were asked for
    printed = [stem for stem in foreign.PRINTED if stem in stems]
    tables = {f"{s}.{e}" for s in stems for e in ("csv", "parquet")} | {f"{s}.tex" for s in printed}
    assert written == {"about.json"} | drawn | tables
    for stem in printed:
        rows = len(pd.read_csv(tmp_path / "report" / f"{stem}.csv"))
        assert (tmp_path / "report" / f"{stem}.tex").read_text().count(r"\\") == rows + 1


def test_overlap_on_activations_is_the_ratio_of_what_both_adapters_add(pair, tiny_decoder, tmp_path, home):
    out, tasks = tmp_path / "report", ("chain_sum", "refusal")
    said = invoke("overlap", *pair, "--out", out, "--draws", 2, "--tasks", ",".join(tasks), "--rows", 3)
    assert said.exit_code == 0, said.output
    table = pd.read_csv(out / "functional.csv").set_index(["task", "adapter"])
    assert set(table.index) == {("one", "two"), ("two", "one")} and (table["null"] > 0).all()
    found, base = read_folders([str(path) for path in pair]), load_base(str(tiny_decoder))
    for own, other, name in (("one", "two", tasks[0]), ("two", "one", tasks[1])):
        task, ratios = get_task(name), []
        rows = encode_rows(base.tokenizer, base.kind, tuple(task.rows("test", 3)), (), task.system)
        for module in found["two"].factors:  # those of both
            seen = []
            hook = base.body.get_submodule(module).register_forward_pre_hook(
                lambda _, x, seen=seen: seen.append(x[0][0])
            )
            with hook, torch.no_grad():
                for row in rows:
                    base.body(torch.tensor([row.ids]))
            x = torch.cat(seen).double()
            sizes = [(x @ found[each].factors[module].delta().double().T).norm() for each in (other, own)]
            ratios.append(float(sizes[0] / sizes[1]))
        assert table.loc[(own, other), "value"] == pytest.approx(np.mean(ratios), rel=1e-4)
        assert f"{own}'s activations: {other} moves them {np.mean(ratios):.2f} times" in said.stdout
    about = json.loads((out / "about.json").read_text())["activations"]
    assert about == {"base": str(tiny_decoder), "tasks": dict(zip(("one", "two"), tasks, strict=True)), "rows": 3}
    assert (out / "functional.png").exists()


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        (["--tasks", "chain_sum"], "--tasks must name one task an adapter, 2; found chain_sum"),
        (["--tasks", "chain_sum,gcdd"], "gcdd"),
        (["--tasks", "chain_sum,gcd", "--base", "nowhere/none"], "nowhere/none"),
        (
            ["--tasks", "chain_sum,gcd", "--base", "smollm2-135m-instruct"],
            "of the base smollm2-135m-instruct; found an",
        ),
    ],
)
def test_activations_that_cannot_be_had_are_refused_before_any_work(pair, tmp_path, home, words, refused):
    said = invoke("overlap", *pair, "--out", tmp_path / "report", *words)
    assert said.exit_code == 2 and refused in said.output and not (tmp_path / "report").exists()


def adapters_by_hand(ranks=(3, 3, 2)) -> dict[str, dict[str, Factors]]:
    """Three adapters on two kinds of module in two layers, and one on an embedding."""
    names = ["layers.0.attn.q_proj", "layers.0.attn.v_proj", "layers.1.attn.q_proj", "layers.1.attn.v_proj", "embed"]
    return {
        adapter: {m: Factors(gaussian(r, 20, seed=50 * n + p), gaussian(16, r, seed=50 * n + p + 20), 1.0)
                  for p, m in enumerate(names)}
        for n, (adapter, r) in enumerate(zip("abc", ranks, strict=True))
    }  # fmt: skip


def test_layers_kinds_and_totals_are_means_of_their_modules_and_products_sums():
    adapters = adapters_by_hand()
    found = foreign.measured(adapters, draws=4)
    of = {(r.adapter_a, r.adapter_b, r.measure, r.module): r for r in found.modules.itertuples()}
    for table, place, members in (
        (found.layers, "layer", lambda module, where: module.startswith(f"layers.{where}.")),
        (found.kinds, "kind", lambda module, where: module.endswith(where)),
    ):
        measured = {name for name in foreign.ALL if name not in foreign.ELEMENTWISE}
        assert set(table["measure"]) == measured | {"total_cosine"}
        assert set(table[place]) == ({0, 1} if place == "layer" else {"q_proj", "v_proj", "embed"})
        for row in table[table["measure"].isin(["cosine", "row_overlap", "alignment"])].itertuples():
            pair = (row.adapter_a, row.adapter_b, row.measure)
            own = [each for key, each in of.items() if key[:3] == pair and members(key[3], getattr(row, place))]
            assert len(own) == (1 if getattr(row, place) == "embed" else 2)
            assert row.value == pytest.approx(sum(each.value for each in own) / len(own))
            assert row.null == pytest.approx(sum(each.null for each in own) / len(own))
            assert row.null_low < row.null < row.null_high
        wide = table.set_index(["adapter_a", "adapter_b", "measure", place])
        for where in dict.fromkeys(table[place]):
            one, two = ({m: f for m, f in adapters[name].items() if members(m, where)} for name in "ac")
            rows = [of["a", "c", "inner_product", m] for m in one]
            for column in ("value", "null"):
                total = sum(getattr(row, column) for row in rows)
                assert wide.loc[("a", "c", "inner_product", where), column] == pytest.approx(total)
            assert wide.loc[("a", "c", "total_cosine", where), "value"] == pytest.approx(total_cosine(one, two))
            assert wide.loc[("a", "c", "total_cosine", where), "null"] == pytest.approx(
                wide.loc[("a", "c", "inner_product", where), "null"]
                / math.prod(math.sqrt(sum(norm(f) ** 2 for f in each.values())) for each in (one, two))
            )
    total = found.pairs.set_index(["adapter_a", "adapter_b", "measure"])["value"]
    assert total["a", "b", "inner_product"] == pytest.approx(
        found.modules.set_index(["adapter_a", "adapter_b", "measure"]).loc[("a", "b", "inner_product"), "value"].sum()
    )
    assert total["a", "b", "total_cosine"] == pytest.approx(total_cosine(adapters["a"], adapters["b"]))
    assert total["a", "b", "total_cosine"] != pytest.approx(total["a", "b", "cosine"], rel=1e-3), "no mean of modules"
    depth = foreign.by_place(found.modules, "row_overlap").set_index(["layer", "kind"])
    assert len(depth) == 5
    own = [each.value for key, each in of.items() if key[2:] == ("row_overlap", "layers.1.attn.v_proj")]
    assert depth.loc[(1, "v_proj"), "value"] == pytest.approx(sum(own) / 3) and len(own) == 3


def test_the_similarity_of_several_adapters_is_the_mean_of_their_curves():
    adapters = {name: {m: modules[m] for m in ("layers.0.attn.q_proj", "embed")} for name, modules in
                adapters_by_hand().items()}  # fmt: skip
    found = foreign.measured(adapters, draws=2).similarity
    value = found[found["method"] == "adapters"].set_index(["side", "i", "j"])["value"]
    curves = {"A": [], "B": []}
    for one, two in itertools.combinations(adapters.values(), 2):
        for module, f in one.items():
            for side, name in (("A", "rows"), ("B", "columns")):
                curves[side].append(similarity_curve(reduced(f), reduced(two[module]), name))
    for side, own in curves.items():
        for i, j in itertools.product(range(3), range(3)):
            with_both = [float(curve[i, j]) for curve in own if i < curve.shape[0] and j < curve.shape[1]]
            assert value[side, i + 1, j + 1] == pytest.approx(sum(with_both) / len(with_both))
    null = found[found["method"] == "random"].set_index(["side", "i", "j"])["value"]
    assert null.index.equals(value.index) and not np.allclose(null, value)


def test_a_report_overwrites_nothing_but_itself(pair, tmp_path, home):
    words = ("overlap", *pair, "--out", tmp_path / "report", "--draws", 2)
    assert invoke(*words).exit_code == invoke(*words).exit_code == 0
    rewritten(pair[0], lambda t: [v.mul_(2) for v in t.values()])  # another adapter by the same name
    refused = invoke(*words)
    assert refused.exit_code == 2 and "out must be new, empty, or hold the report of these adapters" in refused.stderr


def test_pairs_without_a_common_module_are_left_out_and_untrained_adapters_refused():
    f = Factors(gaussian(2, 8, seed=0), gaussian(6, 2, seed=1), 1.0)
    adapters = {"a": {"layers.0.q": f, "layers.0.v": f}, "q": {"layers.0.q": f}, "v": {"layers.0.v": f}}
    found = foreign.measured(adapters, draws=2)
    assert [line.partition(":")[0] for line in foreign.lines(found)] == ["a · q", "a · v"]
    with pytest.raises(ValueError, match="adapters must have at least one module in common; found none"):
        foreign.measured({name: adapters[name] for name in "qv"})
    zero = {"z": {"layers.0.q": Factors(f.A, torch.zeros(6, 2), 1.0)}}
    with pytest.raises(ValueError, match="adapters must be trained; found 'z' with ΔW = 0 in every module"):
        foreign.measured(adapters | zero)


def test_random_adapters_lie_inside_their_null(home):
    """Sizes of cosines, not signed ones, are compared: chance must not look like interference in the figures."""
    adapters = {
        name: {f"layers.{n}.q": Factors(gaussian(4, 64, seed=10 * s + n), gaussian(48, 4, seed=10 * s + n + 5), 1.0)
               for n in range(4)}
        for s, name in enumerate("abc")
    }  # fmt: skip
    pairs = foreign.measured(adapters, draws=12).pairs
    inside = (pairs["null_low"] <= pairs["value"]) & (pairs["value"] <= pairs["null_high"])
    assert inside[pairs["value"].notna()].mean() > 0.85
    sizes = pairs[pairs["measure"] == "cosine_size"]
    assert (sizes["value"] / sizes["null"]).between(0.4, 2).all()


def test_the_null_may_keep_each_adapter_s_own_A(pair, tmp_path, home):
    adapters = {name: folder.factors for name, folder in read_folders([str(path) for path in pair]).items()}
    shared = {"a": adapters["one"], "b": {m: Factors(f.A, -2 * f.B.flip(0), 1.0) for m, f in adapters["one"].items()}}
    for null, expected in (("given", 1.0), ("independent", 4 / 64)):
        row = foreign.measured(shared, null=null, draws=2).pairs.set_index("measure").loc["row_overlap"]
        assert row["value"] == pytest.approx(1) and row["null"] == pytest.approx(expected, abs=0.03)
    with pytest.raises(ValueError, match="null must be one of independent, given; found 'none'"):
        foreign.measured(adapters, null="none")


def test_merge_from_the_command_line(pair, tiny_decoder, tmp_path, home):
    out = tmp_path / "merged"
    said = invoke("merge", *pair, "--method", "knots", "--weights", "0.4,0.4", "--out", out)
    assert said.exit_code == 0 and said.stdout.strip().splitlines()[-1] == str(out), said.output
    assert not close(logits_of(tiny_decoder, out), logits_of(tiny_decoder))
    cut = invoke("merge", *pair, "--weights", "0.4", "--rank", "2", "--out", tmp_path / "cut", "--portable")
    assert cut.exit_code == 0 and cut.stdout.count("holds: ") == 11 and "BROKEN" not in cut.stdout, cut.output
    assert json.loads((tmp_path / "cut" / "adapter_config.json").read_text())["r"] == 8
    with safe_open(tmp_path / "cut" / "adapter_model.safetensors", framework="pt") as file:
        about = json.loads(file.metadata()["lori_nb"])
    digests = {name: folder.digest for name, folder in read_folders([str(path) for path in pair]).items()}
    assert about == {"merged": digests, "method": "cat", "rank": 2, "weights": [0.4, 0.4]}
    (found,) = read_folders([str(tmp_path / "cut")]).values()
    assert {int(torch.linalg.matrix_rank(f.B)) for f in found.factors.values()} == {2}


def test_merges_of_full_rank_are_cut_and_options_reach_the_method(pair, tmp_path, home):
    found = read_folders([str(path) for path in pair])
    wanted = {name: sum(len(f.factors[name].A) for f in found.values() if name in f.factors)
              for name in found["one"].factors}  # fmt: skip
    cut = invoke("merge", *pair, "--method", "dare-ties", "--out", tmp_path / "cut")
    note = "note: dare-ties has full rank, cut to the sum of the adapters' ranks in each module; --rank sets another"
    assert cut.exit_code == 0 and note in cut.stdout, cut.output
    (merged,) = read_folders([str(tmp_path / "cut")]).values()
    assert {name: len(f.A) for name, f in merged.factors.items()} == wanted and set(wanted.values()) == {4, 7}
    words = ("merge", *pair, "--method", "dare-ties", "--rank", "40", "--density", "0.7", "--seed", "3")
    other = invoke(*words, "--out", tmp_path / "other")
    assert other.exit_code == 0 and "full rank" not in other.stdout, other.output
    (merged,) = read_folders([str(tmp_path / "other")]).values()
    options = {"density": 0.7, "seed": 3}
    expected = merge([folder.stored for folder in found.values()], [1.0, 1.0], "dare-ties", 40, options)
    assert all(torch.equal(merged.factors[name].B, f.B) for name, f in expected.items())
    plain = merge([folder.stored for folder in found.values()], [1.0, 1.0], "dare-ties", 40)
    assert not any(torch.equal(f.B, plain[name].B) for name, f in expected.items())
    with safe_open(tmp_path / "other" / "adapter_model.safetensors", framework="pt") as file:
        about = json.loads(file.metadata()["lori_nb"])
    assert about["rank"] == 40 and {name: about[name] for name in options} == options


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--method", "cat", "--density", "0.5"), "options of method 'cat' must be among none; found 'density'"),
        (("--method", "ties", "--density", "0"), "density must be in (0, 1]; found 0.0"),
        (("--method", "knotts"), "method must be one of cat, "),
        (("--weights", "1,2,3"), "weights must be 2 finite numbers"),
        (("--weights", "1,one"), "weights must be numbers, one an adapter or one for all; found 'one'"),
        (("--weights", "1e39"), "factors must be finite in float32"),
        (("--method", "linear"), "ranks must be equal to add factors"),
    ],
)
def test_a_bad_merge_is_one_line_and_leaves_nothing(pair, tmp_path, home, words, said):
    result = invoke("merge", *pair, "--out", tmp_path / "out", *words)
    assert result.exit_code == 2 and said in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_merge_never_overwrites(pair, tmp_path, home):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine")
    result = invoke("merge", *pair, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "folder must be new or empty" in result.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes"]
