"""Keep tests offline, quiet and on few threads."""

import gc
import json
import logging
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("UNISD_CPU_LIBRARY", "onednn")  # what a busy machine measures decides no test
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background: Ctrl-C would do nothing
    signal.signal(signal.SIGINT, signal.default_int_handler)
if "PYTEST_XDIST_WORKER" in os.environ:  # one worker a core: threads of torch would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def log_as_it_was() -> Iterator[None]:
    """The command sets up the log of this package for its process; the next test wants to read
    it.
    """
    log = logging.getLogger("unisd")
    kept = log.propagate, log.level, list(log.handlers)
    yield
    log.propagate, log.level, log.handlers[:] = kept


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with its tokenizer, saved."""
    from unisd import testing as tiny  # heavy

    folder = tmp_path_factory.mktemp("model")
    tiny.model().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten rows of a user's own."""
    from tests.helpers.commands import ROWS

    file = tmp_path_factory.mktemp("rows") / "sums.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A browser for the tests of pages."""
    api = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium")
    assert path is not None, "apt-get install chromium"
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def pytest_collection_finish() -> None:
    """What imports have left stays: a search for garbage (0.5 s with it) need not look there."""
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()
