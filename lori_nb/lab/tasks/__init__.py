"""Tasks: rows, prompts and metrics, one file a family."""

from lori_nb.lab.tasks import code, folder, generated, refusal  # noqa: F401  (importing registers their tasks)
from lori_nb.lab.tasks.base import (
    SPLITS,
    Example,
    Task,
    expand_tasks,
    get_task,
    register,
    rows_digest,
    task,
    task_names,
)

__all__ = ["SPLITS", "Example", "Task", "expand_tasks", "get_task", "register", "rows_digest", "task", "task_names"]
