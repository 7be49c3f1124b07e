"""The network: every part against the same thing written out by hand, every arm from the same start."""

import io
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stn_pipeline
from stn_pipeline.config import TrainConfig
from stn_pipeline.data import Split
from stn_pipeline.errors import ConfigError, ShapeError
from stn_pipeline.model import Network, SpatialTransformer, build
from stn_pipeline.model.layers import ARCHS, CoordConv2d, Options, Stage
from stn_pipeline.training.fit import fit
from stn_pipeline.transforms import TRANSFORMS, cpab, lattice
from stn_pipeline.transforms.sampler import sample

PADDINGS = ("zeros", "border", "reflection")
SHAPES = [(1, 28, 28), (3, 32, 32), (1, 8, 8), (1, 60, 60), (2, 20, 36), (1, 4, 4), (1, 5, 23), (1, 21, 21), (1, 22, 22)]
LAYERS = {"plain": {}, "coordconv": {"coordconv": True}, "coordconv-r": {"coordconv": True, "coordconv_r": True}}

ALL = {"coordconv": True, "iterations": 2, "supersample": 2}
every_family = pytest.mark.parametrize("transform", TRANSFORMS)
every_transform = pytest.mark.parametrize("transform", ["none", *TRANSFORMS])
every_layer = pytest.mark.parametrize("layer", LAYERS)
every_padding = pytest.mark.parametrize("padding", PADDINGS)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def images(n: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed))


def network_of(shape: tuple[int, int, int] = (1, 28, 28), n_classes: int = 10, **knobs: object) -> Network:
    """A network in eval mode, its pixels' mean and std not 0 and 1."""
    mean, std = torch.linspace(0.2, 0.4, shape[0]), torch.linspace(0.3, 0.5, shape[0])
    return build(TrainConfig.parse(knobs), shape, n_classes, mean, std).eval()


def run_away(network: Network, seed: int) -> Network:
    """Make the localiser say something wild, and different for every image."""
    generator = torch.Generator().manual_seed(seed)
    assert network.transformer is not None
    with torch.no_grad():
        for parameter in network.transformer.localisation.theta.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    return network


def error_of(kind: type[Exception], action: Callable[[], object]) -> str:
    with pytest.raises(kind) as caught:
        action()
    return str(caught.value)


def n_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# CoordConv and Stage


def coordinates_by_hand(height: int, width: int, radius: bool) -> Tensor:
    x = [[(2 * j + 1) / width - 1 for j in range(width)] for _ in range(height)]
    y = [[(2 * i + 1) / height - 1 for _ in range(width)] for i in range(height)]
    r = [[math.hypot(*pair) for pair in zip(*rows, strict=True)] for rows in zip(x, y, strict=True)]
    return torch.tensor([x, y, r] if radius else [x, y])


@pytest.mark.parametrize("radius", [False, True], ids=["x,y", "x,y,r"])
@pytest.mark.parametrize("padding", [0, 1])
def test_coordconv_is_a_convolution_of_the_image_and_its_coordinates(radius: bool, padding: int) -> None:
    layer, x = CoordConv2d(2, 4, 3, padding, (5, 8), radius), images(3, 2, 5, 8)
    joined = torch.cat((x, coordinates_by_hand(5, 8, radius).expand(3, -1, -1, -1)), dim=1)
    assert layer.weight.shape == (4, 2 + 2 + radius, 3, 3)
    torch.testing.assert_close(layer(x), F.conv2d(joined, layer.weight, layer.bias, padding=padding), atol=1e-6, rtol=0)


@every_layer
@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "padded"])
@pytest.mark.parametrize("dropout", [False, True], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_stage_is_convolution_dropout_pooling_relu(layer: str, padded: bool, dropout: bool, training: bool) -> None:
    options = Options(ARCHS["report"], padded, **{"coordconv": False, "coordconv_r": False, **LAYERS[layer]})
    stage, x = Stage((2, 16), 5, (11, 14), options, dropout=dropout).train(training), images(6, 2, 11, 14)
    torch.manual_seed(3)
    ours = stage(x)
    torch.manual_seed(3)
    true = F.relu(F.max_pool2d(F.dropout2d(stage.conv(x), training=training and dropout), 2))
    torch.testing.assert_close(ours, true, atol=1e-6, rtol=0)
    assert ours.shape[2:] == stage.size == ((5, 7) if padded else (3, 5))
    without = F.relu(F.max_pool2d(stage.conv(x), 2))
    assert torch.allclose(ours, without, atol=1e-6) != (training and dropout)


# Sizes and options


ARMS = [(transform, layer, "zeros") for transform in ("none", *TRANSFORMS) for layer in LAYERS]
ARMS += [(transform, "plain", padding) for transform in TRANSFORMS for padding in PADDINGS if padding != "zeros"]


@pytest.mark.parametrize(("transform", "layer", "padding"), ARMS, ids=map("-".join, ARMS))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_size_and_option_builds_and_learns(transform: str, layer: str, padding: str, shape: tuple[int, int, int]) -> None:
    network = network_of(shape, 7, transform=transform, padding=padding, **LAYERS[layer]).train()
    logits = network(images(3, *shape))
    assert logits.shape == (3, 7)
    assert logits.isfinite().all()
    F.cross_entropy(logits, torch.tensor([0, 3, 6])).backward()
    gradients = [parameter.grad for parameter in network.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


@every_transform
@pytest.mark.parametrize(("height", "width"), [(3, 28), (28, 3), (1, 1)])
def test_images_under_4_pixels_are_refused(transform: str, height: int, width: int) -> None:
    told = error_of(ConfigError, lambda: network_of((1, height, width), transform=transform))
    assert told == f"images are {height}x{width} px: both sides must be >= 4 px, for two poolings; use larger images"


def test_parameters_are_the_reports() -> None:
    first = 10 * (1 * 5 * 5) + 10  # 28 -> 24 -> 12 px
    second = 20 * (10 * 5 * 5) + 20  # 12 -> 8 -> 4 px
    classifier = first + second + (20 * 4 * 4 * 50 + 50) + (50 * 10 + 10)
    first = 8 * (1 * 7 * 7) + 8  # 28 -> 22 -> 11 px
    second = 10 * (8 * 5 * 5) + 10  # 11 -> 7 -> 3 px
    localiser = first + second + (10 * 3 * 3 * 32 + 32) + (32 * 6 + 6)
    assert (classifier, localiser) == (21_840, 5_520)
    assert n_parameters(network_of(transform="none")) == classifier
    assert n_parameters(network_of(transform="affine")) == classifier + localiser


@pytest.mark.parametrize(
    ("size", "features"),
    [
        pytest.param((28, 28), 3 * 3, id="28 unpadded: 22 -> 11, 7 -> 3"),
        pytest.param((22, 28), 2 * 3, id="22 unpadded: 16 -> 8, 4 -> 2"),
        pytest.param((21, 28), 5 * 7, id="21 padded: 10, 5"),
        pytest.param((4, 9), 1 * 2, id="4 padded: 2, 1"),
    ],
)
def test_small_images_are_padded_so_that_the_localiser_still_sees_where(size: tuple[int, int], features: int) -> None:
    transformer = SpatialTransformer(1, size)
    assert transformer.localisation.hidden.in_features == 10 * features


@every_layer
def test_coordconv_adds_its_channels_to_all_convolutions_of_both_nets(layer: str) -> None:
    more = len(LAYERS[layer]) and 1 + len(LAYERS[layer])
    assert more == {"plain": 0, "coordconv": 2, "coordconv-r": 3}[layer]
    extra = n_parameters(network_of(transform="affine", **LAYERS[layer])) - n_parameters(network_of(transform="affine"))
    assert extra == more * (10 * 25 + 20 * 25 + 8 * 49 + 10 * 25)


# The start


@every_family
@every_layer
@every_padding
@pytest.mark.parametrize("shape", [(1, 28, 28), (2, 20, 36)], ids=str)
def test_every_family_starts_at_its_identity(transform: str, layer: str, padding: str, shape: tuple[int, int, int]) -> None:
    network, x = network_of(shape, transform=transform, padding=padding, **LAYERS[layer]), images(4, *shape)
    _, points = network.warp(x)
    assert points is not None
    assert torch.equal(points, lattice(*shape[1:]).view(1, *shape[1:], 2).expand_as(points))
    torch.testing.assert_close(network(x), network.classifier(network.normalise(x)), atol=1e-5, rtol=0)


@every_transform
def test_a_seed_names_the_weights_to_the_last_bit(transform: str) -> None:
    torch.manual_seed(1)
    one = network_of(transform=transform, seed=5).state_dict()
    torch.manual_seed(2)
    other, third = network_of(transform=transform, seed=5).state_dict(), network_of(transform=transform, seed=6).state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    drawn = [name for name in one if name.endswith((".weight", ".bias")) and "localisation.theta" not in name]
    assert not any(torch.equal(one[name], third[name]) for name in drawn)


@every_layer
def test_all_transforms_start_from_the_same_classifier_and_localiser(layer: str) -> None:
    networks = [network_of(transform=transform, seed=5, **LAYERS[layer]).state_dict() for transform in ["none", *TRANSFORMS]]
    for other in networks[1:]:
        assert all(torch.equal(other[name], weight) for name, weight in networks[0].items())
        shared = [name for name in other if "localisation" in name and "localisation.theta" not in name]
        assert all(torch.equal(other[name], networks[1][name]) for name in shared)


def test_layers_of_one_shape_start_differently() -> None:
    network = network_of((10, 28, 28), transform="none", n_classes=50)
    first, second = (network.classifier.stages[i].conv.weight for i in (0, 1))
    assert not torch.equal(first, second[:10])


def test_building_leaves_torchs_random_numbers_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    network_of(seed=3)
    assert torch.equal(torch.get_rng_state(), before)


# Warp, then normalise


@every_family
@pytest.mark.parametrize("seed", range(3))
def test_black_stays_black_whatever_the_warp(transform: str, seed: int) -> None:
    network = run_away(network_of((1, 16, 12), transform=transform), seed)
    warped, points = network.warp(torch.zeros(4, 1, 16, 12))
    assert points is not None and (points.abs() > 1).any()
    assert (warped == 0).all()


@every_family
def test_outside_the_image_is_black_and_not_grey(transform: str) -> None:
    x = images(8, 2, 16, 12) + 1
    for seed in range(10):  # some run away inwards
        network = run_away(network_of((2, 16, 12), transform=transform), seed)
        warped, points = network.warp(x)
        assert points is not None
        far = (points.abs() > 1 + 2 / 12).any(-1)[:, None].expand_as(warped)  # a pixel or more beyond the edge
        if far.any():
            break
    assert far.any()
    assert (warped[far] == 0).all()
    torch.testing.assert_close(
        network(x),
        network.classifier((warped - torch.tensor([0.2, 0.4]).view(2, 1, 1)) / torch.tensor([0.3, 0.5]).view(2, 1, 1)),
        atol=1e-5,
        rtol=0,
    )


@every_family
@every_padding
def test_the_network_pads_as_its_knob_says(transform: str, padding: str) -> None:
    network, x = run_away(network_of((1, 16, 12), transform=transform, padding=padding), 2), images(4, 1, 16, 12)
    warped, points = network.warp(x)
    assert points is not None
    assert torch.equal(warped, sample(x, points, padding))
    assert sum(torch.equal(warped, sample(x, points, other)) for other in PADDINGS) == 1


def test_the_pixels_mean_and_std_travel_with_the_network() -> None:
    state = network_of((3, 8, 8)).state_dict()
    assert state["mean"].tolist() == pytest.approx([0.2, 0.3, 0.4])
    assert state["std"].tolist() == pytest.approx([0.3, 0.4, 0.5])


# Arithmetic


@every_family
def test_the_warp_keeps_fp32_under_autocast(transform: str) -> None:
    network, x = network_of(transform=transform), images(4, 1, 28, 28)
    assert network.transformer is not None
    with torch.no_grad():
        network.transformer.localisation.theta.bias.add_(0.123)
    plain = network.warp(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = network.warp(x)
        assert network(x).isfinite().all()
    assert all(torch.equal(one, other) for one, other in zip(cast, plain, strict=True))


@every_transform
@every_layer
def test_channels_last_changes_nothing(transform: str, layer: str) -> None:
    network, x = network_of((3, 32, 32), transform=transform, **LAYERS[layer]), images(4, 3, 32, 32)
    plain = network(x)
    torch.testing.assert_close(network.to(memory_format=torch.channels_last)(x), plain, atol=1e-5, rtol=0)


def test_the_backward_pass_runs_outside_autocast() -> None:
    network, seen = network_of((1, 8, 8)), []
    assert network.transformer is not None
    network.transformer.localisation.theta.bias.register_hook(lambda _: seen.append(torch.is_autocast_enabled("cpu")))
    split = Split((255 * images(4, 1, 8, 8)).byte(), torch.tensor([0, 1, 2, 3]))
    list(fit(network, split, split, TrainConfig(precision="bf16", epochs=1, device="cpu")))
    assert seen == [False]


# The layer, for anybody's network


def test_the_layer_is_the_packages_front_door() -> None:
    assert stn_pipeline.SpatialTransformer is SpatialTransformer


def test_unknown_transforms_are_refused_with_the_nearest_name() -> None:
    rule = f"choose {', '.join(TRANSFORMS)}"
    assert error_of(ConfigError, lambda: SpatialTransformer(1, (8, 8), "afine")) == f"transform=afine: {rule}; did you mean affine?"
    assert error_of(ConfigError, lambda: SpatialTransformer(1, (8, 8), "xyzzy")) == f"transform=xyzzy: {rule}"


@every_family
@pytest.mark.parametrize("shape", [(2, 1, 12, 13), (2, 3, 12, 12), (2, 1, 13, 12), (1, 12, 12)], ids=str)
def test_inputs_of_another_size_are_refused(transform: str, shape: tuple[int, ...]) -> None:
    layer = SpatialTransformer(1, (12, 12), transform)
    told = error_of(ShapeError, lambda: layer(torch.zeros(shape)))
    assert told == f"SpatialTransformer: input has shape {shape}, expected (B, 1, 12, 12)"


def test_the_layer_refuses_images_under_4_pixels() -> None:
    told = error_of(ConfigError, lambda: SpatialTransformer(1, (3, 9)))
    assert told == "images are 3x9 px: both sides must be >= 4 px, for two poolings; use larger images"


@every_family
def test_the_layer_gives_the_output_size_asked_for(transform: str) -> None:
    layer, x = SpatialTransformer(2, (12, 20), transform, output_size=(6, 10)), images(3, 2, 12, 20)
    torch.testing.assert_close(layer(x), F.avg_pool2d(x, 2), atol=1e-5, rtol=0)
    layer = SpatialTransformer(2, (12, 20), transform, output_size=(24, 7))
    assert layer(x).shape == (3, 2, 24, 7)


@every_family
@every_padding
@every_layer
def test_the_layer_returns_the_grid_it_read_the_image_at(transform: str, padding: str, layer: str) -> None:
    transformer, x = SpatialTransformer(2, (9, 12), transform, padding=padding, output_size=(5, 7), **LAYERS[layer]), images(3, 2, 9, 12)
    nn.init.normal_(transformer.localisation.theta.weight, std=2)
    warped, grid = transformer(x, return_grid=True)
    theta = transformer.localisation(x)
    assert theta.shape == (3, TRANSFORMS[transform].n_params)
    assert torch.equal(grid, TRANSFORMS[transform].for_image((9, 12))(theta, lattice(5, 7)).view(3, 5, 7, 2))
    assert torch.equal(warped, sample(x, grid, padding))
    assert torch.equal(warped, transformer(x))


@every_family
def test_theta_is_a_function_of_its_own_image(transform: str) -> None:
    layer, x = SpatialTransformer(1, (12, 12), transform), images(4, 1, 12, 12)
    nn.init.normal_(layer.localisation.theta.weight)
    together = layer(x)
    torch.testing.assert_close(together, torch.cat([layer(one[None]) for one in x]), atol=1e-5, rtol=0)
    assert not torch.allclose(layer.localisation(x)[0], layer.localisation(x)[1])


@every_family
@every_layer
def test_gradients_reach_the_localiser_at_once_and_all_of_it_after_one_step(transform: str, layer: str) -> None:
    network = network_of(transform=transform, **LAYERS[layer])
    assert network.transformer is not None
    localiser, optimizer = network.transformer.localisation, torch.optim.SGD(network.parameters(), lr=0.1)

    def gradients() -> dict[str, float]:
        optimizer.zero_grad()
        F.cross_entropy(network(images(8, 1, 28, 28)), torch.arange(8)).backward()
        return {name: parameter.grad.abs().sum().item() for name, parameter in localiser.named_parameters()}

    first = gradients()
    assert first["theta.weight"] > 0 and first["theta.bias"] > 0
    optimizer.step()
    assert all(size > 0 for size in gradients().values())


@every_family
def test_the_layer_trains_in_anybodys_network(transform: str) -> None:
    network = nn.Sequential(SpatialTransformer(1, (12, 12), transform), nn.Flatten(), nn.Linear(144, 4))
    optimizer, x, labels = torch.optim.Adam(network.parameters(), lr=0.01), images(16, 1, 12, 12), torch.arange(16) % 4
    start = network[0].localisation.theta.bias.clone()
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(network(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert not torch.allclose(network[0].localisation.theta.bias, start, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("transform", "knobs"),
    [pytest.param(transform, {}, id=transform) for transform in TRANSFORMS]
    + [pytest.param(transform, ALL, id=f"{transform}, all") for transform in TRANSFORMS if transform != "cpab"],  # its flow twice: minutes
)
def test_an_exported_network_gives_the_same_logits_for_any_batch(transform: str, knobs: dict[str, object]) -> None:
    network = network_of(transform=transform, **knobs)
    nn.init.normal_(network.transformer.localisation.theta.weight, std=0.1)
    batch = torch.export.Dim("batch", min=0, max=1024)
    exported = torch.export.export(network, (images(2, 1, 28, 28),), dynamic_shapes={"images": {0: batch}})
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    again = torch.export.load(file).module()
    for n in (0, 1, 5):
        x = images(n, 1, 28, 28, seed=n)
        torch.testing.assert_close(again(x), network(x), atol=1e-5, rtol=0)


def test_the_layer_refuses_a_padding_it_does_not_know_and_r_without_coordconv() -> None:
    told = error_of(ConfigError, lambda: SpatialTransformer(1, (8, 8), padding="zeroes"))
    assert told == "padding=zeroes: choose zeros, border, reflection; did you mean zeros?"
    assert error_of(ConfigError, lambda: SpatialTransformer(1, (8, 8), coordconv_r=True)) == "coordconv_r=true needs coordconv=true"


@every_transform
def test_the_network_refuses_images_of_another_size(transform: str) -> None:
    told = error_of(ShapeError, lambda: network_of((1, 28, 28), transform=transform)(torch.zeros(2, 1, 29, 31)))
    assert told == "Network: images have shape (2, 1, 29, 31), expected (B, 1, 28, 28)"


# Iterations


def constant_layer(thetas: list[Tensor], **options: object) -> SpatialTransformer:
    """A layer whose localiser says the same theta, in turn, whatever it is shown; what it was shown is kept."""
    layer = SpatialTransformer(1, (12, 16), iterations=len(thetas), **options)
    layer.shown = []

    def say(seen: Tensor) -> Tensor:
        layer.shown.append(seen)
        return thetas[len(layer.shown) - 1].expand(len(seen), -1)

    layer.localisation.forward = say
    return layer


def test_iterations_compose_the_warps_and_sample_the_original() -> None:
    """The second theta is told in the frame that the first made: together they are the product of the matrices."""
    first, second = torch.tensor([0.9, -0.3, 0.1, 0.2, 1.1, -0.2]), torch.tensor([1.1, 0.1, 0.05, -0.2, 0.8, 0.3])
    bottom = torch.tensor([[0.0, 0, 1]])
    product = torch.cat((first.view(2, 3), bottom)) @ torch.cat((second.view(2, 3), bottom))
    layer, x = constant_layer([first, second]), images(2, 1, 12, 16)
    warped, grid = layer(x, return_grid=True)
    true = TRANSFORMS["affine"](product[:2].flatten().expand(2, -1), lattice(12, 16)).view(2, 12, 16, 2)
    torch.testing.assert_close(grid, true, atol=1e-6, rtol=0)
    torch.testing.assert_close(warped, sample(x, true), atol=1e-5, rtol=0)


@every_family
def test_each_look_but_the_first_is_at_the_image_warped_so_far(transform: str) -> None:
    family = TRANSFORMS[transform].for_image((12, 16))
    thetas = [torch.tensor(family.identity) + 0.1 * images(1, family.n_params, seed=seed)[0] for seed in range(3)]
    layer, x = constant_layer(thetas, transform=transform, output_size=(6, 7)), images(2, 1, 12, 16)
    look = layer.look(x, see=lambda seen: 2 * seen)
    points = lattice(12, 16)
    assert torch.equal(layer.shown[0], 2 * x)
    for n in (1, 2):
        warps = points.expand(2, -1, -1)
        for theta in reversed(thetas[:n]):
            warps = family(theta.expand(2, -1), warps)
        torch.testing.assert_close(layer.shown[n], 2 * sample(x, warps.view(2, 12, 16, 2)), atol=1e-5, rtol=0)
    assert look.theta.shape == (3, 2, family.n_params) and look.points.shape == (2, 6, 7, 2)


@every_family
def test_a_network_that_looks_twice_learns_through_both_looks(transform: str) -> None:
    network = network_of(transform=transform, iterations=2).train()
    nn.init.normal_(network.transformer.localisation.theta.weight, std=0.05)
    theta = network.transformer.look(images(4, 1, 28, 28), network.normalise).theta
    assert theta.shape[0] == 2 and not torch.equal(theta[0], theta[1])
    F.cross_entropy(network(images(4, 1, 28, 28)), torch.arange(4)).backward()
    assert network.transformer.localisation.stages[0].conv.weight.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["iterations", "supersample"])
def test_the_layer_refuses_less_than_one_look_or_point(name: str) -> None:
    assert error_of(ConfigError, lambda: SpatialTransformer(1, (8, 8), **{name: 0})) == f"{name}=0: must be >= 1"


# Supersampling


def test_a_supersampled_zoom_out_averages_what_bilinear_sampling_would_skip() -> None:
    layer, x = constant_layer([torch.tensor([2.0, 0, 0, 0, 2, 0])], supersample=2), images(3, 1, 12, 16)
    warped, grid = layer(x, return_grid=True)
    torch.testing.assert_close(warped[:, :, 3:9, 4:12], F.avg_pool2d(x, 2), atol=1e-6, rtol=0)
    torch.testing.assert_close(grid, 2 * lattice(12, 16).view(1, 12, 16, 2).expand(3, -1, -1, -1), atol=1e-6, rtol=0)


def test_at_the_identity_supersampling_blurs_as_its_docstring_says() -> None:
    layer = constant_layer([torch.tensor([1.0, 0, 0, 0, 1, 0])], supersample=2)
    x = torch.zeros(1, 1, 12, 16)
    x[0, 0, 5, 7] = 1
    kernel = torch.tensor([1 / 8, 3 / 4, 1 / 8])
    torch.testing.assert_close(layer(x)[0, 0, 4:7, 6:9], kernel[:, None] * kernel, atol=1e-6, rtol=0)


# Architectures


def test_the_papers_network_written_out_by_hand() -> None:
    network, x = network_of(arch="stcnn", transform="none"), images(3, 1, 28, 28)
    first, second = (stage.conv for stage in network.classifier.stages)
    assert first.weight.shape == (88, 1, 9, 9) and second.weight.shape == (88, 88, 7, 7)
    h = F.relu(F.max_pool2d(first(network.normalise(x)), 2))
    h = F.relu(F.max_pool2d(second(h), 2)).flatten(1)
    torch.testing.assert_close(network(x), network.classifier.logits(h), atol=1e-5, rtol=0)
    torch.testing.assert_close(network.train()(x), network.eval()(x), atol=1e-5, rtol=0)  # nothing drops out


def test_the_papers_networks_have_about_400000_parameters() -> None:
    assert n_parameters(network_of(arch="stcnn", transform="none")) == pytest.approx(400_000, rel=0.05)
    assert n_parameters(network_of(arch="stcnn", transform="affine")) == pytest.approx(400_000, rel=0.05)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_papers_network_takes_any_size(shape: tuple[int, int, int]) -> None:
    assert network_of(shape, arch="stcnn")(images(2, *shape)).shape == (2, 10)


def test_on_60_pixels_both_of_its_nets_see_half_of_them() -> None:
    network, x = network_of((1, 60, 60), arch="stcnn"), images(2, 1, 60, 60)
    stages = network.classifier.stages
    true = stages[1](stages[0](F.avg_pool2d(x, 2))).flatten(1)
    assert torch.equal(stages(x), true)
    stages = network.transformer.localisation.stages
    assert torch.equal(stages(x), stages[1](stages[0](F.max_pool2d(x, 2))).flatten(1))


def test_a_layer_takes_a_family_as_well_as_a_name() -> None:
    layer = SpatialTransformer(1, (12, 12), cpab(2, "fixed"))
    assert layer.localisation.theta.out_features == cpab(2, "fixed").n_params == 10
    assert network_of(transform="cpab", cpab_cells=2, cpab_boundary="fixed").transformer.transform is cpab(2, "fixed")
