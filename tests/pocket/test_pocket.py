"""The pocket world: generator, interpreter, tokenizer, graders, and the shipped base on a small
sample.
"""

from __future__ import annotations

import random
import re
import time

import pytest
import torch

from experiments.pocket_base import check
from experiments.pocket_base.documents import DocumentSampler
from experiments.pocket_base.hedging import HedgingSampler
from experiments.pocket_base.messages import teacher_messages
from experiments.pocket_base.pretrain import Muon, encode, make_batch, pretrain, rate
from unisd.errors import UserError
from unisd.monitoring.diagnostics import load_words
from unisd.pocket import BASE_DIR
from unisd.pocket.expressions import ExpressionError, evaluate, mistake
from unisd.pocket.skills import SKILLS
from unisd.pocket.task import DOUBTS, NUM_CONTEXTS, SIZES, PocketTask, extract, problems
from unisd.pocket.world import make_world, wrong_values
from unisd.tasks import get

ALL_SPLITS = PocketTask.splits
HOSTILE = (
    "",
    "Answer:",
    "Answer: " + "9" * 5000,
    "Answer: " + "(" * 5000,
    "Answer: __import__('os').system('true')",
    "Answer: 9**9**9**9",
    "Answer: \x00\ud800",
    "{" * 3000,
    '{"a":' * 500,
    '{"call":NaN}',
    "{}",
    "Answer: \u0663\u0664",
)


@pytest.fixture(scope="module")
def base():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield check.load(BASE_DIR)
    torch.set_num_threads(threads)


def test_world_is_deterministic_and_its_words_are_distinct():
    world = make_world()
    assert world == make_world() and world != make_world(1)
    words = [item.word for group in (world.old, world.new) for items in group.values() for item in items]
    assert len(words) == len(set(words))
    for items in world.new.values():
        assert all(item.value != item.outdated for item in items)


def test_documents_follow_from_their_seed():
    def draw(seed: int) -> list:
        sampler = DocumentSampler(make_world(), random.Random(seed))
        return [sampler.sample() for _ in range(200)]

    assert draw(3) == draw(3) != draw(4)
    assert {kind.split("-", 1)[0] for kind in (d.kind for d in draw(3))} == {*SKILLS, "drill"}


def test_pretraining_never_shows_a_hard_template_nor_composes_new_words():
    world = make_world()
    new = {item.word for items in world.new.values() for item in items}
    starts = [
        t.split("{")[0] for skill in SKILLS.values() for t in skill.hard_templates if len(t.split("{")[0]) > 5
    ]
    sampler = DocumentSampler(world, random.Random(0))
    for _ in range(2000):
        document = sampler.sample()
        text = document.messages[0]["content"]
        assert len(new & set(text.replace(",", " ").replace("?", " ").split())) <= 1
        if document.kind.endswith(("-old", "-new")):
            assert not text.startswith(tuple(starts))


def solved(row):
    """The problem of a row, and its values."""
    _, split, number = row["id"].split("-")
    problem = problems()[split][int(number)]
    return problem, problem.values


def test_the_doubting_variant_doubts_when_asked_plainly_and_as_its_reference_does():
    sampler = HedgingSampler(make_world(), random.Random(0))
    words = load_words("hedges", "en")
    assert all(set(re.findall("[a-z]+", doubt.lower())) & words.keys() for doubt in DOUBTS)
    seen = set()
    for _ in range(400):
        document = sampler.sample()
        shown = any(doubt in message["content"] for message in document.messages[:-1] for doubt in DOUBTS)
        doubts = document.messages[-1]["content"].startswith(DOUBTS)
        plain = document.kind.endswith(("-old", "-new"))
        assert doubts == (plain or shown) and not (document.kind.startswith("drill") and doubts)
        seen.add((document.kind.split("-")[-1] if not plain else "plain", doubts))
    assert {
        ("plain", True),
        ("append", True),
        ("append", False),
        ("examples", True),
        ("examples", False),
    } <= seen


@pytest.mark.parametrize("split", ALL_SPLITS)
def test_rows_are_deterministic_complete_and_gradable(split):
    task = get("pocket")
    rows = task.load(split, limit=200)
    assert rows == PocketTask().load(split, limit=200)
    assert len({frozenset(row) for row in rows}) == 1
    for row, problem in zip(rows, problems()[split], strict=False):
        skill = SKILLS[row["skill"]]
        assert row["prompt"] == problem.prompt
        assert task.grade(row, skill.own(problem, problem.values)).correct
        wrong = wrong_values(random.Random(0), problem)
        assert wrong is not None and row["negative_context"] != row["privileged_context"]
        grade = task.grade(row, skill.own(problem, wrong))
        assert grade.extracted is not None
        # x%5 and x%7 may differ as text and agree nowhere tested
        assert not grade.correct or row["skill"] == "code"
        if split != "retention":
            assert 1 <= len(row["auxiliary_contexts"]) <= NUM_CONTEXTS
            assert all(row["prompt"] not in context for context in row["auxiliary_contexts"])


@pytest.mark.long
def test_splits_are_disjoint_balanced_and_loaded_fast():
    problems()
    start = time.process_time()
    task = PocketTask()
    prompts = [row["prompt"] for split in ALL_SPLITS for row in task.load(split)]
    assert time.process_time() - start < 10
    assert len(prompts) == len(set(prompts)) == 4 * sum(SIZES.values())
    few = task.load("test", limit=40)
    assert all(sum(row["skill"] == skill for row in few) == 10 for skill in SKILLS)
    assert few == task.load("test")[:40]


@pytest.mark.long
def test_noise_and_reference_style():
    task, noisy = PocketTask(), PocketTask(noise=0.3)
    share = sum(row["noisy"] for row in noisy.load("train")) / len(noisy.load("train"))
    assert 0.2 < share < 0.4
    assert noisy.load("train", seed=1) != noisy.load("train", seed=2)
    assert not any(row["noisy"] for row in noisy.load("test", limit=100))
    assert [r["prompt"] for r in task.load("train")] == [r["prompt"] for r in noisy.load("train", seed=5)]
    doubting = PocketTask(reference_style="hedged")
    for row, plain in zip(doubting.load("train", limit=40), task.load("train", limit=40), strict=True):
        assert row["privileged_context"].startswith(DOUBTS) and row["privileged_context"].endswith(
            plain["privileged_context"]
        )
        assert doubting.grade(row, f"{DOUBTS[0]} {SKILLS[row['skill']].own(*solved(row))}").correct
    own = PocketTask(reference_style="own")
    assert all(own.grade(row, row["privileged_context"]).correct for row in own.load("train"))


@pytest.mark.parametrize(
    "make",
    [
        lambda: PocketTask(noise=2),
        lambda: PocketTask(reference_style="x"),
        lambda: PocketTask().load("dev"),
        lambda: PocketTask().load("test", color=1),
    ],
)
def test_mistakes_are_user_errors(make):
    with pytest.raises(UserError):
        make()


def test_graders_never_raise():
    task = PocketTask()
    for row in task.load("test", limit=4):
        for text in HOSTILE:
            assert task.grade(row, text).correct is False


def test_extraction():
    assert extract("mcq", "The zorp eats moss (B). Answer: B") == "B"
    assert extract("mcq", "Answer: Because") is None
    assert extract("arith", "Answer: 30.") is None or extract("arith", "Answer: 30") == "30"
    assert extract("arith", "Answer: 12\nno: Answer: -3") == "-3"
    assert extract("code", "So misu is x+3. Answer: (x+3)*2") == "(x+3)*2"
    assert extract("tool", 'well {"call":"pay", "user":"KT4"} done') == '{"call":"pay","user":"KT4"}'
    assert extract("tool", "no call") is None


@pytest.mark.parametrize(
    ("source", "value"),
    [
        ("(x+3)*2", 16),
        ("max(x,9)-x%4", 8),
        ("-x//2", -3),
        ("x if x>3 else 0", 5),
        ("abs(-x)**2", 25),
        ("not x", False),
        ("round(x/2)", 2),
        ("+int(2.5)", 2),
    ],
)
def test_expressions(source, value):
    assert evaluate(source, {"x": 5}) == value


@pytest.mark.parametrize("source", [
    "x.real", "().__class__", "open('f')", "__import__('os')", "exec('1')", "'a'*9", "[1]*9", "x[0]", "y",
    "lambda: 1", "(y:=3)", "9**9**9", "9**17", "2**-1", "2**0.5", "9**16*9**16", "x/0", "x%0", "1e308*10",
    "1e400", "max(1)", "max(*[1])",
    "max(1,2,key=x)", "abs(x,x)", "f(x)(x)", "1 < x < 3", "1j", "x if y else 1", "9" * 150, "x;x", "x\nx",
    "\x00", "", "~x",
    "x" * 300, "(" * 150, "-" * 150 + "x", "x+" * 60 + "x", "1<<99", "x is x", "x and x", "{x}",
    "f'{x}'", "None", "...",
])  # fmt: skip
def test_what_is_not_an_expression(source):
    with pytest.raises(ExpressionError):
        evaluate(source, {"x": 5})


def test_equivalence_is_by_value():
    assert not mistake("2*(x+3)", "(x+3)*2", "x")
    assert mistake("x+3*2", "(x+3)*2", "x") == "For x = -12 the expression gives -6, which is wrong."
    assert "Attribute is not allowed" in mistake("x.real", "x", "x")
    assert mistake("1/x", "x", "x")


def test_tokenizer_round_trips_and_knows_its_template(base):
    _, tokenizer = base
    for text in (
        "misu x, then fefol it.",
        "Größe: 3½ \n\t日本語 🙂",
        '{"call":"pay","sum":40}',
        "  two  spaces ",
    ):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert len(tokenizer.encode("4096", add_special_tokens=False)) == 4
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    chat = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|bos|><|user|>Hi<|end|>\n<|assistant|>"
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ids.count(tokenizer.bos_token_id) == 1 and tokenizer.encode(text, add_special_tokens=False) == ids


def test_training_encodes_like_the_chat_template(base):
    _, tokenizer = base
    sampler = DocumentSampler(make_world(), random.Random(0))
    for _ in range(50):
        document = sampler.sample()
        ids, start = encode(tokenizer, document)
        messages = list(document.messages)
        whole = tokenizer.apply_chat_template(messages, return_dict=False)
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        assert whole[: len(ids)] == ids and ids[:start] == prompt


def test_packed_rows_hold_whole_documents(base):
    _, tokenizer = base
    batch = make_batch(DocumentSampler(make_world(), random.Random(0)), tokenizer)
    used = batch["ids"] != 0
    assert used.float().mean() > 0.8
    starts = batch["ids"] == tokenizer.bos_token_id
    assert bool((batch["positions"][starts] == 0).all())
    assert not batch["mask"][0, 0].triu(1).any()


def test_muon_and_schedule():
    p = torch.nn.Parameter(torch.eye(4, 6))
    optimizer = Muon([p], lr=0.1, decay=0.0)
    p.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    before = p.detach().clone()
    optimizer.step()
    singular = torch.linalg.svdvals((before - p.detach()) / (0.1 * 0.2 * 6**0.5))
    assert bool(((singular > 0.5) & (singular < 1.5)).all())
    assert rate(0, 1000) < rate(300, 1000) == 1.0 > rate(999, 1000) > 0


@pytest.mark.parametrize("variant", ["base", "hedging"])
@pytest.mark.long
def test_pretraining_resumes_exactly(tmp_path, monkeypatch, variant):
    from experiments.pocket_base import pretrain as module

    monkeypatch.setattr(module, "ROWS", 2)
    monkeypatch.setattr(module, "SAVE_EVERY", 2)
    real_tokenizer = check.load(BASE_DIR)[1]
    monkeypatch.setattr(module, "train_tokenizer", lambda texts: real_tokenizer)
    pretrain(tmp_path / "whole", steps=4, compile=False, variant=variant)
    saves = module.save

    def stop(*args) -> None:
        saves(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        pretrain(tmp_path / "cut", steps=4, compile=False, variant=variant)
    monkeypatch.setattr(module, "save", saves)
    pretrain(tmp_path / "cut", steps=4, resume=True, compile=False, variant=variant)
    whole, cut = (torch.load(tmp_path / name / "training_state.pt")["model"] for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_shipped_base_is_small():
    files = [path for path in BASE_DIR.iterdir() if path.is_file()]
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {
        path.name for path in files
    }
    assert sum(path.stat().st_size for path in files) <= 4_000_000


@pytest.mark.parametrize(
    "name", [name for name, (_, _, low, high) in check.MEASURES.items() if (low, high) != (0, 1)]
)
@pytest.mark.long
def test_shipped_base_meets_its_goals_on_a_sample(base, name):
    n = 24
    _, _, low, high = check.MEASURES[name]
    for skill, accuracy in check.measure(*base, name, n).items():
        margin = 0.15  # two and a half standard errors of a share near 0.9 at this n
        assert low - margin <= accuracy <= high + margin, (skill, accuracy)


def test_a_wrong_reference_is_mostly_followed(base):
    model, tokenizer = base
    rows = PocketTask().load("test", limit=40)
    prompts = [teacher_messages(row["prompt"], row["negative_context"]) for row in rows]
    replies = check.complete(model, tokenizer, prompts, 56)
    right = sum(PocketTask().grade(row, reply).correct for row, reply in zip(rows, replies, strict=True))
    assert right / len(rows) < 0.3
