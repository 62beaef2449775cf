"""Debian packages, read without Debian's tools and without unpacking them."""

import io
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from jaxopt_models.errors import UserError


@dataclass(frozen=True)
class Package:
    """A Debian package in memory.

    Attributes:
      file: where it came from.
      name, version: as its control file says.
      data: a tar archive of what it installs.
    """

    file: Path
    name: str
    version: str
    data: bytes

    @classmethod
    def read(cls, file: Path) -> "Package":
        """Opens a .deb: an `ar` archive of a format version, control files and the files proper.

        Raises:
          UserError: the file cannot be read or is no such archive.
        """
        with _named_in_errors(file):
            members = _ar_members(file.read_bytes())
            control, data = (_starting_with(part, members) for part in ("control.tar", "data.tar"))
            with tarfile.open(fileobj=io.BytesIO(control)) as archive:
                lines = _contents(archive, archive.getmember("./control")).decode().splitlines()
            fields = dict(line.split(": ", 1) for line in lines if ": " in line)
            return cls(file, fields["Package"], fields["Version"], data)

    def pages(self, folder: str) -> list[str]:
        """The HTML files below `folder`, in the order of their paths, bad UTF-8 replaced.

        Raises:
          UserError: the archive is damaged.
        """
        inside = tuple(folder.split("/"))
        with (
            _named_in_errors(self.file),
            tarfile.open(fileobj=io.BytesIO(self.data)) as archive,
        ):
            named = {
                tuple(member.name.removeprefix("./").split("/")): member
                for member in archive.getmembers()
                if member.name.endswith(".html") and not member.isdir()
            }
            wanted = [named[path] for path in sorted(named) if path[: len(inside)] == inside]
            return [_contents(archive, member).decode("utf-8", "replace") for member in wanted]


@contextmanager
def _named_in_errors(file: Path) -> Iterator[None]:
    """Turns what goes wrong while a package is read into one sentence."""
    try:
        yield
    except OSError as error:
        if error.strerror is None:  # a damaged gzip stream is an OSError too
            raise _damaged(file, error) from error
        raise UserError(f"cannot read the package {file}: {error.strerror}") from error
    except (ValueError, KeyError, EOFError, tarfile.TarError, lzma.LZMAError, zlib.error) as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> UserError:
    reason = str(error).partition("\n")[0].rstrip(":")
    return UserError(
        f"{file} is not a whole Debian package that this Python can read ({reason}); download it "
        "again from Debian with `apt-get download`"
    )


def _contents(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = archive.extractfile(member)
    if stream is None:
        raise ValueError(f"{member.name} is not a file")
    return stream.read()


def _ar_members(raw: bytes) -> dict[str, bytes]:
    """The files in an `ar` archive: after each header of 60 bytes a body, padded to even length."""
    if not raw.startswith(b"!<arch>\n"):
        raise ValueError("it does not start as one")
    members, at = {}, 8
    while at < len(raw):
        name, size = raw[at : at + 16].decode().rstrip(" /"), int(raw[at + 48 : at + 58])
        members[name] = raw[at + 60 : at + 60 + size]
        if len(members[name]) < size:
            raise ValueError(f"{name} is cut short")
        at += 60 + size + size % 2
    return members


def _starting_with(part: str, members: dict[str, bytes]) -> bytes:
    """The member `part`, whose name goes on with how it is compressed."""
    for name, body in members.items():
        if name.startswith(part):
            return body
    raise ValueError(f"it has no {part}")
