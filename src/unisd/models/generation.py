"""Mend a generation config that transformers reads but refuses to write, before a run saves it."""

from __future__ import annotations

from typing import Any

from unisd.errors import UserError, one_line
from unisd.models.adapters import without_adapter

# Fields that only sampling reads, and those that only beam search reads, with values that mean
# nothing is set.
_SAMPLING: dict[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
_BEAMS: dict[str, Any] = {"early_stopping": False, "length_penalty": 1.0}


def mend_generation_config(model: Any) -> str | None:
    """Make the model's generation config one that can be saved; returns what was changed, as one
    sentence, or None.

    Sampling fields without `do_sample` mean sampling (servers sample by them): `do_sample` is set.
    Beside `do_sample=false`, and beam fields without beams, they mean nothing: they are unset.

    Raises:
        UserError: it is broken in another way.
    """
    config = getattr(without_adapter(model), "generation_config", None)
    if config is None or _why_unsavable(config) is None:
        return None
    changed = []
    sampling = _set_among(config, _SAMPLING)
    if sampling and config.do_sample is None:
        config.do_sample = True
        changed.append(f"do_sample=true is set, because of {_listed(config, sampling)}")
    elif sampling and not config.do_sample:
        changed.append(f"{_listed(config, sampling)} left out, since do_sample=false")
        _unset(config, sampling)
    beams = _set_among(config, _BEAMS) if config.num_beams in (None, 1) else []
    if beams:
        changed.append(f"{_listed(config, beams)} left out, since there are no beams")
        _unset(config, beams)
    if config.pad_token_id is not None and config.pad_token_id < 0:
        changed.append(f"pad_token_id={config.pad_token_id} left out")
        config.pad_token_id = None
    if reason := _why_unsavable(config):
        raise UserError(
            f"the model's generation config could not be saved after training: {reason}: fix its"
            " generation_config.json."
        )
    return f"The base's generation_config.json could not be saved as it is: {'; '.join(changed)}."


def _why_unsavable(config: Any) -> str | None:
    try:
        config.validate(strict=True)
    except ValueError as error:
        return one_line(error)
    return None


def _set_among(config: Any, neutral: dict[str, Any]) -> list[str]:
    return [name for name, value in neutral.items() if getattr(config, name, None) not in (None, value)]


def _unset(config: Any, names: list[str]) -> None:
    for name in names:
        setattr(config, name, None)


def _listed(config: Any, names: list[str]) -> str:
    return " and ".join(f"{name}={getattr(config, name)}" for name in names)
