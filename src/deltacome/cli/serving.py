"""Commands that answer: once, in a conversation, or as a server."""

import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from deltacome.cli.common import Base, Dtype, Json, NewTokens, Template, app, named_folders, quiet
from deltacome.errors import DeltacomeError

Deltas = Annotated[
    list[str] | None,
    typer.Option("--delta", metavar="[NAME=]DELTA", help="A compressed delta; may be repeated. Without one: the base."),
]
ComputeDtype = Annotated[Dtype, typer.Option(help="To compute in.")]


@app.command(epilog='Example: deltacome generate base/ --delta math-delta/ --prompt "What is 3 + 4?"')
def generate(
    base: Base,
    prompt: Annotated[str, typer.Option(help="The user's message.")],
    delta: Deltas = None,
    max_new_tokens: NewTokens = 256,
    chat_template: Template = None,
    dtype: ComputeDtype = "float32",
    as_json: Json = False,
) -> None:
    """Answer a prompt, greedily, with one or several compressed deltas of a base, in one batch."""
    quiet()
    conversation = _conversation(base, delta or [], chat_template, dtype)
    answers = conversation.say(prompt, max_new_tokens)
    names = [name or "base" for name in conversation.tenants]
    if as_json:
        print(json.dumps({"prompt": prompt, "answers": dict(zip(names, answers, strict=True))}, ensure_ascii=False))
    else:
        print("\n\n".join(answers if len(names) == 1 else map("{}: {}".format, names, answers)))


@app.command(epilog="Example: deltacome chat base/ --delta math=math-delta/ --delta intent=intent-delta/")
def chat(
    base: Base,
    delta: Deltas = None,
    max_new_tokens: NewTokens = 256,
    chat_template: Template = None,
    dtype: ComputeDtype = "float32",
) -> None:
    """Talk to one or several compressed deltas of a base at once. /reset begins anew, /exit or Ctrl-D ends."""
    quiet()
    conversation = _conversation(base, delta or [], chat_template, dtype)
    several = len(conversation.tenants) > 1
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if text == "/exit":
            return
        if text == "/reset":
            conversation.reset()
        elif text:
            answers = conversation.say(text, max_new_tokens, stream=not several)
            for name, answer in zip(conversation.tenants, answers, strict=True):
                if several:
                    print(f"{name}: {answer}")


def _conversation(base: str, deltas: list[str], chat_template: str | None, dtype: str) -> Any:
    """A conversation with the deltas of the command line, or with the base if there are none."""
    from deltacome.checkpoints.checkpoint import Checkpoint
    from deltacome.restore.merging import DTYPES
    from deltacome.runtime.conversation import Conversation
    from deltacome.runtime.model import load

    folders = named_folders(deltas)
    model = load(base, folders, dtype=DTYPES[dtype])
    return Conversation(model, Checkpoint(base), list(folders) or [None], chat_template)


@app.command(
    epilog="Example: deltacome serve base/ --delta math=math-delta/ --delta intent=intent-delta/",
    context_settings={"allow_extra_args": True},
)
def serve(
    context: typer.Context,
    base: Base,
    delta: Annotated[
        list[str] | None, typer.Option(metavar="[NAME=]DELTA", help="A compressed delta to serve; may be repeated.")
    ] = None,
    delta_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Serve every delta in this folder, come when it may; others may be loaded."),
    ] = None,
    memory_limit: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="For deltas, such as 500MB or 2GB; the longest unused are dropped for room."),
    ] = None,
    host: Annotated[str, typer.Option(help="0.0.0.0 to serve other machines too.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option(help="The base's, as a model. [default: its folder's or hub id]")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="DELTACOME_API_KEY", help="Asked of everybody; better in the environment.")
    ] = None,
    api_keys: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help='Keys for some models each: {"KEY": ["MODEL", ...]}.')
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Answers in the running batch.")] = 32,
    max_queue: Annotated[int, typer.Option(min=1, help="Answers that may wait; others get 429.")] = 256,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a prompt and its answer. [default: what the base has room for]")
    ] = None,
    cache_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens whose keys and values are kept, padding too.")
    ] = 32768,
    deadline: Annotated[float, typer.Option(min=0.1, help="Seconds that a request may take.")] = 600.0,
    chat_template: Template = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. [default: cuda where there is one]")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="To compute in. [default: float32 on the CPU]")] = None,
    engine: Annotated[
        Literal["embedded", "vllm"], typer.Option(help="vllm: vLLM's own server; arguments behind -- are for it.")
    ] = "embedded",
) -> None:
    """Serve a base and any number of its deltas through OpenAI's API, all of them in one running batch."""
    from deltacome.restore.merging import DTYPES
    from deltacome.serve.engine.scheduler import Limits
    from deltacome.serve.http.keys import Keys
    from deltacome.serve.server import build, log_as_json, run
    from deltacome.vllm import command

    quiet()
    folders = named_folders(delta or [])
    if engine == "vllm":
        sources = {name: context.get_parameter_source(name) for name in context.params}
        given = {name for name, source in sources.items() if source is not None and source.name != "DEFAULT"}
        for option in ("memory_limit", "api_keys", "max_queue", "cache_tokens", "deadline", "device"):
            if option in given:
                raise DeltacomeError(f"--{option.replace('_', '-')} is not for vLLM; leave it out")
        options = {
            "host": host,
            "port": port,
            "served-model-name": name,
            "max-num-seqs": max_batch if "max_batch" in given else None,
            "max-model-len": max_length,
            "chat-template": chat_template,
            "dtype": dtype,
        }
        command.run(base, folders, folder=delta_dir, options=options, api_key=api_key, more=context.args)
    if context.args:
        raise DeltacomeError(f"{context.args[0]} is no option; arguments behind -- are for --engine vllm")
    log_as_json()  # a delta that is refused says why, before the server is up
    application = build(
        base,
        folders,
        name=name,
        folder=delta_dir,
        memory_limit=_bytes(memory_limit) if memory_limit else None,
        keys=Keys(api_key, api_keys),
        limits=Limits(max_batch, max_queue, cache_tokens),
        max_length=max_length,
        deadline=deadline,
        chat_template=chat_template,
        device=device,
        dtype=DTYPES[dtype] if dtype else None,
    )
    run(application, host, port)


def _bytes(size: str) -> int:
    """Bytes that 500MB, 2GB or 1.5GiB stands for."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", size.strip().upper())
    if not found:
        raise DeltacomeError(f"{size} is no size; write it like 500MB or 2GB")
    number, prefix, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix or " "))
