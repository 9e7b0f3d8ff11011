"""The Triton kernels of CUDA, by Triton's interpreter: the tests of the chunked loss once more, in
a process that has it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

MEANT = "chunked or scores or contrast or half or frozen or extremes or bias"


@pytest.mark.long
def test_the_kernels_pass_the_tests_of_the_loss() -> None:
    pytest.importorskip("triton", reason="the kernels are Triton's: pip install 'unisd[dev]'")
    count = (
        "import pytest, unisd.losses.triton_kernels as f\n"
        "f.BLOCK = 16  # every row in several blocks\n"
        "calls = []\n"
        "inner = f.closed_form\n"
        "f.closed_form = lambda *a: calls.append(1) or inner(*a)\n"
        f"code = pytest.main(['-q', '-p', 'no:cacheprovider', '-k', {MEANT!r}, 'test_losses.py'])\n"
        "print('kernels were called', len(calls), 'times')\n"
        "raise SystemExit(code or not calls)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", count],
        cwd=Path(__file__).parent,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
