"""A checkpoint folder with the 8B model's architecture, random bf16 weights and a vocabulary of its size.

    python benchmarks/random_8b.py [FOLDER]

Speed and memory do not depend on what the weights are, so this stands in for the real 16 GB. Its tokenizer
has as many tokens as the model and spells nothing: the benchmarks' rows are tokens already. It needs 16 GB of
disk and half a minute on a GPU; `--small` makes two narrow layers, for any CPU.
"""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fiqa_helpers import model  # noqa: E402

FOLDER = Path(os.environ.get("FIQA_RANDOM_8B", f"{tempfile.gettempdir()}/fiqa_random_8b"))
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}


def make_random_8b(folder: Path, small: bool = False) -> Path:
    """Write config, random weights and tokenizer to `folder`, unless it is there; returns it."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

    if (folder / "config.json").exists():
        return folder
    backend = Tokenizer(models.WordLevel({f"<{n}>": n for n in range(128_256)}, unk_token="<0>"))
    named = dict(bos_token="<128000>", eos_token="<128009>", pad_token="<128004>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    config = model.reference_config()
    if small:
        config.update(SMALL | {"head_dim": 16, "num_hidden_layers": 2})
    ends = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config.update(ends)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # 2 s there, minutes on a CPU
        weights = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    weights.generation_config = GenerationConfig(**ends, do_sample=False)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    weights.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER, help="used as it is if it is there")
    parser.add_argument("--small", action="store_true", help="two narrow layers, to try things on a CPU")
    args = parser.parse_args()
    args.folder.parent.mkdir(parents=True, exist_ok=True)
    make_random_8b(args.folder.resolve(), args.small)


if __name__ == "__main__":
    main()
