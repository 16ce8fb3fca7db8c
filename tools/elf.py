"""Reads what an ELF file (64-bit, little-endian) defines and needs, without any other program.

Linux only. `is_elf` tells whether there is anything to read.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

SYMTAB, DYNAMIC, DYNSYM = 2, 6, 11  # section types
BINDINGS = {0: "local", 1: "global", 2: "weak", 10: "unique"}
DYNAMIC_TAGS = {1: "needed", 15: "rpath", 29: "runpath"}


@dataclass(frozen=True)
class Symbol:
    name: str
    binding: str  # local, global, weak or unique
    defined: bool


@dataclass(frozen=True)
class Section:
    type: int
    link: int  # number of the section that holds its strings
    data: bytes


def is_elf(path):
    with Path(path).open("rb") as file:
        return file.read(6) == b"\x7fELF\x02\x01"


def sections(path):
    image = Path(path).read_bytes()
    table, size, count = *struct.unpack_from("<Q", image, 40), *struct.unpack_from("<HH", image, 58)
    found = []
    for i in range(count):
        _, kind, _, _, offset, length, link = struct.unpack_from("<IIQQQQI", image, table + i * size)
        nobits = kind == 8  # takes no room in the file
        found.append(Section(kind, link, b"" if nobits else image[offset : offset + length]))
    return found


def symbols(path, kind):
    """The symbols of the sections of one type: SYMTAB of an object, DYNSYM of a library."""
    all_sections = sections(path)
    for section in all_sections:
        if section.type != kind:
            continue
        strings = all_sections[section.link].data
        for name, info, _, defined_in, _, _ in struct.iter_unpack("<IBBHQQ", section.data):
            binding = BINDINGS.get(info >> 4, "other")
            yield Symbol(_string(strings, name), binding, defined_in != 0)


def dynamic(path):
    """(tag, value) of a library's dynamic section: the libraries it needs, and its search paths."""
    all_sections = sections(path)
    for section in all_sections:
        if section.type != DYNAMIC:
            continue
        strings = all_sections[section.link].data
        for tag, value in struct.iter_unpack("<qQ", section.data):
            if tag in DYNAMIC_TAGS:
                yield DYNAMIC_TAGS[tag], _string(strings, value)


def _string(strings, offset):
    return strings[offset : strings.index(b"\0", offset)].decode()
