"""PostgreSQL as django_scaledb sees it: names, locks, statements (pure) and the one door for DDL."""
