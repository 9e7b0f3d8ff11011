"""Files of rows: what a cell means, and what is refused, by which line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from unisd import tasks
from unisd.data.reading import load_file
from unisd.data.rows import load_rows
from unisd.errors import UserError


def csv_rows(tmp_path: Path, text: str, encoding: str = "utf-8") -> list[dict[str, Any]]:
    (tmp_path / "rows.csv").write_bytes(text.encode(encoding))
    return load_file(tmp_path / "rows.csv")


def test_cells_are_text(tmp_path: Path) -> None:
    cells = ["NA", "None", "null", "nan", "007", "02113", "4", "4.50", "1e5", "true", " x "]
    found = csv_rows(tmp_path, "prompt,answer\n" + "".join(f"q,{cell}\n" for cell in cells) + "q,\n")
    assert [row["answer"] for row in found] == [*cells, None]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_csv_file_is_read_by_its_header(tmp_path: Path, separator: str, encoding: str) -> None:
    text = 'prompt,answer\r\n"a, b; c\tand | d",é\r\n\r\n"two\nlines, ""quoted""",4\r\n'
    rows = csv_rows(
        tmp_path, text.replace("prompt,", f"prompt{separator}").replace('",', f'"{separator}'), encoding
    )
    assert rows == [
        {"prompt": "a, b; c\tand | d", "answer": "é"},
        {"prompt": 'two\nlines, "quoted"', "answer": "4"},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("encoding", "told"),
    [
        ("utf-8", None),
        ("utf-8-sig", None),
        ("cp1252", "Windows-1252"),
        ("utf-16", "UTF-16"),
        ("utf-16-be", "UTF-16"),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_other_encodings_are_read_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, encoding: str, told: str | None, kind: str
) -> None:
    text = '{"prompt": "Größe?", "answer": "5 €"}' if kind == "jsonl" else "prompt\tanswer\nGröße?\t5 €\n"
    path = tmp_path / f"rows.{kind}"
    path.write_bytes((("\ufeff" if encoding == "utf-16-be" else "") + text).encode(encoding))
    assert load_file(path) == [{"prompt": "Größe?", "answer": "5 €"}]
    said = f"{path} is not UTF-8: read as {told}; if letters come out wrong, save it as UTF-8."
    assert [record.getMessage() for record in caplog.records] == ([said] if told else [])


def test_names_may_hold_other_separators(tmp_path: Path) -> None:
    rows = csv_rows(tmp_path, "prompt,answer (a; b; c)\nwhat; now,x\n")
    assert rows == [{"prompt": "what; now", "answer (a; b; c)": "x"}]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("prompt,answer\na,b\nc,d, e\n", r"line 3 has 3 cells and the header 2 \(separated by comma\)"),
        ("prompt;answer\na\n", r"line 2 has 1 cells and .* 2 \(separated by semicolon\): put text that"),
        ('prompt,answer\n"a" b,c\n', "line 2 is not CSV: .*: put text with quotes in it into double quotes"),
        ('prompt,answer\na,"b\n', "line 2 is not CSV: unexpected end of data"),
        ("a,b,a\n1,2,3\n", "has two columns 'a': give each column its own name"),
    ],
)  # fmt: skip
def test_a_csv_file_that_is_none(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        csv_rows(tmp_path, text)


def test_tasks_read_numbers_from_cells(tmp_path: Path) -> None:
    header = "question,opa,opb,opc,opd,cop,exp,subject_name,id\n"
    (tmp_path / "train.csv").write_text(f"{header}Which?,None,NA,007,4,2,because,Anatomy,a1\n")
    (row,) = tasks.get("medmcqa", data_files=str(tmp_path / "train.csv")).load("all")
    assert all(text in row["prompt"] for text in ("None", "NA", "007", "4"))


def test_a_cell_may_be_a_document(tmp_path: Path) -> None:
    rows = csv_rows(tmp_path, f'prompt,answer\n"{"long, " * 50_000}",b\n')
    assert len(rows[0]["prompt"]) == 300_000


def test_numbers_are_the_same_from_all_kinds(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": "2 + 2?", "completion": 4}, {"prompt": "1 / 2?", "completion": 5}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("\ufeff" + "".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.csv").write_text("prompt,completion\n2 + 2?,4\n1 / 2?,5\n")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for path in tmp_path.iterdir():
        assert [row["completion"] for row in load_rows(path)] == ["4", "5"], path


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": NaN}\n', "line 2 is not JSON: NaN is not a JSON number; write null"),
        ("a.jsonl", b'{"a": -Infinity}\n', "line 1 is not JSON: -Infinity is not a JSON number"),
        ("a.jsonl", b'{"a": 1e999}\n', "line 1 is not JSON: 1e999 is not a JSON number"),
        ("a.json", b'[{"a": "NaN"},\n {"a": NaN}]', r"a.json is not JSON: NaN .* missing value \(line 2\)"),
        ("a.jsonl", b'{"a": "\\ud83d now"}\n', r"line 1: 'a' holds half a character \(a lone surrogate"),
        ("a.json", b'[{"b": 1, "a": ["\\ud83d"]}]', "row 0 of .*: 'a' holds half a character"),
        ("a.json", b'{"a": 1}\n{"a": 2}\n', r"Extra data: .* \(is it JSON Lines\? then name it .jsonl\)"),
        ("a.json", b'{"data": []}', "must hold a list of objects"),
        ("a.csv", "a,äöü\n1,".encode() + b"\xff", "cannot be read: .*invalid start byte: save it as UTF-8"),
        ("a.csv", b"a\x81\x8d", "cannot be read: .*: save it as UTF-8"),
        ("a.jsonl.gz", b"{}", "cannot be read: Not a gzipped file .*: copy it again, or name it without .gz"),
        ("a.parquet", b"", "a.parquet cannot be read: "),
        ("a.parquet", b"PAR1 and no more", "a.parquet cannot be read: "),
        ("a.jsonl", b"[" * 100_000, "line 1 is nested too deeply"),
        ("a.txt", b"", "unknown kind .txt: use .jsonl, .json, .csv, .tsv, .parquet"),
    ],
)  # fmt: skip
def test_what_cannot_be_read(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=told):
        load_file(tmp_path / name)


def test_a_folder_and_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder: name a file in it"):
        load_file(tmp_path)
    with pytest.raises(UserError, match="is not a file: check the path"):
        load_file(tmp_path / "none.csv")
    for name in ("a.csv", "a.json", "a.jsonl"):
        (tmp_path / name).write_bytes(b"\n")
        with pytest.raises(UserError, match=f"{name} is empty: give at least one row"):
            load_rows(tmp_path / name)


def test_no_number_is_missing_where_tables_say_so_and_never_text() -> None:
    nan, inf = float("nan"), float("inf")
    row = load_rows([{"prompt": "a", "completion": "b", "negative_context": nan, "answer": nan}])[0]
    assert row["negative_context"] is None and row["answer"] is None
    asks = [{"role": "user", "content": "q"}]
    with pytest.raises(UserError, match="or a conversation that ends in the assistant's answer: fix or"):
        load_rows([{"messages": asks}])
    with pytest.raises(UserError, match="solution is missing, a non-empty string is needed"):
        load_rows([{"problem": "p", "solution": None}])
    with pytest.raises(UserError, match="has the role 'asistant': did you mean 'assistant'"):
        load_rows([{"messages": [*asks, {"role": "asistant", "content": "a"}]}])
    with pytest.raises(UserError, match="row 1 of the dataset: privileged_context is missing"):
        load_rows([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": nan}])
    with pytest.raises(
        UserError, match="row 0 of the dataset: completion is infinite: fix or remove the row"
    ):
        load_rows([{"prompt": "a", "completion": inf}])
