"""What the evaluation scripts share: naming models on a command line, running evaluators, table and results file."""

from __future__ import annotations

import argparse
import difflib
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vlmkd import distributed, zoo
from vlmkd.allocator import keep_freed_memory
from vlmkd.errors import UserError, at_least
from vlmkd.evaluation.base import Context, Evaluator, Result
from vlmkd.evaluation.efficiency import macs_of
from vlmkd.export.classifier import load_classifier
from vlmkd.files import check_writable
from vlmkd.models.clip import load_clip, weights_digest
from vlmkd.models.towers import ClipPredictor
from vlmkd.results import Number, Tags, details_of, numbers_of, parameters, title_of, write_results

MODEL_HELP = """model names:
  ViT-B-32/laion2b_s34b_b79k, ViT-B-32@openai   open_clip architecture and tag (or @weights file)
  config.json@weights.safetensors               model config and weights file
  zoo:NAME, or NAME alone                       entry of MODEL_ZOO.md (fetched when it is not in the cache)
  runs/my_run, runs/my_run/export               a run's export (a CLIP or a classifier)
  local-dir:PATH                                open_clip folder
  hf:PATH                                       transformers CLIPModel folder
  classifier:FOLDER                             exported classifier (classification only; its classes must be the set's)

Under torchrun (or scripts/launch.sh) the ranks share the work. Exit code 2: bad input, told in one line."""
_LAYOUTS = {"open_clip_config.json": "local-dir", "config.json": "hf", "classifier.json": "classifier"}
"""File that a model's folder has -> scheme of its name."""
_TOKEN_TABLES = ("token_embedding.weight", "word_embeddings.weight", "shared.weight", "wte.weight")
"""Endings of the names of token tables: open_clip's own, and those of Hugging Face text towers."""
_WARM_UP, _REPEATS = 3, 10
_GAP = 2  # spaces between columns
_DIGITS = {"share": 2, "": 4, "nats": 4}


def parser(description: str) -> argparse.ArgumentParser:
    """Arguments of every evaluation script."""
    result = argparse.ArgumentParser(
        description=description, epilog=MODEL_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, count = result.add_argument, at_least(0)
    add("--model", nargs="+", required=True, metavar="NAME", help="models to evaluate, see below")
    add("--name", nargs="+", default=[], help="names of the sets in the table (default: from --data)")
    add("--results", default="", metavar="FILE", help="write a line a number to FILE, and details beside it")
    add("--batch-size", type=at_least(1), default=64, help="images per forward pass (default 64)")
    add("--workers", type=count, default=0, help="processes that decode images (default 0)")
    add("--threads", type=count, default=0, help="CPU threads (default: torch's)")
    add("--device", default="", help="cpu, cuda, cuda:1 (default: a GPU when there is one)")
    add("--cost", action="store_true", help="add GMACs and latency at batch size 1")
    add("--quiet", action="store_true", help="no progress lines")
    return result


def per_set(values: list[str], sets: list[str], option: str, *, shared: bool = True) -> list[str]:
    """One value of an option for each data set: none, one each, or (when it can be `shared`) one for all.

    Raises:
        UserError: another number of values.
    """
    if not values or (shared and len(values) == 1):
        return (values or [""]) * len(sets)
    if len(values) != len(sets):
        allowed = "one for all or one each" if shared else "one each"
        raise UserError(f"{option} has {len(values)} values for {len(sets)} data sets; give {allowed}")
    return values


def model_name(name: str) -> tuple[str, str]:
    """The `model` and `pretrained` of load_clip that a command-line name means; a classifier's name stays as it is.

    Raises:
        UserError: a folder without a model, or an architecture without weights.
    """
    path = Path(name).expanduser()
    if name.startswith(("zoo:", *(f"{scheme}:" for scheme in _LAYOUTS.values()))):
        return name, ""
    if name in zoo.entries():
        return f"zoo:{name}", ""
    if path.is_dir():
        for file, scheme in _LAYOUTS.items():
            for folder in (path, path / "export"):
                if (folder / file).is_file():
                    return f"{scheme}:{folder}", ""
        raise UserError(
            f"--model {path}: neither it nor its export/ has one of the files {', '.join(_LAYOUTS)}"
        )
    model, at, pretrained = name.partition("@")
    if at:
        return model, pretrained
    import open_clip

    known, plain = open_clip.list_models(), name.replace("/", "-")
    if plain in known or path.suffix == ".json":
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(plain))
        choice = f"one of: {tags}" if tags else "a weights file"
        raise UserError(f"--model {name} names no weights; write {name}@ and {choice}")
    if "/" not in name:
        zoo.entry(name)  # raises, because it is none, with the nearest names
    model, _, pretrained = name.rpartition("/")
    # Of one that is close, load_clip suggests the right name.
    if not difflib.get_close_matches(model, known, n=1):
        raise UserError(
            f"--model {name}: no such folder, nor ARCHITECTURE/TAG of open_clip; correct the path"
        )
    return model, pretrained


@dataclass
class Evaluated:
    """One evaluated model."""

    name: str
    digest: str
    parameters: dict[str, int]
    """By part, and `total`."""
    cost: dict[str, tuple[float, str]]
    """Value and unit by name."""
    results: list[Result]

    def numbers(self) -> list[Number]:
        """The model's lines of results.jsonl: size and cost, then what was measured."""
        tags: Tags = {"digest": self.digest}
        costs = [
            Number(run=self.name, model=self.name, tags=tags, metric=name, value=value, label=name, unit=unit,
                   higher_is_better=False)
            for name, (value, unit) in self.cost.items()
        ]  # fmt: skip
        size = parameters(self.parameters["total"], run=self.name, model=self.name, tags=tags)
        return [size, *costs, *numbers_of(self.results, run=self.name, model=self.name, tags=tags)]


def run(args: argparse.Namespace, make_evaluators: Callable[[Context], list[Evaluator]]) -> int:
    """Evaluate every model of `args`, print the table, write the results; returns the exit code.

    All names and data are checked before the first model is loaded. A model that fails ends the evaluation; those
    before it are in the table and the file.
    """
    found: list[Evaluated] = []

    def evaluate() -> None:
        context = start(args)
        models = [model_name(name) for name in args.model]
        evaluators = make_evaluators(context)
        for name, (model, pretrained) in zip(args.model, models, strict=True):
            found.append(_evaluate(name, model, pretrained, evaluators, context, cost=args.cost))
            if args.results and distributed.is_main():
                _write(Path(args.results), found)

    def show() -> None:
        if found and distributed.is_main():
            print(table([number for one in found for number in one.numbers()]))

    return on_ranks(evaluate, show)


def on_ranks(work: Callable[[], None], after: Callable[[], None] = lambda: None) -> int:
    """Do `work`, which calls `start`, and `after` it in any case; the exit code, once a mistake is told to all ranks."""
    told, code = "", 0
    try:
        work()
    except UserError as error:
        told, code = f"{Path(sys.argv[0]).name}: {error}", 2
    except RuntimeError:
        if not distributed.mistake_told():
            raise
        code = 2  # another rank has said it, and left; what broke here was the connection to it
    after()
    if told:
        print(told, file=sys.stderr)
        distributed.tell_mistake()
    distributed.leave(together=not code)
    return code


def start(args: argparse.Namespace) -> Context:
    """Start the ranks that a launcher asked for."""
    if args.results:
        check_writable(args.results, "--results")
    if args.threads:
        torch.set_num_threads(args.threads)
    keep_freed_memory()
    if int(distributed.environment()["WORLD_SIZE"]) > 1:
        os.environ.update(distributed.environment())
        dist.init_process_group("nccl" if torch.cuda.is_available() and args.device != "cpu" else "gloo")
    device = distributed.device_named(args.device)
    return Context(device, args.batch_size, args.workers, progress=not args.quiet)


def _evaluate(
    name: str, model: str, pretrained: str, evaluators: Sequence[Evaluator], context: Context, *, cost: bool
) -> Evaluated:
    predictor: Any
    module: Any
    if model.startswith("classifier:"):
        predictor = load_classifier(Path(model.partition(":")[2]).expanduser(), name)
        module = predictor.module.to(context.device)
        counted = ParameterCount(sum(part.numel() for part in module.parameters()), 0, 0, 0)
        digest, towers = weights_digest(module.state_dict()), {"image": predictor.classify}
    else:
        clip = load_clip(model, pretrained)
        module = clip.module.to(context.device)
        predictor, counted = ClipPredictor.of(clip, name), count_parameters(module)
        digest, towers = clip.digest, {"image": module.encode_image, "text": module.encode_text}
    costs = {}
    if cost:
        inputs = {"image": torch.zeros(1, 3, *predictor.image_spec.size, device=context.device)}
        if "text" in towers:
            inputs["text"] = clip.tokenizer(["a photo"]).to(context.device)
        macs = sum(macs_of(module, encode, inputs[tower]) for tower, encode in towers.items())
        costs = {"multiply-adds": (macs / 1e9, "G")}
        costs |= {tower: (latency_ms(encode, inputs[tower]), "ms") for tower, encode in towers.items()}
    results = [result for evaluator in evaluators for result in evaluator.run(predictor, context)]
    return Evaluated(name, digest, counted._asdict() | {"total": counted.total}, costs, results)


class ParameterCount(NamedTuple):
    """Parameters of a CLIP by part."""

    vision: int
    text: int
    """Without the token table."""
    token_table: int
    other: int
    """Logit scale and bias."""

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self)


def count_parameters(module: nn.Module) -> ParameterCount:
    """Parameters of a module whose image tower is `visual`, as in open_clip; shared tensors count once."""
    found: Counter[str] = Counter()
    for name, parameter in module.named_parameters():
        table, scale = name.endswith(_TOKEN_TABLES), name in ("logit_scale", "logit_bias")
        rest = "token_table" if table else "other" if scale else "text"
        found["vision" if name.startswith("visual.") else rest] += parameter.numel()
    return ParameterCount(*(found[part] for part in ParameterCount._fields))


@torch.no_grad()
def latency_ms(encode: Callable[[Tensor], Tensor], inputs: Tensor) -> float:
    """Median milliseconds of `encode(inputs)` over 10 calls after 3 unmeasured ones."""
    wait = torch.cuda.synchronize if inputs.is_cuda else lambda device: None
    spent = []
    for _ in range(_WARM_UP + _REPEATS):
        wait(inputs.device)
        start = time.perf_counter()
        encode(inputs)
        wait(inputs.device)
        spent.append(time.perf_counter() - start)
    return 1000 * statistics.median_high(spent[_WARM_UP:])


def table(numbers: Sequence[Number]) -> str:
    """Plain-text table: one line per model, data sets above their metrics; shares in per cent, parameters in millions."""
    models = list(dict.fromkeys(one.model for one in numbers))
    datasets = list(dict.fromkeys(one.dataset for one in numbers))
    first = {one.key: one for one in reversed(numbers)}
    columns = sorted(dict.fromkeys(one.key for one in numbers), key=lambda key: datasets.index(key[0]))
    values = {(one.model, one.key): one.shown(_DIGITS.get(one.unit)) for one in numbers}
    lines = [["model", *(title_of(first[key]) for key in columns)]]
    lines += [[model, *(values.get((model, key), "–") for key in columns)] for model in models]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    above = " " * (widths[0] + _GAP)
    for name, group in groupby(range(1, len(widths)), lambda column: columns[column - 1][0]):
        own = list(group)
        span = sum(widths[column] + _GAP for column in own) - _GAP
        widths[own[-1]] += max(len(name) - span, 0)
        above += name.center(max(span, len(name))) + " " * _GAP
    rows = []
    for cells in lines:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        rows.append((" " * _GAP).join([cells[0].ljust(widths[0]), *aligned[1:]]))
    return "\n".join([above.rstrip(), *rows])


def _write(path: Path, found: list[Evaluated]) -> None:
    details = {
        "command": sys.argv,
        "torch": torch.__version__,
        "parameters": {one.name: one.parameters for one in found},
        "models": details_of({one.name: one.results for one in found}),
    }
    write_results(path, [number for one in found for number in one.numbers()], details, "--results")
