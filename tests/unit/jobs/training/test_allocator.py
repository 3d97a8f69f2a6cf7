"""Memory that a training step has freed is not fetched from the kernel again."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, resource, sys
from jobs.training.allocator import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
malloc, free = ctypes.CDLL(None).malloc, ctypes.CDLL(None).free
malloc.restype, free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
size = 64 * 2**20
for step in range(11):
    if step == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = malloc(size)
    ctypes.memset(block, 1, size)
    free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_the_pages_of_a_step_are_those_of_the_step_before() -> None:
    faults = {
        word: int(subprocess.check_output([sys.executable, "-c", PROGRAM, word]))
        for word in ("leave", "keep")
    }
    assert faults["keep"] < faults["leave"] / 4
