"""A process that dies with its parent, however the parent dies."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
ORPHANED = 74
"""Exit code of a process that found its parent already gone."""


def die_with_parent(parent: int) -> None:
    """Has the kernel kill this process as soon as the thread that started it ends.

    `parent` is the pid of the process that started this one; if it has already ended, this process exits
    at once. Does nothing off Linux, where a child relies on the end of its standard input instead.

    Raises OSError when the kernel refuses.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    if libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), zero, zero, zero) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl(PR_SET_PDEATHSIG): {os.strerror(number)}")
    # If the parent ended between fork and prctl, no signal will ever come.
    if os.getppid() != parent:
        os._exit(ORPHANED)
