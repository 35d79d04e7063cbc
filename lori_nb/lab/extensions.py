"""What a user registers from a notebook cell or an own package counts by its source; the kit's own parts by recipe."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable


def is_own(function: Callable) -> bool:
    """Whether a function belongs to this package."""
    return function.__module__.startswith("lori_nb.")


def source_digest(functions: tuple[Callable, ...], about: str = "") -> str:
    """SHA-256 of the functions' source and of a text about them.

    Raises ValueError for a function whose source cannot be found, such as one typed at a plain Python prompt.
    """
    texts = [about]
    for function in functions:
        try:
            texts.append(inspect.getsource(function))
        except (OSError, TypeError) as error:
            raise ValueError(
                f"an extension must be a function written in a file or a notebook cell; found no source of {function!r}"
            ) from error
    return hashlib.sha256("\x1f".join(texts).encode()).hexdigest()
