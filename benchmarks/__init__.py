"""Time and memory of this project beside its peers, on the same tensors, in one process.

`python -m benchmarks CASE --json F` measures (`--help` names the cases), and `python -m benchmarks
table F... --output docs/results/speed.md` makes the table. Nothing here is imported by the library.
"""
