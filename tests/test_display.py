"""Progress lines."""

from __future__ import annotations

import io

from lori_nb.study.display import Display, clock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_clock_counts_minutes():
    assert [clock(s) for s in (0, 59.9, 61, 3600)] == ["0:00", "0:59", "1:01", "60:00"]


def test_a_plain_stream_gets_one_line_and_then_the_result():
    stream = io.StringIO()
    display = Display(2, 60, stream)
    for step in range(5):
        display.update("a", "lora · chain_sum", "training", step, 5, 30)
    display.finish("a")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2  # not one a step
    assert (
        "[0/2" in lines[0]
        and "of about 1:00" in lines[0]
        and "training 0/5" in lines[0]
        and "of about 0:30" in lines[0]
    )
    assert lines[1].startswith("[1/2] lora · chain_sum  done in")


def test_a_terminal_is_rewritten_in_place():
    stream = Terminal()
    display = Display(1, 0, stream)
    display.update("a", "one", "training", 1, 2)
    display.update("a", "one", "training", 2, 2)
    assert "\x1b[1A\x1b[J" in stream.getvalue()
    assert display.finished == 0
    display.finish("a", "FAILED")
    assert "one  FAILED in" in stream.getvalue() and display.finished == 1
