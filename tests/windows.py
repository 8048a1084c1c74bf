"""Windows' rules for files, as far as they can be had elsewhere: `with rules(monkeypatch, folder):` they hold in a folder.

Files that are open, or mapped into memory, are neither renamed nor removed nor replaced; folders are never opened, nor
replaced; only what is open for writing can be synced; some names are impossible; text without an encoding is cp1252, with
\\r\\n at its line ends; there are no SIGKILL and SIGHUP.
"""
import builtins
import errno
import fcntl
import io
import os
import re
import signal
from contextlib import contextmanager
from pathlib import Path

RESERVED = re.compile(r"(?i)^(con|prn|aux|nul|com\d|lpt\d)(\.|$)")


def in_use() -> set[str]:
    "The files that this process has open, or mapped into memory."
    found = {line.split(None, 5)[5].rstrip("\n") for line in Path("/proc/self/maps").open() if line.count("/") and len(line.split(None, 5)) == 6}
    for fd in os.listdir("/proc/self/fd"):
        try: found.add(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError: pass
    return found


def possible(path) -> bool:
    "Could the last part of a path be a name?"
    name = os.path.basename(os.fspath(path)) if not isinstance(path, int) else ""
    name = os.fsdecode(name)
    return not re.search(r'[<>:"|?*\\\x00-\x1f]', name) and not name.endswith((" ", ".")) and not RESERVED.match(name)


@contextmanager
def rules(monkeypatch, folder: Path):
    root = os.path.realpath(folder)
    ours = lambda p: not isinstance(p, int) and os.path.realpath(os.fspath(p)).startswith(root)
    def free(path) -> None:
        whole = os.path.realpath(os.fspath(path))
        if busy := [p for p in in_use() if p == whole or p.startswith(whole + "/")]:
            raise PermissionError(errno.EACCES, "The process cannot access the file because it is being used by another process", busy[0])
    def name(path) -> None:
        if not possible(path): raise OSError(errno.EINVAL, "The filename, directory name, or volume label syntax is incorrect", os.fspath(path))
    old = {f: getattr(os, f) for f in ("open", "fsync", "rename", "replace", "unlink", "remove", "mkdir", "rmdir")}
    def open_(path, flags, *args, **kwargs):
        if ours(path) and os.path.isdir(path) and "dir_fd" not in kwargs: raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
        if ours(path) and flags & os.O_CREAT: name(path)
        return old["open"](path, flags, *args, **kwargs)
    def fsync(fd):
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY: raise OSError(errno.EBADF, "Bad file descriptor")
        return old["fsync"](fd)
    def moved(replace: bool):
        def move(source, target, **kwargs):
            if ours(target):
                free(source); name(target)
                if os.path.exists(target):
                    if not replace: raise FileExistsError(errno.EEXIST, "Cannot create a file when that file already exists", os.fspath(target))
                    if os.path.isdir(target): raise PermissionError(errno.EACCES, "Access is denied", os.fspath(target))
                    free(target)
            return old["replace"](source, target, **kwargs)
        return move
    def removed(how: str):
        def remove(path, **kwargs):
            if kwargs.get("dir_fd") is None and ours(path): free(path)
            return old[how](path, **kwargs)
        return remove
    def mkdir(path, *args, **kwargs):
        if ours(path): name(path)
        return old["mkdir"](path, *args, **kwargs)
    plain = io.open
    def text(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, *more, **also):
        if ours(file) and any(c in mode for c in "wax"): name(file)
        if ours(file) and "b" not in mode:
            if encoding in (None, "locale"): encoding = "cp1252"
            if newline is None and any(c in mode for c in "wax"): newline = "\r\n"
        return plain(file, mode, buffering, encoding, errors, newline, *more, **also)
    with monkeypatch.context() as m:
        m.setattr(os, "open", open_); m.setattr(os, "fsync", fsync); m.setattr(os, "mkdir", mkdir)
        m.setattr(os, "rename", moved(False)); m.setattr(os, "replace", moved(True))
        for how in ("unlink", "remove", "rmdir"): m.setattr(os, how, removed(how))
        m.setattr(io, "open", text); m.setattr(builtins, "open", text)
        m.setattr("shutil._use_fd_functions", False)       # Windows' rmtree goes by names
        m.delattr(os, "O_DIRECTORY")
        for gone in ("SIGKILL", "SIGHUP"): m.delattr(signal, gone)
        yield
