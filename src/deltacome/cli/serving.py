"""Commands that answer: once, in a conversation, or as a server."""

import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from deltacome.cli.common import Base, Device, Dtype, Json, NewTokens, Template, app, named_folders, quiet
from deltacome.cli.config import from_file
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


ServedDeltas = Annotated[
    list[str] | None, typer.Option(metavar="[NAME=]DELTA", help="A compressed delta to serve; may be repeated.")
]
DeltaDir = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Serve every delta in this folder, come when it may; others may be loaded."),
]
ServedStore = Annotated[
    str | None,
    typer.Option("--store", metavar="ADDRESS", help="Serve every delta of this base in this store; see docs/store.md."),
]
StoreCache = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="For what is fetched from the store, such as 50GB. [default: the disk]"),
]
Pin = Annotated[
    list[str] | None, typer.Option(metavar="NAME", help="A delta to load at once and never to drop; may be repeated.")
]
MemoryLimit = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="For deltas, such as 500MB or 2GB; the longest unused are dropped for room."),
]
Host = Annotated[str, typer.Option(help="0.0.0.0 to serve other machines too.")]
Port = Annotated[int, typer.Option(min=0, max=65535)]
Name = Annotated[str | None, typer.Option(help="The base's, as a model. [default: its folder's or hub id]")]
ApiKey = Annotated[
    str | None, typer.Option(envvar="DELTACOME_API_KEY", help="Asked of everybody; better in the environment.")
]
ApiKeys = Annotated[
    Path | None,
    typer.Option(metavar="FILE.json", help='Keys for some models each: {"KEY": ["MODEL", ...]}, or with quotas.'),
]
MaxBatch = Annotated[int, typer.Option(min=1, help="Answers in the running batch.")]
MaxQueue = Annotated[int, typer.Option(min=1, help="Answers that may wait; others get 429.")]
MaxLength = Annotated[
    int | None, typer.Option(min=2, help="Tokens of a prompt and its answer. [default: what the base has room for]")
]
CacheTokens = Annotated[int, typer.Option(min=1, help="Tokens whose keys and values are kept, padding too.")]
PrefixCache = Annotated[
    int, typer.Option(min=0, help="Tokens that are kept for later prompts of the same model; 0 for none.")
]
Deadline = Annotated[float, typer.Option(min=0.1, help="Seconds that a request may take.")]
ServedDtype = Annotated[Dtype | None, typer.Option(help="To compute in. [default: float32 on the CPU]")]
ServingEngine = Annotated[
    Literal["embedded", "vllm"], typer.Option(help="vllm: vLLM's own server; arguments behind -- are for it.")
]
ToolFormat = Annotated[
    Literal["hermes", "llama3", "mistral", "mistral-args", "qwen3-coder"] | None,
    typer.Option(help="How the models call tools. [default: what the chat template tells]"),
]
Cors = Annotated[
    list[str] | None,
    typer.Option(metavar="ORIGIN", help="Of pages whose scripts may ask: https://x.org, or *; may be repeated."),
]
Config = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.toml", is_eager=True, callback=from_file, help="Options by their names; the command line wins."
    ),
]
NOT_FOR_VLLM = (
    "pin", "memory_limit", "api_keys", "max_queue", "cache_tokens", "prefix_cache", "deadline", "device", "tool_format",
    "cors",
)  # fmt: skip


@app.command(
    epilog="Example: deltacome serve base/ --delta math=math-delta/ --delta intent=intent-delta/",
    context_settings={"allow_extra_args": True},
)
def serve(
    context: typer.Context,
    base: Base,
    delta: ServedDeltas = None,
    delta_dir: DeltaDir = None,
    store: ServedStore = None,
    store_cache: StoreCache = None,
    pin: Pin = None,
    memory_limit: MemoryLimit = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    name: Name = None,
    api_key: ApiKey = None,
    api_keys: ApiKeys = None,
    max_batch: MaxBatch = 32,
    max_queue: MaxQueue = 256,
    max_length: MaxLength = None,
    cache_tokens: CacheTokens = 32768,
    prefix_cache: PrefixCache = 16384,
    deadline: Deadline = 600.0,
    chat_template: Template = None,
    tool_format: ToolFormat = None,
    device: Device = None,
    dtype: ServedDtype = None,
    engine: ServingEngine = "embedded",
    cors: Cors = None,
    config: Config = None,
) -> None:
    """Serve a base and any number of its deltas through OpenAI's API, all of them in one running batch."""
    if engine == "vllm":
        _serve_by_vllm(context)
        return
    if context.args:
        raise DeltacomeError(f"{context.args[0]} is no option; arguments behind -- are for --engine vllm")
    from deltacome.serve import check_installed

    check_installed()
    from deltacome.restore.merging import DTYPES
    from deltacome.serve.engine.scheduler import Limits
    from deltacome.serve.http.keys import Keys
    from deltacome.serve.logs import log_as_json
    from deltacome.serve.server import build, run

    quiet()
    log_as_json()  # a delta that is refused says why, before the server is up
    application = build(
        base,
        named_folders(delta or []),
        name=name,
        folder=delta_dir,
        store=store,
        store_cache=_bytes(store_cache) if store_cache else None,
        pinned=pin or (),
        memory_limit=_bytes(memory_limit) if memory_limit else None,
        keys=Keys(api_key, api_keys),
        limits=Limits(max_batch, max_queue, cache_tokens, prefixes=prefix_cache),
        max_length=max_length,
        deadline=deadline,
        chat_template=chat_template,
        tool_format=tool_format,
        origins=cors or [],
        device=device,
        dtype=DTYPES[dtype] if dtype else None,
    )
    run(application, host, port)


def _serve_by_vllm(context: typer.Context) -> None:
    """Become vLLM's server, by the options that mean something to it."""
    from deltacome.vllm import command

    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = {name for name, source in sources.items() if source is not None and source.name != "DEFAULT"}
    for option in NOT_FOR_VLLM:
        if option in given:
            raise DeltacomeError(f"--{option.replace('_', '-')} is not for vLLM; leave it out")
    params = context.params
    options = {
        "host": params["host"],
        "port": params["port"],
        "served-model-name": params["name"],
        "max-num-seqs": params["max_batch"] if "max_batch" in given else None,
        "max-model-len": params["max_length"],
        "chat-template": params["chat_template"],
        "dtype": params["dtype"],
    }
    quiet()
    command.run(
        params["base"],
        named_folders(params["delta"] or []),
        folder=params["delta_dir"],
        store=params["store"],
        store_cache=_bytes(params["store_cache"]) if params["store_cache"] else None,
        options=options,
        api_key=params["api_key"],
        more=context.args,
    )


def _bytes(size: str) -> int:
    """Bytes that 500MB, 2GB or 1.5GiB stands for."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", size.strip().upper())
    if not found:
        raise DeltacomeError(f"{size} is no size; write it like 500MB or 2GB")
    number, prefix, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix or " "))
