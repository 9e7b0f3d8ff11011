"""Keep the outcome of each cell of the matrix, where `UNISD_FAMILIES` names a file."""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, None]:
    outcome = yield
    report, store = outcome.get_result(), os.environ.get("UNISD_FAMILIES")
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    failed_early = report.when == "setup" and report.failed
    if store and "family" in parameters and (report.when == "call" or failed_early):
        cell = item.name.partition("[")[0].removeprefix("test_")
        kind = {True: "lora", False: "full"}.get(parameters.get("lora"), "")
        line = {
            "family": parameters["family"],
            "cell": f"{cell}-{kind}" if kind else cell,
            "passed": report.passed,
            **dict(item.user_properties),
            "said": "" if report.passed or call.excinfo is None else str(call.excinfo.value).strip()[:200],
        }
        with Path(store).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
