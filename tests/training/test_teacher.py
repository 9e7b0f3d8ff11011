"""The teacher's weights: moved together as they would be one by one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from unisd import teacher as teachers
from unisd.teacher import Teacher


@pytest.mark.parametrize("together", [1, 22, 2**24])
def test_weights_move_in_groups_as_one_by_one(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teachers, "TOGETHER", together)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2))
    teacher = Teacher(model, "ema", update_rate=0.3)
    groups = list(teacher._groups())
    assert [name for group in groups for name in group] == list(teacher.state)
    assert len(groups) == {1: 6, 22: 3, 2**24: 1}[together]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn_like(p)
    teacher.update(1)
    apart = norm = 0.0
    for name, p in model.named_parameters():
        assert torch.equal(teacher.state[name], before[name].lerp(p.detach(), 0.3))
        apart += float((teacher.state[name] - p.detach()).double().square().sum())
        norm += float(p.detach().double().square().sum())
    assert float(teacher.distance()) == pytest.approx((apart / norm) ** 0.5, rel=1e-6)


def test_a_live_teacher_is_at_no_distance() -> None:
    assert float(Teacher(nn.Linear(2, 2), "live").distance()) == 0.0
