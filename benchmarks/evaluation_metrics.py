"""The figures of benchmarks/evaluate.py, from embeddings or captions. Nothing here knows a model.

They are CLIP_benchmark's, under its names. Where two candidates score the same, the one with the lower index is first:
the result is reproducible, and a model that gives all things one embedding gets what guessing would. A figure that
looks at more candidates than there are is None.
"""

import re
import shutil
from collections.abc import Iterator

import torch

CHUNK = 1024  # rows of the matrix of similarities that are in memory at a time
TOKENIZERS = ("ptb", "words", "characters")


def best(queries: torch.Tensor, candidates: torch.Tensor, count: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows of queries [Q, D], and for each the indices of the candidates [C, D] that are nearest, [rows, count]."""
    for start in range(0, len(queries), CHUNK):
        rows = slice(start, min(start + CHUNK, len(queries)))
        scores = queries[rows] @ candidates.T
        yield rows, scores.sort(dim=1, descending=True, stable=True).indices[:, :count]


def classification(images: torch.Tensor, classes: torch.Tensor, labels: list[int]) -> dict[str, float | None]:
    """
    Args:
        images: [N, D], of length 1.
        classes: [C, D], of length 1.
        labels: N class indices.

    Returns:
        acc1, acc5 and mean_per_class_recall, in [0, 1]; the last is over the classes that have a picture.
    """
    truth = torch.tensor(labels)
    top = torch.cat([found for _, found in best(images, classes, 5)])  # [N, 5]
    hits = top == truth[:, None]
    pictures = torch.bincount(truth, minlength=len(classes))
    right = torch.bincount(truth[hits[:, 0]], minlength=len(classes))
    recall = right[pictures > 0] / pictures[pictures > 0]
    return {
        "acc1": hits[:, 0].double().mean().item(),
        "acc5": hits.any(1).double().mean().item() if len(classes) >= 5 else None,
        "mean_per_class_recall": recall.double().mean().item(),
    }


def retrieval(
    images: torch.Tensor, texts: torch.Tensor, owners: list[int], counts: tuple[int, ...] = (1, 5, 10)
) -> dict[str, float | None]:
    """
    Args:
        images: [N, D], of length 1.
        texts: [T, D], of length 1.
        owners: for each text, the index of the picture that it describes.
        counts: how many candidates are looked at.

    Returns:
        image_retrieval_recall@k, the share of texts with their picture among the k nearest, and
        text_retrieval_recall@k, the share of pictures with one of their texts among the k nearest; in [0, 1].
    """
    picture_of = torch.tensor(owners)
    own = torch.arange(len(images))
    found_pictures = torch.cat([top == picture_of[rows, None] for rows, top in best(texts, images, max(counts))])
    found_texts = torch.cat([picture_of[top] == own[rows, None] for rows, top in best(images, texts, max(counts))])
    metrics: dict[str, float | None] = {}
    for count in counts:
        for name, hits, candidates in (("image", found_pictures, images), ("text", found_texts, texts)):
            share = hits[:, :count].any(1).double().mean().item()
            metrics[f"{name}_retrieval_recall@{count}"] = share if count <= len(candidates) else None
    return metrics


def captioning(captions: list[str], references: list[list[str]], tokenizer: str) -> dict[str, float]:
    """
    Bleu_1 to Bleu_4, ROUGE_L and CIDEr, by pycocoevalcap, the COCO server's code. CIDEr weighs words by how rare they
    are in the references at hand, so it is a figure of the whole set.

    Args:
        captions: one for each of N pictures.
        references: for each picture, what it may be called.
        tokenizer: "ptb", the COCO server's (English; needs Java); "words", lower-cased runs of letters and digits; or
            "characters", without white space and punctuation, for languages without spaces. Only "ptb" gives figures
            that can be compared with published ones.
    """
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        raise ImportError("`--task captioning` needs `pip install pycocoevalcap`.") from error
    written = tokenized([[caption] for caption in captions], tokenizer)
    right = tokenized(references, tokenizer)
    bleu, _ = Bleu(4).compute_score(right, written, verbose=0)
    scores = {f"Bleu_{order}": score for order, score in enumerate(bleu, 1)}
    scores |= {"ROUGE_L": Rouge().compute_score(right, written)[0], "CIDEr": Cider().compute_score(right, written)[0]}
    return {name: float(score) for name, score in scores.items()}


def tokenized(texts: list[list[str]], tokenizer: str) -> dict[int, list[str]]:
    """Texts of each picture -> {picture: texts with a space between tokens}"""
    check_tokenizer(tokenizer)
    one_line = [[" ".join(text.split()) for text in group] for group in texts]
    if tokenizer == "ptb":
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

        return PTBTokenizer().tokenize(
            {key: [{"caption": text} for text in group] for key, group in enumerate(one_line)}
        )
    pattern = r"[^\W_]+" if tokenizer == "words" else r"[^\W_]"
    return {key: [" ".join(re.findall(pattern, text.lower())) for text in group] for key, group in enumerate(one_line)}


def check_tokenizer(tokenizer: str) -> None:
    """
    Raises:
        ValueError: an unknown tokenizer, or "ptb" where there is no Java.
    """
    if tokenizer not in TOKENIZERS:
        raise ValueError(f"`--tokenizer` must be one of {TOKENIZERS}, got {tokenizer!r}.")
    if tokenizer == "ptb" and shutil.which("java") is None:
        raise ValueError(
            "`--tokenizer ptb` needs Java, and there is no `java` here. Install a JRE, or choose `--tokenizer words`, "
            "whose figures cannot be compared with published ones."
        )
