r"""Between the stages: the class vectors of a trained teacher, and where asked its image embeddings, computed once.

    bash scripts/launch.sh projects/promptkd/build_bank.py out=FILE teacher.prompts=RUN/export data.set=dtd data.root=DATA

With `image_views=V data.teacher_outputs=FOLDER` it also stores the teacher's embeddings of V views of every training
image; a student run that names both never loads the teacher. Interrupted, it goes on where it stopped.
"""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import torch

from projects.promptkd.config import BankConfig
from projects.promptkd.teacher import load_teacher
from vlmkd import config, distributed
from vlmkd.allocator import keep_freed_memory
from vlmkd.data.samples import view_config
from vlmkd.data.teacher_outputs import OutputsInfo, Writer, image_embeds, item_views
from vlmkd.datasets.labelled_sets import configured_set, items_of
from vlmkd.errors import run_tool


def build_bank(cfg: BankConfig) -> None:
    """Write the class vectors of a set, and its images' embeddings where they are asked for."""
    dataset, device = configured_set(cfg.data), distributed.device()
    teacher = load_teacher(cfg.teacher, cfg.data.set, cfg.protocol)
    teacher.module.to(device)
    vectors = teacher.class_vectors(dataset)
    vectors.save(Path(cfg.out))
    print(f"{cfg.out}: {len(vectors.class_names)} classes, digest {vectors.digest[:12]}")
    if not cfg.image_views:
        return
    items = items_of(dataset, cfg.split)
    if cfg.split == "train":
        items = items + dataset.splits.get("unlabelled", [])
    encoder = teacher.encoder()
    info = OutputsInfo(
        source=teacher.source, digest=teacher.digest, logit_scale=encoder.logit_scale, dim=vectors.vectors.shape[1],
        crops=cfg.image_views, seed=cfg.seed, image_spec=encoder.image_spec, views=view_config(cfg.data),
        set_name=cfg.data.set,
    )  # fmt: skip
    writer = Writer(
        Path(cfg.data.teacher_outputs), info, image_embeds(encoder, info, cfg.batch_size, device),
        max(cfg.batch_size // cfg.image_views, 1), partial(item_views, info=info, max_pixels=cfg.data.max_pixels),
        lambda line: print(line, flush=True),
    )  # fmt: skip
    skipped = writer.items(items, workers=cfg.data.workers)
    told = ", ".join(f"{reason} {count}" for reason, count in sorted(skipped.items()))
    print(f"{cfg.data.teacher_outputs} is complete" + (f"; left out: {told}" if told else ""))


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    if "--help" in argv or "-h" in argv:
        config.print_help(BankConfig)
        return 0
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    cfg = config.load(BankConfig, argv)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    keep_freed_memory()
    build_bank(cfg)
    return 0


if __name__ == "__main__":
    run_tool(main)
