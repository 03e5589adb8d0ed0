"""The GPU image: what compiles a kernel's launcher at its first use is in its final stage, and the build tries it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests import needs

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
FINAL = DOCKERFILE[DOCKERFILE.rindex("\nFROM ") :]
SOURCE = ROOT / "deploy" / "launcher.c"
CUDA = "typedef int CUresult;\n#define CUDA_SUCCESS 0\n"  # of Triton's cuda.h, what the launcher uses


def test_the_final_stage_has_a_compiler_and_libcs_headers_and_no_nvcc() -> None:
    [installed] = re.findall(r"apt-get install ((?:[^\n]|\\\n)*?) \\\n && rm", FINAL)
    [on_gpus] = re.findall(r'if \[ "\$DEVICE" = gpu \]; then echo ([\w +.-]+); fi', installed)
    assert {"gcc", "g++", "libc6-dev"} <= set(on_gpus.split())
    assert "ARG DEVICE=cpu" in FINAL  # an argument of the first stage is not known in the second
    assert not re.search(r"nvcc|cuda-toolkit|nvidia/cuda", re.sub(r"(?m)^#.*", "", DOCKERFILE))


def test_the_build_compiles_the_launcher_with_the_headers_that_triton_uses() -> None:
    compiled, user = FINAL.index("cc -shared"), FINAL.index("USER 10001")
    assert FINAL.index("apt-get install") < FINAL.index("COPY deploy/launcher.c") < compiled < user
    assert FINAL.index("COPY --from=packages /opt/venv") < compiled
    assert "backends/nvidia/include" in FINAL
    text = SOURCE.read_text()
    assert {"cuda.h", "Python.h", "stdlib.h", "dlfcn.h"} <= set(re.findall(r'#include [<"](\S+)[>"]', text))


def test_the_launcher_compiles_and_asks_the_driver(tmp_path: Path) -> None:
    include = sysconfig.get_paths()["include"]
    if shutil.which("cc") is None or not (Path(include) / "Python.h").exists():
        pytest.skip(needs.debian("gcc", "libc6-dev", "python3-dev"))
    (tmp_path / "cuda.h").write_text(CUDA)
    (tmp_path / "driver.c").write_text("int cuDriverGetVersion(int *version) { *version = 13000; return 0; }\n")
    launcher = tmp_path / f"launcher{sysconfig.get_config_var('EXT_SUFFIX')}"
    build = ["cc", "-shared", "-fPIC", "-Werror", f"-I{include}", f"-I{tmp_path}", "-o", launcher, SOURCE, "-ldl"]
    subprocess.run(build, check=True, capture_output=True)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", tmp_path / "driver.c"], check=True)
    ask = [sys.executable, "-c", "import launcher; print(launcher.version())"]
    found = subprocess.run(
        ask, cwd=tmp_path, env={"LD_LIBRARY_PATH": str(tmp_path)}, check=True, capture_output=True, text=True
    )
    assert found.stdout == "13000\n"


@pytest.mark.parametrize("variable", ["TRITON_CACHE_DIR", "VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR"])
def test_caches_are_in_the_folder_that_our_user_owns(variable: str) -> None:
    [folder] = re.findall(rf"{variable}=(\S+)", FINAL)
    assert Path(folder).parent == Path("/var/cache/anchorage")
    assert re.search(r"install -d -o anchorage -g anchorage [^\n]*/var/cache/anchorage", FINAL)
