"""Text towers over the positions that count against open_clip's own encode_text over all 77, as a Markdown table.

    python benchmarks/text_tower.py [--threads 1] [--rounds 3]

ViT-B-32's text tower with random weights: 64 ImageNet prompts as for class vectors, and a training step's forward and
backward pass over 64 captions. Both take turns; the table gives medians and the largest difference of a unit vector's entry.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from vlmkd.class_names import read_class_names  # noqa: E402
from vlmkd.models.clip import load_clip  # noqa: E402
from vlmkd.models.text_tower import encode_text, needed  # noqa: E402

TEXTS = 64
CAPTION = "a {} beside a {}, seen from the window of a train on the way from one small town to the next one"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clip = load_clip("ViT-B-32", seed=0)
    names = read_class_names("imagenet")
    prompts = [f"a photo of a {name}." for name in names[:TEXTS]]
    captions = [CAPTION.format(*pair) for pair in zip(names[:TEXTS], names[TEXTS:], strict=False)]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {args.threads} thread(s)"
    module = clip.module.to("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{TEXTS} texts, torch {torch.__version__}, {device}\n")
    print("| texts | tokens | whole context s | vlmkd s | times faster | largest difference |")
    print("|---|---:|---:|---:|---:|---:|")
    for title, texts, training in (
        ("ImageNet prompts, forward", prompts, False),
        ("captions, forward and backward", captions, True),
    ):
        print_row(title, module, clip.tokenizer(texts), training, args.rounds)


def print_row(title: str, module: Any, tokens: Tensor, training: bool, rounds: int) -> None:
    """Measure both in turns and print one line."""
    device = module.logit_scale.device
    ways: dict[str, Callable[[], Tensor]] = {
        "whole": lambda: module.encode_text(tokens.to(device)),
        "needed": lambda: encode_text(module, needed(module, tokens).to(device)),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    vectors: dict[str, Tensor] = {}
    for _ in range(rounds + 1):
        for way, encode in ways.items():
            with torch.set_grad_enabled(training):
                begin = time.perf_counter()
                found = F.normalize(encode(), dim=-1)
                if training:
                    found.sum().backward()
                vectors[way] = found.detach().cpu()
                seconds[way].append(time.perf_counter() - begin)
    whole, ours = (statistics.median(spent[1:]) for spent in seconds.values())  # the first is a warm-up
    difference = float((vectors["whole"] - vectors["needed"]).abs().max())
    longest = int(tokens.argmax(dim=-1).max()) + 1
    print(
        f"| {title} | {longest} | {whole:.3f} | {ours:.3f} | {whole / ours:.2f} | {difference:.1e} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
