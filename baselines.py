"""S2IC (Chen et al. 2017, arXiv 1704.08292) and CMCGAN (Hao et al. 2018, arXiv 1711.08102): the
other rows of Table 2.

    S2IC    A --audio classifier (frozen)--> 128 features --phi--> 64, with z --G--> image
            GAN-CLS: a discriminator that also sees wrong pairs; no L1
    CMCGAN  E_A, E_V, D_A, D_V between sounds and images, one discriminator for pairs
            cycles and L1

Neither has public code. A tag says where a line comes from: [paper] theirs, [code] GAN-CLS, whose
loss S2IC uses, [choice] ours; docs/baselines.md lists them all. Both models are called as CARGAN
is, and generate(lms) is the image alone. Neither sees the label, which serves S2IC's audio
classifier and the wrong pairs. Conventions are cargan.py's.
"""
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from cargan import (Classifier, ResidueModule, concatenate_label, generator_loss, init_weights,
                    l1_loss, widths)

NOISE = 10              # numbers in z [paper, S2IC]
FEATURES = 128          # of a sound, by the audio classifier [paper]
PHI = 64                # of a sound, by phi [paper]

EPOCHS = {
    'S2IC': 35,             # where it peaks [paper]
    'CMCGAN': 200,          # [choice]
}
SETTINGS = {                # GAN-CLS's [code]
    'lr': 2e-4,
    'betas': [0.5, 0.999],
    'init_std': 0.02,
    'dropout': 0.0,
    'saturating': False,
    'detach_residue': False,
    'lambdas': [0, 1, 1, 1, 1],     # L_C, L_G, L_Cons; the last two weigh nothing here
}


# ------------------------------------------------------------------------------------ common parts

def encoder(channels, size, base):
    """(B, channels, S, S) -> (B, widths(size, base)[-3], 4, 4), by 4x4 convolutions of stride 2
    [code].
    """
    width = widths(size, base)[:-2]                                  # at S/2, S/4, ..., 4
    layers = [nn.Conv2d(channels, base, 4, 2, 1), nn.LeakyReLU(0.2)]
    for before, after in pairwise(width):
        layers += [
            nn.Conv2d(before, after, 4, 2, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.LeakyReLU(0.2),
        ]
    return nn.Sequential(*layers)


class Decoder(nn.Module):
    """The mirror image of encoder(): features (B, channels, 4, 4), z (B, 10) appended -> images
    (B, out_channels, S, S) in [-1, 1]. With `vector` the features are (B, channels, 1, 1), and one
    up-convolution more leads to 4x4 [code].
    """

    def __init__(self, channels, out_channels, size, base, vector=False):
        super().__init__()
        width = widths(size, base)[-3::-1]                           # at 4, 8, ..., S/2
        padding = 0                                                  # 1x1 -> 4x4
        if not vector:
            width = width[1:]
            padding = 1                                              # 4x4 -> 8x8
        channels += NOISE
        layers = []
        for after in width:
            layers += [
                nn.ConvTranspose2d(channels, after, 4, 2, padding, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            ]
            channels = after
            padding = 1
        layers.append(nn.ConvTranspose2d(channels, out_channels, 4, 2, 1))
        self.layers = nn.Sequential(*layers)

    def forward(self, features, z):
        return self.layers(concatenate_label(features, z)).float().tanh()


class PairDiscriminator(nn.Module):
    """(image (B, 3, S, S), sound) -> logits (B,).

    `sound` is a network that returns (B, channels, 4, 4) or 1x1. Without the hidden layer of `head`
    D would be f(image) + g(sound), blind to what does not match [code].
    """

    def __init__(self, sound, channels, size, base, init_std):
        super().__init__()
        width = widths(size, base)[-3]                               # of an encoder's features
        self.image = encoder(3, size, base)
        self.sound = sound
        hidden = nn.Conv2d(width + channels, width, 1, bias=False)
        output = nn.Conv2d(width, 1, 4)
        self.head = nn.Sequential(hidden, nn.BatchNorm2d(width), nn.LeakyReLU(0.2), output)
        init_weights(self, init_std)

    def forward(self, image, sound):
        sound = self.sound(sound).expand(-1, -1, 4, 4)               # (B, channels, 4, 4)
        pair = torch.cat([self.image(image), sound], dim=1)          # (B, width + channels, 4, 4)
        return self.head(pair).float().flatten()                     # (B,)


class Baseline(nn.Module):
    """Called as CARGAN is: forward(lms (B, C_a, S, S), label) -> (image, image, C(image)), one
    image twice, as model D's; the label is not used. Raises as widths() does.
    """

    def train(self, mode=True):
        self.generator = torch.Generator().manual_seed(0)
        return super().train(mode)

    def noise(self, lms):
        """z ~ N(0, I), (B, 10): in training by torch's global generator, which checkpoints keep; in
        eval mode by one that starts anew at each eval(): the same calls give the same images.
        """
        shape = len(lms), NOISE
        if self.training:
            return torch.randn(shape, device=lms.device)
        return torch.randn(shape, generator=self.generator).to(lms.device)

    def forward(self, lms, label):
        image = self.generate(lms)
        return image, image, self.residue.classifier(image)


def mismatch(label):
    """Labels (B,) -> index (B,) of a random row of another class in the batch [choice]; valid (),
    whether the batch has another class.
    """
    other = label[:, None] != label                                  # (B, B)
    # The row of the largest random number: torch.multinomial would wait for the GPU.
    score = other + torch.rand_like(other, dtype=torch.float32)      # other classes from 1 on
    return score.argmax(dim=1), other.any()


# -------------------------------------------------------------------------------------------- S2IC

class AudioClassifier(nn.Module):
    """S2IC's Figure 4: LMS (B, C_a, S, S) -> logits (B, K).

    Stride 2; dropout "0.7" and "0.8" are read as shares that are kept [choice].
    """

    def __init__(self, num_classes, size=64, lms_channels=1):
        super().__init__()
        width = [lms_channels, 4, 8, 16, 16]
        layers = []
        for before, after in pairwise(width):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.ReLU()]
        self.convolutions = nn.Sequential(*layers, nn.Flatten())
        hidden = [nn.Linear(16 * (size // 16) ** 2, 1024), nn.ReLU(), nn.Dropout(0.3)]
        hidden += [nn.Linear(1024, FEATURES), nn.ReLU(), nn.Dropout(0.2)]
        self.hidden = nn.Sequential(*hidden)
        self.output = nn.Linear(FEATURES, num_classes)

    def features(self, lms):
        return self.hidden(self.convolutions(lms))                   # (B, 128)

    def forward(self, lms):
        if self.training:       # a half second may begin at any moment: turned in a circle [choice]
            quarter = lms.shape[3] // 4
            shift = torch.randint(-quarter, quarter + 1, ())
            lms = lms.roll(int(shift), dims=3)
        return self.output(self.features(lms)).float()               # (B, K)

    def parameter_groups(self):
        """For an optimiser: L2 on the three linear layers alone [paper], of 1e-4 [choice]."""
        linear = [*self.hidden.parameters(), *self.output.parameters()]
        return [dict(params=list(self.convolutions.parameters())),
                dict(params=linear, weight_decay=1e-4)]


def phi():
    """Audio features (B, 128) -> (B, 64, 1, 1). G and D have one each, trained with it [code]."""
    return nn.Sequential(
        nn.Linear(FEATURES, PHI),
        nn.LeakyReLU(0.2),
        nn.Unflatten(1, (PHI, 1, 1)),
    )


class S2IC(Baseline):
    """S2I-C. `audio`, untrained where it is not given, is frozen and stays in eval mode [choice].
    """

    def __init__(self, num_classes, size=64, base=64, lms_channels=1, classifier=None, audio=None,
                 init_std=0.02):
        super().__init__()
        self.phi = phi()
        self.G = Decoder(PHI, 3, size, base, vector=True)
        init_weights(self, init_std)
        audio = audio or AudioClassifier(num_classes, size, lms_channels)
        self.audio = audio.requires_grad_(False).eval()
        self.residue = ResidueModule(classifier or Classifier(num_classes, pretrained=False))

    def train(self, mode=True):
        super().train(mode)
        self.audio.eval()
        return self

    def generate(self, lms):
        """LMS (B, C_a, S, S) -> images (B, 3, S, S)."""
        features = self.phi(self.audio.features(lms))                # (B, 64, 1, 1)
        return self.G(features, self.noise(lms))

    def generator_terms(self, D, lms, image):
        """L_G = - E log S_f, L_Cons (it has none: 0) and the fakes."""
        fake = self.generate(lms)
        logits = D(fake, self.audio.features(lms))                   # (B,)
        L_G = generator_loss(logits, saturating=False)
        return L_G, torch.zeros_like(L_G), (fake,)

    def discriminator_term(self, D, lms, image, fakes, index, valid):
        """L_D = - E log S_r - (E log(1 - S_w) + E log(1 - S_f)) / 2, of three batches of pairs: r
        real, w wrong, f generated; index and valid are mismatch()'s.
        """
        features = self.audio.features(lms)                          # (B, 128)
        real = D(image, features)                                    # logits (B,), as the others
        wrong = D(image[index], features)
        fake = D(fakes[0], features)
        L_w = valid * F.softplus(wrong).mean()
        return F.softplus(-real).mean() + (L_w + F.softplus(fake).mean()) / 2


class S2ICDiscriminator(PairDiscriminator):
    """(image, the audio classifier's features (B, 128)) -> logits (B,)."""

    def __init__(self, size=64, base=64, lms_channels=1, init_std=0.02):
        super().__init__(phi(), PHI, size, base, init_std)


# ------------------------------------------------------------------------------------------ CMCGAN

class CMCGAN(Baseline):
    """Two encoders and two decoders in four cycles.

    The result is F_Image [choice]: each network comes once on its way, so that the running
    statistics of BatchNorm are that way's own, while FR_Image passes E_A twice.
    """

    def __init__(self, num_classes, size=64, base=64, lms_channels=1, classifier=None,
                 init_std=0.02):
        super().__init__()
        width = widths(size, base)[-3]                               # of an encoder's features
        self.E_A = encoder(lms_channels, size, base)
        self.E_V = encoder(3, size, base)
        self.D_A = Decoder(width, lms_channels, size, base)
        self.D_V = Decoder(width, 3, size, base)
        init_weights(self, init_std)
        self.residue = ResidueModule(classifier or Classifier(num_classes, pretrained=False))

    def generate(self, lms):
        """F_Image: LMS (B, C_a, S, S) -> images (B, 3, S, S)."""
        return self.D_V(self.E_A(lms), self.noise(lms))

    def cycles(self, lms, image):
        """All eight outputs by the paper's names: F by the other side's encoder, R by its own, then
        the second hop.
        """
        z = self.noise(lms)                                          # one for all [choice]
        sound, scene = self.E_A(lms), self.E_V(image)                # (B, width, 4, 4)
        x = {}
        x['F_Image'] = self.D_V(sound, z)
        x['F_Sound'] = self.D_A(scene, z)
        x['R_Sound'] = self.D_A(sound, z)
        x['R_Image'] = self.D_V(scene, z)
        x['RF_Sound'] = self.D_A(self.E_V(x['F_Image']), z)
        x['RF_Image'] = self.D_V(self.E_A(x['F_Sound']), z)
        x['FR_Image'] = self.D_V(self.E_A(x['R_Sound']), z)
        x['FR_Sound'] = self.D_A(self.E_V(x['R_Image']), z)
        return x

    def generator_terms(self, D, lms, image):
        """L_G = - E log S_rvfa - E log S_fvra, L_Cons (each L1 a mean) and the fakes."""
        x = self.cycles(lms, image)
        rvfa = D(image, x['F_Sound'])
        fvra = D(x['F_Image'], lms)
        L_G = generator_loss(rvfa, fvra, saturating=False)
        L_sounds = l1_loss(lms, x['RF_Sound'], x['FR_Sound'])
        L_images = l1_loss(image, x['RF_Image'], x['FR_Image'])
        return L_G, L_sounds + L_images, (x['F_Image'], x['F_Sound'])

    def discriminator_term(self, D, lms, image, fakes, index, valid):
        """L_D = - L_Dw - L_Df of Eq. (1) to (3), of five batches of pairs: r real, w wrong, f
        generated, v image, a sound. The real pair counts twice, as the sum is written; one draw of
        mismatch() makes both kinds of wrong pairs [choice].
        """
        rvra = D(image, lms)                                         # logits (B,), as the others
        rvwa = D(image, lms[index])
        wvra = D(image[index], lms)
        rvfa = D(image, fakes[1])
        fvra = D(fakes[0], lms)
        L_w = valid * (F.softplus(rvwa) + F.softplus(wvra)).mean()
        L_wf = L_w + F.softplus(rvfa).mean() + F.softplus(fvra).mean()
        return 2 * F.softplus(-rvra).mean() + L_wf / 2


class CMCGANDiscriminator(PairDiscriminator):
    """(image, LMS (B, C_a, S, S)) -> logits (B,), by encoders as E_V and E_A are, but its own
    [choice]. Spectral normalisation [choice] keeps it from knowing each pair of little data, when
    F_Image would learn no more.
    """

    def __init__(self, size=64, base=64, lms_channels=1, init_std=0.02):
        sound = encoder(lms_channels, size, base)
        super().__init__(sound, widths(size, base)[-3], size, base, init_std)
        for module in list(self.modules()):
            if isinstance(module, nn.Conv2d):
                nn.utils.parametrizations.spectral_norm(module)


# -------------------------------------------------------------------------------- one step of each

class GeneratorStep(nn.Module):
    """A batch -> (0, L_G, L_Cons) (1, 3), times its size so that parts add up, and the fakes for D,
    detached.
    """

    def __init__(self, model, D, dtype=torch.float32):
        super().__init__()
        self.model = model
        self.D = D
        self.autocast = partial(torch.autocast, dtype=dtype, enabled=dtype != torch.float32)

    def forward(self, lms, image, label):
        with self.autocast(lms.device.type):    # DataParallel's threads do not inherit it
            L_G, L_Cons, fakes = self.model.generator_terms(self.D, lms, image)
        terms = torch.stack([torch.zeros_like(L_G), L_G, L_Cons])
        return terms[None] * len(label), tuple(fake.detach() for fake in fakes)


class DiscriminatorStep(GeneratorStep):
    """A batch and the G step's fakes -> L_D (1,), times the batch's size."""

    def forward(self, lms, image, label, fakes):
        with self.autocast(lms.device.type):
            loss = self.model.discriminator_term(self.D, lms, image, fakes, *mismatch(label))
        return loss[None] * len(label)


BASELINES = {
    'S2IC': (S2IC, S2ICDiscriminator),
    'CMCGAN': (CMCGAN, CMCGANDiscriminator),
}
