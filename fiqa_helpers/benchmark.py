"""FiQA as a benchmark of the NeMo Evaluator SDK, and hashes that tell one model from another."""

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fiqa_helpers import metrics

if TYPE_CHECKING:
    from nemo_evaluator import EvalEnvironment
    from transformers import PreTrainedModel

    from fiqa_helpers.similarity import Similarity

AT_ONCE = 4096  # references embedded in one call


def register_fiqa(
    rows: Sequence[dict], prompts: Sequence[str], similarity: "Similarity"
) -> "EvalEnvironment":
    """Register `rows` (`question`, `ground_truths`) as the environment `fiqa` and return it.

    Semantic similarity is the SDK's reward, so its own summary gives the primary metric; the other metrics
    are in the scoring details of each sample.
    """
    from nemo_evaluator import ScorerInput, SeedResult, benchmark, get_environment, scorer

    references = [text for row in rows for text in row["ground_truths"]]
    for start in range(0, len(references), AT_ONCE):  # in a few large batches now, not one by one later
        for cut in (False, True):
            similarity.embed(references[start : start + AT_ONCE], cut)

    def seed(row: dict, index: int) -> SeedResult:
        # The SDK keeps this for each row, in memory and in its log: no second copy of the references.
        about = {"row": index, "question": row["question"]}
        return SeedResult(prompt=prompts[index], expected_answer=row["ground_truths"][0], metadata=about)

    @benchmark(name="fiqa", dataset=lambda: [dict(row) for row in rows], seed_fn=seed)
    @scorer
    def score(sample: ScorerInput) -> dict[str, float]:
        scores = metrics.score(sample.response, rows[sample.metadata["row"]]["ground_truths"], similarity)
        return {"reward": scores[metrics.PRIMARY], **scores}

    return get_environment("fiqa")


def fingerprint_base(model: "PreTrainedModel") -> str:
    """Hash over names, shapes and 64 values of each weight tensor, adapter left out: cheap also for 8B."""
    total = hashlib.sha256()
    for name, weights in model.named_parameters():
        if "lora_" in name:
            continue
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        values = weights.detach().flatten()[:: max(1, weights.numel() // 64)][:64].float().cpu()
        total.update(f"{plain} {tuple(weights.shape)}".encode() + values.numpy().tobytes())
    return total.hexdigest()


def fingerprint_adapter(model: "PreTrainedModel") -> str | None:
    """Hash over every weight and setting of the active adapter; None for a model without one."""
    import torch

    if not has_adapter(model):
        return None
    from peft import get_peft_model_state_dict

    settings = model.peft_config[model.active_adapter].to_dict()
    for key in ("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"):
        settings.pop(key, None)  # where it came from, not what it does
    total = hashlib.sha256(json.dumps(settings, sort_keys=True, default=_plain).encode())
    for name, weights in sorted(get_peft_model_state_dict(model).items()):
        total.update(name.encode() + weights.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def has_adapter(model: "PreTrainedModel") -> bool:
    """Whether `model` is a PEFT model whose adapter can be switched off."""
    return hasattr(model, "disable_adapter") and bool(getattr(model, "peft_config", None))


def _plain(value: object) -> object:
    return sorted(value) if isinstance(value, set) else str(value)
