"""All that the plugin touches of vLLM: its public parts, and of its insides each with a word."""

import asyncio
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import vllm.lora.utils
import vllm.triton_utils.dispatcher as dispatcher
import vllm.v1.worker.lora_model_runner_mixin as runner_mixin
from fastapi import HTTPException
from torch import Tensor
from vllm.config import CUDAGraphMode
from vllm.config.vllm import get_current_vllm_config_or_none
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger

# The layers for LoRA, whose place ours take; they inherit which of a model's layers they fit, how a GPU's share of the
# outputs is cut (`slice_lora_b`), and `forward`, which calls `_apply_lora_to_output` with inputs and outputs.
from vllm.lora.layers import (
    BaseLayerWithLoRA,
    ColumnParallelLinearWithLoRA,
    LogitsProcessorWithLoRA,
    MergedColumnParallelLinearVariableSliceWithLoRA,
    MergedColumnParallelLinearWithLoRA,
    MergedQKVParallelLinearWithLoRA,
    QKVParallelLinearWithLoRA,
    ReplicatedLinearWithLoRA,
    RowParallelLinearWithLoRA,
    VocabParallelEmbeddingWithLoRA,
)

# What is registered under an adapter's number: `loras` gives by module what `set_lora` is called with.
from vllm.lora.lora_model import LoRAModel

# Slots and the least-recently-used order: `activate_adapter` fills a slot of every module by `set_lora`,
# `_set_adapter_mapping` begins a step, `_create_lora_modules` replaces the layers.
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

# How a layer becomes one of those above, and a hub id a folder.
from vllm.lora.utils import from_layer, get_adapter_absolute_path, replace_submodule

# `_load_adapter` reads an adapter's files.
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, LayerNorm, RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, ReplicatedLinear, RowParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.utils import PPMissingLayer

# Where vLLM itself looks adapters up: `_get_lora_req_from_path` says whether a folder is one, `_get_adapter_dirs` which
# folders of a repository are.
from vllm.plugins.lora_resolvers.filesystem_resolver import FilesystemResolver
from vllm.plugins.lora_resolvers.hf_hub_resolver import HfHubResolver, hf_api
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.worker_base import WorkerBase

from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.errors import DeltacomeError
from deltacome.format.manifest import MANIFEST
from deltacome.vllm.vocabulary import has_room, vocabulary

__all__ = [
    "BaseLayerWithLoRA",
    "GemmaRMSNorm",
    "HTTPException",
    "LRUCacheLoRAModelManager",
    "LRUCacheWorkerLoRAManager",
    "LayerNorm",
    "LoRAModel",
    "LoRARequest",
    "LoRAResolver",
    "LoRAResolverRegistry",
    "LogitsProcessorWithLoRA",
    "PPMissingLayer",
    "QKVParallelLinear",
    "RMSNorm",
    "ReplicatedLinear",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "VocabParallelEmbeddingWithLoRA",
    "from_layer",
    "get_adapter_absolute_path",
    "replace_submodule",
]

LINEAR = (
    ColumnParallelLinearWithLoRA,
    MergedColumnParallelLinearWithLoRA,
    QKVParallelLinearWithLoRA,
    MergedQKVParallelLinearWithLoRA,
    RowParallelLinearWithLoRA,
    ReplicatedLinearWithLoRA,
    MergedColumnParallelLinearVariableSliceWithLoRA,
)
logger = init_logger("vllm.deltacome")


def replace_classes(layers: dict[type, type], logits: type, worker_manager: type) -> None:
    """Let vLLM build the layers given by the class that they replace, ours for logits, and our manager.

    Those for `fully_sharded_loras`, which cut LoRA's factors in a way of their own, are left out.
    """
    classes = vllm.lora.utils._all_lora_classes
    whole = (old for old in classes if "Sharded" not in old.__name__)
    vllm.lora.utils._all_lora_classes = tuple(layers.get(old, old) for old in whole)
    vllm.lora.utils.LogitsProcessorWithLoRA = logits
    runner_mixin.LRUCacheWorkerLoRAManager = worker_manager


def patch_prompt_logprobs() -> None:
    """Make the logits of prompts those of each request's own adapter.

    vLLM asks for them request by request, with the mapping of the step's last tokens; so an adapter of the output
    embedding would be applied to the wrong rows. Here one request at a time is left in the runner's list.
    """
    original = GPUModelRunner._get_prompt_logprobs_dict

    def _get_prompt_logprobs_dict(self: Any, hidden_states: Tensor, num_scheduled_tokens: dict[str, int]) -> Any:
        manager = getattr(getattr(self, "lora_manager", None), "_adapter_manager", None)
        if manager is None or not self.num_prompt_logprobs:
            return original(self, hidden_states, num_scheduled_tokens)
        asked, found = self.num_prompt_logprobs, {}
        for request in list(asked):
            if request not in self.input_batch.req_id_to_index:
                continue
            row = self.input_batch.req_id_to_index[request]
            self.num_prompt_logprobs = {request: asked[request]}
            with manager.step.sampling(int(self.input_batch.request_lora_mapping[row])):
                found.update(original(self, hidden_states, num_scheduled_tokens))
            if request not in self.num_prompt_logprobs:
                del asked[request]
        self.num_prompt_logprobs = asked
        return found

    GPUModelRunner._get_prompt_logprobs_dict = _get_prompt_logprobs_dict


def vocabulary_of_base(model_config: Any) -> int:
    """How many tokens the base has itself, where vLLM has more: those that some deltas have added."""
    if not has_room(model_config.hf_overrides):
        return int(model_config.get_vocab_size())
    return _vocabulary_of(model_config.model)


@cache
def _vocabulary_of(base: str) -> int:
    return vocabulary(Checkpoint(base).tensors)


def make_room_for_tokens() -> None:
    """Let vLLM's embeddings have more rows than the checkpoint, where `hf_overrides` say so and there are adapters.

    Nothing but our logits would say that such a token is none of the base's.
    """
    original = VocabParallelEmbedding.weight_loader

    def weight_loader(self: Any, param: Any, loaded_weight: Tensor) -> None:
        dimension, config = getattr(param, "output_dim", None), get_current_vllm_config_or_none()
        if dimension == 0 and config and config.lora_config and has_room(config.model_config.hf_overrides):
            missing = self.org_vocab_size - len(loaded_weight)
            if missing > 0 and getattr(param, "packed_dim", None) != dimension:
                loaded_weight = torch.cat([loaded_weight, loaded_weight.new_zeros(missing, *loaded_weight.shape[1:])])
        original(self, param, loaded_weight)

    VocabParallelEmbedding.weight_loader = weight_loader


def share_step(model: Any, step: Any) -> None:
    """The same for the model runner V2, which asks for the logits of all of a step's tokens, some rows at a time."""
    model.deltacome_step = step
    _patch_v2_prompt_logprobs()


@cache
def _patch_v2_prompt_logprobs() -> None:
    from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker  # after the patches of it for CPUs

    def patched(original: Any) -> Any:
        def compute(self: Any, logits_of: Any, hidden_states: Tensor, *rest: Any) -> Any:
            step: Any = getattr(logits_of.__self__, "deltacome_step", None)

            def own_logits_of(rows: Tensor) -> Tensor:
                first = (rows.storage_offset() - hidden_states.storage_offset()) // hidden_states.stride(0)
                with step.sampling(step.adapters[first : first + len(rows)]):
                    return logits_of(rows)

            return original(self, logits_of if step is None else own_logits_of, hidden_states, *rest)

        return compute

    for name in ("compute_prompt_logprobs", "compute_prompt_token_id_logprobs"):
        setattr(PromptLogprobsWorker, name, patched(getattr(PromptLogprobsWorker, name)))


def tolerate_llvmlite() -> None:
    """Let vLLM start where llvmlite has been imported, as our CPU kernel does.

    Looking for Triton's kernels it takes `vars` of everything in every module, and of llvmlite's library that is no
    dictionary; so a second engine in a process, or a first one after another use of Numba, would fail.
    """

    def plain_vars(value: Any) -> Any:
        found = vars(value)
        return found if isinstance(found, Mapping) else {}

    dispatcher.vars = plain_vars


def patch_resolvers() -> None:
    """Let vLLM's own resolvers, of a folder and of the Hub, find deltas: they look for `adapter_config.json`."""
    read, list_folders = FilesystemResolver._get_lora_req_from_path, HfHubResolver._get_adapter_dirs

    async def _get_lora_req_from_path(self: Any, lora_name: str, lora_path: str, base_model_name: str) -> Any:
        folder, root = Path(lora_path), getattr(self, "lora_cache_dir", None)
        is_inside = root is None or folder.resolve().is_relative_to(Path(root).resolve())  # names may have .. in them
        if is_inside and (folder / MANIFEST).is_file():
            return LoRARequest(lora_name, 1, str(folder))
        return await read(self, lora_name, lora_path, base_model_name)

    async def _get_adapter_dirs(self: Any, repo_name: str) -> set[str]:
        found: set[str] = await list_folders(self, repo_name)
        names = await asyncio.to_thread(hf_api().list_repo_files, repo_id=repo_name)
        return found | {os.path.dirname(name) or "." for name in names if Path(name).name == MANIFEST}  # noqa: PTH120

    FilesystemResolver._get_lora_req_from_path = _get_lora_req_from_path
    HfHubResolver._get_adapter_dirs = _get_adapter_dirs


def register_layer(config: Any, name: str, layer: Any) -> None:
    """Let `running_layer` find a layer while the model of that `VllmConfig` runs."""
    config.compilation_config.static_forward_context[f"deltacome.{name}"] = layer


def running_layer(name: str) -> Any:
    """A layer of the model that runs now."""
    return get_forward_context().no_compile_layers[f"deltacome.{name}"]


def graph_tokens(config: Any) -> int:
    """How many tokens a step in a CUDA graph has at most; 0 if vLLM records none."""
    compilation = config.compilation_config
    if compilation.cudagraph_mode == CUDAGraphMode.NONE:
        return 0
    return int(compilation.max_cudagraph_capture_size or 0)


def embed_before_graphs() -> None:
    """Have embeddings computed by themselves, ahead of a model in CUDA graphs that has adapters.

    What a delta adds to a token's embedding is looked up row by row, which no graph can do. vLLM's runners do so where
    prompts may be embeddings; here only the worker is told so, and requests with embeddings are refused as before.
    """
    original = WorkerBase.__init__

    def initialize(self: Any, vllm_config: Any, *rest: Any, **named: Any) -> None:
        if vllm_config.lora_config is not None and graph_tokens(vllm_config):
            vllm_config.model_config.enable_prompt_embeds = True
        original(self, vllm_config, *rest, **named)

    WorkerBase.__init__ = initialize


def needs_v1_runner(config: Any) -> bool:
    """Whether vLLM would use its model runner V2 for what our layers have not been tried with there."""
    return config.use_v2_model_runner and (
        config.speculative_config is not None or config.parallel_config.enable_batch_sharded_sampling
    )


def gather(x: Tensor) -> Tensor:
    """The whole of inputs whose columns are spread over the GPUs."""
    return tensor_model_parallel_all_gather(x)


def all_reduce(x: Tensor) -> Tensor:
    """The sum over the GPUs."""
    return tensor_model_parallel_all_reduce(x)


def ranks() -> tuple[int, int]:
    """This GPU's number, and how many share each layer."""
    return get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()


def rename(model: Any, name: str) -> str:
    """vLLM's name of a weight, before its merging of q, k, v and of gate and up."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    return name if mapper is None else mapper.get_rename_mapper()._map_name(name) or name


def tower_prefixes(model: Any) -> tuple[str, ...]:
    """How the names of all modules begin that make embeddings of images, videos or sound; none of a text model's."""
    names = list(getattr(model, "_tower_model_names", ()))
    if hasattr(model, "get_mm_mapping"):
        mapping = model.get_mm_mapping()
        names += [*mapping.tower_model, *mapping.connector]
    return tuple(f"{name.rstrip('.')}." for name in names)


def tower_refusal(config: Any) -> str | None:
    """What vLLM does by which adapters cannot change towers; None if it does nothing of the kind."""
    compilation = config.compilation_config
    for is_so, what in (
        (config.parallel_config.tensor_parallel_size > 1, "with tensor parallelism"),
        (config.use_v2_model_runner, "by its model runner V2 (VLLM_USE_V2_MODEL_RUNNER=0 has the other)"),
        (compilation.compile_mm_encoder, "with compile_mm_encoder"),
        (compilation.cudagraph_mm_encoder, "with cudagraph_mm_encoder"),
    ):
        if is_so:
            return what
    return None


def encode_by_adapter() -> None:
    """Have the images of an adapter that changes towers encoded by themselves."""
    original = GPUModelRunner._execute_mm_encoder

    def _execute_mm_encoder(self: Any, scheduler_output: Any) -> list[Tensor]:
        manager = getattr(getattr(self, "lora_manager", None), "_adapter_manager", None)
        found: list[Tensor] = []
        if manager is None or self.model_config.is_encoder_decoder:  # where the order of the outputs counts
            found = original(self, scheduler_output)
            return found
        groups: dict[int, dict[str, list[int]]] = {}
        for request, inputs in scheduler_output.scheduled_encoder_inputs.items():
            adapter = int(self.input_batch.request_lora_mapping[self.input_batch.req_id_to_index[request]])
            groups.setdefault(adapter if manager.changes_towers(adapter) else 0, {})[request] = inputs
        for adapter, inputs_of in groups.items():
            with manager.encoding(adapter):
                found += original(self, replace(scheduler_output, scheduled_encoder_inputs=inputs_of))
        return found

    GPUModelRunner._execute_mm_encoder = _execute_mm_encoder


def delta_folder() -> str | None:
    """The folder in which deltas are looked up by name."""
    return os.environ.get("DELTACOME_DELTA_DIR")


def store() -> str | None:
    """The address of the store in which deltas are looked up by name."""
    return os.environ.get("DELTACOME_STORE") or None


def store_cache() -> int | None:
    """Bytes that what is fetched from it may take.

    Raises:
        DeltacomeError: if the environment says something else.
    """
    given = os.environ.get("DELTACOME_STORE_CACHE", "")
    if given and not given.isdecimal():
        raise DeltacomeError(f"DELTACOME_STORE_CACHE is {given}; it has to be a number of bytes")
    return int(given) if given else None
