"""Builds llama.cpp's llama-bench from the sources that the Python package llama-cpp-python carries."""

import subprocess
import sys
import tarfile
from pathlib import Path

from powerinfer_tools.files import sha256_file

PACKAGE, VERSION = "llama-cpp-python", "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF "
    "-DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_UI=OFF"
).split()
INSTRUCTIONS = {
    "native": [],
    "avx2": [f"-DGGML_{name}" for name in "NATIVE=OFF SSE42=ON AVX=ON AVX2=ON FMA=ON F16C=ON BMI2=ON".split()],
}
# GCC 12 drops what llama.cpp stores for AMX's configuration, so that its prompts crash where a processor has AMX; with
# these it keeps the stores.
WITH_AMX = ["-DCMAKE_CXX_FLAGS=-fno-tree-dse -fno-dse"]


def llama_bench(cache: Path, instructions: str) -> Path:
    """The program below `cache`, built where it is not there yet: ten minutes on two cores."""
    build = cache / VERSION / instructions
    program = build / "bin" / "llama-bench"
    if not program.is_file():
        print(f"building llama.cpp in {build}", file=sys.stderr)
        tools = Path(sys.executable).parent  # cmake and ninja, as `make setup` installs them
        ninja = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}"]
        flags = [*FLAGS, *INSTRUCTIONS[instructions], *(WITH_AMX if instructions == "native" and _has_amx() else [])]
        _do(tools / "cmake", "-S", _sources(cache), "-B", build, *ninja, *flags)
        _do(tools / "cmake", "--build", build, "--target", "llama-bench")
    return program


def _has_amx() -> bool:
    info = Path("/proc/cpuinfo")
    return info.is_file() and "amx_tile" in info.read_text().split()


def _sources(cache: Path) -> Path:
    """llama.cpp's folder, from the source distribution: its digest is checked before it is unpacked."""
    name = f"llama_cpp_python-{VERSION}"
    if not (cache / name).is_dir():
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
        _do(*pip, "--no-deps", "--no-build-isolation", "--no-binary", PACKAGE, "-d", cache, f"{PACKAGE}=={VERSION}")
        archive = cache / f"{name}.tar.gz"
        if (found := sha256_file(archive)) != SHA256:
            raise SystemExit(f"{archive}: expected SHA-256 {SHA256}, found {found}")
        with tarfile.open(archive) as tar:
            tar.extractall(cache / "partial", filter="data")
        (cache / "partial" / name).rename(cache / name)
    return cache / name / "vendor" / "llama.cpp"


def _do(*words: str | Path) -> None:
    """Runs a tool; what it says goes to stderr."""
    subprocess.run(words, check=True, stdout=sys.stderr)
