"""Train CAR-GAN: first the classifier C on the real frames, then G1, G2 and D.

    python train.py                                  # the built-in demo data, minutes on a CPU
    python train.py --data Sub-URMP                  # the paper's run: 256x256, batch 64, 200 epochs
    python train.py --data mydata --preset small     # little data: a gentler Adam, an average of the weights
    python train.py --resume runs/NAME               # go on where a run stopped
    torchrun --nproc_per_node=4 train.py --data Sub-URMP       # a process a GPU, on one node or many

All settings are the paper's unless a preset or a flag says otherwise. A run is one folder: config.json,
classifier.pt, checkpoint.pt (to go on), model.pt (to generate), log.csv, samples/, metrics.json, grid.png.
"""
import argparse
import copy
import itertools
import os
import signal
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from cargan import (CARGAN, VARIANTS, Classifier, PatchDiscriminator, classification_loss, discriminator_loss,
                    generator_loss, l1_loss, objective)
from demo import demo_data
from evaluate import digest, evaluate_run, print_report, train_classifier
from preprocess import open_dataset
from report import LOSSES, Log, draw_grid, example_clips, example_pictures, way_back
from runs import (InputError, Progress, broadcast, choose_device, default_cache, distributed, duration, load_config,
                  load_file, load_state, open_run, peak_memory, rank, rank0_first, reason, run_command, save_file,
                  world_size, write_config)

SMALL = dict(base=32, disc_base=16, dropout=0.0, init_std=0.02, batch_size=8, epochs=40, lr=4e-4, betas=[0.5, 0.999],
             saturating=False, ema=1500)
PRESETS = {     # what each sets otherwise than the paper
    'paper': {},
    'small': dict(SMALL, size=128),
    'demo': dict(SMALL, size=64, epochs=16, pretrained=False, classifier_epochs=4),
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
    """G1, G2, C and D with their optimisers: section 3.5's two alternating steps."""

    def __init__(self, args, num_classes, lms_channels, classifier, device, gpus=()):
        torch.manual_seed(args.seed)        # the same start, whether C was trained just now or loaded
        self.device, self.args = device, args
        self.gpus = list(gpus) or [device] * (device.type == 'cuda')
        self.epoch, self.step_in_epoch, self.steps = 0, 0, 0        # whole epochs, steps of the next one, of all
        self.model = CARGAN(num_classes, args.size, args.base, args.variant, lms_channels, classifier,
                            args.dropout, args.init_std).to(device, memory_format=torch.channels_last).train()
        self.D = PatchDiscriminator(lms_channels + 3, args.disc_base, args.variant != 'A', args.init_std)
        self.D.to(device, memory_format=torch.channels_last)        # the faster layout, on a CPU too
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
        self.set_requires_grad(self.G_optimizer)    # DistributedDataParallel asks here which weights a step moves
        self.G_step = self._parallel(GeneratorStep(self.model, self.D, stages, args.saturating, dtype), gpus)
        self.set_requires_grad(self.D_optimizer)
        self.D_step = self._parallel(
            DiscriminatorStep(self.D, self.model if args.fresh_fakes else None, stages, dtype), gpus)
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
        left, over = self.args.epochs + 1 - epoch, (self.args.lr_decay_epochs or 0) + 1
        for optimizer in self.G_optimizer, self.D_optimizer:        # a resume may have brought other settings
            optimizer.param_groups[0].update(lr=self.args.lr * min(1.0, left / over), betas=tuple(self.args.betas))

    @property
    def inference(self):
        """The model that generates outside training: the average where there is one."""
        return self.average or self.model

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
            recalibrate_batchnorm(self.inference, split, self.args.batch_size, self.device, self.args.seed)
        state = self.state()            # of all processes
        for name, tensor in itertools.chain(*(state[kind].items() for kind in ('model', 'average', 'D'))):
            if not tensor.isfinite().all():
                raise InputError(f'{name} is not finite after step {self.steps}; {way_back(run)}')
        if rank() == 0:
            C = dict(classifier=classifier, classifier_digest=digest(self.model.residue.classifier))
            save_file(dict(state, **C), run / 'checkpoint.pt')
            save_file(dict(C, model=state['average'] or state['model'], epoch=self.epoch, steps=self.steps),
                      run / 'model.pt')

    def load(self, path):
        """Go on from a checkpoint. Raises InputError, naming the file, where it does not fit."""
        state = load_file(path, epoch=int, step_in_epoch=int, steps=int, model=dict, average=dict, D=dict,
                          G_optimizer=dict, D_optimizer=dict, scaler=dict, random=list)
        try:
            load_generators(self.model, state['model'])
            if self.average:            # one that begins now begins with the weights
                load_generators(self.average, state['average'] or state['model'])
            self.D.load_state_dict(state['D'])
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


def load_generators(model, state):
    """Load what generator_state() gave. Raises RuntimeError where it is another network's."""
    model.load_state_dict({**model.residue.state_dict(prefix='residue.'), **state})


@torch.no_grad()
def recalibrate_batchnorm(model, split, batch_size, device, seed=0, pictures=256):
    """Set the running statistics of G1's and G2's BatchNorm to those over some pictures of a split, without
    dropout: at the paper's learning rate the weights outrun the running averages. Training does not read them.

    Variances are over all pictures at once, so that small batches do not lose what lies between their means.
    """
    training, sums, done = model.training, {}, 0
    norms = [norm for norm in model.train().modules()
             if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.training]      # C's are not

    def note(norm, inputs):
        var, mean = torch.var_mean(inputs[0], dim=(0, 2, 3), correction=0)                 # (C,)
        moments = torch.stack([torch.ones_like(mean), mean, var + mean ** 2]).cpu().double()
        sums[norm] = sums.get(norm, 0) + moments * (inputs[0].numel() // len(mean))         # (3, C)

    model.eval()
    hooks = [norm.train().register_forward_pre_hook(note) for norm in norms]
    for lms, _, label in split.batches(max(batch_size, 16), device, seed):
        model(lms, label)
        done += len(label)
        if done >= pictures:
            break
    for norm, hook in zip(norms, hooks):
        hook.remove()
        norm.num_batches_tracked.zero_()        # the same after every save, however many came before
        n, total, squares = sums[norm]
        norm.running_mean.copy_(total / n)
        norm.running_var.copy_((squares - total ** 2 / n) / (n - 1))
    model.train(training)


def amp_mode(args, device):
    """What --amp stands for on this device: bf16 on a GPU that has it, off elsewhere."""
    return args.amp or ('bf16' if device.type == 'cuda' and torch.cuda.is_bf16_supported(False) else 'off')


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


# --------------------------------------------------------------------------------------- classifier

def get_classifier(args, dataset, path, device, gpus, saver):
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
            batch_size=args.classifier_batch_size, seed=args.seed, device=device, gpus=gpus, part=part,
            check=lambda: saver.end(saver.signal))
    if not path.exists():
        save_file(state, path)
    part.unlink(missing_ok=True)
    return classifier.to(device)


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


def benchmark(args, device, gpus):
    """Time --benchmark steps on random data; print images/s, arithmetic and peak memory."""
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
    if device.type == 'cuda':
        name, peak = torch.cuda.get_device_name(device), torch.cuda.max_memory_allocated(device)
    else:
        name, peak = f'CPU, {torch.get_num_threads()} threads', peak_memory()
    print(f'size {args.size}, base {args.base}, disc-base {args.disc_base}, batch {local * world_size()}, '
          f'amp {amp_mode(args, device)}; {name}\n'
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
    add('--variant', choices=VARIANTS, nargs='+', action=OneOrMore, default='E', metavar='V',
        help='; '.join(f'{k}: {v}' for k, v in VARIANTS.items()) + '; several: a run each, below --out (default: E)')
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
    add('--lr-decay-epochs', type=number(int, 0), metavar='N',
        help='linear to zero over the last N epochs (default: 0, constant; small, demo: a third)')
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
        help='at most: it ends once 99.56 %% of a held-out tenth of train are recognised (default: 20)')
    add('--classifier-batch-size', type=number(int, 2), default=32, metavar='N', help='(default: 32)')
    return parser


def parse_args(argv=None):
    """The settings: flags given, else those of the run to resume, else the preset's, else the paper's.
    Raises InputError where flags would change the model of a resumed run.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.resume:
        config = load_config(args.resume)
        parser.set_defaults(**{name: config[name] for name in vars(args)
                               if name in config and name not in ('resume', 'device', 'benchmark')})
        args = parser.parse_args(argv)
        for name in MODEL_SETTINGS:
            if getattr(args, name) != config[name]:
                raise InputError(f'--{name.replace("_", "-")} {getattr(args, name)}: {args.resume} was trained with '
                                 f'{config[name]}; leave the flag out, or start a run of its own')
    else:
        preset = args.preset or ('paper' if args.data or args.benchmark else 'demo')
        paper = {'lr_decay_epochs': 0, **{name: parser.get_default(name) for name in PRESETS[preset]}}
        parser.set_defaults(preset=preset, **PRESETS[preset])
        args = parser.parse_args(argv)
        if args.lr_decay_epochs is None:
            args.lr_decay_epochs = 0 if preset == 'paper' else args.epochs // 3
        if not args.data and not args.benchmark:
            print("no --data: the built-in demo data; the paper's run: python train.py --data Sub-URMP")
        if preset != 'paper':
            print(f'preset {preset}: ' + ', '.join(f'{name} {getattr(args, name)} (paper {value})'
                                                   for name, value in paper.items()), end='\n\n')
    args.group = bool(args.resume) and config.get('group', False)       # whether the run shares C with others
    return args


def plan_runs(args):
    """The runs that a command asks for, [(args, folder)]: one, or one for each variant and seed below --out.
    Raises InputError where one that is there has other settings.
    """
    if not (isinstance(args.variant, list) or isinstance(args.seed, list)):
        name = Path(args.data).resolve().name if args.data else 'demo'
        return [(args, Path(args.resume or args.out
                            or f'runs/{name}-{args.variant}-{time.strftime("%Y%m%d-%H%M%S")}'))]
    if args.benchmark or args.resume or not args.out:
        raise InputError('several runs: --out is needed, and neither --benchmark nor --resume goes with them; the '
                         'same command again goes on with those that are not done')
    plan = []
    for variant, seed in itertools.product(*(x if isinstance(x, list) else [x] for x in (args.variant, args.seed))):
        run = Path(args.out, f'{variant}-seed-{seed}')
        settings = argparse.Namespace(**dict(vars(args), variant=variant, seed=seed, group=True))
        if (run / 'config.json').exists():      # go on, with the same settings alone
            settings.resume, config = str(run), load_config(run)
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
    data = rank0_first(lambda: args.data or demo_data(args.size, args.cache), local=True)
    dataset = rank0_first(lambda: open_dataset(data, args.size, args.cache, workers=args.workers), local=True)
    if len(dataset.classes) < 2:
        raise InputError(f'{data}: only one class, {dataset.classes[0]}: a classifier needs at least two')
    if rank() == 0:
        config = write_config(run, vars(args), classes=dataset.classes, lms_channels=dataset.lms_channels)
    print(f'run {run}: {len(dataset.train)} pairs in train, {len(dataset.validation)} in validation, '
          f'{len(dataset.classes)} classes; on '
          + (f'{world_size()} processes, this one on ' if world_size() > 1 else '')
          + (f'GPUs {gpus}' if len(gpus) > 1 else str(device)), flush=True)
    path = (run.parent if args.group else run) / 'classifier.pt'        # the runs of a group share C
    advice = f'--classifier-batch-size {args.classifier_batch_size} must be lower'
    try:
        with Saver(args.save_minutes, again) as saver:
            classifier = rank0_first(lambda: get_classifier(args, dataset, path, device, gpus, saver))
            advice = (f'--batch-size {args.batch_size} must be lower, or the same batch in more micro-batches: '
                      f'--accumulate {2 * args.accumulate}')
            trainer = Trainer(args, len(dataset.classes), dataset.lms_channels, classifier, device, gpus)
            if os.path.lexists(run / 'checkpoint.pt'):       # a broken link is no reason to start again
                trainer.load(run / 'checkpoint.pt')
                print(f'resumed after {trainer.epoch} of {args.epochs} epochs and {trainer.step_in_epoch} steps')
            train_gan(trainer, dataset, args, run, saver, os.path.relpath(path, run))
    except torch.OutOfMemoryError as error:
        resident = dataset.train.resident_bytes
        raise InputError(f'the memory of {device} is too small: {advice}' + (
            f'; --no-resident frees the {resident / 1e9:.1f} GB of the dataset' if resident else '')) from error
    if rank() == 0:
        print_report(run, config, evaluate_run(run, config, trainer.inference, dataset, device,
                                               trained=dict(epoch=trainer.epoch, steps=trainer.steps)))


def main(argv=None):
    args = parse_args(argv)
    with distributed(args):
        device = choose_device(args.device)
        gpus = list(range(torch.cuda.device_count())) if args.device in (None, 'cuda') else []
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = amp_mode(args, device) != 'off'
        plan = broadcast(plan_runs(args) if rank() == 0 else None)
        if args.benchmark:
            return benchmark(args, device, gpus)
        for i, (settings, run) in enumerate(plan, 1):
            if len(plan) > 1:
                print(f'\nrun {i} of {len(plan)}: {run}' + (' is done' if (run / 'metrics.json').exists() else ''))
                if broadcast((run / 'metrics.json').exists()):
                    continue
            again = f'python train.py --resume {run}' if len(plan) == 1 else 'the same command'
            with open_run(run, vars(settings)) if rank() == 0 else nullcontext():
                train(settings, run, device, gpus, again)
        if len(plan) > 1:
            print(f'\nthe runs side by side: python evaluate.py {args.out}')


if __name__ == '__main__':
    run_command(main)
