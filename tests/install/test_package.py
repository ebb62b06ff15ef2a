# SPDX-License-Identifier: Apache-2.0
"""A package built as a stranger would: unpacked sdist, no git, isolated, few kernels.

What sdist and wheel hold, what the module links, and that all three doors open: Python with NumPy
alone, the library, the headers; the last two from the wheel and from an install tree.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2]
ALLOWED_LIBRARIES = re.compile(
    r"^(linux-vdso|ld-linux-x86-64|libc|libm|libstdc\+\+|libgcc_s|libpthread|libdl|librt)\.so"
)


def run(*command: object, cwd: Path | None = None, **environment: str) -> str:
    """Standard output of a command that must succeed; its whole output in the failure."""
    words = [str(word) for word in command]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        words, cwd=cwd, env=kept | environment, text=True, check=False, capture_output=True
    )
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def newest_python() -> str:
    """A Python 3.12+ if there is one: its wheel serves every later Python."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for name in ("python3.14", "python3.13", "python3.12"):
        for found in (shutil.which(name), *pyenv.glob(f"*/bin/{name}")):
            if (
                found
                and subprocess.run([found, "-c", "import ensurepip"], check=False).returncode == 0
            ):
                return str(found)
    return sys.executable


@dataclass(frozen=True)
class Environment:
    """A virtual environment with NumPy and the wheel, and nothing else."""

    root: Path

    @property
    def python(self) -> Path:
        return self.root / "bin" / "python"

    def evaluate(self, expression: str) -> str:
        code = f"import bitdecoding; print({expression})"
        return run(self.python, "-c", code, cwd=self.root).strip()


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--outdir", out, SOURCE)
    (archive,) = out.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="session")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(work)
    (tree,) = (path for path in work.iterdir() if path.is_dir())
    run(newest_python(), "-m", "venv", work / "builder")
    options = ("KERNELS=pack_k4v4_?_d64", f"CUDA={os.environ.get('BITDECODING_CUDA', 'auto')}")
    run(
        *(work / "builder/bin/python", "-m", "pip", "wheel", "--no-deps", "--wheel-dir", work),
        *(f"-Ccmake.define.BITDECODING_{option}" for option in options),
        *("-Ccmake.define.CMAKE_CUDA_ARCHITECTURES=90a-real", tree),
    )
    (built,) = work.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    root = tmp_path_factory.mktemp("environment")
    run(newest_python(), "-m", "venv", root)
    run(root / "bin/python", "-m", "pip", "install", "--quiet", wheel)
    return Environment(root)


@pytest.fixture(scope="session")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An install tree of the build that ctest runs in."""
    tree = os.environ.get("BITDECODING_BUILD")
    if not tree:
        pytest.skip("BITDECODING_BUILD names no build tree; ctest sets it")
    root = tmp_path_factory.mktemp("prefix")
    run("cmake", "--install", tree, "--prefix", root)
    return root


def test_sdist_has_sources_and_no_output(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = [name.split("/", 1)[1] for name in archive.getnames() if "/" in name]
    assert {"CMakeLists.txt", "third_party/toolchain.txt", "LICENSE", "src/kernels.cmake"} <= set(
        names
    )
    stray = [
        n for n in names if n.startswith(("build/", "dist/", ".venv", ".git/")) or "/_ext" in n
    ]
    assert not stray


def test_wheel_carries_all_doors(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    package = "bitdecoding/lib/cmake/bitdecoding"
    for name in (
        "bitdecoding/include/bitdecoding/bitdecoding.hpp",
        "bitdecoding/include/bitdecoding/layout/packed_kv_tensor.hpp",
        "bitdecoding/include/bitdecoding/quantize/pack_launch.cuh",
        "bitdecoding/lib/libbitdecoding.a",
        f"{package}/bitdecodingConfig.cmake",
        f"{package}/bitdecodingToolchain.cmake",
        f"{package}/toolchain.txt",
        "bitdecoding/_ext.pyi",
        "bitdecoding/py.typed",
    ):
        assert name in names
    for licence in ("LICENSE", "THIRD_PARTY.md"):
        assert any(name.endswith(f".dist-info/licenses/{licence}") for name in names)
    assert not [name for name in names if "doctest" in name or name.endswith((".cu", ".in"))]


def test_stable_abi(wheel: Path) -> None:
    tag = wheel.name.split("-")[2:4]
    if tag[0] != "cp312":
        pytest.skip(f"no Python 3.12 or newer found; the wheel is {'-'.join(tag)}")
    assert tag == ["cp312", "abi3"]
    with zipfile.ZipFile(wheel) as archive:
        assert "bitdecoding/_ext.abi3.so" in archive.namelist()


def test_module_links_the_c_and_cxx_runtime_only(environment: Environment) -> None:
    module = environment.evaluate("bitdecoding._ext.__file__")
    libraries = [line.split()[0] for line in run("ldd", module).splitlines()]
    other = [name for name in libraries if not ALLOWED_LIBRARIES.match(Path(name).name)]
    assert not other


def test_runs_with_numpy_alone(environment: Environment) -> None:
    script = SOURCE / "tests/install/use_package.py"
    assert "packed, appended, decoded" in run(environment.python, script, cwd=environment.root)


def test_knows_itself(environment: Environment) -> None:
    header = (SOURCE / "include/bitdecoding/version.hpp").read_text()
    (version,) = re.findall(r'kVersion\[\] = "([^"]+)"', header)
    assert environment.evaluate("bitdecoding.__version__") == version
    assert environment.evaluate("bitdecoding.build_info()['git']") == "unknown"
    command = [environment.root / "bin/bitdecoding", "info"]
    assert version in run(*command, cwd=environment.root)


def test_python_tests_pass_on_the_wheel(environment: Environment, tmp_path: Path) -> None:
    pins = (SOURCE / "constraints.txt").read_text().splitlines()
    tools = [pin for pin in pins if pin.startswith(("pytest", "hypothesis"))]
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("\n".join(tools))
    target = tmp_path / "tools"  # beside the environment, which stays empty
    run(
        environment.python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--target",
        target,
        "-r",
        requirements,
    )
    for name in ("tests/python", "docs", "benchmarks"):
        shutil.copytree(SOURCE / name, tmp_path / name)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(SOURCE / name, tmp_path)
    print(run(environment.python, "-m", "pytest", "-q", cwd=tmp_path, PYTHONPATH=str(target)))


def build_consumer(name: str, build: Path, *options: str) -> Path:
    source = SOURCE / "tests/consumer" / name
    run("cmake", "-S", source, "-B", build, "-G", "Ninja", *options)
    run("cmake", "--build", build)
    return build


@pytest.fixture(params=["prefix", "wheel"])
def package(request: pytest.FixtureRequest) -> str:
    """The CMake package of the install tree, or of the installed wheel."""
    if request.param == "prefix":
        return f"{request.getfixturevalue('prefix')}/lib/cmake/bitdecoding"
    environment: Environment = request.getfixturevalue("environment")
    return environment.evaluate("bitdecoding.get_cmake_dir()")


def test_library_consumer_needs_no_cute(package: str, tmp_path: Path) -> None:
    nowhere = f"-DBITDECODING_TOOLCHAIN_DIR={tmp_path}/nowhere"
    no_python = "-DCMAKE_DISABLE_FIND_PACKAGE_Python=ON"
    options = [f"-Dbitdecoding_DIR={package}", nowhere, no_python]
    build = build_consumer("library", tmp_path, *options)
    print(run(build / "consumer"))


def test_headers_consumer(package: str, tmp_path: Path) -> None:
    options = [f"-Dbitdecoding_DIR={package}"]
    if nvcc := os.environ.get("BITDECODING_NVCC"):
        options.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
    build = build_consumer("headers", tmp_path, *options)
    print(run(build / "consumer"))
    if nvcc:
        run(build / "launcher")


def test_headers_consumer_is_told_what_is_missing(package: str, tmp_path: Path) -> None:
    source = SOURCE / "tests/consumer/headers"
    options = [f"-Dbitdecoding_DIR={package}", "-DCUTLASS_INCLUDE_DIR=/nowhere"]
    command = ["cmake", "-S", str(source), "-B", str(tmp_path), "-G", "Ninja", *options]
    done = subprocess.run(command, text=True, check=False, capture_output=True)
    assert done.returncode != 0
    assert "CUTLASS_INCLUDE_DIR" in done.stderr
