"""What runs of CAR-GAN have learned: the paper's Tables 1 and 2 and its Figures 4 to 6.

    python evaluate.py                     # the newest run below runs/
    python evaluate.py runs/paper          # any run: a folder that train.py made
    python evaluate.py runs/A runs/B ...   # several side by side, or all of a folder; seeds as mean +- deviation
    python evaluate.py --audio clip.wav --out clip.gif      # the pictures for a recording of your own

Every clip of both splits goes through G1 and G2. The run's own classifier C says what the pictures show, as in the
paper, and so does an independent classifier that guided no training; controls say what would score without a model.
Writes metrics.json, grid.png, failures.png and report.html into the run; beside several, tables, figures and a page.
"""
import argparse
import copy
import hashlib
import json
import os
import re
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from baselines import BASELINES, AudioClassifier
from cargan import CARGAN, VARIANTS, Classifier
from demo import demo_data
from preprocess import (as_saved, draw_grid, example_clips, example_pictures, generate_recording, hold_out,
                        open_dataset, picture, random_frames, read_wav, recording_lms)
from report import (RECORDING_ENDINGS, failure_grid, paper_figures, paper_tables, report_text, save_recording,
                    write_folder_page, write_page)
from runs import (InputError, Progress, choose_device, default_cache, load_config, load_file, load_state, reason,
                  run_command, save_file, writing, written_whole)

INCEPTION_URL = ('https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/'
                 'pt_inception-2015-12-05-6726825d.pth')
CLASSIFIERS_VERSION, CLASSIFIERS_SEED = 5, 190701826    # of those beside the cache; raised when trained otherwise
SEEDS_OWN = ('seed', 'out', 'group', 'classifier', 'cache', 'device', 'workers', 'save_minutes', 'made')


# ------------------------------------------------------------------------------------- a run, loaded

def load_run(run, device='cpu'):
    """A run's settings, its model in eval mode, and how far it was trained: (config, model, dict(epoch=, steps=)).

    From model.pt or, before the training has ended, checkpoint.pt, and the classifier file that it names. Raises
    InputError where one of them is no good, or the classifier is not the one the run was trained with.
    """
    config, run = load_config(run), Path(run)
    path = run / ('model.pt' if (run / 'model.pt').exists() else 'checkpoint.pt')
    state = load_file(path, mmap=True, model=dict, classifier=str, classifier_digest=str, epoch=int, steps=int)
    source = run / state['classifier']
    try:
        classifier = Classifier(len(config['classes']), pretrained=False)
        model = make_model(config['variant'], len(config['classes']), config['size'], config['base'],
                           config['lms_channels'], classifier)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f'{run}: not a run of train.py (config.json: {reason(error)})') from error
    load_state(classifier, load_file(source, classifier=dict)['classifier'], source)
    if digest(classifier) != state['classifier_digest']:
        raise InputError(f'{source}: not the classifier that {path} was trained with; put that one back')
    load_generators(model, state.get('average') or state['model'], path)
    return config, model.to(device).eval(), dict(epoch=state['epoch'], steps=state['steps'])


def make_model(variant, num_classes, size, base, lms_channels, classifier=None, dropout=0.5, init_std=0.2, audio=None):
    """CARGAN or one of the baselines; `audio`, S2IC's audio classifier, comes with its weights where these are loaded.
    """
    if variant not in BASELINES:
        return CARGAN(num_classes, size, base, variant, lms_channels, classifier, dropout, init_std)
    more = dict(audio=audio) if variant == 'S2IC' else {}
    return BASELINES[variant][0](num_classes, size, base, lms_channels, classifier, init_std=init_std, **more)


def load_generators(model, state, path):
    """Load the weights that a run keeps, all but C's. Raises InputError where they are another network's."""
    load_state(model, {**model.residue.state_dict(prefix='residue.'), **state}, path)


def digest(network):
    """A name for a network's weights: they are the same where it is."""
    weights = b''.join(tensor.cpu().numpy().tobytes() for tensor in network.state_dict().values())
    return hashlib.sha256(weights).hexdigest()


def open_run_data(config, data=None, cache=None):
    """The dataset that a run was trained on, or `data` with the same classes."""
    data = data or config['data'] or demo_data(config['size'], cache or config['cache'])
    dataset = open_dataset(data, config['size'], cache or config['cache'])
    if dataset.classes != config['classes'] or dataset.lms_channels != config['lms_channels']:
        raise InputError(f'{data}: its classes or its kind of LMS are not those the run was trained on')
    return dataset


# ------------------------------------------------------- FID's Inception network, distances and score

class LastMixed(torchvision.models.inception.InceptionE):
    """The last block, which pools the maximum."""

    def _forward(self, x):                                           # (B, 2048, 8, 8)
        *branches, _ = super()._forward(x)
        return [*branches, self.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1))]


class InceptionV3(torchvision.models.Inception3):
    """Inception-v3 (Szegedy et al. 2015) as in the TensorFlow graph of 2015-12-05 that FID is defined on.

    Maps images (B, 3, H, W) in [0, 1], RGB, to (features (B, 2048), logits (B, 1008)). It differs from torchvision's
    in that average pooling does not count the padding, and in its last block. The logits lack the last layer's bias,
    though its weights have one: the reference of the Inception score leaves it out, other ports keep it. The names
    are those of pytorch-fid's state_dict.
    """

    def __init__(self):
        super().__init__(num_classes=1008, aux_logits=False, init_weights=False)
        self.Mixed_7c = LastMixed(2048)
        for block in self.children():
            if hasattr(block, 'branch_pool') and block is not self.Mixed_7c:
                block.branch_pool.register_forward_pre_hook(self.leave_padding_out)

    @staticmethod
    def leave_padding_out(_, pooled):
        """From the mean over 3x3 pixels, zeros around the map among them, to the mean over those of the map."""
        return pooled[0] / F.avg_pool2d(torch.ones_like(pooled[0][:1, :1]), 3, stride=1, padding=1)

    def forward(self, images):                                       # (B, 3, H, W) in [0, 1]
        x = 2 * F.interpolate(images, size=(299, 299), mode='bilinear', align_corners=False) - 1    # (B, 3, 299, 299)
        *layers, fc = self.children()
        features = nn.Sequential(*layers)(x).flatten(1)              # (B, 2048)
        return features, features @ fc.weight.T                      # (B, 2048), (B, 1008)


def inception(path=None):
    """FID's Inception network in eval mode, frozen, on the CPU. Its weights are in the file `path`, else in torch.hub's
    cache, else downloaded there. Raises InputError, naming the file, where they cannot be had or are another network's.
    """
    network, cached = InceptionV3(), Path(torch.hub.get_dir(), 'checkpoints', Path(INCEPTION_URL).name)
    try:
        network.load_state_dict(load_file(path) if path else torch.hub.load_state_dict_from_url(
            INCEPTION_URL, map_location='cpu', check_hash=True, weights_only=True))
    except Exception as error:      # no file, no network, a broken file, other weights: torch answers with many kinds
        raise InputError(f"{path or cached}: FID's Inception is not to be had ({reason(error)}); it is at "
                         f'{INCEPTION_URL}: fetch it and give it with --inception PATH') from error
    return network.eval().requires_grad_(False)


def frechet_distance(features_a, features_b):
    """The Fréchet distance of two Gaussians, FID for Inception's features (Heusel et al. 2017):

        |mu_a - mu_b|^2 + tr S_a + tr S_b - 2 tr sqrt(S_a S_b)

    of features (n, d) and (m, d), arrays or tensors, in float64. With S_a = A^T A and S_b = B^T B, tr sqrt(S_a S_b)
    is the sum of the singular values of A B^T: there is no matrix root to be lost in complex numbers where n <= d.
    Raises ValueError for fewer than two rows, two different d, and values that are not finite.
    """
    a, b = _checked(features_a, features_b)
    mu_a, mu_b = a.mean(dim=0), b.mean(dim=0)                        # (d,)
    # R of a QR decomposition has R^T R = x^T x, and no more than d rows
    A, B = (torch.linalg.qr(x, mode='r').R / (len(x) - 1) ** 0.5 for x in (a - mu_a, b - mu_b))
    overlap = torch.linalg.svdvals(A @ B.T).sum()
    distance = (mu_a - mu_b).square().sum() + A.square().sum() + B.square().sum() - 2 * overlap
    return max(0.0, distance.item())                                 # of equals: 0 but for rounding


def _checked(*sets):
    """Sets of features as float64 tensors on the CPU, or ValueError."""
    sets = [torch.as_tensor(x).detach().cpu().double() for x in sets]
    if any(x.ndim != 2 or len(x) < 2 or x.shape[1] != sets[0].shape[1] or not x.isfinite().all() for x in sets):
        raise ValueError(f'features of shape {" and ".join(str(tuple(x.shape)) for x in sets)}, not (rows, d) of '
                         'finite numbers with one d and at least 2 rows')
    return sets


def kernel_distance(features_a, features_b):
    """The kernel distance, KID for Inception's features (Binkowski et al. 2018), on all rows: the unbiased estimate
    of MMD^2 with the kernel k(x, y) = (x.y / d + 1)^3, in float64. It may be negative and means something for small
    sets too. Features and ValueError as for frechet_distance().
    """
    a, b = _checked(features_a, features_b)

    def kernel_sum(x, y):
        return sum((rows @ y.T / x.shape[1] + 1).pow(3).sum().item() for rows in x.split(1024))    # (1024, m) at once

    def between_others(x):      # the mean of k(x_i, x_j), i != j
        itself = (x.square().sum(dim=1) / x.shape[1] + 1).pow(3).sum().item()
        return (kernel_sum(x, x) - itself) / (len(x) * (len(x) - 1))

    return between_others(a) + between_others(b) - 2 * kernel_sum(a, b) / (len(a) * len(b))


def inception_score(probabilities, splits=10):
    """The Inception score (Salimans et al. 2016), exp(E KL(p(y|x) || p(y))), as (mean, std) over splits.

    `probabilities` (n, K), array or tensor, are p(y|x) of n images; the splits follow one another and are of nearly
    equal size. Raises ValueError for fewer rows than splits, or rows that are no distributions.
    """
    p = torch.as_tensor(probabilities).detach().cpu().double()
    if splits < 1 or p.ndim != 2 or len(p) < splits or not (p.min() >= 0 and (p.sum(dim=1) - 1).abs().max() < 1e-3):
        raise ValueError(f'{tuple(p.shape)}: not rows of probabilities, or too few of them for {splits} splits')
    entr = torch.special.entr                                        # -p log p
    # E KL is the entropy of y less that of y given x: no quotient of two vanishing probabilities
    scores = torch.stack([entr(part.mean(dim=0)).sum() - entr(part).sum(dim=1).mean()
                          for part in p.tensor_split(splits)]).exp()
    return scores.mean().item(), scores.std(correction=0).item()


# -------------------------------------------------------------------------------------- classifiers

def train_classifier(classifier, dataset, name='classifier', epochs=20, lr=1e-3, batch_size=32, seed=0, device='cpu',
                     gpus=(), part=None, source=1, check=lambda: None):
    """Train a classifier on the real frames of nine tenths of train, with a rate that falls to zero. The last epoch of
    those that recognise most of the other tenth counts, the very last one where no class has ten pairs.

    source: which tensor of a batch to classify, 1 the image, 0 the LMS. After each epoch the file `part` is written,
    from which the training goes on where it is there; after each step check() is called. Leaves the classifier at that
    epoch and returns dict(classifier=its state, classes=, accuracy=on validation, held_out=on the tenth or None,
    epoch=). Raises InputError where the loss is not finite.
    """
    kept, tenth = (dataset.train.subset(indices) for indices in hold_out(dataset.train.labels, seed))
    parallel = nn.DataParallel(classifier, gpus) if len(gpus) > 1 else classifier
    groups = getattr(classifier, 'parameter_groups', classifier.parameters)()       # weight decay of some
    optimizer = torch.optim.Adam(groups, lr=lr, fused=True)
    progress, steps, best, begun = Progress(sys.stdout), kept.count(batch_size, least=2), {}, 1
    if part is not None and part.exists():
        state = load_file(part, classifier=dict, optimizer=dict, best=dict, epoch=int)
        load_state(classifier, state['classifier'], part)
        load_state(optimizer, state['optimizer'], part)
        best, begun = state['best'], state['epoch'] + 1
    for epoch in range(begun, epochs + 1):
        torch.manual_seed(seed + epoch)         # for dropout, where a classifier has some
        classifier.train()
        for step, batch in enumerate(kept.batches(batch_size, device, seed + epoch, least=2), 1):
            for group in optimizer.param_groups:        # where it stopped early, C misled G1 on photographs
                group['lr'] = lr * (1 - ((epoch - 1) * steps + step - 1) / (epochs * steps))
            loss = F.cross_entropy(parallel(batch[source]), batch[2])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if progress.due():
                progress(f'{name} epoch {epoch}/{epochs}  step {step}/{steps}  loss {loss.item():.4f}')
            check()
        if not loss.isfinite():
            raise InputError(f'{name}: its loss is {loss.item()}; another --seed or --classifier FILE may help')
        found = measure_accuracy(classifier.eval(), tenth, batch_size, device, source) if len(tenth) else None
        progress(f'{name} epoch {epoch}/{epochs}  loss {loss.item():.4f}'
                 + (f'  accuracy {found:.4f} on a tenth of train' if len(tenth) else ''), last=epoch == epochs)
        if found is None or found >= best.get('held_out', -1):
            best = dict(classifier=copy.deepcopy(classifier.state_dict()), held_out=found, epoch=epoch)
        if part is not None:
            save_file(dict(classifier=classifier.state_dict(), optimizer=optimizer.state_dict(), best=best,
                           epoch=epoch), part)
    classifier.load_state_dict(best['classifier'])
    optimizer.zero_grad()               # the gradients would stay for as long as the classifier does
    found = measure_accuracy(classifier.eval(), dataset.validation, batch_size, device, source)
    print(f'{name}: accuracy {found:.4f} on validation after epoch {best["epoch"]}', flush=True)
    return dict(best, classes=dataset.classes, accuracy=found)


def get_classifier(args, dataset, path, device, gpus=(), check=lambda: None):
    """C: the classifier in the file `path`, that of --classifier, or one trained now and kept in `path`.
    Raises InputError where the file is of other classes, or ImageNet's weights cannot be had.
    """
    part, source = path.with_name('classifier-part.pt'), path if path.exists() else args.classifier
    state = load_file(source) if source else {}
    torch.manual_seed(args.seed)
    if 'classifier' in state:
        if state.get('classes') != dataset.classes:
            raise InputError(f'{source}: a classifier of other classes than those of {args.data}')
        classifier = Classifier(len(dataset.classes), pretrained=False)
        load_state(classifier, state['classifier'], source)
        print(f'classifier: {source}, accuracy {state["accuracy"]:.4f} on the validation frames')
    else:
        try:
            classifier = Classifier(len(dataset.classes), pretrained=source or args.pretrained).to(device)
        except Exception as error:
            raise InputError(f"{source or 'the ImageNet weights of ResNet50'}: not to be had ({reason(error)}); give "
                             "torchvision's resnet50-0676ba61.pth with --classifier FILE, or go without: "
                             '--no-pretrained') from error
        state = train_classifier(
            classifier, dataset, epochs=args.classifier_epochs, lr=1e-4 if source or args.pretrained else 1e-3,
            batch_size=args.classifier_batch_size, seed=args.seed, device=device, gpus=gpus, part=part, check=check)
    if not path.exists():
        save_file(state, path)
    part.unlink(missing_ok=True)
    return classifier.to(device)


@torch.inference_mode()
def measure_accuracy(classifier, split, batch_size=64, device='cpu', source=1):
    """The share of a split's pairs that a classifier recognises, by the image or, with source=0, the LMS."""
    correct = sum((classifier(batch[source]).argmax(dim=1) == batch[2]).sum()
                  for batch in split.batches(batch_size, device))
    return float(correct) / len(split)


class IndependentClassifier(nn.Module):
    """torchvision's ResNet18: maps images (B, 3, S, S) in [-1, 1] to (penultimate features (B, 512), logits (B, K)).
    `accuracy` is that on the real frames of validation.
    """

    def __init__(self, resnet, accuracy=None):
        super().__init__()
        self.resnet, self.accuracy = resnet, accuracy

    def forward(self, image):                                        # (B, 3, S, S)
        *layers, fc = self.resnet.children()
        features = nn.Sequential(*layers)(image).flatten(1)
        return features, fc(features)                                # (B, 512), (B, K)


def _kept_beside(dataset, name, make, device, **settings):
    """A classifier make() of a dataset, trained once, from random weights, and kept beside the dataset's cache:
    (the network in eval mode, frozen; its accuracy on validation).
    """
    path, key = dataset.folder / f'{name}.pt', f'{CLASSIFIERS_VERSION} {dataset.fingerprint}'
    with torch.random.fork_rng():           # the run's random numbers stay its own
        torch.manual_seed(CLASSIFIERS_SEED)
        network = make().to(device)
        try:
            state = load_file(path, key=str, classifier=dict, accuracy=float)
        except InputError:
            state = dict(key=None)
        if state['key'] != key:
            state = dict(train_classifier(network, dataset, f'{name} classifier', seed=CLASSIFIERS_SEED, device=device,
                                          **settings), key=key)
            if os.access(path.parent, os.W_OK):
                with writing(path):
                    save_file(state, path)
    load_state(network, state['classifier'], path)
    return network.eval().requires_grad_(False), state['accuracy']


def get_independent(dataset, device='cpu'):
    """The independent classifier of a dataset's real frames, in eval mode. C flatters what it guided; this one is the
    same for all runs on the same data.
    """
    return IndependentClassifier(*_kept_beside(
        dataset, 'independent', partial(torchvision.models.resnet18, num_classes=len(dataset.classes)), device,
        epochs=10, batch_size=16)).eval()


def get_audio_classifier(dataset, device='cpu'):
    """S2IC's audio classifier of a dataset's train sounds, in eval mode: (network, its accuracy on validation)."""
    return _kept_beside(dataset, 'audio', partial(AudioClassifier, len(dataset.classes), dataset.train.size,
                                                  dataset.lms_channels), device, epochs=300, source=0)


# ------------------------------------------------------------------------------------------ figures
# `networks` are those in whose spaces pictures are compared, by the ending of the names of their figures:
# '_independent' and, where its weights are there, '' for Inception.

@torch.inference_mode()
def look_at(image, networks, truth=None, classifier=None):
    """What networks make of images (B, 3, S, S) in [-1, 1] in 8 bits, as every tool that reads files sees them.

    Returns rows on the CPU: 'features' (B, d) and 'probabilities' (B, K), with the network's ending; of `classifier`,
    C, the 'predictions' (B,); the 'l1' (B,) to `truth`, mean over pixels and channels, of the images as they are.
    """
    saved, rows = as_saved(image), {}
    for space, network in networks.items():
        features, logits = network(saved if space else (saved + 1) / 2)             # Inception's are in [0, 1]
        rows |= {f'features{space}': features.cpu(), f'probabilities{space}': logits.softmax(dim=1).cpu()}
    if classifier is not None:
        rows['predictions'] = classifier(saved).argmax(dim=1).cpu()
    if truth is not None:
        rows['l1'] = (image - truth).abs().mean(dim=(1, 2, 3)).cpu()
    return rows


def figures(rows, split, real, classes=()):
    """The figures of one kind of picture, for metrics.json, from its rows and those of the real frames it is compared
    with; with `classes` two of each class as well. What needs more pictures is None: fid and kid want 2, is 100.
    """
    found, seen = {}, rows['probabilities_independent'].argmax(dim=1)
    right = (seen == split.labels).double()
    for space in ('', '_independent'):
        if f'features{space}' in rows:
            sets = rows[f'features{space}'], real[f'features{space}']
            few = min(map(len, sets)) < 2
            found[f'fid{space}'] = None if few else frechet_distance(*sets)
            found[f'kid{space}'] = None if few else kernel_distance(*sets)
            mixed = rows[f'probabilities{space}'][split.order(seed=0)]      # as they lie, each split had few classes
            found[f'is{space}'], found[f'is{space}_std'] = inception_score(mixed) if len(mixed) >= 100 else (None, None)
    if 'predictions' in rows:
        found['accuracy'] = (rows['predictions'] == split.labels).double().mean().item()
    found['accuracy_independent'] = right.mean().item()
    if 'given' in rows:
        found['accuracy_given'] = (seen == rows['given']).double().mean().item()
    found['l1'] = rows['l1'].mean().item()
    if classes:
        found['classes'] = {classes[label]: dict(accuracy_independent=right[split.labels == label].mean().item(),
                                                 l1=rows['l1'][split.labels == label].mean().item())
                            for label in split.labels.unique()}
    return found


@torch.inference_mode()
def measure(model, dataset, networks, batch_size=8, device='cpu', name='', images=None):
    """Look at the pictures for all clips: {split: {kind: rows of look_at()}}, the kinds

        coarse, fine  I' and I''
        real          the frames; their fid and kid will be to the other split's: what a perfect generator would score
        random_frame  a train frame of the clip's class, by seed, not its own: copying; l1 is the mean of some draws
        mean_frame    the mean train frame of its class: what L1 alone wants
        wrong_label   of model E: I'' where G1 and the residue are given the label of another class, by seed ('given')
        other_sound   of model E: I'' from the LMS of another clip of the class and split, by seed.

    Writes each I'' to <split>/<class>/<stem>.png in the folder `images`, where one is given.
    """
    train, C, found = dataset.train, model.residue.classifier, {}
    means = torch.zeros(len(dataset.classes), 3, train.size, train.size, device=device)
    for _, image, label in train.batches(batch_size, device):
        means.index_add_(0, label, image)
    means /= train.labels.bincount(minlength=len(means)).to(device)[:, None, None, None]
    of_means = look_at(means, networks)
    for part, split in dict(train=train, validation=dataset.validation).items():
        n = len(split)      # fewer clips take more draws: one draw of 156 had an l1 three deviations off
        draws = [random_frames(train.labels, split.labels, split is train, i) for i in range(1 + min(7, 1000 // n))]
        progress, batches, others = Progress(), [], random_frames(split.labels, split.labels, own=True)
        shift = torch.randint(1, len(means), (n,), generator=torch.Generator().manual_seed(0))
        wrong = (split.labels + shift) % len(means)
        for indices, (lms, image, label) in zip(split.indices(batch_size), split.batches(batch_size, device)):
            coarse, fine, _ = model(lms, label)
            shown = dict(coarse=coarse, fine=fine, real=image)
            if getattr(model, 'variant', None) == 'E':      # the one of the paper's Table 2
                shown |= dict(wrong_label=model(lms, wrong[indices].to(device))[1],
                              other_sound=model(split.batch(others[indices], device)[0], label)[1])
            batches.append({kind: look_at(x, networks, image, C) for kind, x in shown.items()})
            copied = [look_at(train.batch(drawn[indices], device)[1], {}, image)['l1'] for drawn in draws]
            batches[-1] |= dict(random_frame=dict(l1=torch.stack(copied).mean(dim=0)),
                                mean_frame=look_at(means[label], {}, image))
            for x, i in zip(fine if images else (), indices):
                path = Path(images, part, dataset.classes[split.labels[i]], f'{split.stems[i]}.png')
                path.parent.mkdir(parents=True, exist_ok=True)
                picture(x).save(path)
            progress(f'evaluating {name} {part}: {indices[-1] + 1} of {n}', last=indices[-1] + 1 == n)
        rows = found[part] = {kind: {key: torch.cat([batch[kind][key] for batch in batches]) for key in of_kind}
                              for kind, of_kind in batches[0].items()}
        rows['random_frame'] |= {key: found['train']['real'][key][draws[0]] for key in of_means}
        rows['mean_frame'] |= {key: values[split.labels] for key, values in of_means.items()}
        if 'wrong_label' in rows:
            rows['wrong_label']['given'] = wrong
    return found


# ------------------------------------------------------------------------------------------ command

def evaluate_run(folder, config, model, dataset, device='cpu', network=None, batch_size=0, trained=None, images=None):
    """Measure a model on both splits; write metrics.json, grid.png and failures.png into `folder`, its run or another.
    `network` is FID's Inception, `trained` how far the model was, dict(epoch=, steps=), `images` a folder for every
    I''. Returns what metrics.json holds.
    """
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False        # float32 to the letter
    folder, independent = Path(folder), get_independent(dataset, device)
    folder.mkdir(parents=True, exist_ok=True)
    networks = {'_independent': independent} | ({'': network} if network else {})
    found = measure(model.eval(), dataset, networks, batch_size or 2048 // config['size'] or 1, device, folder, images)
    splits = dict(train=dataset.train, validation=dataset.validation)
    metrics = dict({name: config.get(name) for name in ('data', 'size', 'variant', 'seed', 'preset')},
                   **trained or {}, pictures={name: len(split) for name, split in splits.items()},
                   independent_accuracy=independent.accuracy,
                   versions=dict(torch=torch.__version__, torchvision=torchvision.__version__))
    for (name, split), other in zip(splits.items(), ('validation', 'train')):
        metrics[name] = {kind: figures(rows, split, found[other if kind == 'real' else name]['real'],
                                       dataset.classes if kind == 'fine' else ())
                         for kind, rows in found[name].items()}
    predictions = found['validation']['fine']['probabilities_independent'].argmax(dim=1)
    metrics['validation']['failures'] = failure_grid(model, dataset.validation, dataset.classes, predictions,
                                                     folder / 'failures.png', device)
    with written_whole(folder / 'metrics.json') as part:
        part.write_text(json.dumps(metrics, indent=1) + '\n')

    def nearest(fine):      # train frames, in the independent classifier's space
        distances = torch.cdist(independent(as_saved(fine))[0].cpu(), found['train']['real']['features_independent'],
                                compute_mode='donot_use_mm_for_euclid_dist')            # the quick way loses digits
        return dataset.train.batch(distances.argmin(dim=1))[1]

    draw_grid(example_pictures(model, example_clips(dataset), device, nearest), folder / 'grid.png')
    return metrics


def generate_file(run, args, device):
    """`--audio`: check what was asked for, say what plays unless --label does, and write the pictures."""
    config, model, _ = load_run(run, device)
    out, classes = Path(args.out or Path(args.audio).with_suffix('.png').name), config['classes']
    if config['lms_channels'] != 1:
        raise InputError(f'{args.audio}: this run was trained on LMS drawn as pictures and cannot hear a recording')
    if args.label not in (None, *classes):
        raise InputError(f'--label {args.label}: this run knows {", ".join(classes)}')
    if out.suffix not in RECORDING_ENDINGS:
        raise InputError(f'{out}: a picture ends in {" or ".join(RECORDING_ENDINGS)}; name another file by --out')
    if out.exists():
        raise InputError(f'{out}: exists already; name another file by --out')
    sound, label = read_wav(args.audio), args.label
    if label is None:
        classifier, accuracy = get_audio_classifier(open_run_data(config, args.data, args.cache), device)
        with torch.inference_mode():
            logits = classifier(recording_lms(*sound, config['size']).to(device))             # (half seconds, K)
            heard = logits.log_softmax(dim=1).mean(dim=0).softmax(dim=0)      # the half seconds as independent
        likely = [(classes[i], f'{classes[i]} {heard[i]:.4f}') for i in heard.argsort(descending=True)[:3]]
        label = likely[0][0]
        print(f'{args.audio}: ' + ', '.join(text for _, text in likely)
              + f", by S2IC's audio classifier, whose accuracy on validation is {accuracy:.4f}; --label names another")
    frames = generate_recording(model, classes, *sound, label, config['size'], device, args.hop)
    save_recording(frames, out, args.hop)
    print(f'{out}: {len(frames)} pictures of {label}, every {args.hop:g} s')


def evaluate_folder(run, args, device, network, out=None):
    """Evaluate a run on its data or --data. Returns (folder written to, config, metrics)."""
    config, model, trained = load_run(run, device)
    dataset = open_run_data(config, args.data, args.cache)
    data = args.data and str(Path(args.data).resolve())
    if data and data != config['data']:         # what the run has of its own data stays
        out, config = out or Path(run) / Path(data).name, dict(config, data=data)
    metrics = evaluate_run(out or run, config, model, dataset, device, network, args.batch_size, trained, args.images)
    if not out:
        write_page(Path(run))
    return out or run, config, metrics


def compare_runs(runs, out, device='cpu', data=None, cache=None, folders=None):
    """Tables 1 and 2, Figures 4 to 6 of several runs of one dataset, from the metrics.json of each (in `folders`, where
    they are not in the runs themselves); those that differ in the seed alone are a column. Prints the tables; writes
    them and the figures to the folder `out`.
    """
    configs, groups, columns, shown = [load_config(run) for run in runs], {}, {}, {}
    for run, config, folder in zip(runs, configs, folders or runs):
        groups.setdefault(str(sorted((config | dict.fromkeys(SEEDS_OWN)).items())), []).append((run, config, folder))
    examples = example_clips(open_run_data(configs[0], data, cache))
    for group in sorted(groups.values(), key=lambda group: [*VARIANTS, *BASELINES].index(group[0][1]['variant'])):
        run, config, _ = group[0]
        title = re.sub(r'-seed-\d+$', '', Path(run).resolve().name)
        title = str(run) if title in columns else title
        metrics = [json.loads(Path(folder, 'metrics.json').read_text()) for *_, folder in group]
        columns[title] = config['variant'], metrics
        shown[title] = config['variant'], example_pictures(load_run(run, device)[1], examples, device)
    Path(out).mkdir(parents=True, exist_ok=True)
    paper_figures(shown, out)
    text = paper_tables(columns, out)
    write_folder_page(Path(out), text)
    print(f'\n{text}\n\nin {out}: report.html, tables.md, tables.json and the figures; the rest is in each run')


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('runs', nargs='*', metavar='RUN',
        help='a run of train.py, several side by side, or a folder of runs (default: the newest below runs/)')
    add('--audio', metavar='WAV', help='generate from this recording: a picture for each half second')
    add('--label', metavar='CLASS', help="what plays in it (default: what S2IC's audio classifier hears)")
    add('--hop', type=float, default=0.5, metavar='SECONDS', help='from one picture to the next (default: 0.5)')
    add('--out', metavar='PATH', help="--audio's .png or moving .gif (default: the recording's name, here), a run's "
        'figures (default: the run; with --data, a folder in it) or those of several (default: beside the first)')
    add('--images', metavar='DIR', help="write every I'' of a run as DIR/<split>/<class>/<stem>.png")
    add('--inception', metavar='PATH', help="weights of FID's Inception (default: torch.hub's cache, else downloaded)")
    add('--require-inception', action='store_true', help='stop where they cannot be had (default: do without them)')
    add('--data', metavar='DIR', help="a dataset folder (default: the run's own)")
    add('--cache', metavar='DIR', help=f"where packed data is kept (default: the run's, else {default_cache()})")
    add('--batch-size', type=int, metavar='N', help='clips at once (default: 8 at 256 pixels, 32 at 64)')
    add('--device', metavar='NAME', help='cpu, cuda, cuda:1, ... (default: the first GPU, else the CPU)')
    args = parser.parse_args(argv)
    if args.label and not args.audio:
        parser.error('--label goes with --audio')
    if args.batch_size is not None and args.batch_size < 1 or not 0.02 <= args.hop <= 600:
        parser.error('--batch-size must be at least 1, --hop from 0.02 to 600')
    newest = max(Path('runs').glob('**/checkpoint.pt'), key=lambda path: path.stat().st_mtime, default=None)
    if not (args.runs or newest):
        raise InputError('runs/: no run in it; train one with: python train.py')
    runs = [run for folder in args.runs or [newest.parent]          # a folder of runs stands for those in it
            for run in sorted(path.parent for path in Path(folder).glob('*/config.json')) or [folder]]
    if len(runs) > 1 and (args.audio or args.images):
        parser.error('--audio and --images want one run')
    device = choose_device(args.device)
    if args.audio:
        return generate_file(runs[0], args, device)
    if args.images and Path(args.images).is_dir() and any(Path(args.images).iterdir()):
        raise InputError(f'{args.images}: not an empty folder; name another by --images')
    configs = [load_config(run) for run in runs]        # refused before anything that takes time
    for run, config in zip(runs, configs):
        for name in ('size',) if args.data else ('size', 'data'):
            if config[name] != configs[0][name]:
                raise InputError(f'{run}: {name} {config[name]}; runs side by side want the same data and size')
    try:
        network = inception(args.inception).to(device)
    except InputError as error:
        if args.inception or args.require_inception:
            raise
        print(f'fid, kid and is: not computed: {error}', file=sys.stderr)
        network = None
    if len(runs) == 1:
        return print(report_text(*evaluate_folder(runs[0], args, device, network, args.out)))
    folders = [evaluate_folder(run, args, device, network)[0] for run in runs]
    compare_runs(runs, args.out or Path(runs[0]).resolve().parent, device, args.data, args.cache, folders)


if __name__ == '__main__':
    run_command(main)
