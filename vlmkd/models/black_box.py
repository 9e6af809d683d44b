"""Black-box teachers: any embedding service over HTTP, and a local model that plays one.

The protocol of `HttpTeacher` is one call, POST to the address as it is given, JSON both ways:

    {"kind": "image", "inputs": ["<base64 of an image file>", ...]}    or    {"kind": "text", "inputs": ["a dog", ...]}
    200 {"vectors": [[0.1, -0.3, ...], ...]}    one list of numbers per input, in the same order

with `Authorization: Bearer <token>` where a token is given. Only status 200 is a served call. 400, 413, 415 and 422 mean that
this content is not accepted, 429, 500 and 503 (with `Retry-After` in seconds, if any) that the call may be repeated.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from vlmkd.errors import UserError
from vlmkd.query import AnswerLost, BlackBox, NotServed

__all__ = ["AnswerLost", "BlackBox", "HttpTeacher", "LocalTeacher", "NotServed"]

_REFUSED = (400, 413, 415, 422)
_BUSY = (429, 500, 503)
_PAUSE = 1.0  # seconds before the first repetition; doubled for each further one
_LONGEST_PAUSE = 60.0
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class HttpTeacher:
    """A service that speaks the module's protocol.

    Args:
        url: address of the call.
        token_env: environment variable that holds the token; empty: none is sent.
        timeout: seconds for connecting, and for each wait for data.
        retries: repetitions of a call that the service did not serve (busy, out of reach), with growing pauses.

    Raises:
        UserError: an address that is not http(s), an empty variable, or a token that would travel unencrypted.
    """

    def __init__(self, url: str, *, token_env: str = "", timeout: float = 60.0, retries: int = 2) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"black-box address {url!r} is not a http:// or https:// address")
        self._url, self._timeout, self._retries = url, timeout, retries
        self._headers = {"Content-Type": "application/json"}
        if token_env:
            token = os.environ.get(token_env, "")
            if not token:
                raise UserError(
                    f"environment variable {token_env} is empty; it must hold the black box's token"
                )
            if parts.scheme == "http" and parts.hostname not in _LOOPBACK:
                raise UserError(
                    f"black-box address {url} is not encrypted and would reveal the token; use https://"
                )
            self._headers["Authorization"] = f"Bearer {token}"
        self._opener = urllib.request.build_opener(_NoRedirects)

    def embed_images(self, images: list[bytes]) -> list[list[float]]:
        """A vector for each encoded image; see vlmkd.query.BlackBox."""
        return self._ask("image", [base64.b64encode(image).decode("ascii") for image in images])

    def embed_texts(self, texts: list[str]) -> list[list[float]]:
        """A vector for each text; see vlmkd.query.BlackBox."""
        return self._ask("text", texts)

    def _ask(self, kind: str, inputs: list[str]) -> list[list[float]]:
        body = json.dumps({"kind": kind, "inputs": inputs}).encode()
        for attempt in range(self._retries + 1):
            try:
                return _vectors(self._post(body), len(inputs))
            except _Busy as busy:
                if attempt == self._retries:
                    raise NotServed(str(busy)) from None
                time.sleep(min(busy.pause or _PAUSE * 2**attempt, _LONGEST_PAUSE))
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _post(self, body: bytes) -> bytes:
        request = urllib.request.Request(self._url, body, self._headers, method="POST")
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            with error:
                raise self._failure(error) from None
        except urllib.error.URLError as error:
            # Nothing was sent where no connection came about; otherwise the service may have served the call.
            if _unreachable(error.reason):
                raise _Busy(f"{self._url} cannot be reached ({error.reason})") from None
            raise AnswerLost(f"{self._url}: {error.reason}") from None
        except (OSError, http.client.HTTPException) as error:
            raise AnswerLost(f"{self._url}: {type(error).__name__} {error}") from None

    def _failure(self, error: urllib.error.HTTPError) -> Exception:
        told = f"{self._url} answered {error.code} {error.reason}"
        if error.code in _REFUSED:
            return NotServed(told, refused=True)
        if error.code in _BUSY:
            pause = error.headers.get("Retry-After", "")
            return _Busy(told, float(pause) if pause.isdecimal() else 0.0)
        if error.code in (502, 504):  # a gateway's word: the service behind it may have served the call
            return AnswerLost(told)
        return UserError(f"black box {told}; check the address and the token")


class _Busy(Exception):
    """Not served, and worth a repetition after `pause` seconds (0: not told)."""

    def __init__(self, detail: str, pause: float = 0.0) -> None:
        super().__init__(detail)
        self.pause = pause


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirection would hand the token to another address."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """None: the answer counts as an error."""
        return None


def _unreachable(reason: object) -> bool:
    """Whether no connection came about (refused, unknown name), as opposed to one that was cut or late."""
    return isinstance(reason, (ConnectionRefusedError, socket.gaierror))


def _vectors(answer: bytes, expected: int) -> list[list[float]]:
    try:
        vectors = json.loads(answer)["vectors"]
    except (ValueError, KeyError, TypeError) as error:
        raise AnswerLost(f"the answer has no vectors ({type(error).__name__}: {error})") from None
    if not isinstance(vectors, list) or len(vectors) != expected:
        number = len(vectors) if isinstance(vectors, list) else "no list of"
        raise AnswerLost(f"the answer has {number} vectors for {expected} inputs")
    return vectors


class _Encoder(Protocol):
    """A DualEncoder."""

    def encode_image(self, images: Tensor) -> Tensor: ...

    def encode_text(self, texts: list[str]) -> Tensor: ...


class LocalTeacher:
    """A model on this machine that answers like a service: for tests, small runs and rehearsals of a paid one.

    Args:
        encoder: any DualEncoder.
        transform: encoded image -> [3,H,W] in the encoder's statistics, e.g.
            `vlmkd.data.transforms.eval_transform_of_bytes(encoder.image_spec)`.
    """

    def __init__(self, encoder: _Encoder, transform: Callable[[bytes], Tensor]) -> None:
        self._encoder, self._transform = encoder, transform

    @torch.no_grad()
    def embed_images(self, images: list[bytes]) -> list[list[float]]:
        """A vector for each encoded image."""
        return self._encoder.encode_image(torch.stack([self._transform(image) for image in images])).tolist()

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> list[list[float]]:
        """A vector for each text."""
        return self._encoder.encode_text(texts).tolist()
