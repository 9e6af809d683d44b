"""The writer of teacher outputs for shards, which the tools that embed share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from vlmkd.data.samples import BadSample
from vlmkd.data.shards import read_shard, shard_name
from vlmkd.data.teacher_outputs import Samples, Writer
from vlmkd.errors import UserError


class ShardWriter(Writer):
    """Fills a folder with what `embed` says of the samples that `make` makes of raw samples of shards."""

    def shards(
        self, shards: Sequence[str], members: frozenset[str] | None = None, shard_cache: str = ""
    ) -> Counter[str]:
        """Samples of shards, a file each; `members` and `shard_cache` as in `read_shard`."""
        names = [shard_name(url) for url in shards]
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise UserError(
                f"the list of shards names {twice[0]}.tar {names.count(twice[0])} times; a folder needs distinct file names"
            )
        self.start()
        todo = [
            (name, f"shard {number}/{len(shards)} {name}", self._of_shard(url, members, shard_cache))
            for number, (name, url) in enumerate(zip(names, shards, strict=True), 1)
            if not (self.folder / f"{name}.safetensors").is_file()
        ]
        return self.write(todo)

    def _of_shard(self, url: str, members: frozenset[str] | None, shard_cache: str) -> Samples:
        for raw in read_shard(url, members, shard_cache=shard_cache):
            if raw.reason == "broken_tar":
                raise UserError(f"shard {raw.detail} is broken; fetch it again, or leave it out of the list")
            try:
                yield self.make(raw)
            except BadSample as bad:
                yield bad
