"""Data sets of the Hugging Face hub, with a quick and clear answer where there is no network."""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
import huggingface_hub
from huggingface_hub import constants

from lori_nb.lab.tasks.base import get_task, task_names

REACH_TIMEOUT_S = 3.0
OFFLINE_SOURCES = ("generated", "own")


class HubUnreachableError(ConnectionError):
    """The hub did not answer and the data set is not in its local cache."""


def hub_is_reachable(timeout: float = REACH_TIMEOUT_S) -> bool:
    """Whether the hub (or the mirror that ``HF_ENDPOINT`` names) answers one request within ``timeout`` seconds.

    Any answer counts, an HTTP error too. False at once under ``HF_HUB_OFFLINE=1``. The hub's own client tries five
    more times, which took 23 s without a network before it gave up; hence this question first. Looking up the host's
    name is bounded by the system's resolver, not by ``timeout``.
    """
    if huggingface_hub.is_offline_mode():
        return False
    try:
        with urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=timeout):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError as error:
        # a certificate that only the hub's client trusts is still an answer
        return isinstance(getattr(error, "reason", error), ssl.SSLError)


def load_from_hub(hub_id: str, config: str | None, split: str, needed_files: tuple[str, ...]) -> datasets.Dataset:
    """One split of a hub data set, from the local cache where the hub does not answer.

    ``needed_files`` are the files that would stand in for it in a ``LORI_NB_DATA`` folder. Raises
    HubUnreachableError, naming the data set and what works offline, when neither hub nor cache has it.
    """
    if hub_is_reachable():
        try:
            return datasets.load_dataset(hub_id, config, split=split)
        except ConnectionError as error:
            raise HubUnreachableError(_offline_message(hub_id, config, needed_files)) from error
    try:
        with _offline():
            return datasets.load_dataset(hub_id, config, split=split)
    except (ConnectionError, FileNotFoundError, ValueError) as error:
        raise HubUnreachableError(_offline_message(hub_id, config, needed_files)) from error


def offline_task_names() -> list[str]:
    """Registered tasks whose rows need neither network nor folder, sorted."""
    return [name for name in task_names() if get_task(name).source in OFFLINE_SOURCES]


def _offline_message(hub_id: str, config: str | None, needed_files: tuple[str, ...]) -> str:
    data_set = f"{hub_id!r} ({config})" if config else repr(hub_id)
    return (
        f"data set {data_set} must come from the Hugging Face hub; found no answer from {constants.ENDPOINT} and no "
        f"copy in the local cache. Offline, these tasks work: {', '.join(offline_task_names()) or 'none registered'}; "
        f"or set LORI_NB_DATA to a folder that holds {' and '.join(needed_files)}"
    )


@contextmanager
def _offline() -> Iterator[None]:
    """``HF_HUB_OFFLINE`` for one call: datasets reads the variable at import only, and would retry for 23 s."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
