"""The README keeps its word: its code runs, and its commands are those that CI runs."""

import re
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def test_the_core_in_one_screen_runs():
    (code,) = blocks("python")
    found = {}
    exec(compile(code, "README.md", "exec"), found)
    x0 = found["x0"]
    assert x0.shape == (10, 1, 8, 8) and x0.isfinite().all() and len(found["path"]) == 19
    assert x0.abs().max() < 2 and x0.std() > 0.3 and torch.equal(found["y"], torch.arange(10))


def test_there_are_two_set_up_commands_and_ci_runs_the_second():
    commands = [line for block in blocks("bash") for line in block.splitlines() if "pip install" in line]
    assert len(commands) == 2 and commands[0].endswith("diffusion-edu demo")
    install, test = commands[1].split(" && ")
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    extras = re.search(r"\[(.*?)\]", install)[1]
    assert test in ci.splitlines() and all(extra in ci for extra in extras.split(","))


def test_the_notebooks_it_lists_are_those_there_are():
    listed = set(re.findall(r"^\| (\d\d) \|", README, re.M))
    assert listed == {path.name[:2] for path in (ROOT / "notebooks").glob("*.ipynb")}
