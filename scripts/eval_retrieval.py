#!/usr/bin/env python
"""Image-text retrieval of any CLIP: recall at 1, 5 and 10, image to text and text to image.

  python scripts/eval_retrieval.py --model ViT-B-32/openai --data /data/coco/val2014 --captions dataset_coco.json
  python scripts/eval_retrieval.py --model runs/my_run --data emoji:unseen_concept

--data takes the image folder of a captions file, a folder or list of webdataset shards (each line of `txt` is a
caption), or an embedded set. --captions takes COCO captions, a Karpathy split (its test images), or Flickr30k's
token or CSV file. Image to text counts a hit when any caption of the image is among the first k; text to image
counts every caption by itself. Equal scores are ranked by index.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts import evaluation_command as command
from vlmkd.datasets.evaluation_sets import retrieval_set
from vlmkd.errors import run_tool
from vlmkd.evaluation.base import Evaluator
from vlmkd.evaluation.retrieval import Retrieval


def main(argv: list[str]) -> int:
    """Command line; returns the exit code."""
    parser = command.parser(__doc__ or "")
    parser.add_argument("--data", nargs="+", required=True, metavar="PATH", help="sets to search")
    parser.add_argument(
        "--captions", nargs="+", default=[], metavar="FILE", help="captions of an image folder"
    )
    args = parser.parse_args(argv)
    return command.run(args, lambda context: _evaluators(args))


def _evaluators(args: argparse.Namespace) -> list[Evaluator]:
    captions = command.per_set(args.captions, args.data, "--captions")
    names = command.per_set(args.name, args.data, "--name", shared=False)
    return [
        Retrieval(retrieval_set(data, captions=captions[index], name=names[index]))
        for index, data in enumerate(args.data)
    ]


if __name__ == "__main__":
    run_tool(main)
