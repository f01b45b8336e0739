"""The model card of an adapter or a merged model, from run card and evaluation. Nothing is uploaded."""

from dataclasses import replace
from pathlib import Path

from fiqa_helpers.errors import WorkshopError
from fiqa_helpers.profiles import NEMOTRON, REFERENCE, Profile
from fiqa_helpers.runcard import read_card
from fiqa_helpers.storage import atomic_writer

# What a licence obliges a derived model to, by base model: name, id or link, and the sentence to keep.
LICENCES = {
    NEMOTRON: (
        "other",
        "The base model is under the [NVIDIA Open Model License]"
        "(https://www.nvidia.com/en-us/agreements/enterprise-software/nvidia-open-model-license/) and the "
        "[Llama 3.1 Community License](https://www.llama.com/llama3_1/license/), which asks for the words "
        "“Built with Llama” and a name that begins with Llama where the model is passed on.",
    ),
    "packaged": ("apache-2.0", "The base model, SmolLM2-135M-Instruct, is under Apache-2.0."),
    "random": ("other", "The base model's weights are random numbers: there is nothing to license."),
}
BASES = {"packaged": "HuggingFaceTB/SmolLM2-135M-Instruct", "random": "random weights, for tests"}
DATA = (
    "[FiQA](https://huggingface.co/datasets/explodinggradients/fiqa) (questions and answers from financial "
    "forums), CC-BY-SA-4.0: name the source, and share adapted *data* alike."
)


def write_model_card(
    folder: Path,
    run_card: dict,
    evaluation: dict | None = None,
    name: str = "LoRA on FiQA",
    merged: bool = False,
) -> Path:
    """Write `folder/README.md`, a Hugging Face model card; returns its path.

    `run_card` is notebook 04's final_model/run_card.json, `evaluation` notebook 06's
    outputs/evaluation/summary.json. A metric stands only with its floors and its interval; without an
    evaluation the card says so.

    Raises:
        WorkshopError: the folder is missing, or a card has not the fields that it should have.
    """
    if not folder.is_dir():
        raise WorkshopError(f"There is no folder {folder}: train (notebook 04) or merge an adapter first.")
    try:
        text = _text(run_card, evaluation, name, merged)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise WorkshopError(
            f"The run card or the evaluation lacks what a model card needs ({error!r}): "
            "run notebooks 04 and 06 again."
        ) from None
    path = folder / "README.md"
    with atomic_writer(path) as file:
        file.write(text)
    return path


def read_evaluation(folder: Path) -> dict | None:
    """Notebook 06's summary in `folder` (outputs/evaluation); None when there is none."""
    return read_card(folder / "summary.json")


def _text(card: dict, evaluation: dict | None, name: str, merged: bool) -> str:
    # a setting that an older card does not know was the reference run's
    profile = replace(REFERENCE, **card["profile"] | {"lora_targets": tuple(card["profile"]["lora_targets"])})
    licence, sentence = LICENCES.get(profile.model, ("other", f"See the licence of {profile.model}."))
    base = BASES.get(profile.model, profile.model)
    front = [f"license: {licence}", "language: en", "pipeline_tag: text-generation"]
    front += ["datasets:", "- explodinggradients/fiqa", "tags:", "- finance", "- lora"]
    if "/" in base and not base.startswith(("/", ".", "~")):
        front += [f"base_model: {base}", f"base_model_relation: {'merge' if merged else 'adapter'}"]
    front += ["library_name: transformers"] if merged else ["library_name: peft"]
    loss = card.get("validation_loss") or {}
    versions = ", ".join(f"{k} {v}" for k, v in card["versions"].items() if v != "not installed")
    parts = [
        "---\n" + "\n".join(front) + "\n---",
        f"# {name}",
        f"{'A merged model' if merged else 'A LoRA adapter'} for answering financial questions in the manner "
        f"of a forum, made with the FiQA workshop (profile {profile.name}: {profile.title}). "
        "**It gives no financial advice**, and nobody has checked its answers for truth.",
        "## How it was made",
        _table(_settings(profile, base, card, loss)),
        f"Versions: {versions}; git revision {card.get('git_revision', 'unknown')}.",
        "## Prompt\n\n" + _prompt(profile),
        "## Data and licence",
        f"Trained on {DATA} {_data_source(profile)}\n\n{sentence}",
        "## Evaluation\n\n" + evaluation_section(evaluation),
        "## Limits\n\n" + _limits(profile, card, evaluation),
    ]
    return "\n\n".join(parts) + "\n"


def _settings(profile: Profile, base: str, card: dict, loss: dict) -> list[tuple[str, str]]:
    steps = "all of the epochs" if profile.max_steps < 0 else f"at most {profile.max_steps} steps"
    schedule = f"linear decay, {profile.warmup_ratio:.0%} warm-up"
    length = f"{profile.epochs} epoch(s), {steps}, {profile.batch_size} rows a step"
    rows = [
        ("base model", f"{base}, revision {profile.model_revision}"),
        ("LoRA", f"rank {profile.lora_rank}, alpha {profile.lora_alpha}, dropout {profile.lora_dropout}"),
        ("layers", ", ".join(profile.lora_targets)),
        ("optimizer", f"AdamW, peak rate {profile.learning_rate:g}, {schedule}"),
        ("run", f"{length}; {card.get('outcome', '')}"),
        ("longest row", f"{profile.max_length} tokens"),
        ("precision", f"{profile.dtype} on {profile.device}"),
    ]
    if profile.topical_words:
        rows.append(("training answers", f"cut to {profile.topical_words} words on the question"))
    if loss:
        rows.append(("validation loss", f"{loss['before']:.3f} -> {loss['best']:.3f} nats per answer token"))
    return rows


def _prompt(profile: Profile) -> str:
    from fiqa_helpers.prompts import build_prompt

    if profile.prompt != "plain":
        return "The model's own chat template; the system text of the workshop stands in the first turn."
    text = build_prompt("{question}", "plain")
    return (
        f"Trained on exactly this text, without a chat template; the answer ends in the end token:\n\n"
        f"```\n{text}\n```"
    )


def _data_source(profile: Profile) -> str:
    if profile.data == "packaged":
        return (
            "The rows are from the 648 that are the **test split** of the hub's data set. It was trained on "
            "some of them: it must not be evaluated on that split. An evaluation below uses others, held out."
        )
    return f"Source: {profile.data}."


def evaluation_section(evaluation: dict | None) -> str:
    """Notebook 06's result (`read_evaluation`) as a Markdown table with floors and intervals."""
    if not evaluation:
        return "It has not been evaluated: nothing is known about how good its answers are."
    from fiqa_helpers.metrics import METRICS

    floors = evaluation["floors"]
    head = ["metric", "better", "base", "tuned", "difference", "95 % interval", *floors]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for key, found in evaluation["comparisons"].items():
        means = [f"{floor[key]:.3f}" if key in floor else "–" for floor in floors.values()]
        better = {1: "higher", -1: "lower", 0: "neither"}[METRICS[key].better]
        cells = [METRICS[key].title, better, f"{found['base']:.3f}", f"{found['tuned']:.3f}"]
        cells += [f"{found['difference']:+.3f}", f"{found['low']:+.3f} to {found['high']:+.3f}", *means]
        lines.append(f"| {' | '.join(cells)} |")
    of = f" of {evaluation['test_rows']}" if "test_rows" in evaluation else ""
    return (
        "\n".join(lines)
        + f"\n\n{evaluation['rows']}{of} test rows, {_decoding(evaluation)}, paired bootstrap intervals "
        "of tuned minus base. The last columns are floors: what an answer scores that took no model."
    )


def _decoding(evaluation: dict) -> str:
    """How both models answered."""
    used = evaluation.get("decoding") or {}
    how = "greedy decoding"
    if used.get("no_repeat_ngram_size"):
        how += f" in which no {used['no_repeat_ngram_size']} tokens occur twice"
    return how


def _limits(profile: Profile, card: dict, evaluation: dict | None) -> str:
    limits = [
        "Answers are forum posts in style and in reliability: opinions, partly out of date.",
        "It was trained on single questions; it holds no conversation and knows no sources.",
    ]
    if profile.model == "packaged":
        limits.append("A model of 135 million parameters, tuned for minutes to teach how it is done.")
    if card.get("finished") is False:
        limits.append(f"The training did not finish: {card.get('outcome', 'it was stopped')}.")
    if evaluation and evaluation["rows"] < 100:
        limits.append("Evaluated on few rows: the intervals say how little that shows.")
    return "\n".join(f"- {limit}" for limit in limits)


def _table(rows: list[tuple[str, str]]) -> str:
    cells = [f"| {name} | {value.strip().rstrip(';').replace('|', '&#124;')} |" for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *cells])
