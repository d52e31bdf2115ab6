"""Deltas among vLLM's adapters: read, registered, put into slots, and the rows of each step."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.errors import DeltacomeError
from deltacome.format.manifest import MANIFEST
from deltacome.restore.merging import open_checked
from deltacome.runtime.kernels import kernels_for
from deltacome.vllm import internals
from deltacome.vllm.experts import Experts
from deltacome.vllm.layers import Content, Layer, Linear, Logits
from deltacome.vllm.norms import Norm
from deltacome.vllm.reading import Layers, read
from deltacome.vllm.rows import Step
from deltacome.vllm.towers import PARAMETERS, Images, Parameters


class Given(NamedTuple):
    """What vLLM hands to a layer's `set_lora`: a delta's content in the place of LoRA's first factor."""

    lora_a: Content
    lora_b: None = None


class LoadedDelta(internals.LoRAModel):
    """A delta under an adapter's number. contents: by the names of vLLM's modules."""

    def __init__(self, number: int, contents: dict[str, Content]) -> None:
        super().__init__(number, 0, {name: Given(content) for name, content in contents.items()})

    @property
    def bytes(self) -> int:
        """Bytes that it takes in memory."""
        parts = [part for given in self.loras.values() for part in _parts(given.lora_a)]
        return sum({tensor.data_ptr(): tensor.nbytes for part in parts for tensor in part.tensors()}.values())


def _parts(content: Content) -> list[Any]:
    return [part for part in content if part is not None] if isinstance(content, tuple) else [content]


class Manager(internals.LRUCacheLoRAModelManager):
    """vLLM's manager of slots, with our layers.

    Raises:
        DeltacomeError: if vLLM runs in a way that they do not support.
    """

    def __init__(self, *, model: Any, lora_config: Any, device: torch.device, vllm_config: Any, **rest: Any) -> None:
        for is_so, advice in (
            (lora_config.fully_sharded_loras, "leave out --fully-sharded-loras"),
            (lora_config.enable_tower_connector_lora, "leave out --enable-tower-connector-lora"),
            (internals.needs_v1_runner(vllm_config), "set VLLM_USE_V2_MODEL_RUNNER=0 in the environment"),
        ):
            if is_so:
                raise DeltacomeError(f"for deltacome's layers, {advice}; VLLM_PLUGINS= (empty) does without them")
        rows = internals.graph_tokens(vllm_config)
        slots = kernels_for(device.type).Slots(lora_config.max_loras, rows, device) if rows else None
        self.step, self.images = Step(device, slots), Images(device)
        if vllm_config.use_v2_model_runner:
            internals.share_step(model, self.step)
        self.config = vllm_config
        if not model.embedding_modules:
            model.embedding_modules = _embeddings(model)
        super().__init__(model=model, lora_config=lora_config, device=device, vllm_config=vllm_config, **rest)
        if slots is not None:
            self._compile(vllm_config.model_config.dtype)

    @cached_property
    def base(self) -> Checkpoint:
        """The base's checkpoint, whose fingerprint is taken once."""
        return Checkpoint(self.config.model_config.model)

    @cached_property
    def towers(self) -> tuple[str, ...]:
        """How the names of the modules begin that are not of the language model."""
        return internals.tower_prefixes(self.model)

    def _get_punica_wrapper(self, module_name: str) -> Any:
        # Idefics3 and others have the head beside what vLLM takes for their language model.
        if self._is_of_tower(module_name):
            return None
        language_model = self.mm_mapping.language_model[0] if self.supports_mm else module_name
        return super()._get_punica_wrapper(language_model)

    def _is_of_tower(self, name: str) -> bool:
        return f"{name}.".startswith(self.towers)

    def changes_towers(self, adapter: int) -> bool:
        """Whether an adapter, by its number, has images of its own."""
        found = self.get_adapter(adapter)
        return found is not None and any(name == PARAMETERS or self._is_of_tower(name) for name in found.loras)

    @contextmanager
    def encoding(self, adapter: int) -> Iterator[None]:
        """While the block runs, towers are those of an adapter in a slot, or of the base for 0."""
        if adapter == 0:
            yield
            return
        parameters: Any = self.modules[PARAMETERS]
        with self.images.of(adapter, self.lora_index_to_id), parameters.of(self.lora_index_to_id.index(adapter)):
            yield

    def read(self, number: int, folder: str) -> LoadedDelta:
        """Read a delta and check it against the base.

        Raises:
            DeltacomeError: if it is broken, of another base, or changes what vLLM cannot change.
        """
        artifact = open_checked(self.base, folder)
        refusal = internals.tower_refusal(self.config)
        layers = Layers(self.model, self.modules, self.packed_modules, self.towers, refusal)
        delta = LoadedDelta(number, read(artifact, self.base, layers))
        for name, given in delta.loras.items():
            module = self.modules[name]
            refusal = None if module.step.slots is None else module.refusal(given.lora_a)
            if refusal is not None:
                raise DeltacomeError(
                    f"{folder} changes {name} in a way that CUDA graphs have no room for: {refusal}; "
                    "or start vLLM with --enforce-eager"
                )
        internals.logger.info("%s takes %d bytes, its artifact %d", folder, delta.bytes, artifact.chain_bytes)
        return delta

    def _compile(self, dtype: torch.dtype) -> None:
        """Have the kernels for slots compiled, for small and large batches: while a graph is captured is too late."""
        self.step.set([1], [], [1])
        for module in self.modules.values():
            if isinstance(module, Linear) and module.step is self.step:
                for rows in (1, self.step.slots.rows):
                    module.try_in_graph(rows, dtype)
        self.step.forget()

    def checked(self, adapter: Any, folder: str) -> Any:
        """A LoRA adapter, of a rank that there is room for.

        Raises:
            DeltacomeError: if there is not, or it changes experts that cannot be changed.
        """
        for name, module in self.modules.items():
            if isinstance(module, Experts) and any(f"{own}.".startswith(f"{name}.") for own in adapter.loras):
                refusal = module.obstacle
                if refusal is None and self.step.slots is not None:
                    refusal = f"{module.refusal(())}; start vLLM with --enforce-eager"
                if refusal is not None:
                    raise DeltacomeError(f"{folder} changes {name}, which cannot be done here: {refusal}")
        # As vLLM does, which changes no towers.
        adapter.loras = {name: own for name, own in adapter.loras.items() if not self._is_of_tower(name)}
        of_text = [own for own in self.modules.values() if isinstance(own, Linear) and own.step is self.step]
        most = min((module.most_rank for module in of_text), default=0)
        if self.step.slots is not None and adapter.rank > most:
            raise DeltacomeError(
                f"{folder} has rank {adapter.rank}, and CUDA graphs have room for {most} here; start vLLM with "
                "--enforce-eager"
            )
        return adapter

    def _create_lora_modules(self) -> None:
        super()._create_lora_modules()
        for name, module in list(self.model.named_modules()):
            if isinstance(module, internals.RMSNorm | internals.GemmaRMSNorm | internals.LayerNorm):
                if self._get_punica_wrapper(name) is None or getattr(module, "variance_size_override", None):
                    continue  # of a vision tower, or over a part of the inputs only
                norm = Norm(module)
                norm.create_lora_weights(self.lora_slots, self.lora_config)
                self.register_module(name, internals.replace_submodule(self.model, name, norm))
        if self.towers and internals.tower_refusal(self.config) is None:
            self._create_tower_modules()
        ours: list[Any] = [module for module in self.modules.values() if isinstance(module, Linear | Norm)]
        replaced = {id(module.base_layer): module for module in ours}
        for parent in list(self.model.modules()):
            for name, module in list(parent._modules.items()):
                if id(module) in replaced and parent is not replaced[id(module)]:
                    setattr(parent, name, replaced[id(module)])  # a second place where vLLM has it, as routers' are
        for name, module in self.modules.items():
            if isinstance(module, Logits):
                module.vocabulary = internals.vocabulary_of_base(self.config.model_config)
            if isinstance(module, Experts) and len(self.packed_modules.get(name, ())) != module.n_slices:
                module.obstacle = "vLLM has this model's experts in stacks"
            if isinstance(module, Layer):
                module.join(name, self.images if name == PARAMETERS or self._is_of_tower(name) else self.step)
                internals.register_layer(self.config, name, module)

    def _create_tower_modules(self) -> None:
        parameters = {
            name: value for name, value in self.model.named_parameters() if self._is_of_tower(name.rpartition(".")[0])
        }
        for name, module in list(self.model.named_modules()):
            if self._is_of_tower(name):
                packed = self.packed_modules_mapping.get(name.rpartition(".")[2], [])
                layer = internals.from_layer(module, self.lora_slots, self.lora_config, packed, self.model.config)
                if isinstance(layer, Linear):
                    self.register_module(name, internals.replace_submodule(self.model, name, layer))
                    self._register_packed_modules(name)
                    parameters = {own: value for own, value in parameters.items() if not own.startswith(f"{name}.")}
        others = Parameters(parameters)
        others.create_lora_weights(self.lora_slots, self.lora_config)
        self.register_module(PARAMETERS, others)

    def _create_merged_loras_inplace(self, lora_model: Any) -> None:
        if lora_model.loras and not isinstance(lora_model, LoadedDelta):  # vLLM's dummies are empty
            super()._create_merged_loras_inplace(lora_model)

    def create_dummy_lora(self, lora_id: int, rank: int, embedding_modules: Any = None) -> Any:
        """An adapter that changes nothing: there are no buffers whose use a trial run would measure."""
        return internals.LoRAModel(lora_id, rank, {})

    def activate_adapter(self, lora_id: int) -> bool:
        """As vLLM's."""
        is_new = super().activate_adapter(lora_id)
        if is_new:
            self._forget()
        return is_new

    def _deactivate_adapter(self, lora_id: int) -> None:
        if lora_id in self.lora_index_to_id:
            self._empty(self.lora_index_to_id.index(lora_id))
        super()._deactivate_adapter(lora_id)

    def remove_all_adapters(self) -> None:
        """As vLLM's."""
        for index in range(self.lora_slots):
            self._empty(index)
        super().remove_all_adapters()

    def _empty(self, index: int) -> None:
        for module in self.modules.values():
            if isinstance(module, Layer):
                module.reset_lora(index)
        self._forget()

    def _forget(self) -> None:
        self.step.forget()
        self.images.forget()
        self._last_mapping = None

    def _set_adapter_mapping(self, mapping: Any) -> None:
        super()._set_adapter_mapping(mapping)
        self.step.set(mapping.index_mapping, mapping.prompt_mapping, self.lora_index_to_id)


class WorkerManager(internals.LRUCacheWorkerLoRAManager):
    """vLLM's manager of adapters, which reads deltas too."""

    _manager_cls = Manager

    def _load_adapter(self, lora_request: Any) -> Any:
        folder = internals.get_adapter_absolute_path(lora_request.lora_path)
        if not (Path(folder) / MANIFEST).is_file():
            return self._adapter_manager.checked(super()._load_adapter(lora_request), folder)
        return self._adapter_manager.read(lora_request.lora_int_id, folder)


def _embeddings(model: Any) -> dict[str, str]:
    """What `embedding_modules` of a model says in those that have it: the last parts of the embeddings' names."""
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        last = name.rpartition(".")[2]
        if last == "lm_head":
            found[last] = "output_embeddings"
        elif type(module) is internals.VocabParallelEmbedding:
            found[last] = "input_embeddings"
    return found
