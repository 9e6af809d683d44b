"""HttpTeacher against a server in a thread: the protocol, and what each kind of failure is taken for."""

from __future__ import annotations

import base64
import http.server
import json
import socket
import threading
import time

import pytest
import torch

from vlmkd.errors import UserError
from vlmkd.models import black_box
from vlmkd.models.black_box import AnswerLost, HttpTeacher, LocalTeacher, NotServed


class Service(http.server.ThreadingHTTPServer):
    """Answers [length of the input, its first byte]; `script` holds (status, headers, body) to give first."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script, self.calls, self.tokens, self.delay, self.hang_up = [], [], [], 0.0, False
        self.url = f"http://127.0.0.1:{self.server_address[1]}/embed"


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):  # noqa: N802
        owner = self.server
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        owner.calls.append(asked)
        owner.tokens.append(self.headers.get("Authorization"))
        time.sleep(owner.delay)
        if owner.hang_up:
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        status, headers, body = owner.script.pop(0) if owner.script else (200, {}, None)
        if body is None:
            data = [
                base64.b64decode(part) if asked["kind"] == "image" else part.encode()
                for part in asked["inputs"]
            ]
            body = json.dumps({"vectors": [[len(part), part[0]] for part in data]})
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_):
        """Keep the test output clean."""


@pytest.fixture
def service(monkeypatch):
    monkeypatch.setattr(black_box, "_PAUSE", 0.01)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    running = Service()
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


def test_images_and_texts_travel_whole_and_in_order(service, monkeypatch):
    monkeypatch.setenv("BOX_TOKEN", "secret")
    teacher = HttpTeacher(service.url, token_env="BOX_TOKEN")
    assert teacher.embed_images([b"\xff\x00\x01", b"\x07"]) == [[3, 255], [1, 7]]
    assert teacher.embed_texts(["dog", "été"]) == [[3, 100], [5, 195]]
    assert service.tokens == ["Bearer secret"] * 2
    assert HttpTeacher(service.url).embed_texts(["a"]) == [[1, 97]] and service.tokens[-1] is None


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_service_is_asked_again_and_then_given_up(service, status):
    service.script = [(status, {"Retry-After": "0"}, "busy")] * 2
    assert HttpTeacher(service.url, retries=2).embed_texts(["a"]) == [[1, 97]]
    service.script = [(status, {}, "busy")] * 2
    with pytest.raises(NotServed, match=f"answered {status}") as failure:
        HttpTeacher(service.url, retries=1).embed_texts(["a"])
    assert not failure.value.refused and len(service.calls) == 3 + 2


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ((422, {}, "no"), NotServed),
        ((504, {}, "late"), AnswerLost),
        ((200, {}, "not json"), AnswerLost),
        ((200, {}, '{"vectors": [[1], [2]]}'), AnswerLost),
        ((200, {}, "[1]"), AnswerLost),
        ((401, {}, "who?"), UserError),
        ((404, {}, "what?"), UserError),
        ((302, {"Location": "http://127.0.0.1:9/elsewhere"}, ""), UserError),
    ],
)
def test_what_an_answer_is_taken_for(service, answer, kind):
    service.script = [answer]
    with pytest.raises(kind) as failure:
        HttpTeacher(service.url, retries=3).embed_texts(["a"])
    assert len(service.calls) == 1  # none of these is repeated
    assert kind is not NotServed or failure.value.refused


def test_late_and_cut_answers_are_lost_and_no_connection_is_not_served(service):
    service.hang_up = True
    with pytest.raises(AnswerLost):
        HttpTeacher(service.url).embed_texts(["a"])
    service.hang_up, service.delay = False, 1.0
    with pytest.raises(AnswerLost, match="timed out"):
        HttpTeacher(service.url, timeout=0.2).embed_texts(["a"])
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(NotServed, match="cannot be reached") as failure:
        HttpTeacher(f"http://127.0.0.1:{port}/", retries=1).embed_texts(["a"])
    assert not failure.value.refused


def test_addresses_and_tokens_that_cannot_work_are_refused(monkeypatch):
    with pytest.raises(UserError, match="is not a http"):
        HttpTeacher("file:///etc/passwd")
    monkeypatch.delenv("BOX_TOKEN", raising=False)
    with pytest.raises(UserError, match="environment variable BOX_TOKEN is empty"):
        HttpTeacher("https://host/embed", token_env="BOX_TOKEN")
    monkeypatch.setenv("BOX_TOKEN", "secret")
    with pytest.raises(UserError, match="is not encrypted and would reveal the token"):
        HttpTeacher("http://host/embed", token_env="BOX_TOKEN")


def test_a_local_model_plays_a_black_box():
    class Encoder:
        def encode_image(self, images):
            return images.mean(dim=(2, 3))

        def encode_text(self, texts):
            return torch.tensor([[float(len(text))] for text in texts])

    teacher = LocalTeacher(Encoder(), lambda data: torch.full((3, 2, 2), float(data[0])))
    assert teacher.embed_images([b"\x05", b"\x09"]) == [[5.0] * 3, [9.0] * 3]
    assert teacher.embed_texts(["abc"]) == [[3.0]]
