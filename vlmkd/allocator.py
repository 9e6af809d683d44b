"""How this process gets memory from the operating system."""

from __future__ import annotations

import ctypes
import platform

# Numbers of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = 2**31 - 1


def keep_freed_memory(_: int = 0) -> bool:
    """Let glibc keep freed memory for the next tensor; call it once, before the first step on a CPU.

    By default glibc maps every large tensor anew and unmaps it when it is freed, so each step pays for zeroed pages:
    measured on two cores, up to two fifths of the CPU time of a convolutional tower and a fifteenth of a ViT's. The
    process then holds on to its peak memory. Returns whether there was something to set (not on macOS, musl or Windows).
    Also a DataLoader's `worker_init_fn`: its processes each free a batch as large as the next.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_M_MMAP_MAX, 0)) and bool(libc.mallopt(_M_TRIM_THRESHOLD, _NEVER))
