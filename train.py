"""Train CAR-GAN: first the classifier C on the real frames, then G1, G2 and D.

    python train.py                                  # the built-in demo data, minutes on a CPU
    python train.py --data Sub-URMP                  # the paper's run: 256x256, batch 64, 200 epochs
    python train.py --data mydata --preset small     # little data: a gentler Adam, an average of the weights
    python train.py --resume runs/NAME               # go on where a run stopped
    python train.py --data Sub-URMP --variant all --seed 0 1 2 --out runs/paper     # Tables 1 and 2, Figures 4 to 6
    torchrun --nproc_per_node=4 train.py --data Sub-URMP       # a process a GPU, on one node or many

All settings are the paper's unless a preset or a flag says otherwise. A run is one folder: config.json,
classifier.pt, checkpoint.pt (to go on), model.pt (to generate), log.csv, samples/, metrics.json, grid.png, report.html.
"""
import argparse
import copy
import itertools
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import cached_property, partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import baselines
from baselines import BASELINES, EPOCHS, SETTINGS
from cargan import (VARIANTS, PatchDiscriminator, classification_loss, discriminator_loss, generator_loss, l1_loss,
                    objective, recalibrate_batchnorm)
from demo import demo_data
from evaluate import (compare_runs, digest, evaluate_run, get_audio_classifier, get_classifier, load_generators,
                      make_model)
from preprocess import draw_grid, example_clips, example_pictures, open_dataset
from report import LOSSES, Log, report_text, way_back, write_page
from runs import (InputError, Progress, broadcast, choose_device, default_cache, distributed, duration, load_config,
                  load_file, load_state, open_run, peak_memory, rank, rank0_first, reason, run_command, save_file,
                  world_size, write_config)

SMALL = dict(base=32, disc_base=16, dropout=0.0, init_std=0.02, batch_size=8, epochs=40, lr=4e-4, betas=[0.5, 0.999],
             saturating=False, ema=1500, classifier_epochs=10, lambdas=[0.1, 1.0, 100.0, 1.0, 1.0])
PRESETS = {     # what each sets otherwise than the paper
    'paper': {},
    'small': dict(SMALL, size=128),
    'demo': dict(SMALL, size=64, epochs=11, pretrained=False),
}
MODEL_SETTINGS = ('size', 'base', 'disc_base', 'variant')       # a checkpoint fits these alone


# ----------------------------------------------------------------------------------- one step of each

class GeneratorStep(nn.Module):
    """The G step's forward: a batch -> (L_C, L_cGAN and L_L1 (1, 3), times the batch's size, so that the parts
    of a split batch add up; I' and I'' (B, stages, 3, S, S), detached, for the D step).

    A module, so that DataParallel can split it. Autocast is entered inside, as it is a thread's own.
    """

    def __init__(self, model, D, stage_weights=(1.0, 1.0), saturating=True, dtype=torch.float32):
        super().__init__()
        self.model, self.D = model, D
        self.stage_weights, self.saturating, self.dtype = stage_weights, saturating, dtype

    def forward(self, lms, image, label):
        with torch.autocast(lms.device.type, self.dtype, enabled=self.dtype != torch.float32):
            coarse, fine, coarse_logits = self.model(lms, label)
            stages, logits = [coarse], [coarse_logits]
            if self.model.variant != 'D':
                stages.append(fine)
                logits.append(self.model.residue.classifier(fine))
            fakes = [self.D(torch.cat([lms, stage], dim=1)) for stage in stages]
            terms = torch.stack([classification_loss(label, *logits),
                                 generator_loss(*fakes, weights=self.stage_weights, saturating=self.saturating),
                                 l1_loss(image, *stages)])
        return terms[None] * len(label), torch.stack(stages, dim=1).detach()


class DiscriminatorStep(nn.Module):
    """The D step's forward: a batch and its fakes (B, stages, 3, S, S) -> (L_D (1, 1), times the batch's size,).

    Real and fake images pass D in separate batches, as in [14]: in a common one each moves the BatchNorm
    statistics that the others are judged by. With `model` the fakes are generated again, after G's step.
    """

    def __init__(self, D, model=None, stage_weights=(1.0, 1.0), dtype=torch.float32):
        super().__init__()
        self.D, self.model, self.stage_weights, self.dtype = D, model, stage_weights, dtype

    def forward(self, lms, image, label, fakes):
        with torch.autocast(lms.device.type, self.dtype, enabled=self.dtype != torch.float32):
            if self.model is not None:
                with torch.no_grad():
                    fakes = torch.stack(self.model(lms, label)[:fakes.shape[1]], dim=1)
            real, *fakes = [self.D(torch.cat([lms, x], dim=1)) for x in (image, *fakes.unbind(dim=1))]
            loss = discriminator_loss(real, *fakes, weights=self.stage_weights)
        return (loss[None, None] * len(label),)


class Trainer:
    """G1, G2, C and D with their optimisers: section 3.5's two alternating steps. Or a baseline's networks, trained
    by its own losses; `audio` is S2IC's audio classifier.
    """

    def __init__(self, args, num_classes, lms_channels, classifier, device, gpus=(), audio=None):
        torch.manual_seed(args.seed)        # the same start, whether C was trained just now or loaded
        self.device, self.args = device, args
        self.gpus = list(gpus) or [device] * (device.type == 'cuda')
        self.epoch, self.step_in_epoch, self.steps = 0, 0, 0        # whole epochs, steps of the next one, of all
        self.model = make_model(args.variant, num_classes, args.size, args.base, lms_channels, classifier,
                                args.dropout, args.init_std, audio)
        if args.variant in BASELINES:
            self.D = BASELINES[args.variant][1](args.size, args.disc_base, lms_channels, args.init_std)
        else:
            self.D = PatchDiscriminator(lms_channels + 3, args.disc_base, args.variant != 'A', args.init_std)
        for network in self.model.train(), self.D:
            network.to(device, memory_format=torch.channels_last)       # the faster layout, on a CPU too
        C = self.model.residue.classifier
        trained = [p for p in self.model.parameters() if p.requires_grad]                 # C is frozen
        self.average = copy.deepcopy(self.model, {id(C): C}) if args.ema else None        # one C for both
        self.averaged = [p.requires_grad_(False) for p in self.average.parameters() if p.requires_grad] \
            if self.average else []
        lambda_c, *lambdas, lambda_g1, lambda_g2 = args.lambdas
        self.lambdas, stages = (0.0 if args.variant == 'B' else lambda_c, *lambdas), (lambda_g1, lambda_g2)
        dtype = {'bf16': torch.bfloat16, 'fp16': torch.float16, 'off': torch.float32}[amp_mode(args, device)]
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.G_optimizer = torch.optim.Adam(trained, lr=args.lr, betas=args.betas, fused=True)
        self.D_optimizer = torch.optim.Adam(self.D.parameters(), lr=args.lr, betas=args.betas, fused=True)
        if args.variant in BASELINES:
            steps = [step(self.model, self.D, dtype) for step in (baselines.GeneratorStep, baselines.DiscriminatorStep)]
        else:
            steps = (GeneratorStep(self.model, self.D, stages, args.saturating, dtype),
                     DiscriminatorStep(self.D, self.model if args.fresh_fakes else None, stages, dtype))
        self.set_requires_grad(self.G_optimizer)    # DistributedDataParallel asks here which weights a step moves
        self.G_step = self._parallel(steps[0], gpus)
        self.set_requires_grad(self.D_optimizer)
        self.D_step = self._parallel(steps[1], gpus)
        if rank() > 0:
            torch.manual_seed(args.seed + 15485863 * rank())        # each process drops out its own features

    def _parallel(self, step, gpus):
        if world_size() > 1:
            return DistributedDataParallel(step, [self.device] if self.device.type == 'cuda' else None,
                                           gradient_as_bucket_view=True)
        return nn.DataParallel(step, gpus) if len(gpus) > 1 else step

    def set_requires_grad(self, optimizer):
        """Let one optimiser's weights move alone."""
        for side in self.G_optimizer, self.D_optimizer:
            for p in side.param_groups[0]['params']:
                p.requires_grad_(side is optimizer)

    def _update(self, step, optimizer, batches, scale, loss_fn):
        """One side's step over the micro-batches of a batch; the processes add up their gradients at the last.
        Returns the terms (k,), as this process's part of their mean, and what else the step gave of each.
        """
        self.set_requires_grad(optimizer)
        optimizer.zero_grad()
        total, others = 0, []
        for i, batch in enumerate(batches, 1):
            with step.no_sync() if world_size() > 1 and i < len(batches) else nullcontext():
                terms, *other = step(*batch)
                terms = terms.sum(dim=0) * scale
                self.scaler.scale(loss_fn(terms)).backward()
            total, others = total + terms.detach(), [*others, other]
        self.scaler.step(optimizer)
        return total, others

    def step(self, lms, image, label, size=None):
        """G1 and G2 with D fixed, then D with G1 and G2 fixed. Returns LOSSES (4,) on the device.

        `size` is that of the whole batch, where other processes have a part of it; where it has fewer pairs than
        there are processes, those that are left have a stand-in, which weighs nothing.
        """
        size = size or len(label)
        scale = (rank() < size) * world_size() / size       # DistributedDataParallel divides by world_size()
        batches = list(zip(*(x.tensor_split(min(self.args.accumulate, len(label))) for x in (lms, image, label))))
        L_G, fakes = self._update(self.G_step, self.G_optimizer, batches, scale,
                                  lambda terms: objective(*terms, *self.lambdas))
        L_D, _ = self._update(self.D_step, self.D_optimizer, [(*b, *f) for b, f in zip(batches, fakes)], scale,
                              lambda terms: self.lambdas[1] * terms.sum())
        self.scaler.update()
        self.steps += 1
        if self.average:        # its half-life is at most a fifth of the images seen
            half_life = min(self.args.ema, 0.2 * self.steps * self.args.batch_size)
            torch._foreach_lerp_(self.averaged, self.G_optimizer.param_groups[0]['params'],
                                 1 - 0.5 ** (self.args.batch_size / half_life))
        return torch.cat([L_G, L_D])

    def set_epoch(self, epoch):
        """The learning rate of an epoch (from 1): constant, then linear to zero over --lr-decay-epochs."""
        left, over = self.args.epochs + 1 - epoch, self.args.lr_decay_epochs + 1
        for optimizer in self.G_optimizer, self.D_optimizer:        # a resume may have brought other settings
            optimizer.param_groups[0].update(lr=self.args.lr * min(1.0, left / over), betas=tuple(self.args.betas))

    @property
    def inference(self):
        """The model that generates outside training: the average where there is one."""
        return self.average or self.model

    @cached_property
    def classifier_digest(self):
        return digest(self.model.residue.classifier)        # of 94 MB, which do not change

    def state(self):
        """All that a bit-exact resume needs, but for C."""
        random = [(torch.get_rng_state(), [torch.cuda.get_rng_state(gpu) for gpu in self.gpus])]
        if world_size() > 1:
            mine, random = random[0], [None] * world_size()
            dist.all_gather_object(random, mine)
        return dict(epoch=self.epoch, step_in_epoch=self.step_in_epoch, steps=self.steps, random=random,
                    model=generator_state(self.model), average=generator_state(self.average) if self.average else {},
                    D=self.D.state_dict(), G_optimizer=self.G_optimizer.state_dict(),
                    D_optimizer=self.D_optimizer.state_dict(), scaler=self.scaler.state_dict())

    def save(self, run, split, classifier='classifier.pt'):
        """Recalibrate BatchNorm on pictures of `split` and write checkpoint.pt and model.pt, each whole or not
        at all; C is in the file `classifier`, relative to the run. Raises InputError where the weights are not
        finite (the files before are kept) or the disk is full.
        """
        if rank() == 0:
            batches = split.batches(max(self.args.batch_size, 16), self.device, self.args.seed)
            recalibrate_batchnorm(self.inference, batches)
        state = self.state()            # of all processes
        for name, tensor in itertools.chain(*(state[kind].items() for kind in ('model', 'average', 'D'))):
            if not tensor.isfinite().all():
                raise InputError(f'{name} is not finite after step {self.steps}; {way_back(run)}')
        if rank() == 0:
            C = dict(classifier=classifier, classifier_digest=self.classifier_digest)
            save_file(dict(state, **C), run / 'checkpoint.pt')
            save_file(dict(C, model=state['average'] or state['model'], epoch=self.epoch, steps=self.steps),
                      run / 'model.pt')

    def load(self, path):
        """Go on from a checkpoint. Raises InputError, naming the file, where it does not fit."""
        state = load_file(path, epoch=int, step_in_epoch=int, steps=int, model=dict, average=dict, D=dict,
                          G_optimizer=dict, D_optimizer=dict, scaler=dict, random=list)
        load_generators(self.model, state['model'], path)
        if self.average:            # one that begins now begins with the weights
            load_generators(self.average, state['average'] or state['model'], path)
        load_state(self.D, state['D'], path)
        try:
            for optimizer, kept in (self.G_optimizer, state['G_optimizer']), (self.D_optimizer, state['D_optimizer']):
                optimizer.load_state_dict(kept)
                for p, moments in optimizer.state.items():
                    if any(moments[name].shape != p.shape for name in ('exp_avg', 'exp_avg_sq')):
                        raise ValueError('the optimiser is of other weights')
            if state['scaler']:         # of fp16 alone
                self.scaler.load_state_dict(state['scaler'])
            self.epoch, self.step_in_epoch, self.steps = state['epoch'], state['step_in_epoch'], state['steps']
            if len(state['random']) == world_size():
                random, cuda_random = state['random'][rank()]
                torch.set_rng_state(random)
                for gpu, random in zip(self.gpus, cuda_random):
                    torch.cuda.set_rng_state(random, gpu)
        except Exception as error:      # whatever a file from a stranger holds
            raise InputError(f'{path}: not a checkpoint of this run ({reason(error)})') from error


def generator_state(model):
    """The state_dict of G1 and G2 alone: C is in a file of its own."""
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith('residue.')}


def amp_mode(args, device):
    """What --amp stands for on this device: bf16 on a GPU that has it, off elsewhere."""
    return args.amp or ('bf16' if device.type == 'cuda' and torch.cuda.is_bf16_supported(False) else 'off')


def set_precision(args, device):
    """TF32 unless --amp off asks for float32; an evaluation before may have left it otherwise."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = amp_mode(args, device) != 'off'


# ---------------------------------------------------------------------------------- nothing is lost

class Saver:
    """When to save: every `minutes`, and as soon as SIGINT or SIGTERM asks to end. While it is open, the first
    signal lets the step under way come to its end; a second SIGINT ends the process at once. `again` is the
    command that goes on.
    """

    def __init__(self, minutes, again):
        self.minutes, self.again, self.signal, self.saved = minutes, again, 0, time.monotonic()

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

    def end(self, number):
        """End as the signal of this number asks, if there was one."""
        if number:
            print(f'\nstopped by {signal.Signals(number).name} and saved; go on with: {self.again}')
            sys.exit(128 + number)

    def __call__(self, save, now=False):
        """After a step: save() where it is time or `now`, and end where a signal came."""
        now = now or time.monotonic() - self.saved >= 60 * self.minutes
        wish = torch.tensor([self.signal, now], dtype=torch.int64)
        if world_size() > 1:            # all processes stop after the same step
            dist.all_reduce(wish, dist.ReduceOp.MAX)
        number, due = wish.tolist()
        if number or due:
            save()
            self.saved = time.monotonic()
        self.end(number)


# --------------------------------------------------------------------------------------------- GAN

def train_gan(trainer, dataset, args, run, saver, classifier='classifier.pt'):
    """The epochs that are left: a checkpoint and a picture grid every --sample-every of them and at the end."""
    split, progress, examples = dataset.train, Progress(sys.stdout), example_clips(dataset)
    log, start, seen = Log(run / 'log.csv', trainer.steps), time.monotonic(), 0
    count = split.count(args.batch_size)
    left = (args.epochs - trainer.epoch) * len(split) - trainer.step_in_epoch * len(split) // count

    def save(grid=None):
        log.flush()                 # first, as it may find that the weights are no longer worth keeping
        trainer.save(run, split, classifier)
        if grid and rank() == 0:
            draw_grid(example_pictures(trainer.inference, examples, trainer.device), grid)
            seconds = time.monotonic() - start
            args.made['since the last start'] = f'{duration(seconds)}, {seen / seconds:.1f} images/s'
            write_config(run, vars(args), classes=dataset.classes, lms_channels=dataset.lms_channels)
            write_page(run)

    for epoch in range(trainer.epoch + 1, args.epochs + 1):
        trainer.set_epoch(epoch)
        order = args.seed + 1000003 * epoch     # follows from the epoch alone: a resume needs no state
        indices = split.indices(args.batch_size, order)
        for batch in split.batches(args.batch_size, trainer.device, order, trainer.step_in_epoch, rank(),
                                   world_size()):
            whole = indices[trainer.step_in_epoch]
            losses = trainer.step(*batch, size=len(whole))
            trainer.step_in_epoch += 1
            log.add(trainer.steps, epoch, losses, lambda whole=whole: [split.stems[i] for i in whole])
            if args.resident and not seen:      # what a step needs is taken by now, and what is free is known
                split.to(trainer.device)
            seen += len(whole)
            last = trainer.step_in_epoch == count
            if last or progress.due():
                rate = seen / (time.monotonic() - start)
                progress(f'epoch {epoch}/{args.epochs}  step {trainer.step_in_epoch}/{count}  '
                         + '  '.join(f'{name} {loss:.4f}' for name, loss in zip(LOSSES, losses.tolist()))
                         + f'  {rate:.1f} images/s  {duration((left - seen) / rate)} left', last=last)
            if not last:
                saver(save)
        trainer.epoch, trainer.step_in_epoch = epoch, 0
        sampled = epoch % args.sample_every == 0 or epoch == args.epochs
        saver(partial(save, sampled and run / 'samples' / f'epoch-{epoch:04d}.png'), now=sampled)


# ---------------------------------------------------------------------------------------- benchmark

def flop_counter():
    """A counter of floating-point operations; the CPU's attention, which not every release of torch counts, too."""
    aten = torch.ops.aten
    return FlopCounterMode(display=False, custom_mapping={
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward:
            lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)})


def device_name(device):
    """What the networks compute on, in words."""
    return (torch.cuda.get_device_name(device) if device.type == 'cuda' else
            f'{platform.machine()} CPU, {torch.get_num_threads()} threads')


def commit():
    """The commit of this code, or '' where it is in no repository."""
    try:
        return subprocess.run(['git', '-C', Path(__file__).parent, 'rev-parse', '--short', 'HEAD'], capture_output=True,
                              text=True).stdout.strip()
    except OSError:
        return ''


def benchmark(args, device, gpus):
    """Time --benchmark steps on random data; print images/s, arithmetic and peak memory."""
    set_precision(args, device)
    trainer = Trainer(args, 13, 1, None, device, gpus)
    local = -(-args.batch_size // world_size())
    batch = (torch.rand(local, 1, args.size, args.size, device=device) * 2 - 1,
             torch.rand(local, 3, args.size, args.size, device=device) * 2 - 1,
             torch.arange(local, device=device) % 13)
    steps = trainer.G_step, trainer.D_step
    if len(gpus) > 1:       # the threads of DataParallel would escape the counter
        trainer.G_step, trainer.D_step = (step.module for step in steps)
    with flop_counter() as counter:
        trainer.step(*(x[:2] for x in batch))
    work = counter.get_total_flops() / min(2, local)
    trainer.G_step, trainer.D_step = steps
    for step in range(3 + args.benchmark):      # three that warm up: memory, cuDNN's choice
        losses = trainer.step(*batch)
        if step == 2:
            losses.tolist()         # waits for the device
            start = time.monotonic()
    losses.tolist()
    rate = args.benchmark * local * world_size() / (time.monotonic() - start)
    peak = torch.cuda.max_memory_allocated(device) if device.type == 'cuda' else peak_memory()
    print(f'size {args.size}, base {args.base}, disc-base {args.disc_base}, batch {local * world_size()}, '
          f'amp {amp_mode(args, device)}; {device_name(device)}\n'
          f'{rate:.2f} images/s, {work / 1e9:.1f} GFLOP per image: {rate * work / 1e12:.2f} TFLOP/s'
          + (f'; peak memory {peak / 1e9:.2f} GB' if peak else ''), flush=True)


# ----------------------------------------------------------------------------------------- command

class OneOrMore(argparse.Action):
    """A value, or a list of them where several are given."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)


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
        help='dataset: DIR/{chunk,img}/{train,validation}/<class>/<stem>.{wav,jpg} (default: demo data)')
    add('--cache', metavar='DIR', help=f'where packed data is kept (default: {default_cache()})')
    add('--out', metavar='DIR', help='folder of the run, or of several (default: runs/<data>-<variant>-<time>)')
    add('--resume', metavar='DIR', help='go on with this run, with its settings')
    add('--preset', choices=PRESETS, metavar='NAME', help='paper, small (little data) or demo (small at 64x64); flags '
        'override what it sets (default: paper with --data, else demo)')
    add('--workers', type=number(int, 1), metavar='N', help='threads that read files (default: one a core)')
    add('--device', metavar='NAME', help='cpu, cuda, cuda:1, ... (default: all GPUs, else the CPU)')
    add('--seed', type=number(int, 0), nargs='+', action=OneOrMore, default=0, metavar='N',
        help='of the weights, the order and dropout; several: a run each, below --out (default: 0)')
    add('--sample-every', type=number(int, 1), default=5, metavar='N',
        help='epochs between checkpoints with picture grids (default: 5)')
    add('--save-minutes', type=number(float, 0.0), default=10.0, metavar='X',
        help='between other checkpoints (default: 10)')
    add('--benchmark', type=number(int, 1), metavar='N', help='time N steps on random data and train nothing')

    add = parser.add_argument_group('speed and memory').add_argument
    add('--amp', choices=('bf16', 'fp16', 'off'),
        help='precision of the networks; losses and residue are float32 (default: bf16 on a GPU, else off)')
    add('--accumulate', type=number(int, 1), default=1, metavar='K',
        help='go through each batch in K micro-batches: less memory, the same step but for BatchNorm (default: 1)')
    add('--no-resident', dest='resident', action='store_false', help='leave the dataset on the disk, off the GPU')

    add = parser.add_argument_group('the model').add_argument
    add('--variant', choices=(*VARIANTS, *BASELINES, 'all'), nargs='+', action=OneOrMore, default='E', metavar='V',
        help='; '.join(f'{k}: {v}' for k, v in VARIANTS.items()) + "; S2IC, CMCGAN: Table 2's others, with an Adam, a "
        'start and losses of their own; several, or all: a run each, below --out (default: E)')
    add('--size', type=number(int, 32, lambda n: n & (n - 1) == 0, 'a power of two'), default=256, metavar='N',
        help='side of the pictures (default: 256)')
    add('--base', type=number(int, 1), default=64, metavar='N', help="the U-Nets' first width (default: 64)")
    add('--disc-base', type=number(int, 1), default=64, metavar='N', help="the PatchGAN's first width (default: 64)")
    add('--dropout', type=number(float, 0.0, lambda p: p < 1, 'a probability'), default=0.5, metavar='P',
        help="in the U-Nets' decoder, training only (default: 0.5)")
    add('--init-std', type=number(float, 0.0), default=0.2, metavar='X', help='start from N(0, X) (default: 0.2)')

    add = parser.add_argument_group('the training').add_argument
    add('--batch-size', type=number(int, 1), default=64, metavar='N', help='pairs a step, over all GPUs (default: 64)')
    add('--epochs', type=number(int, 1), default=200, metavar='N', help='of G1, G2 and D (default: 200)')
    add('--lr', type=number(float, 0.0), default=0.0008, metavar='X', help='learning rate of Adam (default: 0.0008)')
    add('--lr-decay-epochs', type=number(int, 0), default=0, metavar='N',
        help='linear to zero over the last N epochs (default: 0, constant)')
    add('--betas', type=number(float, 0.0), nargs=2, default=[0.9, 0.999], metavar='X', help='(default: 0.9 0.999)')
    add('--ema', type=number(int, 0), default=0, metavar='N',
        help='generate with an average of the weights whose half-life is N images (default: 0, none)')
    add('--lambdas', type=number(float, 0.0), nargs=5, default=[1.0, 1.0, 100.0, 1.0, 1.0], metavar='X',
        help="weights of L_C (variant B: always 0), L_cGAN and L_L1 in Eq. (6), of I' and I'' in Eq. (5) "
             '(default: 1 1 100 1 1)')
    add('--saturating', action=argparse.BooleanOptionalAction, default=True,
        help="G minimises log(1 - D), the equations' letter; otherwise -log D (default: --saturating)")
    add('--fresh-fakes', action='store_true', help="generate again for D's step (default: it sees those of G's)")

    add = parser.add_argument_group('the classifier C').add_argument
    add('--classifier', metavar='FILE', help='the classifier.pt of another run, used as it is, or '
        "torchvision's resnet50-0676ba61.pth, to start from (default: downloaded once)")
    add('--no-pretrained', dest='pretrained', action='store_false', help='start C without the ImageNet weights')
    add('--classifier-epochs', type=number(int, 1), default=20, metavar='N',
        help='the best by a held-out tenth of train counts (default: 20)')
    add('--classifier-batch-size', type=number(int, 2), default=32, metavar='N', help='(default: 32)')
    return parser


def parse_args(argv=None):
    """The settings of each run that is asked for, one for each variant and seed: flags given, else those of the run
    to resume, else a baseline's own, else the preset's, else the paper's. Raises InputError where flags would change
    the model of a resumed run, or a baseline has no such choice.
    """
    parser = make_parser()
    defaults = vars(parser.parse_args([]))
    given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults))))
    given = {name: value for name, value in given.items() if value is not None}         # the flags that were typed
    variants, seeds = (list(dict.fromkeys(x if isinstance(x, list) else [x]))
                       for x in (given.get('variant', 'E'), given.get('seed', 0)))
    variants = [*VARIANTS, *BASELINES] if 'all' in variants else variants
    group = len(variants) * len(seeds) > 1          # which shares C
    if group and ('benchmark' in given or 'resume' in given or 'out' not in given):
        raise InputError('several runs: --out is needed, and neither --benchmark nor --resume goes with them; the '
                         'same command again goes on with those that are not done')
    if 'resume' in given:
        config = load_config(given['resume'])
        kept = config.keys() & {*defaults, 'group', 'made'} - {'resume', 'device', 'benchmark'}
        settings = {**defaults, 'group': False, 'made': {}, **{name: config[name] for name in kept}, **given}
        for name in MODEL_SETTINGS:
            if settings[name] != config[name]:
                raise InputError(f'--{name.replace("_", "-")} {settings[name]}: {given["resume"]} was trained with '
                                 f'{config[name]}; leave the flag out, or start a run of its own')
        variants = [settings['variant']]
    for name in given.keys() & {'dropout', 'saturating', 'fresh_fakes'} if {*variants} & {*BASELINES} else ():
        raise InputError(f'--{name.replace("_", "-")}: S2IC and CMCGAN have no such choice; leave the flag out, or '
                         'train them by a command of their own')
    if 'resume' in given:
        return [argparse.Namespace(**settings)]

    preset = given.get('preset') or ('paper' if 'data' in given or 'benchmark' in given else 'demo')
    if 'data' not in given and 'benchmark' not in given:
        print("no --data: the built-in demo data; the paper's run: python train.py --data Sub-URMP")
    found = []
    for variant in variants:
        own = PRESETS[preset]
        if variant in BASELINES:
            own = own | SETTINGS | ({'epochs': EPOCHS[variant]} if preset == 'paper' else {})
        settings = {**defaults, **own, **given, 'preset': preset, 'variant': variant, 'group': group, 'made': {
            'command': shlex.join(['python', 'train.py', *(sys.argv[1:] if argv is None else argv)])}}
        if own and (variant in BASELINES or not {*variants[:variants.index(variant)]} - {*BASELINES}):
            print(f'model {variant}, preset {preset}: ' + ', '.join(
                f'{name} {settings[name]} (paper {defaults[name]})' for name in own))
        found += [argparse.Namespace(**dict(settings, seed=seed)) for seed in seeds]
    return found


def plan_runs(found):
    """The runs of parse_args(), [(settings, folder)]; one that is there goes on. Raises InputError where one that is
    there has other settings.
    """
    if not found[0].group or found[0].resume:
        args = found[0]
        name = Path(args.data).resolve().name if args.data else 'demo'
        return [(args, Path(args.resume or args.out
                            or f'runs/{name}-{args.variant}-{time.strftime("%Y%m%d-%H%M%S")}'))]
    plan = []
    for settings in found:
        run = Path(settings.out, f'{settings.variant}-seed-{settings.seed}')
        if (run / 'config.json').exists():      # go on, with the same settings alone
            settings.resume, config = str(run), load_config(run)
            settings.made = config.setdefault('made', {})       # it may be the same command in other words
            for name, value in vars(settings).items():
                if name in ('data', 'cache') and value:
                    value = str(Path(value).resolve())
                if name not in ('out', 'resume', 'device', 'workers', 'save_minutes') and config.get(name) != value:
                    raise InputError(f'{run}: its {name} is {config.get(name)}, not {value}: the same settings go on '
                                     'there; others want another --out')
        plan.append((settings, run))
    return plan


def train(args, run, device, gpus, again):
    """A run from its data to its figures; `again` is the command that goes on."""
    set_precision(args, device)
    data = rank0_first(lambda: args.data or demo_data(args.size, args.cache), local=True)
    dataset = rank0_first(lambda: open_dataset(data, args.size, args.cache, workers=args.workers), local=True)
    if len(dataset.classes) < 2:
        raise InputError(f'{data}: only one class, {dataset.classes[0]}: a classifier needs at least two')
    if rank() == 0:
        args.made = {**args.made, 'machine': device_name(device), 'commit': commit()}
        config = write_config(run, vars(args), classes=dataset.classes, lms_channels=dataset.lms_channels)
    print(f'run {run}: {len(dataset.train)} pairs in train, {len(dataset.validation)} in validation, '
          f'{len(dataset.classes)} classes; on '
          + (f'{world_size()} processes, this one on ' if world_size() > 1 else '')
          + (f'GPUs {gpus}' if len(gpus) > 1 else str(device)), flush=True)
    path = (run.parent if args.group else run) / 'classifier.pt'        # the runs of a group share C
    advice = f'--classifier-batch-size {args.classifier_batch_size} must be lower'
    audio = None
    if args.variant == 'S2IC':
        audio, _ = rank0_first(lambda: get_audio_classifier(dataset, device), local=True)
    try:
        with Saver(args.save_minutes, again) as saver:
            classifier = rank0_first(lambda: get_classifier(args, dataset, path, device, gpus,
                                                            lambda: saver.end(saver.signal)))
            advice = (f'--batch-size {args.batch_size} must be lower, or the same batch in more micro-batches: '
                      f'--accumulate {2 * args.accumulate}')
            trainer = Trainer(args, len(dataset.classes), dataset.lms_channels, classifier, device, gpus, audio)
            if os.path.lexists(run / 'checkpoint.pt'):       # a broken link is no reason to start again
                trainer.load(run / 'checkpoint.pt')
                print(f'resumed after {trainer.epoch} of {args.epochs} epochs and {trainer.step_in_epoch} steps')
            train_gan(trainer, dataset, args, run, saver, os.path.relpath(path, run))
    except torch.OutOfMemoryError as error:
        resident = dataset.train.resident_bytes
        raise InputError(f'the memory of {device} is too small: {advice}' + (
            f'; --no-resident frees the {resident / 1e9:.1f} GB of the dataset' if resident else '')) from error
    if rank() == 0:
        print(report_text(run, config, evaluate_run(run, config, trainer.inference, dataset, device,
                                                    trained=dict(epoch=trainer.epoch, steps=trainer.steps))))
        write_page(run)
        print(f'its page: {run / "report.html"}', flush=True)


def main(argv=None):
    found = parse_args(argv)
    args = found[0]
    with distributed(args):
        device = choose_device(args.device)
        gpus = list(range(torch.cuda.device_count())) if args.device in (None, 'cuda') else []
        if args.benchmark:
            return benchmark(args, device, gpus)
        plan = broadcast(plan_runs(found) if rank() == 0 else None)
        left = broadcast([(settings, run) for settings, run in plan if not (run / 'metrics.json').exists()])
        begun = time.monotonic()
        for done, (settings, run) in enumerate(left if len(plan) > 1 else plan):
            if len(plan) > 1:
                seconds = (time.monotonic() - begun) / max(1, done) * (len(left) - done)
                print(f'\nrun {len(plan) - len(left) + done + 1} of {len(plan)}: {run}'
                      + (f'; all will be done in about {duration(seconds)}' if done else ''))
            again = f'python train.py --resume {run}' if len(plan) == 1 else 'the same command'
            with open_run(run, vars(settings)) if rank() == 0 else nullcontext():
                train(settings, run, device, gpus, again)
        if len(plan) > 1 and rank() == 0:
            compare_runs([run for _, run in plan], args.out)


if __name__ == '__main__':
    run_command(main)
