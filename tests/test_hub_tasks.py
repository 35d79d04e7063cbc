"""The hub as a source of rows: what happens without it, from its cache, and how soon one knows."""

from __future__ import annotations

import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import datasets
import huggingface_hub
import pytest

from lori_nb.lab.tasks import get_task
from lori_nb.lab.tasks.folder import HubUnreachableError, hub_is_reachable, official_rows
from lori_nb.lab.tasks.hub import offline_task_names
from lori_nb.lab.tasks.official import _DATA_SETS, _rows_from_hub, examples_from_hub

RTE_ROWS = datasets.Dataset.from_dict(
    {"sentence1": ["It rains.", "A b."], "sentence2": ["It is wet.", "C d."], "label": [0, 1]}
).cast_column("label", datasets.ClassLabel(names=["entailment", "not_entailment"]))


@pytest.fixture(autouse=True)
def plain_settings(monkeypatch):
    """The tests' own addresses are asked without a proxy, and the offline switch is off until a test sets it."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)


@pytest.fixture
def no_hub(tmp_path, monkeypatch):
    """The hub's address on a port that nobody listens on, and an empty cache."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{held.getsockname()[1]}")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.delenv("LORI_NB_DATA", raising=False)
        _rows_from_hub.cache_clear()
        yield
        _rows_from_hub.cache_clear()


@pytest.mark.parametrize("name", ["rte", "boolq"])
def test_without_a_network_the_error_is_quick_and_says_what_works(name, no_hub):
    begin = time.perf_counter()
    with pytest.raises(HubUnreachableError) as caught:
        get_task(name).rows("train", 4)
    assert time.perf_counter() - begin < 5.0, "the hub client's own retries take over 20 s"
    assert isinstance(caught.value, ConnectionError)
    data, words = _DATA_SETS[name], str(caught.value)
    assert data.hub_id in words and (data.hub_config or "") in words
    assert data.train_file in words and "LORI_NB_DATA" in words
    assert offline_task_names() and ", ".join(offline_task_names()) in words
    assert not {"rte", "gsm8k", "boolq"} & set(offline_task_names())
    assert datasets.config.HF_HUB_OFFLINE is False, "offline for that call only"


def test_a_cached_copy_serves_without_a_network(no_hub, tmp_path):
    home = tmp_path / "cache" / "nyu-mll___glue" / "rte" / "0.0.0" / "a1b2"
    home.parent.mkdir(parents=True)
    table = RTE_ROWS
    splits = {split: datasets.SplitInfo(split, num_examples=len(table)) for split in ("train", "validation")}
    for split in splits:
        builder_file = home / f"glue-{split}.arrow"
        builder_file.parent.mkdir(exist_ok=True)
        with datasets.arrow_writer.ArrowWriter(path=str(builder_file), features=table.features) as writer:
            for row in table:
                writer.write(row)
            writer.finalize()
    info = datasets.DatasetInfo(
        features=table.features,
        splits=datasets.SplitDict(splits),
        dataset_name="glue",
        config_name="rte",
        version="0.0.0",
    )
    info.write_to_directory(str(home))
    assert official_rows("rte", "train") == examples_from_hub(_DATA_SETS["rte"], table.to_dict(), "hub")


class _NotFound(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_error(404)

    def log_message(self, *ignored):
        """Keep the test's output clean."""


def test_any_answer_means_reachable_and_silence_is_given_up_in_time(monkeypatch):
    with HTTPServer(("127.0.0.1", 0), _NotFound) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert hub_is_reachable()
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        assert not hub_is_reachable(), "HF_HUB_OFFLINE=1 asks nothing"
        server.shutdown()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        begin = time.perf_counter()
        assert not hub_is_reachable(timeout=0.2)
        assert time.perf_counter() - begin < 2.0
