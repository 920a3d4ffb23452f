"""Ranked text search over methods and parts (BM25 over titles, ideas, keywords and summaries)."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass

from torchconv.catalog.papers import papers
from torchconv.catalog.parts import parts

_WORD = re.compile(r"[a-z0-9]+")
_K1, _B = 1.2, 0.6
# Users' words beside the literature's.
_SYNONYMS = {
    "prune": "pruning",
    "sparse": "sparsity",
    "fourier": "spectral",
    "fft": "spectral",
    "frequency": "spectral",
    "fast": "efficient",
    "dilation": "atrous",
    "dilated": "atrous",
    "upscale": "superresolution",
    "upsampling": "superresolution",
    "sr": "superresolution",
    "timeseries": "series",
    "gcn": "graph",
}


@dataclass(frozen=True)
class Hit:
    """A search result: ``kind`` is "method" or the part's kind."""

    key: str
    kind: str
    title: str
    score: float


def _stem(word: str) -> str:
    for ending in ("izations", "ization", "ings", "ing", "ions", "ion", "ers", "er", "ed", "es", "s", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 4:
            return word[: -len(ending)]
    return word


def _words(text: str) -> list[str]:
    found: list[str] = []
    for word in _WORD.findall(text.lower()):
        found.append(_stem(word))
        if word in _SYNONYMS:
            found.append(_stem(_SYNONYMS[word]))
    return found


def _documents() -> list[tuple[str, str, str, list[str]]]:
    by_paper: dict[str, str] = {}
    documents = []
    for p in parts():
        text = f"{p.name} {p.target} {p.summary} {p.keywords} {p.kind}"
        if p.paper:
            by_paper[p.paper] = f"{by_paper.get(p.paper, '')} {text}"
        else:
            documents.append((p.name, p.kind, p.summary, _words(text) + 2 * _words(f"{p.name} {p.keywords}")))
    for key, m in papers().items():
        body = _words(f"{m.idea} {m.family} {by_paper.get(key, '')}")
        weighty = _words(f"{key} {m.title} {m.keywords} {' '.join(a['title'] for a in m.also)}")
        documents.append((key, "method", m.title, body + 2 * weighty))
    return documents


def search(query: str, limit: int = 10) -> list[Hit]:
    """Methods and parts that match ``query``, best first; a hit that has more of the query's words ranks higher."""
    wanted = set(_words(query))
    if not wanted:
        raise ValueError(f"query={query!r}: give at least one word")
    documents = _documents()
    mean = sum(len(words) for *_, words in documents) / len(documents)
    counts = [Counter(words) for *_, words in documents]
    hits = []
    for (key, kind, title, words), count in zip(documents, counts, strict=True):
        score, matched = 0.0, 0
        for word in wanted:
            # A prefix counts half, so that "prun" finds "pruning" whatever the stemmer did.
            frequency = count[word] or 0.5 * sum(n for w, n in count.items() if len(word) >= 4 and w.startswith(word))
            if not frequency:
                continue
            matched += 1
            spread = sum(1 for c in counts if c[word])
            rarity = math.log(1 + (len(documents) - spread + 0.5) / (spread + 0.5))
            score += rarity * frequency * (_K1 + 1) / (frequency + _K1 * (1 - _B + _B * len(words) / mean))
        if matched:
            hits.append(Hit(key, kind, title, round(score * matched / len(wanted), 4)))
    return sorted(hits, key=lambda h: (-h.score, h.key))[:limit]
