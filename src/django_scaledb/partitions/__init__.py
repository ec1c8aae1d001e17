"""Partitioned models: planning (pure), the catalog, the DDL, the models and their maintenance."""
