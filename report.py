"""What people look at: the figures as text, beside the paper's, and grids of pictures, Figures 4 and 5 among them."""
import os
from math import ceil, isfinite
from statistics import mean, stdev

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont

from preprocess import log_mel_spectrogram, network_lms
from runs import InputError, rank, world_size, written_whole

FIGURES = ('fid', 'kid', 'is', 'fid_independent', 'kid_independent', 'is_independent',      # of metrics.json
           'accuracy', 'accuracy_independent', 'l1')
CONTROLS = {'real': 'real frames', 'random_frame': 'random frame', 'mean_frame': 'mean frame'}
PAPER = {       # of I'' by the models A to E, and of the real frames; Table 1 does not name its split
    ('validation', 'fid'): {'A': 279.3022, 'B': 332.1574, 'C': 380.1104, 'D': 307.3725, 'E': 240.7771},
    ('validation', 'is'): {'A': 3.2221, 'B': 3.4337, 'C': 2.0699, 'D': 3.7215, 'E': 4.2023, 'real': 4.7552},
    ('train', 'accuracy'): {'S2IC': 0.8737, 'CMCGAN': 0.9105, 'E': 0.9954},
    ('validation', 'accuracy'): {'S2IC': 0.7556, 'CMCGAN': 0.7661, 'E': 0.9033, 'real': 0.9956},
}
NEAR_SILENT = -40.0     # dB of Split.loudness: what plays in the demo data is above -15, its rests are below -50


# -------------------------------------------------------------------------------------------- text

def table(columns):
    """The figures of both splits as lines of text. `columns` is {title: (runs, kind, model)}: the metrics of one
    run or of several that differ in their seed (then mean +- deviation), the kind of picture that the column
    shows, and under which model (A to E, S2IC, CMCGAN, real) the paper has it, whose figure stands below ours.
    """
    width = 22 if any(len(runs) > 1 for runs, *_ in columns.values()) else 18

    def row(title, cells):
        return f'  {title:21}' + ''.join(cell.rjust(width) for cell in cells)

    def number(runs, split, kind, figure):
        values = [run[split][kind].get(figure) for run in runs]
        if None in values:      # two controls have no accuracy
            return '-' if figure == 'accuracy' else 'not computed'
        spread = stdev(values) if len(values) > 1 else runs[0][split][kind].get(f'{figure}_std')
        return f'{mean(values):.4f}' + (f' +- {spread:.4f}' if spread is not None else '')

    lines = [row('', [title[1 - width:] for title in columns])]
    for split in ('train', 'validation'):
        lines.append(split)
        for figure in FIGURES:
            lines.append(row(figure, [number(runs, split, kind, figure) for runs, kind, _ in columns.values()]))
            if paper := PAPER.get((split, figure)):
                cells = [f'{paper[model]:.4f}' if model in paper else '-' for *_, model in columns.values()]
                lines.append(row(f'{figure}, paper', cells))
    return '\n'.join(lines)


def print_tables(title, columns, metrics):
    """Print the table() of these columns and the controls, and what to know of it; `metrics` are those of one run."""
    data, pictures = f'{metrics["data"] or "demo data"}, {metrics["size"]} pixels', metrics['pictures']
    controls = {control: ([metrics], kind, kind) for kind, control in CONTROLS.items()}
    print(f'\n{title}: {data}, ' + ', '.join(f'{count} pairs in {split}' for split, count in pictures.items())
          + f'\n\n{table(columns | controls)}\n\naccuracy in Table 2, train / validation: '
          + ', '.join('{} {:.4f} / {:.4f}'.format(name, *(PAPER[split, 'accuracy'][model] for split in pictures))
                      for name, model in (('S2IC', 'S2IC'), ('CMCGAN', 'CMCGAN'), ('CAR-GAN', 'E')))
          + '; judged by other classifiers; only CAR-GAN is given the label')
    if min(pictures.values()) < 2048:
        print('fid and is of fewer than 2,048 pictures are not comparable with published figures; where there are too '
              'few, they are not computed: fid and kid need 2 in both splits, is 100')


def print_report(run, config, metrics):
    """Print what evaluate_run() found of one run; `run` is the folder that it wrote to."""
    fine, failures = metrics['validation']['fine'], metrics['validation']['failures']
    columns = {"I' coarse": ([metrics], 'coarse', None), "I'' fine": ([metrics], 'fine', config['variant'])}
    print_tables(f'{run}, model {config["variant"]} after epoch {metrics.get("epoch")}', columns, metrics)
    worst = sorted(fine['classes'].items(), key=lambda item: (item[1]['accuracy_independent'], -item[1]['l1']))
    print("worst I'' of validation: " + ', '.join(
        '{} (accuracy_independent {accuracy_independent:.4f}, l1 {l1:.4f})'.format(name, **found)
        for name, found in worst[:3]))
    silent = ', near-silent are {near_silent_wrong} of these and {near_silent} of all'
    print(f"the independent classifier, accuracy {metrics['independent_accuracy']:.4f} on validation, mistakes "
          f"{failures['wrong']} of {failures['clips']} I'' of validation"
          + (silent.format(**failures) if 'near_silent' in failures else ''))
    print(f'in {run}: metrics.json, grid.png' + (', failures.png' if failures['wrong'] else ''))


# ---------------------------------------------------------------------------------------- pictures

def as_saved(image):
    """Images (..., 3, S, S) in [-1, 1] as they would come back from a file: rounded to 256 levels."""
    return ((image.float().clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def picture(image):
    """An image (3, S, S) in [-1, 1] as a PIL picture."""
    pixels = ((as_saved(image).cpu() + 1) * 127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def lms_picture(lms):
    """An LMS (1 or 3, S, S) in [-1, 1] as a PIL picture: low bands at the bottom, bright is loud; RGB as it is."""
    if len(lms) == 3:
        return picture(lms)
    level = (lms[0].flip(0).cpu().numpy() + 1) / 2
    stops = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]])
    pixels = [np.interp(level, np.linspace(0, 1, 5), stop) for stop in stops.T]
    return Image.fromarray(np.stack(pixels, axis=2).round().astype(np.uint8))


def draw_grid(rows, path):
    """Draw rows [(title, {column: picture})] as one PNG; tiles of at least 128 pixels."""
    tile = max([128] + [image.width for _, images in rows for image in images.values()])
    font, step, left, top = ImageFont.load_default(size=15), tile + 4, 130, 28
    sheet = Image.new('RGB', (left + len(rows[0][1]) * step, top + len(rows) * step), 'white')
    draw = ImageDraw.Draw(sheet)
    for x, column in enumerate(rows[0][1]):
        draw.text((left + x * step + tile / 2, top / 2), column, 'black', font, anchor='mm')
    for y, (title, images) in enumerate(rows):
        draw.multiline_text((left - 8, top + y * step + tile / 2), title.replace('_', ' '), 'black', font,
                            anchor='rm', align='right')
        for x, image in enumerate(images.values()):
            sheet.paste(image.resize((tile, tile), Image.Resampling.BICUBIC), (left + x * step, top + y * step))
    with written_whole(path) as part:
        sheet.save(part, 'PNG')


def example_clips(dataset):
    """A pair of each class, of validation or, where that has none, train: [(title, (lms, image, label) of one)]."""
    examples = []
    for label, name in enumerate(dataset.classes):
        split, title = ((dataset.validation, name) if label in dataset.validation.labels
                        else (dataset.train, f'{name} (train)'))
        examples.append((title, split.batch(torch.nonzero(split.labels == label)[0])))
    return examples


@torch.inference_mode()
def example_pictures(model, examples, device='cpu', nearest=None):
    """[(title, {'LMS': picture, "I'": ..., "I''": ..., 'truth': ...})] of example clips, in eval mode; the model is
    left in the mode it was in. `nearest` maps I'' (B, 3, S, S) to the train frames most like it, a further column.
    """
    training, rows = model.training, []
    model.eval()
    for title, (lms, image, label) in examples:
        coarse, fine, _ = model(lms.to(device), label.to(device))
        shown = {"I'": coarse, "I''": fine, 'truth': image} | ({'nearest in train': nearest(fine)} if nearest else {})
        rows.append((title, {'LMS': lms_picture(lms[0]), **{name: picture(x[0]) for name, x in shown.items()}}))
    model.train(training)
    return rows


def failure_grid(model, split, classes, predictions, path, device='cpu'):
    """Draw the clips whose I'' the independent classifier mistook, the quietest first (section 4.2), 16 at most, if
    there are any. Returns how many there are, and how many near-silent ones are among them and among all.
    """
    loudness, drawn = split.loudness(), split.lms.dtype == np.uint8     # of drawn LMS the level is not known
    title = '{}\nbrightness {:.0f}\nseen as\n{}' if drawn else '{}\n{:.0f} dB\nseen as\n{}'
    wrong = torch.nonzero(predictions != split.labels).flatten()
    wrong = wrong[loudness[wrong].argsort()]
    path.unlink(missing_ok=True)
    if len(wrong):
        examples = [(title.format(classes[split.labels[i]], loudness[i], classes[predictions[i]]), split.batch([i]))
                    for i in wrong[:16]]
        draw_grid(example_pictures(model, examples, device), path)
    found, silent = dict(clips=len(split), wrong=len(wrong)), loudness < NEAR_SILENT
    return found if drawn else dict(found, near_silent=silent.sum().item(),
                                    near_silent_wrong=silent[wrong].sum().item())


def paper_figures(shown, folder):
    """Draw figure4.png (I'' of each model) and figure5.png (I' beside I''); `shown`: {title: example_pictures()}."""
    *_, last = shown.values()
    for name, stages in (('figure4.png', {'': "I''"}), ('figure5.png', {" I'": "I'", " I''": "I''"})):
        draw_grid([(clip, {'LMS': images['LMS'],
                           **{title + suffix: rows[i][1][stage] for title, rows in shown.items()
                              for suffix, stage in stages.items()},
                           'truth': images['truth']}) for i, (clip, images) in enumerate(last)], folder / name)


@torch.inference_mode()
def generate_recording(model, classes, waveform, sample_rate, label, size, device='cpu'):
    """I'' of each half second of a recording (n,) in [-1, 1], the last one filled up with silence, as one picture."""
    parts = [log_mel_spectrogram(waveform[i * sample_rate // 2:(i + 1) * sample_rate // 2], sample_rate)
             for i in range(max(1, ceil(2 * len(waveform) / sample_rate)))]
    lms = network_lms(torch.from_numpy(np.stack(parts)), size).to(device)               # (half seconds, 1, S, S)
    label = torch.tensor([classes.index(label)], device=device)
    return picture(torch.cat([model(part, label)[1][0] for part in lms.split(1)], dim=2))


# ----------------------------------------------------------------------------------------- the log

LOSSES = ('L_C', 'L_cGAN', 'L_L1', 'L_D')       # Eq. (2), G's side of Eq. (5), L1, D's side of Eq. (5)


class Log:
    """log.csv: a row a step. Losses stay on the device until they are written, every 100 steps."""

    def __init__(self, path, steps):
        """Open the log of a run that has made `steps` steps; rows beyond its last checkpoint are made again."""
        self.path, self.rows = path, []
        if rank() == 0:
            rows = path.read_text(errors='replace').splitlines() if steps and path.exists() else []
            kept = [row for row in rows if row.split(',')[0].isdigit() and int(row.split(',')[0]) <= steps]
            with written_whole(path) as part:
                part.write_text('\n'.join([','.join(('step', 'epoch', *LOSSES)), *kept, '']))

    def add(self, step, epoch, losses, stems):
        """Note a step's LOSSES (4,); stems() names its pairs. Raises as flush()."""
        self.rows.append((step, epoch, losses, stems))
        if len(self.rows) >= 100:
            self.flush()

    def flush(self):
        """Write what has been noted. Raises InputError where a loss is not finite; bad-batch.txt names its pairs."""
        if not self.rows:
            return
        losses = torch.stack([row[2] for row in self.rows])                 # (steps, 4): the one wait for the device
        if world_size() > 1:
            dist.all_reduce(losses)
            losses /= world_size()
        rows, self.rows = list(zip(self.rows, losses.tolist())), []
        if rank() == 0:
            with open(self.path, 'a') as file:
                file.writelines(f'{step},{epoch},' + ','.join(f'{value:.6g}' for value in values) + '\n'
                                for (step, epoch, *_), values in rows)
        for (step, epoch, _, stems), values in rows:
            wrong = [f'{name} is {value}' for name, value in zip(LOSSES, values) if not isfinite(value)]
            if wrong:
                bad, what = self.path.with_name('bad-batch.txt'), f'{wrong[0]} at step {step}, epoch {epoch}'
                if rank() == 0:
                    bad.write_bytes(os.fsencode('\n'.join([f'{what}; its pairs:', *stems(), ''])))
                raise InputError(f'{what}: the pairs of that step are in {bad}; {way_back(bad.parent)}')


def way_back(run):
    """What to do after a value that is not finite, as an error line ends."""
    checkpoint = run / 'checkpoint.pt'
    kept = f'{checkpoint} is still the last good checkpoint' if checkpoint.exists() else 'there is no checkpoint yet'
    return f'{kept}: go on with --resume and a lower --lr, or --amp off'
