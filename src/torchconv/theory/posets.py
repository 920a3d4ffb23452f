"""Finite posets: up-sets, order polytopes, tropical polynomials, and the operations that compose them.

Dolores-Cuenca, Guzmán-Sáenz, Kim, López-Moreno, Mendoza-Cortes 2024, "Order Theory in the Context of Machine Learning",
arXiv 2412.06097.

A poset P on n points has the order polytope O(P) = {t ∈ [0, 1]^n : t_i ≤ t_j where i < j}, whose vertices are the
indicators of the up-sets. The tropical polynomial of P is its support function, max over up-sets U of Σ_{i∈U} x_i.
Everything here follows from the relation alone; sets of points are integers whose bit i says whether i is in.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, cached_property
from typing import Any

import numpy as np

from torchconv._common import check, check_positive
from torchconv.catalog import part

_NAMED = (
    "a<d b<d c<d",
    "",
    "a<b",
    "a<c b<c c<d",
    "a<c b<c",
    "a<b a<c",
    "a<b c<d",
    "a<b b<c b<d",
    "a<b b<c",
    "a<b a<c a<d",
    "a<b a<c c<d",
    "a<c a<d b<c b<d",
    "a<b c<b c<d",
    "a<b b<c c<d",
    "a<b a<c b<d c<d",
    "a<c c<d b<d",
)
"""The 16 posets on four points in the paper's numbering, as generating relations; all else is computed from them."""

LIMIT = 1 << 16
"""Most up-sets, or steps of a formula, that are made before giving up."""


def points(mask: int) -> tuple[int, ...]:
    """The points of a set.

    Example:
        >>> points(0b1011)
        (0, 1, 3)
    """
    return tuple(i for i in range(mask.bit_length()) if mask >> i & 1)


def _components(mask: int, neighbours: Sequence[int]) -> list[int]:
    """Connected components of the graph on ``mask``, by least point."""
    found = []
    while mask:
        component, border = 0, mask & -mask
        while border:
            component |= border
            reached = 0
            for i in points(border):
                reached |= neighbours[i]
            border = reached & mask & ~component
        found.append(component)
        mask &= ~component
    return found


@part("posets", paper="posetfilters", kind="theory", keywords="poset order polytope tropical polynomial up-sets operad")
class Poset:
    """A finite partially ordered set on the points 0 … n−1.

    Args:
        n: number of points, ≥ 1.
        relations: pairs (i, j) for i < j; the transitive closure is taken.

    Raises:
        ValueError: a point is out of range, or the relations contain a cycle.

    Example:
        >>> zigzag = Poset(4, [(0, 1), (2, 1), (2, 3)])
        >>> zigzag
        Poset(4, a<b c<b c<d)
        >>> len(zigzag.upsets()), zigzag.linear_extensions()
        (8, 5)
        >>> zigzag.tropical_polynomial()
        'max(0, b, d, a+b, b+d, a+b+d, b+c+d, a+b+c+d)'

    Reference: arXiv 2412.06097.
    """

    def __init__(self, n: int, relations: Iterable[Sequence[int]] = ()) -> None:
        check_positive("n", n)
        above = [0] * n
        for pair in relations:
            try:
                i, j = map(operator.index, pair)  # numpy's integers too, as Python's, which do not overflow
            except (TypeError, ValueError):
                raise ValueError(f"relations={pair!r}: must be pairs (i, j) of points, for i < j") from None
            check(0 <= i < n and 0 <= j < n, "relations", tuple(pair), f"points are 0 to {n - 1}")
            above[i] |= 1 << j
        for k in range(n):
            for i in range(n):
                if above[i] >> k & 1:
                    above[i] |= above[k]
        cyclic = [i for i in range(n) if above[i] >> i & 1]
        check(not cyclic, "relations", cyclic, "these points lie on a cycle; an order has none")
        self.n = n
        self.above = tuple(above)
        self.below = tuple(sum(1 << j for j in range(n) if above[j] >> i & 1) for i in range(n))

    @classmethod
    def named(cls, number: int) -> Poset:
        """One of the 16 posets on four points, in the paper's numbering.

        Example:
            >>> Poset.named(14)
            Poset(4, a<b a<c b<d c<d)
        """
        check(0 <= number < len(_NAMED), "number", number, "the posets on four points are numbered 0 to 15")
        return cls(4, [("abcd".index(pair[0]), "abcd".index(pair[2])) for pair in _NAMED[number].split()])

    @classmethod
    def chain(cls, n: int) -> Poset:
        """0 < 1 < … < n−1."""
        return cls(n, [(i, i + 1) for i in range(n - 1)])

    @classmethod
    def antichain(cls, n: int) -> Poset:
        """No two points comparable."""
        return cls(n)

    def relations(self) -> list[tuple[int, int]]:
        """The covering relations (i, j): i < j with nothing between."""
        pairs = []
        for i in range(self.n):
            between = 0
            for k in points(self.above[i]):
                between |= self.above[k]
            pairs += [(i, j) for j in points(self.above[i] & ~between)]
        return pairs

    def upsets(self, limit: int = LIMIT) -> list[int]:
        """All up-sets, by size, then by their points; the empty set is the first, all points the last.

        Raises:
            ValueError: there are more than ``limit``.
        """
        found = [0]
        # From the top down: a point may join a set that holds everything above it.
        for v in sorted(range(self.n), key=lambda i: self.above[i].bit_count()):
            found += [s | 1 << v for s in found if s & self.above[v] == self.above[v]]
            check(len(found) <= limit, "limit", limit, f"{self} has more up-sets than that")
        return sorted(found, key=lambda s: (s.bit_count(), points(s)))

    def order_polytope_vertices(self, limit: int = LIMIT) -> np.ndarray:
        """Vertices of the order polytope, the up-sets as rows of zeros and ones: (number of up-sets, n)."""
        return np.array([[u >> i & 1 for i in range(self.n)] for u in self.upsets(limit)], dtype=np.float64)

    def linear_extensions(self, limit: int = LIMIT) -> int:
        """Number of total orders that contain this one; the order polytope has this number / n! as its volume."""
        ways = {0: 1}
        for u in self.upsets(limit)[1:]:
            # The point added last is a minimal one of the up-set.
            ways[u] = sum(ways[u ^ 1 << v] for v in points(u) if not self.below[v] & u)
        return ways[(1 << self.n) - 1]

    def dual(self) -> Poset:
        """The opposite order."""
        return Poset(self.n, [(j, i) for i, j in self.relations()])

    def relabel(self, places: Sequence[int]) -> Poset:
        """Point i becomes point ``places[i]``.

        Raises:
            ValueError: ``places`` is not a permutation of the points.
        """
        fits = sorted(places) == list(range(self.n))
        check(fits, "places", tuple(places), f"must be a permutation of 0 to {self.n - 1}")
        return Poset(self.n, [(places[i], places[j]) for i, j in self.relations()])

    def disjoint(self, other: Poset) -> Poset:
        """Both side by side, ``other``'s points after ours: f(x, y) = f_P(x) + f_Q(y)."""
        return Poset.antichain(2).substitute([self, other])

    def ordinal(self, other: Poset) -> Poset:
        """``other`` above all of ours: f(x, y) = max(f_Q(y), Σy + f_P(x))."""
        return Poset.chain(2).substitute([self, other])

    def substitute(self, inner: Sequence[Poset]) -> Poset:
        """Put a poset in the place of every point: points of different ones compare as their places do.

        Raises:
            ValueError: there is not one for each point.
        """
        check(len(inner) == self.n, "inner", len(inner), f"must be {self.n} posets, one for each point")
        first = [0, *itertools.accumulate(q.n for q in inner)]
        pairs = [(first[p] + i, first[p] + j) for p, q in enumerate(inner) for i, j in q.relations()]
        for p, q in self.relations():
            blocks = (range(first[p], first[p + 1]), range(first[q], first[q + 1]))
            pairs += itertools.product(*blocks)
        return Poset(first[-1], pairs)

    def tropical_polynomial(self, limit: int = LIMIT) -> str:
        """The maximum over the up-sets, written out."""
        return "max({})".format(", ".join("+".join(map(self._letter, points(u))) or "0" for u in self.upsets(limit)))

    @cached_property
    def formula(self) -> Formula:
        """How to compute the maximum without listing the up-sets; see :class:`Formula`."""
        return Formula(self)

    @cached_property
    def canonical(self) -> tuple[int, ...]:
        """Equal for two posets exactly where they are isomorphic. Meant for few points, as permutations are tried.

        Raises:
            ValueError: there are more than 65,536 to try: nine points that look alike, for instance.
        """
        classes: dict[tuple[int, int], list[int]] = {}
        for i in range(self.n):
            classes.setdefault((self.above[i].bit_count(), self.below[i].bit_count()), []).append(i)
        groups = [classes[k] for k in sorted(classes)]
        orders = math.prod(math.factorial(len(g)) for g in groups)
        check(orders <= LIMIT, "poset", self, f"{orders} orders of alike points are too many to try; at most {LIMIT}")
        best: tuple[int, ...] | None = None
        for order in itertools.product(*(itertools.permutations(g) for g in groups)):
            flat = list(itertools.chain(*order))
            place = {v: k for k, v in enumerate(flat)}
            code = tuple(sum(1 << place[j] for j in points(self.above[v])) for v in flat)
            best = code if best is None or code < best else best
        assert best is not None
        return best

    def _letter(self, i: int) -> str:
        return chr(ord("a") + i) if self.n <= 26 else f"x{i}"

    def __eq__(self, other: object) -> bool:
        """Same points and same order (not only isomorphic)."""
        return isinstance(other, Poset) and self.above == other.above

    def __hash__(self) -> int:
        """Of the relation."""
        return hash(self.above)

    def __repr__(self) -> str:
        """The covering relations in letters."""
        pairs = [f"{self._letter(i)}<{self._letter(j)}" for i, j in self.relations()]
        shown = " ".join(pairs if len(pairs) <= 24 else [*pairs[:24], "…"]) or "antichain"
        return f"Poset({self.n}, {shown})"


class Formula:
    """The maximum over the up-sets as a short formula instead of a list.

    ``steps[mask]`` says how the maximum f over the sub-poset on ``mask`` follows from smaller ones:

    - ("point", i): max(0, x_i);
    - ("sum", masks): parts that are not comparable: Σ f;
    - ("stack", masks), bottom first: each part Q above all before it, P: max(f_Q, Σ_Q x + f_P), or max(0, q + f_P)
      for a single point q;
    - ("choose", without, forced, with): by one point, out of the up-set (and all below it with it) or in it (and all
      above it): max(f_without, Σ_forced x + f_with).

    A series–parallel poset needs no "choose", hence at most two steps a point. Of equal alternatives the first is
    meant to win: what is then chosen is the smallest maximising up-set, which is the official code's choice too.

    Raises:
        ValueError: more than ``limit`` steps are needed.
    """

    def __init__(self, poset: Poset, limit: int = LIMIT) -> None:
        self.root = (1 << poset.n) - 1
        self.steps: dict[int, tuple[Any, ...]] = {}
        comparable = [a | b for a, b in zip(poset.above, poset.below, strict=True)]
        apart = [self.root & ~c & ~(1 << i) for i, c in enumerate(comparable)]
        waiting = [self.root]
        while waiting:
            mask = waiting.pop()
            if mask == 0 or mask in self.steps:
                continue
            check(len(self.steps) < limit, "poset", poset, f"its formula has more than {limit} steps")
            step, parts = self._split(mask, poset, comparable, apart)
            self.steps[mask] = step
            waiting += parts
        # Smaller sets first: what a step needs is there when it is taken.
        self.order = sorted(self.steps, key=int.bit_count)

    @staticmethod
    def _split(
        mask: int, poset: Poset, comparable: list[int], apart: list[int]
    ) -> tuple[tuple[Any, ...], tuple[int, ...]]:
        if mask.bit_count() == 1:
            return ("point", mask.bit_length() - 1), ()
        parallel = _components(mask, comparable)
        if len(parallel) > 1:
            return ("sum", tuple(parallel)), tuple(parallel)
        series = _components(mask, apart)
        if len(series) > 1:
            height = {s: (poset.above[s.bit_length() - 1] & mask & ~s).bit_count() for s in series}
            stacked = tuple(sorted(series, key=lambda s: -height[s]))
            # Above others, a single point q needs no step of its own: max(0, q, q + f_P) is max(0, q + f_P).
            return ("stack", stacked), tuple(s for s in stacked if s == stacked[0] or s.bit_count() > 1)
        v = max(points(mask), key=lambda i: ((comparable[i] & mask).bit_count(), -i))
        without, forced = mask & ~(poset.below[v] | 1 << v), mask & (poset.above[v] | 1 << v)
        return ("choose", without, forced, mask & ~forced), (without, mask & ~forced)


@cache
def all_posets(n: int) -> tuple[Poset, ...]:
    """All posets on n points up to isomorphism, n ≤ 6: 1, 2, 5, 16, 63, 318.

    Example:
        >>> len(all_posets(4))
        16
    """
    check_positive("n", n)
    check(n <= 6, "n", n, "there are 2,045 posets on 7 points and far more on 8; at most 6")
    if n == 1:
        return (Poset(1),)
    found: dict[tuple[int, ...], Poset] = {}
    for poset in _extended(n):
        found.setdefault(poset.canonical, poset)
    return tuple(found[code] for code in sorted(found, key=lambda c: (sum(m.bit_count() for m in c), c)))


def _extended(n: int) -> Iterator[Poset]:
    """Every poset on n − 1 points with one more maximal point over each of its down-sets."""
    whole = (1 << n - 1) - 1
    for smaller in all_posets(n - 1):
        for upset in smaller.upsets():
            yield Poset(n, [*smaller.relations(), *((i, n - 1) for i in points(whole & ~upset))])
