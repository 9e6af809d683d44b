"""What the evaluation scripts share: naming models on a command line, running evaluators, table and results file."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vlmkd import distributed, zoo
from vlmkd.allocator import keep_freed_memory
from vlmkd.errors import UserError
from vlmkd.evaluation.base import Context, Evaluator, Result
from vlmkd.evaluation.efficiency import ParameterCount, count_macs, count_parameters, latency_ms, macs_of
from vlmkd.export.classifier import load_classifier
from vlmkd.files import check_writable
from vlmkd.models.classifier import ClassifierPredictor
from vlmkd.models.clip import ClipModel, load_clip, weights_digest
from vlmkd.models.towers import ClipPredictor
from vlmkd.results import Number, Tags, details_of, numbers_of, parameters, title, write_results

CLASSIFIER = "classifier"
"""Scheme of the names of exported classifiers."""
MODEL_HELP = """model names:
  ViT-B-32/laion2b_s34b_b79k, ViT-B-32@openai   open_clip architecture and tag (or @weights file)
  config.json@weights.safetensors               model config and weights file
  zoo:NAME, or NAME alone                       entry of MODEL_ZOO.md (fetched when it is not in the cache)
  runs/my_run, runs/my_run/export               a run's export (a CLIP or a classifier)
  local-dir:PATH                                open_clip folder
  hf:PATH                                       transformers CLIPModel folder
  classifier:FOLDER                             exported classifier (classification only; its classes must be the set's)

Under torchrun (or scripts/launch.sh) the ranks share the work. Exit code 2: bad input, told in one line."""


def parser(description: str) -> argparse.ArgumentParser:
    """Arguments of every evaluation script."""
    result = argparse.ArgumentParser(
        description=description, epilog=MODEL_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument(
        "--model", nargs="+", required=True, metavar="NAME", help="models to evaluate, see below"
    )
    result.add_argument(
        "--name", nargs="+", default=[], help="names of the sets in the table (default: from --data)"
    )
    result.add_argument(
        "--results", default="", metavar="FILE", help="write a line a number to FILE, and details beside it"
    )
    result.add_argument("--batch-size", type=int, default=64, help="images per forward pass (default 64)")
    result.add_argument("--workers", type=int, default=0, help="processes that decode images (default 0)")
    result.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's)")
    result.add_argument("--device", default="", help="cpu, cuda, cuda:1 (default: a GPU when there is one)")
    result.add_argument("--cost", action="store_true", help="add GMACs and latency at batch size 1")
    result.add_argument("--quiet", action="store_true", help="no progress lines")
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
    scheme, colon, _ = name.partition(":")
    if colon and scheme in ("zoo", "local-dir", "hf", CLASSIFIER):
        return name, ""
    if name in zoo.entries():
        return f"zoo:{name}", ""
    path = Path(name).expanduser()
    if path.is_dir():
        return _model_folder(path), ""
    if "@" in name:
        model, _, pretrained = name.partition("@")
        return model, pretrained
    import open_clip

    known = open_clip.list_models()
    model, _, pretrained = name.rpartition("/")
    if model.replace("/", "-") in known and name.replace("/", "-") not in known:
        return model, pretrained
    if name.replace("/", "-") in known or path.suffix == ".json":
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name.replace("/", "-")))
        choice = f"one of: {tags}" if tags else "a weights file"
        raise UserError(f"--model {name} names no weights; write {name}@ and {choice}")
    if "/" in name and not difflib.get_close_matches(model, known, n=1):
        raise UserError(
            f"--model {name}: no such folder, nor ARCHITECTURE/TAG of open_clip; correct the path"
        )
    if "/" in name:
        return model, pretrained  # load_clip suggests the right architecture
    zoo.entry(name)  # raises with the nearest names of the zoo
    raise AssertionError("unreachable: zoo names were handled above")


def _model_folder(path: Path) -> str:
    layouts = (("open_clip_config.json", "local-dir"), ("config.json", "hf"), ("classifier.json", CLASSIFIER))
    for file, scheme in layouts:
        for folder in (path, path / "export"):
            if (folder / file).is_file():
                return f"{scheme}:{folder}"
    raise UserError(
        f"--model {path}: neither it nor its export/ has an open_clip_config.json, config.json or classifier.json"
    )


_GAP = 2  # spaces between columns
_DIGITS = {"share": 2, "": 4, "nats": 4}


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
    try:
        context = _start(args)
        models = [model_name(name) for name in args.model]
        evaluators = make_evaluators(context)
        for name, (model, pretrained) in zip(args.model, models, strict=True):
            found.append(_evaluate(name, model, pretrained, evaluators, context, cost=args.cost))
            if args.results and distributed.is_main():
                _write(Path(args.results), found)
    except UserError as error:
        _print_table(found)
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    _print_table(found)
    return 0


def _start(args: argparse.Namespace) -> Context:
    """Check the options and start the ranks that a launcher asked for."""
    for option in ("batch_size", "workers", "threads"):
        if getattr(args, option) < (option == "batch_size"):
            raise UserError(f"--{option.replace('_', '-')} {getattr(args, option)} is too small")
    if args.results:
        check_writable(args.results, "--results")
    if args.threads:
        torch.set_num_threads(args.threads)
    keep_freed_memory()
    if int(distributed.environment()["WORLD_SIZE"]) > 1:
        os.environ.update(distributed.environment())
        dist.init_process_group("nccl" if torch.cuda.is_available() and args.device != "cpu" else "gloo")
    return Context(
        distributed.device_named(args.device), args.batch_size, args.workers, progress=not args.quiet
    )


def _evaluate(
    name: str, model: str, pretrained: str, evaluators: Sequence[Evaluator], context: Context, *, cost: bool
) -> Evaluated:
    predictor: Any
    if model.startswith(f"{CLASSIFIER}:"):
        predictor = load_classifier(Path(model.partition(":")[2]).expanduser(), name)
        module = predictor.module.to(context.device)
        digest = weights_digest(module.state_dict())
        counted = ParameterCount(sum(part.numel() for part in module.parameters()), 0, 0, 0)
        costs = _classifier_cost(predictor, context.device) if cost else {}
    else:
        clip = load_clip(model, pretrained)
        module = clip.module.to(context.device)
        predictor, digest, counted = ClipPredictor.of(clip, name), clip.digest, count_parameters(module)
        costs = _cost(clip, context.device) if cost else {}
    results = [result for evaluator in evaluators for result in evaluator.run(predictor, context)]
    return Evaluated(name, digest, {**asdict(counted), "total": counted.total}, costs, results)


def _classifier_cost(predictor: ClassifierPredictor, device: torch.device) -> dict[str, tuple[float, str]]:
    images = torch.zeros(1, 3, *predictor.image_spec.size, device=device)
    return {
        "multiply-adds": (macs_of(predictor.module, predictor.classify, images) / 1e9, "G"),
        "image": (latency_ms(predictor.classify, images), "ms"),
    }


def _cost(clip: ClipModel, device: torch.device) -> dict[str, tuple[float, str]]:
    module: Any = clip.module
    images = torch.zeros(1, 3, *clip.image_spec.size, device=device)
    tokens = clip.tokenizer(["a photo"]).to(device)
    vision, text = count_macs(module, images, tokens)
    return {
        "multiply-adds": ((vision + text) / 1e9, "G"),
        "image": (latency_ms(module.encode_image, images), "ms"),
        "text": (latency_ms(module.encode_text, tokens), "ms"),
    }


def table(numbers: Sequence[Number]) -> str:
    """Plain-text table: one line per model, data sets above their metrics; shares in per cent, parameters in millions."""
    models = list(dict.fromkeys(one.model for one in numbers))
    datasets = list(dict.fromkeys(one.dataset for one in numbers))
    first = {one.key: one for one in reversed(numbers)}
    columns = sorted(dict.fromkeys(one.key for one in numbers), key=lambda key: datasets.index(key[0]))
    values = {(one.model, one.key): one.shown(_DIGITS.get(one.unit)) for one in numbers}
    lines = [["model", *(title(first[key]) for key in columns)]]
    lines += [[model, *(values.get((model, key), "–") for key in columns)] for model in models]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    above, start = " " * (widths[0] + _GAP), 1
    for name in sorted(datasets, key=datasets.index):
        end = start + sum(dataset == name for dataset, _ in columns)
        span = sum(widths[start:end]) + _GAP * (end - start - 1)
        widths[end - 1] += max(len(name) - span, 0)
        above += name.center(max(span, len(name))) + " " * _GAP
        start = end
    return "\n".join([above.rstrip(), *(_line(line, widths) for line in lines)])


def _line(cells: list[str], widths: list[int]) -> str:
    """The first cell to the left, the others to the right of their columns."""
    aligned = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
    return (" " * _GAP).join([cells[0].ljust(widths[0]), *aligned[1:]])


def _print_table(found: list[Evaluated]) -> None:
    if found and distributed.is_main():
        print(table([number for one in found for number in one.numbers()]))


def _write(path: Path, found: list[Evaluated]) -> None:
    details = {
        "command": sys.argv,
        "torch": torch.__version__,
        "parameters": {one.name: one.parameters for one in found},
        "models": details_of({one.name: one.results for one in found}),
    }
    write_results(path, [number for one in found for number in one.numbers()], details, "--results")
