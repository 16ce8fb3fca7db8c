"""The package as a whole: the built library, the names, what a user meets first."""

import ast
import inspect
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import statescan
import torch
from statescan import _C, reference

ROOT = Path(__file__).parents[1]
OPS = [name for name in statescan.__all__ if inspect.isfunction(getattr(statescan, name))]

sys.path.insert(0, str(ROOT / "tools"))
import check_objects  # noqa: E402
import elf  # noqa: E402

needs_elf = pytest.mark.skipif(
    not elf.is_elf(_C.__file__), reason="reads the ELF format, which this system does not use"
)
as_released = pytest.mark.skipif(
    bool(_C.sanitizers), reason="a sanitizer adds symbols, and the paths it reports"
)

# What statescan may use of torch: the C functions of the stable ABI that torch 2.10 has.
STABLE_TORCH = {
    "aoti_torch_abi_version",
    "aoti_torch_create_device_guard",
    "aoti_torch_delete_device_guard",
    "aoti_torch_delete_library_object",
    "aoti_torch_delete_tensor_object",
    "aoti_torch_device_type_cpu",
    "aoti_torch_device_type_cuda",
    "aoti_torch_get_current_cuda_stream",
    "aoti_torch_get_data_ptr",
    "aoti_torch_get_device_index",
    "aoti_torch_get_device_type",
    "aoti_torch_get_dim",
    "aoti_torch_get_dtype",
    "aoti_torch_get_numel",
    "aoti_torch_get_size",
    "aoti_torch_get_sizes",
    "aoti_torch_get_storage_offset",
    "aoti_torch_get_stride",
    "aoti_torch_get_strides",
    "aoti_torch_is_contiguous",
    "aoti_torch_is_defined",
    "aoti_torch_library_def",
    "aoti_torch_library_init_def",
    "aoti_torch_library_init_fragment",
    "aoti_torch_library_init_impl",
    "aoti_torch_memory_format_contiguous_format",
    "aoti_torch_new_tensor_handle",
    "torch_c10_cuda_check_msg",
    "torch_c10_cuda_free_error_msg",
    "torch_call_dispatcher",
    "torch_cuda_stream_synchronize",
    "torch_delete_list",
    "torch_delete_string",
    "torch_get_const_data_ptr",
    "torch_get_cuda_stream_from_pool",
    "torch_get_current_cuda_blas_handle",
    "torch_get_mutable_data_ptr",
    "torch_get_num_threads",
    "torch_get_thread_idx",
    "torch_library_impl",
    "torch_list_get_item",
    "torch_list_push_back",
    "torch_list_set_item",
    "torch_list_size",
    "torch_new_list_reserve_size",
    "torch_new_string_handle",
    "torch_parallel_for",
    "torch_parse_device_string",
    "torch_set_current_cuda_stream",
    "torch_set_requires_grad",
    "torch_string_c_str",
    "torch_string_length",
}
STABLE_TORCH_PREFIXES = ("aoti_torch_dtype_",)
PYTHON = re.compile(r"_?Py[A-Z_]")
LINKER = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}
SYSTEM = re.compile(r"(GLIBC|GLIBCXX|CXXABI|GCC)_")  # versions: libc, libm, libstdc++, libgcc
# Functions of std:: are at times without a version: torch's own library may offer them too.
STD = re.compile(r"_ZNK?St")


def python(*arguments, cwd=None, **environment):
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, text=True, capture_output=True, timeout=120,
        env=os.environ | environment,
    )  # fmt: skip


# ---- the built library


def is_stable(symbol):
    return (
        SYSTEM.match(symbol.version)
        or symbol.name in STABLE_TORCH | LINKER
        or symbol.name.startswith(STABLE_TORCH_PREFIXES)
        or PYTHON.match(symbol.name)
        or STD.match(symbol.name)
    )


@needs_elf
@as_released
def test_library_needs_only_stable_symbols():
    needed = [s for s in elf.symbols(_C.__file__, elf.DYNSYM) if not s.defined and s.name]
    assert "torch_call_dispatcher" in {s.name for s in needed}  # it is read as it should be
    assert [s for s in needed if not is_stable(s)] == []


@pytest.mark.parametrize(
    "name", ["_ZN2at5emptyEv", "_ZN3c1010TensorImplC1Ev", "aoti_torch_cpu_convolution"]
)
def test_unstable_symbols_would_be_found(name):
    assert not is_stable(elf.Symbol(name, "global", defined=False))


@needs_elf
def test_library_offers_no_function_but_its_module():
    ours = [s.name for s in elf.symbols(_C.__file__, elf.DYNSYM) if s.defined]
    assert "PyInit__C" in ours
    assert [name for name in ours if "statescan" in name] == []


@needs_elf
def test_library_finds_its_dependencies_without_paths():
    entries = list(elf.dynamic(_C.__file__))
    assert ("needed", "libtorch_cpu.so") in entries
    assert [entry for entry in entries if entry[0] != "needed" or "/" in entry[1]] == []
    assert [name for kind, name in entries if "cuda" in name or "cudart" in name] == []


@as_released
def test_library_holds_no_path_of_the_machine_that_built_it():
    image = Path(_C.__file__).read_bytes()
    places = {str(ROOT), str(Path(torch.__file__).parent), str(Path.home())} - {"/"}
    assert [place for place in places if place.encode() + b"/" in image] == []


@needs_elf
def test_shared_functions_of_an_instruction_set_are_found(tmp_path):
    """The check that the build makes of its kernel objects, on an object with one fault."""
    source = tmp_path / "kernel.cpp"
    source.write_text(
        "namespace statescan::avx2 { int right() { return 1; } }\n"
        "namespace statescan { __attribute__((noinline)) inline int wrong() { return 2; }\n"
        "int avx2_user() { return wrong(); } }\n"
    )
    compiler = os.environ.get("CXX", "c++")
    subprocess.run([compiler, "-c", source.name, "-o", "kernel.o"], cwd=tmp_path, check=True)
    names = sorted(check_objects.shared(tmp_path / "kernel.o", "avx2"))
    assert names == ["_ZN9statescan5wrongEv", "_ZN9statescan9avx2_userEv"]


def test_kernels_include_no_torch_header():
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")]
    kernels = [p for p in sources if "bindings" not in p.parts]
    assert len(kernels) > 10
    include = re.compile(r'#\s*include\s*[<"](torch|ATen|c10|pybind11|Python\.h)')
    assert [str(p) for p in kernels if include.search(p.read_text())] == []


def test_bindings_include_only_stable_torch_headers():
    include = re.compile(r'#\s*include\s*[<"]((?:torch|ATen|c10)/[^>"]+)')
    stable = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/")
    found = [
        header
        for path in (ROOT / "csrc" / "bindings").iterdir()
        for header in include.findall(path.read_text())
    ]
    assert found and all(header.startswith(stable) for header in found)


# ---- building it


def test_torch_is_found_where_pip_hides_it():
    """An isolated build does not see site-packages, and must not fetch another torch for that."""
    code = """
        import sys
        sys.path[:] = [p for p in sys.path if "-packages" not in p] + ["tools"]
        import find_torch
        print(find_torch.find()[0])
    """
    done = python("-c", inspect.cleandoc(code), cwd=ROOT, PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).samefile(Path(torch.__file__).parent)


# ---- the instruction sets


def test_unknown_isa_is_an_error_at_import():
    done = python("-c", "import statescan", STATESCAN_ISA="nonsense")
    assert done.returncode != 0
    message = f"STATESCAN_ISA must be one of {', '.join(reversed(_C.supported_isas()))}"
    assert message in done.stderr and "got nonsense" in done.stderr


@pytest.mark.parametrize("isa", _C.supported_isas())
def test_each_isa_can_be_chosen(isa):
    done = python("-c", "import statescan; print(statescan._C.isa())", STATESCAN_ISA=isa)
    assert (done.stdout.strip(), done.returncode) == (isa, 0), done.stderr


def test_the_widest_isa_is_the_default():
    done = python("-c", "import statescan; print(statescan._C.isa())", STATESCAN_ISA="")
    assert done.stdout.strip() == _C.supported_isas()[-1]


# ---- python -m statescan


@pytest.mark.parametrize("arguments", [(), ("info",)], ids=["plain", "info"])
def test_info_names_what_a_bug_report_needs(arguments):
    done = python("-m", "statescan", *arguments)
    assert done.returncode == 0, done.stderr
    lines = dict(re.findall(r"^  (\S+(?: \S+)*?)  +(.+)$", done.stdout, re.MULTILINE))
    assert lines["compiler"] == _C.compiler
    assert lines["torch headers"] == _C.torch_headers
    assert lines["CUDA kernels"] == (_C.cuda or "none")
    assert lines["instruction set"].startswith(_C.isa())
    assert lines["statescan"] == statescan.__version__
    assert lines["torch"] == torch.__version__
    expected = {"build type", "library", "CPU", "threads", "GPU", "python", "system"}
    assert expected <= lines.keys()


def test_an_unknown_command_says_which_there_are():
    done = python("-m", "statescan", "nonsense")
    assert done.returncode == 2
    assert "statescan bench" in done.stderr


# ---- the Python package


def test_version_is_that_of_the_metadata():
    try:
        assert statescan.__version__ == metadata.version("statescan")
    except metadata.PackageNotFoundError:
        assert statescan.__version__ == "0+source"  # in the source tree


def test_version_is_in_the_changelog():
    project = (ROOT / "pyproject.toml").read_text()
    version = re.search(r'^version = "(.+)"', project, re.MULTILINE)[1]
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_types_are_announced():
    assert (Path(statescan.__file__).parent / "py.typed").is_file()


# What `import torch` does not load, and `import statescan` must not either: it would cost every
# user time or be one more thing to install.
HEAVY = {"torch._inductor", "torch._dynamo", "torchvision", "transformers", "triton", "pandas",
         "matplotlib", "scipy", "statescan.bench", "hypothesis", "pytest"}  # fmt: skip


def test_import_is_light_and_needs_no_gpu():
    code = """
        import sys, torch
        before = set(sys.modules)
        import statescan
        print(*sorted(set(sys.modules) - before))
        assert not torch.cuda.is_initialized()
    """
    done = python("-c", inspect.cleandoc(code), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    new = set(done.stdout.split())
    assert "statescan" in new
    assert new & HEAVY == set()
    elsewhere = {name.partition(".")[0] for name in new} - set(sys.stdlib_module_names)
    assert elsewhere == {"statescan"} | elsewhere & {"torch"}


def test_dependencies_are_what_is_imported():
    """Third-party modules that the package imports at its top level: torch alone."""
    package = Path(statescan.__file__).parent
    found = set()
    for path in package.rglob("*.py"):
        if "bench" in path.parts:
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add((node.module or "").partition(".")[0])
    assert found - set(sys.stdlib_module_names) == {"torch", "statescan"}


# Compositions of torch operators and of ours: no kernel, no schema.
COMPOSED = {"decay_mask", "materialize_mixer", "mamba2_mixer"}
ADJOINTS = {"cross_merge": "cross_scan", "route_scatter": "route_gather"}


@pytest.mark.parametrize("op", OPS)
def test_every_operator_has_its_place_on_every_layer(op):
    function = getattr(statescan, op)
    package, _, home = function.__module__.rpartition(".")
    # A step is at home with its scan, and an adjoint with what it is the adjoint of.
    assert package == "statescan.ops" and ADJOINTS.get(op, op).startswith(home)
    assert inspect.getdoc(function)
    assert callable(getattr(reference, op))
    if op in COMPOSED:
        assert any(op in path.read_text() for path in ROOT.glob("tests/test_*.py"))
        assert any(op in path.read_text() for path in ROOT.glob("docs/*.md"))
        return
    assert {op, f"{op}_fwd"} & set(schemas())
    assert (ROOT / "csrc" / home).is_dir()
    assert (ROOT / "csrc" / "bindings" / f"{home}.cpp").is_file()
    assert (ROOT / "tests" / f"test_{home}.py").is_file()
    assert (ROOT / "docs" / f"{home}.md").is_file()


def schemas():
    text = (ROOT / "csrc" / "bindings" / "library.cpp").read_text()
    return re.findall(r'm\.def\(\s*"(\w+)\(', text)


@pytest.mark.parametrize("schema", schemas())
def test_every_schema_is_registered(schema):
    assert getattr(torch.ops.statescan, schema).default._schema.name == f"statescan::{schema}"


def test_memory_starts_as_nan():
    """The fixture does what it says, for the two calls by which the bindings allocate."""
    x = torch.zeros(3, dtype=torch.bfloat16)
    assert torch.ops.aten.new_empty(x, [5]).isnan().all()
    assert torch.ops.aten.empty_like(x, dtype=torch.float64).isnan().all()
