"""Tasks for the pool of processes: top-level functions of a module that imports next to nothing."""

import os
import signal
import time

from benchmarks.pool import Unusable


def right(value):
    return value


def process():
    return os.getpid()


def sleeps():
    time.sleep(600)


def dies():
    os.kill(os.getpid(), signal.SIGKILL)


def raises():
    raise ZeroDivisionError("of\n nought")


def ruins():
    raise Unusable(f"in {os.getpid()}")
