"""Where the members of each sample lie in uncompressed tars: a pass over the headers, no picture is read."""

from __future__ import annotations

import tarfile
from dataclasses import dataclass, field

from vlmkd.data.images import ImageRef
from vlmkd.data.shards import StrictTarInfo
from vlmkd.datasets.folders import IMAGE_SUFFIXES
from vlmkd.errors import UserError

_BUFFER = 1 << 18  # headers of small samples lie close together: one read serves dozens of them


@dataclass
class TarSample:
    """Neighbouring members of a tar that share a key."""

    shard: str
    key: str
    members: dict[str, ImageRef] = field(default_factory=dict)
    """By lower-case extension."""

    def image(self) -> ImageRef:
        for extension, member in self.members.items():
            if f".{extension}" in IMAGE_SUFFIXES:
                return member
        raise UserError(f"{self.shard}: sample {self.key} has no image; remove it or write the shard again")

    def text(self, extension: str) -> str:
        if extension not in self.members:
            raise UserError(f"{self.shard}: sample {self.key} has no {extension} member; write it again")
        try:
            return self.members[extension].read().decode("utf-8")
        except UnicodeDecodeError:
            told = f"{self.shard}: {self.key}.{extension} is not UTF-8 text; write the shard again"
            raise UserError(told) from None


def index_tar(shard: str) -> list[TarSample]:
    """The samples of a tar; a member's key is its name up to the first dot."""
    samples: list[TarSample] = []
    try:
        with (
            open(shard, "rb", buffering=_BUFFER) as stream,
            tarfile.open(fileobj=stream, mode="r:", tarinfo=StrictTarInfo) as tar,
        ):
            for info in tar:
                folder, slash, base = info.name.rpartition("/")
                stem, dot, extension = base.partition(".")
                if not info.isreg() or not dot or not stem:
                    continue
                key, extension = folder + slash + stem, extension.lower()
                if not samples or samples[-1].key != key:
                    samples.append(TarSample(shard, key))
                member = ImageRef(shard, info.offset_data, info.size, f"{key}.{extension}")
                samples[-1].members[extension] = member
    except (tarfile.TarError, OSError) as error:
        told = f"is not a whole, uncompressed tar ({error}); fetch or write it again"
        raise UserError(f"shard {shard} {told}") from None
    if not samples:
        raise UserError(f"shard {shard} holds no samples; remove it from the list")
    return samples
