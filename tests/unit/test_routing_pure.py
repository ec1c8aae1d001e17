"""Tokens, positions, what a statement may do, and decisions: no database."""

from __future__ import annotations

import json
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from django_scaledb.routing import monitor, policy
from django_scaledb.routing.config import SetConfig, build
from django_scaledb.routing.policy import Candidate, Facts, Mode, Reason, Transaction, Verdict
from django_scaledb.routing.replicas import ReplicaSet
from django_scaledb.routing.statements import Kind, classify
from django_scaledb.routing.token import (
    UNREACHABLE,
    Layout,
    Position,
    decode,
    encode,
    format_lsn,
    later,
    parse_lsn,
    reachable,
)

positions = st.builds(
    Position, st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
)


@given(st.lists(positions, max_size=5))
def test_a_token_survives_json_and_says_the_same(found: list[Position]) -> None:
    assert sorted(found) == decode(json.loads(json.dumps(encode(found))))


@given(st.one_of(st.none(), st.text(), st.binary(), st.integers(), st.lists(st.text())))
def test_what_is_no_token_has_no_position(token: object) -> None:
    assert decode(token) == [] or isinstance(token, str)


@given(st.integers(0, 2**64 - 1))
def test_lsn_text(lsn: int) -> None:
    assert parse_lsn(format_lsn(lsn)) == lsn


SEGMENT = 16 << 20


@pytest.mark.parametrize(
    ("lsn", "expected"),
    [
        (8192 * 5 + 24, 8192 * 5),  # behind a page's header
        (8192 * 5 + 40, 8192 * 5 + 40),  # a record's end like any other
        (SEGMENT * 3 + 40, SEGMENT * 3),  # behind a segment's header
        (SEGMENT * 3 + 24, SEGMENT * 3 + 24),  # within it: no record ends there, and none is claimed to
        (8192 * 5, 8192 * 5),
        (8192 * 5 + 1000, 8192 * 5 + 1000),
    ],
)
def test_a_position_behind_a_page_header_is_the_page_start(lsn: int, expected: int) -> None:
    assert reachable(lsn) == expected


def test_the_layout_is_the_servers() -> None:
    small = Layout(page=8192, segment=1 << 20)
    assert reachable((1 << 20) + 40, small) == 1 << 20
    assert reachable((1 << 20) + 40) == (1 << 20) + 40


def test_a_newer_timeline_is_later() -> None:
    assert later(Position(1, 1, 500), Position(1, 2, 100)).timeline == 2
    assert later(Position(1, 2, 100), Position(1, 1, 500)).timeline == 2
    assert later(None, Position(1, 1, 1)) == Position(1, 1, 1)


@pytest.mark.parametrize(
    ("sql", "kind"),
    [
        ('SELECT "a"."id" FROM "a" WHERE "a"."id" IN (1, 2) AND ("a"."x" = %s OR "a"."y" = %s)', Kind.READ),
        ('SELECT COUNT(*) AS "__count" FROM (SELECT DISTINCT "a"."b" AS "c" FROM "a") subquery', Kind.READ),
        ("(SELECT 1) UNION (SELECT 2)", Kind.READ),
        ("  -- a note\n/* and */ SELECT 'f(x)', 'it''s; fine'", Kind.READ),
        ("SELECT * FROM a FOR UPDATE", Kind.READ),
        ('SELECT "a"."update", 1 FROM "a"', Kind.READ),
        ("SELECT f()", Kind.MAYBE),
        ("SELECT public.f (1)", Kind.MAYBE),
        ('SELECT "F"(1)', Kind.MAYBE),
        ("SELECT nextval('s')", Kind.MAYBE),
        ("WITH x AS (INSERT INTO a VALUES (1) RETURNING 1) SELECT * FROM x", Kind.MAYBE),
        ("SELECT 1 INTO t", Kind.MAYBE),
        ("SELECT /* ' */ f() /* ' */", Kind.MAYBE),
        ("SELECT $q$ ' $q$, f(), $q$ ' $q$", Kind.UNKNOWN),
        (r"SELECT E'\'', f(), ''", Kind.UNKNOWN),
        ("insert into a values (%s)", Kind.WRITE),
        ("UPDATE a SET b = 'x;y'", Kind.WRITE),
        ("DELETE FROM a;", Kind.WRITE),
        ("MERGE INTO a USING b ON true WHEN MATCHED THEN DELETE", Kind.WRITE),
        ("SELECT 1; DELETE FROM a", Kind.UNKNOWN),
        ("DO $$ BEGIN END $$", Kind.UNKNOWN),
        ("CALL p()", Kind.UNKNOWN),
        ("COPY a FROM STDIN", Kind.UNKNOWN),
        ("COPY (DELETE FROM a RETURNING *) TO STDOUT", Kind.UNKNOWN),
        ("COPY a TO STDOUT", Kind.NEUTRAL),
        ("CREATE TABLE a (n int)", Kind.UNKNOWN),
        ("TRUNCATE a", Kind.UNKNOWN),
        ("EXPLAIN ANALYZE DELETE FROM a", Kind.UNKNOWN),
        ("EXPLAIN SELECT 1", Kind.NEUTRAL),
        ("EXECUTE p", Kind.UNKNOWN),
        ("BEGIN", Kind.CONTROL),
        ("PREPARE TRANSACTION 'x'", Kind.CONTROL),
        ("SET search_path = x", Kind.NEUTRAL),
        ("", Kind.NEUTRAL),
    ],
)
def test_what_a_statement_may_do(sql: str, kind: Kind) -> None:
    assert classify(sql) is kind


candidates = st.lists(
    st.builds(
        Candidate,
        alias=st.sampled_from(["a", "b", "c"]),
        floor=st.integers(0, 100),
        weight=st.floats(0.1, 10),
        latency=st.floats(0, 1),
    ),
    max_size=3,
)
facts = st.builds(
    Facts,
    mode=st.one_of(st.none(), st.sampled_from(Mode)),
    primary_only=st.one_of(st.none(), st.sampled_from([Reason.MODEL, Reason.MIGRATION])),
    transaction=st.sampled_from(Transaction),
    required=st.one_of(st.none(), st.integers(0, 100)),
    candidates=candidates,
)


@given(facts)
def test_no_decision_allows_a_stale_read_unless_it_was_asked_for(given_facts: Facts) -> None:
    decision = policy.decide(given_facts)
    for candidate in decision.candidates:
        assert candidate in given_facts.candidates
        assert given_facts.mode is not Mode.PRIMARY
        if given_facts.mode is not Mode.STALE_REPLICA:
            assert given_facts.required is None or candidate.floor >= given_facts.required
            assert given_facts.transaction is not Transaction.WRITTEN
        if given_facts.mode is None:
            assert given_facts.primary_only is None
            assert given_facts.transaction is Transaction.NONE


@given(facts)
def test_whoever_may_serve_is_let_serve(given_facts: Facts) -> None:
    plain = given_facts.mode is None and given_facts.primary_only is None
    if plain and given_facts.transaction is Transaction.NONE:
        fresh = [
            c
            for c in given_facts.candidates
            if given_facts.required is None or c.floor >= given_facts.required
        ]
        assert list(policy.decide(given_facts).candidates) == fresh


def test_equals_share_by_weight_and_a_slow_one_is_spared() -> None:
    rng = random.Random(1)
    equal = [Candidate("a", 0, 1, 0.001), Candidate("b", 0, 3, 0.0011)]
    share = sum(policy.choose(equal, rng) == "b" for _ in range(4000)) / 4000
    assert 0.7 < share < 0.8
    slow = [Candidate("a", 0, 1, 0.001), Candidate("b", 0, 1, 0.1)]
    share = sum(policy.choose(slow, rng) == "b" for _ in range(4000)) / 4000
    assert 0.2 < share < 0.3
    assert len(policy.deck(equal, rng)) == policy.DECK_SIZE
    assert policy.deck([], rng) == ()


@given(
    st.lists(st.tuples(st.floats(0.01, 5), st.integers(0, 3)), min_size=1, max_size=60), st.integers(0, 100)
)
def test_lag_is_never_less_than_the_age_of_what_is_missing(steps: list[tuple[float, int]], at: int) -> None:
    history, now, lsn, samples = policy.PrimaryHistory(window=1000), 0.0, 10, []
    for wait, growth in steps:
        now += wait
        lsn += growth
        history.add(now, lsn)
        samples.append((now, lsn))
    lag = history.lag(at, now)
    missing = [when for when, position in samples if position > at]
    if lag is None:
        assert all(position > at for _, position in samples)
    else:
        assert lag >= (now - missing[0] if missing else 0)
        assert missing or lag == 0


def test_a_long_history_is_forgotten_but_for_one_sample() -> None:
    history = policy.PrimaryHistory(window=10)
    for second in range(100):
        history.add(second, second)
    assert history.lag(80, 99) is None or history.lag(80, 99) >= 19
    assert history.lag(95, 99) == 4
    history.add(100, 5)  # another log
    assert history.lag(95, 100) == 0


def test_a_replica_that_says_nothing_of_its_lag_is_judged_by_what_it_lacks() -> None:
    members = ReplicaSet(SetConfig("default", {"a": 1.0}, max_lag=10), lambda _: None)
    replica = members.replicas["a"]

    def look(lsn: int, age: float | None) -> str:
        members.replica_at(replica, lsn, own_lag=0, age=age, latency=0.001)
        return replica.why_out

    assert not look(100, 5000), "the primary was not seen yet, and may be idle"
    members.learn_identity(1, 1, Layout())
    members.primary_at(200, time.monotonic(), {})
    assert "behind" in look(100, 5000)
    assert "not caught up" in look(100, None)
    assert not look(200, 5000), "the primary is idle"
    members.primary_at(300, time.monotonic(), {})
    assert not look(290, 3)
    members.learn_identity(1, 2, Layout())
    members.primary_at(400, time.monotonic(), {})
    assert "not caught up" in look(390, 0.1), "perhaps it follows the old timeline"
    assert not look(400, 0.1)
    long_ago = time.monotonic() - 100
    members.history.clear()
    members.primary_at(500, long_ago, {})
    members.primary_at(600, time.monotonic(), {})
    assert "behind" in look(500, 0.1)


def test_verdicts() -> None:
    assert policy.verdict(None, 1, 1) is Verdict.NOTHING
    assert policy.verdict(Position(2, 1, 5), 1, 1) is Verdict.NOTHING
    assert policy.verdict(Position(1, 1, 5), 1, 2) is Verdict.NOTHING
    assert policy.verdict(Position(1, 2, 5), 1, 2) is Verdict.COMPARE
    assert policy.verdict(Position(1, 3, 5), 1, 2) is Verdict.AHEAD


def test_models_find_their_set() -> None:
    config = build(
        {
            "PRIMARY": "default",
            "REPLICAS": ["a", "b"],
            "MORE_PRIMARIES": {"orders": {"REPLICAS": {"c": 2}, "MODELS": ["orders", "shop.Order"]}},
            "READ_FROM_PRIMARY": ["axes", "shop.Basket"],
            "MAX_LAG": 10,
            "POLL_INTERVAL": 0.25,
            "READ_DEADLINE": 1,
        }
    )
    assert config.set_of("shop", "order").primary == "orders"
    assert config.set_of("shop", "basket").primary == "default"
    assert config.set_of("orders", "line").replicas == {"c": 2.0}
    assert config.is_from_primary("sessions", "session")
    assert config.is_from_primary("shop", "basket")
    assert not config.is_from_primary("shop", "order")


def test_a_replica_is_asked_often_only_while_somebody_waits_and_it_lacks_something() -> None:
    members = ReplicaSet(SetConfig("default", {"replica1": 1.0}), lambda _: None)
    replica = members.replicas["replica1"]
    watch = monitor._ReplicaWatch(members, replica, monitor._PrimaryWatch(members))
    members.wait_for(100)
    assert watch._hurry() is None, "there is no server to ask"
    watch.connection = object()  # type: ignore[assignment]

    steps = [watch._hurry() for _ in range(40)]
    assert steps[:3] == [0, 0.001, 0.0015]
    assert steps[-1] == 0.01, "a hundred times a second at most"
    assert watch.hurries

    replica.floor = 100
    assert watch._hurry() is None
    members.wait_for(200)
    members.wanted_at -= 1
    assert watch._hurry() is None, "who waited has gone"
    members.wait_for(UNREACHABLE)
    assert watch._hurry() is None
