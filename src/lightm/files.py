"""Files that appear complete or not at all, and output folders that one process at a time writes to."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lightm.errors import InputError, LightMError


@contextlib.contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it is synced and renamed to `path`, else removed.

    Missing folders are made; the folder is synced too where possible, so that the new name outlives a loss of power.
    Raises LightMError, naming the file, when the disk refuses.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with disk_refusals(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def disk_refusals(path: Path | str) -> Iterator[None]:
    """Turn every OSError of the block (full disk, missing rights) into a LightMError that names `path`."""
    try:
        yield
    except OSError as error:
        raise LightMError(
            f"{path}: cannot be written ({error.strerror or error}); check the folder's rights and the free space"
        ) from error


def sync_folder(folder: Path) -> None:
    """Make the names in a folder outlive a loss of power; does nothing where folders cannot be synced (Windows)."""
    if os.name == "nt":
        return
    with contextlib.suppress(OSError):  # some network file systems refuse; their names are the server's matter
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def is_temporary(path: Path) -> bool:
    """Whether a file is what `replacing` writes to, by its name: it can be left by a killed process alone."""
    return re.fullmatch(r"\..+\.[0-9a-f]{12}\.tmp", path.name) is not None and path.is_file()


def remove_temporaries(folder: Path | str) -> None:
    """Remove the temporary files that a killed process left in `folder`; only for a folder that nobody writes to."""
    with contextlib.suppress(OSError):
        for path in filter(is_temporary, Path(folder).iterdir()):
            with contextlib.suppress(OSError):
                path.unlink()


@contextlib.contextmanager
def atomic_file(path: Path | str) -> Iterator[BinaryIO]:
    """Open a file for writing that takes its name only when the block ends without an error; as `replacing`."""
    with replacing(path) as temporary, open(temporary, "xb") as stream:
        yield stream


def write_text(path: Path | str, text: str) -> None:
    """Write a UTF-8 text file in one step; as `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def file_hash(path: Path | str) -> str:
    """Return size and SHA-256 of a file's content, as "size:hex"; raises InputError where it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
            size = stream.tell()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check the file") from None
    return f"{size}:{digest.hexdigest()}"


LOCK = ".lightm.lock"
_YOUNG_S = 10.0


@contextlib.contextmanager
def locked_folder(folder: Path | str, work: str) -> Iterator[None]:
    """Hold `folder`, made if missing, for this process: another LightM process that wants it is refused meanwhile.

    The lock is the file `.lightm.lock` with process id, host, start of the process and `work` ("training"), created
    exclusively and removed at the end. One whose process on this host is gone is taken over; that of another host,
    whose process cannot be checked, stands until it is deleted by hand. Raises InputError, naming the holder, while
    another process (or another thread) holds it; LightMError when the disk refuses.
    """
    path = Path(folder) / LOCK
    mine = json.dumps({"pid": os.getpid(), "host": platform.node(), "start": _start(os.getpid()), "work": work,
                       "since": time.strftime("%Y-%m-%d %H:%M:%S"), "key": uuid.uuid4().hex})  # fmt: skip
    with disk_refusals(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _take(path, mine)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if _read(path) == mine:
                path.unlink()


def _take(path: Path, mine: str) -> None:
    for _ in range(20):
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            held = _read(path)
            if held is None:  # released this moment
                continue
            if _lives(path, held):
                raise InputError(_refusal(path, held)) from None
            _take_away(path, held)
            continue
        except PermissionError:
            if os.name != "nt" or not path.parent.is_dir():
                raise
            time.sleep(0.05)  # Windows, while another process is deleting the file
            continue
        try:
            os.write(descriptor, mine.encode())
        except OSError:
            with contextlib.suppress(OSError):
                path.unlink()
            raise
        finally:
            os.close(descriptor)
        if _read(path) == mine:
            return
    raise InputError(f"{path}: several processes want this folder at once; try again, or give another folder")


def _take_away(path: Path, stale: str) -> None:
    """Remove the lock of a dead process; should another process have been quicker, its lock is put back."""
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, aside)
        if _read(aside) != stale and not path.exists():
            os.rename(aside, path)
        else:
            aside.unlink()


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None


def _lives(path: Path, held: str) -> bool:
    try:
        content = json.loads(held)
        pid, host, start = int(content["pid"]), str(content["host"]), str(content["start"])
    except (ValueError, KeyError, TypeError):
        try:  # not yet written, or torn by a crash of the machine
            return time.time() - path.stat().st_mtime < _YOUNG_S
        except OSError:
            return True
    return host != platform.node() or (_alive(pid) and start in ("", _start(pid)))


def _refusal(path: Path, held: str) -> str:
    try:
        content = json.loads(held)
        who = f"{content['work']} by process {content['pid']} on {content['host']} since {content['since']}"
    except (ValueError, KeyError, TypeError):
        who = "another process"
    return (
        f"{path.parent}: in use: {who}; wait for its end or give another folder. If that process is gone for certain, "
        f"delete {path}"
    )


def _start(pid: int) -> str:
    """When a process started, as text to compare: tells it from a later one of the same id. Empty where unknown."""
    try:  # Linux: the 22nd field, in ticks since boot; the name in brackets before it may hold blanks
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text(encoding='ascii').strip()} {fields[19]}"
    except (OSError, IndexError):
        return ""


def _alive(pid: int) -> bool:
    if os.name != "nt":
        try:
            os.kill(pid, 0)  # asks, sends nothing
        except ProcessLookupError:
            return False
        except (PermissionError, OverflowError):
            return True
        return True
    import ctypes

    windows: Any = ctypes  # its Windows parts are unknown to type checkers elsewhere
    kernel = windows.windll.kernel32
    handle = kernel.OpenProcess(0x1000, False, pid)  # PROCESS_QUERY_LIMITED_INFORMATION
    if not handle:
        return bool(windows.GetLastError() == 5)  # access denied: it exists, as another user's
    code = ctypes.c_ulong()
    known = kernel.GetExitCodeProcess(handle, ctypes.byref(code))
    kernel.CloseHandle(handle)
    return not known or code.value == 259  # STILL_ACTIVE
