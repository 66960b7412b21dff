"""Damage files in a folder as disks, people, file managers and backups do."""

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

FOREIGN_NAMES = (
    ".DS_Store", "._0.0", ".nfs000000000000001", "Thumbs.db", "desktop.ini", "0.0 (copy)", "0.0~",
    ".#0.0", "0.0.swp", ".snapshot", "lost+found", "README.txt", "0", "99.99", "-1.0", "a\nb", "é",
)  # fmt: skip
"""Names that file managers, editors, NFS and people create in folders."""
TIMES = (0, 1, 4_102_444_800, 32_503_680_000)
"""Seconds since 1970: 1970, 2100 and the year 3000."""


@dataclass(frozen=True)
class Damage:
    """A description of a damage, and the damaged paths relative to the folder."""

    text: str
    paths: tuple[str, ...]
    changes_content: bool = True


def files_of(folder: Path) -> list[str]:
    """Return the sorted relative paths of all writable files below a folder."""
    paths = (Path(top, name) for top, _, names in os.walk(folder) for name in names)
    return _writable(folder, paths)


def folders_of(folder: Path) -> list[str]:
    """Return the sorted relative paths of all writable folders below a folder."""
    paths = (Path(top, name) for top, names, _ in os.walk(folder) for name in names)
    return _writable(folder, paths)


def _writable(folder: Path, paths: Iterable[Path]) -> list[str]:
    writable = (p for p in paths if not p.is_symlink() and os.access(p, os.R_OK | os.W_OK))
    return sorted(str(path.relative_to(folder)) for path in writable)


def damage(rng: Random, folder: Path, targets: Sequence[str], folders: Sequence[str]) -> Damage:
    """Damage one of the target files or one of the folders."""
    return rng.choice(DAMAGES)(rng, folder, targets, folders)


Targets = Sequence[str]


def _flip(rng: Random, folder: Path, targets: Targets, folders: Targets) -> Damage:
    name = rng.choice(targets)
    content = bytearray((folder / name).read_bytes())
    count = rng.choice((1, 1, 1, 4, 40)) if content else 0
    for _ in range(count):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    (folder / name).write_bytes(content)
    return Damage(f"{count} bits flipped in {name}", (name,))


def _truncate(rng: Random, folder: Path, targets: Targets, folders: Targets) -> Damage:
    name = rng.choice(targets)
    size = (folder / name).stat().st_size
    length = rng.choice((0, 0, 1, size // 2, max(0, size - 1), rng.randrange(size + 1)))
    os.truncate(folder / name, length)
    return Damage(f"{name} truncated from {size} to {length} bytes", (name,))


def _zero(rng: Random, folder: Path, targets: Targets, folders: Targets) -> Damage:
    name = rng.choice(targets)
    size = (folder / name).stat().st_size
    start = rng.choice((0, 0, size // 2))
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:start] + bytes(size - start))
    return Damage(f"{name} holds zeros from byte {start}", (name,))


def _append(rng: Random, folder: Path, targets: Targets, folders: Targets) -> Damage:
    name = rng.choice(targets)
    tail = rng.choice((b"\0", b"\n", b"}", rng.randbytes(100), (folder / name).read_bytes()))
    with (folder / name).open("ab") as file:
        file.write(tail)
    return Damage(f"{len(tail)} bytes appended to {name}", (name,))


def _replace(rng: Random, folder: Path, targets: Targets, folders: Targets) -> Damage:
    name = rng.choice(targets)
    content = rng.choice((b"{}", b"[]", b"null", b"0", b'"x"', b"\xff\xfe", b"[" * 100_000,
                          b"<html>", rng.randbytes(500), b'{"a": NaN}'))  # fmt: skip
    (folder / name).write_bytes(content)
    return Damage(f"{name} replaced by {content[:20]!r}", (name,))


def _delete(rng: Random, folder: Path, targets: Targets, folders: Targets) -> Damage:
    name = rng.choice(targets)
    (folder / name).unlink()
    return Damage(f"{name} deleted", (name,))


def _delete_folder(rng: Random, folder: Path, targets: Targets, folders: Targets) -> Damage:
    name = rng.choice(folders)
    shutil.rmtree(folder / name)
    return Damage(f"folder {name} deleted", (name,))


def _swap(rng: Random, folder: Path, targets: Targets, folders: Targets) -> Damage:
    one = rng.choice(targets)
    siblings = [name for name in targets if Path(name).parent == Path(one).parent and name != one]
    other = rng.choice(siblings if siblings and rng.random() < 0.7 else targets)
    first, second = (folder / one).read_bytes(), (folder / other).read_bytes()
    (folder / one).write_bytes(second)
    (folder / other).write_bytes(first)
    return Damage(f"{one} and {other} swapped", (one, other), first != second)


def _add_foreign(rng: Random, folder: Path, targets: Targets, folders: Targets) -> Damage:
    name = f"{rng.choice(folders)}/{rng.choice(FOREIGN_NAMES)}"
    path = folder / name
    if os.path.lexists(path):
        return Damage(f"nothing: {name!r} exists", (), False)
    if rng.random() < 0.25:
        path.mkdir()
        (path / "file").write_text("x")
        return Damage(f"foreign folder {name!r}", (name,), False)
    path.write_bytes(rng.choice((b"", b"x", b"\x00\x05\x16\x07", b"{}", b"{")))
    return Damage(f"foreign file {name!r}", (name,), False)


def _file_to_folder(rng: Random, folder: Path, targets: Targets, folders: Targets) -> Damage:
    name = rng.choice(targets)
    (folder / name).unlink()
    (folder / name).mkdir()
    if rng.random() < 0.5:
        (folder / name / "file").write_text("x")
    return Damage(f"{name} is a folder", (name,))


def _folder_to_file(rng: Random, folder: Path, targets: Targets, folders: Targets) -> Damage:
    name = rng.choice(folders)
    shutil.rmtree(folder / name)
    (folder / name).write_bytes(rng.choice((b"", b"x")))
    return Damage(f"folder {name} is a file", (name,))


def _deny(rng: Random, folder: Path, targets: Targets, folders: Targets) -> Damage:
    name = rng.choice((*targets[:1], rng.choice(targets), rng.choice(folders)))
    mode = rng.choice((0o000, 0o200, 0o400, 0o444, 0o500, 0o555))
    os.chmod(folder / name, mode)
    return Damage(f"{name} has mode {mode:03o}", (name,))


def _link(rng: Random, folder: Path, targets: Targets, folders: Targets) -> Damage:
    name = rng.choice(targets)
    path = folder / name
    kind = rng.choice(("hard", "moved", "dangling", "loop", "null", "other", "folder"))
    if kind == "hard":
        os.link(path, folder / f"{kind}-link")
        return Damage(f"{name} has a second hard link", (name,), False)
    if kind == "moved":
        path.rename(folder / "moved")
        path.symlink_to(folder / "moved")
        return Damage(f"{name} is a link to its content", (name,), False)
    target = {
        "dangling": "nowhere",
        "loop": path.name,
        "null": "/dev/null",
        "other": str(folder / rng.choice(targets)),
        "folder": str(folder),
    }[kind]
    path.unlink()
    path.symlink_to(target)
    return Damage(f"{name} is a link: {kind}", (name,))


def _clock(rng: Random, folder: Path, targets: Targets, folders: Targets) -> Damage:
    moment = rng.choice(TIMES)
    names = (*targets, *folders) if rng.random() < 0.4 else (rng.choice((*targets, *folders)),)
    for name in names:
        os.utime(folder / name, (moment, moment))
    text = names[0] if len(names) == 1 else f"{len(names)} files"
    return Damage(f"{text} modified at {moment}", (), False)


DAMAGES: tuple[Callable[[Random, Path, Targets, Targets], Damage], ...] = (
    _flip, _flip, _flip, _truncate, _truncate, _truncate, _zero, _append, _replace, _replace,
    _delete, _delete, _delete_folder, _swap, _add_foreign, _add_foreign, _file_to_folder,
    _folder_to_file, _deny, _link, _clock,
)  # fmt: skip
