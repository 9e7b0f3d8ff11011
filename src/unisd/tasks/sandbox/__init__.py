"""Running code that a model wrote, where it can hurt nothing and forge nothing.

    from unisd.tasks import sandbox
    sandbox.run_program("def double(x): return 2 * x", "assert double(2) == 4").passed  # True

Two processes, each in its own sandbox (bubblewrap: no network, no files but the interpreter's, a
private empty working directory, namespaces of its own) under limits of CPU, memory, processes and
file size. The *worker* runs the code, without the tests' source. The *judge* runs the tests; the
code's functions are remote calls to it that return plain data with exact types. So nothing that the
code does, short of returning the right values, makes a test pass. What the code prints is thrown
away.

Tests take from the code every name that neither they nor Python define; a built-in or
standard-library name is always the real one. Programs and tests have the standard library, and
numpy where it is installed beside this package.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from shutil import which
from typing import Any, NamedTuple

from unisd.errors import UserError, by_caller
from unisd.tasks.sandbox import syscalls

__all__ = ["Verdict", "check_isolation", "run_program"]

MAX_PROCESSES = 8  # and threads, of the code
THREADS = {"OPENBLAS_NUM_THREADS": "1"}  # of numpy, which would count as processes
MAX_FILE_BYTES = 16 * 2**20
GRACE_S = 2.0  # start-up, beside the time limit
GUEST = Path(__file__).parent / "guest"
PACKAGES = ("numpy", "numpy.libs")  # folders beside the standard library, where they are installed
HOW_TO_ENABLE = (
    "Install bubblewrap (Debian, Ubuntu: apt install bubblewrap; Fedora: dnf install bubblewrap) and allow"
    " user namespaces (sysctl kernel.unprivileged_userns_clone=1; on Ubuntu also"
    " kernel.apparmor_restrict_unprivileged_userns=0)"
)


@dataclass(frozen=True)
class Verdict:
    """What became of one program.

    `reason`: `passed`; `wrong` (a test failed), `error` (an exception), `syntax`, `timeout`,
    `memory`, `ended` (the program ended itself or was killed), `untested` (the tests asserted
    nothing), `sandbox` (it could not be started).
    `detail`: the failed line or the exception. `seconds`: wall time.
    """

    passed: bool
    reason: str
    detail: str = ""
    seconds: float = 0.0


@cache
def check_isolation() -> str | None:
    """None where code can be isolated on this machine, else what is missing.

    Tried once, by isolating a program.
    """
    if which("bwrap") is None:
        return "bubblewrap (bwrap) is not installed"
    probe = _run("def f(): return 1", "assert f() == 1", 20.0, 1024, safe=True)
    return None if probe.passed else f"bubblewrap cannot isolate here ({probe.detail or probe.reason})"


_unsafe_allowed = False


def allow_unsafe(allowed: bool) -> None:
    """The user's `--allow_unsafe_code_execution`, for the whole process: the default of `run`."""
    global _unsafe_allowed
    _unsafe_allowed = allowed


def require(allow_unsafe: bool | None = None) -> bool:
    """True for isolated runs, False for unsafe ones that the user allowed.

    Raises:
        UserError: the machine cannot isolate, and nobody allowed to do without.
    """
    missing = check_isolation()
    if missing is not None and not (_unsafe_allowed if allow_unsafe is None else allow_unsafe):
        allow = by_caller("pass --allow_unsafe_code_execution", "call unisd.tasks.sandbox.allow_unsafe(True)")
        raise UserError(
            f"model-written code cannot be run safely here: {missing}. {HOW_TO_ENABLE}, or {allow} to run"
            " model-written code with your own permissions."
        )
    return missing is None


def require_with(allowed: bool) -> None:
    """Keep what the user says of unsafe runs, once it is known that programs can be run with it.

    Raises:
        UserError: see `require`.
    """
    require(allowed)
    allow_unsafe(allowed)


def run_program(
    code: str, tests: str, timeout_s: float = 10.0, memory_mb: int = 1024, *, allow_unsafe: bool | None = None
) -> Verdict:
    """Whether `code` passes `tests` (Python source with assertions).

    Args:
        timeout_s: limit of wall time, and of CPU time of each process.
        memory_mb: limit of the address space of each process.
        allow_unsafe: run without isolation (limits only) where the machine cannot isolate; default:
            see `allow_unsafe`.

    Raises:
        UserError: as `require`. Never because of what the code does.
    """
    return _run(code, tests, timeout_s, memory_mb, require(allow_unsafe))


# ---------------------------------------------------------------- one program


def _run(code: str, tests: str, timeout_s: float, memory_mb: int, safe: bool) -> Verdict:
    start = time.monotonic()
    limits = {
        "cpu_s": max(1, int(timeout_s + 1)),
        "memory": memory_mb * 2**20,
        "file_size": MAX_FILE_BYTES,
        "processes": MAX_PROCESSES if safe else 1 << 16,
        # Root's processes are not counted by the kernel: another user each time, whose count starts
        # at zero.
        "user": 2_000_000 + secrets.randbelow(1_000_000_000) if safe and os.geteuid() == 0 else None,
    }
    pipes = _Pipes()
    worker = judge = text = None
    try:
        requests, replies, verdicts = pipes.new(), pipes.new(), pipes.new()
        worker = _start(
            "worker", {"code": code, "fds": (requests.read, replies.write), "limits": limits}, safe
        )
        setting = {
            "code": code,
            "tests": tests,
            "fds": (replies.read, requests.write),
            "verdict_fd": verdicts.write,
        }
        judge = _start("judge", setting | {"limits": limits}, safe)
        pipes.close(*requests, *replies, verdicts.write)
        text = _read(verdicts.read, start + timeout_s + GRACE_S)
        complaint = "" if text else (_complaint(judge) or _complaint(worker))
        reason, detail = _parsed(text) if text else ("", "")
        exit_code = (
            _exit_code(worker if reason == "ended" else judge) if reason == "ended" or text == b"" else None
        )
    except OSError as error:
        return Verdict(False, "sandbox", str(error), time.monotonic() - start)
    finally:
        for process in (worker, judge):
            if process is not None:
                _end(process)
        pipes.close_all()
    seconds = time.monotonic() - start
    if text is None:
        return Verdict(False, "timeout", f"no verdict within {timeout_s:g} s", seconds)
    if not text:  # what the code sends, the judge has to read: it can die of that
        killed = exit_code is not None and exit_code > 0
        reason, detail = (
            ("ended", "the judge was killed") if killed else ("sandbox", "the judge ended without a verdict")
        )
        detail = complaint or detail
    if reason == "ended" and exit_code == signal.SIGXCPU:
        reason, detail = "timeout", f"used {limits['cpu_s']} s of CPU"
    return Verdict(reason == "passed", reason, detail, seconds)


class _Pipe(NamedTuple):
    read: int
    write: int


class _Pipes:
    """Holds pipes of which each end is closed once, whatever happens.

    Other threads open files meanwhile.
    """

    def __init__(self) -> None:
        self._open: set[int] = set()

    def new(self) -> _Pipe:
        pipe = _Pipe(*os.pipe())
        self._open |= set(pipe)
        return pipe

    def close(self, *fds: int) -> None:
        for fd in fds:
            self._open.discard(fd)
            os.close(fd)

    def close_all(self) -> None:
        self.close(*list(self._open))


def _start(role: str, setting: dict[str, Any], safe: bool) -> subprocess.Popen[bytes]:
    """A guest process, in its sandbox; its setting arrives on standard input."""
    fds = [*setting["fds"], *([setting["verdict_fd"]] if "verdict_fd" in setting else [])]
    forbidden = syscalls.forbidden() if safe else b""
    folders = ["/guest"] if safe else [str(GUEST.parent), *{str(path.parent) for path in _packages()}]
    program = f"import sys; sys.path += {folders!r}; from guest.{role} import main; main()"
    with (
        tempfile.TemporaryFile() as stdin,
        tempfile.TemporaryFile() as rules,
        tempfile.TemporaryDirectory() as empty,
    ):
        stdin.write(json.dumps(setting).encode())
        stdin.seek(0)
        rules.write(forbidden)
        rules.seek(0)
        isolation = (
            [*_isolation(), *(["--seccomp", str(rules.fileno())] if forbidden else []), "--"] if safe else []
        )
        return subprocess.Popen(
            [*isolation, _interpreter(), "-I", "-S", "-B", "-c", program],
            stdin=stdin,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[*fds, rules.fileno()] if forbidden else fds,
            env={} if safe else THREADS,
            cwd=empty if not safe else "/",
            start_new_session=True,
        )


@cache
def _interpreter() -> str:
    """The interpreter itself, not the link of a virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


@cache
def _packages() -> list[Path]:
    """The folders of `PACKAGES` that are there."""
    try:
        found = importlib.util.find_spec(PACKAGES[0])
    except (ImportError, ValueError):
        found = None
    if found is None or not found.submodule_search_locations:
        return []
    folder = Path(found.submodule_search_locations[0]).resolve().parent
    return [folder / name for name in PACKAGES if (folder / name).is_dir()]


@cache
def _isolation() -> tuple[str, ...]:
    """bubblewrap and its options."""
    bwrap = which("bwrap")
    assert bwrap is not None
    if os.geteuid() == 0:  # the guest changes to another user by itself and loses these rights
        user = ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        user = ["--unshare-user", "--disable-userns", "--uid", "65534", "--gid", "65534", "--cap-drop", "ALL"]
    prefix = os.path.realpath(sys.base_prefix)
    own = _interpreter() if prefix == "/usr" else prefix  # its library is in /usr/lib, bound below
    # bubblewrap would make missing parents of a mount for their owner alone.
    files: list[str] = []
    parents = [
        parent for target in (own, "/usr/lib", "/guest/guest") for parent in reversed(Path(target).parents)
    ]
    for parent in dict.fromkeys(parents):
        if str(parent) not in ("/", "/lib", "/usr/lib"):
            files += ["--perms", "0755", "--dir", str(parent)]
    for path in map(Path, ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")):
        if path.is_symlink():
            files += ["--symlink", str(path.readlink()), str(path)]
        elif path.exists():
            files += ["--ro-bind", str(path), str(path)]
    for path in _packages():
        files += ["--ro-bind", str(path), f"/guest/{path.name}"]
    return (
        bwrap,
        *(
            "--die-with-parent",
            "--new-session",
            "--unshare-pid",
            "--unshare-net",
            "--unshare-ipc",
            "--unshare-uts",
        ),
        *("--unshare-cgroup-try", *user, "--clearenv", "--setenv", "LANG", "C.UTF-8"),
        *(word for name, value in THREADS.items() for word in ("--setenv", name, value)),
        *(*files, "--ro-bind", own, own, "--ro-bind", str(GUEST), "/guest/guest", "--proc", "/proc"),
        *("--dev", "/dev", "--remount-ro", "/dev"),
        *(
            "--perms",
            "0777",
            "--size",
            str(MAX_FILE_BYTES),
            "--tmpfs",
            "/tmp",
            "--chdir",
            "/tmp",
            "--remount-ro",
            "/",
        ),
    )


def _read(fd: int, deadline: float) -> bytes | None:
    """Read all that is written until the other end closes; None if that is after the deadline."""
    parts: list[bytes] = []
    while (left := deadline - time.monotonic()) > 0 and select.select([fd], [], [], left)[0]:
        part = os.read(fd, 1 << 16)
        if not part:
            return b"".join(parts)
        parts.append(part)
    return None


def _parsed(text: bytes) -> tuple[str, str]:
    """Return reason and detail of a verdict.

    The detail quotes the code; what a terminal or a file would choke on is taken out.
    """
    try:
        reason, detail = json.loads(text)
    except ValueError:
        return "error", "the judge gave no single verdict"
    return reason, "".join(c if c.isprintable() else " " for c in detail)


def _complaint(process: subprocess.Popen[bytes] | None) -> str:
    """What bubblewrap or the interpreter said before the guest shut its standard error."""
    if process is None or process.stderr is None:
        return ""
    if not select.select([process.stderr], [], [], 0.2)[0]:
        return ""
    text = os.read(process.stderr.fileno(), 4096).decode(errors="replace").strip()
    return text.splitlines()[-1][:300] if text else ""


def _exit_code(process: subprocess.Popen[bytes]) -> int | None:
    """Return the signal that ended the program, where it ends within a moment.

    bubblewrap reports it as 128 + signal.
    """
    try:
        code = process.wait(0.5)
    except subprocess.TimeoutExpired:
        return None
    return -code if code < 0 else code - 128


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill it with its group; bubblewrap's death takes its namespace along."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stderr is not None:
        process.stderr.close()
