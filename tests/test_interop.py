"""PEFT folders: peft gives our logits from what we export, and what we import is what peft wrote."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import gaussian, tiny_spec
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM
from typer.testing import CliRunner

from lori_nb import cli
from lori_nb.lab.interop import IMPORTED, PooledClassifier, export_peft, import_peft
from lori_nb.lab.models import _ready_folder, load_base
from lori_nb.lab.runs import Store
from lori_nb.lab.tasks import SPLITS, Example, task
from lori_nb.method.adapter_file import adapter_hash, load_adapter, save_adapter
from lori_nb.method.adapters import Adapter, Factors, attach_factors, target_linears
from lori_nb.method.masks import kept
from lori_nb.method.subspaces import random_down_projection

RANK, ALPHA = 4, 6.0  # α / r = 1.5: powers of two would hide errors of scale
TOKENS = torch.arange(3, 27).view(2, 12) * 5
WHOLE = torch.ones_like(TOKENS)
PADDED = torch.tensor([[1] * 12, [1] * 7 + [0] * 5])
PARTS = {"weight": (32,), "bias": ()}  # of a head on the tiny encoder, below its classes
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


def adapter_on(name: str, last_layers: int | None = None, extras: dict | None = None) -> Adapter:
    """An adapter whose update is about as large as the weights that it is added to."""
    base = load_base(name, "float32")
    factors = {
        module: Factors(
            random_down_projection(3, "chain_sum", module, RANK, m.in_features),
            gaussian(m.out_features, RANK, seed=place) * 0.05,
            ALPHA / RANK,
        )
        for place, (module, m) in enumerate(target_linears(base.body, last_layers=last_layers).items())
    }
    return Adapter(factors, name, base.digest, RANK, ALPHA, 3, "chain_sum", True, extras=extras or {})


@pytest.fixture
def adapter(tiny_decoder, home) -> Adapter:
    return adapter_on(str(tiny_decoder))


@pytest.fixture
def exported(adapter, tmp_path):
    return export_peft(adapter, tmp_path / "peft")


def our_logits(adapter: Adapter, tokens=TOKENS, mask=WHOLE, weight: float = 1.0) -> torch.Tensor:
    base = load_base(adapter.base, "float32")
    with torch.no_grad(), attach_factors(base.body, adapter.factors, weight):
        return base.head(base.body(input_ids=tokens, attention_mask=mask).last_hidden_state)


def decoder(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def peft_logits(model, folder, tokens=TOKENS, mask=WHOLE) -> torch.Tensor:
    with torch.no_grad():
        return PeftModel.from_pretrained(model, folder).eval()(input_ids=tokens, attention_mask=mask).logits


def relative_distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


# Out: peft's logits are ours


def test_a_llama_gives_the_same_logits_through_peft(adapter, exported):
    found = peft_logits(decoder(adapter.base), exported)
    assert relative_distance(found, our_logits(adapter)) <= 1e-5
    assert relative_distance(found, our_logits(adapter, weight=0.0)) > 0.1
    assert relative_distance(found, our_logits(adapter, weight=1.01)) > 1e-4  # so that an error of scale would be seen


def test_an_encoder_gives_the_same_task_logits_through_peft(tiny_encoder, home, tmp_path):
    name = str(tiny_encoder)
    head = {"head.rte.weight": gaussian(3, 32, seed=9), "head.rte.bias": gaussian(3, seed=10)}
    adapter = adapter_on(name, extras=head)
    folder = export_peft(adapter, tmp_path / "peft")
    body = AutoModel.from_pretrained(name, dtype=torch.float32, attn_implementation="eager")
    model = PeftModel.from_pretrained(PooledClassifier(body, 3), folder).eval()
    base = load_base(name, "float32")
    with torch.no_grad(), attach_factors(base.body, adapter.factors):
        hidden = base.body(input_ids=TOKENS, attention_mask=PADDED).last_hidden_state
        pooled = torch.stack([hidden[0].mean(0), hidden[1, :7].mean(0)])
        expected = pooled @ head["head.rte.weight"].T + head["head.rte.bias"]
        found = model(input_ids=TOKENS, attention_mask=PADDED)
    assert relative_distance(found, expected) <= 1e-5
    back = import_peft(folder, name)
    assert adapter_hash(back) == adapter_hash(adapter) and set(back.extras) == set(head)
    with pytest.warns(UserWarning, match="left out: classifier.bias, classifier.weight"):
        assert not import_peft(strangers(folder), name).extras, "whose head it is, only this kit's folders say"


def test_an_encoder_s_keys_fit_a_model_with_another_head(tiny_encoder, home, tmp_path):
    name = str(tiny_encoder)
    adapter = adapter_on(name)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # of the other head, which the folder lacks
        model = AutoModelForMaskedLM.from_pretrained(name, dtype=torch.float32, attn_implementation="eager").eval()
    with attach_factors(model.bert, adapter.factors), torch.no_grad():
        expected = model(input_ids=TOKENS, attention_mask=PADDED).logits
    found = peft_logits(model, export_peft(adapter, tmp_path / "peft"), mask=PADDED)
    assert relative_distance(found, expected) <= 1e-5


def test_the_embedded_decoder_gives_the_same_logits_through_peft(smollm2, home, tmp_path):
    adapter = adapter_on(smollm2.name, last_layers=4)
    rows = smollm2.tokenizer(["What is 17 plus 25?", "Reverse the words: red green"], return_tensors="pt", padding=True)
    expected = our_logits(adapter, rows.input_ids, rows.attention_mask)
    model = decoder(_ready_folder(smollm2.name))
    found = peft_logits(model, export_peft(adapter, tmp_path / "peft"), rows.input_ids, rows.attention_mask)
    seen = rows.attention_mask.bool()
    assert relative_distance(found[seen], expected[seen]) <= 1e-5
    bare = our_logits(adapter, rows.input_ids, rows.attention_mask, weight=0.0)
    assert relative_distance(found[seen], bare[seen]) > 0.01


def test_a_weight_scales_the_update_and_leaves_the_bits_of_the_factors(adapter, tmp_path):
    folder = export_peft(adapter, tmp_path / "peft", weight=0.4)
    found = peft_logits(decoder(adapter.base), folder)
    assert relative_distance(found, our_logits(adapter, weight=0.4)) <= 1e-5
    back = import_peft(folder, adapter.base)
    assert adapter_hash(back) == adapter_hash(adapter)
    assert {f.scale for f in back.factors.values()} == {0.4 * 1.5}


def test_modules_of_another_rank_and_scale_go_into_patterns(adapter, tmp_path):
    name = "layers.1.mlp.up_proj"
    A, B = adapter.factors[name].A, adapter.factors[name].B
    other = Factors(torch.cat([A, -A[:2]]), torch.cat([B, B[:, 2:]], dim=1), 0.7)
    mixed = replace(adapter, factors=adapter.factors | {name: other}, frozen_A=False)
    folder = export_peft(mixed, tmp_path / "peft")
    assert relative_distance(peft_logits(decoder(adapter.base), folder), our_logits(mixed)) <= 1e-5
    back = import_peft(folder, adapter.base)
    # doubles near α = 4.2 lie further apart than six times those near 0.7: the nearest quotient may miss the last bit
    assert abs(back.factors[name].scale - 0.7) <= math.ulp(0.7)
    assert all(f.scale == 1.5 for n, f in back.factors.items() if n != name)
    assert adapter_hash(back) == adapter_hash(mixed)


# And back


def test_import_gives_back_the_adapter(adapter, exported):
    back = import_peft(exported, adapter.base)
    for name, f in adapter.factors.items():
        assert torch.equal(back.factors[name].A, f.A) and torch.equal(back.factors[name].B, f.B)
        assert back.factors[name].scale == f.scale
    for field in ("base", "base_digest", "rank", "alpha", "seed", "subspace", "frozen_A"):
        assert getattr(back, field) == getattr(adapter, field), field


def test_an_A_that_no_seed_gives_is_not_called_a_draw(adapter, tmp_path):
    name, f = next(iter(adapter.factors.items()))
    trained = replace(adapter, factors=adapter.factors | {name: replace(f, A=f.A + 1e-3)}, frozen_A=False)
    back = import_peft(export_peft(trained, tmp_path / "peft"), adapter.base)
    assert not back.frozen_A and back.subspace == IMPORTED
    assert adapter_hash(back) == adapter_hash(trained) != adapter_hash(adapter)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 3, "layers.1.mlp.*": 2}, "alpha_pattern": {"q_proj": 5, "o_proj": 7}},
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_what_peft_saves_is_read_with_peft_s_logits(tiny_decoder, home, tmp_path, settings):
    config = LoraConfig(r=RANK, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM", **settings)
    model = get_peft_model(decoder(tiny_decoder), config).eval()
    with torch.no_grad():
        plain = model(input_ids=TOKENS, attention_mask=WHOLE).logits
        for place, (key, p) in enumerate(model.named_parameters()):
            if "lora_B" in key:
                p.copy_(gaussian(*p.shape, seed=place) * 0.05)
        expected = model(input_ids=TOKENS, attention_mask=WHOLE).logits
    model.save_pretrained(tmp_path / "theirs")
    back = import_peft(tmp_path / "theirs", str(tiny_decoder))
    assert relative_distance(our_logits(back), expected) <= 1e-5 < relative_distance(plain, expected)
    assert len(back.factors) == 4 * 7 and back.subspace == IMPORTED
    again = import_peft(export_peft(back, tmp_path / "again"), str(tiny_decoder))
    assert adapter_hash(again) == adapter_hash(back)
    assert all(abs(f.scale - again.factors[n].scale) <= math.ulp(f.scale) for n, f in back.factors.items())


# Under a mask


@pytest.fixture
def masked(tiny_decoder, home) -> Adapter:
    """A LoRI-S adapter as a run leaves it."""
    settings = {"sparsity": 0.9, "mask_origin": "random", "alpha": ALPHA, "steps": 5, "test_rows": 2}
    return Store().get(tiny_spec(tiny_decoder, "lori-s", **settings)).adapter


def strangers(folder: Path) -> Path:
    """The folder without what this kit notes in its header."""
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt"})
    return folder


def test_a_masked_adapter_gives_the_same_logits_through_peft_and_comes_back_with_its_masks(masked, tmp_path):
    """Masks are the zeros of B, in our own folder and in one that says nothing of its origin."""
    assert all((f.B[masked.masks[name]] != 0).all() for name, f in masked.factors.items()), "so that zeros show them"
    folder = export_peft(masked, tmp_path / "peft")
    louder = export_peft(masked, tmp_path / "loud", weight=50.0)  # as trained for five steps, the update is small
    for each, weight in ((folder, 1.0), (louder, 50.0)):
        found = peft_logits(decoder(masked.base), each)
        assert relative_distance(found, our_logits(masked, weight=weight)) <= 1e-5
    assert relative_distance(found, our_logits(masked, weight=0.0)) > 1e-2
    for back in (import_peft(folder, masked.base), import_peft(strangers(folder), masked.base)):
        assert adapter_hash(back) == adapter_hash(masked)
        assert all(torch.equal(back.masks[name], mask) for name, mask in masked.masks.items())
        save_adapter(back, tmp_path / "back.safetensors")
        again = load_adapter(tmp_path / "back.safetensors")
        assert adapter_hash(again) == adapter_hash(masked) and kept(again.masks) == kept(masked.masks)


def test_a_kept_entry_that_is_zero_cannot_be_told_from_one_off_the_mask(masked, tmp_path):
    name, f = next(iter(masked.factors.items()))
    B, place = f.B.clone(), tuple(masked.masks[name].nonzero()[0])
    B[place] = 0.0
    adapter = replace(masked, factors=masked.factors | {name: replace(f, B=B)})
    back = import_peft(export_peft(adapter, tmp_path / "peft"), masked.base)
    assert adapter_hash(back) == adapter_hash(adapter)
    assert masked.masks[name][place] and not back.masks[name][place]
    assert kept(back.masks) == kept(masked.masks) - 1


def test_a_dense_adapter_comes_back_without_masks(adapter, tmp_path):
    """Zeros in a dense B are no mask where this kit says so, and a whole module of zeros is none in any folder."""
    name, f = next(iter(adapter.factors.items()))
    partly, untrained = f.B.clone(), torch.zeros_like(f.B)
    partly[0] = 0.0
    cases = [(partly, False, False), (partly, True, True), (untrained, True, False), (f.B, True, False)]
    for place, (B, foreign, shown) in enumerate(cases):
        changed = replace(adapter, factors=adapter.factors | {name: replace(f, B=B)})
        folder = export_peft(changed, tmp_path / str(place))
        back = import_peft(strangers(folder) if foreign else folder, adapter.base)
        assert (back.masks is not None) == shown
        assert adapter_hash(back) == adapter_hash(changed)


# Narrower than float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("for_serving", [False, True])
def test_a_narrower_folder_holds_the_rounded_factors(adapter, tmp_path, dtype, for_serving):
    """peft reads it, and it comes back as the rounded numbers; an A that was rounded is no draw any more."""
    folder = export_peft(adapter, tmp_path / "peft", for_serving=for_serving, dtype=dtype)
    assert {t.dtype for t in load_file(folder / "adapter_model.safetensors").values()} == {dtype}
    back = import_peft(folder, adapter.base)
    assert not back.frozen_A and back.subspace == IMPORTED
    for name, f in adapter.factors.items():
        B = f.B * f.scale if for_serving else f.B
        assert torch.equal(back.factors[name].A[:RANK], f.A.to(dtype).float())
        assert torch.equal(back.factors[name].B[:, :RANK], B.to(dtype).float())
        assert not torch.equal(back.factors[name].A[:RANK], f.A)
    model = PeftModel.from_pretrained(decoder(adapter.base), folder, autocast_adapter_dtype=True).eval()
    with torch.no_grad():
        found = model(input_ids=TOKENS, attention_mask=WHOLE).logits
    assert relative_distance(found, our_logits(back)) <= 1e-5
    assert relative_distance(found, our_logits(adapter)) > 1e-5


def test_what_a_narrower_folder_cannot_hold_is_refused(adapter, tmp_path):
    name, f = next(iter(adapter.factors.items()))
    large = replace(adapter, factors=adapter.factors | {name: replace(f, B=f.B + 1e5)})
    with pytest.raises(ValueError, match="factors must be finite in float16; found NaN or infinity in 'base_model"):
        export_peft(large, tmp_path / "peft", dtype=torch.float16)
    with pytest.raises(ValueError, match="dtype must be one of torch.float32, torch.bfloat16, .*; found torch.float64"):
        export_peft(adapter, tmp_path / "peft", dtype=torch.float64)
    assert not (tmp_path / "peft").exists()


def test_an_adapter_of_another_base_is_read_with_a_warning(adapter, tmp_path):
    folder = export_peft(replace(adapter, base_digest="another"), tmp_path / "peft")
    with pytest.warns(UserWarning, match="trained on another base"):
        import_peft(folder, adapter.base)


# What is refused


def test_a_folder_with_something_in_it_is_left_alone(adapter, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    with pytest.raises(ValueError, match="folder must be new or empty"):
        export_peft(adapter, tmp_path / "full")
    (tmp_path / "empty").mkdir()
    export_peft(adapter, tmp_path / "empty")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "home") == ["empty", "full"]
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["notes"]


def test_a_failed_export_leaves_nothing(adapter, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lori_nb.lab.peft_writing.os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        export_peft(adapter, tmp_path / "peft")
    assert [p.name for p in tmp_path.iterdir() if p.name != "home"] == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"extras": {"magnitude.layers.0.mlp.up_proj": torch.ones(2)}}, "low-rank factors and heads alone"),
        ({"factors": {"lm_head": Factors(torch.ones(1, 2), torch.ones(2, 1), 1.0)}}, "a linear module of LlamaModel"),
        ({"factors": {"layers.0.mlp.up_proj": Factors(torch.ones(1, 2), torch.ones(2, 1), 1.0)}}, "must have shapes"),
    ],
)
def test_an_adapter_that_is_no_lora_of_its_base_is_not_exported(adapter, tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        export_peft(replace(adapter, **changes), tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def test_one_of_several_heads_must_be_named(tiny_encoder, home, tmp_path):
    heads = {f"head.{task}.{part}": torch.ones(2, *rest) for task in ("rte", "sst2") for part, rest in PARTS.items()}
    adapter = adapter_on(str(tiny_encoder), extras=heads)
    with pytest.raises(ValueError, match=r"head must be one of the adapter's \(rte, sst2\); found None"):
        export_peft(adapter, tmp_path / "peft")
    back = import_peft(export_peft(adapter, tmp_path / "peft", head="sst2"), adapter.base)
    assert sorted(back.extras) == ["head.sst2.bias", "head.sst2.weight"]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("peft_type", "LOHA"),
        ("use_dora", True),
        ("bias", "all"),
        ("lora_bias", True),
        ("init_lora_weights", "pissa"),
        ("layer_replication", [[0, 2]]),
        ("a_setting_of_tomorrow", 1),
        ("r", 0),
        ("r", 4.0),
        ("lora_alpha", "6"),
        ("lora_alpha", float("inf")),
        ("rank_pattern", {"q_proj": None}),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(adapter, exported, setting, value):
    path = exported / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {setting: value}))
    with pytest.raises(ValueError, match=f"{setting} of a plain LoRA folder must be"):
        import_peft(exported, adapter.base)


def rewritten(folder, change) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


EMBEDDED = "base_model.model.model.embed_tokens.lora_embedding_{}"
SHORT = FIRST.replace("model.model.model", "model.model")


def rename(old: str, new: str):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(FIRST.format("B")), r"must have two matrices, A .* and B .*; found {'A'"),
        (lambda t: t.pop(FIRST.format("A")), r"must have two matrices, A .* and B .*; found {'B'"),
        (lambda t: t[FIRST.format("A")].mul_(float("nan")), "tensors must be finite"),
        (lambda t: t[FIRST.format("B")].fill_(float("inf")), "tensors must be finite"),
        (lambda t: t.update({FIRST.format("A"): torch.ones(RANK, 63)}), "must have shapes"),
        (lambda t: t.update({FIRST.format("A"): torch.ones(5, 64), FIRST.format("B"): torch.ones(64, 5)}), "the rank"),
        (lambda t: t.update({FIRST.format("A"): torch.ones(64)}), "two matrices"),
        (lambda t: t.update({FIRST.format("A"): torch.ones(RANK, 64, dtype=torch.int64)}), "must be float32, float16"),
        (rename(FIRST.format("A"), "base_model.model.../../x.lora_A.weight"), "factors of plain LoRA or whole"),
        (rename(FIRST.format("A"), "/etc/x.lora_A.weight"), "factors of plain LoRA or whole"),
        (
            lambda t: (t.clear(), t.update({EMBEDDED.format(part): torch.ones(2, 2) for part in "AB"})),
            "must sit on a linear module to be imported; found model.embed_tokens",
        ),
        (lambda t: t.update({SHORT.format(part): t[FIRST.format(part)].clone() for part in "AB"}), "stand once"),
        (lambda t: t.clear(), "at least one module"),
    ],
)
def test_bad_tensors_are_refused(adapter, exported, change, said):
    rewritten(exported, change)
    with pytest.raises(ValueError, match=said):
        import_peft(exported, adapter.base)


def test_somebody_else_s_heads_and_embeddings_are_left_out_by_name(adapter, exported, tmp_path):
    plain = import_peft(exported, adapter.base)
    others = {EMBEDDED.format(part): torch.ones(2, 2) for part in "AB"}
    others |= {"base_model.model.score.weight": torch.ones(2)}
    rewritten(exported, lambda tensors: tensors.update(others))
    path = exported / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"modules_to_save": ["score"]}))
    with pytest.warns(UserWarning, match="only linear modules are read; left out: model.embed_tokens, score.weight"):
        back = import_peft(exported, adapter.base)
    assert back.factors.keys() == plain.factors.keys() and not back.extras
    for name, f in back.factors.items():
        assert torch.equal(f.B, plain.factors[name].B) and torch.equal(f.A, plain.factors[name].A)
    command = ["import", str(exported), str(tmp_path / "file"), "--base", adapter.base]
    said = CliRunner().invoke(cli.app, command)
    assert said.exit_code == 0 and said.stdout.startswith("note: ") and "left out: model.embed_tokens" in said.stdout
    assert load_adapter(tmp_path / "file").factors.keys() == plain.factors.keys()


def test_a_module_that_the_base_lacks_is_refused(adapter, exported):
    for part in "AB":
        rewritten(exported, rename(FIRST.format(part), f"base_model.model.lm_head.lora_{part}.weight"))
    with pytest.raises(ValueError, match="adapter module must be a linear module of LlamaModel; found 'lm_head'"):
        import_peft(exported, adapter.base)


def test_files_that_are_cut_or_lie_about_sizes_are_refused(adapter, exported):
    path = exported / "adapter_model.safetensors"
    whole = path.read_bytes()
    longer = whole.replace(b'"shape":[4,64]', b'"shape":[9,64]', 1)
    assert longer != whole
    huge = (2**40).to_bytes(8, "little") + whole[8:]
    for damaged in (whole[:-5], whole[:20], b"", longer, huge):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="must be a whole safetensors file"):
            import_peft(exported, adapter.base)


def test_pickles_are_never_read(adapter, exported):
    (exported / "adapter_model.safetensors").rename(exported / "adapter_model.bin")
    with pytest.raises(ValueError, match="a pickle file, which can run code"):
        import_peft(exported, adapter.base)


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_a_folder_without_a_configuration_is_refused(adapter, exported, text):
    path = exported / "adapter_config.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(ValueError, match="adapter_config.json"):
        import_peft(exported, adapter.base)


# From the command line


def test_export_and_import_from_the_command_line(tiny_decoder, home, tmp_path):
    run = Store().get(tiny_spec(tiny_decoder, "lori-d", alpha=ALPHA, steps=2, test_rows=2))
    folder, file = tmp_path / "peft", tmp_path / "back" / "adapter.safetensors"
    said = CliRunner().invoke(cli.app, ["export", run.hash[:8], str(folder)])
    assert said.exit_code == 0 and said.stdout.strip() == str(folder)
    said = CliRunner().invoke(cli.app, ["import", str(folder), str(file), "--base", str(tiny_decoder)])
    assert said.exit_code == 0, said.output
    assert adapter_hash(load_adapter(file)) == adapter_hash(run.adapter)
    refused = CliRunner().invoke(cli.app, ["import", str(folder), str(file), "--base", str(tiny_decoder)])
    assert refused.exit_code == 2 and "FILE must be new" in refused.stderr


def test_a_portable_export_says_which_head_it_leaves_out(tiny_encoder, tiny_decoder, registries, home, tmp_path):
    @task("odd-length", domain="x", metric="accuracy", licence="own", labels=("even", "odd"), reads="encoder")
    def rows(split: str):
        start = 40 * SPLITS.index(split)
        return [Example(f"word {start + i}", ("even", "odd")[i % 2], target=i % 2) for i in range(40)]

    shared = {"steps": 2, "test_rows": 2}
    encoder = Store().get(tiny_spec(tiny_encoder, tasks=[rows.name], **shared))
    note = "note: a portable folder has no head; left out: odd-length"
    for number, (run, portable, said_so) in enumerate(
        [(encoder, True, True), (encoder, False, False), (Store().get(tiny_spec(tiny_decoder, **shared)), True, False)]
    ):
        words = ["export", run.hash, str(tmp_path / str(number)), *(["--portable"] if portable else [])]
        said = CliRunner().invoke(cli.app, words)
        assert said.exit_code == 0 and (note in said.stdout) == said_so, said.output


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_narrower_files_from_the_command_line(tiny_decoder, home, tmp_path, name):
    """Out to a folder and in to an adapter file: rounded once, and then the same bits."""
    run = Store().get(tiny_spec(tiny_decoder, "lora", alpha=ALPHA, steps=2, test_rows=2))
    folder, files, dtype = tmp_path / "peft", (tmp_path / "a", tmp_path / "b"), getattr(torch, name)
    said = CliRunner().invoke(cli.app, ["export", run.hash, str(folder), "--dtype", name])
    assert said.exit_code == 0, said.output
    assert {t.dtype for t in load_file(folder / "adapter_model.safetensors").values()} == {dtype}
    for file, more in zip(files, ([], ["--dtype", name]), strict=True):
        said = CliRunner().invoke(cli.app, ["import", str(folder), str(file), "--base", str(tiny_decoder), *more])
        assert said.exit_code == 0, said.output
        back = load_adapter(file)
        for module, f in run.adapter.factors.items():
            assert torch.equal(back.factors[module].A, f.A.to(dtype).float())
            assert torch.equal(back.factors[module].B, f.B.to(dtype).float())
    assert files[1].stat().st_size < 0.7 * files[0].stat().st_size
    refused = CliRunner().invoke(cli.app, ["export", run.hash, str(tmp_path / "x"), "--dtype", "int8"])
    assert refused.exit_code == 2 and "--dtype must be one of float32, bfloat16, float16; found" in refused.stderr
