"""Counter tables: totals of a model's rows per key, exact at every commit."""
