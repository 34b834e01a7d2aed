"""Children that end: a command under a guard, with a limit, and with all that it began.

A process that hangs in a kernel ignores signals, and one that leads a session of its own outlives whoever is killed by
group; either would keep its hold on the GPU while others are timed. So :func:`run` starts a guard, a small process of
its own session that needs nothing but the standard library, and the guard starts the command. Linux hands the guard
every orphan among its descendants (PR_SET_CHILD_SUBREAPER) and tells it when the caller dies, by whatever signal
(PR_SET_PDEATHSIG). At the limit, at the caller's death and at the command's own end it kills all descendants there are,
whatever sessions they lead. Guards may stand within guards.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TIMED_OUT = 124  # the guard's exit status when the limit is reached, as that of timeout(1)
KILL_SECONDS = 5.0  # for killed processes to be gone; one that a driver holds may stay, and nobody waits for it

_SET_DEATH_SIGNAL, _SET_CHILD_SUBREAPER = 1, 36  # of prctl(2)
_INTERRUPT_SECONDS = 20.0  # for an interrupted command to write what it has
_HEARD = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT}
_POLL_SECONDS = 0.5  # at most this long without a look, should a signal be lost


def run(command: list[str], seconds: float, *, environ: dict[str, str] | None = None, **options: Any) -> int | None:
    """Run a command to its end, or to that of its time; none of the processes that it began is left.

    Args:
        command: a program and its arguments.
        seconds: after which it is killed.
        environ: all of its environment variables; None: the caller's.
        options: of :class:`subprocess.Popen`: ``cwd``, ``stdout``, ``stderr``.
    Returns:
        The exit status, 128 and the signal where one ended it; None: its time was up.
    Raises:
        KeyboardInterrupt: the command was told, and has ended or was killed.
    """
    guard = [sys.executable, "-I", __file__, str(os.getpid()), f"{seconds:.3f}", *command]
    process = subprocess.Popen(guard, env=environ, start_new_session=True, **options)
    patience = seconds + KILL_SECONDS + 5.0  # the guard keeps the limit itself, unless it was stopped
    try:
        status = process.wait(timeout=patience)
    except subprocess.TimeoutExpired:
        return None
    except KeyboardInterrupt:  # the guard has a session of its own: the terminal told the caller alone
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_INTERRUPT_SECONDS)
        raise
    finally:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=KILL_SECONDS + 1.0)
            process.kill()
    return None if status == TIMED_OUT else status


def die_with_parent(by: int = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when its parent dies."""
    _prctl(_SET_DEATH_SIGNAL, by)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl({option}, {value}): {os.strerror(error)}")


# ----------------------------------------------------------------------------------------------------------- the guard


def _guard(parent: int, seconds: float, command: list[str]) -> int:
    end = time.monotonic() + seconds
    signal.pthread_sigmask(signal.SIG_BLOCK, _HEARD)
    _prctl(_SET_CHILD_SUBREAPER, 1)
    die_with_parent(signal.SIGTERM)
    if os.getppid() != parent:  # it died before it could be watched
        return 128 + signal.SIGTERM
    child = _start(command)
    try:
        return _watch(child, end)
    finally:
        _end_descendants()


def _start(command: list[str]) -> int:
    child = os.fork()
    if child:
        return child
    try:
        die_with_parent()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HEARD)
        os.execvp(command[0], command)
    except OSError as error:
        print(f"{command[0]}: {error}", file=sys.stderr, flush=True)
    os._exit(127)


def _watch(child: int, end: float) -> int:
    """Wait for the child's end, the limit, or the parent's death, and pass Ctrl-C on; the status to end with."""
    while True:
        status = _reap(child)
        if status is not None:
            return status
        left = end - time.monotonic()
        if left <= 0:
            return TIMED_OUT
        heard = signal.sigtimedwait(_HEARD, min(left, _POLL_SECONDS))
        if heard is not None and heard.si_signo == signal.SIGTERM:
            return 128 + signal.SIGTERM
        if heard is not None and heard.si_signo == signal.SIGINT:
            os.kill(child, signal.SIGINT)


def _reap(child: int) -> int | None:
    """Take leave of every descendant that has ended; the child's status where it is among them."""
    found = None
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            if pid == child:
                code = os.waitstatus_to_exitcode(status)
                found = code if code >= 0 else 128 - code
    return found


def _end_descendants() -> None:
    """Kill until none is left: one that forked in between left its child to this process."""
    end = time.monotonic() + KILL_SECONDS
    while descendants := descendants_of(os.getpid()):
        for pid in descendants:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > end:
            print(f"processes that would not die: {descendants}", file=sys.stderr, flush=True)
            return
        _reap(0)
        time.sleep(0.01)


def descendants_of(process: int) -> list[int]:
    """The processes that it began, and those that they began, and so on, by what ``/proc`` says now."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                # the name, in brackets, may hold anything; behind it stand the state and the parent
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found, waiting = [], [process]
    while waiting:
        of_one = children.get(waiting.pop(), [])
        found += of_one
        waiting += of_one
    return found


if __name__ == "__main__":
    sys.exit(_guard(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
