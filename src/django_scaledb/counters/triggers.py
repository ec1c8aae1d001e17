"""Mechanism "trigger": the functions and triggers that count whatever writes the source (pure).

Statement-level triggers aggregate their transition tables and book the result in a setting that is
local to the transaction (``set_config(.., true)``), so that a ROLLBACK TO SAVEPOINT takes it back as
it does the rows. A deferred constraint trigger, armed by the first row a transaction writes, folds
what is booked right before COMMIT: counters by name, rows by key. A hot row is locked for no longer
than that, and two transactions never wait for each other because of a counter.

PostgreSQL fires the triggers of the table that a statement names: root and every partition carry
the statement triggers. The constraint trigger is a row trigger, which PostgreSQL itself clones to
partitions and removes again on detach (14 and later). A DELETE has none, because per row it costs as much as the
row's end itself: there the statement trigger arms COMMIT, by a row of its own in an unlogged table.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from django_scaledb.counters.definition import Definition, Hop, literal, quote
from django_scaledb.counters.statements import (
    OWN_SNAPSHOT,
    fold,
    fold_values,
    pending_relation,
    raw_groups,
    unchanged,
)

ARM = "scaledb_counted_arm"
ARMS = "scaledb_counted_arms"
BODY = "$scaledb$"
COMPACT_BYTES = 65536


def prefix(definition: Definition) -> str:
    """What the names of this counter's functions and triggers begin with."""
    return f"scaledb_counted_{definition.identity}"


def _function(name: str, body: str) -> str:
    # SECURITY DEFINER: who may write the source need not be able to write its counters.
    return (
        f"CREATE OR REPLACE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql "
        f"SECURITY DEFINER SET search_path FROM CURRENT AS {BODY}\n{body}\n{BODY}"
    )


def _inner(name: str, body: str, arguments: str = "") -> str:
    """A function that only ours call: with their rights and their search_path, which cost time to set."""
    return (
        f"CREATE OR REPLACE FUNCTION {name}({arguments}) RETURNS boolean LANGUAGE plpgsql AS "
        f"{BODY}\n{body}\n{BODY}"
    )


# -- what all counters share


def shared_functions() -> list[str]:
    """Booking, and the trigger function that folds at COMMIT."""
    compacted = (
        "SELECT string_agg(jsonb_build_array(s.k, s.t)::text, ',') FROM (SELECT r.k, "
        "jsonb_agg(r.v ORDER BY r.i) AS t FROM (SELECT e -> 0 AS k, x.i, SUM(x.v::numeric)::text AS v "
        "FROM jsonb_array_elements(('[' || booked || ']')::jsonb) e, "
        "jsonb_array_elements_text(e -> 1) WITH ORDINALITY x(v, i) GROUP BY 1, 2) r GROUP BY r.k) s"
    )
    # Assignments, where PERFORM would start the executor for each.
    book = f"""\
DECLARE
    setting text := 'scaledb.pending_' || counter;
    booked text := current_setting(setting, true);
BEGIN
    IF booked IS NULL OR booked = '' THEN
        booked := set_config('scaledb.touched', coalesce(current_setting('scaledb.touched', true), '') || counter || ',', true);
        booked := added;
    ELSE
        booked := booked || ',' || added;
        -- A transaction of many statements on few keys keeps few entries.
        IF length(booked) > greatest({COMPACT_BYTES}, 2 * coalesce(nullif(current_setting('scaledb.size_' || counter, true), ''), '0')::int) THEN
            {compacted} INTO booked;
            PERFORM set_config('scaledb.size_' || counter, length(booked)::text, true);
        END IF;
    END IF;
    booked := set_config(setting, booked, true);
    -- No event waits for COMMIT (SET CONSTRAINTS ALL IMMEDIATE, TRUNCATE): nobody else will fold this.
    IF current_setting('scaledb.armed', true) IS DISTINCT FROM '1' THEN
        RETURN scaledb_counted_fold();
    END IF;
    RETURN true;
END"""
    at_commit = "DECLARE\n    done boolean := scaledb_counted_fold();\nBEGIN\n    RETURN NULL;\nEND"
    # Found by its place: a scan would pass all that others have left since the last VACUUM.
    at_commit_by_row = f"""\
DECLARE
    place text := current_setting('scaledb.arms', true);
    done boolean := scaledb_counted_fold();
BEGIN
    IF place <> '' AND set_config('scaledb.arms', '', true) = '' THEN
        DELETE FROM {ARMS} WHERE ctid = place::tid;
    END IF;
    RETURN NULL;
END"""
    arm_by_row = f"""\
DECLARE
    place tid;
    done text := set_config('scaledb.armed', '1', true);
BEGIN
    INSERT INTO {ARMS} DEFAULT VALUES RETURNING ctid INTO place;
    -- With SET CONSTRAINTS ALL IMMEDIATE it has fired already.
    IF current_setting('scaledb.armed', true) = '1' THEN
        RETURN set_config('scaledb.arms', place::text, true) <> '';
    END IF;
    DELETE FROM {ARMS} WHERE ctid = place;
    RETURN false;
END"""
    return [
        _inner("scaledb_counted_book", book, "counter text, added text"),
        _function(ARM, at_commit),
        _inner("scaledb_counted_arm_by_row", arm_by_row),
        _function(f"{ARM}_row", at_commit_by_row),
    ]


_ARM_BY_ROW = """
    IF added IS NOT NULL AND current_setting('scaledb.armed', true) IS DISTINCT FROM '1' THEN
        done := scaledb_counted_arm_by_row();
    END IF;"""


def arms() -> list[str]:
    """The table whose rows arm a DELETE's COMMIT; each is gone again by the end of its transaction."""
    create = (
        f"CREATE CONSTRAINT TRIGGER {ARM} AFTER INSERT ON {ARMS} DEFERRABLE INITIALLY DEFERRED "
        f"FOR EACH ROW EXECUTE FUNCTION {ARM}_row()"
    )
    return [f"CREATE UNLOGGED TABLE IF NOT EXISTS {ARMS} ()", _unless_there(ARMS, create)]


def dispatcher() -> str:
    """Makes ``scaledb_counted_fold()``, which calls the folds of what is booked, each counter's in its turn.

    It names the counters that there are: a call by name would be planned anew at each COMMIT.
    """
    body = """\
DECLARE
    done boolean := set_config('scaledb.armed', '', true) = '1';
    touched text := current_setting('scaledb.touched', true);
BEGIN
    IF touched IS NULL OR touched = '' THEN
        RETURN false;
    END IF;
    IF set_config('scaledb.touched', '', true) = '' THEN
        @calls@
    END IF;
    RETURN true;
END"""
    call = "IF strpos(touched, %L) > 0 THEN done := scaledb_counted_%s_fold(); END IF;"
    made = _inner("scaledb_counted_fold", body).replace(BODY, "$fold$")
    return f"""\
DO {BODY}
DECLARE
    calls text;
BEGIN
    SELECT string_agg(format({literal(call)}, p.identity || ',', p.identity), ' ' ORDER BY p.identity) INTO calls
        FROM (SELECT substr(proname, 17, 12) AS identity FROM pg_proc WHERE pronamespace = current_schema()::regnamespace
        AND proname ~ '^scaledb_counted_[0-9a-f]{{12}}_fold$') p;
    EXECUTE replace({literal(made)}, '@calls@', coalesce(calls, 'NULL;'));
END{BODY}"""


# -- one counter's functions


def _entries(definition: Definition, groups: str) -> str:
    """``SELECT string_agg(..)`` of groups as JSON, without those that change nothing."""
    keys = ", ".join(f"c.k{i}::text" for i in range(len(definition.keys)))
    totals = ", ".join(f"c.t{i}::text" for i in range(len(definition.totals)))
    changed = " OR ".join(f"c.t{i} <> 0" for i in range(len(definition.totals)))
    return (
        f"SELECT string_agg(jsonb_build_array(jsonb_build_array({keys}), jsonb_build_array({totals}))::text, ',') "
        f"FROM ({groups}) c WHERE {changed}"
    )


def _signed(definition: Definition, sign: str, groups: str) -> str:
    keys = [f"s.k{i}" for i in range(len(definition.keys))]
    totals = [f"{sign}s.t{i} AS t{i}" for i in range(len(definition.totals))]
    return f"SELECT {', '.join(keys + totals)} FROM ({groups}) s"


def _net(definition: Definition) -> str:
    """New rows less old ones, so that an update that changes nothing here books nothing."""
    keys = [f"b.k{i}" for i in range(len(definition.keys))]
    totals = [f"SUM(b.t{i}) AS t{i}" for i in range(len(definition.totals))]
    new = raw_groups(definition, "scaledb_new")
    old = _signed(definition, "-", raw_groups(definition, "scaledb_old"))
    grouping = f" GROUP BY {', '.join(keys)}" if keys else ""
    return f"SELECT {', '.join(keys + totals)} FROM ({new} UNION ALL {old}) b{grouping}"


def _booking(definition: Definition, groups: str, *, arming: str = "") -> str:
    return f"""\
DECLARE
    added text;
    done boolean;
BEGIN
    {_entries(definition, groups)} INTO added;{arming}
    IF added IS NOT NULL AND scaledb_counted_book('{definition.identity}', added) THEN
        RETURN NULL;
    END IF;
    RETURN NULL;
END"""


def _truncating(definition: Definition) -> str:
    query = _entries(definition, _signed(definition, "-", raw_groups(definition, "@relation@")))
    return f"""\
DECLARE
    added text;
BEGIN
    -- A partitioned table has no rows of its own; its partitions fire for theirs.
    IF (SELECT c.relkind FROM pg_class c WHERE c.oid = TG_RELID) = 'p' THEN
        RETURN NULL;
    END IF;
    EXECUTE replace({literal(query)}, '@relation@', TG_RELID::regclass::text) INTO added;
    IF added IS NOT NULL THEN
        PERFORM scaledb_counted_book('{definition.identity}', added);
    END IF;
    RETURN NULL;
END"""


def _former_setting(definition: Definition, number: int) -> str:
    return f"scaledb.former_{definition.identity}_{number}"


def _remembering(definition: Definition, number: int, hop: Hop, *, updated: bool) -> str:
    pk, value = quote(hop.pk), quote(hop.value)
    rows = "scaledb_old o"
    if updated:
        rows += f" LEFT JOIN scaledb_new n ON n.{pk} = o.{pk} WHERE n.{pk} IS NULL OR n.{value} IS DISTINCT FROM o.{value}"
    setting = _former_setting(definition, number)
    refusal = ""
    if updated or not hop.is_constrained:
        # A snapshot older than what others have added below would leave it out.
        text = literal(
            f"cannot change {hop.table}.{hop.value} here: counters follow it, and rows that others have added below "
            "since the transaction began would be left out"
        )
        refusal = f"""
        IF {OWN_SNAPSHOT} THEN
            RAISE EXCEPTION USING ERRCODE = 'feature_not_supported', MESSAGE = {text},
                HINT = 'Begin it with SET TRANSACTION ISOLATION LEVEL READ COMMITTED.';
        END IF;"""
    return f"""\
DECLARE
    added text;
    held text := current_setting('{setting}', true);
    done boolean;
BEGIN
    SELECT string_agg(jsonb_build_array(o.{pk}::text, o.{value}::text)::text, ',') INTO added FROM {rows};{"" if updated else _ARM_BY_ROW}
    IF added IS NOT NULL THEN{refusal}
        PERFORM set_config('{setting}', CASE WHEN held IS NULL OR held = '' THEN added ELSE held || ',' || added END, true);
        PERFORM set_config('scaledb.touched', coalesce(current_setting('scaledb.touched', true), '') || '{definition.identity},', true);
        IF current_setting('scaledb.armed', true) IS DISTINCT FROM '1' THEN
            PERFORM scaledb_counted_fold();
        END IF;
    END IF;
    RETURN NULL;
END"""


def booked(definition: Definition, held: str) -> str:
    """The relation of raw groups in the entries `held` (SQL for the setting's text)."""
    return _booked(definition, f"('[' || {held} || ']')::jsonb")


def _booked(definition: Definition, entries: str) -> str:
    keys = [f"e -> 0 ->> {i} AS k{i}" for i in range(len(definition.keys))]
    totals = [f"(e -> 1 ->> {i})::numeric AS t{i}" for i in range(len(definition.totals))]
    source = f"(SELECT {', '.join(keys + totals)} FROM jsonb_array_elements({entries}) e) p"
    return pending_relation(definition, source)


def _first_entry(definition: Definition) -> tuple[list[str], list[str]]:
    """The key's values and the amounts of the only entry."""
    return (
        [f"scaledb_entries #>> '{{0,0,{i}}}'" for i in range(len(definition.keys))],
        [f"(scaledb_entries #>> '{{0,1,{i}}}')::numeric" for i in range(len(definition.totals))],
    )


def formerly(hop: Hop, held: str) -> str:
    """SELECT of ``(pk, v)``: what a step's parents first said, out of the entries `held`."""
    return (
        f"SELECT DISTINCT ON (1) (f.e ->> 0)::{hop.pk_type} AS pk, (f.e ->> 1)::{hop.value_type} AS v "
        f"FROM jsonb_array_elements(('[' || {held} || ']')::jsonb) WITH ORDINALITY f(e, i) ORDER BY 1, f.i"
    )


def settings(definition: Definition) -> list[str]:
    """The names of the settings that hold this counter's entries: pending ones, then each step's."""
    return [
        f"scaledb.pending_{definition.identity}",
        *(_former_setting(definition, i) for i in range(len(definition.hops))),
    ]


def _folding(definition: Definition) -> str:
    pending = booked(definition, "scaledb_held")
    if not definition.hops:
        pending = _booked(definition, "scaledb_entries")
    identity = definition.identity
    if not definition.hops:
        return f"""\
DECLARE
    scaledb_held text := current_setting('scaledb.pending_{identity}', true);
    scaledb_entries jsonb;
BEGIN
    IF scaledb_held IS NULL OR scaledb_held = '' THEN
        RETURN false;
    END IF;
    scaledb_entries := ('[' || scaledb_held || ']')::jsonb;
    scaledb_held := set_config('scaledb.pending_{identity}', '', true);
    IF jsonb_array_length(scaledb_entries) = 1 THEN
        {fold_values(definition, *_first_entry(definition))};
        RETURN true;
    END IF;
    scaledb_held := set_config('scaledb.size_{identity}', '', true);
    {fold(definition, pending)};
    RETURN true;
END"""
    begin = f"""\
BEGIN
    PERFORM set_config('scaledb.pending_{identity}', '', true), set_config('scaledb.size_{identity}', '', true);"""
    names = [
        (_former_setting(definition, i), f"scaledb_former{i}", hop) for i, hop in enumerate(definition.hops)
    ]
    declared = "\n".join(
        f"    {name} text := coalesce(current_setting('{s}', true), '');" for s, name, _ in names
    )
    cleared = ", ".join(f"set_config('{s}', '', true)" for s, _, _ in names)
    checks = "; ".join(query.replace("SELECT", "PERFORM", 1) for query in unchanged(definition, pending))
    former = {(hop.table, hop.value): formerly(hop, name) for _, name, hop in names}
    nothing = " AND ".join(f"{name} = ''" for _, name, _ in names)
    return f"""\
DECLARE
    scaledb_held text := coalesce(current_setting('scaledb.pending_{identity}', true), '');
{declared}
{begin}
    PERFORM {cleared};
    -- A parent's move must see every row below it, and a row its parent's move.
    IF {nothing} THEN
        IF scaledb_held = '' THEN
            RETURN false;
        END IF;
        PERFORM pg_advisory_xact_lock_shared({definition.lock_id});
    ELSE
        PERFORM pg_advisory_xact_lock({definition.lock_id});
    END IF;
    IF {OWN_SNAPSHOT} THEN
        {checks};
    END IF;
    IF {nothing} THEN
        {fold(definition, pending)};
    ELSE
        {fold(definition, pending, former)};
    END IF;
    RETURN true;
END"""


def functions(definition: Definition) -> list[str]:
    """CREATE OR REPLACE FUNCTION for everything that this counter's triggers run."""
    name = prefix(definition)
    found = [
        _inner(f"{name}_fold", _folding(definition)),
        _function(f"{name}_insert", _booking(definition, raw_groups(definition, "scaledb_new"))),
        _function(f"{name}_update", _booking(definition, _net(definition))),
        _function(
            f"{name}_delete",
            _booking(
                definition,
                _signed(definition, "-", raw_groups(definition, "scaledb_old")),
                arming=_ARM_BY_ROW,
            ),
        ),
        _function(f"{name}_truncate", _truncating(definition)),
    ]
    for i, hop in enumerate(definition.hops):
        found.append(_function(f"{name}_h{i}_update", _remembering(definition, i, hop, updated=True)))
        found.append(_function(f"{name}_h{i}_delete", _remembering(definition, i, hop, updated=False)))
    return found


def fingerprint(definition: Definition) -> str:
    """Sixteen hex digits that change with anything the triggers do."""
    text = "\n".join([*shared_functions(), dispatcher(), *functions(definition), *arm(definition, "t")])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def comment(definition: Definition) -> str:
    """What stands in the COMMENT of the counter's fold function: whose it is, and its fingerprint."""
    return f"django_scaledb counter {definition.label} {fingerprint(definition)}"


# -- triggers

_EVENTS = (
    ("insert", "AFTER INSERT", "REFERENCING NEW TABLE AS scaledb_new "),
    ("update", "AFTER UPDATE", "REFERENCING OLD TABLE AS scaledb_old NEW TABLE AS scaledb_new "),
    ("delete", "AFTER DELETE", "REFERENCING OLD TABLE AS scaledb_old "),
    ("truncate", "BEFORE TRUNCATE", ""),
)


def arm(definition: Definition, table: str) -> list[str]:
    """Statement triggers for `table` (SQL, quoted): a root, or a partition that is being made.

    CREATE OR REPLACE (PostgreSQL 14): running it again changes nothing. Takes SHARE ROW EXCLUSIVE.
    """
    name = prefix(definition)
    return [
        f"CREATE OR REPLACE TRIGGER {name}_{event} {when} ON {table} {tables}"
        f"FOR EACH STATEMENT EXECUTE FUNCTION {name}_{event}()"
        for event, when, tables in _EVENTS
    ]


def disarm(definition: Definition, table: str) -> list[str]:
    """Take the statement triggers off `table` again (a partition that has left the source)."""
    return [f"DROP TRIGGER IF EXISTS {prefix(definition)}_{event} ON {table}" for event, _, _ in _EVENTS]


def _arm_hop(definition: Definition, number: int, hop: Hop) -> Iterator[str]:
    name = prefix(definition)
    for event, when, tables in _EVENTS[1:3]:
        yield (
            f"CREATE OR REPLACE TRIGGER {name}_h{number}_{event} {when} ON {quote(hop.table)} {tables}"
            f"FOR EACH STATEMENT EXECUTE FUNCTION {name}_h{number}_{event}()"
        )


def _at_commit(table: str) -> str:
    """The constraint trigger, once per table whatever the number of its counters.

    Its WHEN is evaluated as each row is written: true for the first one, which arms COMMIT.
    """
    create = (
        f"CREATE CONSTRAINT TRIGGER {ARM} AFTER INSERT OR UPDATE ON {quote(table)} "
        "DEFERRABLE INITIALLY DEFERRED FOR EACH ROW WHEN (CASE WHEN current_setting('scaledb.armed', true) = '1' "
        f"THEN false ELSE set_config('scaledb.armed', '1', true) = '1' END) EXECUTE FUNCTION {ARM}()"
    )
    return _unless_there(quote(table), create)


def _unless_there(table: str, create: str) -> str:
    """CREATE CONSTRAINT TRIGGER knows no OR REPLACE."""
    return (
        f"DO {BODY}BEGIN IF NOT EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid = {literal(table)}::regclass "
        f"AND t.tgname = '{ARM}') THEN {create}; END IF; END{BODY}"
    )


def install(definition: Definition) -> list[str]:
    """Everything for one counter, on the source, its present partitions and its spans' parents."""
    statements = [*shared_functions(), *arms(), *functions(definition), dispatcher()]
    statements += arm(definition, quote(definition.source_table))
    on_each = "".join(f"EXECUTE format({literal(s)}, partition);" for s in arm(definition, "%s"))
    statements.append(
        f"DO {BODY}DECLARE partition regclass; BEGIN FOR partition IN SELECT p.relid FROM "
        f"pg_partition_tree({literal(quote(definition.source_table))}) p WHERE p.level > 0 LOOP {on_each} "
        f"END LOOP; END{BODY}"
    )
    tables = {definition.source_table: None}
    for i, hop in enumerate(definition.hops):
        statements += _arm_hop(definition, i, hop)
        tables[hop.table] = None
    statements += [_at_commit(table) for table in tables]
    statements.append(f"COMMENT ON FUNCTION {prefix(definition)}_fold() IS {literal(comment(definition))}")
    return statements


def uninstall(identity: str) -> list[str]:
    """Remove whatever carries this counter's name, wherever it is, and what nobody needs any more."""
    name = f"scaledb_counted_{identity}"
    return [
        f"""DO {BODY}
DECLARE
    item record;
BEGIN
    FOR item IN SELECT t.tgname, t.tgrelid::regclass AS relation FROM pg_trigger t
        WHERE t.tgname LIKE '{name.replace("_", chr(92) + "_")}%' AND NOT t.tgisinternal AND t.tgparentid = 0 LOOP
        EXECUTE format('DROP TRIGGER %I ON %s', item.tgname, item.relation);
        IF NOT EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid = item.relation AND t.tgname <> '{ARM}'
                AND t.tgname LIKE 'scaledb\\_counted\\_%') THEN
            EXECUTE format('DROP TRIGGER IF EXISTS {ARM} ON %s', item.relation);
        END IF;
    END LOOP;
    FOR item IN SELECT p.oid::regprocedure AS signature FROM pg_proc p
        WHERE p.proname LIKE '{name.replace("_", chr(92) + "_")}%' AND p.pronamespace = current_schema()::regnamespace LOOP
        EXECUTE format('DROP FUNCTION %s', item.signature);
    END LOOP;
END{BODY}""",
        dispatcher(),
    ]


def unarmed(definition: Definition) -> str:
    """A query for the tables that lack one of the statement triggers, or have it switched off."""
    names = ", ".join(f"'{prefix(definition)}_{event}'" for event, _, _ in _EVENTS)
    root = literal(quote(definition.source_table))
    return (
        "SELECT r.relid::regclass::text FROM (SELECT "
        f"{root}::regclass AS relid UNION SELECT p.relid FROM pg_partition_tree({root}) p) r "
        f"WHERE (SELECT count(*) FROM pg_trigger t WHERE t.tgrelid = r.relid AND t.tgname IN ({names}) "
        f"AND t.tgenabled <> 'D') < {len(_EVENTS)} ORDER BY 1"
    )
