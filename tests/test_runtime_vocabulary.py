"""Tenants with other vocabularies than their base's, or with embeddings tied otherwise."""

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Save, fine_tune, make_model
from deltacome import Artifact, DeltacomeError, compress, load
from deltacome.compression.methods import rate_distortion
from tenants import IDS, merged


def test_grown_vocabulary(save: Save, tmp_path: Path) -> None:
    base = save(make_model(tie_word_embeddings=False), "base")
    grown = make_model(tie_word_embeddings=False)
    grown.resize_token_embeddings(262, mean_resizing=False)
    fine_tune(grown, size=0.2)
    compress(base, save(grown, "grown"), tmp_path / "grown", ratio=4)
    model = load(base, {"grown": tmp_path / "grown"})
    alone = merged(base, tmp_path / "grown", tmp_path / "merged")
    ids = IDS[:2].clone()
    ids[0, 3] = 261
    with torch.no_grad():
        logits = model(ids, tenants=["grown", None]).logits
        assert torch.allclose(logits[0], alone(ids[:1]).logits[0], rtol=1e-4, atol=1e-3)
    assert logits.shape[-1] == 262
    assert torch.isinf(logits[1, :, 259:]).all()
    with pytest.raises(DeltacomeError, match="token 261, which its tenant's vocabulary has not"):
        model(ids, tenants=[None, "grown"])


@pytest.mark.parametrize("tied", [True, False])
def test_rows_in_classes(tied: bool, save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of head and embedding, in one batch with another tenant's, whose rows are in other classes."""
    monkeypatch.setattr(rate_distortion, "TALL", 2)
    base = save(make_model(tie_word_embeddings=tied), "base")
    for name, seed in (("a", 1), ("b", 2)):
        tuned = make_model(tie_word_embeddings=tied)
        fine_tune(tuned, seed, size=0.2)
        compress(base, save(tuned, name), tmp_path / name, ratio=4)
        classes = [entry.rows for entry in Artifact(tmp_path / name).entries.values() if entry.rows]
        assert len(classes) == (1 if tied else 2) and all(len(rows) == 4 for rows in classes)
    model = load(base, {name: tmp_path / name for name in "ab"})
    with torch.no_grad():
        logits = model(IDS[:3], tenants=["a", None, "b"]).logits
        for row, name in ((0, "a"), (2, "b")):
            alone = merged(base, tmp_path / name, tmp_path / f"merged-{name}")
            assert torch.allclose(logits[row], alone(IDS[row : row + 1]).logits[0], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("embeddings", ["compress", "exact"])
@pytest.mark.parametrize("is_changed", [True, False])
def test_shrunk_vocabulary(tied: bool, embeddings: Any, is_changed: bool, save: Save, tmp_path: Path) -> None:
    base = save(make_model(tie_word_embeddings=tied), "base")
    shrunk = make_model(tie_word_embeddings=tied)
    shrunk.resize_token_embeddings(250)
    if is_changed:
        fine_tune(shrunk, size=0.2)
    else:
        fine_tune(shrunk.model.layers, size=0.2)
    compress(base, save(shrunk, "shrunk"), tmp_path / "shrunk", ratio=4, embeddings=embeddings)
    model = load(base, {"shrunk": tmp_path / "shrunk"})
    alone = merged(base, tmp_path / "shrunk", tmp_path / "merged")
    ids = IDS[:2] % 250
    ids[1, 3] = 255
    with torch.no_grad():
        logits = model(ids, tenants=["shrunk", None]).logits
        assert torch.allclose(logits[0, :, :250], alone(ids[:1]).logits[0], rtol=1e-4, atol=1e-3)
        assert torch.equal(logits[1], model(ids).logits[1])
    assert torch.isinf(logits[0, :, 250:]).all() and torch.isfinite(logits[1]).all()
    with pytest.raises(DeltacomeError, match="token 255, which its tenant's vocabulary has not"):
        model(ids, tenants=[None, "shrunk"])


def test_embeddings_tied_in_the_base_alone(save: Save, tmp_path: Path) -> None:
    base = save(make_model(tie_word_embeddings=True), "base")
    untied = make_model(tie_word_embeddings=True)
    untied.config.tie_word_embeddings = False
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach().clone())
    fine_tune(untied, size=0.2)
    compress(base, save(untied, "untied"), tmp_path / "untied", ratio=4)
    model = load(base, {"untied": tmp_path / "untied"})
    alone = merged(base, tmp_path / "untied", tmp_path / "merged")
    with torch.no_grad():
        logits = model(IDS[:2], tenants=["untied", None]).logits
        assert torch.allclose(logits[0], alone(IDS[:1]).logits[0], rtol=1e-4, atol=1e-3)


def test_embeddings_tied_in_the_fine_tune_alone(save: Save, tmp_path: Path) -> None:
    base = save(make_model(tie_word_embeddings=False), "base")
    tied = make_model(tie_word_embeddings=True)
    fine_tune(tied)
    compress(base, save(tied, "tied"), tmp_path / "tied", ratio=4)
    with pytest.raises(DeltacomeError, match="ties its embeddings and its base does not"):
        load(base, {"tied": tmp_path / "tied"})
