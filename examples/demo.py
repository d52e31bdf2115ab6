"""The main job, end to end, on a real model: what `make demo` runs.

    python examples/demo.py OUT

Takes SmolLM2-135M-Instruct from a PyPI package, fine-tunes all of it on sums (`finetune.py`), compresses the fine-tune
by four methods at the same size, merges one of them back, and compares what is left of the fine-tune. Everything is
kept in OUT, and what is there already is not made again.
"""

import json
import pydoc_data.topics
import subprocess
import sys
import time
from pathlib import Path

EXAMPLES = Path(__file__).parent
METHODS = ("rate-distortion", "delta-come", "low-rank", "bitdelta")
TEST_LINES = 100
OFF_TASK_TOPICS = ("assert", "for", "lambda", "strings", "import", "with", "naming", "numbers")


def run(what: str, *command: str | Path) -> None:
    """Run a command, or end with its error."""
    print(f"\n--- {what}\n$ {' '.join(map(str, command))}", flush=True)
    if subprocess.run(list(map(str, command))).returncode:
        sys.exit(f"the demo stopped: {what} failed; its own message is above")


def write_off_task_text(path: Path) -> None:
    """Text that the fine-tune is not about: pages of Python's own documentation."""
    lines = (json.dumps({"text": pydoc_data.topics.topics[topic][:900]}) for topic in OFF_TASK_TOPICS)
    path.write_text("".join(f"{line}\n" for line in lines))


def main() -> None:
    started = time.monotonic()
    out = Path(sys.argv[1])
    out.mkdir(exist_ok=True)
    deltacome = Path(sys.executable).with_name("deltacome")
    base, finetuned, merged = out / "base", out / "finetuned", out / "merged"
    if not (base / "tokenizer.json").exists():
        run("take the base from its package", sys.executable, EXAMPLES / "smollm2.py", base)
    if not (finetuned / "data").exists():
        run("fine-tune all of its weights on sums", sys.executable, EXAMPLES / "finetune.py", base, finetuned)
    for method in METHODS:
        if not (out / method).exists():
            run(f"compress by {method}", deltacome, "compress", base, finetuned, "-o", out / method, "--method", method)
    delta = out / METHODS[0]
    run("look inside", deltacome, "inspect", delta, "--plot", out / "rate-distortion.png")
    run("look inside low-rank", deltacome, "inspect", out / "low-rank", "--plot", out / "low-rank.png")
    run("check every byte, and the base", deltacome, "verify", delta, "--base", base)
    if not merged.exists():
        run("merge", deltacome, "merge", base, delta, "-o", merged)
    if not (out / "evaluation.json").exists():
        write_off_task_text(out / "offtask.jsonl")
        data = ("--data", finetuned / "data" / "test.jsonl", "--limit", str(TEST_LINES), "--max-new-tokens", "24")
        text = ("--offtask", out / "offtask.jsonl", "--show", "1", "-o", out / "evaluation.json")
        deltas = (part for method in METHODS for part in ("--delta", f"{method}={out / method}"))
        run("compare", deltacome, "evaluate", base, "--finetuned", finetuned, *deltas, *data, *text)
    else:
        print((out / "evaluation.md").read_text())
    print(f"\nall of it is in {out} ({time.monotonic() - started:.0f} s)")


if __name__ == "__main__":
    main()
