"""The tests: python -m pytest. On a CPU, without network and without any data."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import cargan


def changed(before, after):
    return [name for name in before if not torch.equal(before[name], after[name])]


# ---------------------------------------------------------------------------------------- networks

def attention_by_formula(module, x):
    """The sum over all keys, written out with the whole matrix."""
    q, k, v = (f(x) for f in (module.query, module.key, module.value))
    k, v = F.max_pool2d(k, 2), F.max_pool2d(v, 2)
    beta = torch.einsum('bcq,bck->bqk', q.flatten(2), k.flatten(2)).softmax(dim=2)
    o = torch.einsum('bqk,bck->bcq', beta, v.flatten(2)).view(len(x), -1, *x.shape[2:])
    return x + module.scale * module.output(o)


@pytest.mark.parametrize('channels, height, width', [(32, 12, 10), (64, 7, 7), (8, 4, 4), (3, 5, 6)])
def test_attention_is_its_formula(channels, height, width):
    torch.manual_seed(0)
    module = cargan.SelfAttention(channels).double()
    x = torch.randn(2, channels, height, width, dtype=torch.double, requires_grad=True)
    assert torch.equal(module(x), x)                # the scale starts at 0
    nn.init.constant_(module.scale, 0.7)
    ours, expected = module(x), attention_by_formula(module, x)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-10)
    direction, parameters = torch.randn_like(x), [x, *module.parameters()]
    torch.testing.assert_close(torch.autograd.grad((ours * direction).sum(), parameters),
                               torch.autograd.grad((expected * direction).sum(), parameters), rtol=1e-8, atol=1e-9)


def test_attention_never_holds_its_matrix():
    """With the kernel that would hold it switched off, attention still works, forwards and backwards."""
    module = cargan.SelfAttention(32)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        x = torch.randn(1, 32, 64, 64, requires_grad=True)
        module(x).sum().backward()
    widths = module.query.out_channels, module.key.out_channels, module.value.out_channels
    assert widths == (4, 4, 16) and x.grad.shape == x.shape


def attention_inputs(network, x):
    """The shapes (C, H, W) that the network's attention sees, in order."""
    seen = []
    for module in network.modules():
        if isinstance(module, cargan.SelfAttention):
            module.register_forward_hook(lambda module, inputs, output: seen.append(tuple(inputs[0].shape[1:])))
    network(x)
    return seen


def test_attention_stands_before_the_last_two_convolutions():
    G = cargan.UNetGenerator(14, base=16, size=64)
    assert attention_inputs(G, torch.randn(2, 14, 64, 64)) == [(32, 16, 16), (16, 32, 32)]     # S/4, S/2
    for up in (G.up[-3], G.up[-2]):         # the last of their layers: before the skip is concatenated
        assert isinstance(up[-1], cargan.SelfAttention)
    assert G.up[-1][1].in_channels == 2 * 16
    D = cargan.PatchDiscriminator(4, base=16)
    assert attention_inputs(D, torch.randn(2, 4, 64, 64)) == [(64, 8, 8), (128, 7, 7)]
    layers = [layer for layer in D.layers if isinstance(layer, (nn.Conv2d, cargan.SelfAttention))]
    assert [type(layer).__name__ for layer in layers[-4:]] == ['SelfAttention', 'Conv2d'] * 2
    assert not attention_inputs(cargan.UNetGenerator(14, base=8, size=32, attention=False), torch.randn(2, 14, 32, 32))


def test_unet_at_256_is_pix2pixs():
    with torch.device('meta'):
        G = cargan.UNetGenerator(3, attention=False)
        D = cargan.PatchDiscriminator(6, attention=False)
        full = cargan.UNetGenerator(14)
    assert sum(p.numel() for p in G.parameters()) == 54_414_531
    assert sum(p.numel() for p in D.parameters()) == 2_768_705
    assert len(G.down) == len(G.up) == 8
    assert sum(p.numel() for p in full.parameters()) == pytest.approx(54.4e6, rel=2e-3)
    assert [type(layer) for up in G.up for layer in up].count(nn.Dropout) == 3
    for module in [*G.modules(), *D.modules()]:
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            assert module.kernel_size == (4, 4) and module.padding == (1, 1)
    assert {m.stride for m in G.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))} == {(2, 2)}


@pytest.mark.parametrize('size', [32, 64, 128])
def test_unet_sizes(size):
    G = cargan.UNetGenerator(5, base=4, size=size)
    image = G(torch.randn(2, 5, size, size))
    assert image.shape == (2, 3, size, size) and image.abs().max() <= 1
    assert G.eval()(torch.randn(1, 5, size, size)).shape == (1, 3, size, size)
    for bad in (16, 48, 100, 0):
        with pytest.raises(ValueError, match='power of two'):
            cargan.UNetGenerator(5, size=bad)


def test_every_skip_reaches_the_output():
    G = cargan.UNetGenerator(3, base=4, size=32).eval()
    x, down = torch.randn(1, 3, 32, 32), []
    for layer in G.down:
        layer.register_forward_hook(lambda m, i, out: down.append(out.retain_grad() or out))
    G(x).square().sum().backward()
    assert [tuple(out.shape[2:]) for out in down] == [(16, 16), (8, 8), (4, 4), (2, 2), (1, 1)]
    assert all(out.grad.abs().sum() > 0 for out in down)


def test_discriminator_sees_70x70():
    D = cargan.PatchDiscriminator(4, base=4, attention=False).eval()
    x = torch.randn(1, 4, 256, 256, requires_grad=True)
    logits = D(x)
    assert logits.shape == (1, 1, 30, 30) and D(x[..., :64, :64]).shape == (1, 1, 6, 6)
    logits[0, 0, 15, 15].backward()
    rows, columns = torch.nonzero(x.grad[0].abs().sum(dim=0), as_tuple=True)
    assert rows.max() - rows.min() + 1 == columns.max() - columns.min() + 1 == 70
    assert not any(isinstance(module, (nn.Sigmoid, nn.Tanh)) for module in D.modules())     # logits


def test_weights_start_from_a_normal_distribution():
    for network, std in ((cargan.UNetGenerator(3, base=16, size=64), 0.2),
                         (cargan.PatchDiscriminator(4, base=16, init_std=0.02), 0.02)):
        weights = torch.cat([module.weight.flatten() for module in network.modules()
                             if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d))])
        assert weights.std().item() == pytest.approx(std, rel=0.01) and abs(weights.mean()) < 0.01 * std


def test_classifier_is_resnet50_behind_imagenets_normalisation():
    C = cargan.Classifier(7, pretrained=False).eval()
    image = torch.rand(2, 3, 64, 64) * 2 - 1
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    torch.testing.assert_close(C(image), C.resnet((image * 0.5 + 0.5 - mean) / std))
    assert C(image).shape == (2, 7) and len(C.state_dict()) == 320


def test_residue_and_its_gradient_into_g1_through_c():
    torch.manual_seed(0)
    model = cargan.CARGAN(5, size=32, base=8, init_std=0.02).train()
    C = model.residue.classifier
    assert not C.training and not any(p.requires_grad for p in C.parameters())
    before = copy.deepcopy(C.state_dict())
    lms, label = torch.rand(4, 1, 32, 32), torch.tensor([0, 1, 4, 1])
    coarse = model.G1(cargan.concatenate_label(lms, F.one_hot(label, 5)))
    logits, residue = model.residue(coarse, label)
    torch.testing.assert_close(logits, C(coarse))
    softmax = torch.exp(logits) / torch.exp(logits).sum(dim=1, keepdim=True)
    torch.testing.assert_close(residue, torch.eye(5)[label] - softmax)
    torch.testing.assert_close(residue.sum(dim=1), torch.zeros(4), atol=1e-6, rtol=0)
    residue.square().sum().backward()               # nothing but the residue's path: L_r -> C -> I' -> G1
    assert all(p.grad is not None for p in model.G1.parameters()) and model.G1.up[-1][1].weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in C.parameters()) and not changed(before, C.state_dict())

    sure = nn.Linear(12, 5)
    nn.init.zeros_(sure.weight), nn.init.constant_(sure.bias, 0)
    sure.bias.data[2] = 200                         # certain of class 2
    _, residue = cargan.ResidueModule(nn.Sequential(nn.Flatten(), sure))(torch.rand(2, 3, 2, 2), torch.tensor([2, 0]))
    torch.testing.assert_close(residue, torch.tensor([[0., 0, 0, 0, 0], [1, 0, -1, 0, 0]]))


def test_label_is_tiled_over_the_plane():
    image, vector = torch.rand(2, 3, 4, 4), torch.tensor([[1, 0], [0, 1]])
    joined = cargan.concatenate_label(image, vector)
    assert joined.shape == (2, 5, 4, 4) and torch.equal(joined[:, :3], image)
    assert (joined[0, 3] == 1).all() and (joined[0, 4] == 0).all() and (joined[1, 4] == 1).all()


def test_cascade_is_eq_1():
    torch.manual_seed(0)
    model = cargan.CARGAN(5, size=32, base=8).eval()
    lms, label = torch.rand(2, 1, 32, 32), torch.tensor([3, 0])
    coarse, fine, logits = model(lms, label)
    I1 = model.G1(torch.cat([lms, torch.eye(5)[label][:, :, None, None].expand(2, 5, 32, 32)], 1))
    L_r = torch.eye(5)[label] - model.residue.classifier(I1).softmax(1)
    I2 = model.G2(torch.cat([I1, L_r[:, :, None, None].expand(2, 5, 32, 32)], 1))
    for ours, expected in ((coarse, I1), (fine, I2), (logits, model.residue.classifier(I1))):
        torch.testing.assert_close(ours, expected)


def test_variants():
    lms, label = torch.rand(2, 3, 32, 32), torch.tensor([3, 0])
    models = {v: cargan.CARGAN(5, size=32, base=8, variant=v, lms_channels=3).eval() for v in 'ABCDE'}
    for model in models.values():
        coarse, fine, logits = model(lms, label)
        assert coarse.shape == fine.shape == (2, 3, 32, 32) and logits.shape == (2, 5)
    def attentions(model):
        return sum(isinstance(module, cargan.SelfAttention) for module in model.modules())
    assert [attentions(model) for model in models.values()] == [0, 4, 4, 2, 4]
    assert models['E'].G2.down[0][0].in_channels == models['B'].G2.down[0][0].in_channels == 3 + 5
    assert models['C'].G2.down[0][0].in_channels == 3
    coarse, fine, _ = models['D'](lms, label)
    assert coarse is fine and not hasattr(models['D'], 'G2')
    with pytest.raises(ValueError, match="variant 'F'"):
        cargan.CARGAN(5, variant='F')


# ------------------------------------------------------------------------------------------ losses

def test_eq_2_classification_loss():
    a, b = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, math.log(4)]])
    # -log p of the label: a: 1/4 (label 1), 1/2; b: 1/2, 4/5
    expected = 0.5 * (math.log(4) + math.log(2)) / 2 + 0.5 * (math.log(2) + math.log(5 / 4)) / 2
    label = torch.tensor([1, 1])
    assert cargan.classification_loss(label, a, b).item() == pytest.approx(expected)
    assert cargan.classification_loss(label, a).item() == pytest.approx(0.5 * (math.log(4) + math.log(2)) / 2)


def test_eq_3_to_5_adversarial_losses():
    def logit(p):
        return torch.tensor([math.log(p / (1 - p))])
    real, coarse, fine = logit(0.8), logit(0.3), logit(0.4)
    expected = -(math.log(0.8) + math.log(0.7)) - (math.log(0.8) + math.log(0.6))       # the real term twice
    assert cargan.discriminator_loss(real, coarse, fine).item() == pytest.approx(expected, rel=1e-5)
    assert cargan.discriminator_loss(real, coarse).item() == pytest.approx(-math.log(0.8 * 0.7), rel=1e-5)
    assert cargan.generator_loss(coarse, fine).item() == pytest.approx(-math.log(0.3 * 0.4), rel=1e-5)
    assert cargan.generator_loss(coarse, fine, saturating=True).item() == pytest.approx(math.log(0.7 * 0.6), rel=1e-5)
    extreme = torch.tensor([1e4]), torch.tensor([-1e4])
    assert all(math.isfinite(cargan.discriminator_loss(*pair)) for pair in (extreme, extreme[::-1]))


def test_l1_and_eq_6():
    image = torch.zeros(1, 3, 2, 2)
    assert cargan.l1_loss(image, image + 0.25, image - 0.5).item() == pytest.approx(0.75)
    assert cargan.objective(2.0, 3.0, 0.5) == pytest.approx(2 + 3 + 50)
    assert cargan.objective(2.0, 3.0, 0.5, 0.5, 2, 10) == pytest.approx(1 + 6 + 5)
