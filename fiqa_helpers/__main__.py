"""`python -m fiqa_helpers COMMAND`: the notebooks' main steps from the command line.

Exit codes: 0 done, 1 refused or failed (one sentence says why), 2 a command line that cannot be read.
"""

import argparse
import sys

from fiqa_helpers import commands
from fiqa_helpers.errors import WorkshopError
from fiqa_helpers.generation import GUARD

EPILOG = """examples:
  python -m fiqa_helpers check
  python -m fiqa_helpers run --only 01,02 --workdir /tmp/try
  python -m fiqa_helpers train --profile gpu80 --overrides "{max_steps: 20, learning_rate: 1e-4}"
  python -m fiqa_helpers ask "Should I pay off my mortgage early or invest the extra money?"
  python -m fiqa_helpers evaluate --rows 48
  python -m fiqa_helpers recipe --profile gpu80 --gpus 8
  python -m fiqa_helpers compare try1 try2

COMMAND --help says more about each. Exit codes: 0 done, 1 refused or failed, 2 wrong command line.
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
    subparsers = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str, more: str = "", parents=(common,)) -> argparse.ArgumentParser:
        """One subcommand: what it does in a line, and in full."""
        sentence = help[0].upper() + help[1:] + "."
        return subparsers.add_parser(
            name, parents=parents, help=help, description=f"{sentence} {more}".strip()
        )

    command("check", "one line for each requirement, for bug reports too", "Exit code 1: one is not met.")
    command(
        "preflight",
        "the checks, and on the disk all that a room without network needs",
        "For the night before a lesson: ports and browser too. Exit code 1: one is not met.",
    )

    run = command("run", "execute the notebooks in order", "It ends with a table of results.")
    run.add_argument("--only", default="", metavar="NN", help="notebooks to run: 04, or 01,02, 00-03, 04-")
    run.add_argument("--fresh", action="store_true", help="train anew instead of resuming a stopped run")

    train = command(
        "train",
        "prepare the data and train the adapter: notebooks 01 to 04",
        "A training that was stopped goes on at its last checkpoint, a finished one is not repeated. "
        "The adapter is left in checkpoints/final_model.",
    )
    train.add_argument("--fresh", action="store_true", help="train anew; the earlier run is kept aside")

    ask = command(
        "ask",
        "answers of the untuned and the tuned model side by side, as in notebook 05",
        "It needs an adapter: run `train` first, with the same profile and overrides. Without one, a "
        "precomputed adapter answers where model, data and prompt are its own, and says so.",
    )
    ask.add_argument("questions", nargs="+", metavar="QUESTION", help="in quotation marks, one or more")
    ask.add_argument(
        "--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token"
    )
    ask.add_argument("--sampling-seed", type=int, default=0, help="another seed draws other answers")

    evaluate = command(
        "evaluate",
        "tuned against untuned, with floors and intervals: notebook 06",
        "It needs an adapter, of `train` or in --adapter. Answers are kept, so a second call costs little.",
    )
    evaluate.add_argument("--adapter", default="", metavar="FOLDER", help="another adapter than `train` left")
    evaluate.add_argument("--rows", type=int, default=0, help="test rows; 0: 24 on a CPU, 100 on a GPU")
    evaluate.add_argument(
        "--no-repeat-ngram-size",
        type=int,
        default=GUARD,
        metavar="N",
        help=f"forbid any N tokens in a row to occur twice (default {GUARD}); 0: don't",
    )
    evaluate.add_argument("--endpoint", default="", metavar="URL", help="a server that answers, like vLLM's")
    evaluate.add_argument("--endpoint-base", default="", metavar="NAME", help="the base model's name there")
    evaluate.add_argument("--endpoint-tuned", default="", metavar="NAME", help="the tuned model's name there")

    recipe = command(
        "recipe",
        "the same run as a NeMo AutoModel recipe, written and checked as in notebook 07",
        "Nothing is launched and no weights are loaded, so a recipe for a GPU profile can be written on any "
        "machine. It needs the rows of notebook 01: run `run --only 01` first.",
    )
    recipe.add_argument("--gpus", type=int, default=1, help="GPUs that share a step's rows, over all nodes")
    recipe.add_argument("--tracker", default="tensorboard", help="tensorboard, wandb or mlflow")
    recipe.add_argument(
        "--stand-in-tokenizer",
        action="store_true",
        help="check with SmolLM2's tokenizer, where the model's own is out of reach",
    )

    compare = command(
        "compare",
        "runs side by side, from their run cards",
        "What was set differently and what came out; a page with curves goes to the first run's outputs/.",
        parents=(),
    )
    compare.add_argument(
        "folders", nargs="+", metavar="FOLDER", help="what was --workdir of a run; two or more"
    )

    bundle = command(
        "bundle",
        "pack the project with model and data into one archive for a stick",
        "It needs a git clone, and once a network. How to use it is in docs/instructor.md.",
        parents=(),
    )
    bundle.add_argument(
        "--output",
        default="outputs/fiqa-workshop.tar",
        metavar="FILE",
        help="default: outputs/fiqa-workshop.tar",
    )
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        return getattr(commands, options.command)(options)
    except WorkshopError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. The next run resumes the training at its last checkpoint.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
