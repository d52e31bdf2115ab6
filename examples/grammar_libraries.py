"""How long a library takes to compile JSON schemas for a vocabulary, and for the mask of each token.

    pip install llguidance      # or xgrammar, or outlines-core
    python grammar_libraries.py llguidance TOKENIZER

TOKENIZER is a folder with a byte-level tokenizer of transformers. The texts are read twice, and the second time counts.
"""

import argparse
import json
import time
from collections.abc import Callable
from statistics import mean
from typing import Any

from transformers import AutoTokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "email": {"type": "string"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "age", "email", "tags"],
    "additionalProperties": False,
}
STEP = {
    "type": "object",
    "properties": {
        "explanation": {"type": "string", "maxLength": 200},
        "output": {
            "anyOf": [
                {"type": "number"},
                {"type": "string", "pattern": "^[A-Z]{2}-\\d{4}$"},
                {"$ref": "#/$defs/step"},
                {"type": "null"},
            ]
        },
    },
    "required": ["explanation", "output"],
    "additionalProperties": False,
}
NESTED = {
    "$defs": {"step": STEP},
    "type": "object",
    "properties": {
        "steps": {"type": "array", "items": {"$ref": "#/$defs/step"}},
        "kind": {"enum": ["a", "bb", "ccc"]},
        "final": {"type": "string"},
    },
    "required": ["steps", "kind", "final"],
    "additionalProperties": False,
}
TEXTS = {
    "person": '{"name": "Ada Lovelace of London", "age": 36, "email": "ada@example.org", "tags": ["mathematics", '
    '"first programmer", "poet’s daughter"]}',
    "nested": '{"steps": [{"explanation": "We first add the two numbers", "output": {"explanation": "carry the one", '
    '"output": "AB-1234"}}, {"explanation": "then stop", "output": null}], "kind": "ccc", "final": "It is forty-two."}',
}
Steps = tuple[Callable[[], Any], Callable[[int], Any]]  # the mask of the next token; a token that has come


def llguidance(tokenizer: Any) -> Callable[[dict[str, Any]], Callable[[], Steps]]:
    from llguidance import LLMatcher
    from llguidance.hf import from_tokenizer

    vocabulary = from_tokenizer(tokenizer)

    def compile(schema: dict[str, Any]) -> Callable[[], Steps]:
        matcher = LLMatcher(vocabulary, LLMatcher.grammar_from_json_schema(schema))

        def begin() -> Steps:
            own = matcher.deep_copy()
            return own.compute_bitmask, own.consume_token

        return begin

    return compile


def xgrammar(tokenizer: Any) -> Callable[[dict[str, Any]], Callable[[], Steps]]:
    import xgrammar as library

    compiler = library.GrammarCompiler(library.TokenizerInfo.from_huggingface(tokenizer))
    mask = library.allocate_token_bitmask(1, len(tokenizer))

    def compile(schema: dict[str, Any]) -> Callable[[], Steps]:
        compiled = compiler.compile_json_schema(json.dumps(schema))

        def begin() -> Steps:
            own = library.GrammarMatcher(compiled)
            return lambda: own.fill_next_token_bitmask(mask), own.accept_token

        return begin

    return compile


def outlines_core(tokenizer: Any) -> Callable[[dict[str, Any]], Callable[[], Steps]]:
    from outlines_core import Guide, Index, Vocabulary
    from outlines_core.json_schema import build_regex_from_schema
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    bytes_of = {character: byte for byte, character in bytes_to_unicode().items()}
    tokens: dict[bytes, list[int]] = {}
    for piece, token in tokenizer.get_vocab().items():
        if token not in tokenizer.added_tokens_decoder:
            tokens.setdefault(bytes(map(bytes_of.__getitem__, piece)), []).append(token)
    vocabulary = Vocabulary(tokenizer.eos_token_id, tokens)

    def compile(schema: dict[str, Any]) -> Callable[[], Steps]:
        index = Index(build_regex_from_schema(json.dumps(schema)), vocabulary)

        def begin() -> Steps:
            own = Guide(index)
            return own.get_tokens, own.advance

        return begin

    return compile


def main() -> None:
    libraries = {"llguidance": llguidance, "xgrammar": xgrammar, "outlines-core": outlines_core}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=libraries)
    parser.add_argument("tokenizer")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    compile = libraries[arguments.library](tokenizer)
    for name, schema in (("person", PERSON), ("nested", NESTED)):
        begun = time.perf_counter()
        begin = compile(schema)
        compiling = time.perf_counter() - begun
        times: list[list[float]] = []
        for _ in range(2):
            mask, add = begin()
            times.append([])
            for token in tokenizer(TEXTS[name], add_special_tokens=False).input_ids:
                begun = time.perf_counter()
                mask()
                times[-1].append(time.perf_counter() - begun)
                add(token)
        first, second = (f"{1e6 * mean(each):.0f}" for each in times)
        print(f"{name}: {len(tokenizer)} tokens, compiled in {1e3 * compiling:.1f} ms, a mask in {second} µs ({first})")


if __name__ == "__main__":
    main()
