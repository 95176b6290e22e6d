"""The file a private key is kept in: written whole or not at all, for its owner's eyes, used by one process."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import stat
import sys
from pathlib import Path

from swarm.errors import BadInputError

__all__ = ["KeyFile", "create_key_file", "open_key_file"]

logger = logging.getLogger(__name__)
_MAX_BYTES = 4096
_IS_HELD_ELSEWHERE = (errno.EACCES, errno.EAGAIN)


class KeyFile:
    """An opened key file and its lock; the system releases the lock when the process ends, however it ends."""

    def __init__(self, descriptor: int, data: bytes) -> None:
        self._descriptor: int | None = descriptor
        self.data = data
        """What the file holds, at most a few KiB."""

    def release(self) -> None:
        """Let other processes use the file; harmless when repeated."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        self.release()


def create_key_file(path: Path, data: bytes) -> None:
    """Write `data` to a new file that only its owner can read; a file that appears meanwhile is left as it is.

    Raises BadInputError when the folder can not be made or written.
    """
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(scratch, path)  # unlike a rename, this never replaces what another process just wrote
            except FileExistsError:
                pass
            except OSError:  # a file system without hard links
                os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)
    except OSError as error:
        raise BadInputError(
            f"identity file {path} can not be written ({_reason(error)}); give --identity a file in a folder "
            f"that you may write to"
        ) from error


def open_key_file(path: Path) -> KeyFile:
    """Read the file and keep other processes from using it until it is released.

    Raises BadInputError when another process holds it, or when it can not be read.
    """
    try:
        # Not blocking: opening a named pipe by mistake would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise _unreadable(path, _reason(error)) from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise _unreadable(path, "not a file")
        _lock(path, descriptor)
        _keep_private(path, descriptor)
        return KeyFile(descriptor, os.read(descriptor, _MAX_BYTES))
    except OSError as error:
        os.close(descriptor)
        raise _unreadable(path, _reason(error)) from error
    except BaseException:
        os.close(descriptor)
        raise


def _lock(path: Path, descriptor: int) -> None:
    try:
        _lock_descriptor(descriptor)
    except OSError as error:
        if error.errno in _IS_HELD_ELSEWHERE:
            raise BadInputError(
                f"identity file {path} is in use by another process; stop that one, or give this one a file "
                f"of its own with --identity"
            ) from error
        # Some network file systems have no locks; the check is a convenience, so go on without it.
        logger.debug("identity file %s can not be locked: %s", path, error)


def _lock_descriptor(descriptor: int) -> None:
    if sys.platform != "win32":
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _keep_private(path: Path, descriptor: int) -> None:
    if os.name != "posix":
        return
    mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
    if mode & 0o077:
        logger.warning("identity file %s was readable by others (mode %o); making it private", path, mode)
        with contextlib.suppress(OSError):  # not ours: a read-only secret mounted into a container
            os.fchmod(descriptor, 0o600)


def _unreadable(path: Path, reason: str) -> BadInputError:
    return BadInputError(f"identity file {path} can not be read ({reason}); give --identity a file that you may read")


def _reason(error: OSError) -> str:
    return (error.strerror or type(error).__name__).lower()
