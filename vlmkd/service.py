"""Services over HTTP that take JSON and may charge for it.

A call is a POST, with `Authorization: Bearer <token>` where a token is given. Status 200 alone is a served call; 400, 413,
415 and 422 refuse this content; 429, 500 and 503 (with `Retry-After` in seconds) let the call be repeated. No message holds
the token, what stands behind `?` in the address, or words of the server, which may repeat them. The token travels
encrypted or to this machine, and through a proxy only inside TLS.
"""

from __future__ import annotations

import json
import os
import re
import urllib.parse
from dataclasses import dataclass
from typing import Any

import httpx
import tenacity

from vlmkd.config import AboveZero, Count
from vlmkd.errors import UserError
from vlmkd.files import one_line

_PAUSE, _LONGEST_PAUSE = 1.0, 60.0  # seconds before the first repetition, doubled for each further one


class NotServed(Exception):
    """Nothing was charged: this content is `refused`, or the service is busy, for `pause` seconds if it says so."""

    def __init__(self, told: str, *, refused: bool = False, pause: float = 0.0) -> None:
        super().__init__(told)
        self.refused, self.pause = refused, pause


class AnswerLost(Exception):
    """The call was sent and no usable answer came: the service may have charged for it."""


@dataclass(frozen=True, kw_only=True)
class Service:
    """Where a service is asked, and how patiently."""

    url: str = ""
    """Address of the call."""
    token_env: str = ""
    """Environment variable with the token; empty: none is sent."""
    timeout: AboveZero = 60.0
    """Seconds for connecting and for each wait."""
    retries: Count = 2
    """Repetitions of a call that was not served, with growing pauses."""


class HttpService:
    """Calls of one address."""

    def __init__(self, cfg: Service) -> None:
        self._url, self._shown = _checked_address(cfg.url)
        local = re.fullmatch(r"localhost|127(\.\d+){3}|::1", self._url.host) is not None
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if cfg.token_env:
            token = os.environ.get(cfg.token_env, "")
            if not token or not all("!" <= character <= "~" for character in token):
                told = "is empty or has spaces, line ends or what else no header carries; put the token alone into it"
                raise UserError(f"environment variable {cfg.token_env} {told}")
            if self._url.scheme == "http" and not local:
                raise UserError(f"service address {self._shown} would reveal the token; use https://")
            headers["Authorization"] = f"Bearer {token}"
        try:
            # Within this machine a proxy would get the token in clear, by a redirection any address would. A kept
            # connection may be closed under a call, which would then count as sent.
            self._client = httpx.Client(
                headers=headers, timeout=cfg.timeout, trust_env=not local, follow_redirects=False,
                limits=httpx.Limits(max_keepalive_connections=0),
            )  # fmt: skip
        except (httpx.InvalidURL, ValueError, ImportError):
            raise UserError("http_proxy or https_proxy is no valid address; unset it") from None
        self._tries = tenacity.Retrying(
            retry=tenacity.retry_if_exception(lambda told: isinstance(told, NotServed) and not told.refused),
            stop=tenacity.stop_after_attempt(cfg.retries + 1), wait=_pause, reraise=True,
        )  # fmt: skip

    def post(self, content: Any, largest: int) -> bytes:
        """The answer, of at most `largest` bytes, to `content` as JSON.

        Raises:
            NotServed, AnswerLost: no answer.
            UserError: no call can succeed.
        """
        answer: bytes = self._tries(self._post, json.dumps(content).encode(), largest)
        return answer

    def _post(self, body: bytes, largest: int) -> bytes:
        sent = False

        def trace(event: str, info: dict[str, Any]) -> None:
            nonlocal sent
            if event.endswith("send_request_headers.started") and info["request"].method == b"POST":
                sent = True  # not what opens a tunnel through a proxy

        answer = bytearray()
        try:
            with self._client.stream("POST", self._url, content=body, extensions={"trace": trace}) as reply:
                if reply.status_code != 200:
                    raise self._failure(reply)
                for block in reply.iter_bytes():
                    answer += block
                    if len(answer) > largest:
                        raise AnswerLost(f"the answer is longer than {largest} bytes")
        except (httpx.HTTPError, httpx.StreamError) as error:
            told = one_line(error) if isinstance(error, httpx.ConnectError) else type(error).__name__
            if sent:  # the service may have served the call
                raise AnswerLost(f"{self._shown}: {told}") from None
            if "CERTIFICATE_VERIFY_FAILED" in told:
                told = f"certificate that is not valid ({told}); check the address, or set SSL_CERT_FILE"
                raise UserError(f"service {self._shown} shows a {told}") from None
            raise NotServed(f"{self._shown} cannot be reached ({told})") from None
        return bytes(answer)

    def _failure(self, reply: httpx.Response) -> Exception:
        code = reply.status_code
        told = f"{self._shown} answered {code} {httpx.codes.get_reason_phrase(code)}".rstrip()
        if code in (400, 413, 415, 422):
            return NotServed(told, refused=True)
        if code in (429, 500, 503):
            pause = reply.headers.get("Retry-After", "")
            return NotServed(told, pause=float(pause) if pause.isdecimal() else 0.0)
        if code in (502, 504):  # a gateway's word: the service behind it may have served the call
            return AnswerLost(told)
        return UserError(f"service {told}; check the address and the token")


def _pause(state: tenacity.RetryCallState) -> float:
    told: Any = state.outcome and state.outcome.exception()
    return min(told.pause or _PAUSE * 2 ** (state.attempt_number - 1), _LONGEST_PAUSE)


def _checked_address(url: str) -> tuple[httpx.URL, str]:
    """The address, and what of it may be shown."""
    try:
        address = httpx.URL(url)
        address.host.encode("idna")
        port = urllib.parse.urlsplit(url).port  # refuses more than httpx does
    except (httpx.InvalidURL, ValueError):
        raise UserError("service address is no valid http:// or https:// address") from None
    path = address.raw_path.decode("ascii").partition("?")[0]
    shown = f"{address.scheme}://{address.host}{f':{port}' if port else ''}{path}"
    if address.scheme not in ("http", "https") or not address.host:
        raise UserError(f"service address {shown!r} is not a http:// or https:// address")
    if address.userinfo:
        raise UserError(f"service address {shown} has a user name or password; use token_env")
    return address, shown
