"""The plugin for stock vLLM: compressed deltas are adapters. vLLM imports it by the entry point of its plugins."""

from pathlib import Path
from typing import Any

_operators: list[Any] = []  # defined as long as these objects live; empty until `register` has run


def register() -> None:
    """Put deltacome's layers and managers into vLLM; called by vLLM in each of its processes.

    A vLLM of a version that is not known is left as it is, with a line in its log.
    """
    import vllm
    from vllm.logger import init_logger

    from deltacome.vllm import versions

    if _operators:
        return
    refusal = versions.refusal(vllm.__version__)
    if refusal is not None:
        init_logger("vllm.deltacome").error(refusal)
        return
    from deltacome.store.cache import Cache, cache_folder
    from deltacome.store.fetching import Fetching
    from deltacome.store.store import Store
    from deltacome.vllm import blocks, frontend, internals, moe
    from deltacome.vllm.experts import Experts
    from deltacome.vllm.layers import Embedding, Logits, define_operators, linear_class
    from deltacome.vllm.manager import WorkerManager
    from deltacome.vllm.resolver import DeltaResolver, StoreResolver

    _operators.append(define_operators())
    layers: dict[type, type] = {old: linear_class(old) for old in internals.LINEAR}
    layers[internals.VocabParallelEmbeddingWithLoRA] = Embedding
    layers[moe.FusedMoEWithLoRA] = Experts
    internals.replace_classes(layers, Logits, WorkerManager)
    moe.keep_matrices_readable()
    internals.patch_prompt_logprobs()
    internals.encode_by_adapter()
    internals.embed_before_graphs()
    internals.make_room_for_tokens()
    blocks.install()
    frontend.install()
    internals.tolerate_llvmlite()
    internals.patch_resolvers()
    versions.mend(vllm.__version__)
    folder = internals.delta_folder()
    if folder is not None:
        internals.LoRAResolverRegistry.register_resolver("deltacome", DeltaResolver(Path(folder)))
    store = internals.store()
    if store is not None:
        fetching = Fetching(Store(store), Cache(cache_folder(), internals.store_cache()))
        internals.LoRAResolverRegistry.register_resolver("deltacome store", StoreResolver(fetching))
