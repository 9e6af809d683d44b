"""HttpTeacher against a server in a thread: the protocol, and what each kind of failure is taken for."""

from __future__ import annotations

import base64
import http.server
import json
import shutil
import socket
import ssl
import subprocess
import threading
import time

import pytest

from projects.vl2v_adip.black_box import HttpTeacher
from vlmkd import service as http_service
from vlmkd.errors import UserError
from vlmkd.service import AnswerLost, NotServed, Service


class Server(http.server.ThreadingHTTPServer):
    """Answers [length of the input, its first byte]; `script` holds (status, headers, body) to give first."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script, self.calls, self.tokens, self.delay, self.hang_up = [], [], [], 0.0, False
        self.paths, self.reason = [], None
        self.handle_error = lambda *_: None  # clients that hang up are meant
        self.url = f"http://127.0.0.1:{self.server_address[1]}/embed"


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):  # noqa: N802
        owner = self.server
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        owner.calls.append(asked)
        owner.paths.append(self.path)
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
        self.send_response(status, owner.reason)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_):
        """Keep the test output clean."""


@pytest.fixture
def service(monkeypatch):
    monkeypatch.setattr(http_service, "_PAUSE", 0.01)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    running = Server()
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


def box(url, **options):
    return HttpTeacher(Service(url=url, **options))


def test_images_and_texts_travel_whole_and_in_order(service, monkeypatch):
    monkeypatch.setenv("BOX_TOKEN", "secret")
    teacher = box(service.url, token_env="BOX_TOKEN")
    assert teacher.embed("image", [b"\xff\x00\x01", b"\x07"]) == [[3, 255], [1, 7]]
    assert teacher.embed("text", ["dog", "été"]) == [[3, 100], [5, 195]]
    assert service.tokens == ["Bearer secret"] * 2
    assert box(service.url).embed("text", ["a"]) == [[1, 97]] and service.tokens[-1] is None


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_service_is_asked_again_and_then_given_up(service, status):
    service.script = [(status, {"Retry-After": "0"}, "busy")] * 2
    assert box(service.url, retries=2).embed("text", ["a"]) == [[1, 97]]
    service.script = [(status, {}, "busy")] * 2
    with pytest.raises(NotServed, match=f"answered {status}") as failure:
        box(service.url, retries=1).embed("text", ["a"])
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
        box(service.url, retries=3).embed("text", ["a"])
    assert len(service.calls) == 1  # none of these is repeated
    assert kind is not NotServed or failure.value.refused


def test_late_and_cut_answers_are_lost_and_no_connection_is_not_served(service):
    service.hang_up = True
    with pytest.raises(AnswerLost):
        box(service.url).embed("text", ["a"])
    service.hang_up, service.delay = False, 1.0
    with pytest.raises(AnswerLost, match="ReadTimeout"):
        box(service.url, timeout=0.2).embed("text", ["a"])
    with socket.socket() as unused:  # held, so that nobody else listens there
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with pytest.raises(NotServed, match="cannot be reached") as failure:
            box(f"http://127.0.0.1:{port}/", retries=1).embed("text", ["a"])
    assert not failure.value.refused


def test_addresses_and_tokens_that_cannot_work_are_refused(monkeypatch):
    with pytest.raises(UserError, match="is not a http"):
        box("file:///etc/passwd")
    monkeypatch.delenv("BOX_TOKEN", raising=False)
    with pytest.raises(UserError, match="environment variable BOX_TOKEN is empty or"):
        box("https://host/embed", token_env="BOX_TOKEN")
    monkeypatch.setenv("BOX_TOKEN", "secret")
    with pytest.raises(UserError, match="would reveal the token"):
        box("http://host/embed", token_env="BOX_TOKEN")


SECRET = "sk-SECRET"


@pytest.mark.parametrize(
    "token", [f"{SECRET}\n", f" {SECRET}", "sk-SECRÉT", f"{SECRET}\u2028", f"a {SECRET}"]
)
def test_a_token_that_no_header_can_carry_is_refused_unseen(service, monkeypatch, token):
    monkeypatch.setenv("BOX_TOKEN", token)
    with pytest.raises(UserError, match="environment variable BOX_TOKEN .* spaces, line ends") as failure:
        box(service.url, token_env="BOX_TOKEN")
    assert "SECR" not in str(failure.value)


@pytest.mark.parametrize("status", [401, 422, 500, 504])
def test_no_message_repeats_token_or_key(service, monkeypatch, status):
    monkeypatch.setenv("BOX_TOKEN", SECRET)
    service.reason, service.script = f"bad header Bearer {SECRET}", [(status, {}, f"Bearer {SECRET}")]
    with pytest.raises(
        (UserError, NotServed, AnswerLost), match=f"{service.url} answered {status}"
    ) as failure:
        box(f"{service.url}?key={SECRET}", token_env="BOX_TOKEN", retries=0).embed("text", ["a"])
    assert SECRET not in str(failure.value) and "\n" not in str(failure.value)
    assert service.paths == [f"/embed?key={SECRET}"]  # the service does get its key


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (f"https://user:{SECRET}@host/embed", "has a user name or password"),
        (f"https://host/\x00?key={SECRET}", "no valid"),
        (f"https://host:99999999/?key={SECRET}", "no valid"),
        (f"https://host:port/?key={SECRET}", "no valid"),
        (f"https://[bad/?key={SECRET}", "no valid"),
        (f"https://{'a' * 70}.com/?key={SECRET}", "no valid"),
        (f"https:///?key={SECRET}", "is not a http"),
    ],
)
def test_addresses_that_nothing_can_be_sent_to_are_refused_at_once(address, message):
    with pytest.raises(UserError, match=message) as failure:
        box(address)
    assert SECRET not in str(failure.value) and str(failure.value).isprintable()


def test_a_failed_handshake_is_not_served(service):
    """The server speaks no TLS: what is sent before the request does not count."""
    with pytest.raises(NotServed, match="cannot be reached") as failure:
        box(service.url.replace("http:", "https:"), retries=1, timeout=5).embed("text", ["a"])
    assert not failure.value.refused and not service.calls
    with pytest.raises(NotServed, match="cannot be reached"):
        box("http://no-such-host.invalid/", retries=0).embed("text", ["a"])


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate")
def test_a_certificate_that_is_not_valid_ends_the_work_before_anything_is_sent(service, tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    subprocess.run(
        [*command.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True, timeout=300
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    service.socket = context.wrap_socket(service.socket, server_side=True, do_handshake_on_connect=False)
    with pytest.raises(UserError, match="certificate that is not valid .*self-signed"):
        box(service.url.replace("http:", "https:"), timeout=5).embed("text", ["a"])
    assert not service.calls


def test_loopback_is_never_asked_through_a_proxy(service, monkeypatch):
    proxy = Server()
    monkeypatch.setenv("http_proxy", proxy.url)
    monkeypatch.setenv("BOX_TOKEN", SECRET)
    try:
        assert box(service.url, token_env="BOX_TOKEN").embed("text", ["a"]) == [[1, 97]]
    finally:
        proxy.server_close()
    assert service.tokens == [f"Bearer {SECRET}"]
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:port")
    with pytest.raises(UserError, match="https_proxy is no valid address"):
        box("https://host.invalid/")


def test_a_tunnel_that_does_not_open_is_not_served(service, monkeypatch):
    """The proxy saw a CONNECT, but neither the token nor the query."""
    monkeypatch.setenv("https_proxy", service.url)
    monkeypatch.setenv("BOX_TOKEN", SECRET)
    with pytest.raises(NotServed, match="https://host.invalid/ cannot be reached"):
        box("https://host.invalid/", token_env="BOX_TOKEN", retries=0).embed("text", ["a"])
    assert not service.tokens


@pytest.mark.parametrize(
    "body",
    [
        '{"vectors": [' + "1," * 600_000 + "1]}",
        '{"vectors": ' + "[" * 200_000,
        '{"vectors": [[' + "9" * 5000 + "]]}",
    ],
    ids=["long", "deep", "wide"],
)
def test_answers_of_any_size_and_depth_are_one_lost_call(service, body):
    service.script = [(200, {}, body)]
    with pytest.raises(AnswerLost, match="longer than 1048576 bytes|no vectors .(RecursionError|ValueError)"):
        box(service.url).embed("text", ["a"])
