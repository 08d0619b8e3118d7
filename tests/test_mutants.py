"""Every harmful misprint of the lectures, put into the package, is noticed by a test and by a notebook's check."""

import json
import os
import subprocess
import sys

import mutants
import pytest
from mutants import MUTANTS


@pytest.fixture(scope="module")
def outcomes():
    """What became of every mutant: all tried in one other process, since they change the package."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    run = subprocess.run([sys.executable, mutants.__file__], capture_output=True, text=True, env=env, timeout=1800)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_the_healthy_package_passes(outcomes):
    tests_pass, errors = outcomes["none"]
    assert tests_pass and not any(errors.values()), errors


@pytest.mark.parametrize("name", MUTANTS)
def test_a_test_notices(name, outcomes):
    assert outcomes[name][0] == "killed", MUTANTS[name].says


@pytest.mark.parametrize("name", MUTANTS)
def test_a_notebook_notices(name, outcomes):
    if mutants.notebook(MUTANTS[name].notebook) is None:
        pytest.skip(outcomes[name][1])
    assert outcomes[name][1] == "killed", MUTANTS[name].says
