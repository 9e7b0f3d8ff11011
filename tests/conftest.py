"""Keep tests offline, quiet and on few threads."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # one worker a core: threads of torch would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]  # tiny; benchmarks
