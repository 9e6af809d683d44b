"""Exports as the model `vlmkd` of lmms-eval, which finds this module by its entry point and is imported by nobody else.

    python -m lmms_eval --model vlmkd --model_args pretrained=runs/chat/prefer --tasks pope --batch_size 16

`model_args` are those of `vlmkd.chat_runs.open_chat`: pretrained, project, template, precision.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any, TypeVar

import projects
from vlmkd import distributed
from vlmkd.errors import UserError

A = TypeVar("A")
Picture = tuple[list[bytes], list[tuple[str, str]], str]
"""Images, no turns before, and the question: as `ChatModel.answer` takes it."""
_IMAGE = "<image>"
_TOKENS = 1024
"""Longest answer where the task says nothing: lmms-eval's own LLaVA."""


def manifest() -> Any:
    """What lmms-eval registers."""
    made = import_module("lmms_eval.models.registry_v2").ModelManifest
    return made(model_id="vlmkd", simple_class_path=f"{__name__}.Exported")


class Exported(import_module("lmms_eval.api.model").lmms):  # type: ignore[misc]
    """An exported multimodal model; the ranks of `accelerate launch` or torchrun have a GPU each."""

    def __init__(
        self,
        pretrained: str,
        project: str = "",
        template: str = "",
        precision: str = "fp32",
        batch_size: int | str = 1,
        device: str = "",
        max_batch_size: Any = None,
    ) -> None:
        super().__init__()
        # Here, because lmms-eval imports its plug-ins whatever is evaluated.
        from vlmkd.chat_runs import open_chat

        if not str(batch_size).isdigit() or not int(batch_size):
            raise UserError(f"--batch_size {batch_size} is not supported; give a number")
        if precision not in ("fp32", "bf16"):
            raise UserError(f"precision={precision} is not supported; give fp32 or bf16")
        self.batch_size = int(batch_size)
        alone = distributed.environment()["WORLD_SIZE"] == "1"
        self.device = distributed.device_named(device if alone else "")
        self.chat = open_chat(
            str(pretrained), projects.surgery_of, project=project, template=template, precision=precision,
            device=str(self.device),
        )  # fmt: skip

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers, greedy unless the task's `temperature` says otherwise, each cut at the first text of `until`."""

        def answers(kwargs: str, asked: list[Picture]) -> list[str]:
            wanted = json.loads(kwargs)
            sampled = float(wanted.get("temperature") or 0) if wanted.get("do_sample") is not False else 0.0
            options = {"top_p": wanted["top_p"]} if sampled and wanted.get("top_p") else {}
            if int(wanted.get("num_beams") or 1) > 1:
                options["num_beams"] = int(wanted["num_beams"])
            most = int(wanted.get("max_new_tokens") or _TOKENS)
            said = self.chat.answer(asked, most_tokens=most, temperature=sampled, **options)
            until = wanted.get("until") or []
            return [_until(text, [until] if isinstance(until, str) else until) for text in said]

        asked = []
        for request in requests:
            context, kwargs, *document = request.args
            group = json.dumps(kwargs, sort_keys=True, default=str)
            asked.append((group, self._asked(context, *document)))
        return self._batched(asked, answers)

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Mean cross entropy of each continuation and its end, and whether greedy decoding says it.

        The loss, not its negative, which the base class's text asks for: lmms-eval's own models return it, and its choice
        among continuations is the smallest. Each pair is wrapped, because 0.7.3 turns a bare one into text.
        """
        wrapped = import_module("lmms_eval.api.instance").GenerationResult
        asked = []
        for request in requests:
            context, target, *document = request.args
            text = target(self._document(*document[1:])) if callable(target) else target
            asked.append(("", (*self._asked(context, *document), str(text).strip())))
        return self._batched(asked, lambda _, batch: [wrapped(text=one) for one in losses(self.chat, batch)])

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not offered."""
        raise NotImplementedError("vlmkd asks in one round; leave out tasks of several")

    def _document(self, doc_id: Any, task: str, split: str) -> Any:
        return self.task_dict[task][split][doc_id]

    def _asked(self, context: str, doc_to_visual: Any = None, *document: Any) -> Picture:
        """A question with its images, marked as in training: a mark each, before the text unless they stand in it."""
        visuals = doc_to_visual(self._document(*document)) if doc_to_visual else []
        images = [_file(one) for one in visuals or [] if one is not None]
        if context.count(_IMAGE) != len(images):
            context = f"{_IMAGE}\n" * len(images) + context.replace(_IMAGE, "").strip()
        return images, [], context

    def _batched(self, asked: Sequence[tuple[str, Any]], run: Callable[[str, list[Any]], list[A]]) -> list[A]:
        """`run` on batches of what has one group and about one length, results in the order of `asked`."""
        from tqdm import tqdm

        order = sorted(range(len(asked)), key=lambda number: (asked[number][0], len(asked[number][1][2])))
        found: dict[int, A] = {}
        with tqdm(total=len(asked), desc="vlmkd", disable=self.rank != 0) as line:
            for numbers in _runs(order, [group for group, _ in asked], self.batch_size):
                results = run(asked[numbers[0]][0], [asked[number][1] for number in numbers])
                found |= dict(zip(numbers, results, strict=True))
                line.update(len(numbers))
        return [found[number] for number in range(len(asked))]


def losses(
    chat: Any, asked: Sequence[tuple[list[bytes], list[tuple[str, str]], str, str]]
) -> list[tuple[float, bool]]:
    """Of what a `ChatModel` is asked, and an answer: mean cross entropy of the answer's tokens and its end, and whether
    they are what is said greedily.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    device = next(chat.model.parameters()).device
    rows = [chat.tokens.encode([*turns, (question, answer)]) for _, turns, question, answer in asked]
    ids = [torch.tensor(row, device=device) for row, _ in rows]
    images = chat.pictures_of([data for images, *_ in asked for data in images]).to(device)
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True),
        "segments": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "images": images,
        "image_rows": torch.arange(len(images), device=device),
    }
    found = []
    with torch.no_grad():
        for row, hidden, (_, learned), one in zip(ids, chat.model(batch), rows, asked, strict=True):
            # Without any prompt nothing predicts the first token.
            start = max(1, len(chat.tokens.prompt(*one[1:3])))
            end = start + sum(learned[start:])  # what stands behind an answer's end is not learned
            logits = chat.model.head(hidden[start - 1 : end - 1]).float()
            loss = torch.nn.functional.cross_entropy(logits, row[start:end])
            found.append((loss.item(), bool((logits.argmax(dim=1) == row[start:end]).all())))
    return found


def _runs(order: Sequence[int], groups: Sequence[str], most: int) -> Iterator[list[int]]:
    """At most so many neighbours of `order` that have one group."""
    batch: list[int] = []
    for number in order:
        if batch and (len(batch) == most or groups[batch[0]] != groups[number]):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _until(text: str, ends: Sequence[str]) -> str:
    return min((text.partition(end)[0] for end in ends if end), key=len, default=text).strip()


def _file(image: Any) -> bytes:
    if not hasattr(image, "convert"):
        raise UserError(f"a task shows {type(image).__name__}, which is no image; choose tasks about images")
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()
