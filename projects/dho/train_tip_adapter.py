"""Train DHO's few-shot teacher, a Tip-Adapter-F: `bash scripts/launch.sh projects/dho/train_tip_adapter.py CONFIG.yaml [field=value ...]`.

Writes RUN_DIR/tip_adapter.pt in the layout of the released code, and tip_adapter.json with what it was made of. The epoch,
beta and alpha are chosen on the validation images.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from projects.dho import tip_adapter
from projects.dho.config import TipAdapterConfig
from projects.dho.labels import Images, choose
from projects.dho.teacher import class_vectors
from vlmkd import config, distributed
from vlmkd.data.labelled import Item
from vlmkd.data.labelled_loader import labelled_views
from vlmkd.data.samples import BadSample
from vlmkd.data.teacher_outputs import OutputsInfo, prepare
from vlmkd.data.transforms import ViewConfig, normalise
from vlmkd.errors import UserError
from vlmkd.evaluation.base import Context
from vlmkd.evaluation.images import embeddings
from vlmkd.files import new_file, new_folder, read_text, write_text
from vlmkd.models.clip import ClipModel, load_clip
from vlmkd.models.towers import ClipPredictor, compute_dtype
from vlmkd.tensor_files import read_torch
from vlmkd.train.lookup import check_names

ADAPTER = "tip_adapter.pt"


def train(cfg: TipAdapterConfig) -> Path:
    """Embed, train, search, write; returns the file."""
    folder = Path(cfg.run_dir)
    written, file = folder / "config.yaml", folder / ADAPTER
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
    vectors = class_vectors(
        cfg.teacher,
        clip,
        dataset.class_names,
        dataset.templates,
    )
    features = _features(cfg, clip, images, folder / "features.pt", device)
    labels = torch.tensor([item.label for item in images.labelled], device=device)
    validation = (features["validation"].to(device), features["validation_labels"].to(device))
    adapter = tip_adapter.TipAdapter(
        tip_adapter.cache_keys(features["cache"]),
        tip_adapter.one_hot(labels.cpu(), len(dataset.class_names)),
        vectors.vectors,
        alpha=cfg.init_alpha,
        beta=cfg.init_beta,
    ).to(device)
    epoch, before = tip_adapter.fit(
        adapter, F.normalize(features["train"].float(), dim=-1).to(device), labels, validation, epochs=cfg.epochs,
        lr=cfg.lr, eps=cfg.eps, weight_decay=cfg.weight_decay, batch_size=cfg.batch_size, seed=cfg.seed, progress=print,
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
        "test_top1": _test(adapter, clip, images.test, device, cfg.embed_batch_size),
        "alpha": adapter.alpha,
        "beta": adapter.beta,
    }
    tip_adapter.save(adapter, file, facts)
    (folder / "features.pt").unlink()
    print(json.dumps({name: value for name, value in facts.items() if name != "class_names"}, indent=1))
    return file


def _features(
    cfg: TipAdapterConfig, clip: ClipModel, images: Images, file: Path, device: torch.device
) -> dict[str, Tensor]:
    """Features of the labelled images' views (`cache` [P,N,D], `train` [V,N,D]) and unit ones of the validation images.

    Kept in `file` until training has ended, because making them is most of the work.
    """
    if file.is_file():
        kept: dict[str, Tensor] = read_torch(file, what="features")
        return kept
    views = labelled_views(cfg.data)
    cache = embed_views(clip, images.labelled, views, cfg.cache_passes, seed=cfg.seed, cfg=cfg, device=device)
    if cfg.cache_features == "unit":
        cache = F.normalize(cache, dim=-1)
    # Another seed, so that training does not see the views of the cache again.
    train_views = embed_views(
        clip, images.labelled, views, cfg.views or cfg.epochs, seed=cfg.seed + 1, cfg=cfg, device=device
    )
    validation, labels = _clean(clip, images.validation, device, cfg.embed_batch_size)
    content = {
        "cache": cache,
        "train": train_views.half(),
        "validation": validation,
        "validation_labels": labels,
    }
    with new_file(file, "stored features") as partial:
        torch.save(content, partial)
    return content


def embed_views(
    clip: ClipModel,
    items: Sequence[Item],
    views: ViewConfig,
    count: int,
    *,
    seed: int,
    cfg: TipAdapterConfig,
    device: torch.device,
) -> Tensor:
    """Un-normalised features [V, N, D] of `count` views of every item, fp32 on the CPU."""
    info = OutputsInfo(
        source=clip.source, digest=clip.digest, logit_scale=100.0, dim=int(clip.config["embed_dim"]), crops=count,
        seed=seed, image_spec=clip.image_spec, views=views, set_name=cfg.data.set, dtype="float32",
    )  # fmt: skip
    rows: list[Tensor] = []
    pixels: list[Tensor] = []
    for prepared in prepare(items, info, cfg.data.max_pixels, cfg.data.workers):
        if isinstance(prepared, BadSample):
            raise UserError(
                f"labelled image {prepared.name} cannot be used ({prepared.reason} {prepared.detail}); mend it"
            )
        pixels += prepared.pixels
        while len(pixels) >= cfg.embed_batch_size:
            rows.append(_raw(clip, pixels[: cfg.embed_batch_size], device))
            del pixels[: cfg.embed_batch_size]
    if pixels:
        rows.append(_raw(clip, pixels, device))
    return torch.cat(rows).view(len(items), count, -1).transpose(0, 1).contiguous()


@torch.no_grad()
def _raw(clip: ClipModel, pixels: list[Tensor], device: torch.device) -> Tensor:
    module: Any = clip.module
    batch = normalise(pixels, clip.image_spec).to(device, compute_dtype(module.visual))
    return module.encode_image(batch).float().cpu()


def _clean(
    clip: ClipModel, items: Sequence[Item], device: torch.device, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Unit vectors [M, D] and labels [M] of whole images."""
    context = Context(device=device, batch_size=batch_size, progress=False)
    images = [item.image for item in items]
    ids, rows, _ = embeddings(ClipPredictor.of(clip), images, "validation", context).gathered()
    return rows, torch.tensor([item.label for item in items])[ids]


def _test(
    adapter: tip_adapter.TipAdapter,
    clip: ClipModel,
    items: Sequence[Item],
    device: torch.device,
    batch_size: int,
) -> float:
    embeds, labels = _clean(clip, items, device, batch_size)
    return tip_adapter.accuracy(adapter, embeds.to(device), labels.to(device))


def main(
    config_class: type[TipAdapterConfig], work: Callable[[TipAdapterConfig], Path], argv: list[str]
) -> int:
    """Command line `CONFIG.yaml [MORE.yaml ...] [field=value ...] [--help] [--dry-run]`; returns the exit code."""
    if "--help" in argv or "-h" in argv:
        config.print_help(config_class)
        return 0
    try:
        cfg = config.load(config_class, [arg for arg in argv if arg != "--dry-run"])
        if "--dry-run" in argv:
            check_names(asdict(cfg))
            print(config.to_yaml(cfg), end="")
        else:
            work(cfg)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(TipAdapterConfig, train, sys.argv[1:]))
