"""Where things are: the project, the folders that a run writes to, the cache of packaged assets."""

import errno
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fiqa_helpers.errors import WorkshopError, shown


def project_root() -> Path:
    """The folder that holds `notebooks/` and `fiqa_helpers/`.

    Looked for from the working directory upwards, because papermill starts a kernel in the caller's
    folder and nbmake in the notebook's. A package installed with `pip install -e` is the fallback.

    Raises:
        WorkshopError: the notebooks are not in any parent folder.
    """
    here = Path.cwd()
    package = Path(__file__).resolve().parent.parent
    for folder in [here, *here.parents, package]:
        if (folder / "fiqa_helpers" / "paths.py").is_file() and (folder / "notebooks").is_dir():
            return folder
    raise WorkshopError(f"{here} is not inside the workshop's folder: start JupyterLab or papermill there.")


def cache_dir() -> Path:
    """Folder for downloaded assets, shared by every clone: `FIQA_CACHE`, or `~/.cache/fiqa-workshop`."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fiqa-workshop"
    return Path(os.environ.get("FIQA_CACHE") or default)


@dataclass(frozen=True)
class Workspace:
    """The folders that a run writes to, under `workdir` (empty: the project folder)."""

    workdir: str = ""

    @cached_property
    def root(self) -> Path:
        if not self.workdir:
            return project_root()
        try:
            return Path(self.workdir).expanduser().resolve()
        except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL in it, ~ of an unknown user
            raise WorkshopError(
                f"workdir is {shown(self.workdir)}, which is no folder's name ({error}): set another."
            ) from None

    def _folder(self, *parts: str) -> Path:
        folder = self.root.joinpath(*parts)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, "it is read-only for you")
        except OSError as error:
            raise WorkshopError(
                f"Cannot write to {shown(str(folder), 200)} ({error.strerror}): "
                "set the parameter workdir to a folder you may write to."
            ) from None
        return folder

    @property
    def data(self) -> Path:
        return self._folder("data")

    @property
    def checkpoints(self) -> Path:
        return self._folder("checkpoints")

    @property
    def final_model(self) -> Path:
        return self.checkpoints / "final_model"

    @property
    def outputs(self) -> Path:
        return self._folder("outputs")

    @property
    def run_cards(self) -> Path:
        return self._folder("outputs", "run_cards")

    @property
    def plots(self) -> Path:
        return self._folder("outputs", "plots")

    @property
    def logs(self) -> Path:
        return self._folder("outputs", "logs")

    @property
    def evaluation(self) -> Path:
        return self._folder("outputs", "evaluation")

    def shown(self, path: Path | str) -> str:
        """`path` as a reader should see it: relative to the workspace where possible."""
        path = Path(path)
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path)
