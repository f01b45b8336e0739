"""The subcommands of `python -m fiqa_helpers`: each calls what a notebook calls, or executes the notebook.

Training and evaluation execute their notebooks, because there, and nowhere else, stand the training
arguments and the order of the benchmark. Every function returns the exit code.
"""

import argparse

from fiqa_helpers.paths import Workspace


def check(options: argparse.Namespace) -> int:
    """Print the checks, for a profile that this machine cannot run too: they say what is missing."""
    from fiqa_helpers.checks import checks, report
    from fiqa_helpers.profiles import planned_profile

    results = checks(Workspace(options.workdir), planned_profile(options.profile, options.overrides))
    print(report(results))
    return 0 if all(result.ok for result in results) else 1


def preflight(options: argparse.Namespace) -> int:
    """Print the checks of the night before."""
    from fiqa_helpers.checks import report
    from fiqa_helpers.preflight import preflight
    from fiqa_helpers.profiles import planned_profile

    results = preflight(Workspace(options.workdir), planned_profile(options.profile, options.overrides))
    print(report(results))
    return 0 if all(result.ok for result in results) else 1


def run(options: argparse.Namespace) -> int:
    """Execute the notebooks that `only` names."""
    return _execute(options, options.only, fresh=options.fresh)


def train(options: argparse.Namespace) -> int:
    """Execute notebooks 01 to 04: each checks the run card of the one before."""
    return _execute(options, "01-04", fresh=options.fresh)


def evaluate(options: argparse.Namespace) -> int:
    """Execute notebook 06 and print its table."""
    from fiqa_helpers.model_card import evaluation_section, read_evaluation

    names = ("adapter", "rows", "no_repeat_ngram_size", "endpoint", "endpoint_base", "endpoint_tuned")
    _execute(options, "06", **{name: getattr(options, name) for name in names})
    print(f"\n{evaluation_section(read_evaluation(Workspace(options.workdir).evaluation))}")
    return 0


def ask(options: argparse.Namespace) -> int:
    """Print both models' answers, with the calls of notebook 05."""
    from fiqa_helpers import notebook, show
    from fiqa_helpers.adapters import check_adapter
    from fiqa_helpers.precomputed import adapter_folder
    from fiqa_helpers.progress import progress

    kinds = {"profile": str, "overrides": str, "workdir": str, "temperature": float, "sampling_seed": int}
    begun = notebook.start(vars(options) | {"__annotations__": kinds}, "05")
    profile = begun.profile
    folder = adapter_folder(begun.workspace, profile)
    check_adapter(folder, profile)
    with progress("ask", unit="step") as step:
        step(1, 3, "loading the base model and the adapter")
        from peft import PeftModel

        from fiqa_helpers import model
        from fiqa_helpers.generation import generate_answers

        tokenizer = model.load_tokenizer(profile)
        tuned = PeftModel.from_pretrained(model.load_base(profile), folder)
        asked = (tuned, tokenizer, options.questions, profile.prompt, profile.max_new_tokens)
        step(2, 3, "the untuned model answers")
        with tuned.disable_adapter():
            base_answers = generate_answers(*asked, options.temperature, options.sampling_seed)
        step(3, 3, "the tuned model answers")
        tuned_answers = generate_answers(*asked, options.temperature, options.sampling_seed)
    print(show.answers(options.questions, {"base": base_answers, "tuned": tuned_answers}))
    return 0


def recipe(options: argparse.Namespace) -> int:
    """Write and check a recipe, with the calls of notebook 07, and print the line that launches it."""
    from dataclasses import replace

    from fiqa_helpers import launch, notebook
    from fiqa_helpers.profiles import PROFILES, planned_profile
    from fiqa_helpers.progress import progress
    from fiqa_helpers.recipe import write_recipe

    profile = planned_profile(options.profile, options.overrides)
    begun = notebook.Run("07", {}, profile, Workspace(options.workdir))
    notebook.quiet()
    print(profile.banner())
    with progress("recipe", unit="step") as step:
        step(1, 3, "writing")
        folder = launch.fresh_folder(begun.workspace)
        path = write_recipe(
            begun, folder / f"{profile.name}.yaml", folder / "run", options.gpus, options.tracker
        )
        step(2, 3, "loading the tokenizer")
        from fiqa_helpers.model import load_tokenizer
        from fiqa_helpers.recipe_check import check_recipe

        stands_in = options.stand_in_tokenizer
        tokenizer = load_tokenizer(replace(profile, model=PROFILES["laptop"].model) if stands_in else profile)
        step(3, 3, "building everything but the weights")
        report = check_recipe(path, options.gpus, tokenizer if stands_in else None)
    print(f"{report}\n\nRecipe  {path}")
    print(f"Start   {launch.launch_line(path, options.gpus, cpu=profile.device == 'cpu')}")
    return 0


def compare(options: argparse.Namespace) -> int:
    """Print what was set differently and what came out, and write the page."""
    from fiqa_helpers.compare import compare

    text, page = compare(options.folders)
    print(f"{text}\n\nWith the curves: {page}")
    return 0


def bundle(options: argparse.Namespace) -> int:
    """Write the archive and say where it is."""
    from pathlib import Path

    from fiqa_helpers.bundle import make_bundle

    target = make_bundle(Path(options.output))
    print(f"{target}, {target.stat().st_size / 1e6:.0f} MB: unpack it with `tar xf` and read START_HERE.txt.")
    return 0


def _execute(options: argparse.Namespace, only: str, fresh: bool = False, **own: object) -> int:
    """Execute notebooks and print the table of results; `own` are their own parameters, by name."""
    from fiqa_helpers.profiles import load_profile
    from fiqa_helpers.runner import run_all, summary

    load_profile(options.profile, options.overrides)  # a wrong one is refused before a kernel starts
    done = run_all(options.profile, options.overrides, options.workdir, only, fresh, **own)
    print(summary(done, Workspace(options.workdir)))
    return 0
