"""One thread a process, as everywhere in the house, and the helpers of this folder on the path."""
import os
import sys
from pathlib import Path

for name in ("OMP", "MKL", "OPENBLAS", "NUMBA"): os.environ.setdefault(f"{name}_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))
