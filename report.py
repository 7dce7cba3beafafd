"""What people read: the tables of a run and of several, the paper's claims, loss curves, pages."""
import json
import os
import re
import warnings
from base64 import b64encode
from html import escape
from io import BytesIO
from statistics import mean, stdev

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import uniform_filter1d

from cargan import VARIANTS
from generate import METHODS
from runs import InputError, load_config, rank, world_size, write_text, written_whole

METRICS_VERSION = 1     # of metrics.json, raised when it holds other things than before
METRICS = {     # of metrics.json; 1: more is better, -1: less is
    'fid': -1, 'kid': -1, 'is': 1,
    'fid_independent': -1, 'kid_independent': -1, 'is_independent': 1,
    'accuracy': 1, 'accuracy_independent': 1, 'l1': -1, 'match': 1}
ABLATION = ('fid', 'is', 'fid_independent', 'is_independent', 'match')      # what judges A to D
COMPARISON = ('accuracy', 'accuracy_independent')                           # and the baselines
GENERATED = {'coarse': "I' coarse", 'fine': "I'' fine", 'other_sound': 'another sound'}
CONTROLS = {'real': 'real frames', 'random_frame': 'random frame', 'mean_frame': 'mean frame',
            'nearest_sound': 'nearest sound'}
PAPER = {       # of I'' by each model, and of the real frames; Table 1 does not name its split
    ('validation', 'fid'): {'A': 279.3022, 'B': 332.1574, 'C': 380.1104, 'D': 307.3725,
                            'E': 240.7771},
    ('validation', 'is'): {'A': 3.2221, 'B': 3.4337, 'C': 2.0699, 'D': 3.7215, 'E': 4.2023,
                           'real': 4.7552},
    ('train', 'accuracy'): {'S2IC': 0.8737, 'CMCGAN': 0.9105, 'E': 0.9954},
    ('validation', 'accuracy'): {'S2IC': 0.7556, 'CMCGAN': 0.7661, 'E': 0.9033, 'real': 0.9956}}
GAINS = {       # by how many per cent E is better than each model, says the text
    ('B', 'fid'): 27.51, ('C', 'fid'): 36.66, ('D', 'fid'): 21.67,
    ('B', 'is'): 22.39, ('C', 'is'): 103.01, ('D', 'is'): 13.01}
NOTES = (
    "match: how often a picture is nearer to its own frame than to that of another clip of its "
    'class. Real frames: fid and kid are to the other split. Random frame: a train frame of the '
    'class. Mean frame: the mean of these. Nearest sound: the one whose sound is nearest. Another '
    'sound: that of another clip of the class. is needs 100 pictures; fid and is of fewer than '
    '2,048 do not compare with published numbers.')
LOSSES = ('L_C', 'L_cGAN', 'L_L1', 'L_D')       # Eq. (2), G's side of Eq. (5), L1, D's of Eq. (5)


# ----------------------------------------------------------------------------------------- tables
# A table's columns: {title: (the metrics of each seed, the kind of picture, the paper's name)}.

def markdown(rows):
    """Rows of cells, the header first, as a Markdown table that reads well as it is, too."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [f'| {" | ".join(map(str.ljust, row, widths))} |' for row in rows]
    lines.insert(1, re.sub('[^|]', '-', lines[0]))
    return '\n'.join(lines)


def values(runs, metric, kind='fine', split='validation'):
    """A metric of each of several runs; [] unless all have it."""
    numbers = [run[split].get(kind, {}).get(metric) for run in runs]
    return [] if None in numbers else numbers


def cell(runs, metric, kind='fine', split='validation'):
    """A metric as text: the mean over the runs +- its deviation; '-' where it was not computed."""
    numbers = values(runs, metric, kind, split)
    if not numbers:
        return '-'
    text = f'{mean(numbers):.4g}'
    if len(set(numbers)) > 1:
        text += f' +- {stdev(numbers):.3g}'
    return text


def metric_rows(columns, split, metrics, ending=''):
    """A row for each metric that any column has; below it the paper's, of the same models."""
    rows = []
    for metric in metrics:
        published = PAPER.get((split, metric), {})
        cells = []
        paper = []
        for runs, kind, model in columns.values():
            cells.append(cell(runs, metric, kind, split))
            compares = model in published and cells[-1] != '-'
            paper.append(f'{published[model]:.4g}' if compares else '')
        if set(cells) != {'-'}:
            rows.append([f'{metric}{ending}', *cells])
        if any(paper):
            rows.append([f'{metric}{ending}, paper', *paper])
    return rows


def table(columns, split):
    """All metrics of a split, and a line that names what was not computed."""
    rows = metric_rows(columns, split, METRICS)
    computed = [row[0] for row in rows]
    missing = [metric for metric in METRICS if metric not in computed]
    text = markdown([[split, *columns], *rows])
    if 'fid' in missing:
        missing[:3] = ['fid, kid, is (no Inception weights)']
    if missing:
        text += f'\n\nnot computed: {", ".join(missing)}'
    return text


def read_metrics(folder):
    """What evaluate.py wrote into a folder; {} where it did not, or by other code than this."""
    try:
        metrics = json.loads((folder / 'metrics.json').read_text('utf-8'))
        return metrics if metrics['version'] == METRICS_VERSION else {}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def kind_columns(metrics, split, kinds):
    """The columns of one run for those of the {kind: title} that a split has."""
    return {title: ([metrics], kind, kind)
            for kind, title in kinds.items() if kind in metrics[split]}


def summary(runs):
    """Does a model hear, is it recognised, how far is it from the truth: I'' of validation."""
    text = ''
    match = cell(runs, 'match')
    if match != '-':
        text += (f'Does it hear? match {match}; the nearest sound '
                 f'{cell(runs, "match", "nearest_sound")}, without hearing 0.5. ')
    seen = cell(runs, 'accuracy_independent')
    if seen != '-':
        text += f'Is it recognised? accuracy_independent {seen}. '
    return (f'{text}How far from the truth? l1 {cell(runs, "l1")}; the mean frame '
            f'{cell(runs, "l1", "mean_frame")}.')


def dataset_text(metrics):
    """The data of a run in words."""
    counts = [f'{count} pairs in {split}' for split, count in metrics['pictures'].items()]
    return f'{metrics["data"] or "demo data"}, {metrics["size"]} pixels, {", ".join(counts)}'


def report_text(run, config, metrics):
    """The metrics of one run as Markdown: summary, a table for each split, mistakes."""
    text = [f'{run}: model {config["variant"]}, measured after epoch {metrics.get("epoch")}: '
            f'{dataset_text(metrics)}', summary([metrics])]
    for split in metrics['pictures']:
        columns = kind_columns(metrics, split, GENERATED | CONTROLS)
        columns[GENERATED['fine']] = [metrics], 'fine', config['variant']
        text.append(table(columns, split))
    text.append(NOTES)
    validation = metrics['validation']
    failures = validation.get('failures')
    if failures:                # of one class there are none
        recognised = {name: of_class['accuracy_independent']
                      for name, of_class in validation['fine']['classes'].items()}
        worst = sorted(recognised, key=recognised.get)[:3]
        worst = ', '.join(f'{name} {recognised[name]:.4g}' for name in worst)
        text.append(f'accuracy_independent of the worst classes of validation: {worst}')
        text.append(f'The independent classifier has {metrics["independent_accuracy"]:.4g} on real '
                    f"frames; it mistakes {failures['wrong']} of {failures['clips']} I'' of "
                    'validation')
        if 'near_silent' in failures:
            text[-1] += (f'. Near-silent are {failures["near_silent"]}, of which it mistakes '
                         f'{failures["near_silent_wrong"]}')
    return '\n\n'.join(text)


def verdict(ours, theirs, better):
    """Whether our sample of a metric is better than theirs (1: more is, -1: less) by Welch's t-test
    at 5 %: 'confirmed', 'reversed', or else 'undecided'.
    """
    from scipy.stats import ttest_ind           # slow to import, for tables alone
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')         # of a single seed, of constants
        t, p = ttest_ind(ours, theirs, equal_var=False)
    if not p < 0.05:                            # of a single seed it is nan
        return 'undecided'
    return 'confirmed' if better * t > 0 else 'reversed'


def comparison(models, model, metric):
    """Whether E is ahead of a model by a metric, in words; '' where it was not computed."""
    shown = [cell(models[name], metric) for name in ('E', model)]
    if '-' in shown:
        return ''
    ours, theirs = values(models['E'], metric), values(models[model], metric)
    better = METRICS[metric]
    text = f'{verdict(ours, theirs, better)} by {metric} ({" against ".join(shown)}'
    gain = GAINS.get((model, metric))
    if gain:
        percent = 100 * better * (mean(ours) / mean(theirs) - 1) + 0.0          # no -0
        text += f': {percent:.4g} % better, in the paper {gain} %'
    return f'{text})'


def claims(models):
    """A line on whether E is ahead of each other model, from {model: the metrics of each seed}."""
    lines = []
    for model in models:
        if model == 'E':
            continue
        metrics = ABLATION if model in VARIANTS else COMPARISON
        compared = [comparison(models, model, metric) for metric in metrics]
        lines.append(f'- E is ahead of {model}, {VARIANTS.get(model, "a baseline")}: '
                     f'{", ".join(filter(None, compared))}.')
    return '\n'.join(lines)


def paper_tables(columns, folder=None):
    """Tables 1 and 2 and the claims as Markdown; into tables.md and tables.json where a folder is
    given.

    `columns`: {title: (model, the metrics of each seed)}. Where a model has two columns, the claims
    are about the first.
    """
    models = {}
    for model, runs in columns.values():
        models.setdefault(model, runs)
    first = 'E' if 'E' in models else min(models)
    metrics = models[first][0]
    seeds = [f'{title} {len(runs)}' for title, (_, runs) in columns.items()]
    table1 = {title: (runs, 'fine', model) for title, (model, runs) in columns.items()}
    others = {}
    if 'E' in models:
        others['E, another sound'] = models['E'], 'other_sound', None
        others['E, wrong label'] = models['E'], 'wrong_label', None
    others |= kind_columns(metrics, 'validation', CONTROLS)
    table2 = {title: column for title, column in table1.items() if column[2] in METHODS}
    table2 |= others
    rows = [['', *table2]]
    for metric in (*COMPARISON, 'match'):
        for split in metrics['pictures']:
            rows += metric_rows(table2, split, [metric], f', {split}')
    text = [
        f'# {dataset_text(metrics)}',
        f'Model {first}. {summary(models[first])}',
        f'Mean +- deviation, seeds: {", ".join(seeds)}',
        '## Table 1', table(table1 | others, 'validation'), NOTES,
        '## Table 2', markdown(list(zip(*rows))),
        'S2IC and CMCGAN are not given the label and do not train against C; E has both. The paper '
        'quotes their accuracies from their own papers, each by another classifier.']
    if 'E' in models:
        given = cell(models['E'], 'accuracy_given', 'wrong_label')
        if given != '-':
            text.append('Wrong label: given the label of another class, compared with the one that '
                        f'sounds. Of these {given} are recognised as the label given.')
        text += [
            "## The paper's claims",
            "Confirmed or reversed: by Welch's t-test at 5 %. Of four such claims on the "
            'ablation, one table in five has a false one.',
            claims(models)]
    text = '\n\n'.join(text)
    if folder:
        write_text(folder / 'tables.md', f'{text}\n')
        write_text(folder / 'tables.json', json.dumps(columns))
    return text


# ------------------------------------------------------------------------------ the log, the curves

def log_rows(path):
    """The rows of log.csv as text."""
    text = path.read_text(errors='replace') if path.exists() else ''
    return text.rpartition('\n')[0].splitlines()[1:]        # a kill may have cut the last row


class Log:
    """log.csv of a run that has made `steps` steps, a row a step; those beyond its last checkpoint
    are made again. Losses stay on the device until they are written, every 100 steps.
    """

    def __init__(self, path, steps):
        self.path = path
        self.rows = []
        if rank() == 0:
            kept = [row for row in log_rows(path) if int(row.split(',')[0]) <= steps]
            header = ','.join(['step', 'epoch', *LOSSES])
            write_text(path, '\n'.join([header, *kept, '']))

    def add(self, step, epoch, losses, stems):
        """Note a step's LOSSES (4,); stems() names its pairs. Raises as flush()."""
        self.rows.append((step, epoch, losses, stems))
        if len(self.rows) >= 100:
            self.flush()

    def flush(self):
        """Write what has been noted. Raises InputError where a loss is not finite; bad-batch.txt
        names the pairs of that step.
        """
        if not self.rows:
            return
        steps, epochs, losses, stems = zip(*self.rows)
        self.rows = []
        losses = torch.stack(losses)            # (steps, 4); here the device waits
        if world_size() > 1:
            torch.distributed.all_reduce(losses)
            losses /= world_size()
        if rank() == 0:
            with open(self.path, 'a') as file:
                for step, epoch, numbers in zip(steps, epochs, losses.tolist()):
                    text = ','.join(f'{number:.6g}' for number in numbers)
                    file.write(f'{step},{epoch},{text}\n')
        wrong = (~losses.isfinite()).nonzero().tolist()
        if wrong:
            row, column = wrong[0]
            what = (f'{LOSSES[column]} is {losses[row, column]} at step {steps[row]}, epoch '
                    f'{epochs[row]}')
            path = self.path.with_name('bad-batch.txt')
            if rank() == 0:
                lines = f'{what}; its pairs:', *stems[row](), ''
                path.write_bytes(os.fsencode('\n'.join(lines)))
            raise InputError(f'{what}: its pairs are in {path}; {way_back(path.parent)}')


def way_back(run):
    """What to do after a value that is not finite, as an error line ends."""
    path = run / 'checkpoint.pt'
    kept = f'{path} is still the last good checkpoint'
    if not path.exists():
        kept = 'there is no checkpoint yet'
    return f'{kept}: go on with --resume and a lower --lr, or --amp off'


def read_log(path):
    """log.csv as epochs done (steps,) and LOSSES (steps, 4), without rows that are not finite."""
    rows = log_rows(path)
    rows = np.loadtxt(rows, delimiter=',', ndmin=2) if rows else np.empty((0, 6))
    rows = rows[np.isfinite(rows).all(axis=1)]
    last_step = dict(rows[:, [1, 0]])       # of each epoch
    epochs = np.interp(rows[:, 0], [0, *last_step.values()], [0, *last_step])
    return epochs, rows[:, 2:]


def ticks(low, high):
    """Three to six round numbers from low to high."""
    step = float(f'{(high - low) / 4:.0e}')
    return np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step


def draw_curve(name, epochs, losses):
    """A loss over the epochs, both (steps,), as a picture of 720 x 340: faint each step but for the
    outermost hundredth, bold the mean over a 25th of the steps.
    """
    smooth = uniform_filter1d(losses, 1 + len(losses) // 25)
    low, high = np.quantile(losses, [0.005, 0.995])
    high += 0.05 * (high - low or 1)

    def across(x):
        return np.interp(x, (0, epochs[-1]), (100, 700))

    def down(y):
        return np.interp(y, (low, high), (292, 48))

    plot = Image.new('RGB', (720, 340), 'white')
    draw = ImageDraw.Draw(plot)
    draw.font = ImageFont.load_default(size=24)
    draw.text((100, 4), f'{name} over the epochs', 'black')
    for tick in ticks(low, high):
        y = down(tick)
        draw.line([(100, y), (700, y)], '#dddddd')
        draw.text((88, y), f'{tick:g}', 'black', anchor='rm')
    for tick in ticks(0, epochs[-1]):
        draw.text((across(tick), 324), f'{tick:g}', 'black', anchor='ms')
    every = 1 + len(losses) // 1000         # a point a pixel
    for colour, line in (('#a9c4e4', losses), ('#1f5fa8', smooth)):
        draw.line(list(zip(across(epochs[::every]), down(line[::every]))), colour, 3)
    return plot


def draw_losses(log, path):
    """Draw the LOSSES of log.csv as a PNG, two rows of two; of an empty log none."""
    epochs, losses = read_log(log)
    if not len(epochs):
        return
    sheet = Image.new('RGB', (1440, 680))
    for i, name in enumerate(LOSSES):
        sheet.paste(draw_curve(name, epochs, losses[:, i]), (i % 2 * 720, i // 2 * 340))
    with written_whole(path) as part:
        sheet.save(part, 'PNG')


# ------------------------------------------------------------------------------------------- pages

HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><style>:root { color-scheme: light dark }
body { max-width: 62rem; margin: auto; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif;
       overflow-wrap: anywhere }
p { white-space: pre-line } pre, .scroll { overflow-x: auto } pre { font-size: 0.8rem }
table { border-collapse: collapse; font-size: 0.875rem; white-space: nowrap }
th, td { padding: 0.2rem 0.6rem; text-align: right; border-bottom: 1px solid #8886 }
:is(th, td):first-child { position: sticky; left: 0; text-align: left; background: Canvas }
figure { margin: 1rem 0 } img { max-width: 100%; height: auto; break-inside: avoid }
.scroll img { min-width: 45rem }
.row { display: grid; gap: 0 1rem;
       grid-template-columns: repeat(auto-fill, minmax(min(25rem, 100%), 1fr)) }
@media print { body { font-size: 10pt } table { font-size: 6pt } img { max-height: 22cm }
.row { grid-template-columns: 1fr 1fr } .scroll img { min-width: 0 } }</style>"""


def image_html(path, caption, width=1440, kind='JPEG'):
    """A picture in HTML, at most `width` pixels wide; '' where there is none."""
    if not path.is_file():
        return ''
    image = Image.open(path).convert('RGB')
    image.thumbnail((width, image.height))          # never larger
    file = BytesIO()
    image.save(file, kind)
    content = b64encode(file.getvalue()).decode()
    caption = escape(caption)
    return (f'<figure><figcaption>{caption}</figcaption><img alt="{caption}" '
            f'src="data:image/{kind.lower()};base64,{content}"></figure>')


def scrolling(html):
    """HTML in a box of its own, which scrolls where it is wider than the page."""
    return f'<div class="scroll" tabindex="0">{html}</div>'


def text_html(text):
    """Text of paragraphs, Markdown's headings and tables among them, as HTML."""
    parts = []
    for part in escape(text).strip().split('\n\n'):
        if part.startswith('#'):
            parts.append(f'<h2>{part.lstrip("# ")}</h2>')
        elif part.startswith('|'):
            rows = []
            for line in part.splitlines():
                cells = line[1:-1].replace('|', '</td><td>')
                rows.append(f'<tr><td>{cells}</td></tr>')
            rows[0] = rows[0].replace('td>', 'th>')
            del rows[1]                             # the dashes
            parts.append(scrolling(f'<table>{"".join(rows)}</table>'))
        else:
            parts.append(f'<p>{part}</p>')
    return '\n'.join(parts)


def write_html(path, title, parts, refresh=''):
    """Write a page that needs no other file."""
    title = escape(title)
    head = f'{HEAD}{refresh}<title>{title}</title></head><body><h1>{title}</h1>'
    write_text(path, '\n'.join([head, *parts, '</body></html>\n']))


def write_folder_page(folder, text):
    """Write report.html of several runs: their tables, and Figures 4 to 6 where they are there."""
    figures = [image_html(folder / f'figure{i}.png', f'As Figure {i} of the paper')
               for i in range(4, 7)]
    write_html(folder / 'report.html', f'{folder.resolve().name}: several runs',
               [text_html(text), *figures])


def write_page(run):
    """Write report.html and curves.png of a run (a Path) from what is in it so far. Raises
    InputError if it is none.
    """
    config = load_config(run)
    variant = config['variant']
    made = config.get('made', {})
    metrics = read_metrics(run)
    measured = metrics.get('epoch', 0)
    epoch = max(measured, made.get('epoch', 0))
    refresh = '<meta http-equiv="refresh" content="30">'
    parts = [
        text_html(f'Model {variant}, {VARIANTS.get(variant, "a baseline")}, on '
                  f'{config["data"] or "demo data"}, {config["size"]} pixels, preset '
                  f'{config.get("preset")}'),
        f'<pre tabindex="0">{escape(made.get("command", "settings: config.json"))}</pre>']
    if epoch >= config['epochs']:
        refresh = ''
        if measured < epoch:
            parts.append(text_html(f'now: python evaluate.py {run}'))
    if metrics:
        parts.append(text_html(report_text(run, config, metrics)))
    samples = sorted(run.glob('samples/epoch-*.png'))
    grid = run / 'grid.png'
    if measured < epoch and samples:
        grid = samples[-1]
    shown = samples[::1 + len(samples) // 8]
    draw_losses(run / 'log.csv', run / 'curves.png')
    facts = made | metrics.get('versions', {})
    curves = image_html(run / 'curves.png', 'Losses: faint each step, bold their mean', kind='PNG')
    machine = '\n'.join(f'{name}: {text}' for name, text in facts.items())
    parts += [
        image_html(grid, f"{grid.stem}: LMS, I', I'' and truth of a clip of each class"),
        image_html(run / 'sounds.png', "One class by six sounds: the quietest, then low to high"),
        scrolling(curves),
        '<details><summary>Samples over time</summary><div class="row">']
    parts += [image_html(path, path.stem, 400) for path in shown]
    parts += [
        '</div></details>',
        image_html(run / 'failures.png', "Failures: I'' that the independent classifier mistook"),
        text_html(f'## Machine\n\n{machine}')]
    write_html(run / 'report.html', f'{run.resolve().name}, epoch {epoch} of {config["epochs"]}',
               parts, refresh)
