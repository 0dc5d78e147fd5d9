"""Processes that are killed with signal 9, whatever they are at."""

import os
import signal
import time


def child(work):
    """A process that does some work; its number."""
    number = os.fork()
    if number == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return number


def killed_after(seconds, work):
    """Whether work was killed by signal 9 after a while, and not done before."""
    number = child(work)
    time.sleep(seconds)
    os.kill(number, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(number, 0)[1])
