"""Tests of apexd.py, with real files, processes, sockets and signals; nothing is mocked.

    python3 test_apexd.py                 # several at once; brings pytest along if need be
    python3 -m pytest -q test_apexd.py    # one after the other
    APEXD_SLOW=1 python3 test_apexd.py    # races many times over, and the slow tests

One class a section of apexd.py, in the same order and under the same banners. Each test
that needs a project gets a `Box`: a folder of its own in the system's temporary folder,
with a copy of apexd.py alone, a HOME of its own and a clean environment. When a test has
failed, its folder is kept and its daemon's log is printed.
"""

from __future__ import annotations

import ast
import base64
import concurrent.futures
import contextlib
import datetime
import errno
import functools
import glob
import hashlib
import importlib.util
import json
import marshal
import os
import random
import re
import select
import shutil
import signal
import socket
import sqlite3
import stat
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import tracemalloc
import urllib.error
import urllib.request
import zoneinfo
from collections import Counter, deque
from queue import SimpleQueue

HERE = os.path.dirname(os.path.abspath(__file__))


def run_with_own_pytest():
    """Run this file with a pytest in a private virtual environment; return its status."""
    import venv

    folder = os.path.join(HERE, ".venv-test")
    if not os.access(folder if os.path.exists(folder) else HERE, os.W_OK):
        folder = os.path.join(tempfile.gettempdir(), f"apexd-venv-test-{os.getuid()}")
    scripts = "Scripts" if sys.platform == "win32" else "bin"
    python = os.path.join(folder, scripts, "python")
    has_pytest = [python, "-c", "import pytest"]
    try:
        is_ready = subprocess.call(has_pytest, stderr=subprocess.DEVNULL) == 0
    except OSError:
        is_ready = False
    if not is_ready:
        print(f"pytest is not installed: making {folder} with it", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True)
        quiet = [python, "-m", "pip", "--disable-pip-version-check", "install", "-q", "pytest"]
        status = subprocess.call(quiet)
        if status:
            print("that failed: install pytest by hand, or go online once", file=sys.stderr)
            return status
    return subprocess.call([python, os.path.abspath(__file__), *sys.argv[1:]])


try:
    import pytest
except ImportError:
    if __name__ != "__main__":
        raise
    sys.exit(run_with_own_pytest())

sys.path.insert(0, HERE)
sys.dont_write_bytecode = True
import apexd  # noqa: E402

PROGRAM = os.path.join(HERE, "apexd.py")
SLOW = os.environ.get("APEXD_SLOW") not in (None, "", "0")
ROUNDS = 20 if SLOW else 3  # of each race test
IS_WINDOWS = sys.platform == "win32"
IS_LINUX = sys.platform.startswith("linux")
IS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0

slow = pytest.mark.skipif(not SLOW, reason="slow: set APEXD_SLOW=1")
posix = pytest.mark.skipif(IS_WINDOWS, reason="of POSIX systems")
linux = pytest.mark.skipif(not IS_LINUX, reason="needs Linux")
root = pytest.mark.skipif(not IS_ROOT, reason="needs root")


def alone(test):
    """Mark a test that measures, or changes what others rely on: nothing runs beside it."""
    test.is_alone = True
    return test


# What a project of the tests is set to, so that nobody waits.
FAST = {
    "daemon": {
        "poll_interval": 0.2,
        "graceful_timeout": 5,
        "stop_timeout": 2,
        "heartbeat_interval": 1,
    }
}


# Runs apexd.py as `python3 apexd.py` does, but from bytecode that all tests share, and without
# site-packages: in a third of the time. argv: the bytecode's folder, its source, the program.
QUICK = (
    "import sys;from importlib.machinery import SourceFileLoader as L;"
    "sys.pycache_prefix,source,__file__=sys.argv[1:4];del sys.argv[1:4];"
    "code=L('apexd',source).get_code('apexd');sys.pycache_prefix=None;exec(code)"
)
BYTECODE = tempfile.TemporaryDirectory(prefix="ax-bytecode-")


def bytecode_of(program, prefix):
    """Return where Python keeps a program's bytecode when its caches are under `prefix`."""
    kept, sys.pycache_prefix = sys.pycache_prefix, prefix
    try:
        return importlib.util.cache_from_source(program)
    finally:
        sys.pycache_prefix = kept


def eventually(fn, within_s=20.0, why=""):
    """Return the first true value of `fn()`; fail with the last one after `within_s`.

    An error of `fn` about what is not there yet counts as not yet. The only place that sleeps.
    """
    deadline = time.monotonic() + within_s
    pause = 0.01
    while True:
        try:
            value = fn()
        except (AssertionError, OSError, LookupError, TypeError, ValueError) as error:
            value, seen = None, f"{type(error).__name__}: {error}"
        else:
            seen = repr(value)
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within_s} s: {why or 'true'}; last: {seen}")
        time.sleep(pause)
        pause = min(pause * 2, 0.25)


def lives(pid):
    """Tell whether a process runs; a zombie does not."""
    if IS_LINUX:
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
        except OSError:
            return False
    if IS_WINDOWS:
        return apexd.Platform.start_time(pid) is not None
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def kill(pid):
    """SIGKILL a process, if it is there."""
    with contextlib.suppress(OSError):
        os.kill(pid, getattr(signal, "SIGKILL", signal.SIGTERM))


def sha256(path):
    """Return the digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def read(path):
    """Return a file's text, "" when it is not there."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except FileNotFoundError:
        return ""


def write(path, data):
    """Write text or bytes to a file, making its folder, for its owner alone."""
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    with open(path, "wb") as file:
        file.write(data if isinstance(data, bytes) else data.encode("utf-8", "surrogateescape"))
    os.chmod(path, 0o600)
    return path


class Box:
    """One project: `path` holds apexd.py alone, `home` is its HOME, `state` its .apex."""

    is_quick = True  # whether `run` is; not where the command line is what is tested

    def __init__(self):
        temporary = "/tmp" if os.path.isdir("/tmp") else None  # AF_UNIX paths must be short
        self.root = os.path.realpath(tempfile.mkdtemp(prefix="ax-", dir=temporary))
        self.path = os.path.join(self.root, "p")
        self.home = os.path.join(self.root, "h")
        self.state = os.path.join(self.path, ".apex")
        os.mkdir(self.path)
        os.mkdir(self.home)
        shutil.copy2(PROGRAM, self.path)
        self.env = {"PATH": os.environ.get("PATH", os.defpath), "HOME": self.home}
        self.env["LANG"] = "C.UTF-8"
        for name in ("SYSTEMROOT", "TEMP", "TMP", "COMSPEC", "PATHEXT", "WINEPREFIX"):
            if IS_WINDOWS and name in os.environ:
                self.env[name] = os.environ[name]
        self.children = []
        self.config({})

    def file(self, *names):
        """Return a path within the state folder."""
        return os.path.join(self.state, *names)

    def config(self, data, **sections):
        """Write .apex/config.json: FAST with `data` over it; None removes the file."""
        path = self.file("config.json")
        if data is None:
            os.unlink(path)
            return None
        merged = json.loads(json.dumps(FAST))
        for section, options in {**data, **sections}.items():
            merged[section] = {**merged.get(section, {}), **options}
        return write(path, json.dumps(merged))

    def command(self, *args):
        """Return the words that run apexd.py with these arguments."""
        program = [sys.executable, os.path.join(self.path, "apexd.py")]
        return program + [a if isinstance(a, bytes) else str(a) for a in args]

    def quick_command(self, *args):
        """Return the words that do the same sooner, for what is not the test's own matter."""
        _, program, *words = self.command(*args)
        return [sys.executable, "-S", "-c", QUICK, BYTECODE.name, PROGRAM, program, *words]

    def popen(self, *args, env=None, cwd=None, quick=False, **options):
        """Start apexd.py without waiting for it; teardown kills it if it still runs."""
        options.setdefault("stdin", subprocess.DEVNULL)
        options.setdefault("stdout", subprocess.PIPE)
        options.setdefault("stderr", subprocess.PIPE)
        env = {**self.env, **(env or {})}
        command = self.quick_command if quick else self.command
        child = subprocess.Popen(command(*args), cwd=cwd or self.path, env=env, **options)
        self.children.append(child)
        return child

    def run(self, *args, rc=0, input=None, env=None, timeout=60, cwd=None, quick=None):
        """Run apexd.py to its end; check its status (rc None: any) and its manners."""
        quick = self.is_quick if quick is None else quick
        data = input.encode("utf-8", "surrogateescape") if isinstance(input, str) else input
        done = subprocess.run(
            (self.quick_command if quick else self.command)(*args),
            input=b"" if data is None else data,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=cwd or self.path,
            env={**self.env, **(env or {})},
            timeout=timeout,
        )
        done.stdout = done.stdout.decode("utf-8", "surrogateescape")
        done.stderr = done.stderr.decode("utf-8", "surrogateescape")
        what = f"apexd.py {' '.join(map(str, args))[:300]}: {done}"
        assert "Traceback" not in done.stderr and "a bug:" not in done.stderr, what
        assert rc is None or done.returncode == rc, what
        return done

    def quick(self, *args, **options):
        """Do the same sooner, for what is not the test's own matter."""
        return self.run(*args, quick=True, **options)

    def json(self, *args, **options):
        """Run apexd.py --json; return what it printed."""
        return json.loads(self.run("--json", *args, **options).stdout)

    def error(self, *args, rc, **options):
        """Run a command that must fail with status `rc`; return {"code", "message", "hint"}."""
        done = self.run("--json", *args, rc=rc, **options)
        assert done.stdout == "" or args[0] == "config", done
        return json.loads(done.stderr.strip().split("\n")[-1])["error"]

    def start(self, *args, **options):
        """Start the daemon, as APEXD_TEST_MODE says (fork, spawn) if it does; return its PID."""
        mode = os.environ.get("APEXD_TEST_MODE")
        self.warm()
        self.quick("start", *(("--mode", mode) if mode else ()), *args, **options)
        return self.pid()

    def warm(self):
        """Give the daemon the bytecode that its first start would make, if there is some."""
        program = os.path.join(self.path, "apexd.py")
        source = bytecode_of(PROGRAM, BYTECODE.name)
        target = bytecode_of(program, self.file("cache"))
        if os.path.isdir(self.state) and os.path.exists(source) and not os.path.exists(target):
            umask = os.umask(0o077)
            os.makedirs(os.path.dirname(target))
            shutil.copyfile(source, target)
            os.umask(umask)

    def stop(self, *args, **options):
        """Stop the daemon, letting tasks finish."""
        return self.quick("stop", *args, **options)

    def pid(self):
        """Return the daemon's PID by its PID file."""
        return json.loads(read(self.file("daemon.pid")))["pid"]

    def kill9(self):
        """SIGKILL the daemon and wait until it is dead; return the PID it had."""
        pid = self.pid()
        kill(pid)
        eventually(lambda: not lives(pid), why="the daemon is dead")
        return pid

    def add(self, *words, **options):
        """Add a task, `group="x"` as --group x; return its id."""
        args = []
        for name, value in options.items():
            for item in value if isinstance(value, (list, tuple)) else [value]:
                flag = "--" + name.replace("_", "-")
                args += [flag] if item is True else [f"{flag}={item}"]
        command = ["--", *words] if words else []
        return int(self.quick("add", "--print-id", *args, *command).stdout)

    def batch(self, lines, *args, **options):
        """Add one task a line (JSON unless a string); return the ids."""
        text = "\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines)
        out = self.quick("add", "-p", "--batch", *args, input=text, **options).stdout
        return [int(word) for word in out.split()]

    def task(self, task_id):
        """Return a task as `show --json` gives it."""
        return self.json("show", task_id, quick=True)

    def look(self, task_id):
        """Return a task, by the socket if the daemon answers: cheaper in a loop."""
        try:
            return self.request({"type": "get", "id": task_id})["task"]
        except (OSError, ValueError, KeyError):
            return self.task(task_id)

    def until(self, task_id, *states, within_s=20.0):
        """Wait until a task is in one of `states` (default: finished); return it."""
        wanted = states or ("succeeded", "failed", "cancelled", "skipped")

        def check():
            task = self.look(task_id)
            assert task["state"] in wanted, (task["state"], task["reason"], task["exit_code"])
            return task

        return eventually(check, within_s, f"task {task_id} is {' or '.join(wanted)}")

    def log(self):
        """Return the text of daemon.log."""
        return read(self.file("daemon.log"))

    def output(self, task_id):
        """Return what a task has printed."""
        return self.quick("logs", task_id).stdout

    def connect(self, timeout=10.0):
        """Open a connection to the control socket."""
        endpoint = json.loads(read(self.file("endpoint")))
        if "socket" in endpoint:
            connection = socket.socket(socket.AF_UNIX)
            connection.settimeout(timeout)
            connection.connect(os.path.join(self.state, endpoint["socket"]))
            return connection
        return socket.create_connection(("127.0.0.1", endpoint["port"]), timeout)

    def request(self, message, timeout=10.0):
        """Make one request on a connection of its own; return the response."""
        endpoint = json.loads(read(self.file("endpoint")))
        if "token" in endpoint:
            message = {**message, "auth": endpoint["token"]}
        with self.connect(timeout) as connection:
            data = json.dumps(message).encode()
            connection.sendall(struct.pack(">I", len(data)) + data)
            return read_frame(connection)

    def database(self):
        """Open apex.db, read-only; no daemon may run."""
        uri = "file:" + self.file("apex.db") + "?mode=ro"
        db = sqlite3.connect(uri, uri=True)
        db.row_factory = sqlite3.Row
        return contextlib.closing(db)

    def processes(self):
        """Return {pid: command line} of all that lives with this HOME (Linux; else none)."""
        needle = b"\0HOME=" + os.fsencode(self.home) + b"\0"
        found = {}
        for name in os.listdir("/proc") if IS_LINUX else ():
            with contextlib.suppress(OSError):
                if not name.isdigit() or int(name) == os.getpid():
                    continue
                with open(f"/proc/{name}/environ", "rb") as file:
                    if needle not in b"\0" + file.read() + b"\0":
                        continue
                with open(f"/proc/{name}/cmdline", "rb") as file:
                    words = file.read().replace(b"\0", b" ").decode("utf-8", "replace")
                if lives(int(name)):
                    found[int(name)] = words[:200]
        return found

    def close(self):
        """End everything; return what was left although it should not have been."""
        complaints = []
        for child in self.children:
            if child.poll() is None:
                child.kill()
            child.communicate()
        was_up = os.path.exists(self.file("endpoint")) and lives_in(self.file("daemon.pid"))
        for pid in () if was_up or not IS_LINUX else keepers(self):
            if not read(f"/proc/{pid}/task/{pid}/children"):
                kill(pid)  # it would wait 10 s for a daemon that the test has killed
        if IS_LINUX and not was_up and not self.processes():
            return complaints
        stop = subprocess.run(
            self.quick_command("stop", "--force"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=self.path,
            env=self.env,
            timeout=60,
        )
        with contextlib.suppress(AssertionError):
            eventually(lambda: not self.processes(), 5.0)
        left = self.processes()
        if left:
            complaints.append(f"still alive after stop: {left}; stop: {stop}")
        for _ in range(100):
            if not left:
                break
            for pid in left:
                kill(pid)
            left = self.processes()
        for name in ("daemon.pid", "control.sock", "endpoint") if was_up else ():
            if os.path.lexists(self.file(name)):
                complaints.append(f"{name} is left after stop: {stop}")
        return complaints


def read_frame(connection):
    """Receive one frame of the control protocol; None at end-of-file."""
    with connection.makefile("rb") as file:
        head = file.read(4)
        if len(head) < 4:
            return None
        (length,) = struct.unpack(">I", head)
        data = file.read(length)
        assert len(data) == length, "a frame that was cut off"
        return json.loads(data)


def lives_in(path):
    """Tell whether the process that a PID file names lives."""
    try:
        pid = json.loads(read(path))["pid"]
        return isinstance(pid, int) and pid > 1 and lives(pid)
    except (ValueError, TypeError, KeyError):
        return False


FAILED = set()  # node ids of tests that have failed


class _Reports:
    def pytest_runtest_logreport(self, report):
        if report.failed:
            FAILED.add(report.nodeid)


@pytest.fixture(scope="session", autouse=True)
def _reports(request):
    manager = request.config.pluginmanager
    if not manager.has_plugin("apexd-reports"):
        manager.register(_Reports(), "apexd-reports")
    yield
    BYTECODE.cleanup()


@pytest.fixture
def boxes(request):
    """Give a maker of boxes; see `box`."""
    made = []

    def make():
        made.append(Box())
        return made[-1]

    yield make
    complaints = [text for each in made for text in each.close()]
    if complaints or request.node.nodeid in FAILED:
        for each in made:
            print(f"--- kept: {each.root}; daemon.log:\n{each.log()[-20000:]}")
    else:
        for each in made:
            shutil.rmtree(each.root, ignore_errors=True)
    assert not complaints, "\n".join(complaints)


@pytest.fixture
def box(boxes):
    """Give a project; afterwards nothing of it may be left alive."""
    return boxes()


# ============================================================================
# 0. SHAPE - apexd.py is laid out as its head says, and README.md tells the truth
# ============================================================================

RULE = "# " + "=" * 76
parse = functools.lru_cache(maxsize=2)(ast.parse)
STANDARD_MODULES = getattr(sys, "stdlib_module_names", None)
if STANDARD_MODULES is None:  # Python 3.9
    import sysconfig

    folder = sysconfig.get_path("stdlib")
    names = [*os.listdir(folder), *os.listdir(os.path.join(folder, "lib-dynload"))]
    STANDARD_MODULES = {name.partition(".")[0] for name in names}
    STANDARD_MODULES |= {*sys.builtin_module_names, "msvcrt", "winreg", "tomllib"}
FUNCTION_MAX_LINES = 60
CLASS_MAX_LINES = 280


def find_sections(source):
    """Return [(line of the banner's head, number, name)] of a source text."""
    lines = source.split("\n")
    found = []
    for number, line in enumerate(lines, 1):
        match = re.match(r"# ([0-9]+)\. ([A-Z]+)\b", line)
        if match:
            found.append((number, int(match[1]), match[2]))
    return found


def banner_faults(source):
    """Check that banners have their one form, are in order, and agree with the map."""
    lines = [""] + source.split("\n")
    found = find_sections(source)
    faults = []
    for at, _number, name in found:
        end = next((n for n in range(at, at + 8) if lines[n] == RULE), None)
        if lines[at - 1] != RULE or end is None or " - " not in lines[at]:
            faults.append(f"line {at}: the banner of {name} has another form")
        elif not any(re.match(r"#\s+Uses ", line) for line in lines[at:end]):
            faults.append(f"line {at}: the banner of {name} does not say what it uses")
    numbers = [number for _, number, _ in found]
    if numbers != sorted(set(numbers)):
        faults.append(f"sections are out of order: {numbers}")
    head = ast.get_docstring(parse(source)) or ""
    told = [(int(n), s) for n, s in re.findall(r"(?m)^ *([0-9]+)\. ([A-Z]+) ", head)]
    if told != [(number, name) for _, number, name in found]:
        faults.append(f"the map in the head differs: {told}")
    return faults


class _ModuleNames(ast.NodeVisitor):
    """Collects names that module-level code reads, with their lines; no inner scopes."""

    def __init__(self):
        self.found = []

    def visit_Name(self, node):
        if isinstance(node.ctx, ast.Load):
            self.found.append((node.id, node.lineno))

    def visit_AnnAssign(self, node):
        if node.value is not None:
            self.visit(node.value)

    def visit_FunctionDef(self, node):
        defaults = [*node.args.defaults, *filter(None, node.args.kw_defaults)]
        for part in [*node.decorator_list, *defaults]:
            self.visit(part)

    def visit_ClassDef(self, node):
        for part in [*node.decorator_list, *node.bases]:
            self.visit(part)

    def visit_Lambda(self, node):
        pass


def top_level_names(tree):
    """Return {name: its first line} of all that the module's top level defines."""
    names = {}

    def define(name, line):
        names.setdefault(name, line)

    def walk(statements):
        for node in statements:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                define(node.name, node.lineno)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in targets:
                    for part in ast.walk(target):
                        if isinstance(part, ast.Name):
                            define(part.id, node.lineno)
            elif isinstance(node, (ast.If, ast.Try)):
                walk(node.body)
                walk(node.orelse)

    walk(tree.body)
    return names


def order_faults(source):
    """Check that a section uses only names of its own and of sections above it."""
    import symtable

    tree = parse(source)
    starts = [(at, number) for at, number, _ in find_sections(source)]

    def section_of(line):
        return max((number for at, number in starts if at <= line), default=0)

    names = {name: section_of(line) for name, line in top_level_names(tree).items()}
    module = _ModuleNames()
    for node in tree.body:
        module.visit(node)
    uses = module.found

    def walk(table):
        for child in table.get_children():
            line = child.get_lineno()
            uses.extend(
                (symbol.get_name(), line)
                for symbol in child.get_symbols()
                if symbol.is_referenced() and symbol.is_global()
            )
            walk(child)

    walk(symtable.symtable(source, "apexd.py", "exec"))
    return sorted(
        f"line {line}: section {section_of(line)} uses {name} of section {names[name]}"
        for name, line in set(uses)
        if names.get(name, 0) > section_of(line)
    )


def platform_faults(source):
    """Check that only PLATFORM asks which system this is."""
    tree = parse(source)
    bounds = find_sections(source) + [(source.count("\n") + 2, 0, "")]
    spans = {name: (at, bounds[i + 1][0]) for i, (at, _, name) in enumerate(bounds[:-1])}
    low, high = spans["PLATFORM"]
    faults = []
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if low <= line < high:
            continue
        word = ""
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            word = f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.Name):
            word = node.id
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [alias.name for alias in node.names]
            word = next((m for m in modules if m in ("fcntl", "msvcrt")), "")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            target = ast.unparse(node.args[0]) if node.args else ""
            if node.func.id == "hasattr" and re.match(r"os\b", target):
                word = "hasattr(os"
        if word in ("sys.platform", "os.name", "fcntl", "msvcrt", "hasattr(os"):
            faults.append(f"line {line}: {word} outside PLATFORM")
    return faults


def size_faults(source):
    """Check the hard limits on sizes, and that no except is bare."""
    faults = []
    for node in ast.walk(parse(source)):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            faults.append(f"line {node.lineno}: a bare except")
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            size = node.end_lineno - node.lineno + 1
            most = CLASS_MAX_LINES if isinstance(node, ast.ClassDef) else FUNCTION_MAX_LINES
            if size > most:
                faults.append(f"line {node.lineno}: {node.name} has {size} lines, most {most}")
    return faults


def import_faults(source):
    """Check that nothing but the standard library is needed; yaml may be tried."""
    faults = []
    for node in ast.walk(parse(source)):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or "."]
        for module in modules:
            top = module.partition(".")[0]
            if top not in {*STANDARD_MODULES, "tomllib", "yaml"}:
                faults.append(f"line {node.lineno}: imports {module}")
    return faults


def grammar_faults(source):
    """Check that Python 3.9 can read it."""
    try:
        ast.parse(source, feature_version=(3, 9))
    except SyntaxError as error:
        return [f"line {error.lineno}: {error.msg}"]
    return []


def raised_codes(source):
    """Return the codes that the source names outside their own table."""
    tree = parse(source)
    table = next(
        node for node in tree.body
        if isinstance(node, (ast.AnnAssign, ast.Assign))
        and "CODES" in ast.unparse(node.target if isinstance(node, ast.AnnAssign) else node.targets[0])
    )
    own = {id(node) for node in ast.walk(table)}
    return {
        node.value for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and id(node) not in own and isinstance(node.value, str)
    }


def readme_options():
    """Return {option: (default, meaning)} as README.md must have them, a table row each."""
    return {
        f"{section}.{key}": (json.dumps(default), meaning)
        for section, options in apexd.OPTIONS.items()
        for key, (_, default, meaning) in options.items()
    }


def keep_few_bodies(source):
    """Return the source with all banners, but the code of some sections only: faster."""
    lines = source.split("\n")
    starts = [at - 2 for at, _, _ in find_sections(source)]
    pieces = ["\n".join(lines[: starts[0]])]
    for (_, _, name), low, high in zip(find_sections(source), starts, [*starts[1:], len(lines)]):
        is_kept = name in ("ERRORS", "PLATFORM", "FILES", "DAEMON")
        end = lines.index(RULE, low + 1) + 1
        pieces.append("\n".join(lines[low : high if is_kept else end]))
    return "\n".join([*pieces, "def main() -> None:", "    pass", ""])


class TestShape:
    SOURCE = read(PROGRAM)
    SEEDED = keep_few_bodies(SOURCE)
    CHECKS = (
        banner_faults,
        order_faults,
        platform_faults,
        size_faults,
        import_faults,
        grammar_faults,
    )

    @staticmethod
    @functools.cache
    def faults(check):
        return check(TestShape.SEEDED)

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_the_file_has_no(self, check):
        assert check(self.SOURCE) == []

    SEEDS = {
        "a use from below in a function": (
            order_faults, 'def bad(', 'def worse() -> object:\n    return Daemon\n\n\ndef bad(',
        ),
        "a use from below in a class": (
            order_faults, 'def bad(', 'class Worse:\n    daemon = main\n\n\ndef bad(',
        ),
        "a use from below by a decorator": (
            order_faults, 'def bad(', '@main\ndef worse() -> object:\n    return 1\n\n\ndef bad(',
        ),
        "a use from below at the top level": (order_faults, 'def bad(', 'X = main\n\n\ndef bad('),
        "a platform question": (
            platform_faults, 'def bad(', 'IS_UNIX = os.name == "posix"\n\n\ndef bad(',
        ),
        "another platform question": (
            platform_faults, 'def bad(', 'IS_MAC = sys.platform == "darwin"\n\n\ndef bad(',
        ),
        "a probe of os": (
            platform_faults, 'def bad(', 'X = hasattr(os, "fork")\n\n\ndef bad(',
        ),
        "an import of fcntl": (platform_faults, "import errno", "import errno\nimport fcntl"),
        "a long function": (
            size_faults, 'def bad(', 'def worse() -> None:\n' + "    pass\n" * 60 + '\n\ndef bad(',
        ),
        "a long class": (
            size_faults, 'def bad(', 'class Worse:\n' + "    pass\n" * 280 + '\n\ndef bad(',
        ),
        "a bare except": (
            size_faults, 'def bad(', 'try:\n    X = 1\nexcept:\n    X = 2\n\n\ndef bad(',
        ),
        "a foreign module": (import_faults, "import errno", "import errno\nimport requests"),
        "newer grammar": (grammar_faults, 'def bad(', 'match 1:\n    case 1:\n        pass\n\n\ndef bad('),
        "a section out of order": (banner_faults, "# 5. FILES", "# 50. FILES"),
        "a section the map lacks": (banner_faults, "# 5. FILES", "# 5. FOLDERS"),
        "a banner of another width": (banner_faults, RULE, RULE[:-1]),
        "a banner that does not say what it uses": (banner_faults, "#    Uses 1-4.", "#    Is nice."),
    }

    @pytest.mark.parametrize("seed", SEEDS)
    def test_the_checker_sees(self, seed):
        check, old, new = self.SEEDS[seed]
        assert old in self.SEEDED
        seeded = self.SEEDED.replace(old, new, 1)
        assert len(check(seeded)) > len(self.faults(check)), seed

    def test_every_code_is_raised_somewhere(self):
        assert set(apexd.CODES) - raised_codes(self.SOURCE) == set()

    def test_every_error_has_a_code_of_the_table(self):
        raised = {
            node.args[0].value
            for node in ast.walk(parse(self.SOURCE))
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "DaemonError"
            and isinstance(node.args[0], ast.Constant)
        }
        assert raised - set(apexd.CODES) == set()

    def test_all_names_of_all_are_there(self):
        assert [name for name in apexd.__all__ if not hasattr(apexd, name)] == []

    def test_importing_it_does_nothing(self, tmp_path):
        shutil.copy(PROGRAM, tmp_path)
        code = (
            "import sys, threading, signal; sys.dont_write_bytecode = True; import apexd\n"
            "heavy = {'sqlite3', 'logging', 'subprocess', 'http', 'typing'} & set(sys.modules)\n"
            "print(sorted(heavy), threading.active_count(), signal.getsignal(signal.SIGTERM) == 0)"
        )
        argv = [sys.executable, "-S", "-c", code]
        done = subprocess.run(argv, cwd=tmp_path, stdout=subprocess.PIPE, check=True)
        assert done.stdout.split() == [b"[]", b"1", b"True"], done
        assert os.listdir(tmp_path) == ["apexd.py"]


    @pytest.mark.parametrize("minor", [7, 8])
    def test_an_old_python_is_told_in_one_line(self, tmp_path, minor):
        """L14"""
        places = glob.glob(os.path.expanduser(f"~/.pyenv/versions/3.{minor}.*/bin/python3"))
        python = shutil.which(f"python3.{minor}", path="/usr/bin:/usr/local/bin")
        if not (python or places):
            pytest.skip(f"no Python 3.{minor} here")
        shutil.copy(PROGRAM, tmp_path)
        for words in (["apexd.py", "status"], ["apexd.py", "start"], ["-c", "import apexd"]):
            done = subprocess.run([python or places[0], *words], cwd=tmp_path, capture_output=True)
            told = f"apexd needs Python 3.9 or newer, this is 3.{minor}"
            assert done.returncode == 1 and done.stderr.decode().split("\n")[-2].endswith(told)
        assert os.listdir(tmp_path) in (["apexd.py"], ["__pycache__", "apexd.py"], ["apexd.py", "__pycache__"])

    def test_no_module_beside_it_is_imported_unless_it_is_imported_itself(self, box):
        """S4"""
        for name in ("json", "socket", "argparse", "sqlite3", "logging", "contextlib", "typing", "gc"):
            write(os.path.join(box.path, name + ".py"), "raise SystemExit('hostile')\n")
        for words in (["version"], ["add", "--", "true"], ["start"], ["list"], ["stop"]):
            box.run(*words, quick=False)
        code = "import sys; sys.path.insert(0, '.'); old = list(sys.path); import apexd; print(old == sys.path)"
        argv = [sys.executable, "-B", "-I", "-c", code]
        assert subprocess.run(argv, cwd=HERE, capture_output=True).stdout == b"True\n"


@pytest.mark.skipif(not os.path.exists(os.path.join(HERE, "README.md")), reason="no README.md")
class TestReadme:
    def setup_class(self):
        self.text = read(os.path.join(HERE, "README.md"))

    def test_its_table_of_options_is_that_of_the_program(self):
        rows = re.findall(r"(?m)^\| `([a-z]+\.[A-Za-z0-9_.]+)` \| ([^|]*) \| (.*) \|$", self.text)
        table = {key: (value.strip("` "), meaning.strip()) for key, value, meaning in rows}
        assert table == readme_options()

    def test_it_names_every_option_of_the_command_line(self):
        missing = set()
        for action in apexd.build_parser()._actions:
            for name, sub in (action.choices or {}).items() if action.dest == "verb" else ():
                for option in sub._actions:
                    words = option.option_strings
                    if words and "-h" not in words and not any(re.search(rf"{word}\b", self.text) for word in words):
                        missing.add(f"{name} {words[0]}")
        assert missing == set()

    def test_it_names_every_command(self):
        commands = {action.dest: action for action in apexd.build_parser()._actions}["verb"].choices
        assert [name for name in commands if not re.search(rf"\b{name}\b", self.text)] == []

    def test_it_names_every_type_of_event(self):
        part = self.text[self.text.index("| types | payload |"):self.text.index("| `custom.NAME` |")]
        cells, named = re.findall(r"(?m)^\| (`.*?) \|", part), set()
        for cell in cells:
            kind, cell = "", re.sub(r"\([^)]*\)", "", cell)
            for word in re.findall(r"`([a-z.]+)`", cell):
                kind = word.partition(".")[0] if "." in word else kind
                named.add(word if "." in word else f"{kind}.{word}")
        assert named == set(apexd.EVENTS)

    def test_it_names_every_code(self):
        assert [code for code in apexd.CODES if f"`{code.lower()}`" not in self.text] == []


# ============================================================================
# 2. ERRORS - every error has a code, a status, one line what, one line what to do
# ============================================================================


class TestErrors:
    @pytest.fixture
    def box(self, box):
        """Give a project whose commands are run as people run them."""
        box.is_quick = False
        return box

    def test_an_error_survives_the_wire(self):
        error = apexd.DaemonError("NOT_RUNNING", "what", "what to do")
        again = apexd.DaemonError.from_dict(json.loads(json.dumps(error.to_dict())))
        assert (again.code, again.message, again.hint) == ("NOT_RUNNING", "what", "what to do")
        assert error.to_dict()["code"] == "not_running"
        assert again.exit_status == 69

    def test_statuses_are_those_of_the_documentation(self):
        assert {status for status, _ in apexd.CODES.values()} <= {1, 2, 65, 69, 70, 73, 75, 77, 78}
        told = {
            "BAD_REQUEST": 2, "UNKNOWN_COMMAND": 2, "UNKNOWN_TASK": 2, "UNKNOWN_GROUP": 2,
            "DATABASE_CORRUPT": 65, "PID_FILE_CORRUPTED": 65, "NOT_RUNNING": 69,
            "NOT_ANSWERING": 69, "INTERNAL": 70, "CANNOT_CREATE": 73, "BUSY": 75,
            "NOT_CONFIRMED": 75, "ALREADY_RUNNING": 75, "QUEUE_FULL": 75,
            "PERMISSION_DENIED": 77, "CONFIG_INVALID": 78, "DATABASE_NEWER": 78,
        }  # fmt: skip
        assert {code: apexd.CODES[code][0] for code in told} == told

    MISTAKES = (
        (["frobnicate"], "unknown_command", 2),
        (["show", "99"], "unknown_task", 2),
        (["show", "x"], "bad_request", 2),
        (["add"], "bad_request", 2),
        (["add", "make test"], "bad_request", 2),
        (["add", "--group", "nope", "true"], "unknown_group", 2),
        (["add", "--delay=-5", "true"], "bad_request", 2),
        (["--config", "nope.toml", "list"], "config_invalid", 78),
        (["--project", "/nope/nope", "list"], "bad_request", 2),
        (["kill", "12"], "bad_request", 2),
        (["reload"], "not_running", 69),
    )

    @pytest.mark.parametrize(
        "args, code, status",
        MISTAKES,
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_an_error_has_a_code_a_status_and_two_lines(self, box, args, code, status):
        error = box.error(*args, rc=status)
        assert error["code"] == code
        assert error["message"] and "\n" not in error["message"], "one line what"
        assert error["hint"] and "\n" not in error["hint"], "one line what to do"

    def test_people_get_the_same_in_words(self, box):
        error = box.error("frobnicate", rc=2)
        text = box.run("frobnicate", rc=2).stderr
        assert text.startswith(f"apexd: {error['message']}\n") and text.count("\n") == 2
        assert text.split("\n")[1].strip() == error["hint"]

    def test_an_error_leaves_standard_output_empty(self, box):
        assert box.run("show", "99", rc=2).stdout == ""


# ============================================================================
# 3. VALUES - readers of what people write, the table of moves, what follows an end
# ============================================================================

JUNK = [
    None, True, False, [], {}, [[]], [None], {"a": 1}, "", " ", "x", "5x", "1e5x", "--", "-1",
    "1-", "-", ",", "0x10", "1..2", ".", "\0", "\ud800", "٣", "9" * 400, 10**400, -1, -0.5,
    float("nan"), float("inf"), float("-inf"), 1e309, "nan", "inf", "1_000", object(), b"5",
]  # fmt: skip


class TestValues:
    def test_a_duration_is_read(self):
        table = {
            0: 0, 5: 5, 0.25: 0.25, "0": 0, "90": 90, "90s": 90, "5m": 300, "2h": 7200,
            "1d": 86400, "250ms": 0.25, " 1.5 h ": 5400, "1.5": 1.5,
        }  # fmt: skip
        assert {text: apexd.duration(text) for text in table} == table

    @pytest.mark.parametrize(
        "text", ["-1", "-1s", -1, "5x", "", "s", "1 2", "1.2.3", "1w", "1e10", 1e11, None, True, []]
    )
    def test_what_is_no_duration_is_refused(self, text):
        with pytest.raises(ValueError):
            apexd.duration(text)

    @pytest.mark.parametrize("reader", ["duration", "task_ids", "dependencies", "command_line"])
    def test_junk_raises_value_error_or_is_read(self, reader):
        for junk in JUNK:
            with contextlib.suppress(ValueError):
                getattr(apexd, reader)(junk)

    def test_task_ids_are_read(self):
        table = {"3": [3], "3,5-7": [3, 5, 6, 7], "7,3,7": [7, 3], 4: [4], "2-2": [2], " 1 , 2 ": [1, 2]}
        flat = lambda text: [task_id for ids in apexd.task_ids(text) for task_id in ids]
        assert {text: flat(text) for text in table} == table
        assert flat(["9-10", 1]) == [9, 10, 1] and flat("3,1-5,4-6") == [3, 1, 2, 4, 5, 6]
        assert apexd.task_ids("1-999999999999999") == [range(1, 10**15)], "is never a list"
        assert apexd.task_ids([1, 2, 3]) == [range(1, 4)]
        for text in ("", "x", "3-1", "1,", "-1", "1.5", True, None, "9" * 30):
            with pytest.raises(ValueError):
                apexd.task_ids(text)

    def test_dependencies_are_read(self):
        assert apexd.dependencies("3,4:any") == [(3, "ok"), (4, "any")]
        assert apexd.dependencies(["7-8:fail", "9:ok"]) == [(7, "fail"), (8, "fail"), (9, "ok")]
        for text in ("", "x", "3:maybe", "3:ok:ok", ":ok", [None], [True], None, 5.5, "3-1"):
            with pytest.raises(ValueError):
                apexd.dependencies(text)

    def test_a_command_is_read(self):
        for good in ("make test", ["make", "test"], ["./-x", "-y"], ["a", ""], ["\udcff"], "-x"):
            assert apexd.command_line(good) == good
        bads = ("", " \t", [], [""], ["-x"], ["a", 1], ["a\0"], "a\0", ["\ud800"], 5, None, [["a"]])
        for wrong in bads:
            with pytest.raises(ValueError):
                apexd.command_line(wrong)

    def test_every_state_has_its_moves(self):
        done = {"succeeded", "failed", "cancelled", "skipped"}
        waiting = {"waiting", "scheduled", "queued"}
        moves = {old.value: {new.value for new in news} for old, news in apexd.MOVES.items()}
        assert set(moves) == {state.value for state in apexd.State} == done | waiting | {"running"}
        for state in done:
            assert "queued" in moves[state] <= waiting, "a finished task can only be reopened"
        for state in waiting:
            assert "cancelled" in moves[state]
            assert "succeeded" not in moves[state] and "failed" not in moves[state]
        assert "running" in moves["queued"]
        assert not any("running" in moves[state] for state in moves if state != "queued")
        assert moves["running"] == {"succeeded", "failed", "cancelled", "queued", "scheduled"}
        assert not any(state in moves[state] for state in moves)

    def test_every_state_can_be_reached_from_a_new_task(self):
        reached, work = set(), [apexd.State.WAITING]
        while work:
            state = work.pop()
            if state not in reached:
                reached.add(state)
                work += apexd.MOVES[state]
        assert reached == set(apexd.State)

    @pytest.mark.parametrize(
        "code, reason, never_ran, wish, outcome",
        [
            (0, None, None, None, "ok"),
            (1, None, None, None, "failed"),
            (75, None, None, None, "deferred"),
            (137, None, None, None, "failed"),
            (None, None, None, None, "lost"),
            (None, None, True, None, None),
            (127, "spawn:ENOENT x", None, None, "not_started"),
            (0, None, None, "cancelled", "ok"),
            (0, None, None, "timeout", "ok"),
            (1, None, None, "cancelled", "cancelled"),
            (75, None, None, "cancelled", "cancelled"),
            (143, None, None, "timeout", "timeout"),
            (137, None, None, "over_budget", "over_budget"),
            (143, None, None, "interrupted", "interrupted"),
            (None, None, None, "cancelled", "cancelled"),
            (None, None, None, "interrupted", "interrupted"),
            (None, None, True, "cancelled", "cancelled"),
        ],
    )
    def test_how_an_attempt_ended(self, code, reason, never_ran, wish, outcome):
        result = apexd.Result(exit_code=code, reason=reason, never_ran=never_ran)
        wished = apexd.Outcome(wish) if wish else None
        decided = apexd.outcome_of(result, wished)
        assert (decided.value if decided else None) == outcome

    @pytest.mark.parametrize(
        "outcome, counters, state, least, most",
        [
            ("ok", {}, "succeeded", 0, 0),
            ("cancelled", {}, "cancelled", 0, 0),
            ("over_budget", {"retries": 9, "failures": 1}, "failed", 0, 0),
            ("interrupted", {"losses": 99, "failures": 99}, "queued", 0, 0),
            ("failed", {"retries": 0, "failures": 1}, "failed", 0, 0),
            ("failed", {"retries": 1, "failures": 1}, "scheduled", 0.0, 60),
            ("failed", {"retries": 1, "failures": 2}, "failed", 0, 0),
            ("failed", {"retries": 99, "failures": 50}, "scheduled", 1, 3600),
            ("timeout", {"retries": 1, "failures": 1}, "scheduled", 0.0, 60),
            ("timeout", {"retries": 0, "failures": 1}, "failed", 0, 0),
            ("lost", {"losses": 1}, "queued", 0, 0),
            ("lost", {"losses": 3}, "failed", 0, 0),
            ("lost", {"losses": 1, "on_lost": "fail"}, "failed", 0, 0),
            ("deferred", {"deferrals": 1}, "scheduled", 60, 60),
            ("deferred", {"deferrals": 2}, "scheduled", 120, 120),
            ("deferred", {"deferrals": 99}, "scheduled", 900, 900),
            ("deferred", {"deferrals": 100}, "failed", 0, 0),
            ("not_started", {"reason": "spawn:ENOENT x", "retries": 9}, "failed", 0, 0),
            ("not_started", {"reason": "spawn:EACCES x", "retries": 9}, "failed", 0, 0),
            ("not_started", {"reason": "spawn:EAGAIN x", "deferrals": 1}, "scheduled", 0.1, 60),
            ("not_started", {"reason": "spawn:ENOMEM x", "deferrals": 1}, "scheduled", 0.1, 60),
            ("not_started", {"reason": "spawn:ENOSPC x", "deferrals": 999}, "scheduled", 60, 60),
        ],
    )
    def test_what_becomes_of_a_task(self, outcome, counters, state, least, most):
        zero = {"retries": 0, "failures": 0, "losses": 0, "deferrals": 0, "on_lost": "retry"}
        task = apexd.Task(**{**zero, **counters})
        for jitter in (0.0, 0.5, 1.0):
            new, delay = apexd.next_state(task, apexd.Outcome(outcome), jitter)
            assert new.value == state
            assert new in apexd.MOVES[apexd.State.RUNNING]
            assert (least if jitter == 1.0 else 0) <= delay <= most

    def test_every_outcome_leads_somewhere_legal(self):
        rng = random.Random(1)
        for _ in range(2000):
            names = ("retries", "failures", "losses", "deferrals")
            task = apexd.Task(on_lost=rng.choice(["retry", "fail"]), **{n: rng.randrange(200) for n in names})
            state, delay = apexd.next_state(task, rng.choice(list(apexd.Outcome)), rng.random())
            assert state in apexd.MOVES[apexd.State.RUNNING] and 0 <= delay < 1e6

    def test_backoff_doubles_up_to_its_cap(self):
        delays = [apexd.backoff(count, 1.0, 60.0, 1.0) for count in range(1, 10)]
        assert delays == [1, 2, 4, 8, 16, 32, 60, 60, 60]
        assert apexd.backoff(10**6, 1.0, 60.0, 1.0) == 60
        assert apexd.backoff(3, 1.0, 60.0, 0.5) == 2
        assert apexd.backoff(3, 1.0, 60.0, 0.0) == 0

    def test_a_timestamp_is_utc_with_milliseconds(self):
        assert apexd.timestamp(0) == "1970-01-01T00:00:00.000Z"
        assert apexd.timestamp(1736937005.456) == "2025-01-15T10:30:05.456Z"
        assert apexd.timestamp(1736937005.9996).startswith("2025-01-15T10:30:0")

    def test_a_span_is_short(self):
        table = {0: "0ms", 0.85: "850ms", 12: "12s", 185: "3m 5s", 7800: "2h 10m", 356400: "4d 3h"}
        assert {s: apexd.span(s) for s in table} == table
        assert apexd.span(0.9996) in ("1s", "999ms", "1000ms")

    def test_what_could_move_a_cursor_is_escaped(self):
        for text in ("\x1b[2J", "a\rb", "\x07", "\x9b1m", "\u202e", "\u2066", "\x7f", "\x00"):
            shown = apexd.printable(text)
            assert shown.isprintable() and "\\" in shown, repr(text)
        assert apexd.printable("Grüße, 世界 ✓") == "Grüße, 世界 ✓"
        assert apexd.printable("\udcff").isascii()


# ============================================================================
# 4. PLATFORM - locks between processes, who a process is, where a folder lies
# ============================================================================

# Takes a lock as apexd does not: by fcntl itself. Says so, then holds it until end-of-file.
LOCKER = """
import fcntl, sys
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_SH if sys.argv[2:] else fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def locked(path, *shared):
    """Hold a lock on a file in another process."""
    argv = [sys.executable, "-S", "-c", LOCKER, path, *shared]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout.readline() == b"locked\n"
            yield other
        finally:
            other.stdin.close()
            other.wait()


class TestPlatform:
    @posix
    def test_a_lock_of_another_process_is_seen(self, tmp_path):
        path = str(tmp_path / "lock")
        lock = apexd.Platform.lock
        with open(path, "a") as mine:
            with locked(path):
                assert lock(mine.fileno()) is False
                assert lock(mine.fileno(), shared=True) is False
            assert lock(mine.fileno()) is True
        with open(path, "a") as mine:
            with locked(path, "shared"):
                assert lock(mine.fileno()) is False
                assert lock(mine.fileno(), shared=True) is True

    @posix
    def test_a_lock_is_inherited_and_outlives_its_taker(self, tmp_path):
        path = str(tmp_path / "lock")
        with open(path, "a") as again:
            with open(path, "a") as mine:
                assert apexd.Platform.lock(mine.fileno())
                argv = [sys.executable, "-S", "-c", "import sys; sys.stdin.read()"]
                heir = subprocess.Popen(argv, stdin=subprocess.PIPE, pass_fds=[mine.fileno()])
            try:
                assert not apexd.Platform.lock(again.fileno())
            finally:
                heir.communicate()
            assert apexd.Platform.lock(again.fileno())

    @posix
    def test_a_lock_is_not_lost_by_reading_the_file_elsewhere(self, tmp_path):
        path = str(tmp_path / "lock")
        with open(path, "a") as mine, open(path, "a") as again:
            assert apexd.Platform.lock(mine.fileno())
            assert read(path) == ""
            assert not apexd.Platform.lock(again.fileno())

    @pytest.mark.parametrize(
        "path, kind",
        [
            ("/home/me/project", "nfs4"),
            ("/home", "nfs4"),
            ("/homely/me", None),
            ("/home/me/local/x", None),
            ("/mnt/with space/x", "cifs"),
            ("/srv/9p", "9p"),
            ("/srv/sshfs/x", "fuse.sshfs"),
            ("/srv/over", "nfs"),
            ("/", None),
            ("/nowhere", None),
        ],
    )
    @posix
    def test_a_network_file_system_is_seen(self, tmp_path, path, kind):
        table = write(
            str(tmp_path / "mountinfo"),
            "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/vda rw\n"
            "30 22 0:40 / /home rw shared:2 - nfs4 server:/home rw,vers=4.2\n"
            "31 30 8:2 / /home/me/local rw - xfs /dev/vdb rw\n"
            "32 22 0:41 / /mnt/with\\040space rw - cifs //server/share rw\n"
            "33 22 0:42 / /srv/9p rw - 9p host rw\n"
            "34 22 0:43 / /srv/sshfs rw - fuse.sshfs me@host: rw\n"
            "35 22 8:3 / /srv/over rw - ext4 /dev/vdc rw\n"
            "36 35 0:44 / /srv/over rw - nfs server:/over rw\n",
        )
        assert apexd.Platform.network_file_system(path, table) == kind

    @linux
    def test_a_process_with_a_treacherous_name_has_its_start_time(self, tmp_path):
        program = str(tmp_path / "a) R 1 (x")
        shutil.copy(shutil.which("sleep"), program)
        child = subprocess.Popen([program, "60"])
        try:
            started = int(apexd.Platform.start_time(child.pid)) / os.sysconf("SC_CLK_TCK")
            uptime = float(read("/proc/uptime").split()[0])
            assert -1 < uptime - started < 10
            child.kill()
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
            assert apexd.Platform.start_time(child.pid) is None, "a zombie"
        finally:
            child.kill()
            child.wait()
        assert apexd.Platform.start_time(child.pid) is None, "gone"

    @linux
    def test_a_run_is_killed_where_the_kernel_has_no_pidfd_open_too(self, monkeypatch):
        def refuse(pid, flags=0):
            raise OSError(errno.ENOSYS, "Function not implemented")

        monkeypatch.setattr(os, "pidfd_open", refuse, raising=False)
        with subprocess.Popen(["sleep", "60"], env={**os.environ, "APEX_RUN_ID": "r"}) as child:
            try:
                eventually(lambda: apexd.Platform.environment_of(child.pid).get("APEX_RUN_ID"))
                apexd.Platform.kill_run(child.pid, "another")
                assert child.poll() is None
                apexd.Platform.kill_run(child.pid, "r")
                assert child.wait(10) == -signal.SIGKILL
            finally:
                child.kill()

    @linux
    def test_two_processes_have_two_identities_and_one_keeps_its_own(self):
        mine = apexd.Platform.start_time(os.getpid())
        assert mine and mine == apexd.Platform.start_time(os.getpid())
        assert mine != apexd.Platform.start_time(1)
        assert apexd.Platform.boot_id() == apexd.Platform.boot_id() != ""


# ============================================================================
# 5. FILES - atomic replacement, no symbolic links, logs that lose their head
# ============================================================================

# Appends numbered lines of 16 bytes, as fast as it can, to a log opened as tasks have it. Only
# when four caps lie there does it wait for the capper: so many heads go whoever gets the processor.
WRITER = """
import os, select, sys, time
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
for first in range(0, int(sys.argv[2]), 8):
    os.write(fd, b"".join(b"%015d\\n" % n for n in range(first, first + 8)))
    patience = time.monotonic() + 60
    while os.fstat(fd).st_size > int(sys.argv[3]):
        select.select([], [], [], 0.001)
        assert time.monotonic() < patience, "nobody caps"
"""
LINE_BYTES = 16
CAP_BYTES = 65536


def expected_lines(start, end):
    """Return the bytes of the writer's output from one offset to another."""
    first, last = start // LINE_BYTES, -(-end // LINE_BYTES)
    data = b"".join(b"%015d\n" % n for n in range(first, last))
    return data[start - first * LINE_BYTES : end - first * LINE_BYTES]


def can_collapse(folder):
    """Tell whether files in this folder can lose their head in place (ext4, XFS)."""
    path = os.path.join(folder, "probe")
    with open(path, "wb") as file:
        file.write(b"x" * 65536)
        file.flush()
        os.fsync(file.fileno())
        collapsed = apexd.Platform.collapse(file.fileno(), 4096)
    os.unlink(path)
    return collapsed


class TestFiles:
    LINES = 400_000 if SLOW else 80_000

    def write_and_cap(self, path, on_cap):
        """Cap a log at 64 KiB while a process writes to it; return how often."""
        argv = [sys.executable, "-S", "-c", WRITER, path, str(self.LINES), str(4 * CAP_BYTES)]
        caps = 0
        with subprocess.Popen(argv) as writer:
            try:
                while writer.poll() is None:
                    if apexd.cap_log(path, CAP_BYTES):
                        caps += 1
                        on_cap()
            except BaseException:
                writer.kill()
                raise
        assert writer.returncode == 0
        return caps

    @posix
    def test_a_log_that_loses_its_head_under_a_writer_loses_and_doubles_no_line(self, tmp_path):
        path = str(tmp_path / "task.log")
        heads = []

        def keep_head():
            with open(path + ".1", "rb") as file:
                heads.append((file.read(), apexd.log_base(path)))

        caps = self.write_and_cap(path, keep_head)
        with open(path, "rb") as file:
            rest = file.read()
        base, total = apexd.log_base(path), self.LINES * LINE_BYTES
        assert caps >= 3 and len(heads) == caps
        if can_collapse(str(tmp_path)):
            assert base + len(rest) == total and rest == expected_lines(base, total)
            gone = 0
            for head, end in heads:  # of a head over the cap only the end is kept
                assert head == expected_lines(end - len(head), end)
                assert len(head) == min(end - gone, CAP_BYTES)
                gone = end
        else:  # what is written between copy and truncation is lost, as the README says
            text = b"".join(head for head, _ in heads) + rest
            numbers = [int(n) for n in re.findall(rb"(?m)^[0-9]{15}$", text)]
            assert numbers == sorted(set(numbers))

    @posix
    def test_a_reader_by_offset_never_gets_bytes_of_another_place(self, tmp_path):
        path = str(tmp_path / "task.log")
        if not can_collapse(str(tmp_path)):
            pytest.skip("offsets are exact only where a head can be collapsed away")
        wrong, reads, stop, was_read = [], [0], threading.Event(), threading.Event()

        def follow():
            rng, at = random.Random(7), 0
            while not stop.is_set():
                asked = at if rng.random() < 0.5 else max(0, at - rng.randrange(2 * CAP_BYTES))
                data, following = apexd.read_log(path, asked)
                if data:
                    reads[0] += 1
                    was_read.set()
                if data != expected_lines(following - len(data), following):
                    wrong.append((asked, following, data[:48]))
                at = max(at, following)

        def let_it_read():
            was_read.clear()
            assert was_read.wait(20)

        reader = threading.Thread(target=follow)
        reader.start()
        try:
            caps = self.write_and_cap(path, let_it_read)
        finally:
            stop.set()
            reader.join()
        assert caps >= 3 and reads[0] >= caps
        assert not wrong, f"{len(wrong)} of {reads[0]} reads; the first: {wrong[0]}"

    def test_offsets_are_logical_and_negative_ones_count_lines(self, tmp_path):
        path = write(str(tmp_path / "log"), expected_lines(0, 16 * 10_000))
        assert apexd.read_log(path, 0, 32) == (expected_lines(0, 32), 32)
        assert apexd.read_log(path, -2) == (expected_lines(16 * 9998, 16 * 10_000), 160_000)
        assert apexd.cap_log(path, CAP_BYTES)
        base = apexd.log_base(path)
        assert base > 0 and os.stat(path).st_size == 160_000 - base <= CAP_BYTES
        data, following = apexd.read_log(path, 0, 32)
        assert following == base + 32 and data == expected_lines(base, base + 32)
        assert apexd.read_log(path, 159_984) == (expected_lines(159_984, 160_000), 160_000)
        assert apexd.read_log(path, 160_000) == (b"", 160_000)
        assert apexd.read_log(path, -1)[1] == 160_000
        assert read(path + ".1").encode() == expected_lines(max(0, base - CAP_BYTES), base)
        assert not apexd.cap_log(path, CAP_BYTES), "small enough now"

    def test_a_log_that_is_not_there_is_empty(self, tmp_path):
        assert apexd.read_log(str(tmp_path / "no"), 5) == (b"", 5)
        assert not apexd.cap_log(str(tmp_path / "no"), 5)
        assert apexd.log_base(str(tmp_path / "no")) == 0

    @posix
    def test_symbolic_links_are_not_followed_when_capping(self, tmp_path):
        victim = write(str(tmp_path / "victim"), b"v" * 200_000)
        path = str(tmp_path / "log")
        os.symlink(victim, path)
        assert not apexd.cap_log(path, CAP_BYTES), "and nothing is raised: T2"
        os.unlink(path)
        write(path, b"l" * 200_000)
        os.symlink(victim, path + ".1")
        assert not apexd.cap_log(path, CAP_BYTES)
        assert os.stat(path).st_size == 200_000, "nothing is cut that was not kept"
        assert read(victim) == "v" * 200_000

    @posix
    @pytest.mark.parametrize("name", ["daemon.lock", "apex.db", "daemon.log"])
    def test_no_file_of_ours_is_opened_through_a_symbolic_link(self, box, name):
        victim = write(os.path.join(box.root, "victim"), "precious")
        os.symlink(victim, box.file(name))
        error = box.error("start", rc=73)
        assert error["code"] == "cannot_create" and name in error["message"]
        assert read(victim) == "precious" and not box.processes()

    @posix
    def test_a_task_log_and_a_note_are_not_written_through_a_symbolic_link(self, box):
        box.config({}, process={"web": {"command": ["sleep", "60"], "autostart": False}})
        box.start()
        victim = write(os.path.join(box.root, "victim"), "precious")
        os.symlink(victim, box.file("logs", "task-1.1.log"))
        first = box.until(box.add("echo", "overwritten"))
        assert first["state"] == "failed" and "task-1.1.log" in first["reason"]
        os.symlink(victim, box.file("run", "proc-web.0"))
        box.run("up", "web", rc=None)
        box.run("down", "web", rc=None)
        assert read(victim) == "precious"

    def test_readers_see_the_old_or_the_new_file_never_a_part(self, box):
        stop, seen, broken = threading.Event(), set(), []

        def watch():
            while not stop.wait(0.0005):
                for name in ("daemon.pid", "endpoint", "state.json"):
                    text = read(box.file(name))
                    try:
                        seen.add(name) if text and json.loads(text) else None
                    except ValueError:
                        broken.append((name, text))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            for _ in range(ROUNDS):
                box.start()
                box.kill9()
            eventually(lambda: {"daemon.pid", "endpoint"} <= seen)
        finally:
            stop.set()
            watcher.join()
        assert not broken

    @posix
    @pytest.mark.parametrize("verb", ["start", "add"])
    def test_everything_is_for_its_owner_alone(self, box, verb):
        shutil.rmtree(box.state)
        words = box.command("start") if verb == "start" else box.command("add", "true")
        argv = ["sh", "-c", 'umask 0; exec "$@"', "sh", *words]
        subprocess.run(argv, cwd=box.path, env=box.env, stdout=subprocess.DEVNULL, check=True)
        if verb == "add":
            box.start()
        assert box.until(box.add("true"))["state"] == "succeeded"
        modes = {box.state: os.stat(box.state).st_mode}
        for folder, folders, files in os.walk(box.state):
            for name in folders + files:
                path = os.path.join(folder, name)
                modes[path] = os.lstat(path).st_mode
        assert box.file("control.sock") in modes and box.file("apex.db") in modes
        assert [path for path, mode in modes.items() if mode & 0o022] == []
        assert [path for path in modes if modes[path] & 0o077 and "/cache" not in path] == []


    def test_what_is_wrong_with_a_log_is_warned_of_once(self, tmp_path, caplog):
        """T2c: a folder in the place of its head."""
        path = write(str(tmp_path / "log"), b"l" * 200_000)
        os.mkdir(path + ".1")
        assert [apexd.cap_log(path, CAP_BYTES) for _ in range(3)] == [False] * 3
        assert caplog.text.count("cannot be kept") == 1

    def test_a_log_that_shrinks_meanwhile_ends_its_copy(self, tmp_path):
        """T2: logrotate's copytruncate."""
        path = write(str(tmp_path / "log"), b"l" * 2000)
        done = threading.Event()

        def copy():
            with open(path, "rb") as file:
                apexd._keep_head(file, path + ".1", 5000, 4000)
            done.set()

        threading.Thread(target=copy, daemon=True).start()
        assert done.wait(5) and read(path + ".1") == "l" * 1000

    @linux
    def test_a_full_disk_costs_a_log_its_head(self, tmp_path, caplog):
        """T2b."""
        folder = str(tmp_path)
        with mounted(folder, "size=1m,mode=0700"):
            path = write(os.path.join(folder, "log"), b"l" * 800_000)
            assert apexd.cap_log(path, 400_000)
            assert os.stat(path).st_size < 400_000 and not os.path.exists(path + ".1")
            assert apexd.log_base(path) > 500_000

    @linux
    def test_the_ballast_is_given_up_on_a_full_disk_and_made_anew(self, tmp_path):
        """T2b: what is recorded then has its room."""
        folder = str(tmp_path)
        with mounted(folder, "size=3m,mode=0700"):
            store = apexd.TaskStore(os.path.join(folder, ".apex", "apex.db"))
            ballast = os.path.join(folder, ".apex", "ballast")
            assert os.path.getsize(ballast) == 65536
            ids = store.add([["true"]] * 300)
            with open(os.path.join(folder, "filler"), "wb", buffering=0) as filler:
                with contextlib.suppress(OSError):
                    while filler.write(b"x" * 4096):
                        pass
            assert store.change("cancel", ids[:5]) == (ids[:5], [])
            for at in range(5, 300, 5):
                with contextlib.suppress(apexd.DaemonError):
                    store.change("cancel", ids[at : at + 5])
            os.unlink(os.path.join(folder, "filler"))
            apexd.prune_all(store, ())
            assert os.path.getsize(ballast) == 65536
            store.close()

    def test_a_file_is_followed_through_several_rotations_between_two_looks(
        self, tmp_path, monkeypatch
    ):
        """P18: no line is lost, none doubled."""
        monkeypatch.setattr(apexd, "STREAM_PAUSE_S", 0.02, raising=False)
        path = str(tmp_path / "x.log")
        rng, written, seen = random.Random(1), [], []

        def log(line=b""):
            written.append(line or b"line %d\n" % len(written))
            with open(path, "ab") as file:
                file.write(written[-1])

        def rotate():
            for number in range(99, 0, -1):
                with contextlib.suppress(FileNotFoundError):
                    os.replace(f"{path}.{number}", f"{path}.{number + 1}")
            os.replace(path, path + ".1")
            log()

        def follow():
            for data in apexd.follow_file(path, 50, True):
                seen.append(data)
                if data.endswith(b"end\n"):
                    return

        log()
        threading.Thread(target=follow, daemon=True).start()
        eventually(lambda: seen)
        for _ in range(40):
            for _ in range(rng.randrange(1, 5)):
                log()
            for _ in range(rng.randrange(4)):
                rotate()
            pause(rng.random() * 0.05)
        log(b"end\n")
        eventually(lambda: b"".join(seen).endswith(b"end\n"))
        assert b"".join(seen) == b"".join(written)

    def test_lines_are_cut_at_a_limit_and_what_never_ends_does_not_grow(self):
        """P10."""
        most = apexd.LINE_MAX_BYTES
        data = b"a\n" + b"b" * (2 * most + 5) + b"\n\nrest"
        *lines, rest = apexd.cut_lines(data)
        assert (b"".join(lines), rest) == (data.replace(b"\n", b"")[:-4], b"rest")
        assert [len(line) for line in lines] == [1, most, most, 5, 0]
        logs = iter([{"w.0": (b"x" * 100_000, at)} for at in range(1, 50)])
        follower = apexd.follow_lines(lambda offsets, lines: next(logs), 1, True)
        found = [line for _ in range(49) for _, line in next(follower)]
        assert len(found) >= 70 and {len(line) for line in found} == {most}

    @posix
    def test_missing_foreign_and_damaged_small_files_are_told_apart(self, tmp_path):
        """L13"""
        path = str(tmp_path / "small")
        assert apexd.read_file(path) is None and apexd.read_json(path) is None
        damaged = [b"", b"{", b"[1]", b'{"a": 1e999}', b'{"a": NaN}', b" " * 70000, b"\xff"]
        damaged += [b'{"a":' * 30000, b"[" * 60000, b'{"a":' * 5000 + b"1" + b"}" * 5000]
        for data in damaged:
            write(path, data)
            with pytest.raises(ValueError):
                apexd.read_json(path)
        assert apexd.read_json(write(path, '{"a": [1]}')) == {"a": [1]}
        others = [("PERMISSION_DENIED", lambda: write(path, "{}") and os.chmod(path, 0o622))]
        others += [("CANNOT_CREATE", act) for act in (
            lambda: os.mkfifo(path), lambda: os.mkdir(path), lambda: os.symlink("/etc/hosts", path)
        )]
        if IS_ROOT:
            others.append(("PERMISSION_DENIED", lambda: write(path, "{}") and os.chown(path, 65534, 0)))
        for code, make in others:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            make()
            for read_it in (apexd.read_file, apexd.read_json):
                assert refused(code, read_it, path).startswith(path)
            if os.path.isdir(path) and not os.path.islink(path):
                os.rmdir(path)

    @posix
    def test_a_spoilt_base_of_a_log_hinders_nobody(self, tmp_path):
        """L13"""
        path = write(str(tmp_path / "log"), "one\ntwo\n")
        for data in ("x", "9" * 70000, "-1e9", "", "\0"):
            write(path + ".base", data)
            assert apexd.read_log(path, 4) == (b"two\n", 8)
        os.unlink(path + ".base")
        os.mkfifo(path + ".base")
        assert apexd.read_log(path, 4) == (b"two\n", 8)

    @posix
    @pytest.mark.parametrize("name", ["daemon.lock", "endpoint", "daemon.pid"])
    def test_whatever_is_in_a_small_files_place_no_command_hangs_or_fails_oddly(self, box, name):
        """L13"""
        box.start()
        for data in (b"[" * 60000, b'{"pid": 1e999, "role": "daemon", "socket": 1e999}', b'{"folder": 7}'):
            write(box.file(name), data)
            for verb in ("status", "list"):
                assert box.run(verb, rc=None, timeout=30).returncode != 70
        pids = [pid for pid, words in box.processes().items() if "_daemon" in words]
        os.unlink(box.file(name))
        os.mkfifo(box.file(name))
        for verb in ("status", "list"):
            assert box.run(verb, rc=None, timeout=30).returncode != 70
        for pid in pids:
            kill(pid)
            eventually(lambda: not lives(pid))
        box.run("status", rc=None, timeout=30)
        os.unlink(box.file(name))


def give(path, user=65534):
    """Make a folder and all in it another user's."""
    for folder, _, names in os.walk(path):
        for one in (folder, *(os.path.join(folder, name) for name in names)):
            os.lchown(one, user, user)


@posix
class TestStateFolder:
    COMMANDS = (["list"], ["add", "--", "true"], ["status"], ["kill", "--all"], ["stop"], ["start"])

    def refuse(self, box, cwd=None):
        """Check that nothing in the folder is opened, written or run."""
        before = {one: os.lstat(one) for one in glob.glob(box.state + "/**", recursive=True)}
        for words in self.COMMANDS:
            error = box.error(*words, rc=77, cwd=cwd)
            assert error["code"] == "permission_denied" and error["hint"], words
        after = {one: os.lstat(one) for one in glob.glob(box.state + "/**", recursive=True)}
        changed = [p for p, a in after.items() if p not in before or a.st_mtime != before[p].st_mtime]
        assert changed == [] and not box.processes()
        return error

    @root
    def test_root_opens_nothing_in_a_folder_of_another_user(self, box):
        """S1: a prepared queue, and prepared bytecode (S1c), are not run."""
        box.add("touch", os.path.join(box.path, "ran"))
        for path in glob.glob(box.file("cache") + "/**/*.pyc", recursive=True):
            os.unlink(path)
        give(box.state)
        error = self.refuse(box)
        assert "belongs to nobody" in error["message"] and "sudo -u nobody" in error["hint"]
        done = subprocess.run([box.file("apexd"), "list"], env=box.env, capture_output=True)
        assert done.returncode == 77 and not os.path.exists(os.path.join(box.path, "ran"))
        assert os.listdir(box.file("cache")) == []
        give(box.state, 0)

    @root
    def test_root_runs_no_bytecode_that_another_user_prepared(self, box):
        """S1c"""
        box.start()
        box.stop()
        (path,) = glob.glob(box.file("cache") + "/**/*.pyc", recursive=True)
        ran = os.path.join(box.path, "ran")
        evil = marshal.dumps(compile(f"open({ran!r}, 'w').close()", "x", "exec"))
        with open(path, "r+b") as file:
            head = file.read(16)
        write(path, head + evil)
        give(box.state)
        for words in (["start"], ["list"]):
            box.run(*words, rc=77)
            done = subprocess.run([box.file("apexd"), *words], env=box.env, capture_output=True)
            assert done.returncode == 77 and not os.path.exists(ran)
        give(box.state, 0)

    def test_a_symbolic_link_is_no_state_folder(self, box):
        """S1b"""
        target = os.path.join(box.root, "target")
        os.rename(box.state, target)
        os.symlink(target, box.state)
        os.chmod(target, 0o755)
        assert "--state" in self.refuse(box)["hint"]
        assert os.listdir(target) == ["config.json"] and os.stat(target).st_mode & 0o777 == 0o755
        box.run("--state", target, "add", "--", "true")
        os.unlink(box.state)
        os.rename(target, box.state)

    @root
    def test_a_project_of_another_user_above_is_not_used(self, box):
        """S1d"""
        os.mkdir(os.path.join(box.path, ".git"))
        mine = os.path.join(box.path, "mine")
        os.mkdir(mine)
        box.add("true")
        give(box.state)
        os.chmod(box.path, 0o1777)
        self.refuse(box, cwd=mine)
        give(box.state, 0)

    def test_a_folder_that_others_may_write_is_refused(self, box):
        """S1e"""
        box.add("true")
        os.chmod(box.state, 0o770)
        assert "chmod go-w" in self.refuse(box)["hint"]
        os.chmod(box.state, 0o755)
        box.run("list")


class TestLauncher:
    def call(self, box, *words, rc=0, **options):
        """Run .apex/apexd."""
        program = [box.file("apexd")] if not IS_WINDOWS else [box.file("apexd.cmd")]
        options = {"env": box.env, "cwd": "/", "timeout": 60, **options}
        done = subprocess.run([*program, *words], capture_output=True, text=True, **options)
        assert rc is None or done.returncode == rc, done
        return done

    def pyc(self, box):
        (path,) = glob.glob(box.file("cache") + "/**/*.pyc", recursive=True)
        return path

    def test_it_is_the_command_line_of_its_project_from_any_folder(self, box, boxes):
        other = boxes()
        assert box.add("true") == 1
        env = {**box.env, "APEX_PROJECT_PATH": other.path, "PYTHONPATH": "/nonexistent/x"}
        add = ["add", "-p", "--", "sh", "-c", "echo $PYTHONPATH $PWD; exit 5"]
        assert self.call(box, *add, env=env, cwd=other.path).stdout == "2\n"
        box.start()
        assert self.call(box, "wait", "1", "2", rc=5).stdout == ""
        assert self.call(box, "logs", "2").stdout == f"/nonexistent/x {other.path}\n"
        assert json.loads(self.call(box, "--json", "status").stdout)["project"] == box.path
        assert json.loads(self.call(box, "--project", other.path, "-j", "list").stdout) == []
        link = os.path.join(box.root, "linked")
        os.symlink(box.file("apexd"), link)
        done = subprocess.run([link, "status"], env=box.env, cwd="/", capture_output=True)
        assert done.returncode == 0, done

    @linux
    def test_ps_shows_what_the_daemon_is(self, box):
        """L16"""
        pid = box.start()
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read().decode().split("\0")
        assert words[1:5] == ["-I", "-S", box.file("apexd"), "_daemon"]

    def test_a_start_stores_what_it_has_compiled(self, box):
        program = os.path.join(box.path, "apexd.py")
        eventually(lambda: time.time() - os.stat(program).st_ctime > 2.5, why="it is not fresh")
        marked = read(program).replace('__version__ = "', 'HERE = __file__\n__version__ = "')
        box.run("start", quick=False)
        data = open(self.pyc(box), "rb").read()
        assert data[8:12] == struct.pack("<I", int(os.stat(program).st_mtime))
        assert os.stat(self.pyc(box)).st_mode & 0o777 == 0o600
        box.run("restart", quick=False)
        assert open(self.pyc(box), "rb").read() == data, "stored once"
        write(program, marked)
        assert self.call(box, "status").stdout.startswith("running")
        assert open(self.pyc(box), "rb").read() != data, "compiled anew after a change"

    @pytest.mark.parametrize("size", [0, 8, 16, 5000])
    def test_damaged_bytecode_does_no_harm(self, box, size):
        box.start()
        data = open(self.pyc(box), "rb").read()
        write(self.pyc(box), data[:size] + bytes(5000 if size > 8 else 0))
        assert self.call(box, "status").stdout.startswith("running")

    def test_it_follows_what_moves_and_says_so_when_it_cannot(self, box):
        box.add("true")
        copy = os.path.join(box.root, "copy of it's")
        shutil.copytree(box.path, copy)
        command = [os.path.join(copy, ".apex", "apexd"), "-j", "doctor"]
        done = subprocess.run(command, env=box.env, cwd="/", capture_output=True, text=True)
        assert os.path.join(copy, "apexd.py") in done.stdout, "what is relative stays relative"
        program = os.path.join(box.path, "apexd.py")
        os.rename(program, os.path.join(box.root, "apexd.py"))
        done = self.call(box, "list", rc=78)
        assert program in done.stderr and "NEWPLACE/apexd.py start" in done.stderr
        words = [sys.executable, os.path.join(box.root, "apexd.py"), "--project", box.path, "add", "true"]
        subprocess.run(words, env=box.env, check=True, stdout=subprocess.DEVNULL)
        assert self.call(box, "list").stdout.count("true") == 2
        os.rename(os.path.join(box.root, "apexd.py"), program)

    @posix
    def test_the_interpreters_path_may_hold_anything_and_may_go(self, box):
        strange = os.path.join(box.root, "it's \"a\" $HOME " + "x" * 150)
        os.mkdir(strange)
        python = os.path.join(strange, "python3")
        os.symlink(sys.executable, python)
        env = {**box.env, "PYTHONHOME": sys.base_prefix}
        words = [python, os.path.join(box.path, "apexd.py"), "add", "true"]
        subprocess.run(words, env=env, check=True, stdout=subprocess.DEVNULL, cwd=box.path)
        assert strange in read(box.file("apexd")).replace("'\"'\"'", "'")
        assert self.call(box, "version", rc=None, env=env).returncode in (0, 1)
        os.unlink(python)
        assert "is gone" in self.call(box, "list", rc=78).stderr


# ============================================================================
# 6. CONFIG - what is wrong is named, and then nothing has changed
# ============================================================================


class TestConfig:
    def refuse(self, path):
        """Load a configuration that must be refused; return the message and the hint."""
        with pytest.raises(apexd.DaemonError) as caught:
            apexd.load_config(str(path))
        assert caught.value.code == "CONFIG_INVALID" and caught.value.exit_status == 78
        assert os.path.basename(str(path)) in caught.value.message
        assert "\n" not in caught.value.message
        return f"{caught.value.message} {caught.value.hint}"

    def load(self, tmp_path, text, name="config.json"):
        return apexd.load_config(write(str(tmp_path / name), text))

    def test_defaults_are_those_of_the_table(self):
        config = apexd.Config({"process": {"web": {"command": "serve"}}})
        tables = {"group": config.groups["default"], "process": config.processes["web"]}
        for kind in ("schedule", "watch", "hook"):
            tables[kind] = apexd.Config({})._read_section(kind, kind, {})
        for section, options in apexd.OPTIONS.items():
            values = vars(tables.get(section) or getattr(config, section))
            defaults = {key: default for key, (_, default, _) in options.items()}
            needed = {key: None for key in ("command", "cron") if key in defaults}
            assert {**values, **needed} == {**defaults, **needed}

    def test_defaults_are_what_their_own_readers_accept(self):
        for options in apexd.OPTIONS.values():
            for reader, default, meaning in options.values():
                assert default is None or reader(default) == default
                assert meaning and meaning == meaning.strip()

    def test_values_are_read(self, tmp_path):
        text = json.dumps({
            "daemon": {"poll_interval": "250ms", "max_concurrent": 7},
            "limits": {"timeout": 0, "retries": 2},
            "group": {"gpu": {"max_concurrent": 1}},
        })  # fmt: skip
        config = self.load(tmp_path, text)
        assert config.daemon.poll_interval == 0.25 and config.daemon.max_concurrent == 7
        assert not config.limits.timeout and config.limits.retries == 2
        assert set(config.groups) == {"default", "hooks", "gpu"}
        assert config.groups["gpu"].max_concurrent == 1

    @pytest.mark.parametrize(
        "data, words",
        [
            ({"daemon": {"pol_interval": 5}}, ["daemon.pol_interval", "poll_interval"]),
            ({"daemon": {"maxconcurrent": 5}}, ["daemon.maxconcurrent", "max_concurrent"]),
            ({"demon": {}}, ["demon", "daemon"]),
            ({"limits": {"time_out": 5}}, ["limits.time_out", "timeout"]),
            ({"group": {"gpu": {"max": 1}}}, ["group.gpu.max", "max_concurrent"]),
            ({"groups": {}}, ["groups", "group"]),
        ],
        ids=json.dumps,
    )
    def test_an_unknown_key_is_named_with_the_nearest(self, tmp_path, data, words):
        text = self.refuse(write(str(tmp_path / "config.json"), json.dumps(data)))
        assert f"{words[0]} is not an option" in text and f"did you mean {words[1]}?" in text

    @pytest.mark.parametrize("name", sorted(apexd.FORMER_NAMES))
    def test_a_former_name_is_answered_with_the_new_one(self, tmp_path, name):
        new = apexd.FORMER_NAMES[name].split(" ")[0]
        section, key = new.split(".")
        assert key in ("NAME", *apexd.OPTIONS[section])
        for data in ({name: 1}, {"daemon": {name: 1}}):
            assert new in self.refuse(write(str(tmp_path / "config.json"), json.dumps(data)))

    @pytest.mark.parametrize(
        "key, text",
        [
            ("daemon.max_concurrent", "true"),
            ("daemon.max_concurrent", "0"),
            ("daemon.max_concurrent", "-1"),
            ("daemon.max_concurrent", "1.5"),
            ("daemon.max_concurrent", "1e3"),
            ("daemon.max_concurrent", '"5x"'),
            ("daemon.max_concurrent", "null"),
            ("daemon.max_concurrent", "1" + "0" * 400),
            ("daemon.poll_interval", "true"),
            ("daemon.poll_interval", "-1"),
            ("daemon.poll_interval", "1e309"),
            ("daemon.poll_interval", "NaN"),
            ("daemon.poll_interval", '"5x"'),
            ("daemon.poll_interval", "null"),
            ("daemon.poll_interval", "[]"),
            ("daemon.env_keep", '"PATH"'),
            ("daemon.env_keep", "[1]"),
            ("daemon.stop_timeout", "-0.5"),
            ("log.level", '"loud"'),
            ("log.max_size_mb", "1e309"),
            ("log.max_size_mb", "false"),
            ("log.total_mb", "-1"),
            ("log.total_mb", "1" + "0" * 400),
            ("log.max_files", "0"),
            ("retention.tasks", "-1"),
            ("retention.days", "NaN"),
            ("limits.memory_mb", "0"),
            ("limits.memory_mb", "1e309"),
            ("limits.timeout", "true"),
            ("limits.retries", '"many"'),
            ("limits.max_cost", "-1"),
            ("group", "5"),
            ("group.gpu", "5"),
            ("group.gpu.max_concurrent", "0"),
            ("group.gpu.launcher", '"srun -n1"'),
            ("daemon", "5"),
            ("daemon", "[]"),
            ("limits", "null"),
        ],
    )
    def test_a_wrong_value_is_named_by_its_key(self, tmp_path, key, text):
        for part in reversed(key.split(".")):
            text = f'{{"{part}": {text}}}'
        message = self.refuse(write(str(tmp_path / "config.json"), text))
        assert key in message and " must be " in message

    def test_json_cut_off_anywhere_is_refused_with_its_line(self, tmp_path):
        text = json.dumps({"daemon": {"poll_interval": 5}, "limits": {"retries": 2}}, indent=1)
        for end in range(len(text)):
            message = self.refuse(write(str(tmp_path / "config.json"), text[:end]))
            assert re.search(r"line [0-9]+", message), message

    @pytest.mark.skipif(sys.version_info < (3, 11), reason="TOML needs Python 3.11")
    def test_toml_is_read_and_cut_off_anywhere_is_whole_or_refused(self, tmp_path):
        text = '[daemon]\npoll_interval = "2s"\n[group.gpu]\nmax_concurrent = 1\n'
        path = str(tmp_path / "config.toml")
        config = apexd.load_config(write(path, text))
        assert config.daemon.poll_interval == 2.0 and config.groups["gpu"].max_concurrent == 1
        refused = 0
        for end in range(len(text)):
            try:
                apexd.load_config(write(path, text[:end]))
            except apexd.DaemonError as error:
                assert error.code == "CONFIG_INVALID" and re.search(r"line [0-9]+|end of|group|daemon", error.message)
                refused += 1
        assert refused > len(text) // 2

    @pytest.mark.skipif(sys.version_info >= (3, 11), reason="of Python before 3.11")
    def test_toml_is_refused_with_what_to_do_where_it_cannot_be_read(self, tmp_path):
        message = self.refuse(write(str(tmp_path / "config.toml"), "[daemon]\nmax_concurrent = 2\n"))
        assert "config.json" in message

    def test_yaml_that_holds_json_needs_no_parser(self, tmp_path):
        config = self.load(tmp_path, '{"daemon": {"max_concurrent": 9}}', "config.yaml")
        assert config.daemon.max_concurrent == 9

    def test_yaml_is_read_or_refused_by_whether_there_is_a_parser(self, tmp_path):
        path = write(str(tmp_path / "config.yaml"), "daemon:\n  max_concurrent: 9\n")
        try:
            import yaml  # noqa: F401
        except ImportError:
            assert "yaml" in self.refuse(path).lower()
        else:
            assert apexd.load_config(path).daemon.max_concurrent == 9
            self.refuse(write(path, "daemon: [\n"))
            self.refuse(write(path, "- daemon\n"))

    GOOD = '{"daemon": {"max_concurrent": 9}, "group": {"Köln": {}}}'

    def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(self, tmp_path):
        text = b"\xef\xbb\xbf" + self.GOOD.replace(",", ",\r\n").encode()
        config = self.load(tmp_path, text)
        assert config.daemon.max_concurrent == 9 and "Köln" in config.groups

    @pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "latin-1", "cp037"])
    def test_another_encoding_is_refused(self, tmp_path, encoding):
        message = self.refuse(write(str(tmp_path / "config.json"), self.GOOD.encode(encoding)))
        assert "UTF-8" in message or "parsed" in message

    @pytest.mark.parametrize("name", ["config.json", "config.yaml", "config.toml"])
    @pytest.mark.parametrize(
        "data",
        [b"\0", b'{"daemon": {"max_concurrent": 9\0}}', b"", b"   ", b"[" * 100_000, b"[]", b"5", b"\xff"],
        ids=["NUL", "NUL inside", "empty", "blank", "deep", "a list", "a number", "a stray byte"],
    )
    def test_what_is_no_table_is_refused_or_empty(self, tmp_path, name, data):
        path = write(str(tmp_path / name), data)
        if name == "config.toml" and not data.strip():
            return
        self.refuse(path)

    def test_a_configuration_that_cannot_be_read_is_refused(self, tmp_path):
        os.mkdir(tmp_path / "config.json")
        self.refuse(tmp_path / "config.json")

    @posix
    def test_a_pipe_in_its_place_does_not_hang(self, box):
        os.unlink(box.file("config.json"))
        os.mkfifo(box.file("config.json"))
        try:
            assert box.error("config", rc=78, timeout=30)["code"] == "config_invalid"
        finally:
            os.unlink(box.file("config.json"))

    @root
    @posix
    def test_root_refuses_a_file_that_others_may_write(self, tmp_path):
        path = write(str(tmp_path / "config.json"), self.GOOD)
        os.chmod(path, 0o666)
        assert "others" in self.refuse(path)
        os.chmod(path, 0o600)
        os.chown(path, 65534, 65534)
        self.refuse(path)

    @pytest.mark.parametrize("verb", ["start", "restart", "config"])
    def test_a_broken_file_keeps_the_daemon_from_starting(self, box, verb):
        write(box.file("config.json"), '{"daemon": ')
        error = box.error(verb, rc=78)
        assert error["code"] == "config_invalid" and box.file("config.json") in error["message"]
        assert sorted(os.listdir(box.state)) == ["config.json"], "nothing is left behind"

    def test_the_effective_values_are_printed(self, box):
        shown = box.json("config")
        assert shown["path"] == box.file("config.json")
        assert shown["daemon"]["poll_interval"] == 0.2 and shown["limits"]["retries"] == 0
        assert "daemon.poll_interval = 0.2" in box.run("config").stdout

    def test_a_poll_interval_of_nothing_does_not_burn_the_processor(self, box):
        box.config({"daemon": {"poll_interval": 0}})
        if box.run("start", rc=None).returncode == 78:
            return
        pid = box.pid()

        def cpu_s():
            fields = read(f"/proc/{pid}/stat").rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

        if IS_LINUX:
            before, since = cpu_s(), time.monotonic()
            eventually(lambda: time.monotonic() - since > 0.6)
            assert cpu_s() - before < 0.25

    def test_plan_says_what_differs(self, tmp_path):
        old = self.load(tmp_path, '{"log": {"level": "info"}, "group": {"a": {}}}')
        new = self.load(tmp_path, '{"log": {"level": "debug"}, "group": {"b": {"max_concurrent": 1}}}')
        plan = old.plan(new)
        assert plan == ["added group.b", 'changed log.level: "info" -> "debug"', "removed group.a"]
        assert old.plan(old) == []

    def test_reload_prints_its_plan_and_does_it(self, box):
        box.start()
        assert box.run("reload").stdout == "nothing changed\n"
        box.config({"group": {"gpu": {"max_concurrent": 1}}, "limits": {"retries": 3}})
        plan = box.json("reload")["plan"]
        assert plan == ["added group.gpu", "changed limits.retries: 0 -> 3"]
        assert box.task(box.add("true", group="gpu"))["retries"] == 3

    def find_sleep(self, box):
        """Return the PIDs of the tasks that sleep."""
        return [pid for pid, words in box.processes().items() if words.startswith("sleep")]

    @pytest.mark.parametrize("how", ["verb", "SIGHUP"])
    @posix
    def test_a_reload_of_a_broken_file_changes_nothing(self, box, how):
        box.config({"group": {"gpu": {"max_concurrent": 1}}, "limits": {"retries": 3}})
        pid = box.start()
        running = box.add("sleep", "60", group="gpu")
        child = eventually(lambda: self.find_sleep(box))
        good = read(box.file("config.json"))

        def reload(refused):
            lines = box.log().count("reload")
            if how == "verb":
                box.run("reload", rc=78 if refused else 0)
            else:
                os.kill(pid, signal.SIGHUP)
            eventually(lambda: box.log().count("reload") > lines)

        def retries_of_a_new_task():
            fields = {"commands": [["true"]], "options": {"group": "gpu"}, "cwd": box.path}
            (task_id,) = box.request({"type": "add", **fields})["ids"]
            return box.look(task_id)["retries"]

        for text in (good[: len(good) // 2], '{"limits": {"retries": true}}', '{"demon": {}}', "\0"):
            write(box.file("config.json"), text)
            reload(refused=True)
            assert "reload refused" in box.log().strip().split("\n")[-1]
            assert retries_of_a_new_task() == 3
        assert box.pid() == pid and self.find_sleep(box) == child
        box.config({"group": {"gpu": {"max_concurrent": 1}}, "limits": {"retries": 4}})
        reload(refused=False)
        assert retries_of_a_new_task() == 4
        box.run("cancel", running)

    @posix
    def test_a_burst_of_hangups_ends_with_the_last_file(self, box):
        pid = box.start()
        for number in range(1, 41):
            box.config({"limits": {"retries": number}})
            os.kill(pid, signal.SIGHUP)
        eventually(lambda: box.task(box.add("true"))["retries"] == 40)
        assert "Traceback" not in box.log()


    def test_a_broken_file_hinders_no_client_of_a_running_daemon_and_its_good_part_is_shown(self, box):
        """T15"""
        box.config({"daemon": {"env_keep": ["KEPT"]}, "limits": {"timeout": 77}})
        box.start()
        data = {"daemon": {"env_keep": ["KEPT"], "pol_interval": 1}, "process": {
            "b": {"command": "x", "needs": ["a"]}, "a": {"command": "y"}, "c": {"command": 7}}, "z": 1}
        write(box.file("config.json"), json.dumps(data))
        done = box.run("add", "--wait", "--", "sh", "-c", "echo $KEPT", env={"KEPT": "k"})
        assert done.stdout == "k\n"
        for words in (["show", "1"], ["list"], ["status"], ["run", "--", "true"]):
            box.run(*words)
        done = box.run("config", rc=78)
        shown, told = done.stdout, done.stderr
        assert "process.b.needs" in shown and "process.a.command" in shown and "process.c" not in shown
        assert "KEPT" in shown and all(one in told for one in ("pol_interval", "process.c", "z is"))
        assert box.error("config", rc=78)["code"] == "config_invalid"
        for text in ("[", "[]", ""):
            write(box.file("config.json"), text)
            assert "daemon.poll_interval" in box.run("config", rc=78).stdout
        box.config({})
        box.stop()

    def test_two_files_are_refused_wherever_one_is_looked_for(self, box):
        pid = box.start()
        write(box.file("config.toml"), "")
        for words in (["config"], ["reload"], ["restart"], ["start"]):
            error = box.error(*words, rc=78)
            assert "config.toml and config.json are both there" in error["message"], error
            assert error["code"] == "config_invalid" and "remove one" in error["hint"]
        assert "both there" in box.run("doctor", rc=1).stdout
        assert box.run("status").stdout.startswith(f"running, PID {pid}")
        box.run("--config", box.file("config.json"), "config")
        box.stop()
        assert "both there" in box.error("add", "--", "true", rc=78)["message"]
        os.unlink(box.file("config.toml"))
        box.run("add", "--", "true")

    def test_config_and_doctor_refuse_what_start_refuses(self, box):
        box.config({"watch": {"w": {"paths": [], "command": "x"}}})
        for words in (["start"], ["config"]):
            assert "watch.w.paths = []: " in box.error(*words, rc=78)["message"]
        assert "BAD configuration: " in box.run("doctor", rc=1).stdout

    def test_the_good_part_of_a_broken_file_is_printed_as_json_too(self, box):
        box.config({"limits": {"retries": 7, "timeout": "soon"}, "demon": {}})
        done = box.run("--json", "config", rc=78)
        shown = json.loads(done.stdout)
        assert (shown["limits"]["retries"], shown["limits"]["timeout"]) == (7, 7200.0)
        assert [("demon" in one, "limits.timeout" in one) for one in shown["faults"]] == [(True, False), (False, True)]
        assert json.loads(done.stderr)["error"]["message"] == shown["faults"][0]

    def test_a_wrong_variable_is_named(self, box):
        error = box.error("config", rc=78, env={"APEX_POLL_INTERVAL": "abc"})
        assert "APEX_POLL_INTERVAL: 'abc'" in error["message"] and error["hint"] == "unset it"

    @posix
    def test_a_configuration_may_be_a_link(self, box):
        os.rename(box.file("config.json"), os.path.join(box.path, "mine.json"))
        os.symlink("../mine.json", box.file("config.json"))
        assert json.loads(box.run("config", "--json").stdout)["daemon"]["poll_interval"] == 0.2


# ============================================================================
# 7. LOG - one line an event, in one form; rotation loses none
# ============================================================================

LOG_LINE = re.compile(
    r"\[[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:]{8}\.[0-9]{3}Z\] \[(DEBUG|INFO|WARN|ERROR)\] \S.*"
)


class TestLog:
    def rotated(self, box):
        """Return the lines of all daemon logs, oldest first."""
        names = [n for n in os.listdir(box.state) if re.fullmatch(r"daemon\.log(\.[0-9]+)?", n)]
        names.sort(key=lambda name: -int(name.partition("log.")[2] or 0))
        return "".join(read(box.file(name)) for name in names).splitlines()

    def test_every_line_has_one_form(self, box):
        box.start()
        ids = [box.add("true"), box.add("sh", "-c", "exit 3"), box.add("/nope/nope")]
        for task_id in ids:
            box.until(task_id)
        box.run("reload")
        box.stop()
        lines = box.log().splitlines()
        assert [line for line in lines if not LOG_LINE.fullmatch(line)] == []
        assert any("Starting task 1" in line for line in lines)

    def test_an_event_is_one_line_whatever_a_user_writes(self, box):
        box.start()
        evil = "/nope/x\n[2025-01-15T10:30:05.456Z] [ERROR] forged \x1b[2J\r\u202e"
        box.until(box.add(evil, "y"))
        with contextlib.suppress(OSError):
            box.request({"type": evil})
        box.stop()
        log = box.log()
        assert not re.search(r"(?m)^\[2025-01-15T10:30:05", log)
        assert "\x1b" not in log and "\r" not in log and "\u202e" not in log
        finished = [line for line in log.splitlines() if "Task 1 ended, " in line]
        assert len(finished) == 1

    def test_rotation_loses_no_line_and_keeps_to_its_size(self, box):
        box.config({"log": {"max_size_mb": 0.002, "max_files": 100}, "daemon": {"max_concurrent": 8}})
        box.start()
        ids = box.batch(["true"] * 60)
        for task_id in ids:
            box.until(task_id)
        box.stop()
        text = "\n".join(self.rotated(box))
        for task_id in ids:
            assert len(re.findall(rf"Starting task {task_id}$", text, re.M)) == 1
            assert len(re.findall(rf"Task {task_id} completed ", text)) == 1
        sizes = [os.stat(box.file(n)).st_size for n in os.listdir(box.state) if "daemon.log" in n]
        assert len(sizes) > 3 and max(sizes) < 2000, "a line's head is only reckoned"

    def test_no_more_logs_are_kept_than_wanted(self, box):
        box.config({"log": {"max_size_mb": 0.001, "max_files": 2}, "daemon": {"max_concurrent": 8}})
        box.start()
        settle(box, box.batch(["true"] * 40))
        box.stop()  # then no file is on its way from one name to the next
        names = sorted(n for n in os.listdir(box.state) if n.startswith("daemon.log"))
        assert names == ["daemon.log", "daemon.log.1", "daemon.log.2"]

    def test_a_restart_goes_on_in_the_same_file(self, box):
        first, second = (box.start(), box.stop(), box.start())[::2]
        assert box.log().count("ready") == 2
        assert f"PID {first}" in box.log() and f"PID {second}" in box.log()

    def test_the_level_decides_and_reload_changes_it(self, box):
        box.config({"log": {"level": "error"}})
        box.start()
        box.until(box.add("true"))
        assert "Starting task" not in box.log()
        box.config({"log": {"level": "info"}})
        box.run("reload")
        box.until(box.add("true"))
        eventually(lambda: "Starting task 2" in box.log())

    @posix
    def test_usr2_opens_the_log_again(self, box):
        pid = box.start()
        os.rename(box.file("daemon.log"), box.file("old"))
        os.kill(pid, signal.SIGUSR2)
        eventually(lambda: "reopened" in box.log())
        assert "ready" in read(box.file("old"))

    def test_the_foreground_logs_to_standard_error_too(self, box):
        child = box.popen("start", "--foreground")
        eventually(lambda: "ready" in box.log())
        box.stop()
        out, err = child.communicate(timeout=20)
        assert child.returncode == 0
        lines = err.decode().splitlines()
        assert out == b"" and lines == box.log().splitlines()
        assert all(LOG_LINE.fullmatch(line) for line in lines)


# ============================================================================
# 8. PIDFILE - one daemon a project, and nobody else is ever signalled
# ============================================================================


@pytest.fixture
def bystander():
    """Give a process that is none of apexd's business; it must live to the end."""
    child = subprocess.Popen([sys.executable, "-S", "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    yield child.pid
    was_alive = child.poll() is None
    child.communicate()
    assert was_alive, "a bystander was signalled"


def find_public_python():
    """Return an interpreter that every user may run, or skip the test."""
    code = "import sys, sqlite3, subprocess; sys.exit(sys.version_info < (3, 9) or "
    code += "subprocess.call([sys.executable, '-c', 'pass']))"
    for python in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        argv = ["setpriv", "--reuid", "65534", "--clear-groups", python, "-c", code]
        with contextlib.suppress(OSError):
            if subprocess.run(argv, stderr=subprocess.DEVNULL).returncode == 0:
                return python
    return pytest.skip("needs setpriv and an interpreter that every user may run")


@pytest.fixture(scope="class")
def refused_by_a_lock():
    """Begin commands in a project whose lock a program holds: they wait while others are tested."""
    box = Box()
    box.add("true")
    with locked(box.file("daemon.lock")):
        verbs = (["start"], ["start", "--foreground"], ["add", "true"], ["list"], ["stop"])
        yield box, [box.popen("--json", *args) for args in verbs]
    complaints = box.close()
    shutil.rmtree(box.root)
    assert not complaints


@pytest.mark.usefixtures("refused_by_a_lock")
class TestPidFile:
    def daemons(self, box):
        """Return the PIDs of the daemons of this project that live."""
        return [pid for pid, words in box.processes().items() if "_daemon" in words or "pycache_prefix" in words]

    def hold(self, path, role="client test", **changes):
        """Return a program's argv that takes the lock as apexd does and holds it."""
        code = (
            f"import sys; sys.pycache_prefix = {BYTECODE.name!r}; sys.path.insert(0, sys.argv[1])\n"
            "import apexd; file = apexd.PidFile(sys.argv[2])\n"
            "print(file.acquire(sys.argv[3], '/p'), flush=True); sys.stdin.read(); file.release()"
        )
        return [sys.executable, "-S", "-c", code, HERE, path, role]

    @contextlib.contextmanager
    def holding(self, path, role="client test"):
        pipe = subprocess.PIPE
        with subprocess.Popen(self.hold(path, role), stdin=pipe, stdout=pipe) as other:
            try:
                assert other.stdout.readline() == b"True\n"
                yield other
            finally:
                if other.poll() is None:
                    other.communicate()

    def test_one_of_two_processes_gets_it(self, tmp_path):
        path = str(tmp_path / "daemon.pid")
        mine = apexd.PidFile(path)
        with self.holding(path, "daemon") as other:
            assert mine.acquire() is False
            assert mine.read()["pid"] == other.pid
            holder = mine.holder()
            assert (holder.pid, holder.role) == (other.pid, "daemon")
        assert mine.holder() is None and mine.read() == {} and not os.path.exists(path)
        assert mine.acquire() is True
        mine.release()
        assert mine.holder() is None and os.path.exists(str(tmp_path / "daemon.lock"))

    def test_a_killed_owner_leaves_its_file_but_no_lock(self, tmp_path):
        path = str(tmp_path / "daemon.pid")
        with self.holding(path, "daemon") as other:
            other.kill()
            other.wait()
        mine = apexd.PidFile(path)
        assert mine.read()["pid"] == other.pid and mine.holder() is None
        assert mine.acquire("daemon", "/p")
        fields = mine.read()
        mine.release()
        assert fields["pid"] == os.getpid() and fields["projectPath"] == "/p"
        assert fields["version"] == apexd.__version__
        assert re.fullmatch(r"[0-9-]{10}T[0-9:]{8}\.[0-9]{3}Z", fields["startedAt"])

    def test_a_client_hold_writes_no_pid_file(self, tmp_path):
        path = str(tmp_path / "daemon.pid")
        with self.holding(path, "client add") as other:
            holder = apexd.PidFile(path).holder()
            assert (holder.pid, holder.role) == (other.pid, "client add")
            assert not os.path.exists(path)

    def test_n_processes_race_and_one_wins(self, tmp_path):
        path = str(tmp_path / "daemon.pid")
        for _ in range(ROUNDS):
            pipe = subprocess.PIPE
            racers = [
                subprocess.Popen(self.hold(path, "daemon"), stdin=pipe, stdout=pipe)
                for _ in range(5)
            ]
            answers = [racer.stdout.readline() for racer in racers]
            assert sorted(answers) == [b"False\n"] * 4 + [b"True\n"]
            winner = racers[answers.index(b"True\n")]
            assert apexd.PidFile(path).read()["pid"] == winner.pid
            for racer in racers:
                racer.communicate()

    def test_fifty_starts_at_once_make_one_daemon(self, box):
        box.warm()
        starts = [box.popen("--json", "start", quick=True) for _ in range(50)]
        answers = [(each.communicate(timeout=120), each.returncode) for each in starts]
        assert [answer for answer in answers if answer[1] != 0] == []
        told = [json.loads(out) for (out, _), _ in answers]
        assert {each["pid"] for each in told} == {box.pid()}
        assert sum(not each["already_running"] for each in told) == 1
        if IS_LINUX:
            assert self.daemons(box) == [box.pid()]

    def test_start_says_who_runs_already(self, box):
        pid = box.start()
        done = box.run("start")
        assert done.stdout == f"already running, PID {pid}\n" and box.pid() == pid

    STRANGE = {
        "empty": "",
        "abc": "abc",
        "-1": "-1",
        "0": "0",
        "1": "1",
        "a list": "[]",
        "deep": "[" * 100_000,
        "one MiB": "9" * (1 << 20),
        "NULs": "\0" * 100,
        "no number": '{"pid": "1"}',
        "true": '{"pid": true}',
        "zero": '{"pid": 0}',
        "minus one": '{"pid": -1}',
        "too large": '{"pid": 4294967297}',
        "a fraction": '{"pid": 1.5}',
        "no pid": '{"startedAt": "2025-01-15T10:30:00.000Z"}',
    }

    def test_a_pid_file_without_a_pid_is_corrupt_signals_nobody_and_hinders_no_start(self, box):
        path = box.file("daemon.pid")
        for name, text in self.STRANGE.items():
            write(path, text)
            with pytest.raises(apexd.DaemonError) as caught:
                apexd.PidFile(path).read()
            assert caught.value.code == "PID_FILE_CORRUPTED", name
        for name in ("empty", "-1", "one MiB"):  # by the command line: it takes longer
            write(path, self.STRANGE[name])
            assert "holds no PID" in box.run("status", rc=4).stdout, name
            assert box.run("stop").stdout == "not running\n"
        assert box.run("kill", "--all").stdout == "not running\n"
        pid = box.start()
        assert json.loads(read(path))["pid"] == pid
        box.stop()
        assert not os.path.exists(path)

    def test_a_pid_file_that_names_another_program_signals_nobody(self, box, bystander):
        for pid in (bystander, 1):
            text = json.dumps({"pid": pid, "startedAt": "2025-01-15T10:30:00.000Z"})
            write(box.file("daemon.pid"), text)
            assert str(pid) in box.run("status", rc=1).stdout
            for args in (["stop", "--force", "--timeout", "0.1"], ["kill", "--all"]):
                assert box.run(*args).stdout == "not running\n"
        new = box.start()
        assert box.pid() == new != 1

    def test_a_pid_file_of_a_dead_daemon_is_told_and_replaced(self, box):
        box.start()
        dead = box.kill9()
        assert str(dead) in box.run("status", rc=1).stdout
        assert box.run("stop").stdout == "not running\n"
        assert box.start() != dead
        box.run("status", rc=0)
        box.stop()
        box.run("status", rc=3)

    @posix
    def test_a_pid_file_that_is_a_symbolic_link_costs_its_target_nothing(self, box, bystander):
        victim = write(os.path.join(box.root, "victim"), json.dumps({"pid": bystander}))
        os.symlink(victim, box.file("daemon.pid"))
        box.run("status", rc=None)
        assert box.run("stop").stdout == "not running\n"
        box.start()
        assert not os.path.islink(box.file("daemon.pid"))
        box.stop()
        assert json.loads(read(victim)) == {"pid": bystander}

    def test_a_lock_file_that_names_another_program_is_not_believed(self, box, bystander):
        started = apexd.Platform.start_time(bystander)
        fields = {"pid": bystander, "start_time": started, "role": "daemon"}
        write(box.file("daemon.lock"), json.dumps({**fields, "boot_id": apexd.Platform.boot_id()}))
        assert box.run("stop").stdout == "not running\n"
        assert box.run("kill", "--all").stdout == "not running\n"
        assert box.start() != bystander

    @root
    @posix
    def test_a_lock_file_that_others_may_write_moves_root_to_nothing(self, box, bystander):
        lock = box.file("daemon.lock")
        fields = {"pid": bystander, "start_time": apexd.Platform.start_time(bystander)}
        fields.update(boot_id=apexd.Platform.boot_id(), role="daemon")
        write(lock, json.dumps(fields))
        os.chown(lock, 65534, 65534)
        with locked(lock):
            for verb in ("stop", "kill"):
                assert box.error(verb, rc=77)["code"] == "permission_denied"
        os.unlink(lock)

    def test_the_pid_in_the_file_may_be_our_own(self, box):
        """A container's every start has the same PID: the file of the last one is stale."""
        script = f'echo "{{\\"pid\\": $$}}" > {box.file("daemon.pid")}; exec "$@"'
        argv = ["sh", "-c", script, "sh", *box.command("start", "--foreground")]
        child = subprocess.Popen(argv, cwd=box.path, env=box.env, stderr=subprocess.DEVNULL)
        try:
            eventually(lambda: "ready" in box.log())
            assert box.pid() == child.pid
            box.run("status", rc=0)
            assert box.stop().stdout == f"stopped, PID {child.pid}\n"
            assert child.wait(20) == 0
        finally:
            child.kill()
            child.wait()

    def test_an_old_daemon_does_not_remove_the_pid_file_of_a_new_one(self, box):
        pid = box.start()
        other = json.dumps({"pid": pid + 1})
        write(box.file("daemon.pid"), other)
        box.stop()
        assert read(box.file("daemon.pid")) == other
        os.unlink(box.file("daemon.pid"))

    def test_stops_and_starts_that_cross_leave_one_daemon_or_none(self, box):
        for _ in range(ROUNDS):
            box.start()
            crossing = [box.popen(verb, quick=True) for verb in ("stop", "start", "start")]
            for each in crossing:
                out, err = each.communicate(timeout=60)
                assert each.returncode == 0, (each.args, out, err)
            code = box.run("status", rc=None).returncode
            assert code in (0, 3)
            if code == 0:
                assert lives(box.pid())
            if IS_LINUX:
                assert len(self.daemons(box)) == (code == 0)

    def test_a_client_that_holds_the_lock_is_outwaited(self, box):
        started = time.monotonic()
        with self.holding(box.file("daemon.pid"), "client add") as other:
            starting = box.popen("start")
            eventually(lambda: time.monotonic() - started > 0.7)
            assert starting.poll() is None
            other.communicate()
            starting.communicate(timeout=20)
        assert starting.returncode == 0 and lives(box.pid())

    @linux
    def test_a_start_with_its_descriptors_closed_opens_no_file_as_0_to_2(self, box):
        argv = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *box.command("start")]
        subprocess.run(argv, cwd=box.path, env=box.env, check=True)
        links = {n: os.readlink(f"/proc/{box.pid()}/fd/{n}") for n in (0, 1, 2)}
        assert links == {0: os.devnull, 1: os.devnull, 2: os.devnull}
        assert box.until(box.add("true"))["state"] == "succeeded"

    @linux
    def test_the_foreground_with_its_descriptors_closed_opens_no_file_as_0_to_2(self, box):
        argv = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *box.command("start", "--foreground")]
        child = subprocess.Popen(argv, cwd=box.path, env=box.env)
        try:
            eventually(lambda: "ready" in box.log())
            links = {n: os.readlink(f"/proc/{child.pid}/fd/{n}") for n in (0, 1, 2)}
            assert links == {0: os.devnull, 1: os.devnull, 2: os.devnull}
            box.stop()
            assert child.wait(20) == 0
        finally:
            child.kill()
            child.wait()

    @linux
    def test_a_start_lets_go_of_everything_of_its_caller(self, box):
        reader, writer = os.pipe()
        os.set_inheritable(writer, True)
        done = subprocess.Popen(
            box.command("start"), cwd=box.path, env=box.env, stdout=writer, stderr=writer,
            pass_fds=[writer],
        )  # fmt: skip
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:  # end-of-file comes: the daemon has no copy
            assert pipe.read() == f"started, PID {box.pid()}\n".encode() if not done.wait(20) else 0
        pid = box.pid()
        fields = read(f"/proc/{pid}/stat").rpartition(")")[2].split()
        assert fields[3] != str(os.getsid(0)) and fields[4] == "0", "no terminal, own session"
        links = [os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")]
        ours = ("socket:", "anon_inode:", "/dev/null", box.state, "pipe:")
        assert [link for link in links if not link.startswith(ours)] == []

    @linux
    def test_signals_that_the_caller_ignored_or_blocked_are_not(self, box):
        code = (
            "import os, signal, sys\n"
            "for s in ('CHLD', 'HUP', 'TERM', 'INT', 'PIPE', 'USR1'):\n"
            "    signal.signal(getattr(signal, 'SIG' + s), signal.SIG_IGN)\n"
            "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGHUP})\n"
            "os.execv(sys.argv[1], sys.argv[1:])"
        )
        argv = [sys.executable, "-S", "-c", code, *box.command("start")]
        done = subprocess.run(argv, cwd=box.path, env=box.env, stdout=subprocess.PIPE)
        assert done.returncode == 0, done

        def mask(text, name):
            return int(re.search(rf"(?m)^{name}:\s+([0-9a-f]+)$", text)[1], 16)

        daemon = read(f"/proc/{box.pid()}/status")
        assert mask(daemon, "SigBlk") == 0
        for name in ("CHLD", "HUP", "TERM", "INT", "USR1"):
            assert not mask(daemon, "SigIgn") >> (getattr(signal, "SIG" + name) - 1) & 1, name
        failed = box.until(box.add("false"))
        assert (failed["state"], failed["exit_code"]) == ("failed", 1)
        task = box.add("cat", "/proc/self/status")
        box.until(task)
        status = box.output(task)
        assert mask(status, "SigBlk") == 0 and mask(status, "SigIgn") & ~(3 << 31) == 0, "but what glibc leaves"
        box.stop()

    @linux
    def test_the_lock_is_not_inherited_by_tasks(self, box):
        box.start()
        task = box.add("sleep", "60")
        box.until(task, "running")
        dead = box.kill9()
        assert box.start() != dead
        assert box.until(task, "running")["attempts"] == 1, "adopted"
        box.run("cancel", task)
        box.until(task, "cancelled")

    def test_a_start_warns_of_nothing(self, box):
        assert box.run("start", env={"PYTHONWARNINGS": "error", "PYTHONDEVMODE": "1"}).stderr == ""

    @posix
    def test_a_current_folder_that_is_gone_does_no_harm(self, box):
        gone = os.path.join(box.root, "gone")
        os.mkdir(gone)
        script = f'cd {gone} && rmdir {gone} && exec "$@"'

        def run(*args):
            argv = ["sh", "-c", script, "sh", *box.command(*args)]
            done = subprocess.run(argv, env=box.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            assert b"Traceback" not in done.stderr and b"a bug" not in done.stderr, done
            if not os.path.exists(gone):
                os.mkdir(gone)
            return done.returncode

        assert run("--project", box.path, "start") == 0
        assert run("--project", box.path, "status") == 0
        assert run("--project", box.path, "add", "--dir", box.path, "true") in (0, 2)
        assert run("status") in (2, 73)
        assert run("--project", box.path, "list") == 0
        assert run("--project", box.path, "stop") == 0

    @root
    @posix
    def test_a_folder_that_cannot_be_written_is_named_and_nothing_is_left(self, box):
        python = find_public_python()
        box.config(None)
        os.rmdir(box.state)
        os.chmod(box.root, 0o755)
        argv = ["setpriv", "--reuid", "65534", "--clear-groups", python, "apexd.py"]
        for verb in (["start"], ["add", "true"]):
            done = subprocess.run(
                argv + verb, cwd=box.path, env=box.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            assert done.returncode in (73, 77) and b".apex" in done.stderr, done
            assert os.listdir(box.path) == ["apexd.py"] and not box.processes()

    @posix
    def test_a_lock_that_another_program_holds_is_told_with_75(self, refused_by_a_lock):
        box, waiting = refused_by_a_lock
        for each in waiting:
            out, err = each.communicate(timeout=30)
            assert each.returncode == 75, (each.args, out, err)
            assert out == b"" and (b"hint" in err or b"apexd: " in err)
        assert self.daemons(box) == []
        left = {"config.json", "daemon.lock", "run", "logs", "cache", ".gitignore", "apex.db", "apexd", "ballast", "events.log"}
        assert set(os.listdir(box.state)) <= left


    @pytest.mark.parametrize("verb", ["stop", "kill"])
    def test_a_removed_lock_file_hides_no_daemon(self, box, verb):
        """L6"""
        box.config({"daemon": {"poll_interval": 60}})
        pid = box.start()
        os.unlink(box.file("daemon.lock"))
        assert str(pid) in box.run(verb).stdout and not lives(pid)

    def test_a_daemon_makes_its_removed_lock_file_anew(self, box):
        """L6"""
        pid = box.start()
        os.unlink(box.file("daemon.lock"))
        held = apexd.PidFile(box.file("daemon.pid"))
        assert eventually(held.holder).pid == pid
        os.unlink(box.file("daemon.lock"))
        with locked(box.file("daemon.lock")):
            assert box.run("status").stdout.startswith("running"), "a client's hold is waited for"
        eventually(lambda: (held.holder() or apexd.Holder()).pid == pid)

    @root
    @linux
    def test_a_read_only_disk_keeps_nobody_from_asking_and_stopping(self, box):
        """L7"""
        view = os.path.join(box.root, "view")
        os.mkdir(view)
        words = ["mount", "--bind", box.path, view], ["mount", "-o", "remount,bind,ro", view]
        for verb in ("stop", "kill"):
            pid = box.start()
            if any(subprocess.run(one, capture_output=True).returncode for one in words):
                pytest.skip("cannot mount here")
            try:
                where = ("--project", view)
                assert box.run(*where, "status").stdout.startswith("running")
                assert str(pid) in box.run(*where, verb).stdout and not lives(pid)
            finally:
                subprocess.run(["umount", "-l", view], check=True)
            for name in ("daemon.pid", "control.sock", "endpoint"):  # of the one that was killed
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(box.file(name))

    def test_an_old_daemon_leaves_the_files_of_a_new_one_alone(self, box):
        """L8"""
        box.config({"daemon": {"poll_interval": 0.5}})
        old = box.start()
        shutil.rmtree(box.state)
        box.config({"daemon": {"poll_interval": 60}})
        new = box.start()
        eventually(lambda: not lives(old))
        assert box.run("status").stdout.startswith(f"running, PID {new}")
        assert box.pid() == new and os.path.exists(box.file("state.json"))


# ============================================================================
# 9. STORE - what was acknowledged is kept, in order, once; what is odd is refused
# ============================================================================


class Queue:
    """A TaskStore of its own and a DaemonRunner that carries tasks out by a function."""

    def __init__(self, folder, **sections):
        self.path = os.path.join(str(folder), ".apex", "apex.db")
        config = write(os.path.join(str(folder), "config.json"), json.dumps({**FAST, **sections}))
        self.store = apexd.TaskStore(self.path, apexd.load_config(config))
        self.ran = []
        self.codes = {}  # exit status by the command's first word
        self.runner = None

    def add(self, *commands, **options):
        """Add tasks with the same options; return their ids."""
        return self.store.add([[c] if isinstance(c, str) else c for c in commands], options)

    def execute(self, task):
        self.ran.append(task.id)
        return self.codes.get(task.command[0], 0)

    def run(self, *ids, execute=None):
        """Run until these tasks are finished; return the ids in the order they ran."""
        self.runner = apexd.DaemonRunner(self.store, execute=execute or self.execute)
        self.runner.start()
        try:
            for task_id in ids:
                eventually(lambda: self.state(task_id) in ("succeeded", "failed", "skipped", "cancelled"))
        finally:
            self.runner.stop(0)
        return self.ran

    def state(self, task_id):
        return self.store.get(task_id).state.value

    def states(self, *ids):
        return [self.state(task_id) for task_id in ids]

    def real_counts(self):
        """Count the tasks themselves: {state: {group: n}}."""
        counts = {}
        for task in self.store.find(limit=10**9):
            groups = counts.setdefault(task.state.value, {})
            groups[task.group] = groups.get(task.group, 0) + 1
        return counts

    def close(self):
        self.store.close()


@pytest.fixture
def queue(tmp_path):
    """Give a queue with groups a (one at a time) and b (two), and one slot in all."""
    made = Queue(
        tmp_path,
        daemon={**FAST["daemon"], "max_concurrent": 1, "poll_interval": 0.05},
        group={"a": {"max_concurrent": 1}, "b": {"max_concurrent": 2}},
    )
    yield made
    assert made.store.get_counts() == made.real_counts(), "the counts went wrong"
    made.close()


def refused(code, function, *args, **options):
    """Call what must raise a DaemonError of this code; return its message."""
    with pytest.raises(apexd.DaemonError) as caught:
        function(*args, **options)
    assert caught.value.code == code, caught.value.message
    return caught.value.message


class TestOrder:
    def test_priority_goes_first_then_who_came_first(self, queue):
        low = queue.add("x", "x", priority=-5)
        plain = queue.add("x", "x", "x")
        high = queue.add("x", "x", priority=10)
        late = queue.add("x")
        assert queue.run(*low, *late) == [*high, *plain, *late, *low]

    def test_priorities_count_across_groups(self, queue):
        ids = [queue.add("x", group=g, priority=p)[0] for g, p in (("a", 1), ("b", 3), ("default", 2), ("a", 3))]
        assert queue.run(*ids) == [ids[1], ids[3], ids[2], ids[0]]

    def test_a_group_has_its_own_limit_under_the_common_one(self, tmp_path):
        queue = Queue(
            tmp_path,
            daemon={**FAST["daemon"], "max_concurrent": 4},
            group={"a": {"max_concurrent": 1}, "b": {"max_concurrent": 2}},
        )
        lock, now, most = threading.Lock(), {}, {}
        gate, full = threading.Event(), threading.Event()

        def execute(task):
            with lock:
                for name in (task.group, "all"):
                    now[name] = now.get(name, 0) + 1
                    most[name] = max(most.get(name, 0), now[name])
                if now["all"] == 4:
                    full.set()
            full.wait(10)
            gate.wait(0.02)
            with lock:
                for name in (task.group, "all"):
                    now[name] -= 1

        ids = [queue.add("x", group=g)[0] for g in ("a", "b", "default") * 8]
        queue.run(*ids, execute=execute)
        queue.close()
        assert most == {"a": 1, "b": 2, "default": most["default"], "all": 4}

    def test_a_full_group_in_front_holds_nobody_up(self, tmp_path):
        queue = Queue(
            tmp_path, daemon={**FAST["daemon"], "max_concurrent": 2}, group={"a": {"max_concurrent": 1}}
        )
        front = queue.add(*["slow"] * 3, group="a", priority=100)
        others = queue.add(*["x"] * 5)
        gate, order = threading.Event(), []

        def execute(task):
            order.append(task.id)
            if task.id == front[0]:
                gate.wait(10)
            elif task.id == others[-1]:
                gate.set()

        queue.run(*front, *others, execute=execute)
        queue.close()
        assert order[:6] == [front[0], *others] or set(order[:6]) == {front[0], *others}

    def test_pause_lets_nothing_start_and_what_runs_go_on(self, queue):
        first, second = queue.add("x", group="a"), queue.add("x", group="b")
        queue.store.pause("a", True)
        assert queue.run(*second) == second and queue.states(*first) == ["queued"]
        queue.store.pause(None, True)
        third = queue.add("x", group="b")
        assert queue.store.get_paused() == ["*", "a"]
        queue.store.pause(None, False)
        assert queue.store.get_paused() == []
        assert queue.run(*first, *third) == [*second, *first, *third]

    def test_pause_of_everything_over_the_command_line(self, box):
        box.start()
        assert "everything" in box.run("pause").stdout
        task = box.add("true")
        assert "paused" in box.run("why", task).stdout
        assert box.json("resume") == {"paused": []}
        assert box.until(task)["state"] == "succeeded"
        assert box.error("pause", "--group", "nope", rc=2)["code"] == "unknown_group"

    def test_a_delayed_task_is_not_early_and_not_forgotten(self, queue):
        began = time.time()
        (late,), (now,) = queue.add("x", delay=1), queue.add("x")
        task = queue.store.get(late)
        assert task.state.value == "scheduled" and 1 <= task.due_at - began < 10
        assert queue.run(late, now) == [now, late]
        assert queue.store.get(late).started_at >= task.due_at

    def test_a_failed_task_is_retried_as_often_as_told(self, queue):
        queue.codes["bad"] = 3
        (task,) = queue.add("bad", retries=2)

        def seen():
            for due in self.scheduled(queue):
                assert due.due_at - time.time() < 4, "the first delays are short"
            return queue.state(task) == "failed"

        queue.runner = apexd.DaemonRunner(queue.store, execute=queue.execute)
        queue.runner.start()
        eventually(seen, 20)
        queue.runner.stop(0)
        history = queue.store.get_attempts(task)
        assert queue.ran == [task] * 3
        assert [(a["number"], a["outcome"], a["exit_code"]) for a in history] == [
            (1, "failed", 3), (2, "failed", 3), (3, "failed", 3)
        ]  # fmt: skip

    def scheduled(self, queue):
        return queue.store.find(state="scheduled")


class TestDependencies:
    @pytest.mark.parametrize(
        "need, code, state",
        [
            ("ok", 0, "succeeded"), ("ok", 1, "skipped"), ("fail", 0, "skipped"),
            ("fail", 1, "succeeded"), ("any", 0, "succeeded"), ("any", 1, "succeeded"),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("when", ["before", "after"])
    def test_a_need_is_met_or_the_task_is_skipped(self, queue, need, code, state, when):
        queue.codes["parent"] = code
        (parent,) = queue.add("parent")
        if when == "after":
            queue.run(parent)
        (child,) = queue.add("child", after=[f"{parent}:{need}"])
        queue.run(parent, child)
        assert queue.state(child) == state
        assert (child in queue.ran) == (state == "succeeded")

    def test_a_task_waits_for_all_of_its_parents(self, queue):
        parents = queue.add("x", "x", "x")
        (child,) = queue.add("x", after=[f"{parents[0]}-{parents[1]}:ok", f"{parents[2]}:any"], priority=99)
        assert queue.states(child) == ["waiting"]
        assert queue.run(child) == [*parents, child]

    def test_a_parent_named_twice_counts_once(self, queue):
        (parent,) = queue.add("x")
        (child,) = queue.add("x", after=[str(parent), str(parent)])
        (other,) = queue.add("x", after=f"{parent},{parent}-{parent}")
        queue.run(parent)
        queue.run(*queue.add("x"))
        assert queue.states(child, other) == ["succeeded", "succeeded"]

    def test_a_skip_goes_down_the_graph_and_any_survives_it(self, queue):
        queue.codes["parent"] = 1
        (a,) = queue.add("parent")
        (b,) = queue.add("x", after=str(a))
        (c,) = queue.add("x", after=str(b))
        (d,) = queue.add("x", after=f"{c}:any")
        (e,) = queue.add("x", after=f"{c}:fail")
        queue.run(a, b, c, d, e)
        assert queue.states(a, b, c, d, e) == ["failed", "skipped", "skipped", "succeeded", "skipped"]

    def test_retry_of_the_parent_reopens_what_was_skipped(self, queue):
        queue.codes["parent"] = 1
        (a,) = queue.add("parent")
        (b,) = queue.add("x", after=str(a))
        (c,) = queue.add("x", after=str(b))
        queue.run(a, b, c)
        queue.codes["parent"] = 0
        assert queue.store.change("retry", [a]) == ([a], [])
        assert queue.states(a, b, c) == ["queued", "waiting", "waiting"]
        queue.run(a, b, c)
        assert queue.states(a, b, c) == ["succeeded"] * 3 and queue.ran == [a, a, b, c]

    def test_retry_leaves_skipped_what_another_parent_keeps_so(self, queue):
        queue.codes["bad"] = 1
        a, b = queue.add("bad", "bad")
        (c,) = queue.add("x", after=f"{a},{b}")
        queue.run(a, b, c)
        queue.store.change("retry", [a])
        assert queue.states(a, b, c) == ["queued", "failed", "skipped"]
        queue.store.change("retry", [b])
        assert queue.states(a, b, c) == ["queued", "queued", "waiting"]
        queue.codes["bad"] = 0
        queue.run(a, b, c)
        assert queue.states(a, b, c) == ["succeeded"] * 3

    def test_cancel_and_removal_of_a_parent_skip_its_children(self, queue):
        a, b = queue.add("x", "x")
        (c,), (d,) = queue.add("x", after=str(a)), queue.add("x", after=str(b))
        (e,) = queue.add("x", after=f"{b}:any")
        assert queue.store.change("cancel", [a]) == ([a], [])
        assert queue.store.change("remove", [b]) == ([b], [])
        assert queue.states(a, c, d) == ["cancelled", "skipped", "skipped"]
        refused("UNKNOWN_TASK", queue.store.get, b)
        queue.run(e)
        assert queue.ran == [e]

    def test_a_delay_holds_after_the_parents_too(self, queue):
        (parent,) = queue.add("x")
        (child,) = queue.add("x", after=str(parent), delay=0.5)
        assert queue.state(child) == "waiting"
        due = queue.store.get(child).due_at
        queue.run(parent, child)
        assert queue.store.get(child).started_at >= due

    def test_a_parent_that_is_missing_or_the_task_itself_is_refused(self, queue, box):
        (task,) = queue.add("x")
        for missing in (task + 1, task + 2, 0, 10**17):
            refused("UNKNOWN_TASK", queue.add, "x", after=str(missing))
        assert queue.add("x") == [task + 1], "nothing was added in between"
        assert box.error("add", "--after", "1", "true", rc=2)["code"] == "unknown_task"
        assert box.json("list") == []

    def test_a_chain_of_thousands_settles(self, queue):
        queue.codes["parent"] = 1
        (first,) = queue.add("parent")
        ids = queue.store.add([{"command": "x", "after": str(first + n)} for n in range(2000)])
        queue.run(first, ids[-1])
        assert {queue.state(i) for i in ids} == {"skipped"}
        queue.store.change("retry", [first])
        assert {queue.state(i) for i in ids} == {"waiting"}
        assert queue.store.get_counts()["waiting"] == {"default": 2000}

    def test_a_wide_and_deep_graph_is_reopened_in_good_time(self, queue):
        """Layers that all depend on the whole layer above: paths double with each one."""
        queue.codes["parent"] = 1
        (first,) = queue.add("parent")
        layer = [first]
        for _ in range(16):
            layer = queue.add("x", "x", "x", after=[str(i) for i in layer])
        queue.run(first, *layer)
        began = time.monotonic()
        queue.store.change("retry", [first])
        assert time.monotonic() - began < 20, "of 43 million paths each takes its time"
        assert queue.states(*layer) == ["waiting"] * 3


class TestStore:
    def test_a_key_is_held_by_one_unfinished_task(self, queue):
        (task,) = queue.add("x", key="nightly")
        assert queue.add("other", key="nightly") == [task]
        assert queue.add("x", key="weekly") == [task + 1]
        assert queue.store.add([{"command": "x", "key": "nightly"}, "y"]) == [task, task + 2]
        queue.run(task)
        (again,) = queue.add("x", key="nightly")
        assert again > task + 2
        assert len(queue.store.find(state="queued")) >= 1

    def test_retry_of_a_task_whose_key_is_taken_is_refused_clearly(self, queue):
        (task,) = queue.add("x", key="nightly")
        queue.run(task)
        (again,) = queue.add("x", key="nightly")
        with contextlib.suppress(apexd.DaemonError):
            assert queue.store.change("retry", [task]) == ([], [task])
        with pytest.raises(apexd.DaemonError) as caught:
            if queue.store.change("retry", [task]) == ([], [task]):
                raise apexd.DaemonError("ILLEGAL_STATE", "")
        assert caught.value.code == "ILLEGAL_STATE"
        assert queue.states(task, again) == ["succeeded", "queued"]

    def test_the_same_token_acts_once(self, queue):
        ids = queue.store.add(["a", "b"], {}, token="t1")
        assert queue.store.add(["a", "b"], {}, token="t1") == ids
        assert queue.store.add(["c"], {}, token="t2") == [ids[-1] + 1]
        assert queue.store.add(["a"], {}) != queue.store.add(["a"], {}), "no token, no memory"
        assert len(queue.store.find()) == 5

    def test_a_token_outlives_a_restart_and_its_task(self, box):
        first = box.add("true", token="abc")
        assert box.add("true", token="abc") == first
        box.start()
        assert box.add("true", token="abc") == first
        box.until(first)
        box.run("remove", first)
        box.kill9()
        box.start()
        assert box.add("true", token="abc") == first
        assert box.json("list") == []

    BROKEN = (
        ('{"command": ["true"], "priority": 1e30}', "bad_request"),
        ('{"command": ["true"], "group": "nope"}', "unknown_group"),
        ('{"command": ["true"], "after": "999999"}', "unknown_task"),
        ('{"command": ["true"], "after": "5000"}', "unknown_task"),
        ('{"command": ["true"], "colour": 1}', "bad_request"),
        ('["tr\\u0000ue"]', "bad_request"),
        ('["true"', "bad_request"),
        ("[" * 100_000, "bad_request"),
    )

    def test_a_batch_with_a_broken_line_adds_nothing_and_names_the_line(self, box):
        for item, code in self.BROKEN:
            lines = ['["true"]'] * 4999 + [item] + ['["true"]'] * 10
            text = "\n".join(lines).encode()
            status, out, err = within(box, "--json", "add", "--batch", input=text)
            error = json.loads(err)["error"]
            assert (status, out) == (2, "")
            assert error["code"] == code and "line 5000" in error["message"], (item[:50], error)
        assert box.json("list") == []

    @pytest.mark.parametrize("live", [False, True], ids=["daemon down", "daemon up"])
    def test_an_empty_batch_adds_nothing(self, box, live):
        if live:
            box.start()
        for text in ("", "\n\n", "  \n"):
            assert box.batch([text]) == []

    def test_a_batch_of_shell_lines_keeps_its_lines(self, box):
        ids = box.batch(["echo one && echo two", "", "echo three"])
        assert ids == [1, 2] and box.task(2)["command"] == "echo three"
        assert "line 2" in box.error("add", "--batch", "--priority", "1", rc=2, input="true\n\0\n")["message"]

    def test_a_large_batch_is_whole_and_in_order(self, box):
        ids = box.batch([["echo", str(n)] for n in range(3000)])
        assert ids == list(range(1, 3001))
        assert [task["command"][1] for task in box.json("list")] == [str(n) for n in range(3000)]

    def test_more_than_max_queue_is_refused_whole(self, box):
        box.config({"retention": {"max_queue": 10}})
        box.batch(["true"] * 9)
        assert box.error("add", "--batch", rc=75, input="true\n" * 2)["code"] == "queue_full"
        box.add("true")
        assert box.error("add", "true", rc=75)["code"] == "queue_full"
        assert len(box.json("list")) == 10

    def test_retention_forgets_the_oldest_and_their_logs(self, box):
        ids = box.batch(["echo x"] * 30)
        box.start()
        settle(box, ids)
        keep = box.add("true", after=f"{ids[0]}", delay="1h")
        box.stop()
        box.config({"retention": {"tasks": 5}})
        box.start()
        listed = lambda *words: ask_json(box, "list", *words)
        eventually(lambda: len(listed("--state", "succeeded")) <= 6, why="pruned")
        left = [task["id"] for task in listed()]
        assert 6 <= len(left) <= 7 and {ids[0], keep} < set(left), "a task needs the first"
        assert set(left[1:-1]) <= set(ids[20:]), "the newest are kept"
        logs = {int(re.match(r"task-(\d+)", name)[1]) for name in os.listdir(box.file("logs"))}
        assert logs <= set(left)
        assert box.json("status")["counts"]["succeeded"] == {"default": len(left) - 1}
        box.run("cancel", keep)

    def test_counts_stay_true_whatever_is_done(self, tmp_path):
        queue = Queue(tmp_path, daemon={**FAST["daemon"], "max_concurrent": 8}, group={"a": {}, "b": {}})
        queue.codes["bad"] = 1
        rng = random.Random(3)
        queue.runner = apexd.DaemonRunner(queue.store, execute=queue.execute)
        queue.runner.start()
        ids = []
        for _ in range(150):
            options = {"group": rng.choice(["a", "b", "default"])}
            if ids and rng.random() < 0.5:
                parent = rng.choice(ids)
                options["after"] = f"{parent}:{rng.choice(['ok', 'fail', 'any'])}"
            if rng.random() < 0.2:
                options["delay"] = rng.random() / 10
            with contextlib.suppress(apexd.DaemonError):  # a parent that was removed
                ids += queue.add(rng.choice(["x", "bad"]), **options)
            verb = rng.choice(["cancel", "retry", "remove", None])
            if verb and ids:
                with contextlib.suppress(apexd.DaemonError):
                    queue.store.change(verb, [rng.choice(ids)])
        queue.runner.stop(0)
        assert queue.store.get_counts() == queue.real_counts()
        assert sum(sum(g.values()) for g in queue.real_counts().values()) > 50
        queue.close()

    def test_status_counts_what_is_in_the_database(self, box):
        box.config({"group": {"a": {}}})
        box.start()
        ids = [box.add("true"), box.add("false", group="a"), box.add("true", delay="1h")]
        box.until(ids[0])
        box.until(ids[1])
        counts = box.json("status")["counts"]
        box.stop()
        with box.database() as db:
            rows = db.execute("SELECT state, grp, count(*) FROM tasks GROUP BY 1, 2").fetchall()
        real = {}
        for state, group, n in rows:
            real.setdefault(state, {})[group] = n
        assert counts == real == {
            "succeeded": {"default": 1}, "failed": {"a": 1}, "scheduled": {"default": 1}
        }  # fmt: skip

    ODD = [
        ({"priority": 2**63}, "priority"),
        ({"priority": -(2**63) - 1}, "priority"),
        ({"priority": 10**30}, "priority"),
        ({"priority": 1.5}, "priority"),
        ({"priority": True}, "priority"),
        ({"priority": [1]}, "priority"),
        ({"max_tokens": 2**64}, "max_tokens"),
        ({"retries": -1}, "retries"),
        ({"retries": 10**9}, "retries"),
        ({"timeout": float("nan")}, "timeout"),
        ({"timeout": float("inf")}, "timeout"),
        ({"timeout": -1}, "timeout"),
        ({"delay": -5}, "delay"),
        ({"delay": 10**400}, "delay"),
        ({"max_cost": float("nan")}, "max_cost"),
        ({"max_cost": -1}, "max_cost"),
        ({"label": "\ud800"}, "label"),
        ({"label": "a\nb"}, "label"),
        ({"label": "x" * 5000}, "label"),
        ({"label": 5}, "label"),
        ({"key": "\udfff\ud800"}, "key"),
        ({"group": "\ud800"}, "group"),
        ({"on_lost": "ignore"}, "on_lost"),
        ({"after": {"1": 2}}, "after"),
    ]

    def test_values_that_do_not_fit_are_refused_and_nothing_is_stored(self, queue):
        for options, name in self.ODD:
            for call in (
                lambda: queue.store.add([["true"]], options),
                lambda: queue.store.add([{"command": ["true"], **options}], {}),
            ):
                message = refused("BAD_REQUEST", call)
                assert name in message and "Traceback" not in message
        for command in (["\ud800"], "\ud800", ["a\0"], [], "", None, 5, {}, ["a", None], [[]]):
            if command is not None:
                refused("BAD_REQUEST", queue.store.add, [command], {})
        refused("BAD_REQUEST", queue.store.add, [{"command": None}], {})
        assert queue.store.find() == []

    def test_values_that_do_not_fit_are_refused_over_the_socket(self, box):
        box.start()
        for options, _name in self.ODD:
            answer = box.request({"type": "add", "commands": [["true"]], "options": options})
            assert answer["type"] == "error", (options, answer)
            assert answer["code"] in ("bad_request", "unknown_group"), (options, answer)
        for fields in (
            {"commands": "x"}, {"commands": [["\ud800"]]}, {"commands": None}, {},
            {"commands": [["true"]], "cwd": "/\0"}, {"commands": [["true"]], "cwd": "/\ud800"},
            {"commands": [["true"]], "cwd": ["/"]}, {"commands": [["true"]], "cwd": 5},
            {"commands": [["true"]], "env": {"A": 1}}, {"commands": [["true"]], "env": ["A"]},
            {"commands": [["true"]], "env": {"A": "\0"}}, {"commands": [["true"]], "env": {"A=B": "x"}},
            {"commands": [["true"]], "env": {"A": "\ud800"}},
            {"commands": [["true"]], "umask": 512}, {"commands": [["true"]], "umask": "0x"},
            {"commands": [["true"]], "token": 5}, {"commands": [["true"]], "token": "x\n"},
            {"commands": [["true"]], "token": "\ud800"}, {"commands": [["true"]], "options": [1]},
        ):  # fmt: skip
            answer = box.request({"type": "add", **fields})
            assert answer["type"] == "error" and answer["code"] == "bad_request", (fields, answer)
        for verb in ("get", "cancel", "retry", "remove", "why", "logs", "report", "wait", "list"):
            for odd in (2**63, 2**64, -1, 1.5, True, "\ud800", [], {}, [[2**70]], "9" * 30):
                answer = box.request({"type": verb, "id": odd, "ids": odd, "before": odd, "limit": odd})
                assert answer.get("code") != "internal", (verb, odd, answer)
        assert box.json("list") == [] and "Traceback" not in box.log()

    @posix
    def test_arguments_that_are_no_utf8_reach_the_process_byte_for_byte(self, box):
        odd = b"\xff\xfe \xc3( \x80"
        script = b'printf "%s|" "$1" "$ODD"; pwd'
        folder = os.path.join(os.fsencode(box.path), b"d\xff")
        os.mkdir(folder)
        box.start()
        args = [b"add", b"-p", b"--dir", folder, b"--env", b"ODD=" + odd, b"--", b"sh", b"-c", script, b"x", odd]
        task = int(box.run(*args).stdout)
        batch = json.dumps(["printf", "%s|", os.fsdecode(odd)])
        (other,) = box.batch([batch])
        assert box.until(task)["exit_code"] == 0
        printed = os.fsencode(box.output(task))
        assert printed == odd + b"|" + odd + b"|" + folder + b"\n"
        box.until(other)
        assert os.fsencode(box.output(other)) == odd + b"|"
        box.run("list")
        box.run("show", task)
        assert os.fsencode(box.json("show", task)["command"][-1]) == odd

    @posix
    def test_a_label_and_a_note_that_are_no_utf8_are_kept_or_refused(self, box):
        done = box.run("add", "-p", "--label", b"\xff\xfe", "true", rc=None)
        assert done.returncode in (0, 2)
        box.run("list")

    def test_a_command_of_two_mib_is_kept(self, box):
        task = box.batch([["true", "x" * (2 << 20)]])[0]
        assert len(box.task(task)["command"][1]) == 2 << 20

    def test_one_owner_at_a_time(self, queue, box):
        box.start()
        owned = (queue.path, box.file("apex.db"))
        with concurrent.futures.ThreadPoolExecutor() as pool:  # each is tried for a second
            list(pool.map(lambda path: refused("BUSY", apexd.TaskStore, path), owned))

    def test_paging_shows_every_task_once(self, box):
        box.batch(["true"] * 2500)
        assert [task["id"] for task in box.json("list")] == list(range(1, 2501))
        assert [task["id"] for task in box.json("list", "-n", "3")] == [2498, 2499, 2500]
        box.start()
        client = apexd.Client(box.path)
        assert [task["id"] for task in client.list(limit=1500)] == list(range(1001, 2501))
        assert client.list(ids=[5, 7, 99999])[1]["id"] == 7
        client.close()

    @posix
    def test_a_cancel_overrides_an_interruption_and_a_timeout(self, box):
        """T1: an acknowledged cancel is kept."""
        box.start()
        task = box.add("sleep", "1000")
        box.until(task, "running")
        box.run("kill", "--all")
        assert box.json("cancel", task)["done"] == [task]
        box.config({"daemon": {"stop_timeout": 1}})
        box.start()
        assert box.until(task)["state"] == "cancelled"
        deaf = box.add(shell="trap '' TERM; while :; do sleep 0.1; done", timeout=0.3, retries=3)
        eventually(lambda: f"Ending task {deaf}: timeout" in box.log())
        assert box.json("cancel", deaf)["done"] == [deaf]
        assert box.until(deaf)["state"] == "cancelled"

    def test_the_ids_of_requests_never_return(self, queue, monkeypatch):
        """T3: what belongs to a request is never another's."""
        sql = "SELECT sql FROM sqlite_master WHERE name = 'requests'"
        if "AUTOINCREMENT" not in queue.store.database.fetch(sql)[0][0]:
            pytest.skip("the schema lets them return")
        monkeypatch.setattr(apexd, "TOKEN_KEPT_S", 0.0)
        attempts = apexd.AttemptStore(queue.store)
        for who in ("monday", "tuesday"):
            (task,) = queue.store.add([["x"]], env={"WHO": who})
            assert attempts.get_context(queue.store.get(task))[0] == {"WHO": who}
            queue.store.change("remove", [task])
            attempts.prune_requests()

    def test_of_skipped_tasks_with_one_key_the_newest_is_reopened(self, queue):
        """T11."""
        queue.codes["parent"] = 1
        (a,) = queue.add("parent")
        (b,) = queue.add("x", after=str(a), key="k")
        queue.run(a, b)
        (c,) = queue.add("x", after=str(a), key="k")
        assert queue.states(b, c) == ["skipped", "skipped"]
        queue.codes.clear()
        assert queue.store.change("retry", [a]) == ([a], [])
        assert queue.states(a, b, c) == ["queued", "skipped", "waiting"]
        assert "has the key" in refused("ILLEGAL_STATE", queue.store.change, "retry", [b])
        queue.run(a, c)
        assert queue.store.change("retry", [b, a, c]) == ([b, a], [c]), "the rest goes on"

    def test_retention_keeps_up_and_takes_the_logs(self, queue, monkeypatch):
        """T12: one round forgets all that is too much; `rm` removes logs."""
        monkeypatch.setattr(apexd, "PRUNE_MAX_S", 60.0, raising=False)
        queue.store.config.retention.tasks = 100
        ids = queue.add(*["x"] * 4321)
        logs = [apexd.log_path(queue.store.folder, task, 1) for task in ids]
        for path in (logs[0], logs[0] + ".1", logs[0] + ".base", logs[-1], logs[-2]):
            write(path, "x")
        queue.store.change("cancel", ids)
        apexd.prune_all(queue.store, ())
        assert [task.id for task in queue.store.find(limit=5000)] == ids[-100:]
        left = lambda: sorted(os.listdir(os.path.join(queue.store.folder, "logs")))
        assert left() == [os.path.basename(path) for path in logs[-2:]]
        queue.store.change("remove", ids[-1:])
        assert left() == [os.path.basename(logs[-2])]

    def test_a_clock_that_jumped_prunes_nothing_at_the_first_look(self, queue, monkeypatch):
        """T18."""
        (task,) = queue.add("x")
        queue.run(task)
        apexd.prune_all(queue.store, ())
        monkeypatch.setattr(apexd.Clock, "now", lambda: time.time() + 40 * 86400)
        apexd.prune_all(queue.store, ())
        assert queue.states(task) == ["succeeded"]
        apexd.prune_all(queue.store, ())
        assert queue.store.find() == []

    def test_add_says_which_tasks_had_the_key_already(self, box):
        """T13."""
        client = apexd.Client(box.path)
        first = client.add("true", key="k", delay=3600)
        assert client.existing == []
        assert client.add("true", key="k") == first and client.existing == [first]
        told = box.json("add", "--key", "k", "--", "true")
        assert told["existing"] is True and told["id"] == first
        batch = ['{"command": "true", "key": "k"}', '"true"']
        for _ in range(2):
            told = box.json("add", "--batch", "--token", "t", input="\n".join(batch))
            assert told == {"ids": [first, first + 1], "existing": [first]}
        assert len(box.json("list")) == 2
        if not IS_WINDOWS:
            status, shown = on_terminal(box, "add", "--key", "k", "--", "true")
            assert status == 0 and f"task {first} has the key 'k' already" in shown

    def test_a_folder_that_is_not_there_is_refused_at_once(self, box):
        """T17."""
        assert box.error("add", "-w", "/no/such", "--", "true", rc=2)["code"] == "bad_request"
        assert box.json("list") == []

    def test_wait_is_asked_by_ranges_and_answers_in_the_order_given(self, queue):
        queue.codes.update(four=4, five=5)
        ids = queue.add("four", "x", "five", "x")
        queue.run(*ids)
        (late,) = queue.add("x", delay=3600)
        ask = lambda *named: queue.store.get_progress(apexd.task_ids(list(named)))
        answer = {"total": 4, "pending": 0, "status": 4, "progress": 100.0, "running": []}
        assert ask("1-4") == (answer, None)
        assert ask("3,1-4")[0]["status"] == 5
        assert ask("1-5") == ({**answer, "total": 5, "pending": 1, "progress": 80.0}, late)
        assert "no task 6" in refused("UNKNOWN_TASK", ask, "1-9")

    def test_a_list_of_ids_as_long_as_the_queue_is_no_problem(self, box):
        box.batch(["true"] * 1500)
        assert len(box.json("cancel", "1-1500")["done"]) == 1500
        assert len(box.json("wait", "1-1500", rc=1)) == 1500


# The first schema that was given to users, without its comments.
SCHEMA_1 = """
CREATE TABLE requests ( id         INTEGER PRIMARY KEY, token      TEXT UNIQUE, cwd        TEXT, env        TEXT, umask      INTEGER, first_task INTEGER, last_task  INTEGER, created_at REAL NOT NULL, answer     TEXT NOT NULL
);
CREATE TABLE tasks ( id         INTEGER PRIMARY KEY AUTOINCREMENT, request_id INTEGER NOT NULL, state      TEXT NOT NULL, grp        TEXT NOT NULL, priority   INTEGER NOT NULL, command    TEXT NOT NULL, label      TEXT, key        TEXT, due_at     REAL, retries    INTEGER NOT NULL, timeout    REAL, on_lost    TEXT NOT NULL, max_tokens INTEGER, max_cost   REAL, created_at REAL NOT NULL, finished_at REAL, open_deps  INTEGER NOT NULL DEFAULT 0, attempts   INTEGER NOT NULL DEFAULT 0, failures   INTEGER NOT NULL DEFAULT 0, losses     INTEGER NOT NULL DEFAULT 0, deferrals  INTEGER NOT NULL DEFAULT 0, tokens     INTEGER NOT NULL DEFAULT 0, cost       REAL NOT NULL DEFAULT 0, progress   REAL, note       TEXT
);
CREATE INDEX tasks_ready ON tasks (grp, priority DESC, id) WHERE state = 'queued';
CREATE INDEX tasks_due ON tasks (due_at) WHERE state = 'scheduled';
CREATE INDEX tasks_state ON tasks (state, id);
CREATE INDEX tasks_finished ON tasks (finished_at) WHERE finished_at IS NOT NULL;
CREATE UNIQUE INDEX tasks_key ON tasks (key) WHERE key IS NOT NULL AND finished_at IS NULL;
CREATE TABLE attempts ( task_id    INTEGER NOT NULL, number     INTEGER NOT NULL, run_id     TEXT NOT NULL, slot       INTEGER NOT NULL, boot_id    TEXT NOT NULL, started_at REAL NOT NULL, finished_at REAL, wish       TEXT, outcome    TEXT, exit_code  INTEGER, reason     TEXT, PRIMARY KEY (task_id, number)
) WITHOUT ROWID;
CREATE TABLE deps ( parent INTEGER NOT NULL, child  INTEGER NOT NULL, need   TEXT NOT NULL, PRIMARY KEY (parent, child)
) WITHOUT ROWID;
CREATE INDEX deps_child ON deps (child);
CREATE TABLE paused (grp TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE processes ( name      TEXT PRIMARY KEY, is_up     INTEGER, instances INTEGER
) WITHOUT ROWID;
CREATE TABLE counts (state TEXT, grp TEXT, n INTEGER NOT NULL, PRIMARY KEY (state, grp)) WITHOUT ROWID;
CREATE TRIGGER tasks_moved AFTER UPDATE OF state ON tasks BEGIN INSERT OR IGNORE INTO counts VALUES (new.state, new.grp, 0); UPDATE counts SET n = n + 1 WHERE state = new.state AND grp = new.grp; UPDATE counts SET n = n - 1 WHERE state = old.state AND grp = old.grp;
END;
CREATE TRIGGER tasks_removed AFTER DELETE ON tasks BEGIN UPDATE counts SET n = n - 1 WHERE state = old.state AND grp = old.grp;
END;
"""


class TestDatabase:
    def make(self, box):
        """Make a database of some hundred tasks, closed cleanly; return its path."""
        box.batch([["echo", "x" * 500]] * 300)
        return box.file("apex.db")

    @pytest.mark.parametrize("mode", ["WAL", "DELETE"])
    def test_a_newer_schema_is_refused_and_not_touched(self, box, mode):
        path = self.make(box)
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.execute(f"PRAGMA journal_mode = {mode}")
            db.execute("PRAGMA user_version = 999")
        before = sha256(path)
        for args in (["start"], ["add", "true"], ["list"]):
            assert box.error(*args, rc=78)["code"] == "database_newer"
        assert sha256(path) == before and not box.processes()

    @pytest.mark.parametrize("how", ["magic", "page", "truncated", "text", "zeros"])
    def test_a_corrupt_database_is_refused_and_kept(self, box, how):
        path = self.make(box)
        size = os.path.getsize(path)
        with open(path, "r+b") as file:
            if how == "magic":
                file.write(b"not a database at all")
            elif how == "page":
                file.seek(4096 * 3)
                file.write(os.urandom(4096 * 6))
            elif how == "truncated":
                file.truncate(size // 2 // 4096 * 4096)
            elif how == "text":
                file.truncate(0)
                file.write(b"hello\n" * 1000)
            else:
                file.seek(100)
                file.write(bytes(8000))
        before = sha256(path)
        error = box.error("start", rc=65)
        assert error["code"] == "database_corrupt" and path in error["message"] and error["hint"]
        assert sha256(path) == before and not box.processes()
        assert not os.path.exists(box.file("daemon.pid"))

    @posix
    def test_links_are_refused(self, box):
        path = self.make(box)
        os.rename(path, os.path.join(box.root, "real.db"))
        before = sha256(os.path.join(box.root, "real.db"))
        for link in (os.symlink, os.link):
            link(os.path.join(box.root, "real.db"), path)
            for args in (["start"], ["add", "true"]):
                assert box.error(*args, rc=73)["code"] == "cannot_create"
            os.unlink(path)
        assert sha256(os.path.join(box.root, "real.db")) == before

    def test_a_folder_in_its_place_is_refused(self, box):
        os.mkdir(box.file("apex.db"))
        assert box.error("start", rc=73)["code"] == "cannot_create"

    def test_a_queue_of_the_first_schema_is_brought_up(self, tmp_path):
        path = str(tmp_path / "apex.db")
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
            db.executescript(SCHEMA_1 + "PRAGMA user_version = 1;")
            db.execute("INSERT INTO requests VALUES (7, 'T', '\"/\"', '{}', 18, 1, 2, 5.0, '[1, 2]')")
            row = "INSERT INTO tasks (id, request_id, state, grp, priority, command, retries, on_lost, created_at)"
            for task_id, state in ((1, "running"), (2, "queued")):
                values = f" VALUES ({task_id}, 7, '{state}', 'default', 0, '[\"true\"]', 0, 'retry', 5.0)"
                db.execute(row + values)
            db.execute("INSERT INTO counts VALUES ('running', 'default', 1), ('queued', 'default', 1)")
            db.execute("INSERT INTO attempts (task_id, number, run_id, slot, boot_id, started_at) VALUES (1, 1, 'r', 0, 'b', 6.0)")
            db.execute("UPDATE tasks SET attempts = 1 WHERE id = 1")
        with contextlib.closing(apexd.TaskStore(path)) as store:
            first, second = store.find()
            assert (first.state, first.run_id, first.keeper, first.suspect) == ("running", "r", None, 0)
            assert (second.state, second.cwd, second.request_id) == ("queued", "/", 7)
            assert store.add(["true"], token="T") == [1, 2], "a token of before"
            (third,) = store.add(["true"])
            assert store.get(third).request_id == 8, "ids go on"
        with contextlib.closing(sqlite3.connect(path)) as db:
            assert db.execute("PRAGMA user_version").fetchone() == (len(apexd.MIGRATIONS),)
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)

    @pytest.mark.parametrize("how", ["cut to nothing", "gone, its -wal left"])
    def test_a_database_that_is_cut_or_gone_is_no_empty_queue(self, box, how):
        """T9"""
        box.add("true", delay="1h")
        path, wal = box.file("apex.db"), box.file("apex.db-wal")
        if how == "cut to nothing":
            os.truncate(path, 0)
        else:
            box.start()
            box.add("true", delay="1h")
            box.kill9()
            os.unlink(path)
        before = sorted(name for name in os.listdir(box.state) if name.startswith("apex.db"))
        for words in (["start"], ["list"], ["add", "--", "true"]):
            assert box.error(*words, rc=65)["code"] == "database_corrupt"
        assert before == sorted(name for name in os.listdir(box.state) if name.startswith("apex.db"))
        assert (os.path.getsize(path) if os.path.exists(path) else -os.path.getsize(wal)) <= 0

    def test_a_write_ahead_log_that_is_removed_loses_nothing_after_the_next_look(self, box):
        """T9b"""
        pid = box.start()
        first = box.add("true", delay="1h")
        os.unlink(box.file("apex.db-wal"))
        eventually(lambda: not lives(pid), why="it notices, and saves what it has")
        second = box.add("true", delay="1h")
        assert "apex.db-wal was removed" in box.log()
        box.start()
        box.kill9()
        assert [task["id"] for task in box.json("list")] == [first, second]

    @posix
    def test_a_migration_that_was_killed_is_done_by_the_next_start(self, box):
        fail = {"APEXD_FAILPOINT": "migration"}
        for args in (["start"], ["add", "true"]):
            done = box.run(*args, rc=None, env=fail)
            assert done.returncode not in (0, 70), done
            assert not os.path.exists(box.file("apex.db")), "all or nothing"
        assert not box.processes()
        assert box.add("true") == 1
        box.start()
        assert box.until(1)["state"] == "succeeded"

    @posix
    def test_nothing_acknowledged_is_lost_when_the_writer_is_killed(self, tmp_path):
        """20 rounds: a process adds and prints ids until it is SIGKILLed at a random moment."""
        path = str(tmp_path / ".apex" / "apex.db")
        code = (
            f"import sys; sys.pycache_prefix = {BYTECODE.name!r}; sys.path.insert(0, sys.argv[1])\n"
            "import apexd; store = apexd.TaskStore(sys.argv[2]); n = 0\n"
            "while True:\n"
            "    n += 1; ids = store.add([['echo', str(n)]] * (n % 3 + 1), token=sys.argv[3] + str(n))\n"
            "    sys.stdout.write(' '.join(map(str, ids)) + '\\n'); sys.stdout.flush()\n"
        )
        rng, told = random.Random(), []
        for number in range(60 if SLOW else 20):
            argv = [sys.executable, "-S", "-c", code, HERE, path, f"{number}."]
            with subprocess.Popen(argv, stdout=subprocess.PIPE) as writer:
                lines = [writer.stdout.readline() for _ in range(rng.randrange(1, 60))]
                writer.kill()
                lines += writer.stdout.read().split(b"\n")
            told += [int(word) for line in lines if line for word in line.split()]
        with contextlib.closing(sqlite3.connect(path)) as db:
            assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            kept = [row[0] for row in db.execute("SELECT id FROM tasks ORDER BY id")]
            requests = db.execute("SELECT answer FROM requests").fetchall()
            counted = db.execute("SELECT sum(n) FROM counts").fetchone()[0]
        assert len(told) > 100 and len(set(told)) == len(told)
        assert set(told) <= set(kept) and kept == list(range(1, len(kept) + 1))
        assert counted == len(kept) == sum(len(json.loads(answer)) for (answer,) in requests)
        store = apexd.TaskStore(path)
        store.database.check()
        store.close()

    @posix
    def test_a_database_that_is_removed_or_replaced_stops_the_daemon_with_65(self, box):
        child = box.popen("start", "--foreground")
        eventually(lambda: "ready" in box.log())
        box.add("true")
        os.rename(box.file("apex.db"), box.file("apex.db.away"))
        child.communicate(timeout=20)
        assert child.returncode == 65 and "removed or replaced" in box.log()

    @root
    @linux
    def test_a_full_disk_loses_no_result_and_ends_by_itself(self, box):
        """State on a small tmpfs that is filled while tasks run, then freed."""
        state = os.path.join(box.root, "s")
        os.mkdir(state)
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,mode=0700", "none", state], stderr=subprocess.PIPE)
        if mounted.returncode:
            pytest.skip(f"cannot mount: {mounted.stderr}")
        args = ("--state", state)
        try:
            write(os.path.join(state, "config.json"), json.dumps(FAST))
            box.run(*args, "start")
            go = os.path.join(box.root, "go")
            script = f"while [ ! -e {go} ]; do sleep 0.05; done; exit 3"
            task = int(box.run(*args, "add", "-p", "--", "sh", "-c", script).stdout)

            def state_of():
                return json.loads(box.run(*args, "--json", "show", task).stdout)

            eventually(lambda: state_of()["state"] == "running")
            with contextlib.suppress(OSError), open(os.path.join(state, "filler"), "wb", 0) as filler:
                while True:
                    filler.write(b"x" * 4096)
            write(go, "")
            done = box.run(*args, "--json", "add", "-p", "--", "true", "x" * 100_000, rc=None)
            assert done.returncode in (73, 75), done
            os.unlink(os.path.join(state, "filler"))
            eventually(lambda: state_of()["exit_code"] == 3)
            assert state_of()["attempts"] == 1 and state_of()["state"] == "failed"
            box.run(*args, "stop")
        finally:
            box.run(*args, "kill", "--all", rc=None)
            subprocess.run(["umount", "-l", state])

# ----- what the second half of the sections needs of its own -----


def pause(seconds):
    """Let time pass where there is nothing to wait for."""
    threading.Event().wait(seconds)


def needs(*programs):
    """Skip a test when the system lacks one of these programs."""
    missing = [name for name in programs if shutil.which(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


@contextlib.contextmanager
def project(**config):
    """Give a Box for a whole class of tests; nothing of it may be left alive."""
    made, failed_before = Box(), len(FAILED)
    made.config(config)
    try:
        yield made
        if lives_in(made.file("daemon.pid")):
            cancel_all(made)
    finally:
        complaints = made.close()
        if complaints or len(FAILED) > failed_before:
            print(f"--- kept: {made.root}; daemon.log:\n{made.log()[-20000:]}")
        else:
            shutil.rmtree(made.root, ignore_errors=True)
    assert not complaints, "\n".join(complaints)


def within(box, *words, input=b"", cwd=None):
    """Run a command in this process: (status, stdout, stderr); a tenth of the time."""
    import io

    streams = [io.TextIOWrapper(io.BytesIO(data), "utf-8") for data in (input, b"", b"")]
    kept = sys.stdin, sys.stdout, sys.stderr
    before = os.getcwd()
    os.chdir(cwd or box.path)
    try:
        sys.stdin, sys.stdout, sys.stderr = streams
        status = apexd.main([str(word) for word in words])
    finally:
        sys.stdin, sys.stdout, sys.stderr = kept
        os.chdir(before)
    for stream in streams:
        stream.flush()
    out, err = (stream.buffer.getvalue().decode("utf-8", "replace") for stream in streams[1:])
    return status, out, err


def ask(box, *words, rc=0, input=b""):
    """Run a command in this process; check its status; return what it printed."""
    status, out, err = within(box, *words, input=input)
    assert status == rc and "Traceback" not in err, (words, status, out, err)
    return out


def ask_json(box, *words, rc=0):
    """Run a command in this process with --json; return what it printed."""
    return json.loads(ask(box, "--json", *words, rc=rc))


def cancel_all(box):
    """End what runs, so that the daemon need not wait for it."""
    running = box.request({"type": "list", "state": "running", "limit": 1000})["tasks"]
    box.request({"type": "cancel", "ids": [task["id"] for task in running]})
    settle(box, [task["id"] for task in running])


def enqueue(box, *commands, **options):
    """Add tasks through the socket, as the CLI would; return their ids."""
    request = {"type": "add", "commands": list(commands), "options": options}
    answer = box.request({**request, "cwd": box.path, "env": box.env, "umask": 0o022})
    assert answer["type"] == "ok", answer
    return answer["ids"]


def settle(box, ids, within_s=30.0):
    """Wait until all these tasks are done; return them in their order."""
    answer = box.request({"type": "wait", "ids": ids, "within": within_s}, within_s + 10)
    assert answer.get("pending") == 0, (answer, tasks_of(box, ids))
    return tasks_of(box, ids)


def tasks_of(box, ids):
    """Return tasks as the daemon lists them."""
    return box.request({"type": "list", "ids": ids, "limit": 1000})["tasks"]


def history_of(box, task_id):
    """Return the outcomes of a task's attempts, in their order."""
    history = box.request({"type": "get", "id": task_id})["history"]
    return [attempt["outcome"] for attempt in history]


def command_of(box, task_id):
    """Return the PID of a running task's command."""
    look = lambda: box.request({"type": "get", "id": task_id})["task"]["pid"]
    return eventually(look, why=f"task {task_id} has its command")


def keepers(box):
    """Return {PID: name} of the keepers that live."""
    found = {}
    for name in os.listdir(box.file("run")) if os.path.isdir(box.file("run")) else ():
        match = re.fullmatch("keeper-([0-9a-f]{16})", name)
        if match:
            with contextlib.suppress(ValueError):  # it is being made
                pid = json.loads(read(box.file("run", name)).partition("\n")[0])["pid"]
                found.update({pid: match[1]} if lives(pid) else {})
    return found


def keeper_of(box):
    """Return the PID of the one keeper that lives."""

    def look():
        (pid,) = keepers(box)
        return pid

    return eventually(look, why="there is one keeper")


def worker(box):
    """Write the script `work NAME SECONDS CODE [closed]` that tells on whoever runs it twice.

    It holds a lock while it runs, and so does its `sleep`: a second one at once says so in
    the file `overlaps`. Each start is a line in `begun`, each end one in `ended`.
    """
    lines = (
        '[ "$4" = closed ] && exec >&- 2>&-',
        'exec 9>>"lock.$1"',
        'flock -n 9 || echo "$1" >>overlaps',
        'echo "$1" >>begun',
        'sleep "$2"',
        'echo "$1" >>ended',
        'exit "$3"',
    )
    write(os.path.join(box.path, "work.sh"), "\n".join(lines) + "\n")
    return ["sh", "work.sh"]


def await_connection(child):
    """Wait until a command talks to the daemon, as far as the system lets us see it."""

    def has_socket():
        folder = f"/proc/{child.pid}/fd"
        return any(os.readlink(f"{folder}/{n}").startswith("socket:") for n in os.listdir(folder))

    if IS_LINUX:
        eventually(has_socket)
    pause(0.1 if IS_LINUX else 1)


def lines_of(box, name):
    """Return the lines of a file in the project's folder, sorted."""
    return sorted(read(os.path.join(box.path, name)).split())


# ============================================================================
# 10. KEEPER - the process that owns all children, and the daemon's end of it
# ============================================================================


@linux
@needs("flock")
class TestKeeper:
    CALLER = {"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "9", "LISTEN_FDS": "1"}

    @linux
    def test_a_result_outlives_the_claim_that_follows_it(self, box):
        box.config({"daemon": {"max_concurrent": 1}})
        for point in ("claim:2", "sent:2", "result") * (7 if SLOW else 1):
            box.start(env={"APEXD_FAILPOINT": point})  # killed with the result or just after it
            go = os.path.join(box.path, "go")  # not before the add is answered
            lines = [f"until [ -e {go} ]; do sleep 0.01; done; echo ran >>first; exit 7"]
            first, second = enqueue(box, *lines, "echo ran >>second; exit 8")
            write(go, "")
            eventually(lambda: not lives_in(box.file("daemon.pid")), why="it killed itself")
            os.unlink(go)
            box.start()
            assert [box.until(i)["exit_code"] for i in (first, second)] == [7, 8]
            box.run("stop")
            for name in ("first", "second"):
                path = os.path.join(box.path, name)
                with open(path) as file:
                    assert file.read() == "ran\n"
                os.unlink(path)

    @pytest.fixture(scope="class", name="shared")  # a class method of Python 3.9 has no name
    @classmethod
    def shared(cls):
        """Give a project with a daemon, for the tests that do not end it."""
        options = {"max_concurrent": 8, "stop_timeout": 0.4, "env_keep": ["KEPT"]}
        limits = {"memory_mb": 300, "cpu_seconds": 1, "open_files": 40}
        groups = {"cluster": {"launcher": ["env", "LAUNCHED=1"]}}
        with project(daemon=options, limits=limits, group=groups) as box:
            box.start(env={**cls.CALLER, "DAEMONS_OWN": "1"})
            yield box

    @pytest.mark.parametrize("daemon", ["alive", "dead"])
    def test_a_killed_keeper_is_noticed_and_its_commands_ended_before_the_rerun(self, box, daemon):
        start = f"[ $APEX_ATTEMPT = 1 ] && s=60; exec {' '.join(worker(box))}"
        box.start()
        ids = enqueue(box, *(f"{start} {c} ${{s:-0}} 3 {c}" for c in ("open", "closed")))
        commands = [command_of(box, task_id) for task_id in ids]
        eventually(lambda: lines_of(box, "begun") == ["closed", "open"])
        keeper = keeper_of(box)
        if daemon == "dead":
            box.kill9()
        assert all(map(lives, commands))
        kill(keeper)
        if daemon == "dead":
            box.start()
        for task in settle(box, ids):
            assert (task["exit_code"], task["attempts"], task["losses"]) == (3, 2, 0)
            assert history_of(box, task["id"]) == ["lost", "failed"]
        assert not any(map(lives, commands))
        assert lines_of(box, "overlaps") == []
        assert lines_of(box, "ended") == ["closed", "open"]

    def test_what_was_cancelled_or_timed_out_as_the_daemon_died_does_not_run_again(self, box):
        box.config({"daemon": {"max_concurrent": 8}})
        work = worker(box)
        box.start()
        for number in range(ROUNDS):
            names = [f"{number}.{n}" for n in range(8)]
            cancelled = enqueue(box, *([*work, name, "60", "0"] for name in names[:4]))
            late = enqueue(box, *([*work, name, "60", "0"] for name in names[4:]), timeout=0.3)
            late_ones = lambda: zip(names[4:], tasks_of(box, late))
            over = lambda: {name for name, task in late_ones() if task["outcome"]}
            eventually(lambda: set(names) <= over().union(lines_of(box, "begun")), why="all run")
            moment = random.uniform(0.0, 0.3)
            with box.connect() as connection:
                request = json.dumps({"type": "cancel", "ids": cancelled}).encode()
                pause(moment)
                connection.sendall(struct.pack(">I", len(request)) + request)
                pause(random.choice([0, 0.001, 0.003, 0.01, 0.03]))
                box.kill9()
            box.start()
            box.request({"type": "cancel", "ids": cancelled})
            ended = [(task["outcome"], task["attempts"]) for task in settle(box, cancelled + late)]
            assert ended == [("cancelled", 1)] * 4 + [("timeout", 1)] * 4, (number, moment)
            eventually(lambda: not [c for c in box.processes().values() if "sleep" in c])
        assert len(lines_of(box, "begun")) == len(set(lines_of(box, "begun"))) >= 4 * ROUNDS
        assert lines_of(box, "ended") == lines_of(box, "overlaps") == []

    def rewrite(self, box, task_id, **columns):
        """Change what the daemon noted about a running attempt; no daemon runs."""
        with contextlib.closing(sqlite3.connect(box.file("apex.db"))) as db:
            sql = ", ".join(f"{name} = ?" for name in columns)
            sql = f"UPDATE attempts SET {sql} WHERE task_id = ? AND outcome IS NULL"
            assert db.execute(sql, (*columns.values(), task_id)).rowcount == 1
            db.commit()

    def test_after_a_reboot_a_status_counts_and_a_pid_means_nothing(self, box):
        box.config({"daemon": {"max_concurrent": 4}})
        command = f"[ $APEX_ATTEMPT = 1 ] || exit 0; exec {' '.join(worker(box))}"
        daemon = box.start()
        other_boot, reused, finished, same_boot = enqueue(
            box,
            f"{command} a 60 9",
            f"{command} b 60 9",
            f"until [ -e go ]; do sleep 0.05; done; {command} c 0 9",
            f"until [ -e go ]; do sleep 0.05; done; {command} d 0 8",
        )
        ends = [command_of(box, task_id) for task_id in (other_boot, reused)]
        watched = [command_of(box, task_id) for task_id in (finished, same_boot)]
        keeper, name = next(iter(keepers(box).items()))
        eventually(lambda: lines_of(box, "begun") == ["a", "b"])
        os.kill(daemon, signal.SIGSTOP)
        write(os.path.join(box.path, "go"), "")
        eventually(lambda: not any(map(lives, watched)), why="both ended")
        kill(daemon)
        eventually(lambda: read(box.file("run", "keeper-" + name)).count("exited") == 2)
        for pid in [keeper, *ends]:
            kill(pid)
        for pid, words in box.processes().items():
            if words.startswith("sleep 60"):
                kill(pid)
        eventually(lambda: not box.processes())
        stranger = subprocess.Popen(["sleep", "66"], start_new_session=True)
        try:
            at = apexd.Platform.start_time(stranger.pid)
            other = {"boot_id": "an-earlier-boot", "pid": stranger.pid, "start_time": at}
            self.rewrite(box, other_boot, **other)
            self.rewrite(box, reused, pid=stranger.pid)
            self.rewrite(box, finished, boot_id="an-earlier-boot")
            box.start()
            ids = [other_boot, reused, finished, same_boot]
            codes = [(t["exit_code"], t["attempts"], t["losses"]) for t in settle(box, ids)]
            assert codes == [(0, 2, 0), (0, 2, 0), (9, 1, 0), (8, 1, 0)]
            assert stranger.poll() is None, "somebody else's process was signalled"
        finally:
            stranger.kill()
            stranger.wait()

    def test_every_exit_code_and_signal_is_read_right(self, shared):
        box = shared
        codes = enqueue(box, *(f"exit {n}" for n in range(256)))
        numbers = [1, 2, 3, 6, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 31]
        signals = enqueue(box, *(["sh", "-c", f"ulimit -c 0; kill -{n} $$"] for n in numbers))
        settle(box, [task_id for n, task_id in enumerate(codes) if n != 75])
        deferred = codes.pop(75)
        for task_id, task in zip(codes, tasks_of(box, codes)):
            code = task_id - codes[0]
            assert (task["exit_code"], task["attempts"]) == (code, 1)
            assert task["state"] == ("failed" if code else "succeeded")
            assert task["signal"] is None, "it ended by itself"
        assert [t["signal"] for t in settle(box, signals)] == numbers
        assert [t["exit_code"] for t in tasks_of(box, signals)] == [128 + n for n in numbers]
        assert box.look(deferred)["outcome"] == "deferred"

    def test_a_command_that_ignores_term_is_killed_and_the_wish_is_its_outcome(self, shared):
        box = shared
        stubborn = "trap '' TERM; echo up; while :; do sleep 0.1; done"
        (cancelled,) = enqueue(box, stubborn)
        eventually(lambda: ask(box, "logs", cancelled) == "up\n")
        ask(box, "cancel", cancelled)
        for timeout in (0.3, 3, 15):  # until it ignored TERM before it got one
            (late,) = enqueue(box, stubborn, timeout=timeout)
            settle(box, [late])
            if ask(box, "logs", late) == "up\n":
                break
        for task_id, outcome in ((cancelled, "cancelled"), (late, "timeout")):
            task = box.until(task_id)
            assert (task["outcome"], task["signal"]) == (outcome, 9)
            assert task["finished_at"] - task["started_at"] >= 0.4
        assert box.look(cancelled)["state"] == "cancelled"
        assert box.look(late)["state"] == "failed"

    def test_a_task_is_done_when_its_command_is_whatever_that_left_behind(self, shared):
        box = shared
        task = settle(box, enqueue(box, "sleep 60 & echo hi"))[0]
        assert task["exit_code"] == 0
        assert ask(box, "logs", task["id"]) == "hi\n"
        left = lambda: [pid for pid, words in box.processes().items() if words == "sleep 60 "]
        (pid,) = eventually(left)
        kill(pid)

    @needs("setsid")
    @pytest.mark.parametrize("daemon", ["alive", "dead", "killed meanwhile"])
    def test_a_cancelled_task_takes_along_what_left_its_session(self, box, daemon):
        box.start()
        (task_id,) = enqueue(box, "setsid sleep 61 & sleep 62")
        sleeps = lambda: [w for w in box.processes().values() if w.startswith("sleep 6")]
        eventually(lambda: len(sleeps()) == 2)
        if daemon == "dead":
            box.kill9()
        if daemon == "killed meanwhile":
            os.kill(box.pid(), signal.SIGSTOP)
            sent = box.popen("cancel", task_id)
            os.kill(box.pid(), signal.SIGCONT)
            sent.communicate()
            box.kill9()
        else:
            ask(box, "cancel", task_id)
        if daemon != "alive":
            box.start()
        assert box.until(task_id)["state"] == "cancelled"
        eventually(lambda: sleeps() == [], why="all that it started is gone")

    def test_the_published_pid_is_the_commands_own_whatever_its_name(self, shared):
        box = shared
        odd = os.path.join(box.path, "a) R 1 (x")
        shutil.copy(shutil.which("sleep"), odd)
        hup, named = enqueue(
            box, "trap 'exit 9' HUP; echo up; while :; do sleep 0.05; done", [odd, "60"]
        )
        eventually(lambda: ask(box, "logs", hup) == "up\n")
        os.kill(eventually(lambda: box.look(hup)["pid"]), signal.SIGHUP)
        assert box.until(hup)["exit_code"] == 9
        pid = command_of(box, named)
        eventually(lambda: read(f"/proc/{pid}/comm") == "a) R 1 (x\n")
        ask(box, "cancel", named)
        assert box.until(named)["signal"] == signal.SIGTERM
        assert not lives(pid)

    def test_a_private_keeper_stays_private_with_the_next_daemon_and_leaves(self, box):
        box.start()
        (suspect,) = enqueue(box, "exec sleep 60")
        command_of(box, suspect)
        kill(keeper_of(box))
        eventually(lambda: box.look(suspect)["attempts"] == 2 and box.look(suspect)["pid"])
        parent = lambda task_id: int(read(f"/proc/{command_of(box, task_id)}/stat").split()[3])
        private = parent(suspect)
        box.run("restart")
        (other,) = enqueue(box, "exec sleep 61")
        assert parent(other) != private == parent(suspect)
        ask(box, "cancel", suspect)
        eventually(lambda: list(keepers(box)) == [parent(other)], why="the private one left")

    @slow
    def test_kill_all_says_what_still_runs(self, box):
        box.start()
        (task_id,) = enqueue(box, "sleep 60")
        command = command_of(box, task_id)
        os.kill(keeper_of(box), signal.SIGSTOP)
        error = box.error("kill", "--all", rc=1)
        assert lives(command) and error["code"] == "stop_failed" and "running: 1" in error["message"]
        kill(keeper_of(box))
        assert box.run("kill", "--all").stdout == "not running\n"
        assert not lives(command)

    def test_a_keeper_that_has_lost_a_result_does_not_say_that_it_told_all(self, tmp_path):
        os.makedirs(tmp_path / "run", mode=0o700)
        keeper = apexd.Keeper(str(tmp_path), "0" * 16)
        path, whole = str(tmp_path / "run" / ("keeper-" + "0" * 16)), keeper._fd
        keeper._is_wanted = False
        keeper._note({"type": "exited", "run": "1-a", "code": 7})
        keeper._fd = os.open(path, os.O_RDONLY)  # no write succeeds
        keeper._write()
        assert keeper._ended, "else the next daemon would hear that it never ran"
        os.close(keeper._fd)
        keeper._fd = whole
        keeper._leave()
        os.close(whole)
        assert apexd.read_results(read(path).encode()) == ({}, False), "else it would run again"

    def test_kill_all_waits_for_no_process_that_ended_as_nobody_listened(self, box):
        box.config({}, process={"web": {"command": "until [ -e go ]; do sleep 0.01; done"}})
        box.start()
        (task_id,) = enqueue(box, "sleep 60")
        command, (web,) = command_of(box, task_id), pids(box, "web")
        box.kill9()
        put(box, "go")
        eventually(lambda: not lives(web))
        began = time.monotonic()
        box.run("kill", "--all")
        assert time.monotonic() - began < 5 and not lives(command)

    @linux
    def test_a_daemon_that_can_open_nothing_concludes_nothing_and_does_not_spin(self, box):
        import resource

        box.start()
        (task_id,) = enqueue(box, "exec sleep 60")
        command, name = command_of(box, task_id), keepers(box)[keeper_of(box)]
        box.run("restart")
        daemon, size = box.pid(), os.path.getsize(box.file("daemon.log"))
        usual = resource.prlimit(daemon, resource.RLIMIT_NOFILE)
        resource.prlimit(daemon, resource.RLIMIT_NOFILE, (5, usual[1]))
        with greet(box, name) as raw:
            assert raw.recv(1 << 16), "it took the daemon's place"
        pause(2.5)
        resource.prlimit(daemon, resource.RLIMIT_NOFILE, usual)
        assert settle(box, enqueue(box, "exit 7"))[0]["exit_code"] == 7
        assert lives(command) and history_of(box, task_id) == [None]
        assert os.path.getsize(box.file("daemon.log")) < size + 20_000

    def test_beside_a_keeper_that_was_told_to_end_another_goes_on(self, box):
        box.config({}, process={"holder": {"command": ["sleep", "300"]}})
        box.start()
        (held,), keeper = pids(box, "holder", 1), keeper_of(box)
        os.kill(keeper, signal.SIGTERM)
        assert box.until(enqueue(box, "exit 7")[0], within_s=10)["exit_code"] == 7
        assert lives(held) and len(keepers(box)) == 2
        kill(held)
        eventually(lambda: keeper not in keepers(box) and pids(box, "holder", 1))

    def test_a_request_of_the_greatest_size_is_started_or_refused_but_not_for_ever(self, box):
        box.config({}, process={"holder": {"command": ["sleep", "300"]}})
        box.start()
        keeper = keeper_of(box)
        fields = {"type": "add", "commands": ["true"], "cwd": box.path, "token": "0" * 24}
        fields["env"] = {"PATH": box.env["PATH"], "TEXT": "\u00e9" * 6_000_000}
        data = json.dumps(fields, ensure_ascii=False).encode()
        with box.connect() as connection:
            connection.sendall(struct.pack(">I", len(data)) + data)
            (task_id,) = read_frame(connection)["ids"]
        task = box.until(task_id)
        assert (task["exit_code"], task["attempts"]) == (126, 1)
        assert task["reason"].startswith("spawn:E2BIG ")
        assert keeper_of(box) == keeper

    def test_what_cannot_be_started_fails_at_once_and_says_why(self, shared):
        box = shared
        write(os.path.join(box.path, "plain.txt"), "x")
        folder = os.path.join(box.path, "gone")
        os.mkdir(folder)
        missing, plain, directory = enqueue(
            box, ["no-such-command"], ["./plain.txt"], ["/tmp"], retries=3
        )
        client = apexd.Client(box.path)
        assert client.pause()["paused"] == ["*"]
        nowhere = client.add(["true"], cwd=folder, retries=3)
        os.rmdir(folder)
        long = client.add(["echo", "x" * (2 << 20)], retries=3)
        client.resume()
        client.close()
        expected = (
            (missing, 127, "spawn:ENOENT no-such-command"),
            (plain, 126, "spawn:EACCES ./plain.txt"),
            (directory, 126, "spawn:EACCES /tmp"),
            (nowhere, 127, "spawn:ENOENT"),
            (long, 126, "spawn:E2BIG"),
        )
        settle(box, [row[0] for row in expected])
        for task_id, code, reason in expected:
            task = box.look(task_id)
            assert (task["state"], task["outcome"]) == ("failed", "not_started")
            assert (task["exit_code"], task["attempts"]) == (code, 1)
            assert task["reason"].startswith(reason), task["reason"]
        assert folder in box.look(nowhere)["reason"]
        done = box.run("add", "--wait", "--", "no-such-command", rc=127)
        assert "no-such-command" in done.stderr
        assert ask(box, "why", missing).count("not found") == 1

    def test_limits_hold_for_the_command_and_show_as_its_signal(self, shared):
        box = shared
        shown, busy, greedy, large = enqueue(
            box,
            "ulimit -v; ulimit -t; ulimit -n",
            "while :; do :; done",
            [sys.executable, "-S", "-c", "bytearray(400 << 20)"],
            "ulimit -f 1; exec dd if=/dev/zero of=big bs=1k count=100",
        )
        settle(box, [shown, busy, greedy, large])
        assert ask(box, "logs", shown).split() == [str(300 * 1024), "1", "40"]
        assert "MemoryError" in ask(box, "logs", greedy)
        assert box.look(large)["signal"] == signal.SIGXFSZ
        assert box.look(busy)["signal"] == signal.SIGXCPU

    def test_a_task_gets_the_callers_folder_umask_and_allowed_environment_only(self, shared):
        box = shared
        secrets = {"AWS_SECRET": "s", "APEX_RUN_ID": "forged", "APEXD_FAILPOINT": "x"}
        kept = {"LC_TIME": "C", "HTTP_PROXY": "p", "PYTHONPATH": "lib", "TZ": "UTC"}
        folder = os.path.join(box.path, "sub")
        os.mkdir(folder)
        more = {**self.CALLER, **secrets, **kept, "KEPT": "k", "EXTRA": "e"}
        child = box.popen(
            "--project", box.path, "add", "-p", "--env", "EXTRA", "--env", "SET=1=2", "--shell",
            "pwd; umask; env", cwd=folder, env=more, umask=0o027,
        )
        task_id = int(child.communicate()[0])
        settle(box, [task_id])
        child_folder, mask, *lines = ask(box, "logs", task_id).splitlines()
        assert (child_folder, int(mask, 8)) == (folder, 0o027)
        got = dict(line.split("=", 1) for line in lines)
        run_id = got.pop("APEX_RUN_ID")
        assert run_id == box.look(task_id)["run_id"]
        own = {"APEX_TASK_ID": str(task_id), "APEX_ATTEMPT": "1", "APEX_PROJECT_PATH": box.path}
        wanted = {**box.env, **kept, **own, "KEPT": "k", "EXTRA": "e", "SET": "1=2"}
        assert wanted.items() <= got.items()
        extra = got.keys() - wanted.keys() - {"PWD", "OLDPWD", "SHLVL", "_", "APEX_STATE_DIR", "APEX_CLI"}
        assert extra == set(), "only what is on the list"

    def test_a_task_starts_with_default_signals_no_input_and_no_descriptors(self, box):
        ignoring = ["sh", "-c", 'trap "" CHLD HUP PIPE USR1; exec "$@"', "sh"]
        subprocess.run(
            [*ignoring, *box.command("start")], cwd=box.path, env=box.env, check=True,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        text = "grep -E 'Sig(Blk|Ign)' /proc/self/status; readlink /proc/self/fd/0; "
        text += "ls /proc/self/fd"
        shown, failing = enqueue(box, ["sh", "-c", text], ["false"])
        tasks = settle(box, [shown, failing])
        assert tasks[1]["exit_code"] == 1, "an inherited SIGCHLD ignored makes it 0"
        lines = ask(box, "logs", shown).split()
        of_glibc = 3 << 31  # 32 and 33, its own: posix_spawn(3) leaves them ignored
        assert [int(lines[i], 16) & ~of_glibc for i in (1, 3)] == [0, 0]
        assert lines[4:] == ["/dev/null", "0", "1", "2", "3"]  # 3 is the folder that ls reads

    def test_odd_arguments_arrive_as_they_are_and_a_leading_dash_is_refused(self, shared):
        box = shared
        words = [b"\xff\xfe", "", " a  b ", "$HOME;`id`", "'\"\\", "\n", "\u20ac", "-n"]
        task_id = int(box.run("add", "-p", "--", "printf", "[%s]", *words).stdout)
        settle(box, [task_id])
        expected = [w if isinstance(w, bytes) else w.encode() for w in words]
        path = box.file("logs", f"task-{task_id}.1.log")
        with open(path, "rb") as file:
            assert file.read() == b"".join(b"[%s]" % word for word in expected)
        for words in (["list"], ["show", task_id], ["--json", "show", task_id]):
            assert "printf" in ask(box, *words)
        status, out, err = within(box, "add", "--", "-a", "x")
        assert (status, out, "./-a" in err) == (2, "", True)
        assert box.request({"type": "add", "commands": [["-a"]]})["code"] == "bad_request"

    def test_a_daemon_started_by_a_task_is_not_ended_with_it(self, boxes):
        outer, inner = boxes(), boxes()
        outer.start()
        words = " ".join(inner.command("--project", inner.path, "start"))
        (task_id,) = enqueue(outer, f"env HOME={inner.home} {words}; sleep 60")
        eventually(lambda: "PID" in ask(outer, "logs", task_id), why="a daemon was started")
        pid = inner.pid()
        ask(outer, "cancel", task_id)
        assert outer.until(task_id)["state"] == "cancelled"
        assert inner.json("status")["pid"] == pid

    def test_a_logs_folder_removed_while_the_daemon_runs_costs_no_task(self, shared):
        shutil.rmtree(shared.file("logs"))
        (task_id,) = enqueue(shared, "echo hi")
        assert settle(shared, [task_id])[0]["exit_code"] == 0
        assert ask(shared, "logs", task_id) == "hi\n"

    def test_a_launcher_stands_before_each_command_of_its_group(self, shared):
        (task_id,) = enqueue(shared, 'echo "$LAUNCHED"', group="cluster")
        settle(shared, [task_id])
        assert ask(shared, "logs", task_id) == "1\n"


@linux
@needs("flock")
class TestCrashWindows:
    """Daemon or keeper kills itself at each step of a run; the other one lives or is killed, too."""

    others = pytest.mark.parametrize("other", ["lives", "is killed"])

    def hold(self, box, *words):
        """Return the command of a worker that ends once there is a file `go`."""
        return f"until [ -e go ]; do sleep 0.02; done; exec {' '.join([*worker(box), *words])}"

    HOLDER = {"holder": {"command": ["sleep", "300"]}}  # without a child a keeper leaves

    def die(self, box, point, *lines):
        """Have a daemon kill itself as it claims these tasks; its keeper lives; return the ids."""
        box.config({"daemon": {"max_concurrent": 4}}, process=self.HOLDER)
        box.start(env={"APEXD_FAILPOINT": point})
        pids(box, "holder", 1)
        box.request({"type": "pause"})
        ids = box.batch(lines)
        with contextlib.suppress(OSError, TypeError, ValueError):
            box.request({"type": "resume"})
        eventually(lambda: not lives_in(box.file("daemon.pid")), why="it killed itself")
        assert len(keepers(box)) == 1, "the keeper did not notice"
        return ids

    def go_on(self, box, other):
        if other == "is killed":
            kill(keeper_of(box))
        box.start()
        put(box, "go")

    @others
    @pytest.mark.parametrize("point", ["claim", "commit", "sent"])
    def test_a_daemon_that_dies_within_a_start_neither_loses_nor_doubles_it(self, box, point, other):
        work = lambda name: {"command": self.hold(box, name, "0", "7")}
        for number in range(ROUNDS if SLOW else 1):
            lines = [work(f"{number}a"), {**work(f"{number}b"), "on_lost": "fail"}]
            again, never = self.die(box, point, *lines)
            with box.database() as db:
                rows = db.execute("SELECT state, attempts FROM tasks ORDER BY id").fetchall()
                found = {tuple(row) for row in rows[-2:]}
            self.go_on(box, other)
            settle(box, [again, never])
            assert found == {("queued", 0)} if point == "claim" else {("running", 1)}
            is_lost = point != "claim" and other == "is killed"
            assert history_of(box, again) == ["lost"] * is_lost + ["failed"]
            assert history_of(box, never) == (["lost"] if is_lost else ["failed"])
            task = box.look(again)
            assert (task["exit_code"], task["losses"]) == (7, 0)
            box.stop()
            put(box, "go", None)
            expected = [f"{number}a"] + [f"{number}b"] * (not is_lost)
            assert [name for name in lines_of(box, "begun") if name[:-1] == str(number)] == expected
        assert lines_of(box, "overlaps") == []

    def test_what_was_only_claimed_never_ran_though_its_keeper_has_left(self, box):
        box.start(env={"APEXD_FAILPOINT": "commit"})
        (task_id,) = box.batch([{"command": "exit 7", "on_lost": "fail"}])
        eventually(lambda: not lives_in(box.file("daemon.pid")), why="it killed itself")
        eventually(lambda: not keepers(box), why="it has no child")
        box.start()
        settle(box, [task_id])
        assert history_of(box, task_id) == ["failed"] and box.look(task_id)["exit_code"] == 7

    @others
    def test_a_result_on_disk_counts_though_the_keeper_was_not_told(self, box, other):
        for number in range(ROUNDS):
            put(box, "go")
            (task_id,) = self.die(box, "result", self.hold(box, str(number), "0", "7"))
            self.go_on(box, other)
            task = box.look(task_id)
            assert (task["exit_code"], task["attempts"], task["losses"]) == (7, 1, 0)
            box.stop()
        assert lines_of(box, "begun") == [str(number) for number in range(ROUNDS)]

    @others
    @pytest.mark.parametrize("point", ["read:2", "spawn:2", "fork", "exited"])
    def test_what_a_dying_keeper_had_is_ended_and_lost_then_run_again(self, box, point, other):
        work, count = worker(box), ROUNDS if SLOW else 1
        for number in range(count):
            box.config({"daemon": {"max_concurrent": 4}}, process=self.HOLDER)
            box.start(env={"APEXD_FAILPOINT": point})
            pids(box, "holder", 1)
            keeper = keeper_of(box)
            box.kill9()  # the next daemon starts keepers that live
            more = {"limits": {"nice": 1}} if point == "fork" else {}
            box.config({"daemon": {"max_concurrent": 4}}, process=self.HOLDER, **more)
            box.start()
            assert keeper_of(box) == keeper
            first = "" if point == "exited" else "[ $APEX_ATTEMPT = 1 ] && s=60; "
            (again,) = enqueue(box, f"{first} exec {' '.join(work)} {number}a ${{s:-0}} 7 closed")
            (never,) = enqueue(box, [*work, f"{number}b", "60", "7"], on_lost="fail")
            eventually(lambda: not lives(keeper), why="it killed itself")
            if other == "is killed":
                box.kill9()
                box.start()
            is_elsewhere = lambda: box.look(never)["keeper"] in keepers(box).values()
            if eventually(lambda: box.look(never)["outcome"] or is_elsewhere()) is True:
                box.request({"type": "cancel", "ids": [never]})  # it came too late to be lost
            first, second = settle(box, [again, never])
            assert (first["exit_code"], first["losses"]) == (7, 0)
            assert history_of(box, again) == ["lost", "failed"]
            assert second["outcome"] in ("lost", "cancelled") and second["attempts"] == 1
            box.stop()
            assert not box.processes()
        assert lines_of(box, "overlaps") == []
        ended = [f"{number}a" for number in range(count)] * (1 + (point == "exited"))
        assert lines_of(box, "ended") == sorted(ended)

    @others
    @pytest.mark.parametrize("wish", ["cancelled", "timeout"])
    def test_a_wish_on_disk_is_carried_out_by_the_next_daemon(self, box, wish, other):
        box.start(env={"APEXD_FAILPOINT": "wish"})
        work = [*worker(box), "a", "60", "7", "closed"]
        options = {"timeout": 0.5} if wish == "timeout" else {}
        (task_id,) = enqueue(box, work, **options)
        eventually(lambda: lines_of(box, "begun"))
        if wish == "cancelled":
            with contextlib.suppress(OSError):
                box.request({"type": "cancel", "ids": [task_id]})
        eventually(lambda: not lives_in(box.file("daemon.pid")), why="it killed itself")
        self.go_on(box, other)
        task = box.until(task_id)
        assert (task["outcome"], task["attempts"], task["losses"]) == (wish, 1, 0)
        assert lines_of(box, "begun") == ["a"] and lines_of(box, "ended") == []
        assert not [words for words in box.processes().values() if "sleep" in words]

    @others
    def test_a_process_that_was_noted_and_not_started_is_started_once(self, box, other):
        web = {"command": ["sh", "-c", "echo x >>begun; exec sleep 301"], "backoff": 0.1}
        for number in range(ROUNDS):
            box.config({}, process={**self.HOLDER, "web": web})
            box.warm()
            box.quick("start", env={"APEXD_FAILPOINT": "note:2"}, rc=None)
            eventually(lambda: not lives_in(box.file("daemon.pid")), why="it killed itself")
            assert len(keepers(box)) == 1 and len(lines_of(box, "begun")) == number
            self.go_on(box, other)
            pids(box, "web", 1)
            eventually(lambda: len(lines_of(box, "begun")) == number + 1)
            assert instances(box)[0]["restart_count"] == (other == "is killed")
            assert len([c for c in box.processes().values() if c.startswith("sleep 301")]) == 1
            box.stop()

    def test_the_places_to_crash_at_are_those_of_the_protocol(self):
        points = set(re.findall(r'failpoint\("(\w+)"', read(PROGRAM)))
        assert points - {"migration", "look"} == {
            "claim", "commit", "sent", "read", "spawn", "fork", "exited", "result", "wish", "note",
        }  # fmt: skip


def greet(box, name, since_s=10.0):
    """Connect to a keeper as a daemon would; it hangs up on the former one."""
    path = box.file("run", "keeper-" + name)
    head = json.loads(read(path).partition("\n")[0])
    connection = apexd.Platform.connect(os.path.dirname(path), head, 1.0)
    connection.settimeout(since_s)
    return connection


def patch(box, **constants):
    """Change constants in the project's own copy of apexd.py."""
    path = os.path.join(box.path, "apexd.py")
    text = read(path)
    for name, value in constants.items():
        text, count = re.subn(rf"(?m)^{name} = [^#\n]*", f"{name} = {value!r}  ", text)
        assert count == 1, name
    write(path, text)


@linux
@needs("flock", "setsid")
class TestKeeperLife:
    """What a keeper does while daemons come and go, stand still, or are of another version."""

    WAIT = "until [ -e go ]; do sleep 0.02; done; "

    @pytest.mark.parametrize("half", ["", pytest.param("before", marks=slow), "after"])
    def test_what_a_dead_daemon_sent_to_a_frozen_keeper_runs_once(self, box, half):
        work = worker(box)
        box.config({}, process={"holder": {"command": ["sleep", "300"]}})
        box.start()
        pids(box, "holder", 1)
        (keeper, name) = next(iter(keepers(box).items()))
        for number in range(ROUNDS if SLOW else 1):
            os.kill(keeper, signal.SIGSTOP)
            (task_id,) = enqueue(box, [*work, str(number), "0.1", "7"])
            box.until(task_id, "running")
            daemon = box.kill9()
            raw = half and greet(box, name)
            if half == "after":
                box.start()
                eventually(lambda: times_logged(box, "Adopting task") > number)
            if half:
                raw.sendall(struct.pack(">I", 4000) + b'{"type": "start", "run": "')
            if half == "before":
                raw.close()
            if half != "after":
                box.start()
            os.kill(keeper, signal.SIGCONT)
            task = settle(box, [task_id])[0]
            assert (task["exit_code"], task["attempts"], task["losses"]) == (7, 1, 0)
            assert list(keepers(box)) == [keeper] and box.pid() != daemon
            if half == "after":
                raw.close()
        assert lines_of(box, "begun") == sorted(str(n) for n in range(ROUNDS if SLOW else 1))

    @pytest.mark.parametrize("daemon", ["lives", "is dead"])
    def test_half_a_frame_of_a_daemon_that_was_displaced_is_dropped(self, box, daemon):
        box.config({}, process={"holder": {"command": ["sleep", "300"]}})
        box.start()
        (held,) = enqueue(box, self.WAIT + "exit 6")
        pid = command_of(box, held)
        (keeper, name) = next(iter(keepers(box).items()))
        if daemon == "is dead":
            box.kill9()
        with greet(box, name) as raw:
            with contextlib.suppress(ConnectionError):  # a daemon that lives is back at once
                raw.sendall(struct.pack(">I", 4000) + b'{"type": "start", "run": "')
                assert raw.recv(1 << 16), "it is greeted"
            pause(0.05)
            if daemon == "is dead":
                box.start()
            with contextlib.suppress(ConnectionError):
                eventually(lambda: raw.recv(1 << 16) == b"", why="the daemon took its place")
        (task_id,) = enqueue(box, "exit 5")
        put(box, "go")
        codes = [(task["exit_code"], task["attempts"]) for task in settle(box, [held, task_id])]
        assert codes == [(6, 1), (5, 1)] and list(keepers(box)) == [keeper] and not lives(pid)

    def test_a_daemon_that_reads_nothing_does_not_hang_its_keeper(self, box):
        os.makedirs(box.file("run"), mode=0o700, exist_ok=True)
        os.chmod(box.state, 0o700)
        name, count = "0" * 16, 20_000 if SLOW else 500
        keeper = box.popen("_keeper", box.state, name)
        eventually(lambda: keepers(box))
        runs = [f"1-{number:0200d}" for number in range(count)]
        word = {"type": "start", "argv": ["true"], "env": {}, "cwd": box.path, "umask": 18}
        word["log"] = os.devnull
        with greet(box, name, 60.0) as connection:
            for run in runs:
                connection.sendall(apexd.pack_frame({**word, "run": run}))
            children = f"/proc/{keeper.pid}/task/{keeper.pid}/children"
            pause(0.3)
            eventually(lambda: not read(children), 120, "all have run, though nobody listens")
            told, inbox = {}, bytearray()
            while len(told) < count:
                inbox += connection.recv(1 << 16)
                for word in apexd.take_frames(inbox):
                    if word["type"] == "exited":
                        assert word["run"] not in told and word["code"] == 0, word
                        told[word["run"]] = word
            assert set(told) == set(runs)
            connection.sendall(apexd.pack_frame({"type": "forget", "runs": runs}))
            connection.sendall(apexd.pack_frame({"type": "quit"}))
            assert connection.recv(1) == b"", "nothing is told twice"
        assert keeper.wait(20) == 0

    def test_an_update_leaves_the_keeper_and_all_that_runs(self, box):
        box.config({}, process={"web": {"command": ["sleep", "300"]}})
        box.start()
        (task_id,) = enqueue(box, self.WAIT + "exit 6")
        before = keeper_of(box), command_of(box, task_id), pids(box, "web", 1)
        patch(box, __version__="99.0.0")
        box.run("restart", quick=False)
        eventually(lambda: box.look(task_id)["pid"])
        assert (keeper_of(box), command_of(box, task_id), pids(box, "web", 1)) == before
        assert box.json("status", quick=False)["version"] == "99.0.0"
        put(box, "go")
        task = box.until(task_id)
        assert (task["exit_code"], task["attempts"], task["losses"]) == (6, 1, 0)
        assert instances(box)[0]["restart_count"] == 0

    def test_a_keeper_of_another_protocol_is_left_to_finish_and_starts_go_to_a_new_one(self, box):
        box.start()
        (old,) = enqueue(box, self.WAIT + "exit 6")
        keeper, command = keeper_of(box), command_of(box, old)
        patch(box, KEEPER_PROTOCOL=99)
        box.run("restart", quick=False)
        (new,) = enqueue(box, "exit 5")
        assert settle(box, [new])[0]["exit_code"] == 5
        assert len(keepers(box)) == 2 and lives(keeper) and lives(command)
        put(box, "go")
        task = settle(box, [old])[0]
        assert (task["exit_code"], task["attempts"], task["losses"]) == (6, 1, 0)
        eventually(lambda: not lives(keeper), why="it has left")
        assert box.stop() and not box.processes()

    def test_all_that_a_killed_keeper_had_is_ended_then_run_again_or_failed(self, box):
        work, web = " ".join(worker(box)), "exec 9>>lock.web; flock -n 9 || echo web >>overlaps; "
        web += "setsid sleep 303 & setsid sleep 304 9>&- & exec sleep 305"
        often = {"backoff": 0.05, "backoff_max": 0.1, "max_restarts": 1000}
        box.config({}, process={"web": {"command": web, **often}})
        box.start()
        for number in range(ROUNDS):
            away = f"[ $APEX_ATTEMPT = 1 ] && s=60; setsid {work} {number}a ${{s:-0}} 0 & wait $!"
            (again,) = enqueue(box, away)
            (never,) = enqueue(box, f"setsid {work} {number}b 60 0 & sleep 60", on_lost="fail")
            eventually(lambda: set(lines_of(box, "begun")) >= {f"{number}a", f"{number}b"})
            (before,) = pids(box, "web", 1)
            kill(keeper_of(box))
            task, failed = settle(box, [again, never])
            assert (task["state"], task["losses"]) == ("succeeded", 0)
            assert history_of(box, again) == ["lost", "ok"]
            assert (failed["state"], failed["outcome"], failed["attempts"]) == ("failed", "lost", 1)
            assert not lives(before)
            eventually(lambda: pids(box, "web", 1) != [before])
            sleeps = lambda: [words for words in box.processes().values() if "sleep 60" in words]
            assert not sleeps(), "all that they started is gone"
        assert lines_of(box, "overlaps") == []

    def test_a_task_that_kills_its_keeper_costs_its_neighbours_nothing(self, box):
        """FAULTS M2, DESIGN 6.13."""
        box.config({"daemon": {"max_concurrent": 6}})
        box.start()
        first = "echo x >>ready; [ $APEX_ATTEMPT = 1 ] && "
        all_run = "until [ $(wc -l <ready) -ge 6 ]; do sleep 0.02; done; "
        neighbours = enqueue(box, *[f"{first} sleep 60; sleep 0.4; exit 0"] * 5)
        (poison,) = enqueue(box, f"{first} {all_run} kill -9 $PPID; sleep 60")
        tasks = settle(box, [*neighbours, poison])
        assert [task["state"] for task in tasks] == ["succeeded"] * 5 + ["failed"]
        assert {task["attempts"] for task in tasks[:5]} == {2}
        assert {task["losses"] for task in tasks[:5]} == {0}
        assert (tasks[5]["losses"], tasks[5]["outcome"]) == (3, "lost")
        assert history_of(box, poison) == ["lost"] * 4
        assert [task["id"] for task in ask_json(box, "dlq")] == [poison]
        (task_id,) = enqueue(box, "exit 3")
        assert settle(box, [task_id])[0]["exit_code"] == 3, "the queue goes on"

    def test_a_signal_is_told_from_a_status_and_what_was_used_is_shown(self, box):
        box.start()
        burn = "i=0; while [ $i -lt 60000 ]; do i=$((i+1)); done; "
        killed, exited = enqueue(box, burn + "kill -9 $$", "exit 137")
        tasks = settle(box, [killed, exited])
        ends = [(task["exit_code"], task["signal"], task["state"]) for task in tasks]
        assert ends == [(137, 9, "failed"), (137, None, "failed")]
        for task in (box.task(killed), ask_json(box, "list")[0], box.look(killed)):
            assert task["id"] == killed and 0.01 < task["cpu_s"] < 60
            assert 1e5 < task["max_rss"] < 1e9
        assert box.look(exited)["cpu_s"] < tasks[0]["cpu_s"]

    def test_while_a_keeper_is_frozen_all_answer_then_all_goes_on(self, box):
        patch(box, KEEPER_ANSWER_S=1.0)
        box.config({"daemon": {"max_concurrent": 8}})
        box.start()
        (before,) = enqueue(box, "echo up; " + self.WAIT + "exit 4")
        keeper = keeper_of(box)
        command_of(box, before)
        os.kill(keeper, signal.SIGSTOP)
        began = time.monotonic()
        (held,) = enqueue(box, "exit 5")
        box.until(held, "running")
        put(box, "go")
        for words in (["status"], ["list"], ["logs", before], ["show", held], ["add", "true"]):
            ask(box, *words)
        assert time.monotonic() - began < 5
        eventually(lambda: "does not answer" in ask(box, "why", held))
        (other,) = enqueue(box, "exit 6")
        assert settle(box, [other])[0]["exit_code"] == 6, "a second keeper takes it"
        assert tasks_of(box, [before, held])[0]["state"] == "running"
        os.kill(keeper, signal.SIGCONT)
        codes = [(task["exit_code"], task["attempts"]) for task in settle(box, [before, held])]
        assert codes == [(4, 1), (5, 1)]

    def test_results_outlive_daemon_and_keeper(self, box):
        box.config({"daemon": {"max_concurrent": 8}})
        for _ in range(ROUNDS):
            box.start()
            ends = ("exit 0", "exit 7", "kill -9 $$", "kill -15 $$", "exit 137")
            ids = enqueue(box, *(f"echo x >>begun; {self.WAIT} {end}" for end in ends))
            for task_id in ids:
                command_of(box, task_id)
            keeper, name = next(iter(keepers(box).items()))
            box.kill9()
            put(box, "go")
            eventually(lambda: not lives(keeper), why="nobody needs it any more")
            assert '"left"' in read(box.file("run", "keeper-" + name))
            box.start()
            tasks = settle(box, ids)
            found = [(task["exit_code"], task["signal"], task["attempts"]) for task in tasks]
            assert found == [(0, None, 1), (7, None, 1), (137, 9, 1), (143, 15, 1), (137, None, 1)]
            eventually(lambda: not os.path.exists(box.file("run", "keeper-" + name)))
            assert lines_of(box, "begun") == ["x"] * 5, "once each"
            put(box, "go", None)
            put(box, "begun", None)
            box.stop()

    def test_the_end_of_what_ended_without_a_daemon_is_its_own(self, box):
        box.start()
        (task_id,) = enqueue(box, f"{self.WAIT} exit 6")
        command = command_of(box, task_id)
        box.kill9()
        put(box, "go")
        eventually(lambda: not lives(command))
        ended = time.time()
        pause(1.5)
        box.start()
        task = box.until(task_id, "failed")
        assert task["started_at"] < task["finished_at"] < ended + 0.5

    @posix
    def test_a_keeper_makes_no_folder_in_a_place_that_it_lost(self, box):
        """A daemon that cannot look sends a start; then, where it was, there is nothing."""
        box.start()
        (task_id,) = enqueue(box, "echo it ran")
        box.until(task_id)
        keeper = keeper_of(box)
        os.kill(keeper, signal.SIGSTOP)
        (late,) = enqueue(box, "echo it ran")
        box.until(late, "running")
        daemon, away = box.pid(), box.path + "-away"
        os.rename(box.path, away)
        os.kill(keeper, signal.SIGCONT)
        eventually(lambda: not lives(daemon))
        assert not os.path.exists(box.path), "nothing was made anew"
        os.rename(away, box.path)
        box.start()
        box.until(late, "succeeded")
        assert box.output(late) == "it ran\n"

    @root
    def test_on_a_full_disk_a_keeper_stays_and_tells_later(self, box):
        shutil.rmtree(box.state)
        os.mkdir(box.state)
        with mounted(box.state, "size=4m,mode=0700"):
            try:
                box.config({"daemon": {"max_concurrent": 8}})
                box.start()
                ids = enqueue(box, *(f"echo x >>begun; {self.WAIT} exit {n}" for n in (0, 7, 9)))
                commands = [command_of(box, task_id) for task_id in ids]
                keeper = keeper_of(box)
                box.kill9()
                with open(box.file("filler"), "wb", buffering=0) as filler:
                    for size in (1 << 16, 4096, 1):
                        with contextlib.suppress(OSError):
                            while filler.write(b"x" * size):
                                pass
                # What is left of its file's last page must be filled, too.
                with open(box.file("run", "keeper-" + keepers(box)[keeper]), "ab", 0) as file:
                    with contextlib.suppress(OSError):
                        while file.write(b"\n"):
                            pass
                put(box, "go")
                eventually(lambda: not any(map(lives, commands)))
                pause(1.2)  # it has tried twice
                assert lives(keeper), "what it knows is not written yet"
                os.unlink(box.file("filler"))
                box.start()
                found = [(t["exit_code"], t["attempts"]) for t in settle(box, ids)]
                assert found == [(0, 1), (7, 1), (9, 1)]
                assert lines_of(box, "begun") == ["x"] * 3, "once each"
            finally:
                put(box, "go")
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(box.file("filler"))
                box.run("stop", rc=None)

    @pytest.mark.parametrize("daemon", ["lives", "is killed"])
    def test_when_the_project_is_removed_all_is_ended(self, box, daemon):
        soon = {"graceful_timeout": 0.2, "stop_timeout": 0.5}
        box.config({"daemon": soon}, process={"web": {"command": ["sleep", "300"]}})
        box.start()
        (task_id,) = enqueue(box, "trap '' TERM; while :; do sleep 0.1; done")
        command_of(box, task_id), pids(box, "web", 1)
        pid = box.pid()
        if daemon == "is killed":
            os.kill(pid, signal.SIGSTOP)
        shutil.rmtree(box.state, ignore_errors=True)
        if daemon == "is killed":
            kill(pid)
        eventually(lambda: not box.processes(), 30, "children, keeper and daemon are gone")


# ============================================================================
# 11. CRON - when schedules fire; what a thread that was late makes of it
# ============================================================================

HAS_ZONES = bool(zoneinfo.available_timezones())
zones = pytest.mark.skipif(not HAS_ZONES, reason="no time zone data here")
UTC = datetime.timezone.utc

# A start, then expressions and their next five fires: what equals the fire before (date, UTC
# offset) is left out. Checked by hand; the oracle below must agree with them as well.
CRON_CASES = """
America/New_York 2025-03-08 23:00
    30 2 * * *       | 03-09 03:00-04, 03-10 02:30, 03-11 02:30, 03-12 02:30, 03-13 02:30
    0 2 * * *        | 03-09 03:00-04, 03-10 02:00, 03-11 02:00, 03-12 02:00, 03-13 02:00
    59 2 * * *       | 03-09 03:00-04, 03-10 02:59, 03-11 02:59, 03-12 02:59, 03-13 02:59
    0 3 * * *        | 03-09 03:00-04, 03-10 03:00, 03-11 03:00, 03-12 03:00, 03-13 03:00
    10,50 2 * * *    | 03-09 03:00-04, 03-10 02:10, 02:50, 03-11 02:10, 02:50
    30 1-3 * * *     | 03-09 01:30-05, 03:00-04, 03:30, 03-10 01:30, 02:30
    0 2 * * sun      | 03-09 03:00-04, 03-16 02:00, 03-23 02:00, 03-30 02:00, 04-06 02:00
    0 2 9 3 *        | 03-09 03:00-04, 2026-03-09 02:00, 2027-03-09 02:00-05, 2028-03-09 02:00, 2029-03-09 02:00
    15 2 9 * mon     | 03-09 03:00-04, 03-10 02:15, 03-17 02:15, 03-24 02:15, 03-31 02:15
    */30 * * * *     | 03-08 23:30-05, 03-09 00:00, 00:30, 01:00, 01:30
    */20 2 * * *     | 03-10 02:00-04, 02:20, 02:40, 03-11 02:00, 02:20
    30 * * * *       | 03-08 23:30-05, 03-09 00:30, 01:30, 03:30-04, 04:30
    5 */2 * * *      | 03-09 00:05-05, 04:05-04, 06:05, 08:05, 10:05
    * 2 * * *        | 03-10 02:00-04, 02:01, 02:02, 02:03, 02:04
    0 0 * * *        | 03-09 00:00-05, 03-10 00:00-04, 03-11 00:00, 03-12 00:00, 03-13 00:00
    30 1 * * *       | 03-09 01:30-05, 03-10 01:30-04, 03-11 01:30, 03-12 01:30, 03-13 01:30
    @hourly          | 03-09 00:00-05, 01:00, 03:00-04, 04:00, 05:00
    @daily           | 03-09 00:00-05, 03-10 00:00-04, 03-11 00:00, 03-12 00:00, 03-13 00:00
    @weekly          | 03-09 00:00-05, 03-16 00:00-04, 03-23 00:00, 03-30 00:00, 04-06 00:00
    0,59 2,3 * * *   | 03-09 03:00-04, 03:59, 03-10 02:00, 02:59, 03:00
America/New_York 2025-11-01 23:00
    */30 1 2 11 *    | 11-02 01:00-04, 01:30, 01:00-05, 01:30, 2026-11-02 01:00
    30 1 * * *       | 11-02 01:30-04, 11-03 01:30-05, 11-04 01:30, 11-05 01:30, 11-06 01:30
    0 1 * * *        | 11-02 01:00-04, 11-03 01:00-05, 11-04 01:00, 11-05 01:00, 11-06 01:00
    59 1 * * *       | 11-02 01:59-04, 11-03 01:59-05, 11-04 01:59, 11-05 01:59, 11-06 01:59
    0 2 * * *        | 11-02 02:00-05, 11-03 02:00, 11-04 02:00, 11-05 02:00, 11-06 02:00
    10,50 1 * * *    | 11-02 01:10-04, 01:50, 11-03 01:10-05, 01:50, 11-04 01:10
    30 0-2 * * *     | 11-02 00:30-04, 01:30, 02:30-05, 11-03 00:30, 01:30
    0 1 * * sun      | 11-02 01:00-04, 11-09 01:00-05, 11-16 01:00, 11-23 01:00, 11-30 01:00
    0 1 2 11 *       | 11-02 01:00-04, 2026-11-02 01:00-05, 2027-11-02 01:00-04, 2028-11-02 01:00, 2029-11-02 01:00
    */30 * * * *     | 11-01 23:30-04, 11-02 00:00, 00:30, 01:00, 01:30
    */20 1 * * *     | 11-02 01:00-04, 01:20, 01:40, 01:00-05, 01:20
    30 * * * *       | 11-01 23:30-04, 11-02 00:30, 01:30, 01:30-05, 02:30
    5 */2 * * *      | 11-02 00:05-04, 02:05-05, 04:05, 06:05, 08:05
    * 1 2 11 *       | 11-02 01:00-04, 01:01, 01:02, 01:03, 01:04
    0 0 * * *        | 11-02 00:00-04, 11-03 00:00-05, 11-04 00:00, 11-05 00:00, 11-06 00:00
    @hourly          | 11-02 00:00-04, 01:00, 01:00-05, 02:00, 03:00
    @daily           | 11-02 00:00-04, 11-03 00:00-05, 11-04 00:00, 11-05 00:00, 11-06 00:00
    0 1 * * *        | 11-02 01:00-04, 11-03 01:00-05, 11-04 01:00, 11-05 01:00, 11-06 01:00
    59 0 * * *       | 11-02 00:59-04, 11-03 00:59-05, 11-04 00:59, 11-05 00:59, 11-06 00:59
    0,30 1-2 * * 0   | 11-02 01:00-04, 01:30, 02:00-05, 02:30, 11-09 01:00
Europe/Berlin 2025-03-29 22:00
    30 2 * * *       | 03-30 03:00+02, 03-31 02:30, 04-01 02:30, 04-02 02:30, 04-03 02:30
    0 2 * * *        | 03-30 03:00+02, 03-31 02:00, 04-01 02:00, 04-02 02:00, 04-03 02:00
    59 2 * * *       | 03-30 03:00+02, 03-31 02:59, 04-01 02:59, 04-02 02:59, 04-03 02:59
    0 3 * * *        | 03-30 03:00+02, 03-31 03:00, 04-01 03:00, 04-02 03:00, 04-03 03:00
    15,45 2 30 3 *   | 03-30 03:00+02, 2026-03-30 02:15, 02:45, 2027-03-30 02:15, 02:45
    0 1-4 * * *      | 03-30 01:00+01, 03:00+02, 04:00, 03-31 01:00, 02:00
    30 2 * * sun     | 03-30 03:00+02, 04-06 02:30, 04-13 02:30, 04-20 02:30, 04-27 02:30
    */15 * * * *     | 03-29 22:15+01, 22:30, 22:45, 23:00, 23:15
    */30 2 * * *     | 03-31 02:00+02, 02:30, 04-01 02:00, 02:30, 04-02 02:00
    45 * * * *       | 03-29 22:45+01, 23:45, 03-30 00:45, 01:45, 03:45+02
    30 */2 * * *     | 03-29 22:30+01, 03-30 00:30, 04:30+02, 06:30, 08:30
    0 0 * * *        | 03-30 00:00+01, 03-31 00:00+02, 04-01 00:00, 04-02 00:00, 04-03 00:00
    @hourly          | 03-29 23:00+01, 03-30 00:00, 01:00, 03:00+02, 04:00
    @monthly         | 04-01 00:00+02, 05-01 00:00, 06-01 00:00, 07-01 00:00, 08-01 00:00
    30 2 31 3 *      | 03-31 02:30+02, 2026-03-31 02:30, 2027-03-31 02:30, 2028-03-31 02:30, 2029-03-31 02:30
    30 2 30 3 sat    | 03-30 03:00+02, 2026-03-07 02:30+01, 03-14 02:30, 03-21 02:30, 03-28 02:30
Europe/Berlin 2025-10-25 22:00
    30 2 * * *       | 10-26 02:30+02, 10-27 02:30+01, 10-28 02:30, 10-29 02:30, 10-30 02:30
    0 2 * * *        | 10-26 02:00+02, 10-27 02:00+01, 10-28 02:00, 10-29 02:00, 10-30 02:00
    59 2 * * *       | 10-26 02:59+02, 10-27 02:59+01, 10-28 02:59, 10-29 02:59, 10-30 02:59
    0 3 * * *        | 10-26 03:00+01, 10-27 03:00, 10-28 03:00, 10-29 03:00, 10-30 03:00
    15,45 2 26 10 *  | 10-26 02:15+02, 02:45, 2026-10-26 02:15+01, 02:45, 2027-10-26 02:15+02
    0 1-4 * * *      | 10-26 01:00+02, 02:00, 03:00+01, 04:00, 10-27 01:00
    30 2 * * sun     | 10-26 02:30+02, 11-02 02:30+01, 11-09 02:30, 11-16 02:30, 11-23 02:30
    */15 * * * *     | 10-25 22:15+02, 22:30, 22:45, 23:00, 23:15
    */30 2 * * *     | 10-26 02:00+02, 02:30, 02:00+01, 02:30, 10-27 02:00
    45 * * * *       | 10-25 22:45+02, 23:45, 10-26 00:45, 01:45, 02:45
    30 */2 * * *     | 10-25 22:30+02, 10-26 00:30, 02:30, 02:30+01, 04:30
    0 0 * * *        | 10-26 00:00+02, 10-27 00:00+01, 10-28 00:00, 10-29 00:00, 10-30 00:00
    @hourly          | 10-25 23:00+02, 10-26 00:00, 01:00, 02:00, 02:00+01
    0 2 26 10 *      | 10-26 02:00+02, 2026-10-26 02:00+01, 2027-10-26 02:00+02, 2028-10-26 02:00, 2029-10-26 02:00
    1-59/29 2 * * *  | 10-26 02:01+02, 02:30, 02:59, 10-27 02:01+01, 02:30
Australia/Lord_Howe 2025-10-04 23:30
    0 2 * * *        | 10-05 02:30+11, 10-06 02:00, 10-07 02:00, 10-08 02:00, 10-09 02:00
    15 2 * * *       | 10-05 02:30+11, 10-06 02:15, 10-07 02:15, 10-08 02:15, 10-09 02:15
    29 2 * * *       | 10-05 02:30+11, 10-06 02:29, 10-07 02:29, 10-08 02:29, 10-09 02:29
    30 2 * * *       | 10-05 02:30+11, 10-06 02:30, 10-07 02:30, 10-08 02:30, 10-09 02:30
    45 2 * * *       | 10-05 02:45+11, 10-06 02:45, 10-07 02:45, 10-08 02:45, 10-09 02:45
    10,40 2 * * *    | 10-05 02:30+11, 02:40, 10-06 02:10, 02:40, 10-07 02:10
    */10 * * * *     | 10-04 23:40+10:30, 23:50, 10-05 00:00, 00:10, 00:20
    15 * * * *       | 10-05 00:15+10:30, 01:15, 03:15+11, 04:15, 05:15
    0 * * * *        | 10-05 00:00+10:30, 01:00, 03:00+11, 04:00, 05:00
    */15 2 * * *     | 10-05 02:30+11, 02:45, 10-06 02:00, 02:15, 02:30
    0 3 * * *        | 10-05 03:00+11, 10-06 03:00, 10-07 03:00, 10-08 03:00, 10-09 03:00
    15 */2 * * *     | 10-05 00:15+10:30, 04:15+11, 06:15, 08:15, 10:15
Australia/Lord_Howe 2025-04-05 23:30
    0 1 * * *        | 04-06 01:00+11, 04-07 01:00+10:30, 04-08 01:00, 04-09 01:00, 04-10 01:00
    15 1 * * *       | 04-06 01:15+11, 04-07 01:15+10:30, 04-08 01:15, 04-09 01:15, 04-10 01:15
    30 1 * * *       | 04-06 01:30+11, 04-07 01:30+10:30, 04-08 01:30, 04-09 01:30, 04-10 01:30
    45 1 * * *       | 04-06 01:45+11, 04-07 01:45+10:30, 04-08 01:45, 04-09 01:45, 04-10 01:45
    59 1 * * *       | 04-06 01:59+11, 04-07 01:59+10:30, 04-08 01:59, 04-09 01:59, 04-10 01:59
    0 2 * * *        | 04-06 02:00+10:30, 04-07 02:00, 04-08 02:00, 04-09 02:00, 04-10 02:00
    10,40 1 * * *    | 04-06 01:10+11, 01:40, 04-07 01:10+10:30, 01:40, 04-08 01:10
    */10 * * * *     | 04-05 23:40+11, 23:50, 04-06 00:00, 00:10, 00:20
    45 * * * *       | 04-05 23:45+11, 04-06 00:45, 01:45, 01:45+10:30, 02:45
    0 * * * *        | 04-06 00:00+11, 01:00, 02:00+10:30, 03:00, 04:00
    */15 1 * * *     | 04-06 01:00+11, 01:15, 01:30, 01:45, 01:30+10:30
    45 */1 6 4 *     | 04-06 00:45+11, 01:45, 01:45+10:30, 02:45, 03:45
Asia/Tokyo 2024-02-27 10:07
    * * * * *        | 02-27 10:08+09, 10:09, 10:10, 10:11, 10:12
    */5 * * * *      | 02-27 10:10+09, 10:15, 10:20, 10:25, 10:30
    5/20 * * * *     | 02-27 10:25+09, 10:45, 11:05, 11:25, 11:45
    0-30/10 * * * *  | 02-27 10:10+09, 10:20, 10:30, 11:00, 11:10
    1-3,5 * * * *    | 02-27 11:01+09, 11:02, 11:03, 11:05, 12:01
    0 9-17 * * 1-5   | 02-27 11:00+09, 12:00, 13:00, 14:00, 15:00
    */5 9-17 * * 1-5 | 02-27 10:10+09, 10:15, 10:20, 10:25, 10:30
    0 0 29 2 *       | 02-29 00:00+09, 2028-02-29 00:00, 2032-02-29 00:00, 2036-02-29 00:00, 2040-02-29 00:00
    0 0 28-31 * *    | 02-28 00:00+09, 02-29 00:00, 03-28 00:00, 03-29 00:00, 03-30 00:00
    0 12 * * sun     | 03-03 12:00+09, 03-10 12:00, 03-17 12:00, 03-24 12:00, 03-31 12:00
    0 12 * * 0       | 03-03 12:00+09, 03-10 12:00, 03-17 12:00, 03-24 12:00, 03-31 12:00
    0 12 * * 7       | 03-03 12:00+09, 03-10 12:00, 03-17 12:00, 03-24 12:00, 03-31 12:00
    0 12 * * sun-sun | 03-03 12:00+09, 03-10 12:00, 03-17 12:00, 03-24 12:00, 03-31 12:00
    0 12 * * sat-sun | 03-02 12:00+09, 03-03 12:00, 03-09 12:00, 03-10 12:00, 03-16 12:00
    0 12 * * fri-sun | 03-01 12:00+09, 03-02 12:00, 03-03 12:00, 03-08 12:00, 03-09 12:00
    0 12 * * mon,wed,fri | 02-28 12:00+09, 03-01 12:00, 03-04 12:00, 03-06 12:00, 03-08 12:00
    0 0 1 jan *      | 2025-01-01 00:00+09, 2026-01-01 00:00, 2027-01-01 00:00, 2028-01-01 00:00, 2029-01-01 00:00
    0 0 1 JAN,Jul *  | 07-01 00:00+09, 2025-01-01 00:00, 07-01 00:00, 2026-01-01 00:00, 07-01 00:00
    0 0 1 */3 *      | 04-01 00:00+09, 07-01 00:00, 10-01 00:00, 2025-01-01 00:00, 04-01 00:00
    0 0 1 2/4 *      | 06-01 00:00+09, 10-01 00:00, 2025-02-01 00:00, 06-01 00:00, 10-01 00:00
    0 0 13 * fri     | 03-01 00:00+09, 03-08 00:00, 03-13 00:00, 03-15 00:00, 03-22 00:00
    0 0 13 * */5     | 09-13 00:00+09, 10-13 00:00, 12-13 00:00, 2025-04-13 00:00, 06-13 00:00
    0 0 */10 * mon   | 03-11 00:00+09, 04-01 00:00, 07-01 00:00, 10-21 00:00, 11-11 00:00
    0 0 * * mon      | 03-04 00:00+09, 03-11 00:00, 03-18 00:00, 03-25 00:00, 04-01 00:00
    0 0 1,15 * wed   | 02-28 00:00+09, 03-01 00:00, 03-06 00:00, 03-13 00:00, 03-15 00:00
    0 0 31 * *       | 03-31 00:00+09, 05-31 00:00, 07-31 00:00, 08-31 00:00, 10-31 00:00
    0 0 30 * *       | 03-30 00:00+09, 04-30 00:00, 05-30 00:00, 06-30 00:00, 07-30 00:00
    0 0 31 2,4 1     | 04-01 00:00+09, 04-08 00:00, 04-15 00:00, 04-22 00:00, 04-29 00:00
    0 22 * * 1-5     | 02-27 22:00+09, 02-28 22:00, 02-29 22:00, 03-01 22:00, 03-04 22:00
    23 0-20/2 * * *  | 02-27 10:23+09, 12:23, 14:23, 16:23, 18:23
    0 0,12 1 */2 *   | 03-01 00:00+09, 12:00, 05-01 00:00, 12:00, 07-01 00:00
    5 4 * * sun      | 03-03 04:05+09, 03-10 04:05, 03-17 04:05, 03-24 04:05, 03-31 04:05
    0 4 8-14 * *     | 03-08 04:00+09, 03-09 04:00, 03-10 04:00, 03-11 04:00, 03-12 04:00
    59 23 31 12 *    | 12-31 23:59+09, 2025-12-31 23:59, 2026-12-31 23:59, 2027-12-31 23:59, 2028-12-31 23:59
    0 0 29 2 mon     | 02-29 00:00+09, 2025-02-03 00:00, 02-10 00:00, 02-17 00:00, 02-24 00:00
    0 0 29 2 */7     | 2032-02-29 00:00+09, 2060-02-29 00:00, 2088-02-29 00:00, 2128-02-29 00:00, 2156-02-29 00:00
    @yearly          | 2025-01-01 00:00+09, 2026-01-01 00:00, 2027-01-01 00:00, 2028-01-01 00:00, 2029-01-01 00:00
    @annually        | 2025-01-01 00:00+09, 2026-01-01 00:00, 2027-01-01 00:00, 2028-01-01 00:00, 2029-01-01 00:00
    @monthly         | 03-01 00:00+09, 04-01 00:00, 05-01 00:00, 06-01 00:00, 07-01 00:00
    @weekly          | 03-03 00:00+09, 03-10 00:00, 03-17 00:00, 03-24 00:00, 03-31 00:00
    @daily           | 02-28 00:00+09, 02-29 00:00, 03-01 00:00, 03-02 00:00, 03-03 00:00
    @midnight        | 02-28 00:00+09, 02-29 00:00, 03-01 00:00, 03-02 00:00, 03-03 00:00
    @hourly          | 02-27 11:00+09, 12:00, 13:00, 14:00, 15:00
    @every 90s       | 02-27 10:07:30+09, 10:09, 10:10:30, 10:12, 10:13:30
    @every 2h        | 02-27 11:00+09, 13:00, 15:00, 17:00, 19:00
    @every 1d        | 02-28 09:00+09, 02-29 09:00, 03-01 09:00, 03-02 09:00, 03-03 09:00
    7 10 27 2 *      | 2025-02-27 10:07+09, 2026-02-27 10:07, 2027-02-27 10:07, 2028-02-27 10:07, 2029-02-27 10:07
    8 10 27 2 *      | 02-27 10:08+09, 2025-02-27 10:08, 2026-02-27 10:08, 2027-02-27 10:08, 2028-02-27 10:08
    0 0 1-7 * */2    | 03-02 00:00+09, 03-03 00:00, 03-05 00:00, 03-07 00:00, 04-02 00:00
    0 0 1-7 * 1-6/2  | 02-28 00:00+09, 03-01 00:00, 03-02 00:00, 03-03 00:00, 03-04 00:00
    */40 * * * *     | 02-27 10:40+09, 11:00, 11:40, 12:00, 12:40
    0 */7 * * *      | 02-27 14:00+09, 21:00, 02-28 00:00, 07:00, 14:00
    7-7 10-10 * * *  | 02-28 10:07+09, 02-29 10:07, 03-01 10:07, 03-02 10:07, 03-03 10:07
    0 0 * 2 *        | 02-28 00:00+09, 02-29 00:00, 2025-02-01 00:00, 02-02 00:00, 02-03 00:00
    0 0 1 1 0        | 2025-01-01 00:00+09, 01-05 00:00, 01-12 00:00, 01-19 00:00, 01-26 00:00
    */59 23 * * *    | 02-27 23:00+09, 23:59, 02-28 23:00, 23:59, 02-29 23:00
UTC 2025-12-31 23:58
    * * * * *        | 12-31 23:59+00, 2026-01-01 00:00, 00:01, 00:02, 00:03
    */2 * * * *      | 2026-01-01 00:00+00, 00:02, 00:04, 00:06, 00:08
    59 23 * * *      | 12-31 23:59+00, 2026-01-01 23:59, 01-02 23:59, 01-03 23:59, 01-04 23:59
    0 0 * * *        | 2026-01-01 00:00+00, 01-02 00:00, 01-03 00:00, 01-04 00:00, 01-05 00:00
    0 0 1 1 *        | 2026-01-01 00:00+00, 2027-01-01 00:00, 2028-01-01 00:00, 2029-01-01 00:00, 2030-01-01 00:00
    30 6 29 2 *      | 2028-02-29 06:30+00, 2032-02-29 06:30, 2036-02-29 06:30, 2040-02-29 06:30, 2044-02-29 06:30
    15 10 * * thu    | 2026-01-01 10:15+00, 01-08 10:15, 01-15 10:15, 01-22 10:15, 01-29 10:15
    0 0 1 * *        | 2026-01-01 00:00+00, 02-01 00:00, 03-01 00:00, 04-01 00:00, 05-01 00:00
    @every 7m        | 2026-01-01 00:00+00, 00:07, 00:14, 00:21, 00:28
    0 0 31 12 *      | 2026-12-31 00:00+00, 2027-12-31 00:00, 2028-12-31 00:00, 2029-12-31 00:00, 2030-12-31 00:00
Pacific/Apia 2011-12-29 22:00
    0 12 * * *       | 12-31 12:00+14, 2012-01-01 12:00, 01-02 12:00, 01-03 12:00, 01-04 12:00
    0 0 * * *        | 12-31 00:00+14, 2012-01-01 00:00, 01-02 00:00, 01-03 00:00, 01-04 00:00
    0 * * * *        | 12-29 23:00-10, 12-31 00:00+14, 01:00, 02:00, 03:00
    0 12 30 * *      | 2012-01-30 12:00+14, 03-30 12:00, 04-30 12:00+13, 05-30 12:00, 06-30 12:00
Pacific/Kwajalein 1969-09-29 20:00
    38 1 30 9 *      | 09-30 01:38+11, 01:38-12, 1970-09-30 01:38, 1971-09-30 01:38, 1972-09-30 01:38
America/Havana 2025-03-08 22:00
    0 0 * * *        | 03-09 01:00-04, 03-10 00:00, 03-11 00:00, 03-12 00:00, 03-13 00:00
    30 0 * * *       | 03-09 01:00-04, 03-10 00:30, 03-11 00:30, 03-12 00:30, 03-13 00:30
    @daily           | 03-09 01:00-04, 03-10 00:00, 03-11 00:00, 03-12 00:00, 03-13 00:00
    */30 * * * *     | 03-08 22:30-05, 23:00, 23:30, 03-09 01:00-04, 01:30
    0 0 * * sun      | 03-09 01:00-04, 03-16 00:00, 03-23 00:00, 03-30 00:00, 04-06 00:00
Antarctica/Troll 2025-03-29 22:00
    30 1 * * *       | 03-30 03:00+02, 03-31 01:30, 04-01 01:30, 04-02 01:30, 04-03 01:30
    30 2 * * *       | 03-30 03:00+02, 03-31 02:30, 04-01 02:30, 04-02 02:30, 04-03 02:30
    0 1,2,3 * * *    | 03-30 03:00+02, 03-31 01:00, 02:00, 03:00, 04-01 01:00
    30 * * * *       | 03-29 22:30+00, 23:30, 03-30 00:30, 03:30+02, 04:30
Antarctica/Troll 2025-10-25 22:00
    30 1 * * *       | 10-26 01:30+02, 10-27 01:30+00, 10-28 01:30, 10-29 01:30, 10-30 01:30
    30 2 * * *       | 10-26 02:30+02, 10-27 02:30+00, 10-28 02:30, 10-29 02:30, 10-30 02:30
    0 1,2,3 * * *    | 10-26 01:00+02, 02:00, 03:00+00, 10-27 01:00, 02:00
    30 * * * *       | 10-25 22:30+02, 23:30, 10-26 00:30, 01:30, 02:30
Asia/Kathmandu 2025-06-01 12:10
    0 * * * *        | 06-01 13:00+05:45, 14:00, 15:00, 16:00, 17:00
    */15 * * * *     | 06-01 12:15+05:45, 12:30, 12:45, 13:00, 13:15
    0 0 * * *        | 06-02 00:00+05:45, 06-03 00:00, 06-04 00:00, 06-05 00:00, 06-06 00:00
"""


def cron_cases():
    """Yield (expression, zone, start, [its next five fires])."""
    for line in CRON_CASES.strip().split("\n"):
        expression, bar, fires = map(str.strip, line.partition("|"))
        if not bar:
            zone, _, text = expression.partition(" ")
            start = datetime.datetime.fromisoformat(text)
            continue
        day, offset, found = start.date(), "", []
        for fire in fires.split(", "):
            match = re.fullmatch(r"(?:(\d{4})-)?(?:(\d\d)-(\d\d) )?([\d:]+)([+-][\d:]+)?", fire)
            year, month, date, clock, new_offset = match.groups()
            year = int(year or day.year)
            day = day.replace(year=year, month=int(month), day=int(date)) if month else day
            offset = new_offset or offset
            zoned = offset + ("" if ":" in offset else ":00")
            found.append(datetime.datetime.fromisoformat(f"{day} {clock}{zoned}"))
        yield expression, zone, start, found


class CronOracle:
    """cron(8) as it would run: minute by minute through some days of one zone.

    Shares nothing with apexd: `ticks` are (epoch seconds, what the clock on the wall shows,
    whether it shows it again, what it has skipped just now).
    """

    def __init__(self, zone, first, days):
        zone = zoneinfo.ZoneInfo(zone)
        start = int(datetime.datetime.fromisoformat(first).replace(tzinfo=UTC).timestamp())
        self.ticks, before, until = [], None, None
        for at in range(start, start + days * 86400, 60):
            wall = datetime.datetime.fromtimestamp(at, zone).replace(tzinfo=None)
            step = (wall - before).total_seconds() / 60 if before else 1
            if -180 <= step < 0:
                until = before  # the last minute that has been shown
            skipped = range(1, int(step)) if 1 < step <= 181 else ()
            skipped = [self.shown(before + datetime.timedelta(minutes=n)) for n in skipped]
            is_again = until is not None and wall <= until
            self.ticks.append((at, self.shown(wall), is_again, skipped))
            before = wall

    @staticmethod
    def shown(wall):
        return wall.minute, wall.hour, wall.day, wall.month, (wall.weekday() + 1) % 7

    @staticmethod
    def read(field, low, high):
        """Return the numbers of one field; only what `random_cron` writes."""
        found = set()
        for part in field.split(","):
            span, _, step = part.partition("/")
            first, _, last = span.partition("-")
            first, last = (low, high) if span == "*" else (int(first), int(last or first))
            last = high if step and span.isdigit() else last
            found |= {n for n in range(low, high + 1) if first <= n <= last and not (n - first) % int(step or 1)}
        return found

    def fires(self, expression):
        """Return the epoch seconds of all its fires in these days."""
        words = expression.split()
        limits = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7))
        minutes, hours, days, months, weekdays = (self.read(w, *m) for w, m in zip(words, limits))
        weekdays |= {0} if 7 in weekdays else set()
        is_fixed = words[0][0] != "*" and words[1][0] != "*"
        is_either = words[2][0] != "*" and words[4][0] != "*"

        def is_due(shown):
            minute, hour, day, month, weekday = shown
            if minute not in minutes or hour not in hours or month not in months:
                return False
            if is_either:
                return day in days or weekday in weekdays
            return day in days and weekday in weekdays

        return [
            at for at, shown, is_again, skipped in self.ticks
            if (is_due(shown) and not (is_fixed and is_again))
            or (is_fixed and skipped and any(map(is_due, skipped)))
        ]


def random_cron(rng):
    """Write an expression that may mean anything; often around the hours of a change."""

    def field(low, high, most):
        kind = rng.random()
        if kind < 0.3:
            return "*"
        if kind < 0.4:
            return f"*/{rng.randint(1, 9)}"
        parts = []
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            first = rng.randint(low, most)
            last = rng.randint(first, high)
            step = rng.randint(1, 9)
            parts.append(rng.choice((f"{first}", f"{first}-{last}", f"{first}/{step}", f"{first}-{last}/{step}")))
        return ",".join(parts)

    return " ".join([
        field(0, 59, 59), field(0, 23, rng.choice((3, 23))), field(1, 31, 31),
        rng.choice(("*", "*", "*", field(1, 12, 12))), field(0, 7, 7),
    ])


class TestCronSchedule:
    @zones
    def test_the_next_five_fires(self):
        cases = list(cron_cases())
        assert len(cases) >= 150
        for expression, zone, start, fires in cases:
            schedule = apexd.CronSchedule(expression, zone)
            at = start.replace(tzinfo=zoneinfo.ZoneInfo(zone))
            for fire in fires:
                at = schedule.next(at)
                assert at.isoformat() == fire.isoformat(), (expression, zone, start)
                assert schedule.matches(at), (expression, zone, at)

    # Both changes of each zone, three days around it.
    DAYS = (
        ("America/New_York", "2025-03-08"), ("America/New_York", "2025-11-01"),
        ("Europe/Berlin", "2025-03-29"), ("Europe/Berlin", "2025-10-25"),
        ("Australia/Lord_Howe", "2025-10-04"), ("Australia/Lord_Howe", "2025-04-05"),
        ("America/Havana", "2025-03-08"), ("Antarctica/Troll", "2025-10-25"),
        ("Pacific/Apia", "2011-12-29"), ("Pacific/Kwajalein", "1969-09-29"), ("Asia/Tokyo", "2025-02-27"),
    )  # fmt: skip

    @zones
    def test_it_agrees_with_a_cron_that_goes_minute_by_minute(self):
        rng, fired = random.Random(7), 0
        for zone, first in self.DAYS:
            oracle = CronOracle(zone, first, 3)
            start, end = (datetime.datetime.fromtimestamp(oracle.ticks[i][0], UTC) for i in (0, -1))
            odd = [at for at, _, is_again, skipped in oracle.ticks if is_again or skipped] or [oracle.ticks[9][0]]
            for _ in range(2000 if SLOW else 100):
                expression = random_cron(rng)
                try:
                    schedule = apexd.CronSchedule(expression, zone)
                except apexd.DaemonError as error:
                    assert "never fires" in error.message and not oracle.fires(expression)
                    continue
                fires = oracle.fires(expression)
                fired, at = fired + len(fires), start - datetime.timedelta(seconds=1)
                for fire in fires[:10]:
                    at = schedule.next(at)
                    assert at.timestamp() == fire, (expression, zone, at)
                if len(fires) < 10:
                    at = schedule.next(at)
                    assert at is None or at > end, (expression, zone, at)
                for tick in (rng.choice(oracle.ticks)[0], rng.choice(odd), rng.choice(odd) - 60, rng.choice(fires or odd)):
                    moment = datetime.datetime.fromtimestamp(tick + rng.randint(0, 59), UTC)
                    assert schedule.matches(moment) == (tick in fires), (expression, zone, moment)
                    fire, found = next((at for at in fires if at > tick), None), schedule.next(moment)
                    assert found.timestamp() == fire if fire else found > end, (expression, zone, moment)
        assert fired > 1000

    def test_it_finds_what_is_years_away(self):
        rng = random.Random(8)
        for _ in range(2000 if SLOW else 150):
            day, month = rng.randint(1, 31), rng.randint(1, 12)
            weekday, both = rng.randint(0, 6), rng.choice(("", "*/"))
            start = datetime.datetime(rng.randint(1971, 2200), rng.randint(1, 12), 1, tzinfo=UTC)
            expression = f"5 4 {day} {month} {'*/7' if both else '*'}"
            if both:
                weekday = 0
            date = start.date()
            longest = 29 if month == 2 else 30 if month in (4, 6, 9, 11) else 31
            if day > longest:
                with pytest.raises(apexd.DaemonError, match="never fires"):
                    apexd.CronSchedule(expression, "UTC")
                continue
            while (date.day, date.month) != (day, month) or (both and date.isoweekday() % 7 != weekday):
                date += datetime.timedelta(1)
            found = apexd.CronSchedule(expression, "UTC").next(start)
            assert found == datetime.datetime(date.year, month, day, 4, 5, tzinfo=UTC), expression

    def test_what_never_fires_is_refused_and_what_fires_rarely_is_found_soon(self):
        began = time.monotonic()
        for expression in ("0 0 30 2 *", "0 0 31 4 *", "0 0 31 2,4,6,9,11 */2", "* * 30-31 feb *"):
            with pytest.raises(apexd.DaemonError, match="never fires") as caught:
                apexd.CronSchedule(expression)
            assert caught.value.code == "CONFIG_INVALID"
        start = datetime.datetime(1897, 1, 1, tzinfo=UTC)
        assert apexd.CronSchedule("0 0 29 2 *", "UTC").next(start).year == 1904
        assert apexd.CronSchedule("0 0 30 2 1", "UTC").next(start).month == 2
        assert time.monotonic() - began < 1

    def test_a_step_costs_little(self):
        schedule, at = apexd.CronSchedule("0 0 29 2 */7", "UTC"), datetime.datetime(2032, 3, 1, tzinfo=UTC)
        began = time.process_time()
        for _ in range(20):
            assert schedule.next(at).year == 2060
        assert time.process_time() - began < 0.5

    @pytest.mark.parametrize(
        "expression",
        "*/0 * * * *|60 * * * *|5-1 * * * *|* * * * * *|* * * *||* 24 * * *|* * 0 * *|* * 32 * *|"
        "* * * 0 *|* * * 13 *|* * * * 8|1,,2 * * * *|, * * * *|-1 * * * *|*-5 * * * *|** * * * *|"
        "1-2-3 * * * *|1/ * * * *|*/-1 * * * *|*/1000 * * * *|jan * * * *|* * * mon *|* * * * jan|"
        "* * * januar *|1.5 * * * *|0x1 * * * *|١ * * * *|* * * * 5-1|* * * * sat-mon|? * * * *|"
        "* * L * *|* * * * 5#2|@|@fortnightly|@daily x|@every|@every x|@every 0s|@every -1s|"
        "@every 1.5s|@every 500ms|@every 1s 2s|@reboot x|@daily\n|\x00 * * * *|100 * * * *".split("|"),
    )
    def test_what_is_no_expression_is_refused(self, expression):
        with pytest.raises(apexd.DaemonError) as caught:
            apexd.CronSchedule(expression)
        assert caught.value.code == "CONFIG_INVALID" and caught.value.hint
        assert repr(expression) in caught.value.message

    @pytest.mark.parametrize("expression", [None, 5, [], b"@daily", True])
    def test_what_is_no_text_is_refused(self, expression):
        with pytest.raises(apexd.DaemonError):
            apexd.CronSchedule(expression)

    @pytest.mark.parametrize("zone", ["Nowhere/City", "", "../UTC", "/etc/passwd", "America", "a\0", 5, "\ud800"])
    def test_an_unknown_zone_is_named(self, zone):
        with pytest.raises(apexd.DaemonError) as caught:
            apexd.CronSchedule("@daily", zone)
        assert caught.value.code == "CONFIG_INVALID" and repr(zone) in caught.value.message

    def test_reboot_has_no_next(self):
        schedule = apexd.CronSchedule("@reboot")
        assert schedule.next(datetime.datetime.now(UTC)) is None
        assert not schedule.matches(datetime.datetime.now(UTC))

    def test_every_counts_from_1970(self):
        schedule, at = apexd.CronSchedule("@every 90s"), datetime.datetime(2025, 1, 1, tzinfo=UTC)
        assert schedule.next(at) == at + datetime.timedelta(seconds=90)
        assert schedule.next(at + datetime.timedelta(seconds=1.5)) == at + datetime.timedelta(seconds=90)
        assert schedule.matches(at) and not schedule.matches(at + datetime.timedelta(seconds=1))

    @posix
    @pytest.mark.parametrize("zone", ["America/New_York", "Australia/Lord_Howe", "EST5EDT,M3.2.0,M11.1.0"])
    def test_local_time_changes_as_the_zone_does(self, zone, monkeypatch):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        try:
            named = "America/New_York" if zone[3] == "5" else zone
            for expression, cases_zone, start, fires in cron_cases():
                if cases_zone == named:
                    schedule, at = apexd.CronSchedule(expression), start.astimezone()
                    for fire in fires:
                        at = schedule.next(at)
                        assert at.isoformat() == fire.isoformat(), (expression, start)
        finally:
            monkeypatch.undo()
            time.tzset()

    def test_without_zone_data_local_time_and_utc_still_work(self, tmp_path):
        """K8"""
        code = (
            "import apexd, datetime\n"
            "now = datetime.datetime.now(datetime.timezone.utc)\n"
            "assert apexd.CronSchedule('@daily').next(now) and apexd.CronSchedule('@daily', 'UTC').next(now)\n"
            "try: apexd.CronSchedule('@daily', 'Europe/Berlin')\n"
            "except apexd.DaemonError as error: print(error.code, error)"
        )
        env = {**os.environ, "PYTHONTZPATH": "", "PYTHONPATH": HERE}
        argv = [sys.executable, "-B", "-S", "-c", code]
        done = subprocess.run(argv, env=env, cwd=tmp_path, capture_output=True, text=True)
        assert done.stdout.startswith("CONFIG_INVALID timezone 'Europe/Berlin'") and "tzdata" in done.stdout, done


class CronByHand:
    """A store with schedules in UTC, and a clock that is moved by hand, on 15 January 2025."""

    def __init__(self, folder, **schedules):
        for one in schedules.values():
            one.setdefault("timezone", "UTC")
            one.setdefault("command", "true")
        self.folder, self.schedules, self.at = str(folder), schedules, 0.0
        self.queue = Queue(folder, schedule=schedules)
        self.store, self.told, self.is_done = self.queue.store, [], True
        self.store.on_events = self.hear

    def now(self):
        return self.at

    def hear(self, events):
        for event in (event for event in events if event.type.startswith("cron.")):
            at = event.payload["scheduled_at"]
            self.told.append((event.type, event.payload["name"], at))

    def begin(self, at):
        """Be a new daemon at a time."""
        self.scheduler = apexd.Scheduler(self.store, lambda: None, self)
        return self.jump(at)

    def jump(self, at):
        """Have the clock show a time, HH:MM:SS or seconds; return what fires there."""
        if isinstance(at, str):
            day, _, at = at.rpartition(" ")
            at = datetime.datetime.fromisoformat(f"2025-01-{day or 15} {at}+00:00").timestamp()
        self.at, before = at, len(self.told)
        self.wait_s = self.scheduler._look()
        if self.is_done:  # its tasks have ended at once
            self.store.change("remove", [task.id for task in self.store.find()])
        return [self.shown(*one) for one in self.told[before:]]

    @staticmethod
    def shown(kind, name, at):
        moment = datetime.datetime.fromtimestamp(at, UTC)
        mark = {"cron.fired": "", "cron.skipped": "-"}[kind]
        return f"{mark}{moment:%H:%M}" + (f":{moment:%S}" if moment.second else "")

    def go(self, until):
        """Let the time pass as the thread would; return what fires on the way."""
        end = datetime.datetime.fromisoformat(f"2025-01-15 {until}+00:00").timestamp()
        fires = []
        while self.at < end:
            fires += self.jump(min(end, self.at + 60 if self.wait_s is None else self.at + max(self.wait_s, 0.001)))
        return fires

    def configure(self, **schedules):
        for one in schedules.values():
            one.setdefault("timezone", "UTC")
            one.setdefault("command", "true")
        self.store.config = apexd.Config({"schedule": schedules})


@pytest.fixture
def by_hand(tmp_path):
    """Give a maker of CronByHand."""
    made = []

    def make(**schedules):
        made.append(CronByHand(tmp_path, **schedules))
        return made[0]

    yield make
    made[0].store.close()


class TestScheduler:
    def test_a_minutes_job_fires_every_minute_and_at_registration_nothing_does(self, by_hand):
        cron = by_hand(minute={"cron": "* * * * *"}, nightly={"cron": "0 4 * * *"})
        assert cron.begin("03:58:30") == [] and cron.wait_s == 30
        wanted = [f"{at // 60:02}:{at % 60:02}" for at in range(239, 301)]
        wanted.insert(2, "04:00")  # nightly
        assert cron.go("05:00") == wanted
        assert cron.store.find() == []

    def test_it_looks_at_the_clock_each_minute(self, by_hand):
        cron = by_hand(nightly={"cron": "0 4 * * *"})
        cron.begin("03:00:10")
        assert cron.wait_s == 60
        assert cron.scheduler.status()["schedules"] == 1
        assert cron.scheduler.status()["next_fire_at"] % 86400 == 4 * 3600

    def test_without_schedules_it_sleeps(self, by_hand):
        cron = by_hand()
        assert cron.begin("03:00") == [] and cron.wait_s is None

    # The clock, or all of the machine, stands still or is moved, within a daemon's life:
    # what fires at 10:00 sharp (fixed) and every 10 minutes (not).
    JUMPS = (
        ("09:55", "09:59", [], []),
        ("09:55", "10:00", ["10:00"], ["10:00"]),
        ("09:59", "10:03", ["10:00"], ["10:00"]),
        ("09:50:01", "10:45", ["10:00"], []),  # below 3 h, as in the gap of daylight saving
        ("09:50:01", "12:50:30", [], ["12:50"]),  # above: taken as it is
        ("09:50:01", "12:50:00", ["10:00"], ["12:50"]),
        ("09:50:01", "14:05", [], []),
        ("09:50:01", "16 09:59", [], []),
        ("09:50:01", "16 10:00:20", ["10:00"], ["10:00"]),
        ("09:50:01", "16 10:01:50", ["10:00"], ["10:00"]),  # awake since 10:00:55: one sleep of the thread
    )

    @pytest.mark.parametrize("before, after, fixed, other", JUMPS)
    def test_a_clock_that_is_set_forward(self, by_hand, before, after, fixed, other):
        """K3, K5"""
        cron = by_hand(fixed={"cron": "0 10 * * *"})
        cron.begin(before)
        assert cron.jump(after) == fixed
        cron.configure(other={"cron": "*/10 * * * *"})
        cron.jump(before)
        next(iter(cron.scheduler._jobs.values())).seen_at = cron.at
        assert cron.jump(after) == other

    @pytest.mark.parametrize("back, fixed, other", [
        ("10:00:29", [], []), ("09:56", [], []), ("09:00", [], ["09:20", "09:40", "10:00"]),
        ("07:30", [], ["07:40", "08:00", "08:20", "08:40", "09:00", "09:20", "09:40", "10:00"]),
    ])  # fmt: skip
    def test_a_clock_that_is_set_back(self, by_hand, back, fixed, other):
        cron = by_hand(fixed={"cron": "0 10 * * *"}, other={"cron": "*/20 * * * *"})
        cron.begin("09:59:30")
        assert cron.go("10:00:30") == ["10:00", "10:00"]
        assert cron.jump(back) == []
        assert cron.go("10:00:30") == fixed + other
        assert [name for _, name, _ in cron.told[2:]] == ["other"] * len(other)

    def test_a_clock_that_was_a_year_ahead_stops_nothing(self, by_hand):
        cron = by_hand(fixed={"cron": "0 10 * * *"})
        cron.begin("09:59:30")
        cron.jump(cron.at + 366 * 86400)
        cron.jump("09:30")
        assert cron.go("10:30") == ["10:00"]
        cron.jump(cron.at + 366 * 86400)
        cron.begin("16 09:59:50")
        assert cron.jump("16 10:00") == ["10:00"]

    @pytest.mark.parametrize("catch_up, window, fires", [
        ("none", 86400, []), ("last", 86400, ["10:02"]), ("all", 86400, ["10:00", "10:01", "10:02"]),
        ("all", 80, ["10:01", "10:02"]), ("last", 10, []), ("all", 0, []),
    ])  # fmt: skip
    def test_a_daemon_that_was_down_for_three_fires(self, by_hand, catch_up, window, fires):
        cron = by_hand(job={"cron": "* * * * *", "catch_up": catch_up, "catch_up_window": window})
        cron.begin("09:58:30")
        assert cron.go("09:59:30") == ["09:59"]
        assert cron.begin("10:02:20") == fires
        assert cron.begin("10:02:21") == []
        assert cron.go("10:03") == ["10:03"]

    @pytest.mark.parametrize("last, back, fires", [
        ("09:59:59", "10:00:00", ["10:00"]), ("09:59:59", "10:00:09", ["10:00"]), ("09:59:59", "10:00:11", []),
        ("09:30:00", "10:00:05", ["10:00"]), ("09:30:00", "10:00:11", []),
    ])  # fmt: skip
    def test_a_restart_at_the_turn_of_the_minute_loses_nothing(self, by_hand, last, back, fires):
        cron = by_hand(job={"cron": "* * * * *"})
        cron.begin("09:50:30")
        cron.go(last)
        assert cron.begin(back) == fires
        assert cron.go("10:01") == ["10:01"]

    def test_also_after_some_that_were_missed_for_good(self, by_hand):
        cron = by_hand(job={"cron": "0 * * * *"})
        cron.begin("02:50")
        assert cron.begin("06:10") == []
        assert cron.begin("07:00:01") == ["07:00"]

    def test_what_is_caught_up_runs_one_after_the_other(self, by_hand):
        cron = by_hand(job={"cron": "* * * * *", "catch_up": "all"})
        cron.is_done = False
        cron.begin("09:59:30")
        assert cron.begin("10:02:20") == ["10:00", "10:01", "10:02"]
        tasks = cron.store.find()
        assert [task.after for task in tasks] == [[], *([f"{task.id}:any"] for task in tasks[:-1])]
        assert cron.go("10:03") == ["-10:03"]

    def test_before_its_first_fire_a_schedule_is_known_too(self, by_hand):
        cron = by_hand(job={"cron": "0 10 * * *", "catch_up": "last"})
        cron.begin("09:00")
        assert cron.begin("10:30") == ["10:00"] and cron.begin("11:00") == []

    def test_one_that_a_clock_ahead_has_met_first_is_caught_up_all_the_same(self, by_hand):
        cron = by_hand(job={"cron": "0 10 * * *", "catch_up": "last"})
        cron.begin("20 09:00")
        assert cron.begin("15 09:00") == []
        assert cron.begin("15 10:30") == ["10:00"] and cron.begin("16 10:30") == ["10:00"]

    def test_what_is_new_or_changed_or_enabled_counts_from_then_on(self, by_hand):
        cron = by_hand(job={"cron": "0 10 * * *", "catch_up": "all"})
        cron.begin("09:00")
        cron.configure(job={"cron": "30 9 * * *", "catch_up": "all"})
        assert cron.begin("11:00") == []
        cron.configure(job={"cron": "30 9 * * *", "catch_up": "all", "timezone": "Etc/GMT+1"} if HAS_ZONES else {"cron": "31 9 * * *"})
        assert cron.begin("12:00") == []
        cron.configure(job={"cron": "0 13 * * *", "enabled": False})
        assert cron.begin("12:30") == [] and cron.jump("13:00") == []
        cron.configure(job={"cron": "0 13 * * *", "catch_up": "all"})
        assert cron.jump("13:30") == [] and cron.begin("13:31") == []
        cron.configure()
        cron.jump("13:40")
        cron.configure(job={"cron": "0 13 * * *", "catch_up": "all"})
        assert cron.begin("16 13:30") == []
        assert cron.begin("17 13:30") == ["13:00"]

    def test_a_reload_that_leaves_it_alone_loses_nothing(self, by_hand):
        cron = by_hand(job={"cron": "0 10 * * *"})
        cron.begin("09:59:30")
        cron.configure(job={"cron": "0 10 * * *", "priority": 7})
        cron.is_done = False
        assert cron.jump("10:00:10") == ["10:00"]
        assert [task.priority for task in cron.store.find()] == [7]

    @pytest.mark.parametrize("overlap, fires", [
        ("skip", ["10:00", "-10:01", "-10:02"]), ("queue", ["10:00", "10:01", "-10:02"]),
    ])  # fmt: skip
    def test_a_job_that_takes_longer_than_its_period(self, by_hand, overlap, fires):
        """K6"""
        cron = by_hand(job={"cron": "* * * * *", "overlap": overlap})
        cron.is_done = False
        cron.begin("09:59:30")
        assert cron.go("10:02:30") == fires
        tasks = cron.store.find()
        assert len(tasks) == (2 if overlap == "queue" else 1)
        cron.is_done = True
        cron.jump("10:02:40")
        assert cron.go("10:03:30") == ["10:03"]

    def test_a_time_is_acted_on_once(self, by_hand):
        """K7"""
        cron = by_hand(job={"cron": "0 10 * * *"})
        cron.begin("09:59:30")
        for _ in range(3):
            assert cron.jump("10:00:01") in (["10:00"], [])
            next(iter(cron.scheduler._jobs.values())).seen_at -= 60  # what was noted is lost
        assert len(cron.told) == 1

    def test_a_full_queue_delays_it(self, by_hand):
        cron = by_hand(job={"cron": "0 10 * * *"}, other={"cron": "1 10 * * *"})
        cron.is_done = False
        cron.begin("09:59:30")
        cron.store.config.retention.max_queue = 0
        refused("QUEUE_FULL", cron.jump, "10:00")
        cron.store.config.retention.max_queue = 1
        assert cron.jump("10:00:05") == ["10:00"]
        refused("QUEUE_FULL", cron.jump, "10:01")
        cron.store.config.retention.max_queue = 2
        assert cron.jump("10:01:05") == ["10:01"]

    def test_every_fires_by_the_second(self, by_hand):
        cron = by_hand(job={"cron": "@every 20s"})
        cron.begin("09:59:30")
        assert cron.go("10:00:30") == ["09:59:40", "10:00", "10:00:20"]

    def test_reboot_fires_with_each_start(self, by_hand):
        cron = by_hand(boot={"cron": "@reboot"})
        assert cron.begin("09:00") == ["09:00"] and cron.jump("09:01") == [] and cron.wait_s is None
        assert cron.begin("10:00") == ["10:00"]
        assert cron.begin(cron.at + 0.5) == ["10:00"], "two starts within a second"
        assert cron.begin("08:00") == ["08:00"], "a machine that boots with a clock that is behind"
        cron.begin("10:00")
        cron.configure(boot={"cron": "@reboot"}, late={"cron": "@reboot", "catch_up": "all"})
        assert cron.jump("10:05") == ["10:05"]

    def test_the_store_is_as_before_when_it_cannot_be_written(self, by_hand):
        cron = by_hand(job={"cron": "0 10 * * *"})
        cron.is_done = False
        cron.begin("09:59:30")
        cron.store.database._db.execute("PRAGMA query_only = 1")
        refused("DATABASE_FAILED", cron.jump, "10:00")
        cron.configure(job={"cron": "0 10 * * *"}, more={"cron": "0 11 * * *"})
        refused("DATABASE_FAILED", cron.scheduler._look)
        cron.store.database._db.execute("PRAGMA query_only = 0")
        assert cron.jump("10:00:05") == ["10:00"] and len(cron.scheduler._jobs) == 2

    def test_real_fires_are_on_time_and_tell_the_task_why(self, box):
        box.config({"schedule": {"tick": {"cron": "@every 1s", "command": "echo $APEX_EVENT", "label": "t"}}})
        box.start()
        eventually(lambda: len(box.request({"type": "list"})["tasks"]) >= 3)
        box.stop()
        tasks, late = box.json("list", quick=True)[:3], []
        for task in tasks:
            event = json.loads(box.output(task["id"]))
            assert (event["type"], event["source"], event["hops"]) == ("cron.fired", "schedule tick", 0)
            assert event["payload"]["name"] == "tick" and task["label"] == "t"
            late.append(task["created_at"] - event["payload"]["scheduled_at"])
        assert 0 <= min(late) < 0.05, late
        assert [int(t["created_at"]) - int(tasks[0]["created_at"]) for t in tasks] == [0, 1, 2]

    def test_kill_9_around_the_fire_neither_loses_nor_doubles_one(self, box):
        """K7"""
        box.config({"schedule": {"tick": {"cron": "@every 1s", "command": "true", "catch_up": "all", "overlap": "queue"}}})
        rounds = ROUNDS if SLOW else 2
        for _ in range(rounds):
            box.start()
            eventually(lambda: time.time() % 1 > 0.7)
            turn = int(time.time()) + 1 + random.uniform(-0.01, 0.02)
            while time.time() < turn:
                pass
            box.kill9()
        box.start()
        eventually(lambda: box.request({"type": "queue"})["counts"].keys() <= {"succeeded"})
        box.stop()
        with box.database() as db:
            rows = db.execute("SELECT env FROM tasks JOIN requests ON requests.id = request_id").fetchall()
        found = [json.loads(json.loads(env)["APEX_EVENT"])["payload"]["scheduled_at"] for (env,) in rows]
        assert len(found) == len(set(found)), sorted(found)
        skipped = re.findall(r"fired for \S+: skipped", box.log())
        assert len(found) + len(skipped) >= max(found) - min(found) + 1 >= rounds, sorted(found)

    @slow
    def test_a_daemon_that_drains_fires_nothing_more(self, box):
        box.config({"schedule": {"tick": {"cron": "@every 1s", "command": "true"}}}, daemon={"graceful_timeout": 3})
        box.start()
        eventually(lambda: box.json("list", quick=True))
        slow_one = box.add("sleep", "2.2")
        box.until(slow_one, "running")
        before = len(box.json("list", quick=True))
        box.stop()
        assert len(box.json("list", quick=True)) <= before + 1

    def test_a_thread_that_will_not_start_is_named_by_start(self, box):
        path = os.path.join(box.path, "apexd.py")
        head, name, tail = read(path).partition("\nclass Scheduler:")
        failure = """raise RuntimeError("can't start new thread")"""
        write(path, head + name + tail.replace("self._thread.start()", failure, 1))
        error = box.error("start", rc=1)
        assert error["code"] == "start_failed" and error["message"] == "can't start new thread"
        assert "Traceback" in box.log() and box.run("status", rc=3)
        for pid in keepers(box):
            kill(pid)

    def test_a_reload_shows_its_plan_and_refuses_what_is_broken(self, box):
        tick, night = {"cron": "@every 1s", "command": "true"}, {"cron": "0 4 * * *", "command": "true"}
        box.config({"schedule": {"tick": tick, "night": night, "gone": night}})
        box.start()
        box.config({"schedule": {"tick": tick, "night": {**night, "cron": "0 5 * * *"}}})
        plan = box.json("reload")["plan"]
        assert 'changed schedule.night.cron: "0 4 * * *" -> "0 5 * * *"' in plan
        assert "removed schedule.gone" in plan
        eventually(lambda: box.json("status")["schedules"] == 2)
        box.config({"schedule": {"tick": tick, "night": {**night, "cron": "*/0 * * * *"}}})
        error = box.error("reload", rc=78)
        assert "schedule.night.cron = '*/0 * * * *'" in error["message"] and box.file("config.json") in error["message"]
        assert [one["cron"] for one in box.json("cron")] == ["@every 1s", "0 5 * * *"]
        before = len(box.json("list"))
        eventually(lambda: len(box.json("list", quick=True)) > before)

    @pytest.mark.parametrize("options, key, reason", [
        ({"cron": "*/0 * * * *"}, "cron", "its minute '*/0'"), ({"cron": "60 * * * *"}, "cron", "0-59"),
        ({"cron": "5-1 * * * *"}, "cron", "its minute '5-1'"), ({"cron": "* * * * * *"}, "cron", "five fields"),
        ({"cron": "0 0 30 2 *"}, "cron", "never fires"), ({"cron": ""}, "cron", "five fields"),
        ({"cron": 5}, "cron", "text"), ({}, "cron", "is missing"),
        ({"cron": "@daily", "timezone": "Nowhere/City"}, "timezone", "a time zone that this system knows"),
        ({"cron": "@daily", "timezone": 1}, "timezone", "a time zone"),
        ({"cron": "@daily", "overlap": "both"}, "overlap", "skip, queue"),
        ({"cron": "@daily", "catch_up": True}, "catch_up", "none, last, all"),
        ({"cron": "@daily", "catch_up_window": -1}, "catch_up_window", "a duration"),
        ({"cron": "@daily", "command": None}, "command", "strings"),
        ({"cron": "@daily", "group": "nowhere"}, "group", "no group 'nowhere'"),
        ({"cron": "@daily", "retries": "x"}, "retries", "a whole number"),
        ({"cron": "@daily", "crom": 1}, "crom", "did you mean cron?"),
    ])  # fmt: skip
    def test_a_broken_schedule_is_named(self, tmp_path, options, key, reason):
        data = {"schedule": {"job": {"command": "true", **options}}}
        path = write(str(tmp_path / "config.json"), json.dumps(data))
        with pytest.raises(apexd.DaemonError) as caught:
            apexd.load_config(path)
        error = caught.value
        assert error.code == "CONFIG_INVALID" and error.message.startswith(f"{path}: schedule.job.{key}")
        assert reason in f"{error.message} {error.hint}", error.message


class TestCronCommand:
    def test_it_lists_schedules_with_and_without_a_daemon(self, box):
        assert box.json("cron") == [] and box.run("cron", "list").returncode == 0
        night = {"cron": "30 2 * * *", "command": "false", "timezone": "UTC"}
        box.config({"schedule": {"night": night, "off": {**night, "enabled": False}, "boot": {"cron": "@reboot", "command": "true"}}})
        (found, off, boot) = box.json("cron")
        assert (found["name"], found["cron"], found["timezone"], found["enabled"]) == ("night", "30 2 * * *", "UTC", True)
        assert len(found["next"]) == 5 and found["last"] is found["task_id"] is found["result"] is None
        assert off["next"] == boot["next"] == []
        box.start()
        box.until(box.json("cron", "run", "night")["id"])
        (found, _, boot) = eventually(lambda: [one for one in [box.json("cron")] if one[2]["result"] == "succeeded"])[0]
        assert found["result"] == "failed" and found["last"] is None and boot["last"]
        lines = box.run("cron").stdout.split("\n")
        assert re.search(r"night +30 2 .* UTC .* failed +\d+ +\w{3} \S+T02:30:00\+00:00, in \d", lines[1])
        assert lines[2].endswith("not enabled") and lines[3].endswith("at the next start")
        box.stop()
        assert box.json("cron")[0]["result"] == "failed"

    def test_it_shows_the_next_fires_of_a_schedule_or_an_expression(self, box):
        box.config({"schedule": {"night": {"cron": "30 2 * * *", "command": "x", "timezone": "UTC"}}})
        fires = box.json("cron", "next", "night", "-n", "3")
        days = [datetime.datetime.fromisoformat(fire) for fire in fires]
        assert len(fires) == 3 and days[1] - days[0] == days[2] - days[1] == datetime.timedelta(1)
        assert box.json("cron", "next", "30 2 * * *", "--timezone", "UTC", "-n", "3") == fires
        assert len(box.run("cron", "next", "*/5 9-17 * * 1-5").stdout.split("\n")) == 6
        assert box.json("cron", "next", "@reboot") == []
        assert box.run("cron", "next", "@reboot").stdout == "at the next start\n"
        box.config({"schedule": {"night": {"cron": "30 2 * * *", "command": "x", "enabled": False}}})
        assert box.run("cron", "next", "night").stdout == "not enabled\n"
        for words in (["cron", "next"], ["cron", "next", "nope"], ["cron", "next", "*/0 * * * *"], ["cron", "next", "@x"],
                      ["cron", "next", "night", "-n", "0"], ["cron", "next", "@daily", "--timezone", "X"], ["cron", "run", "nope"],
                      ["cron", "run"], ["cron", "frob"], ["cron", "list", "nope"]):  # fmt: skip
            error = box.error(*words, rc=2)
            assert error["code"] == "bad_request" and error["hint"], error
        assert "'*/0'" in box.error("cron", "next", "*/0 * * * *", rc=2)["message"]

    def test_it_adds_the_task_of_a_schedule_now(self, box):
        box.config({"schedule": {"job": {"cron": "@yearly", "command": "echo $APEX_EVENT", "priority": 3, "enabled": False}}})
        task_id = box.json("cron", "run", "job")["id"]
        error = box.error("cron", "run", "job", rc=1)
        assert error["code"] == "illegal_state" and "overlap" in error["hint"]
        box.start()
        assert box.until(task_id)["priority"] == 3
        assert json.loads(box.output(task_id))["payload"] == {"name": "job", "scheduled_at": None}
        assert box.json("cron", "run", "job")["id"] == task_id + 1


# ============================================================================
# 12. EVENTS - none is lost, handlers cannot harm, hooks deliver once
# ============================================================================


class HookServer:
    """A server on loopback for hooks: `answers` gives the status of each POST in turn, then 200."""

    def __init__(self, answers=(), port=0):
        import http.server

        self.got, answers = [], list(answers)

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(this):
                body = this.rfile.read(int(this.headers["Content-Length"]))
                status = answers.pop(0) if answers else 200
                self.got.append((this.path, dict(this.headers), body, status))
                this.send_response(status)
                this.send_header("Location", "/elsewhere")
                this.end_headers()

            def do_GET(this):
                self.got.append((this.path, dict(this.headers), b"", 0))
                this.send_response(200)
                this.end_headers()

            def log_message(this, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *why):
        self.server.shutdown()
        self.server.server_close()


def events_of(box, pattern="*", lines=100_000):
    """Return the events of a project, oldest first."""
    return next(apexd.read_events(box.state, lines, False, pattern))


def types_of(box, task_id):
    """Return what happened to a task, and what followed each time: [("started", {...}), ...]."""
    found = [e for e in events_of(box, "task.*") if e["source"] == f"task {task_id}"]
    return [e["type"].partition(".")[2] for e in found]


class TestEventRouter:
    @pytest.fixture
    def router(self):
        router = apexd.EventRouter()
        yield router
        router.close()
        assert not [t for t in threading.enumerate() if t.name.startswith("events-")]

    @pytest.fixture
    def hurried(self, monkeypatch):
        """A hundredth of the pauses."""
        monkeypatch.setattr(apexd, "HANDLER_PAUSES_S", tuple(s / 100 for s in apexd.HANDLER_PAUSES_S))

    def test_a_subscriber_gets_what_matches_in_order(self, router):
        got, every = [], []
        router.subscribe("task.*", lambda event: got.append(event.payload["n"]))
        router.subscribe("*", every.append)
        for n in range(100):
            router.publish("task.failed" if n % 2 else "process.ready", {"n": n}, "me")
        eventually(lambda: len(got) == 50 and len(every) == 100)
        assert got == list(range(1, 100, 2))
        assert [event.payload["n"] for event in every] == list(range(100))
        first = every[0]
        assert (first.type, first.source, first.hops) == ("process.ready", "me", 0)
        assert len({event.id for event in every}) == 100 and abs(first.time - time.time()) < 60

    def test_the_history_keeps_the_last_and_can_be_searched(self, router):
        for n in range(1100):
            router.publish(f"a.{n % 2}", {"n": n}, "even" if n % 4 == 0 else "odd")
        assert len(router.history(limit=5000)) == 1000 and len(router.history()) == 50
        assert [e.payload["n"] for e in router.history(limit=2)] == [1098, 1099]
        assert [e.payload["n"] for e in router.history("a.1", limit=2)] == [1097, 1099]
        assert [e.payload["n"] for e in router.history("a.*", "even", 2)] == [1092, 1096]
        assert router.history(limit=0) == [] and router.history("b.*") == []
        router.clear_history()
        assert router.history() == []

    def test_a_failing_handler_is_tried_four_times_then_it_is_a_dead_letter(self, router, hurried):
        tries, good = [], []

        def fail(event):
            tries.append(time.monotonic())
            raise ValueError("no good")

        router.subscribe("x", fail)
        router.subscribe("x", good.append)
        event = router.publish("x", {"n": 1})
        (letter,) = eventually(router.dead_letters)
        assert letter == {"event": event, "error": "ValueError: no good", "attempts": 4}
        gaps = [b - a for a, b in zip(tries, tries[1:])]
        assert len(tries) == 4 and all(gap >= pause for gap, pause in zip(gaps, (0.01, 0.02, 0.04)))
        assert good == [event], "the other is not concerned"
        router.clear_dead_letters()
        assert router.dead_letters() == []

    def test_the_pauses_are_one_two_and_four_seconds(self):
        assert apexd.HANDLER_PAUSES_S == (1.0, 2.0, 4.0)

    def test_a_handler_that_exits_ends_no_subscription(self, router, hurried):
        got = []
        router.subscribe("x", lambda event: got.append(event) or (len(got) == 1 and sys.exit(3)))
        router.publish("x")
        router.publish("x")
        eventually(lambda: len(got) == 3)
        assert router.dead_letters() == []

    def test_a_handler_that_works_at_last_makes_no_dead_letter(self, router, hurried):
        tries = []
        router.subscribe("x", lambda event: tries.append(1) or 1 / (len(tries) > 2))
        router.publish("x")
        eventually(lambda: len(tries) == 3)
        router.close()
        assert router.dead_letters() == [] and len(tries) == 3

    def test_the_last_100_dead_letters_are_kept(self, router, hurried):
        router.subscribe("x", lambda event: 1 / 0)
        for n in range(120):
            router.publish("x", {"n": n})
        router.close(30)
        assert [one["event"].payload["n"] for one in router.dead_letters()] == list(range(20, 120))

    def test_a_slow_handler_delays_nobody_and_memory_is_bounded(self, router, monkeypatch):
        monkeypatch.setattr(apexd, "HANDLER_BEHIND_MAX", 10)
        go, slow_got, got = threading.Event(), [], []
        router.subscribe("x", lambda event: slow_got.append(event) or go.wait(20))
        router.subscribe("x", got.append)
        router.publish("x")
        eventually(lambda: slow_got)
        for _ in range(20):
            router.publish("x")
            eventually(lambda: len(got) == len(router.history(limit=99)))
        assert len(router.dead_letters()) == 10 and router.dead_letters()[0]["attempts"] == 0
        go.set()
        router.close()
        assert len(slow_got) == 11 and len(got) == 21

    def test_a_handler_may_publish_subscribe_and_close(self, router):
        got = []

        def on_first(event):
            router.subscribe("second", got.append)
            router.publish("second")
            router.close()

        router.subscribe("first", on_first)
        router.publish("first")
        eventually(lambda: got)

    def test_close_lets_handlers_work_off_what_waits_without_pauses(self, router):
        got, tries = [], []
        router.subscribe("x", got.append)
        router.subscribe("x", lambda event: tries.append(1) or 1 / 0)
        for _ in range(1000):
            router.publish("x")
        began = time.monotonic()
        router.close(30)
        assert len(got) == 1000 and len(tries) == 4000 and time.monotonic() - began < 25
        router.publish("x")
        assert len(got) == 1000, "nobody hears of it any more"
        with pytest.raises(apexd.DaemonError, match="closed"):
            router.subscribe("x", got.append)

    def test_a_burst_from_many_threads_loses_nothing(self, router):
        got = []
        router.subscribe("*", got.append)

        def publish(name):
            for n in range(1000):
                router.publish("x", {"n": n}, name)

        threads = [threading.Thread(target=publish, args=(str(i),)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        router.close(30)
        for i in range(8):
            assert [e.payload["n"] for e in got if e.source == str(i)] == list(range(1000))

    @posix
    def test_a_stores_events_reach_a_router(self, tmp_path):
        """README's example"""
        router, got = apexd.EventRouter(), []
        store = apexd.TaskStore(str(tmp_path / "jobs" / "apex.db"))
        store.on_events = router.dispatch
        router.subscribe("task.failed", lambda event: got.append(event.payload))
        runner = apexd.DaemonRunner(store, execute=lambda task: 3)
        runner.start()
        (task_id,) = store.add(["x"])
        runner.wake()
        (payload,) = eventually(lambda: got)
        runner.stop()
        store.close()
        router.close()
        assert payload["id"] == task_id and payload["exit_code"] == 3 and payload["outcome"] == "failed"


class TestEventLog:
    def event(self, n, type="custom.x", **payload):
        return apexd.Event.make(type, {"n": n, **payload}, "test")

    def test_ten_thousand_events_in_a_burst_are_all_there(self, tmp_path):
        log = apexd.EventLog(str(tmp_path))

        def write(first):
            for n in range(first, first + 2500):
                log.write([self.event(n)])

        threads = [threading.Thread(target=write, args=(first,)) for first in range(0, 10_000, 2500)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = next(apexd.read_events(str(tmp_path), 20_000, False))
        assert sorted(event["payload"]["n"] for event in found) == list(range(10_000))
        last = next(apexd.read_events(str(tmp_path), 3, False))
        assert last == found[-3:] and set(last[0]) == {"id", "time", "type", "source", "payload", "hops"}
        log.close()

    def test_it_keeps_two_files_of_ten_megabytes(self, tmp_path, monkeypatch):
        assert apexd.EVENTS_MAX_BYTES == 10_000_000
        monkeypatch.setattr(apexd, "EVENTS_MAX_BYTES", 10_000)
        log = apexd.EventLog(str(tmp_path))
        for n in range(300):
            log.write([self.event(n, pad="x" * 100)])
        assert sorted(os.listdir(tmp_path)) == ["events.log", "events.log.1"]
        assert all(os.stat(tmp_path / name).st_size <= 10_000 for name in os.listdir(tmp_path))
        found = [e["payload"]["n"] for e in next(apexd.read_events(str(tmp_path), 1000, False))]
        assert found == list(range(found[0], 300)) and len(found) > 40
        log.close()

    def test_a_reader_follows_through_rotations(self, tmp_path, monkeypatch):
        monkeypatch.setattr(apexd, "EVENTS_MAX_BYTES", 20_000)
        log, got = apexd.EventLog(str(tmp_path)), []
        log.write([self.event(n) for n in range(10)])
        following = apexd.read_events(str(tmp_path), 3, True)
        got += [e["payload"]["n"] for e in next(following)]
        assert got == [7, 8, 9]
        for first in range(10, 400, 10):
            log.write([self.event(n, pad="x" * 50) for n in range(first, first + 10)])
            while got[-1] < first + 9:
                got += [e["payload"]["n"] for e in next(following)]
        assert got == list(range(7, 400)) and os.path.exists(tmp_path / "events.log.1")
        log.close()

    def test_types_and_times_are_chosen_from(self, tmp_path):
        log = apexd.EventLog(str(tmp_path))
        events = [self.event(n, "task.failed" if n % 2 else "process.ready") for n in range(10)]
        for n, event in enumerate(events):
            event.time = 1000.0 + n
        log.write(events)
        bad = '{"time": 1\n{}\n[1]\n"x"\n{"time": 1, "type": "task.failed"}\n\xff\n'
        write(str(tmp_path / "events.log"), read(tmp_path / "events.log") + bad)
        log.write([self.event(10, "task.failed")])

        def found(*args):
            return [e["payload"]["n"] for e in next(apexd.read_events(str(tmp_path), *args))]

        assert found(100, False) == list(range(11)), "what is no event is passed over"
        assert found(3, False, "task.*") == [7, 9, 10]
        assert found(100, False, "task.*", 1005.0) == [5, 7, 9, 10]
        assert found(1, False, "process.ready") == [8] and found(9, False, "nope") == []
        log.close()

    def test_there_may_be_no_file_yet(self, tmp_path):
        assert list(apexd.read_events(str(tmp_path), 10, False)) == [[]]
        assert list(apexd.read_events(str(tmp_path / "nope"), 10, False)) == [[]]

    @root
    @linux
    def test_a_full_disk_costs_events_but_stops_nothing(self, tmp_path):
        with mounted(str(tmp_path), "size=64k,mode=0700"):
            log = apexd.EventLog(str(tmp_path))
            for n in range(1000):
                log.write([self.event(n, pad="x" * 100)])
            subprocess.run(["mount", "-o", "remount,size=1m", str(tmp_path)], check=True)
            for n in range(1000, 1010):
                log.write([self.event(n, pad="x" * 100)])
            found = [e["payload"]["n"] for e in next(apexd.read_events(str(tmp_path), 2000, False))]
            assert found[:200] == list(range(200)) and found[-10:] == list(range(1000, 1010))
            log.close()

    @posix
    def test_a_file_that_somebody_removes_is_made_anew(self, tmp_path):
        log = apexd.EventLog(str(tmp_path))
        log.write([self.event(1)])
        os.unlink(tmp_path / "events.log")
        log.write([self.event(2)])
        log.close()
        assert [e["payload"]["n"] for e in next(apexd.read_events(str(tmp_path), 9, False))] == [2]

    @linux
    def test_a_folder_that_is_gone_stops_nothing(self, tmp_path):
        log = apexd.EventLog(str(tmp_path / "nope"))
        log.write([self.event(1)])
        os.mkdir(tmp_path / "nope")
        log.write([self.event(2)])
        log.close()
        assert [e["payload"]["n"] for e in next(apexd.read_events(str(tmp_path / "nope"), 9, False))] == [2]


class TestTaskEvents:
    def test_every_transition_is_told(self, box):
        box.start()
        ok, bad_end = box.add("true"), box.add("sh", "-c", "exit 3", label="mine")
        after = box.add("true", after=str(bad_end))
        again = box.add("sh", "-c", "exit $((APEX_ATTEMPT < 2))", retries=1)
        late = box.add("true", delay="1h")
        for task_id in (ok, bad_end, after, again):
            box.until(task_id)
        box.run("cancel", late)
        running = box.add("sleep", "60")
        box.until(running, "running")
        box.run("cancel", running)
        box.until(running)
        box.run("retry", ok)
        eventually(lambda: types_of(box, ok)[-1] == "succeeded" and len(types_of(box, ok)) == 6)
        assert types_of(box, ok) == ["added", "started", "succeeded", "retrying", "started", "succeeded"]
        assert types_of(box, bad_end) == ["added", "started", "failed"]
        assert types_of(box, after) == ["added", "skipped"]
        assert types_of(box, again) == ["added", "started", "retrying", "started", "succeeded"]
        assert types_of(box, late) == ["added", "cancelled"]
        assert types_of(box, running) == ["added", "started", "cancelled"]
        (failed,) = events_of(box, "task.failed")
        assert failed["payload"] == {
            "id": bad_end, "state": "failed", "group": "default", "label": "mine", "attempt": 1,
            "outcome": "failed", "exit_code": 3, "signal": None, "reason": None,
        }
        box.stop()
        kinds = [event["type"] for event in events_of(box, "daemon.*")]
        assert kinds == ["daemon.started", "daemon.stopping"]

    def test_a_lost_task_is_told(self, box):
        box.start()
        task_id = box.add("sleep", "60", on_lost="retry")
        box.until(task_id, "running")
        for pid in keepers(box):
            kill(pid)
        eventually(lambda: types_of(box, task_id) == ["added", "started", "lost", "started"])
        box.run("cancel", task_id)

    def test_a_batch_is_one_event(self, box):
        ids = box.batch([["true"]] * 5 + [{"command": "true", "key": "k"}] * 2)
        assert ids[-1] == ids[-2]
        (event,) = events_of(box)
        assert event["type"] == "task.added" and event["payload"] == {"count": 6, "first": 1, "last": 6}
        box.batch([{"command": "true", "key": "k"}])
        assert len(events_of(box)) == 1, "nothing was added"

    def test_commands_and_environment_are_in_no_event(self, box):
        box.add("sh", "-c", "echo hunter2", env="X=hunter3")
        box.start()
        box.until(1)
        box.stop()
        assert "hunter" not in read(box.file("events.log"))

    def test_a_callback_that_raises_harms_nothing(self, tmp_path):
        store = apexd.TaskStore(str(tmp_path / "jobs" / "apex.db"))
        store.on_events = lambda events: 1 / 0
        assert store.add(["x"]) == [1] and store.add(["y"]) == [2]
        store.close()
        assert len(next(apexd.read_events(str(tmp_path / "jobs"), 9, False))) == 2

    def test_to_cancel_many_takes_little_memory(self, tmp_path):
        """Their events are made 1,000 at a time; each is handed on, in the order of the tasks."""
        store = apexd.TaskStore(str(tmp_path / "jobs" / "apex.db"))
        store.add(["x"] * 5000)
        most, ids = [], []
        store.on_events = lambda events: (most.append(len(events)), ids.extend(e.payload["id"] for e in events))
        tracemalloc.start()
        try:
            store.change("cancel", [range(1, 5001)])
            assert tracemalloc.get_traced_memory()[1] < 2_500_000
        finally:
            tracemalloc.stop()
        assert ids == list(range(1, 5001)) and max(most) == 1000
        store.close()

    def test_without_a_matching_hook_there_is_no_further_statement(self, tmp_path):
        counts = []
        for hooks in ({}, {"hook": {"h": {"on": ["process.*"], "command": "x"}}}):
            path = str(tmp_path / str(len(counts)) / "apex.db")
            store = apexd.TaskStore(path, apexd.Config(hooks))
            attempts, said = apexd.AttemptStore(store), []
            store.database._db.set_trace_callback(said.append)
            store.add(["x"] * 10)
            (task, *_) = attempts.turn([], [], 3, {}, lambda is_suspect: "k")
            attempts.turn([(task, apexd.Result(exit_code=1))], [], 0, {}, lambda is_suspect: "k")
            store.change("cancel", [5])
            store.change("retry", [5])
            apexd.EventStore(store).publish("cron.fired", {}, "schedule x")
            counts.append([re.sub(r"\d+", "N", text) for text in said])
            store.close()
        assert len(counts[0]) == len(counts[1]) and not any("hook" in text for text in counts[0])


def hook_tasks(box):
    """Return the tasks of hooks, as `list` gives them."""
    return box.json("list", "-g", "hooks")


@posix
class TestHooks:
    def test_a_command_gets_the_event_and_its_tasks_stay_out_of_the_way(self, box):
        out = os.path.join(box.root, "out")
        box.config({"hook": {"note": {"on": ["task.failed", "custom.*"], "command": f'echo "$APEX_EVENT" >> {out}; exit 1', "retries": 0}}})
        box.start()
        failing = box.add("false")
        box.until(failing)
        (event,) = eventually(lambda: [json.loads(line) for line in read(out).splitlines()])
        assert event["type"] == "task.failed" and event["payload"]["id"] == failing
        assert event in events_of(box)
        assert [task["id"] for task in box.json("list")] == [failing]
        (delivery,) = eventually(lambda: [t for t in hook_tasks(box) if t["state"] == "failed"])
        assert delivery["label"] == "note: task.failed" and delivery["timeout"] == 30
        assert "note: task.failed" in box.run("dlq").stdout
        assert [task["id"] for task in box.json("dlq")] == [failing, delivery["id"]]
        box.run("dlq", "retry", delivery["id"])
        eventually(lambda: len(read(out).splitlines()) == 2)
        first, second = read(out).splitlines()
        assert first == second

    def test_a_hook_does_not_start_itself_nor_two_each_other(self, box):
        """M6"""
        every = {"on": ["*"], "retries": 0}
        box.config({"hook": {"one": {**every, "command": "true"}, "two": {**every, "command": "false"}}, "daemon": {"max_concurrent": 8}})
        box.start()
        box.until(box.add("true"))

        def counts():
            tasks = hook_tasks(box)
            return all(t["state"] in ("succeeded", "failed") for t in tasks) and [t["label"].split(":")[0] for t in tasks]

        labels = eventually(counts)
        # daemon.started and three events of the task; each delivery's own three go to the other.
        eventually(lambda: counts() and len(counts()) >= 4 * 2 * 4)
        done = counts()
        assert done and len(done) == 32 and sorted(set(labels)) == ["one", "two"]
        assert max(event["hops"] for event in events_of(box)) == 2

    def test_at_most_four_hooks_start_one_another(self, box):
        hooks = {f"h{n}": {"on": ["custom.go" if n == 0 else f"custom.h{n - 1}"], "command": f'"$APEX_CLI" events emit h{n}'} for n in range(6)}
        box.config({"hook": hooks})
        box.start()
        box.run("events", "emit", "go")
        eventually(lambda: events_of(box, "custom.h3"))
        eventually(lambda: all(task["state"] == "succeeded" for task in hook_tasks(box)))
        assert [task["label"] for task in hook_tasks(box)] == ["h0: custom.go", "h1: custom.h0", "h2: custom.h1", "h3: custom.h2"]
        assert [event["hops"] for event in events_of(box, "custom.*")] == [0, 1, 2, 3, 4]

    def test_what_a_hooks_command_adds_does_not_start_it_again(self, box):
        box.config({"hook": {"loop": {"on": ["task.failed"], "command": '"$APEX_CLI" add -- false; exit 0'}}})
        box.start()
        box.until(box.add("false"))
        eventually(lambda: len(box.json("list")) == 2 and all(t["state"] == "failed" for t in box.json("list")))
        assert len(hook_tasks(box)) == 1
        box.quick("restart")
        box.until(box.add("false"))
        eventually(lambda: len(hook_tasks(box)) == 2)

    def test_what_a_hook_removes_does_not_start_it_again(self, tmp_path):
        """What led to an event of a task is known though the same transaction deletes the task."""
        hooks = {"tidy": {"on": ["task.cancelled"], "command": "x"}}
        store = apexd.TaskStore(str(tmp_path / "jobs" / "apex.db"), apexd.Config({"hook": hooks}))
        store.add(["a", "b"], env={"APEX_HOOKS": "tidy"})
        assert store.change("remove", [1]) == ([1], []) and len(store.find()) == 1
        (theirs,) = store.add(["c"])
        assert store.change("remove", [theirs, 2]) == ([theirs, 2], [])
        (task,) = store.find()
        assert task.label == "tidy: task.cancelled"
        store.close()

    def test_a_reload_of_very_much_is_told_of(self, box):
        hooks = {"hook": {"r": {"on": ["config.reloaded"], "command": "true"}}}
        box.config(hooks)
        box.start()
        many = {f"{n}-with-a-long-name".rjust(60, "s"): {"cron": "0 0 1 1 *", "command": "true"} for n in range(200)}
        box.config(hooks, schedule=many)
        box.run("reload")
        (task,) = eventually(lambda: [t for t in hook_tasks(box) if t["attempts"]])
        assert box.until(task["id"])["state"] == "succeeded"
        assert len(events_of(box, "config.reloaded")[0]["payload"]["changed"]) == 200

    def test_no_other_task_inherits_a_hooks_secret(self, box):
        hook = {"on": ["custom.*"], "url": "http://127.0.0.1:9/", "secret_env": "HOOK_KEY"}
        box.config({"hook": {"web": hook}, "daemon": {"env_keep": ["*"], "on_usr2": "env"}})
        known = {"HOOK_KEY": "geheim-77", "KNOWN": "yes"}
        box.start(env=known)
        box.quick("add", "--", "env", env=known)
        box.quick("add", "--env", "HOOK_KEY=mine", "--", "env", env=known)
        if not IS_WINDOWS:
            os.kill(box.pid(), signal.SIGUSR2)
        seen = [box.output(box.until(n)["id"]) for n in eventually(lambda: len(box.json("list")) == 3 and (1, 2, 3))]
        assert all("KNOWN=yes" in text for text in seen) and "HOOK_KEY=mine" in seen[1]
        box.stop()
        self.assert_nowhere("geheim-77", box.state)

    def test_processes_and_the_daemon_are_told_of(self, box):
        out = os.path.join(box.root, "out")
        hooks = {"p": {"on": ["process.*", "config.*"], "command": f'echo "$APEX_EVENT" >> {out}'}}
        box.config({"hook": hooks, "process": {"web": {"command": "sleep 0.3; exit 3", "backoff": 0.1, "max_restarts": 1, "retry_failed": 60}}})
        box.start()
        wanted = {"process.started", "process.ready", "process.crashed", "process.failed"}
        eventually(lambda: {json.loads(line)["type"] for line in read(out).splitlines()} == wanted)
        crashed = events_of(box, "process.crashed")[0]
        assert crashed["payload"] == {"name": "web", "instance": 0, "why": "exit 3"}
        assert crashed["source"] == "process web.0"
        box.config({"hook": hooks, "log": {"level": "debug"}})
        box.run("reload")
        eventually(lambda: "config.reloaded" in read(out))
        (event,) = events_of(box, "config.reloaded")
        assert "changed log.level" in event["payload"]["changed"]

    def test_two_run_at_once_unless_another_number_is_set(self):
        def most(group):
            return apexd.Config({"group": {"hooks": group}} if group is not None else {}).groups["hooks"].max_concurrent

        assert most(None) == most({}) == most({"launcher": ["nice"]}) == 2
        assert most({"max_concurrent": 5}) == 5

    def test_a_hung_process_is_told_of(self, box):
        live = {"command": "exit 1", "interval": 0.05, "timeout": 1, "failures": 2}
        box.config({"process": {"web": {"command": "exec sleep 60", "live": live}}})
        box.start()
        eventually(lambda: events_of(box, "process.hung"))
        assert "no sign of life" in events_of(box, "process.hung")[0]["payload"]["why"]

    def test_a_url_is_delivered_signed_though_it_fails_twice(self, box):
        with HookServer([503, 500]) as server:
            url = f"http://127.0.0.1:{server.port}/hook?a=b"
            hook = {"on": ["task.failed"], "url": url, "secret_env": "HOOK_KEY"}
            box.config({"hook": {"web": hook}, "daemon": {"env_keep": ["*"]}})
            secret = "0d1f-geheim-77"
            box.start(env={"HOOK_KEY": secret})
            box.until(box.add("false"))
            (task,) = eventually(lambda: [t for t in hook_tasks(box) if t["state"] == "succeeded"], 30)
            assert task["attempts"] == 3 and len(server.got) == 3
            box.run("reload")
            self.assert_nowhere(secret, box.state)
            box.stop()
            self.assert_nowhere(secret, box.state)
        import hmac

        for path, headers, body, _ in server.got:
            digest = hmac.new(secret.encode(), body, "sha256").hexdigest()
            assert path == "/hook?a=b" and headers["X-Apexd-Signature"] == "sha256=" + digest
            assert headers["Content-Type"] == "application/json"
            assert headers["Idempotency-Key"] == json.loads(body)["id"] + "-web"
        assert len({headers["Idempotency-Key"] for _, headers, _, _ in server.got}) == 1
        assert json.loads(server.got[0][2]) in events_of(box, "task.failed")

    def assert_nowhere(self, secret, folder):
        for path in glob.glob(os.path.join(folder, "**"), recursive=True):
            if os.path.isfile(path) and not path.endswith(".new"):
                with open(path, "rb") as file:
                    assert secret.encode() not in file.read(), path

    def test_redirects_and_a_missing_secret_deliver_nothing(self, box):
        with HookServer([302, 307]) as server:
            url = f"http://127.0.0.1:{server.port}/"
            more = {"on": ["custom.x"], "url": url, "retries": 0}
            box.config({"hook": {"moved": more, "again": more, "unsigned": {**more, "secret_env": "NOT_THERE"}}})
            box.start()
            box.run("events", "emit", "x")
            eventually(lambda: [t["state"] for t in hook_tasks(box)] == ["failed"] * 3)
            said = {t["label"].split(":")[0]: box.output(t["id"]) for t in hook_tasks(box)}
            assert {said[name][:29] for name in ("moved", "again")} == {"not delivered: HTTP Error 302", "not delivered: HTTP Error 307"}
            assert "secret_env names a variable that the daemon does not have" in said["unsigned"]
            assert [path for path, _, _, _ in server.got] == ["/", "/"], "nobody was followed"

    def test_a_server_that_is_down_is_tried_over_a_restart_then_it_is_a_dead_letter(self, box):
        with HookServer() as server:
            port = server.port  # free again
        url = f"http://127.0.0.1:{port}/"
        box.config({"hook": {"web": {"on": ["task.succeeded"], "url": url, "retries": 1}}})
        box.start()
        box.until(box.add("true"))
        eventually(lambda: [t["attempts"] for t in hook_tasks(box)] == [1])
        box.kill9()
        box.start()
        (task,) = eventually(lambda: [t for t in hook_tasks(box) if t["state"] == "failed"], 30)
        assert "not delivered" in box.output(task["id"]) and "web: task.succeeded" in box.run("dlq").stdout
        with HookServer(port=port) as server:
            box.run("dlq", "retry")
            eventually(lambda: server.got)
            eventually(lambda: hook_tasks(box)[0]["state"] == "succeeded")
        assert len(hook_tasks(box)) == 1 and len(server.got) == 1

    @pytest.mark.parametrize("point", ["result", "claim:2", "sent:2", "at random"])
    def test_a_daemon_killed_between_a_tasks_end_and_its_hook(self, box, point):
        out = os.path.join(box.root, "out")
        box.config({"hook": {"note": {"on": ["task.succeeded"], "command": f"echo $APEX_TASK_ID >> {out}"}}})
        for n in range(1, (5 if SLOW else 1) + 1):
            box.start(env={} if point == "at random" else {"APEXD_FAILPOINT": point})
            with contextlib.suppress(AssertionError):  # it dies as it answers
                box.quick("add", "--", "sh", "-c", f": > {out}.{n}", rc=None)
            eventually(lambda: os.path.exists(f"{out}.{n}"), why="the task has ended")
            if point == "at random":
                pause(random.random() * 0.02)
                kill(box.pid())
            eventually(lambda: not lives(box.pid()), why="the daemon is dead")
            box.start()
            eventually(lambda: len(read(out).split()) == n, why="the hook has run")
            tasks = eventually(lambda: [t for t in hook_tasks(box) if t["state"] == "succeeded"])
            assert len(hook_tasks(box)) == n and len(tasks) <= n, "once as a task"
            eventually(lambda: all(t["state"] == "succeeded" for t in hook_tasks(box)))
            box.stop()

    def test_those_that_never_answer_are_ended_and_leave_room_for_tasks(self, box):
        with socket.create_server(("127.0.0.1", 0)) as silent:
            url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
            box.config({"hook": {"web": {"on": ["custom.*"], "url": url, "retries": 0, "timeout": 1}}})
            box.start()
            for _ in range(3):
                box.request({"type": "emit", "event": "x"})
            assert box.until(box.add("true"))["state"] == "succeeded"
            assert sorted(t["state"] for t in hook_tasks(box)) == ["queued", "running", "running"]
            eventually(lambda: [t["outcome"] for t in hook_tasks(box)] == ["timeout"] * 3)

    @pytest.mark.parametrize("hook, said", [
        ({"on": ["custom.x"]}, "hook.h.command is missing"),
        ({"on": ["custom.x"], "command": "true", "url": "http://x/"}, "only one can be"),
        ({"command": "true"}, "hook.h.on is missing"),
        ({"on": "task.failed", "command": "true"}, "hook.h.on = 'task.failed': must be a list of strings"),
        ({"on": ["custom.x"], "url": "ftp://x/y"}, "hook.h.url: must be"),
        ({"on": ["custom.x"], "url": "file:///etc/passwd"}, "hook.h.url: must be"),
        ({"on": ["custom.x"], "url": "http://me:hunter2@x/"}, "hook.h.url: must be"),
        ({"on": ["custom.x"], "url": "http://x/", "secret_env": "hunter2!"}, "hook.h.secret_env: must be the name of a variable"),
        ({"on": ["custom.x"], "url": "http://x/", "secret": "hunter2"}, "hook.h.secret is not an option"),
        ({"on": ["custom.x"], "command": "true", "secret_env": "KEY"}, "hook.h.secret_env is for a url"),
        ({"on": ["custom.x"], "command": "true", "group": "nope"}, "there is no group 'nope'"),
        ({"on": ["custom.x"], "command": "true", "retries": -1}, "hook.h.retries = -1"),
        ({"on": ["custom.x"], "command": "true", "overlap": "skip"}, "hook.h.overlap is not an option"),
    ])
    def test_a_broken_hook_is_refused_by_name(self, tmp_path, hook, said):
        path = write(str(tmp_path / "config.json"), json.dumps({"hook": {"h": hook}}))
        with pytest.raises(apexd.DaemonError) as caught:
            apexd.load_config(path)
        error = caught.value
        assert error.code == "CONFIG_INVALID" and said in error.message and path in error.message
        assert error.hint and "hunter2" not in error.message + error.hint

    @pytest.mark.parametrize("pattern", [
        "task.fail", "tasks.*", "x", "build.done", "custom", "", "process.*ed.*", "task.failed ", "Task.failed"])
    def test_a_pattern_that_fits_no_type_is_refused(self, pattern):
        with pytest.raises(apexd.DaemonError, match=re.escape(repr(pattern)) + " is none: did you mean [a-z]+[.]"):
            apexd.Config({"hook": {"h": {"on": ["task.failed", pattern], "command": "x"}}})

    @pytest.mark.parametrize("pattern", [
        *apexd.EVENTS, "*", "task.*", "*.failed", "custom.*", "custom.a.b", "cust*", "*.done", "[dp]*", "[!t]*.x"])
    def test_a_pattern_that_fits_a_type_is_taken(self, pattern):
        assert apexd.Config({"hook": {"h": {"on": [pattern], "command": "x"}}}).hooks["h"].on == [pattern]

    def test_an_event_starts_its_hook_once_and_none_that_is_not_enabled(self, tmp_path):
        """M7"""
        hook = {"on": ["custom.x"], "command": "true"}
        config = apexd.Config({"hook": {"one": hook, "two": {**hook, "enabled": False}}})
        store = apexd.TaskStore(str(tmp_path / "jobs" / "apex.db"), config)
        emit = apexd.TaskVerbs(store).table["emit"][1]
        for _ in range(3):
            assert emit(event="x", token="t1") == {"id": "t1"}
        (task,) = store.find()
        assert (task.label, task.group, task.retries, task.timeout) == ("one: custom.x", "hooks", 3, 30)
        emit(event="x")
        assert len(store.find()) == 2
        store.close()


class TestEventCommands:
    def test_events_are_shown_chosen_and_followed(self, box):
        assert box.run("events").stdout == "" and box.json("list") == []
        box.add("true")
        number = box.run("events", "emit", "deploy.done", "--json", '{"by": "me", "n": 1}').stdout
        assert json.loads(number)["id"]
        lines = box.run("events", "--json").stdout.splitlines()
        assert box.run("--json", "events").stdout.splitlines() == lines
        first, second = map(json.loads, lines)
        assert (first["type"], second["type"]) == ("task.added", "custom.deploy.done")
        assert second["payload"] == {"by": "me", "n": 1} and second["id"] == json.loads(number)["id"]
        (line,) = box.run("events", "--type", "custom.*").stdout.splitlines()
        assert re.fullmatch(r'20..-..-..T..:..:..\.\d\d\dZ  custom.deploy.done  emit +\{"by": "me", "n": 1\}', line)
        assert len(box.run("events", "-n", "1").stdout.splitlines()) == 1
        assert len(box.run("events", "--since", "10m").stdout.splitlines()) == 2
        assert box.run("events", "--since", "0").stdout == ""

    def test_emit_by_the_socket_is_followed_by_both(self, box):
        box.start()
        child = box.popen("events", "-f", "--type", "custom.*", quick=True)
        with box.connect() as connection:
            data = json.dumps({"type": "events", "pattern": "custom.*", "follow": True}).encode()
            connection.sendall(struct.pack(">I", len(data)) + data)
            box.run("events", "emit", "one")
            frame = read_frame(connection)
            assert frame["type"] == "events" and [e["type"] for e in frame["lines"]] == ["custom.one"]
            box.run("events", "emit", "custom.two")
            assert [e["type"] for e in read_frame(connection)["lines"]] == ["custom.two"]
        assert b"custom.one" in child.stdout.readline() and b"custom.two" in child.stdout.readline()
        answer = box.request({"type": "events", "lines": 1})
        assert answer["type"] == "events" and answer["lines"][0]["type"] == "custom.two"
        same = {"type": "emit", "event": "x", "token": "t1"}
        assert box.request(same)["id"] == box.request(same)["id"] == "t1"

    def test_bad_input_is_refused(self, box):
        for words in (
            ["emit"], ["emit", "a b"], ["emit", ""], ["emit", "x", "--json", "[1]"], ["emit", "x", "--json", "{"],
            ["emit", "x", "--json", '{"a": NaN}'], ["nope"], ["--since", "soon"], ["-n", "0"], ["--json", "x y"],
            ["emit", "x" * 2000], ["emit", "x", "--json", '{"a": 1e999}'],
        ):
            done = box.run("events", *words, rc=2)
            assert done.stdout == "" and done.stderr, words
        big = json.dumps({"a": "x" * 70_000})
        for _ in range(2):
            assert "more than 30000 bytes" in box.run("events", "emit", "x", "--json", big, rc=2).stderr
            box.start()

    def test_ten_thousand_events_in_a_burst_reach_the_file(self, box):
        """The memory of the daemon stays as it is."""
        box.start()
        count = 10_000 if SLOW else 2000
        resident = None
        with box.connect(30) as connection, connection.makefile("rb") as file:
            for n in range(count):
                data = json.dumps({"type": "emit", "event": "x", "payload": {"n": n, "pad": "x" * 1000}}).encode()
                connection.sendall(struct.pack(">I", len(data)) + data)
                (length,) = struct.unpack(">I", file.read(4))
                assert json.loads(file.read(length))["type"] == "ok"
                if n == 1100 and IS_LINUX:
                    resident = int(re.search(r"VmRSS:\s+(\d+)", read(f"/proc/{box.pid()}/status"))[1])
        assert [e["payload"]["n"] for e in events_of(box, "custom.x")] == list(range(count))
        if resident:
            assert int(re.search(r"VmRSS:\s+(\d+)", read(f"/proc/{box.pid()}/status"))[1]) < resident + 4000


# ============================================================================
# 13. RUNNER - the polling loop over the store
# ============================================================================


def most_at_once(box, ids):
    """Return how many of these tasks ran at the same time, by their attempts' times."""
    moments = []
    for task in tasks_of(box, ids):
        moments += [(task["started_at"], 1), (task["finished_at"], -1)]
    running = most = 0
    for _, change in sorted(moments):
        running += change
        most = max(most, running)
    return most


def crash_rounds(box, ids, rounds, also_keepers):
    """Kill the daemon at random moments, and a keeper with it; start it again."""
    killed = {}
    for _ in range(rounds):
        pause(random.uniform(0.0, 0.3))
        keeper = random.choice([0, *keepers(box)]) if also_keepers else 0
        running = [t for t in tasks_of(box, ids) if t["keeper"] == keepers(box).get(keeper)]
        if any(killed.get(task["id"], 0) > 1 for task in running):
            keeper = 0
        killed.update({task["id"]: killed.get(task["id"], 0) + bool(keeper) for task in running})
        if random.random() < 0.5 and keeper:
            kill(keeper)
        box.kill9()
        if keeper:
            kill(keeper)
        box.start()


@posix
class TestRunner:
    @pytest.fixture(scope="class", name="ran")
    @classmethod
    def ran(cls):
        """Give (box, {name: id}) of tasks that end in all kinds of ways, added at once."""
        with project(daemon={"max_concurrent": 12, "stop_timeout": 1}) as box:
            report = " ".join([sys.executable, os.path.join(box.path, "apexd.py"), "report"])
            spends = f"{report} --tokens 60; {report} --tokens 60; sleep 60"
            tells = f"{report} --progress 40 --note half --tokens 7; sleep 60"
            tasks = {
                "flaky": {"command": "[ $APEX_ATTEMPT = 3 ] || exit 5", "retries": 2},
                "hopeless": {"command": "exit 6", "retries": 1},
                "late": {"command": "sleep 60", "timeout": 0.3},
                "busy": {"command": "exit 75"},
                "tokens": {"command": spends, "max_tokens": 100},
                "cost": {"command": f"{report} --cost 2.5; sleep 60", "max_cost": 2},
                "progress": {"command": tells},
                "swift": {"command": "exit 0", "timeout": 30},
            }
            box.start()
            yield box, dict(zip(tasks, enqueue(box, *tasks.values())))

    def test_a_failed_task_is_retried_after_a_backoff_until_it_succeeds(self, ran):
        box, ids = ran
        task = box.until(ids["flaky"])
        assert (task["state"], task["attempts"], task["failures"]) == ("succeeded", 3, 2)
        history = box.request({"type": "get", "id": ids["flaky"]})["history"]
        assert [a["outcome"] for a in history] == ["failed", "failed", "ok"]
        gaps = [b["started_at"] - a["finished_at"] for a, b in zip(history, history[1:])]
        assert all(0 <= gap < 2.0 ** n + 10 for n, gap in enumerate(gaps)), gaps

    def test_a_task_out_of_retries_is_failed_with_its_own_code(self, ran):
        box, ids = ran
        task = box.until(ids["hopeless"])
        assert (task["state"], task["attempts"], task["exit_code"]) == ("failed", 2, 6)
        assert ids["hopeless"] in [t["id"] for t in ask_json(box, "dlq")]

    def test_a_timeout_ends_a_task_in_time(self, ran):
        box, ids = ran
        task = box.until(ids["late"])
        assert (task["state"], task["outcome"]) == ("failed", "timeout")
        assert 0.3 <= task["finished_at"] - task["started_at"] < 30, "of the 60 it asks for"

    def test_exit_75_means_later_and_uses_up_no_retry(self, ran):
        box, ids = ran
        task = box.until(ids["busy"], "scheduled")
        assert (task["outcome"], task["failures"], task["deferrals"]) == ("deferred", 0, 1)
        (attempt,) = box.request({"type": "get", "id": ids["busy"]})["history"]
        assert 59 < task["due_at"] - attempt["finished_at"] < 70
        assert "due in" in ask(box, "why", ids["busy"])

    @pytest.mark.parametrize("name, used", [("tokens", 120), ("cost", 2.5)])
    def test_a_task_that_reports_more_than_its_budget_is_ended(self, ran, name, used):
        box, ids = ran
        task = box.until(ids[name])
        assert (task["state"], task["outcome"]) == ("failed", "over_budget")
        assert task[name] == used
        assert task["finished_at"] - task["started_at"] < 45, "of the 60 it asks for"

    def test_reported_progress_and_usage_show_while_it_runs(self, ran):
        box, ids = ran
        eventually(lambda: box.look(ids["progress"])["progress"] == 40)
        task = box.look(ids["progress"])
        assert (task["note"], task["tokens"], task["state"]) == ("half", 7, "running")
        assert "running 40%" in ask(box, "list")
        answer = box.request({"type": "wait", "ids": [ids["progress"]]})
        assert (answer["progress"], answer["pending"]) == (40, 1)
        stale = {"type": "report", "id": ids["progress"], "run_id": "of-an-earlier-attempt"}
        assert box.request({**stale, "tokens": 1})["code"] == "illegal_state"

    def test_the_metrics_have_their_names_and_add_up(self, ran):
        box, ids = ran
        for name in ids.keys() - {"busy", "progress"}:
            box.until(ids[name])
        box.until(ids["busy"], "scheduled")
        eventually(lambda: box.look(ids["progress"])["pid"])
        status = ask_json(box, "status")
        assert status["active_task_ids"] == [ids["progress"]]
        assert status["active_task_count"] == 1
        assert status["tasks_processed"] == len(ids) - 2, "what is tried again counts once"
        assert status["tasks_succeeded"] == 2
        assert status["tasks_failed"] == status["tasks_processed"] - 2
        assert 0 < status["started_at"] <= status["last_poll_at"] <= time.time()
        assert 0 < status["uptime"] < 300
        polls = status["poll_count"]
        eventually(lambda: ask_json(box, "status")["poll_count"] > polls)

    def test_no_more_run_at_once_than_the_limits_allow(self, box):
        box.config({"daemon": {"max_concurrent": 4}, "group": {"one": {"max_concurrent": 1}}})
        box.start()
        begin = "echo x >>begun; until [ $(wc -l <begun) -ge 4 ]; do sleep 0.02; done; sleep 0.1"
        single = enqueue(box, *[begin] * 4, group="one")
        plain = enqueue(box, *[begin] * 12)
        settle(box, single + plain)
        assert most_at_once(box, single) == 1
        assert most_at_once(box, single + plain) == 4

    @linux
    def test_a_timeout_that_passes_while_no_daemon_runs_is_enforced_at_its_start(self, box):
        box.start()
        (task_id,) = enqueue(box, "echo up; sleep 60", timeout=1)
        command = command_of(box, task_id)
        box.kill9()
        pause(1)
        assert lives(command)
        began = time.time()
        box.start()
        task = box.until(task_id)
        assert (task["outcome"], task["attempts"]) == ("timeout", 1)
        assert task["finished_at"] - began < 5, "at once, not a second after the start"
        assert not lives(command)
        assert "turn failed" not in box.log()

    @linux
    def test_a_daemon_that_was_stopped_for_a_while_times_nothing_out_by_mistake(self, box):
        daemon = box.start()
        runs = enqueue(box, "sleep 1.8")
        for timeout in (1.5, 15):  # until it ended in time, although nobody saw it
            go = os.path.join(box.path, f"go{timeout}")
            work = f"until [ -e {go} ]; do sleep 0.02; done; exit 4"
            ended = enqueue(box, work, timeout=timeout)
            command = command_of(box, ended[0])
            late = box.look(ended[0])["started_at"] + timeout
            os.kill(daemon, signal.SIGSTOP)
            write(go, "")
            eventually(lambda: not lives(command))
            was_in_time = time.time() < late
            pause(max(0, late + 0.1 - time.time()))
            os.kill(daemon, signal.SIGCONT)
            if was_in_time:
                break
        runs, ended = settle(box, runs + ended)
        assert (ended["outcome"], ended["exit_code"], ended["attempts"]) == ("failed", 4, 1)
        assert (runs["outcome"], runs["attempts"]) == ("ok", 1)

    def test_a_function_of_the_embedding_program_carries_tasks_out(self, box):
        store = apexd.TaskStore(box.file("apex.db"))
        before = set(threading.enumerate())
        results = {"three": 3, "none": None, "zero": 0}
        seen = []

        def execute(task):
            seen.append((task.command, threading.current_thread()))
            return results[task.command]

        try:
            ids = store.add([*results, "raises"])
            runner = apexd.DaemonRunner(store, execute=execute)
            runner.start()
            done = lambda: all(store.get(task_id).state in apexd.DONE for task_id in ids)
            eventually(done)
            codes = [store.get(task_id).exit_code for task_id in ids]
            assert codes == [3, 0, 0, 1]
            assert [store.get(i).state.value for i in ids] == [
                "failed", "succeeded", "succeeded", "failed",
            ]  # fmt: skip
            late = store.add(["zero"])[0]
            runner.wake()
            eventually(lambda: store.get(late).state == apexd.State.SUCCEEDED)
            metrics = runner.get_metrics()
            assert (metrics.tasks_processed, metrics.tasks_succeeded) == (5, 3)
            assert metrics.active_task_ids == []
            assert sorted(command for command, _ in seen) == sorted([*results, "raises", "zero"])
            assert all(thread not in before for _, thread in seen)
            runner.stop(0)
            eventually(lambda: set(threading.enumerate()) <= before, why="its threads have ended")
            assert store.add(["after"]), "the store goes on without it"
        finally:
            store.close()

    @pytest.mark.parametrize("lack", ["thread", "disk"])
    def test_what_cannot_be_started_now_is_tried_later_and_not_at_once(self, box, lack, monkeypatch):
        start, turns = threading.Thread.start, []

        def refuse(self, *args):
            if lack == "disk":
                raise apexd.DaemonError("DATABASE_FAILED", "disk I/O error")
            if self.name.startswith("call-"):
                raise RuntimeError("can't start new thread")
            start(self)

        class Counting(apexd.AttemptStore):
            turn = lambda self, *args: turns.append(1) or super().turn(*args)

        monkeypatch.setattr(apexd, "AttemptStore", Counting)
        where, name = (Counting, "get_context") if lack == "disk" else (threading.Thread, "start")
        execute = None if lack == "disk" else lambda task: 0
        with contextlib.closing(apexd.TaskStore(box.file("apex.db"))) as store:
            ids = store.add([["true"]] * 2)
            runner = apexd.DaemonRunner(store, execute=execute)
            with monkeypatch.context() as patched:
                patched.setattr(where, name, refuse)
                runner.start()
                eventually(lambda: all(store.get(i).outcome == "not_started" for i in ids), 5)
                pause(0.5)
            assert len(turns) < 30
            done = lambda: all(store.get(i).state == apexd.State.SUCCEEDED for i in ids)
            eventually(done, 10)
            runner.stop(0)

    def test_a_cancel_just_as_a_runner_adopts_ends_the_task(self, box):
        box.start()
        (task_id,) = enqueue(box, "sleep 60")
        command = command_of(box, task_id)
        box.kill9()

        class Meanwhile(apexd.TaskStore):
            def find(self, **where):
                found = super().find(**where)
                apexd.AttemptStore(self).set_wishes([task_id], apexd.Outcome.CANCELLED)
                threading.Thread(target=lambda: runner.end([task_id])).start()
                pause(0.2)
                return found

        with contextlib.closing(Meanwhile(box.file("apex.db"))) as store:
            runner = apexd.DaemonRunner(store)
            runner.start()
            eventually(lambda: store.get(task_id).state == apexd.State.CANCELLED, 10)
            assert not lives(command)
            runner.stop(0)

    def test_a_function_does_not_run_beside_the_command_of_a_dead_daemon(self, box):
        box.start()
        (task_id,) = enqueue(box, "until [ -e go ]; do sleep 0.02; done; exit 7")
        command = command_of(box, task_id)
        box.kill9()
        with contextlib.closing(apexd.TaskStore(box.file("apex.db"))) as store:
            runner = apexd.DaemonRunner(store, execute=lambda task: lives(command))
            runner.start()
            pause(0.5)
            put(box, "go")
            eventually(lambda: store.get(task_id).finished_at, 10)
            task = store.get(task_id)
            assert (task.exit_code, task.attempts) == (7, 1)
            runner.stop(0)
        eventually(lambda: not keepers(box), 5)

    def test_stopping_a_runner_waits_for_the_function_that_runs(self, box):
        store = apexd.TaskStore(box.file("apex.db"))
        began, finish = threading.Event(), threading.Event()

        def execute(task):
            began.set()
            finish.wait(10)

        try:
            first, second = store.add(["first", "second"])
            store.config.daemon.max_concurrent = 1
            runner = apexd.DaemonRunner(store, execute=execute)
            runner.start()
            assert began.wait(10)
            threading.Timer(0.3, finish.set).start()
            runner.stop(10)
            assert store.get(first).state == apexd.State.SUCCEEDED
            assert store.get(second).state == apexd.State.QUEUED
        finally:
            store.close()

    @linux
    @needs("flock")
    @pytest.mark.parametrize("victims", ["daemon", "daemon and keepers"])
    def test_through_all_crashes_each_task_ends_once_with_its_own_code(self, box, victims):
        count, rounds = (200, 30) if SLOW else (40, 5)
        box.config({"daemon": {"max_concurrent": 4}})
        work = worker(box)
        box.start()
        codes = [n % 50 for n in range(count)]
        ids = enqueue(
            box,
            *(
                [*work, str(n), f"{random.uniform(0.0, 0.4):.2f}", str(code), ("", "closed")[n % 2]]
                for n, code in enumerate(codes)
            ),
        )
        crash_rounds(box, ids, rounds, also_keepers=victims != "daemon")
        tasks = settle(box, ids, 120)
        assert [task["exit_code"] for task in tasks] == codes
        assert lines_of(box, "overlaps") == []
        again = [history_of(box, task["id"]) for task in tasks if task["attempts"] > 1]
        assert all(set(outcomes[:-1]) == {"lost"} for outcomes in again), again
        names = sorted(map(str, range(count)))
        if victims == "daemon":
            assert again == []
            assert lines_of(box, "begun") == lines_of(box, "ended") == names
        else:
            assert set(lines_of(box, "ended")) == set(names)


@contextlib.contextmanager
def few_pids(pids):
    """Put processes into a pids cgroup; give a function that sets its limit."""
    root = "/sys/fs/cgroup/pids" if os.path.isdir("/sys/fs/cgroup/pids") else "/sys/fs/cgroup"
    group = f"{root}/ax-{os.getpid()}"

    def put_in(name, text, where=group):
        with open(f"{where}/{name}", "w") as file:
            file.write(text)

    try:
        os.mkdir(group)
        put_in("pids.max", "max")
    except OSError as error:
        with contextlib.suppress(OSError):
            os.rmdir(group)
        pytest.skip(f"no pids cgroup here: {error}")
    try:
        for pid in pids:
            put_in("cgroup.procs", str(pid))
        yield lambda more: put_in("pids.max", str(int(read(group + "/pids.current")) + more))
    finally:
        put_in("pids.max", "max")
        for pid in read(group + "/cgroup.procs").split():
            with contextlib.suppress(OSError):
                put_in("cgroup.procs", pid, root)
        eventually(lambda: os.rmdir(group) is None)


@linux
@needs("flock", "setsid")
class TestTaskPromises:
    """What was promised to a task holds when a step in between fails."""

    DEAF = "trap '' TERM; echo up; while :; do sleep 0.05; done"

    def deaf(self, box, **options):
        """Run a task that ignores TERM; return (its id, its PID)."""
        (task_id,) = enqueue(box, self.DEAF, **options)
        eventually(lambda: box.output(task_id) == "up\n")
        return task_id, command_of(box, task_id)

    def end_all(self, box):
        """SIGKILL all that there is, as a power cut would."""
        eventually(lambda: [kill(pid) for pid in box.processes()] == [])

    def test_a_cancel_counts_whatever_the_task_was_ended_for_before(self, box):
        """T1"""
        box.config({"daemon": {"graceful_timeout": 0.1, "stop_timeout": 1}})
        box.start()
        (interrupted,) = enqueue(box, [*worker(box), "a", "60", "0"])
        eventually(lambda: lines_of(box, "begun") == ["a"])
        box.run("kill", "--all")
        ask(box, "cancel", interrupted)
        box.start()
        assert box.until(interrupted)["state"] == "cancelled" and lines_of(box, "begun") == ["a"]
        late, _ = self.deaf(box, timeout=0.5, retries=3)
        eventually(lambda: box.look(late)["wish"] == "timeout")
        ask(box, "cancel", late)
        task = box.until(late)
        assert (task["state"], task["attempts"]) == ("cancelled", 1)
        stopped, _ = self.deaf(box)
        stopping = box.popen("stop", quick=True)
        eventually(lambda: box.look(stopped)["wish"] == "interrupted")
        ask(box, "cancel", stopped)
        stopping.communicate(timeout=60)
        assert box.task(stopped)["state"] == "cancelled"

    def test_the_kill_comes_however_often_it_is_asked_for(self, box):
        """T4"""
        box.config({"daemon": {"stop_timeout": 1}})
        box.start()
        task_id, pid = self.deaf(box)
        dear, other = self.deaf(box, max_tokens=5)
        run_id = box.look(dear)["run_id"]
        began = time.monotonic()
        while lives(pid) or lives(other):
            box.request({"type": "cancel", "ids": [task_id]})
            box.request({"type": "report", "id": dear, "run_id": run_id, "tokens": 10})
            assert time.monotonic() - began < 4, "a second was asked for"
            pause(0.1)
        assert [task["signal"] for task in settle(box, [task_id, dear])] == [9, 9]

    @pytest.mark.parametrize("boot", ["this", "another"])
    def test_what_run_held_was_lost_and_no_second_run_is_beside_the_first(self, box, boot):
        """T5: a power cut leaves the database, and nothing of run/."""
        box.config({"daemon": {"max_concurrent": 2}})
        box.start()
        (never,) = enqueue(box, [*worker(box), "a", "60", "0", "closed"], on_lost="fail")
        again = " ".join([*worker(box), "b"])
        (again,) = enqueue(box, f"[ $APEX_ATTEMPT = 1 ] && exec {again} 60 9; exec {again} 0 4")
        eventually(lambda: lines_of(box, "begun") == ["a", "b"])
        commands = [command_of(box, task_id) for task_id in (never, again)]
        keeper = keeper_of(box)
        box.kill9()
        kill(keeper)
        if boot == "another":
            self.end_all(box)
            with contextlib.closing(sqlite3.connect(box.file("apex.db"))) as db:
                db.execute("UPDATE attempts SET boot_id = 'another'")
                db.commit()
        shutil.rmtree(box.file("run"))
        box.start()
        first, second = settle(box, [never, again])
        assert (first["outcome"], first["attempts"]) == ("lost", 1)
        assert (second["exit_code"], second["attempts"]) == (4, 2)
        assert lines_of(box, "overlaps") == [] and not any(map(lives, commands))

    def test_whatever_is_killed_as_it_starts_no_status_is_made_up(self, box):
        """T6"""
        box.config({"daemon": {"max_concurrent": 2}})
        daemon = box.start()
        fds = lambda: len(os.listdir(f"/proc/{daemon}/fd"))
        keeper_of(box)
        before, killed, due = fds(), [], [12, 5]
        ids = enqueue(box, *["sleep 0.03"] * 40)
        children = lambda pid: read(f"/proc/{pid}/task/{pid}/children").split()
        while {task["state"] for task in tasks_of(box, ids)} & {"queued", "running"}:
            for keeper in keepers(box):
                killed += [pid for pid in children(keeper) if pid not in killed]
                if due and len(killed) >= due[-1]:  # within any step of a start
                    kill(keeper), due.pop()
            kill(int(killed[-1])) if killed else None
        for task_id in ids:
            for attempt in box.request({"type": "get", "id": task_id})["history"]:
                end = attempt["outcome"], attempt["exit_code"]
                assert end in (("ok", 0), ("failed", 137), ("lost", None)), attempt
        assert len(killed) > 5
        eventually(lambda: fds() <= before + 1, why="no descriptor is lost")

    def test_what_a_killed_command_left_is_ended_before_the_next_try(self, box):
        """T7"""
        box.start()
        work = " ".join([*worker(box), "a"])
        command = f"[ $APEX_ATTEMPT = 2 ] && exec {work} 0 5; setsid {work} 60 0 & wait"
        (task_id,) = enqueue(box, command, retries=1)
        eventually(lambda: lines_of(box, "begun") == ["a"])
        kill(command_of(box, task_id))
        assert settle(box, [task_id])[0]["exit_code"] == 5
        assert history_of(box, task_id) == ["failed", "failed"]
        assert lines_of(box, "overlaps") == [] and lines_of(box, "begun") == ["a", "a"]
        assert not [words for words in box.processes().values() if "sleep 60" in words]

    @pytest.mark.parametrize("words", ["kill --all", "cancel 1,2"])
    def test_without_a_daemon_the_same_is_ended_and_a_status_counts(self, box, words):
        """T8: also what left its session; what hides from us holds nothing up for long."""
        box.config({"daemon": {"max_concurrent": 3, "stop_timeout": 0.5}})
        hidden = os.path.join(box.path, "hidden")
        shutil.copy(shutil.which("sleep"), hidden)
        patch(box, SWEEP_MAX_S=1.0)
        box.start()
        away, hides, done = enqueue(
            box, "setsid sleep 61 & sleep 60", f"env -i setsid {hidden} 62 & echo up; sleep 60",
            {"command": "until [ -e go ]; do sleep 0.02; done; exit 7", "on_lost": "fail"},
        )  # fmt: skip
        ends, pid = command_of(box, done), command_of(box, hides)
        eventually(lambda: box.output(hides) == "up\n")
        find = lambda text: [pid for pid, words in box.processes().items() if text in words]
        eventually(lambda: find("sleep 61"))
        holds = lambda: [
            int(pid) for pid in filter(str.isdigit, os.listdir("/proc"))
            if read(f"/proc/{pid}/cmdline").startswith(hidden)
        ]  # fmt: skip
        (holder,) = eventually(holds)
        try:
            box.kill9()
            put(box, "go")
            eventually(lambda: not lives(ends))
            began = time.monotonic()
            box.run(*words.split(), rc=None, quick=False)
            assert time.monotonic() - began < 20
            eventually(lambda: not find("sleep 6") and not lives(pid))
        finally:
            kill(holder)
        box.start()
        task = settle(box, [done])[0]
        assert (task["exit_code"], task["attempts"], task["outcome"]) == (7, 1, "failed")
        state = {"kill --all": "interrupted", "cancel 1,2": "cancelled"}[words]
        assert history_of(box, away)[0] == state
        box.request({"type": "cancel", "ids": [away, hides]})
        settle(box, [away, hides])

    def test_a_copied_project_keeps_its_hands_off_the_original(self, boxes):
        """T10"""
        box, copy = boxes(), boxes()
        daemon = box.start()
        (task_id,) = enqueue(box, ["sleep", "60"])
        pid, keeper = command_of(box, task_id), keeper_of(box)

        def knows_the_pid():
            shutil.rmtree(copy.state)
            subprocess.run(["cp", "-a", box.state, copy.state], check=True)
            with contextlib.closing(sqlite3.connect(copy.file("apex.db"))) as db:
                return db.execute("SELECT pid FROM attempts").fetchone() == (pid,)

        eventually(knows_the_pid)
        assert copy.run("add", "-p", "--delay", "1h", "--", "true", rc=None)
        assert len(ask_json(box, "list")) == 1, "it went to the copy"
        copy.run("stop", "--force", rc=None)
        assert lives(daemon) and box.look(task_id)["state"] == "running"
        box.kill9()
        copy.start()
        assert copy.pid() != daemon and not lives_in(box.file("daemon.pid"))
        copy.until(task_id, "running", "queued")
        copy.run("kill", "--all")
        assert lives(pid) and lives(keeper), "what the original runs is not the copy's"
        box.start()
        assert command_of(box, task_id) == pid
        cancel_all(box)

    def test_a_clock_that_jumps_times_out_nothing_that_is_adopted(self, box):
        """T18b"""
        clock = put(box, "clock", "0") or os.path.join(box.path, "clock")
        path = os.path.join(box.path, "apexd.py")
        now = f"now = staticmethod(lambda: time.time() + float(open({clock!r}).read()))"
        text, count = re.subn(r"now = staticmethod\(time\.time\)", now, read(path))
        assert count == 1
        write(path, text)
        box.start()
        (task_id,) = enqueue(box, "until [ -e go ]; do sleep 0.02; done; exit 3", timeout=7200)
        (soon,) = enqueue(box, ["sleep", "60"], timeout=2.5)
        pid, other = command_of(box, task_id), command_of(box, soon)
        box.kill9()
        for jump in ("86400", "-86400"):
            put(box, "clock", jump)
            box.start()
            eventually(lambda: box.look(task_id)["pid"] == pid)
            pause(0.3)
            assert box.look(task_id)["state"] == "running" and lives(pid) and lives(other)
            box.kill9()
        box.start()
        assert box.until(soon)["outcome"] == "timeout", "by the time that has really passed"
        put(box, "go")
        assert settle(box, [task_id])[0]["exit_code"] == 3

    def test_a_wakeup_that_comes_as_the_loop_turns_is_not_lost(self, box):
        """L1"""
        store = apexd.TaskStore(box.file("apex.db"))
        store.config.daemon.poll_interval = 0.05
        try:
            for number in range(400 if SLOW else 30):
                runner = apexd.DaemonRunner(store, execute=lambda task: 0)
                runner.start()
                end = time.perf_counter() + 0.05 + random.uniform(-0.002, 0.003)
                while time.perf_counter() < end:  # the main thread is busy, as programs are
                    pass
                stopping = threading.Thread(target=runner.stop, daemon=True)
                stopping.start()
                stopping.join(5)
                assert not stopping.is_alive(), f"round {number}: it does not stop"
        finally:
            store.close()

    @root
    def test_when_nothing_can_be_started_it_is_tried_again_and_nothing_hangs(self, box):
        """L2"""
        often = {"backoff": 0.1, "backoff_max": 0.2, "max_restarts": 1000}
        web = {"command": "echo x >>starts; sleep 0.2; exit 1", **often}
        box.config({"daemon": {"max_concurrent": 6, "graceful_timeout": 2}}, process={"web": web})
        box.start()
        eventually(lambda: told(box, "starts"))
        with few_pids(box.processes()) as limit, box.connect() as connection:
            ids = enqueue(box, *["true"] * 6, delay="0.5")
            ping = apexd.pack_frame({"type": "ping"})
            connection.sendall(ping)
            assert read_frame(connection)["type"] == "pong", "it has its thread"
            limit(0)
            pause(1.5)
            connection.sendall(ping)
            assert read_frame(connection)["type"] == "pong"
            limit(1000)
            count = len(told(box, "starts"))
            eventually(lambda: len(told(box, "starts")) > count, why="it is started again")
            task = box.until(ids[0], "scheduled", "succeeded")
            assert task["state"] == "succeeded" or task["reason"].startswith("spawn:EAGAIN")
            with contextlib.suppress(AssertionError):
                eventually(lambda: all(t["state"] == "succeeded" for t in tasks_of(box, ids)), 5)
            states = {task["state"] for task in tasks_of(box, ids)}
            assert states <= {"succeeded", "scheduled"}, "later, uncounted, and not `failed`"
            box.stop()
        assert not box.processes()


# ============================================================================
# 14. SUPERVISOR - what happens next, walked without a process; then real ones
# ============================================================================

PS = apexd.ProcessState
WAITING_STATES = ("backoff", "failed")  # until their time comes
AGAIN = {"why": "next try in 1s", "has_given_up": False}


def policy_of(**options):
    """Return the section of a process with these options."""
    return apexd.Config({"process": {"web": {"command": "x", **options}}}).processes["web"]


def view_of(state, options=None, **fields):
    """Return what is known of an instance that is wanted; `options` are its policy's."""
    has_child = state in ("starting", "running", "unhealthy", "stopping")
    known = {
        "policy": policy_of(**(options or {})), "state": PS(state), "is_wanted": True,
        "is_stale": False, "is_held": False, "is_spawned": has_child,
        "is_ready": state in ("running", "unhealthy"), "started": 0.0, "last_sign": 0.0,
        "lapses": 0, "due": 0.0, "quick_ends": 0, "restarts": [], "has_given_up": False,
        "jitter": 0.0,
    }  # fmt: skip
    return apexd.View(**{**known, **fields})


class ThoughtKeepers(apexd.Keepers):
    """Keepers of runs that are only thought: they keep what they were asked; the test says
    how a run ends."""

    def __init__(self, folder):
        super().__init__(folder)
        self.asked = []

    def standing(self):
        return "0" * 16

    def start(self, ward, word):
        assert word["argv"] and word["sweep"] and ward.is_process, word
        ward.pid = 2**22 + 1  # more than there can be

    def end(self, run_id, number, grace_s):
        self.asked.append("kill" if number == signal.SIGKILL else "end")


class ThoughtInstance(apexd.Instance):
    def __init__(self, *args):
        super().__init__(*args)
        self.log.due_mono = float("inf")

    def move(self, state, why=None):
        before = self.view.state
        super().move(state, why)
        self.moves.add((before, state))


class Trial(apexd.Supervisor):
    """A supervisor of thought runs without its thread, on a made-up clock, `now`."""

    def __init__(self, folder, processes):
        config = apexd.Config({"process": processes})
        store = apexd.TaskStore(os.path.join(folder, ".apex", "apex.db"), config)
        super().__init__(store, keepers=ThoughtKeepers(store.folder))
        self.now, self._next_check = 1000.0, float("inf")
        moves = self.moves = set()
        for name, policy in config.processes.items():
            for index in range(policy.instances):
                one = ThoughtInstance(name, index, policy, self)
                self._instances[one.id], one.moves = one, moves
                one.want()

    def close(self):
        for one in self._instances.values():
            one.watch.stop()
        self.keepers.close(False)
        self.store.close()

    def __getitem__(self, name):
        return self._instances[name]

    def _apply(self, instance, action, keeper):
        self._left -= 1
        assert self._left, f"{instance.id} does not come to rest: {instance.view}"
        return super()._apply(instance, action, keeper)

    def settle(self):
        """Decide until nothing changes; return after how long something is due, or None."""
        self._left = 200
        with self.moved:
            left_s = self._settle()
        assert left_s is None or left_s > 0, f"due in the past: {list(self._instances.values())}"
        return left_s

    def states(self):
        """Settle; return each instance's state, of a single one the word alone."""
        self.settle()
        found = [one.view.state.value for one in self._instances.values()]
        return found[0] if len(found) == 1 else found

    def wait(self, seconds):
        self.now += seconds
        return self.states()

    def come_up(self, *names):
        for name in names or self._instances:
            self[name].view.is_ready = True
        return self.states()

    def sign(self, name, is_well):
        with self.moved:
            self[name].take_sign(is_well)

    def end(self, name="web.0", up_s=0.0, **result):
        """Let a run end `up_s` from now."""
        self.now += up_s
        one = self[name]
        with self.moved:
            one.take_end(apexd.Result(**(result or {"exit_code": 1})))
        return self.states()

    def down(self, *names):
        for name in names or self._instances:
            self[name].view.is_wanted = False
        return self.states()

    def roll(self, *names):
        """Have instances replaced, each only while its siblings are ready."""
        for name in names:
            self[name].view.is_stale = self[name].is_rolling = True
        return self.states()

    def configure(self, **processes):
        """Reload another configuration."""
        old, self.store.config = self.store.config, apexd.Config({"process": processes})
        self.reload(old)
        return self.states()

    def fail(self, name="web.0"):
        """Let runs end at once until it has failed; return the delays before."""
        delays = []
        while self[name].view.state != PS.FAILED:
            if self[name].view.state == PS.BACKOFF:
                delays.append(self[name].view.due - self.now)
                self.wait(delays[-1])
            self.end(name)
        return delays


@pytest.fixture
def trial(tmp_path, monkeypatch):
    """Give a function that makes a Trial: of `web` with options, or of several processes."""
    made = []

    def make(several=None, **options):
        processes = several or {"web": options}
        processes = {name: {"command": "x", **one} for name, one in processes.items()}
        made.append(Trial(str(tmp_path), processes))
        monkeypatch.setattr(apexd.Clock, "mono", staticmethod(lambda: made[0].now))
        made[0].settle()
        return made[0]

    yield make
    monkeypatch.undo()
    made[0].close()


TCP = {"tcp": "127.0.0.1:1", "interval": 1, "timeout": 1}
NOTIFY = {"notify": True, "timeout": 5}
PAIR = {"db": {}, "web": {"needs": ["db"]}}


class TestSupervisorTable:
    def test_each_state_is_reached_and_left_again(self):
        assert set(apexd.PROCESS_MOVES) == set(PS)
        reached = {PS.STOPPED}
        while not reached >= set().union(*map(apexd.PROCESS_MOVES.get, reached)):
            reached |= set().union(*map(apexd.PROCESS_MOVES.get, reached))
        assert reached == set(PS)
        assert all(moves - {state} for state, moves in apexd.PROCESS_MOVES.items())

    def test_what_the_table_does_not_hold_is_refused(self, trial):
        one = trial()["web.0"]
        for state in PS:
            for other in set(PS) - apexd.PROCESS_MOVES[state]:
                one.view.state = state
                assert "cannot become" in refused("INTERNAL", one.move, other)
                assert one.view.state == state

    def test_a_note_as_long_as_can_be_is_read_back(self, trial):
        one = ThoughtInstance("w" * 64, 999, policy_of(), supervisor := trial())
        notify = "/" + "й" * 40 + "/.apex/run/notify"
        note = {
            "run": one.id + "-" + "0" * 16, "keeper": "0" * 16, "pid": 4194304,
            "boot": apexd.Platform.boot_id(), "started": 1763720000.1234567, "restarts": 10**9,
            "quick": 10**9, "recent": 10**9, "given_up": False, "spec": "0" * 8, "user": 2**32 - 2,
            "at": "123456789012",
            "notify": notify.ljust(apexd.SOCKET_PATH_MAX_BYTES - 40, "x"),
        }  # fmt: skip
        one.write_note(**note)
        one.write_note(ready=True)
        found = {index: note for _, index, note in apexd.find_notes(supervisor.store.folder)}
        assert found[999] == {**note, "ready": True}

    def test_a_note_that_is_none_is_thrown_away_and_one_of_another_boot_too(self, trial):
        one = trial()["web.0"]
        good, notes = read(one.path), lambda: list(apexd.find_notes(one.store.folder))
        assert [(name, index) for name, index, _ in notes()] == [("web", 0)]
        fresh = {**one.note, "boot": "an-earlier-boot"}
        odd = ["", "{", "[]", "[" * 10**5, json.dumps(fresh), good.replace('"pid": 0', '"pid": "x"')]
        for text in odd:
            write(one.path, text)
            assert notes() == [] and not os.path.exists(one.path), text[:80]


class TestDecide:
    @pytest.mark.parametrize(
        "claim, now, view, expected",
        [
            ("wanted", 0, view_of("stopped"), {"state": "starting"}),
            ("not wanted", 0, view_of("stopped", is_wanted=False), {"state": "stopped"}),
            ("may start", 0, view_of("starting", is_spawned=False),
             {"state": "starting", "act": "start"}),
            ("held", 0, view_of("starting", is_spawned=False, is_held=True), {"state": "starting"}),
            ("down while held", 0,
             view_of("starting", is_spawned=False, is_held=True, is_wanted=False),
             {"state": "stopped"}),
            ("has begun", 9e9, view_of("starting"), {"state": "starting"}),
            ("ready", 9, view_of("starting", is_ready=True), {"state": "running"}),
            ("ready at the last moment", 60, view_of("starting", {"ready": TCP}, is_ready=True),
             {"state": "running"}),
            ("not ready yet", 59.9, view_of("starting", {"ready": TCP}), {"state": "starting"}),
            ("not ready within", 60, view_of("starting", {"ready": TCP}),
             {"state": "stopping", "act": "end", "due": 70, "why": "not ready within 1m 0s"}),
            ("unprobed", 9e9, view_of("running", lapses=9), {"state": "running"}),
            ("a lapse", 1, view_of("running", {"live": TCP}, lapses=1), {"state": "unhealthy"}),
            ("well again", 1, view_of("unhealthy", {"live": TCP}), {"state": "running"}),
            ("too many lapses", 1, view_of("unhealthy", {"live": TCP}, lapses=3),
             {"state": "stopping", "act": "end", "due": 11, "why": "no sign of life for 1s"}),
            ("answers late", 5.9, view_of("running", {"live": TCP}), {"state": "running"}),
            ("a probe that hangs", 6, view_of("running", {"live": TCP}),
             {"state": "stopping", "act": "end", "due": 16, "why": "no sign of life for 6s"}),
            ("the watchdog waits", 4.9, view_of("running", {"live": NOTIFY}), {"state": "running"}),
            ("the watchdog bites", 5, view_of("running", {"live": NOTIFY}),
             {"state": "stopping", "act": "end", "due": 15, "why": "no sign of life for 5s"}),
            ("stale", 1, view_of("running", is_stale=True),
             {"state": "stopping", "act": "end", "due": 11, "why": "it is to be replaced"}),
            ("stale and held", 1, view_of("running", is_stale=True, is_held=True),
             {"state": "running"}),
            ("down", 1, view_of("unhealthy", is_wanted=False),
             {"state": "stopping", "act": "end", "due": 11, "why": "as asked"}),
            ("down and held", 1, view_of("running", is_wanted=False, is_held=True),
             {"state": "running"}),
            ("gentle", 9, view_of("stopping", due=10), {"state": "stopping"}),
            ("not gentle", 10, view_of("stopping", due=10),
             {"state": "stopping", "act": "kill", "due": 20}),
            ("killed each second", 10, view_of("stopping", {"stop_timeout": 0}, due=10),
             {"state": "stopping", "act": "kill", "due": 11}),
            ("an end after long", 30, view_of("crashed", quick_ends=4, is_ready=True),
             {"state": "starting", "quick_ends": 0, "has_given_up": False}),
            ("a quick end", 29, view_of("crashed"),
             {"state": "backoff", "due": 30, "quick_ends": 1, **AGAIN}),
            ("never restarted", 9, view_of("crashed", {"restart": "never"}),
             {"state": "crashed", "is_wanted": False}),
            *((f"{restart} and done", 9,
               view_of("crashed", {"restart": restart}, result=apexd.Result(exit_code=0)),
               {"state": "stopped", "is_wanted": False}) for restart in ("never", "on-failure")),
            ("on-failure and failed", 9,
             view_of("crashed", {"restart": "on-failure"}, result=apexd.Result(exit_code=3)),
             {"state": "backoff", "due": 10, "quick_ends": 1, **AGAIN}),
            ("on-failure and lost", 9,
             view_of("crashed", {"restart": "on-failure"}, result=apexd.Result()),
             {"state": "backoff", "due": 10, "quick_ends": 1, **AGAIN}),
            ("crashed, not wanted", 9, view_of("crashed", is_wanted=False), {"state": "stopped"}),
            *((f"never ran, {restart}", 9,
               view_of("crashed", {"restart": restart}, result=apexd.Result(never_ran=True)),
               {"state": "starting"}) for restart in ("always", "on-failure", "never")),
            *((f"{state} until due", 9, view_of(state, due=9.1), {"state": state})
              for state in WAITING_STATES),
            *((f"{state} is over", 9, view_of(state, due=9), {"state": "starting"})
              for state in WAITING_STATES),
            *((f"down in {state}", 1, view_of(state, due=9, is_wanted=False), {"state": "stopped"})
              for state in WAITING_STATES),
        ],
    )  # fmt: skip
    def test_what_follows(self, claim, now, view, expected):
        action = apexd.decide(now, view)
        assert {k: v for k, v in action.to_dict().items() if v is not None} == expected
        assert action.state == view.state or action.state in apexd.PROCESS_MOVES[view.state]

    def test_it_waits_for_what_it_needs(self, trial):
        one = trial(PAIR)
        assert one.states() == ["starting", "starting"]
        assert one["db.0"].ward and not one["web.0"].ward
        assert one.come_up("db.0") == ["running", "starting"]
        assert one["web.0"].ward and one.come_up() == ["running", "running"]
        assert one.end("db.0") == ["backoff", "running"], "what runs goes on"

    def test_what_needs_another_ends_before_it(self, trial):
        one = trial(PAIR)
        one.come_up("db.0")
        one.come_up("web.0")
        assert one.down() == ["running", "stopping"]
        assert one.end("web.0") == ["stopping", "stopped"]
        assert one.end("db.0") == ["stopped", "stopped"] and one.settle() is None

    def test_the_backoff_doubles_up_to_its_limit(self, trial):
        one = trial(backoff_max=20, max_restarts=7, restart_window=200)
        delays, bases = one.fail(), [1, 2, 4, 8, 16, 20, 20]
        assert len(delays) == 7
        assert all(low <= delay <= low * 1.1 for low, delay in zip(bases, delays)), delays

    def test_what_falls_out_of_the_window_is_not_counted(self, trial):
        one = trial(max_restarts=3, restart_window=10)
        for _ in range(8):
            assert one.end(up_s=4) == "backoff"
            one.wait(one.settle())

    def test_none_is_restarted_where_none_may_be(self, trial):
        one = trial(max_restarts=0)
        assert one.end() == "failed" and one.settle() == 300

    def test_one_that_failed_is_tried_once_in_a_while_until_it_holds_out(self, trial):
        one = trial(retry_failed=100)
        assert len(one.fail()) == 5
        for _ in range(3):
            assert one.settle() == 100 and one.wait(100) == "starting"
            assert one.come_up() == "running" and one.end(up_s=29) == "failed"
        one.wait(100)
        one.come_up()
        assert one.end(up_s=30) == "starting"
        assert one.end() == "backoff" and 1 <= one.settle() <= 1.1

    def test_after_a_good_run_all_is_counted_anew(self, trial):
        one = trial(max_restarts=2, min_uptime=5)
        for _ in range(4):
            one.come_up()
            assert one.end(up_s=6) == "starting"
        assert one.end() == "backoff" and 1 <= one.settle() <= 1.1

    def test_a_run_that_never_ran_is_no_restart(self, trial):
        one = trial(max_restarts=2)
        for _ in range(4):
            assert one.end(never_ran=True) == "starting"
        assert one["web.0"].note["restarts"] == 0 and one.end() == "backoff"

    def test_one_that_never_gets_ready_is_not_taken_for_one_that_ran_long(self, trial):
        one = trial(ready=TCP)
        assert one.wait(60) == "stopping" and one.end(exit_code=143) == "backoff"

    def test_one_that_hung_is_restarted_though_it_ends_with_0(self, trial):
        one = trial(restart="on-failure", live=TCP)
        one.come_up()
        one["web.0"].view.lapses = 3
        assert one.states() == "stopping"
        assert one.end(exit_code=0) in ("backoff", "starting")

    def test_one_that_does_not_end_is_killed_again_and_again(self, trial):
        one = trial(stop_timeout=4)
        asked = one.keepers.asked
        assert one.down() == "stopping" and asked == ["end"]
        for kills in range(1, 4):
            assert one.wait(3.9) == "stopping" and len(asked) == kills
            assert one.wait(0.1) == "stopping" and asked == ["end"] + ["kill"] * kills
        assert one.end(exit_code=137) == "stopped"

    def test_up_while_it_stops_starts_it_anew(self, trial):
        one = trial()
        one.down()
        one["web.0"].want()
        assert one.states() == "stopping" and one.end() == "starting" and one["web.0"].ward

    @pytest.mark.parametrize("state", [*WAITING_STATES, "stopped"])
    def test_what_was_taken_down_is_not_ready_for_what_needs_it(self, trial, state):
        one = trial(PAIR)
        if state == "stopped":  # it ended by itself in the moment in which it was taken down
            one["db.0"].view.is_wanted = False
        one.end("db.0") if state != "failed" else one.fail("db.0")
        assert one.down("db.0") == ["stopped", "starting"] and one["web.0"].ward is None

    def test_what_has_done_its_work_is_ready_for_what_needs_it(self, trial):
        one = trial({**PAIR, "db": {"restart": "on-failure"}})
        assert one.end("db.0", exit_code=0) == ["stopped", "starting"] and one["web.0"].ward

    def test_instances_are_replaced_one_at_a_time(self, trial):
        one = trial(instances=3)
        one.come_up()
        names = list(one._instances)
        one.roll(*names)
        for name in names:
            assert [each for each in names if one[each].view.state == PS.STOPPING] == [name]
            one.end(name)
            one.come_up(name)
        assert one.states() == ["running"] * 3
        assert not any(one[each].view.is_stale for each in names)

    @pytest.mark.parametrize("is_well", [True, False], ids=["they come up", "they never do"])
    def test_instances_that_start_do_not_wait_for_each_other_for_ever(self, trial, is_well):
        one = trial(instances=2, ready=TCP)
        one.roll("web.0", "web.1")
        one.come_up() if is_well else one.wait(60)
        assert "stopping" in one.states()

    def test_one_that_hangs_while_it_must_wait_burns_no_processor(self, trial):
        one = trial({"db": {"live": NOTIFY}, "web": {"needs": ["db"], "stop_timeout": 20}})
        one.come_up("db.0")
        one.come_up("web.0")
        assert one.down() == ["running", "stopping"]
        one.wait(6)  # `settle` fails when something stays due

    @pytest.mark.parametrize(
        "state, old, new",
        [
            ("starting", {"ready": TCP}, {}),
            ("unhealthy", {"live": TCP}, {}),
            ("running", {}, {"live": TCP}),
        ],
    )
    def test_a_probe_that_comes_or_goes_leaves_none_stuck(self, trial, state, old, new):
        one = trial(**old)
        view = one["web.0"].view
        if state != "starting":
            one.come_up()
            view.lapses = int(state == "unhealthy")
        assert one.wait(50 if state == "running" else 1) == state
        one.configure(web={"command": "x", **new})
        assert view.is_stale or view.state == PS.RUNNING, "replaced, or taken as it is"

    def test_whatever_happens_it_comes_to_rest_and_up_again(self, trial):
        one = trial({
            "db": {"instances": 2, "ready": TCP, "live": TCP, "max_restarts": 1, "retry_failed": 9},
            "web": {"instances": 2, "needs": ["db"], "live": NOTIFY, "stop_timeout": 0},
            "job": {"restart": "on-failure", "needs": ["web"]},
            "solo": {"live": TCP, "max_restarts": 1, "retry_failed": 9, "instances": 2},
            "once": {"restart": "never", "backoff": 9, "min_uptime": 1, "ready": NOTIFY},
        })  # fmt: skip
        rng = random.Random(11)
        ends = [{"exit_code": code} for code in (0, 1, 1, 137, None)]
        ends += [{"never_ran": True}, {"exit_code": 126, "reason": "spawn:ENOENT x"}]

        def happen(name, view, has_child):
            """Let one thing happen to an instance."""
            words = "up up up down roll end end well well well well lapse lapse due due time"
            what = rng.choice(words.split())
            if what == "time":
                one.now += rng.choice((0.1, 1, 10, 50))
            elif what == "due":
                one.now += one.settle() or 0.0
            elif what == "down":
                view.is_wanted = False
            elif what == "up" and not one[name].is_up():
                one[name].want()
            elif has_child and what == "roll":
                view.is_stale, one[name].is_rolling = True, rng.random() < 0.5
            elif has_child and what == "end":
                one.end(name, **rng.choice(ends))
            elif has_child and what in ("well", "lapse"):
                one.sign(name, what == "well")

        for _ in range(10_000):
            name = rng.choice(list(one._instances))
            happen(name, one[name].view, one[name].ward is not None)
            one.settle()
            for each in one._instances.values():
                view, has_child = each.view, each.ward is not None
                is_alive = view.state.value in ("running", "unhealthy", "stopping")
                assert has_child == is_alive or view.state == PS.STARTING, view
                assert has_child or view.state != PS.STARTING or view.is_held, view
                assert view.state not in (PS.CRASHED, PS.STOPPED) or not view.is_wanted, view
        missed = {(a, b) for a in PS for b in apexd.PROCESS_MOVES[a]} - one.moves
        assert len(missed) <= 3, missed
        for each in one._instances.values():
            each.want()
        for _ in range(200):  # now all does well
            one.now += one.settle() or 0.0
            for name, each in one._instances.items():
                if each.view.state == PS.STOPPING:
                    one.end(name, exit_code=143)
                elif each.ward is not None:
                    one.sign(name, True)
        assert set(one.states()) == {"running"}


class TestProcessConfig:
    def load(self, tmp_path, processes):
        path = write(str(tmp_path / "config.json"), json.dumps({"process": processes}))
        return apexd.load_config(path)

    def refuse(self, tmp_path, processes):
        """Load what must be refused; return the message, which names the file."""
        message = refused("CONFIG_INVALID", self.load, tmp_path, processes)
        assert message.startswith(str(tmp_path / "config.json") + ": ") and "\n" not in message
        return message

    @pytest.mark.parametrize(
        "key, value, reason",
        [
            ("restart", "sometimes", "must be one of always, on-failure, never"),
            ("restart", True, "must be one of"),
            ("instances", -1, "must be a whole number from 0"),
            ("instances", 1.5, "must be a whole number from 0"),
            ("instances", 1001, "must be a whole number from 0"),
            ("needs", "db", "must be a list of strings"),
            ("needs", ["nix"], "there is no process 'nix'"),
            ("needs", ["web"], "a ring: web -> web"),
            ("user", "no such user", "must be"),
            ("group", "no such group", "must be"),
            ("command", None, "must be"),
            ("command", [], "must be a command; it is empty"),
            ("command", "  ", "must be a command; it is empty"),
            ("command", ["-x"], "write ./-x"),
            ("autostart", "yes", "must be true or false"),
            ("critical", 1, "must be true or false"),
            ("max_restarts", -1, "must be a whole number from 0"),
            *((key, 0, "from 0.01 s") for key in (
                "restart_window", "min_uptime", "backoff", "backoff_max", "retry_failed")),
            ("stop_signal", "STOP", "must be one of TERM"),
            ("stop_signal", "SIGTERM", "must be one of TERM"),
            ("stop_timeout", -1, "must be a duration"),
            ("env", {"A": 1}, "must be an object of names and strings"),
            ("env", {"A=B": "x"}, "must be an object of names and strings"),
            ("env_file", 5, "must be a list of strings"),
            ("cwd", "a\nb", "must be one line"),
            ("umask", 18, "must be a string of octal digits"),
            ("umask", "028", "must be a string of octal digits"),
            ("nice", 20, "must be a whole number"),
            ("open_files", 2, "must be a whole number from 3"),
            ("memory_restart_mb", -1, "must be a number from 0"),
            ("instance", 2, "is not an option"),
            *((key, value, "must be a table with one of tcp, http, command, notify")
              for key in ("ready", "live")
              for value in (
                  True, "tcp", [], {}, {"interval": 1}, {"tcp": "x:1", "notify": True},
                  {"tcp": "x"}, {"tcp": 80}, {"tcp": "a/b:80"}, {"http": "x:80/"},
                  {"http": "https://x/"}, {"http": "http://x/a b"}, {"command": []},
                  {"notify": False}, {"notify": "yes"}, {"tcp": "x:1", "interval": 0},
                  {"tcp": "x:1", "failures": 0}, {"tcp": "x:1", "within": "soon"},
                  {"tcp": "x:1", "retries": 3})),
        ],
    )  # fmt: skip
    def test_a_wrong_value_is_named(self, tmp_path, key, value, reason):
        message = self.refuse(tmp_path, {"web": {"command": "x", key: value}})
        assert f"process.web.{key}" in message and reason in message

    @pytest.mark.parametrize("kind, form", [("tcp", "localhost:{}"), ("http", "http://x:{}/")])
    def test_a_port_is_a_number(self, tmp_path, kind, form):
        for port in ("80", "{instance+8000}"):
            self.load(tmp_path, {"web": {"command": "x", "ready": {kind: form.format(port)}}})
        for port in ("80a", "http"):
            self.refuse(tmp_path, {"web": {"command": "x", "ready": {kind: form.format(port)}}})

    @pytest.mark.parametrize("url", ["http://127.0.0.1:80a/", "http://127.0.0.1:80?x"])
    def test_a_question_that_cannot_be_asked_is_answered_with_no(self, url):
        asked = apexd.Probe(kind="http", target=url, timeout=1.0)
        assert apexd.ask(asked, 0) is False

    def test_what_is_missing_or_no_table_is_named(self, tmp_path):
        assert "process.web.command is missing" in self.refuse(tmp_path, {"web": {}})
        assert "[process.web] must be a table" in self.refuse(tmp_path, {"web": "x"})
        assert "[process] must be a table" in self.refuse(tmp_path, 5)

    @pytest.mark.parametrize("name", ["", "1web", "web.1", "we b", "../x", "a" * 65, "wéb", "w\n"])
    def test_a_bad_name_is_refused(self, tmp_path, name):
        message = refused("CONFIG_INVALID", self.load, tmp_path, {name: {"command": "x"}})
        assert "no name of a process" in message
        self.load(tmp_path, {"Web-1_a": {"command": "x"}, "a" * 64: {"command": "x"}})

    def test_a_ring_is_printed(self, tmp_path):
        needs = {"a": ["b"], "b": ["a"], "c": ["a"], "d": []}
        for first in ("abcd", "dcba"):
            one = {name: {"command": "x", "needs": needs[name]} for name in first}
            message = self.refuse(tmp_path, one)
            assert "a -> b -> a" in message or "b -> a -> b" in message

    @pytest.mark.parametrize("shape", ["chain", "all before"])
    def test_200_processes_are_measured_and_a_ring_is_found_at_once(self, tmp_path, shape):
        def graph(needs_of_first, order):
            needs = {n: list(range(n))[-1 if shape == "chain" else 0 :] for n in range(200)}
            needs[0] = needs_of_first
            return {
                f"p{n}": {"command": "x", "stop_timeout": 2, "needs": [f"p{m}" for m in needs[n]]}
                for n in order
            }

        before = time.process_time()
        for order in (range(200), range(199, -1, -1)):
            assert self.load(tmp_path, graph([], order)).stop_timeout_s == 400 + 200 * 0.1
            assert "a ring: " in self.refuse(tmp_path, graph([199], order))
        assert time.process_time() - before < 5

    def test_the_time_to_stop_is_that_of_the_longest_chain(self, tmp_path):
        times = {"a": (1, "bc"), "b": (20, "d"), "c": (3, "d"), "d": (4, ""), "e": (24, "")}
        named = {n: {"command": "x", "stop_timeout": s, "needs": [*m]} for n, (s, m) in
                 times.items()}  # fmt: skip
        assert self.load(tmp_path, named).stop_timeout_s == 25 + 5 * 0.1

    def test_the_effective_values_are_printed_as_json(self, box):
        given = {"command": ["x", "{instance}"], "needs": [], "live": TCP, "umask": "027"}
        box.config({}, process={"web": given})
        shown = box.json("config")["process"]["web"]
        assert set(shown) == set(apexd.OPTIONS["process"]) and shown["command"] == given["command"]
        assert shown["live"]["kind"] == "tcp" and shown["live"]["failures"] == 3
        lines = dict(line.split(" = ", 1) for line in box.run("config").stdout.splitlines()[1:])
        for name, value in shown.items():
            assert json.loads(lines[f"process.web.{name}"]) == value
        assert int(shown["umask"], 8) == 0o27, "as it is written"

    def test_the_place_of_an_instance_is_filled_in(self):
        text = "{instance} {instance+8000} {instance+} {Instance} {{instance}} $x"
        assert apexd.fill(text, 7) == "7 8007 {instance+} {Instance} {7} $x"
        assert apexd.fill(["a", "-p{instance+1}"], 0) == ["a", "-p1"]

    def test_an_environment_file_is_read(self, tmp_path):
        text = "# x\n\nA=1\r\nexport  B=2\n C='\"' \nD=\nE=\"\nF=\"a b\"\nA=2=3"
        found = apexd.read_environment(write(str(tmp_path / "env"), text))
        assert found == {"A": "2=3", "B": "2", "C": '"', "D": "", "E": '"', "F": "a b"}

    @pytest.mark.parametrize("line", ["A", "1A=x", "A B=x", "=x", "A =x", "A=\0", "é=1"])
    def test_another_line_is_refused_with_its_number(self, tmp_path, line):
        path = write(str(tmp_path / "env"), "A=1\n" + line + "\n")
        with pytest.raises(ValueError, match=r"env:2 is not NAME=VALUE"):
            apexd.read_environment(path)

    @posix
    @root
    @pytest.mark.parametrize("owner, mode", [(65534, 0o600), (0, 0o666), (0, 0o620)])
    def test_root_reads_no_environment_file_that_others_may_write(self, tmp_path, owner, mode):
        """S3"""
        path = write(str(tmp_path / "env"), "LD_PRELOAD=/nonexistent/evil.so\n")
        assert apexd.read_environment(path)
        os.chmod(path, mode)
        os.chown(path, owner, owner)
        assert path in refused("CONFIG_INVALID", apexd.read_environment, path)

    @pytest.mark.parametrize("text", [18, 0o22, None, True, "", "8", "0o27", "-1", "27\n", "00000"])
    def test_a_umask_is_a_string_of_octal_digits(self, text):
        for good in ("0", "27", "027", "0777"):
            apexd.octal(good)
        with pytest.raises(ValueError, match="octal"):
            apexd.octal(text)




# ============================================================================
# 14. SUPERVISOR - processes are kept up, one copy each, whatever dies
# ============================================================================

# It tells who begins, ends and runs twice; answers with its PID while there is no `hold.NAME`.
SERVER = """
import fcntl, os, select, signal, socket, sys, time
name = os.environ["APEX_PROCESS"]
def tell(file, *words):
    with open(file, "a") as out:
        out.write(" ".join((name + "." + os.environ["APEX_INSTANCE"], *words)) + "\\n")
def leave(number, frame):
    tell("ended", repr(time.time()))
    os._exit(0)
lock = open(f"lock.{name}.{os.environ['APEX_INSTANCE']}", "a")
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    tell("overlaps")
signal.signal(signal.SIGTERM, leave)
tell("begun", str(os.getpid()))
while os.path.exists("hold." + name):
    select.select([], [], [], 0.01)
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=128)
while True:
    connection, _ = listener.accept()
    try:
        with connection:
            connection.recv(4096)
            connection.sendall(b"HTTP/1.0 200 OK\\r\\n\\r\\n%d" % os.getpid())
    except OSError:
        pass
"""

# It says what stands in the file `say`, again and again.
NOTIFIER = """
import os, select, socket
print("told", os.environ.get("WATCHDOG_USEC"), flush=True)
mouth = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
while True:
    try:
        with open("say", "rb") as file:
            mouth.sendto(file.read(), os.environ["NOTIFY_SOCKET"])
    except OSError:
        pass
    select.select([], [], [], 0.02)
"""

# Numbered lines, 16 bytes each, about 40 kB/s, until there is a file `enough`.
SCRIBE = """
import os, select
number = 0
while not os.path.exists("enough"):
    if os.path.exists("go") or not number:
        os.write(1, b"".join(b"%015d\\n" % n for n in range(number, number + 32)))
        number += 32
    select.select([], [], [], 0.0125)
with open("written", "w") as file:
    file.write(str(number))
select.select([], [], [])
"""
BARE = [sys.executable, "-S", "-E"]  # a quick start


def free_ports(count):
    """Return the first of so many free ports in a row, below those that a system gives out."""
    while True:
        first = random.SystemRandom().randrange(10000, 32000)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            return first


def served(box, port, **options):
    """Return the section of a process that runs SERVER on `port` and up."""
    write(os.path.join(box.path, "server.py"), SERVER)
    ready = {"tcp": f"127.0.0.1:{{instance+{port}}}", "interval": 0.02, "within": 120}
    command = [*BARE, "server.py", f"{{instance+{port}}}"]
    return {"command": command, "ready": ready, "backoff": 0.05, **options}


def supervise(box, **processes):
    """Start a daemon with these sections of processes; return its PID."""
    box.config({}, process=processes)
    return box.start()


def get_page(port):
    """Return what a server answers."""
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        head, _, body = b"".join(iter(lambda: connection.recv(4096), b"")).partition(b"\r\n\r\n")
    assert b" 200 " in head, head
    return body


class Asking(threading.Thread):
    """Asks servers again and again while the block runs; the next one when one refuses."""

    def __init__(self, *ports):
        super().__init__()
        self._ports, self._enough = ports, threading.Event()
        self.asked, self.failures = 0, []

    def run(self):
        while not self._enough.wait(0.002):
            refused = []
            for port in self._ports:
                try:
                    get_page(port)
                    break
                except (OSError, AssertionError) as error:
                    refused.append(error)
            else:
                self.failures.append((self.asked, refused))
            self.asked += 1

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *failure):
        self._enough.set()
        self.join()


def instances(box, name="web"):
    """Return the details of a process's instances."""
    answer = box.request({"type": "get_process", "name": name}, 30)
    return answer["process"]["instance_details"]


def until_all(box, name, *states, count=None):
    """Wait until all instances of a process are in one of `states` (default: running)."""

    def look():
        found = instances(box, name)
        assert all(one["state"] in (states or ("running",)) for one in found), found
        assert count is None or len(found) == count, found
        return found

    return eventually(look, why=f"{name} is {' or '.join(states or ('running',))}")


def pids(box, name, count=None):
    """Return the PIDs of a process once all its instances run."""

    def look():
        found = [one["pid"] for one in until_all(box, name, count=count)]
        return None not in found and found

    return eventually(look, why=f"{name} has its PIDs")


def why(box, name):
    """Return what `why NAME` says."""
    return "\n".join(box.request({"type": "why_process", "name": name})["reasons"])


def told(box, name, first=""):
    """Return the lines of a file in the project's folder that begin with `first`, as words."""
    lines = read(os.path.join(box.path, name)).splitlines()
    return [line.split() for line in lines if line.startswith(first)]


def put(box, name, text=""):
    """Put a file into the project's folder; None removes it."""
    path = os.path.join(box.path, name)
    os.unlink(path) if text is None else write(path, text)


@posix
class TestSupervisor:
    @linux
    def test_ps_shows_the_commands_own_pid_and_scale_down_and_up_do_what_they_say(self, box):
        port = free_ports(6)
        words = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", f"{{instance+{port}}}"]
        text = " ".join([*words[:-1], str(port + 5)]) + "; exit 3"  # its shell stays
        ready = {"tcp": f"127.0.0.1:{{instance+{port}}}", "interval": 0.02}
        web = {"command": words, "instances": 3, "ready": ready}
        supervise(box, web=web, text={"command": text, "ready": {"tcp": f"127.0.0.1:{port + 5}"}})
        first, _ = pids(box, "web"), pids(box, "text")
        shown = box.json("ps")
        names = [f"{one['name']}.{one['index']}" for one in shown]
        assert names == ["web.0", "web.1", "web.2", "text.0"]
        assert [one["pid"] for one in shown[:3]] == first
        for one, at in zip(shown, (port, port + 1, port + 2, port + 5)):
            command = read(f"/proc/{one['pid']}/cmdline").split("\0")
            if one["name"] == "text":
                assert command[-2] == text, "the shell is its command"
            else:
                assert command[:3] == words[:3] and command[5] == str(at), one
            assert 0 <= one["uptime_secs"] < 60 and one["memory_bytes"] > 5e6, one
            assert (one["state"], one["restart_count"]) == ("running", 0)
        box.run("scale", "web", 5)
        assert pids(box, "web", count=5)[:3] == first
        assert all(get_page(port + index) for index in range(5))
        box.run("scale", "web", 1)
        assert [one["pid"] for one in instances(box, "web")] == first[:1]
        assert not any(map(lives, first[1:]))
        box.run("down", "web")
        assert [(one["state"], one["pid"]) for one in instances(box, "web")] == [("stopped", None)]
        assert not lives(first[0])
        assert box.run("down", "web").stdout == "web does not run\n", "it is as it should be"
        box.run("up", "web")
        assert len(pids(box, "web")) == 1 and get_page(port)
        assert box.run("up", "web").stdout == "web runs already\n"
        assert box.error("up", "wbe", rc=2)["code"] == "process_not_found"

    def test_work_that_ended_well_is_done_again_only_by_name(self, box):
        migrate = {"command": "echo x >>migrated", "restart": "never"}
        web = {"command": ["sleep", "999"], "needs": ["migrate"]}
        supervise(box, migrate=migrate, web=web)
        pids(box, "web")
        so_already = "migrate has done its work; web runs already\n"
        assert box.run("up").stdout == so_already
        assert box.run("up", "migrate", "web").stdout == "started: migrate\n"
        eventually(lambda: instances(box, "migrate")[0]["state"] == "stopped")
        assert len(told(box, "migrated")) == 2
        box.run("down", "web")
        assert box.run("up").stdout == "started: web\n"
        box.run("down", "web")
        assert box.run("up", "web").stdout == "started: web\n"
        assert len(told(box, "migrated")) == 2
        assert box.run("up", "migrate").stdout == "started: migrate\n"
        for number in range(3, 9):
            assert len(told(box, "migrated")) == number
            assert box.run("up", "migrate").stdout == "started: migrate\n"
        box.run("down")
        assert not any(one["pid"] for one in instances(box, "web"))

    def test_the_event_of_one_that_failed_says_how_it_ended(self, box):
        supervise(box, bad={"command": "exit 3", "max_restarts": 0})
        eventually(lambda: instances(box, "bad")[0]["state"] == "failed")
        found = box.run("--json", "events", "--type", "process.failed").stdout
        assert json.loads(found.splitlines()[-1])["payload"]["why"] == "exit 3"
        assert "bad.0 is failed: exit 3; next try in " in box.log()

    def test_ps_shows_the_command_that_runs(self, box):
        web = {"command": "exec sleep 1000{instance}", "instances": 2, "max_restarts": 0}
        supervise(box, web=web)
        first = pids(box, "web")
        box.config({}, process={"web": {**web, "command": "exit 3"}})
        box.run("reload")
        eventually(lambda: sum(x["state"] == "failed" for x in instances(box, "web")) == 1)
        for one in box.json("ps"):
            runs = one["pid"] in first
            assert one["command"] == (f"exec sleep 1000{one['index']}" if runs else "exit 3")
        shown = box.run("ps").stdout
        assert "exec sleep 1000" in shown and "exit 3" in shown
        box.run("down", "web")

    def test_what_cannot_be_done_to_an_instance_says_so(self, box):
        supervise(box, web={"command": ["sleep", "999"], "instances": 2})
        pids(box, "web")
        for words in (["restart"], ["reload"], ["up"], ["down"], ["scale"]):
            more = ["3"] if words == ["scale"] else []
            error = box.error(*words, "web.0", *more, rc=2)
            assert (error["code"], error["hint"][-9:]) == ("process_not_found", "write web"), error
        assert box.run("logs", "web.1").stdout == ""
        assert box.error("logs", "web.7", rc=2)["code"] == "process_not_found"
        box.stop()
        assert box.error("logs", "web.7", rc=2)["code"] == "process_not_found"

    def test_within_another_program_it_can_be_waited_for(self, box):
        config = apexd.Config({"process": {"web": {"command": ["sleep", "60"]}}})
        with contextlib.closing(apexd.TaskStore(box.file("apex.db"), config)) as store:
            supervisor = apexd.Supervisor(store)
            supervisor.start()
            eventually(lambda: supervisor.status()["running_instances"] == 1)
            supervisor.stop()
            assert supervisor.halted.wait(20)
            assert supervisor.status()["running_instances"] == 0

    def test_within_another_program_it_leaves_neither_threads_nor_a_keeper(self, box):
        config = apexd.Config({"process": {"web": {"command": ["sleep", "60"]}}})
        before, stopped = set(threading.enumerate()), threading.Event()
        with contextlib.closing(apexd.TaskStore(box.file("apex.db"), config)) as store:
            for end in ("halt", "stop"):
                supervisor = apexd.Supervisor(store, on_stopped=stopped.set)
                supervisor.start()
                eventually(lambda: supervisor.status()["running_instances"] == 1)
                assert len(keepers(box)) == 1
                getattr(supervisor, end)()
                eventually(lambda: set(threading.enumerate()) <= before, 5)
            assert stopped.is_set()
            eventually(lambda: not keepers(box), 5)

    @linux
    def test_a_keeper_that_is_reached_anew_costs_no_descriptor(self, box):
        live = {"notify": True, "timeout": "60s"}
        supervise(box, web={"command": ["sleep", "60"], "live": live})
        pids(box, "web", 1)
        (name,) = keepers(box).values()
        before = len(os.listdir(f"/proc/{box.pid()}/fd"))
        for number in range(1, 6):
            with greet(box, name) as raw:
                assert raw.recv(1 << 16)
            eventually(lambda: times_logged(box, "Adopted process") == number)
        eventually(lambda: len(os.listdir(f"/proc/{box.pid()}/fd")) <= before, 5)

    @linux
    def test_what_is_killed_after_min_uptime_is_back_at_once(self, box):
        port, took, rounds = free_ports(3), [], 20 if SLOW else 4
        # `date` tells when the new one really runs; it costs about 1 ms.
        command = ["sh", "-c", 'date +%s.%N >>"$0"; exec "$@"', "began.{instance}", *BARE]
        command += ["server.py", f"{{instance+{port}}}"]
        supervise(box, web=served(box, port, command=command, instances=3, min_uptime=0.2))
        for number in range(1, rounds + 1):
            before = pids(box, "web")
            pause(0.25)  # that is min_uptime
            for index, pid in enumerate(before):
                lines = functools.partial(told, box, f"began.{index}")
                killed = time.time()
                kill(pid)
                eventually(lambda: len(lines()) > number)
                took.append(float(lines()[-1][0]) - killed)
            assert not set(pids(box, "web")) & set(before)
            assert [one["restart_count"] for one in instances(box, "web")] == [number] * 3
        took.sort()
        print(f"back after {took[len(took) // 2] * 1e3:.1f} ms, at most {took[-1] * 1e3:.1f} ms")
        assert took[len(took) // 2] < 0.25 and not told(box, "overlaps")

    @linux
    @needs("flock")
    def test_a_killed_daemons_processes_serve_on_and_never_run_twice(self, box):
        port, rng = free_ports(3), random.Random(11)
        guard = "exec 9>>lock.$0; flock -n 9 || echo $0 >>overlaps; echo $0 >>begun; "
        quick = ["sh", "-c", guard + "sleep 0.02; exit 1", "quick"]
        deaf = ["sh", "-c", "trap '' TERM; " + guard + "while :; do sleep 0.05; done", "deaf"]
        put(box, "hold.slow")
        often = {"backoff": 0.03, "backoff_max": 0.1, "max_restarts": 1000}
        supervise(
            box,
            web=served(box, port, instances=2, min_uptime=0.01),
            slow=served(box, port + 2),
            quick={"command": quick, **often},
            deaf={"command": deaf, "stop_timeout": 0.1},
        )
        kill(pids(box, "web")[0])
        eventually(lambda: instances(box, "web")[0]["restart_count"] == 1)
        web, slow = pids(box, "web"), until_all(box, "slow", "starting")[0]["pid"]
        with Asking(port) as first, Asking(port + 1) as second:
            for _ in range(60 if SLOW else 10):
                with box.connect() as connection:  # "deaf" is being replaced, or is starting
                    connection.sendall(frame(b'{"type": "restart_process", "name": "deaf"}'))
                    pause(rng.random() * 0.2)
                    box.kill9()
                box.start()
                assert pids(box, "web") == web
        assert not first.failures and not second.failures and first.asked > 50
        assert [one["restart_count"] for one in instances(box, "web")] == [1, 0]
        assert instances(box, "slow")[0]["pid"] == slow, "it was adopted while it was starting"
        assert not told(box, "overlaps") and len(told(box, "begun", "slow")) == 1
        assert len(told(box, "begun", "web")) == 3 and len(told(box, "begun", "deaf")) > 1
        assert instances(box, "quick")[0]["restart_count"] > 2 < len(told(box, "begun", "quick"))

    def test_no_request_fails_while_the_daemon_is_restarted(self, box):
        port, mode = free_ports(1), os.environ.get("APEXD_TEST_MODE")
        daemon = supervise(box, web=served(box, port))
        web = pids(box, "web")
        with Asking(port) as client:
            for _ in range(ROUNDS):
                box.run("restart", *(("--mode", mode) if mode else ()))
        assert client.failures == [] and client.asked > 20
        assert pids(box, "web") == web and box.pid() != daemon

    @linux
    def test_one_that_ends_at_once_backs_off_fails_and_comes_back_when_mended(self, box):
        command = "date +%s.%N >>began; [ -e mended ] && exec sleep 60; exit 3"
        times = {"backoff": 0.1, "retry_failed": 0.6, "min_uptime": 0.3}
        supervise(box, bad={"command": command, "max_restarts": 3, **times})
        until_all(box, "bad", "failed")
        began = [float(word) for (word,) in told(box, "began")]
        gaps = [after - before for before, after in zip(began, began[1:])]
        assert len(gaps) == 3, "max_restarts"
        for gap, delay in zip(gaps, (0.1, 0.2, 0.4)):
            assert delay <= gap < delay * 1.1 + 0.5, gaps
        status = box.json("status")
        assert (status["health"], status["failed"]) == ("degraded", ["bad.0"])
        assert "exit 3" in why(box, "bad") and "next try in" in why(box, "bad")
        put(box, "mended")
        assert until_all(box, "bad")[0]["restart_count"] >= 4
        assert box.json("status")["health"] == "healthy"
        assert float(told(box, "began")[4][0]) - began[3] >= 0.6

    def test_the_next_daemon_knows_who_has_failed_and_who_is_done(self, box):
        bad = {"command": "echo x >>bad; exit 3", "backoff": 0.02, "max_restarts": 2}
        supervise(box, bad=bad, once={"command": "echo x >>once", "restart": "never"})
        until_all(box, "bad", "failed"), until_all(box, "once", "stopped")
        box.kill9()
        box.start()
        until_all(box, "bad", "failed"), until_all(box, "once", "stopped")
        assert len(told(box, "bad")) == 3 and len(told(box, "once")) == 1

    def test_needs_are_waited_for_named_by_why_and_ended_last(self, box):
        port, late = free_ports(4), ("tcp", "http", "command", "notify")
        http = {"http": f"http://127.0.0.1:{port + 1}/", "interval": 0.02}
        dbs = {
            "tcp": served(box, port),
            "http": served(box, port + 1, ready=http),
            "command": served(box, port + 2, ready={"command": "test -e open", "interval": 0.02}),
            "notify": {"command": [*BARE, "-c", NOTIFIER], "ready": {"notify": True}},
            "never": {"command": "exec sleep 60", "ready": {"tcp": f"127.0.0.1:{port + 3}"}},
            "once": {"command": "sleep 0.1; echo done >>once", "restart": "never"},
            "wrong": {"command": "exit 1", "restart": "never"},
        }
        leave = "trap 'date +web.$0.0\\ %s.%N >>ended; exit' TERM; while :; do sleep 0.02; done"
        sections = {f"db-{kind}": section for kind, section in dbs.items()}
        for kind in dbs:
            command = ["sh", "-c", leave, kind]
            sections[f"web-{kind}"] = {"command": command, "needs": [f"db-{kind}"]}
        for kind in late[:3]:
            put(box, f"hold.db-{kind}")
        supervise(box, **sections)
        until_all(box, "web-once")
        assert told(box, "once") == [["done"]] and instances(box, "db-once")[0]["pid"] is None
        for kind in (*late, "never", "wrong"):
            (web,) = instances(box, f"web-{kind}")
            assert (web["state"], web["pid"]) == ("starting", None), (kind, web)
            text = why(box, f"web-{kind}")
            assert f"waits for db-{kind}" in text and f"db-{kind}.0" in text, text
        assert "not ready yet" in why(box, "web-never") and "exit 1" in why(box, "web-wrong")
        for kind in late[:3]:
            put(box, f"hold.db-{kind}", None)
        put(box, "open")
        put(box, "say", "READY=1")
        for kind in late:
            until_all(box, f"web-{kind}")
            assert instances(box, f"db-{kind}")[0]["state"] == "running"
        assert instances(box, "web-never")[0]["pid"] is None
        box.run("down")
        if IS_LINUX:
            ended = {name: float(moment) for name, moment in told(box, "ended")}
            for kind in late[:3]:
                assert ended[f"web.{kind}.0"] < ended[f"db-{kind}.0"], ended
        states = {one["state"] for kind in dbs for one in instances(box, f"web-{kind}")}
        assert states == {"stopped"}
        assert not set(box.processes()) - {box.pid(), keeper_of(box)}

    def test_a_rolling_reload_keeps_all_but_one_ready_and_stops_at_one_that_fails(self, box):
        port, fewest, looks = free_ports(3), 3, 0
        web = served(box, port, instances=3)
        web["ready"]["within"] = 1
        supervise(box, web=web)
        before = pids(box, "web")
        with Asking(port, port + 1, port + 2) as client:
            reload = Later(box, "reload", "web")
            while reload.is_alive():
                states = [one["state"] for one in instances(box, "web")]
                fewest, looks = min(fewest, states.count("running")), looks + 1
            assert reload.result().returncode == 0
            after = pids(box, "web")
            assert not set(before) & set(after) and looks > 5
            put(box, "hold.web")  # the next version does not come up
            error = box.error("reload", "web", rc=1)
            assert error["code"] == "process_failed" and "web.0" in error["message"]
            assert [one["pid"] for one in instances(box, "web")][1:] == after[1:]
            assert all(int(get_page(port + index)) == after[index] for index in (1, 2))
            put(box, "hold.web", None)
            eventually(lambda: not set(pids(box, "web")) & set(after), why="they follow")
        assert fewest == 2 and client.failures == [] and client.asked > 50
        assert not told(box, "overlaps")

    @linux
    @needs("flock", "setsid")
    def test_nothing_of_a_process_outlives_it(self, box):
        deaf = "trap '' TERM; while :; do sleep 0.05; done"
        away = "setsid sleep 60 & setsid sh -c 'trap \"\" TERM; sleep 60' & wait"
        forks = "exec 9>>lock.$APEX_INSTANCE; flock -n 9 || echo x >>overlaps; echo x >>begun; "
        forks += "setsid sleep 60 >/dev/null 2>&1 & exit 0"  # seen also while it execs
        often = {"instances": 4, "backoff": 0.01, "backoff_max": 0.01, "max_restarts": 10000}
        supervise(
            box,
            deaf={"command": deaf, "stop_timeout": 0.4},
            away={"command": away},
            forks={"command": forks, **often},
        )
        until_all(box, "deaf"), until_all(box, "away")
        eventually(lambda: len(told(box, "begun")) > (600 if SLOW else 60))
        began = time.monotonic()
        box.run("down", "deaf")
        assert 0.4 <= time.monotonic() - began < 3 and "signal 9" in why(box, "deaf")
        box.run("down", "away", "forks")
        assert not told(box, "overlaps"), "what a run had left was gone before the next"
        left, ours = {}, {box.pid(), *keepers(box)}
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                environment = read(f"/proc/{pid}/environ").split("\0")
                if f"HOME={box.home}" in environment and int(pid) not in ours:
                    left[pid] = [one for one in environment if one.startswith("APEX_")]
        assert left == {}

    @pytest.mark.parametrize("where", ["near", "long", pytest.param("cyrillic", marks=slow)])
    def test_what_a_process_says_is_heard_also_by_the_next_daemon(self, box, where):
        if where != "near":  # sun_path holds 107 bytes; a record holds fewer than 500
            name = "s" * 60 + "/" + "t" * 60 if where == "long" else "\u0434" * 33
            box.state = os.path.join(box.root, name)
            box.env["APEX_STATE_DIR"] = box.state
        hears = {"ready": {"notify": True}, "live": {"notify": True, "timeout": 1.5}}
        supervise(box, web={"command": [*BARE, "-c", NOTIFIER], "backoff": 0.05, **hears})
        put(box, "say", "STATUS=warming up")
        eventually(lambda: 'it says "warming up"' in why(box, "web"))
        assert instances(box, "web")[0]["state"] == "starting"
        put(box, "say", "READY=1\nWATCHDOG=1\nSTATUS=open")
        (pid,) = pids(box, "web")
        assert "told 1500000" in box.run("logs", "web").stdout
        box.kill9()
        box.start()
        put(box, "say", "WATCHDOG=1\nSTATUS=heard again")
        eventually(lambda: 'it says "heard again"' in why(box, "web"))
        pause(1.7)  # longer than it may be silent
        assert pids(box, "web") == [pid]
        put(box, "say", "STATUS=silent")
        eventually(lambda: not lives(pid), why="no WATCHDOG=1: it is restarted")
        put(box, "say", "READY=1")
        assert pids(box, "web") != [pid] and "no sign of life for" in box.log()
        assert instances(box, "web")[0]["restart_count"] == 1

    def test_each_run_is_heard_however_quickly_it_follows_the_last(self, box):
        hears = {"ready": {"notify": True, "within": 60}, "min_uptime": 0.01}
        put(box, "say", "READY=1")
        supervise(box, web={"command": [*BARE, "-c", NOTIFIER], **hears})
        for number in range(1, 61 if SLOW else 13):
            kill(*pids(box, "web"))
            eventually(lambda: instances(box, "web")[0]["restart_count"] == number)
        assert pids(box, "web")
        box.run("down", "web")
        eventually(lambda: not [x for x in os.listdir(box.file("run")) if "notify" in x])
        os.kill(box.pid(), signal.SIGUSR1)
        eventually(lambda: "thread MainThread" in box.log())
        assert "thread hear-web" not in box.log()
        box.run("up", "web")
        assert pids(box, "web")

    def test_one_that_hangs_is_unhealthy_and_then_restarted(self, box):
        port = free_ports(1)
        live = {"http": f"http://127.0.0.1:{port}/", "interval": 0.1, "timeout": 0.2, "failures": 4}
        supervise(box, web=served(box, port, live=live, stop_timeout=1))
        (pid,) = pids(box, "web")
        os.kill(pid, signal.SIGSTOP)
        until_all(box, "web", "unhealthy")
        assert "no sign of life for" in why(box, "web")
        os.kill(pid, signal.SIGCONT)
        assert pids(box, "web") == [pid], "it was well again in time"
        os.kill(pid, signal.SIGSTOP)
        eventually(lambda: instances(box, "web")[0]["restart_count"] == 1)
        assert pids(box, "web") != [pid] and not lives(pid)

    def test_a_process_has_the_environment_place_and_limits_it_is_given(self, box):
        command = 'echo "$A $B $APEX_INSTANCE $(umask) $(nice) $(ulimit -n) $PWD" >>told; '
        limits = {"umask": "027", "nice": 5, "open_files": 99, "cwd": "sub"}
        put(box, "b.env", "# a comment\nexport B='one'\n")
        place = os.path.join(box.path, "sub")
        os.mkdir(place)
        given = {"env": {"A": "{instance+7}"}, "env_file": "b.env", "backoff": 5, **limits}
        supervise(box, web={"command": command + "exec sleep 60", **given})
        first = eventually(lambda: told(box, "sub/told"))
        assert first == [["7", "one", "0", "0027", str(5 + os.nice(0)), "99", place]]
        assert stat.S_IMODE(os.stat(os.path.join(place, "told")).st_mode) == 0o640
        put(box, "b.env", "B=two")
        box.run("restart", "web")
        eventually(lambda: [words[1] for words in told(box, "sub/told")] == ["one", "two"])
        put(box, "b.env", None)
        error = box.error("restart", "web", rc=1)
        assert error["code"] == "process_failed" and "b.env" in error["message"]
        assert "b.env" in why(box, "web") and "Traceback" not in box.log()
        assert "b.env" in box.run("logs", "web", "-n", 1).stdout

    @linux
    @root
    def test_a_process_of_another_user_is_wholly_his_and_is_heard(self, box):
        import grp
        import pwd

        nobody = pwd.getpwnam("nobody")
        group = grp.getgrgid(nobody.pw_gid).gr_name
        him, command = {"user": "nobody", "cwd": "/"}, "id -un; id -gn; id -G; echo $HOME $USER; "
        say = NOTIFIER.replace('"say"', repr(write(os.path.join(box.root, "say"), "READY=1")))
        web = {"command": ["/usr/bin/python3", "-S", "-c", say], "ready": {"notify": True}, **him}
        mine = {"command": "id -gn; exec sleep 60", "cwd": "/", "group": group}
        os.chmod(box.root, 0o755), os.chmod(os.path.join(box.root, "say"), 0o644)
        supervise(box, who={"command": command + "exec sleep 60", **him}, group=mine, web=web)
        groups = " ".join(map(str, os.getgrouplist("nobody", nobody.pw_gid)))
        expected = ["nobody", group, groups, f"{nobody.pw_dir} nobody"]
        eventually(lambda: box.run("logs", "who").stdout.splitlines() == expected)
        eventually(lambda: box.run("logs", "group").stdout == f"{group}\n")
        if os.path.exists("/usr/bin/python3"):  # a private one may be out of his reach
            until_all(box, "web")

    @linux
    def test_memory_restart_stop_signal_and_signal(self, box):
        grow = "import os, select\nwhile not os.path.exists('grow'): select.select([], [], [], .02)"
        grow += "\nos.unlink('grow')\nmuch = b'x' * 90_000_000\nselect.select([], [], [])"
        tell = "for s in INT USR1; do trap \"echo $s >>heard\" $s; done; "
        tell += "trap 'echo QUIT >>heard; exit' QUIT; echo x >>on; while :; do sleep 0.02; done"
        sig = {"command": ["sh", "-c", tell], "stop_signal": "QUIT", "instances": 2}
        supervise(box, fat={"command": [*BARE, "-c", grow], "memory_restart_mb": 60}, sig=sig)
        (fat,) = pids(box, "fat")
        put(box, "grow")
        eventually(lambda: len(told(box, "on")) == 2)
        box.run("signal", "sig.1", "USR1")
        eventually(lambda: told(box, "heard") == [["USR1"]])
        box.run("signal", "sig", "INT")
        eventually(lambda: told(box, "heard").count(["INT"]) == 2)
        box.run("down", "sig")
        assert sorted(told(box, "heard")) == [["INT"]] * 2 + [["QUIT"]] * 2 + [["USR1"]]
        assert box.error("signal", "sig", "HUP", rc=1)["code"] == "process_not_running"
        eventually(lambda: instances(box, "fat")[0]["pid"] not in (None, fat))
        assert "process fat.0 uses" in box.log()

    def test_the_daemon_ends_with_status_1_when_a_critical_process_has_failed(self, box):
        bad = {"command": "exit 1", "critical": True, "max_restarts": 1, "backoff": 0.02}
        box.config({}, process={"bad": bad, "web": {"command": "exec sleep 60"}})
        assert box.popen("start", "--foreground").wait(10) == 1
        assert "bad.0 is critical and has failed" in box.log() and not box.processes()

    def test_down_and_scale_last_stop_starts_afresh_and_autostart_is_obeyed(self, box):
        forever = {"command": "exec sleep 60", "min_uptime": 0.01}
        supervise(box, web=forever, off=forever, later={**forever, "autostart": False})
        kill(pids(box, "web")[0])
        eventually(lambda: instances(box, "web")[0]["restart_count"] == 1)
        until_all(box, "off"), until_all(box, "later", "stopped")
        box.run("down", "off")
        box.run("up", "later")
        box.run("scale", "web", 2)
        web, later = pids(box, "web", count=2), pids(box, "later")
        box.kill9()
        box.start()
        assert (pids(box, "web"), pids(box, "later")) == (web, later)
        assert [one["restart_count"] for one in instances(box, "web")] == [1, 0]
        assert instances(box, "off")[0]["state"] == "stopped"
        box.stop()
        assert not box.processes()
        box.start()
        assert not set(pids(box, "web", count=2)) & set(web)
        assert [one["restart_count"] for one in instances(box, "web")] == [0, 0]
        assert instances(box, "off")[0]["state"] == "stopped"
        until_all(box, "later")

    @linux
    @pytest.mark.parametrize("how", ["kill --all", "--foreground TERM"])
    def test_what_ends_the_daemon_and_all_ends_processes_too(self, box, how):
        deep = "setsid sleep 60 & trap '' TERM; while :; do sleep 0.05; done"
        box.config({}, process={"web": {"command": deep, "instances": 2, "stop_timeout": 0.2}})
        daemon = box.popen("start", "--foreground")
        eventually(lambda: os.path.exists(box.file("endpoint")))
        until_all(box, "web")
        eventually(lambda: [*box.processes().values()].count("sleep 60 ") == 2)
        if how == "kill --all":
            daemon.kill()
            daemon.wait()
            box.run("kill", "--all")
        else:
            daemon.terminate()
            assert daemon.wait(10) == 0
        assert not box.processes()
        box.start()
        assert [one["restart_count"] for one in until_all(box, "web")] == [0, 0]

    def test_logs_lose_and_double_no_line_through_rotations(self, box):
        if not can_collapse(box.root):
            pytest.skip("lines are sure to be kept only where a head can be collapsed away")
        supervise(box, web={"command": [*BARE, "-c", SCRIBE], "log_mb": 0.064})
        heads, path = [], box.file("logs", "proc-web.0.log")

        def look():
            base = int(read(path + ".base") or 0)
            if base > (heads[-1][1] if heads else 0):
                heads.append((read(path + ".1").encode(), base))
            return len(heads) >= (12 if SLOW else 3)

        with open(os.path.join(box.root, "seen"), "wb") as seen:
            box.popen("logs", "web.0", "-f", stdout=seen)
            eventually(lambda: os.path.getsize(seen.name), why="it follows")
            put(box, "go")
            eventually(look, 60, "it was rotated")
            put(box, "enough")
            total = LINE_BYTES * int(eventually(lambda: read(os.path.join(box.path, "written"))))
            eventually(lambda: os.path.getsize(seen.name) >= total)
        gone, base = 0, int(read(path + ".base"))
        assert read(path).encode() == expected_lines(base, total)
        for head, end in heads:
            assert head == expected_lines(end - len(head), end)
            assert len(head) == min(end - gone, 64000)
            gone = end
        assert read(seen.name).encode() == expected_lines(0, total), "each line once"

    def test_who_follows_a_process_sees_all_of_an_instance_that_comes_later(self, box):
        supervise(box, web={"command": "seq 1 2000; exec sleep 60"})
        eventually(lambda: "2000" in box.run("logs", "web").stdout)
        with open(os.path.join(box.root, "seen"), "wb") as seen:
            box.popen("logs", "web", "-f", "-n", 1, stdout=seen)
            eventually(lambda: read(seen.name) == "2000\n")
            box.run("scale", "web", 2)
            eventually(lambda: "web.1 | 2000\n" in read(seen.name))
        assert read(seen.name) == "2000\n" + "".join(f"web.1 | {n}\n" for n in range(1, 2001))

    @pytest.mark.parametrize("how", ["reload", "HUP"])
    def test_a_reload_touches_only_what_has_changed(self, box, how):
        def reload():
            box.run("reload") if how == "reload" else os.kill(box.pid(), signal.SIGHUP)

        forever = {"command": "exec sleep 60", "instances": 2}
        times = {"restart": "on-failure", "backoff": 3, "stop_timeout": 1, "min_uptime": 2}
        before = ("same", "policy", "changed", "gone", "more", "fewer")
        supervise(box, **dict.fromkeys(before, forever))
        before = {name: pids(box, name) for name in before}
        config = {
            "same": forever,
            "policy": {**forever, **times, "needs": ["same"], "log_mb": 1},
            "changed": {**forever, "env": {"A": "1"}},
            "more": {**forever, "instances": 4},
            "fewer": {**forever, "instances": 1},
            "added": forever,
        }
        box.config({}, process=config)
        reload()
        until_all(box, "more", count=4), until_all(box, "fewer", count=1)
        eventually(lambda: not set(pids(box, "changed")) & set(before["changed"]))
        eventually(lambda: not any(map(lives, before["gone"] + before["fewer"][1:])))
        after = {name: pids(box, name) for name in config}
        assert after["same"] == before["same"] and after["policy"] == before["policy"]
        assert after["more"][:2] == before["more"] and after["fewer"] == before["fewer"][:1]
        assert len(after["added"]) == 2
        write(box.file("config.json"), '{"process": {"same": {"comand": "false"}}}')
        if how == "reload":
            assert "command" in box.error("reload", rc=78)["hint"]
        else:
            reload()
            eventually(lambda: "reload refused" in box.log())
        assert {name: pids(box, name) for name in config} == after
        box.stop()  # a broken file does not keep it running

    def test_a_probe_that_a_reload_adds_is_asked_and_restarts_nothing(self, box):
        port = free_ports(1)
        live = {"http": f"http://127.0.0.1:{port}/", "interval": 0.1, "timeout": 0.2, "failures": 2}
        supervise(box, web=served(box, port, stop_timeout=1))
        (pid,) = pids(box, "web")
        pause(0.8)  # longer than the new probe's patience
        box.config({}, process={"web": served(box, port, live=live, stop_timeout=1)})
        box.run("reload")
        pause(0.8)
        assert pids(box, "web") == [pid]
        os.kill(pid, signal.SIGSTOP)
        eventually(lambda: not lives(pid), why="it is asked: it hangs")

    def test_a_probe_command_has_the_processs_environment_also_after_an_adoption(self, box):
        live = {"command": '[ "$A$APEX_INSTANCE" = here0 ]', "interval": 0.05, "failures": 2}
        supervise(box, web={"command": "exec sleep 60", "env": {"A": "here"}, "live": live})
        (pid,) = pids(box, "web")
        box.kill9()
        box.start()
        pause(0.5)  # it is asked several times
        assert pids(box, "web") == [pid]


# ============================================================================
# 15. WATCH - what changes in files, told by the system or looked for
# ============================================================================


class Watching:
    """A FileWatcher over `path`, quick; `bursts` holds what it has told, a set each."""

    def __init__(self, path, roots=None, **options):
        self.path, self.bursts, self.at = str(path), [], []
        options = {"debounce_s": 0.05, "debounce_max_s": 5.0, **options}
        self.watcher = apexd.FileWatcher(roots or [self.path], self.hear, **options)
        self.watcher.start()

    def hear(self, changes):
        self.at.append(time.monotonic())
        paths = [[os.path.relpath(p, self.path) for p in (c.source, c.path) if p] for c in changes]
        found = [(c.kind, *map(as_slashes, names)) for c, names in zip(changes, paths)]
        assert len(set(found)) == len(found)
        self.bursts.append(set(found))

    def file(self, *names):
        return os.path.join(self.path, *names)

    def write(self, name, data="x"):
        """Write a file in place."""
        write_plainly(self.file(*name.split("/")), data)

    def tells(self, *expected):
        """Wait until it has told of exactly these changes, in one burst."""
        eventually(lambda: self.bursts, why=f"it tells of {expected}")
        assert self.bursts == [set(expected)]
        self.bursts.clear()

    def tells_nothing(self):
        """See that the next thing it tells of is what this changes."""
        self.write("last", str(time.monotonic()))
        eventually(lambda: any(name == "last" for burst in self.bursts for _, name in burst))
        assert {name for burst in self.bursts for _, *names in burst for name in names} == {"last"}
        self.bursts.clear()

    def how(self):
        return [one["how"] for one in self.watcher.status()]


def as_slashes(path):
    return path.replace(os.sep, "/")


def write_plainly(path, data):
    """Write a file in place, making its folder."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        file.write(data)


@pytest.fixture
def watching(tmp_path, request, monkeypatch):
    """Give a maker of a Watching; a parameter says how it learns of changes."""
    made, options = [], {"poll": getattr(request, "param", "") == "polling"}
    monkeypatch.setattr(apexd, "WATCH_LOOK_S", 0.05)
    monkeypatch.setattr(apexd, "LOOK_S", 0.1)

    def make(path=tmp_path, **more):
        made.append(Watching(path, **{**options, **more}))
        return made[-1]

    yield make
    for each in made:
        each.watcher.stop()
    assert [thread.name for thread in threading.enumerate() if thread.name == "watch"] == []


@pytest.fixture
def nobody():
    """Give a folder, and be somebody who is not root."""
    folder = tempfile.mkdtemp(prefix="ax-", dir="/tmp")
    if IS_ROOT:
        os.chown(folder, 65534, 65534)
        os.seteuid(65534)
    yield folder
    if IS_ROOT:
        os.seteuid(0)
    shutil.rmtree(folder)


both = pytest.mark.parametrize("watching", ["told", "polling"], indirect=True)


class TestWatch:
    @both
    def test_what_is_created_modified_moved_and_deleted_is_told(self, watching, tmp_path):
        write_plainly(str(tmp_path / "old" / "f"), "1")
        watch = watching()
        watch.write("a/b/c/new", "x")
        watch.tells(("created", "a/b/c/new"))
        watch.write("old/f", "22")
        watch.tells(("modified", "old/f"))
        os.rename(watch.file("old", "f"), watch.file("a", "g"))
        watch.tells(("created", "a/g"), ("deleted", "old/f")) if IS_WINDOWS else watch.tells(
            ("moved", "old/f", "a/g")
        )
        shutil.rmtree(watch.file("a"))
        watch.tells(("deleted", "a/b/c/new"), ("deleted", "a/g"))

    @both
    @posix
    def test_a_moved_folder_is_followed_to_its_new_name(self, watching, tmp_path):
        for name in ("a/x/f", "a/g", "b/h"):
            write_plainly(str(tmp_path / name), name)
        watch = watching()
        os.rename(watch.file("a"), watch.file("b", "a"))
        watch.tells(("moved", "a/x/f", "b/a/x/f"), ("moved", "a/g", "b/a/g"))
        watch.write("b/a/x/f", "more than before")
        watch.tells(("modified", "b/a/x/f"))
        watch.write("a/x/f", "another")
        watch.tells(("created", "a/x/f"))
        os.rename(watch.file("b"), watch.path + "-outside")
        watch.tells(("deleted", "b/a/x/f"), ("deleted", "b/a/g"), ("deleted", "b/h"))
        write_plainly(watch.path + "-outside/a/x/f", "not ours any more")
        watch.tells_nothing()

    @both
    def test_a_burst_is_told_once_and_what_cancels_itself_out_not_at_all(self, watching, tmp_path):
        """L3"""
        write_plainly(str(tmp_path / "saved"), "old")
        write_plainly(str(tmp_path / "again" / "f"), "old")
        watch = watching(debounce_s=0.1)
        for n in range(20):
            watch.write(f"many/{n}")
        watch.write("new-name", "saved by replacing")
        os.replace(watch.file("new-name"), watch.file("saved"))
        watch.write("brief/f")
        shutil.rmtree(watch.file("brief"))
        shutil.rmtree(watch.file("again"))
        watch.write("again/f", "made anew")
        many = [("created", f"many/{n}") for n in range(20)]
        watch.tells(*many, ("modified", "saved"), ("modified", "again/f"))
        watch.write("again/f", "and this one is noticed as well")
        watch.tells(("modified", "again/f"))

    @both
    def test_only_the_events_and_endings_asked_for_are_told(self, watching, tmp_path):
        write_plainly(str(tmp_path / "c.py"), "")
        watch = watching(events=["create", "delete"], extensions=["py", ".tar.gz"])
        for name in ("a.py", "b.tar.gz", "b.gz", "py", "c.py"):
            watch.write(name, "text")
        watch.tells(("created", "a.py"), ("created", "b.tar.gz"))
        os.rename(watch.file("a.py"), watch.file("d.py"))
        watch.tells(("deleted", "a.py"), ("created", "d.py"))

    @both
    def test_what_is_ignored_is_neither_told_nor_looked_into(self, watching):
        watch = watching(ignore=["/out", "docs/**/*.html", "*.o", "deep/*/x", "?b", "[x]"])
        ignored = (
            ".git/HEAD", "a/.git/HEAD", "node_modules/m/f", "a/__pycache__/f", "f~", ".f.swp",
            "a/4913", "#f#", ".#f", "f.tmp", ".apex/f", "out/f", "docs/f.html", "docs/a/b/f.html",
            "a/b.o", "deep/1/x", "bb",
        )  # fmt: skip
        told = ("a/out/f", "docs/f", "x", "deep/x", "deep/1/2/x", "abb", "git/f", "a/f.html")
        for name in ignored + told:
            watch.write(name)
        watch.tells(*(("created", name) for name in told))
        assert watch.watcher.status()[0]["folders"] < 12

    @both
    def test_a_folder_that_is_missing_or_lost_is_waited_for(self, watching, tmp_path, caplog):
        """L5"""
        here, away = str(tmp_path / "here"), str(tmp_path / "x" / "away")
        write_plainly(os.path.join(here, "f"), "1")
        watch = watching(roots=[here, away])
        assert watch.how()[1] == "missing"
        write_plainly(os.path.join(away, "g"), "1")
        watch.tells(("created", "x/away/g"))
        shutil.rmtree(here)
        watch.tells(("deleted", "here/f"))
        began = time.monotonic()
        write_plainly(os.path.join(here, "f"), "1")
        watch.tells(("created", "here/f"))
        assert time.monotonic() - began < 2.0
        if not IS_WINDOWS:
            os.rename(tmp_path / "x", tmp_path / "y")  # above the root: nothing happens in it
            watch.tells(("deleted", "x/away/g"))
            write_plainly(os.path.join(away, "h"), "1")
            watch.tells(("created", "x/away/h"))
        assert "missing" not in watch.how()
        assert caplog.text.count("left out") == (2 if IS_WINDOWS else 3)

    @both
    @posix
    def test_a_root_that_is_a_link_is_where_it_points_to(self, watching, tmp_path):
        for n in (1, 2):
            write_plainly(str(tmp_path / f"{n}" / "f"), "x" * n)
        os.symlink("1", tmp_path / "now")
        watch = watching(roots=[str(tmp_path / "now")])
        os.symlink("2", tmp_path / "next")
        os.replace(tmp_path / "next", tmp_path / "now")
        watch.tells(("modified", "now/f"))
        watch.write("2/g")
        watch.tells(("created", "now/g"))

    @both
    def test_a_folder_that_is_made_anew_while_a_burst_has_to_wait_is_watched(self, watching, tmp_path):
        here, latest = str(tmp_path / "here"), []
        write_plainly(os.path.join(here, "f"), "1")
        hold = lambda *seen: latest.append(seen[-1]) or (0.03 if seen[-1] <= latest[0] else 0.0)
        watch = watching(roots=[here], hold=hold)
        shutil.rmtree(here)
        os.mkdir(here)
        eventually(lambda: latest)
        pause(0.1)
        watch.write("here/g")
        watch.tells(("deleted", "here/f"), ("created", "here/g"))

    @linux
    def test_a_folder_that_ends_up_in_the_one_that_took_its_place_is_told_from_it(self, watching, tmp_path):
        here = str(tmp_path / "here")
        write_plainly(os.path.join(here, "f"), "1")
        watch = watching(roots=[here])
        os.mkdir(os.path.join(here, "sub"))
        os.rename(here, here + "-away")
        os.makedirs(os.path.join(here, "sub"))
        os.rename(here + "-away", os.path.join(here, "sub", "old"))
        watch.tells(("moved", "here/f", "here/sub/old/f"))
        watch.write("here/last")
        watch.tells(("created", "here/last"))

    @both
    @posix
    def test_links_pipes_and_sockets_are_no_files(self, watching, tmp_path):
        """L4"""
        watch = watching()
        outside = write(str(tmp_path) + "-outside/f", "1")
        os.mkfifo(watch.file("pipe"))
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(watch.file("socket"))
        os.symlink(watch.path, watch.file("loop"))
        os.symlink("/dev/zero", watch.file("zero"))
        os.symlink(os.path.dirname(outside), watch.file("outside"))
        write(outside, "2")
        watch.tells_nothing()

    @linux
    def test_names_that_are_no_utf8_are_kept(self, watching):
        """L8"""
        watch = watching()
        name = b"\xff\n \xe2\x82\xac"
        write_plainly(os.fsencode(watch.path) + b"/\xfe/" + name, "x")
        watch.tells(("created", os.fsdecode(b"\xfe/" + name)))

    @both
    @posix
    def test_a_folder_that_cannot_be_read_is_left_out_and_said_once(self, watching, nobody, caplog):
        """L8"""
        watch = watching(nobody)
        watch.write("shut/f")
        watch.tells(("created", "shut/f"))
        os.chmod(watch.file("shut"), 0)
        watch.tells_nothing()
        watch.tells_nothing()
        assert caplog.text.count("left out") == (watch.how() == ["polling"])
        os.chmod(watch.file("shut"), 0o755)
        watch.write("shut/g")
        watch.tells(("created", "shut/g"))
        os.chmod(watch.path, 0)
        with pytest.raises(apexd.DaemonError, match="Permission denied"):
            apexd.FileWatcher([watch.path], print)
        table = {"w": {"command": "true", "paths": watch.path}}
        with pytest.raises(apexd.DaemonError, match="f.json: watch.w.paths = .*Permission denied"):
            apexd.check_watches(apexd.Config({"watch": table}), "/", "f.json")
        os.chmod(watch.path, 0o755)

    @linux
    def test_a_rewrite_that_leaves_time_and_size_alone_is_a_change(self, watching):
        watch = watching()
        watch.write("f", "a")
        watch.tells(("created", "f"))
        info = os.stat(watch.file("f"))
        with open(watch.file("f"), "r+") as file:
            file.write("b")
            file.flush()
            os.utime(file.fileno(), ns=(info.st_atime_ns, info.st_mtime_ns))
        watch.tells(("modified", "f"))
        os.chmod(watch.file("f"), 0o640)
        with open(watch.file("f"), "a"):
            pass
        watch.tells_nothing()

    def test_a_burst_that_does_not_end_is_told_all_the_same(self, watching):
        watch = watching(debounce_s=0.2, debounce_max_s=0.4)
        began = time.monotonic()
        for n in range(1000):
            watch.write("f", str(n))
            if watch.bursts:
                break
            threading.Event().wait(0.01)
        assert 0.3 < watch.at[0] - began < 5.0

    @linux
    def test_files_made_while_their_folder_is_new_are_found(self, watching):
        """L6"""
        watch, names = watching(debounce_s=0.01), set()
        for n in range(ROUNDS * 50):
            watch.write(f"{n}/{n}/f")
            names.add(("created", f"{n}/{n}/f"))
        eventually(lambda: set().union(*watch.bursts) >= names)
        assert {name for burst in watch.bursts for _, name in burst} == {name for _, name in names}

    @linux
    def test_notifications_that_were_dropped_are_made_up_for(self, watching):
        """L1"""
        watch = watching(debounce_s=0.3)
        with open("/proc/sys/fs/inotify/max_queued_events") as file:
            count = int(file.read())
        if count > 20000:
            pytest.skip("a long queue")
        tree = watch.watcher._trees[0]
        hear, tree._hear = tree._hear, lambda: None  # it has no time
        watch.write("sub/f")
        for n in range(count // 2):
            os.close(os.open(watch.file(f"f{n % 100}"), os.O_CREAT | os.O_WRONLY))
            os.unlink(watch.file(f"f{n % 100}"))
        watch.write("after")
        tree._hear = hear
        expected = {("created", "sub/f"), ("created", "after")}
        eventually(lambda: set().union(*watch.bursts) == expected)

    LIMITED = """
        import sys, time; sys.path.insert(0, sys.argv[1]); sys.dont_write_bytecode = True
        import apexd, os
        told, apexd.WATCH_LOOK_S = [], 0.1
        with open(sys.argv[3], "w") as file: file.write(sys.argv[4])
        watcher = apexd.FileWatcher([sys.argv[2]], told.append, debounce_s=0.05)
        watcher.start()
        for n in range(3):  # what is new takes room, too, and is no change itself
            os.mkdir(os.path.join(sys.argv[2], f"new{n}"))
        while watcher.status()[0]["how"] != "polling": time.sleep(0.01)
        with open(os.path.join(sys.argv[2], "new2", "f"), "w"): pass
        while not told: time.sleep(0.01)
        print([change.kind for change in told[0]])
        watcher.stop()
    """

    @linux
    @pytest.mark.parametrize(
        ("name", "room"),
        [("max_inotify_watches", 3), ("max_inotify_watches", 12), ("max_inotify_instances", 0)],
    )
    def test_without_room_for_notifications_it_looks(self, tmp_path, name, room):
        """L2"""
        unshare = shutil.which("unshare")
        words = [unshare or "", "-rn", "true"]
        if not unshare or subprocess.run(words, capture_output=True).returncode:
            pytest.skip("no user namespaces")
        for n in range(10):
            os.makedirs(tmp_path / f"d{n}")
        script = write(str(tmp_path) + "-limited.py", textwrap.dedent(self.LIMITED))
        words = [sys.executable, script, HERE, tmp_path, f"/proc/sys/user/{name}", str(room)]
        before = read(f"/proc/sys/user/{name}")  # the script's write is in a namespace of its own
        done = subprocess.run([unshare, "-r", *words], capture_output=True, text=True, timeout=30)
        assert done.stdout == "['created']\n", done
        assert done.stderr.count("now and then") == 1, done
        assert read(f"/proc/sys/user/{name}") == before

    @linux
    def test_an_idle_watch_costs_nothing(self, tmp_path):
        code = """
            import sys, time; sys.path.insert(0, sys.argv[1]); sys.dont_write_bytecode = True
            import apexd, resource
            watcher = apexd.FileWatcher([sys.argv[2]], print)
            watcher.start()
            time.sleep(0.3)
            before = resource.getrusage(resource.RUSAGE_SELF)
            time.sleep(0.6)
            after = resource.getrusage(resource.RUSAGE_SELF)
            print(after.ru_nvcsw - before.ru_nvcsw)
        """
        script = write(str(tmp_path) + "-idle.py", textwrap.dedent(code))
        done = subprocess.run(
            [sys.executable, script, HERE, str(tmp_path)], capture_output=True, text=True, timeout=30
        )
        assert int(done.stdout) <= 2, done

    @slow
    def test_a_polled_tree_of_ten_thousand_files_costs_little(self, watching, tmp_path):
        for n in range(10000):
            write_plainly(str(tmp_path / str(n % 100) / f"f{n}"), "")
        watch = watching(poll=True)
        watch.tells_nothing()
        threading.Event().wait(apexd.POLL_BUSY_S + 15)
        before = time.process_time()
        threading.Event().wait(60)
        assert (time.process_time() - before) / 60 < 0.005

    def test_a_checkout_is_one_burst_of_the_files_that_differ(self, watching, tmp_path):
        count = 3000 if SLOW else 300
        git = functools.partial(run_git, str(tmp_path))
        git("init", "-q", "-b", "one")
        for n in range(count):
            write_plainly(str(tmp_path / f"d{n % 20}" / f"f{n}"), str(n))
        git("add", "-A")
        git("commit", "-qm", "1")
        git("checkout", "-qb", "two")
        for n in range(0, count, 3):
            write_plainly(str(tmp_path / f"d{n % 20}" / f"f{n}"), "changed")
        for n in range(1, count, 10):
            os.unlink(tmp_path / f"d{n % 20}" / f"f{n}")
            write_plainly(str(tmp_path / "new" / str(n % 7) / f"f{n}"), f"new {n}")
        git("add", "-A")
        git("commit", "-qm", "2")
        watch = watching(debounce_s=0.5 if SLOW else 0.3, events=["create", "modify", "delete"])
        words = {"A": "created", "M": "modified", "D": "deleted"}
        for branch, other in (("one", "two"), ("two", "one")):
            lines = git("diff", "--name-status", "--no-renames", other, branch).split("\n")
            git("checkout", "-q", branch)
            watch.tells(*((words[line[0]], line[2:]) for line in lines if line))

    def test_a_callback_that_raises_does_not_end_the_watch(self, watching, caplog):
        watch = watching()
        hear, watch.watcher._on_change = watch.hear, lambda changes: 1 / 0
        watch.write("f")
        eventually(lambda: "ZeroDivisionError" in caplog.text)
        watch.watcher._on_change = hear
        eventually(lambda: watch.write("g") or watch.bursts)

    def test_a_callback_that_is_refused_is_tried_again_without_another_look(self, watching):
        watch = watching()
        hear, tree, tries = watch.hear, watch.watcher._trees[0], []

        def refuse(changes):
            tries.append(tree.notifier)
            if len(tries) < 3:
                raise apexd.DaemonError("QUEUE_FULL", "so many")
            hear(changes)

        watch.watcher._on_change = refuse
        watch.write("f")
        watch.tells(("created", "f"))
        assert len({*map(id, tries)}) == 1

    def test_a_path_that_is_no_folder_is_refused(self, tmp_path):
        path = write(str(tmp_path / "file"), "")
        with pytest.raises(apexd.DaemonError) as told:
            apexd.FileWatcher([path], print)
        assert told.value.code == "BAD_REQUEST" and path in told.value.message

    @both
    @posix
    def test_folders_made_and_removed_at_speed_end_in_the_truth(self, watching):
        watch, known, rng = watching(debounce_s=0.02), set(), random.Random(1)
        for n in range(ROUNDS * 150):
            name = "/".join(rng.choice("abc") for _ in range(rng.randint(1, 4)))
            path, act = watch.file(name), rng.random()
            with contextlib.suppress(OSError):
                if act < 0.5:
                    write_plainly(os.path.join(path, "f"), str(n))
                elif act < 0.75:
                    shutil.rmtree(path)
                else:
                    other = "/".join(rng.choice("abc") for _ in range(rng.randint(1, 4)))
                    os.rename(path, watch.file(other))
        watch.write("last")
        eventually(lambda: any(("created", "last") in burst for burst in watch.bursts))
        for burst in watch.bursts:
            for kind, *names in burst:
                known -= {names[0]} if kind in ("deleted", "moved") else set()
            known |= {names[-1] for kind, *names in burst if kind != "deleted"}
        found = {as_slashes(os.path.relpath(os.path.join(folder, name), watch.path))
                 for folder, _, names in os.walk(watch.path) for name in names}
        assert known == found
        watch.bursts.clear()
        for name in found - {"last"}:  # each folder is still watched
            watch.write(name, "to the end")
        eventually(lambda: set().union(*watch.bursts) == {("modified", n) for n in found - {"last"}})


class TestWatches:
    """[watch.NAME]: a burst of changes becomes a task."""

    # Appends what the task was told to the file `told` of the project.
    TELL = "import os, shutil; f = open('told', 'a'); " \
        "f.write(os.environ['APEX_EVENT'] + chr(10)); f.close(); " \
        "shutil.copy(os.environ['APEX_EVENT_FILE'], 'paths')"

    @staticmethod
    def watch(box, **options):
        """Configure the watch w of the folder src."""
        os.makedirs(os.path.join(box.path, "src"), exist_ok=True)
        options = {"paths": ["src"], "debounce_ms": 50, **options}
        if "command" not in options:
            options["command"] = [sys.executable, "-S", "-c", TestWatches.TELL]
        box.config({}, watch={"w": options})

    @staticmethod
    def change(box, name="f", data=""):
        write_plainly(os.path.join(box.path, "src", name), data or str(time.monotonic()))

    @staticmethod
    def tasks(box):
        return box.request({"type": "list"})["tasks"]

    def until_done(self, box, count):
        """Wait until so many tasks have succeeded; return what each was told."""

        def check():
            found = [task["state"] for task in self.tasks(box)]
            assert found == ["succeeded"] * count, found
            return True

        eventually(check, why=f"{count} tasks have succeeded")
        return [json.loads(line) for line in read(os.path.join(box.path, "told")).split("\n") if line]

    def test_a_task_is_told_what_has_changed(self, box):
        self.watch(box, group="g", priority=3)
        write(box.file("config.json"), read(box.file("config.json"))[:-1] + ', "group": {"g": {}}}')
        box.start()
        self.change(box, "a")
        self.change(box, "b/c")
        (event,) = self.until_done(box, 1)
        paths = [os.path.join(box.path, "src", *name.split("/")) for name in ("a", "b/c")]
        changes = [{"kind": "created", "path": path} for path in paths]
        assert (event["type"], event["source"]) == ("file.changed", "watch w")
        assert event["payload"] == {"watch": "w", "count": 2, "truncated": False, "changes": changes}
        assert read(os.path.join(box.path, "paths")).split("\n") == [*paths, ""]
        (task,) = self.tasks(box)
        assert (task["group"], task["priority"]) == ("g", 3)
        box.run("remove", task["id"])
        assert [name for name in os.listdir(box.file("logs")) if name.startswith("task")] == []

    @linux
    def test_names_that_are_hostile_and_bursts_that_are_large(self, box):
        self.watch(box, debounce_ms=200)
        box.start()
        names = [b"\xff", b"two\nlines", b"two\rlines", b"-rf", b'"quoted"', b"$(x)"]
        for name in names:
            self.change(box, os.fsdecode(name), "x")
        (event,) = self.until_done(box, 1)
        folder = os.path.join(os.fsencode(box.path), b"src", b"")
        assert {os.fsencode(c["path"]) for c in event["payload"]["changes"]} == {folder + n for n in names}
        with open(os.path.join(box.path, "paths"), "rb") as file:
            lines = file.read().split(b"\n")[:-1]
        as_json = {n: json.dumps(os.fsdecode(folder + n)).encode() for n in names if b"two" in n}
        assert set(lines) == {as_json.get(name, folder + name) for name in names}
        for n in range(1000):
            self.change(box, f"many/file-{n}", "x")
        event = self.until_done(box, 2)[1]
        assert event["payload"] == {"watch": "w", "count": 1000, "truncated": True, "changes": []}
        assert read(os.path.join(box.path, "paths")).count("many/file-") == 1000

    @pytest.mark.parametrize("overlap", ["queue", "skip"])
    def test_what_changes_while_its_task_runs_is_one_task_after_it_or_none(self, box, overlap):
        go = "import os, sys, time; f = os.path.join(os.getcwd(), 'go')\n" \
            "while not os.path.exists(f): time.sleep(0.01)\n"
        self.watch(box, overlap=overlap, command=[sys.executable, "-S", "-c", go + self.TELL])
        box.start()
        self.change(box, "first")
        eventually(lambda: [task["state"] for task in self.tasks(box)] == ["running"])
        for name in ("second", "third"):
            self.change(box, name)
            threading.Event().wait(0.15)  # a burst each
        assert len(self.tasks(box)) == 1
        write(os.path.join(box.path, "go"), "")
        told = self.until_done(box, 2 if overlap == "queue" else 1)
        names = [{os.path.basename(c["path"]) for c in one["payload"]["changes"]} for one in told]
        assert names == [{"first"}, {"second", "third"}][: len(told)]
        self.change(box, "fourth")
        self.until_done(box, len(told) + 1)

    @pytest.mark.parametrize("poll", [False, True])
    def test_a_task_that_changes_what_it_watches_is_no_loop_for_long(self, box, poll):
        """L7"""
        self.watch(box, command="echo x >> src/log", poll=poll)
        patch(box, WATCH_LOOK_S=0.06, LOOP_ROUNDS=2)
        box.start()
        self.change(box)
        eventually(lambda: "watch w: a loop" in box.log())
        line = next(line for line in box.log().split("\n") if "a loop" in line)
        assert os.path.join("src", "log") in line
        count = 2 + 1
        self.until_done(box, count)
        threading.Event().wait(0.6)
        assert len(self.tasks(box)) == count
        self.change(box)  # somebody else
        eventually(lambda: len(self.tasks(box)) > count)

    def test_what_the_daemon_writes_itself_is_not_watched(self, box):
        self.watch(box, paths=["."], command="true")
        shutil.move(box.state, os.path.join(box.path, "st[at]e"))
        box.state = os.path.join(box.path, "st[at]e")
        box.env["APEX_STATE_DIR"] = box.state
        box.start()
        threading.Event().wait(0.5)
        assert self.tasks(box) == []
        self.change(box)
        self.until_done(box, 1)

    def test_what_was_changed_before_a_stop_is_done_after_the_next_start(self, box):
        self.watch(box, debounce_ms=5000)
        box.start()
        self.change(box)
        threading.Event().wait(0.3)
        box.stop()
        assert [task["state"] for task in box.json("list")] == ["queued"]
        box.start()
        assert self.until_done(box, 1)[0]["payload"]["count"] == 1

    def test_what_was_changed_before_a_reload_is_done_as_it_says(self, box):
        self.watch(box, debounce_ms=5000, command="false", group="g")
        write(box.file("config.json"), read(box.file("config.json"))[:-1] + ', "group": {"g": {}}}')
        box.start()
        self.change(box)
        pause(0.3)
        self.watch(box, debounce_ms=5000)
        box.run("reload")
        assert self.until_done(box, 1)[0]["payload"]["count"] == 1

    def test_changes_wait_for_room_in_the_queue(self, box):
        self.watch(box, command="true")
        data = json.loads(read(box.file("config.json")))
        write(box.file("config.json"), json.dumps({**data, "retention": {"max_queue": 1}}))
        box.start()
        box.run("pause")
        box.add("true")
        self.change(box)
        eventually(lambda: "watching: 1 unfinished tasks are queued" in box.log())
        box.run("resume")
        self.until_done(box, 2)
        assert "Traceback" not in box.log()

    def test_reload_changes_watches_and_a_broken_file_nothing(self, box):
        self.watch(box)
        box.start()
        how = "inotify" if IS_LINUX else "polling"
        status = {"w": [{"path": os.path.join(box.path, "src"), "how": how, "folders": 1}]}
        assert box.json("status")["watches"] == status
        good = read(box.file("config.json"))
        self.watch(box, paths=["src", "later"], extensions=["py"])
        box.run("reload")
        assert [one["how"] for one in box.json("status")["watches"]["w"]] == [how, "missing"]
        self.change(box, "f.txt")
        self.change(box, "f.py")
        assert self.until_done(box, 1)[0]["payload"]["count"] == 1
        self.watch(box, paths=["apexd.py"])
        assert "watch.w.paths" in box.error("reload", rc=78)["message"]
        self.change(box, "g.py")
        self.until_done(box, 2)
        self.watch(box, enabled=False)
        box.run("reload")
        assert box.json("status")["watches"] == {}
        write(box.file("config.json"), good)
        box.run("reload")
        assert box.json("status")["watches"] == status

    def test_what_changes_during_a_reload_is_seen(self, box):
        self.watch(box, command='cat "$APEX_EVENT_FILE" >> all')
        box.start()
        made, is_over = [], threading.Event()

        def go_on():
            while not is_over.wait(0.001):
                self.change(box, f"f{len(made)}")
                made.append(f"f{len(made)}")

        writer = threading.Thread(target=go_on)
        writer.start()
        for n in range(4 * ROUNDS):
            self.watch(box, command='cat "$APEX_EVENT_FILE" >> all', debounce_ms=51 + n, debounce_max=1)
            box.run("reload")
        is_over.set()
        writer.join()
        path = os.path.join(box.path, "all")
        eventually(lambda: {os.path.basename(line) for line in read(path).split("\n")} >= set(made))

    def test_a_watch_that_cannot_be_started_now_is_started_later(self, queue, tmp_path, monkeypatch, caplog):
        start = threading.Thread.start

        def refuse(self):
            if self.name == "watch":
                raise RuntimeError("can't start new thread")
            start(self)

        table = {"w": {"command": "true", "paths": "."}}
        queue.store.config = apexd.Config({"watch": table})
        watches = apexd.Watches(queue.store, lambda: None)
        with monkeypatch.context() as lack:
            lack.setattr(threading.Thread, "start", refuse)
            watches.start()
        assert watches.status() == {"watches": {}}
        assert caplog.text.count("watch w does not work, for now: can't start new thread") == 1
        watches.start()
        assert [one["how"] for one in watches.status()["watches"]["w"]] != []
        watches.stop()

    @pytest.mark.parametrize(("options", "key"), [
        ({"paths": []}, "watch.w.paths"), ({"paths": "file"}, "watch.w.paths"),
        ({"paths": ["src", "file/x"]}, "watch.w.paths"), ({"paths": 3}, "watch.w.paths"),
        ({"events": ["write"]}, "watch.w.events"), ({"events": "modify"}, "watch.w.events"),
        ({"debounce_ms": -1}, "watch.w.debounce_ms"), ({"debounce": 3}, "watch.w.debounce"),
        ({"overlap": "both"}, "watch.w.overlap"), ({"command": None}, "watch.w.command"),
        ({"group": "none"}, "watch.w.group"), ({"ignore": [3]}, "watch.w.ignore"),
    ])  # fmt: skip
    def test_bad_input_names_the_file_the_key_and_the_reason(self, tmp_path, options, key):
        write(str(tmp_path / "file"), "")
        table = {"command": "true", "paths": ["src"], **options}
        table = {name: value for name, value in table.items() if value is not None}
        path = write(str(tmp_path / "f.json"), json.dumps({"watch": {"w": table}}))
        with pytest.raises(apexd.DaemonError) as told:
            apexd.check_watches(apexd.load_config(path), str(tmp_path), path)
        assert told.value.code == "CONFIG_INVALID" and told.value.hint
        assert told.value.message.startswith(f"{path}: {key}"), told.value

    def test_a_daemon_does_not_start_with_a_watch_of_a_file(self, box):
        self.watch(box, paths=["src", "apexd.py"])
        error = box.error("start", rc=78)
        assert error["message"].startswith(f"{box.file('config.json')}: watch.w.paths = "), error
        assert "apexd.py: Not a directory" in error["message"] and error["hint"]

    @linux
    def test_a_task_begins_soon_after_the_last_change(self, box):
        code = "import time; open('began', 'a').write(f'{time.time()} ')"
        self.watch(box, command=[sys.executable, "-I", "-S", "-c", code], debounce_ms=100)
        box.start()
        late = []
        for n in range(1, 3):
            eventually(lambda: all(task["state"] == "succeeded" for task in self.tasks(box)))
            threading.Event().wait(0.1)
            changed = time.time()
            self.change(box)
            eventually(lambda n=n: read(os.path.join(box.path, "began")).count(" ") == n)
            late.append(float(read(os.path.join(box.path, "began")).split()[-1]) - changed - 0.1)
        assert 0 < min(late) < 0.1, late  # with Python's own start, on a busy machine


def run_git(folder, *words):
    """Run git in a folder; return what it prints."""
    who = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "core.autocrlf=false"]
    words = ["git", "-C", folder, *who, *words]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


# ============================================================================
# 16. CONTROL - frames, verbs, server, Client
# ============================================================================


class Later(threading.Thread):
    """Runs a command in the background: `result()` gives it when it has ended."""

    def __init__(self, box, *args, **options):
        super().__init__()
        self._call = lambda: box.run(*args, rc=None, **options)
        self.start()

    def run(self):
        began = time.monotonic()
        try:
            self._done = self._call()
        except BaseException as error:
            self._done = error
        self.seconds = time.monotonic() - began

    def result(self):
        """Return the finished command; its attribute `seconds` says how long it took."""
        self.join()
        if isinstance(self._done, BaseException):
            raise self._done
        self._done.seconds = self.seconds
        return self._done


def frame(data):
    """Return the bytes of a frame."""
    data = data if isinstance(data, bytes) else json.dumps(data).encode()
    return struct.pack(">I", len(data)) + data


def as_nobody(*words, **options):
    """Run a command as a user who owns nothing; python is the system's own."""
    python = "/usr/bin/python3"  # a private one may be out of his reach
    words = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", python, *words]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, **options)


other_user = pytest.mark.skipif(
    not IS_LINUX
    or os.geteuid() != 0
    or shutil.which("setpriv") is None
    or not os.path.exists("/usr/bin/python3"),
    reason="needs root, setpriv and /usr/bin/python3",
)

ADDING_LOOP = """
import os, subprocess, sys, threading
import apexd
me, how = sys.argv[1:]
number = 0
while not os.path.exists("enough"):
    number += 1
    threading.Event().wait(0.02)
    label = token = f"{me}.{number}"
    while True:
        if how == "cli":
            words = [sys.executable, "apexd.py", "add", "-p", "--label", label, "--token", token]
            done = subprocess.run([*words, "--", "true"], capture_output=True, text=True)
            status, answer = done.returncode, done.stdout.strip() or done.stderr
        else:
            client = apexd.Client(".")
            try:
                status, answer = 0, client.add(["true"], label=label, token=token)
            except apexd.DaemonError as error:
                status, answer = error.exit_status, error.message
            client.close()
        if status != 75:
            break
    print(status, label, answer, flush=True)
"""


@posix
class TestControl:
    @pytest.fixture(scope="class", name="patience", autouse=True)
    @classmethod
    def patience(cls):
        """Let what must wait out its limits do so while the other tests run."""
        brief = project(daemon={"graceful_timeout": 1, "stop_timeout": 1})
        with project() as hung, brief as restarted, project() as held, project() as dripped:
            pids = {box: box.start() for box in (hung, restarted)}
            dripped.start()
            waits = {"task": enqueue(restarted, "sleep 8; exit 5")[0]}
            waits["command"] = eventually(lambda: restarted.look(waits["task"])["pid"])
            for pid in pids.values():
                os.kill(pid, signal.SIGSTOP)
            held.add("true")
            lock = open(held.file("daemon.lock"), "w")
            assert apexd.Platform.lock(lock.fileno())
            waits.update(hung=hung, restarted=restarted, held=held)
            waits["add"] = Later(hung, "add", "-p", "--token", "T1", "--", "true")
            waits["list"] = Later(hung, "list")
            waits["wait"] = Later(hung, "wait", "1")
            waits["status"] = Later(hung, "status")
            waits["start"] = Later(hung, "start")
            waits["restart"] = Later(restarted, "restart")
            waits["held start"] = Later(held, "start")
            waits["held add"] = Later(held, "add", "--", "true")
            waits["held list"] = Later(held, "list")
            waits["drip"] = threading.Thread(target=cls.drip, args=(dripped, waits))
            waits["drip"].start()
            yield waits
            for value in list(waits.values()):
                if isinstance(value, threading.Thread):
                    value.join()
            lock.close()
            with contextlib.suppress(OSError):
                os.kill(pids[hung], signal.SIGCONT)

    @pytest.fixture(scope="class", name="server")
    @classmethod
    def server(cls):
        """Give a project with a daemon, for the tests that do not end it."""
        with project() as box:
            box.start()
            yield box

    @staticmethod
    def drip(box, waits):
        """Send one byte a second until the daemon hangs up."""
        began = time.monotonic()
        with box.connect() as connection:
            data = frame({"type": "ping"})
            with contextlib.suppress(OSError):
                for at in range(len(data)):
                    waits["drip left"] = len(data) - at
                    connection.sendall(data[at : at + 1])
                    connection.settimeout(1.0)
                    try:
                        waits["drip answer"] = connection.recv(4096)
                        break
                    except socket.timeout:
                        pass
        waits["drip seconds"] = time.monotonic() - began

    def test_every_verb_answers_on_one_connection(self, box):
        box.start()
        with box.connect() as connection:

            def ask(verb, **fields):
                connection.sendall(frame({"type": verb, **fields}))
                answer = read_frame(connection)
                assert answer.pop("type") in ("ok", verb, "pong"), answer
                return answer

            pong = ask("ping")
            assert pong["version"] == apexd.__version__ and pong["uptime_secs"] >= 0
            status = ask("status")
            assert status["pid"] == box.pid()
            assert {"version", "uptime_secs", "process_count", "running_instances"} <= set(status)
            assert ask("pause")["paused"] == ["*"]
            first, second = ask("add", commands=["exit 3", ["true"]], cwd=box.path)["ids"]
            assert ask("why", id=first)["reasons"] == ["everything is paused"]
            assert ask("queue")["counts"] == {"queued": {"default": 2}}
            assert [task["id"] for task in ask("list", state="queued")["tasks"]] == [first, second]
            assert ask("cancel", ids=[second]) == {"done": [second], "not_done": []}
            assert ask("retry", ids=[second, first]) == {"done": [second], "not_done": [first]}
            assert ask("remove", ids=[second])["done"] == [second]
            assert ask("resume")["paused"] == []
            answer = ask("wait", ids=[first], within=10)
            assert (answer["pending"], answer["status"]) == (0, 3)
            assert ask("get", id=first)["task"]["exit_code"] == 3
            assert ask("get", id=first)["history"][0]["outcome"] == "failed"
            assert ask("logs", id=first)["data"] == ""
            (long,) = ask("add", commands=["sleep 60"], cwd=box.path)["ids"]
            eventually(lambda: ask("get", id=long)["task"]["state"] == "running")
            assert ask("report", id=long, progress=5) == {"over_budget": False}
            assert ask("reload") == {"plan": []}
            ask("cancel", ids=[long])
            connection.sendall(frame({"type": "no-such-verb"}))
            assert read_frame(connection)["code"] == "unknown_command"
            ask("shutdown")
        eventually(lambda: not os.path.exists(box.file("daemon.pid")), why="shut down")

    def test_a_broken_frame_gets_one_error_and_the_daemon_lives(self, server):
        box = server
        deep = b'{"type": "ping", "x": ' + b"[" * 100000 + b"]" * 100000 + b"}"
        broken = {
            "oversized": struct.pack(">I", (16 << 20) + 1) + b"x",
            "empty": struct.pack(">I", 0),
            "a huge length": b"\xff\xff\xff\xff",
            "garbage": b"GET / HTTP/1.1\r\nHost: evil\r\n\r\n",
            "no JSON": frame(b"hello"),
            "deep": frame(deep),
            "digits": frame(b'{"type": "get", "id": ' + b"1" * 1000000 + b"}"),
            "NaN": frame(b'{"type": "ping", "x": NaN}'),
            "infinity": frame(b'{"type": "ping", "x": [-Infinity]}'),
            "a list": frame([{"type": "ping"}]),
            "no type": frame({"verb": "ping"}),
            "a type that is no string": frame({"type": ["ping"]}),
            "bad UTF-8": frame(b'{"type": "pi\xffng"}'),
            "cut in a string": frame(b'{"type": "ping'),
        }
        for name, data in broken.items():
            with box.connect() as connection:
                connection.sendall(data)
                answer = read_frame(connection)
                assert (answer["type"], answer["code"]) == ("error", "bad_request"), name
                with contextlib.suppress(ConnectionResetError):  # of what it did not read
                    assert connection.recv(1) == b"", f"{name}: hung up"
        for half in (b"\0", b"\0\0\0\x20", b"\0\0\0\x20{"):
            with box.connect() as connection:
                connection.sendall(half)
                connection.shutdown(socket.SHUT_WR)
                assert read_frame(connection) is None
        assert box.request({"type": "ping"})["type"] == "pong"
        assert "Traceback" not in box.log()

    def test_a_wrong_value_is_a_bad_request_and_no_traceback(self, server):
        box = server
        (task_id,) = enqueue(box, "sleep 60")
        lone = "\ud800"
        wrong = (
            ("add", {}),
            ("add", {"commands": "true"}),
            ("add", {"commands": [5]}),
            ("add", {"commands": [[]]}),
            ("add", {"commands": [["a\0b"]]}),
            ("add", {"commands": [[lone]]}),
            ("add", {"commands": [{"command": "true", "priority": 10**30}]}),
            ("add", {"commands": [{"command": "true", "delay": -1}]}),
            ("add", {"commands": [{"command": "true", "colour": "red"}]}),
            ("add", {"commands": ["true"], "options": {"retries": True}}),
            ("add", {"commands": ["true"], "options": {"label": lone}}),
            ("add", {"commands": ["true"], "options": {"key": "a\nb"}}),
            ("add", {"commands": ["true"], "env": {"A": 1}}),
            ("add", {"commands": ["true"], "cwd": ["a", "b"]}),
            ("add", {"commands": ["true"], "cwd": "a\0b"}),
            ("add", {"commands": ["true"], "token": {}}),
            ("add", {"commands": ["true"], "umask": 512}),
            ("list", {"state": "odd"}),
            ("list", {"limit": 0}),
            ("list", {"before": "x"}),
            ("get", {"id": -1}),
            ("get", {"id": 2**64}),
            ("wait", {"ids": ["x"]}),
            ("wait", {"ids": [task_id], "within": -1}),
            ("cancel", {"ids": "9-1"}),
            ("cancel", {"ids": [True]}),
            ("logs", {"id": task_id, "offset": "x"}),
            ("report", {"id": task_id, "progress": "x"}),
            ("report", {"id": task_id, "tokens": -1}),
            ("report", {"id": task_id, "note": lone}),
            ("report", {"id": task_id, "token": 2**70}),
            ("report", {"id": task_id, "token": {"a": 1}}),
            ("pause", {"group": 5}),
        )
        got = [(box.request({"type": verb, **fields}), verb, fields) for verb, fields in wrong]
        others = [row for row in got if row[0].get("code") != "bad_request"]
        assert others == []
        newest = box.request({"type": "list", "limit": 1})["tasks"]
        assert [task["id"] for task in newest] == [task_id], "nothing was added"
        assert "Traceback" not in box.log()
        cancel_all(box)

    def test_an_empty_batch_adds_nothing_and_is_no_error(self, box, server):
        assert box.run("add", "-p", "--batch").stdout == ""
        assert ask(server, "add", "-p", "--batch") == ""
        assert server.request({"type": "add", "commands": []})["ids"] == []

    def test_two_hundred_connections_at_once_are_all_served(self, server):
        box = server
        pongs, gate = [], threading.Barrier(200)

        def ask():
            gate.wait()
            connection = eventually(lambda: box.connect(60))
            with connection:
                connection.sendall(frame({"type": "ping"}))
                pongs.append(read_frame(connection)["type"])

        threads = [threading.Thread(target=ask) for _ in range(200)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert pongs == ["pong"] * 200

    @linux
    def test_idle_connections_make_place_for_others(self, server):
        """P6: the longest idle ones go, those that were just served stay; none costs anything."""
        box = server
        daemon = box.pid()
        used = lambda: sum(map(int, read(f"/proc/{daemon}/stat").rpartition(")")[2].split()[11:13]))
        with contextlib.ExitStack() as stack:
            idle = [stack.enter_context(box.connect()) for _ in range(64)]
            idle[-1].sendall(frame({"type": "ping"}))
            assert read_frame(idle[-1])["type"] == "pong"
            before = used()
            pause(0.6)
            assert used() - before <= 12, "hundredths of a second"
            for _ in range(10):
                one = stack.enter_context(box.connect())
                one.sendall(frame({"type": "ping"}))
                assert read_frame(one)["type"] == "pong"
            assert box.request({"type": "ping"})["type"] == "pong"
            idle[-1].sendall(frame({"type": "ping"}))
            assert read_frame(idle[-1])["type"] == "pong"

    def test_a_hangup_ends_a_wait(self, server):
        """P6: nobody waits for those who have gone; who stays gets the answer."""
        box = server
        (task_id,) = enqueue(box, "true", delay=3600)
        count = lambda: len(os.listdir(f"/proc/{box.pid()}/task"))
        before = count()
        with box.connect() as connection, contextlib.ExitStack() as stack:
            for one in [connection, *(stack.enter_context(box.connect()) for _ in range(20))]:
                one.sendall(frame({"type": "wait", "ids": [task_id], "within": 600}))
            eventually(lambda: count() > before + 15)
            stack.close()
            eventually(lambda: count() <= before + 2, why="the waits have ended")
            ask(box, "cancel", task_id)
            assert read_frame(connection)["pending"] == 0

    def test_frames_of_many_small_things_are_refused_before_they_are_built(self, server):
        """P7: values, digits; a batch of 100,000 tasks passes."""
        box = server
        for unit in ('{"a":[]}', "[]", "1.5", "9" * 4000):
            many = ",".join([unit] * (8_000_000 // (len(unit) + 1)))
            text = '{"type": "ping", "x": [' + many + "]}"
            with box.connect() as connection:
                connection.sendall(struct.pack(">I", len(text)) + text.encode())
                assert read_frame(connection)["code"] == "bad_request"
        memory = read(f"/proc/{box.pid()}/status").partition("VmHWM:")[2].split()[0]
        assert int(memory) < 150_000, "KiB"
        commands = [["sh", "-c", "true"]] * 100_000
        added = box.request({"type": "add", "commands": commands, "options": {"delay": 3600}})
        assert len(added["ids"]) == 100_000
        whole = f"{added['ids'][0]}-{added['ids'][-1]}"
        answer = box.request({"type": "wait", "ids": [whole]})
        assert (answer["total"], answer["pending"]) == (100_000, 100_000)
        assert len(ask_json(box, "rm", whole)["done"]) == 100_000

    @posix
    def test_who_meets_a_closed_store_is_hung_up_on(self, tmp_path):
        """L11: its token tries again, elsewhere."""
        store = apexd.TaskStore(str(tmp_path / ".apex" / "apex.db"))
        server = apexd.ControlServer(store.folder, apexd.TaskVerbs(store).table)
        server.stop()
        store.close()
        for verb in ("list", "add"):
            ours, theirs = socket.socketpair()
            with ours, theirs:
                ours.settimeout(10)
                fields = {"commands": ["true"]} if verb == "add" else {}
                ours.sendall(frame({"type": verb, **fields}))
                with pytest.raises(ConnectionAbortedError):
                    server._serve(theirs, {})

    def test_ranges_of_unknown_ids_cost_nothing(self, server):
        """P7: ranges are ranges until they are used."""
        box = server
        ranges = [f"{n}000000-{n}999999" for n in range(1, 11)] + ["1-999999999999999"]
        for verb in ("cancel", "retry", "remove", "wait", "list"):
            answer = box.request({"type": verb, "ids": ranges})
            assert answer.get("code") == "unknown_task" or verb == "list"
        memory = read(f"/proc/{box.pid()}/status").partition("VmHWM:")[2].split()[0]
        assert int(memory) < 150_000, "KiB"
        box.run("cancel", *ranges, rc=2, timeout=5)
        options = {"after": ranges}
        answer = box.request({"type": "add", "commands": ["true"], "options": options})
        assert answer["code"] == "bad_request"

    def test_announced_memory_is_limited_and_comes_back(self, server):
        box = server
        with contextlib.ExitStack() as stack:
            greedy = [stack.enter_context(box.connect()) for _ in range(8)]
            for connection in greedy:
                connection.sendall(struct.pack(">I", 16 << 20) + b"{")
            answered = lambda: select.select(greedy, [], [], 0)[0]
            eventually(lambda: len(answered()) >= 4)
            pause(0.1)
            assert [read_frame(each)["code"] for each in answered()] == ["busy"] * 4
            assert box.request({"type": "ping"})["type"] == "pong"
        large = {"type": "list", "group": "x" * (1 << 20)}
        eventually(lambda: box.request(large)["code"] == "bad_request", why="not busy any more")

    def test_clients_that_leave_before_the_answer_do_no_harm(self, server):
        box = server
        (task_id,) = enqueue(box, "sleep 0.5")
        for message in ({"type": "wait", "ids": [task_id], "within": 1}, {"type": "list"}) * 10:
            with box.connect() as connection:
                connection.sendall(frame(message))
        settle(box, [task_id])
        assert box.request({"type": "ping"})["type"] == "pong"
        assert "Traceback" not in box.log()

    def test_a_removed_socket_is_bound_again(self, server):
        box = server
        os.unlink(box.file("control.sock"))
        assert int(ask(box, "add", "-p", "--", "true")) > 0
        assert stat.S_IMODE(os.stat(box.file("control.sock")).st_mode) & 0o077 == 0

    def test_a_socket_that_is_removed_or_replaced_costs_no_descriptor(self, server):
        """L9, L9b"""
        box = server
        pid, path = box.pid(), box.file("control.sock")
        box.request({"type": "ping"})
        used = [os.listdir(f"/proc/{pid}/{what}") for what in ("fd", "task")] if IS_LINUX else []
        for number in range(10):
            os.unlink(path)
            if number % 2:
                write(path, "no socket")
            eventually(lambda: stat.S_ISSOCK(os.lstat(path).st_mode) and box.request({"type": "ping"}))
        if IS_LINUX:
            eventually(lambda: all(
                len(os.listdir(f"/proc/{pid}/{what}")) <= len(former) + 3
                for what, former in zip(("fd", "task"), used)
            ), why="the old listeners are closed")

    @linux
    @root
    def test_a_client_tells_nothing_to_another_users_daemon(self, box):
        """S2"""
        box.add("true")
        place = os.path.join(box.root, "theirs")
        os.chmod(box.root, 0o711)
        os.mkdir(place)
        os.chown(place, 65534, 65534)
        code = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen()\n"
        code += "print(1, flush=True)\nwhile True: print(s.accept()[0].recv(9999), flush=True)"
        words = ["setpriv", "--reuid=65534", "--clear-groups", "/usr/bin/python3", "-c", code, place + "/s"]
        with subprocess.Popen(words, stdout=subprocess.PIPE) as fake:
            assert fake.stdout.readline() == b"1\n"
            info = os.stat(box.state)
            for owner in (0, 65534):
                where = {"socket": place + "/s", "folder": [info.st_dev, info.st_ino]}
                os.chown(write(box.file("endpoint"), json.dumps(where)), owner, owner)
                for words in (["add", "--env", "S=hunter2", "--", "true"], ["status"]):
                    status = box.run(*words, rc=None).returncode
                    assert status == (77 if words[0] == "add" else 4), (owner, words)
            fake.kill()
            assert b"hunter2" not in fake.stdout.read()
        os.unlink(box.file("endpoint"))

    @pytest.mark.parametrize("depth", [0, 2])
    def test_a_copied_project_never_talks_to_the_original(self, box, depth):
        """T10: also when the path is too long for a socket."""
        deep = os.path.join(box.path, *["d" * 60] * depth)
        os.makedirs(deep, exist_ok=True)
        where, copy = ("--project", deep), ("--project", os.path.join(box.root, "copy"))
        box.run(*where, "start")
        shutil.copytree(deep, copy[1], ignore=shutil.ignore_patterns("*.sock"))
        box.run(*copy, "add", "--", "true")
        assert json.loads(box.run(*where, "-j", "list").stdout) == []
        assert box.run(*copy, "status", rc=None).returncode in (1, 3)
        assert box.run(*copy, "kill").stdout == "not running\n"
        assert box.run(*where, "status").returncode == 0
        with open(os.path.join(deep, ".apex", "endpoint")) as file:
            path = json.load(file)["socket"]
        assert path == "control.sock" or depth
        box.run(*where, "stop")

    def test_a_path_too_long_for_a_socket_works_all_the_same(self, box):
        deep = os.path.join(box.path, "d" * 100, "e" * 100)
        os.makedirs(deep)
        temporary = os.path.join(box.root, "t")
        os.mkdir(temporary)
        where, env = ("--project", deep), {"TMPDIR": temporary}
        box.run(*where, "start", env=env)
        done = box.run(*where, "add", "--wait", "--", "sh", "-c", "pwd; exit 3", rc=3)
        assert done.stdout == box.path + "\n"
        box.run(*where, "stop")
        assert os.listdir(temporary) == []

    def test_the_same_token_gives_the_same_ids(self, box):
        words = ("add", "-p", "--token", "A", "--", "true")
        one = [int(ask(box, *words)) for _ in range(2)]
        box.start()
        one.append(int(ask(box, *words)))
        many = [enqueue(box, "true", "true")]
        token = {"type": "add", "commands": ["true", "true"], "token": "B"}
        many = [box.request(token)["ids"] for _ in range(2)]
        box.kill9()
        box.start()
        many.append(box.request(token)["ids"])
        assert one == [1, 1, 1]
        assert many == [many[0]] * 3 and len(set(many[0])) == 2
        assert len(box.request({"type": "list"})["tasks"]) == 5

    def test_adds_from_eight_processes_neither_vanish_nor_double_while_daemons_die(self, box):
        box.run("pause")
        path = write(os.path.join(box.path, "adding.py"), ADDING_LOOP)
        files = [open(os.path.join(box.path, f"out{n}"), "wb") for n in range(8)]
        for number, file in enumerate(files):
            how = "cli" if number < 1 else "api"
            words = [sys.executable, path, str(number), how]
            child = subprocess.Popen(
                words, cwd=box.path, env=box.env, stdout=file, stderr=subprocess.STDOUT
            )
            box.children.append(child)
        for _ in range(20 if SLOW else 4):
            box.start()
            pause(random.uniform(0.0, 0.2))
            box.kill9()
            pause(random.uniform(0.0, 0.1))
        box.start()
        eventually(lambda: all(read(file.name) for file in files), 60, "each has added something")
        write(os.path.join(box.path, "enough"), "")
        for child, file in zip(box.children, files):
            child.wait(60)
            file.close()
        lines = [read(file.name).splitlines() for file in files]
        told = [line.split(" ", 2) for line in sum(lines, [])]
        assert [line for line in told if line[0] != "0"] == []
        queued = [(task["label"], str(task["id"])) for task in box.json("list")]
        assert len(queued) == len({label for label, _ in queued})
        assert sorted((label, answer) for _, label, answer in told) == sorted(queued)

    def test_the_client_has_a_method_for_each_verb_with_and_without_a_daemon(self, box):
        for live in (False, True):
            if live:
                box.start()
            client = apexd.Client(box.path)
            client.pause()
            first = client.add(["sh", "-c", "exit 4"], label="x", priority=3, cwd=box.path)
            second, third = client.add_all(["true", {"command": "true", "after": [first]}])
            assert client.get(first)["task"]["priority"] == 3
            assert [t["id"] for t in client.list(limit=2)] == [second, third]
            assert client.is_live == live
            assert client.why(third)["reasons"][0] == f"waits for task {first}, which is queued"
            assert client.cancel(second)["done"] == [second]
            assert client.retry(second)["done"] == [second]
            assert client.remove(second)["done"] == [second]
            with pytest.raises(apexd.DaemonError) as caught:
                client.get(second)
            assert (caught.value.code, caught.value.exit_status) == ("UNKNOWN_TASK", 2)
            with pytest.raises(apexd.DaemonError) as caught:
                client.report(first, progress=1)
            assert caught.value.code == "ILLEGAL_STATE"
            assert client.queue()["paused"] == ["*"]
            assert client.resume() == {"paused": []}
            if live:
                assert client.wait([first, third], timeout=60) == 4
                assert client.get(third)["task"]["state"] == "skipped"
                assert b"".join(client.follow(first)) == b""
            else:
                with pytest.raises(apexd.DaemonError) as caught:
                    client.wait([first])
                assert caught.value.code == "NOT_RUNNING"
            client.close()

    @other_user
    def test_another_user_is_refused(self, box):
        box.start()
        for folder in (box.root, box.path):
            os.chmod(folder, 0o755)
        program = os.path.join(box.path, "apexd.py")
        os.chmod(program, 0o644)
        env = {**box.env, "HOME": "/"}
        for words in ("list", "add -- true", "stop", "kill", "start", "cancel 1", "status"):
            done = as_nobody("-B", program, *words.split(), cwd=box.path, env=env)
            assert done.returncode == 77, (words, done)
            assert "Traceback" not in done.stderr and done.stdout == ""
        os.chmod(box.state, 0o711)
        os.chmod(box.file("control.sock"), 0o666)
        text = (
            "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); "
            "print(s.recv(4096)[4:].decode())"  # no request: it hangs up without reading one
        )
        answer = json.loads(as_nobody("-c", text, box.file("control.sock"), env=env).stdout)
        assert (answer["type"], answer["code"]) == ("error", "permission_denied")
        assert box.json("status")["running"] and box.json("list") == []

    def test_one_byte_a_second_is_hung_up_on_after_ten(self, patience):
        patience["drip"].join()
        assert 9 <= patience["drip seconds"] and patience["drip left"] > 1
        assert patience.get("drip answer", b"")[:4] == b"" or b"error" in patience["drip answer"]

    def test_a_hung_daemon_is_reported_and_an_unconfirmed_add_cannot_double(self, patience):
        hung = patience["hung"]
        add = patience["add"].result()
        assert (add.returncode, add.stdout) == (75, "")
        assert "--token T1" in add.stderr and 8 < add.seconds < 40
        assert [patience[name].result().returncode for name in ("list", "wait")] == [69, 69]
        assert patience["list"].result().seconds < 30
        assert patience["status"].result().returncode == 4
        start = patience["start"].result()
        assert (start.returncode, start.seconds < 40) == (69, True)
        os.kill(hung.pid(), signal.SIGCONT)
        repeated = [hung.run("add", "-p", "--token", "T1", "--", "true").stdout for _ in range(2)]
        assert repeated == ["1\n", "1\n"]
        assert [task["id"] for task in hung.json("list")] == [1]

    @linux
    def test_restart_replaces_a_hung_daemon_and_costs_no_task(self, patience):
        done, box = patience["restart"].result(), patience["restarted"]
        assert done.returncode == 0, done
        task = box.look(patience["task"])
        assert (task["state"], task["attempts"]) in (("running", 1), ("failed", 1))
        assert box.until(patience["task"])["exit_code"] == 5

    def test_a_lock_held_by_another_program_is_said_so(self, patience):
        for name in ("held start", "held add", "held list"):
            done = patience[name].result()
            assert (done.returncode, done.stdout) == (75, ""), name
            assert done.seconds < 40
        assert "held by" in patience["held list"].result().stderr


class Stranger:
    """A program that knows the table of verbs and nothing of apexd."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(20)
        self.socket.connect(path)
        self.file = self.socket.makefile("rb")

    def send(self, verb, **fields):
        data = json.dumps({"type": verb, **fields}).encode()
        self.socket.sendall(struct.pack(">I", len(data)) + data)

    def receive(self):
        (length,) = struct.unpack(">I", self.file.read(4))
        return json.loads(self.file.read(length))

    def close(self):
        self.file.close()
        self.socket.close()

    def ask(self, verb, **fields):
        self.send(verb, **fields)
        return self.receive()


SLEEP = {"command": "exec sleep 1000", "stop_timeout": 1, "backoff": 0.1, "backoff_max": 0.2}
# What each answer holds, by the table: its fields by their type.
ERROR = {str: "type code message hint"}
COUNTED = "memory_bytes uptime_secs restart_count"
PROCESS = {str: "name status", int: "instances running " + COUNTED, float: "cpu_percent"}
DETAILS = {str: "name id command cwd", int: "instances", list: "args instance_details"}
INSTANCE = {str: "state command", int: "index pid " + COUNTED, float: "cpu_percent"}
LINE = {str: "timestamp process_name stream content", int: "instance"}


def has_form(form, answer):
    """Check that an answer has these fields, no others, each of its type or null."""
    types = {name: kind for kind, names in form.items() for name in names.split()}
    odd = {k: v for k, v in answer.items() if v is not None and type(v) is not types.get(k)}
    assert not odd and answer.keys() == types.keys(), (form, answer)
    return answer


def running(box, count=1, name="web"):
    """Wait until so many instances run, and no others; return their PIDs by index."""

    def look():
        found = instances(box, name)
        assert [one["state"] for one in found] == ["running"] * count, found
        words = [read(f"/proc/{one['pid']}/cmdline") for one in found]
        assert "" not in words and "exec 3>&2" not in str(words), "not the shell around it"
        return [one["pid"] for one in found]

    return eventually(look, why=f"{count} of {name} run")


def do(box, verb, timeout=60, **fields):
    """Make one request; it must succeed."""
    answer = box.request({"type": verb, **fields}, timeout)
    assert answer["type"] != "error", answer
    return answer


def status_of(box, field):
    """Return a number that the kernel tells of the daemon: "Threads", "VmRSS" (kB)."""
    return int(re.search(rf"{field}:\s+(\d+)", read(f"/proc/{box.pid()}/status"))[1])


def commands_of(box, needle):
    """Return the PIDs of a project's processes whose command begins so."""
    return {pid for pid, words in box.processes().items() if words.startswith(needle)}


@linux
class TestProcessVerbs:
    @pytest.fixture(scope="class", name="web")
    @classmethod
    def web(cls):
        """Give a daemon with processes, for the tests that leave them as they were."""
        count = "i=0; while :; do i=$((i+1)); printf '%0400d\\n' $i; sleep 0.01; done"
        flood = "exec yes 0123456789012345678901234567890123456789 | head -c 40000000; sleep 999"
        processes = {
            "web": {**SLEEP, "instances": 2},
            "off": {**SLEEP, "autostart": False},
            "count": {**SLEEP, "command": count, "log_mb": 0.03},
            "flood": {**SLEEP, "command": flood, "autostart": False, "log_mb": 100},
            "words": {**SLEEP, "command": "echo one; echo 'two \xe9'; exec sleep 1000"},
        }
        with project(process=processes, log={"level": "debug"}) as box:
            box.start()
            running(box, 2)
            yield box

    @pytest.fixture(scope="class", name="mute")
    @classmethod
    def mute(cls, web):
        """Follow a fast process and never read: (connection, the kB that the daemon grew)."""
        before, log = status_of(web, "VmRSS"), web.file("logs", "proc-flood.0.log")
        with contextlib.closing(Stranger(web.file("control.sock"))) as stranger:
            connection = stranger.socket
            write(log, "\n")
            connection.sendall(frame({"type": "tail_logs", "name": "flood", "follow": True}))
            do(web, "start_process", name="flood")
            eventually(lambda: os.stat(log).st_size > 39e6, why="all is written")
            do(web, "stop_process", name="flood")
            yield connection, status_of(web, "VmRSS") - before

    @pytest.fixture
    def peer(self, web):
        """Give a stranger's connection."""
        stranger = Stranger(web.file("control.sock"))
        with contextlib.closing(stranger):
            stranger.ask("ping")  # it has its thread
            yield stranger

    def test_a_stranger_gets_by_with_the_table_alone(self, box):
        box.config({}, process={"web": {**SLEEP, "instances": 2, "command": ["sleep", "999"]}})
        box.start()
        running(box, 2)
        peer = Stranger(box.file("control.sock"))
        pong = has_form({str: "type version folder", int: "pid uptime_secs"}, peer.ask("ping"))
        status = peer.ask("status")
        ours = {"version", "pid", "uptime_secs", "process_count", "running_instances"}
        assert pong["type"] == "pong" and status["type"] == "status" and ours <= set(status)
        assert status["pid"] == box.pid()
        assert (status["process_count"], status["running_instances"]) == (1, 2)
        listed = has_form({str: "type", list: "processes"}, peer.ask("list_processes"))
        (one,) = listed["processes"]
        has_form(PROCESS, one)
        assert (listed["type"], one["status"], one["running"]) == ("process_list", "running", 2)
        assert one["memory_bytes"] > 0 and one["uptime_secs"] >= 0 and one["restart_count"] == 0

        def details():
            answer = has_form({str: "type", dict: "process"}, peer.ask("get_process", name="web"))
            assert answer["type"] == "process_details"
            found = has_form(DETAILS, answer["process"])["instance_details"]
            assert [has_form(INSTANCE, one)["index"] for one in found] == [0, 1]
            return [one["pid"] for one in found], [one["state"] for one in found]

        def say(verb, code=None, **fields):
            answer = peer.ask(verb, **{"name": "web", **fields})
            has_form(ERROR if code else {str: "type message"}, answer)
            assert (answer["type"], answer.get("code")) == ("error" if code else "ok", code)

        command = peer.ask("get_process", name="web")["process"]
        assert (command["command"], command["args"], command["cwd"]) == ("sleep", ["999"], box.path)
        first, states = details()
        assert states == ["running"] * 2 and len(set(first)) == 2 and all(map(lives, first))
        say("start_process", "process_already_running")
        say("stop_process")
        assert details() == ([None] * 2, ["stopped"] * 2) and not any(map(lives, first))
        say("stop_process", "process_not_running")
        assert peer.ask("list_processes")["processes"][0]["status"] == "stopped"
        say("restart_process")
        second = running(box, 2)
        say("restart_process")
        third = running(box, 2)
        say("reload_process")
        assert len({*first, *second, *third, *details()[0]}) == 8
        for verb in "get_process start_process stop_process restart_process reload_process".split():
            say(verb, "process_not_found", name="nosuch")
            say(verb, "bad_request", name=5)
        say("tail_logs", "process_not_found", name="nosuch")
        say("tail_logs", "bad_request", lines="x")
        say("no_such_verb", "unknown_command")
        assert has_form({str: "type message"}, peer.ask("shutdown"))["type"] == "ok"
        eventually(lambda: not os.path.exists(box.file("daemon.pid")), why="shut down")
        assert box.processes() == {}

    def test_lines_of_a_log_come_with_all_their_fields(self, web, peer):
        answer = eventually(
            lambda: (got := peer.ask("tail_logs", name="words", lines=9))["lines"] and got
        )
        assert set(answer) == {"type", "lines"} and answer["type"] == "log_lines"
        lines = [has_form(LINE, line) for line in answer["lines"]]
        assert [line["content"] for line in lines] == ["one", "two \xe9"]
        assert (lines[0]["process_name"], lines[0]["instance"]) == ("words", 0)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", lines[0]["timestamp"])
        (last,) = peer.ask("tail_logs", name="words", lines=1)["lines"]
        assert last["content"] == "two \xe9"
        assert peer.ask("tail_logs", name="off") == {"type": "log_lines", "lines": []}

    def test_a_followed_log_goes_on_through_rotation_and_restart(self, web, peer):
        peer.send("tail_logs", name="count", lines=1, follow=True)
        seen = []

        def read_until(is_enough):
            began = len(seen)
            while not is_enough(seen[began:]):
                seen.extend(int(line["content"]) for line in peer.receive()["lines"])

        read_until(lambda new: len(new) > 20)
        do(web, "restart_process", name="count")
        read_until(lambda new: 1 in new and len(new) > 100)
        restart = seen.index(1, 1)
        base = web.file("logs", "proc-count.0.log.base")
        read_until(lambda new: os.path.exists(base) and len(new) > 100)
        for run in (seen[:restart], seen[restart:]):
            whole = [*range(run[0], run[0] + len(run))]
            assert run == (whole if can_collapse(web.state) else sorted(set(run)))

    def test_a_follower_may_ask_for_something_else_and_leaves_no_thread(self, web, peer):
        before = status_of(web, "Threads")
        others = [Stranger(web.file("control.sock")) for _ in range(10)]
        for other in others:
            other.send("tail_logs", name="count", follow=True)
            assert other.receive()["type"] == "log_lines"
        assert status_of(web, "Threads") > 10
        others[0].send("ping")
        kinds = iter(lambda: others[0].receive()["type"], "pong")
        assert set(kinds) <= {"log_lines"}
        assert others[0].ask("ping")["type"] == "pong", "the stream is over"
        for other in others:
            other.close()
        eventually(lambda: status_of(web, "Threads") <= before, why="its threads have ended")

    def test_broken_frames_and_a_crowd_leave_processes_and_threads_as_they_were(self, web, peer):
        pids, before = running(web, 2), status_of(web, "Threads")
        for data in (
            struct.pack(">I", (16 << 20) + 1) + b"x",
            b"GET / HTTP/1.1\r\n\r\n",
            frame([{"type": "stop_process", "name": "web"}]),
            frame(b'{"type": "stop_process", "name": ' + b"[" * 90000 + b"]" * 90000 + b"}"),
            frame(b'{"type": "stop_process", "name": "web"}'[:-4]),
        ):
            stranger = Stranger(web.file("control.sock"))
            stranger.socket.sendall(data)
            answer = has_form(ERROR, stranger.receive())
            assert (answer["type"], answer["code"]) == ("error", "bad_request")
            stranger.close()
        half = Stranger(web.file("control.sock"))
        half.socket.sendall(b"\0\0\0\x20{")
        half.socket.shutdown(socket.SHUT_WR)
        with pytest.raises(struct.error):
            half.receive()
        got, gate = [], threading.Barrier(200)

        def crowd():
            gate.wait()
            stranger = eventually(lambda: Stranger(web.file("control.sock")))
            got.append(stranger.ask("list_processes")["type"])
            stranger.close()

        threads = [threading.Thread(target=crowd) for _ in range(200)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert got == ["process_list"] * 200
        eventually(lambda: status_of(web, "Threads") <= before, why="the crowd has gone")
        assert running(web, 2) == pids and "Traceback" not in web.log()

    def test_a_wrong_value_is_a_bad_request_and_changes_nothing(self, web, peer):
        pids, deep = running(web, 2), functools.reduce(lambda x, _: [x], range(500), [])
        odd = [5, True, [], {}, "", "a/b", "..", "web\0", "\udcff", "w" * 1000, "web\n", deep]
        verbs = "get_process start_process stop_process restart_process reload_process".split()
        wrong = [(v, {"name": x}) for v in [*verbs, "tail_logs", "why_process"] for x in odd]
        wrong += [(verb, {}) for verb in [*verbs, "up", "down", "signal_process"]]
        wrong += [("up", {"names": names}) for names in (5, "web", [5], ["web", []])]
        signals = [0, -1, 65, 1.5, True, [], {}, "", "NOSUCH", "SIG_UNBLOCK", "SIG_IGN", 10**30]
        wrong += [("signal_process", {"name": "web", "signal": number}) for number in signals]
        counts = [-1, 0.5, 1001, True, [], "x", 10**30]
        wrong += [("scale_process", {"name": "web", "instances": count}) for count in counts]
        wrong += [("tail_logs", {"name": "web", "lines": n}) for n in (0, -1, 10**6, [], 1e300)]
        wrong += [("tail_logs", {"name": "web", "follow": on}) for on in (1, "yes", [])]
        wrong += [("process_logs", {"name": "web", "offsets": x}) for x in (5, {"web.0": -1})]
        got = [(peer.ask(verb, **fields), verb, fields) for verb, fields in wrong]
        assert [row for row in got if row[0].get("code") != "bad_request"] == []
        for names in (["nosuch"], ["web", "../web"]):
            assert peer.ask("up", names=names)["type"] == "error"
        peer.socket.sendall(frame(b'{"type": "up", "names": ["' + b"\x7f" * 5_000_000 + b'"]}'))
        assert peer.receive()["type"] == "error", "though it names more than fits into a frame"
        far = peer.ask("process_logs", name="words", offsets={"words.0": 10**18})
        assert far["type"] == "ok", "no file is that long"
        assert running(web, 2) == pids and "Traceback" not in web.log()

    def test_the_commands_say_what_they_did(self, web, peer):
        pids = running(web, 2)
        assert re.search(rf"web\.1 +running +{pids[1]} ", ask(web, "ps", "web"))
        assert [one["pid"] for one in ask_json(web, "ps", "web")] == pids
        assert ask_json(web, "why", "web.1")["reasons"][0].startswith("web.1 running")
        assert ask_json(web, "up", "off")["message"] == "started: off"
        (pid,) = running(web, 1, "off")
        assert ask_json(web, "signal", "off.0", "SIGKILL")["message"] == f"sent to {pid}"
        (again,) = eventually(lambda: (p := running(web, 1, "off")) != [pid] and p)
        for verb in ("restart", "reload"):
            assert ask_json(web, verb, "off")["message"] == f"{verb}ed: off"
            assert not lives(again)
            (again,) = running(web, 1, "off")
        assert ask_json(web, "scale", "off", 3)["message"] == "scaled: off has 3"
        running(web, 3, "off")
        ask(web, "scale", "off", 0)
        assert ask_json(web, "ps", "off") == [] and "scale off 1" in ask(web, "why", "off")
        ask(web, "scale", "off", 1)
        ask(web, "down", "off")
        assert ask(web, "logs", "words") == "one\ntwo \xe9\n"
        assert ask_json(web, "logs", "words.0", "-n1") == {"data": "two \xe9\n"}
        assert running(web, 2) == pids

    def test_wrong_words_get_the_status_of_the_table(self, web, peer):
        for status, code, *words in (
            (1, "process_not_running", "signal", "off", "HUP"),
            *((2, "process_not_found", *verb.split(), "nosuch") for verb in (
                "ps", "up", "down", "restart", "reload", "why", "logs", "logs -f", "up web",
            )),
            (2, "process_not_found", "scale", "nosuch", "1"),
            (2, "process_not_found", "signal", "nosuch", "HUP"),
            (2, "process_not_found", "restart", "web.0"),
            (2, "bad_request", "signal", "web", "NOSUCH"),
            (2, "bad_request", "signal", "web"),
            (2, "bad_request", "scale", "web", "-1"),
            (2, "bad_request", "scale", "web", "x"),
            (2, "bad_request", "scale", "web", "1001"),
            (2, "bad_request", "why", "../web"),
            (2, "bad_request", "logs", "../web"),
        ):  # fmt: skip
            got, out, err = within(web, "--json", *words)
            error = json.loads(err)["error"]
            assert (got, error["code"], out) == (status, code, ""), words
            assert error["message"] and "\n" not in error["message"], words
        done = web.run("restart", "nosuch", rc=2)
        assert done.stderr.splitlines()[0] == "apexd: there is no process 'nosuch'"
        assert "processes: web, off" in done.stderr and done.stdout == ""

    @slow
    def test_a_followed_log_in_json_is_silent_while_nothing_comes(self, web, peer):
        child = web.popen("--json", "logs", "words", "-f")
        assert json.loads(child.stdout.readline()) == {"data": "one\ntwo \xe9\n"}
        pause(0.7)
        child.kill()
        assert child.stdout.read() == b""

    @slow
    def test_a_follower_that_never_reads_costs_no_memory_and_loses_its_place(self, web, mute):
        connection, growth_kb = mute
        assert growth_kb < 20_000
        eventually(lambda: "a connection ended: timed out" in web.log(), why="hung up on")
        with contextlib.suppress(ConnectionResetError):
            while connection.recv(1 << 20):
                pass

    def test_without_a_daemon_only_logs_answer_and_a_hung_one_is_named_soon(self, box, boxes):
        box.config({}, process={"web": {**SLEEP, "command": "echo hello; exec sleep 1000"}})
        asked = (
            "ps", "up", "up web", "down web", "restart web", "reload web", "scale web 2",
            "signal web HUP", "why web",
        )  # fmt: skip
        assert box.run("logs", "web").stdout == "" and os.listdir(box.state) == ["config.json"]
        for words in asked:
            error = box.error(*words.split(), rc=69)
            assert (error["code"], error["hint"]) == ("not_running", "start it with `start`")
        box.start()
        running(box)
        box.stop()
        assert box.run("logs", "web").stdout == "hello\n"
        assert box.run("logs", "web", "-f", rc=69).stdout == "hello\n"
        assert box.error("logs", "nosuch", rc=2)["code"] == "process_not_found"
        shutil.rmtree(box.file("logs"))
        assert box.run("logs", "web").stdout == ""
        box.start()
        os.kill(box.pid(), signal.SIGSTOP)
        try:
            asked = ("ps", "up web", "restart web", "signal web HUP", "why web", "logs web")
            hung = [Later(box, "--json", *words.split()) for words in asked]
            for done in [later.result() for later in hung]:
                error = json.loads(done.stderr)["error"]
                assert (done.returncode, error["code"], done.stdout) == (69, "not_answering", "")
                assert done.seconds < 9, done
        finally:
            os.kill(box.pid(), signal.SIGCONT)

    def test_a_missing_log_folder_and_odd_files_in_it_are_no_fault(self, box):
        box.config({}, process={"web": {**SLEEP, "command": "echo $$; exec sleep 1000"}})
        box.start()
        running(box)
        peer = Stranger(box.file("control.sock"))
        shutil.rmtree(box.file("logs"))
        assert peer.ask("tail_logs", name="web") == {"type": "log_lines", "lines": []}
        assert box.run("logs", "web").stdout == ""
        do(box, "restart_process", name="web")
        write(box.file("logs", "proc-web.log"), "x\n")
        os.mkdir(box.file("logs", "proc-web.7.log"))
        os.mkfifo(box.file("logs", "proc-web.8.log"))
        (line,) = eventually(lambda: peer.ask("tail_logs", name="web")["lines"])
        assert int(line["content"]) == running(box)[0]
        assert ask(box, "logs", "web") == line["content"] + "\n" and "Traceback" not in box.log()

    @slow
    def test_very_many_short_lines_fit_into_frames(self, box):
        many = "yes '' | head -n 250000; exec sleep 1000"
        box.config({}, process={"web": {**SLEEP, "command": many, "instances": 2}})
        box.start()
        for index in range(2):
            path = box.file("logs", f"proc-web.{index}.log")
            eventually(lambda path=path: os.stat(path).st_size >= 250000)
        peer = Stranger(box.file("control.sock"))
        answer = peer.ask("tail_logs", name="web", lines=100_000)
        assert answer["type"] == "log_lines" or answer["code"] == "bad_request"
        peer.send("tail_logs", name="web", follow=True, lines=1)
        assert len(peer.receive()["lines"]) == 2
        os.truncate(box.file("logs", "proc-web.0.log"), 0)
        write(box.file("logs", "proc-web.7.log"), "\n" * 250000)
        count = 0
        while count < 250000:
            count += len(peer.receive()["lines"])
        assert "Traceback" not in box.log()

    def test_what_is_asked_while_the_daemon_stops_is_refused(self, box):
        stubborn = {"command": "trap '' TERM; while :; do sleep 0.1; done", "stop_timeout": 1}
        box.config({}, process={"web": stubborn, "off": {**SLEEP, "autostart": False}})
        box.start()
        running(box)
        pause(0.2)  # its trap is set
        child = box.popen("stop")
        eventually(lambda: instances(box)[0]["state"] == "stopping")
        asked = ({"type": "start_process", "name": "web"}, {"type": "up", "names": ["off"]},
                 {"type": "restart_process", "name": "web"},
                 {"type": "scale_process", "name": "web", "instances": 3})  # fmt: skip
        codes = [box.request(message).get("code") for message in asked]
        assert child.wait(20) == 0 and box.processes() == {}
        assert codes == ["busy"] * 4

    @slow
    def test_a_forced_stop_waits_for_no_timeout_but_until_all_has_ended(self, box):
        stubborn = "trap '' TERM; while :; do sleep 0.1; done"
        box.config({}, process={"web": {"command": stubborn, "stop_timeout": 60}})
        box.start()
        task = box.add("sh", "-c", stubborn)
        box.until(task, "running")
        running(box)
        pause(0.3)  # their traps are set
        began = time.monotonic()
        box.run("stop", "--force")
        assert box.processes() == {} and time.monotonic() - began < 15
        assert box.task(task)["outcome"] == "interrupted"

    def test_up_restart_and_scale_tell_how_it_went(self, box):
        """P4: ready, or why not; `status` names what is down."""
        quick = {"backoff": 60, "backoff_max": 60, "autostart": False}
        ready = {"command": "test -f ok-$APEX_INSTANCE", "interval": 0.05}
        slow = {**SLEEP, "autostart": False, "ready": ready}
        box.config({}, process={
            "typo": {"command": ["/no/such/program"], **quick},
            "flap": {"command": "exit 3", **quick},
            "slow": slow,
        })  # fmt: skip
        box.start()
        for words in (["up", "typo"], ["restart", "typo"], ["reload", "typo"], ["up", "flap"]):
            assert box.error(*words, rc=1)["code"] == "process_failed", words
        box.run("down", "typo")
        answer = box.request({"type": "start_process", "name": "typo"})
        assert answer["code"] == "process_failed" and "typo.0" in answer["message"]
        shown = box.run("status").stdout
        assert "degraded, down: " in shown and "typo.0 (backoff)" in shown and "flap.0" in shown
        assert box.run("up", "--no-wait", "slow").stdout == "started: slow\n"
        state = lambda index: instances(box, "slow")[index]["state"]
        assert state(0) == "starting"
        later = Later(box, "up", "slow")
        write(os.path.join(box.path, "ok-0"), "")
        assert later.result().returncode == 0 and state(0) == "running"
        later = Later(box, "scale", "slow", 2)
        eventually(lambda: state(1) == "starting")
        write(os.path.join(box.path, "ok-1"), "")
        assert later.result().returncode == 0 and state(1) == "running"

    def test_what_was_scaled_away_and_newlines_in_commands_do_not_show(self, box):
        """P17; and `ps` says what may run on when the daemon was killed."""
        web = {**SLEEP, "command": "echo I am $APEX_INSTANCE\nexec sleep 1000", "instances": 3}
        box.config({}, process={"web": web})
        box.start()
        eventually(lambda: "I am 2" in box.run("logs", "web").stdout)
        assert len(box.run("ps").stdout.strip().split("\n")) == 4
        box.run("scale", "web", 1)
        assert box.run("logs", "web").stdout == "I am 0\n"
        answer = box.request({"type": "tail_logs", "name": "web"})
        assert [line["content"] for line in answer["lines"]] == ["I am 0"]
        assert box.run("logs", "web.2").stdout == "I am 2\n", "it can be named"
        box.kill9()
        assert "web.0 may still run" in box.error("ps", rc=69)["message"]
        box.start()

    def test_wide_lines_are_cut_and_come_in_frames_that_can_be_sent(self, box):
        """P10."""
        wide = {**SLEEP, "command": "head -c 250000 /dev/zero; echo; exec sleep 1000", "instances": 14}
        box.config({}, process={"wide": wide})
        box.start()
        full = lambda: [os.path.getsize(box.file("logs", f"proc-wide.{n}.log")) for n in range(14)]
        eventually(lambda: set(full()) == {250_001})
        peer = Stranger(box.file("control.sock"))
        peer.send("tail_logs", name="wide", lines=10, follow=True)
        found = []
        while sum(len(line["content"]) for line in found) < 14 * 250_000:
            found += peer.receive()["lines"]
        assert max(len(line["content"]) for line in found) == apexd.LINE_MAX_BYTES
        answer = box.request({"type": "tail_logs", "name": "wide", "lines": 10})
        assert answer["type"] == "log_lines" and len(answer["lines"]) > 14

    def test_the_time_to_stop_grows_with_the_number_of_instances(self):
        """P11."""
        times = [
            apexd.Config({"process": {"w": {"command": "x", "instances": n}}}).stop_timeout_s
            for n in (1, 1000)
        ]
        assert times[1] - times[0] >= 50

    def test_a_restart_that_is_overtaken_by_a_stop_does_not_wait_in_vain(self, box):
        ready = {"command": "false", "interval": 0.1, "within": 60}
        box.config({}, process={"web": {**SLEEP, "ready": ready}, "on": dict(SLEEP)})
        box.start()
        running(box, name="on")
        later = Later(box, "reload", "web")
        eventually(lambda: "Process web.0 is stopped" in box.log())
        box.run("down", "web")
        assert later.result().seconds < 6 and later.result().returncode == 1

    def test_odd_records_are_nobodys_before_a_start(self, box):
        bystander = subprocess.Popen(["sleep", "1000"], start_new_session=True)
        note = {"run": "x", "pid": bystander.pid, "boot": apexd.Platform.boot_id()}
        note["started"] = time.time()
        odd = [{}, {"started": "x"}, {"started": None}, {"restarts": "x"}, {"quick": []},
               {"run": 5}, {"pid": []}, {"pid": -1}, {"pid": "x"}, {"notify": [5]}]  # fmt: skip
        texts = [json.dumps({**note, **more}) for more in odd]
        texts += ["[1]", "5", "null", "[" * 400, "", json.dumps({"boot": note["boot"]})]
        for at, text in [*enumerate(texts)]:
            write(box.file("run", f"proc-a{at}.0"), " " * 64 + text.ljust(447) + "\n")
            write(box.file("run", f"proc-b{at}.0"), "0\n".ljust(64) + text.ljust(447) + "\n")
        for at, data in enumerate((b"", b"x", os.urandom(512), b"\0" * 9999)):
            write(box.file("run", f"proc-c{at}.0"), data)
        os.mkfifo(box.file("run", "proc-d0.0"))
        os.symlink("/etc/passwd", box.file("run", "proc-d1.0"))
        os.symlink("/nonexistent/x", box.file("run", "proc-d2.0"))
        os.mkdir(box.file("run", "proc-e0.0"))
        write(box.file("run", "proc-a0.00"), " " * 64 + texts[0])
        names = {name[5:].split(".")[0] for name in os.listdir(box.file("run"))}
        box.config({}, process=dict.fromkeys(names, SLEEP))
        try:
            box.start()
            for name in names - {"e0"}:
                running(box, name=name)
            assert "directory" in ask(box, "why", "e0")
            assert len(commands_of(box, "sleep 1000")) == len(names) - 1
            box.stop()
            assert bystander.poll() is None and "Traceback" not in box.log()
        finally:
            bystander.kill()
            bystander.wait()

    @slow
    def test_records_that_are_spoilt_while_they_are_used_cause_no_second_copy(self, box):
        names = "kept gone empty garbage folder link".split()
        box.config({}, process=dict.fromkeys(names, SLEEP))
        box.start()
        where = {name: box.file("run", f"proc-{name}.0") for name in names}

        def spoil():
            for name in ("gone", "folder", "link"):
                os.unlink(where[name])
            os.mkdir(where["folder"])
            os.symlink("/etc/passwd", where["link"])
            os.truncate(where["empty"], 0)
            write(where["garbage"], os.urandom(512))
            return {name: running(box, name=name)[0] for name in names}

        first = {name: running(box, name=name)[0] for name in names}
        assert spoil() == first, "a live daemon needs none of them"
        do(box, "stop_process", name="folder")
        assert instances(box, "folder")[0]["state"] == "stopped"
        os.rmdir(where["folder"])
        os.unlink(where["link"])
        for name in names:
            do(box, "restart_process", name=name)
        spoil()
        first = {name: running(box, name=name)[0] for name in names}
        box.kill9()
        os.rmdir(where["folder"])
        os.unlink(where["link"])
        box.start()
        pause(1.5)
        assert commands_of(box, "sleep 1000") == set(first.values())
        assert running(box, name="kept") == [first["kept"]]
        for pid in first.values():
            kill(pid)
        for name in names:
            assert running(box, name=name) != [first[name]]
        eventually(lambda: len(commands_of(box, "sleep 1000")) == len(names))
        assert "Traceback" not in box.log()

    def test_a_record_holds_its_note_whatever_the_path(self, box):
        box.state = os.path.join(box.root, "\u0416" * 35)  # two bytes each, six in plain JSON
        box.env["APEX_STATE_DIR"] = box.state
        box.config({}, process={"w": {**SLEEP, "live": {"notify": True, "timeout": 999}}})
        box.start()
        pids = running(box, name="w")
        box.kill9()
        box.start()
        pause(0.5)
        assert running(box, name="w") == pids
        assert box.run("stop").returncode == 0 and box.processes() == {}

    def test_notify_sockets_are_there_for_each_run_and_leave_nothing_behind(self, box):
        told = {**SLEEP, "live": {"notify": True, "timeout": 999}}
        rude = {**told, "command": "rm $NOTIFY_SOCKET; exec sleep 1000"}
        box.config({}, process={"web": told, "rude": rude})
        box.start()
        for name in ("web", "rude"):
            running(box, name=name)
            do(box, "stop_process", name=name)
            do(box, "start_process", name=name)
            running(box, name=name)
        counts = lambda: (status_of(box, "Threads"), len(os.listdir(f"/proc/{box.pid()}/fd")))
        before = counts()
        for _ in range(20 if SLOW else 5):
            for name in ("web", "rude"):
                do(box, "restart_process", name=name)
                running(box, name=name)
            assert os.path.exists(box.file("run", "notify-web.0"))
        eventually(lambda: sum(counts()) <= sum(before) + 4, why=f"no more than {before}")

    def test_what_cannot_start_says_why_and_can_be_stopped_at_once(self, box):
        os.mkdir(os.path.join(box.path, "folder"))
        os.mkfifo(os.path.join(box.path, "fifo"))
        write(os.path.join(box.path, "plain"), b"\xff\0")
        odd = {
            "fifo": {"env_file": "fifo"}, "folder": {"env_file": "folder"},
            "binary": {"env_file": "plain"}, "nowhere": {"cwd": "nosuch"},
            "nobody": {"command": ["nosuch"]}, "plain": {"command": ["./plain"]},
            "dir": {"command": ["./folder"]}, "file": {"cwd": "plain"},
        }  # fmt: skip
        box.config({}, process={name: {**SLEEP, **one} for name, one in odd.items()})
        box.start()
        for name in odd:
            reasons = lambda name=name: do(box, "why_process", name=name)["reasons"][0]
            eventually(lambda: "spawn" in reasons(), why=f"{name} says why")
        began = time.monotonic()
        ask(box, "down")
        assert time.monotonic() - began < 3
        box.stop()
        assert "Traceback" not in box.log()

    def test_what_has_no_command_yet_uses_nothing(self, box):
        box.config({}, process={"web": {**SLEEP, "stop_timeout": 3, "autostart": False}})
        box.start()
        keeper = keeper_of(box)
        os.kill(keeper, signal.SIGSTOP)
        later = Later(box, "up", "web")
        one = eventually(lambda: (got := instances(box)[0])["state"] == "starting" and got)
        assert (one["pid"], one["cpu_percent"], one["memory_bytes"]) == (None,) * 3
        os.kill(keeper, signal.SIGCONT)
        later.result()
        running(box)

    def test_probes_that_are_nonsense_or_hang_answer_no_and_leave_nothing(self, box):
        read_probe = apexd.probe(1.0)
        for probe in (
            {"tcp": "127.0.0.1:{instance+70000}"}, {"tcp": "nosuch.invalid:80"},
            {"tcp": "x" * 300 + ":80"}, {"tcp": "127.0.0.1:{instance}99999"},
            {"http": "http://127.0.0.1:{instance+70000}/"},
            {"http": "http://\xe9..x/"},
        ):  # fmt: skip
            assert not apexd.ask(read_probe({**probe, "timeout": 1}), 0), probe
        hangs = {"command": "sleep 501 & sleep 502", "interval": 0.1, "timeout": 0.3}
        hangs["failures"] = 99
        waits = {"command": "setsid sleep 503 & sleep 504", "timeout": 99}
        missing = {"command": ["nosuch"], "interval": 0.1}
        box.config({}, process={
            "web": {**SLEEP, "live": hangs}, "slow": {**SLEEP, "ready": waits},
            "odd": {**SLEEP, "live": {**missing, "failures": 99}},
        })  # fmt: skip
        box.start()
        eventually(lambda: instances(box, "odd")[0]["state"] == "unhealthy")
        eventually(lambda: instances(box)[0]["state"] == "unhealthy")
        eventually(lambda: commands_of(box, "sleep 504"))
        before = status_of(box, "Threads")
        ask(box, "down")
        eventually(lambda: set(box.processes()) == {box.pid(), keeper_of(box)})
        eventually(lambda: status_of(box, "Threads") <= before - 3)

    @slow
    def test_a_storm_of_verbs_and_reloads_ends_in_the_wanted_state(self, box):
        config = lambda n: {**SLEEP, "instances": n % 4, "env": {"N": str(n // 5)}}
        box.config({}, process={"web": config(2)})
        box.start()
        running(box, 2)
        before, until = status_of(box, "Threads"), time.monotonic() + (10 if SLOW else 3)
        verbs = "start_process stop_process restart_process reload_process scale_process".split()
        allowed = {None, "process_already_running", "process_not_running", "process_failed"}
        codes, slowest = set(), [0.0]

        def call():
            while time.monotonic() < until:
                began, verb = time.monotonic(), random.choice(verbs)
                more = {"instances": random.randrange(5)} if verb == verbs[-1] else {}
                answer = box.request({"type": verb, "name": "web", **more}, 60)
                codes.add(answer.get("code"))
                slowest.append(time.monotonic() - began)

        def reload():
            number = 0
            while time.monotonic() < until:
                number += 1
                box.config({}, process={"web": config(number)})
                codes.add(box.request({"type": "reload"}, 30).get("code"))

        threads = [threading.Thread(target=act) for act in [call] * 20 + [reload]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert codes - allowed - {"config_invalid"} == set() and max(slowest) < 8, slowest
        do(box, "scale_process", name="web", instances=3)
        box.request({"type": "start_process", "name": "web"}, 30)
        pids = running(box, 3)
        eventually(lambda: commands_of(box, "sleep 1000") == set(pids), why="none is left over")
        eventually(lambda: status_of(box, "Threads") <= before + 2)
        assert "Traceback" not in box.log() and "spawn" not in box.log()


# In a PID namespace: the group's number of a one-shot that has ended is given to a stranger.
REUSED = """
import json, os, signal, subprocess, sys, time
program, killed = sys.argv[1:]
def run(*words):
    return subprocess.run([sys.executable, program, *words], stdout=subprocess.PIPE).stdout
def until(fn, what):
    for _ in range(1000):
        try:
            value = fn()
        except (OSError, ValueError):
            value = None
        if value:
            return value
        time.sleep(0.01)
    sys.exit("never: " + what)
def pids():
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) > 1]
run("start")
group = until(lambda: int(open("group").read()), "the one-shot ran")
until(lambda: not os.path.exists(f"/proc/{group}"), "it has ended")
until(lambda: b'"pid": null' in run("--json", "ps"), "its end is known")
with open(".apex/daemon.pid") as file:
    daemon = json.load(file)["pid"]
for pid in [daemon] if killed == "daemon" else pids():
    if pid != os.getpid():
        os.kill(pid, signal.SIGKILL)
until(lambda: not os.path.exists(f"/proc/{daemon}/exe"), "the daemon is dead")
for _ in range(50):
    with open("/proc/sys/kernel/ns_last_pid", "w") as file:
        file.write(str(group - 1))
    leader = os.fork()
    if leader == 0:
        os.setsid()
        if os.fork() == 0:
            os.execvp("sleep", ["sleep", "777"])
        os._exit(0)
    os.waitpid(leader, 0)
    if leader == group:
        break
else:
    sys.exit("the PID was not to be had")
mine = until(lambda: [p for p in pids() if b"777" in open(f"/proc/{p}/cmdline", "rb").read()], "it")
assert os.getpgid(mine[0]) == group
for words in (["start"], ["restart"], ["kill", "--all"]):
    run(*words)
    time.sleep(0.1)
    if not os.path.exists(f"/proc/{mine[0]}/exe"):
        sys.exit(f"{words} ended a stranger")
print("well")
"""

# Tries to write to whatever of apexd's a child can reach, and to take its parents' descriptors.
THIEF = """
import ctypes, glob, os, time
reached, parents, libc, pid = [], [], ctypes.CDLL(None), os.getppid()
while pid > 1:
    parents.append(pid)
    pid = int(open("/proc/%d/stat" % pid).read().rpartition(")")[2].split()[1])
def attempt(fn, what):
    try:
        if fn() >= 0:
            reached.append(what)
    except OSError:
        pass
for number in range(3, 64):
    attempt(lambda: os.fstat(number).st_mode, number)
paths = glob.glob(os.environ["APEX_STATE_DIR"] + "/**", recursive=True)
for parent in parents:
    paths += glob.glob("/proc/%d/fd/*" % parent)
    pidfd = libc.syscall(434, parent, 0)
    for number in range(3, 64):
        attempt(lambda: libc.syscall(438, pidfd, number, 0), (parent, number))
for path in paths:
    attempt(lambda: os.open(path, os.O_RDWR | os.O_NONBLOCK), path)
print("reached", reached, flush=True)
time.sleep(1000)
"""


@linux
class TestProcessPromises:
    """What was promised to a process, and to strangers, holds when a step in between fails."""

    UNSHARE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")

    def as_pid_1(self, box, *words):
        """Start a command as PID 1 of a namespace of its own; skip where that is not allowed."""
        if subprocess.run([*self.UNSHARE, "true"], capture_output=True).returncode:
            pytest.skip("unshare does not work here")
        options = {"cwd": box.path, "env": box.env, "text": True}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        child = subprocess.Popen([*self.UNSHARE, *words], **options, **pipes)
        box.children.append(child)
        return child

    def open_to_all(self, box):
        """Let every user reach the project's folder, though not its state."""
        for path in (box.root, box.path):
            os.chmod(path, 0o755)

    @root
    @needs("unshare", "nsenter")
    def test_as_pid_1_a_probe_that_fails_fails(self, box):
        """P1"""
        section = lambda **probes: {"command": ["sleep", "500"], "backoff": 0.05, **probes}
        bad, good = ({"command": f"sleep 0.1; {end}", "interval": 0.1} for end in ("false", "true"))
        live = {"command": "sleep 0.1; exit 1", "interval": 0.1, "failures": 2}
        probes = {"bad": {"ready": bad}, "good": {"ready": good}, "hung": {"live": live}}
        box.config({}, process={name: section(**probe) for name, probe in probes.items()})
        child = self.as_pid_1(box, *box.command("start", "--foreground"))
        until_all(box, "good")
        eventually(lambda: instances(box, "hung")[0]["restart_count"] > 0)
        pause(0.5)
        assert box.pid() == 1 and instances(box, "bad")[0]["state"] == "starting"
        child.kill()
        eventually(lambda: not box.processes())
        os.unlink(box.file("daemon.pid"))  # it says PID 1

    @root
    @needs("unshare")
    @pytest.mark.parametrize("killed", ["daemon", "all"])
    def test_a_number_that_is_used_again_is_not_signalled(self, box, killed):
        """P2"""
        setup = {"command": "cut -d' ' -f5 /proc/self/stat >group", "restart": "never"}
        box.config({}, process={"setup": setup})
        program = os.path.join(box.path, "apexd.py")
        child = self.as_pid_1(box, sys.executable, "-c", REUSED, program, killed)
        out, _ = child.communicate(timeout=60)
        assert out == "well\n" and child.returncode == 0, out

    @root
    def test_a_process_of_another_user_reaches_nothing_of_ours(self, box):
        """P3"""
        self.open_to_all(box)
        write(os.path.join(box.path, "thief.py"), THIEF)
        os.chmod(os.path.join(box.path, "thief.py"), 0o644)
        command = [find_public_python(), "thief.py"]
        supervise(box, w={"command": command, "user": "nobody", "stop_timeout": 1})
        assert eventually(lambda: box.run("logs", "w").stdout) == "reached []\n"

    def test_an_adopted_process_is_asked_as_it_was_started(self, box):
        """P5: its env_file is gone."""
        probe = 'echo x >>asked; test -n "$APEX_PROCESS" && test "$A" = 1'
        live = {"command": probe, "interval": 0.1, "failures": 1}
        put(box, "w.env", "A=1\n")
        supervise(box, w={"command": ["sleep", "500"], "env_file": "w.env", "live": live})
        (pid,) = pids(box, "w")
        put(box, "w.env", None)
        box.run("restart")
        asked = len(told(box, "asked"))
        eventually(lambda: len(told(box, "asked")) > asked + 3)
        assert pids(box, "w") == [pid] and instances(box, "w")[0]["restart_count"] == 0

    def test_siblings_that_are_never_ready_do_not_hold_each_other(self, box):
        """P12"""
        ready = {"command": "test -f ok", "interval": 0.1, "within": 60}
        section = {"command": ["sleep", "500"], "instances": 2, "ready": ready, "stop_timeout": 1}
        supervise(box, w=section)
        eventually(lambda: all(one["pid"] for one in instances(box, "w")))
        box.config({}, process={"w": {**section, "command": "touch ok; exec sleep 501"}})
        began = time.monotonic()
        box.run("reload")
        until_all(box, "w")
        eventually(lambda: len(commands_of(box, "sleep 501")) == 2)
        assert time.monotonic() - began < 10, "and not the 60 s of `within`"

    def test_time_in_which_the_daemon_stood_still_does_not_count(self, box):
        """P13"""
        ready = {"command": "test -f ok", "interval": 0.1, "within": 1.5}
        daemon = supervise(box, w={"command": ["sleep", "500"], "ready": ready})
        eventually(lambda: instances(box, "w")[0]["pid"])
        os.kill(daemon, signal.SIGSTOP)
        pause(2.5)
        put(box, "ok")
        os.kill(daemon, signal.SIGCONT)
        until_all(box, "w")
        assert instances(box, "w")[0]["restart_count"] == 0 and "not ready within" not in box.log()

    NOBODY = {"user": "nobody", "ready": {"notify": True}, "backoff": 0.05, "stop_timeout": 1}

    def notifying(self, box):
        """Have a process of nobody's that says READY=1; return its NOTIFY_SOCKET's folder."""
        self.open_to_all(box)
        put(box, "say", "READY=1")
        os.chmod(os.path.join(box.path, "say"), 0o644)
        command = [find_public_python(), "-S", "-c", NOTIFIER]
        supervise(box, u={"command": command, **self.NOBODY})
        return self.notify_folder(box)

    def notify_folder(self, box):
        (pid,) = pids(box, "u")
        (path,) = re.findall(r"NOTIFY_SOCKET=([^\0]*)", read(f"/proc/{pid}/environ"))
        return os.path.dirname(path)

    @root
    def test_a_link_in_the_place_of_the_notify_folder_is_not_followed(self, box):
        """P14"""
        folder = self.notifying(box)
        target = os.path.join(box.root, "target")
        os.mkdir(target, 0o755)
        box.kill9()
        for name in os.listdir(folder):
            write(os.path.join(target, name), "precious")
        names = os.listdir(target)
        shutil.rmtree(folder)
        os.symlink(target, folder)
        try:
            box.start()
            box.run("restart", "u", rc=None)
            assert sorted(os.listdir(target)) == sorted(names) and names
            assert stat.S_IMODE(os.stat(target).st_mode) == 0o755
            assert all(read(os.path.join(target, name)) == "precious" for name in names)
            box.run("kill", "--all")
        finally:
            if os.path.islink(folder):
                os.unlink(folder)

    @root
    @alone
    @pytest.mark.parametrize("what", ["a long path", "another user"])
    def test_folders_made_elsewhere_do_not_stay(self, box, what):
        """P15"""
        outer = lambda: {
            os.path.join(base, name) for base in ("/run", "/tmp")
            for name in os.listdir(base) if name.startswith("apexd-")
        }  # fmt: skip
        before, made = outer(), set()  # nothing runs beside it
        if what == "a long path":
            box.state = os.path.join(box.root, "s" * 120)
            box.env["APEX_STATE_DIR"] = box.state
            box.config({}, process={"u": {"command": ["sleep", "500"]}})
            box.start()
        else:
            made.add(self.notifying(box))
        for words in ("kill", "kill --all", "restart"):
            eventually(lambda: " running" in box.run("ps").stdout)
            made |= outer() - before
            box.run(*words.split())
            box.start()
        assert what == "a long path" or not self.notify_folder(box).startswith(box.state)
        assert len(made) <= 1, "the next daemon finds it again"
        box.stop()
        assert outer() - before == set()

    @root
    def test_limits_are_set_before_the_rights_are_dropped(self, box):
        """P16"""
        section = {"command": ["sleep", "500"], "user": "nobody", "cwd": "/"}
        box.config({}, process={"nice": {**section, "nice": -5, "open_files": 8192}})
        words = ["prlimit", "--nofile=1024:4096", *box.command("start")]
        refused = subprocess.run(words, cwd=box.path, env=box.env, capture_output=True, text=True)
        assert refused.returncode == 78 and "open_files" in refused.stderr
        box.start()
        (pid,) = pids(box, "nice")
        limits = [line.split() for line in read(f"/proc/{pid}/limits").splitlines()]
        assert ["Max", "open", "files", "8192", "8192", "files"] in limits
        assert os.getpriority(os.PRIO_PROCESS, pid) == -5
        assert os.stat(f"/proc/{pid}").st_uid == 65534


# ============================================================================
# 17. HTTP - health, metrics, the status page: HealthVerbs, HealthServer
# ============================================================================


def http_json(box):
    """Return the port that a project's daemon answers HTTP on, and the key."""
    return json.loads(read(box.file("http.json")))


def send_raw(box, data, within_s=10.0):
    """Send bytes to the HTTP port; return all that comes back until the end."""
    return talk_http(http_json(box)["port"], data, within_s)


def talk_http(port, data, within_s=10.0):
    """Send bytes, or a text, to a port; return all that comes back until the end."""
    data = data.encode() if isinstance(data, str) else data
    with socket.create_connection(("127.0.0.1", port), within_s) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
        parts = []
        with contextlib.suppress(ConnectionError):
            while not parts or parts[-1]:
                parts.append(connection.recv(1 << 16))
        return b"".join(parts)


def split_answer(data):
    """Return (status, headers, body) of a whole response."""
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    assert re.fullmatch(r"HTTP/1.1 [1-5][0-9][0-9] [A-Z][A-Za-z -]*", first), first
    assert len(headers) == len(lines), "each header once"
    return int(first[9:12]), headers, body


def http(box, path, method="GET", host="127.0.0.1:PORT", key=None, **headers):
    """Make one request; return (status, headers, body)."""
    lines = [f"{method} {path} HTTP/1.1"]
    if host is not None:
        lines.append(f"Host: {host}")
    if key:
        lines.append(f"Authorization: Bearer {key}")
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    text = "\r\n".join([*lines, "", ""]).replace("PORT", str(http_json(box)["port"]))
    return split_answer(send_raw(box, text.encode("latin-1")))


def page_json(box, path, status=200, **options):
    """Return what a path answers with, as JSON."""
    found, headers, body = http(box, path, **options)
    assert (found, headers["Content-Type"]) == (status, "application/json"), (found, body)
    return json.loads(body)


def read_metrics(text):
    """Read Prometheus's text format strictly: {name: (type, [(suffix, labels, value)])}."""
    found, name = {}, ""
    assert text.endswith("\n") and "\r" not in text
    for line in text.split("\n")[:-1]:
        head = re.fullmatch(r"# (HELP|TYPE) ([a-zA-Z_:][a-zA-Z0-9_:]*) (.+)", line)
        if head and head[1] == "HELP":
            name = head[2]
            assert name not in found, f"{name} comes twice"
            found[name] = (None, [])
        elif head:
            assert head[2] == name and head[3] in ("counter", "gauge", "histogram"), line
            assert (head[3] == "counter") == name.endswith("_total"), line
            found[name] = (head[3], [])
        elif not line.startswith("# "):
            match = re.fullmatch(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? (\S+)", line)
            assert match and match[1].startswith(name), line
            pair = r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\\\|\\"|\\n)*)"'
            assert re.fullmatch(rf"(?:{pair}(?:,(?={'[a-zA-Z_]'})|$))*", match[2] or ""), line
            labels = dict(re.findall(pair, match[2] or ""))
            kind, samples = found[name]
            suffix = match[1][len(name):]
            assert suffix in (("_bucket", "_sum", "_count") if kind == "histogram" else ("",)), line
            assert (suffix, labels) not in [sample[:2] for sample in samples], f"twice: {line}"
            samples.append((suffix, labels, float(match[3])))
    for name, (kind, samples) in found.items():
        assert kind and samples, f"{name} has no type or no samples"
        if kind == "histogram":
            counts = [value for suffix, _, value in samples if suffix == "_bucket"]
            bounds = [float(labels["le"]) for suffix, labels, _ in samples if suffix == "_bucket"]
            (count,) = (value for suffix, _, value in samples if suffix == "_count")
            assert bounds == sorted(set(bounds)) and bounds[-1] == float("inf"), name
            assert counts == sorted(counts) and counts[-1] == count, name
            assert [suffix for suffix, _, _ in samples].count("_sum") == 1
    return found


def sample(metrics, name, suffix="", **labels):
    """Return one value of what `read_metrics` has read."""
    (value,) = (v for s, found, v in metrics[name][1] if s == suffix and labels.items() <= found.items())
    return value


class Browser:
    """A headless Chromium with one page, driven through its pipe (DevTools protocol)."""

    PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

    def __init__(self, folder):
        words, self._out = os.pipe()
        self._in, answers = os.pipe()
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
                   "--disable-background-networking", "--disable-dev-shm-usage", "--remote-debugging-pipe",
                   f"--user-data-dir={folder}", "about:blank"]  # fmt: skip
        start = f'exec "$0" "$@" 3<&{words} 4>&{answers}'
        self._process = subprocess.Popen(
            ["bash", "-c", start, self.PROGRAM, *options], pass_fds=(words, answers), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            env={"PATH": os.environ["PATH"], "HOME": folder},
        )  # fmt: skip
        os.close(words)
        os.close(answers)
        self._inbox, self._count, self._session, self.events = b"", 0, None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(domain + ".enable")

    def call(self, method, **params):
        """Do one command; keep the events that come meanwhile."""
        self._count += 1
        about = {"sessionId": self._session} if self._session else {}
        message = {"id": self._count, "method": method, "params": params, **about}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            if b"\0" not in self._inbox:
                assert select.select([self._in], [], [], 30)[0], f"no answer to {method}"
                data = os.read(self._in, 1 << 20)
                assert data, "the browser has ended"
                self._inbox += data
                continue
            line, _, self._inbox = self._inbox.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def run(self, code):
        """Return the value of an expression in the page."""
        options = {"awaitPromise": True, "returnByValue": True}
        answer = self.call("Runtime.evaluate", expression=code, **options)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def look(self, width, scheme, path=None):
        """Take on a width and a color scheme; keep a picture if a path is given."""
        size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        wish = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[wish])
        if path:
            picture = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
            write(path, base64.b64decode(picture))

    def close(self):
        """End it with all its processes."""
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._out)
        os.close(self._in)


# The least contrast of text with what is behind it (WCAG 2), and whose it is.
CONTRAST = """
(() => {
  const light = color => { const [r, g, b] = color.match(/[0-9.]+/g).slice(0, 3).map(x => x / 255)
    .map(x => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = node => { const color = getComputedStyle(node).backgroundColor;
    return /, 0\\)$/.test(color) && node.parentElement ? behind(node.parentElement) : color; };
  let worst = [99, ""];
  for (const node of document.body.querySelectorAll("*")) {
    const own = [...node.childNodes].some(x => x.nodeType === 3 && x.data.trim());
    if (!own || !node.checkVisibility() || node.tagName === "SCRIPT") continue;
    const [a, b] = [light(getComputedStyle(node).color), light(behind(node))];
    const found = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (found < worst[0]) worst = [found, node.outerHTML.slice(0, 200)];
  }
  return worst;
})()
"""


@posix
@pytest.mark.skipif(not Browser.PROGRAM, reason="needs chromium")
class TestPage:
    @pytest.fixture(scope="class", name="page")
    @classmethod
    def page(cls):
        """Give (Box, Browser) with the page open in it, and something of each kind on it."""
        with project(process={"web": {"command": "sleep 600"}, "bad": {"command": "exit 3", "backoff": 60}}) as box:
            box.start()
            tasks = [{"command": "exit 3", "label": "\u65e5\u672c \u0639\u0631\u0628 \U0001f600"}, "true"]
            for task_id in enqueue(box, *tasks):
                box.until(task_id)
            enqueue(box, {"command": "true", "label": "w" * 900, "delay": 900})
            label = "<script>document.title = 'bad'</script><img src=x onerror=alert(1)>"
            (task_id,) = enqueue(box, {"command": "echo out-$((6 * 7)); sleep 600", "label": label})
            box.until(task_id, "running")
            box.request({"type": "report", "id": task_id, "progress": 30, "note": "<b>n</b>"})
            browser = Browser(os.path.join(box.root, "profile"))
            try:
                browser.call("Page.navigate", url=box.json("status")["url"])
                eventually(lambda: browser.run("at('running').innerText.includes('out-42')"))
                yield box, browser
            finally:
                browser.close()

    def test_it_shows_what_there_is_as_text(self, page):
        box, browser = page
        text = {name: browser.run(f"at('{name}').innerText") for name in
                ("about", "health", "hour", "queue", "running", "processes", "failed", "latest")}  # fmt: skip
        assert "<script>document.title" in text["running"] and "<img src=x" in text["latest"]
        assert "w" * 160 + "\u2026" in text["latest"] and "w" * 161 not in text["latest"]
        assert "30% <b>n</b>" in text["running"] and "\u65e5\u672c" in text["failed"]
        assert "bad.0 backoff: exit 3; next try in" in text["processes"]
        assert text["health"].startswith("degraded; supervisor: down: bad.0")
        assert "1 succeeded, 1 failed" in text["hour"] and f"PID {box.pid()}" in text["about"]
        assert browser.run("document.title") == "p"
        assert browser.run("[document.scripts.length, document.images.length, document.querySelectorAll('b').length]") == [1, 0, 0]
        red = browser.run("getComputedStyle(document.querySelector('#failed .bad')).color")
        assert red == "rgb(179, 38, 30)"
        heights = "[...document.querySelectorAll('#hour .bad')].map(bar => bar.getBBox().height)"
        assert sorted(browser.run(heights))[-1] == 25, "half of what ended has failed"

    def test_it_moves_by_itself(self, page):
        box, browser = page
        running = next(task["id"] for task in ask_json(box, "list") if task["state"] == "running")
        box.request({"type": "report", "id": running, "progress": 80})
        enqueue(box, {"command": "exit 1", "label": "fresh"})
        eventually(lambda: browser.run("document.querySelector('progress').value") == 80)
        eventually(lambda: "fresh" in browser.run("at('failed').innerText"))

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_it_can_be_read_at_any_width_and_by_keyboard(self, page, scheme):
        box, browser = page
        kept = os.environ.get("APEXD_PICTURES")
        for width in (1280, 390):
            browser.look(width, scheme, kept and os.path.join(kept, f"{scheme}-{width}.png"))
            assert browser.run("document.documentElement.scrollWidth") <= width
            contrast, where = browser.run(CONTRAST)
            assert contrast >= 4.5, where
            browser.run("document.activeElement.blur()")
            seen = []
            for _ in range(10):
                for kind in ("keyDown", "keyUp"):
                    browser.call("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
                seen.append(browser.run("document.activeElement.id"))
                line = browser.run("parseFloat(getComputedStyle(document.activeElement).outlineWidth)")
                assert line >= 3 or not seen[-1], seen
            assert {"hour", "running", "events"} <= set(seen)
        browser.look(1280, "light")

    def test_it_says_that_the_daemon_has_gone_and_goes_on_when_it_is_back(self, page):
        box, browser = page
        kept = os.environ.get("APEXD_PICTURES")
        requests = [event["params"] for event in browser.events if event["method"] == "Network.requestWillBeSent"]
        box.kill9()
        browser.run("turn()")
        assert "does not answer" in browser.run("at('gone').innerText")
        assert "out-42" in browser.run("at('running').innerText"), "what was seen last stays"
        assert browser.run(CONTRAST)[0] >= 4.5
        browser.look(1280, "light", kept and os.path.join(kept, "gone.png"))
        faults = [event for event in browser.events if event["method"] in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled")]
        refused = "net::ERR_"  # or reset, or not connected
        entries = [event["params"]["entry"]["text"] for event in browser.events if event["method"] == "Log.entryAdded"]
        assert faults == [] and [text for text in entries if refused not in text] == []
        box.start()
        eventually(lambda: browser.run("at('gone').hidden"))
        assert f"PID {box.pid()}" in browser.run("at('about').innerText")
        place = f"http://127.0.0.1:{http_json(box)['port']}/"
        urls = {request["request"]["url"] for request in requests}
        assert place in {url.partition("#")[0] for url in urls} and len(urls) > 8
        assert [url for url in urls if not url.startswith((place, "data:"))] == []

    def test_schedules_and_events_are_shown_as_text(self, page, tmp_path):
        box, browser = page
        name, status = "<b>nightly</b>", ask_json(box, "status")
        event = {"id": "1", "time": 1.0, "type": "task.failed", "source": "task <i>", "payload": {"a": "<u>"}}
        server = apexd.HealthServer(str(tmp_path), {
            "health": lambda: {"overall": "unhealthy", "checks": {"disk": {"status": "unhealthy", "detail": "0 MiB"}}},
            "status": lambda: {**status, "last_hour": [[0, 0]] * 60},
            "tasks": lambda **of: {"tasks": []},
            "processes": lambda: {"processes": []},
            "schedules": lambda: {"schedules": [
                {"name": name, "cron": "@daily", "next": ["2027-03-09T03:00:00-04:00"], "result": "failed"},
                {"name": "off", "cron": "@hourly", "next": [], "result": None},
            ]},
            "events": lambda: {"events": [event]},
        })  # fmt: skip
        server.start("127.0.0.1", 0)
        try:
            browser.call("Page.navigate", url=server.url)
            eventually(lambda: "task.failed" in browser.run("at('events').innerText"))
            assert 'a="<u>"' in browser.run("at('events').innerText")
            text = browser.run("at('schedules').innerText")
            assert name in text and "@daily" in text and "3/9/27" in text and "Invalid" not in text
            assert browser.run("at('health').innerText") == "unhealthy; disk: 0 MiB"
        finally:
            server.stop()

    def test_without_the_key_it_shows_no_commands(self, page):
        box, browser = page
        browser.call("Page.navigate", url="about:blank")
        browser.call("Page.navigate", url=f"http://127.0.0.1:{http_json(box)['port']}/")
        eventually(lambda: browser.run("document.querySelector('#latest tr') !== null"))
        text = browser.run("document.body.innerText")
        assert "prints the address" in text and "task 2" in text and "out-42" not in text
        browser.run(f"location.hash = '{'0' * 64}'")
        wrong = lambda: browser.run("document.readyState === 'complete' && document.body.innerText")
        eventually(lambda: "prints the address" in (wrong() or ""), why="a key that is not the daemon's")
        browser.run(f"location.hash = '{http_json(box)['key']}'")
        eventually(lambda: "out-42" in browser.run("document.body.innerText"))
        assert "prints the address" not in browser.run("document.body.innerText")

    @slow
    def test_ten_thousand_tasks_change_nothing(self, page):
        box, browser = page
        box.batch(["true"] * 10_000)
        began = time.monotonic()
        browser.run("turn()")
        assert time.monotonic() - began < 3
        eventually(lambda: re.search("queued|succeeded", browser.run("at('queue').innerText")))
        assert browser.run("document.querySelectorAll('tr').length") < 200
        cancel_all(box)


@posix
class TestHttp:
    PATHS = ("/", "/health", "/ready", "/metrics", "/api/status", "/api/tasks", "/api/processes")

    @pytest.fixture(scope="class", name="up")
    @classmethod
    def up(cls):
        """Give a Box whose daemon runs, with a process that is up; it stays unchanged."""
        nightly = {"cron": "@daily", "command": "true", "timezone": "UTC"}
        with project(process={"web": {"command": ["sleep", "600"]}}, schedule={"nightly": nightly}) as box:
            box.start()
            until_all(box, "web", "running")
            yield box

    @pytest.mark.parametrize("path", PATHS)
    def test_what_is_asked_for_comes_with_strict_headers_and_without_a_body_by_head(self, up, path):
        status, headers, body = http(up, path)
        assert status == 200 and int(headers["Content-Length"]) == len(body) > 10
        assert headers["Cache-Control"] == "no-store" and headers["Connection"] == "close"
        assert headers["X-Content-Type-Options"] == "nosniff"
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy and "*" not in policy
        assert {"Server"} | {n for n in headers if n.startswith("Access-Control")} & set(headers) == {"Server"}
        assert "Server" not in headers
        status, of_head, body = http(up, path, "HEAD")
        assert (status, body) == (200, b"")
        assert abs(int(of_head["Content-Length"]) - int(headers["Content-Length"])) < 40

    def test_health_names_what_was_looked_at(self, up):
        answer = page_json(up, "/health")
        assert answer["overall"] == "healthy", answer
        assert set(answer["checks"]) == set("store runner keeper supervisor disk clock".split())
        assert {one["status"] for one in answer["checks"].values()} == {"healthy"}
        assert page_json(up, "/ready") == {"ready": True, "why": []}
        assert ask_json(up, "health")["overall"] == "healthy"

    @pytest.mark.parametrize(
        "host", ["127.0.0.1:PORT", "localhost:PORT", "[::1]:PORT", "LOCALHOST:PORT", " 127.0.0.1:PORT "]
    )
    def test_this_machines_names_are_served(self, up, host):
        assert http(up, "/health", host=host)[0] == 200

    @pytest.mark.parametrize(
        "host",
        ["evil.example", "evil.example:PORT", "", ":PORT", None, "127.0.0.1", "localhost", "127.0.0.1:1",
         "localhost.evil.example:PORT", "127.0.0.1:PORT@evil.example", "127.0.0.1:PORT\r\nHost: evil.example"],
    )  # fmt: skip
    def test_another_host_gets_nothing(self, up, host):
        """I2"""
        for path in ("/", "/api/status", "/nothing"):
            status, headers, body = http(up, path, host=host)
            assert (status, body) == (403, b"403\n"), (host, path)

    def test_only_reading_and_only_from_the_page_itself(self, up):
        """I3"""
        for origin in ("http://evil.example", "null", "http://127.0.0.1", "https://127.0.0.1:PORT"):
            status, headers, _ = http(up, "/api/status", Origin=origin)
            assert status == 403 and not any(name.startswith("Access-Control") for name in headers)
        assert http(up, "/api/status", Origin="http://127.0.0.1:PORT")[0] == 200
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT", "get", "BREW"):
            status, headers, body = http(up, "/api/status", method)
            assert (status, headers["Allow"], body) == (405, "GET, HEAD", b"405\n"), method
        for path in ("/nothing", "/api/", "/api/shutdown", "/../etc/passwd", "*", "/health/"):
            assert http(up, path)[0] == 404, path

    def test_too_much_of_anything_is_refused(self, up):
        """I4"""
        assert http(up, "/" + "a" * 100_000)[0] == 414
        assert http(up, "/health", X="a" * 100_000)[0] == 431
        assert http(up, "/health", **{f"X-{n}": "a" for n in range(200)})[0] == 431
        assert http(up, "/health", Content_Length=5)[0] == 413
        assert http(up, "/health", Transfer_Encoding="chunked")[0] == 413
        assert http(up, "/health", Content_Length=5, Transfer_Encoding="chunked")[0] == 413
        assert http(up, "/health", Content_Length=0)[0] == 200
        huge = b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 3000000\r\n\r\n" + b"a" * 3_000_000
        assert send_raw(up, huge)[:12] in (b"HTTP/1.1 403", b"")

    @pytest.mark.parametrize(
        "data",
        [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n\n", b"GET /health\r\n\r\n", b"\r\n\r\n", b"\n\n",
         b"GET /health HTTP/0.9\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET  /  HTTP/1.1\r\n\r\n",
         b"GET / HTTP/1.1\r\nHost\r\n\r\n", b"GET / HTTP/99999999999999.1\r\n\r\n", b"\0" * 100 + b"\n\n",
         b"GET / HTTP/1.1\r\n: x\r\n\r\n", b"GET \xff\xfe HTTP/1.1\r\nHost: \xff\r\n\r\n"],
    )  # fmt: skip
    def test_what_is_no_request_is_refused_without_a_traceback(self, up, data):
        """I9"""
        lines = up.log().count("\n")
        answer = send_raw(up, data)
        assert split_answer(answer)[0] in (400, 403, 431, 505), answer
        assert http(up, "/health")[0] == 200
        assert "Traceback" not in up.log() and up.log().count("\n") == lines

    def test_the_last_events_are_found_at_the_logs_ends(self, box):
        box.start()
        ids = enqueue(box, "exit 3", "true")
        for task_id in ids:
            box.until(task_id)
        seen = lambda path: [e["type"] for e in page_json(box, path)["events"]]
        eventually(lambda: {"task.failed", "task.succeeded"} <= set(seen("/api/events")))
        assert seen("/api/events?lines=1") == seen("/api/events")[-1:]
        assert "payload" not in page_json(box, "/api/events")["events"][0]
        whole = page_json(box, "/api/events", key=http_json(box)["key"])["events"]
        assert all(event["payload"] for event in whole if event["type"].startswith("task."))
        os.rename(box.file("events.log"), box.file("events.log.1"))
        write(box.file("events.log"), 'torn\n{"type": "x", "payload": {}}\n')
        assert seen("/api/events?lines=9")[-1] == "x" and len(seen("/api/events?lines=9")) > 2

    def test_random_bytes_leave_no_trace(self, up):
        """I9"""
        for seed in range(40):
            data = random.Random(seed).randbytes(300)
            answer = send_raw(up, data + b"\n\n" if seed % 2 else data[:200] + b"\n\n" + data)
            assert answer == b"" or split_answer(answer)[0] in (400, 403, 405, 505), answer
        assert "Traceback" not in up.log() and "failed" not in up.log()

    def test_a_field_that_is_wrong_is_named(self, up):
        answer = page_json(up, "/api/tasks?state=odd", 400)
        assert answer["error"]["code"] == "bad_request" and "state" in answer["error"]["message"]
        for query in ("limit=0", "limit=99999", "nonsense=1", "limit=%00", "state=%ff"):
            assert page_json(up, f"/api/tasks?{query}", 400)["error"]["hint"]
        assert page_json(up, "/api/logs?id=1&within=9", 400), "nobody may keep others waiting"
        assert page_json(up, "/api/logs?id=999", 400)["error"]["code"] == "unknown_task"
        (nightly,) = page_json(up, "/api/schedules")["schedules"]
        assert nightly["name"] == "nightly" and "T00:00:00+00:00" in nightly["next"][0]
        assert isinstance(page_json(up, "/api/events")["events"], list)

    def test_only_who_has_the_key_sees_commands_and_output(self, box):
        box.start()
        (task_id,) = enqueue(box, {"command": "echo secret-$((40 + 2)); sleep 60", "label": "<script>x"})
        box.until(task_id, "running")
        eventually(lambda: "secret-42" in box.output(task_id))
        key = http_json(box)["key"]
        assert len(key) == 64 and os.stat(box.file("http.json")).st_mode & 0o777 == 0o600
        for given in (None, "wrong", key[:-1], key + "0", "\xe9"):
            for path in ("/api/tasks", f"/api/logs?id={task_id}", "/api/status", "/", "/metrics"):
                assert b"secret" not in http(box, path, key=given)[2], (given, path)
        (task,) = page_json(box, "/api/tasks")["tasks"]
        assert task["label"] == "<script>x" and task["state"] == "running" and "command" not in task
        (task,) = page_json(box, "/api/tasks?state=running", key=key)["tasks"]
        assert task["command"].startswith("echo secret")
        logs = page_json(box, f"/api/logs?id={task_id}&offset=-1", key=key)
        assert base64.b64decode(logs["data"]) == b"secret-42\n"
        assert b"<script>x" not in http(box, "/")[2], "names come as JSON only (I5)"
        assert key not in box.log() + read(box.file("state.json"))
        status = box.run("status").stdout
        assert re.search(rf"page: http://127.0.0.1:{http_json(box)['port']}/#{key}", status)

    def test_metrics_can_be_read_and_add_up(self, box):
        """I6"""
        name, odd = 'a"b\\c', apexd.Exposition()
        odd.add("odd", "Odd.", 1, of='a"b\\c\nd', other="")
        assert str(odd).split("\n")[2] == 'odd{of="a\\"b\\\\c\\nd",other=""} 1'
        box.config({"group": {name: {"max_concurrent": 2}}, "process": {"web": {"command": "sleep 600"}}})
        box.start()
        until_all(box, "web", "running")
        flaky = {"command": "[ $APEX_ATTEMPT = 2 ] || exit 5", "retries": 1}
        ids = enqueue(box, "true", "exit 3", flaky, {"command": "exit 75"}, {"command": "true", "group": name})
        for task_id in ids:
            box.until(task_id, *(["scheduled"] if task_id == ids[3] else []))
        status, headers, body = http(box, "/metrics")
        assert headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        metrics = read_metrics(body.decode())
        finished, attempts = "apexd_tasks_finished_total", "apexd_attempts_total"
        assert sample(metrics, finished, state="succeeded") == 3
        assert sample(metrics, finished, state="failed") == 1, "what was tried again has not failed"
        ends = {labels["outcome"]: n for _, labels, n in metrics[attempts][1]}
        assert {x: n for x, n in ends.items() if n} == {"ok": 3, "failed": 2, "deferred": 1}
        assert sample(metrics, "apexd_task_run_seconds", "_count") == 6
        assert sample(metrics, "apexd_task_wait_seconds", "_count") == 5
        assert sample(metrics, "apexd_tasks", state="succeeded", group='a\\"b\\\\c') == 1
        assert sample(metrics, "apexd_process_up", process="web", instance="0") == 1
        assert 1e6 < sample(metrics, "process_resident_memory_bytes") < 1e9 or not IS_LINUX
        assert sample(metrics, "apexd_loop_turns_total") > 3 and sample(metrics, "apexd_database_bytes") > 4096
        text = box.run("metrics").stdout
        read_metrics(text)
        for word in ("started at: 20", "uptime: ", "processed: 4", "succeeded: 3", "failed: 1", "active task count: 0", "last poll at: 20"):
            assert f"# {word}" in text
        assert box.json("metrics")["tasks_succeeded"] == 3
        if shutil.which("promtool"):
            checked = subprocess.run(["promtool", "check", "metrics"], input=body, capture_output=True)
            assert (checked.returncode, checked.stderr) == (0, b""), checked

    def test_a_process_that_is_down_degrades_and_a_daemon_that_is_gone_is_unhealthy(self, box):
        box.config({"process": {"bad": {"command": "exit 3", "backoff": 60}}})
        assert "daemon" in box.run("health", rc=2).stdout
        box.start()
        eventually(lambda: page_json(box, "/health")["overall"] == "degraded")
        assert "down: bad.0 (backoff)" in box.run("health", rc=1).stdout
        assert page_json(box, "/ready")["ready"] is True
        if SLOW:
            os.kill(box.pid(), signal.SIGSTOP)
            try:
                assert box.json("health", rc=2)["overall"] == "unhealthy"
            finally:
                os.kill(box.pid(), signal.SIGCONT)

    @linux
    def test_several_who_look_see_the_same_use_of_the_processor(self, box):
        box.config({"process": {"busy": {"command": "while :; do :; done"}}})
        box.start()
        use = lambda: page_json(box, "/api/processes")["processes"][0]["cpu_percent"]
        eventually(use)
        seen = [use() for _ in range(12)]
        assert len(set(seen)) <= 4 and 0 < min(seen) <= max(seen) < 150, seen

    def test_a_daemon_that_stops_is_not_ready(self, box):
        """I8"""
        box.start()
        (task_id,) = enqueue(box, "until [ -e go ]; do sleep 0.05; done")
        box.until(task_id, "running")
        os.kill(box.pid(), signal.SIGTERM)
        answer = eventually(lambda: page_json(box, "/ready", 503))
        assert answer == {"ready": False, "why": ["it is stopping"]}
        assert page_json(box, "/health")["overall"] == "healthy"
        write(os.path.join(box.path, "go"), "")
        eventually(lambda: not lives_in(box.file("daemon.pid")))

    @slow
    @linux
    def test_a_keeper_that_hangs_is_told(self, box):
        box.start()
        (keeper,) = keepers(box)
        os.kill(keeper, signal.SIGSTOP)
        try:
            (task_id,) = enqueue(box, "true")
            found = lambda: page_json(box, "/health")["checks"]["keeper"]
            expected = {"status": "degraded", "detail": f"PID {keeper} owes an answer"}
            eventually(lambda: found() == expected, 30)
            assert page_json(box, "/ready")["ready"], "another takes what is to start"
        finally:
            os.kill(keeper, signal.SIGCONT)
        assert box.until(task_id)["state"] == "succeeded"
        eventually(lambda: found()["status"] == "healthy")

    @root
    @linux
    def test_a_full_disk_is_told(self, box):
        """I8"""
        with mounted(box.state, "size=6m,mode=0700"):
            box.start()
            answer = eventually(lambda: page_json(box, "/ready", 503))
            assert "disk: " in answer["why"][0] and "free" in answer["why"][0]
            with contextlib.suppress(OSError), open(box.file("filler"), "wb") as file:
                while True:
                    file.write(b"x" * 65536)
            checks = eventually(lambda: page_json(box, "/health", 503))["checks"]
            assert checks["disk"] == {"status": "unhealthy", "detail": "0 MiB free"}
            os.unlink(box.file("filler"))
            box.stop("--force")

    def test_what_hangs_is_named_and_hangs_nobody(self, tmp_path, monkeypatch):
        """I8"""
        monkeypatch.setattr(apexd, "HUNG_S", 0.3)
        monkeypatch.setattr(apexd, "HEALTH_WAIT_S", 0.3)
        go = threading.Event()
        with contextlib.closing(apexd.TaskStore(str(tmp_path / "state" / "apex.db"))) as store:
            runner = apexd.DaemonRunner(store, lambda task: 0, lambda: go.wait(60) and 60.0)
            supervisor = apexd.Supervisor(store, keepers=runner.keepers)
            verbs = apexd.HealthVerbs(runner, supervisor, apexd.ProcessVerbs(supervisor, store))
            health, ready = (verbs.table[name][1] for name in ("health", "ready"))
            assert "it is starting" in ready()["why"] and not ready()["ready"]
            runner.start()
            checks = eventually(lambda: [c for c in [health()["checks"]] if c["runner"]["status"] == "unhealthy"])[0]
            assert "hangs" in checks["runner"]["detail"] and checks["store"]["status"] == "healthy"
            with store.database.lock:
                began = time.monotonic()
                answers = [health() for _ in range(3)]
                assert time.monotonic() - began < 3
                assert answers[0]["checks"]["store"]["detail"] == "no answer within 300ms"
                assert [thread.name for thread in threading.enumerate()].count("health") == 1
            go.set()
            eventually(lambda: health()["checks"]["runner"]["status"] == "healthy")
            monkeypatch.setattr(apexd.Clock, "now", staticmethod(lambda: time.time() - 7200))
            assert health()["checks"]["clock"] == {"status": "degraded", "detail": "set back by 2h 0m"}
            runner.stop(0)

    def test_a_busy_port_is_named_and_nothing_starts(self, box):
        """I7"""
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            box.config({"health": {"port": port}})
            error = box.error("start", rc=73)
            assert f"port {port}" in error["message"] and "in use" in error["message"], error
            assert not os.path.exists(box.file("endpoint"))
            box.config({})
            box.start()
            pid, before = box.pid(), http_json(box)["port"]
            box.config({"health": {"port": port}})
            assert f"port {port}" in box.error("reload", rc=73)["message"]
            assert (box.pid(), http(box, "/health")[0]) == (pid, 200)
        box.run("reload")
        assert http_json(box)["port"] == port and http(box, "/health")[0] == 200
        box.config({"health": {"enabled": False}})
        box.run("reload")
        with pytest.raises(ConnectionRefusedError):
            http(box, "/health")
        assert "page:" not in box.run("status").stdout
        assert before != port and box.run("health").returncode == 0

    def test_the_address_of_the_page_stays(self, boxes):
        box, other = boxes(), boxes()
        box.start()
        before = http_json(box)
        box.run("restart")
        assert http_json(box) == before and http(box, "/health")[0] == 200
        box.stop()
        write(other.file("http.json"), json.dumps(before))
        other.start()
        assert http_json(other) == before
        box.start()
        assert http_json(box)["port"] != before["port"] and http_json(box)["key"] == before["key"]
        for damaged in ('{"port": "x"}', '{"port": 99999}', "", "[1]", "\0")[: None if SLOW else 1]:
            other.stop()
            write(other.file("http.json"), damaged)
            other.start()
            assert http(other, "/health")[0] == 200

    @pytest.mark.skipif(IS_WINDOWS or os.geteuid() != 0, reason="needs root: a port below 1024")
    def test_port_80_is_served_as_browsers_name_it(self, tmp_path):
        server = apexd.HealthServer(str(tmp_path), {"health": lambda: {"overall": "healthy"}})
        try:
            server.start("127.0.0.1", 80)
        except apexd.DaemonError:
            pytest.skip("port 80 is in use")
        try:
            for host in ("127.0.0.1", "localhost", "[::1]", "127.0.0.1:80"):
                assert talk_http(80, f"GET /health HTTP/1.1\r\nHost: {host}\r\n\r\n").startswith(b"HTTP/1.1 200"), host
            assert talk_http(80, "GET /health HTTP/1.1\r\nHost: evil\r\n\r\n").startswith(b"HTTP/1.1 403")
        finally:
            server.stop()

    def test_a_host_that_is_none_is_refused_and_a_page_that_is_off_warns_of_nothing(self, box):
        for host in ("", "[::1]", "a b", "x/y"):
            box.config({"health": {"host": host}})
            assert "health.host" in box.error("start", rc=78)["message"]
        box.config({"health": {"host": "0.0.0.0", "enabled": False}})
        box.start()
        assert "WARN" not in box.log()

    def test_a_service_managers_socket_is_served_at_all_its_addresses_and_only_one_of_tcp(self, tmp_path, caplog):
        server = apexd.HealthServer(str(tmp_path), {"health": lambda: {"overall": "healthy"}})
        options = apexd.SimpleNamespace(enabled=True, host="127.0.0.1", port=0)
        with socket.socket(socket.AF_UNIX) as other, pytest.raises(apexd.DaemonError, match="not one of TCP"):
            server.listen(options, other)
        if not socket.has_dualstack_ipv6():
            pytest.skip("needs IPv6")
        with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as both:
            caplog.clear()
            server.listen(options, both)
            assert "other machines may reach it" in caplog.text and server.url.startswith("http://[::1]:")
            with socket.create_connection(("127.0.0.2", both.getsockname()[1]), 5) as connection:
                connection.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.2:%d\r\n\r\n" % both.getsockname()[1])
                assert connection.recv(1000).startswith(b"HTTP/1.1 200")
            server.stop()

    @pytest.mark.parametrize("key", ["x", 5, "\ud800", {"a": 1}, "A" * 64])
    def test_a_damaged_key_is_replaced(self, tmp_path, key):
        write(tmp_path / "http.json", json.dumps({"port": -1, "key": key}))
        server = apexd.HealthServer(str(tmp_path), {})
        server.start("127.0.0.1", 0)
        server.stop()
        assert re.fullmatch("[0-9a-f]{64}", server.key)
        assert json.loads(read(tmp_path / "http.json"))["key"] == server.key

    def test_who_reads_slowly_keeps_nobody_out(self, tmp_path):
        """I1"""
        huge = {"tasks": ["x" * 1000] * 10_000}
        server = apexd.HealthServer(str(tmp_path), {"tasks": lambda: huge, "health": lambda: {"overall": "healthy"}})
        server.start("127.0.0.1", 0)
        port, slow_ones = json.loads(read(tmp_path / "http.json"))["port"], []
        ask = f"GET %s HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n"
        try:
            for _ in range(apexd.HTTP_CONNECTIONS_MAX):
                slow_ones.append(socket.socket())
                slow_ones[-1].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                slow_ones[-1].connect(("127.0.0.1", port))
                slow_ones[-1].sendall((ask % "/api/tasks").encode())
            for one in slow_ones:
                assert select.select([one], [], [], 10)[0]
            began = time.monotonic()
            assert talk_http(port, ask % "/health").startswith(b"HTTP/1.1 200")
            assert time.monotonic() - began < 2.0
        finally:
            for one in slow_ones:
                one.close()
            server.stop()

    def test_what_fails_names_no_path_to_who_has_no_key(self, tmp_path):
        def fail():
            raise apexd.DaemonError("DATABASE_FAILED", "/home/secret/apex.db: is full", "look at /home/secret")

        server = apexd.HealthServer(str(tmp_path), {"tasks": fail})
        server.start("127.0.0.1", 0)
        try:
            port = json.loads(read(tmp_path / "http.json"))["port"]
            ask = f"GET /api/tasks HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
            answer = talk_http(port, ask + "\r\n")
            assert b" 503 " in answer and b"database_failed" in answer and b"secret" not in answer
            assert b"secret" in talk_http(port, f"{ask}Authorization: Bearer {server.key}\r\n\r\n")
        finally:
            server.stop()

    def test_a_state_folder_that_is_gone_spoils_no_other_check_and_is_not_named(self, tmp_path, monkeypatch):
        with contextlib.closing(apexd.TaskStore(str(tmp_path / "state" / "apex.db"))) as store:
            runner = apexd.DaemonRunner(store, lambda task: 0)
            supervisor = apexd.Supervisor(store, keepers=runner.keepers)
            health = apexd.HealthVerbs(runner, supervisor, apexd.ProcessVerbs(supervisor, store)).table["health"][1]
            os.rename(tmp_path / "state", tmp_path / "away")
            answer = health()
            checks = {name: one["status"] for name, one in answer["checks"].items()}
            assert (checks["disk"], checks["supervisor"]) == ("unhealthy", "healthy"), answer
            assert str(tmp_path) not in json.dumps(answer)
            os.rename(tmp_path / "away", tmp_path / "state")

            def start(thread):
                raise RuntimeError("can't start new thread")

            with monkeypatch.context() as patch:
                patch.setattr(threading.Thread, "start", start)
                assert health()["checks"]["store"] == {"status": "unhealthy", "detail": "it could not be looked at"}
            assert health()["checks"]["store"]["status"] == "healthy"

    @linux
    def test_a_daemon_without_descriptors_says_so_once(self, box):
        import resource

        box.start()
        pid, port = box.pid(), http_json(box)["port"]
        http(box, "/health")
        soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, hard))
        with socket.create_connection(("127.0.0.1", port), 5) as connection:
            eventually(lambda: "Too many open files" in box.log())
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n" % port)
            assert select.select([connection], [], [], 0.5)[0] == []
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
            assert b" 200 " in connection.recv(100)
        assert times_logged(box, "a connection was refused") == 1

    @linux
    def test_who_listens_elsewhere_keeps_no_descriptor(self, tmp_path):
        import gc

        server, count = apexd.HealthServer(str(tmp_path), {}), lambda: len(os.listdir("/proc/self/fd"))
        before = count()
        gc.disable()
        try:
            for _ in range(9):
                server.start("127.0.0.1", 0)
                server.stop()
            eventually(lambda: count() < before + 9)
        finally:
            gc.enable()

    def test_a_source_that_fails_is_answered_and_logged(self, tmp_path, caplog):
        server = apexd.HealthServer(str(tmp_path), {"status": lambda: 1 / 0, "health": lambda: {"overall": "healthy"}})
        server.start("127.0.0.1", 0)
        try:
            url = server.url.partition("#")[0]
            with urllib.request.urlopen(url + "health", timeout=10) as answer:
                assert json.load(answer) == {"overall": "healthy"}
            with pytest.raises(urllib.error.HTTPError, match="500"):
                urllib.request.urlopen(url + "api/status", timeout=10)
            assert "ZeroDivisionError" in caplog.text
        finally:
            server.stop()

    def flood(self, box, count, seconds):
        """Keep `count` half-open connections and send random bytes; return how slow /health was."""
        port, slowest, held = http_json(box)["port"], [], []
        deadline = time.monotonic() + seconds
        try:
            while time.monotonic() < deadline or len(held) < count:
                for _ in range(50):
                    held.append(socket.create_connection(("127.0.0.1", port), 5))
                    with contextlib.suppress(ConnectionError):
                        held[-1].sendall(random.choice([b"", b"GET /hea", random.randbytes(50)]))
                for connection in held[:-count]:
                    connection.close()
                del held[:-count]
                began = time.monotonic()
                assert http(box, "/health")[0] == 200
                slowest.append(time.monotonic() - began)
        finally:
            for connection in held:
                connection.close()
        return sorted(slowest)

    @linux
    def test_half_open_connections_and_noise_hold_up_nobody(self, box):
        """I1"""
        box.start()
        http(box, "/health")
        threads, memory = status_of(box, "Threads"), status_of(box, "VmRSS")
        slowest = self.flood(box, 500, 60 if SLOW else 0.5)
        assert slowest[len(slowest) // 2] < 0.1, slowest
        assert not SLOW or slowest[-1] < 1.0, slowest
        eventually(lambda: status_of(box, "Threads") <= threads, why="no thread is left")
        assert status_of(box, "VmRSS") < memory + 5000
        assert len(os.listdir(f"/proc/{box.pid()}/fd")) < 40

    @slow
    def test_a_drip_is_cut_off_after_its_time(self, up):
        """I1"""
        with socket.create_connection(("127.0.0.1", http_json(up)["port"]), 10) as connection:
            began = time.monotonic()
            with contextlib.suppress(ConnectionError):
                for byte in b"GET /health HTTP/1.1\r\nHost: x" + b"x" * 1000:
                    connection.sendall(bytes([byte]))
                    if select.select([connection], [], [], 0.1)[0]:
                        break
            assert apexd.HTTP_TIMEOUT_S - 1 < time.monotonic() - began < apexd.HTTP_TIMEOUT_S + 3


# ============================================================================
# 18. DAEMON - wiring, start order, signals, reload, stop; DaemonManager
# ============================================================================


def times_logged(box, text):
    """Return how often a text is in daemon.log."""
    return box.log().count(text)


@contextlib.contextmanager
def mounted(folder, options):
    """Mount a tmpfs on a folder; skip the test where that is not allowed."""
    words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@posix
class TestDaemon:
    @pytest.fixture
    def box(self, box):
        """Give a project whose commands are run as people run them."""
        box.is_quick = False
        return box

    @pytest.fixture(scope="class", name="shared")
    @classmethod
    def shared(cls):
        """Give a project with a daemon, for the tests that do not end it."""
        with project() as box:
            box.start()
            yield box

    @pytest.mark.parametrize("mode", ["fork", "spawn"])
    def test_start_answers_soon_prints_its_pid_and_stop_leaves_only_the_folder(self, box, mode):
        os.unlink(box.file("config.json"))
        os.rmdir(box.state)
        before = set(os.listdir(box.root))
        began = time.monotonic()
        shown = box.run("start", "--mode", mode).stdout
        assert time.monotonic() - began < 10, "far less on an idle machine"
        assert shown == f"started, PID {box.pid()}\n"
        again = box.run("start", "--mode", mode).stdout
        assert again == f"already running, PID {box.pid()}\n"
        done = box.run("add", "--wait", "--", "sh", "-c", "echo hello; exit 3", rc=3)
        assert done.stdout == "hello\n"
        daemon = box.pid()
        box.stop()
        assert not lives(daemon) and not box.processes()
        assert sorted(os.listdir(box.path)) == [".apex", "apexd.py"]
        assert set(os.listdir(box.root)) == before and os.listdir(box.home) == []
        left = set(os.listdir(box.state))
        assert not left & {"daemon.pid", "control.sock", "endpoint"}
        assert box.run("stop").stdout == "not running\n"

    @linux
    @pytest.mark.parametrize("mode", ["fork", "spawn"])
    def test_a_daemon_keeps_nothing_of_its_caller(self, box, mode):
        reader, writer = os.pipe()
        closed = ["sh", "-c", 'exec "$@" 0<&- 1>&- 2>&-', "sh"]
        words = [*closed, *box.command("start", "--mode", mode)]
        child = subprocess.Popen(
            words, cwd=box.home, pass_fds=[writer], env={**box.env, "APEX_PROJECT_PATH": box.path}
        )
        os.close(writer)
        assert child.wait(20) == 0
        with open(reader, "rb") as pipe:
            assert pipe.read() == b"", "nobody holds the caller's pipe any more"
        daemon = box.pid()
        targets = {n: os.readlink(f"/proc/{daemon}/fd/{n}") for n in range(3)}
        assert set(targets.values()) == {"/dev/null"}
        assert os.readlink(f"/proc/{daemon}/cwd") == box.state
        assert "Umask:\t0077" in read(f"/proc/{daemon}/status")
        assert os.getsid(daemon) != os.getsid(0)
        assert "SigBlk:\t0000000000000000" in read(f"/proc/{daemon}/status")

    def test_every_file_is_the_owners_alone(self, box):
        previous = os.umask(0)
        try:
            shutil.rmtree(box.state)
            box.start()
            box.run("add", "--wait", "--", "true")
            eventually(lambda: os.path.exists(box.file("state.json")))
            box.kill9()
            modes = {}
            for folder, names, files in os.walk(box.state):
                for name in [*names, *files]:
                    path = os.path.join(folder, name)
                    modes[os.path.relpath(path, box.state)] = os.lstat(path).st_mode
            assert {"apex.db", "apex.db-wal", "control.sock", "heartbeat"} <= set(modes)
            loose = {n: oct(m) for n, m in modes.items() if m & 0o077 and "cache" not in n}
            assert loose == {}
            assert stat.S_IMODE(os.stat(box.state).st_mode) == 0o700
        finally:
            os.umask(previous)

    @linux
    @pytest.mark.parametrize("mode", ["fork", "spawn"])
    def test_restart_leaves_a_running_task_its_pid_its_attempt_and_its_code(self, box, mode):
        daemon = box.start("--mode", mode)
        (task_id,) = enqueue(box, "until [ -e go ]; do sleep 0.05; done; exit 6")
        pid = command_of(box, task_id)
        box.run("restart", "--mode", mode)
        assert eventually(lambda: box.look(task_id)["pid"]) == pid
        write(os.path.join(box.path, "go"), "")
        assert box.pid() != daemon and not lives(daemon)
        task = box.until(task_id)
        assert (task["exit_code"], task["attempts"]) == (6, 1)

    def test_restart_drain_lets_tasks_finish_first(self, box):
        assert "started" in box.run("restart").stdout, "also when none runs"
        daemon = box.pid()
        (task_id,) = enqueue(box, "until [ -e go ]; do sleep 0.05; done; exit 6")
        box.until(task_id, "running")
        restarting = box.popen("restart", "--drain")
        eventually(lambda: times_logged(box, "Received SIG"))
        write(os.path.join(box.path, "go"), "")
        restarting.communicate(timeout=60)
        assert restarting.returncode == 0
        task = box.look(task_id)
        assert (task["state"], task["exit_code"]) == ("failed", 6)
        assert box.pid() != daemon

    def test_stop_lets_short_tasks_finish_and_interrupts_long_ones(self, box):
        box.config({"daemon": {"graceful_timeout": 1.5, "max_concurrent": 2}})
        box.start()
        wait = "until [ -e go ]; do sleep 0.05; done"
        short, long, next_one = enqueue(
            box, f"{wait}; exit 3", "[ $APEX_ATTEMPT = 2 ] || exec sleep 60", "exit 0"
        )
        box.until(long, "running")
        stopping = box.popen("stop")
        eventually(lambda: times_logged(box, "Received SIGTERM"))
        write(os.path.join(box.path, "go"), "")
        stopping.communicate(timeout=60)
        tasks = {task["id"]: task for task in ask_json(box, "list")}
        assert (tasks[short]["state"], tasks[short]["exit_code"]) == ("failed", 3)
        assert (tasks[long]["state"], tasks[long]["outcome"]) == ("queued", "interrupted")
        assert (tasks[next_one]["state"], tasks[next_one]["attempts"]) == ("queued", 0)
        box.start()
        settle(box, [long, next_one])
        assert history_of(box, long) == ["interrupted", "ok"]
        assert box.look(long)["losses"] == 0

    @linux
    def test_a_stopped_child_does_not_hold_up_the_stop(self, box):
        box.config({"daemon": {"graceful_timeout": 0.1, "stop_timeout": 40}})
        box.start()
        (task_id,) = enqueue(box, ["sleep", "60"])
        command = command_of(box, task_id)
        os.kill(command, signal.SIGSTOP)
        began = time.monotonic()
        box.stop()
        assert time.monotonic() - began < 30
        assert not lives(command)
        assert box.task(task_id)["exit_code"] == 128 + signal.SIGTERM

    def test_five_terms_at_once_are_one_graceful_stop(self, box):
        child = box.popen("start", "--foreground")
        eventually(lambda: os.path.exists(box.file("endpoint")))
        (task_id,) = eventually(lambda: enqueue(box, "until [ -e go ]; do sleep 0.05; done; exit 3"))
        box.until(task_id, "running")
        for _ in range(5):
            child.terminate()
        eventually(lambda: times_logged(box, "Received SIGTERM"))
        write(os.path.join(box.path, "go"), "")
        assert child.wait(30) == 0
        assert box.task(task_id)["exit_code"] == 3
        assert times_logged(box, "Received SIGTERM") == 1

    def test_a_second_term_after_a_second_stops_at_once(self, box):
        box.config({"daemon": {"graceful_timeout": 60}})
        child = box.popen("start", "--foreground")
        eventually(lambda: os.path.exists(box.file("endpoint")))
        (task_id,) = eventually(lambda: enqueue(box, "sleep 60"))
        box.until(task_id, "running")
        child.terminate()
        eventually(lambda: times_logged(box, "Received SIGTERM"))
        pause(1.1)
        assert child.poll() is None
        child.terminate()
        assert child.wait(30) == 0
        task = box.task(task_id)
        assert (task["state"], task["outcome"]) == ("queued", "interrupted")

    def test_of_a_burst_of_hups_the_last_file_counts_and_a_broken_one_changes_nothing(self, shared):
        box = shared
        daemon = box.pid()
        groups = lambda: box.request({"type": "queue"})["groups"]
        for number in range(1, 101):
            if number % 10 == 0:
                write(box.file("config.json"), '{"group": {"g": {"max_con')
                os.kill(daemon, signal.SIGHUP)
            box.config({"group": {"g": {"max_concurrent": number}}})
            os.kill(daemon, signal.SIGHUP)
        eventually(lambda: groups().get("g", {}).get("max_concurrent") == 100)
        write(box.file("config.json"), '{"group": {"g": {"max_concurrent": 0}}}')
        refused = times_logged(box, "reload refused")
        os.kill(daemon, signal.SIGHUP)
        eventually(lambda: times_logged(box, "reload refused") > refused)
        assert within(box, "reload")[0] == 78
        assert groups()["g"]["max_concurrent"] == 100
        box.config({"log": {"level": "debug"}})
        ask_json(box, "reload")  # one of the burst may have been before it
        eventually(lambda: times_logged(box, 'changed log.level: "info" -> "debug"') == 1)
        assert "; removed group.g" in box.log()
        assert ask(box, "reload") == "nothing changed\n"
        assert box.pid() == daemon and lives(daemon)

    def test_usr1_dumps_the_state_and_usr2_reopens_the_log(self, shared):
        box = shared
        daemon = box.pid()
        os.kill(daemon, signal.SIGUSR1)
        eventually(lambda: "thread runner" in box.log() and '"poll_count"' in box.log())
        state = eventually(lambda: json.loads(read(box.file("state.json")) or "null"))
        assert state["pid"] == daemon
        assert stat.S_IMODE(os.stat(box.file("state.json")).st_mode) == 0o600
        os.rename(box.file("daemon.log"), box.file("moved.log"))
        os.kill(daemon, signal.SIGUSR2)
        eventually(lambda: "reopened" in box.log())
        size = os.path.getsize(box.file("moved.log"))
        for _ in range(200):
            os.kill(daemon, signal.SIGUSR1)
        assert box.request({"type": "ping"})["type"] == "pong"
        ask(box, "reload")
        assert os.path.getsize(box.file("moved.log")) == size

    def test_heartbeat_and_state_are_rewritten_while_it_lives(self, shared):
        box = shared
        daemon = box.pid()
        first = eventually(lambda: read(box.file("heartbeat")))
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]{8}\.\d{3}Z\n", first)
        eventually(lambda: read(box.file("heartbeat")) != first)
        state = json.loads(read(box.file("state.json")))
        assert state["pid"] == daemon and state["version"] == apexd.__version__
        endpoint = json.loads(read(box.file("endpoint")))
        assert endpoint.get("socket", endpoint.get("port"))
        pid_file = json.loads(read(box.file("daemon.pid")))
        assert set(pid_file) == {"pid", "startedAt", "version", "projectPath"}
        assert pid_file["projectPath"] == box.path

    BROKEN = {
        "a config that is no JSON": ("config.json", b'{"daemon": ', 78, "config_invalid"),
        "a misspelt option": ("config.json", b'{"daemon": {"pol": 1}}', 78, "config_invalid"),
        "a database that is none": ("apex.db", b"not a database" * 1000, 65, "database_corrupt"),
        "a database cut off": ("apex.db", "cut", 65, "database_corrupt"),
        "a database with a bad page": ("apex.db", "page", 65, "database_corrupt"),
        "a newer database": ("apex.db", "newer", 78, "database_newer"),
    }

    @pytest.mark.parametrize("what", BROKEN)
    def test_start_says_why_it_fails_and_leaves_everything_as_it_was(self, box, what):
        name, content, status, code = self.BROKEN[what]
        ask(box, "add", "--batch", input=b"true\n" * 200)
        path = box.file(name)
        if isinstance(content, bytes):
            write(path, content)
        elif content == "newer":
            db = sqlite3.connect(path)
            db.execute("PRAGMA user_version = 999")
            db.close()
        else:
            with open(path, "r+b") as file:
                if content == "cut":
                    file.truncate(os.path.getsize(path) // 2)
                else:
                    file.seek(8192)
                    file.write(b"\xa5" * 4096)
        digest = sha256(path)
        done = box.run("start", rc=status)
        assert done.stdout == "" and path in done.stderr
        assert len(done.stderr.splitlines()) == 2, done.stderr
        with pytest.raises(apexd.DaemonError) as caught:
            apexd.Client(box.path).list() and apexd.Client(box.path).add(["true"])
        assert caught.value.code.lower() == code
        assert sha256(path) == digest, "kept as it is"
        assert not os.path.exists(box.file("daemon.pid")) and not box.processes()

    @linux
    @root
    def test_start_in_a_read_only_folder_names_it_and_exits_with_73(self, box):
        os.unlink(box.file("config.json"))
        os.rmdir(box.state)
        with mounted(box.path, "ro"):
            words = [sys.executable, "-B", PROGRAM, "--project", box.path, "start"]
            done = subprocess.run(words, env=box.env, capture_output=True, text=True)
            assert (done.returncode, done.stdout) == (73, ""), done
            assert box.path in done.stderr and len(done.stderr.splitlines()) == 2
        assert not box.processes()

    def test_in_the_foreground_it_logs_to_stderr_and_ends_with_0(self, box):
        child = box.popen("start", "--foreground")
        eventually(lambda: os.path.exists(box.file("endpoint")))
        eventually(lambda: box.request({"type": "ping"}))
        assert box.pid() == child.pid
        second = box.run("start", "--no-daemon", rc=75)
        assert str(child.pid) in second.stderr and "Traceback" not in second.stderr
        assert box.run("start").stdout == f"already running, PID {child.pid}\n"
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=30)
        assert child.returncode == 0
        line = rb"\[\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z\] \[(INFO|WARN)\] .+"
        assert out == b"" and all(re.fullmatch(line, text) for text in err.splitlines()), err
        assert b"ready" in err and b"stopped" in err

    @linux
    @root
    @needs("unshare", "nsenter")
    def test_as_pid_1_it_reaps_orphans_gets_codes_right_and_can_be_stopped(self, box):
        words = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
        child = subprocess.Popen(
            [*words, *box.command("start", "--foreground")],
            cwd=box.path, env=box.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        box.children.append(child)
        eventually(lambda: os.path.exists(box.file("endpoint")) or child.poll() is not None)
        if not os.path.exists(box.file("endpoint")):
            pytest.skip("unshare does not work here")
        assert eventually(lambda: box.pid()) == 1
        orphan = "(sh -c 'sleep 0.2; exit 3' &); exit 7"
        ids = enqueue(box, *[orphan] * 20)
        assert [task["exit_code"] for task in settle(box, ids)] == [7] * 20
        daemon = int(read(f"/proc/{child.pid}/task/{child.pid}/children").split()[0])

        def zombies():
            pids = read(f"/proc/{daemon}/task/{daemon}/children").split()
            return [pid for pid in pids if not lives(int(pid))]

        eventually(lambda: len(box.processes().keys() - {daemon, child.pid}) == 1, why="a keeper")
        eventually(lambda: not zombies(), why="orphans are reaped")
        def inside(verb):
            words = ["nsenter", f"--target={daemon}", "--pid", "--mount"]
            words += box.command("--project", box.path, verb)
            return subprocess.run(words, env=box.env, capture_output=True, text=True)

        assert "running, PID 1," in inside("status").stdout
        stopped = inside("stop")
        assert stopped.returncode in (0, -9), stopped  # the kernel ends all when PID 1 ends
        assert child.wait(30) == 0

    @linux
    def test_kill_ends_the_daemon_alone_and_kill_all_its_tasks_too(self, box):
        daemon = box.start()
        (task_id,) = enqueue(box, "[ $APEX_ATTEMPT = 3 ] && exit 4; sleep 60")
        command = command_of(box, task_id)
        assert box.json("kill")["pid"] == daemon
        assert not lives(daemon) and lives(command)
        assert box.run("kill").stdout == "not running; 1 task still running\n"
        status = box.run("status", rc=3)
        assert status.stdout == "not running; 1 task still running\n", "L5: no PID file is left"
        assert not {"daemon.pid", "control.sock", "endpoint"} & set(os.listdir(box.state))
        box.run("kill", "--all")
        eventually(lambda: not lives(command))
        box.start()
        command = command_of(box, task_id)
        box.run("kill", "--all")
        eventually(lambda: not box.processes())
        box.start()
        task = settle(box, [task_id])[0]
        assert (task["exit_code"], task["losses"]) == (4, 0)
        assert history_of(box, task_id) == ["interrupted", "interrupted", "failed"]

    @linux
    def test_without_a_daemon_cancel_and_kill_all_name_what_they_could_not_end(self, box):
        patch(box, STOP_MARGIN_S=0.5)
        box.config({"daemon": {"stop_timeout": 0.5}})
        box.start()
        (task_id,) = enqueue(box, "sleep 60")
        command, keeper = command_of(box, task_id), keeper_of(box)
        os.kill(keeper, signal.SIGSTOP)
        box.kill9()
        done = box.run("cancel", task_id, rc=1)
        assert (done.stdout, done.stderr.split(": ")[1:]) == (
            f"cancelled: {task_id}\n", ["still running, no daemon", f"{task_id}\n"]
        )  # fmt: skip
        assert json.loads(box.run("--json", "cancel", task_id, rc=1).stdout)["left"] == [task_id]
        error = box.error("kill", "--all", rc=1)
        assert (error["code"], error["message"]) == ("stop_failed", f"still running: {task_id}")
        os.kill(keeper, signal.SIGCONT)
        box.run("kill", "--all")
        assert not lives(command)

    def test_kill_all_says_what_it_ended(self, box):
        box.config({}, process={"p": {"command": "exec sleep 1000", "instances": 2}})
        pid = box.start()
        for answer in (f"killed, PID {pid}", "not running"):
            (task_id,) = enqueue(box, ["sleep", "60"])
            box.until(task_id, "running")
            eventually(lambda: box.request({"type": "status"})["running_instances"] == 2)
            if answer == "not running":
                box.kill9()
            done = box.run("kill", "--all")
            assert done.stdout == f"{answer}; 1 task and 2 processes ended\n"
            assert "Timed out" not in done.stderr
            assert box.json("kill", "--all") == {"pid": None, "left": ""}
            box.start()
            ask(box, "cancel", task_id)
            box.until(task_id)

    def test_cancel_tells_those_that_are_ending_from_those_that_have_ended(self, box):
        box.config({"daemon": {"stop_timeout": 3, "max_concurrent": 1}})
        box.start()
        deaf, queued = enqueue(box, "trap '' TERM; while :; do sleep 0.1; done", "true")
        box.until(deaf, "running")
        command_of(box, deaf)
        assert box.run("cancel", queued).stdout == f"cancelled: {queued}\n"
        (queued,) = enqueue(box, "true")
        done = box.run("cancel", deaf, queued)
        assert done.stdout == f"cancelled: {queued}; ending: {deaf}\n"
        assert box.run("cancel", deaf).stdout == f"ending: {deaf}\n"
        assert box.until(deaf)["state"] == "cancelled"

    def test_one_that_is_cancelled_while_it_is_deferred_is_cancelled(self, box):
        box.start()
        (task_id,) = enqueue(box, "exit 75")
        box.until(task_id, "scheduled")
        waiting = box.popen("wait", task_id)
        box.run("cancel", task_id)
        assert waiting.communicate(timeout=20)[1] == f"apexd: task {task_id}: cancelled\n".encode()

    def test_a_stop_that_has_to_kill_says_what_runs_on_and_clears_up(self, box):
        """L5"""
        box.config({}, process={"p": {"command": "exec sleep 1000", "stop_timeout": 1}})
        pid = box.start()
        ids = enqueue(box, ["sleep", "60"], ["sleep", "60"])
        for task_id in ids:
            box.until(task_id, "running")
        eventually(lambda: box.json("ps")[0]["state"] == "running")
        os.kill(pid, signal.SIGSTOP)
        error = box.error("stop", "--timeout", "0.3", rc=1)
        assert error["code"] == "stop_killed" and not lives(pid)
        assert error["message"] == "killed after 300ms; 2 tasks and 1 process still running"
        assert not {"daemon.pid", "control.sock", "endpoint"} & set(os.listdir(box.state))
        assert "2 tasks and 1 process still running" in box.run("status", rc=3).stdout
        pid = box.start()
        assert [box.task(task_id)["attempts"] for task_id in ids] == [1, 1]
        os.kill(pid, signal.SIGSTOP)
        box.config({"daemon": {"graceful_timeout": 0, "stop_timeout": 0}})
        assert "killed" in box.run("restart", "--drain", timeout=90).stderr
        assert [box.task(task_id)["attempts"] for task_id in ids] == [1, 1]

    def test_a_restart_keeps_the_configuration_that_was_named(self, box):
        """L12: also one in the state folder, beside the one that would be found."""
        process = {"command": "exec sleep 1000", "stop_timeout": 0.2}
        box.config({})
        places = {"one": box.file("one.json"), "two": os.path.join(box.path, "two.json")}
        names = [
            write(place, json.dumps({"process": {name: process}})) for name, place in places.items()
        ]
        box.start("--config", names[0])
        before = eventually(lambda: box.json("ps")[0]["pid"])
        box.run("restart")
        assert eventually(lambda: box.json("ps")[0]["pid"]) == before
        assert box.run("reload").stdout == "nothing changed\n"
        box.run("restart", "--config", names[1])
        assert [one["name"] for one in box.json("ps")] == ["two"]
        os.unlink(names[1])
        assert box.error("restart", rc=78)["code"] == "config_invalid"
        assert box.run("status").returncode == 0
        box.run("down", "two")

    def test_a_start_that_failed_has_gone_when_it_answers(self, box):
        """L15"""
        box.add("true")
        write(box.file("apex.db"), b"no database" * 1000)
        for _ in range(5 if not SLOW else 50):
            box.run("start", rc=65)
            assert not box.processes()

    @pytest.mark.parametrize("how", ["removed", "replaced"])
    def test_a_database_that_goes_away_ends_the_daemon_with_65(self, box, how):
        child = box.popen("start", "--foreground")
        eventually(lambda: os.path.exists(box.file("endpoint")))
        go = os.path.join(box.path, "go")
        (task_id,) = eventually(lambda: enqueue(box, f"until [ -e {go} ]; do sleep 0.05; done"))
        box.until(task_id, "running")
        if how == "removed":
            os.unlink(box.file("apex.db"))
        else:
            write(box.file("other"), b"a backup")
            os.replace(box.file("other"), box.file("apex.db"))
        eventually(lambda: "removed or replaced" in box.log())
        write(go, "")
        assert child.wait(30) == 65
        assert b"apex.db was removed or replaced" in child.stderr.read()
        eventually(lambda: not box.processes())

    @posix
    def test_a_project_that_is_moved_starts_nothing_and_is_adopted_in_its_new_place(self, box):
        box.config({"daemon": {"poll_interval": 2}}, schedule={"often": {"cron": "@every 1s", "command": "echo it ran"}})
        child = box.popen("start", "--foreground")
        eventually(lambda: os.path.exists(box.file("endpoint")))
        go = os.path.join(box.root, "go")
        (task_id,) = enqueue(box, f"until [ -e {go} ]; do sleep 0.05; done; exit 5")
        pid = command_of(box, task_id)
        eventually(lambda: len(os.listdir(box.file("logs"))) > 1)
        away = box.path + "-away"
        os.rename(box.path, away)
        began = time.monotonic()
        assert child.wait(30) == 65
        assert time.monotonic() - began < 10, "it does not wait for the task"
        assert b"removed or replaced" in child.stderr.read()
        assert lives(pid) and not os.path.exists(box.path), "nothing was made anew"
        box.path, box.state = away, os.path.join(away, ".apex")
        assert "was killed" not in box.log()
        box.start()
        assert box.look(task_id)["pid"] == pid
        write(go, "")
        task = box.until(task_id)
        assert (task["exit_code"], task["attempts"]) == (5, 1)
        for each in box.json("list", "--state", "succeeded"):
            assert read(box.file("logs", f"task-{each['id']}.1.log")) == "it ran\n", each

    @linux
    @root
    def test_a_full_disk_loses_nothing_and_work_goes_on_when_space_returns(self, box):
        shutil.rmtree(box.state)
        os.mkdir(box.state)
        go = os.path.join(box.path, "go")
        with mounted(box.state, "size=4m,mode=0700"):
            try:
                box.config({"daemon": {"max_concurrent": 2}})
                box.start()
                wait = f"until [ -e {go} ]; do sleep 0.05; done"
                ids = enqueue(box, f"{wait}; exit 3", f"{wait}; exit 4")
                queued = enqueue(box, "exit 5", "exit 6")
                commands = [command_of(box, task_id) for task_id in ids]
                with open(box.file("filler"), "wb", buffering=0) as filler:
                    for size in (1 << 16, 4096, 1):
                        with contextlib.suppress(OSError):
                            while filler.write(b"x" * size):
                                pass
                refused = box.run("add", "--", "true", "x" * 100_000, rc=73)
                assert len(refused.stderr.splitlines()) == 2
                write(go, "")
                eventually(lambda: not any(map(lives, commands)))
                pause(0.5)
                assert box.request({"type": "ping"})["type"] == "pong"
                assert "Traceback" not in box.log()
                os.unlink(box.file("filler"))
                tasks = settle(box, ids + queued)
                assert [(t["exit_code"], t["attempts"]) for t in tasks] == [
                    (3, 1), (4, 1), (5, 1), (6, 1)
                ]  # fmt: skip
                assert len(box.json("list")) == 4
            finally:
                write(go, "")
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(box.file("filler"))
                box.run("stop", rc=None)

    def test_status_says_by_its_exit_code_how_things_are(self, box):
        assert ask(box, "status", rc=3) == "not running\n"
        assert not os.path.exists(box.file("apex.db")), "it changes nothing"
        daemon = box.start()
        assert f"PID {daemon}" in ask(box, "status")
        status = ask_json(box, "status")
        assert (status["running"], status["pid"], status["exit_status"]) == (True, daemon, 0)
        assert status["version"] == apexd.__version__ and status["project"] == box.path
        box.kill9()
        assert str(daemon) in ask(box, "status", rc=1)
        assert ask_json(box, "status", rc=1)["running"] is False
        write(box.file("daemon.pid"), "abc")
        assert "holds no PID" in ask(box, "status", rc=4)
        box.start()
        assert "PID" in ask(box, "status")

    def test_the_manager_does_in_python_what_the_commands_do(self, box):
        manager = apexd.DaemonManager(box.path)
        assert not manager.is_daemon_running()
        assert manager.get_status().exit_status == 3
        pid, was_running = manager.start_daemon()
        assert (pid, was_running) == (box.pid(), False)
        assert manager.start_daemon() == (pid, True)
        status = manager.get_status()
        assert (status.running, status.pid, status.exit_status) == (True, pid, 0)
        assert status.details["version"] == apexd.__version__
        assert manager.is_daemon_running()
        assert manager.stop_daemon() == pid
        assert manager.stop_daemon() is None and not lives(pid)
        pid, _ = manager.start_daemon()
        assert manager.kill_daemon() == pid and not lives(pid)
        assert manager.kill_daemon() is None


@posix
class TestDaemonPromises:
    """A daemon lives on, and keeps its times, when something that it does fails."""

    @linux
    def test_a_signal_that_asks_for_what_cannot_be_written_does_not_end_it(self, box):
        """L3"""
        daemon = box.start()
        shutil.rmtree(box.file("state.json"), ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(box.file("state.json"))
        os.mkdir(box.file("state.json"))
        os.kill(daemon, signal.SIGUSR1)
        eventually(lambda: "state.json" in box.log())
        os.rename(box.file("daemon.log"), box.file("kept"))
        os.symlink(os.devnull, box.file("daemon.log"))
        os.kill(daemon, signal.SIGUSR2)
        pause(0.3)
        for _ in range(ROUNDS):
            os.kill(daemon, signal.SIGUSR2)
            assert box.request({"type": "ping"})["type"] == "pong"
        os.unlink(box.file("daemon.log"))
        os.kill(daemon, signal.SIGUSR2)
        (task_id,) = enqueue(box, "exit 3")
        assert settle(box, [task_id])[0]["exit_code"] == 3 and box.pid() == daemon
        eventually(lambda: f"Task {task_id} ended, exit 3" in box.log())

    def test_a_second_failure_is_no_second_term(self, box):
        """L4"""
        critical = {"critical": True, "max_restarts": 0, "stop_timeout": 10}
        bye = "trap 'sleep 0.5; echo bye >bye; exit' TERM; while :; do sleep 0.05; done"
        box.config({"daemon": {"graceful_timeout": 20}}, process={
            "a": {**critical, "command": "until [ -e go ]; do sleep 0.02; done; exit 1"},
            "b": {**critical, "command": "until [ -e go ]; do sleep 0.02; done; sleep 1.2; exit 1"},
            "c": {"command": bye, "stop_timeout": 10},
        })  # fmt: skip
        daemon = box.start()
        until_all(box, "c")
        (task_id,) = enqueue(box, ["sleep", "2"])
        box.until(task_id, "running")
        put(box, "go")  # the second fails when a second TERM would count
        eventually(lambda: not lives(daemon))
        assert box.task(task_id)["state"] == "succeeded", "it had its graceful timeout"
        assert told(box, "bye") == [["bye"]], "it had its stop timeout"

    def test_each_timer_has_its_own_time_and_a_reload_takes_effect(self, box):
        """L10"""
        box.config({"daemon": {"poll_interval": 60, "heartbeat_interval": 1}})
        daemon = box.start()
        beats = set()
        eventually(lambda: beats.add(read(box.file("heartbeat"))) or len(beats) > 2, 5)
        polls = box.request({"type": "status"})["poll_count"]
        box.config({"daemon": {"poll_interval": 0.1, "heartbeat_interval": 1}})
        os.kill(daemon, signal.SIGHUP)
        eventually(lambda: box.request({"type": "status"})["poll_count"] > polls + 3, 5)
        for name in ("poll_interval", "heartbeat_interval"):
            box.config({"daemon": {name: 9999999999}})
            assert box.error("reload", rc=78)["code"] == "config_invalid"


# ============================================================================
# 19. SERVICE - what service managers are told and given, and what root gives up
# ============================================================================

# Becomes a program whose variables name the PID they are meant for. argv: the PID, "" for its
# own; a socket that it gets as descriptor 3, or ""; the program.
SERVE = (
    "import os, sys; pid, fd, *words = sys.argv[1:]; pid = pid or str(os.getpid()); "
    "fd and int(fd) != 3 and os.dup2(int(fd), 3); os.set_inheritable(3, True) if fd else 0; "
    "os.environ.update(WATCHDOG_PID=pid, LISTEN_PID=pid); os.execv(words[0], words)"
)


class Systemd:
    """What a service manager hears: a datagram socket, by path or abstract."""

    def __init__(self, box, is_abstract=False):
        self.path = os.path.join(box.root, "notify")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + self.path if is_abstract else self.path)
        self.address = "@" + self.path if is_abstract else self.path
        self.heard = []  # (when, {name: value})

    def start(self, box, pid="", fd="", **env):
        """Start the daemon as its service, with these variables."""
        box.warm()
        words = [sys.executable, "-I", "-S", "-c", SERVE, pid, str(fd)]
        words += box.command("start", "--foreground")
        env = {**box.env, "NOTIFY_SOCKET": self.address, **env}
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        fds = [fd] if fd else []
        child = subprocess.Popen(words, cwd=box.path, env=env, pass_fds=fds, **pipes)
        box.children.append(child)
        return child

    def hear(self, within_s=20.0):
        """Return the next message, None when there is none in time."""
        self.socket.settimeout(within_s)
        try:
            text = self.socket.recv(4096).decode()
        except socket.timeout:
            return None
        self.heard.append((time.monotonic(), dict(line.split("=", 1) for line in text.split("\n"))))
        return self.heard[-1][1]

    def until(self, name, value="1"):
        """Wait for a message with this line; return it."""
        while True:
            message = self.hear()
            assert message is not None, (name, value, self.heard)
            if message.get(name) == value:
                return message

    def silent_for(self, seconds):
        """Tell whether no ping comes for so long, beginning at some time soon."""
        return eventually(lambda: self.hear(seconds) is None, why="no ping comes any more")


@linux
class TestNotify:
    @pytest.mark.parametrize("is_abstract", [False, True])
    def test_a_service_manager_hears_of_start_watchdog_reload_and_stop(self, box, is_abstract):
        systemd = Systemd(box, is_abstract)
        daemon = systemd.start(box, WATCHDOG_USEC="300000")
        assert systemd.until("STATUS", "starting")["WATCHDOG_USEC"] == "3600000000"
        assert systemd.until("READY")["WATCHDOG_USEC"] == "300000", "as it was told"
        systemd.until("STATUS", "tasks: 0")
        for _ in range(4):
            systemd.until("WATCHDOG")
        pings = [at for at, message in systemd.heard if "WATCHDOG" in message]
        gaps = sorted(later - at for at, later in zip(pings, pings[1:]))
        assert gaps[0] < 0.25, "half of what is allowed"
        before = time.monotonic()
        os.kill(daemon.pid, signal.SIGHUP)
        message = systemd.until("RELOADING")
        assert before * 1e6 <= int(message["MONOTONIC_USEC"]) <= time.monotonic() * 1e6
        systemd.until("READY")
        assert times_logged(box, "reloaded: ") == 1, "it is ready when that is done"
        os.kill(daemon.pid, signal.SIGTERM)
        systemd.until("STOPPING")
        assert daemon.wait(20) == 0

    def test_it_hears_too_that_the_daemon_leaves_or_fails(self, box):
        systemd = Systemd(box)
        daemon = systemd.start(box)
        systemd.until("READY")
        box.request({"type": "shutdown", "keep": True})
        assert systemd.until("STOPPING")["STATUS"] == "stopping: leave"
        assert daemon.wait(20) == 0
        failing = {"command": "exit 3", "critical": True, "restart": "never"}
        box.config({}, process={"web": failing})
        daemon = systemd.start(box)
        systemd.until("STOPPING")
        assert daemon.wait(20) == 1

    def test_a_daemon_with_no_descriptor_left_goes_on(self, box):
        import resource

        systemd = Systemd(box)
        daemon = systemd.start(box, WATCHDOG_USEC="200000")
        systemd.until("WATCHDOG")
        former = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (3, former[1]))
        systemd.silent_for(0.5)
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, former)
        systemd.until("WATCHDOG")
        box.until(box.add("true"), "succeeded")
        daemon.terminate()
        assert daemon.wait(20) == 0

    @pytest.mark.parametrize("pid, usec", [("1", "100000"), ("", "0"), ("", "soon")])
    def test_a_watchdog_of_somebody_elses_is_not_fed(self, box, pid, usec):
        systemd = Systemd(box)
        daemon = systemd.start(box, pid, WATCHDOG_USEC=usec)
        systemd.until("READY")
        assert systemd.hear(0.3) is None
        daemon.terminate()
        systemd.until("STOPPING")
        told = {name for _, message in systemd.heard for name in message}
        assert not told & {"WATCHDOG", "WATCHDOG_USEC"}

    def test_a_manager_that_has_gone_or_reads_nothing_hinders_nobody(self, box):
        systemd = Systemd(box)
        daemon = systemd.start(box, WATCHDOG_USEC="10000")
        eventually(lambda: os.path.exists(box.file("endpoint")))
        for _ in range(5):
            assert box.quick("add", "--wait", "--", "true").returncode == 0
        systemd.socket.close()
        os.unlink(systemd.path)
        box.until(box.add("true"), "succeeded")
        daemon.terminate()
        assert daemon.wait(20) == 0

    def test_a_hung_keeper_silences_the_watchdog_and_its_return_feeds_it(self, box):
        systemd = Systemd(box)
        daemon = systemd.start(box, WATCHDOG_USEC="400000")
        systemd.until("WATCHDOG")
        (keeper,) = eventually(lambda: keepers(box))
        os.kill(keeper, signal.SIGSTOP)
        try:
            systemd.silent_for(0.5)
            assert box.request({"type": "ping"})["pid"] == daemon.pid, "the daemon itself is well"
        finally:
            os.kill(keeper, signal.SIGCONT)
        systemd.until("WATCHDOG")
        daemon.terminate()
        assert daemon.wait(20) == 0

    def test_a_hung_runner_is_not_fed_for_and_the_next_daemon_adopts_its_tasks(self, box):
        systemd = Systemd(box)
        daemon = systemd.start(box, WATCHDOG_USEC="400000", APEXD_FAILPOINT="look:25:hang")
        systemd.until("READY")
        task = box.add("sh", "-c", "sleep 2; exit 7")
        systemd.silent_for(0.5)
        assert box.request({"type": "ping"})["pid"] == daemon.pid
        daemon.send_signal(signal.SIGABRT)  # what the watchdog of systemd sends
        assert daemon.wait(20) == -signal.SIGABRT
        daemon = systemd.start(box, WATCHDOG_USEC="400000")
        systemd.until("WATCHDOG")
        assert box.until(task, "failed")["exit_code"] == 7
        assert box.task(task)["attempts"] == 1
        daemon.terminate()
        assert daemon.wait(20) == 0

    def test_only_a_service_tells(self, box):
        systemd = Systemd(box)
        box.start(env={"NOTIFY_SOCKET": systemd.address})
        assert systemd.hear(0.1) is None

    def test_signals_that_come_before_there_are_handlers_are_kept(self, box):
        box.config({"daemon": {"graceful_timeout": 1}})
        for _ in range(ROUNDS):
            systemd = Systemd(box)
            daemon = systemd.start(box)
            blocked = f"/proc/{daemon.pid}/status"
            eventually(lambda: "apexd\0_daemon" in read(f"/proc/{daemon.pid}/cmdline"))
            os.kill(daemon.pid, signal.SIGHUP)
            assert systemd.until("RELOADING"), read(blocked)
            daemon.terminate()
            assert daemon.wait(20) == 0
            systemd.socket.close()
            os.unlink(systemd.path)


@linux
class TestSocketActivation:
    def listen(self, box):
        """Listen as a service manager does; return the socket, as descriptor 3 of the test."""
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(os.path.join(box.root, "control"))
        listener.listen(16)
        return listener

    def start(self, box, listener, pid="", names="control"):
        systemd = Systemd(box)
        child = systemd.start(box, pid, listener.fileno(), LISTEN_FDS="1", LISTEN_FDNAMES=names)
        systemd.until("READY")
        systemd.socket.close()
        os.unlink(systemd.path)
        return child

    def ask(self, box, connection):
        connection.sendall(frame({"type": "ping"}))
        return read_frame(connection)["pid"]

    def connect(self, listener):
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(20)
        connection.connect(listener.getsockname())
        return connection

    def test_an_update_drops_no_request(self, box):
        listener = self.listen(box)
        waiting = self.connect(listener)  # before there is any daemon
        waiting.sendall(frame({"type": "ping"}))
        for _ in range(2):
            daemon = self.start(box, listener)
            assert read_frame(waiting)["pid"] == daemon.pid == box.json("status")["pid"]
            assert self.ask(box, self.connect(listener)) == daemon.pid
            daemon.terminate()
            assert daemon.wait(20) == 0
            assert os.path.exists(listener.getsockname()), "it is the service manager's"
            waiting = self.connect(listener)
            waiting.sendall(frame({"type": "ping"}))
        daemon = self.start(box, listener)
        assert read_frame(waiting)["pid"] == daemon.pid
        daemon.terminate()
        assert daemon.wait(20) == 0

    def test_no_request_is_dropped_while_daemons_come_and_go(self, box):
        listener, answers, over = self.listen(box), [], threading.Event()

        def ask():
            while not over.is_set():
                with self.connect(listener) as connection:
                    try:
                        answers.append(self.ask(box, connection))
                    except (OSError, TypeError) as error:
                        answers.append(error)

        daemons = [self.start(box, listener)]
        asking = [threading.Thread(target=ask) for _ in range(3)]
        for one in asking:
            one.start()
        try:
            for _ in range(ROUNDS):
                eventually(lambda: daemons[-1].pid in answers)
                daemons[-1].terminate()
                assert daemons[-1].wait(20) == 0
                daemons.append(self.start(box, listener))
            eventually(lambda: daemons[-1].pid in answers)
        finally:
            over.set()
            for one in asking:
                one.join(20)
        assert set(answers) == {one.pid for one in daemons}
        daemons[-1].terminate()
        assert daemons[-1].wait(20) == 0

    def test_a_socket_that_is_none_of_ours_to_use_is_said_so(self, box):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            child = Systemd(box).start(box, "", listener.fileno(), LISTEN_FDS="1", LISTEN_FDNAMES="control")
            assert child.wait(20) == 73 and b"has no path" in child.stderr.read()

    @pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
    def test_a_socket_at_which_nobody_listens_is_passed_over(self, box, kind):
        with socket.socket(socket.AF_UNIX, kind) as bound:
            bound.bind(os.path.join(box.root, "control"))
            daemon = self.start(box, bound)
            assert box.request({"type": "ping"})["pid"] == daemon.pid
            daemon.terminate()
            assert daemon.wait(20) == 0

    def test_a_socket_that_was_removed_is_replaced_by_one_of_ours(self, box):
        box.config({"daemon": {"poll_interval": 0.1}})
        listener = self.listen(box)
        daemon = self.start(box, listener)
        os.unlink(listener.getsockname())
        eventually(lambda: read(box.file("endpoint")).count("control.sock"))
        assert box.json("status")["pid"] == daemon.pid
        daemon.terminate()
        assert daemon.wait(20) == 0
        assert not os.path.exists(box.file("control.sock"))

    def test_http_too_is_answered_by_the_next_daemon(self, box):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            for _ in range(2):
                waiting = socket.create_connection(("127.0.0.1", port), 20)
                waiting.sendall(f"GET /ready HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
                daemon = self.start(box, listener, names="http")
                with waiting, waiting.makefile("rb") as file:
                    assert file.readline().split()[1] in (b"200", b"503")
                assert f":{port}/" in box.json("status")["url"]
                daemon.terminate()
                assert daemon.wait(20) == 0

    @pytest.mark.parametrize("fds, names", [("x", "control"), ("-1", "control"), ("9", "a:b:control")])
    def test_nonsense_in_the_variables_is_passed_over(self, box, fds, names):
        listener = self.listen(box)
        systemd = Systemd(box)
        daemon = systemd.start(box, "", listener.fileno(), LISTEN_FDS=fds, LISTEN_FDNAMES=names)
        systemd.until("READY")
        assert box.request({"type": "ping"})["pid"] == daemon.pid
        daemon.terminate()
        assert daemon.wait(20) == 0

    @pytest.mark.parametrize("pid, names", [("1", "control"), ("", "web")])
    def test_a_socket_of_somebody_elses_is_left_alone(self, box, pid, names):
        listener = self.listen(box)
        daemon = self.start(box, listener, pid, names)
        assert json.loads(read(box.file("endpoint")))["socket"] == "control.sock"
        connection = self.connect(listener)
        connection.setblocking(False)
        connection.sendall(frame({"type": "ping"}))
        assert box.request({"type": "ping"})["pid"] == daemon.pid
        with pytest.raises(BlockingIOError):
            connection.recv(1)
        daemon.terminate()
        assert daemon.wait(20) == 0


@posix
class TestServiceOptions:
    @linux
    def test_what_the_daemon_is_told_of_itself(self, box):
        os.mkdir(os.path.join(box.path, "work"))
        section = {"umask": "027", "work_dir": "work", "stdout": "out.txt", "stderr": "err.txt"}
        box.config({"daemon": section})
        pid = box.start()
        assert os.readlink(f"/proc/{pid}/cwd") == os.path.join(box.path, "work")
        assert "Umask:\t0027" in read(f"/proc/{pid}/status")
        files = ("/dev/null", os.path.join(box.path, "out.txt"), os.path.join(box.path, "err.txt"))
        assert tuple(os.readlink(f"/proc/{pid}/fd/{n}") for n in range(3)) == files
        box.until(box.add("true"), "succeeded")

    def test_no_umask_opens_a_socket_to_others(self, box):
        web = {"command": "sleep 500", "ready": {"notify": True}}
        box.config({"daemon": {"umask": "000"}}, process={"web": web})
        box.start()
        for name in ("control.sock", "run/notify-web.0"):
            eventually(lambda: os.path.exists(box.file(name)))
            assert stat.S_IMODE(os.stat(box.file(name)).st_mode) == 0o600, name

    def test_a_pid_file_that_is_anothers_by_now_is_left_alone(self, boxes):
        number = os.path.join(boxes().root, "number")
        first, second = boxes(), boxes()
        for box in (first, second):
            box.start("--pid-file", number)
        first.stop()
        assert read(number) == f"{second.pid()}\n"
        second.stop()
        assert not os.path.exists(number)

    @pytest.mark.parametrize("name", ["work_dir", "stdout", "stderr", "pid_file", "socket"])
    def test_a_path_that_cannot_be_used_is_named_and_nothing_is_left(self, box, name):
        place = write(os.path.join(box.root, "file"), "mine") + "/x"
        box.config({"daemon": {name: place}})
        error = box.error("start", rc=73)
        assert place in error["message"] and not os.path.exists(box.file("daemon.pid"))

    def test_a_file_in_the_place_of_the_socket_is_left_alone(self, box):
        place = write(os.path.join(box.root, "file"), "mine")
        assert place in box.error("start", "--socket", place, rc=73)["message"]
        assert read(place) == "mine"

    def test_start_says_where_log_socket_and_pid_are_and_restart_keeps_them(self, box):
        log, place, number = (os.path.join(box.root, name) for name in ("l", "s", "n"))
        box.start("--log-file", log, "--socket", place, "--pid-file", number, "--log-level=debug")
        for _ in range(2):
            assert read(number) == f"{box.pid()}\n"
            assert stat.S_ISSOCK(os.stat(place).st_mode) and not os.path.exists(box.file("daemon.log"))
            eventually(lambda: "[DEBUG] Polling for tasks" in read(log))
            assert box.run("logs").stdout and box.json("status")["running"]
            box.run("reload")
            box.run("restart")
        box.stop()
        assert not os.path.exists(place) and not os.path.exists(number) and os.path.exists(log)
        assert "--log-level" in box.error("start", "--log-level", "loud", rc=2)["message"]

    def test_a_log_can_be_json(self, box):
        box.config({"log": {"format": "json"}})
        box.start()
        box.until(box.add("sh", "-c", "exit 75"), "scheduled")
        eventually(lambda: "rate limited" in box.log())
        box.stop()
        lines = [json.loads(line) for line in box.log().splitlines()]
        assert {"time", "level", "message"} == set(lines[0]) and lines[0]["level"] == "info"
        (late,) = [line for line in lines if "rate limited" in line["message"]]
        assert late["level"] == "warn"
        assert re.fullmatch(r"Task 1 rate limited, comes back at \d{4}-\S+Z", late["message"])

    def test_a_second_configuration_is_not_passed_over_in_silence(self, box):
        pid = box.start()
        write(box.file("config.yaml"), "{}")
        for words in (["reload"], ["restart"]):
            assert "config.yaml are both there" in box.error(*words, rc=78)["message"]
        assert "BAD configuration" in box.run("doctor", rc=1).stdout
        assert box.pid() == pid
        box.stop()
        assert "config.yaml are both there" in box.error("start", rc=78)["message"]
        box.start("--config", box.file("config.json"))

    def test_a_reload_says_what_has_to_wait_for_the_next_start(self, box):
        box.start()
        box.config({"daemon": {"umask": "027", "max_concurrent": 7}})
        shown = box.run("reload").stdout
        assert 'daemon.umask: "077" -> "027", at the next start\n' in shown and "7\n" in shown

    def test_a_reload_to_a_log_or_an_address_that_cannot_be_had_changes_nothing(self, box):
        log, web = os.path.join(box.root, "log"), {"web": {"command": "sleep 500"}}
        box.start()
        for more in ({"log": {"file": log + "/x"}}, {"log": {"file": log}, "health": {"host": "203.0.113.7"}}):
            write(log, "")
            box.config({}, process=web, **more)
            for _ in range(2):
                assert box.error("reload", rc=73)["message"] and box.json("ps") == []
            assert "reload refused" in box.log() and "refused" not in read(log)
        box.config({}, process=web)
        assert "added process.web" in box.run("reload").stdout
        eventually(lambda: [one["state"] for one in box.json("ps")] == ["running"])

    @linux
    @needs("bash")
    def test_the_daemon_has_descriptors_and_dumps_no_core_and_its_tasks_have_what_was_there(self, box):
        limits = 'ulimit -Sn 100; ulimit -Hn 400; ulimit -Sc 1000; exec "$@"'
        subprocess.run(["bash", "-c", limits, "sh", *box.command("start")], cwd=box.path, env=box.env, check=True)
        limits = dict(re.findall(r"(?m)^(Max open files|Max core file size) +(\S+)", read(f"/proc/{box.pid()}/limits")))
        assert limits == {"Max open files": "400", "Max core file size": "0"}
        task = box.add("bash", "-c", "ulimit -Sn; ulimit -Hn; ulimit -c")
        box.until(task, "succeeded")
        assert box.output(task).split() == ["100", "400", "1000"]

    def test_usr2_adds_a_task(self, box):
        box.config({"daemon": {"on_usr2": "echo rotated"}})
        os.kill(box.start(), signal.SIGUSR2)
        eventually(lambda: [task["state"] for task in box.json("list")] == ["succeeded"])
        assert box.output(1) == "rotated\n"

    def test_state_json_says_what_is_watched_over_and_what_runs(self, box):
        web, night = {"command": ["sleep", "500"]}, {"cron": "@daily", "command": "true"}
        daemon = {"heartbeat_interval": 0.1}
        box.config({"daemon": daemon}, process={"web": web}, schedule={"night": night})
        box.start()
        task = box.add("sleep", "500")
        box.until(task, "running")

        def check():
            state = json.loads(read(box.file("state.json")))
            assert state["uptime"] > 0 and [one["id"] for one in state["running"]] == [task]
            monitors = state["monitors"]
            assert monitors["processes"]["web"][0]["state"] == "running"
            return list(monitors["schedules"]) == ["night"] and monitors["watches"] == {}

        eventually(check)
        box.run("stop", "--force")
        state = json.loads(read(box.file("state.json")))
        assert state["running"] == [] and state["draining"]

    def test_the_log_says_how_the_end_went(self, box):
        box.config({"daemon": {"graceful_timeout": 0.1}})
        pid = box.start()
        box.until(box.add("true"), "succeeded")
        for _ in range(2):
            box.until(box.add("sleep", "500"), "running")
        os.kill(pid, signal.SIGTERM)
        eventually(lambda: not lives(pid))
        said = ["Task 1 completed (0.", "Received SIGTERM, shutting down gracefully", "Waiting for 2 tasks"]
        for text in [*said, "[WARN] Timed out waiting: ending task 2: interrupted"]:
            assert times_logged(box, text) == 1, text

    def test_the_first_start_and_init_write_a_configuration_and_never_again(self, boxes):
        for words in (["init"], ["start"]):
            box = boxes()
            shutil.rmtree(box.state)
            shown = box.run(*words).stdout
            path = box.file("config.toml" if sys.version_info >= (3, 11) else "config.json")
            assert words == ["start"] or shown == f"made {path}\n"
            text = read(path)
            if sys.version_info >= (3, 11):
                plain = re.sub(r"(?m)^# (?=\[|\w+ = [^ ])", "", text)  # all that have a default
                import tomllib

                data = tomllib.loads(plain)
                for section, options in apexd.OPTIONS.items():
                    given = data[section]["NAME"] if section in apexd.TABLES else data[section]
                    assert given == {k: d for k, (_, d, _) in options.items() if d not in (None, {})}
                    assert all(f"# {key} = " in text for key in options)
            write(path, "# mine\n" if path.endswith("toml") else '{ }')
            assert box.run("init").stdout == f"{path} is there already\n"
            box.run("stop")
            box.run("start")
            assert "mine" in read(path) or read(path) == "{ }"

    @linux
    def test_a_configuration_without_settings_needs_no_tomllib(self, box):
        assert apexd.Config(apexd._parse("x.toml", "# [a]\n\n[daemon]\n# x = 1\n")).to_dict()

    def test_what_users_of_older_systems_write_is_answered_with_what_to_write(self, box):
        for data, told in (
            ({"processes": [{"name": "web"}]}, "process.NAME"),
            ({"process": {"web": {"command": "x", "args": []}}}, "process.command (a list"),
            ({"daemon": {"gracefulShutdownTimeoutMs": 1}}, "daemon.graceful_timeout"),
            ({"daemon": {"action_timeout_minutes": 1}}, "limits.timeout"),
            ({"heartbeat_interval_seconds": 1}, "daemon.heartbeat_interval"),
        ):
            write(box.file("config.json"), json.dumps(data))
            assert f"is called {told}" in box.error("start", rc=78)["message"]

    @linux
    def test_logs_of_all_processes_and_the_start_of_the_rest_of_one(self, box):
        text = 'echo "I am $APEX_PROCESS.{instance}"; [ -e go ] || [ {instance} = 0 ] || exit 3; exec sleep 500'
        web = {"command": text, "instances": 2, "restart": "never"}
        box.config({}, process={"web": web, "other": {"command": "echo other; exec sleep 500"}})
        before = time.time()
        box.start()
        status = apexd.DaemonManager(box.path).get_status()
        assert before - 60 < status.started_at <= time.time() and status.uptime >= 0

        def states():
            found = box.request({"type": "get_process", "name": "web"})["process"]
            return [one["state"] for one in found["instance_details"]]

        eventually(lambda: states() == ["running", "failed"] or states() == ["running", "crashed"])
        (first, *_), message = box.json("ps"), {"type": "tail_logs", "lines": 5}
        said = eventually(lambda: len(lines := box.request(message)["lines"]) == 3 and lines)
        assert {(one["process_name"], one["instance"], one["content"]) for one in said} == {
            ("web", 0, "I am web.0"), ("web", 1, "I am web.1"), ("other", 0, "other"),
        }  # fmt: skip
        write(os.path.join(box.path, "go"), "")
        answer = box.request({"type": "start_process", "name": "web"})
        assert answer["message"] == "started: web (1 of 2 instances ran already)"
        assert states() == ["running"] * 2
        assert first["pid"] in [one["pid"] for one in box.json("ps")]


@other_user
class TestPrivileges:
    @pytest.fixture
    def box(self, box):
        """Give a project that is within everybody's reach, with the system's own Python."""
        for folder in (box.root, box.path):
            os.chmod(folder, 0o755)
        os.chmod(os.path.join(box.path, "apexd.py"), 0o644)
        box.command = lambda *args: ["/usr/bin/python3", os.path.join(box.path, "apexd.py"), *map(str, args)]
        box.quick_command = box.command
        box.config({"daemon": {"user": "nobody"}})
        return box

    def give(self, box, user=65534):
        for folder, names, files in os.walk(box.state):
            for path in (folder, *(os.path.join(folder, name) for name in names + files)):
                os.chown(path, user, user)

    def test_root_becomes_another_user_for_good_and_so_does_all_that_it_starts(self, box):
        self.give(box)
        setgroups = ["setpriv", "--groups", "0,1,2,3"]
        subprocess.run([*setgroups, *box.command("start")], cwd=box.path, env=box.env, check=True)
        task = box.add("sh", "-c", "id -u; id -g; id -G; until [ -e go ]; do sleep 0.02; done")
        box.until(task, "running")
        import pwd

        account = pwd.getpwnam("nobody")
        expected = os.getgrouplist("nobody", account.pw_gid)
        command = eventually(lambda: box.look(task)["pid"])
        for pid in (box.pid(), *keepers(box), command):
            status = dict(re.findall(r"(?m)^(\w+):\t(.*)$", read(f"/proc/{pid}/status")))
            assert status["Uid"].split() == [str(account.pw_uid)] * 4
            assert status["Gid"].split() == [str(account.pw_gid)] * 4
            assert sorted(map(int, status["Groups"].split())) == sorted(expected)
            assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
        write(os.path.join(box.path, "go"), "")
        box.until(task, "succeeded")
        assert box.output(task).split()[:2] == [str(account.pw_uid), str(account.pw_gid)]
        assert all(os.lstat(box.file(name)).st_uid == account.pw_uid for name in os.listdir(box.state))
        for words in ("status", "restart", "reload", "ps", "stop"):
            box.run(words)
        assert box.run("start", "--foreground", "--log-file", "/proc/nope/x", rc=73)

    NO_WAY = """
import apexd, ctypes, os, sys
if sys.argv[1:]:  # SECBIT_NO_SETUID_FIXUP: a process that changes its user keeps its rights
    assert ctypes.CDLL(None).prctl(28, 4, 0, 0, 0) == 0
ids, env = apexd.Platform.identity("nobody", None)
try:
    apexd.Platform.become(ids)
except OSError as error:
    print("refused:", error)
print(os.getresuid(), os.getresgid(), os.getgroups(), env["HOME"])
for act in (os.setuid, os.seteuid, os.setgid, lambda number: os.setgroups([number])):
    try:
        act(0)
        print("is root")
    except PermissionError:
        print("no")
"""

    def test_there_is_no_way_back_and_that_is_tried(self):
        words = [sys.executable, "-c", self.NO_WAY]
        done = subprocess.run(words, cwd=HERE, capture_output=True, text=True)
        ids, *answers = done.stdout.splitlines()
        assert ids.startswith("(65534, 65534, 65534) (65534, 65534, 65534) [65534] "), done
        assert answers == ["no"] * 4
        done = subprocess.run([*words, "keep"], cwd=HERE, capture_output=True, text=True)
        assert "there is a way back to root" in done.stdout, done

    def test_a_socket_that_roots_service_manager_hands_over_is_used(self, box):
        self.give(box)
        path = os.path.join(box.root, "control")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            os.chown(path, 65534, 65534)
            os.chmod(path, 0o600)
            listener.listen()
            systemd = Systemd(box)
            os.chmod(systemd.path, 0o666)
            handed = {"LISTEN_FDS": "1", "LISTEN_FDNAMES": "control"}
            daemon = systemd.start(box, "", listener.fileno(), **handed)
            systemd.until("READY")
            program, env = os.path.join(box.path, "apexd.py"), {**box.env, "HOME": "/"}
            done = as_nobody("-B", program, "--json", "status", cwd=box.path, env=env)
            assert json.loads(done.stdout)["pid"] == daemon.pid, done
            daemon.terminate()
            assert daemon.wait(20) == 0 and os.path.exists(path)

    def test_what_that_user_cannot_use_is_named(self, box):
        error = box.error("start", rc=77)
        assert box.state in error["message"] and "chown -R nobody" in error["hint"]
        self.give(box)
        os.mkdir(os.path.join(box.root, "mine"), 0o700)
        for option in ("--log-file", "--socket", "--pid-file"):
            place = os.path.join(box.root, "mine", "x")
            error = box.error("start", option, place, rc=77)
            assert place in error["message"], error
        os.chmod(os.path.join(box.path, "apexd.py"), 0o600)
        assert "apexd.py" in box.error("start", rc=77)["message"]
        write(box.file("config.json"), "{")
        assert "config.json: cannot be parsed" in box.error("start", rc=78)["message"]

    def test_a_user_that_does_not_exist_or_is_not_ours_is_refused(self, box):
        for user in ({"user": "no such"}, {"user": "nobody", "group": "no such"}, {"group": "no such"}):
            box.config({"daemon": user})
            assert "no such" in box.error("start", rc=78)["message"]
            self.give(box)
            assert box.state in box.error("start", rc=77)["message"] or "user" in user
            self.give(box, 0)
        box.config({"daemon": {"user": "root"}})
        self.give(box)
        env = {**box.env, "HOME": "/"}
        done = as_nobody("-B", os.path.join(box.path, "apexd.py"), "start", cwd=box.path, env=env)
        assert done.returncode == 78 and "daemon.user" in done.stderr

    def test_a_program_of_roots_does_not_become_it_by_itself(self, box):
        with pytest.raises(apexd.DaemonError) as caught:
            apexd.DaemonManager(box.path).start_daemon()
        assert caught.value.code == "PERMISSION_DENIED" and "daemon.user" in caught.value.message
        assert os.geteuid() == 0


class TestService:
    def text(self, box, kind):
        return box.run("service", kind).stdout

    @posix
    def test_the_file_of_the_repository_sets_what_is_printed(self, box):
        def settings(text):
            return {line for line in text.split("\n") if line and line[0] != "#"}

        os.unlink(box.file("config.json"))
        printed = self.text(box, "systemd")
        names = ((box.path, "/srv/project"), (sys.executable, "/usr/bin/python3"), ('"', ""))
        for shown, name in names:
            printed = printed.replace(shown, name)
        printed = printed.replace("User=root\n", "")
        assert settings(read(os.path.join(HERE, "apexd.service"))) == settings(printed)

    @needs("systemd-analyze")
    @pytest.mark.parametrize("kind", ["systemd", "systemd-user"])
    def test_units_are_what_systemd_takes(self, boxes, kind):
        box = boxes()
        odd = os.path.join(box.root, "a b%c$d'e")
        shutil.copytree(box.path, odd)
        unit = write(os.path.join(box.root, "x.service"), box.run("--project", odd, "service", kind).stdout)
        words = ["systemd-analyze", *(["--user"] if "user" in kind else []), "verify", unit]
        env = {**os.environ, "XDG_RUNTIME_DIR": box.root}
        done = subprocess.run(words, capture_output=True, text=True, env=env)
        assert (done.returncode, done.stderr) == (0, ""), done
        assert f'"{odd}"'.replace("%", "%%").replace("$", "$$") in read(unit)
        assert ("User=" in read(unit)) == (kind == "systemd")

    @other_user
    @pytest.mark.parametrize("number, name", [(65534, "nobody"), (54321, "54321")])
    def test_the_user_is_who_calls_whatever_the_environment_says(self, box, number, name):
        for folder in (box.root, box.path):
            os.chmod(folder, 0o755)
        os.chown(box.path, number, number)
        words = ["setpriv", "--reuid", number, "--regid", number, "--clear-groups", "/usr/bin/python3", "-B"]
        words += [os.path.join(box.path, "apexd.py"), "--state", os.path.join(box.path, "new"), "service", "systemd"]
        os.chmod(words[-5], 0o644)
        for env in ({}, {"USER": "somebody", "LOGNAME": "somebody"}):
            done = subprocess.run([*map(str, words)], cwd=box.path, env=env, capture_output=True, text=True)
            assert f"\nUser={name}\n" in done.stdout, done

    @posix
    @pytest.mark.parametrize("name", ["a\nb", "a\x01", os.fsdecode(b"a\xff")])
    def test_a_path_that_no_such_file_can_hold_is_said_so(self, box, name):
        odd = os.path.join(box.root, name)
        try:
            os.mkdir(odd)
        except OSError:
            pytest.skip("this file system has no such names")
        for kind in ("systemd", "sysv", "launchd", "windows"):
            assert box.error("--project", odd, "service", kind, rc=2)["code"] == "bad_request"

    def test_a_plist_is_one(self, box):
        import plistlib

        found = plistlib.loads(self.text(box, "launchd").encode())
        assert found["ProgramArguments"][-2:] == ["start", "--foreground"]
        assert found["AbandonProcessGroup"] and found["ExitTimeOut"] >= 17

    def test_windows_gets_a_task_of_its_own(self, box):
        assert "schtasks /Create /TN apexd-p /SC ONSTART" in self.text(box, "windows")

    @posix
    def test_the_init_script_through_a_whole_life(self, box):
        script = write(os.path.join(box.root, "init"), self.text(box, "sysv"))
        if shutil.which("shellcheck"):
            assert subprocess.run(["shellcheck", script], capture_output=True).stdout == b""
        assert re.search(r"(?s)### BEGIN INIT INFO\n.*### END INIT INFO", read(script))

        def call(*words):
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": "/"}
            return subprocess.run(["sh", script, *words], env=box.env, timeout=60, **pipes).returncode

        assert [call("status"), call("stop"), call("reload")] == [3, 0, 7]
        assert [call("start"), call("start")] == [0, 0]
        first = box.pid()
        assert [call("force-reload"), call("restart"), call("status")] == [0, 0, 0]
        assert box.pid() != first
        box.kill9()
        assert [call("status"), call("start"), call("stop"), call("status")] == [1, 0, 0, 3]
        box.config({"daemon": {"nonsense": 1}})
        assert [call("start"), call("restart"), call(), call("dance")] == [6, 6, 2, 2]
        os.unlink(os.path.join(box.path, "apexd.py"))
        assert [call("status"), call("start")] == [5, 5]


def has_slurm():
    """Tell whether there is a Slurm that takes jobs (SLURM_CONF names its configuration)."""
    if not os.environ.get("SLURM_CONF") or shutil.which("srun") is None:
        return False
    return subprocess.run(["sinfo", "-h"], capture_output=True, timeout=20).returncode == 0


@linux
class TestLauncherOfAGroup:
    """A group's commands go to a cluster's scheduler: the real Slurm, where there is one."""

    @pytest.fixture(name="slurm")
    def slurm(self, box):
        """Give a daemon whose group `slurm` hands its commands to Slurm."""
        if not has_slurm():
            pytest.skip("needs a running Slurm, and SLURM_CONF")
        launcher = ["srun", "-Q", "-n1", "--overcommit", "--immediate=30"]
        options = {"max_concurrent": 8, "env_keep": ["SLURM_CONF"]}
        box.config({"daemon": options}, group={"slurm": {"launcher": launcher}})
        box.env["SLURM_CONF"] = os.environ["SLURM_CONF"]
        box.start()
        yield box
        box.run("stop", "--force")
        eventually(lambda: self.jobs(box) == "", 60, "no job is left")

    def jobs(self, box):
        """Return what Slurm still runs of this box's."""
        words = ["squeue", "-h", "-o", "%i %t %Z"]
        lines = subprocess.run(words, capture_output=True, text=True).stdout.splitlines()
        return "\n".join(line for line in lines if line.endswith(box.path))

    def test_status_output_environment_and_words_are_the_tasks_own(self, slurm):
        words = ("sh", "-c", 'echo "$APEX_TASK_ID $SLURM_JOB_ID $1"; echo oops >&2; exit 5', "x", "a  b$c")
        task = slurm.add(*words, group="slurm")
        assert slurm.until(task, "failed", within_s=60)["exit_code"] == 5
        shown = slurm.output(task)
        assert re.search(rf"(?m)^{task} [0-9]+ a  b\$c$", shown) and "oops\n" in shown

    def test_cancel_and_timeout_end_the_job(self, slurm):
        task = slurm.add("sleep", "500", group="slurm")
        eventually(lambda: " R " in self.jobs(slurm), 60)
        slurm.run("cancel", task)
        assert slurm.until(task, "cancelled", within_s=60)["outcome"] == "cancelled"
        eventually(lambda: self.jobs(slurm) == "", 60)
        task = slurm.add("sleep", "500", group="slurm", timeout=3)
        assert slurm.until(task, "failed", within_s=60)["outcome"] == "timeout"

    def test_a_job_outlives_the_daemon_and_is_adopted(self, slurm):
        task = slurm.add("sh", "-c", "sleep 3; echo on; exit 6", group="slurm")
        eventually(lambda: " R " in self.jobs(slurm), 60)
        slurm.kill9()
        slurm.start()
        found = slurm.until(task, "failed", within_s=60)
        assert (found["exit_code"], found["attempts"]) == (6, 1)
        assert "on\n" in slurm.output(task)


# ============================================================================
# 20. CLI - registry and handlers
# ============================================================================


def on_terminal(box, *args, env=None, on_output=lambda shown: None):
    """Run apexd.py on a terminal of its own; return (status, all that it showed)."""
    import pty

    main, other = pty.openpty()
    words = box.command(*args)
    with open(main, "rb", buffering=0) as screen:
        child = subprocess.Popen(
            words, cwd=box.path, env={**box.env, **(env or {})},
            stdin=subprocess.DEVNULL, stdout=other, stderr=other,
        )  # fmt: skip
        os.close(other)
        shown = b""
        with contextlib.suppress(OSError):  # EIO: the other end is closed
            while True:
                data = screen.read(4096)
                if not data:
                    break
                shown += data
                on_output(shown)
        return child.wait(30), shown.decode("utf-8", "replace")


@posix
class TestCli:
    @pytest.fixture
    def box(self, box):
        """Give a project whose commands are run as people run them."""
        box.is_quick = False
        return box

    # Words after apexd.py, the exit status, what its message or hint must hold.
    BAD = (
        ("frobnicate", 2, "frobnicate"),
        ("lst", 2, "list"),
        ("show 999", 2, "no task 999"),
        ("wait 999", 2, "no task 999"),
        ("wait 999 1", 2, "no task 999"),
        ("cancel 999", 2, "no task 999"),
        ("cancel 1 999", 2, "no task 999"),
        ("retry 999", 2, "no task 999"),
        ("remove 999", 2, "no task 999"),
        ("why 999", 2, "no task 999"),
        ("logs 999", 2, "no task 999"),
        ("logs 1.99", 2, "attempt"),
        ("logs x.y", 2, "x.y"),
        ("logs -n x", 2, "-n"),
        ("report --task 999 --tokens 1", 2, "no task 999"),
        ("report --tokens 1", 2, "task"),
        ("dlq show 999", 2, "no task 999"),
        ("dlq frob", 2, "frob"),
        ("show x", 2, "x"),
        ("wait 5-3", 2, "5-3"),
        ("wait 99999999999999999999999", 2, "task ids"),
        ("wait", 2, "ID"),
        ("wait 1 --timeout=-1", 2, "duration"),
        ("add --group nope -- true", 2, "nope"),
        ("list --group nope", 2, "nope"),
        ("pause --group nope", 2, "nope"),
        ("list --state odd", 2, "odd"),
        ("add --after 2 -- true", 2, "no task 2"),  # on itself: it would be task 2
        ("add --after 999 -- true", 2, "no task 999"),
        ("add --after x -- true", 2, "x"),
        ("add --after 1:never -- true", 2, "never"),
        ("add --delay=-5 -- true", 2, "duration"),
        ("add --delay soon -- true", 2, "soon"),
        ("add --timeout=-1 -- true", 2, "duration"),
        ("add --priority 1" + "0" * 30 + " -- true", 2, "priority"),
        ("add --priority high -- true", 2, "high"),
        ("add --retries=-1 -- true", 2, "retries"),
        ("add --max-cost nan -- true", 2, "max_cost"),
        ("add --max-tokens 0 -- true", 2, "max_tokens"),
        ("add --on-lost perhaps -- true", 2, "perhaps"),
        ("add --env 1X=2 -- true", 2, "1X"),
        ("add", 2, "no command"),
        ("add --", 2, "no command"),
        ("add --shell x -- true", 2, "--shell"),
        ("add -- -x", 2, "./-x"),
        ("add --batch true", 2, "--batch"),
        ("add --frob -- true", 2, "--frob"),
        ("kill 12", 2, "cancel 12"),
        ("stop 12", 2, "cancel 12"),
        ("stop --timeout=x", 2, "duration"),
        ("stat", 2, "`status`"),
        ("bogus", 2, "see `apexd.py --help`"),
        ("cron run", 2, "cron run NAME"),
        ("cron next", 2, "cron next NAME"),
        ("events emit", 2, "events emit NAME"),
        ("dlq list 999", 2, "no task 999"),
        ("report --task 1", 2, "nothing to report"),
        ("report --task 1 --progress 500", 2, "from 0 to 100"),
        ("start --log-level bogus", 2, "--log-level"),
        ("start --mode x", 2, "x"),
        ("--project /nonexistent list", 2, "/nonexistent"),
        ("--config /nonexistent list", 78, "/nonexistent"),
        ("--config /nonexistent start", 78, "/nonexistent"),
    )
    NEEDS_DAEMON = ("wait 1", "run -- true", "add --wait -- true", "reload")

    @pytest.fixture(scope="class", name="used")
    @classmethod
    def used(cls):
        """Give (box, ids by name) of a project with a daemon and tasks in every state."""
        groups = {"one": {"max_concurrent": 1}, "held": {}}
        with project(daemon={"max_concurrent": 6, "stop_timeout": 1}, group=groups) as box:
            box.start()
            ids = {}
            box.request({"type": "pause", "group": "held"})

            def add(name, command, **options):
                (ids[name],) = enqueue(box, command, **options)

            add("ok", "echo out; echo err >&2")
            add("three", "exit 3")
            add("five", "exit 5", label="a label")
            add("missing", ["no-such-command"])
            add("skipped", "true", after=[ids["three"]])
            settle(box, list(ids.values()))
            add("running", "echo up; exec sleep 600", priority=7)
            add("holder", "exec sleep 600", group="one")
            box.until(ids["holder"], "running")
            box.until(ids["running"], "running")
            add("full", "true", group="one")
            add("scheduled", "true", delay=3600)
            add("waiting", "true", after=[ids["running"], f"{ids['scheduled']}:any"])
            add("paused", "true", group="held")
            add("cancelled", "true", delay=3600)
            box.request({"type": "cancel", "ids": [ids["cancelled"]]})
            yield box, ids

    @pytest.mark.parametrize("daemon", ["up", "down"])
    def test_bad_input_gets_two_lines_and_its_status(self, box, daemon):
        ask(box, "add", "--shell", "sleep 600")
        if daemon == "up":
            box.start()
        wrong = []
        for text, status, hint in self.BAD:
            got, out, err = within(box, *text.split(" "))
            lines = err.splitlines()
            good = got == status and hint in err and out == "" and len(lines) in (1, 2)
            if not good or not lines[0].startswith("apexd: ") or "Traceback" in err:
                wrong.append((text, got, out, err))
        for text in self.NEEDS_DAEMON if daemon == "down" else ():
            got, out, err = within(box, *text.split(" "))
            if (got, out) != (69, "") or "`start`" not in err or len(err.splitlines()) != 2:
                wrong.append((text, got, out, err))
        assert wrong == []
        assert len(ask_json(box, "list")) == 1, "nothing was added"
        if daemon == "up":
            assert box.request({"type": "ping"})["type"] == "pong"
            assert "Traceback" not in box.log()
            cancel_all(box)

    @pytest.mark.parametrize("daemon", ["up", "down"])
    def test_a_batch_with_a_broken_line_adds_nothing_and_names_the_line(self, box, daemon):
        if daemon == "up":
            box.start()
        good = [json.dumps({"command": ["true", str(n)]}) for n in range(4999)]
        broken_lines = (
            '{"command": ["true"]',
            '{"command": []}',
            '{"command": "x", "delay": -1}',
            '{"command": "x", "group": "nope"}',
            "[1]",
            "{}",
            '"a\\u0000b"',
        )
        for broken in broken_lines:
            text = "\n".join([*good, broken, '["true"]']).encode()
            status, out, err = within(box, "add", "--batch", input=text)
            assert (status, out) == (2, ""), broken
            assert "line 5000" in err and len(err.splitlines()) <= 2, err
        assert ask_json(box, "list") == []
        status, out, err = within(box, "add", "-p", "--batch", input=b"true\n\nexit 3 # \xff\n")
        assert (status, out.split()) == (0, ["1", "2"])

    def test_one_word_that_is_a_command_line_is_pointed_out(self, box):
        for words in ("a b", "make&&make test"):
            status, out, err = within(box, "add", "--", words)
            assert (status, out) == (2, "") and f"--shell '{words}'" in err
        assert ask(box, "add", "-p", "--shell", "exit 3; a b") == "1\n"
        spaced = os.path.join(box.path, "a b")
        write(spaced, "#!/bin/sh\necho spaced\n")
        os.chmod(spaced, 0o755)
        box.start()
        assert box.run("add", "--wait", "--", "./a b").stdout == "spaced\n"

    def test_names_that_are_no_utf_8_are_kept_or_refused_never_a_bug(self, box):
        folder = os.path.join(os.fsencode(box.path), b"d\xff")
        os.mkdir(folder)
        for daemon in ("down", "up"):
            if daemon == "up":
                box.start()
            assert "UTF-8" in box.run("add", "--label", b"\xff", "--", "true", rc=2).stderr
            done = box.run("--project", box.path, "add", "-p", "--", "pwd", cwd=folder)
        task_id = int(done.stdout)
        settle(box, [task_id])
        assert box.output(task_id).encode("utf-8", "surrogateescape") == folder + b"\n"

    def test_a_current_folder_that_is_gone_is_said_so(self, box):
        gone = os.path.join(box.path, "gone")
        for words in (("--project", box.path, "add", "--", "true"), ("list",), ("start",)):
            os.mkdir(gone)
            go = ["sh", "-c", 'cd gone && rmdir ../gone && exec "$@"', "sh", *box.command(*words)]
            done = subprocess.run(go, cwd=box.path, env=box.env, capture_output=True, text=True)
            lines = [line for line in done.stderr.splitlines() if "getcwd" not in line]
            assert done.returncode == 2, (words, done)
            assert lines[0].startswith("apexd: ") and len(lines) <= 2, done
            assert "bug" not in done.stderr and "gone" in done.stderr
        assert not os.path.exists(box.file("daemon.pid"))

    def test_wait_exits_with_the_tasks_own_status(self, used):
        box, ids = used
        wait = lambda *names: within(box, "wait", *[ids[name] for name in names])[0]
        assert wait("ok") == 0
        assert wait("five") == 5
        assert wait("three", "five", "ok") == 3, "the first that is not 0, in the order given"
        assert wait("five", "ok", "three") == 5
        assert wait("ok", "skipped") == 1
        assert wait("missing") == 127
        assert box.run("wait", ids["five"], rc=5).stdout == ""
        began = time.monotonic()
        assert ask(box, "wait", "--timeout", "0.3", ids["running"], rc=124) == ""
        assert 0.3 <= time.monotonic() - began < 30

    def test_wait_and_follow_outlive_a_killed_daemon(self, box):
        box.start()
        lines = "echo one; until [ -e go ]; do sleep 0.05; done; echo two; exit 3"
        (task_id,) = enqueue(box, lines)
        eventually(lambda: box.output(task_id) == "one\n")
        waits = [box.popen("wait", task_id), box.popen("logs", "-f", task_id)]
        waits.append(box.popen("run", "--", "sh", "-c", lines))
        eventually(lambda: len(box.request({"type": "list", "state": "running"})["tasks"]) == 2)
        for child in waits:
            await_connection(child)
        box.kill9()
        pause(0.1)
        box.start()
        write(os.path.join(box.path, "go"), "")
        ended = [(child.communicate(timeout=60), child.returncode) for child in waits]
        assert [code for _, code in ended] == [3, 0, 3]
        assert [out for (out, _), _ in ended] == [b"", b"one\ntwo\n", b"one\ntwo\n"]

    def test_follow_goes_on_from_attempt_to_attempt_without_a_lost_line(self, box):
        text = "echo attempt $APEX_ATTEMPT; sleep 0.2; until [ -e go ]; do sleep 0.05; done; "
        text += "echo end $APEX_ATTEMPT"
        box.start()
        go, lost = os.path.join(box.path, "go"), 0
        ends = f"{text}; [ $APEX_ATTEMPT = 3 ] || kill -9 $PPID; sleep 0.2", f"{text}; [ $APEX_ATTEMPT = 2 ]"
        for command, attempts in zip(ends, (3, 2)):  # one by one: the first kills its keeper
            (task_id,) = enqueue(box, command, retries=1)
            child = box.popen("logs", "-f", task_id)
            assert child.stdout.readline() == b"attempt 1\n"
            write(go, "")
            expected = "".join(f"attempt {n}\nend {n}\n" for n in range(1, attempts + 1))
            assert "attempt 1\n" + child.communicate(timeout=60)[0].decode() == expected
            os.unlink(go)
            lost = task_id if attempts == 3 else lost
        assert ask(box, "logs", f"{lost}.2") == "attempt 2\nend 2\n"
        assert ask(box, "logs", "-n", "1", lost) == "end 3\n"

    def test_logs_cut_no_character_in_two(self, box):
        text = "x" + "\u00e9" * 200_000
        code = f"import sys; sys.stdout.buffer.write({text[:2]!r}.encode() + {text[1]!r}.encode() * 199_999)"
        box.start()
        (task_id,) = enqueue(box, [sys.executable, "-c", code])
        settle(box, [task_id])
        lines = ask(box, "--json", "logs", task_id).splitlines()
        assert "".join(json.loads(line)["data"] for line in lines) == text

    def test_ctrl_c_leaves_wait_and_cancels_run(self, box):
        box.start()
        (task_id,) = enqueue(box, "sleep 600")
        waiting = box.popen("wait", task_id)
        running = box.popen("run", "--", "sh", "-c", "echo up; sleep 600", bufsize=0)
        assert running.stdout.read(3) == b"up\n"
        other = ask_json(box, "list")[-1]["id"]
        await_connection(waiting)
        waiting.send_signal(signal.SIGINT)
        running.send_signal(signal.SIGINT)
        assert (waiting.wait(30), running.wait(30)) == (130, 130)
        assert box.look(task_id)["state"] == "running"
        assert box.until(other)["state"] == "cancelled"
        assert b"Traceback" not in waiting.stderr.read() + running.stderr.read()
        cancel_all(box)

    def test_run_shows_the_output_and_exits_with_the_code(self, used):
        box, ids = used
        done = box.run("run", "--", "sh", "-c", "echo out; echo err >&2; exit 9", rc=9)
        assert done.stdout == "out\nerr\n"
        done = box.run("run", "--timeout", "0.2", "--", "sleep", "600", rc=None)
        assert done.returncode not in (0, 124) and "timeout" in done.stderr
        assert box.run("run", "--", "no-such-command", rc=127).stderr.count("\n") == 1

    def test_json_is_all_there_is_on_stdout(self, used):
        box, ids = used
        ok, running = str(ids["ok"]), str(ids["running"])
        commands = (
            "start", "status", "reload", "list", f"show {ok}", f"why {ok}", f"wait {ok}",
            f"wait {ids['five']}", f"cancel {ok}", f"retry {running}", f"remove {running}",
            "pause --group held", "resume --group one", f"report --task {running} --progress 3",
            "dlq", "dlq list", f"dlq show {ids['three']}", "config", "doctor", "version",
            "add --group held -- true", "run -- true", "add --wait -- true",
            f"wait {running} --timeout 0",
        )  # fmt: skip
        for text in commands:
            for words in (["--json", *text.split()], [text.split()[0], "-j", *text.split()[1:]]):
                status, out, err = within(box, *words)
                assert json.loads(out) is not None, (words, out, err)
                assert "Traceback" not in err
        status, out, err = within(box, "--json", "logs", ok)
        data = [json.loads(line)["data"] for line in out.splitlines()]
        assert "".join(data) == "out\nerr\n"
        assert [json.loads(line) for line in within(box, "--json", "logs")[1].splitlines()]
        assert json.loads(within(box, "--json", "kill", "12")[2])["error"]["code"] == "bad_request"

    def test_stop_and_restart_and_kill_speak_json_too(self, box):
        for words in ("start", "restart", "stop", "kill"):
            assert "pid" in box.json(words), words
        assert ask_json(box, "status", rc=3)["running"] is False

    def test_list_json_has_the_promised_fields(self, used):
        box, ids = used
        tasks = {task["id"]: task for task in ask_json(box, "ls")}
        assert set(ids.values()) <= set(tasks)
        task = tasks[ids["running"]]
        assert (task["state"], task["priority"], task["group"]) == ("running", 7, "default")
        assert (task["attempts"], task["exit_code"]) == (1, None)
        assert task["command"] == "echo up; exec sleep 600" and task["pid"] > 1
        task = tasks[ids["missing"]]
        assert (task["command"], task["exit_code"]) == (["no-such-command"], 127)
        assert [t["id"] for t in ask_json(box, "list", "-n", "2")] == sorted(tasks)[-2:]
        assert {t["state"] for t in ask_json(box, "list", "--state", "failed")} == {"failed"}
        assert {t["group"] for t in ask_json(box, "list", "-g", "one")} == {"one"}
        shown = ask(box, "list").splitlines()
        assert shown[0].split() == "ID STATE GROUP PRIO TRIES EXIT TIME COMMAND".split()
        (line,) = [line for line in shown if line.split()[0] == str(ids["five"])]
        assert "a label" in line and "failed" in line

    def test_why_names_what_a_task_waits_for(self, used):
        box, ids = used
        why = lambda name: ask(box, "why", ids[name])
        assert f"group one is full (1): tasks {ids['holder']}" in why("full")
        assert f"waits for task {ids['running']}, which is running" in why("waiting")
        assert f"waits for task {ids['scheduled']}, which is scheduled" in why("waiting")
        assert "due in 59m" in why("scheduled")
        assert "group held is paused" in why("paused")
        assert "has run for" in why("running")
        assert "ended as ok" in why("ok")
        assert "failed: exit 3" in why("three")
        assert "no-such-command" in why("missing")
        assert f"task {ids['three']} is failed, but was to succeed" in why("skipped")
        assert "cancelled" in why("cancelled")

    def test_show_tells_a_task_and_its_attempts(self, used):
        box, ids = used
        shown = ask(box, "show", ids["five"])
        assert re.search(r"^exit_code +5$", shown, re.M)
        assert re.search(r"^label +a label$", shown, re.M)
        assert re.search(r"^attempt 1\b.*failed.*\b5\b", shown, re.M)
        assert box.task(ids["five"])["history"][0]["exit_code"] == 5

    def test_aliases_and_short_options_mean_the_same(self, box):
        ask(box, "pause")
        words = ("-p", "-g", "default", "-l", "x", "-o", "4", "-w", box.home)
        first = box.run("add", *words, "--", "true")
        second = box.run("add", "-p", "-a", "1:any", "-d", "5m", "--", "true")
        assert (first.stdout, second.stdout) == ("1\n", "2\n")
        one, two = ask_json(box, "ls")
        assert (one["label"], one["priority"], one["cwd"]) == ("x", 4, box.home)
        assert (two["after"], two["state"]) == (["1:any"], "waiting")
        assert ask(box, "log", "1") == ""
        assert ask_json(box, "rm", "2") == {"done": [2], "not_done": []}
        assert ask(box, "version") == apexd.__version__ + "\n"
        assert box.run("--help").stdout.startswith("usage: apexd.py")
        assert "--on-lost" in box.run("add", "--help").stdout

    def test_dead_letters_are_listed_shown_retried_and_dropped(self, box):
        box.start()
        ids = enqueue(box, *["[ -e mended ] || exit 3"] * 3, "true")
        settle(box, ids)
        assert [task["id"] for task in ask_json(box, "dlq")] == ids[:3]
        assert f"\n{ids[0]} " in ask(box, "dlq", "list")
        assert ask_json(box, "dlq", "show", ids[1])["exit_code"] == 3
        assert ask_json(box, "dlq", "drop", ids[1])["done"] == [ids[1]]
        write(os.path.join(box.path, "mended"), "")
        assert ask_json(box, "dlq", "retry", ids[0])["done"] == [ids[0]]
        assert settle(box, [ids[0]])[0]["state"] == "succeeded"
        assert ask_json(box, "dlq", "retry")["done"] == [ids[2]]
        settle(box, [ids[2]])
        assert ask_json(box, "dlq") == [] and ask_json(box, "dlq", "drop")["done"] == []
        assert len(ask_json(box, "list")) == 3

    def test_options_of_the_command_are_not_ours(self, box):
        """T14: an error is no JSON because the command has a -j."""
        done = box.run("add", "-g", "nope", "--", "make", "-j", "4", rc=2)
        assert done.stderr.startswith("apexd: "), done.stderr
        assert box.run("add", "-g", "nope", "make", "-j", "4", rc=2).stderr.startswith("apexd: ")
        assert box.run("add", "-j", "-g", "nope", "--", "true", rc=2).stderr.startswith("{")

    def test_dlq_retry_goes_on_without_those_whose_key_is_taken(self, box):
        """T11."""
        box.start()
        for _ in range(2):
            box.until(box.add("false", key="k"))
        box.until(box.add("false"))
        done = box.run("dlq", "retry", rc=1)
        assert done.stdout == "queued: 1, 3\n" and "another task has the key: 2" in done.stderr

    def test_with_no_daemon_every_task_command_works_all_the_same(self, box):
        assert ask_json(box, "list") == [] and not os.path.exists(box.file("apex.db"))
        first, second = box.add("true"), box.add("true", after="1")
        assert "no daemon runs" in ask(box, "why", first)
        assert ask_json(box, "cancel", first)["done"] == [first]
        assert ask_json(box, "list", "--state", "skipped")[0]["id"] == second
        assert ask(box, "wait", second, rc=1) == ""
        assert ask_json(box, "retry", first)["done"] == [first]
        assert [task["state"] for task in ask_json(box, "list")] == ["queued", "waiting"]
        assert ask_json(box, "pause")["paused"] == ["*"]
        assert ask(box, "resume") == "resumed\n"
        assert ask_json(box, "remove", f"{first}-{second}")["done"] == [first, second]
        assert ask(box, "cancel", first, rc=2) == ""
        assert ask(box, "logs") == ""
        assert not box.processes()

    @linux
    def test_output_that_finds_no_room_is_an_error_and_none_at_all_is_not(self, box):
        box.batch(["true"] * 2000)
        for words in ("list", "list --json", "why 1", "config"):
            line = " ".join(box.command(*words.split()))
            sh = lambda line: subprocess.run(["sh", "-c", line], cwd=box.path, env=box.env, capture_output=True, text=True)
            done = sh(line + " >/dev/full")
            assert done.returncode == 73 and "cannot write to standard output: No space left" in done.stderr, done
            assert ('"code": "cannot_create"' in done.stderr) == ("--json" in words)
            done = sh(line + " >&-")
            assert (done.returncode, done.stderr) == (0, "") or "newest 100" in done.stderr, done
        assert sh(" ".join(box.command("show", "9999")) + " 2>&-").stdout == ""

    def test_errors_are_json_where_json_is_asked_for(self, box):
        task_id = box.add("true")
        box.run("cancel", task_id)
        assert f"finished already: {task_id}" in box.run("cancel", task_id, rc=1).stderr
        done = box.run("--json", "cancel", task_id, rc=1)
        assert json.loads(done.stdout) == {"done": [], "not_done": [task_id]}
        assert json.loads(done.stderr)["error"]["code"] == "illegal_state"
        pid = box.start()
        error = box.error("start", "--foreground", rc=75)
        assert (error["code"], error["message"]) == ("already_running", f"already running, PID {pid}")
        said = box.run("start", "--log-level", "debug").stdout
        assert said == f"already running, PID {pid}; its options stay as they are: `stop` it first\n"

    def test_help_and_version_are_where_people_look_for_them(self, box):
        assert box.run("--version").stdout == apexd.__version__ + "\n"
        assert box.run("help", "logs").stdout == box.run("logs", "--help").stdout
        assert box.run("help").stdout == box.run("--help").stdout

    @posix
    def test_a_wait_that_is_left_says_that_its_task_goes_on(self, box):
        box.start()
        child = box.popen("add", "--wait", "--", "sleep", "600")
        eventually(lambda: box.look(1)["state"] == "running")
        child.send_signal(signal.SIGINT)
        assert child.wait(20) == 130 and b"task 1 goes on" in child.stderr.read()
        assert box.task(1)["state"] == "running"
        assert not re.search(r"(?m)^(suspect|boot_id|request_id|start_time|keeper) ", box.run("show", 1).stdout)
        box.run("cancel", 1)

    def test_config_doctor_and_version_tell_the_truth(self, box):
        box.config({"limits": {"timeout": "5m"}})
        shown = ask(box, "config")
        assert "limits.timeout = 300.0" in shown and box.file("config.json") in shown
        assert ask_json(box, "config")["daemon"]["poll_interval"] == 0.2
        checks = {check["check"]: check for check in ask_json(box, "doctor")}
        assert checks["sqlite"]["ok"] and checks["python"]["ok"]
        assert "not running" in checks["daemon"]["text"]
        write(box.file("config.json"), "{")
        wrong = [check["text"] for check in ask_json(box, "doctor", rc=1) if not check["ok"]]
        assert "config.json" in "".join(wrong)
        assert box.error("config", rc=78)["code"] == "config_invalid"
        assert ask_json(box, "version") == {"version": apexd.__version__}

    def test_state_and_project_may_lie_elsewhere(self, box):
        state = os.path.join(box.root, "elsewhere")
        box.run("--state", state, "start")
        assert box.run("add", "--wait", "--state", state, "--", "pwd").stdout == box.path + "\n"
        done = box.run("list", "--json", env={"APEX_STATE_DIR": state}, cwd=box.home, timeout=20)
        assert len(json.loads(done.stdout)) == 1
        box.run("stop", "--state", state)
        assert not os.path.exists(box.file("apex.db"))
        inner = os.path.join(box.path, "a", "b")
        os.makedirs(os.path.join(box.path, ".git"))
        os.makedirs(inner)
        assert box.run("add", "-p", "--", "true", cwd=inner).stdout == "1\n"
        assert os.path.exists(box.file("apex.db")), "the nearest .apex above"

    def test_outside_a_repository_the_folder_of_the_program_counts(self, box):
        """T16"""
        elsewhere = os.path.join(box.root, "elsewhere")
        os.mkdir(elsewhere)
        assert box.run("add", "-p", "--", "true", cwd=elsewhere).stderr == ""
        assert os.listdir(elsewhere) == [] and box.task(1)["cwd"] == elsewhere
        shutil.rmtree(box.state)
        done = box.run("add", "-p", "--", "true", cwd=elsewhere)
        assert done.stdout == "1\n" and f"made {elsewhere}" in done.stderr, "without a terminal too"
        assert box.run("add", "-p", "--", "true", cwd=elsewhere).stderr == ""
        os.mkdir(os.path.join(elsewhere, ".git"))
        box.add("true")
        assert box.run("add", "-p", "--", "true", cwd=elsewhere).stdout == "3\n"

    def test_a_reader_that_leaves_is_no_error_to_talk_about(self, box):
        box.batch(["true"] * 5000)
        for words in ("list --json", "list -n 4000"):
            line = " ".join(box.command(*words.split())) + " | head -1"
            done = subprocess.run(
                line, shell=True, cwd=box.path, env=box.env, capture_output=True, text=True
            )
            assert (done.returncode, done.stderr) == (0, ""), words
            assert len(done.stdout.splitlines()) == 1

    def test_on_a_terminal_it_names_the_timeout_draws_a_bar_and_escapes_output(self, box):
        box.start()
        escape = "until [ -e go ]; do sleep 0.05; done; printf '\\033]0;x\\007'"
        status, shown = on_terminal(box, "add", "--", "sh", "-c", escape)
        assert (status, "task 1 added" in shown, "timeout 2h" in shown) == (0, True, True)
        go = os.path.join(box.path, "go")
        status, shown = on_terminal(
            box, "wait", "1", on_output=lambda shown: b"0/1" in shown and write(go, "")
        )
        assert status == 0
        assert "[" + "." * 30 + "] 0/1" in shown and "[" + "#" * 30 + "] 1/1" in shown
        status, shown = on_terminal(box, "logs", "1")
        assert "\x1b" not in shown and "\\x1b]0;x\\x07" in shown
        assert "\x1b]0;x\x07" in on_terminal(box, "logs", "--raw", "1")[1]
        assert "\x1b" not in on_terminal(box, "list")[1]


# ============================================================================
# WINDOWS - the same program under a Python for Windows, such as wine runs
# ============================================================================

# APEXD_WINDOWS_PYTHON names a program that is called like `PROGRAM 3.11 script.py args`.
WINDOWS_PYTHON = os.environ.get("APEXD_WINDOWS_PYTHON")
PING = ["--", "ping", "-n", "60", "127.0.0.1"]  # runs for a minute
SHELL_PING = ["--", "cmd.exe", "/c", "ping -n 60 127.0.0.1 & echo x"]  # the same in a tree


@functools.cache
def windows_python(version):
    """Return the path, as Windows names it, of a Python of this version, None without one."""
    words = [WINDOWS_PYTHON, version, "-c", "import sys; print(sys.executable, sys.version)"]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    path, _, found = done.stdout.decode("utf-8", "replace").strip().partition(" ")
    return path if done.returncode == 0 and found.startswith(version + ".") else None


class WindowsBox:
    """A project whose commands run under a Python for Windows."""

    def __init__(self, version):
        self.version = version
        self.python = windows_python(version)
        self.path = tempfile.mkdtemp(prefix="axw-", dir="/tmp")
        self.state = os.path.join(self.path, ".apex")
        self.children = []
        shutil.copy(PROGRAM, self.path)
        self.config(graceful_timeout=0.5, stop_timeout=1, poll_interval=0.2)

    def file(self, *names):
        """Return a path within the state folder."""
        return os.path.join(self.state, *names)

    def config(self, log=None, **daemon):
        """Write .apex/config.json."""
        data = {"daemon": daemon, "log": log or {}}
        write(self.file("config.json"), json.dumps(data))

    def script(self, name, text):
        """Write a program into the project's folder; return its name."""
        write(os.path.join(self.path, name), textwrap.dedent(text))
        return name

    def popen(self, *args, program="apexd.py"):
        """Start a program of the folder; its output is a pipe of text."""
        child = subprocess.Popen(
            [WINDOWS_PYTHON, self.version, program, *map(str, args)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            cwd=self.path, env={**os.environ, "APEXD_TEST_BOX": self.path},
            text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        self.children.append(child)
        return child

    def run(self, *args, rc=0, timeout=120):
        """Run apexd.py to its end; check its status (None: any); return what it printed."""
        child = self.popen(*args)
        out = child.communicate(timeout=timeout)[0]
        assert "Traceback" not in out and "a bug:" not in out, out
        assert rc is None or child.returncode == rc, (args, child.returncode, out, self.log())
        return out

    def start(self, word="started", verb="start"):
        """Start the daemon; return its PID.

        Not to the end of the output: wine gives the pipe to the daemon as well.
        """
        line = self.popen(verb).stdout.readline()
        match = re.fullmatch(rf"{word}, PID (\d+)\n", line)
        assert match, (line, self.log())
        return int(match[1])

    def add(self, *words):
        """Add a task by the words behind `add`; return its id."""
        return int(self.run("add", "--print-id", *words))

    def tasks(self):
        """Return {id: task} as `list --json` gives it."""
        return {task["id"]: task for task in json.loads(self.run("list", "--json"))}

    def until(self, task_id, **wanted):
        """Wait until a task has these values; return it."""

        def check():
            task = self.tasks()[task_id]
            assert {name: task[name] for name in wanted} == wanted, task
            return task

        return eventually(check, why=f"task {task_id} is {wanted}")

    def log(self):
        """Return the text of daemon.log."""
        return read(self.file("daemon.log"))

    def request(self, message):
        """Make one request of the daemon, as it is given; return the response."""
        port = json.loads(read(self.file("endpoint")))["port"]
        data = json.dumps(message).encode()
        with socket.create_connection(("127.0.0.1", port), 10.0) as connection:
            connection.sendall(struct.pack(">I", len(data)) + data)
            return read_frame(connection)

    def processes(self, needle=""):
        """Return the command lines of what this box has started and still lives."""
        mark = b"\0APEXD_TEST_BOX=" + self.path.encode() + b"\0"
        found = []
        for name in os.listdir("/proc"):
            with contextlib.suppress(OSError):
                if not name.isdigit() or not lives(name):
                    continue
                with open(f"/proc/{name}/environ", "rb") as file:
                    if mark not in b"\0" + file.read() + b"\0":
                        continue
                with open(f"/proc/{name}/cmdline", "rb") as file:
                    line = file.read().replace(b"\0", b" ").decode("utf-8", "replace").strip()
                is_system = re.match(r"C:\\windows\\|\S*wine(server|64|)\d* ", line, re.I)
                if needle in line and line and not is_system:
                    found.append(line)
        return found

    def close(self):
        """Kill the daemon, see that all is gone; return what was left."""
        self.popen("kill", "--all").communicate(timeout=120)
        with contextlib.suppress(AssertionError):
            eventually(lambda: not self.processes(), 5.0)
        left = self.processes()
        for child in self.children:
            if child.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            child.stdout.close()
        return left


@pytest.fixture(scope="module")
def windows_system():
    """Keep one program running, so that wine does not start and end with each command."""
    with tempfile.TemporaryDirectory(prefix="axw-", dir="/tmp") as folder:
        code = "print('up', flush=True)\nwhile os.path.exists(sys.argv[1]): time.sleep(0.1)"
        words = [WINDOWS_PYTHON, "3.11", "-c", "import os, sys, time; " + code, folder]
        child = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        child.stdout.readline()  # the first one starts wine's own servers, which keep its pipe
        yield
    child.wait(30)
    child.stdout.close()


@pytest.fixture
def windows(request, windows_system):
    """Give a project under a Python for Windows, 3.11 unless a parameter says another."""
    version = getattr(request, "param", "3.11")
    if windows_python(version) is None:
        pytest.skip(f"{WINDOWS_PYTHON} has no Python {version}")
    box = WindowsBox(version)
    yield box
    left = box.close()
    if left or request.node.nodeid in FAILED:
        print(f"--- kept: {box.path}; daemon.log:\n{box.log()[-20000:]}")
    else:
        shutil.rmtree(box.path, ignore_errors=True)
    assert not left


@pytest.mark.skipif(
    not WINDOWS_PYTHON or not IS_LINUX,
    reason="set APEXD_WINDOWS_PYTHON to a program that runs a Python for Windows",
)
class TestWindows:
    @pytest.mark.parametrize("windows", ["3.9", "3.11", "3.12", "3.13"], indirect=True)
    def test_the_short_path(self, windows):
        assert windows.add("--", "cmd.exe", "/c", "echo early") == 1, "with the daemon down"
        pid = windows.start()
        assert windows.start("already running") == pid
        assert windows.run("wait", 1) == ""
        assert windows.run("logs", 1).split() == ["early"]
        out = windows.run("add", "--wait", "--shell", "echo hello& exit 7", rc=7)
        assert out.split() == ["hello"]
        tasks = windows.tasks()
        assert [task["state"] for task in tasks.values()] == ["succeeded", "failed"]
        assert (tasks[1]["exit_code"], tasks[2]["exit_code"]) == (0, 7)
        assert windows.run("stop") == f"stopped, PID {pid}\n"
        assert windows.run("status", rc=3) == "not running\n"
        assert not {"endpoint", "daemon.pid"}.intersection(os.listdir(windows.state))
        eventually(lambda: not windows.processes("_daemon"))

    def test_a_task_reports_times_out_and_is_told_from_what_cannot_start(self, windows):
        windows.start()
        report = ["--", windows.python, "apexd.py", "report"]
        assert windows.run("add", "--wait", *report, "--note", "half", "--tokens", 5) == "ok\n"
        out = windows.run("add", "--wait", "--timeout", 0.5, *PING, rc=1)
        assert "task 2: timeout" in out
        out = windows.run("add", "--wait", "--", "no-such-program", rc=None)
        assert "spawn:ENOENT" in out
        tasks = windows.tasks()
        assert (tasks[1]["note"], tasks[1]["tokens"]) == ("half", 5)
        assert [task["outcome"] for task in tasks.values()] == ["ok", "timeout", "not_started"]
        eventually(lambda: not windows.processes("ping"))

    def test_cancel_ends_the_whole_tree(self, windows):
        windows.start()
        task_id = windows.add(*SHELL_PING)
        eventually(lambda: len(windows.processes("ping -n 60")) == 2, why="cmd.exe and ping")
        windows.run("cancel", task_id)
        windows.run("wait", task_id, rc=1)
        eventually(lambda: not windows.processes("ping"))
        assert windows.tasks()[task_id]["state"] == "cancelled"

    def test_stop_interrupts_what_runs_and_restart_leaves_it_alone(self, windows):
        first = windows.start()
        task_id = windows.add(*PING)
        windows.until(task_id, state="running")
        windows.run("stop")
        eventually(lambda: not windows.processes("ping"))
        task = windows.tasks()[task_id]
        assert (task["state"], task["outcome"], task["losses"]) == ("queued", "interrupted", 0)
        second = windows.start()
        pid = windows.until(task_id, state="running", attempts=2)["pid"]
        third = windows.start(verb="restart")
        task = windows.until(task_id, state="running", attempts=2)
        assert task["pid"] == pid and len({first, second, third}) == 3
        assert len(windows.processes("ping")) == 1

    @pytest.mark.parametrize("windows", ["3.9", "3.13"], indirect=True)
    def test_what_a_killed_daemon_started_runs_on_and_is_adopted(self, windows):
        process = {"command": PING[1:], "min_uptime": 0.1}
        write(windows.file("config.json"), json.dumps({"process": {"web": process}}))
        pid = windows.start()
        ends = windows.add("--", "cmd.exe", "/c", "ping -n 6 127.0.0.1 >NUL & exit 7")
        meanwhile = windows.add("--", "cmd.exe", "/c", "ping -n 2 127.0.0.1 >NUL & exit 5")
        stays = windows.add(*SHELL_PING)
        web = eventually(lambda: json.loads(windows.run("ps", "--json"))[0]["pid"])
        eventually(lambda: len(windows.processes("ping -n 60")) == 3, why="web, cmd.exe, ping")
        port = json.loads(read(windows.file("endpoint")))["port"]
        assert windows.run("kill").startswith(f"killed, PID {pid}; ")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), 5.0)
        eventually(lambda: not windows.processes("exit 5"), why="it ends while there is no daemon")
        assert len(windows.processes("ping -n 60")) == 3
        windows.start()
        windows.run("wait", ends, rc=7)
        tasks = windows.tasks()
        assert [tasks[n]["exit_code"] for n in (ends, meanwhile)] == [7, 5]
        assert {task["attempts"] for task in tasks.values()} == {1}
        assert json.loads(windows.run("ps", "--json"))[0]["pid"] == web
        windows.run("cancel", stays)
        windows.run("down", "web")
        eventually(lambda: not windows.processes("ping"), why="cancel ends all that it started")

    def test_kill_all_ends_the_tree_without_a_daemon(self, windows):
        windows.start()
        task_id = windows.add(*SHELL_PING)
        eventually(lambda: len(windows.processes("ping -n 60")) == 2, why="cmd.exe and ping")
        windows.run("kill")
        windows.run("kill", "--all")
        assert not windows.processes("ping")
        assert windows.tasks()[task_id]["outcome"] == "interrupted"

    def test_ten_starts_at_once_give_one_daemon(self, windows):
        starts = [windows.popen("start") for _ in range(10)]
        lines = [start.stdout.readline() for start in starts]
        pid = json.loads(read(windows.file("daemon.pid")))["pid"]
        expected = [f"already running, PID {pid}\n"] * 9 + [f"started, PID {pid}\n"]
        assert sorted(lines) == expected
        eventually(lambda: len(windows.processes("_daemon")) == 1, why="one daemon")

    def test_foreground_runs_until_stop_and_refuses_beside_another(self, windows):
        child = windows.popen("start", "--foreground")
        assert " starts, PID " in child.stdout.readline()
        eventually(lambda: os.path.exists(windows.file("endpoint")))
        assert "already running" in windows.run("start", "--foreground", rc=75)
        assert windows.run("add", "--wait", "--", "cmd.exe", "/c", "echo x").split() == ["x"]
        windows.run("stop")
        assert "stopped" in child.communicate(timeout=60)[0]
        assert child.returncode == 0

    def test_processes_are_kept_up_and_outlive_the_daemon(self, windows):
        process = {"command": PING[1:], "instances": 2, "min_uptime": 0.1}
        bad = {"command": "echo hi& exit 3", "max_restarts": 1, "backoff": 0.1}
        table = {"process": {"web": process, "bad": bad}}
        write(windows.file("config.json"), json.dumps(table))
        windows.start()
        eventually(lambda: len(windows.processes("ping")) == 2, why="both instances")
        eventually(lambda: "failed: restarted 1 time: exit 3" in windows.run("why", "bad"))
        assert windows.run("logs", "bad").split() == ["hi"] * 2
        before = json.loads(windows.run("ps", "--json", "web"))
        assert [one["state"] for one in before] == ["running"] * 2
        windows.run("restart", "web")
        after = json.loads(windows.run("ps", "--json", "web"))
        assert not {one["pid"] for one in before} & {one["pid"] for one in after}
        windows.run("scale", "web", 1)
        eventually(lambda: len(windows.processes("ping")) == 1)
        windows.run("kill")
        windows.start()
        assert len(windows.processes("ping")) == 1
        assert json.loads(windows.run("ps", "--json", "web"))[0]["pid"] == after[0]["pid"]
        windows.run("down", "web")
        assert not windows.processes("ping")

    def test_schedules_fire_in_local_time_and_a_zone_without_data_is_named(self, windows):
        """K8"""
        job = {"cron": "@every 1s", "command": ["cmd.exe", "/c", "echo %APEX_EVENT%"]}
        write(windows.file("config.json"), json.dumps({"schedule": {"job": {**job, "timezone": "Europe/Berlin"}}}))
        assert "schedule.job.timezone = 'Europe/Berlin'" in windows.run("start", rc=78)
        write(windows.file("config.json"), json.dumps({"schedule": {"job": job}}))
        windows.start()
        windows.until(2, state="succeeded")
        assert "cron.fired" in windows.run("logs", 2)
        assert len(windows.run("cron", "next", "*/5 9-17 * * mon-fri", "-n", 3).split("\n")) == 4
        assert windows.run("cron", "next", "30 4 * * *", "--timezone", "UTC", "-n", 1).count("T04:30:00+00:00") == 1

    def test_what_changes_in_files_becomes_a_task(self, windows):
        """By looking for it: there is no inotify."""
        tell = "import os, shutil; open('told', 'a').write(os.environ['APEX_EVENT'] + '\\n'); " \
            "shutil.copy(os.environ['APEX_EVENT_FILE'], 'paths')"
        options = {"paths": ["src", "later"], "debounce_ms": 50, "ignore": ["out/*.o"]}
        table = {"w": {**options, "command": [windows.python, "-c", tell]}}
        write(windows.file("config.json"), json.dumps({"watch": table}))
        write_plainly(os.path.join(windows.path, "src", "sub", "old"), "1")

        def told(count, **changes):
            """Wait for the task of that number; see what it was told."""
            windows.until(count, state="succeeded")
            lines = read(os.path.join(windows.path, "told")).strip().split("\n")
            found = json.loads(lines[-1])["payload"]["changes"]
            assert {one["path"].rpartition("\\")[2]: one["kind"] for one in found} == changes
            paths = read(os.path.join(windows.path, "paths")).split()
            assert paths == sorted(one["path"] for one in found)

        windows.start()
        watched = json.loads(windows.run("status", "--json"))["watches"]["w"]
        assert [one["how"] for one in watched] == ["polling", "missing"]
        write_plainly(os.path.join(windows.path, "src", "sub", "new"), "1")
        write_plainly(os.path.join(windows.path, "src", "out", "x.o"), "1")
        told(1, new="created")
        write_plainly(os.path.join(windows.path, "src", "sub", "new"), "22")
        os.unlink(os.path.join(windows.path, "src", "sub", "old"))
        told(2, new="modified", old="deleted")
        write_plainly(os.path.join(windows.path, "later", "f"), "1")
        told(3, f="created")
        shutil.rmtree(os.path.join(windows.path, "src"))
        told(4, new="deleted")
        windows.run("stop")

    def test_only_the_token_opens_the_port(self, windows):
        windows.start()
        token = json.loads(read(windows.file("endpoint")))["token"]
        for wrong in ({}, {"auth": ""}, {"auth": token[:-1] + "x"}):
            answer = windows.request({"type": "shutdown", **wrong})
            assert (answer["type"], answer["code"]) == ("error", "permission_denied")
        assert len(token) == 64
        assert windows.request({"type": "ping", "auth": token})["type"] == "pong"

    def test_a_removed_endpoint_comes_back(self, windows):
        pid = windows.start()
        os.unlink(windows.file("endpoint"))
        eventually(lambda: os.path.exists(windows.file("endpoint")))
        assert f"PID {pid}" in windows.run("status")

    def test_readers_keep_no_file_from_being_replaced_or_the_log_from_growing(self, windows):
        log = {"max_size_mb": 0.0005, "max_files": 1}
        windows.config(log, poll_interval=0.1, heartbeat_interval=0.05)
        script = """
            import os, time
            names = ("endpoint", "daemon.pid", "heartbeat", "state.json")
            held = None
            while not os.path.exists("enough"):
                for name in names:
                    try:
                        with open(os.path.join(".apex", name)) as file:
                            file.read()
                    except OSError:
                        pass
                if held is None and os.path.exists(".apex/daemon.log"):
                    held = open(".apex/daemon.log")
        """
        reader = windows.popen(program=windows.script("reader.py", script))
        try:
            for _ in range(4):
                windows.start()
                windows.run("add", "--wait", "--", "cmd.exe", "/c", "exit 0")
                windows.run("stop")
        finally:
            write(os.path.join(windows.path, "enough"), "")
            out = reader.communicate(timeout=60)[0]
        assert out == ""
        assert "turn failed" not in windows.log()
        assert re.findall(r"Task (\d) completed", windows.log()) == ["1", "2", "3", "4"]


# ============================================================================
# The tests in several processes at once: they wait most of the time
# ============================================================================


class Worker:
    """In a process of its own: runs the tests that are named on stdin, tells of them on stdout."""

    def __init__(self):
        self.out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        self.names = os.fdopen(os.dup(0), encoding="utf-8")

    def tell(self, data):
        self.out.write(json.dumps(data) + "\n")
        self.out.flush()

    def pytest_configure(self, config):
        self.config = config

    def pytest_runtest_logreport(self, report):
        hook = self.config.hook
        self.tell(hook.pytest_report_to_serializable(config=self.config, report=report))

    def pytest_runtestloop(self, session):
        items = {item.nodeid: item for item in session.items}
        for _ in range(2):  # one to run, and the one after it: for it some fixtures are kept
            self.tell(None)
        names = (json.loads(line) for line in self.names)
        item = items.get(next(names, None))
        while item:
            following = items.get(next(names, None))
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            item = following
            self.tell(None)
        return True


class Crew:
    """Hands the tests to workers, the next one to whoever is free; then runs what runs alone."""

    SIZE = min(4, os.cpu_count() or 1) + 1

    def __init__(self, argv):
        self.argv = argv

    def pytest_runtestloop(self, session):
        rest = [item for item in session.items if hasattr(item.function, "is_alone")]
        shared = [item for item in session.items if item not in rest]
        option = session.config.option
        if option.collectonly or option.usepdb or len(shared) < 2 * self.SIZE or session.testsfailed:
            return None
        self.run_shared(session, shared)
        for item, following in zip(rest, [*rest[1:], None]):
            if session.shouldfail or session.shouldstop:
                break
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        return True

    def choose(self, worker):
        """Return the next test for a worker: of its class, else of one that is nobody's yet."""
        left = {of: names for of, names in self.waiting.items() if names}
        if self.classes.get(worker) not in left:
            free = left.keys() - self.classes.values() or left.keys()
            self.classes[worker] = max(free, key=lambda of: len(left[of]), default=None)
        return left[self.classes[worker]].pop(0) if left else None

    def run_shared(self, session, items):
        self.waiting, self.classes = {}, {}
        for item in items:
            self.waiting.setdefault(item.nodeid.rpartition("::")[0], []).append(item.nodeid)
        command = [sys.executable, os.path.abspath(__file__), "--worker", *self.argv]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "encoding": "utf-8"}
        workers = [subprocess.Popen(command, **pipes) for _ in range(self.SIZE)]
        lines, names = SimpleQueue(), {worker: deque() for worker in workers}

        def read(worker):
            for line in worker.stdout:
                lines.put((worker, json.loads(line)))
            lines.put((worker, "end"))

        for worker in workers:
            threading.Thread(target=read, args=(worker,), daemon=True).start()
        busy, asked = set(workers), Counter()
        while busy:
            worker, told = lines.get()
            if told == "end":
                busy.discard(worker)
                if worker.wait() and names[worker]:
                    session.shouldfail = f"a process of the tests ended in {[*names[worker]]}"
            elif told is not None:
                hook = session.config.hook
                report = hook.pytest_report_from_serializable(config=session.config, data=told)
                hook.pytest_runtest_logreport(report=report)
            else:
                asked[worker] += 1
                if asked[worker] > 2:
                    names[worker].popleft()
                is_over = session.shouldfail or session.shouldstop
                name = None if is_over else self.choose(worker)
                with contextlib.suppress(OSError, ValueError):
                    if name is None:
                        worker.stdin.close()
                    else:
                        names[worker].append(name)
                        worker.stdin.write(json.dumps(name) + "\n")
                        worker.stdin.flush()


if __name__ == "__main__":  # without pytest the head of this file has brought it already
    is_worker = sys.argv[1:2] == ["--worker"]
    del sys.argv[1 : 1 + is_worker]
    plugin = Worker() if is_worker else Crew(sys.argv[1:])
    sys.exit(pytest.main([os.path.abspath(__file__), *sys.argv[1:]], plugins=[plugin]))
