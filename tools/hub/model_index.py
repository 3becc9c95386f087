"""The `model-index` of the tiny checkpoint's card: what the Hub shows as evaluation results, from tiny/results.json.

Imported by tools/tiny/evaluate_tiny.py, which writes it (also with `--tables`). It stands in the card of the tiny
checkpoint alone: on the main card the Hub would show these figures as the 14B's.
"""

from pathlib import Path

from huggingface_hub import EvalResult
from huggingface_hub.repocard import metadata_load, metadata_save
from huggingface_hub.repocard_data import eval_results_to_model_index

NAME = "InternVL tiny (3 million parameters, emoji)"
TASKS = {
    "retrieval": {"task_type": "zero-shot-retrieval", "task_name": "Image-text retrieval"},
    "zero-shot": {"task_type": "zero-shot-image-classification", "task_name": "20-way zero-shot classification"},
    "caption": {"task_type": "image-to-text", "task_name": "Captioning"},
}
# Per key of results.json: task, the Hub's id of the metric, and its name.
PER_MODE = {
    "image_to_text_r1": ("retrieval", "recall_at_1", "image-to-text R@1"),
    "image_to_text_r5": ("retrieval", "recall_at_5", "image-to-text R@5"),
    "text_to_image_r1": ("retrieval", "recall_at_1", "text-to-image R@1"),
    "zero_shot_20": ("zero-shot", "accuracy", "accuracy"),
}
PER_LANGUAGE = {
    "reranked_r1": ("retrieval", "recall_at_1", "image-to-text R@1, the ten best of InternVL-G re-ranked"),
    "caption_exact": ("caption", "exact_match", "caption is the exact name"),
}


def eval_results(results: dict) -> list[EvalResult]:
    """Every figure of results.json that the model itself is responsible for, in four digits."""
    found = []
    for language, part in results.items():
        if not isinstance(part, dict) or "caption_exact" not in part:
            continue  # not a language, but a count, a baseline or how it was measured
        for mode in (key for key in part if key.startswith("InternVL-")):
            for key, (task, metric, name) in PER_MODE.items():
                found.append(one_result(dataset(results, language), task, metric, f"{name}, {mode}", part[mode][key]))
        for key, (task, metric, name) in PER_LANGUAGE.items():
            found.append(one_result(dataset(results, language), task, metric, name, part[key]))
    return found


def dataset(results: dict, language: str) -> dict[str, str]:
    """What was measured on. It is no dataset of the Hub, so nothing links it."""
    name = f"Twemoji: {results['pictures']} concepts, drawn by an artist held out of the training"
    return {"dataset_type": "twemoji", "dataset_name": name, "dataset_config": language, "dataset_split": "test"}


def one_result(where: dict[str, str], task: str, metric: str, name: str, value: float) -> EvalResult:
    return EvalResult(metric_type=metric, metric_name=name, metric_value=round(value, 4), **TASKS[task], **where)


def write_model_index(card: Path, results: dict) -> None:
    """Replace the `model-index` in the card's metadata; the rest of the card stays as it is."""
    metadata = metadata_load(card) or {}
    metadata["model-index"] = eval_results_to_model_index(NAME, eval_results(results))
    metadata_save(card, metadata)
