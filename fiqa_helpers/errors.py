"""One sentence for the person in front of the screen, instead of a traceback forty frames deep."""


class WorkshopError(Exception):
    """Something a person can put right: the message names the culprit and the remedy."""


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
