"""One worker: reads specs as JSON lines, carries them out, answers with JSON lines. Started by the pool."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch

from lori_nb.lab.own_code import load_extensions
from lori_nb.lab.runs import Store
from lori_nb.lab.specs import from_payload
from lori_nb.study import lifeline

SILENCE = 0.5  # seconds between two progress messages of one stage


def main(root: str) -> None:
    """Serve until standard input closes."""
    lifeline.start_lifeline()
    load_extensions()
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints goes to the log, not between the answers
    store, last = Store(Path(root)), [0.0]

    def say(**message) -> None:
        answers.write(json.dumps(message) + "\n")

    def report(stage: str, done: int, total: int) -> None:
        if done == total or time.monotonic() - last[0] > SILENCE:
            last[0] = time.monotonic()
            say(event="progress", stage=stage, done=done, total=total)

    for line in sys.stdin:
        try:
            store.get(from_payload(json.loads(line)), report)
            say(event="done")
        except Exception as error:  # noqa: BLE001 (the pool reports it and goes on with other runs)
            import traceback

            traceback.print_exc()
            say(event="failed", error=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main(sys.argv[1])
