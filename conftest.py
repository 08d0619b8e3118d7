"""Settings of the test run, made before any kernel starts and before torch is imported."""

import os
from pathlib import Path

NOTEBOOKS = Path(__file__).parent / "notebooks"

os.environ.pop("MPLBACKEND", None)  # agg would kill inline figures
os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # tests run on the CPU; a process that has touched CUDA cannot fork
os.environ.setdefault("DIFFUSION_EDU_PROFILE", "lecture")


def pytest_ignore_collect(collection_path):
    """Only the course's own notebooks are tests: no lab, no checkpoint, no copy elsewhere."""
    if collection_path.suffix == ".ipynb" and collection_path.parent != NOTEBOOKS:
        return True
    return None
