"""The kernel of an executed notebook: IPython's own, on a lifeline from its first moment on."""

from __future__ import annotations

from ipykernel.kernelapp import launch_new_instance

from lori_nb.study.lifeline import start_lifeline

# ipykernel watches its parent too, and would end before the lifeline has ended what the cells had started. It does not
# watch a parent called 1.
UNWATCHED = 1

if __name__ == "__main__":
    start_lifeline()
    launch_new_instance(parent_handle=UNWATCHED)
