"""Layers and networks saved, copied and loaded; a state is taken by its own family only."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from stn_pipeline.errors import ConfigError
from stn_pipeline.model import SpatialTransformer
from stn_pipeline.transforms import TRANSFORMS, cpab, lattice
from tests.test_layer import every_family, images, layer_of, network_of, use_kernels, with_and_without_kernels

# Whole modules


def copies(module: nn.Module) -> list[nn.Module]:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return [torch.load(file, weights_only=False), copy.deepcopy(module), pickle.loads(pickle.dumps(module))]


@every_family
@with_and_without_kernels
def test_a_network_can_be_saved_copied_and_loaded_whole(transform: str, options: dict[str, Any], kernels: bool) -> None:
    network, x = network_of(transform=transform, padding="border", **options), images(2, 1, 12, 16)
    nn.init.normal_(network.transformer.localisation.theta.weight, std=0.05)
    plain = network(x)
    if kernels:
        use_kernels(network)
        torch.testing.assert_close(network(x), plain, atol=1e-4, rtol=0)
    for again in copies(network):
        assert torch.equal(again(x), plain)  # without kernels, until it is told
        assert again.transformer.transform.full_name == network.transformer.transform.full_name
        if kernels:
            use_kernels(again)
            assert torch.equal(again(x), network(x))


@every_family
def test_a_family_can_be_saved_and_copied(transform: str) -> None:
    for family in (TRANSFORMS[transform], TRANSFORMS[transform].for_image((16, 48)), cpab(2, "fixed")):
        theta, points = images(2, family.n_params), lattice(16, 48)
        for again in (copy.deepcopy(family), pickle.loads(pickle.dumps(family))):
            assert torch.equal(again(theta, points), family(theta, points))
    assert pickle.loads(pickle.dumps(cpab(2, "fixed"))) is cpab(2, "fixed")


# States


FAMILIES = {**TRANSFORMS, "cpab(4, fixed)": cpab(4, "fixed")}  # as many numbers as the registered cpab has


@pytest.mark.parametrize("made", FAMILIES)
@pytest.mark.parametrize("loaded", FAMILIES)
def test_a_state_is_taken_by_its_own_family_only(made: str, loaded: str) -> None:
    file = io.BytesIO()
    torch.save(nn.Sequential(nn.Identity(), SpatialTransformer(1, 12, FAMILIES[made])).state_dict(), file)
    file.seek(0)
    state, layer = torch.load(file, weights_only=True), SpatialTransformer(1, 12, FAMILIES[loaded])
    if made == loaded:
        nn.Sequential(nn.Identity(), layer).load_state_dict(state)
        return
    before = copy.deepcopy(layer.state_dict())
    names = FAMILIES[made].full_name, FAMILIES[loaded].full_name
    with pytest.raises(ConfigError) as caught:
        nn.Sequential(nn.Identity(), layer).load_state_dict(state)
    assert str(caught.value) == (
        f"SpatialTransformer: the state is of transform={names[0]}, the layer has transform={names[1]}: "
        "load it into a layer of its own family"
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())


@every_family
def test_a_state_from_before_it_held_the_name_still_loads(transform: str) -> None:
    made, layer, x = layer_of(transform, (12, 12)), SpatialTransformer(1, (12, 12), transform), images(2, 1, 12, 12)
    state = made.state_dict()
    del state["_extra_state"]
    layer.load_state_dict(state)
    assert torch.equal(layer(x), made(x)) and "_extra_state" not in state


def test_a_similarity_that_learned_on_oblong_images_when_they_were_sheared_is_refused() -> None:
    state = SpatialTransformer(1, (16, 48), "similarity").state_dict()
    SpatialTransformer(1, (16, 48), "similarity").load_state_dict(state)
    del state["_extra_state"]
    with pytest.raises(ConfigError, match="from before transform=similarity turned images that are not square without shearing them"):
        SpatialTransformer(1, (16, 48), "similarity").load_state_dict(state)
