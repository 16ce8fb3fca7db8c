"""The CUDA sources follow the rules of docs/testing.md, and the lint finds what does not."""

from pathlib import Path

import pytest
import rules

AGAINST = {
    1: 'asm volatile("bar.sync 0;");',
    2: "int lanes = __activemask();",
    3: "kernel<<<grid, block>>>(p);",
    4: "__shared__ float tile[32];",
    5: "struct Tile {\n  float x[32];\n};\nvoid f() { auto& s = block_shared<Tile>(); }",
    6: "while (*(volatile int*)flag == 0) {}",
    9: "memcpy(shared, global, 64);",
    10: "#include <torch/csrc/stable/tensor.h>",
    12: "#if __CUDA_ARCH__ >= 900\n#endif",
}


def found(text, name="kernel.cu"):
    return [number for _, number, _ in rules.check(Path(name), text)]


def test_the_sources_follow_the_rules():
    assert rules.check_tree(rules.ROOT / "csrc") == []


@pytest.mark.parametrize("number", AGAINST)
def test_each_rule_is_found(number):
    assert number in found(AGAINST[number])


@pytest.mark.parametrize(
    "line",
    [
        "#include <cub/cub.cuh>",
        "namespace cg = cooperative_groups;",
        "x = __shfl_down(x, 1);",
        "if (lane == warpSize) {}",
        "cudaMemcpyAsync(a, b, n, kind, stream);",
        "cudaFuncSetAttribute(f, a, b);",
        "cuda::barrier<cuda::thread_scope_block> b;",
    ],
)
def test_other_ways_to_break_them(line):
    assert found(line)


@pytest.mark.parametrize(
    "text",
    [
        "// __shared__ memory, as <<< >>> would have it",
        "x = __shfl_down_sync(kAllLanes, x, 1);",
        "struct Tile {\n  SharedArray<float, 32> x;\n};\nTile& s = block_shared<Tile>();",
        "struct Registers {\n  float x[8];\n};",
    ],
)
def test_what_is_right_is_not_found(text):
    assert found(text) == []


def test_the_line_is_named():
    ((line, _, _),) = rules.check(Path("kernel.cu"), "int a;\n\n__shared__ int b;\n")
    assert line == 3
