"""CAR-GAN, the Cascade Attention-Guided Residue GAN (arXiv 1907.01826): the whole model in one file.

Half a second of an instrument's sound becomes the picture of the scene it was played in:

    A, L_a --G1--> I' --C--> L_r = L_a - softmax(C(I'))
                   I', L_r --G2--> I''                      D judges [A, I], [A, I'], [A, I'']

    model = CARGAN(num_classes=13)                          # untrained; downloads nothing
    coarse, fine, coarse_logits = model(lms, label)         # I', I'', C(I')

Conventions: images (B, 3, S, S) float32 in [-1, 1], RGB; the log-amplitude mel spectrum (LMS) `A`
(B, C_a, S, S) float32 in [-1, 1]; labels (B,) int64; equation and section numbers are the paper's.
"""
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import ResNet50_Weights, resnet50

VARIANTS = {  # Table 1, the ablation
    'A': 'without attention',
    'B': 'without the classification loss L_C',
    'C': 'without the residue module',
    'D': 'without stage II',
    'E': 'the full model',
}


def init_weights(network, std=0.2):
    """Draw the weights of every convolution from N(0, std), section 3.5; biases start at 0."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, 0.0, std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


# ---------------------------------------------------------------------------------------- networks

class SelfAttention(nn.Module):
    """Self-attention of SAGAN (Zhang et al. 2019), sections 3.1 and 3.5: x + scale * W_o softmax(q k^T) v.

    Query and key have C/8 channels, the value C/2; keys and values are max-pooled 2x2; there is no
    1/sqrt(d); the learned scale starts at 0. Maps (B, C, H, W) to the same shape, H and W at least 2.
    """

    def __init__(self, channels):
        super().__init__()
        self.query = nn.Conv2d(channels, max(1, channels // 8), 1, bias=False)
        self.key = nn.Conv2d(channels, max(1, channels // 8), 1, bias=False)
        self.value = nn.Conv2d(channels, max(1, channels // 2), 1, bias=False)
        self.output = nn.Conv2d(max(1, channels // 2), channels, 1, bias=False)
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x):                                                       # (B, C, H, W)
        q = self.query(x).flatten(2).transpose(1, 2)                            # (B, HW, C/8)
        k = F.max_pool2d(self.key(x), 2).flatten(2).transpose(1, 2)             # (B, HW/4, C/8)
        v = F.max_pool2d(self.value(x), 2).flatten(2).transpose(1, 2)           # (B, HW/4, C/2)
        # The kernels that never hold the (HW, HW/4) matrix want contiguous rows of one width for
        # all three; zeros appended to q and k leave their products as they are.
        q, k, v = (F.pad(t, (0, v.shape[2] - t.shape[2])).contiguous().unsqueeze(1) for t in (q, k, v))
        o = F.scaled_dot_product_attention(q, k, v, scale=1.0)                  # (B, 1, HW, C/2)
        o = o.squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:])              # (B, C/2, H, W)
        return x + self.scale * self.output(o)


class UNetGenerator(nn.Module):
    """The U-Net of pix2pix (Isola et al. 2017) with self-attention, section 3.5: G1 and G2.

    Maps (B, in_channels, S, S) to an image (B, out_channels, S, S) in [-1, 1], S = `size`. Every
    convolution is 4x4, stride 2, padding 1; log2(S) of them lead down to 1x1 and as many up again.
    The widths are base * (1, 2, 4, 8, 8, ...). Attention works on the decoder features that enter
    the last two up-convolutions (S/4 and S/2), before the skip connection is concatenated.

    Raises ValueError where `size` is not a power of two from 32.
    """

    def __init__(self, in_channels, out_channels=3, base=64, size=256, attention=True, dropout=0.5,
                 init_std=0.2):
        super().__init__()
        depth = size.bit_length() - 1
        if size < 32 or size != 2 ** depth:
            raise ValueError(f'size {size} is not a power of two from 32 (32, 64, 128, 256, ...)')
        width = [base * min(2 ** i, 8) for i in range(depth)]        # of the features at S / 2^(i+1)

        self.down = nn.ModuleList()
        for i in range(depth):
            normalised = 0 < i < depth - 1      # not the first, and not the last: there 1x1 is left
            layers = [nn.LeakyReLU(0.2)] if i > 0 else []
            layers += [nn.Conv2d(width[i - 1] if i > 0 else in_channels, width[i], 4, 2, 1,
                                 bias=not normalised)]
            layers += [nn.BatchNorm2d(width[i])] if normalised else []
            self.down.append(nn.Sequential(*layers))

        self.up = nn.ModuleList()
        for i in reversed(range(1, depth)):
            layers = [nn.ReLU(), nn.ConvTranspose2d(width[i] * (1 if i == depth - 1 else 2),
                                                    width[i - 1], 4, 2, 1, bias=False),
                      nn.BatchNorm2d(width[i - 1])]
            layers += [nn.Dropout(dropout)] if i >= 5 else []        # [14]: three layers at S = 256
            layers += [SelfAttention(width[i - 1])] if attention and i <= 2 else []
            self.up.append(nn.Sequential(*layers))
        self.up.append(nn.Sequential(nn.ReLU(), nn.ConvTranspose2d(2 * base, out_channels, 4, 2, 1)))
        init_weights(self, init_std)

    def forward(self, x):                                            # (B, in_channels, S, S)
        skips = []
        for down in self.down:
            x = down(x)
            skips.append(x)                                          # (B, width[i], S/2^(i+1), ...)
        x = skips.pop()                                              # (B, 8 base, 1, 1)
        for up in self.up[:-1]:
            x = torch.cat([up(x), skips.pop()], dim=1)               # (B, 2 width[i-1], S/2^i, ...)
        return self.up[-1](x).float().tanh()                         # (B, out_channels, S, S)


class PatchDiscriminator(nn.Module):
    """The 70x70 PatchGAN with self-attention, section 3.5: D.

    Maps a pair [A, image] (B, in_channels, S, S) to logits (B, 1, S/8 - 2, S/8 - 2), one for each
    70x70 patch. 4x4 convolutions, padding 1: three of stride 2, then two of stride 1; attention
    works on the inputs of the last two.
    """

    def __init__(self, in_channels, base=64, attention=True, init_std=0.2):
        super().__init__()
        layers = [nn.Conv2d(in_channels, base, 4, 2, 1), nn.LeakyReLU(0.2)]
        for width, stride in ((base, 2), (2 * base, 2), (4 * base, 1)):
            if attention and stride == 1:
                layers.append(SelfAttention(width))
            layers += [nn.Conv2d(width, 2 * width, 4, stride, 1, bias=False),
                       nn.BatchNorm2d(2 * width), nn.LeakyReLU(0.2)]
        if attention:
            layers.append(SelfAttention(8 * base))
        layers.append(nn.Conv2d(8 * base, 1, 4, 1, 1))
        self.layers = nn.Sequential(*layers)
        init_weights(self, init_std)

    def forward(self, pair):                                         # (B, C_a + 3, S, S)
        return self.layers(pair).float()                             # (B, 1, S/8 - 2, S/8 - 2)


class Classifier(nn.Module):
    """C, sections 3.3 and 3.5: ResNet50 whose ImageNet head is replaced by one linear layer.

    Maps images (B, 3, S, S) in [-1, 1] to logits (B, num_classes); ImageNet's normalisation is done
    inside. `pretrained` is True (ImageNet weights by torchvision, which downloads them once), the
    path of torchvision's `resnet50-*.pth`, or False.

    Raises OSError where the weights cannot be had, RuntimeError where they are another network's.
    """

    def __init__(self, num_classes, pretrained=True):
        super().__init__()
        self.resnet = resnet50(weights=None)
        if pretrained is True:
            self.resnet.load_state_dict(ResNet50_Weights.IMAGENET1K_V1.get_state_dict(
                progress=True, check_hash=True, weights_only=True))
        elif pretrained:
            self.resnet.load_state_dict(torch.load(pretrained, map_location='cpu', weights_only=True))
        self.resnet.fc = nn.Linear(self.resnet.fc.in_features, num_classes)
        for name, values in (('mean', (0.485, 0.456, 0.406)), ('std', (0.229, 0.224, 0.225))):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, image):                                        # (B, 3, S, S)
        return self.resnet(((image + 1) / 2 - self.mean) / self.std).float()      # (B, num_classes)


class ResidueModule(nn.Module):
    """The residue, section 3.2: L_r = L_a - L'_i with L'_i = softmax(C(image)).

    C is frozen and stays in eval mode whatever mode the model is in, yet its gradient reaches the
    image (section 3.3). Maps (image (B, 3, S, S), label (B,)) to (logits (B, K), residue (B, K)); a residue sums
    to 0, is 0 where C recognises the label for certain, and is not detached.
    """

    def __init__(self, classifier):
        super().__init__()
        self.classifier = classifier.requires_grad_(False)
        self.train(self.training)

    def train(self, mode=True):
        super().train(mode)
        self.classifier.eval()
        return self

    def forward(self, image, label):
        logits = self.classifier(image)                              # (B, K)
        return logits, F.one_hot(label, logits.shape[1]) - logits.softmax(dim=1)   # L_r (B, K)


class CARGAN(nn.Module):
    """G1, C and G2 in cascade, Eq. (1): I'' = G2(I', L_r).

    Maps (lms (B, C_a, S, S), label (B,)) to (coarse I', fine I'', coarse_logits C(I')). `variant` is
    one of the paper's ablations (`VARIANTS`); D has no stage II and returns I' twice, and what B
    leaves out is a loss, not a network. Without `classifier` C is untrained.

    Raises ValueError for a size that is no power of two from 32, or an unknown variant.
    """

    def __init__(self, num_classes, size=256, base=64, variant='E', lms_channels=1, classifier=None,
                 dropout=0.5, init_std=0.2):
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f'variant {variant!r} is not one of {", ".join(VARIANTS)}')
        self.num_classes, self.variant = num_classes, variant
        unet = dict(base=base, size=size, attention=variant != 'A', dropout=dropout, init_std=init_std)
        self.G1 = UNetGenerator(lms_channels + num_classes, **unet)
        if variant != 'D':
            self.G2 = UNetGenerator(3 if variant == 'C' else 3 + num_classes, **unet)
        self.residue = ResidueModule(
            Classifier(num_classes, pretrained=False) if classifier is None else classifier)

    def forward(self, lms, label):
        coarse = self.G1(concatenate_label(lms, F.one_hot(label, self.num_classes)))    # I' = G1(A, L_a)
        coarse_logits, residue = self.residue(coarse, label)
        if self.variant == 'D':
            return coarse, coarse, coarse_logits
        fine = self.G2(coarse if self.variant == 'C' else concatenate_label(coarse, residue))
        return coarse, fine, coarse_logits


def concatenate_label(image, vector):
    """Tile a label vector (B, K) over the plane and append it to (B, C, S, S): (B, C + K, S, S)."""
    plane = vector.to(image.dtype)[:, :, None, None].expand(-1, -1, *image.shape[2:])
    return torch.cat([image, plane], dim=1)


@torch.no_grad()
def recalibrate_batchnorm(model, batches, pictures=256):
    """Set the running statistics of G1's and G2's BatchNorm to those over so many pictures of `batches`, (lms, image,
    label) each, without dropout: at the paper's learning rate the weights outrun the running averages, which
    training does not read. Variances are over all pictures at once: small batches lose what lies between their means.
    """
    training, sums, done = model.training, {}, 0
    norms = [norm for norm in model.train().modules()
             if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.training]      # C's are not

    def note(norm, inputs):
        var, mean = torch.var_mean(inputs[0], dim=(0, 2, 3), correction=0)                 # (C,)
        moments = torch.stack([torch.ones_like(mean), mean, var + mean ** 2]).cpu().double()
        sums[norm] = sums.get(norm, 0) + moments * (inputs[0].numel() // len(mean))         # (3, C)

    model.eval()
    hooks = [norm.train().register_forward_pre_hook(note) for norm in norms]
    for lms, _, label in batches:
        model(lms, label)
        done += len(label)
        if done >= pictures:
            break
    for hook in hooks:
        hook.remove()
    for norm, (n, total, squares) in sums.items():      # what of CMCGAN does not generate has none
        norm.num_batches_tracked.zero_()        # the same after every save, however many came before
        norm.running_mean.copy_(total / n)
        norm.running_var.copy_((squares - total ** 2 / n) / (n - 1))
    model.train(training)


# ------------------------------------------------------------------------------------------ losses
# The sums over the stages I', I'' are written over whatever stages are given: model D has but one.

def classification_loss(label, *logits, weights=(0.5, 0.5)):
    """Eq. (2): L_C = 0.5 CE(C(I'), y) + 0.5 CE(C(I''), y), from the logits (B, K) of each stage."""
    return sum(weight * F.cross_entropy(stage, label) for weight, stage in zip(weights, logits))


def discriminator_loss(real, *fakes, weights=(1.0, 1.0)):
    """Eq. (3) to (5) as D minimises them: the sum over the stages X, weighted by lambda_G1, lambda_G2, of

        - E log D(A, I) - E log(1 - D(A, X)),

    from D's logits; the real term counts once for each stage, as the sum is written.
    """
    return sum(weight * (F.softplus(-real).mean() + F.softplus(fake).mean())
               for weight, fake in zip(weights, fakes))


def generator_loss(*fakes, weights=(1.0, 1.0), saturating=True):
    """Eq. (3) to (5) as G1 and G2 minimise them, from D's logits: the sum over the stages X, weighted by
    lambda_G1, lambda_G2, of E log(1 - D(A, X)), or, not saturating where D is sure of itself, of
    - E log D(A, X).
    """
    return sum(weight * (-F.softplus(fake).mean() if saturating else F.softplus(-fake).mean())
               for weight, fake in zip(weights, fakes))


def l1_loss(image, *stages):
    """L_L1 = |I - I'|_1 + |I - I''|_1, each the mean over pixels, channels and batch."""
    return sum(F.l1_loss(stage, image) for stage in stages)


def objective(L_C, L_cGAN, L_L1, lambda_c=1.0, lambda_gan=1.0, lambda_l1=100.0):
    """Eq. (6): lambda_c L_C + lambda_gan L_cGAN + lambda_l1 L_L1."""
    return lambda_c * L_C + lambda_gan * L_cGAN + lambda_l1 * L_L1
