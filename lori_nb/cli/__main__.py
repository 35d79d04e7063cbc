"""``python -m lori_nb.cli``, as torchrun starts it."""

from lori_nb.cli import app

app()
