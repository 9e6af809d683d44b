r"""Train the strong emoji teacher's heads and store its embeddings: what the nano teacher is distilled from.

    python data_tools/train_emoji_oracle.py --out CACHE_FOLDER --crops 3 --crop-scale 0.6 1.0 --threads 2

The teacher is pretrained EfficientNet-Lite0 (images) and MiniLM (texts), both from installed packages, joined by two
small heads that are trained here on the training shards alone. The heads go to OUT/heads.safetensors, the embeddings
of every training image (several crops) and caption beside them, as a teacher cache for `data.sources.N.teacher_caches`.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from data_tools.embed_teacher import embed_shards
from data_tools.emoji.oracle import EmojiOracle, Heads, load_oracle
from vlmkd.allocator import keep_freed_memory
from vlmkd.config import DataConfig
from vlmkd.data.samples import BadSample, checked_size, members, unpack, views_of
from vlmkd.data.shards import read_shard
from vlmkd.data.transforms import ViewConfig, normalise
from vlmkd.datasets.emoji import resolve
from vlmkd.errors import UserError, at_least, run_tool
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
            try:
                image, text = unpack(raw, data.image_keys, data.text_key)
                size = checked_size(image, data.max_pixels)
                view = whole.draw(*size, random.Random(0))
                pixels.append(views_of(image, size, [view], [oracle.image_spec])[0][0])
            except BadSample as bad:
                raise UserError(
                    f"shard {shard}: {raw.name} {bad.reason}; delete the emoji cache to build it again"
                ) from None
            ids.append(captions.setdefault(text, len(captions)))
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


def train_heads(
    image_features: Tensor,
    text_features: Tensor,
    text_ids: Tensor,
    *,
    steps: int = 800,
    batch: int = 1024,
    lr: float = 1e-3,
    weight_decay: float = 0.2,
    dropout: float = 0.2,
    seed: int = 0,
) -> Heads:
    """Train heads with the symmetric contrastive loss; equal captions in a batch share the positive mass.

    `image_features` [M, 1280] and `text_ids` int64 [M] (row of each sample's caption in `text_features` [N, 384]).
    Dropout acts on the input features. The result is a pure function of the arguments on one thread.
    """
    generator = torch.Generator().manual_seed(seed)
    heads = Heads()
    for module in heads.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5, generator=generator)
            nn.init.zeros_(module.bias)
    heads.image_mean.copy_(image_features.mean(0))
    heads.image_std.copy_(image_features.std(0) + 1e-3)
    decayed = [p for p in heads.parameters() if p.ndim > 1]
    others = [p for p in heads.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        rows = torch.randint(len(text_ids), (batch,), generator=generator)
        ids = text_ids[rows]
        images = _drop(image_features[rows] - heads.image_mean, dropout, generator) + heads.image_mean
        image, text = heads.embed_image(images), heads.embed_text(text_features[ids])
        same = (ids[:, None] == ids[None, :]).float()
        target = same / same.sum(1, keepdim=True)
        logits = heads.logit_scale.exp() * image @ text.T
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            heads.logit_scale.clamp_(max=math.log(100))
    return heads.eval().requires_grad_(False)


def _drop(features: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    kept = torch.rand(features.shape, generator=generator) >= rate
    return features * kept / (1 - rate)


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
