"""The command ``diffusion-edu``. Exit codes: 0 done, 1 failure, 2 usage, 130 interrupted.

An error is one line on stderr; ``--debug`` adds the traceback. What a command needs is imported when it runs.
"""

import argparse
import os
import sys
from pathlib import Path

__all__ = ["main"]


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


class _Version(argparse.Action):
    def __call__(self, parser, *_):
        from importlib.metadata import version

        print(f"diffusion-edu {version('diffusion_edu')}")
        parser.exit()


def main(argv=None):
    """Run one command and return its exit code."""
    try:
        code = _dispatch(argv)
        if sys.stdout:
            sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of a pipe has enough, as in `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _dispatch(argv):
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    try:
        args = _parse(argv)
    except SystemExit as end:
        return end.code or 0
    try:
        return args.run(args) or 0
    except KeyboardInterrupt as stop:
        print(f"diffusion-edu: {str(stop) or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        raise
    except Exception as error:
        if getattr(args, "debug", False):
            raise
        if _interrupted(error):
            print("diffusion-edu: interrupted", file=sys.stderr)
            return 130
        if isinstance(error, OSError) and error.filename:
            print(f"diffusion-edu: {error.filename}: {error.strerror}", file=sys.stderr)
            return 2
        first = next(iter(str(error).splitlines()), type(error).__name__)
        print(f"diffusion-edu: {first}", file=sys.stderr)
        return 2 if isinstance(error, ValueError | TypeError | FileNotFoundError) else 1


def _interrupted(error):
    """Whether the error came up while an interrupt was being handled, as when a kernel is shut down by Ctrl-C."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "CancelledError":
            return True
        error = error.__context__
    return False


def _parse(argv):
    """The arguments; ``train`` takes its key=value words on both sides of the options."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    changes = [word for word in rest if hasattr(args, "changes") and "=" in word and not word.startswith("-")]
    if len(changes) < len(rest):
        parser.error(f"unrecognized arguments: {' '.join(word for word in rest if word not in changes)}")
    if changes:
        args.changes += changes
    if hasattr(args, "changes") and not args.out and not args.dry_run:
        parser.error("the following arguments are required: -o/--out")
    return args


def _parser():
    common = _Parser(add_help=False)
    common.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")
    parser = _Parser("diffusion-edu", description="A notebook-first course on diffusion models.", parents=[common])
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name, run, help, parent=commands):
        sub = parent.add_parser(name, help=help, description=help, parents=[common])
        sub.set_defaults(run=run)
        return sub

    demo = command("demo", _demo, "train on handwritten digits for about a minute, and sample")
    demo.add_argument("-o", "--out", type=Path, default=Path("demo"), help="folder of the results (default: demo)")
    demo.add_argument("--seed", type=int, default=0, help="seed of training and sampling (default: 0)")
    notebooks = commands.add_parser("notebooks", help="run or check the notebooks", parents=[common])
    actions = notebooks.add_subparsers(metavar="ACTION", required=True)
    run = command("run", _notebooks_run, "execute notebooks and store their outputs", actions)
    run.add_argument("numbers", nargs="*", metavar="NN", help="numbers such as 04 (default: all)")
    profiles = ("smoke", "lecture", "full")
    run.add_argument("--profile", choices=profiles, default="lecture", help="only lecture stores outputs")
    lint = command("lint", _notebooks_lint, "hold the rules of the notebooks", actions)
    lint.add_argument("numbers", nargs="*", metavar="NN", help="numbers such as 04 (default: all)")
    index = command("equations", _equations, "from an equation to its function, test and notebook cell")
    which = index.add_mutually_exclusive_group()
    which.add_argument("id", nargs="?", metavar="ID", help="an id such as post.mean (default: all)")
    which.add_argument("--check", action="store_true", help="fail on a dangling id")
    which.add_argument("--missing", action="store_true", help="list what has no test or home cell yet")
    lab = command("lab", _lab, "write the student version of a notebook, and an nbgrader source")
    lab.add_argument("number", metavar="NN", help="number such as 04")
    lab.add_argument("-o", "--out", type=Path, required=True, help="folder of the lab")
    _networks(command)
    return parser


def _networks(command):
    """The commands that train, draw and measure."""
    train = command("train", _train, "train a network from its config")
    train.add_argument("config", metavar="CONFIG", help="name of a shipped config, or a path to one")
    train.add_argument("changes", metavar="KEY=VALUE", nargs="*", help="such as recipe.n_steps=100 run.precision=bf16")
    train.add_argument("-o", "--out", type=Path, help="folder of the weights, their card and the run")
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the folder")
    train.add_argument("--dry-run", action="store_true", help="print size, operations and memory, and stop")
    draw = command("sample", _sample, "draw images from a trained network")
    draw.add_argument("folder", type=Path, metavar="FOLDER", help="what train wrote")
    draw.add_argument("-o", "--out", type=Path, required=True, help="PNG file")
    draw.add_argument("-n", type=int, default=64, help="number of images (default: 64)")
    draw.add_argument("--steps", type=int, default=18, help="steps of the solver (default: 18)")
    draw.add_argument("-w", type=float, default=1.0, help="guidance scale (default: 1, none)")
    draw.add_argument("--seed", type=int, default=0, help="seed of the noise (default: 0)")
    judge = command("evaluate", _evaluate, "measure the samples of a trained network")
    judge.add_argument("folder", type=Path, metavar="FOLDER", help="what train wrote")
    judge.add_argument("-n", type=int, default=2000, help="number of samples (default: 2000)")


def _demo(args):
    from diffusion_edu import demo

    demo.main(args.out, args.seed)


def _train(args):
    from diffusion_edu import commands

    if args.dry_run:
        print(*commands.dry_run(args.config, args.changes), sep="\n")
    else:
        commands.train(args.config, args.out, args.changes, args.resume)


def _sample(args):
    from diffusion_edu import commands

    commands.sample(args.folder, args.out, args.n, args.w, args.steps, args.seed)


def _evaluate(args):
    import json

    from diffusion_edu import zoo

    print(json.dumps(zoo.evaluate(*zoo.open_folder(args.folder), n=args.n)))


def _notebooks_run(args):
    from diffusion_edu import notebooks

    notebooks.run(args.numbers, args.profile)


def _notebooks_lint(args):
    from diffusion_edu import notebooks

    paths = notebooks.paths(args.numbers)
    return _report([p for path in paths for p in notebooks.lint(path)], f"notebooks in order: {len(paths)}")


def _lab(args):
    from diffusion_edu import notebooks

    notebooks.paths([args.number])  # a wrong number is reported before torch is imported
    from diffusion_edu import labs

    print(*labs.write(args.number, args.out), sep="\n")


def _equations(args):
    from diffusion_edu import equations

    if args.check:
        rows = equations.index()[0]
        complete = len(rows) - len(equations.missing())
        return _report(equations.problems(), f"no id dangles; {complete} of {len(rows)} rows are complete")
    if args.id:
        print(equations.detail(equations.row(args.id)))
        return 0
    rows = equations.missing() if args.missing else equations.index()[0].values()
    print(*map(equations.line, rows), sep="\n")
    return 0


def _report(problems, otherwise):
    print("\n".join(problems) or otherwise)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
