"""Ctrl-C while libraries are imported, or while Lightning tests."""

import signal
from collections.abc import Generator
from contextlib import contextmanager
from threading import current_thread, main_thread
from types import FrameType
from typing import NoReturn

from fgtrain.errors import Interrupted


@contextmanager
def ctrl_c_named() -> Generator[None]:
    """Raise `KeyboardInterrupt` whenever an error follows Ctrl-C.

    Python raises `KeyboardInterrupt` at any point, also in the middle of an import. The import then fails later with
    another error: `RecursionError`, `ImportError` or `AttributeError`. Lightning exits silently with status 1.
    """
    pressed = False

    def press(number: int, frame: FrameType | None) -> NoReturn:
        nonlocal pressed
        pressed = True
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if not callable(before) or current_thread() is not main_thread():  # nohup ignores it; only the main thread hears it
        yield
        return
    signal.signal(signal.SIGINT, press)
    try:
        yield
    except SystemExit as end:
        if pressed and end.code == 1:
            raise KeyboardInterrupt from end
        raise
    except Exception as error:
        if pressed and not isinstance(error, Interrupted):  # whose message says what was saved
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, before)
