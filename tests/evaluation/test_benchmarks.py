"""Benchmarks: small files in each one's own layout, prompts as published, and scores worked out by hand."""

from __future__ import annotations

import base64
import csv
import json
from pathlib import Path

import pytest

from scripts.chat_benchmarks import (
    BENCHMARKS,
    read_answers,
    read_benchmark,
    read_judge,
    scored,
    write_answers,
)
from scripts.chat_benchmarks.hallucination import coco_mentions, coco_names
from scripts.chat_benchmarks.questions import COGNITION, PERCEPTION, letter, vqa_words
from vlmkd.data.chats import ChatItem
from vlmkd.errors import UserError

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def as_json(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def as_lines(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def prompt(item: ChatItem) -> str:
    text = item.record["conversations"][0]["value"]
    assert text.startswith("<image>\n")
    return text.removeprefix("<image>\n")


def score(name: str, items: list[ChatItem], said: list[str], judged: dict | None = None) -> dict[str, float]:
    result = scored(
        name, "set", items, dict(zip((one.key for one in items), said, strict=True)), judged or {}
    )
    assert result.count == len(items) and result.meanings.keys() == result.metrics.keys()
    assert not result.metrics or sum(one.main for one in result.meanings.values()) <= 1
    return result.metrics


def test_gqa(tmp_path) -> None:
    content = {
        "201": {"imageId": "n1", "question": "Is it red?", "answer": "yes"},
        "202": {"imageId": "n2", "question": "Who is it?", "answer": "the man"},
        "203": {"imageId": "n2", "question": "Where?", "answer": "left"},
    }
    items = read_benchmark("gqa", [as_json(tmp_path / "testdev_balanced_questions.json", content)], "pics")
    assert [item.key for item in items] == ["201", "202", "203"] and items[0].record["image"] == "n1.jpg"
    assert prompt(items[0]) == "Is it red?" + SHORT
    assert score("gqa", items, ["Yes.", "the man", "on the left"]) == {"accuracy": pytest.approx(2 / 3)}


def test_scienceqa(tmp_path) -> None:
    one = {"question": "Which?", "choices": ["cat", "dog"], "answer": 1, "hint": "", "image": "image.png"}
    content = {
        "7": one | {"split": "test"},
        "8": one | {"split": "test", "hint": "Pets.", "choices": ["a", "b", "c"], "answer": 0},
        "9": one | {"split": "test", "image": None},
        "10": one | {"split": "train"},
    }
    (tmp_path / "test").mkdir()
    files = [as_json(tmp_path / "problems.json", content)]
    items = read_benchmark("scienceqa", files, str(tmp_path))
    assert [item.record["image"] for item in items] == ["test/7/image.png", "test/8/image.png"]
    assert prompt(items[0]) == "Which?\nA. cat\nB. dog" + LETTER
    assert prompt(items[1]) == "Context: Pets.\nWhich?\nA. a\nB. b\nC. c" + LETTER
    assert score("scienceqa", items, ["B. dog", "The answer is B."]) == {"accuracy": 0.5}
    files.append(
        as_json(
            tmp_path / "llava_test_CQM-A.json",
            [{"id": "7", "conversations": [{"from": "human", "value": "<image>\nGiven"}]}],
        )
    )
    assert prompt(read_benchmark("scienceqa", files, "")[0]) == "Given" + LETTER


def test_letters() -> None:
    said = ["A", " C. dog", "The answer is B.", "D", "b", "B)", "A The answer is B. The answer is C.", ""]
    assert [letter(text, 3) for text in said] == ["A", "C", "B", "", "", "", "", ""]


def test_textvqa(tmp_path) -> None:
    answers = ["two"] * 2 + ["the 2"] + ["Three!"] * 7
    content = {"data": [
        {"question_id": 5, "image_id": "ab", "question": "How many?", "answers": answers},
        {"question_id": 6, "image_id": "ab", "question": "What brand?", "answers": ["dont"] * 10},
    ]}  # fmt: skip
    ocr = [{"question_id": "ab", "text": f"How many?\nReference OCR token: X{SHORT}"}]
    files = [as_json(tmp_path / "TextVQA_0.5.1_val.json", content), as_lines(tmp_path / "ocr.jsonl", ocr)]
    items = read_benchmark("textvqa", files, "")
    assert prompt(items[0]) == f"How many?\nReference OCR token: X{SHORT}"
    assert (prompt(items[1]), items[1].record["image"]) == ("What brand?" + SHORT, "ab.jpg")
    # Three of ten say 2: leaving one of those out two thirds agree, else all three.
    assert score("textvqa", items, ["2.", "Don't"])["accuracy"] == pytest.approx((0.9 + 1) / 2)
    assert score("textvqa", items, ["4", "do"])["accuracy"] == 0


def test_evalai_normalisation() -> None:
    for text, expected in (
        ("The Cat, sits?", "cat sits"), ("1,000", "1000"), ("none of a/b", "0 of b"), ("wi-fi", "wi fi"),
        ("3.5 m.", "3.5 m"), ("couldnt've", "couldn't've"), ("Tom's", "tom 's"), ("A\tnew\nline", "new line"),
    ):  # fmt: skip
        assert vqa_words(text) == expected, text


def test_vizwiz(tmp_path) -> None:
    unknown = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    answers = [{"answer": "unanswerable", "answer_confidence": "yes"}] * 9 + [{"answer": "can"}]
    one = {"image": "VizWiz_val_0.jpg", "question": "What?"}
    items = read_benchmark("vizwiz", [as_json(tmp_path / "val.json", [one | {"answers": answers}])], "")
    assert prompt(items[0]) == "What?" + unknown + SHORT
    assert score("vizwiz", items, ["Unanswerable."])["accuracy"] == 1
    assert score("vizwiz", items, ["a can"])["accuracy"] == pytest.approx(0.3)  # nine sets with one of three
    items = read_benchmark("vizwiz", [as_json(tmp_path / "test.json", [one])], "")
    assert score("vizwiz", items, ["The Can."]) == {}
    assert BENCHMARKS["vizwiz"].submission([(items[0], "The Can.")]) == [  # type: ignore[misc]
        {"image": "VizWiz_val_0.jpg", "answer": "can"}
    ]


def test_mme(tmp_path) -> None:
    lines = "Is it red?  Please answer yes or no.\tYes\nIs it blue? Please answer yes or no.\tNo\n"
    for task in PERCEPTION + COGNITION:
        folder = tmp_path / task
        folder.mkdir()
        if task != "OCR":
            (folder / "1.jpg").touch()
            (folder / "1.txt").write_text(lines)
            continue
        for name in ("images", "questions_answers_YN"):
            (folder / name).mkdir()
        for number in "12":
            (folder / "images" / f"{number}.png").touch()
            (folder / "questions_answers_YN" / f"{number}.txt").write_text(lines)
    items = read_benchmark("mme", [tmp_path], "")
    assert len(items) == 30 and prompt(items[0]) == "Is it red?" + SHORT
    assert items[18].record["image"] == "OCR/images/1.png"
    said = (
        ["Yes", "No"] * 9 + ["Yes, it is.", "no", "no", "It is not"] + ["yes", "yes"] + ["maybe", "No."] * 3
    )
    found = score("mme", items, said)
    assert (found["existence"], found["OCR"]) == (200, 100)  # OCR: two of four, one of two images
    assert (found["perception"], found["commonsense_reasoning"]) == (1900, 50)
    assert (found["code_reasoning"], found["cognition"]) == (50, 200)
    (tmp_path / "count" / "1.jpg").unlink()
    with pytest.raises(UserError, match="has no image 1"):
        read_benchmark("mme", [tmp_path], "")


def test_mmbench(tmp_path) -> None:
    picture = base64.b64encode(b"a picture" * 9).decode()
    head = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"]
    rows = [
        ["3", 'Which "one"?', "Look.\nWell.", "x", "y", "", "", "B", "c", picture],
        ["1000003", 'Which "one"?', "Look.\nWell.", "y", "x", "", "", "A", "c", "3"],
        ["4", "What?", "nan", "x", "y", "z", "w", "D", "c", picture],
        ["1000004", "What?", "", "w", "x", "y", "z", "A", "c", "4"],
    ]
    for name in ("mmbench_dev.tsv", "mmbench_dev_cn.tsv"):
        with (tmp_path / name).open("w", newline="") as file:
            csv.writer(file, delimiter="\t").writerows([head, *rows])
    items = read_benchmark("mmbench", [tmp_path / "mmbench_dev.tsv"], "")
    assert prompt(items[0]) == 'Look.\nWell.\nWhich "one"?\nA. x\nB. y' + LETTER
    assert prompt(items[2]) == "What?\nA. x\nB. y\nC. z\nD. w" + LETTER
    assert items[1].members()["0.png"] == items[0].members()["0.png"] == b"a picture" * 9
    assert score("mmbench", items, ["B", "A", "D", "B. x"]) == {"accuracy": 0.5, "single": 0.75}
    (chinese, *_) = read_benchmark("mmbench", [tmp_path / "mmbench_dev_cn.tsv"], "")
    assert prompt(chinese).endswith("B. y\n请直接回答选项字母。")


def test_pope(tmp_path) -> None:
    def one(number: int, label: str) -> dict:
        return {
            "question_id": number,
            "image": "COCO_1.jpg",
            "text": "Is there a dog in the image?",
            "label": label,
        }

    files = [
        as_lines(tmp_path / "coco_pope_random.json", [one(1, "yes"), one(2, "no")]),
        as_lines(tmp_path / "coco_pope_popular.json", [one(1, "yes"), one(2, "no")]),
    ]
    items = read_benchmark("pope", files, "")
    assert [item.key for item in items] == ["random/1", "random/2", "popular/1", "popular/2"]
    assert prompt(items[0]) == "Is there a dog in the image?" + SHORT
    found = score("pope", items, ["Yes", "No, there is not.", "Yes", "There is. No"])
    assert (found["f1_random"], found["f1_popular"]) == (pytest.approx(1), pytest.approx(2 / 3))
    assert (found["f1"], found["accuracy"]) == (pytest.approx(5 / 6), 0.75)
    assert (found["yes_ratio_random"], found["yes_ratio"]) == (0.5, 0.75)


def halbench(folder: Path) -> list[ChatItem]:
    asked = [
        {"image_id": 9, "question": "Describe it.", "image": "eA=="},
        {"image_id": 12, "question": "And?"},
    ]
    categories = [{"id": 1, "name": "person"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "hot dog"}]
    (folder / "synonyms_refine.txt").write_text(
        "person, man, woman\ndog, puppy\nhot dog\nchair, seat\ntoilet\n"
    )
    files = [
        as_lines(folder / "obj_halbench_300_with_image.jsonl", asked),
        folder / "synonyms_refine.txt",
        as_json(
            folder / "instances_val2014.json",
            {"categories": categories, "annotations": [{"image_id": 9, "category_id": 2}]},
        ),
        as_json(
            folder / "captions_val2014.json",
            {
                "annotations": [
                    {"image_id": 9, "caption": "Two men on a chair."},
                    {"image_id": 1, "caption": "dog"},
                ]
            },
        ),
    ]
    return read_benchmark("object_halbench", files, "val2014")


def test_object_halbench(tmp_path) -> None:
    items = halbench(tmp_path)
    assert items[0].record["things"] == ["chair", "dog", "person"] and not items[1].record["things"]
    assert items[0].members()["0.png"] == b"x"
    assert items[1].record["image"] == "COCO_val2014_000000000012.jpg" and prompt(items[1]) == "And?"
    long = "It shows many different things."
    judged = {"9": ["puppies", "puppy", "woman", "hot dogs", "car"], "12": 'Sure: ["seat"]'}
    found = score("object_halbench", items, [long, long], judged)
    assert found == {"response": 1, "mention": pytest.approx(2 / 4), "unparsable": 0}
    # An answer of three words has no objects; one whose judgement is no list is counted.
    found = score("object_halbench", items, ["A hot dog", long], {"12": "-1"})
    assert found == {"response": 0, "mention": 0, "unparsable": 1}


def test_names_of_coco() -> None:
    names = coco_names("person, man, woman, baby\nelephant\nchair, seat\ntoilet\ntrain\n")
    text = "A baby elephant and a toilet seat; men, seats, a train on a train track"
    assert coco_mentions(text, names) == ["elephant", "toilet", "person", "chair", "train"]


def test_mmhal(tmp_path) -> None:
    content = [
        {"question_type": kind, "image_id": name, "image_src": f"https://x/{name}_o.jpg", "question": "Q?",
         "gt_answer": "A", "model_answer": ""}
        for kind, name in (("attribute", "a"), ("adversarial", "b"), ("attribute", "c"))
    ]  # fmt: skip
    (tmp_path / "a.jpg").touch()
    items = read_benchmark("mmhal", [as_json(tmp_path / "response_template.json", content)], str(tmp_path))
    assert [item.record["image"] for item in items] == ["a.jpg", "b_o.jpg", "c_o.jpg"]
    assert prompt(items[0]) == "Q?"
    told = ["- Rating: 6", "Rating: 2, no hallucination", "rating: 3 or rating: 4"]
    judge = as_json(tmp_path / "judge.json", [{"choices": [{"message": {"content": text}}]} for text in told])
    found = score("mmhal", items, ["x"] * 3, read_judge(judge, items))
    assert found["score"] == pytest.approx(8 / 3) and found["hallucination"] == pytest.approx(2 / 3)
    assert (found["score_attribute"], found["score_adversarial"]) == (3, 2)


def test_amber(tmp_path) -> None:
    kinds = [
        "generative",
        "discriminative-hallucination",
        "discriminative-attribute-state",
        "discriminative-relation",
    ]
    truth = [
        {"id": 1, "type": kinds[0], "truth": ["sea", "man", "tree"], "hallu": ["boat", "gull"]},
        {"id": 2, "type": kinds[1], "truth": "no"},
        {"id": 3, "type": kinds[2], "truth": "yes"},
        {"id": 4, "type": kinds[3], "truth": "no"},
    ]
    query = [
        {"id": number, "image": f"AMBER_{number}.jpg", "query": f"Q{number}?"} for number in (1, 2, 3, 4)
    ]
    relation = {"sea": ["ocean"], "man": [], "tree": [], "boat": ["ship"], "gull": [], "dog": [], "scene": []}
    (tmp_path / "safe_words.txt").write_text("scene\nimage\n")
    files = [
        as_json(tmp_path / "query_all.json", query), as_json(tmp_path / "annotations.json", truth),
        as_json(tmp_path / "relation.json", relation), tmp_path / "safe_words.txt",
    ]  # fmt: skip
    items = read_benchmark("amber", files, "")
    assert (prompt(items[0]), prompt(items[1])) == ("Q1?", "Q2?" + SHORT)
    said = ["The scene shows two men by the ocean, ships and a dog in a blue image.", "No", "no.", "Yes"]
    found = score("amber", items, said)
    # scene, men, ocean are right; ships and dog are not. Two of three things, one of two expected inventions.
    assert (found["chair"], found["hal"], found["cog"]) == (0.4, 1, 0.5)
    assert found["cover"] == pytest.approx(2 / 3)
    # no: said twice, once rightly; true twice.
    assert (found["accuracy"], found["precision"], found["recall"]) == (pytest.approx(1 / 3), 0.5, 0.5)
    assert (found["f1_hallucination"], found["f1_attribute"], found["f1_relation"]) == (
        pytest.approx(1),
        0,
        0,
    )
    assert found["amber"] == pytest.approx((0.6 + 0.5) / 2)
    assert "chair" not in score("amber", items[1:], said[1:])


def test_answers_are_saved_and_read(tmp_path) -> None:
    items = halbench(tmp_path)
    path = tmp_path / "answers.jsonl"
    said = {"9": "a\u2028b\nc", "12": "ü"}
    write_answers(path, "object_halbench", "tiny", items, said)
    assert read_answers(path, "object_halbench", items) == ("tiny", said)
    with pytest.raises(UserError, match="line 1 is no answer to pope"):
        read_answers(path, "pope", items)
    write_answers(path, "object_halbench", "tiny", items[:1], said)
    with pytest.raises(UserError, match="no answer to 1 questions in --data's words .first: 12.; ask again"):
        read_answers(path, "object_halbench", items)
    assert read_answers(path, "object_halbench", items, whole=False) == ("tiny", {"9": said["9"]})
    path.write_text(path.read_text().replace('"question": "', '"question": "other '))
    with pytest.raises(UserError, match="no answer to 2 questions in --data's words .first: 9."):
        read_answers(path, "object_halbench", items)


def test_judge_files(tmp_path) -> None:
    items = halbench(tmp_path)
    by_image = as_lines(
        tmp_path / "j.jsonl", [{"image_id": 12, "extract_objs": ["b"]}, {"image_id": 9, "extract_objs": []}]
    )
    assert read_judge(by_image, items) == {"9": [], "12": ["b"]}
    assert read_judge(as_json(tmp_path / "j.json", [["a"], '["b"]']), items) == {"9": ["a"], "12": '["b"]'}
    with pytest.raises(UserError, match="has nothing on 1 questions .first: 12."):
        read_judge(as_json(tmp_path / "j.json", [["a"]]), items)


def test_files_of_another_layout_are_one_line(tmp_path) -> None:
    gqa = as_json(tmp_path / "q.json", {"1": {"question": "?"}})
    with pytest.raises(UserError, match="--data is not in the layout of gqa .lacks 'imageId'."):
        read_benchmark("gqa", [gqa], "")
    with pytest.raises(UserError, match="--data is not in the layout of vizwiz|has no question of vizwiz"):
        read_benchmark("vizwiz", [gqa], "")
    with pytest.raises(UserError, match="has no question of mme"):
        read_benchmark("mme", [tmp_path], "")
    with pytest.raises(UserError, match="--data has no file like annotations; name it too"):
        read_benchmark("amber", [as_json(tmp_path / "query_all.json", [])], "")
    pope = as_lines(
        tmp_path / "coco_pope_random.json", [{"question_id": 1, "image": "a", "text": "?", "label": "no"}] * 2
    )
    with pytest.raises(UserError, match="has question random/1 of pope twice"):
        read_benchmark("pope", [pope], "")


def test_scenes(tmp_path) -> None:
    def one(number: int, kind: str, answer: str, *things: str) -> dict:
        talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": answer}]
        return {
            "id": str(number),
            "image": "a.jpg",
            "conversations": talk,
            "kind": kind,
            "things": list(things),
        }

    as_json(tmp_path / "concepts.json", ["dog", "old dog", "cat"])
    captions = as_json(tmp_path / "captions.json", [one(n, "caption", "A cat.", "cat") for n in range(2)])
    found = score("scenes", read_benchmark("scenes", [captions], ""), ["A cat and an old dog.", "A thing."])
    assert found == {"chair_i": 0.5, "chair_s": 0.5, "cover": 0.5}
    test = as_json(
        tmp_path / "test.json", [one(0, "count", "Two."), one(1, "count", "One."), one(2, "where", "Left.")]
    )
    items = read_benchmark("scenes", [test], "")
    assert score("scenes", items, ["two", "Two.", "left"]) == {"count": 0.5, "where": 1.0, "accuracy": 0.75}
    exists = as_json(tmp_path / "pope.json", [one(0, "exists", "Yes."), one(1, "exists", "No.")])
    found = score("scenes", read_benchmark("scenes", [exists], ""), ["Yes.", "Yes."])
    assert (found["accuracy"], found["recall"], found["yes_ratio"]) == (0.5, 1.0, 1.0)
    mixed = as_json(tmp_path / "mixed.json", [one(0, "exists", "Yes."), one(1, "caption", "A cat.", "cat")])
    found = score("scenes", read_benchmark("scenes", [mixed], ""), ["Yes.", "A dog."])
    assert (found["chair_i"], found["accuracy"]) == (1.0, 1.0)
    with pytest.raises(UserError, match="--data names 2 files of scenes; give one a call"):
        read_benchmark("scenes", [test, captions], "")
    (tmp_path / "concepts.json").unlink()
    with pytest.raises(UserError, match="vocabulary .*concepts.json"):
        read_benchmark("scenes", [captions], "")


def test_every_number_has_its_protocol() -> None:
    assert all(one.protocol and "\n" not in one.protocol for one in BENCHMARKS.values())
