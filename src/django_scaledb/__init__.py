"""Partitioned models, replica routing and counter tables for Django on PostgreSQL."""

__version__ = "0.1.0.dev0"
