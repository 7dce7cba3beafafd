"""What a run of CAR-GAN has learned: the paper's Table 2, FID and IS, and pictures.

    python evaluate.py                     # the newest run below runs/
    python evaluate.py runs/paper          # any run: a folder that train.py made
    python evaluate.py --audio clip.wav --label violin     # the picture for a recording of your own

Every clip of both splits goes through G1 and G2; the run's own classifier C says what the pictures
show. Writes metrics.json and grid.png (a row an instrument: LMS, I', I'', truth) into the run.
"""
import argparse
import json
import sys
from functools import partial
from math import ceil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from cargan import CARGAN
from preprocess import (InputError, Progress, default_cache, demo_data, log_mel_spectrogram, network_lms, open_dataset,
                        read_wav, reason, run_command, written_whole)

INCEPTION_URL = ('https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/'
                 'pt_inception-2015-12-05-6726825d.pth')
STAGES = (('coarse', "I'  coarse"), ('fine', "I'' fine"), ('real', 'real frames'))
PAPER_TABLE_2 = {'train': {'fine': 0.9954}, 'validation': {'fine': 0.9033, 'real': 0.9956}}


# ------------------------------------------------------------------------------------- a run, loaded

def load_file(path, *keys):
    """Load the dict in a .pt file to the CPU without running anything in it. Raises InputError, naming
    the file, where it cannot be read or lacks one of the keys.
    """
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:      # torch answers a broken file with many kinds
        raise InputError(f'{path}: not a file of weights that can be read ({reason(error)})') from error
    missing = [key for key in keys if not isinstance(state, dict) or key not in state]
    if missing:
        raise InputError(f'{path}: not a file that train.py wrote (no {missing[0]!r} in it)')
    return state


def load_state(module, state, path):
    """Copy a state_dict into a module. Raises InputError where it is another network's."""
    try:
        module.load_state_dict(state)
    except Exception as error:
        raise InputError(f'{path}: weights of another network ({reason(error)})') from error


def load_config(run):
    """The settings of a run, as train.py wrote them. Raises InputError where `run` is none."""
    path = Path(run) / 'config.json'
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f'{run}: not a run of train.py (config.json: {reason(error)})') from error


def load_run(run, device='cpu'):
    """A run's settings and its CARGAN in eval mode: (config, model)."""
    config, path = load_config(run), Path(run) / 'checkpoint.pt'
    model = CARGAN(len(config['classes']), config['size'], config['base'], config['variant'],
                   config['lms_channels'])
    load_state(model, load_file(path, 'model')['model'], path)
    return config, model.to(device).eval()


def open_run_data(config, data=None, cache=None, workers=None):
    """The dataset that a run was trained on, or `data` with the same classes."""
    data = data or config['data'] or demo_data(config['size'], cache or config['cache'])
    dataset = open_dataset(data, config['size'], cache or config['cache'], workers=workers)
    if dataset.classes != config['classes'] or dataset.lms_channels != config['lms_channels']:
        raise InputError(f'{data}: its classes or its kind of LMS are not those the run was trained on')
    return dataset


def newest_run(folder='runs'):
    """The run below `folder` whose checkpoint is the newest."""
    checkpoints = sorted(Path(folder).glob('*/checkpoint.pt'), key=lambda path: path.stat().st_mtime)
    if not checkpoints:
        raise InputError(f'{folder}/: no run in it; train one with: python train.py')
    return checkpoints[-1].parent


def choose_device(name=None):
    """The device of this name; by default the first GPU, else the CPU. Raises InputError."""
    try:
        device = torch.device(name or ('cuda' if torch.cuda.is_available() else 'cpu'))
        torch.empty(0, device=device)
        return device
    except Exception as error:
        raise InputError(f'--device {name}: not to be had here ({reason(error)})') from error


# --------------------------------------------------------------------------- FID's Inception network

average_pool = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
max_pool = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
halving_pool = partial(F.max_pool2d, kernel_size=3, stride=2)


class ConvBN(nn.Module):
    """Convolution without bias, batch normalisation, ReLU."""

    def __init__(self, c_in, c_out, kernel_size, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel_size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=0.001)

    def forward(self, x):
        return self.bn(self.conv(x)).relu_()


class Mixed(nn.Module):
    """A block of Inception: branches side by side, their channels concatenated.

    A branch is a chain of convolutions (width, kernel); one with two kernels is a fork, which only
    ends a chain. Their names, those of the state_dict, are the branch's with _1, _2, ... where there
    are several, and with a and b at a fork. `branch_pool` starts with `pool`. A stride is that of the
    last convolution of each branch. Maps (B, c_in, H, W) to (B, C, H, W), at stride 2 to about half.
    """

    def __init__(self, c_in, pool, stride=1, **branches):
        super().__init__()
        self.pool, self.branches = pool, {}
        for branch, chain in branches.items():
            self.branches[branch], width = [], c_in
            for i, (c_out, *kernels) in enumerate(chain, 1):
                name = f'{branch}_{i}' if len(chain) > 1 else branch
                names = [name] if len(kernels) == 1 else [name + 'a', name + 'b']
                step = stride if i == len(chain) else 1
                for name, kernel in zip(names, kernels):
                    self.add_module(name, ConvBN(width, c_out, kernel, step, 'same' if step == 1 else 0))
                self.branches[branch].append(names)
                width = c_out

    def forward(self, x):                                            # (B, c_in, H, W)
        outputs = []
        for branch, chain in self.branches.items():
            y = [self.pool(x) if branch == 'branch_pool' else x]
            for names in chain:
                y = [self.get_submodule(name)(y[0]) for name in names]
            outputs += y                                             # two of them after a fork
        return torch.cat(outputs, dim=1)                             # (B, C, H, W)


# The blocks that recur, on maps of 35x35, 17x17 and 8x8.

def mixed_5(c_in, pool_width):
    return Mixed(c_in, average_pool, branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)],
                 branch3x3dbl=[(64, 1), (96, 3), (96, 3)], branch_pool=[(pool_width, 1)])


def mixed_6(width):
    return Mixed(768, average_pool, branch1x1=[(192, 1)],
                 branch7x7=[(width, 1), (width, (1, 7)), (192, (7, 1))],
                 branch7x7dbl=[(width, 1), (width, (7, 1)), (width, (1, 7)), (width, (7, 1)), (192, (1, 7))],
                 branch_pool=[(192, 1)])


def mixed_7(c_in, pool):
    return Mixed(c_in, pool, branch1x1=[(320, 1)], branch3x3=[(384, 1), (384, (1, 3), (3, 1))],
                 branch3x3dbl=[(448, 1), (384, 3), (384, (1, 3), (3, 1))], branch_pool=[(192, 1)])


class InceptionV3(nn.Module):
    """Inception-v3 (Szegedy et al. 2015) as in the TensorFlow graph of 2015-12-05 that FID is defined on.

    Maps images (B, 3, H, W) in [0, 1], RGB, to (features (B, 2048), logits (B, 1008)). It differs from
    the published network in that average pooling does not count the padding, and in that Mixed_7c
    pools the maximum. The names are those of pytorch-fid's state_dict.
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvBN(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvBN(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvBN(32, 64, 3, padding='same')
        self.maxpool1 = nn.MaxPool2d(3, stride=2)
        self.Conv2d_3b_1x1 = ConvBN(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvBN(80, 192, 3)
        self.maxpool2 = nn.MaxPool2d(3, stride=2)                    # (B, 192, 35, 35)
        self.Mixed_5b = mixed_5(192, 32)
        self.Mixed_5c = mixed_5(256, 64)
        self.Mixed_5d = mixed_5(288, 64)
        self.Mixed_6a = Mixed(288, halving_pool, stride=2, branch3x3=[(384, 3)],
                              branch3x3dbl=[(64, 1), (96, 3), (96, 3)], branch_pool=[])
        self.Mixed_6b = mixed_6(128)                                 # (B, 768, 17, 17)
        self.Mixed_6c = mixed_6(160)
        self.Mixed_6d = mixed_6(160)
        self.Mixed_6e = mixed_6(192)
        self.Mixed_7a = Mixed(768, halving_pool, stride=2, branch3x3=[(192, 1), (320, 3)],
                              branch7x7x3=[(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)], branch_pool=[])
        self.Mixed_7b = mixed_7(1280, average_pool)                  # (B, 2048, 8, 8)
        self.Mixed_7c = mixed_7(2048, max_pool)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, images):                                       # (B, 3, H, W) in [0, 1]
        x = F.interpolate(images, size=(299, 299), mode='bilinear', align_corners=False)
        x = 2 * x - 1                                                # (B, 3, 299, 299)
        *layers, fc = self.children()
        for layer in layers:
            x = layer(x)
        features = x.mean(dim=(2, 3))                                # (B, 2048)
        return features, fc(features)                                # (B, 2048), (B, 1008)


def inception(path=None):
    """FID's Inception network in eval mode, frozen, on the CPU.

    Its weights are those in the file `path`, else in torch.hub's cache, else downloaded there. Raises
    InputError, naming the file, where they cannot be had or are another network's.
    """
    cached = Path(torch.hub.get_dir(), 'checkpoints', Path(INCEPTION_URL).name)
    name = path or (cached if cached.exists() else cached.name)
    remedy = f'it is at {INCEPTION_URL}: fetch it and give it with --inception PATH'
    try:
        state = (torch.load(path, map_location='cpu', weights_only=True) if path else
                 torch.hub.load_state_dict_from_url(INCEPTION_URL, map_location='cpu', check_hash=True,
                                                    weights_only=True))
    except Exception as error:      # no file, no network, a broken file: torch answers with many kinds
        raise InputError(f"{name}: FID's Inception is not to be had ({reason(error)}); {remedy}") from error
    network = InceptionV3()
    try:
        network.load_state_dict(state)
    except Exception as error:
        raise InputError(f"{name}: weights of another network than FID's Inception; {remedy}") from error
    return network.eval().requires_grad_(False)


# ------------------------------------------------------------------------------- distance and score

class Moments:
    """The mean and covariance of features that come in batches, in float64 on the CPU.

    Kept are the rows [1, x] themselves while they are few, else the triangle R of their QR
    decomposition: it has their inner products, R^T R = sum [1, x]^T [1, x], so that a set of any size
    takes O(d^2) memory. No covariance is formed, hence no digits are lost by squaring.
    """

    def __init__(self, features=None):
        self.count, self.rows = 0, None
        if features is not None:
            self.update(features)

    def update(self, features):
        """Add features (B, d), array or tensor. Raises ValueError where they are not finite or not of one d."""
        features = torch.as_tensor(features).detach()
        if features.ndim != 2 or self.rows is not None and 1 + features.shape[1] != self.rows.shape[1]:
            raise ValueError(f'features of shape {tuple(features.shape)}, not (rows, '
                             f'{"d" if self.rows is None else self.rows.shape[1] - 1})')
        if not features.isfinite().all():
            raise ValueError('features that are not finite numbers')
        for batch in features.split(features.shape[1] + 1):          # a large set need not be copied whole
            batch = F.pad(batch.cpu().double(), (1, 0), value=1.0)   # (B, 1 + d)
            self.rows = batch if self.rows is None else torch.cat([self.rows, batch])
            if len(self.rows) > 2 * self.rows.shape[1]:
                self.rows = torch.linalg.qr(self.rows, mode='r').R   # (1 + d, 1 + d)
        self.count += len(features)

    def mean_and_factor(self):
        """The mean (d,) and a factor A (k, d), k <= d, of the covariance A^T A (divisor n - 1).

        The first row of R is +-sqrt(n) [1, mean]; the others are what remains without the mean.
        Raises ValueError for fewer than two rows.
        """
        if self.count < 2:
            raise ValueError(f'{self.count} rows of features, a covariance needs 2')
        R = torch.linalg.qr(self.rows, mode='r').R                   # (min(n, 1 + d), 1 + d)
        return R[0, 1:] / R[0, 0], R[1:, 1:] / (self.count - 1) ** 0.5


def frechet_distance(features_a, features_b):
    """The Fréchet distance of two Gaussians, FID for Inception's features (Heusel et al. 2017):

        |mu_a - mu_b|^2 + tr S_a + tr S_b - 2 tr sqrt(S_a S_b)

    of features (n, d) and (m, d), arrays or tensors, or of two Moments. With S_a = A^T A and
    S_b = B^T B, tr sqrt(S_a S_b) is the sum of the singular values of A B^T: there is no matrix root
    to be lost in complex numbers where n <= d. Raises ValueError for fewer than two rows, two
    different d, and values that are not finite.
    """
    (mu_a, A), (mu_b, B) = ((x if isinstance(x, Moments) else Moments(x)).mean_and_factor()
                            for x in (features_a, features_b))
    if len(mu_a) != len(mu_b):
        raise ValueError(f'features of {len(mu_a)} and of {len(mu_b)} dimensions')
    overlap = torch.linalg.svdvals(A @ B.T).sum()
    distance = (mu_a - mu_b).square().sum() + A.square().sum() + B.square().sum() - 2 * overlap
    return max(0.0, distance.item())                                 # of equals: 0 but for rounding


def inception_score(probabilities, splits=10):
    """The Inception score (Salimans et al. 2016), exp(E KL(p(y|x) || p(y))), as (mean, std) over splits.

    `probabilities` (n, K), array or tensor, are p(y|x) of n images; the splits follow one another and
    are of nearly equal size. Raises ValueError for fewer rows than splits, or rows that are no
    distributions.
    """
    p = torch.as_tensor(probabilities).detach().cpu().double()
    if splits < 1 or p.ndim != 2 or len(p) < splits:
        raise ValueError(f'probabilities of shape {tuple(p.shape)} cannot be split in {splits}')
    if not (p.min() >= 0 and (p.sum(dim=1) - 1).abs().max() < 1e-3):
        raise ValueError('rows that are not probabilities: negative, or of a sum that is not 1')
    scores = []
    for part in p.tensor_split(splits):
        marginal = part.mean(dim=0)                                  # p(y) (K,)
        # E KL is the entropy of y less that of y given x: no quotient of two vanishing probabilities
        scores.append((torch.xlogy(part, part).sum(dim=1).mean() - torch.xlogy(marginal, marginal).sum()).exp())
    scores = torch.stack(scores)                                     # (splits,)
    return scores.mean().item(), scores.std(correction=0).item()


# ------------------------------------------------------------------------------------------ figures

class Tally:
    """What is counted of one kind of pictures: those that C recognises, L1, and features in two spaces."""

    def __init__(self):
        self.count, self.correct, self.l1 = 0, 0, 0.0
        self.moments, self.probabilities = {}, {}

    def add(self, label, logits, l1, spaces):
        """Count a batch: labels (B,), C's logits (B, K), its L1 to the truth (None for the truth
        itself), and {space: (features (B, d), logits (B, k))}.
        """
        self.count += len(label)
        self.correct += (logits.argmax(dim=1) == label).sum()
        self.l1 = None if l1 is None else self.l1 + l1 * len(label)
        for space, (features, scores) in spaces.items():
            self.moments.setdefault(space, Moments()).update(features)
            self.probabilities.setdefault(space, []).append(scores.softmax(dim=1).cpu())

    def figures(self, real):
        """The figures of metrics.json; distances are to the tally of the real frames."""
        found = {'accuracy': float(self.correct) / self.count}
        if self is not real:
            found['l1'] = float(self.l1) / self.count
        for space, moments in self.moments.items():
            if self is not real:
                found[f'fid{space}'] = frechet_distance(moments, real.moments[space])
            found[f'is{space}'], found[f'is{space}_std'] = inception_score(
                torch.cat(self.probabilities[space]), splits=min(10, self.count))
        return found


@torch.inference_mode()
def measure(model, split, batch_size=64, device='cpu', name='', network=None):
    """Generate from every clip of a split and compare with its real frames.

    Returns {'coarse': {...}, 'fine': {...}, 'real': {...}}: `accuracy` by C (Table 2); `l1`, the mean
    over pixels and channels in units of [-1, 1]; `fid_classifier` and `is_classifier`, the two
    distances of Table 1 in the space of C's last features and classes; with `network`, FID's
    Inception, also `fid` and `is` (each `is` with its `_std` over 10 splits).
    """
    C, progress = model.residue.classifier, Progress()
    tallies = {kind: Tally() for kind in ('coarse', 'fine', 'real')}
    for lms, image, label in split.batches(batch_size, device, seed=0):     # IS splits them as they come
        coarse, fine, _ = model(lms, label)
        for kind, x in (('coarse', coarse), ('fine', fine), ('real', image)):
            features, logits = classifier_features(C, x)
            spaces = {'_classifier': (features, logits)}
            if network is not None:
                spaces[''] = network((x + 1) / 2)
            tallies[kind].add(label, logits, None if kind == 'real' else F.l1_loss(x, image), spaces)
        done = tallies['real'].count
        progress(f'evaluating {name}: {done} of {len(split)} clips', last=done == len(split))
    return {kind: tally.figures(tallies['real']) for kind, tally in tallies.items()}


def classifier_features(C, image):
    """What enters C's last layer (B, 2048), and the logits (B, K)."""
    kept = []
    with C.resnet.fc.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0])):
        logits = C(image)
    return kept[0], logits


@torch.inference_mode()
def measure_accuracy(classifier, split, batch_size=64, device='cpu'):
    """The share of a split's real frames that a classifier recognises."""
    correct = sum((classifier(image).argmax(dim=1) == label).sum()
                  for _, image, label in split.batches(batch_size, device))
    return float(correct) / len(split)


def table(metrics):
    """The figures of both splits as lines of text, the paper's Table 2 beside them."""
    def cell(split, key, figure):
        value = metrics[split][key].get(figure)
        return f'{"-":>10}' if value is None else f'{value:10.4f}'

    def paper(split, key):
        value = PAPER_TABLE_2[split].get(key)
        return f'{"-":>10}' if value is None else f'{value:10.4f}'

    lines = [f'{"":12}{"train":>20}{"validation":>20}   |{"the paper (Table 2)":>20}',
             f'{"":12}' + f'{"accuracy":>10}{"L1":>10}' * 2 + f'   |{"train":>10}{"test":>10}']
    for key, title in STAGES:
        lines.append(f'{title:12}' + ''.join(cell(split, key, figure) for split in metrics
                                             for figure in ('accuracy', 'l1'))
                     + '   |' + ''.join(paper(split, key) for split in metrics))
    return '\n'.join(lines)


def fidelity_table(metrics):
    """FID and IS of both splits as lines of text, in Inception's space (where measured) and in C's."""
    def cell(figures, name):
        if name not in figures:
            return f'{"-":>16}'
        spread = f' +- {figures[name + "_std"]:.3f}' if name + '_std' in figures else ''
        return f'{figures[name]:.3f}{spread}'.rjust(16)

    names = [name for name in ('fid', 'is', 'fid_classifier', 'is_classifier') if name in metrics['train']['fine']]
    lines = [f'{"":12}' + ''.join(f'{split:>16}' + ' ' * 16 * (len(names) - 1) for split in metrics),
             f'{"":12}' + ''.join(f'{name:>16}' for name in names) * len(metrics)]
    for key, title in STAGES:
        lines.append(f'{title:12}' + ''.join(cell(metrics[split][key], name) for split in metrics for name in names))
    return '\n'.join(line.rstrip() for line in lines)


# ----------------------------------------------------------------------------------------- pictures

def example_clips(dataset):
    """One pair of each class, the first in validation (in train where validation has none).

    Returns [(title, (lms, image, label) batches of one)].
    """
    examples = []
    for label, name in enumerate(dataset.classes):
        for split, where in ((dataset.validation, ''), (dataset.train, ' (train)')):
            found = torch.nonzero(split.labels == label).flatten()
            if len(found):
                examples.append((name + where, split.batch(found[:1])))
                break
    return examples


@torch.inference_mode()
def stage_grid(model, examples, path, device='cpu'):
    """Draw LMS, I', I'' and truth of example clips, a row each, into a picture file.

    The model is evaluated in eval mode and left in the mode it was in.
    """
    training = model.training
    model.eval()
    rows = []
    for name, (lms, image, label) in examples:
        coarse, fine, _ = model(lms.to(device), label.to(device))
        rows.append((name, [lms_picture(lms[0])] + [picture(x[0]) for x in (coarse, fine, image)]))
    model.train(training)
    draw_grid(rows, ['LMS', "I' (coarse)", "I'' (fine)", 'truth'], path)


def picture(image):
    """An image (3, S, S) in [-1, 1] as a PIL picture."""
    pixels = ((image.float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def lms_picture(lms):
    """An LMS (1 or 3, S, S) in [-1, 1] as a PIL picture: low bands at the bottom, bright is loud.
    The dataset's own RGB pictures stay as they are.
    """
    if len(lms) == 3:
        return picture(lms)
    level = (lms[0].flip(0).cpu().numpy() + 1) / 2
    stops = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]])
    return Image.fromarray(np.stack([np.interp(level, np.linspace(0, 1, 5), stops[:, channel])
                                     for channel in range(3)], axis=2).round().astype(np.uint8))


def draw_grid(rows, titles, path, tile=128):
    """Rows [(name, pictures)] under column titles as one PNG; tiles of at least `tile` pixels."""
    tile = max([tile] + [image.width for _, images in rows for image in images])
    font, gap, left, top = ImageFont.load_default(size=15), 4, 130, 28
    sheet = Image.new('RGB', (left + len(titles) * (tile + gap), top + len(rows) * (tile + gap)), 'white')
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((left + column * (tile + gap) + tile / 2, top / 2), title, 'black', font, anchor='mm')
    for row, (name, images) in enumerate(rows):
        y = top + row * (tile + gap)
        draw.text((left - 8, y + tile / 2), name.replace('_', ' '), 'black', font, anchor='rm')
        for column, image in enumerate(images):
            sheet.paste(image.resize((tile, tile), Image.Resampling.BICUBIC), (left + column * (tile + gap), y))
    with written_whole(path) as part:
        sheet.save(part, 'PNG')


@torch.inference_mode()
def paint(model, classes, waveform, sample_rate, label, size, device='cpu'):
    """The scene of a recording: a picture I'' for each half second, side by side as a PIL picture.

    waveform (n,) in [-1, 1] of any length; the last half second is filled up with silence.
    """
    ends = range(1, max(1, ceil(2 * len(waveform) / sample_rate)) + 1)
    parts = [waveform[(end - 1) * sample_rate // 2:end * sample_rate // 2] for end in ends]
    lms = torch.from_numpy(np.stack([log_mel_spectrogram(part, sample_rate) for part in parts]))
    strip = Image.new('RGB', (len(parts) * size, size))
    for i, part in enumerate(network_lms(lms, size).to(device).split(1)):
        _, fine, _ = model(part, torch.tensor([classes.index(label)], device=device))
        strip.paste(picture(fine[0]), (i * size, 0))
    return strip


def paint_file(config, model, audio, label, out, device):
    """`--audio`: check what was asked for, paint the recording and write the picture."""
    if config['lms_channels'] != 1:
        raise InputError(f'{audio}: this run was trained on LMS drawn as pictures and cannot hear a recording')
    if label not in config['classes']:
        raise InputError(f'--label {label}: this run knows {", ".join(config["classes"])}')
    if Path(out).exists():
        raise InputError(f'{out}: exists already; name another file by --out')
    strip = paint(model, config['classes'], *read_wav(audio), label, config['size'], device)
    with written_whole(out) as part:
        strip.save(part, 'PNG')
    print(f'{out}: {strip.width // strip.height} half seconds of {label}')


# ------------------------------------------------------------------------------------------ command

def evaluate_run(run, config, model, dataset, batch_size=64, device='cpu', network=None):
    """Measure a model on both splits; print the tables, write metrics.json and grid.png into `run`."""
    run, model = Path(run), model.eval()
    metrics = {name: measure(model, getattr(dataset, name), batch_size, device, name, network)
               for name in ('train', 'validation')}
    with written_whole(run / 'metrics.json') as part:
        part.write_text(json.dumps(metrics, indent=1) + '\n')
    stage_grid(model, example_clips(dataset), run / 'grid.png', device)
    print(f'\n{run}: model {config["variant"]}, {config["size"]}x{config["size"]}, '
          f'{len(dataset.train)} pairs in train, {len(dataset.validation)} in validation\n')
    print(table(metrics), fidelity_table(metrics), sep='\n\n')
    if network is not None:
        few = [name for name in metrics if len(getattr(dataset, name)) < 2048]
        if few:
            print(f'fid of fewer than 2,048 pictures ({", ".join(few)}) is not comparable with published figures')
    print(f'\nfigures: {run / "metrics.json"}   pictures: {run / "grid.png"}')
    return metrics


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run', nargs='?', metavar='RUN', help='a run of train.py (default: the newest below runs/)')
    parser.add_argument('--audio', metavar='WAV', help='paint this recording: a picture for each half second')
    parser.add_argument('--label', metavar='CLASS', help='what plays in it')
    parser.add_argument('--out', metavar='PNG', help="where the picture goes (default: the recording's name, here)")
    parser.add_argument('--inception', metavar='PATH',
                        help="weights of FID's Inception (default: torch.hub's cache, else downloaded)")
    parser.add_argument('--require-inception', action='store_true',
                        help='stop where they cannot be had (default: leave FID and IS out)')
    parser.add_argument('--data', metavar='DIR', help="a dataset folder (default: the run's own)")
    parser.add_argument('--cache', metavar='DIR',
                        help=f"where packed data is kept (default: the run's, else {default_cache()})")
    parser.add_argument('--batch-size', type=int, default=64, metavar='N', help='clips at once (default: 64)')
    parser.add_argument('--workers', type=int, metavar='N', help='threads that read files (default: one a core)')
    parser.add_argument('--device', metavar='NAME',
                        help='cpu, cuda, cuda:1, ... (default: the first GPU, else the CPU)')
    args = parser.parse_args(argv)
    if bool(args.audio) != bool(args.label):
        parser.error('--audio and --label go together')
    device = choose_device(args.device)
    run = args.run or newest_run()
    config, model = load_run(run, device)
    if args.audio:
        out = args.out or Path(args.audio).with_suffix('.png').name
        return paint_file(config, model, args.audio, args.label, out, device)
    dataset = open_run_data(config, args.data, args.cache, args.workers)
    try:
        network = inception(args.inception).to(device)
    except InputError as error:
        if args.inception or args.require_inception:
            raise
        print(f'FID and IS: not computed: {error}', file=sys.stderr)
        network = None
    evaluate_run(run, config, model, dataset, args.batch_size, device, network)


if __name__ == '__main__':
    run_command(main)
