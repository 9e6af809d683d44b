"""RLAIF-V's pairs of answers as the preference records and pictures that stage prefer trains on.

    python -m projects.llava_mod.rlaif_v rlaif_v/*.parquet --out data/llava_mod/rlaif_v.json --images data/llava_mod/images

The files are those of openbmb/RLAIF-V-Dataset (CC BY-NC 4.0), a row a pair: `image` with `bytes`, `question`, `chosen`,
`rejected`; other columns are not read. A picture that several rows have is written once, below `rlaif_v` in --images, which
is `data.images` of the run.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vlmkd.data.chats import IMAGE
from vlmkd.errors import UserError, run_tool
from vlmkd.files import new_file, new_folder, one_line, write_json

COLUMNS = ("image", "question", "chosen", "rejected")
FOLDER = "rlaif_v"


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a parquet file, some at a time."""
    try:
        pyarrow, parquet = (importlib.import_module(name) for name in ("pyarrow", "pyarrow.parquet"))
    except ImportError:
        raise UserError(f"{path} needs pyarrow; install it by pip install pyarrow") from None
    try:
        file = parquet.ParquetFile(path)
        if missing := [name for name in COLUMNS if name not in file.schema_arrow.names]:
            raise UserError(f"{path} has no column {', '.join(missing)}; name a file of RLAIF-V-Dataset")
        for batch in file.iter_batches(batch_size=64, columns=list(COLUMNS)):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}); fetch it again") from None


def convert(files: Sequence[Path], images: Path) -> list[dict[str, Any]]:
    """The records of all files, numbered in their order; writes their pictures below `images`."""
    new_folder(images / FOLDER, "--images")
    records: list[dict[str, Any]] = []
    for path in files:
        for number, row in enumerate(read_rows(path)):
            where = f"{path}: row {number}"
            question, *answers = (row[name] for name in COLUMNS[1:])
            if not all(isinstance(text, str) and text for text in (question, *answers)):
                raise UserError(f"{where} lacks a text in question, chosen or rejected; leave it out")
            asked = {"from": "human", "value": f"{IMAGE}\n{question}"}
            talks = [[asked, {"from": "gpt", "value": text}] for text in answers]
            name = _picture(row["image"], images, where)
            key = f"{FOLDER}_{len(records):06d}"
            records.append({"id": key, "image": name, "chosen": talks[0], "rejected": talks[1]})
    return records


def _picture(image: Any, images: Path, where: str) -> str:
    """Write a row's picture unless it is there; its path below `images`."""
    try:
        data = image["bytes"]
        kind = str(Image.open(io.BytesIO(data)).format).lower()
    except (TypeError, KeyError, OSError) as error:
        raise UserError(f"{where} has no picture in image.bytes ({one_line(error)}); leave it out") from None
    name = f"{FOLDER}/{hashlib.sha256(data).hexdigest()[:16]}.{kind}"
    if not (images / name).is_file():
        with new_file(images / name, "--images") as partial:
            partial.write_bytes(data)
    return name


def main(argv: list[str]) -> int:
    """Parse arguments and convert; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("files", type=Path, nargs="+", help="parquet files, in the order of the records")
    add("--out", type=Path, required=True, help="JSON file of the records")
    add("--images", type=Path, required=True, help="folder of the pictures, `data.images` of the run")
    args = parser.parse_args(argv)
    records = convert(args.files, args.images)
    write_json(args.out, records, "--out")
    print(f"wrote {args.out}: {len(records)} pairs about {len({one['image'] for one in records})} pictures")
    return 0


if __name__ == "__main__":
    run_tool(main)
