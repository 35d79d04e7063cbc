"""Tasks read from a folder (``LORI_NB_DATA``) or loaded from the hub, one module a family.

A folder holds the files under the names that each task's ``DataSet`` gives, such as ``glue/RTE/train.tsv``.
"""

from __future__ import annotations

from lori_nb.lab.tasks import commonsense, glue, mathematics, safety_sets  # noqa: F401  (importing registers the tasks)
from lori_nb.lab.tasks.hub import HubUnreachableError, hub_is_reachable
from lori_nb.lab.tasks.official import official_rows
from lori_nb.lab.tasks.reading import source_folder

__all__ = ["HubUnreachableError", "source_folder", "hub_is_reachable", "official_rows"]
