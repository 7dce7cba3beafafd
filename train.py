"""Train CAR-GAN, sections 3.3 to 3.5: first the classifier C on real frames, then G1, G2 and D.

    python train.py                                 # the built-in demo data, minutes on a CPU
    python train.py --data Sub-URMP                 # the paper's run: 256x256, batch 64, 200 epochs
    python train.py --data mydata --preset small    # little data: a gentler Adam, averaged weights
    python train.py --resume runs/NAME              # go on where a run stopped
    python train.py --data Sub-URMP --variant all --seed 0 1 2 --out runs/paper    # its tables
    torchrun --nproc_per_node=4 train.py --data Sub-URMP    # a process a GPU, on one node or many

All settings are the paper's unless a preset or a flag says otherwise. A run is one folder:
config.json, classifier.pt (C), checkpoint.pt (to go on), model.pt (to generate), log.csv, samples/,
report.html. What it has learned: python evaluate.py RUN.
"""
import argparse
import copy
import os
import platform
import shlex
import signal
import sys
import time
from contextlib import nullcontext
from functools import cached_property
from math import ceil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.fusion import fuse_conv_bn_eval

import baselines
from baselines import BASELINES, EPOCHS, SETTINGS, AudioClassifier
from cargan import (VARIANTS, Classifier, PatchDiscriminator, classification_loss,
                    discriminator_loss, generator_loss, l1_loss, objective)
from demo import demo_data
from generate import (AUDIO_KEY, draw_grid, example_clips, example_pictures, kept_classifier,
                      load_generators, make_model)
from preprocess import open_dataset
from report import LOSSES, Log, way_back, write_page
from runs import (InputError, Progress, at_least, broadcast, choose_device, default_cache, digest,
                  distributed, duration, epochs_done, load_config, load_file, load_state, note,
                  open_run, peak_memory, power_of_two, rank, rank0_first, reason,
                  run_command, save_file, world_size, write_config, writing)


# --------------------------------------------------------------------------- the classifier C (3.3)

def hold_out(labels, seed):
    """The indices of nine tenths of a split and of the rest, n // 10 of each class, by seed."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    kept, tenth = [], []
    for label in labels.unique():
        pairs = order[labels[order] == label]
        kept.append(pairs[len(pairs) // 10:])
        tenth.append(pairs[:len(pairs) // 10])
    return torch.cat(kept).sort().values, torch.cat(tenth).sort().values


PART_SECONDS = 5.0      # at least, between two files that a classifier's training goes on from


def train_classifier(classifier, dataset, name='classifier', epochs=20, steps=None, lr=1e-3,
                     batch_size=32, seed=0, device='cpu', gpus=(), part=None, source=1):
    """Train a classifier on nine tenths of train with cross-entropy and a rate that falls to zero.
    The last of those epochs counts that recognise most of the other tenth; the very last one where
    no class has ten pairs.

    steps: a bound on the epochs and on the steps of one, for large data. source: which tensor of a
    batch to classify, 1 the image, 0 the LMS. After epochs the file `part` is written, from which
    the training goes on. Leaves the classifier at that epoch, in eval mode. Returns
    dict(classifier=its state, classes=, accuracy=on validation, held_out=on the tenth or None,
    epoch=). Raises InputError where the loss is not finite.
    """
    held_out = hold_out(dataset.train.labels, seed)
    kept, tenth = (dataset.train.subset(indices) for indices in held_out)
    count = kept.count(batch_size, least=2)         # BatchNorm cannot train on one picture
    if steps is not None:
        count = min(count, steps)
        epochs = min(epochs, ceil(steps / count))
    parallel = nn.DataParallel(classifier, gpus) if len(gpus) > 1 else classifier
    groups = classifier.parameters()
    if isinstance(classifier, AudioClassifier):
        groups = classifier.parameter_groups()      # weight decay of some
    optimizer = torch.optim.Adam(groups, lr=lr, fused=True)
    progress, best, begun = Progress(sys.stdout), {}, 0
    saved = time.monotonic()
    if part is not None and part.exists():
        state = load_file(part, classifier=dict, optimizer=dict, best=dict, epoch=int)
        load_state(classifier, state['classifier'], part)
        load_state(optimizer, state['optimizer'], part)
        best, begun = state['best'], state['epoch']

    for epoch in range(begun + 1, epochs + 1):
        torch.manual_seed(seed + epoch)             # for dropout, where a classifier has some
        classifier.train()
        batches = kept.batches(batch_size, device, seed + epoch, least=2)
        for step, batch in zip(range(count * (epoch - 1), count * epoch), batches):
            for group in optimizer.param_groups:
                group['lr'] = lr * (1 - step / (epochs * count))
            loss = F.cross_entropy(parallel(batch[source]), batch[2])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if progress.due():
                progress(f'{name} epoch {epoch}/{epochs}  step {step % count + 1}/{count}  '
                         f'loss {loss.item():.4f}')
        if not loss.isfinite():
            raise InputError(f'{name}: its loss is {loss.item()}; another --seed or --classifier '
                             'FILE may help')
        classifier.eval()
        text, accuracy = f'{name} epoch {epoch}/{epochs}  loss {loss.item():.4f}', None
        if len(tenth):
            accuracy = measure_accuracy(classifier, tenth, batch_size, device, source)
            text += f'  accuracy {accuracy:.4f} on a tenth of train'
        progress(text, last=epoch == epochs)
        if accuracy is None or accuracy >= best.get('held_out', -1):
            weights = copy.deepcopy(classifier.state_dict())
            best = dict(classifier=weights, held_out=accuracy, epoch=epoch)
        if part is not None and time.monotonic() - saved >= PART_SECONDS:
            save_file(dict(classifier=classifier.state_dict(), optimizer=optimizer.state_dict(),
                           best=best, epoch=epoch), part)
            saved = time.monotonic()

    classifier.eval().load_state_dict(best['classifier'])
    optimizer.zero_grad()           # the gradients would stay for as long as the classifier does
    accuracy = measure_accuracy(classifier, dataset.validation, batch_size, device, source)
    print(f'{name}: accuracy {accuracy:.4f} on validation after epoch {best["epoch"]}', flush=True)
    return dict(best, classes=dataset.classes, accuracy=accuracy)


@torch.inference_mode()
def measure_accuracy(classifier, split, batch_size=64, device='cpu', source=1):
    """The share of a split that a classifier recognises by the image or, source=0, the LMS."""
    correct = 0
    for batch in split.batches(batch_size, device):
        correct += (classifier(batch[source]).argmax(dim=1) == batch[2]).sum().item()
    return correct / len(split)


def get_classifier(args, dataset, path, device, gpus=()):
    """C: the classifier in the file `path`; before, that of --classifier is copied there, or one is
    trained. Raises InputError where the file is of other classes, or ImageNet's weights are not to
    be had.
    """
    if not path.exists():
        part = path.with_name(f'classifier-{args.seed}-{dataset.fingerprint[:8]}-part.pt')
        with writing(path):     # the runs of a group share it: another command may train it now
            if not path.exists():
                save_file(make_classifier(args, dataset, part, device, gpus), path)
                part.unlink(missing_ok=True)
    state = load_file(path, classifier=dict, classes=list, accuracy=float)
    _check_classes(state, dataset, path)
    classifier = Classifier(len(dataset.classes), pretrained=False)
    load_state(classifier, state['classifier'], path)
    if len(dataset.classes) > 1:
        print(f'classifier: {path}, accuracy {state["accuracy"]:.4f} on validation')
    return classifier.to(device)


def _check_classes(state, dataset, path):
    if state.get('classes') != dataset.classes:
        raise InputError(f'{path}: a classifier of other classes than the data has')


def make_classifier(args, dataset, part, device, gpus):
    """What train_classifier() returns of C, or the file --classifier where a run made that."""
    if len(dataset.classes) == 1:
        return dict(classifier={}, classes=dataset.classes, accuracy=1.0)
    source = args.classifier
    if source:
        state = load_file(source)
        if 'classifier' in state:
            _check_classes(state, dataset, source)      # before it is copied
            load_state(Classifier(len(dataset.classes), False), state['classifier'], source)
            return state
    pretrained = source or args.pretrained
    torch.manual_seed(args.seed)
    try:
        classifier = Classifier(len(dataset.classes), pretrained).to(device)
    except Exception as error:
        what = source or 'the ImageNet weights of ResNet50'
        raise InputError(f"{what}: not to be had ({reason(error)}); give torchvision's "
                         'resnet50-0676ba61.pth with --classifier FILE, or go without: '
                         '--no-pretrained') from error
    lr = 1e-4 if pretrained else 1e-3
    batch_size = min(32, 4 * args.batch_size)       # one flag lowers the memory of both trainings
    return train_classifier(classifier, dataset, epochs=args.classifier_epochs, lr=lr,
                            batch_size=batch_size, seed=args.seed, device=device, gpus=gpus,
                            part=part)


KEPT_SEED = 190701826       # of the classifiers that are kept beside a dataset


def kept_beside(dataset, name, make, key, device, **settings):
    """A classifier make() of a dataset, trained once, from random weights, and kept beside the
    dataset's cache: (the network in eval mode, frozen; its accuracy on validation).
    """
    path = dataset.folder / f'{name}.pt'
    gpus = [device] if torch.device(device).type == 'cuda' else []
    with torch.random.fork_rng(gpus), writing(path):    # the run's random numbers stay its own
        torch.manual_seed(KEPT_SEED)
        network = make().to(device)
        accuracy = kept_classifier(dataset, name, network, key)
        if accuracy is None:
            part = path.with_name(f'{name}-{dataset.fingerprint[:8]}-part.pt')
            state = train_classifier(network, dataset, f'{name} classifier', seed=KEPT_SEED,
                                     device=device, part=part, **settings)
            accuracy = state['accuracy']
            save_file(dict(state, key=f'{key} {dataset.fingerprint}'), path)
            part.unlink(missing_ok=True)
    return network.eval().requires_grad_(False), accuracy


def get_audio_classifier(dataset, device='cpu'):
    """S2IC's audio classifier of a dataset's sounds: (network, its accuracy on validation)."""
    def make():
        return AudioClassifier(len(dataset.classes), dataset.train.size, dataset.lms_channels)

    return kept_beside(dataset, 'audio', make, AUDIO_KEY, device, epochs=300, steps=1500, source=0)


# --------------------------------------------------------------------- one step of each side (3.4)
# Modules, so that DataParallel can split them. Autocast is entered inside, as it is a thread's own.
# Terms are means times the number of pairs, so that those of parts of a batch add up.

def fuse_classifier(model):
    """The model as the steps use it: the same G1 and G2, but a copy of C whose BatchNorms, in eval
    mode, are part of the convolutions before them: the same function by fewer operations. Files
    and metrics are of the C that the model itself holds.
    """
    shared = {id(G): G for name, G in model.named_children() if name != 'residue'}
    model = copy.deepcopy(model, shared)
    for block in list(model.residue.modules()):
        layers = list(block.named_children())
        for (name, layer), (following, norm) in zip(layers, layers[1:]):
            if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(block, name, fuse_conv_bn_eval(layer, norm))
                setattr(block, following, nn.Identity())
    return model


class GeneratorStep(nn.Module):
    """The G step's forward: a batch -> L_C, L_cGAN and L_L1, (1, 3); I', I'', detached, for D."""

    def __init__(self, model, D, stage_weights=(1.0, 1.0), saturating=True, dtype=torch.float32):
        super().__init__()
        self.model, self.D = model, D
        self.stage_weights, self.saturating, self.dtype = stage_weights, saturating, dtype

    def forward(self, lms, image, label):
        with torch.autocast(lms.device.type, self.dtype, enabled=self.dtype != torch.float32):
            coarse, fine, coarse_logits = self.model(lms, label)                # I', I'', C(I')
            stages, logits = [coarse], [coarse_logits]
            if self.model.variant != 'D':                                       # D has no stage II
                stages.append(fine)
                logits.append(self.model.residue.classifier(fine))
            judged = [self.D(torch.cat([lms, stage], dim=1)) for stage in stages]
            L_C = classification_loss(label, *logits)                           # Eq. (2)
            L_cGAN = generator_loss(*judged, weights=self.stage_weights,        # Eq. (3) to (5)
                                    saturating=self.saturating)
            L_L1 = l1_loss(image, *stages)
        terms = torch.stack([L_C, L_cGAN, L_L1])
        return terms[None] * len(label), tuple(stage.detach() for stage in stages)


class DiscriminatorStep(nn.Module):
    """The D step's forward: a batch and the fakes of the G step -> L_D, (1,).

    Real and fake images pass D in separate batches, as in [14]: in a common one each moves the
    BatchNorm statistics that the others are judged by.
    """

    def __init__(self, D, stage_weights=(1.0, 1.0), dtype=torch.float32):
        super().__init__()
        self.D, self.stage_weights, self.dtype = D, stage_weights, dtype

    def forward(self, lms, image, label, fakes):
        with torch.autocast(lms.device.type, self.dtype, enabled=self.dtype != torch.float32):
            real = self.D(torch.cat([lms, image], dim=1))
            judged = [self.D(torch.cat([lms, fake], dim=1)) for fake in fakes]
            L_D = discriminator_loss(real, *judged, weights=self.stage_weights)     # Eq. (3) to (5)
        return L_D[None] * len(label)


class Trainer:
    """G1, G2, C and D with their optimisers: section 3.5's two alternating steps. Or a baseline's
    networks, trained by its own losses; `audio` is S2IC's audio classifier.
    """

    def __init__(self, args, num_classes, lms_channels, classifier, device, gpus=(), audio=None):
        torch.manual_seed(args.seed)    # the same start, whether C was trained just now or loaded
        self.args, self.device = args, device
        self.gpus = list(gpus)
        if device.type == 'cuda' and not gpus:
            self.gpus = [device]
        self.epoch, self.pairs = 0, 0       # whole epochs, and pairs of the one that has begun
        self.steps = 0                      # of all epochs

        self.model = make_model(args.variant, num_classes, args.size, args.base, lms_channels,
                                classifier, args.dropout, args.init_std, audio,
                                args.detach_residue)
        if args.variant in BASELINES:
            discriminator = BASELINES[args.variant][1]
            self.D = discriminator(args.size, args.disc_base, lms_channels, args.init_std)
        else:
            self.D = PatchDiscriminator(lms_channels + 3, args.disc_base, args.variant != 'A',
                                        args.init_std)
        for network in self.model.train(), self.D:
            network.to(device, memory_format=torch.channels_last)   # faster, on a CPU too
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.trained = list(trained.values())       # all but C, which is frozen
        self.average = None
        if args.ema:        # copy, freeze, but share C; step() moves it
            C = self.model.residue.classifier
            self.average = copy.deepcopy(self.model, {id(C): C}).requires_grad_(False)
            self.averaged = [self.average.get_parameter(name) for name in trained]

        Adam = dict(lr=args.lr, betas=args.betas, fused=True)
        self.G_optimizer = torch.optim.Adam(self.trained, **Adam)
        self.D_optimizer = torch.optim.Adam(self.D.parameters(), **Adam)
        dtype = {'bf16': torch.bfloat16, 'fp16': torch.float16, 'off': torch.float32}[
            amp_mode(args, device)]
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        lambda_c, self.lambda_gan, lambda_l1, *stage_weights = args.lambdas
        if args.variant == 'B':
            lambda_c = 0.0
        self.lambdas = lambda_c, self.lambda_gan, lambda_l1
        if args.variant in BASELINES:
            G_step = baselines.GeneratorStep(self.model, self.D, dtype)
            D_step = baselines.DiscriminatorStep(self.model, self.D, dtype)
        else:
            model = fuse_classifier(self.model)
            G_step = GeneratorStep(model, self.D, stage_weights, args.saturating, dtype)
            D_step = DiscriminatorStep(self.D, stage_weights, dtype)
        if args.compile:
            for step in G_step, D_step:
                step.compile(dynamic=False)         # an epoch has batches of two sizes at most
        self.set_requires_grad(self.G_optimizer)    # DistributedDataParallel asks what a step moves
        self.G_step = self._parallel(G_step, gpus)
        self.set_requires_grad(self.D_optimizer)
        self.D_step = self._parallel(D_step, gpus)
        if rank() > 0:
            torch.manual_seed(args.seed + 15485863 * rank())    # each process drops out its own

    def _parallel(self, step, gpus):
        if world_size() > 1:
            devices = [self.device] if self.device.type == 'cuda' else None
            # Buffers stay each process's own. Training does not read BatchNorm's, and rank 0 sets
            # them anew before it alone saves and draws; spectral norms follow the common weights.
            return DistributedDataParallel(step, devices, gradient_as_bucket_view=True,
                                           broadcast_buffers=False)
        return nn.DataParallel(step, gpus) if len(gpus) > 1 else step

    def set_requires_grad(self, optimizer):
        """Let one optimiser's weights move alone."""
        for side in self.G_optimizer, self.D_optimizer:
            for p in side.param_groups[0]['params']:
                p.requires_grad_(side is optimizer)

    def step(self, lms, image, label, size=None):
        """G1 and G2 with D fixed, then D with G1 and G2 fixed. Returns LOSSES (4,) on the device.

        `size` is that of the whole batch, where other processes have a part of it; where it has
        fewer pairs than there are processes, those that are left have a stand-in, which weighs
        nothing.
        """
        size = size or len(label)
        share = world_size() / size         # DistributedDataParallel divides by world_size()
        if rank() >= size:
            share = 0.0

        self.set_requires_grad(self.G_optimizer)
        terms, fakes = self.G_step(lms, image, label)
        terms = terms.sum(dim=0) * share                                    # L_C, L_cGAN, L_L1
        self._descend(self.G_optimizer, objective(*terms, *self.lambdas))   # Eq. (6)

        self.set_requires_grad(self.D_optimizer)
        L_D = self.D_step(lms, image, label, fakes).sum() * share
        self._descend(self.D_optimizer, self.lambda_gan * L_D)

        self.scaler.update()
        self.steps += 1
        self._move_average()
        return torch.cat([terms, L_D[None]]).detach()

    def _descend(self, optimizer, loss):
        optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(optimizer)

    def _move_average(self):
        if self.average:        # its half-life is at most a fifth of the images seen
            batch = self.args.batch_size
            half_life = min(self.args.ema, 0.2 * self.steps * batch)
            torch._foreach_lerp_(self.averaged, self.trained, 1 - 0.5 ** (batch / half_life))

    @property
    def inference(self):
        """The model that generates outside training: the average where there is one."""
        return self.average or self.model

    @cached_property
    def classifier_digest(self):
        return digest(self.model.residue.classifier)        # of 94 MB, which do not change


# ---------------------------------------------------------------------------------------- the loop

def train_gan(trainer, dataset, args, run, saver, classifier='classifier.pt'):
    """The epochs that are left: a checkpoint with a picture grid after each of the first five,
    every fifth and the last, another every ten minutes and when a signal asks to stop.
    `classifier`: C's file, from the run.
    """
    split, progress, examples = dataset.train, Progress(sys.stdout), example_clips(dataset)
    log = Log(run / 'log.csv', trainer.steps)
    left = (args.epochs - trainer.epoch) * len(split) - trainer.pairs
    start, seen = time.monotonic(), 0
    warned = False

    for epoch in range(trainer.epoch + 1, args.epochs + 1):
        order = args.seed + 1000003 * epoch     # of the epoch alone: a resume needs no state
        L_D = []
        batches = split.batches(args.batch_size, trainer.device, order, trainer.pairs, rank(),
                                world_size())
        for indices, batch in zip(split.indices(args.batch_size, order, trainer.pairs), batches):
            losses = trainer.step(*batch, size=len(indices))
            trainer.pairs += len(indices)
            seen += len(indices)
            L_D.append(losses[3])
            log.add(trainer.steps, epoch, losses,
                    lambda indices=indices: [split.stems[i] for i in indices])
            if seen == len(indices) and rank() == 0:
                save_config(args, run, dataset)     # a resume has begun: its settings are the run's
            whole = trainer.pairs == len(split)
            if whole or progress.due():
                rate = seen / (time.monotonic() - start)
                words = [f'epoch {epoch}/{args.epochs}', f'pair {trainer.pairs}/{len(split)}']
                words += [f'{name} {loss:.4f}' for name, loss in zip(LOSSES, losses.tolist())]
                words += [f'{rate:.1f} images/s', f'{duration((left - seen) / rate)} left']
                progress('  '.join(words), last=whole)
            if whole:
                trainer.epoch, trainer.pairs = epoch, 0
                warned = warned or d_has_won(L_D, epoch)
            sampled = whole and (epoch < 5 or epoch % 5 == 0 or epoch == args.epochs)
            if saver.due() or sampled:
                log.flush()         # first, as it may find that the weights are not worth keeping
                save_checkpoint(trainer, run, split, classifier)
                if rank() == 0:
                    seconds = time.monotonic() - start
                    args.made['epoch'] = trainer.epoch
                    args.made['since the last start'] = (f'{duration(seconds)}, '
                                                         f'{seen / seconds:.1f} images/s')
                    save_config(args, run, dataset)
            if sampled and rank() == 0:
                rows = example_pictures(trainer.inference, examples, trainer.device)
                draw_grid(rows, run / 'samples' / f'epoch-{epoch:04d}.png')
                write_page(run)
            if saver.signal:
                return


VICTORY = 0.01      # of D: below this mean of L_D its gradient teaches G little


def d_has_won(L_D, epoch):
    """Whether the L_D of an epoch's steps say so; then it is said on stderr."""
    mean = torch.stack(L_D).mean().item()
    won = mean < VICTORY
    if won and rank() == 0:
        note(f'note: L_D was {mean:.4f} over epoch {epoch}: D has won, and G learns little from '
             'it; try --init-std 0.02, which helped most, or --no-saturating')
    return won


def save_config(args, run, dataset):
    """Write what a run's config.json holds."""
    write_config(run, vars(args), classes=dataset.classes, lms_channels=dataset.lms_channels)


# -------------------------------------------------------------------------------- nothing is lost

SAVE_MINUTES = 10.0


class Saver:
    """Says when to save: every ten minutes, and once SIGINT or SIGTERM asks to stop. While it is
    open the first signal lets the step under way come to its end; a second SIGINT ends the process
    at once.
    """

    def __init__(self):
        self.asked = 0          # the signal that has come to this process
        self.signal = 0         # the one that all processes know of
        self.saved = time.monotonic()

    def __enter__(self):
        numbers = signal.SIGINT, signal.SIGTERM
        self.previous = {number: signal.signal(number, self._stop) for number in numbers}
        return self

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _stop(self, number, frame):
        self.asked = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.write(2, b'\nfinishing the step; it will be saved\n')        # print() is not safe here

    def due(self):
        """Whether to save after this step. All processes ask, and have the same answer."""
        late = time.monotonic() - self.saved >= 60 * SAVE_MINUTES
        wish = torch.tensor([self.asked, late], dtype=torch.int64)
        if world_size() > 1:
            dist.all_reduce(wish, dist.ReduceOp.MAX)
        self.signal, late = wish.tolist()
        if late:
            self.saved = time.monotonic()
        return bool(self.signal or late)


@torch.no_grad()
def recalibrate_batchnorm(model, batches, pictures=256):
    """Set the running statistics of the generators' BatchNorm to those over so many pictures of
    `batches`, (lms, image, label) each, without dropout: at the paper's learning rate the weights
    outrun the running averages, which training does not read. Variances are over all pictures at
    once: small batches lose what lies between their means.
    """
    training, sums, done = model.training, {}, 0
    norms = [module for module in model.train().modules()       # C's stay in eval mode
             if isinstance(module, nn.BatchNorm2d) and module.training]

    def add_moments(norm, inputs):
        var, mean = torch.var_mean(inputs[0], dim=(0, 2, 3), correction=0)              # (C,)
        moments = torch.stack([torch.ones_like(mean), mean, var + mean ** 2]).cpu().double()
        sums[norm] = sums.get(norm, 0) + moments * (inputs[0].numel() // len(mean))     # (3, C)

    model.eval()
    hooks = [norm.train().register_forward_pre_hook(add_moments) for norm in norms]
    for lms, _, label in batches:
        model(lms, label)
        done += len(label)
        if done >= pictures:
            break
    for hook in hooks:
        hook.remove()
    for norm, (n, total, squares) in sums.items():      # what of CMCGAN does not generate has none
        norm.num_batches_tracked.zero_()        # the same after every save
        norm.running_mean.copy_(total / n)
        norm.running_var.copy_((squares - total ** 2 / n) / (n - 1))
    model.train(training)


def generator_state(model):
    """The state_dict of G1 and G2 alone: C is in a file of its own."""
    state = model.state_dict()
    return {name: tensor for name, tensor in state.items() if not name.startswith('residue.')}


def trainer_state(trainer):
    """All that a bit-exact resume needs, but for C."""
    mine = torch.get_rng_state(), [torch.cuda.get_rng_state(gpu) for gpu in trainer.gpus]
    random = [mine]
    if world_size() > 1:
        random = [None] * world_size()
        dist.all_gather_object(random, mine)
    state = dict(epoch=trainer.epoch, pairs=trainer.pairs, steps=trainer.steps, random=random)
    state['model'] = generator_state(trainer.model)
    state['average'] = generator_state(trainer.average) if trainer.average else {}
    for name in 'D', 'G_optimizer', 'D_optimizer', 'scaler':
        state[name] = getattr(trainer, name).state_dict()
    return state


def save_checkpoint(trainer, run, split, classifier='classifier.pt'):
    """Recalibrate BatchNorm on pictures of `split`; write model.pt, then checkpoint.pt, each whole
    or not at all: no kill leaves a model.pt older than the checkpoint. C is in the file
    `classifier`, relative to the run. Raises InputError where the weights are not finite (the files
    before are kept) or the disk is full.
    """
    if rank() == 0:
        batches = split.batches(max(trainer.args.batch_size, 16), trainer.device, trainer.args.seed)
        recalibrate_batchnorm(trainer.inference, batches)
    state = trainer_state(trainer)      # of all processes
    for network in 'model', 'average', 'D':
        for name, tensor in state[network].items():
            if not tensor.isfinite().all():
                raise InputError(f'{name} is not finite after step {trainer.steps}; '
                                 f'{way_back(run)}')
    if rank() == 0:
        C = dict(classifier=classifier, classifier_digest=trainer.classifier_digest)
        save_file(dict(C, model=state['average'] or state['model'], epoch=trainer.epoch,
                       steps=trainer.steps), run / 'model.pt')
        save_file(dict(C, **state), run / 'checkpoint.pt')


def load_checkpoint(trainer, path):
    """Go on from a checkpoint. Raises InputError, naming the file, where it does not fit, or was
    trained with another C.
    """
    state = load_file(path, model=dict, average=dict, D=dict, classifier_digest=str)
    if state['classifier_digest'] != trainer.classifier_digest:
        raise InputError(f'{path.parent / state["classifier"]}: not the classifier that {path} was '
                         'trained with; put that one back')
    load_generators(trainer.model, state['model'], path)
    if trainer.average:         # one that begins now begins with the weights
        load_generators(trainer.average, state['average'] or state['model'], path)
    load_state(trainer.D, state['D'], path)
    try:
        for name in 'G_optimizer', 'D_optimizer':
            optimizer = getattr(trainer, name)
            optimizer.load_state_dict(state[name])
            group, = optimizer.param_groups
            group.update(lr=trainer.args.lr, betas=tuple(trainer.args.betas))
            for p, moments in optimizer.state.items():
                if any(moments[name].shape != p.shape for name in ('exp_avg', 'exp_avg_sq')):
                    raise ValueError('the optimiser is of other weights')
        if state['scaler']:     # of fp16 alone
            trainer.scaler.load_state_dict(state['scaler'])
        if len(state['random']) == world_size():
            random, cuda_random = state['random'][rank()]
            torch.set_rng_state(random)
            for gpu, random in zip(trainer.gpus, cuda_random):
                torch.cuda.set_rng_state(random, gpu)
        for name in 'epoch', 'pairs', 'steps':
            setattr(trainer, name, int(state[name]))
    except Exception as error:  # whatever a file from a stranger holds
        raise InputError(f'{path}: not a checkpoint of this run ({reason(error)})') from error


# -------------------------------------------------------------------------------------- a whole run

def choose_gpus(args):
    """The GPUs that share each batch: all, but no more than leave each four pictures of it."""
    if args.device not in (None, 'cuda'):
        return []
    count = min(torch.cuda.device_count(), max(1, args.batch_size // 4))
    return list(range(count))


def amp_mode(args, device):
    """What --amp stands for on this device: bf16 on a GPU that has it, off elsewhere."""
    if args.amp is None and device.type == 'cuda' and torch.cuda.is_bf16_supported(False):
        return 'bf16'
    return args.amp or 'off'


def set_precision(args, device):
    """TF32 unless --amp off asks for float32."""
    torch.backends.cudnn.benchmark = True
    tf32 = amp_mode(args, device) != 'off'
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32


def device_name(device):
    """What the networks compute on, in words."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return f'{platform.machine()} CPU, {torch.get_num_threads()} threads'


def classifier_file(args, run):
    """Where C is, or will be: the runs of a group share it. Raises InputError where the one that a
    checkpoint was trained with is gone.
    """
    checkpoint = run / 'checkpoint.pt'
    if os.path.lexists(checkpoint):         # a broken link is no reason to start again
        path = run / load_file(checkpoint, mmap=True, classifier=str)['classifier']
        if not path.exists():
            raise InputError(f'{path}: the classifier that {checkpoint} was trained with is gone; '
                             'put it back')
        return path
    return (run.parent if args.group else run) / 'classifier.pt'


def train(args, run, device, gpus):
    """A run from its data to its last checkpoint. Returns the signal that stopped it, or 0."""
    set_precision(args, device)
    if args.resume and args.data and not Path(args.data).is_dir():
        raise InputError(f'{args.data}: the data of {run} is not there; say where by --data DIR')
    data = rank0_first(lambda: args.data or demo_data(args.size, args.cache), local=True)
    dataset = rank0_first(lambda: open_dataset(data, args.size, args.cache, workers=args.workers),
                          local=True)
    if len(dataset.classes) == 1:
        if args.variant == 'S2IC':
            raise InputError(f'{data}: only one class, {dataset.classes[0]}: S2IC hears by a '
                             'classifier of sounds, which wants two')
        print(f'only one class, {dataset.classes[0]}: C has nothing to tell apart and is not '
              'trained; L_C and the residue are 0')
    if rank() == 0:
        args.made['machine'] = device_name(device)
        if not args.resume:     # a resume that is refused leaves its run as it was
            save_config(args, run, dataset)
    where = f'GPUs {gpus}' if len(gpus) > 1 else str(device)
    if world_size() > 1:
        where = f'{world_size()} processes, this one on {where}'
    print(f'run {run}: {len(dataset.train)} pairs in train, {len(dataset.validation)} in '
          f'validation, {len(dataset.classes)} classes; on {where}', flush=True)
    try:
        path = classifier_file(args, run)
        classifier = rank0_first(lambda: get_classifier(args, dataset, path, device, gpus))
        audio = None
        if args.variant == 'S2IC':
            audio, _ = rank0_first(lambda: get_audio_classifier(dataset, device), local=True)
        trainer = Trainer(args, len(dataset.classes), dataset.lms_channels, classifier, device,
                          gpus, audio)
        if (run / 'checkpoint.pt').exists():
            load_checkpoint(trainer, run / 'checkpoint.pt')
            if trainer.pairs >= len(dataset.train):     # there are fewer than there were
                trainer.pairs = 0
            print(f'resumed after {trainer.epoch} of {args.epochs} epochs and {trainer.pairs} '
                  'pairs')
        with Saver() as saver:
            train_gan(trainer, dataset, args, run, saver, os.path.relpath(path, run))
        return saver.signal
    except torch.OutOfMemoryError as error:
        raise InputError(f'the memory of {device} is too small: --batch-size {args.batch_size} '
                         'must be lower') from error


def run_one(args, run, device, gpus, again):
    """Train a run, alone in its folder; say by which command it goes on where it was stopped."""
    with open_run(run, args.resume) if rank() == 0 else nullcontext():
        try:
            number = train(args, run, device, gpus)
        except KeyboardInterrupt:       # while the data is packed, or a classifier trained
            print('\nstopped; a classifier goes on from an epoch that ended at most five seconds '
                  f'before its last. Go on with: {again}')
            raise
    if number:
        print(f'\nstopped by {signal.Signals(number).name} and saved; go on with: {again}')
        sys.exit(128 + number)


# ------------------------------------------------------------------------------------- several runs

def is_done(args, run):
    """Whether a run's checkpoint has all its epochs; a broken one is for its training to name."""
    try:
        return epochs_done(run) >= args.epochs
    except InputError:
        return False


def plan_runs(settings):
    """The runs of parse_args(), [(settings, folder)]; one that is there goes on. Raises InputError
    where one that is there, and not done, has other settings.
    """
    first = settings[0]
    if first.resume or not first.group:
        name = Path(first.data).resolve().name if first.data else 'demo'
        new = f'runs/{name}-{first.variant}-{time.strftime("%Y%m%d-%H%M%S")}'
        return [(first, Path(first.resume or first.out or new))]
    plan = []
    for args in settings:
        run = Path(args.out, f'{args.variant}-seed-{args.seed}')
        if (run / 'config.json').exists():
            config = load_config(run)
            args.resume = str(run)
            args.made = config.get('made', {})      # it may be the same command in other words
            if not is_done(args, run):
                _check_same(args, config, run)
        plan.append((args, run))
    return plan


def _check_same(args, config, run):
    for name, value in vars(args).items():
        if name in ('data', 'cache') and value:
            value = str(Path(value).resolve())
        if name in ('out', 'resume', 'device', 'workers', 'compile', 'classifier'):
            continue
        if config.get(name) != value:
            raise InputError(f'{run}: its {name} is {config.get(name)}, not {value}: the same '
                             f'settings go on there; finish it by --resume {run}, or name another '
                             '--out')


def train_all(plan, device, gpus):
    """The runs of a group that are not done, one after the other. One that fails does not keep the
    others: raises InputError at the end, naming those that failed.
    """
    left = broadcast([(args, run) for args, run in plan if not is_done(args, run)])
    start, failed = time.monotonic(), []
    for done, (args, run) in enumerate(left):
        text = f'\nrun {len(plan) - len(left) + done + 1} of {len(plan)}: {run}'
        if done:
            seconds = (time.monotonic() - start) / done * (len(left) - done)
            text += f'; all will be done in about {duration(seconds)}'
        print(text)
        try:
            run_one(args, run, device, gpus, 'the same command')
        except InputError as error:
            if world_size() > 1:        # the other processes may wait for this one
                raise
            failed.append(run)
            note(f'{run} failed: {error}')
    if failed:
        names = ', '.join(map(str, failed))
        raise InputError(f'{len(failed)} of {len(plan)} runs failed: {names}; each said why above. '
                         'Finish them by --resume; then the same command goes on')


# ---------------------------------------------------------------------------------------- benchmark

def benchmark(args, device, gpus):
    """Time --benchmark steps on random data; print images/s and peak memory."""
    set_precision(args, device)
    trainer = Trainer(args, 13, 1, None, device, gpus)
    local = ceil(args.batch_size / world_size())
    lms, image = (torch.rand(local, channels, args.size, args.size, device=device) * 2 - 1
                  for channels in (1, 3))
    batch = lms, image, torch.arange(local, device=device) % 13
    for _ in range(3):      # they warm up: memory, cuDNN's choice
        losses = trainer.step(*batch)
    losses.tolist()         # waits for the device
    start = time.monotonic()
    for _ in range(args.benchmark):
        losses = trainer.step(*batch)
    losses.tolist()
    rate = args.benchmark * local * world_size() / (time.monotonic() - start)
    peak = peak_memory()
    if device.type == 'cuda':
        peak = torch.cuda.max_memory_allocated(device)
    print(f'size {args.size}, base {args.base}, disc-base {args.disc_base}, batch '
          f'{local * world_size()}, amp {amp_mode(args, device)}; {device_name(device)}')
    text = f'{rate:.2f} images/s'
    if peak:
        text += f'; peak memory {peak / 1e9:.2f} GB'
    print(text, flush=True)


# ----------------------------------------------------------------------------------------- command

SMALL = dict(base=32, disc_base=16, dropout=0.0, init_std=0.02, batch_size=8, epochs=40, lr=4e-4,
             betas=[0.5, 0.999], saturating=False, detach_residue=True, ema=1500,
             classifier_epochs=10, lambdas=[0.1, 1.0, 100.0, 1.0, 1.0],
             amp='off')     # with batches of 8 the GPU waits for Python, and bf16 adds to that
PRESETS = {     # what each sets otherwise than the paper
    'paper': {},
    'small': dict(SMALL, size=128),
    'demo': dict(SMALL, size=64, epochs=8, classifier_epochs=3, pretrained=False),
}
MODEL_SETTINGS = ('size', 'base', 'disc_base', 'variant')       # a checkpoint fits these alone


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group('what to train on, and where').add_argument
    add('--data', help='dataset: DIR/{chunk,img}/{train,validation}/<class>/'
        '<stem>.{wav,jpg} (default: demo data)')
    add('--cache', help=f'where packed data is kept (default: {default_cache()})')
    add('--out',
        help='folder of the run, or of several (default: runs/<data>-<variant>-<time>)')
    add('--resume', help='go on with this run, with its settings')
    add('--preset', choices=PRESETS, help='paper, small (little data) or demo (small at '
        '64x64); flags override what it sets (default: paper with --data, else demo)')
    add('--workers', type=at_least(int, 1), help='threads that read files (default: one a core)')
    add('--device', help='cpu, cuda, cuda:1, ... (default: all GPUs that get four pictures '
        'of a batch each, else the CPU)')
    add('--seed', type=at_least(int, 0), nargs='+', default=0, help='of the weights, the order '
        'and dropout; several: a run each, below --out (default: 0)')
    add('--amp', choices=('bf16', 'fp16', 'off'), help='precision of the networks; losses and '
        'residue are float32 (default: bf16 on a GPU, else off; off in small and demo)')
    add('--compile', action='store_true',
        help='compile the steps by torch.compile, which takes minutes at the start')
    add('--benchmark', type=at_least(int, 1), help='time N steps on random data, train nothing')

    add = parser.add_argument_group('the model').add_argument
    variants = '; '.join(f'{name}: {text}' for name, text in VARIANTS.items())
    add('--variant', choices=(*VARIANTS, *BASELINES, 'all'), nargs='+', default='E',
        help=f"{variants}; S2IC, CMCGAN: Table 2's others, with an Adam, a start and losses of "
        'their own; several, or all: a run each, below --out (default: E)')
    add('--size', type=power_of_two, default=256, help='side of the pictures (default: 256)')
    add('--base', type=at_least(int, 1), default=64, help="the U-Nets' first width (default: 64)")
    add('--disc-base', type=at_least(int, 1), default=64,
        help="the PatchGAN's first width (default: 64)")
    add('--dropout', type=at_least(float, 0.0, below=1.0), default=0.5,
        help="in the U-Nets' decoder, training only (default: 0.5)")
    add('--init-std', type=at_least(float, 0.0), default=0.2,
        help='start from N(0, X) (default: 0.2)')

    add = parser.add_argument_group('the training').add_argument
    add('--batch-size', type=at_least(int, 1), default=64,
        help='pairs a step, over all GPUs (default: 64)')
    add('--epochs', type=at_least(int, 1), default=200, help='of G1, G2 and D (default: 200)')
    add('--lr', type=at_least(float, 0.0), default=0.0008,
        help='learning rate of Adam (default: 0.0008)')
    add('--betas', type=at_least(float, 0.0, below=1.0), nargs=2, default=[0.9, 0.999],
        help='of Adam (default: 0.9 0.999)')
    add('--ema', type=at_least(int, 0), default=0,
        help='generate with an average of the weights of this half-life, in images (default: none)')
    add('--lambdas', type=at_least(float, 0.0), nargs=5, default=[1.0, 1.0, 100.0, 1.0, 1.0],
        help="weights of L_C (variant B: always 0), L_cGAN and L_L1 in Eq. (6), of I' and I'' in "
        'Eq. (5) (default: 1 1 100 1 1)')
    add('--saturating', action=argparse.BooleanOptionalAction, default=True,
        help="G minimises log(1 - D), the equations' letter (default); otherwise -log D")
    add('--detach-residue', action=argparse.BooleanOptionalAction, default=False,
        help='to G2 the residue is a label: no gradient passes through it to G1 (default: one '
        'does)')
    add('--classifier', help='C: the classifier.pt of another run, used as it is, or '
        "torchvision's resnet50-0676ba61.pth, to start from (default: downloaded once)")
    add('--no-pretrained', dest='pretrained', action='store_false',
        help='start C without the ImageNet weights')
    add('--classifier-epochs', type=at_least(int, 1), default=20,
        help='of C; the best by a held-out tenth of train counts (default: 20)')
    return parser


def parse_args(argv=None):
    """The settings of each run that is asked for, one for each variant and seed: flags given, else
    those of the run to resume, else a baseline's own, else the preset's, else the paper's. Raises
    InputError where flags would change the model of a resumed run, or a baseline has no such
    choice.
    """
    parser = make_parser()
    defaults = vars(parser.parse_args([]))
    given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults))))
    given = {name: value for name, value in given.items() if value is not None}     # as typed
    variants = list(dict.fromkeys(given.get('variant', ['E'])))         # each once
    if 'all' in variants:
        variants = [*VARIANTS, *BASELINES]
    seeds = list(dict.fromkeys(given.get('seed', [0])))
    group = len(variants) * len(seeds) > 1          # which shares C
    if group and ('benchmark' in given or 'resume' in given or 'out' not in given):
        raise InputError('several runs: --out is needed, and neither --benchmark nor --resume goes '
                         'with them; the same command again goes on with those that are not done')
    if 'seed' in given:
        given['seed'] = seeds[0]
    if 'variant' in given:
        given['variant'] = variants[0]
    if 'resume' in given:
        settings = _resumed(defaults, given)
        variants = [settings['variant']]
    for variant in variants:
        for name in 'dropout', 'saturating', 'detach_residue':
            if variant in BASELINES and name in given:
                flag = name.replace('_', '-')
                raise InputError(f'--{flag}: S2IC and CMCGAN have no such choice; leave the flag '
                                 'out, or train them by a command of their own')
    if 'resume' in given:
        return [argparse.Namespace(**settings)]

    preset = 'paper' if 'data' in given or 'benchmark' in given else 'demo'
    preset = given.get('preset', preset)
    if 'data' not in given and 'benchmark' not in given:
        print("no --data: the built-in demo data; the paper's run: python train.py --data Sub-URMP")
    words = sys.argv[1:] if argv is None else argv
    command = shlex.join(['python', 'train.py', *words])
    runs, said = [], set()
    for variant in variants:
        chosen = PRESETS[preset]
        if variant in BASELINES:
            chosen = chosen | SETTINGS
            if preset == 'paper':
                chosen['epochs'] = EPOCHS[variant]
        settings = defaults | chosen | given
        settings |= dict(preset=preset, variant=variant, group=group)
        family = variant if variant in BASELINES else 'CAR-GAN'     # whose variants choose the same
        if chosen and family not in said:
            said.add(family)
            values = []
            for name in chosen:
                if defaults[name] is not None:      # the paper does not speak of precision
                    values.append(f'{name} {settings[name]} (paper {defaults[name]})')
            print(f'model {variant}, preset {preset}: {", ".join(values)}')
        for seed in seeds:
            runs.append(argparse.Namespace(**settings | dict(seed=seed, made={'command': command})))
    return runs


def _resumed(defaults, given):
    """The settings of a run to go on with. Raises InputError where flags would change its model."""
    config = load_config(given['resume'])
    kept = config.keys() & {*defaults, 'group', 'made'} - {'resume', 'device', 'benchmark'}
    settings = {**defaults, 'group': False, 'made': {}}
    settings |= {name: config[name] for name in kept} | given
    for name in 'preset', 'out':
        if name in given:
            raise InputError(f'--{name}: a run that goes on has its own; leave the flag out')
    for name in MODEL_SETTINGS:
        if settings[name] != config[name]:
            flag = name.replace('_', '-')
            raise InputError(f'--{flag} {settings[name]}: {given["resume"]} was trained with '
                             f'{config[name]}; leave the flag out, or start a run of its own')
    return settings


def main(argv=None):
    settings = parse_args(argv)
    args = settings[0]
    with distributed(args):
        device = choose_device(args.device)
        gpus = choose_gpus(args)
        if args.compile and len(gpus) > 1:
            raise InputError('--compile: not for several GPUs in one process; take one of them by '
                             '--device cuda:0, or start a process for each by torchrun')
        if args.benchmark:
            return benchmark(args, device, gpus)
        plan = broadcast(plan_runs(settings) if rank() == 0 else None)
        if len(plan) > 1:
            train_all(plan, device, gpus)
            target = args.out
        else:
            args, target = plan[0]
            run_one(args, target, device, gpus, f'python train.py --resume {target}')
        print(f'now: python evaluate.py {target}', flush=True)


if __name__ == '__main__':
    run_command(main)
