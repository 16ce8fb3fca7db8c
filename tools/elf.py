"""Reads what an ELF file (64-bit, little-endian) defines and needs, without any other program.

Linux only. `is_elf` tells whether there is anything to read.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

SYMTAB, DYNAMIC, DYNSYM = 2, 6, 11  # section types
VERSIONS_NEEDED, VERSIONS = 0x6FFFFFFE, 0x6FFFFFFF
BINDINGS = {0: "local", 1: "global", 2: "weak", 10: "unique"}
DYNAMIC_TAGS = {1: "needed", 15: "rpath", 29: "runpath"}


@dataclass(frozen=True)
class Symbol:
    name: str
    binding: str  # local, global, weak or unique
    defined: bool
    is_data: bool = False
    version: str = ""  # of a needed symbol: GLIBC_2.14, GLIBCXX_3.4, ...


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
    (table,) = struct.unpack_from("<Q", image, 40)
    size, count = struct.unpack_from("<HH", image, 58)
    found = []
    for header in range(table, table + size * count, size):
        _, kind, _, _, offset, length, link = struct.unpack_from("<IIQQQQI", image, header)
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
        versions = _versions(all_sections) if kind == DYNSYM else {}
        for i, entry in enumerate(struct.iter_unpack("<IBBHQQ", section.data)):
            name, info, _, defined_in, _, _ = entry
            binding = BINDINGS.get(info >> 4, "other")
            is_data = info & 15 == 1
            yield Symbol(
                _string(strings, name), binding, defined_in != 0, is_data, versions.get(i, "")
            )


def _versions(all_sections):
    """Number of a dynamic symbol -> the version that is needed of it."""
    names = {}
    for section in all_sections:
        if section.type != VERSIONS_NEEDED:
            continue
        strings, at = all_sections[section.link].data, 0
        while True:  # a chain of libraries, and for each a chain of versions
            _, _, _, first, next_library = struct.unpack_from("<HHIII", section.data, at)
            entry = at + first
            while True:
                _, _, number, name, following = struct.unpack_from("<IHHII", section.data, entry)
                names[number] = _string(strings, name)
                entry += following
                if following == 0:
                    break
            at += next_library
            if next_library == 0:
                break
    data = b"".join(section.data for section in all_sections if section.type == VERSIONS)
    numbers = [number for (number,) in struct.iter_unpack("<H", data)]
    return {i: names[number] for i, number in enumerate(numbers) if number in names}


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
