"""What a statement may do to the database, from its text. Pure.

The text settles the plain cases, so that an ordinary read costs nothing. Where it does not (a function
may write), the answer is `MAYBE`, and whoever runs the statement asks PostgreSQL whether a transaction
id was assigned, which is exact.
"""

from __future__ import annotations

import re
from enum import Enum
from functools import lru_cache


class Kind(Enum):
    READ = "reads"
    MAYBE = "reads, unless a function or a WITH in it writes"
    WRITE = "writes, and may stand in a transaction block"
    UNKNOWN = "may write, and must be run as it is"
    CONTROL = "begins or ends a transaction"
    NEUTRAL = "neither reads rows nor writes any"


_LEADING = re.compile(r"(?:\s+|--[^\n]*(?:\n|$)|/\*(?:[^*]|\*(?!/))*\*/|\()*", re.S)
_WORD = re.compile(r"[a-zA-Z]+")
_NOISE = re.compile(r"--[^\n]*|/\*.*?\*/|'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"", re.S)
_UNUSUAL_LITERAL = re.compile(r"\$\w*\$|\b[eEuU]&?''")
_CALL = re.compile(r"([a-zA-Z_][\w.$]*)\s*\(")
_CALLED_BY_QUOTED_NAME = re.compile(r"(?<!\bAS )(?<!\bas )\"\s*\(")

_WRITES = frozenset(["INSERT", "UPDATE", "DELETE", "MERGE"])
_READS = frozenset(["SELECT", "VALUES", "TABLE", "WITH"])
_CONTROL = frozenset(
    ["BEGIN", "START", "COMMIT", "END", "ROLLBACK", "ABORT", "PREPARE", "SAVEPOINT", "RELEASE"]
)
_NEUTRAL = frozenset(
    ["SET", "RESET", "SHOW", "LISTEN", "UNLISTEN", "DISCARD", "DEALLOCATE", "DECLARE", "FETCH", "MOVE",
    "CLOSE",
     "CHECKPOINT", "LOAD", "LOCK"]
)  # fmt: skip
# What stands before a parenthesis in a query without being a function that anybody could have written:
# SQL's own words, its types, and PostgreSQL's functions that Django's expressions use.
_HARMLESS = frozenset(
    """
    select from where and or not in exists any all some as on using over filter within group by having order
    limit offset union intersect except distinct case when then else end values with recursive materialized
    lateral between like ilike similar is null join inner left right full outer cross natural array row
    interval at time zone partition range rows groups for of cube rollup grouping sets tablesample
    varchar char character numeric decimal timestamp timestamptz bit varbit float bpchar
    count sum avg min max coalesce nullif greatest least cast extract date_trunc date_part lower upper length
    char_length octet_length trim ltrim rtrim btrim substring substr position strpos replace concat concat_ws
    left right lpad rpad repeat reverse round floor ceil ceiling abs mod power sqrt exp ln log sign
    bool_and bool_or every array_agg string_agg json_agg jsonb_agg json_object_agg jsonb_object_agg
    jsonb_build_object json_build_object jsonb_build_array json_build_array jsonb_extract_path
    jsonb_extract_path_text jsonb_typeof jsonb_array_length to_jsonb to_json row_to_json stddev_pop
    stddev_samp var_pop var_samp corr covar_pop covar_samp regr_avgx regr_avgy regr_count regr_intercept
    regr_r2 regr_slope regr_sxx regr_sxy regr_syy row_number rank dense_rank percent_rank cume_dist ntile lag
    lead first_value last_value nth_value now statement_timestamp clock_timestamp transaction_timestamp age
    to_char to_date to_timestamp make_interval unnest generate_series array_length cardinality array_position
    to_tsvector to_tsquery plainto_tsquery phraseto_tsquery websearch_to_tsquery ts_rank ts_rank_cd
    ts_headline setweight similarity word_similarity strict_word_similarity md5 sha224 sha256 sha384 sha512
    ascii chr pg_is_in_recovery pg_backend_pid version current_setting current_database
    txid_current_if_assigned inet_server_addr inet_server_port pg_last_wal_replay_lsn
    pg_current_wal_insert_lsn pg_current_wal_lsn pg_sleep pg_relation_size pg_total_relation_size to_regclass
    isempty upper_inc lower_inc upper_inf lower_inf random gen_random_uuid width_bucket atan atan2 acos asin
    cos sin tan cot degrees radians pi collate
    """.split()  # noqa: SIM905  # a list of words
)


@lru_cache(maxsize=4096)
def classify(sql: str) -> Kind:
    """What the statement `sql` (with its placeholders, if it has any) may do.

    Several statements in one text are `UNKNOWN`.
    """
    text = sql[_LEADING.match(sql).end() :]  # type: ignore[union-attr]  # matches the empty text
    match = _WORD.match(text)
    first = match[0].upper() if match else ""
    plain = _NOISE.sub(_blank, text)
    # A literal whose end is not where it seems to be may hide anything.
    if ";" in plain.rstrip().rstrip(";") or _UNUSUAL_LITERAL.search(plain):
        return Kind.UNKNOWN
    if first in _WRITES:
        return Kind.WRITE
    if first in _READS:
        return _kind_of_query(first, plain)
    if first in _CONTROL:
        return Kind.CONTROL
    if first in _NEUTRAL or not first:
        return Kind.NEUTRAL
    if first == "EXPLAIN":
        return Kind.UNKNOWN if "ANALY" in plain.upper() else Kind.NEUTRAL
    if first == "COPY":
        return Kind.NEUTRAL if re.search(r"\bTO\b", plain, re.I) and "(" not in plain else Kind.UNKNOWN
    return Kind.UNKNOWN


def _blank(found: re.Match[str]) -> str:
    return {"'": "''", '"': '""'}.get(found[0][0], " ")


def _kind_of_query(first: str, plain: str) -> Kind:
    words = {word.upper() for word in _WORD.findall(plain)}
    if words & _WRITES - ({"UPDATE"} if first != "WITH" else set()) or "INTO" in words:
        # A column may have such a name: MAYBE costs time, never exactness.
        return Kind.MAYBE
    if _CALLED_BY_QUOTED_NAME.search(plain):
        return Kind.MAYBE
    calls = {name.lower() for name in _CALL.findall(plain)}
    return Kind.READ if calls <= _HARMLESS else Kind.MAYBE
