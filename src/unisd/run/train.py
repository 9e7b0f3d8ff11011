"""`unisd train`: rows, model, trainer, a look at one example, before, training, after, report."""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from rich.console import Console
from transformers import PrinterCallback, ProgressCallback

from unisd import memory
from unisd.compat import NEW_NAMES
from unisd.config import UniSDConfig
from unisd.console import make_console, show_example, show_table
from unisd.data import rendering
from unisd.data.outcomes import NO_LOSS, Outcome
from unisd.data.rows import Row
from unisd.data.text import problem_mark, reference_of
from unisd.distributed.collectives import on_any_rank
from unisd.distributed.sharding import all_ranks_must_join, number_of_shards
from unisd.errors import UserError
from unisd.files import (
    ANSWERS,
    GRADIENT,
    GRAFTING,
    JUDGE,
    METRICS,
    RESULTS,
    SAMPLES,
    TRAINED_ON,
    left_by_run,
    read_lines,
    write_json,
)
from unisd.kernels.devices import gains_from_bf16
from unisd.models.load import AUTO_BF16_FROM, can_checkpoint
from unisd.monitoring.alarms import Alarm
from unisd.monitoring.cost import Energy, cost_of
from unisd.monitoring.progress import ProgressDisplay
from unisd.processes import alone_in
from unisd.run import choice, grafting, outputs
from unisd.run.answers import shown
from unisd.run.changes import HEAD, change_lines, change_styles
from unisd.run.inputs import (
    RunData,
    adapter_config,
    fit_mechanisms,
    hold_out_validation,
    load_data,
    load_model,
)
from unisd.run.measure import Measurements, check_lengths, compared, kept_of, pair_answers
from unisd.run.options import ONE_PROCESS, RunOptions
from unisd.run.prepare import prepare
from unisd.run.trackers import Trackers, told
from unisd.trainer import UniSDTrainer
from unisd.training.checkpoints import holds_optimizer, last_complete_checkpoint
from unisd.training.guards import Interruption
from unisd.training.plan import planned_steps
from unisd.training.preflight import check_evaluated

logger = logging.getLogger(__name__)

SHOWN_TOKENS = 48
OFTEN = 20  # times that a run looks at a row, from which on it is said
"""Most tokens of the example's answer before a run, which is written to be looked at."""
OPTION_HEAD = ("option", "group", "value", "set")
Results = dict[str, Any]


@dataclass
class Setting:
    """A run that is ready to train."""

    data: RunData
    config: UniSDConfig
    """As resolved for this model and these rows; the trainer's own."""
    trainer: UniSDTrainer
    tokenizer: Any
    progress: ProgressDisplay
    interruption: Interruption
    trackers: Trackers


def set_up(options: RunOptions, config: UniSDConfig, data: RunData, console: Console) -> Setting:
    """Load the model and build the trainer, which checks the rows."""
    hold_out_validation(data, options, config)
    if config.push_to_hub and config.process_index == 0:
        logger.warning("push_to_hub uploads samples.jsonl and answers.json too, with texts of your rows.")
    model, tokenizer, _ = load_model(options)
    _settle_rendering(tokenizer, config, data)
    check_lengths(model, tokenizer, data)
    config = _in_bf16(model, options, config)
    if config.process_index == 0:
        data.train = prepare(data, options, config, lambda: (model.to(config.device), tokenizer))
    if config.world_size > 1:  # what a model writes must be the same on all ranks
        rows = [data.train]
        broadcast_object_list(rows)
        data.train = rows[0]
    config = fit_mechanisms(config, options, data.train)
    progress, interruption = ProgressDisplay(console), Interruption()
    trainer = UniSDTrainer(
        model=model,
        args=config,
        train_dataset=data.train,
        eval_dataset=(data.validation or data.evaluation) if config.eval_strategy != "no" else None,
        processing_class=tokenizer,
        callbacks=[progress, interruption],
        peft_config=adapter_config(options),
        grader=data.grade,
        probe_dataset=data.probed.probed[: config.diagnostics_probe_rows] if data.probed else None,
    )
    for name, evaluated in data.evaluated.items():
        check_evaluated(trainer, evaluated, name)
    config = trainer.args = _within_memory(trainer, options, config)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trackers = Trackers(trainer.callback_handler.callbacks)
    return Setting(data, config, trainer, tokenizer, progress, interruption, trackers)


def _settle_rendering(tokenizer: Any, config: UniSDConfig, data: RunData) -> None:
    """Keep options and date of the chat template with the tokenizer, and look at what is asked.

    A run that goes on has the date that it began with.

    Raises:
        UserError: the template does not read an option, refuses a row or leaves a part of it out.
    """
    rendering.set_options(tokenizer, config.chat_template_kwargs)
    checkpoint: str | Path | None = config.resume_from_checkpoint
    if checkpoint and not Path(str(checkpoint)).is_dir():  # the newest
        checkpoint = last_complete_checkpoint(str(config.output_dir))
    rendering.fix_date(tokenizer, checkpoint)
    for name, rows in data.evaluated.items():
        rendering.check_rows(tokenizer, rows, name)


def _in_bf16(model: Any, options: RunOptions, config: UniSDConfig) -> UniSDConfig:
    """Multiply in bfloat16 on an accelerator that can, but for small models.

    Not where the user says otherwise, or the launcher's configuration for several accelerators.
    """
    said = (
        {"bf16", "fp16", "dtype"} & options.explicit
        or config.mixed_precision != "no"
        or config.world_size > 1
    )
    if not said and gains_from_bf16(config.device) and model.num_parameters() > AUTO_BF16_FROM:
        why = "products of all but small models are computed in bfloat16 on one accelerator that can"
        return config.changed(why, bf16=True, mixed_precision="bf16")
    return config


def _within_memory(trainer: UniSDTrainer, options: RunOptions, config: UniSDConfig) -> UniSDConfig:
    """Switch gradient checkpointing on where the step would not fit without it.

    Not where the user has said which. On all ranks, if on one of them: they take their steps
    together.
    """
    said = {"gradient_checkpointing", NEW_NAMES["gradient_checkpointing"]} & options.explicit
    if said or not can_checkpoint(trainer.model):
        return config
    free = memory.available(config.device)
    size = memory.ModelSize.of(trainer.model)
    shards = number_of_shards(trainer.model)
    wanted = free is not None and memory.wants_checkpointing(
        size, config, longest_prompt(trainer), free, shards
    )
    if not on_any_rank(wanted, config.world_size):
        return config
    room = "on every device" if free is None or not wanted else f"into {memory.readable(free)}"
    why = f"gradient checkpointing is on: the step would not fit {room} without it."
    logger.warning("%s", why)
    return config.changed(why, gradient_checkpointing=True)


def longest_prompt(trainer: UniSDTrainer) -> int:
    """Tokens of the longest teacher prompt among the first rows."""
    return max(len(trainer.request_builder.teacher_prompt(row)) for row in trainer.rows[:64])


def train(options: RunOptions, config: UniSDConfig) -> Results | None:
    """The whole run; returns what `results.json` holds, or None if Ctrl-C or SIGTERM stopped it.

    Raises:
        UserError: see `outputs.choose_output_dir`, `inputs.load_data`, `inputs.load_model` and
            `UniSDTrainer`.
    """
    started = time.perf_counter()
    if options.graft_scales and config.world_size > 1:
        raise UserError(ONE_PROCESS)
    console = make_console()
    data = load_data(options, config.seed, needs_reference=config.uses_reference)
    config, checkpoint = _agree_on_folder(options, config, data.name)
    folder = Path(str(config.output_dir))
    try:
        setting = set_up(options, config, data, console)
    except UserError:
        if "output_dir" not in options.explicit and config.process_index == 0:
            with suppress(OSError):  # not empty: a run to go on with
                folder.rmdir()
        raise
    changes_since(setting, folder, checkpoint)  # refuses now, not after an hour of measuring
    if not setting.trainer.is_world_process_zero():
        return _carried_out(setting, options, checkpoint, Console(quiet=True), started)
    busy = f"another run is writing into {folder}: wait for its end, or choose another --output_dir."
    with alone_in(folder, busy):
        if checkpoint is None or options.overwrite_output_dir:
            outputs.clear_earlier_run(folder)
        for name in (GRAFTING, JUDGE):  # of other weights than those to come
            (folder / name).unlink(missing_ok=True)
        outputs.write_config(folder, options, setting.config)
        marks = sorted({problem_mark(row["prompt"]) for row in setting.data.train})
        write_json(folder / TRAINED_ON, {"problems": marks})
        return _carried_out(setting, options, checkpoint, console, started)


def _carried_out(
    setting: Setting, options: RunOptions, checkpoint: str | bool | None, console: Console, started: float
) -> Results | None:
    """Before, training, after and report; None if the training was stopped."""
    with setting.trackers:
        return _measured(setting, options, checkpoint, console, started)


def _measured(
    setting: Setting, options: RunOptions, checkpoint: str | bool | None, console: Console, started: float
) -> Results | None:
    trainer, config, data = setting.trainer, setting.config, setting.data
    folder, is_writer = Path(str(config.output_dir)), trainer.is_world_process_zero()
    if is_writer and options.verbose:
        show_table(console, OPTION_HEAD, outputs.option_lines(options, config))
    if is_writer or all_ranks_must_join(trainer.model):  # in writing the example
        _introduce(console, options, config, setting)
    phases = {"load": time.perf_counter() - started}

    clock = time.perf_counter()
    measurements = Measurements(trainer, setting.tokenizer, data, options, config)
    before = measurements.before()
    phases["eval"] = time.perf_counter() - clock
    if is_writer and data.retention:
        said = f"measured before training in {phases['eval']:.0f} s; the same follows after training"
        console.print(said, markup=False, highlight=False)
    energy = _trained(setting, checkpoint)
    if energy is None:
        if is_writer:
            _say_how_to_resume(options, folder)
        return None

    _save_model(setting, folder)  # a run that is stopped while it measures has done its work
    clock = time.perf_counter()
    after, answers = measurements.now()
    after |= measurements.drift(answers, before["answers"])
    after["n_task"] = len(data.evaluation)
    after["n_retention"] = sum(len(one.rows) for one in data.retention)
    phases["eval"] += time.perf_counter() - clock + trainer.metrics.phases["eval"]
    clock = time.perf_counter()
    points = _parts(measurements, before, (after, answers)) if options.graft_scales else []
    phases["graft"] = time.perf_counter() - clock
    results = {
        **_described(setting, options, config),
        "wall_s": time.perf_counter() - started,
        "phases_s": {**trainer.metrics.phases, **phases},
        "before": before["figures"],
        "after": after,
        **compared(data, before, (after, answers)),
    }
    results |= _accounted(setting, options, config, results, energy)
    results |= _spent_before(results, folder, trainer, console)
    pairs = pair_answers(data, before["answers"], answers)
    if is_writer:  # before results.json, which completes a run
        write_json(folder / ANSWERS, pairs)
    _finish(setting, options, folder, results, pairs)
    if is_writer:
        _report(console, results, folder, options, points, pairs)
    return results


def _parts(
    measurements: Measurements, before: Results, after: tuple[Results, Results]
) -> list[grafting.Point]:
    """The grafting curve; what goes wrong with it must not take the run's results along."""
    try:
        return measurements.parts(before, after)
    except (Exception, KeyboardInterrupt) as error:
        why = "interrupted" if isinstance(error, KeyboardInterrupt) else " ".join(str(error).split())
        scales = " ".join(f"{scale:g}" for scale in measurements.options.graft_scales or ())
        later = f"unisd eval --model_name_or_path {measurements.config.output_dir} --scales {scales}"
        logger.warning("the parts of the change were not measured (%s); later: %s", why, later)
        return []


def _agree_on_folder(
    options: RunOptions, config: UniSDConfig, data_name: str
) -> tuple[UniSDConfig, str | bool | None]:
    """Choose folder and checkpoint, the same on all ranks: in a new config, and the latter."""
    chosen: list[Any] = [None]
    if config.process_index == 0:
        chosen = [outputs.choose_output_dir(options, config, data_name)]
    if config.world_size > 1:  # a free folder would be taken as soon as one rank has made it
        broadcast_object_list(chosen)
    folder, checkpoint = chosen[0]
    why = "the folder of this run"
    return config.changed(why, output_dir=str(folder), resume_from_checkpoint=checkpoint), checkpoint


def changes_since(setting: Setting, folder: Path, checkpoint: str | bool | None) -> list[str]:
    """What a run has otherwise than the checkpoint that it goes on from, one line each.

    Raises:
        UserError: it cannot go on from there.
    """
    found = last_complete_checkpoint(folder) if checkpoint is True else checkpoint
    return setting.trainer.check_resume(found) if found else []


def _trained(setting: Setting, checkpoint: str | bool | None) -> Energy | None:
    """Train; returns the energy that it took, or None if Ctrl-C or SIGTERM stopped it."""
    try:
        with setting.interruption.listening(), Energy() as energy:
            setting.trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        return None
    finally:
        setting.progress.close()
    return None if setting.interruption.asked else energy


def _described(setting: Setting, options: RunOptions, config: UniSDConfig) -> Results:
    return {
        "schema_version": outputs.SCHEMA_VERSION,
        "recipe": options.recipe,
        "model": options.model_name_or_path,
        "task": setting.data.name,
        "seed": config.seed,
        "steps": setting.trainer.state.global_step,
        "stopped": choice.stopped(setting.trainer),
        "chosen": choice.chosen(setting.trainer, len(setting.data.validation)),
    }


def _accounted(
    setting: Setting, options: RunOptions, config: UniSDConfig, results: Results, energy: Energy
) -> Results:
    alarms = list(setting.trainer.health.alarms) if config.alarms != "off" else None
    if alarms is not None and results["forgotten"] is not None:
        alarms.append(Alarm("forgetting", results["steps"], results["forgotten"]))
    cost = cost_of(setting.trainer, config, results["phases_s"], options.device_tdp, energy.kwh)
    return {
        # nothing is known of what was spent before a resume
        "cost": {**cost, "steps": results["steps"] - setting.trainer.began_at},
        "alarms": None if alarms is None else [asdict(alarm) for alarm in alarms],
        "config": outputs.resolved(options, config),
    }


def _spent_before(results: Results, folder: Path, trainer: UniSDTrainer, console: Console) -> Results:
    """Time and cost of a finished run that is resumed, so that nothing was left to train."""
    earlier = left_by_run(folder, RESULTS)
    if trainer.began_at < results["steps"] or not earlier:
        return {}
    console.print("nothing was left to train: time and cost are those of the finished run", markup=False)
    return {name: earlier[name] for name in ("wall_s", "cost") if name in earlier}


def _save_model(setting: Setting, folder: Path) -> None:
    # Pushed once, at the end, with our card: the Trainer would push each save and write a card of
    # its own.
    trainer, config = setting.trainer, setting.config
    trainer.args = config.changed("pushed once, at the end", push_to_hub=False)
    trainer.save_model(str(folder))
    trainer.args = config
    if setting.trainer.is_world_process_zero():
        setting.tokenizer.save_pretrained(str(folder))


def _finish(setting: Setting, options: RunOptions, folder: Path, results: Results, pairs: Results) -> None:
    trainer, config = setting.trainer, setting.config
    if trainer.is_world_process_zero():
        (folder / "README.md").write_text(
            outputs.model_card(results, options, config, change_lines(results)), encoding="utf-8"
        )
        write_json(folder / RESULTS, results)
        settings = results["config"]  # without tokens and passwords
        given = {name: settings[name] for name in options.values if name in settings}
        setting.trackers.tell(lambda: told(results, pairs, read_lines(folder / SAMPLES), given))
    if config.push_to_hub:
        trainer.create_model_card = lambda *args, **kwargs: None
        trainer.push_to_hub()


def _introduce(
    console: Console, options: RunOptions, config: UniSDConfig, setting: Setting, whole: bool = True
) -> None:
    """What will run, and one example (`whole`, or cut): the surest way to see a broken template."""
    trainer, data = setting.trainer, setting.data
    size = memory.ModelSize.of(trainer.model)
    rows_per_step = config.train_batch_size * config.gradient_accumulation_steps * config.world_size
    steps = planned_steps(config, len(data.train))
    uses = steps * rows_per_step / len(data.train)
    console.print(
        f"{options.recipe}: model {options.model_name_or_path} ({size.parameters / 1e6:.1f}M parameters,"
        f" {size.trained / 1e6:.1f}M trained), {data.name}: {len(data.train)} training rows,"
        f" {len(data.evaluation)} to report on"
        + ("" if data.grade else f" ({kept_of(data)} answered before and after, because nothing grades them)")
        + (f"; retention: {', '.join(map(str, data.retention))}" if data.retention else "")
        + (f", {len(data.validation)} for evaluations during training" if data.validation else "")
        + f"; {steps} steps of {rows_per_step} rows"
        + (f" (each row about {uses:.0f} times)" if uses >= OFTEN else ""),
        markup=False,
        highlight=False,
    )
    if "auxiliary" in trainer.plan.needs or config.teacher_context == "other":
        console.print(data.contexts, markup=False, highlight=False)
    row = trainer.rows[0]
    student = trainer.prompts.student(row)
    sampling = replace(trainer.sampling, max_new_tokens=min(trainer.sampling.max_new_tokens, SHOWN_TOKENS))
    answer = trainer.engine.generate([student], [(config.seed, 0, 0, 0)], sampling)[0].ids
    trainer.engine.sleep()
    decode = setting.tokenizer.decode
    cut = " ..." if len(answer) == SHOWN_TOKENS else ""
    taught = config.distillation_mode != "nll"
    teacher = decode(_shown_to_teacher(trainer, row)) if taught else None
    reference = None if whole else reference_of(row)
    show_example(console, decode(student), teacher, decode(answer) + cut, reference)


def _shown_to_teacher(trainer: UniSDTrainer, row: Row) -> list[int]:
    """A teacher's prompt; what it will be told of the answers is not known yet."""
    told = trainer.args.rollout_contexts[:1]
    if not told or told == [NO_LOSS]:
        return trainer.request_builder.teacher_prompt(row)
    example = Outcome("(an answer that passed)", "(what the grader says)").told(told[0])
    return trainer.prompts.after_rollout(row, example.sibling, example.feedback)


def _say_how_to_resume(options: RunOptions, folder: Path) -> None:
    checkpoint = last_complete_checkpoint(folder)
    if checkpoint is None:
        print(
            f"interrupted before the first checkpoint; {folder} holds nothing to resume (save_steps"
            " sets how often a checkpoint is saved)"
        )
        return
    if not holds_optimizer(checkpoint):
        print(f"interrupted; {checkpoint} holds the model, but no optimizer (save_only_model): start again")
        return
    print(f"interrupted; resume from {checkpoint.name} with:\n  {outputs.resume_command(options, folder)}")


def _gradient_lines(steps: list[Results]) -> list[str]:
    """What each mechanism made of the gradient when it was last measured."""
    for step in reversed(steps):
        shares = {name: value for name, value in step.items() if name.startswith(GRADIENT)}
        if shares:
            told = (f"{name.removeprefix(GRADIENT)} {100 * value:.1f} %" for name, value in shares.items())
            return [f"share of the gradient at step {step['step']}: {', '.join(told)}"]
    return []


def _report(
    console: Console, results: Results, folder: Path, options: RunOptions, points: list[Any], pairs: Results
) -> None:
    say = partial(console.print, markup=False, highlight=False)
    show_table(console, ("", *HEAD[1:]), change_lines(results), styles=change_styles(results))
    if points:
        show_table(console, grafting.HEAD, grafting.lines(points))
    for line in shown(pairs["task"]) if "task" in pairs else ():
        say(line)
    for line in choice.lines(results):
        say(line)
    for line in _gradient_lines(read_lines(folder / METRICS)):
        say(line)
    for alarm in results["alarms"] or ():
        say(f"alarm at step {alarm['step']}, {alarm['name']}: {alarm['text']}")
    seconds = results["phases_s"]
    spent = ", ".join(f"{name} {seconds[name]:.0f}" for name in ("rollout", "score", "student", "eval"))
    say(f"{results['wall_s']:.0f} s ({spent})")
    what = "adapter" if options.trains_adapter else "model"
    say(f"written to {folder}: the {what}, results.json, metrics.jsonl, config.yaml, README.md")
    say(f"try it: unisd chat {folder} --compare base\nsee it: unisd report {folder}")
