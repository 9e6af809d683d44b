"""Train the heads of the emoji oracle on frozen features of the emoji training shards.

Writes heads.safetensors and a report into $VLMKD_CACHE/emoji-v1-oracle. Deterministic on one thread; features take
almost all of the time (EfficientNet-Lite0 over 30,294 pictures), the heads themselves under a minute.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from vlmkd.data.embedded import emoji_folder, resolve
from vlmkd.errors import UserError
from vlmkd.models.emoji_oracle import PIXELS, EmojiOracle, TextBackbone, load_image_backbone, train_heads


def samples(shards: list[str]) -> Iterator[tuple[Image.Image, str]]:
    """Pictures and captions of the shards, in order."""
    for shard in shards:
        with tarfile.open(shard) as tar:
            picture: Image.Image | None = None
            for member in tar:
                stream = tar.extractfile(member)
                assert stream is not None
                if member.name.endswith((".png", ".jpg")):
                    picture = Image.open(io.BytesIO(stream.read())).convert("RGB")
                elif member.name.endswith(".txt"):
                    assert picture is not None
                    yield picture, stream.read().decode("utf-8")


@torch.inference_mode()
def picture_features(backbone: nn.Module, pictures: list[Image.Image]) -> Tensor:
    """Frozen features [B, 1280] of RGB pictures, resized and normalised as the oracle's image_spec says."""
    spec = EmojiOracle.image_spec
    resized = np.stack([np.asarray(p.resize(spec.size[::-1], Image.Resampling.BICUBIC)) for p in pictures])
    pixels = torch.from_numpy(resized).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (spec.mean, spec.std))
    return backbone(((pixels - mean) / std).contiguous(memory_format=torch.channels_last)).clone()


def extract(shards: list[str], limit: int) -> tuple[Tensor, list[str]]:
    """Features [M, 1280] and captions of the first `limit` samples (0: all), with a progress line."""
    backbone = load_image_backbone().to(memory_format=torch.channels_last)
    features, captions, pending, begin = [], [], [], time.monotonic()
    for picture, text in samples(shards):
        pending.append(picture)
        captions.append(text)
        if len(pending) == 64:
            features.append(picture_features(backbone, pending))
            pending = []
            if len(features) % 40 == 0:
                speed = len(captions) / (time.monotonic() - begin)
                print(f"{len(captions):,} pictures, {speed:.0f} per second", file=sys.stderr, flush=True)
        if len(captions) == limit:
            break
    if pending:
        features.append(picture_features(backbone, pending))
    return torch.cat(features), captions


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--limit", type=int, default=0, help="use only the first LIMIT training samples (0: all)"
    )
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder (default: emoji-v1-oracle beside the data set)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    try:
        folder = emoji_folder()
        image_features, captions = extract(resolve("emoji:train"), options.limit)
        unique = sorted(set(captions))
        text_features = TextBackbone()(unique)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    rows = {text: row for row, text in enumerate(unique)}
    text_ids = torch.tensor([rows[text] for text in captions])
    heads = train_heads(image_features, text_features, text_ids, steps=options.steps, seed=options.seed)
    output = options.output or folder.parent / f"{folder.name}-oracle"
    output.mkdir(parents=True, exist_ok=True)
    temporary = output / f".heads.{os.getpid()}"
    save_file(heads.state_dict(), temporary)
    os.replace(temporary, output / "heads.safetensors")
    with torch.no_grad():
        cosine = F.cosine_similarity(
            heads.embed_image(image_features[:4096]), heads.embed_text(text_features[text_ids[:4096]])
        )
    report = {"samples": len(captions), "pixels": PIXELS, "steps": options.steps, "seed": options.seed}
    report["train_cosine"] = round(float(cosine.mean()), 4)
    (output / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(output / "heads.safetensors", report)


if __name__ == "__main__":
    main()
