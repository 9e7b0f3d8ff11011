"""What must not change a step's loss and gradient, on tiny random models of five families, and what
they must equal.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig

import unisd.scoring.scorer
import unisd.trainer
from tests.helpers.steps import STAR, assert_same
from unisd import UniSDTrainer
from unisd import testing as tiny
from unisd.testing import FixedEngine, gradients, trainer

# one of them always: with a tied head
FAMILIES = [
    pytest.param(name, marks=[] if name == "qwen3" else pytest.mark.long) for name in sorted(tiny.FAMILIES)
]


def naive_sdft(built: UniSDTrainer, alpha: float) -> tuple[float, dict[str, torch.Tensor]]:
    """SDFT written out: one row at a time, the model's own full logits, plain autograd, mean over
    tokens, mean over rows.
    """
    completions = [
        built.engine.generate([built.prompts.student(row)], [(built.args.seed, 0, i, 0)], built.sampling)[
            0
        ].ids
        for i, row in enumerate(built.rows)
    ]
    built.model.zero_grad()
    losses = []
    for row, completion in zip(built.rows, completions, strict=True):
        student_prompt, teacher_prompt = built.prompts.student(row), built.prompts.teacher(row)
        with torch.no_grad(), built.teacher.in_place():
            logits = built.model(torch.tensor([teacher_prompt + completion])).logits[
                0, len(teacher_prompt) - 1 : -1
            ]
            log_q = F.log_softmax(logits / built.args.temperature, -1)
        logits = built.model(torch.tensor([student_prompt + completion])).logits[
            0, len(student_prompt) - 1 : -1
        ]
        log_p = F.log_softmax(logits / built.args.temperature, -1)
        if alpha == 0:
            per_token = (log_q.exp() * (log_q - log_p)).sum(-1)
        elif alpha == 1:
            per_token = (log_p.exp() * (log_p - log_q)).sum(-1)
        else:
            log_m = ((1 - alpha) * log_p.exp() + alpha * log_q.exp()).log()
            per_token = alpha * (log_q.exp() * (log_q - log_m)).sum(-1) + (1 - alpha) * (
                log_p.exp() * (log_p - log_m)
            ).sum(-1)
        losses.append(per_token.mean())
    loss = torch.stack(losses).mean()
    loss.backward()
    return float(loss.detach()), {
        name: p.grad.clone() for name, p in built.model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_generations_that_share_the_reading_of_their_prompt(
    tmp_path: Any, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unisd.scoring.passes.SHARED_FROM", 2)
    options = {"num_generations": 4, "gradient_accumulation_steps": 2, **STAR}
    shared, separate = (trainer(tmp_path / name, family, **options) for name in ("a", "b"))
    assert shared.backbone.can_continue(shared.pad_id)
    for built in (shared, separate):
        passes = built.scorer.passes
        passes.layout = replace(passes.layout, share_prefixes=False, share_prompts=built is shared)
    counts: list[int] = []
    continuations = shared.backbone.continuations
    shared.backbone.continuations = lambda prompt, *rest: (
        counts.append(len(rest[0])) or continuations(prompt, *rest)
    )  # type: ignore
    assert_same(gradients(shared), gradients(separate), 1e-4)
    # 4 rows under teacher, negative, 3 auxiliary and student views
    assert set(counts) == {4} and len(counts) == 4 * 6


@pytest.mark.parametrize("family", FAMILIES)
def test_views_that_share_what_they_begin_with(tmp_path: Any, family: str) -> None:
    shared, separate = (trainer(tmp_path / name, family, **STAR) for name in ("a", "b"))
    # Gemma's layers look back through a window.
    assert shared.scorer.passes.layout.share_prefixes == (family != "gemma3")
    layout = separate.scorer.passes.layout
    separate.scorer.passes.layout = replace(layout, share_prefixes=False)
    assert_same(gradients(shared), gradients(separate), 1e-4)
    read, whole = (sum(built.scorer.passes.tokens.values()) for built in (shared, separate))
    assert read < 0.9 * whole if family != "gemma3" else read == whole


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_mechanisms_off_is_sdft(tmp_path: Any, family: str, alpha: float) -> None:
    built = trainer(tmp_path, family, distillation_alpha=alpha)
    ours = gradients(built)
    assert_same(ours, naive_sdft(built, alpha), 1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_neutral_mechanisms_change_nothing(tmp_path: Any, family: str) -> None:
    off = gradients(trainer(tmp_path, family))
    for neutral in (
        {"agreement": "token", "agreement_gamma": 0.0},
        {"agreement": "sequence", "agreement_gamma": 0.0},
        {"token_clip": float("inf")},
        {"entry_clip": float("inf")},
    ):
        assert_same(off, gradients(trainer(tmp_path, family, **neutral)))
    no_contexts = [
        {**row, "auxiliary_contexts": row["auxiliary_contexts"][: i == 0]}
        for i, row in enumerate(tiny.rows(8))
    ]
    no_contexts[0]["auxiliary_contexts"] = tiny.rows(8)[0]["auxiliary_contexts"][:2]
    # K = 0 for all rows but one, whose weights differ: the others' weights must be exactly 1.
    built = trainer(tmp_path, family, train_dataset=no_contexts, agreement="sequence", agreement_gamma=1.0)
    gradients(built)
    assert built.metrics.values["agreement/max"] == 1.0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_micro_batch_split_changes_nothing(tmp_path: Any, family: str, aggregation: str) -> None:
    whole, *others = (
        gradients(
            trainer(
                tmp_path, family, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size,
                loss_aggregation=aggregation, **STAR,
            )
        )
        for size in (8, 4, 1)
    )  # fmt: skip
    for other in others:
        assert_same(whole, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_padded(tmp_path: Any, family: str) -> None:
    packed = trainer(tmp_path, family, packing="packed", **STAR)
    padded = trainer(tmp_path, family, packing="padded", **STAR)
    assert packed.packed and not padded.packed
    assert_same(gradients(packed), gradients(padded))


@pytest.mark.parametrize("family", FAMILIES)
def test_chunked_equals_plain(tmp_path: Any, family: str) -> None:
    chunked = gradients(trainer(tmp_path, family, loss_chunk_tokens=7, **STAR))
    plain = gradients(trainer(tmp_path, family, loss_implementation="plain", **STAR))
    assert_same(chunked, plain)


def test_token_budget_changes_nothing(tmp_path: Any) -> None:
    assert_same(
        gradients(trainer(tmp_path, token_budget=1, **STAR)),
        gradients(trainer(tmp_path, token_budget=10_000, **STAR)),
    )


@pytest.mark.parametrize(
    "extra",
    [{"distillation_weight": 0.0, "feature_weight": 1.0}, {"feature_layers": [0, 1], "feature_weight": 0.5}],
)
@pytest.mark.long
def test_feature_matching_equals_naive(tmp_path: Any, extra: dict[str, Any]) -> None:
    """Against all hidden states of the model, one row at a time."""
    built = trainer(tmp_path, **extra)
    ours = gradients(built)
    base = 0.0 if built.args.distillation_weight == 0 else naive_sdft(built, 0.0)[0]
    distances = []
    for i, row in enumerate(built.rows):
        completion = built.engine.generate([built.prompts.student(row)], [(3, 0, i, 0)], built.sampling)[
            0
        ].ids
        states = {}
        for name, prompt in (
            ("student", built.prompts.student(row)),
            ("teacher", built.prompts.teacher(row)),
        ):
            swap = built.teacher.in_place() if name == "teacher" else torch.no_grad()
            with torch.no_grad(), swap:
                # Block outputs by recomputation: transformers' last entry is after the final norm.
                with built.backbone.capture((0, 1)) as captured:
                    built.model(torch.tensor([prompt + completion]))
                span = slice(len(prompt) - 1, len(prompt) - 1 + len(completion))
                chosen = (
                    [captured.layers[0], captured.layers[1]]
                    if "feature_layers" in extra
                    else [captured.final]
                )
                states[name] = [h[0, span] for h in chosen]
        pairs = zip(states["student"], states["teacher"], strict=True)
        distances.append(torch.stack([(s - t).square().mean(-1) for s, t in pairs]).mean())
    expected = base + built.args.feature_weight * float(torch.stack(distances).mean())
    assert ours[0] == pytest.approx(expected, rel=1e-4)
    assert max(float(g.abs().max()) for g in ours[1].values()) > 0


def test_the_ema_teacher_follows_every_so_many_steps(tmp_path: Any) -> None:
    built = trainer(
        tmp_path,
        teacher_model_kind="ema",
        teacher_update_rate=0.25,
        teacher_sync_steps=2,
        gradient_accumulation_steps=1,
        max_steps=3,
    )
    expected = {name: p.detach().clone() for name, p in built.model.named_parameters()}
    update = built.teacher.update

    def remember(step: int) -> None:
        if step == 2:
            for name, p in built.model.named_parameters():
                expected[name].lerp_(p.detach(), 0.25)
        update(step)

    built.teacher.update = remember  # type: ignore[method-assign]
    built.train()
    assert all(torch.equal(value, expected[name]) for name, value in built.teacher.state.items())


@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.long)])
def test_ema_teacher_is_the_closed_form(tmp_path: Any, lora: bool) -> None:
    """phi_n = beta^n theta_0 + (1 - beta) sum_k beta^(n-k) theta_k, on all trained weights (for
    LoRA: on the factors).
    """
    rate, steps = 0.1, 5
    peft_config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False) if lora else None
    built = trainer(
        tmp_path,
        teacher_model_kind="ema",
        teacher_update_rate=rate,
        max_steps=steps,
        peft_config=peft_config,
        num_train_epochs=9,
    )
    trained = {name: p for name, p in built.model.named_parameters() if p.requires_grad}
    assert all("lora" in name for name in trained) == lora
    history = [{name: p.detach().double().clone() for name, p in trained.items()}]
    original = built.teacher.update

    def record(step: int) -> None:
        history.append({name: p.detach().double().clone() for name, p in trained.items()})
        original(step)

    built.teacher.update = record  # type: ignore[method-assign]
    built.train()
    moved = 0.0
    for name in trained:
        expected = (1 - rate) ** steps * history[0][name]
        for k in range(1, steps + 1):
            expected = expected + rate * (1 - rate) ** (steps - k) * history[k][name]
        torch.testing.assert_close(built.teacher.state[name].double(), expected, rtol=1e-5, atol=1e-6)
        moved += float((expected - history[0][name]).abs().sum())
    assert moved > 0


@pytest.mark.long
def test_base_teacher_stays_and_adapters_share_the_base(tmp_path: Any) -> None:
    built = trainer(
        tmp_path, peft_config=LoraConfig(r=4, target_modules="all-linear"), max_steps=3, num_train_epochs=9
    )
    prompt = torch.tensor([built.prompts.teacher(built.rows[0])])
    with torch.no_grad(), built.model.disable_adapter():
        base = built.model(prompt).logits
    built.train()
    with torch.no_grad(), built.teacher.in_place():
        assert torch.equal(built.model(prompt).logits, base)
    with torch.no_grad():
        assert not torch.equal(built.model(prompt).logits, base)
    assert sum(value.numel() for value in built.teacher.state.values()) < 0.5 * built.model.num_parameters()


def test_a_step_without_loss_tokens_is_exactly_zero(tmp_path: Any) -> None:
    masked = {"engine": FixedEngine([[5] * 99]), "mask_truncated_completions": True}
    # of few rows: more of them without loss would end the run
    built = trainer(tmp_path, per_device_train_batch_size=1, **masked, **STAR)
    loss, found = gradients(built)
    assert loss == 0.0
    assert all(float(g.abs().max()) == 0 for g in found.values())
    built.args.max_steps = 1
    built.train()


def test_loss_and_scores_share_one_precision(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clip at the 0.5-quantile of D, in bf16: the D of the training pass is that of the scoring
    pass before it.

    Of most tokens: a kernel may round the rows at the end of a product, which is larger when
    scoring, in another way.
    """
    found: dict[str, torch.Tensor] = {}

    def watch(name: str, module: Any) -> None:
        original = module.chunked_loss

        def watched(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            found[name] = output.divergence_N.detach().sort().values
            return output

        monkeypatch.setattr(module, "chunked_loss", watched)

    watch("scores", unisd.scoring.scorer)
    watch("loss", unisd.trainer)
    one_batch = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": 1}
    trainer(tmp_path, bf16=True, token_clip_quantile=0.5, **one_batch).train()
    assert found["loss"].isclose(found["scores"], rtol=1e-4, atol=1e-6).float().mean() > 0.5
    torch.testing.assert_close(found["loss"], found["scores"], rtol=2e-2, atol=1e-3)
