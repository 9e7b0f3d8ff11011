"""What a mechanism makes of the gradient: against runs that really lack it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from unisd import UserError
from unisd.files import METRICS
from unisd.testing import gradients, trainer

MECHANISMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "agreement": ({"agreement": "token", "agreement_gamma": 1.0}, {"agreement": "none"}),
    "contrast": ({"contrastive_weight": 0.3}, {"contrastive_weight": 0.0}),
    "features": ({"feature_weight": 0.3}, {"feature_weight": 0.0}),
    "clip": ({"token_clip": 0.01}, {"token_clip": None}),
    "position": ({"token_weights": ["position"]}, {"token_weights": []}),
    "geometric": ({"target": "geometric:a=0.5"}, {"target": None}),
}
ALL = {name: value for options, _ in MECHANISMS.values() for name, value in options.items()}


def flat(found: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.double().flatten() for _, value in sorted(found.items())])


def shares(built: Any) -> dict[str, float]:
    gradients(built)
    return {name: value for name, value in built.metrics.values.items() if name.startswith("gradient/")}


@pytest.mark.parametrize("name", MECHANISMS)
def test_a_share_is_that_of_a_run_without_it(tmp_path: Path, name: str) -> None:
    whole = flat(gradients(trainer(tmp_path, **ALL))[1])
    without = flat(gradients(trainer(tmp_path, **ALL | MECHANISMS[name][1]))[1])
    expected = float((whole - without).norm() / whole.norm())
    found = shares(trainer(tmp_path, **ALL, diagnostics_gradient_steps=1))
    assert {key.removeprefix("gradient/") for key in found} == set(MECHANISMS)
    assert expected > 1e-4 and found[f"gradient/{name}"] == pytest.approx(expected, rel=1e-3)


def test_measuring_changes_nothing(tmp_path: Path) -> None:
    """Neither weights nor any other metric; every so many steps from the first on."""
    runs = {}
    for every in (None, 2):
        folder = tmp_path / str(every)
        built = trainer(folder, **ALL, max_steps=3, diagnostics_gradient_steps=every)
        built.train()
        lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
        measured = [any(name.startswith("gradient/") for name in line) for line in lines]
        assert measured == [every == 2, False, every == 2]
        kept = [
            {k: v for k, v in line.items() if not k.startswith(("gradient/", "step_time"))} for line in lines
        ]
        runs[every] = kept, flat(dict(built.model.named_parameters()))
    assert runs[None][0] == runs[2][0] and torch.equal(runs[None][1], runs[2][1])


def test_a_run_without_mechanisms_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer(tmp_path, diagnostics_gradient_steps=1)
    assert "diagnostics_gradient_steps has no effect" in caplog.text


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from unisd.training.preflight import check_machine

    args = trainer(tmp_path, diagnostics_gradient_steps=1).args
    monkeypatch.setattr(type(args), "world_size", 2)
    with pytest.raises(UserError, match="in one process and without DeepSpeed"):
        check_machine(args)
