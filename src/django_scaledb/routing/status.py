"""How the servers of each set are now, asked by connections of our own: for people and for monitoring.

JSON (`as_json`)::

    {"ok": false,
     "sets": [{"primary": "default",
               "servers": [{"alias": "replica1", "role": "replica", "state": "out", "position": "0/3000148",
                            "lag_bytes": 1024, "lag_seconds": 12.5, "latency_ms": 0.2,
                            "why": "it is 12.5 s behind; MAX_LAG is 10 s"}, ...]}]}

``state`` is ``ok`` or ``out``; what is not known is null.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import psycopg

from django_scaledb.conf import settings
from django_scaledb.routing import config as configuration
from django_scaledb.routing import monitor, queries
from django_scaledb.routing.registry import KEYS
from django_scaledb.routing.token import format_lsn, parse_lsn

#: Seconds in which a server must have said everything.
_DEADLINE = 4.0
#: A replica that is behind at the first look gets so many seconds to show that it is catching up.
_SECOND_LOOK = 0.5


@dataclass
class Server:
    """One server as it answered; `why` says what is wrong with it, and is empty when nothing is."""

    alias: str
    role: str
    state: str = "out"
    position: str | None = None
    lag_bytes: int | None = None
    lag_seconds: float | None = None
    latency_ms: float | None = None
    why: str = ""


@dataclass
class _Look:
    in_recovery: bool
    lsn: int
    own_lag: float | None
    age: float | None
    system: int
    latency: float


@dataclass
class SetStatus:
    primary: str
    servers: list[Server]


@dataclass
class Status:
    """All sets; `ok` when every server is what it should be and no replica is behind ``MAX_LAG``."""

    sets: list[SetStatus]

    @property
    def ok(self) -> bool:
        return all(server.state == "ok" for each in self.sets for server in each.servers)

    def as_json(self) -> Mapping[str, Any]:
        return {"ok": self.ok, "sets": [asdict(each) for each in self.sets]}


def survey() -> Status:
    """Ask all servers at once; takes a few seconds at most, whatever is wrong with them."""
    config = configuration.build({key: getattr(settings, key) for key in KEYS})
    return Status([asyncio.run(_survey_set(each)) for each in config.sets])


async def _survey_set(config: configuration.SetConfig) -> SetStatus:
    primary, primary_look = await _ask_primary(config.primary)
    replicas = await asyncio.gather(*(_ask_replica(alias, primary_look, config) for alias in config.replicas))
    return SetStatus(config.primary, [primary, *replicas])


async def _ask_primary(alias: str) -> tuple[Server, _Look | None]:
    server = Server(alias, "primary")
    look = await _look_at(server, queries.PRIMARY_STATE)
    if look is None:
        return server, None
    if look.in_recovery:
        server.why = "it is a standby: no writes are possible"
        return server, None
    server.state = "ok"
    server.position = format_lsn(look.lsn)
    return server, look


async def _ask_replica(alias: str, primary: _Look | None, config: configuration.SetConfig) -> Server:
    server = Server(alias, "replica")
    begun = time.monotonic()
    look = await _look_at(server, queries.REPLICA_STATE)
    if look is None:
        return server
    if not look.in_recovery:
        server.why = "it was promoted: it is a primary now"
        return server
    if primary is not None and look.lsn < primary.lsn:
        await asyncio.sleep(_SECOND_LOOK)
        again = await _look_at(server, queries.REPLICA_STATE)
        if again is None:
            return server
        look = again
    server.position = format_lsn(look.lsn)
    if primary is None:
        server.lag_seconds = look.own_lag
    else:
        server.lag_bytes = max(0, primary.lsn - look.lsn)
        if not server.lag_bytes:
            waited = time.monotonic() - begun
            server.lag_seconds = 0.0 if waited < _SECOND_LOOK else min(waited, look.own_lag or 0.0)
        else:
            server.lag_seconds = look.age
    if server.lag_seconds is not None:
        server.lag_seconds = round(server.lag_seconds, 3)
    server.why = _fault(server, look, primary, config)
    server.state = "out" if server.why else "ok"
    return server


def _fault(server: Server, look: _Look, primary: _Look | None, config: configuration.SetConfig) -> str:
    if primary is not None and look.system and primary.system and look.system != primary.system:
        return f"it belongs to cluster {look.system}, its primary to cluster {primary.system}"
    if server.lag_seconds is None:
        return "it is behind, and does not know how long" if server.lag_bytes else ""
    if server.lag_seconds > config.max_lag:
        return f"it is {server.lag_seconds:.1f} s behind; MAX_LAG is {config.max_lag:g} s"
    return ""


async def _look_at(server: Server, query: str) -> _Look | None:
    """What a server says; None, with `server.why` set, when it does not."""
    try:
        look = await asyncio.wait_for(_look(server.alias, query), _DEADLINE)
    except (TimeoutError, psycopg.errors.ConnectionTimeout):
        server.why = "it does not answer"
    except (psycopg.Error, OSError) as error:
        server.why = next(iter(str(error).strip().splitlines()), type(error).__name__)
    else:
        server.latency_ms = round(look.latency * 1000, 2)
        return look
    return None


async def _look(alias: str, query: str) -> _Look:
    parameters = await asyncio.to_thread(monitor.parameters, alias)
    async with await psycopg.AsyncConnection.connect(**parameters) as connection:
        begun = time.monotonic()
        row = await (await connection.execute(query.encode())).fetchone()
        latency = time.monotonic() - begun
        try:
            found = await (await connection.execute(queries.SYSTEM.encode())).fetchone()
        except psycopg.errors.InsufficientPrivilege:
            found = None
    if row is None:
        raise psycopg.DataError("it gave no answer")
    in_recovery, lsn, own_lag, age = (*row, None, None)[:4]
    return _Look(in_recovery, parse_lsn(lsn or "0/0"), own_lag, age, int(found[0]) if found else 0, latency)
