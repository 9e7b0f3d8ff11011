"""System calls that the sandbox forbids, as a seccomp filter for bubblewrap.

They go around its walls: memory that counts for no process (System V segments, memory files),
sockets outside the network namespace (to the machine's host, among others), keys of the user,
namespaces of its own, and parts of the kernel that programs do not need.
"""

from __future__ import annotations

import platform
import struct

# Numbers on x86-64 and on 64-bit ARM.
FORBIDDEN = {
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "unshare": (272, 97),
    "setns": (308, 268),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
}
SOCKET, CLONE, CLONE3 = (41, 198), (56, 220), (435, 435)
FAMILIES = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6
NEW_USER_NAMESPACE = 0x10000000
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER_AT, ARCHITECTURE_AT, FIRST_ARGUMENT_AT = 0, 4, 16  # in the kernel's struct seccomp_data, little-endian
ALLOW, DENY, MISSING = 0x7FFF0000, 0x00050001, 0x00050026  # fail with EPERM, with ENOSYS


def forbidden() -> bytes:
    """Return the filter's program for this machine.

    Empty on architectures whose numbers are not known here.
    """
    if platform.machine() not in ARCHITECTURES:
        return b""
    column, architecture = ARCHITECTURES[platform.machine()]
    rules = [
        (LOAD, 0, 0, ARCHITECTURE_AT),
        (EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, DENY),  # 32-bit calls
        (LOAD, 0, 0, NUMBER_AT),
    ]
    if column == 0:
        rules += [(AT_LEAST, 0, 1, 0x40000000), (RETURN, 0, 0, DENY)]  # x32 calls
    for numbers in FORBIDDEN.values():
        rules += [(EQUAL, 0, 1, numbers[column]), (RETURN, 0, 0, DENY)]
    # The flags of clone3 are in memory, out of the filter's sight; the C library then falls back to
    # clone.
    rules += [(EQUAL, 0, 1, CLONE3[column]), (RETURN, 0, 0, MISSING)]
    rules += [
        (EQUAL, 0, 4, CLONE[column]),
        (LOAD, 0, 0, FIRST_ARGUMENT_AT),
        (ANY_BIT, 0, 1, NEW_USER_NAMESPACE),
        (RETURN, 0, 0, DENY),
        (RETURN, 0, 0, ALLOW),
    ]
    rules += [(EQUAL, 0, 2 + len(FAMILIES), SOCKET[column]), (LOAD, 0, 0, FIRST_ARGUMENT_AT)]
    rules += [(EQUAL, len(FAMILIES) - index, 0, family) for index, family in enumerate(FAMILIES)]
    rules += [(RETURN, 0, 0, DENY), (RETURN, 0, 0, ALLOW)]
    return b"".join(struct.pack("=HBBI", *rule) for rule in rules)
