"""Tasks for the pool of processes: top-level functions of a module that imports next to nothing."""

import os
import signal
import time

from benchmarks.gpu.pool import Unusable


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


def pauses():
    time.sleep(15)


def writes_and_sleeps(path):
    with open(path + ".part", "w") as file:
        file.write(str(os.getpid()))
    os.rename(path + ".part", path)
    time.sleep(600)
