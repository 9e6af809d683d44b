"""Black-box teachers: any embedding service over HTTP, and a local model that plays one.

The protocol of `HttpTeacher` is one call, POST to the address as it is given, JSON both ways:

    {"kind": "image", "inputs": ["<base64 of an image file>", ...]}    or    {"kind": "text", "inputs": ["a dog", ...]}
    200 {"vectors": [[0.1, -0.3, ...], ...]}    one list of numbers per input, in the same order

with `Authorization: Bearer <token>` where a token is given. Only status 200 is a served call. 400, 413, 415 and 422 mean that
this content is not accepted, 429, 500 and 503 (with `Retry-After` in seconds, if any) that the call may be repeated.

No text of ours holds the token, what stands before `@` or behind `?` in the address, or words of the server, which may
repeat them. The token travels encrypted or to this machine, and through a proxy only inside TLS.
"""

from __future__ import annotations

import base64
import functools
import http.client
import ipaddress
import json
import os
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlmkd.errors import UserError
from vlmkd.predictors import DualEncoder
from vlmkd.query import AnswerLost, BlackBox, NotServed

__all__ = ["AnswerLost", "BlackBox", "HttpTeacher", "LocalTeacher", "NotServed"]

_REFUSED = (400, 413, 415, 422)
_BUSY = (429, 500, 503)
_PAUSE = 1.0  # seconds before the first repetition; doubled for each further one
_LONGEST_PAUSE = 60.0
_LARGEST_ANSWER = 1 << 20  # bytes for one input: some 50,000 numbers


class HttpTeacher:
    """A service that speaks the module's protocol.

    Args:
        url: address of the call.
        token_env: environment variable that holds the token; empty: none is sent.
        timeout: seconds for connecting, and for each wait for data.
        retries: repetitions of a call that the service did not serve (busy, out of reach), with growing pauses.

    Raises:
        UserError: an address that cannot work, an empty variable, a token that no header can carry, or one that would
            travel unencrypted.
    """

    def __init__(self, url: str, *, token_env: str = "", timeout: float = 60.0, retries: int = 2) -> None:
        host, self._shown = _checked_address(url)
        self._url, self._timeout, self._retries = url, timeout, retries
        self._headers = {"Content-Type": "application/json"}
        local = _is_loopback(host)
        if token_env:
            token = os.environ.get(token_env, "")
            if not token or not all("!" <= character <= "~" for character in token):
                raise UserError(
                    f"environment variable {token_env} is empty or has spaces, line ends or other characters that no "
                    "header can carry; it must hold the black box's token alone"
                )
            if url.lower().startswith("http:") and not local:
                raise UserError(
                    f"black-box address {self._shown} is not encrypted and would reveal the token; use https://"
                )
            self._headers["Authorization"] = f"Bearer {token}"
        # A proxy has no business between two programs of this machine, and would get the token in clear.
        proxies = urllib.request.ProxyHandler({} if local else None)
        self._opener = urllib.request.build_opener(_NoRedirects, _Http, _Https, proxies)

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
                return _vectors(self._post(body, _LARGEST_ANSWER * len(inputs)), len(inputs))
            except _Busy as busy:
                if attempt == self._retries:
                    raise NotServed(str(busy)) from None
                time.sleep(min(busy.pause or _PAUSE * 2**attempt, _LONGEST_PAUSE))
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _post(self, body: bytes, largest: int) -> bytes:
        request = urllib.request.Request(self._url, body, self._headers, method="POST")
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                answer: bytes = response.read(largest + 1)
        except urllib.error.HTTPError as error:
            with error:
                raise self._failure(error) from None
        except (OSError, http.client.HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            # Nothing was sent where no connection came about; otherwise the service may have served the call.
            if isinstance(reason, _NotConnected):
                raise self._not_sent(reason) from None
            raise AnswerLost(f"{self._shown}: {_told(reason)}") from None
        except ValueError:  # urllib's word on the variables
            raise UserError(
                "http_proxy or https_proxy is no valid address of a proxy; mend or unset it"
            ) from None
        if len(answer) > largest:
            raise AnswerLost(f"the answer is longer than {largest} bytes")
        return answer

    def _not_sent(self, reason: _NotConnected) -> Exception:
        if isinstance(reason.cause, ssl.SSLCertVerificationError):
            return UserError(
                f"black box {self._shown} shows a certificate that is not valid ({reason.cause.verify_message}); check the "
                "address, or name its authority in SSL_CERT_FILE"
            )
        return _Busy(f"{self._shown} cannot be reached ({_told(reason.cause)})")

    def _failure(self, error: urllib.error.HTTPError) -> Exception:
        told = f"{self._shown} answered {error.code} {http.client.responses.get(error.code, '')}".rstrip()
        if error.code in _REFUSED:
            return NotServed(told, refused=True)
        if error.code in _BUSY:
            pause = error.headers.get("Retry-After", "")
            return _Busy(told, float(pause) if pause.isdecimal() else 0.0)
        if error.code in (502, 504):  # a gateway's word: the service behind it may have served the call
            return AnswerLost(told)
        return UserError(f"black box {told}; check the address and the token")


def _checked_address(url: str) -> tuple[str, str]:
    """Host of an address, and the address without what may be secret, for messages.

    Raises:
        UserError: it is no address that can be asked.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname or "", parts.port
        host.encode("idna")
    except ValueError:
        raise UserError("black-box address is no valid http:// or https:// address") from None
    shown = f"{parts.scheme}://{host}{f':{port}' if port else ''}{parts.path}"
    if parts.scheme not in ("http", "https") or not host:
        raise UserError(f"black-box address {shown!r} is not a http:// or https:// address")
    if "@" in parts.netloc:
        raise UserError(
            f"black-box address {shown} has a user name or password, which are not sent; use --token-env"
        )
    if not all("!" <= character <= "~" for character in url):
        raise UserError(
            f"black-box address {ascii(shown)} has a space or another character that must be percent-encoded"
        )
    return host, shown


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


def _told(error: object) -> str:
    """What this machine says of a failure; the server's own words may repeat the token."""
    told = error.strerror if isinstance(error, OSError) else None
    return told or ("timed out" if isinstance(error, TimeoutError) else type(error).__name__)


class _NotConnected(OSError):
    """No connection came about, so that nothing was sent."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class _Http(urllib.request.HTTPHandler):
    """Tells whether a failure came before anything was sent."""

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        """As urllib's."""
        return self.do_open(functools.partial(_connecting, http.client.HTTPConnection), req)


class _Https(urllib.request.HTTPSHandler):
    """The same for TLS, whose handshake (and a proxy's tunnel) comes before the request."""

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        """As urllib's."""
        return self.do_open(functools.partial(_connecting, http.client.HTTPSConnection), req)


def _connecting(kind: type[http.client.HTTPConnection], host: str, **options: Any) -> Any:
    """A connection whose failure to connect is a _NotConnected."""
    try:
        connection = kind(host, **options)
    except http.client.InvalidURL as error:  # of a proxy; the service's own address is checked
        raise _NotConnected(error) from None
    connect = connection.connect

    def connect_or_tell() -> None:
        try:
            connect()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise _NotConnected(error) from None

    connection.connect = connect_or_tell  # type: ignore[method-assign]
    return connection


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


def _vectors(answer: bytes, expected: int) -> list[list[float]]:
    try:
        vectors = json.loads(answer)["vectors"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise AnswerLost(f"the answer has no vectors ({type(error).__name__})") from None
    if not isinstance(vectors, list) or len(vectors) != expected:
        number = len(vectors) if isinstance(vectors, list) else "no list of"
        raise AnswerLost(f"the answer has {number} vectors for {expected} inputs")
    return vectors


class LocalTeacher:
    """A model on this machine that answers like a service: for tests, small runs and rehearsals of a paid one.

    Args:
        encoder: any DualEncoder.
        transform: encoded image -> [3,H,W] in the encoder's statistics, e.g.
            `vlmkd.data.transforms.eval_transform_of_bytes(encoder.image_spec)`.
    """

    def __init__(self, encoder: DualEncoder, transform: Callable[[bytes], Tensor]) -> None:
        self._encoder, self._transform = encoder, transform

    @torch.no_grad()
    def embed_images(self, images: list[bytes]) -> list[list[float]]:
        """A vector for each encoded image."""
        return self._encoder.encode_image(torch.stack([self._transform(image) for image in images])).tolist()

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> list[list[float]]:
        """A vector for each text."""
        return self._encoder.encode_text(texts).tolist()
