"""Keep tests offline, quiet and on few threads."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]  # tiny; benchmarks
