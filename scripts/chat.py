#!/usr/bin/env python
"""Talk with an exported multimodal model about a picture; answers come word by word.

  python scripts/chat.py --model runs/chat/teacher --image photo.jpg
  python scripts/chat.py --model runs/chat/prefer --image photo.jpg --question "What is at the top left?"

Each question sees the turns before it. `/image FILE` begins anew with another picture, `/new` with the same one; Ctrl-C
ends an answer, an empty line or Ctrl-D the conversation. Without --image the model is asked by text alone.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers

import projects
from vlmkd.chat_runs import open_chat
from vlmkd.data.chats import IMAGE, TEMPLATES
from vlmkd.data.decode import BadSample, image_size
from vlmkd.errors import UserError, at_least, run_tool
from vlmkd.evaluation.answers import ChatModel
from vlmkd.files import unreadable

NEW, OTHER = "/new", "/image"


def add_model_options(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """The options that `load` reads."""
    add = parser.add_argument
    add(
        "--model",
        required=required,
        default="",
        metavar="EXPORT",
        help="a run, its `export` folder or zoo:NAME",
    )
    add("--project", default="", help="whose model it is (default: as the export says)")
    add("--template", choices=list(TEMPLATES), help="how a conversation is written (default: as in training)")
    add("--precision", choices=["fp32", "bf16"], default="fp32", help="of the weights (default fp32)")
    add("--device", default="", help="cpu, cuda, cuda:1 (default: a GPU when there is one)")


def load(args: argparse.Namespace) -> ChatModel:
    """The model that the options name.

    Raises:
        UserError: no export, or one of a project that is not here.
    """
    transformers.utils.logging.disable_progress_bar()
    return open_chat(
        args.model, projects.surgery_of, project=args.project, template=args.template, precision=args.precision,
        device=args.device,
    )  # fmt: skip


class Conversation:
    """Turns about one picture, or none."""

    def __init__(self, image: str, *, most_tokens: int, temperature: float) -> None:
        self.most_tokens, self.temperature = most_tokens, temperature
        self.begin(image)

    def begin(self, image: str) -> None:
        """Forget the turns; look at `image`."""
        try:
            self.images = [Path(image).expanduser().read_bytes()] if image else []
            for data in self.images:
                image_size(data)
        except OSError as error:
            raise unreadable(error, image, "image") from None
        except BadSample:
            raise UserError(f"image {image} is no picture that can be read; name another") from None
        self.image, self.turns = image, list[tuple[str, str]]()

    def ask(self, model: ChatModel, question: str) -> str:
        """The answer, which is printed while it comes."""
        if IMAGE in question:
            raise UserError(f"leave {IMAGE} out of the question; the picture is put before the first one")
        text = question if self.turns or not self.images else f"{IMAGE}\n{question}"
        streamer = transformers.TextStreamer(model.tokens.tokenizer, skip_special_tokens=True)
        (said,) = model.answer(
            [(self.images, self.turns, text)], most_tokens=self.most_tokens, temperature=self.temperature,
            streamer=streamer,
        )  # fmt: skip
        self.turns.append((text, said))
        return said


def main(argv: list[str]) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_options(parser, required=True)
    parser.add_argument("--image", default="", metavar="FILE", help="the picture")
    parser.add_argument("--question", help="ask this alone")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): the likeliest words")
    parser.add_argument("--most-tokens", type=at_least(1), default=256, help="longest answer (default 256)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of sampled answers (default 0)")
    args = parser.parse_args(argv)
    if not 0 <= args.temperature < float("inf"):
        raise UserError(f"--temperature {args.temperature} is not 0 or more")
    talk = Conversation(args.image, most_tokens=args.most_tokens, temperature=args.temperature)
    model = load(args)
    torch.manual_seed(args.seed)
    if args.question is not None:
        if not args.question.strip():
            raise UserError("--question is empty; write a question, or leave it out to talk")
        with suppress(KeyboardInterrupt):
            talk.ask(model, args.question)
        return 0
    if sys.stdin.isatty():
        print(f"{OTHER} FILE: another picture; {NEW}: begin anew; empty line: end")
    while question := _next():
        try:
            command, _, file = question.partition(" ")
            if question == NEW:
                talk.begin(talk.image)
            elif command == OTHER and file:
                talk.begin(file.strip().strip("\"'"))
                print(f"{OTHER}: {talk.image}")
            elif question.startswith("/"):
                raise UserError(f"{command} is no command; write {OTHER} FILE or {NEW}")
            else:
                talk.ask(model, question)
        except UserError as error:  # a typing mistake ends no conversation
            print(error, file=sys.stderr)
        except KeyboardInterrupt:  # nor does an answer that is long enough; it is forgotten
            print()
    return 0


def _next() -> str:
    """What is typed next; empty at the end."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return ""


if __name__ == "__main__":
    run_tool(main)
