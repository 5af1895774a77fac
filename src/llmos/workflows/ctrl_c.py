"""Ctrl-C: the first one lets a job stop at a step boundary, the second one breaks the step off."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stopped_by_ctrl_c(interrupt: threading.Event) -> Iterator[None]:
    """Let the first Ctrl-C of the block set `interrupt`; the second one raises KeyboardInterrupt.

    Outside of the main thread, or where someone else handles Ctrl-C, nothing is changed.
    """
    raising = signal.default_int_handler
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not raising:
        yield  # someone else decides what Ctrl-C does
        return

    def on_interrupt(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, raising)
        # not here: `set` takes a lock that the code under the handler may hold just now
        threading.Thread(target=interrupt.set).start()

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, raising)
