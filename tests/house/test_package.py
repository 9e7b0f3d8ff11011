"""What is released holds all that it needs: the wheel is built from the source distribution and
runs in an environment without the repository.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").exists())
BUILT = ("__pycache__", "*.egg-info", ".git", ".*_cache", ".venv*", "build", "dist", "unisd-output", "runs")
PARTS = ("src", "docs", "examples", "tests", "experiments", "benchmarks", ".ci", ".github")
BUILD = "import sys; from setuptools import build_meta as b; getattr(b, sys.argv[1])(sys.argv[2])"


def files(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".pyc" and ".egg-info" not in path.as_posix()
    }


def run(*words: object, cwd: Path, umask: int = -1) -> str:
    """A command's output, run as if the repository were not there."""
    kept = ("PATH", "HOME", "TMPDIR", "LANG", "OMP_NUM_THREADS", "UNISD_CACHE")
    environment = {name: value for name in kept if (value := os.environ.get(name))}
    done = subprocess.run(
        [*map(str, words)], cwd=cwd, env=environment, umask=umask, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.long
def test_the_wheel_runs_without_the_repository(tmp_path: Path) -> None:
    copy, made = tmp_path / "copy", tmp_path / "dist"
    copy.mkdir()
    for name in PARTS:
        if (ROOT / name).is_dir():  # of a source distribution that is tested
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns(*BUILT))
    for path in (*ROOT.glob("*.*"), *(ROOT / name for name in ("LICENSE", "Makefile", "Dockerfile"))):
        if path.is_file() and path.name != ".git":  # a file in a worktree
            shutil.copy(path, copy)
    run(sys.executable, "-c", BUILD, "build_sdist", made, cwd=copy)
    with tarfile.open(next(made.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path / "sdist", filter="data")
    sdist = next((tmp_path / "sdist").iterdir())
    left_out = {name for name in files(copy) - files(sdist) if name.partition("/")[0] != "src"}
    assert left_out <= {".git-blame-ignore-revs"}
    run(sys.executable, "-c", BUILD, "build_wheel", made, cwd=sdist)
    wheel = next(made.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("unisd/")}
    assert packed == files(copy / "src") and "unisd/py.typed" in packed

    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=tmp_path)
    python = venv / "bin" / "python"
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel),
        cwd=tmp_path,
    )
    site = next(venv.glob("lib/python*/site-packages"))
    (site / "dependencies.pth").write_text(f"{Path(pytest.__file__).parents[1]}\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert str(venv) in run(python, "-c", "import unisd; print(unisd.__file__)", cwd=empty)
    short = "--max_steps 1 --max_eval_rows 2 --max_completion_length 8 --save_steps 1 --output_dir out"
    run(venv / "bin" / "unisd", "train", *short.split(), cwd=empty, umask=0o027)
    written = [path for path in (empty / "out").rglob("*") if path.is_file()]
    assert {path.name for path in written} > {"results.json", "model.safetensors", "manifest.json"}
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in written} == {
        path.name: "0o640" for path in written
    }
    run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/methods/test_nsd.py", cwd=sdist)
