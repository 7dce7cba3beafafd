"""Train CAR-GAN: first the classifier C on the real frames, then G1, G2 and D.

    python train.py                                  # the built-in demo data, minutes on a CPU
    python train.py --data Sub-URMP                  # the paper's run: 256x256, batch 64, 200 epochs
    python train.py --resume runs/NAME               # go on where a run stopped
    torchrun --nproc_per_node=4 train.py --data Sub-URMP       # a process a GPU, on one node or many
    python train.py --benchmark 20                   # how fast is this machine?

All settings are the paper's unless a flag says otherwise; without --data a small preset is used. A run
is one folder: config.json, classifier.pt, checkpoint.pt, log.csv, samples/, metrics.json, grid.png.
"""
import argparse
import csv
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from cargan import (CARGAN, VARIANTS, Classifier, PatchDiscriminator, classification_loss, discriminator_loss,
                    generator_loss, l1_loss, objective)
from evaluate import (choose_device, evaluate_run, example_clips, load_config, load_file, load_state, report, save_file,
                      stage_grid, train_classifier)
from preprocess import (InputError, Progress, default_cache, demo_data, lock_file, open_dataset, reason, run_command,
                        written_whole)

# What `python train.py` without --data changes: small enough for two CPU cores and ten minutes.
DEMO_PRESET = dict(size=64, base=32, disc_base=16, batch_size=8, epochs=8, lr=4e-4, betas=[0.5, 0.999], init_std=0.02,
                   sample_every=2, saturating=False, pretrained=False, classifier_epochs=4)
MODEL_SETTINGS = ('size', 'base', 'disc_base', 'variant')       # a checkpoint fits these alone
ORDER_SETTINGS = ('seed', 'batch_size')         # a position within an epoch holds for these alone
LOSSES = ('L_C', 'L_cGAN', 'L_L1', 'L_D')       # Eq. (2), G's side of Eq. (5), L1, D's side of Eq. (5)


# ----------------------------------------------------------------------------------- one step of each

class GeneratorStep(nn.Module):
    """The G step's forward: batch -> L_C, L_cGAN and L_L1 (1, 3), times the batch's size, so that the parts
    of a split batch add up. A module, so that DataParallel can split it.
    """

    def __init__(self, model, D, stage_weights, saturating):
        super().__init__()
        self.model, self.D, self.stage_weights, self.saturating = model, D, stage_weights, saturating

    def forward(self, lms, image, label):
        coarse, fine, coarse_logits = self.model(lms, label)
        stages, logits = [coarse], [coarse_logits]
        if self.model.variant != 'D':
            stages.append(fine)
            logits.append(self.model.residue.classifier(fine))
        fakes = [self.D(torch.cat([lms, stage], dim=1)) for stage in stages]
        terms = torch.stack([classification_loss(label, *logits, weights=self.stage_weights),
                             generator_loss(*fakes, saturating=self.saturating),
                             l1_loss(image, *stages)])
        return terms[None] * len(label)


class DiscriminatorStep(nn.Module):
    """The D step's forward: batch -> L_D (1, 1), times the batch's size.

    D judges what G1 and G2 paint now, after their step. With the pictures from before it both sides would
    move at once, each in answer to where the other was, and sway about each other. Real and painted pictures
    are judged in batches apart, as in [14]: in a common one each moves the BatchNorm statistics that the others
    are judged by, and the training runs away with that.
    """

    def __init__(self, model, D):
        super().__init__()
        self.model, self.D = model, D

    def forward(self, lms, image, label):
        with torch.no_grad():
            coarse, fine, _ = self.model(lms, label)
        stages = [coarse] if self.model.variant == 'D' else [coarse, fine]
        real, *fakes = [self.D(torch.cat([lms, picture], dim=1)) for picture in (image, *stages)]
        return discriminator_loss(real, *fakes)[None, None] * len(label)


class Trainer:
    """G1, G2, C and D with their optimisers: section 4.1's two alternating steps."""

    def __init__(self, args, num_classes, lms_channels, classifier, device, gpus=()):
        torch.manual_seed(args.seed)        # the same start, whether C was trained just now or loaded
        self.device, self.args = device, args
        self.epoch, self.done, self.steps = 0, 0, 0     # whole epochs, batches of the next one, batches in all
        layout = torch.channels_last if device.type == 'cuda' else torch.contiguous_format
        self.model = CARGAN(num_classes, args.size, args.base, args.variant, lms_channels, classifier,
                            args.dropout, args.init_std).to(device, memory_format=layout).train()
        self.D = PatchDiscriminator(lms_channels + 3, args.disc_base, args.variant != 'A', args.init_std)
        self.D.to(device, memory_format=layout)
        if args.sync_bn:                    # C is left as it is: its statistics are fixed
            for parent, name in ((self.model, 'G1'), (self.model, 'G2'), (self, 'D')):
                if hasattr(parent, name):
                    setattr(parent, name, nn.SyncBatchNorm.convert_sync_batchnorm(getattr(parent, name)))
        self.lambdas = (0.0 if args.variant == 'B' else args.lambda_c, args.lambda_gan, args.lambda_l1)
        self.dtype = {'bf16': torch.bfloat16, 'fp16': torch.float16, 'off': torch.float32}[amp_mode(args, device)]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        if device.type == 'cuda':
            torch.backends.cudnn.benchmark = True
            torch.backends.cudnn.allow_tf32 = self.dtype != torch.float32     # off is float32 to the letter
        trained = [p for p in self.model.parameters() if p.requires_grad]                 # C is frozen
        self.G_optimizer = torch.optim.Adam(trained, lr=args.lr, betas=args.betas, fused=True)
        self.D_optimizer = torch.optim.Adam(self.D.parameters(), lr=args.lr, betas=args.betas, fused=True)
        self._fix_all_but(self.G_optimizer)     # DistributedDataParallel asks here which weights a step moves
        self.G_step = self._parallel(GeneratorStep(self.model, self.D, args.stage_weights, args.saturating), gpus)
        self._fix_all_but(self.D_optimizer)
        self.D_step = self._parallel(DiscriminatorStep(self.model, self.D), gpus)
        if rank() > 0:
            torch.manual_seed(args.seed + 15485863 * rank())        # each process drops out its own features

    def _parallel(self, step, gpus):
        if self.args.compile:
            step.compile()
        if world() > 1:
            return DistributedDataParallel(step, [self.device] if self.device.type == 'cuda' else None,
                                           broadcast_buffers=not self.args.sync_bn, gradient_as_bucket_view=True)
        return nn.DataParallel(step, gpus) if len(gpus) > 1 else step

    def _fix_all_but(self, optimizer):
        """Let one optimiser's weights move alone."""
        for side in self.G_optimizer, self.D_optimizer:
            for p in side.param_groups[0]['params']:
                p.requires_grad_(side is optimizer)

    def _update(self, step, optimizer, parts, size, weigh):
        """One side's step: forward and backward of each part of a batch; the processes add up their gradients
        at the last. Returns the terms (k,), as a part of the mean over the batch's `size`.
        """
        self._fix_all_but(optimizer)
        optimizer.zero_grad()
        total = 0
        for i, part in enumerate(parts, 1):
            with step.no_sync() if world() > 1 and i < len(parts) else nullcontext():
                with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                    terms = step(*part)
                terms = terms.sum(dim=0) * (world() / size)     # DistributedDataParallel divides by world()
                self.scaler.scale(weigh(terms)).backward()
            total = total + terms.detach()
        self.scaler.step(optimizer)
        return total

    def step(self, lms, image, label, size=None):
        """G1 and G2 with D fixed, then D with G1 and G2 fixed. `size` is that of the whole batch, where
        other processes have a part of it. Returns LOSSES (4,) on the device.
        """
        size, count = size or len(label), min(self.args.accumulate, len(label))
        parts = list(zip(*(x.tensor_split(count) for x in (lms, image, label))))
        L_G = self._update(self.G_step, self.G_optimizer, parts, size, lambda terms: objective(*terms, *self.lambdas))
        L_D = self._update(self.D_step, self.D_optimizer, parts, size, lambda terms: self.lambdas[1] * terms.sum())
        self.scaler.update()
        self.steps += 1
        return torch.cat([L_G, L_D])

    @torch.no_grad()
    def settle(self, split, pictures=256):
        """Take the statistics of G1's and G2's BatchNorm anew, from some pictures without dropout: at the
        paper's learning rate the weights outrun the running averages. Training does not read them.
        """
        norms = [module for name, module in self.model.named_modules()
                 if isinstance(module, nn.modules.batchnorm._BatchNorm) and not name.startswith('residue')]
        momenta = [norm.momentum for norm in norms]
        self.model.eval()
        for norm in norms:
            norm.train().reset_running_stats()
            norm.momentum = None            # the mean of all batches
        batches = split.batches(self.args.batch_size, self.device, self.args.seed, 0, rank(), world())
        for lms, _, label in itertools.islice(batches, -(-pictures // self.args.batch_size)):
            self.model(lms, label)
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
        self.model.train()

    def state(self):
        """All that a bit-exact resume needs."""
        random = [(torch.get_rng_state(), torch.cuda.get_rng_state_all())]
        if world() > 1:
            random = [None] * world()
            dist.all_gather_object(random, (torch.get_rng_state(), [torch.cuda.get_rng_state(self.device)]
                                            if self.device.type == 'cuda' else []))
        return dict(epoch=self.epoch, done=self.done, steps=self.steps, model=self.model.state_dict(),
                    D=self.D.state_dict(), G_optimizer=self.G_optimizer.state_dict(),
                    D_optimizer=self.D_optimizer.state_dict(), scaler=self.scaler.state_dict(), random=random,
                    settings={name: getattr(self.args, name) for name in (*MODEL_SETTINGS, *ORDER_SETTINGS)})

    def save(self, path):
        """Write a checkpoint, whole or not at all. Raises InputError where the weights are not finite (the
        checkpoint before is kept) or the disk is full.
        """
        state = self.state()            # of all processes
        for name, tensor in {**state['model'], **state['D']}.items():
            if not tensor.isfinite().all():
                raise InputError(f'{name} is not finite after step {self.steps}; {way_back(path)}')
        if rank() == 0:
            save_file(state, path)

    def load(self, path):
        """Go on from a checkpoint. Raises InputError, naming the file, where it does not fit."""
        state = load_file(path, epoch=int, done=int, steps=int, model=dict, D=dict, G_optimizer=dict, D_optimizer=dict,
                          scaler=dict, random=list, settings=dict)
        try:
            changed = [name for name in MODEL_SETTINGS if state['settings'][name] != getattr(self.args, name)]
            if changed:
                raise ValueError(f'{changed[0]} is {state["settings"][changed[0]]} in it')
            self.model.load_state_dict(state['model'])
            self.D.load_state_dict(state['D'])
            for name in ('G_optimizer', 'D_optimizer'):
                load_optimizer(getattr(self, name), state[name], lr=self.args.lr, betas=tuple(self.args.betas))
            self.scaler.load_state_dict(state['scaler'])
            self.epoch, self.done, self.steps = state['epoch'], state['done'], state['steps']
            if len(state['random']) == world():
                random, cuda_random = state['random'][rank()]
                torch.set_rng_state(random)
                if self.device.type == 'cuda' and world() > 1:
                    torch.cuda.set_rng_state(cuda_random[0], self.device)
                elif len(cuda_random) == torch.cuda.device_count():
                    torch.cuda.set_rng_state_all(cuda_random)
        except Exception as error:      # whatever a file from a stranger holds
            raise InputError(f'{path}: not a checkpoint of this run ({reason(error)})') from error
        if self.done and any(state['settings'][name] != getattr(self.args, name) for name in ORDER_SETTINGS):
            print(f'another --seed or --batch-size: epoch {self.epoch + 1} starts anew')
            self.done = 0


def way_back(checkpoint):
    """What to do after a value that is not finite, as an error line ends."""
    kept = f'{checkpoint} is still the last good checkpoint' if checkpoint.exists() else 'there is no checkpoint yet'
    return f'{kept}: go on with --resume and a lower --lr, or --amp off'


def load_optimizer(optimizer, state, **settings):
    """Load an optimiser's state, with the settings of now. Raises ValueError where shapes differ."""
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        group.update(settings)
        for p in group['params']:
            kept = optimizer.state.get(p)       # none where fp16 has skipped every step so far
            if kept and any(kept[name].shape != p.shape for name in ('exp_avg', 'exp_avg_sq')):
                raise ValueError('the optimiser is of other weights')


def amp_mode(args, device):
    """What --amp stands for on this device: bf16 on a GPU that has it, off elsewhere."""
    return args.amp or ('bf16' if device.type == 'cuda' and torch.cuda.is_bf16_supported(False) else 'off')


# ------------------------------------------------------------------------------- several processes

def rank():
    """The number of this process among those that torchrun started; 0 is the one that writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many processes torchrun started; 1 without it."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def distributed(args):
    """Join the processes of torchrun, where there are some; give each its GPU, and rank 0 alone a voice."""
    if int(os.environ.get('WORLD_SIZE', 1)) == 1 or 'LOCAL_RANK' not in os.environ:
        yield
        return
    if args.gpus:
        raise InputError('--gpus: torchrun gives each process a GPU of its own; leave the flag out')
    gpu = torch.cuda.is_available() and args.device != 'cpu'
    if gpu:
        args.device = f'cuda:{os.environ["LOCAL_RANK"]}'
        torch.cuda.set_device(choose_device(args.device))
    # the others wait as long as rank 0 takes to pack the data and to train C
    dist.init_process_group('cpu:gloo,cuda:nccl' if gpu else 'gloo', timeout=timedelta(days=2))
    out = sys.stdout
    try:
        with open(os.devnull, 'w') as nowhere:
            sys.stdout = nowhere if rank() else out
            yield
    finally:
        sys.stdout = out
        dist.destroy_process_group()


def share(value):
    """What rank 0 has as `value`, in all processes."""
    box = [value]
    if world() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def first(work, local=False):
    """work() by rank 0 (with `local`, by the first process of each node) before all others."""
    if world() == 1:
        return work()
    mine = rank() == 0 or local and os.environ['LOCAL_RANK'] == '0'
    result = work() if mine else None
    dist.barrier()
    return result if mine else work()


# ---------------------------------------------------------------------------------- nothing is lost

class Saver:
    """When to save: every `minutes`, and as soon as SIGINT or SIGTERM asks to end. While it is open, the
    first signal lets the step under way come to its end; a second SIGINT ends the process at once.
    """

    def __init__(self, minutes, run):
        self.minutes, self.run, self.signal, self.saved = minutes, run, 0, time.monotonic()

    def __enter__(self):
        self.previous = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _stop(self, number, frame):
        self.signal = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.write(2, b'\nfinishing the step; it will be saved\n')        # print() is not safe here

    def __call__(self, save, now=False, alone=False):
        """After a step: save() where it is time or `now`, and end where a signal came. `alone`: the other
        processes are not at the same step.
        """
        now = now or time.monotonic() - self.saved >= 60 * self.minutes
        wish = torch.tensor([self.signal, now], dtype=torch.int64)
        if world() > 1 and not alone:       # all processes stop after the same step
            dist.all_reduce(wish, dist.ReduceOp.MAX)
        number, due = wish.tolist()
        if number or due:
            save()
            self.saved = time.monotonic()
        if number:
            print(f'\nstopped by {signal.Signals(number).name} and saved; go on with: '
                  f'python train.py --resume {self.run}')
            sys.exit(128 + number)


# --------------------------------------------------------------------------------------- classifier

def get_classifier(args, dataset, run, device, gpus, saver):
    """C: the run's own classifier.pt, that of --classifier, or one trained now and kept in the run."""
    path, part = run / 'classifier.pt', run / 'classifier-part.pt'
    source = path if path.exists() else args.classifier
    if source:
        state = load_file(source, classifier=dict, classes=list, accuracy=float)
        if state['classes'] != dataset.classes:
            raise InputError(f'{source}: a classifier of other classes than those of {args.data}')
        classifier = Classifier(len(dataset.classes), pretrained=False)
        load_state(classifier, state['classifier'], source)
        print(f'classifier: {source}, accuracy {state["accuracy"]:.4f} on the validation frames')
    else:
        classifier = new_classifier(args, len(dataset.classes)).to(device)
        state = train_classifier(
            classifier, dataset, epochs=args.classifier_epochs, accuracy=args.classifier_accuracy,
            lr=args.classifier_lr or (1e-4 if args.pretrained else 1e-3), batch_size=args.batch_size, seed=args.seed,
            device=device, gpus=gpus, part=part, pause=partial(saver, alone=True))
    if not path.exists():
        save_file(state, path)
    part.unlink(missing_ok=True)
    return classifier.to(device)


def new_classifier(args, num_classes):
    """ResNet50 with ImageNet's weights, unless --no-pretrained. Raises InputError without them."""
    torch.manual_seed(args.seed)
    try:
        return Classifier(num_classes, args.pretrained and (args.classifier_weights or True))
    except Exception as error:
        name = args.classifier_weights or 'the ImageNet weights of ResNet50'
        raise InputError(f"{name}: not to be had ({reason(error)}); give torchvision's resnet50-0676ba61.pth with "
                         '--classifier-weights PATH, or go without: --no-pretrained') from error


# --------------------------------------------------------------------------------------------- GAN

class Log:
    """log.csv: a row a step. Losses stay on the device until they are written, `every` steps."""

    def __init__(self, path, steps, every=100):
        """Open the log of a run that has made `steps` steps; rows beyond them, of a run that was
        killed after its last checkpoint, are made anew.
        """
        self.path, self.every, self.rows, kept = path, every, [], []
        if rank() == 0:
            if steps and path.exists():
                with open(path, newline='', errors='replace') as file:
                    kept = [row for row in csv.reader(file) if row and row[0].isdigit() and int(row[0]) <= steps]
            with written_whole(path) as part, open(part, 'w', newline='') as file:
                csv.writer(file).writerows([('step', 'epoch', *LOSSES), *kept])

    def add(self, step, epoch, losses, stems):
        """Note a step's LOSSES (4,); stems() names its pairs. Raises as flush()."""
        self.rows.append((step, epoch, losses, stems))
        if len(self.rows) >= self.every:
            self.flush()

    def flush(self):
        """Write what has been noted. Raises InputError at the first loss that is not finite; the stems of
        that step are then in bad-batch.txt.
        """
        if not self.rows:
            return
        losses = torch.stack([row[2] for row in self.rows])                 # (steps, 4): the one wait for the device
        if world() > 1:
            dist.all_reduce(losses)
            losses /= world()
        rows, self.rows = list(zip(self.rows, losses.tolist())), []
        if rank() == 0:
            try:
                with open(self.path, 'a', newline='') as file:
                    csv.writer(file).writerows((step, epoch, *(f'{value:.6g}' for value in values))
                                               for (step, epoch, *_), values in rows)
            except OSError as error:
                raise InputError(f'{self.path}: cannot be written ({reason(error)}); make room, and go on with '
                                 '--resume') from error
        for (step, epoch, _, stems), values in rows:
            for name, value in zip(LOSSES, values):
                if not math.isfinite(value):
                    bad, kept = self.path.with_name('bad-batch.txt'), self.path.with_name('checkpoint.pt')
                    if rank() == 0:
                        with written_whole(bad) as part:
                            part.write_text(f'{name} is {value} at step {step}, epoch {epoch}; its pairs:\n'
                                            + ''.join(f'{stem}\n' for stem in stems()))
                    raise InputError(f'{name} is {value} at step {step}, epoch {epoch}: the pairs of that step are in '
                                     f'{bad}; {way_back(kept)}')


def train_gan(trainer, dataset, args, run, saver):
    """The epochs that are left: a checkpoint after each, a picture grid every --sample-every."""
    split, checkpoint, progress = dataset.train.to(trainer.device), run / 'checkpoint.pt', Progress(sys.stdout)
    log, examples, start, seen = Log(run / 'log.csv', trainer.steps), example_clips(dataset), time.monotonic(), 0
    batches = split.count(args.batch_size)
    left = (args.epochs - trainer.epoch) * len(split) - trainer.done * len(split) // batches

    def save():
        log.flush()                 # first, as it may find that the weights are no longer worth keeping
        trainer.save(checkpoint)

    for epoch in range(trainer.epoch + 1, args.epochs + 1):
        order = args.seed + 1000003 * epoch     # follows from the epoch alone: a resume needs no state
        indices = split.indices(args.batch_size, order)
        for batch in split.batches(args.batch_size, trainer.device, order, trainer.done, rank(), world()):
            mine = indices[trainer.done]
            losses = trainer.step(*batch, size=len(mine))
            trainer.done += 1
            log.add(trainer.steps, epoch, losses, lambda mine=mine: [split.stems[i] for i in mine])
            seen += len(mine)
            if trainer.done == batches or progress.due():
                rate = seen / (time.monotonic() - start)
                progress(f'epoch {epoch}/{args.epochs}  step {trainer.done}/{batches}  '
                         + '  '.join(f'{name} {loss:.4f}' for name, loss in zip(LOSSES, losses.tolist()))
                         + f'  {rate:.1f} images/s  {duration((left - seen) / rate)} left',
                         last=trainer.done == batches)
            if trainer.done < batches:
                saver(save)
        trainer.epoch, trainer.done = epoch, 0
        trainer.settle(split)
        if rank() == 0 and (epoch % args.sample_every == 0 or epoch == args.epochs):
            stage_grid(trainer.model, examples, run / 'samples' / f'epoch-{epoch:04d}.png', trainer.device)
        saver(save, now=True)


def fitting(trainer, batch, size):
    """What to say to a GPU that ran out of memory in a step of `size` pairs: the halves of the batch are
    tried until one fits.
    """
    tried, trainer.args.accumulate = size, 1
    while tried > 1:
        tried //= 2
        torch.cuda.empty_cache()
        try:
            trainer.step(*(x[:tried] for x in batch))
        except torch.OutOfMemoryError:
            continue
        return (f'--batch-size {tried} would fit; for the same steps as now with less memory: '
                f'--accumulate {-(-size // tried)}')
    return 'not even one pair fits: a smaller --size, --base or --disc-base is needed'


def duration(seconds):
    """Seconds as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f'{minutes // 60}:{minutes % 60:02d}:{seconds:02d}'


def flop_counter():
    """A counter of floating-point operations; the CPU's attention, which not every release of torch counts, too."""
    aten = torch.ops.aten
    return FlopCounterMode(display=False, custom_mapping={
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward:
            lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)})


def benchmark(args, device, gpus):
    """Time --benchmark steps on random data, then on the demo data through the loader; print images/s,
    arithmetic, peak memory and what the loader costs.
    """
    trainer = Trainer(args, 13, 1, None, device, gpus)
    local = args.batch_size // world()
    batch = (torch.rand(local, 1, args.size, args.size, device=device) * 2 - 1,
             torch.rand(local, 3, args.size, args.size, device=device) * 2 - 1,
             torch.arange(local, device=device) % 13)
    steps, counted = (trainer.G_step, trainer.D_step), local
    if len(gpus) > 1:       # the threads of DataParallel would escape the counter: one GPU's part, without them
        (trainer.G_step, trainer.D_step), counted = (step.module for step in steps), -(-local // len(gpus))
    with flop_counter() as counter:
        trainer.step(*(x[:counted] for x in batch))
    work = counter.get_total_flops() / counted
    trainer.G_step, trainer.D_step = steps

    def rate(batches):
        """Images/s of --benchmark steps, after three that warm up (memory, cuDNN's choice, the compiler)."""
        for step in range(3 + args.benchmark):
            losses = trainer.step(*next(batches), size=args.batch_size)
            if step == 2:
                losses.tolist()         # waits for the device
                start = time.monotonic()
        losses.tolist()
        return args.benchmark * args.batch_size / (time.monotonic() - start)

    alone = rate(itertools.repeat(batch))
    if device.type == 'cuda':
        peak = torch.cuda.max_memory_allocated(device)
    else:
        import resource         # not on Windows
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else f'CPU, {torch.get_num_threads()} threads'
    print(f'size {args.size}, base {args.base}, disc-base {args.disc_base}, batch {args.batch_size}, '
          f'amp {amp_mode(args, device)}{", compiled" if args.compile else ""}; {name}\n'
          f'{alone:.2f} images/s, {work / 1e9:.1f} GFLOP per image: {alone * work / 1e12:.2f} TFLOP/s'
          + (f', {alone * work / 1e12 / args.peak_tflops:.1%} of {args.peak_tflops:g}' if args.peak_tflops else '')
          + f'; peak memory {peak / 1e9:.2f} GB', flush=True)
    data = first(lambda: demo_data(args.size, args.cache), local=True)
    split = first(lambda: open_dataset(data, args.size, args.cache, workers=args.workers), local=True).train
    whole = -(-len(split) // args.batch_size) * args.batch_size             # for batches of just that size
    split.rows, split.labels = np.resize(split.rows, whole), torch.from_numpy(np.resize(split.labels, whole))
    split.to(device)
    loaded = rate(batch for seed in itertools.count()
                  for batch in split.batches(args.batch_size, device, seed, 0, rank(), world()))
    print(f'{loaded:.2f} images/s with the loader on the demo data: it costs {alone / loaded - 1:.1%}')


# ----------------------------------------------------------------------------------------- command

def make_parser():
    def number(convert, least, condition=lambda value: True, what=''):
        def parse(text):
            value = convert(text)
            if value < least or not condition(value):
                raise argparse.ArgumentTypeError(f'{text}: must be {what or "a number"} from {least}')
            return value
        parse.__name__ = convert.__name__
        return parse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group('what to train on, and where').add_argument
    add('--data', metavar='DIR',
        help='dataset: DIR/{chunk,img}/{train,validation}/<class>/<stem>.{wav,jpg} (default: demo data, small preset)')
    add('--cache', metavar='DIR', help=f'where packed data is kept (default: {default_cache()})')
    add('--out', metavar='DIR', help='folder of the run (default: runs/<data>-<variant>-<time>)')
    add('--resume', metavar='DIR', help='go on with this run, with its settings')
    add('--strict', action='store_true', help='stop at any bad file (default: name it and go on without it)')
    add('--workers', type=number(int, 1), metavar='N', help='threads that read files (default: one a core)')
    add('--device', metavar='NAME', help='cpu, cuda, cuda:1, ... (default: all GPUs, else the CPU)')
    add('--gpus', metavar='I,J', help='numbers of the GPUs that share each batch (default: all)')
    add('--seed', type=number(int, 0), default=0, metavar='N',
        help='of the weights, the order and dropout (default: 0)')
    add('--sample-every', type=number(int, 1), default=5, metavar='N',
        help='epochs between picture grids (default: 5)')
    add('--save-minutes', type=number(float, 0.0), default=10.0, metavar='X',
        help='between checkpoints within an epoch; there is one at the end of each (default: 10)')
    add('--benchmark', type=number(int, 1), metavar='N', help='time N steps on random data and train nothing')
    add('--peak-tflops', type=number(float, 0.0, lambda x: x > 0), metavar='X',
        help='what the device could do: --benchmark prints the share')

    add = parser.add_argument_group('speed and memory').add_argument
    add('--amp', choices=('bf16', 'fp16', 'off'),
        help='precision of the networks; losses and residue are float32 (default: bf16 on a GPU, else off)')
    add('--compile', action='store_true', help='compile both steps: minutes at the start, faster afterwards')
    add('--accumulate', type=number(int, 1), default=1, metavar='K',
        help='go through each batch in K parts: less memory, the same step but for BatchNorm (default: 1)')
    add('--sync-bn', action='store_true', help='BatchNorm over the whole batch (torchrun on GPUs)')

    add = parser.add_argument_group('the model').add_argument
    add('--variant', choices=VARIANTS, default='E',
        help='; '.join(f'{k}: {v}' for k, v in VARIANTS.items()) + ' (default: E)')
    add('--size', type=number(int, 32, lambda n: n & (n - 1) == 0, 'a power of two'), default=256, metavar='N',
        help='side of the pictures (default: 256)')
    add('--base', type=number(int, 1), default=64, metavar='N', help="the U-Nets' first width (default: 64)")
    add('--disc-base', type=number(int, 1), default=64, metavar='N', help="the PatchGAN's first width (default: 64)")
    add('--dropout', type=number(float, 0.0, lambda p: p < 1, 'a probability'), default=0.5, metavar='P',
        help="in the U-Nets' decoder, training only (default: 0.5)")
    add('--init-std', type=number(float, 0.0), default=0.2, metavar='X',
        help='weights start from N(0, X) (default: 0.2; 0.02 converges faster)')

    add = parser.add_argument_group('the training').add_argument
    add('--batch-size', type=number(int, 1), default=64, metavar='N',
        help='pairs in a step, over all GPUs (default: 64)')
    add('--epochs', type=number(int, 1), default=200, metavar='N', help='of G1, G2 and D (default: 200)')
    add('--lr', type=number(float, 0.0), default=0.0008, metavar='X',
        help='learning rate of Adam, constant (default: 0.0008)')
    add('--betas', type=number(float, 0.0), nargs=2, default=[0.9, 0.999], metavar='X',
        help='of Adam (default: 0.9 0.999)')
    add('--lambda-c', type=number(float, 0.0), default=1.0, metavar='X',
        help='weight of L_C (default: 1; variant B: always 0)')
    add('--lambda-gan', type=number(float, 0.0), default=1.0, metavar='X', help='weight of L_cGAN (default: 1)')
    add('--lambda-l1', type=number(float, 0.0), default=100.0, metavar='X', help='weight of L_L1 (default: 100)')
    add('--stage-weights', type=number(float, 0.0), nargs=2, default=[0.5, 0.5], metavar='X',
        help="of I' and I'' in L_C (default: 0.5 0.5)")
    add('--saturating', action=argparse.BooleanOptionalAction, default=True,
        help="G minimises log(1 - D), the equations' letter; otherwise -log D (default: --saturating)")

    add = parser.add_argument_group('the classifier C').add_argument
    add('--classifier', metavar='FILE', help='use the classifier.pt of another run instead of training one')
    add('--classifier-weights', metavar='PATH', help="torchvision's resnet50-0676ba61.pth (default: downloaded once)")
    add('--no-pretrained', dest='pretrained', action='store_false',
        help='train C from scratch, without the ImageNet weights')
    add('--classifier-epochs', type=number(int, 1), default=20, metavar='N', help='at most (default: 20)')
    add('--classifier-accuracy', type=number(float, 0.0), default=0.9956, metavar='X',
        help='stop at this on the validation frames (default: 0.9956)')
    add('--classifier-lr', type=number(float, 0.0), metavar='X',
        help='learning rate of Adam (default: 0.0001; from scratch 0.001)')
    return parser


def parse_args(argv=None):
    """The settings: flags given, else those of the run to resume, else the demo preset where there is
    no --data, else the paper's. Raises InputError where flags would change the model of a resumed run.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.resume:
        config = load_config(args.resume)
        for name in vars(args):
            usual = parser.get_default(name)
            if name in config and usual is not None and not isinstance(config[name], (type(usual), int)):
                raise InputError(f'{args.resume}/config.json: {name} cannot be {config[name]!r}; mend or restore it')
        parser.set_defaults(**{name: config[name] for name in vars(args)
                               if name in config and name not in ('resume', 'device', 'gpus', 'benchmark')})
        args = parser.parse_args(argv)
        for name in MODEL_SETTINGS:
            if getattr(args, name) != config[name]:
                raise InputError(f'--{name.replace("_", "-")} {getattr(args, name)}: {args.resume} was trained with '
                                 f'{config[name]}; leave the flag out, or start a run of its own')
    elif args.data is None and args.benchmark is None:
        usual = {name: parser.get_default(name) for name in DEMO_PRESET}
        parser.set_defaults(**DEMO_PRESET)
        args = parser.parse_args(argv)
        def words(value):
            return ' '.join(map(str, value)) if isinstance(value, list) else str(value)

        changed = [f'--no-{name}' if vars(args)[name] is False else
                   f'--{name.replace("_", "-")} {words(vars(args)[name])} ({words(usual[name])})'
                   for name in DEMO_PRESET if vars(args)[name] != usual[name]]
        print(f'no --data: the built-in demo data, with a small preset (in brackets the usual value):\n'
              f'  {" ".join(changed)}\nthe paper\'s run: python train.py --data Sub-URMP\n')
    return args


def check_settings(args, device, gpus):
    """Raise InputError for flags that do not go together, before any work is done."""
    if args.compile and len(gpus) > 1:
        raise InputError('--compile: not with several GPUs in one process; torchrun gives each a process of its own')
    if args.sync_bn and (device.type != 'cuda' or world() == 1):
        raise InputError('--sync-bn: for GPUs under torchrun alone')
    if args.amp == 'fp16' and device.type != 'cuda':
        raise InputError('--amp fp16: for GPUs alone; bf16 works here')
    if args.batch_size < world():
        raise InputError(f'--batch-size {args.batch_size}: fewer pairs than the {world()} processes')


def choose_gpus(args):
    """(device, GPU numbers to split each batch over): all visible GPUs unless flags say otherwise."""
    if args.gpus is None:
        device = choose_device(args.device)
        return device, list(range(torch.cuda.device_count())) if args.device in (None, 'cuda') else []
    try:
        gpus = [int(number) for number in args.gpus.split(',')]
    except ValueError:
        raise InputError(f'--gpus {args.gpus}: must be numbers with commas, such as 0,1') from None
    missing = [number for number in gpus if not 0 <= number < torch.cuda.device_count()]
    if missing:
        raise InputError(f'--gpus {args.gpus}: no GPU {missing[0]} here, of {torch.cuda.device_count()}')
    return choose_device(f'cuda:{gpus[0]}'), gpus


@contextmanager
def open_run(args):
    """The run's folder, this process's alone while it is open. Raises InputError where another run is
    there or is at work; one that got no further than its settings may be taken over.
    """
    name = Path(args.data).resolve().name if args.data else 'demo'
    run = Path(args.resume or args.out or f'runs/{name}-{args.variant}-{time.strftime("%Y%m%d-%H%M%S")}')
    if not args.resume and run.exists() and (
            not run.is_dir() or any(path.name not in ('config.json', 'samples') for path in run.iterdir())):
        raise InputError(f'{run}: not an empty folder; go on with it by --resume {run}, or name another by --out')
    fresh = not run.exists()
    try:
        (run / 'samples').mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f'{run}: cannot be made ({reason(error)}); name another folder by --out') from error
    lock = os.open(run, os.O_RDONLY) if os.name == 'posix' else None
    try:
        if lock and not lock_file(lock):
            raise BlockingIOError
        write_config(run, vars(args))
        yield run
    except BlockingIOError:
        raise InputError(f'{run}: another process is training there; wait for it, or name another folder by '
                         '--out') from None
    except InputError:
        if fresh and not (run / 'classifier.pt').exists():      # nothing was begun
            shutil.rmtree(run)
        raise
    finally:
        if lock:
            os.close(lock)


def write_config(run, settings, **found):
    """Write config.json: the settings, and what the run found out about its data."""
    settings = dict(settings, resume=None, **found)
    for name in ('data', 'cache'):
        settings[name] = settings[name] and str(Path(settings[name]).resolve())
    with written_whole(run / 'config.json') as part:
        part.write_text(json.dumps(settings, indent=1) + '\n')
    return settings


def train(args, run, device, gpus):
    """A run from its data to its figures."""
    data = first(lambda: args.data or demo_data(args.size, args.cache), local=True)
    dataset = first(lambda: open_dataset(data, args.size, args.cache, args.strict, args.workers), local=True)
    if len(dataset.classes) < 2:
        raise InputError(f'{data}: only one class, {dataset.classes[0]}: a classifier needs at least two')
    if args.batch_size > len(dataset.train):
        raise InputError(f'--batch-size {args.batch_size}: only {len(dataset.train)} pairs in train; '
                         f'--batch-size {len(dataset.train)} is the most')
    if rank() == 0:
        config = write_config(run, vars(args), classes=dataset.classes, lms_channels=dataset.lms_channels)
    print(f'run {run}: {len(dataset.train)} pairs in train, {len(dataset.validation)} in validation, '
          f'{len(dataset.classes)} classes; on ' + (f'{world()} processes, this one on ' if world() > 1 else '')
          + (f'GPUs {gpus}' if len(gpus) > 1 else str(device)), flush=True)
    with Saver(args.save_minutes, run) as saver:
        classifier = first(lambda: get_classifier(args, dataset, run, device, gpus, saver))
        trainer = Trainer(args, len(dataset.classes), dataset.lms_channels, classifier, device, gpus)
        if os.path.lexists(run / 'checkpoint.pt'):       # a broken link is no reason to start anew
            trainer.load(run / 'checkpoint.pt')
            print(f'resumed after {trainer.epoch} of {args.epochs} epochs'
                  + (f' and {trainer.done} steps' if trainer.done else ''))
        try:
            train_gan(trainer, dataset, args, run, saver)
            full = False
        except torch.OutOfMemoryError:      # its traceback holds memory: what would fit is tried after it
            full = True
    if full:
        raise InputError(f'--batch-size {args.batch_size} does not fit into the memory of {device}; '
                         + fitting(trainer, dataset.train.batch(range(args.batch_size), device), args.batch_size))
    if rank() == 0:
        report(run, config, evaluate_run(run, config, trainer.model, dataset, device), dataset)


def main(argv=None):
    args = parse_args(argv)
    with distributed(args):
        device, gpus = choose_gpus(args)
        check_settings(args, device, gpus)
        if args.benchmark:
            benchmark(args, device, gpus)
        elif rank() == 0:
            with open_run(args) as run:
                train(args, share(run), device, gpus)
        else:
            train(args, share(None), device, gpus)


if __name__ == '__main__':
    run_command(main)
