"""The log of deltas follows savepoints as the rows do."""

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from django_scaledb.counters.deltas import DeltaLog

KEYS = st.sampled_from([("1",), ("2",), (None,)])


class Savepoints(RuleBasedStateMachine):
    """A DeltaLog beside a stack of plain dictionaries, each a full copy of the one below."""

    def __init__(self):
        super().__init__()
        self.log = DeltaLog()
        self.stack = [(None, {}, {})]
        self.names = 0

    @property
    def totals(self):
        return self.stack[-1][1]

    @rule(key=KEYS, amount=st.integers(-3, 3))
    def add(self, key, amount):
        self.log.add("c", key, [amount, 2 * amount])
        self.totals[key] = self.totals.get(key, 0) + amount

    @rule(pk=st.sampled_from("ab"), value=st.sampled_from(["x", "y", None]))
    def remember(self, pk, value):
        self.log.remember(("t", "c"), pk, value)
        self.stack[-1][2].setdefault(pk, value)

    @rule()
    def savepoint(self):
        self.names += 1
        self.log.savepoint(str(self.names))
        self.stack.append((str(self.names), dict(self.totals), dict(self.stack[-1][2])))

    @precondition(lambda self: len(self.stack) > 1)
    @rule(data=st.data())
    def rollback_to(self, data):
        at = data.draw(st.integers(1, len(self.stack) - 1))
        name = self.stack[at][0]
        self.log.rollback_to(name)
        del self.stack[at:]
        self.stack.append((name, dict(self.totals), dict(self.stack[-1][2])))

    @precondition(lambda self: len(self.stack) > 1)
    @rule(data=st.data())
    def release(self, data):
        at = data.draw(st.integers(1, len(self.stack) - 1))
        self.log.release(self.stack[at][0])
        _, totals, former = self.stack[-1]
        del self.stack[at:]
        self.stack[-1] = (self.stack[-1][0], totals, former)

    @rule()
    def spend(self):
        self.log.spend()
        self.stack = [(name, {}, {}) for name, _, _ in self.stack]

    @invariant()
    def pending_is_what_the_rows_came_to(self):
        expected = {key: [n, 2 * n] for key, n in self.totals.items() if n}
        assert self.log.pending("c") == expected
        assert self.log.former(("t", "c")) == self.stack[-1][2]
        if expected:
            assert self.log.labels() == ["c"]


TestSavepoints = Savepoints.TestCase
TestSavepoints.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


@given(st.lists(st.tuples(KEYS, st.integers(-5, 5))))
def test_sums_do_not_depend_on_the_order(entries):
    forward, backward = DeltaLog(), DeltaLog()
    for key, amount in entries:
        forward.add("c", key, [amount])
    for key, amount in reversed(entries):
        backward.add("c", key, [amount])
    assert forward.pending("c") == backward.pending("c")


def test_an_empty_log_is_false():
    log = DeltaLog()
    log.add("c", ("1",), [0, 0])
    assert not log
    log.remember(("t", "c"), "1", None)
    assert log
    log.clear()
    assert not log


def test_what_a_savepoint_forgets_stays_forgotten():
    log = DeltaLog()
    log.add("c", ("1",), [1])
    log.savepoint("s")
    log.add("c", ("1",), [5])
    log.remember(("t", "v"), "7", "a")
    log.rollback_to("s")
    assert log.pending("c") == {("1",): [1]}
    assert log.former(("t", "v")) == {}
    log.add("c", ("1",), [2])
    log.release("s")
    assert log.pending("c") == {("1",): [3]}
