"""Run a recipe where there is no GPU: `torchrun ... -m fiqa_helpers.recipe_cpu recipe.yaml`.

With a GPU it is NeMo AutoModel's own command line and nothing else.
"""

import sys
from unittest import mock

from fiqa_helpers.model import nemo_on_cpu


def main() -> int:
    """Run NeMo AutoModel 0.7.0's command line on the arguments of this process.

    Its recipe asks CUDA for the current device twice while it loads the model (`nemo_on_cpu` answers) and
    resets CUDA's memory statistics, of which there are none. Processes talk through gloo.
    """
    import torch
    from nemo_automodel.cli import app

    if torch.cuda.is_available():
        return app.main() or 0
    with nemo_on_cpu(), mock.patch.object(torch.cuda, "reset_peak_memory_stats", lambda *_: None):
        return app.main() or 0


if __name__ == "__main__":
    sys.exit(main())
