r"""Between the stages: the class vectors of a trained teacher, and where asked its image embeddings, computed once.

    bash scripts/launch.sh projects/promptkd/build_bank.py out=FILE teacher.prompts=RUN/export data.set=dtd data.root=DATA

With `image_views=V data.teacher_outputs=FOLDER` it also stores the teacher's embeddings of V views of every training
image; a student run that names both never loads the teacher. Interrupted, it goes on where it stopped.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from projects.promptkd.config import BankConfig
from projects.promptkd.teacher import load_teacher
from vlmkd import config, distributed
from vlmkd.allocator import keep_freed_memory
from vlmkd.data.samples import view_config
from vlmkd.data.teacher_outputs import embed_items
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
    skipped = embed_items(
        teacher.encoder(),
        items,
        cfg.data.teacher_outputs,
        name=cfg.data.set,
        source=teacher.source,
        digest=teacher.digest,
        views=view_config(cfg.data),
        view_count=cfg.image_views,
        seed=cfg.seed,
        batch_size=cfg.batch_size,
        max_pixels=cfg.data.max_pixels,
        workers=cfg.data.workers,
        device=device,
        progress=lambda line: print(line, flush=True),
    )
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
