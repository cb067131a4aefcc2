"""How this process gives memory back to the system: for the command line and its workers."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["hold_on_to_memory"]

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_MIB = 1 << 20


def hold_on_to_memory() -> bool:
    """Have glibc keep freed memory for the next tensors instead of giving it back at once.

    An attack frees and asks for the same activations in every step; page by page, the system then
    spends as much time on handing them out as the network on its work. For processes that are
    Feint's own, such as the command line. In others attacks do no more than free one block, which
    has much the same effect for small tensors (`feint.core.pieces.keep_freed_memory`).

    Returns:
        Whether there was a glibc to tell.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    told = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2048 * _MIB - 1), (_TOP_PAD, 64 * _MIB))
    answers = [mallopt(ctypes.c_int(option), ctypes.c_int(value)) for option, value in told]
    return all(answers)
