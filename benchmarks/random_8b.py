"""A checkpoint folder with the 8B model's architecture, random bf16 weights and Llama 3's vocabulary.

Speed and memory do not depend on what the weights are, so this stands in for the real 16 GB where they can't
be fetched. The vocabulary is real, because the lengths of FiQA's rows decide the speed: it is the file
`tokenizer.model` in the package llama-models 0.3.0 (`pip download --no-deps llama-models==0.3.0`).

    python benchmarks/random_8b.py FOLDER --vocabulary llama_models-0.3.0-py3-none-any.whl

It needs 16 GB of disk and, with a GPU, about half a minute. `--small` makes a model of the same form that any
CPU runs.
"""

import argparse
import shutil
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from fiqa_helpers import model, run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MEMBER = "llama_models/llama3/tokenizer.model"
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}


def llama3_tokenizer(wheel: Path) -> "PreTrainedTokenizerBase":
    """Llama 3's tokenizer (128,256 tokens) from the wheel of llama-models, or from its `tokenizer.model`."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    named = ["begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1"]
    named += ["finetune_right_pad_id", "step_id", "start_header_id", "end_header_id", "eom_id", "eot_id"]
    named += ["python_tag", "image", *(f"reserved_special_token_{n}" for n in range(2, 246))]
    with tempfile.TemporaryDirectory() as folder:
        file = wheel
        if wheel.suffix == ".whl":
            with zipfile.ZipFile(wheel) as packed:
                file = Path(packed.extract(MEMBER, folder))
        backend = TikTokenConverter(str(file), extra_special_tokens=[f"<|{name}|>" for name in named])
        backend = backend.converted()
    bos = "<|begin_of_text|>"
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        clean_up_tokenization_spaces=False,
    )


def write_random_8b(folder: Path, tokenizer: "PreTrainedTokenizerBase", small: bool = False) -> Path:
    """Write config, random weights in safetensors and `tokenizer` to the new folder `folder`; returns it."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    config = model.reference_config()
    if small:
        config.update(SMALL | {"head_dim": 16, "num_hidden_layers": 2})
    config.update({"vocab_size": len(tokenizer)})
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
    parser.add_argument("folder", type=Path, help="a new folder")
    parser.add_argument("--vocabulary", type=Path, required=True, help="wheel of llama-models")
    parser.add_argument("--small", action="store_true", help="two narrow layers, to try things on a CPU")
    args = parser.parse_args()
    if args.folder.exists():
        print(f"{args.folder} is there already: it is used as it is.")
        sys.exit(0)
    run.quiet()
    began = time.monotonic()
    args.folder.parent.mkdir(parents=True, exist_ok=True)
    write_random_8b(args.folder, llama3_tokenizer(args.vocabulary), args.small)
    size = sum(file.stat().st_size for file in args.folder.iterdir()) / 1e9
    print(f"{args.folder}: {size:.1f} GB in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
