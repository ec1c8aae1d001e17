"""From a plain table to a partitioned one while it is in use.

`inventory` reads everything a table has, `preflight` refuses what cannot be carried over, `carry`
writes the statements that give it to another table, `swap` those that put one table in the place
of the other (all pure but the first). `attach`, `copy` and `split` are the ways to go, `undo` the way back,
`runner` walks them; what it has to remember lies in the table of `state.Conversion`.
"""
