"""What the tests hold in their hands: objects of the code's, reached over the channel.

An object of the code's answers for itself where the tests ask it about itself or about another such
object: calls, attributes, items, length, iteration, `with`, `await`, operators, comparisons. Where
they hold it against plain data it is not asked: it would be told the value that is expected, and
could say yes. So it equals no plain data, contains none but what it iterates over, and adds to
none. The exception is what the tests made themselves, by calling a class, a name that begins with
a capital letter: its operators are what is tested. And what equals other things too (`_decoys`)
equals nothing.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator
from typing import TYPE_CHECKING, Any

from .protocols import ARITHMETIC, COMPARISONS, CONVERSIONS

if TYPE_CHECKING:
    from .judge import Judge

ONE_BY_ONE, AT_ONCE = 64, 1024  # after so many items of an iterator, so many are fetched at a time
ASKED = ("__name__", "__qualname__", "__module__", "__doc__", "__dict__", "__annotations__", "__wrapped__")


class Remote:
    """An object of the worker's. `_own`: made by the tests; `_makes`: a class that they name."""

    __slots__ = ("_judge", "_makes", "_number", "_own")

    def __init__(self, judge: Judge, number: int, own: bool = False, makes: bool = False) -> None:
        for name, value in (("_judge", judge), ("_number", number), ("_own", own), ("_makes", makes)):
            object.__setattr__(self, name, value)

    def _ask(self, op: str, *args: Any, **kwargs: Any) -> Any:
        return self._judge.ask(op, self._number, list(args), kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        value = self._ask("call", *args, **kwargs)
        return _owned(value) if self._makes else value

    def __getattribute__(self, name: str) -> Any:
        if name in ASKED:
            return object.__getattribute__(self, "_ask")("get", name)
        return object.__getattribute__(self, name)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)  # protocols that a plain object does not have
        return self._ask("get", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("set", name, value)

    def __delattr__(self, name: str) -> None:
        self._ask("del", name)

    def __getitem__(self, key: Any) -> Any:
        return self._ask("getitem", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._ask("setitem", key, value)

    def __delitem__(self, key: Any) -> None:
        self._ask("delitem", key)

    def __iter__(self) -> Any:
        return _iterator(self._ask("iter"))

    def __reversed__(self) -> Any:
        return _iterator(self._ask("reversed"))

    def __next__(self) -> Any:
        items, ended, _ = taken(self._ask("take", 1))
        if ended:
            raise StopIteration
        return items[0]

    def __contains__(self, item: Any) -> bool:
        if self._own or number_of(item) is not None:
            return exactly(bool, self._ask("contains", item))  # type: ignore[no-any-return]
        return any(item is each or item == each for each in self)

    def __eq__(self, other: object) -> bool:
        number = number_of(other)
        if number == self._number:
            return True
        if number is None and not self._own:
            return False
        return exactly(bool, self._ask("eq", other)) and not any(map(self._equals_too, _decoys(other)))

    def _equals_too(self, other: Any) -> bool:
        try:
            return bool(self._ask("eq", other))
        except Exception:
            return False

    def __hash__(self) -> int:
        return exactly(int, self._ask("hash"))  # type: ignore[no-any-return]

    def __instancecheck__(self, value: object) -> bool:
        if number_of(value) is None:
            return False
        return exactly(bool, self._ask("isinstance", value))  # type: ignore[no-any-return]

    def __subclasscheck__(self, value: object) -> bool:
        if number_of(value) is None:
            return False
        return exactly(bool, self._ask("issubclass", value))  # type: ignore[no-any-return]

    def __enter__(self) -> Any:
        return self._ask("enter")

    def __exit__(self, kind: Any, error: Any, trace: Any) -> Any:
        return _swallowed(self._ask("exit", *told(error)), error)

    async def __aenter__(self) -> Any:
        return self._ask("aenter")

    async def __aexit__(self, kind: Any, error: Any, trace: Any) -> Any:
        return _swallowed(self._ask("aexit", *told(error)), error)

    def __await__(self) -> Any:
        return self._ask("await")
        yield

    def __aiter__(self) -> Any:
        found = self._ask("aiter")
        return async_generator(found) if type(found) is Remote else found

    async def __anext__(self) -> Any:
        if not (found := exactly(list, self._ask("anext"))):
            raise StopAsyncIteration
        return found[0]

    def __deepcopy__(self, memo: Any) -> Any:
        copied = self._ask("deepcopy")
        return _owned(copied) if self._own else copied


def exactly(kind: type | None, value: Any) -> Any:
    if kind is not None and type(value) is not kind:
        raise TypeError(f"the code's object gave {type(value).__name__} where {kind.__name__} is due")
    return value


def number_of(value: object) -> int | None:
    """The number of what is the code's, None for what is the tests' or plain data."""
    if type(value) is Remote:
        found = value._number
    elif isinstance(value, type):
        found = vars(value).get("_number")
    else:
        remote = getattr(value, "__dict__", {}).get("_remote")
        found = remote._number if type(remote) is Remote else None
    return found if type(found) is int else None


def _owned(value: Any) -> Any:
    return Remote(value._judge, value._number, own=True) if type(value) is Remote else value


def _stranger() -> None:
    """Equals nothing of the code's."""


def _decoys(value: Any) -> list[Any]:
    """What is not `value`: something else altogether, and its neighbour."""
    if isinstance(value, (int, float, complex)):
        return [_stranger, value + 1]
    if type(value) in (list, tuple):
        return [_stranger, value + type(value)(["x"])]
    return [_stranger, value + "x"] if type(value) is str else [_stranger]


def same(one: Any, other: Any) -> bool:
    """`one is other`: an object of the code's may be here more than once."""
    return one is other or (number_of(one) is not None and number_of(one) == number_of(other))


def told(error: BaseException | None) -> tuple[Any, ...]:
    """An exception of the tests', as the code is told of it: class, text, and its number if it is
    the code's own.
    """
    return () if error is None else (type(error).__name__, str(error)[:500], number_of(error))


def of_the_tests(error: BaseException | None) -> bool:
    """Whether an assertion of the tests has failed: nothing of the code's may catch that."""
    return isinstance(error, AssertionError) and "_remote" not in error.__dict__


def _swallowed(answer: Any, error: BaseException | None) -> bool:
    return answer is True and isinstance(error, Exception) and not of_the_tests(error)


def _between(op: str, one: Remote, other: Any) -> Any:
    """An operator between an object of the code's and anything."""
    if number_of(other) is None and not one._own:
        return NotImplemented
    value = one._ask(op, other)
    return _owned(value) if one._own and (type(other) is not Remote or other._own) else value


def _conversion(name: str, kind: type | None) -> Callable[..., Any]:
    def convert(self: Remote, *args: Any) -> Any:
        value = exactly(kind, self._ask(name, *args))
        return _owned(value) if self._own else value

    return convert


def _direct(op: str) -> Callable[[Remote, Any], Any]:
    return lambda self, other: _between(op, self, other)


def _reflected(op: str) -> Callable[[Remote, Any], Any]:
    return lambda self, other: _between(f"r{op}", self, other)


def _comparison(op: str) -> Callable[[Remote, Any], Any]:
    def compare(self: Remote, other: Any) -> Any:
        value = _between(op, self, other)
        return value if value is NotImplemented else exactly(bool, value)

    return compare


for _name, (_, _kind) in CONVERSIONS.items():
    setattr(Remote, f"__{_name}__", _conversion(_name, _kind))
for _name in ARITHMETIC:
    _bare = _name.rstrip("_")
    setattr(Remote, f"__{_bare}__", _direct(_bare))
    setattr(Remote, f"__r{_bare}__", _reflected(_bare))
    setattr(Remote, f"__i{_bare}__", _direct(f"i{_bare}"))
for _name in COMPARISONS:
    setattr(Remote, f"__{_name}__", _comparison(_name))


# ---------------------------------------------------------------- built-in types with more to them


def _with_more(base: type) -> type:
    """`base`, whose data is here and compares as such; what it does not have is asked for."""

    def missing(self: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.__dict__["_remote"]._ask("get", name)

    return type(base.__name__, (base,), {"__getattr__": missing})


_KINDS = {
    base: _with_more(base)
    for base in (str, int, float, complex, bytes, bytearray, list, tuple, set, frozenset, dict)
}
UNCHANGING = (str, int, float, complex, bytes, tuple, frozenset)


def with_more(value: Any, remote: Remote) -> Any:
    """A value of a subclass that the code defines: a named tuple, a member of an enumeration."""
    kind = _KINDS.get(type(value))
    if kind is None:
        return value
    held = kind(value)
    held.__dict__["_remote"] = remote
    return held


# ---------------------------------------------------------------- iterators and coroutines


def taken(reply: Any) -> tuple[list[Any], bool, Any]:
    """Items, whether they are the last, and what a generator returned."""
    if type(reply) is not list or len(reply) != 3 or type(reply[0]) is not list or type(reply[1]) is not bool:
        raise TypeError("the code's iterator gave no items")
    if not reply[0] and not reply[1]:
        raise TypeError("the code's iterator gave no items")
    return reply[0], reply[1], reply[2]


def _iterator(value: Any) -> Any:
    if type(value) is Remote:
        return generator(value)
    if not isinstance(value, Generator):
        raise TypeError(f"the code's object gave {type(value).__name__} where an iterator is due")
    return value


def generator(remote: Remote) -> Generator[Any, Any, Any]:
    """A generator of the tests' own over an iterator of the code's."""
    seen = 0
    reply = None
    while True:
        if reply is None:
            reply = taken(remote._ask("take", 1 if seen < ONE_BY_ONE else AT_ONCE))
        items, ended, result = reply
        reply = None
        for item in items:
            seen += 1
            try:
                sent = yield item
            except GeneratorExit:
                if not remote._judge.waiting:
                    remote._ask("close")
                raise
            except Exception as error:
                reply = taken(remote._ask("throw", *told(error)))
                break
            if sent is not None:
                reply = taken(remote._ask("send", sent))
                break
        else:
            if ended:
                return result


async def coroutine(remote: Remote) -> Any:
    return remote._ask("await")


async def async_generator(remote: Remote) -> AsyncGenerator[Any, None]:
    while found := exactly(list, remote._ask("anext")):
        yield found[0]


# ---------------------------------------------------------------- exceptions


def mirrored(judge: Judge, number: int, name: str, bases: list[type]) -> type:
    """An exception class of the code's, as one of the tests': to be caught, with its bases."""

    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        made = judge.ask("call", number, list(args), kwargs)
        self.__dict__.update(_remote=made.__dict__.get("_remote"), _text=str(made))
        self.args = made.args

    def text(self: Any) -> str:
        return str(self.__dict__.get("_text", ""))

    def missing(self: Any, attribute: str) -> Any:
        if attribute.startswith("__") or type(self.__dict__.get("_remote")) is not Remote:
            raise AttributeError(attribute)
        return self.__dict__["_remote"]._ask("get", attribute)

    members = {"__init__": construct, "__str__": text, "__getattr__": missing, "_number": number}
    for chosen in (tuple(bases), tuple(bases[:1]), (Exception,)):
        try:
            return type(name, chosen, dict(members))
        except TypeError:  # layouts that do not go together
            continue
    return RuntimeError


def raised(kind: type[Exception], args: tuple[Any, ...], text: str, remote: Remote) -> Exception:
    """An exception of that class that the code has made."""
    error: Exception
    if "_number" in vars(kind):
        error = kind.__new__(kind, *args)
        error.args = args
    else:
        try:
            error = kind(*args)
        except TypeError:  # it takes other arguments than it keeps
            error = kind.__new__(kind)
            error.args = args
    error.__dict__.update(_remote=remote, _text=text)
    return error
