"""A transaction's deltas that are not applied yet, savepoint by savepoint (pure).

Keys and values are PostgreSQL's own text, so that nothing is lost or rounded on the way through
Python; amounts are `int` or `Decimal`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal

Number = int | Decimal
RawKey = tuple[str | None, ...]
HopName = tuple[str, str]
"""A span's step: the table's name and the column's."""


@dataclass
class _Layer:
    """What was written between two savepoints."""

    savepoint: str | None
    deltas: dict[str, dict[RawKey, list[Number]]] = field(default_factory=dict)
    former: dict[HopName, dict[str, str | None]] = field(default_factory=dict)

    def absorb(self, later: _Layer) -> None:
        for label, deltas in later.deltas.items():
            for key, amounts in deltas.items():
                _add(self.deltas.setdefault(label, {}), key, amounts)
        for hop, values in later.former.items():
            self.former[hop] = values | self.former.get(hop, {})


def _add(deltas: dict[RawKey, list[Number]], key: RawKey, amounts: Sequence[Number]) -> None:
    held = deltas.get(key)
    if held is None:
        deltas[key] = list(amounts)
    else:
        for i, amount in enumerate(amounts):
            held[i] += amount


class DeltaLog:
    """Deltas by counter and key, and what parents said before this transaction changed them.

    `add` and `remember` belong to the newest savepoint: `rollback_to` forgets them with it,
    `release` hands them to the one before, as PostgreSQL does with the rows.
    """

    def __init__(self) -> None:
        self._layers = [_Layer(None)]

    def __bool__(self) -> bool:
        return any(layer.deltas or layer.former for layer in self._layers)

    def add(self, label: str, key: RawKey, amounts: Sequence[Number]) -> None:
        """Add `amounts` to what is pending for `key` of the counter `label`."""
        if any(amounts):
            _add(self._layers[-1].deltas.setdefault(label, {}), key, amounts)

    def remember(self, hop: HopName, pk: str, value: str | None) -> None:
        """`value` is what row `pk` said before this transaction; the first one told stays."""
        if not any(pk in layer.former.get(hop, ()) for layer in self._layers):
            self._layers[-1].former.setdefault(hop, {})[pk] = value

    def savepoint(self, name: str) -> None:
        self._layers.append(_Layer(name))

    def rollback_to(self, name: str) -> None:
        """Forget what came after savepoint `name`; the savepoint itself stays, as in SQL."""
        if (at := self._find(name)) is not None:
            del self._layers[at:]
            self._layers.append(_Layer(name))

    def release(self, name: str) -> None:
        """Keep what came after savepoint `name`, which is no more."""
        if (at := self._find(name)) is not None:
            kept = self._layers[at:]
            del self._layers[at:]
            for layer in kept:
                self._layers[-1].absorb(layer)

    def clear(self) -> None:
        """Forget everything: the transaction is over."""
        self._layers = [_Layer(None)]

    def spend(self) -> None:
        """Forget what is pending, because it has been applied; open savepoints stay known."""
        for layer in self._layers:
            layer.deltas, layer.former = {}, {}

    def labels(self) -> list[str]:
        """The counters with something pending, in the order in which they are to be applied."""
        return sorted({label for layer in self._layers for label in layer.deltas})

    def pending(self, label: str) -> dict[RawKey, list[Number]]:
        """What is pending for one counter, over all savepoints."""
        merged: dict[RawKey, list[Number]] = {}
        for layer in self._layers:
            for key, amounts in layer.deltas.get(label, {}).items():
                _add(merged, key, amounts)
        return {key: amounts for key, amounts in merged.items() if any(amounts)}

    def former(self, hop: HopName) -> dict[str, str | None]:
        """Former values of a span's step, by primary key."""
        merged: dict[str, str | None] = {}
        for layer in reversed(self._layers):
            merged |= layer.former.get(hop, {})
        return merged

    def former_hops(self) -> Iterator[HopName]:
        yield from dict.fromkeys(hop for layer in self._layers for hop in layer.former)

    def _find(self, name: str) -> int | None:
        for at in range(len(self._layers) - 1, 0, -1):
            if self._layers[at].savepoint == name:
                return at
        return None
