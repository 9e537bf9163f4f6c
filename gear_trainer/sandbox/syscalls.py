"""The system calls that a process of the model's code may make, as a seccomp filter: computing, reading, its own clock.

A list of what is allowed, not of what is not: what a kernel adds is refused too. Nothing on it starts a process or a thread,
opens a socket, signals, traces or changes limits of another process, writes to a file or changes a file system.
"""

from __future__ import annotations

import os
import platform
import struct

_ALLOWED = """
    read close fstat lseek mmap mprotect munmap brk rt_sigaction rt_sigprocmask rt_sigreturn pread64 readv write writev
    sched_yield mremap msync mincore madvise dup dup3 nanosleep getitimer setitimer getpid exit uname getcwd chdir
    fchdir gettimeofday getrlimit getrusage sysinfo times getuid getgid geteuid getegid getppid sigaltstack statfs
    fstatfs gettid futex sched_getaffinity getdents64 set_tid_address restart_syscall clock_gettime clock_getres
    clock_nanosleep exit_group newfstatat readlinkat faccessat pselect6 ppoll set_robust_list get_robust_list pipe2
    getcpu getrandom membarrier statx rseq faccessat2 umask
    stat lstat poll access pipe select dup2 alarm readlink getpgrp arch_prctl time
"""

# Numbers by architecture, from the kernel's tables; the last line of _ALLOWED is x86-64's alone.
_X86_64 = {
    "read": 0, "write": 1, "open": 2, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8, "mmap": 9,
    "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "ioctl": 16,
    "pread64": 17, "readv": 19, "writev": 20, "access": 21, "pipe": 22, "select": 23, "sched_yield": 24, "mremap": 25,
    "msync": 26, "mincore": 27, "madvise": 28, "dup": 32, "dup2": 33, "nanosleep": 35, "getitimer": 36, "alarm": 37,
    "setitimer": 38, "getpid": 39, "exit": 60, "uname": 63, "fcntl": 72, "getcwd": 79, "chdir": 80, "fchdir": 81,
    "readlink": 89, "umask": 95, "gettimeofday": 96, "getrlimit": 97, "getrusage": 98, "sysinfo": 99, "times": 100,
    "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108, "getppid": 110, "getpgrp": 111, "sigaltstack": 131,
    "statfs": 137, "fstatfs": 138, "arch_prctl": 158, "gettid": 186, "time": 201, "futex": 202,
    "sched_getaffinity": 204, "getdents64": 217, "set_tid_address": 218, "restart_syscall": 219, "clock_gettime": 228,
    "clock_getres": 229, "clock_nanosleep": 230, "exit_group": 231, "openat": 257, "newfstatat": 262, "readlinkat": 267,
    "faccessat": 269, "pselect6": 270, "ppoll": 271, "set_robust_list": 273, "get_robust_list": 274, "dup3": 292,
    "pipe2": 293, "prlimit64": 302, "getcpu": 309, "getrandom": 318, "membarrier": 324, "statx": 332, "rseq": 334,
    "faccessat2": 439,
}  # fmt: skip
_AARCH64 = {
    "getcwd": 17, "dup": 23, "dup3": 24, "fcntl": 25, "ioctl": 29, "statfs": 43, "fstatfs": 44, "faccessat": 48,
    "chdir": 49, "fchdir": 50, "openat": 56, "close": 57, "pipe2": 59, "getdents64": 61, "lseek": 62, "read": 63,
    "write": 64, "readv": 65, "writev": 66, "pread64": 67, "pselect6": 72, "ppoll": 73, "readlinkat": 78,
    "newfstatat": 79, "fstat": 80, "exit": 93, "exit_group": 94, "set_tid_address": 96, "futex": 98,
    "set_robust_list": 99, "get_robust_list": 100, "nanosleep": 101, "getitimer": 102, "setitimer": 103,
    "clock_gettime": 113, "clock_getres": 114, "clock_nanosleep": 115, "sched_getaffinity": 123, "sched_yield": 124,
    "restart_syscall": 128, "sigaltstack": 132, "rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigreturn": 139,
    "times": 153, "uname": 160, "getrlimit": 163, "getrusage": 165, "umask": 166, "getcpu": 168, "gettimeofday": 169,
    "getpid": 172, "getppid": 173, "getuid": 174, "geteuid": 175, "getgid": 176, "getegid": 177, "gettid": 178,
    "sysinfo": 179, "brk": 214, "munmap": 215, "mremap": 216, "mmap": 222, "mprotect": 226, "msync": 227,
    "mincore": 232, "madvise": 233, "prlimit64": 261, "getrandom": 278, "membarrier": 283, "statx": 291, "rseq": 293,
    "faccessat2": 439,
}  # fmt: skip
MACHINES = {"x86_64": (0xC000003E, _X86_64), "aarch64": (0xC00000B7, _AARCH64)}

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5450, 0x5451)  # TCGETS, TIOCGWINSZ, FIONREAD, FIONCLEX, FIOCLEX: what opening a file asks
_FCNTLS = (0, 1, 2, 3, 4, 1030)  # duplicates and flags; not F_SETOWN, whose signals go to any process, and no locks

# classic BPF, as (code, jump if true, jump if false, operand); seccomp_data: number, machine, instruction pointer, six arguments
_LOAD, _EQUAL, _ABOVE, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050001, 0x80000000  # refused: EPERM
_X32 = 0x40000000  # numbers of a second table of x86-64, which is not allowed
_Step = tuple[int, int, int, int]


def _argument(index: int) -> int:
    return 16 + 8 * index  # its lower half: what is compared here is an int


def _one_of(index: int, values: tuple[int, ...]) -> list[_Step]:
    steps = [(_LOAD, 0, 0, _argument(index))]
    for value in values:
        steps += [(_EQUAL, 0, 1, value), (_RETURN, 0, 0, _ALLOW)]
    return [*steps, (_RETURN, 0, 0, _REFUSE)]


def _no_bit(index: int, mask: int) -> list[_Step]:
    return [(_LOAD, 0, 0, _argument(index)), (_ANY_BIT, 0, 1, mask), (_RETURN, 0, 0, _REFUSE), (_RETURN, 0, 0, _ALLOW)]


def seccomp_filter(machine: str | None = None) -> bytes:
    """The filter for a machine (this one's, unless named): an array of struct sock_filter. ValueError for an unknown one."""
    if (machine := machine or platform.machine()) not in MACHINES:
        raise ValueError(f"no list of system calls for {machine}: known are {', '.join(MACHINES)}")
    audit, numbers = MACHINES[machine]
    steps: list[_Step] = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, audit), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    steps += [(_ABOVE, 0, 1, _X32), (_RETURN, 0, 0, _REFUSE)]
    for name in _ALLOWED.split():
        if name in numbers:
            steps += [(_EQUAL, 0, 1, numbers[name]), (_RETURN, 0, 0, _ALLOW)]
    checked = {
        "openat": _no_bit(2, _WRITES),
        "open": _no_bit(1, _WRITES),
        "prlimit64": _one_of(0, (0,)),  # its own alone
        "ioctl": _one_of(1, _IOCTLS),
        "fcntl": _one_of(1, _FCNTLS),
    }
    for name, rest in checked.items():
        if name in numbers:
            steps += [(_EQUAL, 0, len(rest), numbers[name]), *rest]
    return b"".join(struct.pack("HBBI", *step) for step in [*steps, (_RETURN, 0, 0, _REFUSE)])
