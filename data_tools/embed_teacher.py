r"""Store a CLIP teacher's embeddings beside the samples, so that training needs no teacher.

    python data_tools/embed_teacher.py --model ViT-B-32 --pretrained laion2b_e16 --shards 'shards/*.tar' \
        --out teacher_cache --crops 4

Several views of every image are embedded and stored with their crop boxes; the loader replays one of them. Name the
folder in `data.sources.N.teacher_caches`, with the same crop options in `data`. An interrupted call continues where it
stopped; shards that are there already are not embedded again.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from data_tools.shard_writer import ShardWriter
from data_tools.told import tell, tell_complete
from vlmkd.allocator import keep_freed_memory
from vlmkd.config import DataConfig
from vlmkd.data.samples import RawSample, members, unpack, view_config
from vlmkd.data.shards import expand
from vlmkd.data.teacher_outputs import (
    OutputsInfo,
    Prepared,
    Progress,
    drawn_views,
    image_embeds,
)
from vlmkd.distributed import device_named
from vlmkd.errors import UserError, at_least, run_tool
from vlmkd.models.clip import load_clip
from vlmkd.models.towers import ClipPredictor
from vlmkd.predictors import DualEncoder


def main(argv: list[str]) -> int:
    """Run the tool; returns the exit code."""
    data = DataConfig()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", required=True, help="open_clip name, JSON config, local-dir:, hf: or zoo: name"
    )
    parser.add_argument("--pretrained", default="", help="open_clip tag or weights file")
    parser.add_argument("--shards", nargs="+", required=True, help="as data.sources.N.shards")
    parser.add_argument("--out", required=True, help="cache folder")
    parser.add_argument("--crops", type=int, default=1, help="views per image")
    parser.add_argument(
        "--crop-scale", type=float, nargs=2, default=data.crop_scale, help="as data.crop_scale"
    )
    parser.add_argument(
        "--crop-ratio", type=float, nargs=2, default=data.crop_ratio, help="as data.crop_ratio"
    )
    parser.add_argument("--flip", type=float, default=data.flip, help="as data.flip")
    parser.add_argument("--color-jitter", type=float, default=data.color_jitter, help="as data.color_jitter")
    parser.add_argument("--image-keys", nargs="+", default=data.image_keys, help="as data.image_keys")
    parser.add_argument("--text-key", default=data.text_key, help="as data.text_key")
    parser.add_argument("--max-pixels", type=at_least(1), default=data.max_pixels, help="as data.max_pixels")
    parser.add_argument("--shard-cache", default="", help="as data.shard_cache")
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of the views")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=at_least(0), default=0, help="CPU threads; 0: torch's default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.crops < 1 or args.batch_size < 1:
        raise UserError("--crops and --batch-size must be at least 1")
    if args.threads:
        torch.set_num_threads(args.threads)
    keep_freed_memory()
    device = device_named(args.device)
    shards = expand(args.shards, "--shards")
    model = load_clip(args.model, args.pretrained)
    if not model.digest:
        raise UserError(
            f"--model {args.model} alone has random weights; name the trained ones with --pretrained"
        )
    model.module.to(device)
    skipped = embed_shards(
        ClipPredictor.of(model),
        shards,
        args.out,
        source=model.source,
        digest=model.digest,
        data=DataConfig(
            crop_scale=list(args.crop_scale),
            crop_ratio=list(args.crop_ratio),
            flip=args.flip,
            color_jitter=args.color_jitter,
            image_keys=args.image_keys,
            text_key=args.text_key,
            max_pixels=args.max_pixels,
            shard_cache=args.shard_cache,
        ),
        crops=args.crops,
        seed=args.seed,
        batch_size=args.batch_size,
        device=device,
        progress=tell,
    )
    tell_complete(args.out, skipped)
    return 0


def embed_shards(
    encoder: DualEncoder,
    shards: list[str],
    out: str | Path,
    *,
    source: str,
    digest: str,
    data: DataConfig,
    crops: int,
    seed: int = 0,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    progress: Progress = lambda line: None,
) -> Counter[str]:
    """Embed `crops` views of every image, and every caption, of `shards` into the folder `out`.

    Shards whose part is there already are skipped. Bad samples are left out and counted by reason in the result;
    `data` gives crop options, member names and max_pixels.
    """
    info = OutputsInfo(
        source=source, digest=digest, logit_scale=float(encoder.logit_scale),
        dim=encoder.encode_text(["a"]).shape[-1], crops=crops, seed=seed, image_spec=encoder.image_spec,
        views=view_config(data),
    )  # fmt: skip
    images = image_embeds(encoder, info, batch_size, device)

    @torch.inference_mode()
    def embed(batch: list[Prepared]) -> dict[str, Tensor]:
        return images(batch) | {"text_embeds": encoder.encode_text([one.text for one in batch]).cpu()}

    def make(raw: RawSample) -> Prepared:
        image, text = unpack(raw, data.image_keys, data.text_key)
        return drawn_views(raw.key, raw.name, image, info, data.max_pixels, text)

    writer = ShardWriter(Path(out), info, embed, max(batch_size // crops, 1), make, progress)
    return writer.shards(shards, members(data), data.shard_cache)


if __name__ == "__main__":
    run_tool(main)
