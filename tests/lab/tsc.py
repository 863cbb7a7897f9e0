"""How fast this machine's time stamp counter runs, which TCG shows to its guests as theirs."""

from __future__ import annotations

import ctypes
import mmap
import time

# rdtsc; shl rdx, 32; or rax, rdx; ret
CODE = bytes.fromhex("0f31 48c1e220 4809d0 c3")


def tsc_khz(over_s: float = 0.2) -> int:
    """Measured, in kHz."""
    with mmap.mmap(
        -1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    ) as page:
        page.write(CODE)
        start = ctypes.c_char.from_buffer(page)
        counter = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(start))
        ticks, began = counter(), time.monotonic_ns()
        time.sleep(over_s)
        ticks, lasted = counter() - ticks, time.monotonic_ns() - began
        del counter, start  # or the page could not be closed
    khz: int = ticks * 1_000_000 // lasted
    return khz
