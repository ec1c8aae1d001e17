"""What servers are asked about themselves. Every part works for an ordinary role, on PostgreSQL 14 to 18."""

#: in recovery, replayed position, seconds behind as it knows itself, age of the last commit it has replayed.
#: Lag is judged by the primary's positions. The third column is for the time before the primary was seen: it
#: says 0 too when nothing is received any more. The last one is for a replica known to lack something.
REPLICA_STATE = """
SELECT pg_is_in_recovery(), pg_last_wal_replay_lsn()::text,
       CASE WHEN pg_last_wal_receive_lsn() = pg_last_wal_replay_lsn() THEN 0
            ELSE extract(epoch FROM clock_timestamp() - pg_last_xact_replay_timestamp())::float8 END,
       extract(epoch FROM clock_timestamp() - pg_last_xact_replay_timestamp())::float8
"""

#: in recovery, the position to which the log is on disk (replicas get no more)
PRIMARY_STATE = """
SELECT pg_is_in_recovery(), CASE WHEN NOT pg_is_in_recovery() THEN pg_current_wal_flush_lsn()::text END
"""

#: timeline (0 on a standby), bytes of a page and of a segment of the log. The control file would name the
#: timeline of the last checkpoint, which is too old just after a promotion.
PRIMARY_LOG = """
SELECT CASE WHEN pg_is_in_recovery() THEN 0
            ELSE ('x' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8))::bit(32)::int END,
       current_setting('wal_block_size')::int, pg_size_bytes(current_setting('wal_segment_size'))::bigint
"""

#: Some managed services do not allow this one.
SYSTEM = "SELECT system_identifier FROM pg_control_system()"
