"""Store a teacher's image embeddings of a labelled set, so that training needs no teacher.

    python data_tools/embed_labelled.py --set emoji --model zoo:NAME --views 4 --out outputs

Name the folder in `data.teacher_outputs`, with the same crop options in `data`. `--clean` embeds the whole picture once
instead of drawn views (`data.teacher_view=clean`). An interrupted call continues where it stopped; images that are there
already are not embedded again. A teacher that is paid per query is asked by projects/vl2v_adip/ask.py.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from data_tools import teacher_options
from data_tools.told import tell, tell_complete
from vlmkd.allocator import keep_freed_memory
from vlmkd.config import LabelledDataConfig
from vlmkd.data.labelled import Item
from vlmkd.data.teacher_outputs import CLEAN, OutputsInfo, Progress, Writer, image_embeds, item_views
from vlmkd.data.transforms import ViewConfig
from vlmkd.datasets.labelled_sets import items_of, load_set
from vlmkd.errors import UserError, at_least, run_tool
from vlmkd.files import read_text
from vlmkd.predictors import ImageEncoder


def main(argv: list[str]) -> int:
    """Run the tool; returns the exit code."""
    args = _parser().parse_args(argv)
    if args.views < 1 or args.batch_size < 1:
        raise UserError("--views and --batch-size must be at least 1")
    if args.clean and args.views != 1:
        raise UserError("--clean has one view; leave out --views")
    if args.threads:
        torch.set_num_threads(args.threads)
    keep_freed_memory()
    views = CLEAN if args.clean else ViewConfig(
        tuple(args.crop_scale), tuple(args.crop_ratio), args.flip, args.color_jitter, args.hue, args.grayscale
    )  # fmt: skip
    items = chosen_items(args.set, args.root, args.splits, args.keys)
    encoder, digest = teacher_options.encoder(args)
    skipped = embed_items(
        encoder, items, args.out, name=args.set, source=encoder.name, digest=digest,
        views=views, view_count=args.views, seed=args.seed, dtype=torch.float32 if args.fp32 else torch.float16,
        batch_size=args.batch_size, max_pixels=args.max_pixels, workers=args.workers, device=args.device,
        progress=tell,
    )  # fmt: skip
    tell_complete(args.out, skipped)
    return 0


def embed_items(
    encoder: ImageEncoder,
    items: Sequence[Item],
    folder: str | Path,
    *,
    name: str,
    source: str,
    digest: str,
    views: ViewConfig,
    view_count: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float16,
    batch_size: int = 64,
    part_size: int = 2000,
    max_pixels: int = 89_478_485,
    workers: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress = lambda line: None,
) -> Counter[str]:
    """Embed `view_count` views of every item of the labelled set `name` into `folder`; see `Writer` and `OutputsInfo`.

    CLEAN `views` with `view_count` 1 store the whole picture.
    """
    width = encoder.encode_image(torch.zeros(1, 3, *encoder.image_spec.size, device=device)).shape[-1]
    info = OutputsInfo(
        source=source, digest=digest, logit_scale=float(encoder.logit_scale), dim=int(width), crops=view_count,
        seed=seed, image_spec=encoder.image_spec, views=views, set_name=name, dtype=str(dtype).removeprefix("torch."),
    )  # fmt: skip
    writer = Writer(
        Path(folder), info, image_embeds(encoder, info, batch_size, device), max(batch_size // view_count, 1),
        partial(item_views, info=info, max_pixels=max_pixels), progress,
    )  # fmt: skip
    return writer.items(items, part_size, workers)


def chosen_items(name: str, root: str, splits: list[str], keys: str) -> list[Item]:
    """The items of the splits (empty: `train`, or `all` where there is no such), only those named in the file `keys`."""
    dataset = load_set(name, root)
    names = splits or ["train" if "train" in dataset.splits else "all"]
    items = list({item.key: item for split in names for item in items_of(dataset, split)}.values())
    if not keys:
        return items
    wanted = set(read_text(keys, "--keys").split("\n")) - {""}
    unknown = sorted(wanted - {item.key for item in items})
    if unknown:
        raise UserError(
            f"--keys {keys}: {len(unknown)} keys are not in {name} {', '.join(names)}, first {unknown[0]}"
        )
    return [item for item in items if item.key in wanted]


def _parser() -> argparse.ArgumentParser:
    data = LabelledDataConfig()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--set", required=True, help="as data.set")
    add("--root", default="", help="as data.root")
    add("--splits", nargs="+", default=[], help="splits to embed; default: train, or all")
    add("--keys", default="", help="text file with the keys to embed, one a line; default: all")
    add("--out", required=True, help="folder of the outputs")
    add("--views", type=int, default=1, help="views per image")
    add("--clean", action="store_true", help="the whole picture once, no drawn views")
    add("--crop-scale", type=float, nargs=2, default=data.crop_scale, help="as data.crop_scale")
    add("--crop-ratio", type=float, nargs=2, default=data.crop_ratio, help="as data.crop_ratio")
    add("--flip", type=float, default=data.flip, help="as data.flip")
    add("--color-jitter", type=float, default=data.color_jitter, help="as data.color_jitter")
    add("--hue", type=float, default=data.hue, help="as data.hue")
    add("--grayscale", type=float, default=data.grayscale, help="as data.grayscale")
    add("--max-pixels", type=at_least(1), default=data.max_pixels, help="as data.max_pixels")
    add("--seed", type=at_least(0), default=0, help="seed of the views")
    add("--fp32", action="store_true", help="store float32 instead of float16")
    add("--batch-size", type=int, default=64, help="views per forward pass")
    add("--workers", type=at_least(0), default=0, help="processes that read and decode")
    teacher_options.add_options(parser)
    return parser


if __name__ == "__main__":
    run_tool(main)
