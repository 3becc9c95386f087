"""Computes the metrics of benchmarks/evaluate.py from embeddings or captions, without a model.

The metrics and their names are CLIP_benchmark's. Of candidates with equal scores the one with the lowest index comes
first: the result is reproducible, and a model with one embedding for everything scores like guessing. A metric that
considers more candidates than there are is None.
"""

import re
import shutil
from collections.abc import Iterator
from importlib.util import find_spec

import torch

CHUNK = 1024  # rows of the similarity matrix in memory at a time
TOKENIZERS = ("ptb", "words", "characters")


def best(queries: torch.Tensor, candidates: torch.Tensor, count: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """Slices of the queries [Q, D], each with the indices [rows, count] of the nearest candidates [C, D]."""
    for start in range(0, len(queries), CHUNK):
        rows = slice(start, min(start + CHUNK, len(queries)))
        scores = queries[rows] @ candidates.T
        yield rows, scores.sort(dim=1, descending=True, stable=True).indices[:, :count]


def classification(images: torch.Tensor, classes: torch.Tensor, labels: list[int]) -> dict[str, float | None]:
    """Accuracy of zero-shot classification.

    Args:
        images: [N, D], of length 1.
        classes: [C, D], of length 1.
        labels: N class indices.

    Returns:
        acc1, acc5 and mean_per_class_recall, in [0, 1]; the last is over the classes that have an image.
    """
    truth = torch.tensor(labels)
    top = torch.cat([found for _, found in best(images, classes, 5)])  # [N, 5]
    hits = top == truth[:, None]
    counts = torch.bincount(truth, minlength=len(classes))
    right = torch.bincount(truth[hits[:, 0]], minlength=len(classes))
    recall = right[counts > 0] / counts[counts > 0]
    return {
        "acc1": hits[:, 0].double().mean().item(),
        "acc5": hits.any(1).double().mean().item() if len(classes) >= 5 else None,
        "mean_per_class_recall": recall.double().mean().item(),
    }


def retrieval(
    images: torch.Tensor, texts: torch.Tensor, owners: list[int], counts: tuple[int, ...] = (1, 5, 10)
) -> dict[str, float | None]:
    """Recall of retrieval in both directions.

    Args:
        images: [N, D], of length 1.
        texts: [T, D], of length 1.
        owners: for each text, the index of the image that it describes.
        counts: the values of k.

    Returns:
        image_retrieval_recall@k, the share of texts with their image among the k nearest, and
        text_retrieval_recall@k, the share of images with one of their texts among the k nearest; in [0, 1].
    """
    image_of = torch.tensor(owners)
    own = torch.arange(len(images))
    found_images = torch.cat([top == image_of[rows, None] for rows, top in best(texts, images, max(counts))])
    found_texts = torch.cat([image_of[top] == own[rows, None] for rows, top in best(images, texts, max(counts))])
    metrics: dict[str, float | None] = {}
    for count in counts:
        for name, hits, candidates in (("image", found_images, images), ("text", found_texts, texts)):
            share = hits[:, :count].any(1).double().mean().item()
            metrics[f"{name}_retrieval_recall@{count}"] = share if count <= len(candidates) else None
    return metrics


def captioning(captions: list[str], references: list[list[str]], tokenizer: str) -> dict[str, float]:
    """Bleu_1 to Bleu_4, ROUGE_L and CIDEr, by pycocoevalcap, the COCO server's code. CIDEr weighs words by their rarity
    in the references, so it depends on the whole set.

    Args:
        captions: one for each of N images.
        references: the right captions of each image.
        tokenizer: "ptb", the COCO server's (English; needs Java); "words", lower-cased runs of letters and digits; or
            "characters", without white space and punctuation, for languages without spaces. Only scores with "ptb" can
            be compared with published ones.
    """
    check_scorers()
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    written = tokenized([[caption] for caption in captions], tokenizer)
    right = tokenized(references, tokenizer)
    bleu, _ = Bleu(4).compute_score(right, written, verbose=0)
    scores = {f"Bleu_{order}": score for order, score in enumerate(bleu, 1)}
    scores |= {"ROUGE_L": Rouge().compute_score(right, written)[0], "CIDEr": Cider().compute_score(right, written)[0]}
    return {name: float(score) for name, score in scores.items()}


def tokenized(texts: list[list[str]], tokenizer: str) -> dict[int, list[str]]:
    """The texts of each image -> {image: texts with a space between tokens}"""
    check_tokenizer(tokenizer)
    one_line = [[" ".join(text.split()) for text in group] for group in texts]
    if tokenizer == "ptb":
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

        groups = {key: [{"caption": text} for text in group] for key, group in enumerate(one_line)}
        return PTBTokenizer().tokenize(groups)
    pattern = r"[^\W_]+" if tokenizer == "words" else r"[^\W_]"
    return {key: [" ".join(re.findall(pattern, text.lower())) for text in group] for key, group in enumerate(one_line)}


def check_scorers() -> None:
    """Raises:
    ValueError: pycocoevalcap is not installed.
    """
    if find_spec("pycocoevalcap") is None:
        raise ValueError("`--task captioning` needs pycocoevalcap for its scores. Run `pip install pycocoevalcap`.")


def check_tokenizer(tokenizer: str) -> None:
    """Raises:
    ValueError: an unknown tokenizer, or "ptb" without Java.
    """
    if tokenizer not in TOKENIZERS:
        raise ValueError(f"`--tokenizer` must be one of {TOKENIZERS}, got {tokenizer!r}.")
    if tokenizer == "ptb" and shutil.which("java") is None:
        raise ValueError(
            "`--tokenizer ptb` needs Java, and found no `java`. Install a JRE, or choose `--tokenizer words`, "
            "whose scores cannot be compared with published ones."
        )
