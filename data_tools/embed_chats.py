r"""Store what a multimodal teacher says of chats, so that training needs no teacher.

    python data_tools/embed_chats.py --model runs/chat/teacher --chats chats.json --out runs/chat/teacher_chats
    NPROC=8 bash scripts/launch.sh data_tools/embed_chats.py --model runs/chat/teacher --chats 'shards/*.tar' \
        --out runs/chat/teacher_shards --precision bf16

Of each token of an answer the k likeliest next tokens with their log-probabilities, and the mass of all others; of
preference pairs the log-probabilities of both answers. Name the folder in `data.teacher_outputs`; template, length and
temperature have to be the run's. Ranks share the work; an interrupted call continues where it stopped, and another list of
chats adds to the folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from data_tools.shard_writer import ShardWriter
from data_tools.told import tell, tell_complete
from scripts import chat
from scripts import evaluation_command as command
from vlmkd.chat_ids import IGNORED
from vlmkd.chat_runs import is_shards
from vlmkd.data.chat_outputs import ChatOutputsInfo, chat_bytes, chat_key, record_key
from vlmkd.data.chats import ChatItem, ChatPipeline, parts_of, read_chats
from vlmkd.data.samples import RawSample
from vlmkd.data.shards import expand, read_shard
from vlmkd.data.teacher_outputs import Prepared, Writer
from vlmkd.errors import UserError, at_least, run_tool
from vlmkd.export.mllm import export_digest
from vlmkd.losses.preference import answer_log_probs
from vlmkd.models.mllm import Mllm

_ROWS = 256  # positions whose logits are held at a time


def main(argv: list[str]) -> int:
    """Run the tool; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    chat.add_model_options(parser, required=True)
    add, count = parser.add_argument, at_least(0)
    add("--chats", nargs="+", required=True, help="as data.chats")
    add("--images", default="", help="as data.images")
    add("--out", required=True, type=Path, help="folder of the outputs")
    add("--max-length", type=at_least(1), default=2048, help="as data.max_length (default 2048)")
    add("--k", type=at_least(1), default=64, help="entries of a position (default 64)")
    add("--temperature", type=float, default=1.0, help="as loss.temperature (default 1)")
    add(
        "--vocabulary",
        type=count,
        default=0,
        help="as loss.vocabulary; the student's where it has fewer (default: all)",
    )
    add("--fp32", action="store_true", help="store float32 instead of float16")
    add("--batch-size", type=at_least(1), default=8, help="chats per forward pass (default 8)")
    add("--part-size", type=at_least(1), default=2000, help="chats of a file of outputs (default 2000)")
    add("--max-pixels", type=at_least(1), default=89_478_485, help="as data.max_pixels")
    add("--workers", type=count, default=0, help="processes that read and decode chats of files")
    add("--threads", type=count, default=0, help="CPU threads; 0: torch's default")
    args = parser.parse_args(argv)
    if not 0 < args.temperature < float("inf"):
        raise UserError(f"--temperature {args.temperature} is not above 0")
    args.results, args.quiet = "", False
    return command.on_ranks(lambda: _embed(args))


def _embed(args: argparse.Namespace) -> None:
    device = command.start(args).device
    shards = expand(args.chats, "--chats") if is_shards(args.chats, "--chats") else []
    items = {} if shards else _items(args.chats, args.images)
    model = chat.load(args)
    pipeline = ChatPipeline(
        model.tokens, model.image_spec, max_length=args.max_length, max_pixels=args.max_pixels
    )
    first = (
        next(read_shard(shards[0])).members.get("json", b"")
        if shards
        else next(iter(items.values())).content()
    )
    info = outputs_info(
        pipeline, model.model, args, pairs=_is_pair(first), set_name="" if shards else "chats"
    )
    embed = partial(said, model=model.model, pipeline=pipeline, info=info, device=device)
    make = partial(prepared, pipeline=pipeline)

    if shards:
        skipped = ShardWriter(args.out, info, embed, args.batch_size, make, tell).shards(shards)
    else:
        of_item = partial(_of_item, make=make)
        writer = Writer(args.out, info, embed, args.batch_size, of_item, tell)
        skipped = writer.items(list(items.values()), args.part_size, args.workers)
    tell_complete(args.out, skipped)


def outputs_info(
    pipeline: ChatPipeline, model: Mllm, args: Any, *, pairs: bool, set_name: str
) -> ChatOutputsInfo:
    """What the folder's cache.json says."""
    size = len(model.head.weight)
    if args.vocabulary > size:
        raise UserError(f"--vocabulary is {args.vocabulary}, but the teacher has {size} entries")
    vocabulary = args.vocabulary or size
    of_tokens = {"temperature": args.temperature, "vocabulary": vocabulary, "k": min(args.k, vocabulary)}
    return pipeline.outputs_info(
        source=args.model, digest=export_digest(args.model), precision=args.precision, pairs=pairs, set_name=set_name,
        dtype="float32" if args.fp32 or pairs else "float16", **({} if pairs else of_tokens),
    )  # fmt: skip


@torch.inference_mode()
def said(
    batch: list[Prepared],
    model: Mllm,
    pipeline: ChatPipeline,
    info: ChatOutputsInfo,
    device: torch.device,
) -> dict[str, Tensor]:
    """The columns of these chats: see `vlmkd.data.chat_outputs`."""
    chats = [one.chat for one in batch]
    if any(len(one.rows) != 1 + info.pairs for one in chats):
        raise UserError(
            "--chats: preference records and plain ones do not go into one folder; embed them apart"
        )
    tensors = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in pipeline.collate(chats).items()}
    hidden, targets, head = model(tensors), tensors["targets"], model.head
    if info.pairs:
        sums = answer_log_probs(hidden, head.weight, targets, bias=head.bias, chunk=_ROWS).sums
        return {"sums": sums.float().view(2, len(batch)).T.cpu()}
    learned = targets != IGNORED
    parts = [top_k(head(rows), info) for rows in hidden[learned].split(_ROWS)]
    columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return columns | {"counts": learned.sum(1).cpu()}


def top_k(logits: Tensor, info: ChatOutputsInfo) -> dict[str, Tensor]:
    """The largest log-probabilities [R,k] of logits [R,V], their entries, and the logarithm [R] of the rest's mass."""
    log_p = (logits[:, : info.vocabulary].float() / info.temperature).log_softmax(-1)
    values, ids = log_p.topk(info.k)
    tail = log_p.scatter(1, ids, -torch.inf).logsumexp(-1)  # 1 - the others would cancel
    return {"log_probs": values.cpu(), "ids": ids.int().cpu(), "log_tail": tail.cpu()}


def prepared(raw: RawSample, pipeline: ChatPipeline) -> Prepared:
    """A chat in tokens and pixels."""
    found = pipeline.process(raw)
    return Prepared(chat_key(raw), chat_bytes(found.rows, parts_of(raw.members)[1]), [], [], chat=found)


def _is_pair(record: bytes) -> bool:
    try:
        found = json.loads(record)
    except ValueError:
        return False
    return isinstance(found, dict) and "chosen" in found


def _items(files: Sequence[str], images: str) -> dict[str, ChatItem]:
    """The records of the files by the key that they are stored under; those that come twice, once."""
    items = [item for path in files for item in read_chats(path, images or str(Path(path).parent))]
    if not items:
        raise UserError(f"--chats {files[0]} holds no records")
    found = {record_key(item.content()): item for item in items}
    return {key: replace(item, key=key) for key, item in found.items()}


def _of_item(item: ChatItem, make: Callable[[RawSample], Prepared]) -> Prepared:
    return make(RawSample("", item.key, item.members()))


if __name__ == "__main__":
    run_tool(main)
