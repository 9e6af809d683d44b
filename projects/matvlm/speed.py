"""How fast hybrids read and write, and with how much memory, beside the model that they were: over context lengths.

    python -m projects.matvlm.speed TEACHER [--hybrids EXPORT ...] [--presets 12.5 25 50] [--lengths 256 1024 4096]
        [--results speed.jsonl]

TEACHER is smollm2, hf:FOLDER_OR_NAME, or an export; presets are made of it without training, since speed does not
depend on values. The language models alone, by transformers' forward with its growing cache: a prefill of the whole
context that keeps the last token's logits, then tokens one by one, the likeliest each, without compilation or CUDA
graphs; on a GPU, or a CPU where none is visible.

Models take turns, and medians of the rounds are shown. On a CPU every measurement is a process of its own, so that its
peak memory is its own; seconds are those of the CPU with one thread, of the clock with more. Memory is that of the
weights, plus the most that was added to them.

Beside the numbers stands what they can be (docs/papers/matvlm.md#speed), relative to the teacher: a prefill bound by its
products, decoding by the bytes of weights and cache.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import multiprocessing
import platform
import signal
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from projects.matvlm.config import HybridConfig
from projects.matvlm.mixer import Mamba2Mixer, kernels
from projects.matvlm.ssd import CHUNK
from projects.matvlm.student import surgery
from projects.matvlm.surgery import mixers_of, to_hybrid
from vlmkd import memory
from vlmkd.errors import UserError, at_least, run_tool
from vlmkd.evaluation.base import Result
from vlmkd.export.mllm import CONFIG, export_folder, load_mllm
from vlmkd.files import new_file
from vlmkd.models.mllm import load_decoder
from vlmkd.results import Meaning, Number, markdown, numbers_of, write_results

MIB = 2**20
WARM_UP = 64
"""Tokens of the untimed pass before each measurement, which is followed by two steps."""
TEACHER = "teacher"
MEANINGS = {
    "prefill": Meaning(unit="tokens/s", higher_is_better=True, main=True),
    "decode": Meaning(unit="tokens/s", higher_is_better=True, main=True),
    "memory": Meaning("peak memory", "MiB", higher_is_better=False, main=True),
    "cache": Meaning(unit="MiB", higher_is_better=False),
    "work": Meaning("products of a prefill", "GFLOP/token", higher_is_better=False),
    "traffic": Meaning("bytes of a decoded token", "MiB", higher_is_better=False),
}


class Speed(NamedTuple):
    """What was measured: tokens of all rows a second, and bytes."""

    prefill: float
    decode: float
    memory: float


class Floor(NamedTuple):
    """What no implementation can do without (docs/papers/matvlm.md#speed)."""

    work: float
    """FLOP a token of a prefill, 2 a multiply-add, all layers, causal attention, without the head."""
    traffic: float
    """Bytes that decoding one token of every row has to read and write."""
    cache: float
    """Bytes of keys, values and states."""


def floor_of(model: PreTrainedModel, length: int, batch: int = 1) -> Floor:
    """Of `batch` rows of `length` tokens; the weights' values are not needed (meta device)."""
    head, embed = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    read = [p for p in model.parameters() if p is not embed or p is head]
    work, cache, traffic = 0.0, 0.0, float(sum(p.numel() * p.element_size() for p in read))
    for layer in model.get_decoder().layers:
        mixer = layer.self_attn
        work += 2 * sum(one.weight.numel() for one in layer.modules() if isinstance(one, nn.Linear))
        if isinstance(mixer, Mamba2Mixer):
            shape, size = mixer.shape, mixer.shape.head_dim
            channels = shape.inner + 2 * shape.shared
            work += 2 * shape.taps * channels + shape.heads * (4 * mixer.chunk * size + 4 * size**2)
            bytes_each = mixer.conv1d.weight.element_size()
            kept = batch * (4 * shape.heads * size**2 + (shape.taps - 1) * channels * bytes_each)
            traffic += 2 * kept
        else:
            keys = mixer.k_proj
            work += 2 * mixer.q_proj.out_features * length
            kept = batch * length * 2 * keys.out_features * keys.weight.element_size()
            traffic += kept
        cache += kept
    return Floor(work, traffic, cache)


def crossover(teacher: PreTrainedModel, hybrid: PreTrainedModel) -> float:
    """The context from which on a prefill of the hybrid has fewer products."""
    short, long = ([floor_of(one, length).work for one in (teacher, hybrid)] for length in (0, 1))
    return (short[1] - short[0]) / ((long[0] - short[0]) - (long[1] - short[1]))


@torch.no_grad()
def measure(model: PreTrainedModel, length: int, batch: int, new: int, threads: int) -> Speed:
    """One prefill and `new` tokens after it, in this process."""
    torch.set_num_threads(threads)
    cuda = model.device.type == "cuda"
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (batch, length), generator=generator).to(model.device)

    def clock() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.process_time() if threads == 1 and not cuda else time.perf_counter()

    def step(tokens: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        out = model(tokens, cache=cache, use_cache=True, logits_to_keep=1)
        return out.logits.argmax(-1)

    def pass_over(tokens: torch.Tensor, count: int) -> tuple[float, float]:
        cache = DynamicCache(config=model.config)
        start = clock()
        token = step(tokens, cache)
        read = clock()
        for _ in range(count):
            token = step(token, cache)
        return read - start, clock() - read

    # On a GPU as long as what is timed: kernels are chosen by sizes.
    pass_over(ids if cuda else ids[:, :WARM_UP], 2)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = memory.held()
    prefill, decode = pass_over(ids, new)
    added = max(0, memory.peak() - before)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return Speed(batch * length / prefill, batch * new / decode, float(weights + added))


def apart(work: Callable[[], Speed]) -> Speed | None:
    """`work` in a child of this process, whose peak begins with what it has now; None: it ran out of memory."""
    if torch.cuda.is_available():
        try:
            return work()
        except torch.OutOfMemoryError:
            return None
        finally:
            torch.cuda.empty_cache()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)  # what was freed here would hide what the child adds
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def measured() -> None:
        try:
            sender.send(work())
        except RuntimeError as error:  # a CPU's allocator has no error of its own
            if "can't allocate memory" not in str(error):
                raise
            sender.send(None)

    child = context.Process(target=measured)
    child.start()
    sender.close()
    try:
        found: Speed | None = receiver.recv()
    except EOFError:
        found = None
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL), "the measurement has failed, see above"
    return found


def load(name: str, precision: str) -> PreTrainedModel:
    """A language model by its name, or that of an export or a run."""
    if ((folder := export_folder(name)) / CONFIG).is_file():
        parts = load_mllm(folder, surgery=surgery, precision=precision)
        return parts.module.decoder.eval()  # type: ignore[return-value]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return load_decoder(name, dtype=dtype)[0].eval()


def _by_kernels() -> bool:
    return torch.cuda.is_available() and bool(kernels()[0])


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the modules on the same tensors."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def models_of(args: argparse.Namespace) -> dict[str, PreTrainedModel]:
    """Teacher and hybrids by their names in tables, on the device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = load(args.teacher, args.dtype).to(device)
    if mixers_of(teacher):
        raise UserError(f"{args.teacher} is a hybrid; name the model before surgery, this one by --hybrids")
    found = {TEACHER: teacher}
    for preset in args.presets:
        options = HybridConfig(preset=preset, chunk=256 if _by_kernels() else CHUNK)
        found[f"{preset:g} % Mamba-2"] = to_hybrid(twin(teacher), options)
    for name in args.hybrids:
        hybrid = load(name, args.dtype).to(device)
        if not mixers_of(hybrid):
            raise UserError(f"{name} has no Mamba-2 layers; name the export of a hybrid")
        found[name] = hybrid
    return found


def table(length: int, measured: Mapping[str, Speed | None], floors: Mapping[str, Floor]) -> list[list[str]]:
    """A row a model."""
    first, floor = measured[TEACHER], floors[TEACHER]
    rows = []
    for name, own in floors.items():
        read = wrote = over_read = over_wrote = peak = ""
        if (found := measured[name]) is None:
            read = "out of memory"
        else:
            read, wrote, peak = f"{found.prefill:,.0f}", f"{found.decode:,.1f}", f"{found.memory / MIB:,.0f}"
            if first is not None:
                over_read, over_wrote = (f"{a / b:.2f}" for a, b in zip(found[:2], first[:2], strict=True))
        by_work, by_bytes = f"{floor.work / own.work:.2f}", f"{floor.traffic / own.traffic:.2f}"
        cells = [read, over_read, by_work, wrote, over_wrote, by_bytes, peak, f"{own.cache / MIB:,.1f}"]
        rows.append([f"{length:,}", name, *cells])
    return rows


HEAD = [
    *("context", "model", "prefill tokens/s", "over teacher", "products allow", "decode tokens/s", "over teacher"),
    *("bytes allow", "peak MiB", "cache MiB"),
]  # fmt: skip


def numbers(
    run: str, length: int, measured: Mapping[str, Speed | None], floors: Mapping[str, Floor], tags: dict[str, Any]
) -> list[Number]:  # fmt: skip
    """The lines of a results file."""
    lines = []
    for name, floor in floors.items():
        metrics = {"cache": floor.cache / MIB, "work": floor.work / 1e9, "traffic": floor.traffic / MIB}
        if (found := measured[name]) is not None:
            metrics |= found._asdict() | {"memory": found.memory / MIB}
        result = Result("speed", "random tokens", metrics, tags["batch"] * length, meanings=MEANINGS)
        lines += numbers_of([result], run=run, model=name, tags={"tokens": length, **tags})
    return lines


def plot(path: Path, lines: list[Number], title: str) -> None:
    """Prefill, decoding and memory over the context; dotted: the teacher's speed times what the floors allow."""
    from matplotlib.figure import Figure

    values = {(one.model, one.metric, one.tags["tokens"]): one.value for one in lines}
    lengths = sorted({length for *_, length in values})
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    figure.suptitle(title, fontsize=9)
    panels = figure.subplots(1, 3)
    shown = (("prefill", "work"), ("decode", "traffic"), ("memory", ""))
    for panel, (metric, floor) in zip(panels, shown, strict=True):
        meaning = MEANINGS[metric]
        for number, model in enumerate(dict.fromkeys(one.model for one in lines)):
            seen = [n for n in lengths if (model, metric, n) in values]
            color, own = f"C{number}", [values[model, metric, n] for n in seen]
            panel.plot(seen, own, "o-", markersize=4, label=model, color=color)
            if floor and model != TEACHER:
                known = [n for n in lengths if (TEACHER, metric, n) in values]
                factors = [values[TEACHER, floor, n] / values[model, floor, n] for n in known]
                bound = [values[TEACHER, metric, n] * one for n, one in zip(known, factors, strict=True)]
                panel.plot(known, bound, ":", linewidth=1, color=color)
        panel.set_xscale("log", base=2)
        panel.set_xticks(lengths, [f"{n:,}" for n in lengths])
        panel.set_ylim(bottom=0)
        panel.set_xlabel("context, tokens")
        panel.set_ylabel(f"{meaning.label or metric}, {meaning.unit}")
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    with new_file(path, "plot") as partial:
        figure.savefig(partial, format="png", dpi=150)


def main(argv: list[str]) -> int:
    """Measure and print a table; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("teacher")
    add("--hybrids", nargs="*", default=[], metavar="EXPORT", help="hybrids that runs have made")
    add("--presets", nargs="*", type=float, default=[12.5, 25, 50], help="hybrids made here")
    add("--lengths", nargs="+", type=at_least(1), default=[256, 1024, 4096])
    add("--new", type=at_least(1), default=32, help="tokens that are decoded")
    add("--batch", type=at_least(1), default=1)
    add("--dtype", choices=["fp32", "bf16"], default="fp32")
    add("--threads", type=at_least(1), default=1, help="of a CPU")
    add("--rounds", type=at_least(1), default=3)
    add("--results", type=Path, help="results file; the plot stands beside it as .png")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # a process that had more could not be forked
    models = models_of(args)
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else "CPU"
    threads = 0 if cuda else args.threads
    tags = {"device": device, "dtype": args.dtype, "batch": args.batch, "threads": threads}
    path = "mamba-ssm's kernels" if _by_kernels() else "PyTorch"
    title = ", ".join(
        [
            f"{args.teacher}, {device}" + ("" if cuda else f", {args.threads} thread(s)"), args.dtype,
            f"batch {args.batch}", f"{args.new} tokens decoded", f"median of {args.rounds}",
            f"torch {torch.__version__}, Mamba-2 by {path}",
        ]
    )  # fmt: skip
    print(title + "\n")
    lines: list[Number] = []
    rows = []
    for length in sorted(args.lengths):
        floors = {name: floor_of(model, length, args.batch) for name, model in models.items()}
        found: dict[str, list[Speed | None]] = {name: [] for name in models}
        for _ in range(args.rounds):
            for name, model in models.items():
                work = partial(measure, model, length, args.batch, args.new, args.threads)
                found[name].append(apart(work))
        measured = {name: median(own) for name, own in found.items()}
        rows += table(length, measured, floors)
        run = args.results.stem if args.results else "speed"
        lines += numbers(run, length, measured, floors, tags)
        if args.results:  # after every length: the next may take long
            write_results(args.results, lines, what="--results")
            plot(args.results.with_suffix(".png"), lines, title)
    print(markdown(HEAD, rows, 2))
    for name, model in models.items():
        if name != TEACHER:
            at = crossover(models[TEACHER], model)
            print(f"{name}: fewer products than the teacher's prefill from {at:,.0f} tokens on")
    return 0


def median(found: list[Speed | None]) -> Speed | None:
    """Of each number; None where a round ran out of memory."""
    rounds = [one for one in found if one is not None]
    return None if len(rounds) < len(found) else Speed(*map(statistics.median, zip(*rounds, strict=True)))


if __name__ == "__main__":
    run_tool(main)
