r"""Store what a multimodal model's frozen vision tower gives for the pictures of chats, so that they go through it once.

    python data_tools/embed_pictures.py init_from=runs/chat/adapt --chats chats.json --out runs/chat/features
    NPROC=8 bash scripts/launch.sh data_tools/embed_pictures.py tower=clip:ViT-L-14-336@openai decoder=hf:Qwen/Qwen1.5-1.8B \
        --chats chats.json --out features

The tower is told by fields of a run's `student`: an export that has it, or what the run makes it of. Name the folder in
`data.features` of every run with the same tower: pictures that it has are neither decoded nor seen again, in questions
neither. It pays where the same pictures come often, and takes 2 bytes a number (4 with --fp32), 1.2 MB a picture of CLIP
ViT-L/14 at 336 px. Ranks share the work; an interrupted call continues where it stopped, and another list of chats adds to
the folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from PIL import Image
from torch import Tensor

import projects
from data_tools.told import tell, tell_complete
from scripts import evaluation_command as command
from vlmkd import config
from vlmkd.chat_config import MllmConfig
from vlmkd.chat_runs import is_shards, open_chat
from vlmkd.config import require
from vlmkd.data.chat_outputs import FeaturesInfo, picture_key
from vlmkd.data.chats import decoded, read_chats
from vlmkd.data.teacher_outputs import Prepared, Writer
from vlmkd.data.transforms import eval_transform
from vlmkd.errors import UserError, at_least, run_tool
from vlmkd.export.mllm import build_tower, tower_digest
from vlmkd.files import unreadable


@dataclass(frozen=True)
class Picture:
    """An image file under the name that it is stored by."""

    key: str
    path: Path


def main(argv: list[str]) -> int:
    """Run the tool; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, count = parser.add_argument, at_least(0)
    add("fields", nargs="+", metavar="FIELD=VALUE", help="of a run's student: init_from, or tower and others")
    add("--device", default="", help="cpu, cuda, cuda:1 (default: a GPU when there is one)")
    add("--chats", nargs="+", required=True, help="JSON files, of questions too")
    add("--images", default="", help="as data.images")
    add("--out", required=True, type=Path, help="folder of the features")
    add("--fp32", action="store_true", help="store float32 instead of float16")
    add("--batch-size", type=at_least(1), default=32, help="pictures per forward pass (default 32)")
    add("--part-size", type=at_least(1), default=2000, help="pictures of a file of features (default 2000)")
    add("--max-pixels", type=at_least(1), default=89_478_485, help="as data.max_pixels")
    add("--workers", type=count, default=0, help="processes that read and decode pictures")
    add("--threads", type=count, default=0, help="CPU threads; 0: torch's default")
    args = parser.parse_args(argv)
    if is_shards(args.chats, "--chats"):
        raise UserError(
            f"--chats {args.chats[0]} is a shard; features are stored of the pictures of JSON files"
        )
    args.results, args.quiet = "", False
    return command.on_ranks(lambda: _embed(args))


def _embed(args: argparse.Namespace) -> None:
    cfg = config.load(MllmConfig, args.fields)
    require(cfg.named, "init_from", "or tower and decoder must be given")
    device = command.start(args).device
    found = pictures(args.chats, args.images)
    tower: Any = (
        open_chat(cfg.init_from, projects.surgery_of, device="cpu").model.tower
        if cfg.init_from
        else build_tower(cfg)
    )
    info = FeaturesInfo(
        source=cfg.init_from or cfg.tower, digest=tower_digest(tower), image_spec=tower.image_spec, set_name="pictures",
        places=tower.tokens, width=tower.dim, dtype="float32" if args.fp32 else "float16",
    )  # fmt: skip
    tower.to(device)
    make = partial(_prepared, transform=eval_transform(tower.image_spec), max_pixels=args.max_pixels)

    @torch.inference_mode()
    def features(batch: list[Prepared]) -> dict[str, Tensor]:
        pixels = torch.stack([one.chat for one in batch])
        return {"features": tower(pixels.to(device)).cpu()}

    writer = Writer(args.out, info, features, args.batch_size, make, tell)
    skipped = writer.items(found, args.part_size, args.workers)
    tell_complete(args.out, skipped)


def pictures(chats: list[str], images: str) -> list[Picture]:
    """The pictures of some files of chats, equal ones once."""
    items = [item for path in chats for item in read_chats(path, images or str(Path(path).parent))]
    paths = dict.fromkeys(path for item in items for path in item.pictures())
    if not paths:
        raise UserError(f"--chats {chats[0]} names no pictures")
    found = {picture_key(_read(path)): path for path in paths}
    return [Picture(key, path) for key, path in found.items()]


def _prepared(one: Picture, transform: Callable[[Image.Image], Tensor], max_pixels: int) -> Prepared:
    data = _read(one.path)
    return Prepared(one.key, data, [], [], chat=decoded(data, transform, max_pixels))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(error, str(path), "picture") from None


if __name__ == "__main__":
    run_tool(main)
