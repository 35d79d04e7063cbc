"""Base models: found without importing, known by digest, counted without memory, refused in plain words."""

from __future__ import annotations

import hashlib
import shutil
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch

from lori_nb.lab.models import (
    PACKAGED,
    BaseModelError,
    base_digest,
    base_kind,
    empty_body,
    load_base,
    locate,
    packaged_file,
    resolve_dtype,
)
from lori_nb.method.adapters import target_linears
from lori_nb.method.masks import kept_of


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_weights(name, home):
    where, (file,) = locate(name)
    assert where == "package"
    assert file == packaged_file(name)
    inner = hashlib.sha256(file.read_bytes()).hexdigest()
    assert base_digest(name) == hashlib.sha256(inner.encode()).hexdigest()


def test_the_decoder_is_frozen_and_split_into_body_and_head(smollm2):
    assert smollm2.kind == "decoder"
    assert smollm2.width == 576
    assert len(smollm2.body.layers) == 30
    assert smollm2.head.weight is smollm2.body.embed_tokens.weight  # tied
    for module in (smollm2.body, smollm2.head):
        assert not any(p.requires_grad for p in module.parameters())
        assert not any(m.training for m in module.modules())


def test_the_decoder_s_weights_are_those_of_the_gguf_file(smollm2):
    tensors = {t.name: t for t in gguf.GGUFReader(packaged_file("smollm2-135m-instruct")).tensors}
    for stored, module in (("blk.3.ffn_up", "layers.3.mlp.up_proj"), ("blk.29.ffn_down", "layers.29.mlp.down_proj")):
        tensor = tensors[f"{stored}.weight"]
        expected = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        assert np.array_equal(smollm2.body.get_submodule(module).weight.numpy(), expected)


def test_the_encoder(minilm):
    assert minilm.kind == "encoder"
    assert minilm.head is None
    assert minilm.width == 384


def test_a_folder_of_one_s_own(tiny_decoder, tiny_encoder, home):
    assert base_kind(str(tiny_decoder)) == "decoder"
    assert base_kind(str(tiny_encoder)) == "encoder"
    base = load_base(str(tiny_decoder), "bfloat16")
    assert base.dtype == base.body.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert base.digest == base_digest(str(tiny_decoder))


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_the_digest_follows_every_file_that_decides(file, tiny_decoder, home, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(tiny_decoder, folder)
    before = base_digest(str(folder))
    assert before == base_digest(str(tiny_decoder))
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert base_digest(str(folder)) != before
    (folder / file).write_bytes(content)
    assert base_digest(str(folder)) == before


def test_folders_that_are_no_model(tiny_decoder, home, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(
        BaseModelError, match=r"must hold config.json and weights; .*empty has no weights \(\*.safetensors"
    ):
        load_base(str(empty))
    shutil.copy(tiny_decoder / "model.safetensors", empty)
    with pytest.raises(BaseModelError, match="must hold config.json and weights; .*empty has no config.json"):
        load_base(str(empty))
    (empty / "config.json").write_text("{}")
    with pytest.raises(BaseModelError, match="empty' must be a model and tokenizer that transformers can load; found"):
        load_base(str(empty))


@pytest.mark.parametrize("name", ["smollm", "/no/such/folder", "./model", "a/b/c"])
def test_unknown_names(name, home):
    with pytest.raises(BaseModelError, match="must be one of smollm2-135m-instruct, .*, a folder .*, or a hub id"):
        load_base(name)


def test_a_hub_id_without_a_network_names_what_works(home, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    words = "hub cannot be reached .*these work: smollm2-135m-instruct, all-minilm-l6-v2, or a folder with config.json"
    with pytest.raises(BaseModelError, match=words):
        base_digest("somebody/some-model")


@contextmanager
def hub_that_answers(monkeypatch, code: str):
    """A server in the hub's place that refuses every request with one of the hub's own error codes."""

    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802 (the name that http.server looks for)
            self.send_response(404 if code == "RepoNotFound" else 403)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield
        server.shutdown()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("RepoNotFound", "base must be a folder or a hub id, .* the hub has no 'somebody/some-model'"),
        ("GatedRepo", "'somebody/some-model' is gated: accept its terms .* hf auth login"),
    ],
)
def test_a_hub_that_refuses_is_not_called_unreachable(home, monkeypatch, code, words):
    with hub_that_answers(monkeypatch, code), pytest.raises(BaseModelError, match=words):
        base_digest("somebody/some-model")


def test_without_a_network_the_cached_commit_of_a_hub_model_counts(home, monkeypatch, tmp_path):
    commit = "0123456789abcdef" * 2 + "01234567"
    repository = tmp_path / "models--somebody--some-model"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert base_digest("somebody/some-model") == f"hub:{commit}"
    with pytest.raises(BaseModelError, match="hub cannot be reached"):
        base_digest("somebody/another-model")


def test_parameters_of_large_models_are_counted_without_memory(home):
    """Llama-3-8B, rank 32, all linear layers: the counts of the LoRI paper."""
    body = empty_body("meta-llama/Meta-Llama-3-8B")
    assert next(body.parameters()).device.type == "meta"
    linears = target_linears(body).values()
    dense_B = sum(32 * m.out_features for m in linears)
    assert sum(32 * (m.in_features + m.out_features) for m in linears) == 83_886_080
    assert dense_B == 44_040_192
    assert kept_of(dense_B, 0.9) == 4_404_019


def test_known_architectures_agree_with_the_embedded_one(smollm2, home):
    known = {n: tuple(p.shape) for n, p in empty_body("HuggingFaceTB/SmolLM2-135M-Instruct").named_parameters()}
    assert known == {name: tuple(p.shape) for name, p in smollm2.body.named_parameters()}


def test_dtypes():
    assert resolve_dtype("float32") == "float32"
    assert resolve_dtype("auto", "cpu") in ("float32", "bfloat16")
    assert resolve_dtype("auto", "mps") == resolve_dtype("auto", "cpu")
    with pytest.raises(ValueError, match="dtype must be auto, float32 or bfloat16; found 'half'"):
        resolve_dtype("half")
