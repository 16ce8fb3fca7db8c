"""The rules for CUDA sources that let them run on the emulator, as far as text can show them.

Each rule is a number, what to do instead, a pattern, and the files that may. docs/testing.md has
them all, with their reasons; 7, 8 and 11 are for the reader and the emulator.
"""

import re
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
SUFFIXES = {".cu", ".cuh", ".h"}


class Rule(NamedTuple):
    number: int
    advice: str
    pattern: str
    but: tuple[str, ...] = ()  # files that may


PTX = ("ptx.cuh", "ptx90.cuh")
RULES = [
    Rule(1, "inline PTX is in common/ptx.cuh alone", r"\basm\s*(volatile)?\s*\(", PTX),
    Rule(
        2, "no CUB, cooperative groups or cuda:: barriers: they do not compile for the emulator",
        r"<cub/|\bcub::|cooperative_groups|cuda::(barrier|pipeline|memcpy_async)|<cuda/",
    ),
    Rule(2, "name the lanes that take part", r"\b__activemask\b"),
    Rule(2, "a warp has 32 lanes", r"\bwarpSize\b"),
    Rule(
        2, "an operation of a warp names its lanes: use the _sync form",
        r"\b__(shfl|shfl_up|shfl_down|shfl_xor|ballot|any|all)\s*\(",
    ),
    Rule(
        3, "launch through launch() of common/launch.h",
        r"<<<|\bcuLaunch|\bcudaLaunch", ("launch.h",),
    ),
    Rule(
        3, "kernel files make no CUDA calls but launch()",
        r"\b(cuda(Malloc|Memcpy|Memset|Free|Stream|Event|Device|Func|Get|Set)\w*|cu[A-Z]\w+)\s*\(",
        ("launch.h",),
    ),
    Rule(
        4, "shared memory is block_shared<T>() or dynamic_shared<T>()",
        r"\b__shared__\b", ("shared.cuh",),
    ),
    Rule(
        6, "wait with ptx::ld_acquire: a volatile loop would hang the emulator",
        r"\bvolatile\b", PTX,
    ),
    Rule(
        9, "no memcpy or memset in kernels: assign, or loop",
        r"\bmem(cpy|set|move)\s*\(", ("half.h", "launch.h"),
    ),
    Rule(
        10, "kernels include no torch header",
        r'#\s*include\s*[<"](torch|ATen|c10|pybind11|Python\.h)',
    ),
    Rule(
        12, "code for one architecture is behind a wrapper of common/ptx.cuh",
        r"__CUDA_ARCH__", PTX,
    ),
]  # fmt: skip

# Arrays in structs for shared memory (rule 5): T name[N]; within a struct that block_shared or
# dynamic_shared names.
ARRAY = re.compile(r"^(?!\s*return\b)\s*[\w:<>, ]+\s+\w+(\[[^\]]+\])+\s*;")


def without_comments(text):
    """Comments blanked out, lines kept."""

    def blank(match):
        is_string = match[0].startswith('"')
        return match[0] if is_string else re.sub(r"[^\n]", " ", match[0])

    return re.sub(r'//[^\n]*|/\*.*?\*/|"(\\.|[^"\\\n])*"', blank, text, flags=re.DOTALL)


HEADERS = {"cuda.h", "divisor.h", "equations.h", "half.h", "launch.h"}  # that CUDA sources include


def is_cuda(path):
    return path.suffix in {".cu", ".cuh"} or path.name in HEADERS


def raw_shared_arrays(text):
    named = set(re.findall(r"(?:block|dynamic)_shared<(\w+)", text))
    for match in re.finditer(r"struct\s+(\w+)\s*(?:final\s*)?\{(.*?)\n\};", text, flags=re.DOTALL):
        if match[1] not in named:
            continue
        begin = text[: match.start(2)].count("\n") + 1
        for i, line in enumerate(match[2].split("\n")):
            if ARRAY.match(line):
                yield begin + i


def check(path, text):
    """(line, rule, advice) of what is against the rules in one file."""
    code = without_comments(text)
    for rule in RULES:
        if path.name in rule.but:
            continue
        for match in re.finditer(rule.pattern, code):
            yield code[: match.start()].count("\n") + 1, rule.number, rule.advice
    for line in raw_shared_arrays(code):
        yield line, 5, "arrays in shared memory are SharedArray<T, N>, whose bounds are checked"


def check_tree(root):
    found = []
    for path in sorted(root.rglob("*")):
        if path.suffix in SUFFIXES and is_cuda(path):
            found += [
                f"{path.relative_to(root.parent)}:{line}: rule {number}: {advice}"
                for line, number, advice in check(path, path.read_text())
            ]
    return found


if __name__ == "__main__":
    problems = check_tree(ROOT / "csrc")
    print("\n".join(problems) or "the CUDA sources follow the rules")
    sys.exit(bool(problems))
