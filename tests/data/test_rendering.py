"""What is rendered: what the model reads, and an answer as it would write it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaTokenizer

from tests.helpers import templates
from unisd.data import prompts as prompting
from unisd.data import rendering
from unisd.data.prompts import PromptBuilder, encode_completion, encode_prompt
from unisd.data.thoughts import answer_of, completion_text
from unisd.data.trajectories import encode_turns
from unisd.errors import UserError

SYSTEM = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many?"}]


def written(tokenizer: Any, reference: str, prompt: Any = "How many?") -> str:
    ends = [rendering.closing_token(tokenizer) or tokenizer.eos_token_id]
    ends.append(tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    return str(tokenizer.decode(encode_completion(tokenizer, reference, ends, prompt)))


@pytest.mark.parametrize(
    ("template", "reference", "expected"),
    [
        (templates.CHATML, "Four.", "Four.<|im_end|>"),
        (templates.CHATML, "e", "e<|im_end|>"),
        (templates.CHATML, "im_end", "im_end<|im_end|>"),
        (templates.CHATML, "", "<|im_end|>"),
        (templates.CHATML, "<think>2+2</think>Four.", "<think>2+2</think>Four.<|im_end|>"),
        (templates.THINKING, "Four.", "<think>\n\n</think>\n\nFour.<|im_end|>"),
        (templates.THINKING, "<think>2+2</think>Four.", "<think>\n2+2\n</think>\n\nFour.<|im_end|>"),
        (templates.CHANNELS, "Four.", "<|channel|>final<|message|>Four.<|return|>"),
        (
            templates.CHANNELS,
            "<think>2+2</think>Four.",
            "<|channel|>analysis<|message|>2+2<|end|><|start|>assistant<|channel|>final<|message|>Four.<|return|>",
        ),
        (templates.PARTS, "Four.", "Four.<|im_end|>"),
        (templates.ENDING, "Four.", "Four.<|im_end|>"),
        (None, "Four.", "Four.<|im_end|>"),
    ],
)
def test_a_reference_is_what_the_model_would_write(
    template: str | None, reference: str, expected: str
) -> None:
    tokenizer = templates.tokenizer(template)
    assert written(tokenizer, reference) == expected


GLM = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}<think></think>{% endif %}"
    "{{ '\\n' + m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_a_template_that_closes_no_answer_still_says_what_stands_before_it() -> None:
    tokenizer = templates.tokenizer(GLM)
    assert written(tokenizer, "Four.") == "<think></think>\nFour.<|im_end|>"


def test_a_prompt_that_names_the_mark_of_a_thought_opens_none() -> None:
    tokenizer, reference = templates.tokenizer(templates.CHATML), "<think>2+2</think>Four."
    for prompt in ("Begin with <think>. How many?", "How many?"):
        assert written(tokenizer, reference, prompt) == "<think>2+2</think>Four.<|im_end|>"


def test_an_answer_ends_as_the_model_does_where_the_tokenizer_has_no_end() -> None:
    tokenizer = templates.tokenizer(None)
    tokenizer.eos_token = None
    assert encode_completion(tokenizer, "a", [5])[-1] == 5


def sentencepiece(template: str | None) -> Any:
    """A tokenizer that begins every text with a space, as those of Llama 2 and Mistral do."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    for token in ("\u2581", *map(chr, range(33, 127)), "\u2581P"):
        vocabulary.setdefault(token, len(vocabulary))
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=[("\u2581", "P")])
    tokenizer.chat_template = template
    return tokenizer


ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def test_an_answer_gets_no_space_that_only_a_text_of_its_own_begins_with() -> None:
    chat = sentencepiece(ZEPHYR)
    turns = [{"role": "assistant", "content": "Paris"}]
    ids, own = encode_turns(chat, "Capital?", turns, [2])
    assert chat.decode(encode_prompt(chat, "Capital?") + ids).endswith("<|assistant|>\nParis</s>") and all(
        own
    )
    for tokenizer, prompt in ((chat, "Capital?"), (sentencepiece(None), "Capital?\nA:\n")):
        ids = encode_completion(tokenizer, "Paris", [2], prompt)
        assert tokenizer.convert_ids_to_tokens(ids) == [*"Paris", "</s>"]
    ids = encode_completion(sentencepiece(None), " Paris", [2], "Capital?\nA:")
    assert sentencepiece(None).convert_ids_to_tokens(ids)[0] == "\u2581P"


def test_a_thought_that_the_prompt_opens_is_not_opened_twice(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = templates.tokenizer(templates.OPENING)
    prompting._say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert written(tokenizer, "<think>\n2+2</think>Four.") == "2+2</think>Four.<|im_end|>"
        assert written(tokenizer, "Four.") == "\n</think>\n\nFour.<|im_end|>"
    assert [record.getMessage() for record in caplog.records] == [
        "A chat with an answer does not begin with its prompt, as the chat template renders it: reference"
        " answers are taken as they are, right after the prompt."
    ]


def test_options_are_kept_with_the_tokenizer_and_apart_for_the_teacher(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = templates.tokenizer(templates.THINKING)
    rendering.set_options(tokenizer, {"enable_thinking": False})
    builder = PromptBuilder(tokenizer, teacher_options={"enable_thinking": True})
    row = {"prompt": "How many?", "privileged_context": "Four."}
    assert tokenizer.decode(builder.student(row)).endswith("assistant\n<think>\n\n</think>\n\n")
    assert tokenizer.decode(builder.teacher(row)).endswith("assistant\n")
    assert written(tokenizer, "Four.") == "Four.<|im_end|>"
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert encode_prompt(again, "How many?") == builder.student(row)


def test_options_that_the_template_does_not_read_are_refused() -> None:
    tokenizer = templates.tokenizer(templates.CHATML)
    with pytest.raises(
        UserError, match="chat_template_kwargs: the chat template does not read 'enable_thinking': correct"
    ):
        rendering.set_options(tokenizer, {"enable_thinking": False})
    with pytest.raises(UserError, match=r"^teacher_chat_template_kwargs: the chat template does not read"):
        PromptBuilder(tokenizer, teacher_options={"enable_thinking": False})
    with pytest.raises(UserError, match="has no chat template that could read them: unset it"):
        rendering.set_options(templates.tokenizer(None), {"enable_thinking": False})


def test_a_reference_that_the_template_strips_is_found() -> None:
    tokenizer = templates.tokenizer(templates.THINKING)
    row = {"prompt": "How many?", "privileged_context": "<think>2+2</think>Four."}
    with pytest.raises(
        UserError,
        match=r"leaves the reference, or a part of it, out .*: set teacher_prompt_layout=append, or",
    ):
        PromptBuilder(tokenizer, layout="turn").check(row)
    PromptBuilder(tokenizer).check(row)
    PromptBuilder(tokenizer, layout="turn").check({**row, "privileged_context": "Four."})


def test_a_template_of_parts_does_not_drop_the_question() -> None:
    text = rendering.render(templates.tokenizer(templates.PARTS), SYSTEM)
    assert "Be brief." in text and "How many?" in text


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            templates.NO_SYSTEM,
            r"refuses the prompt \(System role not supported\): put the text of the system turn at the head"
            " of the first user turn",
        ),
        (
            templates.DROPS_SYSTEM,
            r"leaves a turn of the prompt out \('Be brief.'\): put its text into the last user turn",
        ),
        (
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
            "leaves a turn of the prompt out",
        ),
    ],
)
def test_what_the_template_refuses_or_drops_is_one_line(template: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        encode_prompt(templates.tokenizer(template), SYSTEM)
    assert "\n" not in str(caught.value)


def test_the_row_is_named() -> None:
    rows = [{"prompt": "How many?"}, {"prompt": SYSTEM}]
    with pytest.raises(UserError, match=r"^row 1 of the evaluation data: the chat template refuses"):
        rendering.check_rows(templates.tokenizer(templates.NO_SYSTEM), rows, "the evaluation data")


def test_a_template_that_needs_a_system_turn_is_asked_with_the_rows() -> None:
    tokenizer = templates.tokenizer(templates.NEEDS_SYSTEM)
    row = {"prompt": SYSTEM, "privileged_context": "Four."}
    PromptBuilder(tokenizer).check_generation_prefix(row)
    assert written(tokenizer, "Four.", SYSTEM) == "Four.<|im_end|>"


def test_the_date_is_that_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datetime import datetime

    first = templates.tokenizer(templates.DATED)
    monkeypatch.setattr(rendering, "_STARTED", datetime(2026, 1, 31, 23, 59))
    rendering.fix_date(first)
    first.save_pretrained(tmp_path)
    monkeypatch.setattr(rendering, "_STARTED", datetime(2026, 2, 1, 0, 1))
    resumed = templates.tokenizer(templates.DATED)
    rendering.fix_date(resumed)
    assert "01 Feb 2026" in rendering.render(resumed, SYSTEM)
    rendering.fix_date(resumed, tmp_path)  # as a checkpoint has it
    assert "31 Jan 2026" in rendering.render(resumed, SYSTEM)
    timeless = templates.tokenizer(templates.CHATML)
    rendering.fix_date(timeless)
    assert rendering.rendered_with(timeless) == {}


class ByCode:
    """A tokenizer that renders chats without a template to look at."""

    chat_template = None
    eos_token_id = 2

    def apply_chat_template(self, messages: Any, **how: Any) -> list[int]:
        if messages[0]["role"] == "system":
            raise ValueError("unexpected role\nsystem")
        return [1, 3, 5]


def test_a_template_that_is_code_is_asked() -> None:
    tokenizer = ByCode()
    assert rendering.has_template(tokenizer) and PromptBuilder(tokenizer).is_chat
    assert encode_prompt(tokenizer, "How many?") == [1, 3, 5]
    with pytest.raises(UserError, match=r"refuses the prompt \(unexpected role system\): fix its turns"):
        encode_prompt(tokenizer, SYSTEM)
    assert not rendering.has_template(templates.tokenizer(None))


def test_the_token_that_closes_a_turn() -> None:
    for template in (templates.CHATML, templates.THINKING, templates.PARTS):
        tokenizer = templates.tokenizer(template, eos="<|endoftext|>")
        assert tokenizer.convert_ids_to_tokens(rendering.closing_token(tokenizer)) == "<|im_end|>"
    assert rendering.closing_token(templates.tokenizer(None)) is None
    assert rendering.closing_token(templates.tokenizer("{{ messages[-1].content }}\n")) is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Four.", "Four."),
        ("<think>Is it 4?</think>\n\nFour.", "Four."),
        ("Is it 4?</think>Four.", "Four."),
        ("<think>Is it 4?", ""),
        ("The tag <think> is not closed.", "The tag <think> is not closed."),
        ("<|channel|>analysis<|message|>Is it 4?<|end|>", ""),
        (
            "<|channel|>analysis<|message|>4?<|end|><|start|>assistant<|channel|>final<|message|>Four.<|return|>",
            "Four.",
        ),
        ("[THINK]Is it 4?[/THINK]Four.", "Four."),
        ("<|channel>thought\nMaybe 5? No.\n<channel|>Four.", "Four."),
    ],
)
def test_graders_see_what_follows_the_thought(text: str, answer: str) -> None:
    assert answer_of(text) == answer


@pytest.mark.parametrize(
    ("template", "written", "text"),
    [
        (templates.CHATML, "Four.<|im_end|>", "Four."),
        (templates.THINKING, "<think>4?</think>Four.<|im_end|>", "<think>4?</think>Four."),
        (templates.OPENING, "Is it 4?", "<think>Is it 4?"),
        (templates.OPENING, "Is it 4?</think>Four.<|im_end|>", "Is it 4?</think>Four."),
        (
            templates.CHANNELS,
            "<|channel|>analysis<|message|>4?<|end|><|start|>assistant<|channel|>final<|message|>Four.<|return|>",
            "<think>4?</think>Four.",
        ),
        (templates.CHANNELS, "<|channel|>analysis<|message|>4?", "<think>4?"),
        (templates.CHANNELS, "<|channel|>final<|message|>Four.<|return|>", "Four."),
    ],
)
def test_a_completion_s_text_tells_thought_from_answer(template: str, written: str, text: str) -> None:
    tokenizer = templates.tokenizer(template)
    ids = tokenizer(written, add_special_tokens=False)["input_ids"]
    assert completion_text(tokenizer, ids) == text
