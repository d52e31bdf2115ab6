"""Triton's interpreter without what takes more than half of its time and changes nothing of what it computes."""

from typing import Any

import triton.language as tl
from triton.language.core import is_builtin
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_patch = interpreter._patch_lang


def _patch_once(function: Any) -> Any:
    """Put the interpreter in the language's place unless it is there: kernels that call another do it each time."""
    modules = [value for value in function.__globals__.values() if value is tl or value is tl.core]
    return _patch(function) if any(is_builtin(module.dot) for module in modules) else interpreter._LangPatchScope()


interpreter._patch_lang = _patch_once

# Each sum and product of integers would be computed again in 64 bits, for an assertion that is made in debugging alone.
if not interpreter.interpreter_builder.options.debug:
    TritonSemantic.binary_op_sanitize_overflow_impl = lambda *_: None
