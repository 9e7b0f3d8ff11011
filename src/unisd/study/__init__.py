"""`unisd study`: which components matter for a task.

A design of runs, a store of their results, effects with intervals.

`design` says which runs, `executor` runs them as `unisd train` processes, `store` keeps what they
gave, `analysis` reads the store.
"""
