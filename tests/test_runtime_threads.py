"""One model, several threads."""

import sys
import threading
from typing import Any

import pytest
import torch

from deltacome import DeltacomeError
from deltacome.runtime.kernels import cpu
from tenants import IDS

pytest_plugins = ["tenants"]


def test_tenants_come_and_go_while_others_run(model: Any, two: Any) -> None:
    """A call in one thread keeps its tenants, whatever another thread does with their names."""
    _, deltas, _ = two
    options = {"max_new_tokens": 25, "min_new_tokens": 25, "do_sample": False, "pad_token_id": 1}
    expected = model.generate(IDS[:2], tenants=["a", "b"], **options)
    stop, errors = threading.Event(), []

    def churn() -> None:
        while not stop.is_set():
            model.add_delta("c", deltas[0])
            model.add_delta("b", deltas[1])
            model.remove_delta("c")
            try:
                model.remove_delta("a")
                errors.append("a was removed while it was in use")
            except DeltacomeError as error:
                errors.extend([] if "in use by a running call" in str(error) else [str(error)])

    with model.tenants.run(["a"]):
        thread = threading.Thread(target=churn)
        thread.start()
        results = [model.generate(IDS[:2], tenants=["a", "b"], **options) for _ in range(4)]
        stop.set()
        thread.join()
    assert not errors
    assert all(torch.equal(result, expected) for result in results)


def test_two_threads_at_once(model: Any) -> None:
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "pad_token_id": 1}
    jobs = [["a", "b"], ["b", None]]
    expected = [model.generate(IDS[:2], tenants=job, **options) for job in jobs]
    results: dict[int, torch.Tensor] = {}

    def run(number: int) -> None:
        results[number] = model.generate(IDS[:2], tenants=jobs[number], **options)

    threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[number], expected[number]) for number in (0, 1))


def test_the_same_tenants_with_other_lengths_at_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a short prompt prepares while a long one of the same tenants is computed is not given to the long one."""
    prompts, names = {"short": IDS[:2, :4], "long": IDS[:2]}, ["a", "b"]
    with torch.no_grad():
        expected = {length: model(ids, tenants=names).logits for length, ids in prompts.items()}
    results: dict[str, torch.Tensor] = {}
    prepares, long_is_at_head = threading.Event(), threading.Event()

    def run(length: str) -> None:
        with torch.no_grad():
            results[length] = model(prompts[length], tenants=names).logits

    short = threading.Thread(target=run, args=("short",))

    class Work(cpu.ModelWork):
        def __init__(self, tenants: Any) -> None:
            super().__init__(tenants)
            if threading.current_thread() is short:
                prepares.set()
                assert long_is_at_head.wait(60)

    def after_last_norm(*_: Any) -> None:
        if threading.current_thread() is not short:
            long_is_at_head.set()
            short.join(60)

    monkeypatch.setattr(cpu, "ModelWork", Work)
    model.model.norm.register_forward_hook(after_last_norm)
    short.start()
    assert prepares.wait(60)
    run("long")
    for length, logits in expected.items():
        assert torch.equal(results[length], logits)


def test_the_same_tenants_in_step(model: Any) -> None:
    """Two threads that begin every module together, again and again."""
    prompts, names = [IDS[:2], IDS[:2, :4]], ["a", "b"]
    together = threading.Barrier(2)
    with torch.no_grad():
        expected = [model(ids, tenants=names).logits for ids in prompts]

    def wait(*_: Any) -> None:
        together.wait(60)

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(wait)
    results: list[list[torch.Tensor]] = [[], []]

    def run(number: int) -> None:
        try:
            with torch.no_grad():
                for _ in range(50):
                    results[number].append(model(prompts[number], tenants=names).logits)
        except BaseException:
            together.abort()  # the other would wait for it in vain
            raise

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    for number in (0, 1):
        assert len(results[number]) == 50
        assert all(torch.equal(result, expected[number]) for result in results[number])


def test_a_batch_for_several_calls(model: Any) -> None:
    names = ["a", None]
    batch = model.tenants.batch_of(names)
    with torch.no_grad():
        for length in (9, 4, 9, 1):
            ids = IDS[:2, :length]
            assert torch.equal(model(ids, tenants=batch).logits, model(ids, tenants=names).logits)
        with model.tenants.run(batch):
            with pytest.raises(DeltacomeError, match="a batch is for one call at a time"):
                model(IDS[:2], tenants=batch)
            with pytest.raises(DeltacomeError, match="a is in use by a running call"):
                model.remove_delta("a")
        model.remove_delta("a")
        model(IDS[:2], tenants=batch)  # which has it still
    with pytest.raises(DeltacomeError, match="no tenant 'a'"):
        model.tenants.batch_of(names)
    with pytest.raises(DeltacomeError, match="2 tenants for a batch of 6 rows"):
        model(IDS, tenants=batch)
