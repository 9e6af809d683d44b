"""Ask a paid teacher for class vectors and image embeddings through a ledger, which charges each text and image once.

    python -m projects.vl2v_adip.ask classes vendor.yaml data.set=office_home data.root=/data out=classes.safetensors
    python -m projects.vl2v_adip.ask images vendor.yaml data.set=office_home data.root=/data out=outputs
    python -m projects.vl2v_adip.ask report ledger.sqlite

`vendor.yaml` may hold what stays the same, as `url`, `teacher_id`, `dim` and `ledger`; `--help` shows every
field. Training names the files in `teacher.class_vectors` and `data.teacher_outputs`. The address speaks the
protocol of black_box.py. An interrupted command goes on when it is given again.
"""

from __future__ import annotations

import argparse
import io
import json
from collections import Counter
from dataclasses import astuple, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from projects.vl2v_adip.black_box import HttpTeacher
from projects.vl2v_adip.ledger import Ledger, Query, Terms, report, sha256, text_query
from vlmkd import config
from vlmkd.config import Count, LabelledDataConfig, Positive, Seed, require
from vlmkd.data.samples import BadSample, view_config
from vlmkd.data.teacher_outputs import (
    CLEAN,
    OutputsInfo,
    Prepared,
    Writer,
    item_views,
    made,
    missing_items,
)
from vlmkd.datasets.labelled_sets import configured_set, items_of
from vlmkd.errors import run_tool
from vlmkd.files import check_writable
from vlmkd.image_spec import ImageSpec
from vlmkd.models.class_vectors import class_prompts, encode_classes
from vlmkd.service import Service


@dataclass(frozen=True, kw_only=True)
class AskConfig(Terms, Service):
    """What is asked, of whom, and what it may cost."""

    data: LabelledDataConfig = field(default_factory=LabelledDataConfig)
    """The labelled set; with `views`, how they are drawn."""
    splits: list[str] = field(default_factory=list)
    """Splits whose images are asked; empty: `train`, or `all` of a set without."""
    templates: list[str] = field(default_factory=list)
    """Prompts with `{}` for the class name; empty: the data set's own."""
    out: str = ""
    """Folder of the image embeddings, or file of the class vectors (.safetensors)."""
    views: Count = 0
    """Drawn views an image, all paid; 0: the whole picture once, for data.teacher_view=clean."""
    size: Positive = 224
    """Side in pixels of drawn views."""
    seed: Seed = 0
    """Seed of the views."""

    def __post_init__(self) -> None:
        for name in ("url", "teacher_id", "dim", "ledger", "out"):
            require(bool(getattr(self, name)), name, "is missing; give it in a file or as field=value")


def ask_classes(cfg: AskConfig) -> str:
    """Write the set's class vectors; returns what was done."""
    require(cfg.out.endswith(".safetensors"), "out", f"is {cfg.out}; it must end in .safetensors")
    check_writable(cfg.out, "config field out:")
    dataset = configured_set(cfg.data)
    names, templates = dataset.class_names, cfg.templates or dataset.templates
    ledger = Ledger(cfg, HttpTeacher(cfg))
    asked = ledger.require_budget(map(text_query, class_prompts(names, templates)))
    size, digest = cfg.batch_size, ledger.digest
    encode_classes(ledger, names, templates, teacher_digest=digest, batch_size=size).save(Path(cfg.out))
    return f"{cfg.out}: {len(names)} classes, {len(templates)} prompts each, {asked} texts asked"


def ask_images(cfg: AskConfig) -> str:
    """Store the embeddings of the set's images, zeros for a view without a vector; returns what was left out.

    Every image is decoded before the first query.
    """
    dataset = configured_set(cfg.data)
    names = cfg.splits or ["train" if "train" in dataset.splits else "all"]
    items = list({item.key: item for name in names for item in items_of(dataset, name)}.values())
    ledger = Ledger(cfg, HttpTeacher(cfg))
    # Only size, interpolation and fill of the views that are sent are read.
    spec = ImageSpec(size=(cfg.size, cfg.size), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    info = OutputsInfo(
        source=ledger.name, digest=ledger.digest, logit_scale=ledger.logit_scale, dim=ledger.dim,
        crops=cfg.views or 1, seed=cfg.seed, image_spec=spec,
        views=view_config(cfg.data) if cfg.views else CLEAN, set_name=cfg.data.set, dtype="float32",
    )  # fmt: skip
    make = partial(item_views, info=info, max_pixels=cfg.data.max_pixels)
    ready = made(missing_items(items, Path(cfg.out)), make, cfg.data.workers)
    good = (one for one in ready if not isinstance(one, BadSample))
    ledger.require_budget(query for one in good for query in image_queries(one, info))
    left_out: Counter[str] = Counter()

    def embed(batch: list[Prepared]) -> dict[str, Tensor]:
        vectors = ledger.ask([query for one in batch for query in image_queries(one, info)])
        left_out["masked_view"] += vectors.count(None)
        rows = [torch.zeros(ledger.dim) if vector is None else vector for vector in vectors]
        return {"image_embeds": F.normalize(torch.stack(rows), dim=-1).view(len(batch), info.crops, -1)}

    writer = Writer(Path(cfg.out), info, embed, cfg.batch_size, make, lambda line: print(line, flush=True))
    left_out += writer.items(items, workers=cfg.data.workers)
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(left_out.items()))
    return f"{cfg.out} is complete" + (f"; left out: {reasons}" if reasons else "")


def image_queries(prepared: Prepared, info: OutputsInfo) -> list[Query]:
    """The queries of an image: its file for clean views, else a PNG of each view."""
    content, spec = sha256(prepared.image), info.image_spec
    made = f"png {spec.size[0]}x{spec.size[1]} {spec.interpolation} on {spec.fill}"
    queries = []
    for view, pixels in zip(prepared.views, prepared.pixels, strict=True):
        array, file = pixels.contiguous().numpy(), io.BytesIO()
        alike = sha256(array.tobytes())
        if info.views == CLEAN:
            return [Query("image", prepared.image, content, alike)]
        Image.fromarray(array).save(file, "PNG")
        queries.append(Query("image", file.getvalue(), json.dumps([content, made, astuple(view)]), alike))
    return queries


def told(figures: dict[str, Any]) -> str:
    """One teacher's figures in a line."""
    teacher, *numbers = figures.items()
    shown = (f"{name} {'no limit' if value is None else f'{value:g}'}" for name, value in numbers)
    return f"{teacher[1]}: {', '.join(shown).replace('_', ' ')}"


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\n\nfields:\n{config.help_text(AskConfig)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=["classes", "images", "report"])
    parser.add_argument(
        "arguments", nargs="+", help="CONFIG.yaml and field=value, or the ledger to report on"
    )
    args = parser.parse_args(argv)
    if args.action == "report":
        print("\n".join(told(figures) for path in args.arguments for figures in report(path)))
        return 0
    ask = ask_classes if args.action == "classes" else ask_images
    print(ask(config.load(AskConfig, args.arguments)))
    return 0


if __name__ == "__main__":
    run_tool(main)
