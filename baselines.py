"""S2IC (Chen et al. 2017, arXiv 1704.08292) and CMCGAN (Hao et al. 2018, arXiv 1711.08102): the other rows of Table 2.

    S2IC    A --audio classifier (frozen)--> 128 features --phi--> 64, with z --G--> image     GAN-CLS, no L1
    CMCGAN  E_A, E_V, D_A, D_V between sounds and images, one discriminator for pairs          cycles and L1

Neither has public code. A tag says where a line comes from: [paper] theirs, [code] GAN-CLS, whose loss S2IC uses,
[choice] ours; docs/baselines.md lists them all. Both models are called as CARGAN is, and generate(lms) is the image
alone. Neither sees the label, which serves S2IC's audio classifier and the wrong pairs. Conventions are cargan.py's.
"""
import torch
import torch.nn.functional as F
from torch import nn

from cargan import Classifier, ResidueModule, concatenate_label, generator_loss, init_weights, l1_loss

NOISE, FEATURES, PHI = 10, 128, 64      # numbers in z, in the audio features, in phi of them [paper, S2IC]
SETTINGS = dict(lr=2e-4, betas=[0.5, 0.999], init_std=0.02, dropout=0.0, saturating=False, lambdas=[0, 1, 1, 1, 1])
EPOCHS = {'S2IC': 35, 'CMCGAN': 200}      # S2IC where it peaks [paper]; the rest of both lines [code], CMCGAN [choice]


# ------------------------------------------------------------------------------------ common parts

def widths(size, base):
    """Of the features at S/2, S/4, ..., 4: base * (1, 2, 4, 8, 8, ...). ValueError for no power of two from 32."""
    if size < 32 or size & (size - 1):
        raise ValueError(f'size {size} is not a power of two from 32 (32, 64, 128, 256, ...)')
    return [base * min(2 ** i, 8) for i in range(size.bit_length() - 3)]


def encoder(channels, size, base):
    """A network of 4x4 convolutions, stride 2 [code]: (B, channels, S, S) -> (B, widths(size, base)[-1], 4, 4)."""
    width = widths(size, base)
    layers = [nn.Conv2d(channels, width[0], 4, 2, 1), nn.LeakyReLU(0.2)]
    for before, after in zip(width, width[1:]):
        layers += [nn.Conv2d(before, after, 4, 2, 1, bias=False), nn.BatchNorm2d(after), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers)


class Decoder(nn.Module):
    """The mirror image of encoder(): features (B, channels, 4, 4) with z (B, 10) appended -> (B, out_channels, S, S)
    in [-1, 1]. With `vector` the features are (B, channels, 1, 1), and one up-convolution more leads to 4x4 [code].
    """

    def __init__(self, channels, out_channels, size, base, vector=False):
        super().__init__()
        width, layers = [channels + NOISE, *widths(size, base)[::-1][0 if vector else 1:]], []
        for before, after in zip(width, width[1:]):
            padding = 0 if vector and not layers else 1                             # 0: 1x1 -> 4x4
            layers += [nn.ConvTranspose2d(before, after, 4, 2, padding, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.ConvTranspose2d(width[-1], out_channels, 4, 2, 1))

    def forward(self, features, z):
        return self.layers(concatenate_label(features, z)).float().tanh()           # (B, out_channels, S, S)


class PairDiscriminator(nn.Module):
    """(image (B, 3, S, S), sound) -> logits (B,). `sound` is a network that returns (B, channels, 4, 4) or 1x1. Without
    the hidden layer of `head` D would be f(image) + g(sound), blind to what does not match [code].
    """

    def __init__(self, sound, channels, size, base, init_std):
        super().__init__()
        width = widths(size, base)[-1]
        self.image, self.sound = encoder(3, size, base), sound
        self.head = nn.Sequential(nn.Conv2d(width + channels, width, 1, bias=False), nn.BatchNorm2d(width),
                                  nn.LeakyReLU(0.2), nn.Conv2d(width, 1, 4))
        init_weights(self, init_std)

    def forward(self, image, sound):
        sound = self.sound(sound).expand(-1, -1, 4, 4)                              # (B, channels, 4, 4)
        return self.head(torch.cat([self.image(image), sound], dim=1)).float().flatten()        # (B,)


class Baseline(nn.Module):
    """Called as CARGAN is: forward(lms (B, C_a, S, S), label) -> (image, image, C(image)), one image twice as model
    D's; the label is not used. Raises as widths().
    """

    def train(self, mode=True):
        self.generator = torch.Generator().manual_seed(0)
        return super().train(mode)

    def noise(self, lms):
        """z ~ N(0, I), (B, 10): in training by torch's global generator, which checkpoints keep; in eval mode by one
        that starts from seed 0 at each eval(), so that the same calls give the same images.
        """
        if self.training:
            return torch.randn(len(lms), NOISE, device=lms.device)
        return torch.randn(len(lms), NOISE, generator=self.generator).to(lms.device)

    def forward(self, lms, label=None):
        image = self.generate(lms)
        return image, image, self.residue.classifier(image)


def mismatch(label):
    """Labels (B,) -> index (B,) of a random row of another class in the batch [choice], valid (B,) if there is one."""
    other = label[:, None] != label                                                 # (B, B)
    valid = other.any(dim=1)
    return torch.multinomial((other | ~valid[:, None]).float(), 1).squeeze(1), valid


# -------------------------------------------------------------------------------------------- S2IC

class AudioClassifier(nn.Module):
    """S2IC's Figure 4: LMS (B, C_a, S, S) -> logits (B, K). Stride 2, dropout 0.7 and 0.8 as shares kept [choice]."""

    def __init__(self, num_classes, size=64, lms_channels=1):
        super().__init__()
        layers = []
        for before, after in ((lms_channels, 4), (4, 8), (8, 16), (16, 16)):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.ReLU()]
        self.convolutions = nn.Sequential(*layers, nn.Flatten())
        self.hidden = nn.Sequential(nn.Linear(16 * (size // 16) ** 2, 1024), nn.ReLU(), nn.Dropout(0.3),
                                    nn.Linear(1024, FEATURES), nn.ReLU(), nn.Dropout(0.2))
        self.output = nn.Linear(FEATURES, num_classes)

    def features(self, lms):
        return self.hidden(self.convolutions(lms))                                  # (B, 128)

    def forward(self, lms):
        if self.training:       # a half second may begin at any moment: by up to a quarter, in a circle [choice]
            lms = lms.roll(int(torch.randint(-lms.shape[3] // 4, lms.shape[3] // 4 + 1, ())), dims=3)
        return self.output(self.features(lms)).float()                              # (B, K)

    def parameter_groups(self):
        """For an optimiser: L2 on the three linear layers alone [paper], of 1e-4 [choice]."""
        linear = [*self.hidden.parameters(), *self.output.parameters()]
        return [dict(params=list(self.convolutions.parameters())), dict(params=linear, weight_decay=1e-4)]


def phi():
    """Audio features (B, 128) -> (B, 64, 1, 1). G and D have one each, trained with its network [code]."""
    return nn.Sequential(nn.Linear(FEATURES, PHI), nn.LeakyReLU(0.2), nn.Unflatten(1, (PHI, 1, 1)))


class S2IC(Baseline):
    """S2I-C. `audio`, untrained where it is not given, is frozen and stays in eval mode [choice]."""

    def __init__(self, num_classes, size=64, base=64, lms_channels=1, classifier=None, audio=None, init_std=0.02):
        super().__init__()
        self.phi, self.G = phi(), Decoder(PHI, 3, size, base, vector=True)
        init_weights(self, init_std)
        self.audio = (audio or AudioClassifier(num_classes, size, lms_channels)).requires_grad_(False)
        self.residue = ResidueModule(classifier or Classifier(num_classes, pretrained=False))
        self.train()

    def train(self, mode=True):
        super().train(mode)
        self.audio.eval()
        return self

    def generate(self, lms, z=None):
        """LMS (B, C_a, S, S) and z (B, 10), drawn where it is not given -> images (B, 3, S, S)."""
        return self.G(self.phi(self.audio.features(lms)), self.noise(lms) if z is None else z)

    def generator_terms(self, D, lms, image):
        """L_G, L_Cons (it has none: 0) and the fakes."""
        fake = self.generate(lms)
        loss = generator_loss(D(fake, self.audio.features(lms)), saturating=False)      # - E log S_f
        return loss, torch.zeros_like(loss), (fake,)

    def discriminator_term(self, D, lms, image, fakes, index, valid):
        """L_D of three batches of pairs; index and valid are mismatch()'s."""
        features = self.audio.features(lms)
        return s2ic_discriminator_loss(*(D(x, features) for x in (image, image[index], *fakes)), valid)


class S2ICDiscriminator(PairDiscriminator):
    """(image, the audio classifier's features (B, 128)) -> logits (B,)."""

    def __init__(self, size=64, base=64, lms_channels=1, init_std=0.02):
        super().__init__(phi(), PHI, size, base, init_std)


def s2ic_discriminator_loss(real, wrong, fake, valid):
    """- E log S_r - (E log(1 - S_w) + E log(1 - S_f)) / 2, from logits (B,); S_w over the valid rows."""
    wrong = (F.softplus(wrong) * valid).sum() / valid.sum().clamp(min=1)
    return F.softplus(-real).mean() + (wrong + F.softplus(fake).mean()) / 2


# ------------------------------------------------------------------------------------------ CMCGAN

class CMCGAN(Baseline):
    """Two encoders and two decoders in four cycles. The result is F_Image [choice]: each network comes once on its way,
    so that the running statistics of BatchNorm are that way's own, while FR_Image passes E_A twice.
    """

    def __init__(self, num_classes, size=64, base=64, lms_channels=1, classifier=None, init_std=0.02):
        super().__init__()
        width = widths(size, base)[-1]
        self.E_A, self.E_V = encoder(lms_channels, size, base), encoder(3, size, base)
        self.D_A, self.D_V = Decoder(width, lms_channels, size, base), Decoder(width, 3, size, base)
        init_weights(self, init_std)
        self.residue = ResidueModule(classifier or Classifier(num_classes, pretrained=False))

    def generate(self, lms, z=None):
        """F_Image: LMS (B, C_a, S, S) and z (B, 10), drawn where it is not given -> images (B, 3, S, S)."""
        return self.D_V(self.E_A(lms), self.noise(lms) if z is None else z)

    def cycles(self, lms, image, z=None):
        """All eight outputs by the paper's names: F by the other side's encoder, R by its own, then the second hop."""
        z = self.noise(lms) if z is None else z                                     # one for all [choice]
        sound, scene = self.E_A(lms), self.E_V(image)                               # (B, width, 4, 4)
        x = dict(F_Image=self.D_V(sound, z), F_Sound=self.D_A(scene, z),
                 R_Sound=self.D_A(sound, z), R_Image=self.D_V(scene, z))
        return dict(x, RF_Sound=self.D_A(self.E_V(x['F_Image']), z), RF_Image=self.D_V(self.E_A(x['F_Sound']), z),
                    FR_Image=self.D_V(self.E_A(x['R_Sound']), z), FR_Sound=self.D_A(self.E_V(x['R_Image']), z))

    def generator_terms(self, D, lms, image):
        """L_G = - E log S_rvfa - E log S_fvra, L_Cons and the fakes."""
        x = self.cycles(lms, image)
        loss = generator_loss(D(image, x['F_Sound']), D(x['F_Image'], lms), saturating=False)
        return loss, consistency_loss(lms, image, x), (x['F_Image'], x['F_Sound'])

    def discriminator_term(self, D, lms, image, fakes, index, valid):
        """L_D of five batches of pairs; one draw of mismatch() makes both kinds of wrong pairs [choice]."""
        pairs = (image, lms), (image, lms[index]), (image[index], lms), (image, fakes[1]), (fakes[0], lms)
        return cmcgan_discriminator_loss(*(D(*pair) for pair in pairs), valid)


class CMCGANDiscriminator(PairDiscriminator):
    """(image, LMS (B, C_a, S, S)) -> logits (B,), by encoders as E_V and E_A are, but its own [choice]. Spectral
    normalisation [choice] keeps it from knowing each pair of little data, when F_Image would learn no more.
    """

    def __init__(self, size=64, base=64, lms_channels=1, init_std=0.02):
        super().__init__(encoder(lms_channels, size, base), widths(size, base)[-1], size, base, init_std)
        spectral_norm = nn.utils.parametrizations.spectral_norm
        self.apply(lambda module: spectral_norm(module) if isinstance(module, nn.Conv2d) else None)


def cmcgan_discriminator_loss(rvra, rvwa, wvra, rvfa, fvra, valid):
    """- L_Dw - L_Df of Eq. (1) to (3), from the logits (B,) of five batches of pairs: r real, w wrong, f generated,
    v image, a sound. The real pair counts twice, as the sum is written; the wrong ones over the valid rows.
    """
    wrong = ((F.softplus(rvwa) + F.softplus(wvra)) * valid).sum() / valid.sum().clamp(min=1)
    return 2 * F.softplus(-rvra).mean() + (wrong + F.softplus(rvfa).mean() + F.softplus(fvra).mean()) / 2


def consistency_loss(lms, image, x):
    """L_Cons of the outputs `x` of cycles(); each L1 is the mean over pixels, channels and batch."""
    return l1_loss(lms, x['RF_Sound'], x['FR_Sound']) + l1_loss(image, x['RF_Image'], x['FR_Image'])


# ----------------------------------------------------------------------------------- one step of each

class GeneratorStep(nn.Module):
    """A batch -> (0, L_G, L_Cons) (1, 3), times its size so that parts add up, and the fakes for D, detached."""

    def __init__(self, model, D, dtype=torch.float32):
        super().__init__()
        self.model, self.D, self.dtype = model, D, dtype

    def forward(self, lms, image, label):       # autocast is entered here: DataParallel's threads do not inherit it
        with torch.autocast(lms.device.type, self.dtype, enabled=self.dtype != torch.float32):
            *terms, fakes = self.model.generator_terms(self.D, lms, image)
        return F.pad(torch.stack(terms)[None], (1, 0)) * len(label), tuple(fake.detach() for fake in fakes)


class DiscriminatorStep(GeneratorStep):
    """A batch and the G step's fakes -> (L_D (1, 1), times its size,)."""

    def forward(self, lms, image, label, fakes):
        with torch.autocast(lms.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.model.discriminator_term(self.D, lms, image, fakes, *mismatch(label))
        return (loss[None, None] * len(label),)


BASELINES = {'S2IC': (S2IC, S2ICDiscriminator), 'CMCGAN': (CMCGAN, CMCGANDiscriminator)}
