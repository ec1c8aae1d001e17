"""Keeping two tables the same by a trigger (pure).

The trigger runs in the writer's own transaction, so that at every commit both tables agree: what
was rolled back is on neither, and no write can be lost between copying and swapping.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from psycopg import sql

from django_scaledb.partitions.conversion.inventory import Inventory
from django_scaledb.postgres.identifiers import TableName
from django_scaledb.postgres.locks import Lock, LockMode
from django_scaledb.postgres.statements import Statement

# A row that was changed is taken out and put in again: its key may lie in another partition now.
# SECURITY DEFINER: writers need no privileges on the other table, and its policies, which the owner
# is not subject to, hide no rows.
_FUNCTION = sql.SQL(
    "CREATE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER "
    "SET search_path = pg_catalog AS {body}"
)
_BODY = """
BEGIN
    IF TG_OP = 'TRUNCATE' THEN
        TRUNCATE {target};
        RETURN NULL;
    END IF;
    IF TG_OP <> 'INSERT' THEN
        DELETE FROM {target} WHERE {where};
    END IF;
    IF TG_OP <> 'DELETE' THEN
        INSERT INTO {target} ({columns}) OVERRIDING SYSTEM VALUE VALUES ({values});
    END IF;
    RETURN NULL;
END
"""


def create(
    inventory: Inventory,
    function: str,
    source: TableName,
    target: TableName,
    key_columns: Sequence[str],
) -> Iterator[Statement]:
    """Write into `target` whatever is written into `source`, found again by `key_columns`.

    The triggers are ENABLE ALWAYS: what a logical subscription writes counts, too.
    """
    columns = [column.name for column in inventory.columns if not column.generated]
    comma, and_ = sql.SQL(", "), sql.SQL(" AND ")
    body = sql.SQL(_BODY).format(
        target=target.sql,
        where=and_.join(sql.SQL("{0} = OLD.{0}").format(sql.Identifier(column)) for column in key_columns),
        columns=comma.join(map(sql.Identifier, columns)),
        values=comma.join(sql.SQL("NEW.{}").format(sql.Identifier(column)) for column in columns),
    )
    name = sql.Identifier(inventory.schema, function)
    lock = (Lock(source, LockMode.SHARE_ROW_EXCLUSIVE),)
    yield Statement(_FUNCTION.format(function=name, body=sql.Literal(body.as_string(None))))
    if inventory.owner != inventory.role:
        yield Statement(
            sql.SQL("ALTER FUNCTION {}() OWNER TO {}").format(name, sql.Identifier(inventory.owner))
        )
    row = "CREATE TRIGGER {} AFTER INSERT OR UPDATE OR DELETE ON {} FOR EACH ROW EXECUTE FUNCTION {}()"
    truncate = "CREATE TRIGGER {} AFTER TRUNCATE ON {} FOR EACH STATEMENT EXECUTE FUNCTION {}()"
    for query, trigger in ((row, function), (truncate, truncate_trigger(function))):
        yield Statement(sql.SQL(query).format(sql.Identifier(trigger), source.sql, name), lock)
        yield Statement(
            sql.SQL("ALTER TABLE {} ENABLE ALWAYS TRIGGER {}").format(source.sql, sql.Identifier(trigger)),
            lock,
        )


def drop(inventory: Inventory, function: str, source: TableName) -> Iterator[Statement]:
    lock = (Lock(source, LockMode.ACCESS_EXCLUSIVE),)
    for trigger in (function, truncate_trigger(function)):
        query = sql.SQL("DROP TRIGGER IF EXISTS {} ON {}")
        yield Statement(query.format(sql.Identifier(trigger), source.sql), lock)
    yield Statement(
        sql.SQL("DROP FUNCTION IF EXISTS {}()").format(sql.Identifier(inventory.schema, function))
    )


def truncate_trigger(function: str) -> str:
    """The name of the trigger for TRUNCATE, which goes with `function` (names are at most 62 bytes)."""
    return function + "t"
