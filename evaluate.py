"""Measure runs of CAR-GAN: the paper's Tables 1 and 2 and its Figures 4 to 6.

    python evaluate.py                     # the newest run below runs/
    python evaluate.py runs/NAME           # any run: a folder that train.py made
    python evaluate.py runs/paper          # all runs of a folder that are done, side by side
    python evaluate.py runs/A runs/B       # some by name; of several seeds the mean +- deviation

Every clip of both splits goes through G1 and G2. The run's own classifier C says what the pictures
show, as in the paper, and so does an independent classifier that guided no training; controls say
what would score without a model. Writes metrics.json, grid.png, failures.png and report.html into
the run, of a folder of runs also tables, figures and a page into the folder. A run is measured
again only where its weights, the data or the independent classifier are others than before.
"""
import argparse
import json
import math
import os
from collections import namedtuple
from functools import partial
from pathlib import Path
from statistics import mode

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from baselines import BASELINES
from cargan import VARIANTS
from generate import (as_saved, draw_grid, draw_sounds, example_clips, example_pictures,
                      lms_picture, load_run, open_run_data, paper_figures, picture)
from report import (METRICS_VERSION, paper_tables, read_metrics, report_text, write_folder_page,
                    write_page)
from runs import (InputError, Progress, at_least, choose_device, default_cache, digest,
                  epochs_done, load_config, load_file, note, reason, run_command, write_text)
from train import get_audio_classifier, kept_beside

INCEPTION_URL = ('https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/'
                 'pt_inception-2015-12-05-6726825d.pth')
INDEPENDENT_KEY = 'independent 7'       # raised when that classifier is trained otherwise
SUFFIX = {'inception': '', 'independent': '_independent'}       # of metrics in a network's space
KID_ROWS = 4096         # at most: its time grows by the square
NEAR_SILENT = -40.0     # dB of Split.loudness: the demo's music is above -15, its rests below -50
SEEDS_OWN = {'seed', 'out', 'group', 'classifier', 'cache', 'device', 'workers', 'compile', 'made',
             'resume'}        # settings in which the runs of one column may differ


# ----------------------------------------------------- FID's Inception network, distances and score

class LastMixed(torchvision.models.inception.InceptionE):
    """The last block, which pools the maximum."""

    def _forward(self, x):                                          # (B, 2048, 8, 8)
        *branches, _ = super()._forward(x)
        pooled = F.max_pool2d(x, 3, stride=1, padding=1)
        return [*branches, self.branch_pool(pooled)]


class InceptionV3(torchvision.models.Inception3):
    """Inception-v3 (Szegedy et al. 2015) as in the TensorFlow graph of 2015-12-05 that FID is
    defined on.

    Maps images (B, 3, H, W) in [0, 1], RGB, to (features (B, 2048), logits (B, 1008)). It differs
    from torchvision's in that average pooling does not count the padding, and in its last block.
    The logits lack the last layer's bias, though its weights have one: the reference of the
    Inception score leaves it out, other ports keep it. The names are those of pytorch-fid's
    state_dict.
    """

    def __init__(self):
        super().__init__(num_classes=1008, aux_logits=False, init_weights=False)
        for block in self.children():
            if hasattr(block, 'branch_pool'):
                block.branch_pool.register_forward_pre_hook(self.leave_padding_out)
        self.Mixed_7c = LastMixed(2048)

    @staticmethod
    def leave_padding_out(_, pooled):
        """From the mean over 3x3 pixels, zeros around the map among them, to that of the map's."""
        share = F.avg_pool2d(torch.ones_like(pooled[0][:1, :1]), 3, stride=1, padding=1)
        return pooled[0] / share

    def forward(self, images):                                      # (B, 3, H, W) in [0, 1]
        x = F.interpolate(images, size=(299, 299), mode='bilinear', align_corners=False)
        *layers, fc = self.children()
        features = nn.Sequential(*layers)(2 * x - 1).flatten(1)     # (B, 2048)
        return features, features @ fc.weight.T                     # (B, 2048), (B, 1008)


def inception(path=None):
    """FID's Inception network in eval mode, frozen, on the CPU. Its weights are in the file `path`,
    else in torch.hub's cache, else downloaded there. Raises InputError, naming the file, where they
    cannot be had or are another network's.
    """
    cached = Path(torch.hub.get_dir(), 'checkpoints', Path(INCEPTION_URL).name)
    try:
        if path:
            state = load_file(path)
        else:
            state = torch.hub.load_state_dict_from_url(INCEPTION_URL, map_location='cpu',
                                                       check_hash=True, weights_only=True)
        network = InceptionV3()
        network.load_state_dict(state)
    except Exception as error:      # torch answers a broken file or network with many kinds
        raise InputError(f"{path or cached}: FID's Inception is not to be had ({reason(error)}); "
                         f'it is at {INCEPTION_URL}: fetch it and give it with --inception PATH'
                         ) from error
    return network.eval().requires_grad_(False)


def frechet_distance(features_a, features_b):
    """The Fréchet distance of two Gaussians, FID for Inception's features (Heusel et al. 2017):

        |mu_a - mu_b|^2 + tr S_a + tr S_b - 2 tr sqrt(S_a S_b)

    of features (n, d) and (m, d), arrays or tensors, in float64. With S_a = A^T A and S_b = B^T B,
    tr sqrt(S_a S_b) is the sum of the singular values of A B^T: there is no matrix root to be lost
    in complex numbers where n <= d. Raises ValueError for fewer than two rows, two different d, and
    values that are not finite.
    """
    a, b = _checked(features_a, features_b)
    mu_a, mu_b = a.mean(dim=0), b.mean(dim=0)                       # (d,)
    # R of a QR decomposition has R^T R = x^T x, and no more than d rows
    A = torch.linalg.qr(a - mu_a, mode='r').R / (len(a) - 1) ** 0.5
    B = torch.linalg.qr(b - mu_b, mode='r').R / (len(b) - 1) ** 0.5
    overlap = torch.linalg.svdvals(A @ B.T).sum()
    traces = A.square().sum() + B.square().sum()
    distance = (mu_a - mu_b).square().sum() + traces - 2 * overlap
    return max(0.0, distance.item())                                # of equals: 0 but for rounding


def _checked(*sets):
    """Sets of features as float64 tensors on the CPU, or ValueError."""
    sets = [torch.as_tensor(x).detach().cpu().double() for x in sets]
    for x in sets:
        fits = x.ndim == 2 and len(x) >= 2 and x.shape[1] == sets[0].shape[1]
        if not fits or not x.isfinite().all():
            raise ValueError(f'features {tuple(x.shape)}: not (rows, d) of finite numbers with one '
                             'd and at least 2 rows')
    return sets


def kernel_distance(features_a, features_b, within_b=None):
    """The kernel distance, KID for Inception's features (Binkowski et al. 2018), on all rows: the
    unbiased estimate of MMD^2 with the kernel k(x, y) = (x.y / d + 1)^3, in float64. It may be
    negative and means something for small sets too. Features and ValueError as for
    frechet_distance(); `within_b` is kernel_mean(features_b), where it is known.
    """
    a, b = _checked(features_a, features_b)
    if within_b is None:
        within_b = kernel_mean(b)
    between = sum(_kernel(rows, b).sum().item() for rows in a.split(1024))
    return kernel_mean(a) + within_b - 2 * between / (len(a) * len(b))


def kernel_mean(features):
    """The mean of k(x_i, x_j), i != j, over features (n, d)."""
    x, = _checked(features)
    total = 0.0
    for start in range(0, len(x), 1024):        # k is symmetric: j > i is half of it
        total += _kernel(x[start:start + 1024], x[start:]).triu(1).sum().item()
    return 2 * total / (len(x) * (len(x) - 1))


def _kernel(x, y):
    return (x @ y.T).div_(x.shape[1]).add_(1).pow_(3)


def inception_score(probabilities, splits=10):
    """The Inception score (Salimans et al. 2016), exp(E KL(p(y|x) || p(y))), as (mean, std) over
    splits.

    `probabilities` (n, K), array or tensor, are p(y|x) of n images; the splits follow one another
    and are of nearly equal size. Raises ValueError for fewer rows than splits, or rows that are no
    distributions.
    """
    p = torch.as_tensor(probabilities).detach().cpu().double()
    enough = p.ndim == 2 and len(p) >= splits >= 1
    if not enough or not (p.min() >= 0 and (p.sum(dim=1) - 1).abs().max() < 1e-3):
        raise ValueError(f'{tuple(p.shape)}: not rows of probabilities, or too few of them for '
                         f'{splits} splits')
    entropy, gains = torch.special.entr, []                         # of each part: -p log p
    for part in p.tensor_split(splits):
        # E KL is the entropy of y less that of y given x: no quotient of vanishing probabilities
        gains.append(entropy(part.mean(dim=0)).sum() - entropy(part).sum(dim=1).mean())
    scores = torch.stack(gains).exp()
    return scores.mean().item(), scores.std(correction=0).item()


def match_accuracy(pictures, truth, labels):
    """How often a picture is nearer (L1) to its own true frame than to that of another clip of its
    class: the share of all ordered pairs of clips of one class, where ties count one half. In terms
    of retrieval: R@1 with two candidates, the own frame and one other. Deaf models have 0.5.

    pictures and truth are (n, ...), labels (n,). None where no class has two clips.
    """
    ahead, pairs = 0, 0
    for label in labels.unique():
        clips = of_class(labels, label)
        x, y = pictures[clips].flatten(1).float(), truth[clips].flatten(1).float()
        distances = torch.cdist(x, y, p=1)                          # (clips, clips)
        own = distances.diagonal()[:, None]
        ahead += (distances - own).sign().sum().item()              # 1 for a hit, 0 for a tie
        pairs += len(clips) * (len(clips) - 1)
    return 0.5 + ahead / pairs / 2 if pairs else None


# --------------------------------------------------------------------- the independent classifier

class IndependentClassifier(nn.Module):
    """torchvision's ResNet18: maps images (B, 3, S, S) in [-1, 1] to (penultimate features
    (B, 512), logits (B, K)). `accuracy` is that on the real frames of validation.
    """

    def __init__(self, resnet, accuracy=None):
        super().__init__()
        self.resnet, self.accuracy = resnet, accuracy

    def forward(self, image):                                       # (B, 3, S, S)
        *layers, fc = self.resnet.children()
        features = nn.Sequential(*layers)(image).flatten(1)
        return features, fc(features)                               # (B, 512), (B, K)


def get_independent(dataset, device='cpu'):
    """The independent classifier of a dataset's real frames, in eval mode. C flatters what it
    guided; this one is the same for all runs on the same data.
    """
    make = partial(torchvision.models.resnet18, num_classes=len(dataset.classes))
    resnet, accuracy = kept_beside(dataset, 'independent', make, INDEPENDENT_KEY, device, epochs=10,
                                   steps=300, batch_size=16)
    resnet.to(memory_format=torch.channels_last)    # faster for this, but not for its training
    return IndependentClassifier(resnet, accuracy).eval()


# ----------------------------------------------------------------------------------- the controls

def of_class(labels, label):
    """The indices at which labels (n,) are this one."""
    return torch.nonzero(labels == label).flatten()


def random_frames(train_labels, labels, own=False, seed=0):
    """Draw a train pair of the class of each of `labels` (n,), by seed: indices (n,). With `own`
    the labels are train's own, and each gets another pair than itself if its class has one.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.empty_like(labels)
    for label in labels.unique():
        pairs, clips = of_class(train_labels, label), of_class(labels, label)
        least = int(own and len(pairs) > 1)         # so many places on from itself
        further = torch.randint(least, len(pairs), clips.shape, generator=generator)
        drawn[clips] = pairs[(torch.arange(len(clips)) + further) % len(pairs)]
    return drawn


def nearest_sounds(train, split):
    """The train pair of the class of each clip whose LMS, averaged over time, is nearest (L2):
    indices (n,). In train it is another pair than itself if its class has one.
    """
    train_lms, split_lms = train.average_lms(), split.average_lms()
    nearest = torch.empty_like(split.labels)
    for label in split.labels.unique():
        pairs = of_class(train.labels, label)
        for clips in of_class(split.labels, label).split(1024):
            distances = torch.cdist(split_lms[clips], train_lms[pairs],
                                    compute_mode='donot_use_mm_for_euclid_dist')    # all digits
            if split is train and len(pairs) > 1:
                distances[clips[:, None] == pairs] = math.inf
            nearest[clips] = pairs[distances.argmin(dim=1)]
    return nearest


def mean_frames(train, num_classes, batch_size, device):
    """The mean train frame of each class, (K, 3, S, S)."""
    sums = torch.zeros(num_classes, 3, train.size, train.size, device=device)
    for _, image, label in train.batches(batch_size, device):
        sums.index_add_(0, label, image)
    counts = train.labels.bincount(minlength=num_classes).to(device)
    return sums / counts[:, None, None, None]


def clips_to_match(split, most=64):
    """Draw at most so many clips of each class by seed: a mask (n,)."""
    order, drawn = split.order(seed=0), torch.zeros(len(split), dtype=torch.bool)
    for label in split.labels.unique():
        drawn[order[of_class(split.labels[order], label)[:most]]] = True
    return drawn


# ------------------------------------------------------------------------------------ the metrics
# `networks` are those in whose spaces pictures are compared: 'independent', unless there is but one
# class, and, where its weights are there, 'inception'.

@torch.inference_mode()
def look_at(image, networks, truth=None, classifier=None, some=()):
    """What networks make of images (B, 3, S, S) in [-1, 1] in 8 bits, as every tool that reads
    files sees them.

    Returns rows on the CPU: of each network 'features_NAME' (B, d), 'probabilities_NAME' (B, K) and
    'predictions_NAME' (B,); of `classifier`, C, 'predictions' (B,); 'l1' (B,) to `truth`, mean over
    pixels and channels, of the images as they are; of those in the mask `some` uint8 'pictures'.
    """
    saved, rows = as_saved(image), {}
    for name, network in networks.items():
        seen = (saved + 1) / 2 if name == 'inception' else saved
        features, logits = network(seen)
        rows[f'features_{name}'] = features.cpu()
        rows[f'probabilities_{name}'] = logits.softmax(dim=1).cpu()
        rows[f'predictions_{name}'] = logits.argmax(dim=1).cpu()
    if classifier is not None:
        rows['predictions'] = classifier(saved).argmax(dim=1).cpu()
    if truth is not None:
        rows['l1'] = (image - truth).abs().mean(dim=(1, 2, 3)).cpu()
    if len(some):
        rows['pictures'] = ((saved[some] + 1) * 127.5).round().byte().cpu()
    return rows


def joined(batches):
    """Rows of batches as one; these are emptied on the way, as rows are not to be there twice."""
    return {key: torch.cat([rows.pop(key) for rows in batches]) for key in list(batches[0])}


@torch.inference_mode()
def measure(model, dataset, networks, batch_size=8, device='cpu', name='', images=None):
    """Look at the pictures for all clips: {split: {kind: rows}}, the rows of look_at() and their
    'match'. The kinds:

        coarse, fine   I' and I''; fine alone where they are one picture
        real           the frames; their fid and kid will be to the other split's: what a perfect
                       generator would score
        random_frame   a train frame of the class, by seed, not the clip's own: copying; l1 is the
                       mean of some draws
        nearest_sound  the train frame of the class that sounds nearest, not the clip's own: copying
                       by ear, what a network must beat to show that it hears
        mean_frame     the mean train frame of the class: what L1 alone wants
        wrong_label    of model E and validation: I'' where G1 and the residue are given the label
                       of another class, by seed ('given')
        other_sound    of these too: I'' from the LMS of another clip of the class, by seed

    Of fine also the 'mistakes', those 16 of the independent classifier whose clips are quietest:
    [(index, I', I'')]. Writes each I'' to <split>/<class>/<stem>.png in the folder `images`, where
    one is given.
    """
    means = mean_frames(dataset.train, len(dataset.classes), batch_size, device)
    of_means = joined([look_at(part, networks) for part in means.split(batch_size)])
    measured = {}
    for part in 'train', 'validation':
        split = getattr(dataset, part)
        controls = Controls(dataset.train, split, means)
        rows = measure_split(model, dataset, part, controls, networks, batch_size, device, name,
                             images)
        measured[part] = rows
        frames = measured['train']['real']
        for key in of_means:
            rows['mean_frame'][key] = of_means[key][split.labels]
            rows['nearest_sound'][key] = frames[key][controls.nearest]
            rows['random_frame'][key] = frames[key][controls.random[0]]
    return measured


class Controls:
    """Which pairs stand in for each clip of a split: indices (n,) into train, and into the split
    itself for the `other` sound; the labels `given` instead of its own; the `means` (K, 3, S, S).
    """

    def __init__(self, train, split, means):
        self.means = means
        self.nearest = nearest_sounds(train, split)
        # fewer clips take more draws: one draw of 156 had an l1 three deviations off
        self.random = []
        for seed in range(1 + min(7, 1000 // len(split))):
            self.random.append(random_frames(train.labels, split.labels, split is train, seed))
        self.other = random_frames(split.labels, split.labels, own=True)
        self.given = None
        if len(means) > 1:
            further = 1 + split.order(seed=0) % (len(means) - 1)
            self.given = (split.labels + further) % len(means)


def measure_split(model, dataset, part, controls, networks, batch_size, device, name, images):
    """measure() of one split, but for what networks make of frames that are in train."""
    train, split = dataset.train, getattr(dataset, part)
    labels, loudness, compared = split.labels, split.loudness(), clips_to_match(split)
    listens = part == 'validation' and getattr(model, 'variant', None) == 'E'
    batches, mistakes, progress = [], [], Progress()
    for indices, (lms, image, label) in zip(split.indices(batch_size),
                                            split.batches(batch_size, device)):
        coarse, fine, _ = model(lms, label)
        shown = dict(fine=fine, real=image)
        if coarse is not fine:
            shown['coarse'] = coarse
        judges = dict.fromkeys(shown, model.residue.classifier)         # as in the paper
        if len(dataset.classes) == 1:
            judges = {}
        if listens:
            sound = split.batch(controls.other[indices], device)[0]
            shown['other_sound'] = model(sound, label)[1]
        if listens and controls.given is not None:
            shown['wrong_label'] = model(lms, controls.given[indices].to(device))[1]

        some = compared[indices]
        rows = {}
        for kind, x in shown.items():
            rows[kind] = look_at(x, networks, image, judges.get(kind), some)
        copy = train.batch(controls.nearest[indices], device)[1]
        rows['nearest_sound'] = look_at(copy, {}, image, some=some)
        rows['mean_frame'] = look_at(controls.means[label], {}, image, some=some)
        copies = [train.batch(drawn[indices], device)[1] for drawn in controls.random]
        distance = (torch.stack(copies) - image).abs().mean(dim=(0, 2, 3, 4))
        rows['random_frame'] = dict(l1=distance.cpu())
        batches.append(rows)

        if 'independent' in networks:
            wrong = rows['fine']['predictions_independent'] != labels[indices]
            for i in torch.nonzero(wrong).flatten():
                mistakes.append((indices[i], coarse[i], fine[i]))
            mistakes = sorted(mistakes, key=lambda mistake: loudness[mistake[0]])[:16]
        if images:
            write_images(fine, split, indices, dataset.classes, Path(images, part))
        done = indices[-1] + 1
        progress(f'evaluating {name} {part}: {done} of {len(split)}', last=done == len(split))

    rows = {kind: joined([rows[kind] for rows in batches]) for kind in batches[0]}
    truth = rows['real'].pop('pictures')
    for of_kind in rows.values():
        if 'pictures' in of_kind:
            pictures = of_kind.pop('pictures')
            of_kind['match'] = match_accuracy(pictures, truth, labels[compared])
    rows['fine']['mistakes'] = mistakes
    if 'wrong_label' in rows:
        rows['wrong_label']['given'] = controls.given
    return rows


def write_images(images, split, indices, classes, folder):
    """Write the pictures of some clips of a split to <class>/<stem>.png in a folder."""
    for image, i in zip(images, indices):
        path = folder / classes[split.labels[i]] / f'{split.stems[i]}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(image).save(path)


def metrics_of(rows, split, real):
    """The metrics of one kind of picture, for metrics.json, from its rows and those of the real
    frames that it is compared with. What needs more pictures is None: fid and kid want 2, is 100.
    """
    metrics = dict(l1=rows['l1'].mean().item())
    for name, suffix in SUFFIX.items():
        if f'features_{name}' not in rows:
            continue
        fid = kid = score = spread = None
        sets = rows[f'features_{name}'], real[f'features_{name}']
        if min(map(len, sets)) >= 2:
            some, some_real = [draw_rows(features, KID_ROWS) for features in sets]
            if f'within_{name}' not in real:        # the same for all kinds
                real[f'within_{name}'] = kernel_mean(some_real)
            fid = frechet_distance(*sets)
            kid = kernel_distance(some, some_real, real[f'within_{name}'])
        if len(split) >= 100:
            mixed = split.order(seed=0)             # as they lie, each part had few classes
            score, spread = inception_score(rows[f'probabilities_{name}'][mixed])
        metrics |= {f'fid{suffix}': fid, f'kid{suffix}': kid, f'is{suffix}': score,
                    f'is{suffix}_std': spread}
    seen = rows.get('predictions_independent')
    if seen is not None:
        metrics['accuracy_independent'] = share(seen == split.labels)
    if 'predictions' in rows:
        metrics['accuracy'] = share(rows['predictions'] == split.labels)
    if 'given' in rows:
        metrics['accuracy_given'] = share(seen == rows['given'])
    if 'match' in rows:
        metrics['match'] = rows['match']
    return metrics


def draw_rows(features, most):
    """At most so many rows, drawn by seed."""
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    return features[order[:most]]


def share(right):
    """The share of a mask that is true."""
    return right.double().mean().item()


def metrics_of_classes(rows, split, classes):
    """Two metrics of each class that a split has: {class: {metric: value}}."""
    metrics = {}
    if 'predictions_independent' not in rows:
        return metrics
    right = rows['predictions_independent'] == split.labels
    for label in split.labels.unique():
        clips = of_class(split.labels, label)
        metrics[classes[label]] = dict(accuracy_independent=share(right[clips]),
                                       l1=rows['l1'][clips].mean().item())
    return metrics


# ------------------------------------------------------------------------------------------ a run

def draw_failures(rows, dataset, path):
    """Draw the mistakes among the rows of validation's I'' (section 4.2), if there are any. Returns
    how many there are, and how many near-silent clips are among them and among all.
    """
    split, classes, grid = dataset.validation, dataset.classes, []
    seen, loudness = rows['predictions_independent'], split.loudness()
    wrong, silent = seen != split.labels, loudness < NEAR_SILENT
    failures, unit = dict(clips=len(split), wrong=wrong.sum().item()), 'of 255'
    if dataset.lms_channels == 1:       # of LMS that are pictures the level is not known
        unit = 'dB'
        failures.update(near_silent=silent.sum().item(),
                        near_silent_wrong=(silent & wrong).sum().item())
    for i, coarse, fine in rows['mistakes']:
        lms, image, label = split.batch([i])
        pictures = {"I'": picture(coarse), "I''": picture(fine), 'truth': picture(image[0])}
        title = f'{classes[label]}\n{loudness[i]:.0f} {unit}\nseen as\n{classes[seen[i]]}'
        grid.append((title, {'LMS': lms_picture(lms[0]), **pictures}))
    path.unlink(missing_ok=True)
    if grid:
        draw_grid(grid, path)
    return failures


def evaluate_run(run, folder, config, dataset, networks, args, device):
    """The model of a run and its metrics: those of metrics.json in `folder`, its own or another, if
    they are of the same weights, data and independent classifier; else it is measured now, and
    metrics.json, grid.png and failures.png are written there.
    """
    _, model, trained = load_run(run, device)
    if trained['epoch'] < config['epochs']:
        print(f'note: {run} is not done: epoch {trained["epoch"]} of {config["epochs"]}')
    independent = networks.get('independent')
    measured = dict(weights=digest(model), data=dataset.fingerprint)
    if independent:
        measured['independent'] = digest(independent)
    metrics = read_metrics(folder)
    if metrics.get('measured') == measured and not args.images:
        if 'inception' not in networks or 'fid' in metrics['train']['fine']:
            return model, metrics
    folder.mkdir(parents=True, exist_ok=True)       # before the long work, as it may fail
    batch_size = args.batch_size or max(1, 2048 // config['size'])
    rows = measure(model, dataset, networks, batch_size, device, folder, args.images)
    metrics = {name: config.get(name) for name in ('data', 'size', 'variant', 'seed', 'preset')}
    metrics.update(trained, version=METRICS_VERSION, measured=measured, pictures={},
                   versions=dict(torch=torch.__version__, torchvision=torchvision.__version__))
    if args.data:
        metrics['data'] = args.data
    for name, other in ('train', 'validation'), ('validation', 'train'):
        split, kinds = getattr(dataset, name), rows[name]
        metrics['pictures'][name] = len(split)
        real = dict.fromkeys(kinds, kinds['real']) | dict(real=rows[other]['real'])
        of_split = {kind: metrics_of(kinds[kind], split, real[kind]) for kind in kinds}
        of_split.setdefault('coarse', dict(of_split['fine']))
        of_split['fine']['classes'] = metrics_of_classes(kinds['fine'], split, dataset.classes)
        metrics[name] = of_split
    nearest = None
    if independent:
        metrics['independent_accuracy'] = independent.accuracy
        failures = draw_failures(rows['validation']['fine'], dataset, folder / 'failures.png')
        metrics['validation']['failures'] = failures
        frames = rows['train']['real']['features_independent']

        def nearest(fine):      # the train frame, in the independent classifier's space
            features = independent(as_saved(fine))[0].cpu()                 # (1, 512)
            return dataset.train.batch([(frames - features).norm(dim=1).argmin()])[1]

    draw_grid(example_pictures(model, example_clips(dataset), device, nearest), folder / 'grid.png')
    if dataset.lms_channels == 1:       # in pictures nobody knows what is high
        draw_sounds(model, dataset.validation, folder / 'sounds.png', device)
    write_text(folder / 'metrics.json', json.dumps(metrics, indent=1) + '\n')
    return model, metrics


# ----------------------------------------------------------------------------------- several runs

Result = namedtuple('Result', 'config metrics pictures')      # of a run; example_pictures()


def columns_of(results):
    """Results as columns {title: [results]}, in the paper's order: the runs of a model that differ
    in their seed alone. Where a run has settings that most have not, the title says which; None is
    one that its version of train.py did not know.
    """
    columns, order = {}, [*VARIANTS, *BASELINES]
    for result in results:
        config, title = result.config, result.config['variant']
        alike = [other.config for other in results if other.config['variant'] == title]
        for name in sorted(set().union(*alike) - SEEDS_OWN):
            usual = mode(str(other.get(name)) for other in alike)
            if str(config.get(name)) != usual:
                title += f', {name} {config.get(name)}'
        columns.setdefault(title, []).append(result)
    titles = sorted(columns, key=lambda title: (order.index(title.split(', ')[0]), title))
    return {title: columns[title] for title in titles}


def compare_runs(results, out=None):
    """Print Tables 1 and 2 of some Results; write them, Figures 4 to 6 and a page to `out`."""
    columns, shown = {}, {}
    for title, group in columns_of(results).items():
        variant = group[0].config['variant']
        columns[title] = variant, [result.metrics for result in group]
        shown[title] = variant, group[0].pictures
    if out:
        out.mkdir(parents=True, exist_ok=True)
    text = paper_tables(columns, out)
    print(f'\n{text}\n')
    if out:
        paper_figures(shown, out)
        write_folder_page(out, text)
        print(f'in {out}: report.html, tables.md, tables.json, figures; the rest is in each run')


# ---------------------------------------------------------------------------------------- command

def find_runs(folders):
    """{run: its settings} of runs, and of those in folders of runs that are done. Raises InputError
    where there is none.
    """
    configs = {}
    for folder in folders:
        inside = sorted(folder.glob('*/config.json'))
        if not inside:
            configs[folder] = load_config(folder)
        for run in (path.parent for path in inside):
            config, epochs = load_config(run), epochs_done(run)
            if epochs >= config['epochs']:
                configs[run] = config
            else:
                print(f'{run}: left out, not done: epoch {epochs} of {config["epochs"]}')
    if not configs:
        raise InputError(f'{folders[0]}: no run in it is done; go on with train.py')
    return configs


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('runs', nargs='*', type=Path, help='a run of train.py, several, or a folder '
        'of runs (default: the newest run below runs/)')
    add('--inception',
        help="weights of FID's Inception (default: torch.hub's cache, else downloaded)")
    add('--require-inception', action='store_true',
        help='stop where they cannot be had (default: do without them)')
    add('--images', type=Path,
        help="write every I'' of a run as DIR/<split>/<class>/<stem>.png")
    add('--out', type=Path, help='folder for what is found of a run (default: the '
        'run), or for the tables of several (default: the folder of runs)')
    add('--data', help="a dataset folder (default: the run's own); what is found "
        'goes into a folder in the run')
    add('--cache',
        help=f"where packed data is kept (default: the run's, else {default_cache()})")
    add('--batch-size', type=at_least(int, 1),
        help='clips at once (default: 8 at 256 pixels, 32 at 64)')
    add('--device', help='cpu, cuda, ... (default: the first GPU, else the CPU)')
    args = parser.parse_args(argv)
    folders = args.runs
    if not folders:
        newest = max(Path('runs').glob('**/checkpoint.pt'), key=os.path.getmtime, default=None)
        if newest is None:
            raise InputError('runs/: no run in it; train one with: python train.py')
        folders = [newest.parent]
    configs = find_runs(folders)
    first = next(iter(configs))
    several = folders != [first]
    if args.images and (several or args.images.exists()):
        raise InputError(f'--images {args.images}: wants one run, and the name of a new folder')
    same, inside = ['size', 'classes', 'lms_channels', 'data'], ''
    if args.data:
        args.data = str(Path(args.data).resolve())
        same, inside = same[:3], Path(args.data).name
    for run, config in configs.items():
        for name in same:
            if config[name] != configs[first][name]:
                raise InputError(f'{run}: its {name} is not that of {first}; runs side by side '
                                 'want the same')
    device, networks = choose_device(args.device), {}
    try:
        networks['inception'] = inception(args.inception).to(device)
    except InputError as error:
        if args.inception or args.require_inception:
            raise
        note(f'fid, kid and is: not computed: {error}')
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    dataset = open_run_data(configs[first], args.data, args.cache)
    if len(dataset.classes) > 1:
        networks['independent'] = get_independent(dataset, device)
    if len(dataset.classes) > 1 and dataset.lms_channels == 1:
        get_audio_classifier(dataset, device)       # which generate.py asks what plays

    results, examples = [], example_clips(dataset)
    for run, config in configs.items():
        folder = run / inside
        if args.out and not several:
            folder = args.out
        model, metrics = evaluate_run(run, folder, config, dataset, networks, args, device)
        if several:
            pictures = example_pictures(model, examples, device)
            results.append(Result(config, metrics, pictures))
        else:
            print(report_text(folder, config, metrics))
        if folder == run:
            write_page(run)
            print(f"\n{run}'s page: {run / 'report.html'}")
    if several:
        if len(folders) == 1 and not args.out:
            args.out = folders[0] / inside
        compare_runs(results, args.out)


if __name__ == '__main__':
    run_command(main)
