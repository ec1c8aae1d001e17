"""The archive: partitions that left their set, as Parquet files in one of Django's storages, and back.

PostgreSQL's own text is what goes over the wire in both directions (COPY), so that a value is in
the archive what it would be in a dump. Plain types are native Parquet types, for other readers;
all others are that text. What was written is read back through PostgreSQL and compared before a
table may be dropped.

columns, manifest, drift (pure) · rows (the database's side), parquet (the file's side), storage ·
writer, restore (what is done, in order) · state (what is remembered).
"""
