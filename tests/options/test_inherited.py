"""Every option of transformers works or is refused: none is accepted without effect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch._dynamo.utils import counters
from transformers.integrations import integration_utils

from unisd import UniSDConfig, UserError
from unisd.options.inherited import HARMLESS, REFUSED, WORKS, unknown
from unisd.options.option import declared
from unisd.options.parser import inherited_names
from unisd.options.table import UniSDOptions
from unisd.run.resolve import parse
from unisd.testing import trainer

OTHER: dict[str, Any] = {
    "average_tokens_across_devices": False,
    "label_smoothing_factor": 0.1,
    "liger_kernel_config": {"rope": True},
    "per_device_eval_batch_size": 3,
    "eval_do_concat_batches": False,
    "eval_accumulation_steps": 2,
    "include_for_metrics": ["loss"],
    "label_names": ["labels"],
    "length_column_name": "size",
    "debug": "underflow_overflow",
    "parallelism_config": "something",
}
"""A value that is not the default; of switches it is True."""


def test_every_option_of_the_installed_transformers_is_classified() -> None:
    """A new one fails here: see whether it has an effect in our training, and add it to a list."""
    ours = {item.name for item in declared(UniSDOptions)}
    assert unknown(inherited_names() - ours) == []
    assert not WORKS & {*REFUSED} and not WORKS & {*HARMLESS} and not {*REFUSED} & {*HARMLESS}
    assert not ours & (WORKS | {*REFUSED} | {*HARMLESS})


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_would_have_no_effect_is_refused_with_a_remedy(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"{name} has no effect here: .*: (unset|set)"):
        UniSDConfig(output_dir=str(tmp_path), use_cpu=True, **{name: OTHER.get(name, True)})


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_sampling_strategies_that_need_lengths(tmp_path: Path, strategy: str) -> None:
    with pytest.raises(
        UserError, match=f"train_sampling_strategy={strategy} is not one of: random, sequential"
    ):
        UniSDConfig(output_dir=str(tmp_path), train_sampling_strategy=strategy)


def order(tmp_path: Path, **options: Any) -> list[int]:
    steps = {"gradient_accumulation_steps": 1, "num_iterations": 2}
    return list(trainer(tmp_path, **steps, **options)._get_train_sampler())


def test_order_of_rows_with_several_iterations(tmp_path: Path) -> None:
    default = order(tmp_path)
    assert order(tmp_path, data_seed=3) == default  # the run's own seed
    assert order(tmp_path, data_seed=4) != default and sorted(order(tmp_path, data_seed=4)) == sorted(default)
    assert order(tmp_path, train_sampling_strategy="sequential") == [
        0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7, 6, 7,
    ]  # fmt: skip


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_tokens_that_the_trainer_counts(tmp_path: Path, packing: str) -> None:
    built = trainer(tmp_path, packing=packing, include_num_input_tokens_seen="non_padding", max_steps=1)
    built.train()
    assert built.state.num_input_tokens_seen > 0


def test_several_processes_for_fsdp(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"fsdp needs several processes: .*`accelerate launch`"):
        UniSDConfig(output_dir=str(tmp_path), fsdp="full_shard")


def test_a_tracker_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: False)
    told = "report_to=wandb cannot be used: .*pip install wandb.* Or unset report_to"
    with pytest.raises(UserError, match=told):
        UniSDConfig(output_dir=str(tmp_path), report_to="wandb")
    with pytest.raises(UserError, match=told):
        parse(["--report_to", "wandb"])


def test_two_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    for name in ("mlflow", "trackio"):
        monkeypatch.setitem(
            integration_utils.INTEGRATION_TO_CALLBACK, name, lambda name=name: made.append(name)
        )
    file = tmp_path / "run.yaml"
    file.write_text("report_to: [mlflow, trackio]\n")
    for arguments in (["--report_to", "mlflow", "trackio"], ["--config", str(file)]):
        made.clear()
        _, config = parse(arguments)
        assert config.report_to == ["mlflow", "trackio"] == made
    assert parse(["--report_to", "none"])[1].report_to == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["--report_to", "mlflow", "--report_to", "trackio"],
            "--report_to is given twice.*A B gives several",
        ),
        (["--max_steps", "3", "--max-steps=4"], "--max_steps and --max-steps set the same option: give one"),
        (["--diagnostics", "--no_diagnostics"], "--diagnostics and --no_diagnostics set the same option"),
        (["--adam_beta1", "0.8", "--adam_beta1", "0.9"], "--adam_beta1 is given twice"),
        (["--config", "a.yaml", "--config", "b.yaml"], "--config is given twice"),
    ],
)
def test_a_repeated_flag(arguments: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        parse(arguments)


def test_a_repeated_flag_of_another_command() -> None:
    from unisd.cli.parser import CommandParser

    parser = CommandParser("merge", "a test")
    parser.add_argument("--dtype")
    with pytest.raises(UserError, match="--dtype is given twice: give one of them"):
        parser.parse(["--dtype", "a", "--dtype", "b"])


@pytest.mark.long
def test_torch_compile_compiles_and_changes_no_loss(tmp_path: Path) -> None:
    losses = {}
    for backend in (None, "eager"):
        counters.clear()
        compiled = {} if backend is None else {"torch_compile": True, "torch_compile_backend": backend}
        built = trainer(tmp_path / str(backend), max_steps=1, **compiled)
        losses[backend] = built.train().training_loss
        assert (counters["stats"]["unique_graphs"] > 0) == (backend is not None)
    assert losses["eager"] == pytest.approx(losses[None], rel=1e-5)
