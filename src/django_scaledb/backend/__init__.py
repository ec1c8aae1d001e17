"""The ENGINE: PostgreSQL through django-postgres-extra, with what the features need of a connection."""
