"""What a run of CAR-GAN has learned: the paper's Table 2, and pictures.

    python evaluate.py                     # the newest run below runs/
    python evaluate.py runs/paper          # any run: a folder that train.py made

Every clip of both splits goes through G1 and G2; the run's own classifier C says what the pictures
show. Writes metrics.json and grid.png (a row an instrument: LMS, I', I'', truth) into the run.
"""
import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from cargan import CARGAN
from preprocess import (InputError, Progress, default_cache, demo_data, open_dataset, reason, run_command,
                        written_whole)

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


# ------------------------------------------------------------------------------------------ figures

@torch.inference_mode()
def measure(model, split, batch_size=64, device='cpu', name=''):
    """Generate from every clip of a split: accuracy by C (Table 2) and L1 to the truth.

    Returns {'coarse': {'accuracy', 'l1'}, 'fine': {...}, 'real': {'accuracy'}}; the L1 distance is the
    mean over pixels and channels in units of [-1, 1], as in the loss.
    """
    correct, l1 = dict(coarse=0, fine=0, real=0), dict(coarse=0.0, fine=0.0)
    progress, done = Progress(), 0
    for lms, image, label in split.batches(batch_size, device):
        coarse, fine, _ = model(lms, label)
        for key, picture in (('coarse', coarse), ('fine', fine), ('real', image)):
            correct[key] += (model.residue.classifier(picture).argmax(dim=1) == label).sum()
            if key in l1:
                l1[key] += F.l1_loss(picture, image) * len(label)
        done += len(label)
        progress(f'evaluating {name}: {done} of {len(split)} clips', last=done == len(split))
    figures = {key: {'accuracy': float(count) / len(split)} for key, count in correct.items()}
    for key, total in l1.items():
        figures[key]['l1'] = float(total) / len(split)
    return figures


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
    for key, title in (('coarse', "I'  coarse"), ('fine', "I'' fine"), ('real', 'real frames')):
        lines.append(f'{title:12}' + ''.join(cell(split, key, figure) for split in metrics
                                             for figure in ('accuracy', 'l1'))
                     + '   |' + ''.join(paper(split, key) for split in metrics))
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


# ------------------------------------------------------------------------------------------ command

def evaluate_run(run, config, model, dataset, batch_size=64, device='cpu'):
    """Measure a model on both splits; print the table, write metrics.json and grid.png into `run`."""
    run, model = Path(run), model.eval()
    metrics = {name: measure(model, getattr(dataset, name), batch_size, device, name)
               for name in ('train', 'validation')}
    with written_whole(run / 'metrics.json') as part:
        part.write_text(json.dumps(metrics, indent=1) + '\n')
    stage_grid(model, example_clips(dataset), run / 'grid.png', device)
    print(f'\n{run}: model {config["variant"]}, {config["size"]}x{config["size"]}, '
          f'{len(dataset.train)} pairs in train, {len(dataset.validation)} in validation\n')
    print(table(metrics))
    print(f'\nfigures: {run / "metrics.json"}   pictures: {run / "grid.png"}')
    return metrics


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run', nargs='?', metavar='RUN', help='a run of train.py (default: the newest below runs/)')
    parser.add_argument('--data', metavar='DIR', help="a dataset folder (default: the run's own)")
    parser.add_argument('--cache', metavar='DIR',
                        help=f"where packed data is kept (default: the run's, else {default_cache()})")
    parser.add_argument('--batch-size', type=int, default=64, metavar='N', help='clips at once (default: 64)')
    parser.add_argument('--workers', type=int, metavar='N', help='threads that read files (default: one a core)')
    parser.add_argument('--device', metavar='NAME',
                        help='cpu, cuda, cuda:1, ... (default: the first GPU, else the CPU)')
    args = parser.parse_args(argv)
    device = choose_device(args.device)
    run = args.run or newest_run()
    config, model = load_run(run, device)
    evaluate_run(run, config, model, open_run_data(config, args.data, args.cache, args.workers),
                 args.batch_size, device)


if __name__ == '__main__':
    run_command(main)
