"""Pack images with captions, or chats, into webdataset shards, or deal existing shards out into another number of them.

    python data_tools/images_to_shards.py --images photos --captions captions.csv --out shards
    python data_tools/images_to_shards.py --images photos --chats chats.json --out shards
    python data_tools/images_to_shards.py --reshard 'old/*.tar' --out shards --num-shards 64

Captions come as CSV or TSV with the columns `filepath` and `title`, as JSON `{"file": "caption"}`, as a JSON list of
`{"filepath": ..., "title": ...}`, or as a COCO captions file. Chats are LLaVA's JSON files, with conversations or with
preference pairs; a sample is a record as `json` and its images as `00.jpg`, `01.png`, ... Beside the shards lie `manifest.json` (counts and
sha256) and `sizes.json` (samples per shard). Nothing appears under its final name before it is complete.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import os
import random
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from webdataset import TarWriter

from vlmkd.data.chats import ChatItem, read_chats
from vlmkd.data.shards import expand, read_shard
from vlmkd.errors import UserError, at_least, run_tool
from vlmkd.files import new_folder, read_json, read_text, write_json

IMAGE_TYPES = ("jpg", "jpeg", "png", "webp")
_DEFAULT_PER_SHARD = 1000
_HEADS = {b"\xff\xd8": "jpg", b"RIFF": "webp", b"GIF8": "gif"}
"""First bytes of an image file -> its kind; others count as PNG."""


def read_captions(path: Path, image_column: str, caption_column: str) -> list[tuple[str, str]]:
    """(file, caption) pairs of a captions file, in its order.

    Raises:
        UserError: no such file, another layout, or a missing column.
    """
    if path.suffix.lower() == ".json":
        return _read_json(path, image_column, caption_column)
    text = read_text(path, "--captions")
    delimiter = "\t" if "\t" in text.partition("\n")[0] else ","
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        for column, option in ((image_column, "--image-column"), (caption_column, "--caption-column")):
            if column not in (rows.fieldnames or []):
                raise UserError(
                    f"--captions {path}: no column {column!r}, only {rows.fieldnames}; set {option}"
                )
        return [(row[image_column], row[caption_column] or "") for row in rows]
    except csv.Error as error:
        raise UserError(f"--captions {path}: line {rows.line_num} is not CSV ({error})") from None


def _read_json(path: Path, image_column: str, caption_column: str) -> list[tuple[str, str]]:
    data = read_json(path, "--captions")
    try:
        if isinstance(data, list):
            pairs = [(row[image_column], row[caption_column]) for row in data]
        elif "annotations" in data:
            files = {image["id"]: image["file_name"] for image in data["images"]}
            pairs = [(files[entry["image_id"]], entry["caption"]) for entry in data["annotations"]]
        else:
            pairs = list(data.items())
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--captions {path}: not a captions JSON ({type(error).__name__}: {error})") from None
    for name, caption in pairs:
        if not isinstance(name, str) or not isinstance(caption, str | None):
            raise UserError(
                f"--captions {path}: {str([name, caption])[:80]} is not a file name and a caption"
            )
    return [(name, caption or "") for name, caption in pairs]


def image_samples(
    folder: Path, pairs: list[tuple[str, str]], left_out: Counter[str]
) -> Iterator[dict[str, bytes]]:
    """Members of each pair; pairs without a caption are counted in `left_out`.

    Raises:
        UserError: an image that is missing or of an unknown type.
    """
    for name, caption in pairs:
        path = folder / name
        if "\0" in name or ".." in path.parts:
            raise UserError(f"{path}: leaves --images; correct its row")
        extension = path.suffix.lower().lstrip(".")
        if extension not in IMAGE_TYPES:
            raise UserError(
                f"{path}: not an image of type {', '.join(IMAGE_TYPES)}; convert it or drop its row"
            )
        if not path.is_file():
            raise UserError(f"{path}: no such image; correct --images, or drop its row from --captions")
        if not caption.strip():
            left_out["missing_caption"] += 1
            continue
        yield {extension: path.read_bytes(), "txt": caption.strip().encode("utf-8")}


def chat_samples(items: list[ChatItem]) -> Iterator[dict[str, bytes]]:
    """Members of every chat.

    Raises:
        UserError: an image that is missing.
    """
    for item in items:
        files = item.members()
        images = [data for name, data in files.items() if name != "json"]
        kinds = (
            next((kind for head, kind in _HEADS.items() if data.startswith(head)), "png") for data in images
        )
        named = {
            f"{number:02d}.{kind}": data
            for number, (kind, data) in enumerate(zip(kinds, images, strict=True))
        }
        yield {"json": files["json"], **named}


def shard_samples(shards: list[str], left_out: Counter[str]) -> Iterator[dict[str, bytes]]:
    """Members of every sample of existing shards; duplicate keys are counted in `left_out`.

    Raises:
        UserError: a shard that cannot be read to its end.
    """
    for url in shards:
        for raw in read_shard(url):
            if raw.reason == "broken_tar":
                raise UserError(f"shard {raw.detail} is broken; fetch it again, or leave it out of --reshard")
            if raw.reason:
                left_out[raw.reason] += 1
            else:
                yield raw.members


def wrong_captions(
    samples: Iterable[dict[str, bytes]], share: float, seed: int
) -> Iterator[dict[str, bytes]]:
    """The samples in their order, a `share` of them with the captions passed on from one to the next: label noise.

    Raises:
        UserError: the share is not within 0 and 1.
    """
    if not 0.0 <= share <= 1.0:
        raise UserError(f"--wrong-captions is {share}; it is a share from 0 to 1")
    kept = list(samples)
    captioned = [index for index, members in enumerate(kept) if "txt" in members]
    chosen = random.Random(seed).sample(captioned, round(share * len(captioned)))
    texts = [kept[index]["txt"] for index in chosen]
    for index, text in zip(chosen, texts[1:] + texts[:1], strict=True):
        kept[index] = kept[index] | {"txt": text}
    yield from kept


def write_shards(
    samples: Iterable[dict[str, bytes]], out: Path, num_shards: int, left_out: Counter[str]
) -> int:
    """Deal `samples` in turn to `num_shards` tars in `out`; returns how many there were.

    Raises:
        UserError: `out` holds shards already, or there are fewer samples than shards.
    """
    if num_shards < 1:
        raise UserError(f"--num-shards is {num_shards}; it must be at least 1")
    new_folder(out, "--out")
    if any(out.glob("*.tar")):
        raise UserError(f"--out {out} holds shards already; name an empty folder")
    digits = max(5, len(str(num_shards - 1)))
    names = [f"{number:0{digits}d}.tar" for number in range(num_shards)]
    partial = [out / f".{name}.partial" for name in names]
    counts = [0] * num_shards
    try:
        streams = [path.open("wb") for path in partial]
        # Without times, owners and the order of members, so that the same samples are the same bytes.
        tars = [
            TarWriter(stream, user="", group="", mode=0o644, mtime=0, encoder=False) for stream in streams
        ]
        for index, members in enumerate(samples):
            tars[index % num_shards].write({"__key__": f"{index:09d}", **members})
            counts[index % num_shards] += 1
        for tar, stream in zip(tars, streams, strict=True):
            tar.close()
            stream.close()
        if min(counts) == 0:
            raise UserError(f"{sum(counts)} samples do not fill {num_shards} shards; lower --num-shards")
        _write_manifest(out, names, partial, counts, left_out)
        for name, path in zip(names, partial, strict=True):
            os.replace(path, out / name)
    finally:
        for path in partial:
            path.unlink(missing_ok=True)
    return sum(counts)


def _write_manifest(
    out: Path, names: list[str], files: list[Path], counts: list[int], left_out: Counter[str]
) -> None:
    shards = [
        {"name": name, "samples": count, "bytes": path.stat().st_size, "sha256": _sha256(path)}
        for name, path, count in zip(names, files, counts, strict=True)
    ]
    manifest = {"samples": sum(counts), "left_out": dict(left_out), "shards": shards}
    write_json(out / "manifest.json", manifest)
    write_json(out / "sizes.json", dict(zip(names, counts, strict=True)))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def main(argv: list[str]) -> int:
    """Run the tool; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, help="folder that the captions file's paths start from")
    parser.add_argument("--captions", type=Path, help="captions file")
    parser.add_argument(
        "--chats", nargs="+", metavar="FILE", help="chats, instead of captions (--images: beside them)"
    )
    parser.add_argument("--image-column", default="filepath")
    parser.add_argument("--caption-column", default="title")
    parser.add_argument("--reshard", nargs="+", metavar="SHARDS", help="existing shards, instead of images")
    parser.add_argument("--out", type=Path, required=True, help="folder of the new shards")
    parser.add_argument(
        "--num-shards", type=int, default=0, help="at least ranks x workers; 0: one per 1,000 samples"
    )
    parser.add_argument(
        "--wrong-captions",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="with --reshard: this share of the samples get another one's caption, to study noise; held in memory",
    )
    parser.add_argument(
        "--seed", type=at_least(0), default=0, help="order of the images, and who gets a wrong caption"
    )
    args = parser.parse_args(argv)
    left_out: Counter[str] = Counter()
    if args.wrong_captions and not args.reshard:
        raise UserError("--wrong-captions goes with --reshard")
    if args.reshard:
        if not args.num_shards:
            raise UserError("--reshard needs --num-shards")
        num_shards = args.num_shards
        samples = shard_samples(expand(args.reshard, "--reshard"), left_out)
        if args.wrong_captions:
            samples = wrong_captions(samples, args.wrong_captions, args.seed)
    elif args.chats:
        items = [
            one for path in args.chats for one in read_chats(path, str(args.images or Path(path).parent))
        ]
        random.Random(args.seed).shuffle(items)
        num_shards = args.num_shards or max(len(items) // _DEFAULT_PER_SHARD, 1)
        samples = chat_samples(items)
    elif args.images and args.captions:
        pairs = read_captions(args.captions, args.image_column, args.caption_column)
        random.Random(args.seed).shuffle(pairs)
        num_shards = args.num_shards or max(len(pairs) // _DEFAULT_PER_SHARD, 1)
        samples = image_samples(args.images, pairs, left_out)
    else:
        raise UserError("give --images and --captions, --chats, or --reshard")
    count = write_shards(samples, args.out, num_shards, left_out)
    told = "".join(f", {number} left out ({reason})" for reason, number in left_out.items())
    print(f"{count} samples in {num_shards} shards in {args.out}{told}")
    return 0


if __name__ == "__main__":
    run_tool(main)
