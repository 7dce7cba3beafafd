"""What runs of CAR-GAN have learned: the paper's Tables 1 and 2 and its Figures 4 and 5.

    python evaluate.py                     # the newest run below runs/
    python evaluate.py runs/paper          # any run: a folder that train.py made
    python evaluate.py runs/A runs/B ...   # several side by side: the ablation
    python evaluate.py --audio clip.wav --label violin     # the picture for a recording of your own

Every clip of both splits goes through G1 and G2. The run's own classifier C says what the pictures show,
as in the paper, and so does a judge that guided no training. Writes into the run: metrics.json, grid.png
(a row a class: LMS, I', I'', truth) and failures.png; beside several runs: figure4.png and figure5.png.
"""
import argparse
import copy
import hashlib
import json
import os
import sys
from functools import partial
from math import ceil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torchvision.models import resnet18

from cargan import CARGAN, VARIANTS
from preprocess import (InputError, Progress, default_cache, demo_data, log_mel_spectrogram, network_lms, open_dataset,
                        read_wav, reason, run_command, writing, written_whole)

INCEPTION_URL = ('https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/'
                 'pt_inception-2015-12-05-6726825d.pth')
FIGURES = ('fid', 'is', 'fid_classifier', 'is_classifier', 'accuracy', 'accuracy_judge', 'l1')   # of metrics.json
PAPER = {       # of I'' by the models A to E, and of the real frames; Table 1 does not name its split
    ('validation', 'fid'): {'A': 279.30, 'B': 332.16, 'C': 380.11, 'D': 307.37, 'E': 240.78},
    ('validation', 'is'): {'A': 3.2221, 'B': 3.4337, 'C': 2.0699, 'D': 3.7215, 'E': 4.2023, 'real': 4.7552},
    ('train', 'accuracy'): {'E': 0.9954},
    ('validation', 'accuracy'): {'E': 0.9033, 'real': 0.9956},
}
NEAR_SILENT = -40.0     # dB of Split.loudness: what plays in the demo data is above -15, its rests are below -50
JUDGE_VERSION, JUDGE_SEED = 2, 190701826     # the version is raised whenever the judge is trained otherwise


# ------------------------------------------------------------------------------------- a run, loaded

def load_file(path, mmap=False, **kinds):
    """Load the dict in a .pt file to the CPU without running anything in it; with `mmap` a tensor is read
    when it is used. Raises InputError, naming the file, where it cannot be read or lacks one of the keys,
    or where that is of another kind.
    """
    if not Path(path).is_file():        # a pipe would be waited for
        raise InputError(f'{path}: no such file')
    try:
        state = torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)
    except Exception as error:      # torch answers a broken file with many kinds
        raise InputError(f'{path}: not a file of weights that can be read ({reason(error)})') from error
    for key, kind in kinds.items():
        if not isinstance(state, dict) or not isinstance(state.get(key), kind):
            raise InputError(f'{path}: not a file that train.py wrote (no good {key!r} in it)')
    return state


def save_file(state, path):
    """Write a .pt file, whole or not at all. Raises InputError, naming it, where the disk is full."""
    try:
        with written_whole(path) as part:
            torch.save(state, part)
    except (OSError, RuntimeError) as error:        # torch answers a full disk with the latter
        raise InputError(f'{path}: cannot be written ({reason(error)}); what was there before is still whole. '
                         'Make room, and go on with --resume') from error


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
        if not path.is_file():
            raise ValueError('no such file')
        config = json.loads(path.read_text())
        size, base, disc_base = (config[name] for name in ('size', 'base', 'disc_base'))
        if not all(type(n) is int and 0 < n <= 4096 for n in (size, base, disc_base)) or size < 32 or size & size - 1:
            raise ValueError(f'sizes {size}, {base}, {disc_base}')
        if config['variant'] not in VARIANTS:
            raise ValueError(f'variant {config["variant"]!r}')
        for name in ('data', 'cache'):
            if not isinstance(config[name], (str, type(None))):
                raise ValueError(f'{name} {config[name]!r}')
        if not isinstance(config.get('classes', []), list) or config.get('lms_channels', 1) not in (1, 3):
            raise ValueError('classes or lms_channels')
        return config
    except KeyError as error:
        raise InputError(f'{run}: not a run of train.py (config.json: no {error} in it)') from error
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f'{run}: not a run of train.py (config.json: {reason(error)})') from error


def load_run(run, device='cpu'):
    """A run's settings and its CARGAN in eval mode: (config, model)."""
    config, path = load_config(run), Path(run) / 'checkpoint.pt'
    state = load_file(path, mmap=True, model=dict)['model']        # the optimisers are left in the file
    if 'classes' not in config or 'lms_channels' not in config:
        raise InputError(f'{run}: not a run of train.py (config.json: no classes in it)')
    model = CARGAN(len(config['classes']), config['size'], config['base'], config['variant'],
                   config['lms_channels'])
    load_state(model, state, path)
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
        self.count, self.blocks = 0, []                              # blocks of rows (k, 1 + d)
        if features is not None:
            self.update(features)

    @property
    def rows(self):
        """All that is kept, (k, 1 + d), k <= 2 (1 + d)."""
        return torch.cat(self.blocks)

    def update(self, features):
        """Add features (B, d), array or tensor. Raises ValueError where they are not finite or not of one d."""
        features = torch.as_tensor(features).detach()
        d = self.blocks[0].shape[1] - 1 if self.blocks else None
        if features.ndim != 2 or d not in (None, features.shape[1]):
            raise ValueError(f'features of shape {tuple(features.shape)}, not (rows, {d or "d"})')
        if not features.isfinite().all():
            raise ValueError('features that are not finite numbers')
        for batch in features.split(features.shape[1] + 1):          # a large set need not be copied whole
            self.blocks.append(F.pad(batch.cpu().double(), (1, 0), value=1.0))        # (B, 1 + d)
            if sum(map(len, self.blocks)) > 2 * self.blocks[0].shape[1]:
                self.blocks = [torch.linalg.qr(self.rows, mode='r').R]                # (1 + d, 1 + d)
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


# -------------------------------------------------------------------------------------- classifiers

def train_classifier(classifier, dataset, name='classifier', epochs=20, lr=1e-3, accuracy=0.9956, batch_size=32,
                     seed=0, device='cpu', gpus=(), part=None, pause=None):
    """Train a classifier on the real frames until it recognises the share `accuracy` of the validation
    frames, or for `epochs`. The best epoch counts. Returns the state to be kept.

    After each step pause(save) is called; save() writes all that is needed to go on to the file `part`,
    and where that file is, the training goes on from there.
    """
    parallel = nn.DataParallel(classifier, gpus) if len(gpus) > 1 else classifier
    optimizer = torch.optim.Adam(classifier.parameters(), lr=lr, fused=True)
    progress, best, begun, done = Progress(sys.stdout), dict(accuracy=-1.0), 1, 0
    loss = torch.zeros(())              # should it go on after the last batch of an epoch
    if part is not None and part.exists():
        state = load_file(part, classifier=dict, optimizer=dict, best=dict, epoch=int, done=int)
        load_state(classifier, state['classifier'], part)
        load_state(optimizer, state['optimizer'], part)
        best, begun, done = state['best'], state['epoch'], state['done']
    for epoch in range(begun, epochs + 1):
        classifier.train()
        for _, image, label in dataset.train.batches(batch_size, device, seed + epoch, start=done):
            loss = F.cross_entropy(parallel(image), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
            if progress.due():
                progress(f'{name} epoch {epoch}/{epochs}  step {done}/{dataset.train.count(batch_size)}  '
                         f'loss {loss.item():.4f}')
            if pause is not None:
                pause(lambda: save_file(dict(classifier=classifier.state_dict(), optimizer=optimizer.state_dict(),
                                             best=best, epoch=epoch, done=done), part))
        if not loss.isfinite():
            raise InputError(f'{name}: its loss is {loss.item()} in epoch {epoch}; a lower --classifier-lr may help')
        done, found = 0, measure_accuracy(classifier.eval(), dataset.validation, batch_size, device)
        progress(f'{name} epoch {epoch}/{epochs}  accuracy {found:.4f} on the validation frames', last=True)
        if found > best['accuracy']:
            best = dict(classifier=copy.deepcopy(classifier.state_dict()), classes=dataset.classes,
                        accuracy=found, epoch=epoch)
        if found >= accuracy:
            break
    classifier.load_state_dict(best['classifier'])
    optimizer.zero_grad()               # the gradients would stay for as long as the classifier does
    print(f'{name}: accuracy {best["accuracy"]:.4f}, ' + (
        f'{accuracy} reached in epoch {best["epoch"]}' if best['accuracy'] >= accuracy else
        f'the best of {epochs} epochs; {accuracy} was not reached'), flush=True)
    return best


@torch.inference_mode()
def measure_accuracy(classifier, split, batch_size=64, device='cpu'):
    """The share of a split's real frames that a classifier recognises."""
    correct = sum((classifier(image).argmax(dim=1) == label).sum()
                  for _, image, label in split.batches(batch_size, device))
    return float(correct) / len(split)


def get_judge(dataset, device='cpu'):
    """The independent judge: a second classifier of the real frames, torchvision's ResNet18, in eval mode.

    C guides the training, so that its verdict on the result flatters; the judge guided none. It is
    trained once, from scratch, and kept beside the dataset's cache.
    """
    path, key = dataset.folder / 'judge.pt', f'{JUDGE_VERSION} {dataset.fingerprint}'
    with torch.random.fork_rng():
        torch.manual_seed(JUDGE_SEED)
        judge = resnet18(num_classes=len(dataset.classes)).to(device)
    state = load_kept(path, key)
    if state is None:
        state = train_classifier(judge, dataset, 'judge', accuracy=0.99, batch_size=16, seed=JUDGE_SEED,
                                 device=device)
        keep(path, key, state)
    load_state(judge, state['classifier'], path)
    return judge.eval().requires_grad_(False)


# What is expensive and does not depend on the run stays in a file beside the dataset's cache, together
# with the key of all that it does depend on.

def load_kept(path, key):
    """What keep() wrote under this key; None where there is nothing, or something out of date."""
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
        return state if state['key'] == key else None
    except Exception:       # no file, or one that cannot be read: it is made anew
        return None


def digest(network):
    """A name for a network's weights: they are the same where it is."""
    weights = hashlib.sha256()
    for tensor in network.state_dict().values():
        weights.update(tensor.cpu().numpy().tobytes())
    return weights.hexdigest()


def keep(path, key, state):
    """Write a dict for load_kept(); where the cache is read-only, it will be made again."""
    if os.access(path.parent, os.W_OK):
        with writing(path):
            save_file(dict(state, key=key), path)


# ------------------------------------------------------------------------------------------ figures

class Features:
    """Pictures in the space of one network, as the two distances want them."""

    def __init__(self):
        self.moments, self.probabilities = Moments(), []

    def update(self, features, logits):
        """Add a batch: features (B, d), logits (B, k)."""
        self.moments.update(features)
        self.probabilities.append(logits.softmax(dim=1).cpu())

    def score(self):
        """The Inception score of all pictures so far, (mean, std) over 10 splits."""
        probabilities = torch.cat(self.probabilities)
        return inception_score(probabilities, splits=min(10, len(probabilities)))


@torch.inference_mode()
def real_features(network, dataset, name, batch_size=8, device='cpu'):
    """The Features of a split's real frames in Inception's space, kept beside the dataset's cache."""
    path, key = dataset.folder / f'inception-{name}.pt', f'{digest(network)} {dataset.fingerprint}'
    found, state, split, progress = Features(), load_kept(path, key), getattr(dataset, name), Progress()
    if state is not None:
        found.moments.blocks, found.moments.count = [state['rows']], state['count']
        found.probabilities = [state['probabilities']]
        return found
    for _, image, _ in split.batches(batch_size, device, seed=0):           # IS splits them as they come
        found.update(*network((image + 1) / 2))
        done = found.moments.count
        progress(f'Inception, real frames of {name}: {done} of {len(split)}', last=done == len(split))
    keep(path, key, dict(rows=found.moments.rows, count=found.moments.count,
                         probabilities=torch.cat(found.probabilities)))
    return found


@torch.inference_mode()
def measure(model, split, batch_size=8, device='cpu', name='', judge=None, network=None, real=None):
    """Generate from every clip of a split and compare with its real frames.

    Returns ({'coarse': {...}, 'fine': {...}, 'real': {...}}, verdicts): `accuracy` by C (Table 2) and
    `accuracy_judge`; `l1`, the mean over pixels and channels in units of [-1, 1]; `fid_classifier` and
    `is_classifier`, the two distances of Table 1 in the space of C's last features and classes; with
    `network`, FID's Inception, and `real`, its Features of the real frames, also `fid` and `is` (each
    `is` with its `_std` over 10 splits). `verdicts` (n,) are what the judge sees in I''.
    """
    C, progress, order = model.residue.classifier, Progress(), split.order(seed=0)
    kinds = ('coarse', 'fine', 'real')
    found = {kind: {} for kind in kinds}                            # sums, until all clips are seen
    spaces = {kind: {'_classifier': Features()} for kind in kinds}
    verdicts, done = torch.full((len(split),), -1), 0
    if network is not None:
        spaces['coarse'][''], spaces['fine'][''], spaces['real'][''] = Features(), Features(), real
    for lms, image, label in split.batches(batch_size, device, seed=0):     # IS splits them as they come
        entering = []                                               # C's last layer, (B, 2048) each
        with C.resnet.fc.register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0])):
            coarse, fine, coarse_logits = model(lms, label)
            judged = coarse_logits, C(fine), C(image)
        for kind, x, features, logits in zip(kinds, (coarse, fine, image), entering, judged):
            spaces[kind]['_classifier'].update(features, logits)
            sums = {'accuracy': (logits.argmax(dim=1) == label).sum().item()}
            if judge is not None:
                seen = judge(x).argmax(dim=1)
                sums['accuracy_judge'] = (seen == label).sum().item()
            if kind != 'real':
                sums['l1'] = F.l1_loss(x, image).item() * len(label)
                if network is not None:
                    spaces[kind][''].update(*network((x + 1) / 2))
            if kind == 'fine' and judge is not None:
                verdicts[order[done:done + len(label)]] = seen.cpu()
            for figure, value in sums.items():
                found[kind][figure] = found[kind].get(figure, 0) + value
        done += len(label)
        progress(f'evaluating {name}: {done} of {len(split)} clips', last=done == len(split))
    for kind in kinds:
        found[kind] = {figure: value / len(split) for figure, value in found[kind].items()}
        for space, features in spaces[kind].items():
            found[kind][f'is{space}'], found[kind][f'is{space}_std'] = features.score()
            if kind != 'real':
                found[kind][f'fid{space}'] = frechet_distance(features.moments, spaces['real'][space].moments)
    return found, verdicts


def table(columns, width=17):
    """Figures of both splits as lines of text. `columns` is {title: (metrics, stage, model)}: a run's
    metrics, the stage of it that the column shows, and under which model (A to E, real) the paper has it;
    below each figure that the paper has as well stands the paper's.
    """
    def number(figure, value, spread=None, missing='-'):
        digits = 3 if figure in FIGURES[:4] else 4
        text = missing if value is None else f'{value:.{digits}f}' + (f' +- {spread:.3f}' if spread is not None else '')
        return text.rjust(width)

    lines = [' ' * 20 + ''.join(title[-width + 1:].rjust(width) for title in columns)]
    for split in ('train', 'validation'):
        lines.append(split)
        for figure in FIGURES:
            cells = [(metrics[split][stage], stage == 'real' and figure.startswith(('fid', 'l1')))
                     for metrics, stage, _ in columns.values()]
            lines.append(f'  {figure:18}' + ''.join(
                number(figure, cell.get(figure), cell.get(figure + '_std'), '-' if none else 'not computed')
                for cell, none in cells))
            paper = PAPER.get((split, figure), {})
            if any(model in paper for *_, model in columns.values()):
                lines.append(f'  {figure + ", paper":18}' + ''.join(number(figure, paper.get(model))
                                                                    for *_, model in columns.values()))
    return '\n'.join(lines)


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
def example_pictures(model, examples, device='cpu'):
    """[(title, {'LMS': picture, "I'": ..., "I''": ..., 'truth': ...})] of example clips, in eval mode;
    the model is left in the mode it was in.
    """
    training, rows = model.training, []
    model.eval()
    for i in range(0, len(examples), 8):
        titles, batches = zip(*examples[i:i + 8])
        lms, image, label = map(torch.cat, zip(*batches))
        coarse, fine, _ = model(lms.to(device), label.to(device))
        rows += [(title, {'LMS': lms_picture(a), "I'": picture(b), "I''": picture(c), 'truth': picture(d)})
                 for title, a, b, c, d in zip(titles, lms, coarse, fine, image)]
    model.train(training)
    return rows


def stage_grid(model, examples, path, device='cpu'):
    """Draw LMS, I', I'' and truth of example clips, a row each, into a picture file."""
    draw_grid(example_pictures(model, examples, device), path)


def failure_grid(model, split, classes, verdicts, path, device='cpu', rows=16):
    """Draw the clips whose I'' the judge mistook, the quietest first (section 4.2), `rows` at most; with
    no such clip there is no file. Returns how many there are and how many near-silent ones among them
    and among all clips, so that the paper's explanation can be checked.
    """
    loudness = split.loudness()
    wrong = torch.nonzero(verdicts != split.labels).flatten()
    wrong = wrong[loudness[wrong].argsort()]
    path.unlink(missing_ok=True)
    if len(wrong):
        draw_grid(example_pictures(model, [
            (f'{classes[split.labels[i]]}\n{loudness[i]:.0f} dB\nseen as\n{classes[verdicts[i]]}', split.batch([i]))
            for i in wrong[:rows].tolist()], device), path)
    found = dict(clips=len(split), wrong=len(wrong))
    if split.lms.dtype != np.uint8:             # of LMS drawn as pictures the level is not known
        found |= dict(near_silent=(loudness < NEAR_SILENT).sum().item(),
                      near_silent_wrong=(loudness[wrong] < NEAR_SILENT).sum().item())
    return found


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


def draw_grid(rows, path, tile=128):
    """Draw rows [(title, {column: picture})] as one PNG; tiles of at least `tile` pixels."""
    columns = list(rows[0][1])
    tile = max([tile] + [image.width for _, images in rows for image in images.values()])
    font, gap, left, top = ImageFont.load_default(size=15), 4, 130, 28
    sheet = Image.new('RGB', (left + len(columns) * (tile + gap), top + len(rows) * (tile + gap)), 'white')
    draw = ImageDraw.Draw(sheet)
    for x, column in enumerate(columns):
        draw.text((left + x * (tile + gap) + tile / 2, top / 2), column, 'black', font, anchor='mm')
    for y, (title, images) in enumerate(rows):
        draw.multiline_text((left - 8, top + y * (tile + gap) + tile / 2), title.replace('_', ' '), 'black', font,
                            anchor='rm', align='right')
        for x, column in enumerate(columns):
            sheet.paste(images[column].resize((tile, tile), Image.Resampling.BICUBIC),
                        (left + x * (tile + gap), top + y * (tile + gap)))
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

def evaluate_run(run, config, model, dataset, device='cpu', network=None, batch_size=8):
    """Measure a model on both splits; write metrics.json, grid.png and failures.png into `run`."""
    run, model = Path(run), model.eval()
    judge, metrics = get_judge(dataset, device), {}
    for name in ('train', 'validation'):
        real = None if network is None else real_features(network, dataset, name, batch_size, device)
        metrics[name], verdicts = measure(model, getattr(dataset, name), batch_size, device, f'{run} {name}', judge,
                                          network, real)
    # `verdicts` are those of validation
    metrics['validation']['failures'] = failure_grid(model, dataset.validation, dataset.classes, verdicts,
                                                     run / 'failures.png', device)
    with written_whole(run / 'metrics.json') as part:
        part.write_text(json.dumps(metrics, indent=1) + '\n')
    stage_grid(model, example_clips(dataset), run / 'grid.png', device)
    return metrics


def report(run, config, metrics, dataset):
    """Print what evaluate_run found of one run."""
    print(f'\n{run}: model {config["variant"]}, {config["size"]}x{config["size"]}, '
          f'{len(dataset.train)} pairs in train, {len(dataset.validation)} in validation\n')
    print(table({"I' coarse": (metrics, 'coarse', None), "I'' fine": (metrics, 'fine', config['variant']),
                 'real frames': (metrics, 'real', 'real')}), end='\n\n')
    warn_of_few(metrics, dataset)
    failures = metrics['validation']['failures']
    silent = ', near-silent are {near_silent_wrong} of these and {near_silent} of all'.format(**failures) \
        if 'near_silent' in failures else ''
    print(f"the judge mistakes {failures['wrong']} of {failures['clips']} I'' of validation{silent}")
    print(f'figures: {run}/metrics.json   pictures: {run}/grid.png'
          + (f', {run}/failures.png' if failures['wrong'] else ''))


def warn_of_few(metrics, dataset):
    few = [name for name in metrics if len(getattr(dataset, name)) < 2048]
    if few and 'fid' in metrics['train']['fine']:
        print(f'fid of fewer than 2,048 pictures ({", ".join(few)}) is not comparable with published figures')


def compare_runs(runs, configs, args, device, network):
    """Table 1, Table 2 and Figures 4 and 5 for several runs of one dataset, a column a run."""
    for run, config in zip(runs, configs):
        for name in ('size',) if args.data else ('size', 'data'):
            if config[name] != configs[0][name]:
                raise InputError(f'{run}: its {name} is {config[name]}, not {configs[0][name]} as in {runs[0]}: '
                                 'only runs on the same data and size stand side by side')
    titles = [Path(run).resolve().name for run in runs]
    titles = titles if len(set(titles)) == len(runs) else [str(run) for run in runs]
    columns, shown, spaces = {}, {}, set()
    for run, title in zip(runs, titles):
        config, model = load_run(run, device)
        dataset = open_run_data(config, args.data, args.cache, args.workers)
        metrics = evaluate_run(run, config, model, dataset, device, network, args.batch_size)
        columns[title] = metrics, 'fine', config['variant']
        shown[title] = example_pictures(model, example_clips(dataset), device)
        spaces.add(digest(model.residue.classifier))
    columns['real frames'] = metrics, 'real', 'real'

    folder = Path(args.out or Path(runs[0]).resolve().parent)
    folder.mkdir(parents=True, exist_ok=True)
    for name, stages in (('figure4.png', {'': "I''"}), ('figure5.png', {" I'": "I'", " I''": "I''"})):
        draw_grid([(clip, {'LMS': images['LMS'],
                           **{title + suffix: shown[title][row][1][stage] for title in titles
                              for suffix, stage in stages.items()},
                           'truth': images['truth']}) for row, (clip, images) in enumerate(shown[title])],
                  folder / name)
    print(f"\nI'' of {len(runs)} runs on {args.data or config['data'] or 'the demo data'}, "
          f'{config["size"]}x{config["size"]}, {len(dataset.train)} pairs in train, {len(dataset.validation)} in '
          f'validation\n\n{table(columns)}\n')
    warn_of_few(metrics, dataset)
    if len(spaces) > 1:
        print('the classifiers of these runs differ: fid_classifier and is_classifier are each in a space of its '
              'own, not comparable (train.py --classifier lets runs share one)')
    print(f'pictures: {folder}/figure4.png, {folder}/figure5.png; the rest is in each run')


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='*', metavar='RUN',
                        help='a run of train.py, or several side by side (default: the newest below runs/)')
    parser.add_argument('--audio', metavar='WAV', help='paint this recording: a picture for each half second')
    parser.add_argument('--label', metavar='CLASS', help='what plays in it')
    parser.add_argument('--out', metavar='PATH', help="where --audio's picture goes (default: the recording's name, "
                        'here), or the folder of the figures of several runs (default: beside the first)')
    parser.add_argument('--inception', metavar='PATH',
                        help="weights of FID's Inception (default: torch.hub's cache, else downloaded)")
    parser.add_argument('--require-inception', action='store_true',
                        help='stop where they cannot be had (default: leave FID and IS out)')
    parser.add_argument('--data', metavar='DIR', help="a dataset folder (default: the run's own)")
    parser.add_argument('--cache', metavar='DIR',
                        help=f"where packed data is kept (default: the run's, else {default_cache()})")
    parser.add_argument('--batch-size', type=int, default=8, metavar='N', help='clips at once (default: 8)')
    parser.add_argument('--workers', type=int, metavar='N', help='threads that read files (default: one a core)')
    parser.add_argument('--device', metavar='NAME',
                        help='cpu, cuda, cuda:1, ... (default: the first GPU, else the CPU)')
    args = parser.parse_args(argv)
    if bool(args.audio) != bool(args.label):
        parser.error('--audio and --label go together')
    if args.audio and len(args.runs) > 1:
        parser.error('--audio wants one run')
    if args.batch_size < 1 or args.workers is not None and args.workers < 1:
        parser.error('--batch-size and --workers must be at least 1')
    device = choose_device(args.device)
    runs = args.runs or [newest_run()]
    if args.audio:
        out = args.out or Path(args.audio).with_suffix('.png').name
        return paint_file(*load_run(runs[0], device), args.audio, args.label, out, device)
    configs = [load_config(run) for run in runs]        # before anything that takes time
    try:
        network = inception(args.inception).to(device)
    except InputError as error:
        if args.inception or args.require_inception:
            raise
        print(f'fid and is: not computed: {error}', file=sys.stderr)
        network = None
    if len(runs) > 1:
        return compare_runs(runs, configs, args, device, network)
    config, model = load_run(runs[0], device)
    dataset = open_run_data(config, args.data, args.cache, args.workers)
    metrics = evaluate_run(runs[0], config, model, dataset, device, network, args.batch_size)
    report(runs[0], config, metrics, dataset)


if __name__ == '__main__':
    run_command(main)
