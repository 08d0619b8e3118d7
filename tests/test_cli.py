"""The command: exit codes, one line of error, and help that needs no torch."""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

import diffusion_edu
from diffusion_edu import cli


def command(*args, env=None, **kwargs):
    line = [sys.executable, "-m", "diffusion_edu.cli", *args]
    full = {k: v for k, v in os.environ.items() if k not in ("HOME", "LC_ALL", "COLUMNS")} | (env or {})
    return subprocess.run(line, env=full, capture_output=True, text=True, timeout=120, **kwargs)


@pytest.fixture
def module(monkeypatch):
    """Stands in for a module that a command imports when it runs; records the call."""

    def put(name, **functions):
        fake = SimpleNamespace(**functions)
        monkeypatch.setitem(sys.modules, f"diffusion_edu.{name}", fake)
        monkeypatch.setattr(diffusion_edu, name, fake, raising=False)

    return put


@pytest.mark.parametrize("env", [{}, {"LC_ALL": "C"}, {"COLUMNS": "20"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
@pytest.mark.parametrize(
    "args", [["--help"], ["--version"], ["notebooks", "run", "--help"], ["equations", "post.mean"]]
)
def test_help_works_anywhere(env, args):
    done = command(*args, env=env)
    assert done.returncode == 0 and done.stdout and not done.stderr


def test_help_version_and_equations_import_no_torch():
    code = (
        "import sys; from diffusion_edu.cli import main\n"
        "for args in ['--help'], ['--version'], ['lab', '--help'], ['equations', '--missing']: assert main(args) == 0\n"
        "assert not {'torch', 'numpy', 'matplotlib'} & set(sys.modules), 'imported too much'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "args, said",
    [
        ([], "required"),
        (["paint"], "invalid choice: 'paint'"),
        (["demo", "--seed", "x"], "invalid int value: 'x'"),
        (["lab", "04"], "-o/--out"),
        (["notebooks", "run", "77"], "NN must be one of"),
        (["notebooks", "lint", "four"], "NN must be one of"),
        (["lab", "77", "-o", "nowhere"], "NN must be one of"),
        (["equations", "post.men"], "did you mean post.mean"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(args, said):
    done = command(*args)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and said in done.stderr and done.stderr.startswith("diffusion-edu")


def test_a_failure_is_one_line_and_exit_1(module, capsys):
    def fails(out, seed):
        raise RuntimeError("the disk is full\nand more")

    module("demo", main=fails)
    assert cli.main(["demo"]) == 1
    assert capsys.readouterr().err == "diffusion-edu: the disk is full\n"


@pytest.mark.parametrize("args", [["--debug", "demo"], ["demo", "--debug"]])
def test_debug_shows_the_traceback(module, args):
    module("demo", main=lambda out, seed: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(args)


def test_an_interrupt_exits_130_with_one_line(module, capsys):
    module("demo", main=lambda out, seed: signal.raise_signal(signal.SIGINT))
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "diffusion-edu: interrupted\n"


def test_a_closed_pipe_is_quiet():
    line = f"{sys.executable} -m diffusion_edu.cli equations | head -1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120)
    assert done.stdout.count("\n") == 1 and done.stderr == ""


def test_a_closed_stdout_is_quiet():
    line = f"{sys.executable} -m diffusion_edu.cli equations >&-"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == ""


def test_commands_pass_their_arguments_on(module, tmp_path):
    calls = []
    module("demo", main=lambda *args: calls.append(args))
    module("commands", train=lambda *args: calls.append(args), dry_run=lambda *args: calls.append(args) or ["said"])
    assert cli.main(["demo", "-o", str(tmp_path), "--seed", "3"]) == 0
    assert cli.main(["train", "digits_unet", "-o", str(tmp_path), "ema=0.5"]) == 0
    assert cli.main(["train", "digits_unet", "--dry-run"]) == 0
    assert calls == [(tmp_path, 3), ("digits_unet", tmp_path, ["ema=0.5"], False), ("digits_unet", [])]


def test_equations_check_says_what_dangles(monkeypatch, capsys):
    from diffusion_edu import equations

    monkeypatch.setattr(equations, "problems", lambda: ["a dangles"])
    assert cli.main(["equations", "--check"]) == 1
    assert capsys.readouterr().out == "a dangles\n"
    monkeypatch.setattr(equations, "problems", lambda: [])
    assert cli.main(["equations", "--check"]) == 0


def test_an_error_on_the_way_out_of_an_interrupt_is_an_interrupt(monkeypatch, capsys):
    def stopped(*_):
        try:
            raise KeyboardInterrupt
        finally:
            raise AssertionError("while cleaning up")

    monkeypatch.setattr("diffusion_edu.notebooks.run", stopped)
    assert cli.main(["notebooks", "run", "04"]) == 130
    assert capsys.readouterr().err == "diffusion-edu: interrupted\n"


def test_a_folder_that_cannot_be_written_is_told_before_the_work(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["train", "digits_small", "-o", str(tmp_path / "file")]) == 2
    assert "file: File exists" in capsys.readouterr().err
