"""Fails the build if an object compiled for one instruction set shares a function with the others.

The linker keeps one copy of an inline function that several objects define. If that copy is the one
with AVX-512 instructions, it is called on machines that have none. So all that a kernel object
defines for others must be in the namespace of its instruction set. Data may be anywhere: constants
are the same for all.

    python check_objects.py ISA OBJECT...
"""

import sys

import elf

HARMLESS = ("__clang_call_terminate",)  # a call, made by the compiler itself


def shared(path, isa):
    """Names of what the object offers to the linker outside the namespace `isa`."""
    mark = f"{len(isa)}{isa}"  # as the compiler mangles a namespace
    for symbol in elf.symbols(path, elf.SYMTAB):
        offered = symbol.defined and symbol.binding != "local" and not symbol.is_data
        if offered and mark not in symbol.name and not symbol.name.startswith(HARMLESS):
            yield symbol.name


def main(isa, *objects):
    found = [(path, name) for path in objects if elf.is_elf(path) for name in shared(path, isa)]
    for path, name in found:
        print(f"{path}: {name} is outside namespace {isa}: make it always_inline, or move it there")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
