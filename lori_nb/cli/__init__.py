"""The command line, ``lori-nb``.

- ``studies``: study, train, sweep, tune, measure, publish, doctor
- ``adapters``: export, import, overlap, merge
- ``runs``: list, show, verify, clean

Heavy imports stand inside the commands, so that ``--help`` and a misspelt parameter are answered at once.
"""

from lori_nb.cli import adapters, runs, studies  # noqa: F401  (importing registers their commands)
from lori_nb.cli.options import app

__all__ = ["app"]
