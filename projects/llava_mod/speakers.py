"""Who answers in CoMD's rounds: an exported model, answers that were saved before, or a service of OpenAI's chat form.

A speaker takes requests and yields (key, answer) as the answers come. `collect` keeps them in a file, from which a
command that was stopped goes on, and which is itself a speaker.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from projects import surgery_of
from vlmkd.chat_runs import open_chat
from vlmkd.data.chats import IMAGE, ChatItem
from vlmkd.errors import UserError
from vlmkd.files import one_line, read_text
from vlmkd.service import AnswerLost, HttpService, NotServed, Service

_LARGEST_ANSWER = 1 << 24  # bytes of a reply


@dataclass(frozen=True)
class Request:
    """A question, with `<image>` where a picture stands."""

    key: str
    text: str
    before: Sequence[tuple[str, str]] = ()
    """Turns before it."""
    item: ChatItem | None = None
    """Whose pictures are shown; None: none."""

    def images(self) -> list[bytes]:
        """The picture files."""
        members = self.item.members() if self.item is not None else {}
        return [data for name, data in members.items() if name != "json"]


Answerer = Callable[[Sequence[Request]], Iterable[tuple[str, str]]]


class Replayed:
    """The answers of a file that `collect` wrote, or of lines {"id": ..., "said": ...}."""

    def __init__(self, path: Path) -> None:
        self._path, self._said = path, {key: line["said"] for key, line in _lines(path).items()}

    def __call__(self, requests: Sequence[Request]) -> Iterator[tuple[str, str]]:
        for request in requests:
            if request.key not in self._said:
                raise UserError(
                    f"{self._path} has no answer to {request.key}; ask again, or name another file"
                )
            yield request.key, self._said[request.key]


class Local:
    """An exported model on this machine, which answers greedily."""

    def __init__(self, folder: Path, *, most_tokens: int, device: str, precision: str) -> None:
        self._model = open_chat(str(folder), surgery_of, precision=precision, device=device)
        self._most = most_tokens

    def __call__(self, requests: Sequence[Request]) -> Iterator[tuple[str, str]]:
        asked = [(one.images(), one.before, one.text) for one in requests]
        said = self._model.answer(asked, most_tokens=self._most)
        yield from zip([one.key for one in requests], said, strict=True)


class Endpoint(HttpService):
    """A service that speaks OpenAI's chat form; requests that are given together are asked at the same time."""

    def __init__(self, cfg: Service, model: str, most_tokens: int) -> None:
        super().__init__(cfg)
        self._asks = {"model": model, "max_tokens": most_tokens, "temperature": 0}

    def __call__(self, requests: Sequence[Request]) -> Iterator[tuple[str, str]]:
        failed = None
        with ThreadPoolExecutor(max(1, len(requests))) as pool:
            calls = {pool.submit(self._one, request): request.key for request in requests}
            for call in as_completed(calls):  # what came beside a call that failed is kept
                if error := call.exception():
                    failed = failed or error
                else:
                    yield calls[call], call.result()
        if failed is not None:
            raise failed

    def _one(self, request: Request) -> str:
        """The answer; empty where the service does not accept the question."""
        turns = [zip(("user", "assistant"), turn, strict=True) for turn in request.before]
        said = [{"role": role, "content": plain(text)} for turn in turns for role, text in turn]
        pictures = [{"type": "image_url", "image_url": {"url": _url(data)}} for data in request.images()]
        words = plain(request.text)
        content: Any = [*pictures, {"type": "text", "text": words}] if pictures else words
        messages = [*said, {"role": "user", "content": content}]
        try:
            reply = json.loads(self.post({**self._asks, "messages": messages}, _LARGEST_ANSWER))
            answer = reply["choices"][0]["message"]["content"]
        except NotServed as error:
            if error.refused:
                return ""
            raise UserError(f"{request.key}: {error}; what came before is kept, start again later") from None
        except AnswerLost as error:
            raise UserError(
                f"{request.key}: {error}; the call may be charged; what came before is kept, start again"
            ) from None
        except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
            raise UserError(
                f"{request.key}: the reply is not of OpenAI's chat form ({type(error).__name__}); give the whole address, "
                "https://.../v1/chat/completions"
            ) from None
        return str(answer or "").strip()


def plain(text: str) -> str:
    """Without the places of pictures."""
    return text.replace(IMAGE, "").strip()


def _url(data: bytes) -> str:
    try:
        kind = Image.open(io.BytesIO(data)).get_format_mimetype()  # type: ignore[attr-defined]
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"a picture cannot be read ({one_line(error).partition(' <')[0]})") from None
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def collect(
    speaker: Callable[[], Answerer], requests: Sequence[Request], out: Path, batch_size: int
) -> dict[str, str]:
    """Key -> answer of all requests; those in the file `out` are not asked, the others are added to it as they come.

    `speaker` makes the one who answers, and is called only where somebody has to.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.is_file():
        text = read_text(out, "answers")
        if not text.endswith("\n"):  # half a line, of a process that was killed
            out.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
    known = _lines(out) if out.is_file() else {}
    for request in requests:
        asked = known.get(request.key, {}).get("asked", request.text)
        if asked != request.text:
            raise UserError(f"{out}: {request.key} was another question ({asked[:60]!r}); name another file")
    said = {key: line["said"] for key, line in known.items()}
    waiting = {one.key: one for one in requests if one.key not in said}
    if not waiting:
        return {one.key: said[one.key] for one in requests}
    asks, keys = speaker(), list(waiting)
    with out.open("a", encoding="utf-8") as file:
        for start in range(0, len(keys), batch_size):
            group = [waiting[key] for key in keys[start : start + batch_size]]
            for key, answer in asks(group):
                line = {"id": key, "asked": waiting[key].text, "said": answer}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
                said[key] = answer
            print(f"{out}: {len(said)} answers, {len(keys) - start - len(group)} to come", flush=True)
    return {one.key: said[one.key] for one in requests}


def _lines(path: Path) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for number, line in enumerate(read_text(path, "answers").split("\n"), 1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
            key, said = str(content["id"]), str(content["said"])
        except (ValueError, KeyError, TypeError, RecursionError):
            told = f'line {number} is no {{"id": ..., "said": ...}}; correct it'
            raise UserError(f"answers {path}: {told}") from None
        found[key] = {"said": said} | ({"asked": str(content["asked"])} if "asked" in content else {})
    return found
