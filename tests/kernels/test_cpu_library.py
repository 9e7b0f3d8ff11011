"""Which library multiplies on a CPU: measured once on a machine, then the same for all runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from unisd.errors import UserError
from unisd.kernels import cpu_library
from unisd.kernels.cpu_library import MEASURED, faster_than_mkl


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("UNISD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("UNISD_CPU_LIBRARY", raising=False)
    cpu_library._kept.cache_clear()
    yield tmp_path / "cache"
    cpu_library._kept.cache_clear()


def by_onednn(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    return x_NI @ weight_OI.T


WEIGHTS = {"thin": (64, 4096), "small": (1536, 576), "large": (4864, 896)}


@pytest.mark.parametrize("kind", list(MEASURED))
@pytest.mark.parametrize(
    ("mkl_s", "onednn_s", "faster"), [(2.0, 1.0, True), (1.0, 0.99, False), (1.0, 2.0, False)]
)
def test_the_faster_one_is_chosen_and_kept(
    kind: str,
    mkl_s: float,
    onednn_s: float,
    faster: bool,
    empty_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured = []

    def times(_product: object, of: str) -> dict[str, float]:
        measured.append(of)
        return {"mkl_s": mkl_s, "onednn_s": onednn_s}

    monkeypatch.setattr(cpu_library, "_measured", times)
    for _later_run in range(2):
        cpu_library._kept.cache_clear()
        assert faster_than_mkl(by_onednn, 256, torch.empty(WEIGHTS[kind])) == faster
    assert measured == [kind]
    [file] = empty_cache.rglob("*.json")
    assert json.loads(file.read_text()) == {"mkl_s": mkl_s, "onednn_s": onednn_s}


def test_of_two_processes_the_first_one_decides(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def times(_product: object, _kind: str) -> dict[str, float]:
        file = empty_cache / "cpu"
        [name] = names
        (file / name).write_text(json.dumps({"mkl_s": 2.0, "onednn_s": 1.0}))  # another process meanwhile
        return {"mkl_s": 1.0, "onednn_s": 2.0}

    names = [f"{cpu_library._machine()}-{torch.get_num_threads()}-large.json"]
    monkeypatch.setattr(cpu_library, "_measured", times)
    assert faster_than_mkl(by_onednn, 256, torch.empty(WEIGHTS["large"]))
    assert [path.name for path in (empty_cache / "cpu").iterdir()] == names


@pytest.mark.parametrize("kind", list(MEASURED))
def test_both_are_timed(kind: str) -> None:
    seen: list[tuple[int, ...]] = []

    def product(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
        seen.append((*x_NI.shape, len(weight_OI)))
        return x_NI @ weight_OI.T

    found = cpu_library._measured(product, kind)
    assert set(seen) == {MEASURED[kind]} and all(0 < seconds < 10 for seconds in found.values())


def test_without_a_cache_nothing_fails(empty_cache: Path) -> None:
    empty_cache.write_text("a file where a folder should be")
    assert faster_than_mkl(by_onednn, 256, torch.empty(WEIGHTS["large"]))


def test_a_choice_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mkl", "onednn"):
        monkeypatch.setenv("UNISD_CPU_LIBRARY", name)
        assert faster_than_mkl(by_onednn, 256, torch.empty(WEIGHTS["large"])) == (name == "onednn")
    monkeypatch.setenv("UNISD_CPU_LIBRARY", "blas")
    with pytest.raises(UserError, match="UNISD_CPU_LIBRARY=blas: say mkl or onednn"):
        faster_than_mkl(by_onednn, 256, torch.empty(WEIGHTS["large"]))
