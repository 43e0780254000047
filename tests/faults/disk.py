"""A disk that fills at a chosen byte, whoever runs the test."""

from __future__ import annotations

import builtins
import errno
import io
import os

REAL_OPEN = builtins.open


class FullDisk:
    """Files written from now on share so many bytes of room; then the disk is full."""

    def __init__(self, room: int) -> None:
        self.room = room

    def open(self, file, mode="r", *args, **kwargs):
        """In the place of Python's `open`."""
        if mode != "wb":
            return REAL_OPEN(file, mode, *args, **kwargs)
        disk = self

        class File(io.FileIO):
            def write(self, data) -> int:
                fits = min(len(data), disk.room)
                disk.room -= super().write(memoryview(data)[:fits])
                if fits < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return fits

        return File(file, "w")
