"""Where the benchmarks' files lie, which do not belong to this project: see CONTRIBUTING.md."""

import os
from pathlib import Path

import pytest


def _folder() -> Path:
    named = os.environ.get("UNISD_TEST_DATA")
    if named is not None and not Path(named).is_dir():
        raise pytest.UsageError(
            f"UNISD_TEST_DATA={named} is not a folder: correct it, or unset it to skip the tests that"
            " read it."
        )
    return Path(named) if named is not None else Path(__file__).parents[3] / "shared" / "data"


DATA = _folder()
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no data beside the checkout (UNISD_TEST_DATA)")
