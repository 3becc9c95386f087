"""The `model-index` of the tiny checkpoint's card: what the Hub shows as evaluation results, from tiny/results.json.

Imported by tools/tiny/evaluate_tiny.py, which writes it (also with `--tables`). Only the tiny checkpoint's card has it:
on the main card the Hub would show these figures as the 14B's.
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
    """The model's own figures in results.json, in four digits."""
    found = []
    for language, part in results.items():
        if not isinstance(part, dict) or "caption_exact" not in part:
            continue  # not a language, but a count, a baseline or how it was measured
        dataset = {  # no dataset of the Hub, so nothing links it
            "dataset_type": "twemoji",
            "dataset_name": f"Twemoji: {results['pictures']} concepts, drawn by an artist held out of the training",
            "dataset_config": language,
            "dataset_split": "test",
        }
        modes = [mode for mode in part if mode.startswith("InternVL-")]
        figures = [(*PER_MODE[key], f", {mode}", part[mode][key]) for mode in modes for key in PER_MODE]
        figures += [(*PER_LANGUAGE[key], "", part[key]) for key in PER_LANGUAGE]
        for task, metric, name, suffix, value in figures:
            what = {"metric_type": metric, "metric_name": name + suffix, "metric_value": round(value, 4)}
            found.append(EvalResult(**what, **TASKS[task], **dataset))
    return found


def write_model_index(card: Path, results: dict) -> None:
    """Replace the `model-index` in the card's metadata; the rest of the card stays as it is."""
    metadata = metadata_load(card) or {}
    metadata["model-index"] = eval_results_to_model_index(NAME, eval_results(results))
    metadata_save(card, metadata)
