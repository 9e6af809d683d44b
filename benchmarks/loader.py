"""Samples per second of vlmkd's loader beside the usual recipe and beside the leanest one, and of the JPEG decoders.

    python benchmarks/loader.py --workers 2

Real photographs (scikit-image's) are written as JPEG shards into a temporary folder. The usual recipe is webdataset + Pillow +
torchvision; the leanest is ten lines of webdataset + simplejpeg, without counting, resuming or scaled decoding. All read the same shards
with the same number of processes and make the same thing: RandomResizedCrop(224, scale 0.9-1.0, bicubic), normalised
float32 batches. They run in turns, several rounds, and the best round of each counts. The first table is per second
of CPU time in one process, which a busy machine disturbs little; the second is wall time with worker processes.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import platform
import random
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import simplejpeg
import skimage.data
import torch
import webdataset
from PIL import Image
from torch import Tensor
from torchvision import transforms as tv
from torchvision.io import decode_jpeg
from torchvision.transforms import v2

from vlmkd.config import DataConfig, SourceConfig
from vlmkd.data.decode import decode
from vlmkd.data.loader import build_loader
from vlmkd.data.transforms import View, ViewConfig, reduction_for, render
from vlmkd.image_spec import ImageSpec

SPEC = ImageSpec(size=(224, 224), mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")


def photos(width: int, height: int, count: int) -> list[bytes]:
    """Distinct crops of real photographs as JPEG of quality 90."""
    rng = random.Random(0)
    originals = [Image.fromarray(getattr(skimage.data, name)()) for name in PHOTOS]
    files = []
    for number in range(count):
        image = originals[number % len(originals)]
        left, top = rng.uniform(0, 0.1) * image.width, rng.uniform(0, 0.1) * image.height
        box = (left, top, left + 0.9 * image.width, top + 0.9 * image.height)
        file = io.BytesIO()
        image.resize((width, height), Image.Resampling.BICUBIC, box=box).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def write_shards(folder: Path, files: list[bytes], shards: int) -> list[str]:
    """The files, each with a caption, dealt out to tars."""
    paths = [folder / f"{number:05d}.tar" for number in range(shards)]
    for number, path in enumerate(paths):
        with tarfile.open(path, "w") as tar:
            for index in range(number, len(files), shards):
                for extension, data in (("jpg", files[index]), ("txt", f"photo {index}".encode())):
                    info = tarfile.TarInfo(f"{index:06d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return [str(path) for path in paths]


def tokens(texts: list[str]) -> Tensor:
    """Stand-in for a tokenizer, the same on both sides."""
    return torch.zeros(len(texts), 77, dtype=torch.long)


def our_batches(shards: list[str], workers: int, batch: int):
    """Batches of vlmkd's loader."""
    cfg = DataConfig(sources=[SourceConfig(shards=shards)], workers=workers, shuffle_buffer=50)
    return build_loader(
        cfg, seed=0, rank=0, world_size=1, micro_batch_size=batch, image_spec=SPEC, tokenizer=tokens
    )


def plain_batches(shards: list[str], workers: int, batch: int):
    """Batches of webdataset with Pillow and torchvision, the usual recipe."""
    transform = tv.Compose(
        [
            tv.RandomResizedCrop(224, scale=(0.9, 1.0), interpolation=tv.InterpolationMode.BICUBIC),
            tv.ToTensor(),
            tv.Normalize(SPEC.mean, SPEC.std),
        ]
    )
    data = (
        webdataset.WebDataset(shards, shardshuffle=False, seed=0, resampled=True)
        .shuffle(50, initial=50)
        .decode("pilrgb")
        .to_tuple("jpg", "txt")
        .map_tuple(transform, lambda text: text)
        .batched(batch, partial=False)
    )
    return torch.utils.data.DataLoader(data, batch_size=None, num_workers=workers)


def lean_batches(shards: list[str], workers: int, batch: int):
    """Batches of webdataset with simplejpeg, and of torchvision what works on uint8 tensors: the floor."""
    crop = v2.RandomResizedCrop(
        224, scale=(0.9, 1.0), interpolation=tv.InterpolationMode.BICUBIC
    )  # stays uint8
    mean, std = (255 * torch.tensor(part).view(3, 1, 1) for part in (SPEC.mean, SPEC.std))

    def transform(data: bytes) -> Tensor:
        pixels = torch.from_numpy(simplejpeg.decode_jpeg(data)).permute(2, 0, 1)
        return (crop(pixels).float() - mean) / std

    data = (
        webdataset.WebDataset(shards, shardshuffle=False, seed=0, resampled=True)
        .shuffle(50, initial=50)
        .to_tuple("jpg", "txt")
        .map_tuple(transform, lambda text: text)
        .batched(batch, partial=False)
    )
    return torch.utils.data.DataLoader(data, batch_size=None, num_workers=workers)


def rate(batches, batch: int, number: int, clock: Callable[[], float]) -> float:
    """Samples per second of `clock` over `number` batches after the first two."""
    source = iter(batches)
    next(source), next(source)
    start = clock()
    for _ in range(number):
        next(source)
    return batch * number / (clock() - start)


def loaders(
    folder: Path, sizes: list[tuple[int, int]], workers: int, batch: int, number: int, rounds: int
) -> list[dict]:
    """Best rate of each loader for each photo size; without workers per second of CPU time, else of wall time."""
    clock = time.perf_counter if workers else time.process_time
    rows = []
    for width, height in sizes:
        target = folder / f"{width}-{workers}"
        target.mkdir()
        shards = write_shards(target, photos(width, height, 128), max(workers, 1) * 2)
        kinds = {
            "vlmkd": our_batches,
            "webdataset + Pillow": plain_batches,
            "webdataset + simplejpeg": lean_batches,
        }
        best = dict.fromkeys(kinds, 0.0)
        for _ in range(rounds):
            for name, batches in kinds.items():
                best[name] = max(best[name], rate(batches(shards, workers, batch), batch, number, clock))
        rows.append({"photos": f"{width}x{height}", **best})
    return rows


def pillow_pixels(data: bytes) -> np.ndarray:
    """The whole image by Pillow."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def crop_pillow(data: bytes, view: View) -> np.ndarray:
    """The usual recipe: Pillow decodes, crops and resizes."""
    left, top, width, height = view.box
    image = Image.open(io.BytesIO(data)).convert("RGB").crop((left, top, left + width, top + height))
    return np.asarray(image.resize(SPEC.size, Image.Resampling.BICUBIC))


def crop_pillow_draft(data: bytes, view: View) -> np.ndarray:
    """Pillow with its scaled decoding, kept at twice the input size."""
    image = Image.open(io.BytesIO(data))
    full = image.width
    image.draft("RGB", (2 * SPEC.size[1], 2 * SPEC.size[0]))
    left, top, width, height = (edge * image.width / full for edge in view.box)
    box = (left, top, left + width, top + height)
    return np.asarray(image.convert("RGB").resize(SPEC.size, Image.Resampling.BICUBIC, box=box))


def crop_ours(data: bytes, view: View) -> np.ndarray:
    """vlmkd: simplejpeg, scaled where exact, and torch's uint8 resize."""
    reduction = reduction_for(view, [SPEC])
    return render(decode(data, reduction=reduction), view, SPEC, reduction).numpy()


def decoders(sizes: list[tuple[int, int]], rounds: int) -> list[dict]:
    """Milliseconds per photo: decoding alone, and decoding + crop + resize to 224 with the error against Pillow."""
    whole: dict[str, Callable[[bytes], object]] = {
        "Pillow": pillow_pixels,
        "torchvision.io": lambda data: decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8)),
        "simplejpeg": simplejpeg.decode_jpeg,
    }
    if importlib.util.find_spec("cv2"):
        import cv2

        whole["OpenCV"] = lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    crops = {
        "Pillow, crop + resize": crop_pillow,
        "Pillow draft, crop + resize": crop_pillow_draft,
        "vlmkd, crop + resize": crop_ours,
    }
    rows = []
    for width, height in sizes:
        files = photos(width, height, 8)
        views = [ViewConfig().draw(width, height, random.Random(number)) for number in range(len(files))]
        row: dict = {"photos": f"{width}x{height}"}
        for name, function in whole.items():
            row[name] = best_ms(
                lambda function=function, files=files: [function(data) for data in files], len(files), rounds
            )
        for name, crop in crops.items():
            pairs = list(zip(files, views, strict=True))
            row[name] = best_ms(
                lambda crop=crop, pairs=pairs: [crop(*pair) for pair in pairs], len(files), rounds
            )
            errors = [np.abs(crop(*pair).astype(int) - crop_pillow(*pair).astype(int)) for pair in pairs]
            row[f"{name}: mean |error|"] = float(np.mean([error.mean() for error in errors]))
        rows.append(row)
    return rows


def best_ms(work: Callable[[], object], count: int, rounds: int) -> float:
    """Milliseconds of CPU time per item in the best of `rounds`."""
    best = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return 1000 * best / count


def main(argv: list[str]) -> int:
    """Run both benchmarks and print them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=20, help="timed batches a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    sizes = [(512, 384), (640, 480), (1280, 960)]
    tables = {}
    with tempfile.TemporaryDirectory() as folder:
        for workers in (0, args.workers):
            table = loaders(Path(folder), sizes, workers, args.batch_size, args.batches, args.rounds)
            tables[f"{workers} workers"] = table
            unit = "samples/s of wall time" if workers else "samples/s of CPU time"
            print(f"loaders, {unit}, {workers} workers, {platform.machine()}")
            for row in table:
                print(
                    "  " + "   ".join(f"{k} {v:.2f}" if isinstance(v, float) else v for k, v in row.items())
                )
    decoder_table = decoders(sizes, 5 * args.rounds)
    print("decoders, ms of CPU time per photo, one thread")
    for row in decoder_table:
        print(row["photos"])
        for name, value in row.items():
            if name != "photos":
                print(f"  {name:45s} {value:8.3f}")
    if args.json:
        args.json.write_text(json.dumps({"loaders": tables, "decoders": decoder_table}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
