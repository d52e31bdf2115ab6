"""What `adapter_config.json` says about how an adapter's tensors and its base make the fine-tuned weights."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltacome.checkpoints.weight_files import ADAPTER_CONFIG
from deltacome.errors import DeltacomeError

# Of `init_lora_weights`: how the factors began. The first leave the base as it is; the second have taken their product
# from it, which the base alone says; what others have taken from it is in no file of the adapter.
PLAIN = (True, False, "gaussian", "orthogonal", "eva", "mica")
SUBTRACTED = ("pissa", "olora")

# Fields that do not change what the weights are, given the adapter's tensors. The settings of an initialization count
# only where `init_lora_weights` names it, and VeLoRA's only in training.
WITHOUT_EFFECT = """
    auto_mapping base_model_name_or_path inference_mode peft_type peft_version revision runtime_config task_type
    target_modules exclude_modules modules_to_save layers_to_transform layers_pattern bias ensure_weight_tying
    r rank_pattern lora_dropout fan_in_fan_out megatron_core qalora_group_size
    loftq_config eva_config corda_config lora_ga_config velora_config
"""
READ = "lora_alpha alpha_pattern use_rslora init_lora_weights lora_bias use_dora trainable_token_indices"
REMEDY = "merge it with PEFT and compress the merged checkpoint"


@dataclass(frozen=True)
class AdapterSettings:
    """Of a LoRA adapter, what the fine-tuned weights depend on.

    subtracted: one of `SUBTRACTED`, None if the base is as it was. tokens: the rows that are trained, by the last part
    of an embedding's name; under the empty name those of the input embedding.
    """

    alpha: float
    alphas: Mapping[str, float]
    is_rank_stabilized: bool
    subtracted: str | None
    use_dora: bool
    lora_bias: bool
    tokens: Mapping[str, list[int]]

    def scaling(self, module: str, rank: int) -> float:
        """What a module's product is multiplied by; the first pattern that its name ends with counts."""
        found = (value for key, value in self.alphas.items() if re.match(rf"(.*\.)?({key})$", module))
        return next(found, self.alpha) / (math.sqrt(rank) if self.is_rank_stabilized else rank)


def read_settings(folder: Path) -> AdapterSettings:
    """The settings of the adapter in a folder.

    Raises:
        DeltacomeError: if it is no LoRA adapter, or one whose weights cannot be made from the base and its tensors.
    """
    path = folder / ADAPTER_CONFIG
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kind = settings.get("peft_type")
        if kind != "LORA":
            raise DeltacomeError(f"{folder} is an adapter of type {kind}; {REMEDY}")
        tokens = settings.get("trainable_token_indices") or {}
        found = AdapterSettings(
            float(settings["lora_alpha"]),
            {key: float(value) for key, value in (settings.get("alpha_pattern") or {}).items()},
            bool(settings.get("use_rslora")),
            _subtracted(folder, settings.get("init_lora_weights", True)),
            bool(settings.get("use_dora")),
            bool(settings.get("lora_bias")),
            tokens if isinstance(tokens, dict) else {"": tokens},
        )
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise DeltacomeError(f"{path} is no LoRA adapter's configuration: {error!r}") from error
    for name in sorted(settings.keys() - {*WITHOUT_EFFECT.split(), *READ.split()}):
        if settings[name] not in (None, False, "", [], {}):
            raise DeltacomeError(
                f"{folder} is an adapter with {name} in its {ADAPTER_CONFIG}, which deltacome cannot merge; {REMEDY}"
            )
    return found


def _subtracted(folder: Path, initialization: object) -> str | None:
    """What the adapter's beginning has taken from the base; None for nothing."""
    name = initialization.lower() if isinstance(initialization, str) else initialization
    if name in SUBTRACTED:
        return str(name)
    if name not in PLAIN:
        raise DeltacomeError(
            f"{folder} is an adapter of another base: its initialization ({initialization}) changed the weights, and "
            "by how much is not in the adapter; save it with path_initial_model_for_weight_conversion, which makes it "
            "one of the base, or give the base with the changed weights and set init_lora_weights to true"
        )
    return None
