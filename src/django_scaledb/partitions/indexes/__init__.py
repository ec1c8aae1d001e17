"""Indexes and unique constraints of partitioned tables in use, built partition by partition."""
