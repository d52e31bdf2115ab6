"""What the site needs besides `docs/`: pictures of `results/`, links to the repository, the help of every command."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent
LINK = re.compile(r"\]\(\.\./([^)#\s]+)(#[^)\s]*)?\)")  # of a page to a file outside docs/


def on_files(files: Files, config: Any) -> Files:
    """Add the pictures of results and the page of commands."""
    for path in sorted(ROOT.glob("results/**/*.png")):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    files.append(File.generated(config, "commands.md", content=commands()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Links that lead out of `docs/`: pictures to the site's own, others to the project page.

    One that leads nowhere stays as it is, and mkdocs warns.
    """

    def turn(link: re.Match[str]) -> str:
        path, anchor = link[1], link[2] or ""
        if not (ROOT / path).exists():
            return link[0]
        if path.endswith(".png"):
            return f"]({path})"
        return f"]({config.repo_url}/blob/main/{path}{anchor})"

    return LINK.sub(turn, markdown)


def commands() -> str:
    """The help of every command, as typer's own program writes it."""
    command = [sys.executable, "-m", "typer", "deltacome.cli.commands", "utils", "docs", "--name", "deltacome"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    output = subprocess.run(
        [*command, "--title", "Command line"], check=True, capture_output=True, text=True, env=environment
    )
    return output.stdout
