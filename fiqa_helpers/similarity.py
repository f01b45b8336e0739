"""Semantic similarity with MiniLM, of whole texts: what is longer than its window is embedded in chunks."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

MOST_KNOWN = 250_000  # vectors kept for texts that come again: 0.4 GiB


class Similarity:
    """Cosine similarity of texts under all-MiniLM-L6-v2 (Reimers and Gurevych 2019, arXiv:1908.10084).

    The model reads 256 word pieces and drops the rest in silence. Here a longer text is cut at word limits
    into windows of about equal size, and the mean of their embeddings, weighted by length, stands for it.
    `cut=True` gives what the model makes of the first 256 pieces alone, as published figures do.
    """

    def __init__(self, folder: Path | None = None, device: str = "cpu"):
        from sentence_transformers import SentenceTransformer

        from fiqa_helpers import assets

        self.model = SentenceTransformer(str(folder or assets.minilm_folder()), device=device)
        self.window = self.model.max_seq_length - 2  # [CLS] and [SEP] take two places
        self._known: dict[tuple[str, bool], np.ndarray] = {}

    def embed(self, texts: Sequence[str], cut: bool = False) -> "np.ndarray":
        """Unit vectors, float32 of shape (texts, 384). An empty text is the zero vector, near to nothing."""
        import numpy as np

        while len(self._known) > MOST_KNOWN:  # the oldest go
            del self._known[next(iter(self._known))]
        new = [text for text in dict.fromkeys(texts) if (text, cut) not in self._known]
        pieces = [[(text, 1)] if cut else self.chunks(text) for text in new]
        flat = [piece for text in pieces for piece, _ in text]
        if flat:
            vectors = self.model.encode(flat, normalize_embeddings=True, show_progress_bar=False)
        start = 0
        for text, chunks in zip(new, pieces, strict=True):
            weights = np.array([[length] for _, length in chunks], dtype=np.float32)
            total = (weights * vectors[start : start + len(chunks)]).sum(axis=0)
            start += len(chunks)
            empty = not text.strip()
            self._known[text, cut] = total * 0 if empty else total / np.linalg.norm(total)
        return np.stack([self._known[text, cut] for text in texts])

    def chunks(self, text: str) -> list[tuple[str, int]]:
        """`text` in pieces that fit the window: (piece, its word pieces)."""
        tokens = self.model.tokenizer(
            text, add_special_tokens=False, truncation=False, return_offsets_mapping=True, verbose=False
        )
        words: list[list[int]] = []  # of each word: where it starts, where it ends, its word pieces
        last = None
        for word, (start, end) in zip(tokens.word_ids(), tokens["offset_mapping"], strict=True):
            if word == last:
                words[-1][1:] = [end, words[-1][2] + 1]
            else:
                words.append([start, end, 1])
            last = word
        count = max(1, -(-len(tokens["input_ids"]) // self.window))
        size = -(-len(tokens["input_ids"]) // count)
        groups: list[list[int]] = []
        for start, end, length in words:
            if groups and groups[-1][2] + length <= size:
                groups[-1][1:] = [end, groups[-1][2] + length]
            else:
                groups.append([start, end, length])
        return [(text[start:end], length) for start, end, length in groups] or [(text, 1)]

    def best(self, answer: str, references: Sequence[str], cut: bool = False) -> tuple[float, int]:
        """(similarity, index) of the reference that is nearest to `answer`; 1 is the same, 0 unrelated."""
        values = self.embed(references, cut) @ self.embed([answer], cut)[0]
        nearest = int(values.argmax())
        return float(values[nearest]), nearest
