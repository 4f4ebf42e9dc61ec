"""FastFlow's network: recorded numbers of public code, closed forms, parameter counts."""

import pytest
import timm
import torch
from torch import nn

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.flow.anomaly_map import anomaly_map, image_score
from penstock.lightning_modules.nets.backbone import Backbone
from penstock.lightning_modules.nets.fastflow import CouplingFlow, FastFlowNet, negative_log_likelihood
from penstock.lightning_modules.weights.fastflow import converted
from tests.golden_files import Record

MODELS = {
    "07": {"channels": [6, 9, 12], "sizes": [16, 8, 4], "flow_steps": 8},
    "08": {
        "channels": [6, 8, 10],
        "sizes": [12, 6, 3],
        "flow_steps": 8,
        "conv3x3_only": True,
        "hidden_ratio": 0.5,
        "norm_affine": False,
    },
    "09": {"channels": [26], "sizes": [4], "flow_steps": 6, "hidden_ratio": 0.16, "norm": None},
    "10": {"channels": [6, 9, 12], "sizes": [(12, 16), (6, 8), (3, 4)], "flow_steps": 8},
    "12": {"channels": [6, 7, 8], "sizes": [(16, 12), (8, 6), (4, 3)], "flow_steps": 3},
}
SIZES = {"07": (64, 64), "08": (48, 48), "09": (64, 64), "10": (48, 64), "12": (64, 48)}


class Given(nn.Module):
    """Stands for a backbone whose maps are known."""

    def __init__(self, channels, sizes):
        super().__init__()
        self.channels, self._sizes = channels, [(s, s) if isinstance(s, int) else s for s in sizes]

    def sizes(self, image_size):
        return self._sizes


def recorded(name: str) -> tuple[Record, FastFlowNet, list[torch.Tensor]]:
    options = dict(MODELS[name])
    record = Record("fastflow", name)
    net = FastFlowNet(Given(options.pop("channels"), options.pop("sizes")), **options).double()
    net.load_state_dict(converted(record.weights))
    return record, net, [record[f"feature{k}"] for k in range(len(net.flows))]


@pytest.mark.parametrize("name", MODELS)
def test_models_of_public_code(name):
    record, net, maps = recorded(name)
    coded = net.encode(maps)
    for k, (z, logdet) in enumerate(coded):
        record.same(z, f"z{k}")
        record.same(logdet, f"logdet{k}")
        if f"normed{k}" in record.out:
            record.same(net.norms[k](maps[k]), f"normed{k}")
    loss = negative_log_likelihood(coded).mean()
    error = record.error(loss, "loss")
    assert error < (1e-10 if record.out["loss"].dtype == torch.float64 else 1e-6)
    amap = anomaly_map([z for z, _ in coded], SIZES[name])
    record.same(amap, "anomaly_map")
    record.same(image_score(amap), "pred_score" if "pred_score" in record.out else "image_score")
    loss.backward()
    found = {name: p.grad for name, p in net.named_parameters()}
    for key in [key for key in record.left if key.startswith("grad_")]:
        record.same(found[renamed(key.removeprefix("grad_"))], key)
    record.left -= {"loss", "train_losses", "loss_after"} | {key for key in record.left if key.startswith("after_")}
    assert not record.left


def renamed(key: str) -> str:
    (name,) = set(converted({key: torch.ones(1), "nf_flows.0.module_list.0.global_scale": torch.ones(1)})) - (
        {"flows.0.steps.0.global_scale"} if key != "nf_flows.0.module_list.0.global_scale" else set()
    )
    return name


@pytest.mark.parametrize("name", ["07", "08"])
def test_training_steps_of_public_code(name):
    record, net, maps = recorded(name)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, weight_decay=1e-5)
    losses = []
    for _ in record.out["train_losses"]:
        loss = negative_log_likelihood(net.encode(maps)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    record.same(torch.stack(losses), "train_losses")
    record.same(negative_log_likelihood(net.encode(maps)).mean(), "loss_after")
    after = net.state_dict()
    for key in [key for key in record.left if key.startswith("after_")]:
        record.same(after[renamed(key.removeprefix("after_"))], key)


@pytest.mark.parametrize("name", ["03", "06"])
def test_flows_of_public_code(name):
    record = Record("fastflow", name)
    flow = CouplingFlow(9, 8, form="tanh" if name == "03" else "tanh_over_clamp").double()
    state = converted({f"nf_flows.0.{key}": value for key, value in record.weights.items()})
    flow.load_state_dict({key.removeprefix("flows.0."): value for key, value in state.items()})
    x = record["x"].requires_grad_()
    z, logdet = flow(x)
    record.same(z, "z")
    record.same(logdet, "logdet")
    loss = negative_log_likelihood([(z, logdet)]).mean()
    record.same(loss, "loss")
    loss.backward()
    record.same(x.grad, "grad_x")
    found = {key: p.grad for key, p in flow.named_parameters()}
    for key in [key for key in record.left if key.startswith("grad_")]:
        record.same(found[renamed("nf_flows.0." + key.removeprefix("grad_")).removeprefix("flows.0.")], key)
    y, back = flow.inverse(record["z_for_inverse"])
    record.same(y, "x_from_inverse")
    record.same(back, "logdet_inverse")
    assert not record.left


def shaken(channels: int, steps: int, by: float = 3.0) -> CouplingFlow:
    torch.manual_seed(0)
    flow = CouplingFlow(channels, steps)
    for p in flow.parameters():
        p.data.mul_(by) if p.ndim > 1 else p.data.add_(0.1 * torch.randn_like(p))
    return flow


def test_inverse_undoes_the_flow():
    flow, y = shaken(64, 8), torch.randn(2, 64, 8, 8, generator=torch.Generator().manual_seed(1))
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-10)):
        z, logdet = flow.to(dtype)(y.to(dtype))
        back, negative = flow.inverse(z)
        assert (back - y.to(dtype)).abs().max() < tolerance
        torch.testing.assert_close(logdet, -negative, rtol=1e-5, atol=1e-4)


def test_log_determinant_is_that_of_the_jacobian():
    flow = shaken(6, 4).double()
    y = torch.randn(2, 6, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for sample, logdet in zip(y, flow(y)[1]):
        jacobian = torch.autograd.functional.jacobian(lambda x: flow(x[None])[0].flatten(), sample).reshape(54, 54)
        torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], logdet, rtol=0, atol=1e-8)


def test_a_new_flow_is_nearly_a_permutation():
    torch.manual_seed(0)
    flow = CouplingFlow(64, 8)
    gains = torch.stack([step.gain for step in flow.steps])
    torch.testing.assert_close(gains, torch.ones_like(gains), rtol=0, atol=1e-6)
    assert flow(torch.randn(2, 64, 8, 8))[1].abs().max() < 0.01 * 64 * 64


def test_odd_channels():
    flow = CouplingFlow(7, 2)
    assert flow.steps[0].subnet[0].in_channels == 4
    assert flow.steps[0].subnet[2].out_channels == 6
    assert flow(torch.randn(2, 7, 5, 3))[0].shape == (2, 7, 5, 3)


def counted(channels, sizes, **options) -> int:
    return sum(p.numel() for p in FastFlowNet(Given(channels, sizes), **options).parameters())


@pytest.mark.parametrize(
    ("expected", "channels", "options"),
    [
        (5_574_912, [64, 128, 256], {"conv3x3_only": True}),
        (3_510_528, [64, 128, 256], {}),
        (45_007_872, [256, 512, 1024], {}),
        (41_337_856, [256, 512, 1024], {"norm_affine": False}),
        (7_074_500, [768], {"flow_steps": 20, "hidden_ratio": 0.16, "norm": None}),
        (14_102_920, [768], {"flow_steps": 20, "hidden_ratio": 0.16, "hidden_ratio_base": "full", "norm": None}),
        (14_794_240, [768], {"flow_steps": 20, "hidden_ratio": 1 / 6, "hidden_ratio_base": "full", "norm": None}),
    ],
)
def test_parameter_counts(expected, channels, options):
    assert counted(channels, [64, 32, 16], **options) == expected


def test_receptive_field_of_kernels():
    torch.manual_seed(0)
    y = torch.randn(1, 8, 15, 15)
    touched = y.clone()
    touched[0, :, 7, 7] += 1
    flow = CouplingFlow(8, 2, conv3x3_only=True)
    reached = (flow(y)[0] - flow(touched)[0]).abs().sum(1)[0].nonzero()
    assert (reached.amin(0).tolist(), reached.amax(0).tolist()) == ([3, 3], [11, 11])  # 2 steps of 2 convolutions
    for step in flow.steps:
        for conv in (step.subnet[0], step.subnet[2]):
            conv.weight.data, conv.kernel_size, conv.padding = conv.weight.data[..., 1:2, 1:2], (1, 1), (0, 0)
    assert (flow(y)[0] - flow(touched)[0]).abs().sum(1)[0].nonzero().tolist() == [[7, 7]]


def test_affine_norm_refuses_another_size():
    net = FastFlowNet(Given([4], [8]), flow_steps=1)
    with pytest.raises(UserError, match="norm_affine=false"):
        net.encode([torch.randn(1, 4, 9, 9)])
    free = FastFlowNet(Given([4], [8]), flow_steps=1, norm_affine=False)
    assert free.encode([torch.randn(1, 4, 9, 5)])[0][0].shape == (1, 4, 9, 5)


def test_backbone_is_what_timm_computes_and_stays_frozen():
    torch.manual_seed(0)
    backbone = Backbone("mobilenetv2_035", weights="random")
    whole = timm.create_model("mobilenetv2_035", features_only=True, out_indices=(1, 2, 3)).eval()
    whole.load_state_dict(backbone.net.state_dict(), strict=False)
    image = torch.rand(2, 3, 64, 96) * 2 - 1
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for found, expected in zip(backbone(image), whole((image * 0.5 + 0.5 - mean) / std)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert [tuple(y.shape[1:]) for y in backbone(image)] == [
        (c, *hw) for c, hw in zip(backbone.channels, backbone.sizes((64, 96)))
    ]
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    net = FastFlowNet(backbone, 64, flow_steps=2).train()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(10):
        negative_log_likelihood(net(torch.rand(2, 3, 64, 64))).mean().backward()
        optimizer.step()
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())


@pytest.mark.parametrize("model", ["deit_tiny_distilled_patch16_224", "cait_xxs24_224"])
def test_transformers_give_the_maps_of_a_block_after_the_norm(model):
    torch.manual_seed(0)
    backbone = Backbone(model, [2], "random", norm=True)
    image = torch.rand(1, 3, 224, 224)
    (found,) = backbone(image)
    net = backbone.net
    x = net.patch_embed((image * 0.5 + 0.5 - backbone.mean) / backbone.std)
    if model.startswith("deit"):
        x = torch.cat([net.cls_token, net.dist_token, x], 1)
    x = x + net.pos_embed
    for block in net.blocks[:3]:
        x = block(x)
    expected = net.norm(x)[:, -196:].transpose(1, 2).reshape(1, -1, 14, 14)
    torch.testing.assert_close(found, expected)
    assert len(net.blocks) == 3


@pytest.mark.parametrize(
    ("model", "image_size", "images", "parts"),
    [
        ("vit_tiny_patch16_224", None, (64, 64), ("224x224", "64x64", "=64")),
        ("vit_tiny_patch16_224", 96, (96, 224), ("96x96", "96x224", "=[96,224]")),
        ("vit_tiny_patch16_224", [64, 96], (96, 64), ("64x96", "96x64", "=[96,64]")),
        ("visformer_tiny", None, (192, 192), ("224x224", "192x192", "=192")),  # its patches are of a smaller map
    ],
)
def test_transformers_refuse_images_of_another_size(model, image_size, images, parts):
    backbone = Backbone(model, [1], "random", image_size=image_size).to("meta")
    own = backbone._only
    assert backbone(torch.empty(1, 3, *own, device="meta"))[0].shape[0] == 1
    with pytest.raises(UserError, match=r"model\.net\.backbone\.image_size: timm's") as error:
        backbone(torch.empty(1, 3, *images, device="meta"))
    assert f"images of {parts[0]} pixels, found images of {parts[1]}; " in str(error.value)
    assert str(error.value).endswith(f"expected model.net.backbone.image_size{parts[2]}")
    (found,) = Backbone(model, [1], "random", image_size=images).to("meta")(torch.empty(1, 3, *images, device="meta"))
    assert found.shape[0] == 1


def test_networks_of_any_size_refuse_none():
    backbone = Backbone("xcit_nano_12_p16_224", [1], "random").to("meta")
    assert backbone(torch.empty(1, 3, 64, 96, device="meta"))[0].shape[2:] == (4, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "mobilenetv2_10"}, "did you mean 'mobilenetv2_"),
        ({"model": "resnet18", "layers": [1, 9]}, r"backbone.layers: found \[1, 9\], expected some of 0 to 4"),
    ],
)
def test_backbones_that_are_not(options, message):
    with pytest.raises(UserError, match=message):
        Backbone(**options)


def test_weights_of_another_backbone(tmp_path):
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other.pth does not fit timm's mobilenetv2_035: Missing .* and \d+ more$"):
        Backbone("mobilenetv2_035", weights=str(tmp_path / "other.pth")).load()
    with pytest.raises(UserError, match="no weights file"):
        Backbone("mobilenetv2_035", weights=str(tmp_path / "none.pth")).load()


def test_weights_of_a_file(tmp_path):
    whole = timm.create_model("mobilenetv2_035")
    torch.save(
        {key: v.half() if v.is_floating_point() else v for key, v in whole.state_dict().items()}, tmp_path / "w.pth"
    )
    backbone = Backbone("mobilenetv2_035", weights=str(tmp_path / "w.pth"))
    backbone.load()
    torch.testing.assert_close(backbone.net.conv_stem.weight, whole.conv_stem.weight.half().float())


def test_a_compiled_backbone_forgets_the_weights_before():
    torch.manual_seed(0)
    backbone, other = (Backbone("mobilenetv2_035", [1], "random") for _ in range(2))
    image = torch.rand(1, 3, 32, 32)
    before = backbone(image)[0]
    nn.Sequential(backbone).load_state_dict({f"0.{key}": value for key, value in other.state_dict().items()})
    assert backbone._quick is None  # what a compiled program would take
    torch.testing.assert_close(backbone(image)[0], other(image)[0])
    assert not torch.allclose(backbone(image)[0], before)
