"""What runs inside the sandbox; standard library only.

So it starts fast and needs no other file.

`worker` runs the code that a model wrote and knows of the tests what they ask: the arguments of
calls, and data that its objects are compared with, among other data. `judge` runs the tests in
another sandbox and sees the code's functions only as remote calls that return plain data. The code
can lie about a value, which is a wrong answer; it cannot touch the comparison.
"""
