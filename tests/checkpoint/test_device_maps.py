"""Checkpoints that are spread over devices while they are loaded: a factorized layer stays in one place."""

import pytest
import torch
from support.compressions import answers, compressed

from hf_lossless_lr.layers import is_factorized


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules:UserWarning")
@pytest.mark.parametrize("name", ["distilbert", "albert", "vit", "llama", "resnet"])
def test_a_map_made_by_room_splits_no_factorized_layer(name, tmp_path):
    """Models that say no module of theirs must stay whole would be split inside of one: `down` here, `up` on disk."""
    model, batch = compressed(name, keep_ratio=0.5)
    model.eval().save_pretrained(tmp_path / "model")
    expected, size = answers(model, batch), sum(p.numel() * p.element_size() for p in model.parameters())
    spread = False
    for share in (0.3, 0.5, 0.7, 0.85):
        room = {"cpu": int(share * size), "disk": 10**9}
        options = {"device_map": "auto", "max_memory": room, "offload_folder": str(tmp_path / "disk")}
        loaded = type(model).from_pretrained(tmp_path / "model", **options).eval()
        places = getattr(loaded, "hf_device_map", {})  # older versions of Transformers have none for one device
        if len(set(places.values())) < 2:
            continue  # all in one place; where that is the disk, older versions do not run a dense model either
        spread = True
        layers = [path for path, module in loaded.named_modules() if is_factorized(module)]
        assert layers
        assert not [place for place in places if any(place.startswith(f"{layer}.") for layer in layers)]
        for key, value in answers(loaded, batch).items():
            torch.testing.assert_close(value.cpu(), expected[key], rtol=1e-4, atol=1e-4)
    assert spread
