"""Read what a loader would read of an ELF shared library: machine, needs, symbols, versions."""

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass

from mpqc.errors import ArtifactError

MACHINES = {3: "i386", 40: "arm", 62: "x86-64", 183: "aarch64", 243: "riscv"}

_DYNAMIC, _LOAD, _STACK = 2, 1, 0x6474E551
_SHARED_OBJECT = 3
_NEEDED, _HASH, _STRTAB, _SYMTAB, _TEXTREL, _FLAGS = 1, 4, 5, 6, 22, 30
_GNU_HASH, _VERNEED, _VERNEEDNUM = 0x6FFFFEF5, 0x6FFFFFFE, 0x6FFFFFFF
_FLAG_TEXTREL = 4
_EABI_HARD_FLOAT = 0x400
_WEAK = 2


@dataclass(frozen=True)
class Elf:
    """A shared library as its loader sees it.

    Attributes:
        machine: e_machine.
        bits: 32 or 64.
        shared: it can be loaded at any address.
        hard_float: ARM alone: floats are passed in float registers.
        needed: libraries that must be loaded with it.
        undefined: symbols that others must define; weak ones may stay undefined.
        glibc: newest version of glibc that a symbol asks for; (0, 0) when none does.
        executable_stack, text_relocations: what hardened systems refuse.
    """

    machine: int
    bits: int
    shared: bool
    hard_float: bool
    needed: tuple[str, ...]
    undefined: tuple[str, ...]
    glibc: tuple[int, int]
    executable_stack: bool
    text_relocations: bool

    @property
    def machine_name(self) -> str:
        return MACHINES.get(self.machine, f"machine {self.machine}")


def read_elf(data: bytes) -> Elf:
    """Read a little-endian ELF file.

    Raises:
        ArtifactError: it is none, or damaged.
    """
    if data[:4] != b"\x7fELF" or len(data) < 52:
        raise ArtifactError("not an ELF file: the compiler is not one for Linux")
    if data[5] != 1:
        raise ArtifactError("a big-endian ELF file: no target of mpqc is big-endian")
    try:
        return _read(data, 64 if data[4] == 2 else 32)
    except (struct.error, IndexError, ValueError) as error:
        raise ArtifactError(f"a damaged ELF file: {error}") from error


def _read(data: bytes, bits: int) -> Elf:
    wide = bits == 64
    kind, machine = struct.unpack_from("<HH", data, 16)
    table, flags, size, count = (
        (*struct.unpack_from("<Q", data, 32), *struct.unpack_from("<I", data, 48),
         *struct.unpack_from("<HH", data, 54))
        if wide
        else (*struct.unpack_from("<I", data, 28), *struct.unpack_from("<I", data, 36),
              *struct.unpack_from("<HH", data, 42))
    )  # fmt: skip
    segments = [_segment(data, table + size * i, wide) for i in range(count)]
    place = _places(segments)
    entries = [
        entry
        for segment in segments
        if segment.kind == _DYNAMIC
        for entry in _dynamic(data, segment, wide)
    ]
    tags = dict(entries)
    strings = place(tags[_STRTAB]) if _STRTAB in tags else 0

    def text(offset: int) -> str:
        start = strings + offset
        return data[start : data.index(0, start)].decode("utf-8", "replace")

    stack = [segment for segment in segments if segment.kind == _STACK]
    return Elf(
        machine, bits, kind == _SHARED_OBJECT, bool(flags & _EABI_HARD_FLOAT),
        tuple(text(value) for tag, value in entries if tag == _NEEDED),
        tuple(_undefined(data, tags, place, text, wide)),
        _glibc(data, tags, place, text),
        not stack or bool(stack[0].flags & 1),
        _TEXTREL in tags or bool(tags.get(_FLAGS, 0) & _FLAG_TEXTREL),
    )  # fmt: skip


@dataclass(frozen=True)
class _Segment:
    kind: int
    flags: int
    offset: int
    address: int
    size: int


def _segment(data: bytes, at: int, wide: bool) -> _Segment:
    if wide:
        kind, flags, offset, address, _, size = struct.unpack_from("<IIQQQQ", data, at)
    else:
        kind, offset, address, _, size, _, flags = struct.unpack_from("<7I", data, at)
    return _Segment(kind, flags, offset, address, size)


def _places(segments: list[_Segment]) -> Callable[[int], int]:
    """Address in memory -> offset in the file."""

    def place(address: int) -> int:
        for s in segments:
            if s.kind == _LOAD and s.address <= address < s.address + s.size:
                return address - s.address + s.offset
        raise ValueError(f"no segment holds address {address:#x}")

    return place


def _dynamic(data: bytes, segment: _Segment, wide: bool) -> list[tuple[int, int]]:
    form, step = ("<QQ", 16) if wide else ("<II", 8)
    entries: list[tuple[int, int]] = []
    for at in range(segment.offset, segment.offset + segment.size, step):
        tag, value = struct.unpack_from(form, data, at)
        if tag == 0:
            break
        entries.append((tag, value))
    return entries


def _undefined(
    data: bytes,
    tags: dict[int, int],
    place: Callable[[int], int],
    text: Callable[[int], str],
    wide: bool,
) -> list[str]:
    if _SYMTAB not in tags:
        return []
    start, step = place(tags[_SYMTAB]), 24 if wide else 16
    names = []
    for index in range(1, _symbol_count(data, tags, place, wide)):
        at = start + step * index
        (name,) = struct.unpack_from("<I", data, at)
        info, section = (
            struct.unpack_from("<BxH", data, at + 4)
            if wide
            else struct.unpack_from("<BxH", data, at + 12)
        )
        if section == 0 and info >> 4 != _WEAK:
            names.append(text(name))
    return names


def _symbol_count(
    data: bytes, tags: dict[int, int], place: Callable[[int], int], wide: bool
) -> int:
    """Symbols have no count of their own: the hash tables know."""
    if _HASH in tags:
        return int(struct.unpack_from("<I", data, place(tags[_HASH]) + 4)[0])
    if _GNU_HASH not in tags:
        return 0
    at = place(tags[_GNU_HASH])
    buckets, first, bloom, _ = struct.unpack_from("<4I", data, at)
    start = at + 16 + bloom * (8 if wide else 4)
    last = max(struct.unpack_from(f"<{buckets}I", data, start))
    if last < first:
        return int(first)  # nothing is exported: the undefined ones come before
    chains = start + 4 * buckets
    while not struct.unpack_from("<I", data, chains + 4 * (last - first))[0] & 1:
        last += 1
    return int(last) + 1


def _glibc(
    data: bytes, tags: dict[int, int], place: Callable[[int], int], text: Callable[[int], str]
) -> tuple[int, int]:
    newest = (0, 0)
    if _VERNEED not in tags:
        return newest
    at = place(tags[_VERNEED])
    for _ in range(tags.get(_VERNEEDNUM, 0)):
        _, count, _, first, following = struct.unpack_from("<HHIII", data, at)
        inner = at + first
        for _ in range(count):
            _, _, _, name, step = struct.unpack_from("<IHHII", data, inner)
            version = re.fullmatch(r"GLIBC_(\d+)\.(\d+)(\.\d+)?", text(name))
            if version:
                newest = max(newest, (int(version[1]), int(version[2])))
            inner += step
        at += following
    return newest
