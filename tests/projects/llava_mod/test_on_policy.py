"""On-policy distillation: what is sampled, where it is learned, and the loss there against dense float64."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from projects.llava_mod.config import LlavaModConfig
from projects.llava_mod.experts import balance, sparse_layers, upcycle
from projects.llava_mod.on_policy import is_on_policy, own_answers
from projects.llava_mod.task import LlavaModTask
from tests.chat_parts import byte_tokenizer, picture
from vlmkd import config
from vlmkd.chat_config import MllmConfig
from vlmkd.chat_ids import IGNORED
from vlmkd.data.chats import Chat, ChatPipeline, ChatTokens
from vlmkd.data.samples import RawSample
from vlmkd.errors import UserError
from vlmkd.evaluation.answers import ChatModel
from vlmkd.export.mllm import ChatParts
from vlmkd.models.backbones import load_backbone
from vlmkd.models.mllm import Mllm, Projector, VisionTower

CHATS = [
    ([picture(1)], [("<image>what?", "A cat.")]),
    ([], [("a longer question without any image", "No."), ("and then?", "Nothing more.")]),
    ([picture(2), picture(3)], [("<image>b", "c"), ("<image>and now?", "the last")]),
]


def parts(seed: int, *, vocabulary: int = 260, sparse: bool = False) -> ChatParts:
    torch.manual_seed(seed)
    decoder = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.3,
        )
    )  # fmt: skip
    tower = VisionTower(load_backbone("timm:vit_tiny_patch16_224", False, image_size=32, seed=0)).eval()
    module = Mllm(tower, Projector(tower.dim, 16), decoder)
    if sparse:
        upcycle(decoder, [0], experts=4)
        torch.nn.init.normal_(decoder.model.layers[0].mlp.experts.down_proj, std=0.3)
    return ChatParts(module.train(), byte_tokenizer(), tower.image_spec, MllmConfig(), {}, "")


def made(*options: str, **kinds: bool) -> tuple[LlavaModTask, dict, ChatPipeline]:
    student, teacher = parts(0, **kinds), parts(1, vocabulary=258)
    teacher.module.eval().requires_grad_(False)
    given = [
        "student.init_from=x",
        "teacher.init_from=y",
        "data.chats=[x]",
        "run_dir=r",
        "loss.sample_tokens=5",
    ]
    cfg = config.load(LlavaModConfig, [*given, *options])
    tokens = ChatTokens(student.tokenizer, "plain", student.module.tower.tokens)
    pipeline = ChatPipeline(tokens, student.image_spec, max_length=400, pack=True)
    batch = pipeline.collate([chat(pipeline, number) for number in range(len(CHATS))])
    return LlavaModTask(cfg, student, tokens, teacher), batch, pipeline


def chat(pipeline: ChatPipeline, number: int) -> Chat:
    images, turns = CHATS[number]
    talk = [
        {"from": who, "value": text}
        for turn in turns
        for who, text in zip(("human", "gpt"), turn, strict=True)
    ]
    members = {"json": json.dumps({"conversations": talk}).encode()}
    members |= {f"{place}.png": data for place, data in enumerate(images)}
    found = pipeline.process(RawSample("", str(number), members))
    assert isinstance(found, Chat)
    return found


def test_the_last_answers_of_packed_chats_become_the_students() -> None:
    task, batch, _ = made("stage=d2s", "loss.on_policy=1", "loss.sample_temperature=0", sparse=True)
    assert len(batch["input_ids"]) < len(CHATS)
    own = task.prepare(batch, 0)
    assert task.core.training and task.core.decoder.training and not task.core.tower.training
    model = task.predictor()
    task.core.eval()
    asked = [(images, turns[:-1], turns[-1][0]) for images, turns in CHATS]
    texts = model.answer(asked, most_tokens=5, suppress_tokens=[258, 259])  # which the teacher has not
    for row, (one, text) in enumerate(zip(asked, texts, strict=True)):
        prompt = task.tokens.prompt(one[1], one[2])
        length = int(own["segments"][row].sum())
        ids, targets = own["input_ids"][row], own["targets"][row]
        assert ids[: len(prompt)].tolist() == prompt
        answer = ids[len(prompt) : length].tolist()
        assert task.parts.tokenizer.decode(answer, skip_special_tokens=True).strip() == text
        assert len(answer) == 5 or answer[-1] == task.tokens.end
        assert targets[len(prompt) - 1 : length - 1].tolist() == answer
        assert int((targets != IGNORED).sum()) == len(answer)
    assert task.weight(own) == float((own["targets"] != IGNORED).sum())


def test_samples_follow_the_whole_distribution_and_the_random_state() -> None:
    model = parts(0)
    found = model.module.eval()
    found.decoder.generation_config.update(top_p=0.1, repetition_penalty=3.0)  # as Qwen's files have
    tokens = ChatTokens(model.tokenizer, "plain", found.tower.tokens)
    ids, learned = tokens.encode([("ab", "c")])
    count = 4000
    batch = {
        "input_ids": torch.tensor([ids] * count),
        "targets": torch.tensor([[IGNORED, ids[2], ids[3], ids[4], IGNORED]] * count),
        "segments": torch.ones(count, 5, dtype=torch.int64),
        "images": torch.zeros(0, 3, 32, 32),
        "image_rows": torch.zeros(0, dtype=torch.int64),
    }
    assert learned == [False, False, True, True, True]
    asked = ChatModel("", found, tokens, model.image_spec)
    draws = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        draws.append(own_answers(asked, batch, 250, most_tokens=1, temperature=2.0)["targets"][:, 1])
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    with torch.no_grad():
        logits = found.decoder(torch.tensor([ids[:2]])).logits[0, -1, :250]
    expected = (logits / 2).softmax(-1)
    seen = torch.bincount(draws[0], minlength=250)[:250] / count
    assert int(draws[0].max()) < 250
    assert float((seen - expected).abs().max()) < 5 * float((expected / count).sqrt().max())


def dense(model: Mllm, batch: dict) -> Tensor:
    """Logits [N, V] in float64 of the learned positions."""
    wide = {name: value.double() if value.is_floating_point() else value for name, value in batch.items() if isinstance(value, Tensor)}  # fmt: skip
    hidden = model.double()(wide)
    return model.head(hidden)[batch["targets"] != IGNORED]


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_divergence_is_that_of_the_samples_in_dense_float64(beta: float) -> None:
    task, batch, _ = made(
        "stage=d2s", "loss.on_policy=1", "loss.ce=1", "loss.divergence=jsd", f"loss.jsd_beta={beta}",
        "loss.temperature=2", "loss.chunk=3", sparse=True,
    )  # fmt: skip
    torch.manual_seed(0)
    own = task.prepare(batch, 7)
    found = task.step(own, 7)
    weighed = found.loss.item()
    found.loss.backward()
    grad = task.core.head.weight.grad.clone()
    assert task.teacher is not None
    p = (dense(task.teacher.module, own)[:, :258] / 2).log_softmax(-1)
    q = (dense(task.core, own)[:, :258] / 2).log_softmax(-1)
    m = (beta * p.exp() + (1 - beta) * q.exp()).log()
    to_teacher, to_student = (p.exp() * (p - m)).sum(-1), (q.exp() * (q - m)).sum(-1)
    if beta == 0:
        each = (p.exp() * (p - q)).sum(-1)
    elif beta == 1:
        each = (q.exp() * (q - p)).sum(-1)
    else:
        each = beta * to_teacher + (1 - beta) * to_student
    expected = 4 * each.mean()  # without cross entropy: the samples are nobody's truth
    even = 0.01 * balance(task.core, own["segments"] > 0)
    assert weighed == pytest.approx((expected + even).item(), rel=1e-5)
    (reference,) = torch.autograd.grad(expected, task.core.head.weight)
    torch.testing.assert_close(grad, reference.float(), rtol=1e-3, atol=1e-6)
    rows = int((own["targets"] != IGNORED).sum())
    assert float(found.metrics["sampled/kl"]) == pytest.approx(float(expected), rel=1e-5)
    assert float(found.metrics["sampled/tokens"]) == pytest.approx(rows / 3)
    assert len(sparse_layers(task.core)) == 1 and "kl" not in found.metrics


def test_a_share_of_the_steps_is_sampled_by_seed_and_step_alone() -> None:
    drawn = [is_on_policy(3, step, 0.3) for step in range(1000)]
    assert drawn == [is_on_policy(3, step, 0.3) for step in range(1000)]
    assert drawn != [is_on_policy(4, step, 0.3) for step in range(1000)]
    assert 250 < sum(drawn) < 350
    assert all(is_on_policy(0, step, 1.0) and not is_on_policy(0, step, 0.0) for step in range(1000))
    task, batch, _ = made("stage=d2d")
    assert task.prepare(batch, 0) is batch


def test_only_distillation_samples() -> None:
    with pytest.raises(UserError, match="config field loss.on_policy goes with d2d and d2s only"):
        config.load(LlavaModConfig, ["stage=sft", "loss.on_policy=0.5", "student.init_from=x", "data.chats=[x]", "run_dir=r"])  # fmt: skip
