"""What people look at: the paper's tables and ours, picture grids, Figures 4 to 6, a run's page, a recording."""
import json
import os
from base64 import b64encode
from html import escape
from io import BytesIO
from math import ceil, floor, isfinite, sqrt
from pathlib import Path
from statistics import mean, stdev, variance

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont

from cargan import VARIANTS
from preprocess import draw_grid, example_pictures
from runs import InputError, load_config, rank, world_size, written_whole

FIGURES = {'fid': -1, 'kid': -1, 'is': 1, 'fid_independent': -1, 'kid_independent': -1, 'is_independent': 1,
           'accuracy': 1, 'accuracy_independent': 1, 'l1': -1}      # of metrics.json; 1: more is better
CONTROLS = {'real': 'real frames', 'random_frame': 'random frame', 'mean_frame': 'mean frame'}
PAPER = {       # of I'' by the models A to E, and of the real frames; Table 1 does not name its split
    ('validation', 'fid'): {'A': 279.3022, 'B': 332.1574, 'C': 380.1104, 'D': 307.3725, 'E': 240.7771},
    ('validation', 'is'): {'A': 3.2221, 'B': 3.4337, 'C': 2.0699, 'D': 3.7215, 'E': 4.2023, 'real': 4.7552},
    ('train', 'accuracy'): {'S2IC': 0.8737, 'CMCGAN': 0.9105, 'E': 0.9954},
    ('validation', 'accuracy'): {'S2IC': 0.7556, 'CMCGAN': 0.7661, 'E': 0.9033, 'real': 0.9956},
}
PARTS = {       # what each model lacks, and what the text says that E gains by it in fid and is, in %
    'A': ('attention', None, None), 'B': ('the classification loss L_C', 27.51, 22.39),
    'C': ('the residue module', 36.66, 103.01), 'D': ('stage II', 21.67, 13.01)}
METHODS = ('S2IC', 'CMCGAN', 'E')       # Table 2
LOSSES = ('L_C', 'L_cGAN', 'L_L1', 'L_D')       # Eq. (2), G's side of Eq. (5), L1, D's side of Eq. (5)
RECORDING_ENDINGS = ('.png', '.gif')        # what save_recording() writes
NEAR_SILENT = -40.0     # dB of Split.loudness: what plays in the demo data is above -15, its rests are below -50


# ------------------------------------------------------------------------------------------ tables

def markdown(rows):
    """Rows of cells, the header first, as a table that reads well in Markdown and as it is."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ['| ' + ' | '.join(cell.ljust(width) for cell, width in zip(row, widths)) + ' |' for row in rows]
    return '\n'.join([lines[0], '|' + '|'.join('-' * (width + 2) for width in widths) + '|', *lines[1:]])


def values(runs, split, kind, figure):
    """A figure of runs that differ in their seed, by their metrics: [one of each], or [] where it was not computed."""
    found = [run[split].get(kind, {}).get(figure) for run in runs]
    return [] if None in found else found


def cell(runs, split, kind, figure):
    """A figure as text: of several runs mean +- deviation, of one the deviation over its splits where it has some."""
    found = values(runs, split, kind, figure)
    spread = stdev(found) if len(found) > 1 else found and runs[0][split][kind].get(f'{figure}_std')
    return (f'{mean(found):.4f}' if found else '-') + (f' +- {spread:.4f}' if isinstance(spread, float) else '')


def table(columns, split):
    """All figures of a split for {title: (runs, kind, model)}: the metrics of runs that differ in their seed, the kind
    of picture, and under which model the paper has it, whose figure stands below ours.
    """
    rows = [[split, *columns]]
    for figure in FIGURES:
        rows.append([figure, *(cell(runs, split, kind, figure) for runs, kind, _ in columns.values())])
        if (split, figure) in PAPER:
            rows.append([f'{figure}, paper', *(str(PAPER[split, figure].get(x, '-')) for *_, x in columns.values())])
    return markdown(rows)


def controls(metrics):
    """The columns of what scores without a model, from the metrics of any run on the data."""
    return {title: ([metrics], kind, kind) for kind, title in CONTROLS.items()}


def about(metrics):
    """What to know of the figures beside them."""
    return ('-: not computed; fid and kid need 2 pictures in both splits, is needs 100. Real frames: their fid and kid '
            'are to the other split; random frame: a train frame of the class; mean frame: the mean train frame of the '
            'class.' + ' fid and is of fewer than 2,048 pictures are not comparable with published figures.' * (
                min(metrics['pictures'].values()) < 2048))


def report_text(run, config, metrics):
    """What evaluate_run() found of one run, as text; `run` is the folder that it wrote to."""
    fine, failures = metrics['validation']['fine'], metrics['validation']['failures']
    columns = {"I' coarse": ([metrics], 'coarse', None), "I'' fine": ([metrics], 'fine', config['variant'])}
    worst = sorted(fine['classes'].items(), key=lambda item: (item[1]['accuracy_independent'], -item[1]['l1']))
    return '\n\n'.join([
        f'{run}, model {config["variant"]} after epoch {metrics.get("epoch")}: {on_what(metrics)}',
        *(table(columns | controls(metrics), split) for split in metrics['pictures']), about(metrics),
        "worst I'' of validation: " + ', '.join(
            '{} (accuracy_independent {accuracy_independent:.4f}, l1 {l1:.4f})'.format(name, **found)
            for name, found in worst[:3]),
        f"the independent classifier, accuracy {metrics['independent_accuracy']:.4f} on validation, mistakes "
        f"{failures['wrong']} of {failures['clips']} I'' of validation"
        + (', near-silent are {near_silent_wrong} of these and {near_silent} of all'.format(**failures)
           if 'near_silent' in failures else ''),
        f'in {run}: metrics.json, grid.png' + ', failures.png' * bool(failures['wrong'])
        + ', report.html' * Path(run, 'config.json').exists()])


def on_what(metrics):
    """The data of a run in words."""
    return f'{metrics["data"] or "demo data"}, {metrics["size"]} pixels, ' + ', '.join(
        f'{count} pairs in {split}' for split, count in metrics['pictures'].items())


def verdict(ours, theirs, better):
    """Whether our sample of a figure is better than theirs (1: more is, -1: less): 'confirmed' or 'reversed' where the
    means differ by more than two standard errors of their difference, else 'undecided'.
    """
    if min(len(ours), len(theirs)) < 2:
        return 'undecided'
    two_errors = 2 * sqrt(variance(ours) / len(ours) + variance(theirs) / len(theirs))
    ahead = (mean(ours) - mean(theirs)) * better
    return 'confirmed' if ahead > two_errors else 'reversed' if ahead < -two_errors else 'undecided'


def claims(models):
    """A sentence on each of the paper's five claims whose models are there, with E's improvement in per cent beside the
    text's, from {model: the metrics of each of its seeds}.
    """
    def seeds(model, figure):
        return values(models[model], 'validation', 'fine', figure)

    def judge(model, what, figures, gains):
        found = []
        for figure, gain in zip(figures, gains):
            better, shown = FIGURES[figure], [cell(models[x], 'validation', 'fine', figure) for x in ('E', model)]
            text = f'{verdict(seeds("E", figure), seeds(model, figure), better)} by {figure} ({" against ".join(shown)}'
            if gain and '-' not in shown:
                ours = 100 * better * (mean(seeds('E', figure)) / mean(seeds(model, figure)) - 1) + 0.0     # no -0.00
                text += f': {ours:.2f} % better, in the paper {gain:.2f} %'
            found.append(f'{text})')
        return f'- E is ahead of {model}, {what}: {", ".join(found)}.'

    space = '' if all(seeds(model, 'fid') for model in models) else '_independent'
    sentences = [judge(model, f'without {part}', (f'fid{space}', f'is{space}'), gains)
                 for model, (part, *gains) in PARTS.items() if model in models]
    if rivals := [model for model in METHODS[:2] if model in models]:
        best = max(rivals, key=lambda model: mean(seeds(model, 'accuracy_independent')))
        sentences.append(judge(best, 'the better baseline', ('accuracy', 'accuracy_independent'), (None, None)))
    return '\n'.join(sentences)


def paper_tables(columns, folder):
    """Write tables.md and tables.json, Tables 1 and 2 and the claims, from {title: (model, the metrics of each of its
    seeds)}, to a folder. Returns the text. Where a model has two columns, its claims are about the first.
    """
    metrics, models = next(iter(columns.values()))[1][0], {}
    for model, runs in columns.values():
        models.setdefault(model, runs)
    table1 = {title: (runs, 'fine', model) for title, (model, runs) in columns.items()}
    methods = {title: column for model in METHODS for title, column in table1.items() if column[2] == model}
    if 'E' in models:
        methods |= {'E, wrong label': (models['E'], 'wrong_label', None),
                    'E, another sound': (models['E'], 'other_sound', None)}
    heads = [(split, figure) for figure in ('accuracy', 'accuracy_independent') for split in metrics['pictures']]
    table2 = [['', *(f'{figure}, {split}' for split, figure in heads), 'paper, train', 'paper, test']]
    table2 += [[title, *(cell(runs, split, kind, figure) for split, figure in heads),
                *(str(PAPER[split, 'accuracy'].get(model, '-')) for split in metrics['pictures'])]
               for title, (runs, kind, model) in (methods | controls(metrics)).items()]
    text = [f'# {on_what(metrics)}',
            'Mean +- deviation, seeds: ' + ', '.join(f'{title} {len(runs)}' for title, (_, runs) in columns.items()),
            '## Table 1', table(table1 | controls(metrics), 'validation'), about(metrics),
            '## Table 2', markdown(table2),
            'S2IC and CMCGAN are not given the label and do not train against C; E has both. The paper quotes their '
            'figures from their own papers, each by another classifier. E, wrong label: given the label of another '
            "class, compared with the sound's. E, another sound: given the LMS of another clip of the class."]
    if 'E' in models:
        given, other, own = (cell(models['E'], 'validation', kind, figure) for kind, figure in
                             (('wrong_label', 'accuracy_given'), ('other_sound', 'l1'), ('fine', 'l1')))
        text += [f'Of validation, E, wrong label, is recognised as the label given: {given}. With another sound l1 is '
                 f'{other}, with its own {own}.',
                 "## The paper's claims", 'Confirmed or reversed: the means differ by more than two standard errors of '
                 'their difference.', claims(models)]
    text, kept = '\n\n'.join(text), {title: dict(zip(('model', 'metrics'), found)) for title, found in columns.items()}
    for name, content in ('tables.md', text), ('tables.json', json.dumps(kept, indent=1)):
        with written_whole(Path(folder, name)) as part:
            part.write_text(content + '\n')
    return text


# ---------------------------------------------------------------------------------------- pictures

def failure_grid(model, split, classes, predictions, path, device='cpu'):
    """Draw the clips whose I'' the independent classifier mistook, the quietest first (section 4.2), 16 at most, if
    there are any. Returns how many there are, and how many near-silent ones are among them and among all.
    """
    loudness, drawn = split.loudness(), split.lms.dtype == np.uint8     # of drawn LMS the level is not known
    title = '{}\n' + ('brightness {:.0f}' if drawn else '{:.0f} dB') + '\nseen as\n{}'
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
    """Draw figure4.png (I'' of the models A to E), figure5.png (their I' beside I'') and figure6.png (S2IC, CMCGAN and
    E), each where there are such runs; `shown`: {title: (model, example_pictures())}.
    """
    for number, models, stages in ((4, 'ABCDE', {'': "I''"}), (5, 'ABCDE', {" I'": "I'", " I''": "I''"}),
                                   (6, METHODS, {'': "I''"})):
        columns = {title + suffix: (rows, stage) for title, (model, rows) in shown.items() if model in models
                   for suffix, stage in stages.items()}
        if columns:
            rows = [(clip, {'LMS': own['LMS'], **{title: rows[i][1][stage] for title, (rows, stage) in columns.items()},
                            'truth': own['truth']}) for i, (clip, own) in enumerate(next(iter(columns.values()))[0])]
            draw_grid(rows, Path(folder, f'figure{number}.png'))


def save_recording(frames, path, hop=0.5):
    """Write what generate_recording() gave: .png, 16 to a row below their times, or .gif, which moves in real time."""
    if str(path).endswith('.png'):
        return draw_grid([('', {f'{seconds:g} s': image for seconds, image in frames[i:i + 16]})
                          for i in range(0, len(frames), 16)], path)
    ends = [10 * round(100 * hop * i) for i in range(len(frames) + 1)]      # in ms: a GIF counts in 1/100 s
    with written_whole(path) as part:
        frames[0][1].save(part, 'GIF', save_all=True, append_images=[image for _, image in frames[1:]], loop=0,
                          duration=[end - start for start, end in zip(ends, ends[1:])])


# ------------------------------------------------------------------------------- a run's log and page

class Log:
    """log.csv of a run that has made `steps` steps, a row a step; those beyond its last checkpoint are made again.
    Losses stay on the device until they are written, every 100 steps.
    """

    def __init__(self, path, steps):
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
    path = run / 'checkpoint.pt'
    kept = f'{path} is still the last good checkpoint' if path.exists() else 'there is no checkpoint yet'
    return f'{kept}: go on with --resume and a lower --lr, or --amp off'


HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><style>:root { color-scheme: light dark; --line: #1f5fa8 }
@media (prefers-color-scheme: dark) { :root { --line: #8fc1ff } }
body { max-width: 62rem; margin: auto; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
p { white-space: pre-line } pre { overflow-x: auto; font-size: 0.8rem }
figure { margin: 1rem 0 } img, svg { max-width: 100%; height: auto; break-inside: avoid }
.row { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(25rem, 100%), 1fr)); gap: 0 1rem }
polyline { fill: none; stroke: var(--line); stroke-width: 1.5; stroke-linecap: round } .raw { opacity: 0.4 }
.grid { opacity: 0.2 } text { fill: currentColor } .ms { text-anchor: middle } .rs { text-anchor: end }
@media print { body { font-size: 10pt } pre { font-size: 6pt } img { max-height: 22cm }
.row { grid-template-columns: 1fr 1fr } }</style>"""


def ticks(low, high, least=0):
    """Three to six round numbers from low to high, `least` apart or more."""
    step = max(least, float(f'{(high - low) / 4:.0e}'))
    return np.arange(ceil(low / step), floor(high / step) + 1) * step


def read_log(path):
    """log.csv as epochs done (steps,) and LOSSES (steps, 4), without rows that are torn or not finite."""
    text = path.read_text(errors='replace').rpartition('\n')[0] if path.exists() else ''
    rows = [row for row in ['nan,,,,,', *text.splitlines()] if row.count(',') == 5]
    rows = np.genfromtxt(rows, delimiter=',', comments=None).reshape(len(rows), 6)
    rows = rows[np.isfinite(rows).all(axis=1)]
    ends = {epoch: step for step, epoch, *_ in rows}
    return np.interp(rows[:, 0], [0, *ends.values()], [0, *ends]), rows[:, 2:]


def draw_losses(log, path):
    """Draw LOSSES over the epochs: faint each but for the outermost hundredth, bold the mean over a 25th of the steps;
    all as one PNG. Returns an SVG of each; of an empty log none.
    """
    x, losses = read_log(log)
    if not len(x):
        return []
    near, every = np.ones(2 * min(1 + len(x) // 50, (len(x) - 1) // 2) + 1), 1 + len(x) // 1000     # a point a pixel
    sheet, font, plots = Image.new('RGB', (1440, 680), 'white'), ImageFont.load_default(size=24), []
    for i, (term, raw) in enumerate(zip(LOSSES, losses.T)):
        smooth = np.convolve(raw, near, 'same') / np.convolve(np.ones(len(x)), near, 'same')
        low, high = np.quantile([*raw, *smooth], [0.005, 0.995])
        low, high = low - 0.05 * (high - low or 1), high + 0.05 * (high - low or 1)
        across, down = ((0, x[-1]), (50, 350)), ((low, high), (146, 24))    # to pixels of 360 x 170
        plot, svg = Image.new('RGB', (720, 340), 'white'), f'role="img" aria-label="{term} over the epochs">'
        draw = ImageDraw.Draw(plot)
        for kind, colour, epochs, values in [
                *(('grid', '#dddddd', (0, x[-1]), (tick, tick)) for tick in ticks(low, high)),
                ('raw', '#a9c4e4', x[::every], raw[::every]), ('smooth', '#1f5fa8', x[::every], smooth[::every])]:
            points = list(zip(np.interp(epochs, *across), np.interp(values, *down)))
            draw.line([(2 * a, 2 * b) for a, b in points], colour, 3)
            svg += f'<polyline class="{kind}" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in points)}"/>'
        for a, b, anchor, word in [
                (50, 12, 'ls', term), (44, 162, 'rs', 'epoch'),
                *((44, np.interp(tick, *down) + 4, 'rs', f'{tick:g}') for tick in ticks(low, high)),
                *((np.interp(tick, *across), 162, 'ms', f'{tick:g}') for tick in ticks(0, x[-1], least=1))]:
            draw.text((2 * a, 2 * b), word, 'black', font, anchor)
            svg += f'<text class="{anchor}" x="{a:.1f}" y="{b:.1f}">{word}</text>'
        sheet.paste(plot, (i % 2 * 720, i // 2 * 340))
        plots.append(f'<svg viewBox="0 0 360 170" font-size="12" {svg}</svg>')
    with written_whole(path) as part:
        sheet.save(part, 'PNG')
    return plots


def image_html(path, caption, pixels=1_100_000):
    """A picture as a JPEG in HTML, of at most so many pixels; '' where there is none."""
    if not path.is_file():
        return ''
    image, file, caption = Image.open(path).convert('RGB'), BytesIO(), escape(caption)
    image.thumbnail([side * (pixels / image.width / image.height) ** 0.5 for side in image.size])   # never larger
    image.save(file, 'JPEG')
    return (f'<figure><figcaption>{caption}</figcaption><img alt="{caption}" src="data:image/jpeg;base64,'
            f'{b64encode(file.getvalue()).decode()}"></figure>')


def text_html(text):
    """Text of paragraphs, Markdown's headings and tables among them, as HTML."""
    return '\n'.join(f'<h2>{part.lstrip("# ")}</h2>' if part.startswith('#') else
                     f'<pre tabindex="0">{part}</pre>' if part.startswith('|') else f'<p>{part}</p>'
                     for part in escape(text).strip().split('\n\n'))


def write_html(path, title, parts, refresh=''):
    """Write a page that needs no other file."""
    title = escape(title)
    with written_whole(path) as part:       # a name may hold bytes that are no text
        part.write_text('\n'.join([HEAD, f'{refresh}<title>{title}</title></head><body><h1>{title}</h1>', *parts,
                                   '</body></html>\n']), 'utf-8', 'backslashreplace')


def write_folder_page(folder, text):
    """Write report.html of several runs: their tables, and which of Figures 4 to 6 are in the folder."""
    figures = [image_html(folder / f'figure{i}.png', f'As Figure {i} of the paper') for i in (4, 5, 6)]
    write_html(folder / 'report.html', f'{folder.resolve().name}: several runs', [text_html(text), *figures])


def write_page(run):
    """Write report.html and curves.png of a run (a Path) from what is in it so far. Raises InputError if it is none."""
    config, path = load_config(run), run / 'metrics.json'
    made, metrics = config.get('made', {}), json.loads(path.read_text()) if path.exists() else {}
    samples = sorted((int(path.stem[6:]), path) for path in run.glob('samples/epoch-*.png') if path.stem[6:].isdigit())
    shown = samples[::ceil(len(samples) / 8) or 1]
    done = metrics.get('epoch', 0) >= config['epochs']
    epoch, grid = (metrics['epoch'], run / 'grid.png') if done else (samples or [(0, run / 'none yet')])[-1]
    write_html(run / 'report.html', f'{run.resolve().name}, epoch {epoch} of {config["epochs"]}', [
        text_html(f'Model {config["variant"]}, {VARIANTS.get(config["variant"], "a baseline")}, on '
                  f'{config["data"] or "demo data"}, {config["size"]} pixels, preset {config.get("preset")}'),
        f'<pre tabindex="0">{escape(made.get("command", "settings: config.json"))}</pre>',
        image_html(grid, f"A clip of each class after epoch {epoch}: LMS, I', I'' and truth"),
        text_html(report_text(run, config, metrics)) if metrics else '',
        '<h2>Losses: faint each step, bold their mean</h2><div class="row">',
        *draw_losses(run / 'log.csv', run / 'curves.png'),
        f'</div><details><summary>Samples over time, {len(shown)} of {len(samples)}</summary><div class="row">',
        *(image_html(path, f'epoch {i}', 220_000) for i, path in shown),
        '</div></details>', image_html(run / 'failures.png', "Failures: I'' that the independent classifier mistook"),
        text_html('## Machine\n\n' + '\n'.join(f'{name}: {text}' for name, text in (made | metrics.get(
            'versions', {})).items() if text and name != 'command'))],
        '' if done else '<meta http-equiv="refresh" content="30">')
