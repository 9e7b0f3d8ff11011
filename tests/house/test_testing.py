"""What `unisd.testing` promises to authors of plug-ins."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from unisd import testing
from unisd.rollout.engine import Sampling


@pytest.mark.parametrize("family", sorted(testing.FAMILIES))
def test_a_model_is_the_same_for_a_seed_and_reads_the_tokenizer(family: str) -> None:
    ids = torch.tensor([testing.tokenizer().encode("What is 1 + 2?")])
    one, same, other = (testing.model(family, seed)(ids).logits for seed in (0, 0, 1))
    assert one.equal(same) and not one.equal(other)
    assert one.shape == (1, ids.shape[1], len(testing.tokenizer()))
    assert testing.tokenizer().decode(ids[0], skip_special_tokens=True) == "What is 1 + 2?"
    assert testing.tokenizer(chat=False).chat_template is None


def test_a_fixed_engine_answers_by_row_and_generation() -> None:
    engine = testing.FixedEngine([[7, 8, 2], [9, 2], [10, 11, 12, 13]])
    keys = [(0, 5, 1, 0), (0, 5, 1, 1), (1, 9, 3, 0)]  # seed, step, row, generation
    found = engine.generate([[1]] * 3, keys, Sampling(max_new_tokens=3))
    assert [(c.ids, c.truncated) for c in found] == [
        ([9, 2], False),
        ([10, 11, 12], True),
        ([7, 8, 2], False),
    ]
    greedy = engine.generate([[1]] * 2, None, Sampling(max_new_tokens=9))
    assert [c.ids for c in greedy] == [[7, 8, 2], [9, 2]]


def test_a_trainer_gives_loss_and_gradients_of_its_first_step(tmp_path: Path) -> None:
    answers = [testing.tokenizer().encode(text) for text in ("One.<|end|>", "It is two.<|end|>")]
    built = testing.trainer(
        tmp_path,
        "qwen3",
        engine=testing.FixedEngine(answers),
        train_dataset=testing.rows(4),
        learning_rate=0.5,
    )
    assert built.args.learning_rate == 0.5 and len(built.rows) == 4
    loss, gradients = testing.gradients(built)
    assert loss > 0 and gradients.keys() == {name for name, _ in built.model.named_parameters()}
    assert all(g.isfinite().all() for g in gradients.values()) and built.state.global_step == 0


def test_it_needs_no_pytest() -> None:
    assert "pytest" not in Path(testing.__file__).read_text(encoding="utf-8")
