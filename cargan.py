"""CAR-GAN, the Cascade Attention-Guided Residue GAN (arXiv 1907.01826): the model in one file.

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


# ------------------------------------------------------------------------------------------- parts

def init_weights(network, std=0.2):
    """Draw the weights of every convolution from N(0, std), section 3.5; biases start at 0."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, 0.0, std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def widths(size, base):
    """Channels of the features at S/2, S/4, ..., 1: base * (1, 2, 4, 8, 8, ...), for S = `size`.

    Raises ValueError where `size` is not a power of two from 32.
    """
    depth = size.bit_length() - 1
    if size < 32 or size != 2 ** depth:
        raise ValueError(f'size {size} is not a power of two from 32 (32, 64, 128, 256, ...)')
    return [base * min(2 ** i, 8) for i in range(depth)]


def concatenate_label(image, vector):
    """Tile a label vector (B, K) over the plane and append it to (B, C, S, S): (B, C + K, S, S)."""
    plane = vector.to(image.dtype)[:, :, None, None]                 # (B, K, 1, 1)
    plane = plane.expand(-1, -1, *image.shape[2:])                   # (B, K, S, S)
    return torch.cat([image, plane], dim=1)


class SelfAttention(nn.Module):
    """Self-attention of SAGAN (Zhang et al. 2019), sections 3.1 and 3.5:

        x + scale * W_o softmax(q k^T) v

    Query and key have C/8 channels, the value C/2; keys and values are max-pooled 2x2; there is no
    1/sqrt(d); the learned scale starts at 0. Maps (B, C, H, W) to (B, C, H, W), H and W at least 2.
    """

    def __init__(self, channels):
        super().__init__()
        narrow = max(1, channels // 8)
        wide = max(1, channels // 2)
        self.query = nn.Conv2d(channels, narrow, 1, bias=False)
        self.key = nn.Conv2d(channels, narrow, 1, bias=False)
        self.value = nn.Conv2d(channels, wide, 1, bias=False)
        self.output = nn.Conv2d(wide, channels, 1, bias=False)
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x):                                            # (B, C, H, W)
        q = self.query(x).flatten(2).mT                              # (B, HW, C/8)
        k = F.max_pool2d(self.key(x), 2).flatten(2).mT               # (B, HW/4, C/8)
        v = F.max_pool2d(self.value(x), 2).flatten(2).mT             # (B, HW/4, C/2)
        # The kernels that never hold the (HW, HW/4) matrix want contiguous rows of one width for
        # all three; zeros appended to q and k leave their products as they are.
        zeros = (0, v.shape[2] - q.shape[2])
        q, k = F.pad(q, zeros), F.pad(k, zeros)                      # (B, HW or HW/4, C/2)
        q, k, v = (rows.contiguous().unsqueeze(1) for rows in (q, k, v))
        o = F.scaled_dot_product_attention(q, k, v, scale=1.0)       # (B, 1, HW, C/2)
        o = o.squeeze(1).mT.unflatten(2, x.shape[2:])                # (B, C/2, H, W)
        # the scale inside the last convolution: one pass less over the largest map
        return x + F.conv2d(o, self.scale * self.output.weight)


# ---------------------------------------------------------------------------------------- networks

class UNetGenerator(nn.Module):
    """The U-Net of pix2pix (Isola et al. 2017) with self-attention, section 3.5: G1 and G2.

    Maps (B, in_channels, S, S) to an image (B, out_channels, S, S) in [-1, 1], S = `size`. Every
    convolution is 4x4, stride 2, padding 1; log2(S) of them lead down to 1x1 and as many up again.
    Attention works on the decoder features that enter the last two up-convolutions (S/4 and S/2),
    before the skip connection is concatenated. Raises as widths() does.
    """

    def __init__(self, in_channels, out_channels=3, base=64, size=256, attention=True, dropout=0.5,
                 init_std=0.2):
        super().__init__()
        width = [in_channels, *widths(size, base)]                   # width[i] at S/2^i
        depth = len(width) - 1

        self.down = nn.ModuleList()
        for i in range(1, depth + 1):                                # from S/2^(i-1) to S/2^i
            normalised = 1 < i < depth      # not the first, and not the last: there 1x1 is left
            layers = []
            if i > 1:
                layers.append(nn.LeakyReLU(0.2))
            layers.append(nn.Conv2d(width[i - 1], width[i], 4, 2, 1, bias=not normalised))
            if normalised:
                layers.append(nn.BatchNorm2d(width[i]))
            self.down.append(nn.Sequential(*layers))

        self.up = nn.ModuleList()
        channels = width[depth]
        for i in range(depth, 1, -1):                                # from S/2^i to S/2^(i-1)
            after = width[i - 1]
            layers = [
                nn.ReLU(),
                nn.ConvTranspose2d(channels, after, 4, 2, 1, bias=False),
                nn.BatchNorm2d(after),
            ]
            if i >= 6:
                layers.append(nn.Dropout(dropout))                   # [14]: three layers at S = 256
            if attention and i <= 3:
                layers.append(SelfAttention(after))                  # at S/4 and S/2
            self.up.append(nn.Sequential(*layers))
            channels = 2 * after                                     # with the skip
        last = nn.ConvTranspose2d(channels, out_channels, 4, 2, 1)
        self.up.append(nn.Sequential(nn.ReLU(), last))
        init_weights(self, init_std)

    def forward(self, x):                                            # (B, in_channels, S, S)
        skips = []
        for down in self.down:
            x = down(x)                                              # (B, width[i], S/2^i, S/2^i)
            skips.append(x)
        x = skips.pop()                                              # (B, 8 base, 1, 1)
        for up in self.up[:-1]:
            x = torch.cat([up(x), skips.pop()], dim=1)               # (B, 2 width[i], S/2^i, S/2^i)
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
            convolution = nn.Conv2d(width, 2 * width, 4, stride, 1, bias=False)
            layers += [convolution, nn.BatchNorm2d(2 * width), nn.LeakyReLU(0.2)]
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
    path of torchvision's `resnet50-*.pth`, or False. Of one class there is nothing to tell: the
    logit is 0, so that L_C and the residue are 0, too.

    Raises OSError where the weights cannot be had, RuntimeError where they are another network's.
    """

    def __init__(self, num_classes, pretrained=True):
        super().__init__()
        self.resnet = None
        if num_classes == 1:
            return
        self.resnet = resnet50()
        if pretrained is True:
            imagenet = ResNet50_Weights.IMAGENET1K_V1
            self.resnet.load_state_dict(imagenet.get_state_dict(check_hash=True, weights_only=True))
        elif pretrained:
            weights = torch.load(pretrained, map_location='cpu', weights_only=True)
            self.resnet.load_state_dict(weights)
        self.resnet.fc = nn.Linear(self.resnet.fc.in_features, num_classes)
        mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
        std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        self.register_buffer('mean', mean, persistent=False)
        self.register_buffer('std', std, persistent=False)

    def forward(self, image):                                        # (B, 3, S, S) in [-1, 1]
        if self.resnet is None:
            return image.new_zeros(len(image), 1)
        image = (image + 1) / 2                                      # in [0, 1]
        return self.resnet((image - self.mean) / self.std).float()   # (B, num_classes)


class ResidueModule(nn.Module):
    """The residue, section 3.2: L_r = L_a - L'_i with L'_i = softmax(C(image)).

    Maps (image (B, 3, S, S), label (B,)) to (logits (B, K), residue (B, K)). C is frozen and stays
    in eval mode whatever mode the model is in, yet its gradient reaches the image (section 3.3):
    through the logits always, through the residue unless `detach`. A residue sums to 0 and is 0
    where C recognises the label for certain.
    """

    def __init__(self, classifier, detach=False):
        super().__init__()
        self.classifier = classifier.requires_grad_(False).eval()
        self.detach = detach

    def train(self, mode=True):
        super().train(mode)
        self.classifier.eval()
        return self

    def forward(self, image, label):
        logits = self.classifier(image)                              # (B, K)
        L_a = F.one_hot(label, logits.shape[1])                      # (B, K)
        L_r = L_a - logits.softmax(dim=1)                            # (B, K)
        if self.detach:
            L_r = L_r.detach()
        return logits, L_r


class CARGAN(nn.Module):
    """G1, C and G2 in cascade, sections 3.1 and 3.2.

    Maps (lms (B, C_a, S, S), label (B,)) to (coarse I', fine I'', coarse_logits C(I')). `variant`
    is one of the paper's ablations (`VARIANTS`); D has no stage II and returns I' twice, and what B
    leaves out is a loss, not a network. Without `classifier` C is untrained. With `detach_residue`
    no gradient passes from G2 through C to G1.

    Raises ValueError for an unknown variant, and as widths() does.
    """

    def __init__(self, num_classes, size=256, base=64, variant='E', lms_channels=1, classifier=None,
                 dropout=0.5, init_std=0.2, detach_residue=False):
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f'variant {variant!r} is not one of {", ".join(VARIANTS)}')
        self.num_classes = num_classes
        self.variant = variant
        unet = dict(base=base, size=size, attention=variant != 'A', dropout=dropout,
                    init_std=init_std)
        self.G1 = UNetGenerator(lms_channels + num_classes, **unet)
        if variant == 'C':
            self.G2 = UNetGenerator(3, **unet)
        elif variant != 'D':
            self.G2 = UNetGenerator(3 + num_classes, **unet)
        if classifier is None:
            classifier = Classifier(num_classes, pretrained=False)
        self.residue = ResidueModule(classifier, detach_residue)

    def forward(self, lms, label):                                   # (B, C_a, S, S), (B,)
        L_a = F.one_hot(label, self.num_classes)                     # (B, K)
        coarse = self.G1(concatenate_label(lms, L_a))                # I' = G1(A, L_a)
        coarse_logits, L_r = self.residue(coarse, label)             # C(I'), L_a - softmax(C(I'))
        if self.variant == 'D':
            fine = coarse
        elif self.variant == 'C':
            fine = self.G2(coarse)
        else:
            fine = self.G2(concatenate_label(coarse, L_r))           # Eq. (1): I'' = G2(I', L_r)
        return coarse, fine, coarse_logits


# ------------------------------------------------------------------------------------------ losses
# Sums over the stages X = I', I'' take whatever stages are given: model D has but one. In logits,
# -log D is softplus(-logits) and -log(1 - D) is softplus(logits).

def classification_loss(label, *stages):
    """Eq. (2): L_C = 0.5 CE(C(I'), y) + 0.5 CE(C(I''), y), from C's logits (B, K) of each stage."""
    loss = 0
    for logits in stages:
        loss = loss + 0.5 * F.cross_entropy(logits, label)
    return loss


def discriminator_loss(real, *fakes, weights=(1.0, 1.0)):
    """Eq. (3) to (5) as D minimises them, from D's logits: the sum over the stages X of

        - E log D(A, I) - E log(1 - D(A, X)),

    weighted by lambda_G1, lambda_G2; the real term counts for each stage, as the sum is written.
    """
    loss = 0
    for weight, fake in zip(weights, fakes):
        loss = loss + weight * (F.softplus(-real).mean() + F.softplus(fake).mean())
    return loss


def generator_loss(*fakes, weights=(1.0, 1.0), saturating=True):
    """Eq. (3) to (5) as G1 and G2 minimise them, from D's logits: the sum over the stages X of

        E log(1 - D(A, X)),     or, not saturating where D is sure of itself,     - E log D(A, X),

    weighted by lambda_G1, lambda_G2.
    """
    loss = 0
    for weight, fake in zip(weights, fakes):
        if saturating:
            loss = loss - weight * F.softplus(fake).mean()           # log(1 - D)
        else:
            loss = loss + weight * F.softplus(-fake).mean()          # -log D
    return loss


def l1_loss(image, *stages):
    """L_L1 = |I - I'|_1 + |I - I''|_1, each the mean over pixels, channels and batch."""
    return sum(F.l1_loss(stage, image) for stage in stages)


def objective(L_C, L_cGAN, L_L1, lambda_c=1.0, lambda_gan=1.0, lambda_l1=100.0):
    """Eq. (6): lambda_c L_C + lambda_gan L_cGAN + lambda_l1 L_L1."""
    return lambda_c * L_C + lambda_gan * L_cGAN + lambda_l1 * L_L1
