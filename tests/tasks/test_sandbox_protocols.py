"""Programs and tests that use more of Python than functions of plain data: right ones pass, and
none of it is a way to pass with a wrong one.
"""

import json
import textwrap
from pathlib import Path

import pytest

from unisd.tasks import sandbox
from unisd.tasks.graders import GRADERS

pytestmark = pytest.mark.sandbox

TABLES = Path(__file__).parent / "tables"
TIMEOUT_S = 4.0


def lines(text):
    return textwrap.dedent(text).strip() + "\n"


RIGHT = [
    (
        "operators",
        lines("""
class V:
 def __init__(s,x): s.x=x
 def __mul__(s,k): return V(s.x*k)
 __rmul__=__mul__
 def __eq__(s,o): return isinstance(o,V) and s.x==o.x
 def __abs__(s): return abs(s.x)
 def __lt__(s,o): return s.x<o.x
 def __hash__(s): return hash(s.x)
 def __neg__(s): return V(-s.x)
"""),
        lines("""
assert V(2)*3==V(6) and 3*V(2)==V(6)
assert abs(V(-3))==3
assert V(1)<V(2)
assert sorted([V(3),V(1)])[0]==V(1)
assert len({V(1),V(1)})==1
assert -V(1)==V(-1)
assert V(1)!=V(2)
v=V(1)
v*=2
assert v==V(2)
"""),
    ),
    (
        "operators with plain data",
        lines("""
class Money:
 def __init__(s,x): s.x=x
 def __eq__(s,o): return s.x==(o.x if isinstance(o,Money) else o)
 def __add__(s,o): return Money(s.x+(o.x if isinstance(o,Money) else o))
 __radd__=__add__
"""),
        lines("""
assert Money(5)==5 and Money(5)+3==8 and sum([Money(1),Money(2)])==3
"""),
    ),
    (
        "exception of its own",
        lines("""
class InsufficientFunds(ValueError):
 def __init__(s,need): super().__init__(f'need {need}'); s.need=need
def pay(x): raise InsufficientFunds(x)
"""),
        lines("""
try:
  pay(3)
  assert False
except InsufficientFunds as e:
  assert e.need==3 and str(e)=='need 3'
try:
  pay(3)
  assert False
except ValueError:
  pass
assert issubclass(InsufficientFunds, ValueError)
"""),
    ),
    (
        "pytest.raises",
        lines("""
class E(Exception): pass
def f(x):
 if x<0: raise E('neg')
 return x
"""),
        lines("""
import pytest
with pytest.raises(E, match='neg'):
  f(-1)
assert f(1)==1
"""),
    ),
    (
        "async function",
        lines("""
async def f(x):
 import asyncio
 await asyncio.sleep(0)
 return x*2
"""),
        lines("""
import asyncio
assert asyncio.run(f(2))==4
async def main():
  a,b=await asyncio.gather(f(1),f(2))
  assert (a,b)==(2,4)
asyncio.run(main())
"""),
    ),
    (
        "async test",
        lines("""
async def f(x): return x*2
"""),
        lines("""
async def test_f():
  assert await f(2)==4
"""),
    ),
    (
        "async generator",
        lines("""
async def g(n):
 for i in range(n): yield i
"""),
        lines("""
import asyncio
async def m():
  return [x async for x in g(3)]
assert asyncio.run(m())==[0,1,2]
"""),
    ),
    (
        "async with",
        lines("""
class R:
 async def __aenter__(s): return s
 async def __aexit__(s,*a): s.closed=True
 async def get(s): return 7
"""),
        lines("""
import asyncio
async def m():
  async with R() as r:
    assert await r.get()==7
  assert r.closed
asyncio.run(m())
"""),
    ),
    (
        "async callback",
        lines("""
async def retry(fn,n):
 for _ in range(n):
  try: return await fn()
  except ValueError: pass
"""),
        lines("""
import asyncio
calls=[]
async def fn():
  calls.append(1)
  if len(calls)<3: raise ValueError('x')
  return 'ok'
assert asyncio.run(retry(fn,5))=='ok' and len(calls)==3
"""),
    ),
    (
        "context manager function",
        lines("""
from contextlib import contextmanager
@contextmanager
def tag(xs,n):
 xs.append(n)
 yield n
 xs.append('/'+n)
"""),
        lines("""
xs=[]
with tag(xs,'a') as t:
  assert t=='a'

"""),
    ),
    (
        "with",
        lines("""
class T:
 def __enter__(s): s.on=True; return s
 def __exit__(s,*a): s.on=False; return True
"""),
        lines("""
with T() as t:
  assert t.on
  raise ValueError
assert not t.on
"""),
    ),
    (
        "send to a generator",
        lines("""
def g():
 got=[]
 while True:
  x=yield len(got)
  if x is None: return got
  got.append(x)
"""),
        lines("""
k=g()
assert next(k)==0
assert k.send(5)==1
try:
  k.send(None)
  assert False
except StopIteration as s:
  assert s.value==[5]
"""),
    ),
    (
        "iterator class",
        lines("""
class Fib:
 def __iter__(s): s.a,s.b=0,1; return s
 def __next__(s):
  if s.a>10: raise StopIteration
  r=s.a; s.a,s.b=s.b,s.a+s.b; return r
"""),
        lines("""
assert list(Fib())==[0,1,1,2,3,5,8]
it=iter(Fib())
assert next(it)==0 and next(it)==1
"""),
    ),
    (
        "decimals, fractions, dates",
        lines("""
from decimal import Decimal
from fractions import Fraction
import datetime as dt
def f(x): return Decimal('0.1')*x
def g(): return Fraction(1,3)
def h(d): return d+dt.timedelta(days=1)
"""),
        lines("""
from decimal import Decimal
from fractions import Fraction
from datetime import date, datetime, timezone
assert f(Decimal(3))==Decimal('0.3')
assert g()==Fraction(1,3)
assert h(date(2020,1,31))==date(2020,2,1)
assert h(datetime(2020,1,1,tzinfo=timezone.utc)).day==2
"""),
    ),
    (
        "collections",
        lines("""
from collections import *
P=namedtuple('P','x y')
def f(): return P(1,2)
def d(): return deque([1,2],maxlen=3)
def dd():
 r=defaultdict(list); r['a'].append(1); return r
def od(): return OrderedDict(a=1)
def c(): return Counter('aab')
"""),
        lines("""
from collections import *
p=f()
assert p.x==1 and p==(1,2) and p._asdict()=={'x':1,'y':2}
assert P(3,4).y==4 and P(3,4)==(3,4)
assert d()==deque([1,2]) and d().maxlen==3
assert dd()=={'a':[1]} and dd()['zz']==[]
assert od()==OrderedDict(a=1)
assert c().most_common(1)==[('a',2)]
assert f()==P(1,2)
x,y=f()
assert y==2
"""),
    ),
    (
        "enumerations",
        lines("""
from enum import *
class C(Enum):
 RED=1
 BLUE=2
class L(IntEnum):
 LOW=1
def f(): return C.RED
def g(): return L.LOW
def name(c): return c.name
"""),
        lines("""
assert f() is C.RED and f()==C.RED and f().name=='RED' and C(2)==C.BLUE and C['RED'].value==1
assert [c.name for c in C]==['RED','BLUE'] and len(C)==2
assert g()==1 and g().name=='LOW' and name(g())=='LOW' and g()==L.LOW
assert isinstance(f(), C)
"""),
    ),
    (
        "isinstance and type",
        lines("""
class A: pass
class B(A): pass
def mk(): return B()
"""),
        lines("""
assert isinstance(mk(),A) and isinstance(mk(),B) and issubclass(B,A)
assert type(mk()) is B and type(mk()).__name__=='B'
assert not isinstance(3,A)
assert mk().__class__ is B
"""),
    ),
    (
        "container",
        lines("""
class LRU:
 def __init__(s,n): s.d={}; s.n=n
 def __getitem__(s,k): return s.d[k]
 def __setitem__(s,k,v): s.d[k]=v
 def __delitem__(s,k): del s.d[k]
 def __contains__(s,k): return k in s.d
 def __len__(s): return len(s.d)
 def __iter__(s): return iter(s.d)
 def __repr__(s): return f'LRU({s.d})'
"""),
        lines("""
c=LRU(2)
c['a']=1
assert 'a' in c and 'b' not in c and len(c)==1
assert list(c)==['a'] and repr(c)=="LRU({'a': 1})" and f'{c}'=="LRU({'a': 1})"
del c['a']
assert not len(c)
try:
  c['q']
  assert False
except KeyError as e:
  assert e.args[0]=='q'
"""),
    ),
    (
        "subclasses of dict and list",
        lines("""
class Low(dict):
 def __setitem__(s,k,v): super().__setitem__(k.lower(),v)
 def __getitem__(s,k): return super().__getitem__(k.lower())
class Stk(list):
 def push(s,x): s.append(x)
"""),
        lines("""
d=Low()
d['A']=1
assert d['a']==1 and d['A']==1 and d=={'a':1} and len(d)==1
s=Stk()
s.push(1)
assert s==[1] and s[0]==1 and s.pop()==1
"""),
    ),
    (
        "decorator",
        lines("""
import functools
def timer(f):
 @functools.wraps(f)
 def w(*a,**k): return f(*a,**k)
 w.calls=3
 return w
"""),
        lines("""
@timer
def g(x):
  'doc'
  return x+1
assert g(1)==2 and g.__name__=='g' and g.calls==3 and g.__doc__=='doc'
"""),
    ),
    (
        "prints",
        lines("""
def hello(n): print('Hello,',n)
"""),
        lines("""
import io, contextlib
b=io.StringIO()
with contextlib.redirect_stdout(b):
  hello('x')
assert b.getvalue()=='Hello, x\\n'
"""),
    ),
    (
        "examples of its own that fail",
        lines("""
def f(x): return 2*x
assert f(2)==5
print(f('a'), open('nothing'))
"""),
        lines("""
assert f(2)==4
"""),
    ),
    (
        "TestCase",
        lines("""
def f(x): return 2*x
"""),
        lines("""
import unittest
class T(unittest.TestCase):
  def test_a(self):
    self.assertEqual(f(2),4)
    with self.assertRaises(TypeError): f(None)
if __name__=='__main__': unittest.main()
"""),
    ),
    (
        "parameters and test classes",
        lines("""
def f(x): return 2*x
"""),
        lines("""
import pytest
@pytest.mark.parametrize('a,b',[(1,2),(2,4)])
def test_f(a,b):
  assert f(a)==b
class TestIt:
  def test_x(self): assert f(0.1)==pytest.approx(0.2)
"""),
    ),
    (
        "check that nobody calls",
        lines("""
def f(x): return 2*x
"""),
        lines("""
def check(candidate):
  assert candidate(2)==4
"""),
    ),
    (
        "raise in else",
        lines("""
def f(x):
 if x<0: raise ValueError
 return x
"""),
        lines("""
try:
  f(-1)
except ValueError:
  pass
else:
  raise AssertionError('x')
"""),
    ),
    (
        "arrays",
        lines("""
import numpy as np
def f(n): return np.arange(n)
def g(a): a[0]=9
"""),
        lines("""
import numpy as np
assert (f(3)==np.array([0,1,2])).all() and f(3).shape==(3,) and f(3).sum()==3
a=np.zeros(2)
g(a)
assert a[0]==9
assert np.allclose(f(2),[0,1])
"""),
    ),
    (
        "identity",
        lines("""
import json
class Node:
 def __init__(s,v): s.v=v; s.next=None
def rev(h):
 p=None
 while h: h.next,p,h=p,h,h.next
 return p
"""),
        lines("""
a,b=Node(1),Node(2)
a.next=b
r=rev(a)
assert r is b and r.next is a and r.next.v==1 and a.next is None
"""),
    ),
    (
        "copies",
        lines("""
import copy
class B:
 def __init__(s): s.xs=[1]
 def __copy__(s): return B()
"""),
        lines("""
import copy
b=B()
c=copy.deepcopy(b)
assert c is not b and c.xs==[1]
"""),
    ),
    (
        "match object",
        lines("""
import re
def f(s): return re.match(r'(\\d+)',s)
"""),
        lines("""
assert f('12a').group(1)=='12' and f('x') is None
"""),
    ),
    (
        "endless generator",
        lines("""
def naturals():
 i=0
 while True:
  yield i
  i+=1
"""),
        lines("""
import itertools,types
g=naturals()
assert isinstance(g,types.GeneratorType)
assert list(itertools.islice(g,5000))[-1]==4999 and sum(1 for _ in zip(range(3),g))==3
"""),
    ),
    (
        "ordered dataclass",
        lines("""
from dataclasses import dataclass, field
@dataclass(order=True)
class P:
 x:int=0
 tags:list=field(default_factory=list)
"""),
        lines("""
assert P(1)<P(2) and P(1,['a']).tags==['a'] and repr(P(1))=='P(x=1, tags=[])'
assert max(P(1),P(3)).x==3 and P()==P()
"""),
    ),
    (
        "imports what is tested",
        lines("""
from math import gcd
"""),
        lines("""
assert gcd(12,8)==4
"""),
    ),
    (
        "abstract class",
        lines("""
from abc import ABC, abstractmethod
class S(ABC):
 @abstractmethod
 def area(s): ...
class Q(S):
 def __init__(s,a): s.a=a
 def area(s): return s.a**2
 @property
 def side(s): return s.a
 @staticmethod
 def unit(): return Q(1)
"""),
        lines("""
assert Q(2).area()==4 and Q(2).side==2 and Q.unit().area()==1
try:
  S()
  assert False
except TypeError:
  pass
"""),
    ),
    (
        "views of a dict",
        lines("""
def f(d): return d.keys(), d.items()
"""),
        lines("""
k,i=f({'a':1})
assert list(k)==['a'] and set(k)=={'a'} and dict(i)=={'a':1}
"""),
    ),
    (
        "closures",
        lines("""
def f(x): return lambda y: x+y
"""),
        lines("""
assert f(1)(2)==3 and callable(f(1)) and list(map(f(1),[1,2]))==[2,3]
"""),
    ),
    (
        "TestCase with contexts",
        lines("""
def div(a,b):
 if b==0: raise ZeroDivisionError('no')
 return a/b
"""),
        lines("""
import unittest
class T(unittest.TestCase):
  def setUp(self): self.a=1
  def test(self):
    self.assertAlmostEqual(div(self.a,3),0.3333333,places=5)
    with self.assertRaises(ZeroDivisionError) as c: div(1,0)
    self.assertEqual(str(c.exception),'no')
    self.assertRaisesRegex(ZeroDivisionError,'n',div,1,0)
    self.assertIsInstance(div(1,2),float)
"""),
    ),
]

RIGHT += [
    (
        "nodes that the tests define",
        "def rev(n):\n  p = None\n  while n: n.next, p, n = p, n, n.next\n  return p\n"
        "def inorder(n): return [] if n is None else inorder(n.l) + [n.v] + inorder(n.r)\n",
        "class Node:\n  def __init__(s, v, n=None, l=None, r=None): s.v, s.next, s.l, s.r = v, n, l, r\n"
        "a = Node(1, Node(2))\nb = rev(a)\nassert b.v == 2 and b.next is a and a.next is None\n"
        "assert inorder(Node(2, None, Node(1), Node(3))) == [1, 2, 3]",
    ),
    (
        "errors of the library, a deque in place",
        "import json\ndef f(s): return json.loads(s)\ndef g(d): d.appendleft(0)\n",
        "import json\nfrom collections import deque\ntry:\n  f('{')\n  assert False\n"
        "except json.JSONDecodeError:\n  pass\nd = deque([1])\ng(d)\nassert d == deque([0, 1])",
    ),
    (
        "reads a number first",
        "import pytest\ndef f(x): return 2 * x\nn = int(input())\nprint(f(n))\ndef test_f(): f(1)\n",
        "assert f(2) == 4",
    ),
    (
        "a fluent object and one in another",
        "class B:\n  def __init__(s): s.xs = []\n  def add(s, x): s.xs.append(x); return s\n",
        "b = B()\nassert b.add(1).add(2) is b and b.xs == [1, 2]\nassert b is not B()",
    ),
]

# The last ten assert nothing.
WRONG = [
    (
        "own object that equals everything",
        lines("""
class Money:
 def __init__(s,x): pass
 def __eq__(s,o): return True
"""),
        lines("""
assert Money(5)==5
"""),
    ),
    (
        "pytest.raises",
        lines("""
class E(Exception): pass
def f(x): return x
"""),
        lines("""
import pytest
with pytest.raises(E):
  f(-1)
"""),
    ),
    (
        "one of the parameters",
        lines("""
def f(x): return 2*x if x<2 else 0
"""),
        lines("""
import pytest
@pytest.mark.parametrize('a,b',[(1,2),(2,4)])
def test_f(a,b):
  assert f(a)==b
"""),
    ),
    (
        "expected exception that any will do for",
        lines("""
def f(x): return x
"""),
        lines("""
try:
  f(-1)
  assert False
except Exception:
  pass
"""),
    ),
    (
        "failure swallowed",
        lines("""
def f(x): return x
"""),
        lines("""
try:
  assert f(2)==4
except:
  pass
assert f(1)==1
"""),
    ),
    (
        "assertion about a tuple",
        lines("""
def f(x): return x
"""),
        lines("""
assert (f(2)==4, 'no')
"""),
    ),
    (
        "or True",
        lines("""
def f(x): return x
"""),
        lines("""
assert f(2)==4 or True
"""),
    ),
    (
        "comment",
        lines("""
def f(x): return x
"""),
        lines("""
# nothing
"""),
    ),
    (
        "if False",
        lines("""
def f(x): return x
"""),
        lines("""
if False:
  assert f(2)==4
"""),
    ),
    (
        "empty loop",
        lines("""
def f(x): return x
"""),
        lines("""
for t in []:
  assert f(t)==4
"""),
    ),
    (
        "assert True",
        lines("""
def f(x): return x
"""),
        lines("""
assert True
"""),
    ),
    (
        "about nothing",
        lines("""
def f(x): return x
"""),
        lines("""
assert 1==1
"""),
    ),
    (
        "suppressed",
        lines("""
def f(x): return x
"""),
        lines("""
import contextlib
with contextlib.suppress(AssertionError):
  assert f(2)==4
"""),
    ),
    (
        "function that is not a test",
        lines("""
def f(x): return x
"""),
        lines("""
def t():
  assert f(2)==4
"""),
    ),
    (
        "test without assertion",
        lines("""
def f(x): return x
"""),
        lines("""
def test_a(): return f(2)==4
"""),
    ),
]

NODE = "class N:\n def __init__(s): s.v = 4\n def ok(s): return False\nn = N()\n"
ATTACKS = [
    *(
        (
            f"reaches through an object of the tests: {name}",
            f"def f(n, *a):\n  try: return {expression}\n  except AttributeError: return 3",
            f"{NODE}assert f(n) == 5",
        )
        for name, expression in (
            ("class", "5 if n.__class__.__name__ == 'N' else 3"),
            ("dict", "n.__dict__['v'] == 4 and 5"),
            ("globals", "n.ok.__globals__ and 5"),
            ("self", "n.ok.__self__ and 5"),
            ("code", "n.ok.__func__.__code__ and 5"),
        )
    ),
    (
        "replaces a method of the tests",
        "def f(n):\n  try: n.ok = lambda: True\n  except AttributeError: pass",
        f"{NODE}f(n)\nassert n.ok()",
    ),
    (
        "reaches into a function of the tests",
        "def f(g):\n  try: return g.limit\n  except AttributeError: return 3",
        "def g(): pass\ng.limit = 4\nassert f(g) == 4",
    ),
    (
        "equals all integers",
        lines("""
class Money:
 def __init__(s, x): pass
 def __eq__(s, o): return isinstance(o, int)
"""),
        lines("""
assert Money(5) == 5
"""),
    ),
    (
        "says that it is one of its own",
        lines("""
class M(type):
 __instancecheck__ = __subclasscheck__ = lambda s, o: True
class Box(metaclass=M): pass
def make(): return 3
"""),
        lines("""
assert isinstance(make(), Box)
"""),
    ),
    (
        "a date that equals everything",
        lines("""
from datetime import date
class D(date):
 __eq__ = lambda s, o: True
 __hash__ = lambda s: 0
def f(): return D(2020, 1, 1)
"""),
        lines("""
from datetime import date
assert f() == date(2021, 1, 1)
"""),
    ),
    (
        "a Decimal that equals everything",
        lines("""
from decimal import Decimal
class D(Decimal):
 __eq__ = lambda s, o: True
 __hash__ = lambda s: 0
def f(): return D(3)
"""),
        lines("""
from decimal import Decimal
assert f() == Decimal(4)
"""),
    ),
    (
        "a Counter that equals everything",
        lines("""
from collections import Counter
class D(Counter):
 __eq__ = lambda s, o: True
def f(): return D('a')
"""),
        lines("""
from collections import Counter
assert f() == Counter('b')
"""),
    ),
    (
        "a named tuple that equals everything",
        lines("""
from collections import namedtuple
class P(namedtuple('P', 'x y')):
 __eq__ = lambda s, o: True
 __hash__ = lambda s: 0
def f(): return P(1, 2)
"""),
        lines("""
assert f() == (3, 4)
"""),
    ),
    (
        "a member that equals everything",
        lines("""
from enum import IntEnum
class C(IntEnum):
 A = 1
 __eq__ = lambda s, o: True
 __hash__ = lambda s: 0
def f(): return C.A
"""),
        lines("""
assert f() == 4
"""),
    ),
    (
        "an array that equals everything",
        lines("""
import numpy as np
class A(np.ndarray):
 __eq__ = lambda s, o: np.array([True])
def f(): return np.array([3]).view(A)
"""),
        lines("""
import numpy as np
assert (f() == np.array([4])).all()
"""),
    ),
    (
        "an array of liars",
        lines("""
import numpy as np
class L:
 __eq__ = lambda s, o: True
def f(): return np.array([L()], dtype=object)
"""),
        lines("""
import numpy as np
assert (f() == np.array([4])).all()
"""),
    ),
    (
        "another numpy",
        lines("""
import sys, types
class A:
 dtype = types.SimpleNamespace(str='<i8')
 shape = (1,)
 tobytes = lambda s: b'x'
A.__module__ = 'numpy'
sys.modules['numpy'] = types.SimpleNamespace(ndarray=A, generic=A)
def f(): return A()
"""),
        lines("""
import numpy as np
assert (f() == np.array([4])).all()
"""),
    ),
    (
        "ends loops by its own StopIteration",
        lines("""
class S(StopIteration): pass
def f(x): raise S
"""),
        lines("""
assert all(map(lambda x: f(x) == 2 * x, [1, 2]))
"""),
    ),
    (
        "ends by its own SystemExit",
        lines("""
class S(SystemExit): pass
def f(x): raise S(0)
"""),
        lines("""
assert f(2) == 4
"""),
    ),
    (
        "leaves while it is imported",
        lines("""
import sys
def f(x): return 2 * x
sys.exit(0)
"""),
        lines("""
assert f(2) == 4
"""),
    ),
    (
        "raises a ValueError of its own",
        lines("""
class ValueError(Exception): pass
def f(x): raise ValueError
"""),
        lines("""
try:
 f(2)
 assert False
except ValueError:
 pass
assert True
"""),
    ),
    (
        "raises AssertionError",
        lines("""
def f(x): raise AssertionError('passed')
"""),
        lines("""
assert f(2) == 4
"""),
    ),
    (
        "an exception whose text fails",
        lines("""
class E(Exception):
 def __str__(s): raise SystemExit
def f(x): raise E
"""),
        lines("""
assert f(2) == 4
"""),
    ),
    (
        "swallows a failure of the tests",
        lines("""
def run(g):
 try: g()
 except BaseException: pass
def f(x): return x
"""),
        lines("""
def case():
 assert f(2) == 4
run(case)
assert f(1) == 1
"""),
    ),
    (
        "swallows it in a generator",
        lines("""
from contextlib import contextmanager
@contextmanager
def quiet():
 try: yield
 except BaseException: pass
def f(x): return x
"""),
        lines("""
with quiet():
 assert f(2) == 4
assert f(1) == 1
"""),
    ),
    (
        "swallows it asynchronously",
        lines("""
class Q:
 async def __aenter__(s): return s
 async def __aexit__(s, *a): return True
def f(x): return x
"""),
        lines("""
import asyncio
async def m():
 async with Q():
  assert f(2) == 4
asyncio.run(m())
assert f(1) == 1
"""),
    ),
    (
        "patches unittest",
        lines("""
import unittest
unittest.TestCase.assertEqual = unittest.TestCase.run = lambda *a, **k: None
sys = __import__('sys')
sys.modules['unittest'] = sys.modules['pytest'] = None
def f(x): return x
"""),
        lines("""
import unittest
class T(unittest.TestCase):
 def test(self): self.assertEqual(f(2), 4)
"""),
    ),
    (
        "prints a verdict",
        lines("""
import os
def f(x):
 print('["passed", ""]' * 10**5)
 for fd in range(64):
  try: os.set_blocking(fd, False); os.write(fd, b'["passed",""]\\n')
  except OSError: pass
 return 3
"""),
        lines("""
import io, contextlib
with contextlib.redirect_stdout(io.StringIO()):
 assert f(2) == 4
"""),
    ),
    (
        "hides behind main",
        lines("""
import unittest
def f(x): return x
"""),
        lines("""
import unittest
class T(unittest.TestCase):
 def test(self): self.assertEqual(f(2), 4)
if __name__ == '__main__': unittest.main(exit=False)
"""),
    ),
    (
        "yields without end",
        lines("""
def f(x):
 while True: yield 4
"""),
        lines("""
assert list(f(2)) == [4]
"""),
    ),
    (
        "waits without end",
        lines("""
async def f(x):
 import asyncio
 await asyncio.sleep(100)
"""),
        lines("""
import asyncio
assert asyncio.run(f(2)) is None
"""),
    ),
    (
        "recurses",
        lines("""
def f(x): return f(x)
"""),
        lines("""
assert f(2) == 4
"""),
    ),
    (
        "looks for the judge",
        lines("""
import gc, inspect, sys
def f(x):
 for o in gc.get_objects():
  if isinstance(o, dict) and '__held__' in o: return 4
 frame = inspect.currentframe()
 while frame:
  if '__held__' in frame.f_globals: return 4
  frame = frame.f_back
"""),
        lines("""
assert f(2) == 4
"""),
    ),
    (
        "counts for the tests",
        lines("""
import builtins
builtins.__held__ = lambda *a: None
def __held__(*a): return True
def __same__(*a): return True
def __type__(*a): return int
def f(x): return 3
"""),
        lines("""
x = [4]
assert f(2) is x
assert type(f(2)) is str
"""),
    ),
]

LIAR = lines("""
class L:
 __eq__ = lambda s, o: True
 __ne__ = lambda s, o: False
 __hash__ = lambda s: 4
 __lt__ = __gt__ = __le__ = __ge__ = __contains__ = lambda s, o: True
 __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __mod__ = lambda s, *o: 0
 __iter__ = lambda s: iter([s])
 __len__ = lambda s: 1
 __getitem__ = lambda s, k: s
 __call__ = lambda s, *a: s
 __enter__ = lambda s: s
 __exit__ = lambda s, *a: True
 __getattr__ = lambda s, n: s
 __instancecheck__ = lambda s, o: True
 __abs__ = __neg__ = __round__ = lambda s, *a: s

""")

LIARS = [
    (
        "liar, Decimal",
        lines("""
def f(*a): return L()
"""),
        lines("""
from decimal import Decimal
assert f(2) == Decimal(4)
"""),
    ),
    (
        "liar, date",
        lines("""
def f(*a): return L()
"""),
        lines("""
from datetime import date
assert date(2020, 1, 1) == f()
"""),
    ),
    (
        "liar, in a set",
        lines("""
def f(*a): return L()
"""),
        lines("""
assert f(2) in {4}
"""),
    ),
    (
        "liar, key of a dict",
        lines("""
def f(*a): return L()
"""),
        lines("""
assert {4: 1}[f(2)] == 1
"""),
    ),
    (
        "liar, contains",
        lines("""
def f(*a): return L()
"""),
        lines("""
assert 4 in f(2)
"""),
    ),
    (
        "liar, in a list",
        lines("""
def f(*a): return L()
"""),
        lines("""
assert f(2) in [4]
"""),
    ),
    (
        "liar, between",
        lines("""
def f(*a): return L()
"""),
        lines("""
assert 3 < f(2) < 5
"""),
    ),
    (
        "liar, subtracted",
        lines("""
def f(*a): return L()
"""),
        lines("""
assert abs(f(2) - 4) < 1e-6
"""),
    ),
    (
        "liar, subtracted from",
        lines("""
def f(*a): return L()
"""),
        lines("""
assert 4 - f(2) == 0
"""),
    ),
    (
        "liar, remainder",
        lines("""
def f(*a): return L()
"""),
        lines("""
assert f(2) % 4 == 0
"""),
    ),
    (
        "liar, summed",
        lines("""
def f(*a): return L()
"""),
        lines("""
assert sum([f(2)]) == 0
"""),
    ),
    (
        "liar, rounded",
        lines("""
def f(*a): return L()
"""),
        lines("""
assert round(f(2), 2) == 4
"""),
    ),
    (
        "liar, iterated",
        lines("""
def f(*a): return L()
"""),
        lines("""
assert list(f(2)) == [4]
"""),
    ),
    (
        "liar, called",
        lines("""
def f(*a): return L()
"""),
        lines("""
assert f(2)(3) == 4
"""),
    ),
    (
        "liar, item",
        lines("""
def f(*a): return L()
"""),
        lines("""
assert f(2)[0] == 4
"""),
    ),
    (
        "liar, attribute",
        lines("""
def f(*a): return L()
"""),
        lines("""
assert f(2).x == 4
"""),
    ),
    (
        "liar, assertEqual",
        lines("""
def f(*a): return L()
"""),
        lines("""
import unittest
class T(unittest.TestCase):
 def test(self): self.assertEqual(f(2), 4)
"""),
    ),
    (
        "liar, assertAlmostEqual",
        lines("""
def f(*a): return L()
"""),
        lines("""
import unittest
class T(unittest.TestCase):
 def test(self): self.assertAlmostEqual(f(2), 4)
"""),
    ),
    (
        "liar, approx",
        lines("""
def f(*a): return L()
"""),
        lines("""
import pytest
assert f(2) == pytest.approx(4)
"""),
    ),
    (
        "liar, isclose",
        lines("""
def f(*a): return L()
"""),
        lines("""
import math
assert math.isclose(f(2), 4)
"""),
    ),
    (
        "liar, array",
        lines("""
def f(*a): return L()
"""),
        lines("""
import numpy as np
assert (np.array([4]) == f(2)).all()
"""),
    ),
    (
        "liar, allclose",
        lines("""
def f(*a): return L()
"""),
        lines("""
import numpy as np
assert np.allclose(f(2), [4.0])
"""),
    ),
    (
        "liar, swallows the tests' failure",
        lines("""
def f(*a): return L()
"""),
        lines("""
with f():
 assert 3 == f(2)
"""),
    ),
    (
        "liar, of a method",
        lines("""
class Box:
 def __init__(s, x): pass
 def get(s): return L()
"""),
        lines("""
assert Box(2).get() == 4
"""),
    ),
    (
        "liar, of a property",
        lines("""
class Box:
 x = L()
"""),
        lines("""
assert Box().x == 4
"""),
    ),
    (
        "liar, awaited",
        lines("""
async def f(x): return L()
"""),
        lines("""
import asyncio
assert asyncio.run(f(2)) == 4
"""),
    ),
    (
        "liar, yielded",
        lines("""
def f(x): yield L()
"""),
        lines("""
assert next(f(2)) == 4
"""),
    ),
    (
        "liar, yielded asynchronously",
        lines("""
async def f():
 yield L()
"""),
        lines("""
import asyncio
async def m():
 return [x async for x in f()]
assert asyncio.run(m()) == [4]
"""),
    ),
    (
        "liar, in an exception",
        lines("""
def f(x): raise ValueError(L())
"""),
        lines("""
try:
 f(2)
 assert False
except ValueError as e:
 assert e.args == (4,)
"""),
    ),
    (
        "liar, on an exception",
        lines("""
class E(Exception):
 code = L()
def f(x): raise E()
"""),
        lines("""
try:
 f(2)
 assert False
except E as e:
 assert e.code == 4
"""),
    ),
    (
        "liar, in a Counter",
        lines("""
from collections import Counter
def f(): return Counter(a=L())
"""),
        lines("""
assert f()['a'] == 4
"""),
    ),
    (
        "liar, in a deque",
        lines("""
from collections import deque
def f(): return deque([L()])
"""),
        lines("""
from collections import deque
assert f() == deque([4])
"""),
    ),
    (
        "liar, made by a class",
        lines("""
class Money(L):
 def __init__(s, x): pass
"""),
        lines("""
assert Money(5) == 5
"""),
    ),
]

FORGED = [
    '["w",0,["q"]]',
    '["w","x",true]',
    '["w",0,["l",[["h",0]]]]',
    '["v","os.system",["touch /tmp/x"]]',
    '["v","decimal.Decimal",[["y","int"]]]',
    '["v","builtins.eval",["4"]]',
    '["N","|O8",null,"00"]',
    '["N","<i8",[["i","1"]],"00"]',
    '["x",0,"E",["SystemExit"]]',
    '["x",0,3,7]',
    '["X",{"class":"SystemExit","args":["t",[]],"text":"","on":0}]',
    '["X",3]',
    '["n","x"]',
    '["n",0]',
    '["a",0]',
    '["A",-1]',
    '["g",0]',
    '["h",[]]',
]


def marked(rows):
    return [pytest.param(*rest, id=name) for name, *rest in rows]


@pytest.mark.parametrize(("code", "tests"), marked(RIGHT))
def test_right_programs_pass(code, tests):
    verdict = sandbox.run_program(code, tests, 20.0)
    assert (verdict.passed, verdict.reason, verdict.detail) == (True, "passed", "")


@pytest.mark.parametrize(
    ("code", "tests"), marked(WRONG + ATTACKS + [(name, LIAR + code, tests) for name, code, tests in LIARS])
)
def test_wrong_programs_do_not_pass(code, tests):
    verdict = sandbox.run_program(code, tests, TIMEOUT_S, 512)
    assert not verdict.passed and verdict.reason != "sandbox", verdict
    assert verdict.seconds < TIMEOUT_S + 4


@pytest.mark.parametrize("value", FORGED)
def test_forged_values_do_not_pass(value):
    message = b'{"args":["l",[["i","2"]]],"value":' + value.encode() + b"}\n"
    code = (
        f"import os\nMESSAGE = {message!r}\ndef f(x=None):\n  for fd in range(3, 64):\n    try:\n"
        "      os.set_blocking(fd, False)\n      os.write(fd, MESSAGE)\n"
        "    except OSError: pass\n  return 3"
    )
    verdict = sandbox.run_program(code, "assert f(2) == 4\nassert f(5) == 10", TIMEOUT_S, 512)
    assert not verdict.passed and verdict.reason != "sandbox", verdict


@pytest.mark.parametrize(("code", "tests"), marked(WRONG[5:]))
def test_what_asserts_nothing_is_said(code, tests):
    verdict = sandbox.run_program(code, tests, TIMEOUT_S)
    assert verdict.reason == "untested"
    assert verdict.detail in ("the tests asserted nothing", "the tests use nothing that the program defines")


def test_a_test_that_cannot_be_called_is_named():
    verdict = sandbox.run_program("def f(x): return x", "def test_f(tmp_path):\n  assert f(1) == 1")
    assert (verdict.reason, verdict.detail) == ("untested", "test_f takes what nobody gives: tmp_path")


def rows_of(name):
    table = json.loads((TABLES / f"{name}.json").read_text())
    return [pytest.param(*row[:3], id=row[3] or None) for row in table["rows"]]


@pytest.mark.parametrize(("gold", "completion", "right"), rows_of("code-extraction") + rows_of("code-tests"))
def test_a_table_of_verdicts(gold, completion, right):
    assert GRADERS["code"](completion, gold).correct is right
