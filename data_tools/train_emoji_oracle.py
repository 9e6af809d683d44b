r"""Train the strong emoji teacher's heads and store its embeddings: what the nano teacher is distilled from.

    python data_tools/train_emoji_oracle.py --out CACHE_FOLDER --crops 3 --crop-scale 0.6 1.0 --threads 2

The teacher is pretrained EfficientNet-Lite0 (images) and MiniLM (texts), both from installed packages, joined by two
small heads that are trained here on the training shards alone. The heads go to OUT/heads.safetensors, the embeddings
of every training image (several crops) and caption beside them, as a teacher cache for `data.sources.N.teacher_caches`.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import save_file
from torch import Tensor

from vlmkd.allocator import keep_freed_memory
from vlmkd.config import DataConfig
from vlmkd.data.samples import Encoded, checked_size, members, unpack, views_of
from vlmkd.data.shards import read_shard
from vlmkd.data.teacher_cache import embed_shards
from vlmkd.data.transforms import ViewConfig, normalise
from vlmkd.datasets.emoji.cache import resolve
from vlmkd.errors import UserError, at_least, run_tool
from vlmkd.models.emoji_oracle import EmojiOracle, Heads, load_oracle, train_heads
from vlmkd.train.metrics import duration
from vlmkd.zoo import sha256_of

HEADS = "heads.safetensors"
_BATCH = 64


def features(oracle: EmojiOracle, shards: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Backbone features of whole training images [M, 1280], of distinct captions [N, 384], and each image's caption [M]."""
    whole = ViewConfig((1.0, 1.0), (1.0, 1.0), 0.0, 0.0)
    data = DataConfig()
    pixels: list[Tensor] = []
    images: list[Tensor] = []
    captions: dict[str, int] = {}
    ids: list[int] = []
    begin = time.monotonic()
    for number, shard in enumerate(shards, 1):
        for raw in read_shard(shard, members(data)):
            encoded = unpack(raw, data.image_keys, data.text_key)
            if not isinstance(encoded, Encoded):
                raise UserError(
                    f"shard {shard}: {encoded.name} {encoded.reason}; delete the emoji cache to build it again"
                )
            size = checked_size(encoded.image, data.max_pixels)
            view = whole.draw(*size, random.Random(0))
            pixels.append(views_of(encoded.image, size, [view], [oracle.image_spec])[0][0])
            ids.append(captions.setdefault(encoded.text, len(captions)))
            if len(pixels) == _BATCH:
                images.append(_run(oracle, pixels))
                pixels = []
        spent = time.monotonic() - begin
        print(
            f"features: shard {number}/{len(shards)}, ETA {duration(spent / number * (len(shards) - number))}",
            flush=True,
        )
    if pixels:
        images.append(_run(oracle, pixels))
    print(f"features of {len(captions)} captions", flush=True)
    return torch.cat(images), oracle.language(list(captions)), torch.tensor(ids)


def _run(oracle: EmojiOracle, pixels: list[Tensor]) -> Tensor:
    batch = normalise(pixels, oracle.image_spec).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        return oracle.vision(batch).float()


def main(argv: list[str]) -> int:
    """Run the tool; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", required=True, type=Path, help="folder of the heads and of the teacher cache"
    )
    parser.add_argument("--crops", type=int, default=3, help="views per image; 0 makes the heads alone")
    parser.add_argument("--crop-scale", type=float, nargs=2, default=[0.6, 1.0], help="as data.crop_scale")
    parser.add_argument("--flip", type=float, default=0.0, help="as data.flip")
    parser.add_argument("--color-jitter", type=float, default=0.0, help="as data.color_jitter")
    parser.add_argument("--steps", type=int, default=800, help="steps of the heads' training")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--threads", type=at_least(0), default=0, help="CPU threads; 0: torch's default")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    keep_freed_memory()
    shards = resolve("emoji:train")
    heads_file = args.out / HEADS
    if not heads_file.is_file():
        args.out.mkdir(parents=True, exist_ok=True)
        image, text, ids = features(EmojiOracle(Heads()), shards)
        heads = train_heads(image, text, ids, steps=args.steps, seed=args.seed)
        partial = heads_file.with_suffix(".partial")
        save_file({name: value.contiguous() for name, value in heads.state_dict().items()}, partial)
        os.replace(partial, heads_file)
        print(f"heads: {heads_file}", flush=True)
    if not args.crops:
        return 0
    embed_shards(
        load_oracle(heads_file),
        shards,
        args.out / "cache",
        source="emoji_oracle",
        digest=sha256_of(heads_file),
        data=DataConfig(crop_scale=args.crop_scale, flip=args.flip, color_jitter=args.color_jitter),
        crops=args.crops,
        seed=args.seed,
        batch_size=_BATCH,
        progress=lambda line: print(line, flush=True),
    )
    print(f"{args.out / 'cache'} is complete")
    return 0


if __name__ == "__main__":
    run_tool(main)
