"""Train CAR-GAN: first the classifier C on the real frames, then G1, G2 and D.

    python train.py                                  # the built-in demo data, minutes on a CPU
    python train.py --data Sub-URMP                  # the paper's run: 256x256, batch 64, 200 epochs
    python train.py --resume runs/NAME               # go on where a run stopped

All settings are the paper's unless a flag says otherwise; without --data a small preset is used. A run
is one folder: config.json, classifier.pt, checkpoint.pt, log.csv, samples/, metrics.json, grid.png.
"""
import argparse
import csv
import json
import sys
import time
from pathlib import Path

import torch
from torch import nn

from cargan import (CARGAN, VARIANTS, Classifier, PatchDiscriminator, classification_loss, discriminator_loss,
                    generator_loss, l1_loss, objective)
from evaluate import (choose_device, evaluate_run, example_clips, load_config, load_file, load_state, report,
                      stage_grid, train_classifier)
from preprocess import InputError, Progress, default_cache, demo_data, open_dataset, reason, run_command, written_whole

# What `python train.py` without --data changes: small enough for two CPU cores and ten minutes.
DEMO_PRESET = dict(size=64, base=32, disc_base=16, batch_size=8, epochs=8, lr=4e-4, betas=[0.5, 0.999], init_std=0.02,
                   sample_every=2, pretrained=False, classifier_epochs=4)
LOSSES = ('L_C', 'L_cGAN', 'L_L1', 'L_D')       # Eq. (2), G's side of Eq. (5), L1, D's side of Eq. (5)


# ----------------------------------------------------------------------------------- one step of each

class GeneratorStep(nn.Module):
    """The G step's forward: batch -> (stages, terms). A module, so that DataParallel can split it.

    stages: (I', I''), or (I',) for model D. terms (1, 3): L_C, L_cGAN and L_L1 times the batch's size,
    so that the parts of a split batch add up.
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
        return stages, terms[None] * len(label)


class DiscriminatorStep(nn.Module):
    """The D step's forward: (lms, image, *stages) -> L_D (1, 1), times the batch's size."""

    def __init__(self, D):
        super().__init__()
        self.D = D

    def forward(self, lms, image, *stages):
        real, *fakes = [self.D(torch.cat([lms, x], dim=1)) for x in (image, *stages)]
        return discriminator_loss(real, *fakes)[None, None] * len(lms)


class Trainer:
    """G1, G2, C and D with their optimisers: section 4.1's two alternating steps."""

    def __init__(self, args, num_classes, lms_channels, classifier, device, gpus=()):
        torch.manual_seed(args.seed)        # the same start, whether C was trained just now or loaded
        self.device, self.epoch, self.steps = device, 0, 0
        self.model = CARGAN(num_classes, args.size, args.base, args.variant, lms_channels, classifier,
                            args.dropout, args.init_std).to(device).train()
        self.D = PatchDiscriminator(lms_channels + 3, args.disc_base, args.variant != 'A', args.init_std).to(device)
        self.lambdas = (0.0 if args.variant == 'B' else args.lambda_c, args.lambda_gan, args.lambda_l1)
        self.G_step = GeneratorStep(self.model, self.D, args.stage_weights, args.saturating)
        self.D_step = DiscriminatorStep(self.D)
        if len(gpus) > 1:
            self.G_step, self.D_step = (nn.DataParallel(step, gpus) for step in (self.G_step, self.D_step))
        trained = [p for p in self.model.parameters() if p.requires_grad]                 # C is frozen
        self.G_optimizer = torch.optim.Adam(trained, lr=args.lr, betas=args.betas, fused=True)
        self.D_optimizer = torch.optim.Adam(self.D.parameters(), lr=args.lr, betas=args.betas, fused=True)

    def step(self, lms, image, label):
        """G1 and G2 with D fixed, then D with G1 and G2 fixed. Returns LOSSES (4,) on the device."""
        self.D.requires_grad_(False)
        stages, terms = self.G_step(lms, image, label)
        terms = terms.sum(dim=0) / len(label)
        self.G_optimizer.zero_grad()
        objective(*terms, *self.lambdas).backward()
        self.G_optimizer.step()

        self.D.requires_grad_(True)
        L_D = self.D_step(lms, image, *(stage.detach() for stage in stages)).sum() / len(label)
        self.D_optimizer.zero_grad()
        (self.lambdas[1] * L_D).backward()
        self.D_optimizer.step()
        self.steps += 1
        return torch.cat([terms.detach(), L_D.detach()[None]])

    def save(self, path):
        """Write all that a bit-exact resume needs, whole or not at all."""
        state = dict(epoch=self.epoch, steps=self.steps, model=self.model.state_dict(), D=self.D.state_dict(),
                     G_optimizer=self.G_optimizer.state_dict(), D_optimizer=self.D_optimizer.state_dict(),
                     random=torch.get_rng_state(), cuda_random=torch.cuda.get_rng_state_all())
        with written_whole(path) as part:
            torch.save(state, part)

    def load(self, path):
        """Go on from a checkpoint. Raises InputError, naming the file, where it does not fit."""
        state = load_file(path, 'epoch', 'steps', 'model', 'D', 'G_optimizer', 'D_optimizer', 'random', 'cuda_random')
        for name in ('model', 'D', 'G_optimizer', 'D_optimizer'):
            load_state(getattr(self, name), state[name], path)
        self.epoch, self.steps = state['epoch'], state['steps']
        torch.set_rng_state(state['random'])
        if torch.cuda.is_available() and len(state['cuda_random']) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state['cuda_random'])


# --------------------------------------------------------------------------------------- classifier

def get_classifier(args, dataset, run, device, gpus):
    """C: the run's own classifier.pt, that of --classifier, or one trained now and kept in the run."""
    path = run / 'classifier.pt'
    source = path if path.exists() else args.classifier
    if source:
        state = load_file(source, 'classifier', 'classes', 'accuracy')
        if state['classes'] != dataset.classes:
            raise InputError(f'{source}: a classifier of other classes than those of {args.data}')
        classifier = Classifier(len(dataset.classes), pretrained=False)
        load_state(classifier, state['classifier'], source)
        print(f'classifier: {source}, accuracy {state["accuracy"]:.4f} on the validation frames')
    else:
        classifier = new_classifier(args, len(dataset.classes))
        state = train_classifier(
            classifier.to(device), dataset, epochs=args.classifier_epochs, accuracy=args.classifier_accuracy,
            lr=args.classifier_lr or (1e-4 if args.pretrained else 1e-3), batch_size=args.batch_size, seed=args.seed,
            device=device, gpus=gpus)
    if not path.exists():
        with written_whole(path) as part:
            torch.save(state, part)
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
        self.every, self.rows, kept = every, [], []
        if steps and path.exists():
            with open(path, newline='') as file:
                kept = [row for row in csv.reader(file) if row and row[0].isdigit() and int(row[0]) <= steps]
        with written_whole(path) as part, open(part, 'w', newline='') as file:
            csv.writer(file).writerows([('step', 'epoch', *LOSSES), *kept])
        self.path = path

    def add(self, step, epoch, losses):
        self.rows.append((step, epoch, losses))
        if len(self.rows) >= self.every:
            self.flush()

    def flush(self):
        with open(self.path, 'a', newline='') as file:
            csv.writer(file).writerows((step, epoch, *(f'{loss:.6g}' for loss in losses.tolist()))
                                       for step, epoch, losses in self.rows)
        self.rows = []


def train_gan(trainer, dataset, args, run):
    """The epochs that are left: a checkpoint after each, a picture grid every --sample-every."""
    split, per_epoch = dataset.train, dataset.train.count(args.batch_size)
    log, progress = Log(run / 'log.csv', trainer.steps), Progress(sys.stdout)
    examples, start, seen = example_clips(dataset), time.monotonic(), 0
    left = (args.epochs - trainer.epoch) * len(split)
    for epoch in range(trainer.epoch + 1, args.epochs + 1):
        order = args.seed + 1000003 * epoch     # follows from the epoch alone: a resume needs no state
        for i, batch in enumerate(split.batches(args.batch_size, trainer.device, order), 1):
            losses = trainer.step(*batch)
            log.add(trainer.steps, epoch, losses)
            seen += len(batch[2])
            if i == per_epoch or progress.due():
                rate = seen / (time.monotonic() - start)
                progress(f'epoch {epoch}/{args.epochs}  step {i}/{per_epoch}  '
                         + '  '.join(f'{name} {loss:.4f}' for name, loss in zip(LOSSES, losses.tolist()))
                         + f'  {rate:.1f} images/s  {duration((left - seen) / rate)} left', last=i == per_epoch)
        trainer.epoch = epoch
        log.flush()
        trainer.save(run / 'checkpoint.pt')
        if epoch % args.sample_every == 0 or epoch == args.epochs:
            stage_grid(trainer.model, examples, run / 'samples' / f'epoch-{epoch:04d}.png', trainer.device)


def duration(seconds):
    """Seconds as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f'{minutes // 60}:{minutes % 60:02d}:{seconds:02d}'


def benchmark(args, device, gpus):
    """Time --benchmark steps on random data, after one that warms up; print images/s and peak memory."""
    trainer = Trainer(args, 13, 1, None, device, gpus)
    batch = (torch.rand(args.batch_size, 1, args.size, args.size, device=device) * 2 - 1,
             torch.rand(args.batch_size, 3, args.size, args.size, device=device) * 2 - 1,
             torch.arange(args.batch_size, device=device) % 13)
    for step in range(args.benchmark + 1):
        if step == 1:
            start = time.monotonic()
        losses = trainer.step(*batch).tolist()      # waits for the device
    rate = args.benchmark * args.batch_size / (time.monotonic() - start)
    if device.type == 'cuda':
        peak = torch.cuda.max_memory_allocated(device)
    else:
        import resource         # not on Windows
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
    print(f'size {args.size}, base {args.base}, disc-base {args.disc_base}, batch {args.batch_size}, {device}: '
          f'{rate:.2f} images/s, peak memory {peak / 1e9:.2f} GB, losses {losses}')


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
    add('--benchmark', type=number(int, 1), metavar='N', help='time N steps on random data and train nothing')

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
    add('--saturating', action='store_true', help="G minimises log(1 - D), the equations' letter (default: -log D)")

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
        parser.set_defaults(**{name: config[name] for name in vars(args)
                               if name in config and name not in ('resume', 'device', 'gpus', 'benchmark')})
        args = parser.parse_args(argv)
        for name in ('size', 'base', 'disc_base', 'variant'):
            if getattr(args, name) != config[name]:
                raise InputError(f'--{name.replace("_", "-")} {getattr(args, name)}: {args.resume} was trained with '
                                 f'{config[name]}; leave the flag out, or start a run of its own')
    elif args.data is None and args.benchmark is None:
        usual = {name: parser.get_default(name) for name in DEMO_PRESET}
        parser.set_defaults(**DEMO_PRESET)
        args = parser.parse_args(argv)
        def words(value):
            return ' '.join(map(str, value)) if isinstance(value, list) else str(value)

        changed = ['--no-pretrained' if name == 'pretrained' else
                   f'--{name.replace("_", "-")} {words(vars(args)[name])} ({words(usual[name])})'
                   for name in DEMO_PRESET if vars(args)[name] != usual[name]]
        print(f'no --data: the built-in demo data, with a small preset (in brackets the usual value):\n'
              f'  {" ".join(changed)}\nthe paper\'s run: python train.py --data Sub-URMP\n')
    return args


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


def open_run(args, dataset):
    """The run's folder, with config.json in it. Raises InputError where another run is there; one that
    got no further than its settings may be taken over.
    """
    name = Path(args.data).resolve().name if args.data else 'demo'
    run = Path(args.resume or args.out or f'runs/{name}-{args.variant}-{time.strftime("%Y%m%d-%H%M%S")}')
    if not args.resume and run.exists() and (
            not run.is_dir() or any(path.name not in ('config.json', 'samples') for path in run.iterdir())):
        raise InputError(f'{run}: not an empty folder; go on with it by --resume {run}, or name another by --out')
    (run / 'samples').mkdir(parents=True, exist_ok=True)
    config = dict(vars(args), data=args.data and str(Path(args.data).resolve()),
                  cache=args.cache and str(Path(args.cache).resolve()), resume=None,
                  classes=dataset.classes, lms_channels=dataset.lms_channels)
    with written_whole(run / 'config.json') as part:
        part.write_text(json.dumps(config, indent=1) + '\n')
    return run, config


def main(argv=None):
    args = parse_args(argv)
    device, gpus = choose_gpus(args)
    if args.benchmark:
        return benchmark(args, device, gpus)
    data = args.data or demo_data(args.size, args.cache)
    dataset = open_dataset(data, args.size, args.cache, args.strict, args.workers)
    run, config = open_run(args, dataset)
    print(f'run {run}: {len(dataset.train)} pairs in train, {len(dataset.validation)} in validation, '
          f'{len(dataset.classes)} classes; on {f"GPUs {gpus}" if len(gpus) > 1 else device}', flush=True)
    classifier = get_classifier(args, dataset, run, device, gpus)
    trainer = Trainer(args, len(dataset.classes), dataset.lms_channels, classifier, device, gpus)
    if (run / 'checkpoint.pt').exists():
        trainer.load(run / 'checkpoint.pt')
        print(f'resumed after epoch {trainer.epoch} of {args.epochs}')
    train_gan(trainer, dataset, args, run)
    report(run, config, evaluate_run(run, config, trainer.model, dataset, device), dataset)


if __name__ == '__main__':
    run_command(main)
