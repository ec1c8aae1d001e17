"""What a plan of PostgreSQL says about pruning: which tables it reads, and whether conditions on the
partition key are among those that they are read with (pure).

Read are the plans of ``EXPLAIN (VERBOSE, FORMAT JSON)``. What pruning at the start of execution takes
out (``Now()`` and other stable functions) is not in them; what is only known while the query runs (a
subquery, the other side of a nested loop) leaves all partitions in.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_APPENDS = ("Append", "Merge Append")
_CONDITIONS = ("Index Cond", "Recheck Cond", "Filter", "TID Cond")
_COMPARISON = r"(?:=|<|<=|>|>=)"


@dataclass(frozen=True)
class Scan:
    """One table as a plan reads it; `reference` tells apart the mentions of a table in one query.

    `was_run` is False where the plan was executed and this table was not read after all.
    """

    schema: str
    table: str
    alias: str
    reference: int
    conditions: tuple[str, ...]
    was_run: bool


def scans(plan: Mapping[str, Any]) -> list[Scan]:
    """All tables that the plan (the ``Plan`` of EXPLAIN's answer) reads, in its order."""
    return list(_scans(plan, id(plan)))


def _scans(node: Mapping[str, Any], reference: int) -> Iterator[Scan]:
    # ModifyTable names what it writes; what it reads is below it.
    if "Relation Name" in node and node["Node Type"] != "ModifyTable":
        yield Scan(
            schema=node.get("Schema", ""),
            table=node["Relation Name"],
            alias=node.get("Alias", node["Relation Name"]),
            reference=reference,
            conditions=tuple(node[name] for name in _CONDITIONS if name in node),
            was_run=node.get("Actual Loops", 1) > 0,
        )
    for child in node.get("Plans", ()):
        partitions = node["Node Type"] in _APPENDS and child.get("Parent Relationship") == "Member"
        yield from _scans(child, reference if partitions else id(child))


def is_restricted(scan: Scan, column: str) -> bool:
    """Whether the scan has a condition on its column `column` that PostgreSQL can prune with.

    That is a comparison of the bare column with something that is not of the same row, joined to
    the rest by AND, or one in each branch of an OR. A row comparison is none.
    """
    return any(_restricts(condition, scan.alias, column) for condition in scan.conditions)


def _restricts(condition: str, alias: str, column: str) -> bool:
    condition = _unwrapped(condition)
    parts = _split(condition, " AND ")
    if len(parts) > 1:
        return any(_restricts(part, alias, column) for part in parts)
    parts = _split(condition, " OR ")
    if len(parts) > 1:
        return all(_restricts(part, alias, column) for part in parts)
    table = f"(?:{re.escape(alias)}|{re.escape(_quoted(alias))})"
    name = rf"{table}\.(?:{re.escape(column)}|{re.escape(_quoted(column))})"
    found = re.fullmatch(rf"{name} {_COMPARISON} (.*)", condition, re.S) or re.fullmatch(
        rf"(.*) {_COMPARISON} {name}", condition, re.S
    )
    return found is not None and not re.search(rf"(?<![\w.]){table}\.", found[1])


def mentions(scan: Scan, column: str) -> str | None:
    """The first condition of the scan in which the column stands, in whatever way."""
    name = re.compile(rf"(?<!\w)(?:{re.escape(column)}|{re.escape(_quoted(column))})(?!\w)")
    for condition in scan.conditions:
        for part in _split(_unwrapped(condition), " AND "):
            if name.search(part):
                return part
    return None


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _unwrapped(text: str) -> str:
    """`text` without the parentheses around the whole of it."""
    while text.startswith("(") and all(depth for _, end, depth in _tokens(text) if end < len(text)):
        text = text[1:-1]
    return text


def _split(text: str, separator: str) -> list[str]:
    """`text` at each `separator` outside of parentheses and quotes."""
    parts, begin = [], 0
    for start, _, depth in _tokens(text):
        if depth == 0 and text.startswith(separator, start):
            parts.append(text[begin:start])
            begin = start + len(separator)
    return [*parts, text[begin:]]


_TOKEN = re.compile(r"""'(?:[^']|'')*'|"(?:[^"]|"")*"|.""", re.S)


def _tokens(text: str) -> Iterator[tuple[int, int, int]]:
    """Where each token begins and ends, and how many parentheses are open behind it."""
    depth = 0
    for token in _TOKEN.finditer(text):
        depth += (token[0] in "([{") - (token[0] in ")]}")
        yield token.start(), token.end(), depth
