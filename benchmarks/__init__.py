"""Time and memory of this project beside its peers, on the same tensors, in one process.

`python -m benchmarks {loss,score,step,generate,main,memory,growth,start,run} --json F` measures;
`python -m benchmarks table F... --output docs/results/speed.md` makes the table. Nothing here is
imported by the library.
"""
