"""What the check of an exercise says: not solved yet, what is wrong, or right and what that means."""

import textwrap
from collections.abc import Callable

from fiqa_helpers.errors import WorkshopError

WIDTH = 100  # characters of a line


def check(rule: Callable[..., str], *answers: object) -> None:
    """Print what `rule` finds in `answers`. Nothing is raised: an open exercise must not end a headless run.

    `rule` asserts one thing after the other, each with a hint as its message, and returns what a right answer
    means. Its name is the headline: `exercise_2`. Answers that still hold a `...` are not handed to it. A
    `WorkshopError` of the code under test is a hint as well.
    """
    try:
        if any(is_open(answer) for answer in answers):
            said = (
                "○ not solved yet: put your answer in place of each ... above, run that cell, then this one."
            )
        else:
            said = f"✓ right. {rule(*answers)}"
    except (AssertionError, WorkshopError) as error:
        said = f"✗ not yet. {error}"
    except NameError as error:
        said = f"✗ not checked ({error}): run the cells above, from the top, or look for a typing mistake."
    except (
        Exception
    ) as error:  # whatever an answer of the wrong kind, or code that is still broken, can raise
        said = f"✗ not yet. Your answer cannot be checked, {type(error).__name__}: {error}"
    title = rule.__name__.replace("_", " ").capitalize()
    print(textwrap.fill(f"{title} {said}", WIDTH, subsequent_indent="  "))


def is_open(answer: object) -> bool:
    """True for `...`, `None`, a collection that holds one, and a function that still returns `...`."""
    if isinstance(answer, list | tuple | set | dict):
        return any(is_open(part) for part in (answer.values() if isinstance(answer, dict) else answer))
    if hasattr(answer, "__code__"):  # a function: `return ..., ...` is a constant of its own, a tuple
        constants = answer.__code__.co_consts
        return ... in constants or any(isinstance(part, tuple) and ... in part for part in constants)
    return answer is None or answer is ...
