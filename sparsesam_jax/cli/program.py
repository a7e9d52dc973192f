"""Runs a command line: exit codes, one line for what is wrong, and how it ends when interrupted."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence

from sparsesam_jax.checkpoints import atomic

INTERRUPTED = 130
_PATIENCE_S = 1.0  # that the main thread has for its own handler


def run(module: str, args: Sequence[str] | None, program: str) -> int:
    """Run a command and return its exit code: 2 for wrong input, which is said in one line.

    Args:
        module: Where the commands are, as `app`. Imported here, because that takes a moment in
            which the process may be interrupted already.
        args: What follows the program's name. None takes the process's own and makes it the
            program, which SIGINT ends with 130.
        program: Its name, for help texts.
    """
    if args is None:
        _end_when_interrupted()
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be no text
        args = sys.argv[1:]
    import typer

    app: typer.Typer = importlib.import_module(module).app
    try:
        return app(args=[*args], prog_name=program, standalone_mode=False) or 0
    except typer.TyperException as error:
        message = error.format_message()
    except (ValueError, OverflowError, OSError, ModuleNotFoundError) as error:
        message = str(error)
    text = " ".join(message.split()).encode("utf-8", "backslashreplace").decode()
    typer.echo(f"error: {text}", err=True)
    return 2


def _end_when_interrupted() -> None:
    """Let SIGINT end the process with exit code 130 and no partial file, whatever it is doing.

    Python's own KeyboardInterrupt will not do: callbacks swallow it, and an interpreter that is
    taken down beside the compiler's threads may crash. So the handler ends the process. Handlers
    run between two of Python's instructions, so not while the compiler runs: a thread that the
    signal wakes ends the process then.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's background jobs have it
        return
    waking, woken = socket.socketpair()
    waking.setblocking(False)
    signal.signal(signal.SIGINT, _end)
    signal.set_wakeup_fd(waking.detach(), warn_on_full_buffer=False)
    threading.Thread(target=_end_when_woken, args=(woken,), daemon=True).start()


def _end_when_woken(woken: socket.socket) -> None:
    while woken.recv(1) != bytes([signal.SIGINT]):
        pass
    time.sleep(_PATIENCE_S)
    _end()


def _end(*_: object) -> None:
    for path in tuple(atomic.unfinished):
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
    show_cursor = b"\x1b[?25h" if os.isatty(2) else b""  # which progress bars hide
    with contextlib.suppress(OSError):
        os.write(2, show_cursor + b"interrupted\n")
    os._exit(INTERRUPTED)
