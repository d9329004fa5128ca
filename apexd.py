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
     5. FILES       safe reading and replacing, the state folder, logs that lose their head
     6. CONFIG      load, check, compare for reload
     7. LOG         the daemon's own log; the file of events
     8. PIDFILE     the lock and the PID file
     9. STORE       schema, migrations, all SQL
    10. KEEPER      the process that owns all children, and the daemon's end of it
    11. CRON        when schedules fire, and the thread that makes them
    12. EVENTS      reading what happened; subscribers; what hooks send to a URL
    13. RUNNER      the polling loop over the store
    14. SUPERVISOR  processes: state table, what happens next, instances
    15. WATCH       what changes in files
    16. CONTROL     frames, verbs, server, Client
    17. HTTP        health, metrics, the status page: HealthVerbs, HealthServer
    18. DAEMON      wiring, start order, signals; DaemonManager
    19. SERVICE     unit, init script, launchd, Windows texts
    20. CLI         registry and handlers

Files, all in `.apex/` (mode 0700):

    config.toml | config.json | config.yaml    optional
    daemon.lock    locked while a daemon lives; says who holds it; never deleted
    daemon.pid     {"pid", "startedAt", "version", "projectPath"}
    daemon.log     the daemon's own log, .1 .2 ... older
    events.log     what happened, a line of JSON each; .1 is older
    apex.db        the queue
    control.sock   the control socket; `endpoint` says how to reach the daemon
    heartbeat      rewritten while the loops turn; state.json: a readable snapshot
    http.json      the port of the status page, and the key to all that it shows
    ballast        given up when the disk is full, so that results can be recorded
    run/           keeper-NAME: a keeper, and results it could not tell; proc-web.0: notes
    logs/          task-12.1.log: task 12, attempt 1; proc-web.0.log: instance 0 of web
    apexd          this command line for this project, from the bytecode in cache/

Exit statuses: 0 ok, 1 failed, 2 usage; `status` 0 running, 1 dead with a PID file,
3 not running, 4 unknown; `wait` and `run` the task's own, 124 when waiting timed out;
else sysexits.h: 65 corrupt, 69 not reachable, 70 a bug of ours, 73 cannot create,
75 busy: try again, 77 permission, 78 configuration.
"""

from __future__ import annotations

import gc
import sys

if sys.hexversion < 0x3090000:
    _text = "apexd needs Python 3.9 or newer, this is %d.%d"
    raise (SystemExit if __name__ == "__main__" else ImportError)(_text % sys.version_info[:2])
if __name__ == "__main__":
    gc.disable()  # until all is imported: a twentieth of a short command's time
    if not getattr(sys.flags, "safe_path", sys.flags.isolated):
        del sys.path[0]  # the script's folder: no file there may stand in for a standard module

import argparse
import bisect
import contextlib
import errno
import functools
import itertools
import json
import os
import re
import selectors
import signal
import socket
import stat
import struct
import threading
import time
from collections import Counter, deque
from enum import Enum
from types import SimpleNamespace

TYPE_CHECKING = False
if TYPE_CHECKING:
    import binascii
    import datetime
    import difflib
    import email.utils
    import fnmatch
    import graphlib
    import grp
    import hmac
    import http.server
    import io
    import logging
    import marshal
    import pwd
    import queue
    import random
    import resource
    import shutil
    import sqlite3
    import subprocess
    import tempfile
    import urllib.parse
    import zoneinfo
    from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
    from typing import Any, BinaryIO, Callable, NoReturn

__version__ = "0.4.0"
__all__ = [
    "Client", "CronSchedule", "DaemonError", "DaemonManager", "DaemonMetrics", "DaemonRunner",
    "DaemonStatus", "Event", "EventRouter", "FileWatcher", "HealthServer", "PidFile", "Supervisor",
    "Task", "TaskStore", "load_config", "main",
]  # fmt: skip


class _Lazy:
    """Something that is imported at its first use: few commands need it."""

    def __init__(self, load: Callable[[], object]) -> None:
        self._load = load

    def __getattr__(self, name: str) -> Any:
        return getattr(self._load(), name)


if not TYPE_CHECKING:
    for _name in (
        "binascii datetime difflib email.utils fnmatch graphlib grp hmac http.server io logging "
        "marshal pwd queue random resource shutil sqlite3 subprocess tempfile urllib.parse zoneinfo"
    ).split():
        globals()[_name.partition(".")[0]] = _Lazy(functools.partial(__import__, _name))
log: Any = _Lazy(lambda: logging.getLogger("apexd"))

# Kept so that `start` can store it: to compile this file takes longer than all else it does.
_BYTECODE = sys._getframe().f_code if __name__ == "__main__" else None
# (project, state folder) of the launcher that runs this, see FILES.
_LAUNCHED_FOR: tuple[str, str] | None = globals().get("launched_for")

# ============================================================================
# 1. CONSTANTS - every default and limit, with its unit and its reason
#    Uses nothing. Read by all; changed by none.
# ============================================================================

STATE_FOLDER = ".apex"
SMALL_FILE_BYTES = 64 * 1024  # of a PID file, lock file, `endpoint` and the like
USER_FILE_BYTES = 4 * 1024 * 1024  # of a configuration or env_file
NESTED_MAX = 200  # brackets in a small file: json recurses
FRESH_S = 2.0  # apexd.py may have been replaced since it was read if it is newer than this
START_TIMEOUT_S = 10.0  # for the daemon to answer; each `progress` line extends it
STOP_MARGIN_S = 5.0  # what `stop` adds to the daemon's own two waits before it KILLs
CONFIRM_TIMEOUT_S = 10.0  # how long a client tries to confirm a request that was cut off
PROCESS_ANSWER_S = 600.0  # a rolling reload of many instances takes its time
SETTLE_S = 0.5  # a process without `ready` that is still there then has come up
INSTANCE_STOP_S = 0.1  # what each instance adds to the time that stopping may take
ANSWER_TIMEOUT_S = 5.0  # a daemon that says nothing for so long counts as hung
RETURN_TIMEOUT_S = 30.0  # `wait`, `run`, `logs -f` outlive a daemon that is away so long
CLIENT_HOLD_S = 5.0  # a client holds the lock for one call; longer means another program

FRAME_MAX_BYTES = 16 * 1024 * 1024  # a request or a response
FRAME_ITEMS_MAX = 1_000_000  # values in a request: each costs up to 125 bytes of memory
FRAME_DIGITS_MAX = 400  # of a whole number in it
LARGE_FRAMES_MAX = 4  # large requests being read at once, all connections together
LARGE_FRAME_WAIT_S = 1.0  # for one of them to have been read
LARGE_FRAME_BYTES = 64 * 1024  # requests up to this size are not counted
FRAME_TIMEOUT_S = 10.0  # from a frame's first byte to its last
IDLE_TIMEOUT_S = 60.0  # a silent connection gives its place to others
CONNECTIONS_MAX = 64
SPARE_S = 0.25  # a new connection, or one just answered, keeps its place so long
SOCKET_PATH_MAX_BYTES = 103  # sun_path of macOS; Linux allows 107 (unix(7))

KEEPER_PROTOCOL = 1
KEEPER_PATIENCE_S = 10.0  # a new keeper waits so long for its daemon
KEEPER_ANSWER_S = 10.0  # one that owes an answer for longer takes no more starts
STANDING_S = 2.0  # `start` waits so long for a keeper, then answers without
RECOVERY_S = 3600.0  # a watchdog lets the database be checked and all be adopted for so long
KEEPER_QUIT_S = 5.0  # for keepers without children to leave
STARTED_S = 0.003  # what ends sooner is not told as started
KEEPER_BUFFER_BYTES = 64 * 1024  # of words on their way to the daemon
KEEPER_FILE_MAX_BYTES = 64 * 1024 * 1024
PRIVATE_KEEPERS_MAX = 4  # at once, each for one task that was lost with its keeper
CALLED = "call"  # stands for the keeper of what a function of the program carries out
GATHER_S = 0.0005  # for what ends at the same time: one commit for all of it
NOTE_S = 0.1  # a PID is on disk so soon after its start
NOTE_BYTES = 512  # a process's note: one sector, written as a whole
LOG_FILES_MAX = 100  # rotated ones of the daemon's own log
LOG_CHUNK_BYTES = 256 * 1024  # of a log, in one answer
LINE_MAX_BYTES = 64 * 1024  # a longer line is cut; of `tail_logs`, and of processes
LINES_MAX = 100_000  # of a log at once
STREAMS_MAX = CONNECTIONS_MAX // 2  # those who follow logs leave room for others
TOGETHER_S = 0.05  # what is due so soon is done at once: one wakeup instead of two
LOOK_S = 5.0  # between two looks whether database, socket, watched folders are where they were
STREAM_PAUSE_S = 0.2  # between two looks at a log that somebody follows
LOG_CHECK_S = 1.0  # between two looks at the size of running tasks' logs
LOG_CHECK_MAX_S = 30.0  # the same while it does not grow
SWEEP_PAUSE_S = 0.001  # between two looks for what a run left; doubles up to a second
SWEEP_MAX_S = 5.0  # then a status counts though something that is hidden holds the log
BALLAST_BYTES = 64 * 1024  # what a cancel, a timeout, a result need on a full disk
FIRST_TERM_S = 1.0  # a second TERM counts only so long after the first

HTTP_CONNECTIONS_MAX = 32  # one more takes the place of one that has not asked yet
HTTP_TIMEOUT_S = 5.0  # for a request from its first byte to the last of its answer
HTTP_HEAD_MAX_BYTES = 16 * 1024  # a request's line and headers
HEALTH_WAIT_S = 2.0  # what gives no answer for so long counts as hung
CPU_SAMPLE_S = 0.5  # shorter ones are noise: several may look, and the system counts in ticks
HUNG_S = 30.0  # a loop that is so late counts as hung
DISK_LOW_BYTES = 256 << 20  # `doctor` and `health` complain
DISK_FULL_BYTES = 16 << 20  # nothing that is put into the queue is sure to fit
BUCKETS_S = (0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14400.0)  # of histograms

BACKOFF_S = 1.0  # before the first retry; doubles, with full jitter
BACKOFF_MAX_S = 300.0
DEFER_S = 60.0  # after exit status 75 (EX_TEMPFAIL); doubles
DEFER_MAX_S = 900.0
DEFERRALS_MAX = 100
LOST_MAX = 3  # a task that took a keeper of its own along so often is poison
TOKEN_KEPT_S = 3600.0
MAINTENANCE_S = 60.0  # between two rounds of pruning
PRUNE_MAX_S = 2.0  # of one round; it forgets tens of thousands of tasks
PRUNE_BATCH = 1000  # tasks, in one transaction
CLOCK_JUMP_S = 60.0  # a round in which the clock moved so far by itself goes by no age
PRIORITY_MAX = 1_000_000
DEPENDENCIES_MAX = 100_000  # of one task
INTEGER_MAX = 2**63 - 1  # sqlite's
DAY_S = 24 * 3600
DST_MAX_S = 3 * 3600  # a clock that is moved further is taken as it is, as by cronie
CRON_LATE_S = 300.0  # after a shorter pause all that fell due fires, as by cronie
CRON_RESTART_S = 10.0  # a daemon that is back so soon has not missed what fell due
CRON_SLICE_S = 60.0  # the longest sleep: then a clock that was moved is noticed
CRON_RETRY_S = 5.0  # after a fire that failed: a full disk or queue
CATCH_UP_MAX = 1000  # fires of one schedule that are made up for
OWN_GROUPS = ("default", "hooks")  # there without being declared

EVENTS_MAX_BYTES = 10_000_000  # of events.log, before it becomes events.log.1
EVENT_MAX_BYTES = 30_000  # of one that a user emits: a variable of Windows takes 32,767
CHANGED_MAX = 200  # options that config.reloaded names: it must fit into a variable as well
HISTORY_MAX = 1000  # events that a router keeps
DEAD_LETTERS_MAX = 100  # events that a handler failed for, kept by a router
HANDLER_PAUSES_S = (1.0, 2.0, 4.0)  # before a failed handler's further tries
HANDLER_BEHIND_MAX = 10_000  # events that wait for a slow handler; more are dead letters
HOPS_MAX = 4  # hooks that start one another
HOOKS_AT_ONCE = 2  # unless [group.hooks] says otherwise: those that hang leave room for tasks
DELIVER = ["apexd", "_deliver"]  # the command of a hook's task that POSTs its event
HOOK_ANSWER_S = 10.0  # for the server of a hook's URL

ENVIRONMENT_KEPT = (
    "PATH HOME USER LOGNAME LANG TZ TMPDIR SHELL VIRTUAL_ENV CONDA_PREFIX PYTHONPATH "
    "SSH_AUTH_SOCK XDG_RUNTIME_DIR HTTP_PROXY HTTPS_PROXY FTP_PROXY ALL_PROXY NO_PROXY "
    "SYSTEMROOT TEMP TMP PATHEXT COMSPEC USERPROFILE APPDATA APEX_HOOKS"
).split()
# APEX_HOOKS stays: what the command of a hook adds must not start that hook again.
ENVIRONMENT_DROPPED = re.compile(r"NOTIFY_SOCKET|WATCHDOG_|LISTEN_|APEX_(?!HOOKS$)|APEXD_")
TASK_MARKS = ("APEX_RUN_ID", "APEX_TASK_ID", "APEX_HOOKS")  # no daemon keeps a task's own
SHORTAGES = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}  # they say nothing of what was looked for
DEBOUNCE_S = 0.5  # after the last change of a burst
DEBOUNCE_MAX_S = 10.0  # after its first, though changes go on
WATCH_LOOK_S = 1.0  # between two looks for a folder that is missing; at files, at the least
WATCH_GATHER_S = 0.01  # notifications that come together are read together
POLL_SHARE = 0.004  # of a processor, for looking through a tree that nobody tells of
POLL_BUSY_FACTOR, POLL_BUSY_S = 10, 30.0  # more of it for so long after a change
POLL_MAX_S = 60.0
FILE_CHANGES = {"create": "created", "modify": "modified", "delete": "deleted", "move": "moved"}
WATCH_IGNORED = (
    ".git .apex .svn .hg node_modules __pycache__ .venv venv .tox .mypy_cache .DS_Store "
    "*~ .*.sw? .#* #*# 4913 *.tmp"  # of editors: backups, swap files, locks
).split()
WATCH_OWN_S = 0.05  # what changes so soon after a watch's own task was perhaps changed by it
WATCH_BUSY_S = 0.1  # between two looks whether that task has ended, while something waits for it
LOOP_ROUNDS = 5  # tasks in a row that each changed what is watched: a loop
LOOP_PAUSE_S, LOOP_PAUSE_MAX_S = 30.0, 3600.0  # it goes on so much later; doubles
EVENT_VARIABLE_CHARS = 30_000  # of APEX_EVENT: Windows takes 32,767, Linux 131,071
MOUNT_POINT = 0xA0000003  # st_reparse_tag of a junction of Windows, a kind of link
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
    "CANNOT_CREATE": (73, "a file or folder cannot be created, read or written"),
    "CONFIG_INVALID": (78, "the configuration is broken; nothing was changed"),
    "DATABASE_CORRUPT": (65, "the database is damaged; it is kept as it is"),
    "DATABASE_FAILED": (73, "the database cannot be read or written now"),
    "DATABASE_NEWER": (78, "the database was made by a newer apexd"),
    "ILLEGAL_STATE": (1, "the task's state does not allow this"),
    "INTERNAL": (70, "a bug of apexd's own; its log has the traceback"),
    "NOT_ANSWERING": (69, "the daemon lives but does not answer"),
    "NOT_CONFIRMED": (75, "it is not known whether the request was carried out"),
    "NOT_RUNNING": (69, "no daemon of this project runs"),
    "NOT_SUPPORTED": (1, "this system cannot do that"),
    "PERMISSION_DENIED": (77, "the project belongs to somebody else"),
    "PID_FILE_CORRUPTED": (65, "the PID file holds no PID"),
    "PROCESS_ALREADY_RUNNING": (1, "all instances of the process run"),
    "PROCESS_FAILED": (1, "the process did not come up"),
    "PROCESS_NOT_FOUND": (2, "the configuration names no such process"),
    "PROCESS_NOT_RUNNING": (1, "no instance of the process runs"),
    "QUEUE_FULL": (75, "retention.max_queue unfinished tasks are in the queue"),
    "START_FAILED": (1, "the daemon did not come up"),
    "STOP_FAILED": (1, "something did not go away"),
    "STOP_KILLED": (1, "the daemon did not stop in time and was killed"),
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


def bad(message: str, hint: str = "see `--help`, and README.md") -> DaemonError:
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
        self.__dict__.update(dict.fromkeys(self.__annotations__), **fields)

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
DONE = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED, State.SKIPPED})
MOVES: dict[State, frozenset[State]] = {
    State.WAITING: frozenset({State.SCHEDULED, State.QUEUED, State.SKIPPED, State.CANCELLED}),
    State.SCHEDULED: frozenset({State.QUEUED, State.CANCELLED}),
    State.QUEUED: frozenset({State.RUNNING, State.CANCELLED}),
    State.RUNNING: frozenset({State.SCHEDULED, State.QUEUED} | (DONE - {State.SKIPPED})),
    **dict.fromkeys(DONE, frozenset({State.WAITING, State.QUEUED})),
}


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


# What a dependency asks of the state in which the task it names ended.
NEEDS = {"ok": {State.SUCCEEDED}, "fail": {State.FAILED}, "any": DONE}


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
    started_at: float  # None before the first attempt
    finished_at: float | None
    outcome: Outcome | None
    exit_code: int | None
    signal: int | None
    reason: str | None  # why it was not started: "spawn:ENOENT make: command not found"
    wish: Outcome | None  # what a running attempt is being ended for
    progress: float | None  # percent
    note: str | None
    tokens: int
    cost: float
    max_tokens: int | None
    max_cost: float | None
    cpu_s: float | None  # processor time of the last attempt
    max_rss: int | None  # bytes: the largest memory of one of its processes
    run_id: str | None  # of the last attempt: the APEX_RUN_ID of all that it started
    keeper: str | None  # who has it
    boot_id: str | None
    request_id: int
    pid: int | None  # the command's own, while it runs
    start_time: str | None  # of that PID
    suspect: int  # it was lost with its keeper: it runs under one of its own

    @property
    def status(self) -> int:
        """The exit status of `wait`: the task's own, else 0 or 1 by its state."""
        return int(self.state != State.SUCCEEDED) if self.exit_code is None else self.exit_code


class Result(Value):
    """How a child ended, before policy: a status, a reason, or neither (lost)."""

    exit_code: int | None  # 128 and the signal's number when a signal ended it
    signal: int | None
    reason: str | None  # why it did not start
    never_ran: bool | None  # nothing was executed
    is_interrupted: bool | None  # the keeper was told to end as well
    finished_at: float | None  # epoch seconds
    ran_s: float | None
    cpu_s: float | None
    max_rss: int | None  # bytes


class Begun(Value):
    """What a keeper tells of a run that lives."""

    pid: int
    start_time: str | None
    age_s: float  # how long it has run
    is_adopted: bool  # it was started by a former daemon


class Event(Value):
    """Something that happened, as events.log, hooks and `events` show it."""

    id: str  # unique
    time: float  # epoch seconds
    type: str  # "task.failed"
    source: str  # who tells it: "task 12", "schedule nightly"
    payload: dict[str, Any]
    hops: int  # hooks that led to it, one by the other

    @classmethod
    def make(cls, type: str, payload: Mapping[str, Any], source: str, hops: int = 0) -> Event:
        """Make one that happens now."""
        event = cls.__new__(cls)  # three of them a task: the common way takes twice as long
        event.id, event.time, event.type = os.urandom(12).hex(), Clock.now(), type
        event.source, event.payload, event.hops = source, dict(payload), hops
        return event


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

    def count(self, task: Task) -> None:
        """Count a task if it has come to its end: what runs again has not failed."""
        self.tasks_processed += task.state in DONE
        self.tasks_succeeded += task.state == State.SUCCEEDED
        self.tasks_failed += task.state == State.FAILED


class DaemonStatus(Value):
    """What `DaemonManager.get_status` knows; `exit_status` follows LSB."""

    running: bool
    exit_status: int  # 0 running, 1 dead with a PID file, 3 not running, 4 unknown
    pid: int | None
    started_at: float | None  # epoch seconds
    uptime: float | None  # seconds
    reason: str | None
    details: dict[str, Any]  # the daemon's own `status` answer, {} without one


class Clock:
    """Time as the rest of the file sees it."""

    now = staticmethod(time.time)  # epoch seconds, can jump
    mono = staticmethod(time.monotonic)  # for durations and deadlines


# Readers turn what a user wrote, on the command line, in the configuration or in a request,
# into a value; each raises ValueError with the form that it accepts.

_UNITS = {"ms": 0.001, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def duration(text: object) -> float:
    """Read seconds: a number, or "90s", "5m", "2h", "1d", "250ms"; never negative."""
    if isinstance(text, str):
        match = re.fullmatch(r"\s*(\d{1,12}(?:\.\d{1,9})?)\s*(ms|[smhd]?)\s*", text)
        text = float(match[1]) * _UNITS[match[2]] if match else None
    if isinstance(text, bool) or not isinstance(text, (int, float)) or not 0 <= text < 1e10:
        raise ValueError("a duration: seconds from 0, or 90s, 5m, 2h, 1d")
    return float(text)


def interval(text: object) -> float:
    """Read a duration that is long enough to wait for, again and again."""
    if not 0.01 <= duration(text) <= 86400:
        raise ValueError("a duration from 0.01 s to a day")
    return duration(text)


def integer(low: int, high: int = INTEGER_MAX) -> Callable[[object], int]:
    """Make a reader of whole numbers within [low, high]."""

    def read(text: object) -> int:
        if isinstance(text, str) and re.fullmatch(r"\s*[+-]?[0-9]{1,20}\s*", text):
            text = int(text)
        if isinstance(text, bool) or not isinstance(text, int) or not low <= text <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return text

    return read


def number(text: object, high: float = 1e300) -> float:
    """Read a finite number from 0 to `high`."""
    with contextlib.suppress(ValueError, OverflowError):
        value = float(text) if isinstance(text, (str, int, float)) else -1.0
        if 0 <= value <= high and not isinstance(text, bool):
            return value
    raise ValueError("a number from 0" + (f" to {high:g}" if high < 1e300 else ""))


def reader(form: str, is_good: Callable[[Any], object]) -> Callable[[Any], Any]:
    """Make a reader that takes what `is_good` is true for, as it is."""

    def read(value: Any) -> Any:
        if not is_good(value):
            raise ValueError(form)
        return value

    return read


def choice(*words: str) -> Callable[[Any], Any]:
    """Make a reader of one word of several."""
    return reader("one of " + ", ".join(words), lambda value: value in words)


def matching(pattern: str, form: str) -> Callable[[Any], Any]:
    """Make a reader of strings that match a regular expression, described by `form`."""
    return reader(form, lambda value: isinstance(value, str) and re.fullmatch(pattern, value))


line_of_text = matching(
    r"[^\x00-\x1f\x7f\ud800-\udfff]{0,1000}", "one line of UTF-8 text, at most 1000 characters"
)
text_list = reader(
    "a list of strings",
    lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
)
truth = reader("true or false", lambda value: isinstance(value, bool))
mapping = reader("an object", lambda value: isinstance(value, dict))  # its values: see later


def command_line(value: Any) -> Any:
    """Read a command: a string for sh, or a non-empty list of arguments.

    Bytes that are no UTF-8 come as surrogates (os.fsdecode) and are kept.
    """
    words = text_list([value] if isinstance(value, str) else value)
    if not words or not words[0].strip():
        raise ValueError("a command; it is empty")
    if any(re.search(r"[\0\ud800-\udc7f\udd00-\udfff]", word) for word in words):
        raise ValueError("a command without NUL bytes and lone surrogates")
    if words is value and words[0].startswith("-"):
        raise ValueError(f"a command that does not begin with '-': write ./{words[0]}")
    return value


def task_ids(value: object) -> list[range]:
    """Read ids: 3, "3", "3,5-9" or a list of such; as ranges, in that order, none twice."""
    found: list[range] = []
    taken: list[int] = []  # sorted: the first id of a range, the one after its last, ...
    for item in value if isinstance(value, (list, tuple)) else [value]:
        for word in str(item).split(","):
            match = re.fullmatch(r"\s*([0-9]{1,18})(?:-([0-9]{1,18}))?\s*", word)
            first, end = (int(match[1]), int(match[2] or match[1]) + 1) if match else (1, 0)
            if isinstance(item, bool) or first >= end:
                raise ValueError("task ids: 3 or 3,5-9")
            low, high = bisect.bisect_left(taken, first), bisect.bisect_right(taken, end)
            before, after = [first][low % 2 :], [end][high % 2 :]
            edges = [*before, *taken[low:high], *after]  # of the gaps that this range fills
            taken[low:high] = before + after
            for start, stop in zip(edges[::2], edges[1::2]):
                if found and found[-1].stop == start:
                    start = found.pop().start
                found += [range(start, stop)] if start < stop else []
    return found


def dependencies(value: object) -> list[tuple[int, str]]:
    """Read what a task comes after, "3,4:any,7-9" or a list: [(3, "ok"), (4, "any"), ...]."""
    found: dict[int, str] = {}
    for item in value if isinstance(value, (list, tuple)) else [value]:
        for word in str(item).split(","):
            ids, _, need = word.strip().partition(":")
            need, ranges = need or "ok", task_ids(ids)
            if len(found) + sum(map(len, ranges)) > DEPENDENCIES_MAX:
                raise ValueError(f"at most {DEPENDENCIES_MAX} task ids")
            for task_id in (task_id for ids in ranges for task_id in ids):
                if need not in NEEDS or found.setdefault(task_id, need) != need:
                    raise ValueError("task ids, each once, with :ok, :fail or :any: 3,4:any,7-9")
    return list(found.items())


def environment(value: Any) -> Any:
    """Read an object of strings."""
    try:
        for name, text in mapping(value).items():
            if not name or "=" in name or b"\0" in os.fsencode(name + text):
                raise ValueError
    except (TypeError, ValueError):
        raise ValueError("an object of names and strings that can be encoded") from None
    return value


class Probe(Value):
    """How to learn whether a process is ready, or still lives; times are seconds."""

    kind: str  # tcp, http, command: it is asked; notify: it says so itself (sd_notify(3))
    target: Any  # "HOST:PORT", a URL, a command; of notify: True
    interval: float  # between two questions
    timeout: float  # for an answer; of a live notify: between two WATCHDOG=1
    within: float  # ready: the longest start
    failures: int  # live: so many in a row are taken as hung


_PORT = r":(?=.)[0-9]*(\{instance(\+[0-9]{1,9})?\})?[0-9]*"
_HOST = r"(\[[^\s/]+\]|[^\s/:?#]+)"
PROBES: dict[str, Callable[[Any], Any]] = {
    "tcp": matching(_HOST + _PORT, '"HOST:PORT"'),
    "http": matching(rf"http://{_HOST}({_PORT})?(/\S*)?", '"http://HOST:PORT/PATH"'),
    "command": command_line,
    "notify": truth,
}


def probe(interval_s: float) -> Callable[[object], Probe]:
    """Make a reader of {tcp = "HOST:PORT"} and the like, asked every `interval_s`."""
    times: dict[str, Callable[[Any], Any]] = {"failures": integer(1, 1000)}
    times.update(dict.fromkeys(("interval", "timeout", "within"), interval))
    form = "a table with one of " + ", ".join(PROBES) + "; and perhaps " + ", ".join(times)

    def read(value: object) -> Probe:
        given = dict(value) if isinstance(value, dict) else {}
        named = [kind for kind in PROBES if given.get(kind)]
        if len(named) != 1 or not given.keys() <= {*named, *times}:
            raise ValueError(form)
        found = Probe(kind=named[0], interval=interval_s, timeout=5.0, within=60.0, failures=3)
        try:
            found.target = PROBES[found.kind](given.pop(found.kind))
            for name, item in given.items():
                setattr(found, name, times[name](item))
        except ValueError as error:
            raise ValueError(f"{form}; there: {error}") from None
        return found

    return read


def timestamp(epoch: float) -> str:
    """Write a time as 2025-01-15T10:30:00.000Z."""
    milliseconds = int(epoch * 1000)
    text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(milliseconds // 1000))
    return f"{text}.{milliseconds % 1000:03d}Z"


def span(seconds: float) -> str:
    """Write a length of time for people: 850ms, 12s, 3m 5s, 2h 10m, 4d 3h."""
    if seconds < 1:
        return f"{max(seconds, 0.0) * 1000:.0f}ms"
    left = int(seconds)
    parts: list[str] = []
    for unit in ("d", "h", "m", "s"):
        count, left = divmod(left, int(_UNITS[unit]))
        if count or parts:
            parts.append(f"{count}{unit}")
    return " ".join(parts[:2])


def printable(text: str) -> str:
    """Escape what could move a terminal's cursor or reverse its text (CWE-150)."""
    if all(map(str.isprintable, text.split("\n"))):
        return text  # as nearly always; to compile the expression takes a while
    bidi = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
    unsafe = f"[\x00-\x08\x0b-\x1f\x7f-\x9f{bidi}\ud800-\udfff]"
    return re.sub(unsafe, lambda match: ascii(match[0])[1:-1], text)


# Policy: what an attempt's end means for its task.


def outcome_of(result: Result, wish: Outcome | None) -> Outcome | None:
    """Decide how an attempt ended; None: it never ran and does not count.

    A wish decides unless the command succeeded all the same: any other end, also a status
    of the program's own choice, came from our signal as far as anybody can tell.
    """
    if wish is not None and result.exit_code != 0:
        return wish
    if result.never_ran:
        return None
    if result.is_interrupted:
        return Outcome.INTERRUPTED
    if result.reason is not None:
        return Outcome.NOT_STARTED
    if result.exit_code is None:
        return Outcome.LOST
    return {0: Outcome.OK, 75: Outcome.DEFERRED}.get(result.exit_code, Outcome.FAILED)


def backoff(count: int, first_s: float, most_s: float, jitter: float = 1.0) -> float:
    """Return the delay before try `count` (from 1): doubling, capped, times `jitter`."""
    return min(most_s, first_s * 2.0 ** min(count - 1, 50)) * jitter


def is_passing(reason: str | None) -> bool:
    """Tell whether a start failed for want of something that comes back."""
    names = ("EAGAIN", "ENOMEM", "ENOSPC", "EDQUOT", "EMFILE", "ENFILE")
    return (reason or "").startswith(tuple(f"spawn:{name} " for name in names))


def next_state(task: Task, outcome: Outcome, jitter: float) -> tuple[State, float]:
    """Decide what an attempt, counted already, makes of its task: (state, delay in seconds)."""
    if outcome in (Outcome.OK, Outcome.CANCELLED):
        return (State.SUCCEEDED if outcome == Outcome.OK else State.CANCELLED), 0.0
    if outcome == Outcome.INTERRUPTED:
        return State.QUEUED, 0.0
    if outcome == Outcome.LOST and task.on_lost == "retry" and task.losses < LOST_MAX:
        return State.QUEUED, 0.0
    if outcome == Outcome.DEFERRED and task.deferrals < DEFERRALS_MAX:
        return State.SCHEDULED, backoff(task.deferrals, DEFER_S, DEFER_MAX_S)
    if outcome == Outcome.NOT_STARTED and is_passing(task.reason):
        return State.SCHEDULED, backoff(task.deferrals, BACKOFF_S, DEFER_S)
    if outcome in (Outcome.FAILED, Outcome.TIMEOUT) and task.failures <= task.retries:
        return State.SCHEDULED, backoff(task.failures, BACKOFF_S, BACKOFF_MAX_S, jitter)
    return State.FAILED, 0.0


# ============================================================================
# 4. PLATFORM - the only place that asks which system this is
#    Uses 1-3. Any thread; holds no state. One class a system, the same method names.
# ============================================================================

if sys.platform == "win32":
    import ctypes
    import msvcrt
    from ctypes import wintypes

    _KERNEL = ctypes.WinDLL("kernel32", use_last_error=True)
    _KERNEL.OpenProcess.restype = _KERNEL.CreateJobObjectW.restype = wintypes.HANDLE

    class _Platform:
        """Windows: loopback TCP, job objects, byte locks. The methods: see the other class."""

        SHELL = ("cmd.exe", "/d", "/s", "/c")
        SIGNALS = ("SIGINT", "SIGTERM", "SIGBREAK")
        REPLACE_S = 2.0  # a file that somebody reads just now cannot be replaced or removed
        DETACHED: Mapping[str, Any] = {"creationflags": 0x200 | 0x8}
        # CREATE_NEW_PROCESS_GROUP | DETACHED_PROCESS; the keeper leaves its parent's job as well
        KEEPER = ({"creationflags": 0x01000208}, {"creationflags": 0x208})
        is_posix = False
        kill = signal.SIGTERM

        def __init__(self) -> None:
            self._jobs: dict[int, tuple[Any, int]] = {}  # of the keeper's children, by PID
            self._ended: queue.SimpleQueue[int] = queue.SimpleQueue()

        usage = staticmethod(lambda sessions: {})
        own_memory = staticmethod(lambda: None)
        find_runs = staticmethod(lambda runs, folder: ([], True))
        kill_run = staticmethod(lambda pid, run_id: None)
        environment_of = staticmethod(lambda pid: {})

        def spawn(self, word: Mapping[str, Any], log_fd: int, on_end: Callable[[], object]) -> int:
            os.lseek(log_fd, 0, os.SEEK_END)  # the process knows nothing of O_APPEND
            process = subprocess.Popen(
                word["argv"], stdin=subprocess.DEVNULL, stdout=log_fd, stderr=log_fd,
                cwd=word["cwd"], env=word["env"], creationflags=0x200 | 0x08000000 | 0x4,
            )  # fmt: skip
            # CREATE_NEW_PROCESS_GROUP | CREATE_NO_WINDOW | CREATE_SUSPENDED: the job comes first
            job = _KERNEL.CreateJobObjectW(None, None)
            limits = ctypes.create_string_buffer(144)  # JOBOBJECT_EXTENDED_LIMIT_INFORMATION
            struct.pack_into("<I", limits, 16, 0x2000)  # LimitFlags: KILL_ON_JOB_CLOSE
            _KERNEL.SetInformationJobObject(wintypes.HANDLE(job), 9, limits, 144)
            handle = wintypes.HANDLE(int(process._handle))  # type: ignore[attr-defined]
            _KERNEL.AssignProcessToJobObject(wintypes.HANDLE(job), handle)
            self._jobs[process.pid] = process, int(job)

            def wait() -> None:
                process.wait()
                self._ended.put(process.pid)
                on_end()

            try:
                threading.Thread(target=wait, name=f"wait-{process.pid}", daemon=True).start()
            except RuntimeError:
                process.kill()
                raise OSError(errno.EAGAIN, "no thread to wait for it", word["argv"][0]) from None
            ctypes.WinDLL("ntdll").NtResumeProcess(handle)
            return process.pid

        def reap(self, before: Callable[[int], object]) -> Iterator[tuple[int, dict[str, Any]]]:
            with contextlib.suppress(queue.Empty):
                while True:
                    pid = self._ended.get_nowait()
                    process, job = self._jobs.pop(pid)
                    _KERNEL.CloseHandle(wintypes.HANDLE(job))  # what is left of it dies
                    yield pid, {"code": process.returncode}

        def signal_group(self, group: int, signum: int) -> None:
            if group in self._jobs:  # there is no gentle way that every program understands
                _KERNEL.TerminateJobObject(wintypes.HANDLE(self._jobs[group][1]), 1)

        def lock(self, fd: int, shared: bool = False) -> bool:
            place = os.lseek(fd, 0, os.SEEK_CUR)
            os.lseek(fd, 1 << 30, os.SEEK_SET)  # a locked byte keeps readers off: a far one
            try:
                msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
            except OSError:
                return False
            finally:
                os.lseek(fd, place, os.SEEK_SET)
            return True

        def start_time(self, pid: int) -> str | None:
            handle = wintypes.HANDLE(_KERNEL.OpenProcess(0x1000, False, pid))
            code, times = wintypes.DWORD(), (wintypes.FILETIME * 4)()
            try:  # 259: STILL_ACTIVE
                _KERNEL.GetExitCodeProcess(handle, ctypes.byref(code))
                if code.value != 259 or not _KERNEL.GetProcessTimes(
                    handle, *(ctypes.byref(time) for time in times)
                ):
                    return None
                return f"{times[0].dwHighDateTime}.{times[0].dwLowDateTime}"
            finally:
                _KERNEL.CloseHandle(handle)

        def send(self, pid: int, signum: int) -> None:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGTERM)  # TerminateProcess, whatever the number

        def listen(self, path: str) -> tuple[socket.socket, dict[str, Any]]:
            listener = socket.create_server(("127.0.0.1", 0), backlog=128)
            return listener, {"port": listener.getsockname()[1], "token": os.urandom(32).hex()}

        def connect(self, folder: str, told: Mapping[str, Any], timeout_s: float) -> socket.socket:
            return socket.create_connection(("127.0.0.1", int(told["port"])), timeout_s)

        boot_id = staticmethod(lambda: "")
        user = staticmethod(lambda: 0)
        name_of = staticmethod(lambda uid: os.environ.get("USERNAME", "user"))
        highest_limit = staticmethod(lambda name: INTEGER_MAX)
        peer_uid = staticmethod(lambda connection: None)  # the token decides
        distrust = staticmethod(lambda info, root_too=True: None)
        is_root = staticmethod(lambda: False)
        notify = change_limits = become = staticmethod(lambda *args: None)
        blocked_signals = contextlib.nullcontext
        take_sockets = dict[str, socket.socket]
        can_fork = staticmethod(lambda: False)
        collapse = staticmethod(lambda fd, size: False)
        reap_orphans = staticmethod(lambda known: None)
        place_socket = staticmethod(lambda folder, path, is_closed=False: path)

        @property
        def detach(self) -> Any:
            raise DaemonError("NOT_SUPPORTED", "Windows has no fork", "use --mode spawn")

        def identity(self, user: str | None, group: str | None) -> tuple[Any, dict[str, str]]:
            raise ValueError("left out: on Windows all run as the daemon's own user")

        def bind_notify(self, path: str, owner: int | None) -> tuple[socket.socket, str]:
            raise DaemonError("NOT_SUPPORTED", "no Unix sockets: no notify", "use tcp or http")

        def network_file_system(self, path: str) -> str | None:
            return "a network share" if path.startswith("\\\\") else None

        def open_notifier(self) -> Any:
            raise OSError(errno.ENOSYS, "this system cannot")

else:
    import fcntl

    _HAS_PROC = os.path.exists("/proc/self/stat")
    _FORMER_LIMITS: dict[int, tuple[int, int]] = {}  # those that this process has changed

    class _Children:
        """What a keeper does with its children, and what is known of them."""

        def signal_group(self, group: int, signum: int) -> None:
            """Signal a process group; CONT follows, or a stopped one would not hear it."""
            if group > 1:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(group, signum)
                    os.killpg(group, signal.SIGCONT)

        def find_runs(
            self, runs: Mapping[str, int], folder: str
        ) -> tuple[Sequence[tuple[str, int]], bool]:
            """Return ([(run id, PID)] of all that carries one of these ids, whether that is sure).

            runs: {run id: the user it was started as}. What carries another state folder than
            `folder`, one that exists, belongs to another project. Not sure: a process in the
            midst of execve(2) shows no environment; look again. (Linux; else none, sure)
            """
            found, is_sure, users = [], True, set(runs.values())
            try:
                names = _list_processes()
            except OSError:
                return [], False
            for name in names:
                try:
                    user = os.stat(f"/proc/{name}").st_uid
                    env = _environment(name) if user in users else {}
                    is_sure = is_sure and env is not None
                    run = (env or {}).get("APEX_RUN_ID", "")
                    if env and runs.get(run) == user:
                        theirs = env.get("APEX_STATE_DIR", folder)
                        if theirs == folder or not os.path.isdir(theirs):
                            found.append((run, int(name)))
                except OSError as error:  # it has gone, unless we cannot look
                    is_sure = is_sure and error.errno not in SHORTAGES
            return found, is_sure

        def kill_run(self, pid: int, run_id: str) -> None:
            """SIGKILL a process if it, not another of its number, carries this run id."""
            with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
                send: Callable[[int], object] = functools.partial(os.kill, pid)
                if sys.platform == "linux" and hasattr(os, "pidfd_open"):
                    with contextlib.suppress(OSError):  # Linux before 5.3
                        fd = os.pidfd_open(pid)
                        stack.callback(os.close, fd)
                        send = functools.partial(signal.pidfd_send_signal, fd)
                if self.environment_of(pid).get("APEX_RUN_ID") == run_id:
                    send(signal.SIGKILL)

        def environment_of(self, pid: int) -> dict[str, str]:
            """Return the environment a process was started with, {} when it cannot be read."""
            with contextlib.suppress(OSError):
                return _environment(pid) or {}
            return {}

        def spawn(self, word: Mapping[str, Any], log_fd: int, on_end: Callable[[], object]) -> int:
            """Start a child of the keeper, leader of a session of its own; return its PID.

            word: `start` of the keeper's protocol. Raises OSError; `filename` is the program,
            the folder, or the step that failed. (`on_end` is of Windows: here SIGCHLD tells.)
            """
            is_special = word.get("limits") or word.get("nice") or word.get("ids")
            if sys.platform == "linux" and not is_special:  # 0.1 ms less than Popen
                return _spawn_child(word, log_fd)
            reader, writer = os.pipe()
            try:
                process = subprocess.Popen(
                    word["argv"], stdin=subprocess.DEVNULL, stdout=log_fd, stderr=log_fd,
                    env=word["env"], umask=word["umask"], start_new_session=True,
                    close_fds=False,  # all of the keeper's close on exec
                    preexec_fn=functools.partial(_prepare, word, writer),
                )  # fmt: skip
            except subprocess.SubprocessError:
                raise OSError(*json.loads(os.read(reader, 4096))) from None
            finally:
                os.close(reader)
                os.close(writer)
            process.returncode = 0  # `reap` collects it
            return process.pid

        def reap(self, before: Callable[[int], object]) -> Iterator[tuple[int, dict[str, Any]]]:
            """Collect the children that have ended; yield (PID, {"code" or "signal", ...}).

            before: called with the PID of each while it still holds its number, if the system
            can tell (waitid(2); macOS before Python 3.13 cannot).
            """
            with contextlib.suppress(ChildProcessError):
                for which in iter(_find_ended, 0):
                    if which > 0:
                        before(which)
                    pid, status, used = os.wait4(which, os.WNOHANG)
                    if pid == 0:
                        return
                    if which < 0:
                        before(pid)
                    code = os.waitstatus_to_exitcode(status)
                    yield pid, {
                        "signal" if code < 0 else "code": abs(code),
                        "cpu_s": round(used.ru_utime + used.ru_stime, 6),
                        "max_rss": used.ru_maxrss * (1024 if sys.platform == "linux" else 1),
                    }

        def own_memory(self) -> int | None:
            """Return the memory of this process in bytes (Linux; else None)."""
            with contextlib.suppress(OSError):
                return int(_read_stat(os.getpid())[21]) * os.sysconf("SC_PAGE_SIZE")
            return None

        def usage(self, sessions: Container[int]) -> dict[int, tuple[float, int]]:
            """Return {session: (processor seconds, also of children, bytes)} (Linux; else {})."""
            found: dict[int, tuple[float, int]] = {}
            tick, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
            for name in _list_processes():
                with contextlib.suppress(OSError):
                    fields = _read_stat(name)
                    session = int(fields[3])
                    if session and session in sessions:
                        cpu_s, memory = found.get(session, (0.0, 0))
                        cpu_s += sum(map(int, fields[11:15])) / tick
                        found[session] = (cpu_s, memory + int(fields[21]) * page)
            return found

    class _Notifier:
        """Tells what changes in folders (inotify(7)). Each method may raise OSError."""

        def __init__(self) -> None:
            import ctypes

            self._libc, self._errno = ctypes.CDLL(None, use_errno=True), ctypes.get_errno
            self.numbers: dict[str, int] = {}  # of folders by name
            self._folders: dict[int, str] = {}
            if not hasattr(self._libc, "inotify_init1"):
                raise OSError(errno.ENOSYS, "this system cannot")
            self._fd = self._check(self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))

        def fileno(self) -> int:
            return self._fd

        def _check(self, result: int) -> int:
            if result < 0:
                raise OSError(self._errno(), os.strerror(self._errno()))
            return result

        def add(self, path: str, folder: str) -> None:
            """Tell of a folder by this name, "" for the root."""
            # IN_ONLYDIR | IN_EXCL_UNLINK | all but ACCESS, OPEN, CLOSE_NOWRITE; IN_DONT_FOLLOW
            mask = 0x05000FCE | (0x02000000 if folder else 0)
            number = self._check(self._libc.inotify_add_watch(self._fd, os.fsencode(path), mask))
            self._folders[number], self.numbers[folder] = folder, number

        def remove(self, folder: str) -> None:
            """Tell of this folder no more, unless it has another name by now."""
            number = self.numbers.pop(folder, -1)
            if self._folders.get(number) == folder:
                del self._folders[number]
                self._libc.inotify_rm_watch(self._fd, number)

        def read(self) -> Iterator[tuple[str, str, str]]:
            """Yield (folder, name in it, "folder", "written" or ""); ("", "", "gap"): any."""
            data, at = b"", 0
            with contextlib.suppress(BlockingIOError):
                data = os.read(self._fd, 1 << 20)  # mostly all that the queue takes
            while at < len(data):
                number, mask, _, length = struct.unpack_from("iIII", data, at)
                name = os.fsdecode(data[at + 16 : at + 16 + length].rstrip(b"\0"))
                at += 16 + length
                folder = self._folders.get(number)
                if mask & 0x8000 and folder is not None:  # IN_IGNORED: the folder is gone
                    del self._folders[number]
                    if self.numbers.get(folder) == number:
                        del self.numbers[folder]
                if mask & 0x6000 or (mask & 0x8800 and folder == ""):
                    yield "", "", "gap"  # IN_Q_OVERFLOW, IN_UNMOUNT; IN_MOVE_SELF of the root
                elif name and folder is not None:  # IN_ISDIR, IN_MODIFY
                    yield folder, name, "folder" if mask >> 30 else "written" if mask & 2 else ""

        def close(self) -> None:
            os.close(self._fd)

    class _Platform(_Children):
        """POSIX: Unix sockets, flock, sessions and process groups, /bin/sh."""

        SHELL = ("/bin/sh", "-c")
        REPLACE_S = 0.0
        SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGCHLD")
        DETACHED: Mapping[str, Any] = {"start_new_session": True}
        KEEPER: tuple[Mapping[str, Any], ...] = (DETACHED,)
        is_posix = True
        kill = signal.SIGKILL
        is_root = staticmethod(lambda: os.geteuid() == 0)

        def lock(self, fd: int, shared: bool = False) -> bool:
            """Lock an open file; False when another has it. (flock(2), msvcrt.locking)

            The lock belongs to the open file description: a child that inherits the
            descriptor holds it too, and reading the file elsewhere does not drop it.
            """
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                return True
            return False

        @staticmethod
        @functools.lru_cache(maxsize=1)
        def boot_id() -> str:
            """Name this boot of the system: PIDs mean something within it only."""
            try:
                with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
                    return file.read().strip()
            except OSError:
                return _output("sysctl", "-n", "kern.boottime") or ""

        def start_time(self, pid: int) -> str | None:
            """Return when a process began, in the system's units; None: it is gone or a zombie.

            With PID and boot id it is an identity. (proc(5) stat field 22, GetProcessTimes)
            """
            if not _HAS_PROC:
                return _output("ps", "-o", "lstart=", "-p", str(pid))
            with contextlib.suppress(OSError):
                fields = _read_stat(pid)
                return None if fields[0] in b"ZX" else fields[19].decode()
            return None

        def send(self, pid: int, signum: int) -> None:
            """Signal one process, if it is there."""
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)

        def identity(self, user: str | None, group: str | None) -> tuple[Any, dict[str, str]]:
            """Return ({"uid", "gid", "groups"}, environment) of a child that acts as they say.

            Raises ValueError: there is no such, or only root may become it.
            """
            try:
                account = pwd.getpwnam(user) if user else pwd.getpwuid(os.geteuid())
                gid = grp.getgrnam(group).gr_gid if group else account.pw_gid
            except KeyError:
                raise ValueError("one that this system knows") from None
            if os.geteuid() == 0:
                groups = os.getgrouplist(account.pw_name, gid)
                names = dict.fromkeys(("USER", "LOGNAME"), account.pw_name)
                env = {**names, "HOME": account.pw_dir, "SHELL": account.pw_shell}
                return {"uid": account.pw_uid, "gid": gid, "groups": groups}, env
            if account.pw_uid != os.geteuid() or (group and gid != os.getegid()):
                raise ValueError("our own: only root can become another")
            return {}, {}

        def become(self, ids: Mapping[str, Any]) -> None:
            """Become another user, with its groups alone, for good. Raises OSError."""
            os.setgroups(ids["groups"])
            os.setgid(ids["gid"])
            os.setuid(ids["uid"])
            with contextlib.suppress(PermissionError):
                if ids["uid"]:
                    os.setuid(0)
                    raise OSError(errno.EINVAL, "there is a way back to root")

        def can_fork(self) -> bool:
            """Tell whether forking is safe here: Linux, one thread."""
            return sys.platform == "linux" and threading.active_count() == 1

        def detach(self) -> None:
            """Leave session and parent, in a child that is about to become a daemon (daemon(7))."""
            os.setsid()
            if os.fork():
                os._exit(0)

        def notify(self, address: str, text: str) -> None:
            """Tell a service manager something, if it listens (sd_notify(3)); never waits."""
            if address[:1] == "@":  # an abstract one
                address = "\0" + address[1:]
            kind = socket.AF_UNIX, socket.SOCK_DGRAM
            # Nobody listens, or there is no descriptor left.
            with contextlib.suppress(OSError), socket.socket(*kind) as mouth:
                mouth.setblocking(False)
                mouth.sendto(text.encode(), address)

        @contextlib.contextmanager
        def blocked_signals(self) -> Iterator[None]:
            """Keep signals pending; a program that is started meanwhile begins so, too."""
            former = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            try:
                yield
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, former)

        def change_limits(self, pid: int = 0) -> None:
            """Take all descriptors there are, and dump no core: it would hold secrets (Linux).

            pid: give that keeper, and so all that it starts, what we were started with.
            """
            if sys.platform == "linux":
                for which in (resource.RLIMIT_NOFILE, resource.RLIMIT_CORE):
                    former = _FORMER_LIMITS.setdefault(which, resource.getrlimit(which))
                    most = former[1] if which == resource.RLIMIT_NOFILE else 0
                    with contextlib.suppress(OSError):  # it has gone
                        resource.prlimit(pid, which, former if pid else (most, former[1]))

        def take_sockets(self) -> dict[str, socket.socket]:
            """Return the sockets that a service manager hands us, by name (sd_listen_fds(3))."""
            told, taken = os.environ.get("LISTEN_PID"), dict[str, socket.socket]()
            with contextlib.suppress(OSError, ValueError):
                count = int(os.environ.get("LISTEN_FDS", "")) if told == str(os.getpid()) else 0
                names = os.environ.get("LISTEN_FDNAMES", "").split(":")
                for fd, name in zip(range(3, 3 + count), names):
                    handed = socket.socket(fileno=fd)
                    handed.set_inheritable(False)
                    if handed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                        taken[name] = handed
            return taken

        def bind_notify(self, path: str, owner: int | None) -> tuple[socket.socket, str]:
            """Bind a datagram socket that children, of the user `owner`, can reach.

            Return it and its path: `path`, or one in a folder outside when that is too long or
            closed to `owner`.
            """
            is_other = owner not in (None, os.geteuid())
            path = self.place_socket(os.path.dirname(os.path.dirname(path)), path, is_other)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)  # a dead daemon's: we hold the lock
            bound = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            bound.bind(path)
            os.chmod(path, 0o600)  # whatever daemon.umask is
            if is_other:
                os.chown(path, owner or 0, -1)
            return bound, path

        def place_socket(self, folder: str, path: str, is_closed: bool = False) -> str:
            """Return where a socket can be reached by everybody: `path`, or outside `folder`."""
            if is_closed or len(os.fsencode(path)) > SOCKET_PATH_MAX_BYTES:
                return os.path.join(_outer_folder(folder), os.path.basename(path))
            return path

        def listen(self, path: str) -> tuple[socket.socket, dict[str, Any]]:
            """Listen at a path, however long; return the socket, and what a file beside it says."""
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)  # a dead process's
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            with _short_path(path) as name:
                listener.bind(name)
                os.chmod(name, 0o600)  # whatever daemon.umask is
            listener.listen(128)
            return listener, {"socket": os.path.basename(path)}

        def connect(self, folder: str, told: Mapping[str, Any], timeout_s: float) -> socket.socket:
            """Connect to the socket that a file in `folder` tells of. Raises OSError."""
            path = os.path.join(folder, told["socket"])
            with contextlib.ExitStack() as stack, _short_path(path) as name:
                connection = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                connection.settimeout(timeout_s)
                connection.connect(name)
                if self.peer_uid(connection):  # root's may be a service manager's socket
                    raise PermissionError(errno.EPERM, "another user answers", path)
                stack.pop_all()
            return connection

        open_notifier = _Notifier
        user = staticmethod(os.geteuid)  # whom our children are started as

        def highest_limit(self, name: str) -> int:
            """Return how high a limit of setrlimit(2) can be set here."""
            which = getattr(resource, name)
            soft, hard = resource.getrlimit(which)
            if hard != resource.RLIM_INFINITY:
                try:
                    resource.setrlimit(which, (soft, hard + 1))  # if we may, we may always
                    resource.setrlimit(which, (soft, hard))
                except (ValueError, OSError):
                    return hard
            return INTEGER_MAX

        def peer_uid(self, connection: socket.socket) -> int | None:
            """Return a peer's user when it is not our own, else None (SO_PEERCRED, unix(7))."""
            if sys.platform == "linux":
                data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
                uid = struct.unpack("3i", data)[1]
            else:  # macOS: LOCAL_PEERCRED of sys/un.h, struct xucred
                uid = struct.unpack_from("II", connection.getsockopt(0, 1, 76))[1]
            return None if uid == os.geteuid() else int(uid)

        def name_of(self, uid: int) -> str:
            """Return a user's name; of one without a name the number, as sudo(8) takes it."""
            with contextlib.suppress(KeyError):
                return pwd.getpwuid(uid).pw_name
            return f"#{uid}"

        def distrust(self, info: os.stat_result, root_too: bool = True) -> str | None:
            """Name who else can write a file, but for root: a user, "others", None: nobody."""
            if info.st_uid != os.geteuid() and (info.st_uid or not root_too):
                return self.name_of(info.st_uid)
            return "others" if info.st_mode & 0o022 else None

        def network_file_system(self, path: str, table: str = "/proc/self/mountinfo") -> str | None:
            """Name the network file system `path` lies on: WAL is not safe there."""
            best, kind = "", ""
            with contextlib.suppress(OSError), open(table, encoding="utf-8") as file:
                for line in file:
                    mount, _, rest = line.partition(" - ")
                    point = mount.split()[4].replace("\\040", " ")
                    is_inside = (path + "/").startswith(point.rstrip("/") + "/")
                    if is_inside and len(point) >= len(best):
                        best, kind = point, rest.split()[0]
            return kind if kind in NETWORK_FILE_SYSTEMS else None

        def collapse(self, fd: int, size: int) -> bool:
            """Cut `size` bytes, whole blocks, off a file's head in place; False: cannot."""
            import ctypes

            call = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
            zero, length = ctypes.c_longlong(0), ctypes.c_longlong(size)
            # 8: FALLOC_FL_COLLAPSE_RANGE of ext4 and XFS
            return call is not None and bool(call(fd, 8, zero, length) == 0)

        def reap_orphans(self, known: Callable[[int], bool]) -> None:
            """Collect what a container's processes left to us as PID 1; never a known child."""
            with contextlib.suppress(ChildProcessError):
                for pid in iter(_find_ended, 0):
                    if pid < 0 or known(pid):
                        return
                    os.waitpid(pid, os.WNOHANG)

    def _find_ended() -> int:
        """Return the PID of a child that has ended and still holds its number; 0: none has.

        -1: the system cannot tell (macOS before Python 3.13). Raises ChildProcessError.
        """
        waitid: Any = getattr(os, "waitid", None)
        if waitid is None:
            return -1
        peek = waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        return peek.si_pid if peek else 0

    def _list_processes() -> list[str]:
        """Return the PIDs of all processes (Linux; else none)."""
        return [name for name in os.listdir("/proc") if name.isdigit()] if _HAS_PROC else []

    def _read_stat(pid: int | str) -> list[bytes]:
        """Return the fields of /proc/PID/stat from the third of proc(5) on."""
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()

    def _environment(pid: int | str) -> dict[str, str] | None:
        """Return a process's environment; None: it is in the midst of execve(2) and shows none."""
        with open(f"/proc/{pid}/environ", "rb") as file:
            data = file.read()
        if not data:
            fields = _read_stat(pid)
            is_kernels = int(fields[6]) & 0x200000  # PF_KTHREAD
            is_loaded = fields[23] != b"0"  # startcode, set after all that concerns us here
            was_given_none = is_loaded and fields[47] == fields[48]  # env_start, env_end
            return {} if fields[0] in b"ZX" or is_kernels or was_given_none else None
        pairs = (item.partition("=") for item in os.fsdecode(data).split("\0"))
        return {name: value for name, _, value in pairs if name}

    def _spawn_child(word: Mapping[str, Any], log_fd: int) -> int:
        """Start a child with posix_spawn(3), from its own folder and with its umask."""
        program, env = word["argv"][0], word["env"]
        os.chdir(word["cwd"])
        umask = os.umask(word["umask"])
        try:
            places = [program] if "/" in program else [
                os.path.join(folder, program) for folder in os.get_exec_path(env)
            ]  # fmt: skip
            fit = (x for x in places if os.path.isfile(x) and os.access(x, os.X_OK))
            place = next(fit, places[0])
            files = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)]
            files += [(os.POSIX_SPAWN_DUP2, log_fd, fd) for fd in (1, 2)]  # type: ignore[misc]
            default = (signal.SIGPIPE, signal.SIGXFSZ)  # Python ignores them
            return os.posix_spawn(
                place, word["argv"], env, file_actions=files, setsid=True, setsigdef=default
            )
        except FileNotFoundError as error:
            error.filename = program
            raise
        finally:
            os.umask(umask)
            os.chdir("/")

    def _prepare(word: Mapping[str, Any], writer: int) -> None:
        """Become what a child is to be: with its folder, limits, niceness and user.

        As root whatever needs root, then never again. A step that fails is told to `writer` as
        (errno, text, step): Popen tells only that one did. The keeper has no other threads.
        """
        step = ""
        try:
            for step, (soft, hard) in word.get("limits", {}).items():
                resource.setrlimit(getattr(resource, step), (soft, hard))
            step = "nice"
            os.nice(word.get("nice", 0))
            ids = word.get("ids")
            if ids:
                step = "user"
                Platform.become(ids)
            failpoint("fork", os.getppid())
            step = word["cwd"]
            os.chdir(step)
        except BaseException as error:
            failure = getattr(error, "errno", None) or errno.EPERM
            text = getattr(error, "strerror", None) or str(error)
            os.write(writer, json.dumps([failure, text, step]).encode())
            raise

    def _outer_folder(state_folder: str) -> str:
        """Make, or find again, a folder of ours for sockets that cannot be in the state folder."""
        info = os.stat(state_folder)
        base = "/run" if os.geteuid() == 0 and os.path.isdir("/run") else "/tmp"
        folder = f"{base}/apexd-{info.st_dev:x}-{info.st_ino:x}"
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        found = os.lstat(folder)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, "is no folder of ours", folder)
        os.chmod(folder, 0o711)
        return folder

    @contextlib.contextmanager
    def _short_path(path: str) -> Iterator[str]:
        """Give a name of a socket that fits into sun_path (unix(7)), through proc(5) or a link."""
        folder, name = os.path.split(path)
        is_long = len(os.fsencode(path)) > SOCKET_PATH_MAX_BYTES
        with contextlib.ExitStack() as stack:
            if is_long and _HAS_PROC:
                fd = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, fd)
                path = f"/proc/self/fd/{fd}/{name}"
            elif is_long:
                temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="apexd-"))
                os.symlink(folder, f"{temporary}/x")
                path = f"{temporary}/x/{name}"
            yield path

    def _output(*argv: str) -> str | None:
        """Return what a command of the system prints, None when that is nothing."""
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        return done.stdout.strip() or None


Platform = _Platform()

_PASSED: list[str] = []


def failpoint(name: str, pid: int = 0) -> None:
    """Kill this process (or `pid`) when APEXD_FAILPOINT says "NAME" or "NAME:N", the Nth time;
    with "NAME:N:hang" this thread goes no further."""
    wanted, count, what = (os.environ.get("APEXD_FAILPOINT", "") + "::").split(":")[:3]
    if wanted == name:
        _PASSED.append(name)
        if len(_PASSED) >= int(count or 1):
            if what:
                threading.Event().wait()
            Platform.send(pid or os.getpid(), Platform.kill)


def reset_signals() -> None:
    """Take back what the caller ignored or blocked, or children would inherit it."""
    for ignored in signal.valid_signals() - {getattr(signal, "SIGPIPE", 0)}:
        if signal.getsignal(ignored) == signal.SIG_IGN:
            signal.signal(ignored, signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_SETMASK, [])


# ============================================================================
# 5. FILES - safe reading and replacing, the state folder, logs that lose their head
#    Uses 1-4. Any thread; holds no state.
# ============================================================================

# NONBLOCK: a FIFO in a file's place hinders nobody; it means nothing for regular files.
_O_NAMES = ("O_NOFOLLOW", "O_CLOEXEC", "O_NONBLOCK", "O_BINARY")
_O_SAFE = sum(getattr(os, name, 0) for name in _O_NAMES)


def cannot_create(path: str, error: OSError) -> DaemonError:
    """Translate a failed open or write into the error a user sees."""
    code = "PERMISSION_DENIED" if isinstance(error, PermissionError) else "CANNOT_CREATE"
    hint = "check its owner and mode, the disk's space, and that it is no symbolic link"
    return DaemonError(code, f"{path}: {error.strerror or error}", hint)


def open_file(path: str, flags: int) -> int:
    """Open a regular file, through no symbolic link, a new one for us alone.

    Raises CANNOT_CREATE or PERMISSION_DENIED.
    """
    try:
        fd: int = insist(os.open, path, flags | _O_SAFE, 0o600)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(errno.EINVAL, "not a regular file")
        return fd
    except OSError as error:
        raise cannot_create(path, error) from None


def file_id(path: str) -> tuple[int, int] | None:
    """Identify what is at a path, a link itself, by device and inode; None: nothing is."""
    try:
        info = os.lstat(path)
    except OSError:
        return None
    return info.st_dev, info.st_ino


def here() -> str:
    """Return the current folder. Raises BAD_REQUEST when it was removed."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        hint = "go to a folder that exists, or name one with --project and --dir"
        raise bad("the current folder is gone", hint) from None


def insist(act: Callable[..., Any], *args: Any) -> Any:
    """Open, replace or remove a file, even one that others use for a moment (on Windows)."""
    deadline = Clock.mono() + Platform.REPLACE_S
    while True:
        try:
            return act(*args)
        except PermissionError:
            if Clock.mono() >= deadline:
                raise
        threading.Event().wait(0.001)


def write_atomically(path: str, data: str | bytes, mode: int = 0o600) -> None:
    """Replace a file's content: readers see the old or the new one, never a part."""
    temporary = f"{path}.{os.getpid()}.new"
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _O_SAFE, mode)
        with open(fd, "wb") as file:
            file.write(data if isinstance(data, bytes) else data.encode())
        insist(os.replace, temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise cannot_create(path, error) from None


def refuse_foreign(path: str, info: os.stat_result, root_too: bool = True) -> None:
    """Raise PERMISSION_DENIED when others than us and root could have written a file."""
    who = Platform.distrust(info, root_too)
    what = f"{path} belongs to {who}"
    hint = f"act as its owner (`sudo -u {who} ...`), or name another folder with --state"
    if who == "others":
        what = f"{path} can be written by others"
        hint = "take that right from them: `chmod go-w` it"
    if who is not None:
        raise DaemonError("PERMISSION_DENIED", what, hint)


def read_file(path: str, most: int = SMALL_FILE_BYTES, trusted: bool = True) -> bytes | None:
    """Return a small file's bytes, None when it is missing; never blocks, follows no link.

    trusted: what the file says is believed, so only we and root may be able to write it.
    Raises PERMISSION_DENIED (of others, or unreadable), CANNOT_CREATE (a link, a FIFO),
    ValueError (more than `most` bytes).
    """
    try:
        with open(open_file(path, os.O_RDONLY), "rb") as file:
            if trusted:
                refuse_foreign(path, os.fstat(file.fileno()))
            data = file.read(most + 1)
    except DaemonError as error:
        if isinstance(error.__context__, FileNotFoundError):
            return None
        raise
    except OSError as error:
        raise cannot_create(path, error) from None
    if len(data) > most:
        raise ValueError(f"{path} has more than {most} bytes")
    return data


def read_json(path: str) -> dict[str, Any] | None:
    """Read a small file of ours that holds a JSON object, None when it is missing.

    Raises ValueError (damaged, or it holds what no file of ours does), and as `read_file`.
    """
    data = read_file(path)
    if data is None:
        return None
    is_flat = data.count(b"[") + data.count(b"{") < NESTED_MAX
    found = json.loads(data, parse_constant=int) if is_flat else None
    if not isinstance(found, dict) or float("inf") in found.values():
        raise ValueError("no object")
    return found


# The state folder has one door. What lies in it is believed and, as bytecode, executed: so the
# folder must be a real one, belong to the user who acts (root acts in no other's), and be
# writable by nobody else, before anything in it is opened.
#
# Who makes it also writes the launcher, `.apex/apexd`: a program for sh and for Python at once,
# since the first line of a script takes no long path of an interpreter and no space in it.

_LAUNCHER = """#!/bin/sh
# -*- coding: latin-1 -*- the command line of this project; written by apexd.py
''':'
[ -x {python} ] && exec {python} -I -S "$0" "$@"
echo {gone} >&2
exit 78
'''
import gc, os, sys
from importlib.machinery import SourceFileLoader
gc.disable()
folder = os.path.dirname(os.path.realpath(__file__))
source = os.path.normpath(os.path.join(folder, {source}))
launched_for = os.path.normpath(os.path.join(folder, {project})), folder
info, umask = os.stat(folder), os.umask(0o077)
is_ours = os.name == "nt" or (info.st_uid == os.geteuid() and not info.st_mode & 0o022)
for sys.pycache_prefix in (os.path.join(folder, "cache"), os.devnull)[not is_ours:]:
    try:
        code = SourceFileLoader("apexd", source).get_code("apexd")
        break
    except OSError:
        print("apexd: cannot read", source, file=sys.stderr)
        print("       if it has moved, run `python3 NEWPLACE/apexd.py start`", file=sys.stderr)
        sys.exit(78)
    except (EOFError, TypeError, ValueError):
        pass  # damaged bytecode: without
os.umask(umask)
sys.pycache_prefix = None
exec(code, {{"__name__": "__main__", "__file__": source, "launched_for": launched_for}})
"""


def check_state_folder(folder: str) -> bool:
    """Tell whether a state folder is there; call it before anything in it is opened.

    Raises PERMISSION_DENIED (of others, writable by others, a link), CANNOT_CREATE.
    """
    try:
        info = os.lstat(folder)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise cannot_create(folder, error) from None
    if stat.S_ISLNK(info.st_mode):
        hint = "name the folder that it points to with --state"
        raise DaemonError("PERMISSION_DENIED", f"{folder} is a symbolic link", hint)
    refuse_foreign(folder, info, root_too=False)
    return True


def make_state_folder(folder: str, project: str) -> bool:
    """Make the state folder, 0700 and ignored by git, with the launcher; tell if it is new.

    Raises CANNOT_CREATE, PERMISSION_DENIED, CONFIG_INVALID.
    """
    kind = Platform.network_file_system(os.path.realpath(os.path.dirname(folder)))
    if kind is not None:
        hint = "use --state DIR (or APEX_STATE_DIR) with a folder on a local disk"
        raise DaemonError("CONFIG_INVALID", f"{folder} is on {kind}: sqlite is unsafe there", hint)
    is_new = not check_state_folder(folder)
    try:
        for part in ("", "run", "logs", "cache"):
            os.makedirs(os.path.join(folder, part), mode=0o700, exist_ok=True)
        if Platform.is_posix and os.stat(folder).st_mode & 0o077:
            os.chmod(folder, 0o700)  # made by hand, for its configuration
    except OSError as error:
        raise cannot_create(folder, error) from None
    keep_ballast(folder)
    ignore = os.path.join(folder, ".gitignore")
    if not os.path.lexists(ignore):
        write_atomically(ignore, "*\n")
    for path, text in _launchers(folder, project):
        with contextlib.suppress(DaemonError, ValueError):  # a link, or too large: replaced
            if read_file(path) == text.encode("latin-1"):
                continue
        write_atomically(path, text.encode("latin-1"), 0o700)
    return is_new


def launcher_path(folder: str) -> str:
    """Return the program that runs this file for a state folder: `python -I -S THIS VERB`."""
    return os.path.join(folder, "apexd")


def _launchers(folder: str, project: str) -> Iterator[tuple[str, str]]:
    """Yield the launcher's path and text. What lies in the project is named relatively."""
    source, python = os.path.abspath(__file__), sys.executable or "python3"
    folder, project = os.path.realpath(folder), os.path.realpath(project)
    batch = f'@"{python}" -I -S "%~dp0apexd" %*\r\n'

    def seen(path: str) -> str:
        inner = os.path.realpath(path)
        is_inner = all(one.startswith(project + os.sep) for one in (inner + os.sep, folder))
        return ascii(os.path.relpath(inner, folder) if is_inner else path)

    def quoted(text: str) -> str:
        text = os.fsencode(text).decode("latin-1").replace("\\", "/")
        return "'" + text.replace("'", "'\"'\"'") + "'"

    gone = quoted(f"apexd: {python} is gone: run `python3 {source} start`")
    places = {"source": seen(source), "project": seen(project)}
    yield launcher_path(folder), _LAUNCHER.format(python=quoted(python), gone=gone, **places)
    if not Platform.is_posix:
        yield launcher_path(folder) + ".cmd", os.fsencode(batch).decode("latin-1")


def store_bytecode(folder: str) -> None:
    """Put the bytecode that runs now into the launcher's cache; else the launcher compiles.

    Not that of a file so new that it may be another than the one that runs.
    """
    from importlib import util

    info = os.stat(__file__)
    if not _BYTECODE or Clock.now() - max(info.st_mtime, info.st_ctime) < FRESH_S:
        return
    former, sys.pycache_prefix = sys.pycache_prefix, os.path.join(folder, "cache")
    target = util.cache_from_source(os.path.abspath(__file__))
    sys.pycache_prefix = former
    numbers = (0, int(info.st_mtime) & 0xFFFFFFFF, info.st_size & 0xFFFFFFFF)
    head = util.MAGIC_NUMBER + struct.pack("<3I", *numbers)  # PEP 552
    with contextlib.suppress(OSError):
        if not (read_file(target, USER_FILE_BYTES) or b"").startswith(head):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            write_atomically(target, head + marshal.dumps(_BYTECODE))


# A log that grows over its cap loses its head to `.1`. Offsets that users of this section
# see are logical: they count from the first byte ever written, and the side file `.base`
# keeps how many bytes are gone. On ext4 and XFS no byte is lost (copy, then collapse the
# range away); elsewhere what is written between the copy and the truncation is.


_LOG_LOCK = threading.Lock()  # between a cut and its new base a reader would be misled


def log_path(folder: str, task_id: int, number: int) -> str:
    """Return where an attempt's output goes."""
    return os.path.join(folder, "logs", f"task-{task_id}.{number}.log")


def event_path(folder: str, task_id: int) -> str:
    """Return where the paths stand that a watch's task was made for."""
    return os.path.join(folder, "logs", f"task-{task_id}.event")


def remove_logs(folder: str, tasks: Iterable[tuple[int, int]]) -> None:
    """Remove the logs of tasks, given as (id, number of attempts)."""
    for task_id, attempts in tasks:
        with contextlib.suppress(OSError):
            os.unlink(event_path(folder, task_id))
        for number in range(1, attempts + 2):  # an attempt that never ran is not counted
            for ending in ("", ".1", ".base"):
                with contextlib.suppress(OSError):
                    os.unlink(log_path(folder, task_id, number) + ending)


def log_base(path: str) -> int:
    """Return how many bytes of a log's head are gone; 0 when that cannot be told."""
    with contextlib.suppress(DaemonError, ValueError):
        return max(int((read_file(path + ".base") or b"0")[:20]), 0)
    return 0


def cap_log(path: str, most_bytes: int) -> bool:
    """Move the head of a log that is over `most_bytes` to `.1`; tell whether it was.

    A crash between copy and cut leaves the head in both. One caller at a time. On a full disk
    the head is dropped. Never raises: what is wrong with a log is warned of, once.
    """
    try:
        if not os.path.exists(path) or os.stat(path).st_size <= most_bytes:
            return False
        with os.fdopen(open_file(path, os.O_RDWR), "rb") as file, _LOG_LOCK:
            fd, block = file.fileno(), 4096
            cut = max((os.fstat(fd).st_size - most_bytes // 2) // block * block, block)
            _keep_head(file, path + ".1", cut, most_bytes)
            if os.fstat(fd).st_size < cut:
                return False  # somebody else cut it meanwhile
            if not Platform.collapse(fd, cut):
                cut = os.fstat(fd).st_size
                _keep_head(file, path + ".1", cut, most_bytes)
                os.ftruncate(fd, 0)
            write_atomically(path + ".base", str(log_base(path) + cut))
        return True
    except (OSError, DaemonError) as error:
        _complain(path, str(error))
        return False


def _keep_head(file: BinaryIO, path: str, end: int, most_bytes: int) -> None:
    """Write a log's bytes up to `end`, the last `most_bytes` of them, to a file of their own."""
    try:
        with os.fdopen(open_file(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as copy:
            data, left = b"x", min(end, most_bytes)
            file.seek(end - left)
            while data and left:  # the log may shrink meanwhile
                data = file.read(min(1 << 20, left))
                left -= copy.write(data)
    except (OSError, DaemonError) as error:
        if getattr(error.__context__ or error, "errno", 0) not in (errno.ENOSPC, errno.EDQUOT):
            raise
        with contextlib.suppress(OSError):
            os.unlink(path)
        _complain(path, str(error))


@functools.lru_cache(maxsize=1000)  # once for each log
def _complain(path: str, what: str) -> None:
    log.warning("%s: its head cannot be kept: %s", path, what)


def keep_ballast(folder: str) -> None:
    """Have a file of BALLAST_BYTES in a state folder, or give it up while the disk is full."""
    path = os.path.join(folder, "ballast")
    with contextlib.suppress(OSError, DaemonError):
        free = shutil.disk_usage(folder).free
        if free < BALLAST_BYTES:
            os.unlink(path)
        elif free > 16 * BALLAST_BYTES and not os.path.exists(path):
            with os.fdopen(open_file(path, os.O_WRONLY | os.O_CREAT), "wb") as file:
                file.write(os.urandom(BALLAST_BYTES))  # zeros may take no space


def read_log(path: str, offset: int, most: int = LOG_CHUNK_BYTES) -> tuple[bytes, int]:
    """Return (data, next offset) of a log from a logical offset on, at most `most` bytes.

    An offset of -n means the last n lines, as far as `most` bytes reach.
    """
    try:
        file = open(path, "rb")
    except FileNotFoundError:
        return b"", max(offset, 0)
    with file, _LOG_LOCK:
        base = log_base(path)
        end = file.seek(0, os.SEEK_END)
        offset = 0 if offset > base + end else offset  # another file is there now
        file.seek(max(0, end - most) if offset < 0 else max(offset - base, 0))
        data = file.read(most)
        if offset < 0:
            data = b"".join(data.splitlines(keepends=True)[offset:])
            return data, base + end
        return data, max(offset, base) + len(data)


class LogWatch:
    """Looks at the size of a log that may grow: ever more rarely while it does not."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._pause_s, self._size = LOG_CHECK_S, 0
        self.due_mono = Clock.mono() + LOG_CHECK_S

    def look(self, most_bytes: int) -> None:
        """Cap the log if need be, and say (due_mono) when to look again."""
        with contextlib.suppress(OSError, DaemonError):
            size = os.stat(self.path).st_size
            pause_s = min(2 * self._pause_s, LOG_CHECK_MAX_S)
            self._pause_s = LOG_CHECK_S if size != self._size else pause_s
            self._size = size
            cap_log(self.path, most_bytes)
        self.due_mono = Clock.mono() + self._pause_s


def cut_lines(data: bytes) -> list[bytes]:
    """Return the lines, longer ones in pieces of LINE_MAX_BYTES; the last one has no end yet."""
    return [
        line[at : at + LINE_MAX_BYTES]
        for line in data.split(b"\n")
        for at in range(0, max(len(line), 1), LINE_MAX_BYTES)
    ]


def follow_lines(
    read: Callable[..., Mapping[str, tuple[bytes, int]]], lines: int, to_end: bool
) -> Iterator[list[tuple[str, bytes]]]:
    """Yield the lines of several logs as they come, [("web.0", line), ...]; [] for none.

    read(offsets, lines) gives what is there from `offsets` on, {"web.0": (data, next offset)};
    of a log that is not in `offsets` the last `lines` lines. to_end False: once.
    """
    offsets: dict[str, int] = {}
    rests: dict[str, bytes] = {}
    while True:
        found = []
        for name, (data, following) in read(offsets, lines).items():
            offsets[name] = following
            *whole, rests[name] = cut_lines(rests.get(name, b"") + data)
            if rests[name] and not to_end:
                whole.append(rests[name])
            found += [(name, line) for line in whole]
        yield found
        if not to_end:
            return
        lines = LINES_MAX  # of a log that comes later: all


def follow_file(path: str, lines: int, to_end: bool) -> Iterator[bytes]:
    """Yield a file's last lines, then, with to_end, what comes, through its rotations.

    lines 0: from the oldest file's first byte on. With to_end b"" comes whenever there is
    nothing more, after a pause. A file is known by its inode. Rotation only ever makes a file
    older, so the ages are read from the newest on, and what was read from a name counts if the
    name is the same file then.
    """
    names = [path, *(f"{path}.{number}" for number in range(1, LOG_FILES_MAX + 1))]
    known, offset = None, -lines  # the file that is being read
    while True:
        ages = [age for age in zip(names, map(file_id, names)) if age[1]] or [(path, None)]
        at = max((n for n, (_, one) in enumerate(ages) if one == known), default=-1)
        if at < 0:  # the first look; or it is gone, and what followed it may be
            at, offset = (len(ages) - 1, 0) if known or not lines else (0, offset)
        name, known = ages[at]
        data, following = read_log(name, offset)
        if file_id(name) != known:
            continue  # rotated meanwhile
        offset = following
        if data:
            yield data
        elif at > 0:
            known, offset = ages[at - 1][1], 0
            continue
        elif to_end:
            yield b""
            threading.Event().wait(STREAM_PAUSE_S)
        if not to_end and (lines or not data):
            return


# ============================================================================
# 6. CONFIG - load, check, compare for reload
#    Uses 1-5. Read once at start and at each reload; a Config is never changed.
# ============================================================================

CONFIG_NAMES = ("config.toml", "config.json", "config.yaml")  # of which there is one
octal = matching("0?[0-7]{1,3}", 'a string of octal digits, such as "027"')
STOP_SIGNALS = ("TERM", "INT", "QUIT", "HUP", "USR1", "USR2", "KILL")


def limit(name: str, unit: int = 1, low: int = 1) -> Callable[[object], int]:
    """Make a reader of a limit of setrlimit(2), in units, that can be set here."""
    return lambda value: integer(low, Platform.highest_limit(name) // unit)(value)


# Names that children can be started as; `identity` says what is wrong with one.
listen_host = matching(r"[\w.%:-]+", "an address or a name, such as 127.0.0.1, ::1, 0.0.0.0")
user_name = reader("a user", lambda name: Platform.identity(line_of_text(name), None))
group_name = reader("a group", lambda name: Platform.identity(None, line_of_text(name)))


def paths(value: object) -> list[str]:
    """Read a path or a list of them."""
    return [line_of_text(path) for path in text_list([value] if isinstance(value, str) else value)]


change_list = reader(
    "a list of " + ", ".join(FILE_CHANGES),
    lambda value: isinstance(value, list) and {*map(str, value)} <= FILE_CHANGES.keys(),
)

# What [limits] gives to tasks, and [process.NAME] to that process.
_CHILD_LIMITS: dict[str, tuple[Callable[[Any], Any], Any, str]] = {
    "memory_mb": (limit("RLIMIT_AS", 1 << 20), None, "address space of each process"),
    "cpu_seconds": (limit("RLIMIT_CPU"), None, "processor time of each process"),
    "open_files": (limit("RLIMIT_NOFILE", 1, 3), None, "descriptors of each process"),
    "processes": (limit("RLIMIT_NPROC"), None, "processes of the user it runs as (not for root)"),
    "nice": (lambda n: integer(-20 * Platform.is_root(), 19)(n), 0, "added to the niceness"),
}

# What a task can be given, wherever it comes from.
TASK_READERS: dict[str, Callable[[Any], Any]] = {
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
EVENTS = (  # all that a hook can be for, besides custom.NAME
    "task.added task.started task.succeeded task.failed task.cancelled task.skipped task.retrying "
    "task.lost process.started process.ready process.crashed process.failed process.stopped "
    "process.hung daemon.started daemon.stopping config.reloaded cron.fired cron.skipped "
    "file.created file.modified file.deleted file.moved file.skipped"
).split()


def event_patterns(value: Any) -> Any:
    """Read patterns of types of events; each matches a known one, or could be for custom.NAME."""
    for pattern in text_list(value):
        start = re.split(r"[*?[]", pattern)[0]
        is_own = start.startswith("custom.") or (start != pattern and "custom.".startswith(start))
        if not is_own and not fnmatch.filter(EVENTS, pattern):
            near = difflib.get_close_matches(pattern, EVENTS, 1, 0.0)
            raise ValueError(f"types of events; {pattern!r} is none: did you mean {near[0]}?")
    return value


hook_url = matching(r"https?://[^\s/@?#]+([/?]\S*)?", '"https://..." or http, without a password')
variable_name = matching("[A-Za-z_][A-Za-z0-9_]{0,99}", "the name of a variable, not its value")
TRIGGER_OPTIONS: dict[str, tuple[Callable[[Any], Any], Any, str]] = {
    "command": (command_line, None, "a string for sh, or a list of arguments"),
    "enabled": (truth, True, "false: it is checked, but starts nothing"),
    "overlap": (
        choice("skip", "queue"), "skip", "while a task of it is unfinished; one waits at most"
    ),
    "cwd": (line_of_text, ".", "seen from the project"),
    "env": (environment, {}, "variables on top of the daemon's own that are kept"),
    **{
        name: (TASK_READERS[name], None, f"of its tasks, as with add --{name.replace('_', '-')}")
        for name in TASK_READERS
        if name not in ("after", "key")
    },
}

# One row an option: its reader, its default, its meaning. README and `config` follow it.
OPTIONS: dict[str, dict[str, tuple[Callable[[Any], Any], Any, str]]] = {
    "daemon": {
        "poll_interval": (interval, 5.0, "seconds between two looks at the queue"),
        "max_concurrent": (integer(1, 1000), 3, "tasks at once, all groups together"),
        "graceful_timeout": (duration, 30.0, "how long TERM lets running tasks finish"),
        "stop_timeout": (duration, 10.0, "from a task's TERM to its KILL"),
        "heartbeat_interval": (interval, 30.0, "seconds between two heartbeats"),
        "env_keep": (text_list, [], 'variables of the caller that tasks get; ["*"]: all'),
        "user": (user_name, None, "that root becomes, for good; the state folder is to be its own"),
        "group": (group_name, None, "the same, with user; null: the user's"),
        "umask": (octal, "077", "of the daemon, a string of octal digits"),
        "work_dir": (line_of_text, None, "of the daemon, seen from the project; null: .apex"),
        "stdout": (line_of_text, None, "a file for what the daemon prints; null: nowhere"),
        "stderr": (line_of_text, None, "the same, for standard error"),
        "socket": (line_of_text, None, "the control socket; null: .apex/control.sock"),
        "pid_file": (line_of_text, None, "a file for the PID alone, besides .apex/daemon.pid"),
        "on_usr2": (command_line, None, "a task that SIGUSR2 adds"),
    },
    "log": {
        "level": (choice("debug", "info", "warning", "error"), "info", "of daemon.log"),
        "format": (choice("text", "json"), "text", "of daemon.log"),
        "file": (line_of_text, None, "instead of .apex/daemon.log"),
        "max_size_mb": (number, 50.0, "of daemon.log before it is rotated"),
        "max_files": (integer(1, LOG_FILES_MAX), 5, "rotated daemon logs kept"),
        "total_mb": (number, 500.0, "all task logs together; the oldest go first"),
    },
    "retention": {
        "tasks": (integer(0), 10000, "finished tasks kept"),
        "days": (number, 30.0, "how long finished tasks are kept"),
        "max_queue": (integer(1), 1000000, "unfinished tasks the queue takes"),
    },
    "limits": {
        "timeout": (duration, 7200.0, "of a task that names none; 0: none"),
        "retries": (integer(0, 1000), 0, "of a task that names none"),
        "log_mb": (number, 50.0, "one attempt's log; its head goes to .1"),
        **_CHILD_LIMITS,
        "max_tokens": (integer(1), None, "reported tokens that end a task"),
        "max_cost": (number, None, "reported cost that ends a task"),
    },
    "health": {
        "enabled": (truth, True, "answer HTTP: health, metrics, the status page"),
        "host": (listen_host, "127.0.0.1", "the address to listen on"),
        "port": (integer(0, 65535), 0, "0: that of the last time, else any free one"),
    },
    "group": {
        "max_concurrent": (integer(1, 1000), None, "tasks of this group at once"),
        "launcher": (text_list, [], 'words put before each command: ["srun", "-n1"]'),
    },
    "process": {
        "command": (command_line, None, "a string for sh, or a list of arguments"),
        "instances": (integer(0, 1000), 1, "copies; {instance} and APEX_INSTANCE count from 0"),
        "autostart": (truth, True, "come up with the daemon"),
        "restart": (choice("always", "on-failure", "never"), "always", "after it has ended"),
        "max_restarts": (integer(0), 5, "within restart_window; more: it has failed"),
        "restart_window": (interval, 60.0, "seconds in which restarts are counted"),
        "min_uptime": (interval, 30.0, "after that an end is answered at once, and counts anew"),
        "backoff": (interval, 1.0, "before the restart after a quick end; doubles"),
        "backoff_max": (interval, 60.0, "the longest backoff"),
        "retry_failed": (interval, 300.0, "between two tries of one that has failed"),
        "stop_signal": (choice(*STOP_SIGNALS), "TERM", "asks it to end"),
        "stop_timeout": (duration, 10.0, "from that to its KILL"),
        "needs": (text_list, [], "processes that must be ready before it starts"),
        "critical": (truth, False, "the daemon ends, failed, when it has failed"),
        "ready": (probe(0.2), None, '{tcp = "HOST:PORT"}, http, command or {notify = true}'),
        "live": (probe(5.0), None, "the same; one that gives no sign of life is restarted"),
        "env": (environment, {}, "variables on top of the daemon's own that are kept"),
        "env_file": (paths, [], "files of NAME=VALUE lines, read at each start"),
        "cwd": (line_of_text, ".", "seen from the project"),
        "user": (user_name, None, "to run as (the daemon is root)"),
        "group": (group_name, None, "to run as (the daemon is root)"),
        "umask": (octal, "022", "a string of octal digits"),
        **_CHILD_LIMITS,
        "memory_restart_mb": (number, None, "restarted when all of it uses more (Linux)"),
        "log_mb": (number, 50.0, "an instance's log; its head goes to .1"),
    },
    "schedule": {
        **TRIGGER_OPTIONS,
        "cron": (line_of_text, None, 'when: "30 4 * * mon-fri", "@daily", "@every 90s", "@reboot"'),
        "timezone": (line_of_text, None, 'such as "Europe/Berlin"; local time otherwise'),
        "catch_up": (choice("none", "last", "all"), "none", "of what fell due without a daemon"),
        "catch_up_window": (duration, 86400.0, "how far back catch_up looks"),
    },
    "watch": {
        **TRIGGER_OPTIONS,
        "paths": (paths, [], "folders, seen from the project, with all that is in them"),
        "overlap": (choice("skip", "queue"), "queue", "what changes meanwhile: lost, or one more"),
        "events": (change_list, [*FILE_CHANGES], "changes that count"),
        "ignore": (text_list, [], "globs of paths that do not count, besides the usual ones"),
        "extensions": (text_list, [], 'suffixes that count, such as ".py"; none: all'),
        "debounce_ms": (integer(0, 600_000), 500, "quiet time after a burst, before its task"),
        "debounce_max": (interval, DEBOUNCE_MAX_S, "the longest that a burst is collected"),
        "poll": (truth, False, "look for changes instead of being told (folders of a host, say)"),
    },
    "hook": {
        **{name: row for name, row in TRIGGER_OPTIONS.items() if name != "overlap"},
        "group": (line_of_text, "hooks", "of its tasks; that of hooks is not in `list`"),
        "retries": (integer(0, 1000), 3, "of its tasks, as with add --retries"),
        "timeout": (duration, 30.0, "of its tasks, as with add --timeout"),
        "on": (event_patterns, [], 'types of events: ["task.failed", "process.*"]'),
        "url": (hook_url, None, "the event is sent there by POST, instead of a command"),
        "secret_env": (variable_name, None, "variable with the secret that signs what is sent"),
    },
}
TABLES = {  # kinds of which users name each one, and where a Config has them
    "group": "groups", "process": "processes", "schedule": "schedules", "watch": "watches",
    "hook": "hooks",
}  # fmt: skip
AT_START = {  # what a reload leaves to the next start
    f"daemon.{key}" for key in "user group umask work_dir stdout stderr socket pid_file".split()
}
FORMER_NAMES = {
    "maxConcurrentTasks": "daemon.max_concurrent",
    "max_parallel_actions": "daemon.max_concurrent",
    "pollIntervalMs": "daemon.poll_interval (in seconds)",
    "shutdownTimeoutMs": "daemon.graceful_timeout (in seconds)",
    "heartbeatIntervalMs": "daemon.heartbeat_interval (in seconds)",
    "taskTimeoutMs": "limits.timeout (in seconds)",
    "maxTokensPerTask": "limits.max_tokens",
    "maxCostPerTask": "limits.max_cost",
    "logLevel": "log.level",
    "action_timeout_minutes": "limits.timeout (in seconds, or as 5m)",
    "gracefulShutdownTimeoutMs": "daemon.graceful_timeout (in seconds)",
    "heartbeat_interval_seconds": "daemon.heartbeat_interval",
    "processes": "process.NAME (a table for each, [process.web])",
    "args": "process.command (a list: the program and its arguments)",
}


class Config:
    """The effective configuration: config.daemon.poll_interval, config.groups["build"].

    data: the file's tables; of the kinds in TABLES each has a name that the user chose.
    faults: a list that takes what is wrong, which is left out then; None: it is raised.
    Raises CONFIG_INVALID.
    """

    daemon: Any
    log: Any
    retention: Any
    limits: Any
    health: Any
    groups: dict[str, Any]
    processes: dict[str, Any]
    schedules: dict[str, Any]
    watches: dict[str, Any]
    hooks: dict[str, Any]

    def __init__(
        self, data: Mapping[str, Any], path: str | None = None,
        faults: list[DaemonError] | None = None,
    ) -> None:  # fmt: skip
        self._path, self._faults = path, faults
        for key in data:
            if key not in OPTIONS:
                self._refuse_key(key, key, OPTIONS)
        for name in OPTIONS.keys() - TABLES.keys():
            setattr(self, name, self._read_section(name, name, data.get(name, {})))
        own = self._read_tables("group", {name: {} for name in OWN_GROUPS})
        for kind, attribute in TABLES.items():  # groups first: the triggers name them
            found = self._read_tables(kind, data.get(kind, {}))
            setattr(self, attribute, {**own, **found} if kind == "group" else found)
        below_s: dict[str, float] = {}  # how long each takes to stop, after all that it needs
        for name in self._order_processes():
            process = self.processes[name]
            needed_s = max((below_s[need] for need in process.needs), default=0.0)
            below_s[name] = process.stop_timeout + needed_s
        self.stop_timeout_s = max(below_s.values(), default=0.0)  # of all, one by one
        self.stop_timeout_s += INSTANCE_STOP_S * sum(p.instances for p in self.processes.values())

    @property
    def env_keep(self) -> list[str]:
        """Names of variables that tasks get; "!NAME": not that one, a hook's secret: see README."""
        secrets = [hook.secret_env for hook in self.hooks.values() if hook.secret_env]
        return [*self.daemon.env_keep, *(f"!{name.upper()}" for name in secrets)]

    def _refuse(self, message: str, hint: str = "") -> None:
        error = _broken(self._path, message, hint)
        if self._faults is None:
            raise error
        self._faults.append(error)

    def _refuse_key(self, where: str, key: str, known: Iterable[str]) -> None:
        if key in FORMER_NAMES:
            self._refuse(f"{where} is called {FORMER_NAMES[key]} here", "rename it")
        else:
            near = difflib.get_close_matches(key, list(known), 1, 0.0)
            self._refuse(f"{where} is not an option", f"did you mean {near[0]}?")

    def _read_section(self, kind: str, where: str, given: object) -> SimpleNamespace:
        """Check one table of the file against OPTIONS and fill in the defaults."""
        known = OPTIONS[kind]
        section = SimpleNamespace(**{key: default for key, (_, default, _) in known.items()})
        if not isinstance(given, dict):
            self._refuse(f"[{where}] must be a table")
            return section
        for key, value in given.items():
            if key not in known:
                self._refuse_key(f"{where}.{key}", key, known)
                continue
            try:
                setattr(section, key, known[key][0](value))
            except ValueError as error:
                shown = "" if key in ("url", "secret_env") else f" = {value!r}"
                self._refuse(f"{where}.{key}{shown}: must be {error}")
        return section

    def _read_tables(self, kind: str, given: object) -> dict[str, Any]:
        """Check the tables of a kind that users name, such as [group.NAME]; keep the sound ones."""
        if not isinstance(given, dict):
            self._refuse(f"[{kind}] must be a table of tables")
            return {}
        found = {}
        for name, table in given.items():
            count = len(self._faults or ())
            if (kind, name) == ("group", "hooks") and isinstance(table, dict):
                table = {"max_concurrent": HOOKS_AT_ONCE, **table}
            section = self._read_section(kind, f"{kind}.{name}", table)
            if kind != "group" and len(self._faults or ()) == count:
                self._check_named(kind, name, section)
            if len(self._faults or ()) == count:
                found[name] = section
        return found

    def _check_named(self, kind: str, name: str, one: Any) -> None:
        """Check a process or a trigger beyond its single options."""
        if not re.fullmatch("[A-Za-z][A-Za-z0-9_-]{0,63}", name):
            hint = "letters, digits, - and _, at most 64, a letter first"
            self._refuse(f"{kind}.{name}: is no name of a {kind}", hint)
        url = getattr(one, "url", None)
        if (one.command is None) == (url is None):
            what = "command is missing" if url is None else "command and url: only one can be"
            hint = "say what to run" if kind != "hook" else "write either a command or a url"
            self._refuse(f"{kind}.{name}.{what}", hint)
        if kind == "hook" and not one.on:
            self._refuse(f"hook.{name}.on is missing", 'write on = ["task.failed"], say')
        if kind == "hook" and one.secret_env and url is None:
            self._refuse(f"hook.{name}.secret_env is for a url", "drop it")
        if kind == "schedule" and one.cron is None:
            self._refuse(f"schedule.{name}.cron is missing", "say when")
        if kind != "process" and (one.group or "default") not in self.groups:
            error = unknown_group(one.group, self)
            self._refuse(f"{kind}.{name}.group: {error.message}", error.hint)

    def _order_processes(self) -> list[str]:
        """Return the processes, each after all that it needs."""
        for name, process in self.processes.items():
            for need in [need for need in process.needs if need not in self.processes]:
                hint = "processes: " + ", ".join(self.processes)
                self._refuse(f"process.{name}.needs: there is no process {need!r}", hint)
                process.needs = [other for other in process.needs if other != need]
        graph = {name: process.needs for name, process in self.processes.items()}
        try:
            return list(graphlib.TopologicalSorter(graph).static_order())
        except ValueError as error:  # its CycleError
            ring = error.args[1][::-1]
        self._refuse(f"process.{ring[0]}.needs: a ring: {' -> '.join(ring)}", "remove one need")
        self.processes[ring[0]].needs = []
        return self._order_processes()

    def to_dict(self) -> dict[str, Any]:
        """Return the effective values: {"daemon.poll_interval": 5.0, ...}."""
        sections = {name: vars(getattr(self, name)) for name in OPTIONS if hasattr(self, name)}
        for kind, attribute in TABLES.items():
            for name, one in getattr(self, attribute).items():
                sections[f"{kind}.{name}"] = vars(one)
        return {
            f"{section}.{key}": x.to_dict() if isinstance(x, Value) else x
            for section, one in sections.items()
            for key, x in one.items()
        }

    def plan(self, new: Config) -> list[str]:
        """Say what a reload to `new` changes: ["added group.a", "changed limits.nice: 0 -> 5"]."""
        before, after = self.to_dict(), new.to_dict()
        old, now = ({key.rpartition(".")[0] for key in values} for values in (before, after))
        lines = [f"added {one}" for one in now - old] + [f"removed {one}" for one in old - now]
        for k in before.keys() & after.keys():
            if before[k] != after[k]:
                late = ", at the next start" if k in AT_START else ""
                was, becomes = json.dumps(before[k]), json.dumps(after[k])
                lines.append(f"changed {k}: {was} -> {becomes}{late}")
        return sorted(lines)


def _broken(path: str | None, message: str, hint: str = "") -> DaemonError:
    hint = hint or "fix the file; `config` shows the effective values"
    return DaemonError("CONFIG_INVALID", f"{path or 'configuration'}: {message}", hint)


def unknown_group(name: str, config: Config) -> DaemonError:
    """Make the error of a group that is not declared."""
    hint = f"groups: {', '.join(config.groups)}; declare [group.{name}] and reload"
    return DaemonError("UNKNOWN_GROUP", f"there is no group {name!r}", hint)


def capture_environment(keep: Sequence[str], extra: Iterable[str] = ()) -> dict[str, str]:
    """Return what a task gets of our environment (keep: Config.env_keep), NAME[=VALUE] on top."""
    names = {*ENVIRONMENT_KEPT, *keep}
    env = {
        name: value
        for name, value in os.environ.items()
        if (not names.isdisjoint((name, name.upper(), "*")) or name.startswith("LC_"))
        and not (ENVIRONMENT_DROPPED.match(name) or "!" + name.upper() in names)
    }
    for item in extra:
        name, has_value, value = item.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise bad(f"{name!r} is no name of a variable", "write --env NAME or NAME=VALUE")
        env[name] = value if has_value else os.environ.get(name, "")
    return env


def write_default_config(folder: str) -> str:
    """Write a configuration that sets nothing: every option is a comment. Returns its path."""
    is_toml, text = sys.version_info >= (3, 11), "# apexd's options, all at their defaults\n"
    for section, options in OPTIONS.items():
        text += f"\n# [{section}.NAME]\n" if section in TABLES else f"\n[{section}]\n"
        for key, (_, default, meaning) in options.items():
            shown = "" if default in (None, {}) else json.dumps(default)
            text += f"# {key} = {shown}".ljust(32) + f"  # {meaning}\n"
    path = os.path.join(folder, "config.toml" if is_toml else "config.json")
    write_atomically(path, text if is_toml else "{}\n")
    return path


def find_config(folder: str) -> str | None:
    """Return a state folder's configuration file, None without one. Raises CONFIG_INVALID."""
    found = [name for name in CONFIG_NAMES if os.path.lexists(os.path.join(folder, name))]
    if len(found) > 1:
        raise _broken(folder, f"{' and '.join(found)} are both there", "remove one of them")
    return os.path.join(folder, found[0]) if found else None


def read_users_file(path: str) -> bytes:
    """Read a configuration or an env_file, also through links. Raises CONFIG_INVALID.

    Root takes only what nobody else can write.
    """
    try:
        data = read_file(os.path.realpath(path), USER_FILE_BYTES, trusted=Platform.is_root())
    except (DaemonError, ValueError) as error:
        what, hint = str(error), getattr(error, "hint", "")
        raise _broken(path, what.partition(": ")[2] or what, hint) from None
    if data is None:
        raise _broken(path, "no such file", "make it, or name another")
    return data


def load_config(
    path: str | None, faults: list[DaemonError] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Config:  # fmt: skip
    """Read and check a configuration file; None gives the defaults.

    faults: see Config; overrides: {"log.level": "debug"}, what the command line says instead.
    Raises CONFIG_INVALID with file, key and reason.
    """
    try:
        data = _load(path) if path else {}
    except DaemonError as error:
        if faults is None:
            raise
        faults[:], data = [error], {}
    for name, value in (overrides or {}).items():
        section, _, key = name.partition(".")
        if isinstance(data.setdefault(section, {}), dict):
            data[section][key] = value
    config = Config(data, path, faults)
    given = os.environ.get("APEX_POLL_INTERVAL")  # milliseconds
    if given is not None:
        try:
            config.daemon.poll_interval = number(given) / 1000
        except ValueError as error:
            raise _broken("APEX_POLL_INTERVAL", f"{given!r}: must be {error}", "unset it") from None
    return config


def _load(path: str) -> dict[str, Any]:
    try:
        data = _parse(path, read_users_file(path).decode("utf-8-sig").replace("\r\n", "\n"))
    except UnicodeDecodeError as error:
        raise _broken(path, f"is not UTF-8 at byte {error.start}", "save it as UTF-8") from None
    except ImportError as error:
        hint = "write config.json with the same tables"
        raise _broken(path, f"needs {error.name}", hint) from None
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"cannot be parsed: {error}") from None
    if not isinstance(data, dict):
        raise _broken(path, "must be a table at the top")
    return data


def _parse(path: str, text: str) -> object:
    """Turn a file's text into data by its ending. Raises ValueError, ImportError."""
    if path.endswith(".toml"):
        if not re.sub(r"(?m)^(#.*|\[[a-z]+\])$", "", text).strip():
            return {}  # as `write_default_config` left it: any Python can read that
        import tomllib  # Python 3.11

        return tomllib.loads(text)
    try:
        return json.loads(text)
    except ValueError:
        if path.endswith(".json"):
            raise
    if sys.flags.no_site:  # the daemon starts without site-packages
        import site

        site.main()
    import yaml  # type: ignore[import-untyped]

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error).replace("\n", " ")) from None


# ============================================================================
# 7. LOG - the daemon's own log; the file of events
#    Uses 1-6. Any thread. Opened and closed by: Daemon; of events: TaskStore.
# ============================================================================


def open_rotating(path: str, most_bytes: int, count: int) -> Any:
    """Return a handler that rotates its file and keeps `count` older ones."""
    import logging.handlers

    class Handler(logging.handlers.RotatingFileHandler):
        next_mono = 0.0  # while somebody has the file open, Windows cannot rename it: write on

        def shouldRollover(self, record: logging.LogRecord) -> bool:
            size = 40 + len(record.getMessage().encode(errors="replace"))  # no stat for each line
            is_full = self.stream is not None and self.stream.tell() + size > self.maxBytes
            return is_full and Clock.mono() >= self.next_mono

        def rotate(self, source: str, dest: str) -> None:
            try:
                super().rotate(source, dest)
            except OSError:
                self.next_mono = Clock.mono() + 60.0

        def handleError(self, record: logging.LogRecord) -> None:
            pass  # a full disk costs lines, never the daemon

    os.close(open_file(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT))
    return Handler(
        path, maxBytes=most_bytes, backupCount=count, encoding="utf-8", errors="replace"
    )


def open_log(path: str, options: Any, to_stderr: bool) -> None:
    """Send the log to a rotating file, and to standard error in the foreground.

    A line: [2025-01-15T10:30:05.456Z] [INFO] Starting task 12
    With log.format json: {"time": "2025-...Z", "level": "info", "message": "Starting task 12"}
    """
    import logging

    class Formatter(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            moment, text = timestamp(record.created), super().format(record)
            level = "WARN" if record.levelname == "WARNING" else record.levelname
            if options.format == "json":
                return json.dumps({"time": moment, "level": level.lower(), "message": text})
            head, *rest = text.split("\n")
            line = f"[{moment}] [{level}] {printable(head)}"
            return "\n".join([line, *("    " + printable(more) for more in rest)])

    logging.raiseExceptions = False  # nor does a standard error that is closed
    handlers: list[logging.Handler]
    handlers = [open_rotating(path, int(options.max_size_mb * 1e6), options.max_files)]
    handlers += [logging.StreamHandler()] if to_stderr else []
    for handler in handlers:
        handler.setFormatter(Formatter())
    level = "DEBUG" if os.environ.get("APEX_DAEMON_DEBUG") else options.level.upper()
    logging.basicConfig(handlers=handlers, level=level, force=True)  # closes the former ones


class EventLog:
    """Writes `events.log`, a line of JSON an event. Any thread; a full disk costs events."""

    def __init__(self, folder: str) -> None:
        self._path = os.path.join(folder, "events.log")
        self._lock = threading.RLock()  # guards what follows
        self._fd: int | None = None

    def write(self, events: Sequence[Event]) -> None:
        """Append events; never raises.

        Without `logging`: it takes 7 ms to import, and a record as long as this.
        """
        with self._lock, contextlib.suppress(OSError, ValueError, DaemonError):
            data = "".join(json.dumps(event.to_dict()) + "\n" for event in events).encode()
            info = os.fstat(self._fd) if self._fd is not None else None
            if info is not None and not info.st_nlink:
                self.close()  # somebody has removed it
            elif info is not None and info.st_size + len(data) > EVENTS_MAX_BYTES:
                self.close()
                with contextlib.closing(open_rotating(self._path, EVENTS_MAX_BYTES, 1)) as handler:
                    handler.doRollover()
            if self._fd is None:
                self._fd = open_file(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            written = os.write(self._fd, data)
            if written < len(data):  # the disk is full: no part of a line stays
                os.ftruncate(self._fd, os.fstat(self._fd).st_size - written)

    def close(self) -> None:
        """Close the file; the next event opens it again."""
        with self._lock:
            if self._fd is not None:
                os.close(self._fd)
                self._fd = None


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
    config: str | None  # the configuration that the daemon was told to use
    overrides: dict[str, Any] | None  # what its command line said besides

    def is_alive(self) -> bool:
        """Tell whether exactly this process lives: PID, start time and boot must agree."""
        is_known = self.pid > 0 and self.start_time and self.boot_id == Platform.boot_id()
        return bool(is_known) and Platform.start_time(self.pid) == self.start_time

    @classmethod
    def of_pid(cls, pid: int, role: str, **told: Any) -> Holder:
        """Describe a process that lives."""
        start_time, boot_id = Platform.start_time(pid), Platform.boot_id()
        return cls(pid=pid, start_time=start_time, boot_id=boot_id, role=role, **told)


class PidFile:
    """A PID file in JSON and the lock beside it (NAME.lock) that makes it true.

    plain_path: a second one that holds the number alone, for other programs.
    Life: acquire -> release; a process that dies releases it too. The lock file stays.
    """

    def __init__(self, path: str, plain_path: str | None = None) -> None:
        self.path, self._plain_path = path, plain_path
        self.lock_path = os.path.splitext(path)[0] + ".lock"
        self._fd: int | None = None

    def acquire(
        self, role: str = "daemon", project: str = "", wait_s: float = 0.0,
        told: Mapping[str, Any] | None = None,
    ) -> bool:  # fmt: skip
        """Take the lock, waiting `wait_s` at most; False when somebody else has it.

        told: what a Holder says besides. A daemon's PID file is written too:
        {"pid": 1, "startedAt": "2025-01-15T10:30:00.000Z", "version": ..., "projectPath": ...}
        Raises CANNOT_CREATE, PERMISSION_DENIED.
        """
        fd, deadline = open_file(self.lock_path, os.O_RDWR | os.O_CREAT), Clock.mono() + wait_s
        while not Platform.lock(fd):
            if Clock.mono() >= deadline:
                os.close(fd)
                return False
            threading.Event().wait(0.01)
        me = Holder.of_pid(os.getpid(), role, **(told or {})).to_dict()
        fields = {"pid": os.getpid(), "startedAt": timestamp(Clock.now()), "version": __version__}
        try:
            os.ftruncate(fd, 0)
            os.write(fd, json.dumps(me).encode())
            if role == "daemon":
                if self._plain_path:
                    write_atomically(self._plain_path, f"{os.getpid()}\n")
                write_atomically(self.path, json.dumps({**fields, "projectPath": project}) + "\n")
        except BaseException as error:
            os.close(fd)
            if isinstance(error, OSError):
                raise cannot_create(self.lock_path, error) from None
            raise
        former, self._fd = self._fd, fd
        if former is not None:  # of a lock file that was removed
            os.close(former)
        return True

    def is_held(self) -> bool:
        """Tell whether the file that we have locked is still the one at the path."""
        if self._fd is None:
            return False
        info = os.fstat(self._fd)
        return file_id(self.lock_path) == (info.st_dev, info.st_ino)

    def release(self) -> None:
        """Remove the PID file if it is ours, then let go of the lock."""
        if self._fd is not None:
            with contextlib.suppress(DaemonError, OSError, ValueError):
                if self.is_held() and self.read().get("pid") == os.getpid():
                    insist(os.unlink, self.path)
                    mine = b"%d\n" % os.getpid()
                    if self._plain_path and read_file(self._plain_path, trusted=False) == mine:
                        insist(os.unlink, self._plain_path)
            os.close(self._fd)
            self._fd = None

    def read(self) -> dict[str, Any]:
        """Return the PID file's content, {} when there is none. Raises PID_FILE_CORRUPTED."""
        with contextlib.suppress(ValueError, KeyError):
            fields = read_json(self.path)
            if fields is None or (type(fields["pid"]) is int and 1 <= fields["pid"] < 2**31):
                return fields or {}
        hint = f"no process is signalled because of it; remove {self.path}"
        raise DaemonError("PID_FILE_CORRUPTED", f"{self.path} holds no PID", hint)

    def holder(self) -> Holder | None:
        """Return who holds the lock, None when nobody does; PID 0: it does not say.

        Raises PERMISSION_DENIED when the lock file belongs to somebody who could name any
        process in it.
        """
        if file_id(self.lock_path) is None:
            return None
        fd = open_file(self.lock_path, os.O_RDONLY)  # all that flock needs
        try:
            if Platform.lock(fd):
                return None
        finally:
            os.close(fd)
        with contextlib.suppress(ValueError, TypeError):  # damaged, or another program's
            fields = read_json(self.lock_path) or {}  # a newer one's may be more
            holder = Holder(**{name: fields.get(name) for name in Holder.__annotations__})
            if type(holder.pid) is int and 0 < holder.pid < 2**31:
                return holder
        return Holder(pid=0, role="another program")


# ============================================================================
# 9. STORE - the sqlite file: schema, migrations and every SQL statement
#    Uses 1-8. Any thread, under one lock; one connection. Closed by: Daemon.
# ============================================================================

SCHEMA = """
CREATE TABLE requests (                -- one row an `add` or `report`: a token never acts twice
  id         INTEGER PRIMARY KEY AUTOINCREMENT,  -- never used again
  token      TEXT UNIQUE,
  cwd        TEXT,                     -- JSON string: what its tasks have in common
  env        TEXT,                     -- JSON object
  umask      INTEGER,
  first_task INTEGER,                  -- the row goes when the tasks of this range are gone
  last_task  INTEGER,
  created_at REAL NOT NULL,
  answer     TEXT NOT NULL             -- JSON, for the same token again; last, since it is long
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
  note       TEXT,
  suspect    INTEGER NOT NULL DEFAULT 0  -- it was lost with its keeper: its next one is its own
);
-- The claim: one probe a group, however many wait.
CREATE INDEX tasks_ready ON tasks (grp, priority DESC, id) WHERE state = 'queued';
CREATE INDEX tasks_suspect ON tasks (id) WHERE state = 'queued' AND suspect;
CREATE INDEX tasks_due ON tasks (due_at) WHERE state = 'scheduled';
CREATE INDEX tasks_state ON tasks (state, id);
CREATE INDEX tasks_finished ON tasks (finished_at) WHERE finished_at IS NOT NULL;
CREATE UNIQUE INDEX tasks_key ON tasks (key) WHERE key IS NOT NULL AND finished_at IS NULL;
CREATE TABLE attempts (                -- fact
  task_id    INTEGER NOT NULL,
  number     INTEGER NOT NULL,         -- from 1
  run_id     TEXT NOT NULL,
  keeper     TEXT,                     -- NULL: of an apexd without keepers
  boot_id    TEXT NOT NULL,
  started_at REAL NOT NULL,
  pid        INTEGER,                  -- the command's, soon after its start
  start_time TEXT,                     -- of that PID
  finished_at REAL,
  wish       TEXT,                     -- committed before the first signal
  outcome    TEXT,                     -- NULL while it runs
  exit_code  INTEGER,                  -- 128 and the signal's number when a signal ended it
  signal     INTEGER,
  reason     TEXT,
  cpu_s      REAL,
  max_rss    INTEGER,                  -- bytes
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
CREATE TABLE processes (               -- what users decided, over the configuration
  name      TEXT PRIMARY KEY,
  is_up     INTEGER,                   -- NULL: as autostart says
  instances INTEGER                    -- NULL: as configured
) WITHOUT ROWID;
CREATE TABLE fires (                   -- the last time each trigger made a task
  source   TEXT PRIMARY KEY,           -- schedule.NAME
  fired_at REAL,                       -- the time it was scheduled for; NULL: not yet
  task_id  INTEGER,                    -- NULL: none was made, one of it was unfinished
  spec     TEXT,                       -- of a schedule: what it fires by
  spec_at  REAL                        -- since when
) WITHOUT ROWID;
CREATE TABLE counts (state TEXT, grp TEXT, n INTEGER NOT NULL, PRIMARY KEY (state, grp))
  WITHOUT ROWID;
-- Insertions are counted where they are made: a trigger costs a third of a large batch.
CREATE TRIGGER tasks_moved AFTER UPDATE OF state ON tasks BEGIN
  INSERT OR IGNORE INTO counts VALUES (new.state, new.grp, 0);
  UPDATE counts SET n = n + 1 WHERE state = new.state AND grp = new.grp;
  UPDATE counts SET n = n - 1 WHERE state = old.state AND grp = old.grp;
END;
CREATE TRIGGER tasks_removed AFTER DELETE ON tasks BEGIN
  UPDATE counts SET n = n - 1 WHERE state = old.state AND grp = old.grp;
END;
"""
# Script i brings `PRAGMA user_version` i to i + 1; a new database has SCHEMA at once.
_KEPT = (
    "task_id, number, run_id, boot_id, started_at, finished_at, wish, outcome, exit_code, reason"
)
MIGRATIONS = (
    "",
    """
    ALTER TABLE tasks ADD COLUMN suspect INTEGER NOT NULL DEFAULT 0;
    CREATE INDEX tasks_suspect ON tasks (id) WHERE state = 'queued' AND suspect;
    ALTER TABLE attempts RENAME TO old_attempts;
    ALTER TABLE requests RENAME TO old_requests;
    """
    + "".join(re.findall(r"CREATE TABLE (?:requests|attempts) .*?;\n", SCHEMA, re.S))
    + f"""
    INSERT INTO requests SELECT * FROM old_requests;
    INSERT INTO attempts ({_KEPT}) SELECT {_KEPT} FROM old_attempts;
    DROP TABLE old_attempts;
    DROP TABLE old_requests;
    """,
    "".join(re.findall(r"CREATE TABLE fires .*?;\n", SCHEMA, re.S)),
)
PRAGMAS = (
    "busy_timeout = 5000",
    "cache_size = -200",  # KiB; the system caches the rest
    "temp_store = MEMORY",  # of the table `asked`
    "journal_mode = WAL",
    "synchronous = FULL",  # on disk when a commit returns
    "fullfsync = ON",  # macOS: fsync alone stops at the drive's cache
    "trusted_schema = OFF",  # sqlite.org/security.html
    "cell_size_check = ON",
)


class Transaction:
    """A transaction that is open: its statements, and the events to publish on commit."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self.execute, self.executemany = db.execute, db.executemany
        # (type, Event, the hooks that led to it, separated by commas), or of one task, since
        # there may be 100,000: (type, id, state, more payload), with the hooks of its task.
        self.events: list[tuple[Any, ...]] = []

    def make_event(self, at: int) -> Event:
        """Return an event of the list."""
        type, what, *rest = self.events[at]
        if isinstance(what, Event):
            return what
        payload = {"id": what, "state": rest[0], **rest[1]}
        return Event.make(type, payload, f"task {what}")


class Database:
    """The one connection to the one file, and the lock that guards it.

    EXCLUSIVE locking keeps every other writer out, since SQLite before 3.51.3 can lose
    commits when two connections write and checkpoint at once (sqlite.org/wal.html).
    """

    def __init__(self, path: str) -> None:
        """Open and migrate. Raises DATABASE_CORRUPT, _NEWER, _FAILED, CANNOT_CREATE."""
        self.path = path
        self.lock = threading.RLock()
        self.before_commit: Callable[[Transaction], None] = lambda db: None
        self.after_commit: Callable[[list[Event]], None] = lambda events: None
        with self._translated():
            if path != ":memory:":
                self._find_or_make()
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._db.row_factory = sqlite3.Row
            try:
                self._db.execute("PRAGMA locking_mode = EXCLUSIVE")  # one owner, no -shm file
                (version,) = self._db.execute("PRAGMA user_version").fetchone()
                if version > len(MIGRATIONS):
                    hint = "use the apexd that made it, or a newer one"
                    raise DaemonError("DATABASE_NEWER", f"{path} has schema {version}", hint)
                for pragma in PRAGMAS:
                    self._db.execute("PRAGMA " + pragma)
                self._migrate(self._db, version)
                self._db.execute("CREATE TEMP TABLE asked (at INTEGER PRIMARY KEY, first, last)")
            except BaseException:
                self._db.close()
                raise

    def _find_or_make(self) -> None:
        """Check the file, or make it under another name: so an empty one was cut off."""
        temporary, wal = self.path + ".new", self.path + "-wal"
        with contextlib.suppress(FileNotFoundError):
            info = os.lstat(self.path)
            os.close(open_file(self.path, os.O_RDWR))
            if info.st_nlink != 1:
                raise cannot_create(self.path, OSError(errno.EMLINK, "has other hard links"))
            if not info.st_size:
                raise sqlite3.Error("malformed: it is empty, which no queue is")
            return
        if os.path.exists(wal) and os.path.getsize(wal):
            raise sqlite3.Error(f"malformed: it is gone, and {wal} is left")
        for name in (temporary, temporary + "-journal"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
        os.close(open_file(temporary, os.O_RDWR | os.O_CREAT))
        with contextlib.closing(sqlite3.connect(temporary, isolation_level=None)) as db:
            self._migrate(db, 0)
        insist(os.replace, temporary, self.path)  # on disk with the first commit: -wal is new

    def _migrate(self, db: sqlite3.Connection, version: int) -> None:
        steps = enumerate(MIGRATIONS[version:], version + 1)
        for number, script in steps if version else [(len(MIGRATIONS), SCHEMA)]:
            db.executescript(f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {number};")
            failpoint("migration")
            db.execute("COMMIT")

    def check(self) -> None:
        """Read every page once. Raises DATABASE_CORRUPT."""
        with self._translated():
            ((verdict,),) = self.fetch("PRAGMA quick_check(1)")
            if verdict != "ok":
                raise sqlite3.Error(f"malformed: {verdict}")

    @contextlib.contextmanager
    def _translated(self, is_vital: bool = True) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            code, hint = "DATABASE_FAILED", "check the disk's space and the file's mode"
            if re.search("not a database|malformed|corrupt", str(error)):
                hint = "it is kept as it is: restore a backup, or move it away and start anew"
                code = "DATABASE_CORRUPT"
            what = " ".join(str(error).split())
            if is_vital and what == "database or disk is full" and self.path != ":memory:":
                self._make_room()
            raise DaemonError(code, f"{self.path}: {what}", hint) from None

    def _make_room(self) -> None:
        """Give up the ballast; without one write the log's pages where they belong, to reuse it."""
        try:
            os.unlink(os.path.join(os.path.dirname(self.path), "ballast"))
        except OSError:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("PRAGMA wal_checkpoint(RESTART)")

    def fetch(
        self, sql: str, values: Any = (), asked: Iterable[int | range] | None = None
    ) -> list[sqlite3.Row]:
        """Return the rows of a statement that changes nothing; asked: the tasks of _ASKED_SQL."""
        with self.lock, self._translated():
            if asked is not None:
                self._db.execute("DELETE FROM asked")
                ranges = ((one[0], one[-1]) for one in as_ranges(asked) if one)
                self._db.executemany("INSERT INTO asked (first, last) VALUES (?, ?)", ranges)
            return self._db.execute(sql, values).fetchall()

    @contextlib.contextmanager
    def write(self, is_vital: bool = True) -> Iterator[Transaction]:
        """Give one transaction; on disk when it returns, and its events are handed on.

        is_vital: on a full disk the ballast is given up for it.
        """
        db = Transaction(self._db)
        with self.lock:
            with self._translated(is_vital):
                db.execute("BEGIN IMMEDIATE")
                try:
                    yield db
                    self.before_commit(db)
                    db.execute("COMMIT")
                finally:
                    if self._db.in_transaction:
                        db.execute("ROLLBACK")
            for first in range(0, len(db.events), 1000):  # in the order of the commits
                part = range(len(db.events))[first : first + 1000]
                self.after_commit([*map(db.make_event, part)])

    def probe(self) -> None:
        """Write a page and wait for the disk; the ballast stays. Raises DATABASE_FAILED."""
        with self.write(is_vital=False) as db:
            db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")

    def close(self) -> None:
        """Checkpoint and close."""
        with self.lock, contextlib.suppress(sqlite3.Error):
            self._db.close()


def insisting(method: Callable[..., Any]) -> Callable[..., Any]:
    """Make a method of a store try again once: a full disk has the ballast's room then."""

    @functools.wraps(method)
    def act(*args: Any, **options: Any) -> Any:
        try:
            return method(*args, **options)
        except DaemonError as error:
            if error.code != "DATABASE_FAILED":
                raise
        return method(*args, **options)

    return act


# The event of each state that a task can enter; leaving one for the queue is "retrying".
EVENT_TYPES = {one: "task." + one.value for one in DONE} | {State.RUNNING: "task.started"}
_DONE = "('succeeded', 'failed', 'cancelled', 'skipped')"
_TASK_SQL = """
SELECT t.*, a.started_at, a.outcome, a.exit_code, a.signal, a.reason, a.wish, a.run_id, a.keeper,
       a.boot_id, a.pid, a.start_time, a.cpu_s, a.max_rss,
       (SELECT cwd FROM requests WHERE id = t.request_id) AS cwd,
       (SELECT group_concat(parent || ':' || need) FROM deps WHERE child = t.id) AS after
FROM tasks t
LEFT JOIN attempts a ON a.task_id = t.id AND a.number = t.attempts
"""
# The tasks that `fetch` was asked for, in that order (asked.at, t.id).
_ASKED_SQL = "asked CROSS JOIN tasks t ON t.id BETWEEN asked.first AND asked.last"
_INSERT_SQL = """
INSERT INTO tasks (id, command, request_id, state, open_deps, grp, priority, label, key, due_at,
                   retries, timeout, on_lost, max_tokens, max_cost, created_at, finished_at)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
_COUNT_SQL = """
INSERT INTO counts VALUES (?, ?, ?)
ON CONFLICT (state, grp) DO UPDATE SET n = n + excluded.n
"""


class Added(list[int]):
    """The ids of one `add`, in order; `existing`: those whose tasks had the key already."""

    existing: Sequence[int] = ()
    made = range(0)  # those of new tasks


def unknown_task(task_id: int) -> DaemonError:
    """Make the error of an id that names no task."""
    return DaemonError("UNKNOWN_TASK", f"there is no task {task_id}", "see `list`")


def read_options(given: Mapping[str, Any], config: Config) -> SimpleNamespace:
    """Check one task's options and fill in the defaults. Raises BAD_REQUEST, UNKNOWN_GROUP."""
    options = SimpleNamespace(**{**dict.fromkeys(TASK_READERS), "timeout": config.limits.timeout})
    for name, value in given.items():
        if name not in TASK_READERS:
            raise bad(f"a task has no option {name!r}", "keys: command, " + ", ".join(TASK_READERS))
        try:
            if value is not None:
                setattr(options, name, TASK_READERS[name](value))
        except ValueError as error:
            raise bad(f"{name} {str(value)[:40]!r}: must be {error}") from None
    options.group = options.group or "default"
    if options.group not in config.groups:
        raise unknown_group(options.group, config)
    limits, now = config.limits, Clock.now()
    options.due_at = now + options.delay if options.delay else None
    options.state = State.SCHEDULED if options.delay else State.QUEUED
    options.row = (
        *(options.group, options.priority or 0, options.label, options.key, options.due_at),
        *(limits.retries if options.retries is None else options.retries, options.timeout or None),
        *(options.on_lost or "retry", options.max_tokens or limits.max_tokens),
        *(options.max_cost or limits.max_cost, now),
    )
    return options


def _row_to_task(row: sqlite3.Row) -> Task:
    fields = dict(row)
    del fields["open_deps"]
    fields["group"] = fields.pop("grp")
    after = fields["after"].split(",") if fields["after"] else []
    fields["after"] = sorted(after, key=lambda one: int(one.partition(":")[0]))
    fields["command"] = json.loads(fields["command"])
    fields["cwd"] = json.loads(fields["cwd"])
    fields["state"] = State(fields["state"])
    for name in ("outcome", "wish"):
        fields[name] = Outcome(fields[name]) if fields[name] else None
    return Task(**fields)


def _attempt_payload(task: Task) -> dict[str, Any]:
    """Return the payload of an attempt's events; no command: it may contain a secret."""
    return {"group": task.group, "label": task.label, "attempt": task.attempts}


def _insert_tasks(
    db: Transaction, commands: Sequence[Any], given: Mapping[str, Any], config: Config,
    request: int,
) -> Added:  # fmt: skip
    """Insert the tasks of one request; the plain ones of a large batch in few statements."""
    common = read_options(given, config)
    seq = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'tasks'").fetchone()
    first = next_id = (seq[0] if seq else 0) + 1
    ids, existing = Added(), dict[int, None]()
    rows: list[tuple[Any, ...]] = []

    def flush() -> None:
        db.executemany(_INSERT_SQL, rows)
        counts = Counter((row[3], row[5]) for row in rows)  # (state, group)
        db.executemany(_COUNT_SQL, [(*where, count) for where, count in counts.items()])
        rows.clear()

    for line, item in enumerate(commands, 1):
        if item is None:
            continue
        try:
            options = common
            if isinstance(item, dict):
                own = {**given, **item}
                item = own.pop("command", None)
                options = read_options(own, config)
            command = json.dumps(command_line(item))
            state, open_deps = options.state, 0
            if options.after or options.key or len(rows) == 1000:
                flush()  # what it asks for may be among them
                sql = "SELECT id FROM tasks WHERE key = ? AND finished_at IS NULL"
                holder = db.execute(sql, (options.key,)).fetchone()
                if holder:
                    ids.append(holder[0])
                    existing[holder[0]] = None
                    continue
                state, open_deps = _insert_deps(db, next_id, options)
        except (ValueError, DaemonError) as error:
            place = f"line {line}: " if len(commands) > 1 else ""
            if isinstance(error, ValueError):
                raise bad(f"{place}must be {error}") from None
            raise DaemonError(error.code, place + error.message, error.hint) from None
        finished_at = Clock.now() if state == State.SKIPPED else None
        if state == State.SKIPPED:
            db.events.append((EVENT_TYPES[state], next_id, state.value, {}))
        head = (next_id, command, request, state.value, open_deps)
        rows.append((*head, *options.row, finished_at))
        ids.append(next_id)
        next_id += 1
    flush()
    ids.existing, ids.made = list(existing), range(first, next_id)
    return ids


def _insert_deps(
    db: Transaction, task_id: int, options: SimpleNamespace
) -> tuple[State, int]:
    """Insert what a new task comes after; return (its state, its open dependencies)."""
    for parent, need in options.after or ():
        if not db.execute("SELECT 1 FROM tasks WHERE id = ?", (parent,)).fetchone():
            raise unknown_task(parent)
        db.execute("INSERT INTO deps VALUES (?, ?, ?)", (parent, task_id, need))
    open_deps, unmet = _count_open(db, task_id)
    state = State.SKIPPED if unmet else State.WAITING if open_deps else options.state
    return state, open_deps


def set_state(
    db: Transaction, task_id: int, old: State, new: State, due_at: float | None = None,
    payload: Mapping[str, Any] = {}, ended_at: float | None = None,
) -> None:  # fmt: skip
    """Move a task: the only writer of `state`, but for its insertion.

    A task that reaches a final state releases, or skips, what comes after it. One that runs
    begins an attempt. payload: of its event, besides id and state. ended_at None: now.
    """
    work = [(task_id, old, new, due_at)]
    while work:
        task_id, old, new, due_at = work.pop()
        if new not in MOVES[old]:
            raise DaemonError("INTERNAL", f"task {task_id}: {old.value} cannot become {new.value}")
        finished_at = ended_at or Clock.now() if new in DONE else None
        sql = "UPDATE tasks SET state = ?, due_at = ?, finished_at = ?, attempts = attempts + ?"
        values = (new.value, due_at, finished_at, new == State.RUNNING, task_id)
        db.execute(sql + " WHERE id = ?", values)
        what = EVENT_TYPES.get(new)
        if what is None and old in EVENT_TYPES:
            what = "task.lost" if payload.get("outcome") == "lost" else "task.retrying"
        if what is not None:
            db.events.append((what, task_id, new.value, payload))
        payload, ended_at = {}, None  # the tasks that follow have none
        if new not in DONE:
            continue
        for child, due_at, open_deps, need in db.execute(
            """
            SELECT t.id, t.due_at, t.open_deps, d.need
            FROM deps d JOIN tasks t ON t.id = d.child
            WHERE d.parent = ? AND t.state = 'waiting'
            """,
            (task_id,),
        ).fetchall():
            if new not in NEEDS[need]:
                work.append((child, State.WAITING, State.SKIPPED, None))
                continue
            db.execute("UPDATE tasks SET open_deps = open_deps - 1 WHERE id = ?", (child,))
            if open_deps == 1:
                is_early = due_at is not None and due_at > Clock.now()
                state = State.SCHEDULED if is_early else State.QUEUED
                work.append((child, State.WAITING, state, due_at))


def _count_open(db: Transaction, task_id: int) -> tuple[int, int]:
    """Return how many of a task's dependencies are open, and how many can never be met."""
    sql = "SELECT t.state, d.need FROM deps d JOIN tasks t ON t.id = d.parent WHERE d.child = ?"
    rows = [(State(row[0]), row[1]) for row in db.execute(sql, (task_id,))]
    return sum(s not in DONE for s, _ in rows), sum(s in DONE - NEEDS[need] for s, need in rows)


def _cancel(db: Transaction, task_id: int, state: State) -> bool:
    if state == State.RUNNING:
        set_wish(db, task_id, Outcome.CANCELLED)
    elif state not in DONE:
        set_state(db, task_id, state, State.CANCELLED)
    return state not in DONE


def _retry(db: Transaction, task_id: int, state: State) -> bool:
    """Put a finished task back as if new; count again what comes after it, reopen the skipped.

    Of those with one key the newest is reopened. Raises ILLEGAL_STATE when the key is taken.
    """
    work = [(task_id, state)] if state in DONE else []
    holder_sql = """
        SELECT other.id FROM tasks t JOIN tasks other ON other.key = t.key
        WHERE t.id = ? AND other.finished_at IS NULL AND other.id <> t.id
    """
    while work:
        named, old = work.pop()
        open_deps, unmet = _count_open(db, named)
        holder = db.execute(holder_sql, (named,)).fetchone()
        if holder and named == task_id:
            what = f"task {holder[0]} has the key of task {task_id} now"
            raise DaemonError("ILLEGAL_STATE", what, f"wait for task {holder[0]}, or cancel it")
        if old == State.SKIPPED and named != task_id and (unmet or holder):
            continue  # also another of its parents keeps it skipped, or its key is taken
        db.execute(
            """
            UPDATE tasks SET open_deps = ?, progress = NULL, failures = 0, losses = 0,
                             suspect = 0, deferrals = 0, tokens = 0, cost = 0
            WHERE id = ?
            """,
            (open_deps, named),
        )
        if old == State.WAITING:
            continue
        set_state(db, named, old, State.WAITING if open_deps else State.QUEUED)
        sql = "SELECT t.id, t.state FROM deps d JOIN tasks t ON t.id = d.child WHERE d.parent = ?"
        rows = db.execute(sql + " AND t.state IN ('skipped', 'waiting')", (named,))
        work += [(row[0], State(row[1])) for row in rows]
    return state in DONE


def _remove(db: Transaction, task_id: int, state: State) -> bool:
    if state != State.RUNNING:
        _cancel(db, task_id, state)  # and `change` deletes it
    return state != State.RUNNING


def set_wish(db: Transaction, task_id: int, wish: Outcome) -> None:
    """Write down why a running attempt is to end; the first wish stays, but a cancel wins."""
    kept = "?" if wish == Outcome.CANCELLED else "coalesce(wish, ?)"
    sql = f"UPDATE attempts SET wish = {kept} WHERE task_id = ? AND outcome IS NULL"
    db.execute(sql, (wish.value, task_id))


def as_ranges(ids: Iterable[int | range]) -> Iterator[range]:
    """Yield ranges of ids, also for single ones."""
    for one in ids:
        yield one if isinstance(one, range) else range(one, one + 1)


def delete_tasks(db: Transaction, ids: Sequence[int]) -> None:
    """Forget tasks and all that belongs to them."""
    places = ("tasks WHERE id", "attempts WHERE task_id", "deps WHERE parent", "deps WHERE child")
    for place in places:
        db.executemany(f"DELETE FROM {place} = ?", [(task_id,) for task_id in ids])


class TaskStore:
    """The durable queue: what users do to tasks. AttemptStore is the runner's side.

    `TaskStore(path)` takes the project's lock (raises BUSY); one made by its holder is given
    the lock. Any thread. Durability: on disk when a method returns.
    """

    def __init__(
        self, path: str, config: Config | None = None, lock: PidFile | None = None,
        project: str = "",
    ) -> None:  # fmt: skip
        self.path = path
        self.folder = os.path.dirname(os.path.abspath(path))
        self.project = project or os.path.dirname(self.folder)
        self.config = config or Config({})
        self.on_events: Callable[[Sequence[Event]], None] = lambda events: None  # after the commit
        self.event_log = EventLog(self.folder if path != ":memory:" else os.devnull)
        self.last_upkeep: Any = None  # what `prune_all` saw the last time
        self._own_lock = PidFile(os.path.join(self.folder, "daemon.pid"))
        if lock is None:
            make_state_folder(self.folder, self.project)
            # A killed daemon's other threads can hold it for a moment longer.
            if not self._own_lock.acquire("client store", self.project, wait_s=1.0):
                raise DaemonError("BUSY", f"{path} is in use", "use Client, or stop the daemon")
        try:
            self.database = Database(path)
        except BaseException:
            self._own_lock.release()
            raise
        self.database.before_commit = EventStore(self).start_hooks
        self.database.after_commit = self.dispatch

    def dispatch(self, events: Sequence[Event]) -> None:
        """Write events to the file and pass them to `on_events`: they are committed."""
        self.event_log.write(events)
        try:
            self.on_events(events)
        except Exception:  # the user's callback
            log.exception("on_events failed")

    def close(self) -> None:
        """Close the database and let go of the lock if it was taken here."""
        self.database.close()
        self.event_log.close()
        self._own_lock.release()

    def add(
        self, commands: Sequence[Any], options: Mapping[str, Any] | None = None, *,
        token: str | None = None, cwd: str | None = None, env: Mapping[str, str] | None = None,
        umask: int | None = None,
    ) -> Added:  # fmt: skip
        """Put commands into the queue, all or none; return their ids in order.

        A command is a string (run by sh), a list (argv), {"command": ..., OPTION: ...} with
        options of its own, or None, which is passed over. The same token again answers with
        the ids of the first time. Raises BAD_REQUEST (naming the line), UNKNOWN_GROUP,
        UNKNOWN_TASK, QUEUE_FULL.
        """
        if cwd is not None and not os.path.isdir(cwd):
            raise bad(f"{cwd} is no folder", "name a folder that exists with --dir")
        with self.database.write(is_vital=False) as db:
            known = db.execute("SELECT answer FROM requests WHERE token = ?", (token,)).fetchone()
            if known:
                answer = json.loads(known[0]) or []
                ids = Added(answer["ids"] if isinstance(answer, dict) else answer)
                ids.existing = answer["existing"] if isinstance(answer, dict) else ()
                return ids
            context = (token, cwd or here(), env or {}, umask)
            return self.insert(db, commands, options or {}, *context)

    def insert(
        self, db: Transaction, commands: Sequence[Any], options: Mapping[str, Any],
        token: str | None, cwd: str, env: Mapping[str, str], umask: int | None,
        is_limited: bool = True,
    ) -> Added:  # fmt: skip
        """Insert a request and its tasks, within the transaction of a caller."""
        sql = f"SELECT coalesce(sum(n), 0) FROM counts WHERE state NOT IN {_DONE}"
        (unfinished,) = db.execute(sql).fetchone()
        if is_limited and unfinished + len(commands) > self.config.retention.max_queue:
            hint = "wait, remove some, or raise retention.max_queue"
            raise DaemonError("QUEUE_FULL", f"{unfinished} unfinished tasks are queued", hint)
        context = (json.dumps(cwd), json.dumps(dict(env)), umask)
        sql = """
            INSERT INTO requests (token, cwd, env, umask, created_at, answer)
            VALUES (?, ?, ?, ?, ?, '')
        """
        request = db.execute(sql, (token, *context, Clock.now())).lastrowid or 0
        count = len(db.events)
        ids = _insert_tasks(db, commands, options, self.config, request)
        if ids.made:
            payload = {"count": len(ids.made), "first": ids.made[0], "last": ids.made[-1]}
            event = Event.make("task.added", payload, f"task {ids.made[0]}")
            db.events.insert(count, (event.type, event, env.get("APEX_HOOKS", "")))
        answer = {"ids": ids, "existing": ids.existing} if ids.existing else ids
        bounds = (min(ids, default=0), max(ids, default=0))
        sql = "UPDATE requests SET first_task = ?, last_task = ?, answer = ? WHERE id = ?"
        db.execute(sql, (*bounds, json.dumps(answer), request))
        return ids

    def find(
        self, state: str | None = None, group: str | None = None, before: int | None = None,
        limit: int = 100, ids: Iterable[int | range] | None = None, hidden: str | None = None,
    ) -> list[Task]:  # fmt: skip
        """Return the newest tasks below `before`, ascending, at most `limit`; none of `hidden`."""
        filters = {
            "t.state = :state": state,
            "t.grp = :grp": group,
            "t.grp <> :hidden": hidden,
            f"t.id IN (SELECT t.id FROM {_ASKED_SQL})": ids,
        }
        sql = _TASK_SQL + "WHERE t.id < :before"
        sql += "".join(f" AND {one}" for one, value in filters.items() if value is not None)
        values = {"state": state, "grp": group, "before": before or INTEGER_MAX, "most": limit}
        values["hidden"] = hidden
        rows = self.database.fetch(sql + " ORDER BY t.id DESC LIMIT :most", values, ids)
        return [_row_to_task(row) for row in reversed(rows)]

    def get(self, task_id: int) -> Task:
        """Return one task. Raises UNKNOWN_TASK."""
        rows = self.database.fetch(_TASK_SQL + "WHERE t.id = ?", (task_id,))
        if not rows:
            raise unknown_task(task_id)
        return _row_to_task(rows[0])

    def is_done(self, task_id: int) -> bool:
        """Tell whether a task has finished, at little cost; one that was removed has."""
        rows = self.database.fetch("SELECT state FROM tasks WHERE id = ?", (task_id,))
        return not rows or State(rows[0][0]) in DONE

    def get_progress(self, ids: Sequence[int | range]) -> tuple[dict[str, Any], int | None]:
        """Return what `wait` answers, and the last task not done. Raises UNKNOWN_TASK."""
        with self.database.lock:
            ((total, pending, percent, running, last),) = self.database.fetch(
                f"""
                SELECT count(*), coalesce(sum(state NOT IN {_DONE}), 0),
                       sum(CASE WHEN state IN {_DONE} THEN 100.0 ELSE coalesce(progress, 0) END),
                       group_concat(CASE state WHEN 'running' THEN t.id END),
                       max(CASE WHEN state NOT IN {_DONE} THEN t.id END)
                FROM {_ASKED_SQL}
                """,
                asked=ids,
            )
            if total != sum(map(len, as_ranges(ids))):
                for task_id in (task_id for one in as_ranges(ids) for task_id in one):
                    self.get(task_id)
            bad_end = self.database.fetch(
                f"""
                SELECT coalesce(a.exit_code, 1)
                FROM {_ASKED_SQL}
                LEFT JOIN attempts a ON a.task_id = t.id AND a.number = t.attempts
                WHERE t.state IN ('failed', 'cancelled', 'skipped') AND a.exit_code IS NOT 0
                ORDER BY asked.at, t.id
                LIMIT 1
                """
            )
        answer = {"total": total, "pending": pending, "status": bad_end[0][0] if bad_end else 0}
        answer["progress"] = percent / total if total else 0.0
        answer["running"] = [*map(int, (running or "").split(",")[:10])] if running else []
        return answer, last

    def get_attempts(self, task_id: int) -> list[dict[str, Any]]:
        """Return the attempts of a task, first to last, one dict a row of `attempts`."""
        sql = "SELECT * FROM attempts WHERE task_id = ? ORDER BY number"
        return [dict(row) for row in self.database.fetch(sql, (task_id,))]

    def get_counts(self) -> dict[str, dict[str, int]]:
        """Return {state: {group: number}}, without the zeros."""
        counts: dict[str, dict[str, int]] = {}
        for state, group, n in self.database.fetch("SELECT state, grp, n FROM counts WHERE n > 0"):
            counts.setdefault(state, {})[group] = n
        return counts

    @insisting
    def change(self, verb: str, ids: Sequence[int | range]) -> tuple[list[int], list[int]]:
        """Cancel, retry or remove tasks, all or (an unknown id) none.

        Return (ids it was done to, ids whose state did not allow it). Of a running task
        that is cancelled the wish is on disk now; whoever runs it sends the signals. Raises
        UNKNOWN_TASK; ILLEGAL_STATE when the keys of all that could be retried are taken.
        """
        act = {"cancel": _cancel, "retry": _retry, "remove": _remove}[verb]
        done: list[tuple[int, int]] = []
        not_done: list[tuple[int, int]] = []
        taken: DaemonError | None = None
        sql = "SELECT state, attempts FROM tasks WHERE id = ?"
        with self.database.write() as db:
            for task_id in (task_id for one in as_ranges(ids) for task_id in one):
                row = db.execute(sql, (task_id,)).fetchone()
                if row is None:
                    raise unknown_task(task_id)
                try:
                    is_done = act(db, task_id, State(row[0]))
                except DaemonError as error:
                    if error.code != "ILLEGAL_STATE":
                        raise
                    is_done, taken = False, error
                (done if is_done else not_done).append((task_id, row[1]))
            if verb == "remove":
                self.database.before_commit(db)  # hooks ask who has added these tasks
                delete_tasks(db, [task_id for task_id, _ in done])
        if taken is not None and not done:
            raise taken
        if verb == "remove":
            remove_logs(self.folder, done)
        return [task_id for task_id, _ in done], [task_id for task_id, _ in not_done]

    def pause(self, group: str | None, on: bool) -> list[str]:
        """Stop or go on with claiming from a group, None: from all; return `get_paused`."""
        if group is not None and group not in self.config.groups:
            raise unknown_group(group, self.config)
        add = "INSERT OR IGNORE INTO paused VALUES (coalesce(:grp, '*'))"
        remove = "DELETE FROM paused WHERE grp = :grp OR :grp IS NULL"
        with self.database.write() as db:
            db.execute(add if on else remove, {"grp": group})
        return self.get_paused()

    def get_paused(self) -> list[str]:
        """Return the paused groups; "*" stands for everything."""
        return [row[0] for row in self.database.fetch("SELECT grp FROM paused ORDER BY grp")]

    def decide_process(self, name: str, what: str, decision: int | None) -> None:
        """Keep what a user decided of a process: "is_up" or "instances"; None: undecided."""
        column = {"is_up": "is_up", "instances": "instances"}[what]
        with self.database.write() as db:
            db.execute("INSERT OR IGNORE INTO processes (name) VALUES (?)", (name,))
            db.execute(f"UPDATE processes SET {column} = ? WHERE name = ?", (decision, name))

    def get_decisions(self) -> dict[str, tuple[bool | None, int | None]]:
        """Return {process: (whether it is to be up, how many instances)}; None: undecided."""
        rows = self.database.fetch("SELECT name, is_up, instances FROM processes")
        return {name: (None if up is None else bool(up), count) for name, up, count in rows}

    def report(
        self, task_id: int, token: str | None = None, run_id: str | None = None,
        tokens: int = 0, cost: float = 0.0, progress: float | None = None, note: str | None = None,
    ) -> bool:  # fmt: skip
        """Add `tokens` and `cost` to a running task's usage, set `progress` and `note`.

        Return True when it is over its budget now: then the wish is on disk. A `run_id` given
        must be the running attempt's. Raises UNKNOWN_TASK, ILLEGAL_STATE.
        """
        with self.database.write() as db:
            task = self.get(task_id)
            if db.execute("SELECT 1 FROM requests WHERE token = ?", (token,)).fetchone():
                return task.wish == Outcome.OVER_BUDGET
            if task.state != State.RUNNING or run_id not in (None, task.run_id):
                how = "has another attempt" if task.state == State.RUNNING else "does not run"
                raise DaemonError("ILLEGAL_STATE", f"task {task_id} {how}", "only what runs can")
            tokens, cost = task.tokens + tokens, task.cost + cost
            progress = task.progress if progress is None else min(progress, 100.0)
            note = task.note if note is None else note
            sql = "UPDATE tasks SET tokens = ?, cost = ?, progress = ?, note = ? WHERE id = ?"
            db.execute(sql, (tokens, cost, progress, note, task_id))
            sql = "INSERT INTO requests (token, answer, created_at) VALUES (?, 'null', ?)"
            db.execute(sql, (token, Clock.now()))
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
        self.next_due: float | None = None  # of the scheduled tasks, at the end of a turn
        self._boot_id = Platform.boot_id()
        self._contexts: dict[int, tuple[dict[str, str], int | None]] = {}

    def turn(
        self, finished: Sequence[tuple[Task, Result]], begun: Sequence[tuple[Task, Begun]],
        room: int, busy: Mapping[str, int], find_keeper: Callable[[bool], str | None],
    ) -> list[Task]:  # fmt: skip
        """One transaction: record all that finished, promote what is due, claim what fits.

        room: how many more can run; busy: running attempts by group; find_keeper: gives the
        keeper of a task, of a suspect one (True), or None. Return what was claimed.
        """
        with self._database.write() as db:
            for task, result in finished:
                self._finish(db, task, result)
            sql = "UPDATE attempts SET pid = ?, start_time = ? WHERE task_id = ? AND number = ?"
            rows = [(what.pid, what.start_time, task.id, task.attempts) for task, what in begun]
            db.executemany(sql, rows)
            sql = "SELECT id, due_at FROM tasks INDEXED BY tasks_due WHERE state = 'scheduled'"
            self.next_due = None
            for task_id, self.next_due in db.execute(sql + " ORDER BY due_at LIMIT 20").fetchall():
                if self.next_due is None or self.next_due > Clock.now():
                    break
                set_state(db, task_id, State.SCHEDULED, State.QUEUED)
            claimed = []
            for task_id, keeper in self._find_ready(db, room, busy, find_keeper) if room else ():
                payload: dict[str, Any] = {}
                set_state(db, task_id, State.QUEUED, State.RUNNING, payload=payload)
                run_id = f"{task_id}-{os.urandom(8).hex()}"
                db.execute(
                    """
                    INSERT INTO attempts (task_id, number, run_id, keeper, boot_id, started_at)
                    SELECT id, attempts, ?, ?, ?, ? FROM tasks WHERE id = ?
                    """,
                    (run_id, keeper, self._boot_id, Clock.now(), task_id),
                )
                claimed.append(self._store.get(task_id))
                payload.update(_attempt_payload(claimed[-1]))
                failpoint("claim")
        return claimed

    def _find_ready(
        self, db: Transaction, room: int, busy: Mapping[str, int],
        find_keeper: Callable[[bool], str | None],
    ) -> list[tuple[int, str]]:  # fmt: skip
        """Return (id, keeper) to claim: one probe a group, then the best over the groups."""
        sql = """
            SELECT grp FROM counts
            WHERE state = 'queued' AND n > 0
              AND NOT EXISTS (SELECT 1 FROM paused WHERE grp IN (counts.grp, '*'))
        """
        groups = db.execute(sql).fetchall()
        shared = find_keeper(False) if groups else None
        if shared is None:
            return []
        sql = "SELECT 1 FROM tasks INDEXED BY tasks_suspect WHERE state = 'queued' AND suspect"
        private = find_keeper(True) if db.execute(sql + " LIMIT 1").fetchone() else None
        found: list[tuple[int, int, int]] = []
        for (group,) in groups:
            section = self._store.config.groups.get(group)
            limit = section.max_concurrent if section else None
            most = room if limit is None else min(room, limit - busy.get(group, 0))
            rows = db.execute(
                """
                SELECT -priority, id, suspect FROM tasks
                WHERE state = 'queued' AND grp = ? AND suspect <= ?
                ORDER BY priority DESC, id
                LIMIT ?
                """,
                (group, private is not None, max(most, 0)),
            )
            found += map(tuple, rows)
        ready: list[tuple[int, str]] = []
        for _, task_id, is_suspect in sorted(found):
            keeper = private if is_suspect else shared
            if keeper is not None and len(ready) < room:
                ready.append((task_id, keeper))
            private = None if is_suspect else private  # one at a time
        return ready

    def _finish(self, db: Transaction, task: Task, result: Result) -> None:
        """Record one result; an attempt that is finished already changes nothing."""
        at: dict[str, Any] = {"id": task.id, "run": task.run_id, "number": task.attempts}
        at.update(result.to_dict(), now=max(result.finished_at or Clock.now(), task.started_at))
        where = "WHERE task_id = :id AND number = :number AND run_id = :run AND outcome IS NULL"
        row = db.execute(f"SELECT wish FROM attempts {where}", at).fetchone()
        if row is None:
            return
        outcome = outcome_of(result, Outcome(row[0]) if row[0] else None)
        if outcome is None:
            db.execute(f"DELETE FROM attempts {where}", at)
            db.execute("UPDATE tasks SET attempts = attempts - 1 WHERE id = :id", at)
            set_state(db, task.id, State.RUNNING, State.QUEUED, None, _attempt_payload(task))
            return
        sql = """
            UPDATE attempts SET outcome = :how, exit_code = :exit_code, signal = :signal,
                                reason = :reason, cpu_s = :cpu_s, max_rss = :max_rss,
                                finished_at = :now
        """
        db.execute(f"{sql} {where}", {**at, "how": outcome.value})
        if outcome != Outcome.OK:
            at["failed"] = outcome in (Outcome.FAILED, Outcome.TIMEOUT)
            at["lost"] = outcome == Outcome.LOST
            at["deferred"] = outcome == Outcome.DEFERRED or is_passing(result.reason)
            db.execute(
                """
                UPDATE tasks SET failures = failures + :failed,
                                 losses = losses + (:lost AND suspect),
                                 suspect = max(suspect, :lost),
                                 deferrals = deferrals + :deferred
                WHERE id = :id
                """,
                at,
            )
        known = task if outcome == Outcome.OK else self._store.get(task.id)
        state, delay_s = next_state(known, outcome, random.random())
        due_at = at["now"] + delay_s if state == State.SCHEDULED else None
        ends = ("exit_code", "signal", "reason")
        payload = {**_attempt_payload(task), "outcome": outcome.value}
        payload.update({name: at[name] for name in ends})
        set_state(db, task.id, State.RUNNING, state, due_at, payload, at["now"])
        task.outcome, task.state = outcome, state

    def get_context(self, task: Task) -> tuple[dict[str, str], int | None]:
        """Return (environment, umask) of the request that added a task."""
        if task.request_id not in self._contexts:
            sql = "SELECT env, umask FROM requests WHERE id = ?"
            ((env, umask),) = self._database.fetch(sql, (task.request_id,))
            if len(self._contexts) >= 64:
                self._contexts.clear()
            self._contexts[task.request_id] = (json.loads(env), umask)
        return self._contexts[task.request_id]

    @insisting
    def set_wishes(self, ids: Sequence[int], wish: Outcome) -> None:
        """Write down why these running tasks are about to be ended."""
        with self._database.write() as db:
            for task_id in ids:
                set_wish(db, task_id, wish)

    def prune(self, by_age: bool = True) -> list[int]:
        """Forget some tasks past retention, with their logs; return their ids.

        None that others still wait for, at most PRUNE_BATCH. by_age False: only those beyond
        `retention.tasks`.
        """
        keep = self._store.config.retention
        cutoff = Clock.now() - keep.days * 86400 if by_age else 0.0
        with self._database.write() as db:
            sql = f"SELECT coalesce(sum(n), 0) - ? FROM counts WHERE state IN {_DONE}"
            (excess,) = db.execute(sql, (keep.tasks,)).fetchone()
            rows = db.execute(
                """
                SELECT id, attempts, finished_at FROM tasks
                WHERE finished_at < ?
                  AND NOT EXISTS (SELECT 1 FROM deps JOIN tasks c ON c.id = deps.child
                                  WHERE deps.parent = tasks.id AND c.finished_at IS NULL)
                ORDER BY finished_at
                LIMIT ?
                """,
                (INTEGER_MAX if excess > 0 else cutoff, PRUNE_BATCH),
            ).fetchall()
            gone = [tuple(row)[:2] for n, row in enumerate(rows) if n < excess or row[2] < cutoff]
            ids = [task_id for task_id, _ in gone]
            delete_tasks(db, ids)
        remove_logs(self._store.folder, gone)
        return ids

    def get_last_finish(self) -> float:
        """Return when the last task finished that is still known, 0 for none."""
        sql = "SELECT max(finished_at) FROM tasks WHERE finished_at IS NOT NULL"
        return self._database.fetch(sql)[0][0] or 0.0

    def prune_requests(self) -> None:
        """Forget old requests whose tasks are gone."""
        with self._database.write() as db:
            db.execute(
                """
                DELETE FROM requests
                WHERE created_at < ?
                  AND NOT EXISTS (SELECT 1 FROM tasks
                                  WHERE id BETWEEN first_task AND last_task
                                    AND request_id = requests.id)
                """,
                (Clock.now() - TOKEN_KEPT_S,),
            )


class EventStore:
    """The triggers' side of the queue: what they add, and what happened.

    Shares the Database of a TaskStore; any thread; on disk when a method returns.
    """

    def __init__(self, store: TaskStore) -> None:
        self._store = store

    def fire(
        self, source: str, trigger: Any, event: Event, is_behind: bool = False,
        told: Sequence[Event] = (), lines: bytes = b"",
    ) -> int | None:  # fmt: skip
        """Add the task that a trigger stands for; None when `overlap` forbids it.

        source: "schedule.NAME"; event: why, in the task's environment; its
        payload's "scheduled_at" is acted on once, also over crashes. is_behind: it comes after
        unfinished ones, however many. Publishes the event (or `told` in its stead), or
        KIND.skipped. lines: for APEX_EVENT_FILE. Raises QUEUE_FULL.
        """
        at = event.payload.get("scheduled_at")
        with self._store.database.write(is_vital=False) as db:
            last = db.execute("SELECT fired_at FROM fires WHERE source = ?", (source,)).fetchone()
            if last and at is not None and last[0] == at:
                return None
            sql = "SELECT id FROM tasks WHERE key >= ? AND key < ? AND finished_at IS NULL"
            sql += " ORDER BY id"
            unfinished = [one for (one,) in db.execute(sql, (source, source + "!"))]
            task_id = None
            if is_behind or len(unfinished) < {"skip": 1, "queue": 2}[trigger.overlap]:
                key = f"{source} {event.id}" if unfinished else source
                given = {"key": key, "after": [f"{one}:any" for one in unfinished[-1:]] or None}
                env = capture_environment(self._store.config.env_keep)
                task_id = self._insert(db, trigger, trigger.command, event, env, given)
                if lines:
                    write_atomically(event_path(self._store.folder, task_id), lines)
            sql = """
                INSERT INTO fires (source, fired_at, task_id) VALUES (?, ?, ?)
                ON CONFLICT (source) DO UPDATE
                SET fired_at = coalesce(excluded.fired_at, fired_at), task_id = excluded.task_id
            """
            db.execute(sql, (source, event.payload.get("scheduled_at", event.time), task_id))
            kind = event.type.partition(".")[0]
            skipped = Event.make(f"{kind}.skipped", event.payload, event.source)
            told = [skipped] if task_id is None else told or [event]
            db.events += [(one.type, one, "") for one in told]
        return task_id

    def _insert(
        self, db: Transaction, trigger: Any, command: Any, event: Event, env: Mapping[str, str],
        given: Mapping[str, Any], token: str | None = None,
    ) -> int:  # fmt: skip
        """Insert a trigger's task, with its options, `given` over them; return its id."""
        store, options = self._store, {name: getattr(trigger, name, None) for name in TASK_READERS}
        env = {**env, **trigger.env, "APEX_EVENT": json.dumps(event.to_dict())}
        where = token, os.path.join(store.project, trigger.cwd), env, None
        is_limited = token is None  # a full queue must not keep a result from its record
        return store.insert(db, [command], {**options, **given}, *where, is_limited)[0]

    def start_hooks(self, db: Transaction) -> None:
        """Insert the tasks of all hooks that match events of a transaction.

        These tasks' own events included. A hook is not started by what it led to itself, nor
        any after HOPS_MAX others.
        """
        config, inherited = self._store.config, dict[str, str]()
        for at, (type, *_) in enumerate(db.events if config.hooks else ()):  # it grows meanwhile
            for name, hook in self._find_hooks(type):
                event, chain, *rest = db.make_event(at), *db.events[at][2:]
                if rest:  # of a task
                    sql = "SELECT env FROM requests JOIN tasks ON request_id = requests.id"
                    row = db.execute(sql + " WHERE tasks.id = ?", (event.payload["id"],)).fetchone()
                    chain = json.loads(row[0]).get("APEX_HOOKS", "") if row else ""
                before = chain.split(",") if chain else []
                event.hops, token = len(before), f"{event.id} {name}"
                db.events[at] = (type, event, chain)
                is_loop = name in before or len(before) >= HOPS_MAX
                sql = "SELECT 1 FROM requests WHERE token = ?"
                if is_loop or db.execute(sql, (token,)).fetchone():
                    continue
                inherited = inherited or capture_environment(config.env_keep)
                env = {**inherited, "APEX_HOOKS": ",".join([*before, name])}
                command, given = hook.command or DELIVER, {"label": hook.label or f"{name}: {type}"}
                self._insert(db, hook, command, event, env, given, token)

    def _find_hooks(self, type: str) -> list[tuple[str, Any]]:
        return [
            (name, hook)
            for name, hook in self._store.config.hooks.items()
            if hook.enabled and any(fnmatch.fnmatchcase(type, one) for one in hook.on)
        ]

    def register(self, specs: Mapping[str, str], now: float) -> dict[str, float]:
        """Note what each schedule fires by, {source: spec}, and forget all others.

        Returns until when each is dealt with: its last fire, or now when its spec is new.
        """
        new = """
            INSERT INTO fires (source, spec, spec_at) VALUES (?, ?, ?)
            ON CONFLICT (source) DO UPDATE SET spec = excluded.spec, spec_at = excluded.spec_at
            WHERE spec IS NOT excluded.spec OR spec_at > excluded.spec_at  -- the clock was ahead
        """
        sql = "SELECT source, max(coalesce(fired_at, 0), spec_at) FROM fires WHERE spec IS NOT NULL"
        with self._store.database.write(is_vital=False) as db:
            db.executemany(new, [(*one, now) for one in specs.items()])
            seen = dict(db.execute(sql).fetchall())
            gone = [(source,) for source in seen.keys() - specs.keys()]
            db.executemany("DELETE FROM fires WHERE source = ?", gone)
        return seen

    def get_fires(self) -> dict[str, tuple[float | None, int | None]]:
        """Return when each trigger acted last, and the task it made: {source: (at, id)}."""
        rows = self._store.database.fetch("SELECT source, fired_at, task_id FROM fires")
        return {source: (at, task_id) for source, at, task_id in rows}

    def publish(self, type: str, payload: Mapping[str, Any], source: str) -> None:
        """Publish an event that is not a change of a task; errors are only logged."""
        try:
            self.emit(Event.make(type, payload, source))
        except DaemonError as error:
            log.error("event %s is lost: %s", type, error)

    def emit(self, event: Event, hooks: str = "") -> None:
        """Publish an event, once for its id; the tasks of its hooks are on disk on return.

        hooks: those that led to it, separated by commas. Raises DATABASE_FAILED.
        """
        if not self._find_hooks(event.type):
            self._store.dispatch([event])
            return
        with self._store.database.write(is_vital=False) as db:
            db.events.append((event.type, event, hooks))


# ============================================================================
# 10. KEEPER - the process that owns all children, and the daemon's end of it
#     Uses 1-9. Keeper: a process of one thread. Keepers: one thread looks, any
#     sends. Closed by: whoever made it.
# ============================================================================

# What owns the children must be so small that it does not die. So they are children of a
# keeper: a second process of this file, of one thread, that does nothing else. A daemon that is
# killed or replaced hangs up; the keeper and the children do not notice, and the next daemon
# connects and asks. The words, each a frame of JSON (fields are only ever added):
#
#   keeper  hello {keeper: 1, pid, file: [device, inode], runs: [{run, pid, at, age_s}],
#                  ended: [run], pings}
#           started {run, pid, at} | failed {run, errno, what, text}
#           exited {run, code | signal, at, ran_s, cpu_s, max_rss}
#   daemon  start {run, argv, cwd, env, umask, log, sweep, limits, nice, ids}
#           signal {run, number}; end {run, number, grace}; forget {runs}; ping -> pong; quit
#
#   - An attempt is on disk, with the name of its keeper, before `start` is sent; its result is
#     on disk before `forget` is sent. What was not forgotten is told again to each daemon.
#   - A keeper has one daemon. When the next one connects, it closes the former connection and
#     drops what it had not read of it, then greets: a run that `hello` does not name, neither
#     among `runs` nor among `ended`, never will start.
#   - The keeper never waits for its daemon. Without one it appends what ends to its file,
#     run/keeper-NAME, and leaves, with the line `left`, when the last child has ended.
#   - It holds the lock of its file for life; a child inherits that until its exec. While the
#     lock is held nothing is concluded. When it is free, the keeper is gone: a result in the file
#     counts; with `left` there was no other run; else no status can ever come, and what
#     carries the run id, the state folder and the user of the run is ended before it is `lost`.


def describe_end(result: Result) -> str:
    """Say in a few words how a child ended."""
    if result.never_ran or result.reason:
        return result.reason or "it never ran"
    if result.signal is not None:
        name = next((one.name for one in signal.Signals if one == result.signal), "")
        return f"signal {result.signal} {name}".rstrip()
    known = result.exit_code is not None
    return f"exit {result.exit_code}" if known else "no status: its keeper or the system ended"


def read_result(word: Mapping[str, Any]) -> Result:
    """Turn `exited` or `failed` into a Result. Raises ValueError, TypeError, KeyError."""
    if word["type"] == "failed":
        name, what = errno.errorcode.get(int(word["errno"]), "EINVAL"), str(word["what"])
        is_missing = name == "ENOENT" and "/" not in what
        text = "command not found" if is_missing else str(word["text"])
        code = 127 if name == "ENOENT" else 126
        return Result(exit_code=code, reason=f"spawn:{name} {what:.200}: {text}")
    fields = {key: word.get(key) for key in ("ran_s", "cpu_s", "max_rss")}
    fields.update(finished_at=float(word["at"]), is_interrupted=word.get("interrupted"))
    if "signal" in word:
        number = int(word["signal"])
        return Result(exit_code=128 + number, signal=number, **fields)
    return Result(exit_code=int(word["code"]), **fields)


def pack_frame(message: Mapping[str, Any]) -> bytes:
    """Return a message as a frame: four bytes of length, big-endian, and JSON (no escapes)."""
    data = json.dumps(message, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return struct.pack(">I", len(data)) + data


def take_frames(inbox: bytearray) -> Iterator[dict[str, Any]]:
    """Yield the whole frames at the head of a buffer, and remove them. Raises ValueError."""
    while len(inbox) >= 4:
        (length,) = struct.unpack_from(">I", inbox)
        if not 0 < length <= 2 * FRAME_MAX_BYTES:
            raise ValueError(f"a frame of {length} bytes")
        if len(inbox) < 4 + length:
            return
        message = json.loads(inbox[4 : 4 + length])
        del inbox[: 4 + length]
        if not isinstance(message, dict):
            raise ValueError("a frame that is no object")
        yield message


class Watched:
    """Sockets that a loop waits for, and a wakeup that is kept until the loop has seen it."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self.waker, wakee = socket.socketpair()
        for end in (self.waker, wakee):
            end.setblocking(False)
        self.add(wakee, functools.partial(self._calm, wakee))

    def _calm(self, wakee: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            wakee.recv(4096)

    def wake(self) -> None:
        """Make `wait` return."""
        with contextlib.suppress(OSError):  # full: it is awake
            self.waker.send(b"x")

    def add(self, place: socket.socket, act: Callable[[], object]) -> None:
        """Have `act` called by `wait` whenever a socket can be read."""
        self._selector.register(place, selectors.EVENT_READ, act)
        self.wake()

    def expect(self, place: socket.socket, is_full: bool) -> None:
        """Have it called also when the socket, now full, can be written."""
        mask = selectors.EVENT_READ | (selectors.EVENT_WRITE if is_full else 0)
        key = self._selector.get_key(place)
        if key.events != mask:
            self._selector.modify(place, mask, key.data)

    def remove(self, place: socket.socket) -> None:
        """End that, before the socket is closed."""
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(place)

    def wait(self, seconds: float) -> None:
        """Wait, so long at most, for sockets, and call what is to be called."""
        ready = self._selector.select(None if seconds == float("inf") else seconds)
        for key, _ in ready or self._selector.select(0.0):  # frozen meanwhile: it says nothing
            key.data()

    def close(self) -> None:
        """Forget all sockets."""
        self._selector.close()


class Wire:
    """A connection, at times none, that carries frames and never waits for its other end."""

    def __init__(self, watched: Watched) -> None:
        self._watched = watched
        self.connection: socket.socket | None = None
        self._inbox, self.outbox = bytearray(), bytearray()

    def take(self, connection: socket.socket, act: Callable[[], object]) -> None:
        """Use a connection; `act` is called when something has come."""
        connection.setblocking(False)
        self.connection = connection
        self._watched.add(connection, act)

    def drop(self) -> None:
        """Close the connection, with all that was on its way."""
        if self.connection is not None:
            self._watched.remove(self.connection)
            self.connection.close()
        self.connection = None
        self._inbox, self.outbox = bytearray(), bytearray()

    def send(self, kind: str, **fields: object) -> None:
        """Put a word into the buffer that `flush` sends."""
        self.outbox += pack_frame({"type": kind, **fields})

    def flush(self) -> bool:
        """Send as much as the other end takes now; tell whether something is left."""
        if self.outbox and self.connection is not None:
            with contextlib.suppress(OSError):  # `read` gets the end-of-file
                del self.outbox[: self.connection.send(self.outbox)]
        return bool(self.outbox)

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the words that have come. Raises EOFError, ValueError."""
        assert self.connection is not None
        try:
            data = self.connection.recv(1 << 18)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._inbox += data
        yield from take_frames(self._inbox)
        if not data:
            raise EOFError


class _Child:
    """What a keeper knows of a living child; times are monotonic."""

    __slots__ = ("began_mono", "is_swept", "kill_mono", "pid", "run", "tell_mono")

    def __init__(self, run: str, pid: int, is_swept: bool) -> None:
        self.run, self.pid, self.is_swept = run, pid, is_swept
        self.began_mono, self.kill_mono = Clock.mono(), float("inf")
        self.tell_mono = float("inf")  # when the daemon is told that it runs

    def describe(self) -> dict[str, Any]:
        """Return what `hello` and `started` say of it."""
        self.tell_mono = float("inf")
        age_s = round(Clock.mono() - self.began_mono, 3)
        at = Platform.start_time(self.pid)
        return {"run": self.run, "pid": self.pid, "at": at, "age_s": age_s}


class Keeper:
    """The process that owns the children: a loop that starts, ends, reaps them and tells.

    It wakes only for a child or a word. Life: run, until nobody needs it any more.
    """

    def __init__(self, folder: str, name: str) -> None:
        self._path = os.path.join(folder, "run", "keeper-" + name)
        self._children: dict[int, _Child] = {}  # by PID
        self._runs: dict[str, _Child] = {}
        self._ended: dict[str, dict[str, Any]] = {}  # results, until they are forgotten
        self._unwritten: dict[str, dict[str, Any]] = {}  # of these, those not in the file
        self._untold: deque[dict[str, Any]] = deque()  # words for the daemon that is connected
        self._is_wanted = True  # until `quit`, or a hang-up, or no daemon came
        self._is_terminated = False
        self._is_broken = False  # the file cannot be written
        self._patience_mono = Clock.mono() + KEEPER_PATIENCE_S
        self._watched = Watched()
        self._daemon = Wire(self._watched)
        self._listener, self._endpoint = Platform.listen(self._path + ".sock")
        self._listener.setblocking(False)
        self._watched.add(self._listener, self._meet)
        self._fd = self._make_file()

    def _make_file(self) -> int:
        """Make the file, and lock it for life."""
        fd = open_file(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND)
        while not Platform.lock(fd):  # the daemon is having a look
            threading.Event().wait(0.001)
        head = {"keeper": KEEPER_PROTOCOL, "pid": os.getpid(), "boot": Platform.boot_id()}
        os.write(fd, json.dumps({**head, **self._endpoint}).encode() + b"\n")
        return fd

    def run(self) -> None:
        """Serve until nobody needs it."""
        signal.set_wakeup_fd(self._watched.waker.fileno(), warn_on_full_buffer=False)
        for name in Platform.SIGNALS:  # none is ignored, or children would ignore it, too
            signal.signal(getattr(signal, name), self._note_signal)
        while self._is_needed() or (self._unwritten and not self._is_broken):
            self._watched.wait(self._next_wake_s())
            for pid, how in Platform.reap(self._sweep):
                self._note_end(pid, how)
            self._act_on_time()
            self._write()
            self._tell()
        self._leave()

    def _note_signal(self, number: int, _: object) -> None:
        self._is_terminated |= number == signal.SIGTERM

    def _next_wake_s(self) -> float:
        children = self._children.values()
        times = [time for child in children for time in (child.kill_mono, child.tell_mono)]
        if self._daemon.connection is None:
            times.append(Clock.mono() + 1.0 if self._unwritten else self._patience_mono)
        return max(min(times, default=float("inf")) - Clock.mono(), 0.0)

    def _is_needed(self) -> bool:
        if self._daemon.connection is None and Clock.mono() >= self._patience_mono:
            self._is_wanted = False
        return bool(self._children) or (self._is_wanted and not self._is_terminated)

    def _meet(self) -> bool:
        """Take the next daemon in the place of the former one, and greet it, if there is one."""
        try:
            peer = self._listener.accept()[0]
        except BlockingIOError:
            return False
        except OSError:
            threading.Event().wait(0.05)  # no descriptor: do not spin
            return False
        peer.settimeout(1.0)
        token = self._endpoint.get("token", "")
        with contextlib.suppress(OSError):
            shown = peer.recv(len(token), socket.MSG_WAITALL).decode("ascii", "replace")
            if shown == token and Platform.peer_uid(peer) in (None, 0):
                self._daemon.drop()
                self._daemon.take(peer, self._read)
                self._is_wanted, self._patience_mono = True, float("inf")
                info = os.fstat(self._fd)
                runs = [child.describe() for child in self._children.values()]
                hello = {"type": "hello", "keeper": KEEPER_PROTOCOL, "pid": os.getpid(), "pings": 1}
                hello.update(file=[info.st_dev, info.st_ino], runs=runs, ended=list(self._ended))
                self._untold = deque((hello, *self._ended.values()))
                return True
        peer.close()
        return False

    def _hang_up(self) -> None:
        """Go on without a daemon: what was not forgotten goes to the file."""
        self._daemon.drop()
        self._is_wanted = False
        if os.fstat(self._fd).st_nlink == 0:  # the project was removed
            for child in self._children.values():
                Platform.signal_group(child.pid, Platform.kill)
            self._is_terminated = True

    def _read(self) -> None:
        if self._daemon.connection is None or self._meet():  # what the former one sent is dropped
            return
        try:
            for word in self._daemon.read():
                self._obey(word)
        except (EOFError, ValueError, TypeError, KeyError, AttributeError):  # or not our protocol
            self._hang_up()

    def _obey(self, word: dict[str, Any]) -> None:
        kind, child = word["type"], self._runs.get(word.get("run", ""))
        if kind == "start":
            self._start(str(word["run"]), word)
        elif kind == "signal" and child is not None:
            Platform.send(child.pid, int(word["number"]))
        elif kind == "end" and child is not None:
            child.is_swept = True
            child.kill_mono = min(child.kill_mono, Clock.mono() + float(word["grace"]))
            Platform.signal_group(child.pid, int(word["number"]))
        elif kind == "forget":
            for run in word["runs"]:
                self._ended.pop(run, None)
                self._unwritten.pop(run, None)
        elif kind == "quit":
            self._is_wanted = False
        elif kind == "ping":
            self._untold.append({"type": "pong"})

    def _start(self, run: str, word: dict[str, Any]) -> None:
        failpoint("read")
        if run in self._ended:
            self._untold.append(self._ended[run])
            return
        try:
            if self._is_terminated:
                raise OSError(errno.EAGAIN, "the keeper was told to end", "keeper")
            child = self._runs.get(run) or self._spawn(run, word)
        except (OSError, ValueError) as error:
            number = getattr(error, "errno", None) or errno.EINVAL
            text = getattr(error, "strerror", None) or str(error)
            what = str(getattr(error, "filename", None) or word["argv"][0])
            self._note({"type": "failed", "run": run, "errno": number, "what": what, "text": text})
            return
        self._children[child.pid] = self._runs[run] = child
        child.tell_mono = Clock.mono() + STARTED_S

    def _spawn(self, run: str, word: dict[str, Any]) -> _Child:
        path = str(word["log"])
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | (_O_SAFE if path != os.devnull else 0)
        try:
            log_fd = os.open(path, flags, 0o600)
        except FileNotFoundError:
            folder, info = os.path.dirname(path), os.fstat(self._fd)
            mine = os.path.join(os.path.dirname(folder), "run", os.path.basename(self._path))
            if file_id(mine) != (info.st_dev, info.st_ino):
                raise OSError(errno.EAGAIN, "the state folder was moved", "keeper") from None
            os.makedirs(folder, mode=0o700, exist_ok=True)  # removed by somebody
            log_fd = os.open(path, flags, 0o600)
        try:
            Platform.lock(log_fd, shared=True)
            pid = Platform.spawn(word, log_fd, self._watched.wake)
        finally:
            os.close(log_fd)
        failpoint("spawn")
        return _Child(run, pid, bool(word.get("sweep")))

    def _sweep(self, pid: int) -> None:
        """End a child's group while its dead leader still holds the number."""
        if pid in self._children and self._children[pid].is_swept:
            Platform.signal_group(pid, Platform.kill)

    def _note_end(self, pid: int, how: dict[str, Any]) -> None:
        child = self._children.pop(pid, None)
        if child is None:
            return
        del self._runs[child.run]
        failpoint("exited")
        word = {"type": "exited", "run": child.run, "at": round(Clock.now(), 3), **how}
        word["ran_s"] = round(Clock.mono() - child.began_mono, 6)
        if self._is_terminated and "signal" in how:
            word["interrupted"] = True
        self._note(word)

    def _note(self, result: dict[str, Any]) -> None:
        self._ended[result["run"]] = self._unwritten[result["run"]] = result
        self._untold.append(result)

    def _act_on_time(self) -> None:
        """KILL what is late; tell of what started a moment ago: of the rest the end is enough."""
        now = Clock.mono()
        for child in self._children.values():
            if now >= child.tell_mono:
                self._untold.append({"type": "started", **child.describe()})
            if now >= child.kill_mono:
                child.kill_mono = now + 1.0
                Platform.signal_group(child.pid, Platform.kill)

    def _write(self) -> None:
        """Append the results that no daemon hears."""
        if self._daemon.connection is None or not self._is_needed():
            while self._unwritten and self._append(next(iter(self._unwritten.values()))):
                del self._unwritten[next(iter(self._unwritten))]

    def _append(self, word: Mapping[str, Any]) -> bool:
        """Append a line, that a torn one cannot swallow. False: not yet, or (broken) never."""
        line = f"\n{json.dumps(word)}\n".encode()
        try:
            if word["type"] == "left":
                os.fsync(self._fd)
            self._is_broken = False
            return os.write(self._fd, line) == len(line)
        except OSError as error:  # a full disk: tried again each second
            self._is_broken = error.errno not in (errno.ENOSPC, errno.EDQUOT)
            return False

    def _tell(self) -> None:
        """Send what there is to tell, as far as the daemon takes it."""
        wire = self._daemon
        if wire.connection is None:
            self._untold.clear()
            return
        is_full = wire.flush()
        while self._untold and not is_full:
            while self._untold and len(wire.outbox) < KEEPER_BUFFER_BYTES:
                wire.outbox += pack_frame(self._untold.popleft())
            is_full = wire.flush()
        self._watched.expect(wire.connection, is_full)

    def _leave(self) -> None:
        """Say that all results are in the file; then let go of it."""
        with contextlib.suppress(OSError):
            os.unlink(self._path + ".sock")
        while os.fstat(self._fd).st_nlink and not self._is_broken:
            if self._append({"type": "left"}):
                return
            threading.Event().wait(1.0)


def run_keeper(folder: str, name: str) -> int:
    """Be a keeper; return its exit status."""
    os.umask(0o077)
    os.chdir(folder)
    reset_signals()
    try:
        Keeper(folder, name).run()
    except Exception:  # this process's top frame
        import traceback

        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        with open(open_file(os.path.join(folder, "daemon.log"), flags), "a") as file:
            file.write(f"keeper {name}: {traceback.format_exc()}")
        return CODES["INTERNAL"][0]
    return 0


def spawn_keeper(folder: str, name: str) -> Any:
    """Start a keeper, return its Popen. Raises OSError."""
    env = {k: v for k, v in os.environ.items() if k not in TASK_MARKS}
    argv = [sys.executable, "-I", "-S", launcher_path(folder), "_keeper", folder, name]
    null = subprocess.DEVNULL
    for options in Platform.KEEPER:  # the first that the system permits
        with contextlib.suppress(PermissionError):
            files: Any = dict.fromkeys(("stdin", "stdout", "stderr"), null)
            process = subprocess.Popen(argv, env=env, **files, **options)
            Platform.change_limits(process.pid)
            return process
    raise PermissionError(errno.EPERM, "not permitted", argv[0])


def read_results(text: bytes) -> tuple[dict[str, Result], bool]:
    """Read the file of a keeper that has gone: ({run id: result}, whether it left by itself)."""
    results: dict[str, Result] = {}
    has_left = False
    for line in filter(None, text.split(b"\n")[1:]):
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            word = json.loads(line)
            has_left = word["type"] == "left"
            if not has_left:
                results[str(word["run"])] = read_result(word)
    return results, has_left


class Ward(Value):
    """What the daemon knows of a child; `tell` gets Begun once or never, then a Result once.

    It is called by the thread that looks, with no lock held.
    """

    run_id: str
    keeper: str | None  # its name; None: of a version that had none
    boot_id: str
    user: int  # it was started as
    log_path: str
    is_process: bool  # nothing of it may outlive its command
    is_suspect: int  # its keeper is its own
    tell: Callable[[Begun | Result], None]
    pid: int | None
    start_time: str | None
    ending: tuple[int, float] | None  # signal, monotonic time of the KILL
    result: Result | None  # told, while what is left of it is ended
    sweep_mono: float  # the next look for what is left of it
    since_mono: float  # the first one


def sweep(wards: dict[str, Ward], folder: str) -> Iterator[Ward]:
    """KILL what is left of ended runs that are due; remove and yield those nothing is left of.

    One with a status counts, late, though something that is hidden holds its log.
    """
    now = Clock.mono()
    due = [ward for ward in wards.values() if ward.sweep_mono <= now]
    if not due:
        return
    found, is_sure = Platform.find_runs({ward.run_id: ward.user for ward in due}, folder)
    living = {run_id for run_id, _ in found}
    for run_id, pid in found:
        Platform.kill_run(pid, run_id)
    for ward in due:
        has_status = ward.result is not None and ward.result.exit_code is not None
        if not has_status and is_leader_alive(ward, folder):
            Platform.signal_group(ward.pid or 0, Platform.kill)
            living.add(ward.run_id)
        took_s = now - ward.since_mono
        is_empty = is_sure and ward.run_id not in living and is_unlocked(ward.log_path)
        if is_empty or (has_status and took_s > SWEEP_MAX_S):
            del wards[ward.run_id]
            yield ward
            continue
        next_mono = now + min(max(took_s, SWEEP_PAUSE_S), 1.0)  # twice as long after the first
        if ward.sweep_mono < ward.since_mono + 0.5 <= next_mono:  # once
            log.warning("waiting for what is left of run %s", ward.run_id)
        ward.sweep_mono = next_mono


def is_leader_alive(ward: Ward, folder: str) -> bool:
    """Tell whether the command of a lost run lives.

    Its PID was not used again, and it is not that of another project, which this one is a
    copy of.
    """
    pid, is_known = ward.pid or 0, ward.pid and ward.start_time
    present = Platform.boot_id(), Platform.start_time(pid)
    if not is_known or (ward.boot_id, ward.start_time) != present:
        return False
    theirs = Platform.environment_of(pid).get("APEX_STATE_DIR", folder)
    return theirs == folder or not os.path.isdir(theirs)


class _Link(Wire):
    """The way to one keeper: starting -> reached -> greeted; again, or gone."""

    def __init__(self, watched: Watched, path: str, process: Any, is_private: bool) -> None:
        super().__init__(watched)
        self.path, self.process, self.is_private = path, process, is_private
        self.name = path.rpartition("-")[2]
        self.pid, self.file_id = 0, [0, 0]
        self.is_foreign = self.is_quitting = self.has_pings = False
        self.drop()

    def drop(self) -> None:
        """Close the connection; the keeper is to be reached anew, or has gone."""
        super().drop()
        self.is_greeted = False
        self.asked_mono: float | None = Clock.mono()  # since when it owes an answer
        self.retry_mono = 0.0

    def is_silent(self) -> bool:
        """Tell whether it has owed an answer for too long."""
        return self.asked_mono is not None and Clock.mono() - self.asked_mono > KEEPER_ANSWER_S

    def takes_starts(self) -> bool:
        """Tell whether it is there, for everybody, and answers."""
        return self.is_greeted and not (self.is_private or self.is_quitting or self.is_silent())

    def reach(self, act: Callable[[], object]) -> bytes | None:
        """Try to connect; None: perhaps later, else it has gone and this is what its file says."""
        now = Clock.mono()
        waited_s = now - (self.asked_mono or now)
        self.retry_mono = now + min(max(waited_s / 5, 0.002), 1.0)
        is_ended = self.process is None or self.process.poll() is not None
        try:
            fd = os.open(self.path, os.O_RDONLY | _O_SAFE)
        except OSError as error:
            return b"" if is_ended and error.errno == errno.ENOENT else None
        with os.fdopen(fd, "rb") as file:
            if Platform.lock(fd):  # else it has it, or is about to
                return file.read(KEEPER_FILE_MAX_BYTES) if is_ended else None
            info = os.fstat(fd)
            self.file_id = [info.st_dev, info.st_ino]
            with contextlib.suppress(ValueError, TypeError, KeyError, OSError):
                head = json.loads(file.readline(4096))
                self.is_foreign |= head["keeper"] != KEEPER_PROTOCOL
                if self.is_foreign:  # it ends by itself: look for its lock
                    self.retry_mono, self.asked_mono = now + 1.0, None
                else:
                    connection = Platform.connect(os.path.dirname(self.path), head, 1.0)
                    connection.sendall(head.get("token", "").encode())
                    self.take(connection, act)
                    self.asked_mono = self.asked_mono or now
        return None


class _Roster:
    """The keepers that there are: found, started, connected to, gone. Keepers says what then."""

    _take: Callable[[_Link, dict[str, Any]], None]
    _conclude: Callable[[str | None, Mapping[str, Result], bool], None]

    def __init__(self, folder: str, is_starter: bool) -> None:
        self._folder = os.path.abspath(folder)
        self._folder_id = file_id(self._folder)
        self._lock = threading.RLock()  # guards all that follows, there too
        self._links: dict[str, _Link] = {}
        self._is_open = False
        self._is_starter = is_starter  # else nothing new is to be run
        self._next_spawn = 0.0  # monotonic
        self._spawned: set[str] = set()  # the names of those started here
        self._obstacle = "it is being started"  # why no keeper stands
        self._looked_mono = Clock.mono()  # when `look` was called last
        self.watched = Watched()
        self.wake = self.watched.wake  # makes `look` return

    def _path(self, name: str) -> str:
        return os.path.join(self._folder, "run", "keeper-" + name)

    def _add(self, name: str, process: Any = None, is_private: bool = False) -> None:
        self._links[name] = _Link(self.watched, self._path(name), process, is_private)

    def has_lost_folder(self) -> bool:
        """Tell whether the state folder was moved or removed: nothing is to be started then."""
        return file_id(self._folder) != self._folder_id

    def standing(self) -> str | None:
        """Return the name of the keeper that takes starts; None: none does now."""
        with self._lock:
            links = () if self.has_lost_folder() else self._links.values()
            return next((link.name for link in links if link.takes_starts()), None)

    def silent(self) -> list[int]:
        """Return the PIDs of keepers that have owed an answer for too long."""
        with self._lock:
            return [link.pid for link in self._links.values() if link.is_silent()]

    @property
    def obstacle(self) -> str:
        """Why nothing can be started, "" when it can."""
        return "" if self.standing() else self._obstacle

    def has_child(self, pid: int) -> bool:
        """Tell whether a PID is that of a keeper that was started here."""
        with self._lock:
            return any(x.process is not None and x.process.pid == pid for x in self._links.values())

    def is_turning(self, within_s: float) -> bool:
        """Ask for a sign of life; tell whether a keeper gave the last one in time, and `look`."""
        with self._lock:
            links, now = [x for x in self._links.values() if x.is_greeted], Clock.mono()
            ages = [now - (link.asked_mono or now) for link in links]
            for link in links:
                if link.has_pings and link.asked_mono is None:
                    link.asked_mono = now
                    link.send("ping")
            self.flush()
        return min(ages, default=0.0) < within_s and now - self._looked_mono < within_s

    def flush(self) -> None:
        """Send what there is to send, as far as the keepers take it now."""
        with self._lock:
            for link in self._links.values():
                if link.flush():
                    self.wake()  # `look` waits until it can go on

    def _tend(self) -> float:
        """Reach keepers, start one if none takes starts; return how long nothing is due."""
        now, times = Clock.mono(), [float("inf")]
        for link in list(self._links.values()):
            if link.connection is None and now >= link.retry_mono:
                self._reach(link)
            if link.connection is None:
                times.append(link.retry_mono)
                continue
            self.watched.expect(link.connection, bool(link.outbox))
            if link.asked_mono is not None and not link.is_silent():
                times.append(link.asked_mono + KEEPER_ANSWER_S + 0.1)
        links = [link for link in self._links.values() if not link.is_private]
        is_starter = self._is_open and self._is_starter and not self.has_lost_folder()
        if is_starter and all(x.is_foreign or x.is_quitting or x.is_silent() for x in links):
            if now >= self._next_spawn:
                self._spawn()
            times.append(self._next_spawn)
        return min(times) - Clock.mono()

    def _spawn(self, is_private: bool = False) -> None:
        """Start a keeper; it is reached when its file is there."""
        self._next_spawn, name = Clock.mono() + 1.0, os.urandom(8).hex()
        try:
            self._add(name, spawn_keeper(self._folder, name), is_private)
            self._spawned.add(name)
        except OSError as error:
            self._obstacle = f"no keeper can be started: {error.strerror}"
            log.error("%s", self._obstacle)

    def _reach(self, link: _Link) -> None:
        """Connect to a keeper, or find that it has gone and conclude on its runs."""
        text = link.reach(functools.partial(self._read, link))
        if text is None or self.has_lost_folder():  # its file may only have been moved
            return
        del self._links[link.name]
        if link.process is not None and not text and not link.is_quitting:
            self._obstacle = f"a keeper ended with status {link.process.wait()}"
            log.error("%s", self._obstacle)
        results, has_left = read_results(text)
        if link.pid and not has_left:
            log.warning("the keeper (PID %d) was killed: what it had is ended, and lost", link.pid)
        self._conclude(link.name, results, has_left)

    def _read(self, link: _Link) -> None:
        """Take what a keeper tells; called by `look`."""
        with self._lock:
            if link.connection is None:
                return
            try:
                for word in link.read():
                    link.asked_mono = None
                    self._take(link, word)
                link.flush()
            except (EOFError, ValueError, TypeError, KeyError, AttributeError) as error:
                if not isinstance(error, EOFError):
                    log.error("the keeper %s is not understood: %s", link.name, error)
                    link.is_foreign = True
                link.drop()


class Keepers(_Roster):
    """The daemon's end of its keepers: it starts them, starts and ends children, learns results.

    Any thread may call it; one of them calls `look` in a loop: there words are read, and what
    ended runs left is ended. Life: adopt what ran, open -> look ... -> close.
    """

    def __init__(self, folder: str, is_starter: bool = True) -> None:
        super().__init__(folder, is_starter)
        self._wards: dict[str, Ward] = {}  # by run id, until it is forgotten
        self._swept: dict[str, Ward] = {}  # of these, those whose leader has ended
        self._calls: list[Callable[[], None]] = []  # that `look` is to make
        self._kinds = {"?"}  # of whom all wards are known: "0" tasks, "a" processes, "?" probes
        self.on_standing: Callable[[], None] = lambda: None  # called with no lock held

    def adopt(self, ward: Ward) -> None:
        """Find out what became of a former daemon's run; then `open`."""
        with self._lock:
            self._wards[ward.run_id] = ward

    def open(self, kind: str) -> None:
        """Reach the keepers that live, else start one; of this kind all runs are adopted."""
        with self._lock:
            self._is_open = True
            self._kinds.add(kind)
            for entry in sorted(os.listdir(os.path.join(self._folder, "run"))):
                match = re.fullmatch("keeper-([0-9a-f]{16})", entry)
                if match and match[1] not in self._links:
                    self._add(match[1])
            for link in self._links.values():
                if link.is_greeted:  # it has told of this kind before: once more
                    link.drop()
            for ward in self._wards.values():
                if ward.is_suspect and ward.keeper in self._links:
                    self._links[ward.keeper].is_private = True
            for name in {ward.keeper for ward in self._wards.values()} - self._links.keys():
                self._conclude(name, {}, False)  # its file is gone, and so is it
            self._tend()

    def find_keeper(self, is_suspect: bool) -> str | None:
        """Return who takes a start now, None: nobody; a suspect's has no child but this."""
        if not is_suspect:
            return self.standing()
        with self._lock:
            private = [link for link in self._links.values() if link.is_private]
            for link in private:
                if link.is_greeted and not link.is_quitting and not self._has_wards(link.name):
                    return link.name
            if len(private) < PRIVATE_KEEPERS_MAX and all(link.is_greeted for link in private):
                self._spawn(is_private=True)
        return None

    def _find_link(self, run_id: str) -> _Link | None:
        """Return the keeper that has a run, if it can be told something."""
        ward = self._wards.get(run_id)
        link = self._links.get(ward.keeper or "") if ward is not None else None
        return link if link is not None and link.is_greeted else None

    def start(self, ward: Ward, word: Mapping[str, Any]) -> None:
        """Start a child by the keeper that `ward` names; `flush` sends it."""
        with self._lock:
            self._wards[ward.run_id] = ward
            link = self._find_link(ward.run_id)
            if link is None:  # it has just gone
                self._settle(ward, Result(never_ran=True))
                self.wake()
            else:
                link.send("start", run=ward.run_id, **word)
                link.asked_mono = link.asked_mono or Clock.mono()

    def end(self, run_id: str, number: int, grace_s: float) -> None:
        """Ask all of a run to end, and KILL it after the grace; the first deadline stands."""
        with self._lock:
            ward = self._wards.get(run_id)
            if ward is not None:
                kill_mono = min(Clock.mono() + grace_s, ward.ending[1] if ward.ending else 1e300)
                ward.ending = number, kill_mono
                self._send_ending(ward)
                self.flush()

    def _send_ending(self, ward: Ward) -> None:
        link = self._find_link(ward.run_id)
        if link is not None and ward.ending is not None:
            number, kill_mono = ward.ending
            grace_s = max(kill_mono - Clock.mono(), 0.0)
            link.send("end", run=ward.run_id, number=number, grace=grace_s)

    def signal(self, run_id: str, number: int) -> bool:
        """Send a signal to a child; tell whether there is one that can get it."""
        with self._lock:
            link = self._find_link(run_id)
            if link is None or self._wards[run_id].result is not None:
                return False
            link.send("signal", run=run_id, number=number)
            self.flush()
            return True

    def forget(self, run_ids: Iterable[str]) -> None:
        """Let go of runs whose results are on disk."""
        with self._lock:
            gone = [self._wards.pop(run_id) for run_id in run_ids if run_id in self._wards]
            for name in {ward.keeper or "" for ward in gone}:
                link = self._links.get(name)
                if link is None:
                    self._remove(name)
                elif link.is_greeted:
                    link.send("forget", runs=[x.run_id for x in gone if x.keeper == name])
                    if link.is_private and not self._has_wards(name):
                        link.is_quitting = True
                        link.send("quit")
            self.flush()

    def _has_wards(self, name: str) -> bool:
        return any(ward.keeper == name for ward in self._wards.values())

    def pid_of(self, run_id: str | None) -> int | None:
        """Return the PID of a run's command while it runs."""
        with self._lock:
            ward = self._wards.get(run_id or "")
            return None if ward is None or ward.result is not None else ward.pid

    def explain(self, run_id: str) -> str:
        """Say why the end of a run is not told, "" when there is nothing to say."""
        with self._lock:
            ward = self._wards.get(run_id)
            link = self._links.get(ward.keeper or "") if ward is not None else None
            if run_id in self._swept and Clock.mono() - self._swept[run_id].since_mono > 0.1:
                return "something that it started still lives"
            is_silent = link is not None and link.is_silent()
            return f"its keeper (PID {link.pid}) does not answer" if link and is_silent else ""

    def look(self, timeout_s: float) -> None:
        """Read what keepers tell, and do what is due; return when something happened."""
        failpoint("look")
        self._looked_mono = Clock.mono()
        with self._lock:
            sweep_mono = min((ward.sweep_mono for ward in self._swept.values()), default=1e300)
            due_s = min(self._tend(), sweep_mono - Clock.mono(), timeout_s)
        self.watched.wait(0.0 if self._calls else max(due_s, 0.0))
        with self._lock:
            for ward in sweep(self._swept, self._folder):
                self._tell(ward, ward.result or Result())
            calls, self._calls = self._calls, []
        for call in calls:
            call()

    def _tell(self, ward: Ward, what: Begun | Result) -> None:
        self._calls.append(functools.partial(ward.tell, what))

    def _conclude(self, name: str | None, results: Mapping[str, Result], has_left: bool) -> None:
        """Settle all runs of a keeper that has gone; its file goes with the last of them."""
        rest = Result(never_ran=True) if has_left else Result()
        for ward in self._wards.values():
            if ward.keeper == name and ward.result is None:
                self._settle(ward, results.get(ward.run_id, rest))
        if name is not None:
            self._remove(name)
        else:
            log.warning("what an older apexd left running is ended, then run again")

    def _remove(self, name: str) -> None:
        """Remove the file of a keeper that has gone, once it told all to those it concerns.

        Others' tasks or processes may yet ask whether they ever began.
        """
        is_ours = name in self._spawned or self._kinds >= {"0", "a"}
        if is_ours and not self._has_wards(name):
            for path in (self._path(name), self._path(name) + ".sock"):
                with contextlib.suppress(OSError):
                    insist(os.unlink, path)

    def _take(self, link: _Link, word: dict[str, Any]) -> None:
        kind, run_id = word["type"], str(word.get("run"))
        ward = self._wards.get(run_id)
        if kind == "hello":
            self._greet(link, word)
        elif kind == "started" and ward is not None:
            self._begin(ward, word, False)
        elif kind in ("exited", "failed"):
            if (word.get("errno"), word.get("what")) == (errno.EAGAIN, "keeper"):
                link.is_quitting = True  # it was told to end: another takes what is to start
            if ward is not None and ward.result is None:
                self._settle(ward, read_result(word))
            elif ward is None and self._kind(run_id) in self._kinds:
                link.send("forget", runs=[run_id])

    def _kind(self, run_id: str) -> str:
        return "0" if run_id[:1].isdigit() else "?" if run_id.startswith("?") else "a"

    def _greet(self, link: _Link, word: dict[str, Any]) -> None:
        """Take over the runs that a keeper has; settle those that it never will start."""
        if word["keeper"] != KEEPER_PROTOCOL or word["file"] != link.file_id:
            raise ValueError("another project's, or of another protocol")
        link.is_greeted, link.pid, self._obstacle = True, int(word["pid"]), ""
        link.has_pings = bool(word.get("pings"))  # older ones have none
        runs = {str(run["run"]): run for run in word["runs"]}
        for run_id, told in runs.items():
            ward = self._wards.get(run_id)
            if ward is not None:
                self._begin(ward, told, True)
                self._send_ending(ward)
            elif self._kind(run_id) in self._kinds:  # nobody knows it any more
                link.send("end", run=run_id, number=int(Platform.kill), grace=0.0)
        known = {*runs, *word["ended"]}
        for ward in self._wards.values():
            if ward.keeper == link.name and ward.result is None and ward.run_id not in known:
                self._settle(ward, Result(never_ran=True))
        self._calls.append(self.on_standing)

    def _begin(self, ward: Ward, told: Mapping[str, Any], is_adopted: bool) -> None:
        ward.pid, ward.start_time = int(told["pid"]), told["at"]
        age_s = float(told.get("age_s", 0.0))
        begun = Begun(pid=ward.pid, start_time=told["at"], age_s=age_s, is_adopted=is_adopted)
        self._tell(ward, begun)

    def _settle(self, ward: Ward, result: Result) -> None:
        """A run has come to its end: tell it, at once or when nothing of it is left."""
        ward.result = result
        is_clean = result.exit_code == 0 and not ward.is_process and ward.ending is None
        never_ran = result.never_ran or (result.reason is not None and ward.pid is None)
        if is_clean or never_ran or ward.run_id.startswith("?"):
            self._tell(ward, result)
        else:
            ward.sweep_mono = ward.since_mono = Clock.mono()
            self._swept[ward.run_id] = ward

    def close(self, is_over: bool) -> None:
        """Hang up; is_over: nothing runs any more, so have the keepers leave, and see them go."""
        deadline = Clock.mono() + (KEEPER_QUIT_S if is_over else 0.0)
        with self._lock:
            self._is_open = False
            for link in self._links.values():
                if is_over and link.is_greeted:
                    link.is_quitting = True
                    link.send("quit")
                elif is_over and link.process is not None:  # just started: it would wait for us
                    link.process.terminate()
            self.flush()
        while any(link.is_quitting for link in self._links.values()) and Clock.mono() < deadline:
            self.look(0.05)
        with self._lock:
            for link in self._links.values():
                link.drop()
            self.watched.close()


def is_unlocked(path: str) -> bool:
    """Tell whether nobody has a log open any more that was opened for a child."""
    try:
        fd = os.open(path, os.O_RDONLY | _O_SAFE)
    except OSError as error:
        return error.errno not in SHORTAGES
    try:
        return not stat.S_ISREG(os.fstat(fd).st_mode) or Platform.lock(fd)
    finally:
        os.close(fd)


def make_start(task: Task, env: Mapping[str, str], umask: int | None, store: TaskStore) -> Any:
    """Return what `start` says of a task's running attempt."""
    group = store.config.groups.get(task.group)
    words = [*Platform.SHELL, task.command] if isinstance(task.command, str) else task.command
    marks = {"TASK_ID": task.id, "ATTEMPT": task.attempts, "RUN_ID": task.run_id}
    if '"type": "file.changed"' in env.get("APEX_EVENT", ""):
        marks["EVENT_FILE"] = event_path(store.folder, task.id)
    if task.command == DELIVER:
        words = [sys.executable, "-I", "-S", launcher_path(store.folder), "_deliver"]
        hook = store.config.hooks.get(env.get("APEX_HOOKS", "").rpartition(",")[2])
        marks["HOOK_URL"] = getattr(hook, "url", None) or ""
        if hook is not None and hook.secret_env:  # it goes to the child alone, to no disk
            marks["HOOK_SECRET"] = os.environ.get(hook.secret_env, "")
    return {
        "argv": [*(group.launcher if group else ()), *words],
        "cwd": task.cwd,
        "env": {**env, **make_marks(store, **marks)},
        "umask": 0o022 if umask is None else umask,
        "log": log_path(store.folder, task.id, task.attempts),
        **make_limits(store.config.limits),
    }


def make_marks(store: TaskStore, **marks: object) -> dict[str, str]:
    """Return the APEX_ variables of a child."""
    program = launcher_path(store.folder) + ("" if Platform.is_posix else ".cmd")
    marks.update(PROJECT_PATH=store.project, STATE_DIR=store.folder, CLI=program)
    return {f"APEX_{name}": str(value) for name, value in marks.items()}


def log_reason(path: str, reason: str) -> None:
    """Write why a child could not start to where its output would be."""
    with contextlib.suppress(OSError, DaemonError):
        fd = open_file(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        with os.fdopen(fd, "w", errors="replace") as file:
            file.write(f"apexd: {reason}\n")


def make_limits(options: Any) -> dict[str, Any]:
    """Return what `start` says of limits: a section with memory_mb, cpu_seconds and the like."""
    asked = {
        "RLIMIT_AS": (options.memory_mb or 0) << 20, "RLIMIT_CPU": options.cpu_seconds,
        "RLIMIT_NOFILE": options.open_files, "RLIMIT_NPROC": options.processes,
    }  # fmt: skip
    # The processor time: XCPU first, KILL a second later.
    limits = {name: [n, n + (name == "RLIMIT_CPU")] for name, n in asked.items() if n}
    return {"limits": limits, "nice": options.nice} if limits or options.nice else {}


# ============================================================================
# 11. CRON - when a schedule fires (pure), and the thread that makes it do so
#     Uses 1-9. One thread for all schedules. Started and stopped by: Daemon.
# ============================================================================

# Daylight saving is treated as cronie's cron(8) does. A fixed-time job, one whose minute and
# hour do not begin with *, fires once at the end of a gap that swallowed it, and only in the
# first pass of an hour that comes twice. All others follow the clock on the wall.

CRON_FIELDS = (  # name, lowest, highest, names of the numbers from the lowest on
    ("minute", 0, 59, ""), ("hour", 0, 23, ""), ("day", 1, 31, ""),
    ("month", 1, 12, "jan feb mar apr may jun jul aug sep oct nov dec"),
    ("weekday", 0, 7, "sun mon tue wed thu fri sat"),
)  # fmt: skip
CRON_NAMES = {
    "@hourly": "0 * * * *", "@daily": "0 0 * * *", "@midnight": "0 0 * * *", "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *", "@yearly": "0 0 1 1 *", "@annually": "0 0 1 1 *",
}  # fmt: skip
EPOCH_DAY = 719163  # datetime.date(1970, 1, 1).toordinal()


def read_cron_field(text: str, name: str, low: int, high: int, names: str) -> frozenset[int]:
    """Read one field, such as "1-3,5", "*/10", "5/10" or "mon-fri"."""
    numbers = {word: str(low + index) for index, word in enumerate(names.split())}
    digits = re.sub("(?<!sun)-sun", "-7", text) if high == 7 else text
    digits = re.sub(r"\b[a-z]{3}\b", lambda match: numbers.get(match[0], match[0]), digits)
    found = set[int]()
    for part in digits.split(","):
        match = re.fullmatch(r"(?:\*|([0-9]{1,2})(?:-([0-9]{1,2}))?)(?:/([0-9]{1,3}))?", part)
        start, end, step = match.groups() if match else ("99", None, None)
        first = int(start or low)
        last = int(end or (high if step or not start else first))
        if not low <= first <= last <= high or not int(step or 1):
            form = f"numbers {low}-{high}, 1,2 or 1-5 or *, each with a step as in */5"
            raise ValueError(f"a cron expression: its {name} {text!r} is not {form}")
        found.update(range(first, last + 1, int(step or 1)))
    return frozenset(found)


def read_cron(text: object) -> dict[str, Any]:
    """Read a cron expression, five fields, @daily, @every 90s or @reboot, as a CronSchedule's."""
    words = line_of_text(text).lower().split()
    if words == ["@reboot"]:
        return {}
    if words[:1] == ["@every"]:
        period = duration(" ".join(words[1:]))
        if period % 1 or not 1 <= period <= 366 * DAY_S:
            raise ValueError("@every with whole seconds, a year at most: @every 90s")
        return {"period": int(period)}
    words = CRON_NAMES.get(" ".join(words), " ".join(words)).split()
    if len(words) != len(CRON_FIELDS):
        raise ValueError("five fields, minute hour day month weekday, or @daily, @every 90s")
    minutes, hours, days, months, weekdays = map(read_cron_field, words, *zip(*CRON_FIELDS))
    needs_both = "*" in (words[2][0], words[4][0])
    longest = max(29 if month == 2 else 30 + (month in (1, 3, 5, 7, 8, 10, 12)) for month in months)
    if needs_both and min(days) > longest:
        raise ValueError("a day that exists: this one never fires")
    return {
        "times": sorted(60 * hour + minute for hour in hours for minute in minutes),
        "days": days, "months": months, "weekdays": frozenset(day % 7 for day in weekdays),
        "needs_both": needs_both, "is_fixed": "*" not in (words[0][0], words[1][0]),
    }  # fmt: skip


def read_zone(name: object) -> Any:
    """Read the name of a time zone, as a tzinfo; None stands for local time."""
    if name is None or name == "UTC":  # these need no data
        return name and datetime.timezone.utc
    try:
        return zoneinfo.ZoneInfo(line_of_text(name))
    except (LookupError, OSError, ValueError):
        form = 'a time zone that this system knows, such as "Europe/Berlin"'
        raise ValueError(f"{form}; if it has none: pip install tzdata") from None


class CronSchedule:
    """The times at which a cron expression fires. Pure; aware datetimes go in and come out.

    timezone: "Europe/Berlin"; None is local time. Raises CONFIG_INVALID.
    """

    period = 0  # of @every: seconds, counted from 1970 on, so that restarts shift nothing
    times: Sequence[int] = ()  # minutes of a day, ascending; @reboot: none
    days = months = weekdays = frozenset[int]()  # weekday 0: Sunday
    needs_both = False  # day and weekday; else one of them is enough
    is_fixed = False  # neither minute nor hour begins with *

    def __init__(self, expression: str, timezone: str | None = None) -> None:
        try:
            what = f"expression {expression!r}"
            self.__dict__.update(read_cron(expression))
            what = f"timezone {timezone!r}"
            self._zone = read_zone(timezone)
        except ValueError as error:
            hint = "see README.md, Cron"
            raise DaemonError("CONFIG_INVALID", f"{what}: must be {error}", hint) from None

    def matches(self, moment: datetime.datetime) -> bool:
        """Tell whether it fires in the moment's minute; @every: in its second."""
        at = int(moment.timestamp() // 1)
        at -= 0 if self.period else (at + self._offset(at)) % 60
        return next(self.fires(at - 1), None) == at

    def next(self, after: datetime.datetime) -> datetime.datetime | None:
        """Return the first fire after a moment, in the schedule's zone; @reboot: None."""
        return next(map(self.moment, self.fires(after.timestamp())), None)

    def fires(self, after: float) -> Iterator[int]:
        """Yield the fires after a time, in epoch seconds."""
        at = int(after // 1)
        while self.period:
            at += self.period - at % self.period
            yield at
        start = at - DST_MAX_S if self.is_fixed else at
        seen = start + self._offset(start)  # the clock on the wall has been followed until then
        while self.times:
            offset, end = self._offset(start), self._find_change(start)
            if not self.is_fixed or abs(seen - start - offset) > DST_MAX_S:
                seen = start + offset
            wall = self._find_wall(seen)
            if wall >= end + offset and self._offset(end) == offset:
                end = max(end, wall - offset - 2 * DAY_S)  # only changes near to a fire matter
            while wall < end + offset:
                fire = max(wall - offset, start)  # of what a gap swallowed: its end
                if fire > at:
                    at = fire
                    yield at
                wall = self._find_wall(wall + 60)
            seen, start = max(seen, end + offset), end

    def list_next(self, count: int) -> list[str]:
        """Return the next fires, as "2025-03-09T03:00:00-04:00"."""
        fires = itertools.islice(self.fires(Clock.now()), count)
        return [self.moment(at).isoformat() for at in fires]

    def _find_wall(self, wall: int) -> int:
        """Return the first fire from `wall` on, both in seconds of a clock without a zone."""
        number, minute = divmod(-(-wall // 60), 24 * 60)
        while True:  # 40 years at most, for a 29 February that is a Sunday
            day = datetime.date.fromordinal(EPOCH_DAY + number)
            hits = (day.day in self.days, day.isoweekday() % 7 in self.weekdays)
            index = bisect.bisect_left(self.times, minute)
            if day.month in self.months and (all if self.needs_both else any)(hits):
                if index < len(self.times):
                    return (number * 24 * 60 + self.times[index]) * 60
            number, minute = number + 1, 0

    def _find_change(self, start: int) -> int:
        """Return the first second after it with another UTC offset, but at most a day later."""
        before, end = self._offset(start), start + DAY_S
        while self._offset(end) != before and end - start > 1:
            middle = (start + end) // 2
            start, end = (middle, end) if self._offset(middle) == before else (start, middle)
        return end

    def _offset(self, at: int) -> int:
        return round(self.moment(at).replace(tzinfo=datetime.timezone.utc).timestamp()) - at

    def moment(self, at: float) -> datetime.datetime:
        """Return epoch seconds as a datetime in the schedule's zone."""
        return datetime.datetime.fromtimestamp(at, datetime.timezone.utc).astimezone(self._zone)


def _checked(read: Callable[[object], object]) -> Callable[[Any], Any]:
    return lambda text: (read(text), text)[1]


for _key, _read in (("cron", read_cron), ("timezone", read_zone)):  # CONFIG stands above this
    OPTIONS["schedule"][_key] = (_checked(_read), *OPTIONS["schedule"][_key][1:])


class CronJob(CronSchedule):
    """A schedule that is enabled, and how far it has got; times are epoch seconds."""

    def __init__(self, name: str, trigger: Any, seen_at: float) -> None:
        super().__init__(trigger.cron, trigger.timezone)
        self.name, self.trigger = name, trigger
        self.seen_at = seen_at  # all until then is dealt with
        self.due_at: float | None = None  # the next fire
        self.is_new = True  # not looked at yet: what it has missed, it missed without a daemon

    def find_fires(self, now: float) -> Sequence[float]:
        """Decide which fires to make now, and move `seen_at` when the clock was set back.

        A change by up to DST_MAX_S makes a fixed-time job fire neither twice nor never.
        """
        trigger, gap_s = self.trigger, now - self.seen_at
        if not (self.period or self.times):  # @reboot
            return [now] if self.is_new else []
        if gap_s < 0:
            if -gap_s > (DST_MAX_S if self.is_fixed else CRON_LATE_S):
                self.seen_at = now
            return []
        since = max(self.seen_at, now - max(trigger.catch_up_window, DST_MAX_S))
        fires = itertools.takewhile(lambda at: at <= now, self.fires(since))
        missed = list(deque(fires, CATCH_UP_MAX))
        if not missed or (gap_s <= CRON_LATE_S and not self.is_new):
            return missed
        wanted = {"none": [], "last": missed[-1:], "all": missed}[trigger.catch_up]
        kept = [at for at in wanted if now - at <= trigger.catch_up_window]
        is_bridged = self.is_fixed and gap_s <= DST_MAX_S
        late_s = CRON_RESTART_S if self.is_new else DST_MAX_S if is_bridged else CRON_LATE_S
        kept = kept or [at for at in missed[-1:] if now - at < late_s]
        log.info("Schedule %s: %d of %d missed fires are made", self.name, len(kept), len(missed))
        return kept


def fire_schedule(store: TaskStore, name: str, at: float | None, is_behind: bool) -> int | None:
    """Add the task of a schedule, for a time, or None: now; see EventStore.fire."""
    found = store.config.schedules
    if name not in found:
        raise bad(f"there is no schedule {name!r}", f"schedules: {', '.join(found) or 'none'}")
    event = Event.make("cron.fired", {"name": name, "scheduled_at": at}, f"schedule {name}")
    return EventStore(store).fire(f"schedule.{name}", found[name], event, is_behind)


class Scheduler:
    """Makes schedules fire: each time is a task, made once.

    Thread: "cron" sleeps until the next fire. Life: start -> stop.
    """

    def __init__(self, store: TaskStore, on_fire: Callable[[], None], clock: Any = Clock) -> None:
        self._store, self._on_fire, self._clock = store, on_fire, clock
        self._jobs: dict[tuple[str, str], CronJob] = {}  # by source and spec
        self._config: Config | None = None  # what _jobs follow
        self._is_stopped, self._woken = False, threading.Event()
        self._thread = threading.Thread(target=self._loop, name="cron", daemon=True)

    def start(self) -> None:
        """Let the schedules of the store's configuration fire from now on."""
        self._thread.start()

    def reload(self) -> None:
        """Take on the store's configuration; what has changed in it counts from now on."""
        self._woken.set()

    def stop(self) -> None:
        """Let nothing fire any more."""
        self._is_stopped = True
        self._woken.set()
        self._thread.join(STOP_MARGIN_S)

    def status(self) -> dict[str, Any]:
        """Return {"schedules": how many are enabled, "next_fire_at": epoch seconds or None}."""
        due = [job.due_at for job in self._jobs.values() if job.due_at]
        return {"schedules": len(self._jobs), "next_fire_at": min(due, default=None)}

    def _loop(self) -> None:
        while not self._is_stopped:
            wait_s: float | None = CRON_RETRY_S
            try:
                wait_s = self._look()
            except DaemonError as error:  # a full disk or queue; so it is for all of them
                log.error("schedules: %s (%s)", error, error.hint)
            except Exception:  # this thread's top frame
                log.exception("the scheduler failed")
            self._woken.wait(wait_s)
            self._woken.clear()

    def _look(self) -> float | None:
        """Make the fires that are due; return in how many seconds to look again."""
        if self._config is not self._store.config:
            self._arrange()
        for job in self._jobs.values():
            self._fire(job, self._clock.now())
        next_at: float | None = self.status()["next_fire_at"]
        return next_at and min(max(next_at - self._clock.now(), 0.0), CRON_SLICE_S)

    def _fire(self, job: CronJob, now: float) -> None:
        if job.is_new or not job.seen_at <= now < (job.due_at or now + 1.0):
            fires = job.find_fires(now)
            is_behind = job.trigger.catch_up == "all" and (job.is_new or len(fires) > 1)
            for at in fires:
                if self._is_stopped:
                    return
                task_id = fire_schedule(self._store, job.name, at, is_behind)
                result = f"task {task_id}" if task_id else "skipped"
                log.info("Schedule %s fired for %s: %s", job.name, timestamp(at), result)
                job.seen_at = at
                self._on_fire()
            job.due_at = next(job.fires(max(job.seen_at, now)), None)
        job.seen_at, job.is_new = max(job.seen_at, now), False

    def _arrange(self) -> None:
        """Plan what the configuration says; what fires by the same as before goes on."""
        config, jobs = self._store.config, dict[tuple[str, str], CronJob]()
        found = {f"schedule.{name}": one for name, one in config.schedules.items()}
        specs = {name: f"{one.cron}, {one.timezone}" * one.enabled for name, one in found.items()}
        seen = EventStore(self._store).register(specs, self._clock.now())
        for (source, spec), (name, one) in zip(specs.items(), config.schedules.items()):
            if one.enabled:
                job = self._jobs.get((source, spec)) or CronJob(name, one, seen[source])
                job.trigger, jobs[source, spec] = one, job
        self._jobs, self._config = jobs, config


def list_schedules(store: TaskStore, limit: int = 1) -> list[dict[str, Any]]:
    """Return each one's name, cron, timezone, enabled, next, last, task_id, result.

    next: up to `limit` fires, as "2025-03-09T03:00:00-04:00"; last: the one before.
    result: the state of the last task, or "skipped".
    """
    fires, found = EventStore(store).get_fires(), []
    for name, one in store.config.schedules.items():
        schedule = CronSchedule(one.cron, one.timezone)
        last_at, task_id = fires.get(f"schedule.{name}", (None, None))
        task = store.find(ids=[task_id]) if task_id else []
        skipped = "skipped" if last_at and not task_id else None
        found.append({
            "name": name, "cron": one.cron, "timezone": one.timezone, "enabled": one.enabled,
            "next": schedule.list_next(limit if one.enabled else 0), "task_id": task_id,
            "last": last_at and schedule.moment(last_at).isoformat(timespec="seconds"),
            "result": task[0].state if task else skipped,
        })  # fmt: skip
    return found


def run_schedule(store: TaskStore, name: str) -> int:
    """Add a schedule's task now, return its id. Raises ILLEGAL_STATE when `overlap` forbids it."""
    task_id = fire_schedule(store, name, None, False)
    if task_id is None:
        what = f"a task of schedule {name} is unfinished"
        raise DaemonError("ILLEGAL_STATE", what, 'see `list`, or set overlap = "queue"')
    return task_id


# ============================================================================
# 12. EVENTS - reading what happened; subscribers; what hooks send to a URL
#     Uses 1-9. Any thread; a router has one a subscription. Closed by: its maker.
# ============================================================================

# The task of a hook is inserted by the transaction that changes a task: see EventStore. What is
# here receives events after the commit: a crash in between costs a line of the log, no hook.


def read_events(
    folder: str, lines: int, to_end: bool, pattern: str = "*", since: float = 0.0
) -> Iterator[list[dict[str, Any]]]:
    """Yield the last `lines` events, then, with to_end, what comes; [] when nothing does.

    pattern: of types, "task.*"; since: epoch seconds.
    """
    found: deque[dict[str, Any]] = deque(maxlen=lines)  # until all that is there has been read
    rest = b""
    for data in follow_file(os.path.join(folder, "events.log"), 0, to_end):
        *whole, rest = (rest + data).split(b"\n")
        for line in whole:
            with contextlib.suppress(ValueError, TypeError, AttributeError, RecursionError):
                event = json.loads(line)
                is_whole = event.keys() >= Event.__annotations__.keys() and event["time"] >= since
                if is_whole and fnmatch.fnmatchcase(event["type"], pattern):
                    found.append(event)
        if not data or found.maxlen is None:
            yield [*found]
            found = deque()
    if found.maxlen is not None:
        yield [*found]


class EventRouter:
    """Dispatches events to subscribers and keeps a history of them.

    A handler has a thread of its own. One that raises is tried 3 times more, after 1, 2 and
    4 s; then the event is a dead letter. Any thread; handlers may publish. Life: made -> close.
    """

    def __init__(self) -> None:
        self._closing = threading.Event()
        self._history: deque[Event] = deque(maxlen=HISTORY_MAX)
        self._dead_letters: deque[dict[str, Any]] = deque(maxlen=DEAD_LETTERS_MAX)
        self._lock = threading.Lock()  # guards what follows
        self._readers: dict[threading.Thread, tuple[str, Any]] = {}  # with pattern and queue

    def subscribe(self, pattern: str, handler: Callable[[Event], object]) -> None:
        """Call `handler` with each event, from now on, whose type matches: "task.*", "*".

        Raises ILLEGAL_STATE when the router is closed.
        """
        if self._closing.is_set():
            raise DaemonError("ILLEGAL_STATE", "the router is closed", "make another")
        waiting: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        args, name = (handler, waiting), f"events-{pattern}"
        thread = threading.Thread(target=self._serve, args=args, name=name, daemon=True)
        thread.start()
        with self._lock:
            self._readers[thread] = pattern, waiting

    def publish(
        self, type: str, payload: Mapping[str, Any] | None = None, source: str = ""
    ) -> Event:
        """Create an event and dispatch it; return it."""
        event = Event.make(type, payload or {}, source)
        self.dispatch([event])
        return event

    def dispatch(self, events: Iterable[Event]) -> None:
        """Add events to the history and to the queues of their subscribers."""
        with self._lock:
            for event in events:
                self._history.append(event)
                for pattern, waiting in self._readers.values():
                    if not fnmatch.fnmatchcase(event.type, pattern):
                        continue
                    if waiting.qsize() < HANDLER_BEHIND_MAX:
                        waiting.put(event)
                    else:
                        self._add_dead_letter(event, "its handler is too slow", 0)

    def _add_dead_letter(self, event: Event, error: str, attempts: int) -> None:
        self._dead_letters.append({"event": event, "error": error, "attempts": attempts})

    def _serve(self, handler: Callable[[Event], object], waiting: Any) -> None:
        for event in iter(waiting.get, None):
            for attempt, pause_s in enumerate((0.0, *HANDLER_PAUSES_S), 1):
                self._closing.wait(pause_s)
                try:
                    handler(event)
                    break
                except (Exception, SystemExit) as error:  # the user's callback
                    log.exception("a handler of %s failed", event.type)
                    if attempt > len(HANDLER_PAUSES_S):
                        self._add_dead_letter(event, f"{type(error).__name__}: {error}", attempt)

    def history(
        self, type: str | None = None, source: str | None = None, limit: int = 50
    ) -> list[Event]:
        """Return the last events, the newest last; type is a pattern."""
        events = [e for e in self._history.copy() if source in (None, e.source)]
        events = [e for e in events if fnmatch.fnmatchcase(e.type, type or "*")]
        return events[-limit:] if limit > 0 else []

    def clear_history(self) -> None:
        """Forget the events."""
        self._history.clear()

    def dead_letters(self) -> list[dict[str, Any]]:
        """Return the last {"event", "error", "attempts"}, the newest last."""
        return [*self._dead_letters.copy()]

    def clear_dead_letters(self) -> None:
        """Forget the dead letters."""
        self._dead_letters.clear()

    def close(self, timeout_s: float = 5.0) -> None:
        """Let the handlers finish what is queued, without pauses between tries, then end them."""
        deadline = Clock.mono() + timeout_s
        self._closing.set()
        with self._lock:
            readers, self._readers = self._readers, {}
        for _, waiting in readers.values():
            waiting.put(None)
        for thread in readers.keys() - {threading.current_thread()}:
            thread.join(max(deadline - Clock.mono(), 0.0))


def deliver() -> int:
    """POST the event of the task that this runs in to its hook's URL; 0: a 2xx answered.

    A redirect is refused: the POST would become a GET of somebody else's page.
    """
    import urllib.request

    class NoRedirect(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *args: Any) -> None:
            return None

    env = os.environ
    body, name = env.get("APEX_EVENT", "{}").encode(), env.get("APEX_HOOKS", "").split(",")[-1]
    url, secret = env.get("APEX_HOOK_URL"), env.get("APEX_HOOK_SECRET")
    if not url or secret == "":
        what = "secret_env names a variable that the daemon does not have" if url else "no url"
        print(f"not delivered: hook.{name}: {what}", flush=True)
        return 1
    headers = {"Content-Type": "application/json", "User-Agent": f"apexd/{__version__}"}
    headers["Idempotency-Key"] = f"{json.loads(body)['id']}-{name}"
    if secret is not None:
        digest = hmac.new(os.fsencode(secret), body, "sha256").hexdigest()
        headers["X-Apexd-Signature"] = "sha256=" + digest
    request = urllib.request.Request(url, body, headers, method="POST")
    try:
        urllib.request.build_opener(NoRedirect).open(request, timeout=HOOK_ANSWER_S).close()
    except (OSError, ValueError, http.client.HTTPException) as error:
        print(f"not delivered: {error or type(error).__name__}", flush=True)
        return 1
    return 0


# ============================================================================
# 13. RUNNER - the polling loop over the store
#     Uses 1-10. Threads: one polls; one a call of `execute`. Closed by: Daemon.
# ============================================================================


class _Run:
    """A running attempt as the runner sees it."""

    def __init__(
        self, task: Task, store: TaskStore, tell: Callable[[_Run, Begun | Result], None]
    ) -> None:
        self.task = task
        self.log = LogWatch(log_path(store.folder, task.id, task.attempts))
        self.ward = Ward(
            run_id=task.run_id, keeper=task.keeper, boot_id=task.boot_id, user=Platform.user(),
            log_path=self.log.path, is_process=False, is_suspect=task.suspect,
            tell=functools.partial(tell, self), pid=task.pid, start_time=task.start_time,
        )  # fmt: skip
        self.deadline_mono = float("inf")  # its timeout, monotonic
        self.is_ending = False
        self.begun: Begun | None = None  # its keeper says that it lives
        self.result: Result | None = None  # waits to be recorded

    def can_end(self) -> bool:
        """Tell whether it is neither being ended nor has ended, though perhaps not told yet."""
        return not (self.is_ending or self.result or self.ward.result)

    def call(self, execute: Callable[[Task], object]) -> Result:
        """Carry it out by a function."""
        try:
            code = execute(self.task)
        except Exception:  # the user's callback
            log.exception("task %d raised", self.task.id)
            code = 1
        return Result(exit_code=code if isinstance(code, int) else 0)


def prune_all(store: TaskStore, running: Container[int]) -> None:
    """Forget tasks and logs past retention; never those of running tasks.

    Ages count from the second look on: the clock may have jumped. Logs and requests are
    looked through only when a task has finished since the last time.
    """
    attempts, last, began = AttemptStore(store), store.last_upkeep, Clock.mono()
    jump_s = Clock.now() - began  # it differs from the last one's by how far the clock jumped
    by_age = last is not None and abs(jump_s - last[0]) < CLOCK_JUMP_S
    keep_ballast(store.folder)
    pruned = count = len(attempts.prune(by_age))
    while count == PRUNE_BATCH and Clock.mono() < began + PRUNE_MAX_S:
        count = len(attempts.prune(by_age))
    store.last_upkeep = jump_s, attempts.get_last_finish()
    if by_age and not pruned and store.last_upkeep[1] == last[1]:
        return
    if by_age:
        attempts.prune_requests()
    files = []
    with os.scandir(os.path.join(store.folder, "logs")) as entries:
        for entry in entries:
            match = re.match(r"task-(\d+)\.\d", entry.name)
            if match and int(match[1]) not in running:
                with contextlib.suppress(FileNotFoundError):
                    files.append((entry.stat().st_mtime, entry.stat().st_size, entry.path))
    excess = sum(size for _, size, _ in files) - store.config.log.total_mb * 1e6
    for _, size, path in sorted(files):
        if excess > 0:
            with contextlib.suppress(OSError):
                os.unlink(path)
            excess -= size


def log_end(store: TaskStore, task: Task, result: Result) -> None:
    """Log how an attempt ended, and when it comes back if it asked for that."""
    took_s = Clock.now() - task.started_at if result.ran_s is None else result.ran_s
    how = "completed" if result.exit_code == 0 else f"ended, {describe_end(result)}"
    log.info("Task %d %s (%.1fs)", task.id, how, took_s)
    for after in store.find(ids=[task.id]) if result.exit_code == 75 else ():
        if after.state == State.SCHEDULED:
            when = timestamp(after.due_at or 0.0)
            log.warning("Task %d rate limited, comes back at %s", task.id, when)


class Meters:
    """What is measured of attempts since the daemon's start; the runner's thread counts."""

    def __init__(self) -> None:
        self.turns = 0  # of the runner's loop
        self.due_mono = Clock.mono()  # when it is to come round at the latest
        self.outcomes = dict.fromkeys(Outcome, 0)
        # How many took so long, by BUCKETS_S (the last but one: longer), and seconds in all.
        self.seconds = {name: [0.0] * (len(BUCKETS_S) + 2) for name in ("wait", "run", "cpu")}
        self._minutes: deque[list[int]] = deque(maxlen=60)  # [minute, succeeded, failed]

    def count(self, task: Task, result: Result) -> None:
        """Count an attempt that has ended and is recorded."""
        if task.outcome is None:  # it never ran
            return
        self.outcomes[task.outcome] += 1
        wait_s = task.started_at - task.created_at if task.attempts == 1 else None
        run_s = Clock.now() - task.started_at if result.ran_s is None else result.ran_s
        for name, value in (("wait", wait_s), ("run", run_s), ("cpu", result.cpu_s)):
            if value is not None:
                self.seconds[name][bisect.bisect_left(BUCKETS_S, value)] += 1
                self.seconds[name][-1] += max(value, 0.0)
        minute = int(Clock.now() // 60)
        if not self._minutes or self._minutes[-1][0] != minute:
            self._minutes.append([minute, 0, 0])
        self._minutes[-1][1] += task.state == State.SUCCEEDED
        self._minutes[-1][2] += task.state == State.FAILED

    def last_hour(self) -> list[list[int]]:
        """Return [[succeeded, failed] for each minute], the present one last."""
        found, this = {minute: n for minute, *n in [*self._minutes]}, int(Clock.now() // 60)
        return [found.get(this - ago, [0, 0]) for ago in range(59, -1, -1)]


class DaemonRunner:
    """Claims tasks from a TaskStore, runs them, records how they ended.

    With `execute` a task is carried out by a call of it with the Task, in a thread of this
    process: int is the exit status, None 0, an exception 1. Without, as a child of a keeper.
    Thread: "runner" polls, and looks at the keepers. Life: start -> drain -> stop.
    """

    def __init__(
        self, store: TaskStore, execute: Callable[[Task], object] | None = None,
        on_poll: Callable[[], float] = lambda: float("inf"),
        on_drained: Callable[[], None] = lambda: None, keepers: Keepers | None = None,
    ) -> None:  # fmt: skip
        self.store = store
        self.keepers = keepers or Keepers(store.folder, execute is None)
        self._attempts = AttemptStore(store)
        self._execute, self._on_poll, self._on_drained = execute, on_poll, on_drained
        self._awaited: dict[threading.Event, int] = {}  # the task of each that waits
        self._lock = threading.RLock()  # guards what follows; taken before the store's
        self._running: dict[int, _Run] = {}
        self._begun: list[_Run] = []  # what their keeper told is not on disk yet
        self._ended: list[_Run] = []  # the same of results
        self.is_draining = False  # nothing more is claimed
        self._drain_at = float("inf")  # monotonic; from then on tasks are interrupted
        self.halted, self._drained = threading.Event(), threading.Event()
        self._is_woken = True  # a turn is wanted
        self._thread = threading.Thread(target=self._loop, name="runner", daemon=True)
        self._note_mono = float("inf")  # when `_begun` is recorded at the latest
        names = ("tasks_processed", "tasks_succeeded", "tasks_failed", "poll_count")
        self._metrics = DaemonMetrics(**dict.fromkeys(names, 0))
        self.meters = Meters()

    def start(self) -> None:
        """Take over what a former daemon left, then poll."""
        self.adopt()
        self._thread.start()

    def adopt(self) -> None:
        """Take over what a former daemon left; the keepers tell what became of it."""
        self._metrics.started_at = Clock.now()
        with self._lock:  # or a wish of this moment would be seen neither here nor by `end`
            for task in self.store.find(state="running", limit=INTEGER_MAX):
                run = self._running[task.id] = _Run(task, self.store, self._take)
                if task.keeper == CALLED:
                    self._take(run, Result())
                    continue
                self.keepers.adopt(run.ward)
                log.info("Adopting task %d", task.id)
                if task.wish is not None:
                    self._end(run)
            if self._execute is None or len(self._ended) < len(self._running):
                self.keepers.open("0")

    def finish(self, ids: Iterable[int], deadline_mono: float, force: bool = False) -> list[int]:
        """End running tasks, without a thread; return those that still run then.

        For a client that acts while there is no daemon: nothing is claimed. Their wish is on
        disk; with `force` they are interrupted and KILLed, but for those that have a result.
        """
        self.is_draining, wanted = True, set(ids)
        self.adopt()
        while wanted & self._running.keys() and Clock.mono() < deadline_mono:
            self.keepers.look(0.1)
            runs = [run for run in self._running.values() if run.task.id in wanted and run.begun]
            if force:
                self._end_all(runs, Outcome.INTERRUPTED, 0.0)
            self._turn()
        return sorted(wanted & self._running.keys())

    def drain(self, timeout_s: float) -> None:
        """Claim nothing more; interrupt what still runs after `timeout_s`."""
        with self._lock:
            self.is_draining, self._drain_at = True, Clock.mono() + timeout_s
        self.wake()

    def stop(self, timeout_s: float | None = None) -> None:
        """Drain, and wait until nothing runs: for an embedding program."""
        self.drain(self.store.config.daemon.graceful_timeout if timeout_s is None else timeout_s)
        self._drained.wait()
        self.halt()
        self.keepers.close(True)

    def halt(self) -> None:
        """End the polling and leave the children to the next daemon."""
        self.halted.set()
        self.wake()
        self.tell(list(self._awaited.values()))
        if self._thread.is_alive():
            self._thread.join(ANSWER_TIMEOUT_S)

    def wake(self) -> None:
        """Make the loop take its turn now."""
        self._is_woken = True
        self.keepers.wake()

    def end(self, ids: Iterable[int]) -> None:
        """End running tasks whose wish is on disk."""
        with self._lock:
            for task_id in self._running.keys() & set(ids):
                self._end(self._running[task_id])
        self.wake()

    def tell(self, ids: Iterable[int]) -> None:
        """Wake those who wait for any of these tasks: they have moved."""
        moved = set(ids)
        for event, task_id in list(self._awaited.items()):
            if task_id in moved:
                event.set()

    def wait_for(self, task_id: int, timeout_s: float, is_done: Callable[[], bool]) -> None:
        """Sleep until a task has moved, `timeout_s` at most, unless `is_done` already."""
        event = threading.Event()
        self._awaited[event] = task_id
        if not is_done() and not self.halted.is_set():
            event.wait(timeout_s)
        del self._awaited[event]

    def get_metrics(self) -> DaemonMetrics:
        """Return a copy of the counters."""
        with self._lock:
            metrics = DaemonMetrics(**self._metrics.to_dict())
            metrics.active_task_ids = sorted(self._running)
        metrics.active_task_count = len(metrics.active_task_ids)
        metrics.uptime = Clock.now() - (metrics.started_at or Clock.now())
        return metrics

    def _loop(self) -> None:
        next_poll, next_upkeep, wait_s = 0.0, 0.0, 0.0
        while not self.halted.is_set():
            try:
                self.meters.turns += 1
                self.meters.due_mono = Clock.mono() + wait_s
                self.keepers.look(wait_s)
                if self._ended and len(self._ended) < len(self._running):
                    self.keepers.look(GATHER_S)
                now, wait_s = Clock.mono(), 1.0  # a full disk: what is to be recorded stays
                poll_s, is_polling = self.store.config.daemon.poll_interval, now >= next_poll
                next_poll = now + poll_s if is_polling else min(next_poll, now + poll_s)
                if is_polling:
                    log.debug("Polling for tasks")
                    self._metrics.last_poll_at = Clock.now()
                    self._metrics.poll_count += 1
                    if "queued" in self.store.get_counts():
                        self._is_woken = True  # no `|=`: what sets it meanwhile must stay
                if self._next_wake_s(float("inf")) <= 0.0:
                    self._turn()
                logs = [run.log for run in self._running.values()]
                for watch in logs:
                    if now >= watch.due_mono:
                        watch.look(int(self.store.config.limits.log_mb * 1e6))
                dues = [now + self._on_poll(), next_poll, *(watch.due_mono for watch in logs)]
                if is_polling and now >= next_upkeep:
                    next_upkeep = now + MAINTENANCE_S
                    prune_all(self.store, self._running)
                wait_s = self._next_wake_s(min(dues))
            except DaemonError as error:
                self._is_woken = True
                log.error("turn failed: %s", error)
                if len(self._ended) == len(self._running) and Clock.mono() >= self._drain_at:
                    self._note_drained()  # the keepers keep the results
            except Exception:  # this thread's top frame
                self._is_woken = True
                log.exception("turn failed")
                self.halted.wait(1.0)

    def _next_wake_s(self, first: float) -> float:
        """Return how long no turn can be due; first: when something else is."""
        now, times = Clock.mono(), [first, self._note_mono]
        with self._lock:
            if self._is_woken or self._ended:
                return 0.0
            for run in self._running.values():
                if run.can_end():
                    times += (run.deadline_mono, self._drain_at)
        if self._attempts.next_due is not None and not self.is_draining:
            times.append(now + self._attempts.next_due - Clock.now())
        return max(min(times) - now, 0.0)

    def _turn(self) -> None:
        """Enforce deadlines, record results, claim and start: once round."""
        now, self._is_woken = Clock.mono(), False
        with self._lock:
            runs = self._running.values()
            self._end_all([run for run in runs if now >= run.deadline_mono], Outcome.TIMEOUT)
            if now >= self._drain_at:
                self._end_all(runs, Outcome.INTERRUPTED)
            ended = self._ended
            results = [(run.task, run.result) for run in ended if run.result]
            begun = [(run.task, run.begun) for run in self._begun if run.begun and not run.result]
            active = [run.task.group for run in runs if not run.result]
            most = 0 if self.is_draining else self.store.config.daemon.max_concurrent
            room = max(most - len(active), 0)
            self._note_mono = float("inf")
            find = self.keepers.find_keeper if self._execute is None else lambda is_suspect: CALLED
            claimed = self._attempts.turn(results, begun, room, Counter(active), find)
            if claimed:
                failpoint("commit")
            self._ended, self._begun = [], []
            for run in ended:
                del self._running[run.task.id]
            for task in claimed:
                self._start(task)
        self.keepers.flush()
        if claimed:
            failpoint("sent")
        if ended:
            failpoint("result")
            self.keepers.forget(run.ward.run_id for run in ended)
        for task, result in results:
            self._metrics.count(task)
            self.meters.count(task, result)
            log_end(self.store, task, result)
        for task in claimed:
            log.info("Starting task %d", task.id)
        self.tell(task.id for task, _ in results)
        if self.is_draining and not self._running:
            self._note_drained()

    def _note_drained(self) -> None:
        if not self._drained.is_set():
            self._drained.set()
            self._on_drained()

    def _start(self, task: Task) -> None:
        """Start an attempt whose claim is on disk; holds the lock."""
        run = self._running[task.id] = _Run(task, self.store, self._take)
        if task.timeout is not None:
            run.deadline_mono = Clock.mono() + task.timeout
        try:
            if self._execute is None:
                env, umask = self._attempts.get_context(task)
                self.keepers.start(run.ward, make_start(task, env, umask, self.store))
            else:
                act, name = functools.partial(self._call, self._execute, run), f"call-{task.id}"
                threading.Thread(target=act, name=name, daemon=True).start()
        except (DaemonError, RuntimeError) as error:  # no thread to be had, a disk's moment
            self._take(run, Result(exit_code=126, reason=f"spawn:EAGAIN {error}"))

    def _call(self, execute: Callable[[Task], object], run: _Run) -> None:
        self._take(run, run.call(execute))
        self.keepers.wake()

    def _take(self, run: _Run, what: Begun | Result) -> None:
        """Hear of an attempt: it lives, or it has ended; recorded by the next turn."""
        with self._lock:
            if run.result is not None or self._running.get(run.task.id) is not run:
                return
            if isinstance(what, Begun):
                run.begun, run.task.pid, run.task.start_time = what, what.pid, what.start_time
                if run.task.timeout is not None:
                    run.deadline_mono = Clock.mono() + run.task.timeout - what.age_s
                self._begun.append(run)
                self._note_mono = min(self._note_mono, Clock.mono() + NOTE_S)
                return
            run.result = what
            self._ended.append(run)
        if what.reason is not None:
            log_reason(run.log.path, what.reason)

    def _end(self, run: _Run, stop_s: float | None = None) -> None:
        run.is_ending = True
        failpoint("wish")
        stop_s = self.store.config.daemon.stop_timeout if stop_s is None else stop_s
        self.keepers.end(run.ward.run_id, signal.SIGTERM, stop_s)

    def _end_all(self, runs: Iterable[_Run], wish: Outcome, stop_s: float | None = None) -> None:
        """Write down why runs are ended, then end those that can be; holds the lock."""
        runs = [run for run in runs if run.can_end()]
        try:
            if runs:
                self._attempts.set_wishes([run.task.id for run in runs], wish)
        except DaemonError as error:  # a read-only disk: TERM ends what runs all the same
            if wish != Outcome.INTERRUPTED:
                raise
            log.error("%s", error)
        is_late = wish == Outcome.INTERRUPTED and stop_s is None
        how = "Timed out waiting: ending" if is_late else "Ending"
        for run in runs:
            log.warning("%s task %d: %s", how, run.task.id, wish.value)
            self._end(run, stop_s)


# ============================================================================
# 14. SUPERVISOR - process state table, `decide` (pure), apply
#     Uses 1-10. Threads: one decides; one a run that is asked. Closed by: Daemon.
# ============================================================================

# A process is a command that should not end. Each of its instances is a child of a keeper
# (section 10) with a note of its own, `run/proc-NAME.INDEX`, that is written before its start and
# holds all that the next daemon must know: the run id, the keeper, what it had been through.
# So what a keeper still has is adopted, and no second copy is ever started beside it.
#
# What happens next is decided in one place, from what is known of an instance:
#
#   stopped --> starting --> running <--> unhealthy       starting: waits for what it needs,
#      ^           |            |             |           then to be ready
#      |           +------------+-------------+--> stopping --> stopped (crashed when it hung)
#      |           +------------+-------------+--> crashed --> starting | backoff | failed
#      `-- crashed, backoff, failed                backoff, failed --> starting


class ProcessState(str, Enum):
    """Where an instance stands; PROCESS_MOVES says where it can go from there."""

    STOPPED = "stopped"
    STARTING = "starting"
    RUNNING = "running"
    UNHEALTHY = "unhealthy"  # alive, but it did not answer when it was last asked
    BACKOFF = "backoff"  # ended soon after its start; tried again after a while
    STOPPING = "stopping"
    CRASHED = "crashed"  # ended by itself; what follows is decided at once
    FAILED = "failed"  # ended too often; tried again seldom


_UP = {ProcessState.STARTING, ProcessState.RUNNING, ProcessState.UNHEALTHY}
_DOWN = {ProcessState.BACKOFF, ProcessState.CRASHED, ProcessState.FAILED}
_READY = {ProcessState.RUNNING, ProcessState.UNHEALTHY}
_EVENT_STATES = {ProcessState.RUNNING, ProcessState.STOPPED, *_DOWN} - {ProcessState.BACKOFF}
_ENDS = {ProcessState.STOPPING, ProcessState.CRASHED}
PROCESS_MOVES: dict[ProcessState, set[ProcessState]] = {
    ProcessState.STOPPED: {ProcessState.STARTING},
    ProcessState.STARTING: {ProcessState.RUNNING, ProcessState.STOPPED, *_ENDS},
    ProcessState.RUNNING: {ProcessState.UNHEALTHY, *_ENDS},
    ProcessState.UNHEALTHY: {ProcessState.RUNNING, *_ENDS},
    ProcessState.STOPPING: {ProcessState.STOPPED, ProcessState.CRASHED},
    ProcessState.CRASHED: {ProcessState.STARTING, ProcessState.BACKOFF, ProcessState.FAILED,
                           ProcessState.STOPPED},
    ProcessState.BACKOFF: {ProcessState.STARTING, ProcessState.STOPPED},
    ProcessState.FAILED: {ProcessState.STARTING, ProcessState.STOPPED},
}  # fmt: skip


class View(Value):
    """All that `decide` knows of an instance; times are monotonic seconds."""

    policy: Any  # its section of the configuration
    state: ProcessState
    is_wanted: bool
    is_stale: bool  # is to be replaced: by a restart, other configuration, its memory
    is_held: bool  # must wait: for what it needs; when it is to end, for what needs it
    is_spawned: bool  # it has a child
    is_ready: bool
    started: float
    last_sign: float  # of life
    lapses: int  # probes without an answer, in a row
    due: float  # the next try in backoff and failed, the KILL in stopping
    result: Result | None  # of the last run that ended by itself
    quick_ends: int  # in a row, before min_uptime
    restarts: list[float]  # those within the window
    has_given_up: bool
    jitter: float  # from 0 to 1

    def shift(self, seconds: float) -> None:
        """Leave a time in which the daemon stood still out of all that is measured."""
        self.last_sign += seconds
        self.started += seconds if self.state == ProcessState.STARTING else 0.0
        self.due += seconds if self.state == ProcessState.STOPPING else 0.0


class Action(Value):
    """What `decide` says: the state that follows, and what is to be done; None: as it was."""

    state: ProcessState
    act: str | None  # "start", "end" (stop_signal), "kill"
    why: str | None
    due: float | None
    quick_ends: int | None
    has_given_up: bool | None
    is_wanted: bool | None


def decide(now: float, view: View) -> Action:
    """Say what an instance does next; asked again until nothing changes. Pure."""
    if view.state == ProcessState.CRASHED:
        return _after_end(now, view)
    if view.state == ProcessState.STOPPING:  # until its child has ended
        if now < view.due:
            return Action(state=view.state)
        return Action(state=view.state, act="kill", due=now + max(view.policy.stop_timeout, 1.0))
    if view.is_spawned:
        return _while_alive(now, view)
    if not view.is_wanted:
        return Action(state=ProcessState.STOPPED)
    if view.state in (ProcessState.BACKOFF, ProcessState.FAILED) and now < view.due:
        return Action(state=view.state)
    can_start = view.state == ProcessState.STARTING and not view.is_held
    return Action(state=ProcessState.STARTING, act="start" if can_start else None)


def _while_alive(now: float, view: View) -> Action:
    policy, state, why = view.policy, view.state, None
    if (not view.is_wanted or view.is_stale) and not view.is_held:
        why = "it is to be replaced" if view.is_wanted else "as asked"
    elif state == ProcessState.STARTING:
        if view.is_ready:
            return Action(state=ProcessState.RUNNING)
        if policy.ready and now >= view.started + policy.ready.within:
            why = f"not ready within {span(policy.ready.within)}"
    elif policy.live and (view.lapses >= policy.live.failures or now >= silence_ends(view)):
        why = f"no sign of life for {span(now - view.last_sign)}"
    else:
        state = ProcessState.UNHEALTHY if policy.live and view.lapses else ProcessState.RUNNING
    if why is None:
        return Action(state=state)
    due = now + policy.stop_timeout
    return Action(state=ProcessState.STOPPING, act="end", why=why, due=due)


def silence_ends(view: View) -> float:
    """Return when an instance without a sign of life counts as hung."""
    live = view.policy.live
    if live is None:
        return float("inf")
    is_told = live.kind == "notify"
    patience_s = live.timeout if is_told else (live.interval + live.timeout) * live.failures
    return float(view.last_sign + patience_s)


def when_due(view: View) -> float:
    """Return when `decide` must be asked again though nothing happens."""
    if view.state in (ProcessState.BACKOFF, ProcessState.FAILED, ProcessState.STOPPING):
        return view.due
    if view.state == ProcessState.STARTING and view.policy.ready and view.is_spawned:
        return float(view.started + view.policy.ready.within)
    return silence_ends(view) if view.state in _READY else float("inf")


def _after_end(now: float, view: View) -> Action:
    """Restart at once, after a backoff, seldom, or not: by how long it had been up."""
    policy, result = view.policy, view.result or Result()
    is_ok = result.exit_code == 0
    if result.never_ran and view.is_wanted:
        return Action(state=ProcessState.STARTING)
    if policy.restart == "never" or (policy.restart == "on-failure" and is_ok):
        state = ProcessState.STOPPED if is_ok else ProcessState.CRASHED
        return Action(state=state, is_wanted=False)
    if not view.is_wanted:
        return Action(state=ProcessState.STOPPED)
    if view.is_ready and now - view.started >= policy.min_uptime:
        return Action(state=ProcessState.STARTING, quick_ends=0, has_given_up=False)
    count = view.quick_ends + 1
    recent = sum(now - moment < policy.restart_window for moment in view.restarts)
    if view.has_given_up or recent >= policy.max_restarts:
        delay_s, state, has_given_up = policy.retry_failed, ProcessState.FAILED, True
    else:
        delay_s = backoff(count, policy.backoff, policy.backoff_max, 1.0 + view.jitter / 10)
        state, has_given_up = ProcessState.BACKOFF, False
    action = Action(state=state, due=now + delay_s, why=f"next try in {span(delay_s)}")
    action.quick_ends, action.has_given_up = count, has_given_up
    return action


def is_good_enough(view: View) -> bool:
    """Tell whether what needs it can start: it is ready, or has done its work."""
    is_endless = view.policy.restart == "always"
    if view.state == ProcessState.STOPPED and view.result is not None and not is_endless:
        return view.result.exit_code == 0
    is_one_shot = view.policy.restart == "never" and view.policy.ready is None
    return view.state in _READY and not is_one_shot


def fill(value: Any, index: int) -> Any:
    """Replace {instance} and {instance+8000} in a string, or in each string of a list."""
    if isinstance(value, list):
        return [fill(item, index) for item in value]
    pattern = r"\{instance(?:\+([0-9]{1,9}))?\}"
    return re.sub(pattern, lambda match: str(index + int(match[1] or 0)), value)


def read_environment(path: str) -> dict[str, str]:
    """Read NAME=VALUE lines; quotes around a value, `export` and # lines are allowed.

    Raises CONFIG_INVALID, ValueError with the line.
    """
    found = {}
    for number, line in enumerate(read_users_file(path).decode("utf-8").split("\n"), 1):
        text = line.strip()
        if text and not text.startswith("#"):
            match = re.fullmatch(r"(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)=(.*)", text)
            if match is None or "\0" in text:
                raise ValueError(f"{path}:{number} is not NAME=VALUE")
            value = match[2].strip()
            is_quoted = len(value) > 1 and value[0] in "'\"" and value[-1] == value[0]
            found[match[1]] = value[1:-1] if is_quoted else value
    return found


def ask(probe: Probe, index: int) -> bool:
    """Ask a process once, over the network, whether it is well."""
    deadline, data = Clock.mono() + probe.timeout, b""
    target = str(fill(probe.target, index))
    host, _, path = target.rpartition("//")[2].partition("/")
    name, _, port = host.rpartition(":") if re.search(r":[0-9]+$", host) else (host, "", "80")
    try:
        place = name.strip("[]"), int(port)
        with contextlib.closing(socket.create_connection(place, probe.timeout)) as connection:
            if probe.kind == "tcp":
                return True
            request = f"GET /{path} HTTP/1.0\r\nHost: {host}\r\nConnection: close\r\n\r\n"
            connection.sendall(request.encode())
            while b"\n" not in data and len(data) < 4096:  # the status line, within one deadline
                connection.settimeout(max(deadline - Clock.mono(), 0.001))
                part = connection.recv(4096)
                data += part or b"\n"
        status = re.match(rb"HTTP/\S+ ([0-9]{3})\b", data)
        return status is not None and int(status[1]) < 400
    except (OSError, ValueError):
        return False


_NOTE_TYPES: dict[str, Any] = {
    "run": str, "pid": int, "started": (int, float), "restarts": int, "quick": int, "recent": int,
}  # fmt: skip


def find_notes(folder: str) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yield (process, index, note) of the runs that a former daemon of this boot began."""
    for entry in sorted(os.listdir(os.path.join(folder, "run"))):
        match = re.fullmatch(r"proc-([A-Za-z][A-Za-z0-9_-]{0,63})\.(0|[1-9][0-9]{0,3})", entry)
        if match is None:
            continue
        path = os.path.join(folder, "run", entry)
        note: dict[str, Any] = {}
        with contextlib.suppress(DaemonError, ValueError):
            note = read_json(path) or {}
        is_sound = all(isinstance(note.get(key), kind) for key, kind in _NOTE_TYPES.items())
        if is_sound and note.get("boot") == Platform.boot_id():
            yield match[1], int(match[2]), note
        else:
            with contextlib.suppress(OSError):
                os.unlink(path)


class Watch:
    """How a run is started, asked and heard. Thread: "probe-ID" asks, where there is a question.

    `instance` owns it; the supervisor's lock guards both.
    """

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self.word: dict[str, Any] = {}  # how it was started; its probes run alike
        self.asking = threading.Event()  # ends the thread
        self.is_unasked = False  # that could not start
        self.hearing: socket.socket | None = None  # its NOTIFY_SOCKET

    def make_word(self, env: dict[str, str] | None = None) -> dict[str, Any]:
        """Return what `start` says of a run; env: of an adopted one, if that is known.

        Raises OSError, ValueError, DaemonError.
        """
        one, policy, store = self.instance, self.instance.view.policy, self.instance.store
        is_other = policy.user or policy.group
        ids, who = Platform.identity(policy.user, policy.group) if is_other else ({}, {})
        notify = self._listen(ids.get("uid")) if "notify" in one.kinds else None
        if not env:
            env = {**capture_environment(store.config.env_keep), **who}
            if notify is not None:
                env["NOTIFY_SOCKET"] = notify
                if policy.live and policy.live.kind == "notify":
                    env["WATCHDOG_USEC"] = str(int(policy.live.timeout * 1e6))
            for path in policy.env_file:
                env.update(read_environment(os.path.join(store.project, path)))
            env.update({name: fill(text, one.index) for name, text in policy.env.items()})
            marks = {"PROCESS": one.name, "INSTANCE": one.index, "RUN_ID": one.note["run"]}
            env.update(make_marks(store, **marks))
        command = fill(policy.command, one.index)
        self.word = {
            "argv": [*Platform.SHELL, command] if isinstance(command, str) else command,
            "cwd": os.path.join(store.project, fill(policy.cwd, one.index)), "env": env,
            "umask": int(policy.umask, 8), "log": one.log.path, "sweep": True, "ids": ids,
            **make_limits(policy),
        }  # fmt: skip
        return self.word

    def _listen(self, owner: int | None) -> str:
        """Open the NOTIFY_SOCKET, where a former daemon had it; return its path."""
        near = os.path.join(self.instance.store.folder, "run", "notify-" + self.instance.id)
        self.hearing, path = Platform.bind_notify(near, owner)
        self.hearing.setblocking(False)
        self.instance.note["notify"] = path
        self.instance.keepers.watched.add(self.hearing, functools.partial(self._hear, self.hearing))
        return path

    def stop(self) -> None:
        """The run has ended: ask and hear no more."""
        self.asking.set()
        self.word = {}
        if self.hearing is not None:
            self.instance.keepers.watched.remove(self.hearing)
            self.hearing.close()
            self.hearing = None
        path = self.instance.note.get("notify")
        if path:
            folder = os.path.dirname(path)
            with contextlib.suppress(OSError, DaemonError):
                refuse_foreign(folder, os.lstat(folder))  # somebody's link, in /tmp
                os.unlink(path)
                if folder != os.path.dirname(self.instance.path):
                    os.rmdir(folder)  # with the last one's

    def ask_anew(self) -> None:
        """Ask by the probes that are configured now; holds the lock."""
        view = self.instance.view
        self.asking.set()
        view.is_ready |= view.policy.ready is None or bool(self.instance.note.get("ready"))
        view.lapses, view.last_sign, self.is_unasked = 0, Clock.mono(), False
        if self.instance.kinds - {"notify"}:
            self.asking = threading.Event()
            args, name = (self.asking, self.instance.ward), "probe-" + self.instance.id
            try:
                threading.Thread(target=self._ask, args=args, name=name, daemon=True).start()
            except RuntimeError:  # no thread to be had: tried again
                self.is_unasked = True
        self.instance.moved.notify_all()

    def _ask(self, is_over: threading.Event, ward: Ward) -> None:
        """Ask whether it is ready, then whether it lives."""
        view, pause_s = self.instance.view, 0.0
        while not is_over.wait(pause_s):
            is_ready = view.is_ready
            probe = view.policy.live if is_ready else view.policy.ready
            if probe is None or (is_ready and probe.kind == "notify"):
                return
            pause_s = min(probe.interval, 1.0) if probe.kind == "notify" else probe.interval
            if probe.kind != "notify":
                one, is_command = self.instance, probe.kind == "command"
                is_well = self._ask_command(probe) if is_command else ask(probe, one.index)
                with one.moved:
                    if one.ward is ward and not is_over.is_set() and is_well is not None:
                        one.take_sign(is_well)

    def _ask_command(self, probe: Probe) -> bool | None:
        """Run a probe's command as a child of the keeper; None: it could not be asked."""
        told: queue.SimpleQueue[Begun | Result] = queue.SimpleQueue()
        one, keepers, deadline = self.instance, self.instance.keepers, Clock.mono() + probe.timeout
        run_id, keeper = f"?{one.id}-{os.urandom(8).hex()}", keepers.standing()
        if keeper is None or not self.word:
            return None
        ward = Ward(run_id=run_id, keeper=keeper, tell=told.put)
        command = fill(probe.target, one.index)
        argv = [*Platform.SHELL, command] if isinstance(command, str) else command
        word = {key: self.word[key] for key in ("env", "cwd", "umask", "ids")}
        keepers.start(ward, {**word, "argv": argv, "log": os.devnull, "sweep": True})
        keepers.flush()
        is_well: bool | None = None
        try:
            while True:
                what = told.get(timeout=max(deadline - Clock.mono(), 0.001))
                is_well = False  # it has begun
                if isinstance(what, Result):
                    return None if what.exit_code is None else what.exit_code == 0
        except queue.Empty:
            keepers.end(run_id, int(Platform.kill), 0.0)
            return is_well
        finally:
            keepers.forget([run_id])

    def _hear(self, hearing: socket.socket) -> None:
        """Hear what it says of itself (sd_notify(3)); called when there is something."""
        one, view = self.instance, self.instance.view
        try:
            words = hearing.recv(4096).decode("utf-8", "replace").split("\n")
        except OSError:
            return
        with one.moved:
            if self.hearing is not hearing or one.ward is None:
                return
            if "WATCHDOG=trigger" in words and view.policy.live:
                view.lapses = view.policy.live.failures
                one.moved.notify_all()
            elif "READY=1" in words or ("WATCHDOG=1" in words and view.is_ready):
                one.take_sign(True)
            for word in words:
                if word.startswith("STATUS="):
                    one.remark = word[len("STATUS=") :][:1000]


def publish(instance: Instance, type: str, why: str | None = None) -> None:
    """Publish an event of an instance; holds the lock."""
    payload = {"name": instance.name, "instance": instance.index, "why": why}
    EventStore(instance.store).publish("process." + type, payload, f"process {instance.id}")


class Instance:
    """One copy of a process: what `decide` sees of it, its run, what it has been through.

    `moved` is the supervisor's condition; its lock guards all.
    """

    def __init__(self, name: str, index: int, policy: Any, supervisor: Supervisor) -> None:
        self.name, self.index, self.id = name, index, f"{name}.{index}"
        self.store, self.moved = supervisor.store, supervisor.moved
        self.keepers = supervisor.keepers
        self.policy = policy  # as configured; that of `view` is in force, until the run ends
        self.view = View(policy=policy, state=ProcessState.STOPPED, restarts=[], due=0.0)
        self.view.quick_ends = self.view.jitter = 0
        self.ward: Ward | None = None  # of the run that is there
        self.watch = Watch(self)
        self.note: dict[str, Any] = {}  # of the last run, as in its file
        self.last_end = self.remark = ""  # "exit 137"; what it says of itself (STATUS=)
        self.flaw = ""  # why it is stopping, if nobody asked for it
        self.is_surplus = False  # neither configured nor asked for any more
        self.is_rolling = False  # when it is replaced, only while its siblings are ready
        self.log = LogWatch(os.path.join(self.store.folder, "logs", f"proc-{self.id}.log"))
        self.path = os.path.join(self.store.folder, "run", "proc-" + self.id)
        # At the last look: monotonic, processor seconds, percent.
        self._sample: tuple[float, float, float | None] = (0.0, 0.0, None)

    @property
    def spec(self) -> str:
        """A checksum of that in the configuration which a run cannot take on once it has begun."""
        import zlib

        policy = self.policy
        names = "command env env_file cwd user group umask memory_mb cpu_seconds open_files nice"
        values = [getattr(policy, name) for name in [*names.split(), "processes"]]
        for one in (policy.ready, policy.live):
            values.append(str(one) if one and one.kind == "notify" else None)
        return f"{zlib.crc32(json.dumps(values).encode()):08x}"

    @property
    def kinds(self) -> set[str]:
        """How its probes ask or hear."""
        return {one.kind for one in (self.view.policy.ready, self.view.policy.live) if one}

    def want(self) -> None:
        """Have it up from now on, as if for the first time; holds the lock."""
        view = self.view
        view.is_stale = view.is_stale or view.state == ProcessState.STOPPING
        view.is_wanted, view.has_given_up, view.quick_ends, view.restarts = True, False, 0, []
        if self.ward is None:
            view.result, view.state, self.last_end = None, ProcessState.STOPPED, ""

    def is_up(self) -> bool:
        """Tell whether it is wanted, and there or about to be."""
        return bool(self.view.is_wanted) and self.view.state in _UP

    def is_ready(self) -> bool:
        """Tell whether others that need it can start."""
        return self.view.state in _READY

    def has_done_its_work(self) -> bool:
        """Tell whether it ended well, and is not to run again by itself."""
        return self.view.state == ProcessState.STOPPED and is_good_enough(self.view)

    def is_failing(self) -> bool:
        """Tell whether it was wanted, but ended, and what follows is decided."""
        is_open = self.view.state == ProcessState.CRASHED and self.view.is_wanted
        return self.view.state in _DOWN and not is_open

    def take_on(self, policy: Any) -> None:
        """Go on by another policy that asks for no other run; holds the lock."""
        before, self.view.policy = self.view.policy, policy
        is_other = (before.ready, before.live) != (policy.ready, policy.live)
        if self.ward is not None and self.ward.pid and is_other:
            self.watch.ask_anew()

    def move(self, state: ProcessState, why: str | None = None) -> None:
        """Go to another state: the only way but for `want` and `adopt`; holds the lock."""
        if state not in PROCESS_MOVES[self.view.state]:
            what = f"{self.id}: {self.view.state.value} cannot become {state.value}"
            raise DaemonError("INTERNAL", what)
        cause = self.last_end if state == ProcessState.FAILED else why
        told = "; ".join(dict.fromkeys(filter(None, (cause, why))))
        log.info("Process %s is %s%s", self.id, state.value, told and f": {told}")
        if state == ProcessState.RUNNING and self.ward is not None:
            self.view.last_sign, self.view.lapses = Clock.mono(), 0
            with contextlib.suppress(OSError, ValueError, DaemonError):  # a full disk
                self.write_note(ready=True)
        if state == ProcessState.STOPPING:
            self.flaw = why or ""
        was_ready, is_kept = self.is_ready(), self.view.is_wanted and not self.view.is_stale
        if state == ProcessState.STOPPING and was_ready and is_kept:
            publish(self, "hung", why)
        elif state in _EVENT_STATES and not (was_ready and state in _READY):
            publish(self, "ready" if state in _READY else state.value, cause)
        is_waiting = self.view.state in (ProcessState.BACKOFF, ProcessState.FAILED)
        if state == ProcessState.STOPPED and is_waiting:
            self.forget()
        self.view.state = state
        self.moved.notify_all()

    def forget(self) -> None:
        """Let the next start be a first one; holds the lock, and has no child."""
        self.note = {}
        with contextlib.suppress(OSError):
            os.unlink(self.path)

    def write_note(self, **more: object) -> None:
        """Write what the next daemon is to know of this run. Raises ValueError, DaemonError."""
        self.note.update(more)
        text = json.dumps(self.note, ensure_ascii=False)  # escapes could make it too long
        data = text.encode("utf-8", "surrogatepass").ljust(NOTE_BYTES - 1) + b"\n"
        if len(data) > NOTE_BYTES:
            raise ValueError("the note of the run is too long: use a shorter path")
        with contextlib.suppress(FileExistsError):
            os.mkdir(os.path.dirname(self.path), 0o700)  # removed by somebody
        with os.fdopen(open_file(self.path, os.O_WRONLY | os.O_CREAT), "wb", 0) as file:
            file.write(data)

    def begin(self, keeper: str) -> None:
        """Start a run; holds the lock."""
        view, note, view.policy = self.view, self.note, self.policy
        is_again = view.result is not None and not view.result.never_ran
        if is_again:
            recent = [*view.restarts, Clock.mono()] if view.quick_ends else []
            window = view.policy.restart_window
            view.restarts = [x for x in recent if Clock.mono() - x < window]
        self.note = {
            "run": f"{self.id}-{os.urandom(8).hex()}", "keeper": keeper, "pid": 0,
            "boot": Platform.boot_id(), "started": Clock.now(), "spec": self.spec,
            "restarts": note.get("restarts", 0) + is_again, "recent": len(view.restarts),
            "quick": view.quick_ends, "given_up": view.has_given_up,
        }  # fmt: skip
        self._settle_in(0.0)
        try:
            word = self.watch.make_word()
            self.write_note(user=word["ids"].get("uid", Platform.user()))
        except (OSError, ValueError, DaemonError) as error:
            self.take_end(Result(exit_code=126, reason=f"spawn: {error}"))
            return
        self.ward = self._make_ward()
        failpoint("note")
        self.keepers.start(self.ward, word)
        self.keepers.flush()
        publish(self, "started")

    def adopt(self, note: dict[str, Any]) -> None:
        """Find out what became of the run that a note tells of; holds the lock."""
        view, self.note = self.view, note
        view.quick_ends, view.has_given_up = note["quick"], note.get("given_up", False)
        view.restarts = [Clock.mono()] * note["recent"]
        view.state = ProcessState.RUNNING if note.get("ready") else ProcessState.STARTING
        self._settle_in(max(Clock.now() - note["started"], 0.0))
        view.is_ready = bool(note.get("ready"))
        if isinstance(note.get("ended"), dict):  # told, but not acted on
            self.take_end(Result(**note["ended"]))
        else:
            self.ward = self._make_ward()
            self.keepers.adopt(self.ward)

    def _settle_in(self, age_s: float) -> None:
        view, self.remark = self.view, ""
        view.is_ready, view.lapses, view.is_stale = False, 0, False
        view.last_sign = Clock.mono()
        view.started = view.last_sign - age_s

    def _make_ward(self) -> Ward:
        note = self.note
        return Ward(
            run_id=note["run"], keeper=note.get("keeper"), boot_id=note["boot"],
            user=note.get("user", Platform.user()), log_path=self.log.path, is_process=True,
            tell=functools.partial(self.take, note["run"]), pid=note["pid"] or None,
            start_time=note.get("at"),
        )  # fmt: skip

    def take(self, run_id: str, what: Begun | Result) -> None:
        """Hear from a keeper: the run lives, or has ended."""
        with self.moved:
            if self.ward is None or self.ward.run_id != run_id:
                return
            if isinstance(what, Begun):
                self._take_begin(what)
            else:
                self.take_end(what)
            self.moved.notify_all()
        if isinstance(what, Result):
            self.keepers.forget([run_id])

    def _take_begin(self, begun: Begun) -> None:
        view = self.view
        view.started = Clock.mono() - begun.age_s
        try:
            self.write_note(pid=begun.pid, at=begun.start_time)
            if begun.is_adopted:
                log.info("Adopted process %s, PID %d", self.id, begun.pid)
                if not self.watch.word:  # else it was only the keeper that was reached anew
                    self.watch.make_word(Platform.environment_of(begun.pid))
        except (OSError, ValueError, DaemonError) as error:  # it runs all the same
            log.error("process %s is not looked after: %s", self.id, error)
        self.watch.ask_anew()

    def end(self, force: bool) -> None:
        """Ask all of the run to end by `stop_signal`, KILL it after a grace; force: at once."""
        policy, number = self.view.policy, int(Platform.kill)
        if not force:
            number = int(getattr(signal, "SIG" + policy.stop_signal, number))
        if self.ward is not None:
            self.keepers.end(self.ward.run_id, number, 0.0 if force else policy.stop_timeout)

    def take_sign(self, is_well: bool) -> None:
        """Count a sign of life, or a lapse; the first good one is readiness; holds the lock."""
        view = self.view
        is_news = is_well != (view.is_ready and not view.lapses)
        if is_well:
            view.is_ready, view.lapses, view.last_sign = True, 0, Clock.mono()
        elif view.is_ready:
            view.lapses += 1
        if is_news or not is_well:
            self.moved.notify_all()

    def take_end(self, result: Result) -> None:
        """Note that the run has ended; holds the lock."""
        view, self.ward = self.view, None
        self.watch.stop()
        if result.ran_s is not None:
            view.started = Clock.mono() - result.ran_s
        if result.reason is not None:
            log_reason(self.log.path, result.reason)
        is_meant = view.state == ProcessState.STOPPING and (view.is_stale or not view.is_wanted)
        if view.state == ProcessState.STOPPING and not is_meant:
            result = Result(reason=self.flaw)  # whatever status it ended with
        self.last_end = describe_end(result)
        view.result, view.jitter = None if is_meant else result, random.random()
        if not view.is_wanted:
            self.forget()
        else:
            fields = {key: getattr(result, key) for key in ("exit_code", "signal", "ran_s")}
            with contextlib.suppress(OSError, ValueError, DaemonError):
                self.write_note(ended={**fields, "never_ran": result.never_ran})
        self.move(ProcessState.STOPPED if is_meant else ProcessState.CRASHED, self.last_end)

    def describe(self, usage: Mapping[int, tuple[float, int]]) -> dict[str, Any]:
        """Return {"index", "pid", "state", "cpu_percent", "memory_bytes", "uptime_secs",
        "restart_count", "command"}; cpu_percent: since the last look; holds the lock."""
        now, pid, percent = Clock.mono(), self.ward.pid if self.ward is not None else None, None
        cpu_s, memory = usage.get(pid or 0, (None, None))
        if cpu_s is not None:
            last, last_s, percent = self._sample
            if last < self.view.started:  # the first look: since it began
                last, last_s, percent = self.view.started, 0.0, None
            if percent is None or now - last > CPU_SAMPLE_S:
                percent = round(max(cpu_s - last_s, 0.0) / max(now - last, 0.001) * 100, 1)
                self._sample = (now, cpu_s, percent)
        uptime_s = int(now - self.view.started) if pid else None
        words = (self.policy if self.ward is None else self.view.policy).command
        return {
            "command": fill(words if isinstance(words, str) else " ".join(words), self.index),
            "index": self.index, "pid": pid, "state": self.view.state.value,
            "cpu_percent": percent, "memory_bytes": memory, "uptime_secs": uptime_s,
            "restart_count": self.note.get("restarts", 0),
        }  # fmt: skip

    def explain(self) -> str:
        """Say in a line what it does, and why."""
        view, now, count = self.view, Clock.mono(), self.note.get("restarts", 0)
        parts = [self.last_end] if self.last_end else []
        if parts and count:
            parts = [f"restarted {count} time{'s' * (count > 1)}: {self.last_end}"]
        if view.state in (ProcessState.BACKOFF, ProcessState.FAILED):
            parts.append(f"next try in {span(view.due - now)}")
        elif view.state == ProcessState.STARTING and self.ward is None:
            parts = [self.keepers.obstacle or "waits for " + ", ".join(view.policy.needs)]
        elif view.state == ProcessState.STARTING:
            parts.append(f"not ready yet, for {span(now - view.started)}")
        elif view.state == ProcessState.UNHEALTHY:
            parts.append(f"no sign of life for {span(now - view.last_sign)}")
        elif view.state == ProcessState.RUNNING:
            parts.insert(0, f"for {span(now - view.started)}")
        parts += [f'it says "{self.remark}"'] if self.remark else []
        return ": ".join(filter(None, (f"{self.id} {view.state.value}", "; ".join(parts))))


def get_process(config: Config, name: str) -> Any:
    """Return the section of a process. Raises PROCESS_NOT_FOUND."""
    if name not in config.processes:
        hint = "processes: " + (", ".join(config.processes) or "none; write [process.NAME]")
        stem = name.partition(".")[0]
        if stem in config.processes:
            hint = f"no instance can be named here, or it has no such one; write {stem}"
        raise DaemonError("PROCESS_NOT_FOUND", f"there is no process {name!r}", hint)
    return config.processes[name]


def read_process_logs(
    store: TaskStore, name: str, offsets: Mapping[str, int], lines: int
) -> dict[str, tuple[bytes, int]]:
    """Return {"web.0": (data, next offset)} of a process, or of one instance, from `offsets` on.

    Of an instance that is not in `offsets`: the last `lines` lines. Instances that were
    scaled away must be named. Raises PROCESS_NOT_FOUND.
    """
    found, entries = {}, list[str]()
    policy = store.config.processes.get(name)  # None: an instance, or its process was removed
    decisions = store.get_decisions()
    count = decisions.get(name, (None, None))[1]
    most = INTEGER_MAX if policy is None else policy.instances if count is None else count
    with contextlib.suppress(FileNotFoundError):  # no daemon has been there yet
        entries = os.listdir(os.path.join(store.folder, "logs"))
    pattern = re.escape(name) + ("()" if "." in name else r"\.([0-9]+)")
    for entry in sorted(entries):
        match = re.fullmatch(rf"proc-({pattern})\.log", entry)
        path = os.path.join(store.folder, "logs", entry)
        if match and int(match[2] or 0) < most and os.path.isfile(path):
            found[match[1]] = read_log(path, offsets.get(match[1], -lines))
    if not found:
        process, _, index = name.partition(".")
        most, scaled = get_process(store.config, process).instances, decisions.get(process)
        most = most if scaled is None or scaled[1] is None else scaled[1]
        if index and not (index.isdecimal() and int(index) < most):
            get_process(store.config, name)  # raises
    return found


def look_until(supervisor: Supervisor) -> None:
    """Look at a supervisor's keepers, as the runner does where there is one, until it ends."""
    while not supervisor.halted.is_set():
        try:
            supervisor.keepers.look(3600.0)
        except Exception:  # this thread's top frame
            log.exception("looking at the keepers failed")
            supervisor.halted.wait(1.0)
    supervisor.keepers.close(supervisor.is_stopping)


class Supervisor:
    """Keeps the processes of the configuration as they are wanted.

    Thread: "supervisor" decides. Life: start -> stop, which ends them; or -> halt, which
    leaves them to the next daemon. What can be done to it: ProcessVerbs.
    """

    def __init__(
        self, store: TaskStore, on_failure: Callable[[str], None] = lambda name: None,
        on_stopped: Callable[[], None] = lambda: None, keepers: Keepers | None = None,
    ) -> None:  # fmt: skip
        self.store = store
        self.keepers = keepers or Keepers(store.folder)
        self._is_alone = keepers is None  # nobody else looks at the keepers
        self._on_failure, self._on_stopped = on_failure, on_stopped
        # Guards all instances; taken before the locks of keepers and store.
        self.moved = threading.Condition()
        self._instances: dict[str, Instance] = {}
        self.is_stopping = False
        self.halted = threading.Event()
        self._next_check = 0.0  # monotonic

    def start(self) -> None:
        """Adopt what a former daemon left, start what is wanted."""
        with self.moved:
            self._adopt()
            self.arrange()
        self.keepers.open("a")
        threading.Thread(target=self._loop, name="supervisor", daemon=True).start()
        if self._is_alone:
            self.keepers.on_standing = self.wake
            threading.Thread(target=look_until, args=(self,), name="keepers", daemon=True).start()

    def wake(self) -> None:
        """Have it decide anew: a keeper takes starts now."""
        with self.moved:
            self.moved.notify_all()

    def _adopt(self) -> None:
        decisions = self.store.get_decisions()
        gone = Config({"process": {"gone": {"command": "gone"}}}).processes["gone"]
        for name, index, note in find_notes(self.store.folder):
            policy = self.store.config.processes.get(name, gone)
            instance = self._instances[f"{name}.{index}"] = Instance(name, index, policy, self)
            instance.view.is_wanted = decisions.get(name, (None, None))[0] is not False
            log.info("Adopting process %s", instance.id)
            instance.adopt(note)

    def finish(self, deadline_mono: float) -> list[str]:
        """KILL all that a former daemon left, without a thread; return what still runs then.

        For a client that acts while there is no daemon; the next start is a first one.
        """
        with self.moved:
            self._adopt()
            self.stop(force=True)
        self.keepers.open("a")
        while Clock.mono() < deadline_mono and any(o.ward for o in self._instances.values()):
            self.keepers.look(0.1)
        return sorted(one.id for one in self._instances.values() if one.ward)

    def stop(self, force: bool = False) -> None:
        """End all, each after what needs it; `on_stopped` is called when it is done."""
        with self.moved:
            self.is_stopping = True
            for instance in self._instances.values():
                instance.view.is_wanted = False
                if instance.ward is None:
                    instance.forget()
                elif force:
                    instance.end(force)
            self.moved.notify_all()

    def halt(self) -> None:
        """Decide nothing more, and leave the children to the next daemon."""
        with self.moved:
            self.halted.set()
            for instance in self._instances.values():
                instance.watch.asking.set()
            self.moved.notify_all()
        self.keepers.wake()

    def reload(self, old: Config) -> None:
        """Start, stop and replace what differs now from the configuration before."""
        with self.moved:
            for name, policy in self.store.config.processes.items():
                before = old.processes.get(name)
                if before is not None and before.instances != policy.instances:
                    self.store.decide_process(name, "instances", None)
            if not self.is_stopping:
                self.arrange()

    def status(self) -> dict[str, Any]:
        """Return {"process_count", "running_instances", "failed": [ids], "down", "health"}.

        down: {id: "backoff", "crashed" or "failed"}; health: "degraded" then, else "healthy".
        """
        with self.moved:
            states = {one.id: one.view.state for one in self._instances.values()}
        down = {name: state.value for name, state in states.items() if state in _DOWN}
        return {
            "process_count": len(self.store.config.processes),
            "running_instances": sum(state in _READY for state in states.values()),
            "failed": [name for name, state in down.items() if state != "backoff"],
            "down": down,
            "health": "degraded" if down else "healthy",
        }

    def arrange(self) -> None:
        """Have the instances that configuration and users' decisions ask for; holds the lock."""
        decisions = self.store.get_decisions()
        surplus = dict(self._instances)
        for name, policy in self.store.config.processes.items():
            is_up, count = decisions.get(name, (None, None))
            siblings = [one for one in self._instances.values() if one.name == name]
            is_wanted = policy.autostart or any(one.view.is_wanted for one in siblings)
            for index in range(policy.instances if count is None else count):
                instance = surplus.pop(f"{name}.{index}", None)
                if instance is None or instance.is_surplus:
                    if instance is None:
                        instance = Instance(name, index, policy, self)
                        self._instances[instance.id] = instance
                    if is_wanted if is_up is None else is_up:
                        instance.want()
                instance.is_surplus, instance.policy = False, policy
                if instance.note.get("spec") in (None, instance.spec):
                    instance.take_on(policy)
                elif instance.ward is not None:
                    instance.view.is_stale = instance.is_rolling = True
                elif instance.view.is_wanted:  # perhaps mended
                    instance.want()
        for instance in surplus.values():
            instance.view.is_wanted, instance.is_surplus = False, True
        self.moved.notify_all()

    def _loop(self) -> None:
        while not self.halted.is_set():
            try:
                with self.moved:
                    wait_s, began = self._settle(), Clock.mono()
                    self.moved.wait(wait_s)
                    late_s = Clock.mono() - began - (wait_s or 0.0)
                    if wait_s is not None and late_s > 1.0:  # frozen: nobody could be heard
                        for one in self._instances.values():
                            one.view.shift(late_s)
                self._check()
            except Exception:  # this thread's top frame
                log.exception("the supervisor failed")
                self.halted.wait(1.0)

    def _settle(self) -> float | None:
        """Decide for all until nothing changes; return how long nothing can be due."""
        now, is_moving, keeper = Clock.mono(), not self.halted.is_set(), self.keepers.standing()
        while is_moving:
            is_moving = False
            everyone = list(self._instances.values())
            holding = {
                need for one in everyone if one.ward is not None and not one.view.is_wanted
                for need in one.view.policy.needs
            }  # fmt: skip
            ready: dict[str, bool] = {}
            for one in everyone:
                ready[one.name] = ready.get(one.name, True) and is_good_enough(one.view)
            for instance in everyone:
                view = instance.view
                if instance.watch.is_unasked and now >= view.last_sign + 1.0:
                    instance.watch.ask_anew()
                view.is_spawned = instance.ward is not None
                if not view.is_wanted:  # what needs it, and is to end too, ends first
                    view.is_held = instance.name in holding
                elif view.is_spawned:  # one that is ready stays while a sibling is not
                    is_rolling = instance.is_rolling and instance.is_ready()
                    others = (x for x in everyone if x.name == instance.name and x.view.is_wanted)
                    view.is_held = is_rolling and not all(one.is_ready() for one in others)
                else:
                    needs = (ready.get(need, False) for need in view.policy.needs)
                    view.is_held = keeper is None or not all(needs)
                is_moving |= self._apply(instance, decide(now, view), keeper or "")
                if instance.is_surplus and instance.ward is None:
                    instance.forget()
                    del self._instances[instance.id]
        return self._next_wake_s(now)

    def _next_wake_s(self, now: float) -> float | None:
        everyone = self._instances.values()
        if self.is_stopping and not any(one.ward for one in everyone):
            self.halted.set()
            self.keepers.wake()
            self._on_stopped()
            return 0.0
        times = [when_due(one.view) for one in everyone]
        times += [one.log.due_mono for one in everyone if one.ward]
        times += [now + 1.0 for one in everyone if one.watch.is_unasked]
        if any(one.ward and one.view.policy.memory_restart_mb for one in everyone):
            times.append(self._next_check)
        first = min(times, default=float("inf"))
        return None if first == float("inf") else max(first - Clock.mono(), 0.0)

    def _apply(self, instance: Instance, action: Action, keeper: str) -> bool:
        """Do what was decided; tell whether anything changed."""
        view = instance.view
        is_over = view.is_wanted and action.is_wanted is False and action.state in _DOWN
        for name in ("due", "quick_ends", "has_given_up", "is_wanted"):
            if getattr(action, name) is not None:
                setattr(view, name, getattr(action, name))
        is_moving = action.state != view.state
        if is_moving:
            instance.move(action.state, action.why)
        if action.act == "start":
            instance.begin(keeper)
        elif action.act is not None:
            instance.end(action.act == "kill")
        is_over = is_over or (is_moving and action.state == ProcessState.FAILED)
        if view.policy.critical and is_over:
            self._on_failure(instance.id)
        return is_moving or action.act == "start"

    def _check(self) -> None:
        """Cap the logs; replace what uses too much memory."""
        now = Clock.mono()
        with self.moved:
            running = [one for one in self._instances.values() if one.ward is not None]
        for instance in running:
            if now >= instance.log.due_mono:
                instance.log.look(int(instance.view.policy.log_mb * 1e6))
        limited = {
            one.ward.pid: one
            for one in running if one.ward and one.ward.pid and one.view.policy.memory_restart_mb
        }  # fmt: skip
        if not limited or now < self._next_check:
            return
        self._next_check = now + LOG_CHECK_S
        usage = Platform.usage(limited)
        with self.moved:
            for pid, (_, used) in usage.items():
                instance = limited[pid]
                is_there = instance.ward is not None and instance.ward.pid == pid
                most = (instance.view.policy.memory_restart_mb or float("inf")) * 1e6
                if is_there and used > most and not instance.view.is_stale:
                    log.warning("process %s uses %d MB", instance.id, used / 1e6)
                    instance.view.is_stale, instance.is_rolling = True, False
                    self.moved.notify_all()

    def find(self, name: str) -> list[Instance]:
        """Return the instances of a process, or the one that is named; holds the lock."""
        everyone = self._instances.values()
        found = [one for one in everyone if name in (one.name, one.id) and not one.is_surplus]
        if not found:
            get_process(self.store.config, name)
        return sorted(found, key=lambda one: one.index)

    @contextlib.contextmanager
    def acting(self, names: Iterable[str]) -> Iterator[list[Instance]]:
        """Hold the lock, give all instances of processes. Raises PROCESS_NOT_FOUND, BUSY."""
        with self.moved:
            if self.is_stopping:
                raise DaemonError("BUSY", "the daemon is stopping", "`start` it again first")
            for name in names:
                get_process(self.store.config, name)
            yield [one for name in names for one in self.find(name)]

    def wait_until(self, is_done: Callable[[], bool], within_s: float) -> bool:
        """Wait for the instances to come to something; holds the lock."""
        deadline = Clock.mono() + within_s
        self.moved.notify_all()
        while not is_done():
            left_s = deadline - Clock.mono()
            if left_s <= 0 or self.halted.is_set():
                return False
            self.moved.wait(min(left_s, SETTLE_S / 5))
        return True


# ============================================================================
# 15. WATCH - what changes in the files below some folders, and the tasks made of it
#     Uses 1-9. Threads: one a FileWatcher. Closed by: Daemon.
# ============================================================================

# A snapshot says what is in each folder. Notifications only say where to compare it with the
# disk, so a lost one, a folder that is new and a tree that is polled are the same comparison of
# more. What differs is kept as it was; when the burst is over, that is compared with what is
# there then, and what cancels itself out is no change. A stamp is (time of modification in ns,
# size, inode) of a file, (0, -1, inode) of a folder.


class Change(Value):
    """What a burst of changes did to one file."""

    kind: str  # created, modified, deleted, moved
    path: str
    source: str | None  # where it was moved from


def glob_expression(patterns: Iterable[str]) -> re.Pattern[str]:
    """Compile globs: `*` and `?` stay within a folder, `**` does not.

    One without a slash is for a name in any folder, others for a path from the root.
    """
    marks = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    found = ["(?!)"]  # no path
    for pattern in (pattern.rstrip("/") for pattern in patterns):
        pattern = pattern.lstrip("/") if "/" in pattern else "**/" + pattern
        words = re.findall(r"\*\*/|\*\*|.", pattern, re.DOTALL)
        found.append("".join(marks.get(word) or re.escape(word) for word in words))
    return re.compile("|".join(found), re.DOTALL)


def check_folders(where: str, folders: Sequence[str], code: str = "CONFIG_INVALID") -> None:
    """Refuse to watch nothing, files, and folders that cannot be read. Raises `code`."""
    why = "" if folders else "no folder is named"
    for path in folders:
        try:
            os.scandir(path).close()
        except FileNotFoundError:
            continue
        except OSError as error:
            why = f"{path}: {error.strerror}"
    if why:
        raise DaemonError(code, f"{where}: {why}", "name folders; missing ones are waited for")


class _Tree:
    """The files below one root: a snapshot, and what differed from it before. One thread."""

    def __init__(self, root: str, ignore: Any, endings: tuple[str, ...], is_polled: bool) -> None:
        self.root, self.is_polled = root, is_polled
        self._ignore, self._endings = ignore, endings
        self.known: dict[str, dict[str, Any]] = {}  # folder -> name -> stamp
        self._before: dict[str, Any] = {}  # what this burst changed -> its stamp before
        self._touched: set[str] = set()  # was written to, whatever its stamp says
        self.is_news, self.has_gaps = False, True  # something was noted; all is to be looked at
        self.notifier: Any = None
        self._place: Any = None  # which folder the root was
        self.unread: set[str] = set()  # folders that cannot be read; "": the root
        self.due_mono = self._looked_mono = Clock.mono()  # when to look untold; when it was done
        self.changed_mono = 0.0  # the last news is no older
        self._busy_until = 0.0  # it is polled more often, monotonic

    def close(self) -> None:
        """Give up the notifications."""
        if self.notifier is not None:
            self.notifier.close()
        self.notifier = None

    def _poll(self, why: str) -> None:
        text = "watching %s: nobody tells of changes, so it is looked through now and then: %s"
        log.warning(text, self.root, why)
        self.close()
        self.is_polled, self.due_mono = True, Clock.mono() + WATCH_LOOK_S

    def _path(self, relative: str) -> str:
        return os.path.join(self.root, relative.replace("/", os.sep)) if relative else self.root

    def _is_wanted(self, path: str, is_folder: bool) -> bool:
        is_ending = is_folder or not self._endings or path.endswith(self._endings)
        return is_ending and not self._ignore.fullmatch(path)

    def _note(self, path: str, stamp: Any) -> None:
        """Remember how a file was before the burst."""
        self._before.setdefault(path, stamp)
        self.is_news = True

    def look(self, now: float, is_over: bool, is_held: bool) -> bool:
        """Look at what was told, and, when due, for what nobody tells; is there news?"""
        self.changed_mono, self.is_news = now, False
        if self.notifier is not None:
            self._hear()
        if self.has_gaps and is_over:
            self.begin()
        elif self.is_polled and (now >= self.due_mono or (is_over and not is_held)):
            self.changed_mono, self._looked_mono = self._looked_mono, now
            self._scan("", True)
            self._busy_until = now + POLL_BUSY_S if self.is_news else self._busy_until
            share = POLL_SHARE * (POLL_BUSY_FACTOR if now < self._busy_until else 1)
            pause_s = max(WATCH_LOOK_S, (Clock.mono() - now) / share)
            self.due_mono = now + min(pause_s, POLL_MAX_S)
        elif now >= self.due_mono:
            # It or what is above it may have been moved, or is a link to something else by now.
            if "" in self.unread or file_id(os.path.realpath(self.root)) != self._place:
                self.begin()
            self.due_mono = now + (WATCH_LOOK_S if "" in self.unread else LOOK_S)
        return self.is_news

    def _hear(self) -> None:
        for folder, name, what in self.notifier.read():
            path = f"{folder}/{name}" if folder else name
            if what == "gap":
                self.has_gaps = self.is_news = True
            elif self._is_wanted(path, what == "folder"):
                if what == "written" and self._find(path):
                    self._touched.add(path)
                    self._note(path, self._find(path))
                try:
                    info = os.lstat(self._path(path))
                except PermissionError:  # what is known of it stands
                    continue
                except OSError:
                    info = None
                for inner in self._look(folder, name, info, False):
                    self._scan(inner)

    def begin(self) -> None:
        """Look at everything, and ask to be told from now on."""
        self.close()
        real = os.path.realpath(self.root)
        try:
            kind = Platform.network_file_system(real)
            if kind is not None and not self.is_polled:
                self._poll(f"it is on {kind}")
            elif not self.is_polled:
                self.notifier = Platform.open_notifier()
        except (OSError, ImportError) as error:
            self._poll(getattr(error, "strerror", str(error)))
        self.has_gaps, self._place = False, file_id(real)
        self.due_mono = Clock.mono() + WATCH_LOOK_S
        self._scan("", True)

    def _scan(self, folder: str, is_deep: bool = False) -> None:
        """Compare a folder, and those in it that are new (deep: all), with what is known."""
        todo = [folder]
        while todo:
            folder = todo.pop()
            found = self._read(folder)
            if found is not None:
                known = self.known.setdefault(folder, {})
                for name in [*(known.keys() - found.keys()), *found]:
                    todo += self._look(folder, name, found.get(name), is_deep)

    def _read(self, folder: str) -> dict[str, os.stat_result] | None:
        """Return what is in a folder, {} when it is gone, None when it cannot be read."""
        path, found = self._path(folder), dict[str, os.stat_result]()
        try:
            if self.notifier is not None:  # first: what is made meanwhile is found, or told of
                self.notifier.add(path, folder)
            with os.scandir(path) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):
                        found[entry.name] = entry.stat(follow_symlinks=False)
        except OSError as error:
            if self.notifier is not None and error.errno in (errno.ENOSPC, errno.ENOMEM):
                self._poll(f"{error.strerror} (fs.inotify.max_user_watches)")
                return self._read(folder)
            if error.errno in SHORTAGES:
                raise
            is_gone = isinstance(error, (FileNotFoundError, NotADirectoryError))
            if folder not in self.unread and not (folder and is_gone):
                self.unread.add(folder)
                text = "watching %s: %s is left out until it can be read: %s"
                log.warning(text, self.root, path, error.strerror)
            return {} if is_gone else None
        if folder in self.unread:
            self.unread.discard(folder)
            log.warning("watching %s: %s can be read", self.root, path)
        return found

    def _look(self, folder: str, name: str, info: Any, is_deep: bool) -> list[str]:
        """Compare what is at a path with what is known; return the folder to look into."""
        known, stamp = self.known.get(folder), None
        if info is not None and stat.S_ISREG(info.st_mode):
            stamp = (info.st_mtime_ns, info.st_size, info.st_ino)
        elif info is not None and stat.S_ISDIR(info.st_mode):
            if getattr(info, "st_reparse_tag", 0) != MOUNT_POINT:
                stamp = (0, -1, info.st_ino)
        old = None if known is None else known.get(name)
        if known is None or (stamp == old and (stamp is None or stamp[1] >= 0)):
            return []
        path = f"{folder}/{name}" if folder else name
        is_folder, was_folder = (one is not None and one[1] < 0 for one in (stamp, old))
        if (old is None or is_folder != was_folder) and not self._is_wanted(path, is_folder):
            stamp, is_folder = None, False
        known[name] = stamp
        if stamp is None:
            del known[name]
        before = None if was_folder else old
        if before != (None if is_folder else stamp):
            self._note(path, before)
        if was_folder and not is_folder:
            self._drop(path)
        is_new = stamp != old or (self.notifier and path not in self.notifier.numbers)
        return [path] if is_folder and (is_deep or is_new) else []

    def _drop(self, folder: str) -> None:
        """Forget a folder that has gone, and all in it."""
        todo = [folder]
        while todo:
            folder = todo.pop()
            if self.notifier is not None:
                self.notifier.remove(folder)
            for name, stamp in self.known.pop(folder, {}).items():
                path = f"{folder}/{name}"
                if stamp[1] < 0:
                    todo.append(path)
                else:
                    self._note(path, stamp)

    def _find(self, path: str) -> Any:
        """Return the stamp of a file, None when it is not there."""
        folder, _, name = path.rpartition("/")
        stamp = self.known.get(folder, {}).get(name)
        return None if stamp is None or stamp[1] < 0 else stamp

    def forget(self) -> None:
        """Take what is known now for how it was before the next burst."""
        self._before.clear()
        self._touched.clear()

    def sum_up(self, kinds: Container[str]) -> Iterator[Change]:
        """Yield what the burst has changed, all in all."""
        after = {path: self._find(path) for path in self._before}
        gone = {old: path for path, old in self._before.items() if old and not after[path]}
        moved = {
            path: gone.pop(now) for path, now in after.items()
            if "moved" in kinds and not self._before[path] and now in gone and now[2]
        }  # fmt: skip
        sources = set(moved.values())
        for path, old in self._before.items():
            kind = "modified" if after[path] != old or path in self._touched else ""
            if old is None or after[path] is None:
                kind = "moved" if path in moved else "created" if after[path] else "deleted"
            if kind in kinds and path not in sources and (old or after[path]):
                source = self._path(moved[path]) if path in moved else None
                yield Change(kind=kind, path=self._path(path), source=source)


class FileWatcher:
    """Calls `on_change` with what has changed in the files below some folders.

    Once a burst: `debounce_s` after its last change, `debounce_max_s` after its first at the
    latest; again, a second later, when it raises. A missing folder is waited for; links are
    not followed. on_change: is given [Change, ...], sorted by path, in the watcher's thread.
    poll: do not ask the system to tell. hold: is given since when a burst may be over
    (monotonic), returns how long it has to wait.
    Thread: "watch". Life: start -> stop. Raises BAD_REQUEST.
    """

    def __init__(
        self, paths: Iterable[str], on_change: Callable[[list[Change]], object], *,
        events: Iterable[str] = FILE_CHANGES, ignore: Iterable[str] = (),
        extensions: Iterable[str] = (), debounce_s: float = DEBOUNCE_S,
        debounce_max_s: float = DEBOUNCE_MAX_S, poll: bool = False,
        hold: Callable[[float], float] = lambda last: 0.0,
    ) -> None:  # fmt: skip
        self._on_change, self._hold = on_change, hold
        self._kinds = {FILE_CHANGES[event] for event in events}
        self._debounce_s, self._debounce_max_s = debounce_s, max(debounce_s, debounce_max_s)
        endings = tuple("." + word.lstrip(".") for word in extensions)
        ignored = glob_expression([*WATCH_IGNORED, *ignore])
        found = [paths] if isinstance(paths, str) else paths
        roots = [*dict.fromkeys(os.path.abspath(path) for path in found)]
        check_folders("paths", roots, "BAD_REQUEST")
        self._trees = [_Tree(root, ignored, endings, poll) for root in roots]
        self._first = float("inf")  # of a burst, monotonic
        self._last, self._due = 0.0, 0.0  # its last change; when it is over
        self._failure = ""  # what was said of it
        self._waker, self._wakee = socket.socketpair()
        self._is_over, self._is_standing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._loop, name="watch", daemon=True)

    def start(self, within_s: float = STANDING_S) -> None:
        """Begin; what changes from now on is seen; in a tree that takes longer: soon."""
        self._thread.start()
        self._is_standing.wait(within_s)

    def stop(self) -> None:
        """Tell what was changed until now, then nothing more."""
        self._is_over.set()
        if self._thread.is_alive():
            with contextlib.suppress(OSError):  # it has just ended
                self._waker.send(b"x")
            self._thread.join(ANSWER_TIMEOUT_S)

    def status(self) -> list[dict[str, Any]]:
        """Return [{"path", "how": "inotify", "polling" or "missing", "folders"}]."""
        found = []
        for tree in self._trees:
            how = "missing" if "" in tree.unread else "polling" if tree.is_polled else "inotify"
            found.append({"path": tree.root, "how": how, "folders": len(tree.known)})
        return found

    def _loop(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._is_over.is_set()
            try:
                self._turn(is_last)
            except Exception as error:  # this thread's top frame, and the user's callback
                is_bug = not isinstance(error, DaemonError)  # else the trees know what is there
                if str(error) != self._failure or is_last:
                    self._failure = str(error)
                    log.error("watching: %s", error, exc_info=is_bug)
                for tree in self._trees:
                    tree.has_gaps = tree.has_gaps or is_bug
                self._first = self._due = Clock.mono()
                self._is_over.wait(WATCH_LOOK_S)
        for one in (*self._trees, self._waker, self._wakee):
            one.close()  # type: ignore[attr-defined]

    def _wait(self) -> None:
        """Wait until something may have changed, or is due."""
        wake = min([self._due, *(tree.due_mono for tree in self._trees)])
        with selectors.DefaultSelector() as selector:
            selector.register(self._wakee, selectors.EVENT_READ)
            for tree in self._trees:
                if tree.notifier is not None:
                    selector.register(tree.notifier, selectors.EVENT_READ)
            if selector.select(wake - Clock.mono()):
                self._is_over.wait(min(WATCH_GATHER_S, self._debounce_s))

    def _turn(self, is_last: bool) -> None:
        """Wait until something may have changed or a burst is over, and see to it."""
        self._wait()
        now, is_first = Clock.mono(), not self._is_standing.is_set()  # no burst, but the snapshot
        is_over = is_last or self._due <= now
        wait_s = self._hold(self._last) if is_over and not (is_first or is_last) else 0.0
        if wait_s > 0.0:
            self._first, self._due = float("inf"), now + wait_s
        for tree in self._trees:
            if tree.look(now, is_over, wait_s > 0.0):
                self._first, self._last = min(self._first, now), max(self._last, tree.changed_mono)
                self._due = min(now + self._debounce_s, self._first + self._debounce_max_s)
        if self._due > now and not (is_first or is_last):
            return
        found = {one.path: one for tree in self._trees for one in tree.sum_up(self._kinds)}
        if found and not is_first:
            self._on_change([found[path] for path in sorted(found)])
        for tree in self._trees:
            tree.forget()
        self._first = self._due = float("inf")
        self._last, self._failure = 0.0, ""
        self._is_standing.set()


class WatchTrigger:
    """One [watch.NAME]: makes a task of each burst. Thread: its FileWatcher's."""

    def __init__(self, name: str, options: Any, store: TaskStore, wake: Callable[[], None]) -> None:
        self.name, self.options = name, options
        self._store, self._wake = store, wake
        self._task = EventStore(store).get_fires().get(f"watch.{name}", (0, None))[1]
        self._ended: float | None = None  # that task, monotonic
        self._is_own, self._rounds = False, 0  # changed by its own task; so often in a row
        roots = [os.path.join(store.project, path) for path in options.paths]
        own, folder = [], os.path.realpath(store.folder)  # what the daemon writes is no change
        for above in (os.path.join(os.path.realpath(root), "") for root in roots):
            if folder.startswith(above):
                own.append("/" + folder[len(above) :].replace(os.sep, "/"))
        self.watcher = FileWatcher(
            roots, self._make_task, events=options.events, ignore=[*options.ignore, *own],
            extensions=options.extensions, debounce_s=options.debounce_ms / 1000,
            debounce_max_s=options.debounce_max, poll=options.poll, hold=self._hold,
        )  # fmt: skip

    def _hold(self, last: float) -> float:
        """Let changes wait for the end of the task before, and longer when they are a loop."""
        if self._ended is None:
            tasks = self._store.find(ids=[self._task]) if self._task else []
            finished_at = tasks[0].finished_at if tasks else 0.0
            if finished_at is None:
                self._is_own = False
                return WATCH_BUSY_S if self.options.overlap == "queue" else 0.0
            self._ended = Clock.mono() - max(Clock.now() - finished_at, 0.0) + WATCH_OWN_S
        self._is_own = last <= self._ended  # else somebody else changes things
        if not self._is_own or self._rounds < LOOP_ROUNDS:
            return 0.0
        pause_s = backoff(self._rounds - LOOP_ROUNDS + 1, LOOP_PAUSE_S, LOOP_PAUSE_MAX_S)
        return float(min(self._ended + pause_s - Clock.mono(), WATCH_LOOK_S))

    def _make_task(self, changes: list[Change]) -> None:
        source, told = f"watch {self.name}", []
        for kind in sorted({change.kind for change in changes}):
            payload = self._describe([change for change in changes if change.kind == kind])
            told.append(Event.make(f"file.{kind}", payload, source))
        event = Event.make("file.changed", self._describe(changes), source)
        paths = (json.dumps(p) if "\n" in p or "\r" in p else p for p in (c.path for c in changes))
        lines = os.fsencode("".join(path + "\n" for path in paths))
        trigger, is_behind = self.options, self.options.overlap == "queue"
        made = EventStore(self._store).fire(
            f"watch.{self.name}", trigger, event, is_behind, told, lines
        )
        self._task, self._ended = made or self._task, None
        self._rounds = self._rounds + 1 if self._is_own else 0
        if self._rounds >= LOOP_ROUNDS:
            text = "watch %s: a loop, slowed down: its task changes what it watches: %s"
            log.error(text, self.name, ", ".join(change.path for change in changes[:3]))
        self._wake()

    def _describe(self, changes: list[Change]) -> dict[str, Any]:
        """Return the payload of an event: too many changes for a variable are left out."""
        found = [{k: v for k, v in one.to_dict().items() if v is not None} for one in changes]
        is_long = len(json.dumps(found)) > EVENT_VARIABLE_CHARS
        payload = {"watch": self.name, "count": len(found), "truncated": is_long}
        return {**payload, "changes": [] if is_long else found}


def check_watches(config: Config, project: str, path: str | None) -> None:
    """Check the folders of all watches. Raises CONFIG_INVALID."""
    for name, watch in config.watches.items():
        where = f"{path}: watch.{name}.paths = {watch.paths!r}"
        check_folders(where, [os.path.join(project, folder) for folder in watch.paths])


class Watches:
    """The watches of the configuration. Threads: one a watch. Life: start -> stop."""

    def __init__(self, store: TaskStore, wake: Callable[[], None]) -> None:
        self._store, self._wake = store, wake
        self._lock = threading.Lock()  # one `start` at a time
        self._watches: dict[str, WatchTrigger] = {}

    def start(self) -> None:
        """Have the watches that the configuration asks for: after a reload, and after a lack."""
        with self._lock:
            old, found, deadline = {**self._watches}, {}, Clock.mono() + STANDING_S
            for name, options in self._store.config.watches.items():
                if name in old and old[name].options == options:
                    found[name] = old.pop(name)
                elif options.enabled:
                    try:
                        watch = WatchTrigger(name, options, self._store, self._wake)
                        watch.watcher.start(max(deadline - Clock.mono(), 0.0))
                    except (DaemonError, OSError, RuntimeError) as error:  # no thread, say
                        log.error("watch %s does not work, for now: %s", name, error)
                    else:
                        found[name] = watch
            self._watches = found
            for name, watch in old.items():  # now: what changes meanwhile is seen by both
                watch.options = self._store.config.watches.get(name, watch.options)
                watch.watcher.stop()

    def stop(self) -> None:
        """End them; what was changed until now becomes tasks."""
        for watch in self._watches.values():
            watch.watcher.stop()

    def status(self) -> dict[str, Any]:
        """Return {"watches": {name: what FileWatcher says}}."""
        return {"watches": {name: one.watcher.status() for name, one in self._watches.items()}}


# ============================================================================
# 16. CONTROL - frames, verbs, server, Client
#     Uses 1-14. Threads: one accepts, one a connection. Closed by: Daemon.
# ============================================================================

# A frame is four bytes of length, big-endian, and a JSON object of that length. A request
# names its verb in "type"; each gets one response. The verbs of TaskVerbs are the whole of
# what can be done to tasks: the server offers them, and Client calls the very same ones on
# the store, under the project's lock, when there is no daemon.

if TYPE_CHECKING:
    Fields = dict[str, Any]


def send_frame(connection: socket.socket, message: Mapping[str, Any] | DaemonError) -> None:
    """Send a message or an error. Raises BAD_REQUEST if it is over FRAME_MAX_BYTES, OSError."""
    if isinstance(message, DaemonError):
        message = {"type": "error", **message.to_dict()}
    data = json.dumps(message).encode()
    if len(data) > FRAME_MAX_BYTES:
        hint = "send it in several parts"
        raise bad(f"a message of {len(data)} bytes; the limit is {FRAME_MAX_BYTES}", hint)
    connection.sendall(struct.pack(">I", len(data)) + data)


def receive_frame(
    connection: socket.socket, idle_s: float,
    room: threading.Semaphore | None = None, most_items: int = INTEGER_MAX,
) -> Fields | None:  # fmt: skip
    """Receive one message; None when the peer closed between two.

    idle_s: how long to wait for the first byte; the rest has FRAME_TIMEOUT_S in all.
    room: held while a large one is read. Raises BAD_REQUEST, BUSY, OSError.
    """
    connection.settimeout(idle_s)
    first = connection.recv(1)
    if not first:
        return None
    deadline = Clock.mono() + FRAME_TIMEOUT_S
    (length,) = struct.unpack(">I", first + bytes(_receive(connection, 3, deadline)))
    if not 0 < length <= FRAME_MAX_BYTES:
        raise bad(f"a frame of {length} bytes: from 1 to {FRAME_MAX_BYTES}")
    held = room if length > LARGE_FRAME_BYTES else None
    if held is not None and not held.acquire(timeout=LARGE_FRAME_WAIT_S):
        raise DaemonError("BUSY", "too many large requests at once", "try again")
    try:
        data = _receive(connection, length, deadline)
        if sum(map(data.count, (b",", b"[", b"{"))) > most_items:  # they need not be built
            raise bad(f"a frame of more than {most_items} values", "send it in several parts")
        message = json.loads(data, parse_constant=int, parse_int=_integer)  # refuses NaN, Infinity
    except (ValueError, RecursionError):
        raise bad("a frame that is no JSON") from None
    finally:
        if held is not None:
            held.release()
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise bad('a frame must be an object with a "type"')
    return message


def _integer(text: str) -> int:
    if len(text) > FRAME_DIGITS_MAX:  # quadratic time
        raise ValueError
    return int(text)


def _receive(connection: socket.socket, length: int, deadline: float) -> bytearray:
    data = bytearray()
    while len(data) < length:
        connection.settimeout(max(deadline - Clock.mono(), 0.001))
        part = connection.recv(min(length - len(data), 1 << 20))
        if not part:
            raise ConnectionResetError("closed within a frame")
        data += part
    return data


_PEER = threading.local()  # .connection: whose request this thread answers


def has_hung_up() -> bool:
    """Tell whether the client whose request this thread answers has gone."""
    connection = getattr(_PEER, "connection", None)
    if connection is None:
        return False
    connection.settimeout(0.0)
    try:
        return not connection.recv(1, socket.MSG_PEEK)
    except OSError as error:
        return not isinstance(error, BlockingIOError)


def log_fields(data: bytes, end: int) -> Fields:
    """Write a part of a log so that it can stand in JSON."""
    return {"data": binascii.b2a_base64(data, newline=False).decode(), "next": end}


absolute_path = reader(
    "an absolute path",
    lambda path: isinstance(path, str) and os.path.isabs(path) and b"\0" not in os.fsencode(path),
)
process_name = matching(r"[A-Za-z][A-Za-z0-9_-]{0,63}(\.[0-9]{1,4})?", "a name, or NAME.INDEX")


def signal_number(value: object) -> int:
    """Read a signal: HUP, SIGHUP or 1."""
    for name, number in signal.Signals.__members__.items():
        if str(value).upper() in (name, name[3:], str(int(number))):
            return int(number)
    raise ValueError("a signal, such as HUP or USR1")


# Every field that a request can have, with its reader.
FIELDS: dict[str, Callable[[Any], Any]] = {
    "id": integer(0), "ids": task_ids, "options": mapping,
    "commands": lambda value: value if isinstance(value, list) else text_list(value),
    "token": line_of_text, "cwd": absolute_path, "env": environment, "umask": integer(0, 0o777),
    "state": choice(*State), "group": line_of_text, "before": integer(1),
    "limit": integer(1, 1000), "within": duration, "offset": integer(-INTEGER_MAX),
    "attempt": integer(1), "run_id": line_of_text, "tokens": integer(0, 10**15), "cost": number,
    "progress": functools.partial(number, high=100.0), "note": line_of_text, "keep": bool,
    "name": process_name, "names": lambda value: [process_name(one) for one in text_list(value)],
    "instances": integer(0, 1000), "signal": signal_number, "follow": truth, "wait": truth,
    "offsets": lambda value: {name: integer(0)(at) for name, at in mapping(value).items()},
    "lines": integer(1, LINES_MAX), "pattern": line_of_text, "since": number, "hooks": line_of_text,
    "event": matching(r"(?!.{100})[\w-]+(\.[\w-]+)*", "a name such as deploy.done"),
    "payload": mapping,
}  # fmt: skip


def read_fields(form: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """Read the fields given, by a verb's form: "id! within" (! must be). Raises BAD_REQUEST."""
    names = form.replace("!", "").split()
    found = {}
    for name, value in request.items():
        if name not in names:
            raise bad(f"there is no field {name[:40]!r} here", "fields: " + ", ".join(names))
        try:
            if value is not None:
                found[name] = FIELDS[name](value)
        except ValueError as error:
            raise bad(f"{name} {str(value)[:40]!r}: must be {error}") from None
    for name in names:
        if name + "!" in form.split() and name not in found:
            raise bad(f"the field {name!r} is missing")
    return found


def reading(form: str, act: Callable[..., Any]) -> Callable[..., Any]:
    """Make a verb's function read the fields that it is given; it raises BAD_REQUEST then."""
    return lambda **given: act(**read_fields(form, given))


class TaskVerbs:
    """What can be done to tasks: `table` maps each verb to its form and its function.

    runner: None when the project has no daemon.
    """

    def __init__(self, store: TaskStore, runner: DaemonRunner | None = None) -> None:
        self._store = store
        self._runner = runner
        partial = functools.partial
        self.table: dict[str, tuple[str, Callable[..., Any]]] = {
            "add": ("commands! options token cwd env umask", self._add),
            "list": ("state group before limit ids", self._list),
            "get": ("id!", self._get),
            "wait": ("ids! within", self._wait),
            "cancel": ("ids!", partial(self._change, "cancel")),
            "retry": ("ids!", partial(self._change, "retry")),
            "remove": ("ids!", partial(self._change, "remove")),
            "pause": ("group", lambda group=None: self._pause(group, True)),
            "resume": ("group", lambda group=None: self._pause(group, False)),
            "report": ("id! token run_id tokens cost progress note", self._report),
            "why": ("id!", self._why),
            "logs": ("id! attempt offset within", self._logs),
            "queue": ("", self._queue),
            "process_logs": ("name! offsets lines", self._process_logs),
            "events": ("pattern since lines follow", self._events),
            "emit": ("event! payload hooks token", self._emit),
            "schedules": ("limit", lambda limit=1: {"schedules": list_schedules(store, limit)}),
            "run_schedule": ("name!", lambda name: self._wake({"id": run_schedule(store, name)})),
        }

    def _wake(self, answer: Fields) -> Fields:
        if self._runner is not None:
            self._runner.wake()
        return answer

    def _pause(self, group: str | None, on: bool) -> Fields:
        return self._wake({"paused": self._store.pause(group, on)})

    def _await(self, task_id: int, deadline: float, most_s: float) -> bool:
        """Wait for a task to move; False when there is nothing, or nobody, to wait for."""
        left_s = deadline - Clock.mono()
        if self._runner is None or left_s <= 0 or self._runner.halted.is_set() or has_hung_up():
            return False
        is_done = functools.partial(self._store.is_done, task_id)
        self._runner.wait_for(task_id, min(left_s, most_s), is_done)
        return True

    def _describe(self, task: Task) -> Fields:
        if self._runner is not None and task.state == State.RUNNING:
            task.pid = self._runner.keepers.pid_of(task.run_id)
        return task.to_dict()

    def _add(self, **request: Any) -> Fields:
        """Return {"ids", "existing": those of tasks that had the key already}."""
        ids = self._store.add(**request)
        return self._wake({"ids": ids, "existing": ids.existing})

    def _list(self, group: str | None = None, **where: Any) -> Fields:
        """Return tasks; those of hooks only by their group, by "*", which is all, or by ids."""
        if group not in (None, "*", *self._store.config.groups):
            raise unknown_group(group or "", self._store.config)
        where["hidden"] = "hooks" if group is None and "ids" not in where else None
        found = self._store.find(group=None if group == "*" else group, **where)
        return {"tasks": list(map(self._describe, found))}

    def _get(self, id: int) -> Fields:
        task = self._store.get(id)
        return {"task": self._describe(task), "history": self._store.get_attempts(id)}

    def _wait(self, ids: Sequence[range], within: float = 0.0) -> Fields:
        """Answer when all `ids` are done or `within` seconds have passed.

        {"total", "pending", "status": the first that is not 0, in the order given,
         "progress": percent, "running": ids}
        """
        deadline = Clock.mono() + within
        while True:
            answer, last = self._store.get_progress(ids)
            while last is not None and not self._store.is_done(last):
                if not self._await(last, deadline, 1.0):
                    return self._store.get_progress(ids)[0] if within else answer
            if last is None:
                return answer

    def _change(self, verb: str, ids: Sequence[range]) -> Fields:
        done, not_done = self._store.change(verb, ids)
        answer: Fields = {"done": done, "not_done": not_done}
        if self._runner is not None:
            if verb == "cancel":
                active = set(self._runner.get_metrics().active_task_ids)
                ending = [task_id for task_id in done if task_id in active]
                answer.update({"ending": ending} if ending else {})
                self._runner.end(done)
            self._runner.tell(done)
        elif verb == "cancel":
            left = [int(task_id) for task_id in end_orphans(self._store)]
            answer.update({"left": left} if left else {})
        return self._wake(answer)

    def _report(self, id: int, **usage: Any) -> Fields:
        is_over = self._store.report(id, **usage)
        if is_over and self._runner is not None:
            self._runner.end([id])
        return {"over_budget": is_over}

    def _queue(self) -> Fields:
        groups = {name: vars(group) for name, group in self._store.config.groups.items()}
        counts, paused = self._store.get_counts(), self._store.get_paused()
        return {"counts": counts, "paused": paused, "groups": groups}

    def _logs(
        self, id: int, attempt: int | None = None, offset: int = 0, within: float = 0.0
    ) -> Fields:
        """Return a part of an attempt's log, from a logical offset on (-n: the last n lines).

        {"attempt", "attempts", "done": no more will come of this attempt, "data": base64,
         "next": offset}. Waits for `within` seconds when there is nothing.
        """
        deadline = Clock.mono() + within
        while True:
            task = self._store.get(id)
            last = max(task.attempts, 1)
            attempt = attempt or last
            if attempt > last:
                what = f"task {id} has no attempt {attempt}"
                raise DaemonError("UNKNOWN_TASK", what, f"its last is {last}")
            is_over = attempt < last or task.state in DONE
            data, end = read_log(log_path(self._store.folder, id, attempt), offset)
            if data or is_over or not self._await(id, deadline, 0.05):
                break
        is_over = is_over and len(data) < LOG_CHUNK_BYTES
        answer = {"attempt": attempt, "attempts": task.attempts, "done": is_over}
        return {**answer, **log_fields(data, end)}

    def _process_logs(
        self, name: str, offsets: Mapping[str, int] | None = None, lines: int = 50
    ) -> Fields:
        """Return {"logs": {"web.0": {"data": base64, "next": offset}}}."""
        found = read_process_logs(self._store, name, offsets or {}, lines)
        return {"logs": {one: log_fields(*part) for one, part in found.items()}}

    def _events(
        self, pattern: str = "*", since: float = 0.0, lines: int = 50, follow: bool = False
    ) -> Fields | Iterator[Fields]:
        """Return {"lines": [the last events]}; with follow one such frame after the other."""
        found = read_events(self._store.folder, lines, follow, pattern, since)
        frames = ({"type": "events", "lines": events} for events in found)
        return frames if follow else next(frames)

    def _emit(
        self, event: str, payload: Fields | None = None, hooks: str = "", token: str | None = None
    ) -> Fields:
        """Publish custom.EVENT; the same token again starts nothing more."""
        made = Event.make("custom." + event.removeprefix("custom."), payload or {}, "emit")
        made.id = token or made.id
        try:
            size = len(json.dumps(made.to_dict(), allow_nan=False))
        except (ValueError, TypeError, RecursionError) as error:
            raise bad(f"the payload is no JSON: {error}", "no Infinity, say") from None
        if size > EVENT_MAX_BYTES:
            raise bad(f"the event has more than {EVENT_MAX_BYTES} bytes", "name a file in it")
        EventStore(self._store).emit(made, hooks)
        return {"id": made.id}

    def _why(self, id: int) -> Fields:
        task, parents = self._store.get(id), self._parent_reasons
        kinds = {State.WAITING: parents, State.SKIPPED: parents, State.QUEUED: self._queue_reasons}
        reasons = [*kinds.get(task.state, self._own_reasons)(task)]
        if self._runner is None and task.state not in DONE:
            reasons.append("no daemon runs: start it with `start`")
        return {"id": id, "state": task.state, "reasons": reasons}

    def _own_reasons(self, task: Task) -> Iterator[str]:
        if task.state == State.RUNNING:
            yield f"has run for {span(Clock.now() - task.started_at)}"
            if task.wish is not None:
                yield f"is being ended: {task.wish.value}"
            if self._runner is not None:
                yield from filter(None, [self._runner.keepers.explain(task.run_id or "")])
            return
        if task.state == State.SCHEDULED:
            yield f"due in {span((task.due_at or 0.0) - Clock.now())}"
        if task.outcome is not None:
            shown = {"exit_code": task.exit_code, "signal": task.signal, "reason": task.reason}
            how = describe_end(Result(**shown))
            yield f"attempt {task.attempts} ended as {task.outcome.value}: {how}"
        elif task.state in DONE:
            yield f"{task.state.value} before it ran"

    def _parent_reasons(self, task: Task) -> Iterator[str]:
        for item in task.after:
            name, _, need = item.partition(":")
            state = self._store.get(int(name)).state
            if state not in DONE:
                yield f"waits for task {name}, which is {state.value}"
            elif state not in NEEDS[need]:
                meant = {"ok": "succeed", "fail": "fail"}.get(need, "run")
                yield f"task {name} is {state.value}, but was to {meant}"
        if task.state == State.SKIPPED and not task.after:
            yield "a task it came after was removed"

    def _queue_reasons(self, task: Task) -> Iterator[str]:
        config = self._store.config
        paused = {"*", task.group}.intersection(self._store.get_paused())
        running = self._store.find(state="running", limit=1000)
        group, most = config.groups.get(task.group), config.daemon.max_concurrent
        limit = group.max_concurrent if group else None
        names = [str(other.id) for other in running if other.group == task.group]
        if paused:
            yield "everything is paused" if "*" in paused else f"group {task.group} is paused"
        if limit is not None and len(names) >= limit:
            yield f"group {task.group} is full ({limit}): tasks {', '.join(names[:10])}"
        elif len(running) >= most:
            names = [str(other.id) for other in running[:10]]
            yield f"all {most} slots are taken: tasks {', '.join(names)}"
        elif self._runner is not None and self._runner.keepers.obstacle:
            yield self._runner.keepers.obstacle
        elif not paused:
            yield "will be claimed at the next turn"


# How the states of instances add up: the first of these that one of them is in.
_WORST_FIRST = "failed crashed backoff unhealthy starting stopping running stopped".split()


def sum_up(name: str, details: Sequence[Fields]) -> Fields:
    """Return what `list_processes` says of a process, from the details of its instances."""

    def known(field: str) -> list[Any]:
        return [one[field] for one in details if one[field] is not None]

    states = known("state")
    return {
        "name": name,
        "instances": len(details),
        "running": sum(state in ("running", "unhealthy") for state in states),
        "status": next((state for state in _WORST_FIRST if state in states), "stopped"),
        "cpu_percent": sum(known("cpu_percent")) if known("cpu_percent") else None,
        "memory_bytes": sum(known("memory_bytes")) if known("memory_bytes") else None,
        "uptime_secs": max(known("uptime_secs"), default=None),
        "restart_count": sum(known("restart_count")),
    }


class ProcessVerbs:
    """What can be done to processes: `table` maps each verb to its form and its function.

    Other programs rely on the fields of list_processes, get_process, start_, stop_, restart_
    and reload_process, and tail_logs.
    """

    def __init__(self, supervisor: Supervisor, store: TaskStore) -> None:
        self._supervisor = supervisor
        self._store = store
        self.table: dict[str, tuple[str, Callable[..., Any]]] = {
            "list_processes": ("", self._list),
            "get_process": ("name!", self._get),
            "start_process": ("name!", lambda name: self._up([name])),
            "stop_process": ("name!", lambda name: self._down([name])),
            "restart_process": ("name!", lambda name: self._replace(name, False)),
            "reload_process": ("name!", lambda name: self._replace(name, True)),
            "up": ("names! wait", self._up),
            "down": ("names!", self._down),
            "scale_process": ("name! instances!", self._scale),
            "signal_process": ("name! signal!", self._signal),
            "why_process": ("name!", self._why),
            "tail_logs": ("name lines follow", self._tail),
        }

    def look(self, names: Iterable[str]) -> list[list[Fields]]:
        """Return the details of each instance of each process."""
        with self._supervisor.moved:
            mine = [self._supervisor.find(name) for name in names]
            wards = [one.ward for found in mine for one in found if one.ward is not None]
            usage = Platform.usage({ward.pid for ward in wards if ward.pid})
            return [[one.describe(usage) for one in found] for found in mine]

    def _list(self) -> Fields:
        names = list(self._store.config.processes)
        return {"type": "process_list", "processes": list(map(sum_up, names, self.look(names)))}

    def _get(self, name: str) -> Fields:
        policy = get_process(self._store.config, name)
        (details,) = self.look([name])
        words = [policy.command] if isinstance(policy.command, str) else policy.command
        process = {"name": name, "id": name, "command": words[0], "args": words[1:]}
        process["cwd"] = os.path.normpath(os.path.join(self._store.project, policy.cwd))
        process.update(instances=len(details), instance_details=details)
        return {"type": "process_details", "process": process}

    def _up(self, names: list[str], wait: bool = True) -> Fields:
        """Have processes up, and what they need; answer when they are, or will not be.

        Without names: all. Work that ended well is done again only for those that are named.
        """
        named, names = names, names or list(self._store.config.processes)
        with self._supervisor.acting(names) as mine:
            todo = list(names)
            for name in todo:
                needs = self._store.config.processes[name].needs
                todo += [need for need in needs if need not in todo]
            found = [one for name in todo for one in self._supervisor.find(name)]
            done = [one for one in found if one.name not in named and one.has_done_its_work()]
            down = [one for one in found if not one.is_up() and one not in done]
            if mine and not down and all(one.is_ready() or not wait for one in {*mine} - {*done}):
                words = dict.fromkeys(names, "runs already")
                words.update((one.name, "has done its work") for one in done if one in mine)
                what = "; ".join(map(" ".join, words.items()))
                raise DaemonError("PROCESS_ALREADY_RUNNING", what, "see `ps`")
            for name in todo:
                self._store.decide_process(name, "is_up", True)
            for one in down:
                one.want()
            if wait:
                self._await_up([one for one in mine if one not in done])
            self._supervisor.moved.notify_all()
        begun = dict.fromkeys(one.name for one in down or mine)
        count = sum(one.name in begun for one in found)
        ran = f" ({count - len(down)} of {count} instances ran already)"
        return {"message": f"started: {', '.join(begun)}{ran if count > len(down) else ''}"}

    def _has_come_up(self, one: Instance) -> bool:
        """Tell whether an instance is ready; without `ready`, whether it stays."""
        if not one.is_ready() or one.view.is_stale:
            return False
        return bool(one.view.policy.ready) or Clock.mono() - one.view.started >= SETTLE_S

    def _is_settled(self, one: Instance) -> bool:
        """Tell whether an instance has come up, or will not for now."""
        view = one.view
        if view.is_stale or view.state == ProcessState.STOPPING:
            return not view.is_wanted
        if not view.is_wanted or one.is_failing() or self._has_come_up(one):
            return True
        needed = [need.view for name in view.policy.needs for need in self._supervisor.find(name)]
        is_down = (n.state in _DOWN or not (n.is_wanted or is_good_enough(n)) for n in needed)
        return one.ward is None and any(is_down)

    def _await_up(self, instances: Sequence[Instance], hint: str = "") -> None:
        """Wait until these are up, or one that others follow failed. Raises PROCESS_FAILED."""

        def is_over() -> bool:
            is_failing = any(one.is_failing() and one.is_rolling for one in instances)
            return is_failing or all(map(self._is_settled, instances))

        self._supervisor.wait_until(is_over, PROCESS_ANSWER_S - START_TIMEOUT_S)
        away = [one for one in instances if not self._has_come_up(one)]
        away = [one for one in away if one.view.is_wanted or not is_good_enough(one.view)]
        failed = [one for one in instances if one.is_failing()] or away
        if failed:
            more = f"; {len(failed) - 3} more" if len(failed) > 3 else ""
            hint = hint or "see `why NAME` and `logs NAME`"
            what = "; ".join(one.explain() for one in failed[:3])
            raise DaemonError("PROCESS_FAILED", what + more, hint)

    def _down(self, names: list[str]) -> Fields:
        """Stop processes, without names all; answer when nothing of them is left."""
        names = names or list(self._store.config.processes)
        with self._supervisor.acting(names) as mine:
            if not any(one.ward or one.view.is_wanted for one in mine):
                what = f"{', '.join(names)} does not run"
                raise DaemonError("PROCESS_NOT_RUNNING", what, "see `ps`")
            for name in names:
                self._store.decide_process(name, "is_up", False)
            for one in mine:
                one.view.is_wanted = False
            self._see_off(mine)
        return {"message": f"stopped: {', '.join(names)}"}

    def _see_off(self, instances: Sequence[Instance]) -> None:
        """Wait until these are gone, or wanted again. Raises STOP_FAILED."""
        most_s = self._store.config.stop_timeout_s + 2 * STOP_MARGIN_S
        most_s += INSTANCE_STOP_S * len(instances)
        if not self._supervisor.wait_until(
            lambda: all(one.ward is None or one.view.is_wanted for one in instances), most_s
        ):
            raise DaemonError("STOP_FAILED", "something of it still runs", "see `why NAME`")

    def _replace(self, name: str, is_rolling: bool) -> Fields:
        """Restart a process; rolling: the next instance only when the last one is ready."""
        with self._supervisor.acting([name]) as mine:
            self._store.decide_process(name, "is_up", True)
            for one in mine:
                one.view.is_stale, one.is_rolling = one.ward is not None, is_rolling
                if not one.is_up():
                    one.want()
            hint = "the others run on as they were; they follow when it is ready"
            self._await_up(mine, hint if is_rolling else "")
        return {"message": f"{'reloaded' if is_rolling else 'restarted'}: {name}"}

    def _scale(self, name: str, instances: int) -> Fields:
        """Have so many instances; answer when new ones are up, and those too many gone."""
        with self._supervisor.acting([name]) as before:
            self._store.decide_process(name, "instances", instances)
            self._supervisor.arrange()
            self._see_off([one for one in before if one.is_surplus])
            new = [one for one in self._supervisor.find(name) if one not in before]
            self._await_up([one for one in new if one.view.is_wanted])
        return {"message": f"scaled: {name} has {instances}"}

    def _signal(self, name: str, signal: int) -> Fields:
        with self._supervisor.moved:
            wards = [one.ward for one in self._supervisor.find(name) if one.ward is not None]
        send = self._supervisor.keepers.signal
        pids = [ward.pid for ward in wards if ward.pid and send(ward.run_id, signal)]
        if not pids:
            raise DaemonError("PROCESS_NOT_RUNNING", f"{name} does not run", f"`up {name}`")
        return {"message": f"sent to {', '.join(map(str, pids))}"}

    def _why(self, name: str) -> Fields:
        """Return {"name", "reasons": [a line for each instance, and for what it waits for]}."""
        with self._supervisor.moved:
            found = self._supervisor.find(name)
            reasons = [one.explain() for one in found]
            waits = {need for one in found if one.view.is_held for need in one.view.policy.needs}
            for need in sorted(waits):
                reasons += [one.explain() for one in self._supervisor.find(need)]
        return {"name": name, "reasons": reasons or [f"{name} has no instances: `scale {name} 1`"]}

    def _tail(
        self, name: str | None = None, lines: int = 50, follow: bool = False
    ) -> Fields | Iterator[Fields]:
        def read(offsets: Mapping[str, int], lines: int) -> dict[str, tuple[bytes, int]]:
            found = {}
            for one in [name] if name else [*self._store.config.processes]:
                found.update(read_process_logs(self._store, one, offsets, lines))
            return found

        if follow:
            read({}, 1)  # raises PROCESS_NOT_FOUND
            return _frame_lines(follow_lines(read, lines, True))
        (found,) = follow_lines(read, lines, False)
        last = next(_frame_lines([found[::-1]]))  # those that fit
        return {**last, "lines": last["lines"][::-1]}


def _frame_lines(found: Iterable[list[tuple[str, bytes]]]) -> Iterator[Fields]:
    """Yield {"type": "log_lines", "lines": [...]} as lines come, below FRAME_MAX_BYTES."""
    for lines in found:
        frame: list[Fields] = []
        moment, left = timestamp(Clock.now()), FRAME_MAX_BYTES // 2
        for one, line in lines:
            name, _, index = one.partition(".")
            about = {"process_name": name, "instance": int(index), "stream": "stdout"}
            content = line.decode("utf-8", "replace")
            left -= len(json.dumps(content)) + 200
            if left < 0:
                yield {"type": "log_lines", "lines": frame}
                frame, left = [], FRAME_MAX_BYTES // 2
            frame.append({"timestamp": moment, **about, "content": content})
        yield {"type": "log_lines", "lines": frame}


def read_endpoint(folder: str) -> Fields:
    """Return what `endpoint` says; {}: nothing, or it came along from another folder."""
    with contextlib.suppress(ValueError, TypeError):
        found = read_json(os.path.join(folder, "endpoint")) or {}
        if "folder" not in found or tuple(found["folder"]) == file_id(folder):
            return found
    return {}


def remove_socket(path: str, *others: str) -> None:
    """Remove a control socket, the folder that was made for a short path, and other files."""
    for name in (path, *others):
        with contextlib.suppress(OSError):
            insist(os.unlink, name)
    folder = os.path.dirname(path)
    if re.search("apexd-[0-9a-f]+-[0-9a-f]+$", folder):
        with contextlib.suppress(OSError):
            os.rmdir(folder)


class Acceptor:
    """Gives each connection of a listener a thread, so many at once.

    When all are taken, the one that has been idle the longest, `spare_s` at least, loses its
    place. serve: called with (connection, idle); idle: since when it waits for a request.
    """

    def __init__(
        self, listener: socket.socket, name: str, most: int, spare_s: float,
        serve: Callable[[socket.socket, dict[socket.socket, float]], object],
    ) -> None:  # fmt: skip
        self.listener, self._serve, self._spare_s = listener, serve, spare_s
        self._room = threading.BoundedSemaphore(most)
        self._idle: dict[socket.socket, float] = {}  # since when; the longest first
        self._is_over, self._is_short, self._watched = False, False, Watched()
        listener.setblocking(False)
        self._watched.add(listener, self._accept)
        threading.Thread(target=self._accept_all, name=name, daemon=True).start()

    def close(self) -> None:
        """Accept nothing more; of a socket that a service manager keeps open, what comes waits."""
        self._is_over = True
        self._watched.remove(self.listener)
        self.listener.close()
        self._watched.wake()

    def _accept_all(self) -> None:
        while not self._is_over:
            self._watched.wait(float("inf"))
        self._watched.close()

    def _accept(self) -> None:
        peer: Any = None
        try:
            peer = self.listener.accept()[0]
            peer.setblocking(True)
            wait_s = 0.0
            while not self._room.acquire(timeout=wait_s):
                wait_s = 0.02
                for idle, since in list(self._idle.items())[:1]:
                    if Clock.mono() - since >= self._spare_s and self._idle.pop(idle, 0.0):
                        with contextlib.suppress(OSError):  # it has just gone
                            idle.shutdown(socket.SHUT_RDWR)
            self._idle[peer] = Clock.mono()
            threading.Thread(target=self._talk, args=(peer,), name="talk", daemon=True).start()
            self._is_short = False
        except (OSError, RuntimeError) as error:  # no descriptor, no thread
            if self._is_over or isinstance(error, BlockingIOError):
                return
            (log.debug if self._is_short else log.warning)("a connection was refused: %s", error)
            self._is_short = True  # said once: it is tried again and again
            if isinstance(error, RuntimeError):
                self._idle.pop(peer, None)
                self._room.release()
                peer.close()
            threading.Event().wait(0.1)

    def _talk(self, connection: socket.socket) -> None:
        try:
            with connection:
                self._serve(connection, self._idle)
        except OSError as error:
            log.debug("a connection ended: %s", error)
        except Exception:  # this thread's top frame
            log.exception("a connection failed")
        finally:
            self._idle.pop(connection, None)
            self._room.release()


class ControlServer:
    """Answers requests on the control socket with the verbs it is given.

    verbs: name -> (form, function). Threads: "control" accepts; each connection has its own.
    Life: start -> stop.
    """

    def __init__(
        self, folder: str, verbs: Mapping[str, tuple[str, Callable[..., Fields]]],
        place: str | None = None, inherited: socket.socket | None = None,
    ) -> None:  # fmt: skip
        self._folder = folder
        self._verbs = verbs
        self._place = place or os.path.join(folder, "control.sock")
        self._inherited = inherited  # a service manager's, who keeps it for our successor
        self._streams = threading.BoundedSemaphore(STREAMS_MAX)
        self._large = threading.BoundedSemaphore(LARGE_FRAMES_MAX)
        self._lock = threading.Lock()  # guards what follows
        self._is_stopping = False
        self._endpoint: Fields = {}
        self._acceptor: Acceptor | None = None
        self._socket: tuple[str, Any] = ("", None)  # its path, and its `file_id` (Windows: None)

    def start(self, told: Fields) -> None:
        """Listen and say where; again: if that is not there any more. Raises CANNOT_CREATE.

        told: what clients may know without asking. The folder's identity stands beside it, so
        that nobody takes the endpoint of a copied folder for that folder's own.
        """
        with self._lock:
            if self._is_stopping:
                return
            if self._acceptor is None or file_id(self._socket[0]) != self._socket[1]:
                self._bind()
            self._endpoint.update(told)
            with contextlib.suppress(DaemonError):  # a link, say: it is replaced
                if read_endpoint(self._folder) == self._endpoint:
                    return
            path = os.path.join(self._folder, "endpoint")
            write_atomically(path, json.dumps(self._endpoint))

    def _bind(self) -> None:
        if self._acceptor is not None:
            self._acceptor.close()
        near = os.path.join(self._folder, "control.sock")
        try:
            path = self._inherited.getsockname() if self._inherited is not None else ""
            if not isinstance(path, str):
                raise OSError(errno.EAFNOSUPPORT, "the socket handed over has no path")
            if self._inherited is not None and file_id(path):
                listener, self._endpoint = self._inherited.dup(), {"socket": path}
            else:
                path, self._inherited = self._place, None  # what was handed over was removed
                if path == near:
                    path = Platform.place_socket(self._folder, path)
                elif os.path.isfile(path):
                    raise FileExistsError(errno.EEXIST, "is no socket, and is left alone")
                listener, self._endpoint = Platform.listen(path)
        except OSError as error:
            raise cannot_create(self._place, error) from None
        if path != near:
            self._endpoint["socket"] = path
        self._endpoint.update(pid=os.getpid(), folder=list(file_id(self._folder) or ()))
        self._socket = path, file_id(path)
        self._acceptor = Acceptor(listener, "control", CONNECTIONS_MAX, SPARE_S, self._serve)

    def stop(self) -> None:
        """Accept nothing more, remove what is ours still; requests under way go on."""
        with self._lock:
            self._is_stopping = True
            if self._acceptor is not None:
                self._acceptor.close()
            path, known = self._socket
            if self._inherited is None and file_id(path) == known:
                remove_socket(path, os.path.join(self._folder, "endpoint"))

    def _serve(self, connection: socket.socket, idle: dict[socket.socket, float]) -> None:
        """Answer requests until the peer leaves, or one cannot be read or answered."""
        _PEER.connection = connection
        try:
            if Platform.peer_uid(connection):  # neither ours nor root
                raise DaemonError("PERMISSION_DENIED", "only the owner and root may")
            while self._serve_one(connection, idle):
                pass
        except DaemonError as error:  # the framing may be lost: say so and hang up
            connection.settimeout(FRAME_TIMEOUT_S)
            send_frame(connection, error)

    def _serve_one(self, connection: socket.socket, idle: dict[socket.socket, float]) -> bool:
        """Answer one request, or send a stream of answers; False: the peer has left."""
        idle[connection] = Clock.mono()
        request = receive_frame(connection, IDLE_TIMEOUT_S, self._large, FRAME_ITEMS_MAX)
        idle.pop(connection, None)
        if request is not None:
            answer = self._answer(request)
            connection.settimeout(FRAME_TIMEOUT_S)
            if isinstance(answer, (dict, DaemonError)):
                send_frame(connection, answer)
            else:
                self._stream(connection, answer)
        return request is not None

    def _stream(self, connection: socket.socket, answers: Iterable[Fields]) -> None:
        """Send answers as they come until the peer leaves, or sends its next request."""
        if not self._streams.acquire(blocking=False):
            raise DaemonError("BUSY", f"{STREAMS_MAX} others follow logs already")
        try:
            for answer in answers:
                if answer["lines"]:
                    connection.settimeout(FRAME_TIMEOUT_S)
                    send_frame(connection, answer)
                connection.settimeout(0.001 if answer["lines"] else STREAM_PAUSE_S)
                with contextlib.suppress(socket.timeout):
                    connection.recv(1, socket.MSG_PEEK)
                    return
        finally:
            self._streams.release()

    def _answer(self, request: Fields) -> Fields | DaemonError | Iterator[Fields]:
        """Carry out one request; return its answer or several of them.

        Raises PERMISSION_DENIED for a wrong token.
        """
        name, shown = request.pop("type"), str(request.pop("auth", ""))
        token = self._endpoint.get("token")
        if token is not None:
            if not hmac.compare_digest(shown.encode("utf-8", "replace"), token.encode()):
                raise DaemonError("PERMISSION_DENIED", "a wrong token")
        try:
            if name not in self._verbs:
                raise DaemonError("UNKNOWN_COMMAND", f"there is no verb {name[:40]!r}")
            form, act = self._verbs[name]
            answer: Any = act(**read_fields(form, request))
            return {"type": "ok", **answer} if isinstance(answer, dict) else answer
        except DaemonError as error:
            if self._is_stopping and error.code == "DATABASE_FAILED":  # closed
                raise ConnectionAbortedError("the daemon has ended") from None
            return error
        except Exception as error:  # a request handler
            log.exception("request %s failed", name)
            return DaemonError("INTERNAL", str(error))


def settings_of(config: Config) -> Fields:
    """Return what clients need of a configuration: {"env_keep", "timeout", "log_file"}."""
    settings = {"env_keep": config.env_keep, "timeout": config.limits.timeout}
    return {**settings, "log_file": config.log.file}


READING_VERBS = frozenset("list get wait why logs queue process_logs schedules events".split())
WRITING_VERBS = frozenset("add cancel retry remove pause resume report run_schedule emit".split())


class Project(Value):
    """Where a project and its state are."""

    path: str
    folder: str
    named_config: str | None  # the configuration that the user named
    overrides: dict[str, Any] | None  # what the command line says instead

    def file(self, name: str, other: str | None = None) -> str:
        """Return the path of a file in the state folder, or `other`, seen from the project."""
        return os.path.join(self.path, other) if other else os.path.join(self.folder, name)

    @property
    def config_path(self) -> str | None:
        """The configuration that was named, else the one in the state folder now."""
        return self.named_config or find_config(self.folder)

    def load_config(self) -> Config:
        """Read the configuration, and check what the daemon is to watch. Raises CONFIG_INVALID."""
        path = self.config_path
        config = load_config(path, overrides=self.overrides)
        check_watches(config, self.path, path)
        return config

    @property
    def told(self) -> Fields:
        """What was named, not found, as a Holder says it."""
        return {"config": self.named_config, "overrides": self.overrides}


def find_folders(path: str | None, state: str | None) -> tuple[str, str]:
    """Decide which project is meant: named, from the environment, or by the current folder.

    That is the launcher's own; or the nearest folder with `.apex` from here up to the
    repository's root (`.git`), else, if it has one, the folder of this file; else this one.
    The state is in `state`, APEX_STATE_DIR, or PROJECT/.apex. Returns both folders.
    """
    if path is None:
        given = (os.environ.get("APEX_PROJECT_PATH"), os.environ.get("APEX_STATE_DIR"))
        path, own_state = _LAUNCHED_FOR or given
        path, state = path or _nearest_project(), state or own_state
    path = os.path.realpath(path)
    if not os.path.isdir(path):
        raise bad(f"{path} is no folder", "name the project's folder")
    return path, os.path.realpath(state) if state else os.path.join(path, STATE_FOLDER)


def find_project(path: str | None, state: str | None, config: str | None) -> Project:
    """Find a project, see `find_folders`, and its configuration. Raises PERMISSION_DENIED."""
    path, folder = find_folders(path, state)
    check_state_folder(folder)
    if config is not None and not os.path.isfile(config):
        raise DaemonError("CONFIG_INVALID", f"--config {config}: no such file", "name the file")
    named = os.path.realpath(config) if config else None
    return Project(path=path, folder=folder, named_config=named)



def _nearest_project() -> str:
    start = folder = here()
    places = [start]
    while not os.path.exists(os.path.join(folder, ".git")):
        folder = os.path.dirname(folder)
        if folder == places[-1]:  # no repository: here, or where apexd.py is
            places = [start, os.path.dirname(os.path.abspath(__file__))]
            break
        places.append(folder)
    return next((one for one in places if os.path.isdir(os.path.join(one, STATE_FOLDER))), start)


def held_by(holder: Holder) -> DaemonError:
    """Make the error of a lock that is not a daemon's."""
    what = f"the project is held by {holder.role} (PID {holder.pid or 'unknown'})"
    return DaemonError("BUSY", what, "try again when it is done; `fuser` on daemon.lock finds it")


def find_daemon(pid_file: PidFile) -> Holder | None:
    """Return the daemon that holds a lock; wait CLIENT_HOLD_S for a client. Raises BUSY."""
    deadline = Clock.mono() + CLIENT_HOLD_S
    while True:
        holder = pid_file.holder()
        if holder is None or (holder.role == "daemon" and holder.is_alive()):
            return holder
        if Clock.mono() > deadline:
            raise held_by(holder)
        threading.Event().wait(0.02)


class Client:
    """Speaks to a project's daemon, or acts on its store when there is none.

    Every method is one request, but for `wait` and `follow`. Without a daemon it takes the
    project's lock for its own moment. Not to be shared between threads. Raises DaemonError:
    NOT_ANSWERING, BUSY, PERMISSION_DENIED, NOT_CONFIRMED, and what the verb itself raises.
    """

    def __init__(
        self, project_path: str | None = None, state: str | None = None,
        config: str | None = None, tell: Callable[[str], None] = lambda text: None,
    ) -> None:  # fmt: skip
        self.project = find_project(project_path, state, config)
        self._tell = tell  # called with what people should know
        self.is_live = False  # a daemon answered the last request
        self._return_mono = float("-inf")  # when one that is away must be back
        self.existing: Sequence[int] = ()  # of the last add: ids of tasks that had the key
        self._pid_file = PidFile(self.project.file("daemon.pid"))
        self._connection: socket.socket | None = None
        self._endpoint: Fields = {}  # what the daemon wrote there, while we are connected

    def close(self) -> None:
        """Hang up; the next request connects again."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def call(self, verb: str, fields: Any = None, answer_s: float = ANSWER_TIMEOUT_S) -> Fields:
        """Make one request, by socket else on the store; return the response's fields.

        One with a token is tried again, for CONFIRM_TIMEOUT_S: it cannot act twice.
        """
        fields = fields or {}
        deadline = Clock.mono() + (CONFIRM_TIMEOUT_S if "token" in fields else answer_s)
        while True:
            answer = self._ask(verb, fields, max(deadline - Clock.mono(), 0.01))
            self.is_live = answer is not None
            answer = self._act(verb, fields) if answer is None else answer
            if answer is not None:
                return answer
            if Clock.mono() > deadline:
                raise self._explain_silence(fields)
            threading.Event().wait(0.02)

    def _ask(self, verb: str, fields: Fields, answer_s: float) -> Fields | None:
        """Ask the daemon; None: there is none, or it was cut off. Raises NOT_ANSWERING."""
        is_fresh = self._connection is None
        try:
            connection = self._connect()
            self._return_mono = float("inf")
            connection.settimeout(answer_s)
            token = self._endpoint.get("token")
            send_frame(connection, {"type": verb, **fields, **({"auth": token} if token else {})})
            answer = receive_frame(connection, answer_s)
        except socket.timeout:
            self.close()
            raise self._explain_silence(fields) from None
        except OSError:
            answer = None
        if answer is None:
            self.close()  # an idle connection the daemon may have closed: once more
            return None if is_fresh else self._ask(verb, fields, answer_s)
        if answer.pop("type") == "error":
            raise DaemonError.from_dict(answer)
        return answer

    def _connect(self) -> socket.socket:
        """Be connected to the daemon. Raises OSError (there is none), PERMISSION_DENIED."""
        folder = self.project.folder
        if self._connection is None:
            check_state_folder(folder)
            self._endpoint = read_endpoint(folder)
            try:
                self._connection = Platform.connect(folder, self._endpoint, ANSWER_TIMEOUT_S)
            except (ValueError, KeyError, TypeError, OverflowError):
                raise ConnectionRefusedError("no endpoint") from None
            except PermissionError as error:
                what = f"{error.filename}: {error.strerror}"
                raise DaemonError("PERMISSION_DENIED", what, f"remove {folder}/endpoint") from None
        return self._connection

    def find_settings(self) -> Fields:
        """Return `settings_of` the daemon's configuration, else of the file's."""
        with contextlib.suppress(OSError):
            self._connect()
            if "env_keep" in self._endpoint:
                return self._endpoint
        return settings_of(load_config(self.project.config_path))

    def _explain_silence(self, fields: Fields) -> DaemonError:
        if "token" in fields:
            hint = f"repeat it with --token {fields['token']}: it cannot double"
            return DaemonError("NOT_CONFIRMED", "the daemon did not confirm the request", hint)
        holder = self._pid_file.holder()
        if holder is None:
            return DaemonError("NOT_RUNNING", "the daemon is gone", "start it with `start`")
        if holder.role != "daemon":
            return held_by(holder)
        hint = "is it stopped (SIGSTOP) or overloaded? `restart` costs no task"
        return DaemonError("NOT_ANSWERING", f"the daemon (PID {holder.pid}) does not answer", hint)

    def _act(self, verb: str, fields: Fields) -> Fields | None:
        """Act on the store, under the lock; None when somebody else has it."""
        if verb not in READING_VERBS | WRITING_VERBS:  # it means nothing without a daemon
            if self._pid_file.holder() is None:
                raise DaemonError("NOT_RUNNING", "no daemon runs here", "start it with `start`")
            return None
        folder, path = self.project.folder, self.project.file("apex.db")
        if verb in READING_VERBS and not any(map(os.path.exists, (path, path + "-wal"))):
            path = ":memory:"  # nothing to read, and nothing is left behind
        else:
            if make_state_folder(folder, self.project.path):
                self._tell(f"made {folder}; no daemon runs there, `start` one")
            if not self._pid_file.acquire("client " + verb):
                return None
        try:
            config = load_config(self.project.config_path)
            store = TaskStore(path, config, self._pid_file, self.project.path)
            with contextlib.closing(store):
                form, act = TaskVerbs(store).table[verb]
                return dict(json.loads(json.dumps(act(**read_fields(form, fields)))))
        finally:
            self._pid_file.release()

    def add(self, command: str | list[str], **options: Any) -> int:
        """Add a task, return its id; it is on disk. Options: those of `add_all`.

        If an unfinished task had the key, its id, and `existing` is [id] then.
        """
        return self.add_all([command], **options)[0]

    def add_all(
        self, commands: Sequence[Any], token: str | None = None, cwd: str | None = None,
        env: Sequence[str] = (), **options: Any,
    ) -> Sequence[int]:  # fmt: skip
        """Add tasks in one transaction, return their ids in order (see TaskStore.add).

        options: group, priority, label, after (["3", "4:any"]), delay, retries, timeout
        (seconds), key, on_lost, max_tokens, max_cost. token: an earlier try's.
        """
        umask = os.umask(0o077)
        os.umask(umask)
        keep = self.find_settings()["env_keep"]
        request = {
            "commands": commands,
            "options": {name: value for name, value in options.items() if value is not None},
            "token": token or os.urandom(12).hex(),
            "cwd": os.path.join(here(), cwd) if cwd else here(),
            "env": capture_environment(keep, env),
            "umask": umask,
        }
        answer = self.call("add", request)
        self.existing = answer.get("existing", ())
        return list(answer["ids"])

    def list(self, limit: int | None = None, **where: Any) -> Sequence[Fields]:
        """Return tasks as dicts, ascending; the newest `limit` or all. where: state, group, ids."""
        found: Sequence[Fields] = []
        size, before = 1000, None
        while size == 1000 and (limit is None or len(found) < limit):
            most = 1000 if limit is None else min(1000, limit - len(found))
            page = self.call("list", {**where, "limit": most, "before": before})["tasks"]
            found, size = [*page, *found], len(page)
            before = page[0]["id"] if page else None
        return found

    def get(self, task_id: int) -> Fields:
        """Return {"task": {...}, "history": [attempts]}. Raises UNKNOWN_TASK."""
        return self.call("get", {"id": task_id})

    def wait(
        self, ids: Sequence[int | str], timeout: float | None = None,
        on_change: Callable[[Fields], None] = lambda answer: None,
    ) -> int:  # fmt: skip
        """Wait until tasks, such as 3 or "5-9", are done; return the first status but 0.

        124 when `timeout` seconds were not enough. Outlives a restart of the daemon.
        Raises NOT_RUNNING when there is no daemon to wait for.
        """
        within, deadline = 0.0, Clock.mono() + (float("inf") if timeout is None else timeout)
        while True:
            answer = self.call("wait", {"ids": ids, "within": within}, within + ANSWER_TIMEOUT_S)
            on_change(answer)
            if not answer["pending"]:
                return int(answer["status"])
            if Clock.mono() >= deadline:
                return 124
            self.outwait()
            within = min(1.0, max(deadline - Clock.mono(), 0.0))

    def follow(
        self, task_id: int, attempt: int | None = None, offset: int = 0, to_end: bool = True
    ) -> Iterator[bytes]:
        """Yield a task's output as it comes, attempt after attempt, until it is done.

        attempt None: the last one. offset -n: from the last n lines on. to_end False: only
        what is there now. Outlives a restart of the daemon.
        """
        while True:
            fields = {"id": task_id, "attempt": attempt, "offset": offset, "within": float(to_end)}
            answer = self.call("logs", fields, 1.0 + ANSWER_TIMEOUT_S)
            attempt, offset = answer["attempt"], answer["next"]
            data = binascii.a2b_base64(answer["data"])
            if data:
                yield data
            if answer["done"] and attempt < answer["attempts"] and to_end:
                attempt, offset = attempt + 1, 0
            elif answer["done"] or (not data and not to_end):
                return
            elif not data:
                self.outwait()

    def outwait(self) -> None:
        """Let a waiting call outlive a daemon that is away for RETURN_TIMEOUT_S."""
        if not self.is_live:
            self._return_mono = min(self._return_mono, Clock.mono() + RETURN_TIMEOUT_S)
            if Clock.mono() > self._return_mono:
                what = "no daemon runs: nothing is started; the end of what runs is seen later"
                raise DaemonError("NOT_RUNNING", what, "start it with `start`")
            threading.Event().wait(0.2)

    def change(self, verb: str, ids: Sequence[int | str]) -> Fields:
        """Do one of the next three to tasks, such as 3 or "5-9"; many may take their time."""
        count = sum(map(len, read_fields("ids!", {"ids": ids})["ids"]))
        answer_s = ANSWER_TIMEOUT_S + min(count / 1000, PROCESS_ANSWER_S)
        return self.call(verb, {"ids": ids}, answer_s)

    def cancel(self, *ids: int) -> Fields:
        """Cancel tasks; return {"done": ids, "not_done": ids finished before}.

        Without a daemon also "left": ids that still run, if there are any.
        """
        return self.change("cancel", ids)

    def retry(self, *ids: int) -> Fields:
        """Run finished tasks again; return {"done": ids, "not_done": ids unfinished}."""
        return self.change("retry", ids)

    def remove(self, *ids: int) -> Fields:
        """Forget tasks; return {"done": ids, "not_done": ids that run}."""
        return self.change("remove", ids)

    def pause(self, group: str | None = None) -> Fields:
        """Claim nothing from a group, or at all; return {"paused": groups}."""
        return self.call("pause", {"group": group})

    def resume(self, group: str | None = None) -> Fields:
        """Claim again from a group, or from all; return {"paused": groups}."""
        return self.call("resume", {"group": group})

    def report(self, task_id: int, **usage: Any) -> Fields:
        """Report tokens, cost, progress (percent), note; return {"over_budget": bool}."""
        return self.call("report", {"id": task_id, "token": os.urandom(12).hex(), **usage})

    def emit(self, event: str, payload: Fields | None = None) -> str:
        """Publish the event custom.EVENT; return its id. The tasks of its hooks are on disk."""
        fields = {"event": event, "payload": payload, "hooks": os.environ.get("APEX_HOOKS", "")}
        return str(self.call("emit", {**fields, "token": os.urandom(12).hex()})["id"])

    def queue(self) -> Fields:
        """Return {"counts": {state: {group: n}}, "paused": [...], "groups": {...}}."""
        return self.call("queue", {})

    def why(self, task_id: int) -> Fields:
        """Return {"id", "state", "reasons": [what it waits for, or how it ended]}."""
        return self.call("why", {"id": task_id})


def end_orphans(store: TaskStore, is_all: bool = False) -> list[str]:
    """End running tasks that are cancelled; `is_all`: KILL all tasks and processes.

    For a client, while there is no daemon. Returns what still runs: ["12", "web.0"].
    """
    tasks = store.find(state="running", limit=INTEGER_MAX)
    ids = [task.id for task in tasks if is_all or task.wish == Outcome.CANCELLED]
    if not ids and not is_all:
        return []
    grace_s = STOP_MARGIN_S if is_all else store.config.daemon.stop_timeout
    deadline = Clock.mono() + grace_s + STOP_MARGIN_S
    runner = DaemonRunner(store, keepers=Keepers(store.folder, False))
    try:
        left = [str(task_id) for task_id in runner.finish(ids, deadline, force=is_all)]
        if is_all:
            left += Supervisor(store, keepers=runner.keepers).finish(deadline)
        return left
    finally:
        runner.keepers.close(is_all)


# ============================================================================
# 17. HTTP - health, metrics, the status page: HealthVerbs, HealthServer
#     Uses 1-16. Threads: one accepts, one a request, one checks. Closed by: Daemon.
# ============================================================================

LEVELS = ("healthy", "degraded", "unhealthy")
CHECKS = ("clock", "runner", "disk", "supervisor", "keeper", "store")  # what may hang comes last
ROUTES = {"/health": "health", "/ready": "ready", "/metrics": "metrics"}
ROUTES.update({f"/api/{x}": x for x in "status tasks logs processes why schedules events".split()})
# Only who has the key sees these: they may hold what other users of the machine must not read.
PRIVATE = frozenset("command args cwd data note reason reasons payload project folder".split())


class Exposition:
    """Metrics in Prometheus's text format 0.0.4."""

    def __init__(self) -> None:
        self._lines: dict[str, list[str]] = {}  # by name

    def add(self, name: str, help: str, value: Any, suffix: str = "", **labels: object) -> None:
        """Add a sample, unless its value is not known; suffix: of a histogram's parts."""
        if value is not None:
            kind = "counter" if name.endswith("_total") else "histogram" if suffix else "gauge"
            head = f"# HELP {name} {help}\n# TYPE {name} {kind}"
            escapes = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
            shown = ",".join(f'{key}="{str(x).translate(escapes)}"' for key, x in labels.items())
            self._lines.setdefault(name, [head]).append(f"{name}{suffix}{{{shown}}} {value}")

    def __str__(self) -> str:
        return "\n".join([*itertools.chain(*self._lines.values()), ""])


class HealthVerbs:
    """What can be asked about a daemon's health: `table`, in the form of TaskVerbs.

    The checks run in a thread of their own: what hangs hangs nobody who asks.
    """

    def __init__(self, runner: DaemonRunner, supervisor: Supervisor, verbs: ProcessVerbs) -> None:
        self._store, self._runner, self._supervisor = runner.store, runner, supervisor
        self._processes = verbs
        self.is_starting = True
        self._clock_s = Clock.now() - Clock.mono()
        self._lock = threading.Lock()  # guards what follows
        self._checking = threading.Thread()
        self._found: list[tuple[int, str]] = []
        self.table: dict[str, tuple[str, Callable[..., Fields]]] = {
            "health": ("", self._health),
            "ready": ("", self._ready),
            "metrics": ("", self._metrics),
            "events": ("lines", self._events),
        }

    def _check(self) -> Iterator[tuple[int, str]]:
        """Yield (an index of LEVELS, what was seen) for each of CHECKS."""
        back_s = self._clock_s - (Clock.now() - Clock.mono())
        yield (1, f"set back by {span(back_s)}") if back_s > CLOCK_JUMP_S else (0, "goes on")
        late_s = Clock.mono() - self._runner.meters.due_mono
        yield (2, f"hangs, for {span(late_s)}") if late_s > HUNG_S else (0, "turns")
        try:
            free = shutil.disk_usage(self._store.folder).free
            yield (free < DISK_LOW_BYTES) + (free < DISK_FULL_BYTES), f"{free >> 20} MiB free"
        except OSError as error:
            yield 2, f"the state folder: {error.strerror}"
        status = self._supervisor.status()
        down = ", ".join(f"{name} ({state})" for name, state in status["down"].items())
        yield (1, f"down: {down}") if down else (0, f"{status['running_instances']} running")
        obstacle, silent = self._runner.keepers.obstacle, self._runner.keepers.silent()
        late = (1, f"PID {silent[0]} owes an answer") if silent else (0, "answers")
        yield (2, obstacle) if obstacle else late
        try:
            self._store.database.probe()
            yield 0, "writable"
        except DaemonError as error:  # no path: whoever reaches the port reads this
            yield 2, error.message.replace(self._store.folder + os.sep, "")

    def _health(self) -> Fields:
        """Return {"overall": the worst, "checks": {name: {"status", "detail"}}}."""
        with self._lock:
            if not self._checking.is_alive():
                found: list[tuple[int, str]] = []
                look, self._found = (lambda: found.extend(self._check())), found
                self._checking = threading.Thread(target=look, name="health", daemon=True)
                with contextlib.suppress(RuntimeError):  # no thread to be had
                    self._checking.start()
            checking, found = self._checking, self._found
        if checking.ident:
            checking.join(HEALTH_WAIT_S)
        hung = f"no answer within {span(HEALTH_WAIT_S)}"
        why = hung if checking.is_alive() else "it could not be looked at"
        seen = [*zip(CHECKS, [*found, *[(2, why)] * len(CHECKS)])]
        checks = {name: {"status": LEVELS[level], "detail": text} for name, (level, text) in seen}
        return {"overall": LEVELS[max(level for _, (level, _) in seen)], "checks": checks}

    def _ready(self) -> Fields:
        """Return {"ready", "why": why not}."""
        reasons = [f"{name}: {found['detail']}" for name, found in self._health()["checks"].items()
                   if found["status"] == LEVELS[2]]  # fmt: skip
        reasons += ["it is starting"] if self.is_starting else []
        reasons += ["it is stopping"] if self._runner.is_draining else []
        return {"ready": not reasons, "why": reasons}

    def _events(self, lines: int = 15) -> Fields:
        """Return {"events": the last ones}; from the logs' ends: the page asks again and again."""
        path, found = os.path.join(self._store.folder, "events.log"), []
        data = b"".join(read_log(one, -lines)[0] for one in (path + ".1", path))
        for line in data.splitlines()[-lines:]:
            with contextlib.suppress(ValueError):  # of a full disk
                found.append(json.loads(line))
        return {"events": found}

    def _metrics(self) -> Fields:
        """Return {"text": Prometheus's text format, and the fields of DaemonMetrics}."""
        about, meters, path = self._runner.get_metrics(), self._runner.meters, self._store.path
        found = Exposition()
        found.add("apexd_info", "What runs.", 1, version=__version__)
        found.add("apexd_start_time_seconds", "When the daemon started.", about.started_at)
        for state, groups in self._store.get_counts().items():
            for group, n in groups.items():
                found.add("apexd_tasks", "Tasks there are.", n, state=state, group=group)
        for end, n in (("succeeded", about.tasks_succeeded), ("failed", about.tasks_failed)):
            found.add("apexd_tasks_finished_total", "What runs again is not.", n, state=end)
        for outcome, n in meters.outcomes.items():
            found.add("apexd_attempts_total", "Attempts that ended.", n, outcome=outcome.value)
        for kind, (*counts, seconds) in meters.seconds.items():
            name, text = f"apexd_task_{kind}_seconds", "Of each attempt; waits of the first."
            for i, bound in enumerate((*BUCKETS_S, "+Inf")):
                found.add(name, text, int(sum(counts[: i + 1])), "_bucket", le=bound)
            found.add(name, text, seconds, "_sum")
            found.add(name, text, int(sum(counts)), "_count")
        found.add("apexd_loop_turns_total", "Of the runner's loop.", meters.turns)
        sizes = [os.stat(one).st_size for one in (path, path + "-wal") if os.path.exists(one)]
        found.add("apexd_database_bytes", "On disk.", sum(sizes))
        found.add("process_cpu_seconds_total", "The daemon's own.", time.process_time())
        found.add("process_resident_memory_bytes", "The daemon's own.", Platform.own_memory())
        names = list(self._store.config.processes)
        looks = [(name, one) for name, of in zip(names, self._processes.look(names)) for one in of]
        for name, one in looks:
            add = functools.partial(found.add, process=name, instance=one["index"])
            add("apexd_process_up", "1: it is.", int(one["state"] in ("running", "unhealthy")))
            add("apexd_process_restarts_total", "By the daemon.", one["restart_count"])
            add("apexd_process_memory_bytes", "With its children.", one["memory_bytes"])
            ratio = one["cpu_percent"] and one["cpu_percent"] / 100
            add("apexd_process_cpu_ratio", "Of one processor.", ratio)
        return {"text": str(found), **about.to_dict()}


PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>apexd</title>
<link rel="icon" href="data:,">
<style nonce="NONCE">
:root { color-scheme: light dark; --back: #f5f6f8; --card: #fff; --text: #1a1f26; --dim: #56606d;
  --line: #d9dee5; --good: #17703a; --bad: #b3261e; --warn: #8a5300; --blue: #1457b0; }
@media (prefers-color-scheme: dark) { :root { --back: #12161b; --card: #1b2128; --text: #e4e8ed;
  --dim: #a2adb9; --line: #333c46; --good: #5fd08a; --bad: #ff8f85; --warn: #f0b64e;
  --blue: #7db4ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 90rem; background: var(--back);
  color: var(--text); font: 15px/1.45 system-ui, sans-serif; }
header { display: flex; flex-wrap: wrap; gap: .3rem 1rem; align-items: baseline; }
h1 { font-size: 1.3rem; margin: 0; } h2 { font-size: 1rem; margin: 0 0 .4rem; }
main { display: grid; gap: .8rem; margin-top: .8rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(27rem, 100%), 1fr)); }
section, #gone { background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: .8rem; min-width: 0; }
#gone, .stale section { border: 2px dashed var(--bad); }
.wide { grid-column: 1 / -1; } .scroll { overflow-x: auto; }
:focus-visible { outline: 3px solid var(--blue); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem 1rem .2rem 0; text-align: left; vertical-align: top; }
tr { border-top: 1px solid var(--line); } thead tr { border: 0; }
.n { text-align: right; white-space: nowrap; }
.t, h1, strong { overflow-wrap: anywhere; } .t { min-width: 7rem; }
pre { margin: .2rem 0 0; font: 12px/1.4 ui-monospace, monospace; white-space: pre-wrap; }
progress { width: 100%; min-width: 4rem; height: .6rem; accent-color: var(--blue); }
svg { width: 100%; height: 3.5rem; display: block; border-bottom: 1px solid var(--line); }
th, pre, .dim { color: var(--dim); }
.good { color: var(--good); fill: var(--good); } .warn { color: var(--warn); }
.bad, #gone { color: var(--bad); fill: var(--bad); }
@media (max-width: 40rem) { body { padding: .5rem; } .more { display: none; } }
</style>
<header><h1 id="name">apexd</h1><strong id="health" role="status"></strong>
<span id="about" class="dim"></span></header>
<p id="gone" role="alert" hidden></p>
<p id="locked" class="dim" hidden>`apexd.py status` prints the address with commands and output.</p>
<main id="main"></main>
<script nonce="NONCE">
"use strict";
const key = location.hash.slice(1), shown = {}, at = id => document.getElementById(id);
const COLORS = {healthy: "good", succeeded: "good", running: "good", degraded: "warn",
  backoff: "warn", starting: "warn", unhealthy: "bad", failed: "bad", crashed: "bad"};
function make(tag, content, name = "") {  // what comes from outside becomes text, never markup
  const node = document.createElement(tag);
  node.append(...[content].flat().map(part => part ?? "-"));
  node.className = name;
  return node;
}
for (const [id, head, name] of [["hour", "Last hour"], ["queue", "Queue"],
    ["schedules", "Schedules"], ["running", "Running", "wide"], ["processes", "Processes", "wide"],
    ["failed", "Failed tasks", "wide"], ["latest", "Latest tasks", "wide"],
    ["events", "Events", "wide"]]) {
  const box = make("div", [], "scroll");
  Object.assign(box, {id, tabIndex: 0, role: "region", ariaLabel: head});
  at("main").append(make("section", [make("h2", head), box], name));
}
const state = text => make("span", text, COLORS[text]);
const clock = t => !t ? "-" : new Date(t * 1000).toLocaleString([],
  {timeStyle: "medium", ...(Math.abs(Date.now() / 1000 - t) > 43200 && {dateStyle: "short"})});
const title = task => [task.label ?? task.command ?? "task " + task.id].flat().join(" ")
  .replace(/(.{160}).+/su, "$1\u2026");
const known = (x, unit) => x === null ? "-" : x.toFixed(0) + unit;
function span(s) {
  for (const [unit, letter] of [[86400, "d"], [3600, "h"], [60, "m"]])
    if (s >= unit) return Math.floor(s / unit) + letter + " " + span(s % unit).split(" ")[0];
  return Math.max(s, 0).toFixed(s < 10 && s % 1 ? 1 : 0) + "s";
}
function show(id, data, draw) {  // only what has changed: a selection stays
  const text = JSON.stringify(data);
  if (shown[id] !== text) at(id).replaceChildren(draw(data));
  shown[id] = text;
}
function table(id, rows, heads, cells) {  // a head: what it says, and of which class it is
  const line = (tag, row) => make("tr", row.map((cell, i) => make(tag, cell, heads[i][1])));
  show(id, rows, () => !rows.length ? make("span", "none", "dim") : make("table", [
    make("thead", line("th", heads.map(head => head[0]))),
    make("tbody", rows.map(row => line("td", cells(row))))]));
}
function draw(tag, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  Object.entries(attributes).forEach(([name, value]) => node.setAttribute(name, value));
  return node;
}
function bars([minutes, is_young]) {  // failures stand upon successes
  const most = Math.max(...minutes.map(([ok, ko]) => ok + ko));
  const [good, bad] = [0, 1].map(k => minutes.reduce((sum, minute) => sum + minute[k], 0));
  const svg = draw("svg", {viewBox: "0 0 600 50", preserveAspectRatio: "none", role: "none"});
  const bar = (i, n, on, name) => svg.append(draw("rect", {x: i * 10, width: 8, class: name,
    y: 50 - (on + n) / (most || 1) * 50, height: n / (most || 1) * 50}));
  minutes.forEach(([ok, ko], i) => { bar(i, ok, 0, "good"); bar(i, ko, ok, "bad"); });
  const text = `${good} succeeded, ${bad} failed; at most ${most} a minute`
    + (is_young ? "; since the daemon's start" : "");
  return make("div", [svg, make("span", text, "dim")]);
}
async function get(path) {
  const options = {headers: {Authorization: "Bearer " + key}, signal: AbortSignal.timeout(4500)};
  const data = await (await fetch(path, options)).json();
  if (data.error) throw new Error(data.error.message);
  return data;
}
async function addOutput(task) {  // the last lines of what runs
  const path = `/api/logs?id=${task.id}&offset=-3`;
  const answer = await get(path).catch(() => ({}));
  const bytes = Uint8Array.from(atob(answer.data ?? ""), letter => letter.charCodeAt(0));
  task.output = new TextDecoder().decode(bytes).slice(-600);
  task.ran = span(Date.now() / 1000 - task.started_at);
}
async function addReasons(one) {
  const answer = await get("/api/why?name=" + one.name).catch(() => ({}));
  one.why = (answer.reasons ?? []).join("; ");
}
const HEADS = [["id", "n"], ["state"], ["task", "t"], ["group", "more"], ["tries", "n more"],
  ["exit", "n"], ["took", "n"], ["ended", "n more"]];
const cells = task => [task.id, state(task.state), title(task), task.group, task.attempts,
  task.exit_code, task.finished_at && task.started_at
    ? span(task.finished_at - task.started_at) : "-", clock(task.finished_at)];
function running_cells(task) {
  const about = {max: 100, value: task.progress, ariaLabel: `progress of task ${task.id}`};
  const bar = task.progress === null ? []
    : [Object.assign(make("progress", []), about), known(task.progress, "% ")];
  return [task.id, [title(task), make("pre", task.output)], task.group, task.ran,
    [...bar, task.note ?? ""]];
}
async function refresh() {
  const [health, status, running, failed, latest, processes, schedules, events] =
    await Promise.all(["/health", "/api/status", "/api/tasks?state=running&limit=20",
      "/api/tasks?state=failed&limit=10", "/api/tasks?limit=15", "/api/processes",
      "/api/schedules", "/api/events"].map(get));
  const down = processes.processes.filter(one => one.status !== "running").slice(0, 9);
  await Promise.all([...running.tasks.map(addOutput), ...down.map(addReasons)]);
  at("locked").hidden = "project" in status;
  document.title = at("name").textContent = (status.project ?? "apexd").split("/").pop();
  const faults = Object.entries(health.checks).filter(([, one]) => one.status !== "healthy");
  show("health", [health.overall, ...faults.map(([name, one]) => `${name}: ${one.detail}`)],
    parts => make("span", parts.join("; "), COLORS[health.overall]));
  at("about").textContent = `apexd ${status.version}, PID ${status.pid}, up `
    + span(status.uptime_secs) + (status.draining ? ", stopping" : "")
    + (status.paused.length ? ", paused: " + status.paused.join(", ") : "");
  show("hour", [status.last_hour, status.uptime_secs < 3600], bars);
  table("queue", Object.entries(status.counts).flatMap(([kind, groups]) => Object.entries(groups)
    .map(of => [kind, ...of])), [["state"], ["group"], ["tasks", "n"]],
    ([kind, group, n]) => [state(kind), group, n]);
  table("running", running.tasks, [["id", "n"], ["task", "t"], ["group", "more"],
    ["for", "n"], ["progress", "t"]], running_cells);
  table("processes", processes.processes, [["process", "t"], ["status"], ["up", "n"], ["CPU", "n"],
    ["memory", "n"], ["restarts", "n more"]], one => [[one.name, make("pre", one.why ?? "")],
    state(one.status), `${one.running}/${one.instances}`, known(one.cpu_percent, "%"),
    known(one.memory_bytes && one.memory_bytes / 1e6, " MB"), one.restart_count]);
  table("failed", failed.tasks.reverse(), HEADS, cells);
  table("latest", latest.tasks.reverse(), HEADS, cells);
  table("schedules", schedules.schedules, [["name"], ["when"], ["next"], ["last", "more"]],
    one => [one.name, one.cron, clock(Date.parse(one.next?.[0]) / 1000),
      one.result && state(one.result)]);
  table("events", events.events.reverse(), [["time"], ["event"], ["source"], ["what", "t more"]],
    one => [clock(one.time), one.type, one.source, Object.entries(one.payload ?? {})
      .filter(([, x]) => x !== null).map(([name, x]) => name + "=" + JSON.stringify(x))
      .join(" ").slice(0, 300)]);
}
let seen = "never", timer = 0;
async function turn() {
  const error = await refresh().catch(error => error);
  if (error)
    at("gone").textContent = `The daemon does not answer: ${error.message}. Last seen ${seen}.`;
  else seen = "at " + new Date().toLocaleTimeString();
  at("gone").hidden = !error;
  at("main").className = error ? "stale" : "";
  clearTimeout(timer);  // the page may have become visible meanwhile
  timer = setTimeout(turn, document.hidden ? 15000 : 2000);
}
addEventListener("hashchange", () => location.reload());  // the address with the key came later
document.addEventListener("visibilitychange", () => document.hidden || turn());
turn();
</script>
</html>
"""


def receive_head(connection: socket.socket, deadline: float) -> bytes:
    """Receive a request's line and headers, or more than HTTP_HEAD_MAX_BYTES. Raises OSError."""
    data = b""
    while len(data) <= HTTP_HEAD_MAX_BYTES and not re.search(rb"\n\r?\n", data):
        connection.settimeout(max(deadline - Clock.mono(), 0.001))
        part = connection.recv(HTTP_HEAD_MAX_BYTES)
        if not part:
            raise ConnectionResetError("closed within a request")
        data += part
    return data


def read_request(head: bytes) -> tuple[int, Any]:
    """Parse a request; return (0 or the status that refuses it, what http.server made of it)."""
    if len(head) > HTTP_HEAD_MAX_BYTES:
        return (431 if b"\n" in head else 414), None
    faults: list[int] = []
    request: Any = http.server.BaseHTTPRequestHandler.__new__(http.server.BaseHTTPRequestHandler)
    request.send_error = lambda status, *about: faults.append(int(status))
    request.rfile = io.BytesIO(head)
    request.raw_requestline = request.rfile.readline()
    is_sound = request.parse_request() and request.request_version != "HTTP/0.9"
    return (0 if is_sound else faults[0] if faults else 400), request


HEADERS = """
Allow: GET, HEAD
Cache-Control: no-store
Connection: close
Content-Security-Policy: default-src 'none'; connect-src 'self'; img-src data:; \
script-src 'nonce-NONCE'; style-src 'nonce-NONCE'; base-uri 'none'; form-action 'none'; \
frame-ancestors 'none'
Cross-Origin-Resource-Policy: same-origin
Referrer-Policy: no-referrer
X-Content-Type-Options: nosniff
"""


def make_response(status: int, kind: str, text: str, has_body: bool = True) -> bytes:
    """Make a response; NONCE in the page becomes what its policy allows to run."""
    nonce, date = os.urandom(16).hex(), email.utils.formatdate(usegmt=True)
    body = (text.replace("NONCE", nonce) if text is PAGE else text).encode()
    head = f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\nDate: {date}\n"
    head += f"Content-Type: {kind}\nContent-Length: {len(body)}" + HEADERS + "\n"
    return head.replace("NONCE", nonce).replace("\n", "\r\n").encode() + body * has_body


def without_private(fields: Fields) -> Fields:
    """Return the fields that all may see who reach the port."""
    return {name: x for name, x in fields.items() if name not in PRIVATE}


def at_port(host: str, port: int) -> str:
    """Write an address as it stands in a URL."""
    return f"[{host}]:{port}" if ":" in host else f"{host.lower()}:{port}"


class HealthServer:
    """Answers GET and HEAD on a TCP port from the sources that it is given, and shows the page.

    sources: ROUTES names them; each is called with what the query has, all strings. Who sends
    `key` (Authorization: Bearer KEY) sees PRIVATE fields. Threads: "http" accepts, each request
    has its own. Life: start -> stop -> start.
    """

    def __init__(self, folder: str, sources: Mapping[str, Callable[..., Fields]]) -> None:
        self._sources = sources
        self._path = os.path.join(folder, "http.json")
        self.url, self.key = "", ""  # of the page, with the key: neither is ever logged
        self._host, self._place, self._port = "", "", 0  # place: the address it is bound to
        self._acceptor: Acceptor | None = None
        self._turn = threading.Lock()  # one source at a time: none hangs more than one thread

    def listen(self, options: Any, inherited: socket.socket | None, former: Any = None) -> None:
        """Answer where [health] says, else where the former one said. Raises CANNOT_CREATE."""
        self.stop()
        if not options.enabled:
            return
        try:
            self.start(options.host, options.port, inherited)
        except DaemonError:
            if former is not None:
                self.listen(former, inherited)
            raise
        log.info("%s answers", self.url.partition("#")[0])
        if not re.match(r"127\.|::1$|::ffff:127\.", self._place):
            log.warning("other machines may reach it: names and states are no secret there")

    def start(self, host: str, port: int, inherited: socket.socket | None = None) -> None:
        """Listen; port 0: where it was the last time, else anywhere. Raises CANNOT_CREATE.

        inherited: a service manager's socket, used instead.
        """
        known: Fields = {}
        with contextlib.suppress(ValueError, DaemonError):
            known = read_json(self._path) or {}
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        if inherited and inherited.family not in (socket.AF_INET, socket.AF_INET6):
            hint = "give it a ListenStream= with a port"
            raise DaemonError("CANNOT_CREATE", "the socket named http is not one of TCP", hint)
        for number in [port] if port else [known.get("port"), 0]:
            try:
                new = functools.partial(socket.create_server, (host, number), family=family)
                listener = inherited.dup() if inherited else new()
                break
            except (OSError, OverflowError, TypeError) as error:  # the file may be damaged
                what = str(getattr(error, "strerror", error)).partition(" (while")[0]
        else:
            hint = "name another in [health], or port 0: any that is free"
            raise DaemonError("CANNOT_CREATE", f"cannot listen on {host} port {port}: {what}", hint)
        self._host, (self._place, self._port) = host, listener.getsockname()[:2]
        is_key = re.fullmatch("[0-9a-f]{64}", str(known.get("key")))
        self.key = is_key[0] if is_key else os.urandom(32).hex()
        with contextlib.suppress(DaemonError):  # a full disk
            if known != {"port": self._port, "key": self.key}:
                write_atomically(self._path, json.dumps({"port": self._port, "key": self.key}))
        near = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self._place, self._place)
        self.url = f"http://{at_port(near, self._port)}/#{self.key}"
        self._acceptor = Acceptor(listener, "http", HTTP_CONNECTIONS_MAX, 0.0, self._serve)

    def stop(self) -> None:
        """Accept nothing more; requests under way are answered."""
        if self._acceptor is not None:
            self._acceptor.close()
        self.url = ""

    def _serve(self, connection: socket.socket, idle: dict[socket.socket, float]) -> None:
        """Answer one request, in HTTP_TIMEOUT_S altogether."""
        deadline = Clock.mono() + HTTP_TIMEOUT_S
        head = receive_head(connection, deadline)
        idle.pop(connection, None)
        status, request = read_request(head)
        place = connection.getsockname()[0].replace("::ffff:", "")  # IPv4 at a socket for both
        status = status or self._refuse(request, place)
        refusal = (status, "text/plain", f"{status}\n")
        answer = refusal if status else self._answer(request, deadline)
        response = make_response(*answer, getattr(request, "command", "") != "HEAD")
        connection.settimeout(max(deadline - Clock.mono(), 0.1))
        idle[connection] = Clock.mono()  # who reads slowly keeps nobody out
        connection.sendall(response)
        connection.shutdown(socket.SHUT_WR)
        while Clock.mono() < deadline and connection.recv(1 << 16):
            pass  # to close before all was read would take the response back

    def _refuse(self, request: Any, place: str) -> int:
        """Return the status that refuses a request, 0 for none; place: the address it came to."""
        headers, names = request.headers, ("127.0.0.1", "localhost", "::1", self._host, place)
        hosts = [host.strip().lower() for host in headers.get_all("Host", [])]
        known = {at_port(name, self._port) for name in names}
        known |= {name[:-3] for name in known if self._port == 80}  # as browsers send it
        if len(hosts) != 1 or hosts[0] not in known:
            return 403  # DNS rebinding
        if {*headers.get_all("Origin", [])} - {"http://" + hosts[0]}:
            return 403
        if request.command not in ("GET", "HEAD"):
            return 405
        if {*headers.get_all("Content-Length", [])} - {"0"} or "Transfer-Encoding" in headers:
            return 413
        return 0 if request.path.partition("?")[0] in ("/", *ROUTES) else 404

    def _answer(self, request: Any, deadline: float) -> tuple[int, str, str]:
        """Return (status, type, body) of a request that is in order."""
        path, _, query = request.path.partition("?")
        if path == "/":
            return 200, "text/html; charset=utf-8", PAGE
        given = request.headers.get("Authorization", "").encode("utf-8", "replace")
        has_key = hmac.compare_digest(given, b"Bearer " + self.key.encode())
        try:
            answer = self._ask(ROUTES[path], query, deadline)
            is_well = answer.get("ready", True) and answer.get("overall") != LEVELS[2]
            status = 200 if is_well else 503
        except DaemonError as error:
            answer, status = {"error": error.to_dict()}, 400 if error.exit_status == 2 else 503
            if status == 503 and not has_key:  # it may name paths
                answer["error"] = {"code": error.code.lower(), "message": CODES[error.code][1]}
        except Exception:  # a request handler
            log.exception("GET %s failed", path)
            answer, status = {"error": {"code": "internal", "message": "a bug"}}, 500
        if "text" in answer:
            return 200, "text/plain; version=0.0.4; charset=utf-8", answer["text"]
        text = json.dumps(answer)
        if not has_key:
            text = json.dumps(json.loads(text, object_hook=without_private))
        return status, "application/json", text

    def _ask(self, name: str, query: str, deadline: float) -> Fields:
        """Ask a source; one at a time, but for those that tell whether others hang."""
        turn = threading.Lock() if name in ("health", "ready") else self._turn
        if not turn.acquire(timeout=max(deadline - Clock.mono(), 0.0)):
            raise DaemonError("BUSY", "others have asked before", "try again, or see /health")
        try:
            act = self._sources.get(name, lambda: {name: []})
            return act(**dict(urllib.parse.parse_qsl(query)))
        finally:
            turn.release()


def choose_sources(
    verbs: Mapping[str, tuple[str, Callable[..., Any]]], own: Mapping[str, Any]
) -> dict[str, Callable[..., Fields]]:
    """Return the sources of a daemon's HealthServer: what it shows of its verbs, and its own."""
    names = {"tasks": "list", "processes": "list_processes", "why": "why_process"}
    shown = {name: verbs[names.get(name, name)] for name in (*names, "schedules")}
    shown["logs"] = ("id! attempt offset", verbs["logs"][1])
    return {name: reading(*verb) for name, verb in {**shown, **own}.items()}


# ============================================================================
# 18. DAEMON - wiring, start order, signals, reload, stop; DaemonManager
#     Uses 1-17. Main thread. Lock order: runner or supervisor, then store.
# ============================================================================

_STOPS = ("stop", "SIGTERM", "SIGINT", "SIGBREAK")


class Mailbox:
    """What signal handlers and other threads tell the main thread, which sleeps until then."""

    def __init__(self) -> None:
        self._messages: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._waker, self._wakee = socket.socketpair()
        self._waker.setblocking(False)
        # Another thread may be the one that the kernel interrupts: then only this wakes us.
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        for name in Platform.SIGNALS:
            if name != "SIGCHLD" or os.getpid() == 1:
                signal.signal(getattr(signal, name), self._hear)
        reset_signals()

    def _hear(self, number: int, frame: object) -> None:
        self._messages.put(signal.Signals(number).name)

    def post(self, message: str) -> None:
        """Leave a message, from any other thread."""
        self._messages.put(message)
        with contextlib.suppress(BlockingIOError):  # full: it is awake
            self._waker.send(b"x")

    def take(self, tick_s: float | None) -> Iterator[str]:
        """Yield messages as they come, SIGHUP or what was posted; of several alike, one.

        "tick" when none has come for so long.
        """
        self._wakee.settimeout(tick_s)
        while True:
            waiting = [self._messages.get() for _ in range(self._messages.qsize())]
            yield from dict.fromkeys(waiting)
            if not waiting:
                try:
                    self._wakee.recv(4096)
                except socket.timeout:
                    yield "tick"


class ServiceManager:
    """Tells systemd, or what else set NOTIFY_SOCKET, how the daemon is (sd_notify(3))."""

    def __init__(self, is_ours: bool) -> None:
        self._address = os.environ.get("NOTIFY_SOCKET", "") if is_ours else ""
        is_watched = self._address and os.environ.get("WATCHDOG_PID") == str(os.getpid())
        usec = re.fullmatch("[1-9][0-9]{3,15}", os.environ.get("WATCHDOG_USEC", ""))
        self.tick_s = int(usec[0]) / 2e6 if usec and is_watched else None  # half; None: unwatched

    def tell(self, *lines: str, watchdog_s: float = 0.0) -> None:
        """Send lines such as READY=1; watchdog_s: what a watchdog allows from now on."""
        if watchdog_s and self.tick_s:
            lines = (*lines, f"WATCHDOG_USEC={watchdog_s * 1e6:.0f}")
        if self._address:
            Platform.notify(self._address, "\n".join(lines))

    def ping(self, keepers: Keepers) -> None:
        """Keep the watchdog quiet, unless the runner or the keepers hang. In the main thread."""
        if self.tick_s and keepers.is_turning(self.tick_s * 0.9):
            self.tell("WATCHDOG=1")


def log_stacks() -> None:
    """Log where each thread is."""
    import traceback

    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, frame in sys._current_frames().items():
        stack = "".join(traceback.format_stack(frame)).rstrip()
        log.info("thread %s\n%s", names.get(ident, ident), stack)


def take_lock(pid_file: PidFile, project: Project) -> None:
    """Become the owner of a project, after a client. Raises ALREADY_RUNNING, BUSY."""
    while not pid_file.acquire("daemon", project.path, told=project.told):
        holder = find_daemon(pid_file)
        if holder is not None:
            what = f"already running, PID {holder.pid}"
            raise DaemonError("ALREADY_RUNNING", what, "`status` tells more")


def settle_in(options: Any, project: Project, foreground: bool) -> dict[int, int]:
    """Take on umask and folder; return {descriptor: what it is to be}, once it is ready.

    options: config.daemon. Raises CANNOT_CREATE, PERMISSION_DENIED (of another user).
    """
    user, folder = options.user, project.folder
    if Platform.is_root() and user not in (None, "root"):
        hint = f"`chown -R {user} {folder}`; then the command line becomes that user"
        raise DaemonError("PERMISSION_DENIED", f"{folder} is not {user}'s (daemon.user)", hint)
    os.umask(int(options.umask, 8))
    folder, null = project.file("", options.work_dir), os.open(os.devnull, os.O_RDWR)
    try:
        os.chdir(folder)
    except OSError as error:
        raise cannot_create(folder, error) from None
    outputs = {} if foreground else dict.fromkeys((0, 1, 2), null)
    for fd, name in ((1, options.stdout), (2, options.stderr)):
        if name:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
            outputs[fd] = open_file(project.file("", name), flags)
    return outputs


def add_on_usr2(store: TaskStore) -> None:
    """Add the task that the configuration has for SIGUSR2, if any."""
    options = store.config.daemon
    if options.on_usr2:
        env = capture_environment(store.config.env_keep)
        store.add([options.on_usr2], {}, cwd=store.project, env=env)


def describe_work(supervisor: Supervisor, config: Config) -> Fields:
    """Return what state.json says besides `status`: {"running": [tasks], "monitors": {
    "processes": {"web": [instances]}, "schedules": {"night": [time of its last fire, task] or
    None}, "watches", "hooks"}}."""
    with supervisor.moved:
        found = {name: supervisor.find(name) for name in config.processes}
        processes = {name: [one.describe({}) for one in each] for name, each in found.items()}
    monitors: Fields = {"processes": processes}
    fires = EventStore(supervisor.store).get_fires()
    for kind in ("schedule", "watch", "hook"):
        names = getattr(config, TABLES[kind])
        monitors[TABLES[kind]] = {name: fires.get(f"{kind}.{name}") for name in names}
    tasks = supervisor.store.find(state="running", limit=1000)
    return {"monitors": monitors, "running": [task.to_dict() for task in tasks]}


class Daemon:
    """One project's daemon: it owns lock, store, runner and control socket, and wires them.

    report: given {"event": "ready" | "progress" | "error", ...} while it starts.
    """

    def __init__(self, project: Project, report: Callable[[Fields], Any], foreground: bool) -> None:
        self._project = project
        self._report = report
        self._foreground = foreground
        self._config = config = project.load_config()
        plain_path = config.daemon.pid_file and project.file("", config.daemon.pid_file)
        self._pid_file = PidFile(project.file("daemon.pid"), plain_path)
        self._manager = ServiceManager(foreground)
        self._reload_lock = threading.Lock()  # one reload at a time
        self._next_heartbeat = self._next_look = 0.0  # monotonic
        self._exit_status, self._files = 0, dict[str, object]()  # the database's, with `file_id`
        self._standing = threading.Event()  # a keeper takes starts
        self._is_over = False  # nothing runs any more
        self._first_term = 0.0  # monotonic

    def run(self) -> int:
        """Start, serve until told to stop, return the exit status. Raises DaemonError."""
        self._sockets = Platform.take_sockets()
        self._mailbox = Mailbox()
        Platform.change_limits()
        os.umask(0o077)
        make_state_folder(self._project.folder, self._project.path)
        take_lock(self._pid_file, self._project)
        try:
            self._open_log(self._config)
            outputs = settle_in(self._config.daemon, self._project, self._foreground)
            log.info("apexd %s starts, PID %d, %s", __version__, os.getpid(), self._project.path)
            self._manager.tell("STATUS=starting", watchdog_s=RECOVERY_S)
            self._report({"event": "progress", "what": "checking the database"})
            path, told = self._project.file("apex.db"), (self._pid_file, self._project.path)
            with contextlib.closing(TaskStore(path, self._config, *told)) as self._store:
                self._store.database.check()
                self._files = {name: file_id(name) for name in (path, path + "-wal")}
                self._serve(outputs)
            log.info("stopped; metrics %s", json.dumps(self._runner.get_metrics().to_dict()))
            return self._exit_status
        except DaemonError as error:
            log.error("%s (%s)", error, error.hint)
            raise
        except RuntimeError as error:  # no thread to be had, say
            log.exception("the daemon cannot go on")
            raise DaemonError("START_FAILED", str(error), "see `logs`; `ulimit -u`") from None
        finally:
            self._pid_file.release()
            logging.shutdown()

    def _open_log(self, config: Config) -> None:
        path = self._project.file("daemon.log", config.log.file)
        open_log(path, config.log, self._foreground)

    def _make_parts(self) -> None:
        folder, keepers = self._project.folder, Keepers(self._project.folder)
        store, post = self._store, self._mailbox.post
        runner = DaemonRunner(store, None, self._look_after, lambda: post("drained"), keepers)
        self._runner, self._keepers = runner, keepers
        self._supervisor = Supervisor(store, self._give_up, lambda: post("stopped"), keepers)
        self._scheduler = Scheduler(store, runner.wake)
        self._watches = Watches(store, runner.wake)
        keepers.on_standing = self._note_standing
        self.publish = EventStore(store).publish
        store.on_events = self._hear
        of_processes = ProcessVerbs(self._supervisor, store)
        self._health = HealthVerbs(runner, self._supervisor, of_processes)
        verbs: dict[str, tuple[str, Callable[..., Any]]] = {
            **TaskVerbs(store, runner).table,
            **of_processes.table,
            **{name: self._health.table[name] for name in ("health", "metrics")},
            "ping": ("", lambda: {"type": "pong", **self._identity()}),
            "status": ("", lambda: {"type": "status", **self._status(), "url": self._http.url}),
            "reload": ("", lambda: {"plan": self._reload()}),
            "shutdown": ("keep", self._shutdown),
        }
        show = ("", lambda: {**self._status(), "last_hour": runner.meters.last_hour()})
        sources = choose_sources(verbs, {**self._health.table, "status": show})
        self._http = HealthServer(folder, sources)
        near = self._project.file("control.sock", self._config.daemon.socket)
        self._control = ControlServer(folder, verbs, near, self._sockets.get("control"))

    def _serve(self, outputs: Mapping[int, int]) -> None:
        self._make_parts()
        self._http.listen(self._config.health, self._sockets.get("http"))
        self._control.start(settings_of(self._config))
        for part in (self._supervisor, self._runner, self._scheduler, self._watches):
            part.start()
        self._standing.wait(STANDING_S)
        self._health.is_starting = False
        log.info("ready")
        self.publish("daemon.started", {"pid": os.getpid(), "version": __version__}, "daemon")
        channel = os.dup(1)
        for fd, output in outputs.items():
            os.dup2(output, fd)
        self._report({"event": "ready", "pid": os.getpid(), "channel": channel})
        os.close(channel)
        self._manager.tell("READY=1", "STATUS=ready", watchdog_s=2 * (self._manager.tick_s or 0))
        try:
            self._obey()
        finally:
            for each in (self._control, self._http, self._scheduler, self._watches):
                each.stop()
            self._supervisor.halt()
            self._runner.halt()
            self._keepers.close(self._is_over)
            with contextlib.suppress(DaemonError):
                if self._pid_file.is_held():
                    self._write_state()

    def _hear(self, events: Sequence[Event]) -> None:
        """Wake the runner for what hooks have added; its own claims need no further turn."""
        if any(event.type == "task.added" for event in events):
            self._runner.wake()

    def _note_standing(self) -> None:
        self._standing.set()
        self._runner.wake()
        self._supervisor.wake()

    def _obey(self) -> None:
        """Do what signal handlers and threads ask for, until the end."""
        ended = set[str]()
        for name in self._mailbox.take(self._manager.tick_s):
            self._manager.ping(self._keepers)
            ended |= {name} & {"drained", "stopped"}  # tasks, processes
            self._is_over = len(ended) == 2
            if name in ("leave", "failed", *_STOPS) and not self._runner.is_draining:
                self.publish("daemon.stopping", {"why": name}, "daemon")
                self._manager.tell("STOPPING=1", f"STATUS=stopping: {name}")
            if name == "leave" or self._is_over:
                log.info("%s", "all has ended" if self._is_over else "leaving all that runs")
                return
            try:
                self._act(name)
            except (DaemonError, OSError) as error:  # a full disk, say
                log.error("%s: %s", name, error)

    def _act(self, name: str) -> None:
        if name == "drained":
            self._supervisor.stop()
        elif name == "failed":
            self._scheduler.stop()
            if not self._first_term:
                self._runner.drain(self._config.daemon.graceful_timeout)
        elif name in _STOPS:
            now, is_first = Clock.mono(), not self._first_term
            if is_first or now - self._first_term >= FIRST_TERM_S:
                how = "shutting down gracefully" if is_first else "again, stopping at once"
                log.info("Received %s, %s", name, how)
                log.info("Waiting for %d tasks", self._runner.get_metrics().active_task_count)
                self._scheduler.stop()
                self._runner.drain(self._config.daemon.graceful_timeout if is_first else 0.0)
                if not is_first:
                    self._supervisor.stop(force=True)
            self._first_term = self._first_term or now
        elif name == "SIGHUP":
            with contextlib.suppress(DaemonError):  # logged; nothing has changed
                self._reload()
        elif name == "SIGUSR1":
            self._dump()
        elif name == "SIGUSR2":
            self._open_log(self._config)
            self._store.event_log.close()
            log.info("reopened the log")
            add_on_usr2(self._store)
            self._runner.wake()
        elif os.getpid() == 1:  # SIGCHLD
            Platform.reap_orphans(self._keepers.has_child)

    def _give_up(self, name: str) -> None:
        self._fail(1, f"process {name} is critical and has failed")

    def _fail(self, status: int, why: str) -> None:
        log.error("%s: stopping", why)
        self._exit_status = self._exit_status or status
        self._mailbox.post("leave" if self._keepers.has_lost_folder() else "failed")

    def _shutdown(self, keep: bool = False) -> Fields:
        """Stop; `keep` leaves the tasks running for the next daemon."""
        self._mailbox.post("leave" if keep else "stop")
        return {"message": "stopping"}

    def _reload(self) -> list[str]:
        """Read the configuration again; return what changed. Raises CONFIG_INVALID."""
        with self._reload_lock, contextlib.ExitStack() as stack:
            self._manager.tell("RELOADING=1", f"MONOTONIC_USEC={int(Clock.mono() * 1e6)}")
            stack.callback(self._manager.tell, "READY=1")
            try:
                new = self._project.load_config()
                if new.log != self._config.log:
                    self._open_log(new)
                if new.health != self._config.health:
                    self._http.listen(new.health, self._sockets.get("http"), self._config.health)
            except DaemonError as error:
                with contextlib.suppress(DaemonError):
                    self._open_log(self._config)  # as it was
                log.error("reload refused: %s (%s)", error, error.hint)
                raise
            plan = self._config.plan(new)
            old, self._config, self._store.config = self._config, new, new
            self._supervisor.reload(old)
            self._scheduler.reload()
            self._watches.start()
            self._next_heartbeat = self._next_look = 0.0
            self._control.start(settings_of(new))
            log.info("reloaded: %s", "; ".join(plan) or "nothing changed")
            changed = [re.split(r"[:=]", line)[0].strip() for line in plan]
            self.publish("config.reloaded", {"changed": changed[:CHANGED_MAX]}, "daemon")
            self._runner.wake()
            return plan

    def _look_after(self) -> float:
        """Do what recurs, each at its own time; return in how many seconds the next is due."""
        now = Clock.mono() + TOGETHER_S
        try:
            if now >= self._next_look:
                self._next_look = now + min(self._config.daemon.poll_interval, LOOK_S)
                self._inspect()
            if now >= self._next_heartbeat and not self._exit_status:
                self._next_heartbeat = now + self._config.daemon.heartbeat_interval
                self._manager.tell(f"STATUS=tasks: {self._runner.get_metrics().active_task_count}")
                write_atomically(self._project.file("heartbeat"), timestamp(Clock.now()) + "\n")
                self._write_state()
        except DaemonError as error:  # a full disk
            log.error("%s (%s)", error, error.hint)
        wait_s = min(self._next_look, self._next_heartbeat) - Clock.mono()
        return min(wait_s, (self._manager.tick_s or float("inf")) / 2)

    def _inspect(self) -> None:
        """Look whether database, lock file and socket are where they were."""
        gone = [path for path, known in self._files.items() if file_id(path) != known]
        if gone and not self._exit_status:
            why = f"{gone[0]} was removed or replaced while in use"
            self._fail(CODES["DATABASE_CORRUPT"][0], why)
        if gone:
            return  # nothing here is ours to write any more
        lock, project = self._pid_file, self._project
        if not (lock.is_held() or lock.acquire("daemon", project.path, 1.0, project.told)):
            if getattr(lock.holder(), "role", "") == "daemon":
                self._mailbox.post("leave")
        self._control.start(settings_of(self._config))
        if not self._health.is_starting:
            self._watches.start()  # those that could not
        if os.getpid() == 1:
            Platform.reap_orphans(self._keepers.has_child)

    def _write_state(self) -> None:
        state = {**self._status(), **describe_work(self._supervisor, self._config)}
        write_atomically(self._project.file("state.json"), json.dumps(state, indent=1) + "\n")

    def _dump(self) -> None:
        """Write status and thread stacks to the log and `state.json`."""
        log_stacks()
        log.info("status %s", json.dumps(self._status()))
        self._write_state()

    def _identity(self) -> Fields:
        about = {"version": __version__, "uptime_secs": int(self._runner.get_metrics().uptime)}
        return {**about, "pid": os.getpid(), "folder": self._project.folder}

    def _status(self) -> Fields:
        """Return the answer of `status`: identity, the queue's counts, the metrics by name."""
        return {
            **self._identity(),
            **self._supervisor.status(),
            **self._scheduler.status(),
            **self._watches.status(),
            "project": self._project.path,
            "counts": self._store.get_counts(),
            "paused": self._store.get_paused(),
            "draining": self._runner.is_draining,
            **self._runner.get_metrics().to_dict(),
        }


def run_daemon(options: Fields) -> int:
    """Be the daemon: report on standard output, then leave the caller's files alone."""
    foreground = options.pop("foreground")

    def report(event: Fields) -> None:
        if not foreground:
            with contextlib.suppress(OSError):
                os.write(event.get("channel", 1), json.dumps(event).encode() + b"\n")

    try:
        return Daemon(Project(**options), report, foreground).run()
    except DaemonError as error:
        report({"event": "error", "pid": os.getpid(), **error.to_dict()})
        if foreground:
            raise
        return error.exit_status


def spawn(argv: list[str], env: dict[str, str], is_forked: bool) -> Any:
    """Start a daemon in a session of its own, is_forked: by two forks; return its output's pipe."""
    from subprocess import DEVNULL, PIPE, STDOUT, Popen

    how = {"preexec_fn": Platform.detach} if is_forked else Platform.DETACHED
    process = Popen(argv, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT, env=env, **how)
    # A daemon that is our child is meant to outlive us: no ResourceWarning.
    process.returncode = process.wait() if is_forked else 0
    return process.stdout


class DaemonManager(Client):
    """A client that starts, stops and watches the daemon, too."""

    left = ""  # what the last stop or kill found that runs on
    ended = ""  # what the last kill ended

    def _command(self, foreground: bool) -> tuple[list[str], dict[str, str]]:
        """Return (argv, environment) that become the daemon."""
        folder = self.project.folder
        self.project.load_config()
        make_state_folder(folder, self.project.path)
        if self.project.config_path is None:
            write_default_config(folder)
        store_bytecode(folder)
        options = json.dumps({**self.project.to_dict(), "foreground": foreground})
        argv = [sys.executable, "-I", "-S", launcher_path(folder), "_daemon", options]
        env = {k: v for k, v in os.environ.items() if k not in TASK_MARKS}
        env.update(APEX_DAEMON_MODE="1", MALLOC_ARENA_MAX="2")  # else an arena a thread
        return argv, env

    def start_daemon(self, mode: str = "auto") -> tuple[int, bool]:
        """Start it and wait until it answers; return (PID, whether it was there before).

        mode: "fork", "spawn", or "auto": fork where that is safe. Raises what kept it from
        starting: CONFIG_INVALID, DATABASE_..., BUSY, CANNOT_CREATE, START_FAILED.
        """
        for _ in range(3):
            argv, env = self._command(foreground=False)
            try:
                return int(self.call("status", {}, START_TIMEOUT_S)["pid"]), True
            except DaemonError as error:
                if error.code != "NOT_RUNNING":
                    raise
            is_forked = mode == "fork" or (mode == "auto" and Platform.can_fork())
            with Platform.blocked_signals():  # until it has handlers
                pipe = spawn(argv, env, is_forked)
            try:
                return self._await_ready(pipe), False
            except DaemonError as error:
                if error.code != "ALREADY_RUNNING":
                    raise
        raise DaemonError("START_FAILED", "daemons came and went", "see `logs`")

    def _await_ready(self, pipe: Any) -> int:
        """Read what the starting daemon reports. Raises the error it reports, START_FAILED."""
        lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()

        def read() -> None:
            with pipe:
                for line in pipe:
                    lines.put(line)
            lines.put(b"")

        threading.Thread(target=read, name="report", daemon=True).start()
        last, line = "it ended without a word", b"-"
        while line:
            try:
                line = lines.get(timeout=START_TIMEOUT_S)
                event = dict(json.loads(line))
            except queue.Empty:
                last, line = f"it did not answer within {START_TIMEOUT_S:.0f} s", b""
            except (ValueError, TypeError):
                last = line.decode("utf-8", "replace").strip() or last
            else:
                if event["event"] == "ready":
                    return int(event["pid"])
                if event["event"] == "error":  # what follows must not meet it any more
                    self._await_gone(Holder.of_pid(event["pid"], "daemon"), START_TIMEOUT_S)
                    raise DaemonError.from_dict(event)
        raise DaemonError("START_FAILED", last, "see `logs`")

    def run_foreground(self, is_json: bool = False) -> int:
        """Become the daemon (never returns), or be it where there is no exec."""
        argv, env = self._command(foreground=True)
        if Platform.is_posix:
            with Platform.blocked_signals():  # until there are handlers
                os.execve(argv[0], [*argv, *["--json"] * is_json], env)
        return run_daemon({**self.project.to_dict(), "foreground": True})

    def find_holder(self) -> Holder | None:
        """Return the daemon that lives, None when there is none. Raises BUSY."""
        holder = find_daemon(self._pid_file)
        if holder is None:  # ask the socket, too: the lock file may be gone
            with contextlib.suppress(DaemonError):
                pid = (self._ask("ping", {}, ANSWER_TIMEOUT_S) or {}).get("pid")
                return Holder.of_pid(pid, "daemon") if pid else None
        return holder

    def is_daemon_running(self) -> bool:
        """Tell whether a daemon holds the lock."""
        return self.find_holder() is not None

    def stop_daemon(
        self, timeout_s: float | None = None, force: bool = False, keep: bool = False
    ) -> int | None:
        """Ask it to end, wait, then KILL it; return its PID, None when there was none.

        timeout_s None: what the configuration allows all to take, and a margin. force: more
        TERMs follow, and what runs is interrupted. keep: its children are left running.
        Raises STOP_KILLED, STOP_FAILED.
        """
        holder = self.find_holder()
        if holder is None:
            self.left = self._take_stock(self._clear_away)
            return None
        if keep:
            timeout_s = 2 * ANSWER_TIMEOUT_S
        elif timeout_s is None:
            config = Config({})
            with contextlib.suppress(DaemonError):  # a broken one hinders no `stop`
                config = load_config(holder.config or self.project.config_path)
            timeout_s = config.daemon.graceful_timeout + config.daemon.stop_timeout
            timeout_s += config.stop_timeout_s + STOP_MARGIN_S
        deadline = Clock.mono() + timeout_s
        while True:
            if Platform.is_posix and not keep:
                Platform.send(holder.pid, signal.SIGTERM)
            else:
                with contextlib.suppress(DaemonError):
                    self.call("shutdown", {"keep": keep})
            left_s = deadline - Clock.mono()
            if self._await_gone(holder, min(left_s, FIRST_TERM_S) if force else left_s):
                return holder.pid
            if Clock.mono() >= deadline:
                what = f"killed after {span(timeout_s)}; {self._kill(holder) or 'nothing is left'}"
                hint = "`start` goes on with it; see `logs` for why"
                raise DaemonError("STOP_KILLED", what, hint)

    def _await_gone(self, holder: Holder, timeout_s: float) -> bool:
        deadline, pause_s = Clock.mono() + timeout_s, 0.002
        while holder.is_alive():
            if Clock.mono() > deadline:
                return False
            threading.Event().wait(pause_s)
            pause_s = min(pause_s * 1.5, 0.05)
        return True

    def _kill(self, holder: Holder) -> str:
        """SIGKILL a daemon, remove what it leaves, and say what runs on. Raises STOP_FAILED."""
        Platform.send(holder.pid, Platform.kill)
        if not self._await_gone(holder, STOP_MARGIN_S):
            what = f"PID {holder.pid} survived SIGKILL"
            raise DaemonError("STOP_FAILED", what, "it hangs in the kernel; see `ps`")
        self.left = self._take_stock(self._clear_away)
        return self.left

    def _take_stock(self, first: Callable[[], object] = bool) -> str:
        """Say what runs without a daemon, "" when nothing does; `first` is done under the lock."""
        if not os.path.isdir(self.project.file("run")):
            return ""
        try:
            # A killed daemon's other threads can hold the lock for a moment longer.
            if not self._pid_file.acquire("client stop", wait_s=1.0):
                return "another program has the project now"
            first()
            return self._count_left()
        except DaemonError as error:  # a read-only disk
            return f"what runs is not known; {error.message}"
        finally:
            self._pid_file.release()

    def _clear_away(self) -> None:
        """Remove a dead daemon's PID file and socket. The lock is held."""
        folder, file = self.project.folder, self.project.file
        place = os.path.join(folder, str(read_endpoint(folder).get("socket", "control.sock")))
        remove_socket(place, file("endpoint"), self._pid_file.path)

    def _count_left(self) -> str:
        """Say how many tasks and processes run on, "" for none. The lock is held."""
        path = self.project.file("apex.db")
        if not os.path.exists(path):
            return ""
        with contextlib.closing(TaskStore(path, None, self._pid_file, self.project.path)) as store:
            tasks = sum(store.get_counts().get(State.RUNNING, {}).values())
        notes = [note for _, _, note in find_notes(self.project.folder) if note["pid"] > 0]
        processes = sum(Platform.start_time(note["pid"]) == note.get("at") for note in notes)
        kinds = ((tasks, "task", "s"), (processes, "process", "es"))
        found = [f"{n} {one}{ending * (n > 1)}" for n, one, ending in kinds if n]
        return " and ".join(found) + " still running" if found else ""

    def kill_daemon(self, with_children: bool = False) -> int | None:
        """SIGKILL it, its children too if wanted; return its PID, None without one.

        Children run on otherwise. With children also when no daemon is left: they count
        as interrupted and run again at the next start. Raises STOP_FAILED, naming what is left.
        """
        holder = self.find_holder()
        if holder is not None:
            self._kill(holder)
        else:
            self.left = self._take_stock(self._clear_away)
        path = self.project.file("apex.db")
        if with_children and os.path.exists(path):
            with contextlib.closing(TaskStore(path, project=self.project.path)) as store:
                left = end_orphans(store, is_all=True)
            if left:
                hint = "the next daemon adopts it; `kill --all` again, or see `ps`"
                raise DaemonError("STOP_FAILED", f"still running: {', '.join(left)}", hint)
            what, ran, _ = self.left.partition(" still running")
            self.left, self.ended = "", ran and f"{what} ended"
        return holder.pid if holder else None

    def get_status(self) -> DaemonStatus:
        """Return what is known, without starting or changing anything."""
        try:
            try:
                found = self.call("status", {})
                about = {name: found.get(name) for name in ("pid", "started_at", "uptime")}
                return DaemonStatus(running=True, exit_status=0, details=found, **about)
            except DaemonError as error:
                if error.code != "NOT_RUNNING":
                    raise
            pid = self._pid_file.read().get("pid")
            status, reason = (1, f"PID {pid} left its PID file") if pid else (3, "")
            reason = "; ".join(filter(None, ("not running", reason, self._take_stock())))
        except DaemonError as error:
            status, reason = 4, error.message
        return DaemonStatus(running=False, exit_status=status, reason=reason, details={})


# ============================================================================
# 19. SERVICE - what init systems are given: unit, init script, plist, Windows
#     Uses 1-18. Main thread. It makes texts, and starts or changes nothing.
# ============================================================================

# apexd.service has the same lines with the reasons for them, and what hardening costs.
_UNIT = """\
# @PLACE@/@NAME@.service
[Unit]
Description=apexd, the background work of @PROJECT@
StartLimitIntervalSec=0

[Service]
Type=simple
ExecStart=@COMMAND@ start --foreground
ExecReload=/bin/kill -HUP $MAINPID
@USER@# Signal the daemon alone: what it started is there for the next one to adopt.
KillMode=process
OOMPolicy=continue
TimeoutStopSec=@STOP@
Restart=on-failure
RestartSec=2
RestartPreventExitStatus=2 64 65 73 77 78
WatchdogSec=60
UMask=0077

[Install]
WantedBy=@TARGET@.target
"""
_INIT_SCRIPT = """\
#!/bin/sh
### BEGIN INIT INFO
# Provides:          @NAME@
# Required-Start:    $local_fs $remote_fs
# Required-Stop:     $local_fs $remote_fs
# Default-Start:     2 3 4 5
# Default-Stop:      0 1 6
# Short-Description: apexd, the background work of a project
### END INIT INFO
{ [ -x @PYTHON@ ] && [ -r @PROGRAM@ ]; } || exit 5
case ${1-} in
  start | stop | restart | reload | status) verb=$1 ;;
  force-reload) verb=reload ;;
  *) echo "usage: $0 start|stop|restart|reload|force-reload|status" >&2; exit 2 ;;
esac
@COMMAND@ "$verb"
code=$?
[ "$verb" = status ] && exit "$code"
case $code in # what LSB calls it
  69) exit 7 ;;
  73 | 77) exit 4 ;;
  78) exit 6 ;;
  0 | 1 | 2) exit "$code" ;;
  *) exit 1 ;;
esac
"""
_WINDOWS = """\
rem As administrator; `schtasks /Delete /TN @NAME@` undoes it.
schtasks /Create /TN @NAME@ /SC ONSTART /RU SYSTEM /TR "@COMMAND@ start"
"""


def make_service(kind: str, project: Project, user: str) -> str:
    """Return what a service manager needs to run a project's daemon.

    kind: systemd, systemd-user, sysv, launchd or windows; user: as whom.
    """
    import plistlib
    import shlex

    config, target = project.load_config(), "multi-user"
    stop_s = config.daemon.graceful_timeout + config.daemon.stop_timeout + config.stop_timeout_s
    name = "apexd-" + re.sub(r"[^A-Za-z0-9_-]+", "-", os.path.basename(project.path))
    words = [sys.executable, os.path.abspath(__file__), "--project", project.path]
    is_elsewhere = os.path.dirname(project.folder) != project.path
    words += ["--state", project.folder] if is_elsewhere else []
    words += ["--config", project.told["config"]] if project.told["config"] else []
    if not all(map(str.isprintable, words)):
        hint = "give the folder a plain name, or start the daemon by hand"
        raise bad("a path here has characters that no service manager's file can hold", hint)
    place, run_as, stop_s = "/etc/systemd/system", f"User={user}\n", stop_s + 2 * STOP_MARGIN_S
    if kind == "launchd":
        about: Fields = {"Label": name, "ProgramArguments": [*words, "start", "--foreground"]}
        about.update(RunAtLoad=True, KeepAlive={"SuccessfulExit": False}, UserName=user)
        about.update(AbandonProcessGroup=True, ExitTimeOut=int(stop_s))  # its tasks outlive it
        return plistlib.dumps(about, sort_keys=False).decode()
    if kind == "systemd-user":
        place, run_as, target = "~/.config/systemd/user", "", "default"
    if kind == "sysv":
        become = ["su", "-s", "/bin/sh", "-c", 'exec "$0" "$@"', "--", user]
        command = shlex.join(words if user == "root" else [*become, *words])
    elif kind == "windows":
        command = " ".join(f'\\"{word}\\"' for word in words)
    else:  # systemd.syntax(7)
        words = [re.sub(r'(["\\])', r"\\\1", word).replace("$", "$$") for word in words]
        command = " ".join(f'"{word}"' for word in words).replace("%", "%%")
    fields = {"NAME": name, "COMMAND": command, "PROGRAM": shlex.quote(os.path.abspath(__file__))}
    fields.update(PROJECT=re.sub(r"([%\\])", r"\1\1", project.path))
    fields.update(PYTHON=shlex.quote(sys.executable), STOP=f"{stop_s:.0f}", PLACE=place)
    fields.update(USER=run_as, TARGET=target)
    text = {"sysv": _INIT_SCRIPT, "windows": _WINDOWS}.get(kind, _UNIT)
    return re.sub("@([A-Z]+)@", lambda match: fields[match[1]], text)


# ============================================================================
# 20. CLI - registry and handlers
#     Uses 1-19. Main thread. The only section that prints or exits.
# ============================================================================

if TYPE_CHECKING:
    Args = argparse.Namespace
    Argument = tuple[tuple[str, ...], dict[str, Any]]
    Handler = Callable[[Args], int]
REGISTRY: dict[str, tuple[Handler, str, tuple[Argument, ...]]] = {}
ALIASES = {"ls": "list", "rm": "remove", "log": "logs"}


def arg(*names: str, **options: Any) -> Argument:
    """Describe one argument of a command, as ArgumentParser.add_argument takes it."""
    return (names, options)


def register(name: str, *arguments: Argument, text: str = "") -> Callable[[Handler], Handler]:
    """Register a handler: `text` or its docstring is the help, its result the exit status."""

    def keep(handler: Handler) -> Handler:
        REGISTRY[name] = (handler, text or handler.__doc__ or "", arguments)
        return handler

    return keep


def reads(read: Callable[[Any], Any]) -> Callable[[str], Any]:
    """Turn a reader of VALUES into a `type=`: its error is what argparse prints."""

    def convert(text: str) -> Any:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text[:40]!r}: must be {error}") from None

    return convert


FLAG = {"action": "store_true"}
FILE = {"metavar": "FILE", "type": reads(lambda path: line_of_text(os.path.abspath(path)))}
LOG_LEVEL = arg("--log-level", dest="log.level", type=reads(OPTIONS["log"]["level"][0]))
COMMON = (
    arg("--project", metavar="DIR", help="the project (default: the current folder's)"),
    arg("--state", metavar="DIR", help="the state folder (default: PROJECT/.apex)"),
    arg("--config", metavar="FILE", help="the configuration file"),
    arg("--json", "-j", **FLAG, help="print JSON only"),
)
ID = arg("id", type=reads(integer(0)), metavar="ID", help="a task id")
# Ids stay as they are written: a range need never be a list.
READ_IDS = reads(lambda text: task_ids(text) and text)
IDS = arg("ids", nargs="+", type=READ_IDS, metavar="ID", help="task ids: 3 5-9 or 3,5-9")
GROUP = arg("--group", "-g", help="only this group")
PROCESS = arg("name", nargs="?", metavar="PROCESS", help="this process; default: the daemon")
ONE = arg("name", metavar="PROCESS", help="a process")
NAMES = arg("names", nargs="*", metavar="PROCESS", help="default: all")
MODE = arg("--mode", choices=("fork", "spawn", "auto"), default="auto", help="how to detach")
ADD = (
    arg("--group", "-g", help="the group, declared in the configuration"),
    arg("--priority", "-o", metavar="N", help="higher first; default 0"),
    arg("--after", "-a", action="append", metavar="ID[:ok|fail|any]", help="start after these"),
    arg("--delay", "-d", metavar="TIME", help="start no sooner than in 90s, 5m, 2h"),
    arg("--label", "-l", help="a name for people"),
    arg("--dir", "-w", metavar="DIR", help="run there instead of here"),
    arg("--retries", metavar="N", help="retry up to N times after a failure"),
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


def emit(data: object, args: Args, text: str) -> int:
    """Print the result, `data` as JSON with --json, else `text`; return the exit status 0."""
    if args.json or text:
        print(json.dumps(data, indent=1) if args.json else printable(text), flush=True)
    return 0


def notice(text: str) -> None:
    """Tell people something that is no result."""
    print(f"apexd: {printable(text)}", file=sys.stderr, flush=True)


def width() -> int:
    """Return the columns of the terminal; some say 0, which Python 3.9 believes."""
    with contextlib.suppress(ValueError, OSError):
        return int(os.environ.get("COLUMNS") or os.get_terminal_size().columns) or 80
    return 80


def become_owner(args: Args) -> None:
    """As root, become `daemon.user` for good if the state folder is that user's.

    Before anything in there is opened as root: its owner could have put a link to something
    else in a file's place. Raises PERMISSION_DENIED, CONFIG_INVALID.
    """
    folder = find_folders(args.project, args.state)[1]
    owner = os.stat(folder).st_uid if os.path.isdir(folder) else 0
    path = (args.config or find_config(folder)) if owner else None
    options: Fields = {}
    try:
        os.seteuid(owner)
        if path and os.access(path, os.R_OK, effective_ids=True):
            options.update(_load(path)["daemon"])
    except (LookupError, TypeError, ValueError):
        pass  # without daemon.user the folder is refused
    finally:
        os.seteuid(0)
    if not options.get("user"):
        return
    try:
        ids, env = Platform.identity(options["user"], options.get("group"))
        if ids["uid"] != owner:
            return
        Platform.become(ids)
    except OSError as error:
        raise DaemonError("PERMISSION_DENIED", f"daemon.user: {error.strerror}") from None
    except (TypeError, ValueError):  # there is no such user
        return
    os.environ.update(env)
    for path in (sys.executable, os.path.abspath(__file__)):
        if not os.access(path, os.R_OK):
            hint = "give it that right, or take daemon.user from the configuration"
            raise DaemonError("PERMISSION_DENIED", f"{path} cannot be read by {env['USER']}", hint)


def client_of(args: Args) -> DaemonManager:
    """Make the client of the project that the arguments name."""
    if Platform.is_root():
        become_owner(args)
    return DaemonManager(args.project, args.state, args.config, notice)


@register(
    "start", MODE, arg("--foreground", "--no-daemon", **FLAG, help="do not detach"),
    arg("--log-file", dest="log.file", **FILE), arg("--socket", dest="daemon.socket", **FILE),
    arg("--pid-file", dest="daemon.pid_file", **FILE), LOG_LEVEL,
)  # fmt: skip
def cmd_start(args: Args) -> int:
    """Start the daemon; returns when it answers, and prints its PID."""
    manager, given = client_of(args), vars(args)
    manager.project.overrides = {k: v for k, v in given.items() if "." in k and v is not None}
    return manager.run_foreground(args.json) if args.foreground else launch(manager, args)


def launch(manager: DaemonManager, args: Args) -> int:
    """Start a daemon in the background."""
    pid, was_running = manager.start_daemon(args.mode)
    text = f"{'already running' if was_running else 'started'}, PID {pid}"
    if was_running and manager.project.overrides:
        text += "; its options stay as they are: `stop` it first"
    return emit({"pid": pid, "already_running": was_running}, args, text)


@register(
    "stop", arg("--force", **FLAG, help="interrupt running tasks"),
    arg("--timeout", type=reads(duration), metavar="TIME", help="before it is KILLed"),
)  # fmt: skip
def cmd_stop(args: Args) -> int:
    """Let running tasks finish, stop the daemon, wait until it is gone."""
    manager = client_of(args)
    pid = manager.stop_daemon(args.timeout, args.force)
    return emit_end(args, manager, pid, "stopped")


def emit_end(args: Args, manager: DaemonManager, pid: int | None, word: str) -> int:
    """Print what became of the daemon, and what runs on without it."""
    text = [f"{word}, PID {pid}" if pid else "not running", manager.left, manager.ended]
    return emit({"pid": pid, "left": manager.left}, args, "; ".join(filter(None, text)))


UP = "Start processes, and what they need; returns when they are ready, 1 when they failed."
DOWN = "Stop processes; they stay down until `up`, also when the daemon starts again."
SCALE = "Have so many instances of a process, until the configuration says otherwise."
SIGNAL = "Send a signal to the commands of a process, or of one instance: web.0."
COUNT = arg("instances", type=reads(integer(0, 1000)), metavar="N", help="instances")
NO_WAIT = arg("--no-wait", dest="wait", action="store_false", help="do not wait until ready")


@register("signal", ONE, arg("signal", metavar="SIGNAL", help="HUP, USR1, ..."), text=SIGNAL)
@register("scale", ONE, COUNT, text=SCALE)
@register("down", NAMES, text=DOWN)
@register("up", NAMES, NO_WAIT, text=UP)
def cmd_process(args: Args) -> int:
    """Do something to processes that may take its time; without names to all."""
    client, known = client_of(args), ("name", "names", "wait", "instances", "signal")
    found = client.call("list_processes", {})["processes"]  # a daemon that hangs is found out
    if not found:
        hint = "write [process.NAME] into it, see README.md"
        raise DaemonError("PROCESS_NOT_FOUND", "the configuration has no process", hint)
    fields = {name: value for name, value in vars(args).items() if name in known}
    verb = args.verb if args.verb in ("up", "down") else args.verb + "_process"
    try:
        answer = client.call(verb, fields, PROCESS_ANSWER_S)
    except DaemonError as error:
        wanted = {"up": "PROCESS_ALREADY_RUNNING", "down": "PROCESS_NOT_RUNNING"}
        if error.code != wanted.get(verb):
            raise
        answer = {"message": error.message}  # it is as it should be
    return emit(answer, args, answer["message"])


@register("restart", PROCESS, MODE, arg("--drain", **FLAG, help="let tasks finish first"))
def cmd_restart(args: Args) -> int:
    """Replace the daemon, all that runs is adopted; or restart a process."""
    if args.name is not None:
        return cmd_process(args)
    holder = client_of(args).find_holder() or Holder()
    args.config = args.config or holder.config
    manager = client_of(args)
    manager.project.overrides = holder.overrides
    manager.project.load_config()
    try:
        manager.stop_daemon(keep=not args.drain)
    except DaemonError as error:
        if error.code != "STOP_KILLED":
            raise
        notice(error.message)
    return launch(manager, args)


@register("reload", PROCESS)
def cmd_reload(args: Args) -> int:
    """Read the configuration again; or restart a process, instance by instance."""
    if args.name is not None:
        return cmd_process(args)
    plan = client_of(args).call("reload", {})["plan"]
    return emit({"plan": plan}, args, "\n".join(plan) or "nothing changed")


@register("status")
def cmd_status(args: Args) -> int:
    """Say whether the daemon runs: 0 yes, 1 dead with a PID file, 3 no, 4 unknown."""
    status = client_of(args).get_status()
    details, text = status.details, status.reason or ""
    if status.running:
        counts = {state: sum(groups.values()) for state, groups in details["counts"].items()}
        tasks = ", ".join(f"{n} {state}" for state, n in counts.items()) or "none"
        since = span(details["uptime_secs"])
        text = f"running, PID {status.pid}, for {since}, {details['project']}\ntasks: {tasks}"
        if details["process_count"]:
            text += f"\nprocesses: {details['running_instances']} running"
            down = ", ".join(f"{name} ({state})" for name, state in details.get("down", {}).items())
            text += f"; degraded, down: {down}; see `why`" if down else ""
        if details.get("url"):
            text += f"\npage: {details['url']}"
        if details["paused"]:
            text += "\npaused: " + ", ".join(details["paused"]).replace("*", "everything")
        if details["draining"]:
            text += "\nstopping: running tasks are finishing"
    about = {name: field for name, field in status.to_dict().items() if name != "details"}
    emit({**about, **details}, args, text)
    return int(status.exit_status)


@register("health")
def cmd_health(args: Args) -> int:
    """Say how the daemon is: 0 healthy, 1 degraded, 2 unhealthy or not there."""
    try:
        answer = client_of(args).call("health", {})
    except DaemonError as error:
        if error.code not in ("NOT_RUNNING", "NOT_ANSWERING"):
            raise
        found = {"status": "unhealthy", "detail": f"{error.message}; {error.hint}"}
        answer = {"overall": "unhealthy", "checks": {"daemon": found}}
    rows = [(name, one["status"], one["detail"]) for name, one in answer["checks"].items()]
    table = columns("CHECK STATUS DETAIL", rows)
    emit(answer, args, f"{answer['overall']}\n{table}")
    return LEVELS.index(answer["overall"])


@register("metrics")
def cmd_metrics(args: Args) -> int:
    """Print metrics in Prometheus's text format, the most important as comments first."""
    answer = client_of(args).call("metrics", {})
    text, shown = answer.pop("text"), dict(answer, uptime=span(answer["uptime"]))
    for name in ("started_at", "last_poll_at"):
        shown[name] = answer[name] and timestamp(answer[name])
    del shown["active_task_ids"]
    names = {name: name.replace("tasks_", "").replace("_", " ") for name in shown}
    head = "".join(f"# {names[name]}: {x}\n" for name, x in shown.items())
    return emit(answer, args, head + text.rstrip())


@register("ps", NAMES)
def cmd_ps(args: Args) -> int:
    """List the instances of processes."""
    client = client_of(args)
    try:
        known = [process["name"] for process in client.call("list_processes", {})["processes"]]
    except DaemonError as error:
        if error.code == "NOT_RUNNING" and os.path.exists(client.project.file("run")):
            left = [f"{name}.{index}" for name, index, _ in find_notes(client.project.folder)]
            error.message += f"; {', '.join(left)} may still run" if left else ""
        raise
    found, rows = [], list[tuple[object, ...]]()
    for name in args.names or known:
        process = client.call("get_process", {"name": name})["process"]
        for one in process["instance_details"]:
            found.append({"name": name, **one})
            uptime, cpu, memory = one["uptime_secs"], one["cpu_percent"], one["memory_bytes"]
            uptime = uptime if uptime is None else span(uptime)
            cpu = cpu if cpu is None else f"{cpu:.0f}%"
            memory = memory if memory is None else f"{memory / 1e6:.0f}MB"
            cells = (one["state"], one["pid"], uptime, cpu, memory, one["restart_count"])
            rows.append((f"{name}.{one['index']}", *cells, one.get("command")))
    return emit(found, args, columns("INSTANCE STATE PID UPTIME CPU MEMORY RESTARTS COMMAND", rows))


@register("kill", arg("--all", **FLAG, help="its tasks and processes too"))
def cmd_kill(args: Args) -> int:
    """SIGKILL the daemon; what it started runs on, unless --all."""
    manager = client_of(args)
    return emit_end(args, manager, manager.kill_daemon(args.all), "killed")


def read_command(args: Args) -> Any:
    """Return the command of `add` and `run`."""
    words: list[str] = args.command[1:] if args.command[:1] == ["--"] else args.command
    if (args.shell is None) == (not words):
        what = "both --shell and a command" if words else "no command"
        raise bad(what, "write: add [options] command args...")
    if args.shell is not None:
        return args.shell
    if len(words) == 1 and re.search(r"\s|&&|\|", words[0]) and not os.path.exists(words[0]):
        raise bad(f"{words[0]!r} is one word", f"use --shell '{words[0]}'")
    return words


def read_batch() -> list[Any]:
    """Read one command a line from standard input: all JSON if the first is, else for sh."""
    lines = [os.fsdecode(raw).strip() for raw in sys.stdin.buffer.read().split(b"\n")]
    if next(filter(None, lines), "")[:1] not in ("{", "[", '"'):
        return [line or None for line in lines]
    commands = []
    for number, line in enumerate(lines, 1):
        try:
            commands.append(json.loads(line or "null"))
        except (ValueError, RecursionError) as error:
            raise bad(f"line {number} is no JSON: {error}", "nothing was added") from None
    return commands


RUN = "Run a task now and show its output; exits with its status. Ctrl-C cancels it."


@register("run", *ADD, text=RUN)
@register(
    "add", *ADD[:-1],
    arg("--print-id", "-p", **FLAG, help="print the id alone"),
    arg("--batch", **FLAG, help="read commands from standard input, one a line"),
    arg("--wait", **FLAG, help="show its output, exit with its status"), ADD[-1],
)  # fmt: skip
def cmd_add(args: Args) -> int:
    """Put a task into the queue and print its id; it is on disk then."""
    is_batch = args.verb == "add" and args.batch
    if is_batch and (args.command or args.shell):
        raise bad("both --batch and a command", "give one of them")
    commands = read_batch() if is_batch else [read_command(args)]
    client, is_shown = client_of(args), args.verb == "run" or args.wait
    if is_shown:
        client.call("ping", {})
    options = {name: getattr(args, name) for name in TASK_READERS}
    ids = client.add_all(commands, args.token, args.dir, args.env, **options)
    if is_shown:
        return show_output(client, ids, args)
    text, known = "\n".join(map(str, ids)), client.existing
    if sys.stdout.isatty() and not args.print_id:
        limit = client.find_settings()["timeout"]
        default = f", timeout {span(limit)}" if limit and args.timeout is None else ""
        text = f"{len(ids)} tasks added" if is_batch else f"task {text} added{default}"
        if known and not is_batch:
            text = f"task {ids[0]} has the key {args.key!r} already; nothing was added"
        elif known:
            text = f"{len(ids)} tasks, {len(known)} of them had their keys already"
        text += "" if client.is_live else "; no daemon runs: `start` it"
    if is_batch:
        return emit({"ids": ids, "existing": known}, args, text)
    return emit({"id": ids[0], "ids": ids, "existing": bool(known)}, args, text)


def show_output(client: Client, ids: Sequence[int], args: Args) -> int:
    """Copy the output of tasks to ours until they are done; return their status."""
    try:
        for data in (data for task_id in ids for data in client.follow(task_id, attempt=1)):
            if not args.json:
                sys.stdout.buffer.write(data)
                sys.stdout.buffer.flush()
        return tell_end(client, ids, client.wait(ids), args)
    except KeyboardInterrupt:
        if args.verb == "run":
            client.close()  # a request was cut in the middle
            client.cancel(*ids)
            notice(f"task {ids[0]} cancelled")
        else:
            notice(f"task {ids[0]} goes on; see `wait {ids[0]}`")
        raise


def tell_end(client: Client, ids: Sequence[int | str], status: int, args: Args) -> int:
    """Say how tasks ended that did not end by themselves; return `status`."""
    tasks = client.list(ids=ids) if args.json or status else []
    for task in () if args.json else tasks:
        if State(task["state"]) in DONE and task["outcome"] not in ("ok", "failed"):
            is_cancelled = task["state"] == State.CANCELLED  # perhaps after a deferral
            how = not is_cancelled and (task["reason"] or task["outcome"])
            notice(f"task {task['id']}: {how or task['state']}")
    emit(tasks, args, "")
    return status


@register(
    "list", GROUP,
    arg("--state", dest="in_state", choices=[state.value for state in State]),
    arg("-n", "--lines", type=reads(integer(1)), help="the newest N (default: 100; --json: all)"),
)  # fmt: skip
def cmd_list(args: Args) -> int:
    """List tasks, the newest last."""
    limit = args.lines or (None if args.json else 100)
    tasks = client_of(args).list(limit, state=args.in_state, group=args.group)
    rows: list[tuple[object, ...]] = []
    for task in tasks:
        state, took, words = task["state"], None, task["command"]
        if task["started_at"] and state not in ("queued", "scheduled", "waiting"):
            took = span((task["finished_at"] or Clock.now()) - task["started_at"])
        if state == "running" and task["progress"] is not None:
            state = f"running {task['progress']:.0f}%"
        text = task["label"] or (words if isinstance(words, str) else " ".join(words))
        counts = (task["priority"], task["attempts"], task["exit_code"])
        rows.append((task["id"], state, task["group"], *counts, took, text))
    emit(tasks, args, columns("ID STATE GROUP PRIO TRIES EXIT TIME COMMAND", rows))
    if limit is not None and len(tasks) == limit and not args.json and args.lines is None:
        notice(f"these are the newest {limit}; more with -n N")
    return 0


def columns(head: str, rows: Sequence[Sequence[object]]) -> str:
    """Lay rows out below a head, None as "-", cut at the terminal's width."""
    cells = [["-" if cell is None else str(cell) for cell in row] for row in [head.split(), *rows]]
    widths = [max(map(len, column)) for column in [*zip(*cells)][:-1]]
    most = width() if sys.stdout.isatty() else 10000
    lines = ("  ".join([*map(str.ljust, row, widths), row[-1]]) for row in cells)
    return "\n".join(printable(line.replace("\n", " "))[:most].rstrip() for line in lines)


@register("show", ID)
def cmd_show(args: Args) -> int:
    """Show one task and the history of its attempts."""
    answer = client_of(args).get(args.id)
    task, lines = answer["task"], []
    hidden = ("suspect", "boot_id", "request_id", "start_time", "keeper")
    for name, field in task.items():
        if field not in (None, []) and name not in hidden:
            text = timestamp(field) if name.endswith("_at") else field
            lines.append(f"{name:12} {text if isinstance(text, str) else json.dumps(text)}")
    for attempt in answer["history"]:
        how = attempt["outcome"] or "running"
        code = "" if attempt["exit_code"] is None else f", exit {attempt['exit_code']}"
        text = f"attempt {attempt['number']:<4} {how}{code} {attempt['reason'] or ''}"
        lines.append(text.rstrip())
    return emit({**task, "history": answer["history"]}, args, "\n".join(lines))


@register("wait", IDS, arg("--timeout", type=reads(duration), metavar="TIME", help="then exit 124"))
def cmd_wait(args: Args) -> int:
    """Wait for tasks; exits with the first status that is not 0, in the order given."""
    client, ids = client_of(args), args.ids
    is_drawn = sys.stderr.isatty() and not args.json

    def draw(answer: Fields) -> None:
        filled = int(answer["progress"] / 100 * 30)
        running = ", ".join(map(str, answer["running"]))
        text = f"[{'#' * filled:.<30}] {answer['total'] - answer['pending']}/{answer['total']}"
        text = f"{text}  running: {running}" if running else text
        most = width() - 1
        print("\r" + text[:most].ljust(most), end="", file=sys.stderr, flush=True)

    try:
        status = client.wait(ids, args.timeout, draw if is_drawn else lambda answer: None)
    finally:
        if is_drawn:
            print(file=sys.stderr)
    return tell_end(client, ids, status, args)


RETRY = "Run finished tasks again; what was skipped because of them waits again."
CHANGES = {  # what it did, what forbade it
    "cancel": ("cancelled", "finished already"),
    "retry": ("queued", "not finished, or another task has the key"),
    "remove": ("removed", "running, cancel first"),
}


@register("remove", IDS, text="Forget tasks that do not run.")
@register("retry", IDS, text=RETRY)
@register("cancel", IDS, text="Cancel tasks; running ones are ended with all they started.")
def cmd_change(args: Args) -> int:
    """Do one verb to tasks; 1 when the state of any forbade it."""
    verb = ALIASES.get(args.verb, args.verb)
    answer, (done, problem) = client_of(args).change(verb, args.ids), CHANGES[verb]
    ending = answer.get("ending", ())
    over = ", ".join(str(x) for x in answer["done"] if x not in ending)
    texts = [f"{done}: {over or 'none'}"] if over or not ending else []
    texts += [f"ending: {', '.join(map(str, ending))}"] if ending else []
    emit(answer, args, "; ".join(texts))
    left = answer.get("left")
    problems = ((problem, answer["not_done"]), ("still running, no daemon", left))
    found = [f"{what}: {', '.join(map(str, ids))}" for what, ids in problems if ids]
    if found:
        raise DaemonError("ILLEGAL_STATE", "; ".join(found))
    return 0


@register("resume", GROUP, text="Start tasks again.")
@register("pause", GROUP, text="Start nothing more; what runs goes on.")
def cmd_pause(args: Args) -> int:
    """Pause or resume; say what is paused then."""
    answer = client_of(args).call(args.verb, {"group": args.group})
    paused = ", ".join(answer["paused"]).replace("*", "everything")
    still = "still " if args.verb == "resume" else ""
    return emit(answer, args, f"{still}paused: {paused}" if paused else "resumed")


@register("why", arg("id", metavar="ID|PROCESS", help="a task id, or a process"))
def cmd_why(args: Args) -> int:
    """Say what a task or a process waits for, or how it ended."""
    client = client_of(args)
    if not args.id.isdigit():
        answer = client.call("why_process", {"name": args.id})
        return emit(answer, args, "\n".join(answer["reasons"]))
    answer = client.why(reads(integer(0))(args.id))
    text = f"task {answer['id']} {answer['state']}: " + "; ".join(answer["reasons"])
    return emit(answer, args, text)


@register(
    "logs",
    arg("task", nargs="?", metavar="TASK|PROCESS", help="12, 12.2 (an attempt), web or web.0"),
    arg("-n", "--lines", type=reads(integer(1)), help="the last N lines"),
    arg("-f", "--follow", **FLAG, help="go on as it grows"),
    arg("--raw", **FLAG, help="do not escape control characters on a terminal"),
)
def cmd_logs(args: Args) -> int:
    """Show the output of a task or a process; without a name the daemon's log."""
    import codecs

    client, lines = client_of(args), args.lines or 50
    match = re.fullmatch(r"([0-9]{1,18})(?:\.([0-9]{1,9}))?", args.task or "")
    if args.task is None:
        place = client.project.file("daemon.log", client.find_settings().get("log_file"))
        chunks = follow_file(place, lines, args.follow)
    elif match:
        attempt = int(match[2]) if match[2] else None
        chunks = client.follow(int(match[1]), attempt, -(args.lines or 0), args.follow)
    elif args.task[:1].isalpha():
        chunks = follow_process(client, args.task, lines, args.follow)
    else:
        raise bad(f"{args.task!r}: must be a task id, ID.ATTEMPT or a process", "see `list`")
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a chunk may end in a character
    for data in filter(None, chunks):
        text = decoder.decode(data)
        if args.json:
            print(json.dumps({"data": text}), flush=True)
        elif sys.stdout.isatty() and not args.raw:
            print(printable(text), end="", flush=True)
        else:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
    return 0


def follow_process(client: Client, name: str, lines: int, to_end: bool) -> Iterator[bytes]:
    """Yield the last lines of a process, then, with to_end, what comes, through restarts.

    Lines of several instances begin with "web.0 | ".
    """
    instances = set[str]()

    def read(offsets: dict[str, int], lines: int) -> dict[str, tuple[bytes, int]]:
        fields = {"name": name, "lines": lines, "offsets": offsets}
        logs = client.call("process_logs", fields)["logs"]
        instances.update(logs)
        return {one: (binascii.a2b_base64(log["data"]), log["next"]) for one, log in logs.items()}

    for found in follow_lines(read, lines, to_end):
        mark = "{} | " if len(instances) > 1 else ""
        if found:
            yield b"".join(mark.format(one).encode() + line + b"\n" for one, line in found)
        elif to_end:
            client.outwait()
            threading.Event().wait(STREAM_PAUSE_S)


@register(
    "report",
    arg("--task", type=reads(integer(0)), metavar="ID", help="default: the task this runs in"),
    arg("--tokens", help="used since the last report"),
    arg("--cost", help="spent since the last report"),
    arg("--progress", help="percent"),
    arg("--note", help="one line"),
)
def cmd_report(args: Args) -> int:
    """Report usage and progress of the task this runs in."""
    inside = os.environ.get("APEX_TASK_ID", "")
    usage = {n: getattr(args, n) for n in ("tokens", "cost", "progress", "note")}
    if set(usage.values()) == {None}:
        raise bad("nothing to report", "give --tokens, --cost, --progress or --note")
    if args.task is None:
        if not inside.isdigit():
            raise bad("this runs in no task", "name one with --task")
        args.task, usage["run_id"] = int(inside), os.environ.get("APEX_RUN_ID")
    answer = client_of(args).report(args.task, **usage)
    text = "over budget: the task is being ended" if answer["over_budget"] else "ok"
    return emit(answer, args, text)


@register(
    "dlq",
    arg("action", nargs="?", default="list", choices=("list", "show", "retry", "drop")),
    arg("ids", nargs="*", type=READ_IDS, metavar="ID", help="default: all failed ones"),
)
def cmd_dlq(args: Args) -> int:
    """Look at the dead letters, the failed tasks; run them again or drop them."""
    if args.action == "list" and not args.ids:
        args.in_state, args.group, args.lines = "failed", "*", None
        return cmd_list(args)
    failed = {task["id"] for task in client_of(args).list(state="failed", group="*")}
    args.ids = args.ids or sorted(failed)
    for task_id in (task_id for ids in task_ids(args.ids) for task_id in ids):
        if args.action in ("list", "show"):
            args.id = task_id
            cmd_show(args)
        elif task_id not in failed:
            what = f"task {task_id} is no dead letter"
            raise DaemonError("ILLEGAL_STATE", what, "see `dlq list`")
    if args.action in ("list", "show"):
        return 0
    args.verb = "retry" if args.action == "retry" else "remove"
    return cmd_change(args)


@register(
    "events",
    arg("action", nargs="?", choices=("emit",), help="publish one instead: custom.NAME"),
    arg("name", nargs="?", metavar="NAME"),
    arg("-n", "--lines", type=reads(integer(1, LINES_MAX)), default=50, help="the last N"),
    arg("-f", "--follow", **FLAG, help="go on as they come"),
    arg("--type", default="*", metavar="PATTERN", help="only these, such as 'task.*'"),
    arg("--since", type=reads(duration), default=1e10, metavar="TIME", help="of the last 10m, say"),
    arg("--json", "-j", nargs="?", const=True, default=argparse.SUPPRESS, metavar="OBJECT",
        help="print JSON only; of emit: what the event says"),
)  # fmt: skip
def cmd_events(args: Args) -> int:
    """Show what happened, or publish an event of one's own."""
    client, given = client_of(args), args.json if isinstance(args.json, str) else None
    if args.action == "emit":
        if args.name is None:
            raise bad("which event?", "write: events emit NAME")
        try:
            payload = mapping(json.loads(given or "{}", parse_constant=int))
        except (ValueError, RecursionError):
            raise bad(f"--json {str(given)[:40]!r}: must be a JSON object") from None
        event_id = client.emit(args.name, payload)
        return emit({"id": event_id}, args, event_id)
    if given is not None:
        raise bad(f"--json {given[:40]!r}: takes an object with `events emit NAME` alone")
    since, folder = Clock.now() - args.since, client.project.folder
    for events in read_events(folder, args.lines, args.follow, args.type, since):
        for event in events:
            rest = json.dumps(event["payload"], ensure_ascii=False)
            line = f"{timestamp(event['time'])}  {event['type']:16}  {event['source']:14}  {rest}"
            print(json.dumps(event) if args.json else printable(line), flush=True)
    return 0


@register(
    "cron",
    arg("action", nargs="?", default="list", choices=("list", "next", "run")),
    arg("what", nargs="*", metavar="NAME", help="a schedule; for next also an expression"),
    arg("--lines", "-n", type=reads(integer(1, 100)), default=5, metavar="N", help="fires shown"),
    arg("--timezone", metavar="ZONE", help="of an expression; default: local time"),
)
def cmd_cron(args: Args) -> int:
    """Show the schedules and when they fire, or add the task of one now."""
    client, name = client_of(args), " ".join(args.what)
    if args.action != "list" and not name:
        raise bad("which schedule?", f"write: cron {args.action} NAME")
    if args.action == "run":
        answer = client.call("run_schedule", {"name": name})
        return emit(answer, args, f"task {answer['id']}")
    if args.action == "next" and (" " in name or name.startswith("@")):
        try:
            fires = CronSchedule(name, args.timezone).list_next(args.lines)
        except DaemonError as error:
            raise bad(error.message, error.hint) from None
        return emit(fires, args, "\n".join(in_words(fires)))
    found = client.call("schedules", {"limit": args.lines})["schedules"]
    if name:
        found = [one for one in found if one["name"] == name]
        if not found:
            raise bad(f"there is no schedule {name!r}", "see `cron list`; quote an expression")
    shown = [in_words(one["next"], one["enabled"]) for one in found]
    if args.action == "next":
        return emit(found[0]["next"], args, "\n".join(shown[0]))
    keys = ("name", "cron", "timezone", "last", "result", "task_id")
    rows = [[*(one[key] for key in keys), words[0]] for one, words in zip(found, shown)]
    return emit(found, args, columns("NAME CRON ZONE LAST RESULT TASK NEXT", rows))


def in_words(fires: Sequence[str], is_enabled: bool = True) -> list[str]:
    """Write a schedule's next fires for people: ["Sun 2025-03-09T03:00:00-04:00, in 3h 20m"]."""
    found = []
    for at in map(datetime.datetime.fromisoformat, fires):
        found.append(f"{at:%a} {at.isoformat()}, in {span(at.timestamp() - Clock.now())}")
    return found or ["at the next start" if is_enabled else "not enabled"]


@register("config")
def cmd_config(args: Args) -> int:
    """Check the configuration and print the effective values, of a broken one the good part."""
    project, faults = client_of(args).project, list[DaemonError]()
    path = project.config_path
    values = load_config(path, faults).to_dict()
    lines = [f"{key} = {json.dumps(setting)}" for key, setting in values.items()]
    data: dict[str, Any] = {"path": path, "faults": [fault.message for fault in faults]}
    for key, setting in values.items():
        *sections, name = key.split(".")
        functools.reduce(lambda at, part: at.setdefault(part, {}), sections, data)[name] = setting
    emit(data, args, "\n".join([f"# {path or 'no file: defaults'}", *lines]))
    for fault in [] if args.json else faults[1:]:
        notice(fault.message)
    if faults:
        raise faults[0]
    project.load_config()  # it has more to check
    return 0


def find_faults(manager: DaemonManager) -> Iterator[tuple[str, bool, str]]:
    """Yield (what was looked at, whether it is good, what was seen)."""
    project = manager.project
    yield "python", sys.version_info >= (3, 9), sys.version.split()[0]
    yield "sqlite", sqlite3.sqlite_version_info >= (3, 31), sqlite3.sqlite_version
    free = shutil.disk_usage(project.path).free
    yield "disk", free > DISK_LOW_BYTES, f"{free >> 20} MiB free"
    kind = Platform.network_file_system(project.folder)
    yield "file system", kind is None, f"{kind}: use --state DIR" if kind else "local"
    places = [os.path.abspath(__file__), project.folder, *map(project.file, CONFIG_NAMES)]
    places.append(project.named_config or project.folder)
    for place in filter(os.path.exists, dict.fromkeys(places)):
        who = Platform.distrust(os.stat(place))
        yield place, who is None, f"can be written by {who or 'its owner only'}"
    checks: dict[str, Callable[[], str]] = {
        "configuration": lambda: (project.load_config(), project.config_path or "none")[1],
        "queue": lambda: (manager.call("list", {"limit": 1}), "can be read")[1],
    }
    for name, look in checks.items():
        try:
            yield name, True, look()
        except DaemonError as error:
            yield name, False, f"{error.message}; {error.hint}"
    status = manager.get_status()
    text = f"running, PID {status.pid}" if status.running else status.reason or ""
    yield "daemon", status.exit_status in (0, 3), text


@register("init")
def cmd_init(args: Args) -> int:
    """Make the state folder, and a configuration with every option as a comment."""
    project = client_of(args).project
    make_state_folder(project.folder, project.path)
    found = project.config_path
    path = found or write_default_config(project.folder)
    return emit({"path": path}, args, f"{path} is there already" if found else f"made {path}")


@register("service", arg("kind", choices=("systemd", "systemd-user", "sysv", "launchd", "windows")))
def cmd_service(args: Args) -> int:
    """Print what makes this project's daemon a service here, run by you."""
    project = client_of(args).project
    text = make_service(args.kind, project, Platform.name_of(Platform.user()).lstrip("#"))
    return emit({"text": text}, args, text[:-1])


@register("doctor")
def cmd_doctor(args: Args) -> int:
    """Look for what could go wrong here; 1 when something is."""
    data, lines = [], []
    for name, is_good, text in find_faults(client_of(args)):
        data.append({"check": name, "ok": is_good, "text": text})
        lines.append(f"{'ok ' if is_good else 'BAD'} {name}: {text}")
    emit(data, args, "\n".join(lines))
    return int(not all(one["ok"] for one in data))


@register("version")
def cmd_version(args: Args) -> int:
    """Print the version."""
    return emit({"version": __version__}, args, __version__)


class _Parser(argparse.ArgumentParser):
    """Turns a usage error into a DaemonError: one line what, one what to do."""

    def error(self, message: str) -> NoReturn:
        raise bad(message, f"see `{self.prog} --help`")


def build_parser(only: str | None = None) -> argparse.ArgumentParser:
    """Make the parser of all commands, or of one: a tenth of the time."""
    # With a width a formatter asks nobody for it: shutil would cost as much as json.
    made_by = functools.partial(argparse.HelpFormatter, width=width() - 2)
    text = "A project's work in the background, not lost."
    parser = _Parser(prog="apexd.py", description=text, formatter_class=made_by)
    parser.add_argument("--version", action="version", version=__version__)
    for names, options in COMMON:
        parser.add_argument(*names, **options)
    commands = parser.add_subparsers(prog="apexd.py", dest="verb", metavar="COMMAND")
    for name, (handler, text, arguments) in REGISTRY.items():
        if only in (None, name):
            aliases = [alias for alias, full in ALIASES.items() if full == name]
            sub = commands.add_parser(
                name, help=text, description=text, aliases=aliases, formatter_class=made_by
            )
            taken = {option for names, _ in arguments for option in names}
            for names, options in COMMON:
                if taken.isdisjoint(names):
                    sub.add_argument(*names, **{**options, "default": argparse.SUPPRESS})
            for names, options in arguments:
                sub.add_argument(*names, **options)
            sub.set_defaults(handler=handler)
    return parser


def parse(words: list[str]) -> Args:
    """Read the command line; without a command it is `status`. Raises BAD_REQUEST."""
    at = 0
    while at < len(words) and words[at].startswith("-"):
        at += 2 if words[at] in ("--project", "--state", "--config") else 1
    name = words[at] if at < len(words) else None
    if name == "help":
        return parse([*words[:at], *words[at + 1 :], "--help"])
    if name is None and not {"-h", "--help", "--version"}.intersection(words):
        words, name = [*words, "status"], "status"
    if name is not None and name not in REGISTRY and name not in ALIASES:
        known = [*REGISTRY, *ALIASES]
        near = [one for one in known if one.startswith(name)]
        near = near or difflib.get_close_matches(name, known, 1, 0.7)
        hint = f"did you mean `{near[0]}`?" if near else "see `apexd.py --help`"
        raise DaemonError("UNKNOWN_COMMAND", f"there is no command {name!r}", hint)
    args, rest = build_parser(ALIASES.get(name or "", name)).parse_known_args(words)
    if rest and args.verb in ("stop", "kill") and rest[0].isdigit():
        hint = f"did you mean `cancel {' '.join(rest)}`?"
        raise bad(f"{args.verb} acts on the daemon, not on tasks", hint)
    if rest:
        raise bad(f"unknown arguments: {' '.join(rest)}", f"see `apexd.py {args.verb} --help`")
    return args


def explain(error: Exception) -> DaemonError:
    """Make the error of what no section foresaw: there is no room for the output, or a bug."""
    try:
        print(end="\n" * isinstance(error, OSError), flush=True)
    except OSError as reason:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        what = f"cannot write to standard output: {reason.strerror}"
        return DaemonError("CANNOT_CREATE", what, "is the disk full?")
    if os.environ.get("APEX_DAEMON_DEBUG"):
        raise error
    hint = "APEX_DAEMON_DEBUG=1 shows where"
    return DaemonError("INTERNAL", f"a bug: {type(error).__name__}: {error}", hint)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status. The only place that reports errors."""
    words = list(sys.argv[1:] if argv is None else argv)
    null = 0
    while null <= 2:  # no file of ours may become standard input, output or error
        null = os.open(os.devnull, os.O_RDWR)
    os.close(null)
    sys.stdout, sys.stderr = (one or open(os.devnull, "w") for one in (sys.stdout, sys.stderr))
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # replaced by an embedding program
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]

    own = words[: words.index("--")] if "--" in words else words  # as far as is known yet
    is_json = "--json" in own or "-j" in own
    try:
        if words[:1] == ["_keeper"]:
            return run_keeper(*words[1:])
        if words[:1] == ["_deliver"]:  # the task of a hook with a URL
            return deliver()
        if words[:1] == ["_daemon"]:  # what `start` makes
            return run_daemon(json.loads(words[1]))
        args = parse(words)
        is_json = args.json
        status = int(args.handler(args))
        print(end="", flush=True)
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for the interpreter's flush at exit
        return 141
    except Exception as found:
        error = found if isinstance(found, DaemonError) else explain(found)
        if is_json:
            print(json.dumps({"error": error.to_dict()}), file=sys.stderr)
        else:
            notice(error.message + (f"\n       {error.hint}" if error.hint else ""))
        return error.exit_status


if __name__ == "__main__":
    gc.enable()
    os._exit(main())  # to tidy up would take a sixth of a short command's time
