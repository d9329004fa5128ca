#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the apexd authors. Permission is granted, free of charge, to use, copy,
# modify, merge, publish, distribute, sublicense and sell this file under the MIT License;
# it comes "as is", without warranty of any kind.
"""apexd - a project's background work, in one file, that a crash does not lose.

    python apexd.py start                      # the daemon of this project; prints its PID
    python apexd.py add -- make test           # a durable task; prints its id
    python apexd.py wait 1                     # exits with the task's own exit code

Tasks survive everything: after `kill -9` of the daemon they run on, the next daemon
adopts them and learns their true exit codes. Nothing acknowledged is lost, nothing
runs twice at once. Standard library only, Python 3.9 or newer.

Map (a section uses only sections above it):

     1. CONSTANTS   every default and limit, with unit and reason
     2. ERRORS      DaemonError and the table of codes
     3. VALUES      records and enums that cross a border; durations, times; Clock
     4. PLATFORM    the only place that asks which system this is
     5. FILES       atomic replace, safe open, logs that lose their head
     6. CONFIG      load, check, compare for reload
     7. LOG         the daemon's own log
     8. PIDFILE     the lock and the PID file
     9. STORE       schema, migrations, all SQL
    10. CHILD       the attempt protocol: start, adopt, wait, stop
    13. RUNNER      the polling loop over the store
    16. CONTROL     frames, verbs, server, Client
    18. DAEMON      wiring, start order, signals; DaemonManager
    20. CLI         registry and handlers

Files, all in `.apex/` (mode 0700):

    config.toml | config.json | config.yaml    optional
    daemon.lock    locked while a daemon lives; says who holds it; never deleted
    daemon.pid     {"pid", "startedAt", "version", "projectPath"}
    daemon.log     the daemon's own log, .1 .2 ... older
    apex.db        the queue
    control.sock   the control socket; `endpoint` says how to reach the daemon
    heartbeat      rewritten while the loops turn; state.json: a readable snapshot
    run/           one exit record a slot;  logs/: task-12.1.log is task 12, attempt 1

Exit statuses: 0 ok, 1 failed, 2 usage; `status` 0 running, 1 dead with a PID file,
3 not running, 4 unknown; `wait` and `run` the task's own, 124 when waiting timed out;
else sysexits.h: 65 corrupt, 69 not reachable, 70 a bug of ours, 73 cannot create,
75 busy: try again, 77 permission, 78 configuration.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import errno
import json
import os
import queue
import random
import re
import selectors
import shutil
import signal
import socket
import stat
import struct
import sys
import threading
import time
from enum import Enum

TYPE_CHECKING = False
if TYPE_CHECKING:
    import sqlite3
    import subprocess
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from typing import Any, Callable, NoReturn

__version__ = "0.4.0"
__all__ = [
    "Client",
    "DaemonError",
    "DaemonManager",
    "DaemonMetrics",
    "DaemonRunner",
    "DaemonStatus",
    "PidFile",
    "Task",
    "TaskStore",
    "main",
]

# ============================================================================
# 1. CONSTANTS - every default and limit, with its unit and its reason
#    Uses nothing. Read by all; changed by none.
# ============================================================================

STATE_FOLDER = ".apex"
START_TIMEOUT_S = 10.0  # for the daemon to answer; each `progress` line extends it
STOP_MARGIN_S = 5.0  # what `stop` adds to the daemon's own two waits before it KILLs
CONFIRM_TIMEOUT_S = 10.0  # how long a client tries to confirm a request that was cut off
ANSWER_TIMEOUT_S = 5.0  # a daemon that says nothing for so long counts as hung
RETURN_TIMEOUT_S = 30.0  # `wait`, `run`, `logs -f` outlive a daemon that is away so long
CLIENT_HOLD_S = 5.0  # a client holds the lock for one call; longer means another program

FRAME_MAX_BYTES = 16 * 1024 * 1024  # a request or a response
FRAMES_MAX_BYTES = 4 * FRAME_MAX_BYTES  # large requests being read, all connections together
FRAME_FREE_BYTES = 64 * 1024  # requests up to this size are not counted
FRAME_TIMEOUT_S = 10.0  # from a frame's first byte to its last
IDLE_TIMEOUT_S = 60.0  # a silent connection gives its place to others
CONNECTIONS_MAX = 64
SOCKET_PATH_MAX_BYTES = 103  # sun_path of macOS; Linux allows 107 (unix(7))

SLOT_RECORD_BYTES = 512  # one sector: status and note reach the disk together
SLOT_NOTE_AT = 64  # the shell writes at 0, the daemon here
LOG_CHUNK_BYTES = 256 * 1024  # of a log, in one answer
LOG_LINE_MAX_BYTES = 64 * 1024  # longer lines are cut on reading, never on disk
LOG_CHECK_S = 1.0  # between two looks at the size of running tasks' logs
SWEEP_ROUNDS = 100  # passes over /proc before a fork bomb counts as unkillable
FIRST_TERM_S = 1.0  # a second TERM counts only so long after the first

BACKOFF_S = 1.0  # before the first retry; doubles, with full jitter
BACKOFF_MAX_S = 300.0
DEFER_S = 60.0  # after exit status 75 (EX_TEMPFAIL); doubles
DEFER_MAX_S = 900.0
DEFERRALS_MAX = 100
LOST_MAX = 3  # a task that took its shell along so often is poison
RESPAWN_MAX = 10  # tries while the system has no memory or process to spare
TOKEN_KEPT_S = 3600.0
MAINTENANCE_S = 60.0  # between two rounds of pruning
PRIORITY_MAX = 1_000_000
INTEGER_MAX = 2**63 - 1  # sqlite's

ENVIRONMENT_KEPT = (
    "PATH HOME USER LOGNAME LANG TZ TMPDIR SHELL VIRTUAL_ENV CONDA_PREFIX PYTHONPATH "
    "SSH_AUTH_SOCK XDG_RUNTIME_DIR HTTP_PROXY HTTPS_PROXY FTP_PROXY ALL_PROXY NO_PROXY "
    "SYSTEMROOT TEMP TMP PATHEXT COMSPEC USERPROFILE APPDATA"
).split()
ENVIRONMENT_DROPPED = re.compile(r"NOTIFY_SOCKET|WATCHDOG_|LISTEN_|APEX_|APEXD_")
NETWORK_FILE_SYSTEMS = frozenset(
    "nfs nfs4 cifs smb3 smbfs 9p afs ceph glusterfs lustre fuse.sshfs fuse.s3fs".split()
)

# ============================================================================
# 2. ERRORS - DaemonError and the table of codes
#    Uses nothing. Raised anywhere, turned into an exit status by `main` alone.
# ============================================================================

CODES: dict[str, tuple[int, str]] = {
    "ALREADY_RUNNING": (75, "a daemon of this project runs already"),
    "BAD_REQUEST": (2, "the request is malformed or a value is out of range"),
    "BUSY": (75, "somebody else has the project for now; try again"),
    "CANNOT_CREATE": (73, "a file or folder cannot be created or written"),
    "CONFIG_INVALID": (78, "the configuration is broken; nothing was changed"),
    "DATABASE_CORRUPT": (65, "the database is damaged; it is kept as it is"),
    "DATABASE_FAILED": (73, "the database cannot be read or written now"),
    "DATABASE_NEWER": (78, "the database was made by a newer apexd"),
    "ILLEGAL_STATE": (1, "the task's state does not allow this"),
    "INTERNAL": (70, "a bug of apexd's own; its log has the traceback"),
    "NOT_ANSWERING": (69, "the daemon lives but does not answer"),
    "NOT_CONFIRMED": (75, "it is not known whether the request was carried out"),
    "NOT_RUNNING": (69, "no daemon of this project runs"),
    "NOT_STARTED": (1, "a command could not be started"),
    "NOT_SUPPORTED": (1, "this system cannot do that"),
    "PERMISSION_DENIED": (77, "the project belongs to somebody else"),
    "PID_FILE_CORRUPTED": (65, "the PID file holds no PID"),
    "QUEUE_FULL": (75, "retention.max_queue unfinished tasks are in the queue"),
    "START_FAILED": (1, "the daemon did not come up"),
    "STOP_FAILED": (1, "the daemon did not go away"),
    "UNKNOWN_COMMAND": (2, "there is no such verb"),
    "UNKNOWN_GROUP": (2, "the configuration names no such group"),
    "UNKNOWN_TASK": (2, "there is no task with that id"),
}


class DaemonError(Exception):
    """An error a user can cause: a code, one line what, one line what to do.

    `code` is a key of CODES; on the wire and in JSON it is written in lower case.
    """

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint

    @property
    def exit_status(self) -> int:
        """What a command that ends with this error exits with."""
        return CODES.get(self.code, (1, ""))[0]

    def to_dict(self) -> dict[str, object]:
        """Return {"code": "not_running", "message": ..., "hint": ...}."""
        return {"code": self.code.lower(), "message": self.message, "hint": self.hint}

    @classmethod
    def from_dict(cls, fields: Mapping[str, object]) -> DaemonError:
        """Make the error again that `to_dict` described."""
        code = str(fields.get("code", "internal")).upper()
        return cls(code, str(fields.get("message", "")), str(fields.get("hint", "")))


def bad(message: str, hint: str = "") -> DaemonError:
    """Make the error of a value that cannot be taken."""
    return DaemonError("BAD_REQUEST", message, hint)


# ============================================================================
# 3. VALUES - records and enums that cross a border; durations, times; Clock
#    Uses 1-2. Pure, but for Clock, the only reader of the system's clocks.
# ============================================================================


class Value:
    """A record: its fields are the annotations of its class, None when not given."""

    def __init__(self, **fields: Any) -> None:
        unknown = fields.keys() - self.__annotations__.keys()
        if unknown:
            raise TypeError(f"{type(self).__name__} has no field {min(unknown)}")
        self.__dict__.update(dict.fromkeys(self.__annotations__))
        self.__dict__.update(fields)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.__dict__ == self.__dict__

    def __repr__(self) -> str:
        shown = ", ".join(f"{k}={v!r}" for k, v in self.__dict__.items() if v is not None)
        return f"{type(self).__name__}({shown})"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields in their order, ready for JSON."""
        return dict(self.__dict__)


class State(str, Enum):
    """Where a task stands; MOVES says where it can go from there."""

    WAITING = "waiting"  # for the tasks it comes after
    SCHEDULED = "scheduled"  # for its time
    QUEUED = "queued"  # for a slot
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    SKIPPED = "skipped"  # a task it comes after ended otherwise than it needs


#   waiting -> scheduled -> queued -> running -> succeeded | failed | cancelled
#      |           |           |         `-> scheduled, queued (retry, interrupted, lost)
#      `-----------+-----------+-> cancelled; waiting -> skipped; `retry` reopens the finished
_OPEN = frozenset({State.WAITING, State.SCHEDULED, State.QUEUED})
MOVES: dict[State, frozenset[State]] = {
    State.WAITING: frozenset({State.SCHEDULED, State.QUEUED, State.SKIPPED, State.CANCELLED}),
    State.SCHEDULED: frozenset({State.QUEUED, State.CANCELLED}),
    State.QUEUED: frozenset({State.RUNNING, State.CANCELLED}),
    State.RUNNING: frozenset(set(State) - {State.WAITING, State.RUNNING, State.SKIPPED}),
    State.SUCCEEDED: _OPEN,
    State.FAILED: _OPEN,
    State.CANCELLED: _OPEN,
    State.SKIPPED: _OPEN,
}
DONE = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED, State.SKIPPED})


class Outcome(str, Enum):
    """How an attempt ended."""

    OK = "ok"
    FAILED = "failed"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"  # the daemon stopped it; runs again, not counted
    LOST = "lost"  # gone without a record
    DEFERRED = "deferred"  # exit status 75: come back later
    OVER_BUDGET = "over_budget"
    NOT_STARTED = "not_started"


class Need(str, Enum):
    """What a dependency asks of the task it names."""

    OK = "ok"
    FAIL = "fail"
    ANY = "any"

    def is_met_by(self, state: State) -> bool:
        """Tell whether a parent that ended in `state` satisfies this need."""
        met = {Need.OK: {State.SUCCEEDED}, Need.FAIL: {State.FAILED}, Need.ANY: DONE}
        return state in met[self]


class Task(Value):
    """A task as `list` and `show` give it; times are epoch seconds (float)."""

    id: int
    state: State
    group: str
    priority: int
    command: str | list[str]  # a string runs in sh, a list is argv
    label: str | None
    key: str | None
    cwd: str
    after: list[str]  # ["3:ok", "4:any"]
    attempts: int
    retries: int
    failures: int  # retries used up
    losses: int
    deferrals: int
    timeout: float | None  # seconds; None: no limit
    on_lost: str  # "retry" or "fail"
    created_at: float
    due_at: float | None
    started_at: float | None
    finished_at: float | None
    outcome: Outcome | None
    exit_code: int | None
    signal: int | None
    reason: str | None
    wish: Outcome | None  # what a running attempt is being ended for
    progress: float | None  # percent
    note: str | None
    tokens: int
    cost: float
    max_tokens: int | None
    max_cost: float | None
    run_id: str | None  # of the last attempt: the APEX_RUN_ID of all that it started
    slot: int | None
    boot_id: str | None
    request_id: int
    pid: int | None  # the command's own, while it runs

    @property
    def status(self) -> int:
        """The exit status of `wait`: the task's own, else 0 or 1 by its state."""
        if self.exit_code is not None:
            return self.exit_code
        return 0 if self.state == State.SUCCEEDED else 1


class Result(Value):
    """How a child ended, before policy: a status, a reason, or neither (lost)."""

    exit_code: int | None
    reason: str | None  # why it did not start: "spawn:ENOENT make"
    never_ran: bool | None  # no go byte: nothing was executed


class DaemonMetrics(Value):
    """The runner's counters since its start; times are epoch seconds."""

    started_at: float
    uptime: float  # seconds
    tasks_processed: int
    tasks_succeeded: int
    tasks_failed: int
    active_task_count: int
    active_task_ids: list[int]
    last_poll_at: float | None
    poll_count: int


class DaemonStatus(Value):
    """What `DaemonManager.get_status` knows; `exit_status` follows LSB."""

    running: bool
    exit_status: int  # 0 running, 1 dead with a PID file, 3 not running, 4 unknown
    pid: int | None
    reason: str | None
    details: dict[str, Any]  # the daemon's own `status` answer, {} without one


class Clock:
    """Time as the rest of the file sees it; tests pass their own."""

    now = staticmethod(time.time)  # epoch seconds, can jump
    mono = staticmethod(time.monotonic)  # for durations and deadlines


_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def duration(text: object) -> float:
    """Read seconds: a number, or "90s", "5m", "2h", "1d", "250ms"; never negative."""
    if isinstance(text, str):
        match = re.fullmatch(r"\s*([0-9.]+)\s*(ms|s|m|h|d|)\s*", text)
        try:
            text = float(match[1]) * _UNITS[match[2] or "s"] if match else None
        except ValueError:
            text = None
    if isinstance(text, bool) or not isinstance(text, (int, float)) or not 0 <= text < 1e10:
        raise ValueError("a duration: seconds from 0, or 90s, 5m, 2h, 1d")
    return float(text)


def optional_duration(text: object) -> float | None:
    """Read a duration where 0 and None mean no limit."""
    return None if text is None else duration(text) or None


def integer(low: int, high: int = INTEGER_MAX) -> Callable[[object], int]:
    """Make a reader of whole numbers within [low, high]."""

    def read(text: object) -> int:
        if isinstance(text, str) and re.fullmatch(r"[+-]?[0-9]{1,20}", text.strip()):
            text = int(text)
        if isinstance(text, bool) or not isinstance(text, int) or not low <= text <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return text

    return read


def number(text: object) -> float:
    """Read a finite number from 0."""
    try:
        value = float(text) if isinstance(text, (str, int, float)) else -1.0
    except (ValueError, OverflowError):
        value = -1.0
    if isinstance(text, bool) or not 0 <= value < 1e300:
        raise ValueError("a number from 0")
    return value


def line_of_text(text: object) -> str:
    """Read a name or note: a string without control characters, at most 1000 long."""
    if not isinstance(text, str) or len(text) > 1000 or re.search(r"[\x00-\x1f\x7f]", text):
        raise ValueError("one line of text, at most 1000 characters")
    return _encodable(text)


def _encodable(text: str) -> str:
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise ValueError("text that can be encoded (no lone surrogates)") from None
    return text


def choice(*words: str) -> Callable[[object], str]:
    """Make a reader of one word of several."""

    def read(text: object) -> str:
        if text not in words:
            raise ValueError("one of " + ", ".join(words))
        return str(text)

    return read


def text_list(value: object) -> list[str]:
    """Read a list of strings."""
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError("a list of strings")
    return value


def command_line(value: object) -> str | list[str]:
    """Read a command: a string for sh, or a non-empty list of arguments.

    Bytes that are no UTF-8 come as surrogates (os.fsdecode) and are kept.
    """
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list) or not words or not all(isinstance(w, str) for w in words):
        raise ValueError("a command: a string, or a list of strings")
    if not words[0].strip():
        raise ValueError("a command that is not empty")
    for word in words:
        if "\0" in word:
            raise ValueError("a command without NUL bytes")
        if not word.isascii():
            _encodable(word)
    if isinstance(value, list) and words[0].startswith("-"):
        raise ValueError(f"a command that does not begin with '-': write ./{words[0]}")
    return value  # type: ignore[return-value]


def dependencies(value: object) -> list[tuple[int, Need]]:
    """Read ["3", "4:any", "7-9:ok"] or "3,4:any": what a task comes after."""
    found: list[tuple[int, Need]] = []
    items = value.split(",") if isinstance(value, str) else value
    for item in items if isinstance(items, list) else [None]:
        match = re.fullmatch(r"([0-9-]+)(?::(ok|fail|any))?", str(item).strip())
        if isinstance(item, bool) or not match:
            raise ValueError("task ids, each with :ok, :fail or :any if wanted: 3,4:any,7-9")
        found += [(i, Need(match[2] or "ok")) for i in task_ids(match[1])]
    return found


def task_ids(value: object) -> list[int]:
    """Read ids: 3, "3", "3,5-9" or a list of such; in that order, none twice."""
    found: dict[int, None] = {}
    words = value if isinstance(value, list) else str(value).split(",")
    for word in words:
        match = re.fullmatch(r"([0-9]{1,18})(?:-([0-9]{1,18}))?", str(word).strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if isinstance(word, bool) or not 0 <= last - first < 1_000_000:
            raise ValueError("task ids: 3 or 3,5-9")
        found.update(dict.fromkeys(range(first, last + 1)))
    return list(found)


def timestamp(epoch: float) -> str:
    """Write a time as 2025-01-15T10:30:00.000Z."""
    milliseconds = int(epoch * 1000)
    text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(milliseconds // 1000))
    return f"{text}.{milliseconds % 1000:03d}Z"


def span(seconds: float) -> str:
    """Write a length of time for people: 850ms, 12s, 3m 5s, 2h 10m, 4d 3h."""
    if seconds < 1:
        return f"{seconds * 1000:.0f}ms"
    left = int(seconds)
    parts = []
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m"), (1, "s")):
        if left >= size or parts:
            parts.append(f"{left // size}{unit}")
            left %= size
    return " ".join(parts[:2])


def wish_decides(exit_code: int | None, wish: Outcome | None) -> Outcome | None:
    """Return the wish unless the command succeeded all the same.

    Any other end, also a status of the program's own choice, came from our signal as far
    as anybody can tell: a cancelled task that handles TERM and exits 1 is cancelled.
    """
    return None if exit_code == 0 else wish


def outcome_of(result: Result, wish: Outcome | None) -> Outcome | None:
    """Decide how an attempt ended; None: it never ran and does not count."""
    wished = wish_decides(result.exit_code, wish)
    if wished is not None:
        return wished
    if result.never_ran:
        return None
    if result.reason is not None:
        return Outcome.NOT_STARTED
    if result.exit_code is None:
        return Outcome.LOST
    return {0: Outcome.OK, 75: Outcome.DEFERRED}.get(result.exit_code, Outcome.FAILED)


def backoff(count: int, first_s: float, most_s: float, jitter: float = 1.0) -> float:
    """Return the delay before try `count` (from 1): doubling, capped, times `jitter`."""
    delay: float = min(most_s, first_s * 2.0 ** min(count - 1, 50))
    return delay * jitter


def next_state(task: Task, outcome: Outcome, jitter: float) -> tuple[State, float]:
    """Decide what becomes of a task after an attempt: (state, delay in seconds).

    The counters of `task` include the attempt that just ended. Pure.
    """
    if outcome == Outcome.OK:
        return State.SUCCEEDED, 0.0
    if outcome == Outcome.CANCELLED:
        return State.CANCELLED, 0.0
    if outcome == Outcome.INTERRUPTED:
        return State.QUEUED, 0.0
    if outcome == Outcome.LOST and task.on_lost == "retry" and task.losses < LOST_MAX:
        return State.QUEUED, 0.0
    if outcome == Outcome.DEFERRED and task.deferrals < DEFERRALS_MAX:
        return State.SCHEDULED, backoff(task.deferrals, DEFER_S, DEFER_MAX_S)
    if outcome == Outcome.NOT_STARTED and is_passing(task.reason):
        if task.deferrals < RESPAWN_MAX:
            return State.SCHEDULED, backoff(task.deferrals, BACKOFF_S, DEFER_S)
    if outcome in (Outcome.FAILED, Outcome.TIMEOUT) and task.failures <= task.retries:
        return State.SCHEDULED, backoff(task.failures, BACKOFF_S, BACKOFF_MAX_S, jitter)
    return State.FAILED, 0.0


def is_passing(reason: str | None) -> bool:
    """Tell whether a start failed for want of something that comes back."""
    return reason is not None and reason.split(" ")[0] in ("spawn:EAGAIN", "spawn:ENOMEM")


def printable(text: str) -> str:
    """Escape what could move a terminal's cursor or reverse its text (CWE-150)."""
    return re.sub(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]",
        lambda m: ascii(m[0])[1:-1],
        text,
    )


# ============================================================================
# 4. PLATFORM - the only place that asks which system this is
#    Uses 1-3. Any thread; holds no state. Two classes, the same method names.
# ============================================================================

if sys.platform == "win32":
    import ctypes
    import msvcrt
    from ctypes import wintypes

    _KERNEL = ctypes.WinDLL("kernel32", use_last_error=True)
    _KERNEL.OpenProcess.restype = wintypes.HANDLE
    _KERNEL.CreateJobObjectW.restype = wintypes.HANDLE
    _NEW_GROUP, _NO_WINDOW, _DETACHED, _SUSPENDED = 0x200, 0x08000000, 0x8, 0x4
    _LOCK_AT = 1 << 30  # msvcrt.locking blocks readers of the byte: one far past the end

    class Platform:
        """Windows: loopback TCP, job objects, byte-range locks; no shell, no signals."""

        SURVIVES = False  # children die with the daemon, by their job object
        SHELL = ("cmd.exe", "/d", "/s", "/c")
        SIGNALS = ("SIGINT", "SIGTERM", "SIGBREAK")
        WAKE_S: float | None = 0.5  # lock waits are not interruptible by signals here

        @staticmethod
        def lock(fd: int, shared: bool = False, wait: bool = False) -> bool:
            """Lock the open file; False when another process has it. (msvcrt.locking)"""
            while True:
                os.lseek(fd, _LOCK_AT, os.SEEK_SET)
                try:
                    msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
                    return True
                except OSError:
                    if not wait:
                        return False
                    time.sleep(0.05)

        @staticmethod
        def boot_id() -> str:
            """Name this boot; no child outlives its daemon here, so nothing asks."""
            return ""

        @staticmethod
        def start_time(pid: int) -> str | None:
            """Return the process's creation time, None when it is gone (GetProcessTimes)."""
            handle = _KERNEL.OpenProcess(0x1000, False, pid)
            if not handle:
                return None
            try:
                code = wintypes.DWORD()
                times = (wintypes.FILETIME * 4)()
                pointers = [ctypes.byref(item) for item in times]
                _KERNEL.GetExitCodeProcess(wintypes.HANDLE(handle), ctypes.byref(code))
                alive = code.value == 259
                if not _KERNEL.GetProcessTimes(wintypes.HANDLE(handle), *pointers) or not alive:
                    return None
                return f"{times[0].dwHighDateTime}.{times[0].dwLowDateTime}"
            finally:
                _KERNEL.CloseHandle(wintypes.HANDLE(handle))

        @staticmethod
        def kill(pid: int) -> None:
            """End a process at once (TerminateProcess)."""
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGTERM)

        terminate = None  # a daemon is asked over its socket: nothing can be sent to it

        @staticmethod
        def command_pid(shell: int) -> int | None:
            """Return the command's PID; here it is started without a shell."""
            return shell

        @staticmethod
        def new_job(process: subprocess.Popen[bytes]) -> int:
            """Put a suspended process into a job that dies with this one; let it run."""
            job = _KERNEL.CreateJobObjectW(None, None)
            limits = ctypes.create_string_buffer(144)  # JOBOBJECT_EXTENDED_LIMIT_INFORMATION
            struct.pack_into("<I", limits, 16, 0x2000)  # LimitFlags: KILL_ON_JOB_CLOSE
            _KERNEL.SetInformationJobObject(wintypes.HANDLE(job), 9, limits, 144)
            handle = wintypes.HANDLE(int(process._handle))  # type: ignore[attr-defined]
            _KERNEL.AssignProcessToJobObject(wintypes.HANDLE(job), handle)
            ctypes.WinDLL("ntdll").NtResumeProcess(handle)
            return int(job)

        @staticmethod
        def end_job(job: int, close: bool = False) -> None:
            """End all processes of a job, or let go of it."""
            if close:
                _KERNEL.CloseHandle(wintypes.HANDLE(job))
            else:
                _KERNEL.TerminateJobObject(wintypes.HANDLE(job), 1)

        @staticmethod
        def child_flags() -> dict[str, Any]:
            """Return how Popen starts a child that `new_job` then takes."""
            return {"creationflags": _NEW_GROUP | _NO_WINDOW | _SUSPENDED}

        @staticmethod
        def spawn_daemon(argv: list[str], env: dict[str, str], mode: str) -> Any:
            """Start a daemon; return the pipe (binary file) that it reports on."""
            import subprocess

            if mode == "fork":
                raise DaemonError("NOT_SUPPORTED", "Windows has no fork", "use --mode spawn")
            flags = _DETACHED | _NEW_GROUP
            null, pipe = subprocess.DEVNULL, subprocess.PIPE
            process = subprocess.Popen(
                argv, stdin=null, stdout=pipe, stderr=null, env=env, creationflags=flags
            )
            process.returncode = 0  # it is meant to outlive us: no ResourceWarning
            return process.stdout

        @staticmethod
        def listen(folder: str) -> tuple[socket.socket, dict[str, Any]]:
            """Open the control socket: a loopback port and the token to show there."""
            import secrets

            listener = socket.create_server(("127.0.0.1", 0), backlog=128)
            return listener, {
                "port": listener.getsockname()[1],
                "token": secrets.token_hex(32),
            }

        @staticmethod
        def connect(endpoint: dict[str, Any], timeout_s: float) -> socket.socket:
            """Connect to the daemon that `endpoint` describes."""
            return socket.create_connection(("127.0.0.1", int(endpoint["port"])), timeout_s)

        @staticmethod
        def is_peer_allowed(connection: socket.socket) -> bool:
            """Tell whether the peer may give orders; here the token decides."""
            return True

        @staticmethod
        def network_file_system(path: str) -> str | None:
            """Name the network file system `path` lies on; a UNC path is one."""
            return "a network share" if path.startswith("\\\\") else None

        @staticmethod
        def collapse(fd: int, size: int) -> bool:
            """Cut the head of a file off in place; not possible here."""
            return False

        @staticmethod
        def is_foreign(info: os.stat_result) -> bool:
            """Tell whether somebody else owns or may write a file; ACLs say so here."""
            return False

        @staticmethod
        def close_inherited() -> None:
            """Close descriptors that came from the caller; Popen has done it here."""

        @staticmethod
        def reap_orphans(known: Callable[[int], bool]) -> None:
            """Collect orphans as PID 1; there is no such thing here."""

        @staticmethod
        def memory_bytes() -> int | None:
            """Return the resident memory of this process, None where unknown."""
            return None

else:
    import fcntl

    class Platform:
        """POSIX: Unix sockets, flock, sessions and process groups, /bin/sh."""

        SURVIVES = True  # children outlive the daemon and are adopted by the next one
        SHELL = ("/bin/sh", "-c")
        SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGCHLD")
        WAKE_S: float | None = None

        @staticmethod
        def lock(fd: int, shared: bool = False, wait: bool = False) -> bool:
            """Lock the open file; False when another has it. (flock(2))

            The lock belongs to the open file description: a child that inherits the
            descriptor holds it too, and reading the file elsewhere does not drop it.
            """
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            try:
                fcntl.flock(fd, kind if wait else kind | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

        @staticmethod
        def boot_id() -> str:
            """Name this boot of the system: PIDs mean something within it only."""
            try:
                with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
                    return file.read().strip()
            except OSError:
                return _output(["sysctl", "-n", "kern.boottime"]) or ""

        @staticmethod
        def start_time(pid: int) -> str | None:
            """Return when a process began, in units of the system; None: it is gone.

            With the PID and the boot id it is an identity. (proc(5), stat field 22)
            """
            try:
                with open(f"/proc/{pid}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()
            except OSError:
                return _output(["ps", "-o", "lstart=", "-p", str(pid)]) if _HAS_NO_PROC else None
            return None if fields[0] in b"ZX" else fields[19].decode()

        @staticmethod
        def kill(pid: int) -> None:
            """Send SIGKILL to one process, if it is there."""
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

        @staticmethod
        def terminate(pid: int) -> None:
            """Ask a process to end, if it is there; a stopped one hears it too."""
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

        @staticmethod
        def signal_group(group: int, signum: int) -> None:
            """Signal a process group; CONT follows, or a stopped one would not hear it."""
            if group > 1:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(group, signum)
                    os.killpg(group, signal.SIGCONT)

        @staticmethod
        def find_run(run_id: str) -> list[int]:
            """Return the PIDs of all that carry this APEX_RUN_ID (Linux; else none)."""
            needle = b"\0APEX_RUN_ID=" + run_id.encode() + b"\0"
            found = []
            for name in os.listdir("/proc") if not _HAS_NO_PROC else ():
                if name.isdigit():
                    with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:
                        if needle in b"\0" + file.read():
                            found.append(int(name))
            return found

        @staticmethod
        def command_pid(shell: int) -> int | None:
            """Return the PID of the command that a shell of ours runs, else the shell's."""
            try:
                for _ in range(2):  # the shell, then the subshell that became the command
                    with open(f"/proc/{shell}/task/{shell}/children", encoding="ascii") as file:
                        children = file.read().split()
                    return int(children[0]) if children else shell
            except OSError:
                pass
            return shell

        @staticmethod
        def spawn_daemon(argv: list[str], env: dict[str, str], mode: str) -> Any:
            """Start a daemon; return the pipe (binary file) that it reports on.

            mode "fork": two forks and a session between them (daemon(7)), then exec, so
            that nothing of the caller is left in it; "spawn": one child, a session.
            """
            reader, writer = os.pipe()
            if mode == "fork":
                middle = os.fork()
                if middle == 0:
                    _exec_detached(argv, env, writer)
                os.waitpid(middle, 0)
            else:
                import subprocess

                process = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=writer,
                    stderr=writer,
                    env=env,
                    start_new_session=True,
                )
                process.returncode = 0  # it is meant to outlive us: no ResourceWarning
            os.close(writer)
            return os.fdopen(reader, "rb")

        @staticmethod
        def listen(folder: str) -> tuple[socket.socket, dict[str, Any]]:
            """Open the control socket in `folder`, or where the path is short enough.

            The umask is 077: there is no moment in which others could connect.
            """
            path = os.path.join(folder, "control.sock")
            if len(os.fsencode(path)) > SOCKET_PATH_MAX_BYTES:
                import tempfile

                path = os.path.join(tempfile.mkdtemp(prefix="apexd-"), "control.sock")
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)  # we hold the lock: it is a dead daemon's
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listener.bind(path)
            listener.listen(128)
            return listener, {"socket": path}

        @staticmethod
        def connect(endpoint: dict[str, Any], timeout_s: float) -> socket.socket:
            """Connect to the daemon that `endpoint` describes."""
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.settimeout(timeout_s)
            try:
                connection.connect(endpoint["socket"])
            except BaseException:
                connection.close()
                raise
            return connection

        @staticmethod
        def is_peer_allowed(connection: socket.socket) -> bool:
            """Tell whether the peer is root or our own user (SO_PEERCRED, unix(7))."""
            if hasattr(socket, "SO_PEERCRED"):
                data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
                uid = struct.unpack("3i", data)[1]
            else:  # macOS: LOCAL_PEERCRED of sys/un.h, struct xucred
                uid = struct.unpack_from("II", connection.getsockopt(0, 1, 76))[1]
            return uid in (0, os.geteuid())

        @staticmethod
        def network_file_system(path: str, table: str = "/proc/self/mountinfo") -> str | None:
            """Name the network file system `path` lies on: WAL is not safe there."""
            best, kind = "", ""
            with contextlib.suppress(OSError), open(table, encoding="utf-8") as file:
                for line in file:
                    mount, _, rest = line.partition(" - ")
                    point = mount.split()[4].replace("\\040", " ")
                    inside = path == point or path.startswith(point.rstrip("/") + "/")
                    if inside and len(point) >= len(best):
                        best, kind = point, rest.split()[0]
            return kind if kind in NETWORK_FILE_SYSTEMS else None

        @staticmethod
        def collapse(fd: int, size: int) -> bool:
            """Cut `size` bytes, whole blocks, off a file's head in place; False: cannot.

            FALLOC_FL_COLLAPSE_RANGE of ext4 and XFS, fallocate(2).
            """
            import ctypes

            call = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
            zero = ctypes.c_longlong(0)
            return bool(call and call(fd, 0x08, zero, ctypes.c_longlong(size)) == 0)

        @staticmethod
        def is_foreign(info: os.stat_result) -> bool:
            """Tell whether somebody but us and root owns the file or may write it."""
            return info.st_uid not in (0, os.geteuid()) or bool(info.st_mode & 0o022)

        @staticmethod
        def close_inherited() -> None:
            """Give 0 to 2 a file if they have none; close every descriptor above."""
            while True:
                null = os.open(os.devnull, os.O_RDWR)
                if null > 2:
                    break
                os.set_inheritable(null, True)
            folder = "/dev/fd" if _HAS_NO_PROC else "/proc/self/fd"
            for name in os.listdir(folder):
                if int(name) > 2:
                    with contextlib.suppress(OSError):
                        os.close(int(name))

        @staticmethod
        def reap_orphans(known: Callable[[int], bool]) -> None:
            """Collect what a container's processes left to us as PID 1; never a child's.

            A child taken by mistake would cost nothing: its status is in its record.
            """
            with contextlib.suppress(ChildProcessError):
                while True:
                    peek = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT | os.WNOHANG)
                    if peek is None or known(peek.si_pid):
                        return
                    os.waitpid(peek.si_pid, os.WNOHANG)

        @staticmethod
        def memory_bytes() -> int | None:
            """Return the resident memory of this process, None where unknown."""
            try:
                with open("/proc/self/statm", encoding="ascii") as file:
                    return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            except OSError:
                return None

    _HAS_NO_PROC = not os.path.exists("/proc/self/stat")

    def _exec_detached(argv: list[str], env: dict[str, str], writer: int) -> NoReturn:
        """Become the daemon: runs in the first fork's child, never returns."""
        try:
            os.setsid()
            if os.fork() == 0:
                null = os.open(os.devnull, os.O_RDWR)
                for source, target in ((null, 0), (writer, 1), (writer, 2)):
                    os.dup2(source, target)
                os.execve(argv[0], argv, env)
        finally:
            os._exit(0)

    def _output(argv: list[str]) -> str | None:
        """Return what a command of the system prints, None when it fails."""
        import subprocess

        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        return done.stdout.strip() or None


def is_alive(pid: int, start_time: str | None, boot_id: str | None) -> bool:
    """Tell whether exactly this process lives: PID, start time and boot must agree."""
    if pid <= 1 or start_time is None or boot_id != Platform.boot_id():
        return False
    return Platform.start_time(pid) == start_time


def failpoint(name: str) -> None:
    """Kill this process here when APEXD_FAILPOINT names the place; for crash tests."""
    if os.environ.get("APEXD_FAILPOINT") == name:
        Platform.kill(os.getpid())


# ============================================================================
# 5. FILES - atomic replace, safe open, logs that lose their head
#    Uses 1-4. Any thread; holds no state.
# ============================================================================

_O_BINARY = getattr(os, "O_BINARY", 0)
_O_SAFE = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | _O_BINARY


def cannot_create(path: str, error: OSError) -> DaemonError:
    """Translate a failed open or write into the error a user sees."""
    code = "PERMISSION_DENIED" if isinstance(error, PermissionError) else "CANNOT_CREATE"
    hint = "check its owner and mode, the disk's space, and that it is no symbolic link"
    return DaemonError(code, f"{path}: {error.strerror or error}", hint)


def open_file(path: str, flags: int) -> int:
    """Open a regular file of ours, never through a symbolic link, mode 0600.

    Raises CANNOT_CREATE or PERMISSION_DENIED.
    """
    try:
        fd = os.open(path, flags | _O_SAFE, 0o600)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(errno.EINVAL, "not a regular file")
    except OSError as error:
        raise cannot_create(path, error) from None
    return fd


def write_atomically(path: str, text: str) -> None:
    """Replace a file's content: readers see the old or the new one, never a part."""
    temporary = f"{path}.{os.getpid()}.new"
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _O_SAFE, 0o600)
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise cannot_create(path, error) from None


def read_text(path: str, most: int = FRAME_MAX_BYTES) -> str | None:
    """Return a file's text, None when it is not there; bad bytes become U+FFFD."""
    try:
        with open(path, "rb") as file:
            return file.read(most).decode("utf-8", "replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise cannot_create(path, error) from None


# A log that grows over its cap loses its head to `.1`. Offsets that users of this section
# see are logical: they count from the first byte ever written, and the side file `.base`
# keeps how many bytes are gone. On ext4 and XFS no byte is lost (copy, then collapse the
# range away); elsewhere what is written between the copy and the truncation is.


def log_base(path: str) -> int:
    """Return how many bytes of a log's head are gone."""
    return int(read_text(path + ".base") or 0)


def cap_log(path: str, most_bytes: int) -> bool:
    """Move the head of a log that is over `most_bytes` to `.1`; tell whether it was.

    A crash between copy and cut leaves the head in both. One caller at a time.
    """
    try:
        size = os.stat(path).st_size
    except FileNotFoundError:
        return False
    if size <= most_bytes:
        return False
    fd = open_file(path, os.O_RDWR)
    try:
        block = os.fstat(fd).st_blksize if hasattr(os.stat_result, "st_blksize") else 4096
        cut = (size - 1) // block * block if size <= 2 * most_bytes else size // block * block
        cut = max(cut - most_bytes // 2 // block * block, block)
        _copy_head(fd, path + ".1", cut)
        if not Platform.collapse(fd, cut):
            cut = os.fstat(fd).st_size
            _copy_head(fd, path + ".1", cut)
            os.ftruncate(fd, 0)
        write_atomically(path + ".base", str(log_base(path) + cut))
    finally:
        os.close(fd)
    return True


def _copy_head(fd: int, path: str, size: int) -> None:
    """Write the last bytes of a log's head, at most its cap, to a file of their own."""
    with os.fdopen(open_file(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as copy:
        for at in range(0, size, 1 << 20):
            copy.write(os.pread(fd, min(1 << 20, size - at), at))


def read_log(path: str, offset: int, most: int = LOG_CHUNK_BYTES) -> tuple[bytes, int]:
    """Return (data, next offset) of a log from a logical offset; negative: from its end.

    -n means the last n lines, as far as one chunk reaches.
    """
    try:
        file = open(path, "rb")
    except FileNotFoundError:
        return b"", max(offset, 0)
    with file:
        base = log_base(path)
        if offset < 0:
            end = file.seek(0, os.SEEK_END)
            start = max(0, end - most)
            file.seek(start)
            lines = file.read(end - start).splitlines(keepends=True)[offset:]
            return b"".join(lines), base + end
        file.seek(max(offset - base, 0))
        data = file.read(most)
        return data, max(offset, base) + len(data)


# ============================================================================
# 6. CONFIG - load, check, compare for reload
#    Uses 1-5. Read once at start and at each reload; a Config is never changed.
# ============================================================================

# One row an option: its reader, its default, its meaning. README and `config` follow it.
OPTIONS: dict[str, dict[str, tuple[Callable[[Any], Any], Any, str]]] = {
    "daemon": {
        "poll_interval": (duration, 5.0, "seconds between two looks at the queue"),
        "max_concurrent": (integer(1, 1000), 3, "tasks at once, all groups together"),
        "graceful_timeout": (duration, 30.0, "how long TERM lets running tasks finish"),
        "stop_timeout": (duration, 10.0, "from a task's TERM to its KILL"),
        "heartbeat_interval": (duration, 30.0, "seconds between two heartbeats"),
        "env_keep": (text_list, [], "variables of the caller that tasks get; [\"*\"]: all"),
    },
    "log": {
        "level": (choice("debug", "info", "warning", "error"), "info", "of daemon.log"),
        "max_size_mb": (number, 50.0, "of daemon.log before it is rotated"),
        "max_files": (integer(1, 100), 5, "rotated daemon logs kept"),
        "total_mb": (number, 500.0, "all task logs together; the oldest go first"),
    },
    "retention": {
        "tasks": (integer(0), 10000, "finished tasks kept"),
        "days": (number, 30.0, "how long finished tasks are kept"),
        "max_queue": (integer(1), 1000000, "unfinished tasks the queue takes"),
    },
    "limits": {
        "timeout": (optional_duration, 7200.0, "of a task that names none; 0: none"),
        "retries": (integer(0, 1000), 0, "of a task that names none"),
        "log_mb": (number, 50.0, "one attempt's log; its head goes to .1"),
        "memory_mb": (integer(1), None, "address space of a task"),
        "cpu_seconds": (integer(1), None, "processor time of a task"),
        "open_files": (integer(3), None, "descriptors of a task"),
        "processes": (integer(1), None, "processes of the task's user (not for root)"),
        "max_tokens": (integer(1), None, "reported tokens that end a task"),
        "max_cost": (number, None, "reported cost that ends a task"),
    },
    "group": {
        "max_concurrent": (integer(1, 1000), None, "tasks of this group at once"),
        "launcher": (text_list, [], "words put before each command: [\"srun\", \"-n1\"]"),
    },
}
NAMED = frozenset({"group"})  # sections that come as [group.NAME], with the names of users
FORMER_NAMES = {
    "maxConcurrentTasks": "daemon.max_concurrent",
    "max_concurrent_tasks": "daemon.max_concurrent",
    "max_parallel_actions": "daemon.max_concurrent",
    "pollIntervalMs": "daemon.poll_interval (in seconds)",
    "poll_interval_ms": "daemon.poll_interval (in seconds)",
    "shutdownTimeoutMs": "daemon.graceful_timeout (in seconds)",
    "taskTimeoutMs": "limits.timeout (in seconds)",
    "maxTokensPerTask": "limits.max_tokens",
    "maxCostPerTask": "limits.max_cost",
    "logLevel": "log.level",
    "heartbeatIntervalMs": "daemon.heartbeat_interval (in seconds)",
}


class Section:
    """The options of one section as attributes: config.daemon.poll_interval."""

    def __init__(self, **options: Any) -> None:
        self.__dict__.update(options)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"no option {name}")  # for the type checker: options are Any


class Config:
    """The effective configuration: `daemon`, `log`, `retention`, `limits`, `groups`."""

    def __init__(self, data: Mapping[str, Any], path: str | None = None) -> None:
        self.path = path
        self.daemon = Section(**_read_section("daemon", data.get("daemon", {}), path))
        self.log = Section(**_read_section("log", data.get("log", {}), path))
        self.retention = Section(**_read_section("retention", data.get("retention", {}), path))
        self.limits = Section(**_read_section("limits", data.get("limits", {}), path))
        named = {"default": {}, **data.get("group", {})}
        self.groups = {
            name: Section(**_read_section("group", options, path, name))
            for name, options in named.items()
        }

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return {"daemon": {...}, ..., "group": {name: {...}}}: the effective values."""
        plain = {s: dict(vars(getattr(self, s))) for s in OPTIONS if s not in NAMED}
        return {**plain, "group": {name: dict(vars(g)) for name, g in self.groups.items()}}

    def plan(self, new: Config) -> list[str]:
        """Say what a reload to `new` changes, a line each: "changed log.level: info -> debug"."""
        old_flat, new_flat = _flat(self.to_dict()), _flat(new.to_dict())
        lines = [f"added {k} = {v}" for k, v in new_flat.items() if k not in old_flat]
        lines += [f"removed {k}" for k in old_flat if k not in new_flat]
        for key in old_flat.keys() & new_flat.keys():
            if old_flat[key] != new_flat[key]:
                lines.append(f"changed {key}: {old_flat[key]} -> {new_flat[key]}")
        return sorted(lines)


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            found.update(_flat(value, f"{prefix}{key}."))
        else:
            found[prefix + key] = value
    return found


def _broken(path: str | None, message: str, hint: str = "") -> DaemonError:
    hint = hint or "mend the file; `apexd.py config` shows the effective values"
    return DaemonError("CONFIG_INVALID", f"{path or 'configuration'}: {message}", hint)


def _read_section(
    section: str, given: object, path: str | None, name: str | None = None
) -> dict[str, Any]:
    """Check one table of the file against OPTIONS and fill in the defaults."""
    where = section if name is None else f"{section}.{name}"
    known = OPTIONS[section]
    if not isinstance(given, dict):
        raise _broken(path, f"[{where}] must be a table")
    values = {key: default for key, (_, default, _) in known.items()}
    for key, value in given.items():
        if key not in known:
            raise _unknown(path, f"{where}.{key}", key, known)
        try:
            values[key] = known[key][0](value)
        except ValueError as error:
            raise _broken(path, f"{where}.{key} = {value!r}: must be {error}") from None
    return values


def _unknown(path: str | None, where: str, key: str, known: Iterable[str]) -> DaemonError:
    import difflib

    if key in FORMER_NAMES:
        return _broken(path, f"{where} is called {FORMER_NAMES[key]} here", "rename it")
    near = difflib.get_close_matches(key, list(known), 1, 0.0)
    return _broken(path, f"{where} is not an option", f"did you mean {near[0]}?")


def find_config(folder: str) -> str | None:
    """Return the configuration file of a state folder, None when it has none."""
    for name in ("config.toml", "config.json", "config.yaml"):
        path = os.path.join(folder, name)
        if os.path.lexists(path):
            return path
    return None


def load_config(path: str | None) -> Config:
    """Read and check a configuration file; None gives the defaults.

    Raises CONFIG_INVALID with file, key and reason; then nothing has changed.
    """
    if path is None:
        return Config({})
    try:
        with open(path, "rb") as file:
            raw = file.read()
            info = os.fstat(file.fileno())
        text = raw.decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise _broken(path, f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise _broken(path, f"is not UTF-8 at byte {error.start}", "save it as UTF-8") from None
    if os.environ.get("SUDO_UID") is None and Platform.is_foreign(info) and _is_root():
        raise _broken(path, "is writable by others than root", "chown root, chmod go-w")
    data = _parse(path, text)
    if not isinstance(data, dict):
        raise _broken(path, "must be a table at the top")
    for key, value in data.items():
        if key not in OPTIONS:
            raise _unknown(path, key, key, OPTIONS)
        if key in NAMED and not isinstance(value, dict):
            raise _broken(path, f"[{key}] must be a table of tables")
    return Config(data, path)


def _is_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0


def _parse(path: str, text: str) -> object:
    """Turn a file's text into data by its ending; a YAML file may hold JSON."""
    try:
        if path.endswith(".toml"):
            try:
                import tomllib
            except ImportError:
                hint = "write config.json with the same tables"
                raise _broken(path, "TOML needs Python 3.11", hint) from None
            return tomllib.loads(text)
        with contextlib.suppress(ValueError):
            return json.loads(text)
        if path.endswith(".json"):
            return json.loads(text)
        return _parse_yaml(path, text)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"cannot be parsed: {error}") from None


def _parse_yaml(path: str, text: str) -> object:
    try:
        if sys.flags.no_site:  # the daemon starts without site-packages
            import site

            site.main()
        import yaml
    except ImportError:
        raise _broken(path, "no YAML parser here", "write JSON or TOML") from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error).replace("\n", " ")) from None


# ============================================================================
# 7. LOG - the daemon's own log
#    Uses 1-6. Any thread. Opened and closed by: Daemon.
# ============================================================================


class _LazyLogger:
    """logging.getLogger("apexd") at first use: a CLI call never pays for the import."""

    def __getattr__(self, name: str) -> Any:
        import logging

        return getattr(logging.getLogger("apexd"), name)


log: Any = _LazyLogger()


def open_log(path: str, options: Section, to_stderr: bool) -> None:
    """Send the log to a rotating file, and to standard error in the foreground.

    A line: [2025-01-15T10:30:05.456Z] [INFO] Starting task 12
    """
    import logging
    import logging.handlers

    class OneLine(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            text = super().format(record)
            head, *rest = text.split("\n")
            line = f"[{timestamp(record.created)}] [{record.levelname}] {printable(head)}"
            return "\n".join([line, *("    " + printable(more) for more in rest)])

    logging.raiseExceptions = False  # a full disk costs lines, never the daemon
    os.close(open_file(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT))
    size = int(options.max_size_mb * 1e6)
    handlers: list[logging.Handler] = [
        logging.handlers.RotatingFileHandler(
            path, maxBytes=size, backupCount=options.max_files, encoding="utf-8", errors="replace"
        )
    ]
    if to_stderr:
        handlers.append(logging.StreamHandler())
    logger = logging.getLogger("apexd")
    logger.propagate = False
    close_log()
    for handler in handlers:
        handler.setFormatter(OneLine())
        logger.addHandler(handler)
    debug = os.environ.get("APEX_DAEMON_DEBUG")
    logger.setLevel("DEBUG" if debug else options.level.upper())


def close_log() -> None:
    """Flush and forget the handlers."""
    import logging

    logger = logging.getLogger("apexd")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()


# ============================================================================
# 8. PIDFILE - the lock and the PID file
#    Uses 1-7. One thread of its owner. Released by: whoever acquired it.
# ============================================================================

# Who owns a project is decided by one thing: the lock on `daemon.lock`, a file that is never
# deleted, so that no two processes can ever lock two files of that name. What stands in the
# lock file and in the PID file is information, believed only while the lock is held and the
# process it names has the start time and boot it names.


class Holder(Value):
    """Who holds the lock, as written into the lock file."""

    pid: int
    start_time: str | None
    boot_id: str | None
    role: str  # "daemon" or "client VERB"

    @property
    def is_daemon(self) -> bool:
        """Tell whether a daemon that lives wrote this."""
        return self.role == "daemon" and is_alive(self.pid, self.start_time, self.boot_id)


class PidFile:
    """A PID file in JSON and the lock beside it (NAME.lock) that makes it true.

    Life: acquire -> release; a process that dies releases it too. The lock file stays.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.lock_path = os.path.splitext(path)[0] + ".lock"
        self._fd: int | None = None

    def acquire(self, role: str = "daemon", project: str = "") -> bool:
        """Take the lock, without waiting; False when somebody else has it.

        A daemon's PID file is written too:
        {"pid": 1, "startedAt": "2025-01-15T10:30:00.000Z", "version": ..., "projectPath": ...}
        Raises CANNOT_CREATE, PERMISSION_DENIED.
        """
        fd = open_file(self.lock_path, os.O_RDWR | os.O_CREAT)
        try:
            if not Platform.lock(fd):
                os.close(fd)
                return False
            pid = os.getpid()
            me = Holder(pid=pid, start_time=Platform.start_time(pid), role=role)
            me.boot_id = Platform.boot_id()
            os.ftruncate(fd, 0)
            os.lseek(fd, 0, os.SEEK_SET)
            os.write(fd, json.dumps(me.to_dict()).encode())
            if role == "daemon":
                started = timestamp(Clock.now())
                fields = {"pid": pid, "startedAt": started, "version": __version__}
                write_atomically(self.path, json.dumps({**fields, "projectPath": project}) + "\n")
        except OSError as error:
            os.close(fd)
            raise cannot_create(self.lock_path, error) from None
        except DaemonError:
            os.close(fd)
            raise
        self._fd = fd
        return True

    def release(self) -> None:
        """Remove the PID file if it is ours, then let go of the lock."""
        if self._fd is None:
            return
        with contextlib.suppress(DaemonError, OSError):
            if self.read().get("pid") == os.getpid():
                os.unlink(self.path)
        os.close(self._fd)
        self._fd = None

    def read(self) -> dict[str, Any]:
        """Return the PID file's content, {} when there is none.

        Raises PID_FILE_CORRUPTED when it holds no PID that could be a daemon's.
        """
        text = read_text(self.path, 65536)
        if text is None:
            return {}
        try:
            fields = json.loads(text)
            if type(fields["pid"]) is int and 1 <= fields["pid"] < 2**31:
                return dict(fields)
        except (ValueError, TypeError, KeyError, RecursionError):
            pass
        hint = f"no process is signalled because of it; remove {self.path}"
        raise DaemonError("PID_FILE_CORRUPTED", f"{self.path} holds no PID", hint)

    def holder(self) -> Holder | None:
        """Return who holds the lock, None when nobody does.

        An unreadable entry gives a Holder with PID 0. Raises PERMISSION_DENIED when the
        lock file belongs to somebody who could name any process in it.
        """
        if not os.path.lexists(self.lock_path):
            return None
        fd = open_file(self.lock_path, os.O_RDWR)
        try:
            if Platform.is_foreign(os.fstat(fd)):
                hint = "chown and chmod go-w it, or act as its owner"
                raise DaemonError("PERMISSION_DENIED", f"{self.lock_path} is not ours", hint)
            if Platform.lock(fd):
                return None
            os.lseek(fd, 0, os.SEEK_SET)
            fields = json.loads(os.read(fd, 4096))
            return Holder(**{**fields, "pid": int(fields["pid"])})
        except (ValueError, TypeError, KeyError):
            return Holder(pid=0, role="unknown")
        finally:
            os.close(fd)


# ============================================================================
# 9. STORE - the sqlite file: schema, migrations and every SQL statement
#    Uses 1-8. Any thread, under one lock; one connection. Closed by: Daemon.
# ============================================================================

SCHEMA = """
CREATE TABLE requests (                -- one row an `add` or `report`: a token never acts twice
  id         INTEGER PRIMARY KEY,
  token      TEXT UNIQUE,
  answer     TEXT NOT NULL,            -- JSON, given again to the same token
  cwd        TEXT,                     -- what the tasks of one request have in common
  env        TEXT,                     -- JSON object
  umask      INTEGER,
  first_task INTEGER NOT NULL,         -- the row goes when the tasks of this range are gone
  last_task  INTEGER NOT NULL,
  created_at REAL NOT NULL
);
CREATE TABLE tasks (                   -- intent
  id         INTEGER PRIMARY KEY AUTOINCREMENT,
  request_id INTEGER NOT NULL,
  state      TEXT NOT NULL,
  grp        TEXT NOT NULL,
  priority   INTEGER NOT NULL,
  command    TEXT NOT NULL,            -- JSON: a string for sh, an array of arguments
  label      TEXT,
  key        TEXT,                     -- at most one unfinished task has it
  due_at     REAL,
  retries    INTEGER NOT NULL,
  timeout    REAL,
  on_lost    TEXT NOT NULL,
  max_tokens INTEGER,
  max_cost   REAL,
  created_at REAL NOT NULL,
  finished_at REAL,                    -- set in a final state
  open_deps  INTEGER NOT NULL DEFAULT 0,
  attempts   INTEGER NOT NULL DEFAULT 0,
  failures   INTEGER NOT NULL DEFAULT 0,
  losses     INTEGER NOT NULL DEFAULT 0,
  deferrals  INTEGER NOT NULL DEFAULT 0,
  tokens     INTEGER NOT NULL DEFAULT 0,
  cost       REAL NOT NULL DEFAULT 0,
  progress   REAL,
  note       TEXT
);
-- The claim: one probe a group, however many wait.
CREATE INDEX tasks_ready ON tasks (grp, priority DESC, id) WHERE state = 'queued';
CREATE INDEX tasks_due ON tasks (due_at) WHERE state = 'scheduled';
CREATE INDEX tasks_state ON tasks (state, id);
CREATE INDEX tasks_finished ON tasks (finished_at) WHERE finished_at IS NOT NULL;
CREATE UNIQUE INDEX tasks_key ON tasks (key) WHERE key IS NOT NULL AND finished_at IS NULL;
CREATE TABLE attempts (                -- fact
  task_id    INTEGER NOT NULL,
  number     INTEGER NOT NULL,         -- from 1
  run_id     TEXT NOT NULL,
  slot       INTEGER NOT NULL,
  boot_id    TEXT NOT NULL,
  started_at REAL NOT NULL,
  finished_at REAL,
  wish       TEXT,                     -- committed before the first signal
  outcome    TEXT,                     -- NULL while it runs
  exit_code  INTEGER,
  reason     TEXT,
  PRIMARY KEY (task_id, number)
) WITHOUT ROWID;
CREATE TABLE deps (                    -- child comes after parent
  parent INTEGER NOT NULL,
  child  INTEGER NOT NULL,
  need   TEXT NOT NULL,
  PRIMARY KEY (parent, child)
) WITHOUT ROWID;
CREATE INDEX deps_child ON deps (child);
CREATE TABLE paused (grp TEXT PRIMARY KEY) WITHOUT ROWID;  -- '*': everything
CREATE TABLE counts (state TEXT, grp TEXT, n INTEGER NOT NULL, PRIMARY KEY (state, grp))
  WITHOUT ROWID;
CREATE TRIGGER tasks_added AFTER INSERT ON tasks BEGIN
  INSERT OR IGNORE INTO counts VALUES (new.state, new.grp, 0);
  UPDATE counts SET n = n + 1 WHERE state = new.state AND grp = new.grp;
END;
CREATE TRIGGER tasks_moved AFTER UPDATE OF state ON tasks BEGIN
  INSERT OR IGNORE INTO counts VALUES (new.state, new.grp, 0);
  UPDATE counts SET n = n + 1 WHERE state = new.state AND grp = new.grp;
  UPDATE counts SET n = n - 1 WHERE state = old.state AND grp = old.grp;
END;
CREATE TRIGGER tasks_removed AFTER DELETE ON tasks BEGIN
  UPDATE counts SET n = n - 1 WHERE state = old.state AND grp = old.grp;
END;
"""
MIGRATIONS = (SCHEMA,)  # script i brings `PRAGMA user_version` i to i + 1


class Database:
    """The one connection to the one file, and the lock that guards it.

    EXCLUSIVE locking keeps every other writer out, since SQLite before 3.51.3 can lose
    commits when two connections write and checkpoint at once (sqlite.org/wal.html).
    """

    def __init__(self, path: str) -> None:
        """Open, check and migrate. Raises DATABASE_CORRUPT, _NEWER, _FAILED."""
        import sqlite3

        self.path = path
        self._errors = sqlite3.Error
        self._lock = threading.RLock()
        if path != ":memory:":
            os.close(open_file(path, os.O_RDWR | os.O_CREAT))
            if os.stat(path).st_nlink != 1:
                raise cannot_create(path, OSError(errno.EMLINK, "has other hard links"))
        with self._translated():
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._db.row_factory = sqlite3.Row
            try:
                self._configure()
                self._migrate()
            except BaseException:
                self._db.close()
                raise

    def _configure(self) -> None:
        for pragma in (
            "busy_timeout = 5000",
            "locking_mode = EXCLUSIVE",  # one owner; no shared-memory file either
            "journal_mode = WAL",
            "synchronous = FULL",  # on disk when a commit returns
            "fullfsync = ON",  # macOS: fsync alone stops at the drive's cache
            "trusted_schema = OFF",  # sqlite.org/security.html
            "cell_size_check = ON",
        ):
            self._db.execute("PRAGMA " + pragma)

    def _migrate(self) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version > len(MIGRATIONS):
            hint = "use the apexd that made it, or a newer one"
            raise DaemonError("DATABASE_NEWER", f"{self.path} has schema {version}", hint)
        for number, script in enumerate(MIGRATIONS[version:], version + 1):
            self._db.executescript(f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {number};")
            failpoint("migration")
            self._db.execute("COMMIT")

    def check(self) -> None:
        """Read every page once. Raises DATABASE_CORRUPT."""
        with self.read() as db:
            (verdict,) = db.execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                raise self._corrupt(str(verdict))

    def _corrupt(self, what: str) -> DaemonError:
        hint = "it is kept as it is: restore a backup, or move it away and start anew"
        return DaemonError("DATABASE_CORRUPT", f"{self.path}: {what}", hint)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except self._errors as error:
            text = str(error)
            if re.search("not a database|malformed|corrupt", text):
                raise self._corrupt(text) from None
            hint = "check the disk's space and the file's mode"
            raise DaemonError("DATABASE_FAILED", f"{self.path}: {text}", hint) from None

    @contextlib.contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """Give the connection for statements that change nothing."""
        with self._lock, self._translated():
            yield self._db

    @contextlib.contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """Give the connection within one transaction; on disk when it returns."""
        with self._lock, self._translated():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def close(self) -> None:
        """Checkpoint and close."""
        with self._lock, contextlib.suppress(self._errors):
            self._db.close()


_TASK_SQL = """
SELECT t.*, a.started_at, a.outcome, a.exit_code, a.reason, a.wish, a.run_id, a.slot, a.boot_id,
       (SELECT cwd FROM requests WHERE id = t.request_id) AS cwd
FROM tasks t
LEFT JOIN attempts a ON a.task_id = t.id AND a.number = t.attempts
"""
_INSERT_SQL = """
INSERT INTO tasks (id, command, request_id, state, grp, priority, label, key, due_at, retries,
                   timeout, on_lost, max_tokens, max_cost, created_at, finished_at, open_deps)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""


def _row_to_task(row: sqlite3.Row, after: list[str] | None = None) -> Task:
    fields = dict(zip(row.keys(), row))
    del fields["open_deps"]
    exit_code = fields["exit_code"]
    fields["group"] = fields.pop("grp")
    fields["command"] = json.loads(fields["command"])
    fields["state"] = State(fields["state"])
    fields["signal"] = exit_code - 128 if exit_code and 128 < exit_code < 193 else None
    for name in ("outcome", "wish"):
        fields[name] = Outcome(fields[name]) if fields[name] else None
    return Task(after=after or [], **fields)


_DONE = [state.value for state in DONE]


def _marks(items: Sequence[object]) -> str:
    return ",".join("?" * len(items))


class AddOptions:
    """The options of one task, read and checked; the ones not given come from `limits`."""

    READERS: dict[str, Callable[[Any], Any]] = {
        "group": line_of_text,
        "priority": integer(-PRIORITY_MAX, PRIORITY_MAX),
        "label": line_of_text,
        "after": dependencies,
        "delay": duration,
        "retries": integer(0, 1000),
        "timeout": duration,
        "key": line_of_text,
        "on_lost": choice("retry", "fail"),
        "max_tokens": integer(1),
        "max_cost": number,
    }

    def __init__(self, given: Mapping[str, Any], config: Config) -> None:
        unknown = given.keys() - self.READERS.keys()
        if unknown:
            raise bad(f"a task has no option {min(unknown)!r}", "see `add --help`")
        values: dict[str, Any] = {}
        for name, value in given.items():
            try:
                values[name] = None if value is None else self.READERS[name](value)
            except ValueError as error:
                raise bad(f"{name} {str(value)[:40]!r}: must be {error}") from None
        limits = config.limits
        self.group = values.get("group") or "default"
        if self.group not in config.groups:
            hint = f"groups: {', '.join(config.groups)}; declare [group.{self.group}] and reload"
            raise DaemonError("UNKNOWN_GROUP", f"there is no group {self.group!r}", hint)
        self.after: list[tuple[int, Need]] = values.get("after") or []
        self.key = values.get("key")
        now, delay = Clock.now(), values.get("delay")
        self.first_state = State.SCHEDULED if delay else State.QUEUED
        self._due_at = now + delay if delay else None
        retries, timeout = values.get("retries"), values.get("timeout")
        self._head = (self.group, values.get("priority") or 0, values.get("label"), self.key)
        self._tail = (
            limits.retries if retries is None else retries,
            limits.timeout if timeout is None else timeout or None,
            values.get("on_lost") or "retry",
            values.get("max_tokens") or limits.max_tokens,
            values.get("max_cost") or limits.max_cost,
            now,
        )
        self._now = now

    def row(self, request_id: int, state: State, open_deps: int) -> tuple[object, ...]:
        """Return the row of _INSERT_SQL but for its id and command."""
        finished_at = self._now if state in DONE else None
        head, tail = self._head, self._tail
        return (request_id, state.value, *head, self._due_at, *tail, finished_at, open_deps)


def _check_room(db: sqlite3.Connection, most: int, wanted: int) -> None:
    (unfinished,) = db.execute(
        f"SELECT coalesce(sum(n), 0) FROM counts WHERE state NOT IN ({_marks(_DONE)})", _DONE
    ).fetchone()
    if unfinished + wanted > most:
        hint = "wait, remove some, or raise retention.max_queue"
        raise DaemonError("QUEUE_FULL", f"{unfinished} unfinished tasks are queued", hint)


def _insert_tasks(
    db: sqlite3.Connection,
    commands: Sequence[Any],
    options: Mapping[str, Any],
    config: Config,
    request: int,
) -> list[int]:
    """Insert the tasks of one request: the plain ones of a large batch in one statement."""
    common = AddOptions(options, config)
    seq = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'tasks'").fetchone()
    next_id = (seq[0] if seq else 0) + 1
    is_plain = not common.after and not common.key
    plain_row = common.row(request, common.first_state, 0)
    rows: list[tuple[object, ...]] = []
    ids: list[int] = []
    for line, item in enumerate(commands, 1):
        try:
            if item is None:
                continue
            if is_plain and not isinstance(item, dict):
                rows.append((next_id, json.dumps(command_line(item)), *plain_row))
                ids.append(next_id)
            else:
                given = {**options, **item} if isinstance(item, dict) else {"command": item}
                command = json.dumps(command_line(given.pop("command", None)))
                own = AddOptions(given, config) if isinstance(item, dict) else common
                db.executemany(_INSERT_SQL, rows)
                rows.clear()
                ids.append(_insert_one(db, next_id, command, own, request))
            next_id = max(next_id, ids[-1] + 1)
        except ValueError as error:
            place = f"line {line}: " if len(commands) > 1 else ""
            raise bad(f"{place}must be {error}") from None
        except DaemonError as error:
            place = f"line {line}: " if len(commands) > 1 else ""
            raise DaemonError(error.code, place + error.message, error.hint) from None
    db.executemany(_INSERT_SQL, rows)
    return ids


def _insert_one(
    db: sqlite3.Connection, task_id: int, command: str, own: AddOptions, request: int
) -> int:
    """Insert a task with dependencies or a key; return its id or that of the key's holder."""
    if own.key:
        sql = "SELECT id FROM tasks WHERE key = ? AND finished_at IS NULL"
        holder = db.execute(sql, (own.key,)).fetchone()
        if holder:
            return int(holder[0])
    open_deps, state = 0, own.first_state
    for parent, need in own.after:
        row = db.execute("SELECT state FROM tasks WHERE id = ?", (parent,)).fetchone()
        if row is None:
            raise unknown_task(parent)
        if State(row[0]) not in DONE:
            open_deps += 1
        elif not need.is_met_by(State(row[0])):
            state = State.SKIPPED
    if open_deps and state != State.SKIPPED:
        state = State.WAITING
    db.execute(_INSERT_SQL, (task_id, command, *own.row(request, state, open_deps)))
    db.executemany(
        "INSERT OR IGNORE INTO deps VALUES (?, ?, ?)",
        [(parent, task_id, need.value) for parent, need in own.after],
    )
    return task_id


def unknown_task(task_id: int) -> DaemonError:
    """Make the error of an id that names no task."""
    return DaemonError("UNKNOWN_TASK", f"there is no task {task_id}", "see `list`")


def set_state(
    db: sqlite3.Connection, task_id: int, old: State, new: State, delay: float = 0.0
) -> None:
    """Move a task: the only writer of `state`, but for its insertion.

    A task that reaches a final state releases, or skips, what comes after it.
    """
    if new not in MOVES[old]:
        raise DaemonError("INTERNAL", f"task {task_id} cannot go from {old.value} to {new.value}")
    now = Clock.now()
    sql = "UPDATE tasks SET state = ?, due_at = ?, finished_at = ? WHERE id = ? AND state = ?"
    due_at = now + delay if new == State.SCHEDULED else None
    finished_at = now if new in DONE else None
    db.execute(sql, (new.value, due_at, finished_at, task_id, old.value))
    if new in DONE:
        _settle(db, task_id, new)


def _settle(db: sqlite3.Connection, parent: int, state: State) -> None:
    """Tell the tasks that wait for `parent` how it ended; a skip goes on down the graph."""
    ended = [(parent, state)]
    while ended:
        parent, state = ended.pop()
        for row in db.execute(
            """
            SELECT t.id, t.open_deps, t.due_at, d.need
            FROM deps d JOIN tasks t ON t.id = d.child
            WHERE d.parent = ? AND t.state = 'waiting'
            """,
            (parent,),
        ).fetchall():
            if not Need(row["need"]).is_met_by(state):
                sql = "UPDATE tasks SET state = 'skipped', finished_at = ? WHERE id = ?"
                db.execute(sql, (Clock.now(), row["id"]))
                ended.append((row["id"], State.SKIPPED))
                continue
            sql = "UPDATE tasks SET open_deps = open_deps - 1 WHERE id = ?"
            db.execute(sql, (row["id"],))
            if row["open_deps"] == 1:
                _release(db, row["id"], row["due_at"])


def _release(db: sqlite3.Connection, task_id: int, due_at: float | None) -> None:
    """Let a task go that waited for others: to its time, or to the queue."""
    is_early = due_at is not None and due_at > Clock.now()
    state = State.SCHEDULED if is_early else State.QUEUED
    db.execute("UPDATE tasks SET state = ? WHERE id = ?", (state.value, task_id))


def _reopen(db: sqlite3.Connection, task_id: int) -> None:
    """Put a finished task back as if new, and count again what comes after it."""
    work = [(task_id, True)]
    while work:
        task_id, is_named = work.pop()
        states = [
            (State(row[0]), Need(row[1]))
            for row in db.execute(
                "SELECT t.state, d.need FROM deps d JOIN tasks t ON t.id = d.parent "
                "WHERE d.child = ?",
                (task_id,),
            )
        ]
        if not is_named and any(s in DONE and not need.is_met_by(s) for s, need in states):
            continue  # another of its parents still keeps it skipped
        open_deps = sum(state not in DONE for state, _ in states)
        db.execute(
            """
            UPDATE tasks
            SET state = ?, open_deps = ?, finished_at = NULL, due_at = NULL, progress = NULL,
                failures = 0, losses = 0, deferrals = 0, tokens = 0, cost = 0
            WHERE id = ?
            """,
            ((State.WAITING if open_deps else State.QUEUED).value, open_deps, task_id),
        )
        sql = "SELECT t.id FROM deps d JOIN tasks t ON t.id = d.child WHERE d.parent = ? "
        sql += "AND t.state IN ('skipped', 'waiting')"
        work += [(row[0], False) for row in db.execute(sql, (task_id,))]


def _cancel(db: sqlite3.Connection, task_id: int, state: State) -> bool:
    if state == State.RUNNING:
        set_wish(db, task_id, Outcome.CANCELLED)
    elif state not in DONE:
        set_state(db, task_id, state, State.CANCELLED)
    return state not in DONE


def _retry(db: sqlite3.Connection, task_id: int, state: State) -> bool:
    if state in DONE:
        _reopen(db, task_id)
    return state in DONE


def _remove(db: sqlite3.Connection, task_id: int, state: State) -> bool:
    if state == State.RUNNING:
        return False
    if state not in DONE:
        set_state(db, task_id, state, State.CANCELLED)
    delete_tasks(db, [task_id])
    return True


def set_wish(db: sqlite3.Connection, task_id: int, wish: Outcome) -> None:
    """Write down why a running attempt is about to be ended; the first wish stays."""
    db.execute(
        "UPDATE attempts SET wish = coalesce(wish, ?) WHERE task_id = ? AND outcome IS NULL",
        (wish.value, task_id),
    )


def delete_tasks(db: sqlite3.Connection, ids: Sequence[int]) -> None:
    """Forget tasks and all that belongs to them."""
    for table, column in (
        ("tasks", "id"), ("attempts", "task_id"), ("deps", "parent"), ("deps", "child")
    ):
        sql = f"DELETE FROM {table} WHERE {column} = ?"
        db.executemany(sql, [(task_id,) for task_id in ids])


def make_state_folder(folder: str) -> None:
    """Make the state folder, 0700 and ignored by git. Raises CANNOT_CREATE, CONFIG_INVALID."""
    kind = Platform.network_file_system(os.path.realpath(os.path.dirname(folder)))
    if kind is not None:
        hint = "use --state DIR (or APEX_STATE_DIR) with a folder on a local disk"
        raise DaemonError("CONFIG_INVALID", f"{folder} is on {kind}: sqlite is unsafe there", hint)
    try:
        for part in (folder, os.path.join(folder, "run"), os.path.join(folder, "logs")):
            os.makedirs(part, mode=0o700, exist_ok=True)
    except OSError as error:
        raise cannot_create(folder, error) from None
    ignore = os.path.join(folder, ".gitignore")
    if not os.path.exists(ignore):
        write_atomically(ignore, "*\n")


class TaskStore:
    """The durable queue: what users do to tasks. AttemptStore is the runner's side.

    `TaskStore(path)` takes the project's lock (raises BUSY); one made within the daemon is
    given the lock that it holds. Any thread. Durability: on disk when a method returns.
    """

    def __init__(
        self,
        path: str,
        config: Config | None = None,
        lock: PidFile | None = None,
        project: str = "",
    ) -> None:
        self.path = path
        self.folder = os.path.dirname(os.path.abspath(path))
        self.project = project or os.path.dirname(self.folder)
        self.config = config or Config({})
        self._own_lock = None
        if lock is None and path != ":memory:":
            make_state_folder(self.folder)
            lock = self._own_lock = PidFile(os.path.join(self.folder, "daemon.pid"))
            if not lock.acquire("client store"):
                raise DaemonError("BUSY", f"{path} is in use", "use Client, or stop the daemon")
        try:
            self.database = Database(path)
            self.inode = 0 if path == ":memory:" else os.stat(path).st_ino
        except BaseException:
            self._release()
            raise

    def _release(self) -> None:
        if self._own_lock is not None:
            self._own_lock.release()

    def close(self) -> None:
        """Close the database and let go of the lock if it was taken here."""
        self.database.close()
        self._release()

    def add(
        self,
        commands: Sequence[Any],
        options: Mapping[str, Any] | None = None,
        *,
        token: str | None = None,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        umask: int | None = None,
    ) -> list[int]:
        """Put commands into the queue, all or none; return their ids in order.

        A command is a string (run by sh), a list (argv), {"command": ..., OPTION: ...} with
        options of its own, or None, which is passed over. The same token again answers with
        the ids of the first time. Raises BAD_REQUEST (naming the line), UNKNOWN_GROUP,
        UNKNOWN_TASK, QUEUE_FULL.
        """
        with self.database.write() as db:
            known = db.execute("SELECT answer FROM requests WHERE token = ?", (token,)).fetchone()
            if known:
                return list(json.loads(known[0]))
            _check_room(db, self.config.retention.max_queue, len(commands))
            (request,) = db.execute("SELECT coalesce(max(id), 0) + 1 FROM requests").fetchone()
            ids = _insert_tasks(db, commands, options or {}, self.config, request)
            context = (cwd or os.getcwd(), json.dumps(dict(env or {})), umask)
            row = (request, token, json.dumps(ids), *context, min(ids), max(ids), Clock.now())
            db.execute(f"INSERT INTO requests VALUES ({_marks(row)})", row)
        return ids

    def find(
        self,
        state: str | None = None,
        group: str | None = None,
        before: int | None = None,
        limit: int = 100,
        ids: Sequence[int] | None = None,
    ) -> list[Task]:
        """Return the newest tasks with ids below `before`, ascending; at most `limit`."""
        sql, values = _TASK_SQL + "WHERE t.id < ?", [before or INTEGER_MAX]  # type: list[Any]
        if state is not None:
            sql += " AND t.state = ?"
            values.append(State(state).value)
        if group is not None:
            sql += " AND t.grp = ?"
            values.append(group)
        if ids is not None:
            sql += f" AND t.id IN ({_marks(ids)})"
            values += ids
        with self.database.read() as db:
            rows = db.execute(sql + " ORDER BY t.id DESC LIMIT ?", [*values, limit]).fetchall()
            return [_row_to_task(row, self._after(db, row["id"])) for row in reversed(rows)]

    def _after(self, db: sqlite3.Connection, task_id: int) -> list[str]:
        sql = "SELECT parent, need FROM deps WHERE child = ? ORDER BY parent"
        return [f"{parent}:{need}" for parent, need in db.execute(sql, (task_id,))]

    def get(self, task_id: int) -> Task:
        """Return one task. Raises UNKNOWN_TASK."""
        with self.database.read() as db:
            row = db.execute(_TASK_SQL + "WHERE t.id = ?", (task_id,)).fetchone()
            if row is None:
                raise unknown_task(task_id)
            return _row_to_task(row, self._after(db, task_id))

    def get_attempts(self, task_id: int) -> list[dict[str, Any]]:
        """Return the attempts of a task, first to last, one dict a row of `attempts`."""
        with self.database.read() as db:
            sql = "SELECT * FROM attempts WHERE task_id = ? ORDER BY number"
            return [dict(zip(row.keys(), row)) for row in db.execute(sql, (task_id,))]

    def get_counts(self) -> dict[str, dict[str, int]]:
        """Return {state: {group: number}}, without the zeros."""
        counts: dict[str, dict[str, int]] = {}
        with self.database.read() as db:
            for state, group, n in db.execute("SELECT state, grp, n FROM counts WHERE n > 0"):
                counts.setdefault(state, {})[group] = n
        return counts

    def change(self, verb: str, ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """Cancel, retry or remove tasks, all or (an unknown id) none.

        Return (ids it was done to, ids whose state did not allow it). Of a running task
        that is cancelled the wish is on disk now; whoever runs it sends the signals.
        """
        change = {"cancel": _cancel, "retry": _retry, "remove": _remove}[verb]
        done: list[int] = []
        with self.database.write() as db:
            states = [db.execute("SELECT state FROM tasks WHERE id = ?", (i,)).fetchone() for i in ids]
            if None in states:
                raise unknown_task(ids[states.index(None)])
            done = [i for i, row in zip(ids, states) if change(db, i, State(row[0]))]
        return done, [i for i in ids if i not in set(done)]

    def pause(self, group: str | None, on: bool) -> None:
        """Stop or go on with claiming from a group, None: from all; what runs goes on."""
        name = "*" if group is None else group
        if group is not None and group not in self.config.groups:
            hint = "groups: " + ", ".join(self.config.groups)
            raise DaemonError("UNKNOWN_GROUP", f"there is no group {group!r}", hint)
        with self.database.write() as db:
            if on:
                db.execute("INSERT OR IGNORE INTO paused VALUES (?)", (name,))
            elif group is None:
                db.execute("DELETE FROM paused")
            else:
                db.execute("DELETE FROM paused WHERE grp = ?", (name,))

    def get_paused(self) -> list[str]:
        """Return the paused groups; "*" stands for everything."""
        with self.database.read() as db:
            return [row[0] for row in db.execute("SELECT grp FROM paused ORDER BY grp")]

    def report(self, task_id: int, token: str | None, usage: Mapping[str, Any]) -> bool:
        """Add {tokens, cost} to a running task's usage, set {progress, note}.

        Return True when it is over its budget now: then the wish is on disk. A run id in
        `usage` must be the running attempt's. Raises UNKNOWN_TASK, ILLEGAL_STATE.
        """
        with self.database.write() as db:
            sql = "SELECT answer FROM requests WHERE token = ?"
            if token is not None and db.execute(sql, (token,)).fetchone():
                return False
            task = self.get(task_id)
            sql = "SELECT run_id FROM attempts WHERE task_id = ? AND outcome IS NULL"
            run = db.execute(sql, (task_id,)).fetchone()
            if run is None or usage.get("run_id") not in (None, run[0]):
                raise DaemonError("ILLEGAL_STATE", f"task {task_id} is {task.state.value}")
            tokens = task.tokens + integer(0, 10**15)(usage.get("tokens") or 0)
            cost = task.cost + number(usage.get("cost") or 0.0)
            progress, note = usage.get("progress"), usage.get("note")
            progress = task.progress if progress is None else min(number(progress), 100.0)
            note = task.note if note is None else line_of_text(note)
            db.execute(
                "UPDATE tasks SET tokens = ?, cost = ?, progress = ?, note = ? WHERE id = ?",
                (tokens, cost, progress, note, task_id),
            )
            row = (None, token, "null", None, None, None, 0, 0, Clock.now())
            db.execute(f"INSERT INTO requests VALUES ({_marks(row)})", row)
            is_over = tokens > (task.max_tokens or tokens) or cost > (task.max_cost or cost)
            if is_over:
                set_wish(db, task_id, Outcome.OVER_BUDGET)
            return is_over


class AttemptStore:
    """The runner's side of the queue: claims, wishes, results, upkeep.

    Shares the Database of a TaskStore; any thread; on disk when a method returns.
    """

    def __init__(self, store: TaskStore) -> None:
        self._store = store
        self._database = store.database
        self._contexts: dict[int, tuple[dict[str, str], int | None]] = {}

    def turn(
        self,
        finished: Sequence[tuple[Task, Result]],
        slots: Sequence[int],
        busy: Mapping[str, int],
    ) -> list[Task]:
        """One transaction: record all that finished, promote what is due, claim what fits.

        slots: the free ones; busy: running attempts by group. Return what was claimed.
        """
        with self._database.write() as db:
            for task, result in finished:
                self._finish(db, task, result)
            sql = "SELECT id FROM tasks WHERE state = 'scheduled' AND due_at <= ? LIMIT 1000"
            for row in db.execute(sql, (Clock.now(),)).fetchall():
                set_state(db, row[0], State.SCHEDULED, State.QUEUED)
            ready = self._find_ready(db, len(slots), busy) if slots else []
            claimed = [self._claim(db, task_id, slot) for task_id, slot in zip(ready, slots)]
            failpoint("claim")
        return claimed

    def _find_ready(
        self, db: sqlite3.Connection, room: int, busy: Mapping[str, int]
    ) -> list[int]:
        """Return the ids to claim: one probe a group, then the best over the groups."""
        paused = {row[0] for row in db.execute("SELECT grp FROM paused")}
        sql = "SELECT grp FROM counts WHERE state = 'queued' AND n > 0"
        found: list[tuple[int, int]] = []
        for (group,) in db.execute(sql).fetchall():
            section = self._store.config.groups.get(group)
            limit = section.max_concurrent if section else None
            most = room if limit is None else min(room, limit - busy.get(group, 0))
            if most <= 0 or group in paused or "*" in paused:
                continue
            found += db.execute(
                """
                SELECT -priority, id FROM tasks
                WHERE state = 'queued' AND grp = ?
                ORDER BY priority DESC, id
                LIMIT ?
                """,
                (group, most),
            ).fetchall()
        return [task_id for _, task_id in sorted(map(tuple, found))[:room]]

    def _claim(self, db: sqlite3.Connection, task_id: int, slot: int) -> Task:
        set_state(db, task_id, State.QUEUED, State.RUNNING)
        db.execute("UPDATE tasks SET attempts = attempts + 1 WHERE id = ?", (task_id,))
        run_id = f"{task_id}-{os.urandom(8).hex()}"
        db.execute(
            """
            INSERT INTO attempts (task_id, number, run_id, slot, boot_id, started_at)
            SELECT id, attempts, ?, ?, ?, ? FROM tasks WHERE id = ?
            """,
            (run_id, slot, Platform.boot_id(), Clock.now(), task_id),
        )
        return _row_to_task(db.execute(_TASK_SQL + "WHERE t.id = ?", (task_id,)).fetchone())

    def _finish(self, db: sqlite3.Connection, task: Task, result: Result) -> None:
        """Record one result; an attempt that is finished already changes nothing."""
        at = {"id": task.id, "number": task.attempts, "run": task.run_id, "now": Clock.now()}
        where = "WHERE task_id = :id AND number = :number AND run_id = :run AND outcome IS NULL"
        row = db.execute(f"SELECT wish FROM attempts {where}", at).fetchone()
        if row is None:
            return
        outcome = outcome_of(result, Outcome(row[0]) if row[0] else None)
        if outcome is None:
            db.execute(f"DELETE FROM attempts {where}", at)
            db.execute("UPDATE tasks SET attempts = attempts - 1 WHERE id = :id", at)
            set_state(db, task.id, State.RUNNING, State.QUEUED)
            return
        at.update(outcome=outcome.value, code=result.exit_code, reason=result.reason)
        sql = "UPDATE attempts SET outcome = :outcome, exit_code = :code, reason = :reason,"
        db.execute(f"{sql} finished_at = :now {where}", at)
        if outcome != Outcome.OK:
            at["failed"] = outcome in (Outcome.FAILED, Outcome.TIMEOUT)
            at["lost"] = outcome == Outcome.LOST
            at["deferred"] = outcome == Outcome.DEFERRED or is_passing(result.reason)
            db.execute(
                """
                UPDATE tasks SET failures = failures + :failed, losses = losses + :lost,
                                 deferrals = deferrals + :deferred
                WHERE id = :id
                """,
                at,
            )
            task = self._store.get(task.id)
        set_state(db, task.id, State.RUNNING, *next_state(task, outcome, random.random()))

    def get_context(self, task: Task) -> tuple[dict[str, str], int | None]:
        """Return (environment, umask) of the request that added a task."""
        if task.request_id not in self._contexts:
            sql = "SELECT env, umask FROM requests WHERE id = ?"
            with self._database.read() as db:
                env, umask = db.execute(sql, (task.request_id,)).fetchone()
            if len(self._contexts) >= 64:
                self._contexts.clear()
            self._contexts[task.request_id] = (json.loads(env), umask)
        return self._contexts[task.request_id]

    def set_wishes(self, ids: Sequence[int], wish: Outcome) -> None:
        """Write down why these running tasks are about to be ended."""
        with self._database.write() as db:
            for task_id in ids:
                set_wish(db, task_id, wish)

    def next_due(self) -> float | None:
        """Return when the next scheduled task is due, None when there is none."""
        with self._database.read() as db:
            sql = "SELECT min(due_at) FROM tasks WHERE state = 'scheduled'"
            due: float | None = db.execute(sql).fetchone()[0]
            return due

    def prune(self) -> list[int]:
        """Forget a bounded number of tasks past retention; return their ids.

        A task that an unfinished one comes after stays.
        """
        now, keep = Clock.now(), self._store.config.retention
        with self._database.write() as db:
            sql = f"SELECT coalesce(sum(n), 0) FROM counts WHERE state IN ({_marks(_DONE)})"
            (finished,) = db.execute(sql, _DONE).fetchone()
            rows = db.execute(
                """
                SELECT id, finished_at FROM tasks
                WHERE finished_at IS NOT NULL
                  AND NOT EXISTS (SELECT 1 FROM deps JOIN tasks c ON c.id = deps.child
                                  WHERE deps.parent = tasks.id AND c.finished_at IS NULL)
                ORDER BY finished_at
                LIMIT ?
                """,
                (1000,),
            ).fetchall()
            excess = max(finished - keep.tasks, 0)
            cutoff = now - keep.days * 86400
            ids = [r[0] for n, r in enumerate(rows) if n < excess or r[1] < cutoff]
            delete_tasks(db, ids)
            db.execute(
                """
                DELETE FROM requests
                WHERE created_at < ?
                  AND NOT EXISTS (SELECT 1 FROM tasks
                                  WHERE id BETWEEN first_task AND last_task
                                    AND request_id = requests.id)
                """,
                (now - TOKEN_KEPT_S,),
            )
        return ids


# ============================================================================
# 10. CHILD - the attempt protocol: start, adopt, wait, stop
#     Uses 1-9. One thread a child (its slot's); `end` from any. Closed by: wait.
# ============================================================================

# What lets a daemon die without losing a task, or running it twice:
#
#   The daemon opens the slot's exit record and the attempt's log, locks both (flock), and
#   starts /bin/sh with them: the locks belong to the open files, so the shell keeps them
#   when the daemon dies. The shell waits for one line, the go byte; at end-of-file, because
#   the daemon died first, it runs nothing and writes `x`. Before go the daemon writes its
#   note (run id, PID, start time, boot) into the record. The shell runs the command in a
#   subshell that has the log but not the record, outlives every signal it can, and writes the
#   status at offset 0; the record is pre-filled, so a full disk cannot lose a result.
#
#   Whoever ends an attempt commits the reason (attempts.wish) before the first signal.
#
#   The next daemon reads the records, in an order that never guesses:
#     a. a valid status           -> finished
#     b. no note of this run, `x` -> never ran; back to the queue, not counted
#     c. another boot             -> lost
#     d. the record is locked     -> the shell lives: adopt it, wait for the lock
#     e. else no status can come  -> read once more, end what is left, then lost
#   A free lock does not prove death: in (e) a command may run on without its shell. So all
#   that carries the run id is killed, and the group, and the log's lock awaited, first.

_SCRIPT = """
exec 3>&2 4>&1 >/dev/null 2>&1
trap : HUP INT QUIT PIPE ALRM TERM USR1 USR2 XCPU XFSZ VTALRM PROF
trap 'echo "${r-e$?}" >&3' EXIT
read -r go || { r=x; exit 0; }
( trap - EXIT; exec 3>&- </dev/null >&4 2>&4 4>&-; %s exec "$@" )
r=$?; exit "$r"
"""
_STATUS = re.compile(rb"(\d+|e\d*|x)\n")


class Job(Value):
    """What a child is to run, and where it leaves its traces."""

    run_id: str
    argv: list[str]
    cwd: str
    env: dict[str, str]
    umask: int | None
    limits: Section  # memory_mb, cpu_seconds, open_files, processes
    record_path: str
    log_path: str
    boot_id: str
    stop_timeout_s: float


def make_job(task: Task, env: Mapping[str, str], umask: int | None, store: TaskStore) -> Job:
    """Make the job of a task's running attempt."""
    config, folder = store.config, store.folder
    words = [*Platform.SHELL, task.command] if isinstance(task.command, str) else task.command
    group = config.groups.get(task.group)
    marks = {
        "APEX_TASK_ID": str(task.id),
        "APEX_ATTEMPT": str(task.attempts),
        "APEX_RUN_ID": str(task.run_id),
        "APEX_PROJECT_PATH": store.project,
        "APEX_STATE_DIR": folder,
    }
    return Job(
        run_id=task.run_id,
        argv=[*(group.launcher if group else ()), *words],
        cwd=task.cwd,
        env={**env, **marks},
        umask=umask,
        limits=config.limits,
        record_path=os.path.join(folder, "run", f"slot-{task.slot}"),
        log_path=log_path(folder, task.id, task.attempts),
        boot_id=task.boot_id,
        stop_timeout_s=config.daemon.stop_timeout,
    )


def log_path(folder: str, task_id: int, number: int) -> str:
    """Return where an attempt's output goes."""
    return os.path.join(folder, "logs", f"task-{task_id}.{number}.log")


def _limit_lines(job: Job) -> str:
    """Return the shell's lines that limit the command; a limit that cannot be set ends it."""
    limits = job.limits
    lines = [
        f"ulimit -{letter} {value} || exit 126;"
        for letter, value in (
            ("v", limits.memory_mb and limits.memory_mb * 1024),
            ("t", limits.cpu_seconds),
            ("n", limits.open_files),
        )
        if value
    ]
    if limits.processes:  # -u in bash and ksh, -p in dash
        lines.append(f"ulimit -u {limits.processes} 2>&- || ulimit -p {limits.processes} || exit 126;")
    return " ".join([f"umask {0o022 if job.umask is None else job.umask:04o};", *lines])


def find_obstacle(job: Job) -> Result | None:
    """Say why a command cannot be started, in a Result, before anything is; else None."""
    name = job.argv[0]
    place: str | None = os.path.join(job.cwd, name)
    if not os.path.dirname(name):
        place = shutil.which(name, path=job.env.get("PATH"))
    if not os.path.isdir(job.cwd):
        return Result(exit_code=126, reason=f"spawn:ENOENT the folder {job.cwd} is gone")
    if place is None or not os.path.exists(place):
        return Result(exit_code=127, reason=f"spawn:ENOENT {name}: command not found")
    if os.path.isdir(place) or not os.access(place, os.X_OK):
        return Result(exit_code=126, reason=f"spawn:EACCES {name}: not executable")
    return None


def _not_started(error: OSError | ValueError) -> Result:
    number = error.errno if isinstance(error, OSError) else errno.EINVAL
    name = errno.errorcode.get(number or errno.EINVAL, "EINVAL")
    return Result(exit_code=126, reason=f"spawn:{name} {error}")


def _open_locked_log(job: Job) -> int:
    fd = open_file(job.log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    Platform.lock(fd)
    return fd


class ShellChild:
    """A command under its shell, in a session of its own; outlives this process.

    Life: start or adopt -> wait. `end` and `kill` come from other threads.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._lock = threading.Lock()  # guards the three below: a PID is signalled unreaped
        self._pid = 0
        self._is_ended = False
        self._is_unwanted = False
        self._process: subprocess.Popen[bytes] | None = None
        self._record = -1
        self.stop_timeout_s = job.stop_timeout_s

    @property
    def shell_pid(self) -> int:
        """The PID of the shell, 0 before its start."""
        return self._pid

    def start(self) -> Result | None:
        """Start the shell, note who it is, let it go; a Result says why that failed."""
        import subprocess

        job = self._job
        obstacle = find_obstacle(job)
        if obstacle is not None:
            return obstacle
        self._record = open_file(job.record_path, os.O_RDWR | os.O_CREAT)
        Platform.lock(self._record)
        os.pwrite(self._record, b" " * SLOT_RECORD_BYTES, 0)
        log_fd = _open_locked_log(job)
        go_reader, go_writer = os.pipe()
        failpoint("spawn")
        try:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", _SCRIPT % _limit_lines(job), "apexd", *job.argv],
                stdin=go_reader, stdout=log_fd, stderr=self._record,
                cwd=job.cwd, env=job.env, start_new_session=True,
            )  # fmt: skip
            self._pid = self._process.pid
            note = {"run": job.run_id, "pid": self._pid, "boot": job.boot_id}
            note["start"] = Platform.start_time(self._pid) or ""
            os.pwrite(self._record, json.dumps(note).encode() + b"\n", SLOT_NOTE_AT)
            failpoint("note")
            with self._lock:
                if not self._is_unwanted:
                    os.write(go_writer, b"\n")
            failpoint("go")
        except (OSError, ValueError) as error:
            os.close(self._record)
            return _not_started(error)
        finally:
            for fd in (go_reader, go_writer, log_fd):
                os.close(fd)
        return None

    def recover(self) -> Result | None:
        """Find out what became of a former daemon's attempt; None: it is adopted.

        May take the kill grace. A Result without status and reason means lost.
        """
        job = self._job
        if not os.path.exists(job.record_path):
            return Result(never_ran=True)
        self._record = open_file(job.record_path, os.O_RDWR)
        note = self._read_note()
        status = self._read_status()
        if note.get("run") != job.run_id or status == b"x":
            result: Result | None = Result(never_ran=True)
        elif status is not None and status.isdigit():
            result = Result(exit_code=int(status))
        elif note.get("boot") != Platform.boot_id():
            result = Result()
        elif not Platform.lock(self._record, shared=True):
            with self._lock:
                self._pid = int(note["pid"])
                if self._is_unwanted:
                    Platform.signal_group(self._pid, signal.SIGTERM)
            return None
        else:
            self._pid = int(note["pid"])
            result = self._conclude()
        os.close(self._record)
        return result

    def _read_note(self) -> dict[str, Any]:
        try:
            note = os.pread(self._record, SLOT_RECORD_BYTES - SLOT_NOTE_AT, SLOT_NOTE_AT)
            return dict(json.loads(note))
        except (ValueError, TypeError):
            return {}

    def _read_status(self) -> bytes | None:
        match = _STATUS.match(os.pread(self._record, SLOT_NOTE_AT, 0))
        return match[1] if match else None

    def wait(self) -> Result:
        """Wait for the end, of whatever kind, and say how it was; then all is closed."""
        if self._process is not None:
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOWAIT)
            with self._lock:
                self._is_ended = True
            self._process.wait()
        else:
            Platform.lock(self._record, shared=True, wait=True)
            with self._lock:
                self._is_ended = True
        try:
            return self._conclude()
        finally:
            os.close(self._record)

    def _conclude(self) -> Result:
        """Say how an attempt ended whose shell is gone; end what it left behind if need be."""
        status = self._read_status()
        if status == b"x":
            return Result(never_ran=True)
        if status is None or not status.isdigit() or self._is_unwanted:
            while not self._end_leftovers():
                log.warning("waiting for what is left of run %s", self._job.run_id)
        if status is not None and status.isdigit():
            return Result(exit_code=int(status))
        return Result(exit_code=137 if self._is_unwanted else None)

    def _end_leftovers(self) -> bool:
        """Kill all that this run started; False when something of it still lives."""
        for _ in range(SWEEP_ROUNDS):
            found = Platform.find_run(self._job.run_id)
            if not found:
                break
            for pid in found:
                Platform.kill(pid)
        if self._pid and Platform.start_time(self._pid) is None:
            Platform.signal_group(self._pid, signal.SIGKILL)  # not reused while a group has it
        fd = open_file(self._job.log_path, os.O_RDWR | os.O_CREAT)
        try:
            deadline = Clock.mono() + self._job.stop_timeout_s
            while not Platform.lock(fd):
                if Clock.mono() > deadline:
                    return False
                threading.Event().wait(0.01)
            return True
        finally:
            os.close(fd)

    def has_result(self) -> bool:
        """Tell whether the command ended already, even if nobody has noticed yet."""
        with self._lock:
            return self._is_ended or self._read_status() is not None

    def end(self, force: bool = False) -> None:
        """Ask the group to end (TERM, then CONT), or KILL it; before go: do not start."""
        with self._lock:
            self._is_unwanted = True
            if self._pid and not self._is_ended:
                Platform.signal_group(self._pid, signal.SIGKILL if force else signal.SIGTERM)

    @property
    def pid(self) -> int | None:
        """The command's own PID while it runs."""
        with self._lock:
            return Platform.command_pid(self._pid) if self._pid and not self._is_ended else None


class JobChild:
    """A command in a Windows job object: it and all it starts die with this process."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._lock = threading.Lock()  # guards the two below
        self._handle = 0
        self._is_unwanted = False
        self._process: subprocess.Popen[bytes] | None = None
        self.shell_pid = 0
        self.stop_timeout_s = job.stop_timeout_s

    def start(self) -> Result | None:
        """Start the command; a Result says why that failed."""
        import subprocess

        job = self._job
        obstacle = find_obstacle(job)
        if obstacle is not None:
            return obstacle
        log_fd = open_file(job.log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            with self._lock:
                if self._is_unwanted:
                    return Result(never_ran=True)
                self._process = subprocess.Popen(
                    job.argv, stdin=subprocess.DEVNULL, stdout=log_fd, stderr=log_fd,
                    cwd=job.cwd, env=job.env, **Platform.child_flags(),
                )  # fmt: skip
                self._handle = Platform.new_job(self._process)
        except (OSError, ValueError) as error:
            return _not_started(error)
        finally:
            os.close(log_fd)
        return None

    def recover(self) -> Result | None:
        """Say that a former daemon's attempt is lost: it died with its daemon."""
        return Result()

    def wait(self) -> Result:
        """Wait for the end and say how it was."""
        assert self._process is not None
        code = self._process.wait()
        with self._lock:
            Platform.end_job(self._handle, close=True)
            self._handle = 0
        return Result(exit_code=code)

    def has_result(self) -> bool:
        """Tell whether the command ended already."""
        return self._process is not None and self._process.poll() is not None

    def end(self, force: bool = False) -> None:
        """End the whole job; there is no gentle way that every program understands."""
        with self._lock:
            self._is_unwanted = True
            if self._handle:
                Platform.end_job(self._handle)

    @property
    def pid(self) -> int | None:
        """The command's PID while it runs."""
        return self._process.pid if self._process and not self.has_result() else None


class CallChild:
    """A task that a function of the embedding program carries out; cannot be ended."""

    def __init__(self, task: Task, execute: Callable[[Task], object]) -> None:
        self._task = task
        self._execute = execute
        self._is_unwanted = False
        self.pid = os.getpid()
        self.shell_pid = 0

    def start(self) -> Result | None:
        """Do nothing: `wait` runs the function, in the slot's thread."""
        return None

    def recover(self) -> Result | None:
        """Say that a former process's attempt is lost with it."""
        return Result()

    def wait(self) -> Result:
        """Run the function: an int is the exit status, None 0, an exception 1."""
        if self._is_unwanted:
            return Result(never_ran=True)
        try:
            code = self._execute(self._task)
        except Exception:  # the user's callback
            log.exception("task %d raised", self._task.id)
            code = 1
        return Result(exit_code=code if isinstance(code, int) else 0)

    def has_result(self) -> bool:
        """Tell whether the function returned; only its thread knows."""
        return False

    def end(self, force: bool = False) -> None:
        """Do not start it if it has not started."""
        self._is_unwanted = True


Child = ShellChild if Platform.SURVIVES else JobChild

# ============================================================================
# 13. RUNNER - the polling loop over the store
#     Uses 1-10. Threads: one polls, one a slot waits. Closed by: Daemon.
# ============================================================================


class _Run(Value):
    """A running attempt as the runner sees it; times are monotonic."""

    task: Task
    child: ShellChild | JobChild | CallChild
    deadline_mono: float  # its timeout, or never
    kill_at_mono: float  # when TERM has not helped, or never
    is_wished: bool  # it is being ended


class DaemonRunner:
    """Claims tasks from a TaskStore, runs them, records how they ended.

    With `execute` a task is carried out by a call of it with the Task, in a thread of this
    process: int is the exit status, None 0, an exception 1. Without, as a child process.
    Threads: "runner" polls; "slot-N" waits for a child. Life: start -> drain -> stop.
    """

    def __init__(
        self,
        store: TaskStore,
        execute: Callable[[Task], object] | None = None,
        on_poll: Callable[[], None] | None = None,
        on_drained: Callable[[], None] | None = None,
    ) -> None:
        self.store = store
        self.changed = threading.Condition()  # notified whenever a task has moved
        self._attempts = AttemptStore(store)
        self._execute = execute
        self._callbacks = (on_poll or (lambda: None), on_drained or (lambda: None))
        self._lock = threading.RLock()  # guards _running and _drain_at; before the store's
        self._running: dict[int, _Run] = {}
        self._drain_at: float | None = None  # monotonic; from then on tasks are interrupted
        self._results: queue.SimpleQueue[tuple[Task, Result]] = queue.SimpleQueue()
        self._inboxes: dict[int, queue.SimpleQueue[tuple[_Run, bool] | None]] = {}
        self._events = (threading.Event(), threading.Event())  # wake up, stop
        self._metrics = DaemonMetrics(
            tasks_processed=0, tasks_succeeded=0, tasks_failed=0, poll_count=0
        )

    def start(self) -> None:
        """Take over what a former daemon left, then poll."""
        self._metrics.started_at = Clock.now()
        with self._lock:
            for task in self.store.find(state="running", limit=INTEGER_MAX):
                self._launch(task, is_new=False)
        threading.Thread(target=self._loop, name="runner", daemon=True).start()

    def drain(self, timeout_s: float) -> None:
        """Claim nothing more; interrupt what still runs after `timeout_s`."""
        with self._lock:
            self._drain_at = Clock.mono() + timeout_s
        self.wake()

    def stop(self, timeout_s: float | None = None) -> None:
        """Drain, wait until nothing runs, end the threads (of an embedding program)."""
        config = self.store.config.daemon
        self.drain(config.graceful_timeout if timeout_s is None else timeout_s)
        with self.changed:
            self.changed.wait_for(lambda: not self._running and self._events[1].is_set())

    def halt(self) -> None:
        """End the polling and leave the children to the next daemon."""
        self._events[1].set()
        self.wake()

    def wake(self) -> None:
        """Make the loop take its turn now."""
        self._events[0].set()

    def end(self, ids: Iterable[int]) -> None:
        """End running tasks whose wish is on disk."""
        with self._lock:
            for task_id in ids:
                run = self._running.get(task_id)
                if run is not None:
                    self._end(run)
        self.wake()

    def get_metrics(self) -> DaemonMetrics:
        """Return a copy of the counters."""
        with self._lock:
            metrics = DaemonMetrics(**self._metrics.to_dict())
            metrics.active_task_ids = sorted(self._running)
        metrics.active_task_count = len(metrics.active_task_ids)
        metrics.uptime = Clock.now() - metrics.started_at if metrics.started_at else 0.0
        return metrics

    def status(self) -> dict[str, Any]:
        """Return {"metrics": {...}, "draining": bool, "pids": {task id: pid}}."""
        with self._lock:
            pids = {task_id: run.child.pid for task_id, run in self._running.items()}
            draining = self._drain_at is not None
        return {"metrics": self.get_metrics().to_dict(), "draining": draining, "pids": pids}

    def find_pid(self, task_id: int) -> int | None:
        """Return the PID of a running task's command."""
        with self._lock:
            run = self._running.get(task_id)
            return run.child.pid if run else None

    def is_child(self, pid: int) -> bool:
        """Tell whether a PID is that of a child this runner waits for."""
        with self._lock:
            return any(run.child.shell_pid == pid for run in self._running.values())

    def _loop(self) -> None:
        wake, stop = self._events
        next_poll = 0.0
        while not stop.is_set():
            wake.clear()
            try:
                if Clock.mono() >= next_poll:
                    next_poll = Clock.mono() + self.store.config.daemon.poll_interval
                    self._metrics.last_poll_at = Clock.now()
                    self._metrics.poll_count += 1
                    self._callbacks[0]()
                self._turn()
                wait_s = self._next_wake_s(next_poll)
            except DaemonError as error:  # a full disk: the results stay, and are tried again
                log.error("turn failed: %s", error)
                wait_s = 1.0
            except Exception:  # this thread's top frame
                log.exception("turn failed")
                wait_s = 1.0
            wake.wait(wait_s)

    def _next_wake_s(self, next_poll: float) -> float:
        """Return how long nothing can be due."""
        now = Clock.mono()
        with self._lock:
            times = [next_poll]
            for run in self._running.values():
                times += [run.deadline_mono, run.kill_at_mono, now + LOG_CHECK_S]
            if self._drain_at is not None and self._running:
                times.append(max(self._drain_at, now))
        due_at = self._attempts.next_due()
        if due_at is not None and self._drain_at is None:
            times.append(now + due_at - Clock.now())
        return max(min(times) - now, 0.0)

    def _turn(self) -> None:
        """Enforce deadlines, record results, claim and launch: once round."""
        with self._lock:
            self._enforce()
            results = []
            with contextlib.suppress(queue.Empty):
                while True:
                    results.append(self._results.get_nowait())
            gone = {task.id for task, _ in results}
            active = [run.task for run in self._running.values() if run.task.id not in gone]
            busy: dict[str, int] = {}
            for task in active:
                busy[task.group] = busy.get(task.group, 0) + 1
            most = 0 if self._drain_at is not None else self.store.config.daemon.max_concurrent
            used = {task.slot for task in active}
            slots = [n for n in range(most) if n not in used][: max(most - len(active), 0)]
            try:
                claimed = self._attempts.turn(results, slots, busy)
            except BaseException:
                for item in results:
                    self._results.put(item)
                raise
            for task, result in results:
                del self._running[task.id]
                self._count(task, result)
            for task in claimed:
                self._launch(task, is_new=True)
            is_drained = self._drain_at is not None and not self._running
        if results or claimed:
            with self.changed:
                self.changed.notify_all()
        if is_drained:
            self.halt()
            with self.changed:
                self.changed.notify_all()
            self._callbacks[1]()

    def _count(self, task: Task, result: Result) -> None:
        self._metrics.tasks_processed += 1
        if result.exit_code == 0:
            self._metrics.tasks_succeeded += 1
        else:
            self._metrics.tasks_failed += 1
        how = result.reason or ("lost" if result.exit_code is None else result.exit_code)
        log.info("Finished task %d: %s after %s", task.id, how,
                 span(max(Clock.now() - (task.started_at or 0.0), 0.0)))  # fmt: skip

    def _launch(self, task: Task, is_new: bool) -> None:
        """Give an attempt to its slot's thread; the caller holds the lock."""
        child: ShellChild | JobChild | CallChild
        if self._execute is not None:
            child = CallChild(task, self._execute)
        else:
            child = Child(make_job(task, *self._attempts.get_context(task), self.store))
        never = float("inf")
        left_s = never
        if task.timeout is not None and task.started_at is not None:
            left_s = min(task.timeout, task.started_at + task.timeout - Clock.now())
        run = _Run(task=task, child=child, deadline_mono=Clock.mono() + left_s, kill_at_mono=never)
        self._running[task.id] = run
        if not is_new and task.wish is not None:
            self._end(run)
        log.info("%s task %d", "Starting" if is_new else "Adopting", task.id)
        slot = task.slot or 0
        if slot not in self._inboxes:
            self._inboxes[slot] = queue.SimpleQueue()
            threading.Thread(
                target=self._serve_slot, args=(self._inboxes[slot],), name=f"slot-{slot}", daemon=True
            ).start()
        self._inboxes[slot].put((run, is_new))

    def _serve_slot(self, inbox: queue.SimpleQueue[tuple[_Run, bool] | None]) -> None:
        """Carry out a slot's attempts, one after the other."""
        for run, is_new in iter(inbox.get, None):
            try:
                result = run.child.start() if is_new else run.child.recover()
                if result is None:
                    result = run.child.wait()
            except Exception as error:  # this thread's top frame
                log.exception("task %d could not be carried out", run.task.id)
                result = Result(exit_code=126, reason=f"apexd: {error}")
            self._results.put((run.task, result))
            self.wake()

    def _end(self, run: _Run) -> None:
        run.is_wished = True
        run.kill_at_mono = Clock.mono() + self.store.config.daemon.stop_timeout
        run.child.end()

    def _enforce(self) -> None:
        """End what is out of time, KILL what does not go, cap the logs; holds the lock."""
        now = Clock.mono()
        late: dict[Outcome, list[_Run]] = {Outcome.TIMEOUT: [], Outcome.INTERRUPTED: []}
        is_closing = self._drain_at is not None and now >= self._drain_at
        for run in self._running.values():
            if now >= run.kill_at_mono:
                run.kill_at_mono = now + self.store.config.daemon.stop_timeout
                run.child.end(force=True)
            elif not run.is_wished and (is_closing or now >= run.deadline_mono):
                if not run.child.has_result():
                    late[Outcome.TIMEOUT if now >= run.deadline_mono else Outcome.INTERRUPTED].append(run)
            if self._execute is None:
                path = log_path(self.store.folder, run.task.id, run.task.attempts)
                cap_log(path, int(self.store.config.limits.log_mb * 1e6))
        for wish, runs in late.items():
            if runs:
                self._attempts.set_wishes([run.task.id for run in runs], wish)
                for run in runs:
                    log.warning("Ending task %d: %s", run.task.id, wish.value)
                    self._end(run)

    def maintain(self) -> None:
        """Prune tasks and logs past retention."""
        gone = set(self._attempts.prune())
        folder = os.path.join(self.store.folder, "logs")
        files = []
        with os.scandir(folder) as entries:
            for entry in entries:
                match = re.match(r"task-(\d+)\.", entry.name)
                if match and int(match[1]) in gone:
                    os.unlink(entry.path)
                elif match and int(match[1]) not in self._running:
                    info = entry.stat()
                    files.append((info.st_mtime, info.st_size, entry.path))
        excess = sum(size for _, size, _ in files) - self.store.config.log.total_mb * 1e6
        for _, size, path in sorted(files):
            if excess <= 0:
                break
            os.unlink(path)
            excess -= size


# ============================================================================
# 16. CONTROL - frames, verbs, server, Client
#     Uses 1-13. Threads: one accepts, one a connection. Closed by: Daemon.
# ============================================================================

# A frame is four bytes of length, big-endian, and a JSON object of that length. A request
# names its verb in "type"; each gets one response. The verbs of TaskVerbs are the whole of
# what can be done to tasks: the server offers them, and Client calls the very same ones on
# the store, under the project's lock, when there is no daemon.

Verb = "Callable[[dict[str, Any]], dict[str, Any]]"


def send_frame(connection: socket.socket, message: Mapping[str, Any]) -> None:
    """Send one message. Raises BAD_REQUEST when it is over FRAME_MAX_BYTES, OSError."""
    data = json.dumps(message).encode()
    if len(data) > FRAME_MAX_BYTES:
        limit = f"the limit is {FRAME_MAX_BYTES} ({FRAME_MAX_BYTES >> 20} MiB)"
        raise bad(f"a message of {len(data)} bytes: {limit}", "send it in several parts")
    connection.sendall(struct.pack(">I", len(data)) + data)


def receive_frame(
    connection: socket.socket,
    idle_s: float,
    reserve: Callable[[int], contextlib.AbstractContextManager[None]] | None = None,
) -> dict[str, Any] | None:
    """Receive one message; None when the peer closed between two.

    idle_s: how long to wait for the first byte; the rest has FRAME_TIMEOUT_S in all.
    Raises BAD_REQUEST, BUSY, ConnectionError, TimeoutError.
    """
    connection.settimeout(idle_s)
    first = connection.recv(1)
    if not first:
        return None
    deadline = Clock.mono() + FRAME_TIMEOUT_S
    (length,) = struct.unpack(">I", first + _receive(connection, 3, deadline))
    if not 0 < length <= FRAME_MAX_BYTES:
        raise bad(f"a frame of {length} bytes: from 1 to {FRAME_MAX_BYTES}")
    with reserve(length) if reserve else contextlib.nullcontext():
        data = _receive(connection, length, deadline)
        try:
            message = json.loads(data, parse_constant=_refuse_constant)
        except (ValueError, RecursionError):
            raise bad("a frame that is no JSON") from None
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise bad('a frame must be an object with a "type"')
    return message


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _receive(connection: socket.socket, length: int, deadline: float) -> bytes:
    data = bytearray()
    while len(data) < length:
        connection.settimeout(max(deadline - Clock.mono(), 0.001))
        part = connection.recv(min(length - len(data), 1 << 20))
        if not part:
            raise ConnectionResetError("closed within a frame")
        data += part
    return bytes(data)


def _field(fields: Mapping[str, Any], name: str, read: Callable[[Any], Any], default: Any) -> Any:
    """Read one field of a request. Raises BAD_REQUEST with its name."""
    value = fields.get(name)
    if value is None:
        return default
    try:
        return read(value)
    except ValueError as error:
        raise bad(f"{name} {str(value)[:40]!r}: must be {error}") from None


class TaskVerbs:
    """What can be done to tasks, each verb from request fields to response fields.

    runner: None when the project has no daemon.
    """

    def __init__(self, store: TaskStore, runner: DaemonRunner | None = None) -> None:
        self._store = store
        self._runner = runner
        self.table: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "add": self._add,
            "list": self._list,
            "get": self._get,
            "wait": self._wait,
            "cancel": lambda fields: self._change("cancel", fields),
            "retry": lambda fields: self._change("retry", fields),
            "remove": lambda fields: self._change("remove", fields),
            "pause": lambda fields: self._pause(True, fields),
            "resume": lambda fields: self._pause(False, fields),
            "report": self._report,
            "why": self._why,
            "logs": self._logs,
            "queue": self._queue,
        }

    def _wake(self) -> None:
        if self._runner is not None:
            self._runner.wake()

    def _add(self, fields: dict[str, Any]) -> dict[str, Any]:
        commands, options = fields.get("commands"), fields.get("options") or {}
        env = fields.get("env") or {}
        if not isinstance(commands, list) or not isinstance(options, dict):
            raise bad("commands must be a list, options an object")
        if not isinstance(env, dict) or not all(isinstance(v, str) for v in env.values()):
            raise bad("env must be an object of strings")
        ids = self._store.add(
            commands,
            options,
            token=_field(fields, "token", line_of_text, None),
            cwd=_field(fields, "cwd", command_line, None),
            env=env,
            umask=_field(fields, "umask", integer(0, 0o777), None),
        )
        self._wake()
        return {"ids": ids}

    def _describe(self, task: Task) -> dict[str, Any]:
        if self._runner is not None and task.state == State.RUNNING:
            task.pid = self._runner.find_pid(task.id)
        return task.to_dict()

    def _list(self, fields: dict[str, Any]) -> dict[str, Any]:
        tasks = self._store.find(
            state=_field(fields, "state", choice(*State), None),
            group=_field(fields, "group", line_of_text, None),
            before=_field(fields, "before", integer(1), None),
            limit=_field(fields, "limit", integer(1, 1000), 100),
            ids=_field(fields, "ids", task_ids, None),
        )
        return {"tasks": [self._describe(task) for task in tasks]}

    def _get(self, fields: dict[str, Any]) -> dict[str, Any]:
        task = self._store.get(_field(fields, "id", integer(0), 0))
        return {"task": self._describe(task), "history": self._store.get_attempts(task.id)}

    def _wait(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Answer when all `ids` are done or `within` seconds have passed.

        {"total", "pending", "status": the first that is not 0, in the order given,
         "progress": percent, "running": ids}
        """
        ids = _field(fields, "ids", task_ids, [])
        deadline = Clock.mono() + _field(fields, "within", duration, 0.0)
        pending = iter(ids)
        waited = next(pending, None)
        while waited is not None:  # for one after the other: no change costs more than a look
            if self._store.get(waited).state in DONE:
                waited = next(pending, None)
            elif self._runner is None or Clock.mono() >= deadline:
                break
            else:
                with self._runner.changed:
                    self._runner.changed.wait(min(max(deadline - Clock.mono(), 0.0), 1.0))
        tasks = [self._store.get(task_id) for task_id in ids]
        done = [task for task in tasks if task.state in DONE]
        reported = sum(task.progress or 0.0 for task in tasks if task.state not in DONE)
        return {
            "total": len(ids),
            "pending": len(ids) - len(done),
            "status": next((task.status for task in done if task.status), 0),
            "progress": (100.0 * len(done) + reported) / max(len(ids), 1),
            "running": [task.id for task in tasks if task.state == State.RUNNING][:10],
        }

    def _change(self, verb: str, fields: dict[str, Any]) -> dict[str, Any]:
        ids = _field(fields, "ids", task_ids, [])
        done, not_done = self._store.change(verb, ids)
        if self._runner is not None:
            if verb == "cancel":
                self._runner.end(done)
            with self._runner.changed:
                self._runner.changed.notify_all()
        self._wake()
        return {"done": done, "not_done": not_done}

    def _pause(self, on: bool, fields: dict[str, Any]) -> dict[str, Any]:
        self._store.pause(_field(fields, "group", line_of_text, None), on)
        self._wake()
        return {"paused": self._store.get_paused()}

    def _report(self, fields: dict[str, Any]) -> dict[str, Any]:
        task_id = _field(fields, "id", integer(0), 0)
        try:
            is_over = self._store.report(task_id, fields.get("token"), fields)
        except ValueError as error:
            raise bad(f"a reported value must be {error}") from None
        if is_over and self._runner is not None:
            self._runner.end([task_id])
        return {"over_budget": is_over}

    def _queue(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Return {"counts": {state: {group: n}}, "paused": [...], "groups": [...]}."""
        groups = {name: vars(group) for name, group in self._store.config.groups.items()}
        counts = self._store.get_counts()
        return {"counts": counts, "paused": self._store.get_paused(), "groups": groups}

    def _logs(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Return a part of an attempt's log: {"attempt", "data": base64, "next", "state",
        "done": nothing more will come of this attempt, "status"}.

        offset: logical, from the first byte ever; -n: the last n lines. `within`: how long
        to wait for more.
        """
        task_id = _field(fields, "id", integer(0), 0)
        offset = _field(fields, "offset", integer(-INTEGER_MAX), 0)
        deadline = Clock.mono() + _field(fields, "within", duration, 0.0)
        while True:
            task = self._store.get(task_id)
            number = _field(fields, "attempt", integer(0), task.attempts)
            is_over = number < task.attempts or task.state != State.RUNNING
            path = log_path(self._store.folder, task_id, number)
            data, following = read_log(path, offset)
            if data or is_over or Clock.mono() >= deadline or self._runner is None:
                break
            with self._runner.changed:
                self._runner.changed.wait(0.05)
        return {
            "attempt": number,
            "data": base64.b64encode(data).decode(),
            "next": following,
            "done": is_over and len(data) < LOG_CHUNK_BYTES,
            "attempts": task.attempts,
            "state": task.state,
            "status": task.status if task.state in DONE else None,
        }

    def _why(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Return {"id", "state", "reasons": [a line each]}: what a task waits for."""
        task = self._store.get(_field(fields, "id", integer(0), 0))
        reasons = list(self._reasons(task))
        return {"id": task.id, "state": task.state, "reasons": reasons}

    def _reasons(self, task: Task) -> Iterator[str]:
        last = f"attempt {task.attempts} ended as {task.outcome.value}" if task.outcome else ""
        if task.outcome and task.exit_code is not None:
            last += f" (exit {task.exit_code})"
        if task.reason:
            last += f": {task.reason}"
        if task.state == State.WAITING or task.state == State.SKIPPED:
            for item in task.after:
                parent = self._store.get(int(item.partition(":")[0]))
                need = Need(item.partition(":")[2])
                if parent.state not in DONE:
                    yield f"waits for task {parent.id}, which is {parent.state.value}"
                elif not need.is_met_by(parent.state):
                    yield f"task {parent.id} is {parent.state.value}, needed: {need.value}"
        elif task.state == State.SCHEDULED:
            yield f"due in {span(max((task.due_at or 0.0) - Clock.now(), 0.0))}"
            if last:
                yield last
        elif task.state == State.QUEUED:
            yield from self._queue_reasons(task)
        elif task.state == State.RUNNING:
            yield f"runs since {span(max(Clock.now() - (task.started_at or 0.0), 0.0))}"
            if task.wish is not None:
                yield f"is being ended: {task.wish.value}; something of it still lives"
        else:
            yield last or f"was {task.state.value} before it ran"
        if self._runner is None and task.state not in DONE:
            yield "no daemon runs: start it with `start`"

    def _queue_reasons(self, task: Task) -> Iterator[str]:
        paused = self._store.get_paused()
        if "*" in paused or task.group in paused:
            yield "everything is paused" if "*" in paused else f"group {task.group} is paused"
        running = self._store.find(state="running", limit=1000)
        mates = [str(other.id) for other in running if other.group == task.group]
        limit = self._store.config.groups[task.group].max_concurrent if task.group in self._store.config.groups else None
        most = self._store.config.daemon.max_concurrent
        if limit is not None and len(mates) >= limit:
            yield f"group {task.group} is full ({limit}): tasks {', '.join(mates[:10])}"
        elif len(running) >= most:
            names = ", ".join(str(other.id) for other in running[:10])
            yield f"all {most} slots are taken: tasks {names}"
        elif not paused:
            yield "will be claimed at the next turn"


class ControlServer:
    """Answers requests on the control socket with the verbs it is given.

    Threads: "control" accepts; each connection has its own. Life: start -> stop.
    """

    def __init__(self, folder: str, verbs: Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]]) -> None:
        self._folder = folder
        self._verbs = verbs
        self._room = threading.BoundedSemaphore(CONNECTIONS_MAX)
        self._lock = threading.Lock()  # guards _reserved
        self._reserved = 0
        self._selector = selectors.DefaultSelector()
        self._endpoint: dict[str, Any] = {}
        self._is_stopping = False
        self._waker, self._wakee = socket.socketpair()

    def start(self) -> None:
        """Listen, say where in `endpoint`, accept. Raises CANNOT_CREATE."""
        self._selector.register(self._wakee, selectors.EVENT_READ)
        self.listen()
        threading.Thread(target=self._accept_all, name="control", daemon=True).start()

    def listen(self) -> None:
        """Open the socket, or open it again when somebody removed its file."""
        path = self._endpoint.get("socket")
        if self._endpoint and (path is None or os.path.exists(path)):
            return
        try:
            listener, self._endpoint = Platform.listen(self._folder)
        except OSError as error:
            raise cannot_create(os.path.join(self._folder, "control.sock"), error) from None
        write_atomically(os.path.join(self._folder, "endpoint"), json.dumps(self._endpoint))
        self._selector.register(listener, selectors.EVENT_READ)
        self._waker.send(b"x")

    def stop(self) -> None:
        """Accept nothing more and remove the socket; requests under way go on."""
        self._is_stopping = True
        self._waker.send(b"x")
        path = self._endpoint.get("socket")
        for name in filter(None, (path, os.path.join(self._folder, "endpoint"))):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
        if path and os.path.dirname(path) != self._folder:
            with contextlib.suppress(OSError):
                os.rmdir(os.path.dirname(path))

    def _accept_all(self) -> None:
        while not self._is_stopping:
            for key, _ in self._selector.select():
                listener = key.fileobj
                if listener is self._wakee:
                    self._wakee.recv(64)
                elif isinstance(listener, socket.socket):
                    self._accept(listener)

    def _accept(self, listener: socket.socket) -> None:
        """Give one connection to a thread; wait for room rather than spin."""
        if not self._room.acquire(timeout=0.1):
            return
        try:
            connection, _ = listener.accept()
            threading.Thread(
                target=self._serve, args=(connection,), name="connection", daemon=True
            ).start()
        except (OSError, RuntimeError) as error:  # no descriptor or thread to spare
            log.warning("a connection was refused: %s", error)
            self._room.release()
            threading.Event().wait(0.1)

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection:
                if Platform.is_peer_allowed(connection):
                    self._converse(connection)
                else:
                    error = DaemonError("PERMISSION_DENIED", "only the project's owner and root")
                    send_frame(connection, {"type": "error", **error.to_dict()})
        except (OSError, ValueError) as error:
            log.debug("a connection ended: %s", error)
        except Exception:  # this thread's top frame
            log.exception("a connection failed")
        finally:
            self._room.release()

    def _converse(self, connection: socket.socket) -> None:
        """Answer requests until the peer leaves or sends what is no request."""
        token = self._endpoint.get("token")
        while True:
            try:
                request = receive_frame(connection, IDLE_TIMEOUT_S, self._reserve)
                if request is None:
                    return
                if token is not None:
                    import hmac

                    if not hmac.compare_digest(str(request.pop("auth", "")), str(token)):
                        raise DaemonError("PERMISSION_DENIED", "a wrong token")
                answer = self._answer(request)
            except DaemonError as error:  # the framing is lost: say so and hang up
                send_frame(connection, {"type": "error", **error.to_dict()})
                return
            connection.settimeout(FRAME_TIMEOUT_S)
            send_frame(connection, answer)

    @contextlib.contextmanager
    def _reserve(self, length: int) -> Iterator[None]:
        """Hold the memory of a large request, all connections together within a limit."""
        counted = length if length > FRAME_FREE_BYTES else 0
        with self._lock:
            if self._reserved + counted > FRAMES_MAX_BYTES:
                raise DaemonError("BUSY", "too many large requests at once", "try again")
            self._reserved += counted
        try:
            yield
        finally:
            with self._lock:
                self._reserved -= counted

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        name = request.pop("type")
        try:
            verb = self._verbs.get(name)
            if verb is None:
                raise DaemonError("UNKNOWN_COMMAND", f"there is no verb {name[:40]!r}")
            return {"type": "ok", **verb(request)}
        except DaemonError as error:
            return {"type": "error", **error.to_dict()}
        except Exception as error:  # a request handler
            log.exception("request %s failed", name)
            return {"type": "error", **DaemonError("INTERNAL", str(error)).to_dict()}


DAEMON_VERBS = frozenset({"ping", "status", "reload", "shutdown"})  # of Daemon itself


class Project(Value):
    """Where a project and its state are."""

    path: str
    folder: str
    config_path: str | None


def find_project(
    path: str | None = None, state: str | None = None, config: str | None = None
) -> Project:
    """Decide which project is meant: named, from the environment, or by the current folder.

    That is the nearest folder with `.apex` from here up to the repository's root (`.git`),
    else this one. The state is in `state`, APEX_STATE_DIR, or PROJECT/.apex.
    """
    if path is None:
        state = state or os.environ.get("APEX_STATE_DIR")
        path = os.environ.get("APEX_PROJECT_PATH") or _nearest_project(os.getcwd())
    path = os.path.realpath(path)
    if not os.path.isdir(path):
        raise bad(f"{path} is no folder", "name the project's folder")
    folder = os.path.realpath(state) if state else os.path.join(path, STATE_FOLDER)
    if config is not None and not os.path.isfile(config):
        raise DaemonError("CONFIG_INVALID", f"{config}: no such file", "name the file")
    found = os.path.realpath(config) if config else find_config(folder)
    return Project(path=path, folder=folder, config_path=found)


def _nearest_project(start: str) -> str:
    folder = start
    while True:
        if os.path.isdir(os.path.join(folder, STATE_FOLDER)):
            break
        parent = os.path.dirname(folder)
        if os.path.exists(os.path.join(folder, ".git")) or parent == folder:
            return start
        folder = parent
    inside = folder
    while not os.path.exists(os.path.join(inside, ".git")) and inside != os.path.dirname(inside):
        inside = os.path.dirname(inside)
    is_repository = os.path.exists(os.path.join(inside, ".git"))
    return folder if is_repository or folder == start else start


def capture_environment(keep: Sequence[str], extra: Iterable[str] = ()) -> dict[str, str]:
    """Return what a task gets of this process's environment, and NAME[=VALUE] on top."""
    names = {*ENVIRONMENT_KEPT, *keep}
    env = {
        name: value
        for name, value in os.environ.items()
        if (name.upper() in names or name in names or name.startswith("LC_") or "*" in names)
        and not ENVIRONMENT_DROPPED.match(name)
    }
    for item in extra:
        name, has_value, value = item.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise bad(f"{name!r} is no name of a variable", "write --env NAME or NAME=VALUE")
        env[name] = value if has_value else os.environ.get(name, "")
    return env


class _Away(Exception):
    """No daemon took the request, or it was cut off before its answer."""


class Client:
    """Speaks to a project's daemon, or acts on its store when there is none.

    Every method is one request. A request without a daemon takes the project's lock for
    its own moment. Not to be shared between threads. Raises DaemonError: NOT_ANSWERING,
    BUSY, PERMISSION_DENIED, NOT_CONFIRMED, and what the verb itself raises.
    """

    def __init__(
        self, project_path: str | None = None, state: str | None = None, config: str | None = None
    ) -> None:
        self.project = find_project(project_path, state, config)
        self.is_live = False  # the last request was answered by a daemon
        self._lock_file = PidFile(os.path.join(self.project.folder, "daemon.pid"))
        self._connection: socket.socket | None = None
        self._auth: dict[str, str] = {}

    def close(self) -> None:
        """Hang up; the next request connects again."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def call(
        self, verb: str, fields: Mapping[str, Any], answer_s: float = ANSWER_TIMEOUT_S
    ) -> dict[str, Any]:
        """Make one request, by socket else on the store; return the response's fields."""
        deadline = Clock.mono() + (CONFIRM_TIMEOUT_S if "token" in fields else answer_s)
        while True:
            try:
                self.is_live = True
                return self._ask(verb, fields, max(deadline - Clock.mono(), 0.01))
            except _Away:
                self.close()
            self.is_live = False
            answer = self._act(verb, fields)
            if answer is not None:
                return answer
            if Clock.mono() > deadline:
                raise self._explain_silence(fields)
            threading.Event().wait(0.02)

    def _ask(self, verb: str, fields: Mapping[str, Any], answer_s: float) -> dict[str, Any]:
        """Ask the daemon. Raises _Away, or NOT_ANSWERING when it hangs."""
        fresh = self._connection is None
        try:
            connection = self._connection or self._connect()
            connection.settimeout(answer_s)
            send_frame(connection, {"type": verb, **fields, **self._auth})
            answer = receive_frame(connection, answer_s)
        except socket.timeout:
            self.close()
            raise self._explain_silence(fields) from None
        except PermissionError:
            hint = "act as its owner"
            folder = self.project.folder
            raise DaemonError("PERMISSION_DENIED", f"{folder} is not ours", hint) from None
        except OSError:
            answer = None
        if answer is None:
            self.close()
            if not fresh:  # an idle connection that the daemon had closed
                return self._ask(verb, fields, answer_s)
            raise _Away
        if answer.pop("type") == "error":
            raise DaemonError.from_dict(answer)
        return answer

    def _connect(self) -> socket.socket:
        with open(os.path.join(self.project.folder, "endpoint"), encoding="utf-8") as file:
            text = file.read()
        try:
            endpoint = json.loads(text)
            self._connection = Platform.connect(endpoint, ANSWER_TIMEOUT_S)
        except (ValueError, KeyError, TypeError):
            raise ConnectionRefusedError("endpoint is damaged") from None
        self._auth = {"auth": endpoint["token"]} if "token" in endpoint else {}
        return self._connection

    def _explain_silence(self, fields: Mapping[str, Any]) -> DaemonError:
        holder = self._lock_file.holder()
        if "token" in fields:
            hint = f"repeat it with --token {fields['token']}: it cannot double"
            return DaemonError("NOT_CONFIRMED", "the daemon did not confirm the request", hint)
        if holder is None:
            return DaemonError("NOT_RUNNING", "the daemon is gone", "start it with `start`")
        if holder.is_daemon:
            hint = "is it stopped (SIGSTOP) or overloaded? `restart` costs no task"
            what = f"the daemon (PID {holder.pid}) does not answer"
            return DaemonError("NOT_ANSWERING", what, hint)
        what = f"the project is held by {holder.role} (PID {holder.pid or 'unknown'})"
        return DaemonError("BUSY", what, "try again when it is done")

    def _act(self, verb: str, fields: Mapping[str, Any]) -> dict[str, Any] | None:
        """Act on the store, under the lock; None when somebody else has it."""
        folder = self.project.folder
        if verb in DAEMON_VERBS:
            if self._lock_file.holder() is None:
                raise DaemonError("NOT_RUNNING", "no daemon runs here", "start it with `start`")
            return None
        path = os.path.join(folder, "apex.db")
        is_reading = verb in ("list", "get", "wait", "why", "logs", "queue")
        if is_reading and not os.path.exists(path):
            path = ":memory:"  # nothing to read, and nothing is left behind
        else:
            make_state_folder(folder)
            if not self._lock_file.acquire("client " + verb):
                return None
        orphans: list[ShellChild | JobChild] = []
        try:
            config = load_config(self.project.config_path)
            store = TaskStore(path, config, self._lock_file, self.project.path)
            try:
                answer = TaskVerbs(store).table[verb](dict(fields))
                if verb == "cancel":
                    orphans = _find_orphans(store, answer["done"])
            finally:
                store.close()
        finally:
            self._lock_file.release()
        for child in orphans:
            _end_orphan(child)
        answer_copy: dict[str, Any] = json.loads(json.dumps(answer))
        return answer_copy

    def add(self, command: str | list[str], **options: Any) -> int:
        """Add a task, return its id; it is on disk. Options: those of `add_all`."""
        return self.add_all([command], **options)[0]

    def add_all(
        self,
        commands: Sequence[Any],
        token: str | None = None,
        cwd: str | None = None,
        env: Sequence[str] = (),
        **options: Any,
    ) -> list[int]:
        """Add tasks in one transaction, return their ids in order (see TaskStore.add).

        options: group, priority, label, after (["3", "4:any"]), delay, retries, timeout
        (seconds), key, on_lost, max_tokens, max_cost. token: an earlier try's.
        """
        mask = os.umask(0o077)
        os.umask(mask)
        keep = load_config(self.project.config_path).daemon.env_keep
        request = {
            "commands": commands,
            "options": {k: v for k, v in options.items() if v is not None},
            "token": token or os.urandom(12).hex(),
            "cwd": os.path.abspath(cwd or os.getcwd()),
            "env": capture_environment(keep, env),
            "umask": mask,
        }
        ids: list[int] = self.call("add", request)["ids"]
        return ids

    def list(self, limit: int | None = None, **where: Any) -> Sequence[dict[str, Any]]:
        """Return tasks as dicts (fields of Task), ascending; the newest `limit`, or all.

        where: state, group, ids.
        """
        found: Any = []
        before = None
        while limit is None or len(found) < limit:
            size = 1000 if limit is None else min(1000, limit - len(found))
            page = self.call("list", {**where, "limit": size, "before": before})["tasks"]
            found = page + found
            if len(page) < size:
                break
            before = page[0]["id"]
        return found  # type: ignore[no-any-return]

    def get(self, task_id: int) -> dict[str, Any]:
        """Return {"task": {...}, "history": [attempts]}. Raises UNKNOWN_TASK."""
        return self.call("get", {"id": task_id})

    def wait(
        self,
        ids: Sequence[int],
        timeout: float | None = None,
        on_change: Callable[[dict[str, Any]], None] | None = None,
    ) -> int:
        """Wait until tasks are done; return the first status that is not 0, in their order.

        124 when `timeout` seconds were not enough. Outlives a restart of the daemon.
        Raises NOT_RUNNING when there is no daemon to wait for.
        """
        deadline = float("inf") if timeout is None else Clock.mono() + timeout
        patience = _Patience(self)
        while True:
            within = min(2.0, max(deadline - Clock.mono(), 0.0))
            answer = self.call("wait", {"ids": ids, "within": within}, within + ANSWER_TIMEOUT_S)
            if on_change is not None:
                on_change(answer)
            if not answer["pending"]:
                return int(answer["status"])
            if Clock.mono() >= deadline:
                return 124
            patience.check()

    def follow(
        self, task_id: int, attempt: int | None = None, offset: int = 0, to_end: bool = True
    ) -> Iterator[bytes]:
        """Yield a task's output as it comes, attempt after attempt, until it is done.

        to_end False: what is there now. offset -n: from the last n lines on.
        """
        patience = _Patience(self)
        while True:
            within = 1.0 if to_end else 0.0
            where = {"id": task_id, "attempt": attempt, "offset": offset, "within": within}
            answer = self.call("logs", where, within + ANSWER_TIMEOUT_S)
            data = base64.b64decode(answer["data"])
            if data:
                yield data
            offset = answer["next"]
            if answer["done"] and attempt is not None and attempt < answer["attempts"]:
                attempt, offset = attempt + 1, 0
            elif not to_end and not data or answer["done"] and answer["status"] is not None:
                return
            elif answer["done"] and to_end:  # between two attempts, or before the first
                attempt, offset = max(answer["attempts"], 1), 0 if not data else offset
                if answer["attempts"]:
                    attempt, offset = answer["attempts"] + 1, 0
            if not data:
                patience.check()

    def cancel(self, *ids: int) -> dict[str, Any]:
        """Cancel tasks; return {"done": ids, "not_done": ids finished before}."""
        return self.call("cancel", {"ids": list(ids)})

    def retry(self, *ids: int) -> dict[str, Any]:
        """Run finished tasks again; return {"done": ids, "not_done": ids unfinished}."""
        return self.call("retry", {"ids": list(ids)})

    def remove(self, *ids: int) -> dict[str, Any]:
        """Forget tasks; return {"done": ids, "not_done": ids that run}."""
        return self.call("remove", {"ids": list(ids)})

    def pause(self, group: str | None = None) -> dict[str, Any]:
        """Claim nothing from a group, or at all; return {"paused": groups}."""
        return self.call("pause", {"group": group})

    def resume(self, group: str | None = None) -> dict[str, Any]:
        """Claim again from a group, or from all; return {"paused": groups}."""
        return self.call("resume", {"group": group})

    def report(self, task_id: int, **usage: Any) -> dict[str, Any]:
        """Report tokens, cost, progress (percent), note; return {"over_budget": bool}."""
        token = os.urandom(12).hex()
        return self.call("report", {"id": task_id, "token": token, **usage})

    def why(self, task_id: int) -> dict[str, Any]:
        """Return {"id", "state", "reasons": [what it waits for, or how it ended]}."""
        return self.call("why", {"id": task_id})

    def queue(self) -> dict[str, Any]:
        """Return {"counts": {state: {group: n}}, "paused": [...], "groups": {...}}."""
        return self.call("queue", {})


class _Patience:
    """Lets a waiting client outlive a daemon that is away, for RETURN_TIMEOUT_S."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._was_live = False
        self._since = Clock.mono()

    def check(self) -> None:
        """Return soon. Raises NOT_RUNNING when no daemon came, or came back."""
        if self._client.is_live:
            self._was_live, self._since = True, Clock.mono()
            return
        if not self._was_live or Clock.mono() - self._since > RETURN_TIMEOUT_S:
            what = "no daemon runs, so nothing moves; the task is kept"
            raise DaemonError("NOT_RUNNING", what, "start it with `start`")
        threading.Event().wait(0.2)


def _find_orphans(store: TaskStore, ids: Sequence[int]) -> list[ShellChild | JobChild]:
    """Return the children of cancelled tasks that run although there is no daemon."""
    attempts = AttemptStore(store)
    tasks = store.find(state="running", ids=ids, limit=len(ids)) if ids else []
    return [Child(make_job(task, *attempts.get_context(task), store)) for task in tasks]


def _end_orphan(child: ShellChild | JobChild) -> None:
    """End a child by its record: TERM, the grace, KILL; the next daemon reads the result."""
    if child.recover() is None:
        child.end()
        deadline = Clock.mono() + child.stop_timeout_s
        while not child.has_result() and Clock.mono() < deadline:
            threading.Event().wait(0.02)
        child.end(force=not child.has_result())


# ============================================================================
# 18. DAEMON - wiring, start order, signals, reload, stop; DaemonManager
#     Uses 1-16. Main thread. Lock order: runner, then store; nothing else nests.
# ============================================================================

_BOOT = (
    "import sys;from importlib.machinery import SourceFileLoader as L;"
    "__file__=sys.argv.pop(1);exec(L('apexd',__file__).get_code('apexd'))"
)


class Daemon:
    """One project's daemon: it owns lock, store, runner and control socket, and wires them.

    report: given {"event": "ready" | "progress" | "error", ...} while it starts.
    """

    def __init__(
        self, project: Project, report: Callable[[dict[str, Any]], None], foreground: bool = False
    ) -> None:
        self._project = project
        self._report = report
        self._foreground = foreground
        self._config = load_config(project.config_path)
        self._pid_file = PidFile(os.path.join(project.folder, "daemon.pid"))
        self._messages: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._reload_lock = threading.Lock()  # one reload at a time
        self._store: TaskStore | None = None
        self._times = {"heartbeat": 0.0, "maintenance": 0.0}  # monotonic, when last
        self._exit_status = 0

    def run(self) -> int:
        """Start, serve until told to stop, return the exit status. Raises DaemonError."""
        self._settle_in()
        self._take_lock()
        try:
            open_log(self._path("daemon.log"), self._config.log, self._foreground)
            log.info("apexd %s starts, PID %d, %s", __version__, os.getpid(), self._project.path)
            self._report({"event": "progress", "what": "checking the database"})
            path = self._path("apex.db")
            self._store = TaskStore(path, self._config, self._pid_file, self._project.path)
            try:
                self._store.database.check()
                self._serve(self._store)
            finally:
                self._store.close()
            log.info("apexd stopped")
            return self._exit_status
        finally:
            self._pid_file.release()
            close_log()

    def _path(self, name: str) -> str:
        return os.path.join(self._project.folder, name)

    def _settle_in(self) -> None:
        """Take a defined state whatever the caller's was: signals, umask, folder."""
        Platform.close_inherited()
        for name in Platform.SIGNALS:
            signal.signal(
                getattr(signal, name), lambda number, _: self._messages.put(("signal", number))
            )
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_SETMASK, [])
        os.umask(0o077)
        make_state_folder(self._project.folder)
        os.chdir(self._project.folder)

    def _take_lock(self) -> None:
        """Become the owner; outwait a client. Raises ALREADY_RUNNING, BUSY."""
        deadline = Clock.mono() + CLIENT_HOLD_S
        while not self._pid_file.acquire("daemon", self._project.path):
            holder = self._pid_file.holder()
            if holder is not None and holder.is_daemon:
                what = f"already running, PID {holder.pid}"
                raise DaemonError("ALREADY_RUNNING", what, "`status` tells more")
            if Clock.mono() > deadline:
                what = f"{self._pid_file.lock_path} is locked by another program"
                raise DaemonError("BUSY", what, "find it with `fuser` or `lsof`")
            threading.Event().wait(0.02)

    def _serve(self, store: TaskStore) -> None:
        runner = DaemonRunner(store, on_poll=self._poll, on_drained=self._on_drained)
        verbs = {
            **TaskVerbs(store, runner).table,
            "ping": lambda fields: {"type": "pong", **self._identity(runner)},
            "status": lambda fields: {"type": "status", **self._status(store, runner)},
            "reload": lambda fields: {"plan": self._reload(store)},
            "shutdown": self._shutdown,
        }
        control = ControlServer(self._project.folder, verbs)
        control.start()
        self._poll = lambda: self._look_after(store, runner, control)
        runner.start()
        self._report({"event": "ready", "pid": os.getpid()})
        log.info("ready")
        try:
            self._obey(store, runner)
        finally:
            control.stop()
            runner.halt()
            with contextlib.suppress(DaemonError):
                self._write_state(store, runner)

    def _obey(self, store: TaskStore, runner: DaemonRunner) -> None:
        """Take messages off the queue, the signal handlers' and others', until the end."""
        first_term = None
        while True:
            try:
                kind, value = self._messages.get(timeout=Platform.WAKE_S)
            except queue.Empty:
                continue
            name = signal.Signals(value).name if kind == "signal" else ""
            if kind == "drained" or kind == "leave":
                log.info("%s", "drained" if kind == "drained" else "leaving the tasks running")
                return
            if kind == "failed":
                self._exit_status = value
            if kind in ("stop", "failed") or name in ("SIGTERM", "SIGINT", "SIGBREAK"):
                now = Clock.mono()
                is_second = first_term is not None and now - first_term >= FIRST_TERM_S
                if first_term is None or is_second:
                    log.info("%s: stopping%s", name or kind, " at once" if is_second else "")
                    runner.drain(0.0 if is_second else self._config.daemon.graceful_timeout)
                first_term = first_term or now
            elif name:
                self._on_signal(name, store, runner)

    def _on_signal(self, name: str, store: TaskStore, runner: DaemonRunner) -> None:
        if name == "SIGHUP":
            with contextlib.suppress(DaemonError):  # logged; nothing has changed
                self._reload(store)
        elif name == "SIGUSR1":
            self._dump(store, runner)
        elif name == "SIGUSR2":
            open_log(self._path("daemon.log"), self._config.log, self._foreground)
            log.info("reopened the log")
        elif name == "SIGCHLD" and os.getpid() == 1:
            self._reap(runner)

    def _reap(self, runner: DaemonRunner) -> None:
        Platform.reap_orphans(runner.is_child)

    def _on_drained(self) -> None:
        self._messages.put(("drained", None))

    def _shutdown(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Stop; {"keep": true} leaves the tasks running for the next daemon."""
        self._messages.put(("leave" if fields.get("keep") else "stop", None))
        return {"message": "stopping"}

    def _reload(self, store: TaskStore) -> list[str]:
        """Read the configuration again; return what changed. Raises CONFIG_INVALID."""
        with self._reload_lock:
            try:
                path = self._project.config_path or find_config(self._project.folder)
                new = load_config(path)
            except DaemonError as error:
                log.error("reload refused: %s (%s)", error.message, error.hint)
                raise
            plan = self._config.plan(new)
            if vars(new.log) != vars(self._config.log):
                open_log(self._path("daemon.log"), new.log, self._foreground)
            self._config = store.config = new
            log.info("reloaded: %s", "; ".join(plan) or "nothing changed")
            return plan

    def _poll(self) -> None:
        """Be called by the runner at each poll; _serve puts _look_after here."""

    def _look_after(self, store: TaskStore, runner: DaemonRunner, control: ControlServer) -> None:
        """Do what recurs: heartbeat, pruning, the socket's and the database's presence."""
        now = Clock.mono()
        control.listen()
        try:
            is_there = os.stat(store.path).st_ino == store.inode
        except OSError:
            is_there = False
        if not is_there and not self._exit_status:
            log.error("%s was removed or replaced while in use: stopping", store.path)
            self._messages.put(("failed", CODES["DATABASE_CORRUPT"][0]))
        if now - self._times["heartbeat"] >= self._config.daemon.heartbeat_interval - 1.0:
            self._times["heartbeat"] = now
            write_atomically(self._path("heartbeat"), timestamp(Clock.now()) + "\n")
            self._write_state(store, runner)
        if now - self._times["maintenance"] >= MAINTENANCE_S:
            self._times["maintenance"] = now
            runner.maintain()
        if os.getpid() == 1:
            self._reap(runner)

    def _write_state(self, store: TaskStore, runner: DaemonRunner) -> None:
        text = json.dumps(self._status(store, runner), indent=1)
        write_atomically(self._path("state.json"), text + "\n")

    def _dump(self, store: TaskStore, runner: DaemonRunner) -> None:
        """Write status and thread stacks to the log and `state.json`."""
        import traceback

        names = {thread.ident: thread.name for thread in threading.enumerate()}
        for ident, frame in sys._current_frames().items():
            stack = "".join(traceback.format_stack(frame))
            log.info("thread %s\n%s", names.get(ident, ident), stack.rstrip())
        log.info("status %s", json.dumps(self._status(store, runner)))
        self._write_state(store, runner)

    def _identity(self, runner: DaemonRunner) -> dict[str, Any]:
        return {"version": __version__, "uptime_secs": runner.get_metrics().uptime}

    def _status(self, store: TaskStore, runner: DaemonRunner) -> dict[str, Any]:
        """Return the answer of `status`: identity, metrics, the queue's counts."""
        return {
            **self._identity(runner),
            "pid": os.getpid(),
            "process_count": 0,
            "running_instances": 0,
            "project": self._project.path,
            "memory_bytes": Platform.memory_bytes(),
            "counts": store.get_counts(),
            "paused": store.get_paused(),
            **runner.status(),
        }


class DaemonManager:
    """Starts, stops and watches the daemon of one project, from outside."""

    def __init__(
        self, project_path: str | None = None, state: str | None = None, config: str | None = None
    ) -> None:
        self.project = find_project(project_path, state, config)
        self._pid_file = PidFile(os.path.join(self.project.folder, "daemon.pid"))
        self._client = Client(self.project.path, self.project.folder, config)

    def command(self, foreground: bool) -> tuple[list[str], dict[str, str]]:
        """Return (argv, environment) that become the daemon.

        Bytecode comes from a cache in the state folder and site-packages stay out: half the
        start, and what lies beside apexd.py cannot stand in for a standard module.
        """
        cache = os.path.join(self.project.folder, "cache")
        options = json.dumps({**self.project.to_dict(), "foreground": foreground})
        argv = [sys.executable, "-I", "-S", "-X", f"pycache_prefix={cache}", "-c", _BOOT]
        env = {k: v for k, v in os.environ.items() if k not in ("APEX_RUN_ID", "APEX_TASK_ID")}
        env.update(APEX_DAEMON_MODE="1", MALLOC_ARENA_MAX="2")
        return [*argv, os.path.abspath(__file__), "_daemon", options], env

    def start_daemon(self, mode: str = "auto") -> tuple[int, bool]:
        """Start it and wait until it answers; return (PID, whether it was there before).

        mode: "fork", "spawn", or "auto": fork where that is safe. Raises what kept it from
        starting: CONFIG_INVALID, DATABASE_..., BUSY, CANNOT_CREATE, START_FAILED.
        """
        load_config(self.project.config_path)
        for _ in range(3):
            pid = self._find_answering()
            if pid is not None:
                return pid, True
            if mode == "auto":
                alone = threading.active_count() == 1 and sys.platform.startswith("linux")
                mode = "fork" if alone else "spawn"
            pipe = Platform.spawn_daemon(*self.command(foreground=False), mode)
            try:
                return self._await_ready(pipe), False
            except DaemonError as error:
                if error.code != "ALREADY_RUNNING":
                    raise
        raise DaemonError("START_FAILED", "daemons came and went", "see `logs`")

    def _find_answering(self) -> int | None:
        """Return the PID of a daemon that holds the lock, once it answers; None: there is none."""
        try:
            return int(self._client.call("status", {}, START_TIMEOUT_S)["pid"])
        except DaemonError as error:
            if error.code != "NOT_RUNNING":
                raise
            return None

    def _await_ready(self, pipe: Any) -> int:
        """Read what the starting daemon reports. Raises the error it reports, START_FAILED."""
        lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()

        def read() -> None:
            for line in pipe:
                lines.put(line)
            lines.put(b"")

        threading.Thread(target=read, name="report", daemon=True).start()
        last = "it ended without a word"
        while True:
            try:
                line = lines.get(timeout=START_TIMEOUT_S)
            except queue.Empty:
                what = f"it did not answer within {START_TIMEOUT_S:.0f} s"
                raise DaemonError("START_FAILED", what, "see `logs`") from None
            if not line:
                raise DaemonError("START_FAILED", last, "see `logs`")
            try:
                event = json.loads(line)
                if event["event"] == "ready":
                    return int(event["pid"])
                if event["event"] == "error":
                    raise DaemonError.from_dict(event)
            except (ValueError, TypeError, KeyError):
                last = line.decode("utf-8", "replace").strip() or last

    def run_foreground(self) -> int:
        """Become the daemon (never returns), or be it where there is no exec."""
        load_config(self.project.config_path)
        argv, env = self.command(foreground=True)
        if Platform.SURVIVES:
            os.execve(argv[0], argv, env)
        return run_daemon({**self.project.to_dict(), "foreground": True})

    def get_holder(self) -> Holder | None:
        """Return the daemon that lives, None when there is none. Raises BUSY."""
        deadline = Clock.mono() + CLIENT_HOLD_S
        while True:
            holder = self._pid_file.holder()
            if holder is None or holder.is_daemon:
                return holder
            if Clock.mono() > deadline:
                what = f"the project is held by {holder.role} (PID {holder.pid or 'unknown'})"
                raise DaemonError("BUSY", what, "try again when it is done")
            threading.Event().wait(0.02)

    def is_daemon_running(self) -> bool:
        """Tell whether a daemon holds the lock."""
        return self.get_holder() is not None

    def stop_daemon(self, timeout_s: float | None = None, force: bool = False) -> int | None:
        """Ask it to end, wait, then KILL it; return its PID, None when there was none.

        timeout_s None: the daemon's graceful_timeout and stop_timeout and a margin. force: a
        second TERM follows at once. Raises STOP_FAILED.
        """
        holder = self.get_holder()
        if holder is None:
            return None
        options = load_config(self.project.config_path).daemon
        if timeout_s is None:
            grace = 0.0 if force else options.graceful_timeout
            timeout_s = grace + options.stop_timeout + STOP_MARGIN_S
        if Platform.terminate is None:
            self._client.call("shutdown", {})
        else:
            Platform.terminate(holder.pid)
            if force and not self._await_gone(holder, FIRST_TERM_S + 0.05):
                Platform.terminate(holder.pid)
        if not self._await_gone(holder, timeout_s):
            self._kill(holder)
        return holder.pid

    def _await_gone(self, holder: Holder, timeout_s: float) -> bool:
        deadline, pause = Clock.mono() + timeout_s, 0.002
        while is_alive(holder.pid, holder.start_time, holder.boot_id):
            if Clock.mono() > deadline:
                return False
            threading.Event().wait(pause)
            pause = min(pause * 1.5, 0.05)
        return True

    def _kill(self, holder: Holder) -> None:
        Platform.kill(holder.pid)
        if not self._await_gone(holder, 5.0):
            what = f"PID {holder.pid} survived SIGKILL"
            raise DaemonError("STOP_FAILED", what, "it hangs in the kernel")

    def kill_daemon(self, with_children: bool = False) -> int | None:
        """SIGKILL it, its children too if wanted; return its PID, None without one.

        Children run on otherwise. With children also when no daemon is left: they count
        as interrupted and run again at the next start.
        """
        holder = self.get_holder()
        if holder is not None:
            self._kill(holder)
        if with_children and os.path.exists(os.path.join(self.project.folder, "apex.db")):
            config = load_config(self.project.config_path)
            store = TaskStore(os.path.join(self.project.folder, "apex.db"), config)
            try:
                ids = [task.id for task in store.find(state="running", limit=INTEGER_MAX)]
                AttemptStore(store).set_wishes(ids, Outcome.INTERRUPTED)
                orphans = _find_orphans(store, ids)
            finally:
                store.close()
            for child in orphans:
                if child.recover() is None:
                    child.end(force=True)
        return holder.pid if holder else None

    def leave_daemon(self) -> bool:
        """End it but leave its children running; False when there was none."""
        holder = self.get_holder()
        if holder is None:
            return False
        with contextlib.suppress(DaemonError):
            self._client.call("shutdown", {"keep": True})
        if not self._await_gone(holder, ANSWER_TIMEOUT_S):
            self._kill(holder)
        return True

    def get_status(self) -> DaemonStatus:
        """Return what is known, without starting or changing anything."""
        try:
            details = self._client.call("status", {}, ANSWER_TIMEOUT_S)
            return DaemonStatus(running=True, exit_status=0, pid=details["pid"], details=details)
        except DaemonError as error:
            silence = error
        if silence.code != "NOT_RUNNING":
            return DaemonStatus(running=False, exit_status=4, reason=silence.message, details={})
        try:
            pid = self._pid_file.read().get("pid")
        except DaemonError as error:
            return DaemonStatus(running=False, exit_status=4, reason=error.message, details={})
        dead = f"PID file left by {pid}, which is dead" if pid else None
        status = 1 if pid else 3
        return DaemonStatus(running=False, exit_status=status, reason=dead, details={})


def run_daemon(options: dict[str, Any]) -> int:
    """Be the daemon: report on standard output, then leave the caller's files alone."""
    foreground = options.pop("foreground")

    def report(event: dict[str, Any]) -> None:
        if foreground:
            return
        with contextlib.suppress(OSError):
            os.write(1, json.dumps(event).encode() + b"\n")
            if event["event"] == "ready":
                null = os.open(os.devnull, os.O_RDWR)
                for fd in (0, 1, 2):
                    os.dup2(null, fd)

    try:
        return Daemon(Project(**options), report, foreground).run()
    except DaemonError as error:
        report({"event": "error", **error.to_dict()})
        if foreground:
            raise
        return error.exit_status


# ============================================================================
# 20. CLI - registry and handlers
#     Uses 1-18. Main thread. The only section that prints or exits.
# ============================================================================

Args = argparse.Namespace
_COMMANDS: dict[str, tuple[Callable[[Args], int], tuple[tuple[Any, ...], ...]]] = {}
ALIASES = {"ls": "list", "rm": "remove", "log": "logs"}


def arg(*names: str, **options: Any) -> tuple[Any, ...]:
    """Describe one argument of a command, as ArgumentParser.add_argument takes it."""
    return (names, options)


def command(
    name: str, *arguments: tuple[Any, ...]
) -> Callable[[Callable[[Args], int]], Callable[[Args], int]]:
    """Register a handler: its docstring is the help, its result the exit status."""

    def register(handler: Callable[[Args], int]) -> Callable[[Args], int]:
        _COMMANDS[name] = (handler, arguments)
        return handler

    return register


COMMON = (
    arg("--project", metavar="DIR", help="the project (default: the current folder's)"),
    arg("--state", metavar="DIR", help="the state folder (default: PROJECT/.apex)"),
    arg("--config", metavar="FILE", help="the configuration file"),
    arg("--json", "-j", action="store_true", help="print JSON only"),
)
IDS = arg("ids", nargs="+", metavar="ID", help="task ids: 3 5-9 or 3,5-9")
TASK_OPTIONS = (
    arg("--group", "-g", help="the group, declared in the configuration"),
    arg("--priority", "-o", help="higher first; default 0"),
    arg("--after", "-a", action="append", metavar="ID[:ok|fail|any]", help="start after these"),
    arg("--delay", "-d", metavar="TIME", help="start no sooner than in 90s, 5m, 2h"),
    arg("--label", "-l", help="a name for people"),
    arg("--dir", "-w", metavar="DIR", help="run there instead of here"),
    arg("--retries", metavar="N", help="runs again so often after a failure"),
    arg("--timeout", metavar="TIME", help="ended after this; 0: never"),
    arg("--key", help="at most one unfinished task has it"),
    arg("--on-lost", choices=("retry", "fail"), help="when it vanished without a status"),
    arg("--max-tokens", metavar="N", help="ended when it reports more"),
    arg("--max-cost", metavar="X", help="ended when it reports more"),
    arg("--env", action="append", default=[], metavar="NAME[=VALUE]", help="a variable to keep"),
    arg("--token", help="of an earlier try that was not confirmed"),
    arg("--shell", "-s", metavar="LINE", help="a command line for sh, instead of words"),
    arg("command", nargs=argparse.REMAINDER, help="the command and its arguments"),
)


def emit(data: object, args: Args, text: str) -> None:
    """Print the result: `data` as JSON with --json, else `text`."""
    print(json.dumps(data, indent=1) if args.json else printable(text), flush=True)


def notice(text: str) -> None:
    """Tell people something that is no result."""
    print(f"apexd: {printable(text)}", file=sys.stderr, flush=True)


def client_of(args: Args) -> Client:
    """Make the client of the project that the arguments name."""
    return Client(args.project, args.state, args.config)


def manager_of(args: Args) -> DaemonManager:
    """Make the manager of the project that the arguments name."""
    return DaemonManager(args.project, args.state, args.config)


def ids_of(args: Args) -> list[int]:
    """Read the ids on the command line."""
    try:
        return task_ids(",".join(args.ids).split(","))
    except ValueError as error:
        raise bad(f"{' '.join(args.ids)!r}: must be {error}") from None


def seconds_of(text: str | None) -> float | None:
    """Read an optional duration on the command line."""
    try:
        return None if text is None else duration(text)
    except ValueError as error:
        raise bad(f"{text!r}: must be {error}") from None


@command(
    "start",
    arg("--foreground", "--no-daemon", action="store_true", help="for systemd, Docker"),
    arg("--mode", choices=("fork", "spawn", "auto"), default="auto", help="how to detach"),
)
def cmd_start(args: Args) -> int:
    """Start the daemon; returns when it answers, and prints its PID."""
    manager = manager_of(args)
    if args.foreground:
        return manager.run_foreground()
    pid, was_running = manager.start_daemon(args.mode)
    text = f"{'already running' if was_running else 'started'}, PID {pid}"
    emit({"pid": pid, "already_running": was_running}, args, text)
    return 0


@command(
    "stop",
    arg("extra", nargs="*", help=argparse.SUPPRESS),
    arg("--timeout", metavar="TIME", help="before it is KILLed"),
    arg("--force", action="store_true", help="do not let tasks finish"),
)
def cmd_stop(args: Args) -> int:
    """Let running tasks finish, stop the daemon, wait until it is gone."""
    refuse_ids("stop", args.extra)
    pid = manager_of(args).stop_daemon(seconds_of(args.timeout), args.force)
    emit({"pid": pid, "stopped": pid is not None}, args, f"stopped, PID {pid}" if pid else "not running")
    return 0


def refuse_ids(verb: str, extra: Sequence[str]) -> None:
    """Keep `kill 12` from killing the daemon."""
    if extra:
        what = f"{verb} acts on the daemon, not on tasks"
        raise bad(what, f"did you mean `cancel {' '.join(extra)}`?")


@command(
    "restart",
    arg("--drain", action="store_true", help="let running tasks finish first"),
    arg("--mode", choices=("fork", "spawn", "auto"), default="auto", help="how to detach"),
)
def cmd_restart(args: Args) -> int:
    """Replace the daemon; running tasks go on and are adopted."""
    manager = manager_of(args)
    load_config(manager.project.config_path)
    if args.drain:
        manager.stop_daemon()
    else:
        manager.leave_daemon()
    return cmd_start(argparse.Namespace(**vars(args), foreground=False))


@command("reload")
def cmd_reload(args: Args) -> int:
    """Read the configuration again and say what that changed."""
    plan = client_of(args).call("reload", {})["plan"]
    emit({"plan": plan}, args, "\n".join(plan) or "nothing changed")
    return 0


@command("status")
def cmd_status(args: Args) -> int:
    """Say whether the daemon runs: 0 yes, 1 dead with a PID file, 3 no, 4 unknown."""
    status = manager_of(args).get_status()
    if not status.running:
        emit(status.to_dict(), args, "not running" if status.exit_status == 3 else status.reason)
        return int(status.exit_status)
    details = status.details
    counts = {state: sum(groups.values()) for state, groups in details["counts"].items()}
    lines = [
        f"running, PID {status.pid}, since {span(details['uptime_secs'])}, {details['project']}",
        "tasks: " + (", ".join(f"{n} {state}" for state, n in counts.items()) or "none"),
    ]
    if details["paused"]:
        lines.append("paused: " + ", ".join(details["paused"]).replace("*", "everything"))
    if details["draining"]:
        lines.append("stopping: running tasks are finishing")
    flat = {**details["metrics"], **details, "running": True, "exit_status": 0}
    emit(flat, args, "\n".join(lines))
    return 0


@command(
    "kill",
    arg("extra", nargs="*", help=argparse.SUPPRESS),
    arg("--all", action="store_true", help="its tasks too"),
)
def cmd_kill(args: Args) -> int:
    """SIGKILL the daemon; its tasks run on, unless --all."""
    refuse_ids("kill", args.extra)
    pid = manager_of(args).kill_daemon(args.all)
    emit({"pid": pid, "killed": pid is not None}, args, f"killed, PID {pid}" if pid else "not running")
    return 0


def add_options(args: Args) -> dict[str, Any]:
    """Return the options of Client.add_all that the command line names."""
    options = {
        name: getattr(args, name)
        for name in "group priority label delay retries timeout key on_lost max_tokens".split()
    }
    options["max_cost"] = args.max_cost
    options["after"] = ",".join(args.after).split(",") if args.after else None
    return {**options, "cwd": args.dir, "env": args.env, "token": args.token}


def command_of(args: Args) -> str | list[str]:
    """Return the command of `add` and `run`."""
    words: list[str] = args.command[1:] if args.command[:1] == ["--"] else args.command
    if args.shell is not None and words:
        raise bad("both --shell and a command", "give one of them")
    if args.shell is not None:
        return str(args.shell)
    if not words:
        raise bad("no command", "write: add [options] command args...")
    if len(words) == 1 and re.search(r"\s|&&|\|", words[0]) and not os.path.exists(words[0]):
        raise bad(f"{words[0]!r} is one word", f"use --shell '{words[0]}'")
    return words


def read_batch() -> list[Any]:
    """Read one command a line from standard input: all JSON if the first is, else for sh.

    Raises BAD_REQUEST with the line's number.
    """
    commands: list[Any] = []
    is_json: bool | None = None
    for number, raw in enumerate(sys.stdin.buffer.read().split(b"\n"), 1):
        line = os.fsdecode(raw).strip()
        if is_json is None and line:
            is_json = line[:1] in "{[\""
        if not line or not is_json:
            commands.append(line or None)
            continue
        try:
            commands.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise bad(f"line {number} is no JSON: {error}", "nothing was added") from None
    return commands


@command(
    "add",
    *TASK_OPTIONS[:-1],
    arg("--print-id", "-p", action="store_true", help="print the id alone"),
    arg("--batch", action="store_true", help="read commands from standard input, one a line"),
    arg("--wait", action="store_true", help="show its output, exit with its status"),
    TASK_OPTIONS[-1],
)
def cmd_add(args: Args) -> int:
    """Put a task into the queue and print its id; it is on disk then."""
    if args.batch and (args.command or args.shell):
        raise bad("both --batch and a command", "give one of them")
    commands = read_batch() if args.batch else [command_of(args)]
    client = client_of(args)
    if args.wait:
        client.call("ping", {})
    ids = client.add_all(commands, **add_options(args))
    if args.wait:
        return show_output(client, ids, args)
    if args.json:
        emit({"ids": ids, **({} if args.batch else {"id": ids[0]})}, args, "")
    elif args.batch and sys.stdout.isatty() and not args.print_id:
        print(f"{len(ids)} tasks added" + (f", {ids[0]} to {ids[-1]}" if ids else ""))
    elif args.print_id or not sys.stdout.isatty():
        print("\n".join(map(str, ids)))
    else:
        limit = load_config(client.project.config_path).limits.timeout
        default = f", timeout {span(limit)} (--timeout)" if limit and args.timeout is None else ""
        print(f"task {ids[0]} added{default}")
    if not client.is_live and sys.stdout.isatty():
        notice("no daemon runs; the task waits for `start`")
    return 0


def show_output(client: Client, ids: Sequence[int], args: Args) -> int:
    """Copy the output of tasks to ours until they are done; return their status."""
    for task_id in ids:
        for data in client.follow(task_id):
            if not args.json:
                sys.stdout.buffer.write(data)
                sys.stdout.buffer.flush()
    status = client.wait(ids)
    for task_id in ids if status else ():
        task = client.get(task_id)["task"]
        if task["outcome"] not in ("ok", "failed"):
            notice(f"task {task_id}: {task['reason'] or task['outcome'] or task['state']}")
    if args.json:
        print(json.dumps([client.get(task_id)["task"] for task_id in ids], indent=1))
    return status


@command("run", *TASK_OPTIONS)
def cmd_run(args: Args) -> int:
    """Run a task now and show its output; exits with its status. Ctrl-C cancels it."""
    client = client_of(args)
    client.call("ping", {})
    ids = client.add_all([command_of(args)], **add_options(args))
    try:
        return show_output(client, ids, args)
    except KeyboardInterrupt:
        client.cancel(*ids)
        notice(f"task {ids[0]} cancelled")
        raise


@command(
    "list",
    arg("--state", dest="task_state", choices=[s.value for s in State], help="only in this state"),
    arg("--group", "-g", help="only of this group"),
    arg("-n", "--lines", type=int, help="at most so many, the newest (text: 100)"),
)
def cmd_list(args: Args) -> int:
    """List tasks, the newest last; --json lists all unless -n says how many."""
    client = client_of(args)
    if args.group and args.group not in client.queue()["groups"]:
        raise DaemonError("UNKNOWN_GROUP", f"there is no group {args.group!r}", "see `config`")
    limit = args.lines or (None if args.json else 100)
    tasks = client.list(limit=limit, state=args.task_state, group=args.group)
    emit(tasks, args, task_table(tasks))
    if limit is not None and len(tasks) == limit and not args.json:
        notice(f"these are the newest {limit}; -n N or --json for more")
    return 0


def task_table(tasks: Sequence[Mapping[str, Any]]) -> str:
    """Lay tasks out in columns as wide as the terminal."""
    rows = [("ID", "STATE", "GROUP", "PRIO", "TRIES", "EXIT", "TIME", "COMMAND")]
    for task in tasks:
        end = task["finished_at"] or Clock.now()
        took = span(max(end - task["started_at"], 0.0)) if task["started_at"] else "-"
        state = task["state"]
        if state == "running" and task["progress"] is not None:
            state = f"running {task['progress']:.0f}%"
        code = "-" if task["exit_code"] is None else str(task["exit_code"])
        words = task["command"]
        text = task["label"] or (words if isinstance(words, str) else " ".join(words))
        numbers = (str(task["priority"]), str(task["attempts"]), code)
        rows.append((str(task["id"]), state, task["group"], *numbers, took, text))
    widths = [max(len(row[i]) for row in rows) for i in range(7)]
    width = shutil.get_terminal_size((120, 24)).columns if sys.stdout.isatty() else 1000
    lines = ("  ".join([*map(str.ljust, row, widths), row[7]]) for row in rows)
    return "\n".join(printable(line)[:width].rstrip() for line in lines)


@command("show", arg("id", metavar="ID", help="a task id"))
def cmd_show(args: Args) -> int:
    """Show one task and the history of its attempts."""
    args.ids = [args.id]
    answer = client_of(args).get(ids_of(args)[0])
    task, history = answer["task"], answer["history"]
    lines = [f"{name:12} {show_value(name, v)}" for name, v in task.items() if v not in (None, [])]
    for attempt in history:
        end = attempt["finished_at"]
        took = f" after {span(max(end - attempt['started_at'], 0.0))}" if end else ""
        how = attempt["reason"] or attempt["exit_code"]
        lines.append(f"attempt {attempt['number']:<4} {attempt['outcome'] or 'running'} ({how}){took}")
    emit({**task, "history": history}, args, "\n".join(lines))
    return 0


def show_value(name: str, value: Any) -> str:
    """Write a field for people."""
    if name.endswith("_at"):
        return timestamp(value)
    return value if isinstance(value, str) else json.dumps(value)


@command("wait", IDS, arg("--timeout", metavar="TIME", help="then exit with 124"))
def cmd_wait(args: Args) -> int:
    """Wait for tasks; exits with the first status that is not 0, in the order given."""
    client, ids = client_of(args), ids_of(args)
    is_drawn = sys.stderr.isatty() and not args.json

    def draw(answer: dict[str, Any]) -> None:
        done = answer["total"] - answer["pending"]
        filled = int(answer["progress"] / 100 * 30)
        bar = "#" * filled + "." * (30 - filled)
        names = ", ".join(map(str, answer["running"]))
        text = f"[{bar}] {done}/{answer['total']}" + (f"  running: {names}" if names else "")
        width = shutil.get_terminal_size().columns - 1
        print("\r" + text[:width].ljust(width), end="", file=sys.stderr, flush=True)

    try:
        status = client.wait(ids, seconds_of(args.timeout), draw if is_drawn else None)
    finally:
        if is_drawn:
            print(file=sys.stderr)
    if args.json:
        emit(client.list(ids=ids), args, "")
    return status


def change(verb: str, word: str, args: Args) -> int:
    """Do one verb to tasks; 1 when the state of any did not allow it."""
    answer = client_of(args).call(verb, {"ids": ids_of(args)})
    emit(answer, args, f"{word}: " + (", ".join(map(str, answer["done"])) or "none"))
    if answer["not_done"]:
        reason = {"cancel": "finished already", "retry": "not finished", "remove": "running"}[verb]
        notice(f"{reason}: {', '.join(map(str, answer['not_done']))}")
    return 1 if answer["not_done"] else 0


@command("cancel", IDS)
def cmd_cancel(args: Args) -> int:
    """Cancel tasks; running ones are ended with all they started."""
    return change("cancel", "cancelled", args)


@command("retry", IDS)
def cmd_retry(args: Args) -> int:
    """Run finished tasks again; what was skipped because of them waits again."""
    return change("retry", "queued", args)


@command("remove", IDS)
def cmd_remove(args: Args) -> int:
    """Forget tasks that do not run."""
    return change("remove", "removed", args)


GROUP = arg("--group", "-g", help="this group only")


@command("pause", GROUP)
def cmd_pause(args: Args) -> int:
    """Start nothing more; what runs goes on."""
    answer = client_of(args).pause(args.group)
    emit(answer, args, "paused: " + ", ".join(answer["paused"]).replace("*", "everything"))
    return 0


@command("resume", GROUP)
def cmd_resume(args: Args) -> int:
    """Start tasks again."""
    answer = client_of(args).resume(args.group)
    left = ", ".join(answer["paused"]).replace("*", "everything")
    emit(answer, args, f"still paused: {left}" if left else "resumed")
    return 0


@command("why", arg("id", metavar="ID", help="a task id"))
def cmd_why(args: Args) -> int:
    """Say what a task waits for, or how it ended."""
    args.ids = [args.id]
    answer = client_of(args).why(ids_of(args)[0])
    emit(answer, args, f"task {answer['id']} {answer['state']}: " + "; ".join(answer["reasons"]))
    return 0


@command(
    "logs",
    arg("task", nargs="?", metavar="TASK[.ATTEMPT]", help="default: the daemon's own log"),
    arg("-n", "--lines", type=int, help="the last N lines"),
    arg("-f", "--follow", action="store_true", help="go on as it grows"),
    arg("--raw", action="store_true", help="do not escape control characters on a terminal"),
)
def cmd_logs(args: Args) -> int:
    """Show a task's output, or the daemon's log."""
    client = client_of(args)
    if args.task is None:
        chunks = follow_file(os.path.join(client.project.folder, "daemon.log"), args.lines or 50, args.follow)
    else:
        match = re.fullmatch(r"([0-9]{1,18})(?:\.([0-9]{1,9}))?", args.task)
        if not match:
            raise bad(f"{args.task!r}: must be a task id, or ID.ATTEMPT")
        attempt = int(match[2]) if match[2] else None
        chunks = client.follow(int(match[1]), attempt, -(args.lines or 0), args.follow)
    data = b""
    for data in chunks:
        if args.json:
            print(json.dumps({"data": data.decode("utf-8", "replace")}), flush=True)
        elif args.raw or not sys.stdout.isatty():
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        else:
            print(printable(data.decode("utf-8", "replace")), end="", flush=True)
    return 0


def follow_file(path: str, lines: int, to_end: bool) -> Iterator[bytes]:
    """Yield a file's last lines, then, with to_end, what comes, through its rotations."""
    data, offset = read_log(path, -lines)
    yield data
    while to_end:
        before = os.stat(path).st_size if os.path.exists(path) else 0
        offset = 0 if before < offset else offset  # rotated: a new file
        data, offset = read_log(path, offset)
        if data:
            yield data
        else:
            threading.Event().wait(0.2)


@command(
    "report",
    arg("--task", metavar="ID", help="default: the task this runs in"),
    arg("--tokens", help="used since the last report"),
    arg("--cost", help="spent since the last report"),
    arg("--progress", help="percent"),
    arg("--note", help="one line"),
)
def cmd_report(args: Args) -> int:
    """Report usage and progress of the task this runs in."""
    args.ids = [args.task or os.environ.get("APEX_TASK_ID") or ""]
    task_id = ids_of(args)[0]
    run_id = None if args.task else os.environ.get("APEX_RUN_ID")
    names = ("tokens", "cost", "progress", "note")
    usage = {n: getattr(args, n) for n in names if getattr(args, n) is not None}
    answer = client_of(args).report(task_id, run_id=run_id, **usage)
    emit(answer, args, "over budget: the task is being ended" if answer["over_budget"] else "ok")
    return 0


@command(
    "dlq",
    arg("action", nargs="?", default="list", choices=("list", "show", "retry", "drop"), help="what"),
    arg("ids", nargs="*", metavar="ID", help="task ids; retry and drop: all if none"),
)
def cmd_dlq(args: Args) -> int:
    """Look at the dead letters, the failed tasks; run them again or drop them."""
    args.task_state, args.group, args.lines = "failed", None, None
    if args.action == "list":
        return cmd_list(args)
    if not args.ids:
        args.ids = [str(task["id"]) for task in client_of(args).list(state="failed")]
    if args.action == "show":
        args.id = args.ids[0] if args.ids else ""
        return cmd_show(args)
    if not args.ids:
        emit({"done": [], "not_done": []}, args, "no failed tasks")
        return 0
    return cmd_retry(args) if args.action == "retry" else cmd_remove(args)


@command("config")
def cmd_config(args: Args) -> int:
    """Check the configuration and print the effective values."""
    project = manager_of(args).project
    config = load_config(project.config_path)
    lines = [f"# {project.config_path or 'no file: the defaults'}"]
    for key, value in _flat(config.to_dict()).items():
        lines.append(f"{key} = {json.dumps(value)}")
    emit({"path": project.config_path, **config.to_dict()}, args, "\n".join(lines))
    return 0


@command("doctor")
def cmd_doctor(args: Args) -> int:
    """Look for what could go wrong here; 1 when something is."""
    manager = manager_of(args)
    checks = [*_check_system(manager.project), *_check_project(manager)]
    lines = [f"{'ok ' if good else 'BAD'} {name}: {text}" for name, good, text in checks]
    data = [{"check": name, "ok": good, "text": text} for name, good, text in checks]
    emit(data, args, "\n".join(lines))
    return 0 if all(good for _, good, _ in checks) else 1


def _check_system(project: Project) -> Iterator[tuple[str, bool, str]]:
    import sqlite3

    yield "python", sys.version_info >= (3, 9), sys.version.split()[0]
    version = sqlite3.sqlite_version
    yield "sqlite", sqlite3.sqlite_version_info >= (3, 31), version
    yield "children", True, "adopted after a crash" if Platform.SURVIVES else "die with the daemon"
    free = shutil.disk_usage(project.path).free
    yield "disk", free > 1 << 28, f"{free >> 20} MiB free"
    kind = Platform.network_file_system(project.folder)
    yield "file system", kind is None, f"{kind}: use --state DIR" if kind else "local"
    is_open = Platform.is_foreign(os.stat(os.path.abspath(__file__)))
    text = "writable by others" if is_open else "not writable by others"
    yield "apexd.py", not is_open, text


def _check_project(manager: DaemonManager) -> Iterator[tuple[str, bool, str]]:
    project = manager.project
    try:
        load_config(project.config_path)
        yield "config", True, project.config_path or "defaults"
    except DaemonError as error:
        yield "config", False, error.message
    status = manager.get_status()
    text = f"running, PID {status.pid}" if status.running else status.reason or "not running"
    yield "daemon", status.exit_status in (0, 3), text
    if os.path.isdir(project.folder):
        mode = stat.S_IMODE(os.stat(project.folder).st_mode)
        yield "state folder", mode & 0o077 == 0 or not Platform.SURVIVES, f"mode {mode:04o}"


@command("version")
def cmd_version(args: Args) -> int:
    """Print the version."""
    emit({"version": __version__}, args, __version__)
    return 0


class _Parser(argparse.ArgumentParser):
    """Turns a usage error into a DaemonError: one line what, one what to do."""

    def error(self, message: str) -> NoReturn:
        raise bad(message, f"see `{self.prog} --help`")


def build_parser(only: str | None = None) -> argparse.ArgumentParser:
    """Make the parser of all commands, or of one: a tenth of the time."""
    parser = _Parser("apexd.py", description="A project's background work, not lost by a crash.")
    for names, options in COMMON:
        parser.add_argument(*names, **options)
    commands = parser.add_subparsers(dest="verb", metavar="COMMAND")
    for name, (handler, arguments) in _COMMANDS.items():
        if only not in (None, name):
            continue
        text = handler.__doc__ or ""
        alias = [a for a, full in ALIASES.items() if full == name]
        sub = commands.add_parser(name, help=text, description=text, aliases=alias)
        for names, options in (*COMMON, *arguments):
            if name == "list" and names == ("--state",) and (names, options) in COMMON:
                continue  # there it means a task's state
            own = {"default": argparse.SUPPRESS} if (names, options) in COMMON else {}
            sub.add_argument(*names, **{**options, **own})
        sub.set_defaults(handler=handler)
    return parser


def parse(argv: Sequence[str]) -> Args:
    """Read the command line. Raises BAD_REQUEST, UNKNOWN_COMMAND."""
    words = list(argv)
    at = 0
    while at < len(words) and words[at].startswith("-"):
        at += 2 if words[at] in ("--project", "--state", "--config") else 1
    name = words[at] if at < len(words) else None
    if name is None and not any(word in ("-h", "--help") for word in words):
        words.append("status")
        name = "status"
    full = ALIASES.get(name or "", name)
    if name is not None and full not in _COMMANDS:
        import difflib

        near = difflib.get_close_matches(name, [*_COMMANDS, *ALIASES], 1, 0.5)
        hint = f"did you mean `{near[0]}`?" if near else "see `apexd.py --help`"
        raise DaemonError("UNKNOWN_COMMAND", f"there is no command {name!r}", hint)
    return build_parser(full).parse_args(words)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status. The only place that reports errors."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["_daemon"]:
        status = _guarded(lambda: run_daemon(json.loads(words[1])), "--json" in words)
        os._exit(status)  # the slots' threads wait for children that outlive us
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")

    def run() -> int:
        args = parse(words)
        handler: Callable[[Args], int] = args.handler
        return handler(args)

    return _guarded(run, "--json" in words or "-j" in words)


def _guarded(run: Callable[[], int], as_json: bool) -> int:
    """Turn whatever a command raises into lines on standard error and a status."""
    try:
        return run()
    except DaemonError as error:
        if as_json:
            print(json.dumps({"error": error.to_dict()}), file=sys.stderr)
        else:
            notice(error.message + (f"\n       {error.hint}" if error.hint else ""))
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter's own flush at exit
        return 141
    except Exception as error:  # what no section foresaw
        if os.environ.get("APEX_DAEMON_DEBUG"):
            raise
        notice(f"a bug: {type(error).__name__}: {error}\n       APEX_DAEMON_DEBUG=1 shows where")
        return CODES["INTERNAL"][0]


if __name__ == "__main__":
    sys.exit(main())
