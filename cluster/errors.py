"""The one error tree. Each error says what happened, what was expected and what to do next.

    HeliostatError
    ├── UsageError                   the caller asked for something that cannot be
    │   ├── ConfigError              a configuration file or an override is wrong
    │   ├── InvalidReferenceError    a model reference is not NAME, NAME@ALIAS or NAME/VERSION
    │   └── InputError               bad content in a request or a data file; `param` names it
    │       └── NotFiniteError       a model gives what is no finite number
    ├── AuthenticationError          no key, or a wrong, expired or revoked one
    ├── PermissionDeniedError        the key lacks the scope
    ├── NotFoundError                the named thing does not exist
    ├── GoneError                    it existed, and was taken away with notice
    ├── ConflictError                another writer was faster, or the state forbids it
    ├── PayloadTooLargeError         the request is larger than the limit it names
    ├── RateLimitedError             the tenant's limit is reached; try again when it says
    │   └── QuotaExceededError       the tenant's budget of this month is spent
    ├── OverloadedError              no room now; try again later
    │   └── DatabaseBusyError        another process keeps it locked
    ├── UpstreamTimeoutError         a part did not answer in time
    ├── UpstreamFailedError          a part failed under the request; trying again may help
    │   └── ReplicaLeavingError      a replica that has to go leaves the rest to another
    ├── PackageError                 a model package cannot be trusted or used
    │   ├── TamperedPackageError     its files do not match its manifest
    │   │   ├── ExtraFileError
    │   │   ├── MissingFileError
    │   │   └── ChangedFileError
    │   ├── SignatureError           unsigned, or the signature does not verify
    │   │   ├── UnknownKeyError      signed, but by a key that is not trusted here
    │   │   └── RevokedKeyError      signed by a key that is no longer trusted
    │   ├── ForbiddenFileError       pickle, code, a symlink or a path that leaves the package
    │   ├── DecryptionError          encrypted at rest, and the key for it is not here
    │   ├── NewerFormatError         written by a newer Heliostat
    │   └── ParityError              golden inputs do not give the golden outputs
    ├── MachineError                 the machine lacks something
    │   ├── PortInUseError
    │   └── MissingToolError
    ├── NotRunningError              the local cluster is not up
    ├── StartError                   a part of the cluster did not start
    ├── StoppedError                 it was asked to stop, did so in order, and can go on later
    └── JobFailedError               a submitted job ended badly

The classes carry an HTTP status and a CLI exit code, so both faces map errors in one place.
They survive pickling, because they cross Ray.
"""

from __future__ import annotations

import errno
import os
from typing import Any


class HeliostatError(Exception):
    """Base of every error that a user may see.

    Args:
        message: what happened, naming the offending thing and what was expected.
        hint: what to do next.
        param: the field or argument at fault, if there is one.
    """

    code = "internal_error"
    http_status = 500
    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.param = param

    def __str__(self) -> str:
        if not self.hint:
            return self.message
        return f"{self.message}{' ' if self.message.endswith('?') else '; '}{self.hint}"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.hint, self.param)


def _rebuild(
    kind: type[HeliostatError], message: str, hint: str | None, param: str | None
) -> HeliostatError:
    return kind(message, hint=hint, param=param)


class UsageError(HeliostatError):
    code = "invalid_request"
    http_status = 400
    exit_code = 2


class ConfigError(UsageError):
    code = "invalid_config"


class InvalidReferenceError(UsageError):
    code = "invalid_model_reference"


class InputError(UsageError):
    code = "invalid_input"


class NotFiniteError(InputError):
    code = "not_finite"


class AuthenticationError(HeliostatError):
    code = "invalid_api_key"
    http_status = 401


class PermissionDeniedError(HeliostatError):
    code = "permission_denied"
    http_status = 403


class NotFoundError(HeliostatError):
    code = "not_found"
    http_status = 404


class GoneError(HeliostatError):
    code = "gone"
    http_status = 410


class ConflictError(HeliostatError):
    code = "conflict"
    http_status = 409


class PayloadTooLargeError(HeliostatError):
    code = "payload_too_large"
    http_status = 413


class RateLimitedError(HeliostatError):
    """`unit` is what there is too much of: requests, tokens or streams."""

    code = "rate_limit_exceeded"
    http_status = 429

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        param: str | None = None,
        unit: str = "requests",
        retry_after_s: float = 1.0,
    ) -> None:
        super().__init__(message, hint=hint, param=param)
        self.unit = unit
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        return (*super().__reduce__(), {"unit": self.unit, "retry_after_s": self.retry_after_s})


class QuotaExceededError(RateLimitedError):
    code = "insufficient_quota"


class OverloadedError(HeliostatError):
    code = "overloaded"
    http_status = 503


class DatabaseBusyError(OverloadedError):
    code = "database_busy"


class UpstreamTimeoutError(HeliostatError):
    code = "timeout"
    http_status = 504


class UpstreamFailedError(HeliostatError):
    code = "upstream_failed"
    http_status = 502


class ReplicaLeavingError(UpstreamFailedError):
    code = "replica_leaving"


class PackageError(HeliostatError):
    code = "invalid_package"
    http_status = 422


class TamperedPackageError(PackageError):
    code = "package_tampered"


class ExtraFileError(TamperedPackageError):
    code = "package_extra_file"


class MissingFileError(TamperedPackageError):
    code = "package_missing_file"


class ChangedFileError(TamperedPackageError):
    code = "package_changed_file"


class SignatureError(PackageError):
    code = "package_signature"


class UnknownKeyError(SignatureError):
    code = "package_unknown_key"


class RevokedKeyError(SignatureError):
    code = "package_revoked_key"


class ForbiddenFileError(PackageError):
    code = "package_forbidden_file"


class DecryptionError(PackageError):
    code = "package_decryption"


class NewerFormatError(PackageError):
    code = "package_newer_format"


class ParityError(PackageError):
    code = "package_parity"


class MachineError(HeliostatError):
    code = "machine"


_MACHINE_ERRNOS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
)


def first_line(error: object) -> str:
    """What other people's exceptions say before they go into detail."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def as_full_disk(error: BaseException) -> MachineError | None:
    """A disk without room, whichever type a library says it with; None for anything else."""
    number = error.errno if isinstance(error, OSError) else None
    if number not in (errno.ENOSPC, errno.EDQUOT) and os.strerror(errno.ENOSPC) not in str(error):
        return None
    return MachineError(
        "no space left on the disk",
        hint="free some, or move HELIOSTAT_HOME or HELIOSTAT_STORAGE_URL",
    )


def as_machine_error(error: OSError) -> MachineError | None:
    """A full, read-only or closed disk, or too long a path, as one of ours; None for what is
    rather our mistake."""
    if error.errno == errno.ENAMETOOLONG:
        shown = f"path '{str(error.filename)[:60]}…'" if error.filename else "a path"
        return MachineError(f"{shown} is too long for the file system", hint="give a shorter one")
    if error.errno not in _MACHINE_ERRNOS:
        return None
    # Of a copy that failed for want of room, the second is the one that is written.
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    name = (is_full and error.filename2) or error.filename
    where = f"'{name}' cannot be used" if name else "a file cannot be written"
    return MachineError(
        f"{where}: {error.strerror}", hint="check the disk and its permissions, or HELIOSTAT_HOME"
    )


class PortInUseError(MachineError):
    code = "port_in_use"


class MissingToolError(MachineError):
    code = "missing_tool"


class NotRunningError(HeliostatError):
    code = "not_running"
    http_status = 503


class StartError(HeliostatError):
    code = "start_failed"


class StoppedError(HeliostatError):
    """Its exit code is what a shell says of a process that SIGTERM ended, unless Ctrl-C did it."""

    code = "stopped"
    exit_code = 143


class JobFailedError(HeliostatError):
    code = "job_failed"


PASSING_ERRORS = (OverloadedError, UpstreamTimeoutError, UpstreamFailedError, NotRunningError)
"""A part is busy or away: what was asked for is not at fault, and may work a moment later."""
