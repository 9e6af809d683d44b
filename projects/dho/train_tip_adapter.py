"""Train DHO's few-shot teacher, a Tip-Adapter-F: `bash scripts/launch.sh projects/dho/train_tip_adapter.py CONFIG.yaml [field=value ...]`.

Writes RUN_DIR/tip_adapter.pt in the layout of the released code, and tip_adapter.json with what it was made of. The epoch,
beta and alpha are chosen on the validation images. `--help` lists the fields, `--dry-run` prints the config.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from projects.dho import tip_adapter
from projects.dho.config import TipAdapterConfig
from projects.dho.labels import choose
from projects.dho.teacher import class_vectors
from vlmkd import config, distributed
from vlmkd.data.labelled import Item
from vlmkd.data.samples import BadSample, view_config
from vlmkd.data.teacher_outputs import OutputsInfo, item_views, made
from vlmkd.data.transforms import normalise
from vlmkd.errors import UserError, run_tool
from vlmkd.evaluation.base import Context
from vlmkd.evaluation.images import embeddings
from vlmkd.files import new_folder, read_text, write_json, write_text
from vlmkd.models.clip import ClipModel, load_clip
from vlmkd.models.towers import ClipPredictor, compute_dtype
from vlmkd.train.lookup import check_names

BATCH = 64
"""Images of a forward pass of the CLIP."""


def train(cfg: TipAdapterConfig) -> Path:
    """Embed, train, search, write; returns the file."""
    folder = Path(cfg.run_dir)
    written, file = folder / "config.yaml", folder / "tip_adapter.pt"
    text = config.to_yaml(cfg)
    if written.is_file() and read_text(written, "config of the run folder") != text:
        raise UserError(f"{folder} holds another teacher's config; choose another run_dir")
    if file.is_file():
        print(f"{file} is complete; delete the folder to train it again")
        return file
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    new_folder(folder, "config field run_dir:")
    write_text(written, text)
    device = distributed.device()
    images = choose(cfg.data, cfg.split)
    dataset = images.dataset
    clip = load_clip(cfg.teacher.model, cfg.teacher.pretrained)
    clip.module.to(device)
    vectors = class_vectors(cfg.teacher, clip, dataset.class_names, dataset.templates)
    cache = embed_views(clip, images.labelled, cfg.cache_passes, cfg.seed, cfg, device)
    # Another seed, so that training does not see the views of the cache again.
    views = embed_views(clip, images.labelled, cfg.views or cfg.epochs, cfg.seed + 1, cfg, device)
    validation, test = (_clean(clip, items, device) for items in (images.validation, images.test))
    labels = torch.tensor([item.label for item in images.labelled])
    adapter = tip_adapter.TipAdapter(
        tip_adapter.cache_keys(cache),
        F.one_hot(labels, len(dataset.class_names)),
        vectors.vectors,
        alpha=cfg.init_alpha,
    ).to(device)
    epoch, before = tip_adapter.fit(
        adapter, F.normalize(views, dim=-1).half().to(device), labels.to(device), validation,
        epochs=cfg.epochs, lr=cfg.lr, batch_size=cfg.batch_size, seed=cfg.seed, progress=print,
    )  # fmt: skip
    grid = tip_adapter.search_grid(cfg.search_beta, cfg.search_alpha)
    adapter.beta, adapter.alpha, after = tip_adapter.search(adapter, *validation, *grid)
    facts = {
        "class_names": dataset.class_names,
        "teacher": clip.source,
        "teacher_digest": clip.digest,
        "dataset": dataset.name,
        "shots": cfg.split.shots,
        "epoch": epoch,
        "validation_top1": before,
        "validation_top1_searched": after,
        "test_top1": tip_adapter.accuracy(adapter, *test),
        "alpha": adapter.alpha,
        "beta": adapter.beta,
    }
    tip_adapter.save(adapter, file)
    write_json(file.with_suffix(".json"), facts, "Tip-Adapter facts")
    print(json.dumps({name: value for name, value in facts.items() if name != "class_names"}, indent=1))
    return file


def embed_views(
    clip: ClipModel,
    items: Sequence[Item],
    count: int,
    seed: int,
    cfg: TipAdapterConfig,
    device: torch.device,
) -> Tensor:
    """Un-normalised features [V, N, D] of `count` views of every item, on the CPU."""
    info = OutputsInfo(
        source=clip.source, digest=clip.digest, logit_scale=100.0, dim=int(clip.config["embed_dim"]), crops=count,
        seed=seed, image_spec=clip.image_spec, views=view_config(cfg.data), set_name=cfg.data.set, dtype="float32",
    )  # fmt: skip
    module: Any = clip.module
    dtype = compute_dtype(module.visual)

    def pixels() -> Iterator[Tensor]:
        make = partial(item_views, info=info, max_pixels=cfg.data.max_pixels)
        ready = made(items, make, cfg.data.workers)
        for item, prepared in zip(items, ready, strict=True):
            if isinstance(prepared, BadSample):
                raise UserError(f"labelled image {item.key}: {prepared.reason} {prepared.detail}; mend it")
            yield from prepared.pixels

    rows, stream = [], pixels()
    with torch.no_grad():
        while part := list(islice(stream, BATCH)):
            batch = normalise(part, clip.image_spec).to(device, dtype)
            rows.append(module.encode_image(batch).float().cpu())
    return torch.cat(rows).view(len(items), count, -1).transpose(0, 1)


def _clean(clip: ClipModel, items: Sequence[Item], device: torch.device) -> tuple[Tensor, Tensor]:
    """Unit vectors [M, D] and labels [M] of whole images."""
    context = Context(device=device, batch_size=BATCH, progress=False)
    ids, rows, _ = embeddings(ClipPredictor.of(clip), [item.image for item in items], "images", context)
    return rows.to(device), torch.tensor([item.label for item in items])[ids].to(device)


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    if "--help" in argv or "-h" in argv:
        config.print_help(TipAdapterConfig)
        return 0
    cfg = config.load(TipAdapterConfig, [arg for arg in argv if arg != "--dry-run"])
    if "--dry-run" in argv:
        check_names(asdict(cfg))
        print(config.to_yaml(cfg), end="")
    else:
        train(cfg)
    return 0


if __name__ == "__main__":
    run_tool(main)
