"""The sandbox: honest programs pass, wrong ones fail for the right reason, and hostile ones neither
pass, escape, hang nor leak.
"""

import contextlib
import json
import os
import re
import secrets
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from unisd.errors import UserError
from unisd.tasks import sandbox

pytestmark = pytest.mark.sandbox

TIMEOUT_S = 2.0
MEMORY_MB = 256
NOBODY = 65534


def lines(text):
    return textwrap.dedent(text).strip() + "\n"


# ---------------------------------------------------------------- honest programs

HONEST = [
    ("plain", "def f(x): return 2 * x", "assert f(2) == 4\nassert f('a') == 'aa'"),
    ("in place", "def f(xs): xs.sort()", "xs = [3, 1, 2]\nassert f(xs) is None\nassert xs == [1, 2, 3]"),
    (
        "in place, dict and set",
        "def f(d, s): d['b'] = 2; s.discard(1)",
        "d, s = {'a': 1}, {1, 2}\nf(d, s)\nassert (len(d), s) == (2, {2})",
    ),
    ("in place, nested", "def f(g): g[0][1] = 9", "g = [[1, 2], [3]]\nf(g)\nassert g == [[1, 9], [3]]"),
    ("callback", "def f(g, xs): return [g(x) for x in xs]", "assert f(lambda x: x + 1, [1, 2]) == [2, 3]"),
    ("nested callback", "def f(g): return lambda x: g(g(x))", "assert f(lambda x: x * 3)(2) == 18"),
    (
        "callback that raises",
        "def f(g):\n  try: g()\n  except Exception: return 'no'",
        "def g(): raise KeyError(1)\nassert f(g) == 'no'",
    ),
    (
        "generator",
        "def f(n):\n  for i in range(n): yield i * i",
        "assert list(f(4)) == [0, 1, 4, 9]\nassert sum(f(3)) == 5",
    ),
    (
        "class",
        "class S:\n  def __init__(s): s.xs = []\n  def push(s, x): s.xs.append(x)",
        "s = S()\ns.push(3)\nassert s.xs == [3]",
    ),
    (
        "own class as argument",
        "class N:\n  def __init__(s, v, n=None): s.v, s.n = v, n\ndef f(n): return n.v + f(n.n) if n else 0",
        "assert f(N(1, N(2, N(3)))) == 6",
    ),
    (
        "length and items",
        "class B:\n  def __len__(s): return 3\n  def __getitem__(s, i): return i * 2",
        "assert len(B()) == 3 and B()[4] == 8",
    ),
    (
        "text",
        "class P:\n  def __repr__(s): return 'P()'\n  def __str__(s): return 'p'",
        "assert repr(P()) == 'P()' and str(P()) == 'p'",
    ),
    (
        "Counter",
        "from collections import Counter\ndef f(s): return Counter(s)",
        "assert f('aab') == {'a': 2, 'b': 1}\nassert f('a') == Counter('a')",
    ),
    (
        "namedtuple",
        "from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(): return P(1, 2)",
        "assert f() == (1, 2)",
    ),
    (
        "IntEnum",
        "from enum import IntEnum\nclass C(IntEnum):\n  RED = 3\ndef f(): return C.RED",
        "assert f() == 3",
    ),
    (
        "Enum",
        "from enum import Enum\nclass C(Enum):\n  RED = 3\ndef f(): return C.RED",
        "assert f() == C.RED\nassert f().value == 3",
    ),
    (
        "nan and inf",
        "def f(): return [float('nan'), float('inf'), -0.0]",
        "a, b, c = f()\nassert a != a and b == math.inf and str(c) == '-0.0'\n",
    ),
    ("big integers", "def f(n): return 7 ** n", "assert f(20000) == 7 ** 20000"),
    (
        "bytes",
        "def f(b): return b[::-1], bytearray(b)",
        "assert f(b'\\x00\\xff') == (b'\\xff\\x00', bytearray(b'\\x00\\xff'))",
    ),
    (
        "sets",
        "def f(xs): return set(xs), frozenset(xs)",
        "assert f([1, 1, 2]) == ({1, 2}, frozenset({2, 1}))",
    ),
    (
        "dict with tuple keys",
        "def f(): return {(1, 2): {None: 1j}, 'k': range(3)}",
        "assert f() == {(1, 2): {None: 1j}, 'k': range(3)}",
    ),
    ("exact types", "def f(): return [True, 1, 1.0]", "assert [type(x) for x in f()] == [bool, int, float]"),
    ("returns a type", "def f(x): return type(x)", "assert f(1) is int and f('') is str"),
    ("surrogates", "def f(s): return s + '\\ud800'", "assert f('a') == 'a\\ud800'"),
    (
        "expected exception",
        "def f(x): raise ValueError('bad ' + x)",
        "try:\n  f('y')\n  assert False\nexcept ValueError as e:\n  assert str(e) == 'bad y'",
    ),
    (
        "any exception",
        "def f(x): return 1 / x",
        "try:\n  f(0)\nexcept Exception:\n  pass\nelse:\n  assert False\nassert f(1) == 1",
    ),
    (
        "math of the code",
        "import math\ndef f(x): return math.sqrt(x)",
        "assert math.isclose(f(2), 1.41421356, rel_tol=1e-6)",
    ),
    ("math of nobody", "def f(x): return x ** 0.5", "assert math.isclose(f(2), 1.41421356, rel_tol=1e-6)"),
    (
        "names imported by the code",
        "from math import *\ndef f(x): return floor(x)",
        "assert f(2.5) == floor(2.5) == 2",
    ),
    (
        "class imported by the code",
        "from datetime import date\ndef f(): return '2020-01-02'",
        "assert f() == date(2020, 1, 2).isoformat()",
    ),
    ("named as a built-in", "def sum(a, b): return a * b", "assert sum(3, 4) == 12"),
    (
        "named as a built-in, check",
        "def sum(a, b): return a * b",
        "def check(candidate):\n  assert candidate(3, 4) == 12\ncheck(sum)",
    ),
    (
        "named as a built-in, import",
        "def sum(a, b): return a / b",
        "from math import isclose\nassert isclose(sum(1, 2), 0.5) and abs(-1) == 1",
    ),
    (
        "named as a built-in, local names",
        "def sum(xs):\n  len = max = 0\n  return 7",
        "assert sum([len([1]), max(1, 2)]) == 7",
    ),
    ("defines built-ins beside", "def len(x): return 0\ndef f(x): return x", "assert len(f([1, 2])) == 2"),
    ("constant", "LIMIT = 10\ndef f(): return LIMIT", "assert f() == LIMIT == 10"),
    ("keeps state", "seen = []\ndef f(x): seen.append(x); return list(seen)", "f(1)\nassert f(2) == [1, 2]"),
    (
        "keyword arguments",
        "def f(a, *, b=2, **k): return a + b + k.get('c', 0)",
        "assert f(1, b=3, c=4) == 8",
    ),
    (
        "own files",
        "def f():\n  open('x.txt', 'w').write('hi')\n  return open('x.txt').read()",
        "assert f() == 'hi'",
    ),
    ("prints", "print('hello')\ndef f(): print('x' * 10**6); return 1", "assert f() == 1"),
    (
        "threads and processes",
        (
            "import threading, subprocess, sys\ndef f():\n  out = []\n  t ="
            " threading.Thread(target=out.append, args=(1,))\n  t.start(); t.join()\n  return out +"
            " [subprocess.run([sys.executable, '-c', 'exit(3)']).returncode]"
        ),
        "assert f() == [1, 3]",
    ),
    (
        "libraries of the system",
        "import ctypes, bz2, zlib\ndef f(b): return bz2.decompress(bz2.compress(b))",
        "assert f(b'x') == b'x'",
    ),
    (
        "socket pair",
        "import socket\ndef f():\n  a, b = socket.socketpair()\n  a.send(b'x')\n  return b.recv(1)",
        "assert f() == b'x'",
    ),
]

FAILING = [
    ("wrong", "def f(x): return x", "assert f(2) == 2\nassert f(3) == 4", "wrong", "assert f(3) == 4"),
    ("none", "def f(x): pass", "assert f(2) == 2", "wrong", "assert f(2) == 2"),
    (
        "no exception",
        "def f(x): return x",
        "try:\n  f(0)\n  assert False, 'none'\nexcept ValueError:\n  pass",
        "wrong",
        "assert False",
    ),
    (
        "other exception",
        "def f(x): raise KeyError(x)",
        "try:\n  f(0)\nexcept ValueError:\n  pass",
        "error",
        "KeyError",
    ),
    ("exception", "def f(x): return 1 / 0", "assert f(2) == 2", "error", "ZeroDivisionError"),
    (
        "own exception",
        "class E(Exception): pass\ndef f(x): raise E('hm')",
        "assert f(2) == 2",
        "error",
        "E: hm",
    ),
    (
        "import-time exception",
        "import nothing_of_the_kind",
        "assert f(2) == 2",
        "error",
        "ModuleNotFoundError",
    ),
    ("name missing", "def g(x): return x", "assert f(2) == 2", "error", "NameError"),
    ("syntax", "def f(x) return x", "assert f(2) == 2", "syntax", "SyntaxError"),
    ("indentation", "def f(x):\nreturn x", "assert f(2) == 2", "syntax", "IndentationError"),
    ("null byte", "def f(x): return x\0", "assert f(2) == 2", None, ""),
    ("lone surrogate", "def f(x): return '\ud800'", "assert f(2) == 2", "error", "UnicodeEncodeError"),
    ("wrong tests", "def f(x): return x", "assert f(2 ==", "error", "the tests do not compile"),
    ("endless", "def f(x):\n  while True: pass", "assert f(2) == 2", "timeout", ""),
    ("asleep", "import time\ndef f(x): time.sleep(60)", "assert f(2) == 2", "timeout", "no verdict within"),
    ("memory", "def f(x): return bytearray(2 * 2**30)", "assert f(2) == 2", "memory", "out of memory"),
    ("memory at import", "x = bytearray(2 * 2**30)", "assert f(2) == 2", "memory", "MemoryError"),
    ("ends", "import os\ndef f(x): os._exit(0)", "assert f(2) == 2", "ended", "the program ended"),
    ("crashes", "import os\ndef f(x): os.abort()", "assert f(2) == 2", "ended", "the program ended"),
    (
        "terminal codes",
        "def f(x): raise ValueError('\\x1b[2J\\ud800\\n')",
        "assert f(2) == 2",
        "error",
        "ValueError:  [2J",
    ),
    (
        "named as a built-in",
        "def sum(a, b): return a + b",
        "assert sum(3, 4) == 12",
        "wrong",
        "assert sum(3, 4) == 12",
    ),
    (
        "named as a built-in, check",
        "def sum(xs): return 0",
        "def check(c):\n  assert c([1]) == 1\ncheck(sum)",
        "wrong",
        "assert c([1]) == 1",
    ),
]


@pytest.mark.parametrize(("code", "tests"), [pytest.param(*rest, id=name) for name, *rest in HONEST])
def test_honest_programs_pass(code, tests):
    verdict = sandbox.run_program(code, tests)
    assert verdict.passed, verdict
    assert (verdict.reason, verdict.detail) == ("passed", "")


@pytest.mark.parametrize(
    ("code", "tests", "reason", "detail"), [pytest.param(*rest, id=name) for name, *rest in FAILING]
)
def test_wrong_programs_fail_with_the_reason(code, tests, reason, detail):
    verdict = sandbox.run_program(code, tests, TIMEOUT_S)
    assert not verdict.passed
    assert reason is None or verdict.reason == reason, verdict
    assert verdict.detail.startswith(detail) or detail in verdict.detail
    assert verdict.detail.isprintable()
    assert 0 < verdict.seconds < TIMEOUT_S + 4


# ---------------------------------------------------------------- hostile programs
# (name, code, tests). Where the tests ask `attack() is True`, the attack says whether it got
# through; else the answer is wrong. The fixture `host` fills in what stands between @: @PORT@ and
# so on.

ASK = "assert attack() is True"
DOUBLE = "assert f(2) == 4\nassert f(5) == 10"
TOKEN = "assert f() == '@TOKEN@'"
SECRET = "assert '@SECRET@' in f()"


def attempt(body):
    """A program that tries `body`, and says True where nothing stops it."""
    body = textwrap.indent(textwrap.dedent(body).strip(), "        ")
    return (
        f"import os, sys, socket, ctypes\ndef attack():\n    try:\n{body}\n    except OSError:\n       "
        " return False\n    return True\n"
    )


def libc(call):
    """`attempt` for a call of the C library, which fails with -1."""
    return attempt(f"l = ctypes.CDLL(None, use_errno=True)\nif {call} < 0: return False")


def forge(*messages, at_import=True, then="return 3"):
    """A program that writes `messages` to whatever is open."""
    body = lines(f"""
    import os
    def forge():
        for message in {messages!r}:
            for fd in range(64):
                try:
                    os.set_blocking(fd, False)
                    os.write(fd, message.encode() + b"\\n")
                except OSError:
                    pass
    """)
    return body + ("forge()\n" if at_import else "") + f"def f(x=None):\n    forge()\n    {then}\n"


SEARCH = lines("""
    import gc, glob, os, re, sys
    PATTERN = re.compile("tok" + "en-[0-9a-f]{16}")
    def search(text):
        found = PATTERN.search(text if isinstance(text, str) else bytes(text).decode("latin1"))
        if found: raise StopSearch(found.group())
    class StopSearch(Exception): pass
""")

READING = [
    ("reads /etc/passwd", attempt("open('/etc/passwd').read()"), ASK),
    ("reads /etc/shadow", attempt("open('/etc/shadow').read()"), ASK),
    (
        "reads the home directory",
        attempt(
            "if not set(os.listdir('@HOME@')) - {'.pyenv', '.local', 'miniconda3', 'anaconda3'}: return False"
        ),
        ASK,
    ),
    ("reads a file of the project", attempt("open('@PROJECT@').read()"), ASK),
    ("reads a file open to all", "def f(): return open('@WATCHED@/secret.txt').read()", SECRET),
    (
        "reads through a symlink",
        "import os\ndef f():\n  os.symlink('@WATCHED@', '/tmp/l')\n  return open('/tmp/l/secret.txt').read()",
        SECRET,
    ),
    (
        "reads through a hard link",
        "import os\ndef f():\n  os.link('@WATCHED@/secret.txt', '/tmp/l')\n  return open('/tmp/l').read()",
        SECRET,
    ),
    (
        "reads through the root of pid 1",
        "def f(): return open('/proc/1/root@WATCHED@/secret.txt').read()",
        SECRET,
    ),
    ("reads its environment", "import os\ndef f(): return repr(dict(os.environ))", SECRET),
    (
        "reads all environments",
        lines("""
        import glob
        def f():
            text = ""
            for path in glob.glob("/proc/[0-9]*/environ"):
                try: text += open(path).read()
                except OSError: pass
            return text
        """),
        SECRET,
    ),
    (
        "reads the environment of pid 1",
        attempt("if not open('/proc/1/environ', 'rb').read(): return False"),
        ASK,
    ),
    ("reads the environment of the parent", attempt("open('/proc/@PID@/environ', 'rb').read()"), ASK),
    ("reads the memory of the parent", attempt("open('/proc/@PID@/mem', 'rb').close()"), ASK),
    ("reads the memory of pid 1", attempt("f = open('/proc/1/mem', 'rb'); f.seek(0x1000); f.read(1)"), ASK),
    ("reads the kernel's memory", attempt("open('/proc/kcore', 'rb').read(64)"), ASK),
    ("reads the kernel's log", attempt("open('/dev/kmsg', 'rb').close()"), ASK),
    (
        "opens the disk",
        attempt("os.mknod('/tmp/disk', 0o60666, os.makedev(254, 0)); open('/tmp/disk', 'rb').close()"),
        ASK,
    ),
    (
        "sees processes of the host",
        (
            "import os\ndef attack(): return len([p for p in os.listdir('/proc') if p.isdigit()]) > 8 or"
            " os.path.exists('/proc/@PID@')"
        ),
        ASK,
    ),
]

WRITING = [
    ("writes to the watched folder", attempt("open('@WATCHED@/x', 'w').write('x')"), ASK),
    ("removes a file", attempt("os.unlink('@WATCHED@/secret.txt')"), ASK),
    ("removes a folder", attempt("import shutil; shutil.rmtree('@WATCHED@')"), ASK),
    ("writes to /", attempt("open('/x', 'w').write('x')"), ASK),
    ("writes to /etc", attempt("os.makedirs('/etc/x')"), ASK),
    ("writes to the home directory", attempt("open('@HOME@/x-@MARK@', 'w').write('x')"), ASK),
    ("writes to /dev/shm", attempt("open('/dev/shm/@MARK@', 'w').write('x')"), ASK),
    ("writes to /guest", attempt("open('/guest/guest/judge.py', 'a').write('x')"), ASK),
    ("writes beside /guest", attempt("open('/guest/json.py', 'w').write('x')"), ASK),
    (
        "writes to the interpreter's folder",
        attempt("open(os.path.dirname(os.__file__) + '/x-@MARK@.py', 'w').write('x')"),
        ASK,
    ),
    ("overwrites the interpreter", attempt("open(os.path.realpath('/proc/self/exe'), 'r+b').close()"), ASK),
    ("makes a folder writable", attempt("os.chmod(os.path.dirname(os.__file__), 0o777)"), ASK),
    ("edits this file", attempt("open('@PROJECT@', 'a').write('x')"), ASK),
    (
        "writes through a symlink",
        attempt("os.symlink('@WATCHED@/x', '/tmp/l'); open('/tmp/l', 'w').write('x')"),
        ASK,
    ),
    ("writes settings of the kernel", attempt("open('/proc/sys/kernel/core_pattern', 'w').write('x')"), ASK),
    ("asks for a reboot", attempt("open('/proc/sysrq-trigger', 'w').close()"), ASK),
]

NETWORK = [
    ("connects over TCP", attempt("socket.create_connection(('127.0.0.1', @PORT@), 1)"), ASK),
    (
        "sends over UDP",
        attempt(
            "s = socket.socket(type=socket.SOCK_DGRAM); s.settimeout(0.5); s.sendto(b'x', ('127.0.0.1',"
            " @UDP@)); s.recv(9)"
        ),
        ASK,
    ),
    ("looks up a name", attempt("socket.gethostbyname('example.com')"), ASK),
    ("connects outside", attempt("socket.create_connection(('192.0.2.1', 53), 1)"), ASK),
    (
        "connects to a socket file",
        attempt("s = socket.socket(socket.AF_UNIX); s.connect('@WATCHED@/socket')"),
        ASK,
    ),
    (
        "connects to an abstract socket",
        attempt("s = socket.socket(socket.AF_UNIX); s.connect('\\0@MARK@')"),
        ASK,
    ),
    ("speaks to the machine's host", attempt("socket.socket(40, socket.SOCK_STREAM)"), ASK),
    ("speaks to the kernel", attempt("socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)"), ASK),
    ("sends raw packets", attempt("socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)"), ASK),
]

EXHAUSTING = [
    (
        "forks for ever",
        "import os\ndef f(x):\n  while True:\n    try: os.fork()\n    except OSError: pass",
        DOUBLE,
    ),
    (
        "starts threads for ever",
        (
            "import threading, time\ndef f(x):\n  while True:\n    try: threading.Thread(target=time.sleep,"
            " args=(60,)).start()\n    except RuntimeError: pass"
        ),
        DOUBLE,
    ),
    (
        "starts many processes",
        lines("""
        import os, time
        def attack():
            for count in range(40):
                try:
                    if os.fork() == 0:
                        time.sleep(60)
                except OSError:
                    return False
            return True
        """),
        ASK,
    ),
    ("takes memory", "def f(x):\n  kept = []\n  while True: kept.append(bytearray(2**24))", DOUBLE),
    ("takes memory at import", "kept = []\nwhile True: kept.append(bytearray(2**24))", DOUBLE),
    (
        "takes memory in many processes",
        lines("""
        import os, time
        def f(x):
            for _ in range(20):
                try:
                    if os.fork() == 0: break
                except OSError: break
            kept = []
            while True:
                try: kept.append(bytearray(2**22))
                except MemoryError: time.sleep(60)
        """),
        DOUBLE,
    ),
    (
        "takes shared memory segments",
        lines(f"""
        import ctypes
        def attack():
            l = ctypes.CDLL(None)
            l.shmat.restype = ctypes.c_void_p
            for _ in range(4):
                segment = l.shmget(0, {MEMORY_MB // 2} << 20, 0o1600)
                at = l.shmat(segment, None, 0)
                if segment < 0 or at in (None, 2**64 - 1): return False
                ctypes.memset(at, 1, {MEMORY_MB // 2} << 20)
                l.shmdt(ctypes.c_void_p(at))
            return True
        """),
        ASK,
    ),
    ("takes memory files", attempt("for _ in range(40): os.write(os.memfd_create('x'), bytes(2**23))"), ASK),
    ("computes for ever", "def f(x):\n  while True: pass", DOUBLE),
    ("computes for ever at import", "while True: pass", DOUBLE),
    (
        "computes on, whatever the signal",
        (
            "import signal\nfor s in range(1, 64):\n  try: signal.signal(s, signal.SIG_IGN)\n"
            "  except (OSError, ValueError): pass\nwhile True: pass"
        ),
        DOUBLE,
    ),
    ("computes in C", "def f(x): return 3 ** 10 ** 9", DOUBLE),
    ("sleeps for ever", "import time\ndef f(x): time.sleep(1000)", DOUBLE),
    ("sleeps for ever at import", "import time\ntime.sleep(1000)", DOUBLE),
    (
        "prints for ever",
        "import sys\ndef f(x):\n  while True: print('x' * 10**5); sys.stderr.write('y' * 10**5)",
        DOUBLE,
    ),
    (
        "prints much",
        (
            "import sys, os\ndef f(x):\n  for _ in range(50): os.write(1, b'x' * 10**6); os.write(2, b'x' *"
            " 10**6)\n  return 3"
        ),
        DOUBLE,
    ),
    ("returns a huge text", "def f(x): return 'x' * (100 * 2**20)", DOUBLE),
    ("returns a huge list", "def f(x): return [[]] * 10**7", DOUBLE),
    (
        "returns an endless generator",
        "import itertools\ndef f(x): return itertools.count()",
        "assert list(f(2)) == [4]",
    ),
    (
        "returns a huge length",
        "class L:\n  def __len__(s): return 2**62\ndef f(x): return L()",
        "assert len(f(2)) == 4",
    ),
    ("returns deep nesting", "def f(x):\n  a = []\n  for _ in range(10**5): a = [a]\n  return a", DOUBLE),
    ("returns itself nested", "def f(x):\n  a = []\n  a.append(a)\n  return a", DOUBLE),
    ("returns a dict in itself", "def f(x):\n  a = {}\n  a[1] = a\n  return a", DOUBLE),
    ("is deeply nested code", "x = " + "-" * 10**5 + "1\ndef f(x): return 3", DOUBLE),
    ("is a deep expression", "x = " + "(" * 5000 + ")" * 5000 + "\ndef f(x): return 3", DOUBLE),
    (
        "fills the disk",
        attempt("""
        for number in range(20):
            with open(f'/tmp/{number}', 'wb') as file: file.write(bytes(2**22))
        """),
        ASK,
    ),
    (
        "writes one large file",
        attempt("f = open('/tmp/x', 'wb'); f.truncate(2**30); f.seek(2**30); f.write(b'x')"),
        ASK,
    ),
    (
        "makes many files",
        "def f(x):\n  for n in range(10**4): open(f'/tmp/{n}', 'w').close()\n  return 3",
        DOUBLE,
    ),
    ("opens many files", attempt("kept = [open('/dev/null') for _ in range(1000)]"), ASK),
    (
        "raises its limits",
        attempt(
            "import resource\ntry: resource.setrlimit(resource.RLIMIT_AS, (-1, -1))\nexcept ValueError:"
            " return False"
        ),
        ASK,
    ),
    (
        "raises its count of processes",
        attempt(
            "import resource\ntry: resource.setrlimit(resource.RLIMIT_NPROC, (999, 999))\nexcept ValueError:"
            " return False"
        ),
        ASK,
    ),
    ("raises its priority", attempt("os.nice(-5)"), ASK),
]

PRIVILEGES = [
    ("signals the parent's process", attempt("os.kill(@PID@, 0)"), ASK),
    (
        "kills pid 1",
        (
            "import os, time\ndef f(x):\n  try: os.kill(1, 9)\n  except OSError: pass\n  time.sleep(0.2)\n "
            " return 3"
        ),
        DOUBLE,
    ),
    (
        "kills its parent",
        "import os\ndef f(x):\n  try: os.kill(os.getppid(), 9)\n  except OSError: pass\n  return 3",
        DOUBLE,
    ),
    (
        "kills everything",
        "import os\ndef f(x):\n  try: os.kill(-1, 9)\n  except OSError: pass\n  return 3",
        DOUBLE,
    ),
    (
        "kills its group",
        "import os\ndef f(x):\n  try: os.killpg(0, 9)\n  except OSError: pass\n  return 3",
        DOUBLE,
    ),
    ("kills itself", "import os\ndef f(x): os.kill(os.getpid(), 9)", DOUBLE),
    ("stops itself", "import os\ndef f(x): os.kill(os.getpid(), 19)", DOUBLE),
    ("traces pid 1", libc("l.ptrace(16, 1, 0, 0)"), ASK),
    ("asks to be traced", libc("l.ptrace(0, 0, 0, 0)"), ASK),
    ("mounts a file system", libc("l.mount(b'none', b'/tmp', b'tmpfs', 0, None)"), ASK),
    ("mounts over what is read-only", libc("l.mount(None, b'/', None, 32 | 4096, None)"), ASK),
    ("leaves its user namespace", libc("l.unshare(0x10000000)"), ASK),
    ("leaves its mount namespace", libc("l.unshare(0x20000)"), ASK),
    (
        "clones a user namespace",
        libc("l.syscall(56 if os.uname().machine == 'x86_64' else 220, 0x10000000 | 17, 0, 0, 0, 0)"),
        ASK,
    ),
    ("joins a namespace", libc("l.setns(os.open('/proc/1/ns/net', 0), 0)"), ASK),
    (
        "reads keys of the user",
        libc("l.syscall(250 if os.uname().machine == 'x86_64' else 219, 0, -3, 1)"),
        ASK,
    ),
    ("changes its root", attempt("os.chroot('/tmp')"), ASK),
    ("becomes root", attempt("os.setuid(0)"), ASK),
    ("becomes another user", attempt("os.setresuid(1000, 1000, 1000)"), ASK),
    ("sets the clock", attempt("import time; time.clock_settime(0, time.time() + 9)"), ASK),
    ("names the machine", attempt("socket.sethostname('x')"), ASK),
    (
        "loads a program for the kernel",
        libc("l.syscall(321 if os.uname().machine == 'x86_64' else 280, 0, 0, 0)"),
        ASK,
    ),
]

EXITS = [
    ("exits at import", "import sys\ndef f(x): return 2 * x\nsys.exit(0)", DOUBLE),
    ("ends at import", "import os\ndef f(x): return 2 * x\nos._exit(0)", DOUBLE),
    ("exits when called", "import sys\ndef f(x): sys.exit(0)", DOUBLE),
    ("raises SystemExit", "def f(x): raise SystemExit(0)", DOUBLE),
    ("raises KeyboardInterrupt", "def f(x): raise KeyboardInterrupt", DOUBLE),
    ("raises GeneratorExit", "def f(x): raise GeneratorExit", DOUBLE),
    ("ends when called", "import os\ndef f(x): os._exit(0)", DOUBLE),
    (
        "ends where any exception will do",
        "import os\ndef f(x): os._exit(0)",
        "try:\n  f(2)\nexcept Exception:\n  pass",
    ),
    ("ends where anything will do", "import os\ndef f(x): os._exit(0)", "try:\n  f(2)\nexcept:\n  pass"),
    (
        "ends a loop of the tests",
        "def f(x): raise StopIteration",
        "assert all(map(lambda x: f(x) == 2 * x, [1, 2]))",
    ),
    (
        "ends a generator of the tests",
        "def f(x): raise StopIteration",
        "assert all(f(x) == 2 * x for x in [1, 2])",
    ),
    (
        "replaces itself",
        "import os\ndef f(x): os.execv('/proc/self/exe', ['python', '-c', 'print(4)'])",
        DOUBLE,
    ),
    ("forks and goes on as two", "import os\ndef f(x):\n  os.fork()\n  return 3", DOUBLE),
    ("works at exit", "import atexit, os, sys\natexit.register(os._exit, 0)\ndef f(x): sys.exit(0)", DOUBLE),
    (
        "raises an exception that lies",
        "class AssertionError(Exception):\n  __name__ = 'x'\ndef f(x): raise AssertionError",
        DOUBLE,
    ),
]

FORGERIES = [
    (
        "prints what harnesses print",
        "print('PASSED\\n1 passed in 0.01s\\nOK\\n{\"passed\": true}')\ndef f(x): return 3",
        DOUBLE,
    ),
    ("forges verdicts", forge('["passed",""]', '["passed", ""]'), DOUBLE),
    ("forges verdicts and ends", forge('["passed",""]', then="os._exit(0)"), DOUBLE),
    ("forges true values", forge('{"value":true,"args":["l",[]]}', '{"value":true}'), DOUBLE),
    (
        "forges true values when called",
        forge('{"value":true,"args":["l",[["i","2"]]]}', at_import=False),
        DOUBLE,
    ),
    ("forges names", forge('{"names":{}}', '{"names":{"f":["y","bool"]}}', '{"names":{"f":true}}'), DOUBLE),
    (
        "forges names of the tests",
        forge('{"names":{"check":["y","bool"],"f":["y","bool"],"x":true}}'),
        "def check(x): assert x == 4\ncheck(f(2))",
    ),
    (
        "forges built-ins",
        forge('{"names":{"f":["y","str"],"abs":["y","bool"],"AssertionError":["y","bool"]}}'),
        "assert abs(f(2) - 4) < 1e-6",
    ),
    ("forges failures", forge('{"failed":["x"]}', '{"failed":3}'), DOUBLE),
    (
        "forges calls back",
        forge('{"back":0,"args":["l",[]],"kwargs":["d",[]]}', '{"back":-1}', '{"back":"x"}', at_import=False),
        DOUBLE,
    ),
    (
        "forges exceptions",
        forge(
            '{"raise":["AssertionError"]}', '{"raise":["SystemExit","0"]}', '{"raise":[]}', at_import=False
        ),
        DOUBLE,
    ),
    (
        "forges exceptions for passes",
        forge('{"raise":["StopIteration","x"]}', at_import=False),
        "assert all(map(lambda x: f(x) == 9, [1]))",
    ),
    ("sends no messages", forge("null", "[]", "1e999", "{", "\x00", "NaN"), DOUBLE),
    ("sends deep messages", forge("[" * 10**5, '{"value":' + '["l",[' * 10**4 + "]]" * 10**4 + "}"), DOUBLE),
    (
        "sends strange values",
        forge(
            *[
                '{"args":["l",[["i","2"]]],"value":' + v + "}"
                for v in ('["q"]', "[]", '["i","zz"]', "{}", '["g",7]', '["h",-1]', "1")
            ],
            at_import=False,
        ),
        DOUBLE,
    ),
    (
        "sends an endless message",
        (
            "import os\ndef f(x):\n  while True:\n    for fd in range(3, 64):\n"
            "      try: os.write(fd, b'x' * 65536)\n      except OSError: pass"
        ),
        DOUBLE,
    ),
    (
        "sends values that collide",
        lines("""
        import os
        def f(x):
            items = b",".join(b'["i","%x"]' % (i * (2**61 - 1)) for i in range(10**5))
            for fd in range(3, 64):
                try: os.write(fd, b'{"args":["l",[["i","2"]]],"value":["s",[' + items + b']]}\\n')
                except OSError: pass
        """),
        DOUBLE,
    ),
    (
        "takes the requests away",
        "import os\nfor fd in range(64):\n  try: os.close(fd)\n  except OSError: pass\ndef f(x): return 3",
        DOUBLE,
    ),
]

LIES = [
    (
        "replaces built-ins",
        lines("""
        import builtins
        builtins.len = lambda x: 4
        builtins.isinstance = lambda *a: True
        builtins.AssertionError = type("A", (Exception,), {})
        builtins.set = builtins.sorted = builtins.abs = builtins.all = lambda *a, **k: True
        def f(x): return 3
     """),
        "assert len(str(f(2))) == 4 and set([f(2)]) == {4}",
    ),
    (
        "defines built-ins",
        lines("""
        def set(*a): return True
        def len(x): return 4
        def sorted(x, **k): return [4]
        def abs(x): return 0.0
        def all(x): return True
        def f(x): return [3]
     """),
        "assert set(f(2)) == {4}\nassert len(f(2)) == 4\nassert sorted(f(2)) == [4]",
    ),
    ("defines abs", "def abs(x): return 0\ndef f(x): return 3", "assert abs(f(2) - 4) < 1e-6"),
    (
        "defines abs beside sum",
        "def abs(x): return 0\ndef sum(x): return 3",
        "assert abs(sum([2, 2]) - 4) < 1e-6",
    ),
    (
        "defines print and assert helpers",
        "def isinstance(*a): return True\ndef f(x): return 'x'",
        "assert isinstance(f(2), int)",
    ),
    (
        "patches math",
        "import math\nmath.isclose = lambda *a, **k: True\ndef f(x): return 3",
        "assert math.isclose(f(2), 4)",
    ),
    (
        "defines math",
        "class math:\n  isclose = staticmethod(lambda *a, **k: True)\ndef f(x): return 3",
        "assert math.isclose(f(2), 4)",
    ),
    (
        "imports and redefines math",
        "import math\nclass M:\n  isclose = lambda s, *a, **k: True\nmath = M()\ndef f(x): return 3",
        "assert math.isclose(f(2), 4)",
    ),
    (
        "imports another thing as math",
        "from unittest.mock import call as math\ndef f(x): return 3",
        "assert math.isclose(f(2), 4)",
    ),
    (
        "imports a built-in's name",
        "from operator import truth as abs, truth as len\ndef f(x): return 3",
        "assert len([f(2), 0]) == 1",
    ),
    ("imports what equals everything", "from unittest.mock import ANY as f", "assert f == 4"),
    ("imports the maker of such", "from unittest.mock import _ANY as f", "assert f() == 4"),
    ("imports a mock", "from unittest.mock import MagicMock as f", "assert f(2)\nassert f(2).x == 4"),
    ("imports fork", "from os import fork as f", "assert f() == 0"),
    (
        "answers from a fork, which is ahead of it",
        (
            "import os, time\ndef f(x):\n  child = os.fork() == 0\n  if not child: time.sleep(0.3)\n  return"
            " 4 if child else 5"
        ),
        DOUBLE,
    ),
    ("imports the end", "from os import _exit as f", "f(0)"),
    (
        "equals everything",
        (
            "class E:\n  __eq__ = lambda s, o: True\n  __ne__ = lambda s, o: False\n  __hash__ = lambda s:"
            " 0\ndef f(x): return E()"
        ),
        DOUBLE,
    ),
    (
        "equals everything, inside a list",
        "class E:\n  __eq__ = lambda s, o: True\ndef f(x): return [E(), (E(),)]",
        "assert f(2) == [4, (4,)]",
    ),
    *(
        (
            f"is a {kind} that equals everything",
            (
                f"class E({kind}):\n  __eq__ = lambda s, o: True\n"
                f"  __ne__ = lambda s, o: False\n  __hash__ = lambda s: 0\ndef f(x): return E({value})"
            ),
            f"assert f(2) == {right}\nassert not f(2) != {right}",
        )
        for kind, value, right in (
            ("int", "3", "4"),
            ("float", "3.5", "4.5"),
            ("str", "'x'", "'y'"),
            ("bytes", "b'x'", "b'y'"),
            ("list", "[3]", "[4]"),
            ("tuple", "(3,)", "(4,)"),
            ("set", "{3}", "{4}"),
            ("dict", "{1: 3}", "{1: 4}"),
            ("complex", "3j", "4j"),
        )
    ),
    (
        "has a class that lies",
        "class E:\n  __class__ = int\n  __eq__ = lambda s, o: True\ndef f(x): return E()",
        DOUBLE,
    ),
    (
        "has a class that equals",
        (
            "class M(type):\n  __eq__ = lambda s, o: True\n  __hash__ = lambda s: 0\nclass f(metaclass=M):\n "
            " def __init__(s, x): pass"
        ),
        DOUBLE,
    ),
    (
        "compares as it likes",
        (
            "class E:\n  __lt__ = __gt__ = __le__ = __ge__ = lambda s, o: True\n  __sub__ = __abs__ = lambda"
            " s, *o: s\ndef f(x): return E()"
        ),
        "assert abs(f(2) - 4) < 1e-6",
    ),
    (
        "contains everything",
        "class E:\n  __contains__ = lambda s, o: True\ndef f(x): return E()",
        "assert 4 in f(2)",
    ),
    (
        "iterates differently each time",
        "class E:\n  n = 0\n  def __iter__(s):\n    E.n += 1\n    return iter([E.n])\ndef f(x): return E()",
        "e = f(2)\nassert list(e) == [4] and list(e) == [4]",
    ),
    (
        "lies about its truth",
        "class E:\n  __bool__ = lambda s: 4\n  __len__ = lambda s: True\ndef f(x): return E()",
        "assert bool(f(2)) and f(2) == 4",
    ),
    (
        "lies about its length",
        (
            "class E(list):\n  __len__ = lambda s: 4\n  __iter__ = lambda s: iter([4])\n"
            "  __getitem__ = lambda s, i: 4\ndef f(x): return E([3])"
        ),
        "assert len(f(2)) == 4 and f(2)[0] == 4",
    ),
    ("returns a function of the tests", "def f(g): return g", "assert f(lambda: 4) == 4"),
    (
        "empties what is compared",
        "def f(xs, want):\n  xs.clear()\n  return xs",
        "xs, want = [3, 4], [4]\nassert f(xs, want) == want",
    ),
    (
        "runs under a tracer",
        "import sys\nsys.settrace(lambda *a: None)\nsys.setprofile(lambda *a: None)\ndef f(x): return 3",
        DOUBLE,
    ),
    (
        "kills threads",
        (
            "import threading, signal, _thread\ndef f(x):\n  _thread.interrupt_main()\n"
            "  signal.pthread_kill(threading.main_thread().ident, 2)\n  return 3"
        ),
        DOUBLE,
    ),
    (
        "changes integers",
        "import ctypes\ndef f(x):\n  ctypes.memmove(id(3) + 24, id(4) + 24, 4)\n  return 5",
        DOUBLE,
    ),
    (
        "breaks its memory",
        "import ctypes\ndef f(x): ctypes.memset(id(f), 0, 4096); ctypes.string_at(0)",
        DOUBLE,
    ),
]

SPYING = [
    (
        "finds the tests by the collector",
        SEARCH
        + "def f():\n  try:\n    for o in gc.get_objects(): search(repr(o)[:10**5])\n  except StopSearch as"
        " e: return str(e)\n",
        TOKEN,
    ),
    (
        "finds the tests in frames",
        SEARCH
        + lines("""
        def f():
            frame = sys._getframe()
            try:
                while frame:
                    search(repr(frame.f_locals) + repr(frame.f_globals) + repr(frame.f_code.co_consts))
                    frame = frame.f_back
            except StopSearch as found: return str(found)
     """),
        TOKEN,
    ),
    (
        "finds the tests in what is open",
        SEARCH
        + lines("""
        def f():
            try:
                for fd in range(64):
                    try:
                        os.set_blocking(fd, False)
                        search(os.read(fd, 2**20))
                        search(os.pread(fd, 2**20, 0))
                    except OSError: pass
            except StopSearch as found: return str(found)
     """),
        TOKEN,
    ),
    (
        "finds the tests in /proc",
        SEARCH
        + lines("""
        def f():
            try:
                patterns = "/proc/[0-9]*/*", "/proc/[0-9]*/fd/*", "/tmp/*", "/guest/*/*"
                for path in [path for pattern in patterns for path in glob.glob(pattern)]:
                    try:
                        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
                        search(os.read(fd, 2**20))
                    except OSError: pass
            except StopSearch as found: return str(found)
     """),
        TOKEN,
    ),
    (
        "finds the tests in memory",
        SEARCH
        + lines("""
        def f():
            try:
                for line in open("/proc/self/maps"):
                    low, high = (int(x, 16) for x in line.split()[0].split("-"))
                    if "rw" in line:
                        with open("/proc/self/mem", "rb") as memory:
                            memory.seek(low)
                            search(memory.read(min(high - low, 2**24)))
            except StopSearch as found: return str(found)
     """),
        TOKEN,
    ),
    (
        "patches the guest's values",
        lines("""
        import guest.values, guest.worker
        lie = lambda value, hold: ["y", "bool"]
        guest.values.dump = guest.worker.dump = lie
        def f(x): return 3
     """),
        DOUBLE,
    ),
    (
        "patches the guest's answers",
        lines("""
        import guest.worker
        guest.worker.Worker.answer = lambda self, message: {"value": True, "args": ["l", [["i", "2"]]]}
        def f(x): return 3
     """),
        DOUBLE,
    ),
    (
        "answers with what was asked",
        lines("""
        import guest.worker
        guest.worker.Worker.answer = lambda self, message: {"value": message["args"], "args": message["args"]}
        def f(x): return 3
     """),
        DOUBLE,
    ),
    (
        "patches the judge in itself",
        (
            "import guest.judge\nguest.judge.run_tests = lambda *a: None\nguest.judge.main = lambda: None\n"
            "def f(x): return 3"
        ),
        DOUBLE,
    ),
]

STAYING = [
    (
        "outlives its call",
        lines("""
        import os, time
        def f(x):
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    time.sleep(60)
                os._exit(0)
            return 3
     """),
        DOUBLE,
    ),
    (
        "outlives as another program",
        lines("""
        import os
        def f(x):
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    words = ["python", "-c", "import time; time.sleep(60)", "@MARK@"]
                    os.execve("/proc/self/exe", words, {"X": "@MARK@"})
                os._exit(0)
            return 3
     """),
        DOUBLE,
    ),
    (
        "outlives and ignores signals",
        lines("""
        import os, signal, time
        for number in range(1, 64):
            try: signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError): pass
        if os.fork() == 0:
            os.setsid()
            while True: time.sleep(60)
        def f(x): os._exit(0)
     """),
        DOUBLE,
    ),
]

ATTACKS = READING + WRITING + NETWORK + EXHAUSTING + PRIVILEGES + EXITS + FORGERIES + LIES + SPYING + STAYING


class Host:
    """What attacks reach for: a secret, files, sockets that answer, and a name for every process of
    theirs.
    """

    def __init__(self, folder):
        self.folder = folder
        self.mark = "uni" + secrets.token_hex(4)
        self.secret = "secret-" + secrets.token_hex(8)
        (folder / "secret.txt").write_text(self.secret)
        (folder / "secret.txt").chmod(0o666)
        self.sockets = [
            socket.create_server(("127.0.0.1", 0)),
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
        ]
        self.sockets[1].bind(("127.0.0.1", 0))
        for address in (str(folder / "socket"), "\0" + self.mark):
            self.sockets.append(socket.socket(socket.AF_UNIX))
            self.sockets[-1].bind(address)
            self.sockets[-1].listen()
        (folder / "socket").chmod(0o666)
        self.visits = 0
        self.values = {
            "PORT": self.sockets[0].getsockname()[1],
            "UDP": self.sockets[1].getsockname()[1],
            "WATCHED": folder,
            "HOME": Path.home(),
            "PROJECT": Path(__file__),
            "PID": os.getpid(),
            "MARK": self.mark,
            "SECRET": self.secret,
            "TOKEN": "token-" + secrets.token_hex(8),
        }
        self.open = True
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self):
        while self.open:
            for ready in select.select(self.sockets, [], [], 0.1)[0]:
                self.visits += 1
                if ready.type == socket.SOCK_DGRAM:
                    ready.sendto(b"pong", ready.recvfrom(9)[1])
                else:
                    ready.accept()[0].close()

    def close(self):
        self.open = False
        self.thread.join()
        for each in self.sockets:
            each.close()

    def programs(self):
        """The attacks with their values filled in.

        Their processes, and those that these start, carry mark and number as their name.
        """
        found = []
        for number, (_, code, tests) in enumerate(ATTACKS):
            code, tests = (
                re.sub("@([A-Z]+)@", lambda at: str(self.values[at[1]]), text) for text in (code, tests)
            )
            found.append(
                (
                    f"__import__('ctypes').CDLL(None).prctl(15, b'{self.mark}{number:03}', 0, 0, 0)\n{code}",
                    tests,
                )
            )
        return found

    def left(self):
        """Processes that carry the mark, in name, command or environment."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                text = b"".join((process / part).read_bytes() for part in ("comm", "cmdline"))
                with contextlib.suppress(OSError):
                    text += (process / "environ").read_bytes()
                if self.mark.encode() in text and int(process.name) != os.getpid():
                    found.append(text)
        return found

    def none_left_soon(self):
        until = time.monotonic() + 2
        while self.left() and time.monotonic() < until:
            time.sleep(0.05)
        return not self.left()

    def files(self):
        """Files that attacks might make or change, with their size."""
        places = [
            self.folder,
            Path("/dev/shm"),
            Path.home(),
            Path(sys.base_prefix),
            Path(os.__file__).parent,
            sandbox.GUEST,
        ]
        found = {
            path: path.lstat().st_size
            for path in (self.folder / "secret.txt", Path(__file__), *sandbox.GUEST.glob("*.py"))
        }
        for place in places:
            # Other programs may use these places too, so that only strange names count there.
            found |= {
                path: 0
                for path in place.glob("*" if place in (self.folder, sandbox.GUEST) else f"*{self.mark}*")
            }
        return found


@pytest.fixture(scope="module")
def host():
    """In a folder that every user of the machine may read and change."""
    folder = Path(tempfile.mkdtemp(prefix="unisd-sandbox-"))
    folder.chmod(0o777)
    host = Host(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNISD_TEST_KEY", host.secret)
        yield host
    host.close()
    shutil.rmtree(folder, ignore_errors=True)


def run_many(programs, workers, *limits):
    """The verdict of each program and its tests, `workers` of them at once."""
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda program: sandbox.run_program(*program, *limits), programs))


def children():
    """State of each child of this process."""
    states = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, parent, *_ = (process / "stat").read_text().rpartition(")")[2].split()
            if int(parent) == os.getpid():
                states[int(process.name)] = state
    return states


@pytest.fixture(scope="module")
def attacked(host):
    """The verdict of each attack, and what was so before and after all of them."""

    def state():
        return {
            "files": host.files(),
            "environment": dict(os.environ),
            "folder": Path.cwd(),
            "children": children(),
        }

    sandbox.check_isolation()
    before = state()
    verdicts = run_many(host.programs(), 4, TIMEOUT_S, MEMORY_MB)
    return {name: verdict for (name, _, _), verdict in zip(ATTACKS, verdicts, strict=True)}, before, state()


def test_the_suite_of_attacks_is_whole():
    """Names are unique, and so many that no group is lost."""
    names = [name for name, _, _ in ATTACKS]
    assert len(names) == len(set(names)) >= 140


@pytest.mark.parametrize("name", [name for name, _, _ in ATTACKS])
def test_attacks_fail(name, attacked):
    verdict = attacked[0][name]
    assert not verdict.passed, verdict
    assert verdict.reason in ("wrong", "error", "syntax", "timeout", "memory", "ended"), verdict
    assert verdict.detail.isprintable()
    assert verdict.seconds < TIMEOUT_S + 4


def test_attacks_leave_nothing_behind(host, attacked):
    _, before, after = attacked
    assert after == before
    assert host.none_left_soon(), host.left()
    assert host.visits == 0


# ---------------------------------------------------------------- as an ordinary user

DRIVER = lines("""
    import json, sys
    from concurrent.futures import ThreadPoolExecutor
    from unisd.tasks import sandbox
    given = json.load(open(sys.argv[1]))
    if sandbox.check_isolation() is not None:
        print(json.dumps({"cannot": sandbox.check_isolation()}))
        sys.exit()
    programs, limits = [tuple(p) for p in given["programs"]], (given["timeout_s"], given["memory_mb"])
    with ThreadPoolExecutor(4) as pool:
        verdicts = list(pool.map(lambda program: sandbox.run_program(*program, *limits), programs))
    print(json.dumps({"verdicts": [[v.passed, v.reason, v.detail, v.seconds] for v in verdicts]}))
""")


def ordinary_python():
    """A Python that user `NOBODY` can run."""
    for name in ("python3", "python3.11", "python3.12", "python3.13", "python3.14"):
        for folder in ("/usr/bin", "/usr/local/bin"):
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                question = "import sys; sys.exit(sys.version_info < (3, 11))"
                command = [f"{folder}/{name}", "-I", "-c", question]
                subprocess.run(
                    command,
                    check=True,
                    user=NOBODY,
                    group=NOBODY,
                    extra_groups=[],
                    cwd="/",
                    capture_output=True,
                )
                return command[0]
    return None


def test_attacks_fail_for_an_ordinary_user(host):
    """The other way of isolating: root needs no user namespace, ordinary users do."""
    if os.geteuid() == 0:
        python = ordinary_python()
        if python is None:
            pytest.skip("no Python >= 3.11 that an ordinary user can run")
        user = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
    else:
        python, user = sys.executable, {}
    before = host.files()
    package = host.folder / "library" / "unisd"
    source = sandbox.GUEST.parent
    shutil.copytree(source, package / "tasks/sandbox", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(source.parents[1] / "errors.py", package)
    for folder in (package, package / "tasks"):
        (folder / "__init__.py").touch()
    honest = [(code, tests) for _, code, tests in HONEST]
    attacks = host.programs()
    (package.parent / "driver.py").write_text(DRIVER)
    (package.parent / "given.json").write_text(
        json.dumps({"programs": honest + attacks, "timeout_s": TIMEOUT_S, "memory_mb": MEMORY_MB})
    )
    for path in (package.parent, *package.parent.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    done = subprocess.run(
        [python, "-B", "driver.py", "given.json"],
        cwd=package.parent,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(package.parent), "UNISD_TEST_KEY": host.secret},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        **user,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    if "cannot" in answer and os.geteuid() == 0:
        pytest.skip(f"ordinary users cannot isolate here: {answer['cannot']}")
    verdicts = answer["verdicts"]
    names = [name for name, _, _ in HONEST + ATTACKS]
    results = list(zip(names, verdicts, strict=True))
    assert not [result for result in results[: len(honest)] if not result[1][0]]
    assert not [result for result in results[len(honest) :] if result[1][0] or result[1][1] == "sandbox"]
    assert max(seconds for *_, seconds in verdicts) < TIMEOUT_S + 4
    assert host.none_left_soon(), host.left()
    assert host.visits == 0
    shutil.rmtree(package.parent)
    assert host.files() == before


# ---------------------------------------------------------------- machines that cannot isolate


@pytest.fixture
def no_isolation(monkeypatch):
    monkeypatch.setattr(sandbox, "check_isolation", lambda: "bubblewrap (bwrap) is not installed")


def test_check_says_what_is_missing(monkeypatch):
    assert sandbox.check_isolation() is None
    monkeypatch.setattr(sandbox, "which", lambda name: None)
    assert sandbox.check_isolation.__wrapped__() == "bubblewrap (bwrap) is not installed"
    monkeypatch.undo()
    monkeypatch.setattr(
        sandbox,
        "_isolation",
        lambda: ("/bin/sh", "-c", "echo 'No permissions to create namespaces' >&2; exit 1"),
    )
    assert (
        "cannot isolate here (No permissions to create namespaces)" in sandbox.check_isolation.__wrapped__()
    )


@pytest.mark.usefixtures("no_isolation")
def test_nothing_runs_without_isolation():
    with pytest.raises(UserError) as error:
        sandbox.run_program("x = 1", "")
    for part in (
        "bubblewrap (bwrap) is not installed",
        "apt install bubblewrap",
        "call unisd.tasks.sandbox.allow_unsafe(True)",
    ):
        assert part in str(error.value)


@pytest.mark.usefixtures("no_isolation")
@pytest.mark.parametrize(
    ("code", "tests", "reason"),
    [
        ("def f(x): return 2 * x", "assert f(2) == 4", "passed"),
        ("def f(xs): xs.sort()", "xs = [2, 1]\nf(xs)\nassert xs == [1, 2]", "passed"),
        ("def f(x): return x", "assert f(2) == 4", "wrong"),
        ("def f(x):\n  while True: pass", "assert f(2) == 4", "timeout"),
        ("import time\ndef f(x): time.sleep(60)", "assert f(2) == 4", "timeout"),
        ("x = bytearray(2**31)", "assert f(2) == 4", "memory"),
    ],
)
def test_unsafe_runs_keep_the_limits(code, tests, reason):
    verdict = sandbox.run_program(code, tests, TIMEOUT_S, MEMORY_MB, allow_unsafe=True)
    assert verdict.reason == reason, verdict
    assert verdict.passed == (reason == "passed")
    assert verdict.seconds < TIMEOUT_S + 4
    assert not children()


# ---------------------------------------------------------------- many programs


def test_many_at_once_are_fast_and_tidy(monkeypatch):
    real, lock, running, most = sandbox._run, threading.Lock(), [], []

    def counted(*args, **kwargs):
        with lock:
            running.append(1)
            most.append(len(running))
        try:
            return real(*args, **kwargs)
        finally:
            with lock:
                running.pop()

    sandbox.check_isolation()
    monkeypatch.setattr(sandbox, "_run", counted)
    programs = [(f"def f(): return {n if n % 3 else -1}", f"assert f() == {n}") for n in range(30)]
    programs[7] = ("import time\ndef f(): time.sleep(1); return 7", "assert f() == 7")
    files_before, children_before, start = (
        len(os.listdir("/proc/self/fd")),  # noqa: PTH208
        children(),
        time.monotonic(),
    )
    verdicts = run_many(programs, 2)
    assert [verdict.passed for verdict in verdicts] == [n % 3 != 0 for n in range(30)]
    assert max(most) == 2
    assert time.monotonic() - start < 30 / 150 * 60
    assert len(os.listdir("/proc/self/fd")) == files_before  # noqa: PTH208
    assert children() == children_before
