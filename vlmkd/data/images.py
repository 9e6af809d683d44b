"""Where the bytes of an image lie."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ImageRef:
    """An image file, or a stretch of bytes of an uncompressed tar."""

    path: str
    offset: int = 0
    size: int = -1
    """Bytes; -1 is the whole file."""
    key: str = ""
    """Name inside the tar."""

    def read(self) -> bytes:
        """The encoded image."""
        with open(self.path, "rb") as stream:
            stream.seek(self.offset)
            return stream.read(self.size)

    def __str__(self) -> str:
        return f"{self.path}/{self.key}" if self.key else self.path
