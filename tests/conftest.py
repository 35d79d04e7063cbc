"""Shared by all tests: one thread, tiny models on disk, and a data folder of each test's own."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from contained import need_containment
from hypothesis import settings as hypothesis_settings
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from lori_nb.lab.models import Base, load_base
from lori_nb.lab.paths import PROJECT

hypothesis_settings.register_profile("kit", deadline=None)  # no test is judged by the clock of a busy machine
hypothesis_settings.load_profile("kit")

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"  # where there is a GPU too; what is tested on it names it
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that takes longest comes first, so that no worker is left alone with it at the end."""
    items.sort(key=lambda item: item.path.name != "test_notebooks.py")


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory) -> Path:
    """A cache folder for the session; its dequantized models are the project's own: making them takes a minute."""
    folder = tmp_path_factory.mktemp("cache")
    models = PROJECT / "data" / "cache" / "models"
    models.mkdir(parents=True, exist_ok=True)
    (folder / "models").symlink_to(models)
    return folder


def home_with(cache: Path, folder: Path) -> Path:
    """A data folder with nothing in it but a link to a cache."""
    folder.mkdir()
    (folder / "cache").symlink_to(cache)
    return folder


@pytest.fixture(scope="session")
def session_home(session_cache, tmp_path_factory) -> Path:
    return home_with(session_cache, tmp_path_factory.mktemp("session") / "home")


@pytest.fixture
def home(session_cache, tmp_path, monkeypatch) -> Path:
    """``LORI_NB_HOME`` for one test: no runs in it, the session's cache."""
    folder = home_with(session_cache, tmp_path / "home")
    monkeypatch.setenv("LORI_NB_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def smollm2(session_home) -> Base:
    """The embedded decoder in float32; in bfloat16 a bound would say little."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORI_NB_HOME", str(session_home))
        return load_base("smollm2-135m-instruct", "float32")


@pytest.fixture(scope="session")
def minilm(session_home) -> Base:
    """The embedded encoder in float32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORI_NB_HOME", str(session_home))
        return load_base("all-minilm-l6-v2", "float32")


@pytest.fixture(scope="session")
def tiny_decoder(smollm2, tmp_path_factory) -> Path:
    """A folder with a random Llama of four small layers and the embedded decoder's tokenizer."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(smollm2.tokenizer),
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    return saved(LlamaForCausalLM, config, smollm2.tokenizer, tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="session")
def tiny_encoder(minilm, tmp_path_factory) -> Path:
    """A folder with a random BERT of three small layers and the embedded encoder's tokenizer."""
    config = BertConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        vocab_size=len(minilm.tokenizer),
    )
    return saved(BertModel, config, minilm.tokenizer, tmp_path_factory.mktemp("encoder"))


def saved(kind, config, tokenizer, folder: Path) -> Path:
    """The folder with a random model and a tokenizer; the same weights on every platform, unlike torch's draws."""
    model, draws = kind(config), np.random.Generator(np.random.Philox(key=0))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:  # matrices; the rest are biases of zero and norms of one
                weight.copy_(torch.from_numpy(draws.standard_normal(tuple(weight.shape), dtype=np.float32)) * 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def contained() -> None:
    """Only where model-written programs can be contained."""
    need_containment()


@pytest.fixture
def registries():
    """Whatever a test registers is gone afterwards."""
    from lori_nb.analysis.merging import MERGE_METHODS
    from lori_nb.lab.evaluation import METRICS
    from lori_nb.lab.methods import METHODS
    from lori_nb.lab.tasks.base import _TASKS
    from lori_nb.method.solvers import MOST, SOLVERS

    kept = [(registry, dict(registry)) for registry in (METHODS, _TASKS, MERGE_METHODS, METRICS, SOLVERS, MOST)]
    yield
    for registry, before in kept:
        registry.clear()
        registry.update(before)
