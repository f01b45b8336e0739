"""One sentence for the person in front of the screen, instead of a traceback forty frames deep."""


class WorkshopError(Exception):
    """Something a person can put right: the message names the culprit and the remedy."""


def shown(value: object, longest: int = 80) -> str:
    """A value as a sentence quotes it: `repr`, cut to `longest` characters."""
    try:
        text = repr(value)
    except ValueError:  # Python does not write integers of more than 4,300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def a_type(kind: type) -> str:
    """The name of a type with its article: a float, an int."""
    return f"{'an' if kind.__name__[0] in 'aeiou' else 'a'} {kind.__name__}"


def install_notebook_handler() -> None:
    """Let IPython show a `WorkshopError` as its sentence alone.

    The cell still fails: papermill exits non-zero, nbmake reports it, Run All stops here. Outside IPython
    this does nothing.
    """
    from IPython import get_ipython

    shell = get_ipython()
    if shell is None:
        return

    def show(shell, kind, error, traceback, tb_offset=None) -> None:
        # The frames given here become the cell's error output: one line is enough.
        shell._showtraceback(kind, error, [f"{kind.__name__}: {error}"])

    shell.set_custom_exc((WorkshopError,), show)
