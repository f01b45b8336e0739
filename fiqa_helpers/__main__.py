"""`python -m fiqa_helpers run` executes the tutorial; `python -m fiqa_helpers check` checks this machine."""

import argparse
import dataclasses
import sys

from fiqa_helpers.errors import WorkshopError
from fiqa_helpers.paths import Workspace

EPILOG = """examples:
  python -m fiqa_helpers check
  python -m fiqa_helpers run
  python -m fiqa_helpers run --only 01,02 --workdir /tmp/try
  python -m fiqa_helpers run --profile gpu80 --overrides "{max_steps: 20, learning_rate: 1e-4}"
"""


def parser() -> argparse.ArgumentParser:
    """The command line; `--help` is its manual."""
    top = argparse.ArgumentParser(
        prog="python -m fiqa_helpers",
        description="The fine-tuning workshop from the command line.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--profile", default="auto", help="laptop, gpu24, gpu80, tiny, or auto: the largest that fits here"
    )
    common.add_argument(
        "--overrides", default="", metavar="YAML", help='replaces values of the profile: "{max_steps: 20}"'
    )
    common.add_argument(
        "--workdir",
        default="",
        metavar="FOLDER",
        help="where data/, checkpoints/ and outputs/ go (default: the project folder)",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", parents=[common], help="execute the notebooks in order")
    run.add_argument("--only", default="", metavar="NN", help="notebooks to run: 04, or 01,02, 00-03, 04-")
    run.add_argument("--fresh", action="store_true", help="train anew instead of resuming a stopped run")
    commands.add_parser("check", parents=[common], help="one line for each requirement, for bug reports too")
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        if options.command == "check":
            return check(options)
        return run(options)
    except WorkshopError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. The next run resumes the training at its last checkpoint.", file=sys.stderr)
        return 130


def check(options: argparse.Namespace) -> int:
    """Print the checks, for a profile that this machine cannot run too: they say what is missing."""
    from fiqa_helpers.checks import checks, report
    from fiqa_helpers.overrides import parse_overrides
    from fiqa_helpers.profiles import PROFILES, Profile, load_profile

    if options.profile in PROFILES:
        kinds = {field.name: field.type for field in dataclasses.fields(Profile)}
        values = parse_overrides(options.overrides, kinds)
        profile = dataclasses.replace(PROFILES[options.profile], **values)
    else:
        profile = load_profile(options.profile, options.overrides)
    results = checks(Workspace(options.workdir), profile)
    print(report(results))
    return 0 if all(result.ok for result in results) else 1


def run(options: argparse.Namespace) -> int:
    from fiqa_helpers.profiles import load_profile
    from fiqa_helpers.runner import run_all, summary

    load_profile(options.profile, options.overrides)  # a wrong one is refused before a kernel starts
    done = run_all(options.profile, options.overrides, options.workdir, options.only, options.fresh)
    print(summary(done, Workspace(options.workdir)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
