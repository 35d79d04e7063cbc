"""What the hub answers when it does not give what was asked for, in words that say what to do."""

from __future__ import annotations


def refusal(what: str, name: str, error: BaseException) -> str:
    """Why a hub id gave nothing: its terms are not accepted, there is none of that name, or no hub is reached.

    Args:
        what: "base" or "adapter".
        error: what the hub's own package raised; anything that is not an answer counts as no hub.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError  # only a hub id needs them

    if isinstance(error, GatedRepoError):
        return f"{what} {name!r} is gated: accept its terms on its hub page, then log in: hf auth login"
    if isinstance(error, RepositoryNotFoundError):
        return f"{what} must be a folder or a hub id, public or open to you; the hub has no {name!r}"
    return f"{what} {name!r} is no folder here, and the hub cannot be reached ({type(error).__name__})"
