"""What tests of model-written programs do where the machine cannot contain them: skip with the reason, or fail.

``LORI_NB_REQUIRE_CONTAINMENT=1`` asks for the failure, on machines that are known to have the means: a test that skips
there would hide that the sandbox broke.
"""

from __future__ import annotations

import os
from typing import NoReturn

import pytest

from lori_nb.lab import sandbox

REQUIRED = "LORI_NB_REQUIRE_CONTAINMENT"


def lacking(reason: str) -> NoReturn:
    """Skip the running test with the reason; fail it where containment is required."""
    if os.environ.get(REQUIRED) == "1":
        pytest.fail(f"{REQUIRED} is 1, and {reason}")
    pytest.skip(reason)


def need_containment(means: tuple[str, ...] = sandbox.MEANS) -> None:
    """Go on only where these means contain a program."""
    if sandbox.containment(means) is None:
        named = ", ".join(means)
        lacking(f"this machine cannot contain a program by {named}: {sandbox.missing_containment(means)}")
