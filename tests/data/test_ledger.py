"""The query ledger: nothing is paid twice, the budget holds, bad answers are found, failures follow the policy."""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import os
import socket
import sqlite3

import pytest
import torch
import torch.nn.functional as F

from vlmkd.data.images import ImageRef
from vlmkd.data.labelled import Item
from vlmkd.data.labelled_loader import LabelledLoader, Stream
from vlmkd.data.ledger import Budget, Ledger, Policy, Prices, Query, embed_queried, report, text_query
from vlmkd.data.stored_outputs import CLEAN, StoredEmbeds
from vlmkd.data.transforms import ViewConfig
from vlmkd.errors import UserError
from vlmkd.models.black_box import HttpTeacher
from vlmkd.query import AnswerLost, NotServed

DIM = 6


def vector(data: bytes) -> list[float]:
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(data).digest()[:4], "big"))
    return F.normalize(torch.randn(DIM, generator=generator), dim=0).tolist()


class Teacher:
    """Pseudo-random unit vectors of the bytes; `script` holds exceptions or answers to give first."""

    def __init__(self, script=(), refuses=()):
        self.calls, self.script, self.refuses = [], list(script), set(refuses)

    def embed_images(self, images):
        self.calls.append(list(images))
        if self.refuses & set(images):
            raise NotServed("unprocessable", refused=True)
        if self.script:
            answer = self.script.pop(0)
            if isinstance(answer, BaseException):
                raise answer
            return answer
        return [vector(image) for image in images]

    def embed_texts(self, texts):
        return self.embed_images([text.encode() for text in texts])

    @property
    def paid(self):
        return [part for call in self.calls for part in call]


def image(name: str) -> Query:
    data = name.encode()
    return Query("image", hashlib.sha256(data).hexdigest(), data, alike=name)


def ledger(path, teacher, **options):
    return Ledger(path, teacher, "vendor-1", dim=DIM, unit_norm=True, **options)


def figures(path):
    (part,) = report(path)
    return part


def test_answers_are_kept_and_never_asked_again(tmp_path):
    path, teacher = tmp_path / "ledger.sqlite", Teacher()
    names = ["a", "b", "a", "c"]
    first = ledger(path, teacher, batch_size=2, prices=Prices(0.5)).ask([image(name) for name in names])
    assert teacher.calls == [[b"a", b"b"], [b"c"]]
    for name, found in zip(names, first, strict=True):
        torch.testing.assert_close(found, torch.tensor(vector(name.encode())), rtol=0, atol=0)
    again = ledger(path, None).ask([image("c"), image("a")])
    assert torch.equal(again[0], first[3]) and torch.equal(again[1], first[0])
    part = figures(path)
    assert (part.paid, part.cost, part.answered, part.reused) == (3, 1.5, 3, 3)
    with pytest.raises(UserError, match="lacks 1 answers of vendor-1, and there is nobody to ask"):
        ledger(path, None).ask([image("d")])
    other = Ledger(path, teacher, "vendor-2", dim=DIM)  # another teacher is another key
    other.ask([image("a")])
    assert teacher.paid.count(b"a") == 2 and [part.teacher for part in report(path)] == [
        "vendor-1",
        "vendor-2",
    ]


def test_the_budget_is_checked_before_the_call_and_survives_restarts(tmp_path):
    path, teacher = tmp_path / "ledger.sqlite", Teacher()
    ledger(path, teacher, budget=Budget(3), batch_size=2).ask([image("a"), image("b")])
    again = ledger(path, teacher, budget=Budget(3), batch_size=2)
    with pytest.raises(UserError, match="budget of vendor-1 is used up: 2 more queries .* 1 and inf left"):
        again.ask([image("c"), image("d")])
    assert len(teacher.paid) == 2
    again.ask([image("c")])
    assert figures(path).queries_left == 0
    with pytest.raises(UserError, match="used up"):
        again.ask([image("d")])
    raised = ledger(path, teacher, budget=Budget(max_cost=1.0), prices=Prices(image=0.4))
    raised.ask([image("d"), image("e")])
    with pytest.raises(UserError, match="used up"):
        raised.ask([image("f")])
    assert figures(path).cost_left == pytest.approx(0.2)


def test_a_run_that_needs_more_than_the_budget_is_refused_before_its_first_query(tmp_path):
    path, teacher = tmp_path / "ledger.sqlite", Teacher()
    small = ledger(path, teacher, budget=Budget(4), prices=Prices(0.1))
    queries = [image(name) for name in "abcdeabc"]
    with pytest.raises(
        UserError, match="5 queries to vendor-1 are needed, 4 are left of the budget of 4; nothing was"
    ):
        small.require_budget(queries)
    small.ask(queries[:2])
    with pytest.raises(UserError, match="3 queries to vendor-1 are needed, 2 are left"):
        small.require_budget(queries)
    assert small.require_budget(queries[:4]) == 2
    dear = ledger(path, teacher, budget=Budget(max_cost=0.35), prices=Prices(0.1))
    with pytest.raises(UserError, match="3 queries to vendor-1 would cost 0.3, 0.15 is left"):
        dear.require_budget(queries)
    assert len(teacher.paid) == 2


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ([1.0, 0.0], "its shape is .2., not .6."),
        ([float("nan")] + [0.0] * 5, "it is not finite"),
        ([0.0] * 6, "it is zero"),
        ([1.02] + [0.0] * 5, "its length is 1.0200"),
        (["x"] * 6, "it is no list of numbers"),
        (None, "it is no list of numbers"),
    ],
)
def test_answers_that_cannot_be_right_are_paid_once_and_not_used(tmp_path, answer, reason):
    path, teacher = tmp_path / "ledger.sqlite", Teacher([[answer]])
    with pytest.raises(UserError, match=f"gave no vector for a query .rejected: {reason}"):
        ledger(path, teacher).ask([image("a")])
    assert ledger(path, teacher, policy=Policy(failed="mask")).ask([image("a"), image("b")])[0] is None
    assert teacher.paid == [b"a", b"b"]
    part = figures(path)
    assert (part.rejected, part.paid, part.answered) == (1, 2, 1)


def test_slightly_long_unit_vectors_pass(tmp_path):
    teacher = Teacher([[[1.009] + [0.0] * 5]])
    assert ledger(tmp_path / "l", teacher).ask([image("a")])[0] is not None


def test_the_vector_of_another_content_is_not_taken(tmp_path):
    same = [1.0] + [0.0] * 5
    teacher = Teacher([[same, same], [same]])
    found = ledger(tmp_path / "l", teacher, policy=Policy(failed="mask")).ask([image("a"), image("b")])
    assert found[0] is not None and found[1] is None
    twin = Query(
        "image", hashlib.sha256(b"a'").hexdigest(), b"a'", alike="a"
    )  # another file of the same pixels
    assert ledger(tmp_path / "l", teacher).ask([twin])[0] is not None


def test_queries_that_were_not_served_are_asked_again_and_not_charged(tmp_path):
    path, teacher = tmp_path / "l", Teacher([NotServed("busy"), NotServed("busy")])
    assert ledger(path, teacher, policy=Policy(retries=2)).ask([image("a")])[0] is not None
    assert len(teacher.calls) == 3 and figures(path).paid == 1
    teacher.script = [NotServed("busy")] * 2
    with pytest.raises(UserError, match="gave no vector for a query .failed: busy"):
        ledger(path, teacher, policy=Policy(retries=1)).ask([image("b")])
    assert figures(path).failed == 1 and figures(path).paid == 1
    assert ledger(path, teacher).ask([image("b")])[0] is not None  # a new run asks again


def test_calls_that_never_left_this_machine_cost_nothing_and_leave_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("BOX_TOKEN", "sk-SECRET")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    teacher = HttpTeacher(f"http://127.0.0.1:{port}/?key=sk-SECRET", token_env="BOX_TOKEN", retries=0)
    path = tmp_path / "ledger"
    with pytest.raises(UserError, match=f"http://127.0.0.1:{port}/ cannot be reached") as failure:
        ledger(path, teacher).ask([image("a"), image("b")])
    assert figures(path).paid == 0 and figures(path).failed == 2 and "SECRET" not in str(failure.value)
    assert all(b"SECRET" not in file.read_bytes() for file in tmp_path.iterdir())


def test_lost_answers_count_as_paid_and_are_asked_again_only_on_demand(tmp_path):
    path, teacher = tmp_path / "l", Teacher([AnswerLost("timed out")])
    with pytest.raises(UserError, match="lost: timed out"):
        ledger(path, teacher).ask([image("a")])
    with pytest.raises(UserError, match="lost: timed out"):
        ledger(path, teacher).ask([image("a")])
    assert len(teacher.calls) == 1 and figures(path).paid == 1 and figures(path).lost == 1
    assert ledger(path, teacher, policy=Policy(resend_lost=True)).ask([image("a")])[0] is not None
    assert figures(path).paid == 2  # honest about the second charge


def test_one_refused_input_does_not_spoil_its_call(tmp_path):
    path, teacher = tmp_path / "l", Teacher(refuses=[b"b"])
    found = ledger(path, teacher, policy=Policy(retries=0, failed="mask")).ask(
        [image(name) for name in "abc"]
    )
    assert [part is not None for part in found] == [True, False, True]
    assert [call for call in teacher.calls if b"b" in call] == [[b"a", b"b", b"c"], [b"b"]]
    assert figures(path).paid == 2


def test_a_call_that_is_broken_off_is_lost(tmp_path):
    path, teacher = tmp_path / "l", Teacher([KeyboardInterrupt()])
    with pytest.raises(KeyboardInterrupt):
        ledger(path, teacher).ask([image("a")])
    assert figures(path).lost == 1
    teacher.script = [UserError("no such address")]
    with pytest.raises(UserError, match="no such address"):
        ledger(path, teacher).ask([image("b")])
    assert figures(path).failed == 1 and figures(path).under_way == 0


class _Killer:
    def embed_images(self, images):
        os._exit(9)


def _die(path):
    ledger(path, _Killer()).ask([image("a")])


class _SlowFile:
    """Writes every query to a file, so that two processes' calls can be counted."""

    def __init__(self, path):
        self.path = path

    def embed_images(self, images):
        import time

        with open(self.path, "a") as file:
            file.writelines(part.decode() + "\n" for part in images)
        time.sleep(0.05)
        return [vector(part) for part in images]


def _ask_all(path, log, offset, results):
    names = [f"x{(offset + n) % 12}" for n in range(12)]
    found = ledger(path, _SlowFile(log), batch_size=3).ask([image(name) for name in names])
    results.put({name: value.tolist() for name, value in zip(names, found, strict=True)})


def test_a_killed_process_leaves_a_lost_query_and_others_can_go_on(tmp_path):
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_die, args=(tmp_path / "l",))
    process.start()
    process.join()
    assert process.exitcode == 9 and figures(tmp_path / "l").under_way == 1
    teacher = Teacher()
    found = ledger(tmp_path / "l", teacher, policy=Policy(failed="mask")).ask([image("a"), image("b")])
    assert found[0] is None and found[1] is not None and teacher.paid == [b"b"]
    assert figures(tmp_path / "l").lost == 1 and figures(tmp_path / "l").paid == 2


def test_two_processes_never_ask_for_the_same(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [
        context.Process(target=_ask_all, args=(tmp_path / "l", tmp_path / "log", offset, results))
        for offset in (0, 5)
    ]
    for process in processes:
        process.start()
    answers = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert answers[0] == answers[1] and len(answers[0]) == 12
    assert sorted((tmp_path / "log").read_text().split()) == sorted(f"x{n}" for n in range(12))
    assert figures(tmp_path / "l").paid == 12


def test_texts_become_unit_vectors(tmp_path):
    teacher = Teacher([[[2.0] + [0.0] * 5, [0.0, 3.0] + [0.0] * 4]])
    box = Ledger(tmp_path / "l", teacher, "vendor-1", dim=DIM, prices=Prices(text=0.25))
    torch.testing.assert_close(box.encode_text(["a dog", "a cat"]), torch.eye(6)[:2])
    assert (
        box.key(text_query("a dog")) != box.key(text_query("A dog")) and figures(tmp_path / "l").cost == 0.5
    )
    teacher.script = [NotServed("long", refused=True)]
    with pytest.raises(UserError, match="gave no vector for the text 'too long'"):
        Ledger(tmp_path / "l", teacher, "vendor-1", dim=DIM, policy=Policy(failed="mask")).encode_text(
            ["too long"]
        )


def test_other_files_are_not_taken_for_ledgers(tmp_path):
    (tmp_path / "text").write_text("no data base, but long enough to be looked at" * 20)
    with pytest.raises(UserError, match="text is no query ledger"):
        ledger(tmp_path / "text", Teacher())
    with pytest.raises(UserError, match="ledger .*nowhere does not exist"):
        report(tmp_path / "nowhere")
    base = sqlite3.connect(tmp_path / "newer")
    base.execute("PRAGMA user_version = 9")
    base.close()
    with pytest.raises(UserError, match="has version 9, this code reads 1"):
        ledger(tmp_path / "newer", Teacher())


# ----------------------------------------------------------------------------------------------------- whole sets


@pytest.fixture
def items(tmp_path, encoded_image):
    result = []
    for index in range(6):
        path = tmp_path / f"{index}.jpg"
        path.write_bytes(encoded_image(index % 5))  # 5 is a copy of 0
        result.append(Item(f"class/{index}", ImageRef(str(path)), index % 2))
    return result


def test_a_set_is_queried_once_and_trained_on_without_a_teacher(items, tmp_path, spec):
    path, teacher = tmp_path / "l", Teacher()
    box = ledger(path, teacher, budget=Budget(5))
    assert not embed_queried(box, items, tmp_path / "out", name="set", image_spec=spec)
    assert len(teacher.paid) == 5 and set(teacher.paid) == {item.image.read() for item in items}
    stored = StoredEmbeds(tmp_path / "out", "clean")
    assert (
        stored.info.digest == box.digest
        and stored.info.source == "vendor-1"
        and stored.info.logit_scale == 100
    )
    stored.check(items, ViewConfig(), (9, 9, 9), digest=box.digest)
    for item in items:
        expected = torch.tensor([vector(item.image.read())])
        torch.testing.assert_close(stored.get(item.key).image_embeds, expected, rtol=0, atol=1e-6)
    embed_queried(ledger(path, teacher), items, tmp_path / "again", name="set", image_spec=spec)
    embed_queried(ledger(path, None), items, tmp_path / "third", name="set", image_spec=spec)
    assert len(teacher.paid) == 5


def test_a_set_larger_than_the_budget_is_refused_unasked(items, tmp_path, spec):
    teacher = Teacher()
    with pytest.raises(UserError, match="5 queries to vendor-1 are needed, 4 are left of the budget of 4"):
        embed_queried(
            ledger(tmp_path / "l", teacher, budget=Budget(4)),
            items,
            tmp_path / "out",
            name="set",
            image_spec=spec,
        )
    assert not teacher.calls and not (tmp_path / "out").exists()
    (tmp_path / "3.jpg").write_bytes(b"no image")  # found before paying
    box = ledger(tmp_path / "l", teacher, budget=Budget(4))
    assert embed_queried(box, items, tmp_path / "out", name="set", image_spec=spec) == {
        "undecodable_image": 1
    }
    assert len(teacher.paid) == 4


def test_drawn_views_are_sent_as_pictures_and_masked_ones_are_marked(items, tmp_path, spec):
    from vlmkd.data.decode import decode
    from vlmkd.data.transforms import render

    class Colours(Teacher):
        """Mean colours; refuses the second picture that it sees alone."""

        def __init__(self):
            super().__init__()
            self.refused = None

        def embed_images(self, images):
            self.calls.append(images)
            self.refused = self.refused or images[1]
            if self.refused in images:
                raise NotServed("no", refused=True)
            return [mean_colour(decode(part)).tolist() for part in images]

    def mean_colour(pixels):
        return pixels.double().mean(dim=(0, 1))

    views = ViewConfig((0.3, 0.6), (0.75, 4 / 3), 0.5)
    box = Ledger(tmp_path / "l", Colours(), "vendor-1", dim=3, policy=Policy(failed="mask"))
    told = embed_queried(box, items, tmp_path / "out", name="set", image_spec=spec, views=views, view_count=2)
    assert told == {"masked_view": 1}
    stored = StoredEmbeds(tmp_path / "out")
    for item in items:
        entry = stored.get(item.key)
        for view, embed in zip(entry.views, entry.image_embeds, strict=True):
            expected = F.normalize(mean_colour(render(decode(item.image.read()), view, spec)).float(), dim=0)
            if item.key == "class/0" and view == entry.views[1]:
                assert not embed.any()
            else:
                torch.testing.assert_close(embed, expected, rtol=0, atol=1e-6)
    source = LabelledLoader(
        {"a": Stream(items, 6)}, views=views, seed=1, rank=0, world_size=1, image_spec=spec,
        teacher_embeds=stored, workers=0,
    )  # fmt: skip
    first, second = itertools.islice(iter(source), 2)
    assert first["teacher_valid"][0].all()
    valid = dict(zip(second["keys"], second["teacher_valid"][0].tolist(), strict=True))
    assert valid == {item.key: item.key != "class/0" for item in items}
    assert CLEAN != views


def test_a_ledger_that_cannot_be_opened_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for path, told in ((tmp_path, "cannot be opened"), (tmp_path / "file" / "x.sqlite", "it is a file")):
        with pytest.raises(UserError, match=f"--ledger .*{told}"):
            ledger(path, None)
